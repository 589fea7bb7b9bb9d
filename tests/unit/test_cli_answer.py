"""The command `answer`: questions and contexts from arguments, files and standard input."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys

import pytest
from command_line import ANSWER, run
from fakes import CONTEXT, echo_answerer

from qa_onnx import Answer, EngineConfig, cli
from qa_onnx.cli import answer as cli_answer


def test_generation_options_reach_the_answerer(files, loaded, capsys):
    command = "answer --model bundle --question Normans --context @context.txt --extractive --num-answers 2"
    _, out, _ = run(capsys, command)
    first, second = out.splitlines()
    assert re.fullmatch(r"1\. Normans  \(score 0\.\d\d\)", first)
    assert re.fullmatch(r"2\. .+  \(score 0\.\d\d\)", second)
    options = "--temperature 1 --top-k 5 --top-p 0.9 --seed 3 --no-repeat-ngram-size 2 --no-answer-threshold 1"
    command = f"answer --model bundle --question Normans --context @context.txt {options} --stride 9"
    assert run(capsys, command)[0] == 0


@pytest.mark.parametrize("context", ["@context.txt", "Rollo"])
def test_answer_prints_the_text(files, loaded, capsys, context):
    status, out, err = run(capsys, f"answer --model bundle --question Who? --context {context}")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"Who\?  \(score [01]\.\d\d\)\n", out)


def test_answer_reads_the_file_after_the_at_sign(files, loaded, capsys):
    _, from_file, _ = run(capsys, "answer --model bundle --question Who? --context @context.txt --json")
    cli.main(["answer", "--model", "bundle", "--question", "Who?", "--context", CONTEXT, "--json"])
    assert json.loads(from_file) == json.loads(capsys.readouterr().out)


def test_answer_prints_the_whole_answer_as_json(files, loaded, capsys):
    _, out, _ = run(capsys, "answer --model bundle --question Who_was_it? --context Rollo --json --max-new-tokens 2")
    answer = json.loads(out)
    assert answer.keys() == {field.name for field in dataclasses.fields(Answer)} | {"new_tokens"}
    assert (answer["new_tokens"], answer["finish_reason"]) == (2, "length")


def test_options_reach_the_answerer(files, loaded, capsys):
    run(capsys, "answer --model bundle --question Who? --context Rollo --provider cpu --threads 2 --device-id 1")
    run(capsys, "answer --model bundle --question Who? --context Rollo")
    assert loaded == [
        {"path": "bundle", "provider": "cpu", "config": EngineConfig(threads=2, device_id=1)},
        {"path": "bundle", "provider": "auto", "config": EngineConfig()},
    ]


def test_a_context_file_without_text_is_bad_input(files, loaded, capsys):
    (files / "blank.txt").write_text(" \n")
    status, out, err = run(capsys, f"{ANSWER} --context @blank.txt")
    assert (status, out) == (2, "")
    assert err.startswith("error: context 0 is empty or only white space")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "context"),
    [("-", "In 1803.\r\n"), ("@-", "In 1803.\r\n"), ("@@nasa", "@nasa"), ("@@", "@"), ("@crlf.txt", "one\r\n")],
)
def test_a_context_from_standard_input_a_file_or_the_command_line(files, capsys, monkeypatch, value, context):
    asked = []

    class Recorder:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def answer_batch(self, questions, contexts, *, config):
            asked.append(contexts)
            return echo_answerer().answer_batch(questions, contexts, config=config)

    monkeypatch.setattr(cli_answer, "load_answerer", lambda arguments: Recorder())
    (files / "crlf.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfIn 1803.\r\n")))
    assert run(capsys, f"answer --model bundle --question Rollo --context {value}")[0] == 0
    assert asked == [context]


def test_offsets_refer_to_the_text_as_decoded(files, loaded, capsys):
    (files / "crlf.txt").write_bytes("\ufeffÉlan.\r\nThe Normans were led by\r\nRollo.\r\n".encode())
    status, out, _ = run(capsys, "answer --model bundle --question Rollo --context @crlf.txt --extractive --json")
    answer = json.loads(out)
    assert (status, answer["text"]) == (0, "Rollo")
    assert "Élan.\r\nThe Normans were led by\r\nRollo.\r\n"[answer["start"] : answer["end"]] == "Rollo"


@pytest.mark.parametrize("context", ["-", "@-"])
def test_a_closed_standard_input_is_one_line(files, loaded, capsys, monkeypatch, context):
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run(capsys, f"{ANSWER} --context {context}")
    assert (status, err) == (
        2,
        "error: standard input is closed; expected a text there, or --context TEXT or @FILE\n",
    )


def answer(capsys, *arguments):
    status = cli.main(["answer", "--model", "bundle", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


SCORE = r"  \(score [01]\.\d\d\)\n"


def test_several_questions_are_shown_with_their_answers(files, loaded, capsys):
    asked = ["--question", "Who led\nthem?", "--question", "Where?"]
    status, out, err = answer(capsys, *asked, "--context", CONTEXT)
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"Who led them\?\n  Who led them\?{SCORE}Where\?\n  Where\?{SCORE}", out)
    _, out, _ = answer(capsys, *asked, "--context", CONTEXT, "--num-answers", "2", "--extractive")
    assert [line[:5] for line in out.splitlines() if line.startswith(" ")] == ["  1. ", "  2. "] * 2
    status, out, _ = answer(capsys, *asked, "--context", CONTEXT, "--json")
    assert (status, [json.loads(line)["text"] for line in out.splitlines()]) == (0, ["Who led\nthem?", "Where?"])


def test_where_there_is_no_answer_the_output_says_so(files, loaded, capsys):
    options = ["--extractive", "--no-answer-threshold", "0"]
    status, out, _ = answer(capsys, "--question", "Rollo", "--context", CONTEXT, *options)
    assert status == 0
    hint = r", the probability that there is none; --no-answer-threshold 1 gets one\n"
    assert re.fullmatch(rf"\(no answer\){SCORE[:-2]}{hint}", out)


@pytest.mark.parametrize(
    "content",
    [
        "Who?\nWhere did they settle?\n",
        "\ufeffWho?\r\n\r\n  Where did they settle? \r\n",
        "\n\nWho?\rWhere did they settle?",
    ],
)
@pytest.mark.parametrize("name", ["questions.txt", "-"])
def test_a_file_of_questions_has_one_in_each_line_that_is_not_blank(files, loaded, capsys, monkeypatch, content, name):
    (files / "questions.txt").write_bytes(content.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    status, out, err = answer(capsys, "--questions", name, "--context", "@context.txt", "--json")
    assert (status, err) == (0, "")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["Who?", "Where did they settle?"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--questions", "blank.txt"), "--questions blank.txt: has no questions; expected one in each line"),
        (("--questions", "void.txt"), "--questions void.txt: has no questions"),
        (("--questions", "latin.txt"), "--questions latin.txt: byte 3 is not UTF-8"),
        (("--questions", "nowhere.txt"), "--questions nowhere.txt: cannot be read (No such file"),
        (("--questions", "empty"), "--questions empty: cannot be read (Is a directory)"),
        (("--questions", "-"), "standard input is closed; expected a question in each line"),
        (("--questions", "-", "--context", "-"), "--questions - and --context - both read standard input"),
        (("--questions", "-", "--context", "@-"), "--questions - and --context - both read standard input"),
        (("--question", "Who?", "--context", "context.txt"), "write --context @context.txt, "),
        (("--question", "Who?", "--context", "./context.txt"), "write --context @./context.txt, "),
        (("--question", "Who?", "--context", "bundle/config.json"), "is the name of a file; expected a text."),
        (("--question", "Who?", "--context", "manuel.txt"), "manuel.txt looks like a file, and there is none"),
        (("--question", "Who?", "--context", "@empty"), "--context @empty: cannot be read (Is a directory)"),
    ],
)
def test_what_is_no_question_and_no_context_is_refused(files, loaded, capsys, monkeypatch, arguments, words):
    (files / "blank.txt").write_text(" \n\r\n\n")
    (files / "void.txt").write_text("")
    monkeypatch.setattr(sys, "stdin", None)
    status, out, err = answer(capsys, "--context", "Rollo.", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("context", [" context.txt", "empty", "context.txt\n", "x" * 5000, "nul\0.txt", "context"])
def test_a_context_that_is_no_name_of_a_file_is_text(files, loaded, capsys, context):
    assert answer(capsys, "--question", "Who?", "--context", context)[0] == 0


@pytest.mark.parametrize("given", [[], ["--question", "a", "--questions", "b"]])
def test_questions_are_given_in_one_way(files, loaded, capsys, given):
    with pytest.raises(SystemExit) as caught:
        answer(capsys, *given, "--context", "Rollo.")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "arguments", [["--questions", "-", "--context", "Rollo."], ["--question", "a", "--context", "-"]]
)
def test_standard_input_that_is_not_utf8_is_one_line(files, loaded, capsys, monkeypatch, arguments):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Who? é".encode("latin-1"))))
    status, out, err = answer(capsys, *arguments)
    assert (status, out, err) == (2, "", "error: standard input: byte 5 is not UTF-8; expected UTF-8\n")
