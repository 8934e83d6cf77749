"""Runs one Batch: lays its rows out as tensors, calls the model, samples."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pagewire.engine.batch import Batch, BatchRow, StepResult, TokenLogprobs
from pagewire.engine.forward_steps import ForwardSteps
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.models.llama import LlamaModel
from pagewire.engine.sampler import SampledTokens, Sampler
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.speculative import num_accepted
from pagewire.engine.step_inputs import InputLimits, prepare
from pagewire.engine.step_memory import StepMemory
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
        self._steps = ForwardSteps(model, kv_cache.pages)
        self._step_memory = StepMemory(torch.device(model.device))
        self._limits = InputLimits(
            vocab_size=model.config.vocab_size,
            num_pages=kv_cache.num_pages,
            page_size=kv_cache.layout.page_size,
            max_model_len=max_model_len,
        )
        self._sampler = Sampler(model.ops)

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
        """Copy pages, run a step and sample. Raises ValueError as `forward` does."""
        self.kv_cache.copy_pages(batch.copies)
        logits = self.forward(batch)
        sampled = [
            (params, row.output_position + index, row.history)
            for row in batch.rows
            if row.sampling
            for index, params in _samples(row, row.sampling)
        ]
        if not sampled:
            return StepResult(tokens=((),) * len(batch.rows))
        params, positions, histories = zip(*sampled, strict=True)
        logits = _for_siblings(logits, batch.rows)
        return _by_row(batch, self._sampler.sample(logits, params, positions, histories))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run a step, storing its KV.

        Returns float32 [num_logits, vocab_size]: of each row that samples the logits of the last
        token and of those before its drafts; the LM head is not computed for the others. They are
        void at the next step. Raises ValueError as `prepare` does, before anything is written.
        """
        inputs = prepare(batch.rows, self._limits, self._step_memory)
        return self._steps.run(inputs)


def _samples(row: BatchRow, sampling: SamplingParams) -> Iterator[tuple[int, SamplingParams]]:
    """(place behind the row's output position, parameters) of every token that a row samples."""
    for index in range(row.num_drafts + 1):
        yield index, sampling
    for sibling in row.siblings:
        yield 0, sibling


def _for_siblings(logits: Tensor, rows: Sequence[BatchRow]) -> Tensor:
    """The logits [num_logits, vocab_size] once for each token that is sampled from them."""
    if not any(row.siblings for row in rows):
        return logits
    counts = [
        1 + len(row.siblings) for row in rows if row.sampling for _ in range(row.num_drafts + 1)
    ]
    return logits.repeat_interleave(torch.tensor(counts, device=logits.device), dim=0)


def _by_row(batch: Batch, sampled: SampledTokens) -> StepResult:
    """The sampled tokens of each row, up to the first that is not the draft in its place.

    Those of siblings, who have no drafts, are all kept.
    """
    tokens: list[tuple[int, ...]] = []
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    start = 0
    for index, row in enumerate(batch.rows):
        if not row.sampling:
            tokens.append(())
            continue
        mine = sampled.token_ids[start : start + row.num_samples]
        drafts = row.token_ids[len(row.token_ids) - row.num_drafts :]
        kept = num_accepted(drafts, mine) + 1 + len(row.siblings)
        tokens.append(tuple(mine[:kept]))
        if row.sampling.num_logprobs is not None:
            logprobs[index] = tuple(sampled.logprobs[start + i][0] for i in range(kept))
        start += row.num_samples
    return StepResult(tokens=tuple(tokens), logprobs=logprobs)
