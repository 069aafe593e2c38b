"""Tokenise the data of a step once, into the Arrow cache where training with the same flags finds it; no weights are loaded.

    python -m scripts.preprocess_dataset --model_name_or_path FOLDER --data_path AdvertiseGen [any flag of step 1]
    python -m scripts.preprocess_dataset --step 2 …        (3 for the prompts of PPO, dpo for DPO)

Only tokenizer and configuration of the model are needed. --cache_dir (or SANBU_CACHE) says where the cache lies.
"""

import logging
import sys

from errors import CommandLine, language_of_user, told
from models.checkpoint_folder import open_checkpoint
from steps import STEPS
from training.utils.data.paths import check_sources
from training.utils.flags.help import help_text, wanted_help
from training.utils.flags.steps import CommonArguments
from training.utils.run.entry import parse_or_exit, run_main
from training.utils.run.environment import data_paths

CHINESE = """提前把某一步的数据分词一次，写入 Arrow 缓存，之后用相同参数训练时直接取用；不加载权重。

    python -m scripts.preprocess_dataset --model_name_or_path 目录 --data_path AdvertiseGen [第 1 步的任意参数]
    python -m scripts.preprocess_dataset --step 2 …        （3 为 PPO 的提示，dpo 为 DPO）

只需要模型的分词器和配置。缓存的位置由 --cache_dir（或 SANBU_CACHE）指定。
"""


def preprocess(args: CommonArguments) -> None:
    """Tokenise the data that the step's flags name; print what was kept, cut and dropped, and its folder."""
    from models.quiet import quiet_libraries
    from models.templates import load_template
    from models.tokenizer import load_tokenizer  # with these torch is imported, which takes seconds
    from training.utils.data.prepare import prepare_phase

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sanbu").setLevel(logging.INFO)
    quiet_libraries()
    model = tokenizer_model(args)
    tokenizer = load_tokenizer(model)
    data = prepare_phase(args, args.phase, tokenizer, load_template(model, tokenizer))
    print(f"{args.title}: {len(data.train)} examples to train on, {len(data.eval)} held out, in {data.folder}", flush=True)


def tokenizer_model(args: CommonArguments) -> str:
    """Return the model whose tokenizer a step takes."""
    return args.models["actor" if args.phase == 3 else "model"]


def check_inputs(args: CommonArguments) -> None:
    """Raise UserError for a model or data set that is not there."""
    open_checkpoint(tokenizer_model(args)).check_vocabulary()
    check_sources(data_paths(args), args.column_map)


@told
def main(argv: list[str] | None = None) -> None:
    """Read --step; everything else is for the parser of that step, which needs an --output_dir that nothing uses here."""
    parser = CommandLine("--help lists the flags.", add_help=False)
    arguments = {step.choice: step.arguments_class for step in STEPS}
    parser.add_argument("--step", choices=arguments, default="1")
    given, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if amount := wanted_help(flags):
        language = language_of_user()
        print(CHINESE if language == "zh" else __doc__)
        print(help_text(arguments[given.step], "scripts.preprocess_dataset", amount, language))
        return
    run_main(preprocess, parse_or_exit(arguments[given.step], ["--output_dir", ".", *flags], check_inputs))


if __name__ == "__main__":
    sys.exit(main())
