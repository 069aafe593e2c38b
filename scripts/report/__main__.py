"""Write a page about a run: results, answers before and after PPO, curves. One HTML file that needs nothing else.

    python -m scripts.report --run output/qwen
    python -m scripts.report --run output/demo --output report.html --language zh
    python -m scripts.report --run output/demo --picture docs/images/demo_ppo.svg

The run is the --output-dir of train.py, which writes the page itself at its end, the --output_dir of a step, or a folder of
such folders, as the demo's. What is there already is shown.
--picture draws the gold score and KL over PPO's rollouts; the README's comes from

    python -m scripts.demo --ppo_flags "--reward_function scripts/demo/score.py:reward --reward_weights 1,0"
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from errors import CommandLine, UserError, told
from scripts.report.curves import draw_picture
from scripts.report.page import write_file, write_report
from scripts.report.runs import find_runs

CHINESE = """为一次运行生成页面：结果、PPO 前后的回答、曲线。一个独立的 HTML 文件。

    python -m scripts.report --run output/qwen
    python -m scripts.report --run output/demo --output report.html --language zh
    python -m scripts.report --run output/demo --picture docs/images/demo_ppo.svg

--run 为 train.py 的 --output-dir（train.py 结束时已写出该页）、某一步的 --output_dir，或含有这类文件夹的文件夹（如 demo 的）。
已有的内容都会显示。--picture 画出 PPO 各采样轮的标准分和 KL；README 中的图来自

    python -m scripts.demo --ppo_flags "--reward_function scripts/demo/score.py:reward --reward_weights 1,0"
"""


def build_parser() -> CommandLine:
    """Define the flags."""
    parser = CommandLine("--help lists the flags.", prog="python -m scripts.report", description=__doc__, zh=CHINESE)
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        required=True,
        help="--output-dir of train.py, output folder of a step, or a folder of such folders",
        zh="train.py 的 --output-dir、某一步的输出文件夹，或含有这类文件夹的文件夹",
    )
    add("--output", type=Path, help="the page; report.html in the run folder if not given",
        zh="页面文件；缺省：运行文件夹中的 report.html")
    add("--language", choices=("en", "zh"), help="of the page; that of the locale if not given",
        zh="页面的语言；缺省随系统语言")
    add("--picture", type=Path, help="also draw the gold score and KL over PPO's rollouts into this SVG file",
        zh="另把 PPO 各采样轮的标准分和 KL 画入该 SVG 文件")
    return parser


@told
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 with one line if there is nothing to show."""
    args = build_parser().parse_args(argv)
    runs, output = find_runs(args.run), args.output or args.run / "report.html"
    for note in write_report(args.run, runs, output, args.language):
        print(note)
    if args.picture:
        ppo = next((run for run in runs if run.section == "ppo"), None)
        if ppo is None:
            raise UserError(f"--picture: no run of PPO in {args.run}; see --help for the run that logs what it shows.")
        write_file("--picture", args.picture, draw_picture(ppo))
    print(f"Wrote {output}" + (f" and {args.picture}" if args.picture else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
