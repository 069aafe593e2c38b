"""All three steps in order: supervised fine-tuning, reward model, PPO; or fine-tuning, then DPO.

    python train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type single_gpu
    python train.py --config configs/cpu/demo.yaml --deployment-type cpu --step 1 2 3 --output-dir output/demo
    python train.py --deployment-type single_node --method dpo --dpo-flags "--beta 0.2" --dry-run

Each step runs under the deepspeed launcher; what it prints goes to the terminal and to training.log in the step's
folder: OUTPUT/actor-models/NAME, OUTPUT/reward-models/NAME, OUTPUT/step3-models/NAME, or OUTPUT/dpo-models/NAME for
DPO, which is step 2 then. A step that is done is skipped, unless it was done with other data, flags or code than
are asked for now: then nothing starts before --force or --keep says what to do. At the end report.html in OUTPUT shows
what all steps did: results, answers before and after, curves.
"""

import argparse
import itertools
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from errors import CommandLine, UserError, refuse, told
from scripts.done import differences, done_otherwise, read_done
from scripts.launch.__main__ import passed_on
from scripts.launch.checks import check_data, check_pairs, step_arguments
from scripts.launch.commands import Environment, build_command, build_environment, flags_of
from scripts.launch.options import (
    DEFAULT_HOSTFILE,
    Options,
    build_options,
    find_recipe,
    plain_words,
    read_recipe,
    split_words,
)
from scripts.launch.platforms import load_platforms, platform_named
from scripts.launch.processes import run_to_end, stoppable
from scripts.report.page import write_report
from scripts.report.runs import read_run
from steps import METHODS, SECTIONS, step_of
from training.utils.flags.deepspeed_file import check_keys
from training.utils.flags.recipe import recipe_file
from training.utils.run.environment import DONE, check_writable
from training.utils.run.inputs import check_cpu, check_models, check_resume
from training.utils.run.metrics import format_seconds

CHINESE = """按顺序运行全部三步：监督微调、奖励模型、PPO；或先微调、再 DPO。

    python train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type single_gpu
    python train.py --config configs/cpu/demo.yaml --deployment-type cpu --step 1 2 3 --output-dir output/demo
    python train.py --deployment-type single_node --method dpo --dpo-flags "--beta 0.2" --dry-run

每一步都由 deepspeed 启动器运行；输出显示在终端，并写入该步骤文件夹中的 training.log：OUTPUT/actor-models/NAME、
OUTPUT/reward-models/NAME、OUTPUT/step3-models/NAME；DPO 是第二步，写入 OUTPUT/dpo-models/NAME。已完成的步骤会跳过；若它用的是
别的数据、参数或代码，则先停下，由 --force 或 --keep 决定怎么办。结束时 OUTPUT 中的 report.html 汇总所有步骤：结果、训练前后的
回答、曲线。
"""
ROOT = Path(__file__).resolve().parent
OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")  # stand for facebook/opt-SIZE
DEPLOYMENTS = tuple(load_platforms())


