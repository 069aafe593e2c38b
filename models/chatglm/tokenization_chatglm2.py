"""The tokenizer of ChatGLM2-6B and ChatGLM3-6B: one tokenizer.model, texts that BEGIN with [gMASK] sop."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from .tokenizer_base import CONFIG, SentencePieceTokenizer, TokenizerFilesError, beside

logger = logging.getLogger("sanbu")

MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
VERSIONS = {"chatglm2": MASKS, "chatglm3": MASKS + ROLES}
CHANGED = "changed_tokens"  # in tokenizer_config.json: special tokens that are not the usual ones
USUAL = {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}


class ChatGLMTokenizer(SentencePieceTokenizer):
    """ChatGLM2-6B and ChatGLM3-6B. Ids, tokens, text, masks and positions are those of the originals (transformers 4.30).

    chatglm_version: "chatglm2" or "chatglm3", which has four role tokens more and writes control tokens by their names
    when it decodes; ChatGLM2 writes nothing for them. Text never becomes a control token, except with ChatGLM3's option
    encode_special_tokens, which reads role tokens out of texts; ``encode_plain`` never does.

    Other than the originals: pad and end token can be set, and are listed as special tokens, so that
    skip_special_tokens leaves pads out instead of writing " ⁇ "; padding on the right works; ids without a token decode
    to ""; the control tokens have their names in get_vocab for ChatGLM2 as well, so that its length is len(tokenizer).
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    strips = False

    def __init__(
        self,
        vocab_file: str,
        chatglm_version: str | None = None,
        encode_special_tokens: bool = False,
        changed_tokens: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        chatglm_version = chatglm_version or find_version(Path(vocab_file).parent)
        if chatglm_version not in VERSIONS:
            raise TokenizerFilesError(
                f"{CONFIG} beside {vocab_file}: chatglm_version {chatglm_version!r}, expected {' or '.join(VERSIONS)}."
            )
        self.chatglm_version = chatglm_version
        self.control = VERSIONS[chatglm_version]
        roles = f"|{'|'.join(map(re.escape, ROLES))}" if chatglm_version == "chatglm3" else ""
        self.chat_marks = rf"\A\[gMASK\]sop{roles}"
        self.encode_special_tokens = encode_special_tokens
        self.literals = ROLES if encode_special_tokens and chatglm_version == "chatglm3" else ()
        given = {key: value for key, value in options.items() if value is not None}
        super().__init__(vocab_file, **(USUAL | given | (changed_tokens or {})))

    def get_command(self, token: str) -> int:
        """Return the id of a control token by its name; also <bos>, <eos> and <pad>. The original's method."""
        pieces = self.sentence_pieces
        names = {"<bos>": pieces.bos_id(), "<eos>": pieces.eos_id(), "<pad>": pieces.unk_id()}
        if token not in names and token not in self.control:
            raise ValueError(f"{token!r} is no control token of {self.chatglm_version}")
        return names[token] if token in names else self.vocabulary[token]

    def get_prefix_tokens(self) -> list[int]:
        """Return [gMASK] sop, which opens every text. The original's method."""
        return [self.vocabulary["[gMASK]"], self.vocabulary["sop"]]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return [gMASK] sop text, or [gMASK] sop prompt answer </s>."""
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.get_command("<eos>")]

    def pad_beside(self, row: dict[str, Any], length: int, pads: int, side: str, with_mask: bool) -> None:
        """attention_mask (1 = real) and position_ids (0 on pads), each [length], also where nothing is padded."""
        for key, usual in (("attention_mask", [1] * length), ("position_ids", list(range(length)))):
            if key != "attention_mask" or with_mask:
                row[key] = beside(list(row.get(key, usual)), [0] * pads, side)

    def _convert_id_to_token(self, index: int) -> str:
        name = super()._convert_id_to_token(index)
        return "" if self.chatglm_version == "chatglm2" and index >= len(self.sentence_pieces) else name

    def text_of(self, ids: list[int]) -> str:
        """Return the text of ids. ChatGLM3 writes control tokens by name, and the space of the word behind them is kept."""
        if self.chatglm_version == "chatglm2":
            return super().text_of(ids)
        known = [at for at in ids if 0 <= at < self.vocabulary_size]
        return self.sentence_pieces.decode_pieces([self._convert_id_to_token(at) for at in known])

    def saved_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Without the special tokens: the original's cannot be set, and loading a file that sets them fails there.

        Tokens that were changed are kept under a name of our own.
        """
        kept = super().saved_config(config)
        now = {name: kept.pop(name) for name in self.SPECIAL_TOKENS_ATTRIBUTES if name in kept}
        changed = {name: token for name, token in now.items() if token is not None and token != USUAL.get(name)}
        kept.pop(CHANGED, None)
        if self.encode_special_tokens:
            kept["encode_special_tokens"] = True
        return kept | ({CHANGED: changed} if changed else {})


def find_version(folder: Path) -> str:
    """Return "chatglm2" or "chatglm3", told by the files of a folder, which hold the same vocabulary in both.

    What our own save writes (chatglm_version), else the name that tokenizer_config.json or config.json gives, else the
    published lengths (seq_length). transformers overwrites names when it loads: the files are read here.
    """
    files = (folder / name for name in (CONFIG, "config.json"))
    tokenizer, model = (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files)
    if tokenizer.get("chatglm_version"):
        return tokenizer["chatglm_version"]
    for name in (tokenizer.get("name_or_path"), model.get("_name_or_path")):
        found = next((version for version in VERSIONS if version in str(name).lower()), None)
        if found:
            return found
    lengths = {8192: "chatglm3", 32768: "chatglm2"}
    if model.get("seq_length") in lengths:
        return lengths[model["seq_length"]]
    logger.info("%s does not say whether it is ChatGLM2 or ChatGLM3; taken for ChatGLM2.", folder)
    return "chatglm2"
