"""Prompts as ids: what stands before a text, and how a conversation is laid out. BOS stands first, and once.

    <bos><start_of_turn>user
    {text}<end_of_turn>
    <start_of_turn>model
    {answer}<end_of_turn>
    …

Gemma 3 puts a system text in front of the first user's, two newlines between them; the other families were not
trained with one and refuse it. Texts lose the blanks around them, the system text does not. They are encoded as text:
whatever somebody types, the turns are as they are laid out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .tokenizer import Tokenizer

Message = Mapping[str, Any]
FAMILIES = {"gemma": "Gemma 1", "gemma2": "Gemma 2", "gemma3": "Gemma 3", "recurrentgemma": "RecurrentGemma"}
ROLES = {"user": "user", "model": "model", "assistant": "model"}


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """BOS and the text: what a pretrained model continues."""
    return [tokenizer.bos, *tokenizer.encode(text)]


def conversation_ids(
    tokenizer: Tokenizer, family: str, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """A conversation in the turn format, and the beginning of the model's next turn.

    messages: {"role": "user" | "model" | "assistant", "content": str}, in turn, a user first; with Gemma 3 a "system"
    one may stand in front. family: "gemma", "gemma2", "gemma3" or "recurrentgemma".

    Raises ValueError for roles out of turn, a system text where the family has none, and a vocabulary without turns.
    """
    start = tokenizer.start_of_turn
    if start is None:
        raise ValueError("this vocabulary has no <start_of_turn>; the model was not made for conversations")
    ids = [tokenizer.bos]
    for role, text in _turns(family, messages):
        # Role and text as one string: the newline between them joins those that a system text begins with.
        ids += [start, *tokenizer.encode(f"{role}\n{text}"), start + 1, *tokenizer.encode("\n")]
    return [*ids, start, *tokenizer.encode("model\n")] if add_generation_prompt else ids


def stop_ids(tokenizer: Tokenizer, config_eos: Iterable[int], turns: bool = True) -> tuple[int, ...]:
    """Ids that end an answer: <eos>, those that the checkpoint states, and <end_of_turn> if it was taught `turns`."""
    end = tokenizer.id_of("<end_of_turn>") if turns else None
    return tuple(sorted({tokenizer.eos, *config_eos} | ({end} if end is not None else set())))


def _turns(family: str, messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, text) of each turn, the system text folded in."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} has no turn format here; those that have one are {', '.join(FAMILIES)}")
    if not messages:
        raise ValueError("a conversation needs at least one message")
    system = ""
    first = int(messages[0].get("role") == "system")
    if first:
        if family != "gemma3":
            name = FAMILIES[family]
            raise ValueError(f"{name} was trained without a system role; put the text into the first user message")
        if len(messages) == 1:
            raise ValueError("after the system message a user message must follow")
        system = f"{_content(messages[0])}\n\n"
    turns = []
    for i, message in enumerate(messages[first:]):
        role = ROLES.get(str(message.get("role")))
        if role != ("model" if i % 2 else "user"):
            given, number = message.get("role"), i + first + 1
            raise ValueError(f"message {number} is of role {given!r}; user and model must take turns, a user first")
        turns.append((role, ("" if i else system) + _content(message).strip()))
    return turns


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"the content of a message must be text, not {type(content).__name__}")
    return content
