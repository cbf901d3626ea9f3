"""Gemma 3 with images equals transformers in float32: the tower, the soft tokens, and the logits of whole prompts.

transformers reads every prompt in one call, with token_type_ids to mark the images and its plainest attention;
minigemma also in two, in three and token by token over a cache. The bound is 2e-5 of the largest value.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import checkpoints
from support import transformers_answers as theirs
from support import vision_checkpoints as sees
from support.oracles import Mode, live_only

import minigemma as mg
from minigemma.config import VisionConfig
from minigemma.files.config_json import config_from_json
from minigemma.files.load import describe
from minigemma.models.gemma3 import Gemma3Config

TOLERANCE = 2e-5
BACKENDS = ("numba", "numpy")
LONG = 20  # more than any of the small windows
LAYOUTS: dict[str, tuple[int | str, ...]] = {
    "first": ("image", 9),
    "first, without markers": ("soft", 7),
    "last": (9, "image"),
    "last, without markers": (5, "soft"),
    "alone": ("image",),
    "two": (3, "image", 4, "image", 5),
    "two, only markers between": (4, "image", "image", 5),
    "two, one token between": (4, "soft", 1, "soft", 2),
    "after more than a window": (2 * LONG + 1, "image", 6),
    "more than a window before, between and after": (LONG + 3, "image", LONG + 1, "image", "image", LONG + 2),
}


class Truth(NamedTuple):
    folder: Path
    tokens: int  # of an image
    images: np.ndarray  # three

    def prompt(self, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, images, transformers' logits) of one of LAYOUTS."""
        parts = LAYOUTS[layout]
        ids, images = sees.prompt(self.tokens, parts), self.images[: sum(isinstance(part, str) for part in parts)]
        return ids, images, theirs.vision_logits(self.folder, ids, images)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(tokens): a checkpoint whose images are that many tokens, made once."""
    return cache(lambda tokens: sees.write_vision(tmp_path_factory.mktemp(f"sees-{tokens}"), tokens))


@pytest.fixture(scope="module")
def truth(written, answers):
    """truth(tokens): such a checkpoint, images for it, and what transformers makes of them."""
    return cache(lambda tokens: Truth(written(tokens), tokens, sees.pixels(tokens, 3)))


@pytest.fixture(scope="module")
def loaded(written):
    """loaded(tokens, backend, threads): minigemma's model of the same checkpoint."""
    return cache(
        lambda tokens, backend="numba", threads=1: mg.load(
            written(tokens), dtype="f32", backend=backend, threads=threads
        )
    )


def assert_near(found: np.ndarray, expected: np.ndarray, bound: float = TOLERANCE) -> None:
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    apart = np.nan_to_num(np.abs(found - expected), nan=np.inf) / np.abs(expected).max()
    rows = apart.reshape(len(apart), -1).max(axis=1)
    assert rows.max() <= bound, f"{rows.max():.1e} of the largest value, first at row {np.argmax(rows > bound)}"


def inside(ids: np.ndarray, image_token: int) -> np.ndarray:
    """For each place of ids, whether a cut before it would go through an image."""
    marked = ids == image_token
    return marked & np.concatenate([[False], marked[:-1]])


def fed(model: Any, ids: np.ndarray, images: np.ndarray, cuts: list[int], room: int = 0) -> np.ndarray:
    """Logits of ids, fed to a cache in pieces that begin at 0 and at `cuts`, each with its own images."""
    held, outputs, begun = model.new_cache(len(ids) + room), [], 0
    starts = (ids == model.config.vision.image_token) & ~inside(ids, model.config.vision.image_token)
    for first, last in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        here = int(starts[first:last].sum())
        own = images[begun : begun + here] if here else None
        outputs.append(model.forward(ids[first:last], cache=held, images=own))
        begun += here
    assert held.position == len(ids)
    return np.concatenate(outputs)


# The oracle, used rightly


