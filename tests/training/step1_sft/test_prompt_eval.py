"""prompt_eval: which prompts are asked, how answers stand side by side."""

import json
import subprocess
import unicodedata

import pytest

from errors import UserError
from models.load import load_tokenizer
from models.templates import load_template
from tests.launching import environment, start, succeed
from tests.tiny import tiny_checkpoint
from training.step1_sft.prompt_eval import PROMPTS, Answer, cut_prompt, read_prompts, side_by_side, summary, wrapped
from training.utils.flags.steps import PromptEvalArguments

MODULE = "training.step1_sft.prompt_eval"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Flags that name two tiny models of different families, so of different tokenizers and templates."""
    folder = tmp_path_factory.mktemp("models")
    baseline, finetuned = tiny_checkpoint(folder / "a", "llama"), tiny_checkpoint(folder / "b", "qwen2", seed=1)
    return ["--model_name_or_path_baseline", str(baseline), "--model_name_or_path_finetune", str(finetuned)]


def arguments(**changes) -> PromptEvalArguments:
    return PromptEvalArguments(model_name_or_path_baseline="a", model_name_or_path_finetune="b", **changes)


def test_greedy_answers_in_a_batch_equal_transformers_own_one_by_one(models, tmp_path):
    """The slow way: transformers' generate on each prompt alone, without padding."""
    import torch
    from transformers import AutoModelForCausalLM

    output = tmp_path / "answers.json"
    published = ["--num_beams", "1", "--num_beam_groups", "1", "--top_k", "4", "--penalty_alpha", "0.6"]
    ours = ["--language", "Chinese", "--max_new_tokens", "6", "--output", str(output)]
    shown = succeed(MODULE, [*models, *published, "--add_eot_token", *ours])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [row["prompt"][-1]["content"] for row in found["prompts"]] == PROMPTS["Chinese"]
    for name, path in (("baseline", models[1]), ("finetuned", models[3])):
        tokenizer = load_tokenizer(path)
        template = load_template(path, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        for row in found["prompts"]:
            ids = torch.tensor([template.encode_prompt(tokenizer, row["prompt"])])
            made = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=list(template.stop_token_ids),
                                  pad_token_id=tokenizer.pad_token_id)[0, ids.shape[1] :].tolist()  # fmt: skip
            (answer,) = row[name]
            assert answer["text"] == template.decode_answer(tokenizer, made)
            assert answer["tokens"] == len(made) and answer["ended"] == (made[-1] in template.stop_token_ids)
        assert f"{name:10}" in shown
    assert PROMPTS["Chinese"][0] in shown.replace("\n", "")


def test_several_answers_are_sampled_and_repeatable(models, tmp_path):
    answers = []
    for seed in ("1", "1", "2"):
        output = tmp_path / "answers.json"
        succeed(MODULE, [*models, "--num_return_sequences", "3", "--max_new_tokens", "8", "--seed", seed, "--output",
                         str(output)])  # fmt: skip
        rows = json.loads(output.read_text(encoding="utf-8"))["prompts"]
        answers.append([[answer["text"] for answer in row["baseline"]] for row in rows])
    assert answers[0] == answers[1] != answers[2]
    assert all(len(row) == 3 for row in answers[0]) and any(len(set(row)) > 1 for row in answers[0])


def test_six_prompts_of_each_language():
    assert all(len(set(prompts)) == 6 for prompts in PROMPTS.values())
    names = {character: unicodedata.name(character) for text in PROMPTS["Japanese"] for character in text}
    assert any("HIRAGANA" in name for name in names.values())


def test_prompts_of_a_file_and_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n", encoding="utf-8")
    assert [prompt[-1]["content"] for prompt in read_prompts(arguments(prompts=str(file)))] == ["one", "two"]
    file.write_bytes("first\r\nsec\u2028ond\r\n".encode("utf-8-sig"))
    assert [prompt[-1]["content"] for prompt in read_prompts(arguments(prompts=str(file)))] == ["first", "sec\u2028ond"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"question {n}", "a": "answer"}) + "\n" for n in range(9)))
    found = read_prompts(arguments(data_path=[str(data)], columns="prompt=q,response=a", num_prompts=4))
    assert [prompt[-1]["content"] for prompt in found] == [f"question {n}" for n in range(4)]
    with pytest.raises(UserError, match="leave one of them out"):
        read_prompts(arguments(prompts=str(file), data_path=[str(data)]))
    file.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_prompts(arguments(prompts=str(file)))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(arguments(prompts=str(tmp_path / "absent.txt")))


def test_a_long_prompt_loses_its_oldest_part(models):
    tokenizer = load_tokenizer(models[1])
    template = load_template(models[1], tokenizer)
    ids = template.encode_prompt(tokenizer, [{"role": "user", "content": "word " * 50 + "the end"}])
    cut = cut_prompt(ids, 20, template)
    assert len(cut) == 20 and cut[0] == tokenizer.bos_token_id and cut[1:] == ids[-19:]
    assert cut_prompt(ids, len(ids), template) == ids


def test_columns_stand_straight_whatever_the_script():
    """Width as a terminal shows it: two columns for a Chinese character."""
    lines = side_by_side("天空是蓝色的，因为阳光被散射。\nshort", "because sunlight scatters in the air above us", 21)
    for line in lines:
        left = line.split(" | ")[0]
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in left) == 21
    assert "".join(line.split(" | ")[0].rstrip() for line in lines[:2]) == "天空是蓝色的，因为阳光被散射。"


def test_wrapping_breaks_at_spaces_and_loses_no_word():
    text = "a sentence of several words, and a-word-that-is-longer-than-the-line-itself follows"
    lines = wrapped(text, 20)
    assert all(len(line) <= 20 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert "words," in " ".join(lines).split()
    assert wrapped("", 20) == [""]


def test_summary_by_hand():
    answers = [[Answer("x", 4, True), Answer("y", 8, False)], [Answer("z", 3, True), Answer("", 1, True)]]
    assert summary(answers) == {"mean_tokens": 4.0, "ended": 0.75}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_new_tokens", "4000"], "leaves no room for a prompt"),
        (["--output", "/nowhere/at/all.json"], "cannot be written"),
        (["--langauge", "Chinese"], "did you mean --language"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(models, flags, sentence):
    done = start(MODULE, [*models, *flags])
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]


def test_the_script_names_its_two_models(repository, tmp_path):
    script = repository / "training/step1_sft/evaluation_scripts/run_prompt.sh"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
