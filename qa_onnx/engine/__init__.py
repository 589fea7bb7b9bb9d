"""The engine: which sequences are computed when, what is computed, and where keys and values live."""
