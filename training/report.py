"""What a finished run leaves beside the model: metrics, history, plots, a report and a model card."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qa_onnx.data.example import Example
from qa_onnx.evaluation.metrics import score_example
from qa_onnx.files import public_name, write_file
from qa_onnx.text.prompt import PROMPT_TEMPLATE
from training.holdout import HELDOUT_NAME, Overlap, share_of
from training.overview import Overview
from training.settings import FinetuneConfig
from training.sources import SAMPLES, Source

METRICS_NAME, HISTORY_NAME, REPORT_NAME, CARD_NAME = "metrics.json", "history.csv", "report.md", "README.md"
CURVES_NAME, LENGTHS_NAME = "training.png", "lengths.png"
COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "exact_match", "f1")
WORST = 12
KNOWN_NAMES = {"gpt2": "GPT-2", "starter": "The starter GPT-2", "squad": "SQuAD", "squad_v2": "SQuAD v2.0"}
"""What models and sources are called in titles, where not by their own names."""
TITLE_SOURCES = 3
NORMAL_95 = 1.959964
"""The quantile of the normal distribution that 95 % confidence takes."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def escape_markdown(text: str) -> str:
    """Text on one line of Markdown that shows as it is: no markup, HTML, link or border of a table's cell in it.

    A backslash makes any ASCII punctuation plain (CommonMark 0.31, 2.4; so does GitHub's `|`), and entities are never
    markup (2.5). `<` and `&` are entities, because not every renderer knows them behind a backslash.
    """
    text = " ".join(CONTROL_CHARACTERS.sub(" ", text).split())
    text = re.sub(r"[\\`*_\[\]#|~$]", r"\\\g<0>", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"^(\d{1,9})([.)])|^(?=[-+=])", r"\1\\\2", text)  # a list's or a heading's mark
    return re.sub(r"(?i)(?<=www)\.|:(?=//)", r"\\\g<0>", text)  # GitHub links bare addresses


