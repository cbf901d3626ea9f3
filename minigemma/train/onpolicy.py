"""On-policy distillation: a student learns from its teacher on what it writes itself (Agarwal et al. 2024, GKD).

    with probability λ    the first half of a window stays, the student writes the second half, by its own distribution
    loss                  the mean over the tokens of D(P ‖ Q), forward, reverse or JSD(β); none through the sampling

Text alone never shows a student its own mistakes; here it learns how to go on after them. Tokens that the teacher's own
tokenization of the text would not have are left out (teacher.py); those that the student wrote all count. A window's
samples follow from the run's seed, its step and its place, so that a resumed run repeats them.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32, I32
from ..formulas.attention import softmax
from ..formulas.divergence import Toward, divergence, divergence_gradient
from ..models.backward import Batch
from ..models.decoder import Decoder
from ..models.together import forward_together
from .data import Windows
from .targets import Full, Wanted


class OnPolicy(Full):
    """The teacher's whole distribution for texts and for what the student makes of their beginnings."""

    def of(self, windows: Windows, following: I32) -> Wanted:
        """A divergence by all logits, and the ids that it is taken on."""
        ids, _, starts = self.text.corpus.inputs(windows, self.text.tokenizer.bos)
        counted = np.concatenate([self.native[first:last] for first, last in windows])
        random = np.random.default_rng((*self.text.moment(), int(windows[0, 0])))
        chosen = np.flatnonzero(random.random(len(windows)) < self.told.on_policy)
        ends = np.append(starts[1:], len(ids))
        spans = [(int(starts[b]), int((starts[b] + ends[b]) // 2), int(ends[b])) for b in chosen]
        banned = (self.text.tokenizer.pad, self.text.tokenizer.bos, self.text.tokenizer.eos)
        write_on(self.text.student, ids, [span for span in spans if span[1] + 1 < span[2]], banned, random)
        for _, middle, end in spans:
            counted[middle:end] = True
        p, beta = self.teacher.read(Batch(ids, starts)), self.told.beta or 0.0

        def loss_of(logits: F32, at: slice) -> tuple[F32, F32]:
            toward, weight = Toward(p[at], beta), counted[at].astype(np.float32)
            return weight * divergence(logits, toward), divergence_gradient(weight, logits, toward)

        return Wanted(loss_of, 0.0, Batch(ids, starts))


def write_on(
    model: Decoder, ids: I32, spans: list[tuple[int, int, int]], banned: tuple[int, ...], random: np.random.Generator
) -> None:
    """Replace the ids after `middle` of each span (first, middle, end) by samples of the model, all spans together."""
    if not spans:
        return
    caches = [model.new_cache(end - first) for first, _, end in spans]
    begun = [ids[first : middle + 1].tolist() for first, middle, _ in spans]
    rows = np.concatenate([model.forward(known, c, last_only=True) for known, c in zip(begun, caches, strict=True)])
    active = list(range(len(spans)))
    for step in range(1, max(end - middle for _, middle, end in spans)):
        rows[:, list(banned)] = -np.inf
        levels = np.cumsum(softmax(rows), axis=1, dtype=np.float64)
        drawn = (levels > random.random((len(rows), 1)) * levels[:, -1:]).argmax(axis=1)
        for i, token in zip(active, drawn, strict=True):
            ids[spans[i][1] + step] = token
        active = [i for i in active if spans[i][1] + step + 1 < spans[i][2]]
        if active:
            rows = forward_together(model, [int(ids[spans[i][1] + step]) for i in active], [caches[i] for i in active])