@dataclass
class Step:
    """One step to run: where it writes, which folders of other steps it reads, and its own flags."""

    number: int
    section: str
    folder: Path
    flags: list[str]
    needs: dict[int, Path] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return a title such as ``step 2 (reward model)``."""
        return f"step {self.number} ({step_of(self.section).title})"


# --- what to run ------------------------------------------------------------------------------------------------------


def build_parser() -> CommandLine:
    """Build the parser; DeepSpeed-Chat's train.py and e2e_rlhf.py have the same names."""
    parser = CommandLine("train.py --help lists the flags.", prog="train.py", description=__doc__, zh=CHINESE)
    add = parser.add_argument
    add("--step", type=int, nargs="+", choices=(1, 2, 3), help="steps to run (default: all of the method)",
        zh="要运行的步骤（缺省：该方法的全部步骤）")
    add("--method", choices=tuple(METHODS), default="ppo", help="after step 1: reward model and PPO (default), or DPO",
        zh="第一步之后：奖励模型和 PPO（缺省），或 DPO")
    add("--actor-model", help="hub id or folder, or a size of facebook/opt-*: 1.3b, 6.7b, 13b, 66b, … (default: 1.3b)",
        zh="hub 上的名称、文件夹，或 facebook/opt-* 的大小：1.3b、6.7b、13b、66b……（缺省：1.3b）")
    add("--reward-model", help="what step 2 starts from; same tokenizer as the actor (default: 350m)",
        zh="第二步的起始模型；分词器与 actor 相同（缺省：350m）")
    add("--actor-zero-stage", type=int, choices=range(4), help="ZeRO stage of step 1, of DPO, and of the actor in step 3",
        zh="第一步、DPO 和第三步 actor 的 ZeRO 阶段")
    add("--reward-zero-stage", type=int, choices=range(4), help="ZeRO stage of step 2 and of the critic in step 3",
        zh="第二步和第三步 critic 的 ZeRO 阶段")
    add("--output-dir", help="the three folders of models are made here (default: the recipe's folders, else ./output)",
        zh="在此建立三个模型文件夹（缺省：配方中的文件夹，否则 ./output）")
    add("--deployment-type", choices=DEPLOYMENTS, help="a platform of configs/platforms.yaml (default: single_gpu)",
        zh="configs/platforms.yaml 中的平台（缺省：single_gpu）")
    add("--num-gpus", type=int, help="processes on each node; single_node: all devices unless given",
        zh="每个节点的进程数；single_node 不给时用全部设备")
    add("--hostfile", help="multi_node: lines HOST slots=N, also a single one (default: /job/hostfile)",
        zh="multi_node：若干行 HOST slots=N，也可只有一行（缺省：/job/hostfile）")
    add("--config", help="a recipe: YAML with sections launch, sft, reward, ppo; flags given here win over it",
        zh="配方：含 launch、sft、reward、ppo 各节的 YAML；这里给出的参数优先")
    add("--data-path", nargs="+", help="data of all three steps: named sets, hub ids, files, folders",
        zh="三步共用的数据：内置名称、hub 上的名称、文件、文件夹")
    for section in SECTIONS:
        title, more = step_of(section).title, f"{section} 步骤的更多参数，写成一个带引号的字符串"
        add(f"--{section}-flags", default="", help=f"more flags of {title}, as one quoted string", zh=more)
    add("--resume", action="store_true", help="a step that was cut short continues from its newest whole checkpoint",
        zh="中断的步骤从最新的完整检查点继续")
    add("--force", action="store_true", help="run steps that are done again", zh="重新运行已完成的步骤")
    add("--keep", action="store_true", help="go on with steps that were done with other data, flags or code",
        zh="沿用以别的数据、参数或代码完成的步骤")
    add("--dry-run", action="store_true", help="print what would be skipped and the command lines of the rest, run nothing",
        zh="打印将跳过的步骤和其余步骤的命令行，不运行")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the command line with the recipe's launch section filled in. Raise UserError for what is wrong with them."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(plain_words(argv, parser.flags, rf"--({'|'.join(SECTIONS)})-flags"))
    if unknown:
        flag = unknown[0].replace("_", "-")
        near = parser.nearest_flag(flag)
        raise UserError(
            f"Unknown flag {flag}{f'; did you mean {near}?' if near else '.'} Flags of a step itself go into "
            '--sft-flags, --reward-flags, --ppo-flags or --dpo-flags "…".'
        )
    for section in SECTIONS:
        words = split_words(f"--{section}-flags", getattr(args, f"{section}_flags"))
        setattr(args, f"{section}_flags", words)
        refuse(  # where a finished step and the next one's input are looked for
            any(re.fullmatch(r"--output[_-]dir(=.*)?", word) for word in words),
            f"--{section}-flags: --output_dir cannot be passed on to a step; give --output-dir, under which each step has "
            "its folder, or output_dir in the recipe's sections.",
        )
    read_config(args)
    args.step = sorted(set(args.step or numbered(args.method)))
    check_method(args)
    return args


