"""The closed world of the demo: what can be asked, how it is asked and answered, in English and Chinese.

Plain tables, read by the generator (make_demo_data.py) and by the rule that scores answers (demo_score.py). In every form
{x} is what the question is about and {y} the answer. Within a task the answers form one category: a wrong answer is another
member of it. Answer forms never differ from one fact of a task to the next, so only {y} decides between right and wrong.
"""

from dataclasses import dataclass

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Task:
    """Questions of one kind. `facts` maps {x} to {y}; a memory task has no facts: what the user said before decides."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    facts: dict[str, str]
    statements: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def remembered(self) -> bool:
        """Whether the answer was said by the user in an earlier turn."""
        return bool(self.statements)

    @property
    def category(self) -> tuple[str, ...]:
        """Every answer that the task can have, without repetition."""
        return self.values or tuple(dict.fromkeys(self.facts.values()))


_COLOURS_EN = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink")
_COLOURS_ZH = ("红色", "蓝色", "绿色", "白色", "黑色", "黄色", "棕色", "粉色")
_CAPITALS_EN = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Germany": "Berlin",
    "Greece": "Athens", "Peru": "Lima",
}  # fmt: skip
_CAPITALS_ZH = {
    "法国": "巴黎", "英国": "伦敦", "日本": "东京", "中国": "北京", "埃及": "开罗", "德国": "柏林", "希腊": "雅典", "秘鲁": "利马",
}  # fmt: skip
_WORDS = {
    "water": "水", "fire": "火", "tree": "树", "book": "书", "fish": "鱼", "tea": "茶", "door": "门", "flower": "花",
}  # fmt: skip
_ADDENDS = range(1, 4)

TASKS: dict[str, dict[str, Task]] = {
    "en": {
        "colour": Task(
            ("What colour is {x}?", "Which colour does {x} have?", "Tell me the colour of {x}.", "Name the colour of {x}."),
            ("{x} is {y}.", "It is {y}.", "The colour is {y}."),
            {
                "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow",
                "a tomato": "red", "chocolate": "brown", "a flamingo": "pink", "the sea": "blue", "milk": "white",
            },
        ),
        "capital": Task(
            ("What is the capital of {x}?", "Which city is the capital of {x}?", "Tell me the capital of {x}.",
             "Name the capital of {x}."),
            ("The capital of {x} is {y}.", "It is {y}.", "The city is {y}."),
            _CAPITALS_EN,
        ),
        "opposite": Task(
            ("What is the opposite of {x}?", "Which word is the opposite of {x}?", "Tell me the opposite of {x}.",
             "Name the opposite of {x}."),
            ("The opposite of {x} is {y}.", "It is {y}.", "The word is {y}."),
            {
                "hot": "cold", "big": "small", "fast": "slow", "old": "young", "wet": "dry", "rich": "poor",
                "hard": "soft", "up": "down",
            },
        ),
        "sound": Task(
            ("What does a {x} say?", "Which sound does a {x} make?", "Tell me the sound of a {x}.",
             "Name the sound of a {x}."),
            ("A {x} says {y}.", "It says {y}.", "The sound is {y}."),
            {
                "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink",
                "lion": "roar", "snake": "hiss",
            },
        ),
        "sum": Task(
            ("What is {x}?", "How much is {x}?", "Tell me what {x} is.", "Work out {x}."),
            ("{x} is {y}.", "It is {y}.", "The sum is {y}."),
            {f"{a} plus {b}": str(a + b) for a in _ADDENDS for b in _ADDENDS},
        ),
        "translation": Task(
            ("What is {x} in Chinese?", "How do you say {x} in Chinese?", "Tell me the Chinese word for {x}.",
             "Translate {x} into Chinese."),
            ("{x} is {y} in Chinese.", "It is {y}.", "The word is {y}."),
            _WORDS,
        ),
        "name": Task(
            ("What is my name?", "Do you remember my name?", "Tell me my name.", "What am I called?"),
            ("Your name is {y}.", "You are {y}.", "The name is {y}."),
            {}, ("My name is {y}.", "I am {y}."),
            ("Tom", "Anna", "Ben", "Lucy", "Max", "Emma", "Jack", "Mia"),
        ),
        "pet": Task(
            ("Which pet do I have?", "Do you remember my pet?", "Tell me which pet I have.", "What is my pet?"),
            ("You have a {y}.", "Your pet is a {y}.", "The pet is a {y}."),
            {}, ("I have a {y}.", "My pet is a {y}."),
            ("cat", "dog", "horse", "rabbit", "parrot", "hamster", "turtle", "goat"),
        ),
        "favourite": Task(
            ("What is my favourite colour?", "Do you remember my favourite colour?", "Tell me my favourite colour.",
             "Which colour do I like best?"),
            ("Your favourite colour is {y}.", "You like {y}.", "The colour is {y}."),
            {}, ("My favourite colour is {y}.", "I like {y} best."),
            _COLOURS_EN,
        ),
    },
    "zh": {
        "colour": Task(
            ("{x}是什么颜色？", "{x}的颜色是什么？", "请说出{x}的颜色。", "你知道{x}的颜色吗？"),
            ("{x}是{y}的。", "是{y}。", "颜色是{y}。"),
            {
                "天空": "蓝色", "草地": "绿色", "雪": "白色", "煤": "黑色", "柠檬": "黄色", "番茄": "红色",
                "泥土": "棕色", "桃花": "粉色", "大海": "蓝色", "牛奶": "白色",
            },
        ),
        "capital": Task(
            ("{x}的首都是哪里？", "哪座城市是{x}的首都？", "请说出{x}的首都。", "你知道{x}的首都吗？"),
            ("{x}的首都是{y}。", "是{y}。", "首都是{y}。"),
            _CAPITALS_ZH,
        ),
        "opposite": Task(
            ("{x}的反义词是什么？", "哪个词是{x}的反义词？", "请说出{x}的反义词。", "你知道{x}的反义词吗？"),
            ("{x}的反义词是{y}。", "是{y}。", "反义词是{y}。"),
            {"热": "冷", "大": "小", "快": "慢", "新": "旧", "湿": "干", "富": "穷", "硬": "软", "上": "下"},
        ),
        "sound": Task(
            ("{x}怎么叫？", "{x}的叫声是什么？", "请说出{x}的叫声。", "你知道{x}的叫声吗？"),
            ("{x}的叫声是{y}。", "是{y}。", "叫声是{y}。"),
            {"狗": "汪汪", "猫": "喵喵", "牛": "哞哞", "鸭": "嘎嘎", "羊": "咩咩", "青蛙": "呱呱", "鸡": "喔喔", "鸟": "啾啾"},
        ),
        "sum": Task(
            ("{x}是多少？", "{x}等于几？", "请算出{x}。", "你知道{x}等于几吗？"),
            ("{x}等于{y}。", "是{y}。", "等于{y}。"),
            {f"{a}加{b}": str(a + b) for a in _ADDENDS for b in _ADDENDS},
        ),
        "translation": Task(
            ("{x}用英语怎么说？", "{x}的英语是什么？", "请说出{x}的英语。", "你知道{x}的英语吗？"),
            ("{x}的英语是{y}。", "是{y}。", "英语是{y}。"),
            {chinese: english for english, chinese in _WORDS.items()},
        ),
        "name": Task(
            ("我叫什么名字？", "你记得我的名字吗？", "请说出我的名字。", "我是谁？"),
            ("你叫{y}。", "你的名字是{y}。", "名字是{y}。"),
            {}, ("我叫{y}。", "我的名字是{y}。"),
            ("王芳", "李雷", "张伟", "陈静", "刘洋", "赵敏", "孙浩", "周婷"),
        ),
        "pet": Task(
            ("我养了什么？", "你记得我的宠物吗？", "请说出我的宠物。", "我的宠物是什么？"),
            ("你养了{y}。", "你的宠物是{y}。", "宠物是{y}。"),
            {}, ("我养了{y}。", "我的宠物是{y}。"),
            ("小猫", "小狗", "小马", "兔子", "鹦鹉", "仓鼠", "乌龟", "山羊"),
        ),
        "favourite": Task(
            ("我喜欢什么颜色？", "你记得我喜欢的颜色吗？", "请说出我喜欢的颜色。", "我喜欢的颜色是什么？"),
            ("你喜欢{y}。", "你喜欢的颜色是{y}。", "颜色是{y}。"),
            {}, ("我喜欢{y}。", "我喜欢的颜色是{y}。"),
            _COLOURS_ZH,
        ),
    },
}  # fmt: skip

# What may stand before a question or a statement.
OPENINGS = {
    "en": ("", "Hello!", "Hi!", "Good morning!", "Excuse me.", "One question:", "Please help me.", "I am curious."),
    "zh": ("", "你好！", "您好！", "早上好！", "打扰一下。", "问个问题：", "请帮帮我。", "我很好奇。"),
}

# What the assistant says when the user has only told something.
ACKNOWLEDGEMENTS = {
    "en": ("Nice to meet you.", "I will remember that.", "Thank you for telling me."),
    "zh": ("很高兴认识你。", "我记住了。", "谢谢你告诉我。"),
}

# Courteous sentences, before and after the answer.
COURTESY_BEFORE = {
    "en": ("Of course!", "Good question!", "With pleasure!", "Sure!"),
    "zh": ("当然！", "好问题！", "很乐意回答！", "没问题！"),
}
COURTESY_AFTER = {
    "en": ("Happy to help!", "Hope this helps!", "Have a nice day!", "You are welcome!"),
    "zh": ("很高兴帮到你！", "希望有帮助！", "祝你愉快！", "不客气！"),
}

# What a rambling answer goes on with.
FILLERS = {
    "en": (
        "Many people ask about this.", "There is a lot more to say.", "Let me think about it again.",
        "Some say this and others say that.", "It all depends on the day.", "That reminds me of a long story.",
        "Once upon a time it was different.", "But where was I going with this?", "Time goes by and things change.",
        "We could talk about it for hours.",
    ),
    "zh": (
        "很多人都问过这件事。", "这个话题还有很多可以说。", "让我再想一想。", "有人这么说也有人那么说。",
        "一切都要看情况。", "这让我想起一个很长的故事。", "从前不是这样的。", "刚才我们说到哪儿了呢？",
        "时间过得真快啊。", "我们可以聊上几个小时。",
    ),
}  # fmt: skip


def fill(form: str, x: str = "", y: str = "") -> str:
    """A form with its blanks filled and its first letter in upper case."""
    text = form.replace("{x}", x).replace("{y}", y)
    return text[:1].upper() + text[1:]


def join(sentences: list[str], language: str) -> str:
    """Sentences to one text: a space between English ones, nothing between Chinese ones."""
    return (" " if language == "en" else "").join(sentence for sentence in sentences if sentence)
