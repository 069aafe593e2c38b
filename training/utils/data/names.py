"""The names of fields: ours, others that are known for them, and those that say nothing of a dialogue."""

from functools import lru_cache
from itertools import chain

from training.utils.data.turns import Fields, truth

OUR_NAMES = ("prompt", "response", "chosen", "rejected", "messages", "conversations", "context", "instruction")
OUR_NAMES += ("input", "output", "history", "system", "content", "summary", "margin", "score", "rank", "label", "tools")
# Other names that published sets and tools use for ours.
ALIASES = {
    **dict.fromkeys(("query", "问题", "提问"), "prompt"),
    **dict.fromkeys(("completion", "completions", "responses", "回答", "答案"), "response"),
    **dict.fromkeys(("rejected_response", "rejected_messages"), "rejected"),
    **dict.fromkeys(("chosen_response", "chosen_messages"), "chosen"),
    **dict.fromkeys(("scores", "rating", "ratings", "reward", "rewards"), "score"),
    **dict.fromkeys(("overall_score", "overall_scores", "overall_rating", "overall_ratings"), "score"),
    **{"ranks": "rank"},  # not "ranking": it may also list the places of the answers in their order
    **{"conversation": "conversations", "指令": "instruction", "输入": "input", "输出": "output"},
    **{"系统": "system", "system_prompt": "system", "历史": "history", "kto_tag": "label", "functions": "tools"},
}
# Names of "label" where it says true or false.
VERDICTS = {"is_good", "is_correct", "is_chosen", "is_desirable", "correct", "desirable", "thumbs_up"}
# Names of a question and of its answer where a row holds no other text (clear_columns): the first that is there.
CLEAR = {"prompt": ("question", "q", "问", "input"), "response": ("answer", "a", "答", "output", "reply", "target")}
# Fields of a pair that say that neither answer is better: a mark, or the same value for both.
TIES = ("tie", "is_tie")
SCORES_OF_TWO = [
    names
    for stem in ("score", "rating", "reward", "overall_score", "overall_rating")
    for names in ((f"chosen_{stem}", f"rejected_{stem}"), (f"{stem}_chosen", f"{stem}_rejected"))
]
PREFERENCE = {*TIES, *chain.from_iterable(SCORES_OF_TWO)}
# Beside a "prompt" these look like its answer: not prompt-only data, but a format that --columns must explain.
ANSWER_LIKE = {"answer", "answers", "output", "target", "reply", "label", "text", "summary"}
# Fields that are plainly no content. Other texts that no format reads are warned of.
NO_CONTENT = {"id", "idx", "index", "uid", "uuid", "source", "src", "dataset", "data_source", "lang", "language"}
NO_CONTENT |= {"category", "task", "task_type", "type", "kind", "tag", "tags", "topic", "domain", "license", "origin"}
NO_CONTENT |= {"model", "models", "split", "url", "link", "time", "timestamp", "created_at", "version", "name"}
NO_CONTENT |= {"author", "date", "vote"}


@lru_cache(4096)
def plain_name(name: str) -> str:
    """Return the name of a field in small letters, with _ for -."""
    return name.strip().lower().replace("-", "_")


def says_nothing(name: str) -> bool:
    """Return whether a field of this name is plainly no content."""
    return name.lower() in NO_CONTENT or plain_name(name).endswith(("label", "_id", "_source", "_url", "_model"))


def known_names(row: Fields) -> dict[str, str]:
    """Return the fields of a row with another known name (ALIASES, or ours in capitals) -> ours, where ours is free.

    Of several that could be one of ours the first takes it, those that are null last.
    """
    known: dict[str, str] = {}
    for name in sorted(row, key=lambda name: row[name] is None):
        plain = name.strip().lower()
        ours = ALIASES.get(plain, plain if plain in OUR_NAMES else name)
        if plain in VERDICTS and truth(row[name]) is not None:
            ours = "label"
        if ours != name and row.get(ours) is None and ours not in known.values():
            known[name] = ours
    return known


def with_our_names(row: Fields) -> Fields:
    """Return a row whose fields of other known names have ours."""
    known = known_names(row)
    if not known:
        return row
    others = {name: value for name, value in row.items() if name not in known and name not in known.values()}
    return others | {ours: row[name] for name, ours in known.items()}


def clear_columns(row: Fields) -> dict[str, str]:
    """Return our names -> those in a row of its question and answer, where these have the usual names (CLEAR)."""
    known, columns = with_our_names(row), {}
    taken = {"prompt": ("prompt", "instruction", "messages", "conversations"), "response": ("response", "chosen", "rejected")}
    plain = {name.strip().lower(): name for name, value in row.items() if isinstance(value, str)}
    for ours, names in CLEAR.items():
        theirs = next((plain[name] for name in names if name in plain), None)
        if theirs and all(known.get(name) is None for name in taken[ours]):
            columns[ours] = theirs
    return columns
