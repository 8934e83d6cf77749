"""Which tokens of a step are computed with which LoRA adapter.

Adapters of one rank and one matrix are stored behind one another, and a segment is a run of tokens
that share one: many adapters in one launch (SGMV; Chen et al., Punica, 2023).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.gpu.arguments import require, require_array

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraSegments:
    """Segments of the tokens of a step, in their order.

    Raises KernelArgumentError for tensors that are not so.
    """

    starts: Tensor  # int32 [num_segments + 1], the first token of each; the last is the end
    adapters: Tensor  # int32 [num_segments], NO_ADAPTER for none
    max_tokens: int  # of a segment

    def __post_init__(self) -> None:
        require_array("adapters", self.adapters, (None,), torch.int32)
        wanted = (len(self.adapters) + 1,)
        require_array("starts", self.starts, wanted, torch.int32, device=self.adapters.device)
        require(self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; give at least 1")
