"""Measures how the attention kernels are launched best on this GPU: an entry of the launch table.

`python bench/tune_kernels.py` prints it, `--write` puts it into kernels/gpu/launch_table.json.
Needs what gpu_check.py needs. Without a GPU it runs tiny sizes, with Triton's interpreter, to show
that it works, and writes nothing.
"""

import argparse
import json
import os
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

CANDIDATES = tuple(product((4, 8), (2, 3, 4)))  # warps, stages
COPIES = 3  # of all inputs, so that no cache holds them


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the entry in the launch table")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from pagewire.kernels.gpu.launch_table import PATH
    from pagewire.kernels.triton_device import is_interpreted
    from pagewire.kernels.triton_ops import find_gpu

    device = "cpu" if is_interpreted() else "cuda"
    name = find_gpu(device).title
    entry = tune(device)
    print(json.dumps({name: entry}, indent=2))
    if options.write and device == "cuda":
        write(PATH, name, entry)


def tune(device: str) -> dict[str, dict[str, int]]:
    """The fastest launch of each kernel, by its name in the launch table."""
    from triton.runtime.errors import OutOfResources

    from gpu_stages.cases.attention_cases import decode_case, prefill_case
    from gpu_stages.cases.kernel_case import Setting
    from gpu_stages.scale import choose_scale
    from gpu_stages.timing import median_ms
    from pagewire.kernels.gpu.launch_table import launch_table
    from pagewire.kernels.gpu.variant import LaunchConfig
    from pagewire.kernels.triton_ops import TritonOps, find_gpu

    scale, gpu = choose_scale(), find_gpu(device)
    kernels = {"decode_attention": decode_case, "prefill_attention": prefill_case}
    times: dict[str, dict[LaunchConfig, float]] = {}  # milliseconds, by kernel
    for warps, stages in CANDIDATES:
        config = LaunchConfig(num_warps=warps, num_stages=stages)
        table = replace(launch_table(gpu.title), decode_attention=config, prefill_attention=config)
        ops = TritonOps(gpu, launches=table)
        setting = Setting(scale=scale, sizes=scale.timed, ops=ops)
        for kernel, case in kernels.items():
            runs = [case(setting).run for _ in range(COPIES)]
            try:
                measured = median_ms(runs, device)
            except OutOfResources:  # of registers or shared memory: no candidate
                continue
            print(f"{kernel}: {warps} warps, {stages} stages: {measured:.3f} ms", flush=True)
            times.setdefault(kernel, {})[config] = measured
    fastest = {
        kernel: min(by_launch, key=by_launch.__getitem__) for kernel, by_launch in times.items()
    }
    return {kernel: asdict(launch) for kernel, launch in fastest.items()}


def write(path: Path, name: str, entry: dict[str, dict[str, int]]) -> None:
    """Put an entry into a table in place of its older one."""
    entries = json.loads(path.read_text())
    entries[name] = entry
    path.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
