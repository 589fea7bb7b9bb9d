"""Loads a bundle: its files checked, its graphs in sessions of a provider, an engine around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from qa_onnx.bundle import Bundle
from qa_onnx.config import EngineConfig
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.provider import resolve_provider, with_batch_tokens
from qa_onnx.engine.session import Session, load_copier
from qa_onnx.kernels import KernelChoice, choose_kernels
from qa_onnx.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class LoadedBundle:
    """The parts of a bundle that `Answerer` computes with."""

    manifest: Manifest
    engine: Engine
    tokenizer: Tokenizer
    provider: str
    kernels: KernelChoice


def load_bundle(path: str | Path, *, provider: str, config: EngineConfig) -> LoadedBundle:
    """Loads a bundle; arguments and errors are those of `Answerer.from_pretrained`."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    provider, kernels = choose_backend(manifest.precision, provider=provider, kernels=config.kernels)
    bundle.check_files()
    tokenizer = bundle.load_tokenizer()
    graph = bundle.graph_path(has_kernels=kernels.library is not None)
    layout = manifest.cache_layout
    config = with_batch_tokens(config, provider, weight_bytes=manifest.weight_bytes, token_bytes=layout.bytes_per_token)
    session = Session(graph, provider=provider, config=config, kernels=kernels.library)
    copier = load_copier(bundle.cache_copy_path, provider=provider, config=config)
    bundle.check_graphs(session, copier)
    engine = Engine(
        session,
        copier,
        layout=layout,
        eos_token_id=manifest.eos_token_id,
        max_positions=manifest.max_positions,
        prefix_cache_bytes=config.prefix_cache_bytes,
    )
    return LoadedBundle(
        manifest=manifest, engine=engine, tokenizer=tokenizer, provider=session.provider, kernels=kernels
    )


def choose_backend(precision: str, *, provider: str, kernels: str) -> tuple[str, KernelChoice]:
    """Chooses the provider that runs a bundle on this machine, and whether with kernels.

    Args:
        precision: Of the bundle.
        provider: As of `Answerer.from_pretrained`.
        kernels: `EngineConfig.kernels`.

    Raises:
        InvalidInputError: An unknown provider.
        ProviderError: The provider or the kernels are not there, or do not run the precision.
    """
    found = resolve_provider(provider, precision)
    return found, choose_kernels(kernels, provider=found, precision=precision)
