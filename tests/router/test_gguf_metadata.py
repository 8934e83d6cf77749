import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.router.gguf_metadata import GGUFError, read_metadata


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, value_type: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", value_type) + value


ENTRIES = [
    entry("name", 8, string("tin\u00fd")),
    entry("count", 4, struct.pack("<I", 7)),
    entry("scale", 6, struct.pack("<f", 0.5)),
    entry("flag", 7, b"\x01"),
    entry("words", 9, struct.pack("<IQ", 8, 2) + string("a") + string("bc")),
    entry("types", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
]
FILE = b"GGUF" + struct.pack("<IQQ", 3, 0, len(ENTRIES)) + b"".join(ENTRIES)


def read(tmp_path: Path, data: bytes) -> dict[str, object]:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return read_metadata(path)


def test_reads_every_kind_of_value(tmp_path: Path) -> None:
    assert read(tmp_path, FILE + b"weights") == {
        "name": "tin\u00fd",
        "count": 7,
        "scale": 0.5,
        "flag": True,
        "words": ["a", "bc"],
        "types": [1, -2, 3],
    }


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    for length in range(len(FILE)):
        with pytest.raises(GGUFError):
            read(tmp_path, FILE[:length])


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"PK\x03\x04" + FILE[4:], "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 9) + FILE[8:], "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("x", 99, b""), "type 99"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("x", 9, struct.pack("<IQ", 4, 2**60)),
            "damaged",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, complaint: str) -> None:
    with pytest.raises(GGUFError, match=complaint):
        read(tmp_path, data)


@settings(max_examples=200)
@given(position=st.integers(0, len(FILE) - 1), value=st.integers(0, 255))
def test_a_changed_byte_never_causes_another_exception(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    damaged = bytearray(FILE)
    damaged[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(GGUFError):
        read_metadata(path)
