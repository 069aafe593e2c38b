"""Write a trained model for other programs: LoRA merged in, in another dtype, in shards, or as one GGUF file.

    python -m scripts.export --path output/sft/adapter --output_dir exported                # merged, Hugging Face format
    python -m scripts.export --path output/ppo/actor --output_dir exported --dtype fp16 --max_shard_size 5GB
    python -m scripts.export --path output/ppo/actor --output_dir exported --format gguf    # for llama.cpp and Ollama

GGUF needs one package more: pip install -r requirements-serve.txt
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import CommandLine, UserError, refuse, told
from training.utils.run.environment import check_writable

if TYPE_CHECKING:  # torch takes seconds to import, and wrong flags are told without it
    import torch

    from models.checkpoint_folder import CheckpointFolder

CHINESE = """把训练所得的模型写成其他程序可用的形式：合并 LoRA、换精度、分片，或一个 GGUF 文件。

    python -m scripts.export --path output/sft/adapter --output_dir exported                # 合并，Hugging Face 格式
    python -m scripts.export --path output/ppo/actor --output_dir exported --dtype fp16 --max_shard_size 5GB
    python -m scripts.export --path output/ppo/actor --output_dir exported --format gguf    # 用于 llama.cpp 和 Ollama

GGUF 需要多装一个包：pip install -r requirements-serve.txt
"""
PROGRAM = "python -m scripts.export"
DTYPES = ("auto", "fp32", "fp16", "bf16")
FORMATS = ("safetensors", "gguf")


def build_parser() -> CommandLine:
    """Define the flags."""
    parser = CommandLine(f"{PROGRAM} --help lists the flags.", prog=PROGRAM, description=__doc__, zh=CHINESE)
    add = parser.add_argument
    path, zh = "folder of a trained model or of a LoRA adapter, or a hub id", "训练所得模型或 LoRA 适配器的文件夹，或 hub 上的名称"
    add("--path", required=True, help=path, zh=zh)
    add("--output_dir", required=True, help="new or empty folder to write", zh="要写入的文件夹：新建的或空的")
    base = "the model that the adapter was trained on, where adapter_config.json names another place"
    add("--base", help=base, zh="适配器训练时的基座；adapter_config.json 所写的位置已变时使用")
    add("--format", choices=FORMATS, default=FORMATS[0], help="of the files (%(default)s)", zh="文件的格式（%(default)s）")
    dtype, zh = "auto: as the weights are stored (%(default)s)", "auto：与所存权重相同（%(default)s）"
    add("--dtype", choices=DTYPES, default="auto", help=dtype, zh=zh)
    size = "largest size of a weight file, such as 5GB; one file up to 50GB without it"
    add("--max_shard_size", help=size, zh="单个权重文件的最大大小，如 5GB；不给时 50GB 以内为一个文件")
    cuts = "GGUF: llama.cpp's name for how the tokenizer cuts words, where it is not found by itself"
    add("--pre_tokenizer", help=cuts, zh="GGUF：llama.cpp 对分词前切分方式的名称；无法自动认出时给出")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other, a size that is none, or an output folder that is not to be written."""
    gguf = args.format == "gguf"
    refuse(args.pre_tokenizer and not gguf, "--pre_tokenizer is for --format gguf; drop it.")
    refuse(gguf and args.max_shard_size, "--max_shard_size: a GGUF is one file (Ollama opens no parts); drop it.")
    folder = Path(args.output_dir).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is not empty; empty it, or name a new folder.")
    no_size = args.max_shard_size and not re.fullmatch(r"[1-9]\d*[KMG]i?B", args.max_shard_size)
    refuse(
        no_size, f"--max_shard_size {args.max_shard_size} is no size; write a number with KB, MB or GB, such as 5GB."
    )
    check_writable(folder)


