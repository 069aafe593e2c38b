"""The words of the web page, in English and Chinese."""

WORDS = {
    "title": ("Talk to what you trained", "与训练好的模型对话"),
    "settings": ("Settings", "设置"),
    "model": ("Model", "模型"),
    "compare": ("Compare with", "对比模型"),
    "nothing": ("(none)", "（无）"),
    "system": ("System message", "系统消息"),
    "temperature": ("Temperature; 0 is greedy", "温度；0 为贪心"),
    "top_p": ("Top-p", "Top-p"),
    "max_new_tokens": ("Most tokens of an answer", "回答的最大词元数"),
    "ask": ("Ask something. Enter sends, Shift+Enter begins a new line.", "请输入问题。Enter 发送，Shift+Enter 换行。"),
    "again": ("Answer again", "重新回答"),
    "clear": ("Clear", "清空"),
    "left": ("Left is better", "左边更好"),
    "right": ("Right is better", "右边更好"),
    "tie": ("Tie", "一样好"),
    "bad": ("Both bad", "都不好"),
    "votes": (
        "Votes in {}: {}; left {}, right {}, tie {}, both bad {}",
        "{} 中的投票：{}；左 {}，右 {}，一样好 {}，都不好 {}",
    ),
    "empty": ("(an empty answer)", "（空回答）"),
    "login": ("Any name; the password is an API key.", "用户名任意；密码为 API 密钥。"),
    "open": ("the page is at {0}  (Ctrl-C ends it)", "页面地址：{0}（Ctrl-C 结束）"),
    "silent": ("{0} does not answer ({1}).", "{0} 没有回应（{1}）。"),
}


def words(language: str) -> dict[str, str]:
    """Return the words in a language, "en" or "zh"."""
    return {key: pair[language == "zh"] for key, pair in WORDS.items()}
