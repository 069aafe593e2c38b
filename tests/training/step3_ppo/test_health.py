"""Made-up metrics of an unhealthy run give their sentences; a healthy run is silent."""

import json

import pytest

from training.step3_ppo.health import SILENCE, WINDOW, Health

pytestmark = [pytest.mark.ppo, pytest.mark.fast]
WELL = {"first_ratio_deviation": 1e-5, "clip_share": 0.1, "kl": 0.4, "explained_variance": 0.3, "eos_rate": 0.9}
WELL |= {"score_clipped_share": 0.01}
# metric, its sick value, rollouts until it is said, words of the sentence
SICK = [
    ("first_ratio_deviation", 2e-3, 1, "first minibatch"),
    ("clip_share", 0.31, 1, "31% of the tokens were clipped"),
    ("kl", -0.2, WINDOW, "-0.2 nats"),
    ("explained_variance", -0.4, WINDOW + 1, "-0.40"),
    ("score_clipped_share", 0.6, 1, "60% of the scores were cut"),
]


def test_a_healthy_run_is_silent():
    health = Health()
    assert all(health.check(rollout, WELL) == [] for rollout in range(1, 200))
    assert Health().check(1, {}) == [] and Health().check(1, {"score": 1.0}) == []


@pytest.mark.parametrize(("name", "value", "first", "words"), SICK)
def test_each_symptom_has_its_sentence_and_says_it_every_fifty_rollouts(name, value, first, words):
    health = Health()
    said = {rollout: health.check(rollout, WELL | {name: value}) for rollout in range(1, first + 2 * SILENCE)}
    assert [rollout for rollout, sentences in said.items() if sentences] == [first, first + SILENCE]
    (sentence,) = said[first]
    assert words in sentence and sentence.endswith((".", "?"))


def test_the_limits_themselves_are_no_symptom():
    health = Health()
    at_the_edge = WELL | {"first_ratio_deviation": 1e-3, "clip_share": 0.3, "kl": 0.0, "explained_variance": 0.0}
    assert all(health.check(rollout, at_the_edge) == [] for rollout in range(1, 30))


def test_half_precision_may_round_more():
    assert Health(half=True).check(1, WELL | {"first_ratio_deviation": 5e-3}) == []
    assert Health(half=True).check(1, WELL | {"first_ratio_deviation": 2e-2})


def test_a_kl_that_is_negative_by_chance_is_no_symptom():
    """k1 has either sign: ten noisy rollouts around 0 with a mean a little below it say nothing."""
    health = Health()
    noisy = [0.3, -0.3, 0.2, -0.3, 0.1, -0.1, 0.25, -0.25, 0.3, -0.3]
    assert sum(noisy) < 0
    assert all(health.check(rollout, WELL | {"kl": kl}) == [] for rollout, kl in enumerate(noisy, 1))


def test_endings_are_compared_with_the_best():
    """Half of the best is said, a low rate from the start is not."""
    health = Health()
    rates = [0.8] * WINDOW + [0.3] * WINDOW
    said = [rollout for rollout, rate in enumerate(rates, 1) if health.check(rollout, WELL | {"eos_rate": rate})]
    assert len(said) == 1 and WINDOW < said[0] <= 2 * WINDOW
    low = Health()
    assert all(low.check(rollout, WELL | {"eos_rate": 0.1}) == [] for rollout in range(1, 40))


@pytest.mark.detail(50)
def test_memory_survives_a_resume():
    """Cut in two at any rollout, the same sentences at the same rollouts; the state is JSON."""
    metrics = [WELL | {"kl": -0.1, "clip_share": 0.5, "eos_rate": 0.9 if rollout < 20 else 0.1} for rollout in range(1, 80)]
    whole = Health()
    expected = [whole.check(rollout, one) for rollout, one in enumerate(metrics, 1)]
    for cut in (1, 9, 30):
        health, found = Health(), []
        for rollout, one in enumerate(metrics, 1):
            found.append(health.check(rollout, one))
            if rollout == cut:
                state = json.loads(json.dumps(health.state_dict()))
                health = Health()
                health.load_state_dict(state)
        assert found == expected
