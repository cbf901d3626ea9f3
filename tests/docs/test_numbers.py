"""Numbers in README.md are those of the tables that the scripts in docs/ write."""

import re
from pathlib import Path

from minigemma.files.demo import SIZE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def table(name, page="performance.md"):
    """Rows of the block `name`, by first cell (two for the other programs): numbers as floats."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    block = text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in block.splitlines() if "|" in line]
    return {row[0] if name != "peers" else (row[0], row[1]): row for row in rows}


def number(cell):
    return float(re.sub(r"[^\d.]", "", cell))


def test_the_readme_repeats_the_measured_tables():
    token, start, peers = table("token"), table("start"), table("peers")
    exact, likely, prompt = 1, 5, 7  # columns
    int8, bf16 = ({i: number(token[dtype][i]) for i in (exact, 3, likely, prompt)} for dtype in ("int8", "bf16"))
    sentences = [
        f"{int8[exact]:.1f} ms per token; reading the weights alone takes {int8[3]:.1f} ms",
        f"{int8[likely]:.1f} ms; in bf16 {bf16[likely]:.1f} ms instead of {bf16[exact]:.1f}",
        f"{int8[prompt]:.0f} ms; in bf16 {bf16[prompt]:.0f} ms",
    ]
    llama, openvino = (peers["int8, prompt of 512", name] for name in ("llama.cpp", "openvino"))
    ratios = [f"{number(row[column]):.1f}" for row in (llama, openvino) for column in (3, 5)]
    sentences.append("{} and {} times the speed of llama.cpp, {} and {} times OpenVINO".format(*ratios))
    products = table("products")["9,216 x 2,304, 256 tokens"]
    sentences.append("{} (bf16), {} (int8), {} (int4) GFLOP/s".format(*products[1:4]))
    attention = table("attention")["8,192 queries, 8,192 keys, window 512"]
    sentences.append(f"{number(attention[3]):.0f} times the speed of torch")
    warm, first = (number(start[name][1]) for name in ("kernels compiled before", "the first run of all"))
    sentences.append(f"{warm:.1f} s; {first:.1f} s with an empty kernel cache")
    missing = [sentence for sentence in sentences if sentence not in README]
    assert not missing, f"README.md should say: {missing}"


def test_the_readme_repeats_what_int8_costs():
    page = (ROOT / "docs" / "accuracy.md").read_text("utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| int8 |")).split("|")
    assert f"mean KL {number(row[3]):.4f} nats" in README


def test_pages_agree_on_the_demo_file_and_on_the_tokens_read():
    size, read = f"{SIZE // 10**6} MB", "12,288 tokens of English"
    assert size in README and size in (ROOT / "weights" / "README.md").read_text("utf-8")
    assert read in README and read in (ROOT / "docs" / "accuracy.md").read_text("utf-8")


def test_the_readme_says_for_which_processor_its_numbers_hold():
    numbers = README.split("## Numbers")[1].split("\n## ")[0]
    assert "| AVX2, two cores |" in numbers and "**AVX2**" in numbers
    ratios = [line for line in README.replace(numbers, "").splitlines() if re.search(r"\d times the speed", line)]
    assert not ratios, "a ratio of speeds stands where its class of processor is not said"
