"""Makes more questions of real passages: `python -m training.starter.augment --help`.

Two ways. Cloze questions: a span of a sentence is the answer, the rest of the sentence, shortened and shuffled, is the
question (Lewis et al., 2019, "Unsupervised Question Answering by Cloze Translation"). Altered passages: sentences
change places or come from elsewhere, so that a place cannot be learned by heart; the passage's own questions are asked
again there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qa_onnx.cli import run_command
from qa_onnx.data.json_text import read_json
from qa_onnx.files import write_file

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
STOPWORDS = frozenset(
    "a about after all also although among an and any are as at be because been before being between both but by can "
    "could did do does during each either every for from had has have he her him his however i if in into is it its "
    "itself many may more most much no nor not of off on one only or other out over own per she should since so some "
    "such than that the their them then there these they this those through to too under until up upon very was we "
    "were what when where which while who whom whose will with within without would you your".split()
)
DATE = (
    rf"\b(?:\d{{1,2}} )?(?:{MONTHS})(?: \d{{1,2}}(?:st|nd|rd|th)?)?(?:,? \d{{4}})?\b"
    r"|\b1\d{3}s?\b|\b20[0-2]\ds?\b"
)
NUMBER = (
    r"(?:[$\u00a3\u20ac]\s?)?\b\d[\d,.]*\d\b(?: ?%| percent| million| billion)?|\b\d\b(?: ?%| percent)?"
    r"|\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|twenty)\b"
)
SPANS = {  # kinds of answers, and what is asked for them
    "date": (
        re.compile(DATE),
        ("When", "When", "What year", "In what year", "On what date", "In which year", "When was", "When did"),
    ),
    "number": (
        re.compile(NUMBER),
        ("How many", "How many", "How much", "What number of", "What percentage", "What is the number of"),
    ),
    "name": (
        re.compile(r"\b[A-Z][\w'\u2019-]+(?:(?: (?:of|the|and|de|von|van|for|&))* [A-Z][\w'\u2019.-]*\w)*"),
        ("Who", "Who", "Who was", "What", "What", "Which", "Where", "What is the name of", "In what", "What was"),
    ),
    "phrase": (
        re.compile(r"\b(?:(?:the|a|an) )?[a-z][a-z-]{2,}(?: [a-z][a-z-]{2,}){0,3}\b"),
        ("What", "What", "What is", "What did", "What kind of", "What type of", "Why", "How", "Which", "What was"),
    ),
}
SPAN_SHARES = {"date": 3.0, "number": 2.0, "name": 4.0, "phrase": 4.0}
MIN_SENTENCE_WORDS = 6


def sentences_of(context: str) -> list[str]:
    """Splits a passage into sentences, roughly."""
    return [sentence for sentence in SENTENCE_END.split(context) if sentence.strip()]


def spans_of(sentence: str) -> list[tuple[str, int, int]]:
    """Kind, start and end of each span that could be an answer."""
    spans: list[tuple[str, int, int]] = []
    taken: list[tuple[int, int]] = []
    for kind, (pattern, _) in SPANS.items():
        for match in pattern.finditer(sentence):
            start, end = match.span()
            if any(start < last and first < end for first, last in taken):
                continue
            words = match.group().lower().split()
            if kind == "phrase":
                while words and words[-1] in STOPWORDS:
                    end -= len(words.pop()) + 1
                inner = words[1:] if words and words[0] in ("the", "a", "an") else words
                if not inner or any(word in STOPWORDS for word in inner):
                    continue
            elif kind == "name" and start == 0 and (len(words) == 1 or words[0] in STOPWORDS):
                continue
            spans.append((kind, start, end))
            taken.append((start, end))
    return spans


def cloze_question(sentence: str, kind: str, start: int, end: int, draw: random.Random) -> str | None:
    """Asks for a span of a sentence in words of the rest of it; None where too little is left."""
    before, after = (re.findall(r"[\w$%'\u2019.-]*\w", part) for part in (sentence[:start], sentence[end:]))
    if before and before[-1].lower() in STOPWORDS and draw.random() < 0.7:
        before = before[:-1]
    reach = draw.randint(4, 14)
    before, after = before[-reach:], after[:reach]
    parts = after + before if draw.random() < 0.5 else before + after
    drop = draw.uniform(0.0, 0.5)
    kept = []
    for word in parts:
        is_stopword = word.lower() in STOPWORDS
        if draw.random() < (drop + 0.15 if is_stopword else drop * 0.7):
            continue
        kept.append(word if is_stopword else _inflected(word, draw))
    if sum(word.lower() not in STOPWORDS for word in kept) < 2:
        return None
    if draw.random() < 0.4:  # neighbours change places
        kept = [word for _, word in sorted((index + draw.uniform(0, 3), word) for index, word in enumerate(kept))]
    asked = draw.choice(SPANS[kind][1])
    if draw.random() < 0.25:  # "the car was built in what year"
        text = f"{' '.join(kept)} {asked.lower()}"
        text = text[0].upper() + text[1:]
    else:
        text = f"{asked} {' '.join(kept)}"
    return text + draw.choice(("?", "?", "?", ""))


def _inflected(word: str, draw: random.Random) -> str:
    if len(word) < 5 or draw.random() > 0.25 or not word.isalpha():
        return word
    for ending in ("ing", "ed", "es", "s", "ly"):
        if word.endswith(ending):
            return word[: -len(ending)]
    return word + draw.choice(("s", "ed", "ing")) if word.islower() else word


def cloze_questions(context: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Up to `count` cloze questions on a passage, in SQuAD's format without ids."""
    found: list[tuple[str, str, int, int, int]] = []
    place = 0
    for sentence in sentences_of(context):
        place = context.index(sentence, place)
        if len(sentence.split()) >= MIN_SENTENCE_WORDS:
            found += [(sentence, kind, start, end, place) for kind, start, end in spans_of(sentence)]
    qas = []
    while found and len(qas) < count:
        index = draw.choices(range(len(found)), [SPAN_SHARES[span[1]] for span in found])[0]
        sentence, kind, start, end, place = found.pop(index)
        question = cloze_question(sentence, kind, start, end, draw)
        if question is not None:
            answer = {"text": sentence[start:end], "answer_start": place + start}
            qas.append({"question": question, "answers": [answer]})
    return qas


