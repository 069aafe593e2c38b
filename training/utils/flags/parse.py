"""From a command line and a YAML recipe to the dataclasses of arguments.py; one clear sentence for what is wrong."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import time
from argparse import SUPPRESS, Action, Namespace
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from errors import UserError
from steps import STEPS as ALL_STEPS
from training.utils.flags.checks import validate
from training.utils.flags.common import OURS
from training.utils.flags.former import former_flags
from training.utils.flags.help import help_text, language_of_user, wanted_help
from training.utils.flags.recipe import SECTIONS, load_recipe
from training.utils.flags.steps import (
    STEPS,
    EvaluateArguments,
    PromptEvalArguments,
    RewardEvalArguments,
)
from training.utils.run import heartbeat
from training.utils.run.environment import adopt_mpi_ranks

logger = logging.getLogger("sanbu")

Args = TypeVar("Args")
NOT_GIVEN = object()
MODULES = {step.arguments_class: step.module for step in ALL_STEPS} | {
    PromptEvalArguments: "training.evaluate.side_by_side",
    EvaluateArguments: "training.evaluate.bleu_rouge",
    RewardEvalArguments: "training.evaluate.reward_scores",
}
LAUNCHER_FLAGS = {
    "num_gpus", "num_nodes", "master_port", "master_addr", "hostfile", "include", "exclude", "module", "nproc_per_node",
}  # fmt: skip


class FlagParser(HfArgumentParser):
    """The parser of one step: the dataclass's flags and, hidden from --help, the flags of earlier systems."""

    def __init__(self, args_class: type) -> None:
        super().__init__(args_class, add_help=False, allow_abbrev=False)
        self.args_class = args_class
        for action in self._actions:   # a recipe may give them; see parse
            if action.required:
                action.required, action.default = False, SUPPRESS
            if action.nargs == 0 and action.const is False:   # the --no_… twin of a flag that is on by default
                action.help = SUPPRESS
        self.former = former_flags(args_class.section)
        for name, row in self.former.items():
            options = {} if row.values else {"nargs": "?", "const": "true"}
            spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            self.add_argument(*spellings, dest=f"former {name}", default=NOT_GIVEN, help=SUPPRESS, **options)

    def add_argument(self, *names: str, **options: Any) -> Action:
        """Add an argument as argparse does, without the metadata that only this project reads."""
        return super().add_argument(*names, **{key: value for key, value in options.items() if key not in OURS})

    def error(self, message: str) -> NoReturn:
        """argparse's complaint as a UserError, with one spelling of the flag."""
        message = re.sub(r"^argument ", "", message)
        message = re.sub(r"(--[\w-]+)(/--?[\w-]+)+", r"\1", message)
        message = re.sub(r"Truthy value expected: got (\S+) but.*", r"\1 is neither true nor false", message)
        raise UserError(f"{message}; --help says what it takes.")

    def read(self, tokens: Sequence[str]) -> dict[str, Any]:
        """The fields that the tokens set, former flags turned into ours. Raises UserError for what cannot be read."""
        blank = Namespace(**{action.dest: NOT_GIVEN for action in self._actions})
        found, unknown = self.parse_known_args(list(tokens), blank)
        if unknown:
            raise UserError(unknown_flag(unknown[0], self))
        given = {name: value for name, value in vars(found).items() if value is not NOT_GIVEN and name != "help"}
        old = {name: given.pop(f"former {name}") for name in self.former if f"former {name}" in given}
        return self.replace_former(old) | given

    def replace_former(self, old: dict[str, str]) -> dict[str, Any]:
        """Say what replaces the former flags that were given; returns the fields of ours that they set."""
        given: dict[str, Any] = {}
        for name, value in old.items():
            row = self.former[name]
            if row.values == 0 and not switched_on(name, value):
                continue
            if row.kind == "refuse":
                raise UserError(f"--{name}: {row.now}.")
            if name == "test_stop_step" and "enable_test_mode" not in old:
                continue   # it never had an effect alone
            if row.kind != "silent":
                logger.warning("--%s: %s%s.", name, "now " if row.becomes else "", row.now)
            more = self.read([token.format(value=value) for token in row.becomes])
            if "columns" in more and "columns" in given:
                more["columns"] = f"{given['columns']},{more['columns']}"
            given |= more
        return given


def is_required(one: Field) -> bool:
    """True for a dataclass field without default."""
    return one.default is MISSING and one.default_factory is MISSING


