"""Fine-tunes a GPT-2 for question answering: `python -m training.finetune --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import torch
import transformers
from transformers import GPT2TokenizerFast, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qa_onnx.checkpoint.windows import read_windows
from qa_onnx.cli import EXIT_INTERRUPTED, add_columns_option, run_command
from qa_onnx.data.columns import parse_columns
from qa_onnx.data.example import Example
from qa_onnx.data.pairs import normalized
from qa_onnx.errors import InvalidInputError, PromptTooLongError
from qa_onnx.evaluation.predictions import read_predictions
from qa_onnx.files import write_file
from qa_onnx.lock import folder_lock
from qa_onnx.text.windows import WindowSettings
from training.checkpoints import (
    BEST_PREFIX,
    CHECKSUMS_NAME,
    UNFINISHED_NAME,
    TrainingError,
    checkpoints_in,
    delete_checkpoints,
    good_checkpoints,
    writes_checkpoints,
)
from training.data import LOSS_ON, RowSettings, cached_rows, too_long
from training.evaluation import windows_of
from training.holdout import DEFAULT_EVAL, HELDOUT_NAME, Overlap, hold_out, json_lines_of, overlap_of, share_of
from training.model import ARCHITECTURES, GPT2LMHeadModel, PeftModel, build_model, load_model, with_lora
from training.overview import Overview, describe, overview_of
from training.report import METRICS_NAME, history_of, worst_examples, write_json, write_report
from training.settings import (
    FREE_TO_CHANGE,
    LEARNING_RATE_LORA,
    LEARNING_RATE_PRETRAINED,
    LEARNING_RATE_RANDOM,
    LEARNING_RATE_STARTER,
    PRECISIONS,
    RECIPES,
    SCHEDULES,
    FinetuneConfig,
)
from training.sources import Source, load_source, sha256_of, weighted
from training.trainer import BAD_BATCH_NAME, PREDICTIONS_NAME, TENSORBOARD_NAME, GenerationTrainer
from training.unanswerable import make_unanswerable
from training.windows import windows_for

CONFIG_NAME, LOCK_NAME = "training_config.json", "training.lock"
PARTIAL_PATTERN = ".*.partial"
"""Of files that `write_file` was killed in."""
LOGGING_SHARE = 1 / 200
"""Steps between two logs, as a share of all: 100 to 200 logs of a run, or one each step."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def finetune(config: FinetuneConfig, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Runs the fine-tuning and writes model, tokenizer, settings, metrics and report to `config.output`.

    The model is that of the best evaluation by F1. Where `config.output` holds the checkpoints of a run with the same
    settings and data, it goes on from the last one.

    Args:
        config: The settings.
        dry_run: Load, check and tokenise everything, print what was found, and stop; `config.output` is not touched.

    Returns:
        The metrics, also in `metrics.json`; None after a dry run, or where the run was interrupted and can go on.

    Raises:
        InvalidInputError: Settings, data or model are not what they have to be. Nothing was written then.
        TrainingError: The loss is not a number any more, or the memory or the disk does not suffice.
    """
    started = time.monotonic()
    _check_output(config)
    _check_launcher(config)
    arguments = _training_arguments(config)
    set_seed(config.seed)
    if config.from_scratch is not None:
        model, tokenizer = build_model(config.from_scratch, str(config.tokenizer), dropout=config.dropout)
    else:
        model, tokenizer = load_model(str(config.model), dropout=config.dropout)
    with arguments.main_process_first(desc="loading the data"):
        data = _load_data(config, tokenizer, model.config.n_positions)
    overview = overview_of(data.rows, config)
    if arguments.should_save:
        for warning in data.warnings():
            sys.stderr.write(f"warning: {warning}\n")
        if data.is_held_out:
            figures = data.eval_source.to_dict()
            sys.stderr.write(
                f"evaluating on {data.eval_source.name}: {figures['questions']} questions about "
                f"{figures['passages']} passages\n"
            )
    if dry_run:
        if arguments.should_save:
            print(describe([*data.sources, data.eval_source], data.rows, overview, tokenizer))
            print(
                f"trained on: {data.train_questions} questions, {data.without_answer} of them without an answer, and "
                f"{data.made_without_answer} more without an answer, which were made of them"
            )
            print(
                f"windows: of up to {data.windows.window} tokens of a passage, neighbors share {data.windows.stride}; "
                f"{overview.left_out} without an answer left out"
            )
            print(data.overlap)
        return None
    settings = {
        **config.to_dict(),
        "processes": arguments.world_size,
        "sha256_of_model": _sha256_of(model if config.from_scratch is None else None, tokenizer),
        "sha256_of_train": [source.sha256 for source in data.sources],
        "sha256_of_eval": data.eval_source.sha256,
    }
    with _lock(config.output) if arguments.should_save else nullcontext():
        _check_output(config)  # again: another training may have been there meanwhile
        checkpoints, damages = good_checkpoints(config.output)
        _check_same_run(config, settings, checkpoints, damages)
        trainer = GenerationTrainer(
            model=_prepared(model, config),
            arguments=arguments,
            tokenizer=tokenizer,
            train_rows=data.rows,
            eval_examples=data.eval_examples,
            windows=data.windows,
            config=config,
            checkpoints=checkpoints,
        )
        if arguments.should_save:
            _begin(config.output, settings, checkpoints, damages)
        _train(trainer, config, checkpoints[-1] if checkpoints else None)
        if trainer.stop.stopped:
            return None
        best, history = trainer.best(), history_of(trainer.state.log_history)
        metrics = {
            "train_questions": data.train_questions,
            "train_questions_without_answer": data.without_answer,
            "questions_made_without_answer": data.made_without_answer,
            "questions_that_do_not_fit": len(data.too_long),
            "window": data.windows.window,
            "stride": data.windows.stride,
            "eval_questions": len(data.eval_examples),
            "eval_passages": len({normalized(example.context) for example in data.eval_examples}),
            "eval_questions_trained_on": data.overlap.same_question,
            "eval_questions_on_passages_trained_on": data.overlap.same_passage,
            "steps": trainer.state.global_step,
            "best_step": best["step"],
            "losses": [[row["step"], row["loss"]] for row in history if "loss" in row],
            "evaluations": trainer.evaluations(),
            "exact_match": best["exact_match"],
            "f1": best["f1"],
            "seconds": time.monotonic() - started,
        }
        if arguments.should_save:
            with writes_checkpoints(config.output):
                _finish(trainer, config, data, overview, metrics, history)
        trainer.accelerator.wait_for_everyone()
    return metrics


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on and is evaluated with.

    Attributes:
        sources: Of training questions, as given.
        eval_source: Of questions to evaluate with.
        eval_examples: These, as many as are wanted.
        rows: Tokenised training rows.
        train_questions: How many questions of the sources are in them.
        without_answer: How many of these have no answer.
        made_without_answer: How many further questions without an answer are in the rows, made of the others.
        windows: How long passages are read, in training, evaluation and use.
        too_long: What is wrong with each that was skipped because it fits into no window.
        is_held_out: Whether the questions to evaluate are the sources' own, held out.
        overlap: What the questions to evaluate share with those trained on.
    """

    sources: list[Source]
    eval_source: Source
    eval_examples: list[Example]
    rows: datasets.Dataset
    train_questions: int
    without_answer: int
    made_without_answer: int
    windows: WindowSettings
    too_long: list[str]
    is_held_out: bool
    overlap: Overlap

    def warnings(self) -> list[str]:
        """What a user has to know, a line each."""
        lines = [line for source in (*self.sources, self.eval_source) for line in source.warnings()]
        if self.too_long:
            lines.append(f"skipped {len(self.too_long)} questions that do not fit, the first: {self.too_long[0]}")
        if self.overlap:
            lines.append(f"{self.overlap} Scores are too high by that; --eval {DEFAULT_EVAL} holds out by passage")
        return lines


