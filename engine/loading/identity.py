"""Whether two workers run the same model: pages of one are worthless to another."""

import hashlib
from pathlib import Path

_SAMPLE_BYTES = 1 << 20


def model_digest(path: Path) -> bytes:
    """16 bytes of a GGUF file, or of the configuration and weights in a directory.

    Covers size, beginning and end of each file: headers with every name and shape, and enough of
    the weights to tell one training from another, in milliseconds. Raises OSError.
    """
    files = [path] if path.is_file() else [path / "config.json", *path.glob("*.safetensors")]
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()
