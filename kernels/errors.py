"""Why operations of some kind cannot run in this process.

KernelsUnavailableError
└── NativeLibraryError      no library of C++ kernels can be used (native_library)
"""


class KernelsUnavailableError(Exception):
    """The operations that were asked for cannot run here."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy
