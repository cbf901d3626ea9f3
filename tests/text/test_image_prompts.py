"""Prompts with images against transformers' processor of Gemma 3, by hand, and those that are refused.

data/image_prompt_cases.json.gz holds the ids that the processor gives to PROMPTS, an image's places written as "image".
With MINIGEMMA_GEMMA3_TOKENIZER naming a folder that has Gemma 3's tokenizer.json and tokenizer_config.json, they are
compared with what the processor says now (and written, if the file is not there), and so are random prompts.
"""

import gzip
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.tokenizers import NAMES, gemma2, gemma3

from minigemma.config import VisionConfig
from minigemma.errors import no_vision
from minigemma.text.prompt import conversation_ids, text_ids

RECORDED = Path(__file__).parents[1] / "data" / "image_prompt_cases.json.gz"
FOLDER = os.environ.get("MINIGEMMA_GEMMA3_TOKENIZER")
VISION = VisionConfig()
MARK = "<start_of_image>"
PLACES = [VISION.image_token] * VISION.tokens
ONE = [255999, *PLACES, 256000]
SIZES = {0: (300, 290), 2: (600, 300), 3: (300, 900), 4: (1300, 300)}  # pixels of an image of so many crops


@pytest.fixture(scope="session", name="gemma3")
def _gemma3(demo_file):
    return gemma3(demo_file)


def user(text, *images):
    return {"role": "user", "content": text, "images": images}


def model(text):
    return {"role": "model", "content": text}


def system(text):
    return {"role": "system", "content": text}


# A text with its images, as numbers of crops, or the messages of a conversation. Here every image in a text is marked.
PROMPTS = {
    "text: no image": ("What is a cat?\n", []),
    "text: first": (f"{MARK} A cat", [0]),
    "text: last": (f"A cat: {MARK}", [0]),
    "text: alone": (MARK, [0]),
    "text: two side by side": (f"{MARK}{MARK}", [0, 0]),
    "text: blanks": (f"  \n {MARK} \n\n {MARK}  ", [0, 0]),
    "text: forty newlines": ("\n" * 40 + MARK + "\n" * 40, [0]),
    "text: tabs, returns": (f"a\t\t{MARK}\r\n\t{MARK}\n\r\nb", [0, 0]),
    "text: wide": (f"A sign {MARK} says", [2]),
    "text: tall": (f"{MARK}", [3]),
    "text: wide, square, tall": (f"One {MARK} two {MARK}\n{MARK}", [4, 0, 3]),
    "text: tags": (f"<b>{MARK}</b> <table>{MARK}<mask", [0, 0]),
    "first": [user(f"{MARK}Describe this image.", 0)],
    "unmarked": [user("  Describe this image.\n", 0)],
    "two unmarked, newlines before the text": [user("\n\nWhich is older?", 0, 0)],
    "unmarked, no text": [user("", 0)],
    "unmarked, wide": [user("Read it.", 4)],
    "last": [user(f"Describe this image:\n{MARK}\n", 0)],
    "middle": [user(f"What is {MARK} in English?", 0)],
    "newlines around": [user(f"\n\nSee\n\n\n{MARK}\n\n\n\nand {MARK}\n", 0, 0)],
    "crops": [user(f"A page {MARK}\nand {MARK}.", 3, 2)],
    "system": [system(" Be brief.\n"), user(f"{MARK} What is it?", 0)],
    "system, unmarked": [system("Be brief."), user("What is it?", 2)],
    "turns": [user(f"{MARK} A?", 0), model("Yes."), user(f"And {MARK}?", 2), model("No.\n"), user(MARK, 0)],
    "turns, some without": [system("x"), user("Hi"), model("Hi!"), user("Both:", 0, 3), model("Cats."), user("Why?")],
    "text only": [system("Be brief."), user(" Hi\n"), model(" Hello "), user("\n\nWhy?")],
}


