from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pagewire.router.detokenizer import Detokenizer
from pagewire.router.output import OutputText
from pagewire.router.request import FinishReason, TokenUpdate
from pagewire.router.stop import StopChecker

END = 0  # the stop token; every other id is the byte of that value


def output_text(stop: Sequence[str] = (), stop_token_ids: Sequence[int] = ()) -> OutputText:
    return OutputText(
        detokenizer=Detokenizer(lambda token_id: bytes([token_id])),
        stop=StopChecker(stop),
        stop_token_ids=frozenset(stop_token_ids),
    )


def push(output: OutputText, data: bytes, reason: FinishReason | None = None) -> str:
    update = TokenUpdate(position=output.num_tokens, token_ids=tuple(data), finish_reason=reason)
    return output.push(update)


def test_the_stop_token_counts_but_has_no_text() -> None:
    output = output_text()
    assert push(output, b"ab") == "ab"
    assert output.finish_reason is None
    assert push(output, b"c\x00", FinishReason.STOP) == "c"
    assert output.finish_reason is FinishReason.STOP
    assert output.num_tokens == 4
    assert output.stop_reason is None


def test_a_stop_token_of_the_client_is_reported() -> None:
    output = output_text(stop_token_ids=[END])
    push(output, b"c\x00", FinishReason.STOP)
    assert output.stop_reason == END


def test_held_back_text_appears_at_the_end() -> None:
    output = output_text(stop=["END"])
    assert push(output, b"text EN") == "text "
    assert push(output, b"!", FinishReason.LENGTH) == "EN!"
    assert output.finish_reason is FinishReason.LENGTH


def test_an_incomplete_character_is_replaced_at_the_end() -> None:
    output = output_text(stop=["x"])
    assert push(output, b"a\xc3", FinishReason.LENGTH) == "a\ufffd"


def test_a_stop_string_ends_the_output_and_the_count() -> None:
    output = output_text(stop=["END"])
    assert push(output, b"text ENDmore") == "text "
    assert output.cut
    assert output.finish_reason is FinishReason.STOP
    assert output.stop_reason == "END"
    assert output.num_tokens == len("text END")


def test_a_stop_string_in_the_last_update_wins_over_the_length() -> None:
    output = output_text(stop=["END"])
    assert push(output, b"aEND", FinishReason.LENGTH) == "a"
    assert output.finish_reason is FinishReason.STOP


@given(
    data=st.binary(max_size=30).map(lambda each: each.replace(b"\x00", b"")),
    cuts=st.sets(st.integers(0, 30)),
    stop=st.lists(st.text("ab\u00e9", min_size=1, max_size=3), max_size=2),
)
def test_the_output_does_not_depend_on_the_grouping(
    data: bytes, cuts: set[int], stop: list[str]
) -> None:
    def run(bounds: list[int]) -> tuple[str, int, FinishReason | None]:
        output, text = output_text(stop=stop), ""
        for start, end in zip([0, *bounds], [*bounds, len(data)], strict=True):
            if output.finish_reason is None:
                reason = FinishReason.LENGTH if end == len(data) else None
                text += push(output, data[start:end], reason)
        return text, output.num_tokens, output.finish_reason

    assert run(sorted(cut for cut in cuts if cut < len(data))) == run([])
