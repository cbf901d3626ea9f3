"""llama.cpp, on the GGUF file itself."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence

from minigemma.cli.measure import Program
from minigemma.models.decoder import Decoder


class LlamaCpp(Program):
    """llama.cpp (PyPI llama-cpp-python) on the very GGUF file that the model was loaded from."""

    name = "llama.cpp"

    def __init__(self, model: Decoder) -> None:
        if model.path is None or model.path.suffix != ".gguf":
            raise ImportError("it runs GGUF files, and this model is from none")
        try:
            library = importlib.import_module("llama_cpp")
        except ImportError:
            raise ImportError("pip install llama-cpp-python (it builds for some minutes)") from None
        count, length = model.threads, min(model.config.context, 8192)
        shared = {"n_threads": count, "n_threads_batch": count, "n_ctx": length, "n_batch": 512, "verbose": False}
        self.model = library.Llama(model_path=str(model.path), **shared)
        self.read_bytes = model.path.stat().st_size

    def prefill(self, ids: Sequence[int]) -> float:
        """As every program."""
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(list(ids))
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every program; which token it is takes no time to tell."""
        began = time.perf_counter()
        for _ in range(count):
            self.model.eval([5])
        return (time.perf_counter() - began) / count
