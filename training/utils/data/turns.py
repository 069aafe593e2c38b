"""Read texts, messages and dialogues as rows hold them: every published form of a turn, and dialogues written as one text.

A turn is {"role": system, user, assistant or tool, "content": text}. Where the row says so it also has "learn": False (an
answer that is no target), and of tool use "tool_calls", "name", "tool_call_id" in the form of a chat template.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from json_text import parse_json, unique_names

Message = dict[str, Any]
Fields = dict[str, Any]

CALL = "call"  # roles whose content is the call of a tool, written as JSON
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model", "chatgpt", "ai", "助手"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
# Names of the texts of an item that holds a question and its answer together.
TURN_NAMES = ROLES | dict.fromkeys(("input", "question", "prompt", "instruction", "问题", "问"), "user")
TURN_NAMES |= dict.fromkeys(("output", "answer", "response", "回答", "答"), "assistant")
# Fields of a turn that say whether its text is learned, and the value of those that are.
LEARN_MARKS = dict.fromkeys(
    ("loss", "weight", "train", "training", "trainable", "loss_mask", "loss_weight", "loss_scale", "output_with_loss"), True
) | {"masked": False}
# What labels and marks say, in lower case.
TRUTHS = dict.fromkeys(("true", "1", "1.0", "good", "chosen", "desirable"), True)
TRUTHS |= dict.fromkeys(("false", "0", "0.0", "bad", "rejected", "undesirable"), False)
TEXT_NAMES = ("content", "value", "text")
OF_TOOLS = ("name", "tool_call_id")  # fields of a tool's turn
MESSAGE_FIELDS = {"role", "from", "id", "tool_calls", "function_call", *OF_TOOLS, *TEXT_NAMES, *LEARN_MARKS, *TURN_NAMES}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Marks of the two sides in dialogues that are written as one text.
SPEAKERS = [(user, assistant) for user in ("Human", "User", "USER") for assistant in ("Assistant", "ASSISTANT", "AI", "Bot")]
# Words of ordinary texts, too: marks only where the text begins with one and each stands at the start of a line.
WORDS = [(user, assistant) for user in ("user", "human") for assistant in ("assistant", "ai", "bot")] + [("问题", "回答")]
SPEAKERS += [("问", "答"), ("用户", "助手"), *WORDS]
ASKS = re.compile(f"(?:{'|'.join(sorted({user for user, _ in SPEAKERS}))})[:：]")


class BadRecord(Exception):
    """A record that is wrong. It ends the reading; the reader adds the file and the line."""


class Skip(Exception):
    """A record, or some turns of it, left out and counted under this reason. answers: how many answers that costs."""

    def __init__(self, reason: str, answers: int = 1) -> None:
        super().__init__(reason)
        self.answers = answers


# --- texts and lists --------------------------------------------------------------------------------------------------


def text(value: Any, field: str, *, strip: bool = True) -> str:
    """Return a text; half a surrogate pair (text cut inside an emoji) is replaced. strip: without white space around it."""
    if hasattr(value, "isoformat"):
        raise BadRecord(
            f'field "{field}" is a {type(value).__name__} and no longer the text it was: the JSON reader of datasets turns a '
            "column of date-like texts into times; give the original file, or save the set again with Value('string') for it"
        )
    if not isinstance(value, str):
        raise BadRecord(f'field "{field}" is {kind_of(value)}, expected a text')
    try:
        value.encode()
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.strip() if strip else value


def kind_of(value: Any) -> str:
    """Return the kind of a value in words, for an error."""
    return "null" if value is None else f"a {type(value).__name__}"


def items(value: Any, field: str) -> list:
    """Return a list, also from a CSV cell that holds it as JSON, and from Arrow's {"role": [...], "content": [...]}."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, field)
    if is_columns(value):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise BadRecord(f'field "{field}" is {kind_of(value)}, expected a list')
    return value


def from_json(value: str, field: str) -> Any:
    """Return the value that a text spells in JSON."""
    try:
        return parse_json(value, object_pairs_hook=unique_names)
    except ValueError as error:
        raise BadRecord(f'field "{field}" looks like JSON, but is invalid ({getattr(error, "msg", error)})') from error


