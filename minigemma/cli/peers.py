"""Other people's programs with a model's own weights, for `minigemma bench --against`.

Each peer takes the same ids and answers two questions: how long does a prompt take, and how long each token after it.
Those on torch hold the weights in bf16, as they were released; llama.cpp has its own file, and OpenVINO rounds them to
int8. None of them is needed by minigemma; what is not installed is said so.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..arrays import F32, round_bf16
from ..config import TextConfig
from ..layouts.weight import widen
from ..models.decoder import Decoder
from ..models.gemma2 import Gemma2Config
from ..models.gemma3 import Gemma3Config
from ..models.recurrentgemma import RecurrentGemmaConfig
from ..models.registry import FAMILIES, layer_tensors
from ..models.vision import VISION, VISION_LAYER


class Peer(ABC):
    """One other program: `prefill` reads a prompt, `decode` goes on from there; both return seconds."""

    name: str
    read_bytes: int  # of weights, which each token reads

    @abstractmethod
    def __init__(self, model: Decoder) -> None:
        """Take over the weights of `model`; ImportError where the program is not installed."""

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds until the logits after the last of `ids` are there; forgets what was before."""

    @abstractmethod
    def decode(self, count: int) -> float:
        """Seconds that each of `count` more tokens takes, each the likeliest."""

    def look(self, pixels: F32) -> float | None:
        """Seconds of the vision tower over an image [3, side, side]; None where it is not measured."""
        return None


def named_weights(model: Decoder) -> Iterator[tuple[str, Any]]:
    """(name in a Hugging Face file, weight as it is held here) of every weight but softplus(Λ), which is undone."""
    config = model.config
    tables = [("", "model.", model.weights, FAMILIES[config.family].tensors)]
    for i, block in enumerate(model.weights.blocks):
        tables.append((f"blocks.{i}", f"model.layers.{i}.", block, layer_tensors(config, i)))
    for _, prefix, owner, table in tables:
        for ours, (theirs, *_) in table.items():
            value: Any = owner
            for part in ours.split("."):
                value = getattr(value, part)
            if ours == "recurrent.decay":
                value = np.log(np.expm1(value))
            if ours == "recurrent.conv":
                value = np.ascontiguousarray(value.T)[:, None]
            yield prefix + theirs, value


def parameters(model: Decoder) -> int:
    """Numbers in the weights that a token meets: all but the vision tower's."""
    return model.config.embedding_parameters + model.config.non_embedding_parameters


def weight_bytes(weights: Any) -> int:
    """Bytes of all arrays in the tree of dataclasses and tuples that a model's weights are."""
    if is_dataclass(weights):
        return sum(weight_bytes(getattr(weights, field.name)) for field in fields(weights))
    return sum(map(weight_bytes, weights)) if isinstance(weights, tuple) else getattr(weights, "nbytes", 0)


def _bf16(torch: ModuleType, weight: np.ndarray) -> Any:
    """A weight of any format as a bf16 tensor; where it is bf16 already, the same memory."""
    words = weight
    if weight.dtype != np.uint16:
        matrix = weight.dtype.itemsize == 1
        words = round_bf16(widen(weight) if matrix else weight)
    return torch.from_numpy(np.array(words, copy=not words.flags.writeable).view(np.int16)).view(torch.bfloat16)


def _torch(model: Decoder) -> ModuleType:
    torch = importlib.import_module("torch")
    torch.set_num_threads(model.threads)
    torch.set_grad_enabled(False)
    return torch


class Transformers(Peer):
    """The transformers library on torch, in bf16, with its own key/value cache."""

    name = "transformers"

    def __init__(self, model: Decoder) -> None:
        self.torch = torch = _torch(model)
        transformers = importlib.import_module("transformers")
        self.model, self.read_bytes = _causal_lm(torch, transformers, model), 2 * parameters(model)
        self.tower = _siglip(torch, transformers, model)

    def look(self, pixels: F32) -> float | None:
        """As every peer."""
        if self.tower is None:
            return None
        began = time.perf_counter()
        image = self.torch.from_numpy(pixels[None]).to(self.torch.bfloat16)
        self.seen = self.tower(image).last_hidden_state
        return time.perf_counter() - began

    def prefill(self, ids: Sequence[int]) -> float:
        """As every peer."""
        began = time.perf_counter()
        self.state = self.model(self.torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
        self.position = len(ids)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every peer."""
        began = time.perf_counter()
        for _ in range(count):
            token, cache = self.state.logits[:, -1:].argmax(-1), self.state.get("past_key_values")
            at = self.torch.tensor([[self.position]])
            self.state = self.model(token, past_key_values=cache, use_cache=True, position_ids=at)
            self.position += 1
        return (time.perf_counter() - began) / count


def _causal_lm(torch: ModuleType, transformers: ModuleType, model: Decoder) -> Any:
    """The language model of `model` as transformers', its weights in bf16."""
    transformers.logging.set_verbosity_error()
    kind, settings = _transformers_config(model.config)
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**settings)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with importlib.import_module("transformers.initialization").no_init_weights():
            made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    state = {name: _bf16(torch, weight) for name, weight in named_weights(model)}
    made.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    return made


