"""Turn rows into records; the fields of a row tell its format. Nothing behind this file knows about columns.

A record is {"messages": the prompt, [{"role", "content"}, …] that ends with a user message, "chosen": the answer,
"rejected": a worse answer or None, "margin": how much better, or None}. A dialogue gives one record for each of its
assistant turns. In data that has only prompts, "chosen" is "".
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
Record = dict[str, Any]
Fields = dict[str, Any]

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
}
OUR_NAMES = ("prompt", "response", "chosen", "rejected", "messages", "conversations", "context", "instruction")
OUR_NAMES += ("input", "output", "history", "system", "content", "summary", "margin")
# Beside a "prompt" these look like its answer: not prompt-only data, but a format that --columns must explain.
ANSWER_LIKE = ("answer", "answers", "completion", "output", "target", "reply", "label", "text", "summary")

LARGEST_MARGIN = 3e38  # of float32, as margins are kept


class BadRecord(Exception):
    """A record that is wrong. It ends the reading; the reader adds the file and the line."""


class Skip(Exception):
    """A record that is sound but of no use (an empty answer). It is left out and counted under this reason."""


def text(value: Any, field: str) -> str:
    """Return a text without white space around it; half a surrogate pair (text cut inside an emoji) is replaced."""
    if not isinstance(value, str):
        raise BadRecord(f'field "{field}" is {_kind(value)}, expected a text')
    try:
        value.encode()
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.strip()


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def items(value: Any, field: str) -> list:
    """Return a list, also from a CSV cell that holds it as JSON, and from Arrow's {"role": [...], "content": [...]}."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRecord(f'field "{field}" starts like a list, but is invalid JSON ({error.msg})') from error
    if is_columns(value):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise BadRecord(f'field "{field}" is {_kind(value)}, expected a list')
    return value


def is_columns(value: Any) -> bool:
    """Return whether a value is Arrow's form of a list of messages: {"role": [...], "content": [...]}."""
    return isinstance(value, dict) and bool(value) and all(isinstance(column, list) for column in value.values())


def message(value: Any, field: str) -> Message:
    """Read one turn: {role, content}, {from, value} or {role, text}."""
    if not isinstance(value, dict):
        raise BadRecord(f'field "{field}" holds {_kind(value)}, expected {{"role": "user", "content": "…"}}')
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f'field "{field}" has the role {role!r}, expected one of {", ".join(sorted(ROLES))}')
    content = next((value[name] for name in ("content", "value", "text") if value.get(name) is not None), None)
    if isinstance(content, list):  # [{"type": "text", "text": "…"}]
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return {"role": ROLES[role], "content": text(content, field)}


def messages_of(value: Any, field: str) -> list[Message]:
    """Read a list of messages."""
    return [message(item, field) for item in items(value, field)]


def split_turns(
    value: str, user: str = "Human", assistant: str = "Assistant", answered: bool = False
) -> list[Message] | None:
    """Return the turns of a text with role marks; None for a text without them.

    answered: the last turn is an answer; else it is the open "Assistant:". The published sets put a blank line before a
    mark ("\\n\\nHuman: …\\n\\nAssistant:"), others a line break or only a space (" Human: … Assistant:"). The widest
    separation under which the text ends as it must is taken, so that "… the Assistant: …" within a sentence stays text.
    """
    body = value.strip()
    mark = rf"({user}|{assistant})[:：]"
    starts = re.match(mark, body) is not None
    if not starts and not re.search(rf"\n\s*\n{user}[:：]", body):
        return None
    for separator in (r"\n\s*\n", r"\n", r"\s"):
        before, *pieces = re.split(rf"(?:^|{separator}){mark}", body)
        roles, contents = pieces[0::2], [content.strip() for content in pieces[1::2]]
        if user in roles and roles[-1] == assistant and bool(contents[-1]) == answered:
            system = [{"role": "system", "content": before.strip()}] if before.strip() else []
            names = {user: "user", assistant: "assistant"}
            turns = zip(roles, contents, strict=True)
            return system + [{"role": names[role], "content": content} for role, content in turns]
        if not starts:
            return None  # a text that only quotes a dialogue
    if not answered and re.match(rf"{user}[:：]", body):  # "Human: …" without the open "Assistant:" at its end
        return split_turns(f"{body}\n\n{assistant}:", user, assistant)
    return None


def prompt_messages(
    value: Any, field: str = "prompt", user: str = "Human", assistant: str = "Assistant"
) -> list[Message]:
    """Read a prompt: a text with or without role marks, or a list of messages."""
    if isinstance(value, list) or is_columns(value):
        return messages_of(value, field)
    value = text(value, field)
    return split_turns(value, user, assistant) or [{"role": "user", "content": value}]


