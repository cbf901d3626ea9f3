"""The settings of a training: length, batches, learning rate, what is measured and stored on the way."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TextConfig
from ..errors import check_fields

ROUNDED = ("int4", "int4-row", "int8", "int8-row", "sfp8", "bf16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a training. Exactly one of `steps` and `tokens` says how long it is."""

    steps: int | None = None
    tokens: int | None = None  # that are predicted in all, epochs together
    seed: int = 0  # of the initial parameters and of the order of the windows
    seq: int | None = None  # tokens of a window at most; None: 256, or the model's context where that is shorter
    batch_tokens: int = 2048  # tokens of a step at most
    micro_tokens: int = 2048  # of them, those that go through the model at once: bounds the memory
    lr: float = 2e-3  # the highest learning rate
    warmup: float = 0.05  # share of the training in which the learning rate rises
    min_lr: float = 0.1  # the learning rate at the end, as a share of the highest
    weight_decay: float = 0.1
    clip: float = 1.0  # the norm that gradients are cut to; inf: they are not
    held_out: float = 0.05  # share of the data that is measured on and not trained on
    eval_every: int = 100  # steps between two measurements on it
    save_every: int = 500  # steps between two checkpoints
    sample_every: int = 0  # steps between two samples of text; 0: none
    prompt: str = ""  # what a sample begins with
    qat: str | None = None  # the model runs with its matrices rounded to this dtype of `load` (quantized.py)

    def __post_init__(self) -> None:
        """Raise ValueError for impossible settings."""
        check_fields(self)
        if (self.steps is None) == (self.tokens is None):
            given = "both steps and tokens are given" if self.steps is not None else "neither steps nor tokens is given"
            raise ValueError(f"{given}; one of them says how long the training is")
        for name in ("steps", "tokens", "seq", "batch_tokens", "micro_tokens", "eval_every", "save_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("seed", "sample_every", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip:g}; it must be above 0")
        if not 0 < self.lr <= 10:
            raise ValueError(f"lr is {self.lr:g}; it must be above 0 and at most 10")
        for name, highest in (("warmup", 1.0), ("min_lr", 1.0), ("held_out", 0.5)):
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name} is {getattr(self, name):g}; it is a share, from 0 to {highest:g}")
        if self.qat not in (None, *ROUNDED):
            raise ValueError(f"qat is {self.qat!r}; it must be one of {', '.join(ROUNDED)}")
        if self.seq and self.seq > self.batch_tokens:
            raise ValueError(f"a window of {self.seq} tokens is longer than a batch of {self.batch_tokens}")

    def window(self, config: TextConfig) -> int:
        """Tokens of a window of this model at most; ValueError where that is longer than its context."""
        if self.seq and self.seq > config.context:
            raise ValueError(f"a window of {self.seq} tokens is longer than the model's context of {config.context}")
        return self.seq or min(256, config.context, self.batch_tokens)

    def progress(self, step: int, tokens: int) -> float:
        """The fraction of the training that is done after `step` steps and `tokens` tokens."""
        return step / self.steps if self.steps else min(1.0, tokens / (self.tokens or 1))
