"""The plots of a finished run: its curves, and the lengths of its rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.stats import DatasetStats


def plot_curves(history: Sequence[dict[str, Any]], learning_rates: Sequence[float]) -> Figure:
    """Loss and scores where they were measured, and the learning rate at every step."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, rate, score = figure.subplots(1, 3)
    _plot(loss, [(row["step"], row["loss"]) for row in history if "loss" in row])
    _plot(rate, list(enumerate(learning_rates, 1)))
    for name, label in (("exact_match", "exact match"), ("f1", "F1")):
        _plot(score, [(row["step"], row[name]) for row in history if name in row], label=label)
    score.legend(frameon=False)
    score.set_ylim(0, 1.15 * max(row["f1"] for row in history if "f1" in row) + 1.0)
    for axes, label in ((loss, "loss"), (rate, "learning rate"), (score, "score, %")):
        axes.set_xlim(0, max(len(learning_rates), 1))
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    return figure


def plot_lengths(stats: DatasetStats) -> Figure:
    """A histogram of the rows' lengths."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    width = stats.length_step
    axes.bar(list(stats.lengths), list(stats.lengths.values()), width=width * 0.9, align="edge")
    axes.set_xlabel(f"tokens of a row, {width} per bar" if width > 1 else "tokens of a row")
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _plot(axes: Axes, points: Sequence[tuple[int, float]], **options: Any) -> None:
    """A line; with marks if there are too few points for a line to show."""
    marker = "o" if len(points) < 20 else ""
    axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, markersize=3, clip_on=False, **options)