def read_config(args: argparse.Namespace) -> None:
    """Fill in the recipe, and what its launch section says where the command line does not."""
    if args.config is None and (recipe := known_recipe(args)):
        args.config, args.actor_model = recipe, None
    if args.config and (path := find_recipe(args.config, args.deployment_type)) != Path(args.config).resolve():
        args.config = str(path)
    args.recipe = read_recipe(args.config) if args.config else {}
    refuse(
        args.config and not set(SECTIONS) & args.recipe.keys(),
        f"--config {args.config}: train.py needs sections launch, sft, reward and ppo, or dpo, with flags.",
    )
    launch = args.recipe.get("launch", {})
    deployment = args.deployment_type or launch.get("deployment_type") or launch.get("platform") or "single_gpu"
    args.deployment_type = platform_named(deployment).name
    refuse(
        args.hostfile and platform_named(args.deployment_type).deployment != "multi_node",
        f"--hostfile has no effect with --deployment-type {args.deployment_type}; add --deployment-type multi_node, or drop it.",
    )
    args.num_gpus = launch.get("processes") if args.num_gpus is None else args.num_gpus
    args.hostfile = args.hostfile or launch.get("hostfile")


def numbered(method: str) -> dict[int, str]:
    """Return the sections of a method by the number of their step."""
    return {step_of(section).number: section for section in METHODS[method]}


