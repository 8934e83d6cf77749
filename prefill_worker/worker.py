"""The prefill worker: the shared shell around PrefillCore, with frames going out."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pagewire.engine.batch import Batch, OnLayersDone, StepResult
from pagewire.engine.copy_stream import Completion, CopyStream
from pagewire.engine.device_pages import DevicePages
from pagewire.engine.device_shards import DeviceShards
from pagewire.engine.kv_shards import KVShards
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.messages import Frame, MessageError
from pagewire.kv_transfer.transport import Transport
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.config import WorkerConfig
from pagewire.worker.effects import Scatter, Verify
from pagewire.worker.failpoint import Failpoint
from pagewire.worker.frame_reads import DirectReads, FrameReads
from pagewire.worker.frames import FrameReader, PageReader
from pagewire.worker.interval import Interval
from pagewire.worker.sharded_frames import ShardedFrameReader
from pagewire.worker.shell import WorkerShell
from pagewire.worker.staged_reads import StagedReads
from pagewire.worker.staging import DeviceStaging, HostStaging


class PrefillWorker(WorkerShell[PrefillCore]):
    """Computes prompts, samples token 0 and sends the pages on."""

    def __init__(
        self,
        *,
        config: WorkerConfig,
        incarnation: bytes,
        runner: ModelRunner,
        shards: KVShards | None = None,
        device_shards: DeviceShards | None = None,
        copies: CopyStream | None = None,
        model_thread: ThreadPoolExecutor | None = None,
        on_state: Callable[[pb.WorkerState], None] | None = None,
        failpoint: Failpoint | None = None,
    ) -> None:
        """`shards`: the pages of all ranks, where `runner` is one of several; `device_shards`: if
        they are on a device each. `copies`: what reaches the pages of `runner` on a device.
        """
        core = PrefillCore(
            incarnation=incarnation,
            layout=runner.layout,
            pool=PagePool(runner.num_pages),
            vocab_size=runner.vocab_size,
            max_model_len=runner.max_model_len,
            max_batch_tokens=config.max_batch_tokens,
            slot_bytes=config.slot_bytes,
            hasher=config.page_hasher,
            stream_layers=config.stream_layers,
            lease_s=config.lease_s,
            max_parked_share=config.max_parked_share,
        )
        super().__init__(
            config=config,
            core=core,
            runner=runner,
            model_thread=model_thread,
            on_state=on_state,
            failpoint=failpoint,
        )
        reads = self._frame_reads(shards, device_shards, copies)
        self._reads = reads
        self._mark_computed = reads.mark_computed
        self._last_step: Completion | None = None  # that a device was told to run
        if config.device != "cpu":
            runner.warm_up_prompts(config.max_batch_tokens)

    def _frame_reads(
        self, shards: KVShards | None, device_shards: DeviceShards | None, copies: CopyStream | None
    ) -> FrameReads:
        """Frames leave from their pages, unless these are on a device."""
        thread, clock = self.io_thread, self.clock
        if copies is None:
            cache = self._runner.kv_cache
            reader: PageReader
            if shards is None:
                reader = FrameReader(cache.layout, cache.buffer())
            else:
                reader = ShardedFrameReader(shards)
            return DirectReads(reader, thread=thread, clock=clock)
        sizes = {"num_buffers": self._config.num_slots, "buffer_bytes": self._config.slot_bytes}
        on_device = None
        if device_shards is None:
            pages = DevicePages(self._runner.kv_cache, copies)
            in_host_memory = HostStaging(pages, copies, **sizes)
            on_device = DeviceStaging(pages, copies, **sizes)
        else:
            in_host_memory = HostStaging(device_shards, copies, **sizes)
        return StagedReads(
            copies,
            host=in_host_memory,
            device=on_device,
            is_direct=self.is_direct,
            thread=thread,
            clock=clock,
        )

    def _run_batch(self, batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        def on_marked_layers_done(num_layers: int) -> None:
            self._mark_computed()
            if on_layers_done is not None:
                on_layers_done(num_layers)

        result = super()._run_batch(batch, on_marked_layers_done)
        step_before, self._last_step = self._last_step, self._mark_computed()
        if step_before is not None:
            # A device has a step to go on with. With more of them told ahead, a prompt that comes
            # now would wait for them all.
            step_before.wait()
        return result

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        raise MessageError("a prefill worker takes no frames")

    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        self.carry_out(self.core.on_frame_sent(frame, checksum, self.clock(), gathered))

    def _has_handoff(self, peer: bytes) -> bool:
        return self.core.has_handoff(peer)

    def _on_layers_done(self, num_layers: int) -> None:
        with self._tasks:
            self.carry_out(self.core.on_layers_done(num_layers, self.clock()))

    def _registration(self, address: str, transports: Sequence[Transport]) -> pb.RegisterRequest:
        info = super()._registration(address, transports)
        info.max_parked_pages = self.core.max_parked_pages
        return info

    async def _scatter(self, effect: Scatter) -> None:
        raise AssertionError("a prefill worker takes no frames")

    async def _verify(self, effect: Verify) -> None:
        raise AssertionError("a prefill worker takes no frames")
