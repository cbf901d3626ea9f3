"""A training: batches through the model, gradients to AdamW, and after every step what there is to see of it.

    training = mg.Training("tiny-gemma-3", "text.txt", "runs/a", steps=300)
    for step in training:                       # may be left at any step, and gone on with later
        print(step.number, step.loss)
    mg.generate(training.model, "Once")

A step takes windows of at most `batch_tokens` ids. They go through the model in micro-batches whose gradients are
added up; each token's share is one over the count of all tokens of the step, so that the sum is the whole batch's
gradient, however it was divided.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import F32, I32
from ..config import TextConfig
from ..errors import check_type
from ..files.config_json import config_from_json
from ..files.memory import fits_memory, memory_limit
from ..files.open import folder_tokenizer
from ..files.save import read_parameters, save_model
from ..files.statements import UNSAID
from ..files.tokenizer import Tokenizer
from ..formulas.cross_entropy import LossOf, Targets
from ..kernels.parallel import threads as using_threads
from ..models.backward import Batch, loss, loss_and_gradients
from ..models.decoder import Decoder
from ..models.parameters import model_of, refresh
from ..text.generation import generate
from . import checkpoint
from .checkpoint import LOG, SETTINGS, Counters, RunError, load_state, save_state
from .data import Corpus, Data, DataError, Order, Windows, digest_of, micro_batches, paths_of, read_corpus
from .initial import initial_parameters
from .optimizer import AdamW, learning_rate
from .quantized import Rounded
from .settings import Settings
from .sizes import config_named
from .targets import Distillation, Text, next_token, source_of

EVALUATED = 1 << 15  # tokens of the held-out text that are measured on, from its whole length
GIVE_UP = 20  # steps in a row without a finite gradient


class Step(NamedTuple):
    """One step of a training. Losses are nats per token."""

    number: int  # counted from 1
    tokens: int  # predicted so far
    loss: float  # before the step's update; not finite: the step was skipped
    lr: float
    norm: float  # of the gradient, before it was clipped
    tokens_per_second: float
    seconds_left: float
    skipped: bool = False
    kl: float | None = None  # of a distilled model: the loss above the least that is possible
    held_out: float | None = None  # loss on the held-out text, where it was measured
    bits_per_byte: float | None = None  # the same, for comparisons between vocabularies
    sample: str | None = None


class Training:
    """A run: an iterable of its steps, with `model`, `config`, `tokenizer`, `settings` and `counters`."""

    _prepared = False  # the teacher's targets are there

    def __init__(
        self,
        model: str | Path | tuple[TextConfig, Tokenizer],
        data: Data,
        out: str | Path | None = None,
        *,
        init: str | Path | None = None,
        distillation: Distillation | None = None,
        threads: int | None = None,
        **settings: Any,
    ) -> None:
        """Read the data and make the model.

        model: a tiny model's name, a CONFIG.json with its tokenizer beside it, or a config and a tokenizer. data: files
        of text or jsonl. out: the folder of the run, which must not be there yet; None keeps nothing. init: a folder
        with the parameters to begin with, else they are drawn from the seed. distillation: the teacher to learn from,
        else it is the next token. settings: the fields of `Settings`.

        Raises ValueError, or FileError with the path, for what cannot be trained.
        """
        check_type("distillation", distillation, Distillation, "a Distillation")
        self.settings = Settings(**settings)
        self.config, self.tokenizer = model if isinstance(model, tuple) else config_named(model)
        self.seq = self.settings.window(self.config)
        self.out, self.counters = Path(out) if out is not None else None, Counters()
        check_memory_of(self.config)
        if self.out is not None:
            checkpoint.refuse_occupied(self.out)
        paths = paths_of(data)
        self.corpus = read_corpus(paths, self.tokenizer, self.settings.held_out)
        self.distillation = distillation
        first = initial_parameters(self.config, self.settings.seed) if init is None else self._read(init)
        self._begin_new(paths, first, threads)

    def _begin_new(
        self, paths: list[Any], parameters: dict[str, Any], threads: int | None, least: int | None = None
    ) -> None:
        """What a new run does with its data and first parameters; DataError for less data than `least`, or a batch."""
        if self.corpus.tokens < (least or self.settings.batch_tokens):
            problem = f"has {self.corpus.tokens:,} tokens to train on, fewer than a batch"
            remedy = f"give more text, or a batch_tokens (--batch-tokens) below {self.settings.batch_tokens:,}"
            raise DataError(paths[0], problem, remedy)
        self._begin(parameters, threads)
        self.source.check()
        if self.out is not None:
            with checkpoint.beginning(self.out) as self._lock:
                self._write_beginning(paths)

    @classmethod
    def resume(cls, out: str | Path, data: Data | None = None, threads: int | None = None) -> Training:
        """The run of a folder, from its last checkpoint on. `data` is only compared with what the run was given.

        Raises RunError where there is none, where it is damaged, and for other data.
        """
        self = cls.__new__(cls)
        self.out = Path(out)
        told = checkpoint.read_settings(self.out)
        self._lock = checkpoint.hold(self.out)
        try:
            self.settings = Settings(**told["settings"])
            trained, digest, checksum = told["trained"], told["digest"], told["ids"]
            self.distillation = Distillation(**told["distillation"]) if told["distillation"] else None
            for name, count in (("trained", trained), ("threads", told["threads"])):
                if type(count) is not int or count < 1:
                    raise ValueError(f"{name} is {count!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.damaged(self.out, error) from None
        paths = paths_of(data or ())
        if paths and digest_of(paths) != digest:
            raise RunError(paths[0], f"is not the text that {self.out} was begun with", "leave --data out")
        first = self._reopened(told, threads or told["threads"])
        self.seq, self.corpus = self.settings.window(self.config), Corpus.load(self.out / "run", trained, digest)
        if zlib.crc32(self.corpus.ids.data) != checksum:
            raise RunError(self.out / "run/ids.npy", "holds other ids than the run was begun with", "start a new run")
        self._begin(first, threads or told["threads"])
        self.counters = load_state(self.out, self.adam)
        self._refresh()
        checkpoint.keep_log(self.out, self.counters.step)
        return self

    def __iter__(self) -> Iterator[Step]:
        """Each step that is left; a checkpoint is written after the last one."""
        while not self.finished:
            yield self.step()

    @property
    def finished(self) -> bool:
        """Are all steps, or all tokens, done?"""
        return self.settings.progress(self.counters.step, self.counters.tokens) >= 1

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Make the teacher's targets, unless they are kept already; else the first step does it.

        progress: called with the windows done and all windows.
        """
        if not self._prepared:
            self.source.prepare(progress or (lambda done, total: None))
            self._prepared = True

    def step(self) -> Step:
        """One step, its measurements and its row in the log. Ctrl-C waits for its end."""
        self.prepare()
        with interrupts_wait():
            return self._step()

    def save(self) -> None:
        """Write the checkpoint and the model of this moment; Ctrl-C waits for its end."""
        if self.out is None:
            return
        with interrupts_wait():
            save_state(self.out, self.adam, self.counters)
            self._write_model(self.out)

    def evaluate(self) -> float:
        """The loss on the held-out text, in nats per token; NaN where none is held out."""
        windows = self.corpus.windows(self.seq, held_out=True)
        fits = EVALUATED // self.seq
        if len(windows) > fits:
            windows = windows[np.linspace(0, len(windows) - 1, fits).astype(int)]
        total = count = 0.0
        for some in micro_batches(windows, self.settings.micro_tokens):
            (batch, following), weights = self._batch(some), self.corpus.weights(some)
            total += float(loss(self.model, batch, next_token(following, weights)).sum(dtype=np.float64))
            count += float(weights.sum())
        return total / count if count else math.nan

    # ---- what a fine-tuning does in another way

    def _reopened(self, told: dict[str, Any], threads: int | None) -> dict[str, Any]:
        """Give a resumed run its config and tokenizer; returns parameters of the shapes that it has."""
        assert self.out is not None
        if "finetune" in told:
            raise RunError(self.out, "is a run of `minigemma finetune`", "resume it with that")
        self.config, _ = config_from_json(self.out / "config.json")
        tokenizer = folder_tokenizer(self.out)
        if tokenizer is None:
            raise RunError(self.out, "has lost its tokenizer", "copy it back from the model that it began with")
        self.tokenizer = tokenizer
        return initial_parameters(self.config, 0)

    def _made(self, threads: int | None) -> Decoder:
        """The model over `self.adam.parameters`."""
        self.rounded = Rounded(self.adam.parameters, self.settings.qat)
        return model_of(self.config, self.rounded.parameters, self.tokenizer, threads)

    def _refresh(self) -> None:
        """Let the model follow the parameters."""
        self.rounded.round()
        refresh(self.model, self.rounded.parameters)

    def _learn(self, batch: Batch, targets: Targets | LossOf, scale: float) -> F32:
        """Each token's loss; adds the gradients."""
        return loss_and_gradients(self.model, batch, targets, scale, self.adam.gradients)

    states = UNSAID  # of the model that the run began with

    def _write_model(self, folder: Path) -> None:
        save_model(folder, self.config, self.adam.parameters, self.tokenizer, "f32", self.states)

    def _own_settings(self) -> dict[str, Any]:
        """What settings.json holds of this kind of run alone."""
        return {}

    # ---- inside a step

    def _begin(self, parameters: dict[str, Any], threads: int | None) -> None:
        self.adam = AdamW(parameters, self.settings.weight_decay)
        self.model = self._made(threads)
        self.order = Order(self.corpus.windows(self.seq), self.settings.seed)
        moment = lambda: (self.settings.seed, self.counters.step)  # noqa: E731
        text = Text(self.corpus, self.seq, self.tokenizer, self.model.threads, self.model, moment)
        self.source = source_of(self.distillation, text, self.out)
        self._clock: list[tuple[float, int]] = []  # seconds and tokens of the steps of this process

    def _step(self) -> Step:
        began, c, s = time.perf_counter(), self.counters, self.settings
        windows = self.order.take(c.cursor, s.batch_tokens)
        count = int(self.corpus.weights(windows).sum())
        mean, floor = self._gradients(windows, count)
        c.step, c.tokens, c.cursor = c.step + 1, c.tokens + count, c.cursor + len(windows)
        rate = learning_rate(s.progress(c.step, c.tokens), s.lr, s.warmup, s.min_lr)
        with using_threads(self.model.threads):
            norm = self.adam.step(rate, s.clip, usable=math.isfinite(mean))
        skipped = not math.isfinite(norm + mean)
        c.updates, c.skipped = self.adam.updates, c.skipped + 1 if skipped else 0
        self._refresh()
        self._clock.append((time.perf_counter() - began, count))
        kl = mean - floor if self.distillation else None
        step = Step(c.step, c.tokens, mean, rate, norm, *self._speed(), skipped, kl)
        return self._looked_at(step)

    def _gradients(self, windows: Windows, count: int) -> tuple[float, float]:
        """Add up the gradients of the step's windows; returns the means of loss and floor over its `count` tokens."""
        total = floor = 0.0
        for some in micro_batches(windows, self.settings.micro_tokens):
            batch, following = self._batch(some)
            wanted = self.source.of(some, following)
            total += float(self._learn(wanted.batch or batch, wanted.targets, 1 / count).sum(dtype=np.float64))
            floor += wanted.floor
        return total / count, floor / count

    def _batch(self, windows: Windows) -> tuple[Batch, I32]:
        ids, targets, starts = self.corpus.inputs(windows, self.tokenizer.bos)
        return Batch(ids, starts), targets

    def _speed(self) -> tuple[float, float]:
        """Tokens per second of the latest steps, the first left out, which may have compiled; and the seconds left."""
        speed = float(np.median([tokens / seconds for seconds, tokens in self._clock[1:][-50:] or self._clock]))
        done = self.settings.progress(self.counters.step, self.counters.tokens)
        return speed, self.counters.tokens * (1 - done) / done / speed

    def _looked_at(self, step: Step) -> Step:
        """The step with what is measured, shown and kept after it."""
        s, c, last = self.settings, self.counters, self.finished
        if last or c.step % s.eval_every == 0:
            found = self.evaluate()
            if not math.isnan(found):
                bits = found / math.log(2) / self.corpus.bytes_per_token()
                step = step._replace(held_out=found, bits_per_byte=bits)
        if s.sample_every and (last or c.step % s.sample_every == 0):
            step = step._replace(sample=self.sample())
        self._log(step)
        if step.held_out is not None and step.held_out < c.best:
            c.best = step.held_out
            if self.out is not None:
                self._write_model(self.out / "best")
        if last or c.step % s.save_every == 0:
            self.save()
        if c.skipped >= GIVE_UP:
            told = f"loss or gradient was not finite in the last {GIVE_UP} steps"
            raise ValueError(f"{told}; start again with a lower learning rate (lr is {s.lr:g}) or a longer warm-up")
        return step

    def sample(self, tokens: int = 64) -> str:
        """Text that the model writes now, after the prompt of the settings; always with the same seed."""
        room = min(tokens, self.config.context // 2)
        return generate(self.model, self.settings.prompt or [self.tokenizer.bos], max_new_tokens=room, seed=0, raw=True)

    def _log(self, step: Step) -> None:
        if self.out is None:
            return
        row = {"step": step.number, **step._asdict()}
        del row["number"]
        row = {name: _finite(value) for name, value in row.items() if value is not None}
        with checkpoint.naming(self.out / LOG), (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _read(self, init: str | Path) -> dict[str, Any]:
        """The parameters of another model of the same sizes; ValueError for other ones."""
        _, parameters, _ = read_parameters(init)
        wanted = {name: array.shape for name, array in initial_parameters(self.config, 0).items()}
        for name, shape in wanted.items():
            if name not in parameters or parameters[name].shape != shape:
                found = list(parameters[name].shape) if name in parameters else "missing"
                raise ValueError(f"{init}: {name} is {found}, and this model's is {list(shape)}; name one of its sizes")
        return {name: parameters[name] for name in wanted}

    def _write_beginning(self, paths: list[Any]) -> None:
        assert self.out is not None
        with checkpoint.naming(self.out / "run/ids.npy"):
            self.corpus.save(self.out / "run")
        self.save()
        told: dict[str, Any] = {"model": self.config.name, "data": [str(path) for path in paths]}
        told |= {"settings": asdict(self.settings), "threads": self.model.threads}
        told |= {"trained": self.corpus.trained, "digest": self.corpus.digest}
        told["distillation"] = asdict(self.distillation) if self.distillation else None
        told |= self._own_settings()
        told["ids"] = zlib.crc32(np.ascontiguousarray(self.corpus.ids).data)
        checkpoint.write_json(self.out / SETTINGS, told)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C inside is raised when the block ends; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_memory_of(config: TextConfig) -> None:
    """Refuse with ValueError what does not fit into memory."""
    parameters = config.embedding_parameters + config.non_embedding_parameters
    if not fits_memory(16 * parameters):
        needed, limit = 16 * parameters / 1e9, memory_limit() / 1e9
        told = f"training {parameters:,} parameters takes {needed:,.1f} GB: weights, gradients and two moments"
        raise ValueError(f"{told}, and there are {limit:,.1f} GB; take a smaller model")
