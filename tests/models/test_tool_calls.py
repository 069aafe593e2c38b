"""Dialogues with tools become what the checkpoint's chat template writes; calls are answers, results are context."""

import json
from types import SimpleNamespace

import pytest

from errors import UserError
from models.templates import load_template
from models.tool_calls import check_tools, encode_tool_dialogue
from tests.tiny import tiny_tokenizer
from tests.training.utils.data.rows import run, turns, write_lines

pytestmark = pytest.mark.fast

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ARGUMENTS = {"city": "Oslo"}


def call(arguments, content=None):
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}],
    }


DIALOGUE = [*turns("Weather?"), call(ARGUMENTS), {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Cold."}]
CALL_JSON = json.dumps({"name": "weather", "arguments": ARGUMENTS})
# The same dialogue as four tools write it.
SPELLED = {
    "OpenAI": {"messages": [DIALOGUE[0], call(json.dumps(ARGUMENTS)), *DIALOGUE[2:]], "tools": TOOLS},
    "objects": {"messages": DIALOGUE, "tools": TOOLS},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": CALL_JSON},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Cold."},
        ],
        "tools": json.dumps(TOOLS),
    },
    "functions": {
        "messages": [
            DIALOGUE[0],
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
            {"role": "function", "name": "weather", "content": "3"},
            DIALOGUE[3],
        ],
        "tools": TOOLS,
    },
}
EARLIER = [{"role": "user", "content": "Who? " * 20}, {"role": "assistant", "content": "Me."}]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How templates write the arguments: some take an object, some a text, some both.
WRITTEN = {
    "tojson": "{{ c.function.arguments | tojson }}",
    "concatenated": "{{ '' + c.function.arguments }}",
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    "items": "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
}


def tokenizer_with(arguments: str):
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = CHATML.replace("ARGUMENTS", WRITTEN[arguments])
    return tokenizer


def parts(data, tokenizer):
    """(prompt, answer) of each example, decoded."""
    return [
        tuple(tokenizer.decode(ids) for ids in (row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]))
        for row in data.train
    ]


@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("arguments", WRITTEN)
def test_calls_are_learned_and_results_are_context(spelled, arguments, tmp_path):
    tokenizer = tokenizer_with(arguments)
    path = write_lines(tmp_path / "tools.jsonl", [SPELLED[spelled]])
    written = "city=Oslo" if arguments == "items" else '{"city": "Oslo"}'
    asked = f"<|im_start|>system\n{json.dumps(TOOLS)}<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    said = f"<call>weather {written}</call><|im_end|>"
    result = f"{asked}{said}\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    data = run(path, 1, tokenizer, max_seq_len=400)
    assert parts(data, tokenizer) == [(asked, said), (result, "Cold.<|im_end|>")]
    prompts = run(path, 3, tokenizer, max_seq_len=400).train["prompt_ids"]
    assert [tokenizer.decode(ids) for ids in prompts] == [asked, result]


def test_pairs_after_tools_and_calls_made_together(tmp_path):
    tokenizer = tokenizer_with("tojson")
    together = [*turns("Both?"), *[{"role": "tool_call", "content": CALL_JSON}] * 2, {"role": "tool_response", "content": "3"}]
    path = write_lines(tmp_path / "pairs.jsonl", [{"messages": together, "chosen": "Cold.", "rejected": call(ARGUMENTS, "")}])
    (row,) = run(path, 2, tokenizer, max_seq_len=400).train
    good, bad = (tokenizer.decode(row[name]) for name in ("chosen_ids", "rejected_ids"))
    asked = good.removesuffix("Cold.<|im_end|>")
    assert asked.count("<call>weather") == 2 and asked.count("<|im_start|>assistant") == 2
    assert bad == asked + '<call>weather {"city": "Oslo"}</call><|im_end|>'


def test_chatglm3_writes_calls_by_its_roles(tmp_path, chatglm3):
    encode, name = chatglm3.tokenizer.encode_plain, chatglm3.tokenizer.convert_tokens_to_ids
    data = run(write_lines(tmp_path / "tools.jsonl", [SPELLED["OpenAI"]]), 1, chatglm3.tokenizer, max_seq_len=600)
    system = "Answer the following questions as best as you can. You have access to the following tools:\n"
    system += json.dumps([TOOLS[0]["function"]], indent=4)
    texts = ["\n", system, "\n", "Weather?", "weather\n", "```python\ntool_call(city='Oslo')\n```", "\n", "3", "\n", "Cold."]
    empty, system, _, asked, called, arguments, _, result, _, cold = encode(texts)
    prompt = [*chatglm3.template.prefix_ids, name("<|system|>"), *empty, *system, name("<|user|>"), *empty, *asked]
    first = [*prompt, name("<|assistant|>"), *called, *arguments, name("<|observation|>")]
    second = [*first, *empty, *result, name("<|assistant|>"), *empty, *cold, chatglm3.template.end_token_id]
    assert data.train["input_ids"][:] == [first, second]
    assert data.train["prompt_length"][0] == len(prompt) + 1


