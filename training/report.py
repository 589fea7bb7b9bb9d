"""What a finished run leaves beside the model: metrics, history, plots, a report and a model card."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure

from qa_onnx.data.example import Example
from qa_onnx.evaluation.metrics import score_example
from qa_onnx.text.prompt import PROMPT_TEMPLATE
from training.overview import HISTOGRAM_STEP, Overview
from training.settings import FinetuneConfig
from training.sources import SAMPLES, Source

METRICS_NAME, HISTORY_NAME, REPORT_NAME, CARD_NAME = "metrics.json", "history.csv", "report.md", "README.md"
COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "exact_match", "f1")
WORST = 12


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


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
    """The questions with the lowest F1, with the answer and the F1 (0 to 1), in the order of the file."""
    scored = [(example, answers[example.id], score_example(example, answers[example.id])[1]) for example in examples]
    return sorted(scored, key=lambda item: item[2])[:WORST]


def write_report(
    output: Path,
    *,
    config: FinetuneConfig,
    sources: Sequence[Source],
    eval_source: Source,
    overview: Overview,
    metrics: dict[str, Any],
    history: Sequence[dict[str, Any]],
    worst: Sequence[tuple[Example, str, float]],
) -> None:
    """Writes `metrics.json`, `history.csv`, the plots, `report.md` and the model card (`README.md`) to `output`."""
    with (output / HISTORY_NAME).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    _draw(output, history, overview)
    report = _report(config, sources, eval_source, overview, metrics, worst)
    (output / REPORT_NAME).write_text(report, encoding="utf-8")
    (output / CARD_NAME).write_text(_card(config, sources, eval_source, metrics), encoding="utf-8")
    write_json(output / METRICS_NAME, metrics)  # last: with it a run is finished


def _draw(output: Path, history: Sequence[dict[str, Any]], overview: Overview) -> None:
    panels = (("loss", ("loss",)), ("learning rate", ("learning_rate",)), ("score, %", ("exact_match", "f1")))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            marker = "o" if len(points) < 20 else ""
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker=marker, markersize=3, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(["exact match", "F1"], frameon=False)
            axes.set_ylim(0, 1.15 * max(row["f1"] for row in history if "f1" in row) + 1.0)
    figure.savefig(output / "training.png", dpi=120)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(list(overview.lengths), list(overview.lengths.values()), width=HISTOGRAM_STEP * 0.9, align="edge")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")
    figure.savefig(output / "lengths.png", dpi=120)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _report(
    config: FinetuneConfig,
    sources: Sequence[Source],
    eval_source: Source,
    overview: Overview,
    metrics: dict[str, Any],
    worst: Sequence[tuple[Example, str, float]],
) -> str:
    settings = config.to_dict()
    versions = settings.pop("package_versions")
    data = [
        (
            figures["name"],
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
            _cell(example.question),
            _cell(answer),
            _cell(" / ".join(gold.text for gold in example.answers)),
            f"{100 * f1:.0f}",
        )
        for example, answer, f1 in worst
    ]
    lines = [
        f"# {config.output.name}",
        "",
        f"Exact match {metrics['exact_match']:.2f} %, F1 {metrics['f1']:.2f} % on {metrics['eval_questions']} "
        f"questions of {eval_source.name}, at step {metrics['best_step']} of {metrics['steps']}. "
        f"{metrics['seconds']:.0f} s since the last start, on {hardware()}.",
        "",
        "![loss, learning rate and scores](training.png)",
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
        f"Trained on {metrics['train_questions']} questions of these: {overview.rows} rows with {overview.questions} "
        f"questions, {overview.windows} of them about a part of a long passage; {overview.tokens} tokens, "
        f"{overview.counted} of them in the loss; {overview.padding:.1%} of a batch is padding.",
        "",
        "![lengths of the rows](lengths.png)",
        "",
        "## The worst answers",
        "",
        *_table(("question", "answer", "gold", "F1"), missed),
        "",
        "## Settings",
        "",
        *_table(("setting", "value"), [(name, f"`{value}`") for name, value in settings.items() if value is not None]),
        "",
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}, Python "
        f"{platform.python_version()}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.replace("|", "\\|").split())


def _card(config: FinetuneConfig, sources: Sequence[Source], eval_source: Source, metrics: dict[str, Any]) -> str:
    name = config.output.name
    hub = [source.name for source in sources if source.name not in SAMPLES and not Path(source.name).suffix]
    results = [
        EvalResult(
            task_type="question-answering",
            dataset_type=Path(eval_source.name).stem or eval_source.name,
            dataset_name=eval_source.name,
            metric_type=metric,
            metric_value=round(metrics[metric], 2),
        )
        for metric in ("exact_match", "f1")
    ]
    base = config.model if config.model is not None and not Path(config.model).exists() else None
    data = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["question-answering", "gpt2", "qa_onnx"],
        base_model=base if base != "starter" else None,
        datasets=hub or None,
        model_name=name,
        eval_results=results,
    )
    trained_on = f"{metrics['train_questions']} questions of {', '.join(source.name for source in sources)}"
    prompt = PROMPT_TEMPLATE.replace("\n", "\\n")
    body = f"""
# {name}

A GPT-2 that answers questions about a passage, made with `python -m training.finetune` of qa_onnx from
{config.model or f"random weights ({config.from_scratch})"}. Trained on {trained_on}.

Exact match {metrics["exact_match"]:.2f} %, F1 {metrics["f1"]:.2f} % on {metrics["eval_questions"]} questions of
{eval_source.name}, answered greedily, scored as SQuAD's script does.

The prompt is `{prompt}`; the model goes on with ` {{answer}}<|endoftext|>`.

- Use: `python -m export.to_onnx --model DIR --output BUNDLE`, then `qa_onnx.Answerer.from_pretrained("BUNDLE")`.
- Limits: it copies answers from the passage it is given and knows little besides; what it was not trained on (other
  languages, other kinds of text) was not measured.
- Settings, data fingerprints, versions and the worst answers: `report.md`.
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))
