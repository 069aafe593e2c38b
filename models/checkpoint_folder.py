"""A checkpoint's folder before anything is loaded: what its files say, and the sentences for what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from models.families import FAMILIES
from models.weight_files import (
    ADAPTER_FILES,
    BASE_FIELD,
    PEFT_FILES,
    WEIGHTS,
    base_named_in,
    check_sizes,
    check_weights,
    read_json,
)

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong folder is told without it
    from models.adapters.prefix import PrefixPlan

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "ice_text.model")
SCALAR = "ForSequenceClassification"  # how the name of a reward model's or critic's class ends
UNIT = ("reward_mean", "reward_std")  # of a reward model's scores, in the config of the merged model
MERGE = (
    "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{}').merge_and_unload()"
    ".save_pretrained('merged')\", and copy the tokenizer's files beside it."
)
OUTPUTS = ("output", "outputs", "out", "runs", "results")  # first folder of an output, no owner on the hub


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint, looked at once: ``open_checkpoint`` makes it, checks and loaders share it.

    path: as the user wrote it, for messages. folder: where config and weights are. content: its config.json.
    adapters: folders of LoRA adapters that belong over the weights, in their order; folder is then that of the base.
    text_folder: where tokenizer and template are, None for folder.
    """

    path: str
    folder: Path
    content: dict[str, Any]
    adapters: tuple[Path, ...] = ()
    text_folder: Path | None = None

    @cached_property
    def weights(self) -> Path:
        """Return the folder with the weights: this one, or for a folder with nothing but a prefix the prefix's model.

        Raises UserError for an unsupported type, for weights that are missing, cut, or not what config.json says, and for
        an adapter beside them, which transformers would add to them: most often they have it merged in already.
        Reads headers only, the first time.
        """
        model_type = self.content.get("model_type")
        if str(model_type) not in FAMILIES:  # a damaged file may hold anything here
            raise UserError(
                f"model {self.path} is of type {model_type!r}, which is not supported; supported: {', '.join(FAMILIES)}."
            )
        named = base_named_in(self.folder)
        if named is None:
            check_weights(self.folder, self.path, self.content.get("quantization_bit"))
            if (self.folder / PEFT_FILES[0]).is_file():
                raise UserError(
                    f"model {self.path} holds whole weights and an adapter, which would be added to them once more; remove "
                    f"{' and '.join(PEFT_FILES)} if it is merged into the weights, or else merge it first."
                )
            return self.folder
        file, base = named
        try:
            whole = open_checkpoint(base)
            if base_named_in(whole.folder) is not None or whole.adapters:
                raise UserError(f"it holds {'an adapter' if whole.adapters else 'a prefix'} itself, not a model")
            return whole.weights
        except UserError as error:
            raise UserError(
                f'{file}: "{BASE_FIELD}" names {base}, which does not open: {str(error).rstrip(".")}. Put the folder '
                "there, or correct that field."
            ) from error

    @cached_property
    def stored_bits(self) -> int:
        """Return 4 or 8 where the weights are integers, else 0."""
        content = self.content if self.weights == self.folder else read_json(self.weights / "config.json", self.path)
        return content.get("quantization_bit") or 0

    @property
    def stored_dtype(self) -> str | None:
        """Return the dtype of the weights as config.json names it: "float16", ...; None where it says nothing."""
        return self.content.get("dtype") or self.content.get("torch_dtype")  # transformers before 5

    @property
    def architecture(self) -> str:
        """Return the class of network that saved it: LlamaForCausalLM, ...; "no architecture named" if config.json names none."""
        return str((self.content.get("architectures") or ["no architecture named"])[0])

    @property
    def gives_scores(self) -> bool:
        """Return True for a reward model or a critic."""
        return self.architecture.endswith(SCALAR)

    def check_vocabulary(self) -> None:
        """Raise UserError for a folder without a vocabulary, of which transformers would make up an empty tokenizer."""
        folder = self.text_folder or self.folder
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise UserError(
                f"model {self.path} has no tokenizer (looked for {', '.join(VOCABULARIES)}); copy the whole checkpoint."
            )

    def config(self, **fields: Any) -> Any:
        """Return a config of the caller's own (transformers' PretrainedConfig), with some fields set.

        Raises UserError for a config.json of which transformers makes none.
        """
        from transformers import AutoConfig

        with told_by_transformers(self.folder / "config.json"):
            config = AutoConfig.from_pretrained(self.folder, **fields)
        for name in UNIT if self.adapters else ():
            setattr(config, name, self.content.get(name))
        return config

    def prefix(self, **options: Any) -> PrefixPlan | None:
        """Return the prefix that the model shall have: saved in the folder, or from options (pre_seq_len and the rest, as in
        load_causal_lm); None for none. Raises UserError for options that contradict the folder.
        """
        from models.adapters.prefix import plan_prefix

        plan = plan_prefix(self, **options)
        if plan is not None and self.adapters:
            raise UserError(
                f"model {self.path} is an adapter over {self.folder}, beside which no prefix is trained or read; merge it first: "
                f"{MERGE.format(self.path)}"
            )
        return plan


@contextmanager
def told_by_transformers(file: Path) -> Iterator[None]:
    """Raise UserError for what transformers says of a config.json, each class and version with errors of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise UserError(f"{file}: transformers makes no network of it ({reason}); correct it, or copy the file again.") from error


def open_checkpoint(path: str | Path | CheckpointFolder) -> CheckpointFolder:
    """Look at a folder, or the id of a model on the hub; what was looked at already comes back as it is.

    A folder with a LoRA adapter alone is opened together with the base that it names. Raises UserError if there is no such
    model, or no readable config.json in it. Weights are not looked at yet.
    """
    if isinstance(path, CheckpointFolder):
        return path
    folder = find_folder(path)
    if (folder / PEFT_FILES[0]).is_file() and not any((folder / name).is_file() for name in ("config.json", *WEIGHTS)):
        return open_adapter(str(path), folder)
    inside = [] if (folder / "config.json").is_file() else models_inside(folder)
    if inside:
        names = ", ".join(f"{one.path}{' (a reward model)' * one.gives_scores}" for one in inside)
        raise UserError(f"model {path} has no config.json itself; name one of the models in it: {names}.")
    content = read_json(folder / "config.json", path)
    check_sizes(content, folder / "config.json")
    return CheckpointFolder(str(path), folder, content)


def open_adapter(path: str, folder: Path) -> CheckpointFolder:
    """Return the model that an adapter's folder names as its base, with the adapter over it.

    Tokenizer and template are those in the folder, in that of the merged model which training writes around it, or of the
    base. Raises UserError for an adapter other than LoRA's, a missing file, or a base that does not open or holds integers.
    """
    file = folder / PEFT_FILES[0]
    settings = read_json(file, folder)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{file}: adapters of the kind {settings.get('peft_type')} do not open; those of LORA do.")
    if not any((folder / name).is_file() for name in ADAPTER_FILES):
        raise UserError(f"{folder} has no {ADAPTER_FILES[0]} beside {file.name}; copy the whole folder.")
    named = settings.get(BASE_FIELD)
    if not named:
        raise UserError(f'{file} names no model; add "{BASE_FIELD}", the folder or hub id that it was trained on.')
    try:
        base = open_checkpoint(named)
        if base_named_in(base.folder) is not None:
            raise UserError("it holds a prefix, not a model")
        if base.stored_bits:
            raise UserError(f"its weights are {base.stored_bits}-bit integers; name the merged model that training wrote")
    except UserError as error:
        raise UserError(f'{file}: "{BASE_FIELD}" names {named}, which does not open here: {error}') from error
    merged = folder.parent if (folder.parent / "config.json").is_file() else base.folder
    content = dict(base.content)
    if settings.get("task_type") == "SEQ_CLS":
        content["architectures"] = [re.sub(r"(For\w+|Model)?$", SCALAR, base.architecture, count=1)]
        whole = read_json(merged / "config.json", merged)
        content |= {name: whole[name] for name in UNIT if name in whole}
    texts = [one for one in (folder, merged) if any((one / name).is_file() for name in VOCABULARIES)]
    return CheckpointFolder(path, base.folder, content, (*base.adapters, folder), (*texts, base.text_folder)[0])


def models_inside(folder: Path) -> list[CheckpointFolder]:
    """Return the models in the folders below, as train.py leaves them; those of resumable checkpoints are left out."""
    files = sorted(file for depth in range(1, 4) for file in folder.glob("*/" * depth + "config.json"))
    models = []
    for file in files:
        content = read_json(file, file.parent)
        if str(content.get("model_type")) in FAMILIES and "checkpoints" not in file.parts:
            models.append(CheckpointFolder(str(file.parent), file.parent, content))
    return models


def find_folder(path: str | Path, only: list[str] | None = None) -> Path:
    """Return the folder with a model's files, from the hub where it is the id of a model there. UserError if there is none.

    only: names of the files to fetch; None: all.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"model {path} is a file; name the folder that holds its config.json and weights.")
    if not may_be_on_hub(path):
        raise UserError(
            f"model folder {path} does not exist; train first with the step that writes it, or name a folder with "
            "config.json and weights, or a hub id."
        )
    from huggingface_hub import snapshot_download

    files = only or ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=files))
        if not only and not any((folder / name).exists() for name in WEIGHTS[:2]):
            folder = Path(snapshot_download(str(path), allow_patterns=[*files, "*.bin"]))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OSError, by version
        raise UserError(
            f"model {path} is no folder here, and the hub did not give it ({type(error).__name__}); where there is "
            f"network, run `hf download {path} --local-dir FOLDER` and pass FOLDER, or correct the name."
        ) from error
    return folder


