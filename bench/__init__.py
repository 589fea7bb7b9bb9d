"""Measurements: the runtime beside PyTorch and its other peers. Runs from a checkout; the wheel does not ship it."""
