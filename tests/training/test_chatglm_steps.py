"""The three steps with ChatGLM on Chinese text, from checkpoints in the published layout: full weights, LoRA and P-Tuning,
on one process and on two under ZeRO 0-3.
"""

import json
from pathlib import Path

import pytest
import torch

from models.load import load_causal_lm
from models.save import save_model
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.launching import logged
from tests.models.common import shake
from tests.plain import assert_plain_transformers_does_as_we_do
from tests.several import run_several
from tests.tiny_chatglm import tiny_chatglm
from tests.training.runs import assert_same_curves, step

pytestmark = pytest.mark.distributed

COMMON = "--data_split 2,4,4 --seed 3 --max_steps 2"
SUPERVISED = f"{COMMON} --max_seq_len 96 --global_batch_size 4 --eval_iters 2"
LOSSES = {"sft": ["train/loss"], "reward": ["train/loss"], "ppo": ["train/score", "train/actor_loss", "train/critic_loss"]}
WAYS = {"full": "", "lora": "--lora_dim 4 --lora_learning_rate 1e-3", "prefix": "--pre_seq_len 4"}
# Every step, way, family and stage; of pairs of them those that go wrong together (full weights with ZeRO-3, a prefix in PPO).
CASES = [
    ("sft", "chatglm-6b", "full", 3),
    ("sft", "chatglm-6b", "prefix", 2),
    ("sft", "chatglm2-6b", "lora", 3),
    ("sft", "chatglm2-6b", "prefix", 0),
    ("reward", "chatglm-6b", "lora", 1),
    ("reward", "chatglm2-6b", "full", 2),
    ("ppo", "chatglm-6b", "prefix", 3),
    ("ppo", "chatglm2-6b", "full", 3),
]
REWARDS = {family: (kind, family, way) for kind, family, way, _ in CASES if kind == "reward"}


def name_of(case: tuple) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="module")
def outputs(shared_dir, tmp_path_factory) -> Path:
    """The folder with the runs by name: of all cases on two processes, and without their stage on one."""
    folder = tmp_path_factory.mktemp("chatglm")
    data = shared_dir / "data" / "preference_zh" / "oasst_rm_zh.jsonl"
    for family in REWARDS:
        tiny_chatglm(folder / family, family, shared_dir)

    def run(kind: str, family: str, way: str, stage: int | None = None) -> tuple[str, list[str]]:
        processes = 1 if stage is None else 2
        if kind == "ppo":
            flags = f"{COMMON} --actor_zero_stage {stage or 0} --critic_zero_stage {stage or 0} --max_prompt_seq_len 64"
            flags += f" --per_device_generation_batch_size {4 // processes} --per_device_training_batch_size {2 // processes}"
        else:
            flags = f"{SUPERVISED} --zero_stage {stage or 0}"
        name = name_of((kind, family, way) if stage is None else (kind, family, way, stage))
        more = {"critic": folder / name_of(REWARDS[family]), "processes": processes}
        return step(kind, folder / name, data, folder / family, f"{flags} {WAYS[way]}", **more)

    run_several([run(*case[:3]) for case in CASES], folder, 1)
    run_several([run(*case) for case in CASES], folder, 2)
    return folder


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_processes_equal_one(case, outputs):
    assert_same_curves(outputs / name_of(case), outputs / name_of(case[:3]), LOSSES[case[0]])
    if case[0] == "sft":
        first, last = logged(outputs / name_of(case), "train/loss")
        assert first != last


def test_what_the_steps_saved_opens_in_transformers_alone(outputs, shared_dir, tmp_path):
    """Whole weights, merged LoRA, prefixes; step 1, reward models, actors; and ChatGLM3, which has the network of ChatGLM2."""
    three, six = tmp_path / "three", tmp_path / "six"
    for folder, family in ((three, "chatglm3-6b"), (six, "chatglm-6b")):
        base = tiny_chatglm(tmp_path / family, family, shared_dir)
        tokenizer, model = load_tokenizer(base), load_causal_lm(base, dtype=torch.float32)
        if folder == six:  # an untrained one with tied matrices says its last token, <sop>, for ever
            shake(model.transformer.final_layernorm, size=2.0)
        save_model(model, tokenizer, load_template(base, tokenizer), folder)
    saved = [outputs / name_of(case[:3]) / ("actor" if case[0] == "ppo" else "") for case in CASES]
    answers = assert_plain_transformers_does_as_we_do([three, six, *saved], tmp_path)
    assert all(answers[:4])
    for folder in (three, six, *saved):
        files = [name.split(".")[0] for name in json.loads((folder / "config.json").read_text())["auto_map"].values()]
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"][0]
        assert all((folder / f"{name}.py").is_file() for name in [*files, tokenizer.split(".")[0]])