def may_be_on_hub(path: str | Path) -> bool:
    """Return whether a path is no folder here and has the form of a hub id: NAME or OWNER/NAME."""
    form = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path))
    return bool(form) and str(path).split("/")[0] not in OUTPUTS and not Path(path).expanduser().exists()


# --- checks of what the flags ask for -----------------------------------------------------------------------------------


def check_context_length(path: str | Path | CheckpointFolder, length: int, flag: str, **prefix: Any) -> None:
    """Raise UserError if a model with a table of positions (OPT, GPT-2) is asked for more tokens than its table has.

    prefix: as in CheckpointFolder.prefix. The positions of a prefix that peft holds count: tokens stand behind it.
    """
    checkpoint = open_checkpoint(path)
    content = open_checkpoint(checkpoint.weights).content
    if FAMILIES[content["model_type"]].positions:
        saved = prefix.get("ptuning_checkpoint") or checkpoint.weights != checkpoint.folder
        taken = checkpoint.prefix(**prefix).length if saved else prefix.get("pre_seq_len", 0)
        check_positions(content, checkpoint.path, length, flag, taken)


def check_positions(content: dict[str, Any], path: str, length: int, flag: str, taken: int = 0) -> None:
    """Raise UserError if the content of a config.json has a table of positions for fewer tokens. taken: places of a prefix."""
    table = FAMILIES[content["model_type"]].positions
    limit = content.get(*table) if table else None
    if limit is not None and length + taken > limit:
        behind = f" behind a prefix of {taken}" if taken else ""
        raise UserError(
            f"{flag} {length}{behind} is more than the {limit} positions of the {content['model_type']} model {path}; lower it "
            f"to {limit - taken}."
        )


