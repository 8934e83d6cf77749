"""PageHasher: equal prefixes have equal keys, and nothing else has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.proto.page_hash import HASH_BYTES, KEY_BYTES, PageHasher, PageKey

HASHER = PageHasher(secret=bytes(KEY_BYTES), page_size=4)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=30)


def hashes(keys: tuple[PageKey, ...]) -> list[bytes]:
    return [key.hash for key in keys]


@given(first=tokens, second=tokens)
def test_two_sequences_share_the_keys_of_their_common_full_pages(
    first: list[int], second: list[int]
) -> None:
    common = 0
    while first[: common + 1] == second[: common + 1] and common < min(len(first), len(second)):
        common += 1
    pairs = zip(hashes(HASHER.keys(first)), hashes(HASHER.keys(second)), strict=False)
    assert sum(a == b for a, b in pairs) == common // 4


@given(token_ids=tokens, data=st.data())
def test_known_keys_are_continued(token_ids: list[int], data: st.DataObject) -> None:
    whole = HASHER.keys(token_ids, "salt")
    assert len(whole) == len(token_ids) // 4
    known = whole[: data.draw(st.integers(0, len(whole)))]
    assert HASHER.keys(token_ids, "salt", known) == whole


def test_a_hash_covers_what_comes_before() -> None:
    first, second = HASHER.keys([1, 2, 3, 4, 9, 9, 9, 9]), HASHER.keys([5, 6, 7, 8, 9, 9, 9, 9])
    assert first[1].content == second[1].content
    assert first[1].hash != second[1].hash
    assert first[1].parent == first[0].hash
    assert len(first[1].hash) == HASH_BYTES


@pytest.mark.parametrize(
    ("hasher", "salt"),
    [
        (PageHasher(secret=b"k" * KEY_BYTES, page_size=4), ""),
        (HASHER, "another tenant"),
        (PageHasher(secret=bytes(KEY_BYTES), page_size=2), ""),
    ],
)
def test_secret_salt_and_page_size_count(hasher: PageHasher, salt: str) -> None:
    token_ids = list(range(16))
    assert not set(hashes(hasher.keys(token_ids, salt))) & set(hashes(HASHER.keys(token_ids)))


def test_a_salt_is_not_mistaken_for_tokens() -> None:
    salt = "abcd"
    as_tokens = int.from_bytes(salt.encode(), "little")
    contents = {
        HASHER.keys([as_tokens, 1, 2, 3])[0].content,
        HASHER.keys([1, 2, 3, 4], salt)[0].content,
    }
    assert len(contents) == 2


@pytest.mark.parametrize(("secret", "page_size"), [(b"short", 4), (bytes(KEY_BYTES), 0)])
def test_what_cannot_be_is_refused(secret: bytes, page_size: int) -> None:
    with pytest.raises(ValueError, match=r"secret has 5 bytes|page_size is 0"):
        PageHasher(secret=secret, page_size=page_size)
