"""The one exception that means: the input is wrong, not the program; and how a command line is read and ends on it."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, NoReturn


class UserError(Exception):
    """A wrong input, told in one sentence: which file, line or flag, what was found, what was expected, what to do.

    Entry points print it as ``error: <sentence>`` and exit with ``code``; no traceback is shown.
    """

    code = 2


class DiskError(UserError):
    """A disk that is full or does not take what is written, told in one sentence."""

    code = 74  # EX_IOERR of sysexits.h


def refuse(wrong: object, sentence: str) -> None:
    """Raise UserError with the sentence if something is wrong."""
    if wrong:
        raise UserError(sentence)


def without_secrets(text: str) -> str:
    """Return a text with *** for the passwords of addresses in it: scheme://user:PASSWORD@host, ?password=…, &token=…"""
    text = re.sub(r"(\w://[^/\s:@]*:)[^/\s@]+@", r"\1***@", text)
    return re.sub(r"(?i)([?&]\w*(?:password|passwd|token|secret|api_?key)=)[^&\s'\"]+", r"\1***", text)


def language_of_user() -> Literal["en", "zh"]:
    """Return "zh" under a Chinese locale (the first of LC_ALL, LC_MESSAGES and LANG that is set), else "en"."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.startswith("zh") else "en"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Return the known name that a word is a slip of. At difflib's own cutoff of 0.6, --report_to gave --eot_token."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), None)


def in_language(english: str, chinese: str) -> str:
    """Return the text in the language of the user."""
    return chinese if language_of_user() == "zh" else english


# argparse's own words in a help text
WORDS = {
    "usage: ": "用法：",
    "options:": "选项：",
    "positional arguments:": "位置参数：",
    "show this help message and exit": "显示本帮助后退出",
}


class CommandLine(argparse.ArgumentParser):
    """A parser that takes no abbreviations, raises UserError with ``advice``, and knows the flags that it answers to."""

    def __init__(self, advice: str, *, zh: str = "", **words: Any) -> None:
        """Make a parser without flags. zh: its description for users with a Chinese locale."""
        self.advice = advice
        self.flags: set[str] = set()
        words |= {"description": in_language(words["description"], zh)} if zh else {}
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **words)

    def add_argument(self, *flags: str, zh: str = "", **options: Any) -> argparse.Action:
        """Add a flag as argparse does. zh: its help for users with a Chinese locale."""
        self.flags.update(flags)
        return super().add_argument(*flags, **options | ({"help": in_language(options["help"], zh)} if zh else {}))

    def format_help(self) -> str:
        """Return the help, argparse's own words in the language of the user."""
        text = super().format_help()
        for english, chinese in WORDS.items():
            text = text.replace(english, in_language(english, chinese), 1)
        return text

    def error(self, message: str) -> NoReturn:
        """Raise UserError for what argparse says, with the flag that an unknown one is a slip of."""
        unknown = message.removeprefix("unrecognized arguments: ")
        near = self.nearest_flag(unknown.split()[0]) if unknown != message else None
        raise UserError(f"{message[:1].upper()}{message[1:]}; {f'did you mean {near}?' if near else self.advice}")

    def nearest_flag(self, word: str) -> str | None:
        """Return the flag that a word on the command line is a slip of."""
        near = nearest(word.split("=")[0].lstrip("-"), [flag.lstrip("-") for flag in self.flags])
        return near and f"--{near}"


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End without a traceback, with exit code 1, once nobody reads stdout any more, as in ``--help | head -1``."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would be tried again, and complained of, at the end of Python.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def told(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap main, the body of a command line: a UserError is told on stderr and its code returned."""

    @wraps(main)
    def ending(*args: Any, **kwargs: Any) -> Any:
        try:
            with reader_may_leave():
                return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
            return 2

    return ending
