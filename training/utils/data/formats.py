"""Turn rows into records; the fields of a row tell its format. Nothing behind this file knows about columns.

A record is {"messages": the prompt, [{"role", "content"}, …] that ends with a user message, "chosen": the answer,
"rejected": a worse answer or None, "margin": how much better, or None, "calls": None}. A dialogue gives one record for each
of its assistant turns. In data that has only prompts, "chosen" is "". Of a dialogue with tools "calls" is JSON of all that
a chat template takes ({"messages", "chosen", "rejected", "tools"}), and messages and answers show the calls as text.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from training.utils.data.names import ANSWER_LIKE
from training.utils.data.scored_answers import ORDERS, scores_apart
from training.utils.data.turns import (
    BadRecord,
    Fields,
    Message,
    Skip,
    calls_in,
    from_json,
    is_alternating,
    is_empty,
    is_turns,
    items,
    kind_of,
    looks_numeric,
    messages_of,
    normal,
    prompt_messages,
    read_item,
    split_turns,
    text,
    tidy,
    truth,
)

Record = dict[str, Any]

LARGEST_NUMBER = 3e38  # of float32, as margins are kept
RECORD_UNLEARNED = "a record marked not to learn"
DIFFERENT = "two dialogues that differ before the last answer"
NOT_IN_DIALOGUE = "a prompt that is not in the dialogue beside it"
UNLEARNED = "an answer marked not to learn"


# --- records ----------------------------------------------------------------------------------------------------------


def user_turn(content: str) -> list[Message]:
    """Return the messages of a single question."""
    return [{"role": "user", "content": content}]


def assistant_turn(content: str) -> Message:
    """Return the message of an answer."""
    return {"role": "assistant", "content": content}


def record(
    messages: list[Message],
    chosen: str | Message | None = None,
    rejected: str | Message | None = None,
    margin: Any = None,
    tools: Any = None,
) -> Record:
    """Make one record; chosen None: of a prompt alone, for step 3. Raise Skip if it could not train anything."""
    messages = tidy(messages)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise Skip("an empty prompt" if chosen is None else "no question of a user before the answer")
    answers = [assistant_turn(one) if isinstance(one, str) else one for one in (chosen, rejected)]
    if any(one is not None and is_empty(one) for one in answers):
        raise Skip("an empty answer")
    if answers[0] and answers[0].get("learn") is False:
        raise Skip(UNLEARNED)
    calls = None
    used = [*messages, *filter(None, answers)]
    if tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in used):
        for_template = [{name: turn[name] for name in turn if name != "learn"} for turn in messages]
        calls = {"messages": for_template, "chosen": answers[0], "rejected": answers[1], "tools": tools or None}
        calls = json.dumps(calls, ensure_ascii=False)
    better, worse = (_shown(one) if one else None for one in answers)
    messages = [{"role": turn["role"], "content": _shown(turn)} for turn in messages]
    return {"messages": messages, "chosen": better or "", "rejected": worse, "margin": _number(margin), "calls": calls}


def _shown(turn: Message) -> str:
    """Return the text of a turn, its calls as JSON behind it."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join(filter(None, [turn["content"], *calls])) if calls else turn["content"]


def _number(value: Any, field: str = "margin") -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise BadRecord(f'field "{field}" is {value!r}, expected a number') from error
    if not abs(number) <= LARGEST_NUMBER:  # NaN, too: one of them would make the loss of all NaN
        raise BadRecord(f'field "{field}" is {value!r}, expected a finite number')
    return number


def dialogue(messages: list[Message], tools: Any = None) -> list[Record | Skip]:
    """Return a record for each assistant turn, and a Skip for each that gives none; a dialogue without one is a prompt."""
    given, messages = messages, tidy(messages)
    results: list[Record | Skip] = greetings(given)
    ends = [end for end, turn in enumerate(messages) if turn["role"] == "assistant"]
    for end in ends:
        try:
            results.append(record(messages[:end], messages[end], tools=tools))
        except Skip as reason:
            results.append(reason)
    if not ends:
        return [*results, record(messages, tools=tools)]
    if ends[-1] < len(messages) - 1:
        results.append(Skip("a last question without an answer", 0))
    return results


