"""The requests of the OpenAI API: the fields that Pagewire serves, with their types and ranges.

Types are strict (`true` is not a number, `"1"` neither) and numbers finite. Parameters that are
known but not served are in `validate`; fields that nobody knows are ignored.
"""

import re
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
)
from pydantic_core import PydanticCustomError

_MAX_INT32 = 2**31 - 1
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_MAX_LOGPROBS = 20
_MAX_BIASES = 300


def _well_formed(text: str) -> str:
    # JSON can escape half of a surrogate pair, which no encoding of text can carry.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "Input holds an unpaired surrogate") from None
    return text


def _one_prompt(value: object) -> object:
    """Unwrap a list of one prompt; what is left is a string or a list of token ids."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError(
                "several_prompts",
                "Several prompts in one request are not supported yet; send one request for each",
            )
        value = value[0]
    if isinstance(value, str):
        return _well_formed(value)
    # Checked here because the error of a union would name the types of the union, not the field.
    if isinstance(value, list) and all(type(token) is int and token >= 0 for token in value):
        return value
    raise PydanticCustomError("prompt", "Input should be a string or a list of token ids")


def _one_text(value: object) -> object:
    """Join text parts to one string, as the chat templates expect it."""
    if not isinstance(value, list):
        return value
    return "\n".join(_text_of_part(part) for part in value)


def _text_of_part(part: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise PydanticCustomError("part", "Each content part should be an object with a type")
    if part["type"] != "text":
        raise PydanticCustomError(
            "part", "Content parts other than text are not supported yet; remove them"
        )
    if not isinstance(part.get("text"), str):
        raise PydanticCustomError("part", "The text of each content part should be a string")
    return str(part["text"])


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _token_biases(value: object) -> object:
    """The keys as integers: JSON knows strings only."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) and _TOKEN_ID.fullmatch(key) for key in value):
        raise PydanticCustomError("token_ids", "Each key should be a token id")
    if len({int(key) for key in value}) < len(value):
        raise PydanticCustomError("token_ids", "Each token id should occur once")
    return {int(key): bias for key, bias in value.items()}


def _absent(value: object) -> None:
    if value is not None and value != []:
        raise PydanticCustomError("unsupported", "This is not supported yet; remove it")


Text = Annotated[str, AfterValidator(_well_formed)]
Salt = Annotated[str, Field(max_length=128, pattern=r"^[^@/\\\x00]*$")]
Prompt = Annotated[str | list[int], BeforeValidator(_one_prompt)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenBiases = Annotated[
    dict[int, Bias], Field(max_length=_MAX_BIASES), BeforeValidator(_token_biases)
]
Absent = Annotated[None, BeforeValidator(_absent)]


class RequestModel(BaseModel):
    """Strict types and finite numbers; further fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class StreamOptions(RequestModel):
    """What a stream reports beside the text."""

    include_usage: bool = False


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_one_text)]
    tool_calls: Absent = None
    function_call: Absent = None


class GenerationRequest(RequestModel):
    """What chat and plain completions have in common."""

    model: Text
    n: int = Field(1, ge=1, le=_MAX_INT32)
    best_of: int | None = Field(None, ge=1, le=_MAX_INT32)  # as n only: nothing ranks the choices
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=_MAX_INT32)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: TokenBiases = {}
    min_tokens: int = Field(0, ge=0, le=_MAX_INT32)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[Text], FailFast(), BeforeValidator(_as_list)] = []
    stop_token_ids: Annotated[list[int], FailFast()] = []
    ignore_eos: bool = False
    priority: int = Field(0, ge=-100, le=100)  # as in vLLM: lower runs first
    cache_salt: Salt = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    ledger: bool = False  # of Pagewire: report in the usage where the time went

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many likely tokens to report beside each sampled one; None for no logprobs."""


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class ChatCompletionRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=_MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def request_body_schema(model: type[RequestModel], path: str) -> dict[str, Any]:
    """The OpenAPI description of a POST to `path` that takes `model`."""
    pointer = path.replace("/", "~1")
    refs = f"#/paths/{pointer}/post/requestBody/content/application~1json/schema/$defs/{{model}}"
    schema = model.model_json_schema(ref_template=refs)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
