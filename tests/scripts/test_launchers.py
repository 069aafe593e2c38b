"""The launchers are generated; what each starts is read by DeepSpeed's own parser and by the step's own."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from deepspeed.launcher.runner import parse_args

from scripts import generated
from scripts.launch import launchers
from scripts.launch.__main__ import prepare
from scripts.launch.platforms import load_platforms, platform_named
from steps import STEPS
from tests.scripts.recipes import RECIPES, REPOSITORY, name_of
from training.utils.flags.parse import parse
from training.utils.flags.recipe import recipes_of

OURS = ["--seed", "7", "--output_dir", "out put"]  # flags of the step, a blank in one of them
ADGEN = [
    path for name in load_platforms() for path in recipes_of(REPOSITORY / "configs", name) if "tun" in path.stem
]  # ptuning_, finetune_


def test_the_launchers_are_those_that_the_recipes_give(capsys):
    assert launchers.main(["--check"]) == 0, capsys.readouterr().out
    texts = launchers.launchers()
    assert len(texts) == 3 * len(RECIPES) + len(ADGEN) and len(ADGEN) == 6
    assert all(os.access(path, os.X_OK) for path in texts), "chmod +x"
    assert {len(text.splitlines()) for text in texts.values()} == {3}
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= 132


def test_a_comparison_says_what_is_wrong_with_each_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    old, absent, extra = (tmp_path / name for name in ("old.sh", "absent.sh", "extra.sh"))
    old.write_text("former")
    assert generated.write_files({old: "x", absent: "x"}, [old, extra], compare=True) == 1
    lines = ["old.sh: differs", "absent.sh: missing", "extra.sh: nothing makes it; remove it", "2 files, 2 differ or are missing"]
    assert capsys.readouterr().out.splitlines() == lines and not absent.exists()
    assert generated.write_files({old: "x", absent: "x"}, [], compare=False) == 0 and absent.read_text() == "x"


@pytest.mark.parametrize("path", [*RECIPES, *ADGEN], ids=name_of)
def test_deepspeed_and_the_steps_read_the_commands(path):
    platform = platform_named(path.parent.name)
    for step in STEPS[:1] if path in ADGEN else STEPS:
        models = ["ACTOR", "CRITIC"] if step.section == "ppo" else []
        launch, dry_run = prepare([step.room, str(REPOSITORY / path), *models, *OURS, "--dry-run"], {"USER": "me"})
        variables = {name: value.replace("${USER}", "me") for name, value in platform.env.items()}
        assert dry_run and launch.environment.variables.items() >= variables.items()
        assert not launch.environment.forwarded or platform.nodes > 1
        command = parse_args(launch.command[3:])  # exits for a flag that it does not know
        assert command.module and command.user_script == step.module
        wanted = {"ptuning": 1, "finetune": 4}.get(path.stem.split("_")[0], platform.devices)
        assert command.num_gpus == wanted and (command.hostfile == os.devnull) == (platform.nodes == 1)
        args = parse(step.arguments_class, command.user_args)
        assert (args.seed, args.output_dir) == (7, "out put")
        assert path in ADGEN or args.dtype == platform.dtype
        if models:
            assert [args.actor_model_name_or_path, args.critic_model_name_or_path] == models


def shell_environment(**more: str) -> dict[str, str]:
    """Return a shell's environment that has chosen nothing."""
    chosen = re.compile(r"DS_|NUM_GPUS|NODE_RANK|MASTER_|SLURM|.*VISIBLE_DEVICES|RANK|WORLD_SIZE|PYTHON|NCCL|HCCL|HIP_|HSA_|MIOPEN")
    return {name: value for name, value in os.environ.items() if not chosen.match(name)} | {"PYTHON": sys.executable} | more