def test_chatglm3_s_saved_chat_template_writes_tools_as_training_does(tmp_path, chatglm3):
    tokenizer, template = chatglm3.tokenizer, chatglm3.template
    template.save(tmp_path, tokenizer)
    saved = type(tokenizer).from_pretrained(tmp_path)
    arguments = {"city": "Zürich's \"old\" town\n奥斯陆", "days": 3, "metric": True, "near": None, "at": [1.5, {"a": "b"}]}
    ask, empty = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": []}
    empty["tool_calls"] = [{"type": "function", "function": {"name": "now", "arguments": {}}}]
    dialogue = [ask, call(arguments), {"role": "tool", "content": "3 degrees"}, empty, {"role": "tool", "content": "10:00"}]
    system = {"role": "system", "content": "Be brief."}
    told = {"role": "system", "content": "Be brief.", "tools": [{"name": "其他"}]}
    for messages, tools in (
        (dialogue, TOOLS),
        ([system, *dialogue], TOOLS),
        ([told, *dialogue], TOOLS),
        ([told, *dialogue], None),
        (dialogue, None),
        ([ask], [TOOLS[0]["function"]]),
        ([*dialogue, {"role": "assistant", "content": "Cold."}, ask], TOOLS),
    ):
        ours, _ = encode_tool_dialogue(tokenizer, template, messages, [], tools)
        assert saved.apply_chat_template(messages, tools, add_generation_prompt=True, return_dict=False) == ours
    with pytest.raises(Exception, match="must be an object"):
        saved.apply_chat_template([ask, call("{}")])


@pytest.fixture(scope="module")
def chatglm3(shared_dir, tmp_path_factory):
    from models.tokenizer import load_tokenizer
    from tests.models.chatglm_folders import tokenizer_folder

    tokenizer = load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("glm") / "chatglm3", shared_dir, "chatglm3"))
    return SimpleNamespace(tokenizer=tokenizer, template=load_template(None, tokenizer))


def test_a_template_without_tools_is_said_in_one_sentence(tmp_path):
    plain, none = tiny_tokenizer("qwen2"), tiny_tokenizer("llama")
    path = write_lines(tmp_path / "tools.jsonl", [SPELLED["OpenAI"]])
    for tokenizer, missing in ((plain, "tools, calls"), (none, "tools, calls and results")):
        with pytest.raises(UserError, match=rf"does not write them \({missing}.*whose chat template knows tools") as error:
            run(path, 1, tokenizer)
        assert str(error.value).count("\n") == 0
    tokenizer = tokenizer_with("tojson")
    check_tools(tokenizer, load_template(None, tokenizer))
    run(write_lines(tmp_path / "plain.jsonl", [{"messages": turns("Q", "A")}]), 1, plain)


def test_the_shared_case(shared_cases, tmp_path, monkeypatch):
    file = shared_cases / "tool_turns.jsonl"
    tokenizer = tokenizer_with("tojson")
    assert [answer for _, answer in parts(run(file, 1, tokenizer, max_seq_len=400), tokenizer)] == [
        '<call>weather {"city": "Oslo"}</call><|im_end|>',
        "3 degrees.<|im_end|>",
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("phase", [1, 2])
def test_tools_and_calls_are_whole_or_the_dialogue_is_left_out(phase, tmp_path):
    """Too long: earlier whole turns go, the tools stay; where that is not enough, no part of them is cut."""
    tokenizer = tokenizer_with("tojson")
    answered = {"messages": DIALOGUE[:-1], "chosen": "Cold.", "rejected": "Hot."} if phase == 2 else {"messages": DIALOGUE}
    short = write_lines(tmp_path / "short.jsonl", [answered | {"tools": TOOLS}])
    long = write_lines(tmp_path / "long.jsonl", [answered | {"messages": EARLIER + answered["messages"], "tools": TOOLS}])
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "z"}])
    ids = "input_ids" if phase == 1 else "chosen_ids"

    def rows(path, limit):
        data = run([path, other], phase, tokenizer, max_seq_len=limit)
        return data.train[ids][:-1], data.report["train"]

    whole, _ = rows(short, 999)
    longest = max(map(len, whole))
    for limit in (longest, longest + 5):
        kept, report = rows(long, limit)
        assert kept[-len(whole) :] == whole and report["truncated_prompts"] == len(whole)
    kept, report = rows(short, longest - 1)
    assert kept == whole[:-1] and report["dropped"] == {"tools and newest turn too long": 1}
    assert report["joined"] == 0


def test_a_call_that_is_too_long_is_left_out(tmp_path):
    tokenizer = tokenizer_with("tojson")
    rows = [{"messages": [DIALOGUE[0], call({"city": "Oslo " * n})]} for n in (1, 60)]
    report = run(write_lines(tmp_path / "a.jsonl", rows), 1, tokenizer, max_seq_len=64).report["train"]
    assert (report["kept"], report["dropped"]) == (1, {"call of a tool too long": 1})
