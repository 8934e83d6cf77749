"""Models whose matrices are quantised, from the file to the logits."""

import logging
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from torch import Tensor
from transformers import PreTrainedModel

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import KernelError, ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.loading.checkpoint import Storage
from pagewire.engine.loading.dequantize import dequantize, int4_blocks
from pagewire.engine.loading.gguf import GGUFCheckpoint
from pagewire.engine.loading.gguf_header import TensorEntry
from pagewire.engine.loading.quantized_matrices import NUMBERS
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.quantized_linears import quantize_weight

MakeModel = Callable[..., PreTrainedModel]

PROMPT = list(range(40))
TOLERANCE = 0.05


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4)


def logits(path: Path, quantization: Quantization, kernels: str = "auto") -> Tensor:
    runner = load_engine(
        path, dtype="float32", num_pages=1, quantization=quantization, kernels=kernels
    )
    row = BatchRow(
        request_id="r", token_ids=PROMPT, start=0, page_table=[0], sampling=SamplingParams()
    )
    return runner.forward(Batch(rows=(row,)))[0]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def set_to_what_the_file_holds(model: PreTrainedModel, kind: Type) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                blocks = gguf.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.dequantize(blocks, kind)))


def expected_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.tensor([PROMPT])).logits[0, -1]
    return result


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1], ids=lambda kind: str(kind.name))
def test_int4_runs_the_weights_of_the_file(
    kind: Type, model: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "llama", kind=kind)
    set_to_what_the_file_holds(model, kind)

    assert relative_error(logits(path, Quantization.INT4), expected_logits(model)) < TOLERANCE


@pytest.mark.usefixtures("native")
def test_int8_in_the_kernels_is_close_to_the_model(model: PreTrainedModel, tmp_path: Path) -> None:
    assert relative_error(logits(tmp_path, Quantization.INT8), expected_logits(model)) < TOLERANCE


def test_int8_without_the_kernels_runs_in_torch_and_says_so(
    model: PreTrainedModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        result = logits(tmp_path, Quantization.INT8, kernels="torch")

    assert relative_error(result, expected_logits(model)) < TOLERANCE
    assert "matrices: int8 by plain torch: as configured" in caplog.text


@pytest.mark.usefixtures("model")
def test_int4_without_the_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs the C\+\+ kernels.* choose kernels auto, or"):
        logits(tmp_path, Quantization.INT4, kernels="torch")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", [None, Type.Q8_0])
def test_int4_needs_a_file_with_4_bit_blocks(
    kind: Type | None, model: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path
    if kind is not None:
        path = tmp_path / "tiny.gguf"
        write_gguf(path, model, "llama", kind=kind)
    with pytest.raises(ModelError, match=r"this model has none; choose such a file, or .* int8"):
        logits(path, Quantization.INT4)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1], ids=lambda kind: str(kind.name))
def test_blocks_stand_for_the_dequantised_values(kind: Type) -> None:
    values = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    raw = torch.from_numpy(gguf.quantize(values.numpy(), kind)).flatten()
    entry = TensorEntry(shape=(6, 96), type=kind, start=0, num_bytes=raw.numel())

    blocks = int4_blocks(raw, entry)

    quants = torch.cat((blocks.quants & 15, blocks.quants >> 4), dim=2).float()
    restored = quants * blocks.scales.float()[..., None] + blocks.minima.float()[..., None]
    torch.testing.assert_close(restored.flatten(1), dequantize(raw, entry), rtol=0, atol=1e-6)


def test_what_a_file_says_of_its_tensors(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    for kind, storage in (
        (Type.F16, Storage.FLOAT),
        (Type.Q4_1, Storage.INT4),
        (Type.Q8_0, Storage.QUANTIZED),
    ):
        write_gguf(path, model, "llama", kind=kind)
        checkpoint = GGUFCheckpoint(path)
        assert checkpoint.storage("lm_head.weight") is storage
        if storage is not Storage.INT4:
            with pytest.raises(ModelError, match=r"tensor output\.weight has no 4-bit blocks"):
                checkpoint.read_int4("lm_head.weight")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("quantization", [each for each in Quantization if each != "none"])
def test_plain_torch_multiplies_floats_alone_on_a_gpu(
    quantization: Quantization, tmp_path: Path
) -> None:
    with pytest.raises(KernelError, match=f"{quantization} has no .* device meta; choose none"):
        load_engine(
            tmp_path, device="meta", num_pages=1, quantization=quantization, kernels="torch"
        )


@pytest.mark.parametrize("quantization", [Quantization.FP8, Quantization.W4A16])
def test_what_is_emulated_runs_in_plain_torch_and_says_so(
    quantization: Quantization,
    model: PreTrainedModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Weights are those that the functions of `kernels` make; fp8 rounds activations besides."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                matrix = quantize_weight(parameter, NUMBERS[quantization])
                parameter.copy_(matrix.dequantized())

    with caplog.at_level(logging.INFO):
        result = logits(tmp_path, quantization, kernels="torch")

    tolerance = 0.3 if quantization is Quantization.FP8 else 1e-4
    assert relative_error(result, expected_logits(model)) < tolerance
    assert f"matrices: {quantization} by plain torch: as configured, emulated" in caplog.text


@pytest.mark.usefixtures("native", "model")
@pytest.mark.parametrize("quantization", [Quantization.FP8, Quantization.W4A16])
def test_what_has_no_kernels_is_refused(quantization: Quantization, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"no kernels for device cpu; choose int8, or kernels"):
        logits(tmp_path, quantization)


def test_memory_is_said_at_the_start(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied = make_model("llama tied")
    matrices = sum(each.nbytes for each in tied.parameters() if each.ndim == 2)

    with caplog.at_level(logging.INFO):
        runner = load_engine(tmp_path, dtype="float32", num_pages=3, kernels="torch")

    assert runner.model.weight_bytes == matrices
    assert "matrices: float32 by plain torch" in caplog.text
    assert "weights take 0 MB, 3 pages of float32 KV cache 0 MB" in caplog.text
