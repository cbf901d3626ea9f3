"""What a name means: a path, weights/, Hugging Face's cache, the demo; and what is said when it means nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from hashlib import sha256
from pathlib import Path

import huggingface_hub.constants
import pytest
from support.folders import cached

from minigemma.environment import cache_folder
from minigemma.errors import ModelFormatError
from minigemma.files import demo
from minigemma.files import resolve as locate
from minigemma.models.registry import released_ids


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty machine: nothing in the caches, the working directory and the repository."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "MINIGEMMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(locate, "__file__", str(tmp_path / "repository" / "minigemma" / "files" / "resolve.py"))
    return tmp_path / "home"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Small demo packages in place of the real ones, with the sum of what they hold."""
    contents = [bytes([number]) * (1000 + number) for number in range(4)]
    files = []
    for number, content in enumerate(contents):
        data = tmp_path / "packages" / f"fake_demo_part{number + 1}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise AssertionError('code of the package was run')")
        files.append(data / f"{demo.FILE}.part{number:02}")
        files[-1].write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(demo, "PACKAGE", "fake_demo")
    monkeypatch.setattr(demo, "SIZE", 4006)
    monkeypatch.setattr(demo, "SHA256", sha256(b"".join(contents)).hexdigest())
    return files


def model(folder, *names):
    """A folder with these (empty) files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def refused(name):
    with pytest.raises(ModelFormatError) as caught:
        locate.resolve(name)
    assert str(caught.value).isprintable() and caught.value.remedy
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------- paths


def test_a_path_is_itself(tmp_path):
    folder = model(tmp_path / "work/mine")
    assert locate.resolve("mine") == Path("mine")
    assert locate.resolve(folder) == folder
    assert locate.resolve(str(folder / "model.safetensors")) == folder / "model.safetensors"


def test_a_tilde_is_the_home_folder(home):
    folder = model(home / "mine")
    assert locate.resolve("~/mine") == folder


def test_the_order_of_the_four_places(tmp_path, home, parts):
    """Each place is taken away in turn, and the next one is found."""
    places = [
        model(tmp_path / "work" / demo.NAME),
        model(tmp_path / "work/weights" / demo.NAME),
        model(tmp_path / "repository/weights" / demo.NAME),
        cached(home, f"google/{demo.NAME}"),
    ]
    for place in places:
        assert locate.resolve(demo.NAME).resolve() == place
        shutil.rmtree(place if place is not places[3] else place.parents[1])
    assert locate.resolve(demo.NAME) == home / ".cache/minigemma" / demo.FILE == locate.resolve()


def test_an_ending_of_gguf_may_be_left_out(tmp_path):
    model(tmp_path / "work/weights", "gemma-3-1b-it.gguf")
    assert locate.resolve("gemma-3-1b-it") == Path("weights/gemma-3-1b-it.gguf")


def test_a_folder_with_one_gguf_model_means_that_file(tmp_path):
    folder = model(tmp_path / "work/qat", "gemma-3-4b-it-q4_0.gguf", "mmproj-model-f16.gguf", "README.md")
    assert locate.resolve(folder) == folder / "gemma-3-4b-it-q4_0.gguf"
    model(folder, "other.gguf")
    assert "2 GGUF files: gemma-3-4b-it-q4_0.gguf, other.gguf; name one" in refused(folder)
    model(folder, "model.safetensors")
    assert locate.resolve(folder) == folder


# --------------------------------------------------------------------------------------------- Hugging Face's cache


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"XDG_CACHE_HOME": "/x", "HF_HOME": "~/h"},
        {"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"},
        {"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "$HOME/c"},
    ],
)
def test_the_cache_is_where_huggingface_hub_puts_it(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location(
        "huggingface_hub.constants_read_anew", huggingface_hub.constants.__file__
    )
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    assert str(locate.hub_cache()) == theirs.HF_HUB_CACHE


def test_huggingface_hub_finds_the_same_snapshot(home):
    snapshot = cached(home)
    theirs = huggingface_hub.snapshot_download(
        "google/gemma-3-1b-it", cache_dir=home / ".cache/huggingface/hub", local_files_only=True
    )
    assert locate.resolve("google/gemma-3-1b-it") == locate.resolve("gemma-3-1b-it") == snapshot == Path(theirs)


def test_refs_main_chooses_among_snapshots(home):
    cached(home, commit="0ld")
    newest = cached(home, commit="4d7a")
    cached(home, commit="0ther")
    (newest.parents[1] / "refs/main").write_text("4d7a\n")
    assert locate.resolve("gemma-3-1b-it") == newest


def test_without_refs_main_the_only_snapshot_is_meant_and_none_of_two(home):
    snapshot = cached(home)
    (snapshot.parents[1] / "refs/main").unlink()
    assert locate.resolve("gemma-3-1b-it") == snapshot
    cached(home, commit="0ther").parents[1].joinpath("refs/main").unlink()
    message = refused("gemma-3-1b-it")
    assert "refs/main: cannot be read, and there are 2 snapshots: an incomplete download" in message
    assert message.endswith("minigemma download google/gemma-3-1b-it")


def test_a_name_of_two_organisations_is_googles_or_must_be_said_in_full(home):
    other = cached(home, "unsloth/gemma-3-1b-it")
    assert locate.resolve("gemma-3-1b-it") == other
    google = cached(home, "google/gemma-3-1b-it")
    assert locate.resolve("gemma-3-1b-it") == google
    assert locate.resolve("unsloth/gemma-3-1b-it") == other
    shutil.rmtree(google.parents[1])
    cached(home, "another/gemma-3-1b-it")
    assert "another/gemma-3-1b-it, unsloth/gemma-3-1b-it; name one" in refused("gemma-3-1b-it")


def test_a_link_to_nowhere_is_an_incomplete_download(home):
    snapshot = cached(home)
    (snapshot.parents[1] / "blobs/sha-of-config.json").unlink()
    message = refused("google/gemma-3-1b-it")
    assert message.startswith(f"{snapshot / 'config.json'}: is missing: an incomplete download; minigemma download")


def test_bytes_on_their_way_are_an_incomplete_download(home):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for names in (["config.json"], ["config.json", shards[0]]):
        snapshot = cached(home, names=names)
        (snapshot.parents[1] / "blobs/77ab.1f.incomplete").touch()
        message = refused("gemma-3-1b-it")
        assert "77ab.1f.incomplete: is an incomplete download of google/gemma-3-1b-it" in message
        shutil.rmtree(snapshot.parents[1])
    # Of an earlier attempt, left behind: all the weights came with a later one.
    snapshot = cached(home, names=shards)
    (snapshot.parents[1] / "blobs/77ab.1f.incomplete").touch()
    assert locate.resolve("gemma-3-1b-it") == snapshot


def test_a_cached_tokenizer_alone_is_no_model(home, parts):
    """Other programs leave such snapshots; they must not hide the demo of the same name."""
    cached(home, f"google/{demo.NAME}", ["tokenizer.json"])
    assert locate.resolve(demo.NAME).name == demo.FILE
    assert "no such file, folder or model" in refused(f"google/{demo.NAME}")


# -------------------------------------------------------------------------------------------------- nothing found


def test_nothing_found_says_where_was_looked_and_what_was_meant(tmp_path, home):
    model(tmp_path / "work/weights/gemma-3-1b-mine")
    cached(home, "google/gemma-3-4b-it")
    message = refused("gemma-3-1b-mien")
    assert f"(looked in weights, {tmp_path}/repository/weights, {home}/.cache/huggingface/hub)" in message
    assert "did you mean gemma-3-1b-mine" in message
    assert "google/gemma-3-4b-it" in refused("google/gemma-3-4b-ti")
    assert "did you mean ./weights?" in refused("./wieghts")


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("google/gemma-3-1b-it", "minigemma download google/gemma-3-1b-it"),
        ("gemma-2-9b-it", "minigemma download google/gemma-2-9b-it"),
        ("google/gemma-2-9b-ti", "minigemma download google/gemma-2-9b-ti"),
        ("Gemma-2-27B", "minigemma download google/gemma-2-27b"),
        ("weights/mine.gguf", "check the path, or: minigemma download <id>"),
        ("/nowhere/model.safetensors", "check the path, or: minigemma download <id>"),
        ("x" * 5000, "<id>"),
        ("nul\0byte", "<id>"),
    ],
)
def test_every_unknown_name_has_a_remedy(name, remedy):
    with pytest.raises(ModelFormatError) as caught:
        locate.resolve(name)
    assert caught.value.remedy.endswith(remedy)


def test_released_ids():
    assert len(released_ids()) == len(set(released_ids())) == 28
    assert {"google/gemma-1.1-7b-it", "google/gemma-2-27b", "google/vaultgemma-1b", "google/gemma-3-270m-it"} < set(
        released_ids()
    )
    assert not {"google/gemma-1.1-7b", "google/gemma-3-1b", "google/gemma-2-2b-pt"} & set(released_ids())


# -------------------------------------------------------------------------------------------------- the demo weights


def test_the_demo_is_joined_once_and_names_its_terms_once(parts, home, capsys):
    path = demo.demo_weights()
    assert path == home / ".cache/minigemma" / demo.FILE
    assert path.read_bytes() == b"".join(part.read_bytes() for part in parts)
    out, err = capsys.readouterr()
    assert out == "" and "https://ai.google.dev/gemma/terms" in err
    written = path.stat().st_mtime_ns
    for part in parts:
        part.unlink()  # not needed any more
    assert demo.demo_weights() == path and path.stat().st_mtime_ns == written
    assert capsys.readouterr() == ("", "")
    assert os.listdir(path.parent) == [demo.FILE]


def test_a_file_of_the_wrong_size_is_joined_anew(parts):
    path = demo.demo_weights()
    path.write_bytes(b"cut short")
    assert demo.demo_weights().stat().st_size == demo.SIZE


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({}, "home/.cache/minigemma"),
        ({"XDG_CACHE_HOME": "{}/x"}, "x/minigemma"),
        ({"XDG_CACHE_HOME": "{}/x", "MINIGEMMA_CACHE": "{}/own"}, "own"),
        ({"MINIGEMMA_CACHE": "~/own"}, "home/own"),
        ({"MINIGEMMA_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/minigemma"),
    ],
)
def test_where_the_demo_is_kept(tmp_path, monkeypatch, variables, folder):
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert cache_folder() == tmp_path / folder


def test_a_damaged_part_is_found_out_and_nothing_stays(parts, home):
    parts[2].write_bytes(parts[2].read_bytes()[:-1] + b"!")
    assert "damaged" in refused(demo.NAME)
    assert os.listdir(home / ".cache/minigemma") == []


def test_no_packages_no_demo(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "minigemma_demo_that_is_not_installed")
    assert refused(demo.NAME).endswith('pip install "minigemma[demo]"')


def test_a_missing_part_is_named(parts):
    parts[3].unlink()
    assert refused(demo.NAME).startswith(str(parts[3]))


def test_a_full_disk_or_a_read_only_cache_is_one_sentence(parts, home, monkeypatch):
    copy = demo._copy

    def full(parts, out):
        copy(parts[:1], out)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_copy", full)
    message = refused(demo.NAME)
    assert "no space left on device" in message and "MINIGEMMA_CACHE" in message
    assert os.listdir(home / ".cache/minigemma") == []
    (home / "file").touch()
    monkeypatch.setenv("MINIGEMMA_CACHE", str(home / "file"))
    assert f"{home}/file: the demo weights cannot be written here (file exists" in refused(demo.NAME)


def test_an_interrupted_join_leaves_nothing(parts, home, monkeypatch):
    def interrupted(parts, out):
        out.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_weights()
    assert os.listdir(home / ".cache/minigemma") == []


def test_the_real_parts_have_the_size_that_later_starts_look_at():
    assert sum(part.stat().st_size for part in demo.find_parts()) == demo.SIZE


def test_the_real_parts_have_the_published_sum():
    digest = sha256()
    for part in demo.find_parts():
        digest.update(part.read_bytes())
    published = demo.find_parts()[0].parents[2] / demo.PACKAGE / "data" / "SHA256SUMS"
    assert digest.hexdigest() == demo.SHA256 == published.read_text().split()[0]


# ------------------------------------------------------------------------------------------------ weights/README.md


def test_the_sizes_in_the_readme_are_those_of_the_configs():
    from minigemma.models.registry import RELEASED

    readme = Path(__file__).parents[2] / "weights" / "README.md"
    rows = [line.split("|") for line in readme.read_text().splitlines() if line.startswith("| `google/")]
    assert len(rows) == 12
    for _, ids, weights, cache, together, _ in rows:
        id = ids.split("`")[1]
        config = RELEASED[id.removeprefix("google/").removesuffix("-pt")]
        weight_bytes = 2 * (config.embedding_parameters + config.non_embedding_parameters)
        cache_bytes = config.cache_bytes(8192)
        printed = f"{weight_bytes / 1e9:.2f}", f"{cache_bytes / 1e9:.2f}", f"{(weight_bytes + cache_bytes) / 1e9:.1f}"
        assert (weights.strip(), cache.strip(), together.strip()) == printed
        assert id in released_ids()


# ------------------------------------------------------------------------------------------ names as users write them


def test_one_of_several_gguf_files_by_variant_path_or_subfolder(home):
    cached(home, "someone/two-GGUF", ("two-Q4_0.gguf", "two-Q8_0.gguf"))
    for name in ("someone/two-GGUF:Q8_0", "two-GGUF:q8_0", "someone/two-GGUF/two-Q8_0.gguf"):
        assert locate.resolve(name).name == "two-Q8_0.gguf", name
    with pytest.raises(ModelFormatError, match=r"name one of them, as in .*:Q8_0 or "):
        locate.resolve("someone/two-GGUF")
    with pytest.raises(ModelFormatError, match="holds no GGUF file with Q2_K in its name"):
        locate.resolve("someone/two-GGUF:Q2_K")
    with pytest.raises(ModelFormatError, match="no such file"):
        locate.resolve("someone/two-GGUF/../../secret.gguf")
    below = cached(home, "someone/below-GGUF", ("config.json",))
    (below / "BF16").mkdir()
    (below / "BF16" / "below-BF16.gguf").touch()
    assert locate.resolve("someone/below-GGUF").name == "below-BF16.gguf"


def test_parts_of_a_split_file_are_one_model(tmp_path):
    folder = model(tmp_path / "split", *(f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)))
    assert locate.resolve(folder).name == "m-00001-of-00003.gguf"


def test_quotes_around_a_name_are_no_part_of_it(tmp_path):
    folder = model(tmp_path / "mine")
    assert locate.resolve(f"'{folder}'") == locate.resolve(f'"{folder}"') == folder


@pytest.mark.parametrize(
    "written",
    [
        "hf.co/me/one-GGUF",
        "https://huggingface.co/me/one-GGUF",
        "https://huggingface.co/me/one-GGUF/blob/main/m-Q8_0.gguf",
        "hf.co/me/one-GGUF:Q8_0",
        "hf://me/one-GGUF/",
        " me/one-GGUF ",
    ],
)
def test_an_address_of_the_hub_is_the_cached_model(written, home):
    snapshot = cached(home, "me/one-GGUF", ("m-Q8_0.gguf",))
    assert locate.resolve(written) == snapshot / "m-Q8_0.gguf"


def test_an_empty_name_is_no_model(home):
    with pytest.raises(ModelFormatError, match="the model's name: is empty"):
        locate.resolve("")


def test_the_folder_of_the_cache_is_its_snapshot_and_models_are_called_by_their_id(home):
    snapshot = cached(home, "me/model")
    assert locate.resolve(snapshot.parents[1]) == snapshot
    assert locate.model_name(snapshot) == locate.model_name(snapshot / "model.safetensors") == "me/model"
    assert (
        locate.model_name(Path("weights/mine")) == locate.model_name(Path("weights/mine/model.safetensors")) == "mine"
    )
    assert locate.model_name(Path("weights/mine-Q8_0.gguf")) == "mine-Q8_0"


def test_the_remedy_for_several_gguf_files_names_the_model_as_it_was_named(home):
    cached(home, "me/two-GGUF", ("m-Q8_0.gguf", "m-Q4_0.gguf"))
    with pytest.raises(ModelFormatError, match=r"as in me/two-GGUF:Q8_0 or me/two-GGUF/m-Q4_0\.gguf"):
        locate.resolve("me/two-GGUF")
