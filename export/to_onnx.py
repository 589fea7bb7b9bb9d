"""Exports a fine-tuned GPT-2 to a bundle: `python -m export.to_onnx --help`.

Optimum exports the plain graph; the runtime's graphs are built from its weights; the parity gate compares them with
PyTorch; only then is the bundle renamed to its final name. An export that fails leaves nothing half-written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import optimum.utils.logging
import transformers
from optimum.exporters.onnx import onnx_export_from_model

from export.decoder import build_decoder
from export.graph import build_cache_copy
from export.kernel_decoder import build_kernel_decoder
from export.parity import verify_parity
from export.quantize import ALPHAS, QuantizedModel, compare_precisions, quantize_model
from export.source import Checks, Source, choose_checks, load_source
from export.staging import check_replaceable, stage
from export.weight_file import save_graphs
from export.weights import extract_weights
from qa_onnx import Answerer, __version__
from qa_onnx.bundle import Bundle
from qa_onnx.calibration import MIN_SCORED, calibrate, choose_windows
from qa_onnx.cli import add_columns_option, run_command
from qa_onnx.data.columns import parse_columns
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.engine.provider import import_onnxruntime
from qa_onnx.engine.session import Session, load_copier
from qa_onnx.errors import InvalidInputError, ParityError, one_line
from qa_onnx.files import put_in_place, set_default_modes
from qa_onnx.kernels import KernelLibrary, choose_kernels
from qa_onnx.manifest import (
    CACHE_COPY_NAME,
    CONFIG_NAME,
    DATA_NAME,
    GRAPHS,
    KERNEL_MODEL_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    PRECISIONS,
    TOKENIZER_NAME,
    Manifest,
    write_manifest,
)
from qa_onnx.text.prompt import load_tokenizer

PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "tokenizers")
CALIBRATION_PROMPTS = 32
VERIFY_CACHE_BYTES = 64 * 2**20
MAX_F1_DROP = 0.5
TRAINING_CONFIG_NAME = "training_config.json"
"""In the directory of a model that `training.finetune` wrote."""
PRECISION_HELP = (
    "fp32 runs everywhere, int8 on every CPU, bf16 on CPUs that multiply in it, fp16 on NVIDIA GPUs; default: "
    "%(default)s"
)


def export(
    model_name: str,
    output: Path,
    *,
    precision: str = "fp32",
    verify: Sequence[str | Path] = (),
    columns: Mapping[str, str] | None = None,
    max_f1_drop: float = MAX_F1_DROP,
    force: bool = False,
    keep_optimum: bool = False,
    tell: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Writes the bundle of a model.

    Args:
        model_name: `starter`, a directory that `training.finetune` wrote, or a hub id, of a GPT-2.
        output: The bundle's directory.
        precision: One of `PRECISIONS`. What one other than fp32 loses is measured and written into the manifest.
        verify: Sources of questions (see `read_sources`). The parity gate asks the first question on each of the first
            contexts, in addition to prompts of random tokens; the loss of F1 is measured on them; and no-answer
            threshold, scores and windows are calibrated on them (see `qa_onnx.calibration`).
        columns: The names of their fields, where rows are flat.
        max_f1_drop: Maximum loss of F1 of the precision on these questions, in points.
        force: Replace an existing bundle.
        keep_optimum: Keep Optimum's plain export in a directory `{output}-optimum`.
        tell: Called with a line at the start of each part of the work.

    Raises:
        InvalidInputError: The model, the precision or the output is invalid, or the disk is full.
        ParityError: The graph does not compute what PyTorch computes, or loses more F1 than allowed.
        ProviderError: The precision is bf16, and this machine cannot run it.
    """
    _check_options(precision, max_f1_drop)
    versions = _package_versions()
    output, optimum_output = _resolve_outputs(output)
    _check_targets(output, optimum_output if keep_optimum else None, force=force)
    tell(f"loading {model_name}, and exporting it with Optimum")
    source = load_source(model_name, verify, columns)
    with stage(output, optimum_output, weight_bytes=source.weight_bytes) as (bundle, plain):
        bundle.mkdir()
        weights = _export_with_optimum(source, plain, bundle)
        if not keep_optimum:
            shutil.rmtree(plain)
        graphs = _Graphs(source, weights)
        checks = choose_checks(source, load_tokenizer(str(bundle / TOKENIZER_NAME)))
        tell(f"comparing {len(checks.gate_prompts)} prompts with PyTorch, alone and in batches")
        engine, parity = _verify(graphs, bundle if precision == "fp32" else bundle.parent, checks)
        loss: dict[str, Any] = {}
        if precision != "fp32":
            tell(f"measuring what {precision} loses")
            engine, loss = _write_precision(graphs, precision, bundle, engine, checks, max_f1_drop=max_f1_drop)
        measured = {"precision": precision, "parity": parity, "precision_loss": loss, "package_versions": versions}
        manifest = write_manifest(bundle, source.manifest_values() | measured)
        tell("reading the bundle back" + (", and calibrating it" if source.examples else ""))
        manifest = _check_and_calibrate(source, bundle, manifest, engine, checks)
        _check_targets(output, optimum_output if keep_optimum else None, force=force)  # again: they may exist by now
        for directory, target in [(plain, optimum_output)] * keep_optimum + [(bundle, output)]:
            set_default_modes(directory)
            put_in_place(directory, target, replace=force)
    return manifest


