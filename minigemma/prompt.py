"""Prompts as ids: what stands before a text, and how a conversation is laid out. BOS stands first, and once.

    <bos><start_of_turn>user
    {text}<end_of_turn>
    <start_of_turn>model
    {answer}<end_of_turn>
    …

Gemma 3 puts a system text in front of the first user's, two newlines between them; the other families were not
trained with one and refuse it. Texts are encoded as text: whatever somebody types, the turns are as they are laid out
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .tokenizer import Tokenizer

Message = Mapping[str, Any]
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
        ids += [start, *tokenizer.encode(f"{role}\n{text}"), start + 1, *tokenizer.encode("\n")]
    return [*ids, start, *tokenizer.encode("model\n")] if add_generation_prompt else ids


def _turns(family: str, messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, text) of each turn, the system text folded in."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    system = ""
    if messages[0].get("role") == "system":
        if family != "gemma3":
            name = {"gemma": "Gemma 1", "gemma2": "Gemma 2", "recurrentgemma": "RecurrentGemma"}.get(family, family)
            raise ValueError(
                f"{name} was trained without a system role; put the text into the first user message instead"
            )
        system, messages = f"{_content(messages[0])}\n\n", messages[1:]
        if not messages:
            raise ValueError("after the system message a user message must follow")
    turns = []
    for i, message in enumerate(messages):
        role, expected = ROLES.get(message.get("role", "")), "model" if i % 2 else "user"
        if role != expected:
            raise ValueError(
                f"message {i + 1} is of role {message.get('role')!r}; user and model must take turns, a user first"
            )
        turns.append((role, (system if i == 0 else "") + _content(message).strip()))
    return turns


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"the content of a message must be text, not {type(content).__name__}")
    return content
