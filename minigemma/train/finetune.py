"""Fine-tuning: a LoRA adapter over a frozen model, or all of its parameters, from prompts and answers or from text.

    tuning = mg.FineTuning("gemma-3-270m", "examples.jsonl", "runs/a", steps=200)
    for step in tuning:
        print(step.number, step.loss)
    mg.load("gemma-3-270m", adapter="runs/a")

W stays as it lies in the file, and A and B alone have gradients, moments and a place in the checkpoint (formulas/
lora.py). A begins uniform in ±1/√D and B at zero, so that the first step sees the model as it is (Hu et al. 2021 §4.1).

The head of a large vocabulary costs more than all layers. Training takes the rows of those ids alone that occur in the
data, and the first ones of the vocabulary, which are its most frequent pieces; held-out losses are of the whole head.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import F32, I32
from ..errors import check_fields, check_type
from ..files.adapter import Pair, save_adapter
from ..files.load import load
from ..files.open import open_files
from ..files.resolve import resolve
from ..files.save import read_parameters
from ..files.tokenizer import Tokenizer
from ..formulas.cross_entropy import LossOf, Targets
from ..layouts import LAYOUTS, Adapted, Weight
from ..models.backward import Batch, loss_and_gradients
from ..models.decoder import Decoder
from ..models.registry import all_names
from ..models.weights import named_weights
from . import checkpoint
from .checkpoint import Counters
from .data import Data, paths_of
from .examples import Layout, read_examples
from .settings import Settings
from .trainer import Training, check_memory_of

FREQUENT = 8192  # ids that the head always has
DEFAULTS: dict[str, Any] = {"seq": 512, "batch_tokens": 512, "micro_tokens": 1024, "lr": 2e-4, "weight_decay": 0.0}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter that is trained."""

    rank: int = 8  # r
    alpha: float = 16.0  # α; what is added is scaled by α / r
    modules: tuple[str, ...] = ()  # their names in transformers, as q_proj; none: all linear maps of the layers

    def __post_init__(self) -> None:
        """Refuse other values with ValueError."""
        check_fields(self)
        if not (1 <= self.rank <= 1024 and 0 < self.alpha < math.inf):
            raise ValueError(f"rank is {self.rank} and alpha {self.alpha:g}; rank is 1 … 1024 and alpha above 0")

    def targets(self, model: Decoder) -> dict[str, Weight]:
        """The weights of the model that get an adapter; ValueError for a module that it does not have."""
        weights = dict(named_weights(model.weights))
        ends = {
            ours: theirs.removesuffix(".weight").rpartition(".")[2] for ours, theirs, _ in all_names(model.config, 0)
        }
        fit = {n: w for n, w in weights.items() if n.startswith("blocks.") and isinstance(w, Weight)}
        known = sorted({ends[name] for name in fit})
        if unknown := [name for name in self.modules if name not in known]:
            raise ValueError(f"the model has no module {unknown[0]!r}; its linear maps are {', '.join(known)}")
        return {name: w for name, w in fit.items() if not self.modules or ends[name] in self.modules}