def answer(value: Any, field: str) -> str:
    """Read an answer: a text, one message, or messages of which the last is the answer."""
    if isinstance(value, list) or is_columns(value):
        value = (items(value, field) or [""])[-1]
    return message(value, field)["content"] if isinstance(value, dict) else text(value, field)


def user_turn(content: str) -> list[Message]:
    """Return the messages of a single question."""
    return [{"role": "user", "content": content}]


def tidy(messages: Iterable[Message]) -> list[Message]:
    """Join neighbours of one role, keep only a system message before the first user turn, cut off the open end.

    Raise Skip where another turn is empty: without it the turns around it would be taken for one.
    """
    turns: list[Message] = []
    for turn in messages:
        if turns and turns[-1]["role"] == turn["role"]:
            contents = (turns[-1]["content"], turn["content"])
            turns[-1] = {"role": turn["role"], "content": "\n\n".join(filter(None, contents))}
        elif turn["content"] or turn["role"] != "system":
            turns.append(dict(turn))
    for role in ("assistant", "user"):  # the open "Assistant:" of a prompt, and a question that was not asked
        if turns and turns[-1]["role"] == role and not turns[-1]["content"]:
            turns.pop()
    tidied: list[Message] = []
    asked = False
    for turn in turns:
        asked = asked or (turn["role"] == "user" and bool(turn["content"]))
        if not asked and turn["role"] != "system":
            continue
        if not turn["content"]:
            raise Skip("an empty turn")
        tidied.append(turn)
    return tidied


def record(
    messages: list[Message], chosen: str | None = None, rejected: str | None = None, margin: Any = None
) -> Record:
    """Make one record; chosen None: of a prompt alone, for step 3. Raise Skip if it could not train anything."""
    messages = tidy(messages)
    if not messages or messages[-1]["role"] != "user":
        raise Skip("an empty prompt" if chosen is None else "no question of a user before the answer")
    if chosen == "" or rejected == "":
        raise Skip("an empty answer")
    return {"messages": messages, "chosen": chosen or "", "rejected": rejected, "margin": _margin(margin)}