def check_method(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict, and for steps and flags that the method does not have."""
    refuse(
        args.force and args.resume,
        "--force runs a step from its beginning, --resume from its checkpoint; drop one of the two.",
    )
    refuse(args.force and args.keep, "--force runs finished steps again, --keep leaves them; drop one of the two.")
    wrong = args.num_gpus is not None and args.num_gpus < 1
    refuse(wrong, f"--num-gpus {args.num_gpus} is not a number of processes; give 1 or more.")
    refuse(
        args.step[-1] not in numbered(args.method),
        "--step 3 with --method dpo: DPO takes the place of steps 2 and 3; it is --step 2.",
    )
    others = {"ppo": ("dpo_flags",), "dpo": ("reward_model", "reward_zero_stage", "reward_flags", "ppo_flags")}
    for name in others[args.method]:
        flag, given = name.replace("_", "-"), getattr(args, name) not in (None, [])
        refuse(given, f"--{flag} has no effect with --method {args.method}; drop one of the two.")


def known_recipe(args: argparse.Namespace) -> str | None:
    """Return the recipe of --deployment-type for an --actor-model that is neither a folder nor a hub id but a recipe's name."""
    name = args.actor_model
    if not name or "/" in name or name in OPT_SIZES or Path(name).exists():
        return None
    path = ROOT / "configs" / (args.deployment_type or "single_gpu") / f"{name}.yaml"
    return str(path) if recipe_file(path) else None


def model_name(model: str) -> str:
    """Return what a model's folder is called: 1.3b for facebook/opt-1.3b as in DeepSpeed-Chat, else the path's last part."""
    return model.removeprefix("facebook/opt-") if model.startswith("facebook/opt-") else Path(model).resolve().name


def starting_flags(deployment_type: str, section: str) -> list[str]:
    """Return the flags of a step without a recipe, by the number of devices."""
    text = (ROOT / "configs" / "starting_flags.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)[platform_named(deployment_type).deployment].get(section, "").split()


def plan(args: argparse.Namespace) -> list[Step]:
    """Return the steps to run with all their flags."""
    recipe = {section: args.recipe.get(section, {}) for section in SECTIONS}
    actor = args.actor_model or recipe["sft"].get("model_name_or_path") or "1.3b"
    reward = args.reward_model or recipe["reward"].get("model_name_or_path") or "350m"
    actor, reward = (f"facebook/opt-{model}" if model in OPT_SIZES else str(model) for model in (actor, reward))
    folders = {}
    for section in SECTIONS:
        name = model_name(reward if section == "reward" else actor)
        made = Path(args.output_dir or "./output", step_of(section).folder, name)
        folders[section] = made if args.output_dir else Path(recipe[section].get("output_dir", made))
    sft, critic = folders["sft"], folders["reward"]
    if not args.reward_model and reward == recipe["sft"].get("output_dir"):
        reward = str(sft)  # the recipe's reward model starts from its SFT model
    needs = {"ppo": {1: sft, 2: critic}, "dpo": {1: sft}, "reward": {1: sft} if Path(reward) == sft else {}}
    models = {
        "sft": {"model_name_or_path": actor, "zero_stage": args.actor_zero_stage},
        "reward": {"model_name_or_path": reward, "zero_stage": args.reward_zero_stage},
        "ppo": {
            "actor_model_name_or_path": sft,
            "actor_zero_stage": args.actor_zero_stage,
            "critic_model_name_or_path": critic,
            "critic_zero_stage": args.reward_zero_stage,
        },
        "dpo": {"model_name_or_path": sft, "zero_stage": args.actor_zero_stage},
    }
    steps = []
    for number in args.step:
        section = numbered(args.method)[number]
        flags = ["--config", args.config] if args.config else starting_flags(args.deployment_type, section)
        flags += flags_of(**models[section], output_dir=folders[section])
        flags += ["--data_path", *args.data_path] if args.data_path else []
        flags += ["--resume"] if args.resume else []
        flags += getattr(args, f"{section}_flags")  # last, so that it wins
        steps.append(Step(number, section, folders[section], flags, needs.get(section, {})))
    return steps


def options(args: argparse.Namespace) -> Options:
    """Return where the processes run. The type says how many there are; a recipe written for another machine with as many
    devices, a node of DCUs say, brings that machine's environment.
    """
    launch = args.recipe.get("launch", {})
    platform = platform_named(args.deployment_type)
    several = platform.deployment == "multi_node"
    every = several or platform.deployment == "single_node"  # all devices of a node
    given = argparse.Namespace(num_gpus=args.num_gpus, hostfile=args.hostfile if several else None)
    if not several:
        launch = {key: value for key, value in launch.items() if key in ("platform", "master_port", "env")}
    written_for = platform_named(launch.get("platform") or platform.name)
    if "cpu" not in (platform.accelerator, written_for.accelerator):
        platform = replace(written_for, nodes=platform.nodes)
    chosen = build_options(platform, given, launch, {}, processes=None if every else 1)
    if platform.accelerator == "cpu":
        chosen.env["DS_ACCELERATOR"] = "cpu"
    return chosen


def launch_command(step: Step, args: argparse.Namespace) -> list[str]:
    """Return the launcher around a step."""
    return build_command(options(args), step_of(step.section).module, step.flags)


def environment(args: argparse.Namespace) -> Environment:
    """Return the environment of a step: the platform's variables, the recipe's, and the modules of this repository."""
    return build_environment(options(args))


# --- may it run? ------------------------------------------------------------------------------------------------------


def choose(steps: list[Step], args: argparse.Namespace) -> list[Step]:
    """Return the steps that are not done, or whose inputs are made anew. Print which ones are skipped.

    With new inputs a step begins anew, --resume or not: a checkpoint of it belongs to the old ones. Raise UserError for steps
    that were done in another way than asked, unless --keep or --force is given.
    """
    chosen, others = [], []
    for step in steps:
        if step.needs.keys() & {other.number for other in chosen}:
            chosen.append(replace(step, flags=[flag for flag in step.flags if flag != "--resume"]))
        elif args.force or (done := read_done(step.folder)) is None:
            chosen.append(step)
        else:
            different = differences(step_arguments(step_of(step.section), step.flags), done)
            others += [done_otherwise(step.title, step.folder, different)] if different else []
            note = f"kept although {different}" if different else "--force runs it again"
            if args.keep or not different:
                print(f"{'# ' if args.dry_run else ''}{step.title} is done: {step.folder} ({note})", flush=True)
    refuse(
        others and not args.keep,
        f"{' '.join(others)} --force trains again, --keep goes on with what is there, another --output-dir leaves it alone.",
    )
    return chosen


def check_files(chosen: list[Step], args: argparse.Namespace, dry_run: bool = False) -> None:
    """Raise UserError for what files and flags alone tell, without torch: data, models, what steps need of each other.

    dry_run: nothing is written or fetched.
    """
    running = {step.number for step in chosen}
    arguments = [step_arguments(step_of(step.section), step.flags) for step in chosen]
    made = {step.folder: one.models.get("model") for step, one in zip(chosen, arguments, strict=True)}
    for one in arguments:
        check_data(one)
    for step, one in zip(chosen, arguments, strict=True):
        for number, folder in step.needs.items():
            refuse(
                number not in running and not (folder / "config.json").is_file(),
                f"{step.title} needs {folder}, which step {number} makes; run it first: python train.py {again(args, number)}",
            )
        if not dry_run:
            check_writable(step.folder)
        try:
            if args.deployment_type == "cpu":
                check_cpu(one)
            check_models(one, made, ask_hub=not dry_run)
        except UserError as error:
            raise UserError(f"{step.title}: {error}") from error
        check_resume(one)


def check_inputs(chosen: list[Step], args: argparse.Namespace) -> None:
    """Raise UserError for what would end a later step after hours: wrong flags, missing data or models, two tokenizers; no
    device, no hostfile.
    """
    check_files(chosen, args)
    several, hostfile = args.deployment_type == "multi_node", args.hostfile or DEFAULT_HOSTFILE
    absent = several and not Path(hostfile).is_file()
    refuse(absent, f"--deployment-type multi_node needs --hostfile; there is no {hostfile}.")

    # Importing torch and transformers takes seconds: what can be told without them has been.
    from models.device import detect_platform

    if not several and args.deployment_type != "cpu" and detect_platform().name == "cpu":
        raise UserError(f"--deployment-type {args.deployment_type}: no accelerator found here; use cpu.")
    arguments = [step_arguments(step_of(step.section), step.flags) for step in chosen]
    for one in arguments:
        check_keys(one)
    from models.tokenizer import check_same_tokenizer, load_tokenizer

    made = {step.folder for step in chosen}
    models = dict.fromkeys(str(path) for one in arguments for path in one.models.values())
    tokenizers = {path: load_tokenizer(path) for path in models if Path(path) not in made}
    for (first, one), (second, other) in itertools.pairwise(tokenizers.items()):
        check_same_tokenizer(one, other, (first, second))
    for step, one in zip(chosen, arguments, strict=True):
        if step.section in ("reward", "dpo"):
            check_pairs(one)


def again(args: argparse.Namespace, number: int) -> str:
    """Return the flags that run another step of the same pipeline."""
    words = ["--step", str(number), *(["--method", args.method] if args.method != "ppo" else [])]
    for flag in ("actor_model", "reward_model", "deployment_type", "num_gpus", "hostfile", "config", "output_dir"):
        if getattr(args, flag) is not None:
            words += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    return shlex.join(words)


# --- run --------------------------------------------------------------------------------------------------------------


def show(steps: list[Step], args: argparse.Namespace) -> None:
    """Print which steps would be skipped, and the command line of each other one. Raise UserError as a run would for flags and
    files.
    """
    chosen = choose(steps, args)
    check_files(chosen, args, dry_run=True)
    for step in chosen:
        variables = environment(args).variables.items()
        prefix = ["env", *(f"{name}={value}" for name, value in variables if not name.startswith("PYTHON"))]
        print(f"# {step.title} -> {step.folder}\n{shlex.join([*prefix, *launch_command(step, args)])}")


@stoppable
def run(steps: list[Step], args: argparse.Namespace) -> int:
    """Run the steps that are not done; return the exit code."""
    chosen = choose(steps, args)
    check_inputs(chosen, args)
    times = []
    for step in chosen:
        command = launch_command(step, args)
        print(f"\n=== {step.title} -> {step.folder}\n{shlex.join(command)}", flush=True)
        env, log = passed_on(environment(args), step.folder), step.folder / "training.log"
        code, seconds = run_to_end(step.title, command, env, log, step.folder / DONE)
        if code:
            return code
        times.append(f"{step.title:32} {format_seconds(seconds):>9}   {step.folder}")
        print(f"=== {step.title} took {format_seconds(seconds)}", flush=True)
    print("\n".join(times))
    print(report(args))
    if steps[-1].section != "reward":
        print(f"Talk to it: python chat.py --path {shlex.quote(str(steps[-1].folder))}")
    return 0


def report(args: argparse.Namespace) -> str:
    """Write one page about all steps of the method, also those of earlier calls. Return where it is, or why it is not."""
    steps = plan(argparse.Namespace(**vars(args) | {"step": sorted(numbered(args.method))}))
    folder = Path(os.path.commonpath([step.folder.resolve() for step in steps]))
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    try:
        write_report(folder, [read_run(step.folder, step.section) for step in steps], folder / "report.html")
    except UserError as error:  # the models are there all the same
        return f"No report: {error}"
    return f"Report: {folder / 'report.html'}"


@told
def main(argv: list[str] | None = None) -> int:
    """Run the steps; return the exit code: 0, 2 for wrong input, that of a step that failed, 128 + signal."""
    args = parse(sys.argv[1:] if argv is None else argv)
    steps = plan(args)
    if args.dry_run:
        show(steps, args)
        return 0
    return run(steps, args)


if __name__ == "__main__":
    sys.exit(main())
