"""transformers' Trainer, which evaluates by answering, saves the best weights and completes checkpoints."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import save
from torch.utils.data import Sampler
from transformers import (
    GPT2TokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from qa_onnx.checkpoint.windows import write_windows
from qa_onnx.data.example import Example
from qa_onnx.evaluation.metrics import evaluate
from qa_onnx.files import write_file
from qa_onnx.text.windows import WindowSettings
from training.checkpoints import (
    BEST_PREFIX,
    UNFINISHED_NAME,
    TrainingError,
    complete_checkpoints,
    delete_checkpoints,
    find_best_evaluation,
    finish_checkpoint,
    list_evaluations,
    report_disk_errors,
)
from training.data import Collator, LengthGroupedSampler
from training.evaluation import generate_answers
from training.model import GPT2LMHeadModel, gather_weights, merge_lora
from training.padding import plan_batches
from training.progress import TrainingProgress
from training.settings import FinetuneConfig
from training.tensorboard import TensorBoardLog

BAD_BATCH_NAME, PREDICTIONS_NAME, TENSORBOARD_NAME = "bad-batch-{}.safetensors", "predictions.json", "tensorboard"
"""The first one is of the process with that number."""


class GenerationTrainer(Trainer):
    """transformers' Trainer, whose evaluation answers questions and scores the answers."""

    control: TrainerControl
    state: TrainerState

    def __init__(
        self,
        *,
        model: GPT2LMHeadModel | PeftModel,
        arguments: TrainingArguments,
        tokenizer: GPT2TokenizerFast,
        train_rows: datasets.Dataset,
        eval_examples: list[Example],
        windows: WindowSettings,
        config: FinetuneConfig,
        checkpoints: Sequence[Path] = (),
    ) -> None:
        """Takes the rows to train on, the questions to evaluate with, and the good checkpoints of before."""
        self.stop = GracefulStopCallback()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_examples,
            data_collator=Collator(
                pad_token_id=tokenizer.eos_token_id, packing=config.data.packing, pad_to=config.data.pad_to
            ),
            processing_class=tokenizer,
            callbacks=[
                self.stop,
                TrainingProgress(),
                *([TensorBoardLog(config.output / TENSORBOARD_NAME)] if config.evaluation.tensorboard else []),
            ],
        )
        self.remove_callback(PrinterCallback)
        model.config.use_cache = True  # transformers 5 turns it off, and it would be saved so
        self._tokenizer = tokenizer
        self._eval_examples = eval_examples
        self._windows = windows
        self._config = config
        self._checkpoints = list(checkpoints)

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation so far, those before a resume included (see `list_evaluations`)."""
        return list_evaluations(self.state.log_history)

    def best(self) -> dict[str, Any]:
        """The evaluation with the best F1, the last among equals."""
        best = find_best_evaluation(self.evaluations())
        assert best is not None, "the last step is always evaluated"
        return best

    def best_directory(self) -> Path:
        """Where the weights of the best evaluation are: a whole model, LoRA merged, with its predictions."""
        return self._config.output / f"{BEST_PREFIX}-{self.best()['step']}"

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Answers the evaluation questions, each process its part, and saves the weights if F1 is the best so far.

        The answers are those of the weights as they are saved, in fp32, whatever precision the training computes in.
        After `early_stopping_patience` evaluations without a better F1 it asks to stop. Trainer's own arguments are
        not used.

        Returns:
            Exact match and F1 in percent, the same in all processes.
        """
        part = self._eval_examples[self.args.process_index :: self.args.world_size]
        model = merge_lora(gather_weights(self.accelerator.unwrap_model(self.model)))
        with _without_autocast(model):
            answered = generate_answers(
                model,
                self._tokenizer,
                part,
                max_new_tokens=self._config.evaluation.max_new_tokens,
                batch_size=self._config.evaluation.eval_batch_size,
                max_length=self._config.data.max_length,
                windows=self._windows,
            )
        answers = dict(gather_object(list(answered.items())))
        scores = evaluate(self._eval_examples, answers)
        metrics = {"eval_exact_match": scores.exact_match, "eval_f1": scores.f1}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.best()["step"] == self.state.global_step:
            self._save_best(model, answers)
        if self.has_exhausted_patience():
            self.control.should_training_stop = True
        return metrics

    def learning_rates(self) -> list[float]:
        """The learning rate of each step that was made, the first one's first."""
        rate = self.args.learning_rate
        schedule = get_scheduler(
            self.args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=rate),
            num_warmup_steps=self.args.get_warmup_steps(self.state.max_steps),
            num_training_steps=self.state.max_steps,
        )
        return [rate * schedule.lr_lambdas[0](step) for step in range(self.state.global_step)]

    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.state.global_step >= self.state.max_steps or self.has_exhausted_patience()

    def has_exhausted_patience(self) -> bool:
        """Whether the last `early_stopping_patience` evaluations were not better than one before them."""
        scores = [row["f1"] for row in self.evaluations()]
        patience = self._config.evaluation.early_stopping_patience
        return patience is not None and bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= patience

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the gradients of a batch, in as many forward and backward passes as `micro_batch_tokens` asks for.

        The loss of each part is divided by the labelled tokens of the whole batch, so that the sums of losses and of
        gradients are those of one pass.

        Raises:
            TrainingError: The loss is not a finite number. The batch was saved to `output`.
        """
        parts = split_batch(inputs, self._config.optimization.micro_batch_tokens)
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)  # processes exchange gradients once per batch
            with nullcontext() if is_last else self.accelerator.no_sync(model=model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        if not torch.isfinite(loss):
            path = self._config.output / BAD_BATCH_NAME.format(self.args.process_index)
            write_file(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in inputs.items()}))
            step = self.state.global_step
            raise self._diverged(f"the loss is {loss.item()} after step {step}; its batch was saved to {path}")
        return loss

    def _diverged(self, what: str) -> TrainingError:
        good, _ = complete_checkpoints(self._config.output)
        return TrainingError(
            f"{what}. The last good checkpoint: {good[-1] if good else 'none was written yet'}. Lower "
            "--learning-rate, raise --warmup-ratio, or train in fp32 or bf16 rather than fp16, in another --output"
        )

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler[int]:
        return LengthGroupedSampler(
            self.train_dataset["length"],
            batch_rows=self.args.per_device_train_batch_size * self.args.world_size,
            seed=self.args.seed,
        )

    def _save_best(self, model: GPT2LMHeadModel, answers: dict[str, str]) -> None:
        """Saves the model and its answers as the best so far; the next checkpoint deletes older ones."""
        if self.args.should_save:
            name = self.best_directory().name
            unfinished = self._config.output / UNFINISHED_NAME / name
            with report_disk_errors(self._config.output):
                model.save_pretrained(unfinished)
                self._tokenizer.save_pretrained(unfinished)
                write_windows(unfinished, self._windows)
                write_file(unfinished / PREDICTIONS_NAME, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
                finish_checkpoint(self._config.output, name)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint, completes it, and only then deletes what is no longer needed."""
        weights = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in weights):
            raise self._diverged(f"weights are no numbers any more after step {self.state.global_step}")
        output = self._config.output
        with report_disk_errors(output):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                self._checkpoints = [*self._checkpoints, finish_checkpoint(output, name)][
                    -self._config.evaluation.save_total_limit :
                ]
                best = filter(None, map(self._best_at, self._checkpoints))
                delete_checkpoints(output, kept={*self._checkpoints, *best})

    def _best_at(self, checkpoint: Path) -> Path | None:
        """The best weights at the time of a checkpoint, which a run that resumes from it needs."""
        step = int(checkpoint.name.rpartition("-")[2])
        best = find_best_evaluation([row for row in self.evaluations() if row["step"] <= step])
        return None if best is None else checkpoint.with_name(f"{BEST_PREFIX}-{best['step']}")

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes checkpoints; `_save_checkpoint` renames them to their place."""
        return str(self._config.output / UNFINISHED_NAME)

    def _save(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the weights and the tokenizer, without Trainer's arguments: nothing reads that pickle."""
        super()._save(output_dir, state_dict)
        Path(output_dir, TRAINING_ARGS_NAME).unlink()


