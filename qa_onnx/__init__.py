"""Question answering with a GPT-2 that was exported to ONNX: numpy, onnxruntime and tokenizers, nothing else."""

from qa_onnx.answer import Answer
from qa_onnx.answerer import Answerer
from qa_onnx.errors import (
    BundleError,
    ClosedError,
    InvalidInputError,
    ParityError,
    PromptTooLongError,
    ProviderError,
    QAOnnxError,
    QueueFullError,
)
from qa_onnx.generation import GenerationConfig

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Answerer",
    "BundleError",
    "ClosedError",
    "GenerationConfig",
    "InvalidInputError",
    "ParityError",
    "PromptTooLongError",
    "ProviderError",
    "QAOnnxError",
    "QueueFullError",
    "__version__",
]
