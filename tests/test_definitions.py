"""Every definition: its docstring tells the truth about shapes, and its kernel computes the same."""

import importlib
import pkgutil
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

import minigemma
from minigemma.arrays import round_bf16
from minigemma.blocks.feedforward import FeedForwardWeights
from minigemma.blocks.gqa import AttentionWeights
from minigemma.blocks.griffin import RecurrentWeights
from minigemma.blocks.layers import LayerWeights
from minigemma.cache import KeyValueRing, RecurrentState, TokenPositions
from minigemma.config import AttentionConfig
from minigemma.definition import DEFINITIONS, definition, formulas_only
from minigemma.formulas.attention import Mask, attention
from minigemma.formulas.cross_entropy import Targets
from minigemma.formulas.linear import linear, linears
from minigemma.formulas.two_pass_head import in_few_bits, widened
from minigemma.kernels.matvec import FEW
from minigemma.layouts import LAYOUTS, Weight
from minigemma.layouts.gguf_blocks import dequantize
from minigemma.layouts.int4 import from_gguf
from minigemma.taps import NO_TAPS

for module in pkgutil.walk_packages(minigemma.__path__, "minigemma."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

rng = np.random.default_rng(7)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def positions(first, count):
    return np.arange(first, first + count, dtype=np.int32)


def blocks(rows, columns, size):
    """Random int8 (34) or int4 (18) blocks with scales of either sign, some of them subnormal."""
    made = rng.integers(0, 256, (rows, columns // 32, size), np.uint8)
    scales = (rng.standard_normal((rows, columns // 32, 1)) * 0.1).astype(np.float16)
    scales[0] = np.float16(3e-6)
    made[..., :2] = scales.view(np.uint8).reshape(rows, columns // 32, 2)
    made.setflags(write=False)
    return made


def packed(name, x):
    """x as a weight of a layout."""
    return Weight.pack(LAYOUTS[name], x)


def int8(rows, columns):
    return Weight(LAYOUTS["int8"], blocks(rows, columns, 34), (rows, columns))


def int4(rows, columns):
    return Weight(LAYOUTS["int4-symmetric"], from_gguf("Q4_0", blocks(rows, columns, 18)), (rows, columns))


def int4_with_minimum(rows, columns):
    return Weight.pack(LAYOUTS["int4"], normal(rows, columns))


def attention_case(T, S, N, K, H, window, cap, *, bf16=False, shuffled=False, image=1):
    """The last `image` tokens are one image's, which see each other whole."""
    k, v = normal(S, K, H), normal(S, K, H)
    if bf16:
        k, v = round_bf16(k), round_bf16(v)
    where = rng.permutation(S).astype(np.int32) if shuffled else positions(0, S)
    until = positions(S - T, T)
    until[-image:] = S - 1
    return normal(T, N, H) * 3, k, v, Mask(positions(S - T, T), until, where, window), H**-0.5, cap


def kind_case(kind, bytes_per_block, *halves):
    """Blocks of a GGUF type, random but for their float16 scales."""
    made = rng.integers(0, 256, (41, bytes_per_block), np.uint8)
    for at in halves:
        made[:, at : at + 2] = (rng.standard_normal((41, 1)) * 0.1).astype(np.float16).view(np.uint8)
    return made, kind


def order(columns):
    return rng.permutation(columns).astype(np.int32)


def likely_case(V, kind):
    """A head with two rows far above the others, so that no coarse logit lies where it could count as likely or not."""
    x, w, columns = normal(1, 128), normal(V, 128) * np.float32(0.02), order(128)
    w[5], w[-3] = x, x
    return x, in_few_bits.formula(packed(kind, w), columns), columns, packed(kind, w)


KINDS = [
    kind_case(*case)
    for case in (
        *((0, 18, 0), (1, 20, 0, 2), (2, 22, 0), (3, 24, 0, 2), (4, 34, 0)),
        *((5, 144, 0, 2), (6, 176, 0, 2), (7, 210, 208)),
    )
]
CASES = {
    "dequantize_blocks": KINDS,
    "int8_blocks": KINDS,
    "quantize_blocks": [
        (np.concatenate([normal(50, 32), np.zeros((1, 32), np.float32), normal(2, 32) * 1e-7]), kind)
        for kind in (0, 1, 4)  # Q4_0, Q4_1, Q8_0
    ],
    "rms_norm": [(normal(*shape) * 40, normal(shape[-1]), 1e-6) for shape in ((1, 7), (3, 640), (5, 2, 20), (600, 96))],
    "rope": [
        (normal(T, N, H), positions(first, T), base, scale, rotated)
        for T, N, H, first, base, scale, rotated in (
            (1, 3, 20, 0, 1e4, 1.0, 20),
            (5, 2, 12, 1000, 1e6, 8.0, 12),
            (37, 1, 256, 7, 1e4, 1.0, 128),
            (300, 2, 64, 7, 1e4, 1.0, 64),
        )
    ],
    "causal_conv1d": [(normal(T, E), normal(4, E), normal(E), normal(3, E)) for T, E in ((1, 5), (2, 64), (600, 67))],
    "block_diagonal": [
        (normal(T, M * size), kind(normal(M, size, size)), normal(M, size))
        for T, M, size in ((1, 2, 32), (1, 3, 9), (7, 3, 9), (50, 2, 64))
        for kind in (np.asarray, round_bf16)
    ],
    "linear_scan": [(normal(T, E), rng.random((T, E), np.float32), normal(E)) for T, E in ((1, 3), (2, 64), (300, 67))],
    "rg_lru": [
        (normal(T, E), normal(T, E) * 3, normal(T, E) * 3, rng.random(E, np.float32) * 0.3, normal(E), start)
        for T, E in ((1, 3), (2, 64), (300, 67))
        for start in (True, False)
    ],
    "log_sum_exp": [(normal(T, V) * scale,) for T, V, scale in ((1, 3, 1), (4, 1000, 30), (5, 9001, 5), (1, 16, 1e4))],
    "soft_cap": [
        (normal(*shape) * 100, cap)
        for shape, cap in (((1, 5), 30.0), ((3, 64), 50.0), ((2, 3, 77), 1.5), ((600, 77), 9.0))
    ],
    "gelu": [(normal(T, F) * 5,) for T, F in ((1, 3), (2, 64), (500, 101))],
    "layer_norm": [(normal(P, C) * 9 + 3, normal(C), normal(C), 1e-6) for P, C in ((1, 7), (3, 640), (600, 96))],
    "gated_gelu": [(normal(T, F) * 5, normal(T, F)) for T, F in ((1, 3), (2, 64), (500, 101))],
    "linear": [
        (normal(T, D), weight)
        for T in (1, 2, 8, 9, 16, 33, 130)
        for D, weight in (
            (33, packed("f32", normal(5, 33))),
            (96, packed("f32", normal(131, 96))),
            (67, packed("bf16", normal(29, 67))),
            (1, packed("bf16", normal(20, 1))),
            (1120, packed("bf16", normal(64, 1120))),
            *((D, int8(R, D)) for R, D in ((1, 32), (3, 64), (7, 96), (101, 1056), (35, 2336))),
            *((D, int4(R, D)) for R, D in ((16, 32), (80, 96), (112, 1056), (32, 2336))),
            *((D, int4_with_minimum(R, D)) for R, D in ((16, 32), (80, 96), (112, 1056))),
        )
    ],
    "in_few_bits": [(packed(kind, normal(32, 128)), order(128)) for kind in ("f32", "bf16", "int8")],
    "likely_logits": [likely_case(V, kind) for V in (64, 144) for kind in ("f32", "bf16", "int8")],
    "attention": [
        attention_case(1, 1, 4, 1, 256, None, None),
        attention_case(1, 1500, 4, 1, 64, None, None, bf16=True),
        attention_case(1, 100, 4, 2, 32, 17, 2.0, shuffled=True),
        attention_case(5, 700, 6, 3, 96, 33, None, bf16=True),
        attention_case(1, 30, 4, 2, 20, 7, 3.0),
        attention_case(1, 131, 3, 1, 64, None, None, bf16=True),
        attention_case(3, 257, 10, 2, 32, 100, None, shuffled=True),
        attention_case(70, 70, 4, 2, 20, 7, None),
        attention_case(9, 200, 6, 1, 12, None, 3.0, bf16=True, shuffled=True),
        attention_case(40, 300, 16, 8, 34, 1, None),
        attention_case(130, 130, 2, 2, 64, 128, 5.0),
        attention_case(7, 50, 4, 2, 32, 17, None, image=4),
        attention_case(60, 90, 4, 2, 20, 30, 2.0, image=16, bf16=True),
        attention_case(300, 300, 2, 2, 72, None, None, image=300),
    ],
}


def block_weights(kind, D, F, N, K, H, **more):
    """Attention and feed-forward weights, matrices of the layout `kind`."""

    def matrix(*shape):
        return packed(kind, normal(*shape) * np.float32(shape[1] ** -0.5))

    qkvo = {"q": matrix(N * H, D), "k": matrix(K * H, D), "v": matrix(K * H, D), "o": matrix(D, N * H)}
    gud = {"gate": matrix(F, D), "up": matrix(F, D), "down": matrix(D, F)}
    return AttentionWeights(pre_norm=normal(D), **qkvo, **more), FeedForwardWeights(pre_norm=normal(D), **gud)


def attention_layer_case(T, first, kind, *, window=None, N=4, K=2, H=32, F=96, kept=np.float32, **more):
    """T tokens from position `first` on, over a ring with random keys before them."""
    attention, ffn = block_weights(kind, 64, F, N, K, H, **more)
    w = LayerWeights(attention=attention, ffn=replace(ffn, post_norm=more.get("post_norm")))
    scale = {"rope_base": 1e4, "query_scale": H**-0.5, "eps": 1e-6, "soft_cap": 3.0 if "o_bias" in more else None}
    config, ring = AttentionConfig(heads=N, head_dim=H, window=window, **scale), KeyValueRing(window or 99, K, H, kept)
    if first:
        ring.extend(normal(first, K, H), normal(first, K, H), 0)
        ring.commit(first)
    here = positions(first, T)
    return normal(T, 64) * 3, w, config, ring, TokenPositions(here, here, T), NO_TAPS.within("blocks.0")


def recurrent_layer_case(T, first, kind):
    D, E, M = 96, 64, 2
    matrices = {"y": packed(kind, normal(E, D)), "x": packed(kind, normal(E, D)), "out": packed(kind, normal(D, E))}
    biases = {"y_bias": normal(E), "x_bias": normal(E), "out_bias": normal(D), "conv_bias": normal(E)}
    gates = {f"{name}_gate": normal(M, E // M, E // M) for name in ("recurrence", "input")}
    gates |= {f"{name}_bias": normal(M, E // M) for name in ("recurrence", "input")}
    recurrent = RecurrentWeights(
        pre_norm=normal(D), **matrices, **biases, **gates, conv=normal(4, E), decay=rng.random(E, np.float32)
    )
    w = LayerWeights(recurrent=recurrent, ffn=block_weights(kind, D, 64, 1, 1, 2)[1])
    state, here = RecurrentState(4, E), positions(first, T)
    if first:
        state.propose(normal(3, E), normal(E))
        state.commit(first)
    return normal(T, D), w, 1e-6, state, TokenPositions(here, here, T), NO_TAPS.within("blocks.0")


QK_NORM = {"q_norm": normal(32), "k_norm": normal(32), "post_norm": normal(64)}
CASES["attention_layer"] = [
    attention_layer_case(1, 0, "f32"),
    attention_layer_case(1, 50, "bf16", window=17, **QK_NORM),
    attention_layer_case(16, 60, "f32", **QK_NORM),
    attention_layer_case(5, 7, "bf16", window=17, o_bias=normal(64)),
    attention_layer_case(5, 14, "f32", window=17),  # it would wrap: the definition
    attention_layer_case(3, 2, "f32", N=3, K=1, H=20),  # no whole vectors: the definition
    attention_layer_case(16, 3, "f32", F=100),  # no whole vectors behind the feed-forward block's first matrices
    attention_layer_case(17, 3, "f32"),  # more than the fused kernel takes
]
CASES["recurrent_layer"] = [
    recurrent_layer_case(T, first, kind)
    for T, first, kind in ((1, 0, "bf16"), (16, 0, "f32"), (1, 9, "f32"), (5, 9, "f32"))
]


def targets(T, k, V):
    return Targets(rng.integers(0, V, (T, k)).astype(np.int32), rng.random((T, k), np.float32))


CASES["low_rank"] = [
    (normal(T, D), normal(r, D), normal(R, r), 0.5) for T, D, r, R in ((1, 33, 2, 20), (17, 96, 8, 131), (60, 40, 3, 7))
]
CASES["low_rank_gradient"] = [(normal(len(x), len(b)), x, a, b, scale) for x, a, b, scale in CASES["low_rank"]]
CASES["linear_gradient"] = [
    (normal(T, R), normal(T, D), packed("f32", normal(R, D)))
    for T, R, D in ((1, 5, 33), (13, 131, 96), (300, 7, 40), (40, 20, 600))
]
CASES["cross_entropy_gradient"] = [
    (normal(T), normal(T, V) * 4, targets(T, k, V)) for T, V, k in ((1, 20, 3), (300, 1001, 1), (7, 64, 5))
]
for name in (
    "rms_norm",
    "gated_gelu",
    "soft_cap",
    "rg_lru",
    "block_diagonal",
    "attention",
):  # as many again, with the gradient before
    CASES[f"{name}_gradient"] = [(normal(*case[0].shape), *case) for case in CASES[name]]


def results(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_kernel_has_cases():
    assert {name for name, made in DEFINITIONS.items() if made.fast} <= set(CASES)


def tolerance(formula):
    return 5e-6 * max(1.0, float(np.abs(formula).max()))


@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_its_definition(name):
    for case in CASES[name]:
        fast = DEFINITIONS[name](*case)
        with formulas_only():
            formula = DEFINITIONS[name](*case)
        if isinstance(formula, tuple):
            for found, expected in zip(fast, formula, strict=True):
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(expected))
            continue
        assert fast.dtype == formula.dtype
        assert fast.shape == formula.shape
        if name == "int8_blocks":  # two scales may come equally close: the weights say how close
            fast, formula = dequantize("Q8_0", fast[:, None]), dequantize("Q8_0", formula[:, None])
            assert np.abs(fast - formula).max() <= np.abs(formula).max() / 90
            continue
        if name == "in_few_bits":  # where two whole numbers are equally near, either will do
            assert np.mean(fast != formula) < 1e-3
            fast, formula = widened(fast, case[1]), widened(formula, case[1])
            assert np.abs(fast - formula).max() <= np.abs(formula).max() / 1.5
            continue
        if name in ROUNDED:
            assert (np.abs(fast - formula) <= tolerance(formula) + rounding(name, case)).all()
            continue
        np.testing.assert_allclose(fast, formula, rtol=0, atol=tolerance(formula))


ROUNDED = ("linear", "likely_logits")


def rounding(name, case):
    """How far a product can be off when x is rounded to 16 bits, a scale for each token, or to 8 bits, a scale for each
    block: six standard deviations of a sum of roundings, each even over a step.
    """
    x, weight = case[0], case[-1]
    if name == "likely_logits":  # blocks of some columns: their largest x is that of all at most
        return 6 / 12**0.5 / 127 * np.abs(x).max() * np.linalg.norm(widened(case[1], case[2]), axis=-1)
    if weight.layout.name in ("f32", "bf16"):
        return 0
    if weight.layout.name.startswith("int4"):
        step = np.repeat(np.abs(x.reshape(len(x), x.shape[1] // 32, 32)).max(-1), 32, axis=-1) / 127
        return 6 / 12**0.5 * np.sqrt(step**2 @ (weight.widen() ** 2).T)
    step = np.abs(x).max(-1, keepdims=True) / 32767
    return 6 * step / 12**0.5 * np.linalg.norm(weight.widen(), axis=-1)


def bound(letters, shape, known):
    """Match "T, N, H" to (3, 4, 256): every letter one size everywhere. "..." stands for any axes in front."""
    names = [part.strip() for part in letters.split(",")]
    if names[0] == "...":
        names, shape = names[1:], shape[len(shape) - len(names) + 1 :]
    assert len(names) == len(shape), (letters, shape)
    for letter, size in zip(names, shape, strict=True):
        assert known.setdefault(letter, size) == size, (letter, size, known)


def by_name(parameters, case):
    """The arguments, and the fields of those that are NamedTuples."""
    found = dict(zip(parameters, case, strict=True))
    for value in case:
        found |= value._asdict() if hasattr(value, "_asdict") else {}
    return found


@pytest.mark.parametrize("name", CASES)
def test_docstring_gives_the_shapes(name):
    made = DEFINITIONS[name]
    left, right = made.__doc__.split("→")
    left = left.split("\n\n")[-1]  # the paragraph that the arrow stands in; equations come before it
    parameters = list(made.formula.__code__.co_varnames[: made.formula.__code__.co_argcount])
    for case in CASES[name]:
        known = {}
        for parameter, letters in re.findall(r"(\w+) \[([^\]]*)\]", left):
            value = by_name(parameters, case)[parameter]
            if len(value.shape) == letters.count(",") + 1 or "..." in letters:
                bound(letters, value.shape, known)
        for letters, result in zip(shapes(right), results(made(*case)), strict=False):
            bound(letters, result.shape, known)


def shapes(right):
    """The letters of each result: "dx, dy [T, E] float32, dw [E]" has three, "two of [T, E]" two."""
    for names, letters in re.findall(r"([^\[\]]*)\[([^\]]*)\]", right):
        count = len([name for name in re.split(r"[\s,]+", names) if name not in ("", "float32")])
        yield from [letters] * max(1, count)


def spoilt(array):
    """The same array in shapes, dtypes, orders and alignments that it should not have."""
    yield "a row less", array[:-1]
    yield "a row more", np.concatenate([array, array[:1]])
    yield "an axis more", array[None]
    yield "no axis", array.reshape(-1) if array.ndim > 1 else array[0]
    if array.ndim > 1:
        yield "a column less", array[..., :-1]
        yield "a column more", np.concatenate([array, array[..., :1]], axis=-1)
        yield "columns first", np.asfortranarray(array)
        yield "every other column", np.repeat(array, 2, axis=-1)[..., ::2]
        yield "transposed", array.T
    yield "twice the bits", array.astype({1: np.uint16, 2: np.uint32, 4: np.float64}[array.itemsize])
    yield "nothing", array[:0]
    bytes = np.empty(array.nbytes + 1, np.uint8)
    odd = bytes[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    yield "odd addresses", odd


def spoilt_cases(case):
    """What, where, and the arguments with one array spoilt, for each array, also inside a NamedTuple, and each way."""
    for i, value in enumerate(case):
        if isinstance(value, np.ndarray):
            inner = [(what, wrong) for what, wrong in spoilt(value)]
        elif isinstance(value, Weight):  # which looks at its array itself: tests/layouts/test_weight.py
            shapes = {"rows": (value.shape[0] + 16, value.shape[1]), "columns": (value.shape[0], value.shape[1] + 32)}
            ones = {what: np.ones(shape, np.float32) for what, shape in shapes.items()}
            inner = [(f"more {what}", Weight.pack(value.layout, one)) for what, one in ones.items()]
        elif hasattr(value, "_fields"):
            inner = [(what, value._make(fields)) for what, _, fields in spoilt_cases(tuple(value))]
        else:
            continue
        for what, wrong in inner:
            yield what, i, (*case[:i], wrong, *case[i + 1 :])


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_kernel_refuses_what_it_cannot_take(name):
    """Whatever an array is, a kernel ends in a Python error or in what the definition makes of it.

    A kernel checks no index by itself: without a look at the shapes it would read other memory.
    """
    made, refused = DEFINITIONS[name], 0
    for case in CASES[name][-1:]:
        for what, i, arguments in spoilt_cases(case):
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = [np.array(each) for each in results(made(*arguments))]
                except Exception:
                    refused += 1
                    continue
                with formulas_only():
                    formulas = results(made(*arguments))  # an error here is one that the kernel should have raised
            for one, formula in zip(found, formulas, strict=True):
                assert one.shape == formula.shape, (what, i)
                close = tolerance(formula) if formula.size else 1
                if name in ROUNDED:
                    close = close + rounding(name, arguments)
                if name != "int8_blocks":
                    assert (np.abs(one - formula) <= 2 * close).all(), (what, i)
    assert refused


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e38])
def test_a_key_that_is_not_seen_may_be_anything(wrong):
    """The last of three queries sees it, the others do not."""
    q, k, v, *where = attention_case(3, 65, 4, 4, 64, None, None)
    k[-1] = wrong
    with np.errstate(invalid="ignore", over="ignore"):
        expected = attention.formula(q, k, v, *where)
    found = attention(q, k, v, *where)
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-5)
    assert np.isnan(expected[2]).any() and np.isnan(found[2]).any()


@pytest.mark.parametrize("queries", [3, 40])
def test_queries_may_lie_head_by_head(queries):
    q, k, v, *where = attention_case(queries, 65, 4, 4, 64, None, None)
    by_heads = np.ascontiguousarray(q.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert not by_heads.flags.c_contiguous
    np.testing.assert_array_equal(attention(by_heads, k, v, *where), attention(q, k, v, *where))


def test_kernels_must_take_the_arguments_of_their_definition():
    @definition
    def twice(x):
        return 2 * x

    with pytest.raises(TypeError, match="same arguments"):
        twice.kernel(lambda y: 2 * y)
    del DEFINITIONS["twice"]


def test_formulas_only_runs_no_kernel():
    @definition
    def number():
        return "formula"

    number.kernel(lambda: "kernel")
    del DEFINITIONS["number"]
    assert number() == "kernel"
    with formulas_only():
        assert number() == "formula"
        with formulas_only(False):
            assert number() == "formula"
    assert number() == "kernel"


@pytest.mark.parametrize("tokens", [1, FEW + 1, 40])
@pytest.mark.parametrize("mixed", [False, True], ids=["one layout", "two layouts"])
def test_several_weights_at_once(tokens, mixed):
    """q, k and v in one go, of one layout or two, are what each alone is."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, 64), np.float32)
    weights = [rng.standard_normal((rows, 64), np.float32) for rows in (48, 20, 7)]
    weights = [packed("bf16" if mixed and i == 1 else "f32", weight) for i, weight in enumerate(weights)]
    for weight, y in zip(weights, linears(x, *weights), strict=True):
        np.testing.assert_allclose(y, linear.formula(x, weight), rtol=1e-4, atol=1e-4)
