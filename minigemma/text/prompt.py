"""Prompts as ids: what stands before a text, and how a conversation is laid out. BOS stands first, and once.

    <bos><start_of_turn>user
    {text}<end_of_turn>
    <start_of_turn>model
    {answer}<end_of_turn>
    …

Gemma 3 puts a system text in front of the first user's, two newlines between them; the other families were not
trained with one and refuse it. Texts lose the blanks around them, the system text does not. They are encoded as text:
whatever somebody types, the turns are as they are laid out here.

An image is two newlines, <start_of_image>, 256 places for what the vision tower makes of it, <end_of_image> and two
newlines. The newlines are text, one with those beside them: a turn that begins with an image has three after "user".
Where it stands is written <start_of_image>, the one control token that may be typed, and only where there are images;
blanks beside it stay.
An image that was cut into crops (pan & scan, Gemma 3 §2.1) is followed by them, with words that tell the model so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import VisionConfig
from ..errors import no_vision
from ..models.registry import FAMILIES
from ..models.vocabulary import Vocabulary

Message = Mapping[str, Any]
ROLES = {"user": "user", "model": "model", "assistant": "model"}
MARK = "<start_of_image>"  # where an image stands in a text
IMAGE = f"\n\n{MARK}\n\n"


def text_ids(
    tokenizer: Vocabulary,
    text: str,
    vision: VisionConfig | None = None,
    images: Sequence[int] = (),
    control: bool = False,
) -> list[int]:
    """BOS and the text: what a pretrained model continues.

    images: for each image, in order, the number of crops it was cut into, 0 if none. They stand where the text has
    <start_of_image>; if it has none, before it. Without a vision tower that is text like any other.
    control: names of control tokens in the text, such as CodeGemma's <|fim_prefix|>, become these tokens.

    Raises ValueError for images without `vision`, and for more or fewer marks than images.
    """
    images = _crops(images)
    if images and vision is None:
        raise no_vision("", len(images))
    segments = [text] if vision is None else _around_images(text, images, "the text")
    return [tokenizer.bos, *_joined(tokenizer, segments, vision, **({"control": True} if control else {}))]


def checked_model(model: Any) -> None:
    """Raises ValueError where the name of a model was given instead of a model."""
    if model is None or isinstance(model, (str, bytes, Path)):
        raise ValueError(f"the model is the name {str(model)!r}; load it first, as with mg.load(name)")


def checked_prompt(given: Any, what: str = "prompt") -> str | list[int]:
    """A text as it is, or token ids as a list; ValueError for anything else, which says what was given."""
    if isinstance(given, np.ndarray) and given.ndim == 0:
        given = given.item()
    if isinstance(given, str):
        return str(given)
    if isinstance(given, (bytes, bytearray, memoryview)):
        raise ValueError(f"the {what} is bytes; decode it first")
    if given is None:
        raise ValueError(f"the {what} is None and has no ids; give one text, or a list of token ids")
    if isinstance(given, (Sequence, np.ndarray)):
        if any(isinstance(i, dict) for i in given):
            raise ValueError(f"the {what} is a list of messages; mg.Chat(model) takes their texts, one after the other")
        if isinstance(given, np.ndarray) and given.ndim > 1:
            raise ValueError(
                f"the {what} is an array of shape {[*given.shape]}; give one row of it, whose ids are integers"
            )
        if any(isinstance(i, str) for i in given):
            raise ValueError(f"the {what} is a list of texts; give one text, or token ids")
        if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in given):
            raise ValueError(f"the {what} has entries that are no token ids; ids are integers")
        return [int(i) for i in given]
    raise ValueError(f"the {what} is of type {type(given).__name__}; give one text, or a list of token ids")


def conversation_ids(
    tokenizer: Vocabulary,
    family: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    vision: VisionConfig | None = None,
) -> list[int]:
    """A conversation in the turn format, and the beginning of the model's next turn.

    messages: {"role": "user" | "model" | "assistant", "content": str}, in turn, a user first; with Gemma 3 a "system"
    one may stand in front. A user's may have "images", as in `text_ids`. family: "gemma", "gemma2", "gemma3" or
    "recurrentgemma". What a model wrote stays text, <start_of_image> too.

    Raises ValueError for roles out of turn, a system text where the family has none, a vocabulary without turns,
    images without `vision` or of another than a user, and for more or fewer <start_of_image> than images.
    """
    start = tokenizer.start_of_turn
    if start is None:
        raise ValueError("this vocabulary has no <start_of_turn>; the model was not made for conversations")
    ids = [tokenizer.bos]
    for role, segments in _turns(family, messages, vision):
        # Role and text as one string: the newline between them joins those that a text begins with.
        segments[0] = f"{role}\n{segments[0]}"
        ids += [start, *_joined(tokenizer, segments, vision), start + 1, *tokenizer.encode("\n")]
    return [*ids, start, *tokenizer.encode("model\n")] if add_generation_prompt else ids


def _turns(family: str, messages: Sequence[Message], vision: VisionConfig | None) -> list[tuple[str, list[str]]]:
    """(role, text) of each turn, the system text folded in, the text cut where an image stands."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} has no turn format here; those that have one are {', '.join(FAMILIES)}")
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError('messages must be a list of {"role": …, "content": …}, one for each turn')
    images = [_crops(message.get("images")) for message in messages]
    if vision is None and any(images):
        raise no_vision("", sum(map(len, images)))
    system = ""
    first = int(messages[0].get("role") == "system")
    if first:
        if not FAMILIES[family].system_turn:
            name = FAMILIES[family].title
            raise ValueError(f"{name} was trained without a system role; put the text into the first user message")
        if len(messages) == 1:
            raise ValueError("after the system message a user message must follow")
        system = f"{_content(messages[0])}\n\n"
        if images[0] or (vision is not None and MARK in system):
            raise ValueError("the system message has an image; images stand in user messages")
    turns = []
    for i, message in enumerate(messages[first:]):
        role = ROLES.get(str(message.get("role")))
        given, number = message.get("role"), i + first + 1
        if role != ("model" if i % 2 else "user"):
            raise ValueError(f"message {number} is of role {given!r}; user and model must take turns, a user first")
        segments = [_content(message).strip()]
        if role == "user" and vision is not None:
            segments = _around_images(segments[0], images[number - 1], f"message {number}")
        elif images[number - 1]:
            raise ValueError(f"message {number} is of role {given!r} and has an image; images stand in user messages")
        segments[0] = ("" if i else system) + segments[0]
        turns.append((role, segments))
    return turns


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"the content of a message must be text, not {type(content).__name__}")
    return content


