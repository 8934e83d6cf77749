"""A Ray cluster of this machine alone, for as long as a context is open.

Ray starts, places and shows the workers; nothing that a client waits for passes through it. All of
its ports are on loopback, since whoever reaches one can run code.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from pagewire.cluster import janitor, processes
from pagewire.cluster.errors import LaunchError

NAMESPACE = "pagewire"

_DIRECTORY_PREFIX = "pagewire-"
# Ray's sockets lie in its directory, and a socket's path has at most 107 characters: not TMPDIR.
_DIRECTORY_PARENT = Path("/tmp")
_OBJECT_STORE_BYTES = 100 << 20  # Ray wants at least 75 MB; pages and tokens never go through it
_STOP_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 2.0

# Ray reads these when it is imported, and its processes when they start.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The switch that keeps Ray's ports on 127.0.0.1; a node address of 127.0.0.1 does not.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Idle Python workers, made ready for tasks that this program never submits.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Workers are what the machine is there for; Ray would let every other process go first.
    "RAY_worker_niceness": "0",
    # An actor without a GPU of Ray's must not lose sight of the machine's GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LocalRay:
    """Starts Ray when entered, in a thread; `ready` waits for it. Stops it and all its processes.

    Ray's state is the process's: only one LocalRay may be open at a time. `dashboard_port` must be
    free. It gives out `num_gpus` GPUs; None: those that it finds.
    """

    def __init__(self, *, dashboard_port: int, num_gpus: int | None = None) -> None:
        self._dashboard_port = dashboard_port
        self._num_gpus = num_gpus
        self._directory = Path()
        self._others: set[psutil.Process] = set()
        # Ray's processes are killed by the kernel when the thread that started them ends, so this
        # thread must live as long as they shall.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")
        self._start: asyncio.Future[None] | None = None
        self._janitor: subprocess.Popen[bytes] | None = None

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self._dashboard_port}"

    async def __aenter__(self) -> "LocalRay":
        _remove_stale_directories()
        self._directory = Path(
            tempfile.mkdtemp(prefix=f"{_DIRECTORY_PREFIX}{os.getpid()}-", dir=_DIRECTORY_PARENT)
        )
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", janitor.__file__, str(self._directory)],
            stdin=subprocess.PIPE,  # never written: it ends when this process does
            start_new_session=True,  # what ends a whole group of processes shall not end it
        )
        self._others = processes.descendants()
        self._start = asyncio.get_running_loop().run_in_executor(self._thread, self._init)
        return self

    async def ready(self) -> None:
        """Wait until workers can be started. Raises LaunchError."""
        assert self._start is not None, "enter the context first"
        await asyncio.shield(self._start)
        _restore_signal_handlers()

    async def __aexit__(self, *_: object) -> None:
        assert self._start is not None
        await asyncio.wait({self._start})
        await asyncio.get_running_loop().run_in_executor(self._thread, self._shutdown)
        self._thread.shutdown()

    def _init(self) -> None:
        # Token authentication is Ray's default and would ask for the token in the browser. On
        # loopback it is off, unless the environment asks for it.
        auth_mode = os.environ.get("RAY_AUTH_MODE", "disabled")
        extra = {"RAY_AUTH_MODE": auth_mode, "TMPDIR": str(self._directory)}
        with _environment(_ENVIRONMENT | extra):
            import ray

            if ray.is_initialized():
                raise LaunchError("this process already uses Ray; start the instance in its own")
            try:
                ray.init(
                    address="local",
                    namespace=NAMESPACE,
                    include_dashboard=True,
                    dashboard_host="127.0.0.1",
                    dashboard_port=self._dashboard_port,
                    num_gpus=self._num_gpus,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    # One level down: Ray opens its directory to all users, ours stays private.
                    _temp_dir=str(self._directory / "ray"),
                )
            except (OSError, RuntimeError, TimeoutError, ValueError) as error:
                raise LaunchError(f"Ray does not start: {error}; see `pagewire doctor`") from error

    def _shutdown(self) -> None:
        import ray

        started = processes.descendants() - self._others
        ray.shutdown()
        # The dashboard's own children outlive it by a moment.
        left = processes.wait_gone(started, _STOP_TIMEOUT_S)
        processes.kill(left)
        processes.wait_gone(left, _KILL_TIMEOUT_S)
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._janitor is not None:
            with self._janitor:  # closes its standard input, and waits
                self._janitor.kill()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for Ray's processes, which inherit those of this one while they are started."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _restore_signal_handlers() -> None:
    """Put Python's handlers back in the place of those that Ray's C++ installs below them.

    Ray's print a stack trace and abort the process.
    """
    for number in _HANDLED_SIGNALS:
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)


def _remove_stale_directories() -> None:
    """Remove what instances left behind that were killed before they could clean up."""
    for directory in _DIRECTORY_PARENT.glob(f"{_DIRECTORY_PREFIX}*-*"):
        pid = directory.name.removeprefix(_DIRECTORY_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):
                shutil.rmtree(directory)
