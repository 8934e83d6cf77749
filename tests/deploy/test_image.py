"""What can be said about the image without building it: its base, its user, its variants."""

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
GPU_VARIANTS = ("cu12", "cu13")
VARIANTS = ("cpu", *GPU_VARIANTS)


class Instruction(NamedTuple):
    word: str
    rest: str


class Stage(NamedTuple):
    base: str
    name: str
    instructions: list[Instruction]

    def all(self, word: str) -> list[str]:
        return [each.rest for each in self.instructions if each.word == word]

    @property
    def environment(self) -> dict[str, str]:
        pairs = re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', " ".join(self.all("ENV")))
        return {name: quoted or plain for name, quoted, plain in pairs}


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile, in their order."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name, []))
        elif stages:
            stages[-1].instructions.append(Instruction(word, rest.strip()))
    return stages


STAGES = parse(DOCKERFILE)
BY_NAME = {stage.name: stage for stage in STAGES}
FINAL = STAGES[-1]


def lineage(stage: Stage, variant: str) -> list[Stage]:
    """`stage` and what it is made from, down to the image of somebody else."""
    base = BY_NAME.get(stage.base.replace("${VARIANT}", variant))
    return [stage] if base is None else [stage, *lineage(base, variant)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_base_is_pinned_to_a_full_version(variant: str) -> None:
    bases = {lineage(stage, variant)[-1].base for stage in STAGES}
    assert bases
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", base) for base in bases)


def test_the_default_variant_needs_no_gpu() -> None:
    assert re.findall(r"^ARG VARIANT=(\w+)$", DOCKERFILE, re.MULTILINE) == ["cpu"]


def test_it_runs_as_a_user_without_rights() -> None:
    [user] = FINAL.all("USER")
    assert int(user) > 0  # a number: Kubernetes cannot tell a name from root's
    assert FINAL.instructions.index(Instruction("USER", user)) > max(
        index for index, each in enumerate(FINAL.instructions) if each.word in ("RUN", "COPY")
    )


def test_its_health_is_that_of_the_router() -> None:
    [check] = FINAL.all("HEALTHCHECK")
    [port] = FINAL.all("EXPOSE")
    assert f":{port}/health" in check


def test_compilers_stay_behind_but_for_what_triton_needs() -> None:
    installed = {
        variant: [
            command
            for stage in lineage(FINAL, variant)
            for command in stage.all("RUN")
            if "apt-get install" in command
        ]
        for variant in VARIANTS
    }
    assert installed["cpu"] == []
    assert all("g++" not in "".join(commands) for commands in installed.values())
    assert all("gcc libc6-dev" in "".join(installed[variant]) for variant in GPU_VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_installs_an_extra_that_exists(variant: str) -> None:
    extra = BY_NAME[f"build-{variant}"].environment["EXTRA"]
    assert extra in PROJECT["optional-dependencies"]
    assert extra == variant or variant == "cpu"


def test_the_image_for_the_cpu_has_what_the_tests_ran_with() -> None:
    environment = BY_NAME["build-cpu"].environment
    assert environment["TORCH"] in CONSTRAINTS
    assert not [line for line in CONSTRAINTS if re.search(environment["UNPINNED"], line)]


@pytest.mark.parametrize("variant", GPU_VARIANTS)
def test_what_comes_with_a_torch_for_cuda_is_not_pinned(variant: str) -> None:
    environment = BY_NAME[f"build-{variant}"].environment
    assert environment["TORCH"] in PROJECT["dependencies"]
    assert environment["TORCH_BUILD"].startswith(variant)
    unpinned = {
        line.partition("==")[0] for line in CONSTRAINTS if re.search(environment["UNPINNED"], line)
    }
    assert {"torch", "triton", "cuda-bindings", "ucxx-cu13", "libucx-cu13"} <= unpinned
    assert not {"numpy", "ray", "grpcio"} & unpinned


def test_extras_of_one_module_differ_in_their_cuda_only() -> None:
    extras = PROJECT["optional-dependencies"]
    assert [each.replace("cu12", "cu13") for each in extras["cu12"]] == extras["cu13"]


def test_the_sources_are_sent_without_what_was_built_here() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", "**/.venv", "**/*.so"} <= set(ignored)
    links = {path.name for path in (ROOT / "src" / "pagewire").iterdir() if path.is_symlink()}
    needed = links | {"src", "pyproject.toml", "setup.py", "constraints.txt", "README.md"}
    assert not needed & set(ignored)


def test_compose_shows_the_api_to_this_machine_only() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    [service] = compose["services"].values()
    [port] = FINAL.all("EXPOSE")
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "privileged" not in service


def test_compose_keeps_what_the_image_downloads() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    [service] = compose["services"].values()
    [target] = [volume.partition(":")[2] for volume in service["volumes"]]
    caches = FINAL.environment
    assert caches["HF_HOME"].startswith(f"{target}/")
    assert caches["TRITON_CACHE_DIR"].startswith(f"{target}/")
    context = ROOT / "deploy" / service["build"]["context"]
    assert (context / service["build"]["dockerfile"]).samefile(ROOT / "deploy" / "Dockerfile")
