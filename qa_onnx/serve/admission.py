"""Who may join the queue: so many questions and so many characters at once, and when there will be room again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qa_onnx.serve.problems import Problem

RATE_SECONDS = 30.0
"""How far back the measured rate looks."""
MAX_RETRY_SECONDS = 60


class Admission:
    """Counts the questions that wait or are answered. One thread may use it, that of the event loop."""

    def __init__(self, *, max_questions: int, max_characters: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts empty.

        Args:
            max_questions: Maximum number of questions at once.
            max_characters: Maximum number of characters of their contexts and questions.
            clock: Seconds since any moment.
        """
        self._max_questions = max_questions
        self._max_characters = max_characters
        self._clock = clock
        self._started = clock()
        self._finished: deque[tuple[float, int, int]] = deque()
        self._finished_questions = self._finished_characters = 0
        self.questions = 0
        """Questions that wait or are answered."""
        self.characters = 0
        """Characters of their contexts and questions."""

    def check_room(self) -> None:
        """Refuses a request that no queue so full can take, whatever it asks: before its body is parsed.

        Raises:
            Problem: `queue_full`.
        """
        self._check(questions=1, characters=1)

    @contextmanager
    def admit(self, *, questions: int, characters: int) -> Iterator[None]:
        """Counts a request's questions while the block runs: all of them or none. Those that it answers are the rate.

        A block that an exception leaves, as where the client has left or there was no answer in time, answers none.

        Raises:
            Problem: `queue_full` where there is no room now, with the seconds until there may be; `invalid_request`
                where the queue could never hold them.
        """
        if characters > self._max_characters:
            raise Problem(
                "invalid_request",
                f"the items have {characters:,} characters together, each context counted for each of its questions; "
                f"expected at most {self._max_characters:,}. Ask fewer questions at once, or shorten the contexts",
            )
        self._check(questions=questions, characters=characters)
        self.questions += questions
        self.characters += characters
        try:
            yield
            self._note(questions, characters)
        finally:
            self.questions -= questions
            self.characters -= characters

    def _check(self, *, questions: int, characters: int) -> None:
        excess_questions = self.questions + questions - self._max_questions
        excess_characters = self.characters + characters - self._max_characters
        if excess_questions > 0 or excess_characters > 0:
            seconds = self._seconds_until(excess_questions, excess_characters)
            raise Problem(
                "queue_full",
                f"{self.questions:,} questions with {self.characters:,} characters wait or are answered, and there is "
                f"room for {self._max_questions:,} with {self._max_characters:,}. Ask again in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )

    def _note(self, questions: int, characters: int) -> None:
        self._finished.append((self._clock(), questions, characters))
        self._finished_questions += questions
        self._finished_characters += characters
        self._forget_old()

    def _forget_old(self) -> None:
        while self._finished and self._finished[0][0] < self._clock() - RATE_SECONDS:
            _, questions, characters = self._finished.popleft()
            self._finished_questions -= questions
            self._finished_characters -= characters

    def _seconds_until(self, questions: int, characters: int) -> int:
        """Whole seconds, at the rate of the last ones, in which so much of the queue is done."""
        self._forget_old()
        elapsed = max(0.001, min(RATE_SECONDS, self._clock() - self._started))
        shares = [
            excess / finished if finished else math.inf
            for excess, finished in ((questions, self._finished_questions), (characters, self._finished_characters))
            if excess > 0
        ]
        seconds = max(shares) * elapsed if self._finished else 1.0
        return max(1, math.ceil(min(seconds, MAX_RETRY_SECONDS)))