def _load_data(config: FinetuneConfig, tokenizer: GPT2TokenizerFast, positions: int) -> Data:
    max_length = config.max_length or positions
    for name, tokens in (("--max-length", max_length), ("--pad-to", config.pad_to)):
        if tokens > positions:
            raise InvalidInputError(
                f"got {name} {tokens}; the model has {positions} positions, expected at most as many"
            )
    options = {"columns": parse_columns(config.columns), "skip_bad_rows": config.skip_bad_rows}
    sources = [load_source(name, "train", **options) for name in config.train]
    is_held_out = share_of(config.eval) is not None
    if is_held_out:
        sources, eval_source = hold_out(sources, config.eval, seed=config.seed)
    else:
        eval_source = load_source(config.eval, "eval", **options)
    weights = config.weights or (1.0,) * len(sources)
    parts = [weighted(source, weight, config.seed) for source, weight in zip(sources, weights, strict=True)]
    parts = _limited(parts, config.limit_train)
    if not any(parts):
        raise InvalidInputError(f"weights {list(weights)} leave no question to train on; expected larger ones")
    windows = windows_for(
        list(chain(*parts)),
        tokenizer.backend_tokenizer,
        window=config.window,
        stride=config.stride,
        max_positions=max_length,
        least=(read_windows(config.model).window or 0) if config.model is not None else 0,
    )
    asked = eval_source.examples if is_held_out else eval_source.examples[: config.limit_eval]
    asked, not_asked = _fitting(asked, tokenizer, max_length, windows, config)
    if is_held_out:  # `heldout.jsonl` has none that a bundle could not answer
        eval_source = replace(eval_source, examples=tuple(asked), sha256=sha256_of(asked))
    eval_examples = asked[: config.limit_eval]
    settings = RowSettings(
        loss_on=config.loss_on,
        text_loss_share=config.text_loss_share,
        max_positions=max_length,
        windows=windows,
        no_answer_windows=config.no_answer_windows,
        seed=config.seed,
        packing=config.packing,
    )
    made = make_unanswerable(parts, config.no_answer_share, seed=config.seed)
    problems: list[str] = []
    try:
        rows = cached_rows([*chain(*parts), *made], tokenizer, settings, cache_dir=config.cache_dir)
    except PromptTooLongError as error:
        checked = [[(example, too_long(example, tokenizer, settings)) for example in part] for part in parts]
        problems = [problem for part in checked for _, problem in part if problem is not None]
        count = sum(map(len, parts))
        if len(problems) == count:
            raise
        if problems and not config.skip_bad_rows:
            raise PromptTooLongError(
                f"{error}. Or leave such questions out, {len(problems)} of {count}, with --skip-bad-rows"
            ) from error
        parts = [[example for example, problem in part if problem is None] for part in checked]
        made = make_unanswerable(parts, config.no_answer_share, seed=config.seed)
        made = [example for example in made if too_long(example, tokenizer, settings) is None]
        rows = cached_rows([*chain(*parts), *made], tokenizer, settings, cache_dir=config.cache_dir)
    examples = list(chain(*parts))
    return Data(
        sources=sources,
        eval_source=eval_source,
        eval_examples=eval_examples,
        rows=rows,
        train_questions=len(examples),
        without_answer=sum(not example.answers for example in examples),
        made_without_answer=len(made),
        windows=windows,
        too_long=[*problems, *not_asked],
        is_held_out=is_held_out,
        overlap=overlap_of(examples, eval_examples),
    )


