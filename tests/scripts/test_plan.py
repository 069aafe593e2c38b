"""scripts.plan: the rows, the answer, the table, what is refused."""

import json
import subprocess
import sys

import pytest

from errors import UserError
from scripts.launch.platforms import platform_named
from scripts.plan.__main__ import main, text
from scripts.plan.section import plan_section
from tests.launching import REPOSITORY, environment
from tests.tiny import tiny_checkpoint
from training.utils.flags.recipe import Recipe
from training.utils.memory.arithmetic import GIB

EIGHT = ["--devices", "8", "--device-memory", "32", "--host-memory", "512", "--dtype", "fp16", "--attn_implementation", "eager"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama"))


def test_chatglm_on_eight_cards_of_32_gib(capsys):
    """Beside the published arithmetic: 16 bytes a parameter of which ZeRO-3 gives each card an eighth."""
    assert main(["chatglm-6b", "--step", "1", "--per_device_train_batch_size", "4", *EIGHT, "--json"]) == 0
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
    lines = text(found).splitlines()  # the answer, then the table
    assert next(number for number, line in enumerate(lines) if "weights     grad" in line) > lines.index(
        f"recommended    {found['recommended']}"
    )


def test_step_3_of_a_recipe_whose_first_steps_have_not_run(llama, tmp_path):
    """What earlier steps have still to write is planned as what they start from; a shared trunk takes three fewer."""
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "launch": {"platform": "cpu"},
        "sft": {"model_name_or_path": llama, "output_dir": "out/sft"},
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
        (["chatglm-7b", *EIGHT], "Did you mean chatglm-6b?"),
        (["zzz", *EIGHT], "known are opt-125m"),
        (["chatglm-6b"], "--platform"),
        (["chatglm-6b", "--platform", "dcu_z100"], "dcu_z100l"),
        (["chatglm-6b", *EIGHT, "--nodes", "3"], "cannot be shared evenly"),
        (["chatglm-6b", *EIGHT, "--reward-model", "opt-1.3b"], "--step 3"),
        (["chatglm-6b", *EIGHT, "--zero_stage", "0", "--offload"], "below --zero_stage 1"),
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
