"""Tables and plots from results: `python -m bench.report RESULT.json [--plot FILE.png]`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = ("qa_onnx fp32", "qa_onnx bf16", "qa_onnx int8")


def ratio(result: dict[str, Any], ours: str, peer: str) -> float | None:
    """How many times faster `ours` is, the median over rounds; None where one of them was not measured."""
    rows = {row["name"]: row["seconds"] for row in result["rows"] if row["status"] == "measured"}
    if ours not in rows or peer not in rows:
        return None
    return statistics.median(theirs / mine for mine, theirs in zip(rows[ours], rows[peer], strict=True))


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table, with the machine and the versions below."""
    ours = [name for name in OURS if any(row["name"] == name for row in result["rows"])]
    lines = [
        f"{result['workload']}: {result['questions']} questions on {result['passages']} passages, at most "
        f"{result['max_new_tokens']} new tokens; {result['model']}",
        "",
        "| | answers/s | batch | " + " | ".join(f"{name} is" for name in ours) + " | tokens equal | peak RSS | load |",
        "| --- |" + " ---: |" * (5 + len(ours)),
    ]
    for row in result["rows"]:
        if row["status"] != "measured":
            lines.append(f"| {row['name']} | {row['status']} |" + " |" * (4 + len(ours)))
            continue
        factors = [ratio(result, name, row["name"]) for name in ours]
        lines.append(
            f"| {row['name']} | {row['answers_per_second']:.2f} | {row['batch_size']} | "
            + " | ".join("" if factor is None else f"{factor:.1f}x" for factor in factors)
            + f" | {row.get('equal_tokens_percent', float('nan')):.1f} % | {row['peak_rss_mib']:,.0f} MiB "
            f"| {row['load_seconds']:.1f} s |"
        )
    return "\n".join([*lines, "", f"Median of {result['rounds']} rounds; {_where(result)}"])


def latency_table(result: dict[str, Any]) -> str:
    """A result of `bench.latency` as a Markdown table, with the machine and the versions below."""
    lines = [
        f"One question at a time on {result['passages']} passages, {result['max_new_tokens']} new tokens; "
        f"{result['model']}. Milliseconds:",
        "",
        "| | first question p50 | p95 | p99 | second question p50 | p95 | p99 | peak RSS |",
        "| --- |" + " ---: |" * 7,
    ]
    for row in result["rows"]:
        if row["status"] != "measured":
            lines.append(f"| {row['name']} | {row['status']} |" + " |" * 6)
            continue
        values = [f"{value:,.0f}" for kind in ("first_ms", "second_ms") for value in row[kind].values()]
        lines.append(f"| {row['name']} | {' | '.join(values)} | {row['peak_rss_mib']:,.0f} MiB |")
    return "\n".join([*lines, "", _where(result)])


def scaling_table(result: dict[str, Any]) -> str:
    """A result of `bench.scaling` as a Markdown table, with the machine and the versions below."""
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    lines = [
        f"Answers a second; {result['questions']} questions at each point, {result['max_new_tokens']} new tokens; "
        f"{result['model']}",
        "",
        "| | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for axis, value in dict.fromkeys((row["axis"], row["value"]) for row in result["rows"]):
        cells = {
            row["name"]: f"{row['answers_per_second']:.2f}" if row["status"] == "measured" else row["status"]
            for row in result["rows"]
            if (row["axis"], row["value"]) == (axis, value)
        }
        lines.append(f"| {axis.replace('_', ' ')} {value} | " + " | ".join(cells[name] for name in names) + " |")
    return "\n".join([*lines, "", f"Median of {result['rounds']} rounds; {_where(result)}"])


def roofline_table(result: dict[str, Any]) -> str:
    """A result of `bench.roofline` as a Markdown table, with the machine and the versions below."""
    rates = result["gemm_rates"]
    peaks = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    lines = [
        f"GEMM peak of a layer's shapes: {peaks}; reading memory: {result['memory_rate'] / 1e9:.1f} GB/s",
        "",
        "| | GFLOP/s | of the GEMM peak | FLOP/byte | of what memory allows |",
        "| --- |" + " ---: |" * 4,
    ]
    for point in result["points"]:
        rate, intensity = point["operations"] / point["seconds"], point["operations"] / point["bytes"]
        where = f"{point['precision']} {point['phase']}, {point['rows']} {'row' if point['rows'] == 1 else 'rows'}"
        lines.append(
            f"| {where} | {rate / 1e9:.1f} | {rate / rates[point['precision']]:.0%} | {intensity:.1f} "
            f"| {rate / (intensity * result['memory_rate']):.0%} |"
        )
    return "\n".join([*lines, "", _where(result)])


def callers_table(result: dict[str, Any]) -> str:
    """A result of `bench.latency --concurrency` as a Markdown table, with the machine and the versions below."""
    lines = [
        f"{result['concurrency']} callers ask {result['questions']} questions, at most {result['max_new_tokens']} new "
        f"tokens; {result['model']}",
        "",
        "| | callers | answer_batch, answers/s | callers, answers/s | of answer_batch | answers equal "
        "| waited p50 | p95 | p99 |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for row in result["rows"]:
        batch, callers = statistics.median(row["batch_seconds"]), statistics.median(row["seconds"])
        ratio = statistics.median(one / other for one, other in zip(row["batch_seconds"], row["seconds"], strict=True))
        equal = row["equal"] / result["questions"] / result["rounds"]
        waits = " | ".join(f"{seconds:.2f} s" for seconds in row["seconds_waited"].values())
        lines.append(
            f"| {row['name']} | {row['callers']} | {result['questions'] / batch:.2f} "
            f"| {result['questions'] / callers:.2f} | {ratio:.0%} | {equal:.1%} | {waits} |"
        )
    return "\n".join([*lines, "", f"Median of {result['rounds']} rounds; {_where(result)}"])


def training_table(result: dict[str, Any]) -> str:
    """A result of `bench.training` as a Markdown table, with the machine and the versions below."""
    first = result["rows"][0]
    lines = [
        f"Training on {result['questions']} questions of {result['passages']} passages, {result['tokens']} tokens; "
        f"{result['model']}, {result['device']}",
        "",
        f"| | tokens/s | questions/s | compared with {first['name']} | tokens computed | peak memory |",
        "| --- |" + " ---: |" * 5,
    ]
    for row in result["rows"]:
        factor = statistics.median(theirs / mine for mine, theirs in zip(row["seconds"], first["seconds"], strict=True))
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:,.0f} | {row['questions_per_second']:.2f} | {factor:.1f}x "
            f"| {row['tokens_computed']:,} | {row['peak_mib']:,.0f} MiB |"
        )
    return "\n".join([*lines, "", f"Median of {result['rounds']} rounds; {_where(result)}"])


