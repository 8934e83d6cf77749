"""Tensor parallelism of the engine: ranks in threads of one process, over real process groups."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from hypothesis import given
from hypothesis import strategies as st
from native_kernels import native_library
from packed_checkpoints import awq, random_numbers, write_packed
from tiny_models import VOCAB_SIZE
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__
from transformers import PreTrainedModel

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.loading.weights import open_checkpoint
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.process_group import ProcessGroup, join_group
from pagewire.engine.parallel.rank_group import RankGroup, RankLost, split_evenly
from pagewire.engine.parallel.shard import ModelShard
from pagewire.engine.parallel.tensor_parallel import TensorParallel
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams

T = TypeVar("T")

SHAPES = {
    2: {"num_attention_heads": 6, "num_key_value_heads": 2},
    4: {"num_attention_heads": 8, "num_key_value_heads": 2},  # each KV head on two ranks
}


def on_ranks(
    size: int, work: Callable[[ProcessGroup], T], *, in_rank_order: bool = False
) -> list[T]:
    """What `work` returns on each of the ranks of a group."""
    store = HashStore()

    def join_and_work(rank: int) -> T:
        return work(join_group(store, rank, size, in_rank_order=in_rank_order))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(join_and_work, range(size)))


def prompt(length: int) -> tuple[int, ...]:
    source = random.Random(length)
    return tuple(source.randrange(VOCAB_SIZE) for _ in range(length))


def row(token_ids: tuple[int, ...], start: int, page: int) -> BatchRow:
    return BatchRow(
        request_id="",
        token_ids=token_ids,
        start=start,
        page_table=range(page, page + 4),
        sampling=SamplingParams(),
    )


def load(path: Path, group: RankGroup | None, **options: Any) -> ModelRunner:
    parallel = TensorParallel(group=group) if group else None
    options = {"dtype": "float32", **options}
    return load_engine(path, num_pages=8, num_threads=1, parallel=parallel, **options)


def logits(path: Path, group: RankGroup | None = None, **options: Any) -> torch.Tensor:
    """Of a ragged prefill step, a step without samples and a decode step, as rank 0 has them."""
    runner = load(path, group, **options)
    first, second = prompt(70), prompt(9)
    silent = replace(row((3, 5), 70, 0), sampling=None)
    parts = [
        runner.forward(Batch(rows=(row(first, 0, 0), row(second, 0, 4)))),
        runner.forward(Batch(rows=(silent,))),
        runner.forward(Batch(rows=(row((7,), 72, 0), row((8,), 9, 4)))),
    ]
    assert len(parts[1]) == 0
    return torch.cat([parts[0], parts[2]])


def write_awq(make_model: Callable[..., PreTrainedModel], directory: Path, family: str) -> Path:
    """A model in AWQ's 4 bits: of two ranks, the second's inputs of down begin within a group."""
    make_model(family, hidden_size=128, intermediate_size=192, num_attention_heads=4, head_dim=32)
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}

    def pack(name: str, shape: torch.Size) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        numbers = random_numbers(shape, group_size=64)
        return awq(name, numbers), numbers.weight()

    write_packed(directory, directory / "packed", pack, config)
    return directory / "packed"


@pytest.mark.parametrize("size", SHAPES)
def test_logits_of_every_family_are_those_of_one_rank(
    size: int, family: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model(family, **SHAPES[size])
    expected = logits(tmp_path)
    [found, *_] = on_ranks(size, lambda group: logits(tmp_path, group))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.INT4])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_parts_have_the_groups_of_the_whole(
    quantization: Quantization,
    tied: bool,
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    if quantization is Quantization.INT4:
        native_library()
    model = make_model(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "llama", kind=Type.Q4_1)
    expected = logits(path, quantization=quantization)
    [found, _] = on_ranks(2, lambda group: logits(path, group, quantization=quantization))
    # A group of activations has a second term depending on what else its rank sees of the token.
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_ranks_read_their_parts_of_numbers_in_4_bits(
    family: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    path = write_awq(make_model, tmp_path, family)
    expected = logits(path)
    [found, _] = on_ranks(2, lambda group: logits(path, group))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_ranks_run_their_blocks_of_4_bits(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    native_library()
    path = write_awq(make_model, tmp_path, "llama")
    expected = logits(path, quantization=Quantization.INT4)
    [found, _] = on_ranks(2, lambda group: logits(path, group, quantization=Quantization.INT4))
    # As above: a second term of activations depends on what else a rank sees.
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3 moe", {"moe_intermediate_size": 41}, "must divide moe_intermediate_size, which is"),
        (
            "qwen2 moe",
            {"shared_expert_intermediate_size": 57},
            "must divide shared_expert_intermediate_size, which is 57",
        ),
    ],
)
def test_experts_that_cannot_be_split_are_refused(
    family: str,
    options: dict[str, int],
    message: str,
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    make_model(family, **options)
    config = open_checkpoint(tmp_path).config
    with pytest.raises(ModelError, match=message):
        ModelShard(config=config, size=2)


def test_bfloat16(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    make_model("llama")
    expected = logits(tmp_path, dtype="bfloat16")
    [found, _] = on_ranks(2, lambda group: logits(tmp_path, group, dtype="bfloat16"))
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_in_rank_order_a_row_has_the_same_bits_in_every_batch(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    native_library()
    make_model("llama", **SHAPES[4])

    def alone_and_in_a_batch(group: RankGroup) -> tuple[torch.Tensor, torch.Tensor]:
        runner = load(tmp_path, group, deterministic=True)
        mine = row(prompt(70), 0, 0)
        alone = runner.forward(Batch(rows=(mine,)))[0]
        return alone, runner.forward(Batch(rows=(row(prompt(33), 0, 4), mine)))[-1]

    [(alone, in_a_batch), *_] = on_ranks(4, alone_and_in_a_batch, in_rank_order=True)
    assert torch.equal(alone, in_a_batch)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (4, {}, r"size is 4; it must divide num_heads, which is 6\. Choose 1 or 2"),
        (3, {"intermediate_size": 81}, "size is 3; it must divide num_kv_heads, which is 2, or"),
        (2, {"intermediate_size": 81}, "must divide intermediate_size, which is 81"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(
    size: int,
    options: dict[str, int],
    message: str,
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    make_model("llama", **options)
    config = open_checkpoint(tmp_path).config
    with pytest.raises(ModelError, match=message):
        ModelShard(config=config, size=size)


def test_groups_of_quantised_matrices_are_not_cut(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    shard = ModelShard(config=open_checkpoint(tmp_path).config, size=2)
    with pytest.raises(ModelError, match=r"intermediate_size is 80: .* whole groups of 32 inputs"):
        replace(shard, config=replace(shard.config, head_dim=32)).require_whole_groups()
    with pytest.raises(ModelError, match=r"num_heads \* head_dim is 96"):
        shard.require_whole_groups()


def test_a_tensor_of_an_unknown_kind_is_refused(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    shard = ModelShard(config=open_checkpoint(tmp_path).config, size=2)
    with pytest.raises(ModelError, match=r"mlp\.router\.weight cannot be split"):
        shard.part("model.layers.0.mlp.router.weight")


@given(total=st.integers(1, 400), size=st.integers(1, 16))
def test_an_even_split_leaves_nothing_out_and_gives_nothing_twice(total: int, size: int) -> None:
    parts = [split_evenly(total, size, rank) for rank in range(size)]
    assert [index for part in parts for index in part] == list(range(total))
    assert len(parts[0]) == max(map(len, parts))


def test_a_rank_that_ends_is_missed() -> None:
    def first_leaves(group: ProcessGroup) -> None:
        if group.rank == 1:
            return
        group.all_reduce(torch.ones(4))

    with pytest.raises(RankLost, match="rank 0 of 2 waits for the others in vain"):
        on_ranks(2, first_leaves)


def test_a_rank_that_hangs_is_not_waited_for_without_end() -> None:
    store, is_over = HashStore(), Event()

    def work(rank: int) -> None:
        group = join_group(store, rank, 2, timeout=timedelta(seconds=1))
        if rank == 1:
            is_over.wait()
            return
        try:
            group.all_reduce(torch.ones(4))
        finally:
            is_over.set()

    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(work, rank) for rank in range(2))
        with pytest.raises(RankLost, match="rank 0 of 2 waits for the others in vain"):
            first.result()
        second.result()


def test_a_group_that_is_not_complete_cannot_be_joined() -> None:
    with pytest.raises(RankLost, match="rank 0 of 2 cannot join its group"):
        join_group(HashStore(), 0, 2, timeout=timedelta(milliseconds=100))
