"""A short run of the fuzzer, and whether it finds faults that were put there for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from random import Random

import planted
import pytest

from bench.fuzz import __main__ as command
from bench.fuzz import targets
from bench.fuzz.bundles import mutate_bundle
from bench.fuzz.data_files import WRITERS
from bench.fuzz.inputs import make_options, make_text
from bench.fuzz.mutable_bundle import MutableBundle
from bench.fuzz.mutations import dump_json, mutate_bytes, mutate_json
from bench.fuzz.runner import Finding, WrongResultError, run_cases
from qa_onnx import Answer, Answerer, QAOnnxError, cli

CONTEXT = "Ada led the crew in 1803."
ANSWER = Answer(
    text="Ada",
    score=0.5,
    logprob=-1.4,
    mean_logprob=-0.7,
    start=0,
    end=3,
    no_answer_probability=0.1,
    finish_reason="stop",
    prompt_tokens=9,
    token_ids=(1,),
)


def run(make_case, tmp_path, *, count=1, seed=0, time_limit=20.0):
    directory = tmp_path / "cases"
    return list(
        run_cases(
            "planted",
            make_case,
            range(count),
            bundle=tmp_path,
            seed=seed,
            directory=directory,
            time_limit=time_limit,
            memory_limit=200 * 2**20,
        )
    )


@pytest.mark.parametrize(
    ("make_case", "kind", "message"),
    [
        (planted.crash, "crash", "SIGSEGV"),
        (planted.leave, "crash", "exit status 3"),
        (planted.spin, "hang", "no result within 1 s"),
        (planted.wait, "hang", "no result within 1 s"),
        (planted.raise_error, "exception", "KeyError: 'absent'"),
        (planted.panic, "exception", "Panic: as pyo3's PanicException"),
        (planted.raise_in_thread, "exception", "ZeroDivisionError: division by zero"),
        (planted.take_memory, "memory", "MemoryError: a peak of 0.3 GiB"),
        (planted.be_wrong, "wrong", "WrongResultError: not 42"),
    ],
)
def test_a_planted_fault_is_found(make_case, kind, message, tmp_path):
    (outcome,) = run(make_case, tmp_path, time_limit=1.0 if kind == "hang" else 20.0)
    assert outcome.result == outcome.finding.kind == kind
    assert outcome.finding.message == message
    assert outcome.finding.index == 0


def test_a_process_that_does_not_end_is_found(tmp_path):
    answered, at_exit = run(planted.wait_at_exit, tmp_path, time_limit=1.0)
    assert (answered.result, answered.finding) == ("answered", None)
    assert (at_exit.finding.kind, at_exit.finding.message) == ("hang", "the process does not end within 1 s")


def test_cases_go_on_after_a_crash_and_are_the_same_again(tmp_path):
    outcomes = run(planted.sometimes_crash, tmp_path, count=6, seed=3)
    expected = []
    for index in range(6):
        random = Random(f"3 planted {index}")
        drew = f"drew {random.random()}"
        expected.append(("crash", index, drew) if random.random() < 0.3 else ("refused", None, None))
    found = [(one.result, one.finding and one.finding.index, one.finding and one.finding.case) for one in outcomes]
    assert found == expected
    assert {result for result, *_ in found} == {"crash", "refused"}


def test_findings_of_one_cause_have_one_signature():
    details = 'File "/a/qa_onnx/loop.py", line 12, in run\n'
    finding = Finding(target="t", index=1, kind="exception", case="", message="E: 'x' at 5", details=details)
    assert finding.signature == "exception: E: * at * (qa_onnx/loop.py:run)"
    assert replace(finding, index=2, message="E: 'y' at 7.5").signature == finding.signature
    assert replace(finding, details="").signature != finding.signature


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 1, "end": 4},
        {"start": 0, "end": 4},
        {"end": None},
        {"score": float("nan")},
        {"score": 1.5},
        {"no_answer_probability": -0.1},
        {"mean_logprob": float("nan")},
        {"logprob": 0.1},
        {"alternatives": (replace(ANSWER, start=4, end=7),)},
    ],
)
def test_a_wrong_answer_is_found(changes):
    targets.check_answer(ANSWER, CONTEXT, extractive=True)
    with pytest.raises(WrongResultError):
        targets.check_answer(replace(ANSWER, **changes), CONTEXT)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "Ad", "end": 2},
        {"text": "da", "start": 1},
        {"text": "Bob", "start": None, "end": None},
        {"text": "", "start": None, "end": None, "finish_reason": "length"},
    ],
)
def test_what_is_no_extractive_answer_is_found(changes):
    targets.check_answer(replace(ANSWER, **changes), CONTEXT)
    with pytest.raises(WrongResultError):
        targets.check_answer(replace(ANSWER, **changes), CONTEXT, extractive=True)


@pytest.mark.parametrize(
    ("status", "said"), [(1, "error"), (2, ""), (0, "Traceback (most recent call last)"), (3, "x")]
)
def test_a_wrong_end_of_the_command_line_is_found(status, said, monkeypatch):
    def main(arguments):
        targets.contextlib.sys.stderr.write(said)
        return status

    monkeypatch.setattr(cli, "main", main)
    with pytest.raises(WrongResultError):
        targets.run_cli([])


def test_a_right_end_of_the_command_line_is_none(tmp_path):
    assert targets.run_cli(["info", "--model", str(tmp_path)]) == "refused"
    assert targets.run_cli(["--nothing"]) == "refused"
    assert targets.run_cli(["--help"]) == "answered"


def first_finding(make_case, bundle, tmp_path, count):
    """The first wrong result among some cases that are run in this process."""
    case = make_case(bundle, tmp_path)
    for index in range(count):
        place = tmp_path / str(index)
        place.mkdir()
        try:
            case(Random(index), place, lambda text: None)
        except WrongResultError as error:
            return str(error)
    return None


def test_another_answer_in_a_batch_is_found(tiny_bundle, tmp_path, monkeypatch):
    answer_batch = Answerer.answer_batch

    def with_other_score(self, questions, contexts, **options):
        answers = answer_batch(self, questions, contexts, **options)
        return [replace(answer, score=answer.score / 2) for answer in answers]

    monkeypatch.setattr(Answerer, "answer_batch", with_other_score)
    assert "another answer alone" in first_finding(targets.fuzz_inputs, tiny_bundle, tmp_path, 50)


def test_a_bundle_that_has_to_be_refused_is_found_when_it_is_loaded(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("qa_onnx.bundle._file_problems", lambda *_: [])
    monkeypatch.setattr("bench.fuzz.bundles._CORRECTED", 0.0)
    monkeypatch.setattr("bench.fuzz.bundles._WEIGHTS", {add_line: 1})
    assert "checksums are wrong" in first_finding(targets.fuzz_bundles, tiny_bundle, tmp_path, 3)


def add_line(random, bundle):
    bundle.write("config.json", bundle.read("config.json") + b"\n")
    return "config.json: a line more"


def test_an_answer_that_was_no_text_is_found(tiny_bundle, tmp_path, monkeypatch):
    def with_nan(*arguments, **options):
        example, *others = read_examples(*arguments, **options)
        answers = tuple(replace(answer, text="nan", start=0) for answer in example.answers)
        return [replace(example, answers=answers), *others]

    read_examples = targets.read_examples
    monkeypatch.setattr(targets, "read_examples", with_nan)
    assert "is read as an answer" in first_finding(targets.fuzz_data, tiny_bundle, tmp_path, 50)


def content_of(directory):
    """Every file's content, what links lead to, and what else there is."""
    return {
        path.name: str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else path.stat().st_mode
        for path in sorted(directory.iterdir())
    }