def altered(paragraph: dict[str, Any], strangers: list[str], draw: random.Random) -> dict[str, Any]:
    """The passage with its sentences shuffled, dropped or joined by strangers; questions go where their sentences go.

    A question stays if the sentence that its answer starts in stays, and its answer is whole there.
    """
    context = paragraph["context"]
    sentences, starts, place = sentences_of(context), [], 0
    for sentence in sentences:
        place = context.index(sentence, place)
        starts.append(place)
        place += len(sentence)
    if len(sentences) < 2:
        order = list(range(len(sentences)))
    else:
        order = [index for index in range(len(sentences)) if draw.random() > 0.15] or [0]
        if draw.random() < 0.5:
            draw.shuffle(order)
    pieces: list[tuple[int | None, str]] = [(index, sentences[index]) for index in order]
    for _ in range(draw.choice((0, 0, 1, 2)) if len(sentences) > 1 else draw.randint(2, 4)):
        pieces.insert(draw.randint(0, len(pieces)), (None, draw.choice(strangers)))
    text, moved = "", {}
    for index, piece in pieces:
        text += " " if text else ""
        if index is not None:
            moved[index] = len(text)
        text += piece
    qas = []
    for qa in paragraph["qas"]:
        answer = qa["answers"][0]
        index = max((i for i, start in enumerate(starts) if start <= answer["answer_start"]), default=None)
        if index is None or index not in moved:
            continue
        start = answer["answer_start"] - starts[index] + moved[index]
        if text.startswith(answer["text"], start):
            qas.append({**qa, "answers": [{"text": answer["text"], "answer_start": start}]})
    return {"context": text, "qas": qas}


def augment(data: list[dict[str, Any]], *, copies: int, cloze: int, seed: int) -> dict[str, Any]:
    """Makes one SQuAD v1.1 data set of several, with altered passages and cloze questions.

    Args:
        data: SQuAD data sets.
        copies: How many times each passage comes; the first time as it is, later altered.
        cloze: The most cloze questions on a passage, each time others.
        seed: The same seed gives the same data set.
    """
    draw = random.Random(seed)
    paragraphs = [paragraph for part in data for article in part["data"] for paragraph in article["paragraphs"]]
    strangers = [sentence for paragraph in paragraphs for sentence in sentences_of(paragraph["context"])]
    made = []
    for copy in range(copies):
        for number, paragraph in enumerate(paragraphs):
            is_whole = copy == 0 and len(sentences_of(paragraph["context"])) > 1
            passage = paragraph if is_whole else altered(paragraph, strangers, draw)
            qas = [*passage["qas"], *cloze_questions(passage["context"], cloze, draw)]
            numbered = [{**qa, "id": f"{seed}-{copy}-{number}-{index}"} for index, qa in enumerate(qas)]
            if numbered:
                made.append({"context": passage["context"], "qas": numbered})
    return {"version": "1.1", "data": [{"title": "", "paragraphs": made}]}


def main(argv: Sequence[str] | None = None) -> int:
    """Reads SQuAD files and writes one."""
    parser = argparse.ArgumentParser(description="Make more questions of the passages of SQuAD files.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="SQuAD v1.1 JSON files")
    parser.add_argument("--output", type=Path, required=True, help="the SQuAD v1.1 JSON file to write")
    parser.add_argument("--copies", type=int, default=2, help="how often each passage comes (default: %(default)s)")
    parser.add_argument("--cloze", type=int, default=4, help="cloze questions a passage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    return run_command(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> None:
    data = [read_json(path) for path in arguments.text]
    made = augment(data, copies=arguments.copies, cloze=arguments.cloze, seed=arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.output, json.dumps(made, ensure_ascii=False))
    questions = sum(len(paragraph["qas"]) for paragraph in made["data"][0]["paragraphs"])
    print(f"wrote {arguments.output}: {len(made['data'][0]['paragraphs'])} passages, {questions} questions")


if __name__ == "__main__":
    sys.exit(main())
