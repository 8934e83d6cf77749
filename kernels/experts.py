"""The seam of a mixture of experts: which experts tokens go to, and what runs those experts.

Only the matrices of the chosen experts are multiplied with a token, so what is fast depends on the
device: one matrix after another on a CPU, one grouped product on a GPU.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pagewire.kernels.ops import Activation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """The experts of each token, and what the output of each counts."""

    experts: Tensor  # int64 [num_tokens, top_k], different ones
    weights: Tensor  # float32 [num_tokens, top_k]


class Experts(Protocol):
    """The gated feed-forward networks of one layer, stored as their implementation wants them."""

    @property
    def takes_quantized(self) -> bool:
        """Whether it wants a QuantizedActivation."""

    @property
    def num_bytes(self) -> int:
        """Memory that all matrices take."""

    def __call__(self, x: Activation, routing: Routing) -> Tensor:
        """The weighted sum of what the experts of each token make of it.

        An expert computes down(silu(gate(x)) * up(x)). x: [num_tokens, hidden_size]; returns the
        same shape in the model's dtype. Raises TypeError for the kind of activation that it does
        not take.
        """


def route(scores: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    """Choose the `top_k` experts with the highest probability for each token.

    scores: [num_tokens, num_experts], of which probabilities are the softmax. With `renormalize`
    the weights of a token sum to 1 (Jiang et al., "Mixtral of Experts", 2024), otherwise they are
    the probabilities among all experts (Shazeer et al., "Outrageously Large Neural Networks",
    2017).
    """
    scores = scores.float()
    if renormalize:  # dividing probabilities by their sum is the softmax over the chosen ones
        chosen, experts = scores.topk(top_k, dim=-1)
        return Routing(experts=experts, weights=chosen.softmax(dim=-1))
    weights, experts = scores.softmax(dim=-1).topk(top_k, dim=-1)
    return Routing(experts=experts, weights=weights)


def weighted_sum(outputs: Tensor, weights: Tensor) -> Tensor:
    """What the experts of each token made of it, added up: [num_tokens, hidden_size].

    outputs: [num_tokens, top_k, hidden_size]; weights: float32 [num_tokens, top_k]. Adds one expert
    after another in float32: the order of a reduction would depend on the number of tokens.
    """
    weighted = outputs * weights[..., None]
    total = weighted[:, 0]
    for rank in range(1, weighted.shape[1]):
        total = total + weighted[:, rank]
    return total.to(outputs.dtype)
