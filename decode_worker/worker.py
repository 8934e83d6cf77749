"""The decode worker: the shared shell around DecodeCore, with frames coming in."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.drafting import Speculation
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.batch import Batch, OnLayersDone, StepResult
from pagewire.engine.copy_stream import CopyStream
from pagewire.engine.device_pages import DevicePages
from pagewire.engine.device_shards import DeviceShards
from pagewire.engine.draft_model import DraftModel
from pagewire.engine.kv_shards import KVShards
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.messages import Frame, MessageError, decode
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.config import WorkerConfig
from pagewire.worker.effects import Scatter, Verify
from pagewire.worker.failpoint import Failpoint
from pagewire.worker.frames import FrameWriter, PageWriter
from pagewire.worker.interval import Interval
from pagewire.worker.shell import WorkerShell
from pagewire.worker.slot_frames import FrameWriterByPeer, SlotFrameWriter
from pagewire.worker.slot_memory import DeviceSlots, HostSlots


class DecodeWorker(WorkerShell[DecodeCore]):
    """Receives hand-offs and runs them in one continuous batch."""

    def __init__(
        self,
        *,
        config: WorkerConfig,
        incarnation: bytes,
        runner: ModelRunner,
        shards: KVShards | None = None,
        device_shards: DeviceShards | None = None,
        copies: CopyStream | None = None,
        speculation: Speculation | None = None,
        draft_model: DraftModel | None = None,
        model_thread: ThreadPoolExecutor | None = None,
        on_state: Callable[[pb.WorkerState], None] | None = None,
        failpoint: Failpoint | None = None,
    ) -> None:
        """`shards`: the pages of all ranks, where `runner` is one of several; `device_shards`: if
        they are on a device each. `copies`: what reaches the pages of `runner` on a device.

        `draft_model` makes the drafts that `speculation` asks for.
        """
        core = DecodeCore(
            incarnation=incarnation,
            layout=runner.layout,
            pool=PagePool(runner.num_pages),
            slots=SlotPool(config.num_slots),
            vocab_size=runner.vocab_size,
            max_model_len=runner.max_model_len,
            max_batch_size=config.max_batch_size,
            speculation=speculation,
            slot_bytes=config.slot_bytes,
            hasher=config.page_hasher,
            lease_s=config.lease_s,
            max_waiting_handoffs=config.max_waiting_handoffs,
        )
        super().__init__(
            config=config,
            core=core,
            runner=runner,
            model_thread=model_thread,
            on_state=on_state,
            failpoint=failpoint,
            overlap_steps=config.overlaps_steps and speculation is None,
        )
        self._draft_model = draft_model
        if config.device != "cpu":
            # Steps with drafts run the kernels of prompts.
            num_drafts = speculation.max_draft_tokens if speculation else 0
            runner.warm_up_prompts(config.max_batch_size + num_drafts)
        runner.warm_up(config.max_batch_size)
        self._writer = self._page_writer(shards, device_shards, copies)

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        frame = decode(header)
        if not isinstance(frame, Frame):
            raise MessageError(f"{type(frame).__name__} has no payload")
        place, effects = self.core.place(peer, frame, length)
        self.carry_out(effects)
        if place is None:
            return None
        if place.page_table is None:
            return self._writer.land_in_slot(frame, length)
        return self._writer.land_in_pages(frame, place.page_table)

    def _run_batch(self, batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        if self._draft_model is not None:
            batch = self._draft_model.add_drafts(batch)
        return super()._run_batch(batch, on_layers_done)

    def _on_layers_done(self, num_layers: int) -> None:
        raise AssertionError("nobody asks a decode step for its layers")

    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        raise AssertionError("a decode worker sends no frames")

    def _has_handoff(self, peer: bytes) -> bool:
        return True  # the prefill worker connects, and moves

    async def _scatter(self, effect: Scatter) -> None:
        loop = asyncio.get_running_loop()
        is_sound = await loop.run_in_executor(
            self.io_thread, self._writer.write, effect.frame, effect.source, effect.page_table
        )
        self.carry_out(self.core.on_scattered(effect.frame, is_sound, self.clock()))

    async def _verify(self, effect: Verify) -> None:
        if self._writer.has_checksum(effect.frame):
            is_sound = self._writer.is_sound(effect.frame)
        else:
            is_sound = await asyncio.get_running_loop().run_in_executor(
                self.io_thread, self._writer.is_sound, effect.frame
            )
        self.carry_out(self.core.on_scattered(effect.frame, is_sound, self.clock()))

    def _page_writer(
        self, shards: KVShards | None, device_shards: DeviceShards | None, copies: CopyStream | None
    ) -> PageWriter:
        """Frames land in pages, unless these are of several ranks or on a device."""
        num_slots, slot_bytes = self._config.num_slots, self._config.slot_bytes
        if copies is not None:
            memory = copies.host_memory(num_slots * slot_bytes).view(num_slots, slot_bytes)
            in_host_memory = HostSlots(memory.numpy())
            if device_shards is not None:
                return SlotFrameWriter(device_shards, in_host_memory)
            pages = DevicePages(self._runner.kv_cache, copies)
            on_device = DeviceSlots(copies, num_slots=num_slots, slot_bytes=slot_bytes)
            return FrameWriterByPeer(
                host=SlotFrameWriter(pages, in_host_memory),
                device=SlotFrameWriter(pages, on_device),
                is_direct=self.is_direct,
            )
        if shards is not None:
            in_host_memory = HostSlots(np.empty((num_slots, slot_bytes), dtype=np.uint8))
            return SlotFrameWriter(shards, in_host_memory)
        return FrameWriter(self._runner.kv_cache, num_slots=num_slots, slot_bytes=slot_bytes)
