"""scripts.plan and the arithmetic behind it: counts by hand, published sizes, the table, what is refused."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import models  # noqa: F401  (registers ChatGLM)
from errors import UserError
from models.adapters.lora import add_lora
from scripts.plan.__main__ import config_of, known_models, main
from tests.launching import REPOSITORY, environment
from tests.tiny import tiny_checkpoint
from training.utils.flags.steps import PPOArguments, SFTArguments
from training.utils.memory.arithmetic import GIB, Machine, Plan, Setting, engine_memory, pinned
from training.utils.memory.fit import StepMemory, check_fits
from training.utils.memory.footprint import Footprint

# By hand: 12 h^2 + 13 h a block; 50272 tokens, 2048 + 2 positions, one norm.
OPT_66B = 64 * (12 * 9216**2 + 13 * 9216) + (50272 + 2050 + 2) * 9216
# Parameters as published, or as the checkpoint's index counts them.
PUBLISHED = {
    "opt-125m": 125_239_296, "opt-350m": 331_196_416, "opt-1.3b": 1_315_758_080, "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280, "opt-66b": OPT_66B, "bloom-1b1": 1_065_314_304, "llama-2-7b": 6_738_415_616,
    "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512, "chatglm-6b": 6_173_286_400, "chatglm2-6b": 6_243_584_000,
    "chatglm3-6b": 6_243_584_000,
}  # fmt: skip
EIGHT = ["--devices", "8", "--device-memory", "32", "--host-memory", "512", "--dtype", "fp16", "--attn_implementation", "eager"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama"))


def test_known_models_have_the_published_number_of_parameters():
    assert known_models().keys() == PUBLISHED.keys()
    for name, count in PUBLISHED.items():
        weights = Footprint(config_of(name), dtype=torch.float16).weights
        assert (weights.trained, weights.frozen) == (count, 0), name


def test_known_models_are_the_networks_of_the_published_configs(shared_dir):
    for name in ("chatglm-6b", "chatglm2-6b", "chatglm3-6b"):
        config = config_of(str(shared_dir / "golden" / name / "official" / "config.json"))
        official = Footprint(config, dtype=torch.float16, scalar=True, lora_dim=8).weights
        assert official == Footprint(config_of(name), dtype=torch.float16, scalar=True, lora_dim=8).weights


@pytest.mark.parametrize("names", ["layers.18.,layers.29.", "q_proj,v_proj", "layers.29.mlp,layers.18.self_attn.q_proj", "layers."])
def test_adapters_of_some_blocks_are_counted_as_in_the_whole_network(names):
    """The plan's networks have one and two blocks, and none of them the number 18."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=30, num_attention_heads=2
    )
    with torch.device("meta"):
        whole = add_lora(AutoModelForCausalLM.from_config(config), dim=4, alpha=1.0, module_name=names)
    trained = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    found = Footprint(config, dtype=torch.float32, lora_dim=4, lora_module_name=names)
    frozen = sum(parameter.numel() for parameter in whole.parameters()) - trained
    several_kinds = names.startswith("layers.29.mlp")   # then both blocks count with the layers of either
    assert found.weights.frozen == frozen
    assert found.weights.trained > trained if several_kinds else found.weights.trained == trained
    if "18" in names:   # what lies below the first adapter keeps nothing for a backward pass
        everywhere = Footprint(config, dtype=torch.float32, lora_dim=4, lora_module_name="layers.")
        assert found.training(2, 8).activations < 0.6 * everywhere.training(2, 8).activations
    wrong = Footprint(config, dtype=torch.float32, lora_dim=4, lora_module_name="layers.30.")
    with pytest.raises(UserError, match=r"--lora_module_name layers\.30\. matches no linear layer"):
        wrong.model(1)


