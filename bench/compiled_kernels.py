"""What the Triton kernels take of a Hopper GPU: registers, shared memory, matrix instructions.

Needs no GPU: every variant is compiled for sm_90 and its machine code read. Fails where one spills,
needs more shared memory than there is, or lacks its matrix instructions, and where one differs from
the results that are kept in `kernels/gpu/compiled_sm90.json`, by the same version of Triton.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

# Before triton is loaded, which could only interpret kernels then.
os.environ["TRITON_INTERPRET"] = "0"

import triton

from pagewire.kernels.gpu.compiled import Compiled, compile_variant
from pagewire.kernels.gpu.variant import Variant, all_variants

KEPT = Path(__file__).parents[1] / "kernels" / "gpu" / "compiled_sm90.json"
HOPPER = 90
OTHERS = (80, 89, 100)  # Ampere, Ada, Blackwell: that they compile is all that is asked

Table = dict[str, dict[str, Any]]


def compile_all(
    *, quick: bool, map_variants: Callable[..., Iterable[Compiled]] = map
) -> tuple[Table, list[str]]:
    """The table for sm_90, printed line by line, and what must not be.

    `map_variants` may compile them in processes of their own, given their places in the list.
    """
    table: Table = {}
    problems: list[str] = []
    print(f"{'kernel':44}{'registers':>10}{'spilled':>9}{'shared':>9}  instructions")
    variants = tuple(all_variants(quick=quick))
    compile_one = partial(compile_for_hopper, quick=quick)
    for variant, compiled in zip(
        variants, map_variants(compile_one, range(len(variants))), strict=True
    ):
        problems.extend(compiled.problems(variant))
        table[variant.name] = asdict(compiled)
        print(_line(variant, compiled), flush=True)
    return table, problems


def compile_for_hopper(index: int, *, quick: bool) -> Compiled:
    """The variant in this place: a kernel itself cannot be sent to another process."""
    return compile_variant(tuple(all_variants(quick=quick))[index], HOPPER)


def compile_elsewhere() -> None:
    for variant in all_variants():
        capabilities = [each for each in OTHERS if each >= variant.min_capability]
        for capability in capabilities:
            compile_variant(variant, capability)
        print(f"{variant.name} compiles for sm_{', sm_'.join(map(str, capabilities))}", flush=True)


def is_comparable(kept: Mapping[str, Any]) -> bool:
    """Whether this version of Triton made what is kept: others compile otherwise."""
    return bool(kept["triton"] == triton.__version__)


def differences(table: Table, kept: Mapping[str, Any], *, quick: bool) -> list[str]:
    """Between what was compiled now and what is kept; none if another Triton made that.

    With `quick` what was not compiled is no difference.
    """
    if not is_comparable(kept):
        return []
    variants: Table = kept["variants"]
    names = set(table) if quick else set(table) | set(variants)
    return [
        f"{name}: kept {variants.get(name)}, compiled {table.get(name)}; if that is meant, run "
        "this with --update"
        for name in sorted(names)
        if variants.get(name) != table.get(name)
    ]


def keep(table: Table) -> None:
    """One line a variant, so that a change of one is a change of its line."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(table[name])}" for name in table)
    version = json.dumps(triton.__version__)
    KEPT.write_text(f'{{\n  "triton": {version},\n  "variants": {{\n{lines}\n  }}\n}}\n')


def _line(variant: Variant, compiled: Compiled) -> str:
    instructions = ", ".join(f"{name} {count}" for name, count in compiled.instructions.items())
    return (
        f"{variant.name:44}{compiled.registers:>10}{compiled.spilled_bytes:>9}"
        f"{compiled.shared_bytes:>9}  {instructions}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_true", help="one variant of each kernel file")
    scope.add_argument("--all", action="store_true", help="also compile for other GPUs")
    scope.add_argument("--update", action="store_true", help="keep the results")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    table, problems = compile_all(quick=quick)
    if arguments.update:
        keep(table)
    problems += differences(table, json.loads(KEPT.read_text()), quick=quick)
    if arguments.all:
        compile_elsewhere()
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