def _limited(parts: Sequence[Sequence[Example]], limit: int | None) -> list[Sequence[Example]]:
    """The first questions of all parts together."""
    left = sum(map(len, parts)) if limit is None else limit
    limited = []
    for part in parts:
        limited.append(part[:left])
        left -= len(limited[-1])
    return limited


def _fitting(
    examples: Sequence[Example],
    tokenizer: GPT2TokenizerFast,
    max_length: int,
    windows: WindowSettings,
    config: FinetuneConfig,
) -> tuple[list[Example], list[str]]:
    """The questions that can be evaluated, and what is wrong with each other one.

    Raises:
        InvalidInputError: Two have the same id.
        PromptTooLongError: One leaves no room for a window, and bad rows are not to be skipped, or it is all of them.
    """
    (name, count), *_ = Counter(example.id for example in examples).most_common(1)
    if count > 1:
        raise InvalidInputError(f"{count} questions to evaluate have the id {name!r}; expected one of its own for each")

    def check(asked: Sequence[Example]) -> None:
        windows_of(asked, tokenizer, max_positions=max_length, max_new_tokens=config.max_new_tokens, settings=windows)

    try:
        check(examples)
    except PromptTooLongError:
        fitting, problems = [], []
        for example in examples:
            try:
                check([example])
                fitting.append(example)
            except PromptTooLongError as error:
                problems.append(str(error).replace("question 0 ", f"question {example.id} "))
        if not fitting or not config.skip_bad_rows:
            raise PromptTooLongError(
                f"{problems[0]}. Or leave such questions out of the evaluation, {len(problems)} of {len(examples)}, "
                "with --skip-bad-rows"
            ) from None
        return fitting, problems
    return list(examples), []


