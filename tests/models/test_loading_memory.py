"""Loading holds the weights once: the benchmark's measurement on a small checkpoint."""

import sys

import pytest

from benchmarks.loading_memory import LIMIT, Case, in_a_fresh_process, write_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the figures come from /proc")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write_checkpoint(folder / "bin", "bin", width=512, layers=6, vocabulary=3000)
    write_checkpoint(folder / "bin warm", "bin", width=64, layers=1, vocabulary=500)
    return folder


def test_shards_of_float16_become_float32_without_a_second_copy(checkpoints):
    found = in_a_fresh_process(checkpoints / "bin", Case("bin", "float32"))
    # lm_head and embedding of these sizes, stored apart as in the release; 12 h^2 + biases and norms a layer
    parameters = 3000 * 512 + 6 * (12 * 512**2 + 13 * 512) + 2 * 512
    assert found["weights"] == pytest.approx(4 * parameters, rel=0.01)
    assert 0.9 <= found["own"] / found["weights"] <= LIMIT
