"""A mixture of experts on any device: tokens sorted by expert, and a matrix for each expert.

Every expert that has tokens reads its weights once a step, whatever stores them: the matrices are
of any kind of `Linear`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.experts import Routing, weighted_sum
from pagewire.kernels.ops import Activation, GroupedActivation, Linear, Ops, TokenActivation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SortedExperts:
    """Implements `pagewire.kernels.experts.Experts`.

    Where `Linear` and `Ops` give a row the same bits in every batch, this does too.
    """

    gate_up: tuple[Linear, ...]  # of each expert; outputs gate, then up
    down: tuple[Linear, ...]
    ops: Ops

    @property
    def takes_quantized(self) -> bool:
        return self.gate_up[0].takes_quantized

    @property
    def num_bytes(self) -> int:
        return sum(matrix.num_bytes for matrix in (*self.gate_up, *self.down))

    def __call__(self, x: Activation, routing: Routing) -> Tensor:
        num_tokens, top_k = routing.experts.shape
        by_expert = routing.experts.flatten().argsort(stable=True)  # [num_tokens * top_k]
        outputs = torch.cat(list(self._run(x, by_expert // top_k, routing.experts)))
        by_token = torch.empty_like(outputs)
        by_token[by_expert] = outputs
        return weighted_sum(by_token.view(num_tokens, top_k, -1), routing.weights)

    def _run(self, x: Activation, tokens: Tensor, experts: Tensor) -> Iterator[Tensor]:
        """What each expert makes of its tokens, [its tokens, hidden_size]; none without any.

        tokens: int64 [num_tokens * top_k], sorted by expert.
        """
        counts = torch.bincount(experts.flatten(), minlength=len(self.gate_up)).tolist()
        for gate_up, down, rows in zip(
            self.gate_up, self.down, torch.split(tokens, counts), strict=True
        ):
            if len(rows):
                gated = self.ops.silu_mul(gate_up(_rows(x, rows)), quantize=down.takes_quantized)
                yield down(gated)


def _rows(x: Activation, rows: Tensor) -> Activation:
    if isinstance(x, GroupedActivation):
        return GroupedActivation(groups=x.groups[rows], num_features=x.num_features)
    if isinstance(x, TokenActivation):
        return TokenActivation(values=x.values[rows], scales=x.scales[rows])
    return x[rows]
