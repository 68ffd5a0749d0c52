"""Is the server there, able, and how busy?"""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from engine.client import EngineState
from server import __version__
from server.state import ServerState, state_of

router = APIRouter()

Endpoint = Callable[[Request], Awaitable[Response]]


def _condition(state: ServerState) -> tuple[str, str | None]:
    """One of ok, loading, draining, unhealthy, and why."""
    engine = state.engine
    if engine.state is EngineState.DEAD:
        return "unhealthy", "the engine has stopped"
    if state.stalled:
        return "unhealthy", f"no step for {engine.stalled_for():.0f} s, with work waiting"
    if engine.state is EngineState.LOADING:
        return "loading", "the model is loading"
    return ("ok", None) if state.ready else ("draining", "the server is shutting down")


def _probe(path: str) -> Callable[[Endpoint], Endpoint]:
    """A route for GET and HEAD, documented as GET: FastAPI would give both one operation id."""

    def register(endpoint: Endpoint) -> Endpoint:
        router.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(endpoint)
        router.get(path)(endpoint)  # only in the document: the route above comes first
        return endpoint

    return register


def _answer(request: Request, *good: str) -> JSONResponse:
    status, reason = _condition(state_of(request))
    return JSONResponse(
        {"status": status, "reason": reason}, status_code=200 if status in good else 503
    )


@_probe("/live")
async def live(request: Request) -> Response:
    """For liveness probes: should the process be restarted?"""
    return _answer(request, "ok", "loading", "draining")


@_probe("/health")
@_probe("/ping")
async def health(request: Request) -> Response:
    """For scripts that wait for the server: has the model been loaded?"""
    return _answer(request, "ok", "draining")


@_probe("/ready")
async def ready(request: Request) -> Response:
    """For load balancers: should new requests be sent here?"""
    return _answer(request, "ok")


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The server's version."""
    return {"version": __version__}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    text = await asyncio.to_thread(state_of(request).metrics.export)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