def test_adapters_and_integers_are_counted_by_hand():
    network = Footprint(config_of("chatglm-6b"), dtype=torch.float16, lora_dim=8, quantization_bit=4)
    layers, width, inner = 28, 4096, 16384
    assert network.weights.trained == layers * 8 * (width + 3 * width)  # query_key_value alone
    rows = {3 * width: width, width: width + inner, inner: width}  # outputs -> inputs: qkv, dense and down, up
    assert network.weights.integers == layers * (
        sum(out * inputs // 2 for out, inputs in rows.items()) + 2 * (3 * width + 2 * width + inner)
    )
    assert network.cache(1, 1) == 2 * layers * width * 2


COUNTS = Footprint(config_of("chatglm-6b"), dtype=torch.float16).weights


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_state_is_that_of_the_deepspeed_papers(stage):
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), table 1: 16 bytes a parameter, K = 12 of them optimizer states."""
    total, n = COUNTS.trained, 64
    engine = engine_memory(COUNTS, 2, stage, n, offload_optimizer=False, offload_param=False)
    found = sum(engine.always.get(part, 0.0) for part in ("weights", "optimizer", "gradients"))
    found += engine.backward.get("gradients", 0.0)
    expected = {0: 16, 1: 4 + 12 / n, 2: 2 + 14 / n, 3: 16 / n}[stage] * total
    assert found == pytest.approx(expected, rel=0.01)
    everything = engine_memory(COUNTS, 2, stage, n, offload_optimizer=stage > 0, offload_param=stage == 3)
    if stage:
        assert "optimizer" not in everything.always
        assert everything.host["optimizer"] >= 12 * total / n


def test_more_processes_and_higher_stages_never_take_more():
    def size(stage, n):
        engine = engine_memory(COUNTS, 2, stage, n, offload_optimizer=False, offload_param=False)
        parts = ("weights", "optimizer", "gradients")
        return sum(one.get(part, 0.0) for one in (engine.always, engine.backward) for part in parts)

    for n in (2, 8, 64):
        sizes = [size(stage, n) for stage in (0, 1, 2, 3)]
        assert sizes == sorted(sizes, reverse=True)
    assert size(3, 64) < size(3, 8) < size(3, 2)


def test_pinned_memory_is_a_power_of_two():
    assert [pinned(size) for size in (0, 1, 1000, 1024, 3 * GIB)] == [0, 1, 1024, 1024, 4 * GIB]


def memory_of(llama, **flags):
    args = SFTArguments(model_name_or_path=llama, output_dir="unused", **flags)
    return StepMemory(args, {"model": config_of(llama)}, dtype=torch.float32, attn="sdpa")


def test_the_largest_batch_fits_and_the_next_does_not(llama):
    memory, machine = memory_of(llama, max_seq_len=256), Machine(1, 1, 0.0, 0.05 * GIB, accelerator=False)
    setting = memory.setting
    largest = memory.largest_batch(setting, machine)
    assert largest > 1
    assert memory.plan(setting, machine, largest).fits and not memory.plan(setting, machine, largest + 1).fits


def test_recomputing_saves_activations_and_length_costs_them(llama):
    machine = Machine(1, 1, 0.0, GIB, accelerator=False)

    def activations(length, checkpointing):
        setting = Setting({"model": 0}, {"model": checkpointing})
        return memory_of(llama, max_seq_len=length).plan(setting, machine).on_host

    assert activations(256, True) < activations(256, False)
    assert activations(128, False) < activations(256, False)


def test_auto_takes_the_lowest_stage_that_fits(llama):
    """Eight processes on cards that hold less and less."""
    stages = []
    for mib in (1600, 1538.4, 1537.9, 1537.55):
        args = SFTArguments(
            model_name_or_path=llama, output_dir="unused", zero_stage="auto", per_device_train_batch_size=1,
            per_device_eval_batch_size=1, max_seq_len=4, force=True, deepspeed_config=None,
        )  # fmt: skip
        check_fits(args, Machine(8, 8, mib * 2**20, 512.0 * GIB), dtype=torch.float32, attn="sdpa")
        stages.append(args.zero_stage)
    assert stages[0] == 0 and stages == sorted(stages) and set(stages) <= {0, 1, 2, 3}


def test_a_run_that_cannot_fit_is_refused_with_what_would_and_force_starts_it(llama):
    flags = {"model_name_or_path": llama, "output_dir": "unused", "max_seq_len": 256}
    machine = Machine(1, 1, 0.0, 0.05 * GIB, accelerator=False)
    with pytest.raises(UserError, match="does not fit") as refused:
        check_fits(SFTArguments(**flags, per_device_train_batch_size=64), machine, dtype=torch.float32, attn="sdpa")
    sentence = str(refused.value)
    assert "--force" in sentence and "0.05" in sentence
    assert "--per_device_train_batch_size 1" in sentence or "--gradient_checkpointing" in sentence
    check_fits(
        SFTArguments(**flags, per_device_train_batch_size=64, force=True), machine, dtype=torch.float32, attn="sdpa"
    )
    check_fits(SFTArguments(**flags, per_device_train_batch_size=1), machine, dtype=torch.float32, attn="sdpa")


def test_a_step_refuses_before_it_reads_weights(llama, tmp_path):
    code = (
        "import training.utils.memory.fit as p, training.utils.memory.arithmetic as m, sys;"
        "p.this_machine = lambda run: m.Machine(1, 1, 0.0, 1e6, accelerator=False);"
        "from training.step1_sft.main import main; from training.utils.flags.steps import SFTArguments;"
        "from training.utils.flags.parse import main_entry; main_entry(main, SFTArguments)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--model_name_or_path", llama, "--output_dir", str(tmp_path / "out"), "--data_path", "none"],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: step 1 (SFT) of this llama model does not fit: it needs")


def plan_json(capsys, *argv):
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_chatglm_on_eight_cards_of_32_gib(capsys):
    """Beside the figures of the published arithmetic: 16 bytes a parameter of which ZeRO-3 gives each card an eighth."""
    code, found = plan_json(capsys, "chatglm-6b", "--step", "1", "--per_device_train_batch_size", "4", *EIGHT)
    assert code == 0
    assert found["models"]["model"]["parameters"] == 6_173_286_400
    rows = {row["flags"]: row for row in found["settings"]}
    assert rows["--zero_stage 0"]["verdict"] == "no"
    for row in rows.values():
        assert row["card_total_gib"] == pytest.approx(sum(row["card_gib"].values()), abs=0.02)
        assert (row["verdict"] == "no") == (row["card_total_gib"] > 32 or row["host_total_gib"] > 512)
        assert (row["largest_batch"] >= 4) == (row["verdict"] != "no")
    third = rows["--zero_stage 3 --gradient_checkpointing"]["card_gib"]
    assert third["weights"] + third["gradients"] + third["optimizer"] == pytest.approx(16 * 6.1733e9 / 8 / GIB, rel=0.01)
    assert found["recommended"] in rows and rows[found["recommended"]]["verdict"] == "fits"


def test_step_3_shares_one_trunk_in_less_memory(capsys):
    flags = ["--actor_lora_dim", "8", "--critic_lora_dim", "8", "--per_device_generation_batch_size", "2"]
    flags += ["--per_device_training_batch_size", "2"]
    _, separate = plan_json(capsys, "chatglm2-6b", "--step", "3", *EIGHT, *flags)
    _, shared = plan_json(capsys, "chatglm2-6b", "--step", "3", *EIGHT, *flags, "--memory_mode", "shared")
    trunk = 2 * 6.24e9 / GIB
    saved = separate["as_given"]["card_total_gib"] - shared["as_given"]["card_total_gib"]
    assert saved == pytest.approx(3 * trunk, rel=0.05)


def test_the_table_names_what_is_recommended(capsys, llama):
    assert main([llama, "--platform", "cpu", "--step", "2", "--max_seq_len", "64", "--dtype", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert "recommended    --zero_stage 0" in printed and "largest" in printed


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["chatglm-7b", *EIGHT], "Did you mean chatglm-6b?"),
        (["zzz", *EIGHT], "known are opt-125m"),
        (["chatglm-6b"], "--platform"),
        (["chatglm-6b", "--platform", "dcu_z100"], "dcu_z100l"),
        (["chatglm-6b", *EIGHT, "--nodes", "3"], "cannot be shared evenly"),
        (["chatglm-6b", *EIGHT, "--reward-model", "opt-1.3b"], "--step 3"),
        (["chatglm-6b", *EIGHT, "--zero_stage", "0", "--offload"], "--zero_stage 1, 2 or 3"),
        (["chatglm-6b", *EIGHT, "--quantization_bit", "4"], "--lora_dim"),
        (["chatglm-6b", *EIGHT, "--max_seq_length", "4"], "did you mean --max_seq_len?"),
        (["chatglm-6b", "--devices", "8", "--device-memory", "-1"], "must be more than 0"),
        ([*EIGHT], "no model"),
    ],
)
def test_wrong_input_is_told_in_a_sentence(argv, expected):
    with pytest.raises(UserError) as told:
        main(argv)
    assert expected in str(told.value) and "\n" not in str(told.value)


def test_the_check_is_quick_and_leaves_random_numbers_alone(llama):
    import time

    args = PPOArguments(actor_model_name_or_path=llama, critic_model_name_or_path=llama, output_dir="unused")
    machine = Machine(2, 2, 0.0, 8.0 * GIB, accelerator=False)
    check_fits(args, machine, dtype=torch.float32, attn="sdpa")
    state, began = torch.get_rng_state(), time.process_time()
    check_fits(args, machine, dtype=torch.float32, attn="sdpa")
    assert time.process_time() - began < 0.6  # 0.2 on an idle machine
    assert torch.equal(state, torch.get_rng_state())


def test_help_needs_no_torch():
    code = "import sys\nfrom scripts.plan.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], cwd=REPOSITORY, env=environment(),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--device-memory" in done.stdout


def test_a_verdict_says_how_full_it_is():
    setting = Setting({"model": 0}, {"model": False})
    for card, verdict in ((5, "fits"), (9.5, "tight"), (10.5, "no")):
        found = Plan(setting, Machine(1, 1, 10.0, 100.0), {"weights": card}, {"reserve": 1.0}, "training")
        assert found.verdict == verdict
    tight_host = dataclasses.replace(found, card={"weights": 1}, host={"optimizer": 120.0})
    assert tight_host.verdict == "no"
