"""The moving average and the text mixture on two processes, ZeRO 0-3: as on one, in checkpoints, and nothing kept twice."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import logged, write_pairs
from tests.several import run_several
from tests.training.step3_ppo.small_ppo import write_models

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 3)   # plain parameters, ZeRO's shared buffer, split ones
CUT = (0, 3)   # whole runs, cut and resumed


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Whole runs of step 3 with average and text mixture on one and on two processes; folders by name."""
    folder = tmp_path_factory.mktemp("runs")
    actor, reward = write_models(folder / "models")
    data = write_pairs(folder / "pairs.jsonl", 60)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Story {i}: the fox number {i} jumps." * 3}) + "\n" for i in range(30)))

    def flags(name: str, processes: int, *more: str) -> tuple[str, list[str]]:
        # A large epsilon keeps Adam from making steps of full size out of rounding, so that weights can be compared.
        return "training.step3_ppo.main", [
            "--dtype", "fp32", "--seed", "7", "--data_split", "1,1,1", "--eval_prompts", "0", "--data_path", str(data),
            "--output_dir", str(folder / name), "--actor_model_name_or_path", str(actor), "--critic_model_name_or_path",
            str(reward), "--max_prompt_seq_len", "48", "--max_answer_seq_len", "8", "--actor_learning_rate", "1e-3",
            "--critic_learning_rate", "1e-3", "--num_warmup_steps", "0", "--max_steps", "2", "--adam_epsilon", "1e-2",
            "--per_device_generation_batch_size", str(8 // processes), "--enable_ema",
            "--per_device_training_batch_size", str(4 // processes), "--unsupervised_dataset_name", str(text),
            "--unsup_coef", "0.5", *more,
        ]  # fmt: skip

    half = ("--ema_decay", "0.5")
    lora = ("--actor_lora_dim", "4", "--actor_lora_learning_rate", "1e-3")
    keep = ("--save_steps", "1", "--save_total_limit", "0")
    runs = []
    for stage in STAGES:
        zero = ("--actor_zero_stage", str(stage))
        runs.append(flags(f"decay0-{stage}", 2, "--ema_decay", "0", *zero, "--max_steps", "1"))
        if stage in CUT:
            mark = str(folder / f"two-{stage}" / "checkpoints" / "step-00000001")
            runs += [flags(f"two-{stage}", 2, *half, *zero, *keep), flags(f"resumed-{stage}", 2, *half, *zero, "--resume", mark)]
    runs.append(flags("lora-two", 2, *half, *lora, "--actor_zero_stage", "3"))
    run_several(runs, folder, processes=2)
    run_several([flags("one", 1, *half), flags("lora-one", 1, *half, *lora)], folder, processes=1)
    return folder


def tensors(folder, role: str = "actor_ema"):
    return load_file(folder / role / "model.safetensors")


@pytest.mark.parametrize("stage", CUT)
def test_two_processes_keep_the_average_of_one(outputs, stage):
    for name in ("train/actor_loss", "train/text_loss"):
        assert logged(outputs / f"two-{stage}", name) == pytest.approx(logged(outputs / "one", name), abs=1e-5)
    one = tensors(outputs / "one")
    for name, value in tensors(outputs / f"two-{stage}").items():
        torch.testing.assert_close(value, one[name], atol=2e-6, rtol=1e-5)
    assert any(not torch.equal(value, one[name]) for name, value in tensors(outputs / "one", "actor").items())


@pytest.mark.parametrize("stage", STAGES)
def test_every_element_is_kept_once_and_in_its_place(outputs, stage):
    """A decay of 0 is the last actor itself, whatever process keeps which part."""
    folder = outputs / f"decay0-{stage}"
    actor = tensors(folder, "actor")
    assert all(torch.equal(actor[name], value) for name, value in tensors(folder).items())


@pytest.mark.detail(50)
@pytest.mark.parametrize("stage", CUT)
def test_resumed_run_ends_with_the_same_average_and_read_the_same_text(outputs, stage):
    whole, resumed = (tensors(outputs / f"{name}-{stage}") for name in ("two", "resumed"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    assert logged(outputs / f"resumed-{stage}", "train/text_loss") == logged(outputs / f"two-{stage}", "train/text_loss")[1:]


def test_with_lora_only_the_adapters_are_averaged(outputs):
    one, two = (
        load_file(outputs / name / "actor_ema" / "adapter" / "adapter_model.safetensors") for name in ("lora-one", "lora-two")
    )
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], atol=2e-6, rtol=1e-5)
