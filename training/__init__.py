"""Fine-tuning GPT-2 for question answering, with PyTorch. Runs from a checkout; the wheel does not ship it."""
