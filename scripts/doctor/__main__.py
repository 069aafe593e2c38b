"""Is this machine ready? Platform, driver, versions, dtypes, memory, disk, network, environment - each with what to do.

    python -m scripts.doctor
    python -m scripts.doctor --recipe configs/dcu_z100l/chatglm-6b.yaml
    python -m scripts.doctor --platform multi_node --hostfile hosts --json

Nothing is changed and no card is needed: what is not installed is skipped. With a recipe also: does each step fit into
memory and on the disk. Exit code: 0 all well, 1 warnings, 2 something will fail (or wrong flags).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from errors import UserError, told
from scripts.doctor.result import FAIL, OK, SKIP, WARN, Check, Situation, probe, worst
from scripts.launch.commands import LAUNCHERS
from scripts.launch.hostfile import read_hostfile
from scripts.launch.platforms import load_platforms

WORDS = {OK: "ok", WARN: "WARN", FAIL: "FAIL", SKIP: "skipped"}


def build_parser() -> argparse.ArgumentParser:
    """The doctor's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
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
        help="for one tool or host (default 20); probes of torch: ten times it",
    )
    add("--json", action="store_true", help="the same as JSON")
    return parser


def situation_of(args: argparse.Namespace) -> tuple[Situation, list[Check]]:
    """What is asked for, and what is wrong with how it is asked. UserError for an unknown recipe or platform."""
    from scripts.launch.__main__ import build_parser as launch_parser
    from scripts.launch.__main__ import find_recipe, options_of, read_recipe
    from scripts.launch.platforms import platform_named

    situation = Situation(dict(os.environ), args.timeout)
    if not 0 < args.timeout < 3600:
        raise UserError(
            f"--timeout {args.timeout:g} is not a number of seconds that one would wait; give for instance 20."
        )
    launch: dict[str, Any] = {}
    if args.recipe:
        path = find_recipe(args.recipe)
        situation.recipe, situation.recipe_path = read_recipe(path), str(path)
        launch = situation.recipe.get("launch", {})
    name = args.platform or launch.get("platform")
    if name is None:
        return situation, []
    situation.platform = platform_named(name)
    options = launch_parser().parse_args([])
    for key in ("platform", "launcher", "num_gpus", "no_ssh", "master_addr", "master_port", "ssh_port"):
        setattr(options, key, getattr(args, key))
    with contextlib.suppress(UserError):  # a bad one has a check of its own
        options.hostfile = args.hostfile if args.hostfile and read_hostfile(args.hostfile) else None
    try:
        situation.options = options_of(options, launch, args.recipe or "--platform", situation.environ)
    except UserError as error:
        return situation, [Check("recipe", "launch", FAIL, str(error), "correct the recipe, the flag or the variable")]
    return situation, [Check("recipe", "launch", OK, f"{situation.platform.title}")]


def examine(situation: Situation, args: argparse.Namespace) -> list[Check]:
    """All checks but those of the request itself."""
    from scripts.doctor.environment import (
        check_env_file,
        check_forwarded,
        check_interfaces,
        check_spelling,
        check_visible,
    )
    from scripts.doctor.machine import check_all_reduce, check_disk, check_limits, check_memory, check_shm, plan_recipe
    from scripts.doctor.network import check_hostfile, check_hosts, check_ports
    from scripts.doctor.software import software

    wanted = situation.environ
    if situation.platform and not wanted.get("DS_ACCELERATOR"):
        wanted = {**wanted, "DS_ACCELERATOR": situation.platform.accelerator}  # as the launchers do
    facts, why = probe(["facts"], situation.seconds * 10, wanted)
    situation.facts = facts or {"error": why}
    plans, why_none = plan_recipe(situation)
    hostfile = args.hostfile or (situation.options.hostfile if situation.options else None)
    found, hosts = check_hostfile(hostfile, situation.needs_hostfile)
    # What the launcher sets, the group's test must find too.
    there = {"DS_ACCELERATOR": situation.facts.get("torch_device", "cpu")}
    during = Situation(wanted | platform_environment(situation) | there, situation.seconds, facts=situation.facts)
    return [
        *software(situation, plans), *check_memory(situation, plans, why_none), *check_disk(situation, plans), check_shm(),
        *check_limits(situation, plans), check_all_reduce(during), check_interfaces(situation), found, *check_ports(situation),
        *check_hosts(situation, hosts), *check_forwarded(situation), *check_env_file(situation), *check_spelling(situation.environ),
        *check_visible(situation), *([check_build(args.build, situation)] if args.build else []),
    ]  # fmt: skip


def platform_environment(situation: Situation) -> dict[str, str]:
    """The variables of the platform and the recipe that the shell has not set; empty where none is asked for."""
    if situation.platform is None:
        return {}
    own = {
        name: value
        for name, value in situation.platform.env.items()
        if name not in situation.environ and "$" not in value
    }
    return own | (situation.options.env if situation.options else {})


def check_build(name: str, situation: Situation) -> Check:
    """Build one of DeepSpeed's optimizers and take a step with it."""
    answer, why = probe(["build", name], situation.seconds * 30, situation.environ)
    if answer and answer["moved"]:
        return Check("operators", name, OK, "built, and it steps")
    todo = "see compiler, ninja and toolkit above; training falls back to torch's AdamW by itself"
    return Check("operators", name, WARN, why or "it was built, but its step changes nothing", todo)


def table(checks: list[Check]) -> str:
    """For people: one line a check, and under it what to do."""
    width = max(len(f"{check.group}: {check.name}") for check in checks)
    lines = []
    for check in checks:
        lines.append(
            f"{WORDS[check.state]:<8}{check.group + ': ' + check.name:<{width}}  {' '.join(check.why.split())}"
        )
        if check.todo:
            lines.append(f"{'':<8}{'':<{width}}  -> {' '.join(check.todo.split())}")
    counts = {state: sum(check.state == state for check in checks) for state in WORDS}
    lines.append("")
    lines.append(f"{counts[OK]} ok, {counts[WARN]} warnings, {counts[FAIL]} failures, {counts[SKIP]} skipped")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Look at everything and print it; returns the exit code."""
    args = build_parser().parse_args(argv)
    situation, checks = situation_of(args)
    checks += examine(situation, args)
    code = worst(checks)
    if args.json:
        print(
            json.dumps({"exit_code": code, "checks": [asdict(check) for check in checks]}, indent=1, ensure_ascii=False)
        )
    else:
        print(table(checks))
    return code


if __name__ == "__main__":
    sys.exit(told(main)())
