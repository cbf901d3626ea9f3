"""Recognizes files, folders and tensors that are not the weights of a Gemma, and names the remedy.

Files are recognized by their first bytes, folders by the names in them, tensors by their own names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

DAMAGED = "the download was cut short or the file is damaged: fetch it again"
GET_SAFETENSORS = "get the model's .safetensors files: minigemma download google/<model>"

FOREIGN = {  # kind → (problem, remedy)
    "empty": ("is empty", DAMAGED),
    "lfs": ("is a Git-LFS pointer, the short text that stands for a large file", "run `git lfs pull` in its folder"),
    "html": (
        "is a web page, not weights (often the page that asks to accept the terms)",
        "accept them in the browser, then: minigemma download google/<model>",
    ),
    "gguf": ("is a GGUF file", "let its name end in .gguf"),
    "pickle": ("is a Python pickle (PyTorch), which can run code when it is opened", GET_SAFETENSORS),
    "zip": ("is a zip archive, as PyTorch's .bin, .pt and .ckpt files are", GET_SAFETENSORS),
    "packed": ("is a compressed file or an archive", "unpack it, and name what was in it"),
    "hdf5": ("is an HDF5 file (Keras)", GET_SAFETENSORS),
    "task": ("is a MediaPipe or LiteRT bundle", GET_SAFETENSORS),
    "sbs": ("is a weights file of gemma.cpp", GET_SAFETENSORS),
    "onnx": ("is an ONNX graph", GET_SAFETENSORS),
    "npy": ("is an array of NumPy", GET_SAFETENSORS),
    "ggml": ("is a GGML file, the form before GGUF", "take a GGUF file of the model"),
}
PACKED = (b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh", b"7z\xbc\xaf\x27\x1c", b"Rar!")
OTHER_WEIGHTS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".npz", ".msgpack", ".task", ".sbs"),
    *(".onnx", ".litertlm", ".tflite", ".xml", ".mlmodel", ".gguf"),
)

FOREIGN_TENSORS = {  # pattern of their names → (problem, remedy)
    r"\.lora_|\.modules_to_save\.": (
        "holds a LoRA adapter that is not merged",
        "merge it (merge_and_unload of PEFT) and save the model again",
    ),
    r"\.(qweight|qzeros|scales|SCB|W_q|weight[._](absmax|quant_map|quant_state.*|packed|scale|scale_inv))$": (
        "holds weights quantized by another program",
        "take the bf16 release, or a GGUF file of it",
    ),
    r"(^|\.)(score|v_head|value_head|classifier)\.": (
        "is a classifier or a reward model, which predicts no next token",
        "take a model that generates text",
    ),
}


def kind_of(head: bytes, suffix: str) -> str:
    """Identifies a file by its first bytes and its suffix: "safetensors", a key of FOREIGN, or "" if unknown."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    # First, since the length 640 begins like a pickle: no length that we accept reaches the fifth byte.
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    signs = {
        "empty": not head,
        "gguf": head.startswith(b"GGUF"),
        "lfs": head.startswith(b"version https://git-lfs"),
        "html": start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")),
        "task": suffix in (".task", ".litertlm", ".tflite") or head[4:8] == b"TFL3" or head.startswith(b"LITERTLM"),
        "sbs": suffix == ".sbs",
        "onnx": suffix == ".onnx",
        "zip": head.startswith(b"PK\x03\x04"),
        "pickle": len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[2] > 0,
        "packed": head.startswith(PACKED) or head[257:262] == b"ustar",
        "hdf5": head.startswith(b"\x89HDF\r\n\x1a\n"),
        "npy": head.startswith(b"\x93NUMPY"),
        "ggml": head[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"),
    }
    return next((kind for kind, found in signs.items() if found), "")


def what_it_holds(folder: Path, wanted: str = "model.safetensors") -> tuple[str, str]:
    """(problem, remedy) for a folder without the `wanted` file."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return (error.strerror or str(error)).lower(), "check the path and who may read it"
    names = [entry.name for entry in entries]
    inside = [entry.name for entry in entries if (entry / "config.json").exists()]
    if not names:
        return "is an empty folder", GET_SAFETENSORS
    if any(name in ("_METADATA", "_CHECKPOINT_METADATA", "checkpoint") for name in names):
        return "is an Orbax checkpoint (JAX)", GET_SAFETENSORS
    if wanted == "config.json" and inside:
        return f"has no config.json, but its folder {inside[0]} has one", f"name the folder {inside[0]}"
    if wanted == "config.json" and any(name.endswith(".safetensors") for name in names):
        return "has weights, but no config.json", "fetch that file too"
    if shards := [name for name in names if re.search(r"-of-\d+\.safetensors$", name)]:
        return f"holds {shards[0]}, but no model.safetensors.index.json", "fetch that file too"
    if others := [name for name in names if name.endswith(".safetensors")]:
        remedy = "rename it if it has the whole model"
        return f"holds {others[0]}, and no file of the name model.safetensors", remedy
    if others := [name for name in names if name.endswith(OTHER_WEIGHTS)]:
        return f"holds {others[0]}, but no model.safetensors", GET_SAFETENSORS
    other = "model.safetensors" if wanted == "config.json" else f"{wanted}.index.json"
    return f"holds neither {wanted} nor {other}", GET_SAFETENSORS


def foreign_tensors(names: Iterable[str]) -> tuple[str, str] | None:
    """(problem, remedy) if unexpected tensors are known to come from another program; else None."""
    known = sorted(names)
    for pattern, (problem, remedy) in FOREIGN_TENSORS.items():
        if found := next((name for name in known if re.search(pattern, name)), None):
            return f"{problem} ({ascii(found)[1:-1][:100]})", remedy
    return None
