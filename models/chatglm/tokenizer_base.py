"""What the tokenizers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B share: SentencePiece under transformers' tokenizer.

Written for transformers 5, where the original code fails in many places; the results are those that the original gave
under transformers 4.27 and 4.30. Two ways lead from text to ids: calling the tokenizer, as the original answers it, and
``encode_plain``, in which nothing that a text says becomes a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import BatchEncoding, PreTrainedTokenizer

from errors import UserError

CONFIG = "tokenizer_config.json"
AUTO_MAP = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
# Keys that transformers adds to tokenizer_config.json; the original's constructor has no use for them.
INTERNAL = ("backend", "files_loaded", "is_local", "local_files_only", "name_or_path", "special_tokens_map_file")


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
    strips = True  # whether space around a literal is lost
    always_masked = True  # whether a row has mask and positions also where no padding is asked for

    def __init__(self, vocab_file: str, **options: Any) -> None:
        read = read_vocabulary(vocab_file)
        self.sentence_pieces, self.vocabulary_bytes = read.pieces, read.content
        self.vocabulary = read.ids | {token: len(read.ids) + place for place, token in enumerate(self.control)}
        self.vocabulary_size = len(self.vocabulary)
        # Ids that stand for no text: unknown, begin, end, pad, masks, start and end of a piece, roles.
        self.control_ids = read.without_text | set(range(len(read.ids), self.vocabulary_size))
        # What the vocabulary knows keeps its id and is no "added" token; only tokens of the user's own are.
        added = options.get("added_tokens_decoder") or {}
        options["added_tokens_decoder"] = {at: token for at, token in added.items() if int(at) >= self.vocabulary_size}
        super().__init__(**options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **options: Any) -> Any:
        """Return the tokenizer of a folder. Raises UserError for a damaged vocabulary or one of another model."""
        folder = Path(str(pretrained_model_name_or_path)).expanduser()
        if folder.is_dir():  # before transformers gets hold of the error and makes another of it
            read_vocabulary(folder / cls.vocab_files_names["vocab_file"])
        return super().from_pretrained(pretrained_model_name_or_path, *inputs, **cls.look_at(folder, options))

    # --- the vocabulary ---

    @property
    def vocab_size(self) -> int:
        """Ids without those of added tokens."""
        return self.vocabulary_size

    @property
    def vocab_file(self) -> str:
        """The name of the vocabulary file inside a checkpoint."""
        return self.vocab_files_names["vocab_file"]

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, control and added tokens included."""
        return {**self.vocabulary, **self._added_tokens_encoder}

    def own_added_tokens(self) -> dict[str, int]:
        """Tokens that somebody added to the vocabulary (add_tokens), with their ids."""
        return {token: at for token, at in self._added_tokens_encoder.items() if at >= self.vocabulary_size}

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.get(token, self.sentence_pieces.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < len(self.sentence_pieces):
            return self.sentence_pieces.id_to_piece(index)
        place = index - len(self.sentence_pieces)
        return self.control[place] if 0 <= place < len(self.control) else ""

    # --- text to ids ---

    def prepare_text(self, text: str) -> str:
        """What is written differently before SentencePiece reads it."""
        return text

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, nothing added; text that spells a control token stays text. Many texts at once are fast.

        Half a surrogate pair (text cut inside an emoji) becomes U+FFFD.
        """
        prepared = [self.prepare_text(text) for text in texts]
        if not prepared:
            return []
        try:
            return self.sentence_pieces.encode(prepared)
        except (RuntimeError, TypeError, UnicodeError):  # by version of sentencepiece
            whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in prepared]
            return self.sentence_pieces.encode(whole)

    def encode_literals(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text as the original cuts it: spelled-out literals and added tokens become their ids."""
        own = self.own_added_tokens()
        names = sorted((*self.literals, *own), key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        if pattern is None or not any(pattern.search(text) for text in texts):
            return self.encode_plain(texts)
        cut = [self.split_literals(text, pattern) for text in texts]
        encoded = iter(self.encode_plain([part for parts in cut for part in parts[0::2] if part]))
        rows = []
        for parts in cut:
            row = []
            for place, part in enumerate(parts):
                if place % 2:
                    row.append(self._convert_token_to_id_with_added_voc(part))
                elif part:
                    row += next(encoded)
            rows.append(row)
        return rows

    def split_literals(self, text: str, pattern: re.Pattern[str]) -> list[str]:
        """Text at even places, tokens at odd ones; space beside a token is lost where its kind says so."""
        parts = pattern.split(text)
        for place in range(1, len(parts), 2):
            added = self._added_tokens_decoder.get(self._added_tokens_encoder.get(parts[place], -1))
            built_in = parts[place] in self.literals
            if self.strips if built_in else added.lstrip:
                parts[place - 1] = parts[place - 1].rstrip()
            if self.strips if built_in else added.rstrip:
                parts[place + 1] = parts[place + 1].lstrip()
        return parts

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """The tokens of a text, as calling the tokenizer cuts it."""
        plain = options.get("split_special_tokens", self.split_special_tokens)
        ids = (self.encode_plain if plain else self.encode_literals)([text])[0]
        return [self.convert_ids_to_tokens(token) for token in ids]

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Plain lists of texts are encoded at once, ten times as fast as one by one; the rest goes transformers' way."""
        slow = ("return_overflowing_tokens", "return_special_tokens_mask", "return_length", "is_split_into_words")
        truncation = getattr(options.get("truncation_strategy"), "value", "do_not_truncate")
        simple = text_pair is None and truncation == "do_not_truncate" and not any(options.get(name) for name in slow)
        if not (simple and text and isinstance(text, (list, tuple)) and all(isinstance(one, str) for one in text)):
            return super()._encode_plus(text, text_pair, **options)
        plain = options.get("split_special_tokens", self.split_special_tokens)
        rows = (self.encode_plain if plain else self.encode_literals)(text)
        if options.get("add_special_tokens", True):
            rows = [self.build_inputs_with_special_tokens(row) for row in rows]
        strategy = getattr(options.get("padding_strategy"), "value", "do_not_pad")
        wanted = options.get("return_attention_mask")
        if strategy == "do_not_pad" and wanted is False:
            return BatchEncoding({"input_ids": rows}, tensor_type=options.get("return_tensors"))
        padded = self.pad(
            {"input_ids": rows},
            padding=strategy,
            max_length=options.get("max_length"),
            pad_to_multiple_of=options.get("pad_to_multiple_of"),
            padding_side=options.get("padding_side"),
            return_attention_mask=wanted,
        )
        return BatchEncoding(padded, tensor_type=options.get("return_tensors"))

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each token that build_inputs_with_special_tokens adds, 0 for the tokens of the text."""
        if already_has_special_tokens:
            control = self.control_ids
            return [int(token in control) for token in token_ids_0]
        text = [-1] * len(token_ids_0), None if token_ids_1 is None else [-1] * len(token_ids_1)
        return [int(token >= 0) for token in self.build_inputs_with_special_tokens(*text)]

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: Any = "do_not_pad",
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> Any:
        """Pad one row, in place: input_ids, what transformers keeps beside them, mask and positions (pad_beside)."""
        row, length = encoded_inputs, len(encoded_inputs["input_ids"])
        strategy = getattr(padding_strategy, "value", padding_strategy)
        if strategy == "longest":
            max_length = length
        if max_length is not None and pad_to_multiple_of:
            max_length = -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
        side = padding_side or self.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side {side!r}: expected 'left' or 'right'")
        pads = 0 if strategy == "do_not_pad" or max_length is None else max(0, max_length - length)
        for key, value in (("input_ids", self.pad_token_id), ("special_tokens_mask", 1)):
            if key in row:
                row[key] = beside(list(row[key]), [value] * pads, side)
        if strategy != "do_not_pad" or self.always_masked:
            self.pad_beside(row, length, pads, side, return_attention_mask is not False)
        return row

    # --- ids to text ---

    def text_of(self, ids: list[int]) -> str:
        """Text of ids of this vocabulary, none of them of an added token."""
        return self.sentence_pieces.decode([at for at in ids if 0 <= at < len(self.sentence_pieces)])

    def text_with_added(self, ids: list[int]) -> str:
        """Text of ids; added tokens stand as they are named."""
        parts, run = [], []
        for token in ids:
            if token >= self.vocabulary_size and token in self._added_tokens_decoder:
                parts += [self.text_of(run), self._added_tokens_decoder[token].content]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.text_of(run)])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens, written as decode writes it."""
        return self.text_with_added(self.convert_tokens_to_ids(tokens))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        text = self.text_with_added([token for token in ids if token not in skipped])
        clean = clean_up_tokenization_spaces
        clean = self.clean_up_tokenization_spaces if clean is None else clean
        return self.clean_up_tokenization(text) if clean else text

    def clean_up_tokenization(self, text: str) -> str:
        """Space before punctuation and English endings removed, as transformers 4 does; transformers 5.0 lacks it."""
        for ending in (".", "?", "!", ","):
            text = text.replace(f" {ending}", ending)
        text = text.replace(" ' ", "'")
        for ending in ("n't", "'m", "'s", "'ve", "'re"):
            text = text.replace(f" {ending}", ending)
        return text

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
        kept.setdefault("auto_map", AUTO_MAP)
        return {**kept, "tokenizer_class": "ChatGLMTokenizer", "chatglm_version": self.chatglm_version}

    def _save_pretrained(self, save_directory: str, file_names: tuple[str, ...], **options: Any) -> tuple[str, ...]:
        """transformers has written tokenizer_config.json by now; what the original must not see goes out of it."""
        file = Path(file_names[0])
        config = self.saved_config(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory=save_directory, file_names=file_names, **options)


def beside(values: list, pads: list, side: str) -> list:
    """Values with pads on one side."""
    return pads + values if side == "left" else values + pads


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary file. ids: piece -> id. without_text: ids of pieces that stand for no text. content: its bytes."""

    pieces: sentencepiece.SentencePieceProcessor
    ids: dict[str, int]
    without_text: set[int]
    content: bytes


def read_vocabulary(file: str | Path) -> Vocabulary:
    """Read the SentencePiece model in a file. UserError if it is none or only a part of one."""
    try:
        content = Path(file).read_bytes()
    except (OSError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the vocabulary file again.") from error
    try:
        return parse_vocabulary(content)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} ({len(content)} bytes) is no SentencePiece model, or only a part of one; copy the vocabulary file "
            "of the ChatGLM checkpoint again (GLM-4-9B's file of the same name is another format)."
        ) from error


@lru_cache(maxsize=2)
def parse_vocabulary(content: bytes) -> Vocabulary:
    """Parse a SentencePiece model, once: 130,000 pieces take 0.8 s, and a run opens a tokenizer several times."""
    if not content:
        raise ValueError("it is empty")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    numbers = range(len(pieces))
    ids = {piece: number for number, piece in enumerate(pieces.id_to_piece(list(numbers)))}
    without_text = {number for number in numbers if pieces.is_control(number) or pieces.is_unknown(number)}
    return Vocabulary(pieces, ids, without_text, content)


def read(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is none; UserError if it is broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the checkpoint again.") from error
    return content if isinstance(content, dict) else {}
