"""Downloading: which files are requested, and that each way to fail is told from the others. No network is used."""

from __future__ import annotations

import fnmatch
import sys

import httpx2
import huggingface_hub as hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects, hf_raise_for_status

from minigemma.errors import ModelFormatError
from minigemma.files.download import download

ID = "google/gemma-3-1b-it"
PAGE = f"https://huggingface.co/{ID}"


def answer(status, code=None, url=f"https://huggingface.co/api/models/{ID}", **headers):
    """The error that huggingface_hub itself makes of such an answer of the server."""
    if code:
        headers["X-Error-Code"] = code
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", url))
    with pytest.raises(errors.HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    return caught.value


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.fixture
def snapshot(monkeypatch, tmp_path):
    """Replaces huggingface_hub.snapshot_download: it raises .error, or returns a folder with .files, noting .asked."""

    class Fake:
        error, files, asked = None, ["model.safetensors", "tokenizer.model"], None

        def __call__(self, repo_id, **options):
            self.asked = (repo_id, options)
            if self.error:
                raise self.error
            for name in self.files:
                (tmp_path / name).touch()
            return str(tmp_path)

    fake = Fake()
    monkeypatch.setattr(hub, "snapshot_download", fake)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    return fake


def test_a_download_is_the_folder(snapshot, tmp_path):
    assert download(ID) == tmp_path
    assert snapshot.asked[0] == ID
    assert download("gemma-3-1b-it") == tmp_path
    assert snapshot.asked[0] == ID
    download(ID, revision="4d7a")
    assert snapshot.asked[1]["revision"] == "4d7a"


def test_only_what_is_needed_is_fetched(snapshot):
    download(ID)
    patterns = snapshot.asked[1]["allow_patterns"]
    wanted = {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.model",
        "model.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    rest = [
        "README.md",
        "tokenizer.json",
        "gemma-2b.gguf",
        "pytorch_model.bin",
        "original/model.ckpt",
        "adapter.safetensors",
    ]
    assert set(filter_repo_objects([*wanted, *rest], allow_patterns=patterns)) == wanted


def test_a_fine_tune_without_tokenizer_model_brings_its_tokenizer_json(snapshot):
    snapshot.files = ["model.safetensors", "tokenizer.json"]
    download("someone/gemma-tuned", revision="4d7a")
    assert snapshot.asked == ("someone/gemma-tuned", {"revision": "4d7a", "allow_patterns": ["tokenizer.json"]})


def test_gguf_files_come_from_googles_own_repositories_alone(snapshot):
    snapshot.files = ["gemma-3-4b-it-q4_0.gguf"]
    download("google/gemma-3-4b-it-qat-q4_0-gguf")
    assert any(fnmatch.fnmatch(snapshot.files[0], pattern) for pattern in snapshot.asked[1]["allow_patterns"])
    download("someone/gemma-3-4b-it-GGUF")
    assert not any(fnmatch.fnmatch(snapshot.files[0], pattern) for pattern in snapshot.asked[1]["allow_patterns"])


def test_a_repository_without_weights_is_said_to_have_none(snapshot):
    snapshot.files = ["config.json"]
    with pytest.raises(ModelFormatError, match=r"holds no model\.safetensors"):
        download("someone/gemma-lora")


@pytest.mark.parametrize(
    "name", ["", "gemma", "a/b/c", "../x", "google/", "/etc/passwd", "a b/c", "google/gemma\n", "./gemma"]
)
def test_what_is_no_id_is_not_asked_for(snapshot, name):
    with pytest.raises(ValueError, match="is no Hugging Face id"):
        download(name)
    assert snapshot.asked is None


UNREACHABLE = errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known\nAn error …")
FINE_GRAINED = "403 Forbidden: Please enable access to public gated repositories in your fine-grained token settings"
FAILURES = {
    "gated, no token": (answer(401, "GatedRepo"), None, f"no Hugging Face token is set; accept the terms at {PAGE}"),
    "gated, a token": (answer(403, "GatedRepo"), "hf_x", f"has not accepted the model's terms; accept them at {PAGE}"),
    "a token that may not": (
        caused(errors.LocalEntryNotFoundError(FINE_GRAINED), answer(403)),
        "hf_x",
        "fine-grained",
    ),
    "no such model": (answer(404, "RepoNotFound"), "hf_x", "no such model on huggingface.co, or it is private; check"),
    "no such model, no token": (
        answer(401),
        None,
        "no such model on huggingface.co, or it is private; check the spelling; if",
    ),
    "no such revision": (answer(404, "RevisionNotFound"), None, "has no such revision"),
    "a wrong token": (
        answer(401, **{"X-Error-Message": "Invalid credentials in Authorization header"}),
        "hf_x",
        "does not accept the token that is set; `hf auth login` again",
    ),
    "offline": (UNREACHABLE, None, "huggingface.co is out of reach, and it is not in /cache; run `minigemma download"),
    "offline, half there": (
        errors.IncompleteSnapshotError("…", snapshot_path="/cache/half"),
        None,
        "/cache/half: an incomplete download, and huggingface.co is out of reach; run",
    ),
    "the server is ill": (
        caused(errors.LocalEntryNotFoundError("Got: …"), answer(503)),
        None,
        "the download broke off (Server error '503 Service Unavailable'",
    ),
    "the connection breaks": (httpx2.ReadTimeout("timed out"), None, "the download broke off (timed out); try again"),
    "reset": (ConnectionResetError(104, "Connection reset by peer"), None, "the download broke off ([Errno 104]"),
    "xet": (RuntimeError("Data processing error: …"), None, "the download broke off (Data processing error"),
    "nothing is said": (httpx2.ReadError(""), None, "the download broke off (ReadError)"),
    "the disk is full": (
        OSError(28, "No space left on device"),
        None,
        "/cache: cannot be written: no space left on device",
    ),
    "a cache of others": (
        PermissionError(13, "Permission denied", "/cache/x"),
        None,
        "/cache/x: cannot be written: permission",
    ),
}


@pytest.mark.parametrize("error, token, says", FAILURES.values(), ids=FAILURES)
def test_each_failure_says_what_to_do(snapshot, monkeypatch, error, token, says):
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    monkeypatch.setattr(hub, "get_token", lambda: token)
    snapshot.error = error
    with pytest.raises(ModelFormatError) as caught:
        download(ID)
    assert says in str(caught.value)
    assert str(caught.value).isprintable() and caught.value.remedy and caught.value.__cause__ is not None


def test_the_order_of_catching_matters_as_we_think():
    """If one of these changes, the order of the questions in _explain has to be looked at again."""
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError)
    assert issubclass(errors.RepositoryNotFoundError, errors.HfHubHTTPError)
    assert issubclass(errors.IncompleteSnapshotError, errors.LocalEntryNotFoundError)
    assert issubclass(errors.LocalEntryNotFoundError, OSError)
    assert not issubclass(errors.LocalEntryNotFoundError, errors.HfHubHTTPError)


def test_a_bug_is_no_download_error(snapshot):
    snapshot.error = TypeError("a bug")
    with pytest.raises(TypeError):
        download(ID)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelFormatError, match=r'pip install "minigemma\[hub\]"'):
        download(ID)
