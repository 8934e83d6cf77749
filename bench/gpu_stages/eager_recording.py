"""The double of a CUDA graph: a recording that runs the very step again, on any device."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EagerRecording:
    """Implements `pagewire.kernels.ops.Recording`; like a graph's, its capture runs nothing."""

    step: Callable[[], Tensor]
    output: Tensor = field(default_factory=lambda: torch.empty(0))  # of no run

    def replay(self) -> Tensor:
        return self.step()


def capture(step: Callable[[], Tensor]) -> EagerRecording:
    return EagerRecording(step=step)