def _crops(images: Any) -> Sequence[int]:
    """The images of a text, checked; None are none."""
    images = () if images is None else images
    if not isinstance(images, Sequence) or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in images):
        raise ValueError("images of a prompt are given as a list of how many crops each was cut into, 0 or more")
    return images


def _around_images(text: str, images: Sequence[int], where: str) -> list[str]:
    """The text cut where an image or a crop stands: one piece more than there are of these, newlines included."""
    pieces = text.split(MARK)
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) - 1 != len(images):
        number = len(pieces) - 1
        given = "1 image was given" if len(images) == 1 else f"{len(images)} images were given"
        raise ValueError(f"{where} has {number} {MARK}, but {given}; it takes one for each image, or none at all")
    whole = [pieces[0]]
    for crops, after in zip(images, pieces[1:], strict=True):
        seen = " ".join([IMAGE] * crops)
        helped = f"Here is the original image {IMAGE} and here are some crops to help you see better {seen}"
        whole += [helped if crops else IMAGE, after]
    return "".join(whole).split(MARK)


def _joined(tokenizer: Vocabulary, segments: list[str], vision: VisionConfig | None, **options: bool) -> list[int]:
    """Ids of the segments, and between any two of them those of an image; `options` as of `Tokenizer.encode`."""
    ids = tokenizer.encode(segments[0], **options)
    if vision is not None:
        image = [vision.start_token, *[vision.image_token] * vision.tokens, vision.end_token]
        for segment in segments[1:]:
            ids += [*image, *tokenizer.encode(segment, **options)]
    return ids