@live_only
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_transformers_sees_both_ways_within_an_image_only(truth, tokens):
    """What the last soft token of the second image is changes all logits from that image's first one on, and no
    earlier ones; with markers as with everything else that is text, nothing is seen before its time."""
    reference, images = theirs.held(truth(tokens).folder), truth(tokens).images[:2]
    ids = sees.prompt(tokens, (3, "image", 4, "image", 5))
    first = 3 + tokens + 2 + 4 + 1
    assert (ids[first : first + tokens] == sees.IMAGE).all() and ids[first - 1] == sees.START

    def other(_module: Any, _inputs: Any, features: Any) -> Any:
        changed = features.clone()
        changed[1, -1] *= -1
        return changed

    right = theirs.run(reference, ids, images)
    handle = reference.model.multi_modal_projector.register_forward_hook(other)
    changed, causal = theirs.run(reference, ids, images), theirs.run(reference, ids, images, blocks=False)
    handle.remove()
    far = np.abs(changed - right).max(axis=1)
    assert (far[:first] == 0).all()
    assert (far[first:] > 100 * TOLERANCE * np.abs(right).max()).all()
    unmarked = np.abs(causal - theirs.run(reference, ids, images, blocks=False)).max(axis=1)
    assert (unmarked[: first + tokens - 1] == 0).all()


@live_only
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_transformers_sees_the_pixels(truth, tokens):
    reference, images = theirs.held(truth(tokens).folder), truth(tokens).images[:2]
    ids, patch = sees.prompt(tokens, (3, "image", 4, "image", 5)), sees.TOWERS[tokens]["patch_size"]
    right, other = theirs.run(reference, ids, images), images.copy()
    other[1, :, -patch:, -patch:] *= -1  # its last patch
    far = np.abs(theirs.run(reference, ids, other) - right).max(axis=1)
    first = 3 + tokens + 2 + 4 + 1
    assert (far[:first] == 0).all()
    assert (far[first:] > 100 * TOLERANCE * np.abs(right).max()).all()


@live_only
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_other_attention_of_transformers_is_the_same(truth, tokens):
    ids, images, expected = truth(tokens).prompt("more than a window before, between and after")
    assert_near(theirs.run(theirs.model_of(truth(tokens).folder, "sdpa"), ids, images), expected)


def silent(name: str) -> bool:
    """A key's bias adds the same to all scores of a query, which no softmax shows."""
    return name.endswith("k_proj.bias")


@live_only
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_the_checkpoints_would_show_any_tensor_of_the_tower_out_of_place(truth, tokens):
    images, ids = truth(tokens).images[:1], sees.prompt(tokens, (2, "image", 1))

    def of_the_tower(name: str) -> bool:
        return "vision_tower" in name or "multi_modal" in name

    seen = theirs.tensors_seen(theirs.model_of(truth(tokens).folder), of_the_tower, ids, images)
    assert not [(name, far) for name, far in seen.items() if far < 50 * TOLERANCE and not silent(name)]


