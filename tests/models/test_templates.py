"""One template for every step: prompt and answer join without a seam, and everybody stops at the same tokens."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from errors import UserError
from models.templates import FILE_NAME, encode_texts, load_template
from models.tokenizer import load_tokenizer
from tests.tiny import TEXT, tiny_tokenizer

ASK = [{"role": "user", "content": "What is 2+2?"}]
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I bake bread?"},
    {"role": "assistant", "content": "Mix flour and water."},
    {"role": "user", "content": "怎么做面包？"},
]
ANSWERS = ("The capital of France is Paris.", "把面粉、水混合。", "", "x", "1. one\n2. two", "a  b", "(maybe)")
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN_CHAT = (
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
FORGETFUL_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"  # no opening for the answer
)
THINKING_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
STRICT_CHAT = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}" + LLAMA2_CHAT


def sentencepiece_like(chat: str | None = None) -> PreTrainedTokenizerFast:
    """LLaMA 2's way: a space before every text, spaces as a letter of their own, bos in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = sorted(set("".join(TEXT + list(ANSWERS) + ["[INST]\n\n?+=<|>#_/"])) - {" "})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    words = [f"▁{word}" for text in TEXT for word in text.split()]  # pieces do not reach over a space
    tokenizer.normalizer, kept = None, tokenizer.normalizer
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.normalizer = kept
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = chat
    return fast


def first_space_only() -> PreTrainedTokenizerFast:
    """As sentencepiece_like; a space goes before the first text of a string only, not behind special tokens."""
    fast = sentencepiece_like()
    rust = fast.backend_tokenizer
    rust.normalizer = None
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return fast