def ours(tokenizer, prompt):
    if isinstance(prompt, tuple):
        return text_ids(tokenizer, prompt[0], VISION, prompt[1])
    return conversation_ids(tokenizer, "gemma3", prompt, vision=VISION)


def test_there_is_a_recorded_case_for_every_prompt():
    assert recorded().keys() == PROMPTS.keys()


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_are_those_of_the_processor(name, gemma3):
    assert ours(gemma3, PROMPTS[name]) == written_out(recorded()[name])


def written_out(entries):
    return [token for entry in entries for token in (PLACES if entry == "image" else [entry])]


@cache
def recorded():
    return json.loads(gzip.decompress(RECORDED.read_bytes()))


# ---- the processor itself, where its tokenizer.json is


@pytest.fixture(scope="session")
def processor():
    if FOLDER is None:
        pytest.skip("MINIGEMMA_GEMMA3_TOKENIZER names no folder with Gemma 3's tokenizer.json")
    from transformers import AutoTokenizer, Gemma3ImageProcessorPil, Gemma3Processor

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    released = {"pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4}
    released |= {"do_pan_and_scan": True, "pan_and_scan_min_ratio_to_activate": 1.2}
    return Gemma3Processor(Gemma3ImageProcessorPil(**released), tokenizer, chat_template=tokenizer.chat_template)


def theirs(processor, prompt):
    """The processor's ids; an image's places are counted and written as "image"."""
    from PIL import Image

    if isinstance(prompt, tuple):
        text, crops = prompt
    else:
        text = processor.apply_chat_template([*map(as_list, prompt)], add_generation_prompt=True, tokenize=False)
        crops = [n for message in prompt for n in message.get("images", ())]
    images = [Image.new("RGB", SIZES[n]) for n in crops] or None
    if images:
        assert list(processor.image_processor(images)["num_crops"]) == crops
    bos = isinstance(prompt, tuple)  # the template writes it
    [ids] = processor(text=text, images=images, do_pan_and_scan=True, add_special_tokens=bos)["input_ids"]
    places = " ".join(map(str, PLACES))
    return [
        entry if entry == "image" else int(entry)
        for entry in " ".join(map(str, ids)).replace(places, "image").split(" ")
    ]


def as_list(message):
    """A message whose unmarked images stand in its content, before the text."""
    text, images = message["content"], message.get("images", ())
    if MARK in text or not images:
        return {"role": message["role"], "content": text}
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    return {"role": message["role"], "content": content}


@pytest.mark.oracle
def test_what_is_recorded_is_what_the_processor_says(processor):
    cases = {name: theirs(processor, prompt) for name, prompt in PROMPTS.items()}
    if not RECORDED.exists():
        RECORDED.write_bytes(gzip.compress(json.dumps(cases).encode(), mtime=0))
    assert cases == recorded()


texts = st.lists(
    st.sampled_from(
        ["\n", "\n\n", " ", "  ", "\t", "\r", "a", "The cat", "é🙂", "12", "<b>", "<", ">", ":", "\n" * 31]
    ),
    max_size=5,
).map("".join)
crops = st.sampled_from([0, 0, 0, 2, 3, 4])
marked = st.lists(st.tuples(texts, crops), max_size=3)


@pytest.mark.oracle
def test_random_texts(processor, gemma3):
    @settings(max_examples=80, deadline=None)
    @given(marked, texts)
    def check(parts, end):
        prompt = "".join(text + MARK for text, _ in parts) + end, [n for _, n in parts]
        assume(prompt[0])
        assert ours(gemma3, prompt) == written_out(theirs(processor, prompt))

    check()


@pytest.mark.oracle
def test_random_conversations(processor, gemma3):
    @settings(max_examples=80, deadline=None)
    @given(texts | st.none(), st.lists(st.tuples(marked, texts, st.booleans(), texts), min_size=1, max_size=2))
    def check(before, turns):
        prompt = [] if before is None else [system(before)]
        for parts, end, is_marked, answer in turns:
            text = "".join(text + MARK * is_marked for text, _ in parts) + end
            prompt += [user(text, *[n for _, n in parts]), model(answer)]
        prompt = prompt[:-1]
        assert ours(gemma3, prompt) == written_out(theirs(processor, prompt))

    check()


# ---- by hand


def test_a_turn_that_begins_with_an_image(gemma3):
    """105 begins a turn, 106 ends it; 2364 is user, 4368 model; 107, 108, 109, … are runs of newlines."""
    ids = conversation_ids(gemma3, "gemma3", [user("Hi", 0)], vision=VISION)
    assert ids == [2, 105, 2364, 109, *ONE, 108, *gemma3.encode("Hi"), 106, 107, 105, 4368, 107]
    ids = conversation_ids(gemma3, "gemma3", [system("Be"), user("", 0, 0)], False, VISION)
    assert ids == [2, 105, 2364, 107, *gemma3.encode("Be"), 110, *ONE, 110, *ONE, 108, 106, 107]


def test_the_config_says_which_ids_and_how_many(gemma3):
    vision = replace(VISION, tokens=16, image_token=9, start_token=7, end_token=8)
    assert text_ids(gemma3, "", vision, [0]) == [2, 108, 7, *[9] * 16, 8, 108]


def test_unmarked_images_come_first(gemma3):
    for images in ([0], [0, 2], (3, 0, 0)):
        assert text_ids(gemma3, "\nHi ", VISION, images) == text_ids(
            gemma3, MARK * len(images) + "\nHi ", VISION, images
        )
        assert conversation_ids(gemma3, "gemma3", [user("\nHi ", *images)], vision=VISION) == conversation_ids(
            gemma3, "gemma3", [user(MARK * len(images) + "Hi", *images)], vision=VISION
        )


def test_without_images_a_vision_tower_changes_nothing(gemma3):
    for text in ("", "Hi", " \n\nHi\n", "<end_of_image> <image_soft_token>", *(set(NAMES) - {MARK})):
        assert text_ids(gemma3, text) == text_ids(gemma3, text, VISION) == [2, *gemma3.encode(text)]
        conversation = [system(text), user(text), model(text), {"role": "user", "content": text, "images": None}]
        seen = conversation_ids(gemma3, "gemma3", conversation, vision=VISION)
        assert seen == conversation_ids(gemma3, "gemma3", conversation)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from([*(set(NAMES) - {MARK}), "\n", "a"])).map("".join), crops)))
