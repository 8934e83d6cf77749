"""Which format the matrices of a safetensors directory are in, by its config.json."""

from collections.abc import Mapping
from typing import Any

from pagewire.engine.config_fields import Fields
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.awq import AWQFormat
from pagewire.engine.loading.block_fp8 import BlockFP8Format
from pagewire.engine.loading.compressed_tensors import CompressedTensorsFormat
from pagewire.engine.loading.gptq import GPTQFormat
from pagewire.engine.loading.stored_tensor import StoredTensor
from pagewire.engine.loading.weight_format import WeightFormat

METHODS = ("awq", "compressed-tensors", "fp8", "gptq")


def weight_format(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> WeightFormat | None:
    """The format of quantised matrices; None where config.json has no quantization_config.

    Raises ModelError for one that is not supported.
    """
    values = Fields(config).mapping("quantization_config")
    if not values:
        return None
    fields = Fields(values)
    method = fields.string("quant_method", "")
    try:
        match method:
            case "awq":
                return AWQFormat.of(fields, tensors)
            case "compressed-tensors":
                return CompressedTensorsFormat.of(fields, tensors)
            case "fp8":
                return BlockFP8Format.of(fields, tensors)
            case "gptq":
                return GPTQFormat.of(fields, tensors)
    except ModelError as error:
        raise ModelError(f"quantization_config: {error}") from error
    raise ModelError(
        f"quantization_config: quant_method is {method!r}; supported are {', '.join(METHODS)}"
    )
