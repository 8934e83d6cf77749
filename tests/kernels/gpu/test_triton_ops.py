"""A whole model through Triton's interpreter, and which operations a device gets."""

import importlib.util
from pathlib import Path

import pytest
import torch
import triton
from paged_case import PagedCase, Shape, assert_close
from tiny_models import make_model

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import KernelError
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import load_engine, select_kernels
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels import torch_ops
from pagewire.kernels.ops import SamplingRows, TokenActivation
from pagewire.kernels.select import Kernels, select_ops
from pagewire.kernels.triton_ops import GPU, TritonOps, find_gpu

OPS = TritonOps(find_gpu("cpu"))


def load(directory: Path, kernels: str) -> ModelRunner:
    return load_engine(
        directory, dtype="float32", page_size=16, num_pages=4, kernels=kernels, num_threads=1
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral window"])
def test_a_model_gives_the_logits_of_plain_torch(family: str, tmp_path: Path) -> None:
    options = {"sliding_window": 6} if family == "mistral window" else {}
    make_model(family, tmp_path, num_hidden_layers=2, **options)
    tokens = torch.randint(193, (22,), generator=torch.Generator().manual_seed(1)).tolist()

    def row(name: str, start: int, end: int, first_page: int) -> BatchRow:
        return BatchRow(
            request_id=name,
            token_ids=tokens[start:end],
            start=start,
            page_table=range(first_page, first_page + 2),
            sampling=SamplingParams(),
        )

    # Two prompts; then a chunk beside a token of decode; then tokens of decode alone.
    steps = (
        (row("a", 0, 15, 0), row("b", 0, 4, 2)),
        (row("a", 15, 21, 0), row("b", 4, 5, 2)),
        (row("a", 21, 22, 0), row("b", 5, 6, 2)),
    )
    runner, reference = load(tmp_path, "triton"), load(tmp_path, "torch")
    for rows in steps:
        logits, expected = (each.forward(Batch(rows=rows)) for each in (runner, reference))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_run_in_one_product(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path, num_hidden_layers=1)
    row = BatchRow(
        request_id="a",
        token_ids=[5, 6, 7],
        start=0,
        page_table=range(1),
        sampling=SamplingParams(),
    )
    runner, reference = load(tmp_path, "triton"), load(tmp_path, "torch")
    logits, expected = (each.forward(Batch(rows=(row,))) for each in (runner, reference))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # the second has a kernel for decode
@pytest.mark.parametrize("kv_cache_dtype", [KVCacheDtype.INT8, KVCacheDtype.FP8])
def test_a_model_over_a_pool_in_8_bits(
    kv_cache_dtype: KVCacheDtype, dtype: str, tmp_path: Path
) -> None:
    """A step of a value where the rotation of a key rounds differently is all that may differ."""
    make_model("llama", tmp_path, num_hidden_layers=2)
    tokens = torch.randint(193, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = []
    for kernels in ("triton", "torch"):
        runner = load_engine(
            tmp_path,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            page_size=16,
            num_pages=2,
            kernels=kernels,
            num_threads=1,
        )
        for start, end in ((0, 19), (19, 20)):
            row = BatchRow(
                request_id="a",
                token_ids=tokens[start:end],
                start=start,
                page_table=range(2),
                sampling=SamplingParams(),
            )
            logits.append(runner.forward(Batch(rows=(row,))))
    for found, expected in zip(logits[:2], logits[2:], strict=True):
        assert_close(found, expected.double(), 2e-2)


def test_decode_in_16_bits_is_split_among_programs() -> None:
    case = PagedCase(Shape(rows=((1, 70), (1, 3))), torch.float16)
    assert_close(case.attention(OPS, None), case.expected(None))
    assert_close(case.attention(OPS, 20), case.expected(20))
    tma = TritonOps(GPU(title="Hopper", num_sms=2, has_tma=True, has_fp8=True))
    assert_close(case.attention(tma, None), case.expected(None))


def test_tokens_are_those_of_plain_torch() -> None:
    logits = torch.randn(3, 193, generator=torch.Generator().manual_seed(1)) * 3
    rows = SamplingRows(
        temperature=torch.tensor([0.0, 1.0, 0.7]),
        top_k=torch.tensor([193, 193, 5]),
        top_p=torch.tensor([1.0, 0.9, 1.0], dtype=torch.float64),
        min_p=torch.zeros(3),
        vocab_size=193,
    )
    uniform = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    reference = torch_ops.TorchOps()
    tokens = OPS.plan_sampling(rows).run(logits, uniform)
    assert torch.equal(tokens, reference.plan_sampling(rows).run(logits, uniform))
    result, expected = (
        ops.logprobs(logits, torch.tensor([2, 0]), tokens[[2, 0]], 4) for ops in (OPS, reference)
    )
    assert torch.equal(result.top_ids, expected.top_ids)
    torch.testing.assert_close(result.top, expected.top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.sampled, expected.sampled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_operations_quantize_their_results(dtype: torch.dtype) -> None:
    ops = TritonOps(find_gpu("cpu"), activations=dtype)
    x, residual = torch.randn(2, 3, 64)
    weight = torch.randn(64)
    added, total = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    added_quantized, same_total = ops.add_rms_norm(x, residual.clone(), weight, 1e-5, quantize=True)
    assert torch.equal(total, same_total)
    for plain, result in (
        (ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5, quantize=True)),
        (added, added_quantized),
        (ops.silu_mul(x), ops.silu_mul(x, quantize=True)),
    ):
        assert isinstance(plain, torch.Tensor) and isinstance(result, TokenActivation)
        expected = ops.quantize(plain)
        assert result.values.dtype is dtype
        assert torch.equal(result.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(result.scales, expected.scales)


def test_a_gpu_gets_triton() -> None:
    for kernels in (Kernels.AUTO, Kernels.TRITON):
        selected = select_ops(kernels, "cuda")
        assert isinstance(selected.ops, TritonOps)
        assert selected.explanation == "Triton on its interpreter"
        assert selected.library is None
    assert isinstance(select_ops(Kernels.TORCH, "cuda").ops, torch_ops.TorchOps)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(KernelError, match=r"kernels is triton: .* on a GPU, not on cpu; choose"):
        select_kernels("triton", "cpu")


def test_without_triton_a_gpu_gets_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    selected = select_ops(Kernels.AUTO, "cuda")
    assert isinstance(selected.ops, torch_ops.TorchOps)
    assert selected.explanation == "plain torch: triton is not installed"
    with pytest.raises(KernelError, match="triton is not installed; pip install triton"):
        select_kernels("triton", "cuda")
    with pytest.raises(KernelError, match=r"deterministic needs .* triton is not installed"):
        select_kernels("auto", "cuda", deterministic=True)


def test_the_interpreter_is_refused_where_it_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="wrong in bfloat16; choose dtype float32"):
        load_engine(tmp_path, dtype="bfloat16", kernels="triton")
