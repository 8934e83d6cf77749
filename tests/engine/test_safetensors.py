"""Safetensors directories: shards, and each way in which one can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.errors import ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.sampling_params import SamplingParams

MakeModel = Callable[..., PreTrainedModel]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(make_model: MakeModel, tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    make_model("llama")
    return tmp_path


def refused(directory: Path, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        load_engine(directory, num_pages=1)


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensor(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path)


def test_a_sharded_model_equals_the_whole_one(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    prompts, sampling = [[1, 2, 3]], SamplingParams(max_tokens=8)
    whole = generate(load_engine(tmp_path, dtype="float32", num_pages=1), prompts, sampling)
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="50KB")
    assert (shards / INDEX).exists()

    sharded = generate(load_engine(shards, dtype="float32", num_pages=1), prompts, sampling)

    assert sharded == whole


def test_a_missing_shard_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "shards", rf"names {shard.name}, not found beside it; download")


def test_an_index_without_weight_map_is_refused(directory: Path) -> None:
    (directory / INDEX).write_text("{}")
    refused(directory, "has no weight_map")


def test_weights_are_converted_to_the_dtype_asked_for(
    make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("qwen2").bfloat16().save_pretrained(tmp_path / "half")
    runner = load_engine(tmp_path / "half", dtype="float32", num_pages=1)
    assert runner.kv_cache.pages.values.dtype == torch.float32
    assert len(generate(runner, [[1, 2]], SamplingParams(max_tokens=3))[0]) == 3


def test_a_truncated_file_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(directory, r"model.safetensors is truncated or damaged .*; download the model again")


def test_a_wrong_shape_is_refused_with_both_shapes(directory: Path) -> None:
    edit_tensor(directory, "model.norm.weight", torch.zeros(7))
    refused(
        directory, r"tensor model.norm.weight: its shape is \[7\], but config.json asks for \[48\]"
    )


def test_a_missing_tensor_is_named(directory: Path) -> None:
    edit_tensor(directory, "model.layers.1.self_attn.k_proj.weight", None)
    refused(directory, r"has no tensor model.layers.1.self_attn.k_proj.weight")


def test_a_tensor_of_several_matrices_has_the_rows_of_all(
    make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("phi3")
    edit_config(tmp_path, num_key_value_heads=3)
    refused(tmp_path, r"self_attn.qkv_proj.weight has 160 rows, but config.json asks for 192")


def test_integer_weights_are_refused(directory: Path) -> None:
    edit_tensor(directory, "model.norm.weight", torch.zeros(48, dtype=torch.int8))
    refused(directory, "tensor model.norm.weight: it is of type I8; supported are F32, F16, BF16")


def test_an_unknown_architecture_is_refused(directory: Path) -> None:
    edit_config(directory, model_type="gpt_neox")
    refused(
        directory,
        r"architecture 'gpt_neox' is not supported; supported are llama, mistral, mixtral, phi3",
    )


def test_a_damaged_config_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    refused(directory, "config.json cannot be read")
    (directory / "config.json").write_text("[]")
    refused(directory, "config.json is not a JSON object")


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused(directory, "has no safetensors files")


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")


def test_max_model_len_can_only_be_lowered(directory: Path) -> None:
    assert load_engine(directory, num_pages=1, max_model_len=50).max_model_len == 50
    with pytest.raises(ModelError, match=r"max_model_len is 2000; .* 1 to 1100"):
        load_engine(directory, num_pages=1, max_model_len=2000)
