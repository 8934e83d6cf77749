"""Puts the HTTP side of the router together."""

import time
from collections.abc import Callable

from fastapi import FastAPI

import pagewire
from pagewire.router.admin_api import AdminEndpoints, admin_routes
from pagewire.router.chat import ChatTemplate
from pagewire.router.errors import install_error_handlers
from pagewire.router.metrics import RouterMetrics
from pagewire.router.middleware import ResponseMiddleware
from pagewire.router.openai_api import OpenAIEndpoints, openai_routes
from pagewire.router.request import Dispatcher
from pagewire.router.settings import RouterSettings
from pagewire.router.spans import Tracing
from pagewire.router.tokenizer import Tokenizer


def create_app(
    *,
    dispatcher: Dispatcher,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    settings: RouterSettings,
    tracing: Tracing | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The ASGI app of one router; it shares no state with another one in the same process.

    Args:
        dispatcher: the rest of the router.
        tokenizer: of the served model.
        chat_template: of the served model; without one, chat completions are refused.
        settings: names and limits.
        tracing: where a trace of each request goes; None: there are none.
        clock: seconds, the clock on which the dispatcher reads the deadlines of requests.
    """
    metrics = RouterMetrics(settings.served_model, clock)
    app = FastAPI(
        title="Pagewire",
        version=pagewire.__version__,
        # Their pages load scripts from a CDN; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    app.add_middleware(ResponseMiddleware, metrics=metrics)
    app.include_router(
        openai_routes(
            OpenAIEndpoints(
                dispatcher=dispatcher,
                tokenizer=tokenizer,
                chat_template=chat_template,
                settings=settings,
                metrics=metrics,
                clock=clock,
                created=int(time.time()),
                tracing=tracing,
            )
        )
    )
    app.include_router(admin_routes(AdminEndpoints(dispatcher=dispatcher, metrics=metrics)))
    return app
