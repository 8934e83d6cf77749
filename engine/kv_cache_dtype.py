"""How the KV cache is stored. Imports no torch: the command line knows the names."""

from enum import StrEnum


class KVCacheDtype(StrEnum):
    """What `--kv-cache-dtype` takes."""

    AUTO = "auto"  # the model's dtype
    INT8 = "int8"  # 8 bits, a scale for each token's K and V of each head
    FP8 = "fp8"  # e4m3, likewise

    def resolve(self, model_dtype: str) -> str:
        """The dtype of a KVLayout."""
        match self:
            case KVCacheDtype.AUTO:
                return model_dtype
            case KVCacheDtype.INT8:
                return "int8"
            case KVCacheDtype.FP8:
                return "float8_e4m3fn"
