"""`sample`: a question-answering set in SQuAD's format, generated from a seed, so that a first run needs no download.

A passage tells several facts about a subject and, mostly, about a rival of the same kind, so that the right relation
of the wrong subject is there as a distractor. Names, dates, numbers and phrases are made from parts, and every made
value belongs to one of the two splits by its checksum: the parts `train` and `heldout` share no value at all.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qa_onnx.cli import run_command
from qa_onnx.files import write_file

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

QUESTIONS = {"train": 9_000, "heldout": 400}
"""How many questions `--train sample` and `--eval sample` mean."""

ONSETS = "b br c ch d dr f g gr h j k l m n p pr r s sh st t th tr v w y z".split()
VOWELS = "a a e e i o u ai ea ie oa ou".split()
CODAS = "l n r s t m nd rn sk th ll ck ss".split()
PLACE_ENDINGS = "burg ford field haven mouth stad wick holm dale port ville ton minster gate".split()
FAMILY_ENDINGS = "son sen er man ley ini ov ez ard well wood ski".split()
COMPANY_ENDINGS = "Works,Motors,Instruments,Shipping,Brothers,Foods,Optics,Steel,Press,Airlines".split(",")
MONTHS = "January February March April May June July August September October November December".split()
ADJECTIVES = (
    "silver carved blue ancient hollow copper painted woven broken northern hidden quiet crimson narrow golden "
    "wooden frozen burning singing double glass paper velvet iron marble early wild salted folding amber"
).split()
NOUNS = (
    "compass lantern bridge clock harbour bell map mirror garden ladder violin kite letter tower crown river "
    "orchard whistle anchor ship telescope candle feather engine chair basket mask boat drum wheel"
).split()
TOPICS = (
    "river dolphins,sea ice,desert plants,medieval music,volcanic ash,tree bark,honey bees,cave paintings,old maps,"
    "salt marshes,migrating birds,bronze tools,mountain lakes,night moths,coral reefs,glacier caves,wild horses,"
    "fishing villages,stone circles,silk weaving,meteor showers,root fungi,tidal pools,ship wrecks,clay tablets"
).split(",")
TOPIC_VIEWS = "the history of,the colours of,the movements of,the origin of,the decline of,the study of".split(",")
TROUBLES = (
    "a fire,a flood,a storm,an earthquake,a strike,a landslide,a shortage of coal,a dispute over money,"
    "the spread of fever,a collapsed roof,the loss of a ship,heavy snow,a failed harvest,a lawsuit"
).split(",")
TROUBLE_PLACES = "in the old town,at the harbour,near the border,in the main hall,on the coast,in the valley".split(",")
FILLERS = (
    "Little else is recorded about those years.",
    "Local newspapers followed the events with interest.",
    "Several letters from that time have survived.",
    "The weather that season was unusually mild.",
    "Visitors still ask about it today.",
    "Historians disagree about some of the details.",
    "A small plaque marks the spot.",
    "Few people expected what happened next.",
    "The archives were moved twice in the following decade.",
    "Children in the region learn the story at school.",
)


class _Maker:
    """Makes values of one split: a draw whose checksum falls to the other split is drawn again."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split = split
        self.random = random.Random(f"{split}-{seed}")

    def keep(self, draw: Callable[[], str]) -> str:
        while True:
            value = draw()
            if (zlib.crc32(value.encode()) % 5 == 0) == (self.split == "heldout"):
                return value

    def pick(self, *parts: list[str]) -> str:
        return self.keep(lambda: " ".join(self.random.choice(part) for part in parts))

    def syllable(self) -> str:
        return self.random.choice(ONSETS) + self.random.choice(VOWELS)

    def word(self, endings: list[str], syllables: int) -> str:
        def draw() -> str:
            return ("".join(self.syllable() for _ in range(syllables)) + self.random.choice(endings)).capitalize()

        return self.keep(draw)

    def person(self) -> str:
        first = self.word([*CODAS, "a", "o", ""], self.random.choice((1, 1, 2)))
        return f"{first} {self.word(FAMILY_ENDINGS, self.random.choice((1, 1, 2)))}"

    def place(self) -> str:
        return self.word(PLACE_ENDINGS, self.random.choice((1, 1, 2)))

    def company(self) -> str:
        return f"{self.word([*CODAS, 'a', 'o'], 2)} {self.random.choice(COMPANY_ENDINGS)}"

    def title(self) -> str:
        return self.keep(lambda: f"The {self.random.choice(ADJECTIVES)} {self.random.choice(NOUNS)}".title())

    def river(self) -> str:
        return f"the {self.word([*CODAS, 'a', 'e'], self.random.choice((1, 2)))}"

    def year(self) -> str:
        return self.keep(lambda: str(self.random.randint(1580, 2019)))

    def date(self) -> str:
        def draw() -> str:
            day, month, year = self.random.randint(1, 28), self.random.choice(MONTHS), self.random.randint(1580, 2019)
            return self.random.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))

        return self.keep(draw)

    def number(self) -> str:
        def draw() -> str:
            return self.random.choice((f"{self.random.randint(11, 999)}", f"{self.random.randint(1_000, 98_000):,}"))

        return self.keep(draw)

    def length(self) -> str:
        return self.keep(lambda: f"{self.random.randint(12, 990)} {self.random.choice(('metres', 'kilometres'))}")

    def money(self) -> str:
        return self.keep(lambda: f"{self.random.randint(2, 990)} {self.random.choice(('thousand', 'million'))} crowns")

    def days(self) -> str:
        return self.keep(lambda: f"{self.random.randint(11, 999)} days")

    def thing(self) -> str:
        def draw() -> str:
            adjective = self.random.choice(ADJECTIVES)
            return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {self.random.choice(NOUNS)}"

        return self.keep(draw)

    def topic(self) -> str:
        return self.pick(TOPIC_VIEWS, TOPICS)

    def trouble(self) -> str:
        return self.pick(TROUBLES, TROUBLE_PLACES)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One fact: how its value is made, told (`{s}` subject, `{v}` value) and asked for."""

    value: Callable[[_Maker], str]
    told: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of subject, the short words that may stand for it after its first mention, and its relations."""

    title: str
    subject: Callable[[_Maker], str]
    short: tuple[str, ...]
    relations: tuple[Relation, ...]