def _margin(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        margin = float(value)
    except (TypeError, ValueError) as error:
        raise BadRecord(f'field "margin" is {value!r}, expected a number') from error
    if not abs(margin) <= LARGEST_MARGIN:  # NaN, too: one of them would make the loss of all NaN
        raise BadRecord(f'field "margin" is {value!r}, expected a finite number')
    return margin


def dialogue(messages: list[Message]) -> list[Record]:
    """Return one record for each assistant turn; a dialogue without one is a prompt."""
    messages = tidy(messages)
    ends = [end for end, turn in enumerate(messages) if turn["role"] == "assistant"]
    return [record(messages[:end], messages[end]["content"]) for end in ends] or [record(messages)]


def _system(row: Fields) -> list[Message]:
    return [{"role": "system", "content": text(row["system"], "system")}] if row.get("system") else []


def history(row: Fields) -> list[Message]:
    """Read the earlier turns: [[question, answer], …] or messages; a "system" field comes first."""
    turns = _system(row)
    for pair in items(row.get("history"), "history"):
        if isinstance(pair, dict):
            turns.append(message(pair, "history"))
        elif isinstance(pair, list) and len(pair) == 2:
            question, reply = (text(turn, "history") for turn in pair)
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        else:
            raise BadRecord('field "history" holds something that is not a pair [question, answer]')
    return turns


def instruction(row: Fields) -> list[Message]:
    """Read the earlier turns, and instruction and input as one question."""
    extra = row.get("input")
    lines = [text(row["instruction"], "instruction"), text(extra, "input") if extra else ""]
    return history(row) + user_turn("\n".join(filter(None, lines)))


def _pair(messages: list[Message], row: Fields) -> list[Record]:
    rejected = row.get("rejected")
    worse = None if rejected is None else answer(rejected, "rejected")
    return [record(messages, answer(row["chosen"], "chosen"), worse, row.get("margin"))]


def _pair_after_messages(row: Fields) -> list[Record]:
    """Read a pair. Where messages end with an answer they are the chosen dialogue once more (ultrafeedback_binarized)."""
    messages = _turns(row, "messages")
    if messages and messages[-1]["role"] == "assistant" and row.get("prompt"):
        messages = _asked(row)
    return _pair(messages, row)


def _whole_dialogues(row: Fields) -> list[Record]:
    """Read the form of hh-rlhf: two dialogues, equal but for the last answer."""
    better, worse = (_answered_dialogue(row[field], field) for field in ("chosen", "rejected"))
    if tidy(better[:-1]) != tidy(worse[:-1]):
        raise Skip("two dialogues that differ before the last answer")
    return [record(better[:-1], better[-1]["content"], worse[-1]["content"], row.get("margin"))]


def _answered_dialogue(value: Any, field: str) -> list[Message]:
    if isinstance(value, list) or is_columns(value):
        turns = messages_of(value, field)
    else:
        turns = split_turns(text(value, field), answered=True)
        if not turns and value.strip() and not split_turns(value):
            raise BadRecord(
                f'no field "prompt", and "{field}" is not a whole dialogue ("\\n\\nHuman: …\\n\\nAssistant: …")'
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise Skip("a dialogue that does not end with an answer")
    return turns


def _prompt_response(row: Fields) -> list[Record]:
    reply, messages = answer(row["response"], "response"), _asked(row)
    return _dialogue_with(messages, reply) if row.get("history") else [record(messages, reply)]


def _instruction_output(row: Fields) -> list[Record]:
    output = row["output"]
    if not isinstance(output, list):
        return _dialogue_with(instruction(row), text(output, "output"))
    ranked = [reply for reply in (text(reply, "output") for reply in output) if reply] or [""]  # best first
    return [record(instruction(row), ranked[0], ranked[-1] if len(ranked) > 1 else None)]


def _dialogue_with(messages: list[Message], reply: str) -> list[Record]:
    if not reply:
        raise Skip("an empty answer")
    return dialogue([*messages, {"role": "assistant", "content": reply}])


def _asked(row: Fields) -> list[Message]:
    return history(row) + prompt_messages(row["prompt"])


def _turns(row: Fields, field: str) -> list[Message]:
    if not isinstance(row[field], (list, str, dict)):
        raise BadRecord(f'field "{field}" is {_kind(row[field])}, expected a list of messages')
    return _system(row) + messages_of(row[field], field)


def question_answer(row: Fields, question: str, chosen: str) -> list[Record]:
    """Read plain texts out of two fields."""
    return [record(user_turn(text(row[question], question)), text(row[chosen], chosen))]


def mkqa(row: Fields, language: str, question: Any) -> list[Record]:
    """Read a question of MKQA and the first of its answers in a language. Raise Skip if it has none, as many."""
    languages = row["answers"] or {}
    answers = items(languages.get(language), "answers") if isinstance(languages, dict) else None
    if answers is None or (answers and not isinstance(answers[0], dict)):
        raise BadRecord('field "answers" is not of the form {"en": [{"text": "…"}]}')
    reply = answers[0].get("text") if answers else None
    if not reply or not question:
        raise Skip("no answer in this language")
    return [record(user_turn(text(question, "query")), text(reply, "answers"))]


@dataclass(frozen=True)
class Format:
    """A form of rows. A new one is a row of FORMATS."""

    needed: tuple[str, ...]  # fields that every row must have
    convert: Callable[[Fields], list[Record]]  # makes the records of a row
    # ChatGLM data often spells a dialogue out: every turn is a row, and stands in the history of the later rows too. The
    # turns in this field count once.
    history: str = ""
    set_name: str = ""  # the named set whose rule it is


# The first one that fits is taken.
FORMATS: tuple[Format, ...] = (
    Format(("conversations", "chosen", "rejected"), lambda row: _pair(_turns(row, "conversations"), row)),
    Format(("messages", "chosen", "rejected"), _pair_after_messages),
    Format(("context", "chosen", "rejected"), lambda row: _pair(prompt_messages(row["context"], "context"), row)),
    Format(("instruction", "chosen", "rejected"), lambda row: _pair(instruction(row), row)),
    Format(("prompt", "chosen", "rejected"), lambda row: _pair(_asked(row), row)),
    Format(("chosen", "rejected"), _whole_dialogues),
    Format(("prompt", "chosen"), lambda row: _pair(_asked(row), row)),
    Format(("messages",), lambda row: dialogue(_turns(row, "messages"))),
    Format(("conversations",), lambda row: dialogue(_turns(row, "conversations"))),
    Format(("prompt", "response"), _prompt_response, history="history"),
    Format(("instruction", "output"), _instruction_output, history="history"),
    Format(("content", "summary"), lambda row: question_answer(row, "content", "summary")),
    Format(("query", "queries", "answers"), lambda row: mkqa(row, "en", row["query"])),
    Format(("prompt",), lambda row: [record(_asked(row))]),
)
PROMPTS = FORMATS[-1]


def recognise(row: Fields) -> Format | None:
    """Return the first of FORMATS whose fields a row has; None if none fits or the answer's field cannot be told.

    A field that is null does not count where the others make a format (Parquet with a column for each format). Beside a
    prompt alone it counts: the answer is missing, and such a set must not become prompts.
    """
    for fields in ({name for name, value in row.items() if value is not None}, set(row)):
        found = next((one for one in FORMATS if fields.issuperset(one.needed)), None)
        if found not in (None, PROMPTS):
            return found
    return None if fields.intersection(ANSWER_LIKE) else found
