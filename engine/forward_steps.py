"""Runs the forward steps of a model, those of few tokens from recordings.

A decode step makes the same hundreds of operations as any other of so many tokens. How its tokens
are divided among rows is known to attention alone, whose plan is renewed for every step; so steps
that check drafts are recorded too.
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
    AttentionPlan,
    NotRecordableError,
    Recording,
    RenewablePlan,
    StepRecorder,
)

logger = logging.getLogger(__name__)


_MAX_TOKENS = 64  # of a recorded step: in longer ones Python takes a small part of the time


class ForwardSteps:
    """A model over one KV pool. Not safe for use by two threads at a time."""

    def __init__(self, model: LlamaModel, pool: KVPool) -> None:
        self._model = model
        self._pool = pool
        # The sums of several ranks are no operations of ours, so recordings would leave them out.
        self._recorder = model.ops.recorder if model.group.size == 1 else None
        self._attention: RenewablePlan | None = None  # of all recorded steps
        self._recorded: dict[int, _RecordedStep] = {}  # by number of tokens

    def run(self, inputs: StepInputs, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """The logits of a step, as `LlamaModel.forward`; void at the next step."""
        num_tokens = len(inputs.token_ids)
        has_all_logits = len(inputs.logits_of) == num_tokens
        if (
            self._recorder is None
            or not has_all_logits
            or num_tokens > _MAX_TOKENS
            or on_layer is not None
        ):
            return self._eager(inputs, on_layer)
        attention = self._attention
        if attention is None:
            attention = self._attention = self._recorder.plan_attention(
                inputs.attention,
                scale=self._model.attention_scale,
                window=self._model.config.sliding_window,
            )
            return self._first(inputs, attention)
        attention.renew(inputs.attention)
        recorded = self._recorded.get(num_tokens)
        if recorded is not None:
            recorded.inputs.fill(self._model, inputs)
            return recorded.recording.replay()
        return self._record(inputs, attention, self._recorder)

    def _eager(self, inputs: StepInputs, on_layer: Callable[[int], None] | None = None) -> Tensor:
        return self._model.forward(
            inputs.token_ids, inputs.attention, self._pool, inputs.logits_of, on_layer
        )

    def _first(self, inputs: StepInputs, attention: AttentionPlan) -> Tensor:
        """A first run of the plan, which prepares it: no recording would do that again."""
        fixed = _FixedInputs.like(inputs, self._model)
        return self._model.logits(fixed.residual, self._step(fixed, attention), None)

    def _record(
        self, inputs: StepInputs, attention: AttentionPlan, recorder: StepRecorder
    ) -> Tensor:
        """Run a step, and record it for those that follow."""
        fixed = _FixedInputs.like(inputs, self._model)
        step = self._step(fixed, attention)
        try:
            recording = recorder.record(lambda: self._model.logits(fixed.residual, step, None))
        except NotRecordableError as error:
            logger.info("decode steps run without recordings: %s", error)
            self._recorder = None
            return self._eager(inputs)
        self._recorded[len(inputs.token_ids)] = _RecordedStep(inputs=fixed, recording=recording)
        return recording.output

    def _step(self, fixed: "_FixedInputs", attention: AttentionPlan) -> ForwardStep:
        return ForwardStep(attention=attention, rope=fixed.rope, pool=self._pool, slots=fixed.slots)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _FixedInputs:
    """What recorded operations read besides weights and KV, in memory that stays where it is."""

    residual: Tensor  # [num_tokens, hidden_size]
    rope: tuple[Tensor, Tensor]  # float32 [num_tokens, head_dim / 2] each
    slots: Tensor  # int64 [num_tokens]

    @classmethod
    def like(cls, inputs: StepInputs, model: LlamaModel) -> "_FixedInputs":
        """Memory of their own that holds the inputs of a step."""
        batch = inputs.attention
        return cls(
            residual=model.embedding[inputs.token_ids],
            rope=cosine_and_sine(batch.positions, model.inverse_frequencies),
            slots=batch.slots.clone(),
        )

    def fill(self, model: LlamaModel, inputs: StepInputs) -> None:
        """Take the inputs of another step with as many tokens."""
        torch.index_select(model.embedding, 0, inputs.token_ids, out=self.residual)
        rope = cosine_and_sine(inputs.attention.positions, model.inverse_frequencies)
        for to, values in zip(self.rope, rope, strict=True):
            to.copy_(values)
        self.slots.copy_(inputs.attention.slots)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RecordedStep:
    """The steps of one number of tokens."""

    inputs: _FixedInputs
    recording: Recording
