"""Tiny models that the evaluations' tests share, and a slow way to answer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.tiny import tiny_reward_model


@pytest.fixture(scope="package")
def qwen2(folder_of) -> Path:
    """A tiny language model with another tokenizer and template; read only."""
    return folder_of("qwen2", 1)


@pytest.fixture(scope="package")
def reward_model(llama, tmp_path_factory) -> Path:
    """A tiny reward model, saved as step 2 saves it; read only."""
    return tiny_reward_model(llama, tmp_path_factory.mktemp("models") / "reward")


class SlowAnswers:
    """transformers' own greedy generation, one prompt at a time and without padding."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.template = load_template(folder, self.tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def __call__(self, question: str, longest: int) -> tuple[str, int, bool]:
        """Return the text of the answer, its number of tokens, and whether it ended by itself."""
        ids = torch.tensor([self.template.encode_prompt(self.tokenizer, [{"role": "user", "content": question}])])
        made = self.model.generate(
            ids,
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=list(self.template.stop_token_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )[0, ids.shape[1] :].tolist()
        return self.template.decode_answer(self.tokenizer, made), len(made), made[-1] in self.template.stop_token_ids


@pytest.fixture(scope="session")
def slow_answers() -> type[SlowAnswers]:
    """The class, for a folder of choice."""
    return SlowAnswers