def split_batch(batch: dict[str, torch.Tensor], max_tokens: int | None) -> list[dict[str, torch.Tensor]]:
    """Splits a batch by rows into parts of at most so many tokens, each padded to its own longest row.

    Args:
        batch: From `training.data.Collator`.
        max_tokens: Maximum number of tokens of a part, padding included; a single longer row is a part of its own. None
            leaves the batch as it is.
    """
    rows, width = batch["input_ids"].shape
    if max_tokens is None or rows * width <= max_tokens:
        return [batch]
    mask = batch["attention_mask"]
    if "position_ids" in batch:  # packed: of a row only the first token has position 0, as padding has
        lengths = ((batch["position_ids"] > 0).sum(dim=-1) + 1).tolist()
    else:
        lengths = mask.sum(dim=-1).tolist()
    parts = []
    for indices in plan_batches(lengths, max_rows=rows, max_tokens=max_tokens):
        length = max(lengths[index] for index in indices)
        part = {name: tensor[indices][..., :length] for name, tensor in batch.items()}
        if mask.dim() == 4:
            part["attention_mask"] = part["attention_mask"][..., :length, :]
        parts.append(part)
    return parts


@contextmanager
def _without_autocast(model: torch.nn.Module) -> Iterator[None]:
    """Computes in the precision of the weights: accelerate replaces `forward` by one under autocast."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


class GracefulStopCallback(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, write a checkpoint, stop. A second one stops at once.

    A checkpoint at the end of an epoch waits for the evaluation there, which a resumed run would leave out otherwise.
    The last step is always evaluated.

    Attributes:
        stopped: Whether training ended so, in all processes alike.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._save_after_evaluation = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops if somebody asked for it, all processes after the same step."""
        self.stopped = self._asked
        if args.world_size > 1:
            asked = torch.tensor(float(self._asked), device=args.device)
            torch.distributed.all_reduce(asked)
            self.stopped = asked.item() > 0
        if self.stopped:
            control.should_save = control.should_training_stop = True
        if args.eval_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_evaluate = True
        if args.eval_strategy == IntervalStrategy.EPOCH and _is_at_epoch_end(state):
            self._save_after_evaluation, control.should_save = control.should_save, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the evaluation out where a stop came before the epoch's end."""
        if self.stopped and not _is_at_epoch_end(state):
            control.should_evaluate = False
        if self._save_after_evaluation:
            self._save_after_evaluation, control.should_save = False, True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._before[number])
        self._asked = True
        sys.stderr.write("\nstopping after this step, with a checkpoint; once more stops at once\n")


def _is_at_epoch_end(state: TrainerState) -> bool:
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps
