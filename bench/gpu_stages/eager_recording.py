"""The double of a CUDA graph: a recording that runs the very step again, on any device."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EagerRecording:
    """Implements `pagewire.kernels.ops.Recording`: like a graph's, its results lie in one place."""

    step: Callable[[], Tensor]
    output: Tensor

    def replay(self) -> Tensor:
        return self.output.copy_(self.step())


def capture(step: Callable[[], Tensor]) -> EagerRecording:
    return EagerRecording(step=step, output=step())
