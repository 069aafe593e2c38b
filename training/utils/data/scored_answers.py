"""Several answers in a list, each with its score or rank: [{"response": "…", "score": 7}, …], as UltraFeedback has them; ties."""

from typing import Any

from training.utils.data.names import PREFERENCE, SCORES_OF_TWO, TIES, plain_name, with_our_names
from training.utils.data.turns import BadRecord, Fields, Skip, is_columns, items, role_of, truth

ORDERS = {"score": 1, "rank": -1}  # fields that say the order of several answers -> whether high is good
DECIDES = {*PREFERENCE, "winner"}  # fields of a pair that may say that neither answer is better
TEXTS = ("response", "text", "answer", "output", "content")


def scored_answers(value: Any) -> tuple[list[str], str | None, list[Any]] | None:
    """Return the answers' texts, the field that orders them (None: there is none) and its values; None for any other value."""
    value = items(value, "") if is_columns(value) else value
    if not (isinstance(value, list) and value and all(isinstance(one, dict) and role_of(one) is None for one in value)):
        return None
    named = [with_our_names(one) for one in value]
    texts = [next((one[name] for name in TEXTS if isinstance(one.get(name), str)), None) for one in named]
    if None in texts:
        return None
    order = next((name for name in ORDERS if all(one.get(name) is not None for one in named)), None)
    return texts, order, [one[order] for one in named] if order else []


def scores_apart(row: Fields, field: str) -> Fields:
    """Return a row whose answers are texts, their scores in a field of their own. Raise BadRecord if nothing orders several."""
    found = scored_answers(row[field])
    if found is None:
        return row
    texts, order, values = found
    if order is None and len(texts) > 1:
        names = ", ".join(items(row[field], field)[0])
        raise BadRecord(
            f'field "{field}" is a list of {len(texts)} answers (with {names}), and nothing is known to say which is better; '
            'call the field that does "score" (high is good) or "rank" (1 is the best)'
        )
    return row | {field: texts} | ({order: values} if order else {})


def check_preference(row: Fields) -> None:
    """Raise Skip for a pair, or a vote of the web page (inference/web.py), that prefers neither answer."""
    if row.get("vote") in ("tie", "bad"):
        raise Skip("a vote for neither answer", 0)
    if row.get("rejected") is None:
        return
    plain = {plain_name(name): value for name, value in row.items()}
    if not DECIDES & plain.keys():
        return
    ties = any(truth(plain.get(name)) for name in TIES) or str(plain.get("winner", "")).lower().startswith("tie")
    scores = [(plain.get(better), plain.get(worse)) for better, worse in SCORES_OF_TWO]
    if ties or any(better == worse and better not in (None, "") for better, worse in scores):
        raise Skip("a tie of two answers", 2)
