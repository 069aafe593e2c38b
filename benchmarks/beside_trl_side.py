"""One side of benchmarks/beside_trl.py: it trains a block of steps whenever it is told to, and says what they cost.

Runs in three environments - this repository, an earlier build of it, TRL - and imports nothing of them above its functions.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps outside the clock


class Clock:
    """Counts steps. After the warm-up and after each block it waits for a line on stdin; without one the process ends.

    counts: the last step of the warm-up also has its floating-point operations counted (matrix products and attention).
    """

    def __init__(self, block: int, counts: bool = False) -> None:
        self.block, self.left, self.out, self.counts = block, WARM_UP, sys.stdout, counts
        self.work: dict[str, float] = {}
        self.start, self.before = (0.0, 0.0), 0.0
        self.counted, self.counter = {}, None
        sys.stdout = sys.stderr  # what a step prints goes to the log

    def begin(self) -> None:
        """Note the CPU seconds before the first step."""
        self.before = self.before or time.process_time()

    def count_operations(self) -> None:
        """Count those of the step that begins."""
        from torch.utils.flop_counter import FlopCounterMode

        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def tick(self, **work: float) -> None:
        """End a step that trained on so much of everything, such as tokens, targets and loss."""
        for name, value in work.items():
            self.work[name] = self.work.get(name, 0.0) + value
        self.left -= 1
        if self.counter:
            self.counter.__exit__(None, None, None)
            tokens = work.get("tokens", 0.0)
            self.counted = {"flops": self.counter.get_total_flops(), "counted_tokens": tokens, "matmul_rate": matmul_rate()}
            self.counter = None
        elif self.counts and not self.start[0]:
            self.count_operations()
        if self.left:
            return
        cpu, wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"cpu": cpu, "wall": wall, "peak_mb": peak, "steps": self.block}
        found |= {"before": self.before} if self.before else {}
        print(json.dumps(found | self.counted | self.work), file=self.out, flush=True)
        if not sys.stdin.readline().strip():
            os._exit(0)
        self.work, self.left = {}, self.block
        self.start = time.process_time(), time.perf_counter()


def matmul_rate() -> float:
    """Return the operations a CPU second of a float32 product of 1024 x 1024 matrices, the best of ten."""
    import torch

    left, right = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(10):
        start = time.process_time()
        left @ right
        seconds.append(time.process_time() - start)
    return 2 * 1024**3 / min(seconds)


def train_ours(settings: dict[str, Any]) -> None:
    """Run a step of this repository or of an earlier build of it, whose modules lie elsewhere."""
    step = importlib.import_module(settings["module"])
    clock = Clock(settings["block"], settings["counts"])
    if settings["module"].endswith("ppo.main"):
        update = step.DeepSpeedPPOTrainer.train_rlhf

        def timed_update(self, experience, *given):
            metrics = update(self, experience, *given)
            clock.tick(tokens=float(experience.attention_mask.sum()), answers=float(experience.action_mask.float().sum(1).mean()))
            return metrics

        step.DeepSpeedPPOTrainer.train_rlhf = timed_update
    else:
        train = step.optimizer_step

        def timed_step(engine, micro_batches, *given):
            clock.begin()
            loss = train(engine, micro_batches, *given)
            tokens = sum(float(micro.attention_mask.sum()) for micro in micro_batches)
            targets = sum(float(micro.loss_mask.sum()) for micro in micro_batches if hasattr(micro, "loss_mask"))
            clock.tick(tokens=tokens, targets=targets, loss=loss)
            return loss

        step.optimizer_step = timed_step
    parse = importlib.import_module(settings["parser"]).parse
    step.main(parse(getattr(step, settings["arguments"]), settings["flags"]))


def common_of_trl(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what all of TRL's trainers are set to: float32, no recomputation, the fused optimizer, a constant rate."""
    on_a_cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10**6, "seed": 0}
    adam = {"optim": "adamw_torch_fused", "adam_beta2": 0.95, "weight_decay": 0.0, "max_grad_norm": 1.0}
    rate = {"learning_rate": settings["learning_rate"], "lr_scheduler_type": "constant"}
    return {"output_dir": settings["output"]} | on_a_cpu | quiet | adam | rate


def train_trl(settings: dict[str, Any]) -> None:
    """Train with TRL's SFTTrainer, RewardTrainer or DPOTrainer on rows of tokens."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    clock, kind, work = Clock(settings["block"]), settings["trainer"], {}
    load = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    model = load.from_pretrained(settings["model"], dtype=torch.float32, **({"num_labels": 1} if kind == "Reward" else {}))
    config = getattr(trl, f"{kind}Config")(**common_of_trl(settings), max_steps=10**6, **settings["options"])
    rows = Dataset.from_list(json.loads(Path(settings["rows"]).read_text(encoding="utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *given: dataset  # it knows no rows of tokens
    trainer = getattr(trl, f"{kind}Trainer")(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    train = trainer.training_step

    def noted_step(model, inputs, *given, **more):
        clock.begin()
        mask = inputs.get("attention_mask")  # none where rows are packed
        work["tokens"] = float(inputs["input_ids"].numel() if mask is None else mask.sum())
        work["targets"] = float((inputs["labels"] != -100).sum()) if "labels" in inputs else 0.0
        loss = train(model, inputs, *given, **more)
        work["loss"] = float(loss)
        return loss

    class Ticks(TrainerCallback):
        def on_step_end(self, *given, **more) -> None:
            clock.tick(**work)

    trainer.training_step = noted_step
    trainer.add_callback(Ticks())
    trainer.train()


def train_trl_ppo(settings: dict[str, Any]) -> None:
    """Train with the PPOTrainer of TRL 1.12, its last: the whole rollout in one forward and one minibatch."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Ticks(TrainerCallback):
        def on_step_end(self, *given, **more) -> None:
            clock.tick()

    clock, size = Clock(settings["block"]), settings["batch"]
    load = {"model": AutoModelForCausalLM, "ref_model": AutoModelForCausalLM}
    load |= dict.fromkeys(("reward_model", "value_model"), AutoModelForSequenceClassification)
    folders = {name: settings["reward" if "Sequence" in auto.__name__ else "model"] for name, auto in load.items()}
    models = {name: auto.from_pretrained(folders[name], dtype=torch.float32) for name, auto in load.items()}
    config = PPOConfig(
        **common_of_trl(settings),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=size * 10**4,
        response_length=settings["answer"],
        local_rollout_forward_batch_size=size,
        temperature=1.0,
        missing_eos_penalty=1.0,
        stop_token="eos",
        num_sample_generations=0,
    )
    rows = Dataset.from_list(json.loads(Path(settings["rows"]).read_text(encoding="utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    data = {"train_dataset": rows, "eval_dataset": rows.select(range(8)), "processing_class": tokenizer}
    PPOTrainer(args=config, callbacks=[Ticks()], **models, **data).train()


if __name__ == "__main__":
    SETTINGS = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    {"ours": train_ours, "trl": train_trl, "trl_ppo": train_trl_ppo}[SETTINGS["side"]](SETTINGS)
