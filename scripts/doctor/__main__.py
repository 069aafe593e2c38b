"""Is this machine ready? Platform, versions, dtypes, memory, disk, hosts, variables - each with what to do.

    python -m scripts.doctor
    python -m scripts.doctor --recipe configs/dcu_z100l/chatglm-6b.yaml
    python -m scripts.doctor --platform multi_node --hostfile hosts --json

Nothing is changed and no card is needed. With a recipe also: does each step fit into memory and on the disk.
Exit code: 0 all well, 1 warnings, 2 something will fail (or wrong flags). More about the installation, to put into a
report: python -m torch.utils.collect_env, and ds_report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict, replace

from errors import UserError, told
from scripts.doctor import cluster, machine, versions
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation, probe
from scripts.launch.hostfile import read_hostfile
from scripts.launch.options import LAUNCHERS, find_recipe, options_of, read_recipe
from scripts.launch.platforms import load_platforms, platform_named
from training.utils.flags.recipe import Recipe

WORDS = {OK: "ok", WARN: "WARN", FAIL: "FAIL", SKIP: "skipped"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the doctor's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", metavar="FILE", help="a recipe, or PLATFORM/MODEL: what the run will ask for")
    add("--platform", metavar="NAME", help=f"a machine of configs/platforms.yaml: {', '.join(load_platforms())}")
    add("--hostfile", metavar="FILE", help="lines HOST slots=N: each host is asked over ssh")
    add("--launcher", choices=LAUNCHERS, help="how several nodes will be started (default: the recipe's, else pdsh)")
    add("--num-gpus", "--num_gpus", type=int, metavar="N", help="processes on each node, as for the launchers")
    add("--no-ssh", "--no_ssh", action="store_true", default=None, help="every node is started by hand")
    add("--master-addr", "--master_addr", help="address of the first node")
    add("--master-port", "--master_port", type=int, help="port of the first node")
    add("--ssh-port", "--ssh_port", type=int, help="where sshd listens on the other nodes")
    add(
        "--build",
        choices=("cpu_adam", "fused_adam"),
        help="also build this optimizer of DeepSpeed (minutes the first time)",
    )
    add(
        "--timeout",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="for one host (default 20); probes of torch: ten times it",
    )
    add("--json", action="store_true", help="the same as JSON")
    return parser


def situation_of(args: argparse.Namespace) -> tuple[Situation, list[Check]]:
    """Return what is asked for, and what is wrong with it. Raise UserError for an unknown recipe or platform."""
    from scripts.launch.__main__ import build_parser as launch_parser

    if not 0 < args.timeout < 3600:
        raise UserError(f"--timeout {args.timeout:g}: give a number of seconds, for instance 20.")
    situation, launch = Situation(dict(os.environ), args.timeout), {}
    if args.recipe:
        path = str(find_recipe(args.recipe))
        situation.recipe = Recipe(path, read_recipe(path))
        launch = situation.recipe.launch
    name = args.platform or launch.get("platform")
    if name is None:
        return situation, []
    situation.platform = platform_named(name)
    options = launch_parser().parse_args([])
    for key in ("platform", "launcher", "num_gpus", "no_ssh", "master_addr", "master_port", "ssh_port"):
        setattr(options, key, getattr(args, key))
    with contextlib.suppress(UserError):  # a bad hostfile has a check of its own
        options.hostfile = args.hostfile if args.hostfile and read_hostfile(args.hostfile) else None
    try:
        situation.options = options_of(options, launch, args.recipe or "--platform", situation.environ)
    except UserError as error:
        return situation, [Check("recipe", "launch", FAIL, str(error), "correct the recipe, the flag or the variable")]
    return situation, [Check("recipe", "launch", OK, situation.platform.title)]


def examine(situation: Situation, args: argparse.Namespace) -> list[Check]:
    """Return all findings but those of the request itself."""
    environ, platform = situation.environ, situation.platform
    if platform and not environ.get("DS_ACCELERATOR"):  # as the launchers do
        environ = {**environ, "DS_ACCELERATOR": platform.accelerator}
    vendor = [situation.vendor] if platform else []
    facts, why = probe("facts", *vendor, situation=replace(situation, environ=environ))
    situation.facts = facts or {"error": why}
    plans = {}
    if situation.recipe and situation.options and facts:
        from scripts.plan.section import plan_sections  # imports torch

        plans = plan_sections(situation.recipe, platform, machine.run_machine(situation))
    hostfile = args.hostfile or (situation.options.hostfile if situation.options else None)
    hostfile_checks, hosts = cluster.check_hostfile(hostfile, situation)
    # The processes of the sum find what the launcher sets, on the device that is here.
    own = {name: value for name, value in (platform.env if platform else {}).items() if "$" not in value}
    own |= situation.environ | (situation.options.env if situation.options else {})
    during = replace(situation, environ=own | {"DS_ACCELERATOR": situation.facts.get("torch_device", "cpu")})
    return [
        *machine.check_platform(situation),
        *versions.check_versions(situation),
        *machine.check_dtype(situation),
        *machine.check_operators(situation, plans),
        *(machine.check_build(args.build, situation) if args.build else []),
        *machine.check_memory(plans),
        *machine.check_disk(situation, plans),
        *machine.check_shm(),
        *machine.check_all_reduce(during),
        *hostfile_checks,
        *cluster.check_ports(situation),
        *cluster.check_hosts(situation, hosts),
        *cluster.check_forwarded(situation),
        *cluster.check_spelling(situation.environ),
        *cluster.check_visible(situation),
    ]


def table(checks: list[Check]) -> str:
    """Return the report for people: one line a finding, and under it what to do."""
    width = max(len(f"{check.group}: {check.name}") for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{WORDS[check.state]:<8}{f'{check.group}: {check.name}':<{width}}  {' '.join(check.why.split())}")
        lines += [f"{'':<{8 + width}}  -> {' '.join(check.todo.split())}"] if check.todo else []
    counts = {state: sum(check.state == state for check in checks) for state in WORDS}
    counted = f"{counts[OK]} ok, {counts[WARN]} warnings, {counts[FAIL]} failures, {counts[SKIP]} skipped"
    return "\n".join([*lines, "", counted, "more about the installation: python -m torch.utils.collect_env; ds_report"])


def main(argv: list[str] | None = None) -> int:
    """Look at everything and print it. Return the exit code."""
    args = build_parser().parse_args(argv)
    situation, checks = situation_of(args)
    checks += examine(situation, args)
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