def is_columns(value: Any) -> bool:
    """Return whether a value is Arrow's form of a list of messages: {"role": [...], "content": [...]}."""
    return isinstance(value, dict) and bool(value) and all(isinstance(column, list) for column in value.values())


def is_turns(value: Any) -> bool:
    """Return whether a value is a list of messages, in either form."""
    return isinstance(value, list) or is_columns(value)


def is_alternating(value: Any) -> bool:
    """Return whether a value is a list of texts, which in a field of messages are question and answer in turn (LIMA, UltraChat)."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value)


def truth(value: Any) -> bool | None:
    """Return True or False for a value that means it (true, 1, "true", "good"); None for any other."""
    return TRUTHS.get(str(value).strip().lower())


def looks_numeric(value: str) -> bool:
    """Return whether a text is a number or a judgement."""
    return truth(value) is not None or re.fullmatch(r"[-+]?\d+([.,/]\d+)?", value.strip()) is not None


def normal(content: str) -> str:
    """Return a text with its white space evened out, for comparing."""
    return " ".join(content.split())


# --- messages ---------------------------------------------------------------------------------------------------------


def messages_of(value: Any, field: str) -> list[Message]:
    """Read a list of messages. Raise Skip, with the number of its answers, if one holds something that is no text."""
    turns = items(value, field)
    try:
        messages = [turn for item in turns for turn in read_item(item, field)]
    except Skip as reason:
        answers = sum(role_of(item) in ("assistant", None) for item in turns if isinstance(item, dict))
        raise Skip(str(reason), answers) from None
    for one, turn in pairwise(messages):  # calls that are made together, each a turn of its own
        if turn.get("parallel") and one.get("parallel"):
            turn["tool_calls"] = one.pop("tool_calls") + turn["tool_calls"]
            one["role"] = ""
    return [{name: turn[name] for name in turn if name != "parallel"} for turn in messages if turn["role"]]


def read_item(value: Any, field: str) -> list[Message]:
    """Read one turn ({role, content}, {from, value}, {role, text}), or a question and its answer ({human, assistant})."""
    if not isinstance(value, dict):
        raise BadRecord(f'field "{field}" holds {kind_of(value)}, expected {{"role": "user", "content": "…"}}')
    check_media(value, f"{field}.")
    role = value.get("role", value.get("from"))
    if role is None:
        named = [(TURN_NAMES[name], text) for name, text in value.items() if name in TURN_NAMES and text is not None]
        pairs = [pair for one in ("system", "user", "assistant") for pair in named if pair[0] == one]
        asks = any(TURN_NAMES.get(name) == "assistant" for name in value) and "user" in dict(named)
        if asks and "assistant" not in dict(named):  # {"human": "…", "assistant": null}: not answered
            named.append(("assistant", ""))
            pairs.append(named[-1])
        if "assistant" in dict(named) and len(dict(named)) == len(pairs) == len(named):
            return [turn_of(one, content, value, field) for one, content in pairs]
    if role is None:
        raise BadRecord(f'field "{field}" has a message without "role" (found: {", ".join(map(str, value)) or "nothing"})')
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRecord(f'field "{field}" has the role {role!r}, expected one of {", ".join(sorted(ROLES))}')
    content = next((value[name] for name in TEXT_NAMES if value.get(name) is not None), None)
    return [turn_of(ROLES[role.lower()], content, value, field)]


def role_of(value: Fields) -> str | None:
    """Return our name of the role that a turn says it has; None if it says none that is known."""
    return ROLES.get(str(value.get("role", value.get("from"))).lower())


def check_media(value: Fields, where: str = "") -> None:
    """Raise Skip for a row or a turn with an image or the like, without which its text means something else.

    where: "messages." for a turn of these.
    """
    for name in MEDIA:
        if value.get(name):
            raise Skip(f'something that is no text (field "{where}{name}")')


def turn_of(role: str, content: Any, value: Fields, field: str) -> Message:
    """Return the turn of a role. value: the item it stands in, with what it says of learning and of tools."""
    calls = items(value.get("tool_calls"), "tool_calls")
    if value.get("function_call"):
        calls = [{"function": value["function_call"]}]
    if role == CALL:
        calls = from_json(content, field) if isinstance(content, str) else content
        calls, content = [{"function": one} for one in (calls if isinstance(calls, list) else [calls])], ""
    content = "" if content is None and calls else content_text(content, field, strip=role != "assistant")
    turn = {"role": "assistant" if role == CALL else role, "content": content}
    if role == "assistant" and not is_learned(value, f'a turn of field "{field}"'):
        turn["learn"] = False
    if calls:
        turn["tool_calls"] = [tool_call(one, field) for one in calls]
        turn |= {"parallel": True} if role == CALL else {}
    extra = OF_TOOLS if role == "tool" else ()
    return turn | {name: value[name] for name in extra if value.get(name) is not None}


def tool_call(value: Any, field: str) -> Fields:
    """Return a call of a tool in the form of a chat template: {"type": "function", "function": {"name", "arguments"}}."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f'field "{field}" has a call that is not of the form {{"name": "…", "arguments": {{…}}}}')
    names = ("name", "arguments")
    return {"type": "function"} | value | {"function": {name: function.get(name, {}) for name in names}}


