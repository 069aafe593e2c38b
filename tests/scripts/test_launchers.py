"""Every launcher with --dry-run: what it would start is read by DeepSpeed's own parser and by the step's own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from scripts.launch.platforms import load_platforms, platform_named
from tests.scripts.recipes import RECIPES, REPOSITORY, name_of
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments, RewardArguments, SFTArguments

STEPS = {"step1_sft": SFTArguments, "step2_reward": RewardArguments, "step3_ppo": PPOArguments}
LAUNCHERS = [
    path.relative_to(REPOSITORY) for step in STEPS for name in load_platforms()
    for path in sorted((REPOSITORY / "training" / step / "training_scripts" / name).glob("*"))
]  # fmt: skip
OURS = ["--seed", "7", "--output_dir", "out put"]   # flags of the step, a blank in one of them


def shell_environment(**more: str) -> dict[str, str]:
    """A shell that has chosen nothing."""
    chosen = re.compile(r"DS_|NUM_GPUS|NODE_RANK|MASTER_|SLURM|.*VISIBLE_DEVICES|RANK|WORLD_SIZE|PYTHON|NCCL|HCCL|HIP_|HSA_|MIOPEN")
    return {name: value for name, value in os.environ.items() if not chosen.match(name)} | {"PYTHON": sys.executable} | more


def recipe_of(launcher):
    return f"configs/{launcher.parent.name}/{launcher.name.removeprefix('run_').removesuffix('.sh')}.yaml"


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, str]:
    """What each launcher prints with --dry-run, by its path; run as a user does, from some other folder."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def dry_run(launcher) -> subprocess.CompletedProcess:
        models = ["ACTOR", "CRITIC"] if "step3_ppo" in launcher.parts else []
        return subprocess.run(
            ["bash", str(REPOSITORY / launcher), *models, *OURS, "--dry-run"], cwd=folder, env=shell_environment(),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        done = dict(zip(map(str, LAUNCHERS), pool.map(dry_run, LAUNCHERS), strict=True))
    failed = {name: one.stderr for name, one in done.items() if one.returncode}
    assert not failed
    assert not list(folder.iterdir())   # a dry run writes nothing
    return {name: one.stdout for name, one in done.items()}


def parts(text: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a dry run exports, and its command."""
    exported = dict(re.findall(r"^export (\w+)=(.*?)(?:\s+#.*)?$", text, flags=re.MULTILINE))
    return exported, shlex.split(text[text.rindex("\n\n") :].replace("\\\n", " "))


def test_every_recipe_has_its_launchers_and_every_launcher_its_recipe():
    wanted = {f"training/{step}/training_scripts/{path.parent.name}/run_{path.stem}.sh" for step in STEPS for path in RECIPES}
    assert set(map(str, LAUNCHERS)) == wanted and len(wanted) >= 3 * 50


@pytest.mark.parametrize("step", STEPS)
def test_launchers_are_a_few_plain_lines(step):
    for launcher in LAUNCHERS:
        if step not in launcher.parts:
            continue
        file = REPOSITORY / launcher
        lines = file.read_text(encoding="utf-8").splitlines()
        assert os.access(file, os.X_OK), f"{launcher}: chmod +x"
        assert lines[0] == "#!/usr/bin/env bash" and len(lines) <= 6 and max(map(len, lines)) <= 130
        comments = lines[1:-2]
        assert all(line.startswith("# ") for line in comments) and launcher.name in "".join(comments)
        assert lines[-2] == 'source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"'
        assert lines[-1] == f'launch {step} {recipe_of(launcher)} "$@"'


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_deepspeed_and_the_steps_read_the_commands(shown, path):
    from deepspeed.launcher.runner import parse_args

    platform = platform_named(path.parent.name)
    for step, arguments in STEPS.items():
        launcher = f"training/{step}/training_scripts/{path.parent.name}/run_{path.stem}.sh"
        exported, command = parts(shown[launcher])
        assert exported["DS_ACCELERATOR"] == platform.accelerator
        assert {name: exported[name] for name in platform.env if "$" not in platform.env[name]} == {
            name: value for name, value in platform.env.items() if "$" not in value
        }
        assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
        launch = parse_args(command[3:])   # exits for a flag that it does not know
        assert launch.module and launch.user_script == f"training.{step}.main"
        assert launch.num_gpus == platform.devices
        assert (launch.hostfile == os.devnull) == (platform.nodes == 1)
        args = parse(arguments, launch.user_args)
        assert (args.seed, args.output_dir, args.dtype) == (7, "out put", platform.dtype)
        assert args.config == str(REPOSITORY / path)
        if step == "step3_ppo":
            assert (args.actor_model_name_or_path, args.critic_model_name_or_path) == ("ACTOR", "CRITIC")


def test_the_dry_run_of_the_dcu_is_readable(shown):
    """The example of the documentation: variables with a reason each, one flag a line, nothing wider than a screen is wide."""
    text = shown["training/step3_ppo/training_scripts/dcu_z100l/run_chatglm-6b.sh"]
    exports = [line for line in text.splitlines() if line.startswith("export")]
    assert all(re.search(r"  # \w", line) for line in exports)
    assert "platform dcu_z100l: one node with 8 Hygon DCU Z100L" in text
    command = text[text.rindex("\n\n") :].strip().splitlines()
    assert all(line.count(" --") <= 1 for line in command) and command[-1].split()[0] == "--output_dir"


OTHERS = {
    "scripts/preprocess_dataset.sh": "scripts.preprocess_dataset",
    "training/step1_sft/training_scripts/run_ptuning_chatglm2-6b.sh": "training.step1_sft.main",
    "training/step1_sft/training_scripts/run_ptuning_chatglm-6b.sh": "training.step1_sft.main",
    "training/step1_sft/training_scripts/run_finetune_chatglm2-6b.sh": "deepspeed.launcher.runner",
    "training/step1_sft/evaluation_scripts/evaluate_finetune_chatglm2-6b.sh": "training.evaluate.bleu_rouge",
    "training/step1_sft/evaluation_scripts/run_prompt.sh": "training.evaluate.side_by_side",
    "training/step2_reward/evaluation_scripts/run_eval.sh": "training.evaluate.reward_scores",
}


@pytest.mark.parametrize("script", OTHERS)
def test_the_other_scripts_find_their_python_as_the_launchers_do(script, tmp_path):
    """Where there is only python3; and the working directory is no place to import from."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    shown = '#!/bin/sh\necho "$PYTHONSAFEPATH" "$PYTHONPATH" "$@"\n'
    for name in ("python3", "mine"):
        (tmp_path / name).write_text(shown.replace("echo", f"echo {name}"))
        (tmp_path / name).chmod(0o755)
    # VIRTUAL_ENV: an environment is active, so a .venv of the repository is not taken.
    env = {"PATH": str(tmp_path), "VIRTUAL_ENV": "/active"}
    for more, name in (({}, "python3"), ({"PYTHON": str(tmp_path / "mine")}, "mine")):
        done = subprocess.run(
            ["bash", str(REPOSITORY / script), "a b", "c"], cwd=tmp_path, env=env | more, capture_output=True, text=True
        )
        assert done.stdout.split()[:5] == [name, "1", str(REPOSITORY), "-m", OTHERS[script]], done.stderr
        assert "a b" in done.stdout
