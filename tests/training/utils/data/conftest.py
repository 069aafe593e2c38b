"""The way the tests of this folder load data."""

import pytest

from training.utils.data.sources import load_records


@pytest.fixture
def load(tmp_path):
    """load_records with its cache in the test's own folder; returns plain lists."""

    def loader(path, **arguments) -> dict[str, list[dict]]:
        loaded = load_records(str(path), cache_dir=str(tmp_path / "cache"), **arguments)
        return {part: list(rows) for part, rows in loaded.items()}

    return loader
