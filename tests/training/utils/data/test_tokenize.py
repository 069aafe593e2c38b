"""Records become tokens; what is cut keeps its end, its question and ChatGLM's marks; what is dropped is counted."""

import random
from itertools import product
from types import SimpleNamespace

import pytest

from errors import UserError
from models import templates
from models.templates import load_template
from tests.models.chatglm_folders import GENERATIONS
from tests.tiny import tiny_tokenizer
from tests.training.utils.data.rows import pairs, run, turns, write_lines
from training.utils.data import tokenize
from training.utils.data.tokenize import Counts, Limits, cut_prompt, fit, tokenizer_digest

LONG = " ".join(f"question {number}" for number in range(200))


def columns(rows):
    """Return the rows by column."""
    return {name: rows[name] for name in rows[0]}


@pytest.mark.fast
def test_the_three_phases_hold_what_the_template_writes(tmp_path, tokenizer):
    rows = [row | ({"margin": 0.5} if number == 0 else {}) for number, row in enumerate(pairs(7))]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    template = load_template(None, tokenizer)
    prompts = [template.encode_prompt(tokenizer, turns(f"What is {n}+1?")) for n in range(7)]
    chosen, rejected = (
        [prompt + template.encode_answer(tokenizer, row[kind]) for prompt, row in zip(prompts, rows, strict=True)]
        for kind in ("chosen", "rejected")
    )
    prompt_lengths = [len(prompt) for prompt in prompts]
    assert columns(run(path, 1, tokenizer).train) == {
        "input_ids": chosen,
        "prompt_length": prompt_lengths,
        "between": [[]] * 7,
        "length": [len(ids) for ids in chosen],
    }
    assert columns(run(path, 2, tokenizer).train) == {
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "prompt_length": prompt_lengths,
        "margin": [0.5] + 6 * [None],
        "length": [len(good) + len(bad) for good, bad in zip(chosen, rejected, strict=True)],
        "padded_length": [2 * max(len(good), len(bad)) for good, bad in zip(chosen, rejected, strict=True)],
    }
    assert columns(run(path, 3, tokenizer).train) == {"prompt_ids": prompts, "length": prompt_lengths}


# --- what is too long -------------------------------------------------------------------------------------------------

