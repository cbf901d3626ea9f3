"""`bench` measures what it says."""

import numpy as np
import pytest
from support.small_models import LOCAL_GLOBAL, RECURRENT, SEEING

from minigemma.cli.bench import table
from minigemma.cli.measure import Plan, bench, prompt_flops, token_at
from minigemma.cli.random_weights import random_model
from minigemma.kernels import amx

pytestmark = pytest.mark.usefixtures("small_machine")


def test_prompt_and_answer_must_fit_into_the_context():
    with pytest.raises(ValueError, match="context is 600 tokens"):
        bench(random_model(SEEING), Plan(599, 2))


def test_report_and_table():
    seen = []
    report = bench(random_model(SEEING), Plan(20, 3, [10, 500], 1, image=True), progress=seen.append)
    report["weights"] = "random"
    ours = report["programs"]["minigemma"]
    assert ours["decode_tps"] > 0 and ours["seconds_to_first_token"] == pytest.approx(20 / ours["prefill_tps"])
    assert set(report["milliseconds_per_token_at"]) == {"10", "500"}
    assert report["multiplies"] == "float32" or amx.choice()[0] != "vectors"
    assert set(report["image"]) >= {"vision tower", "reading its tokens", "one more token"}
    assert "an image: round 1 of 1" in seen
    text = table(report)
    assert "weights random" in text
    assert f"the first token after {ours['seconds_to_first_token']:.3g} s" in text
    assert "at position       500" in text
    assert "vision tower" in text
    assert "tower       minigemma" in text


def test_the_scan_of_a_recurrent_model_is_measured():
    report = bench(random_model(RECURRENT), Plan(4, 2, repeat=1))
    assert 1e6 < report["scan_bytes_per_second"] < 1e13
    assert "GB/s over 2,048 tokens" in table(report | {"weights": "random"})


def test_a_position_is_only_pretended():
    model = random_model(RECURRENT)
    assert set(token_at(model, [0, 5, 10_000], 6, 1, print)) == {0, 5, 10_000}
    cache = model.new_cache(20_000)
    cache.skip_to(10_000)
    assert (cache.position, cache.nbytes) == (10_000, RECURRENT.cache_bytes(10_000))
    assert np.isfinite(model.forward([5], cache)).all()
    for wrong in (9_000, 20_001):
        with pytest.raises(ValueError, match=f"position {wrong} is not within 10001"):
            cache.skip_to(wrong)


@pytest.mark.parametrize("config", [RECURRENT, LOCAL_GLOBAL], ids=["recurrent", "gemma 2"])
def test_a_prompt_does_without_most_of_the_last_layer(config):
    ffn, q_and_o = 3 * 64 * 96, 2 * 64 * 2 * 32
    assert prompt_flops(random_model(config)) == 2 * (config.non_embedding_parameters - ffn - q_and_o)
    if config is RECURRENT:  # of two layers the last is a recurrent block: W_y and W_out, 64 x 64
        shorter = random_model(config, layers=2)
        assert prompt_flops(shorter) == 2 * (shorter.config.non_embedding_parameters - ffn - 2 * 64 * 64)
