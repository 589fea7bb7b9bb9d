"""The results of benchmarks as plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(result: dict[str, Any], output: Path) -> None:
    """Draws a result of `bench.throughput`, `bench.latency`, `bench.scaling` or `bench.roofline` as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    {"throughput": _bars, "latency": _waits, "scaling": _lines, "roofline": _roofs}[result["benchmark"]](result, figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=130)


def _color(name: str) -> str:
    ours = {"qa_onnx fp32": "#1f77b4", "qa_onnx bf16": "#2f5d9b", "qa_onnx int8": "#0b3d66"}
    theirs = {"transformers": "#d98b36", "Optimum": "#a05195", "CTranslate2": "#5b8f5b", "OpenVINO": "#c44e52"}
    theirs |= {"vLLM": "#7f6d5f", "llama.cpp": "#b0a030"}
    return ours.get(name) or theirs.get(name.split()[0], "#9aa5b1")


def _style(name: str) -> str:
    """Solid for fp32, dashed for lower precisions."""
    return "-" if name.endswith("fp32") else "--"


def _bars(result: dict[str, Any], figure: Figure) -> None:
    """Answers per second, every round a dot; and speed against agreement, where that was measured."""
    rows = [row for row in result["rows"] if row["status"] == "measured"]
    compared = [row for row in rows if "equal_tokens_percent" in row]
    left, *others = figure.subplots(1, 2, width_ratios=(3, 2)) if compared else [figure.subplots()]
    for place, row in enumerate(reversed(rows)):
        samples = [result["questions"] / seconds for seconds in row["seconds"]]
        left.barh(row["name"], row["answers_per_second"], color=_color(row["name"]))
        left.plot(samples, [place] * len(samples), "k.", markersize=3)
        label = f"{row['answers_per_second']:.1f}"
        left.annotate(label, (max(samples), place), xytext=(6, 0), textcoords="offset points", va="center")
    left.set_xlabel("answers per second")
    left.set_title(
        f"{result['workload']}: {result['questions']} questions on {result['passages']} passages", loc="left"
    )
    left.margins(x=0.12)
    if not compared:
        return
    (right,) = others
    for row in compared:
        right.plot(
            row["answers_per_second"],
            row["equal_tokens_percent"],
            "o",
            color=_color(row["name"]),
            fillstyle="full" if _style(row["name"]) == "-" else "none",
            label=row["name"],
        )
    figure.legend(*right.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    right.set(xlabel="answers per second", ylabel="tokens equal to PyTorch fp32, %")
    right.set(xlim=(0, None), ylim=(None, 101))


def _waits(result: dict[str, Any], figure: Figure) -> None:
    """Milliseconds of the first and the second question on a passage, p50, p95 and p99."""
    rows = [row for row in result["rows"] if row["status"] == "measured"]
    for axes, kind in zip(figure.subplots(1, 2, sharey=True, sharex=True), ("first", "second"), strict=True):
        for row in reversed(rows):
            waits = list(row[f"{kind}_ms"].values())
            axes.barh(row["name"], waits[0], color=_color(row["name"]))
            axes.plot(waits, [row["name"]] * len(waits), "k|", markersize=9)
        axes.set(xlabel="milliseconds: p50 (bar), p95 and p99 (marks)", title=f"{kind} question on a passage")


def _lines(result: dict[str, Any], figure: Figure) -> None:
    """Answers per second along each axis."""
    rows = [row for row in result["rows"] if row["status"] == "measured"]
    panels = list(figure.subplots(2, 2).flat)
    for axes, axis in zip(panels, dict.fromkeys(row["axis"] for row in rows), strict=False):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [
                (row["value"], row["answers_per_second"]) for row in rows if (row["name"], row["axis"]) == (name, axis)
            ]
            axes.plot(*zip(*points, strict=True), _style(name), marker=".", color=_color(name), label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values := sorted({row["value"] for row in rows if row["axis"] == axis}), map(str, values))
        axes.set(xlabel=axis.replace("_", " "), ylim=(0, None))
    panels[0].set_ylabel("answers per second")
    panels[1].legend(fontsize=7)


def _roofs(result: dict[str, Any], figure: Figure) -> None:
    """Rates against operations a byte, below the limits of the machine; the numbers at the points are sequences."""
    axes = figure.subplots()
    intensities = [point["operations"] / point["bytes"] for point in result["points"]]
    ends = [min(intensities) / 2, max(intensities) * 2]
    for precision, peak in result["gemm_rates"].items():
        ridge = peak / result["memory_rate"]
        heights = [ends[0] * result["memory_rate"] / 1e9, peak / 1e9, peak / 1e9]
        name = f"qa_onnx {precision}"
        axes.plot(
            [ends[0], ridge, max(ends[1], ridge)],
            heights,
            _style(name),
            color=_color(name),
            label=f"limit, {precision}",
        )
    for precision in dict.fromkeys(point["precision"] for point in result["points"]):
        for phase, marker in (("decode", "o"), ("prefill", "D")):
            points = sorted(
                (point["operations"] / point["bytes"], point["operations"] / point["seconds"] / 1e9, point["rows"])
                for point in result["points"]
                if (point["precision"], point["phase"]) == (precision, phase)
            )
            places = [(intensity, rate) for intensity, rate, _ in points]
            color = _color(f"qa_onnx {precision}")
            axes.plot(*zip(*places, strict=True), ":", marker=marker, color=color, label=f"{phase}, {precision}")
            for place, (_, _, rows) in zip(places, points, strict=True):
                axes.annotate(str(rows), place, xytext=(6, -9), textcoords="offset points", fontsize=7, color=color)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte read; points: sequences", ylabel="GFLOP/s")
    axes.legend(loc="lower right", fontsize=8)
