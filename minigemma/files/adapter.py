"""LoRA adapters as Hugging Face's peft writes them, over a model in any layout; formulas/lora.py has the formula.

    adapter_config.json          r, lora_alpha, use_rslora, target_modules, …
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [r, D] and .lora_B.weight [R, r]

<module> is the module's name in transformers. An embedding's are lora_embedding_A [r, V] and lora_embedding_B [D, r];
`modules_to_save` stand there whole. A field of the config is used, has no effect on a trained adapter, or is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import F32, LargePages
from ..config import TextConfig
from ..errors import ModelFormatError
from ..layouts import Adapted
from ..models.decoder import Decoder
from ..models.registry import all_names
from ..models.weights import named_weights
from .convert import Stored, converted_weight, unfolded, widened
from .open import HEAD, PREFIXES, SEES, WRAPPERS
from .safetensors_file import open_safetensors, read_json, short, write_safetensors
from .save import replacing_files

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PART = re.compile(r"(?P<module>.+)\.lora_(embedding_(?P<turned>[AB])|(?P<plain>[AB])\.weight)")
USED = ["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias"]
USED += ["exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights"]
# Of training alone, or about how an adapter came to be:
WITHOUT_EFFECT = ["auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "inference_mode"]
WITHOUT_EFFECT += ["lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"]
WITHOUT_EFFECT += ["lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"]
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base model's weights, too


class Pair(NamedTuple):
    """What is added to a matrix [R, D]: s B A."""

    a: F32  # [r, D]
    b: F32  # [R, r]
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter by our names of the weights."""

    path: Path
    pairs: Mapping[str, Pair]
    whole: Mapping[str, Stored]  # of modules_to_save

    @property
    def names(self) -> set[str]:
        """The weights that it changes."""
        return {*self.pairs, *self.whole}


# ---- reading


class _Refused(Exception):
    """(problem, remedy) of an adapter, on the way to where its path is known."""


