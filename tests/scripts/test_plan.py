"""scripts.plan: the rows, the answer, the table, what is refused."""

import json
import subprocess
import sys

import pytest

from errors import UserError
from scripts.launch.platforms import platform_named
from scripts.plan.__main__ import main, text
from scripts.plan.section import plan_arguments, plan_section
from steps import step_of
from tests.launching import REPOSITORY, environment
from training.utils.flags.recipe import Recipe
from training.utils.memory.arithmetic import GIB, Machine

EIGHT = ["--devices", "8", "--device-memory", "32", "--host-memory", "512", "--dtype", "fp16", "--attn_implementation", "eager"]


def test_chatglm_on_eight_cards_of_32_gib(capsys):
    """Beside the published arithmetic: 16 bytes a parameter of which ZeRO-3 gives each card an eighth."""
    assert main(["chatglm-6b", "--step", "1", "--per_device_train_batch_size", "4", *EIGHT, "--json", "--all"]) == 0
    found = json.loads(capsys.readouterr().out)
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
    assert text(found).splitlines()[0] == f"recommended    {found['recommended']}"


def planned(capsys, *words, code=0):
    """Return the plan as JSON."""
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


SMALL = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return a config.json of 59 million parameters without weights."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(SMALL | {"intermediate_size": 1536}))
    return file


def test_one_card_with_lora_shares_weights_before_it_moves_them(config, capsys):
    """A card that holds one model and not four: shared weights at ZeRO 0 with recomputation, all on the card; and 4 bits."""
    flags = ["--actor_lora_dim", "16", "--critic_lora_dim", "16", "--per_device_training_batch_size", "4", "--dtype", "bf16"]
    args = step_of("ppo").arguments_class(
        actor_model_name_or_path=str(config), critic_model_name_or_path=str(config), output_dir="unused", dtype="bf16",
        actor_lora_dim=16, critic_lora_dim=16, per_device_training_batch_size=4,
    )  # fmt: skip
    machine = Machine(1, 1, 24.0 * GIB, 64.0 * GIB)
    memory = plan_arguments(args, None, machine, "bf16", "sdpa").memory
    plans = {one.flags_of(setting): one.plan(setting, machine) for one, setting in memory.ways(machine)}
    plain = "--actor_zero_stage 0 --actor_gradient_checkpointing --critic_zero_stage 0 --critic_gradient_checkpointing"
    shared = "--memory_mode shared "
    four, one, bits = (plans[f"{added}{plain}"] for added in ("", shared, f"{shared}--quantization_bit 4 "))
    assert four.card["weights"] > 3.3 * one.card["weights"] > 4 * bits.card["weights"]
    assert not any("zero_stage 1" in flags or ("zero_stage 3" in flags and "--offload" not in flags) for flags in plans)
    room = str((one.on_card / GIB + 0.001) / 0.92)
    found = planned(capsys, str(config), "--step", "3", "--devices", "1", "--device-memory", room, *flags)
    assert found["recommended"] == shared + plain and found["answer"]["verdict"] == "fits"
    assert {row["verdict"] for row in found["settings"]} <= {"fits", "tight"}
    assert any("--quantization_bit 4" in row["flags"] for row in found["settings"]) and found["left_out"] > 0
    told = text(found)
    assert told.startswith(f"recommended    {shared}{plain}\n") and "an adapter over the SFT model" in told
    assumed = next(line for line in told.splitlines() if line.startswith("assumed"))
    assert "64 GiB of host memory a node (--host-memory); sdpa" in assumed and "--max_prompt_seq_len 256" in assumed
    assert "bf16" not in assumed and "batch" not in assumed  # they were given


@pytest.mark.parametrize("given", ["actor_lora_dim", "critic_lora_dim"])
def test_step_3_with_one_adapter_is_told_of_the_other(config, capsys, given):
    other = next(name for name in ("actor_lora_dim", "critic_lora_dim") if name != given)
    flags = ["--step", "3", "--devices", "1", "--device-memory", "2", "--host-memory", "1", f"--{given}", "16"]
    found = planned(capsys, "--config", str(config), *flags, code=1)
    assert text(found).startswith(f"recommended    nothing fits: more cards, adapters (--{other} 16) or a smaller model\n")
    assert all(row["flags"].startswith(f"--{other} 16 ") for row in found["instead"])


def test_rows_differ_in_sight_and_keep_to_layerwise_weights_that_were_asked_for(config, capsys):
    flags = ["--step", "3", "--devices", "4", "--device-memory", "48", "--generation_weights", "layerwise"]
    found = planned(capsys, str(config), *flags, "--actor_zero_stage", "3", "--all")
    every = [row["flags"] for row in found["settings"]]
    assert len(set(every)) == len(every)
    assert all(("zero_stage 3" in row) == ("layerwise" in row) for row in every)
    rows = [line.rsplit("  ", 1)[1] for line in text(found).splitlines() if line.startswith(("fits ", "tight ", "no "))]
    assert len(rows) == len(every) and len({row.split(";")[0] for row in rows}) == len(rows)


def test_nothing_fits(config, capsys):
    """Then the row that misses by the least is shown, and the exit code is 1."""
    found = planned(capsys, "--config", str(config), "--devices", "1", "--device-memory", "1.5", code=1)
    assert found["recommended"] is None and [row["verdict"] for row in found["settings"]] == ["no"]
    assert text(found).startswith("recommended    nothing fits")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": None}, "vocab_size is null"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000"),
        ({"num_hidden_layers": "8"}, 'num_hidden_layers is "8"'),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"num_attention_heads": 7}, "transformers makes no network of it"),
        ({"rope_scaling": {"rope_type": "zzz", "factor": 2.0}}, "zzz"),
        ({"hidden_act": "zzz"}, "zzz"),
    ],
)
def test_a_config_that_is_no_networks_is_told_in_a_sentence(fields, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | fields))
    with pytest.raises(UserError) as told:
        main([str(tmp_path), "--platform", "cpu"])
    assert expected in str(told.value) and "\n" not in str(told.value)


def test_step_3_of_a_recipe_whose_first_steps_have_not_run(llama, tmp_path):
    """What earlier steps have still to write is planned as what they start from; a shared trunk takes three fewer."""
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "launch": {"platform": "cpu"},
        "sft": {"model_name_or_path": str(llama), "output_dir": "out/sft"},
        "reward": {"model_name_or_path": "out/sft", "output_dir": "out/reward"},
        "ppo": {
            "actor_model_name_or_path": "out/sft",
            "critic_model_name_or_path": "out/reward",
            "output_dir": "out/ppo",
            "actor_lora_dim": 4,
            "critic_lora_dim": 4,
            "dtype": "fp32",
        },
    }
    recipe.write_text(json.dumps(sections))
    flags = ["--max_prompt_seq_len", "8", "--max_answer_seq_len", "8"]
    plans = [
        plan_section(Recipe.read(str(recipe)), "ppo", platform_named("cpu"), flags=[*flags, "--memory_mode", mode])
        for mode in ("separate", "shared")
    ]
    assert all(found.plan.verdict == "fits" and found.refusal == "" for found in plans)
    actor, critic = (plans[0].memory.network(role).weights.frozen for role in ("actor", "critic"))
    saved = plans[0].plan.host["weights"] - plans[1].plan.host["weights"]
    assert saved == pytest.approx(4 * (actor + 2 * critic), rel=0.02)  # actor, critic and reward model


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["chatglm-7b", *EIGHT], "did you mean chatglm-6b?"),
        (["zzz", *EIGHT], "known are opt-125m"),
        (["chatglm-6b"], "--platform"),
        (["chatglm-6b", "--platform", "dcu_z100"], "dcu_z100l"),
        (["chatglm-6b", *EIGHT, "--nodes", "3"], "cannot be shared evenly"),
        (["chatglm-6b", *EIGHT, "--reward-model", "opt-1.3b"], "--step 3"),
        (["chatglm-6b", *EIGHT, "--zero_stage", "0", "--offload"], "below --zero_stage 1"),
        (["chatglm-6b", *EIGHT, "--quantization_bit", "4"], "--lora_dim"),
        (["opt-1.3b", *EIGHT, "--max_seq_len", "2049"], "--max_seq_len 2049 is more than the 2048 positions of the opt model"),
        (["chatglm-6b", *EIGHT, "--max_seq_length", "4"], "here it is --max_seq_len, of"),
        (["chatglm-6b", "--devices", "8", "--device-memory", "-1"], "must be more than 0"),
        ([*EIGHT], "no model"),
        (["chatglm-6b", "--config", "none.json", *EIGHT], "both name a model"),
    ],
)
def test_wrong_input_is_told_in_a_sentence(argv, expected):
    with pytest.raises(UserError) as told:
        main(argv)
    assert expected in str(told.value) and "\n" not in str(told.value)


def test_help_and_refusals_need_no_torch():
    """A wrong model, recipe or flag is told before the seconds that torch and transformers take to import."""
    code = """
import sys
from errors import told
from scripts.doctor.__main__ import main as doctor
from scripts.plan.__main__ import main as plan
for main, words in ((plan, "--help"), (doctor, "--help")):
    try:
        main([words])
    except SystemExit:
        pass
wrong = ["--config none.yaml", "chatglm-7b", "chatglm-6b --no_flag 1", "output/demo/none"]
print([told(plan)([*words.split(), "--platform", "cpu"]) for words in wrong], [told(doctor)(["--recipe", "none.yaml"])])
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--platform") > 1 and "[2, 2, 2, 2] [2]" in done.stdout
    assert "the demo makes it: bash scripts/quickstart.sh" in done.stderr
