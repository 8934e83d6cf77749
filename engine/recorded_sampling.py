"""The choice of tokens from the logits of recorded steps, recorded as well.

Its parameters lie in memory that stays where it is, so one recording serves every batch.
"""

import torch
from torch import Tensor

from pagewire.kernels.ops import Ops, Recording, SamplingRows, StepRecorder


class RecordedSamplingPlan:
    """Implements `pagewire.kernels.ops.SamplingPlan` for logits that always lie in one place.

    Rows behind those of a batch are padding: they are greedy, and what is chosen is thrown away.
    """

    def __init__(self, ops: Ops, recorder: StepRecorder, logits: Tensor) -> None:
        """logits: float32 [num_rows, vocab_size], what a recorded step leaves.

        Raises NotRecordableError.
        """
        num_rows, vocab_size = logits.shape
        self._rows = _greedy(num_rows, vocab_size, logits.device)
        self._uniform = torch.zeros(num_rows, dtype=torch.float64, device=logits.device)
        plan = ops.plan_sampling(self._rows)
        plan.run(logits, self._uniform)  # a first run prepares what a recording may not do
        self._recording: Recording = recorder.record(lambda: plan.run(logits, self._uniform))

    def renew(self, rows: SamplingRows) -> None:
        """Take the parameters of another batch, of at most as many rows."""
        for fixed, values, unused in (
            (self._rows.temperature, rows.temperature, 0.0),
            (self._rows.top_k, rows.top_k, rows.vocab_size),
            (self._rows.top_p, rows.top_p, 1.0),
            (self._rows.min_p, rows.min_p, 0.0),
        ):
            fixed[: len(values)].copy_(values)
            fixed[len(values) :].fill_(unused)

    def run(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """As `SamplingPlan.run`; `logits` are the first of those that the recording reads."""
        num_rows = len(logits)
        self._uniform[:num_rows].copy_(uniform)
        return self._recording.replay()[:num_rows]


def _greedy(num_rows: int, vocab_size: int, device: torch.device) -> SamplingRows:
    zeros = torch.zeros(num_rows, device=device)
    return SamplingRows(
        temperature=zeros,
        top_k=torch.full((num_rows,), vocab_size, device=device),
        top_p=torch.ones(num_rows, dtype=torch.float64, device=device),
        min_p=torch.zeros_like(zeros),
        vocab_size=vocab_size,
    )
