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
from ..errors import ModelFormatError
from ..files.cache_file import load_cache
from ..files.safetensors_file import read_json
from ..models.decoder import Decoder
from .generation import Token, stream_generate
from .processors import CONSTRAINTS, Steering, unknown_setting
from .prompt import MARK, checked_model, conversation_ids
from .seeing import Seen, look_at


class ContextFull(ValueError):
    """A conversation that leaves no room for an answer: it has `tokens`, and the context holds `context`."""

    def __init__(self, tokens: int, context: int) -> None:
        self.tokens, self.context = tokens, context
        told = f"the prompt has {tokens:,} tokens and the context holds {context:,}, of which the answer needs one"
        super().__init__(f"{told}; drop_oldest() leaves out the oldest messages, reset() all of them")


class Chat:
    """Turns that follow one another: `send` a message, get the answer; `messages` has all of them.

    The cache is reused as long as the conversation continues it. Where it does not (say after a stop string), the
    conversation is read again from its beginning, since a ring cannot be wound back: answers are those without a cache.
    Each image is encoded once, and its message has in "images" how many crops it was cut into.
    """

    _cache: Cache | None
    _cut: tuple[str, list[int]]  # text and tokens of the last answer, if it was cut; else empty
    _seen: F32  # [n, tokens, D]: the images of all messages

    def __init__(self, model: Decoder, system: str | None = None, **settings: Any) -> None:
        """`settings`, those of `stream_generate`, hold for all answers. TypeError for a setting of another name."""
        if unknown := set(settings) - {*signature(stream_generate).parameters, *Steering.__annotations__}:
            raise unknown_setting(min(unknown))
        checked_model(model)
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
        return self._answered([*self.messages, message], seen, chosen)

    def again(self, **settings: Any) -> Iterator[Token]:
        """Yield another answer to the last message, which replaces the one that was given; as `stream`.

        ValueError where none was given yet.
        """
        self._last_answer()
        return self._answered(self.messages[:-1], self._seen, {**self.settings, **settings})

    def go_on(self, **settings: Any) -> Iterator[Token]:
        """Yield what follows the last answer, which was cut at `max_new_tokens` or by the caller; it joins that answer.

        ValueError where there is no answer, or the model ended it.
        """
        said, (text, tokens) = self._last_answer(), self._cut
        chosen = {**self.settings, **settings}
        if not tokens:
            raise ValueError("the last answer is complete; ask for more in a message")
        if any(chosen.get(name) for name in CONSTRAINTS):
            raise ValueError("an answer of a given form cannot be continued; let it be longer (max_new_tokens)")
        if said != text and self.model.tokenizer:  # edited by the caller
            tokens = self.model.tokenizer.encode(said)
        return self._answered(self.messages[:-1], self._seen, chosen, (said, tokens))

    def _last_answer(self) -> str:
        """What the model said last; ValueError where it said nothing yet."""
        if not self.messages or self.messages[-1]["role"] not in ("assistant", "model"):
            raise ValueError("there is no answer yet; send a message first")
        return self.messages[-1]["content"]

    def drop_oldest(self, tokens: int | None = None) -> int:
        """Leave out the oldest messages and their answers until at most `tokens` tokens are left; how many it left out.

        tokens: None is half of the context. A system text stays.
        """
        first = len(self.messages) % 2  # with a system text there is one more
        kept, most = list(self.messages), self.model.config.context // 2 if tokens is None else tokens
        while len(kept) > first and len(self._ids(kept)) > most:
            gone = sum(1 + crops for crops in kept[first].get("images", ()))
            self._seen, kept[first : first + 2] = self._seen[gone:], []
        dropped, self.messages = len(self.messages) - len(kept), kept
        self._forget()
        return dropped

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

    def keep(self, path: str | Path) -> None:
        """Write the cache, with the messages, for `reopen`; nothing where no answer was given. Raises OSError.

        ValueError for a conversation with images, which such a file does not hold.
        """
        if self._seen.size:
            raise ValueError("a conversation with images cannot be kept with its cache; save() writes its messages")
        if self._cache:
            self._cache.notes = json.dumps(self.messages)
            self._cache.save(path)

    def reopen(self, path: str | Path) -> None:
        """Go on with the conversation that `keep` wrote, of which nothing is read again.

        Raises ModelFormatError for another file and another model's, ValueError for one that begins with another
        system text than this chat, and leaves the history as it was.
        """
        cache = load_cache(self.model, path)
        try:
            messages = json.loads(cache.notes)
            self._ids([*messages, {"role": "user", "content": ""}])
        except (ValueError, TypeError):
            raise ModelFormatError(path, "holds no conversation", "name the file that a chat wrote") from None
        if self.messages and self.messages != messages[:1]:
            raise ValueError(f"the conversation in {path} has another system text; leave --system out")
        self.messages, self._seen = messages, self._seen[:0]
        self._forget()
        self._cache = cache

    def load(self, path: str | Path) -> int:
        """Go on with the messages that `save` wrote; how many images they had, which such a file does not hold.

        Raises ModelFormatError for a file that is no JSON list, ValueError for messages that are no conversation, and
        leaves the history as it was.
        """
        messages, images = read_json(Path(path), (list,)), 0
        for message in messages:
            if isinstance(message, dict) and "images" in message:
                shown = message.pop("images")
                images += len(shown) if isinstance(shown, list) else 0
                message["content"] = str(message.get("content")).replace(MARK, "")
        self._ids([*messages, {"role": "user", "content": ""}])
        self.messages, self._seen = messages, self._seen[:0]
        self._forget()
        return images

    def _answered(
        self, messages: list[dict[str, Any]], seen: F32, chosen: dict[str, Any], begun: tuple[str, list[int]] = ("", [])
    ) -> Iterator[Token]:
        """The answer to `messages`, or what follows the text and tokens of one that was begun."""
        ids = self._ids(messages) + begun[1]
        if len(ids) >= self.model.config.context:
            raise ContextFull(len(ids), self.model.config.context)
        cache, new_ids = self._continued(ids)
        unread = seen[len(self.model.image_runs(ids[: len(ids) - len(new_ids)])) :]
        pieces = stream_generate(self.model, new_ids, Seen(unread, (0,) * len(unread)), cache=cache, **chosen)
        self._forget()  # until the answer ends, so that one begun meanwhile does not write into the same cache
        return self._remembering((messages, seen), ids, cache, pieces, begun)

    def _remembering(
        self,
        asked: tuple[list[dict[str, Any]], F32],
        ids: list[int],
        cache: Cache,
        pieces: Iterator[Token],
        begun: tuple[str, list[int]],
    ) -> Iterator[Token]:
        said, tokens, ended = begun[0], list[int](), None
        try:
            for piece in pieces:
                said += piece.text
                tokens.append(piece.token)
                ended = piece.finish_reason
                yield piece
        finally:
            cache.settle()
            self._cache = cache
            self._cut = ("", []) if ended == "stop" else (said, begun[1] + tokens)
            if tokens:
                messages, self._seen = asked
                self.messages = [*messages, {"role": "assistant", "content": said}]

    def _ids(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, which a conversation needs")
        return conversation_ids(self.model.tokenizer, self.model.config.family, messages, vision=self.model.vision)

    def _forget(self) -> None:
        self._cache, self._cut = None, ("", [])

    def _continued(self, ids: list[int]) -> tuple[Cache, list[int]]:
        """A cache that holds a beginning of `ids`, and the rest of them."""
        cache = self._cache
        if cache and cache.position < len(ids) and np.array_equal(cache.ids, ids[: cache.position]):
            return cache, ids[cache.position :]
        return self.model.new_cache(self.model.config.context), ids
