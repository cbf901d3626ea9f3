"""OpenVINO on transformers' graph, with its weights rounded to int8."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from minigemma.arrays import F32
from minigemma.cli.measure import Program, parameters
from minigemma.models.decoder import Decoder
from minigemma.models.recurrentgemma import RecurrentGemmaConfig

from .torch_programs import causal_lm
from .weights import torch_for


class OpenVINO(Program):
    """OpenVINO on the CPU (PyPI openvino), with transformers' graph and int8 weights, all else as it chooses itself.

    The graph has the form that optimum-intel writes for this runtime, so that its fused attention is found: keys and
    values are states inside, each gathered by `beam` before it grows. Making it takes half a minute at 270M.
    """

    name = "openvino"

    def __init__(self, model: Decoder) -> None:
        missing = [name for name in ("openvino", "torch", "transformers") if find_spec(name) is None]
        if missing:
            raise ImportError(f"pip install {' '.join(missing)}")
        if isinstance(model.config, RecurrentGemmaConfig):
            raise ImportError("it is given keys and values as its only state, and RecurrentGemma has another")
        graph = stateful_graph(model)
        settings = {"INFERENCE_NUM_THREADS": model.threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = importlib.import_module("openvino").Core().compile_model(graph, "CPU", settings)
        self.request, self.read_bytes = compiled.create_infer_request(), parameters(model)
        self.check(model)

    def check(self, model: Decoder) -> None:
        """Raise ValueError unless its likeliest token is among our likeliest five, after a prompt and five times on.

        On the demo's prose the two correlate at 0.999; prompts of tokens that never meet bring it down to 0.99.
        """
        ids, cache = [2, *(token % model.config.vocab for token in range(1000, 1005))], model.new_cache(11)
        self.request.reset_state()
        for _ in range(6):
            ours = model.forward(ids, cache, last_only=True)[0]
            self.forward(ids)
            if self.logits.argmax() not in np.argsort(ours)[-5:]:
                raise ValueError(f"openvino's graph of {model.name} is wrong: its likeliest token is none of ours")
            ids = [int(ours.argmax())]

    def forward(self, ids: Sequence[int]) -> None:
        """Go on by `ids`; `logits` [V] are then those after the last."""
        inputs = {"ids": np.array([ids], np.int64), "beam": np.zeros(1, np.int32)}
        self.request.infer(inputs, share_inputs=True)
        self.logits: F32 = self.request.get_output_tensor(0).data[0, -1]

    def prefill(self, ids: Sequence[int]) -> float:
        """As every program."""
        self.request.reset_state()
        began = time.perf_counter()
        self.forward(ids)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every program."""
        began = time.perf_counter()
        for _ in range(count):
            self.forward([int(self.logits.argmax())])
        return (time.perf_counter() - began) / count


def stateful_graph(model: Decoder) -> Any:
    """`model` as OpenVINO's: inputs ids [1, T] and beam [1], output the last token's logits, keys and values inside.

    The frontend is called as openvino.convert_model would, but without the telemetry of that function.
    """
    ov, torch = importlib.import_module("openvino"), torch_for(model)
    frontend = importlib.import_module("openvino.frontend").FrontEndManager().load_by_framework("pytorch")
    tracing = importlib.import_module("openvino.frontend.pytorch.ts_decoder").TorchScriptPythonDecoder
    c, ops = model.config, ov.opset15
    module = _traceable(torch, causal_lm(torch, importlib.import_module("transformers"), model).float())
    empty = [torch.zeros(1, c.kv_heads, 3, c.head_dim) for _ in range(2 * c.layers)]
    example = (torch.ones(1, 2, dtype=torch.int64), *empty)
    with warnings.catch_warnings():  # branches on sizes that hold for every length
        warnings.simplefilter("ignore")
        traced = tracing(module, example_input=example)  # must live as long as the next line works
        graph = frontend.convert(frontend.load(traced))
    for node in graph.get_ops():
        if node.get_type_name() in ("MatMul", "Gather"):
            _round_weights(ops, node)
    ids, *before = graph.inputs
    for port, dtype, shape, name in [
        (ids, ov.Type.i64, [1, -1], "ids"),
        *((past, ov.Type.f32, [-1, c.kv_heads, -1, c.head_dim], f"past.{i}") for i, past in enumerate(before)),
    ]:
        port.get_tensor().set_names({name})
        port.get_node().set_element_type(dtype)
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for i, after in enumerate(graph.outputs[1:]):
        after.get_tensor().set_names({f"present.{i}"})
    _make_stateful(ov, graph, before)
    return graph


