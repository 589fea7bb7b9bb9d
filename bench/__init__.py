"""Measurements of the runtime, PyTorch and other peers. Runs from a checkout; the wheel does not ship it."""
