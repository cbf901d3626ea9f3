"""Requests that come at any time, answered together: continuous batching. It knows nothing of HTTP (cli/serve.py).

One thread owns the model. Between two tokens it drops requests that were cancelled, lets waiting ones join, reads one
chunk of one prompt, and computes the next token of every answer in one step. So a long prompt delays the others by a
chunk at a time, and an answer that ends makes room at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import Cache
from ..errors import no_vision
from ..models.decoder import PREFILL_CHUNK, Decoder, chunks
from .batch import Answer, next_logits
from .generation import Seen, Token, look_at, stream_generate
from .prefixes import Kept, Prefixes, key_of

CHUNK = 64  # tokens of a prompt that are read between two tokens of the others


class Request(NamedTuple):
    """A prompt as ids, its images as `look_at` takes them, a digest of each, and settings of `stream_generate`."""

    ids: list[int]
    settings: dict[str, Any]
    images: Sequence[Any] = ()
    digests: Sequence[int] = ()  # below 2⁶³ - 1; the same for the same image


class QueueFull(Exception):
    """No place is left among the requests that wait; `seconds` is about when there will be one."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"too many requests are waiting; try again in about {seconds} s")


class Stopped(Exception):
    """The engine stops before the answer's end."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


Tell = Callable[[Token | Exception], object]


@dataclass(eq=False)
class Job:
    """A request on its way. `tell` gets each token, the last with a finish_reason, or an exception, which is last."""

    request: Request
    key: NDArray[np.int64]  # of its prompt
    tell: Tell
    since: float = field(default_factory=time.monotonic)
    began: float = 0.0  # when it joined
    latest_chunk: float = 0.0  # when a chunk of its prompt was read last
    cancelled: bool = False
    cache: Cache | None = None
    cached: int = 0  # tokens of its prompt that were in a cache already
    fork: int = 0  # the number of tokens after which a copy of the cache is kept; 0: no copy
    said: list[int] = field(default_factory=list)
    answer: Answer | None = None  # once the prompt is read

    @property
    def kept(self) -> Kept | None:
        """The cache and what stands in it, if anything does."""
        if self.cache is None or not self.cache.position:
            return None
        self.cache.settle()
        return Kept(np.concatenate([self.key, np.array(self.said, np.int64)])[: self.cache.position], self.cache)

    def cancel(self) -> None:
        """Stop at the next token, without another word."""
        self.cancelled = True


@dataclass
class Counts:
    """What an engine has done so far."""

    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompts, not read again
    new_tokens: int = 0
    first_token_seconds: float = 0.0  # summed over requests with a first token, waiting included
    first_tokens: int = 0
    answer_seconds: float = 0.0  # summed over answers that ended, waiting apart


class Engine:
    """A model that answers up to `most` requests together, while up to `queue` others wait."""

    def __init__(self, model: Decoder, most: int, queue: int, keep: int | None = None) -> None:
        """`keep`: how many caches of earlier texts are kept for prompts that begin like them; None: `most`, or 4."""
        self.model, self.most, self.queue = model, most, queue
        self.counts = Counts()
        self.prefixes = Prefixes(max(most, 4) if keep is None else keep)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.changed = threading.Condition()
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, request: Request, tell: Tell) -> Job:
        """Queue a request; `tell` is called in the engine's thread and must return at once.

        Raises QueueFull and Stopped. What is wrong with the request itself is told when its turn comes, unless `check`
        has said it before.
        """
        runs = self.model.image_runs(request.ids)
        job = Job(request, key_of(request.ids, runs, request.digests), tell)
        with self.changed:
            if self.stopping:
                raise Stopped
            self.waiting = deque(each for each in self.waiting if not each.cancelled)
            if len(self.waiting) >= self.queue + self.most - len(self.running):
                self.counts.refused += 1
                raise QueueFull(self.seconds_to_wait())
            self.waiting.append(job)
            self.changed.notify()
        return job

    def seconds_to_wait(self) -> int:
        """About how long it takes until one of the running answers ends: from 1 to 60 s."""
        mean = self.counts.answer_seconds / max(self.counts.answered, 1)
        return min(60, max(1, math.ceil(mean / self.most)))

    def stop(self) -> None:
        """Tell all requests that the engine stops, at the next token; does not wait for it, so signal handlers may."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def close(self) -> None:
        """Stop, and wait until the thread has ended."""
        self.stop()
        self.thread.join()

    def __enter__(self) -> Engine:
        """For `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def check(self, request: Request) -> None:
        """Raise the ValueError of a request that cannot be answered, without running the model, in any thread."""
        vision, count = self.model.vision, len(request.images)
        features = np.empty((0, 0, 0), np.float32)
        if count:
            if vision is None:
                raise no_vision(self.model.name, count)
            features = np.zeros((count, vision.tokens, self.model.config.width), np.float32)
        stream_generate(self.model, request.ids, Seen(features, (0,) * count), **request.settings).close()
        self.model.checked_ids(request.ids)

    # ---- what the engine's thread does

    def _run(self) -> None:
        try:
            while self._joined():
                self._turn()
        finally:
            self.stop()
            for job in [*self.running, *self.waiting]:
                _told(job, Stopped())

    def _joined(self) -> bool:
        """Wait until there is something to do, and let requests join; False: stop."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or self.waiting or self.running)
            while self.waiting and len(self.running) < self.most and not self.stopping:
                self.running.append(self.waiting.popleft())
            return not self.stopping

    def _turn(self) -> None:
        """CHUNK tokens of prompts, one or more, and one token of every answer."""
        for job in [job for job in self.running if job.cancelled]:
            self.counts.cancelled += 1
            self._leave(job)
        decoding, left = [(job, job.answer) for job in self.running if job.answer], CHUNK
        while left > 0 and (unread := [job for job in self.running if job.answer is None]):
            reading = min(unread, key=lambda job: job.latest_chunk)
            reading.latest_chunk = time.monotonic()
            try:
                left -= self._read(reading)
            except Exception as error:
                self._fail(reading, error)
        if not decoding:
            return
        try:
            rows = next_logits(self.model, [answer for _, answer in decoding])
        except Exception as error:  # the failing request is unknown, and so is the state of each cache
            for job, _ in decoding:
                job.cache = None
                self._fail(job, error)
            return
        for (job, answer), row in zip(decoding, rows, strict=True):
            try:
                self._say(job, answer._replace(latest=answer.tokens.send(row)))
            except Exception as error:
                self._fail(job, error)

    def _read(self, job: Job) -> int:
        """Read the next chunk of a prompt, and say how many tokens it has; with the last one comes the first token."""
        ids, cache = job.request.ids, job.cache
        if cache is None:
            others = [kept for each in self.running if (kept := each.kept)]
            found = self.prefixes.find(job.key, others)
            cache = job.cache = found.cache or self.model.new_cache(self.model.config.context)
            job.cached, job.fork, job.began = cache.position, found.fork, time.monotonic()
        first = cache.position
        runs = [(i, run) for i, run in enumerate(self.model.image_runs(ids)) if run[0] >= first]
        others_wait = any(each.answer for each in self.running)
        size = CHUNK if others_wait else PREFILL_CHUNK
        last = first + chunks(len(ids) - first, [(a - first, b - first) for _, (a, b) in runs], size)[0][1]
        last = min(last, job.fork) if first < job.fork else last
        images = [job.request.images[i] for i, (begin, _) in runs if begin < last]
        seen = look_at(self.model, images) if images else Seen(np.empty((0, 0, 0), np.float32), ())
        if last < len(ids):
            self.model.hidden_states(ids[first:last], cache, seen.features, last_only=True)
            if last == job.fork:
                self.prefixes.keep(job.key, cache.copy())
            return last - first
        tokens = stream_generate(self.model, ids[first:], seen, cache=cache, **job.request.settings)
        self._say(job, Answer(cache, tokens, next(tokens)))
        return last - first

    def _say(self, job: Job, answer: Answer) -> None:
        """Tell a token; an answer that has ended leaves."""
        job.answer, token = answer, replace(answer.latest, prompt_tokens=len(job.request.ids))
        if not job.said:
            self.counts.first_token_seconds += time.monotonic() - job.since
            self.counts.first_tokens += 1
            self.counts.prompt_tokens += token.prompt_tokens
            self.counts.cached_tokens += job.cached
        job.said.append(token.token)
        self.counts.new_tokens += 1
        if token.finish_reason:
            self.counts.answered += 1
            self.counts.answer_seconds += time.monotonic() - job.began
            self._leave(job)
        _told(job, token)

    def _fail(self, job: Job, error: Exception) -> None:
        """Tell what went wrong with one request; the others go on."""
        self.counts.failed += 1
        self._leave(job)
        _told(job, error)

    def _leave(self, job: Job) -> None:
        """Make room, and keep what the cache holds."""
        self.running.remove(job)
        if job.answer:
            job.answer.tokens.close()
        if kept := job.kept:
            self.prefixes.keep(*kept)


def _told(job: Job, event: Token | Exception) -> None:
    """Tell a job's owner; one that cannot be told any more has left."""
    if not job.cancelled:
        try:
            job.tell(event)
        except RuntimeError:  # its event loop is closed
            job.cancel()
