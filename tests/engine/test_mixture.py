"""Mixtures of experts: what config.json says of them, the names of their tensors, and their tokens.

`test_parity` runs them like every other family; here is what they alone have.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import greedy_tokens
from torch import Tensor
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.config import from_hugging_face
from pagewire.engine.errors import ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.mixture_config import MixtureConfig
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams

MakeModel = Callable[..., PreTrainedModel]

PROMPT = list(range(40))
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3_MOE: dict[str, Any] = {
    **MIXTRAL,
    "model_type": "qwen3_moe",
    "num_local_experts": None,
    "num_experts": 16,
    "moe_intermediate_size": 32,
}


@pytest.fixture(params=["mixtral", "qwen2 moe", "qwen3 moe"])
def mixture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits(runner: ModelRunner, prompt: list[int] = PROMPT) -> Tensor:
    row = BatchRow(
        request_id="r", token_ids=prompt, start=0, page_table=[0], sampling=SamplingParams()
    )
    return runner.forward(Batch(rows=(row,)))[0]


def expected_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.tensor([PROMPT])).logits[0, -1]
    return result


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def load(path: Path, **options: Any) -> ModelRunner:
    return load_engine(path, **{"dtype": "float32", "num_pages": 4, **options})


def test_64_greedy_tokens_equal_those_of_transformers(
    mixture: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(mixture)
    [output] = generate(load(tmp_path), [PROMPT], SamplingParams(max_tokens=64))
    assert output == greedy_tokens(model, PROMPT, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2, "mlp_only_layers": []},
        {"mlp_only_layers": [0, 1, 2]},
        {"num_experts_per_tok": 6},
    ],
    ids=str,
)
def test_every_switch_of_qwen3_moe(
    options: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("qwen3 moe", **options)
    assert relative_error(logits(load(tmp_path)), expected_logits(model)) < 1e-4


def test_experts_saved_as_one_tensor_are_the_same_model(
    mixture: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(mixture)
    fused = tmp_path / "fused"
    model.save_pretrained(fused, save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(fused / "model.safetensors"))
    torch.testing.assert_close(logits(load(fused)), logits(load(tmp_path)), rtol=0, atol=0)


def test_a_missing_expert_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("qwen3 moe")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.2\.mlp\.experts\.5\.up_proj"):
        load(tmp_path)


def test_a_fused_tensor_for_other_sizes_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    make_model("mixtral").save_pretrained(fused, save_original_format=False)
    config = fused / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 72}))
    with pytest.raises(
        ModelError, match=r"gate_proj.weight: its shape is \[80, 48\], but .* \[72, 48"
    ):
        load(fused)


def test_experts_in_8_bits(mixture: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Whatever runs them, the router stays in floating point."""
    model = make_model(mixture, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    runner = load(tmp_path, quantization=Quantization.INT8)
    assert relative_error(logits(runner), expected_logits(model)) < 0.1


@pytest.mark.usefixtures("native")
def test_a_prompt_has_the_same_logits_alone_and_in_a_batch(
    mixture: str, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model(mixture)
    runner = load(tmp_path, deterministic=True)
    rows = tuple(
        BatchRow(
            request_id=str(page),
            token_ids=PROMPT[: 40 - page],
            start=0,
            page_table=[page],
            sampling=SamplingParams(),
        )
        for page in range(4)
    )
    batched = runner.forward(Batch(rows=rows)).clone()
    for row, together in zip(rows, batched, strict=True):
        assert torch.equal(runner.forward(Batch(rows=(row,)))[0], together)


def test_all_experts_count_as_weights(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("mixtral")
    matrices = sum(each.nbytes for each in model.parameters() if each.ndim > 1)
    assert load(tmp_path, kernels="torch").model.weight_bytes == matrices


def test_a_mixtral_config() -> None:
    config = from_hugging_face(MIXTRAL)
    assert config.mixture == MixtureConfig(
        num_experts=8,
        experts_per_token=2,
        intermediate_size=128,
        renormalize=True,
        shared_intermediate_size=None,
        dense_layers=frozenset(),
    )
    assert config.rope_theta == 1_000_000.0
    assert config.sliding_window is None
    assert from_hugging_face({**MIXTRAL, "sliding_window": 64}).sliding_window == 64


def test_a_qwen3_moe_config() -> None:
    config = from_hugging_face({**QWEN3_MOE, "mlp_only_layers": [3], "decoder_sparse_step": 2})
    assert config.mixture == MixtureConfig(
        num_experts=16,
        experts_per_token=2,
        intermediate_size=32,
        renormalize=False,
        shared_intermediate_size=None,
        dense_layers=frozenset({0, 2, 3}),
    )
    assert config.qk_norm
    window = {"use_sliding_window": True, "sliding_window": 64}
    assert from_hugging_face({**QWEN3_MOE, **window}).sliding_window == 64


def test_a_qwen2_moe_config() -> None:
    values = {**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 96}
    config = from_hugging_face(values)
    assert config.mixture is not None
    assert config.mixture.shared_intermediate_size == 96
    assert config.qkv_bias and not config.qk_norm
    assert not from_hugging_face({**values, "qkv_bias": False}).qkv_bias


def test_the_number_of_experts_in_the_form_of_transformers_4_and_5() -> None:
    four = {**QWEN3_MOE, "num_experts": 16, "num_local_experts": None}
    five = {**QWEN3_MOE, "num_experts": None, "num_local_experts": 16}
    assert from_hugging_face(four) == from_hugging_face(five)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_experts": None}, "has no num_experts"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17; it must be 1 to .* 16"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be 1 to .* 16"),
        ({"moe_intermediate_size": 0}, "intermediate size is 0; it must be at least 1"),
        ({"moe_intermediate_size": None}, "has no moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be at least 1"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3; it must be a list of integers"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        ({"model_type": "deepseek_v3"}, "architecture 'deepseek_v3' is not supported"),
        ({"model_type": "qwen2_moe"}, "has no shared_expert_intermediate_size"),
        (
            {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 0},
            "intermediate size is 0; it must be at least 1",
        ),
        (
            {
                "model_type": "qwen2_moe",
                "shared_expert_intermediate_size": 8,
                "sliding_window": 64,
                "use_sliding_window": True,
            },
            "use_sliding_window is True; of qwen2_moe only False",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        from_hugging_face({**QWEN3_MOE, **values})