def _check_options(precision: str, max_f1_drop: float) -> None:
    if precision not in PRECISIONS:
        raise InvalidInputError(f"got precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if not max_f1_drop >= 0:
        raise InvalidInputError(f"got max_f1_drop {max_f1_drop}; expected points of F1, at least 0")
    if precision == "bf16":
        choose_kernels("auto", provider="cpu", precision=precision)  # an error now, not after minutes


def _resolve_outputs(output: Path) -> tuple[Path, Path]:
    """Where the bundle goes, and where Optimum's export may go: next to it."""
    output = Path(os.path.realpath(output))  # the target, where it is a link
    if not output.name:
        raise InvalidInputError(f"got --output {output}; expected a directory to create")
    return output, output.with_name(output.name + "-optimum")


def _check_targets(output: Path, optimum_output: Path | None, *, force: bool) -> None:
    if optimum_output is not None:
        check_replaceable(optimum_output, force=force, marker=MODEL_NAME)
    check_replaceable(output, force=force, marker=MANIFEST_NAME)


def _package_versions() -> dict[str, str]:
    own = {"qa_onnx": __version__, "onnxruntime": import_onnxruntime().__version__}
    return own | {name: version(name) for name in PACKAGES}


def _export_with_optimum(source: Source, plain: Path, bundle: Path) -> dict[str, np.ndarray]:
    """Writes Optimum's export to `plain`, and configuration and tokenizer to the bundle; returns the weights."""
    onnx_export_from_model(source.model, plain, task="text-generation-with-past", do_validation=False)
    source.tokenizer.save_pretrained(plain)
    shutil.copyfile(plain / CONFIG_NAME, bundle / CONFIG_NAME)
    source.tokenizer.backend_tokenizer.save(str(bundle / TOKENIZER_NAME))
    return extract_weights(onnx.load(plain / MODEL_NAME))


class _Graphs:
    """Builds and loads the graphs of a model in each precision."""

    def __init__(self, source: Source, weights: dict[str, np.ndarray]) -> None:
        self.source, self.weights = source, weights

    def save(self, directory: Path, precision: str, quantized: QuantizedModel | None = None) -> None:
        """Writes the graphs of a precision, and their weights."""
        weights, matrices = (self.weights, {}) if quantized is None else (quantized.weights, quantized.matrices)
        config, eos = self.source.config, self.source.eos_token_id
        build: dict[str, Callable[[], onnx.ModelProto]] = {
            MODEL_NAME: lambda: build_decoder(weights, config, matrices, eos_token_id=eos, float16=precision == "fp16"),
            KERNEL_MODEL_NAME: lambda: build_kernel_decoder(
                weights, config, matrices, eos_token_id=eos, bfloat16=precision == "bf16"
            ),
        }
        save_graphs({directory / name: build[name]() for name in GRAPHS[precision]}, directory / DATA_NAME)

    def load(self, directory: Path, precision: str, *, kernels: KernelLibrary | None) -> Engine:
        """Loads a graph that was written before: that with kernels, if there are any."""
        source = self.source
        layout = CacheLayout(**source.cache_shape, dtype="float16" if precision == "fp16" else "float32")
        onnx.save_model(build_cache_copy(layout), directory / CACHE_COPY_NAME)
        name = MODEL_NAME if kernels is None else KERNEL_MODEL_NAME
        return Engine(
            Session(directory / name, provider="cpu", kernels=kernels),
            load_copier(directory / CACHE_COPY_NAME, provider="cpu"),
            layout=layout,
            eos_token_id=source.eos_token_id,
            max_positions=source.config.n_positions,
            prefix_cache_bytes=VERIFY_CACHE_BYTES,
        )


def _verify(graphs: _Graphs, directory: Path, checks: Checks) -> tuple[Engine, dict[str, Any]]:
    """Writes the fp32 graphs and checks them against PyTorch; returns the engine of the plain one, and the report."""
    graphs.save(directory, "fp32")
    engine = graphs.load(directory, "fp32", kernels=None)
    engines = {"": engine}
    kernels = choose_kernels("auto", provider="cpu", precision="fp32").library
    if kernels is not None:
        engines["kernels_"] = graphs.load(directory, "fp32", kernels=kernels)
    report = verify_parity(graphs.source.model, engines, checks.gate_prompts, source=checks.gate_source)
    return engine, report


def _write_precision(
    graphs: _Graphs, precision: str, bundle: Path, reference: Engine, checks: Checks, *, max_f1_drop: float
) -> tuple[Engine, dict[str, Any]]:
    """Writes the graphs of another precision than fp32, and compares their answers with those of `reference`.

    Returns:
        Their engine, and what the precision loses, for the manifest.

    Raises:
        ParityError: It loses more F1 than allowed.
    """
    prompts = checks.prompts or checks.gate_prompts
    quantized = None
    if precision == "int8":
        # Random tokens have other outliers than text: without questions nothing is smoothed.
        alphas = ALPHAS if checks.prompts else ()
        quantized = quantize_model(graphs.source.model, graphs.weights, prompts[:CALIBRATION_PROMPTS], alphas=alphas)
    graphs.save(bundle, precision, quantized)
    kernels = choose_kernels("auto", provider="cpu", precision=precision).library
    engine = graphs.load(bundle, precision, kernels=kernels)
    loss = compare_precisions(reference, engine, prompts, checks.examples, checks.tokenizer)
    loss["kernels"] = None if kernels is None else kernels.instruction_set
    if quantized is not None:
        loss |= {"matmuls_kept_in_fp32": quantized.kept, "smoothing": quantized.alphas}
    _check_loss(loss, precision, max_f1_drop, graphs.source)
    return engine, loss


def _check_loss(loss: Mapping[str, Any], precision: str, max_f1_drop: float, source: Source) -> None:
    if loss.get("f1_drop", 0.0) > max_f1_drop:
        raise ParityError(
            f"{precision} loses {loss['f1_drop']:.2f} points of F1 on {source.examples_name}; at most {max_f1_drop:g} "
            "are allowed (--max-f1-drop). The bundle was not written; use --precision fp32, or allow more"
        )


def _check_and_calibrate(source: Source, bundle: Path, manifest: Manifest, engine: Engine, checks: Checks) -> Manifest:
    """Reads the written bundle back, and calibrates it on the questions, if there are any."""
    written = Bundle.open(bundle)
    written.check_files()
    if not source.examples:
        return manifest
    with Answerer(manifest=manifest, engine=engine, tokenizer=checks.tokenizer, provider="cpu") as answerer:
        found = calibrate(answerer, source.examples, source=source.examples_name)
        found["windows"] = choose_windows(
            answerer, source.examples, source.windows, max_positions=source.config.n_positions
        )
    return written.keep(found).manifest


def _silence_exporters() -> None:
    """Leaves only this program's own lines: tracing warns about each branch that GPT-2's code takes."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    optimum.utils.logging.set_verbosity_error()


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.to_onnx",
        description="Export a fine-tuned GPT-2 to a bundle for qa_onnx, and check it against PyTorch.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="HUB_ID|starter|DIR",
        help="a hub id of a GPT-2, the embedded model, or what training.finetune wrote",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="BUNDLE", help="directory to create, with those above it"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP)
    parser.add_argument(
        "--verify",
        nargs="+",
        default=(),
        metavar="SOURCE",
        help="questions that the model was not trained on, in the formats of `predict --data`: more prompts for the "
        "parity gate, and what threshold, scores and windows are calibrated on; they also measure what another "
        "precision loses, and reduce the loss of int8",
    )
    add_columns_option(parser)
    parser.add_argument(
        "--max-f1-drop",
        type=float,
        default=MAX_F1_DROP,
        metavar="POINTS",
        help="points of F1 that another precision may lose on the questions of --verify; default: %(default)s",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--keep-optimum", action="store_true", help="keep Optimum's export as BUNDLE-optimum")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (see `qa_onnx.cli.run_command`)."""
    arguments = make_parser().parse_args(argv)
    _silence_exporters()
    return run_command(lambda: _export_and_report(arguments), interrupted="interrupted; nothing was written")


def _describe_loss(precision: str, loss: Mapping[str, Any]) -> str:
    """What a precision loses compared with fp32, in one line. The manifest has all of it."""
    line = (
        f"{precision} compared with fp32: {loss['equal_tokens_percent']:.1f} % of tokens and "
        f"{loss['equal_answers_percent']:.1f} % of answers equal on {loss['prompts']} prompts"
    )
    if "questions" in loss:
        before, after = loss["fp32"]["f1"], loss["quantized"]["f1"]
        line += f"; F1 {before:.2f} before and {after:.2f} after on {loss['questions']} questions"
    if kept := loss.get("matmuls_kept_in_fp32"):
        line += f"; kept in fp32: {', '.join(kept)}"
    return line


def _export_and_report(arguments: argparse.Namespace) -> None:
    for source in _find_trained_on(arguments.model, arguments.verify):
        print(
            f"warning: the model was trained on {Path(source).name}: threshold, scores and loss of F1 will look better "
            "than they are. Verify with questions that it has not seen, such as heldout.jsonl of its run"
        )
    manifest = export(
        arguments.model,
        arguments.output,
        precision=arguments.precision,
        verify=arguments.verify,
        columns=parse_columns(arguments.columns),
        max_f1_drop=arguments.max_f1_drop,
        force=arguments.force,
        keep_optimum=arguments.keep_optimum,
        tell=lambda line: print(line, flush=True),
    )
    megabytes = sum(file["bytes"] for file in manifest.files.values()) / 1e6
    print(f"wrote {arguments.output} ({megabytes:.0f} MB, {manifest.precision})")
    parity = manifest.parity
    print(
        f"parity with PyTorch: {parity['prompts']} prompts, {parity['new_tokens_each']} tokens each, all equal; "
        f"log-probabilities differ by at most {max(parity['max_logprob_difference'].values()):.1e}"
    )
    if loss := manifest.precision_loss:
        print(_describe_loss(manifest.precision, loss))
    print("\n".join(_describe_calibration(manifest)))


def _find_trained_on(model: str, verify: Sequence[str]) -> list[str]:
    """The files of `--verify` that have the name of one that the model was trained on."""
    path = Path(model) / TRAINING_CONFIG_NAME
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))["train"] if path.is_file() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} is not what training.finetune writes: {one_line(error)}") from error
    return [source for source in verify if Path(source).is_file() and Path(source).name in trained]


def _describe_calibration(manifest: Manifest) -> list[str]:
    """What was learned from the questions of `--verify`, or why it was not, in a line each."""
    found = manifest.no_answer
    if not found:
        return ["not calibrated, and no loss of F1 measured: pass --verify with questions that were not trained on"]
    if "threshold" in found:
        lines = [f"no-answer threshold: {found['threshold']:.3g}, found on {found['questions']} questions"]
    else:
        lines = [f"no threshold for no answer was found: {found['reason']}"]
    if "slope" in manifest.scores:
        lines.append(f"scores are calibrated on {manifest.scores['questions']} questions")
    else:
        lines.append(f"scores are not calibrated: fewer than {MIN_SCORED} questions with an answer were answered")
    return lines


if __name__ == "__main__":
    sys.exit(main())
