"""From a picture's file to an answer about it: generate, chat and the command line, on a small model of random weights.

The tokenizer is Gemma 3's own; the numbers of the model mean nothing, but that they depend on every pixel.
"""

import json

import numpy as np
import pytest
from PIL import Image
from support.tokenizers import gemma3 as tokenizer_of

import minigemma as mg
from minigemma.cli.main import main
from minigemma.cli.random_weights import random_model
from minigemma.config import VisionConfig
from minigemma.files.images import PanAndScan
from minigemma.models.gemma3 import Gemma3Config
from minigemma.text.generation import prefill, stream_generate
from minigemma.text.prompt import conversation_ids, text_ids
from minigemma.text.seeing import look_at

EYES = VisionConfig(width=32, layers=1, heads=2, ffn_width=48, side=56, patch=14, tokens=4)
SIZES = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_width": 48, "vocab": 262_208}
CONFIG = Gemma3Config(**SIZES, window=6, pattern=2, context=300, vision=EYES)
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "top_k": None, "top_p": None}


@pytest.fixture(scope="module")
def model(demo_file):
    made = random_model(CONFIG, "f32")
    made.tokenizer, made.instruction_tuned, made.eos = tokenizer_of(demo_file), True, (1, 106)
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures that differ, and one that is wide."""
    at, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(2)
    for name, size in (("one.png", (60, 70)), ("two.png", (80, 64)), ("wide.png", (1024, 300))):
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)).save(at / name)
    return at


def pixels(path):
    """The picture by Pillow alone."""
    scaled = Image.open(path).resize((EYES.side, EYES.side), Image.Resampling.BILINEAR)
    return (np.asarray(scaled, np.float32).transpose(2, 0, 1) / 255 - 0.5) / 0.5


def test_an_answer_is_that_of_the_ids_and_pixels_by_hand(model, pictures):
    one, two = pictures / "one.png", pictures / "two.png"
    text = "See <start_of_image> and <start_of_image>: which?"
    ids = text_ids(model.tokenizer, text, EYES, [0, 0])
    images = np.stack([pixels(one), pixels(two)])
    expected = model.forward(ids, images=images)[-1]
    token = next(stream_generate(model, text, [one, two], max_new_tokens=1, temperature=0, raw=True)).token
    allowed = expected.copy()
    allowed[model.vocab_limit :] = allowed[list(model.banned)] = -np.inf
    assert token == allowed.argmax()
    as_pixels = mg.generate(model, ids, images, max_new_tokens=5, temperature=0)
    assert mg.generate(model, text, [one, str(two)], max_new_tokens=5, temperature=0, raw=True) == as_pixels
    assert (
        mg.generate(
            model, text, [Image.open(one), np.asarray(Image.open(two))], max_new_tokens=5, temperature=0, raw=True
        )
        == as_pixels
    )


def test_the_order_of_the_images_matters(model, pictures):
    ids = text_ids(model.tokenizer, "x", EYES, [0, 0])
    images = np.stack([pixels(pictures / "one.png"), pixels(pictures / "two.png")])
    assert np.abs(model.forward(ids, images=images) - model.forward(ids, images=images[::-1]))[-1].max() > 1e-4


def test_crops_are_seen_too(model, pictures):
    seen = look_at(model, [pictures / "wide.png"], PanAndScan())
    assert seen.crops == (3,) and seen.features.shape == (4, EYES.tokens, CONFIG.width)
    whole = look_at(model, [pictures / "wide.png"])
    np.testing.assert_array_equal(whole.features[0], seen.features[0])
    text = mg.generate(model, "x", [pictures / "wide.png"], max_new_tokens=3, pan_and_scan=PanAndScan(), temperature=0)
    assert text == mg.generate(model, "x", seen, max_new_tokens=3, temperature=0)


@pytest.mark.parametrize("size", [1, 3, 5, 50])
def test_a_watched_prompt_is_never_cut_through_an_image(model, pictures, size, monkeypatch):
    monkeypatch.setattr("minigemma.text.generation.PREFILL_CHUNK", size)
    monkeypatch.setattr("minigemma.models.decoder.PREFILL_CHUNK", size)
    seen = look_at(model, [pictures / "one.png", pictures / "two.png"])
    ids = text_ids(model.tokenizer, "a b c <start_of_image> d e f <start_of_image> g", EYES, [0, 0])
    counts = []
    found = prefill(model, ids, model.new_cache(80), seen.features, lambda done, total: counts.append((done, total)))
    monkeypatch.undo()
    expected = model.forward(ids, images=seen.features, last_only=True)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert counts[-1] == (len(ids), len(ids))


def test_a_chat_looks_once_and_answers_as_if_all_were_read_anew(model, pictures, monkeypatch):
    chat, calls = mg.Chat(model, system="Be brief", **GREEDY), []
    original = type(model).image_features
    monkeypatch.setattr(
        type(model), "image_features", lambda self, x, taps=None: (calls.append(len(x)), original(self, x, taps))[1]
    )
    chat.send("What is this?", [pictures / "one.png"])
    chat.send("And now?")
    chat.send("Compare <start_of_image> with the first", images=[pictures / "two.png"])
    last = chat.send("Sure?")
    assert calls == [1, 1]
    assert [m.get("images") for m in chat.messages if m["role"] == "user"] == [[0], None, [0], None]
    seen = look_at(model, [pictures / "one.png", pictures / "two.png"])
    ids = conversation_ids(model.tokenizer, "gemma3", chat.messages[:-1], vision=EYES)
    assert last == "".join(piece.text for piece in stream_generate(model, ids, seen, **GREEDY))


def test_a_chat_that_is_read_again_still_has_its_images(model, pictures):
    """After a forgotten cache every image is fed again."""
    chat = mg.Chat(model, **GREEDY)
    chat.send("What is this?", [pictures / "one.png"])
    kept = chat.send("And now?")
    chat.messages, before = chat.messages[:2], chat.messages
    chat._forget()
    assert chat.send("And now?") == kept
    assert chat.messages == before


def test_a_failed_message_leaves_the_chat_as_it_was(model, pictures):
    chat = mg.Chat(model, **GREEDY)
    chat.send("Hi", [pictures / "one.png"])
    before = list(chat.messages)
    for text, images, says in (
        ("<start_of_image> <start_of_image>", [pictures / "one.png"], "has 2 <start_of_image>, but 1 image was given"),
        ("<start_of_image>", [], "has 1 <start_of_image>, but 0 images were given"),
        ("x", [pictures / "none.png"], "none.png: does not exist"),
        ("x y " * 500, [pictures / "one.png"], "context holds 300"),
    ):
        with pytest.raises(ValueError, match=says):
            chat.send(text, images)
    assert chat.messages == before
    assert len(chat._seen) == 1


def test_counts_that_do_not_match_are_refused(model, pictures):
    one = pixels(pictures / "one.png")[None]
    ids = text_ids(model.tokenizer, "x", EYES, [0])
    for prompt, images in ((ids, ()), ([2, 5], one), (ids, np.concatenate([one, one]))):
        with pytest.raises(ValueError, match=r"images and crops were given, and the prompt has the tokens of|image"):
            stream_generate(model, prompt, images, temperature=0)


@pytest.fixture
def command(model, monkeypatch):
    monkeypatch.setattr("minigemma.cli.opening.load", lambda *_, **__: model)
    return lambda *words: main([*words, "-q"])


def test_command_line(command, model, pictures, capsys):
    assert command("generate", "What?", "--image", str(pictures / "one.png"), "-n", "3", "--temp", "0", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    message = {"role": "user", "content": "What?", "images": [0]}
    ids = conversation_ids(model.tokenizer, "gemma3", [message], vision=EYES)
    assert report["prompt_tokens"] == len(ids)
    assert report["text"] == mg.generate(
        model, ids, pixels(pictures / "one.png")[None], max_new_tokens=3, temperature=0
    )


def test_pictures_in_the_chat(model, pictures, monkeypatch, capsys):
    lines = iter([f"/image {pictures / 'one.png'}", f"/image {pictures / 'none.png'}", "What is this?", "/exit"])
    monkeypatch.setattr("minigemma.cli.opening.load", lambda *_, **__: model)
    monkeypatch.setattr("minigemma.cli.terminal.Prompt.read", lambda self: next(lines))
    assert main(["chat", "--temp", "0", "-n", "3"]) == 0
    out, err = capsys.readouterr()
    assert "one.png, 60 x 70 pixels, goes with your next message" in err
    assert "none.png: does not exist; check the path" in err
    chat = mg.Chat(model, temperature=0.0, max_new_tokens=3)
    assert out.rstrip("\n") == chat.send("What is this?", [pictures / "one.png"]).rstrip("\n")


@pytest.mark.parametrize(
    "text, images, says",
    [
        ("x", ["none.png"], "none.png: does not exist; check the path"),
        ("<start_of_image> x", ["one.png", "two.png"], "has 1 <start_of_image>, but 2 images were given"),
        ("<start_of_image><start_of_image>", ["one.png"], "has 2 <start_of_image>, but 1 image was given"),
    ],
)
def test_one_line_for_what_is_wrong(command, pictures, capsys, text, images, says):
    flags = [word for name in images for word in ("--image", str(pictures / name))]
    assert command("generate", text, *flags) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-1b", "recurrentgemma-2b"])
def test_models_without_eyes_say_so(name, pictures):
    from dataclasses import replace

    from minigemma.models.registry import RELEASED

    small = replace(RELEASED[name], layers=1, vocab=300)
    with pytest.raises(
        ValueError, match=f"^{name} has no vision tower, but 1 image was given; use gemma-3-4b or larger$"
    ):
        mg.generate(random_model(small), [2], [pictures / "one.png"], temperature=0)