def switched_on(name: str, value: str) -> bool:
    """Whether a former switch is on: it stood alone, or with a word for true."""
    if value.lower() in ("true", "yes", "1"):
        return True
    if value.lower() in ("false", "no", "0"):
        return False
    if name == "deepspeed":
        raise UserError(f"--deepspeed takes no value here; to bring a configuration use --deepspeed_config {value}.")
    raise UserError(f"--{name} is a switch and takes no value, but {value!r} follows it.")


def flag_names(args_class: type) -> set[str]:
    """All names that a step's parser answers to: flags, aliases and former flags, with underscores."""
    spellings = FlagParser(args_class)._option_string_actions
    return {spelling[2:].replace("-", "_") for spelling in spellings if spelling.startswith("--")}


def unknown_flag(token: str, parser: FlagParser) -> str:
    """The sentence for a word that is not a flag of this step."""
    title = parser.args_class.title
    if not token.startswith("-"):
        return f"{token!r} stands where a flag is expected; flags start with -- and take as many values as --help says."
    name = token.lstrip("-").split("=")[0].replace("-", "_")
    if name in LAUNCHER_FLAGS:
        return f"--{name} belongs to the launcher: deepspeed --{name} … --module {MODULES[parser.args_class]} …"
    names = flag_names(parser.args_class)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if not near:
        elsewhere = [step.title for step in STEPS if name in flag_names(step)]
        if elsewhere:
            return f"--{name} is a flag of {' and '.join(elsewhere)}, not of {title}."
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else "--help all lists all flags."
    return f"--{name} is not a flag of {title}; {hint}"


def read_recipe(path: str, parser: FlagParser) -> dict[str, Any]:
    """The fields that the recipe's section for this step sets."""
    section = parser.args_class.section
    content, where = load_recipe(path), path
    if set(SECTIONS) & content.keys():
        if section not in content:
            raise UserError(f"{path} has no section {section}, which {parser.args_class.title} reads; add one.")
        content, where = content[section], f"{path}, section {section}"
    if "config" in content:
        raise UserError(f"{where}: a recipe cannot name another one; remove config.")
    try:
        return parser.read([token for key, value in content.items() for token in as_tokens(str(key), value)])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def as_tokens(key: str, value: Any) -> list[str]:
    """One `key: value` of a recipe as command-line words; none for null, which leaves the default."""
    if isinstance(value, dict):
        if key != "columns":
            raise UserError(f"{key} must be a value or a list, not a section.")
        value = ",".join(f"{ours}={theirs}" for ours, theirs in value.items())
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def parse(args_class: type[Args], argv: Sequence[str] | None = None) -> Args:
    """The flags of a step from a command line (default: this process's) and from the recipe that --config names.

    --help and --help all are answered here and end the process. Raises UserError for unknown or missing flags, values of a
    wrong type or out of range, and contradictions.
    """
    if not is_main_process():
        logger.setLevel(logging.ERROR)   # one process says what all would say
    tokens = sys.argv[1:] if argv is None else list(argv)
    amount = wanted_help(tokens)
    if amount:
        print(help_text(args_class, MODULES[args_class], amount, language_of_user()))
        raise SystemExit(0)
    parser = FlagParser(args_class)
    given = parser.read(tokens)
    if given.get("config"):
        given = read_recipe(given["config"], parser) | given
    for one in fields(args_class):
        if is_required(one) and one.name not in given:
            raise UserError(f"{args_class.title} needs --{one.name}: {one.metadata['help'].removeprefix('Required. ')}")
    (args,) = parser.parse_dict(given)
    validate(args)
    return args


def is_main_process() -> bool:
    """True in the process that speaks for all, by what the launcher says in the environment."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0


def main_entry(main: Callable[[Any], None], args_class: type, argv: Sequence[str] | None = None) -> None:
    """Parse and run. A UserError becomes one line on stderr and exit code 2."""
    adopt_mpi_ranks()
    try:
        main(parse(args_class, argv))
    except UserError as error:
        heartbeat.failed(2, str(error))
        if not is_main_process():
            # Usually all processes fail alike: the main one speaks, and the launcher ends this one while it waits.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5 if os.environ.get("LOCAL_RANK") == "0" else 10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except Exception as error:
        # With gloo, the loss of another node shows in the main thread too, as an error of a socket.
        heartbeat.failed(1, f"{type(error).__name__}: {error}", patience=5.0)
        raise
