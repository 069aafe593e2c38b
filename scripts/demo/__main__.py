"""The demo: a small model from a random start through SFT, reward model and PPO, measured on held-out prompts.

    python -m scripts.demo [--seed 1234] [--output output/demo] [--threads 2]
    python -m scripts.demo --ppo_flags "--ppo_epochs 4 --generation_batches 2" --pad_is_eos
    python -m scripts.smollm2 [--seed 1234] [--output output/smollm2] [--threads 2]

The first writes base/, sft/, reward/, ppo/, answers.jsonl, summary.json and report.html into the output folder; a second run
starts afresh. scripts.smollm2 takes a pretrained model (docs/en/smollm2.md); a second run goes on where the first was
interrupted, or at the first step whose recipe differs.
"""

import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import CommandLine, UserError, refuse
from scripts.demo import smollm2_model
from scripts.demo.pipeline import ROOT, SECTIONS, Stage, finish, read_recipe, run_stages, script_stage, training_stage
from scripts.demo.score import demo_score
from scripts.demo.smollm2_data import SYSTEM, code_digest, prompts_of, sample
from scripts.demo.smollm2_score import vader_score

BASE_TITLE, MEASURE_TITLE = "The base model", "Answers to held-out prompts, before and after PPO"


def demo_stages(args: Namespace) -> list[Stage]:
    """Return the stages of the demo: a model from a random start, which learns the closed world of data/demo."""
    base = ("scripts.demo.model", args.output / "base", "--seed", args.seed, *["--pad_is_eos"] * args.pad_is_eos)
    trained = [training_stage(section, args, *args.ppo_flags * (section == "ppo")) for section in SECTIONS]
    return [
        # Random weights are written on the CPU; saying so keeps DeepSpeed from announcing what it looked for.
        script_stage("base", BASE_TITLE, args, *base, DS_ACCELERATOR="cpu"),
        *trained,
        Stage("measure", MEASURE_TITLE, lambda again: measure_demo(args)),
    ]


def measure_demo(args: Namespace) -> dict[str, Any]:
    """Measure the gold score on held-out prompts: of the SFT model and of the actor."""
    from scripts.demo.measure import measure

    return measure(args.output, args.seed, args.prompts, ROOT / "data/demo/prompts_heldout.jsonl", demo_score)


def smollm2_stages(args: Namespace) -> list[Stage]:
    """Return the stages of smollm2: a pretrained model learns from its own answers, then to be friendly.

    Raises UserError for packages that are missing and for a recipe that cannot be used.
    """
    smollm2_model.check_packages()
    recipe, data, script = read_recipe(args.config), args.output / "data", "scripts.demo.smollm2_data"
    drawn = (data, "--seed", args.seed, "--limit", args.prompts)
    settings = [args.seed, args.prompts, code_digest()]
    sft, reward, ppo = (
        training_stage(section, args, "--data_path", data / file, settings=recipe[section])
        for section, file in zip(SECTIONS, ("sft.jsonl", "pairs.jsonl", "ppo.jsonl"), strict=True)
    )
    convert, own = "The pretrained model, from GGUF to safetensors", "Answers of the pretrained model, to imitate"
    pairs = "Answers of the SFT model, in pairs by their gold score"
    return [
        script_stage("convert", convert, args, "scripts.demo.smollm2_model", args.output / "base"),
        script_stage("sft data", own, args, script, "sft", args.output / "base", *drawn, settings=settings),
        sft,
        script_stage("pairs", pairs, args, script, "pairs", args.output / "sft", *drawn),
        reward,
        ppo,
        Stage("measure", MEASURE_TITLE, lambda again: measure_smollm2(args)),
    ]


def measure_smollm2(args: Namespace) -> dict[str, Any]:
    """Measure VADER's score on held-out prompts: of the pretrained model, the SFT model and the actor."""
    from scripts.demo.measure import measure

    output, held_out = args.output, args.output / "data" / "heldout.jsonl"
    record = measure(output, args.seed, args.prompts, held_out, lambda messages, answer: vader_score(answer))
    answers = sample(output / "base", prompts_of("heldout")[: args.prompts or None], 1, args.seed)
    record["metrics"]["gold_score_pretrained"] = sum(vader_score(answer.text) for answer in answers) / len(answers)
    return record


