"""What can go wrong around the workers and the router, as the command line reports it.

ClusterError
├── ConfigError    a parameter is unknown or out of range: the command was not understood
├── PortTaken      something else listens where this instance shall
├── LaunchError    a process, or Ray itself, cannot be started
├── StartError     a worker ended, or was not ready in time, while the instance was starting
├── RequestError   a server refused a request, or does not answer
└── GpuDriverError the driver of the GPUs does not answer

The message of each is one or two sentences that name the parameter and the remedy.
"""


class ClusterError(Exception):
    """Base of all errors that the command line shows without a traceback."""


class ConfigError(ClusterError):
    """A parameter is unknown or out of range."""


class PortTaken(ClusterError):
    """Something else listens on the port."""


class LaunchError(ClusterError):
    """A process, or Ray itself, cannot be started."""


class StartError(ClusterError):
    """A worker ended, or was not ready in time, while the instance was starting."""


class RequestError(ClusterError):
    """A server refused a request, or does not answer."""


class GpuDriverError(ClusterError):
    """The driver of the GPUs is there and does not answer."""
