"""Fine-tunes a GPT-2 for question answering: `python -m training.finetune --help`."""

from __future__ import annotations

import training.packages  # noqa: F401

# isort: split
import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel
from transformers import GPT2TokenizerFast, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from qa_onnx.cli import EXIT_INTERRUPTED, run_command
from qa_onnx.errors import InvalidInputError
from qa_onnx.evaluation.predictions import read_predictions
from qa_onnx.files import write_file
from training.arguments import check_launcher, make_arguments
from training.checkpoints import (
    TrainingError,
    complete_checkpoints,
    delete_checkpoints,
    report_disk_errors,
)
from training.dataset import TrainingData, load_data
from training.holdout import HELDOUT_NAME, to_json_lines
from training.model import GPT2LMHeadModel, add_lora, build_model, load_model
from training.options import add_options
from training.report import collect_history, worst_examples, write_report
from training.run_directory import (
    begin_run,
    check_output,
    clear_finished_run,
    copy_model,
    find_checkpoints,
    lock_output,
)
from training.settings import (
    RECIPES,
    DataConfig,
    EvaluationConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizationConfig,
)
from training.stats import DatasetStats, compute_stats, describe
from training.trainer import PREDICTIONS_NAME, GenerationTrainer

EXAMPLE = """\
example:
  python -m training.finetune --model starter --train own.csv --eval 20% --output runs/own/model
"""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def finetune(config: FinetuneConfig, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Runs the fine-tuning and writes model, tokenizer, settings, metrics and report to `config.output`.

    The model is that of the best evaluation by F1. Where `config.output` holds the checkpoints of a run with the same
    settings and data, it resumes from the last one.

    Args:
        config: The settings.
        dry_run: Load, check and tokenize everything, print what was found, and stop; `config.output` is not touched.

    Returns:
        The metrics, also in `metrics.json`; None after a dry run, or if the run was interrupted and can be resumed.

    Raises:
        InvalidInputError: Settings, data or model are not what they have to be. Nothing was written then.
        TrainingError: The loss is not a number any more, or the memory or the disk does not suffice.
    """
    started = time.monotonic()
    check_launcher(config)
    arguments = make_arguments(config)
    _check_start(config, clears=arguments.should_save and not dry_run)
    set_seed(config.optimization.seed)
    model, tokenizer = _load_model(config.model)
    with arguments.main_process_first(desc="loading the data"):
        data = load_data(config, tokenizer, model.config.n_positions)
    stats = compute_stats(data.rows, config)
    if arguments.should_save:
        _write_warnings(data)
    if dry_run:
        if arguments.should_save:
            print(describe(data, stats, tokenizer))
        return None
    settings = _describe_run(config, data, model, tokenizer, processes=arguments.world_size)
    with lock_output(config.output) if arguments.should_save else nullcontext():
        check_output(config.output)  # again: another training may have been there meanwhile
        checkpoints, damages = find_checkpoints(config.output, settings)
        trainer = GenerationTrainer(
            model=_prepare_model(model, config),
            arguments=arguments,
            tokenizer=tokenizer,
            train_rows=data.rows,
            eval_examples=data.eval_examples,
            windows=data.windows,
            config=config,
            checkpoints=checkpoints,
        )
        if arguments.should_save:
            begin_run(config.output, settings, checkpoints, damages)
        _train(trainer, config, checkpoints[-1] if checkpoints else None)
        if trainer.stop.stopped:
            return None
        metrics = _collect_metrics(trainer, data, seconds=time.monotonic() - started)
        if arguments.should_save:
            with report_disk_errors(config.output):
                _finish(trainer, config, data, stats, metrics)
        trainer.accelerator.wait_for_everyone()
    return metrics


def _check_start(config: FinetuneConfig, *, clears: bool) -> None:
    """Refuses a run that could not end well; deletes what is left of one that was killed at its very end."""
    if config.evaluation.tensorboard and find_spec("tensorboard") is None:
        raise InvalidInputError("--tensorboard needs the package of that name: pip install tensorboard")
    if clears:
        clear_finished_run(config.output)
    check_output(config.output)


def _load_model(config: ModelConfig) -> tuple[GPT2LMHeadModel, GPT2TokenizerFast]:
    if config.from_scratch is not None:
        return build_model(config.from_scratch, str(config.tokenizer), dropout=config.dropout)
    return load_model(str(config.model), dropout=config.dropout)


def _prepare_model(model: GPT2LMHeadModel, config: FinetuneConfig) -> GPT2LMHeadModel | PeftModel:
    """The model as the settings train it; without the path that it came from, which libraries would write down."""
    model.name_or_path = model.config.name_or_path = ""
    model.label_smoothing = config.optimization.label_smoothing
    lora = config.model
    if lora.lora_rank is None:
        return model
    return add_lora(model, rank=lora.lora_rank, alpha=lora.lora_alpha, dropout=lora.lora_dropout)


def _write_warnings(data: TrainingData) -> None:
    for warning in data.warnings():
        sys.stderr.write(f"warning: {warning}\n")
    if data.is_held_out:
        figures = data.eval_source.to_dict()
        sys.stderr.write(
            f"evaluating on {data.eval_source.name}: {figures['questions']} questions about "
            f"{figures['passages']} passages\n"
        )


def _describe_run(
    config: FinetuneConfig, data: TrainingData, model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, *, processes: int
) -> dict[str, Any]:
    """The settings with what else decides the weights: a run resumes only where all of it is the same."""
    return {
        **config.to_dict(),
        "processes": processes,
        "sha256_of_model": _hash_model(model if config.model.from_scratch is None else None, tokenizer),
        "sha256_of_train": [source.sha256 for source in data.sources],
        "sha256_of_eval": data.eval_source.sha256,
    }


def _hash_model(model: GPT2LMHeadModel | None, tokenizer: GPT2TokenizerFast) -> str:
    """The SHA-256 of a tokenizer, and of a model's weights; None for random weights, which the seed decides."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items() if model is not None else ()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _train(trainer: GenerationTrainer, config: FinetuneConfig, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        trainer.args.eval_on_start = False
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if trainer.is_finished():  # `train` would make one more step
            return
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except UnpicklingError as error:
        raise TrainingError(
            f"{checkpoint} holds a pickle of more than tensors and numbers, which is not opened. Delete this "
            "checkpoint, to resume from one before it, or start in another directory"
        ) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        good, _ = complete_checkpoints(config.output)
        optimization = config.optimization
        raise TrainingError(
            f"out of memory with --batch-size {optimization.batch_size} and --micro-batch-tokens "
            f"{optimization.micro_batch_tokens}. Give a smaller --micro-batch-tokens, which trains the same, and start "
            "the same command again; or, in another --output, add --gradient-checkpointing, lower --max-length, take "
            "--precision bf16, or train less of the model with --lora-rank 8. If it was while answering, lower "
            f"--eval-batch-size. Last checkpoint: {good[-1] if good else 'none yet'}"
        ) from error


def _collect_metrics(trainer: GenerationTrainer, data: TrainingData, *, seconds: float) -> dict[str, Any]:
    """The content of `metrics.json`."""
    best = trainer.best()
    history = collect_history(trainer.state.log_history)
    return {
        **data.to_metrics(),
        "steps": trainer.state.global_step,
        "best_step": best["step"],
        "losses": [[row["step"], row["loss"]] for row in history if "loss" in row],
        "evaluations": trainer.evaluations(),
        "exact_match": best["exact_match"],
        "f1": best["f1"],
        "seconds": seconds,
    }


def _finish(
    trainer: GenerationTrainer,
    config: FinetuneConfig,
    data: TrainingData,
    stats: DatasetStats,
    metrics: dict[str, Any],
) -> None:
    """Copies the best model to the output directory, reports, and deletes the checkpoints, in this order."""
    copy_model(trainer.best_directory(), config.output)
    if data.is_held_out:
        write_file(config.output / HELDOUT_NAME, to_json_lines(data.eval_source.examples))
    answers = read_predictions(config.output / PREDICTIONS_NAME)
    write_report(
        config,
        data=data,
        stats=stats,
        metrics=metrics,
        history=collect_history(trainer.state.log_history),
        learning_rates=trainer.learning_rates(),
        worst=worst_examples(data.eval_examples, answers),
    )
    delete_checkpoints(config.output, kept=())


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line. Options that are not given are left out of the result, for recipes and defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune",
        description="Fine-tune a GPT-2 to answer questions about passages. The same command, started again,\n"
        "resumes from the last checkpoint. Under `torchrun` or `accelerate launch` it runs in several processes.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add_options(parser.add_argument_group("model (give --model or --from-scratch)"), ModelConfig)
    data = parser.add_argument_group("data")
    add_options(data, DataConfig)
    data.add_argument("--dry-run", action="store_true", help="check and tokenize, show what was found, train nothing")
    add_options(parser.add_argument_group("output"), FinetuneConfig, ["output"])
    optimization = parser.add_argument_group("optimization")
    add_options(optimization, FinetuneConfig, ["recipe"])
    add_options(optimization, OptimizationConfig)
    add_options(parser.add_argument_group("evaluation and checkpoints"), EvaluationConfig)
    return parser


def resolve_config(arguments: argparse.Namespace) -> FinetuneConfig:
    """The settings that a command line asks for: its own, then its recipe's, then the defaults."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name != "dry_run"
    }
    return FinetuneConfig.from_options({**RECIPES.get(str(given.get("recipe")), {}), **given})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (see `qa_onnx.cli.run_command`)."""
    arguments = make_parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of transformers 5, where it writes weights
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return run_command(
        lambda: _finetune_and_print(resolve_config(arguments), dry_run="dry_run" in arguments),
        interrupted="interrupted at once; the same command resumes from the last checkpoint, if there is one",
    )


def _finetune_and_print(config: FinetuneConfig, *, dry_run: bool) -> int:
    try:
        metrics = finetune(config, dry_run=dry_run)
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if dry_run:
        return 0
    if metrics is None:
        if is_first:
            print(f"stopped; the same command resumes (checkpoints are in {config.output})")
        return EXIT_INTERRUPTED
    if is_first:
        print(f"wrote the model to {config.output}")
        shown = ("exact_match", "f1", "eval_questions", "steps", "best_step", "seconds")
        print(json.dumps({name: metrics[name] for name in shown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
