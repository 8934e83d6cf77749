"""How the KV cache is stored. Imports no torch: the command line knows the names."""

from enum import StrEnum


class KVCacheDtype(StrEnum):
    """What `--kv-cache-dtype` takes."""

    AUTO = "auto"  # the model's dtype
    INT8 = "int8"  # 8 bits, a scale for each token's K and V of each head

    def resolve(self, model_dtype: str) -> str:
        """The dtype of a KVLayout."""
        return model_dtype if self is KVCacheDtype.AUTO else self.value
