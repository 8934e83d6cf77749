"""The memory of step inputs: arrays that are filled, and tensors over them that a model reads.

Decode steps follow one another in the same shape, and then nothing is allocated.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagewire.kernels.ops import AttentionBatch

IntArray = npt.NDArray[np.int64]
SmallIntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """What one forward step reads besides weights and KV."""

    token_ids: Tensor  # int64 [num_tokens]
    attention: AttentionBatch
    # int64 [num_logits]: of each row that samples the last token, and those before its drafts
    logits_of: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How large the inputs of a step are."""

    num_rows: int
    num_tokens: int
    max_pages: int  # of a row
    num_logits: int
    page_size: int


class StepArrays:
    """The inputs of a step on the host, to be filled; as in StepInputs and AttentionBatch."""

    NAMES = (
        "token_ids",
        "logits_of",
        "positions",
        "slots",
        "cu_seqlens",
        "context_lens",
        "page_table",
    )

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        self._uploads: list[tuple[Tensor, Tensor]] = []  # from the host, to the device
        self._device = device
        self._uploaded: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.token_ids: IntArray = self._array(torch.int64, shape.num_tokens)
        self.positions: IntArray = self._array(torch.int64, shape.num_tokens)
        self.slots: IntArray = self._array(torch.int64, shape.num_tokens)
        self.logits_of: IntArray = self._array(torch.int64, shape.num_logits)
        self.cu_seqlens: SmallIntArray = self._array(torch.int32, shape.num_rows + 1)
        self.context_lens: SmallIntArray = self._array(torch.int32, shape.num_rows)
        self.page_table: SmallIntArray = self._array(torch.int32, shape.num_rows, shape.max_pages)
        self._inputs = StepInputs(
            token_ids=self._tensor(self.token_ids),
            attention=AttentionBatch(
                cu_seqlens=self._tensor(self.cu_seqlens),
                context_lens=self._tensor(self.context_lens),
                page_table=self._tensor(self.page_table),
                positions=self._tensor(self.positions),
                slots=self._tensor(self.slots),
                page_size=shape.page_size,
            ),
            logits_of=self._tensor(self.logits_of),
        )

    def inputs(self) -> StepInputs:
        """What the arrays hold now, as tensors on the device: a GPU is told to fetch it."""
        for host, device in self._uploads:
            device.copy_(host, non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()
        return self._inputs

    def wait(self) -> None:
        """Until the arrays may be filled again, since the device has fetched what they held."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def _array(self, dtype: torch.dtype, *shape: int) -> npt.NDArray[Any]:
        """Zeros, in memory that a GPU can fetch while the host goes on."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self._uploaded is not None).numpy()

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """The tensor on the device that will have what the array has."""
        host = torch.from_numpy(array)
        if self._device.type == "cpu":
            return host
        device = torch.empty_like(host, device=self._device)
        self._uploads.append((host, device))
        return device


class StepMemory:
    """Arrays for one step at a time: those of the last step again while the shape is the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shape: StepShape | None = None
        self._arrays: StepArrays | None = None

    def arrays(self, shape: StepShape) -> StepArrays:
        """To be filled completely, cu_seqlens[0] apart, which is 0.

        StepInputs that came from the arrays of earlier steps are void.
        """
        if self._arrays is None or shape != self._shape:
            self._shape, self._arrays = shape, StepArrays(shape, self._device)
        self._arrays.wait()
        return self._arrays
