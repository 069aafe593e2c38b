"""What --columns could be for a row that fits no format."""

import re
from typing import Any

from training.utils.data.names import NO_CONTENT

QUESTION = re.compile("question|query|prompt|instruction|input|request|ask|问|指令|输入", re.IGNORECASE)
ANSWER = re.compile("answer|response|output|reply|target|completion|summary|solution|chosen|good|better|win|答|输出", re.IGNORECASE)
WORSE = re.compile("neg|bad|reject|worse|lose|other|_k$|差", re.IGNORECASE)


def suggested_columns(row: dict[str, Any]) -> str:
    """Return what --columns could be for the texts of a row, by their names; an example where these do not say enough."""
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in NO_CONTENT]
    texts = [name for name in texts if not name.lower().endswith(("_id", "_url", "_source", "_label"))]
    asked = next((name for name in texts if QUESTION.search(name) and not ANSWER.search(name)), None)
    others = [name for name in texts if name != asked]
    worse = next((name for name in others if WORSE.search(name)), None)
    better = next((name for name in others if name != worse and (worse or ANSWER.search(name))), None)
    if not asked or not better:
        return "prompt=question,response=answer"
    columns = {"prompt": asked} | ({"chosen": better, "rejected": worse} if worse else {"response": better})
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items() if ours != theirs)
