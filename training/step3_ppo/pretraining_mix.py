"""Plain text beside PPO: the language-model loss of InstructGPT's PPO-ptx (Ouyang et al. 2022, eq. 2), in the same steps."""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor

from training.step3_ppo.experience import plan_share
from training.utils.data.batching import SFTBatch, collate_sft
from training.utils.data.cache import CachedData
from training.utils.data.plain_text import prepare_blocks
from training.utils.loss import sft_loss
from training.utils.run.loop import load_micro_batches
from training.utils.run.process_group import Run


class PretrainingMix:
    """Blocks of text for the actor's optimizer steps, as many in each as a whole minibatch has answers.

    Which blocks a step reads follows from the seed and the blocks read before, so a resumed run and any number of processes
    read the same. The text comes round again, in another order, when all of it was read.
    """

    def __init__(self, data: CachedData, run: Run, args, pad_id: int, size: int) -> None:
        """Take size: blocks of one optimizer step over all processes."""
        self.blocks, self.fingerprint = data.train, data.fingerprint
        self.run, self.args, self.size = run, args, size
        self.collate = partial(collate_sft, pad_id=pad_id)
        self.length: int = self.blocks[0]["length"]
        self.targets: int = self.length - max(self.blocks[0]["prompt_length"], 1)
        self.order: tuple[int, np.ndarray] = (-1, np.arange(0))

    @classmethod
    def of(cls, args, run: Run, tokenizer, template, size: int) -> PretrainingMix | None:
        """Return what the flags ask for; None without --unsupervised_dataset_name or with --unsup_coef 0."""
        if not args.unsupervised_dataset_name or not args.unsup_coef:
            return None
        options = {
            "column": args.unsupervised_text_column, "cache_dir": args.cache_dir, "rebuild": args.rebuild_cache,
        }
        length = args.max_prompt_seq_len + args.max_answer_seq_len
        data = prepare_blocks(args.unsupervised_dataset_name, tokenizer, template, length, **options)
        return cls(data, run, args, tokenizer.pad_token_id, size)

    def examples(self, read: int) -> list[int]:
        """Return the blocks of the optimizer step before which so many were read in the whole run."""
        return [self._example(position) for position in range(read, read + self.size)]

    def _example(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.blocks))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.args.seed, epoch]).permutation(len(self.blocks))
        return int(self.order[1][offset])

    def micro_batches(self, read: int) -> list[SFTBatch]:
        """Return this process's share of a step's blocks (examples), cut as its answers are."""
        examples = self.examples(read)
        plan = plan_share([self.length] * len(examples), self.length, self.run, self.args)
        return load_micro_batches(self.blocks, examples, plan, self.collate, self.run.device)

    def loss(self, actor, micro: SFTBatch) -> Tensor:
        """Return a micro-batch's share in the mean of - log p over all tokens of the step's text.

        It is taken at temperature 1, whatever answers are sampled with.
        """
        mask = micro.loss_mask[:, 1:]
        return sft_loss(actor(micro.input_ids, micro.attention_mask, target_mask=mask), mask, float(self.size * self.targets))
