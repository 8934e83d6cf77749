"""The KV cache of a worker of several ranks with a device each, as frames see it: all KV heads.

Rank 0 reaches the pools of all, and copies between them and its host memory in a stream on each
device. Between equal pages these are copies alone, for copy engines. Pages of another size or dtype
are converted by kernels, which take turns with those of the rank: they are another process's.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagewire.engine.copy_stream import AllOf, Completion, CopyStream
from pagewire.engine.device_pages import DevicePages
from pagewire.engine.kv_cache import KVCache
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.kv_transfer.reshard import HeadSplit

Bytes = npt.NDArray[np.uint8]


class DeviceShards:
    """Copies parts of sequences between the pages of all ranks and the host memory of rank 0.

    For use by one thread. Both ends of a copy must be left alone until it is complete.
    """

    def __init__(
        self, layout: KVLayout, caches: Sequence[KVCache], copies: Sequence[CopyStream]
    ) -> None:
        """`layout` has all KV heads; `caches` and `copies`: by rank, each cache with the heads of
        its rank, and the stream of its device.

        Raises LayoutError when so many ranks cannot have these heads.
        """
        self.layout = layout
        split = HeadSplit(num_kv_heads=layout.num_kv_heads, degree=len(caches))
        self._ranks = [
            DevicePages(cache, stream, layout=layout, heads=split.heads(rank))
            for rank, (cache, stream) in enumerate(zip(caches, copies, strict=True))
        ]
        self._senders = self._ranks[:: split.num_replicas]

    def gather(
        self,
        part: FrameRange,
        page_table: tuple[int, ...],
        into: Tensor,
        after: Completion | None = None,
    ) -> Completion:
        """Begin to copy `part` of a sequence out of its pages, once `after` has come.

        `after` is a mark of the stream in which rank 0 computes, and holds for all ranks: behind
        a layer that rank 0 reports, it has a sum to which every rank contributes. In the stream of
        a rank its contribution to the sum of a layer is behind the KV that it stores for that
        layer. So when the sum is there on rank 0, the kernels that wrote this KV have ended on
        every device. into: uint8 [bytes of the part], in host memory of the streams.
        """
        return AllOf(
            parts=tuple(each.gather(part, page_table, into, after) for each in self._senders)
        )

    def write(
        self, payload: Bytes, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Put `payload`, which is `part` in the layout `source`, into the pages of every rank.

        payload: uint8 [bytes of the part] in host memory of the streams. The layouts must hold the
        same KV; slots that the page table does not reach are left out. It is there on every device
        when this returns: rank 0 announces no step that reads it before, so no rank waits for it.
        """
        written = [each.begin_write(payload, part, source, page_table) for each in self._ranks]
        AllOf(parts=tuple(written)).wait()
