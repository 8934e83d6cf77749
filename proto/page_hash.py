"""Names the full pages of a token sequence, so that equal prefixes can be found again.

A page's hash covers all tokens up to its end: h_i = H(h_{i-1}, tokens of page i), with BLAKE2b
under a secret of the instance. Routers and workers use this very module, so they mean the same.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

HASH_BYTES = 16
KEY_BYTES = 32
_NO_PARENT = bytes(HASH_BYTES)


class PageKey(NamedTuple):
    """One full page of a sequence. Keys with equal fields stand for equal KV."""

    hash: bytes
    parent: bytes  # hash of the page before it
    content: bytes  # its token ids; of the first page also the salt


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHasher:
    """Cuts token sequences into pages and hashes these.

    `secret` is KEY_BYTES random bytes, made once for an instance and given to its routers and
    workers: without it nobody can predict a hash or search for two prompts with the same. Raises
    ValueError for a secret of another length or a page without slots.
    """

    secret: bytes
    page_size: int  # token slots

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"secret has {len(self.secret)} bytes; it must have {KEY_BYTES}")
        if self.page_size < 1:
            raise ValueError(f"page_size is {self.page_size}; it must be at least 1")

    def keys(
        self, token_ids: Sequence[int], salt: str = "", known: Sequence[PageKey] = ()
    ) -> tuple[PageKey, ...]:
        """The full pages of `token_ids`, in order; a partly filled last one has no key.

        Equal tokens under another `salt` have other keys. `known` are the keys of leading pages
        that were computed before, and are not computed again.
        """
        keys = list(known)
        for index in range(len(keys), len(token_ids) // self.page_size):
            start = index * self.page_size
            content = array("I", token_ids[start : start + self.page_size]).tobytes()
            if not keys:
                content = _encoded(salt) + content
            parent = keys[-1].hash if keys else _NO_PARENT
            keys.append(PageKey(self._hash(parent + content), parent, content))
        return tuple(keys)

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self.secret, digest_size=HASH_BYTES).digest()


def _encoded(salt: str) -> bytes:
    data = salt.encode()
    return len(data).to_bytes(4, "little") + data
