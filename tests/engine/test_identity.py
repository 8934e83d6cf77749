"""Digests tell models apart, wherever they differ a little."""

from pathlib import Path

from pagewire.engine.loading.identity import model_digest


def test_a_file_has_the_digest_of_its_content(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.gguf", "same.gguf", "other.gguf"))
    one.write_bytes(bytes(3 << 20))
    same.write_bytes(bytes(3 << 20))
    other.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert len(model_digest(one)) == 16
    assert model_digest(one) == model_digest(same) != model_digest(other)


def test_a_directory_has_the_digest_of_configuration_and_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = model_digest(tmp_path)
    (tmp_path / "README").write_text("does not matter")
    assert model_digest(tmp_path) == before
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert model_digest(tmp_path) != before
