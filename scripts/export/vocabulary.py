"""A tokenizer as llama.cpp reads it: pieces, their kinds, merges or scores, how text is cut into words, chat template."""

import json
import re
import tempfile
from typing import Any

from jinja2 import TemplateError
from tokenizers import Regex, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from errors import UserError, refuse

BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that cuts text by a pattern, then writes its bytes as characters."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES_ONLY])


# llama.cpp's name of a way to cut text into words, and a pre-tokenizer that does it.
PRE_TOKENIZERS = {
    "gpt-2": WORDS,
    "qwen2": cut(PRETOKENIZE_REGEX),
    "llama-bpe": cut(PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
    "bloom": cut(r" ?[^(\s|[.,!?…。，、।۔،])]+"),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
}
SAMPLE = "I'll pay $1234.50, OK?!\n\n  x = y+1;\r\n\t你好，世界。 naïve Straße's  12 345 «ß» e\u0301 😀 (a|b) [c] a.b ...  \n"


def name_pre_tokenizer(tokenizer: Any, given: str | None = None) -> str:
    """Return llama.cpp's name of the way in which a tokenizer cuts text into words; "default" for SentencePiece.

    given: the name to take, None to recognise it. Raises UserError for a name that is not known, or none that is found, and
    for a tokenizer that is no BPE.
    """
    names = ", ".join(PRE_TOKENIZERS)
    refuse(given and given not in PRE_TOKENIZERS, f"--pre_tokenizer {given} is not known; choose from {names}.")
    if hasattr(tokenizer, "sentence_pieces"):  # ChatGLM's
        return "default"
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    refuse(model["type"] != "BPE", f"a tokenizer of type {model['type']} is not written as GGUF; BPE is.")
    if given or model["byte_fallback"]:
        return given or "default"
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(SAMPLE)
    found = next((name for name, known in PRE_TOKENIZERS.items() if known.pre_tokenize_str(SAMPLE) == words), None)
    if found is None:
        raise UserError(
            f"this tokenizer cuts text into words as no --pre_tokenizer known here does ({names}); give the nearest: a text "
            "that it cuts otherwise becomes other tokens."
        )
    return found


def add_vocabulary(writer: Any, tokenizer: Any, template: Any, rows: int, pre_tokenizer: str) -> None:
    """Write tokenizer and chat template into a gguf.GGUFWriter. rows: of the embedding; those without a token are named [PADi].

    pre_tokenizer: as name_pre_tokenizer gives it.
    """
    from gguf import SpecialVocab, TokenType

    pieces = getattr(tokenizer, "sentence_pieces", None)  # ChatGLM's
    model = None if pieces else json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    byte_level = not pieces and not model["byte_fallback"]
    names: dict[int, str] = {at: token for token, at in tokenizer.get_vocab().items()}
    added = {at: token.special for at, token in tokenizer.added_tokens_decoder.items()}
    special = tokenizer.control_ids if pieces else {at for at, is_special in added.items() if is_special}
    tokens = [names.get(at, f"[PAD{at}]") for at in range(max(rows, max(names) + 1))]
    kinds = [TokenType.NORMAL if at in names else TokenType.UNUSED for at in range(len(tokens))]
    for at, token in names.items():
        if at in special:
            kinds[at] = TokenType.CONTROL
        elif at in added:
            kinds[at] = TokenType.USER_DEFINED
        elif not byte_level and len(token) == 6 and token.startswith("<0x"):
            kinds[at] = TokenType.BYTE
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    if not byte_level:
        writer.add_token_scores(piece_scores(tokens, pieces, model))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        template.save(folder, tokenizer)
        vocabulary = SpecialVocab(folder, load_merges=byte_level, n_vocab=len(tokens))
    stops = dict(zip(("eos", "eot", "eom"), template.stop_token_ids, strict=False))
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "unk", "pad")}
    vocabulary.special_token_ids = {name: at for name, at in ids.items() if at is not None} | stops
    encoded = tokenizer("a").input_ids
    # ChatGLM's opening, [gMASK] sop, stands in its chat template
    vocabulary.add_special_token = {"bos": encoded[0] == tokenizer.bos_token_id, "eos": False}
    vocabulary.add_to_gguf(writer, quiet=True)


def piece_scores(tokens: list[str], pieces: Any, model: dict[str, Any] | None) -> list[float]:
    """Return SentencePiece's score of each token: the pair of the highest is merged first. From its model, or from merges.

    A tokenizer.json keeps no scores, but the merges in their order: a token is worth minus the place of its first one.
    """
    if pieces:
        return [pieces.get_score(at) if at < len(pieces) else 0.0 for at in range(len(tokens))]
    first: dict[str, float] = {}
    for place, (left, right) in enumerate(model["merges"]):
        first.setdefault(left + right, -float(place))
    return [first.get(token, -float(len(model["merges"]))) for token in tokens]


GO_TEMPLATE = """\
{{- $before := "" }}{{ range .Messages }}\
{{ if eq .Role "system" }}SYSTEM{{ .Content }}\
{{ else if eq .Role "user" }}\
{{ if eq $before "" }}FIRST{{ else if eq $before "system" }}BEHIND{{ else }}NEXT{{ end }}{{ .Content }}CLOSE\
{{ else }}{{ .Content }}{{ end }}{{ $before = .Role }}{{ end }}"""


def modelfile(tokenizer: Any, template: Any) -> str:
    """Return Ollama's Modelfile for model.gguf. Ollama runs no Jinja: what the chat template writes between texts is written out.

    ChatGLM2 numbers its rounds, which this form cannot: each later question is written as the second.
    """
    jinja = template.jinja(tokenizer)
    jinja = jinja["default"] if isinstance(jinja, dict) else jinja
    marks = "\x01", "\x02", "\x03"

    def between(*roles: str) -> list[str]:
        """Return the texts around the messages of a dialogue."""
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=False)]
        text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)
        opens = tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # llama.cpp writes the begin token itself
        return re.split("[\x01-\x03]", text.removeprefix(tokenizer.bos_token) if opens else text)

    first, close = between("user")
    try:
        system, behind, _ = between("system", "user")
    except (TemplateError, ValueError):  # a template without system messages, or one that puts them into the question
        system, behind = "", first
    values = {
        "SYSTEM": system,
        "BEHIND": behind,
        "FIRST": first,
        "NEXT": between("user", "assistant", "user")[2],
        "CLOSE": close,
    }
    text = re.sub("|".join(values), lambda name: values[name[0]], GO_TEMPLATE)
    stops = "".join(
        f"PARAMETER stop {json.dumps(token)}\n" for token in tokenizer.convert_ids_to_tokens(template.stop_token_ids)
    )
    return f'FROM ./model.gguf\nTEMPLATE """{text}"""\n{stops}'