def calls_in(reply: str) -> list[Fields]:
    """Return the calls of tools that a text is, [{"name": "…", "arguments": {…}}, …] as xLAM has them; [] for any other text."""
    if not reply.lstrip().startswith(("[", "{")):
        return []
    try:
        value = parse_json(reply, object_pairs_hook=unique_names)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    written = all(isinstance(one, dict) and one.keys() == {"name", "arguments"} and isinstance(one["name"], str) for one in calls)
    return [tool_call({"function": one}, "") for one in calls] if written else []


def content_text(content: Any, field: str, *, strip: bool) -> str:
    """Return the text of a content, also of one in parts ({"type": "text", "text": "…"}). Raise Skip for an image part."""
    if not isinstance(content, list):
        return text(content, field, strip=strip)
    texts = []
    for part in content:
        if isinstance(part, dict):
            kind = str(part.get("type") or "text")
            part = next((part[name] for name in ("text", "value", "content") if isinstance(part.get(name), str)), None)
            if part is None or "text" not in kind:
                raise Skip(f"a part of a message that is no text ({kind})")
        texts.append(text(part, field, strip=False))
    return text("".join(texts), field, strip=strip)


def is_learned(value: Fields, where: str) -> bool:
    """Return whether the marks of a turn or a record leave it a target. where: the field of the turn, for an error."""
    if value.get("train_detail"):
        raise BadRecord(f"{where} marks parts of a turn (train_detail); only whole turns can be marked")
    marks = {name: truth(value[name]) for name in LEARN_MARKS if value.get(name) not in (None, "")}
    unknown = next((name for name, mark in marks.items() if mark is None), None)
    if unknown:
        raise BadRecord(
            f'{where} has "{unknown}" {value[unknown]!r}, expected true, false, 1 or 0 (is it to be learned?); '
            "rename or remove it if it means something else"
        )
    return all(mark == LEARN_MARKS[name] for name, mark in marks.items())


def tidy(messages: Iterable[Message]) -> list[Message]:
    """Join neighbours of one role, cut off the open end, drop answers before the first question.

    Raise Skip where another turn is empty: without it the turns around it would be taken for one; or where an answer that
    is learned follows one that is not.
    """
    messages = list(messages)
    number = sum(turn["role"] == "assistant" for turn in messages)
    turns: list[Message] = []
    for turn in messages:
        before = turns[-1] if turns else {}
        joins = before.get("role") == turn["role"] != "tool" and not {"tool_calls"} & (before.keys() | turn.keys())
        if joins and before.get("learn") != turn.get("learn"):
            raise Skip("two answers in a row, of which one is marked not to learn", number)
        if joins:
            turns[-1] = before | {"content": "\n\n".join(filter(None, (before["content"], turn["content"])))}
        elif turn["content"] or turn["role"] != "system":
            turns.append(dict(turn))
    for role in ("assistant", "user"):  # the open "Assistant:" of a prompt, and a question that was not asked
        if turns and turns[-1]["role"] == role and is_empty(turns[-1]):
            turns.pop()
    tidied: list[Message] = []
    asked = False
    for turn in turns:
        asked = asked or (turn["role"] == "user" and not is_empty(turn))
        if not asked and turn["role"] != "system":
            continue
        if is_empty(turn):
            raise Skip("an empty turn", max(number, 1))
        tidied.append(turn)
    return tidied


