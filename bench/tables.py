"""The results of benchmarks as Markdown tables, each with the machine and the versions below."""

from __future__ import annotations

import statistics
from typing import Any

OURS = ("qa_onnx fp32", "qa_onnx bf16", "qa_onnx int8")


def ratio(result: dict[str, Any], ours: str, peer: str) -> float | None:
    """How many times faster `ours` is, the median over rounds; None where one of them was not measured."""
    rows = {row["name"]: row["seconds"] for row in result["rows"] if row["status"] == "measured"}
    if ours not in rows or peer not in rows:
        return None
    return statistics.median(theirs / mine for mine, theirs in zip(rows[ours], rows[peer], strict=True))


def throughput_table(result: dict[str, Any]) -> str:
    """A result as a table."""
    ours = [name for name in OURS if any(row["name"] == name for row in result["rows"])]
    optional = {"equal_tokens_percent": "tokens equal", "exact_match": "exact match", "f1": "F1"}
    shown = {key: title for key, title in optional.items() if any(key in row for row in result["rows"])}
    titles = ["answers/s", "batch", *(f"{name} is" for name in ours), *shown.values(), "peak RSS", "load"]
    lines = [
        f"{result['workload']}: {result['questions']} questions on {result['passages']} passages, at most "
        f"{result['max_new_tokens']} new tokens; {result['model']}",
        "",
        f"| | {' | '.join(titles)} |",
        "| --- |" + " ---: |" * len(titles),
    ]
    for row in result["rows"]:
        if row["status"] != "measured":
            lines.append(f"| {row['name']} | {row['status']} |" + " |" * (len(titles) - 1))
            continue
        factors = [ratio(result, name, row["name"]) for name in ours]
        cells = [
            f"{row['answers_per_second']:.2f}",
            str(row["batch_size"]),
            *("" if factor is None else f"{factor:.1f}x" for factor in factors),
            *(f"{row[key]:.1f}" + " %" * (key == "equal_tokens_percent") for key in shown),
            f"{row['peak_rss_mib']:,.0f} MiB",
            f"{row['load_seconds']:.1f} s",
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Median of {result['rounds']} rounds; {_where(result)}"])


def latency_table(result: dict[str, Any]) -> str:
    """A result of `bench.latency` as a table."""
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
    """A result of `bench.scaling` as a table."""
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
    """A result of `bench.roofline` as a table."""
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
        peak = rates.get(point["precision"])  # ONNX Runtime multiplies no bfloat16 on the CPU
        share = "" if peak is None else f"{rate / peak:.0%}"
        where = f"{point['precision']} {point['phase']}, {point['rows']} {'row' if point['rows'] == 1 else 'rows'}"
        lines.append(
            f"| {where} | {rate / 1e9:.1f} | {share} | {intensity:.1f} "
            f"| {rate / (intensity * result['memory_rate']):.0%} |"
        )
    return "\n".join([*lines, "", _where(result)])


def callers_table(result: dict[str, Any]) -> str:
    """A result of `bench.latency --concurrency` as a table."""
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
    """A result of `bench.training` as a table."""
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


def look_ahead_table(result: dict[str, Any]) -> str:
    """A result of `bench.look_ahead` as a table."""
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


def render(result: dict[str, Any]) -> str:
    """The table of any result: a headline, the table, and where it was measured, with empty lines between them."""
    tables = {
        "throughput": throughput_table,
        "latency": latency_table,
        "callers": callers_table,
        "scaling": scaling_table,
        "roofline": roofline_table,
        "training": training_table,
        "look-ahead": look_ahead_table,
    }
    return tables[result["benchmark"]](result)
