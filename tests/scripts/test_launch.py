"""scripts/launch: the commands it makes, read back by DeepSpeed's, torchrun's and our own parsers; its refusals; real runs."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import runner as deepspeed_runner
from deepspeed.launcher.multinode_runner import OpenMPIRunner, PDSHRunner
from torch.distributed.run import get_args_parser

from errors import UserError
from models import device
from scripts.launch import commands
from scripts.launch.__main__ import env_file, main, passed_on, prepare, shown
from scripts.launch.checks import AS_ROOT, check_machine
from scripts.launch.processes import without_chatter
from training.utils.flags.parse import parse as parse_step
from training.utils.flags.steps import PPOArguments, SFTArguments

pytestmark = pytest.mark.fast
RECIPE = """
launch: {{platform: {platform}{more}}}
sft: {{model_name_or_path: base, output_dir: {out}/sft, zero_stage: 1, max_seq_len: 64}}
ppo: {{actor_model_name_or_path: a, critic_model_name_or_path: c, output_dir: {out}/ppo}}
"""
STEP = ["training.step1_sft.main", "--config", "recipe.yaml"]
HOSTS = "node-1 slots=8\n\n# spare\nnode-2 slots=8\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(platform, more launch keys) -> the path of one; the working directory is an empty one."""
    monkeypatch.chdir(tmp_path)

    def write(platform: str = "single_node", more: str = "") -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(platform=platform, more=f", {more}" if more else "", out=tmp_path / "out"))
        return str(path)

    return write


@pytest.fixture
def hostfile(tmp_path) -> str:
    (tmp_path / "hosts").write_text(HOSTS)
    return str(tmp_path / "hosts")


def launched(*words: str, **environ: str):
    """Return the launch that the words describe, in an environment of its own."""
    return prepare(list(words), {"USER": "me"} | environ)[0]


def deepspeed_args(command: list[str]):
    """Return a command of DeepSpeed's launcher as DeepSpeed reads it."""
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    args = deepspeed_runner.parse_args(command[3:])
    assert args.module
    return args


# --- commands ---------------------------------------------------------------------------------------------------------


def test_positional_arguments_are_those_of_earlier_launchers_and_flags_win(recipe, tmp_path):
    step1 = launched("step1_sft", recipe(), "my out", "3", "--max_seq_len", "32", "--zero_stage=2")
    parsed = parse_step(SFTArguments, deepspeed_args(step1.command).user_args)
    assert (parsed.output_dir, parsed.zero_stage, parsed.max_seq_len) == ("my out", 2, 32)
    assert step1.log == Path("my out/training.log")

    step3 = launched("step3_ppo", recipe(), "A", "C", "2", "", "there", "--ppo_epochs", "2")
    parsed = parse_step(PPOArguments, deepspeed_args(step3.command).user_args)
    assert (parsed.actor_model_name_or_path, parsed.critic_model_name_or_path) == ("A", "C")
    assert (parsed.actor_zero_stage, parsed.critic_zero_stage, parsed.output_dir) == (2, PPOArguments.critic_zero_stage, "there")
    assert launched("step3_ppo", recipe()).output == tmp_path / "out" / "ppo", "nothing given: the recipe's"