def with_chat(family: str, chat: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = chat
    return tokenizer


# of mistral, qwen3, gpt_neox and glm the tokenizers are those of llama, qwen2, gpt2 and glm4
TOKENIZERS = {name: partial(tiny_tokenizer, name) for name in ("opt", "bloom", "llama", "qwen2", "gpt2", "glm4")} | {
    "sentencepiece": sentencepiece_like,
    "first space only": first_space_only,
    "sentencepiece chat": partial(sentencepiece_like, LLAMA2_CHAT),
    "forgetful chat": partial(with_chat, "llama", FORGETFUL_CHAT),
    "thinking chat": partial(with_chat, "llama", THINKING_CHAT),
}
CHATGLMS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b")


@pytest.fixture(params=[*TOKENIZERS, *CHATGLMS])
def tokenizer(request):
    if request.param in TOKENIZERS:
        return TOKENIZERS[request.param]()
    return load_tokenizer(request.getfixturevalue("folder_of")(request.param))


# A reasoning template writes a thought before the answer and leaves it out of the history, on purpose. ChatGLM ends an
# answer in another way in the history.
@pytest.mark.parametrize("tokenizer", [name for name in TOKENIZERS if name != "thinking chat"], indirect=True)
def test_prompt_and_answer_are_how_the_next_turn_sees_them(tokenizer, request):
    template = load_template(None, tokenizer)
    messages = DIALOGUE if "sentencepiece chat" not in request.node.name else DIALOGUE[1:]
    for answer in filter(None, ANSWERS):
        joined = template.encode_prompt(tokenizer, messages) + template.encode_answer(tokenizer, answer)
        later = [*messages, {"role": "assistant", "content": answer}, *ASK]
        assert template.encode_prompt(tokenizer, later)[: len(joined)] == joined


def test_an_answer_decodes_to_itself_and_ends_in_a_stop_token(tokenizer):
    template = load_template(None, tokenizer)
    for answer in ANSWERS:
        ids = template.encode_answer(tokenizer, answer)
        assert ids[-1] == template.end_token_id == template.stop_token_ids[0]
        assert tokenizer.eos_token_id in template.stop_token_ids
        assert template.decode_answer(tokenizer, ids) == answer
        assert template.decode_answer(tokenizer, [*ids, *ids]) == answer  # nothing behind the first stop token is read
        assert template.decode_answer(tokenizer, ids[:-1]) == answer


def test_many_at_once_are_the_same_as_one_by_one(tokenizer):
    template = load_template(None, tokenizer)
    dialogues = [ASK, DIALOGUE[1:], DIALOGUE[1:2], DIALOGUE[1:]]
    assert template.encode_prompts(tokenizer, dialogues) == [template.encode_prompt(tokenizer, one) for one in dialogues]
    assert template.encode_answers(tokenizer, ANSWERS) == [template.encode_answer(tokenizer, one) for one in ANSWERS]
    assert template.encode_prompts(tokenizer, []) == template.encode_answers(tokenizer, []) == []


@pytest.mark.parametrize("literal", [False, True])
def test_texts_become_the_tokens_that_the_tokenizer_gives(tokenizer, literal):
    """Also after calls of others that cut and pad."""
    texts = ["Hello, world!  two  blanks\n\n", "", "你好，三步。", " lead", f"{tokenizer.eos_token} in the middle"]
    expected = tokenizer(texts, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
    tokenizer("one two three four", truncation=True, max_length=2, padding=tokenizer.pad_token is not None and "max_length")
    assert encode_texts(tokenizer, texts, literal=literal) == expected


def test_it_reads_back_as_it_was_saved(tokenizer, tmp_path):
    template = load_template(None, tokenizer)
    before = tokenizer.chat_template
    template.save(tmp_path, tokenizer)
    assert tokenizer.chat_template == before
    again = AutoTokenizer.from_pretrained(tmp_path)
    read = load_template(tmp_path, again)
    assert replace(read, prompt_suffix=template.prompt_suffix) == template  # the suffix stands in the chat template now
    assert read.encode_prompt(again, ASK) == template.encode_prompt(tokenizer, ASK)
    assert set(json.loads((tmp_path / FILE_NAME).read_text())) == {"format", "kind", "stop_token_ids"}
    read.save(tmp_path / "again", again)
    jinja = "chat_template.jinja"
    assert (tmp_path / "again" / jinja).read_text() == (tmp_path / jinja).read_text()


def test_the_saved_chat_template_gives_the_tokens_of_training(tokenizer, request, tmp_path, caplog):
    """What transformers and servers send to the model: a plain apply_chat_template."""
    template = load_template(None, tokenizer)
    template.save(tmp_path, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    system = DIALOGUE[:1] if "sentencepiece chat" not in request.node.name else []
    texts = [*filter(None, ANSWERS), "a\n\nb ", " c", "tab\t{{ x }} {% y %} sop"]
    for text in texts:
        answered = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        for messages in (ASK, system + ASK, DIALOGUE[1:], [*system, *answered, *answered, *ASK]):
            ours = template.encode_prompt(tokenizer, messages)
            assert again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ours
            assert load_template(tmp_path, again).encode_prompt(again, messages) == ours
    assert not caplog.records


def test_it_says_so_where_the_chat_template_cannot_give_the_tokens_of_training(tmp_path, caplog):
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_special_tokens({"eos_token": AddedToken("</end>", rstrip=True)})  # takes the line breaks behind it
    load_template(None, tokenizer).save(tmp_path, tokenizer)
    assert "other programs" in caplog.text


def test_folders_saved_with_every_field_still_open(tmp_path):
    for make in TOKENIZERS.values():
        tokenizer = make()
        template = load_template(None, tokenizer)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / FILE_NAME).write_text(json.dumps({"format": 1, **asdict(template)}))
        assert load_template(tmp_path, tokenizer) == template


@pytest.mark.parametrize("tokenizer", TOKENIZERS, indirect=True)
def test_a_text_that_spells_a_special_token_does_not_become_it(tokenizer):
    """An answer would end in its middle, and a prompt of the Human/Assistant form hold an end that nobody wrote."""
    template = load_template(None, tokenizer)
    for special in tokenizer.all_special_tokens:
        text = f"The mark {special} ends it."
        ids = template.encode_answer(tokenizer, text)
        assert set(ids[:-1]).isdisjoint(tokenizer.all_special_ids)
        assert template.decode_answer(tokenizer, ids) == text
        assert template.encode_answers(tokenizer, ["x", text])[1] == ids
        if template.kind == "human_assistant":
            prompt = template.encode_prompt(tokenizer, [{"role": "user", "content": text}])
            assert set(prompt[len(template.prefix_ids) :]).isdisjoint(tokenizer.all_special_ids)
            later = [*ASK, {"role": "assistant", "content": text}, *ASK]
            joined = template.encode_prompt(tokenizer, ASK) + ids
            assert template.encode_prompt(tokenizer, later)[: len(joined)] == joined
        else:  # the template's own marks stay what they are
            assert set(template.encode_prompt(tokenizer, ASK)) & set(tokenizer.all_special_ids)


# --- what exactly is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bos", "eos"),
    [("opt", "</s>", "</s>"), ("llama", "<s>", "</s>"), ("bloom", "", "</s>"), ("gpt2", "", "<|endoftext|>")],
)
def test_the_human_assistant_form_of_deepspeed_chat(family, bos, eos):
    tokenizer = tiny_tokenizer(family)
    template = load_template(None, tokenizer)
    assert template.kind == "human_assistant"
    assert template.stop_token_ids == (tokenizer.eos_token_id,)
    ids = template.encode_prompt(tokenizer, DIALOGUE) + template.encode_answer(tokenizer, "Yes.")
    assert tokenizer.decode(ids) == (
        f"{bos}Be brief.\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour and water.{eos}"
        f"\n\nHuman: 怎么做面包？\n\nAssistant: Yes.{eos}"
    )


def base_qwen() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.eos_token = "<|endoftext|>"  # as in the base checkpoints of Qwen2
    return tokenizer


# tokenizer, a question with its answer, stop tokens
CHATML = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
FORGETFUL = "<|user|>\nWhat is 2+2?</s>\n<|assistant|>\n4</s>"
WRITTEN = {
    "chatml": (TOKENIZERS["qwen2"], CHATML, ["<|im_end|>"]),
    "end of turn is not eos": (base_qwen, CHATML, ["<|im_end|>", "<|endoftext|>"]),
    "the next turn's mark ends": (
        TOKENIZERS["glm4"], "[gMASK]<sop><|user|>\nWhat is 2+2?<|assistant|>\n4<|user|>", ["<|user|>", "<|endoftext|>"]
    ),
    "plain text": (partial(with_chat, "llama", PLAIN_CHAT), "### user: What is 2+2?\n### assistant: 4</s>", ["</s>"]),
    "what opens an answer": (TOKENIZERS["forgetful chat"], FORGETFUL, ["</s>"]),
    "a thought opens it": (TOKENIZERS["thinking chat"], FORGETFUL.replace("4", "<think>\n\n</think>\n\n4"), ["</s>"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_chat_template_writes(name):
    make, text, stops = WRITTEN[name]
    tokenizer = make()
    template = load_template(None, tokenizer)
    assert template.kind == "chat_template"
    assert tokenizer.convert_ids_to_tokens(list(template.stop_token_ids)) == stops
    prompt, answer = template.encode_prompt(tokenizer, ASK), template.encode_answer(tokenizer, "4")
    assert tokenizer.decode(prompt + answer) == text
    assert tokenizer.decode(answer) == "4" + stops[0]  # what opens an answer belongs to the prompt


def test_space_between_prompt_answer_and_end_token_is_kept():
    tokenizer = sentencepiece_like(LLAMA2_CHAT)
    template = load_template(None, tokenizer)
    assert (template.answer_prefix, template.answer_suffix, template.prefix_ids) == (" ", " ", (1,))
    whole = tokenizer("<s>[INST] What is 2+2? [/INST] The capital </s>", add_special_tokens=False)["input_ids"]
    assert template.encode_prompt(tokenizer, ASK) + template.encode_answer(tokenizer, "The capital") == whole


def test_sentencepiece_answers_begin_with_one_space():
    tokenizer = sentencepiece_like()
    template = load_template(None, tokenizer)
    whole = tokenizer("\n\nHuman: What is 2+2?\n\nAssistant: The capital")["input_ids"]
    assert template.encode_prompt(tokenizer, ASK) + template.encode_answer(tokenizer, "The capital")[:-1] == whole


# --- saved with the checkpoint ----------------------------------------------------------------------------------------


def test_what_is_saved_wins_over_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer("gpt2")
    saved = load_template(None, tokenizer)
    saved.save(tmp_path, tokenizer)
    tokenizer.chat_template = PLAIN_CHAT
    assert load_template(tmp_path, tokenizer) == saved
    assert load_template(tmp_path / "elsewhere", tokenizer).kind == "chat_template"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "damaged"),
        ({"kind": "rot13"}, "damaged"),
        ({"format": 3}, "damaged"),
        ({"stop_token_ids": []}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"stop_token_ids": [10**6]}, "knows only"),
        ({"kind": "chat_template"}, "chat_template.jinja"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, change, message):
    tokenizer = tiny_tokenizer("gpt2")
    load_template(None, tokenizer).save(tmp_path, tokenizer)
    file = tmp_path / FILE_NAME
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_template(tmp_path, tokenizer)
    assert str(file) in str(error.value)


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        load_template(None, tokenizer)


def test_a_dialogue_that_the_chat_template_refuses_is_named():
    tokenizer = with_chat("llama", STRICT_CHAT)
    template = load_template(None, tokenizer)
    with pytest.raises(UserError, match="system, user, assistant, user: System role not supported"):
        template.encode_prompt(tokenizer, DIALOGUE)
