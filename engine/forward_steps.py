"""Runs the forward steps of a model, those of few tokens from recordings.

A decode step makes the same hundreds of operations as any other of so many tokens. How its tokens
are divided among rows is known to attention alone, whose plan is renewed for every step; so steps
that check drafts are recorded too, where a recording needs no rows of padding.
"""

import logging
from collections.abc import Callable, Iterator
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
    NotRecordableError,
    Recording,
    RenewablePlan,
    StepRecorder,
)

logger = logging.getLogger(__name__)


_MAX_TOKENS = 64  # of a step recorded as it is: in longer ones Python takes little of the time


class ForwardSteps:
    """A model over one KV pool. Not safe for use by two threads at a time."""

    def __init__(self, model: LlamaModel, pool: KVPool, *, max_pages: int) -> None:
        """`max_pages`: of the longest sequence."""
        self._model = model
        self._pool = pool
        self._max_pages = max_pages
        # The sums of several ranks are no operations of ours: not every recording has them.
        self._recorder = model.ops.recorder if model.group.is_recordable else None
        self._recorded: dict[int, _RecordedStep] = {}  # by number of tokens, those of padding too
        self.between_layers: Callable[[], None] | None = None

    def warm_up(self, max_rows: int) -> Iterator[tuple[StepRecorder, Tensor]]:
        """Record the steps of up to so many rows that can be recorded before there are any.

        The largest first: smaller ones then compute in its memory. Yields, after each, what
        recorded it and where its logits always lie, [its number of rows, vocab_size].
        """
        buckets = self._recorder.buckets if self._recorder else ()
        largest = bucket_of(max_rows, buckets) or max(buckets, default=0)
        for size in reversed(buckets):
            if size <= largest and self._recorder is not None:
                logits = self._record(self._padding(size), self._recorder)
                if logits is not None:
                    yield self._recorder, logits

    def close(self) -> None:
        """Let go of all recordings: a group of ranks, at its end, waits for those of its calls."""
        self._recorded.clear()

    def run(self, inputs: StepInputs, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """The logits of a step, as `LlamaModel.forward`; void at the next step."""
        size = self._recordable_size(inputs) if on_layer is None else None
        if size is not None and size not in self._recorded and self._recorder is not None:
            if not self._recorder.buckets:
                output = self._record(inputs, self._recorder)
                if output is not None:
                    return output
            else:
                self._record(self._padding(size), self._recorder)
        if size is not None and size in self._recorded:
            return self._recorded[size].replay(inputs)
        return self._model.forward(
            inputs.token_ids,
            inputs.attention,
            self._pool,
            inputs.logits_of,
            _one_after_the_other(on_layer, self.between_layers),
        )

    def _recordable_size(self, inputs: StepInputs) -> int | None:
        """How many tokens a recording has that can serve a step; None where there can be none."""
        num_tokens = len(inputs.token_ids)
        if self._recorder is None or len(inputs.logits_of) != num_tokens:
            return None
        buckets = self._recorder.buckets
        if not buckets:
            return num_tokens if num_tokens <= _MAX_TOKENS else None
        is_decode = num_tokens == len(inputs.attention.context_lens)
        return bucket_of(num_tokens, buckets) if is_decode else None

    def _record(self, inputs: StepInputs, recorder: StepRecorder) -> Tensor | None:
        """Record a step, which stores its KV; where its logits will be, None if it cannot be."""
        model = self._model
        attention = recorder.plan_attention(
            inputs.attention, scale=model.attention_scale, window=model.config.sliding_window
        )
        fixed = _FixedInputs.like(inputs, model)
        step = ForwardStep(attention=attention, rope=fixed.rope, pool=self._pool, slots=fixed.slots)
        if not attention.has_run:  # a first run prepares what a recording may not do
            model.logits(fixed.residual.clone(), step, None)
        try:
            recording = recorder.record(lambda: model.logits(fixed.residual, step, None))
        except NotRecordableError as error:
            logger.info("decode steps run without recordings: %s", error)
            self._recorder = None
            return None
        self._recorded[len(inputs.token_ids)] = _RecordedStep(
            model=model, attention=attention, inputs=fixed, recording=recording
        )
        return recording.output

    def _padding(self, num_rows: int) -> StepInputs:
        return padding(
            num_rows,
            max_pages=self._max_pages,
            page_size=self._pool.values.shape[4],
            device=self._model.device,
        )


def _one_after_the_other(
    on_layer: Callable[[int], None] | None, between_layers: Callable[[], None] | None
) -> Callable[[int], None] | None:
    if on_layer is None or between_layers is None:
        return on_layer or (None if between_layers is None else lambda _: between_layers())

    def both(num_layers: int) -> None:
        on_layer(num_layers)
        between_layers()

    return both


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
        """Take the inputs of another step with as many tokens, or with fewer and padding."""
        num_tokens = len(inputs.token_ids)
        torch.index_select(model.embedding, 0, inputs.token_ids, out=self.residual[:num_tokens])
        rope = cosine_and_sine(inputs.attention.positions, model.inverse_frequencies)
        for to, values in zip(self.rope, rope, strict=True):
            to[:num_tokens].copy_(values)
        self.slots[:num_tokens].copy_(inputs.attention.slots)
        if num_tokens < len(self.slots):  # angles of other positions do no harm in padding
            self.residual[num_tokens:].zero_()
            self.slots[num_tokens:].fill_(NO_SLOT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RecordedStep:
    """The steps of one number of tokens, or of fewer with padding."""

    model: LlamaModel
    attention: RenewablePlan
    inputs: _FixedInputs
    recording: Recording

    def replay(self, inputs: StepInputs) -> Tensor:
        self.attention.renew(inputs.attention)
        self.inputs.fill(self.model, inputs)
        return self.recording.replay()[: len(inputs.token_ids)]
