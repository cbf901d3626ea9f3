"""The sizes in `RELEASED` have as many parameters as the reports print."""

from __future__ import annotations

import math

import pytest

from minigemma.models.registry import RELEASED

# Gemma Team 2024a (Gemma 1), Table 2, and Gemma Team 2024b (Gemma 2), Table 2: (embedding, non-embedding), exact.
# These two count an embedding of 256,128 rows: the 256,000 of the released files and 128 that pad them.
REPORT_ROWS = 256_128
PRINTED = {
    "gemma-2b": (524_550_144, 1_981_884_416),
    "gemma-7b": (786_825_216, 7_751_248_896),
    "gemma-2-2b": (590_118_912, 2_024_517_888),
    "gemma-2-9b": (917_962_752, 8_324_201_984),
    "gemma-2-27b": (1_180_237_824, 26_047_480_320),
}

# Gemma Team 2025 (Gemma 3), Table 1, in millions: (vision, embedding, non-embedding). 270M is not in the report; the
# announcement gives its sizes as 170 and 100.
PRINTED_MILLIONS = {
    "gemma-3-270m": (0, 170, 100),
    "gemma-3-1b": (0, 302, 698),
    "gemma-3-4b": (417, 675, 3_209),
    "gemma-3-12b": (417, 1_012, 10_759),
    "gemma-3-27b": (417, 1_416, 25_600),
}

# All text tensors of the released files, counted one by one: (embedding, non-embedding).
FILES = {
    "gemma-2b": (524_288_000, 1_981_884_416),
    "gemma-7b": (786_432_000, 7_751_248_896),
    "gemma-2-2b": (589_824_000, 2_024_517_888),
    "gemma-2-9b": (917_504_000, 8_324_201_984),
    "gemma-2-27b": (1_179_648_000, 26_047_480_320),
    "gemma-3-270m": (167_772_160, 100_326_016),
    "gemma-3-1b": (301_989_888, 697_896_064),
    "gemma-3-4b": (671_252_480, 3_209_010_688),
    "gemma-3-12b": (1_006_878_720, 10_759_155_456),
    "gemma-3-27b": (1_409_630_208, 25_599_716_096),
}


def test_every_released_size_is_counted_here():
    text_sizes = {name for name, config in RELEASED.items() if config.family in ("gemma", "gemma2", "gemma3")}
    assert text_sizes == set(FILES) == set(PRINTED) | set(PRINTED_MILLIONS)


@pytest.mark.parametrize("name", FILES)
def test_parameters_of_the_released_files(name):
    config = RELEASED[name]
    assert (config.embedding_parameters, config.non_embedding_parameters) == FILES[name]


@pytest.mark.parametrize("name", PRINTED)
def test_counts_that_gemma_1_and_2_print(name):
    config, (embedding, rest) = RELEASED[name], PRINTED[name]
    assert config.non_embedding_parameters == rest
    assert config.embedding_parameters + (REPORT_ROWS - config.vocab) * config.width == embedding


@pytest.mark.parametrize("name", PRINTED_MILLIONS)
def test_counts_that_gemma_3_prints(name):
    """With a vision tower the printed embedding has the image projection in it, [1152, D], and is rounded upwards."""
    config, (vision, embedding, rest) = RELEASED[name], PRINTED_MILLIONS[name]
    assert round(config.non_embedding_parameters / 1e6) == rest
    if vision:
        assert math.ceil((262_144 + 1152) * config.width / 1e6) == embedding
    else:
        assert math.isclose(config.embedding_parameters / 1e6, embedding, rel_tol=0.015)


@pytest.mark.parametrize("name", RELEASED)
def test_name_of_a_size_is_its_key(name):
    assert RELEASED[name].name == name
