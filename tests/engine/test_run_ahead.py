"""Steps launched before the tokens of the one before are read: the very same tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.logit_adjustments import LogitAdjustments, UnreadTokens
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kernels.ops import LogitsError

PROMPTS = [(5, 9, 23, 9), (7,), tuple(range(40, 60))]
MAX_TOKENS = 24


@pytest.fixture
def runner(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> ModelRunner:
    make_model("llama", num_hidden_layers=1)
    runner = load_engine(
        tmp_path, dtype="float32", page_size=16, num_pages=16, kernels="torch", max_model_len=80
    )
    runner.kv_cache.pool.zero_()
    return runner


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 4},
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 1.2, "presence_penalty": 0.4, "temperature": 1.0, "seed": 5},
        {"logit_bias": ((3, 4.0), (11, 4.0)), "frequency_penalty": 0.9},
    ],
    ids=str,
)
def test_tokens_are_the_same(runner: ModelRunner, fields: dict[str, Any]) -> None:
    sampling = SamplingParams(max_tokens=MAX_TOKENS, **fields)
    expected = generate(runner, PROMPTS, sampling)
    assert generate(runner, PROMPTS, sampling, overlapped=True) == expected


@pytest.mark.parametrize("min_tokens", [0, 6])
def test_what_comes_behind_a_stop_token_is_thrown_away(
    runner: ModelRunner, min_tokens: int
) -> None:
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=6)
    plain = generate(runner, PROMPTS, sampling)
    stops = frozenset((plain[0][3], plain[1][9], plain[2][15]))  # they end at different steps
    sampling = replace(sampling, stop_token_ids=stops, min_tokens=min_tokens)
    expected = generate(runner, PROMPTS, sampling)
    assert len(expected[0]) < MAX_TOKENS
    assert generate(runner, PROMPTS, sampling, overlapped=True) == expected


def row(start: int, token: int, *, follows: int | None = None, **fields: Any) -> BatchRow:
    return BatchRow(
        request_id="r1",
        token_ids=[token],
        start=start,
        page_table=[0, 1],
        sampling=SamplingParams(num_logprobs=2),
        follows=follows,
        **fields,
    )


def test_rows_may_join_leave_and_change_places(runner: ModelRunner) -> None:
    def rows(**follows: int | None) -> tuple[BatchRow, ...]:
        return tuple(
            replace(row(1, token, follows=follows[name]), page_table=[page])
            for page, (name, token) in enumerate({"a": 3, "b": 4, "c": 5}.items())
            if name in follows
        )

    first = runner.launch(Batch(rows=rows(a=None, b=None)[::-1]))
    second = runner.launch(Batch(rows=rows(b=0, c=None)), previous=first)
    (token_of_b, _) = first.wait().tokens
    known = tuple(
        replace(each, token_ids=token_of_b if each.follows == 0 else each.token_ids, follows=None)
        for each in rows(b=0, c=None)
    )
    assert second.wait() == runner.execute(Batch(rows=known))


def test_a_row_behind_one_from_which_no_token_can_be_chosen_does_no_harm(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.full((1, runner.vocab_size), torch.nan)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_forward", lambda *arguments: logits)
        faulty = runner.launch(Batch(rows=(row(0, 3),)))
    ahead = runner.launch(Batch(rows=(row(1, 3, follows=0),)), previous=faulty)
    with pytest.raises(LogitsError):
        faulty.wait()
    assert len(ahead.wait().tokens) == 1


def test_rows_that_cannot_follow_are_refused(runner: ModelRunner) -> None:
    following = Batch(rows=(row(1, 3, follows=0),))
    with pytest.raises(ValueError, match="give its LaunchedStep"):
        runner.launch(following)
    one = runner.launch(Batch(rows=(row(0, 3),)))
    with pytest.raises(ValueError, match="follows row 1 of a step with 1"):
        runner.launch(Batch(rows=(row(1, 3, follows=1),)), previous=one)
    drafted = replace(row(0, 3), token_ids=[3, 4], num_drafts=1)
    with pytest.raises(ValueError, match="runs 2 tokens and samples 2"):
        runner.launch(following, previous=runner.launch(Batch(rows=(drafted,))))


tokens = st.integers(0, 9)


@settings(max_examples=60)
@given(
    prompt=st.lists(tokens, min_size=1, max_size=5),
    output=st.lists(tokens, max_size=6),
    last=tokens,
    fields=st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "frequency_penalty": st.sampled_from([0.3, 0.7]),
            "presence_penalty": st.sampled_from([0.0, -0.9]),
        }
    ),
)
def test_a_token_that_a_history_lacks_counts_as_if_it_were_in_it(
    prompt: list[int], output: list[int], last: int, fields: dict[str, Any]
) -> None:
    params = (SamplingParams(), SamplingParams(**fields), SamplingParams(**fields))
    torch.manual_seed(0)
    logits = torch.randn(3, 10)
    before, other = TokenHistory(prompt, output), TokenHistory([1], [2])
    after = TokenHistory(prompt, [*output, last])
    adjustments = LogitAdjustments(params, 10, logits.device)
    unread = UnreadTokens(rows=frozenset({1}), tokens=torch.tensor([8, last, 8]))
    with adjustments.applied(logits, [0] * 3, [None, after, other]):
        expected = logits.clone()
    raw = logits.clone()
    with adjustments.applied(logits, [0] * 3, [None, before, other], unread):
        assert torch.equal(logits, expected)
    assert torch.equal(logits, raw)
