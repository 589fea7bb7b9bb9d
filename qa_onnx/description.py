"""A bundle's manifest in words, as `python -m qa_onnx info` prints it."""

from __future__ import annotations

from typing import Any

from qa_onnx.errors import short_repr
from qa_onnx.manifest import Manifest


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
        ("context window", _windows(manifest)),
        ("vocabulary", f"{manifest.vocab_size:,} tokens"),
        ("parity", _parity(manifest.parity)),
        ("precision loss", _precision_loss(manifest.precision_loss)),
        ("no answer", _no_answer(manifest.no_answer)),
        ("scores", _scores(manifest.scores)),
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


def _windows(manifest: Manifest) -> str:
    settings = manifest.window_settings
    size = settings.window or manifest.max_positions
    return (
        f"{size:,} tokens of a context at once, of {manifest.max_positions:,} positions; longer contexts are read in "
        f"windows that share {settings.stride:,} tokens"
    )


def _scores(found: dict[str, Any]) -> str:
    if "slope" not in found:
        return "probabilities under the model, not calibrated"
    return (
        f"calibrated on {_value(found.get('questions'))} questions of {_value(found.get('source'))}; expected "
        f"calibration error {_value(found.get('ece_after'))}, before {_value(found.get('ece_before'))}"
    )


def _no_answer(found: dict[str, Any]) -> str:
    if "threshold" not in found:
        return "no threshold; `python -m qa_onnx calibrate` finds one"
    made = ", made of the others" if found.get("pairs_made") is True else ""
    share = found.get("no_answer_percent")
    got = f"; {_value(share)} % of those get none" if _is_number(share) else ""
    return (
        f"above a probability of {_value(found['threshold'])}, found on {_value(found.get('source'))} "
        f"({_value(found.get('questions'))} questions, {_value(found.get('without_answer'))} without an answer{made}"
        f"{got})"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _value(value: object) -> str:
    """A value for people: numbers in three digits behind the point at most, all else as it is, cut where it is long."""
    if not _is_number(value):
        return short_repr(value, quote=False)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}".rstrip("0").rstrip(".")
