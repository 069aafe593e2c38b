"""What the tokenizers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B share: SentencePiece under transformers' tokenizer.

Written for transformers 5, where the original code fails in many places; the results are those that the original gave
under transformers 4.27 and 4.30. Two ways lead from text to ids: calling the tokenizer, as the original answers it, and
``encode_plain``, in which nothing that a text says becomes a control token.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

CONFIG = "tokenizer_config.json"
# Keys that transformers adds to tokenizer_config.json; the original's constructor has no use for them.
INTERNAL = ("backend", "files_loaded", "is_local", "local_files_only", "name_or_path", "special_tokens_map_file")


class TokenizerFilesError(ValueError):
    """The files of a tokenizer are missing, damaged or of a release that is not known here; says what to do."""


class SentencePieceTokenizer(PreTrainedTokenizer):
    """A SentencePiece vocabulary, and behind it control tokens that no text produces (``control``).

    A generation says which special tokens plain text may spell out (literals, only through calling the tokenizer),
    how ids are framed, padded and turned into text. Ids that have no piece - the networks have more rows than the
    tokenizers have pieces, and a random network generates them - decode to "", where the original raises IndexError.
    """

    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012  (transformers' own form)
    chatglm_version: str  # "chatglm", "chatglm2" or "chatglm3": also the kind of the template
    control: tuple[str, ...] = ()  # tokens whose ids follow the pieces
    literals: tuple[str, ...] = ()  # special tokens that calling the tokenizer finds in a text
    strips = True  # whether space around a literal, and around an added token, is lost
    chat_marks = ""  # regular expression of the control tokens that the saved chat template writes
    reads_chat = False  # whether the text comes from the chat template
    always_masked = True  # whether a row has mask and positions also where no padding is asked for

    def __init__(self, vocab_file: str, **options: Any) -> None:
        self.vocabulary_bytes, self.sentence_pieces, ids, without_text = read_vocabulary(vocab_file)
        self.vocabulary = ids | {token: len(ids) + place for place, token in enumerate(self.control)}
        self.vocabulary_size = len(self.vocabulary)
        # Ids that stand for no text: unknown, begin, end, pad, masks, start and end of a piece, roles.
        self.control_ids = without_text | set(range(len(ids), self.vocabulary_size))
        # What the vocabulary knows keeps its id and is no "added" token; only tokens of the user's own are.
        added = options.get("added_tokens_decoder") or {}
        options["added_tokens_decoder"] = {at: token for at, token in added.items() if int(at) >= self.vocabulary_size}
        super().__init__(**options)

    # --- the vocabulary ---

    @property
    def vocab_size(self) -> int:
        """Return the ids without those of added tokens."""
        return self.vocabulary_size

    @property
    def vocab_file(self) -> str:
        """Return the name of the vocabulary file inside a checkpoint."""
        return self.vocab_files_names["vocab_file"]

    def get_vocab(self) -> dict[str, int]:
        """Return every token and its id, control and added tokens included."""
        return {**self.vocabulary, **self._added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.get(token, self.sentence_pieces.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < len(self.sentence_pieces):
            return self.sentence_pieces.id_to_piece(index)
        place = index - len(self.sentence_pieces)
        return self.control[place] if 0 <= place < len(self.control) else ""

    # --- text to ids ---

    def prepare_text(self, text: str) -> str:
        """Rewrite in a text what SentencePiece would lose."""
        return text

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, nothing added; text that spells a control token stays text. Many texts at once are fast.

        Half a surrogate pair (text cut inside an emoji) becomes U+FFFD.
        """
        prepared = [self.prepare_text(text) for text in texts]
        whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in prepared]
        return self.sentence_pieces.encode(whole) if whole else []

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self._convert_id_to_token(token) for token in self.encode_plain([text])[0]]

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """Cut a text as the original does: literals and added tokens that it spells out stay whole."""
        if self.reads_chat:
            return self.tokenize_chat(text)
        added = [token for token, at in self._added_tokens_encoder.items() if at >= self.vocabulary_size]
        names = sorted((*self.literals, *added), key=len, reverse=True)
        if not names or options.get("split_special_tokens", self.split_special_tokens):
            return self._tokenize(text)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        tokens = []
        for place, part in enumerate(parts):
            if place % 2:
                tokens.append(part)
                continue
            if self.strips and place:
                part = part.lstrip()
            if self.strips and place + 1 < len(parts):
                part = part.rstrip()
            tokens += self._tokenize(part) if part else []
        return tokens

    def apply_chat_template(self, *inputs: Any, **options: Any) -> Any:
        """As for every tokenizer of transformers; the marks of the chat template become control tokens here alone."""
        self.reads_chat = True
        try:
            return super().apply_chat_template(*inputs, **options)
        finally:
            self.reads_chat = False

    def tokenize_chat(self, text: str) -> list[str]:
        """Cut a dialogue that the chat template has written at its marks."""
        tokens = []
        for place, part in enumerate(re.split(f"({self.chat_marks})", text)):
            if place % 2:
                tokens += re.findall(r"\[gMASK\]|<?sop>?|<\|\w+\|>", part)
            elif part:
                tokens += self._tokenize(part)
        return tokens

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Return 1 for each token that build_inputs_with_special_tokens adds, 0 for the tokens of the text."""
        if already_has_special_tokens:
            return [int(token in self.control_ids) for token in token_ids_0]
        text = [-1] * len(token_ids_0), None if token_ids_1 is None else [-1] * len(token_ids_1)
        return [int(token >= 0) for token in self.build_inputs_with_special_tokens(*text)]

    def _pad(self, encoded_inputs: Any, *limits: Any, **options: Any) -> Any:
        """Pad one row, in place: input_ids as transformers does, mask and positions by pad_beside."""
        row, length = encoded_inputs, len(encoded_inputs["input_ids"])
        with_mask = options.pop("return_attention_mask", None) is not False
        super()._pad(row, *limits, return_attention_mask=False, **options)
        strategy = getattr(options.get("padding_strategy"), "value", "do_not_pad")
        if strategy != "do_not_pad" or self.always_masked:
            side = options.get("padding_side") or self.padding_side
            self.pad_beside(row, length, len(row["input_ids"]) - length, side, with_mask)
        return row

    # --- ids to text ---

    def text_of(self, ids: list[int]) -> str:
        """Return the text of ids of this vocabulary, none of them of an added token."""
        return self.sentence_pieces.decode([at for at in ids if 0 <= at < len(self.sentence_pieces)])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens; added tokens stand as they are named, ids without a token ("") leave no trace."""
        parts, run = [], []
        for token in self.convert_tokens_to_ids([token for token in tokens if token]):
            if token >= self.vocabulary_size:
                parts += [self.text_of(run), self._added_tokens_decoder[token].content]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.text_of(run)])

    # --- files ---

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the vocabulary file as it was read."""
        name = f"{filename_prefix}-{self.vocab_file}" if filename_prefix else self.vocab_file
        file = Path(save_directory) / name
        file.write_bytes(self.vocabulary_bytes)
        return (str(file),)

    def saved_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """tokenizer_config.json such that the original code opens it too."""
        kept = {key: value for key, value in config.items() if key not in INTERNAL}
        kept["added_tokens_decoder"] = {
            at: token for at, token in kept.get("added_tokens_decoder", {}).items() if int(at) >= self.vocabulary_size
        }
        if not kept["added_tokens_decoder"]:
            del kept["added_tokens_decoder"]
        return {**kept, "tokenizer_class": "ChatGLMTokenizer", "chatglm_version": self.chatglm_version}

    def _save_pretrained(self, save_directory: str, file_names: tuple[str, ...], **options: Any) -> tuple[str, ...]:
        """transformers has written tokenizer_config.json by now; what the original must not see goes out of it."""
        file = Path(file_names[0])
        config = self.saved_config(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory=save_directory, file_names=file_names, **options)


def beside(values: list, pads: list, side: str) -> list:
    """Return values with pads on one side."""
    return pads + values if side == "left" else values + pads


def read_vocabulary(file: str | Path) -> tuple[bytes, sentencepiece.SentencePieceProcessor, dict[str, int], set[int]]:
    """Read the SentencePiece model in a file: its bytes, and as parse_vocabulary.

    Raises TokenizerFilesError if it is none, or a part of one.
    """
    try:
        content = Path(file).read_bytes()
    except (OSError, TypeError) as error:
        raise TokenizerFilesError(f"{file} cannot be read ({error}); copy the vocabulary file again.") from error
    try:
        return content, *parse_vocabulary(content)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise TokenizerFilesError(
            f"{file} ({len(content)} bytes) is no SentencePiece model, or only a part of one; copy the vocabulary file "
            "of the ChatGLM checkpoint again (GLM-4-9B's file of the same name is another format)."
        ) from error


@lru_cache(maxsize=2)
def parse_vocabulary(content: bytes) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, int], set[int]]:
    """Return the pieces, their ids, and the ids that stand for no text.

    Parsed once: 130,000 pieces take 0.8 s, and a run opens a tokenizer several times.
    """
    if not content:
        raise ValueError("it is empty")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    numbers = range(len(pieces))
    ids = {piece: number for number, piece in enumerate(pieces.id_to_piece(list(numbers)))}
    without_text = {number for number in numbers if pieces.is_control(number) or pieces.is_unknown(number)}
    return pieces, ids, without_text
