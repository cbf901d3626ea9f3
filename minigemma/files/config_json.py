"""Reads config.json: finds the family, lets its page read the fields, and refuses fields that nothing reads.

Released files omit their class's defaults, nest the text model in `text_config` where there is a vision tower, and
spell rope and the layer pattern in an older and a newer way; the pages in models/ know both spellings.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..config import TextConfig, VisionConfig
from ..errors import ModelFormatError
from ..models.fields import Fields, Json
from ..models.registry import FAMILIES, Family, named
from ..models.vision import pictures_as_here
from .foreign import what_it_holds
from .known_keys import JSON, JSON_VALUES, changes_results
from .safetensors_file import read_json, short

MAX_PROBLEM = 300  # characters of an error, which may quote what a file says
UNKNOWN = ", which minigemma does not know and which may change the results"
RELEASED_ONE = "take the config.json that was released with these weights"
RELEASED_TOO = "take the one that was released with these weights"


def config_from_json(path: Path) -> tuple[TextConfig, Json]:
    """Returns the config and all fields; the text model's fields replace outer ones of the same name.

    Raises ModelFormatError for a model of another kind, for missing and impossible fields, and for a field that is
    neither used nor known to be harmless (known_keys.py).
    """
    _no_adapter(path.parent)
    if not os.path.lexists(path) and path.parent.is_dir():
        raise ModelFormatError(path.parent, *what_it_holds(path.parent, "config.json"))
    whole = read_json(path)
    _no_quantization(path, whole)
    family = _family(path, whole)
    others = {name: read_json(path.parent / name, (dict, list)) for name in family.json_files}
    fields = Fields(whole | others, family.json_defaults)
    try:
        config = named(family.from_json(fields))
    except KeyError as error:
        raise ModelFormatError(path, f"has no {error.args[0]}", "fetch the file again") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelFormatError(path, str(error)[:MAX_PROBLEM], RELEASED_ONE) from None
    text = whole.get("text_config") or {}
    for name, value in fields.left_over().items():
        field = name.rpartition(".")[2]
        repeated = name in text and text[name] == value  # at the top and, equal, in the text model's part
        if changes_results(field, value, JSON, JSON_VALUES) and not repeated:
            remedy = "remove the field if the model was trained without it"
            raise ModelFormatError(path, f"{short(name)} is {short(value)}{UNKNOWN}", remedy)
    return config, {"tie_word_embeddings": True} | whole | text


def check_pictures(folder: Path, vision: VisionConfig) -> None:
    """Raises ModelFormatError if the folder's image settings differ from those of files/images.py."""
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        stated = read_json(path) if path.exists() else {}
        try:
            fields = Fields(stated)
            pictures_as_here(fields, vision)
            pictures_as_here(fields.inner("image_processor"), vision)  # where transformers 5 writes it
        except (ValueError, TypeError) as error:
            raise ModelFormatError(path, str(error)[:MAX_PROBLEM], RELEASED_TOO) from None


def _family(path: Path, whole: Json) -> Family:
    """The family of a model_type; of several, the one whose flags are set and whose first JSON file exists."""
    kind = whole.get("model_type")
    found = [family for family in FAMILIES.values() if kind in family.model_types]
    found = [family for family in found if all(whole.get(name) == value for name, value in family.flags.items())]
    found = [family for family in found if all(os.path.exists(path.parent / name) for name in family.json_files[:1])]
    if found:
        return max(found, key=lambda family: len(family.flags))
    raise ModelFormatError(path, f"model_type is {short(kind)}", f"{runs()}: take one of their checkpoints")


def runs() -> str:
    """The sentence that names what can be loaded."""
    *others, last = (family.model_types[-1] for family in FAMILIES.values() if not family.flags)
    return f"minigemma runs {', '.join(others)} and {last}"


def _no_adapter(folder: Path) -> None:
    """Raises ModelFormatError for a folder that holds only a LoRA adapter."""
    described = folder / "adapter_config.json"
    if os.path.exists(described) and not any(folder.glob("model*.safetensors")):
        base = read_json(described).get("base_model_name_or_path")
        into = f"its base model {short(base)}" if base else "its base model"
        raise ModelFormatError(
            folder, "is a LoRA adapter without its base model", f"merge the adapter into {into} first"
        )


def _no_quantization(path: Path, whole: Json) -> None:
    """Raises ModelFormatError for weights that config.json says are quantized by another program."""
    usual_methods = {"quantization_config": None, "compression_config": "compressed-tensors", "quantization": "MLX"}
    for name, usual in usual_methods.items():
        if stated := whole.get(name):
            named = stated.get("quant_method") if isinstance(stated, dict) else None
            method = named or usual or ("bitsandbytes" if "load_in_4bit" in stated else stated)
            problem = f"its weights are quantised by {short(method)} ({name}), a format without a reader here"
            raise ModelFormatError(path, problem, "take the bf16 release, or a GGUF file of it")
