"""Models whose matrices are in floating point, with every kernel that multiplies them."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_kernels import native_library
from torch import Tensor
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.loading import linears
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.precision import default_dtype
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels import cpu_flags
from pagewire.kernels.float_linear import FloatKernel
from pagewire.kernels.onednn_linear import has_onednn

PROMPT = list(range(40))
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@pytest.fixture(params=[each for each in FloatKernel if each is not FloatKernel.TRITON])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FloatKernel:
    """Each kernel of a CPU, chosen for all dtypes and whatever it can do."""
    kernel: FloatKernel = request.param
    if kernel is FloatKernel.NATIVE:
        native_library()
    if kernel is FloatKernel.ONEDNN and not has_onednn():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(linears, "choose_float_kernel", lambda *_: kernel)
    return kernel


def forward(runner: ModelRunner, *, sampled: bool = True) -> Tensor:
    row = BatchRow(
        request_id="r",
        token_ids=PROMPT,
        start=0,
        page_table=[0],
        sampling=SamplingParams() if sampled else None,
    )
    return runner.forward(Batch(rows=(row,)))


@pytest.mark.parametrize("family", ["llama tied", "qwen2"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_are_those_of_the_model(
    dtype: str,
    family: str,
    kernel: FloatKernel,
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model(family)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]

    with caplog.at_level(logging.INFO):
        runner = load_engine(tmp_path, dtype=dtype, num_pages=1)
    [logits] = forward(runner)

    assert logits.dtype == torch.float32
    assert (logits - expected).norm() / expected.norm() <= TOLERANCE[dtype]
    assert forward(runner, sampled=False).shape == (0, len(expected))
    assert f"matrices: {dtype} by {kernel}" in caplog.text


@pytest.mark.skipif(not has_onednn(), reason="torch was built without oneDNN")
def test_a_cpu_with_bfloat16_instructions_decodes_with_onednn(
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such a CPU is known by its flags alone; one without the instructions emulates them."""
    model = make_model("llama")
    flags = cpu_flags.cpu_flags() | {"avx512_bf16"}
    monkeypatch.setattr(cpu_flags, "cpu_flags", lambda: flags)

    with caplog.at_level(logging.INFO):
        runner = load_engine(tmp_path, dtype=default_dtype("cpu", "torch"), num_pages=1)
        [output] = generate(runner, [PROMPT], SamplingParams(max_tokens=8))

    assert "matrices: bfloat16 by oneDNN" in caplog.text
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + output])).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert (logits.max(dim=1).values - chosen <= TOLERANCE["bfloat16"] * logits.norm(dim=1)).all()


@pytest.mark.parametrize("kernel", [FloatKernel.NATIVE], indirect=True)
@pytest.mark.usefixtures("kernel")
def test_logits_of_bfloat16_are_not_rounded_to_it(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    logits = forward(load_engine(tmp_path, dtype="bfloat16", num_pages=1))
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("kernel", [FloatKernel.NATIVE], indirect=True)
@pytest.mark.usefixtures("kernel")
def test_a_tied_lm_head_is_a_copy(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tied = make_model("llama tied")
    parameters = sum(each.nbytes for each in tied.parameters() if each.ndim == 2)
    embedding = tied.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    runner = load_engine(tmp_path, dtype="float32", num_pages=1)
    assert runner.model.weight_bytes >= parameters + embedding.nbytes
