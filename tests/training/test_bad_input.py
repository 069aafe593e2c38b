"""Wrong input ends a step with one sentence and exit code 2, before a model is loaded where that can be known."""

import gzip
import json

import pytest
import torch.distributed as dist

import training.step1_sft.main as sft
import training.step2_reward.main as reward
import training.step3_ppo.main as ppo
import training.step3_ppo.rlhf_engine as rlhf_engine
from tests.launching import write_pairs
from tests.tiny import tiny_checkpoint
from training.utils.flags.parse import main_entry
from training.utils.flags.steps import PPOArguments, RewardArguments, SFTArguments

STEPS = {"sft": (sft, SFTArguments), "reward": (reward, RewardArguments), "ppo": (ppo, PPOArguments)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture
def refuse(tmp_path, tiny, monkeypatch, capsys):
    """Run a step in this process; it must end with code 2 and one sentence, which is returned. No model may be loaded."""

    def forbidden(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(sft, "load_causal_lm", forbidden)
    monkeypatch.setattr(reward, "load_scalar_model", forbidden)
    monkeypatch.setattr(rlhf_engine, "load_causal_lm", forbidden)
    monkeypatch.setattr(rlhf_engine, "load_scalar_model", forbidden)

    def run(step: str, *flags: str, model=tiny, output=None) -> str:
        module, arguments = STEPS[step]
        models = ["--model_name_or_path", str(model)]
        if step == "ppo":
            models = ["--actor_model_name_or_path", str(model), "--critic_model_name_or_path", str(model)]
        common = ["--output_dir", str(output or tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
        with pytest.raises(SystemExit) as ended:
            main_entry(module.main, arguments, [*models, *common, *flags])
        assert ended.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()


def test_missing_data_file(refuse, tmp_path):
    assert "absent.jsonl" in refuse("sft", "--data_path", str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.jsonl.gz"])
def test_empty_data_file(refuse, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert name in refuse("sft", "--data_path", str(file))


def test_invalid_json_names_file_and_line(refuse, tmp_path):
    file = write_pairs(tmp_path / "pairs.jsonl", 5)
    file.write_text(file.read_text() + '{"prompt": "cut off\n')
    message = refuse("reward", "--data_path", str(file))
    assert "pairs.jsonl" in message and "line 6" in message


def test_a_missing_field_names_record_and_fields(refuse, tmp_path):
    file = write_pairs(tmp_path / "pairs.jsonl", 3)
    file.write_text(file.read_text() + json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    message = refuse("reward", "--data_path", str(file))
    assert "4" in message and "rejected" in message and "chosen" in message


def test_a_set_without_rejected_answers_in_step_2(refuse, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q {i}", "response": f"a {i}"}) + "\n" for i in range(40)))
    message = refuse("reward", "--data_path", str(file))
    assert "answers.jsonl" in message and "rejected" in message


def test_all_prompts_longer_than_the_limit(refuse, tmp_path):
    file = write_pairs(tmp_path / "pairs.jsonl", 40)
    assert "--max_prompt_seq_len" in refuse("ppo", "--data_path", str(file), "--max_prompt_seq_len", "2")


def test_unknown_flag_suggests_the_right_one(refuse):
    message = refuse("sft", "--learning_rat", "1e-3")
    assert "--learning_rat" in message and "--learning_rate" in message


def test_unknown_data_set_and_no_network(refuse, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "Dahoas/rm-static" in refuse("sft", "--data_path", "Dahoas/rm-statik")   # did you mean
    message = refuse("sft", "--data_path", "nobody/knows-this-set")
    assert "scripts.download_dataset nobody/knows-this-set" in message


def test_unknown_model_folder(refuse, tmp_path):
    file = write_pairs(tmp_path / "pairs.jsonl", 40)
    for step in STEPS:
        assert "absent" in refuse(step, "--data_path", str(file), model=tmp_path / "absent")


def test_output_folder_that_cannot_be_written(refuse, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert "--output_dir" in refuse("sft", "--data_path", "x.jsonl", output=occupied / "out")


def test_tokenizers_of_actor_and_reward_model_that_differ(refuse, tmp_path, tiny):
    file = write_pairs(tmp_path / "pairs.jsonl", 60)
    other = tiny_checkpoint(tmp_path / "other", "opt")
    short = ["--max_prompt_seq_len", "64", "--max_answer_seq_len", "16", "--data_split", "1,1,1"]
    message = refuse("ppo", "--data_path", str(file), "--critic_model_name_or_path", str(other), *short)
    assert "tokenizers" in message and "llama" in message and "other" in message


def test_reward_function_that_cannot_be_used(refuse, tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("def polite(prompts, answers):\n    return [0.0] * len(answers)\n")
    assert "no file" in refuse("ppo", "--data_path", "x.jsonl", "--reward_function", f"{tmp_path / 'absent.py'}:polite")
    assert "no such name" in refuse("ppo", "--data_path", "x.jsonl", "--reward_function", f"{file}:rude")


def test_prompts_that_leave_no_room_for_an_answer(refuse, tmp_path):
    opt = tiny_checkpoint(tmp_path / "opt", "opt")
    message = refuse("ppo", "--data_path", "x.jsonl", "--max_prompt_seq_len", "256", "--max_answer_seq_len", "8", model=opt)
    assert "--max_prompt_seq_len + --max_answer_seq_len = 264" in message and "256 positions" in message
    assert "--max_answer_seq_len 0" in refuse("ppo", "--data_path", "x.jsonl", "--max_answer_seq_len", "0")


def test_dtype_that_the_device_cannot_do(refuse):
    assert "--dtype fp16" in refuse("sft", "--data_path", "x.jsonl", "--dtype", "fp16")


def test_longer_than_the_model_has_positions(refuse, tmp_path):
    opt = tiny_checkpoint(tmp_path / "opt", "opt")
    assert "256 positions" in refuse("sft", "--data_path", "x.jsonl", "--max_seq_len", "300", model=opt)
    assert "256 positions" in refuse("ppo", "--data_path", "x.jsonl", "--max_prompt_seq_len", "250", model=opt)


@pytest.fixture
def run_sft(tmp_path, tiny, capsys):
    """Run step 1 in this process to its end; returns exit code and the error line."""
    file = write_pairs(tmp_path / "pairs.jsonl", 120)

    def run(*flags: str) -> tuple[int, str]:
        common = ["--data_path", str(file), "--data_split", "1,1,1", "--output_dir", str(tmp_path / "out"), "--dtype", "fp32"]
        code = 0
        try:
            main_entry(sft.main, SFTArguments, ["--model_name_or_path", str(tiny), *common, *flags])
        except SystemExit as ended:
            code = ended.code or 0
        error = capsys.readouterr().err
        errors = [line for line in error.splitlines() if line.startswith("error:")]
        assert "Traceback" not in error and len(errors) <= 1
        return code, "".join(errors)

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()


def test_lora_that_matches_nothing(run_sft):
    code, message = run_sft("--lora_dim", "4", "--lora_module_name", "decoder.layers.")
    assert code == 2 and "--lora_module_name decoder.layers." in message and "q_proj" in message


def test_nan_loss_stops_and_keeps_the_last_checkpoint(run_sft, tmp_path):
    flags = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "30", "--per_device_train_batch_size", "8",
             "--lr_scheduler_type", "constant", "--save_steps", "1", "--save_total_limit", "0"]  # fmt: skip
    code, message = run_sft(*flags)
    assert code == 2 and "loss became nan" in message
    kept = sorted(folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept and all(name.startswith("step-") for name in kept)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_resume_from_a_half_written_or_foreign_checkpoint(run_sft, tmp_path):
    output = tmp_path / "out"
    flags = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--save_steps", "1"]
    assert run_sft(*flags)[0] == 0
    newest = output / "checkpoints" / "step-00000002"
    code, message = run_sft(*flags, "--learning_rate", "0.5", "--resume", str(newest))
    assert code == 2 and "--learning_rate" in message and "0.5" in message
    with (newest / "generators-0.pt").open("ab") as cut:
        cut.truncate(10)
    code, message = run_sft(*flags, "--resume", str(newest))
    assert code == 2 and "half-written" in message
    assert (output / "checkpoints" / "step-00000001").exists()
