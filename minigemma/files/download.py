"""Fetching a released model from the Hugging Face hub into its own cache, where `resolve` finds it.

The Gemma models are gated: a user accepts Google's terms once, on the model's page, and the hub then accepts tokens of
that account. Three failures look alike (401, 403, 404) but have different remedies; most of this file tells them apart.
huggingface_hub does the rest (extra [hub], imported when needed).
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from ..errors import ModelFormatError
from ..models.registry import released_ids
from .resolve import hub_cache

# Only the files that running a model needs.
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *("modules.json", "config_sentence_transformers.json", "[1-3]_*/config.json", "[1-3]_*/model.safetensors"),
)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
INSTALL = 'pip install "minigemma[hub]"'


def download(repo_id: str, revision: str | None = None) -> Path:
    """Fetches the missing files of a model such as google/gemma-3-1b-it and returns its folder.

    The last part of the id suffices for a released model. GGUF files are fetched only from Google's own …-gguf
    repositories, which hold one each; others hold dozens. ValueError for a malformed id, ModelFormatError if it fails.
    """
    repo_id = _full_id(repo_id)
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise ModelFormatError(repo_id, "downloading needs huggingface_hub", INSTALL) from None
    files = [*FILES, "*.gguf"] if re.fullmatch(r"google/.*-gguf", repo_id) else [*FILES]
    failures = (errors.HTTPError, OSError, RuntimeError)
    try:
        folder = Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=files))
        if any(folder.glob("*.safetensors")) and not (folder / "tokenizer.model").exists():  # a fine-tune
            hub.snapshot_download(repo_id, revision=revision, allow_patterns=["tokenizer.json"])
    except failures as error:
        raise _explain(repo_id, error) from error
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
        remedy = "name a repository in the Hugging Face format, or put a GGUF file of it under weights/ yourself"
        raise ModelFormatError(repo_id, "holds no model.safetensors", remedy)
    return folder


def _full_id(repo_id: str) -> str:
    """organisation/name, for a released model also from its name alone."""
    if f"google/{repo_id}" in released_ids():
        return f"google/{repo_id}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
        raise ValueError(f"{repo_id!r} is no Hugging Face id; one looks like google/gemma-3-1b-it")
    return repo_id


def _explain(repo_id: str, error: Exception) -> ModelFormatError:
    """Explains the hub's error and its remedy. Subclasses are tested before their base classes."""
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # it is not in the cache either, but what the hub answered says more

    page = f"https://huggingface.co/{repo_id}"
    has_token = get_token() is not None
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError) or status == 403:
        if not has_token:
            remedy = f"accept the terms at {page}, then `hf auth login` or set HF_TOKEN"
            return ModelFormatError(repo_id, "the model is gated, and no Hugging Face token is set", remedy)
        remedy = f"accept them at {page} (a fine-grained token must also be allowed to read gated repositories)"
        return ModelFormatError(repo_id, "the account of this token has not accepted the model's terms", remedy)
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = "check the spelling" + ("" if has_token else "; if it is private, `hf auth login` or set HF_TOKEN")
        return ModelFormatError(repo_id, "there is no such model on huggingface.co, or it is private", remedy)
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelFormatError(repo_id, "has no such revision", f"see the branches and tags at {page}")
    if status == 401:
        return ModelFormatError(repo_id, "Hugging Face does not accept the token that is set", "`hf auth login` again")
    return _unreachable(repo_id, error)


def _unreachable(repo_id: str, error: Exception) -> ModelFormatError:
    """Offline, a broken connection, or a disk that is full."""
    from huggingface_hub import errors

    elsewhere = f"run `minigemma download {repo_id}` on a connected machine and copy the folder"
    if isinstance(error, errors.IncompleteSnapshotError):
        return ModelFormatError(
            error.snapshot_path, "an incomplete download, and huggingface.co is out of reach", elsewhere
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ModelFormatError(repo_id, f"huggingface.co is out of reach, and it is not in {hub_cache()}", elsewhere)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        reason = (error.strerror or str(error)).lower()
        remedy = "see that there is space, or set HF_HOME to another folder; what has arrived is kept"
        return ModelFormatError(error.filename or hub_cache(), f"cannot be written: {reason}", remedy)
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ModelFormatError(repo_id, f"the download broke off ({reason})", "try again: what has arrived is kept")
