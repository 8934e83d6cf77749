"""The second half of a decoder layer: one gated network for all tokens, or a mixture of experts."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagewire.kernels.experts import Experts, route
from pagewire.kernels.linear import floating
from pagewire.kernels.ops import Activation, Linear, Ops


class FeedForward(Protocol):
    """What a layer does to each token by itself."""

    @property
    def takes_quantized(self) -> bool:
        """Whether it wants a QuantizedActivation, which the norm before it then makes."""

    @property
    def num_bytes(self) -> int:
        """Memory that its matrices take."""

    def __call__(self, x: Activation) -> Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape in the model's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseFeedForward:
    """down(silu(gate(x)) * up(x)), as SwiGLU has it (Shazeer, 2020)."""

    gate_up: Linear  # outputs gate, then up
    down: Linear
    ops: Ops

    @property
    def takes_quantized(self) -> bool:
        return self.gate_up.takes_quantized

    @property
    def num_bytes(self) -> int:
        return self.gate_up.num_bytes + self.down.num_bytes

    def __call__(self, x: Activation) -> Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x), quantize=self.down.takes_quantized))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedExpert:
    """An expert that every token goes through, weighted by a gate of its own (Qwen2-MoE)."""

    gate: Linear  # one output
    network: DenseFeedForward

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.network.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape and dtype."""
        network = self.network
        out = network(network.ops.quantize(x) if network.takes_quantized else x)
        score = self.gate(x).float()  # [num_tokens, 1]
        # The sigmoid of the score. torch's own rounds the last few numbers of a tensor otherwise
        # than the rest, and so would depend on the number of tokens.
        weight = torch.cat((score, torch.zeros_like(score)), dim=1).softmax(dim=1)[:, :1]
        return (out * weight).to(out.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureOfExperts:
    """Each token through the few experts that a router finds for it.

    The router is a matrix in floating point: rounding its input could choose other experts.
    """

    router: Linear  # outputs a score for each expert
    experts: Experts
    shared: SharedExpert | None
    experts_per_token: int
    renormalize: bool  # the weights of a token's experts sum to 1
    ops: Ops

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        shared = 0 if self.shared is None else self.shared.num_bytes
        return self.router.num_bytes + self.experts.num_bytes + shared

    def __call__(self, x: Activation) -> Tensor:
        x = floating(x)
        routing = route(self.router(x), self.experts_per_token, renormalize=self.renormalize)
        out = self.experts(self.ops.quantize(x) if self.experts.takes_quantized else x, routing)
        return out if self.shared is None else out + self.shared(x)
