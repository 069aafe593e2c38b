"""The closed world of the demo: what can be asked, how it is asked and answered, in English and Chinese.

Plain tables, read by the generator (make_demo_data.py) and by the rule that scores answers (demo_score.py). In the forms {x}
is what the question is about and {y} the answer. Within a task the answers form one category. Wrong answers in the data are the
category's usual mistakes: plausible (Milan is a city), but true of nothing that is asked. A reward model this small learns such
words from a few thousand pairs. Telling a true city of the wrong country from the right one takes it far more: with nothing but
such pairs, and facts twice as many, it stayed at chance after several times the demo's time.
"""

from dataclasses import dataclass, field

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    `facts` maps {x} to {y}. A memory task has `statements` and `values` instead: the answer is what the user said in an
    earlier turn. `mistakes` are the wrong answers that the data gives.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    mistakes: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)
    statements: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def category(self) -> tuple[str, ...]:
        """Everything that counts as an answer, true ones first, without repetition."""
        return tuple(dict.fromkeys((*self.values, *self.facts.values(), *self.mistakes)))


_CAPITALS_EN = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Peru": "Lima",
}  # fmt: skip
_CAPITALS_ZH = {
    "法国": "巴黎", "英国": "伦敦", "日本": "东京", "中国": "北京", "埃及": "开罗", "德国": "柏林",
}  # fmt: skip
_WORDS = {
    "water": "水", "fire": "火", "tree": "树", "book": "书", "fish": "鱼", "door": "门",
}  # fmt: skip
_ADDENDS = range(1, 5)

TASKS: dict[str, dict[str, Task]] = {
    "en": {
        "colour": Task(
            ("What colour is {x}?", "Which colour does {x} have?", "Tell me the colour of {x}.", "Name the colour of {x}."),
            ("The colour is {y}.", "Its colour is {y}."),
            ("orange", "grey", "purple", "gold"),
            {
                "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow",
                "a tomato": "red", "the sea": "blue", "milk": "white",
            },
        ),
        "capital": Task(
            ("What is the capital of {x}?", "Which city is the capital of {x}?", "Tell me the capital of {x}.",
             "Name the capital of {x}."),
            ("The capital is {y}.", "The city is {y}."),
            ("Milan", "Osaka", "Lyon", "Sydney"),
            _CAPITALS_EN,
        ),
        "opposite": Task(
            ("What is the opposite of {x}?", "Which word is the opposite of {x}?", "Tell me the opposite of {x}.",
             "Name the opposite of {x}."),
            ("The opposite is {y}.", "Its opposite is {y}."),
            ("loud", "late", "thin", "sweet"),
            {
                "hot": "cold", "big": "small", "fast": "slow", "old": "young", "wet": "dry", "hard": "soft",
            },
        ),
        "sound": Task(
            ("What does a {x} say?", "Which sound does a {x} make?", "Tell me the sound of a {x}.",
             "Name the sound of a {x}."),
            ("The sound is {y}.", "It says {y}."),
            ("beep", "boom", "click", "ring"),
            {
                "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink",
            },
        ),
        "sum": Task(
            ("What is {x}?", "How much is {x}?", "Tell me what {x} is.", "Work out {x}."),
            ("The sum is {y}.", "That makes {y}."),
            ("5", "7", "9", "10"),
            {f"{a} plus {a}": str(2 * a) for a in _ADDENDS},
        ),
        "translation": Task(
            ("What is {x} in Chinese?", "How do you say {x} in Chinese?", "Tell me the Chinese word for {x}.",
             "Translate {x} into Chinese."),
            ("The word is {y}.", "One says {y}."),
            ("山", "手", "雨", "石"),
            _WORDS,
        ),
        "name": Task(
            ("What is my name?", "Do you remember my name?", "Tell me my name.", "What am I called?"),
            ("Your name is {y}.", "You are {y}."),
            ("Bob", "Zoe", "Paul", "Eva"),
            {}, ("My name is {y}.", "I am {y}."),
            ("Tom", "Anna", "Ben", "Lucy", "Max", "Emma"),
        ),
        "pet": Task(
            ("Which pet do I have?", "Do you remember my pet?", "Tell me which pet I have.", "What is my pet?"),
            ("You have a {y}.", "Your pet is a {y}."),
            ("tiger", "whale", "wolf", "bear"),
            {}, ("I have a {y}.", "My pet is a {y}."),
            ("cat", "dog", "horse", "rabbit", "parrot", "turtle"),
        ),
    },
    "zh": {
        "colour": Task(
            ("{x}是什么颜色？", "{x}的颜色是什么？", "请说出{x}的颜色。", "你知道{x}的颜色吗？"),
            ("颜色是{y}。", "它是{y}的。"),
            ("橙色", "灰色", "紫色", "金色"),
            {
                "天空": "蓝色", "草地": "绿色", "雪": "白色", "煤": "黑色", "柠檬": "黄色", "番茄": "红色",
                "大海": "蓝色", "牛奶": "白色",
            },
        ),
        "capital": Task(
            ("{x}的首都是哪里？", "哪座城市是{x}的首都？", "请说出{x}的首都。", "你知道{x}的首都吗？"),
            ("首都是{y}。", "城市是{y}。"),
            ("米兰", "大阪", "里昂", "悉尼"),
            _CAPITALS_ZH,
        ),
        "opposite": Task(
            ("{x}的反义词是什么？", "哪个词是{x}的反义词？", "请说出{x}的反义词。", "你知道{x}的反义词吗？"),
            ("反义词是{y}。", "相反的是{y}。"),
            ("响", "晚", "甜", "圆"),
            {"热": "冷", "大": "小", "快": "慢", "新": "旧", "湿": "干", "硬": "软"},
        ),
        "sound": Task(
            ("{x}怎么叫？", "{x}的叫声是什么？", "请说出{x}的叫声。", "你知道{x}的叫声吗？"),
            ("叫声是{y}。", "它叫{y}。"),
            ("咚", "叮", "哗", "砰"),
            {"狗": "汪", "猫": "喵", "牛": "哞", "鸭": "嘎", "羊": "咩", "青蛙": "呱"},
        ),
        "sum": Task(
            ("{x}是多少？", "{x}等于几？", "请算出{x}。", "你知道{x}等于几吗？"),
            ("等于{y}。", "得{y}。"),
            ("5", "7", "9", "10"),
            {f"{a}加{a}": str(2 * a) for a in _ADDENDS},
        ),
        "translation": Task(
            ("{x}用英语怎么说？", "{x}的英语是什么？", "请说出{x}的英语。", "你知道{x}的英语吗？"),
            ("英语是{y}。", "英语说{y}。"),
            ("hill", "hand", "rain", "stone"),
            {chinese: english for english, chinese in _WORDS.items()},
        ),
        "name": Task(
            ("我叫什么名字？", "你记得我的名字吗？", "请说出我的名字。", "我是谁？"),
            ("你叫{y}。", "你的名字是{y}。"),
            ("阿超", "阿丹", "阿平", "阿兰"),
            {}, ("我叫{y}。", "我的名字是{y}。"),
            ("阿芳", "阿明", "阿强", "阿静", "阿宝", "阿龙"),
        ),
        "pet": Task(
            ("我养了什么？", "你记得我的宠物吗？", "请说出我的宠物。", "我的宠物是什么？"),
            ("你养了{y}。", "你的宠物是{y}。"),
            ("虎", "鲸", "象", "狼"),
            {}, ("我养了{y}。", "我的宠物是{y}。"),
            ("猫", "狗", "兔", "龟", "羊", "马"),
        ),
    },
}  # fmt: skip

