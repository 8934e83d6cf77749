import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.router.stop import StopChecker


def run(stop: list[str], pieces: list[str]) -> tuple[str, str | None]:
    checker = StopChecker(stop)
    output = "".join(checker.push(piece) for piece in pieces)
    return output + ("" if checker.matched else checker.finish()), checker.matched


def reference(stop: list[str], text: str) -> tuple[str, str | None]:
    """By definition: the first prefix of the text that ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [each for each in stop if text[:end].endswith(each)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        ([], "text", ("text", None)),
        (["END"], "text END more", ("text ", "END")),
        (["END"], "text EN", ("text EN", None)),
        (["\n\n"], "a\nb\n\nc", ("a\nb", "\n\n")),
        (["abcd", "bc"], "abcd", ("a", "bc")),
        (["bc", "abc"], "abc", ("", "abc")),
        (["aab"], "aaab", ("a", "aab")),
    ],
)
def test_cuts_the_text_at_the_first_stop_string(
    stop: list[str], text: str, expected: tuple[str, str | None]
) -> None:
    assert run(stop, [text]) == expected


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_the_output_does_not_depend_on_the_pieces(stop: list[str], pieces: list[str]) -> None:
    assert run(stop, pieces) == reference(stop, "".join(pieces))


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    text=st.text("abc", max_size=20),
)
def test_what_was_emitted_is_never_taken_back_and_little_is_held(
    stop: list[str], text: str
) -> None:
    checker = StopChecker(stop)
    final, _ = reference(stop, text)
    emitted = ""
    for index, character in enumerate(text):
        emitted += checker.push(character)
        assert final.startswith(emitted)
        if checker.matched is None:
            assert index + 1 - len(emitted) < max(map(len, stop))


def test_nothing_is_emitted_after_a_match() -> None:
    checker = StopChecker(["x"])
    assert checker.push("ax") == "a"
    assert checker.push("more") == ""
    assert checker.finish() == ""
