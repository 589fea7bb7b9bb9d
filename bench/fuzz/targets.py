"""What is fuzzed: bundles, inputs and data files; and what the library's results are held against."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from bench.fuzz.bundles import mutate_bundle
from bench.fuzz.data_files import WRITERS, WRITTEN_OUT
from bench.fuzz.inputs import CONTEXT, QUESTIONS, WAYS, make_odd_input, make_options, make_text
from bench.fuzz.mutable_bundle import OUTSIDE_NAME, WEIGHTS_NAME, MutableBundle
from bench.fuzz.mutations import mutate_bytes
from bench.fuzz.runner import Case, WrongResultError
from bench.machine import reset_peak
from qa_onnx import Answer, Answerer, EngineConfig, GenerationConfig, QAOnnxError, cli
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.text.constraint import word_boundaries
from training.starter.sample import generate

STATUSES = (0, cli.EXIT_BAD_INPUT, cli.EXIT_INTERRUPTED)


def check_answer(answer: Answer, context: str, *, extractive: bool = False) -> None:
    """Holds an answer, and its alternatives, against its context.

    Raises:
        WrongResultError: Its span is not its text, its score is no probability, or it is not extractive.
    """
    for found in (answer, *answer.alternatives):
        probabilities = found.score, found.no_answer_probability, math.exp(found.logprob), math.exp(found.mean_logprob)
        if not all(0 <= probability <= 1 for probability in probabilities):
            raise WrongResultError(f"wrong probabilities: {probabilities}")
        if (found.start is None) != (found.end is None):
            raise WrongResultError(f"wrong span: it starts at {found.start} and ends at {found.end}")
        if found.start is not None and context[found.start : found.end] != found.text:
            raise WrongResultError(f"wrong span: {context[found.start : found.end]!r} is not {found.text!r}")
        if not extractive:
            continue
        if not found.text and found.finish_reason != "no_answer":
            raise WrongResultError(f"wrong extractive answer: empty with finish_reason {found.finish_reason!r}")
        starts, ends = word_boundaries(context)
        if found.text and (found.start not in starts or found.end not in ends):
            raise WrongResultError(f"wrong extractive answer: {found.text!r} is not whole words of the context")


def run_cli(arguments: Sequence[str]) -> str:
    """Runs the command line in this process; returns how it ended.

    Raises:
        WrongResultError: It ends with a status of its own, or without a line on standard error.
    """
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), contextlib.redirect_stderr(errors):
        try:
            status = cli.main(arguments)
        except SystemExit as error:  # argparse's
            status = error.code if isinstance(error.code, int) else 1
    said = errors.getvalue()
    if status not in STATUSES or "Traceback" in said or (status == cli.EXIT_BAD_INPUT and not said.strip()):
        raise WrongResultError(f"command line: status {status}, {said[-500:]!r}")
    return "refused" if status else "answered"


def fuzz_bundles(bundle: Path, directory: Path) -> Case:
    """Mutated bundles, loaded and asked."""
    source = directory / "source"
    shutil.copytree(bundle, source)  # so that links to it are on the same file system
    shutil.copy(bundle / WEIGHTS_NAME, directory / OUTSIDE_NAME)

    def case(random: Random, directory: Path, note: Callable[[str], None]) -> str:
        os.link(source.parent / OUTSIDE_NAME, directory / OUTSIDE_NAME)
        mutable = MutableBundle(source, directory / "bundle")
        note(mutate_bundle(random, mutable))
        reset_peak()
        path, extractive = mutable.directory, random.random() < 0.3
        if random.random() < 0.1:
            arguments = ["--question", QUESTIONS[0], "--context", CONTEXT, "--max-new-tokens", "4", "--threads", "1"]
            command = random.choice((["info"], ["answer", *arguments]))
            result = run_cli([*command, "--model", str(path)])
            return result if command == ["info"] else _check_refused(mutable, result)
        try:
            engine = EngineConfig(threads=1, kernels=random.choice(("auto", "auto", "off")))
            with Answerer.from_pretrained(path, provider="cpu", config=engine) as answerer:
                config = GenerationConfig(max_new_tokens=4, extractive=extractive)
                for answer in answerer.answer_batch(QUESTIONS, [CONTEXT] * len(QUESTIONS), config=config):
                    check_answer(answer, CONTEXT, extractive=extractive)
        except QAOnnxError:
            return "refused"
        return _check_refused(mutable, "answered")

    return case


def _check_refused(bundle: MutableBundle, result: str) -> str:
    if bundle.must_be_refused and result == "answered":
        raise WrongResultError("a bundle was loaded whose checksums are wrong, or whose data is not its own")
    return result


def fuzz_inputs(bundle: Path, directory: Path) -> Case:
    """Questions, contexts and options, through each way to ask."""
    answerer = Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(threads=1))

    def case(random: Random, directory: Path, note: Callable[[str], None]) -> str:
        if random.random() < 0.02:
            options = [f"--{name.replace('_', '-')}={value}" for name, value in make_options(random).items()]
            arguments = [f"--question={make_text(random)}", f"--context={make_text(random)}", *options]
            note(repr(arguments)[:1000])
            return run_cli(["answer", *random.sample(arguments, len(arguments)), "--model", str(bundle)])
        make = make_odd_input if random.random() < 0.1 else make_text
        contexts: list[Any] = [make(random) for _ in range(random.choice((1, 1, 2, 3)))]
        questions: list[Any] = [make_text(random) for _ in contexts]
        if random.random() < 0.5:
            contexts = contexts[:1] * len(contexts)
        options = make_options(random)
        way = random.choice(WAYS)
        note(f"{way.__name__} {options} {repr(questions)[:500]} {repr(contexts)[:1000]}")
        try:
            config = GenerationConfig(**options)
            answers = way(random, answerer, questions, contexts, config)
            alone = [answerer.answer(*pair, config=config) for pair in zip(questions, contexts, strict=True)]
        except QAOnnxError:
            return "refused"
        if len(answers) != len(contexts):
            raise WrongResultError(f"{len(answers)} answers to {len(contexts)} questions")
        is_repeatable = not config.samples or config.seed is not None
        # With a question above 200 tokens, scores may differ in their last digits (docs/reference/errors.md).
        are_short = all(len(question.encode()) < 200 for question in questions)
        for answer, same, context in zip(answers, alone, contexts, strict=True):
            check_answer(answer, context, extractive=config.extractive)
            if is_repeatable and are_short and answer != same:
                raise WrongResultError(f"another answer alone: {answer.to_dict()} is not {same.to_dict()}")
        return "answered"

    return case


def fuzz_data(bundle: Path, directory: Path) -> Case:
    """Data files in each format, read as the commands read them."""
    squad = generate("heldout", questions=6)
    rows = [
        {"id": example.id, "context": example.context, "question": example.question, "answers": example.answers[0].text}
        | {"answer_start": example.answers[0].start}
        for example in parse_squad(squad, source="sample")
    ]

    def case(random: Random, directory: Path, note: Callable[[str], None]) -> str:
        suffix = random.choice(list(WRITERS))
        content, done = WRITERS[suffix](random, copy.deepcopy(squad), copy.deepcopy(rows))
        if random.random() < 0.3:
            content, more = mutate_bytes(random, content)
            done = f"{done}; {more}"
        name = random.choice((suffix,) * 8 + (suffix.upper(), ".json", ".txt", ""))
        path = directory / f"data{name}"
        path.write_bytes(content)
        note(f"{path.name}: {done}")
        if random.random() < 0.15:
            predictions = directory / "predictions.json"
            predictions.write_bytes(json.dumps({row["id"]: row["answers"] for row in rows}).encode())
            given = [predictions, path] if random.random() < 0.5 else [path, predictions]
            return run_cli(["evaluate", "--data", str(given[0]), "--predictions", str(given[1])])
        try:
            examples = read_examples(path, skipped=[] if random.random() < 0.3 else None)
        except QAOnnxError:
            return "refused"
        for example in examples:
            texts = [example.id, example.title, example.context, example.question, *(a.text for a in example.answers)]
            for text in texts:
                if not isinstance(text, str) or text != text.encode(errors="replace").decode():
                    raise WrongResultError(f"{text!r} is read as text")
            if not example.context.strip() or not example.question.strip():
                raise WrongResultError(f"empty text is read: {example}")
            for answer in example.answers:
                if answer.text in WRITTEN_OUT or not answer.text.strip() or type(answer.start) is not int:
                    raise WrongResultError(f"{answer} is read as an answer")
        return "answered"

    return case


TARGETS: dict[str, Callable[[Path, Path], Case]] = {"bundles": fuzz_bundles, "inputs": fuzz_inputs, "data": fuzz_data}
