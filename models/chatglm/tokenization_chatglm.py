"""The tokenizer of ChatGLM-6B (v1.1): ice_text.model, prompts that END in [gMASK] <sop>, masks of a prefix LM."""

import re
from typing import Any

import numpy as np

from .tokenizer_base import CONFIG, SentencePieceTokenizer, TokenizerFilesError, beside

LONGEST_BLANK = 80  # the vocabulary has <|blank_2|> to <|blank_80|>
BLANKS = re.compile(f" {{2,{LONGEST_BLANK}}}")
WRITTEN = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d{1,2})\|>")
NEEDED = ("<pad>", "<n>", "[MASK]", "[gMASK]", "<sop>", "<eop>")


class ChatGLMTokenizer(SentencePieceTokenizer):
    """ChatGLM-6B v1.1. Ids, tokens, text, masks and positions are those of the original under transformers 4.27.

    ``tokenizer(text)`` turns the literals "[MASK]", "<sop>", "<eop>", "<pad>" and "<unk>" of a text into control tokens
    and loses the space around them, as the original does; ``encode_plain`` never does that. When padding is asked for,
    the result has attention_mask, bool [1, length, length] a row with True = hidden, and position_ids [2, length].
    Other than the original: padding on the right works too; ids without a piece decode to "".
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012
    chatglm_version = "chatglm"
    always_masked = False
    chat_marks = r"\[gMASK\]<sop>\Z"
    literals = ("[MASK]", "<sop>", "<eop>", "<pad>", "<unk>")

    def __init__(
        self,
        vocab_file: str,
        gmask_token: str = "[gMASK]",
        end_token: str = "</s>",
        do_lower_case: bool = False,
        remove_space: bool = False,
        num_image_tokens: int = 20000,
        **options: Any,
    ) -> None:
        # transformers 5 gathers what it does not know and would make it special in every text.
        named = {"gmask_token": gmask_token, "end_token": end_token}
        for key in ("model_specific_special_tokens", "extra_special_tokens"):
            if isinstance(options.get(key), dict):
                named |= options.pop(key)
        options.pop("chatglm_version", None)
        if num_image_tokens:
            raise TokenizerFilesError(
                f"{vocab_file} is of a ChatGLM-6B release before v1.1 (num_image_tokens {num_image_tokens} in {CONFIG}, which "
                "is also the default where the key is missing; 150528 ids); take THUDM/chatglm-6b as it is now, with "
                '"num_image_tokens": 0 and 130528 ids.'
            )
        self.gmask_token, self.end_token = str(named.pop("gmask_token")), str(named.pop("end_token"))
        self.do_lower_case, self.remove_space = do_lower_case, remove_space
        usual = {
            "bos_token": "<sop>",
            "eos_token": "<eop>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "[MASK]",
            "clean_up_tokenization_spaces": True,
        }
        super().__init__(vocab_file, **(usual | {key: value for key, value in options.items() if value is not None}))
        lost = [token for token in NEEDED if token not in self.vocabulary]
        if lost:
            raise TokenizerFilesError(
                f"{vocab_file} lacks the pieces {', '.join(lost)}: it is not ChatGLM-6B v1.1's (2,706,249 bytes); copy "
                "ice_text.model from THUDM/chatglm-6b."
            )

    @property
    def gmask_token_id(self) -> int:
        """Return [gMASK], the mask token of every prompt: what follows is the answer."""
        return self.convert_tokens_to_ids(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """</s>, which ended sequences before v1.1; <eop> does now."""
        return self.convert_tokens_to_ids(self.end_token)

    def prepare_text(self, text: str) -> str:
        """Line breaks, tabs and runs of spaces have pieces of their own, which SentencePiece would lose."""
        if self.remove_space:
            text = " ".join(text.strip().split())
        if self.do_lower_case:
            text = text.lower()
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """prompt [gMASK] <sop>, or prompt [gMASK] <sop> answer <eop>."""
        vocabulary = self.vocabulary
        ids = [*token_ids_0, self.gmask_token_id, vocabulary["<sop>"]]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, vocabulary["<eop>"]]

    def pad_beside(self, row: dict[str, Any], length: int, pads: int, side: str, with_mask: bool) -> None:
        """Add mask and positions as soon as padding is asked for, as in the original."""
        ids, (left, right) = list(row["input_ids"]), (pads, 0) if side == "left" else (0, pads)
        real = ids[left : left + length]
        if with_mask:
            mask = np.asarray(row["attention_mask"], dtype=bool) if "attention_mask" in row else self.hidden(real)
            row["attention_mask"] = np.pad(mask, ((0, 0), (left, right), (left, right)), constant_values=True)
        positions = row["position_ids"] if "position_ids" in row else self.positions(real)
        row["position_ids"] = [beside(list(channel), [0] * pads, side) for channel in positions]

    def context_length(self, ids: list[int]) -> int:
        """Return the tokens before the first <sop>; all of them where there is none."""
        start = self.vocabulary["<sop>"]
        return ids.index(start) if start in ids else len(ids)

    def hidden(self, ids: list[int]) -> np.ndarray:
        """Return [1, length, length], True = hidden: every row sees the whole context, the rest is causal."""
        mask = ~np.tri(len(ids), dtype=bool)
        mask[:, : self.context_length(ids)] = False
        return mask[None]

    def positions(self, ids: list[int]) -> list[list[int]]:
        """Return [2, length]: the place in the context, then that of the mask token; and the place in the answer, from 1.

        The mask token is [MASK] if the row has one, else [gMASK]; the network looks for them the other way round.
        """
        context = self.context_length(ids)
        places = list(range(len(ids)))
        mask = next((token for token in (self.vocabulary["[MASK]"], self.gmask_token_id) if token in ids), None)
        if mask is not None:
            places[context:] = [ids.index(mask)] * (len(ids) - context)
        return [places, [0] * context + list(range(1, len(ids) - context + 1))]

    def text_of(self, ids: list[int]) -> str:
        """Return the text of ids; <pad> and control tokens leave no trace, <unk> is " ⁇ "."""
        pad = self.vocabulary["<pad>"]
        text = self.sentence_pieces.decode([at for at in ids if 0 <= at < self.vocabulary_size and at != pad])
        return WRITTEN.sub(lambda found: " " * int(found[1]) if found[1] else "\n" if found[0] == "<n>" else "\t", text)

    def saved_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Name all its tokens, as the original does, and say that there are no image tokens (its default is 20000)."""
        own = {"gmask_token": self.gmask_token, "end_token": self.end_token, "num_image_tokens": 0}
        own |= {"do_lower_case": self.do_lower_case, "remove_space": self.remove_space}
        kept = super().saved_config(config)
        kept.pop("model_specific_special_tokens", None)
        return kept | own
