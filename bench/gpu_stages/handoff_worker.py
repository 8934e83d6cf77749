"""A worker over a random model: `python -m gpu_stages.handoff_worker CONFIG`, a WorkerConfig.

The same seed gives the same weights in every process on one kind of device. The process ends with
its standard input, and so with the one that started it, however that ends.
"""

import asyncio
import os
import secrets
import sys
from threading import Thread

import torch

from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import choose_scale
from pagewire.decode_worker.worker import DecodeWorker
from pagewire.kv_transfer.select import create_transports
from pagewire.prefill_worker.worker import PrefillWorker
from pagewire.worker.config import Role, WorkerConfig
from pagewire.worker.load import copy_streams


async def serve(config: WorkerConfig) -> None:
    """Until the process ends."""
    scale = choose_scale()
    assert config.num_pages is not None, "the pages are those of the check"
    torch.set_num_threads(config.num_threads)
    runner = runner_of(random_model(scale), scale, config.num_pages)
    copies = copy_streams(config)
    make = PrefillWorker if config.role is Role.PREFILL else DecodeWorker
    worker = make(
        config=config,
        incarnation=secrets.token_bytes(16),
        runner=runner,
        copies=copies[0] if copies else None,
    )
    chosen = create_transports(
        config.transport, worker.core.incarnation, worker, config.host, device=config.device
    )
    print(f"{config.name}: {chosen.explanation}", flush=True)
    await worker.run(chosen.transports, asyncio.Event(), chosen.pairs)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    Thread(target=_end_with_stdin, daemon=True).start()
    asyncio.run(serve(WorkerConfig.from_json(sys.argv[1])))
