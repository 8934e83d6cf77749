"""The shape of the repository: the import tree, and which folder may import which."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pagewire"

WORKER_PARTS = {"engine", "kv_transfer", "proto"}
ALLOWED = {
    "proto": set[str](),
    "kernels": set[str](),
    "router": {"proto"},
    "kv_transfer": {"kernels"},
    "engine": {"kernels", "kv_transfer", "proto"},  # proto for the hash of pages
    "worker": WORKER_PARTS,
    "prefill_worker": WORKER_PARTS | {"worker"},
    "decode_worker": WORKER_PARTS | {"worker"},
    "sim": WORKER_PARTS | {"router", "worker", "prefill_worker", "decode_worker"},
    "cluster": WORKER_PARTS | {"router", "worker", "prefill_worker", "decode_worker"},
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_tree_links_to_root(folder: str) -> None:
    link = PACKAGE / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{folder}"
    assert (ROOT / folder).is_dir()


def test_every_link_has_its_rules() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_symlink()} == set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_source_folders_are_namespaces(folder: str) -> None:
    # One would shadow other people's `kernels` and `proto` for programs that run in the root.
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_dependencies_point_one_way(folder: str) -> None:
    allowed = ALLOWED[folder] | {folder}
    wrong = [
        f"{path.relative_to(ROOT)} imports pagewire.{imported}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for imported in imported_folders(path)
        if imported not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("folder", sorted(set(ALLOWED) - {"proto"}))
def test_the_architecture_page_names_every_file(folder: str) -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    section = page.partition(f"### {folder}/:")[2].partition("\n##")[0]
    files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
    assert [str(file) for file in sorted(files) if f"`{file}`" not in section] == []


def test_the_architecture_page_names_every_benchmark() -> None:
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("### bench/:")[2]
    files = sorted(path.name for path in (ROOT / "bench").glob("*.py"))
    assert [file for file in files if f"| `{file}` |" not in section] == []


def test_make_bench_runs_what_has_a_quick_form() -> None:
    commands = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files = re.findall(r"bench/\w+\.py", commands.partition("for file in")[2].partition(";")[0])
    assert "bench/cpu.py" in files
    assert [file for file in files if '"--quick"' not in (ROOT / file).read_text()] == []


def test_command_line_knows_the_cluster_only() -> None:
    assert set(imported_folders(PACKAGE / "cli.py")) == {"cluster"}


def test_router_loads_no_tensors() -> None:
    modules = [f"pagewire.router.{path.stem}" for path in sorted((ROOT / "router").glob("*.py"))]
    program = (
        f"import sys\nimport {', '.join(modules)}\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def imported_folders(path: Path) -> Iterator[str]:
    """The part after `pagewire.` of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"pagewire.{alias.name}" for alias in node.names]
                if node.module == "pagewire"
                else [node.module]
            )
        for name in names:
            package, _, rest = name.partition(".")
            if package == "pagewire" and rest:
                yield rest.partition(".")[0]