def read_adapter(folder: str | Path, config: TextConfig) -> Adapter:
    """The adapter in `folder` for a model of this config; ModelFormatError for one that cannot be applied to it whole.

    Tensors of a vision tower are left out where the model has none.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == TENSORS else folder
    if not (folder / CONFIG).exists():
        problem = f"holds no {CONFIG}" if folder.exists() else "does not exist"
        problem = "is an adapter of mlx-lm" if (folder / "adapters.safetensors").exists() else problem
        raise ModelFormatError(folder, problem, "name a folder that peft wrote")
    if not (folder / TENSORS).exists() and (folder / "adapter_model.bin").exists():
        problem = "holds its tensors as a Python pickle, which can run code when it is opened"
        raise ModelFormatError(folder, problem, f"save it again with peft: it then writes {TENSORS}")
    told, tensors = read_json(folder / CONFIG), open_safetensors(folder / TENSORS)
    try:
        _check_settings(told)
        stored = {name: Stored(name, t.dtype, t.array.shape, t.array) for name, t in tensors.items()}
        return Adapter(folder, *_parts(told, stored, config))
    except _Refused as refused:
        raise ModelFormatError(folder, *refused.args) from None
    except re.error as error:
        raise ModelFormatError(folder / CONFIG, f"has a pattern that is no regular expression ({error})") from None


def _check_settings(told: dict[str, Any]) -> None:
    """Refuse what would be passed over."""
    kind = told.get("peft_type")
    if kind != "LORA":
        raise _Refused(f"is of type {short(kind)}", "LoRA adapters alone are read")
    wanted: dict[str, Any] = {"bias": "none"} | dict.fromkeys(told.keys() - {*USED, *WITHOUT_EFFECT})
    for name, usual in wanted.items():
        if told.get(name, usual) not in (usual, False, 0, [], {}):
            remedy = "merge it into its model with peft, and load that"
            raise _Refused(f"sets {short(name)} to {short(told[name])}, which is not applied here", remedy)
    start = told.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        problem = f"began as {short(start)}, which changes the weights of its model, too"
        raise _Refused(problem, "save it as plain LoRA (peft: path_initial_model_for_weight_conversion)")
    numbers = {"r": told.get("r"), "lora_alpha": told.get("lora_alpha")}
    for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if not isinstance(told.get(patterns) or {}, dict):
            raise _Refused(f"has {patterns} that are no object of names and numbers", "write it with peft again")
        numbers |= {f"{name} of {key}": value for key, value in (told.get(patterns) or {}).items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise _Refused(f"has {short(value)} for {name}; it is a number above 0", "write it with peft again")


def _parts(
    told: dict[str, Any], stored: dict[str, Stored], config: TextConfig
) -> tuple[dict[str, Pair], dict[str, Stored]]:
    """Pairs and whole tensors by our names, all checked against the config."""
    known = {theirs.removesuffix(".weight"): (ours, shape) for ours, theirs, shape in all_names(config, 0)}
    known["lm_head"] = "head", (config.vocab, config.width)
    halves: dict[str, dict[str, Stored]] = {}  # of each module: A and B
    whole: dict[str, Stored] = {}
    for name, tensor in stored.items():
        found = PART.fullmatch(name)
        module = WRAPPERS.sub("", found["module"] if found else name.removesuffix(".weight"))
        module = module.removesuffix(".base_layer")  # the embedding itself, which peft writes with an adapter of it
        if not config.vision and SEES.match(f"{module}."):
            continue
        ours, shape = known.get(_plain(module), ("", ()))
        turned = bool(found and found["turned"])
        if not ours or (not found and "lora_" in name) or (found and (turned != (ours == "embedding"))):
            raise _Refused(f"has {short(name)}, which is no part of this model", "take the model that it was made for")
        if found:
            halves.setdefault(module, {})[found["turned"] or found["plain"]] = tensor
        else:
            whole[ours] = _checked(tensor, shape)
    _check_targets(told, halves, [*known])
    modules = [f".{WRAPPERS.sub('', tensor.name.removesuffix('.weight'))}" for tensor in whole.values()]
    for name in told.get("modules_to_save") or []:
        if not any(f".{name}" in module for module in modules):
            raise _Refused(f"names {short(name)} in modules_to_save and holds no such tensor", "fetch it again")
    apart = {"embedding", "head"} & {known[_plain(module)][0] for module in halves} | {"embedding", "head"} & {*whole}
    if told.get("ensure_weight_tying") and apart:
        raise _Refused("ties adapters of embedding and head", "merge it into its model with peft, and load that")
    return {known[_plain(module)][0]: _pair(told, module, parts, known) for module, parts in halves.items()}, whole


def _checked(tensor: Stored, shape: tuple[int, ...]) -> Stored:
    """The tensor; refused where it has another shape or type, or numbers that are none."""
    if tensor.kind not in ("F32", "BF16", "F16") or tensor.shape != shape:
        problem = f"has {short(tensor.name)} as {tensor.kind} {list(tensor.shape)}, not as a float {list(shape)}"
        raise _Refused(problem, "take the model that it was made for")
    if not np.isfinite(widened(tensor.kind, tensor.array)).all():
        raise _Refused(f"has values in {short(tensor.name)} that are NaN or infinite", "take another checkpoint of it")
    return tensor


def _pair(told: dict[str, Any], module: str, parts: dict[str, Stored], known: dict[str, Any]) -> Pair:
    """A, B and the scale of one module."""
    if len(parts) < 2:
        (part, tensor), *_ = parts.items()
        raise _Refused(f"has {short(tensor.name)} without its {'BA'['AB'.index(part)]}", "fetch it again")
    ours, (R, D) = known[_plain(module)]
    named = r"(.*\.)?(%s)$"  # a key is the module's name, its end, or a regular expression of it
    rank, alpha = (
        next((value for key, value in (told.get(patterns) or {}).items() if re.match(named % key, module)), told[usual])
        for patterns, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    scale = alpha / (rank**0.5 if told.get("use_rslora") else rank)
    if ours == "embedding":  # whose rows are the columns of A
        return Pair(_numbers(parts["B"], (D, rank)).T.copy(), _numbers(parts["A"], (rank, R)).T.copy(), scale)
    return Pair(_numbers(parts["A"], (rank, D)), _numbers(parts["B"], (R, rank)), scale)


def _numbers(tensor: Stored, shape: tuple[int, ...]) -> F32:
    return np.array(widened(tensor.kind, _checked(tensor, shape).array), np.float32)


def _check_targets(told: dict[str, Any], halves: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse tensors of modules that the config does not name, and named modules of the text model without tensors."""
    targets = told.get("target_modules")
    if not halves and targets:
        raise _Refused("holds no tensors of an adapter", "fetch it again")
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    if strange := [module for module in halves if not _is_target(told, module)]:
        problem = f"has tensors of {strange[0]}, which target_modules or layers_to_transform leave out"
        raise _Refused(problem, "fetch both of its files again")
    prefix = next((m.removesuffix(_plain(m)) for m in halves if _plain(m).startswith("layers.")), "model.")
    wanted = [prefix + name for name in known if name.startswith("layers.") and "norm" not in name]
    if missing := [module for module in wanted if _is_target(told, module) and module not in halves]:
        problem = f"has no tensors of {missing[0]}, which target_modules names"
        raise _Refused(problem, "take the model that it was made for, or fetch the adapter again")


