"""Text to tokens and back: prompts, windows, constrained decoding."""
