"""From messages to tokens: the one place that knows how a dialogue is written and which tokens end an answer.

The tokenizer of every checkpoint is saved with a chat template that writes the same, for other programs; sanbu_template.json
beside it says what a chat template cannot: which tokens end an answer, and that no text becomes a special token. Later
steps, evaluation and chat read both, so that all of them see the same text and stop at the same tokens. A dialogue is
cut into prompt and answer, which are tokenised apart: ``encode_prompt(messages) + encode_answer(answer)`` is how the
dialogue is written, in training and in the next turn's prompt.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from errors import UserError
from json_text import parse_json
from models import chat_templates
from models.chatglm import prompts
from models.chatglm.prompts import CHATGLM
from models.checkpoint_folder import CheckpointFolder

logger = logging.getLogger("sanbu")

FILE_NAME = "sanbu_template.json"
KINDS = ("chat_template", "human_assistant", *CHATGLM)
TOKEN_LISTS = ("stop_token_ids", "prefix_ids", "suffix_ids")
ALWAYS_SAVED = ("kind", "stop_token_ids")
MARKS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant:", "system": "\n\n"}

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """The form in which prompts and answers are written.

    kind: "chat_template", the tokenizer's own; "human_assistant", "\\n\\nHuman: ...\\n\\nAssistant: ..."; or a
    generation of ChatGLM. A text that spells a special token ("</s>") never becomes it, but in the prompts of a chat
    template, which writes its own marks and the texts, earlier answers too, into one string.
    stop_token_ids: every token that ends an answer. The first is the end token that encode_answer appends.
    prefix_ids: tokens that open every text (bos, ChatGLM2's [gMASK] sop); kept when a prompt is cut.
    suffix_ids: tokens that end every prompt (ChatGLM-6B's [gMASK] <sop>); used by ChatGLM only.
    prompt_suffix: what the chat template forgets to write before an answer.
    answer_prefix, answer_suffix: text between prompt and answer, and between answer and end token.
    anchor: text that an answer is tokenised behind and cut off from; for tokenizers that put a space before each text.
    """

    kind: str
    stop_token_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()
    prompt_suffix: str = ""
    answer_prefix: str = ""
    answer_suffix: str = ""
    anchor: str = ""
    suffix_ids: tuple[int, ...] = ()

    @property
    def end_token_id(self) -> int:
        """Return the token that closes an answer in training."""
        return self.stop_token_ids[0]

    @property
    def frame_length(self) -> int:
        """Count the tokens around a prompt that the network cannot do without: ChatGLM's marks. 0 elsewhere, where bos may go."""
        return len(self.prefix_ids) + len(self.suffix_ids) if self.kind in CHATGLM else 0

    def encode_prompt(self, tokenizer: Any, messages: Messages) -> list[int]:
        """Return the tokens of a dialogue whose last message is the user's, ready for an answer to follow."""
        return self.encode_prompts(tokenizer, [messages])[0]

    def encode_answer(self, tokenizer: Any, answer: str) -> list[int]:
        """Return the tokens of an answer with the end token behind."""
        return self.encode_answers(tokenizer, [answer])[0]

    def encode_prompts(self, tokenizer: Any, dialogues: Sequence[Messages]) -> list[list[int]]:
        """Encode the prompts of many dialogues at once; several times as fast as encode_prompt."""
        if self.kind in CHATGLM:
            encoded = CHATGLM[self.kind].encode_dialogues(tokenizer, dialogues)
            return [[*self.prefix_ids, *ids, *self.suffix_ids] for ids in encoded]
        if self.kind == "chat_template":
            texts = [render_chat(tokenizer, dialogue) + self.prompt_suffix for dialogue in dialogues]
            return encode_texts(tokenizer, texts)
        pieces = [human_assistant_pieces(dialogue) for dialogue in dialogues]
        texts = [piece for dialogue in pieces for piece in dialogue[0::2]]  # MARKS are plain text too
        blocks = iter(encode_texts(tokenizer, texts, literal=True))
        answers = iter(self.encode_answers(tokenizer, [piece for dialogue in pieces for piece in dialogue[1::2]]))
        encoded = []
        for dialogue in pieces:
            parts = [next(answers if place % 2 else blocks) for place in range(len(dialogue))]
            encoded.append([*self.prefix_ids, *chain.from_iterable(parts)])
        return encoded

    def encode_answers(self, tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
        """Encode many answers at once, as encode_answer does one."""
        if self.kind in CHATGLM:
            return [[*ids, self.end_token_id] for ids in CHATGLM[self.kind].encode_answers(tokenizer, answers)]
        texts = [self.answer_prefix + answer + self.answer_suffix for answer in answers]
        if not self.anchor:
            return [[*ids, self.end_token_id] for ids in encode_texts(tokenizer, texts, literal=True)]
        anchor = encode_texts(tokenizer, [self.anchor])[0]
        encoded = encode_texts(tokenizer, [self.anchor + text for text in texts], literal=True)
        for row, ids in enumerate(encoded):
            if ids[: len(anchor)] == anchor:
                encoded[row] = ids[len(anchor) :]
            else:  # anchor and text grew together into one token
                encoded[row] = encode_texts(tokenizer, [texts[row]], literal=True)[0]
        return [[*ids, self.end_token_id] for ids in encoded]

    def decode_answer(self, tokenizer: Any, ids: Sequence[int]) -> str:
        """Return the text of generated tokens up to the first stop token, without special tokens and surrounding space.

        For ChatGLM also with the corrections that the original makes before it shows an answer (clean_reply).
        """
        stop = next((place for place, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        kept = [int(token) for token in ids[:stop]]
        if self.kind in CHATGLM:
            kept = [token for token in kept if token not in tokenizer.control_ids]
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return CHATGLM[self.kind].clean_reply(text) if self.kind in CHATGLM else text.strip()

    def jinja(self, tokenizer: Any) -> Any:
        """Return the Jinja chat template that writes dialogues in this form, for the saved tokenizer."""
        if self.kind in CHATGLM:
            return prompts.chat_template(self.kind)
        if self.kind == "chat_template":
            return chat_templates.own_template(tokenizer.chat_template, self.prompt_suffix)
        return chat_templates.human_assistant(tokenizer, self.prefix_ids, self.end_token_id, encode_texts)

    def save(self, folder: str | Path, tokenizer: Any) -> None:
        """Write the tokenizer with its chat template, and beside it sanbu_template.json: what the template cannot say."""
        before = tokenizer.chat_template
        tokenizer.chat_template = self.jinja(tokenizer)
        saved = replace(self, prompt_suffix="")  # the saved chat template writes it
        try:
            tokenizer.save_pretrained(folder)
            told = asdict(template_of_kind(self.kind, tokenizer))
            warn_if_unlike(saved, tokenizer)
        finally:
            tokenizer.chat_template = before
        own = {name: value for name, value in asdict(saved).items() if name in ALWAYS_SAVED or value != told[name]}
        content = json.dumps({"format": 2, **own}, ensure_ascii=False, indent=2)
        (Path(folder) / FILE_NAME).write_text(content + "\n", encoding="utf-8")


def load_template(folder: str | Path | CheckpointFolder | None, tokenizer: Any) -> Template:
    """Return the template saved beside a checkpoint; where there is none, the one that suits the tokenizer.

    That is the form of its generation for ChatGLM; the tokenizer's own chat template; or else the Human/Assistant form
    with its end token. Raises UserError if the saved file is damaged or belongs to another tokenizer, or if the
    tokenizer has nothing to end an answer with.
    """
    version = getattr(tokenizer, "chatglm_version", None)
    folder = (folder.text_folder or folder.folder) if isinstance(folder, CheckpointFolder) else folder
    file = None if folder is None else Path(folder).expanduser() / FILE_NAME
    if file is None or not file.is_file():
        usual = "chat_template" if tokenizer.chat_template else "human_assistant"
        return template_of_kind(version or usual, tokenizer)
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        layout = content.pop("format")
        if layout not in (1, 2) or content["kind"] not in KINDS or not content["stop_token_ids"]:
            raise ValueError("its format, kind or stop_token_ids are not known here")
        lists = {name: tuple(int(token) for token in content[name]) for name in TOKEN_LISTS if name in content}
        template = Template(**content | lists)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{file} is damaged ({error}); copy the checkpoint again, or delete the file: the tokenizer then decides."
        ) from error
    known, wrong = len(tokenizer), None
    if any(token >= known for token in template.stop_token_ids):
        wrong = f"stops answers at the tokens {list(template.stop_token_ids)}, but the tokenizer beside it knows only {known}"
    elif template.kind != version and (version is not None or template.kind in CHATGLM):
        wrong = f"writes dialogues as {template.kind!r}, and the tokenizer beside it is {version or 'not ChatGLM'}'s"
    elif template.kind == "chat_template" and not tokenizer.chat_template:
        wrong = "asks for the tokenizer's own chat template (chat_template.jinja), and the tokenizer has none"
    if wrong:
        raise UserError(f"{file} {wrong}; take both from the same checkpoint.")
    if layout == 1:  # named every field
        return template
    return replace(template_of_kind(template.kind, tokenizer), **content | lists)


def template_of_kind(kind: str, tokenizer: Any) -> Template:
    """Return the template that a tokenizer has by itself for a kind."""
    if kind in CHATGLM:
        return chatglm_template(tokenizer)
    return chat_template(tokenizer) if kind == "chat_template" else human_assistant_template(tokenizer)


def warn_if_unlike(template: Template, tokenizer: Any) -> None:
    """Warn if the chat template, tokenised in one piece, does not give the tokens of training."""
    dialogue = [("user", "Hello 你好"), ("assistant", "Good day."), ("user", "What now?")]
    messages = [{"role": role, "content": content} for role, content in dialogue]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if theirs != template.encode_prompt(tokenizer, messages):
        logger.warning(
            "other programs will not see dialogues as this model was trained on them: the tokenizer %s cuts the text of its "
            "chat template in another way.",
            name_of(tokenizer),
        )


def chatglm_template(tokenizer: Any) -> Template:
    """Return the form of dialogue of a generation of ChatGLM, which its tokenizer names (chatglm_version)."""
    form = CHATGLM[tokenizer.chatglm_version]
    names = (form.stops, form.opening, form.closing)
    stops, opening, closing = (tuple(tokenizer.convert_tokens_to_ids(list(tokens))) for tokens in names)
    return Template(kind=tokenizer.chatglm_version, stop_token_ids=stops, prefix_ids=opening, suffix_ids=closing)


def human_assistant_template(tokenizer: Any) -> Template:
    """Return the "\\n\\nHuman: ...\\n\\nAssistant: ..." form of DeepSpeed-Chat and hh-rlhf; every answer ends in eos."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {name_of(tokenizer)} has no end token, so that no answer could ever end; set eos_token in "
            "its tokenizer_config.json."
        )
    return Template(
        kind="human_assistant",
        stop_token_ids=(tokenizer.eos_token_id,),
        prefix_ids=tuple(opening_ids(tokenizer)),
        answer_prefix=" ",
        anchor=find_anchor(tokenizer, ":"),
    )


def human_assistant_pieces(messages: Messages) -> list[str]:
    """Return the text to encode, piece by piece: even places are blocks up to "Assistant:", odd places are earlier answers."""
    pieces = [""]
    for message in messages:
        if message["role"] == "assistant":
            pieces[-1] += MARKS["assistant"]
            pieces += [message["content"], ""]
        else:
            mark = "" if message["role"] == "system" and pieces == [""] else MARKS[message["role"]]
            pieces[-1] += mark + message["content"]
    pieces[-1] += MARKS["assistant"]
    return pieces


def chat_template(tokenizer: Any) -> Template:
    """Read what the tokenizer's own chat template does around an answer off a dialogue rendered with it."""
    question, answer, further = "sanbu question", "sanbu answer", "sanbu further"
    ask = [{"role": "user", "content": question}]
    answered = [*ask, {"role": "assistant", "content": answer}]
    prompt = render_chat(tokenizer, ask)
    once = render_chat(tokenizer, answered, open_answer=False)
    twice = render_chat(tokenizer, [*answered, {"role": "user", "content": further}], open_answer=False)

    before = once[len(prompt) : once.find(answer)] if once.startswith(prompt) and answer in once else ""
    after = ""
    if answer in twice and further in twice:
        after = twice[twice.find(answer) + len(answer) : twice.find(further)]
    suffix, end = first_special(tokenizer, after)
    if end is None:  # the template marks turns with plain text only
        suffix, end = "", tokenizer.eos_token_id
    if end is None:
        raise UserError(
            f"the chat template of {name_of(tokenizer)} puts no special token behind an answer, and the tokenizer has "
            "no eos_token; set one in tokenizer_config.json."
        )
    stops = (end,) if tokenizer.eos_token_id is None else (end, tokenizer.eos_token_id)
    ids = encode_texts(tokenizer, [twice])[0]
    return Template(
        kind="chat_template",
        stop_token_ids=tuple(dict.fromkeys(stops)),
        prefix_ids=tuple(leading_ids(tokenizer, ids)),
        # Text, not only space, between prompt and answer: a template that does not open the answer. Part of the prompt.
        prompt_suffix=before if before.strip() else "",
        answer_prefix="" if before.strip() else before,
        answer_suffix=suffix,
        anchor=find_anchor(tokenizer, ((prompt + before).rstrip(" ") or "\n")[-1]),
    )


def render_chat(tokenizer: Any, messages: Messages, *, open_answer: bool = True) -> str:
    """Return the dialogue as the tokenizer's chat template writes it. Raises UserError if the template refuses it."""
    try:
        # enable_thinking: the reasoning templates (Qwen3, GLM-4.5) then put an empty thought into the prompt, so that
        # the answer holds nothing but the answer; the others do not look at it.
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=open_answer, enable_thinking=False
        )
    except Exception as error:  # jinja2's errors, and whatever a template raises by itself
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template of {name_of(tokenizer)} refuses a dialogue of {roles}: {error}.") from error


def name_of(tokenizer: Any) -> str:
    """Return a tokenizer's name for a message."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def encode_texts(tokenizer: Any, texts: Sequence[str], *, literal: bool = False) -> list[list[int]]:
    """Return the tokens of each text, nothing added. literal: a text that spells a special token ("</s>") does not become it.

    A fast tokenizer that encodes as transformers' own does so without offsets, in 0.6 to 0.75 of the time.
    """
    from transformers import PreTrainedTokenizerFast

    if not texts:
        return []
    if getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        options = {"return_attention_mask": False, "verbose": False, "split_special_tokens": literal}
        return tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]
    backend = tokenizer.backend_tokenizer  # which keeps what the last call of transformers set
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != literal:
        backend.encode_special_tokens = literal
    return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def opening_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text: bos for LLaMA and OPT, none for BLOOM, Qwen, GPT-2."""
    plain = encode_texts(tokenizer, ["a"])[0]
    whole = tokenizer("a", verbose=False)["input_ids"]
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])


def leading_ids(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return special tokens that open a dialogue, not just a turn: bos, or those that do not come again ([gMASK]<sop>)."""
    special = special_ids(tokenizer)
    lead = []
    for token in ids:
        if token not in special or (token != tokenizer.bos_token_id and ids.count(token) > 1):
            break
        lead.append(token)
    return lead


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all tokens that text is first cut at; runs of spaces, which some tokenizers list there, are none."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if str(content).strip()}
    return added | set(tokenizer.all_special_ids)


def first_special(tokenizer: Any, text: str) -> tuple[str, int | None]:
    """(text before it, id) of the first special token in a text; ("", None) if there is none."""
    special = special_ids(tokenizer)
    found = next((token for token in encode_texts(tokenizer, [text])[0] if token in special), None) if text else None
    if found is None:
        return "", None
    return text[: max(text.find(tokenizer.convert_ids_to_tokens(found)), 0)], found


def find_anchor(tokenizer: Any, character: str) -> str:
    """Return "" if a text has the same tokens alone and behind a line break; else the character to tokenise answers behind.

    SentencePiece tokenizers (LLaMA 2) put a space before each text; an answer on its own would begin with two of them.
    """
    alone, line, both = encode_texts(tokenizer, ["a", "\n", "\na"])
    return "" if line + alone == both else character
