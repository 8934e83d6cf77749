"""Whether KV pages may travel as they are configured to: a user's prompt can be read from them.

On a loopback address nobody else sees them. On any other they are encrypted, or the operator has
said that the network is their own.
"""

import ipaddress

from pagewire.kv_transfer.transport import TransportError

LOOPBACK = "127.0.0.1"
_CAN_ENCRYPT = ("auto", "tcp")  # auto leaves out what cannot
_STAYS_HERE = ("shm",)


class ExposureError(TransportError):
    """KV pages would cross a network unprotected."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Names but localhost are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_protected(kind: str, host: str, *, has_tls: bool, is_private: bool) -> None:
    """Raise ExposureError when transport `kind` would listen on `host` unprotected.

    And when TLS was asked for in vain. `is_private`: the operator vouches for the network.
    """
    if has_tls and kind not in _CAN_ENCRYPT:
        raise ExposureError(
            f"transport is {kind}, which cannot encrypt; choose auto or tcp, or give no "
            "kv_tls_cert, kv_tls_key and kv_tls_ca"
        )
    if not (has_tls or is_private or kind in _STAYS_HERE or is_loopback(host)):
        raise ExposureError(
            f"kv_host is {host}, from where KV pages would cross the network in the clear; give "
            "kv_tls_cert, kv_tls_key and kv_tls_ca, or insecure_kv if the network is your own"
        )
