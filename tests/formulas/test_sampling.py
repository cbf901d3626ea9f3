"""Sampling against brute force in plain Python, against transformers, and against the frequencies it must have."""

import math

import numpy as np
import pytest
from support.oracles import answered_by
from support.transformers_answers import libraries

from minigemma.definition import formulas_only
from minigemma.formulas.sampling import (
    Sampler,
    greedy,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    log_sum_exp,
    logprob_of,
    probabilities,
)


def random_logits(seed, size=23, spread=3):
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


class Fixed:
    """A generator that always draws the same number."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def by_hand(logits, temperature, top_k=None, top_p=None, min_p=None):
    """{token: probability}, one step after the other, each over what the one before it left."""
    top = float(max(logits))
    left = {i: math.exp((z - top) / temperature) for i, z in enumerate(logits.tolist())}
    left = {i: p for i, p in left.items() if p > 0}
    if top_k is not None:
        left = dict(sorted(left.items(), key=lambda item: -item[1])[:top_k])
    if top_p is not None:
        total, mass, kept = sum(left.values()), 0.0, {}
        for i, p in sorted(left.items(), key=lambda item: -item[1]):
            if mass < top_p:
                kept[i] = p
            mass += p / total
        left = kept
    if min_p is not None:
        edge = min_p * max(left.values())
        left = {i: p for i, p in left.items() if p >= edge}
    total = sum(left.values())
    return {i: p / total for i, p in left.items()}


# ------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("size", [1, 7, 16, 33, 8192, 10_007])
@pytest.mark.parametrize("offset", [0, -1e4, 1e4])
def test_log_sum_exp_is_the_exact_sum(size, offset):
    rows = np.stack([random_logits(seed, size) + np.float32(offset) for seed in range(3)])
    exact = []
    for row in rows.tolist():
        top = max(row)
        exact.append(top + math.log(math.fsum(math.exp(z - top) for z in row)))
    for only in (False, True):
        with formulas_only(only):
            np.testing.assert_allclose(log_sum_exp(rows), exact, rtol=2e-7, atol=2e-6)


def test_log_sum_exp_over_a_whole_vocabulary_loses_no_digits():
    """Equal logits: ln V. Added up in one float32, 262,144 ones among larger terms would be off in the fifth digit."""
    flat = np.full((2, 262_144), 3.25, np.float32)
    np.testing.assert_allclose(log_sum_exp(flat), 3.25 + math.log(262_144), rtol=1e-7)


def test_masked_tokens_have_no_part_in_the_sum_and_nan_is_not_hidden():
    row = np.array([[1.0, -np.inf, 1.0] + 40 * [-np.inf]], np.float32)
    np.testing.assert_allclose(log_sum_exp(row), 1 + math.log(2), rtol=1e-6)
    row[0, 20] = np.nan
    assert np.isnan(log_sum_exp(row)).all()


def test_log_softmax_adds_up_to_one_and_keeps_differences():
    rows = np.stack([random_logits(seed, 50) for seed in range(4)])
    found = log_softmax(rows)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found - found[:, :1], rows - rows[:, :1], atol=2e-6)


def test_logprob_of_is_log_softmax_at_the_token():
    rows = np.stack([random_logits(seed, 50) for seed in range(4)])
    tokens = [3, 49, 0, 17]
    np.testing.assert_array_equal(logprob_of(rows, tokens), log_softmax(rows)[range(4), tokens])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_softmax_of_two_is_the_logistic_function(temperature):
    p = probabilities(np.array([1.5, -0.5], np.float32), temperature)
    assert p[0] == pytest.approx(1 / (1 + math.exp(-2 / temperature)), rel=1e-6)


def test_greedy_takes_the_first_of_the_largest():
    assert greedy(np.array([1, 5, 2, 5], np.float32)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_temperature_zero_is_the_argmax_whatever_else_is_set(seed):
    logits = random_logits(seed)
    sampler = Sampler(temperature=0, top_k=5, top_p=0.1, min_p=0.9)
    assert sampler.choose(logits, np.random.default_rng(0)) == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_logits_that_leave_no_token_are_refused(temperature, value):
    logits = np.full(9, -np.inf, np.float32)
    logits[4] = value
    with pytest.raises(ValueError, match="largest logit is"):
        Sampler(temperature=temperature).choose(logits, np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------- what is kept


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.4, "top_k": 4},
    {"temperature": 1.0, "top_k": 500},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "min_p": 0.0},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.7, "min_p": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1, 23, 400])
def test_candidates_are_those_found_by_hand(settings, size):
    for seed in range(5):
        logits = random_logits(seed, size)
        tokens, probs = Sampler(**settings).candidates(logits)
        expected = by_hand(logits, **settings)
        assert set(tokens.tolist()) == set(expected)
        np.testing.assert_allclose(probs, [expected[i] for i in tokens.tolist()], rtol=1e-5)


@answered_by("transformers", "torch", file="sampling")
def processed_by_transformers(settings, _logits):
    """Probabilities of every token, for each row of logits [n, V], after its warpers."""
    torch, transformers = libraries()
    given = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}
    steps = [
        getattr(transformers, f"{given[name]}LogitsWarper")(value)
        for name, value in settings.items()
        if not (name == "top_p" and value == 1) and not (name == "temperature" and value == 1)
    ]
    scores = torch.from_numpy(_logits)
    for step in steps:
        scores = step(None, scores)
    return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_candidates_are_those_of_transformers(answers, settings):
    logits = np.stack([random_logits(seed, 300) for seed in range(5)])
    for row, expected in zip(logits, processed_by_transformers(settings, logits), strict=True):
        found = np.zeros(300)
        tokens, probs = Sampler(**settings).candidates(row)
        found[tokens] = probs
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("p", [0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1, 6])
def test_top_p_of_a_large_vocabulary_is_that_of_all_of_it_sorted(p, spread):
    """A flat distribution needs far more than the 64 that are sorted first."""
    probs = probabilities(random_logits(1, 20_011, spread))
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order], dtype=np.float64) - probs[order]
    np.testing.assert_array_equal(keep_top_p(probs, p), order[before < p])


def test_equals_of_the_kth_stay_and_top_p_takes_the_first_of_equals():
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    assert keep_top_k(logits, 1).tolist() == [1]
    assert keep_top_k(logits, 2).tolist() == [1, 2, 3, 4]
    assert keep_top_p(np.full(8, 0.125, np.float32), 0.375).tolist() == [0, 1, 2]


def test_min_p_keeps_what_is_exactly_on_its_edge():
    assert keep_min_p(np.array([0.5, 0.25, 0.125, 0.125, 0], np.float32), 0.5).tolist() == [0, 1]
    assert keep_min_p(np.array([0.5, 0.5, 0], np.float32), 0).tolist() == [0, 1]


# -------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("settings", [{}, {"top_k": 64}, {"top_p": 0.999999}, {"min_p": 0.0}], ids=str)
def test_masked_tokens_are_never_drawn_at_any_end(draw, settings):
    logits = np.full(100, -np.inf, np.float32)
    logits[[7, 50, 51]] = 1, 2, 3
    assert Sampler(temperature=1, **settings).choose(logits, Fixed(draw)) in {7, 50, 51}


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 4, "top_p": 0.95}], ids=str)
def test_frequencies_are_the_probabilities(settings):
    logits, draws = random_logits(3, 6, 1), 20_000
    expected = by_hand(logits, **settings)
    sampler, random = Sampler(**settings), np.random.default_rng(11)
    counts = np.bincount([sampler.choose(logits, random) for _ in range(draws)], minlength=6)
    assert set(np.flatnonzero(counts)) == set(expected)
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    assert chi_square < 20.5  # 5 degrees of freedom: one seed in a thousand would be above


def test_a_seed_draws_the_same_again_and_another_seed_does_not():
    def drawn(seed):
        random = np.random.default_rng(seed)
        return [Sampler(temperature=2).choose(random_logits(i), random) for i in range(40)]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert drawn(2**64) == drawn(2**64)


@pytest.mark.parametrize("draw, token", [(0.0, 0), (0.25 - 2**-30, 0), (0.25, 1), (0.75, 3), (1 - 2**-53, 3)])
def test_equal_tokens_have_equal_parts_of_the_unit_interval(draw, token):
    assert Sampler(temperature=1).choose(np.zeros(4, np.float32), Fixed(draw)) == token


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_a_temperature_next_to_nothing_is_greedy(temperature):
    logits = random_logits(2)
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert Sampler(temperature=temperature).choose(logits, Fixed(draw)) == int(np.argmax(logits))


def test_a_huge_temperature_makes_all_tokens_equal():
    _, probs = Sampler(temperature=1e30).candidates(random_logits(2))
    np.testing.assert_allclose(probs, 1 / 23, rtol=1e-5)


def test_logits_are_left_as_they_were():
    logits = random_logits(1)
    before = logits.copy()
    logits.setflags(write=False)
    Sampler(temperature=1, top_k=5, top_p=0.5, min_p=0.1).choose(logits, np.random.default_rng(0))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "name, values",
    {
        "temperature": [-0.1, float("nan"), float("inf")],
        "top_k": [0, -1, 2.5],
        "top_p": [0, -0.5, 1.001, float("nan")],
        "min_p": [-0.001, 1.001, float("nan")],
    }.items(),
)
def test_settings_out_of_range_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
            Sampler(**{name: value})
