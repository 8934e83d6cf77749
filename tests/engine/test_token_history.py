"""A history counts what was said, however it came to know it."""

from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory

token_ids = st.lists(st.integers(0, 200), max_size=300)


@given(prompt=token_ids, output=token_ids)
def test_distinct_tokens_with_their_counts_in_the_output(
    prompt: list[int], output: list[int]
) -> None:
    history = TokenHistory(prompt, output)
    counts = dict(zip(history.token_ids.tolist(), history.output_counts.tolist(), strict=True))
    assert counts == {token: output.count(token) for token in {*prompt, *output}}


@given(prompt=token_ids, output=token_ids)
def test_a_rebuilt_history_equals_one_that_grew(prompt: list[int], output: list[int]) -> None:
    grown = TokenHistory(prompt)
    for token in output:
        grown.append(token)
    rebuilt = TokenHistory(prompt, output)
    assert grown.token_ids.tolist() == rebuilt.token_ids.tolist()
    assert grown.output_counts.tolist() == rebuilt.output_counts.tolist()


def test_only_penalties_need_one() -> None:
    assert TokenHistory.for_params(SamplingParams(temperature=1.0, top_k=3), [1]) is None
    assert TokenHistory.for_params(SamplingParams(presence_penalty=0.1), [1]) is not None
