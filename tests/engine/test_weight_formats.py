"""Checkpoints that come quantised: the weights that each format stands for, and what runs them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_formats import AWQ, CASES, FP8_BLOCKS, GPTQ, SIZES, W4, W8, compressed
from packed_checkpoints import write_packed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.loading.checkpoint import Storage
from pagewire.engine.loading.safetensors import SafetensorsCheckpoint
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams

MakeModel = Callable[..., PreTrainedModel]

PROMPT = list(range(40))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def write(make_model: MakeModel, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """write(case, family): a tiny model in that format, and the same in floating point."""

    def run(name: str, family: str = "llama") -> tuple[Path, Path]:
        experts = {"moe_intermediate_size": 128} if family == "qwen3 moe" else {}
        make_model(family, **SIZES, **experts)
        pack, config, _ = CASES[name]
        write_packed(tmp_path, tmp_path / "packed", pack, config)
        return tmp_path / "packed", tmp_path

    return run


Write = Callable[..., tuple[Path, Path]]


def logits(path: Path, **options: Any) -> Tensor:
    runner = load_engine(path, **{"dtype": "float32", "num_pages": 1, **options})
    row = BatchRow(
        request_id="r", token_ids=PROMPT, start=0, page_table=[0], sampling=SamplingParams()
    )
    return runner.forward(Batch(rows=(row,)))[0]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def test_every_matrix_is_exactly_what_the_format_stands_for(case: str, write: Write) -> None:
    packed, plain = write(case)
    checkpoint = SafetensorsCheckpoint(packed)
    for name, weight in load_file(plain / "model.safetensors").items():
        into = torch.empty_like(weight)
        checkpoint.read(name, into)
        assert torch.equal(into, weight), name
        quantised = weight.ndim == 2 and ".layers." in name
        assert checkpoint.storage(name) is (CASES[case][2] if quantised else Storage.FLOAT)


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "qwen3 moe"])
@pytest.mark.parametrize("name", ["gptq asymmetric", "awq", "w4a16 symmetric", "fp8 per channel"])
def test_a_quantised_checkpoint_runs_in_floating_point_and_says_so(
    name: str, family: str, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    packed, plain = write(name, family)
    expected = logits(plain)
    with caplog.at_level(logging.INFO):
        assert torch.equal(logits(packed), expected)
    assert f"the files hold {SafetensorsCheckpoint(packed).quantized_as}" in caplog.text


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] is Storage.INT4])
def test_int4_runs_the_numbers_of_the_file(name: str, write: Write) -> None:
    """Weights are the same; activations in 8 bits and minima in float16 make the difference."""
    packed, plain = write(name)
    result = logits(packed, quantization=Quantization.INT4)
    assert relative_error(result, logits(plain)) < 0.05


@pytest.mark.usefixtures("native")
def test_blocks_of_4_bits_are_the_weights_of_the_file(write: Write) -> None:
    packed, plain = write("awq")
    checkpoint = SafetensorsCheckpoint(packed)
    name = "model.layers.1.mlp.down_proj.weight"
    blocks = checkpoint.read_int4(name)
    quants = torch.cat((blocks.quants & 15, blocks.quants >> 4), dim=2).float()
    restored = quants * blocks.scales.float()[..., None] + blocks.minima.float()[..., None]
    expected = load_file(plain / "model.safetensors")[name]
    torch.testing.assert_close(restored.flatten(1), expected, rtol=0, atol=2e-4)


@pytest.mark.usefixtures("native")
def test_int4_needs_groups_of_whole_blocks(write: Write) -> None:
    packed, _ = write("gptq groups of 16")
    with pytest.raises(ModelError, match=r"matrices that a file holds in 4 bits .* has none"):
        load_engine(packed, dtype="float32", num_pages=1, quantization=Quantization.INT4)
    with pytest.raises(ModelError, match="has no 4-bit blocks"):
        SafetensorsCheckpoint(packed).read_int4("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("name", ["w8a8", "gptq desc_act"])
def test_int8_quantises_what_the_file_stands_for(name: str, write: Write) -> None:
    packed, plain = write(name)
    result = logits(packed, quantization=Quantization.INT8)
    assert torch.equal(result, logits(plain, quantization=Quantization.INT8))
    assert relative_error(result, logits(plain)) < 0.05


@pytest.mark.parametrize("family", ["qwen2", "qwen3 moe"])
@pytest.mark.parametrize("name", ["gptq symmetric", "awq", "w4a16 asymmetric"])
def test_w4a16_runs_the_numbers_of_the_file(name: str, family: str, write: Write) -> None:
    packed, plain = write(name, family)
    result = logits(packed, quantization=Quantization.W4A16, kernels="torch")
    assert relative_error(result, logits(plain, kernels="torch")) < 1e-4


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", ["gptq desc_act", "gptq groups of 16"])
def test_w4a16_needs_groups_of_128(name: str, kernels: str, write: Write) -> None:
    packed, _ = write(name)
    with pytest.raises(ModelError, match=r"_proj some have groups .* 128 .* choose .* none"):
        logits(packed, quantization=Quantization.W4A16, kernels=kernels)


@pytest.mark.parametrize("name", ["fp8 per channel", "fp8 per tensor"])
def test_fp8_runs_the_numbers_of_the_file(name: str, write: Write) -> None:
    """They are not rounded again: only activations make a difference."""
    packed, plain = write(name)
    runner = load_engine(
        packed, dtype="float32", num_pages=1, quantization=Quantization.FP8, kernels="torch"
    )
    again = load_engine(plain, dtype="float32", num_pages=1, kernels="torch")
    assert runner.model.weight_bytes < again.model.weight_bytes / 2
    result = logits(packed, quantization=Quantization.FP8, kernels="torch")
    assert relative_error(result, logits(plain, kernels="torch")) < 0.1


def test_blocks_of_fp8_are_rounded_again_and_that_is_said(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    packed, plain = write("fp8 in blocks")
    options: dict[str, Any] = {"quantization": Quantization.FP8, "kernels": "torch"}
    result = logits(packed, **options)
    # Where a block is as wide as the matrix, outputs have one scale each.
    assert "2 matrices that the files hold in 8 bits are rounded to 8 bits again" in caplog.text
    assert relative_error(result, logits(plain, kernels="torch")) < 0.1


@pytest.mark.parametrize("quantization", [Quantization.FP8, Quantization.W4A16])
def test_numbers_of_another_kind_are_quantised_again(
    quantization: Quantization, write: Write
) -> None:
    packed, plain = write("w8a8")
    options: dict[str, Any] = {"quantization": quantization, "kernels": "torch"}
    result = logits(packed, **options)
    assert torch.equal(result, logits(plain, **options))
    assert relative_error(result, logits(plain, kernels="torch")) < 0.2


def test_a_matrix_of_another_size_is_refused_in_4_bits(write: Write) -> None:
    packed, _ = write("awq")
    path = packed / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 384}))
    with pytest.raises(ModelError, match=r"gate_proj has shape \[256, 128\], but .* \[384, 128"):
        logits(packed, quantization=Quantization.W4A16, kernels="torch")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'; supported are awq, compressed-tensors"),
        ({"quant_method": "fp8"}, r"weight_block_size is \[\]; only blocks of rows and columns"),
        ({**FP8_BLOCKS, "fmt": "e5m2"}, "fmt is 'e5m2'; only 'e4m3'"),
        ({"quant_method": "gptq", "bits": 8}, "bits is 8; of GPTQ only 4 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported are"),
        ({**GPTQ, "group_size": 0}, "group_size is 0; it must be at least 1, or -1"),
        ({**AWQ, "bits": 3}, "bits is 3; of AWQ only 4 bits"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; of AWQ only 'gemm'"),
        ({**AWQ, "zero_point": False}, "zero_point is False; of AWQ only weights with zeros"),
        (
            compressed("float-quantized", type="float", num_bits=8, strategy="block"),
            "strategy is 'block'; supported are tensor, channel, group",
        ),
        (compressed("nvfp4-pack-quantized", **W4), "weights are nvfp4-pack-quantized of int4"),
        (compressed("pack-quantized", **W8), "weights are pack-quantized of int8; supported are"),
        (
            {**compressed("pack-quantized", **W4), "sparsity_config": {"format": "x"}},
            "sparsity_config is .*; none is supported",
        ),
        (
            {**compressed("pack-quantized", **W4), "config_groups": {}},
            "config_groups quantise weights in 0 ways; only one way",
        ),
        ([], "quantization_config is .*; it must be a JSON object"),
    ],
)
def test_a_format_that_is_not_supported_is_refused(
    config: object, sentence: str, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(ModelError, match=sentence):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "tensor", "sentence"),
    [
        ("scales", None, r"q_proj.weight: there is no tensor .*q_proj.scales"),
        ("scales", torch.zeros(3, 5), r"q_proj.weight: scales have shape \[5, 3\]; .* \[128, 3"),
        ("qzeros", torch.zeros(2, 16), "tensor .*q_proj.qzeros is of type F32; supported are I32"),
        ("g_idx", torch.full((128,), 9, dtype=torch.int32), "groups are 9 to 9, with 1 scales"),
        ("g_idx", torch.zeros(7, dtype=torch.int32), r"groups of \[7\] features for 128 features"),
        (
            "qweight",
            torch.zeros(8, 128, dtype=torch.int32),
            r"groups of \[128\] features for 64 features",
        ),
    ],
)
def test_a_damaged_matrix_is_refused(
    suffix: str, tensor: Tensor | None, sentence: str, write: Write
) -> None:
    packed, _ = write("gptq symmetric")
    path = packed / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.1.self_attn.q_proj.{suffix}"
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path)
    with pytest.raises(ModelError, match=sentence):
        load_engine(packed, dtype="float32", num_pages=1)


def test_a_matrix_of_another_size_is_refused(write: Write) -> None:
    packed, _ = write("awq")
    path = packed / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 384}))
    with pytest.raises(ModelError, match=r"gate_proj.weight: its shape is \[256, 128\], but"):
        load_engine(packed, dtype="float32", num_pages=1)
