"""The one place that decides whether a request can be served.

Everything that a client sent is checked here, before anything is allocated for it: types and
ranges (by `schema`), parameters that are not served yet, the model, and the limits that depend on
the tokenizer, the settings and the workers.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from pagewire.proto import worker_pb2 as pb
from pagewire.router.errors import invalid
from pagewire.router.request import RequestFailed
from pagewire.router.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from pagewire.router.settings import RouterSettings

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions; a chat may fill the context

# Below this a temperature only scales rounding errors: it is greedy sampling.
_GREEDY_TEMPERATURE = 1e-5
# The smallest top_p whose float32, which the workers use, is above 0 with all its digits.
_MIN_TOP_P = 2.0**-126

_Neutral = dict[str, tuple[object, ...]]

# Parameters of OpenAI's API and of vLLM's that are not served, with the values (beside null) that
# ask for nothing. Everything else in them is refused rather than silently ignored.
_NEUTRAL: _Neutral = {
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True, False),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": (),
    "truncate_prompt_tokens": (),
    "return_token_ids": (False,),
    "kv_transfer_params": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
}

_NEUTRAL_CHAT: _Neutral = _NEUTRAL | {
    "tools": (),
    "tool_choice": ("none",),
    "functions": (),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "add_special_tokens": (False,),
}

_NEUTRAL_COMPLETION: _Neutral = _NEUTRAL | {
    "echo": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
    "add_special_tokens": (True,),
}

_RequestT = TypeVar("_RequestT", bound=GenerationRequest)


def parse_chat(body: Mapping[str, Any], settings: RouterSettings) -> ChatCompletionRequest:
    """The request in a body of /v1/chat/completions. Raises RequestFailed, as all here do."""
    return _parse(ChatCompletionRequest, body, _NEUTRAL_CHAT, settings)


def parse_completion(body: Mapping[str, Any], settings: RouterSettings) -> CompletionRequest:
    """The request in a body of /v1/completions."""
    return _parse(CompletionRequest, body, _NEUTRAL_COMPLETION, settings)


def check_model(model: str, settings: RouterSettings) -> None:
    """Refuse a model that is not served here."""
    if not settings.serves(model):
        raise invalid(
            f"The model does not exist here; this server has {settings.served_model!r}.",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_token_ids(token_ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Refuse ids that the model has no embedding for."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise invalid(
            f"Invalid '{param}': token ids should be from 0 to {vocab_size - 1}.", param=param
        )


def output_budget(
    fields: GenerationRequest,
    *,
    num_prompt_tokens: int,
    context_tokens: int,
    choice_tokens: int,
) -> int:
    """How many tokens to generate at most, for each choice.

    Args:
        fields: the request.
        num_prompt_tokens: length of its prompt.
        context_tokens: longest prompt plus output that can be served.
        choice_tokens: the same, for each of as many choices as the request asks for.
    """
    prompt_param = "messages" if isinstance(fields, ChatCompletionRequest) else "prompt"
    details = {"n_prompt_tokens": num_prompt_tokens, "n_ctx": context_tokens}
    if num_prompt_tokens == 0:
        raise invalid("The prompt has no tokens; send some text.", param=prompt_param)
    room = context_tokens - num_prompt_tokens
    if room < 1:
        raise invalid(
            f"The prompt has {num_prompt_tokens} tokens; at most {context_tokens - 1} leave room "
            "for an answer. Shorten it.",
            param=prompt_param,
            code="context_length_exceeded",
            details=details,
        )
    choice_room = choice_tokens - num_prompt_tokens
    param, asked = _asked_tokens(fields, max(1, choice_room))
    if asked > room:
        raise invalid(
            f"{num_prompt_tokens} tokens of prompt and {asked} of '{param}' are more than the "
            f"{context_tokens} that can be served. Reduce '{param}' to {room} or shorten the "
            "prompt.",
            param=param,
            code="context_length_exceeded",
            details=details,
        )
    if asked > choice_room:
        raise invalid(
            f"The KV cache has no room for {fields.n} choices of {asked} tokens behind "
            f"{num_prompt_tokens} tokens of prompt. Reduce 'n' or '{param}'.",
            param="n",
            code="context_length_exceeded",
            details=details | {"n_ctx": choice_tokens},
        )
    return asked


def sampling_params(
    fields: GenerationRequest, *, max_tokens: int, eos_token_ids: frozenset[int], vocab_size: int
) -> pb.SamplingParams:
    """What the workers need to know to sample for this request."""
    check_token_ids(fields.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")
    check_token_ids(list(fields.logit_bias), vocab_size=vocab_size, param="logit_bias")
    if fields.min_tokens > max_tokens:
        raise invalid(
            f"'min_tokens' is {fields.min_tokens}, more than the {max_tokens} tokens that the "
            "answer may have. Reduce it.",
            param="min_tokens",
        )
    stop_token_ids = set(fields.stop_token_ids)
    if not fields.ignore_eos:
        stop_token_ids |= eos_token_ids
    seed = secrets.randbits(64) if fields.seed is None else fields.seed % 2**64
    greedy = fields.temperature < _GREEDY_TEMPERATURE
    return pb.SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else fields.temperature,
        top_p=max(fields.top_p, _MIN_TOP_P),
        top_k=max(fields.top_k, 0),
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=fields.logit_bias,
        min_tokens=fields.min_tokens,
        num_logprobs=fields.num_logprobs,
        seed=seed,
        stop_token_ids=sorted(stop_token_ids),
    )


def _parse(
    model: type[_RequestT],
    body: Mapping[str, Any],
    neutral: _Neutral,
    settings: RouterSettings,
) -> _RequestT:
    _check_supported(body, neutral)
    try:
        fields = model.model_validate({k: v for k, v in body.items() if v is not None})
    except ValidationError as error:
        raise _invalid_field(error) from None
    check_model(fields.model, settings)
    _check_choices(fields, settings)
    _check_stop(fields, settings)
    _check_stream_options(fields)
    _check_ledger(fields)
    _check_top_logprobs(fields)
    return fields


def _check_supported(body: Mapping[str, Any], neutral: _Neutral) -> None:
    for name, accepted in neutral.items():
        value = body.get(name)
        if value is not None and not any(_same(value, each) for each in accepted):
            shown = " or ".join(str(each) for each in accepted)
            what = f"'{name}' other than {shown}" if accepted else f"'{name}'"
            raise _unsupported(what, param=name)
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("continuous_usage_stats"):
        name = "stream_options.continuous_usage_stats"
        raise _unsupported(f"'{name}'", param=name)


def _same(value: object, neutral: object) -> bool:
    """Equality in which, unlike in Python's, true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _unsupported(what: str, *, param: str) -> RequestFailed:
    return invalid(
        f"{what} is not supported yet; remove it.", param=param, code="unsupported_parameter"
    )


