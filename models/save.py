"""From a network to a folder that transformers opens by itself; it changes all at once, or as near to it as files allow."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from models.adapters.quantization import model_bits, plain_state_dict
from models.heads import base_model
from models.weight_files import PREFIX_FILE


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: str = "50GB",
) -> None:
    """Write weights (safetensors), config, generation config, tokenizer and template; called by one process.

    state_dict: names as in base_model(model).state_dict(), whole tensors, where the module's own are split (ZeRO-3) or
    wrapped (LoRA: merged_state_dict). Tensors are stored in the model's dtype. Everything is written into a hidden folder
    in it and read back before it is moved to its place, config.json last: what is interrupted on the way does not look
    like a checkpoint.
    """
    network = base_model(model)
    if state_dict is None:
        if network is not model:
            raise ValueError("a model with an adapter needs state_dict, for instance adapters.merged_state_dict(model)")
        state_dict = network.state_dict()
        if not hasattr(network.config, "quantization_bit"):  # only ChatGLM has checkpoints of integers
            state_dict = plain_state_dict(network, state_dict, network.dtype)
    aliases = network.all_tied_weights_keys  # {second name: first name} of tied weights, which are stored once
    integers = any(name.endswith(".weight_scale") for name in state_dict)
    if hasattr(network.config, "quantization_bit"):  # LoRA over integers is merged into floats
        network.config.quantization_bit = model_bits(network) if integers else 0

    def stored(name: str, tensor: Tensor) -> Tensor:
        as_trained = tensor.is_floating_point() and not name.endswith(".weight_scale")
        return tensor.detach().to("cpu", network.dtype if as_trained else None).contiguous()

    state_dict = {name: stored(name, tensor) for name, tensor in state_dict.items() if aliases.get(name) not in state_dict}
    with new_checkpoint(network, tokenizer, template, Path(folder)) as draft:
        # Newer transformers write in rank 0 only; nodes that share no disk have a process each that calls this.
        network.should_save_on_this_rank = lambda is_main_process: True
        try:
            network.save_pretrained(draft, state_dict=dict(state_dict), max_shard_size=max_shard_size)
        finally:
            del network.should_save_on_this_rank
        check_saved(draft, state_dict)


def settle_special_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template) -> None:
    """Say in the network's configs what transformers' own generation and scoring shall stop and pad with."""
    stops = list(template.stop_token_ids)
    if network.can_generate():
        network.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
        )
    elif tokenizer.pad_token_id not in stops:
        network.config.pad_token_id = tokenizer.pad_token_id
    else:
        # transformers' own scoring skips every pad id at the end. With pad = end token it would read the token before
        # the end; without a pad id it reads the last token and refuses batches, which is right or loud.
        network.config.pad_token_id = None


def check_saved(folder: Path, state_dict: dict[str, Tensor]) -> None:
    """Read a saved checkpoint back: names and shapes of all tensors, the bits of one. OSError if they
    differ, or if a tensor is empty, as ZeRO-3's are that nobody has gathered.
    """
    empty = [name for name, tensor in state_dict.items() if tensor.numel() == 0]
    if empty:
        raise OSError(f"{folder}: {len(empty)} tensors to be saved are empty, such as {empty[0]}")
    read_back = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  (no iterator of its own)
                read_back[name] = tuple(content.get_slice(name).get_shape())
                if name == min(state_dict) and not torch.equal(content.get_tensor(name), state_dict[name]):
                    raise OSError(f"{file}: {name} reads back differently; the disk or the file system is at fault")
    written = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    # transformers stores some weights under published names (GPT-NeoX: embed_out); those must agree in shape at least
    odd_read = sorted(shape for name, shape in read_back.items() if name not in written)
    odd_written = sorted(shape for name, shape in written.items() if name not in read_back)
    if odd_read != odd_written or any(read_back[name] != written[name] for name in read_back.keys() & written.keys()):
        raise OSError(f"{folder}: {len(read_back)} tensors read back, {len(written)} written, or their shapes differ")


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise OSError if the tokenizer in a saved folder does not read text as this one does."""
    sample = "Hello 你好\n"
    if AutoTokenizer.from_pretrained(folder)(sample).input_ids != tokenizer(sample).input_ids:
        raise OSError(f"{folder}: the tokenizer reads back differently")


@contextmanager
def new_checkpoint(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template, folder: Path
) -> Iterator[Path]:
    """Give an empty hidden folder in ``folder`` for config and weights; tokenizer and template follow, and all of it is moved
    into ``folder``. What a save that was killed left there is removed. Of one that fails inside nothing stays.

    In the folder, not beside it: the folder may be "." or on a disk of its own, and its parent may be another user's.
    """
    settle_special_ids(network, tokenizer, template)
    draft, made = folder / ".draft", not folder.exists()
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        template.save(draft, tokenizer)
        check_tokenizer(draft, tokenizer)
    except BaseException:
        shutil.rmtree(folder if made else draft, ignore_errors=True)
        raise
    publish(draft, folder)


def publish(draft: Path, folder: Path) -> None:
    """Move the files of ``draft`` into ``folder``, which may hold other things (metrics, checkpoints of the run);
    config.json goes last.
    """
    share_permissions(draft, "config.json")
    (folder / "config.json").unlink(missing_ok=True)  # from here on the old checkpoint does not count
    for old in [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*"), *folder.glob("adapter_*")]:
        old.unlink()
    (folder / PREFIX_FILE).unlink(missing_ok=True)
    for file in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
        target = folder / file.name
        if target.is_dir():
            shutil.rmtree(target)
        file.replace(target)
    draft.rmdir()


def share_permissions(folder: Path, example: str) -> None:
    """Give all files in a folder the permissions of one that was written as the umask says.

    safetensors makes files that only their owner may read.
    """
    mode = (folder / example).stat().st_mode
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(mode)
