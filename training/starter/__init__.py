"""The embedded defaults: `sample`, a generated question-answering set, and `starter`, a small GPT-2 pretrained here."""
