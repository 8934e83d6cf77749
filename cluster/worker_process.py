"""What runs in a worker's process, whoever started it: `python -m pagewire.cluster.worker_process`.

Loads the model, then serves until told to stop. The incarnation is made here, so every start of a
process is a new one.
"""

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from pagewire.decode_worker.load_speculation import load_speculation
from pagewire.decode_worker.worker import DecodeWorker
from pagewire.engine.device_shards import DeviceShards
from pagewire.engine.errors import EngineError
from pagewire.engine.kv_shards import KVShards
from pagewire.engine.parallel.rank_group import RankLost
from pagewire.kv_transfer.layout import LayoutError
from pagewire.kv_transfer.select import create_transports
from pagewire.kv_transfer.transport import TransportError
from pagewire.prefill_worker.worker import PrefillWorker
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.config import Role, WorkerConfig
from pagewire.worker.failpoint import Failpoint
from pagewire.worker.followers import FollowerProcesses, follower_processes
from pagewire.worker.load import copy_streams, load_worker_engine, rank_caches
from pagewire.worker.sessions import RegistrationRefused
from pagewire.worker.shell import new_model_thread
from pagewire.worker.tasks import first_of

ENDS_WITH_STDIN = "--ends-with-stdin"

_STDIN_BYTES = 4096  # nobody sends any

logger = logging.getLogger(__name__)

# What a worker can fail with at its start for reasons that a user can mend, and the end of one of
# its ranks.
StartError = (EngineError, LayoutError, RankLost, RegistrationRefused, TransportError, ValueError)


async def run_worker(
    config: WorkerConfig,
    stop: asyncio.Event,
    on_state: Callable[[pb.WorkerState], None] | None = None,
) -> None:
    """Serve until `stop` is set; `on_state` is called once a second.

    Raises one of StartError, with a sentence for the user, when the worker cannot work.
    """
    async with AsyncExitStack() as stack:
        followers = None
        if config.tensor_parallel_size > 1:
            followers = await stack.enter_async_context(follower_processes(config))
        model_thread = new_model_thread(config.threads_per_rank)
        worker = await _load(config, followers, model_thread, on_state)
        chosen = create_transports(
            config.transport,
            worker.core.incarnation,
            worker,
            config.kv_host or config.host,
            tls=config.kv_tls,
            is_private=config.insecure_kv,
            device=config.device,
            num_devices=config.tensor_parallel_size,
        )
        logger.info("%s: %s", config.name, chosen.explanation)
        serving = worker.run(chosen.transports, stop, chosen.pairs)
        await (first_of(serving, followers.failure()) if followers else serving)


async def _load(
    config: WorkerConfig,
    followers: FollowerProcesses | None,
    model_thread: ThreadPoolExecutor,
    on_state: Callable[[pb.WorkerState], None] | None,
) -> PrefillWorker | DecodeWorker:
    """The worker with its model."""
    failpoint = Failpoint.of_worker(config.name, os.environ)
    loop = asyncio.get_running_loop()
    parallel = await loop.run_in_executor(model_thread, followers.join) if followers else None
    runner = await loop.run_in_executor(model_thread, load_worker_engine, config, parallel)
    copies = copy_streams(config)
    shards = device_shards = None
    if parallel is not None:
        caches = await loop.run_in_executor(model_thread, rank_caches, runner, parallel)
        if copies:
            device_shards = DeviceShards(runner.layout, caches, copies)
        else:
            shards = KVShards(runner.layout, caches)
    incarnation = secrets.token_bytes(16)
    if config.role is Role.PREFILL:
        return PrefillWorker(
            config=config,
            incarnation=incarnation,
            runner=runner,
            shards=shards,
            device_shards=device_shards,
            copies=copies[0] if copies else None,
            model_thread=model_thread,
            on_state=on_state,
            failpoint=failpoint,
        )
    speculation, draft_model = await loop.run_in_executor(
        model_thread, load_speculation, config, runner
    )
    return DecodeWorker(
        config=config,
        incarnation=incarnation,
        runner=runner,
        shards=shards,
        device_shards=device_shards,
        copies=copies[0] if copies else None,
        speculation=speculation,
        draft_model=draft_model,
        model_thread=model_thread,
        on_state=on_state,
        failpoint=failpoint,
    )


async def _main(config: WorkerConfig, *, ends_with_stdin: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if ends_with_stdin:
        loop.add_reader(sys.stdin.fileno(), _stop_at_end_of_stdin, loop, stop)
    await run_worker(config, stop)


def _stop_at_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), _STDIN_BYTES):
        loop.remove_reader(sys.stdin.fileno())
        stop.set()


def main() -> None:
    """Arguments: [--ends-with-stdin] CONFIG, the latter as JSON.

    With the option the worker stops when its standard input ends, which a parent that is killed
    cannot fail to bring about. Exit code 0 after a clean stop, 1 with one line on standard error
    otherwise.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    config = WorkerConfig.from_json(sys.argv[-1])
    try:
        asyncio.run(_main(config, ends_with_stdin=ENDS_WITH_STDIN in sys.argv))
    except StartError as error:
        print(f"{config.name}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
