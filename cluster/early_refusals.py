"""What every worker of an instance would refuse, refused before anything is started.

The rules are those of the engine and of the transports, which ask them again in the worker.
"""

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.errors import StartError
from pagewire.engine.emulation import require_cpu_kernels
from pagewire.engine.errors import EngineError
from pagewire.kv_transfer.nccl import require_gpu
from pagewire.kv_transfer.transport import TransportError

_FORMS = ("quantization", "draft_quantization", "kv_cache_dtype", "decode_kv_cache_dtype")


def require_runnable(config: ServeConfig, device: str) -> None:
    """Raise StartError, which names the parameter and the remedy, for what cannot run.

    `device` is where all workers run, cpu or cuda.
    """
    forms = {name: getattr(config, name) for name in _FORMS}
    try:
        if device == "cpu":
            given = {name: form for name, form in forms.items() if form is not None}
            require_cpu_kernels(config.kernels, given)
        if config.transport == "nccl":
            require_gpu(device)
    except (EngineError, TransportError) as error:
        raise StartError(str(error)) from error
