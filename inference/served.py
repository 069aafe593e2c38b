"""A model opened to be served: its folder, of any kind, and LoRA adapters over it by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, refuse
from inference.chatbot import Sampling, chat_folder, load_chatbot
from models.checkpoint_folder import find_folder, open_checkpoint
from models.weight_files import PEFT_FILES, read_json


@dataclass
class ServedModel:
    """A model in evaluation mode on its device, and what belongs to it.

    name: the model as it was loaded; adapters: name -> folder of the others. longest: tokens of a prompt and its answer together.
    scores: True for a reward model.
    """

    name: str
    model: Any
    tokenizer: Any
    template: Any
    longest: int
    adapters: dict[str, str]
    scores: bool = False

    def __post_init__(self) -> None:
        self.main = "default" if "default" in getattr(self.model, "peft_config", {}) else None
        self.active: str | None = None

    @property
    def stop_token_ids(self) -> list[int]:
        """Return the tokens that end an answer, and the one behind a call of GLM's, where the result is to follow."""
        behind_call = self.tokenizer.get_vocab().get("<|observation|>")
        return [*self.template.stop_token_ids, *([] if behind_call is None else [behind_call])]

    @property
    def names(self) -> list[str]:
        """Return the names that a request may give."""
        return [self.name, *self.adapters]

    def use(self, adapter: str | None) -> None:
        """Let an adapter compute from now on; None: the model as it was loaded."""
        if adapter == self.active:
            return
        wanted, self.active = adapter or self.main, adapter
        if wanted is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(wanted, inference_mode=True)


def gives_scores(path: str) -> bool:
    """Return True for the folder of a reward model. UserError if there is no model."""
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and open_checkpoint(folder).gives_scores


def check_served(path: str, name: str | None, adapters: dict[str, str]) -> None:
    """Raise UserError for a model or adapters that cannot be served, before torch is imported, which takes seconds."""
    for one, folder in adapters.items():
        check_adapter(one, folder, name or default_name(path))
    scores = gives_scores(path)
    refuse(scores and adapters, f"--adapter: --path {path} is a reward model, over which no adapters are served; drop the flag.")
    checkpoint = open_checkpoint(path if scores else chat_folder(path))
    checkpoint.check_vocabulary()
    checkpoint.weights  # noqa: B018  (reads the headers of the files, and raises for what is missing or cut)


def open_model(path: str, name: str | None = None, adapters: dict[str, str] | None = None, dtype: str = "auto") -> ServedModel:
    """Load the model of a folder, or hub id, with adapters (name -> folder) over it. UserError for what is wrong with them."""
    name, adapters = name or default_name(path), adapters or {}
    check_served(path, name, adapters)
    if gives_scores(path):
        return open_reward_model(path, name, dtype)
    bot = load_chatbot(path, Sampling(), dtype=dtype)
    model, length = bot.model, bot.longest()
    if adapters:
        model = with_adapters(model, adapters)
    return ServedModel(name, model, bot.tokenizer, bot.template, length, adapters)


def default_name(path: str) -> str:
    """Return the name of a model that is served from a path: the last part of it, or of the parent's for .../actor."""
    folder = Path(path).expanduser().resolve()
    return folder.parent.name if folder.name in ("actor", "adapter") else folder.name


def open_reward_model(path: str, name: str, dtype: str) -> ServedModel:
    """Load a reward model."""
    from inference.chatbot import context_length
    from models.device import attention_implementation, detect_platform, resolve_dtype, set_device
    from models.heads import prefix_length
    from models.load import load_scalar_model
    from models.templates import load_template
    from models.tokenizer import load_tokenizer

    checkpoint, platform = open_checkpoint(path), detect_platform()
    tokenizer = load_tokenizer(checkpoint)
    attention = attention_implementation("auto", platform)
    model = load_scalar_model(checkpoint, dtype=resolve_dtype(dtype, platform), attn=attention)
    model = model.to(set_device(platform, 0)).eval()
    longest = context_length(model.config) - prefix_length(model)
    return ServedModel(name, model, tokenizer, load_template(checkpoint, tokenizer), longest, {}, scores=True)


def check_adapter(name: str, path: str, base: str) -> None:
    """Raise UserError if a folder holds no LoRA adapter of a language model, or if its name is taken or cannot be written."""
    flag = f"--adapter {name}={path}"
    refuse(name in (base, "default"), f"{flag}: {name} is the name of the model itself; give the adapter another one.")
    folder = find_folder(path)
    if (folder / "config.json").is_file() or not (folder / PEFT_FILES[0]).is_file():
        inside = " (there is one in its folder adapter)" if (folder / "adapter" / "adapter_config.json").is_file() else ""
        raise UserError(f"{flag}: no folder of a LoRA adapter alone, with adapter_config.json and no config.json{inside}.")
    scores = read_json(folder / PEFT_FILES[0], folder).get("task_type") == "SEQ_CLS"
    refuse(scores, f"{flag} is the adapter of a reward model, which does not talk; name one of an SFT model or an actor.")


def with_adapters(model: Any, adapters: dict[str, str]) -> Any:
    """Return a PeftModel around the model with these adapters, none of them in use but the model's own."""
    from peft import PeftModel

    from models.heads import is_peft, prefix_length
    from models.weight_files import first_line

    refuse(prefix_length(model), "--adapter: the model has a prefix (P-Tuning), over which no adapters are served; drop one.")
    for name, path in adapters.items():
        try:
            if is_peft(model):
                model.load_adapter(path, adapter_name=name, is_trainable=False)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"--adapter {name}={path} does not fit the model ({first_line(error)}); it was trained on another one."
            ) from error
    model = model.eval()
    if "default" in model.peft_config:
        model.set_adapter("default", inference_mode=True)
    else:
        model.base_model.disable_adapter_layers()
    return model