class FineTuning(Training):
    """A run that changes a model; an iterable of its steps as `Training` is."""

    def __init__(
        self,
        model: str | Path,
        data: Data,
        out: str | Path | None = None,
        *,
        lora: Lora | None = None,
        full: bool = False,
        dtype: str | None = None,
        turns: bool | None = None,
        threads: int | None = None,
        **settings: Any,
    ) -> None:
        """Read model and data.

        model: what `load` takes. data: jsonl of examples (examples.py), text, or jsonl of {"text": …}. out: the folder
        of the run, None keeps nothing. lora: the adapter; full: train every parameter instead, in float32. dtype: how
        the frozen weights are held, None: as stored. turns: lay prompts out in turns; None: if the model is made for
        conversations. settings: the fields of `Settings`.

        Raises ValueError, or FileError with the path, for what cannot be trained.
        """
        check_type("lora", lora, Lora, "a Lora")
        self.settings, self.distillation = Settings(**(DEFAULTS | settings)), None
        self.lora, self.dtype = None if full else lora or Lora(), dtype
        self.out, self.counters = Path(out) if out is not None else None, Counters()
        if self.out is not None:
            checkpoint.refuse_occupied(self.out)
        first = self._opened(str(model), threads)
        self.seq = self.settings.window(self.config)
        paths = paths_of(data)
        layout = Layout(self.tokenizer, self.config.family, self.tuned if turns is None else turns, self.seq)
        self.corpus = read_examples(paths, layout, self.settings.held_out)
        least = None if "batch_tokens" in settings else 1  # a step sees few examples several times
        self._begin_new(paths, first, threads, least)

    def _opened(self, name: str, threads: int | None) -> dict[str, F32]:
        """Load the model; returns the parameters to begin with."""
        self.base = load(name, self.dtype, threads=threads, vision=False)  # type: ignore[arg-type]
        if not isinstance(self.base.tokenizer, Tokenizer):
            raise ValueError(f"{name} has no tokenizer; take a model that came with one")
        self.name, self.tuned = name, self.base.instruction_tuned
        self.config, self.tokenizer = replace(self.base.config, vision=None), self.base.tokenizer
        if self.lora is None:
            check_memory_of(self.config)
            self.states = open_files(resolve(name), vision=False).states
            return read_parameters(name)[1]
        random, found = np.random.default_rng(self.settings.seed), {}
        for ours, weight in self.lora.targets(self.base).items():
            (R, D), r = weight.shape, self.lora.rank
            found[f"{ours}.lora_a"] = random.uniform(-(D**-0.5), D**-0.5, (r, D)).astype(np.float32)
            found[f"{ours}.lora_b"] = np.zeros((R, r), np.float32)
        return found

    def _reopened(self, told: dict[str, Any], threads: int | None) -> dict[str, F32]:
        known = told.get("finetune")
        if known is None:
            raise checkpoint.RunError(self.out or "", "is a run of `minigemma train`", "resume it with that")
        try:
            name, self.dtype, lora = known["model"], known["dtype"], known["lora"]
            self.lora = Lora(**lora | {"modules": tuple(lora["modules"])}) if lora else None
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.damaged(self.out or Path(), error) from None
        return self._opened(name, threads)

    def _own_settings(self) -> dict[str, Any]:
        lora = None if self.lora is None else asdict(self.lora)
        return {"finetune": {"model": self.name, "dtype": self.dtype, "lora": lora}}

    def _made(self, threads: int | None) -> Decoder:
        if self.lora is None:
            return super()._made(threads)
        scale, targets = self.lora.alpha / self.lora.rank, self.lora.targets(self.base)
        given = self.adam.parameters
        changed: dict[str, Weight] = {
            name: Adapted.of(weight, given[f"{name}.lora_a"], given[f"{name}.lora_b"], scale)
            for name, weight in targets.items()
        }
        return self.base.with_weights(changed)

    def _refresh(self) -> None:
        if self.lora is None:
            super()._refresh()

    def _learn(self, batch: Batch, targets: Targets | LossOf, scale: float) -> F32:
        if self.lora is None or not isinstance(targets, Targets):
            return super()._learn(batch, targets, scale)
        trained, kept = self._with_short_head
        short = Targets(np.searchsorted(kept, targets.ids).astype(np.int32), targets.weights)
        return loss_and_gradients(trained, batch, short, scale, self.adam.gradients)

    @cached_property
    def _with_short_head(self) -> tuple[Decoder, I32]:
        """The model with the rows of the head that training needs, and their ids."""
        used = np.unique(self.corpus.ids).astype(np.int32)
        kept = np.union1d(used, np.arange(min(FREQUENT, self.config.vocab), dtype=np.int32)).astype(np.int32)
        model = copy(self.model)
        head = Weight.pack(LAYOUTS["f32"], np.ascontiguousarray(self.model.weights.scores.rows(kept), np.float32))
        model.weights = replace(self.model.weights, head=head)
        return model, kept

    def _write_model(self, folder: Path) -> None:
        if self.lora is None:
            super()._write_model(folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        given = self.adam.parameters
        names = [name.removesuffix(".lora_a") for name in given if name.endswith(".lora_a")]
        scale = self.lora.alpha / self.lora.rank
        pairs = {name: Pair(given[f"{name}.lora_a"], given[f"{name}.lora_b"], scale) for name in names}
        told = {"r": self.lora.rank, "lora_alpha": self.lora.alpha, "base_model_name_or_path": self.name}
        save_adapter(folder, self.config, pairs, told)
