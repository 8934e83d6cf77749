"""Whole models with quantised matrices through Triton's interpreter, against plain torch."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_formats import CASES, SIZES
from packed_checkpoints import write_packed
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from torch import Tensor

from pagewire.engine.errors import KernelError
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.load import kv_layout, load_engine
from pagewire.engine.loading.quantized_matrices import NUMBERS
from pagewire.engine.loading.weights import load_model, open_checkpoint
from pagewire.engine.models.llama import LlamaModel
from pagewire.engine.quantization import Quantization
from pagewire.kernels import triton_ops
from pagewire.kernels.emulated_linear import EmulatedLinears
from pagewire.kernels.ops import AttentionBatch
from pagewire.kernels.quantized_linears import quantize_weight
from pagewire.kernels.select import Kernels, SelectedOps, select_ops
from pagewire.kernels.triton_ops import GPU

PAGE_SIZE = 16
PROMPT = [7, 150, 3, 88, 42, 190, 11, 64, 5]
# ‖error‖ of logits. A number at the border of two steps of 8 bits may be rounded to either.
ROUNDING = {Quantization.INT8: 2e-2, Quantization.FP8: 5e-2, Quantization.W4A16: 1e-4}


def triton(quantization: Quantization) -> SelectedOps:
    return select_ops(Kernels.TRITON, "cpu", fp8=quantization is Quantization.FP8)


def emulated() -> SelectedOps:
    """Plain torch with all that GPUs multiply."""
    linears = EmulatedLinears(dtypes=tuple(NUMBERS.values()))
    return replace(select_ops(Kernels.TORCH, "cpu"), quantized_linears=linears)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runner:
    """A model with one sequence, in pages 0 and on."""

    model: LlamaModel
    cache: KVCache

    @classmethod
    def load(cls, path: Path, selected: SelectedOps, quantization: Quantization) -> "Runner":
        checkpoint = open_checkpoint(path)
        model = load_model(
            checkpoint,
            dtype=torch.float32,
            device="cpu",
            selected=selected,
            quantization=quantization,
        )
        layout = kv_layout(checkpoint.config, page_size=PAGE_SIZE, dtype="float32")
        return cls(model=model, cache=KVCache(layout, 2))

    def logits(self, tokens: list[int], start: int) -> Tensor:
        """Of the last of `tokens`, whose first is at position `start`."""
        positions = torch.arange(start, start + len(tokens))
        batch = AttentionBatch(
            cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
            context_lens=torch.tensor([start + len(tokens)], dtype=torch.int32),
            page_table=torch.arange(2, dtype=torch.int32)[None],
            positions=positions,
            slots=positions,
            page_size=PAGE_SIZE,
        )
        last = torch.tensor([len(tokens) - 1])
        with torch.inference_mode():
            return self.model.forward(torch.tensor(tokens), batch, self.cache.pages, last)[0]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("quantization", NUMBERS)
@pytest.mark.parametrize("family", ["llama tied", "qwen2"])
def test_logits_and_greedy_tokens_are_those_of_the_emulation(
    family: str, quantization: Quantization, tmp_path: Path
) -> None:
    """Matrices have 48 inputs, which are no group of 128; qwen2 has a bias on q, k and v."""
    make_model(family, tmp_path, num_hidden_layers=1)
    runner = Runner.load(tmp_path, triton(quantization), quantization)
    reference = Runner.load(tmp_path, emulated(), quantization)
    tokens, start = PROMPT, 0
    for _ in range(2):
        logits, expected = (each.logits(tokens, start) for each in (runner, reference))
        error = ROUNDING[quantization]
        assert relative_error(logits, expected) < error
        token = int(logits.argmax())
        # The most likely one of both, or one as likely to rounding.
        assert expected.max() - expected[token] <= 2 * error * expected.norm()
        start += len(tokens)
        tokens = [token]


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.FP8])
def test_mixtures_run_in_8_bits(quantization: Quantization, tmp_path: Path) -> None:
    """With a shared expert, whose gate stays in floating point as the router does."""
    make_model("qwen2 moe", tmp_path, num_hidden_layers=1)
    runner = Runner.load(tmp_path, triton(quantization), quantization)
    reference = Runner.load(tmp_path, emulated(), quantization)
    error = relative_error(runner.logits(PROMPT, 0), reference.logits(PROMPT, 0))
    assert error < ROUNDING[quantization]


def test_mixtures_in_4_bits_are_refused(tmp_path: Path) -> None:
    make_model("qwen3 moe", tmp_path)
    with pytest.raises(KernelError, match=r"w4a16 .* mixtures of .*; choose int8 or fp8 or none"):
        load_engine(
            tmp_path,
            dtype="float32",
            num_pages=1,
            kernels="triton",
            quantization=Quantization.W4A16,
        )


@pytest.mark.parametrize("quantization", NUMBERS)
def test_logits_are_close_to_those_of_the_dequantised_weights(
    quantization: Quantization, tmp_path: Path
) -> None:
    """In float32: only the rounding of activations remains."""
    make_model("llama", tmp_path, num_hidden_layers=1)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    runner = Runner.load(tmp_path, triton(quantization), quantization)
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            matrix = quantize_weight(weight, NUMBERS[quantization])
            weights[name] = matrix.dequantized()
    save_file(weights, path)
    plain = Runner.load(tmp_path, select_ops(Kernels.TORCH, "cpu"), Quantization.NONE)
    # Two products behind one another in the attention, and two in the network.
    loss = {Quantization.INT8: 4 * 2e-2, Quantization.FP8: 4 * 5e-2, Quantization.W4A16: 1e-4}
    error = relative_error(runner.logits(PROMPT, 0), plain.logits(PROMPT, 0))
    assert error < loss[quantization]


QUANTIZATION_OF = {
    "gptq asymmetric": Quantization.W4A16,
    "awq": Quantization.W4A16,
    "w4a16 symmetric": Quantization.W4A16,
    "w8a8": Quantization.INT8,
    "w8 in groups": Quantization.INT8,
    "fp8 per channel": Quantization.FP8,
    "fp8 in blocks": Quantization.FP8,
    "fp8 per tensor": Quantization.FP8,
}
ROUNDED_AGAIN = ("w8 in groups", "fp8 in blocks")


@pytest.mark.parametrize("name", QUANTIZATION_OF)
def test_checkpoints_run_with_their_numbers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("llama", tmp_path, **{**SIZES, "num_hidden_layers": 1})
    pack, config, _ = CASES[name]
    packed = tmp_path / "packed"
    write_packed(tmp_path, packed, pack, config)
    quantization = QUANTIZATION_OF[name]
    with caplog.at_level(logging.INFO):
        runner = Runner.load(packed, triton(quantization), quantization)
    assert f"matrices: {quantization} by Triton on its interpreter; the files" in caplog.text
    assert ("rounded to 8 bits again" in caplog.text) == (name in ROUNDED_AGAIN)
    reference = Runner.load(packed, emulated(), quantization)
    error = relative_error(runner.logits(PROMPT, 0), reference.logits(PROMPT, 0))
    assert error < ROUNDING[quantization]


def test_an_lm_head_is_quantised_if_the_checkpoint_has_it_so(tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=1)
    pack, config, _ = CASES["w8a8"]
    packed = tmp_path / "packed"
    write_packed(tmp_path, packed, pack, config)
    path = packed / "model.safetensors"
    tensors = load_file(path)
    weight = tensors.pop("lm_head.weight")
    in_8_bits, _ = pack("lm_head", weight.shape)
    save_file({**tensors, **in_8_bits}, path)
    runner = Runner.load(packed, triton(Quantization.INT8), Quantization.INT8)
    logits = runner.logits(PROMPT, 0)
    assert logits.dtype is torch.float32
    reference = Runner.load(packed, emulated(), Quantization.INT8)
    assert relative_error(logits, reference.logits(PROMPT, 0)) < ROUNDING[Quantization.INT8]
    embedding = weight.shape[0] * weight.shape[1] * 4
    assert runner.model.weight_bytes < 2 * embedding


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"quantization": Quantization.INT4, "device": "meta"},
            "quantization int4 has no kernels for device meta; choose int8 or w4a16 or none",
        ),
        (
            {"quantization": Quantization.FP8, "device": "meta"},
            "quantization fp8 has no kernels for device meta; choose int8 or w4a16 or none",
        ),
    ],
)
def test_what_a_gpu_does_not_multiply_is_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ampere = GPU(title="Ampere", num_sms=108, has_tma=False, has_fp8=False)
    monkeypatch.setattr(triton_ops, "find_gpu", lambda device: ampere)
    make_model("llama", tmp_path)
    with pytest.raises(KernelError, match=sentence):
        load_engine(tmp_path, num_pages=1, **options)
