"""All settings of a fine-tuning run, what is wrong with them, and the named recipes.

The fields are the options of `python -m training.finetune`, with their help and their ranges (`training.options`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from qa_onnx.data.columns import FIELDS, parse_columns
from qa_onnx.errors import InvalidInputError
from qa_onnx.files import public_name
from training.data import LOSS_ON, NO_ANSWER_WINDOWS, LossOn
from training.holdout import DEFAULT_EVAL, parse_share
from training.model import ARCHITECTURES
from training.options import check_ranges, option

Scheduler = Literal["cosine", "linear", "constant"]
Precision = Literal["fp32", "bf16", "fp16", "auto"]
LEARNING_RATE_PRETRAINED, LEARNING_RATE_LORA = 5e-5, 2e-4
LEARNING_RATE_STARTER, LEARNING_RATE_RANDOM = 1e-4, 5e-4
"""The smaller the model and the less trained its weights, the higher the learning rate that suits it."""
NO_ANSWER_SHARE = 0.2
"""Share of questions without an answer in the recipe for GPT-2."""

RECIPES: dict[str, dict[str, Any]] = {
    # Radford et al. (2018) fine-tuned the first GPT so: 3 epochs, batches of 32, 6.25e-5, a short warm-up. Eight packed
    # rows hold some 37 questions of SQuAD. The loss is on the answer, and the checkpoint with the best F1 is kept.
    "gpt2-squad": {
        "epochs": 3.0,
        "batch_size": 8,
        "micro_batch_tokens": 4096,
        "packing": True,
        "learning_rate": 6.25e-5,
        "warmup_ratio": 0.02,
        "precision": "auto",
        "early_stopping_patience": 2,
        "no_answer_share": NO_ANSWER_SHARE,
    },
    # The notebook that this project replaces, as far as it can be right: its padding, batches, loss and schedule.
    "notebook": {
        "epochs": 2.0,
        "batch_size": 2,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "loss_on": "all",
        "pad_to": 512,
    },
}
PATHS = ("model", "tokenizer", "eval", "output", "cache_dir")
RESUMABLE_CHANGES = (
    *PATHS,
    "train",
    "package_versions",
    "micro_batch_tokens",
    "eval_at_start",
    "save_steps",
    "save_total_limit",
    "tensorboard",
)
"""Settings that may change when a run resumes. The contents of model and data are compared, not their names."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights a run starts from, and which of them it trains."""

    model: str | None = option(
        "hub id such as gpt2, the embedded small model, or a directory", None, metavar="HUB_ID|starter|DIR"
    )
    from_scratch: str | None = option(
        f"random weights of an architecture ({', '.join(ARCHITECTURES)}); needs --tokenizer", None, metavar="NAME"
    )
    tokenizer: str | None = option("tokenizer for --from-scratch: a directory or a hub id", None, metavar="DIR")
    dropout: float | None = option("dropout; the model's own unless given", None, limits="share")
    lora_rank: int | None = option(
        "train LoRA matrices of this rank instead of the weights; merged before saving", None, limits="positive"
    )
    lora_alpha: float = option("scale of LoRA's matrices, divided by the rank", 32.0, limits="positive")
    lora_dropout: float = option("dropout before LoRA's matrices", 0.0, limits="share")

    def __post_init__(self) -> None:
        """Checks what the command line cannot."""
        check_ranges(self)
        if (self.model is None) == (self.from_scratch is None):
            raise InvalidInputError("give either --model or --from-scratch, one of the two")
        if self.from_scratch is not None and self.from_scratch not in ARCHITECTURES:
            raise InvalidInputError(f"got from_scratch {self.from_scratch!r}; expected one of {sorted(ARCHITECTURES)}")
        if (self.from_scratch is None) != (self.tokenizer is None):
            raise InvalidInputError("--tokenizer DIR belongs to --from-scratch: give both or neither")
        if self.from_scratch is not None and self.lora_rank is not None:
            raise InvalidInputError("--lora-rank and --from-scratch do not go together: random weights would stay")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which questions a run trains on and is evaluated with, and how they become rows."""

    train: tuple[str, ...] = option(
        "squad, squad_v2 or an id of the hub; a SQuAD .json, .jsonl, .csv, .tsv or .parquet file; a folder of "
        "save_to_disk; sample or sample_v2: generated passages, to try things",
        metavar="SOURCE",
    )
    eval: str = option(
        "scored at the end of each epoch: a percentage of the training questions, held out with all others about the "
        f"same passages, or a source as of --train; a file of such a name is ./{DEFAULT_EVAL}",
        DEFAULT_EVAL,
        metavar="SHARE|SOURCE",
    )
    weights: tuple[float, ...] = option(
        "how many times an epoch has the questions of each source, fractions allowed; once each unless given",
        (),
        metavar="W",
    )
    columns: tuple[str, ...] = option(
        f"names of columns, where rows are flat, such as question=ask; fields: {', '.join(FIELDS)}",
        (),
        metavar="FIELD=NAME",
    )
    skip_bad_rows: bool = option("leave bad rows out and count them, instead of stopping at the first", False)
    no_answer_share: float = option(
        "questions without an answer to train on, per question; what the sources lack is made of questions that are "
        "asked about other passages",
        0.0,
        limits="share",
    )
    limit_train: int | None = option("use only the first N training questions", None, limits="positive")
    limit_eval: int | None = option("use only the first N questions to evaluate", None, limits="positive")
    cache_dir: Path | None = option("directory for tokenized rows; the cache of datasets unless given", None)
    loss_on: LossOn = option("tokens that count in the loss", "answer")
    text_loss_share: float = option(
        "share of the tokens of passage and question that count in the loss, too", 0.0, limits="share"
    )
    packing: bool = option("put several questions about one passage into one row", False)
    pad_to: int = option("pad batches to at least N tokens", 0)
    max_length: int | None = option(
        "maximum number of tokens of a prompt with its answer; the model's positions unless given",
        None,
        limits="positive",
    )
    window: int | None = option(
        "maximum number of tokens of a passage that are read at once; unless given, a window that holds 99 % of the "
        "training passages",
        None,
        limits="positive",
    )
    stride: int | None = option(
        "tokens that neighboring windows share; a quarter of a window unless given", None, limits="not negative"
    )
    no_answer_windows: int = option(
        "windows without the answer to train on, for each window with it", NO_ANSWER_WINDOWS, limits="not negative"
    )

    def __post_init__(self) -> None:
        """Checks what the command line cannot."""
        check_ranges(self)
        if self.loss_on not in LOSS_ON:
            raise InvalidInputError(f"got loss_on {self.loss_on!r}; expected one of {LOSS_ON}")
        if not self.train:
            raise InvalidInputError("got no source to train on; expected at least one after --train")
        if self.weights and len(self.weights) != len(self.train):
            raise InvalidInputError(f"got {len(self.train)} sources and {len(self.weights)} weights; expected as many")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise InvalidInputError(f"got weights {list(self.weights)}; expected numbers above 0")
        parse_columns(self.columns)
        parse_share(self.eval)
        if self.packing and self.pad_to:
            raise InvalidInputError("--packing and --pad-to do not go together: packed rows have no common length")


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How the weights are trained."""

    epochs: float = option("passes over the training data", 2.0, limits="positive")
    max_steps: int = option("stop after N optimizer steps; -1 leaves it to --epochs", -1)
    batch_size: int = option("rows of a batch, per process", 16, limits="positive")
    micro_batch_tokens: int | None = option(
        "compute a batch in parts of at most N tokens, padding included, and add up their gradients: less memory, the "
        "same training",
        None,
        limits="positive",
    )
    gradient_accumulation: int = option("batches per optimizer step", 1, limits="positive")
    learning_rate: float | None = option(
        f"peak; unless given {LEARNING_RATE_PRETRAINED}, {LEARNING_RATE_LORA} with LoRA, {LEARNING_RATE_STARTER} for "
        f"starter, {LEARNING_RATE_RANDOM} from scratch",
        None,
        limits="positive",
    )
    lr_scheduler_type: Scheduler = option("how the learning rate falls to 0 after the warm-up, or stays", "cosine")
    warmup_ratio: float = option(
        "share of the steps in which the learning rate rises from 0, which the first step has", 0.06, limits="share"
    )
    weight_decay: float = option("weight decay of matrices; biases and norms have none", 0.01)
    label_smoothing: float = option("share of each target that is spread over all tokens", 0.0, limits="share")
    precision: Precision = option(
        "precision of matmuls in training: bf16 and fp16 are autocast, auto is what the GPU supports", "fp32"
    )
    gradient_checkpointing: bool = option("recompute activations in the backward pass: less memory, more time", False)
    compile: bool = option("compile the model with torch.compile", False)
    seed: int = option("seed of random weights, order and dropout", 42)

    def __post_init__(self) -> None:
        """Checks what the command line cannot."""
        check_ranges(self)
        if self.max_steps != -1 and self.max_steps < 1:
            raise InvalidInputError(f"got max_steps {self.max_steps}; expected at least 1, or -1 for all epochs")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise InvalidInputError("--precision fp16 needs a GPU; expected fp32, bf16 or auto here")
        if self.precision == "bf16" and torch.cuda.is_available() and not _gpu_has_bf16():
            raise InvalidInputError("--precision bf16 needs a newer GPU than this one; take fp16 or auto")

    @property
    def resolved_precision(self) -> Precision:
        """The precision, `auto` decided: bf16 or fp16 on a GPU, whichever it has, fp32 elsewhere."""
        if self.precision != "auto":
            return self.precision
        if not torch.cuda.is_available():
            return "fp32"
        return "bf16" if _gpu_has_bf16() else "fp16"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When a run is evaluated and saved."""

    eval_at_start: bool = option("evaluate before the first step, too", False)
    eval_steps: int | None = option("evaluate every N steps instead of every epoch", None, limits="positive")
    eval_batch_size: int = option("questions answered in one batch", 32, limits="positive")
    max_new_tokens: int = option("maximum number of tokens of an answer", 32, limits="positive")
    early_stopping_patience: int | None = option(
        "stop after N successive evaluations without a better F1", None, limits="positive"
    )
    save_steps: int = option("steps between checkpoints", 500, limits="positive")
    save_total_limit: int = option("maximum number of checkpoints to keep", 2, limits="positive")
    tensorboard: bool = option("write TensorBoard's event files, too", False)

    def __post_init__(self) -> None:
        """Checks what the command line cannot."""
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All settings of a run. Written to the output directory as `training_config.json`, without the groups.

    Attributes:
        model: Which weights it starts from.
        data: What it trains on and is evaluated with.
        optimization: How it trains.
        evaluation: When it evaluates and saves.
        output: Directory to write to: new, empty, or this same run's, which then resumes from its last checkpoint.
        recipe: The name in `RECIPES` that settings were taken from, for the record.
    """

    model: ModelConfig
    data: DataConfig
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: Path = option("new, empty, or with this run's checkpoints")
    recipe: str | None = option(
        f"named settings, which other options override: {', '.join(RECIPES)}", None, metavar="NAME"
    )

    def __post_init__(self) -> None:
        """Checks what the command line cannot."""
        if self.recipe not in (None, *RECIPES):
            raise InvalidInputError(f"got recipe {self.recipe!r}; expected one of {', '.join(RECIPES)}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> FinetuneConfig:
        """Makes the groups of settings by the names of their fields, which are those of the command line.

        Raises:
            InvalidInputError: A setting is out of range, or two do not go together.
            TypeError: There is no setting of a name.
        """
        left = dict(options)
        groups = {
            name: group(**{one.name: left.pop(one.name) for one in fields(group) if one.name in left})
            for name, group in GROUPS.items()
        }
        return cls(**groups, **left)

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate, with the default filled in."""
        if self.optimization.learning_rate is not None:
            return self.optimization.learning_rate
        if self.model.lora_rank is not None:
            return LEARNING_RATE_LORA
        if self.model.from_scratch is not None:
            return LEARNING_RATE_RANDOM
        return LEARNING_RATE_STARTER if self.model.model == "starter" else LEARNING_RATE_PRETRAINED

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them: defaults filled in, paths as they may be published, and package versions."""
        packages = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "peft")
        values: dict[str, Any] = {"output": self.output, "recipe": self.recipe}
        for name in GROUPS:
            values |= asdict(getattr(self, name))
        values |= {name: public_name(values[name]) for name in PATHS if values[name] is not None}
        values |= {
            "train": [public_name(name) for name in self.data.train],
            "learning_rate": self.resolved_learning_rate,
            "precision": self.optimization.resolved_precision,
            "package_versions": {name: version(name) for name in packages},
        }
        settings: dict[str, Any] = json.loads(json.dumps(values))
        return settings


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimization": OptimizationConfig,
    "evaluation": EvaluationConfig,
}


def _gpu_has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
