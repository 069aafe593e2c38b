import random
import struct
from pathlib import Path

import pyarrow
import pytest

from training.utils.data import records, tokenize
from training.utils.data.arrow_rows import RELEASE, arrow_writer, column_of, read_arrow

ODD = pyarrow.schema({"numbers": pyarrow.list_(pyarrow.int32()), "text": pyarrow.string(), "number": pyarrow.float32()})
TEXTS = ("", "a", "é 好 🙂", "x" * 300, None)
LISTS = ([], [7], list(range(90)), [-(2**31), 2**31 - 1], None)


def bytes_of(batch: pyarrow.RecordBatch) -> bytes:
    return batch.serialize().to_pybytes()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 500])
def test_columns_are_those_of_pyarrow_to_the_byte(count):
    draw = random.Random(count)
    turns = [[{"role": "user", "content": draw.choice(TEXTS[:4]), "more": 1}] * draw.randrange(3) for _ in range(count)]
    texts = {"chosen": "b", "margin": draw.choice([None, 0.3, 2]), "calls": None}
    of_records = [texts | {"messages": one, "rejected": draw.choice(TEXTS)} for one in turns]
    odd = [{"numbers": draw.choice(LISTS), "text": draw.choice(TEXTS), "number": draw.choice([0, -0.0, 1.5, None])} for _ in turns]
    for rows, schema in ((of_records, records.SCHEMA), (odd, ODD)):
        columns = [column_of([row[field.name] for row in rows], field.type) for field in schema]
        ours = pyarrow.RecordBatch.from_arrays(columns, schema=schema)
        ours.validate(full=True)
        assert bytes_of(ours) == bytes_of(pyarrow.RecordBatch.from_pylist(rows, schema=schema))


def test_what_does_not_fit_a_column_is_an_error():
    for values, kind in (([2**31], pyarrow.int32()), ([1.5], pyarrow.int32()), (["1"], pyarrow.float32()), ([1], pyarrow.string())):
        with pytest.raises((struct.error, AttributeError)):
            column_of(values, kind)


def mapped_kib(file) -> int:
    """What this process holds of a mapped file."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            held += int(line.split()[1])
    return held


def test_a_pass_holds_few_pages_of_a_file(tmp_path):
    file = tmp_path / "rows.arrow"
    row = {"input_ids": list(range(1000)), "prompt_length": 1, "between": [], "length": 1000}
    with arrow_writer(file, tokenize.SCHEMAS[1]) as write:
        for number in range(8 * RELEASE):
            write([row | {"prompt_length": number}] * 40)
    rows, most, size = read_arrow(file), 0, file.stat().st_size >> 10
    for place, one in enumerate(rows.select(range(1, len(rows)))):
        assert one == row | {"prompt_length": (place + 1) // 40}
        if place % 200 == 0:
            most = max(most, mapped_kib(file))
    assert 0 < most < size / 4
    assert rows[41]["prompt_length"] == 1
