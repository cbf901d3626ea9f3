"""The likely next tokens in two passes: against the whole product, on random heads and on the real 270M."""

import numpy as np
import pytest

import minigemma as mg
from minigemma.cli.random_weights import random_model
from minigemma.formulas import two_pass_head as page
from minigemma.formulas.linear import linear
from minigemma.formulas.sampling import log_sum_exp
from minigemma.formulas.two_pass_head import (
    by_gain,
    coarse_bytes,
    coarse_head_of,
    fine_columns,
    in_few_bits,
    likely_logits,
    widened,
)
from minigemma.kernels.parallel import threads
from minigemma.layouts import LAYOUTS, Weight
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig
from minigemma.text.batch import Answer, next_logits
from minigemma.text.generation import Token, sampling_logits

SIZES = {"layers": 3, "width": 128, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn_width": 96, "vocab": 4096}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, window=8, logit_cap=3.0),
    "gemma3": Gemma3Config(**SIZES, window=8, pattern=3, rope_scale=8.0),
    "recurrentgemma": RecurrentGemmaConfig(**SIZES, lru_width=64, gate_blocks=2, window=8),
}
HEADS = ("bf16", "int8")


def head(kind, rows=8192, columns=256):
    return Weight.pack(LAYOUTS[kind], np.random.default_rng(0).standard_normal((rows, columns), np.float32))


def gain(columns=256):
    """The w of a final norm: some columns of x are a hundred times as large as others."""
    return np.exp(np.random.default_rng(2).normal(0, 1.5, columns)).astype(np.float32) - 1


def final(columns=256):
    """x as the norm with that gain makes it, [1, D]."""
    return np.random.default_rng(1).standard_normal((1, columns), np.float32) * (1 + gain(columns))


@pytest.mark.parametrize("kind", HEADS)
def test_the_columns_of_large_gain_have_four_bits_and_the_others_two(kind):
    """In four bits a rounding error is evenly spread over a step, and so 1/√12 of it; a step is an eighth of the
    farthest of 32 from 0. What lies as far on the other side is a step too far, and comes out at seven of them. In two
    bits the best that evenly spaced values can miss of normally distributed ones is 0.1188 of the variance (Max 1960,
    "Quantizing for Minimum Distortion", table II).
    """
    weight, order = head(kind, rows=64), by_gain(gain())
    fine = order[: fine_columns(256)]
    assert len(fine) == 64 and abs(1 + gain()[fine]).min() >= abs(1 + gain()[order[64:]]).max()
    w, few = weight.widen(), widened(in_few_bits(weight, order), order)
    step = np.repeat(abs(w[:, fine]).reshape(64, -1, 32).max(-1) / 8, 32, axis=-1)
    missed = (few - w)[:, fine] / step
    inside = abs(w[:, fine]) < 7.4 * step
    assert abs(missed).max() < 1.01 and abs(missed[inside]).max() < 0.51
    assert missed[inside].std() == pytest.approx(12**-0.5, rel=0.05)
    coarse = (few - w)[:, order[64:]]
    assert np.mean(coarse**2) == pytest.approx(0.1188, rel=0.03)
    levels = few[0, order[64:128]] / abs(few[0, order[64:128]]).min()
    assert set(levels.round(5)) == {-3, -1, 1, 3}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("columns", [64, 256, 640])