def test_no_other_name_becomes_a_token(parts):
    """Not even beside an image: what is typed is there as letters."""
    tokenizer = gemma2()[0]
    vision = replace(VISION, tokens=1, image_token=10**6, start_token=10**6 + 1, end_token=10**6 + 2)
    ids = text_ids(tokenizer, "".join(text + MARK for text, _ in parts), vision, [n for _, n in parts])
    assert ids.count(10**6) == ids.count(10**6 + 1) == sum(1 + n for _, n in parts)
    assert [i for i in ids if i < 10**6 and not tokenizer.decode([i])] == [2]
    assert tokenizer.decode(ids).count("<") >= sum(text.count("<") for text, _ in parts)


def test_a_mark_is_text_where_there_is_no_tower_and_in_what_a_model_wrote(gemma3):
    assert text_ids(gemma3, MARK) == [2, *gemma3.encode(MARK)]
    ids = conversation_ids(gemma3, "gemma3", [system(MARK), user(MARK)])
    assert 255999 not in ids and gemma3.decode(ids).count(MARK) == 2
    ids = conversation_ids(gemma3, "gemma3", [user("Hi", 0), model(f"{MARK}?"), user("Yes")], vision=VISION)
    assert ids.count(255999) == 1 and f"model\n{MARK}?\n" in gemma3.decode(ids)


