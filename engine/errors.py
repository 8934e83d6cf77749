"""What the engine refuses when it starts, as sentences that a user can act on.

EngineError
├── ModelError         the files of a model are missing, damaged or of a kind that is not supported
├── MemoryBudgetError  the KV cache does not fit in the memory that is free
├── KernelError        the kernels that were asked for cannot run here
├── DeviceError        the device that was asked for is not there, or refuses what it is asked
└── DeviceMemoryError  bytes of a KV cache were asked for that are not in host memory
"""


class EngineError(Exception):
    """An engine cannot be started."""


class ModelError(EngineError):
    """The files of a model are missing, damaged or of a kind that is not supported."""


class MemoryBudgetError(EngineError):
    """The KV cache does not fit in the memory that is free."""


class KernelError(EngineError):
    """The kernels that were asked for cannot run here."""


class DeviceError(EngineError):
    """The device that was asked for is not there, or refuses what it is asked."""


class DeviceMemoryError(EngineError):
    """Bytes of a KV cache were asked for that are not in host memory."""
