"""Programs that run a folder of their own converter: OpenVINO GenAI, CTranslate2, onnxruntime-genai.

`minigemma export` writes the weights in bf16, the program's converter reads those (README.md has the commands), and its
own generation loop runs them greedily, so that what is measured is what its users get.
"""

from __future__ import annotations

import importlib
import json
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minigemma.cli.measure import Program, parameters
from minigemma.models.decoder import Decoder


class Continued(NamedTuple):
    """tokens: the likeliest ones after a prompt; first: seconds until the first; each: seconds for each one later."""

    tokens: list[int]
    first: float
    each: float


class Converted(Program):
    """A program that runs the folder which its own converter has written of the model's weights."""

    module: str  # what Python imports
    package: str  # what pip installs

    def __init__(self, model: Decoder, folder: str = "") -> None:
        if not folder:
            raise ImportError(f"give the folder its converter wrote: {self.name}=FOLDER (benchmarks/README.md)")
        try:
            library = importlib.import_module(self.module)
        except ImportError:
            raise ImportError(f"pip install {self.package}") from None
        self.threads, self.read_bytes = model.threads, parameters(model)
        self.open(library, Path(folder))
        ids = [2, *model.tokenizer.encode("The capital of France is")] if model.tokenizer else list(range(2, 8))
        token = self.continued(ids, 1).tokens[0]
        if token not in np.argsort(model.forward(ids, last_only=True)[0])[-5:]:
            raise ValueError(
                f"{folder} does not have the weights of {model.name}: its next token is not among our five likeliest"
            )

    @abstractmethod
    def open(self, library: ModuleType, folder: Path) -> None:
        """Loads the folder."""

    @abstractmethod
    def continued(self, ids: Sequence[int], count: int) -> Continued:
        """`count` tokens after the prompt, with an empty cache at the start and no end at a stop token."""

    def prefill(self, ids: Sequence[int]) -> float:
        """As every program."""
        self.ids = list(ids)
        return self.continued(ids, 1).first

    def decode(self, count: int) -> float:
        """As every program; the prompt is read again, outside of the time."""
        return self.continued(self.ids, count + 1).each


def timed(stamps: Sequence[float]) -> tuple[float, float]:
    """(seconds to the first token, seconds for each later one) from the times of the start and of every token."""
    return stamps[1] - stamps[0], (stamps[-1] - stamps[1]) / max(len(stamps) - 2, 1)


class OpenVINOGenAI(Converted):
    """OpenVINO GenAI's LLMPipeline on the folder of `optimum-cli export openvino`."""

    name, module, package = "openvino-genai", "openvino_genai", "openvino-genai"

    def open(self, library: ModuleType, folder: Path) -> None:
        """As every program."""
        self.library, self.tensor = library, importlib.import_module("openvino").Tensor
        scheduler = library.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # else it measures a prompt that it has read before
        settings = {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": self.threads}
        self.pipeline = library.LLMPipeline(folder, "CPU", **settings)

    def continued(self, ids: Sequence[int], count: int) -> Continued:
        """As every program; the times are those of its own metrics."""
        row = np.array([ids], np.int64)
        prompt = self.library.TokenizedInputs(self.tensor(row), self.tensor(np.ones_like(row)))
        settings = self.library.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        result = self.pipeline.generate(prompt, settings)
        metrics = result.perf_metrics
        each = metrics.get_tpot().mean / 1e3 if count > 1 else 0.0
        return Continued(list(result.tokens[0]), metrics.get_ttft().mean / 1e3, each)


class CTranslate2(Converted):
    """CTranslate2's Generator on the folder of `ct2-transformers-converter`."""

    name, module, package = "ctranslate2", "ctranslate2", "ctranslate2"

    def open(self, library: ModuleType, folder: Path) -> None:
        """As every program."""
        self.model = library.Generator(str(folder), intra_threads=self.threads, compute_type="int8")
        self.words: list[str] = json.loads((folder / "vocabulary.json").read_text("utf-8"))

    def continued(self, ids: Sequence[int], count: int) -> Continued:
        """As every program."""
        stamps: list[float] = []

        def note(step: Any) -> bool:
            stamps.append(time.perf_counter())
            return False

        settings = {"min_length": count, "max_length": count, "include_prompt_in_result": False, "callback": note}
        began = time.perf_counter()
        result = self.model.generate_batch([[self.words[token] for token in ids]], **settings)
        return Continued(result[0].sequences_ids[0], *timed([began, *stamps]))


class OnnxRuntimeGenAI(Converted):
    """onnxruntime-genai on the folder of its model builder."""

    name, module, package = "onnxruntime-genai", "onnxruntime_genai", "onnxruntime-genai"

    def open(self, library: ModuleType, folder: Path) -> None:
        """As every program."""
        config = library.Config(str(folder))
        options = {"session_options": {"intra_op_num_threads": self.threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.library, self.model = library, library.Model(config)

    def continued(self, ids: Sequence[int], count: int) -> Continued:
        """As every program."""
        settings = self.library.GeneratorParams(self.model)
        settings.set_search_options(max_length=len(ids) + count + 1, min_length=len(ids) + count, do_sample=False)
        generator, tokens = self.library.Generator(self.model, settings), []
        stamps = [time.perf_counter()]
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            stamps.append(time.perf_counter())
            tokens.append(int(generator.get_next_tokens()[0]))
        return Continued(tokens, *timed(stamps))
