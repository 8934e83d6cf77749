"""What runs in the process of a rank behind the first: `python -m pagewire.worker.rank_process`.

It does what rank 0 says on its standard input, which is a socket, and ends when that ends; or, if
it is stopped then, by the kernel.
"""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

import torch

from pagewire.engine.errors import EngineError
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.rank_group import RankLost
from pagewire.engine.step_memory import StepMemory
from pagewire.kv_transfer.layout import LayoutError
from pagewire.worker.config import WorkerConfig
from pagewire.worker.load import join_ranks, load_worker_engine
from pagewire.worker.parent_death import end_with_parent
from pagewire.worker.step_messages import (
    STARTED,
    Copies,
    Message,
    Step,
    StepMessageError,
    WarmUp,
    decode,
    receive,
)


class RankZero:
    """What rank 0 says. When it says nothing more, the process ends, whatever it is doing."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.sendall(STARTED)
        self._bodies: SimpleQueue[bytes] = SimpleQueue()
        Thread(target=self._listen, name="rank 0", daemon=True).start()

    def messages(self) -> Iterator[Message]:
        """Without end. Raises StepMessageError."""
        while True:
            yield decode(self._bodies.get())

    def _listen(self) -> None:
        with suppress(OSError, StepMessageError):
            while True:
                self._bodies.put(receive(self._sock))
        os._exit(1)  # the main thread may wait for rank 0 in the middle of a step


def follow(runner: ModelRunner, rank_zero: RankZero) -> None:
    """Do what rank 0 says. Raises RankLost and whatever breaks the step."""
    memory = StepMemory(torch.device(runner.model.device))
    for message in rank_zero.messages():
        match message:
            case Copies(copies=copies):
                runner.copy_pages(copies)
            case WarmUp(max_rows=max_rows):
                runner.warm_up(max_rows)
            case Step():
                torch.set_num_threads(message.num_threads)
                on_layer = _tell_nobody if message.by_layer else None
                runner.run(message.inputs(memory), on_layer, is_fed=message.is_fed)


def _tell_nobody(num_layers: int) -> None:
    """Rank 0 alone reports layers; all run them one by one where it does."""


def main() -> None:
    """Arguments: CONFIG as JSON, the rank, the store's path; on a CPU the pools' descriptor."""
    end_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    config = WorkerConfig.from_json(sys.argv[1])
    rank, store_path = int(sys.argv[2]), sys.argv[3]
    memory = int(sys.argv[4]) if config.device == "cpu" else None
    rank_zero = RankZero(socket.socket(fileno=os.dup(sys.stdin.fileno())))
    try:
        parallel = join_ranks(config, rank, store_path=store_path, memory=memory)
        follow(load_worker_engine(config, parallel), rank_zero)
    except (EngineError, LayoutError, RankLost, StepMessageError) as error:
        sys.exit(f"rank {rank} of {config.name}: {error}")


if __name__ == "__main__":
    main()
