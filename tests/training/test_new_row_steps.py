"""LoRA over a tokenizer with more ids than the embedding has rows, in all steps: trained, saved, split, shared, resumed."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.closeness import assert_close
from tests.launching import logged, write_pairs
from tests.several import run_several
from tests.tiny import CHATML, tiny_checkpoint, tiny_tokenizer
from tests.training.runs import CURVES, assert_same_curves, assert_same_weights, step

pytestmark = pytest.mark.distributed

LORA = "--lora_dim 4 --lora_learning_rate 1e-2"
ROLES = "--actor_lora_dim 4 --actor_lora_learning_rate 1e-2 --critic_lora_dim 4 --critic_lora_learning_rate 1e-2"
ADAPTERS = "--actor_model_name_or_path {folder}/sft-apart/adapter --critic_model_name_or_path {folder}/reward-apart/adapter"
SPLIT = "--deepspeed_config {folder}/split.json --zero_stage 3 --gradient_checkpointing"
KEPT = "--save_steps 1 --save_total_limit 0"
# name -> step, number of processes, flags; "resumed-" of those with KEPT. Models: "tied" and "apart", by the name's end.
RUNS = {
    "sft-apart": ("sft", 1, LORA),
    "sft-tied": ("sft", 1, LORA),
    "reward-apart": ("reward", 1, LORA),
    "dpo-apart": ("dpo", 1, LORA),
    "ppo-apart": ("ppo", 1, f"{ROLES} --enable_ema"),
    "int4-apart": ("sft", 1, f"{LORA} --quantization_bit 4"),
    "merged-apart": ("ppo", 1, f"{ROLES} --actor_model_name_or_path {{folder}}/sft-apart"),
    "sft2-apart": ("sft", 2, f"{LORA} --zero_stage 2 {KEPT}"),
    "sft3-apart": ("sft", 2, f"{LORA} {SPLIT} {KEPT}"),
    "sft3-tied": ("sft", 2, f"{LORA} {SPLIT}"),
    "reward3-apart": ("reward", 2, f"{LORA} {SPLIT}"),
    "dpo3-apart": ("dpo", 2, f"{LORA} {SPLIT}"),
    "adapters-apart": ("ppo", 2, f"{ROLES} {ADAPTERS} --actor_zero_stage 3"),
    "shared-apart": ("ppo", 2, f"{ROLES} --memory_mode shared"),
    "shared3-apart": ("ppo", 2, f"{ROLES} --memory_mode shared --actor_zero_stage 3 --critic_zero_stage 3"),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder with both models, as a base whose new chat template ends turns with a new token, and the runs by name."""
    folder = tmp_path_factory.mktemp("new-rows")
    data = write_pairs(folder / "pairs.jsonl", 120)
    (folder / "split.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    for name, family in (("apart", "llama"), ("tied", "qwen2")):
        tiny_checkpoint(folder / name, family)
        tokenizer = tiny_tokenizer(family)
        tokenizer.add_tokens([f"<spare{number}>" for number in range(8)])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
        tokenizer.eos_token = "<|end|>"
        tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|end|>")
        tokenizer.save_pretrained(folder / name)

    def run(name, more="", output=None):
        kind, processes, flags = RUNS[name]
        flags = f"{flags} {more}".format(folder=folder)
        model, critic = folder / name.rsplit("-")[-1], folder / "reward-apart"
        return step(kind, folder / (output or name), data, model, flags, critic=critic, processes=processes)

    for processes in (1, 2):
        run_several([run(name) for name, row in RUNS.items() if row[1] == processes], folder, processes)
    cut = [name for name, (_, _, flags) in RUNS.items() if KEPT in flags]
    for name in cut:
        last = "checkpoints/step-00000002"
        shutil.copytree(folder / name / last, folder / f"resumed-{name}" / last)
        shutil.copy(folder / name / "metrics.jsonl", folder / f"resumed-{name}" / "metrics.jsonl")
    run_several([run(name, "--resume", f"resumed-{name}") for name in cut], folder, 2)
    return folder


PAIRS = [
    *(("sft2-apart", "sft-apart"), ("sft3-apart", "sft-apart"), ("sft3-tied", "sft-tied")),
    *(("reward3-apart", "reward-apart"), ("dpo3-apart", "dpo-apart")),
    *((f"{one}-apart/{role}", f"ppo-apart/{role}") for one in ("shared", "shared3") for role in ("actor", "critic")),
]


@pytest.mark.parametrize(("found", "expected"), PAIRS)
def test_split_and_shared_runs_equal_one_process_with_models_of_their_own(outputs, found, expected):
    kind = RUNS[found.partition("/")[0]][0]
    runs = [outputs / name.partition("/")[0] for name in (found, expected)]
    assert_same_curves(*runs, CURVES[kind])
    assert_same_weights(outputs / found / "model.safetensors", outputs / expected / "model.safetensors", 2e-4)


def test_adapters_alone_are_opened_as_the_merged_models_around_them(outputs):
    """The first rollout; later ones follow other random adapters, for the base of the reward model lacks the head."""
    for name in ("eval/score", "train/score", "train/value", "train/kl"):
        found, expected = (logged(outputs / f"{one}-apart", name)[0] for one in ("adapters", "merged"))
        assert found == pytest.approx(expected, abs=1e-5), name
    config = json.loads((outputs / "adapters-apart" / "actor" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(outputs / "sft-apart" / "adapter")


@pytest.mark.parametrize("name", ["sft2-apart", "sft3-apart"])
def test_a_resumed_run_is_the_uninterrupted_one(outputs, name):
    assert_same_curves(outputs / f"resumed-{name}", outputs / name, CURVES["sft"], 0.0)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert_same_weights(outputs / f"resumed-{name}" / file, outputs / name / file)


@pytest.mark.parametrize("name", ["sft-apart", "sft-tied", "int4-apart", "dpo-apart", "ppo-apart/actor", "ppo-apart/actor_ema"])
def test_new_rows_moved_and_the_old_ones_did_not(outputs, name):
    base = load_file(outputs / name.partition("/")[0].rsplit("-")[-1] / "model.safetensors")
    saved = load_file(outputs / name / "model.safetensors")
    for matrix in ("model.embed_tokens.weight", "lm_head.weight"):
        if matrix in base:
            old = len(base[matrix])
            assert len(saved[matrix]) == old + 2 and torch.equal(saved[matrix][:old], base[matrix])
            assert (saved[matrix][-1] - base[matrix].mean(0)).abs().max() > 1e-5  # the end token's row, which starts 3e-6 off


@pytest.mark.parametrize("name", ["sft-apart", "sft3-apart", "sft-tied", "sft3-tied", "ppo-apart/actor"])
def test_plain_peft_opens_the_adapter_over_the_enlarged_base(outputs, name):
    """As docs/en/recipes.md says."""
    folder = outputs / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(outputs / name.partition("/")[0].rsplit("-")[-1])
    base.resize_token_embeddings(len(tokenizer))
    ids = torch.tensor([[5, 9, tokenizer.convert_tokens_to_ids("<|turn|>"), 8, tokenizer.eos_token_id]])
    with torch.no_grad():
        alone = PeftModel.from_pretrained(base, folder / "adapter")(input_ids=ids).logits
        assert_close(alone, AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits)