def greetings(messages: list[Message]) -> list[Skip]:
    """Return Skips for the answers, and for the turns of tools, before the first question: tidy drops them."""
    asked = next((n for n, turn in enumerate(messages) if turn["role"] == "user" and not is_empty(turn)), 0)
    early = [turn["role"] for turn in messages[:asked] if not is_empty(turn)]
    answers = [Skip("an answer before the first question", early.count("assistant"))] if "assistant" in early else []
    return [*answers, *([Skip("a turn of a tool before the first question", 0)] if "tool" in early else [])]


# --- prompts ----------------------------------------------------------------------------------------------------------


def _system(row: Fields) -> list[Message]:
    return [{"role": "system", "content": text(row["system"], "system")}] if row.get("system") else []


def _before_pair(row: Fields) -> list[Message]:
    return _system(row) + prompt_messages(row["context"], "context")


def _tools(row: Fields) -> Any:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = from_json(tools, "tools") if tools.lstrip().startswith(("[", "{")) else tools.strip()
    tools = [tools] if isinstance(tools, dict) and not is_turns(tools) else tools
    if tools and not (is_turns(tools) and all(isinstance(one, dict) for one in items(tools, "tools"))):
        raise BadRecord(
            'field "tools" is no list of tools, [{"name": "…", "parameters": {…}}]; rename or remove it if it means something else'
        )
    return items(tools, "tools") if tools else None


def history(row: Fields) -> list[Message]:
    """Read the earlier turns: [[question, answer], …] or messages; a "system" field comes first."""
    turns = _system(row)
    for pair in items(row.get("history"), "history"):
        if isinstance(pair, dict):
            turns += read_item(pair, "history")
        elif isinstance(pair, list) and len(pair) == 2:
            question, reply = (text(turn, "history", strip=not place) for place, turn in enumerate(pair))
            turns += [*user_turn(question), assistant_turn(reply)]
        else:
            raise BadRecord('field "history" holds something that is not a pair [question, answer]')
    return turns


def _material(row: Fields) -> list[str]:
    """Read what a question works on, and stands below it: "input", and dolly's "context"."""
    return [text(row[name], name) for name in ("input", "context") if row.get(name)]


def _asked(row: Fields, field: str = "prompt") -> list[Message]:
    """Read the earlier turns and the question, with what it works on below it."""
    turns, material = prompt_messages(row[field], field), _material(row)
    if turns and turns[-1]["role"] == "assistant" and is_empty(turns[-1]):  # the open "Assistant:"
        turns.pop()
    if material:
        question = turns.pop()["content"] if turns and turns[-1]["role"] == "user" else ""
        turns += user_turn("\n".join(filter(None, [question, *material])))
    return history(row) + turns


def _prompt_alone(row: Fields) -> list[Record | Skip]:
    asked = _asked(row)
    return [*greetings(asked), record(asked, tools=_tools(row))]