def _lock(output: Path) -> AbstractContextManager[None]:
    """Creates the output directory, and keeps other trainings out of it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"--output {output} cannot be created ({error.strerror}); expected a place with write permission"
        ) from error
    return folder_lock(output / LOCK_NAME, what=f"a training in {output}")


def _sha256_of(model: GPT2LMHeadModel | None, tokenizer: GPT2TokenizerFast) -> str:
    """The SHA-256 of a tokenizer, and of a model's weights; None of random ones, which the seed decides."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items() if model is not None else ()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _prepared(model: GPT2LMHeadModel, config: FinetuneConfig) -> GPT2LMHeadModel | PeftModel:
    """The model as the settings train it; without the path that it came from, which libraries would write down."""
    model.name_or_path = model.config.name_or_path = ""
    model.label_smoothing = config.label_smoothing
    if config.lora_rank is None:
        return model
    return with_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)


def _begin(output: Path, settings: dict[str, Any], checkpoints: Sequence[Path], damages: Sequence[str]) -> None:
    """Says where a run goes on from, clears what a kill left half-written, and writes the settings."""
    for damage in damages:
        sys.stderr.write(f"warning: {damage}\n")
    if checkpoints:
        sys.stderr.write(f"going on from {checkpoints[-1]}\n")
    shutil.rmtree(output / UNFINISHED_NAME, ignore_errors=True)
    for path in output.glob(PARTIAL_PATTERN):
        path.unlink()
    write_json(output / CONFIG_NAME, settings)


