"""From a command line and a YAML recipe to the dataclasses of steps.py; one clear sentence for what is wrong."""

from __future__ import annotations

import logging
import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from errors import UserError, language_of_user, nearest, refuse
from steps import STEPS as ALL_STEPS
from training.utils.flags.checks import validate
from training.utils.flags.former import former_flags, our_name
from training.utils.flags.help import help_text, wanted_help
from training.utils.flags.no_effect import say_no_effect
from training.utils.flags.recipe import SECTIONS, load_recipe
from training.utils.flags.steps import (
    STEPS,
    EvaluateArguments,
    PromptEvalArguments,
    RewardEvalArguments,
)

logger = logging.getLogger("sanbu")

Args = TypeVar("Args")
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
MODULES = {step.arguments_class: step.module for step in ALL_STEPS} | {
    PromptEvalArguments: "training.evaluate.side_by_side",
    EvaluateArguments: "scripts.evaluate",
    RewardEvalArguments: "training.evaluate.reward_scores",
}
LAUNCHER_FLAGS = {
    "num_gpus", "num_nodes", "master_port", "master_addr", "hostfile", "include", "exclude", "module", "nproc_per_node",
}  # fmt: skip


class FlagParser(ArgumentParser):
    """The parser of one step: the flags of its dataclass, and those of earlier systems. Only what is given comes out."""

    def __init__(self, args_class: type) -> None:
        super().__init__(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
        self.args_class = args_class
        self.former = former_flags(args_class.section)
        self.names: set[str] = set()  # all that it answers to, with underscores
        hints = get_type_hints(args_class)
        for one in fields(args_class):
            options = reading(hints[one.name]) | {key: one.metadata[key] for key in ("nargs", "const") if key in one.metadata}
            self.add((one.name, *one.metadata["aliases"]), one.name, **options)
            if one.default is True:
                self.add((f"no_{one.name}",), one.name, action="store_false")
        for name, row in self.former.items():
            self.add((name,), f"former {name}", **({} if row.values else {"nargs": "?", "const": "true"}))

    def add(self, names: tuple[str, ...], dest: str, **options: Any) -> None:
        """Add a flag under all its names, each with underscores and with hyphens."""
        self.names |= set(names)
        spellings = dict.fromkeys(f"--{one}" for name in names for one in (name, name.replace("_", "-")))
        self.add_argument(*spellings, dest=dest, **options)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a UserError, with one spelling of the flag."""
        message = re.sub(r"^argument ", "", message)
        message = re.sub(r"(--[\w-]+)(/--?[\w-]+)+", r"\1", message)
        raise UserError(f"{message}; --help says what it takes.")

    def read(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Return the fields that the tokens set, former flags turned into ours. Raises UserError for what cannot be read."""
        found, unknown = self.parse_known_args(list(tokens))
        if unknown:
            raise UserError(unknown_flag(unknown[0], self))
        given = vars(found)
        old = {name: given.pop(f"former {name}") for name in self.former if f"former {name}" in given}
        return self.replace_former(old) | given

    def replace_former(self, old: dict[str, str]) -> dict[str, Any]:
        """Say what replaces the former flags that were given; returns the fields of ours that they set."""
        given: dict[str, Any] = {}
        for name, value in old.items():
            row = self.former[name]
            if row.values == 0 and not switched_on(name, value):
                refuse(name == "only_optimize_lora", f"--{name} false: {row.now}; drop it.")
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


def reading(hint: Any) -> dict[str, Any]:
    """Return the options of argparse that read words as this type."""
    if get_origin(hint) is UnionType:  # X | None
        hint = get_args(hint)[0]
    if hint is bool:
        return {"type": truth, "nargs": "?", "const": True}
    if hint == list[str]:
        return {"nargs": "+"}
    if get_origin(hint) is Literal:
        values = {str(value): value for value in get_args(hint)}
        return {"type": lambda word: values.get(word, word), "choices": list(values.values())}
    return {"type": hint}


def truth(word: str) -> bool:
    """Return the truth value that a word stands for. Raise ArgumentTypeError for another word."""
    if word.lower() not in (*TRUE, *FALSE):
        raise ArgumentTypeError(f"{word} is neither true nor false")
    return word.lower() in TRUE


def is_required(one: Field) -> bool:
    """Return whether a dataclass field has no default."""
    return one.default is MISSING and one.default_factory is MISSING


def switched_on(name: str, value: str) -> bool:
    """Return whether a former switch is on: it stood alone, or with a word for true."""
    if value.lower() in (*TRUE, *FALSE):
        return truth(value)
    if name == "deepspeed":
        raise UserError(f"--deepspeed takes no value here; to bring a configuration use --deepspeed_config {value}.")
    raise UserError(f"--{name} is a switch and takes no value, but {value!r} follows it.")


def flag_names(args_class: type) -> set[str]:
    """Return all names that a step's parser answers to: flags, aliases and former flags, with underscores."""
    return FlagParser(args_class).names


def unknown_flag(token: str, parser: FlagParser) -> str:
    """Return the sentence for a word that is not a flag of this step."""
    title = parser.args_class.title
    if not token.startswith("-"):
        return f"{token!r} stands where a flag is expected; flags start with -- and take as many values as --help says."
    name = token.lstrip("-").split("=")[0].replace("-", "_")
    if name in LAUNCHER_FLAGS:
        return f"--{name} belongs to the launcher: deepspeed --{name} … --module {MODULES[parser.args_class]} …"
    ours = parser.names - parser.former.keys()
    if instead := our_name(name, ours):
        return f"--{name} is not a flag of {title}; here it is --{instead}, of which --help all says what it takes."
    near = nearest(name, ours, 0.8)  # at 0.7 --lora_target gave --kl_target, --template gave --temperature
    elsewhere = [step.title for step in STEPS if name in flag_names(step)]
    if elsewhere and not near:
        return f"--{name} is a flag of {' and '.join(elsewhere)}, not of {title}."
    hint = f"did you mean --{near}?" if near else "--help all lists all flags."
    return f"--{name} is not a flag of {title}; {hint}"


def read_recipe(path: str, parser: FlagParser) -> dict[str, Any]:
    """Return the fields that the recipe's section for this step sets."""
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
    """Return a `key: value` of a recipe as command-line words; none for null, which leaves the default."""
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
    """Read the flags of a step from a command line (default: this process's) and from the recipe that --config names.

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
    typed = given = parser.read(tokens)
    if given.get("config"):
        given = read_recipe(given["config"], parser) | given
    for one in fields(args_class):
        if is_required(one) and one.name not in given:
            raise UserError(f"{args_class.title} needs --{one.name}: {one.metadata['help']}")
    args = args_class(**given)
    validate(args)
    say_no_effect(args, typed)
    return args


def is_main_process() -> bool:
    """Return whether this process speaks for all, by what the launcher says in the environment."""
    return (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0"