def render(result: dict[str, Any]) -> str:
    """The table of any result: a headline, the table, and where it was measured, with empty lines between them."""
    tables = {
        "throughput": table,
        "latency": latency_table,
        "callers": callers_table,
        "scaling": scaling_table,
        "roofline": roofline_table,
        "training": training_table,
        "look-ahead": look_ahead_table,
    }
    return tables[result["benchmark"]](result)


def look_ahead_table(result: dict[str, Any]) -> str:
    """A result of `bench.look_ahead` as a Markdown table, with the machine and the versions below."""
    length = f"{result['max_new_tokens']} new tokens" if result["ignore_eos"] else "as many tokens as the model gives"
    first = result["rows"][0]["seconds"]
    lines = [
        f"The second question on each of {result['passages']} passages, {length}; {result['model']}, "
        f"{result['precision']}",
        "",
        "| | p50 ms | of the plain graph's | decode steps each | drafts accepted | answers with the kernels' bits |",
        "| --- |" + " ---: |" * 5,
    ]
    for row in result["rows"]:
        factor = statistics.median(one / other for one, other in zip(row["seconds"], first, strict=True))
        share = f"{row['accepted_draft_tokens'] / row['draft_tokens']:.0%}" if row["draft_tokens"] else "-"
        lines.append(
            f"| {row['name']} | {row['p50_ms']:.1f} | {factor:.2f} | {row['steps_each']:.2f} | {share} "
            f"| {row['equal_percent']:.1f} % |"
        )
    return "\n".join([*lines, "", f"Ratios are medians over the questions; {_where(result)}"])


def _where(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    return f"{result['threads']} threads of {result['machine']['processor']}; {versions}."


def plot(result: dict[str, Any], output: Path) -> None:
    """Draws a result as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    {"throughput": _bars, "latency": _waits, "scaling": _lines, "roofline": _roofs}[result["benchmark"]](result, figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=130)


def _color(name: str) -> str:
    ours = {"qa_onnx fp32": "#1f77b4", "qa_onnx bf16": "#2f5d9b", "qa_onnx int8": "#0b3d66"}
    theirs = {"transformers": "#d98b36", "Optimum": "#a05195", "CTranslate2": "#5b8f5b", "OpenVINO": "#c44e52"}
    return ours.get(name) or theirs.get(name.split()[0], "#9aa5b1")


def _style(name: str) -> str:
    """Solid for fp32, dashed for everything narrower."""
    return "-" if name.endswith("fp32") else "--"


def _bars(result: dict[str, Any], figure: Figure) -> None:
    """Answers per second, every round a dot; and speed against agreement."""
    rows = [row for row in result["rows"] if row["status"] == "measured"]
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
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
    for row in rows:
        if "equal_tokens_percent" in row:
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
        axes.set(xlabel="milliseconds: p50, and p95 and p99 as strokes", title=f"{kind} question on a passage")


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
    """Rates against operations a byte, under the machine's roofs; the numbers at the points are rows."""
    axes = figure.subplots()
    intensities = [point["operations"] / point["bytes"] for point in result["points"]]
    ends = [min(intensities) / 2, max(intensities) * 2]
    for precision, peak in result["gemm_rates"].items():
        ridge = peak / result["memory_rate"]
        heights = [ends[0] * result["memory_rate"] / 1e9, peak / 1e9, peak / 1e9]
        name = f"qa_onnx {precision}"
        axes.plot(
            [ends[0], ridge, max(ends[1], ridge)], heights, _style(name), color=_color(name), label=f"roof, {precision}"
        )
    for precision in result["gemm_rates"]:
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
    axes.set(xscale="log", yscale="log", xlabel="operations a byte read; at the points: rows", ylabel="GFLOP/s")
    axes.legend(loc="lower right", fontsize=8)


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="A table, and a plot, of a result.")
    parser.add_argument("result", type=Path, metavar="RESULT")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    print(render(result))
    if arguments.plot is not None:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
