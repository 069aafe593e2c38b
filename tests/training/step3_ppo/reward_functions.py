"""Reward functions of the tests, which copy this file into a folder of their own."""

import os
from pathlib import Path

CALLS = Path(__file__).with_name("calls.txt")


def length(prompts, answers):
    return [len(answer) / 10 for answer in answers]


def question(prompts, answers):
    return [int("1" in prompt) - len(prompt) / 100 for prompt in prompts]


def letters(prompts, answers):
    """The share of letters."""
    return [sum(map(str.isalpha, answer)) / max(len(answer), 1) for answer in answers]


def counted(prompts, answers):
    """As length; every call leaves a line. From the call on that FAIL_AT names it fails on the last answer."""
    with CALLS.open("a") as file:
        print(len(answers), file=file)
    calls = len(CALLS.read_text().splitlines())
    wrong = "FAIL_AT" in os.environ and calls >= int(os.environ["FAIL_AT"])
    return [*length(prompts, answers)[:-1], float("nan") if wrong else len(answers[-1]) / 10]


def second(prompts, answers):
    """Fails on the second process alone."""
    if os.environ["RANK"] == "1":
        raise ValueError("only here")
    return length(prompts, answers)
