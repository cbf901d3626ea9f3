"""A teacher reads a student's windows; for each next token it gives a distribution over the student's pieces.

The student's pieces are among the teacher's, so the teacher reads the same windows, piece by piece, and the logits of
the student's pieces alone make its distribution P.

In a word that falls apart for the student and not for the teacher, the teacher is asked about a spelling that it never
saw. Tokens are native where the teacher's own tokenization of the text has the same span. The <eos> of a document is
not: where this text's documents end, the teacher cannot know.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, I32
from ..errors import FileError
from ..files.load import load
from ..files.tokenizer import Tokenizer
from ..formulas.attention import softmax
from ..formulas.linear import linear
from ..formulas.softcap import soft_cap
from ..kernels.parallel import threads as using_threads
from ..layouts import LAYOUTS, Weight
from ..models.backward import Batch, hidden
from ..models.decoder import Decoder
from .data import Corpus, Windows, encoded

ROWS = 128  # distributions that are drawn from at once
TINY = 1e-30  # a probability that is taken for zero


class TeacherError(FileError):
    """A teacher, or targets of one, that a student cannot learn from."""


class Teacher:
    """A model that reads a student's windows: distributions over the student's pieces."""

    def __init__(self, name: str | Path, student: Tokenizer, threads: int | None = None) -> None:
        """Load the teacher; raises TeacherError where its vocabulary does not hold the student's pieces."""
        self.model: Decoder = load(name, threads=threads, vision=False)
        if not isinstance(self.model.tokenizer, Tokenizer):
            raise TeacherError(name, "has no tokenizer", "take a teacher that came with one")
        self.tokenizer, self.student = self.model.tokenizer, student
        self.ids = self._mapped(name)
        rows = np.ascontiguousarray(self.model.weights.scores.rows(self.ids), np.float32)
        self.head = Weight.pack(LAYOUTS["f32"], rows)

    def _mapped(self, name: str | Path) -> I32:
        """The teacher's id of each of the student's pieces."""
        pieces = [self.student.piece(i) for i in range(self.student.size)]
        found = [self.tokenizer.id_of(piece) for piece in pieces]
        missing = [piece for piece, i in zip(pieces, found, strict=True) if i is None]
        if missing:
            problem = f"lacks {len(missing):,} of the student's {len(pieces):,} pieces, such as {missing[-1]!r}"
            remedy = "make the student's vocabulary from the teacher's (minigemma vocab --from)"
            raise TeacherError(name, problem, remedy)
        return np.array(found, np.int32)

    def probabilities(self, corpus: Corpus, windows: Windows) -> F32:
        """P for each token of the windows, [T, V] float32 over the student's V pieces."""
        ids, _, starts = corpus.inputs(windows, self.student.bos)
        return self.read(Batch(ids, starts))

    def read(self, batch: Batch) -> F32:
        """P for the token after each of a batch of the student's ids, [T, V] float32."""
        h = hidden(self.model, Batch(self.ids[batch.ids], batch.starts))
        with using_threads(self.model.threads):
            logits, cap = linear(h, self.head), self.model.config.logit_cap
            return softmax(logits if cap is None else soft_cap(logits, cap))

    def native(self, corpus: Corpus) -> NDArray[np.bool_]:
        """Which of the ids to train on stand in the teacher's own tokenization of their document, too: [ids] bool."""
        own, theirs = (_sizes(tokenizer) for tokenizer in (self.student, self.tokenizer))
        firsts, found = corpus.documents[: corpus.trained + 1, 0], []
        for first, last in pairwise(firsts.tolist()):
            ids = corpus.ids[first:last]
            full = np.fromiter(encoded(self.tokenizer, self.student.decode(ids.tolist())), np.int64)
            ends, full_ends = np.cumsum(own[ids]), np.cumsum(theirs[full])
            place = np.minimum(np.searchsorted(full_ends, ends), len(full) - 1)
            found.append((full_ends[place] == ends) & (theirs[full[place]] == own[ids]) & (ids != self.student.eos))
        return np.concatenate(found)


def _sizes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The bytes that each id writes."""
    return np.array([len(tokenizer.bytes_of(i)) for i in range(tokenizer.size)])


class Kept(NamedTuple):
    """What is kept of T distributions. One token's ids follow another's."""

    counts: I32  # [T]: ids that are kept of each
    ids: I32
    weights: F32  # their targets; the sum of each token's is 1
    entropy: F32  # [T]: of P, or of the targets where these are biased
    next_p: F32  # [T]: of the text's own next token, in the same


def keep(p: F32, following: I32, reading: tuple[str, int], random: np.random.Generator) -> Kept:
    """What a reading of "sample 256 logits" keeps of distributions p [T, V], which are followed by tokens [T]."""
    rows = (slice(first, first + ROWS) for first in range(0, len(p), ROWS))
    parts = [_keep(p[some], following[some], reading, random) for some in rows]
    return Kept(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _keep(p: F32, following: I32, reading: tuple[str, int], random: np.random.Generator) -> Kept:
    kind, count = reading
    rows, vocabulary = np.arange(len(p))[:, None], p.shape[1]
    if kind == "top":
        ids = np.sort(np.argpartition(-p, min(count, vocabulary) - 1, axis=1)[:, :count], axis=1)
        new = np.ones(ids.shape, bool)
    else:
        levels = np.cumsum(p, axis=1, dtype=np.float64)
        draws = np.sort(random.random((len(p), count)) * levels[:, -1:], axis=1)
        # Each row lies 2 above the one before, so that one search serves all.
        found = np.searchsorted((levels + 2.0 * rows).ravel(), (draws + 2.0 * rows).ravel(), side="right")
        ids = np.minimum(found.reshape(draws.shape) - vocabulary * rows, vocabulary - 1)
        new = np.diff(ids, axis=1, prepend=-1) > 0
    weights = np.zeros(ids.shape)
    if kind == "counts":
        weights[new] = np.diff(np.flatnonzero(new.ravel()), append=new.size)
    else:
        weights[new] = p[rows, ids][new]
    weights /= weights.sum(axis=1, keepdims=True)
    whole = p if kind == "counts" else weights
    entropy = -(whole * np.log(np.maximum(whole, TINY))).sum(axis=1)
    own = p[rows[:, 0], following] if kind == "counts" else (weights * (ids == following[:, None])).sum(axis=1)
    as_floats = (values.astype(np.float32) for values in (weights[new], entropy, own))
    return Kept(new.sum(axis=1).astype(np.int32), ids[new].astype(np.int32), *as_floats)


def least_loss(entropy: F32, next_p: F32, soft: float) -> F32:
    """The entropy of α P + (1 - α) next token, from that of P and P's probability of the next token: [T] float32."""
    p = next_p.astype(np.float64)
    mixed = soft * p + 1 - soft
    others = soft * (entropy + p * np.log(np.maximum(p, TINY)))
    if soft > 0:
        others -= soft * np.log(soft) * (1 - p)
    return (others - mixed * np.log(np.maximum(mixed, TINY))).astype(np.float32)