def find_model(path: str, base: str | None) -> tuple[CheckpointFolder, Path | None, bool]:
    """Return the checkpoint with the weights, the folder of the adapter over it (None for none), and whether it gives scores.

    Raises UserError for an adapter whose base is not known, a base that is not needed, and a prefix (P-Tuning).
    """
    from models.checkpoint_folder import find_folder, open_checkpoint
    from models.weight_files import BASE_FIELD, PEFT_FILES, read_json

    folder = find_folder(path)
    if (folder / "config.json").is_file() or not (folder / PEFT_FILES[0]).is_file():
        refuse(
            base,
            f"--base: {path} is no adapter alone, with {PEFT_FILES[0]} and no config.json; drop it, or correct --path.",
        )
        checkpoint = open_checkpoint(path)
        refuse(
            checkpoint.prefix(),
            f"{path} is a prefix (P-Tuning), which is no change of weights and cannot be merged; serve the folder itself.",
        )
        return checkpoint, None, checkpoint.gives_scores
    content = read_json(folder / PEFT_FILES[0], path)
    base = base or content.get(BASE_FIELD)
    refuse(
        not base, f"{folder / PEFT_FILES[0]} names no model; give --base, the folder or hub id that it was trained on."
    )
    try:
        return open_checkpoint(base), folder, content.get("task_type") == "SEQ_CLS"
    except UserError as error:
        raise UserError(
            f"the base of the adapter {path} does not open: {str(error).rstrip('.')}; give --base."
        ) from error


def stored_dtype(checkpoint: CheckpointFolder, name: str) -> torch.dtype:
    """Return the dtype of --dtype; for auto that of the checkpoint, float32 where it says none."""
    import torch

    from models.device import DTYPES

    return getattr(torch, checkpoint.stored_dtype or "float32") if name == "auto" else DTYPES[name]


def load_words(checkpoint: CheckpointFolder, adapter: Path | None) -> tuple[Any, Any]:
    """Return tokenizer and template: of training, which writes the adapter into a folder of the merged model, or of the base."""
    from models.templates import load_template
    from models.tokenizer import load_tokenizer

    folder = adapter.parent if adapter and (adapter.parent / "config.json").is_file() else checkpoint
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_template(folder, tokenizer)


def load_merged(
    checkpoint: CheckpointFolder, adapter: Path | None, scores: bool, dtype: torch.dtype, tokenizer: Any
) -> tuple[Any, ...]:
    """Return the network and its weights with the adapter added in, as floats in the dtype.

    Raises UserError for an adapter of another model, and for weights beyond the range of the dtype.
    """
    from models.adapters.lora import merged_state_dict
    from models.adapters.quantization import plain_state_dict
    from models.heads import base_model
    from models.load import load_causal_lm, load_scalar_model
    from models.weight_files import first_line

    options = {"tokenizer": tokenizer} if adapter else {}  # with the rows that training added
    model = (load_scalar_model if scores else load_causal_lm)(checkpoint, dtype=dtype, **options)
    if adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the adapter {adapter} does not fit {checkpoint.path} ({first_line(error)}); give --base."
            ) from error
    network, state_dict = base_model(model), merged_state_dict(model)
    if adapter is None:
        state_dict = plain_state_dict(network, state_dict, dtype)  # integers become floats
    odd = next((name for name, tensor in state_dict.items() if not tensor.isfinite().all()), None)
    refuse(odd, f"the weight {odd} has values that {dtype} cannot hold (or is damaged); give --dtype bf16 or fp32.")
    return network, state_dict


@told
def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a UserError."""
    args = build_parser().parse_args(argv)
    check(args)
    checkpoint, adapter, scores = find_model(args.path, args.base)
    folder = Path(args.output_dir).expanduser()
    if args.format == "gguf":
        from scripts.export.to_gguf import check_gguf, write_gguf
        from scripts.export.vocabulary import name_pre_tokenizer

        check_gguf(checkpoint, scores)
    tokenizer, template = load_words(checkpoint, adapter)
    pre_tokenizer = name_pre_tokenizer(tokenizer, args.pre_tokenizer) if args.format == "gguf" else ""
    dtype = stored_dtype(checkpoint, args.dtype)
    network, state_dict = load_merged(checkpoint, adapter, scores, dtype, tokenizer)
    if args.format == "gguf":
        file = write_gguf(network, state_dict, tokenizer, template, folder, dtype, pre_tokenizer)
        print(f"Saved {file}. Talk to it:  llama-cli -m {file}    or    ollama create NAME -f {folder / 'Modelfile'}")
        return 0
    from models.save import save_model

    save_model(network, tokenizer, template, folder, state_dict, max_shard_size=args.max_shard_size or "50GB")
    print(f"Saved to {folder}, in {str(dtype).removeprefix('torch.')}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
