"""The three steps with ChatGLM on Chinese text, from checkpoints in the published layout: full
weights, LoRA and P-Tuning, on one process and on two under ZeRO 0-3.
"""

from pathlib import Path

import pytest

from tests.launching import logged
from tests.several import run_several
from tests.tiny_chatglm import tiny_chatglm

pytestmark = pytest.mark.distributed

COMMON = ["--dtype", "fp32", "--logging_steps", "1", "--data_split", "2,4,4", "--eval_iters", "2", "--seed", "3"]
MODULES = {"sft": "training.step1_sft.main", "reward": "training.step2_reward.main", "ppo": "training.step3_ppo.main"}
LOSSES = {"sft": ["train/loss"], "reward": ["train/loss"], "ppo": ["train/score", "train/actor_loss", "train/critic_loss"]}


def flags(step: str, places: dict, family: str, output: Path, processes: int = 1, stage: int = 0, way: str = "full"):
    """The flags of a step; the global batch is 4 whatever the number of processes."""
    common = [*COMMON, "--data_path", str(places["data"]), "--cache_dir", str(places["cache"]), "--output_dir", str(output)]
    if step == "ppo":
        common = [part for part in common if part not in ("--eval_iters", "2")]
        models = ["--actor_model_name_or_path", str(places[family])]
        models += ["--critic_model_name_or_path", str(places[f"{family}-reward"])]
        models += ["--actor_zero_stage", str(stage), "--critic_zero_stage", str(stage)]
        batch = ["--per_device_generation_batch_size", str(4 // processes), "--eval_prompts", "4"]
        batch += ["--per_device_training_batch_size", str(2 // processes), "--max_prompt_seq_len", "64"]
        batch += ["--max_answer_seq_len", "8", "--max_steps", "2", "--actor_learning_rate", "1e-3", "--num_warmup_steps", "0"]
        # Adam makes rounding as large as any gradient, and among hundreds of nearly equal tokens that changes what is drawn.
        batch += ["--adam_epsilon", "1e-2"]
        roles = ("actor_", "critic_")
    else:
        models = ["--model_name_or_path", str(places[family]), "--zero_stage", str(stage)]
        batch = ["--per_device_train_batch_size", "2", "--global_batch_size", "4", "--max_seq_len", "96", "--max_steps", "2"]
        batch += ["--learning_rate", "1e-3"]
        roles = ("",)
    adapters = []
    if way == "lora":
        for role in roles:
            adapters += [f"--{role}lora_dim", "4", f"--{role}lora_learning_rate", "1e-3"]
    elif way == "prefix":
        adapters = ["--pre_seq_len", "4"]
    return [*common, *models, *batch, *adapters]


# Every step, way, family and stage; of pairs of them those that go wrong together (full weights with ZeRO-3, a prefix in PPO).
CASES = [
    ("sft", "chatglm-6b", "full", 3), ("sft", "chatglm-6b", "prefix", 2), ("sft", "chatglm2-6b", "lora", 3),
    ("sft", "chatglm2-6b", "prefix", 0), ("reward", "chatglm-6b", "lora", 1), ("reward", "chatglm2-6b", "full", 2),
    ("ppo", "chatglm-6b", "prefix", 3), ("ppo", "chatglm2-6b", "full", 3),
]  # fmt: skip
CRITICS = {family: (step, family, way) for step, family, way, _ in CASES if step == "reward"}


@pytest.fixture(scope="module")
def outputs(shared_dir, tmp_path_factory) -> dict[tuple, Path]:
    """The folders of all cases on two processes, and by (step, family, way) of the same run on one."""
    folder = tmp_path_factory.mktemp("chatglm")
    places = {"data": shared_dir / "data" / "preference_zh" / "oasst_rm_zh.jsonl", "cache": folder / "cache"}
    ones = {case[:3]: folder / "-".join(case[:3]) for case in CASES}
    twos = {case: folder / "-".join(map(str, case)) for case in CASES}
    for family, critic in CRITICS.items():
        places |= {family: tiny_chatglm(folder / family, family, shared_dir), f"{family}-reward": ones[critic]}
    run_several(
        [(MODULES[case[0]], flags(case[0], places, case[1], out, way=case[2])) for case, out in ones.items()], folder, 1
    )
    run_several(
        [(MODULES[case[0]], flags(case[0], places, case[1], out, 2, case[3], case[2])) for case, out in twos.items()], folder
    )
    return ones | twos


@pytest.mark.parametrize("case", CASES, ids="-".join("%s" for _ in range(4)).__mod__)
def test_two_processes_equal_one(case, outputs):
    for name in LOSSES[case[0]]:
        found, expected = logged(outputs[case], name), logged(outputs[case[:3]], name)
        assert len(found) == len(expected) >= 2
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-6), name
    if case[0] == "sft":
        assert logged(outputs[case], "train/loss")[0] != logged(outputs[case], "train/loss")[-1]
