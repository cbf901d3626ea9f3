"""The roofline of this machine, and the speeds of programs under it (Williams et al. 2009)."""

from errno import ENOENT
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARKERS = "osD^v"  # of the programs in a figure


def plottable(path: Path) -> None:
    """Refuse a `path` that `roofline` could not write, before measuring."""
    if find_spec("matplotlib") is None:
        raise ImportError("the figure is drawn by matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:] not in (kinds := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"{path}: no figure format; use .png, or one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(ENOENT, "No such folder", str(path.parent))


def points(report: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """(what, flop per byte of weights, flop per second) of decoding and of each prompt, by program.

    A prompt of T tokens reads the weights once and multiplies them T times, but for the head and most of the last
    layer: the last token's only. What attention computes and reads is left out.
    """
    inner = report["flops_per_token"]
    head = 2 * report["parameters"] - inner
    prompts = {int(n): speeds for n, speeds in report["prefill_tps_of"].items()}
    prompts[report["prompt_tokens"]] = {name: its["prefill_tps"] for name, its in report["programs"].items()}
    found = {}
    for name, its in report["programs"].items():
        found[name] = [("decode", (inner + head) / its["weight_bytes"], (inner + head) * its["decode_tps"])]
        for length in sorted(prompts):
            work = length * inner + head
            speed = work * prompts[length][name] / length
            found[name].append((f"prompt of {length:,}", work / its["weight_bytes"], speed))
    return found


def roofline(report: dict[str, Any], path: Path) -> None:
    """Draw the report's speeds under the machine's limit at each arithmetic intensity (Williams et al. 2009).

    The level roof is of what multiplies this model's prompts: another program's products of integers may lie above.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    bandwidth, peak, found = report["read_bytes_per_second"], report["flops_per_second"], points(report)
    ridge = peak / bandwidth
    reached = [ridge, *(intensity for its in found.values() for _, intensity, _ in its)]
    left, right = min(reached) / 4, max(reached) * 2
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.plot([left, ridge, right], [bandwidth * left / 1e9, peak / 1e9, peak / 1e9], color="black")
    corner: dict[str, Any] = {"xy": (ridge, peak / 1e9), "textcoords": "offset points"}
    axes.annotate(f"reads {bandwidth / 1e9:,.1f} GB/s", xytext=(-9, -3), ha="right", **corner)
    axes.annotate(f"multiplies {peak / 1e9:,.0f} GFLOP/s in {report['multiplies']}", xytext=(0, 6), **corner)
    for (name, ((_, *decode), *prompts)), marker in zip(found.items(), MARKERS, strict=False):
        style: dict[str, Any] = {"markersize": 9, "zorder": 3} if name == "minigemma" else {"markersize": 6}
        drawn = axes.plot([x for _, x, _ in prompts], [y / 1e9 for *_, y in prompts], f"{marker}:", label=name, **style)
        style |= {"color": drawn[0].get_color(), "markerfacecolor": "none"}
        axes.plot(decode[0], decode[1] / 1e9, marker, **style)
    before = 0.0
    for what, intensity, speed in found["minigemma"]:
        right_of = what == "decode"  # and prompts to the left, away from the line between them
        left_of = (-4, 7) if speed > before else (-4, -15)
        beside: dict[str, Any] = {"xytext": (9, -3) if right_of else left_of, "ha": "left" if right_of else "right"}
        before = speed
        axes.annotate(what, (intensity, speed / 1e9), textcoords="offset points", fontsize=9, **beside)
    axes.set_xlabel("arithmetic intensity: flop per byte of weights read")
    axes.set_ylabel("speed: GFLOP/s")
    axes.set_ylim(min(y for its in found.values() for *_, y in its) / 2e9, 1.2 * axes.get_ylim()[1])
    axes.set_xlim(left, right)
    for axis, steps in ((axes.xaxis, [1]), (axes.yaxis, [1, 2, 5])):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{report['name']}, {report['dtype']}, {report['threads']} threads, {report['vectors']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right", title="hollow: decode; filled: prompts")
    figure.savefig(path, dpi=150)
