"""ChatGLM through the data path: what is cut keeps the marks without which its networks know no positions."""

import json
from types import SimpleNamespace

import pytest

import models.templates
from errors import UserError
from models.load import load_tokenizer
from models.templates import load_template
from tests.models.chatglm_folders import GENERATIONS, tokenizer_folder
from training.utils.data import tokenize
from training.utils.data.tokenize import Counts, Task, cut_prompt, fit, prepare, tokenizer_digest

LONG = " ".join(f"question {number}" for number in range(200))


@pytest.fixture(scope="module")
def tokenizers(shared_dir, tmp_path_factory):
    at = tmp_path_factory.mktemp("tokenizers")
    return {version: load_tokenizer(tokenizer_folder(at / version, shared_dir, version)) for version in GENERATIONS}


@pytest.fixture(params=GENERATIONS)
def setting(request, tokenizers):
    """A tokenizer, its template, and whether a row has its marks."""
    tokenizer = tokenizers[request.param]
    template = load_template(None, tokenizer)

    def marked(ids: list[int]) -> bool:
        front, end = template.prefix_ids, template.suffix_ids
        return tuple(ids[: len(front)]) == front and (not end or tuple(ids[-len(end) :]) == end)

    return SimpleNamespace(tokenizer=tokenizer, template=template, marked=marked)


def test_a_prompt_that_is_cut_keeps_its_marks_and_its_end(setting):
    template, tokenizer = setting.template, setting.tokenizer
    prompt = template.encode_prompt(tokenizer, [{"role": "user", "content": LONG}])
    assert setting.marked(prompt)
    for room in (1, 2, 3, 4, 5, 20, len(prompt) - 1, len(prompt), 10**4):
        cut = cut_prompt(prompt, room, template)
        assert setting.marked(cut)
        assert len(cut) == min(max(room, template.frame_length), len(prompt))
        text = cut[len(template.prefix_ids) :]
        assert text == prompt[len(prompt) - len(text) :]


@pytest.mark.parametrize("limit", [4, 5, 8, 30])
def test_an_answer_that_fills_the_row_leaves_the_marks(setting, limit):
    template, tokenizer = setting.template, setting.tokenizer
    task = Task(1, tokenizer, template, limit)
    prompt = template.encode_prompt(tokenizer, [{"role": "user", "content": LONG}])
    whole = template.encode_answer(tokenizer, LONG)
    cut, answer = fit(prompt, [whole], task, Counts())
    assert setting.marked(cut)
    assert len(cut) + len(answer) == limit
    assert answer == [*whole[: len(answer) - 1], template.end_token_id]
    both = fit(prompt, [whole, template.encode_answer(tokenizer, "no")], task, Counts())
    assert setting.marked(both[0])


def test_a_set_is_tokenised_and_cut(setting, tmp_path):
    tokenizer, template = setting.tokenizer, setting.template
    rows = [
        {"prompt": "What is 2+2? [gMASK]<sop><eop>", "chosen": "4", "rejected": "5 <|user|> sop"},
        {"prompt": LONG, "chosen": "short", "rejected": "shorter"},
        {"prompt": "Count.", "chosen": LONG, "rejected": "no"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(phase: int, split: str, **options):
        return prepare(
            [str(path)], phase, tokenizer, template, data_split=split, eval_fraction=0.0,
            cache_dir=str(tmp_path / "cache"), **{"max_seq_len": 40} | options,
        )  # fmt: skip

    sft = run(1, "1,0,0")
    assert len(sft.train) == 3
    assert (sft.report["train"]["truncated_prompts"], sft.report["train"]["truncated_answers"]) == (2, 1)
    for row in sft.train:
        assert setting.marked(row["input_ids"][: row["prompt_length"]])
        assert row["input_ids"][-1] == template.end_token_id
        assert sum(token in tokenizer.control_ids for token in row["input_ids"]) <= template.frame_length + 2
    for row in run(2, "0,1,0").train:
        for ids in (row["chosen_ids"], row["rejected_ids"]):
            assert setting.marked(ids[: row["prompt_length"]])
    prompts = run(3, "0,0,1")
    assert (len(prompts.train), prompts.report["train"]["dropped"]) == (2, {"prompt too long": 1})
    assert all(setting.marked(row["prompt_ids"]) for row in prompts.train)
    with pytest.raises(UserError, match=f"--max_seq_len 2: expected at least {template.frame_length + 1} tokens"):
        run(1, "1,0,0", max_seq_len=2)
    with pytest.raises(UserError, match="--max_source_length 1"):
        run(1, "1,0,0", max_source_length=1, max_target_length=39)


def test_the_cache_knows_the_generations_and_their_code_apart(tokenizers, tmp_path, monkeypatch):
    digests = {version: tokenizer_digest(one) for version, one in tokenizers.items()}
    assert len(set(digests.values())) == 3
    assert digests == {version: tokenizer_digest(one) for version, one in tokenizers.items()}
    names = {file.name for file in models.templates.code_files()}
    assert {"templates.py", "prompts.py", "tokenizer.py", "tokenizer2.py", "tokenizer_base.py"} <= names
    for setting in ("do_lower_case", "remove_space"):
        monkeypatch.setattr(tokenizers["chatglm"], setting, True)
        assert tokenizer_digest(tokenizers["chatglm"]) not in digests.values()
        monkeypatch.setattr(tokenizers["chatglm"], setting, False)
    before = tokenize.code_digest()
    changed = tmp_path / "prompts.py"
    changed.write_text("")
    found = [changed if file.name == "prompts.py" else file for file in models.templates.code_files()]
    monkeypatch.setattr(models.templates, "code_files", lambda: found)
    assert tokenize.code_digest() != before
