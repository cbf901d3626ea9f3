"""A conversation with an instruction-tuned model, in the turn format of its family, over one cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .cache import Cache
from .decoder import Decoder
from .generation import Piece, stream_generate
from .prompt import conversation_ids


class Chat:
    """Turns that follow one another: `send` a message, get the answer; `messages` has all of them.

    What the cache holds is reused as long as the conversation continues it; a ring cannot be wound back, so where it
    does not (after an answer that a stop string ended, say) the conversation is read again from its beginning. An
    answer is thus always what it would be without a cache.
    """

    _cache: Cache | None
    _held: list[int]  # the ids that the cache holds

    def __init__(self, model: Decoder, system: str | None = None, **settings: Any) -> None:
        """`settings`, those of `stream_generate`, hold for all answers; without any, the released sampling values."""
        self.model = model
        self.settings: dict[str, Any] = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, **settings}
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget everything; begin with this system text or none. ValueError where the family has no system role."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        if messages:
            self._ids([*messages, {"role": "user", "content": ""}])
        self.messages: list[dict[str, str]] = messages
        self._forget()

    def send(self, text: str, images: Sequence[Any] = (), **settings: Any) -> str:
        """The model's answer to `text`; settings as in `stream`."""
        return "".join(piece.text for piece in self.stream(text, images, **settings))

    def stream(self, text: str, images: Sequence[Any] = (), **settings: Any) -> Iterator[Piece]:
        """Yield the answer to `text` as it comes; `settings`, those of `stream_generate`, hold for this answer.

        Both messages join the history when the answer ends, whole or cut short by the caller (Ctrl-C, or no more
        pieces asked for): then with what was said so far. An error before the first piece, such as a conversation
        longer than the context (ValueError), leaves the history as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(messages)
        cache, new_ids = self._continued(ids)
        pieces = stream_generate(self.model, new_ids, images, cache=cache, **{**self.settings, **settings})
        self._forget()  # until the answer ends, so that one begun meanwhile does not write into the same cache
        return self._remembering(messages, ids, cache, pieces)

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, complete or not at all; raises OSError."""
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        text = json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n"
        try:
            partial.write_bytes(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair: \udXXX, as in JSON
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _remembering(
        self, messages: list[dict[str, str]], ids: list[int], cache: Cache, pieces: Iterator[Piece]
    ) -> Iterator[Piece]:
        said, tokens = "", []
        try:
            for piece in pieces:
                said += piece.text
                tokens.append(piece.token)
                yield piece
        finally:
            cache.settle()
            self._cache, self._held = cache, [*ids, *tokens][: cache.position]
            if tokens:
                self.messages = [*messages, {"role": "assistant", "content": said}]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.model, which a conversation needs")
        return conversation_ids(self.model.tokenizer, self.model.config.family, messages)

    def _forget(self) -> None:
        self._cache, self._held = None, []

    def _continued(self, ids: list[int]) -> tuple[Cache, list[int]]:
        """A cache that holds a beginning of `ids`, and the rest of them."""
        held = len(self._held)
        if self._cache is not None and held < len(ids) and ids[:held] == self._held:
            return self._cache, ids[held:]
        return self.model.new_cache(self.model.config.context), ids
