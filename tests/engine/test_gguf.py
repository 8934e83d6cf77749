"""GGUF files written by the gguf library, read by the engine."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.errors import ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.loading import gguf as loading_gguf
from pagewire.engine.loading.checkpoint import Part
from pagewire.engine.loading.dequantize import SUPPORTED, dequantize
from pagewire.engine.loading.gguf import GGUFCheckpoint
from pagewire.engine.loading.gguf_header import TensorEntry, read_header
from pagewire.engine.models.rope import inverse_frequencies
from pagewire.engine.sampling_params import SamplingParams

MakeModel = Callable[..., PreTrainedModel]


def greedy(reference: PreTrainedModel, prompt: list[int], output: list[int]) -> list[int]:
    """The reference's choice after the prompt and after each output token but the last."""
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + output])).logits[0]
    tokens: list[int] = logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    return tokens


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("llama tied", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_a_gguf_model_generates_what_transformers_does(
    family: str, architecture: str, make_model: MakeModel, tmp_path: Path
) -> None:
    reference = make_model(family)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference, architecture)
    runner = load_engine(path, dtype="float32", num_pages=4)
    prompt = list(range(3, 80))

    [output] = generate(runner, [prompt], SamplingParams(max_tokens=12), chunk_size=50)

    assert output == greedy(reference, prompt, output)


def test_rope_factors_of_the_file_divide_the_frequencies(
    make_model: MakeModel, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    write_gguf(
        path,
        make_model("llama"),
        "llama",
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )

    checkpoint = GGUFCheckpoint(path)

    frequencies = inverse_frequencies(checkpoint.config, checkpoint.rope_factors())
    plain = inverse_frequencies(checkpoint.config)
    torch.testing.assert_close(frequencies, plain / torch.from_numpy(factors))


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
def test_dequantised_values_equal_those_of_the_library(kind: Type) -> None:
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (6, 4 * block_len)
    raw = _random_blocks(kind, 24, block_bytes)
    entry = TensorEntry(shape=shape, type=kind, start=0, num_bytes=raw.numel())

    values = dequantize(raw, entry)

    expected = torch.from_numpy(gguf.dequantize(raw.numpy(), kind)).view(shape)
    assert values.shape == shape
    assert torch.equal(values.float(), expected.float())


def _random_blocks(kind: Type, num_blocks: int, block_bytes: int) -> torch.Tensor:
    """Random blocks whose float16 scales, wherever a type has them, are finite."""
    generator = torch.Generator().manual_seed(int(kind))
    if kind in (Type.F32, Type.F16, Type.BF16):
        dtype = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}[kind]
        return torch.randn(num_blocks, generator=generator).to(dtype).view(torch.uint8)
    # Bytes below 0x70 give no float16 with all exponent bits set.
    return torch.randint(0x70, (num_blocks * block_bytes,), generator=generator).to(torch.uint8)


def test_an_unsupported_type_is_named() -> None:
    entry = TensorEntry(shape=(256,), type=Type.TQ1_0, start=0, num_bytes=54)
    with pytest.raises(ModelError, match=r"of type TQ1_0; supported are F32, .*Q4_1.*Q6_K"):
        dequantize(torch.zeros(54, dtype=torch.uint8), entry)


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_quantised_model_generates_what_its_dequantised_weights_do(
    kind: Type, make_model: MakeModel, tmp_path: Path
) -> None:
    reference = make_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
    )
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference, "llama", kind=kind)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                blocks = gguf.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.dequantize(blocks, kind)))
    runner = load_engine(path, dtype="float32", num_pages=1)
    prompt = list(range(20))

    [output] = generate(runner, [prompt], SamplingParams(max_tokens=12))

    assert output == greedy(reference, prompt, output)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_tensor_read_in_many_chunks_is_what_it_is_in_one(
    kind: Type, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q has its heads in another order, and parts are whole heads, too."""
    path = tmp_path / "tiny.gguf"
    shapes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
    write_gguf(path, make_model("llama", **shapes), "llama", kind=kind)
    checkpoint = GGUFCheckpoint(path)
    head_dim = checkpoint.config.head_dim
    parts = {
        "self_attn.q_proj.weight": Part(
            dim=0, index=range(head_dim, 4 * head_dim), size=8 * head_dim
        ),
        "self_attn.o_proj.weight": Part(dim=1, index=range(32, 96), size=8 * head_dim),
        "input_layernorm.weight": None,
    }

    def read(name: str, part: Part | None) -> torch.Tensor:
        shape = {None: (256,), 0: (3 * head_dim, 256), 1: (256, 64)}[part.dim if part else None]
        into = torch.empty(shape)
        checkpoint.read(f"model.layers.0.{name}", into, part)
        return into

    whole = {name: read(name, part) for name, part in parts.items()}
    monkeypatch.setattr(loading_gguf, "_CHUNK", 1)
    for name, part in parts.items():
        assert torch.equal(read(name, part), whole[name])


@pytest.fixture
def tiny_gguf(make_model: MakeModel, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, make_model("llama"), "llama")
    return path


def test_a_file_cut_anywhere_is_called_truncated(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    for length in (5, 20, 100, 3000, len(whole) // 2, len(whole) - 40):
        tiny_gguf.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model file tiny.gguf: is truncated"):
            GGUFCheckpoint(tiny_gguf)


def test_no_byte_of_a_header_can_crash_the_reader(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(4, 6000)] = rng.integers(256)
        try:
            read_header(memoryview(damaged))
        except ModelError:
            continue


def test_an_empty_file_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match=r"model file tiny.gguf cannot be read"):
        GGUFCheckpoint(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match=r"model file tiny.gguf: is not a GGUF file"):
        GGUFCheckpoint(path)


def test_wrong_shapes_are_refused_with_both_shapes(make_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path,
        make_model("llama"),
        "llama",
        change=lambda name, x: x[:, :-8].copy() if name == "blk.1.ffn_up.weight" else x,
    )
    with pytest.raises(
        ModelError,
        match=r"tensor blk.1.ffn_up.weight has shape \[80, 40\], .* asks for \[80, 48\]",
    ):
        load_engine(path, num_pages=1)


def test_a_missing_tensor_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path,
        make_model("llama"),
        "llama",
        change=lambda name, x: None if name == "blk.2.ffn_down.weight" else x,
    )
    with pytest.raises(ModelError, match=r"tiny.gguf has no tensor blk.2.ffn_down.weight"):
        load_engine(path, num_pages=1)


def test_an_unknown_architecture_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, make_model("llama"), "mamba")
    with pytest.raises(
        ModelError,
        match=r"architecture 'mamba' is not supported; supported are llama, qwen2, qwen3",
    ):
        load_engine(path, num_pages=1)


def test_mixtures_of_experts_and_split_files_are_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    model = make_model("llama")
    write_gguf(path, model, "llama", extra=lambda writer: writer.add_expert_count(8))
    with pytest.raises(ModelError, match="mixture of experts is not supported"):
        GGUFCheckpoint(path)
    write_gguf(path, model, "llama", extra=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelError, match="one part of several"):
        GGUFCheckpoint(path)
