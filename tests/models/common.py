"""What the tests of models share: as much of a template as saving asks for, token ids, training in short."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from models.load import load_causal_lm


@dataclass
class Stops:
    """As much of a template as save_model asks for."""

    stop_token_ids: tuple[int, ...] = (2,)

    def save(self, folder: Path, tokenizer) -> None:
        """Leave the tokenizer and a file, as a template does."""
        tokenizer.save_pretrained(folder)
        (Path(folder) / "sanbu_template.json").write_text("{}", encoding="utf-8")


def load(path, read=load_causal_lm, **options):
    """Load a model in float32, a language model unless ``read`` says otherwise."""
    return read(path, **{"dtype": torch.float32} | options)


def tokens(batch: int = 2, time: int = 8, seed: int = 0, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Random ids [batch, time] of the tiny vocabularies and a mask without padding; folder: of the model that reads them."""
    ids = torch.randint(7, 390, (batch, time), generator=torch.Generator().manual_seed(seed))
    if folder is not None and folder.name == "chatglm-6b":  # which needs the marks that a prompt ends in
        config = AutoConfig.from_pretrained(folder)
        ids[:, 2:4] = torch.tensor([config.gmask_token_id, config.bos_token_id])
    return ids, torch.ones_like(ids)


def shake(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Move every trained weight, as training would; LoRA's B starts at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter under its name, as the training engine hands them to save_prefix."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