def _train(trainer: GenerationTrainer, config: FinetuneConfig, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        trainer.args.eval_on_start = False
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if trainer.is_at_its_end():  # `train` would make one more step
            return
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except UnpicklingError as error:
        raise TrainingError(
            f"{checkpoint} holds a pickle of more than tensors and numbers, which is not opened. Delete this "
            "checkpoint, to go on from one before it, or start in another directory"
        ) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        good, _ = good_checkpoints(config.output)
        raise TrainingError(
            f"out of memory with --batch-size {config.batch_size}. Halve it and double --gradient-accumulation (now "
            f"{config.gradient_accumulation}), which trains the same; or add --gradient-checkpointing, lower "
            "--max-length, take --precision bf16, or train less of the model with --lora-rank 8, in another --output. "
            "If it was while answering, lower --eval-batch-size. Last checkpoint: "
            f"{good[-1] if good else 'none yet'}"
        ) from error


def _finish(
    trainer: GenerationTrainer,
    config: FinetuneConfig,
    data: Data,
    overview: Overview,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Copies the best model to the output directory, reports, and deletes the checkpoints."""
    for path in sorted(trainer.best_directory().iterdir()):
        if path.name != CHECKSUMS_NAME:
            write_file(config.output / path.name, path.read_bytes())
    answers = read_predictions(config.output / PREDICTIONS_NAME)
    if data.is_held_out:
        write_file(config.output / HELDOUT_NAME, json_lines_of(data.eval_source.examples))
    write_report(
        config.output,
        config=config,
        sources=data.sources,
        eval_source=data.eval_source,
        overlap=data.overlap,
        overview=overview,
        metrics=metrics,
        history=history,
        learning_rates=trainer.learning_rates(),
        worst=worst_examples(data.eval_examples, answers),
    )
    delete_checkpoints(config.output, kept=())


def _check_launcher(config: FinetuneConfig) -> None:
    """Refuses what cannot be evaluated: FSDP's first version hides the weights, and LoRA's cannot be gathered."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise InvalidInputError("got FSDP of version 1; expected version 2: accelerate launch --fsdp_version 2")
    if config.lora_rank is not None:
        raise InvalidInputError(
            "--lora-rank and FSDP do not go together: LoRA needs little memory, launch without FSDP"
        )


def _check_output(config: FinetuneConfig) -> None:
    """Refuses an output directory that holds anything but the beginning of a run."""
    output = config.output
    if config.tensorboard and find_spec("tensorboard") is None:
        raise InvalidInputError("--tensorboard needs the package of that name: pip install tensorboard")
    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"--output {output} is a file; expected a directory that is new or empty")
    if not output.is_dir():
        return
    if (output / METRICS_NAME).exists():
        raise InvalidInputError(f"--output {output} holds a finished run; choose another directory")
    written = (CONFIG_NAME, LOCK_NAME, UNFINISHED_NAME, PARTIAL_PATTERN, BAD_BATCH_NAME.format("*"), TENSORBOARD_NAME)
    if (output / CONFIG_NAME).exists():  # it is written before any of these
        written += (f"{PREFIX_CHECKPOINT_DIR}-*", f"{BEST_PREFIX}-*")
    others = [path.name for path in output.iterdir() if not any(path.match(pattern) for pattern in written)]
    if others and not any((path / CHECKSUMS_NAME).is_file() for path in checkpoints_in(output).values()):
        raise InvalidInputError(
            f"--output {output} exists and is not empty ({others[0]} is in it); choose another directory"
        )


def _check_same_run(
    config: FinetuneConfig, settings: dict[str, Any], checkpoints: Sequence[Path], damages: Sequence[str]
) -> None:
    """Refuses to go on where no checkpoint is good, or where they are of other settings or data."""
    if not checkpoints:
        if damages:
            raise InvalidInputError(
                f"{damages[-1]}. No checkpoint in {config.output} is good, and none was deleted. Restore one from a "
                "backup, or start in another directory"
            )
        return
    try:
        began = json.loads((config.output / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{config.output} has checkpoints, and {config.output / CONFIG_NAME} cannot be read ({error}); the "
            "settings that the run began with are in it. Bring it back, or start in another directory"
        ) from error
    changed = [
        f"{name} was {began.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if name not in FREE_TO_CHANGE and began.get(name) != value
    ]
    if changed:
        raise InvalidInputError(
            f"--output {config.output} holds the checkpoints of another run: {'; '.join(changed)}. Give the settings "
            "and the data that it began with, or start in another directory"
        )


def _training_arguments(config: FinetuneConfig) -> TrainingArguments:
    precision = config.resolved_precision
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise InvalidInputError(
            f"there are {torch.cuda.device_count()} GPUs; expected one, or a process for each: torchrun "
            "--nproc-per-node N -m training.finetune ..., or hide the others with CUDA_VISIBLE_DEVICES=0"
        )
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # Trainer's torch.load would unpickle anything with it
    # Trainer would take what it finds there, of a launcher or of an earlier run, over its own False.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
    has_accelerator = torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(config.output),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        learning_rate=config.resolved_learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_ratio=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=False if torch.cuda.is_available() else None,  # torch_compile would turn it on
        torch_compile=config.compile,
        use_cpu=not has_accelerator,
        ddp_backend="gloo" if not has_accelerator and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        eval_strategy="epoch" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        eval_on_start=config.eval_at_start,
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=LOGGING_SHARE,
        logging_first_step=True,
        report_to=[],
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # TrainingProgress shows it
    )
    if not has_accelerator:  # several processes get cpu:0, which torch.load cannot put a checkpoint's tensors on
        arguments._setup_devices = torch.device("cpu")
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line. What is not given is left out of the result, for a recipe or a default to fill in."""
    default = FinetuneConfig(model="starter", train=("",), output=Path())
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune",
        description="Fine-tune a GPT-2 to answer questions about passages. The same command, started again, goes on "
        "from the last checkpoint. Under `torchrun` or `accelerate launch` it runs in several processes.",
        argument_default=argparse.SUPPRESS,
    )
    start = parser.add_argument_group("model (give one)")
    start.add_argument("--model", metavar="gpt2|starter|DIR", help="a hub id, the built-in small model, or a directory")
    start.add_argument("--from-scratch", choices=list(ARCHITECTURES), help="random weights; needs --tokenizer")
    start.add_argument("--tokenizer", metavar="DIR", help="tokenizer for --from-scratch: a directory or a hub id")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="squad, squad_v2 or an id of the hub; a SQuAD .json, .jsonl, .csv, .tsv or .parquet file; a folder of "
        "save_to_disk; sample or sample_v2",
    )
    data.add_argument(
        "--eval",
        metavar="SHARE|SOURCE",
        help="scored at the end of each epoch: a percentage of the training passages, whose questions are held out, "
        f"or a source as of --train (default: {default.eval}; a file of such a name: ./{default.eval})".replace(
            "%", "%%"
        ),
    )
    data.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="how often an epoch has each source (default: 1 1 ...)"
    )
    add_columns_option(data)
    data.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out; the first ends the run else")
    data.add_argument(
        "--no-answer-share",
        type=float,
        metavar="X",
        help="questions without an answer to train on, for each question; what the sources lack is made of questions "
        f"that are asked about other passages (default: {default.no_answer_share})",
    )
    data.add_argument("--limit-train", type=int, metavar="N", help="use only the first N training questions")
    data.add_argument("--limit-eval", type=int, metavar="N", help="use only the first N questions to evaluate")
    data.add_argument("--cache-dir", type=Path, metavar="DIR", help="where tokenised rows are kept")
    data.add_argument("--dry-run", action="store_true", help="check and tokenise, show what was found, train nothing")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="new, empty, or with this run's checkpoints"
    )
    recipe = parser.add_argument_group("recipe")

    def add(group: Any, name: str, words: str, **options: Any) -> None:
        """An option of a setting's name, with its default in the help."""
        value = getattr(default, name)
        shown = "" if value is None or value is False else f" (default: {value})"
        group.add_argument(f"--{name.replace('_', '-')}", help=f"{words}{shown}", **options)

    recipe.add_argument("--recipe", choices=list(RECIPES), help="named settings; other options go over them")
    add(recipe, "epochs", "times over the training data", type=float)
    recipe.add_argument("--max-steps", type=int, metavar="N", help="stop after so many steps")
    add(recipe, "batch_size", "rows, of each process", type=int)
    add(recipe, "gradient_accumulation", "batches to a step", type=int)
    rates = (
        f"{LEARNING_RATE_PRETRAINED}; {LEARNING_RATE_LORA} with LoRA; {LEARNING_RATE_STARTER} for starter; "
        f"{LEARNING_RATE_RANDOM} from scratch"
    )
    recipe.add_argument("--learning-rate", type=float, help=f"peak (default: {rates})")
    add(recipe, "schedule", "how the learning rate falls", choices=SCHEDULES)
    add(recipe, "warmup", "share of the steps to warm up", type=float)
    add(recipe, "weight_decay", "of matrices; biases and norms have none", type=float)
    add(recipe, "label_smoothing", "share of a target that goes to all tokens", type=float)
    add(recipe, "dropout", "the model's own unless given", type=float)
    add(recipe, "loss_on", "tokens that count", choices=LOSS_ON)
    add(recipe, "text_loss_share", "share of passage and question that counts, too", type=float)
    add(recipe, "packing", "questions of one passage in one row", action="store_true")
    add(recipe, "pad_to", "pad to so many tokens at least", type=int)
    add(recipe, "max_length", "tokens of prompt and answer; the model's positions unless given", type=int)
    add(recipe, "window", "tokens of a passage read at once; unless given, one that holds 99 %% of them", type=int)
    add(recipe, "stride", "tokens that neighboring windows share; a quarter of a window unless given", type=int)
    add(recipe, "no_answer_windows", "windows without the answer to train on, for each with it", type=int)
    add(recipe, "precision", "of the products; auto: what the GPU has", choices=PRECISIONS)
    add(recipe, "gradient_checkpointing", "less memory, more time", action="store_true")
    add(recipe, "compile", "torch.compile the model", action="store_true")
    add(recipe, "lora_rank", "train LoRA matrices of this rank, merged at the end", type=int)
    add(recipe, "lora_alpha", "their scale, over the rank", type=float)
    add(recipe, "lora_dropout", "dropout before them", type=float)
    add(recipe, "seed", "of weights, order and dropout", type=int)
    running = parser.add_argument_group("evaluation and checkpoints")
    add(running, "eval_at_start", "evaluate before the first step, too", action="store_true")
    add(running, "eval_steps", "evaluate every so many steps, not every epoch", type=int)
    add(running, "eval_batch_size", "questions answered together", type=int)
    add(running, "max_new_tokens", "the most tokens of an answer", type=int)
    add(running, "patience", "stop after so many evaluations without a better F1", type=int)
    add(running, "save_steps", "steps between checkpoints", type=int)
    add(running, "keep", "checkpoints to keep", type=int)
    add(running, "tensorboard", "write TensorBoard's files, too", action="store_true")
    return parser


def config_of(arguments: argparse.Namespace) -> FinetuneConfig:
    """The settings that a command line asks for: its own, then its recipe's, then the defaults."""
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name != "dry_run"
    }
    return FinetuneConfig(**{**RECIPES.get(given.get("recipe", ""), {}), **given})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (see `qa_onnx.cli.run_command`)."""
    arguments = make_parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return run_command(
        lambda: _finetune_and_say(config_of(arguments), dry_run="dry_run" in arguments),
        interrupted="interrupted at once; the same command goes on from the last checkpoint, if there is one",
    )


def _finetune_and_say(config: FinetuneConfig, *, dry_run: bool) -> int:
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
            print(f"stopped; the same command goes on (checkpoints are in {config.output})")
        return EXIT_INTERRUPTED
    if is_first:
        print(f"wrote the model to {config.output}")
        shown = ("exact_match", "f1", "eval_questions", "steps", "best_step", "seconds")
        print(json.dumps({name: metrics[name] for name in shown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
