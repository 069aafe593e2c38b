"""Rollouts under ZeRO-3 with weights that stay split: the answers of gathered weights, on two processes with other prompts."""

import json

import pytest
import torch

from tests.launching import succeed
from tests.models.test_chatglm import TINY, tiny
from tests.tiny import tiny_checkpoint
from tests.training.layerwise_worker import CASES

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """case -> what the two processes saw."""
    folder = tmp_path_factory.mktemp("layerwise")
    for family in {case.family for case in CASES}:
        if family in TINY:
            tiny(family).save_pretrained(folder / family)
        else:
            tiny_checkpoint(folder / family, family, seed=1)
    for size in {case.persist for case in CASES}:
        override = {"zero_optimization": {"stage3_param_persistence_threshold": size}}
        (folder / f"persist-{size}.json").write_text(json.dumps(override))
    succeed("tests.training.layerwise_worker", [str(folder)], processes=2)
    names = {case: case.name for case in CASES} | {"turns": "turns"}
    return {case: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for case, name in names.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_split_weights_answer_as_gathered_ones(found, case):
    """Five prompts beside two, two at once, answers of different lengths: whoever is done waits for the other."""
    lengths = []
    for process in found[case]:
        for kind in ("greedy", "sampled"):
            (tokens, _, log_probs), expected = process["layerwise"][kind], process["gathered"][kind]
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(log_probs, expected[2], atol=1e-5, rtol=0)
        lengths.append(process["layerwise"]["sampled"][1].tolist())
    assert len(set(lengths[0])) > 1 and len(lengths[0]) == 5 and len(lengths[1]) == 2
    assert found[case][0]["passes"] == found[case][1]["passes"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_stay_split_and_training_goes_on(found, case):
    """Never more whole at a time than one module's weights beside what was small, or the prefix."""
    for process in found[case]:
        assert 0 < process["whole"] <= process["persisted"] + process["largest"]
        assert process["whole"] < process["total"] or case.frozen  # whose 10,000 leave but the embedding split
        assert torch.equal(*process["scores"])
        first, second = process["losses"] or (1.0, 0.0)
        assert second < first


def test_in_turn_one_process_is_inside_at_a_time(found):
    """Both read the same clock. Where turns are not needed nobody waits."""
    (begin_0, end_0, free_0, _), (begin_1, end_1, _, free_end_1) = found["turns"]
    assert begin_0 < end_0 <= begin_1 < end_1
    assert free_0 < free_end_1
