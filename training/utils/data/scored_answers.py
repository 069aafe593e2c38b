"""Several answers in a list, each with its score or rank: [{"response": "…", "score": 7}, …], as UltraFeedback has them."""

from typing import Any

from training.utils.data.names import with_our_names
from training.utils.data.turns import BadRecord, Fields, is_columns, items, role_of

ORDERS = {"score": 1, "rank": -1}  # fields that say the order of several answers -> whether high is good
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
