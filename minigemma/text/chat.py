"""A conversation with an instruction-tuned model, in the turn format of its family, over one cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import F32
from ..cache import Cache
from ..models.decoder import Decoder
from .generation import Seen, Token, look_at, stream_generate
from .prompt import conversation_ids


class Chat:
    """Turns that follow one another: `send` a message, get the answer; `messages` has all of them.

    What the cache holds is reused as long as the conversation continues it; a ring cannot be wound back, so where it
    does not (after an answer that a stop string ended, say) the conversation is read again from its beginning. An
    answer is thus always what it would be without a cache. Images are looked at once; what was seen stays with the
    chat, and their message has in "images" how many crops each was cut into.
    """

    _cache: Cache | None
    _held: list[int]  # the ids that the cache holds
    _seen: F32  # [n, tokens, D]: the images of all messages

    def __init__(self, model: Decoder, system: str | None = None, **settings: Any) -> None:
        """`settings`, those of `stream_generate`, hold for all answers. TypeError for a setting of another name."""
        if unknown := set(settings) - set(signature(stream_generate).parameters):
            raise TypeError(f"Chat has no setting {min(unknown)!r}; see stream_generate for those it has")
        self.model = model
        self.settings: dict[str, Any] = settings
        self.reset(system)

    def __repr__(self) -> str:
        """The model, and how long the conversation is."""
        return f"<Chat with {self.model.name or 'a model'}: {len(self.messages)} messages>"

    def reset(self, system: str | None = None) -> None:
        """Forget everything; begin with this system text or none. ValueError where the family has no system role."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        if messages:
            self._ids([*messages, {"role": "user", "content": ""}])
        self.messages: list[dict[str, Any]] = messages
        self._seen = np.empty((0, 0, 0), np.float32)
        self._forget()

    def send(self, text: str, images: Sequence[Any] | Seen = (), **settings: Any) -> str:
        """The model's answer to `text` and images, as `look_at` takes them; settings as in `stream`."""
        return "".join(piece.text for piece in self.stream(text, images, **settings))

    def stream(self, text: str, images: Sequence[Any] | Seen = (), **settings: Any) -> Iterator[Token]:
        """Yield the answer to `text` as it comes; `settings`, those of `stream_generate`, hold for this answer.

        Images stand where the text has <start_of_image>, or in front of it.

        Both messages join the history when the answer ends, whole or cut short by the caller (Ctrl-C, or no more
        pieces asked for): then with what was said so far. An error before the first piece, such as a conversation
        longer than the context (ValueError), leaves the history as it was.
        """
        chosen = {**self.settings, **settings}
        message: dict[str, Any] = {"role": "user", "content": text}
        seen = self._seen
        if len(images):
            new = images if isinstance(images, Seen) else look_at(self.model, images, chosen.get("pan_and_scan"))
            message["images"] = list(new.crops)
            seen = np.concatenate([seen, new.features]) if len(seen) else new.features
        messages = [*self.messages, message]
        ids = self._ids(messages)
        cache, new_ids = self._continued(ids)
        unread = seen[len(self.model.image_runs(ids[: len(ids) - len(new_ids)])) :]
        pieces = stream_generate(self.model, new_ids, Seen(unread, (0,) * len(unread)), cache=cache, **chosen)
        self._forget()  # until the answer ends, so that one begun meanwhile does not write into the same cache
        return self._remembering(messages, seen, ids, cache, pieces)

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
        self, messages: list[dict[str, Any]], seen: F32, ids: list[int], cache: Cache, pieces: Iterator[Token]
    ) -> Iterator[Token]:
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
                self.messages, self._seen = [*messages, {"role": "assistant", "content": said}], seen

    def _ids(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, which a conversation needs")
        return conversation_ids(self.model.tokenizer, self.model.config.family, messages, vision=self.model.vision)

    def _forget(self) -> None:
        self._cache, self._held = None, []

    def _continued(self, ids: list[int]) -> tuple[Cache, list[int]]:
        """A cache that holds a beginning of `ids`, and the rest of them."""
        held = len(self._held)
        if self._cache is not None and held < len(ids) and ids[:held] == self._held:
            return self._cache, ids[held:]
        return self.model.new_cache(self.model.config.context), ids
