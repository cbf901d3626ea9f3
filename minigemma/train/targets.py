"""What a model learns to predict: the next token, or a teacher's distribution at the tokens where it may be believed.

Ways to keep a teacher's distribution P over the student's pieces (`draws`):

    256         256 draws with replacement; a target is its share of the draws. Unbiased: E[t] = P      [Gemma 3 §2.2]
    set:256     the ids of such draws with P restricted to them, which gives the head of P more than its share
    top:64      the 64 likeliest ids, renormalised; biased in the same way
    all         P itself, which the teacher computes again in every step; nothing is kept               [Gemma 2 §3.1]

Native tokens (teacher.py) have the targets α t + (1 - α) next token, the others the next token alone. The floor of the
loss is that of a model which predicts its targets' expectation exactly; loss minus floor is the KL divergence from it.

Targets depend on the text, its windows and the teacher, not on the student. They are made once, in shards of a folder
that any number of students read; a shard that is complete is not made again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..arrays import F32, I32
from ..errors import ModelFormatError, check_fields
from ..files.safetensors_file import open_safetensors, read_json, write_safetensors
from ..files.tokenizer import Tokenizer
from ..formulas.attention import softmax
from ..formulas.cross_entropy import LossOf, Targets
from ..formulas.sampling import log_sum_exp
from ..models.backward import Batch
from ..models.decoder import Decoder
from .checkpoint import replacing, write_json
from .data import Corpus, Windows, micro_batches
from .teacher import Teacher, TeacherError, keep, least_loss

SHARD = 128  # windows
AT_ONCE = 1024  # tokens that go through the teacher together
STAMP = "targets.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The teacher, and how a student learns from it."""

    teacher: str
    draws: str = "256"
    soft: float = 1.0  # α
    targets: str | None = None  # the folder that targets are kept in; None: one inside the run's
    on_policy: float = 0.0  # λ: the share of windows whose second half the student writes (onpolicy.py)
    beta: float | None = None  # the divergence that is minimized (formulas/divergence.py); None: by `draws` and `soft`

    @property
    def live(self) -> bool:
        """Is the teacher asked in every step, about what the student writes or for a divergence by all logits?"""
        return self.on_policy > 0 or self.beta is not None

    def __post_init__(self) -> None:
        """Refuse other values with ValueError."""
        check_fields(self)
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft is {self.soft:g}; it is the teacher's share of the targets, from 0 to 1")
        if not 0 <= self.on_policy <= 1 or not 0 <= (self.beta or 0) <= 1:
            raise ValueError(f"on_policy is {self.on_policy:g} and beta {self.beta or 0:g}; both are from 0 to 1")
        if self.live and (self.soft != 1 or self.draws not in ("256", "all") or self.targets):
            raise ValueError("draws, soft and targets are for a teacher that is asked once, not with on_policy or beta")
        kind, count = self.reading
        if kind not in ("counts", "set", "top", "all") or not 1 <= count <= 1 << 15:
            raise ValueError(f"draws is {self.draws!r}; it must be a number, set:NUMBER, top:NUMBER or all")

    @property
    def reading(self) -> tuple[str, int]:
        """How the distribution is kept, and how many draws or ids; 0 for a number that is none."""
        kind, colon, count = self.draws.rpartition(":")
        if self.draws == "all":
            return "all", 1
        return (kind if colon else "counts"), int(count) if count.isdecimal() else 0


class Wanted(NamedTuple):
    """What some windows should be predicted as."""

    targets: Targets | LossOf
    floor: float  # the sum of their tokens' least losses
    batch: Batch | None = None  # in place of the windows' own ids


class Source(Protocol):
    """What gives windows their targets."""

    def check(self) -> None:
        """Raise ValueError for a teacher, or a folder of targets, that cannot serve, before a run's folder is made."""

    def prepare(self, progress: Progress) -> None:
        """Make what `of` needs."""

    def of(self, windows: Windows, following: I32) -> Wanted:
        """The targets of windows, whose next tokens are `following` [T]."""


def next_token(following: I32, weights: F32) -> Targets:
    """Tokens [T] as targets [T, 1] of these weights [T]."""
    return Targets(following[:, None], weights[:, None])


