"""The files of a finished run next to the model: metrics, history, plots, a report and a model card."""

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

from qa_onnx.data.example import Example
from qa_onnx.evaluation.metrics import score_example
from qa_onnx.files import public_name, write_file
from qa_onnx.text.prompt import PROMPT_TEMPLATE
from training.dataset import TrainingData
from training.holdout import HELDOUT_NAME
from training.plots import plot_curves, plot_lengths, to_png
from training.settings import FinetuneConfig
from training.sources import SAMPLES, Source
from training.stats import DatasetStats

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


def collect_history(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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


def make_title(config: FinetuneConfig) -> str:
    """A title for the model, of what it began with and was trained on, without directories."""

    def named(name: str) -> str:
        return KNOWN_NAMES.get(name, Path(public_name(name)).name)

    start = config.model
    model = named(start.model) if start.model is not None else f"{named(str(start.from_scratch))} from random weights"
    sources = [named(name) for name in config.data.train]
    more = len(sources) - TITLE_SOURCES
    shown = [*sources[:TITLE_SOURCES], *([f"{more} more"] if more > 0 else [])]
    listed = " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
    return f"{model} for question answering, fine-tuned on {listed}"


def write_report(
    config: FinetuneConfig,
    *,
    data: TrainingData,
    stats: DatasetStats,
    metrics: dict[str, Any],
    history: Sequence[dict[str, Any]],
    learning_rates: Sequence[float],
    worst: Sequence[tuple[Example, str, float]],
) -> None:
    """Writes `history.csv`, the plots, `report.md`, the model card (`README.md`) and `metrics.json` to the output."""
    output = config.output
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(history)
    write_file(output / HISTORY_NAME, table.getvalue())
    write_file(output / CURVES_NAME, to_png(plot_curves(history, learning_rates)))
    write_file(output / LENGTHS_NAME, to_png(plot_lengths(stats)))
    write_file(output / REPORT_NAME, _make_report(config, data, stats, metrics, worst))
    write_file(output / CARD_NAME, _make_card(config, data, metrics))
    write_json(output / METRICS_NAME, metrics)  # last: with it a run is finished


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _make_report(
    config: FinetuneConfig,
    data: TrainingData,
    stats: DatasetStats,
    metrics: dict[str, Any],
    worst: Sequence[tuple[Example, str, float]],
) -> str:
    evaluations = [
        (f"{row['epoch']:.2f}", row["step"], f"{row['exact_match']:.2f}", f"{row['f1']:.2f}")
        for row in metrics["evaluations"]
    ]
    lines = [
        f"# {escape_markdown(make_title(config))}",
        "",
        f"{_describe_scores(metrics, data.eval_source)} At step {metrics['best_step']} of {metrics['steps']}. "
        f"{metrics['seconds']:.0f} s since the last start, on {hardware()}.",
        "",
        str(data.overlap),
        "",
        f"![loss, learning rate and scores]({CURVES_NAME})",
        "",
        "## Evaluations",
        "",
        *_table(("epoch", "step", "exact match", "F1"), evaluations),
        "",
        *_data_section(data, stats, metrics),
        "",
        *_worst_section(worst),
        "",
        *_settings_section(config),
    ]
    return "\n".join(lines) + "\n"


def _data_section(data: TrainingData, stats: DatasetStats, metrics: dict[str, Any]) -> list[str]:
    sources = [
        (
            escape_markdown(public_name(figures["name"])),
            figures["questions"],
            figures["passages"],
            figures["bad_rows"],
            figures["answers_repaired"],
            figures["answers_absent"],
            figures["sha256"][:16],
        )
        for figures in (source.to_dict() for source in (*data.sources, data.eval_source))
    ]
    return [
        "## Data",
        "",
        *_table(
            ("source", "questions", "passages", "bad rows", "answers repaired", "answers absent", "sha256 of examples"),
            sources,
        ),
        "",
        f"Trained on {metrics['train_questions']} questions of these, "
        f"{metrics['train_questions_without_answer']} of them without an answer, and on "
        f"{metrics['questions_made_without_answer']} without an answer that were made of them, asked about other "
        f"passages: {stats.rows} rows with {stats.questions} "
        f"questions, {stats.windows} of them about a part of a long passage ({stats.left_out} windows without an "
        f"answer left out); {stats.tokens} tokens, "
        f"{stats.counted} of them in the loss; {stats.padding:.1%} of a batch is padding.",
        "",
        f"Passages are read in windows of up to {metrics['window']} tokens; neighboring windows share "
        f"{metrics['stride']}.",
        "",
        f"![lengths of the rows]({LENGTHS_NAME})",
    ]


def _worst_section(worst: Sequence[tuple[Example, str, float]]) -> list[str]:
    rows = [
        (
            escape_markdown(example.question),
            escape_markdown(answer) or "(none)",
            escape_markdown(" / ".join(gold.text for gold in example.answers)) or "(none)",
            f"{100 * f1:.0f}",
        )
        for example, answer, f1 in worst
    ]
    table = _table(("question", "answer", "gold", "F1"), rows) if rows else ["No answer is wrong."]
    return ["## The worst answers", "", *table]


def _settings_section(config: FinetuneConfig) -> list[str]:
    settings = config.to_dict()
    versions = settings.pop("package_versions")
    rows = [(name, _format_value(value)) for name, value in settings.items() if value not in (None, [])]
    return [
        "## Settings",
        "",
        *_table(("setting", "value"), rows),
        "",
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}, Python "
        f"{platform.python_version()}.",
    ]


