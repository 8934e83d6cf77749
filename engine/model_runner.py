"""Runs one Batch: lays its rows out as tensors, calls the model, samples."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pagewire.engine.batch import (
    Batch,
    BatchRow,
    OnLayersDone,
    PageCopy,
    StepResult,
    TokenLogprobs,
)
from pagewire.engine.forward_steps import ForwardSteps
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.models.llama import LlamaModel
from pagewire.engine.parallel.rank_group import RankLost
from pagewire.engine.parallel.tensor_parallel import Followers
from pagewire.engine.sampler import SampledTokens, Sampler
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.speculative import num_accepted
from pagewire.engine.step_inputs import InputLimits, prepare
from pagewire.engine.step_memory import StepInputs, StepMemory
from pagewire.kv_transfer.layout import KVLayout


class ModelRunner:
    """A model with its KV cache, or rank 0 of several. Not safe for use by two threads at a time.

    Followers learn of each step before it begins, and take part in it with pages of the same
    numbers. So when a step has ended here, its KV is stored on every rank.
    """

    def __init__(
        self,
        model: LlamaModel,
        kv_cache: KVCache,
        *,
        layout: KVLayout,
        followers: Followers,
        max_model_len: int,
        digest: bytes,
    ) -> None:
        """`layout` is that of a page with all KV heads, of which `kv_cache` has this rank's.

        `digest` identifies the model's files: see `model_digest`.
        """
        self.model = model
        self.layout = layout
        self.kv_cache = kv_cache
        self.max_model_len = max_model_len
        self.digest = digest
        self._followers = followers
        self._steps = ForwardSteps(model, kv_cache.pages, max_pages=layout.num_pages(max_model_len))
        self._step_memory = StepMemory(torch.device(model.device))
        self._limits = InputLimits(
            vocab_size=model.config.vocab_size,
            num_pages=kv_cache.num_pages,
            page_size=kv_cache.layout.page_size,
            max_model_len=max_model_len,
        )
        self._sampler = Sampler(model.ops)

    @property
    def num_pages(self) -> int:
        return self.kv_cache.num_pages

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def call_between_layers(self, function: Callable[[], None]) -> None:
        """From now on, in the thread that runs a step: not in recorded steps, which are short."""
        self._steps.between_layers = function

    @torch.inference_mode()
    def warm_up(self, max_batch_size: int) -> None:
        """Prepare what can be for decode steps of so many rows, so that no request waits for it."""
        self._steps.warm_up(max_batch_size)

    def execute(self, batch: Batch, on_layers_done: OnLayersDone | None = None) -> StepResult:
        """Copy pages, run a step and sample. Raises ValueError and RankLost as `forward` does.

        `on_layers_done` is called in this thread at the `layer_group_ends` of the batch, for memory
        that this thread writes: what a GPU was told to compute may not be there yet.
        """
        if batch.copies:
            self._followers.copy_pages(batch.copies)
            self.copy_pages(batch.copies)
        logits = self.forward(batch, on_layers_done)
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

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Make copies on this rank, and wait until all ranks have made theirs.

        From then on whoever reaches the pages of other ranks may write to the originals.
        """
        self.kv_cache.copy_pages(copies)
        self.model.group.barrier()

    @torch.inference_mode()
    def forward(self, batch: Batch, on_layers_done: OnLayersDone | None = None) -> Tensor:
        """Run a step, storing its KV.

        Returns float32 [num_logits, vocab_size]: of each row that samples the logits of the last
        token and of those before its drafts; the LM head is not computed for the others. They are
        void at the next step. Raises ValueError as `prepare` does, before anything is written, and
        RankLost once the ranks of the group are out of step.
        """
        inputs = prepare(batch.rows, self._limits, self._step_memory)
        on_layer = _at_ends(batch.layer_group_ends, on_layers_done)
        if self.model.group.size == 1:
            return self.run(inputs, on_layer)
        self._followers.run(inputs)
        try:
            return self.run(inputs, on_layer)
        except (RuntimeError, ValueError, IndexError) as error:  # what torch and our checks raise
            raise RankLost(f"rank 0 failed within a step that others run: {error}") from error

    @torch.inference_mode()
    def run(self, inputs: StepInputs, on_layer: OnLayersDone | None = None) -> Tensor:
        """This rank's part of a step; returns what the model's `forward` returns."""
        return self._steps.run(inputs, on_layer)


def _at_ends(ends: Sequence[int], on_layers_done: OnLayersDone | None) -> OnLayersDone | None:
    """What hears of every layer and passes on where a group of them ends; None: nobody listens."""
    if on_layers_done is None or not ends:
        return None

    def on_layer(num_layers: int) -> None:
        if num_layers in ends:
            on_layers_done(num_layers)

    return on_layer


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
