"""The endpoints of the OpenAI API: chat completions, completions and models."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from pagewire.router import validate
from pagewire.router.body import parse_object, read_body
from pagewire.router.chat import ChatTemplate
from pagewire.router.detokenizer import Detokenizer
from pagewire.router.errors import invalid
from pagewire.router.generation import Generation
from pagewire.router.metrics import RequestMetrics, RouterMetrics
from pagewire.router.output import OutputText
from pagewire.router.request import Dispatcher, Request, RequestFailed
from pagewire.router.responses import Answer, EventStreamResponse, WholeResponse
from pagewire.router.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    request_body_schema,
)
from pagewire.router.settings import RouterSettings
from pagewire.router.shapes import ChatShape, CompletionShape, Envelope, ResponseShape
from pagewire.router.spans import RequestTrace, Tracing
from pagewire.router.stop import StopChecker
from pagewire.router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    """When a request arrived, and the trace that it belongs to."""

    at: float  # seconds on the router's clock
    trace: RequestTrace | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIEndpoints:
    """What the endpoints work with."""

    dispatcher: Dispatcher
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    settings: RouterSettings
    metrics: RouterMetrics
    clock: Callable[[], float]
    created: int  # of the model, seconds of Unix time
    tracing: Tracing | None = None

    async def chat_completions(self, http: HTTPRequest) -> Response:
        """Answer a conversation."""
        arrival = self._arrival("chat", http)
        body = await read_body(http, self.settings)
        fields = validate.parse_chat(parse_object(body), self.settings)
        token_ids = await self._beside_loop(
            len(body), lambda: self._chat_token_ids(fields.messages)
        )
        request_id = secrets.token_hex(16)
        shape = ChatShape(self._envelope(f"chatcmpl-{request_id}"), self.tokenizer.spelled)
        return self._respond(fields, self._request(fields, request_id, token_ids), shape, arrival)

    async def completions(self, http: HTTPRequest) -> Response:
        """Continue a text."""
        arrival = self._arrival("text_completion", http)
        body = await read_body(http, self.settings)
        fields = validate.parse_completion(parse_object(body), self.settings)
        token_ids = await self._beside_loop(len(body), lambda: self._prompt_token_ids(fields))
        request_id = secrets.token_hex(16)
        shape = CompletionShape(self._envelope(f"cmpl-{request_id}"), self.tokenizer.spelled)
        return self._respond(fields, self._request(fields, request_id, token_ids), shape, arrival)

    async def models(self) -> Response:
        """The one model behind this router."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, model: str) -> Response:
        """The model by one of its names."""
        validate.check_model(model, self.settings)
        return JSONResponse(self._model_card())

    async def embeddings(self) -> Response:
        """Say that there are none."""
        raise RequestFailed(
            "Embeddings are not supported; this server generates text.",
            status=501,
            kind="invalid_request_error",
            code="not_implemented",
        )

    def _arrival(self, operation: str, http: HTTPRequest) -> _Arrival:
        at = self.clock()
        trace = self.tracing.begin(operation, http.headers) if self.tracing else None
        return _Arrival(at=at, trace=trace)

    async def _beside_loop(self, num_bytes: int, work: Callable[[], list[int]]) -> list[int]:
        """Tokenize a long text in a thread, so that no other stream waits for it."""
        if num_bytes > self.settings.off_loop_bytes:
            return await asyncio.to_thread(work)
        return work()

    def _chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        if self.chat_template is None:
            raise invalid("The model has no chat template; use /v1/completions.", param="messages")
        turns = [
            {
                # OpenAI's newer name of the same role; templates know the older one.
                "role": "system" if each.role == "developer" else each.role,
                "content": self.tokenizer.as_plain_text(each.content),
            }
            for each in messages
        ]
        return self.tokenizer.encode_rendered(self.chat_template.render(turns))

    def _prompt_token_ids(self, fields: CompletionRequest) -> list[int]:
        if isinstance(fields.prompt, str):
            return self.tokenizer.encode(fields.prompt)
        validate.check_token_ids(
            fields.prompt, vocab_size=self.tokenizer.vocab_size, param="prompt"
        )
        return fields.prompt

    def _request(self, fields: GenerationRequest, request_id: str, token_ids: list[int]) -> Request:
        max_tokens = validate.output_budget(
            fields,
            num_prompt_tokens=len(token_ids),
            context_tokens=self._context_tokens(len(token_ids), n=1),
            choice_tokens=self._context_tokens(len(token_ids), n=fields.n),
        )
        now = self.clock()
        return Request(
            request_id=request_id,
            token_ids=tuple(token_ids),
            sampling=validate.sampling_params(
                fields,
                max_tokens=max_tokens,
                eos_token_ids=self.tokenizer.config.eos_token_ids,
                vocab_size=self.tokenizer.vocab_size,
            ),
            queue_deadline=now + self.settings.queue_timeout_s,
            deadline=now + self.settings.request_timeout_s,
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            n=fields.n,
        )

    def _context_tokens(self, num_prompt_tokens: int, *, n: int) -> int:
        """Longest prompt plus output; without workers the model's, and the dispatcher refuses."""
        held = self.dispatcher.max_kv_tokens(num_prompt_tokens=num_prompt_tokens, n=n)
        limit = self.settings.max_model_len
        return min(limit, held) if held else limit

    def _envelope(self, response_id: str) -> Envelope:
        return Envelope(
            response_id=response_id, created=int(time.time()), model=self.settings.served_model
        )

    def _respond(
        self, fields: GenerationRequest, request: Request, shape: ResponseShape, arrival: _Arrival
    ) -> Response:
        answer = Answer(
            generation=Generation(
                dispatcher=self.dispatcher,
                request=request,
                outputs=[self._output(fields) for _ in range(fields.n)],
                metrics=RequestMetrics(self.metrics, arrived=arrival.at),
                trace=arrival.trace,
            ),
            shape=shape,
            num_prompt_tokens=len(request.token_ids),
            wants_ledger=fields.ledger,
        )
        if not fields.stream:
            return WholeResponse(answer)
        return EventStreamResponse(
            answer, include_usage=fields.include_usage, settings=self.settings, clock=self.clock
        )

    def _output(self, fields: GenerationRequest) -> OutputText:
        return OutputText(
            detokenizer=Detokenizer(self.tokenizer.token_bytes),
            stop=StopChecker(fields.stop),
            stop_token_ids=frozenset(fields.stop_token_ids),
            min_tokens=fields.min_tokens,
        )

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.settings.served_model,
            "object": "model",
            "created": self.created,
            "owned_by": "pagewire",
            "max_model_len": self.settings.max_model_len,
            "aliases": list(self.settings.aliases),
        }


def openai_routes(endpoints: OpenAIEndpoints) -> APIRouter:
    """The routes of `endpoints`."""
    routes = APIRouter(tags=["OpenAI"])
    chat, completions = "/v1/chat/completions", "/v1/completions"
    routes.post(chat, openapi_extra=request_body_schema(ChatCompletionRequest, chat))(
        endpoints.chat_completions
    )
    routes.post(completions, openapi_extra=request_body_schema(CompletionRequest, completions))(
        endpoints.completions
    )
    routes.get("/v1/models")(endpoints.models)
    routes.get("/v1/models/{model:path}")(endpoints.model)
    routes.post("/v1/embeddings")(endpoints.embeddings)
    return routes
