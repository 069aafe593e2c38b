"""Is this machine ready? Platform, versions, dtypes, memory, disk, hosts, variables - each with what to do.

    python -m scripts.doctor
    python -m scripts.doctor --recipe configs/dcu_z100l/chatglm-6b.yaml
    python -m scripts.doctor --platform multi_node --hostfile hosts --json

Nothing is changed and no card is needed. With a recipe also: does each step fit into memory and on the disk. What takes
time runs side by side, each with a limit (--timeout). Exit code: 0 all well, 1 warnings, 2 something will fail (or wrong
flags). More about the installation, to put into a report: python -m torch.utils.collect_env, and ds_report.
"""

import argparse
import json
import os
import sys
from concurrent import futures
from dataclasses import asdict

from errors import CommandLine, UserError, refuse, told
from scripts.doctor import cluster, machine, versions
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation, probe, refused, started
from scripts.launch.commands import build_environment
from scripts.launch.hostfile import read_hostfile
from scripts.launch.options import add_flags, find_recipe, options_of, plain_words, read_recipe
from scripts.launch.platforms import platform_named
from training.utils.flags.recipe import Recipe

WORDS = {OK: "ok", WARN: "WARN", FAIL: "FAIL", SKIP: "skipped"}


CHINESE = """这台机器准备好了吗？平台、版本、精度、内存、磁盘、主机、环境变量，各带处理办法。

    python -m scripts.doctor
    python -m scripts.doctor --recipe configs/dcu_z100l/chatglm-6b.yaml
    python -m scripts.doctor --platform multi_node --hostfile hosts --json

不改动任何东西，也不需要显卡。给出配方时还检查：每一步的内存和磁盘是否够用。
退出码：0 一切正常，1 有警告，2 有会失败之处（或参数有误）。关于安装的更多信息，报告问题时附上：
python -m torch.utils.collect_env 和 ds_report。
"""


def build_parser() -> CommandLine:
    """Return the parser: the doctor's flags, and those of the launcher."""
    parser = CommandLine("--help lists the flags.", prog="python -m scripts.doctor", description=__doc__, zh=CHINESE)
    add = parser.add_argument
    recipe, zh = "a recipe, or PLATFORM/MODEL: what the run will ask for", "配方，或 PLATFORM/MODEL：运行将要求什么"
    add("--recipe", metavar="FILE", help=recipe, zh=zh)
    limit, zh = "for one host (default 20); probes of torch: ten times it", "每台主机的时限（缺省 20 秒）；torch 的检查为其十倍"
    add("--timeout", type=float, default=20.0, metavar="SECONDS", help=limit, zh=zh)
    add("--json", action="store_true", help="the same as JSON", zh="以 JSON 输出")
    add_flags(parser)
    return parser


def situation_of(args: argparse.Namespace) -> tuple[Situation, list[Check], dict[str, int]]:
    """Return what is asked for, findings about that, and the hosts.

    Raise UserError for an unknown recipe or platform, a wrong flag, and a hostfile that cannot be read.
    """
    if not 0 < args.timeout < 3600:
        raise UserError(f"--timeout {args.timeout:g}: give a number of seconds, for instance 20.")
    situation, checks = Situation(dict(os.environ), args.timeout), []
    if args.recipe:
        path = str(find_recipe(args.recipe, args.platform))
        situation.recipe = Recipe(path, read_recipe(path))
    launch = situation.recipe.launch if situation.recipe else {}
    name = args.platform or launch.get("platform")
    situation.platform = platform_named(name) if name else None
    hosts = read_hostfile(args.hostfile) if args.hostfile else {}
    if situation.platform:
        situation.options = options_of(args, launch, args.recipe or "--platform", situation.environ)
        try:
            situation.environment = build_environment(situation.options, situation.environ)
            checks.append(Check("recipe", "launch", OK, situation.platform.title))
        except UserError as error:
            checks.append(refused("recipe", "launch", error))
    hosts = situation.options.hosts if situation.options else hosts
    return situation, [*checks, *cluster.check_hostfile(situation, hosts)], hosts


def examine(situation: Situation, hosts: dict[str, int]) -> list[Check]:
    """Return all findings but those about the request itself. All that takes time runs side by side."""
    ports = cluster.check_ports(situation) if situation.platform else []  # before check_hosts listens on one
    asked_hosts = started(cluster.check_hosts, situation, hosts)
    packages = started(probe, "packages", situation=situation)
    facts, why = probe("facts", *([situation.vendor] if situation.platform else []), situation=situation)
    situation.facts = facts or {"error": why}
    reduced = started(machine.check_all_reduce, situation)
    planned = started(machine.plans_of, situation)
    found, why = packages.result()
    situation.facts |= found or {"import": dict.fromkeys(("deepspeed", "transformers"), why)}
    limit = 10 * situation.seconds
    try:
        plans, late = planned.result(limit), []
    except futures.TimeoutError:  # another class than Python's own before 3.11
        todo = "give a longer --timeout, or look at what else runs here"
        plans, late = {}, [Check("memory", "plan", WARN, f"it did not end within {limit:g} seconds", todo)]
    return [
        *machine.check_platform(situation),
        *versions.check_versions(situation),
        *machine.check_dtype(situation),
        *(late or machine.check_memory(plans)),
        *machine.check_disk(situation, plans),
        machine.check_shm(),
        reduced.result(),
        *(ports or cluster.check_ports(situation)),
        *asked_hosts.result(),
        cluster.check_forwarded(situation),
        *cluster.check_spelling(situation.environ),
        *cluster.check_visible(situation),
    ]


def lines_of(checks: list[Check]) -> list[str]:
    """Return findings for people: one line each, and under it what to do."""
    width = max(len(f"{check.group}: {check.name}") for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{WORDS[check.state]:<8}{f'{check.group}: {check.name}':<{width}}  {' '.join(check.why.split())}")
        lines += [f"{'':<{8 + width}}  -> {' '.join(check.todo.split())}"] if check.todo else []
    return lines


def table(checks: list[Check]) -> str:
    """Return the report for people: the findings, and how many there are of each state."""
    counts = {state: sum(check.state == state for check in checks) for state in WORDS}
    counted = f"{counts[OK]} ok, {counts[WARN]} warnings, {counts[FAIL]} failures, {counts[SKIP]} skipped"
    return "\n".join([*lines_of(checks), "", counted, "more about the installation: python -m torch.utils.collect_env; ds_report"])


def main(argv: list[str] | None = None) -> int:
    """Look at everything and print it. Return the exit code."""
    parser = build_parser()
    words = plain_words(sys.argv[1:] if argv is None else argv, parser.flags, "--launcher-args")
    gone = any(word.split("=")[0] == "--build" for word in words)
    refuse(gone, "--build is gone: ds_report says which optimizers DeepSpeed can build, and a run builds its own; drop it.")
    args = parser.parse_args(words)
    situation, checks, hosts = situation_of(args)
    early = machine.check_models(situation.recipe) if situation.recipe and not args.json else []
    if early:  # the rest takes half a minute
        print("\n".join([*lines_of(early), "", "looking at the rest …"]), file=sys.stderr, flush=True)
    checks += examine(situation, hosts)
    states = {check.state for check in checks}
    code = 2 if FAIL in states else 1 if WARN in states else 0
    if args.json:
        report = {"exit_code": code, "checks": [asdict(check) for check in checks]}
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print(table(checks))
    return code


if __name__ == "__main__":
    sys.exit(told(main)())