def history_of(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each logged step, with the names of `COLUMNS`; what was not measured at a step is left out."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        named = {name.removeprefix("eval_"): value for name, value in entry.items()}
        rows.setdefault(entry["step"], {}).update({name: named[name] for name in COLUMNS if name in named})
    return [rows[step] for step in sorted(rows) if len(rows[step]) > 2]


def hardware() -> str:
    """The device that trained, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}, {platform.system()}"


def worst_examples(examples: Sequence[Example], answers: dict[str, str]) -> list[tuple[Example, str, float]]:
    """The wrong answers with the lowest F1, with their questions and F1 (0 to 1), in the order of the file.

    An answer is wrong that is no exact match and has an F1 below 1; so is any where there is none to give.
    """
    scored = [(example, *score_example(example, answers[example.id])) for example in examples]
    wrong = [(example, answers[example.id], f1) for example, exact, f1 in scored if not exact and f1 < 1]
    return sorted(wrong, key=lambda item: item[2])[:WORST]


def wilson_interval(percent: float, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a mean score, in percent: Wilson's (1927), questions taken as independent.

    It is that of a share. F1 varies less than a share of the same mean, so that its interval is on the wide side.

    Args:
        percent: The score, from 0 to 100.
        total: Questions that it is the mean of.
    """
    share, z2 = percent / 100, NORMAL_95**2 / total
    center, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return 100 * (center - half) / (1 + z2), 100 * (center + half) / (1 + z2)


def title_of(config: FinetuneConfig) -> str:
    """A title for the model, of what it began with and was trained on, without directories."""

    def named(name: str) -> str:
        return KNOWN_NAMES.get(name, Path(public_name(name)).name)

    model = (
        named(config.model) if config.model is not None else f"{named(str(config.from_scratch))} from random weights"
    )
    sources = [named(name) for name in config.train]
    more = len(sources) - TITLE_SOURCES
    shown = [*sources[:TITLE_SOURCES], *([f"{more} more"] if more > 0 else [])]
    listed = " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
    return f"{model} for question answering, fine-tuned on {listed}"


def write_report(
    output: Path,
    *,
    config: FinetuneConfig,
    sources: Sequence[Source],
    eval_source: Source,
    overlap: Overlap,
    overview: Overview,
    metrics: dict[str, Any],
    history: Sequence[dict[str, Any]],
    learning_rates: Sequence[float],
    worst: Sequence[tuple[Example, str, float]],
) -> None:
    """Writes `metrics.json`, `history.csv`, the plots, `report.md` and the model card (`README.md`) to `output`."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(history)
    write_file(output / HISTORY_NAME, table.getvalue())
    write_file(output / CURVES_NAME, _png(_curves(history, learning_rates)))
    write_file(output / LENGTHS_NAME, _png(_lengths(overview)))
    write_file(output / REPORT_NAME, _report(config, sources, eval_source, overlap, overview, metrics, worst))
    write_file(output / CARD_NAME, _card(config, sources, eval_source, overlap, metrics))
    write_json(output / METRICS_NAME, metrics)  # last: with it a run is finished


def _curves(history: Sequence[dict[str, Any]], learning_rates: Sequence[float]) -> Figure:
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


def _plot(axes: Axes, points: Sequence[tuple[int, float]], **options: Any) -> None:
    """A line; with marks where there are too few points for one to show."""
    marker = "o" if len(points) < 20 else ""
    axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, markersize=3, clip_on=False, **options)


def _lengths(overview: Overview) -> Figure:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    width = overview.length_step
    axes.bar(list(overview.lengths), list(overview.lengths.values()), width=width * 0.9, align="edge")
    axes.set_xlabel(f"tokens of a row, {width} a bar" if width > 1 else "tokens of a row")
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _report(
    config: FinetuneConfig,
    sources: Sequence[Source],
    eval_source: Source,
    overlap: Overlap,
    overview: Overview,
    metrics: dict[str, Any],
    worst: Sequence[tuple[Example, str, float]],
) -> str:
    settings = config.to_dict()
    versions = settings.pop("package_versions")
    data = [
        (
            escape_markdown(public_name(figures["name"])),
            figures["questions"],
            figures["passages"],
            figures["bad_rows"],
            figures["answers_repaired"],
            figures["answers_absent"],
            figures["sha256"][:16],
        )
        for figures in (source.to_dict() for source in (*sources, eval_source))
    ]
    evaluations = [
        (f"{row['epoch']:.2f}", row["step"], f"{row['exact_match']:.2f}", f"{row['f1']:.2f}")
        for row in metrics["evaluations"]
    ]
    missed = [
        (
            escape_markdown(example.question),
            escape_markdown(answer) or "(none)",
            escape_markdown(" / ".join(gold.text for gold in example.answers)) or "(none)",
            f"{100 * f1:.0f}",
        )
        for example, answer, f1 in worst
    ]
    lines = [
        f"# {escape_markdown(title_of(config))}",
        "",
        f"{_scores(metrics, eval_source)} At step {metrics['best_step']} of {metrics['steps']}. "
        f"{metrics['seconds']:.0f} s since the last start, on {hardware()}.",
        "",
        str(overlap),
        "",
        f"![loss, learning rate and scores]({CURVES_NAME})",
        "",
        "## Evaluations",
        "",
        *_table(("epoch", "step", "exact match", "F1"), evaluations),
        "",
        "## Data",
        "",
        *_table(
            ("source", "questions", "passages", "bad rows", "answers repaired", "answers absent", "sha256 of examples"),
            data,
        ),
        "",
        f"Trained on {metrics['train_questions']} questions of these, "
        f"{metrics['train_questions_without_answer']} of them without an answer, and on "
        f"{metrics['questions_made_without_answer']} without an answer that were made of them, asked about other "
        f"passages: {overview.rows} rows with {overview.questions} "
        f"questions, {overview.windows} of them about a part of a long passage ({overview.left_out} windows without an "
        f"answer left out); {overview.tokens} tokens, "
        f"{overview.counted} of them in the loss; {overview.padding:.1%} of a batch is padding.",
        "",
        f"Passages are read in windows of up to {metrics['window']} tokens, of which neighbors share "
        f"{metrics['stride']}.",
        "",
        f"![lengths of the rows]({LENGTHS_NAME})",
        "",
        "## The worst answers",
        "",
        *(_table(("question", "answer", "gold", "F1"), missed) if missed else ["No answer is wrong."]),
        "",
        "## Settings",
        "",
        *_table(
            ("setting", "value"), [(name, _cell(value)) for name, value in settings.items() if value not in (None, [])]
        ),
        "",
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}, Python "
        f"{platform.python_version()}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return f"`{value}`"
    return escape_markdown(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _is_hub_id(name: str) -> bool:
    return not Path(name).is_absolute() and not Path(name).exists()


def _scores(metrics: dict[str, Any], eval_source: Source) -> str:
    """The scores in a sentence: with their confidence intervals, and what they were measured on."""
    total = metrics["eval_questions"]
    exact, f1 = (
        f"{metrics[name]:.2f} % (95 % confidence: {low:.1f} to {high:.1f})"
        for name in ("exact_match", "f1")
        for low, high in [wilson_interval(metrics[name], total)]
    )
    return (
        f"Exact match {exact}, F1 {f1} on {total} questions about {metrics['eval_passages']} passages of "
        f"{escape_markdown(public_name(eval_source.name))}. (Wilson's intervals, questions taken as independent.)"
    )


def _card(
    config: FinetuneConfig,
    sources: Sequence[Source],
    eval_source: Source,
    overlap: Overlap,
    metrics: dict[str, Any],
) -> str:
    name, evaluated_on = title_of(config), public_name(eval_source.name)
    is_held_out = share_of(config.eval) is not None
    hub = [source.name for source in sources if source.name not in SAMPLES and _is_hub_id(source.name)]
    results = [
        EvalResult(
            task_type="question-answering",
            dataset_type="heldout" if is_held_out else Path(evaluated_on).stem,
            dataset_name=evaluated_on,
            metric_type=metric,
            metric_value=round(metrics[metric], 2),
        )
        for metric in ("exact_match", "f1")
    ]
    base = config.model if config.model not in (None, "starter") and _is_hub_id(config.model) else None
    data = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["question-answering", "gpt2", "qa_onnx"],
        base_model=base,
        datasets=hub or None,
        model_name=name,
        eval_results=results,
    )
    began_with = escape_markdown(public_name(config.model or f"random weights ({config.from_scratch})"))
    trained_on = escape_markdown(", ".join(public_name(source.name) for source in sources))
    prompt = PROMPT_TEMPLATE.replace("\n", "\\n")
    heldout = f" (`{HELDOUT_NAME}`)" if is_held_out else ""
    body = f"""
# {escape_markdown(name)}

A GPT-2 that answers questions about a passage, made from {began_with}
with `python -m training.finetune` of qa_onnx. Trained on {metrics["train_questions"]} questions of {trained_on}.

{_scores(metrics, eval_source)}
Answered greedily, scored as SQuAD's script does{heldout}. {overlap}

The prompt is `{prompt}`; the model goes on with ` {{answer}}<|endoftext|>`.

- Use: `python -m export.to_onnx --model DIR --output BUNDLE`, then `qa_onnx.Answerer.from_pretrained("BUNDLE")`.
- Limits: it copies answers from the passage it is given and knows little besides; what it was not trained on (other
  languages, other kinds of text) was not measured.
- Settings, data fingerprints, versions and the worst answers: `report.md`.
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))
