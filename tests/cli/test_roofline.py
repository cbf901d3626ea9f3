"""Points and picture of the roofline."""

import pytest

from minigemma.cli.roofline import points, roofline

REPORT = {
    "name": "small",
    "dtype": "int8",
    "threads": 2,
    "vectors": "8 lanes",
    "parameters": 1500,
    "flops_per_token": 2000,
    "read_bytes_per_second": 30e9,
    "flops_per_second": 90e9,
    "multiplies": "float32",
    "prompt_tokens": 64,
    "programs": {
        "minigemma": {"prefill_tps": 100.0, "decode_tps": 20.0, "weight_bytes": 1500},
        "other": {"prefill_tps": 50.0, "decode_tps": 10.0, "weight_bytes": 3000},
    },
    "prefill_tps_of": {"4": {"minigemma": 80.0, "other": 40.0}},
}


def test_points_of_the_roofline():
    """A token multiplies all of 1,500 weights, a prompt 500, the head's and some of the last layer's, once: two flop
    each.
    """
    ours, other = points(REPORT).values()
    assert ours[0] == ("decode", 3000 / 1500, 3000 * 20.0)
    assert ours[1] == ("prompt of 4", (4 * 2000 + 1000) / 1500, (4 * 2000 + 1000) * 80.0 / 4)
    assert ours[2][:2] == ("prompt of 64", (64 * 2000 + 1000) / 1500)
    assert [point[1] for point in other] == [point[1] / 2 for point in ours]


def test_decoding_at_the_speed_of_memory_lies_on_the_roof():
    limit = REPORT["read_bytes_per_second"] / 1500
    at_limit = REPORT["programs"]["minigemma"] | {"decode_tps": limit}
    _, intensity, speed = points(REPORT | {"programs": {"minigemma": at_limit}})["minigemma"][0]
    assert speed == pytest.approx(intensity * REPORT["read_bytes_per_second"])


@pytest.mark.oracle
def test_the_roofline_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    for report in (REPORT, REPORT | {"prefill_tps_of": {}}):
        roofline(report, tmp_path / "roof.png")
        with Image.open(tmp_path / "roof.png") as picture:
            assert picture.size == (1350, 900)
