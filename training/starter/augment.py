"""Makes more questions of real passages: `python -m training.starter.augment --help`.

Four ways. Cloze questions: a span of a sentence is the answer, the rest of the sentence, shortened and shuffled, is the
question (Lewis et al., 2019, "Unsupervised Question Answering by Cloze Translation"). Altered passages: sentences
change places or come from elsewhere, so that a place cannot be learned by heart; the passage's own questions are asked
again there. Joined passages: several as one, as a window of a long document is. Questions without an answer: those on
other passages of the same article, and those whose sentence an altered passage has lost.
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
MAX_JOINED_CHARACTERS = 1700
LOST_SHARE = 0.5
"""Of the questions whose sentence a passage has lost; they are asked there without an answer."""
SAME_ARTICLE_SHARE = 0.8
"""Of the questions without an answer that come from the passage's own article, where that has other passages."""
SHORTENED_SHARE, DROPPED_SHARE = 0.35, 0.15
"""Of the questions, and of the words of one, that are left out, so that no word can be relied on alone."""


def split_sentences(context: str) -> list[str]:
    """Splits a passage into sentences, roughly."""
    return [sentence for sentence in SENTENCE_END.split(context) if sentence.strip()]


def find_spans(sentence: str) -> list[tuple[str, int, int]]:
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
    for sentence in split_sentences(context):
        place = context.index(sentence, place)
        if len(sentence.split()) >= MIN_SENTENCE_WORDS:
            found += [(sentence, kind, start, end, place) for kind, start, end in find_spans(sentence)]
    qas: list[dict[str, Any]] = []
    while found and len(qas) < count:
        index = draw.choices(range(len(found)), [SPAN_SHARES[span[1]] for span in found])[0]
        sentence, kind, start, end, place = found.pop(index)
        question = cloze_question(sentence, kind, start, end, draw)
        if question is not None:
            answer = {"text": sentence[start:end], "answer_start": place + start}
            qas.append({"question": question, "answers": [answer]})
    return qas


def altered(
    paragraph: dict[str, Any], strangers: list[str], draw: random.Random, *, keeps_lost: bool = False
) -> dict[str, Any]:
    """The passage with its sentences shuffled, dropped or joined by strangers; questions go where their sentences go.

    A question stays if the sentence that its answer starts in stays, and its answer is whole there; with `keeps_lost`
    some of the others stay, too, without an answer.
    """
    context = paragraph["context"]
    sentences, starts, place = split_sentences(context), [], 0
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
            if keeps_lost and draw.random() < LOST_SHARE and not holds_answer(text, qa):
                qas.append(unanswerable(qa))
            continue
        start = answer["answer_start"] - starts[index] + moved[index]
        if text.startswith(answer["text"], start):
            qas.append({**qa, "answers": [{"text": answer["text"], "answer_start": start}]})
    return {"context": text, "qas": qas}


def unanswerable(qa: dict[str, Any]) -> dict[str, Any]:
    """The question without an answer, as SQuAD v2.0 has it; `plausible_answers` are those of its own passage."""
    return {**qa, "answers": [], "plausible_answers": qa["answers"], "is_impossible": True}


def holds_answer(context: str, qa: dict[str, Any]) -> bool:
    """Whether one of a question's answers occurs in a passage."""
    return any(answer["text"].lower() in context.lower() for answer in qa.get("plausible_answers") or qa["answers"])


