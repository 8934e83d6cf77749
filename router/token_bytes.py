"""The bytes that a vocabulary entry stands for, in the two notations of today's tokenizers.

A token need not be whole characters: text appears only when the bytes of several are joined.
"""

import re

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character; this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_of_character()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of an entry in the notation of GPT-2."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:  # added to the vocabulary as plain text
        return token.encode("utf-8")


def byte_fallback_bytes(token: str) -> bytes:
    """The bytes of an entry in the notation of SentencePiece."""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SENTENCEPIECE_SPACE, " ").encode("utf-8")