class NextToken:
    """The next token alone, where the corpus says that it counts."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def check(self) -> None:
        """Nothing can be wrong."""

    def prepare(self, progress: Progress) -> None:
        """Nothing needs to be made."""

    def of(self, windows: Windows, following: I32) -> Wanted:
        """One id per token."""
        return Wanted(next_token(following, self.corpus.weights(windows)), 0.0)


class Text(NamedTuple):
    """What targets are made for: a corpus in windows of `seq` ids of a student's tokenizer."""

    corpus: Corpus
    seq: int
    tokenizer: Tokenizer
    threads: int
    student: Decoder
    moment: Callable[[], tuple[int, int]]  # the run's seed and step


class Full:
    """The teacher's whole distribution, computed when it is needed."""

    def __init__(self, told: Distillation, text: Text) -> None:
        """Targets as `told` for the windows of a text."""
        self.told, self.text = told, text

    def check(self) -> None:
        """Load the teacher."""
        self.teacher = Teacher(self.told.teacher, self.text.tokenizer, self.text.threads)

    def prepare(self, progress: Progress) -> None:
        """Find out which tokens it may be believed at."""
        if not hasattr(self, "teacher"):
            self.check()
        self.native = self.teacher.native(self.text.corpus)

    def of(self, windows: Windows, following: I32) -> Wanted:
        """A loss by all logits."""
        p = self.teacher.probabilities(self.text.corpus, windows)
        rows, native = np.arange(len(p)), np.concatenate([self.native[first:last] for first, last in windows])
        shares = np.float32(self.told.soft) * native
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=1)
        floor = least_loss(entropy, p[rows, following], self.told.soft)[native].sum(dtype=np.float64)
        p *= shares[:, None]
        p[rows, following] += 1 - shares

        def loss_of(logits: F32, at: slice) -> tuple[F32, F32]:
            return log_sum_exp(logits) - np.einsum("tv,tv->t", p[at], logits), softmax(logits) - p[at]

        return Wanted(loss_of, float(floor))


