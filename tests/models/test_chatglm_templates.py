"""ChatGLM's dialogues are written as the original code writes them, and no text can pretend to be a control token."""

import json
from dataclasses import asdict

import pytest

from errors import UserError
from models.chatglm.prompts import FORMS, write_rounds
from models.chatglm.registration import ChatGLMTokenizer
from models.templates import CHATGLM, FILE_NAME, Template, load_template
from tests.models.chatglm_folders import GENERATIONS, change_json, golden, tokenizer_folder
from tests.models.test_chatglm_tokenizers import NAMES
from tests.tiny import tiny_tokenizer

ASK = [{"role": "user", "content": "What is 2+2?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
DIALOGUE = [
    {"role": "user", "content": "怎么做面包？"},
    {"role": "assistant", "content": "把面粉、水混合。"},
    {"role": "user", "content": "and then?"},
]
# Special ids of the published files, written out: (stops, in front of a prompt, at its end).
FRAMES = {
    "chatglm": ((130005,), (), (130001, 130004)),
    "chatglm2": ((2,), (64790, 64792), ()),
    "chatglm3": ((2, 64795, 64797), (64790, 64792), (64796,)),
}


@pytest.fixture(scope="module")
def tokenizers(shared_dir, tmp_path_factory):
    """The published tokenizers, by generation."""
    at = tmp_path_factory.mktemp("tokenizers")
    return {
        version: ChatGLMTokenizer.from_pretrained(tokenizer_folder(at / version, shared_dir, version))
        for version in GENERATIONS
    }


@pytest.fixture(params=GENERATIONS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture
def template(tokenizer):
    return load_template(None, tokenizer)


def messages_of(history: list[list[str]], question: str) -> list[dict]:
    texts = [text for turn in history for text in turn] + [question]
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


# --- equal to the originals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["chatglm", "chatglm2"])
def test_rounds_are_written_as_the_original_chat_writes_them(tokenizers, shared_dir, version):
    tokenizer = tokenizers[version]
    template = load_template(None, tokenizer)
    dialogues = golden(shared_dir, version, "prompts")["dialogs"]
    assert any(case["history"] for case in dialogues)
    for case in dialogues:
        messages = messages_of(case["history"], case["query"])
        assert write_rounds(messages, **FORMS[version]) == case["prompt"]
        assert template.encode_prompt(tokenizer, messages) == case["input_ids"]


def test_roles_are_written_as_the_original_chat_writes_them(tokenizers, shared_dir):
    tokenizer = tokenizers["chatglm3"]
    template = load_template(None, tokenizer)
    known = golden(shared_dir, "chatglm3", "prompts")
    assert any("tools" in message for case in known["chat_inputs"] for message in case["history"])
    for case in known["chat_inputs"]:
        messages = [*case["history"], {"role": case["role"], "content": case["query"]}]
        assert template.encode_prompt(tokenizer, messages) == case["input_ids"]
    for case in known["single_messages"]:
        message = {"role": case["role"], "metadata": case["metadata"], "content": case["message"]}
        ids = template.encode_prompt(tokenizer, [message, *ASK])
        assert ids[2 : 2 + len(case["ids"])] == case["ids"]
        assert ids[2 + len(case["ids"]) :] == template.encode_prompt(tokenizer, ASK)[2:]
        if case["role"] == "assistant" and not case["metadata"]:
            assert [64796, *template.encode_answer(tokenizer, case["message"])] == [*case["ids"], 2]


@pytest.mark.parametrize("version", GENERATIONS)
def test_answers_are_shown_as_the_original_shows_them(shared_dir, version):
    """ChatGLM3's tool calls, which the original takes apart, stay text: the tool's name and the call."""
    clean = CHATGLM[version].clean_reply
    for case in golden(shared_dir, version, "prompts")["process_response"]:
        expected = case["out"] if "out" in case else case["content"]
        if isinstance(expected, str):
            assert clean(case["in"]) == expected
        else:
            assert expected["name"] in clean(case["in"]) and clean(case["in"]) == case["in"].strip()


@pytest.mark.parametrize("version", ["chatglm", "chatglm2"])
def test_training_rows_are_those_of_the_published_fine_tuning(tokenizers, shared_dir, version):
    """Rows that were not cut there. ChatGLM-6B's labels there begin one token earlier: <sop> is a target.

    The published preprocessing of ChatGLM-6B writes "[Round 0]" for a first question where the set has a column for the
    history, though its own evaluation and chat write the bare question; here it is the bare question always.
    """
    tokenizer = tokenizers[version]
    template = load_template(None, tokenizer)
    pad, compared = tokenizer.pad_token_id, 0
    for case in golden(shared_dir, version, "sft_preprocess")["cases"]:
        for place, example in enumerate(case["examples"]):
            history = example["history"] if case["use_history"] else []
            prompt = template.encode_prompt(tokenizer, messages_of(history, example["prompt"]))
            answer = template.encode_answer(tokenizer, example["response"])
            cut = len(prompt) > case["max_source_length"] or len(answer) > case["max_target_length"]
            odd = (case["use_history"] and not history) or "[MASK]" in example["prompt"]
            if cut or (version == "chatglm" and odd):
                continue
            row, labels = case["train_input_ids"][place], case["train_labels"][place]
            length = len(prompt) + len(answer)
            assert prompt + answer == row[:length]
            assert set(row[length:]) <= {pad}
            learned = [label for label in labels if label != -100]
            assert learned == ([tokenizer.bos_token_id, *answer] if version == "chatglm" else answer)
            padded = case["eval_input_ids"][place]
            assert padded == [pad] * (len(padded) - len(prompt)) + prompt
            compared += 1
    assert compared >= 6


def test_the_saved_chat_template_gives_the_tokens_of_training(tokenizer, template, shared_dir, tmp_path):
    template.save(tmp_path, tokenizer)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    version = tokenizer.chatglm_version
    texts = ["两个\n\n换行", " space in front", "behind ", "  two  spaces", "tab\tsop eop", "x", ""]
    dialogues = [ASK, DIALOGUE, [SYSTEM, *ASK], [SYSTEM, *DIALOGUE], [DIALOGUE[0], *DIALOGUE]]
    dialogues += [[turn | {"content": text} for turn in DIALOGUE] for text in texts]
    if version == "chatglm3":
        dialogues += [
            [*case["history"], {"role": case["role"], "content": case["query"]}]
            for case in golden(shared_dir, version, "prompts")["chat_inputs"]
        ]
    for messages in dialogues:
        ours = template.encode_prompt(tokenizer, messages)
        assert again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ours
    whole = again.apply_chat_template(DIALOGUE, add_generation_prompt=True, return_tensors="pt")
    assert whole["input_ids"].tolist() == [template.encode_prompt(tokenizer, DIALOGUE)]
    with pytest.raises(Exception, match="no role"):
        again.apply_chat_template([{"role": "narrator", "content": "x"}, *ASK])


# --- what our template adds -------------------------------------------------------------------------------------------


def test_the_tokenizer_decides_the_form(tokenizer, template):
    version = tokenizer.chatglm_version
    assert template.kind == version
    assert (template.stop_token_ids, template.prefix_ids, template.suffix_ids) == FRAMES[version]
    assert template.frame_length == {"chatglm": 2, "chatglm2": 2, "chatglm3": 3}[version]


def test_no_text_becomes_a_control_token(tokenizer, template):
    """In the original of ChatGLM-6B, a question with <sop> in it moves the start of the answer."""
    frame = {*template.prefix_ids, *template.suffix_ids}
    bare = template.encode_prompt(tokenizer, DIALOGUE)
    count = sum(token in tokenizer.control_ids for token in bare)
    for text in [*NAMES, "".join(NAMES), " ".join(NAMES), "a [MASK] b<eop>"]:
        attack = [SYSTEM | {"content": text}, *(turn | {"content": turn["content"] + text} for turn in DIALOGUE)]
        ids = template.encode_prompt(tokenizer, attack)
        found = [token for token in ids if token in tokenizer.control_ids]
        assert len(found) == count + (tokenizer.chatglm_version == "chatglm3"), text  # one more role, for the system
        assert all(ids.count(token) == bare.count(token) for token in frame)
        answer = template.encode_answer(tokenizer, text)
        assert [token for token in answer if token in tokenizer.control_ids] == [template.end_token_id]


def test_what_a_random_network_writes_decodes_without_control_tokens(tokenizer, template):
    ids = template.encode_answer(tokenizer, "好 good")[:-1]
    noise = sorted(tokenizer.control_ids - set(template.stop_token_ids))
    noise += range(len(tokenizer), len(tokenizer) + 180)
    assert template.decode_answer(tokenizer, [*noise, *ids, *noise]) == "好 good"
    assert template.decode_answer(tokenizer, noise) == ""
    for stop in template.stop_token_ids:
        assert template.decode_answer(tokenizer, [*ids, stop, *ids]) == "好 good"


def test_a_system_message_goes_in_front_of_the_first_question(tokenizers):
    for version in ("chatglm", "chatglm2"):
        tokenizer = tokenizers[version]
        template = load_template(None, tokenizer)
        for messages in (ASK, DIALOGUE):
            joined = [{"role": "user", "content": "Be brief.\n" + messages[0]["content"]}, *messages[1:]]
            found = template.encode_prompt(tokenizer, [SYSTEM, *messages])
            assert found == template.encode_prompt(tokenizer, joined) != template.encode_prompt(tokenizer, messages)
    tokenizer = tokenizers["chatglm3"]  # has a role for it
    template = load_template(None, tokenizer)
    assert tokenizer.decode(template.encode_prompt(tokenizer, [SYSTEM, *ASK])) == (
        "[gMASK]sop<|system|> \n Be brief.<|user|> \n What is 2+2?<|assistant|>"
    )


def test_dialogues_that_cannot_be_written_are_refused(tokenizer, template):
    with pytest.raises(UserError, match="'tool'"):
        template.encode_prompt(tokenizer, [{"role": "tool", "content": "x"}, *ASK])
    for messages in (DIALOGUE[:2], []):
        with pytest.raises(UserError, match="must end with"):
            template.encode_prompt(tokenizer, messages)


def test_a_saved_template_must_be_the_tokenizer_s(tokenizer, template, tmp_path):
    template.save(tmp_path, tokenizer)
    for other in {*CHATGLM, "human_assistant"} - {template.kind}:
        change_json(tmp_path / FILE_NAME, kind=other)
        with pytest.raises(UserError, match=template.kind):
            load_template(tmp_path, tokenizer)
    change_json(tmp_path / FILE_NAME, kind=template.kind, stop_token_ids=[1])
    with pytest.raises(UserError, match="not ChatGLM's"):
        load_template(tmp_path, tiny_tokenizer("llama"))


def test_templates_saved_before_chatglm_was_supported_still_read(tmp_path):
    tokenizer = tiny_tokenizer("llama")
    template = load_template(None, tokenizer)
    (tmp_path / FILE_NAME).write_text(json.dumps({"format": 1, **asdict(template)}))
    change_json(tmp_path / FILE_NAME, suffix_ids=None)
    assert load_template(tmp_path, tokenizer) == template
    assert template.suffix_ids == () and template.frame_length == 0
    assert Template("human_assistant", (1,), prefix_ids=(7,)).frame_length == 0