def _invalid_field(error: ValidationError) -> RequestFailed:
    # Only the first: thousands of faults in a small body must not make a large answer.
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    return invalid(f"Invalid '{param}': {first['msg']}.", param=param)


def _check_choices(fields: GenerationRequest, settings: RouterSettings) -> None:
    if fields.n > settings.max_n:
        raise invalid(f"Invalid 'n': at most {settings.max_n} choices are allowed.", param="n")
    if fields.best_of not in (None, fields.n):
        raise _unsupported(f"'best_of' other than 'n', {fields.n},", param="best_of")


def _check_stop(fields: GenerationRequest, settings: RouterSettings) -> None:
    if len(fields.stop) > settings.max_stop_strings:
        raise invalid(
            f"Invalid 'stop': at most {settings.max_stop_strings} strings are allowed.",
            param="stop",
        )
    if not all(1 <= len(text) <= settings.max_stop_chars for text in fields.stop):
        raise invalid(
            f"Invalid 'stop': each string should have 1 to {settings.max_stop_chars} characters.",
            param="stop",
        )
    if len(fields.stop_token_ids) > settings.max_stop_token_ids:
        raise invalid(
            f"Invalid 'stop_token_ids': at most {settings.max_stop_token_ids} ids are allowed.",
            param="stop_token_ids",
        )


def _check_stream_options(fields: GenerationRequest) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise invalid(
            "'stream_options' is for streams only; remove it or set 'stream'.",
            param="stream_options",
        )


def _check_ledger(fields: GenerationRequest) -> None:
    if fields.ledger and fields.stream and not fields.include_usage:
        raise invalid(
            "'ledger' is part of the usage, which a stream reports only when asked; set "
            "'stream_options.include_usage'.",
            param="ledger",
        )


def _check_top_logprobs(fields: GenerationRequest) -> None:
    if isinstance(fields, ChatCompletionRequest) and fields.top_logprobs and not fields.logprobs:
        raise invalid(
            "'top_logprobs' is for logprobs only; remove it or set 'logprobs'.",
            param="top_logprobs",
        )


def _asked_tokens(fields: GenerationRequest, room: int) -> tuple[str, int]:
    """The parameter that limits the output, and its value."""
    if isinstance(fields, ChatCompletionRequest):
        if fields.max_completion_tokens is not None:
            return "max_completion_tokens", fields.max_completion_tokens
        return "max_tokens", room if fields.max_tokens is None else fields.max_tokens
    if fields.max_tokens is None:
        return "max_tokens", min(DEFAULT_COMPLETION_TOKENS, room)
    return "max_tokens", fields.max_tokens