CHINESE = """演示：一个随机初始化的小模型经过 SFT、奖励模型和 PPO，并在留出的提示上测量。

    python -m scripts.demo [--seed 1234] [--output output/demo] [--threads 2]
    python -m scripts.demo --ppo_flags "--ppo_epochs 4 --generation_batches 2" --pad_is_eos
    python -m scripts.smollm2 [--seed 1234] [--output output/smollm2] [--threads 2]

第一个把 base/、sft/、reward/、ppo/、answers.jsonl、summary.json 和 report.html 写入输出文件夹，再次运行时从头开始。
scripts.smollm2 用预训练模型（docs/zh/smollm2.md）；再次运行时从中断处继续，或从配方有变的第一步开始。
"""


def parse(argv: Sequence[str] | None, preset: str = "demo") -> Namespace:
    """Parse the flags of a preset, check their bounds, and make their paths whole. Raise UserError for what is wrong."""
    args = build_parser(preset).parse_args(argv)
    wrong = args.threads < 1 or args.seed < 0 or args.prompts < 0
    refuse(wrong, "--threads must be 1 or more, --seed and --prompts 0 or more; correct them.")
    # The steps run in the root of the repository, where the recipe's data paths lead; the user may stand elsewhere.
    args.output, args.config = args.output.resolve(), args.config.resolve()
    return args


def build_parser(preset: str) -> CommandLine:
    """Define the flags of a preset."""
    prog = "python -m scripts.demo" if preset == "demo" else f"python -m scripts.{preset}"
    parser = CommandLine("--help lists the flags.", prog=prog, description=__doc__, zh=CHINESE)
    add, folder, recipe = parser.add_argument, f"output/{preset}", f"configs/cpu/{preset}.yaml"
    add("--seed", type=int, default=1234, help="random seed of all steps (%(default)s)",
        zh="各步骤的随机种子（%(default)s）")
    add("--output", type=Path, default=ROOT / folder, help=f"where results go ({folder})",
        zh=f"结果写入的文件夹（{folder}）")
    add("--threads", type=int, default=usable_cores(), help="CPU threads (%(default)s)",
        zh="CPU 线程数（%(default)s）")
    add("--config", type=Path, default=ROOT / recipe, help=f"recipe of the steps ({recipe})",
        zh=f"各步骤的配方（{recipe}）")
    add("--prompts", type=int, default=0, help="measure on so many prompts, and draw smollm2's data from so many; 0 = all",
        zh="用这么多个提示测量，smollm2 的数据也取自这么多个；0 = 全部")
    if preset == "demo":
        add("--ppo_flags", type=shlex.split, default=[], metavar="FLAGS", help="further flags of step 3, as one text",
            zh="第三步的更多参数，写成一个字符串")
        add("--pad_is_eos", action="store_true", help="pad with the end token, as many checkpoints do",
            zh="用结束符填充，许多检查点如此")
    return parser


def usable_cores() -> int:
    """Return how many cores this process may use; all, where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(args: Namespace, preset: str = "demo") -> dict[str, Any]:
    """Train, measure, write summary and report. Returns the summary."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by torch here and in the steps, once it is imported
    if preset == "demo":
        return finish(args, preset, run_stages(args.output, demo_stages(args), fresh=True))
    records = run_stages(args.output, smollm2_stages(args), fresh=False)
    return finish(args, preset, records, f'--system "{SYSTEM}"')  # as in the data that the model was trained on


def main(argv: Sequence[str] | None = None, preset: str = "demo") -> None:
    """Command line. Exit code 2 for wrong input, else that of the step that failed; a signal ends the running step as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves subprocess.run, which then ends the step as well
    try:
        run(parse(argv, preset), preset)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # the step got the same signal and has ended
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
