"""Renders conversations with the chat template of the model.

Templates are programs that come with a model, so they run in Jinja's immutable sandbox, without
access to attributes of Python or to files, and their output is limited.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Never

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagewire.router.errors import invalid
from pagewire.router.request import RequestFailed
from pagewire.router.tokenizer import TokenizerConfig

# What the expressions of a template raise on messages that it was not written for.
_EXPRESSION_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, RecursionError)

MAX_CHARS = 8 * 1024 * 1024  # of a rendered prompt; twice the largest body by default
_MAX_REASON_CHARS = 200


class ChatTemplateError(ValueError):
    """The chat template of the model is not a valid template."""


class _Refusal(jinja2.TemplateError):
    """What a template says by raise_exception."""


class ChatTemplate:
    """A compiled template; immutable, safe to use from several threads."""

    def __init__(self, source: str, config: TokenizerConfig, *, max_chars: int = MAX_CHARS) -> None:
        """`max_chars` limits the length of a rendered prompt."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"line {error.lineno} of the chat template: {error.message}; fix it or leave it out"
            ) from None
        self._tokens = {"bos_token": config.bos_token, "eos_token": config.eos_token}
        self._max_chars = max_chars

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks the model for the next turn of `messages`.

        Raises:
            RequestFailed: the template refuses the messages, or its output is too long.
        """
        try:
            return self._join(messages)
        except _Refusal as error:
            reason = str(error)[:_MAX_REASON_CHARS]
            raise _cannot_render(f"The chat template refuses the messages: {reason}") from None
        except (jinja2.TemplateError, *_EXPRESSION_ERRORS):
            raise _cannot_render(
                "The chat template of the model cannot render these messages."
            ) from None

    def _join(self, messages: Sequence[Mapping[str, str]]) -> str:
        pieces: list[str] = []
        length = 0
        for piece in self._template.generate(
            messages=messages, add_generation_prompt=True, tools=None, **self._tokens
        ):
            length += len(piece)
            if length > self._max_chars:
                raise _cannot_render(f"The prompt is longer than {self._max_chars} characters.")
            pieces.append(piece)
        return "".join(pieces)


def _environment() -> jinja2.Environment:
    """The dialect in which models ship their templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> Never:
    raise _Refusal(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _cannot_render(message: str) -> RequestFailed:
    return invalid(message, param="messages")
