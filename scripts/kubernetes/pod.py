"""The commands that the pods of a Kubernetes job run: steps in order, a wait for an earlier step, the downloads.

    python -m scripts.pod run --recipe configs/cpu/demo.yaml --step 1 2 3 --workdir /workspace -- torchrun -m
    python -m scripts.pod wait --folder output/sft --minutes 30
    python -m scripts.pod download --model facebook/opt-1.3b --dataset Dahoas/rm-static

`run` starts every step as LAUNCHER MODULE --config RECIPE --resume …; the words after -- are the launcher, with $NAME
filled in from the environment. A step that has ended well left sanbu_done.json in its folder and is skipped. If it was
done with other flags, data or code than are asked for now, nothing starts. All pods of a job run the same command and
see the same folders, so all agree on what is done.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from errors import CommandLine, UserError, in_language, refuse, told
from scripts.done import differences, done_otherwise, read_done
from scripts.launch.checks import step_arguments
from steps import STEPS, Step
from training.utils.flags.recipe import Recipe
from training.utils.run.environment import DONE

STEP_OF = {step.choice: step for step in STEPS}
USUAL_FLAGS = ["--resume", "--enable_tensorboard"]  # without a checkpoint --resume starts at the beginning
PATIENCE = 120.0  # seconds until a file that another node wrote is seen: NFS keeps "no such file" for a minute
NOT_WEIGHTS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "*.tflite", "*.gguf"]  # other programs' copies of a model


def wait_for(folders: list[str], seconds: float, pause: float = 10.0) -> None:
    """Return when every folder has its marker. Raise UserError with the missing ones when the time is over."""
    deadline = time.monotonic() + seconds
    announced = False
    while missing := [folder for folder in folders if not (Path(folder) / DONE).is_file()]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(
                f"{' and '.join(missing)}: no {DONE} after {seconds / 60:g} minutes, so the step that writes there has not "
                "ended; start this one when it has, or run all steps in one job (3-train.yaml)."
            )
        if not announced:
            print(f"waiting for {DONE} in {', '.join(missing)}, at most {seconds / 60:g} minutes", flush=True)
            announced = True
        time.sleep(min(pause, left))


def launch(command: list[str]) -> int:
    """Run a command to its end. Return its exit code, or 128 + N for signal N, also for a signal that this pod got.

    SIGTERM and SIGINT are passed on: process 1 of a container has no default action for them, so the step would never
    hear that it must end.
    """
    received: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, _frame: Any) -> None:
        received.append(number)
        if process is not None:
            signal_step(process, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            process = subprocess.Popen(command)
        except OSError as error:
            raise UserError(f"{command[0]}: {error.strerror}; the image lacks it, or it is not on PATH.") from error
        for number in received:
            signal_step(process, number)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[-1]  # whatever the launcher makes of it; and no further step begins
    return 128 - code if code < 0 else code


def signal_step(launcher: subprocess.Popen, number: int) -> None:
    """Send a signal to the step's own processes, or to the launcher where it has none here.

    Launchers kill their processes 30 seconds after a signal of their own, too soon for the checkpoint of a large model.
    """
    import psutil

    def is_rank(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            return "LOCAL_RANK" in process.environ()
        return False

    delivered, below = False, []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(launcher.pid).children(recursive=True)
    ranks = {process.pid for process in below if is_rank(process)}
    for process in below:
        with contextlib.suppress(psutil.Error):  # one that has just ended must not keep the signal from the others
            if process.pid in ranks and process.ppid() not in ranks:  # data workers inherit the variables of their rank
                process.send_signal(number)
                delivered = True
    if not delivered and launcher.poll() is None:
        launcher.send_signal(number)


def flags_of_step(args: argparse.Namespace) -> list[str]:
    """Return the flags that every step gets behind its module."""
    return ["--config", args.recipe, *USUAL_FLAGS, *shlex.split(args.flags)]


def check_done(steps: list[Step], recipe: Recipe, args: argparse.Namespace) -> None:
    """Raise UserError for steps that were done with other flags, data or code than asked, unless --keep is given."""
    others = []
    for step in steps:
        folder = Path(recipe.output(step.section))
        if (done := read_done(folder)) and (different := differences(step_arguments(step, flags_of_step(args)), done)):
            others.append(done_otherwise(f"step {step.choice} ({step.section})", folder, different))
    way_out = "Delete the folder to train again; --keep goes on with what is there, another output_dir leaves it alone."
    refuse(others and not args.keep, f"{' '.join(others)} {way_out}")


def is_done(marker: Path, inputs: list[str]) -> bool:
    """Return whether a step has its marker, and no marker of a step whose model it read is newer."""
    markers = [one for one in (Path(folder) / DONE for folder in inputs) if one.is_file()]
    return marker.is_file() and all(one.stat().st_mtime <= marker.stat().st_mtime for one in markers)


def run(args: argparse.Namespace, launcher: list[str]) -> int:
    """Run the steps in order. Return the first exit code that is not 0."""
    recipe, steps = Recipe.read(args.recipe), [STEP_OF[choice] for choice in args.step]
    check_done(steps, recipe, args)
    for step in steps:
        marker = Path(recipe.output(step.section)) / DONE
        label = f"step {step.choice} ({step.section})"
        if is_done(marker, recipe.inputs(step.section)):
            print(f"{label} is done: {marker.parent} (remove {marker} to run it again)", flush=True)
            continue
        wait_for(recipe.inputs(step.section), args.wait_minutes * 60)
        words = [os.path.expandvars(word) for word in launcher]
        # A step that ended before its input was made anew begins anew: its checkpoints belong to the old models.
        flags = [flag for flag in flags_of_step(args) if not marker.is_file() or flag != "--resume"]
        ended = marker.stat().st_mtime if marker.is_file() else 0.0
        command = [*words, step.module, *flags]
        print(f"{label} -> {marker.parent}\n{shlex.join(command)}", flush=True)
        code = launch(command)
        if code:
            print(f"error: {label} ended with exit code {code}.", file=sys.stderr, flush=True)
            return code
        deadline = time.monotonic() + args.patience
        while not marker.is_file() or marker.stat().st_mtime <= ended:
            if time.monotonic() > deadline:  # DeepSpeed's launcher ends with 0 when a signal has killed its child
                print(f"error: {label} did not write {marker}, so it did not come to its end.", file=sys.stderr, flush=True)
                return 1
            time.sleep(1)
    return 0


def download(models: list[str], datasets: list[str]) -> int:
    """Fetch models into the hub's cache (HF_HOME) and data sets into datasets/; leave what is there already."""
    from huggingface_hub import snapshot_download

    from scripts import download_dataset
    from training.utils.data.paths import download_folder

    for model in models:
        try:
            folder = snapshot_download(model, ignore_patterns=NOT_WEIGHTS)
        except Exception as error:  # whatever the hub client raises becomes one sentence with its own words in it
            raise UserError(
                f"--model {model} could not be fetched ({' '.join(str(error).split())}); check the id, the network and, for a "
                "model that asks for an agreement, the token in HF_TOKEN."
            ) from error
        print(f"{model}: {folder}", flush=True)
    for name in datasets:
        if download_folder(name).is_dir():
            print(f"{name}: {download_folder(name)} is there already", flush=True)
        else:
            download_dataset.download(name)
    return 0