def _round_weights(ops: ModuleType, node: Any) -> None:
    """A float32 matrix that `node` takes as int8 instead, w = q · s with the s of each row, as NNCF would write it."""
    for source in [node.input_value(i).get_node() for i in (0, 1)]:
        if source.get_type_name() == "Constant" and len(source.shape) == 2 and source.get_data().dtype == np.float32:
            weight = source.get_data()
            scale = np.maximum(np.abs(weight).max(1, keepdims=True), np.float32(1e-30)) / np.float32(127)
            rounded = ops.convert(ops.constant(np.rint(weight / scale).astype(np.int8)), "f32")
            source.output(0).replace(ops.multiply(rounded, ops.constant(scale)).output(0))


def _make_stateful(ov: ModuleType, graph: Any, before: Sequence[Any]) -> None:
    """The inputs past.i and outputs present.i as states, gathered by a new input beam, empty at first."""
    ops = ov.opset15
    beam = ops.parameter(ov.PartialShape([-1]), ov.Type.i32, name="beam")
    beam.output(0).get_tensor().set_names({"beam"})
    graph.add_parameters([beam])
    for past in before:
        users = past.get_target_inputs()
        chosen = ops.gather(past, beam, ops.constant(0))
        for user in users:
            user.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    transformations = importlib.import_module("openvino._offline_transformations")
    pairs = {f"past.{i}": f"present.{i}" for i in range(len(before))}
    transformations.apply_make_stateful_transformation(graph, pairs)
    batch = ops.gather(ops.shape_of(graph.input("ids")), ops.constant([0]), ops.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            heads, _, head_dim = list(node.get_output_partial_shape(0))[1:]
            sizes = ops.constant([heads.get_length(), 0, head_dim.get_length()])
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, sizes], 0))])
    graph.validate_nodes_and_infer_types()


def _traceable(torch: ModuleType, causal_lm: Any) -> Any:
    """A torch module (ids [1, T], keys and values [1, K, S, H] of each layer) → (logits, the same grown by T).

    Masks and cache are given to transformers ready made: what it makes them with cannot be traced.
    """

    class Growing:
        def __init__(self, flat: Sequence[Any]) -> None:
            self.pairs = [flat[i : i + 2] for i in range(0, len(flat), 2)]

        def update(self, key: Any, value: Any, layer: int, *_: Any) -> Any:
            before = self.pairs[layer]
            self.pairs[layer] = (torch.cat([before[0], key], 2), torch.cat([before[1], value], 2))
            return self.pairs[layer]

    class Traceable(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = causal_lm

        def forward(self, ids: Any, *past: Any) -> tuple[Any, ...]:
            c, before, cache = causal_lm.config, past[0].shape[2], Growing(past)
            at = before + torch.arange(ids.shape[1])
            distance = at[:, None] - torch.arange(before + ids.shape[1])
            hidden = torch.finfo(torch.float32).min
            masks = torch.where(distance >= 0, 0.0, hidden)[None, None]
            if hasattr(c, "layer_types"):
                near = torch.where((distance >= 0) & (distance < c.sliding_window), 0.0, hidden)[None, None]
                masks = {"full_attention": masks, "sliding_attention": near}
            settings = {"past_key_values": cache, "position_ids": at[None], "use_cache": True, "logits_to_keep": 1}
            out = self.model(ids, attention_mask=masks, **settings)
            return (out.logits, *(tensor for pair in cache.pairs for tensor in pair))

    return Traceable().eval()
