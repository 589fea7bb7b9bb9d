"""`sample`: a question-answering set in SQuAD's format, generated from a seed, so that a first run needs no download.

A passage tells several facts about a subject and, mostly, about a rival of the same kind, so that the right relation
of the wrong subject is there as a distractor. Names, dates, numbers and phrases are made from parts, and every made
value belongs to one of the two splits by its checksum: the parts `train` and `heldout` share no value at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_onnx.cli import run_command
from qa_onnx.files import write_file
from training.starter.domains import DOMAINS, FILLERS, SPLITS, Domain, Relation, Split, ValueMaker

QUESTIONS = {"train": 9_000, "heldout": 400}
"""How many questions `--train sample` and `--eval sample` mean."""


@dataclass
class _Passage:
    """A passage being written, with the questions whose answers stand in it."""

    text: str = ""
    qas: list[dict[str, Any]] | None = None

    def add(self, sentence: str) -> int:
        """Appends a sentence and returns the character at which it starts."""
        if self.text:
            self.text += " "
        start = len(self.text)
        self.text += sentence[0].upper() + sentence[1:]
        return start


def _tell(maker: ValueMaker, domain: Domain, relations: list[Relation], passage: _Passage) -> list[dict[str, Any]]:
    """Writes the facts of one new subject into the passage and returns a question about each."""
    subject = domain.subject(maker)
    qas = []
    for index, relation in enumerate(relations):
        value = relation.value(maker)
        name = maker.random.choice(domain.short) if index and maker.random.random() < 0.3 else subject
        before, after = maker.random.choice(relation.told).replace("{s}", name).split("{v}")
        start = passage.add(f"{before}{value}{after}.") + len(before)
        question = maker.random.choice(relation.asked).format(s=subject)
        answer = passage.text[start : start + len(value)]
        qas.append({"question": question, "answers": [{"text": answer, "answer_start": start}], "subject": subject})
    return qas


def _paragraph(maker: ValueMaker, domain: Domain, *, contrast: bool) -> dict[str, Any]:
    draw = maker.random
    passage = _Passage()
    if contrast:
        subjects = [[draw.choice(domain.relations)]] * 2
    else:
        facts = draw.sample(domain.relations, draw.randint(2, len(domain.relations)))
        rival = draw.sample(domain.relations, draw.randint(1, 2)) if draw.random() < 0.75 else []
        subjects = [group for group in (facts, rival) if group]
        draw.shuffle(subjects)
    qas = []
    for group in subjects:
        if draw.random() < 0.3:
            passage.add(draw.choice(FILLERS))
        qas += _tell(maker, domain, group, passage)
    if draw.random() < 0.3:
        passage.add(draw.choice(FILLERS))
    draw.shuffle(qas)
    return {"context": passage.text, "qas": qas}


def generate(split: Split, *, questions: int | None = None, seed: int = 0, contrast: bool = False) -> dict[str, Any]:
    """Generates one part of `sample` in the SQuAD v1.1 format; each question also names its `subject`.

    Args:
        split: `train` or `heldout`; the two share no made name, date, number or phrase, whatever their seeds.
        questions: How many questions; the default is `QUESTIONS[split]`.
        seed: The same seed gives the same part, byte for byte.
        contrast: Short passages on subjects of which the same is told, so that nothing but the subject tells the
            answers apart; for pretraining.
    """
    wanted = QUESTIONS[split] if questions is None else questions
    maker = ValueMaker(split, seed)
    articles: dict[str, list[dict[str, Any]]] = {domain.title: [] for domain in DOMAINS}
    count = 0
    while count < wanted:
        domain = maker.random.choice(DOMAINS)
        paragraph = _paragraph(maker, domain, contrast=contrast)
        paragraph["qas"] = paragraph["qas"][: wanted - count]
        for qa in paragraph["qas"]:
            qa["id"] = f"sample-{split}-{seed}-{count:06d}"
            count += 1
        articles[domain.title].append(paragraph)
    data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
    return {"version": "1.1", "data": data}


def with_unanswerable(data: dict[str, Any]) -> dict[str, Any]:
    """The same part as SQuAD v2.0: every third question is asked about a passage that does not answer it.

    It goes to the passage after its own that tells of the same kind of subject; it stays where its answer stands there.
    """
    articles = []
    for article in data["data"]:
        paragraphs = [{"context": paragraph["context"], "qas": []} for paragraph in article["paragraphs"]]
        for index, paragraph in enumerate(article["paragraphs"]):
            following = paragraphs[(index + 1) % len(paragraphs)]
            for place, qa in enumerate(paragraph["qas"]):
                stands_there = any(answer["text"] in following["context"] for answer in qa["answers"])
                if (index + place) % 3 or stands_there:
                    paragraphs[index]["qas"].append({**qa, "is_impossible": False})
                else:
                    following["qas"].append({**qa, "is_impossible": True, "answers": []})
        articles.append({"title": article["title"], "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one part of `sample` to a file: `python -m training.starter.sample --split heldout --output FILE`."""
    parser = argparse.ArgumentParser(description="Write the generated sample set as a SQuAD v1.1 JSON file.")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, help=f"how many questions (default: {QUESTIONS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unanswerable", action="store_true", help="in the format of v2.0: a third have no answer")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> None:
    data = generate(arguments.split, questions=arguments.questions, seed=arguments.seed)
    if arguments.unanswerable:
        data = with_unanswerable(data)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.output, json.dumps(data, ensure_ascii=False, indent=1))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