def is_empty(turn: Message) -> bool:
    """Return whether a turn says nothing."""
    return not turn["content"].strip() and "tool_calls" not in turn


# --- dialogues as one text --------------------------------------------------------------------------------------------


def split_turns(value: str, answered: bool = False) -> list[Message] | None:
    """Return the turns of a text with role marks (SPEAKERS); None for a text without them.

    answered: the last turn is an answer; else it is the open "Assistant:", which may be missing behind one question.
    """
    if not ASKS.search(value):  # most texts
        return None
    for user, assistant in SPEAKERS:
        if turns := _split_at(value, user, assistant, answered):
            return turns
    body = value.strip()
    there = sorted(SPEAKERS, key=lambda marks: re.search(rf"\s{marks[1]}[:：]", body) is None)
    for user, assistant in () if answered else there:
        mark = rf"({user}|{assistant})[:：]"
        lines = re.search(rf"\n{mark}", body) and not re.search(rf"\n\s*\n{mark}", body)  # as the marks that are there
        opened = f"{body}{'' if lines else chr(10)}\n{assistant}:"
        marks = re.findall(rf"^{mark}", body, flags=re.MULTILINE)
        if (user, assistant) in WORDS and (assistant not in marks or marks[-1] != user):
            continue
        if re.match(rf"{user}[:：]", body) and (turns := _split_at(opened, user, assistant, False)):
            return turns
    return None


def _split_at(value: str, user: str, assistant: str, answered: bool) -> list[Message] | None:
    """Return the turns between two marks.

    The published sets put a blank line before a mark ("\\n\\nHuman: …\\n\\nAssistant:"), others a line break or only a space
    (" Human: … Assistant:"). The widest separation under which the text ends as it must is taken, so that "… the
    Assistant: …" within a sentence stays text. Of an answer only the space behind its mark goes.
    """
    body = value.lstrip() if answered else value.strip()
    if user == "问":
        body = re.sub(r"\[Round \d+\]\s*\n", "", body)  # ChatGLM's own
    mark = rf"({user}|{assistant})[:：]"
    starts = re.match(mark, body) is not None
    words = (user, assistant) in WORDS
    if not starts and (words or not re.search(rf"\n\s*\n{user}[:：]", body)):
        return None
    for separator in (r"\n\s*\n", r"\n", r"\s")[: 2 if words else 3]:
        before, *pieces = re.split(rf"(?:^|{separator}){mark}", body)
        roles, contents = pieces[0::2], pieces[1::2]
        if user in roles and roles[-1] == assistant and bool(contents[-1].strip()) == answered:
            system = [{"role": "system", "content": before.strip()}] if before.strip() else []
            return system + [
                {"role": "user", "content": content.strip()}
                if role == user
                else {"role": "assistant", "content": content.removeprefix(" ")}
                for role, content in zip(roles, contents, strict=True)
            ]
        if not starts:
            return None  # a text that only quotes a dialogue
    return None


def prompt_messages(value: Any, field: str = "prompt") -> list[Message]:
    """Read a prompt: a text with or without role marks, or a list of messages."""
    if is_turns(value):
        return messages_of(value, field)
    if isinstance(value, dict) and "replies" in value:
        raise BadRecord(f'field "{field}" is a tree of messages; write each path from its first message to a last one as messages')
    value = text(value, field)
    return split_turns(value) or [{"role": "user", "content": value}]
