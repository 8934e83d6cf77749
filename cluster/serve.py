"""One instance: Ray, its workers, and the router in this process, from start to stop.

Each part is a context; leaving them in reverse order stops HTTP first, then the control plane, the
workers and Ray.
"""

import asyncio
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from pagewire.cluster import processes
from pagewire.cluster.api import build_app, tokenizer_of
from pagewire.cluster.config import ServeConfig
from pagewire.cluster.devices import DeviceChoice, choose_device, find_gpus
from pagewire.cluster.draft_tokenizer import require_same_tokens
from pagewire.cluster.early_refusals import require_runnable
from pagewire.cluster.errors import StartError
from pagewire.cluster.hang import HangPolicy
from pagewire.cluster.http_server import HttpServer
from pagewire.cluster.launcher import Launcher, WorkerExit
from pagewire.cluster.local_ray import LocalRay
from pagewire.cluster.placement import available_cores, worker_configs
from pagewire.cluster.ports import bind, require_free
from pagewire.cluster.self_test import self_test
from pagewire.cluster.subprocess_launcher import SubprocessLauncher
from pagewire.cluster.supervisor import Supervisor
from pagewire.cluster.terminal import Banner, Terminal, WorkerLine
from pagewire.cluster.tracing import export_traces
from pagewire.engine.errors import EngineError
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.loading.resolve import resolve_model, served_name
from pagewire.engine.precision import default_dtype
from pagewire.engine.quantization import Quantization
from pagewire.proto.page_hash import KEY_BYTES
from pagewire.router.control import RouterControl
from pagewire.router.request import WorkerView
from pagewire.router.tokenizer import Tokenizer
from pagewire.worker.config import Role, WorkerConfig
from pagewire.worker.core_board import create_board
from pagewire.worker.tasks import first_of

_POLL_S = 0.1
_LOOPBACK = "127.0.0.1"
_ANY_ADDRESS = ("0.0.0.0", "::")

Exits = asyncio.Queue[tuple[str, WorkerExit]]  # of workers that ended without being asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What the workers and the API stand on."""

    launcher: Launcher
    tokenizer: Tokenizer
    dashboard_url: str | None


async def serve(config: ServeConfig, terminal: Terminal) -> None:
    """Start an instance, and keep it running until cancelled. Raises ClusterError."""
    with bind(config.host, config.port, option="--port") as listener:
        model = _resolve(config.model)
        draft_model = _resolve(config.draft_model) if config.draft_model else None
        served_model = config.served_model or served_name(config.model)
        device = choose_device(config, await asyncio.to_thread(find_gpus, config.device))
        if device.reason:
            terminal.say(f"workers run on the CPU: {device.reason}")
        require_runnable(config, device.name)
        async with AsyncExitStack() as stack:
            base = await _start_base(stack, config, model, device, terminal)
            if draft_model:
                await asyncio.to_thread(require_same_tokens, base.tokenizer, draft_model)
            # Not before Ray runs: it forks, which other threads in this process do not like.
            tracing = await stack.enter_async_context(
                export_traces(config.otlp_endpoint, served_model, os.environ)
            )
            secret = secrets.token_bytes(KEY_BYTES) if config.prefix_cache else None
            control = RouterControl(max_queued=config.max_queued, page_secret=secret)
            core_board = _make_core_board(stack, config.prefill + config.decode)
            workers = worker_configs(
                config,
                model=model,
                draft_model=draft_model,
                served_model=served_model,
                router=await control.start(),
                cores=available_cores(),
                core_board=core_board,
                device=device.name,
                dtype=default_dtype(device.name, config.kernels),
                prefix_cache_secret=secret.hex() if secret else None,
            )
            exits = await _launch(stack, base.launcher, workers, config, control)
            stack.push_async_callback(control.stop)
            with terminal.step(f"starting {', '.join(worker.name for worker in workers)}"):
                views = await _all_registered(control, len(workers), exits, config.start_timeout_s)
            app = build_app(config, control, base.tokenizer, served_model, tracing)
            server = HttpServer(app, listener, grace_s=config.stop_timeout_s)
            await stack.enter_async_context(server)
            stack.callback(control.refuse_all)  # first of all: open streams end with an error
            url = _url(listener)
            with terminal.step("sending a first prompt"):
                await self_test(url)
            terminal.show(_banner(workers, views, url, base.dashboard_url))
            await first_of(_report(exits, terminal), control.failure())


