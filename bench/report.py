"""Tables and plots from results: `python -m bench.report RESULT.json [--plot FILE.png]`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = ("qa_onnx fp32", "qa_onnx int8")


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


def _where(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    return f"{result['threads']} threads of {result['machine']['processor']}; {versions}."


def plot(result: dict[str, Any], output: Path) -> None:
    """Draws answers a second as bars, with every round's sample as a dot."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["status"] == "measured"][::-1]
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    colors = ["#1f77b4" if row["name"] in OURS else "#9aa5b1" for row in rows]
    axes.barh([row["name"] for row in rows], [row["answers_per_second"] for row in rows], color=colors)
    for place, row in enumerate(rows):
        samples = [result["questions"] / seconds for seconds in row["seconds"]]
        axes.plot(samples, [place] * len(samples), "k.", markersize=3)
        label = f"{row['answers_per_second']:.1f}"
        axes.annotate(label, (max(samples), place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_xlabel("answers a second")
    axes.set_title(
        f"{result['workload']}: {result['questions']} questions on {result['passages']} passages", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(output, dpi=150)


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="A table, and a plot, of a result.")
    parser.add_argument("result", type=Path, metavar="RESULT")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="of bench.throughput's result")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    if result["benchmark"] == "latency":
        print(latency_table(result))
        return 0
    print(table(result))
    if arguments.plot is not None:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