def questions_of_others(
    context: str, own: list[dict[str, Any]], others: list[dict[str, Any]], count: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Up to `count` questions on other passages that a passage does not answer."""
    found = []
    for _ in range(count):
        qa = draw.choice(draw.choice(others)["qas"])
        if qa not in own and not holds_answer(context, qa):
            found.append(unanswerable(qa))
    return found


def shortened(question: str, draw: random.Random) -> str:
    """The question without some of its words, now and then."""
    if draw.random() > SHORTENED_SHARE:
        return question
    words = question.split()
    kept = [word for number, word in enumerate(words) if number == 0 or draw.random() > DROPPED_SHARE]
    return " ".join(kept) if len(kept) > 2 else question


def joined(passage: dict[str, Any], contexts: list[str], draw: random.Random) -> dict[str, Any]:
    """The passage at a random place among others, as many as `MAX_JOINED_CHARACTERS` allow, with its own questions.

    Questions without an answer that one of the others answers are left out.
    """
    room = MAX_JOINED_CHARACTERS - len(passage["context"])
    before: list[str] = []
    after: list[str] = []
    for context in draw.sample(contexts, min(draw.randint(1, 3), len(contexts))):
        room -= len(context)
        if room > 0:
            draw.choice((before, after)).append(context)
    between = draw.choice((" ", "\n", "\n\n"))
    shift = sum(len(context) + len(between) for context in before)
    text = between.join([*before, passage["context"], *after])
    qas = [
        {**qa, "answers": [{**answer, "answer_start": answer["answer_start"] + shift} for answer in qa["answers"]]}
        for qa in passage["qas"]
        if qa["answers"] or not holds_answer(text, qa)
    ]
    return {"context": text, "qas": qas}


def augment(
    data: list[dict[str, Any]],
    *,
    copies: int,
    cloze: int,
    seed: int,
    no_answer_share: float = 0.0,
    joined_share: float = 0.0,
) -> dict[str, Any]:
    """Makes one SQuAD data set of several, with altered and joined passages, and further questions.

    Args:
        data: SQuAD data sets.
        copies: How many times each passage comes; the first time as it is, later altered.
        cloze: Maximum number of cloze questions on a passage, each time others.
        seed: The same seed gives the same data set.
        no_answer_share: How many questions of other passages a passage gets for each of its own, without an answer;
            with it, questions are shortened now and then.
        joined_share: Share of the passages that are joined with others.
    """
    draw = random.Random(seed)
    articles = [article["paragraphs"] for part in data for article in part["data"]]
    paragraphs = [paragraph for article in articles for paragraph in article]
    article_of = [article for article in articles for _ in article]
    asked = [paragraph for paragraph in paragraphs if paragraph["qas"]]
    strangers = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph["context"])]
    made = []
    for copy in range(copies):
        for number, paragraph in enumerate(paragraphs):
            is_whole = copy == 0 and len(split_sentences(paragraph["context"])) > 1
            passage = paragraph if is_whole else altered(paragraph, strangers, draw, keeps_lost=no_answer_share > 0)
            qas = [*passage["qas"], *cloze_questions(passage["context"], cloze, draw)]
            if no_answer_share:
                near = [other for other in article_of[number] if other is not paragraph and other["qas"]]
                others = near if near and draw.random() < SAME_ARTICLE_SHARE else asked
                count = int(no_answer_share * len(qas) + draw.random())
                qas += questions_of_others(passage["context"], paragraph["qas"], others, count, draw)
                qas = [{**qa, "question": shortened(qa["question"], draw)} for qa in qas]
            numbered = [{**qa, "id": f"{seed}-{copy}-{number}-{index}"} for index, qa in enumerate(qas)]
            if numbered:
                made.append({"context": passage["context"], "qas": numbered})
    short = [passage["context"] for passage in made if len(passage["context"]) < MAX_JOINED_CHARACTERS // 2]
    made = [
        joined(passage, short, draw)
        if draw.random() < joined_share and len(passage["context"]) < MAX_JOINED_CHARACTERS
        else passage
        for passage in made
    ]
    return {"version": "1.1", "data": [{"title": "", "paragraphs": made}]}


def main(argv: Sequence[str] | None = None) -> int:
    """Reads SQuAD files and writes one."""
    parser = argparse.ArgumentParser(description="Make more questions of the passages of SQuAD files.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="SQuAD v1.1 JSON files")
    parser.add_argument("--output", type=Path, required=True, help="the SQuAD v1.1 JSON file to write")
    parser.add_argument("--copies", type=int, default=2, help="how often each passage comes (default: %(default)s)")
    parser.add_argument("--cloze", type=int, default=4, help="cloze questions a passage (default: %(default)s)")
    parser.add_argument("--no-answer-share", type=float, default=0.0, help="questions without an answer for each other")
    parser.add_argument("--joined-share", type=float, default=0.0, help="share of passages that are joined with others")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    return run_command(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> None:
    data = [read_json(path) for path in arguments.text]
    made = augment(
        data,
        copies=arguments.copies,
        cloze=arguments.cloze,
        seed=arguments.seed,
        no_answer_share=arguments.no_answer_share,
        joined_share=arguments.joined_share,
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.output, json.dumps(made, ensure_ascii=False))
    questions = sum(len(paragraph["qas"]) for paragraph in made["data"][0]["paragraphs"])
    print(f"wrote {arguments.output}: {len(made['data'][0]['paragraphs'])} passages, {questions} questions")


if __name__ == "__main__":
    sys.exit(main())