def check_module_name(layers: Iterable[str], module_name: str, model_type: str, flag: str = "--lora_module_name") -> None:
    """Raise UserError if a part of --lora_module_name is in no layer's name. layers: the names of all linear layers."""
    parts = [part.strip() for part in module_name.split(",") if part.strip()]
    unmatched = [part for part in parts if not any(part in name for name in layers)]
    if unmatched or not parts:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise UserError(
            f"{flag} {','.join(unmatched) or module_name} matches no linear layer of this {model_type} model; its layers are "
            f"named like {next(iter(layers))}, the kinds are {', '.join(kinds)}. Use parts of these names, or auto."
        )


def check_recomputed_prefix(model_type: str, gradient_checkpointing: bool) -> None:
    """Raise UserError for gradient checkpointing of a model with a prefix: peft's is in a cache, which it drops."""
    if gradient_checkpointing and model_type != "chatglm":
        raise UserError(
            f"--gradient_checkpointing drops the cache that holds the prefix of a {model_type} model; drop that flag, "
            "in step 3 the one of the model with the prefix (ChatGLM can have both)."
        )


def gets_prefix(path: str | Path | CheckpointFolder, output: str | Path, **prefix: Any) -> bool:
    """Return True if the model will have a prefix (as in CheckpointFolder.prefix) and all its other weights are frozen.

    Raises UserError also if the folder for the output is that of the model which a saved prefix would need, or holds the
    adapter that the run starts from.
    """
    checkpoint = open_checkpoint(path)
    if any(folder.resolve() == (Path(output).expanduser() / "adapter").resolve() for folder in checkpoint.adapters):
        raise UserError(f"--output_dir: {output} holds the adapter that the run starts from; give another folder.")
    plan = checkpoint.prefix(**prefix)
    if plan is not None and plan.base == str(Path(output).expanduser().resolve()):
        raise UserError(f"--output_dir: {output} holds the model that the prefix belongs to; give another folder.")
    return plan is not None


def check_quantized_base(path: str | Path | CheckpointFolder, quantization_bit: int, adapters: bool) -> None:
    """Raise UserError if the base cannot be trained so: integers only under adapters (LoRA, P-Tuning), and quantised once.

    quantization_bit: the flag. adapters: True with --lora_dim or --pre_seq_len.
    """
    checkpoint = open_checkpoint(path)
    stored = checkpoint.stored_bits
    if stored and not adapters:
        raise UserError(
            f"the weights of {checkpoint.path} are {stored}-bit integers, which cannot be trained; train an adapter over "
            "them with --lora_dim or --pre_seq_len, or start from the checkpoint in half precision."
        )
    if stored and quantization_bit not in (0, stored):
        raise UserError(
            f"--quantization_bit {quantization_bit}: the weights of {checkpoint.path} are {stored}-bit integers already; "
            "drop the flag, or start from the checkpoint in half precision."
        )


def first_new_row(path: str | Path | CheckpointFolder, tokenizer: Any) -> int | None:
    """Return the first row that the embedding gets for the tokenizer; None where the model has a learned one for every id: in
    its weights, or in its adapters.
    """
    checkpoint = open_checkpoint(path)
    rows = open_checkpoint(checkpoint.weights).config().vocab_size
    for folder in checkpoint.adapters:
        learned = read_json(folder / PEFT_FILES[0], folder).get("trainable_token_indices") or {}
        rows = max([rows, *(row + 1 for ids in (learned.values() if isinstance(learned, dict) else [learned]) for row in ids)])
    return rows if max(tokenizer.get_vocab().values()) >= rows else None


def check_new_tokens(path: str | Path | CheckpointFolder, tokenizer: Any) -> None:
    """Raise UserError if the tokenizer has tokens without a row in the embedding: P-Tuning freezes it and saves none of it."""
    checkpoint = open_checkpoint(path)
    first = first_new_row(checkpoint, tokenizer)
    if first is not None:
        new = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= first)
        raise UserError(
            f"the tokenizer of {checkpoint.path} has tokens without a row among the {first} of the embedding "
            f"({', '.join(token for _, token in new[:3])}): P-Tuning freezes the embedding, and they would never be learned; "
            "train with --lora_dim or all weights first, or take the tokenizer that belongs to the model."
        )
