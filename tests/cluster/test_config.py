"""Where parameters come from, which wins, and what is refused."""

import os
from pathlib import Path

import pytest

from pagewire.cluster.config import COMMAND_LINE, DEFAULT, ServeConfig, load_config
from pagewire.cluster.errors import ConfigError
from pagewire.engine.quantization import Quantization
from pagewire.worker import failpoint


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("PAGEWIRE_"):
            monkeypatch.delenv(variable)


def write(directory: Path, text: str) -> Path:
    file = directory / "pagewire.yaml"
    file.write_text(text)
    return file


def test_defaults_fit_a_first_start() -> None:
    loaded = load_config({})
    assert loaded.config == ServeConfig()
    assert (loaded.config.host, loaded.config.port) == ("127.0.0.1", 8000)
    assert set(loaded.origins.values()) == {DEFAULT}


def test_each_source_wins_over_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "port: 1\ndecode: 1\nprefill: 4\n")
    monkeypatch.setenv("PAGEWIRE_PORT", "2")
    monkeypatch.setenv("PAGEWIRE_DECODE", "2")
    loaded = load_config({"port": 3, "dtype": None}, file)
    assert (loaded.config.port, loaded.config.decode, loaded.config.prefill) == (3, 2, 4)
    assert loaded.origins["port"] == COMMAND_LINE
    assert loaded.origins["decode"] == "PAGEWIRE_DECODE"
    assert loaded.origins["prefill"] == str(file)
    assert loaded.origins["dtype"] == DEFAULT


def test_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load_config({}, write(tmp_path, "# nothing\n")).config == ServeConfig()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 9000\n", "port"),
        ("dekode: 2\n", "decode"),
        ("max-model-len: 100\n", "max_model_len"),
        ("1: 2\n", "1"),
    ],
)
def test_unknown_key_of_the_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config({}, write(tmp_path, text))


def test_unknown_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_DASHBORD_PORT", "1")
    with pytest.raises(ConfigError, match=r"PAGEWIRE_DASHBORD_PORT.*PAGEWIRE_DASHBOARD_PORT"):
        load_config({})


def test_the_failpoint_of_a_worker_is_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoint.VARIABLE, "decode-0:Frame:1")
    assert set(load_config({}).origins.values()) == {"default"}


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "a: [\n", "\x00"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"pagewire\.yaml"):
        load_config({}, write(tmp_path, text))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config({}, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("port", -1),
        ("prefill", 0),
        ("decode", 65),
        ("transport", "rdma"),
        ("dtype", "int8"),
        ("quantization", "int3"),
        ("kv_cache_dtype", "fp4"),
        ("kernels", "cuda"),
        ("decode_kv_cache_dtype", "fp4"),
        ("page_size", 48),
        ("decode_page_size", 48),
        ("num_pages", 0),
        ("queue_timeout_s", 0),
        ("lease_s", 0),
        ("max_parked_share", 0),
        ("max_parked_share", 1.1),
        ("max_waiting_handoffs", 0),
        ("hang_timeout_s", 0),
        ("step_timeout_s", 0),
        ("host", ""),
        ("model", ""),
    ],
)
def test_value_out_of_range_names_parameter_and_origin(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} \(command line\)"):
        load_config({name: value})


def test_a_draft_model_and_its_use_go_together() -> None:
    with pytest.raises(ConfigError, match=r"^draft_model: .*name the model that drafts"):
        load_config({"speculation": "draft"})
    with pytest.raises(ConfigError, match=r"^draft_model \(command line\).*speculation is ngram"):
        load_config({"speculation": "ngram", "draft_model": "small"})
    config = load_config({"speculation": "draft", "draft_model": "small"}).config
    assert (config.draft_model, config.draft_quantization) == ("small", Quantization.NONE)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("dtype", "bfloat16", "choose auto or float32, or device cuda"),
        ("quantization", "int8", "choose none"),
        ("kernels", "torch", "choose auto or native or triton"),
    ],
)
def test_deterministic_refuses_what_is_not(name: str, value: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"^deterministic .*{name} is {value}; {remedy}$"):
        load_config({"deterministic": True, name: value})


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_deterministic_refuses_ranks_that_sum_in_unlike_parts(role: str) -> None:
    name = f"{role}_tensor_parallel_size"
    with pytest.raises(ConfigError, match=rf"^deterministic .*{name} is 2: .*tensor_parallel_size"):
        load_config({"deterministic": True, name: 2})
    load_config({"deterministic": True, name: 2, "tensor_parallel_size": 2})


def test_deterministic_is_for_gpus_too() -> None:
    for values in ({"device": "cuda"}, {"device": "cuda", "dtype": "bfloat16"}, {"device": "auto"}):
        assert load_config({"deterministic": True, "kernels": "triton", **values}).config


def test_two_servers_cannot_have_one_port() -> None:
    with pytest.raises(ConfigError, match=r"^dashboard_port \(command line\).*HTTP API"):
        load_config({"port": 9000, "dashboard_port": 9000})
    assert load_config({"port": 0, "dashboard_port": 0}).config.port == 0


def test_value_from_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_PORT", "http")
    with pytest.raises(ConfigError, match=r"^port \(PAGEWIRE_PORT\) is 'http'"):
        load_config({})


def test_page_size_can_come_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_PAGE_SIZE", "128")
    assert load_config({}).config.page_size == 128


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in ServeConfig.model_fields.values())


TLS = {"kv_tls_cert": "worker.pem", "kv_tls_key": "worker.key", "kv_tls_ca": "ca.pem"}


@pytest.mark.parametrize("missing", TLS)
def test_tls_takes_all_of_its_files(missing: str) -> None:
    given = {name: path for name, path in TLS.items() if name != missing}
    with pytest.raises(ConfigError, match=f"kv_tls_ca.*give {missing}, too"):
        load_config(given)


def test_the_files_of_tls_come_together() -> None:
    files = load_config(TLS).config.kv_tls
    assert files is not None
    # A worker's process may run in another directory.
    assert (files.cert, files.key, files.ca) == tuple(map(os.path.abspath, TLS.values()))
    assert load_config({}).config.kv_tls is None


def test_kv_pages_cross_no_network_in_the_clear() -> None:
    with pytest.raises(ConfigError, match=r"kv_host is 192\.0\.2\.7.*insecure_kv"):
        load_config({"kv_host": "192.0.2.7"})
    assert load_config({"kv_host": "192.0.2.7", "insecure_kv": True}).config.insecure_kv
    assert load_config({"kv_host": "192.0.2.7", **TLS}).config.kv_host == "192.0.2.7"


def test_tls_needs_a_transport_that_has_it() -> None:
    with pytest.raises(ConfigError, match="gloo, which cannot encrypt"):
        load_config({"transport": "gloo", **TLS})
