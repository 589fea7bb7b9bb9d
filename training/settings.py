"""All settings of a fine-tuning run, what is wrong with them, and the named recipes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qa_onnx.data.columns import parse_columns
from qa_onnx.errors import InvalidInputError
from qa_onnx.files import public_name
from training.data import LOSS_ON, NO_ANSWER_WINDOWS, LossOn
from training.holdout import DEFAULT_EVAL, share_of
from training.model import ARCHITECTURES

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Precision = Literal["fp32", "bf16", "fp16", "auto"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LEARNING_RATE_PRETRAINED, LEARNING_RATE_LORA = 5e-5, 2e-4
LEARNING_RATE_STARTER, LEARNING_RATE_RANDOM = 1e-4, 5e-4
"""The smaller the model and the younger its weights, the larger the steps that it learns with."""
NO_ANSWER_SHARE = 0.2
"""Of questions without an answer, in the recipe for GPT-2."""

RECIPES: dict[str, dict[str, Any]] = {
    # Radford et al. (2018) fine-tuned the first GPT so: 3 epochs, batches of 32, 6.25e-5, a short warm-up. Eight packed
    # rows hold some 37 questions of SQuAD. The loss is on the answer, and the checkpoint with the best F1 is kept.
    "gpt2-squad": {
        "epochs": 3.0,
        "batch_size": 8,
        "packing": True,
        "learning_rate": 6.25e-5,
        "warmup": 0.02,
        "precision": "auto",
        "patience": 2,
        "no_answer_share": NO_ANSWER_SHARE,
    },
    # The notebook that this project replaces, as far as it can be right: its padding, batches, loss and schedule.
    "notebook": {
        "epochs": 2.0,
        "batch_size": 2,
        "learning_rate": 5e-5,
        "schedule": "linear",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "loss_on": "all",
        "pad_to": 512,
    },
}
POSITIVE = (
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "learning_rate",
    "limit_train",
    "limit_eval",
    "max_length",
    "window",
    "lora_rank",
    "lora_alpha",
    "eval_steps",
    "patience",
    "save_steps",
    "keep",
    "max_new_tokens",
    "eval_batch_size",
)
SHARES = ("no_answer_share", "warmup", "label_smoothing", "dropout", "lora_dropout", "text_loss_share")
PATHS = ("model", "tokenizer", "eval", "output", "cache_dir")
FREE_TO_CHANGE = (*PATHS, "train", "package_versions", "eval_at_start", "save_steps", "keep", "tensorboard")
"""What may differ when a run goes on from a checkpoint. Of model and data the content decides, not the name."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All settings of a run. Written to the output directory as `training_config.json`.

    Attributes:
        model: `starter`, a directory or a hub id; None with `from_scratch`.
        from_scratch: A name of `ARCHITECTURES`, to start from random weights; None with `model`.
        tokenizer: The tokenizer's directory or hub id, with `from_scratch`.
        train: Sources of training questions (`training.sources.load_source`).
        weights: How many times an epoch has the questions of each source, fractions allowed; empty is once each.
        eval: A percentage of the training passages, whose questions are held out (`training.holdout`), or one source;
            answered and scored at the end of each epoch, or every `eval_steps`.
        columns: `FIELD=NAME` of `qa_onnx.data.rows.FIELDS`, where JSONL, CSV or hub columns have other names.
        skip_bad_rows: Leave bad rows out and count them, instead of ending with the first.
        no_answer_share: Questions without an answer to train on for each question. As many as the sources lack are made
            of questions that are asked about other passages (`training.unanswerable`).
        limit_train: Use only the first so many training questions.
        limit_eval: Use only the first so many questions to evaluate.
        output: Directory to write to: new, empty, or this same run's, which then goes on from its last checkpoint.
        recipe: The name in `RECIPES` that settings were taken from, for the record.
        epochs: Times over the training data.
        max_steps: Optimizer steps after which to stop; -1 leaves it to `epochs`.
        batch_size: Rows of a batch, of each process.
        gradient_accumulation: Batches to an optimizer step.
        learning_rate: Peak; None is 5e-5, 2e-4 with LoRA, 1e-4 for `starter`, 5e-4 for random weights.
        schedule: How the learning rate falls to 0 after the warm-up, or stays.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of weight matrices; biases and norms have none.
        label_smoothing: Share of each target that goes to all tokens alike.
        dropout: None leaves the model's own.
        loss_on: `answer` or `all`.
        text_loss_share: Share of the other tokens that count in the loss, too, with `answer`.
        packing: Several questions of one passage in one row.
        pad_to: Pad batches to so many tokens at least.
        max_length: The most tokens of a prompt with its answer; None is what the model has positions for.
        window: Maximum number of tokens of a context that are read at once; None chooses one that holds 99 % of the
            training passages (`training.windows`).
        stride: Tokens that neighboring windows share; None is a quarter of a window, though no more than the default of
            `qa_onnx`.
        no_answer_windows: Windows without the answer to train on, for each with it (`training.data.RowSettings`).
        precision: Of the products while training: `bf16` and `fp16` are autocast, `auto` takes what the GPU has.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, a third more time.
        compile: `torch.compile` the model.
        lora_rank: Train LoRA matrices of this rank instead of the weights; merged into them before saving.
        lora_alpha: Their scale, over the rank.
        lora_dropout: Dropout before them.
        eval_steps: Evaluate every so many steps, not every epoch.
        patience: Stop after so many evaluations in a row without a better F1.
        max_new_tokens: The most tokens of an answer in evaluation.
        eval_batch_size: Questions answered together in evaluation.
        eval_at_start: Evaluate before the first step, too.
        save_steps: Steps between resumable checkpoints.
        keep: How many of these to keep.
        tensorboard: Write TensorBoard's files, too, to `output/tensorboard`.
        cache_dir: Where tokenised rows are kept; None is the cache of `datasets`.
        seed: Of weights, order and dropout.
    """

    model: str | None = None
    from_scratch: str | None = None
    tokenizer: str | None = None
    train: tuple[str, ...]
    weights: tuple[float, ...] = ()
    eval: str = DEFAULT_EVAL
    columns: tuple[str, ...] = ()
    skip_bad_rows: bool = False
    no_answer_share: float = 0.0
    limit_train: int | None = None
    limit_eval: int | None = None
    output: Path
    recipe: str | None = None
    epochs: float = 2.0
    max_steps: int = -1
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.06
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    dropout: float | None = None
    loss_on: LossOn = "answer"
    text_loss_share: float = 0.0
    packing: bool = False
    pad_to: int = 0
    max_length: int | None = None
    window: int | None = None
    stride: int | None = None
    no_answer_windows: int = NO_ANSWER_WINDOWS
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    lora_rank: int | None = None
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    eval_steps: int | None = None
    patience: int | None = None
    max_new_tokens: int = 32
    eval_batch_size: int = 32
    eval_at_start: bool = False
    save_steps: int = 500
    keep: int = 2
    tensorboard: bool = False
    cache_dir: Path | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        """Checks what the command line cannot.

        Raises:
            InvalidInputError: A setting is out of range, or two do not go together.
        """
        if (self.model is None) == (self.from_scratch is None):
            raise InvalidInputError("give either --model or --from-scratch, one of the two")
        if self.from_scratch is not None and self.from_scratch not in ARCHITECTURES:
            raise InvalidInputError(f"got from_scratch {self.from_scratch!r}; expected one of {sorted(ARCHITECTURES)}")
        if (self.from_scratch is None) != (self.tokenizer is None):
            raise InvalidInputError("--tokenizer DIR belongs to --from-scratch: give both or neither")
        if self.loss_on not in LOSS_ON:
            raise InvalidInputError(f"got loss_on {self.loss_on!r}; expected one of {LOSS_ON}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidInputError(f"got {name} {value}; expected a number above 0")
        for name in ("stride", "no_answer_windows"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidInputError(f"got {name} {value}; expected a whole number of at least 0")
        for name in SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InvalidInputError(f"got {name} {value}; expected a share from 0 up to 1")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InvalidInputError(f"got max_steps {self.max_steps}; expected at least 1, or -1 for all epochs")
        if not self.train:
            raise InvalidInputError("got no source to train on; expected at least one after --train")
        if self.weights and len(self.weights) != len(self.train):
            raise InvalidInputError(f"got {len(self.train)} sources and {len(self.weights)} weights; expected as many")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise InvalidInputError(f"got weights {list(self.weights)}; expected numbers above 0")
        parse_columns(self.columns)
        share_of(self.eval)
        if self.from_scratch is not None and self.lora_rank is not None:
            raise InvalidInputError("--lora-rank and --from-scratch do not go together: random weights would stay")
        if self.packing and self.pad_to:
            raise InvalidInputError("--packing and --pad-to do not go together: packed rows have no common length")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise InvalidInputError("--precision fp16 needs a GPU; expected fp32, bf16 or auto here")
        if self.precision == "bf16" and torch.cuda.is_available() and not _gpu_has_bf16():
            raise InvalidInputError("--precision bf16 needs a newer GPU than this one; take fp16 or auto")

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate, with the default filled in."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.lora_rank is not None:
            return LEARNING_RATE_LORA
        if self.from_scratch is not None:
            return LEARNING_RATE_RANDOM
        return LEARNING_RATE_STARTER if self.model == "starter" else LEARNING_RATE_PRETRAINED

    @property
    def resolved_precision(self) -> Precision:
        """The precision, `auto` decided: bf16 or fp16 on a GPU, whichever it has, fp32 elsewhere."""
        if self.precision != "auto":
            return self.precision
        if not torch.cuda.is_available():
            return "fp32"
        return "bf16" if _gpu_has_bf16() else "fp16"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them: defaults filled in, paths as they may be published, and package versions."""
        packages = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "peft")
        values = {
            **asdict(self),
            **{name: public_name(path) for name in PATHS if (path := getattr(self, name)) is not None},
            "train": [public_name(name) for name in self.train],
            "learning_rate": self.resolved_learning_rate,
            "precision": self.resolved_precision,
            "package_versions": {name: version(name) for name in packages},
        }
        return json.loads(json.dumps(values))


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