def _siglip(torch: ModuleType, transformers: ModuleType, model: Decoder) -> Any:
    """The vision tower of `model` as transformers', None if it has none."""
    v, w = model.vision, model.weights.vision
    if v is None or w is None:
        return None
    sizes = {"hidden_size": v.width, "intermediate_size": v.ffn_width, "num_hidden_layers": v.layers}
    sizes |= {"num_attention_heads": v.heads, "image_size": v.side, "patch_size": v.patch}
    config = transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
    tower = transformers.SiglipVisionModel._from_config(config, attn_implementation="sdpa").to(torch.bfloat16).eval()
    state = {}
    for ours, (name, *_) in VISION.items():
        if name.startswith("vision_tower."):
            state[name.removeprefix("vision_tower.")] = _bf16(torch, getattr(w, ours))
    for i, block in enumerate(w.blocks):
        for ours, (name, *_) in VISION_LAYER.items():
            state[f"encoder.layers.{i}.{name}"] = _bf16(torch, getattr(block, ours))
    patch = state["embeddings.patch_embedding.weight"]
    state["embeddings.patch_embedding.weight"] = patch.reshape(v.width, 3, v.patch, v.patch)
    tower.load_state_dict(state)
    return tower


def _transformers_config(c: TextConfig) -> tuple[str, dict[str, Any]]:
    """The name of its classes, and the settings of a config that says what ours does."""
    settings: dict[str, Any] = {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "query_pre_attn_scalar": int(c.query_pre_attn_scalar or c.head_dim),  # transformers takes no float
    }
    if isinstance(c, RecurrentGemmaConfig):
        sizes = {"intermediate_size": 2 * c.ffn_width, "lru_width": c.lru_width, "attention_window_size": c.window}
        return "RecurrentGemma", settings | sizes
    if isinstance(c, Gemma2Config):
        return "Gemma2", settings | {"sliding_window": c.window}
    if isinstance(c, Gemma3Config):
        wide = {"rope_type": "linear", "rope_theta": c.rope_base, "factor": c.rope_scale}
        ropes = {"full_attention": wide, "sliding_attention": {"rope_type": "default", "rope_theta": c.rope_base_local}}
        layers = {"sliding_window": c.window, "sliding_window_pattern": c.pattern}
        return "Gemma3", settings | layers | {"rope_parameters": ropes}
    return "Gemma", settings


