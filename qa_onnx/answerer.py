"""The public class: load a bundle once, then answer questions about passages, one or many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tokenizers import Tokenizer

from qa_onnx.bundle import Bundle, Manifest
from qa_onnx.engine import Engine, FinishReason, Generation
from qa_onnx.errors import BundleError, ClosedError, InvalidInputError
from qa_onnx.kv_cache import PassageCache
from qa_onnx.progress import Progress
from qa_onnx.prompt import Prompt, check_prompt_lengths, encode_prompts, load_tokenizer
from qa_onnx.session import Session, resolve_provider

DEFAULT_MAX_NEW_TOKENS = 32
DEFAULT_BATCH_SIZE = 64
DEFAULT_PASSAGE_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to one question.

    Attributes:
        text: What the model wrote, without white space around it; empty where it ended at once.
        finish_reason: `stop` where the model ended the answer, `length` where `max_new_tokens` or its positions did.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens of the answer, without the end-of-text.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int


class Answerer:
    """Answers questions with a bundle. Make one with `from_pretrained`; call it from any number of threads."""

    def __init__(self, *, manifest: Manifest, engine: Engine, tokenizer: Tokenizer, provider: str) -> None:
        """Takes the loaded parts; `from_pretrained` loads them."""
        self._manifest = manifest
        self._engine: Engine | None = engine
        self._tokenizer = tokenizer
        self._provider = provider

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        passage_cache_bytes: int = DEFAULT_PASSAGE_CACHE_BYTES,
    ) -> Answerer:
        """Loads a bundle.

        Args:
            path: The directory that `python -m export.to_onnx` wrote.
            provider: `cpu`, `cuda`, or `auto`: CUDA where this ONNX Runtime has it, else the CPU. A provider that does
                not start is an error; none is ever replaced by another.
            threads: CPU threads of one operator, at most as many as the machine has; None is one a physical core.
            passage_cache_bytes: Memory for the keys and values of the passages read last: another question on one of
                them costs only the question. 0 keeps none.

        Raises:
            BundleError: The bundle is missing, incomplete, altered or of another format version.
            ProviderError: ONNX Runtime or the provider is not there, or does not run the bundle's precision.
            InvalidInputError: An unknown provider, a thread count that the machine does not have, or a negative
                `passage_cache_bytes`.
        """
        if isinstance(passage_cache_bytes, bool) or not isinstance(passage_cache_bytes, int) or passage_cache_bytes < 0:
            raise InvalidInputError(
                f"got passage_cache_bytes {passage_cache_bytes!r}; expected a whole number of bytes, 0 to keep none"
            )
        bundle = Bundle.open(path)
        provider = resolve_provider(provider, bundle.manifest.precision)
        tokenizer = _load_tokenizer(bundle.tokenizer_path)
        session = Session(bundle.model_path, provider=provider, threads=threads)
        bundle.check_graph(session.input_names, session.output_names)
        return cls(
            manifest=bundle.manifest,
            engine=Engine(
                session,
                layout=bundle.manifest.cache_layout,
                eos_token_id=bundle.manifest.eos_token_id,
                max_positions=bundle.manifest.max_positions,
                passage_cache=PassageCache(passage_cache_bytes),
            ),
            tokenizer=tokenizer,
            provider=session.provider,
        )

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._manifest

    @property
    def provider(self) -> str:
        """The provider that runs the graph: `cpu` or `cuda`."""
        return self._provider

    def answer(self, question: str, context: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> Answer:
        """Answers one question about one passage.

        Raises:
            InvalidInputError: Question or context is not a string or has no text, or `max_new_tokens` is below 1.
            PromptTooLongError: The two have more tokens than the model has positions.
            ClosedError: The answerer was closed.
        """
        return self.answer_batch([question], [context], max_new_tokens=max_new_tokens)[0]

    def answer_batch(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: bool = False,
    ) -> list[Answer]:
        """Answers many questions; each as if it had been asked alone.

        Args:
            questions: The questions.
            contexts: The passage of each question, in the same order.
            max_new_tokens: The most tokens an answer may have.
            batch_size: The most questions computed together. Batches of long prompts hold fewer.
            progress: Draw a progress line on standard error where that is a terminal.

        Returns:
            One answer a question, in the order given.

        Raises:
            InvalidInputError: The two differ in length, an entry is not a string or has no text, or an option is below
                1. Everything is checked before anything is computed.
            PromptTooLongError: A prompt has more tokens than the model has positions.
            ClosedError: The answerer was closed.
        """
        engine = self._engine
        if engine is None:
            raise ClosedError("this Answerer was closed; load the bundle again with Answerer.from_pretrained")
        for name, texts in (("questions", questions), ("contexts", contexts)):
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise InvalidInputError(
                    f"got {name} of type {type(texts).__name__}; expected a list of strings. "
                    "For a single question call answer(question, context)"
                )
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"got {name} {value!r}; expected a whole number of at least 1")
        prompts = encode_prompts(self._tokenizer, questions, contexts)
        check_prompt_lengths(prompts, self._manifest.max_positions)
        with Progress(len(prompts), "answering", enabled=progress) as bar:
            generations = engine.greedy_decode(
                prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, on_finished=bar.advance
            )
        return [self._to_answer(prompt, generation) for prompt, generation in zip(prompts, generations, strict=True)]

    def close(self) -> None:
        """Lets go of the model. Calls under way finish; later ones raise `ClosedError`. Closing twice is harmless."""
        self._engine = None

    def __enter__(self) -> Answerer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else f"provider={self._provider!r}"
        return f"Answerer({self._manifest.source_model!r}, precision={self._manifest.precision!r}, {state})"

    def _to_answer(self, prompt: Prompt, generation: Generation) -> Answer:
        return Answer(
            text=self._tokenizer.decode(generation.token_ids).strip(),
            finish_reason=generation.finish_reason,
            prompt_tokens=len(prompt),
            new_tokens=len(generation.token_ids),
        )


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(str(path))
    except Exception as error:  # `tokenizers` has no error class of its own
        raise BundleError(f"{path} is no tokenizer ({error}). Export the model again") from error
