"""A question in the parts that rows of data have."""

from __future__ import annotations

import csv

PASSAGE = "The Aller rises near Seehausen. It is 211 km long and joins the Weser at Verden."
QA = {"id": "q", "question": "How long?", "answers": [{"text": "211 km", "answer_start": 38}]}
ROW = {"context": PASSAGE, **QA}


def write_csv(path, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path
