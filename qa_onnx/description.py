"""A bundle's manifest in words, as `python -m qa_onnx info` prints it."""

from __future__ import annotations

from typing import Any

from qa_onnx.bundle import Manifest
from qa_onnx.errors import short_repr


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """A bundle as pairs of a label and its value, in the order to show them.

    Only the manifest's own fields have known types. What is inside of reports is shown whatever it is.
    """
    width = manifest.heads * manifest.head_size
    size = sum(file["bytes"] for file in manifest.files.values())
    versions = [f"{_value(name)} {_value(version)}" for name, version in manifest.package_versions.items()]
    lines = [
        ("model", f"GPT-2, {manifest.layers} layers of {manifest.heads} heads, width {width:,}"),
        ("exported from", _value(manifest.source_model)),
        ("precision", manifest.precision),
        ("size", f"{size / 1e6:,.1f} MB in {len(manifest.files)} files, all checksums right"),
        ("context window", f"{manifest.max_positions:,} tokens; longer contexts are read in windows"),
        ("vocabulary", f"{manifest.vocab_size:,} tokens"),
        ("parity", _parity(manifest.parity)),
        ("precision loss", _precision_loss(manifest.precision_loss)),
        ("no answer", _no_answer(manifest.no_answer)),
        ("bundle format", str(manifest.format_version)),
        ("made with", ", ".join(versions)),
    ]
    return [(label, value) for label, value in lines if value]


def _parity(report: dict[str, Any]) -> str:
    if not report:
        return ""
    differences = report.get("max_logprob_difference")
    numbers = [value for value in (differences.values() if isinstance(differences, dict) else ()) if _is_number(value)]
    most = f"; log-probabilities differ by at most {max(numbers):.1e}" if numbers else ""
    differing = report.get("tokens_differing")
    equal = "every token equals PyTorch's" if differing == 0 else f"{_value(differing)} tokens differ from PyTorch's"
    return f"{equal} in fp32 on {_value(report.get('prompts'))} prompts, {_value(report.get('source'))}{most}"


def _precision_loss(report: dict[str, Any]) -> str:
    """Empty in fp32, where there is none."""
    if not report:
        return ""
    equal = f"{_value(report.get('equal_answers_percent'))} % of answers equal those of fp32"
    if "f1_drop" not in report:
        return f"{equal}; loss of F1 not measured"
    return f"{equal}; F1 falls by {_value(report['f1_drop'])} points on {_value(report.get('questions'))} questions"


def _no_answer(found: dict[str, Any]) -> str:
    if "threshold" not in found:
        return "no threshold; `python -m qa_onnx calibrate` finds one"
    return (
        f"above a probability of {_value(found['threshold'])}, found on {_value(found.get('source'))} "
        f"({_value(found.get('questions'))} questions, {_value(found.get('without_answer'))} without an answer)"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _value(value: object) -> str:
    """A value for people: numbers in three digits behind the point at most, all else as it is, cut where it is long."""
    if not _is_number(value):
        return short_repr(value, quote=False)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}".rstrip("0").rstrip(".")