CHINESE = """Kubernetes 作业的 Pod 所运行的命令：按顺序运行步骤、等待前一步骤、下载。

    python -m scripts.pod run --recipe configs/cpu/demo.yaml --step 1 2 3 --workdir /workspace -- torchrun -m
    python -m scripts.pod wait --folder output/sft --minutes 30
    python -m scripts.pod download --model facebook/opt-1.3b --dataset Dahoas/rm-static

run 以 LAUNCHER MODULE --config RECIPE --resume … 启动每个步骤；-- 之后的词是启动器，其中 $NAME 取自环境变量。正常结束的步骤在其
文件夹中留下 sanbu_done.json，之后跳过。若它用的是别的参数、数据或代码，则什么也不启动。一个作业的所有 Pod 运行同一命令、看到同样的
文件夹，因此对哪些步骤已完成看法一致。
"""


def build_parser() -> CommandLine:
    """Build the parser of run, wait and download."""
    advice = "--help lists commands and flags."
    parser = CommandLine(advice, prog="python -m scripts.pod", description=__doc__, zh=CHINESE)
    kinds = {"dest": "command", "required": True, "metavar": "run|wait|download"}
    commands = parser.add_subparsers(parser_class=partial(CommandLine, advice), **kinds)
    one = commands.add_parser("run", help=in_language("run steps of a recipe, in order", "按顺序运行配方的步骤"))
    one.add_argument("--recipe", required=True, help="YAML with sections sft, reward, ppo",
        zh="含 sft、reward、ppo 各节的 YAML")
    one.add_argument("--step", nargs="+", required=True, choices=tuple(STEP_OF), help="steps, in this order",
        zh="要运行的步骤，按此顺序")
    one.add_argument("--wait-minutes", type=float, default=0, help="how long the step before may still take (default: 0)",
        zh="前一步骤还可用多少分钟（缺省：0）")
    one.add_argument("--keep", action="store_true", help="go on with steps that were done with other flags, data or code",
        zh="沿用以别的参数、数据或代码完成的步骤")
    one.add_argument("--flags", default="", help="more flags of the steps, as one quoted string",
        zh="步骤的更多参数，写成一个带引号的字符串")
    one.add_argument("--patience", type=float, default=PATIENCE, help=argparse.SUPPRESS)
    one = commands.add_parser("wait", help=in_language(f"wait until the folders have their {DONE}", f"等到各文件夹中有 {DONE}"))
    one.add_argument("--folder", nargs="+", required=True, help="output folders of steps", zh="步骤的输出文件夹")
    one.add_argument("--minutes", type=float, default=0, help="wait at most this long (default: look once)",
        zh="最多等待的分钟数（缺省：只看一次）")
    one = commands.add_parser("download", help=in_language("fetch models and data sets of the hub", "下载 hub 上的模型和数据集"))
    one.add_argument("--model", nargs="+", default=[], help="hub ids", zh="hub 上的名称")
    one.add_argument("--dataset", nargs="+", default=[], help="named sets, hub ids, or ID:CONFIG",
        zh="内置名称、hub 上的名称，或 ID:CONFIG")
    for one in commands.choices.values():
        one.add_argument("--workdir", help="change to this folder first", zh="先进入该文件夹")
    return parser


@told
def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 2 for wrong input or a wait without end, that of a step that failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args, launcher = build_parser().parse_args(words[:cut]), words[cut + 1 :]
    if args.workdir:
        try:
            os.chdir(args.workdir)
        except OSError as error:
            raise UserError(f"--workdir {args.workdir}: {error.strerror}; mount the volume there.") from error
    if args.command == "wait":
        wait_for(args.folder, args.minutes * 60)
        return 0
    if args.command == "download":
        return download(args.model, args.dataset)
    if not launcher:
        raise UserError("run needs a launcher after --, such as: -- torchrun -m")
    return run(args, launcher)


if __name__ == "__main__":
    sys.exit(main())
