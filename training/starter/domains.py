"""The subjects of `sample`: how their names and facts are made, told and asked for."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

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


class ValueMaker:
    """Makes values of one split: a draw whose checksum falls to the other split is drawn again."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split = split
        self.random = random.Random(f"{split}-{seed}")

    def keep(self, draw: Callable[[], str]) -> str:
        """Draws until a value belongs to the split."""
        while True:
            value = draw()
            if (zlib.crc32(value.encode()) % 5 == 0) == (self.split == "heldout"):
                return value

    def pick(self, *parts: list[str]) -> str:
        """One of each list, joined by spaces."""
        return self.keep(lambda: " ".join(self.random.choice(part) for part in parts))

    def syllable(self) -> str:
        """A syllable without an end."""
        return self.random.choice(ONSETS) + self.random.choice(VOWELS)

    def word(self, endings: list[str], syllables: int) -> str:
        """A capitalized word of so many syllables and an ending."""

        def draw() -> str:
            return ("".join(self.syllable() for _ in range(syllables)) + self.random.choice(endings)).capitalize()

        return self.keep(draw)

    def person(self) -> str:
        """A first name and a family name."""
        first = self.word([*CODAS, "a", "o", ""], self.random.choice((1, 1, 2)))
        return f"{first} {self.word(FAMILY_ENDINGS, self.random.choice((1, 1, 2)))}"

    def place(self) -> str:
        """A town."""
        return self.word(PLACE_ENDINGS, self.random.choice((1, 1, 2)))

    def company(self) -> str:
        """A company."""
        return f"{self.word([*CODAS, 'a', 'o'], 2)} {self.random.choice(COMPANY_ENDINGS)}"

    def title(self) -> str:
        """A title of two words."""
        return self.keep(lambda: f"The {self.random.choice(ADJECTIVES)} {self.random.choice(NOUNS)}".title())

    def river(self) -> str:
        """A river."""
        return f"the {self.word([*CODAS, 'a', 'e'], self.random.choice((1, 2)))}"

    def year(self) -> str:
        """A year."""
        return self.keep(lambda: str(self.random.randint(1580, 2019)))

    def date(self) -> str:
        """A date, in one of two notations."""

        def draw() -> str:
            day, month, year = self.random.randint(1, 28), self.random.choice(MONTHS), self.random.randint(1580, 2019)
            return self.random.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))

        return self.keep(draw)

    def number(self) -> str:
        """A number from 11 to 98,000."""

        def draw() -> str:
            return self.random.choice((f"{self.random.randint(11, 999)}", f"{self.random.randint(1_000, 98_000):,}"))

        return self.keep(draw)

    def length(self) -> str:
        """A length with its unit."""
        return self.keep(lambda: f"{self.random.randint(12, 990)} {self.random.choice(('metres', 'kilometres'))}")

    def money(self) -> str:
        """A sum of money."""
        return self.keep(lambda: f"{self.random.randint(2, 990)} {self.random.choice(('thousand', 'million'))} crowns")

    def days(self) -> str:
        """A number of days."""
        return self.keep(lambda: f"{self.random.randint(11, 999)} days")

    def thing(self) -> str:
        """An object with an article."""

        def draw() -> str:
            adjective = self.random.choice(ADJECTIVES)
            return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {self.random.choice(NOUNS)}"

        return self.keep(draw)

    def topic(self) -> str:
        """A field of study."""
        return self.pick(TOPIC_VIEWS, TOPICS)

    def trouble(self) -> str:
        """A mishap and its place."""
        return self.pick(TROUBLES, TROUBLE_PLACES)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One fact: how its value is made, told (`{s}` subject, `{v}` value) and asked for."""

    value: Callable[[ValueMaker], str]
    told: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of subject, the short words that may stand for it after its first mention, and its relations."""

    title: str
    subject: Callable[[ValueMaker], str]
    short: tuple[str, ...]
    relations: tuple[Relation, ...]


def _relation(value: Callable[[ValueMaker], str], told: str, asked: str) -> Relation:
    return Relation(value=value, told=tuple(told.split("|")), asked=tuple(asked.split("|")))


