"""What a model computes: prefill of prefixes, prefill of suffixes, decode steps.

All sequences that share a prefix read its keys and values from one place; a slot keeps only those of its own tokens.
New tokens are packed, so that there is no padding but in attention (`batch.py` and `export/decoder.py` draw both).

Prefixes start in the first column, for a product adds up its columns in blocks from there, and suffixes are aligned to
the right. So a sequence's numbers do not depend on its neighbors, to the last bit on the CPU, unless its suffix is
longer than such a block (256 columns).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from qa_onnx.engine.batch import (
    SCORE_BYTES,
    Batch,
    Segment,
    decode_grid_inputs,
    grid_inputs,
    make_batch,
    segment_inputs,
    segment_width,
    split_prefill,
)
from qa_onnx.engine.kv_cache import (
    PAST_NAME,
    PREFIX_NAME,
    PRESENT_NAME,
    CacheLayout,
    KVCache,
    KVCachePool,
    aligned,
)
from qa_onnx.engine.planner import Group
from qa_onnx.engine.prefix_cache import PrefixCache
from qa_onnx.engine.provider import Limits
from qa_onnx.engine.sampling import Predictions
from qa_onnx.engine.sequence import Sequence
from qa_onnx.engine.session import Binding, Session
from qa_onnx.engine.stats import EngineStats
from qa_onnx.errors import InvalidInputError

MAX_CUDA_GRAPHS = 32
"""Maximum number of decode steps, by shapes and addresses, that are captured; others run without a CUDA graph."""
LOGPROBS = ("logprobs",)
CHOICE = ("token_ids", "token_logprobs", "eos_logprobs")


class Engine:
    """Computes with one session. One thread at a time may use it."""

    def __init__(
        self,
        session: Session,
        copier: Session,
        *,
        layout: CacheLayout,
        eos_token_id: int,
        max_positions: int,
        prefix_cache_bytes: int = 0,
    ) -> None:
        """Takes the graphs and the few facts of the model that decoding needs (see `Manifest`).

        Args:
            session: Of the decoder.
            copier: Of the graph that copies KV caches, on the same device.
            layout: Of the decoder's caches.
            eos_token_id: The token that ends an answer.
            max_positions: How many tokens the model can read.
            prefix_cache_bytes: Budget of the prefix cache.

        Raises:
            InvalidInputError: `max_batch_bytes` has no room for one sequence.
        """
        self._session = session
        self._layout = layout
        self._pool = KVCachePool(layout, session, copier)
        # In float32 a matmul of several rows broadcasts, for which ONNX Runtime copies pointers to the device.
        self._can_capture_rows = layout.dtype == "float16"
        self._decode_bindings: dict[tuple[object, ...], Binding] = {}
        self._graph_ids: dict[tuple[object, ...], int] = {}
        self.eos_token_id = eos_token_id
        self.max_positions = max_positions
        self.prefix_cache = PrefixCache(prefix_cache_bytes, layout)
        self.stats = EngineStats()
        columns = aligned(max_positions)
        least = 2 * max(2 * columns * layout.bytes_per_token, layout.heads * columns * columns * SCORE_BYTES)
        if self.limits.max_batch_bytes < least:
            raise InvalidInputError(
                f"got max_batch_bytes {self.limits.max_batch_bytes}; one prompt of the model's {max_positions} tokens "
                f"takes {least}. Pass at least that, or None"
            )

    @property
    def limits(self) -> Limits:
        """How much the provider computes at a time."""
        return self._session.limits

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether decode steps are captured in CUDA graphs."""
        return self._session.has_cuda_graphs

    @property
    def can_verify_drafts(self) -> bool:
        """Whether `decode_step` takes several tokens of a sequence."""
        return self._session.has_kernels

    @property
    def max_batch_tokens(self) -> int:
        """Maximum number of tokens whose keys and values a batch holds when prompts join it."""
        return min(self.limits.max_batch_tokens, self.limits.max_batch_bytes // 2 // self._layout.bytes_per_token)

    @property
    def max_row_scores(self) -> int:
        """Maximum of rows of a group x new tokens x columns that they attend to: half of `max_batch_bytes`."""
        return self.limits.max_batch_bytes // 2 // SCORE_BYTES // self._layout.heads

    def prefill(self, groups: SequenceOf[Group], *, carried: Batch | None = None) -> tuple[Batch, Predictions]:
        """Computes the prompts of some groups: each prefix once, then all suffixes.

        Args:
            groups: From `plan_groups`.
            carried: A running batch to continue with; its sequences follow the new ones. It is of no use afterwards.
                Where an error is raised, it is as it was.

        Returns:
            The batch, and what the model says of the first token of each new sequence.

        Raises:
            OutOfMemoryError: The device has not enough memory for the batch.
        """
        # Prefixes to compute come first, each once, so that their caches are one range of groups.
        hits: dict[tuple[int, ...], KVCache] = {}
        first_with: dict[tuple[int, ...], Group] = {}
        for group in groups:
            if group.prefix_ids and group.prefix_ids not in hits and group.prefix_ids not in first_with:
                found = self.prefix_cache.lookup(group.prefix_ids)
                if found is None:
                    first_with[group.prefix_ids] = group
                else:
                    hits[group.prefix_ids] = found
        to_compute = sorted(first_with.values(), key=lambda group: -len(group.prefix_ids))  # similar lengths together
        groups = to_compute + [group for group in groups if first_with.get(group.prefix_ids) is not group]
        place_of = {group.prefix_ids: place for place, group in enumerate(to_compute)}
        batch = make_batch(groups, carried, pool=self._pool, limits=self.limits)
        try:
            self._prefill_prefixes(batch, len(to_compute))
            for place, group in enumerate(groups[len(to_compute) :], len(to_compute)):
                if group.prefix_ids in hits:
                    self._pool.copy(hits[group.prefix_ids], [0], batch.prefix, place)
                elif group.prefix_ids:
                    self._pool.copy(batch.prefix, [place_of[group.prefix_ids]], batch.prefix, place)
            predictions = self._prefill_suffixes(batch, groups)
            taken = Counter(group.prefix_ids for group in groups for _ in group.sequences)
            for prefix_ids, place in place_of.items():
                if self.prefix_cache.wants(prefix_ids, taken=taken[prefix_ids]):
                    self._insert_prefix(batch, place, prefix_ids)
        except BaseException:
            self.release(batch)
            raise
        if carried is not None:
            self.release(carried)
        self.stats.prefills += 1
        return batch, predictions

    def decode_step(
        self,
        batch: Batch,
        token_ids: SequenceOf[int] | np.ndarray,
        drafts: SequenceOf[SequenceOf[int]] | None = None,
    ) -> Predictions:
        """Appends one token to each running sequence (int [B]) and computes what the model says of the next.

        Args:
            batch: With its sequences.
            token_ids: The last token of each sequence.
            drafts: Tokens that may come after it, of each sequence. They are computed, too, if `can_verify_drafts`, but
                not appended: `append_drafts` does that.

        Returns:
            Of each sequence what the model says after its token, and after each token of its draft, one behind the
            other.

        Raises:
            OutOfMemoryError: The device has not enough memory for more columns.
        """
        drafts = drafts or [[]] * len(batch.sequences)
        lengths = np.array([1 + len(draft) for draft in drafts])
        if (batch.write_columns + lengths).max() > batch.suffix.columns:
            self._grow(batch)
        # Tokens of slots that are computed, and where they are: the running sequences, or all slots.
        group, row, place = batch.groups, batch.rows, np.arange(len(batch.sequences))
        if self.limits.fixed_shapes:
            group, row = np.divmod(np.arange(batch.suffix.groups * batch.suffix.rows), batch.suffix.rows)
            place = batch.groups * batch.suffix.rows + batch.rows
        inputs = {"prefix_lengths": batch.prefix_lengths, "suffix_starts": batch.suffix_starts}
        if self._session.has_kernels:
            segments = [
                Segment(group=group[index], row=row[index], token_ids=[token, *draft], position=batch.positions[index])
                for index, (token, draft) in enumerate(zip(token_ids, drafts, strict=True))
            ]
            inputs |= segment_inputs(segments, batch.write_columns)
            inputs["output_index"] = np.arange(lengths.sum())
        else:
            inputs |= decode_grid_inputs(batch, token_ids, group, row, place, heads=self._layout.heads)
        outputs = self._outputs(batch.sequences)
        binding, graph_id = self._decode_binding(batch, outputs)
        predictions = self._run(binding, inputs, outputs, graph_id=graph_id)
        batch.advance(1)
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(batch.sequences)
        self.stats.draft_tokens += int(lengths.sum()) - len(batch.sequences)
        return predictions.select(place) if self.limits.fixed_shapes else predictions

    def append_drafts(self, batch: Batch, counts: SequenceOf[int]) -> None:
        """Appends the first tokens of the drafts of the last decode step, int [B], to their sequences."""
        batch.advance(np.array(counts))
        self.stats.decode_tokens += sum(counts)
        self.stats.accepted_draft_tokens += sum(counts)

    def release(self, batch: Batch) -> None:
        """Takes the memory of a batch back, which is of no use afterwards."""
        self._pool.give_back(batch.prefix)
        self._pool.give_back(batch.suffix)

    def release_memory(self) -> None:
        """Gives the device all memory back that no batch uses: free caches, and prefixes that nobody waits for."""
        self.prefix_cache.evict(0)
        self._pool.release()

    def _grow(self, batch: Batch) -> None:
        """Gives every row `column_step` more columns."""
        columns = batch.suffix.columns + self.limits.column_step
        suffix = self._pool.take(groups=batch.suffix.groups, rows=batch.suffix.rows, columns=columns)
        self._pool.copy(batch.suffix, range(batch.suffix.groups), suffix, 0)
        self._pool.give_back(batch.suffix)
        batch.suffix = suffix

    def _insert_prefix(self, batch: Batch, place: int, prefix_ids: tuple[int, ...]) -> None:
        """Copies a prefix that was just computed into the prefix cache."""
        entry = self._pool.make(groups=1, rows=1, columns=aligned(len(prefix_ids)))
        self._pool.copy(batch.prefix, [place], entry, 0)
        self.prefix_cache.insert(prefix_ids, entry)

    def _prefill_prefixes(self, batch: Batch, count: int) -> None:
        """Computes the keys and values of the first `count` prefixes of a batch."""
        segments = [
            [Segment(group=place, row=0, token_ids=ids, position=0)]
            for place, ids in enumerate(batch.prefix_ids[:count])
        ]
        for first, last in split_prefill(
            segments, rows=1, columns=batch.prefix.columns, heads=self._layout.heads, limits=self.limits
        ):
            groups = last - first
            columns = aligned(max(len(ids) for ids in batch.prefix_ids[first:last]))
            # Attention goes over all columns of its cache: shorter prefixes than the batch's get a narrower one.
            is_narrower = columns < batch.prefix.columns
            target = self._pool.take(groups=groups, rows=1, columns=columns) if is_narrower else batch.prefix
            self._run_segments(
                target,
                target,
                (0, groups) if is_narrower else (first, last),
                segments[first:last],
                outputs=(),
                is_prefix=True,
                prefix_lengths=np.zeros(groups, np.int64),
                suffix_starts=np.zeros((groups, 1), np.int64),
                write_index=np.zeros(groups, np.int64),
            )
            if is_narrower:
                self._pool.copy(target, range(groups), batch.prefix, first)
                self._pool.give_back(target)

    def _prefill_suffixes(self, batch: Batch, groups: SequenceOf[Group]) -> Predictions:
        """Computes the suffixes of the first groups of a batch, whose prefixes were computed."""
        segments = [
            [
                Segment(group=place, row=row, token_ids=sequence.suffix_ids, position=len(sequence.prefix_ids))
                for row, sequence in enumerate(group.sequences)
            ]
            for place, group in enumerate(groups)
        ]
        outputs = self._outputs([sequence for group in groups for sequence in group.sequences])
        predictions = []
        columns = batch.prefix.columns + batch.suffix.columns
        suffix_end = aligned(max(group.suffix_width for group in groups))
        for first, last in split_prefill(
            segments, rows=batch.suffix.rows, columns=columns, heads=self._layout.heads, limits=self.limits
        ):
            width = segment_width([segment for group in segments[first:last] for segment in group])
            predictions.append(
                self._run_segments(
                    batch.prefix,
                    batch.suffix,
                    (first, last),
                    segments[first:last],
                    outputs=outputs,
                    is_prefix=False,
                    prefix_lengths=batch.prefix_lengths[first:last],
                    suffix_starts=batch.suffix_starts[first:last],
                    write_index=np.full(last - first, suffix_end - width),
                )
            )
        return Predictions.concatenate(predictions)

    def _run_segments(
        self,
        prefix: KVCache,
        target: KVCache,
        groups: tuple[int, int],
        segments: SequenceOf[SequenceOf[Segment]],
        *,
        outputs: tuple[str, ...],
        is_prefix: bool,
        **lengths: np.ndarray,
    ) -> Predictions:
        """Computes segments of some groups of a batch into `target`."""
        lead = segments[0][0].group
        flat = [replace(segment, group=segment.group - lead) for group in segments for segment in group]
        if self._session.has_kernels:
            write_index, width = lengths.pop("write_index"), segment_width(flat)
            first_columns = [
                write_index[segment.group] + (0 if is_prefix else width - len(segment.token_ids)) for segment in flat
            ]
            inputs = segment_inputs(flat, np.array(first_columns))
        else:
            inputs = grid_inputs(
                flat,
                groups=groups[1] - groups[0],
                rows=target.rows,
                heads=self._layout.heads,
                right_aligned=not is_prefix,
            )
        binding = self._session.make_binding()
        self._bind_caches(binding, prefix, target, groups, has_prefix=not is_prefix)
        self.stats.prefill_tokens += len(inputs["input_ids"])
        return self._run(binding, {**inputs, **lengths}, outputs)

    def _bind_caches(
        self, binding: Binding, prefix: KVCache, target: KVCache, groups: tuple[int, int], *, has_prefix: bool = True
    ) -> None:
        """Binds some groups of a batch's caches; without prefixes, empty ones."""
        for name, view in zip(
            self._layout.names, prefix.views(*groups, columns=None if has_prefix else 0), strict=True
        ):
            binding.set_input(f"{PREFIX_NAME}{name}", view)
        for name, view in zip(self._layout.names, target.views(*groups), strict=True):
            binding.set_input(f"{PAST_NAME}{name}", view)
            binding.set_output(f"{PRESENT_NAME}{name}", view)

    def _decode_binding(self, batch: Batch, outputs: tuple[str, ...]) -> tuple[Binding, int | None]:
        """The binding of a batch's decode step, and the number of its CUDA graph.

        A captured graph keeps its binding, for it reads and writes at the addresses of its first run.
        """
        prefix, suffix = batch.prefix, batch.suffix
        addresses = prefix.memory.data_ptr(), suffix.memory.data_ptr()
        key = suffix.groups, suffix.rows, prefix.columns, suffix.columns, *addresses, outputs
        binding = self._decode_bindings.get(key)
        if binding is None:
            for other in [other for other in self._decode_bindings if other not in self._graph_ids]:
                del self._decode_bindings[other]
            binding = self._decode_bindings[key] = self._session.make_binding()
            self._bind_caches(binding, prefix, suffix, (0, suffix.groups))
            can_capture = self._session.has_cuda_graphs and (suffix.rows == 1 or self._can_capture_rows)
            if can_capture and len(self._graph_ids) < MAX_CUDA_GRAPHS:
                self._graph_ids[key] = len(self._graph_ids) + 1
                self.stats.cuda_graphs = len(self._graph_ids)
        return binding, self._graph_ids.get(key)

    def _outputs(self, sequences: SequenceOf[Sequence]) -> tuple[str, ...]:
        """What to fetch of the graph to choose the next tokens of some sequences."""
        if self.limits.chooses_on_host or any(sequence.needs_logprobs for sequence in sequences):
            return LOGPROBS
        return CHOICE

    def _run(
        self,
        binding: Binding,
        inputs: dict[str, np.ndarray],
        outputs: tuple[str, ...],
        *,
        graph_id: int | None = None,
    ) -> Predictions:
        for name, array in inputs.items():
            binding.set_array(name, array)
        binding.set_fetched(outputs, rows=len(inputs["output_index"]))
        fetched = binding.run(graph_id=graph_id)
        if "logprobs" in fetched:
            return Predictions.from_logprobs(fetched["logprobs"], self.eos_token_id)
        return Predictions(**{name: fetched[name][:, 0] for name in outputs}) if outputs else Predictions.empty()
