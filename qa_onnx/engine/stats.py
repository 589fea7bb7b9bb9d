"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class EngineStats:
    """What an engine has computed.

    Attributes:
        prefills: Batches of prompts.
        prefill_tokens: Their tokens that were computed, prefixes found in the prefix cache left out.
        decode_steps: Steps of one token, or a draft of several (`look_ahead.py`), for each running sequence.
        decode_tokens: New tokens of all decode steps.
        draft_tokens: Tokens of drafts that were computed.
        accepted_draft_tokens: Those of them that were right, and are among `decode_tokens`.
        cuda_graphs: Decode steps, by shapes and addresses, captured in a CUDA graph.
    """

    prefills: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    cuda_graphs: int = 0
