"""Fine-tunes a GPT-2 for question answering: `python -m training.finetune --help`."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    GPT2TokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qa_onnx.cli import EXIT_INTERRUPTED, run_command
from qa_onnx.errors import InvalidInputError
from qa_onnx.generation import DEFAULT_STRIDE
from qa_onnx.metrics import evaluate
from qa_onnx.squad import Example
from qa_onnx.windows import encode_windows
from training.data import LOSS_ON, Collator, LossOn, load_examples, tokenize
from training.evaluation import generate_answers
from training.model import ARCHITECTURES, GPT2LMHeadModel, build_model, load_model

CONFIG_NAME, METRICS_NAME = "training_config.json", "metrics.json"
POSITIVE = (
    "epochs",
    "batch_size",
    "learning_rate",
    "limit_train",
    "limit_eval",
    "save_steps",
    "max_new_tokens",
    "eval_batch_size",
)
LEARNING_RATE_PRETRAINED = 5e-5
LEARNING_RATE_SMALL = 5e-4
"""For `starter` and for random weights: small or young models learn with steps that would wreck a pretrained GPT-2."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All settings of a run. Written to the output directory as `training_config.json`.

    Attributes:
        model: `starter`, a directory or a hub id; None with `from_scratch`.
        from_scratch: A name of `ARCHITECTURES`, to start from random weights; None with `model`.
        tokenizer: The tokenizer's directory or hub id, with `from_scratch`.
        train: `squad`, `sample` or a SQuAD JSON file.
        eval: The same; answered and scored at the end of each epoch.
        output: Directory to write to; it must be new or empty, unless `resume`.
        epochs: Times over the training data.
        max_steps: Optimizer steps after which to stop; -1 leaves it to `epochs`.
        batch_size: Rows of a batch.
        learning_rate: Peak; None is 5e-5, or 5e-4 for `starter` and random weights.
        loss_on: `answer` or `all`.
        limit_train: Use only the first so many training questions.
        limit_eval: Use only the first so many questions to evaluate.
        max_new_tokens: The most tokens of an answer in evaluation.
        eval_batch_size: Questions answered together in evaluation.
        eval_at_start: Evaluate before the first step, too.
        save_steps: Steps between resumable checkpoints.
        resume: Go on from the last checkpoint in `output`.
        bf16: bfloat16 autocast.
        seed: Of weights, order and dropout.
    """

    model: str | None
    from_scratch: str | None = None
    tokenizer: str | None = None
    train: str
    eval: str
    output: Path
    epochs: float = 2.0
    max_steps: int = -1
    batch_size: int = 16
    learning_rate: float | None = None
    loss_on: LossOn = "answer"
    limit_train: int | None = None
    limit_eval: int | None = None
    max_new_tokens: int = 32
    eval_batch_size: int = 32
    eval_at_start: bool = False
    save_steps: int = 500
    resume: bool = False
    bf16: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        """Checks what the command line cannot.

        Raises:
            InvalidInputError: The settings do not fit together.
        """
        if (self.model is None) == (self.from_scratch is None):
            raise InvalidInputError("give either --model or --from-scratch, and not both")
        if (self.from_scratch is None) != (self.tokenizer is None):
            raise InvalidInputError("--from-scratch and --tokenizer go together: random weights need a vocabulary")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidInputError(f"got {name} {value}; expected a number above 0")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InvalidInputError(f"got max_steps {self.max_steps}; expected at least 1, or -1 for all epochs")

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate, with the default filled in."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATE_SMALL if self.from_scratch or self.model == "starter" else LEARNING_RATE_PRETRAINED

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON, every default filled in, with the versions they ran on."""
        return {
            **asdict(self),
            "output": str(self.output),
            "learning_rate": self.resolved_learning_rate,
            "package_versions": {name: version(name) for name in ("torch", "transformers", "datasets", "tokenizers")},
        }


