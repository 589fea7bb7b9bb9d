"""The errors that callers can tell apart. Every message says what was given, what was expected, and how to fix it."""


class QAOnnxError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidInputError(QAOnnxError, ValueError):
    """A question, context, option or data file is not what it has to be."""


class PromptTooLongError(InvalidInputError):
    """A prompt has more tokens than the model has positions."""


class BundleError(QAOnnxError):
    """A bundle is missing, incomplete, altered, of another format version, or contradicts itself."""


class ProviderError(QAOnnxError):
    """The requested execution provider, or ONNX Runtime itself, is not there."""


class ClosedError(QAOnnxError):
    """The answerer was closed before the call, or is in another process than the one that loaded it."""


class QueueFullError(QAOnnxError):
    """More requests wait than `EngineConfig.max_queue` allows."""


class OutOfMemoryError(QAOnnxError):
    """The device has not enough memory for a batch, not even for one sequence."""


class EngineError(QAOnnxError):
    """ONNX Runtime failed as it computed, or the model computes what is no probability. The request is lost."""


class ParityError(QAOnnxError):
    """An exported graph does not compute what the PyTorch model computes."""


def one_line(error: BaseException) -> str:
    """An error's message and notes on one line, as the commands print it; the class's name where it has none."""
    message = " ".join(str(error).split()) or type(error).__name__
    return ". ".join([message, *getattr(error, "__notes__", [])])


def short_repr(value: object, *, quote: bool = True) -> str:
    """A value as messages show it: its first 100 characters; of a huge number, which Python does not write, the size.

    Args:
        value: Whatever was given.
        quote: Put a string in quotes.
    """
    if isinstance(value, int) and abs(value) >= 10**100:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if quote else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