# bos 1 opens every text of LLaMA's, end token 2 every answer.
APART = {
    "short": ([1, 10, 11, 12], [20, 21, 2], ([1, 10, 11, 12], [20, 21, 2]), (0, 0)),
    "the end of the prompt stays": ([1, 10, 11, 12, 13, 14], [20, 2], ([1, 12, 13, 14], [20, 2]), (1, 0)),
    "a short prompt gives no space away": ([1, 10], [20, 21, 22, 23, 2], ([1, 10], [20, 21, 2]), (0, 1)),
    "both": ([1, 10, 11, 12, 13, 14], [20, 21, 22, 2], ([1, 12, 13, 14], [20, 21, 2]), (1, 1)),
    "a prompt without bos": ([10, 11, 12, 13, 14], [20, 2], ([11, 12, 13, 14], [20, 2]), (1, 0)),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", APART)
def test_prompt_and_answer_are_cut_apart(name, llama):
    prompt, answer, expected, cut = APART[name]
    template = load_template(None, llama)
    assert (template.prefix_ids, template.end_token_id) == ((1,), 2)
    counts = Counts()
    assert fit(prompt, [answer], Limits(7, 4, 3), template, counts) == expected
    assert (counts.truncated_prompts, counts.truncated_answers) == cut


@pytest.mark.fast
def test_the_oldest_part_of_the_prompt_goes_first_and_the_answer_stays_whole(tmp_path, tokenizer):
    """Cut on the right, an example lost its answer and its end token."""
    words = " ".join(map(str, range(400))) + " Why?"
    row = {"prompt": words, "chosen": "Because.", "rejected": "Never, because of the rain."}
    path = write_lines(tmp_path / "long.jsonl", [row])
    template = load_template(None, tokenizer)
    prompt = template.encode_prompt(tokenizer, turns(words))
    answer, rejected = (template.encode_answer(tokenizer, row[kind]) for kind in ("chosen", "rejected"))
    opening = list(template.prefix_ids)  # bos of LLaMA, nothing for Qwen

    def cut(length):
        return opening + prompt[len(prompt) - length + len(opening) :]

    data = run(path, 1, tokenizer, max_seq_len=60)
    assert data.train[0]["input_ids"] == cut(60 - len(answer)) + answer
    assert (data.report["train"]["truncated_prompts"], data.report["train"]["truncated_answers"]) == (1, 0)
    pair = run(path, 2, tokenizer, max_seq_len=60).train[0]
    shared = cut(60 - len(rejected))
    assert (pair["chosen_ids"], pair["rejected_ids"]) == (shared + answer, shared + rejected)


@pytest.mark.fast
def test_an_answer_that_is_too_long_alone_keeps_its_end_token(tmp_path, tokenizer):
    path = write_lines(tmp_path / "long.jsonl", [{"prompt": "Count.", "chosen": LONG}])
    template = load_template(None, tokenizer)
    prompt, answer = template.encode_prompt(tokenizer, turns("Count.")), template.encode_answer(tokenizer, LONG)
    kept = min(len(prompt), 40 // 4)
    data = run(path, 1, tokenizer, overview_folder=str(tmp_path), max_seq_len=40)
    row = data.train[0]
    assert (row["length"], row["prompt_length"]) == (40, kept)
    assert row["input_ids"][kept:] == [*answer[: 40 - kept - 1], template.end_token_id]
    assert row["input_ids"][kept - 5 : kept] == prompt[-5:]
    assert data.report["train"]["truncated_answers"] == 1
    assert "of --max_seq_len 40 each leaves 10 tokens of its prompt" in (tmp_path / "data.txt").read_text()
    whole = run(path, 1, tokenizer, max_seq_len=4 * len(prompt)).train[0]["input_ids"]
    assert whole[: len(prompt)] == prompt and len(whole) == 4 * len(prompt)


@pytest.mark.fast
def test_an_answer_is_cut_only_where_its_prompt_would_lose_the_last_quarter(llama):
    """Limits of 40 tokens: for each length of prompt and answer, what stays of the two."""
    template = load_template(None, llama)
    for asked, said in product((3, 10, 30, 90), (5, 29, 30, 31, 39, 40, 200)):
        counts = Counts()
        prompt, answer = fit([1] + [7] * (asked - 1), [[8] * (said - 1) + [2]], Limits(40), template, counts)
        assert len(prompt) + len(answer) == min(40, asked + said) and answer[-1] == 2
        assert len(answer) == min(said, 40 - min(asked, 10))
        assert (counts.truncated_prompts, counts.truncated_answers) == (len(prompt) < asked, len(answer) < said)


@pytest.mark.fast
def test_a_long_dialogue_keeps_its_question(tmp_path, llama):
    """Cut at the end, a prompt of several turns lost the question."""
    template = load_template(None, llama)
    asked, said, answer = ("What is this? " * 20).strip(), ("A thing. " * 20).strip(), ("Because. " * 30).strip()
    rows = [{"prompt": "Why?", "response": answer, "history": [[asked, said]]}]
    path = write_lines(tmp_path / "data.jsonl", rows)
    data = run(path, 1, llama, max_seq_len=72, max_source_length=40, max_target_length=32)
    assert [(row["prompt_length"], row["length"]) for row in data.train] == [(40, 72)] * 2
    prompt = template.encode_prompt(llama, turns(asked, said, "Why?"))
    assert [1, *prompt[-39:], *template.encode_answer(llama, answer)[:31], 2] in data.train["input_ids"][:]
    assert data.report["train"]["truncated_prompts"] == data.report["train"]["truncated_answers"] == 2


SYSTEM = "system: Be kind, be brief, and never say that you do not know."


@pytest.mark.fast
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", *GENERATIONS])
def test_a_system_text_stays_whole(family, phase, tmp_path, tokenizers, request):
    """Oldest whole turns go first, then the beginning of the newest question; without space for that the record is left out."""
    tokenizer = tokenizers[family] if family in tokenizers else request.getfixturevalue("chatglm_tokenizers")[family]
    template = load_template(None, tokenizer)
    system, *rest = turns(SYSTEM, *(f"{word} number {n}?" for n in range(4) for word in ("Which", "That is")), "And the last?")
    pair = {"chosen": "Four.", "rejected": "No idea at all."}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [system, *rest], **pair}])
    prompts = [template.encode_prompt(tokenizer, [system, *rest[start:]]) for start in range(0, 9, 2)]
    taken = max(len(template.encode_answer(tokenizer, pair[name])) for name in (("chosen", "rejected")[:phase]))

    def prompt_of(limit, path=path):
        """The prompt that is kept, and what became of the record."""
        data = run([path, other], phase, tokenizer, max_seq_len=limit + taken)
        row = data.train[0] if len(data.train) > 1 else {"prompt_length": 0}
        ids = row.get("input_ids" if phase == 1 else "chosen_ids", [])[: row["prompt_length"]]
        return ids, data.report["train"]

    other = write_lines(tmp_path / "b.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "z"}])
    for prompt, longer in zip(prompts[1:], prompts, strict=False):
        for limit in (len(prompt), len(longer) - 1):
            found, report = prompt_of(limit)
            assert found == prompt and report["truncated_prompts"] == 1
    question = " ".join(map(str, range(100))) + " Why?"
    path = write_lines(tmp_path / "c.jsonl", [{"messages": [system, {"role": "user", "content": question}], **pair}])
    whole, limit = template.encode_prompt(tokenizer, [system, {"role": "user", "content": question}]), len(prompts[-1]) + 20
    found, _ = prompt_of(limit, path)
    tail = next(n for n in range(limit) if found[limit - n - 1] != whole[len(whole) - n - 1])
    assert len(found) == limit and found[: limit - tail] == whole[: limit - tail], "nothing but the middle is missing"
    assert SYSTEM[8:] in tokenizer.decode(found) and tokenizer.decode(found).count("Why?") == 1
    found, report = prompt_of(len(prompts[-1]) // 2)
    assert not found and report["dropped"] == {"system text too long": 1}


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_what_is_cut_away_is_not_tokenised(tmp_path, tokenizer, monkeypatch, phase):
    numbers = " ".join(map(str, range(3000)))
    long = {"prompt": f"Why? {numbers}", "chosen": numbers, "rejected": numbers[5:]}
    dialogue = turns("system: S", numbers, numbers, "So?")
    rows = [*pairs(2), long, long | {"prompt": "Why not?"}, {"prompt": dialogue, "chosen": "Yes.", "rejected": "No."}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    read, encode = [], templates.encode_texts
    monkeypatch.setattr(templates, "encode_texts", lambda own, texts, **more: read.extend(texts) or encode(own, texts, **more))
    cut = run(path, phase, tokenizer, max_seq_len=40)
    assert read and max(map(len, read)) < len(numbers)
    monkeypatch.setattr(tokenize, "cut_texts", lambda record, most: record)
    whole = run(path, phase, tokenizer, max_seq_len=40, cache_dir=str(tmp_path / "other"))
    assert len(cut.train) and (cut.train.to_list(), cut.report) == (whole.train.to_list(), whole.report)


# --- what is dropped --------------------------------------------------------------------------------------------------

REFUSING = (
    "{{ raise_exception('no system') if messages[0].role == 'system' }}{% for m in messages %}{{ m.content }}</s>"
    "{% endfor %}"
)
COUNTING = " ".join(map(str, range(200)))
DROPPED = {
    "equal answers": (2, [*pairs(2), {"prompt": "Say a.", "chosen": "a", "rejected": "a"}], "chosen equals rejected"),
    "equal once cut": (
        2,
        [*pairs(2), {"prompt": "Count.", "chosen": COUNTING + " yes", "rejected": COUNTING + " no"}],
        "chosen equals rejected after truncation",
    ),
    "long prompts": (3, [{"prompt": "Short?"}, {"prompt": LONG}, {"prompt": "Also short?"}], "prompt too long"),
    "no answer": (1, [{"messages": turns("Q")}, {"messages": turns("Q", "A")}, {"messages": turns("R", "A")}], "without an answer"),
    "refused": (
        1,
        [{"messages": turns("Q", "A")}, {"messages": turns("system: S", "Q", "A")}, {"messages": turns("R", "A")}],
        "refused by the chat template",
    ),
}


@pytest.mark.detail(44)
@pytest.mark.fast
@pytest.mark.ppo
@pytest.mark.parametrize("name", DROPPED)
def test_what_is_of_no_use_is_dropped_and_counted(name, tmp_path, llama):
    phase, rows, reason = DROPPED[name]
    if name == "refused":
        llama = tiny_tokenizer("llama")
        llama.chat_template = REFUSING
    data = run(write_lines(tmp_path / "rows.jsonl", rows), phase, llama, max_seq_len=50)
    counts = data.report["train"]
    assert (counts["records"], counts["kept"], len(data.train), counts["dropped"]) == (3, 2, 2, {reason: 1})


# --- ChatGLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=GENERATIONS)
def glm(request, chatglm_tokenizers):
    """A tokenizer, its template, and whether ids have the marks without which the network knows no positions."""
    tokenizer = chatglm_tokenizers[request.param]
    template = load_template(None, tokenizer)

    def marked(ids: list[int]) -> bool:
        front, end = template.prefix_ids, template.suffix_ids
        return tuple(ids[: len(front)]) == front and (not end or tuple(ids[-len(end) :]) == end)

    return SimpleNamespace(tokenizer=tokenizer, template=template, marked=marked)


def test_chatglm_keeps_its_marks_however_short_it_is_cut(glm):
    template, tokenizer = glm.template, glm.tokenizer
    prompt = template.encode_prompt(tokenizer, turns(LONG))
    for length in (1, 2, 3, 4, 5, 20, len(prompt) - 1, len(prompt), 10**4):
        cut = cut_prompt(prompt, length, template)
        assert glm.marked(cut)
        assert len(cut) == min(max(length, template.frame_length), len(prompt))
        text = cut[len(template.prefix_ids) :]
        assert text == prompt[len(prompt) - len(text) :]
    whole, short = template.encode_answer(tokenizer, LONG), template.encode_answer(tokenizer, "no")
    for length in (4, 5, 8, 30):
        cut, answer = fit(prompt, [whole], Limits(length), template, Counts())
        assert glm.marked(cut) and len(cut) + len(answer) == length
        assert answer == [*whole[: len(answer) - 1], template.end_token_id]
        assert glm.marked(fit(prompt, [whole, short], Limits(length), template, Counts())[0])


def test_a_set_of_chatglm_is_tokenised_and_cut(glm, tmp_path):
    tokenizer, template = glm.tokenizer, glm.template
    rows = [
        {"prompt": "What is 2+2? [gMASK]<sop><eop>", "chosen": "4", "rejected": "5 <|user|> sop"},
        {"prompt": LONG, "chosen": "short", "rejected": "shorter"},
        {"prompt": "Count.", "chosen": LONG, "rejected": "no"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    sft = run(path, 1, tokenizer, max_seq_len=40)
    assert len(sft.train) == 3
    long = len(template.encode_prompt(tokenizer, turns("Count."))) > 10
    assert (sft.report["train"]["truncated_prompts"], sft.report["train"]["truncated_answers"]) == (1 + long, 1)
    for row in sft.train:
        assert glm.marked(row["input_ids"][: row["prompt_length"]])
        assert row["input_ids"][-1] == template.end_token_id
        assert sum(token in tokenizer.control_ids for token in row["input_ids"]) <= template.frame_length + 2
    for row in run(path, 2, tokenizer, max_seq_len=40).train:
        assert all(glm.marked(row[kind][: row["prompt_length"]]) for kind in ("chosen_ids", "rejected_ids"))
    prompts = run(path, 3, tokenizer, max_seq_len=40)
    assert (len(prompts.train), prompts.report["train"]["dropped"]) == (2, {"prompt too long": 1})
    assert all(glm.marked(row["prompt_ids"]) for row in prompts.train)
    with pytest.raises(UserError, match=f"--max_seq_len 2: expected at least {template.frame_length + 1} tokens"):
        run(path, 1, tokenizer, max_seq_len=2)
    with pytest.raises(UserError, match="--max_source_length 1"):
        run(path, 1, tokenizer, max_source_length=1, max_target_length=39)


# --- the hash of a tokenizer ------------------------------------------------------------------------------------------


def test_the_digest_follows_what_a_tokenizer_does_not_where_it_lies_or_was_used(tmp_path, chatglm_tokenizers, monkeypatch):
    llama = tiny_tokenizer("llama")
    digest = tokenizer_digest(llama)
    llama(["a", "b c d"], padding=True, truncation=True, max_length=3)
    llama.save_pretrained(tmp_path / "tokenizer")
    again = type(llama).from_pretrained(tmp_path / "tokenizer")
    assert tokenizer_digest(llama) == tokenizer_digest(again) == digest
    others = {tokenizer_digest(tiny_tokenizer("llama", vocab_size=390)), digest}
    for one in chatglm_tokenizers.values():
        others.add(tokenizer_digest(one))
        assert tokenizer_digest(one) in others
    for setting in ("do_lower_case", "remove_space"):
        with monkeypatch.context() as patch:
            patch.setattr(chatglm_tokenizers["chatglm"], setting, True)
            others.add(tokenizer_digest(chatglm_tokenizers["chatglm"]))
    assert len(others) == 2 + 3 + 2


# --- real data --------------------------------------------------------------------------------------------------------


def test_real_preference_data_goes_through_all_phases(shared_dir, tokenizer):
    names = ("preference_en/rm_static_en_test.jsonl.gz", "preference_zh/rm_static_zh_test.jsonl.gz")
    paths, template = [shared_dir / "data" / name for name in names], load_template(None, tokenizer)
    for phase, column in ((1, "input_ids"), (2, "chosen_ids"), (3, "prompt_ids")):
        data = run(paths, phase, tokenizer, data_split="2,4,4", eval_fraction=0.1, max_seq_len=512)
        for split, dataset in (("train", data.train), ("eval", data.eval)):
            counts = data.report[split]
            assert counts["records"] == counts["kept"] + counts["joined"] + sum(counts["dropped"].values())
            assert len(dataset) == counts["kept"] > 0
            assert sum(dataset["length"]) == counts["tokens"]
        for row in random.Random(0).sample(data.train.to_list(), 30):
            assert len(row[column]) <= 512
            assert phase == 3 or row[column][-1] == template.end_token_id
