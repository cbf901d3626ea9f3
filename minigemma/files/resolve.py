"""Resolves what a user types to a model: a file, or a folder in Hugging Face's layout.

In this order: a path · a name under ./weights or the weights folder of this repository · a model in Hugging Face's
cache, by its id or the last part of it · the demo weights. Nothing is downloaded. org/name:Q8_0 or the path
org/name/file.gguf chooses one of several GGUF files.

Hugging Face's cache, one folder per model:

    models--google--gemma-3-1b-it/refs/main             the commit that was downloaded
                                  snapshots/<commit>/   its files, as links to
                                  blobs/                the bytes; *.incomplete while they are on their way
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import ModelFormatError
from ..models.registry import released_ids
from . import demo

HUB_ADDRESS = re.compile(r"((https?://)?(www\.)?(hf\.co|huggingface\.co)/|hf://)(models/)?")
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def resolve(name: str | Path | None = None) -> Path:
    """Returns the folder or file of the model `name`; None is the demo.

    ModelFormatError lists the places searched if there is no such model, and the missing file if a download is
    incomplete.
    """
    if name is None:
        return demo.demo_weights()
    text = str(name).strip()
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        text = text[1:-1]  # quotes that a script or a settings file left
    if not text:
        raise ModelFormatError("the model's name", "is empty", "give a folder, a file, a name or an id")
    if address := HUB_ADDRESS.match(text):  # as copied from a browser, or as Ollama writes it
        text = re.sub(r"/(blob|resolve|tree)/[^/]+", "", text[address.end() :]).rstrip("/")
    if found := _find(text):
        return _model_in(found, text)
    base, _, variant = text.rpartition(":")
    if base and re.fullmatch(r"[\w.-]+", variant) and (found := _find(base)):
        return _model_in(found, base, variant)
    if text == demo.NAME:
        return demo.demo_weights()
    raise _not_found(text)


def _find(name: str) -> Path | None:
    """The path, weights or cached model of this name, if there is one; org/name/file is a file of a cached model."""
    given = Path(os.path.expanduser(name))
    for path in (given, *(folder / given for folder in weights_folders())):
        for candidate in (path, path.with_name(path.name + ".gguf")) if path.name else (path,):
            if _exists(candidate):
                return candidate
    organization, _, rest = name.partition("/")
    model, _, file = rest.partition("/")
    if file and (snapshot := _in_hub_cache(f"{organization}/{model}")):
        inside = snapshot / Path(*(part for part in Path(file).parts if part != ".."))
        return inside if _exists(inside) else None
    return _in_hub_cache(name)


def weights_folders() -> list[Path]:
    """The folders searched for a plain name: ./weights, and weights/ next to this package (in a repository)."""
    return [Path("weights"), Path(__file__).resolve().parents[2] / "weights"]


def hub_cache() -> Path:
    """Hugging Face's cache: $HF_HUB_CACHE, else $HF_HOME/hub, else huggingface/hub in $XDG_CACHE_HOME or ~/.cache."""
    environ = os.environ.get
    home = environ("HF_HOME") or os.path.join(environ("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = environ("HF_HUB_CACHE") or environ("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def _exists(path: Path) -> bool:
    """Whether the path exists; False also for one that the system rejects (too long, with a NUL)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def model_name(path: Path) -> str:
    """What a model is called by its path: the id of a cached one, the folder's name, or the GGUF file's."""
    hub = next((part for part in path.absolute().parts if part.startswith("models--")), "")
    folder = path.parent if path.suffix == ".safetensors" else path
    return "/".join(hub.split("--")[1:]) or (path.stem if path.suffix == ".gguf" else folder.absolute().name)


def _model_in(path: Path, name: str, variant: str = "") -> Path:
    """The file or folder itself; for a folder with GGUF models and no safetensors, the one whose name has `variant`."""
    if path.name.startswith("models--") and (path / "snapshots").is_dir():  # the folder of the cache itself
        path = _snapshot(model_name(path), path) or path
    if not path.is_dir() or (not variant and any(path.glob("*.safetensors*"))):
        return path
    found = sorted(path.glob("*.gguf")) or sorted(path.glob("*/*.gguf"))
    # A vision tower comes as a GGUF file of its own, named mmproj-…; of a split file, the first part stands for all.
    models = [file for file in found if not file.name.startswith("mmproj") and not LATER_PART.search(file.name)]
    names = ", ".join(str(file.relative_to(path)) for file in models)
    if variant:
        models = [file for file in models if variant.lower() in file.stem.lower()]
        if not models:
            raise ModelFormatError(path, f"holds no GGUF file with {variant} in its name: {names}", "name one of them")
    if len(models) > 1:
        remedy = f"name one of them, as in {name}:Q8_0 or {name}/{models[0].relative_to(path)}"
        raise ModelFormatError(path, f"holds {len(models)} GGUF files: {names}", remedy)
    return models[0] if models else path


# ------------------------------------------------------------------------------------------ Hugging Face's cache


def cached() -> Iterator[tuple[str, Path]]:
    """(id, folder) of every model in Hugging Face's cache."""
    try:
        for folder in sorted(hub_cache().glob("models--*--*")):
            _, organisation, name = folder.name.split("--", 2)
            yield f"{organisation}/{name}", folder
    except OSError:
        return


def _in_hub_cache(name: str) -> Path | None:
    """The snapshot of the one cached model with this id, or with this as the last part of its id."""
    matches = {id: folder for id, folder in cached() if name in (id, id.split("/")[1])}
    found = {id: snapshot for id, folder in matches.items() if (snapshot := _snapshot(id, folder))}
    if len(found) > 1:
        google = f"google/{name}"
        if google not in found:
            raise ModelFormatError(
                name, f"matches several models in {hub_cache()}: {', '.join(found)}", "name one of them"
            )
        return found[google]
    return next(iter(found.values()), None)


def _snapshot(id: str, folder: Path) -> Path | None:
    """The downloaded files of one model; None if no weights are among them and none were on their way."""
    again = f"minigemma download {id}"
    snapshot = folder / "snapshots" / _commit(folder, again)
    files = sorted(file for file in snapshot.rglob("*") if not file.is_dir()) if os.path.isdir(snapshot) else []
    for file in files:
        if file.is_symlink() and not file.exists():
            raise ModelFormatError(file, "is missing: an incomplete download", again)
    unfinished = sorted((folder / "blobs").glob("*.incomplete"))
    if unfinished and not _has_all_weights([file.name for file in files]):
        raise ModelFormatError(unfinished[0], f"is an incomplete download of {id}", again)
    return snapshot if any(file.suffix in (".safetensors", ".gguf") for file in files) else None


def _commit(folder: Path, again: str) -> str:
    """The commit that refs/main names, or the only one there is (a download by commit leaves no ref)."""
    main = folder / "refs" / "main"
    try:
        commit = Path(main.read_text().strip()).name
    except (OSError, UnicodeDecodeError):
        commit = None
    if commit not in (None, "", ".."):
        return commit
    snapshots = [path.name for path in folder.glob("snapshots/*")]
    if commit is None and len(snapshots) == 1:
        return snapshots[0]
    raise ModelFormatError(
        main, f"cannot be read, and there are {len(snapshots)} snapshots: an incomplete download", again
    )


def _has_all_weights(names: list[str]) -> bool:
    """Whether the shards are all there, going by what they say themselves: model-00001-of-00004.safetensors."""
    shards = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    counts = [int(match[1]) for name in shards if (match := re.search(r"-of-(\d{1,5})\.", name))]
    return len(shards) >= max(counts, default=1)


# ------------------------------------------------------------------------------------------------- nothing found


def _not_found(name: str) -> ModelFormatError:
    """An error that lists the places searched, similar names and the remedy."""
    try:
        os.stat(os.path.expanduser(name))
    except PermissionError:
        return ModelFormatError(name, "cannot be read: permission denied", "check who may read it and its folders")
    except (OSError, ValueError):
        pass  # there is no such path
    places = ", ".join(str(folder) for folder in (*dict.fromkeys(weights_folders()), hub_cache()))
    close = difflib.get_close_matches(name, _names_here(name), n=3, cutoff=0.75)
    mean = f"did you mean {' or '.join(close)}?" if close else ""
    if name in released_ids() or _is_id(name):
        fetch = f"minigemma download {name}"
    else:
        released = {id.split("/")[1]: id for id in released_ids()}
        nearest = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), released, n=1, cutoff=0.75)
        fetch = (
            f"minigemma download {released[nearest[0]]}" if nearest else "check the path, or: minigemma download <id>"
        )
    return ModelFormatError(name, f"no such file, folder or model (looked in {places})", f"{mean} {fetch}".strip())


def _is_id(name: str) -> bool:
    """Whether this has the form of a hub id, not of a path."""
    written_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)(?<!\.safetensors)", name, re.ASCII)
    return written_so is not None and not Path(name).parent.exists()


def _names_here(name: str) -> list[str]:
    """Names to suggest: next to the path, under the weights folders, in the cache, and the demo's."""
    beside = Path(os.path.expanduser(name)).parent
    names = [demo.NAME]
    for folder, prefix in ((beside, name[: len(name) - len(Path(name).name)]), *((w, "") for w in weights_folders())):
        try:
            names += [prefix + path.name for path in folder.iterdir()]
        except (OSError, ValueError):
            continue
    for id, _ in cached():
        names += [id, id.split("/")[1]]
    return [other for other in dict.fromkeys(names) if other != name]