@live_only
@pytest.mark.parametrize(
    "change", [{"layer_norm_eps": 1e-6}, {"hidden_act": "gelu"}, {"num_attention_heads": 6}], ids=str
)
def test_the_checkpoints_would_show_another_number_in_the_tower(truth, tmp_path, change):
    shutil.copytree(truth(4).folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["vision_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    found = theirs.tower_and_soft_tokens(theirs.model_of(tmp_path), truth(4).images)[1]
    expected = theirs.image_features(truth(4).folder, truth(4).images)[1]
    assert np.abs(found - expected).max() > 5 * TOLERANCE * np.abs(expected).max()


@live_only
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_our_checkpoints_are_what_transformers_writes(truth, tmp_path, tokens):
    """config.json field by field, and every tensor's name and shape."""
    theirs.saved_again(truth(tokens).folder, tmp_path)
    assert checkpoints.described(truth(tokens).folder) == checkpoints.described(tmp_path)


# What is seen of an image


def test_the_config_is_read(truth):
    for tokens in sees.SMALL:
        stated, tower = sees.TOWERS[tokens], mg.load(truth(tokens).folder).config.vision
        assert tower == VisionConfig(
            width=stated["hidden_size"],
            layers=stated["num_hidden_layers"],
            heads=stated["num_attention_heads"],
            ffn_width=stated["intermediate_size"],
            side=stated["image_size"],
            patch=stated["patch_size"],
            eps=stated["layer_norm_eps"],
            tokens=tokens,
            image_token=sees.IMAGE,
            start_token=sees.START,
            end_token=sees.END,
        )
        assert tower.parameters == theirs.parameters(truth(tokens).folder, "model.vision_tower")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_tower(truth, loaded, tokens, backend):
    expected, _ = theirs.image_features(truth(tokens).folder, truth(tokens).images)
    for image, hidden in zip(truth(tokens).images, expected, strict=True):
        assert_near(loaded(tokens, backend).vision_tower(image), hidden)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_soft_tokens(truth, loaded, tokens, backend):
    _, expected = theirs.image_features(truth(tokens).folder, truth(tokens).images)
    model = loaded(tokens, backend)
    assert_near(model.image_features(truth(tokens).images), expected)
    assert_near(model.image_features(truth(tokens).images[2:]), expected[2:])


@pytest.mark.parametrize("kind", ["black", "white", "one pixel"])
def test_flat_images(truth, loaded, kind):
    """Nothing but the positions differs between their patches."""
    image = np.full_like(truth(9).images[:1], -1.0 if kind == "black" else 1.0)
    image[0, 1, 40, 3] = -1.0 if kind != "white" else 1.0
    hidden, soft = theirs.image_features(truth(9).folder, image)
    assert_near(loaded(9).vision_tower(image[0]), hidden[0])
    assert_near(loaded(9).image_features(image), soft)


def test_any_layout_of_the_pixels_in_memory(truth, loaded):
    images, model = truth(4).images, loaded(4)
    expected = model.image_features(images)
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # a picture's own: channels last
    read_only = images.copy()
    read_only.setflags(write=False)
    for same in (last, read_only, np.repeat(images, 2, axis=0)[::2]):
        np.testing.assert_array_equal(model.image_features(same), expected)
        assert_near(model.vision_tower(same[0]), model.vision_tower(images[0]), 0)


# Logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_logits_in_one_call(truth, loaded, tokens, backend, layout):
    ids, images, expected = truth(tokens).prompt(layout)
    model = loaded(tokens, backend)
    assert_near(model.forward(ids, images=images), expected)
    assert_near(model.forward(ids.tolist(), images=images, last_only=True), expected[-1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_logits_on_all_cores(truth, loaded, tokens, backend):
    ids, images, expected = truth(tokens).prompt("more than a window before, between and after")
    model = loaded(tokens, backend, None)
    assert_near(model.forward(ids, images=images), expected)
    assert_near(fed(model, ids, images, [LONG, LONG + 3, len(ids) - 4]), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_logits_in_two_and_three_calls(truth, loaded, tokens, backend, layout):
    """Cut at the edges of images and their markers, and at some other places outside images."""
    ids, images, expected = truth(tokens).prompt(layout)
    model, random = loaded(tokens, backend), np.random.default_rng(5)
    cut_through, soft = inside(ids, sees.IMAGE), ids == sees.IMAGE
    places = [i for i in range(1, len(ids)) if not cut_through[i]]
    edges = [i for i in places if soft[max(i - 2, 0) : i + 2].any()]
    twice = random.permutation(edges)[:6].tolist() + random.permutation(places)[:3].tolist()
    thrice = [sorted(random.choice(places, 2, replace=False).tolist()) for _ in range(4 * (len(places) > 1))]
    for cuts in [[i] for i in twice] + thrice:
        assert_near(fed(model, ids, images, cuts), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_logits_token_by_token(truth, loaded, tokens, backend, layout):
    """Each token alone and each image at once; then all that the first image ends, at once, and alone what follows."""
    ids, images, expected = truth(tokens).prompt(layout)
    model = loaded(tokens, backend)
    places = [i for i in range(1, len(ids)) if not inside(ids, sees.IMAGE)[i]]
    assert_near(fed(model, ids, images, places, room=7), expected)
    end = int(np.argmax(ids == sees.IMAGE)) + tokens
    assert_near(fed(model, ids, images, [i for i in places if i >= end]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", sees.SMALL)
def test_an_image_in_the_second_turn(truth, loaded, tokens, backend):
    """A turn with an image, an answer token by token, another turn with two images, another answer."""
    images = truth(tokens).images
    turns = [
        sees.prompt(tokens, parts, seed)
        for seed, parts in enumerate([(4, "image", 3), (6,), (2, "image", "image", 1), (5,)])
    ]
    ids = np.concatenate(turns)
    expected = theirs.vision_logits(truth(tokens).folder, ids, images)
    model = loaded(tokens, backend)
    held = model.new_cache(len(ids))
    found = [model.forward(turns[0], cache=held, images=images[:1])]
    found += [model.forward([i], cache=held) for i in turns[1]]
    found += [model.forward(turns[2], cache=held, images=images[1:])]
    found += [model.forward([i], cache=held, last_only=True) for i in turns[3]]
    assert_near(np.concatenate(found), expected)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_heads_of_whole_vectors(answers, tmp_path, head_dim):
    """Few tokens at a time have a kernel of their own where a head is a multiple of two vectors."""
    sees.write_vision(tmp_path, text={"head_dim": head_dim, "query_pre_attn_scalar": head_dim})
    ids, images = sees.prompt(4, (LONG, "image", 3, "image", LONG)), sees.pixels(4, 2)
    expected, model = theirs.vision_logits(tmp_path, ids, images), mg.load(tmp_path, threads=1)
    places = [i for i in range(1, len(ids)) if not inside(ids, sees.IMAGE)[i]]
    for cuts in ([], places, places[::3], [LONG + 1], [LONG, LONG + 6]):
        assert_near(fed(model, ids, images, cuts), expected)


@pytest.mark.parametrize("before", [238, 247, 250, 253, 255, 256])
def test_images_where_a_long_prompt_would_be_cut(truth, loaded, before):
    """Long prompts go through the layers in chunks; here an image lies across, or at, a multiple of 256.

    Every ninth logit of each token is recorded; under `-m oracle` all are compared.
    """
    ids, images = sees.prompt(16, (before, "image", 230, "soft", 40)), truth(16).images[:2]
    expected = theirs.every_ninth_logit(truth(16).folder, ids, images)
    found = [loaded(16).forward(ids, images=images), fed(loaded(16), ids, images, [before + 20])]
    for ours in found:
        assert_near(ours[:, ::9], expected)
        if Mode.live:
            assert_near(ours, theirs.run(theirs.held(truth(16).folder), ids, images))


def test_text_alone(truth, loaded):
    ids = sees.prompt(9, (60,))
    expected = theirs.vision_logits(truth(9).folder, ids)
    for images in (None, truth(9).images[:0]):
        assert_near(loaded(9).forward(ids, images=images), expected)


def test_an_image_token_that_the_embedding_has_no_row_for(answers, tmp_path):
    sees.write_vision(tmp_path, image_token_index=sees.VOCAB + 4)
    ids, images = sees.prompt(4, (3, "image", 4), image=sees.VOCAB + 4), sees.pixels(4, 1)
    expected = theirs.vision_logits(tmp_path, ids, images)
    for backend in BACKENDS:
        model = mg.load(tmp_path, backend=backend, threads=1)
        assert_near(model.forward(ids, images=images), expected)


def test_images_stay_in_their_order(truth, loaded):
    ids, images, expected = truth(4).prompt("two")
    swapped = theirs.vision_logits(truth(4).folder, ids, images[::-1].copy())
    assert np.abs(swapped - expected).max() > 0.1 * np.abs(expected).max()
    assert_near(loaded(4).forward(ids, images=images[::-1]), swapped)


@pytest.mark.parametrize("tokens", sees.SMALL)
def test_bf16_stays_near_the_exact_one(answers, tmp_path, tokens):
    """Weights of 8 significant bits in both; ours also rounds keys, values and what enters many-token products."""
    sees.write_vision(tmp_path, tokens, "bf16")
    ids, images = sees.prompt(tokens, (LONG, "image", 4, "image", LONG)), sees.pixels(tokens, 2)
    expected = theirs.vision_logits(tmp_path, ids, images)
    assert_near(mg.load(tmp_path, dtype="f32", threads=1).forward(ids, images=images), expected)
    model = mg.load(tmp_path, threads=1)
    for found in (model.forward(ids, images=images), fed(model, ids, images, [LONG, LONG + 3 + tokens, len(ids) - 4])):
        assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.03


# Files


@pytest.mark.parametrize("generation", sees.GENERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_other_years_give_the_same_bits(truth, loaded, tmp_path, generation, backend):
    """Read by transformers too, so that our names are known to be what they were."""
    folder = tmp_path / "renamed"
    shutil.copytree(truth(4).folder, folder)
    checkpoints.rename_tensors(folder, sees.GENERATIONS[generation])
    ids, images, _ = truth(4).prompt("two")
    assert theirs.says_the_same(folder, truth(4).folder, ids, images)
    found = mg.load(folder, dtype="f32", backend=backend, threads=1).forward(ids, images=images)
    np.testing.assert_array_equal(found, loaded(4, backend).forward(ids, images=images))


STATED = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
RELEASED_TEXT = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
PLACES = {"boi_token_index": 255_999, "eoi_token_index": 256_000, "mm_tokens_per_image": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {"vision_config": {"vision_use_head": False} | STATED} | PLACES | {"image_token_index": 262_144},
    "the newer key": {"vision_config": STATED} | PLACES | {"image_token_id": 262_144},
    "the least": {"vision_config": STATED},
    "everything": {
        "vision_config": STATED
        | {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "attention_dropout": 0.0},
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_fields_that_a_config_leaves_out(answers, tmp_path, case):
    """They mean what transformers means by them."""
    text = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}} | RELEASED_TEXT
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    config |= CONFIGS[case]
    config["vision_config"] = {"model_type": "siglip_vision_model"} | config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    found, _ = config_from_json(tmp_path / "config.json")
    assert isinstance(found, Gemma3Config) and found.name == "gemma-3-4b"
    assert found.vision == VisionConfig()
    eyes = found.vision
    whole = {
        "image_token_id": eyes.image_token,
        "boi_token_id": eyes.start_token,
        "eoi_token_id": eyes.end_token,
        "mm_tokens_per_image": eyes.tokens,
    }
    tower = {
        "hidden_size": eyes.width,
        "num_hidden_layers": eyes.layers,
        "num_attention_heads": eyes.heads,
        "intermediate_size": eyes.ffn_width,
        "image_size": eyes.side,
        "patch_size": eyes.patch,
        "layer_norm_eps": eyes.eps,
    }
    ours = whole | {f"vision_config.{name}": value for name, value in tower.items()}
    assert theirs.stated(tmp_path, list(ours)) == list(ours.values())


@pytest.mark.parametrize("generation", [None, *sees.GENERATIONS])
def test_a_text_model_neither_reads_nor_counts_the_tower(truth, loaded, tmp_path, generation):
    shutil.copytree(truth(4).folder, tmp_path, dirs_exist_ok=True)
    if generation:
        checkpoints.rename_tensors(tmp_path, sees.GENERATIONS[generation])
    counted: dict[bool, int] = {}
    for vision in (True, False):
        mg.load(tmp_path, vision=vision, progress=lambda _, total, vision=vision: counted.update({vision: total}))
    model = mg.load(tmp_path, dtype="f32", vision=False, threads=1)
    assert model.config.vision is None
    parts = ("model.vision_tower", "model.multi_modal_projector")
    size = sum(4 * theirs.parameters(truth(4).folder, part) for part in parts)
    assert counted[True] - counted[False] == size
    whole, text = describe(tmp_path), describe(tmp_path, vision=False)
    assert whole.weight_bytes - text.weight_bytes == size
    assert whole.config.vision is not None and text.config.vision is None
    ids = sees.prompt(4, (30,))
    np.testing.assert_array_equal(model.forward(ids), loaded(4).forward(ids))
    with pytest.raises(ValueError, match="no vision tower"):
        model.forward(ids, images=truth(4).images[:1])


# What is refused


def wrong_images() -> dict[str, tuple[Any, str]]:
    """By what is wrong: from a good image [1, 3, 56, 56] to a bad one, and a word of the message."""
    return {
        "an image without its axis": (lambda x: x[0], "given|float32"),
        "one column less": (lambda x: x[..., :-1], "56"),
        "twice the size": (lambda x: x.repeat(2, -1).repeat(2, -2), "56"),
        "channels last": (lambda x: x.transpose(0, 2, 3, 1), "3, 56"),
        "grey": (lambda x: x[:, :1], "3, 56"),
        "float64": (lambda x: x.astype(np.float64), "float64"),
        "float16": (lambda x: x.astype(np.float16), "float16"),
        "bytes": (lambda x: (x * 127 + 128).astype(np.uint8), "uint8"),
        "not a number": (lambda x: np.where(np.arange(56) == 7, np.float32(np.nan), x), "not a number|finite|NaN"),
        "infinite": (lambda x: np.where(np.arange(56) == 7, np.float32(np.inf), x), "infinite|finite"),
        "from 0 to 255": (lambda x: x * 127.5 + 127.5, "-1"),
    }


@pytest.mark.parametrize("wrong", wrong_images())
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_pixels(truth, loaded, backend, wrong):
    change, says = wrong_images()[wrong]
    model, ids = loaded(4, backend), sees.prompt(4, (3, "image", 2))
    bad, held = change(truth(4).images[:1]), model.new_cache(40)
    model.forward([5, 6], cache=held)
    with pytest.raises(ValueError, match=says):
        model.forward(ids, cache=held, images=bad)
    assert held.position == 2
    with pytest.raises(ValueError, match="image"):
        model.image_features(bad)
    with pytest.raises(ValueError, match="image"):
        model.vision_tower(bad[0])


MISMATCHES: dict[str, tuple[tuple[int | str, ...], int, str]] = {
    "no image for one run": ((3, "image", 2), 0, r"\b0 images|\bno image"),
    "one image for two runs": ((3, "image", 2, "image"), 1, r"\b1 image"),
    "two images for one run": ((3, "image", 2), 2, r"\b2 images"),
    "an image for none": ((5,), 1, r"\b1 image"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_as_many_images_as_runs_of_their_tokens(truth, loaded, case):
    layout, given, says = MISMATCHES[case]
    ids, model = sees.prompt(9, layout), loaded(9)
    held = model.new_cache(60)
    for images in [truth(9).images[:given]] if given else [None, (), truth(9).images[:0]]:
        with pytest.raises(ValueError, match=says):
            model.forward(ids, cache=held, images=images)
    assert held.position == 0


@pytest.mark.parametrize(
    "run, images",
    [(8, 1), (10, 1), (1, 1), (18, 1), (18, 2), (8, 0)],
    ids=["one less", "one more", "one alone", "two in one", "two in one for two", "one less, without image"],
)
@pytest.mark.parametrize("after", [0, 3])
def test_runs_that_are_no_image(truth, loaded, run, images, after):
    """Too short, too long, or cut by the end of ids, whatever number of images comes with them."""
    model = loaded(9)
    held = model.new_cache(60)
    with pytest.raises(ValueError, match=rf"{run} image tokens.*9"):
        model.forward([5, sees.START] + [sees.IMAGE] * run + [7] * after, cache=held, images=truth(9).images[:images])
    assert held.position == 0


def test_an_image_cut_by_two_calls(truth, loaded):
    ids, images, expected = truth(9).prompt("last")
    model = loaded(9)
    held = model.new_cache(len(ids))
    with pytest.raises(ValueError, match="one call"):
        model.forward(ids[:-4], cache=held, images=images)
    assert held.position == 0
    assert_near(model.forward(ids, cache=held, images=images), expected)


def test_a_text_model_is_given_an_image(tmp_path, truth):
    model = mg.load(checkpoints.write(tmp_path, "gemma3"))
    assert model.config.vision is None
    images = truth(4).images[:1]
    for call in (
        lambda: model.forward([5, 6, 7], images=images),
        lambda: model.image_features(images),
        lambda: model.vision_tower(images[0]),
    ):
        with pytest.raises(ValueError, match="no vision tower, but 1 image was given"):
            call()


# The released size


@live_only
def test_the_released_tower(answers, tmp_path):
    """SigLIP So400m/14 at 896 pixels: 4,096 patches, 16 heads of 72, in 1.4 GB. Nine of its 27 layers: on two busy
    cores these take a minute and a half in all, the 27 two minutes for transformers and as much again for minigemma.
    """
    torch, _ = theirs.libraries()
    sees.write_vision(tmp_path, 256, tower={"num_hidden_layers": 9})
    torch.set_num_threads(2)
    image = sees.pixels(256, 1)
    expected, _ = theirs.tower_and_soft_tokens(theirs.model_of(tmp_path, "sdpa"), image)
    torch.set_num_threads(1)
    model = mg.load(tmp_path)
    assert model.config.vision.layers == 9 and model.config.vision.grid == 64
    found = model.vision_tower(image[0])
    assert found.shape == (4096, 1152)
    assert_near(found, expected[0], 1e-3)