class GenerationTrainer(Trainer):
    """transformers' Trainer, whose evaluation answers questions and scores the answers."""

    def __init__(
        self,
        *,
        model: GPT2LMHeadModel,
        arguments: TrainingArguments,
        tokenizer: GPT2TokenizerFast,
        train_rows: datasets.Dataset,
        eval_examples: list[Example],
        config: FinetuneConfig,
    ) -> None:
        """Takes the tokenised training rows and the questions to evaluate with."""
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_examples,
            data_collator=Collator(pad_token_id=tokenizer.eos_token_id),
            processing_class=tokenizer,
            callbacks=[StopWhenAsked()],
        )
        self._tokenizer = tokenizer
        self._eval_examples = eval_examples
        self._config = config

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Answers the evaluation questions and returns exact match and F1; Trainer's own arguments are not used."""
        answers = generate_answers(
            self.model,
            self._tokenizer,
            self._eval_examples,
            max_new_tokens=self._config.max_new_tokens,
            batch_size=self._config.eval_batch_size,
        )
        scores = evaluate(self._eval_examples, answers)
        metrics = {"eval_exact_match": scores.exact_match, "eval_f1": scores.f1}
        self.log(metrics)
        return metrics

    def evaluations(self) -> list[dict[str, float]]:
        """Exact match and F1 of every evaluation so far, those before a resume included."""
        return [
            {
                "epoch": row["epoch"],
                "step": row["step"],
                "exact_match": row["eval_exact_match"],
                "f1": row["eval_f1"],
            }
            for row in self.state.log_history
            if "eval_f1" in row
        ]


class StopWhenAsked(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, write a checkpoint, stop. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops if somebody asked for it."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the evaluation out after a stop: it can take minutes, and the resumed run will do it."""
        if self.asked:
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._before[number])
        self.asked = True
        sys.stderr.write("\nstopping after this step, with a checkpoint; once more stops at once\n")


def finetune(config: FinetuneConfig) -> dict[str, Any] | None:
    """Runs the fine-tuning and writes model, tokenizer, settings and metrics to `config.output`.

    Returns:
        The metrics, also in `metrics.json`; None where the run was interrupted and can be resumed.

    Raises:
        InvalidInputError: Settings, data or model are not what they have to be. Nothing was written then.
    """
    started = time.monotonic()
    checkpoint = _check_output(config)
    if checkpoint is not None:
        _check_same_settings(config)
    set_seed(config.seed)
    train_examples = load_examples(config.train, "train")[: config.limit_train]
    eval_examples = load_examples(config.eval, "eval")[: config.limit_eval]
    if config.from_scratch is not None:
        model, tokenizer = build_model(config.from_scratch, str(config.tokenizer))
    else:
        model, tokenizer = load_model(str(config.model))
    positions = model.config.n_positions
    train_rows = tokenize(train_examples, tokenizer, loss_on=config.loss_on, max_positions=positions)
    encode_windows(  # what cannot be evaluated is refused before hours of training
        tokenizer.backend_tokenizer,
        [example.question for example in eval_examples],
        [example.context for example in eval_examples],
        max_positions=positions,
        max_new_tokens=config.max_new_tokens,
        stride=DEFAULT_STRIDE,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    _write_json(config.output / CONFIG_NAME, config.to_dict())
    trainer = GenerationTrainer(
        model=model,
        arguments=_training_arguments(config),
        tokenizer=tokenizer,
        train_rows=train_rows,
        eval_examples=eval_examples,
        config=config,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        return None
    if not any(row["step"] == trainer.state.global_step for row in trainer.evaluations()):
        trainer.evaluate()  # a run stopped or resumed at its very last step
    evaluations = trainer.evaluations()
    trainer.save_model(str(config.output))
    (config.output / TRAINING_ARGS_NAME).unlink()  # a pickle; training_config.json says the same in JSON
    metrics = {
        "train_questions": len(train_examples),
        "eval_questions": len(eval_examples),
        "steps": trainer.state.global_step,
        "losses": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
        "evaluations": evaluations,
        "exact_match": evaluations[-1]["exact_match"],
        "f1": evaluations[-1]["f1"],
        "seconds": time.monotonic() - started,
    }
    _write_json(config.output / METRICS_NAME, metrics)
    for path in config.output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)
    return metrics


def _check_output(config: FinetuneConfig) -> str | None:
    """Returns the checkpoint to go on from, None for a fresh start."""
    output = config.output
    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"--output {output} is a file; expected a directory that is new or empty")
    checkpoint = _last_checkpoint(output)
    if config.resume:
        if checkpoint is None:
            raise InvalidInputError(f"--resume: {output} has no checkpoint to go on from; start without --resume")
        return str(checkpoint)
    # A run that was killed before its first checkpoint leaves its settings alone: nothing is lost by starting again.
    if output.is_dir() and any(path.name != CONFIG_NAME for path in output.iterdir()):
        mend = "go on from its last checkpoint with --resume, or " if checkpoint else ""
        raise InvalidInputError(f"--output {output} exists and is not empty; {mend}choose another directory")
    return None


def _last_checkpoint(output: Path) -> Path | None:
    """The last checkpoint that was written whole: the Trainer writes its state last."""
    whole = [path.parent for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _check_same_settings(config: FinetuneConfig) -> None:
    """Holds the settings of a resumed run against those it began with; only how far to go may change."""
    try:
        began = json.loads((config.output / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"--resume: {config.output / CONFIG_NAME} cannot be read ({error}); the settings that the run began with "
            "are in it. Bring it back, or start in another directory"
        ) from error
    free = ("resume", "output", "package_versions", "eval_at_start", "save_steps")
    now = config.to_dict()
    changed = [
        f"{name} was {began.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in free and began.get(name) != value
    ]
    if changed:
        raise InvalidInputError(
            f"--resume: the settings are not those that the run in {config.output} began with: {'; '.join(changed)}. "
            "Give the same ones, or start in another directory"
        )


def _training_arguments(config: FinetuneConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(config.output),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.resolved_learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=0.06,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=config.bf16,
        use_cpu=config.bf16 and not torch.cuda.is_available(),
        group_by_length=True,
        length_column_name="length",
        eval_strategy="epoch",
        eval_on_start=config.eval_at_start,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=20,
        report_to=[],
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune", description="Fine-tune a GPT-2 to answer questions about passages."
    )
    start = parser.add_argument_group("model (give one)")
    start.add_argument("--model", metavar="gpt2|starter|DIR", help="a hub id, the built-in small model, or a directory")
    start.add_argument("--from-scratch", choices=list(ARCHITECTURES), help="random weights; needs --tokenizer")
    start.add_argument("--tokenizer", metavar="DIR", help="tokenizer for --from-scratch: a directory or a hub id")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train", required=True, metavar="NAME|FILE", help="squad, squad_v2, sample, sample_v2, or a SQuAD JSON file"
    )
    data.add_argument("--eval", required=True, metavar="NAME|FILE", help="as --train; scored at the end of each epoch")
    data.add_argument("--limit-train", type=int, metavar="N", help="use only the first N training questions")
    data.add_argument("--limit-eval", type=int, metavar="N", help="use only the first N questions to evaluate")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    recipe = parser.add_argument_group("recipe")
    defaults = FinetuneConfig(model="starter", train="", eval="", output=Path())
    recipe.add_argument("--epochs", type=float, default=defaults.epochs, help="default: %(default)s")
    recipe.add_argument("--max-steps", type=int, default=defaults.max_steps, help="stop after so many steps")
    recipe.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default: %(default)s rows")
    recipe.add_argument(
        "--learning-rate",
        type=float,
        help=f"default: {LEARNING_RATE_PRETRAINED}; {LEARNING_RATE_SMALL} for starter and --from-scratch",
    )
    recipe.add_argument(
        "--loss-on", choices=LOSS_ON, default=defaults.loss_on, help="tokens that count; default: %(default)s"
    )
    recipe.add_argument("--bf16", action="store_true", help="bfloat16 autocast, where the hardware has it")
    recipe.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    recipe.add_argument("--save-steps", type=int, default=defaults.save_steps, help="default: %(default)s")
    scoring = parser.add_argument_group("evaluation")
    scoring.add_argument("--eval-at-start", action="store_true", help="evaluate before the first step, too")
    scoring.add_argument("--eval-batch-size", type=int, default=defaults.eval_batch_size, help="default: %(default)s")
    scoring.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (see `qa_onnx.cli.run_command`)."""
    arguments = make_parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return run_command(
        lambda: _finetune_and_report(FinetuneConfig(**vars(arguments))),
        interrupted="interrupted at once; --resume goes on from the last checkpoint, if there is one",
    )


def _finetune_and_report(config: FinetuneConfig) -> int:
    metrics = finetune(config)
    if metrics is None:
        print(f"stopped; go on with the same command and --resume (checkpoints are in {config.output})")
        return EXIT_INTERRUPTED
    print(f"wrote the model to {config.output}")
    print(json.dumps({name: metrics[name] for name in ("exact_match", "f1", "eval_questions", "steps", "seconds")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
