"""Wrong input ends a step with one sentence and exit code 2, before a model is loaded where that can be known."""

import gzip
import json

import pytest
import torch.distributed as dist

import training.step1_sft.main as sft
import training.step2_dpo.main as dpo
import training.step2_dpo.reference as reference
import training.step2_reward.main as reward
import training.step3_ppo.main as ppo
import training.step3_ppo.rlhf_engine as rlhf_engine
from tests.launching import write_pairs
from tests.tiny import SPARE_ROWS, tiny_checkpoint, tiny_tokenizer
from training.utils.engine import build
from training.utils.flags.steps import DPOArguments, PPOArguments, RewardArguments, SFTArguments
from training.utils.run.entry import parse_or_exit, run_main

STEPS = {
    "sft": (sft, SFTArguments),
    "reward": (reward, RewardArguments),
    "dpo": (dpo, DPOArguments),
    "ppo": (ppo, PPOArguments),
}
LOADERS = [(room, "load_causal_lm") for room in (build, reference, rlhf_engine)]
LOADERS += [(room, "load_scalar_model") for room in (build, rlhf_engine)]
OWN_RULE = "--reward_model false --reward_function {rules}:polite"
SHORT = "--data_path {pairs} --max_prompt_seq_len 64 --max_answer_seq_len 16 --data_split 1,1,1"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name in the cases below -> path. "absent" is none."""
    folder = tmp_path_factory.mktemp("files")
    pairs = write_pairs(folder / "pairs.jsonl", 60)
    written = {
        "cut.jsonl": pairs.read_text() + '{"prompt": "cut off\n',
        "lacking.jsonl": pairs.read_text() + json.dumps({"prompt": "a", "chosen": "b"}) + "\n",
        "answers.jsonl": "".join(json.dumps({"prompt": f"q {i}", "response": f"a {i}"}) + "\n" for i in range(40)),
        "rules.py": "def polite(prompts, answers):\n    return [0.0] * len(answers)\n",
        "empty.jsonl": "",
        "empty.json": "",
    }
    for name, content in written.items():
        (folder / name).write_text(content)
    (folder / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    models = {family: tiny_checkpoint(folder / family, family) for family in ("llama", "opt")}
    grown = tiny_tokenizer("llama")
    grown.add_tokens([f"<new{number}>" for number in range(SPARE_ROWS + 1)])
    models["grown"] = tiny_checkpoint(folder / "grown", "llama")
    grown.save_pretrained(models["grown"])
    named = {file.stem if file.suffix != ".gz" else "zipped": file for file in sorted(folder.iterdir())}
    yield named | models | {"empty_list": folder / "empty.json", "absent": folder / "absent"}
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def end(files, tmp_path, capsys):
    """Run a step in this process to its end; returns the exit code and the one error line."""

    def run(step: str, flags: str) -> tuple[int, str]:
        module, arguments = STEPS[step]
        roles = ("actor_", "critic_") if step == "ppo" else ("",)
        models = " ".join(f"--{role}model_name_or_path {files['llama']}" for role in roles)
        words = f"{models} --output_dir {tmp_path / 'out'} --cache_dir {tmp_path / 'cache'} {flags.format(**files)}"
        code = 0
        try:
            run_main(module.main, parse_or_exit(arguments, words.split()))
        except SystemExit as ended:
            code = ended.code or 0
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error:")]
        assert "Traceback" not in error and len(lines) == (code == 2)
        return code, "".join(lines)

    return run


@pytest.mark.parametrize(
    ("step", "flags", "words"),
    [
        ("sft", "--data_path {absent}.jsonl", ["absent.jsonl"]),
        ("sft", "--data_path {empty}", ["empty.jsonl"]),
        ("sft", "--data_path {empty_list}", ["empty.json"]),
        ("sft", "--data_path {zipped}", ["empty.jsonl.gz"]),
        ("reward", "--data_path {cut}", ["cut.jsonl", "line 61"]),
        ("reward", "--data_path {lacking}", ["61", "rejected", "chosen"]),
        ("reward", "--data_path {answers}", ["answers.jsonl", "rejected"]),
        ("dpo", "--data_path {answers}", ["answers.jsonl", "rejected"]),
        ("ppo", f"--data_path {{pairs}} --max_prompt_seq_len 2 {OWN_RULE}", ["--max_prompt_seq_len"]),
        ("sft", "--learning_rat 1e-3", ["--learning_rat", "--learning_rate"]),
        ("sft", "--data_path Dahoas/rm-statik", ["Dahoas/rm-static"]),
        ("sft", "--data_path nobody/knows-this-set", ["scripts.download_dataset nobody/knows-this-set"]),
        ("sft", "--data_path {pairs} --model_name_or_path {absent}", ["absent"]),
        ("reward", "--data_path {pairs} --model_name_or_path {absent}", ["absent"]),
        ("dpo", "--data_path {pairs} --ref_model_name_or_path {absent}", ["absent"]),
        ("ppo", "--data_path {pairs} --critic_model_name_or_path {absent}", ["absent"]),
        ("sft", "--data_path {pairs} --output_dir {rules}/out", ["--output_dir"]),
        ("ppo", f"{SHORT} --critic_model_name_or_path {{opt}}", ["tokenizers", "llama", "opt", "reward model"]),
        ("dpo", "--data_path {pairs} --max_seq_len 64 --ref_model_name_or_path {opt}", ["The tokenizers of", "opt"]),
        ("ppo", "--data_path x.jsonl --reward_function {absent}.py:polite", ["no file"]),
        ("ppo", "--data_path x.jsonl --reward_function {rules}:rude", ["no such name"]),
        (
            "ppo",
            "--data_path x.jsonl --actor_model_name_or_path {opt} --max_prompt_seq_len 256 --max_answer_seq_len 8",
            ["--max_prompt_seq_len + --max_answer_seq_len = 264", "256 positions"],
        ),
        ("ppo", "--data_path x.jsonl --max_answer_seq_len 0", ["--max_answer_seq_len 0"]),
        ("sft", "--data_path x.jsonl --dtype fp16", ["--dtype fp16"]),
        ("sft", "--data_path x.jsonl --max_seq_len 300 --model_name_or_path {opt}", ["256 positions"]),
        (
            "sft",
            "--data_path x.jsonl --lora_dim 4 --lora_module_name embed_tokens,q_proj",
            ["--lora_module_name embed_tokens matches no linear layer", "q_proj"],
        ),
        ("sft", "--data_path x.jsonl --pre_seq_len 4 --model_name_or_path {grown}", ["<new8>", "P-Tuning freezes the embedding"]),
        ("reward", "--data_path x.jsonl --pre_seq_len 4 --gradient_checkpointing", ["drops the cache", "llama model"]),
        (
            "ppo",
            f"--data_path x.jsonl --actor_pre_seq_len 4 --actor_gradient_checkpointing {OWN_RULE}",
            ["--gradient_checkpointing drops the cache", "in step 3"],
        ),
        ("dpo", "--data_path x --beta 0", ["--beta 0.0: must be more than 0"]),
        ("dpo", "--data_path x --beta nan", ["--beta nan: must be finite"]),
        ("dpo", "--data_path x --label_smoothing 0.5", ["--label_smoothing 0.5: must be 0 or more and less than 0.5"]),
        ("dpo", "--data_path {pairs} --data_split 1,0,1", ["--data_split 1,0,1 leaves nothing for DPO"]),
        ("dpo", "--data_path x --center_rewards_coefficient 1", ["is a flag of step 2 (reward model), not of DPO"]),
        (
            "dpo",
            "--data_path x --lora_dim 4 --offload_reference_model",
            ["--offload_reference_model has no effect with"],
        ),
    ],
)
def test_one_sentence_before_a_model_is_loaded(end, monkeypatch, step, flags, words):
    def forbidden(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    for module, name in LOADERS:
        monkeypatch.setattr(module, name, forbidden)
    code, message = end(step, flags)
    assert code == 2 and all(word in message for word in words), message


TRAIN = "--data_path {pairs} --data_split 1,1,1 --dtype fp32 --per_device_train_batch_size 4"


def test_nan_loss_stops_and_keeps_the_last_checkpoint(end, tmp_path):
    flags = "--learning_rate 1e30 --max_grad_norm 0 --max_steps 30 --lr_scheduler_type constant"
    code, message = end("sft", f"{TRAIN} {flags} --save_steps 1 --save_total_limit 0")
    assert code == 2 and "loss became nan" in message
    kept = sorted(folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept and all(name.startswith("step-") for name in kept)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_resume_from_a_half_written_or_foreign_checkpoint(end, tmp_path):
    newest = tmp_path / "out" / "checkpoints" / "step-00000002"
    flags = f"{TRAIN} --max_steps 2 --save_steps 1"
    assert end("sft", flags)[0] == 0
    code, message = end("sft", f"{flags} --learning_rate 0.5 --resume {newest}")
    assert code == 2 and "--learning_rate" in message and "0.5" in message
    with (newest / "generators-0.pt").open("ab") as cut:
        cut.truncate(10)
    code, message = end("sft", f"{flags} --resume {newest}")
    assert code == 2 and "half-written" in message
    assert newest.with_name("step-00000001").exists()
