"""Runs the forward steps of a model: decode steps from recordings where the operations make them.

A decode step has one token a row, and the same hundreds of operations as any other of so many rows.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.engine.models.llama import ForwardStep, LlamaModel
from pagewire.engine.models.rope import cosine_and_sine
from pagewire.engine.step_memory import StepInputs
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import (
    AttentionBatch,
    NotRecordableError,
    Recording,
    RenewablePlan,
    StepRecorder,
)

logger = logging.getLogger(__name__)


class ForwardSteps:
    """A model over one KV pool. Not safe for use by two threads at a time."""

    def __init__(self, model: LlamaModel, pool: KVPool) -> None:
        self._model = model
        self._pool = pool
        # The sums of several ranks are no operations of ours, so recordings would leave them out.
        self._recorder = model.ops.recorder if model.group.size == 1 else None
        self._recorded: dict[int, _RecordedDecode] = {}  # by number of rows

    def run(self, inputs: StepInputs, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """The logits of a step, as `LlamaModel.forward`; void at the next step."""
        num_rows = len(inputs.attention.context_lens)
        is_decode = num_rows == len(inputs.token_ids) == len(inputs.logits_of)
        if self._recorder is None or not is_decode or on_layer is not None:
            return self._model.forward(
                inputs.token_ids, inputs.attention, self._pool, inputs.logits_of, on_layer
            )
        recorded = self._recorded.get(num_rows)
        if recorded is not None:
            return recorded.replay(inputs)
        return self._record(inputs, self._recorder)

    def _record(self, inputs: StepInputs, recorder: StepRecorder) -> Tensor:
        """Run a decode step, and record it for those that follow."""
        try:
            recorded = _record(self._model, self._pool, inputs, recorder)
        except NotRecordableError as error:
            logger.info("decode steps run without recordings: %s", error)
            self._recorder = None
            return self.run(inputs)
        self._recorded[len(inputs.token_ids)] = recorded
        return recorded.replay(inputs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Inputs:
    """What the recorded operations read, in memory that stays where it is."""

    residual: Tensor  # [num_rows, hidden_size]
    rope: tuple[Tensor, Tensor]  # float32 [num_rows, head_dim / 2] each
    slots: Tensor  # int64 [num_rows]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RecordedDecode:
    """Decode steps of one number of rows."""

    model: LlamaModel
    attention: RenewablePlan
    inputs: _Inputs
    recording: Recording

    def replay(self, inputs: StepInputs) -> Tensor:
        self.attention.renew(inputs.attention)
        _fill(self.inputs, self.model, inputs)
        return self.recording.replay()


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
    torch.index_select(model.embedding, 0, inputs.token_ids, out=fixed.residual)
    rope = cosine_and_sine(inputs.attention.positions, model.inverse_frequencies)
    for to, values in zip(fixed.rope, rope, strict=True):
        to.copy_(values)
    fixed.slots.copy_(inputs.attention.slots)