DOMAINS = (
    Domain(
        title="People",
        subject=ValueMaker.person,
        short=("the scientist", "the researcher"),
        relations=(
            _relation(
                ValueMaker.place,
                "{s} was born in {v}|{s} grew up in {v}, a small town|The birthplace of {s} was {v}",
                "Where was {s} born?|In which town was {s} born?|What is the birthplace of {s}?"
                "|Which town did {s} come from?",
            ),
            _relation(
                ValueMaker.topic,
                "{s} became known for {v}|{s} wrote at length about {v}|The main interest of {s} was {v}",
                "What did {s} become known for?|What did {s} write about?|What was the main interest of {s}?"
                "|Which subject did {s} work on?",
            ),
            _relation(
                ValueMaker.date,
                "{s} died on {v}|The death of {s} on {v} was widely reported|On {v}, {s} died after an illness",
                "When did {s} die?|On what date did {s} die?|What was the date of the death of {s}?",
            ),
            _relation(
                ValueMaker.person,
                "{s} married {v}|{s} shared a house with {v}, a painter, and later married this friend"
                "|{v} was married to {s} for many years",
                "Who did {s} marry?|To whom was {s} married?|Who was the spouse of {s}?",
            ),
        ),
    ),
    Domain(
        title="Companies",
        subject=ValueMaker.company,
        short=("the company", "the firm", "the business"),
        relations=(
            _relation(
                ValueMaker.person,
                "{s} was founded by {v}|{v} founded {s}|{s} owes its existence to {v}, an engineer",
                "Who founded {s}?|By whom was {s} founded?|Who was the founder of {s}?|Who started {s}?",
            ),
            _relation(
                ValueMaker.number,
                "{s} employed {v} people|About {v} people worked for {s}|The staff of {s} grew to {v} people",
                "How many people did {s} employ?|How many people worked for {s}?|How large was the staff of {s}?",
            ),
            _relation(
                ValueMaker.place,
                "{s} moved its offices to {v}|The head office of {s} stood in {v}|{s} was run from {v}",
                "Where was the head office of {s}?|From which town was {s} run?|Where did {s} have its offices?",
            ),
            _relation(
                ValueMaker.trouble,
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
                ValueMaker.river,
                "{s} crosses {v}|{s} was built over {v}|The waters of {v} flow under {s}",
                "Which river does {s} cross?|Over what river was {s} built?|What flows under {s}?",
            ),
            _relation(
                ValueMaker.length,
                "{s} is {v} long|The length of {s} is {v}|From end to end {s} measures {v}",
                "How long is {s}?|What is the length of {s}?|How much does {s} measure from end to end?",
            ),
            _relation(
                ValueMaker.year,
                "{s} was opened in {v}|In {v} the first carts passed over {s}|{s} has been in use since {v}",
                "When was {s} opened?|In what year was {s} opened?|Since when has {s} been in use?",
            ),
            _relation(
                ValueMaker.money,
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
                ValueMaker.person,
                "{s} was written by {v}|{v} wrote {s}|{s} is the best work of {v}, a teacher",
                "Who wrote {s}?|Who is the author of {s}?|By whom was {s} written?",
            ),
            _relation(
                ValueMaker.thing,
                "{s} tells the story of {v}|At the heart of {s} lies {v}|The plot of {s} turns on {v}",
                "What is {s} about?|What does {s} tell the story of?|What does the plot of {s} turn on?",
            ),
            _relation(
                ValueMaker.number,
                "{s} sold {v} copies|Readers bought {v} copies of {s}|The first printing of {s} ran to {v} copies",
                "How many copies of {s} were sold?|How many copies did {s} sell?",
            ),
            _relation(
                ValueMaker.date,
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
                ValueMaker.person,
                "{s} was led by {v}|{v} led {s}|The leader of {s} was {v}, a sailor",
                "Who led {s}?|Who was the leader of {s}?|By whom was {s} led?",
            ),
            _relation(
                ValueMaker.place,
                "{s} set out from {v}|{s} left {v} in good spirits|The starting point of {s} was {v}",
                "Where did {s} set out from?|What was the starting point of {s}?|Which town did {s} leave from?",
            ),
            _relation(
                ValueMaker.thing,
                "{s} brought back {v}|The most famous find of {s} was {v}|During {s} somebody discovered {v}",
                "What did {s} bring back?|What was the most famous find of {s}?|What was discovered during {s}?",
            ),
            _relation(
                ValueMaker.days,
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
                ValueMaker.thing,
                "{s} is famous for {v}|The greatest treasure of {s} is {v}|People come to {s} to see {v}",
                "What is {s} famous for?|What is the greatest treasure of {s}?|What do people come to see at {s}?",
            ),
            _relation(
                ValueMaker.person,
                "{s} was designed by {v}|The architect of {s} was {v}|{v} drew the plans for {s}",
                "Who designed {s}?|Who was the architect of {s}?|Who drew the plans for {s}?",
            ),
            _relation(
                ValueMaker.year,
                "{s} opened its doors in {v}|Since {v}, {s} has welcomed guests|{s} dates from {v}",
                "When did {s} open?|In which year did {s} open its doors?|From what year does {s} date?",
            ),
            _relation(
                ValueMaker.topic,
                "{s} shows a display on {v}|A whole floor of {s} is given to {v}|The main hall of {s} presents {v}",
                "What is the display at {s} about?|What is a whole floor of {s} given to?"
                "|What does the main hall of {s} present?",
            ),
        ),
    ),
)