def words_of(line: str, paths: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the words of a line, and its NAME=VALUE as an environment."""
    words = line.format(**paths).split()
    shell = [word for word in words if re.match("[A-Z]", word)]
    return [word for word in words if word not in shell], dict(word.split("=", 1) for word in shell)


ALLOCATION = " --launcher slurm SLURM_JOB_NODELIST=n7 SLURM_JOB_NUM_NODES="
WAYS = [  # platform, words and environment, how DeepSpeed's or torchrun's own parser reads the command
    ("dcu_z100l", "", {"num_gpus": 6}),
    ("dcu_z100l", "NUM_GPUS=5", {"num_gpus": 5}),
    ("dcu_z100l", "--num_gpus 4 NUM_GPUS=5", {"num_gpus": 4}),
    ("dcu_z100l", "--num-gpus=4", {"num_gpus": 4}),
    ("dcu_z100l", "--platform single_gpu", {"num_gpus": 1}),  # the recipe's number is that of its own machine
    ("multi_node", "--hostfile {hosts} --ssh_port 22", {"hostfile": "{hosts}", "master_addr": "node-1", "ssh_port": 22}),
    ("multi_node", "--hostfile {hosts} --master_port 29611 --num_gpus 4", {"master_port": 29611, "num_gpus": 4}),
    ("multi_node", "--hostfile {one}", {"hostfile": os.devnull, "num_gpus": 2, "force_multi": False}),
    ("multi_node", "--hostfile {one} --num_nodes 1 --num_gpus 1", {"hostfile": os.devnull, "num_gpus": 1}),
    ("multi_node", "--hostfile {one} CUDA_VISIBLE_DEVICES=4,5,6", {"include": "localhost:4,5"}),
    ("multi_node", "--hostfile {one} --launcher torchrun", {"nnodes": "1", "nproc_per_node": "2", "master_addr": "127.0.0.1"}),
    (  # the only host is another machine
        "multi_node",
        "--hostfile {hosts} --num_nodes 1",
        {"hostfile": "{hosts}", "num_nodes": 1, "num_gpus": 8, "force_multi": True, "master_addr": "node-1"},
    ),
    ("multi_node", "--hostfile {hosts} --num_nodes 1 --no_ssh --master_addr h", {"hostfile": os.devnull, "num_gpus": 8}),
    ("multi_node", "--hostfile {hosts} --no_ssh --node_rank 1 --master_addr h", {"no_ssh": True, "master_addr": "h"}),
    ("multi_node", "--hostfile {hosts} --no_ssh SLURM_NODEID=1", {"node_rank": 1, "master_addr": "node-1"}),
    ("single_node", "--num_gpus 1 CUDA_VISIBLE_DEVICES=5,7", {"include": "localhost:5"}),
    ("dcu_z100l", "--num_gpus 2 HIP_VISIBLE_DEVICES=4,5,6 CUDA_VISIBLE_DEVICES=0,1", {"include": "localhost:4,5"}),
    ("dcu_z100l", "--num_gpus 1 CUDA_VISIBLE_DEVICES=3", {"include": "localhost:3"}),
    ("ascend_910", "--num_gpus 1 ASCEND_RT_VISIBLE_DEVICES=6,7 CUDA_VISIBLE_DEVICES=0", {"include": "localhost:6"}),
    ("cpu", "--num_gpus 1 CUDA_VISIBLE_DEVICES=3", {"include": "", "num_gpus": 1}),
    ("single_node", "--launcher torchrun --num_gpus 2 CUDA_VISIBLE_DEVICES=GPU-8a,GPU-91", {"nproc_per_node": "2"}),
    ("single_node", "MASTER_ADDR=10.0.0.1 NODE_RANK=0", {"num_gpus": 6}),  # as a pod of one replica has them
    (
        "multi_node",
        "--launcher torchrun --node_rank 1 --master_addr h --num_nodes 3",
        {"nnodes": "3", "node_rank": 1, "nproc_per_node": "6", "master_addr": "h", "master_port": 29500},
    ),
    ("multi_node", "--launcher torchrun --node_rank 0 --hostfile {hosts}", {"master_addr": "node-1", "nnodes": "2"}),
    ("cpu", "--launcher torchrun", {"nnodes": "1", "nproc_per_node": "6", "master_addr": "127.0.0.1"}),
    # a script for any number of nodes may give its flags to one
    ("cpu", "--launcher torchrun --num_nodes 1 --node_rank 0 --master_addr 10.0.0.1", {"nproc_per_node": "6"}),
    # the allocation says how many nodes there are, the mask which devices
    ("dcu_z100l", ALLOCATION + "4 --num_gpus 4 HIP_VISIBLE_DEVICES=4,5,6,7", {"nnodes": "4", "nproc_per_node": "4"}),
]


@pytest.mark.parametrize(("platform", "line", "wanted"), WAYS)
def test_every_way_is_read_back_as_it_was_meant(recipe, hostfile, platform, line, wanted):
    one = Path(hostfile).with_name("one")
    one.write_text(f"{socket.gethostname()} slots=2\n")
    words, environ = words_of(line, {"hosts": hostfile, "one": str(one)})
    more = "" if "{one}" in line or "{hosts} --num_nodes 1" in line else "processes: 6"
    launch = launched("step1_sft", recipe(platform, more), *words, **environ)
    if "torch.distributed.run" in " ".join(launch.command):
        begin = launch.command.index("--nnodes")
        args = get_args_parser().parse_args(launch.command[begin:])
        assert args.module and [args.training_script, *args.training_script_args] == STEP
    else:
        args = deepspeed_args(launch.command)
        assert [args.user_script, *args.user_args] == STEP
    for name, value in wanted.items():
        assert getattr(args, name) == (hostfile if value == "{hosts}" else value), name
    left = launch.environment.over(environ)  # a mask beside --include would be applied twice
    assert [name for name in environ if name in left] == [name for name in environ if not wanted.get("include")]


def test_a_recipe_of_several_platforms_is_read_for_the_one_that_is_named(recipe):
    launch = launched("step1_sft", "configs/opt-1.3b.yaml", "--platform", "dcu_z100l")
    assert launch.recipe.endswith("configs/dcu_z100l/opt-1.3b.yaml") and launch.options.processes == 8


NASTY = ["q|v", "a b", 'say "yes"', "$HOME `id` \\n", "it's", "x;y", "*", "(a)", 'a\\" b', "a&b"]


def test_words_reach_the_other_nodes_as_they_are(recipe, hostfile, tmp_path):
    """What DeepSpeed's pdsh runner would run there, run by a shell here with a program that prints its words."""
    launch = launched("step1_sft", recipe("multi_node"), "--hostfile", hostfile, "--data_path", *NASTY)
    args = deepspeed_args(launch.command)
    pdsh = PDSHRunner(args, "world")
    for name, value in launch.environment.forwarded.items():
        pdsh.add_export(name, value)
    command, _, _ = pdsh.get_cmd({}, {"node-1": [0], "node-2": [0]})
    show = tmp_path / "show"
    show.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n")
    show.chmod(0o755)
    remote = " ".join(command[command.index("-w") + 2 :]).replace(sys.executable, str(show), 1)
    words, environ = json.loads(subprocess.run(["sh", "-c", remote], capture_output=True, text=True, check=True).stdout)
    where = launch.command.index("--config") + 1
    given = ["--config", launch.command[where], "--data_path", *NASTY]
    assert words[words.index("training.step1_sft.main") + 1 :] == given
    assert environ.items() >= launch.environment.forwarded.items()


def test_every_node_by_itself(recipe, hostfile):
    words = ["step1_sft", recipe("multi_node"), "--hostfile", hostfile, "--no_ssh", "--master_addr", "10.0.0.1"]
    first, second = (launched(*words, "--node_rank", rank) for rank in "01")
    assert not second.environment.forwarded, "each node brings its own"
    assert first.log.name == "training.log" and second.log.name == "training-node1.log"


def test_openmpi(recipe, hostfile):
    words = ["step1_sft", recipe("multi_node"), "--hostfile", hostfile, "--launcher", "openmpi"]
    launch = launched(*words, NCCL_SOCKET_IFNAME="=ib0")
    args = deepspeed_args(launch.command)
    mpi = OpenMPIRunner(args, "world", launch.options.hosts)
    for name, value in launch.environment.forwarded.items():
        mpi.add_export(name, value)
    command = mpi.get_cmd({}, launch.options.hosts)
    assert command[:3] == ["mpirun", "-n", "16"] and "eth0" not in command
    assert command[command.index("btl_tcp_if_include") + 1] == "ib0"
    exported = dict(command[index + 1].split("=", 1) for index, word in enumerate(command) if word == "-x")
    assert (exported["MASTER_ADDR"], exported["MASTER_PORT"], exported["DS_ACCELERATOR"]) == ("node-1", "29500", "cuda")
    assert exported["NCCL_SOCKET_IFNAME"] == "=ib0"
    given = launched(*words, "--launcher_args", "--mca btl_tcp_if_include lo --oversubscribe")
    assert deepspeed_args(given.command).launcher_args == "--mca btl_tcp_if_include lo --oversubscribe"


def test_slurm(recipe, tmp_path):
    """The words of srun, run by a fake one that plays the second task."""
    words = ["step1_sft", recipe("multi_node"), "--launcher", "slurm", "--data_path", "a b", "c"]
    launch = launched(*words, SLURM_JOB_NODELIST="n7", SLURM_JOB_NUM_NODES="2")
    assert launch.command[:4] == ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    show = tmp_path / "python"
    show.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    show.chmod(0o755)
    task = [str(show) if word == sys.executable else word for word in launch.command[4:]]
    done = subprocess.run(task, env=os.environ | {"SLURM_NODEID": "1"}, capture_output=True, text=True, check=True)
    args = get_args_parser().parse_args(json.loads(done.stdout)[3:])
    assert (args.nnodes, args.node_rank, args.nproc_per_node, args.master_addr) == ("2", 1, "8", "n7")
    assert parse_step(SFTArguments, args.training_script_args).data_path == ["a b", "c"]


def test_slurm_keeps_the_mask_and_brings_the_networks_variables(recipe):
    shell = {"SLURM_JOB_NODELIST": "n7", "SLURM_JOB_NUM_NODES": "4", "HIP_VISIBLE_DEVICES": "4,5,6,7"}
    launch = launched("step1_sft", recipe("dcu_z100l"), "--launcher", "slurm", "--num_gpus", "4", **shell)
    assert launch.options.several and "--nodes=4" in launch.command
    assert launch.environment.over(shell).items() >= (shell | launch.options.platform.env_several_nodes).items()
    one = shell | {"SLURM_JOB_NUM_NODES": "1"}
    assert not launched("step1_sft", recipe("dcu_z100l"), "--launcher", "slurm", "--num_gpus", "4", **one).environment.removed


# --- environment ------------------------------------------------------------------------------------------------------


def test_shell_before_platform_and_recipe_before_both(recipe):
    path = recipe("dcu_z100l", "env: {MIOPEN_FIND_MODE: 1, MINE: x}")
    shell = {"NCCL_P2P_LEVEL": "2", "MIOPEN_FIND_MODE": "2", "PYTHONPATH": "elsewhere", "DS_ACCELERATOR": "dcu"}
    environment = launched("step1_sft", path, **shell).environment
    found = environment.over(shell)
    assert (found["NCCL_P2P_LEVEL"], found["MIOPEN_FIND_MODE"], found["MINE"]) == ("2", "1", "x")
    assert found["MIOPEN_USER_CACHE_PATH"] == "/tmp/miopen-me"
    assert found["DS_ACCELERATOR"] == "cuda", "DeepSpeed's name of a DCU"
    assert found["PYTHONPATH"].split(os.pathsep)[1:] == ["elsewhere"]
    assert "the platform has 5" in environment.reasons["NCCL_P2P_LEVEL"] and "recipe" in environment.reasons["MINE"]


@pytest.mark.parametrize(
    ("platform", "more", "words", "wanted"),
    [
        ("multi_node", "", ["--hostfile", "hosts"], "/of/the/file"),
        ("single_node", "env: {PYTHONPATH: /of/the/recipe}", [], "/of/the/recipe"),
    ],
)
def test_the_project_stays_before_any_other_pythonpath(recipe, hostfile, tmp_path, platform, more, words, wanted):
    (tmp_path / ".deepspeed_env").write_text("PYTHONPATH=/of/the/file\n")
    launch = launched("step1_sft", recipe(platform, more), *words, HOME=str(tmp_path / "nobody"))
    assert launch.environment.variables["PYTHONPATH"].split(os.pathsep) == [str(commands.ROOT), wanted]


def test_other_nodes_are_told_what_they_need_and_no_secret(recipe, hostfile, tmp_path):
    """Ours, the shell's about devices and network, the user's own file: in a file that DeepSpeed's reader takes."""
    own = tmp_path / "home" / ".deepspeed_env"
    own.parent.mkdir()
    own.write_text("# mine\n\nNCCL_IB_HCA=mlx5_2\nMINE = a=b\n")
    sent = {"GLOO_SOCKET_IFNAME": "ib0", "HF_HOME": "/data/hub", "LD_LIBRARY_PATH": "/opt/dtk/lib"}
    kept = {"HF_TOKEN": "hf_x", "WANDB_API_KEY": "y", "CUDA_VISIBLE_DEVICES": "0", "EDITOR": "vi", "DTK_X": 'a"b'}
    words, shell = ["step1_sft", recipe("dcu_z100l"), "--hostfile", hostfile], sent | kept | {"HOME": str(own.parent)}
    launch = launched(*words, **shell)
    told = launch.environment.forwarded
    ours = {"DS_ACCELERATOR": "cuda", "HSA_FORCE_FINE_GRAIN_PCIE": "1", "NCCL_NET_GDR_LEVEL": "SYS"}
    assert told.items() >= (sent | ours | {"NCCL_IB_HCA": "mlx5_2", "MINE": "a=b"}).items()
    assert not told.keys() & kept.keys()
    assert str(own) in launch.environment.reasons["MINE"]

    launch.output.mkdir(parents=True)
    env = passed_on(launch.environment, launch.output)
    assert env["DS_ENV_FILE"] == str(env_file(launch.output)) and own.read_text().startswith("# mine")
    # As the runner looks for it and reads it.
    where = [os.path.join(folder, env["DS_ENV_FILE"]) for folder in deepspeed_runner.DEEPSPEED_ENVIRONMENT_PATHS]  # noqa: PTH118
    assert set(where) == {env["DS_ENV_FILE"]}
    assert dict(line.split("=", maxsplit=1) for line in Path(where[0]).read_text().splitlines()) == told


def test_what_is_shown_has_no_secret_and_the_file_is_the_users_own(recipe, hostfile, tmp_path):
    """The user's own file does send them: they are in OUTPUT/deepspeed_env, and neither in a dry run nor in the log."""
    secrets = "HF_TOKEN=hf_secret\nHF_ENDPOINT=https://me:password1@hub.example\n"
    (tmp_path / ".deepspeed_env").write_text(secrets)
    words = ["--hostfile", hostfile, "--tensorboard_path", "http://me:password2@host/x?token=password3&y=1"]
    launch = launched("step1_sft", recipe("dcu_z100l"), *words, HOME=str(tmp_path))
    text = shown(launch)
    assert "hf_secret" not in text and "password" not in text and "HF_TOKEN=" in text and "https://me:***@hub.example" in text
    launch.output.mkdir(parents=True)
    file = env_file(launch.output)
    file.write_text("of an earlier run")
    file.chmod(0o644)
    passed_on(launch.environment, launch.output)
    assert file.stat().st_mode & 0o777 == 0o600 and secrets in file.read_text()


def test_a_dry_run_is_read_back_by_a_shell_and_makes_nothing(recipe, hostfile, tmp_path, capsys, monkeypatch):
    for name in ("DS_ACCELERATOR", *commands.MASKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    words = ["step3_ppo", recipe("dcu_z100l"), "A dir", "C", "--num_gpus", "2", "--dry-run"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    launch, _ = prepare(words)
    lines = [line for line in text.splitlines() if line.startswith(("export", "unset"))]
    assert len(lines) == len(launch.environment.variables) + 1 and all("  # " in line for line in lines)
    program = text.replace(sys.executable, "printf '%s\\0'", 1) + "\nenv -0"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, env={"CUDA_VISIBLE_DEVICES": "x"})
    said = done.stdout.split("\0")
    port = launch.command.index("--master_port") + 1   # a free one each time
    assert [word for index, word in enumerate(said[: len(launch.command) - 1]) if index != port - 1] == [
        word for index, word in enumerate(launch.command) if index not in (0, port)
    ]
    found = dict(line.split("=", 1) for line in said if "=" in line and not line.startswith("-"))
    assert found.items() >= launch.environment.variables.items() and "CUDA_VISIBLE_DEVICES" not in found

    several = shown(launched("step1_sft", recipe("multi_node"), "--hostfile", hostfile))
    assert "DS_ENV_FILE" in several and "#     DS_ACCELERATOR=cuda" in several


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_terminal_shows_no_chatter_of_launchers_and_libraries(size):
    """However the output is cut into pieces."""
    chatter = [
        "[2026-11-29 03:15:16,421] [INFO] [launch.py:170:main] dist_world_size=1\n",
        "[2026-11-29 03:15:13,287] [WARNING] [runner.py:214:fetch_hostfile] Unable to find hostfile\n",
        "W1129 03:15:13.287000 77 site-packages/torch/distributed/run.py:774] Setting OMP_NUM_THREADS\n",
        "/a b/torch/x.py:12: FutureWarning: old name\n  call(old)\n",
    ]
    own = ["[1/3] loading\n", "  40%\r", "  80%\n", "step 1 loss 2.0\n", "What: /a/b.py\n", "/data/pairs.jsonl read\n"]
    own += ["[2026-11-29 03:15:27,442] [ERROR] [launch.py:259:sigkill_handler] killed\n", "x.py:3: UserWarning: look\n", "end"]
    text = "".join([*own[:1], *chatter, *own[1:]]).encode()
    shown = without_chatter()
    pieces = [shown(text[start : start + size]) for start in range(0, len(text), size)]
    assert b"".join([*pieces, shown(b"")]).decode() == "".join(own)
    shown = without_chatter()
    assert shown(b"  40%\r") == b"  40%\r"  # a progress bar does not wait for the end of its line


# --- refusals ---------------------------------------------------------------------------------------------------------


SFT = "step1_sft {recipe} "
NODES = "step1_sft {nodes} --hostfile {hosts} "
REFUSED = [
    ("step1_sf {recipe}", "'step1_sf' is no step (did you mean step1_sft?); there are step1_sft, step2_reward"),
    ("step1_sft", "give a step and a recipe"),
    ("step2_reward {recipe}", "has no section reward, which step 2 (reward model) reads"),
    ("step1_sft configs/cpu/dema.yaml", "no recipe for 'dema' on cpu (did you mean demo?); there are "),
    ("step1_sft configs/cpo/demo.yaml", "no such file (did you mean cpu?); those of the project are"),
    ("step1_sft configs/mlu_370/opt-1.3b.yaml", "no platform mlu_370; to add it, give it an entry in configs/platforms.yaml"),
    ("step1_sft configs/opt-1.3b.yaml", "name one of them in the path"),
    (SFT + "--platform dcu_z100", "no platform (did you mean dcu_z100l?)"),
    (SFT + "out 4", "'4' stands where zero_stage does, a number from 0 to 3"),
    (SFT + "3", "'3' stands where output_dir does, a folder"),
    (SFT + "out 1 x", "'x' is one argument too many; in order they are output_dir, zero_stage"),
    (SFT + "--max_seq_le 3", "--max_seq_le is not a flag of step 1 (SFT)"),
    (SFT + "--num_gpus x", "Argument --num-gpus: invalid int value: 'x'"),
    (SFT + "--num_gpus 0", "--num-gpus 0 is not a number of them"),
    (SFT + "--launcher pdsj", "--launcher pdsj is unknown (did you mean pdsh?)"),
    (SFT + "--master_port 99999", "--master_port 99999 is no port; give a number from 1 to 65535"),
    (SFT + "--launcher-args 'x", "--launcher_args cannot be read"),
    (SFT + "--launcher torchrun --node_rank 1", "--node_rank 1 is for several nodes"),
    (SFT + "--no_ssh", "--no_ssh is for several nodes, and this is a run on one; give --num_nodes N"),
    (SFT + "--master_addr 10.0.0.1", "--master_addr 10.0.0.1 is for several nodes"),
    (SFT + "--num_nodes 1 --node_rank 1", "--node_rank 1 is for several nodes"),
    (SFT + "CUDA_VISIBLE_DEVICES=0,1", "CUDA_VISIBLE_DEVICES shows 2 devices, 8 are wanted"),
    (SFT + "--num_gpus 1 CUDA_VISIBLE_DEVICES=GPU-8a2f", "reads numbers only; give the numbers of the devices"),
    (SFT + "--platform dcu_z100l DS_ACCELERATOR=cpu", "DS_ACCELERATOR=cpu is set, but platform dcu_z100l"),
    (SFT + "NUM_GPUS=many", "NUM_GPUS=many in the environment is not a whole number"),
    (SFT + "--hostfile absent", "--hostfile absent: no such file"),
    (SFT + "--hostfile {hosts} --num_nodes 3", "names 2 hosts"),
    (SFT + "--hostfile {hosts} --num_gpus 9", "gives node-1 slots=8"),
    (NODES + "--no_ssh", "which of the 2 nodes is this"),
    (NODES + "--no_ssh --node_rank 2", "--node_rank 2 does not exist with 2 nodes"),
    (NODES + "DS_ENV_FILE={hosts}", "hosts, line 1: 'node-1 slots=8' is not NAME=VALUE"),
    (NODES + "--platform dcu_z100l USER=$HOME", "MIOPEN_USER_CACHE_PATH='/tmp/miopen-$HOME' cannot be sent to the other nodes"),
    ("step1_sft {nodes} --launcher torchrun --node_rank 0", "need --master_addr"),
    ("step1_sft {nodes} --launcher slurm", "inside an allocation"),
    (NODES + "--launcher openmpi", "needs the network interface"),
    (NODES + "--launcher openmpi --num_gpus 4", "gives node-1 slots=8, not 4"),
    (NODES + "--launcher openmpi --no_ssh", "--no_ssh and --launcher openmpi contradict"),
]


@pytest.mark.parametrize(("line", "sentence"), REFUSED)
def test_wrong_words_are_one_sentence_and_exit_code_2(recipe, hostfile, monkeypatch, capsys, line, sentence):
    for name in ("DS_ACCELERATOR", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    paths = {"recipe": recipe(), "hosts": hostfile, "nodes": "configs/multi_node/opt-1.3b.yaml"}
    words, environ = words_of(line, paths)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main([*words, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("hosts", "more", "sentence"),
    [
        ("a slots=2\nb slot=2\n", "", r"line 2: 'b slot=2' is not HOST slots=N"),
        ("a slots=2\n\n# x\na slots=2\n", "", r"line 4: a stands there a second time"),
        ("a slots=0\n", "", r"line 1: 'a slots=0'"),
        ("# nobody\n", "", r"names no host"),
        (HOSTS, "procesess: 2", r"unknown key 'procesess' \(did you mean processes\?\); known: platform"),
        (HOSTS, "processes: two", r"launch: processes: 'two' is not a whole number"),
        (HOSTS, "env: [A]", r"launch: env: \['A'\] is not a list of NAME: value"),
    ],
)
def test_a_bad_line_of_a_hostfile_or_recipe_is_named(recipe, hostfile, hosts, more, sentence):
    Path(hostfile).write_text(hosts)
    with pytest.raises(UserError, match=sentence):
        launched("step1_sft", recipe("multi_node", more), "--hostfile", hostfile)


@pytest.mark.parametrize(
    ("kind", "count", "sentence"),
    [
        ("cpu", 0, r"platform single_node .* needs cuda, but torch finds cpu here"),
        ("npu", 8, r"needs cuda, but torch finds npu here"),
        ("cuda", 4, r"the recipe wants 8 devices, this machine shows 4; give --num_gpus 4"),
        ("cuda", 8, None),
    ],
)
def test_a_machine_that_does_not_suit(recipe, monkeypatch, kind, count, sentence):
    monkeypatch.setattr(device, "detect_platform", lambda: device.PLATFORMS[kind])
    monkeypatch.setattr(device, "device_count", lambda: count)
    with pytest.raises(UserError, match=sentence) if sentence else contextlib.nullcontext():
        check_machine(launched("step1_sft", recipe()).options)


def test_a_taken_port_and_missing_tools(recipe, hostfile, monkeypatch, tmp_path):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        launch = launched("step1_sft", recipe("cpu"), "--master_port", str(port))
        with pytest.raises(UserError, match=rf"--master_port {port}: address already in use"):
            check_machine(launch.options)
    check_machine(launch.options)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pdsh is not installed here"):
        check_machine(launched("step1_sft", recipe("multi_node"), "--hostfile", hostfile).options)
    for tool in ("pdsh", "ssh"):
        (tmp_path / tool).write_text("")
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\nnode.invalid slots=1\n")
    with pytest.raises(UserError, match=r"localhost resolves to 127\.0\.0\.1 here, which the other nodes cannot reach"):
        check_machine(launched("step1_sft", recipe("multi_node"), "--hostfile", hostfile).options)
    check_machine(launched("step1_sft", recipe("multi_node"), "--hostfile", hostfile, "--master_addr", "::1").options)
    with pytest.raises(UserError, match=r"node\.invalid, does not resolve; give --master_addr"):
        check_machine(launched("step1_sft", recipe("multi_node"), "--hostfile", hostfile, "--master_addr", "node.invalid").options)
    for tool in ("mpirun", "ompi_info"):
        shutil.copy(tmp_path / "ssh", tmp_path / tool)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv(AS_ROOT[0], "1")
    monkeypatch.delenv(AS_ROOT[1], raising=False)
    words = ["--hostfile", hostfile, "--master_addr", "::1", "--launcher", "openmpi"]
    launch = launched("step1_sft", recipe("multi_node"), *words, GLOO_SOCKET_IFNAME="lo")
    with pytest.raises(UserError, match=rf"mpirun does not run as root unless {AS_ROOT[0]}=1 and {AS_ROOT[1]}=1 are set"):
        check_machine(launch.options)
