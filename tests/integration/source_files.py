"""The same four questions in files of every kind."""

from __future__ import annotations

import csv
import json

from qa_onnx.data.example import Example, GoldAnswer

CONTEXT = "Mara founded Tolvik in 1803. It lies at the sea, and Mara lives there."


ROWS = [
    {"id": "a", "question": "Who founded Tolvik?", "text": "Mara", "start": 0},
    {"id": "b", "question": 'When, said "Mara"?', "text": "1803", "start": 23},
    {"id": "c", "question": "Who rules Tolvik?", "text": "", "start": None},
    {"id": "d", "question": "Who lives there?", "text": "Mara", "start": CONTEXT.rindex("Mara")},
]


EXAMPLES = tuple(
    Example(
        id=row["id"],
        title="",
        context=CONTEXT,
        question=row["question"],
        answers=(GoldAnswer(text=row["text"], start=row["start"]),) if row["text"] else (),
    )
    for row in ROWS
)


def squad_of(rows):
    qas = [
        {
            "id": row["id"],
            "question": row["question"],
            "is_impossible": not row["text"],
            "answers": [{"text": row["text"], "answer_start": row["start"]}] if row["text"] else [],
        }
        for row in rows
    ]
    return {"version": "v2.0", "data": [{"title": "", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}


def write(path, kind):
    if kind == "squad.json":
        path.write_text(json.dumps(squad_of(ROWS)))
    elif kind == "squad.jsonl":  # as the hub's columns are
        lines = [
            {"answers": {"text": [r["text"]] if r["text"] else [], "answer_start": [r["start"]] if r["text"] else []}}
            for r in ROWS
        ]
        merged = [
            {"id": row["id"], "context": CONTEXT, "question": row["question"], **line}
            for row, line in zip(ROWS, lines, strict=True)
        ]
        path.write_text("\n\n".join(map(json.dumps, merged)))
    elif kind == "plain.jsonl":
        lines = [
            {
                "id": r["id"],
                "context": CONTEXT,
                "question": r["question"],
                "answer": r["text"],
                "answer_start": r["start"],
            }
            for r in ROWS
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
    elif kind == "objects.jsonl":
        lines = [
            {
                "id": r["id"],
                "context": CONTEXT,
                "question": r["question"],
                "answers": [{"text": r["text"], "answer_start": r["start"]}] if r["text"] else [],
            }
            for r in ROWS
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "context", "question", "answers", "answer_start"])
            writer.writerows(
                [r["id"], CONTEXT, r["question"], r["text"], "" if r["start"] is None else r["start"]] for r in ROWS
            )