def test_the_kernels_do_what_the_definitions_say(kind, columns):
    weight, order, x = head(kind, 2048, columns), by_gain(gain(columns)), final(columns)
    packed, formula = in_few_bits(weight, order), in_few_bits.formula(weight, order)
    assert (packed != formula).mean() < 1e-3  # a weight between two values may go to either
    got, expected = likely_logits(x, packed, order, weight)[0], likely_logits.formula(x, packed, order, weight)[0]
    coarse, whole = (x @ widened(packed, order).T)[0], linear(x, weight)[0]
    near = abs((coarse - coarse.mean()) / coarse.std() - 2) < 0.06  # 8 bits of x decide there
    assert near.mean() < 0.02
    np.testing.assert_allclose(got[~near], expected[~near], atol=0.05 * whole.std())
    refined = coarse > coarse.mean() + 2.06 * coarse.std()
    assert refined.any()
    np.testing.assert_allclose(got[refined], whole[refined], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("count", [1, 2])
def test_likely_logits_are_those_of_the_whole_product(kind, count, monkeypatch):
    monkeypatch.setattr(page, "LARGE", 0)
    weight, x = head(kind, rows=32768), final()
    with threads(count):
        got = coarse_head_of(weight, gain()).logits(x)[0]
        whole = linear(x, weight)[0]
    high = np.flatnonzero(whole > whole.mean() + 3.2 * whole.std())
    assert len(high) > 10
    np.testing.assert_allclose(got[high], whole[high], rtol=1e-6, atol=1e-5)
    off = (got - whole) / whole.std()
    assert (off != 0).any() and off.std() < 0.25 and abs(off).max() < 1.2
    assert got.argmax() == whole.argmax()


@pytest.mark.parametrize("kind", HEADS)
def test_several_tokens_have_the_logits_that_each_has_alone(kind, monkeypatch):
    monkeypatch.setattr(page, "LARGE", 0)
    x = np.concatenate([final() * np.float32(k) for k in (1, -3, 0.1, 0, 2)])
    made = coarse_head_of(head(kind), gain())
    together, alone = made.logits(x), [made.logits(row[None])[0] for row in x]
    np.testing.assert_array_equal(together, alone)


def test_one_row_above_all_others_and_all_rows_alike():
    x, order = np.ones((1, 256), np.float32), by_gain(np.zeros(256, np.float32))
    w = np.zeros((8192, 256), np.float32)
    for alike in (0, 3):
        w[:] = alike
        weight = Weight.pack(LAYOUTS["int8"], w)
        got = likely_logits(x, in_few_bits(weight, order), order, weight)
        assert (got == got[0, 0]).all()  # none is above the mean
        w[8191] = 50
        weight = Weight.pack(LAYOUTS["int8"], w)
        got = likely_logits(x, in_few_bits(weight, order), order, weight)
        assert got[0, 8191] == pytest.approx(50 * 256, rel=1e-3)
        assert (got[0, :8191] == got[0, 0]).all() and got[0, 0] < 50 * 256


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(wrong, monkeypatch):
    monkeypatch.setattr(page, "LARGE", 0)
    x = np.full((1, 256), wrong, np.float32)
    assert not np.isfinite(coarse_head_of(head("bf16"), gain()).logits(x)).any()


def test_which_heads_have_a_coarse_copy(monkeypatch):
    rng = np.random.default_rng(0)
    assert coarse_head_of(head("int8"), gain()) is None  # too small to be worth it
    monkeypatch.setattr(page, "LARGE", 0)
    made = coarse_head_of(head("int8"), gain())
    assert made.nbytes == coarse_bytes(8192, 256) == 8192 * (64 // 32 + 192 // 64) * 18
    for other in ("int4", "f32"):
        weight = Weight.pack(LAYOUTS[other], rng.standard_normal((64, 64), np.float32))
        assert coarse_head_of(weight, gain(64)) is None
    assert coarse_head_of(head("bf16", rows=24), gain()) is None  # no whole sixteens
    assert coarse_head_of(head("bf16", columns=32), gain(32)) is None  # no whole block in two bits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_a_model_gives_exact_logits_where_it_is_not_asked_for_likely_ones(name, dtype, monkeypatch):
    monkeypatch.setattr(page, "LARGE", 0)
    model = random_model(CONFIGS[name], dtype)
    one, other = model.new_cache(9), model.new_cache(9)
    for cache in (one, other):
        model.forward([3, 4, 5], cache)
    whole, likely = model.forward([6], one), sampling_logits(model, 6, other)
    assert model.coarse_head is not None and (whole != likely).any()
    assert whole.argmax() == likely.argmax() and abs(whole - likely).max() < 1.5 * whole.std()
    np.testing.assert_array_equal(model.forward([7], one), model.forward([7], other))  # what is remembered is the same
    model.backend = "numpy"
    formulas = model.new_cache(3)
    np.testing.assert_array_equal(sampling_logits(model, 3, formulas), model.forward([3], model.new_cache(3))[0])


def test_each_of_several_sequences_has_the_logits_that_it_asks_for(monkeypatch):
    monkeypatch.setattr(page, "LARGE", 0)
    model = random_model(CONFIGS["gemma2"], "int8")
    caches, logits = [model.new_cache(9) for _ in range(4)], []
    for i, cache in enumerate(caches):
        model.forward([3, 4 + i], cache)
    for exact in ([True] * 4, [True, False, True, False], [False] * 4):
        latest = [Token("", 6, 0.0, None, 2, 1, 0.0, 0.0, exact=each) for each in exact]
        several = [Answer(cache.copy(), iter(()), token) for cache, token in zip(caches, latest, strict=True)]
        logits.append(next_logits(model, several))
    whole, mixed, likely = (np.stack(rows) for rows in logits)
    np.testing.assert_allclose(mixed[::2], whole[::2], atol=1e-6)
    np.testing.assert_array_equal(mixed[1::2], likely[1::2])
    assert (whole != likely).any() and (whole.argmax(axis=1) == likely.argmax(axis=1)).all()
    settings = {"max_new_tokens": 70, "temperature": 0}
    texts = [[(t.index, t.token) for t in mg.generate_batch(model, [[5], [6], [7]], exact_logits=exact, **settings)]
             for exact in (False, True)]  # fmt: skip
    assert texts[0] == texts[1]


def test_the_exact_mode_and_small_memory_do_without(monkeypatch):
    monkeypatch.setattr(page, "LARGE", 0)
    assert random_model(CONFIGS["gemma3"], "f32").coarse_head is None
    model = random_model(CONFIGS["gemma3"], "int8")
    model.coarse_head_fits = False
    assert model.coarse_head is None


@pytest.fixture(scope="module")
def model():
    return mg.load("gemma-3-270m", threads=2)


PROSE = "The lighthouse keeper climbed the stairs each evening, lit the lamp, and wrote one line into a book: what"


def test_real_weights_write_the_same_text(model):
    ids = model.tokenizer.encode(PROSE)
    whole, likely, off = model.new_cache(200), model.new_cache(200), []
    a, b = (model.forward([2, *ids], cache, last_only=True)[0] for cache in (whole, likely))
    for _ in range(60):
        assert a.argmax() == b.argmax()
        token = int(a.argmax())
        a = model.forward([token], whole, last_only=True)[0]
        b = sampling_logits(model, token, likely)
        p, q = (np.exp(z - log_sum_exp(z[None])[0]) for z in (a, b))
        off.append(float((p * np.log(p / q)).sum()))
        top = np.argsort(a)[-100:]
        np.testing.assert_allclose(b[top], a[top], atol=1e-4)
    assert np.mean(off) < 3e-3 and max(off) < 3e-2


def test_generation_asks_for_likely_tokens_where_it_pays(model, monkeypatch):
    """And never with a seed, whose text must not depend on `max_new_tokens`, unless it is greedy."""
    asked = []

    def watched(*arguments):
        asked.append(True)
        return sampling_logits(*arguments)

    monkeypatch.setattr("minigemma.text.generation.sampling_logits", watched)
    for settings, expected in (
        ({"max_new_tokens": 64}, True),
        ({"max_new_tokens": 64, "temperature": 0.0, "seed": 1}, True),
        ({"max_new_tokens": 64, "temperature": 1.0}, True),
        ({"max_new_tokens": 64, "temperature": 1.0, "exact_logits": True}, False),
        ({"max_new_tokens": 64, "temperature": 1.0, "seed": 1}, False),
        ({"max_new_tokens": 64, "temperature": 1.5}, False),
        ({"max_new_tokens": 8}, False),
    ):
        asked.clear()
        pieces = mg.stream_generate(model, "Once upon a time", **settings)
        for _ in range(4):
            next(pieces)
        assert asked == [True] * 3 * expected


def test_one_seed_is_one_text_whatever_its_length(model):
    short, long = (
        mg.generate(model, "Once upon a time", max_new_tokens=count, temperature=1.0, seed=3) for count in (20, 80)
    )
    assert long.startswith(short)
