"""Several tokens in one pass: a draft guesses what comes, and the model checks all guesses at once.

Leviathan, Kalman & Matias 2023, "Fast Inference from Transformers via Speculative Decoding": a pass over 9 tokens reads
each weight once, as a pass over one does. Of the guesses g_1 … g_k, in order, each is kept that is the token which the
model draws at its place from its own distribution, p_i, over what stands before it; the first that is not is replaced
by the token drawn, and the rest are dropped. Every token is thus drawn from the model's own distribution, whatever the
guesses are. (The paper keeps a guess drawn from q with probability min(1, p/q); here the guess is always the draft's
likeliest, so q is 1 there, and both rules are the same.)

Two kinds of draft. "prompt": the last tokens are looked up in the text so far, and what followed them is the guess
(Saxena 2023, "Prompt Lookup Decoding"): where a text is quoted, edited or summarized that is right often, and it costs
nothing. A smaller model with the same tokenizer: guesses are right more often, and each costs a pass of it.

A guess is worth what it saves. What reading weights costs is shared by all tokens of a pass, what multiplying costs is
not: a pass over four takes little longer than one where memory is the limit (wide weights, many cores, products of
bytes in hardware), and twice to three times as long on a core with AVX2 alone. So passes are timed, and the share p of
guesses that came true is followed; what the text itself would have guessed is compared also where no pass was made of
it. A pass over n tokens is expected to yield 1 + p + … + p^(n - 1) of them. Of n = 1, 4 and 8 the one is taken that
yields the most per second. (Kernels take tokens in fours.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import F32, I32, read_only
from ..cache import Cache, KeyValueRing, Mark
from ..kernels.compiler import running_seconds
from ..kernels.matvec import FEW
from ..models.decoder import Decoder

SIZES = (4, 8)  # tokens of a pass with guesses
LONGEST = 4  # tokens that are looked up together; two are the fewest
PACE = 0.1  # at which the share of right guesses follows what came of the latest
COST, FORGET = 2.0, 0.99  # of a pass of four, by one of one token, until one was timed; what is left of it each token

Draft = str | Decoder
Step = Callable[[int], F32]
Head = Callable[[F32], F32]


def checked_draft(model: Decoder, draft: Draft | None, alone: bool) -> Draft | None:
    """The draft as `stream_generate` takes it; `alone`: without taps and images.

    Raises ValueError for one that is neither "prompt" nor a model, a model with another tokenizer, and not `alone`.
    """
    if draft is None or draft == "prompt":
        if draft and not alone:
            raise ValueError("a draft guesses tokens of text: it goes without taps")
        return draft
    if isinstance(draft, str) or not hasattr(draft, "forward"):
        raise ValueError(f"draft is {draft!r}; it must be 'prompt' or a loaded model")
    if not alone:
        raise ValueError("a model as draft reads text alone: it goes without taps and images")
    if not same_vocabulary(model, draft):
        raise ValueError(f"{draft.name} as draft has another tokenizer than {model.name}; take one of the same family")
    return draft


def same_vocabulary(one: Decoder, other: Decoder) -> bool:
    """Do the ids of two models stand for the same tokens?"""
    a, b = one.tokenizer, other.tokenizer
    if a is None or b is None:
        return a is b and one.config.vocab == other.config.vocab
    limit = one.vocab_limit
    return limit == other.vocab_limit and all(a.bytes_of(i) == b.bytes_of(i) for i in range(0, limit, 97))


class Ahead:
    """The logits after each token of an answer, some of which are computed before the token is chosen.

    Without a draft, those of one token at a time. `with` leaves a cache that holds the text and no guesses.
    """

    def __init__(self, model: Decoder, cache: Cache, draft: Draft | None, step: Step, head: Head | None) -> None:
        """`step(token)` puts one token into the cache, which holds the prompt, and gives the logits [V] after it.

        head: what makes them [T, V] of hidden states [T, D]; None: `forward`.
        """
        self.model, self.cache, self.step, self.head = model, cache, step, head
        self.guess: Callable[[I32, int], list[int]] | None = None
        if draft is None:
            return
        self.guess = look_up if isinstance(draft, str) else SmallModel(draft, cache.max_tokens)
        self.most = min([FEW, *(ring.limit for ring in cache.layers if isinstance(ring, KeyValueRing))])  # in a pass
        self.ids, self.count = np.empty(cache.max_tokens + 1, np.int32), cache.position
        self.ids[: self.count] = cache.ids
        self.guesses, self.rows = list[int](), list[F32]()  # those not yet decided, and the logits after each, if read
        self.right = 0.5 if draft == "prompt" else 0.7  # share of guesses
        self.alone, self.costs = 0.0, dict[int, float]()  # seconds of one token; passes of each size, by that
        self.mark: Mark | None = None

    def __enter__(self) -> Ahead:
        return self

    @property
    def text(self) -> I32:
        """The prompt and the answer so far."""
        return self.cache.ids if self.guess is None else read_only(self.ids[: self.count])

    def after(self, token: int) -> F32:
        """The logits [V] after `token`, which the text goes on with."""
        if self.guess is None:
            return self.step(token)
        self.ids[self.count] = token
        right = bool(self.guesses) and self.guesses[0] == token
        if self.guesses:
            self.right += PACE * (right - self.right)
        if right and self.rows:
            self.count += 1
            del self.guesses[0]
            return self.rows.pop(0)
        self._drop_guesses()
        self.count += 1
        return self._read()

    def _drop_guesses(self) -> None:
        """Take those out of the cache that are not in the text."""
        self.guesses, self.rows = [], []
        self.cache.settle()
        if self.mark and self.cache.position > self.count:
            self.cache.rewind(self.mark, self.count)

    def _read(self) -> F32:
        """Read the text's last token, with what a recurrent state must read again before it, and new guesses."""
        assert self.guess
        unread, began = self.ids[self.cache.position : self.count].tolist(), running_seconds()
        room = min(min(self._best_size(), self.most) - len(unread), self.cache.max_tokens - self.count)
        guesses = self._possible(self.guess(self.text, room)) if room > 0 else []
        if not guesses:
            return self._read_alone(unread)
        tokens = unread + guesses
        self.mark = self.cache.mark(len(tokens))
        if self.head:
            rows = self.head(self.model.hidden_states(tokens, self.cache)[len(unread) - 1 :])
        else:
            rows = self.model.forward(tokens, self.cache)[len(unread) - 1 :]
        logits, *self.rows = rows
        size, cost = -(-len(tokens) // SIZES[0]) * SIZES[0], (running_seconds() - began) / (self.alone or np.inf)
        self.guesses, self.costs[size] = guesses, min(cost, 0.9 * self.costs.get(size, cost) + 0.1 * cost)
        return logits

    def _read_alone(self, unread: list[int]) -> F32:
        """Read the text's last token without guesses; what a look-up guesses is compared with what comes."""
        if len(unread) > 1:
            return self.model.forward(unread, self.cache, last_only=True)[0]
        began = running_seconds()
        logits = self.step(unread[0])
        took = running_seconds() - began
        self.alone = min(took, 0.9 * self.alone + 0.1 * took) if self.alone else took
        self.costs = {size: min(cost, max(FORGET * cost, COST)) for size, cost in self.costs.items()}
        if self.guess is look_up:
            self.guesses = look_up(self.text, 1)
        return logits

    def _best_size(self) -> int:
        """How many tokens a pass should have; 1: no guesses."""
        best, most, cost = 1, 1.0, COST
        for size in SIZES if self.alone else ():
            cost = self.costs.get(size, cost)
            speed = sum(self.right**i for i in range(size)) / cost
            best, most = (size, speed) if speed > most else (best, most)
            cost *= 1.5  # of the next size, until one was timed
        return best

    def _possible(self, guesses: list[int]) -> list[int]:
        """Those before the first that is never drawn, such as an image's."""
        limit, banned = self.model.vocab_limit, self.model.banned
        return guesses[: next((i for i, token in enumerate(guesses) if token >= limit or token in banned), None)]

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Drop guesses; unless interrupted, have all of the text in the cache."""
        if self.guess is not None:
            self._drop_guesses()
            if kind in (None, GeneratorExit) and self.cache.position < self.count:
                self.model.forward(self.ids[self.cache.position : self.count].tolist(), self.cache, last_only=True)


def look_up(ids: I32, most: int) -> list[int]:
    """What followed the last tokens of a text where they stood before, at most `most` tokens; [] where they did not.

    Of the longest end that stood before, at most LONGEST tokens and at least two, the latest place. ids [T].
    """
    places = np.flatnonzero(ids[:-1] == ids[-1]) + 1  # where a guess may begin
    found = 0
    for length in range(2, LONGEST + 1):
        if length >= len(ids):
            break
        places = places[places >= length]
        places = places[ids[places - length] == ids[-length]]
        if not len(places):
            break
        found = int(places[-1])
    return ids[found : found + most].tolist() if found else []


class SmallModel:
    """Guesses of a smaller model: always its likeliest token."""

    def __init__(self, model: Decoder, max_tokens: int) -> None:
        self.model, self.cache = model, model.new_cache(max_tokens + SIZES[-1])
        self.mark: Mark | None = None
        limits = [ring.limit for ring in self.cache.layers if isinstance(ring, KeyValueRing)]
        self.most = min([SIZES[-1], *limits])

    def __call__(self, ids: I32, most: int) -> list[int]:
        """At most `most` tokens after ids [T]."""
        held = self.cache.ids[: len(ids) - 1]
        same = held == ids[: len(held)]
        shared = len(held) if same.all() else int(same.argmin())
        if self.mark and shared < self.cache.position:
            self.cache.rewind(self.mark, shared)
        logits = self.model.forward(ids[self.cache.position :].tolist(), self.cache, last_only=True)[0]
        self.mark = self.cache.mark(self.most)
        found: list[int] = []
        while True:
            found.append(int(logits[: self.model.vocab_limit].argmax()))
            if len(found) >= min(most, self.most):
                return found
            logits = self.model.forward(found[-1:], self.cache, last_only=True)[0]
