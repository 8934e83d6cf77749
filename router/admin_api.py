"""The endpoints for those who operate the router: health, metrics and the workers."""

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

import pagewire
from pagewire.proto import worker_pb2 as pb
from pagewire.router.metrics import RouterMetrics
from pagewire.router.request import Dispatcher, WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminEndpoints:
    """What the endpoints work with."""

    dispatcher: Dispatcher
    metrics: RouterMetrics

    async def health(self) -> Response:
        """Whether the process answers; says nothing about the workers."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether a request could start now; 503 with what is missing if not."""
        self.dispatcher.check_ready()
        return JSONResponse({"status": "ready"})

    async def version(self) -> Response:
        """The version of Pagewire."""
        return JSONResponse({"version": pagewire.__version__})

    async def prometheus(self) -> Response:
        """All metrics, in Prometheus' text format."""
        workers = await self.dispatcher.inspect()
        dispatcher = self.dispatcher
        page = self.metrics.render(dispatcher.counts(), dispatcher.retries(), workers)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    async def workers(self) -> Response:
        """The registered workers with their pages, queues and transfers as of now."""
        views = await self.dispatcher.inspect()
        return JSONResponse({"workers": [_describe(view) for view in views]})


def admin_routes(endpoints: AdminEndpoints) -> APIRouter:
    """The routes of `endpoints`."""
    routes = APIRouter(tags=["operation"])
    routes.get("/health")(endpoints.health)
    routes.get("/ready")(endpoints.ready)
    routes.get("/version")(endpoints.version)
    routes.get("/metrics")(endpoints.prometheus)
    routes.get("/admin/workers")(endpoints.workers)
    return routes


def _describe(view: WorkerView) -> dict[str, Any]:
    state = view.state
    return {
        "name": view.name,
        "role": view.role,
        "pid": view.pid,
        "incarnation": view.incarnation,
        "device": view.device,
        "address": view.address,
        "is_responding": view.is_responding,
        "integrity_error": state.integrity_error or None,
        "pages": _members(state.pages),
        "queued": state.queued,
        "running": state.running,
        "step_s": state.step_s,
        "handoffs": state.handoffs,
        "parked_pages": state.parked_pages,
        "queued_tokens": state.queued_tokens,
        "prompt_tokens": state.prompt_tokens,
        "generated_tokens": state.generated_tokens,
        "drafted_tokens": state.drafted_tokens,
        "accepted_tokens": state.accepted_tokens,
        "dropped_messages": state.dropped_messages,
        "transfers": [_members(each) for each in state.transfers],
        "links": [_describe_link(each) for each in state.links],
    }


def _describe_link(link: pb.KvLink) -> dict[str, Any]:
    return {
        "peer": link.peer.hex(),
        "transport": link.transport,
        "given_up": [_members(each) for each in link.given_up],
    }


def _members(message: pb.PageCounts | pb.TransferTotals | pb.GivenUp) -> dict[str, Any]:
    """All fields of a flat message, those with their default value included."""
    return {each.name: getattr(message, each.name) for each in message.DESCRIPTOR.fields}
