"""The parameters of `pagewire serve`, and where each value comes from.

The command line wins over environment variables (``PAGEWIRE_PORT=…``), these over the YAML file
of ``--config``, that over the defaults. An unknown key is an error wherever it stands.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from pagewire.cluster.errors import ConfigError
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.quantization import Quantization
from pagewire.kv_transfer.exposure import LOOPBACK, ExposureError, require_protected
from pagewire.kv_transfer.layout import PAGE_SIZES
from pagewire.kv_transfer.tls import TlsFiles
from pagewire.worker import failpoint

ENV_PREFIX = "PAGEWIRE_"
COMMAND_LINE = "command line"
DEFAULT = "default"
_TLS_PAIR = ("kv_tls_cert", "kv_tls_key")


def _known_page_size(value: int) -> int:
    if value not in PAGE_SIZES:
        raise ValueError(f"choose one of {', '.join(map(str, PAGE_SIZES))}")
    return value


PageSize = Annotated[int, AfterValidator(_known_page_size)]


class ServeConfig(BaseSettings):
    """Everything that one instance is started with. Made by `load_config`."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), env_prefix=ENV_PREFIX
    )

    model: str | None = Field(
        default=None,
        min_length=1,
        description="GGUF file, safetensors directory or Hugging Face id; none: SmolLM2",
    )
    served_model: str | None = Field(
        default=None, min_length=1, description="the name that clients use"
    )
    prefill: int = Field(default=1, ge=1, le=64, description="prefill workers")
    decode: int = Field(default=1, ge=1, le=64, description="decode workers")
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=64, description="processes that compute one worker's model together"
    )
    prefill_tensor_parallel_size: int | None = Field(
        default=None, ge=1, le=64, description="of prefill workers; none: tensor_parallel_size"
    )
    decode_tensor_parallel_size: int | None = Field(
        default=None, ge=1, le=64, description="of decode workers; none: tensor_parallel_size"
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address of the HTTP API")
    port: int = Field(
        default=8000, ge=0, le=65535, description="port of the HTTP API; 0: any free one"
    )
    dashboard_port: int = Field(
        default=8265, ge=0, le=65535, description="port of Ray's dashboard; 0: any free one"
    )
    launcher: Literal["ray", "subprocess"] = Field(
        default="ray", description="what starts the workers"
    )
    transport: Literal["auto", "shm", "ucx", "nccl", "gloo", "tcp"] = Field(
        default="auto", description="what carries KV pages"
    )
    kv_host: str = Field(
        default=LOOPBACK, min_length=1, description="address on which workers take KV pages"
    )
    kv_tls_cert: str | None = Field(
        default=None, min_length=1, description="PEM certificate of the workers, for TLS over tcp"
    )
    kv_tls_key: str | None = Field(default=None, min_length=1, description="its key, not encrypted")
    kv_tls_ca: str | None = Field(
        default=None,
        min_length=1,
        validate_default=True,
        description="PEM certificate of the authority that signs workers, and nothing else",
    )
    insecure_kv: bool = Field(
        default=False,
        validate_default=True,
        description="let KV pages cross the network in the clear: it is your own",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="what workers run on; cuda: a GPU for each, auto: if there are enough",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="weights and KV cache; auto: what the device is fast in"
    )
    quantization: Quantization = Field(
        default=Quantization.NONE,
        description="matrices: none, int8, int4 as a file has them, fp8 or w4a16",
    )
    kv_cache_dtype: KVCacheDtype = Field(
        default=KVCacheDtype.AUTO,
        description="KV cache: auto, that is dtype, int8 for about twice as many pages, or fp8",
    )
    decode_kv_cache_dtype: KVCacheDtype | None = Field(
        default=None, description="of decode workers; none: that of prefill workers, kv_cache_dtype"
    )
    page_size: PageSize = Field(default=64, description="token slots of a page")
    decode_page_size: PageSize | None = Field(
        default=None, description="of decode workers; none: that of prefill workers, page_size"
    )
    num_pages: int | None = Field(
        default=None, ge=1, description="pages of a worker; none: by memory"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="tokens, prompt plus output; none: what the model says"
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="compute threads of a worker; none: the cores, shared out step by step",
    )
    kernels: Literal["auto", "native", "torch", "triton"] = Field(
        default="auto",
        description="operations in C++ (native), Triton or torch; auto: what the device runs best",
    )
    deterministic: bool = Field(
        default=False,
        description="results that are the same to the bit in every batch; slower, float32 on a CPU",
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="prompt tokens of one prefill step; none: 512 on a CPU, 2048 on a GPU",
    )
    max_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="sequences of one decode step; none: 32 on a CPU, 256 on a GPU",
    )
    prefix_cache: bool = Field(
        default=True, description="keep the KV of prompts for those that begin alike"
    )
    speculation: Literal["none", "ngram", "draft"] = Field(
        default="none",
        description="drafts that a decode step checks: looked up (ngram), or a model's too (draft)",
    )
    draft_model: str | None = Field(
        default=None,
        min_length=1,
        validate_default=True,
        description="a smaller model of the same vocabulary, named as `model`",
    )
    draft_quantization: Quantization = Field(
        default=Quantization.NONE, description="matrices of the draft model"
    )
    max_queued: int = Field(default=1024, ge=1, description="requests that wait in the router")
    queue_timeout_s: float = Field(
        default=60.0, gt=0, description="a request that waits longer fails"
    )
    request_timeout_s: float = Field(
        default=600.0, gt=0, description="a request that runs longer fails"
    )
    lease_s: float = Field(
        default=10.0,
        gt=0,
        description="when a hand-off has failed: room is kept so long, a prompt while it is wanted",
    )
    max_parked_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="of a prefill worker's pages: with more that wait for room no prompt starts",
    )
    max_waiting_handoffs: int = Field(
        default=16, ge=1, description="that a full decode worker lets wait; it refuses the youngest"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://[^/]",
        description="URL of an OpenTelemetry collector that gets traces, over HTTP",
    )
    start_timeout_s: float = Field(default=300.0, gt=0, description="for all workers to be ready")
    hang_timeout_s: float = Field(
        default=30.0, gt=0, description="a worker that says nothing for so long is replaced"
    )
    step_timeout_s: float = Field(
        default=120.0, gt=0, description="a worker whose model is at one step so long is replaced"
    )
    stop_timeout_s: float = Field(
        default=5.0, gt=0, description="for a stopped worker to end by itself"
    )

    @field_validator("kv_tls_ca")
    @classmethod
    def _all_of_tls_or_none(cls, value: str | None, info: ValidationInfo) -> str | None:
        given = {"kv_tls_ca": value} | {name: info.data.get(name) for name in _TLS_PAIR}
        missing = [name for name, path in given.items() if path is None]
        if 0 < len(missing) < len(given):
            raise ValueError(f"TLS takes three files; give {' and '.join(missing)}, too")
        return value

    @field_validator("insecure_kv")
    @classmethod
    def _kv_pages_are_protected(cls, value: bool, info: ValidationInfo) -> bool:
        data = info.data
        if {"kv_host", "transport", "kv_tls_ca"} <= data.keys():  # else they are refused
            has_tls = data["kv_tls_ca"] is not None
            try:
                require_protected(
                    data["transport"], data["kv_host"], has_tls=has_tls, is_private=value
                )
            except ExposureError as error:
                raise ValueError(str(error)) from error
        return value

    @field_validator("draft_model")
    @classmethod
    def _drafts_come_from_a_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        speculation = info.data.get("speculation")
        if speculation == "draft" and value is None:
            raise ValueError("speculation is draft; name the model that drafts")
        if speculation in ("none", "ngram") and value is not None:
            raise ValueError(f"speculation is {speculation}; a draft model needs draft")
        return value

    @field_validator("dashboard_port")
    @classmethod
    def _not_the_port_of_the_api(cls, value: int, info: ValidationInfo) -> int:
        if value and value == info.data.get("port"):
            raise ValueError("the HTTP API has this port; choose another for one of them")
        return value

    @field_validator("deterministic")
    @classmethod
    def _floats_in_our_kernels(cls, value: bool, info: ValidationInfo) -> bool:
        on_gpus = info.data.get("device") == "cuda"
        needed = {
            "dtype": ("auto", "float32", *(("bfloat16",) if on_gpus else ())),
            "quantization": (Quantization.NONE,),
            "kernels": ("auto", "native", "triton"),
        }
        for name, choices in needed.items():
            if value and info.data.get(name, choices[0]) not in choices:
                instead = ", or device cuda" if name == "dtype" else ""
                raise ValueError(
                    f"{name} is {info.data[name]}; choose {' or '.join(choices)}{instead}"
                )
        return value

    @field_validator("deterministic")
    @classmethod
    def _as_many_parts_of_a_sum(cls, value: bool, info: ValidationInfo) -> bool:
        every = info.data.get("tensor_parallel_size")
        for name in ("prefill_tensor_parallel_size", "decode_tensor_parallel_size"):
            if value and info.data.get(name) not in (None, every):
                raise ValueError(
                    f"{name} is {info.data[name]}: ranks make parts of sums, of which all workers "
                    "need as many; set tensor_parallel_size alone"
                )
        return value

    @property
    def kv_tls(self) -> TlsFiles | None:
        """The certificates of the workers, where KV pages are encrypted.

        Paths are absolute: a worker's process may run in another directory.
        """
        if self.kv_tls_cert is None or self.kv_tls_key is None or self.kv_tls_ca is None:
            return None
        return TlsFiles(
            cert=os.path.abspath(self.kv_tls_cert),
            key=os.path.abspath(self.kv_tls_key),
            ca=os.path.abspath(self.kv_tls_ca),
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_config reads the other sources itself, so that it can tell where a value came from.
        return (init_settings,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A configuration and, per field, the place that its value comes from."""

    config: ServeConfig
    origins: Mapping[str, str]


def load_config(cli: Mapping[str, object], file: Path | None = None) -> LoadedConfig:
    """Merge the command line, the environment, `file` and the defaults, in this precedence.

    Members of `cli` that are None were not given. Raises ConfigError, which names the parameter,
    where its value came from and, for an unknown one, the nearest that exists.
    """
    values: dict[str, object] = {}
    origins = dict.fromkeys(ServeConfig.model_fields, DEFAULT)
    if file is not None:
        values |= (found := _read_file(file))
        origins |= dict.fromkeys(found, str(file))
    values |= (found := _read_environment())
    origins |= {name: ENV_PREFIX + name.upper() for name in found}
    values |= (found := {name: value for name, value in cli.items() if value is not None})
    origins |= dict.fromkeys(found, COMMAND_LINE)
    try:
        return LoadedConfig(config=ServeConfig.model_validate(values), origins=origins)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from error


def _read_file(file: Path) -> dict[str, object]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a mapping; write one `parameter: value` per line")
    for name in values:
        _require_known(str(name), f"in {file}", "")
    return values


def _read_environment() -> dict[str, object]:
    for variable in sorted(os.environ):
        if variable.upper().startswith(ENV_PREFIX) and variable != failpoint.VARIABLE:
            name = variable[len(ENV_PREFIX) :].lower()
            _require_known(name, "in the environment", ENV_PREFIX)
    return dict(EnvSettingsSource(ServeConfig)())


def _require_known(name: str, place: str, prefix: str) -> None:
    if name in ServeConfig.model_fields:
        return
    near = difflib.get_close_matches(name, ServeConfig.model_fields, n=1, cutoff=0.0)[0]
    shown, near = (prefix + name.upper(), prefix + near.upper()) if prefix else (name, near)
    raise ConfigError(f"unknown parameter {shown} {place}; did you mean {near}?")


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if first["input"] is None or first["input"] is False:  # what another needs was not given
        return f"{name}: {reason}"
    return f"{name} ({origins[name]}) is {first['input']!r}: {reason}"
