"""Runs the forward steps of a model: decode steps from recordings where the operations make them.

A decode step has one token a row, and the same hundreds of operations as any other of so many rows.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.engine.decode_padding import bucket_of, padding
from pagewire.engine.models.llama import ForwardStep, LlamaModel
from pagewire.engine.models.rope import cosine_and_sine
from pagewire.engine.step_memory import StepInputs
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import (
    NO_SLOT,
    AttentionBatch,
    NotRecordableError,
    Recording,
    RenewablePlan,
    StepRecorder,
)

logger = logging.getLogger(__name__)


class ForwardSteps:
    """A model over one KV pool. Not safe for use by two threads at a time."""

    def __init__(self, model: LlamaModel, pool: KVPool, *, max_pages: int) -> None:
        """`max_pages`: of the longest sequence."""
        self._model = model
        self._pool = pool
        self._max_pages = max_pages
        # The sums of several ranks are no operations of ours, so recordings would leave them out.
        self._recorder = model.ops.recorder if model.group.size == 1 else None
        self._recorded: dict[int, _RecordedDecode] = {}  # by number of rows, with padding

    def warm_up(self, max_rows: int) -> None:
        """Record the steps of up to so many rows that can be recorded before there are any.

        The largest first: smaller ones then compute in its memory.
        """
        if self._recorder is None:
            return
        buckets = self._recorder.buckets
        largest = bucket_of(max_rows, buckets) or max(buckets)
        for size in reversed(buckets):
            if size <= largest and self._recorder is not None:
                self._record(size, self._padding(size))

    def run(self, inputs: StepInputs, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """The logits of a step, as `LlamaModel.forward`; void at the next step."""
        num_rows = len(inputs.attention.context_lens)
        is_decode = num_rows == len(inputs.token_ids) == len(inputs.logits_of)
        if is_decode and on_layer is None:
            recorded = self._find_recorded(inputs)
            if recorded is not None:
                return recorded.replay(inputs)
        return self._model.forward(
            inputs.token_ids, inputs.attention, self._pool, inputs.logits_of, on_layer
        )

    def _find_recorded(self, inputs: StepInputs) -> "_RecordedDecode | None":
        """What can replay a decode step; None where none can."""
        if self._recorder is None:
            return None
        num_rows, buckets = len(inputs.token_ids), self._recorder.buckets
        size = bucket_of(num_rows, buckets)
        if size is not None and size not in self._recorded:
            self._record(size, self._padding(size) if buckets else inputs)
        return None if size is None else self._recorded.get(size)

    def _record(self, size: int, like: StepInputs) -> None:
        """Record decode steps of `size` rows from one that is `like` them; none can be: no more."""
        assert self._recorder is not None, "who asks has looked"
        try:
            self._recorded[size] = _record(self._model, self._pool, like, self._recorder)
        except NotRecordableError as error:
            logger.info("decode steps run without recordings: %s", error)
            self._recorder = None

    def _padding(self, num_rows: int) -> StepInputs:
        return padding(
            num_rows,
            max_pages=self._max_pages,
            page_size=self._pool.values.shape[4],
            device=self._model.device,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Inputs:
    """What the recorded operations read, in memory that stays where it is."""

    residual: Tensor  # [num_rows, hidden_size]
    rope: tuple[Tensor, Tensor]  # float32 [num_rows, head_dim / 2] each
    slots: Tensor  # int64 [num_rows]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RecordedDecode:
    """Decode steps of one number of rows, or with rows of padding in it of fewer."""

    model: LlamaModel
    attention: RenewablePlan
    inputs: _Inputs
    recording: Recording

    def replay(self, inputs: StepInputs) -> Tensor:
        self.attention.renew(inputs.attention)
        _fill(self.inputs, self.model, inputs)
        return self.recording.replay()[: len(inputs.token_ids)]


def _record(
    model: LlamaModel, pool: KVPool, inputs: StepInputs, recorder: StepRecorder
) -> _RecordedDecode:
    """Raises NotRecordableError. Stores the KV of the step, perhaps in part."""
    batch = inputs.attention
    attention = recorder.plan_attention(
        batch, scale=model.attention_scale, window=model.config.sliding_window
    )
    fixed = _inputs_like(model, inputs.token_ids, batch)
    step = ForwardStep(attention=attention, rope=fixed.rope, pool=pool, slots=fixed.slots)
    _fill(fixed, model, inputs)
    # A first run prepares what a recording may not do, the plan of attention among it.
    model.logits(fixed.residual, step, None)
    return _RecordedDecode(
        model=model,
        attention=attention,
        inputs=fixed,
        recording=recorder.record(lambda: model.logits(fixed.residual, step, None)),
    )


def _inputs_like(model: LlamaModel, token_ids: Tensor, batch: AttentionBatch) -> _Inputs:
    return _Inputs(
        residual=model.embedding[token_ids],
        rope=cosine_and_sine(batch.positions, model.inverse_frequencies),
        slots=torch.empty_like(batch.slots),
    )


def _fill(fixed: _Inputs, model: LlamaModel, inputs: StepInputs) -> None:
    num_rows = len(inputs.token_ids)
    torch.index_select(model.embedding, 0, inputs.token_ids, out=fixed.residual[:num_rows])
    rope = cosine_and_sine(inputs.attention.positions, model.inverse_frequencies)
    for to, values in zip(fixed.rope, rope, strict=True):
        to[:num_rows].copy_(values)
    fixed.slots[:num_rows].copy_(inputs.attention.slots)
    if num_rows < len(fixed.slots):  # padding; angles of other positions do no harm there
        fixed.residual[num_rows:].zero_()
        fixed.slots[num_rows:].fill_(NO_SLOT)