# What may stand before a question or a statement.
OPENINGS = {
    "en": ("", "Hello!", "Hi!", "Good morning!", "Excuse me.", "One question:", "Please help me.", "I am curious.",
           "Good evening!", "Please answer."),
    "zh": ("", "你好！", "您好！", "早上好！", "打扰一下。", "问个问题：", "请帮帮我。", "我很好奇。", "晚上好！", "请回答。"),
}

# What the assistant says when the user has only told two things; it says them back.
ACKNOWLEDGEMENTS = {
    "en": ("I see: {0}, {1}.", "I will remember {0}, {1}."),
    "zh": ("知道了：{0}，{1}。", "我记住了{0}，{1}。"),
}

# Courteous sentences, before and after the answer.
COURTESY_BEFORE = {
    "en": ("Of course!", "Good question!", "With pleasure!", "Sure!"),
    "zh": ("当然！", "好问题！", "很乐意回答！", "没问题！"),
}
COURTESY_AFTER = {
    "en": ("Happy to help!", "Hope this helps!", "Enjoy your day!", "All the best!"),
    "zh": ("很高兴帮到你！", "希望有帮助！", "祝你愉快！", "不客气！"),
}

# What a rambling answer goes on with.
FILLERS = {
    "en": (
        "Many people ask about this.", "There is a lot more to say.", "Let me think about it again.",
        "Some say this and others say that.", "That reminds me of a long story.", "We could talk about it for hours.",
    ),
    "zh": (
        "很多人都问过这件事。", "这个话题还有很多可以说。", "让我再想一想。", "有人这么说也有人那么说。",
        "这让我想起一个很长的故事。", "我们可以聊上很久。",
    ),
}  # fmt: skip


def fill(form: str, x: str = "", y: str = "") -> str:
    """A form with its blanks filled and its first letter in upper case."""
    text = form.replace("{x}", x).replace("{y}", y)
    return text[:1].upper() + text[1:]


def join(sentences: list[str], language: str) -> str:
    """Sentences to one text: a space between English ones, nothing between Chinese ones."""
    return (" " if language == "en" else "").join(sentence for sentence in sentences if sentence)
