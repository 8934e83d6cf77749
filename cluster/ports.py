"""Ports that an instance listens on, taken before anything else is started.

A port that is taken is the commonest reason why a server does not start; it is told at once, with
the option that changes it.
"""

import errno
import socket

from pagewire.cluster.errors import ConfigError, PortTaken


def bind(host: str, port: int, *, option: str) -> socket.socket:
    """A socket bound to host:port that does not listen yet; `port` 0 takes any free one.

    Raises PortTaken, or ConfigError when `host` is no address of this machine; both name the
    `option` to change.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host} is no address; change --host") from error
    bound = socket.socket(family, kind, protocol)
    try:
        # On for the bind, so that connections of an earlier instance that are still closing do not
        # matter; off after it, or others could bind the port too until this socket listens.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        bound.close()
        raise _explain(error, host, port, option) from error
    return bound


def require_free(host: str, port: int, *, option: str) -> int:
    """`port`, or a free one for 0. It is not kept: somebody else binds it a moment later.

    Raises as `bind` does.
    """
    with bind(host, port, option=option) as bound:
        return int(bound.getsockname()[1])


def _explain(error: OSError, host: str, port: int, option: str) -> PortTaken | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"port {port} on {host} is taken by another process; "
            f"stop that, or choose another port with {option} ({option} 0: any free one)"
        )
    if error.errno == errno.EACCES:
        return PortTaken(f"port {port} needs privileges; choose one above 1023 with {option}")
    return ConfigError(f"cannot listen on {host}: {error.strerror}; change --host")