def dry_run(script: str, folder, *words: str, **env: str) -> str:
    """Return what a script prints with --dry-run, run as a user does, from some other folder."""
    command = ["bash", str(REPOSITORY / script), *words, "--dry-run"]
    done = subprocess.run(command, cwd=folder, env=shell_environment(**env), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not list(folder.iterdir())  # a dry run writes nothing
    return done.stdout


FORMER = "training/step1_sft/training_scripts/run_{}.sh"


@pytest.mark.parametrize(
    "name, env, platform, processes, values",
    [
        ("ptuning_chatglm2-6b", {}, "single_gpu", "1", (128, 4, 2e-2, 128, 16, 0)),
        ("ptuning_chatglm-6b", {"DS_ACCELERATOR": "npu"}, "ascend_910", "1", (128, 4, 2e-2, 64, 16, 0)),
        ("finetune_chatglm2-6b", {}, "single_node", "4", (None, None, 1e-4, 64, 1, 2)),
        ("finetune_chatglm2-6b", {"DS_ACCELERATOR": "cpu", "NUM_GPUS": "2"}, "cpu", "2", (None, None, 1e-4, 64, 1, 2)),
    ],
)
def test_the_adgen_scripts_under_their_former_paths(tmp_path, name, env, platform, processes, values):
    text = dry_run(FORMER.format(name), tmp_path, "--data_path", "A b", **env)
    assert f"# platform {platform}: " in text
    command = parse_args(shlex.split(text[text.rindex("\n\n") :].replace("\\\n", " "))[3:])
    assert str(command.num_gpus) == processes
    args = parse(STEPS[0].arguments_class, command.user_args)
    assert (args.data_path, args.data_split, args.max_source_length, args.save_steps) == (["A b"], "1,0,0", 64, 1000)
    learned = (args.pre_seq_len or None, args.quantization_bit or None, args.learning_rate, args.max_target_length)
    assert (*learned, args.gradient_accumulation_steps, args.zero_stage) == values


OTHERS = {
    "scripts/preprocess_dataset.sh": "scripts.preprocess_dataset",
    "training/step1_sft/training_scripts/run_ptuning_chatglm2-6b.sh": "scripts.launch",
    "training/step1_sft/evaluation_scripts/evaluate_finetune_chatglm2-6b.sh": "scripts.evaluate",
    "training/step1_sft/evaluation_scripts/run_prompt.sh": "training.evaluate.side_by_side",
    "training/step2_reward/evaluation_scripts/run_eval.sh": "training.evaluate.reward_scores",
}


@pytest.mark.parametrize("script", OTHERS)
def test_the_other_scripts_find_their_python_as_the_launchers_do(script, tmp_path):
    """Where there is only python3; and the working directory is no place to import from."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for name in ("python3", "mine"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$PYTHONSAFEPATH" "$PYTHONPATH" "$@"\n')
        (tmp_path / name).chmod(0o755)
    # VIRTUAL_ENV: an environment is active, so a .venv of the repository is not taken.
    env = {"PATH": str(tmp_path), "VIRTUAL_ENV": "/active"}
    for more, name in (({}, "python3"), ({"PYTHON": str(tmp_path / "mine")}, "mine")):
        done = subprocess.run(
            ["bash", str(REPOSITORY / script), "--path", "a b"], cwd=tmp_path, env=env | more, capture_output=True, text=True
        )
        assert done.stdout.split()[:5] == [name, "1", str(REPOSITORY), "-m", OTHERS[script]], done.stderr
        assert "a b" in done.stdout


def test_an_evaluation_before_training_names_the_script_that_trains(tmp_path):
    script = REPOSITORY / "training/step1_sft/evaluation_scripts/evaluate_finetune_chatglm2-6b.sh"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    named = re.search(r"error: output/adgen-chatglm2-6b-ft-1e-4 is not there; train first with bash (\S+),", done.stderr)
    assert named[1].endswith("/run_finetune_chatglm2-6b.sh") and REPOSITORY.joinpath(named[1]).is_file()