def test_bundles_are_the_same_again_and_their_source_stays(tiny_bundle, tmp_path):
    source = tmp_path / "source"
    targets.shutil.copytree(tiny_bundle, source)
    (tmp_path / "outside.bin").write_bytes(b"outside")
    before = content_of(source)
    seen = set()
    for index in range(60):
        results = []
        for _ in range(2):
            mutable = MutableBundle(source, tmp_path / "bundle")
            done = mutate_bundle(Random(index), mutable)
            results.append((done, content_of(mutable.directory), mutable.must_be_refused))
            targets.shutil.rmtree(mutable.directory)
        assert results[0] == results[1]
        seen.add(json.dumps(results[0][1]))
    assert content_of(source) == before
    assert len(seen) > 50


def rows():
    return [{"id": str(index), "answers": "a"} for index in range(5)]


MAKERS = tuple(WRITERS.values())


@pytest.mark.parametrize(
    "draw",
    [
        lambda random: mutate_bytes(random, b"some bytes of a file"),
        lambda random: (mutate_json(random, value := {"a": [1, 2, {"b": "c"}], "d": None}), dump_json(random, value)),
        make_text,
        lambda random: repr(make_options(random)),
        *(lambda random, make=make: make(random, {"data": [1, 2]}, rows()) for make in WRITERS.values()),
    ],
)
def test_what_is_drawn_is_drawn_again_and_varies(draw):
    drawn = [draw(Random(index)) for index in range(50)]
    assert [draw(Random(index)) for index in range(50)] == drawn
    assert len({repr(one) for one in drawn}) > 20


@pytest.mark.parametrize(("target", "count"), [("bundles", 40), ("inputs", 30), ("data", 40)])
def test_a_short_run_finds_nothing(target, count, tiny_bundle, tmp_path, capsys):
    output = tmp_path / "fuzz"
    arguments = [target, "--count", str(count), "--bundle", str(tiny_bundle), "--output", str(output), "--workers", "1"]
    status = command.main(arguments)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["findings"] == []
    assert status == 0
    assert sum(summary["results"].values()) == count
    assert set(summary["results"]) == {"answered", "refused"}


def test_the_command_reports_findings(tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(command.TARGETS, "bundles", planted.be_wrong)
    arguments = ["bundles", "--count", "2", "--bundle", str(tiny_bundle), "--output", str(tmp_path / "fuzz")]
    assert command.main(arguments) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["results"] == {"wrong": 2}
    assert [(one["count"], one["index"]) for one in summary["findings"]] == [(2, 0)]
    lines = (tmp_path / "fuzz" / "bundles.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["WrongResultError: not 42"] * 2
    assert not issubclass(WrongResultError, QAOnnxError)