def _format_value(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return f"`{value}`"
    return escape_markdown(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _is_hub_id(name: str) -> bool:
    return not Path(name).is_absolute() and not Path(name).exists()


def _describe_scores(metrics: dict[str, Any], eval_source: Source) -> str:
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


def _make_card(config: FinetuneConfig, data: TrainingData, metrics: dict[str, Any]) -> str:
    name, evaluated_on = make_title(config), public_name(data.eval_source.name)
    hub = [source.name for source in data.sources if source.name not in SAMPLES and _is_hub_id(source.name)]
    results = [
        EvalResult(
            task_type="question-answering",
            dataset_type="heldout" if data.is_held_out else Path(evaluated_on).stem,
            dataset_name=evaluated_on,
            metric_type=metric,
            metric_value=round(metrics[metric], 2),
        )
        for metric in ("exact_match", "f1")
    ]
    start = config.model.model
    base = start if start is not None and start != "starter" and _is_hub_id(start) else None
    card = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["question-answering", "gpt2", "qa_onnx"],
        base_model=base,
        datasets=hub or None,
        model_name=name,
        eval_results=results,
    )
    began_with = escape_markdown(public_name(start or f"random weights ({config.model.from_scratch})"))
    trained_on = escape_markdown(", ".join(public_name(source.name) for source in data.sources))
    prompt = PROMPT_TEMPLATE.replace("\n", "\\n")
    heldout = f" (`{HELDOUT_NAME}`)" if data.is_held_out else ""
    body = f"""
# {escape_markdown(name)}

A GPT-2 that answers questions about a passage, made from {began_with}
with `python -m training.finetune` of qa_onnx. Trained on {metrics["train_questions"]} questions of {trained_on}.

{_describe_scores(metrics, data.eval_source)}
Answered greedily, scored as SQuAD's script does{heldout}. {data.overlap}

The prompt is `{prompt}`; the model continues with ` {{answer}}<|endoftext|>`.

- Use: `python -m export.to_onnx --model DIR --output BUNDLE`, then `qa_onnx.Answerer.from_pretrained("BUNDLE")`.
- Limits: it copies answers from the passage it is given and knows little besides; what it was not trained on (other
  languages, other kinds of text) was not measured.
- Settings, data fingerprints, versions and the worst answers: `report.md`.
"""
    return str(ModelCard(f"---\n{card.to_yaml()}\n---\n{body}"))
