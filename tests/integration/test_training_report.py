"""Texts of others in the report and the model card of a training."""

from __future__ import annotations

import json

import pytest
from training_runs import run_finetune, without_plots

from training.report import escape_markdown
from training.starter.sample import generate


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with without_plots():
        yield


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("When was Tolvik founded (in 1803)?", "When was Tolvik founded (in 1803)?"),
        ("a | b", r"a \| b"),
        ("a \\| b", r"a \\\| b"),
        ("one\r\n\ttwo\u2028three\x00", "one two three"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("<!-- hidden", "&lt;!-- hidden"),
        ("`code` ```", r"\`code\` \`\`\`"),
        ("[x](https://y.org)", r"\[x\](https\://y.org)"),
        ("![x](y)", r"!\[x\](y)"),
        ("see www.y.org", r"see www\.y.org"),
        ("*a* __b__ ~~c~~ $d$", r"\*a\* \_\_b\_\_ \~\~c\~\~ \$d\$"),
        ("# heading", r"\# heading"),
        ("- item", r"\- item"),
        ("+ item", r"\+ item"),
        ("1. item", r"1\. item"),
        ("2) item", r"2\) item"),
        ("===", r"\==="),
        ("&lt; &#60;", r"&amp;lt; &amp;\#60;"),
        ("> quote", "&gt; quote"),
    ],
)
def test_text_in_markdown_shows_as_it_is(text, escaped):
    assert escape_markdown(text) == escaped


def test_a_report_shows_what_attacks_it_as_text(arguments, tmp_path):
    attack = "<script>x</script> | [a](javascript:b) `c` <!-- # d"
    data = generate("heldout", questions=4)
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                qa["question"] = f"{attack}\n# {qa['question']}"
    name = "<img src=x> |`[a](b).json"
    (tmp_path / name).write_text(json.dumps(data))
    given = [*arguments[:5], tmp_path / name, "--output", tmp_path / "<b>|out", "--max-new-tokens", 2]
    assert run_finetune(*given, "--max-steps", 1) == 0
    for file in ("report.md", "README.md"):
        body = (tmp_path / "<b>|out" / file).read_text().split("---\n")[-1]
        assert not [mark for mark in ("<script", "<img", "<b>", "<!--", " [a]", "|`") if mark in body]
    rows = [line for line in (tmp_path / "<b>|out" / "report.md").read_text().splitlines() if "&lt;script" in line]
    assert len(rows) == 4
    assert all(len(row.replace(r"\|", "").split("|")) == 6 for row in rows)
