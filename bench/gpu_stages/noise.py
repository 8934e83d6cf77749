"""Random numbers in every page of a KV cache: a GPU takes less power, and is faster, over zeros."""

import torch

from pagewire.kernels.kv_pool import KVPool, quantize_vectors


def fill_with_noise(pool: KVPool) -> None:
    """In the pool's dtype, quantised where it has 8 bits."""
    values, scales = pool.values, pool.scales
    for page in range(len(values)):  # one by one: all in float32 may not fit
        floats = torch.randn(values.shape[1:], device=values.device)
        if scales is None:
            values[page] = floats.to(values.dtype)
        else:
            values[page], scales[page] = quantize_vectors(floats, values.dtype)