class DeepMind(Peer):
    """DeepMind's own RecurrentGemma for torch (PyPI recurrentgemma), in bf16."""

    name = "deepmind"

    def __init__(self, model: Decoder) -> None:
        c = model.config
        if not isinstance(c, RecurrentGemmaConfig):
            raise ImportError("DeepMind's recurrentgemma runs RecurrentGemma only")
        self.torch = torch = _torch(model)
        common, griffin = deepmind_modules()
        kind = common.TemporalBlockType
        config = common.GriffinConfig(
            vocab_size=c.vocab,
            width=c.width,
            mlp_expanded_width=c.ffn_width,
            num_heads=c.heads,
            lru_width=c.lru_width,
            block_types=tuple(kind.ATTENTION if c.is_attention(i) else kind.RECURRENT for i in range(c.layers)),
            embeddings_scale_by_sqrt_dim=True,
            attention_window_size=c.window,
            logits_soft_cap=c.logit_cap,
        )
        with torch.device("meta"):
            self.model = griffin.Griffin(config, gradient_checkpointing=False, dtype=torch.bfloat16).eval()
        state = deepmind_names(torch, {name: _bf16(torch, weight) for name, weight in named_weights(model)}, c.layers)
        self.model.load_state_dict(state, assign=True)
        self.read_bytes = 2 * parameters(model)

    def prefill(self, ids: Sequence[int]) -> float:
        """As every peer."""
        began = time.perf_counter()
        self.logits, self.state = self.model(
            self.torch.tensor([list(ids)]), self.torch.arange(len(ids))[None], return_logits=True
        )
        self.position = len(ids)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every peer."""
        began = time.perf_counter()
        for _ in range(count):
            token = self.logits[:, -1:].argmax(-1)
            position = self.torch.tensor([[self.position]])
            self.logits, self.state = self.model(token, position, self.state)
            self.position += 1
        return (time.perf_counter() - began) / count


def deepmind_modules() -> tuple[ModuleType, ModuleType]:
    """The modules common and torch.griffin of DeepMind's package; ImportError where it is not installed.

    Its own __init__ files import jax, and a sampler that 1.0.1 left out; in their place stand two empty packages.
    """
    missing = [name for name in ("recurrentgemma", "einops", "jaxtyping", "torch") if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)}: pip install --no-deps recurrentgemma==1.0.1 einops jaxtyping")
    spec = find_spec("recurrentgemma")
    at = Path(spec.submodule_search_locations[0])  # type: ignore[union-attr,index]
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "recurrentgemma"}
    for name, folder in (("recurrentgemma", at), ("recurrentgemma.torch", at / "torch")):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(folder)]
    try:
        names = ("recurrentgemma.common", "recurrentgemma.torch.griffin")
        return tuple(importlib.import_module(name) for name in names)  # type: ignore[return-value]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "recurrentgemma"]:
            del sys.modules[name]
        sys.modules.update(before)


def deepmind_names(torch: ModuleType, tensors: dict[str, Any], layers: int) -> dict[str, Any]:
    """The tensors of a Hugging Face RecurrentGemma by DeepMind's names and in its shapes (SPEC: its layers.py)."""
    out = {"embedder.input_embedding": tensors["model.embed_tokens.weight"]}
    out["final_norm.scale"] = tensors["model.final_norm.weight"]
    for i in range(layers):
        prefix = f"model.layers.{i}."
        t = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        block = {f"{norm}.scale": t[f"{norm}.weight"] for norm in ("temporal_pre_norm", "channel_pre_norm")}
        pair = ("gate", "up")
        block["mlp_block.ffw_up.w"] = torch.stack([t[f"mlp_block.{part}_proj.weight"].T for part in pair])
        block["mlp_block.ffw_up.b"] = torch.stack([t[f"mlp_block.{part}_proj.bias"] for part in pair])[:, None, None]
        block |= {f"mlp_block.ffw_down.{end}": t[f"mlp_block.down_proj.{end}"] for end in ("weight", "bias")}
        temporal = "temporal_block."
        if f"{temporal}q_proj.weight" in t:
            renamed = {f"proj_{part}.weight": f"{part}_proj.weight" for part in "qkv"}
            renamed |= {f"proj_final.{end}": f"o_proj.{end}" for end in ("weight", "bias")}
            block |= {f"attention_block.{ours}": t[temporal + theirs] for ours, theirs in renamed.items()}
        else:
            renamed = {
                f"linear_{part}.{e}": f"linear_{part}.{e}" for part in ("x", "y", "out") for e in ("weight", "bias")
            }
            for ours, theirs in (("a_gate", "recurrent_gate"), ("input_gate", "input_gate")):
                renamed |= {f"rg_lru.{ours}.{end[0]}": f"rg_lru.{theirs}_{end}" for end in ("weight", "bias")}
            renamed |= {"rg_lru.a_param": "rg_lru.recurrent_param", "conv_1d.b": "conv_1d.bias"}
            block |= {f"recurrent_block.{ours}": t[temporal + theirs] for ours, theirs in renamed.items()}
            block["recurrent_block.conv_1d.w"] = t[f"{temporal}conv_1d.weight"][:, 0].T
        out |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return out


class LlamaCpp(Peer):
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
        """As every peer."""
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(list(ids))
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every peer; which token it is takes no time to tell."""
        began = time.perf_counter()
        for _ in range(count):
            self.model.eval([5])
        return (time.perf_counter() - began) / count


class OpenVINO(Peer):
    """OpenVINO on the CPU (PyPI openvino), with transformers' graph and int8 weights, all else as it chooses itself.

    The graph has the form that optimum-intel writes for this runtime, so that its fused attention is found: keys and
    values are states inside, each gathered by `beam` before it grows. It is made anew each time: half a minute at 270M.
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
        """As every peer."""
        self.request.reset_state()
        began = time.perf_counter()
        self.forward(ids)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every peer."""
        began = time.perf_counter()
        for _ in range(count):
            self.forward([int(self.logits.argmax())])
        return (time.perf_counter() - began) / count


def stateful_graph(model: Decoder) -> Any:
    """`model` as OpenVINO's: inputs ids [1, T] and beam [1], output the last token's logits, keys and values inside.

    The frontend is called as openvino.convert_model would, but without the telemetry of that function.
    """
    ov, torch = importlib.import_module("openvino"), _torch(model)
    frontend = importlib.import_module("openvino.frontend").FrontEndManager().load_by_framework("pytorch")
    tracing = importlib.import_module("openvino.frontend.pytorch.ts_decoder").TorchScriptPythonDecoder
    c, ops = model.config, ov.opset15
    module = _traceable(torch, _causal_lm(torch, importlib.import_module("transformers"), model).float())
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


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Transformers, LlamaCpp, DeepMind, OpenVINO)}
