import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from pagewire.router.detokenizer import Detokenizer
from pagewire.router.token_bytes import byte_fallback_bytes, byte_level_bytes
from pagewire.router.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.token_bytes)
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


@settings(max_examples=300)
@given(data=st.data())
def test_pieces_join_to_the_full_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = st.one_of(st.integers(0, 400), st.integers(0, tokenizer.vocab_size - 1))
    token_ids = data.draw(st.lists(ids, max_size=40))
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.backend.decode(token_ids)


# The vocabulary has no token for some control characters and for the bytes that begin
# characters above U+3FFFF.
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])))
def test_text_survives_the_way_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode_rendered(tokenizer.as_plain_text(text))
    assert "".join(pieces(tokenizer, token_ids)) == text


def test_a_character_of_several_tokens_appears_when_it_is_complete(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("\U0001f9d9")
    assert len(token_ids) > 1
    *incomplete, complete, _ = pieces(tokenizer, token_ids)
    assert not any(incomplete)
    assert complete == "\U0001f9d9"


def test_a_stream_that_ends_inside_a_character_shows_it(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("\U0001f9d9")[:-1]
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.backend.decode(token_ids) == "\ufffd"


def test_special_and_unknown_ids_have_no_text(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, [0, 2, tokenizer.vocab_size, 10**9]) == [""] * 5


def test_byte_level_notation() -> None:
    assert byte_level_bytes("\u0120a\u00c4\u012f") == b" a\xc4\x8d"
    assert byte_level_bytes("<\uff5ctool\uff5c>") == "<\uff5ctool\uff5c>".encode()


def test_byte_fallback_notation_agrees_with_the_decoder() -> None:
    vocab = ["\u2581a", "b", "<0xC3>", "<0xA9>", "\u2581", "<0x0A>"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={v: i for i, v in enumerate(vocab)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    ids = [0, 2, 3, 1, 4, 1, 5]
    detokenizer = Detokenizer(lambda token_id: byte_fallback_bytes(vocab[token_id]))
    assert "".join(map(detokenizer.push, ids)) == backend.decode(ids) == " a\u00e9b b\n"
