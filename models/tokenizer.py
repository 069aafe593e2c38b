"""From a checkpoint's folder to its tokenizer, all that preparing data needs: load.py takes 1.4 s and 80 MB more to import."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from errors import UserError
from models.chatglm.registration import ChatGLMTokenizer
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from models.weight_files import first_line


def load_tokenizer(path: str | Path | CheckpointFolder) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint. Without a pad token, pad is the end token: masks come from lengths, so it is never
    mistaken. ChatGLM's are our own, whatever code lies in the folder. UserError if it is missing or damaged.
    """
    checkpoint = open_checkpoint(path)
    folder, path = checkpoint.text_folder or checkpoint.folder, checkpoint.path
    chatglm = checkpoint.content.get("model_type") == "chatglm"
    checkpoint.check_vocabulary()
    try:
        tokenizer = (ChatGLMTokenizer if chatglm else AutoTokenizer).from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # by family: OSError, ValueError, KeyError, TypeError, the Rust library's plain Exception
        raise UserError(
            f"model {path} has no tokenizer that loads ({first_line(error)}); copy its tokenizer files again."
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {path} has neither a pad nor an end token; set eos_token in tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(
    first: PreTrainedTokenizerBase,
    second: PreTrainedTokenizerBase,
    names: tuple[str, str],
    advice: str = "train the reward model from a model with the actor's tokenizer",
) -> None:
    """Raise UserError unless both give every token the same id: the reward model reads the ids that the actor writes."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours != theirs:
        differing = sum(1 for token, number in ours.items() if theirs.get(token) != number)
        raise UserError(
            f"The tokenizers of {names[0]} ({len(ours)} tokens) and {names[1]} ({len(theirs)} tokens) differ in "
            f"{differing} tokens; {advice}."
        )
