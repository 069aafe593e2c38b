"""An answer as text while it is being generated."""

from collections.abc import Callable
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for the first bytes of a character
# ChatGLM's answers are corrected before they are shown (clean_reply): "[[训练时间]]" becomes a year, and a punctuation mark
# takes the width of the character behind it. What may still change stands in the last so many characters.
CORRECTED = len("[[训练时间]]")


class TextStream:
    """Turns the tokens of one answer into pieces of text that never break a character; together they are the answer (but for
    an unfinished character at its very end, which some decoders show in the place of finished ones before it).

    show(piece) is called with each piece that is not empty. add(token) after each token, finish() at the end, which returns
    the whole text as Template.decode_answer gives it.
    """

    def __init__(self, template: Any, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.template, self.tokenizer, self.show = template, tokenizer, show
        self.held = CORRECTED if template.kind.startswith("chatglm") else 0
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, token: int) -> None:
        """Take one more token."""
        self.tokens.append(token)
        text = self.text().rstrip(UNFINISHED)
        self._show(text[: max(0, len(text) - self.held)])

    def finish(self) -> str:
        """Show what was held back; return the whole text."""
        text = self.text()
        self._show(text)
        return text

    def text(self) -> str:
        """Return the answer so far."""
        return self.template.decode_answer(self.tokenizer, self.tokens)

    def _show(self, text: str) -> None:
        # A byte-fallback decoder takes characters back while the next one is unfinished.
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text
