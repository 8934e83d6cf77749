"""Decode steps from recordings: the same logits, to the bit, as without."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.native_linear import NativeLinear

PAGE_SIZE = 16
NUM_PAGES = 40


def engine(path: Path) -> ModelRunner:
    """Skips a test where nothing records, since the C++ kernels were not built."""
    torch.manual_seed(0)
    runner = load_engine(
        path, dtype="float32", page_size=PAGE_SIZE, num_pages=NUM_PAGES, max_model_len=400
    )
    if runner.model.ops.recorder is None:
        pytest.skip("the C++ kernels were not built")
    return runner


def decode(starts: list[int], step: int) -> Batch:
    """One token for each row; rows have pages that lie apart."""
    rows = []
    for index, start in enumerate(starts):
        pages = range(index, NUM_PAGES, len(starts))[: start // PAGE_SIZE + 1]
        rows.append(
            BatchRow(
                request_id=str(index),
                token_ids=[(7 * index + step) % 190],
                start=start,
                page_table=list(pages),
                sampling=SamplingParams(),
            )
        )
    return Batch(rows=tuple(rows))


def without_recordings(runner: ModelRunner, batch: Batch) -> Tensor:
    """Beside a row that samples nothing, which no recorded step has."""
    extra = BatchRow(
        request_id="extra", token_ids=[1], start=0, page_table=[NUM_PAGES - 1], sampling=None
    )
    return runner.forward(Batch(rows=(*batch.rows, extra)))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_are_the_same_to_the_bit(
    kind: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model(kind)
    recorded, plain = engine(tmp_path), engine(tmp_path)
    # Numbers of rows come and go, contexts cross pages, and one is cut into parts.
    for step in range(40):
        starts = [[step], [14 + step, 3 + step], [2 * step, step, 30 + step]][step % 3]
        batch = decode(starts, step)
        expected = without_recordings(plain, batch)
        assert torch.equal(recorded.forward(batch), expected)
        used = plain.kv_cache.pool.view(NUM_PAGES, -1)[:-1]
        assert torch.equal(recorded.kv_cache.pool.view(NUM_PAGES, -1)[:-1], used)


def test_rows_of_several_tokens_share_recordings_with_others(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    recorded, plain = engine(tmp_path), engine(tmp_path)
    # Four tokens each: of one row with three drafts, of two rows, of four.
    for num_drafts in ([3], [1, 1], [0, 0, 0, 0], [2, 0], [3]):
        rows = decode([20 + index for index in range(len(num_drafts))], 0).rows
        batch = Batch(
            rows=tuple(
                replace(row, token_ids=[*row.token_ids, *range(count)], num_drafts=count)
                for row, count in zip(rows, num_drafts, strict=True)
            )
        )
        assert torch.equal(recorded.forward(batch), without_recordings(plain, batch))


def test_threads_may_change_between_the_layers_of_a_step(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    plain, runner = engine(tmp_path), engine(tmp_path)
    prompt = BatchRow(
        request_id="prompt",
        token_ids=[7 * index % 190 for index in range(300)],
        start=0,
        page_table=list(range(20)),
        sampling=SamplingParams(),
    )
    counts: list[int] = []

    def change() -> None:
        counts.append(torch.get_num_threads())
        torch.set_num_threads(3 - counts[-1])

    runner.call_between_layers(change)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = runner.forward(Batch(rows=(prompt,))).clone()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits, plain.forward(Batch(rows=(prompt,))))
    assert counts == [2, 1, 2, 1][: runner.model.config.num_layers]

    runner.forward(decode([5], 0))
    runner.forward(decode([6], 1))
    assert len(counts) <= 2 * runner.model.config.num_layers, "a recorded step changed them"


def test_a_model_that_cannot_be_recorded_runs_all_the_same(
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_model("llama")
    plain, runner = engine(tmp_path), engine(tmp_path)
    caplog.set_level("INFO")

    def multiply(linear: NativeLinear, x: Tensor) -> Tensor:
        weight = linear.weight.transpose(1, 2).flatten(0, 1)[: linear.out_features]
        return DenseLinear(weight=weight.to(x.dtype))(x)

    monkeypatch.setattr(NativeLinear, "__call__", multiply)
    for step in range(3):
        batch = decode([step, 5 + step], step)
        torch.testing.assert_close(runner.forward(batch), without_recordings(plain, batch))
    assert caplog.text.count("decode steps run without recordings") == 1
