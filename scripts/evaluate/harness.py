"""lm-eval, the evaluation harness of EleutherAI, on a loaded model of any family. Needs requirements-eval.txt."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from errors import UserError
from models.chatglm.prompts import CHATGLM
from training.evaluate.common import LoadedModel
from training.utils.data.batching import pad_left
from training.utils.data.tokenize import cut_prompt
from training.utils.flags.steps import EvaluateArguments


class ChatGLM(HFLM):
    """HFLM with ChatGLM's marks where its network needs them.

    HFLM would count [gMASK] and sop as tokens of a text, and cut them off a long one. ChatGLM-6B has them between context
    and continuation, where HFLM puts nothing. chat: contexts are written by the chat template, whose marks become tokens.
    """

    def __init__(self, loaded: LoadedModel, chat: bool, **options: Any) -> None:
        self.template, self.chat = loaded.template, chat
        self.first = loaded.tokenizer.build_inputs_with_special_tokens([])[0]  # no text holds it
        super().__init__(loaded.model, tokenizer=loaded.tokenizer, prefix_token_id=self.first, **options)

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Return the tokens of a text, nothing added."""
        if self.chat:
            return self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize_chat(string))
        return self.tokenizer.encode_plain([string])[0]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Return a text; of the end token alone its name: its text is empty, and every answer holds that stop string at once."""
        if isinstance(tokens, int):
            return self.tokenizer.convert_ids_to_tokens(tokens)
        return super().tok_decode(tokens, skip_special_tokens)

    def framed(self, context: list[int], room: int) -> list[int]:
        """Return the context between its marks, cut at the beginning where it leaves less room for what follows."""
        if self.first in context:  # the chat template's marks, or the placeholder for no context at all
            context = [] if context == [self.first] else context
        if self.first not in context:
            context = self.tokenizer.build_inputs_with_special_tokens(context)  # ChatGLM3: without <|assistant|>, no dialogue
        return cut_prompt(context, self.max_length - room, self.template)

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask [texts, longest] of contexts to be answered, padded on the left."""
        room = self.max_length - left_truncate_len if left_truncate_len else 0
        return pad_left([self.framed(self.tok_encode(one), room) for one in strings], self.tokenizer.pad_token_id)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **options: Any) -> Any:
        framed = [(texts, self.framed(context, len(rest)), rest) for texts, context, rest in requests]
        return super()._loglikelihood_tokens(framed, **options)


def wrap(loaded: LoadedModel, batch_size: int, chat: bool = False) -> HFLM:
    """Return a loaded model as lm-eval calls it. Other families than ChatGLM are read as lm-eval reads them from the hub."""
    options = {"backend": "causal", "batch_size": batch_size, "max_length": loaded.longest}
    loaded.tokenizer.chat_template = loaded.template.jinja(loaded.tokenizer)  # as saved models have it
    if loaded.template.kind in CHATGLM:
        return ChatGLM(loaded, chat, **options)
    return HFLM(loaded.model, tokenizer=loaded.tokenizer, **options)


@cache
def task_manager(named: bool) -> TaskManager:
    """Return lm-eval's reader of tasks. named: with the 14,000 that it has by name, whose files take 19 s of CPU to list."""
    return TaskManager(include_defaults=named)


def open_tasks(tasks: Sequence[str]) -> tuple[TaskManager, list[str]]:
    """Return lm-eval's reader of tasks and what it calls them: a name, or a YAML file. Raise UserError for an unknown one."""
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--lm_eval {file}: no such file; name a task of lm-eval, or the YAML file of one.")
    manager = task_manager(len(files) < len(tasks))
    for task in tasks:
        if task not in files and not manager.match_tasks([task]):
            raise UserError(f"--lm_eval {task} is no task of lm-eval; `lm-eval ls tasks` lists them.")
    return manager, [str(Path(task).absolute()) if task in files else task for task in tasks]


def run_tasks(loaded: LoadedModel, args: EvaluateArguments) -> dict[str, dict[str, dict[str, float]]]:
    """Return the metrics of each task by name: "value" and "stderr", its standard error, where lm-eval gives one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line for each metric of each task
    manager, names = open_tasks(args.lm_eval)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), args.seed)
    found = simple_evaluate(
        wrap(loaded, args.per_device_eval_batch_size, args.apply_chat_template),
        tasks=names,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.num_examples or None,
        apply_chat_template=args.apply_chat_template,
        log_samples=False,
        **seeds,
    )
    return {task: metrics_of(row) for task, row in found["results"].items()}


def metrics_of(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers of one task: lm-eval's "acc,none" and "acc_stderr,none" become "acc" with value and stderr."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        name, comma, choice = key.partition(",")
        if not comma or "_stderr" in name or not isinstance(value, (int, float)):
            continue
        error = row.get(f"{name}_stderr,{choice}")
        title = name if choice == "none" else f"{name} ({choice})"
        metrics[title] = {"value": float(value)} | ({"stderr": float(error)} if isinstance(error, (int, float)) else {})
    return metrics
