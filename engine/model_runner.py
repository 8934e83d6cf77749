"""Runs one Batch: lays its rows out as tensors, calls the model, samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pagewire.engine.batch import Batch, BatchRow, OnLayersDone, PageCopy, StepResult
from pagewire.engine.forward_steps import ForwardSteps
from pagewire.engine.host_copies import to_device, wait_for
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.launched_step import LaunchedStep
from pagewire.engine.models.llama import LlamaModel
from pagewire.engine.parallel.rank_group import RankLost
from pagewire.engine.parallel.tensor_parallel import Followers
from pagewire.engine.sampler import Sampler
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.step_inputs import InputLimits, prepare
from pagewire.engine.step_memory import StepArrays, StepInputs, StepMemory
from pagewire.engine.token_feed import feed
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
        self._followers.warm_up(max_batch_size)
        for recorder, logits in self._steps.warm_up(max_batch_size):
            if self.model.group.rank == 0:  # others have a part of the logits, and sample nothing
                self._sampler.record(recorder, logits)

    def close(self) -> None:
        """Let go of what was recorded, once no step runs any more."""
        self._steps.close()

    def warm_up_prompts(self, max_tokens: int) -> None:
        """Run prompts of up to so many tokens, so that no request waits for a GPU's compiler.

        Of several lengths: which kernels a prompt runs depends on its number of tokens. They
        overwrite page 0, which nobody owns before there are requests.
        """
        sampling = SamplingParams(temperature=1.0, top_k=1)
        most = min(max_tokens, self.max_model_len)
        for doublings in range(1, max(1, (most - 1).bit_length()) + 1):
            token_ids = [0] * min(2**doublings, most)
            row = BatchRow(
                request_id="warm-up",
                token_ids=token_ids,
                start=0,
                page_table=[0] * self.layout.num_pages(len(token_ids)),
                sampling=sampling,
            )
            self.launch(Batch(rows=(row,))).wait()

    def execute(self, batch: Batch, on_layers_done: OnLayersDone | None = None) -> StepResult:
        """As `launch`, and wait for what was sampled. Raises LogitsError too, a ValueError."""
        return self.launch(batch, on_layers_done).wait()

    @torch.inference_mode()
    def launch(
        self,
        batch: Batch,
        on_layers_done: OnLayersDone | None = None,
        *,
        previous: LaunchedStep | None = None,
    ) -> LaunchedStep:
        """Copy pages, run a step and sample; a GPU is told to, and nobody waits for it.

        Rows may follow those of `previous`, the step launched before. `on_layers_done` is called in
        this thread at the `layer_group_ends` of the batch, for memory that this thread writes: what
        a GPU was told to compute may not be there yet. Raises ValueError and RankLost as `forward`
        does, once nothing of the step runs any more: its pages may get other owners then.
        """
        try:
            return self._launch(batch, on_layers_done, previous)
        except (RuntimeError, ValueError, IndexError):  # what torch and our checks raise
            wait_for(torch.device(self.model.device))
            raise

    def _launch(
        self, batch: Batch, on_layers_done: OnLayersDone | None, previous: LaunchedStep | None
    ) -> LaunchedStep:
        if batch.copies:
            self._followers.copy_pages(batch.copies)
            self.copy_pages(batch.copies)
        arrays = prepare(batch.rows, self._limits, self._step_memory)
        inputs = arrays.inputs()
        unread = feed(batch.rows, inputs.token_ids, previous)
        if unread is not None:
            inputs = replace(inputs, token_ids=unread.tokens)
        logits = self._forward(arrays, inputs, batch, on_layers_done, unread is not None)
        sampled = [
            (params, row.output_position + index, row.history)
            for row in batch.rows
            if row.sampling
            for index, params in _samples(row, row.sampling)
        ]
        if not sampled:
            return LaunchedStep(batch=batch, sampled=None)
        params, positions, histories = zip(*sampled, strict=True)
        logits = _for_siblings(logits, batch.rows)
        tokens = self._sampler.launch(logits, params, positions, histories, unread)
        return LaunchedStep(batch=batch, sampled=tokens)

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
        arrays = prepare(batch.rows, self._limits, self._step_memory)
        return self._forward(arrays, arrays.inputs(), batch, on_layers_done)

    def _forward(
        self,
        arrays: StepArrays,
        inputs: StepInputs,
        batch: Batch,
        on_layers_done: OnLayersDone | None,
        is_fed: bool = False,
    ) -> Tensor:
        """`arrays`: those of the inputs, for other ranks. `is_fed`: see `run`."""
        on_layer = _at_ends(batch.layer_group_ends, on_layers_done)
        if self.model.group.size == 1:
            return self.run(inputs, on_layer)
        self._followers.run(arrays, by_layer=on_layer is not None, is_fed=is_fed)
        try:
            return self.run(inputs, on_layer, is_fed=is_fed)
        except (RuntimeError, ValueError, IndexError) as error:  # what torch and our checks raise
            raise RankLost(f"rank 0 failed within a step that others run: {error}") from error

    @torch.inference_mode()
    def run(
        self, inputs: StepInputs, on_layer: OnLayersDone | None = None, *, is_fed: bool = False
    ) -> Tensor:
        """This rank's part of a step; returns what the model's `forward` returns.

        `is_fed`: the tokens come from the step before, which rank 0 alone has sampled; other ranks
        get them from its device.
        """
        if is_fed:
            inputs = replace(inputs, token_ids=self.model.group.broadcast(inputs.token_ids))
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
    repeats = to_device(np.array(counts), logits.device)
    return logits.repeat_interleave(repeats, dim=0, output_size=sum(counts))
