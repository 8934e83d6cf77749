"""The router's HTTP app for a model and a configuration."""

from pathlib import Path

from fastapi import FastAPI

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.errors import StartError
from pagewire.router.app import create_app
from pagewire.router.chat import ChatTemplate, ChatTemplateError
from pagewire.router.control import RouterControl
from pagewire.router.gguf_metadata import GGUFError
from pagewire.router.settings import RouterSettings
from pagewire.router.spans import Tracing
from pagewire.router.tokenizer import Tokenizer, TokenizerError
from pagewire.router.tokenizer_loading import load_tokenizer


def tokenizer_of(model: Path) -> Tokenizer:
    """The tokenizer of a model's files. Raises StartError."""
    try:
        return load_tokenizer(model)
    except (TokenizerError, GGUFError, OSError) as error:
        raise StartError(f"the tokenizer of {model.name} cannot be loaded: {error}") from error


def build_app(
    config: ServeConfig,
    control: RouterControl,
    tokenizer: Tokenizer,
    served_model: str,
    tracing: Tracing | None,
) -> FastAPI:
    """The app in front of `control`, whose workers have registered. Raises StartError."""
    settings = RouterSettings(
        served_model=served_model,
        max_model_len=control.max_model_len(),
        queue_timeout_s=config.queue_timeout_s,
        request_timeout_s=config.request_timeout_s,
    )
    return create_app(
        dispatcher=control,
        tokenizer=tokenizer,
        chat_template=_chat_template(tokenizer, settings),
        settings=settings,
        tracing=tracing,
    )


def _chat_template(tokenizer: Tokenizer, settings: RouterSettings) -> ChatTemplate | None:
    source = tokenizer.config.chat_template
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokenizer.config, max_chars=settings.max_body_bytes)
    except ChatTemplateError as error:
        raise StartError(str(error)) from error