def _make_core_board(stack: AsyncExitStack, num_workers: int) -> Path:
    """In a directory of this instance alone, which goes with it."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagewire-"))
    path = Path(directory) / "cores"
    create_board(path, num_workers)
    return path


def _resolve(model: str | None) -> Path:
    try:
        return resolve_model(model)
    except EngineError as error:
        raise StartError(str(error)) from error


async def _start_base(
    stack: AsyncExitStack,
    config: ServeConfig,
    model: Path,
    device: DeviceChoice,
    terminal: Terminal,
) -> _Base:
    """Start Ray, unless the workers do without it, and load the tokenizer meanwhile."""
    ray = None
    if config.launcher == "ray":
        port = require_free(_LOOPBACK, config.dashboard_port, option="--dashboard-port")
        ray = await stack.enter_async_context(
            LocalRay(dashboard_port=port, num_gpus=device.num_gpus)
        )
    loading = asyncio.create_task(asyncio.to_thread(tokenizer_of, model))
    stack.callback(loading.cancel)
    with terminal.step("starting Ray" if ray else "loading the tokenizer"):
        return _Base(
            launcher=await _ray_launcher(ray) if ray else SubprocessLauncher(),
            tokenizer=await loading,
            dashboard_url=ray.dashboard_url if ray else None,
        )


async def _ray_launcher(ray: LocalRay) -> Launcher:
    await ray.ready()
    # Only now: Ray reads its environment, which LocalRay sets, when it is imported.
    from pagewire.cluster.ray_launcher import RayLauncher

    return RayLauncher()


async def _launch(
    stack: AsyncExitStack,
    launcher: Launcher,
    workers: Sequence[WorkerConfig],
    config: ServeConfig,
    control: RouterControl,
) -> Exits:
    exits: Exits = asyncio.Queue()
    await stack.enter_async_context(
        Supervisor(
            launcher,
            workers,
            on_exit=lambda name, end: exits.put_nowait((name, end)),
            step_s=control.step_s,
            hang_policy=HangPolicy(
                start_s=config.start_timeout_s,
                silence_s=config.hang_timeout_s,
                step_s=config.step_timeout_s,
            ),
            grace_s=config.stop_timeout_s,
        )
    )
    return exits


async def _all_registered(
    control: RouterControl, num_workers: int, exits: Exits, timeout_s: float
) -> list[WorkerView]:
    """The workers, once all are there. Raises StartError when one ends, or at the time-out."""
    first_exit = asyncio.create_task(exits.get())
    deadline = time.monotonic() + timeout_s
    try:
        while len(views := await control.inspect()) < num_workers:
            if time.monotonic() > deadline:
                raise StartError(
                    f"{len(views)} of {num_workers} workers were ready after {timeout_s:.0f} s; "
                    "raise start_timeout_s, or see `pagewire doctor`"
                )
            await asyncio.wait({first_exit}, timeout=_POLL_S)
            if first_exit.done():
                name, end = first_exit.result()
                reason = end.reason.removeprefix(f"{name}: ")  # as it stands in its own log
                raise StartError(f"{name} did not start: {reason}")
        return views
    finally:
        first_exit.cancel()


def _url(listener: socket.socket) -> str:
    """Where a client on this machine reaches the API."""
    host, port = listener.getsockname()[:2]
    if host in _ANY_ADDRESS:
        host = _LOOPBACK
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _banner(
    configs: Sequence[WorkerConfig],
    views: Sequence[WorkerView],
    url: str,
    dashboard_url: str | None,
) -> Banner:
    config = configs[0]
    by_name = {each.name: each for each in configs}
    return Banner(
        model=config.served_model,
        precision=precision(configs),
        workers=[
            WorkerLine(
                name=view.name,
                pid=view.pid,
                device=_devices(view.device, by_name[view.name].tensor_parallel_size),
                num_pages=view.state.pages.total,
                page_size=by_name[view.name].page_size,
            )
            for view in sorted(views, key=lambda view: (view.role != Role.PREFILL, view.name))
        ],
        transport=_transport(config, views),
        url=url,
        dashboard_url=dashboard_url,
        ready_s=processes.age_s(),
    )


def _devices(device: str, num_ranks: int) -> str:
    return device if num_ranks == 1 else f"{device} on {num_ranks} ranks"


def precision(configs: Sequence[WorkerConfig]) -> str:
    """The dtype, and what is stored in another one."""
    config = configs[0]
    parts = [config.dtype]
    if config.quantization is not Quantization.NONE:
        parts.append(f"{config.quantization} matrices")
    kv = {each.kv_cache_dtype for each in configs} - {KVCacheDtype.AUTO}
    parts += [f"{dtype} KV cache" for dtype in sorted(kv)]
    return ", ".join(parts)


def _transport(config: WorkerConfig, views: Sequence[WorkerView]) -> str:
    kinds = [each.kind for each in views[0].state.transfers]
    if config.transport == "auto" and config.kv_tls is None and "ucx" not in kinds:
        return f"{', '.join(kinds)}: UCX is not usable here, see `pagewire doctor`"
    return ", ".join(kinds)


async def _report(exits: Exits, terminal: Terminal) -> None:
    """Say which workers ended; the supervisor starts them again. Runs until cancelled."""
    while True:
        name, end = await exits.get()
        terminal.say(f"{name} ended: {end.reason}; starting it again")