def _turns(row: Fields, field: str) -> list[Message]:
    if not isinstance(row[field], (list, str, dict)):
        raise BadRecord(f'field "{field}" is {kind_of(row[field])}, expected a list of messages')
    turns = row[field]
    if is_alternating(turns):
        turns = [{"role": ("user", "assistant")[place % 2], "content": one} for place, one in enumerate(turns)]
    return _system(row) + messages_of(turns, field)


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_turns(row: Fields, field: str, asked: Sequence[Message] = ()) -> list[Message]:
    """Read an answer: a text, one message, or messages. Behind a prompt with role marks a space before the text goes.

    asked: the prompt. A text with role marks that repeats one of its questions, or is of hh-rlhf's form, is a whole dialogue;
    any other is an answer that quotes one.
    """
    value = row[field]
    if is_turns(value):
        turns = items(value, field)
        if turns and all(isinstance(one, str) for one in turns):
            if len(turns) > 1:
                way = "give a single text, and a record for each pair" if field in ("chosen", "rejected") else ""
                way = way or 'give their scores in a field "score", or a single text'
                raise BadRecord(f'field "{field}" is a list of {len(turns)} texts and nothing says which is better; {way}')
            return [assistant_turn(text(turns[0], field, strip=False))]
        return messages_of(value, field) or [assistant_turn("")]
    if isinstance(value, dict):
        return read_item({"role": "assistant"} | value, field)
    reply = text(value, field, strip=False)
    if row.get("tools") and (calls := calls_in(reply)):
        return [assistant_turn("") | {"tool_calls": calls}]
    whole = split_turns(reply, answered=True) or []
    questions = {normal(turn["content"]) for turn in asked if turn["role"] == "user"} if whole else set()
    repeated = any(turn["role"] == "user" and normal(turn["content"]) in questions for turn in whole)
    if repeated or (whole and reply.startswith("\n\nHuman:")):
        return whole
    prompt = row.get("prompt") or row.get("instruction") or row.get("context")
    marked = reply.startswith(" ") and isinstance(prompt, str) and split_turns(text(prompt, "prompt"))
    return [assistant_turn(reply.removeprefix(" ") if marked else reply)]


def joined(asked: list[Message], turns: list[Message]) -> list[Message]:
    """Return the whole dialogue: turns behind what was asked, or turns alone where they repeat it."""
    if turns[0]["role"] in ("assistant", "tool"):
        return asked + turns
    said = [(turn["role"], normal(turn["content"])) for turn in turns]
    before = [(turn["role"], normal(turn["content"])) for turn in asked]
    if all(turn in said for turn in before if turn[0] != "system"):
        system = [turn for turn in asked if turn["role"] == "system"]
        return ([] if turns[0]["role"] == "system" else system) + turns
    first = next((turn for turn in said if turn[0] != "system"), None)
    if first in before:
        return asked[: before.index(first)] + turns
    raise Skip(NOT_IN_DIALOGUE, sum(turn[0] == "assistant" for turn in said))


def pair(asked: list[Message], row: Fields) -> list[Record | Skip]:
    """Read the answers "chosen" and "rejected" (perhaps null), each alone or behind the whole dialogue."""
    sides = [answer_turns(row, field, asked) for field in ("chosen", "rejected") if row.get(field) is not None]
    dialogues = [joined(asked, turns) for turns in sides]
    if any(one[-1]["role"] != "assistant" for one in dialogues):
        raise Skip("a dialogue that does not end with an answer")
    whole = [one[:-1] for one, turns in zip(dialogues, sides, strict=True) if len(turns) > 1] or [asked]
    if len(whole) > 1 and _compared(whole[0]) != _compared(whole[1]):
        raise Skip(DIFFERENT)
    answers = [one[-1] for one in dialogues]
    return [*greetings(whole[0]), record(whole[0], *answers, margin=row.get("margin"), tools=_tools(row))]


def _compared(messages: list[Message]) -> list[tuple[str, str]]:
    return [(turn["role"], normal(_shown(turn))) for turn in tidy(messages)]


def _pair_after_messages(row: Fields) -> list[Record | Skip]:
    """Read a pair. Messages that end with an answer are the chosen dialogue once more, or stand for it."""
    messages = _turns(row, "messages")
    if row.get("prompt"):
        joined(prompt_messages(row["prompt"]), messages)  # the prompt says nothing that they do not
    if messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        if row.get("chosen") is None:
            row = row | {"chosen": last}
        elif normal(answer_turns(row, "chosen", messages)[-1]["content"]) != normal(last["content"]):
            raise Skip("messages that end with another answer than the chosen one")
    if row.get("chosen") is None:
        raise Skip("a dialogue that does not end with an answer")
    return pair(messages, row)


