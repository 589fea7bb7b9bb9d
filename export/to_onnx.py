"""Exports a fine-tuned GPT-2 to a bundle: `python -m export.to_onnx --help`.

Optimum writes the plain graph, the runtime's is built from its weights, the parity gate compares it with PyTorch, and
only then is the bundle renamed into place. Whatever fails, nothing half-written stays behind.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import optimum.utils.logging
import transformers
from optimum.exporters.onnx import onnx_export_from_model
from tokenizers import Tokenizer

from export.decoder import build_cache_copy, build_decoder, weights_of
from export.kernel_decoder import build_kernel_decoder
from export.parity import NEW_TOKENS, random_prompts, verify_parity
from export.quantize import ALPHAS, QuantizedModel, measure_loss, quantize_model
from export.weight_file import save_graphs
from qa_onnx import Answerer, __version__
from qa_onnx.bundle import (
    CACHE_COPY_NAME,
    CONFIG_NAME,
    DATA_NAME,
    GRAPHS,
    KERNEL_MODEL_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    PRECISIONS,
    TOKENIZER_NAME,
    Bundle,
    Manifest,
    write_manifest,
)
from qa_onnx.calibration import calibrate, choose_windows
from qa_onnx.checkpoint import load_checkpoint
from qa_onnx.checkpoint.windows import read_windows
from qa_onnx.cli import add_columns_option, run_command
from qa_onnx.data.columns import parse_columns
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_sources
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.engine.sequence import Prompt
from qa_onnx.engine.session import Session, import_onnxruntime, load_copier
from qa_onnx.errors import InvalidInputError, ParityError
from qa_onnx.files import REPLACED_SUFFIX, public_name, put_in_place, set_default_modes
from qa_onnx.kernels import KernelLibrary, choose_kernels
from qa_onnx.lock import folder_lock
from qa_onnx.text.prompt import encode_prompts, load_tokenizer

PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "tokenizers")
VERIFY_PASSAGES, LOSS_QUESTIONS, CALIBRATION_PROMPTS = 64, 256, 32
VERIFY_CACHE_BYTES = 64 * 2**20
MAX_F1_DROP = 0.5
STAGING_MARK = ".qa_onnx_export"
"""In a staging directory, which may be deleted for it."""
DISK_SPACE_FACTOR = 4
"""Free disk an export needs, in sizes of the weights: Optimum's graph, the fp32 one, the bundle's, some room."""


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
) -> Manifest:
    """Writes the bundle of a model.

    Args:
        model_name: `starter`, a directory that `training.finetune` wrote, or a hub id, of a GPT-2.
        output: The bundle's directory.
        precision: One of `PRECISIONS`. What another one loses compared with fp32 is measured and written into the
            manifest.
        verify: Sources of questions (see `read_sources`) of which the parity gate asks the first ones of
            `VERIFY_PASSAGES` passages, besides prompts of random tokens; on which a loss of F1 is measured; and on
            which no-answer threshold, scores and windows are calibrated (see `qa_onnx.calibration`).
        columns: What fields are called in them, where rows are flat.
        max_f1_drop: The most F1, in points, that the precision may lose on that file.
        force: Replace an existing bundle.
        keep_optimum: Keep Optimum's plain export in a directory `{output}-optimum`.

    Raises:
        InvalidInputError: The model, the precision or the output is not what it has to be, or the disk is full.
        ParityError: The graph does not compute what PyTorch computes, or loses more F1 than it may.
        ProviderError: The precision is bf16, and this machine cannot run it.
    """
    if precision not in PRECISIONS:
        raise InvalidInputError(f"got precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if not max_f1_drop >= 0:
        raise InvalidInputError(f"got max_f1_drop {max_f1_drop}; expected points of F1, at least 0")
    if precision == "bf16":
        choose_kernels("auto", provider="cpu", precision=precision)  # before anything is computed
    versions = {"qa_onnx": __version__, "onnxruntime": import_onnxruntime().__version__}
    versions |= {name: version(name) for name in PACKAGES}
    output = Path(os.path.realpath(output))  # where a link leads to
    if not output.name:
        raise InvalidInputError(f"got --output {output}; expected a directory to create")
    optimum_output = output.with_name(output.name + "-optimum")
    markers = {optimum_output: MODEL_NAME} if keep_optimum else {}
    markers[output] = MANIFEST_NAME
    for path, marker in markers.items():
        _check_replaceable(path, force=force, marker=marker)
    examples = read_sources(verify, columns=columns) if verify else []
    source = ", ".join(Path(name).name for name in verify)
    model, tokenizer = load_checkpoint(model_name)
    windows = read_windows(model_name)
    windows.check_fit(model.config.n_positions)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with _staging(output, optimum_output, weights=weight_bytes) as (bundle, plain):
        staging = bundle.parent
        bundle.mkdir()
        onnx_export_from_model(model, plain, task="text-generation-with-past", do_validation=False)
        tokenizer.save_pretrained(plain)
        shutil.copyfile(plain / CONFIG_NAME, bundle / CONFIG_NAME)
        tokenizer.backend_tokenizer.save(str(bundle / TOKENIZER_NAME))
        weights = weights_of(onnx.load(plain / MODEL_NAME))
        if not keep_optimum:
            shutil.rmtree(plain)

        config = model.config
        shape = {"layers": config.n_layer, "heads": config.n_head, "head_size": config.n_embd // config.n_head}

        def load(directory: Path, dtype: str = "float32", *, kernels: KernelLibrary | None = None) -> Engine:
            layout = CacheLayout(**shape, dtype=dtype)
            onnx.save_model(build_cache_copy(layout), directory / CACHE_COPY_NAME)
            name = MODEL_NAME if kernels is None else KERNEL_MODEL_NAME
            return Engine(
                Session(directory / name, provider="cpu", kernels=kernels),
                load_copier(directory / CACHE_COPY_NAME, provider="cpu"),
                layout=layout,
                eos_token_id=tokenizer.eos_token_id,
                max_positions=config.n_positions,
                prefix_cache_bytes=VERIFY_CACHE_BYTES,
            )

        def save(directory: Path, name: str, quantized: QuantizedModel | None = None) -> None:
            """Writes the graphs of a precision."""
            found, matrices = (weights, {}) if quantized is None else (quantized.weights, quantized.matrices)
            eos: dict[str, int] = {"eos_token_id": tokenizer.eos_token_id}
            graphs = {
                MODEL_NAME: lambda: build_decoder(found, config, matrices, **eos, half=name == "fp16"),
                KERNEL_MODEL_NAME: lambda: build_kernel_decoder(
                    found, config, matrices, **eos, bfloat16=name == "bf16"
                ),
            }
            save_graphs({directory / graph: graphs[graph]() for graph in GRAPHS[name]}, directory / DATA_NAME)

        reference_directory = bundle if precision == "fp32" else staging
        save(reference_directory, "fp32")
        engine = load(reference_directory)
        engines = {"": engine}
        fp32_kernels = choose_kernels("auto", provider="cpu", precision="fp32").library
        if fp32_kernels is not None:
            engines["kernels_"] = load(reference_directory, kernels=fp32_kernels)
        prompts = random_prompts(config.vocab_size, config.n_positions)
        sources = [f"{len(prompts)} of random tokens"]
        bpe = load_tokenizer(str(bundle / TOKENIZER_NAME))
        fitting, asked = _fitting(examples, bpe, longest=config.n_positions - NEW_TOKENS + 1)
        if verify:
            first_on_passage = list({tuple(prompt.prefix_ids): prompt for prompt in reversed(asked)}.values())[::-1]
            prompts += first_on_passage
            sources.append(f"{len(first_on_passage)} of {source}")
        parity = verify_parity(model, engines, prompts, source=", ".join(sources))
        precision_loss: dict[str, Any] = {}
        if precision != "fp32":
            quantized = None
            if precision == "int8":
                # Random tokens have other outliers than text: without questions nothing is smoothed.
                alphas = ALPHAS if asked else ()
                quantized = quantize_model(model, weights, (asked or prompts)[:CALIBRATION_PROMPTS], alphas=alphas)
            save(bundle, precision, quantized)
            kernels = choose_kernels("auto", provider="cpu", precision=precision).library
            reference, engine = engine, load(bundle, "float16" if precision == "fp16" else "float32", kernels=kernels)
            precision_loss = measure_loss(reference, engine, asked or prompts, fitting, bpe)
            precision_loss["kernels"] = None if kernels is None else kernels.instruction_set
            if quantized is not None:
                precision_loss |= {"matmuls_kept_in_fp32": quantized.kept, "smoothing": quantized.alphas}
            if precision_loss.get("f1_drop", 0.0) > max_f1_drop:
                raise ParityError(
                    f"{precision} loses {precision_loss['f1_drop']:.2f} points of F1 on {source}; at most "
                    f"{max_f1_drop:g} are allowed (--max-f1-drop). The bundle was not written; use --precision fp32, "
                    "or allow more"
                )
        manifest = write_manifest(
            bundle,
            {
                "precision": precision,
                "eos_token_id": tokenizer.eos_token_id,
                "max_positions": config.n_positions,
                "vocab_size": config.vocab_size,
                "source_model": public_name(model_name),
                "package_versions": versions,
                "parity": parity,
                "precision_loss": precision_loss,
                "windows": asdict(windows),
                **shape,
            },
        )
        written = Bundle.open(bundle)
        written.check_files()
        if examples:
            with Answerer(manifest=manifest, engine=engine, tokenizer=bpe, provider="cpu") as answerer:
                found = calibrate(answerer, examples, source=source)
                found["windows"] = choose_windows(answerer, examples, windows, max_positions=config.n_positions)
            manifest = written.keep(found).manifest
        for path, marker in markers.items():
            _check_replaceable(path, force=force, marker=marker)  # again: something may be there by now
            directory = bundle if path == output else plain
            set_default_modes(directory)
            put_in_place(directory, path, replace=force)
    return manifest


def _fitting(examples: list[Example], bpe: Tokenizer, *, longest: int) -> tuple[list[Example], list[Prompt]]:
    """The questions on the first passages, and their prompts, without those longer than the gate can follow."""
    passages = set(list(dict.fromkeys(example.context for example in examples))[:VERIFY_PASSAGES])
    chosen = [example for example in examples if example.context in passages][:LOSS_QUESTIONS]
    prompts = encode_prompts(bpe, [example.question for example in chosen], [example.context for example in chosen])
    pairs = [(example, prompt) for example, prompt in zip(chosen, prompts, strict=True) if len(prompt) <= longest]
    return [example for example, _ in pairs], [prompt for _, prompt in pairs]


def _check_replaceable(path: Path, *, force: bool, marker: str) -> None:
    if path.is_symlink():
        raise InvalidInputError(f"{path} is a link that leads nowhere; remove it, or choose another --output")
    if not path.exists():
        return
    if not force:
        raise InvalidInputError(f"{path} exists; choose another --output, or replace it with --force")
    if not (path / marker).is_file():
        raise InvalidInputError(f"{path} exists and is not an export ({marker} is missing); --force will not delete it")


@contextmanager
def _staging(*outputs: Path, weights: int) -> Iterator[list[Path]]:
    """Where directories are made before they take their places, in a hidden sibling of the first one.

    Only one export at a time makes it; what a killed one left in it is cleared first. It is gone at the end, whatever
    happens, and a full disk is a clear error.
    """
    output = outputs[0]
    if not output.parent.is_dir():
        raise InvalidInputError(f"{output.parent} is not a directory; create it, or choose another --output")
    free = shutil.disk_usage(output.parent).free
    if free < weights * DISK_SPACE_FACTOR:
        raise InvalidInputError(
            f"{output.parent} has {free / 1e6:.0f} MB free; exporting {weights / 1e6:.0f} MB of weights needs "
            f"{weights * DISK_SPACE_FACTOR / 1e6:.0f} MB. Free some, or choose an --output on another disk"
        )
    staging = output.with_name(f".{output.name}.staging")
    parts = [staging / path.name for path in outputs]
    with folder_lock(output.with_name(f".{output.name}.lock"), what=f"an export to {output}"):
        try:
            _clear(staging, dict(zip(parts, outputs, strict=True)))
            staging.mkdir()
            (staging / STAGING_MARK).touch()
        except OSError as error:
            raise InvalidInputError(f"{staging} cannot be made ({error.strerror}); choose another --output") from error
        with _told_of_full_disk(output.parent):
            try:
                yield parts
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def _clear(staging: Path, targets: Mapping[Path, Path]) -> None:
    """Deletes what is in a staging directory, but for what was replaced by an export that was killed in between.

    Args:
        staging: Need not exist.
        targets: The place of each directory that is made in it.

    Raises:
        InvalidInputError: Somebody else made it.
    """
    if not os.path.lexists(staging):
        return
    if not (staging / STAGING_MARK).is_file() and (
        not staging.is_dir() or staging.is_symlink() or any(staging.iterdir())
    ):
        raise InvalidInputError(
            f"{staging} is there and was not made by an export; move it, or choose another --output"
        )
    for part, target in targets.items():
        replaced = part.with_name(part.name + REPLACED_SUFFIX)
        if replaced.is_dir() and not target.exists():
            replaced.rename(target)
    shutil.rmtree(staging)


@contextmanager
def _told_of_full_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InvalidInputError(
                f"the disk of {directory} is full; nothing was written. Free some space, or choose an --output "
                "on another disk"
            ) from error
        raise


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
        metavar="starter|DIR",
        help="the embedded model, what training.finetune wrote, or a hub id",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="BUNDLE", help="directory to create")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    parser.add_argument(
        "--verify",
        nargs="+",
        default=(),
        metavar="SOURCE",
        help="questions that the model was not trained on, for more prompts of the parity gate, and to calibrate "
        "threshold, scores and windows; as `predict --data`",
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


def _export_and_report(arguments: argparse.Namespace) -> None:
    manifest = export(
        arguments.model,
        arguments.output,
        precision=arguments.precision,
        verify=arguments.verify,
        columns=parse_columns(arguments.columns),
        max_f1_drop=arguments.max_f1_drop,
        force=arguments.force,
        keep_optimum=arguments.keep_optimum,
    )
    megabytes = sum(file["bytes"] for file in manifest.files.values()) / 1e6
    print(f"wrote {arguments.output} ({megabytes:.0f} MB, {manifest.precision}); parity with PyTorch:")
    print(json.dumps(manifest.parity))
    if manifest.precision_loss:
        questions = manifest.precision_loss.get("questions")
        print(f"{manifest.precision} compared with fp32" + (f", on {questions} questions:" if questions else ":"))
        print(json.dumps({name: value for name, value in manifest.precision_loss.items() if name != "smoothing"}))
    if not arguments.verify:
        print("not calibrated, and no loss of F1 measured: pass --verify with questions and their answers")
    elif "threshold" not in manifest.no_answer:
        print(f"no threshold for no answer was found: {manifest.no_answer.get('reason', 'no reason is known')}")
    if arguments.verify and "slope" not in manifest.scores:
        print("scores are not calibrated: too few of the questions got an answer; pass --verify with more of them")


if __name__ == "__main__":
    sys.exit(main())