def test_a_mark_split_by_a_mark_is_text():
    tokenizer = gemma2()[0]
    ids = text_ids(tokenizer, f"<start_of_{MARK}image>", replace(VISION, start_token=10**6), [0])
    assert ids.count(10**6) == 1
    assert tokenizer.decode(ids) == "<start_of_\n\n\n\nimage>"


def test_messages_are_left_alone(gemma3):
    images = [0, 2]
    given_messages = [{"role": "user", "content": " a ", "images": images}]
    conversation_ids(gemma3, "gemma3", given_messages, vision=VISION)
    assert given_messages == [{"role": "user", "content": " a ", "images": [0, 2]}] and images == [0, 2]


# ---- refused

RULE = "; it takes one for each image, or none at all"


@pytest.mark.parametrize(
    "text, images, said",
    [
        (MARK, [], f"has 1 {MARK}, but 0 images were given{RULE}"),
        (f"a{MARK}b{MARK}", [0], f"has 2 {MARK}, but 1 image was given{RULE}"),
        (MARK, [0, 3], f"has 1 {MARK}, but 2 images were given{RULE}"),
    ],
)
def test_as_many_marks_as_images(text, images, said):
    tokenizer = gemma2()[0]
    with pytest.raises(ValueError) as error:
        text_ids(tokenizer, text, VISION, images)
    assert str(error.value) == f"the text {said}"
    with pytest.raises(ValueError) as error:
        conversation_ids(tokenizer, "gemma3", [user("Hi"), model("Hi"), user(text, *images)], vision=VISION)
    assert str(error.value) == f"message 3 {said}"
    with pytest.raises(ValueError) as error:
        conversation_ids(tokenizer, "gemma3", [system("Be"), user(text, *images)], vision=VISION)
    assert str(error.value) == f"message 2 {said}"


def test_a_model_without_a_vision_tower():
    tokenizer, said = gemma2()[0], "this model has no vision tower, but {} given; use gemma-3-4b or larger"
    for family in ("gemma", "gemma2", "recurrentgemma", "gemma3"):
        with pytest.raises(ValueError) as error:
            conversation_ids(tokenizer, family, [user("a", 0), model("b"), user("c", 0, 2)])
        assert str(error.value) == said.format("3 images were")
    with pytest.raises(ValueError) as error:
        text_ids(tokenizer, MARK, None, [0])
    assert str(error.value) == said.format("1 image was")
    assert str(no_vision("gemma-3-1b", 1)).startswith("gemma-3-1b has no vision tower, but 1 image was given")


@pytest.mark.parametrize(
    "messages, cause",
    [
        ([system("a") | {"images": [0]}, user("b")], "the system message has an image; .* in user messages"),
        ([system(f"a{MARK}"), user("b", 0)], "the system message has an image"),
        ([user("a"), model("b") | {"images": [0]}], "message 2 is of role 'model' and has an image; .* user messages"),
        ([user("a"), {"role": "assistant", "content": "b", "images": [0]}], "message 2 is of role 'assistant' and"),
        ([system("a"), user("b"), model("c") | {"images": [2]}], "message 3 is of role 'model' and has an image"),
        ([model("a") | {"images": [0]}], "must take turns"),
    ],
)
def test_only_a_users_message_has_images(messages, cause):
    with pytest.raises(ValueError, match=cause):
        conversation_ids(gemma2()[0], "gemma3", messages, vision=VISION)


@pytest.mark.parametrize("images", [[-1], [0, 2.0], ["cat.jpg"], "cat.jpg", 1, [None], [[0]], {0: 1}, iter([0])])
def test_what_is_no_number_of_crops(images):
    tokenizer = gemma2()[0]
    for vision in (None, VISION):
        with pytest.raises(ValueError, match="list of how many crops each was cut into, 0 or more"):
            text_ids(tokenizer, "a", vision, images)
        with pytest.raises(ValueError, match="list of how many crops each was cut into, 0 or more"):
            conversation_ids(tokenizer, "gemma3", [{"role": "user", "content": "a", "images": images}], vision=vision)
