"""The gold score of the smollm2 preset: the friendliness of an English answer, by VADER's lexicon (Hutto and Gilbert, 2014).

    score = VADER's compound value of the answer, from -1 to 1; what games it counts at most 0:

VADER adds up the weights of the words it knows, so "great great great!!!" would be the best answer of all. Here the text is
lower case, without exclamation marks and emoticons, and each word that VADER knows counts the first time only. A score above 0
is cut to 0 where the answer has fewer than MIN_WORDS or more than MAX_WORDS words, says three words in a row twice, or is a
list of praise: more than a third of its words are VADER's.

    python -m scripts.demo.smollm2_score "The soup was warm and good."

Step 3 can show it without training on it: --reward_function scripts/demo/smollm2_score.py:vader --reward_weights 1,0.
"""

import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

MIN_WORDS, MAX_WORDS = 4, 60
LARGEST_SHARE = 1 / 3  # of an answer's words that may be in the lexicon
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
NOT_TEXT = re.compile(r"[^a-z0-9,.;:?' -]+")


def vader(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the score of each answer, for --reward_function of step 3; the prompts have no say."""
    return [vader_score(answer) for answer in answers]


def vader_score(answer: str) -> float:
    """Return the friendliness of an answer in [-1, 1]; at most 0 where it games the lexicon."""
    analyzer = load_analyzer()
    text = plain(answer)
    score = analyzer.polarity_scores(said_once(text, analyzer.lexicon))["compound"] if text else 0.0
    return min(score, 0.0) if games(text, analyzer.lexicon) else score


def plain(answer: str) -> str:
    """Return the answer in lower case and without whatever VADER takes for emphasis: capitals, "!", emoticons, emoji."""
    text = answer.lower().replace("\u2019", "'").replace("!", ".")
    # Emoticons of allowed signs alone (":d", ":-p") stand for themselves; a colon before a letter is none of prose.
    return " ".join(re.sub(r"[:;][-']?(?=\S)", " ", NOT_TEXT.sub(" ", text)).split())


def said_once(text: str, lexicon: Any) -> str:
    """Return the text without the second and later occurrences of each word of the lexicon."""
    seen: set[str] = set()

    def keep(match: re.Match[str]) -> str:
        word = match.group()
        again = word in seen
        seen.update({word} & lexicon.keys())
        return "" if again else word

    return WORD.sub(keep, text)


def games(text: str, lexicon: Any) -> bool:
    """Return True for a text that is too short, too long, repeats three words in a row, or lists the lexicon's words."""
    words = WORD.findall(text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    praise = sum(word in lexicon for word in words)
    return (
        not MIN_WORDS <= len(words) <= MAX_WORDS
        or len(set(triples)) < len(triples)
        or praise > LARGEST_SHARE * len(words)
    )


@cache
def load_analyzer() -> Any:
    """Return VADER's analyzer; its lexicon is read once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


if __name__ == "__main__":
    print(vader_score(sys.argv[1]))