def _relation(value: Callable[[_Maker], str], told: str, asked: str) -> Relation:
    return Relation(value=value, told=tuple(told.split("|")), asked=tuple(asked.split("|")))


DOMAINS = (
    Domain(
        title="People",
        subject=_Maker.person,
        short=("the scientist", "the researcher"),
        relations=(
            _relation(
                _Maker.place,
                "{s} was born in {v}|{s} grew up in {v}, a small town|The birthplace of {s} was {v}",
                "Where was {s} born?|In which town was {s} born?|What is the birthplace of {s}?"
                "|Which town did {s} come from?",
            ),
            _relation(
                _Maker.topic,
                "{s} became known for {v}|{s} wrote at length about {v}|The main interest of {s} was {v}",
                "What did {s} become known for?|What did {s} write about?|What was the main interest of {s}?"
                "|Which subject did {s} work on?",
            ),
            _relation(
                _Maker.date,
                "{s} died on {v}|The death of {s} on {v} was widely reported|On {v}, {s} died after an illness",
                "When did {s} die?|On what date did {s} die?|What was the date of the death of {s}?",
            ),
            _relation(
                _Maker.person,
                "{s} married {v}|{s} shared a house with {v}, a painter, and later married this friend"
                "|{v} was married to {s} for many years",
                "Who did {s} marry?|To whom was {s} married?|Who was the spouse of {s}?",
            ),
        ),
    ),
    Domain(
        title="Companies",
        subject=_Maker.company,
        short=("the company", "the firm", "the business"),
        relations=(
            _relation(
                _Maker.person,
                "{s} was founded by {v}|{v} founded {s}|{s} owes its existence to {v}, an engineer",
                "Who founded {s}?|By whom was {s} founded?|Who was the founder of {s}?|Who started {s}?",
            ),
            _relation(
                _Maker.number,
                "{s} employed {v} people|About {v} people worked for {s}|The staff of {s} grew to {v} people",
                "How many people did {s} employ?|How many people worked for {s}?|How large was the staff of {s}?",
            ),
            _relation(
                _Maker.place,
                "{s} moved its offices to {v}|The head office of {s} stood in {v}|{s} was run from {v}",
                "Where was the head office of {s}?|From which town was {s} run?|Where did {s} have its offices?",
            ),
            _relation(
                _Maker.trouble,
                "{s} nearly closed because of {v}|{s} lost a whole year to {v}|Because of {v}, {s} stopped its work",
                "Why did {s} nearly close?|What made {s} stop its work?|What caused {s} to lose a year?",
            ),
        ),
    ),
    Domain(
        title="Bridges",
        subject=lambda maker: f"{maker.place()} Bridge",
        short=("the bridge", "the structure"),
        relations=(
            _relation(
                _Maker.river,
                "{s} crosses {v}|{s} was built over {v}|The waters of {v} flow under {s}",
                "Which river does {s} cross?|Over what river was {s} built?|What flows under {s}?",
            ),
            _relation(
                _Maker.length,
                "{s} is {v} long|The length of {s} is {v}|From end to end {s} measures {v}",
                "How long is {s}?|What is the length of {s}?|How much does {s} measure from end to end?",
            ),
            _relation(
                _Maker.year,
                "{s} was opened in {v}|In {v} the first carts passed over {s}|{s} has been in use since {v}",
                "When was {s} opened?|In what year was {s} opened?|Since when has {s} been in use?",
            ),
            _relation(
                _Maker.money,
                "{s} cost {v}|The builders of {s} spent {v}|A sum of {v} was paid for {s}",
                "How much did {s} cost?|What sum was paid for {s}?|How much was spent on {s}?",
            ),
        ),
    ),
    Domain(
        title="Books",
        subject=lambda maker: f'"{maker.title()}"',
        short=("the book", "the novel"),
        relations=(
            _relation(
                _Maker.person,
                "{s} was written by {v}|{v} wrote {s}|{s} is the best work of {v}, a teacher",
                "Who wrote {s}?|Who is the author of {s}?|By whom was {s} written?",
            ),
            _relation(
                _Maker.thing,
                "{s} tells the story of {v}|At the heart of {s} lies {v}|The plot of {s} turns on {v}",
                "What is {s} about?|What does {s} tell the story of?|What does the plot of {s} turn on?",
            ),
            _relation(
                _Maker.number,
                "{s} sold {v} copies|Readers bought {v} copies of {s}|The first printing of {s} ran to {v} copies",
                "How many copies of {s} were sold?|How many copies did {s} sell?",
            ),
            _relation(
                _Maker.date,
                "{s} was published on {v}|{s} reached the shops on {v}|On {v} the public could first read {s}",
                "When was {s} published?|On what date was {s} published?|When did {s} reach the shops?",
            ),
        ),
    ),
    Domain(
        title="Expeditions",
        subject=lambda maker: f"the {maker.place()} Expedition",
        short=("the expedition", "the journey", "the party"),
        relations=(
            _relation(
                _Maker.person,
                "{s} was led by {v}|{v} led {s}|The leader of {s} was {v}, a sailor",
                "Who led {s}?|Who was the leader of {s}?|By whom was {s} led?",
            ),
            _relation(
                _Maker.place,
                "{s} set out from {v}|{s} left {v} in good spirits|The starting point of {s} was {v}",
                "Where did {s} set out from?|What was the starting point of {s}?|Which town did {s} leave from?",
            ),
            _relation(
                _Maker.thing,
                "{s} brought back {v}|The most famous find of {s} was {v}|During {s} somebody discovered {v}",
                "What did {s} bring back?|What was the most famous find of {s}?|What was discovered during {s}?",
            ),
            _relation(
                _Maker.days,
                "{s} lasted {v}|It took {v} to complete {s}|After {v} {s} came to an end",
                "How long did {s} last?|How long did {s} take?|After what time did {s} end?",
            ),
        ),
    ),
    Domain(
        title="Museums",
        subject=lambda maker: f"the {maker.place()} Museum",
        short=("the museum", "the collection"),
        relations=(
            _relation(
                _Maker.thing,
                "{s} is famous for {v}|The greatest treasure of {s} is {v}|People come to {s} to see {v}",
                "What is {s} famous for?|What is the greatest treasure of {s}?|What do people come to see at {s}?",
            ),
            _relation(
                _Maker.person,
                "{s} was designed by {v}|The architect of {s} was {v}|{v} drew the plans for {s}",
                "Who designed {s}?|Who was the architect of {s}?|Who drew the plans for {s}?",
            ),
            _relation(
                _Maker.year,
                "{s} opened its doors in {v}|Since {v}, {s} has welcomed guests|{s} dates from {v}",
                "When did {s} open?|In which year did {s} open its doors?|From what year does {s} date?",
            ),
            _relation(
                _Maker.topic,
                "{s} shows a display on {v}|A whole floor of {s} is given to {v}|The main hall of {s} presents {v}",
                "What is the display at {s} about?|What is a whole floor of {s} given to?"
                "|What does the main hall of {s} present?",
            ),
        ),
    ),
)


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


def _tell(maker: _Maker, domain: Domain, relations: list[Relation], passage: _Passage) -> list[dict[str, Any]]:
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


def _paragraph(maker: _Maker, domain: Domain, *, contrast: bool) -> dict[str, Any]:
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
    maker = _Maker(split, seed)
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
