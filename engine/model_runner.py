"""Runs one Batch: checks it, lays its rows out as tensors, calls the model, samples.

The only place where page tables and token ids of schedulers reach memory. What is out of range
raises before anything is written.
"""

from collections.abc import Iterable
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from pagewire.engine.batch import Batch, BatchRow, StepResult
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.models.llama import LlamaModel
from pagewire.engine.sampler import Sampler
from pagewire.kernels.ops import AttentionBatch
from pagewire.kv_transfer.layout import KVLayout


class ModelRunner:
    """A model with its KV cache. Not safe for use by two threads at a time."""

    def __init__(
        self, model: LlamaModel, kv_cache: KVCache, *, max_model_len: int, digest: bytes
    ) -> None:
        """`digest` identifies the model's files: see `model_digest`."""
        self.model = model
        self.kv_cache = kv_cache
        self.max_model_len = max_model_len
        self.digest = digest
        self._pages = kv_cache.pages
        self._sampler = Sampler()

    @property
    def layout(self) -> KVLayout:
        return self.kv_cache.layout

    @property
    def num_pages(self) -> int:
        return self.kv_cache.num_pages

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def execute(self, batch: Batch) -> StepResult:
        """Run a step and sample. Raises ValueError as `forward` does."""
        logits = self.forward(batch)
        sampled = [
            (index, row.sampling, row.output_position, row.history)
            for index, row in enumerate(batch.rows)
            if row.sampling
        ]
        if not sampled:
            return StepResult(tokens=((),) * len(batch.rows))
        indices, params, positions, histories = zip(*sampled, strict=True)
        result = self._sampler.sample(logits, params, positions, histories)
        tokens = iter(result.token_ids)
        return StepResult(
            tokens=tuple((next(tokens),) if row.sampling else () for row in batch.rows),
            logprobs={indices[index]: values for index, values in result.logprobs.items()},
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run a step, storing its KV.

        Returns float32 [num_sampled_rows, vocab_size]: the logits of the last token of each row
        that samples; the LM head is not computed for the others. Raises ValueError, before
        anything is written, for an empty row, a token id or page out of range, a page table that
        is too short and a position beyond max_model_len.
        """
        for row in batch.rows:
            self._check(row)
        token_ids = self._tensor(chain.from_iterable(row.token_ids for row in batch.rows))
        ends = accumulate(len(row.token_ids) for row in batch.rows)
        last = [end - 1 for end, row in zip(ends, batch.rows, strict=True) if row.sampling]
        attention = self._attention_batch(batch)
        return self.model.forward(token_ids, attention, self._pages, self._tensor(last))

    def _check(self, row: BatchRow) -> None:
        end = row.start + len(row.token_ids)
        if not row.token_ids or row.start < 0 or end > self.max_model_len:
            raise ValueError(
                f"request {row.request_id} runs positions {row.start} to {end}; "
                f"they must be at least one and lie below max_model_len, {self.max_model_len}"
            )
        if len(row.page_table) < self.layout.num_pages(end):
            raise ValueError(
                f"request {row.request_id} has {len(row.page_table)} pages for {end} tokens; "
                f"it needs {self.layout.num_pages(end)}"
            )
        self._check_range(row, "token id", row.token_ids, self.vocab_size)
        self._check_range(row, "page", row.page_table, self.num_pages)

    def _check_range(self, row: BatchRow, what: str, values: Iterable[int], limit: int) -> None:
        array = np.fromiter(values, dtype=np.int64)
        if array.min() < 0 or array.max() >= limit:
            raise ValueError(
                f"request {row.request_id} has {what}s from {array.min()} to {array.max()}; "
                f"they must be 0 to {limit - 1}"
            )

    def _attention_batch(self, batch: Batch) -> AttentionBatch:
        page_size = self.layout.page_size
        contexts = [row.start + len(row.token_ids) for row in batch.rows]
        num_pages = [self.layout.num_pages(context) for context in contexts]
        page_table = np.zeros((len(batch.rows), max(num_pages, default=0)), dtype=np.int32)
        for index, row in enumerate(batch.rows):
            page_table[index, : num_pages[index]] = row.page_table[: num_pages[index]]
        query_lens = np.array([len(row.token_ids) for row in batch.rows], dtype=np.int64)
        rows = np.repeat(np.arange(len(batch.rows)), query_lens)
        positions = np.concatenate(
            [np.arange(row.start, end) for row, end in zip(batch.rows, contexts, strict=True)]
        )
        pages = page_table[rows, positions // page_size].astype(np.int64)
        device = self.model.device
        return AttentionBatch(
            cu_seqlens=torch.from_numpy(
                np.concatenate(([0], query_lens.cumsum())).astype(np.int32)
            ).to(device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            page_table=torch.from_numpy(page_table).to(device),
            positions=torch.from_numpy(positions).to(device),
            slots=torch.from_numpy(pages * page_size + positions % page_size).to(device),
            page_size=page_size,
        )

    def _tensor(self, values: Iterable[int]) -> Tensor:
        return torch.from_numpy(np.fromiter(values, dtype=np.int64)).to(self.model.device)