def _is_target(told: dict[str, Any], module: str) -> bool:
    """Do target_modules, exclude_modules, layers_to_transform and layers_pattern mean this module?"""
    for names, wanted in ((told.get("exclude_modules") or [], False), (told["target_modules"], True)):
        if isinstance(names, str):
            named = re.fullmatch(names, module) is not None
        else:
            named = any(f".{module}".endswith(f".{name}") for name in names)
        if named != wanted:
            return False
    layers = told.get("layers_to_transform")
    if isinstance(told["target_modules"], str) or layers is None or layers == []:
        return True
    patterns = told.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if at := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(at[1]) in (layers if isinstance(layers, list) else [layers])
    return False


def _plain(module: str) -> str:
    """A module's name without the prefixes that models of different times have."""
    if HEAD.fullmatch(f"{module}.weight"):
        return "lm_head"
    if SEES.match(f"{module}."):
        return SEES.sub(r"\g<name>", f"{module}.").removesuffix(".")
    return module.removeprefix(next(prefix for prefix in PREFIXES if module.startswith(prefix)))


# ---- applying


def adapted(model: Decoder, adapters: Sequence[Adapter]) -> Decoder:
    """The model with these adapters beside its weights; their changes add up. ValueError where two cannot."""
    if not adapters:
        return model
    _check_together(adapters)
    names = set().union(*(adapter.names for adapter in adapters))
    if names & {"embedding", "head"} and model.weights.head is None:  # one of the two changes alone
        model = model.with_weights({})
        model.weights = replace(model.weights, head=model.weights.embedding)
    whole = {
        ours: converted_weight(ours, tensor, None, 0.0, LargePages())
        for adapter in adapters
        for ours, tensor in adapter.whole.items()
    }
    weights = dict(named_weights(model.weights)) | whole
    pairs = {name: _added([adapter.pairs[name] for adapter in adapters if name in adapter.pairs]) for name in names}
    return model.with_weights(whole | {n: Adapted.of(weights[n], *pair) for n, pair in pairs.items() if pair})


def _added(pairs: Sequence[Pair]) -> Pair | None:
    """Several pairs as one, of all their ranks together."""
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    b = np.concatenate([pair.b * np.float32(pair.scale) for pair in pairs], axis=1)
    return Pair(np.concatenate([pair.a for pair in pairs]), b, 1.0)


def _check_together(adapters: Sequence[Adapter]) -> None:
    for i, adapter in enumerate(adapters):
        for other in adapters[:i]:
            if both := {*adapter.whole} & other.names | {*other.whole} & adapter.names:
                problem = f"changes {min(both)}, which {other.path} changes, too, and one of them holds it whole"
                raise ModelFormatError(adapter.path, problem, "give one of the two")


class Merged(Mapping[str, F32]):
    """Parameters with adapters merged into them, W + s B A, each made when it is asked for."""

    def __init__(self, parameters: Mapping[str, F32], adapters: Sequence[Adapter]) -> None:
        _check_together(adapters)
        self.parameters, self.adapters = parameters, adapters
        apart = {"embedding", "head"} & set().union(*(adapter.names for adapter in adapters))
        self.names = [*parameters, *(["head"] if apart and "head" not in parameters else [])]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, ours: str) -> F32:
        values = self.parameters["embedding" if ours == "head" and ours not in self.parameters else ours]
        for adapter in self.adapters:
            if ours in adapter.whole:
                tensor = adapter.whole[ours]
                values = unfolded(ours, np.array(widened(tensor.kind, tensor.array), np.float32))
            if ours in adapter.pairs:
                a, b, scale = adapter.pairs[ours]
                values = values + np.float32(scale) * (b @ a)
        return values


# ---- writing


def save_adapter(folder: Path, config: TextConfig, pairs: Mapping[str, Pair], told: Mapping[str, Any]) -> None:
    """Write pairs, by our names, as peft reads them; `told` is r, lora_alpha and what else its config states."""
    modules = {ours: f"model.{theirs.removesuffix('.weight')}" for ours, theirs, _ in all_names(config, 0)}
    tensors: dict[str, F32] = {}
    for ours, pair in pairs.items():
        for half, array in (("A", pair.a), ("B", pair.b)):
            tensors[f"base_model.model.{modules[ours]}.lora_{half}.weight"] = array
    names = sorted({modules[ours].rpartition(".")[2] for ours in pairs})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True, **told}
    with replacing_files(folder) as new:
        entries = [(name, "F32", array.shape) for name, array in tensors.items()]
        write_safetensors(new(TENSORS), entries, ([array] for array in tensors.values()))
        new(CONFIG).write_text(json.dumps(fields | {"target_modules": names}, indent=2) + "\n", "utf-8")
