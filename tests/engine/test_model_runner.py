"""What the runner refuses before it touches memory, and what it leaves out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pagewire.engine import model_runner
from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow, PageCopy
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams

GREEDY = SamplingParams()


@pytest.fixture
def runner(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> ModelRunner:
    make_model("llama")
    return load_engine(tmp_path, dtype="float32", num_pages=4, max_model_len=200)


def row(**values: Any) -> BatchRow:
    defaults = {
        "request_id": "r1",
        "token_ids": [1, 2, 3],
        "start": 0,
        "page_table": [0],
        "sampling": GREEDY,
    }
    return BatchRow(**{**defaults, **values})


def test_only_rows_that_sample_get_logits_and_tokens(runner: ModelRunner) -> None:
    batch = Batch(rows=(row(sampling=None), row(page_table=[1]), row(page_table=[2])))
    assert runner.forward(batch).shape == (2, runner.vocab_size)
    tokens = runner.execute(batch).tokens
    assert [len(row) for row in tokens] == [0, 1, 1]
    assert tokens[1] == tokens[2]


def test_a_batch_without_sampling_rows(runner: ModelRunner) -> None:
    assert runner.execute(Batch(rows=(row(sampling=None),))).tokens == ((),)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"token_ids": []}, r"r1 runs positions 0 to 0; they must be at least one"),
        ({"start": -1}, r"r1 runs positions -1 to 2"),
        (
            {"start": 198, "page_table": [0, 1, 2, 3]},
            r"positions 198 to 201; .* max_model_len, 200",
        ),
        ({"token_ids": [1, 193]}, r"token ids from 1 to 193; they must be 0 to 192"),
        ({"token_ids": [-1]}, r"token ids from -1 to -1"),
        ({"page_table": [4]}, r"pages from 4 to 4; they must be 0 to 3"),
        ({"page_table": [-1]}, r"pages from -1 to -1"),
        ({"page_table": []}, r"r1 has 0 pages for 3 tokens; it needs 1"),
        ({"start": 62}, r"r1 has 1 pages for 65 tokens; it needs 2"),
    ],
)
def test_a_row_out_of_range_is_refused_and_nothing_is_written(
    values: dict[str, Any], sentence: str, runner: ModelRunner
) -> None:
    runner.kv_cache.pool.fill_(7)
    with pytest.raises(ValueError, match=sentence):
        runner.execute(Batch(rows=(row(page_table=[1]), row(**values))))
    assert bool((runner.kv_cache.pool == 7).all())


def test_a_step_that_raises_half_way_is_over_before_anybody_hears_of_it(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def sample(*arguments: object) -> None:
        events.append("sample")
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(runner._sampler, "launch", sample)
    monkeypatch.setattr(model_runner, "wait_for", lambda device: events.append(f"wait {device}"))
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.launch(Batch(rows=(row(),)))
    assert events == ["sample", "wait cpu"]


def test_a_step_writes_the_slots_of_its_tokens_only(runner: ModelRunner) -> None:
    runner.kv_cache.pool.fill_(7)
    before = runner.kv_cache.pages.values.clone()
    runner.execute(Batch(rows=(row(start=63, token_ids=[5, 6], page_table=[3, 1]),)))
    written = (runner.kv_cache.pages.values != before).any(dim=-1)
    written = written.any(dim=1).any(dim=1).any(dim=1)  # [num_pages, slot]
    assert written.nonzero().tolist() == [[1, 0], [3, 63]]


def test_seeded_sampling_is_the_same_whatever_runs_beside_it(runner: ModelRunner) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, seed=42)
    prompt = [9, 8, 7]
    [alone] = generate(runner, [prompt], sampling)
    assert generate(runner, [[5] * 30, prompt, [6]], sampling)[1] == alone
    assert generate(runner, [prompt], sampling, chunk_size=2)[0] == alone


def test_prompts_that_do_not_fit_are_refused(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match="the prompts need 6 pages; the KV cache has 4"):
        generate(runner, [[1] * 60] * 3, SamplingParams(max_tokens=10))


def test_layers_that_are_reported_lie_in_pages(runner: ModelRunner) -> None:
    """In all rows of the step, whatever the rest of it writes after them."""
    runner.kv_cache.pool.zero_()
    pages = runner.kv_cache.pages.values  # [page, layer, ...]
    reported: dict[int, torch.Tensor] = {}
    rows = (row(page_table=[2]), row(page_table=[0], sampling=None))
    batch = Batch(rows=rows, layer_group_ends=(1, 3))
    result = runner.execute(batch, lambda count: reported.update({count: pages.clone()}))
    assert [*reported] == [1, 3]
    for num_layers, seen in reported.items():
        assert torch.equal(seen[:, :num_layers], pages[:, :num_layers])
        assert not seen[:, num_layers:].any()
    assert result == runner.execute(Batch(rows=rows))


def test_a_step_that_was_not_asked_reports_nothing(runner: ModelRunner) -> None:
    reported: list[int] = []
    runner.execute(Batch(rows=(row(),)), reported.append)
    assert reported == []


def test_the_transfer_code_and_the_model_share_the_pool(runner: ModelRunner) -> None:
    runner.execute(Batch(rows=(row(page_table=[2]),)))
    page_bytes = runner.layout.page_bytes
    page = runner.kv_cache.buffer()[2 * page_bytes : 3 * page_bytes]
    values = torch.frombuffer(page, dtype=torch.float32).view(3, 2, 2, 64, 16)
    assert torch.equal(values[:, :, :, :3], runner.kv_cache.pages.values[2, :, :, :, :3])
    page[:4] = b"\0\0\0\0"
    assert runner.kv_cache.pages.values[2, 0, 0, 0, 0, 0] == 0


def test_a_pool_without_pages_is_refused(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    with pytest.raises(ValueError, match="num_pages is 0; it must be at least 1"):
        load_engine(tmp_path, num_pages=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_right_drafts_give_the_tokens_of_as_many_steps(
    runner: ModelRunner, temperature: float, num_right: int
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=7, num_logprobs=0, max_tokens=9)
    (expected,) = generate(runner, [[1, 2, 3]], sampling)
    first, *following = expected
    wrong = [(token + 1) % runner.vocab_size for token in following]
    drafts = following[:num_right] + wrong[num_right:3]
    runner.execute(Batch(rows=(row(sampling=sampling),)))
    step = row(
        token_ids=[first, *drafts], start=3, sampling=sampling, output_position=1, num_drafts=3
    )
    other = row(page_table=[1], sampling=sampling)
    result = runner.execute(Batch(rows=(other, step, row(page_table=[2], sampling=None))))
    assert result.tokens == ((first,), tuple(following[: num_right + 1]), ())
    assert [len(result.logprobs[index]) for index in (0, 1)] == [1, num_right + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_siblings_get_the_tokens_of_rows_of_their_own(
    runner: ModelRunner, temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=7, num_logprobs=1)
    choices = [sampling.for_choice(choice) for choice in range(4)]
    rows = [row(sampling=each) for each in choices]
    expected = runner.execute(Batch(rows=tuple(rows)))
    together = row(sampling=choices[0], siblings=tuple(choices[1:]))
    others = (row(page_table=[1]), row(page_table=[2], sampling=None))
    result = runner.execute(Batch(rows=(others[0], together, others[1], rows[1])))
    tokens = tuple(token for (token,) in expected.tokens)
    assert result.tokens[1:] == (tokens, (), tokens[1:2])
    assert result.logprobs[1] == tuple(expected.logprobs[index][0] for index in range(4))
    assert (len(set(tokens)) == 1) is (temperature == 0.0)


def test_copies_are_made_before_the_rows_run(runner: ModelRunner) -> None:
    """Two sequences go on behind one prompt; the second reads a copy of its page."""
    runner.execute(Batch(rows=(row(page_table=[0]),)))
    follow = [row(start=3, token_ids=[9], page_table=[page]) for page in (0, 3)]
    copies = (PageCopy(source=0, destination=3),)
    tokens = runner.execute(Batch(rows=tuple(follow), copies=copies)).tokens
    assert tokens[0] == tokens[1]
    pages = runner.kv_cache.pages.values
    assert torch.equal(pages[0, :, :, :, :4], pages[3, :, :, :, :4])
