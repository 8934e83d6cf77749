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
from pathlib import Path

from pagewire.decode_worker.load_speculation import load_speculation
from pagewire.decode_worker.worker import DecodeWorker
from pagewire.engine.errors import EngineError
from pagewire.engine.load import load_engine
from pagewire.engine.load_draft import draft_page_bytes
from pagewire.engine.model_runner import ModelRunner
from pagewire.kv_transfer.layout import LayoutError
from pagewire.kv_transfer.select import create_transports
from pagewire.kv_transfer.transport import TransportError
from pagewire.prefill_worker.worker import PrefillWorker
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.config import Role, WorkerConfig
from pagewire.worker.failpoint import Failpoint
from pagewire.worker.sessions import RegistrationRefused
from pagewire.worker.shell import new_model_thread

ENDS_WITH_STDIN = "--ends-with-stdin"

_STDIN_BYTES = 4096  # nobody sends any

logger = logging.getLogger(__name__)

# What a worker can fail with at its start for reasons that a user can mend.
StartError = (EngineError, LayoutError, RegistrationRefused, TransportError, ValueError)


async def run_worker(
    config: WorkerConfig,
    stop: asyncio.Event,
    on_state: Callable[[pb.WorkerState], None] | None = None,
) -> None:
    """Serve until `stop` is set; `on_state` is called once a second.

    Raises one of StartError, with a sentence for the user, when the worker cannot work.
    """
    incarnation = secrets.token_bytes(16)
    failpoint = Failpoint.of_worker(config.name, os.environ)
    loop = asyncio.get_running_loop()
    model_thread = new_model_thread(config.num_threads)
    runner = await loop.run_in_executor(model_thread, _load_engine, config)
    worker: PrefillWorker | DecodeWorker
    if config.role is Role.PREFILL:
        worker = PrefillWorker(
            config=config,
            incarnation=incarnation,
            runner=runner,
            model_thread=model_thread,
            on_state=on_state,
            failpoint=failpoint,
        )
    else:
        speculation, draft_model = await loop.run_in_executor(
            model_thread, load_speculation, config, runner
        )
        worker = DecodeWorker(
            config=config,
            incarnation=incarnation,
            runner=runner,
            speculation=speculation,
            draft_model=draft_model,
            model_thread=model_thread,
            on_state=on_state,
            failpoint=failpoint,
        )
    chosen = create_transports(
        config.transport,
        incarnation,
        worker,
        config.kv_host or config.host,
        tls=config.kv_tls,
        is_private=config.insecure_kv,
        device=config.device,
    )
    logger.info("%s: %s", config.name, chosen.explanation)
    await worker.run(chosen.transports, stop, chosen.pairs)


def _load_engine(config: WorkerConfig) -> ModelRunner:
    page_bytes = 0
    if config.draft_model is not None:
        page_bytes = draft_page_bytes(
            Path(config.draft_model), page_size=config.page_size, dtype=config.dtype
        )
    return load_engine(
        Path(config.model),
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        device=config.device,
        page_size=config.page_size,
        num_pages=config.num_pages,
        draft_page_bytes=page_bytes,
        max_model_len=config.max_model_len,
        num_threads=config.num_threads,
        kernels=config.kernels,
        deterministic=config.deterministic,
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
