"""What a model's tokenizer does, for annotations; files/tokenizer.py has the one there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class TokenStream(Protocol):
    """Ids to text one by one."""

    def push(self, token: int) -> str:
        """The characters that are complete with this token."""

    def flush(self) -> str:
        """What is left of an unfinished character."""


class Vocabulary(Protocol):
    """Text to token ids and back."""

    pad: int
    eos: int
    bos: int
    size: int

    @property
    def start_of_turn(self) -> int | None:
        """The token that begins a turn, of which its end is the next; None where there is none."""

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Ids of a text, without BOS. With `control`, the names of control tokens in it become these tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens have none, and bytes that are no UTF-8 become U+FFFD."""

    def stream(self) -> TokenStream:
        """A decoder for ids that come one at a time."""

    def piece(self, token: int) -> str:
        """The vocabulary's entry for an id, as it stands there; empty for an id outside it."""

    def bytes_of(self, token: int) -> bytes:
        """What an id adds to a text, in UTF-8."""

    def id_of(self, piece: str) -> int | None:
        """The id of a piece or an added token, or None if the vocabulary has no such."""

    def add(self, tokens: Iterable[Any], rows: int) -> None:
        """Take up a checkpoint's added tokens below `rows`."""
