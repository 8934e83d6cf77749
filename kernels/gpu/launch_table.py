"""How the attention kernels are launched on each GPU: a table that is checked in, one entry a name.

Nothing is tuned while requests wait. `bench/tune_kernels.py` measures the entry of a GPU.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagewire.kernels.gpu.variant import LaunchConfig

PATH = Path(__file__).with_suffix(".json")
DEFAULT = "default"  # the entry of GPUs that have none


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTable:
    """One entry. For 16 bits: in float32 the kernels have launches of their own."""

    decode_attention: LaunchConfig
    prefill_attention: LaunchConfig


def launch_table(gpu: str) -> LaunchTable:
    """The entry of a GPU as torch names it; that of all others where it has none."""
    entries: Mapping[str, Mapping[str, Mapping[str, int]]] = json.loads(PATH.read_text())
    entry = entries.get(gpu, entries[DEFAULT])
    return LaunchTable(**{kernel: LaunchConfig(**config) for kernel, config in entry.items()})
