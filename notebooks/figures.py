"""Plotting helpers of the notebooks: one palette, one width, and the plots that several notebooks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 9.0  # inches; fits a notebook's column
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6db3", "#e07b39", "#3a9a6d", "#8a5fb0", "#8c8c8c"
LOCAL, GLOBAL, RECURRENT = BLUE, ORANGE, GREEN  # kinds of layers, the same in every notebook
FAMILY = {"gemma": GREY, "gemma2": BLUE, "gemma3": ORANGE, "recurrentgemma": GREEN}  # the same in every notebook

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "image.cmap": "magma",
        "image.interpolation": "nearest",
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, GREY]),
    }
)


def figure(rows: int = 1, columns: int = 1, height: float = 3.2, **options: Any) -> tuple[Figure, Any]:
    """Returns a figure of the page's width and its axes; height in inches."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **options)


def matrix(axes: Axes, values: np.ndarray, title: str, x: str, y: str, **options: Any) -> Any:
    """Draws values [rows, columns] as an image without grid lines; returns the image, for a color bar."""
    image = axes.imshow(values, aspect=options.pop("aspect", "auto"), **options)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(False)
    return image


def stacked_bars(axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], unit: str) -> None:
    """Draws one horizontal bar per name, stacked from `parts` in order; the first name is on top."""
    left = np.zeros(len(names))
    for label, sizes in parts.items():
        axes.barh(names, sizes, left=left, label=label)
        left += np.asarray(sizes, float)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend(frameon=False)


def token_labels(axes: Axes, pieces: Sequence[str], x: bool = True, y: bool = True) -> None:
    """Labels the axes with the tokens of a text; blanks are shown as ␣ and line ends as ⏎."""
    shown = [piece.replace(" ", "␣").replace("\n", "⏎") for piece in pieces]
    if x:
        axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=7)
    if y:
        axes.set_yticks(range(len(shown)), shown, fontsize=7)
