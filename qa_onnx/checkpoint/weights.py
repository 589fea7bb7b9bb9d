"""The weights of a checkpoint: their names and shapes checked against the configuration, then read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qa_onnx.checkpoint.files import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_INDEX_BYTES,
    WEIGHTS_NAME,
    file_in,
    listed,
    no_weights,
    open_tensors,
    read_json,
)
from qa_onnx.checkpoint.settings import ARCHITECTURES, ModelSettings
from qa_onnx.errors import InvalidInputError

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel

TOKEN_EMBEDDING, OUTPUT_WEIGHTS = "wte.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
HEADS = {
    "qa_outputs.": "GPT2ForQuestionAnswering",
    "multiple_choice_head.": "GPT2DoubleHeadsModel",
    "score.": "GPT2ForSequenceClassification",
    "classifier.": "GPT2ForTokenClassification",
    "v_head.": "a value head of reinforcement learning",
}
"""What a checkpoint with tensors of a name is. Answers come from the language model alone."""
MASK_BUFFER = re.compile(r"(transformer\.)?h\.(\d+)\.attn\.(bias|masked_bias)")
"""Attention masks that transformers stored before 4.30; not weights."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a whole model. What is a pickle is not opened."""
    path = file_in(folder, WEIGHTS_NAME)
    if path is not None:
        return [path]
    index = read_json(folder, INDEX_NAME, MAX_INDEX_BYTES)
    if index is None:
        raise no_weights(folder, WEIGHTS_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidInputError(f"{INDEX_NAME} has no weight_map of tensors to file names")
    paths = []
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors"):
            raise InvalidInputError(
                f"{INDEX_NAME} names {name!r:.200}; expected .safetensors files only: others can run code when "
                "they are opened"
            )
        path = file_in(folder, name)
        if path is None:
            raise InvalidInputError(f"{INDEX_NAME} names {name!r:.200}, which is not there; copy all of its files")
        paths.append(path)
    return paths


def check_weights(paths: Iterable[Path], settings: ModelSettings) -> dict[str, tuple[Path, str]]:
    """Checks the names and shapes of all tensors against a configuration. Reads the files' headers only.

    Args:
        paths: safetensors files of one model.
        settings: Its configuration.

    Returns:
        The file of each weight, and its name there, by its name without `transformer.`.

    Raises:
        InvalidInputError: A file is no safetensors file, or tensors are missing, superfluous, of other shapes than the
            configuration says, or not floating-point numbers. All of them are in one error.
    """
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    twice = []
    for path in paths:
        with open_tensors(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_slice(name)
                twice += [name] if name in found else []
                found[name] = (path, tuple(tensor.get_shape()), tensor.get_dtype())
    prefix = "transformer." if any(name.startswith("transformer.") for name in found) else ""
    shapes = {f"{prefix}{name}": shape for name, shape in settings.shapes().items()}
    if not settings.tie_word_embeddings or OUTPUT_WEIGHTS in found:
        shapes[OUTPUT_WEIGHTS] = (settings.vocab_size, settings.n_embd)
    surplus = [name for name in found if name not in shapes and not _is_mask(name, settings)]
    for start, model in HEADS.items():
        heads = [name for name in surplus if name.startswith(start)]
        if heads:
            raise InvalidInputError(
                f"it has the head of {model} ({listed(heads)}), which would be lost; expected a language model, "
                f"{ARCHITECTURES[0]!r}: answers are generated as text. Fine-tune one of these"
            )
    used = {name: found[name] for name in shapes if name in found}
    problems = {
        "missing": [name for name in shapes if name not in found],
        "unknown": surplus,
        "in two files": twice,
        "of another shape": [
            f"{name} {list(shape)} instead of {list(shapes[name])}"
            for name, (_, shape, _) in used.items()
            if shape != shapes[name]
        ],
        "no floating-point numbers": [f"{name} {kind}" for name, (_, _, kind) in used.items() if kind not in FLOATS],
    }
    if any(problems.values()):
        counted = (f"{len(names)} {problem}: {listed(names)}" for problem, names in problems.items() if names)
        raise InvalidInputError(
            f"its tensors are not those of a GPT-2 as {CONFIG_NAME} describes it: {'; '.join(counted)}. "
            f"{_prefix_hint(found) or 'Take config.json and weights from the same model'}"
        )
    return {name.removeprefix(prefix): (path, name) for name, (path, _, _) in used.items()}


def _is_mask(name: str, settings: ModelSettings) -> bool:
    match = MASK_BUFFER.fullmatch(name)
    return match is not None and int(match[2]) < settings.n_layer


def _prefix_hint(names: Iterable[str]) -> str | None:
    """What to do where a wrapper's name is in front of all names."""
    starts = (re.fullmatch(r"(.+?\.)(transformer\.)?wte\.weight", name) for name in names)
    prefix = next((match[1] for match in starts if match), "transformer.")
    if prefix == "transformer." or not all(name.startswith(prefix) for name in names):
        return None
    return (
        f"All names begin with {prefix!r}, as of a model saved inside a wrapper (torch.compile, DataParallel, PEFT); "
        "save the model in it, or take the prefix off the names"
    )


def read_weights(sources: Mapping[str, tuple[Path, str]], settings: ModelSettings) -> dict[str, torch.Tensor]:
    """Reads the tensors that `check_weights` found, as float32 by their names without `transformer.`."""
    import torch

    weights: dict[str, torch.Tensor] = {}
    for path in sorted({path for path, _ in sources.values()}):
        with open_tensors(path, framework="pt") as file:
            for name, (place, stored) in sources.items():
                if place == path:
                    weights[name] = file.get_tensor(stored).float()
    if settings.tie_word_embeddings:
        output = weights.pop(OUTPUT_WEIGHTS, None)
        if output is not None and not torch.equal(output, weights[TOKEN_EMBEDDING]):
            raise InvalidInputError(
                f"{OUTPUT_WEIGHTS} differs from the token embedding, and {CONFIG_NAME} says that they are one; where "
                'they are two, expected "tie_word_embeddings": false in it'
            )
    return weights


def build(
    weights: Mapping[str, torch.Tensor],
    settings: ModelSettings,
    *,
    eos_token_id: int,
    model_class: type[GPT2LMHeadModel] | None,
    dropout: float | None,
) -> GPT2LMHeadModel:
    """Makes a model of finite weights.

    Args:
        weights: By their names without `transformer.`, float32.
        settings: Which they fit.
        eos_token_id: Of the tokenizer.
        model_class: As of `load_checkpoint`.
        dropout: As of `load_checkpoint`.

    Raises:
        InvalidInputError: Weights are NaN or infinite.
    """
    import torch
    import transformers

    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights

    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise InvalidInputError(
            f"{len(bad)} of its tensors have values that are NaN or infinite: {listed(bad)}; the model diverged in "
            "training. Take an earlier checkpoint"
        )
    values = asdict(settings)
    if dropout is not None:
        values |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(
        **values, bos_token_id=eos_token_id, eos_token_id=eos_token_id, attn_implementation=settings.attention
    )
    with no_init_weights():
        model = (model_class or transformers.GPT2LMHeadModel)(config)
    model.tie_weights()
    state = {name if name == OUTPUT_WEIGHTS else f"transformer.{name}": tensor for name, tensor in weights.items()}
    model.load_state_dict({OUTPUT_WEIGHTS: weights[TOKEN_EMBEDDING], **state})
    return model.eval()
