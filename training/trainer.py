"""transformers' Trainer for a reader: it evaluates by answering, keeps the best weights, completes checkpoints."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
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
    best_of,
    delete_checkpoints,
    evaluations_of,
    finish_checkpoint,
    good_checkpoints,
    writes_checkpoints,
)
from training.data import Collator, LengthGroupedSampler
from training.evaluation import generate_answers
from training.model import GPT2LMHeadModel, PeftModel, merged, whole
from training.progress import TrainingProgress
from training.settings import FinetuneConfig
from training.tensorboard import TensorBoardLog

BAD_BATCH_NAME, PREDICTIONS_NAME, TENSORBOARD_NAME = "bad-batch-{}.safetensors", "predictions.json", "tensorboard"
"""The first one is of the process with that number."""


class GenerationTrainer(Trainer):
    """transformers' Trainer, whose evaluation answers questions and scores the answers."""

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
        self.stop = StopWhenAsked()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_examples,
            data_collator=Collator(pad_token_id=tokenizer.eos_token_id, packing=config.packing, pad_to=config.pad_to),
            processing_class=tokenizer,
            callbacks=[
                self.stop,
                TrainingProgress(),
                *([TensorBoardLog(config.output / TENSORBOARD_NAME)] if config.tensorboard else []),
            ],
        )
        self.remove_callback(PrinterCallback)
        self._tokenizer = tokenizer
        self._eval_examples = eval_examples
        self._windows = windows
        self._config = config
        self._checkpoints = list(checkpoints)

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation so far, those before a resume included (see `evaluations_of`)."""
        return evaluations_of(self.state.log_history)

    def best(self) -> dict[str, Any]:
        """The evaluation with the best F1, the last among equals."""
        best = best_of(self.evaluations())
        assert best is not None, "the last step is always evaluated"
        return best

    def best_directory(self) -> Path:
        """Where the weights of the best evaluation are: a whole model, LoRA merged, with its predictions."""
        return self._config.output / f"{BEST_PREFIX}-{self.best()['step']}"

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Answers the evaluation questions, each process its part, and keeps the weights where F1 is the best so far.

        After `patience` evaluations without a better F1 it asks to stop. Trainer's own arguments are not used.

        Returns:
            Exact match and F1 in percent, the same in all processes.
        """
        part = self._eval_examples[self.args.process_index :: self.args.world_size]
        model = merged(whole(self.accelerator.unwrap_model(self.model)))
        answered = generate_answers(
            model,
            self._tokenizer,
            part,
            max_new_tokens=self._config.max_new_tokens,
            batch_size=self._config.eval_batch_size,
            max_length=self._config.max_length,
            windows=self._windows,
        )
        answers = dict(gather_object(list(answered.items())))
        scores = evaluate(self._eval_examples, answers)
        metrics = {"eval_exact_match": scores.exact_match, "eval_f1": scores.f1}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.best()["step"] == self.state.global_step:
            self._keep(model, answers)
        if self.is_patience_used_up():
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

    def is_at_its_end(self) -> bool:
        """Whether there is nothing left to train."""
        return self.state.global_step >= self.state.max_steps or self.is_patience_used_up()

    def is_patience_used_up(self) -> bool:
        """Whether `patience` evaluations in a row were not better than one before them."""
        scores = [row["f1"] for row in self.evaluations()]
        patience = self._config.patience
        return patience is not None and bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= patience

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            TrainingError: The loss is not a finite number. The batch was saved to `output`.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            path = self._config.output / BAD_BATCH_NAME.format(self.args.process_index)
            write_file(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in inputs.items()}))
            step = self.state.global_step
            raise self._diverged(f"the loss is {loss.item()} after step {step}; its batch was saved to {path}")
        return loss

    def _diverged(self, what: str) -> TrainingError:
        good, _ = good_checkpoints(self._config.output)
        return TrainingError(
            f"{what}. The last good checkpoint: {good[-1] if good else 'none was written yet'}. Lower "
            "--learning-rate, raise --warmup, or train in fp32 or bf16 rather than fp16, in another --output"
        )

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler[int]:
        return LengthGroupedSampler(
            self.train_dataset["length"],
            batch_rows=self.args.per_device_train_batch_size * self.args.world_size,
            seed=self.args.seed,
        )

    def _keep(self, model: GPT2LMHeadModel, answers: dict[str, str]) -> None:
        """Saves the model and its answers as the best so far; older ones go with the next checkpoint."""
        if self.args.should_save:
            name = self.best_directory().name
            unfinished = self._config.output / UNFINISHED_NAME / name
            with writes_checkpoints(self._config.output):
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
        with writes_checkpoints(output):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                self._checkpoints = [*self._checkpoints, finish_checkpoint(output, name)][-self._config.keep :]
                delete_checkpoints(output, kept={*self._checkpoints, *map(self._best_at, self._checkpoints)})

    def _best_at(self, checkpoint: Path) -> Path | None:
        """The best weights that there were when a checkpoint was written, which a run that goes on from it needs."""
        step = int(checkpoint.name.rpartition("-")[2])
        best = best_of([row for row in self.evaluations() if row["step"] <= step])
        return None if best is None else checkpoint.with_name(f"{BEST_PREFIX}-{best['step']}")

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes checkpoints; `_save_checkpoint` renames them to their place."""
        return str(self._config.output / UNFINISHED_NAME)

    def _save(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the weights and the tokenizer, without Trainer's arguments: nothing reads that pickle."""
        super()._save(output_dir, state_dict)
        Path(output_dir, TRAINING_ARGS_NAME).unlink()


class StopWhenAsked(TrainerCallback):
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
        if args.eval_strategy == IntervalStrategy.EPOCH and _is_at_epochs_end(state):
            self._save_after_evaluation, control.should_save = control.should_save, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the evaluation out where a stop came before the epoch's end."""
        if self.stopped and not _is_at_epochs_end(state):
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


def _is_at_epochs_end(state: TrainerState) -> bool:
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps
