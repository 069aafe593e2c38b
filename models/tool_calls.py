"""Encode dialogues with tools: by the checkpoint's own chat template as transformers defines it, or by ChatGLM3's roles.

A call is {"type": "function", "function": {"name", "arguments"}} in "tool_calls" of an assistant message; what the tool
returns is a message of the role "tool". Calls are answers, results are part of the prompt.
"""

import ast
import copy
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from errors import UserError
from json_text import parse_json
from models.chatglm.prompts import CHATGLM3_TOOLS
from models.templates import Messages, Template, encode_texts, name_of

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "sanbu_call",
        "description": "sanbu tool",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "sanbu"}}},
    },
}
PROBE_CALL = {"type": "function", "id": "sanbu0000", "function": {"name": "sanbu_call", "arguments": {"x": "1"}}}


def check_tools(tokenizer: Any, template: Template) -> None:
    """Raise UserError if dialogues with tools cannot be written: the chat template leaves out calls, results or tools."""
    if template.kind == "chatglm3":
        return
    missing = "tools, calls and results"
    if template.kind == "chat_template":
        ask = [{"role": "user", "content": "sanbu question"}]
        call = [*ask, {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}]
        result = {"role": "tool", "name": "sanbu_call", "tool_call_id": "sanbu0000", "content": "sanbu result"}
        try:
            found = {
                "tools": "sanbu_call" in render(tokenizer, ask, [PROBE_TOOL]),
                "calls": "sanbu_call" in render(tokenizer, call, None),
                "results": "sanbu result" in render(tokenizer, [*call, result], None),
            }
            missing = ", ".join(name for name in found if not found[name])
        except UserError as error:
            missing = str(error)
    if missing:
        raise UserError(
            f"the data has dialogues with tools, and the dialogue form of {name_of(tokenizer)} does not write them "
            f"({missing}); use a checkpoint whose chat template knows tools, or ChatGLM3, or take these dialogues out."
        )


def encode_tool_dialogue(
    tokenizer: Any, template: Template, messages: Messages, answers: list[dict[str, Any] | None], tools: Any
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt with tools, and of the answers that follow it, end tokens included (None: left out)."""
    answers = [answer for answer in answers if answer is not None]
    if template.kind == "chatglm3":
        prompt = template.encode_prompt(tokenizer, chatglm3_messages(messages, tools))
        return prompt, [encode_chatglm3_answer(tokenizer, template, answer) for answer in answers]
    text = render(tokenizer, messages, tools, open_answer=True) + template.prompt_suffix
    prompt = encode_texts(tokenizer, [text])[0]
    encoded = []
    for answer in answers:
        if not answer.get("tool_calls"):
            encoded.append(template.encode_answer(tokenizer, answer["content"]))
            continue
        whole = render(tokenizer, [*messages, answer], tools)
        # Where the prompt opens with an empty thought, the whole dialogue may go on without it.
        both = enumerate(zip(text, whole, strict=False))
        shared = next((place for place, (one, other) in both if one != other), min(len(text), len(whole)))
        behind = encode_texts(tokenizer, [template.anchor + whole[shared:]])[0]  # marks of a call may be special tokens
        ids = behind[len(encode_texts(tokenizer, [template.anchor])[0]) :] if template.anchor else behind
        end = next((place for place, token in enumerate(ids) if token in template.stop_token_ids), len(ids))
        encoded.append([*ids[:end], template.end_token_id])
    return prompt, encoded


def render(tokenizer: Any, messages: Messages, tools: Any, *, open_answer: bool = False) -> str:
    """Return the text that the chat template writes. Raise UserError if it refuses.

    Arguments of a call stay as the data has them, JSON text or an object, where the template takes them so: some put a text
    into quotes once more, some cannot read it, and some cannot write an object.
    """
    given = [arguments_of(call) for message in messages for call in message.get("tool_calls", ())]
    texts = [one for one in given if isinstance(one, str)]
    attempts = [list(messages), _with_arguments(messages, _as_object), _with_arguments(messages, _as_text)]
    cause: Exception | None = None
    for attempt in attempts:
        try:
            # enable_thinking: as in templates.render_chat
            written = tokenizer.apply_chat_template(
                attempt, tools=tools, tokenize=False, add_generation_prompt=open_answer, enable_thinking=False
            )
        except Exception as error:  # jinja2's errors, and whatever a template raises by itself
            cause = cause or error
            continue
        if attempt is attempts[0] and any(json.dumps(one) in written for one in texts if '"' in one):
            continue
        return written
    raise UserError(f"the chat template of {name_of(tokenizer)} refuses a dialogue with tools: {cause}.")


def arguments_of(call: dict[str, Any]) -> Any:
    """Return the arguments of a call."""
    return call["function"].get("arguments", {})


def _as_object(arguments: Any) -> Any:
    try:
        return parse_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(messages: Messages, change: Any) -> list[dict[str, Any]]:
    messages = copy.deepcopy(list(messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = change(arguments_of(call))
    return messages


# --- ChatGLM3 ---------------------------------------------------------------------------------------------------------


def chatglm3_messages(messages: Messages, tools: Any) -> list[dict[str, Any]]:
    """Return messages in ChatGLM3's roles: tools stand in the system message, a call has its name as metadata."""
    written = []
    for message in messages:
        if message["role"] == "tool":
            written.append({"role": "observation", "content": message["content"]})
        elif message.get("tool_calls"):
            written += [
                {"role": "assistant", "metadata": name, "content": text} for name, text in chatglm3_calls(message)
            ]
        else:
            written.append(dict(message))
    if tools:
        if not written or written[0]["role"] != "system":
            written.insert(0, {"role": "system", "content": CHATGLM3_TOOLS})
        written[0]["tools"] = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    return written


def chatglm3_calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) of the calls of a message, as ChatGLM3 writes them: a call of Python's tool_call."""
    calls = []
    for call in message["tool_calls"]:
        arguments = _as_object(arguments_of(call))
        if not isinstance(arguments, dict):
            raise UserError(f"a call whose arguments are no object: {arguments!r}.")
        words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        calls.append((call["function"]["name"], f"```python\ntool_call({words})\n```"))
    return calls


def encode_chatglm3_answer(tokenizer: Any, template: Template, answer: dict[str, Any]) -> list[int]:
    """Return the tokens of an answer; of a call the name, a line break, the call and <|observation|>, at which it ends."""
    if not answer.get("tool_calls"):
        return template.encode_answer(tokenizer, answer["content"])
    calls = chatglm3_calls(answer)
    if len(calls) > 1:
        raise UserError("several calls in one turn, which ChatGLM3 cannot make.")
    (name, text), end = calls[0], tokenizer.convert_tokens_to_ids("<|observation|>")
    heading, content = tokenizer.encode_plain([f"{name}\n", text])
    return [*heading, *content, end]


# --- calls in a generated answer ----------------------------------------------------------------------------------------

MARK = re.compile(r"(<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>)?[\s\[]*$")


def read_calls(text: str, names: Sequence[str]) -> tuple[str, list[dict[str, str]]]:
    """Return what an answer says before its calls, and the calls: {"name", "arguments" as JSON text}.

    Read are JSON objects with a name of ``names`` and arguments (Qwen, Llama, Mistral, with their marks), and a line with
    nothing but a name above the arguments: JSON (GLM-4), or a call of Python's tool_call (ChatGLM3).
    """
    heading, _, body = text.partition("\n")
    if heading.strip() in names:
        arguments = _python_arguments(body) if "tool_call(" in body else next((one for _, one in _objects(body)), None)
        return ("", [_call(heading.strip(), arguments)]) if arguments is not None else (text, [])
    found = [
        (place, _call(one["name"], one.get("arguments", one.get("parameters", {}))))
        for place, one in _objects(text)
        if one.get("name") in names
    ]
    return (MARK.sub("", text[: found[0][0]]).strip() if found else text), [call for _, call in found]


def _call(name: str, arguments: Any) -> dict[str, str]:
    return {"name": name, "arguments": _as_text(arguments)}


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the JSON objects in a text, and where each begins."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        end = place + 1
        try:
            value, end = decoder.raw_decode(text, place)
            yield place, value
        except (ValueError, RecursionError):  # a brace of the text, or an answer of nothing but braces
            pass
        place = text.find("{", end)


def _python_arguments(text: str) -> dict[str, Any] | None:
    """Return the keywords of a call tool_call(name=value, …); None if it is none."""
    code = text[text.index("tool_call(") :].split("```")[0].strip()
    try:
        call = ast.parse(code, mode="eval").body
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        return None