def _pair_with(row: Fields, asked: str, reply: str) -> list[Record | Skip]:
    """Read a pair whose better answer has the name of a single one."""
    return pair(_asked(row, asked), row | {"chosen": row[reply]})


def _answer_behind(row: Fields, field: str, reply: str) -> list[Record | Skip]:
    """Read messages and an answer of their own field. Messages that end with this answer are the whole dialogue."""
    messages = _turns(row, field)
    if not messages or messages[-1]["role"] != "assistant":
        return dialogue(joined(messages, answer_turns(row, reply, messages)), _tools(row))
    if normal(answer_turns(row, reply, messages)[-1]["content"]) != normal(messages[-1]["content"]):
        raise Skip(f'messages that end with another answer than "{reply}"')
    return dialogue(messages, _tools(row))


def _whole_dialogues(row: Fields) -> list[Record | Skip]:
    """Read the form of hh-rlhf: two dialogues, equal but for the last answer."""
    return pair(_system(row), row | {name: _answered_dialogue(row[name], name) for name in ("chosen", "rejected")})


def _answered_dialogue(value: Any, field: str) -> list[Message]:
    if is_turns(value):
        turns = messages_of(value, field)
    else:
        value = text(value, field, strip=False)
        turns = split_turns(value, answered=True)
        if not turns and value.strip() and not split_turns(value):
            raise BadRecord(
                f'no field "prompt" (--columns prompt=… names another one), and "{field}" is not a whole dialogue '
                '("\\n\\nHuman: …\\n\\nAssistant: …")'
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise Skip("a dialogue that does not end with an answer")
    return turns


def _replied(row: Fields, question: str, reply: str) -> list[Record | Skip]:
    """Read a question and its answer, or several answers: a list in "output" stands in order, best first."""
    row = scores_apart(row, reply)
    asked, value = _asked(row, question), row[reply]
    several = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if several and (reply == "output" or any(row.get(name) is not None for name in ORDERS)):
        return _ranked(asked, row, reply)
    turns = answer_turns(row, reply, asked)
    if len(turns) > 1 or row.get("history"):
        return _answered(asked, turns, _tools(row))
    return [*greetings(asked), record(asked, *turns, tools=_tools(row))]


def _answered(asked: list[Message], turns: list[Message], tools: Any) -> list[Record | Skip]:
    if is_empty(turns[-1]):
        raise Skip("an empty answer")
    return dialogue(joined(asked, turns), tools)


def _ranked(asked: list[Message], row: Fields, field: str) -> list[Record | Skip]:
    """Read several answers: a pair of the best and the worst. Without a score or a rank they stand in order, best first."""
    texts = [text(reply, field, strip=False) for reply in items(row[field], field)]
    given = [name for name in ORDERS if row.get(name) is not None]
    orders = [_goodness(row[name], name, ORDERS[name], len(texts), field) for name in given]
    if not orders and len(texts) > 1:
        _check_order(row, field, len(texts))
    if orders:
        order = sorted(range(len(texts)), key=lambda place: -orders[0][place])
        for numbers in orders[1:]:
            if any(numbers[one] < numbers[other] for one, other in pairwise(order)):
                raise BadRecord('the fields "score" and "rank" put the answers in different orders; remove the wrong one')
        if len(texts) > 1 and orders[0][order[0]] == orders[0][order[-1]]:
            raise Skip(f"answers with the same {given[0]}", len(texts))
        texts = [texts[place] for place in order]
    said = [reply for reply in texts if reply.strip()] or [""]
    left_out = [Skip("a rank between the best and the worst", len(said) - 2)] if len(said) > 2 else []
    left_out += [Skip("an empty answer", len(texts) - len(said))] if len(texts) > len(said) else []
    one = record(asked, said[0], said[-1] if len(said) > 1 else None, tools=_tools(row))
    return [one, *greetings(asked), *left_out]


def _goodness(value: Any, name: str, sign: int, count: int, field: str) -> list[float]:
    """Return how good each of the answers is, by their scores or ranks. sign: 1 or -1, by which they grow with it."""
    numbers = [number for one in items(value, name) if (number := _number(one, name)) is not None]
    if len(numbers) != count:
        raise BadRecord(f'field "{name}" has {len(numbers)} numbers for the {count} answers of "{field}"')
    return [sign * number for number in numbers]


def _check_order(row: Fields, field: str, count: int) -> None:
    """Raise BadRecord for a field of unknown meaning that has as many numbers as there are answers: it may order them."""
    for name, value in row.items():
        as_many = name not in (field, "history") and isinstance(value, list) and len(value) == count
        if as_many and not any(isinstance(one, str) and not looks_numeric(one) for one in value):
            raise BadRecord(
                f'"{field}" is a list of {count} answers, and "{name}" may say their order: --columns score={name} '
                f"(high is good), --columns rank={name} (1 is the best), or remove it (then the first is the best)"
            )


def question_answer(row: Fields, question: str, chosen: str) -> list[Record]:
    """Read plain texts out of two fields."""
    return [record(user_turn(text(row[question], question)), text(row[chosen], chosen, strip=False))]


def mkqa(row: Fields, language: str, question: Any) -> list[Record | Skip]:
    """Read a question of MKQA and the first of its answers in a language. Raise Skip if it has none, as many."""
    languages = row["answers"] or {}
    answers = items(languages.get(language), "answers") if isinstance(languages, dict) else None
    if answers is None or (answers and not isinstance(answers[0], dict)):
        raise BadRecord('field "answers" is not of the form {"en": [{"text": "…"}]}')
    reply = answers[0].get("text") if answers else None
    if not reply or not question:
        raise Skip("no answer in this language")
    others = [Skip("a further answer to the same question", len(answers) - 1)] if len(answers) > 1 else []
    return [record(user_turn(text(question, "query")), text(reply, "answers")), *others]


def squad(row: Fields) -> list[Record | Skip]:
    """Read a question about a text and the first of its answers, {"text": ["…"]} or [{"text": "…"}], as SQuAD has them."""
    answers = items(row["answers"], "answers")
    if not all(isinstance(one, dict) and "text" in one for one in answers):
        raise BadRecord('field "answers" is not of the form {"text": ["…"]}; name the answer with --columns response=…')
    if not answers:
        raise Skip("a question without an answer")
    first, *further = dict.fromkeys(text(one["text"], "answers", strip=False) for one in answers)
    return [record(_asked(row, "question"), first), *(Skip("a further answer to the same question") for _ in further)]


def squad_article(row: Fields) -> list[Record | Skip]:
    """Read an article of SQuAD's own files: paragraphs, each a text with its questions."""
    results = []
    for paragraph in items(row["paragraphs"], "paragraphs"):
        questions = items(paragraph.get("qas"), "qas") if isinstance(paragraph, dict) else [None]
        if not all(isinstance(one, dict) for one in questions):
            raise BadRecord('field "paragraphs" is not of the form [{"context": "…", "qas": [{"question": "…", "answers": […]}]}]')
        for one in questions:
            try:
                results += squad({"question": None, "answers": None} | one | {"context": paragraph.get("context")})
            except Skip as reason:
                results.append(reason)
    return results


# --- formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A form of rows. A new one is a row of FORMATS."""

    needed: tuple[str, ...]  # fields that every row must have
    convert: Callable[[Fields], list[Record | Skip]]  # makes the records of a row
    optional: tuple[str, ...] = ()  # further fields that it reads
    # ChatGLM data often spells a dialogue out: every turn is a row, and stands in the history of the later rows too. The
    # turns in this field count once.
    history: str = ""
    judged: bool = False  # "label" may say whether the answer is good or bad
    set_name: str = ""  # the named set whose rule it is

    @property
    def fields(self) -> set[str]:
        """Return all fields that it reads."""
        return {*self.needed, *self.optional, *(["label"] if self.judged else [])}


EARLIER, TOOLS, MATERIAL = ("history", "system"), ("system", "tools"), ("input", "context")
MORE = (*TOOLS, "margin")
PAIRED, ANSWERED = ("history", *MATERIAL, *MORE), (*EARLIER, *MATERIAL, "tools", *ORDERS)


# The first one that fits is taken.
FORMATS: tuple[Format, ...] = (
    Format(("conversations", "chosen", "rejected"), lambda row: pair(_turns(row, "conversations"), row), MORE),
    Format(("conversations", "rejected"), lambda row: _pair_after_messages(row | {"messages": row["conversations"]}), MORE),
    Format(("messages", "chosen", "rejected"), _pair_after_messages, ("prompt", *MORE)),
    Format(("messages", "rejected"), _pair_after_messages, ("prompt", *MORE)),
    Format(("instruction", "chosen", "rejected"), lambda row: pair(_asked(row, "instruction"), row), PAIRED),
    Format(("prompt", "chosen", "rejected"), lambda row: pair(_asked(row), row), PAIRED),
    *(
        Format((asked, reply, "rejected"), partial(_pair_with, asked=asked, reply=reply), PAIRED)
        for asked, reply in (("prompt", "response"), ("instruction", "output"), ("instruction", "response"))
    ),
    Format(("context", "chosen", "rejected"), lambda row: pair(_before_pair(row), row), MORE),
    Format(("chosen", "rejected"), _whole_dialogues, MORE),
    Format(("prompt", "chosen"), lambda row: pair(_asked(row), row), PAIRED),
    *(
        Format((field, reply), partial(_answer_behind, field=field, reply=reply), TOOLS, judged=True)
        for field in ("messages", "conversations")
        for reply in ("chosen", "response", "output")
    ),
    Format(("messages",), lambda row: dialogue(_turns(row, "messages"), _tools(row)), TOOLS, judged=True),
    Format(("conversations",), lambda row: dialogue(_turns(row, "conversations"), _tools(row)), TOOLS, judged=True),
    *(
        Format(names, partial(_replied, question=names[0], reply=names[1]), ANSWERED, "history", judged=True)
        for names in (("prompt", "response"), ("instruction", "output"), ("instruction", "response"))
    ),
    Format(("content", "summary"), lambda row: question_answer(row, "content", "summary")),
    Format(("prompt", "queries", "answers"), lambda row: mkqa(row, "en", row["prompt"])),
    Format(("question", "context", "answers"), squad),
    Format(("paragraphs",), squad_article),
    Format(("context", "qas"), lambda row: squad_article({"paragraphs": [row]})),
    Format(("prompt",), _prompt_alone, (*EARLIER, *MATERIAL, "tools")),
)
PROMPTS = FORMATS[-1]


def recognise(row: Fields, mapped: set[str] = frozenset()) -> Format | None:
    """Return the first of FORMATS whose fields a row has; None if none fits or the answer's field cannot be told.

    A field that is null does not count where the others make a format (Parquet with a column for each format). Beside a
    prompt alone it counts: the answer is missing, and such a set must not become prompts. mapped: fields that it must read.
    """
    for fields in ({name for name, value in row.items() if value is not None}, set(row)):
        found = next((one for one in FORMATS if fields.issuperset(one.needed) and mapped <= one.fields), None)
        if found not in (None, PROMPTS):
            return found
    return None if fields & ANSWER_LIKE - mapped and not mapped else found


def judgement(form: Format, row: Fields) -> bool | None:
    """Return whether the answer of a row is labelled good (True) or bad (False); None without such a label."""
    return truth(row["label"]) if form.judged and row.get("label") is not None else None
