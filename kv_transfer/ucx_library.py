"""The only module that imports ucxx: its UCX library, with the settings that Pagewire needs.

ucxx's asyncio layer keeps one worker per process and polls while a transfer is under way. Its
library layer underneath does neither, so transports are built on that.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from pagewire.kv_transfer.exposure import is_loopback
from pagewire.kv_transfer.transport import TransportError

_REMEDY = "install it with: pip install 'pagewire[ucx]'"
_REQUIRED = {
    # Shared memory is only used between endpoints that notice a dead peer if it claims that it
    # can. The connection beside it is what notices; UCX must only not be in the way. (The faster
    # process_vm_readv is left out by this: it aborts the process that reads from a dead one.)
    "SYSV_ERROR_HANDLING": "y",
    "POSIX_ERROR_HANDLING": "y",
    # Above this size by rendezvous: such a receive can be ended in the middle, an eager one not.
    "RNDV_THRESH": "4096",
}
# Whoever receives fetches, and nobody writes into the memory of another: so copies that a GPU was
# told of and that outlive their connection can be waited for where they write.
_REQUIRED_ON_GPUS = {"RNDV_SCHEME": "get_zcopy"}
_DEFAULTS = {  # unless the environment says otherwise
    # 8 KiB, UCX's own default, makes TCP slower than a plain socket.
    "TCP_TX_SEG_SIZE": "256k",
    "TCP_RX_SEG_SIZE": "256k",
}


GPU_TRANSPORTS = frozenset({"cuda_copy", "cuda_ipc"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxLibrary:
    """One UCX context and what is needed to use it."""

    api: Any  # the module ucxx.libucxx
    array: Any  # the class that wraps a buffer for it
    context: Any
    error: type[Exception]  # what its calls raise

    def new_worker(self) -> Any:
        """A UCX worker that sleeps until something happens. Raises TransportError."""
        try:
            worker = self.api.UCXWorker(self.context)
            worker.init_blocking_progress_mode()
        except self.error as error:
            raise TransportError(f"UCX cannot make a worker: {error}") from error
        return worker

    @property
    def transports(self) -> tuple[str, ...]:
        """UCX's own transports on this machine, such as tcp, sysv or rc_mlx5."""
        found = re.findall(r"resource \d+ .* (\w+)/\S+$", self.context.info, re.MULTILINE)
        return tuple(sorted(set(found)))

    @property
    def moves_gpu_memory(self) -> bool:
        """Whether UCX was built with CUDA and finds a GPU."""
        return not GPU_TRANSPORTS.isdisjoint(self.transports)


def versions() -> tuple[str, str]:
    """Versions of ucxx and of UCX. Raises TransportError when ucxx cannot be imported."""
    ucxx = _import()
    return ucxx.__version__, ".".join(map(str, ucxx.get_ucx_version()))


def open_library(host: str | None = None, *, on_gpu: bool = False) -> UcxLibrary:
    """Import ucxx, which takes about half a second, and make a context.

    With a loopback address as `host` nothing of it listens on another. `on_gpu`: for memory there,
    as far as UCX can. Raises TransportError with
    a remedy when it is missing or finds no network.
    """
    ucxx = _import()
    from ucxx._lib.arr import Array

    api = ucxx.libucxx
    defaults = dict(_DEFAULTS)
    if host is not None and is_loopback(host):
        defaults["NET_DEVICES"] = "lo"
    required = _REQUIRED | (_REQUIRED_ON_GPUS if on_gpu else {})
    for name in [name for name in defaults if f"UCX_{name}" in os.environ]:
        del defaults[name]
    try:
        context = api.UCXContext(defaults | required, (api.Feature.TAG, api.Feature.WAKEUP))
    except api.UCXError as error:
        raise TransportError(
            f"UCX cannot start: {error}; check the UCX_* environment variables, or use tcp"
        ) from error
    return UcxLibrary(api=api, array=Array, context=context, error=api.UCXError)


def _import() -> Any:
    # ucxx sets variables of UCX features that a machine without a GPU does not have; UCX would
    # complain about them on standard error in every worker.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    try:
        import ucxx
    except (ImportError, OSError) as error:  # OSError: a library of its own is missing
        raise TransportError(f"ucxx cannot be imported ({error}); {_REMEDY}") from error
    return ucxx
