"""Question answering with a GPT-2 that was exported to ONNX: numpy, onnxruntime and tokenizers, nothing else."""

from qa_onnx.answer import Answer
from qa_onnx.answerer import Answerer
from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.errors import (
    BundleError,
    ClosedError,
    EngineError,
    InvalidInputError,
    OutOfMemoryError,
    ParityError,
    PromptTooLongError,
    ProviderError,
    QAOnnxError,
    QueueFullError,
)
from qa_onnx.stats import AnswererStats
from qa_onnx.stream import AnswerStream

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AnswerStream",
    "Answerer",
    "AnswererStats",
    "BundleError",
    "ClosedError",
    "EngineConfig",
    "EngineError",
    "GenerationConfig",
    "InvalidInputError",
    "OutOfMemoryError",
    "ParityError",
    "PromptTooLongError",
    "ProviderError",
    "QAOnnxError",
    "QueueFullError",
    "__version__",
]
