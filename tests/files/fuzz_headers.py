"""Headers of GGUF and safetensors files under atheris, a fuzzer that keeps inputs which reach new lines of our code.

    pip install atheris && pip install -e ".[test]"
    python tests/files/fuzz_headers.py gguf corpus/ -max_total_time=3600         or safetensors

Seeds are the bad files of test_gguf_file.py and test_safetensors_file.py, and valid ones. Whatever the bytes, opening
a file ends in its contents or in ModelFormatError; anything else, and more than 5 s or 2 GB, is a finding. Flags are
libFuzzer's. The kernel that steps over strings runs as Python, so that an index outside an array is an error too.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

LONGEST = 1 << 16  # bytes of an input
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "files")]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["minigemma.files", "minigemma.models.fields"]):
    from minigemma.errors import ModelFormatError
    from minigemma.files import gguf_file
    from minigemma.files.config_gguf import config_from_gguf
    from minigemma.files.gguf_file import open_gguf
    from minigemma.files.safetensors_file import open_safetensors, what_is
    from minigemma.files.statements import gguf_statements

walk = gguf_file._walk.py_func
gguf_file._walk = lambda *given: tuple(map(int, walk(*given)))  # a kernel returns Python's integers


def seeds(kind: str) -> list[bytes]:
    """The bad files of the tests and the files that they make bad ones of."""
    if kind == "gguf":
        import test_gguf_file
        from support.folders import Gemma3Config, random_weights, write_gguf

        sizes = {"width": 32, "layers": 2, "heads": 1, "kv_heads": 1, "head_dim": 32, "ffn_width": 32, "vocab": 32}
        with tempfile.TemporaryDirectory() as folder:
            config = Gemma3Config(**sizes)
            valid = write_gguf(Path(folder) / "model.gguf", config, random_weights(config)).read_bytes()
        bad = [content for content, _ in test_gguf_file.HOSTILE.values()]
        return [content for content in bad if len(content) < LONGEST] + [test_gguf_file.WHOLE, valid]
    import test_safetensors_file as ours

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        bad = [ours.write(path, header, data).read_bytes() for header, data, _ in ours.BAD_HEADERS.values()]
    bad += [content for content, _ in ours.BAD_FILES.values()]
    return [content for content in bad if len(content) < LONGEST] + [ours.VALID]


def open_as_gguf(path: Path) -> None:
    """Everything that is read of a GGUF file before its weights."""
    file = open_gguf(path)
    for read in (
        lambda: file.vocabulary,
        lambda: config_from_gguf(file),
        lambda: gguf_statements(path, file.metadata),
        lambda: [tensor.blocks[-1:].tobytes() for tensor in file.tensors.values()],
    ):
        with suppress(ModelFormatError):
            read()


def open_as_safetensors(path: Path) -> None:
    """The table of a safetensors file and the last bytes of each tensor."""
    what_is(path)
    for tensor in open_safetensors(path).values():
        tensor.array.reshape(-1)[-1:].tobytes()


def main() -> None:
    """Fuzz the kind of file that the first argument names; the second is the folder of the corpus."""
    kind, corpus = sys.argv[1], Path(sys.argv[2])
    corpus.mkdir(exist_ok=True)
    for number, content in enumerate(seeds(kind)):
        (corpus / f"seed-{number}").write_bytes(content)
    warnings.simplefilter("ignore")
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / f"model.{kind}"
    read = {"gguf": open_as_gguf, "safetensors": open_as_safetensors}[kind]

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except ModelFormatError as error:
            assert "\n" not in str(error)

    atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=5", "-rss_limit_mb=2048", f"-max_len={LONGEST}"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