class Kept:
    """Targets in a folder of shards."""

    def __init__(self, told: Distillation, text: Text, folder: Path) -> None:
        """Targets as `told` for the windows of a text, kept in `folder`."""
        self.told, self.text, self.folder = told, text, folder
        self.windows = text.corpus.windows(text.seq)
        self.shards: dict[int, dict[str, Any]] = {}
        self.teacher: Teacher | None = None

    def check(self) -> None:
        """Load the teacher, or compare the folder with what it should hold; TeacherError for other targets."""
        if self.folder.exists() and not self.folder.is_dir():
            raise TeacherError(self.folder, "is no folder", "name another one for --targets")
        if (self.folder / STAMP).exists():
            self._compare(read_json(self.folder / STAMP), self.stamp)
        else:
            self.teacher = self._loaded()

    def _loaded(self) -> Teacher:
        return self.teacher or Teacher(self.told.teacher, self.text.tokenizer, self.text.threads)

    @cached_property
    def stamp(self) -> dict[str, Any]:
        """What these targets are of."""
        pieces = "".join(self.text.tokenizer.piece(i) for i in range(self.text.tokenizer.size))
        text = zlib.crc32(np.ascontiguousarray(self.text.corpus.ids[: self.text.corpus.tokens]).data)
        told = {"teacher": self.told.teacher, "draws": self.told.draws, "seq": self.text.seq, "text": text}
        return told | {"pieces": zlib.crc32(pieces.encode("utf-8", "replace"))}

    def prepare(self, progress: Progress) -> None:
        """Make the shards that are missing."""
        self.check()
        if not (self.folder / STAMP).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / STAMP, self.stamp)
        count = -(-len(self.windows) // SHARD)
        missing = [shard for shard in range(count) if not self._path(shard).exists()]
        if missing:
            teacher, self.teacher = self._loaded(), None  # which goes when they are made
            native = teacher.native(self.text.corpus)
            for done, shard in enumerate(missing):
                progress(count - len(missing) + done, count)
                self._make(shard, teacher, native)

    def _compare(self, found: dict[str, Any], stamp: dict[str, Any]) -> None:
        for name, value in stamp.items():
            if found.get(name) != value:
                told = {"text": "of another text", "pieces": "for another vocabulary"}
                what = told.get(name, f"made with {name} {found.get(name)}, not {value}")
                raise TeacherError(self.folder, f"holds targets {what}", "name another folder for --targets")

    def _path(self, shard: int) -> Path:
        return self.folder / f"targets-{shard:05}.safetensors"

    def _make(self, shard: int, teacher: Teacher, native: np.ndarray) -> None:
        """Ask the teacher about the windows of one shard, and write what is kept."""
        windows, random = self.windows[shard * SHARD : (shard + 1) * SHARD], np.random.default_rng((0, shard))
        parts = []
        for some in micro_batches(windows, AT_ONCE):
            following = np.concatenate([self.text.corpus.ids[first:last] for first, last in some]).astype(np.int32)
            parts.append(keep(teacher.probabilities(self.text.corpus, some), following, self.told.reading, random))
        counts, ids, weights, entropy, next_p = (np.concatenate(values) for values in zip(*parts, strict=True))
        arrays: dict[str, np.ndarray] = {
            "counts": counts.astype(np.uint16),
            "ids": ids.astype(np.uint32),
            "weights": weights.astype(np.float16),
            "entropy": entropy,
            "next_p": next_p,
            "native": native[windows[0, 0] : windows[-1, 1]].astype(np.uint8),
        }
        kinds = {"float16": "F16", "float32": "F32", "uint8": "U8", "uint16": "U16", "uint32": "U32"}
        entries = [(name, kinds[str(array.dtype)], array.shape) for name, array in arrays.items()]
        with replacing(self._path(shard)) as new:
            write_safetensors(new, entries, ([array] for array in arrays.values()))

    def _shard(self, shard: int) -> dict[str, Any]:
        if shard not in self.shards:
            try:
                tensors = open_safetensors(self._path(shard))
            except ModelFormatError as error:
                raise TeacherError(error.path, error.problem, "delete it, and it is made again") from None
            found = {name: tensor.array for name, tensor in tensors.items()}
            found["offsets"] = np.cumsum([0, *found["counts"]])
            self.shards[shard] = found
        return self.shards[shard]

    def of(self, windows: Windows, following: I32) -> Wanted:
        """The kept ids of each token and, where it has a weight, the next one."""
        parts: dict[str, list[np.ndarray]] = {}
        for first, last in windows.tolist():
            number = int(np.searchsorted(self.windows[:, 0], first))
            shard = self._shard(number // SHARD)
            start = first - int(self.windows[number // SHARD * SHARD, 0])
            tokens = slice(start, start + last - first)
            flat = slice(shard["offsets"][tokens.start], shard["offsets"][tokens.stop])
            for name in ("counts", "entropy", "next_p", "native", "ids", "weights"):
                parts.setdefault(name, []).append(shard[name][flat if name in ("ids", "weights") else tokens])
        found = {name: np.concatenate(values) for name, values in parts.items()}
        native = found["native"].astype(bool)
        filled = np.arange(int(found["counts"].max())) < found["counts"][:, None]
        ids = np.zeros((len(filled), filled.shape[1] + 1), np.int32)
        weights = np.zeros(ids.shape, np.float32)
        ids[:, :-1][filled], weights[:, :-1][filled] = found["ids"], found["weights"]
        weights /= weights.sum(axis=1, keepdims=True)
        shares = np.float32(self.told.soft) * native
        weights *= shares[:, None]
        ids[:, -1], weights[:, -1] = following, 1 - shares
        floor = least_loss(found["entropy"], found["next_p"], self.told.soft)[native].sum(dtype=np.float64)
        return Wanted(Targets(ids, weights), float(floor))


def source_of(told: Distillation | None, text: Text, out: Path | None) -> Source:
    """What a run learns to predict; ValueError where targets are to be kept and no folder is named."""
    if told is None:
        return NextToken(text.corpus)
    if told.live:
        from .onpolicy import OnPolicy  # which is made of what this page has

        return OnPolicy(told, text)
    if told.reading[0] == "all":
        return Full(told, text)
    if told.targets is not None:
        return Kept(told, text, Path(told.targets))
    if out is None:
        raise ValueError("the teacher's targets need a folder to be kept in: name one with targets, or out for the run")
    return Kept(told, text, out / "targets")
