"""The ASGI application: routes, error handlers, life."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from engine.client import AsyncEngine, Loader
from engine.errors import EngineError
from server import __version__
from server.auth import Keys
from server.config import ServerConfig
from server.errors import ApiError, respond
from server.metrics import Metrics
from server.middleware import RequestContext
from server.routes import chat, completions, explain, health, models
from server.schemas import ErrorBody
from server.state import ServerState

_OPENAPI = "/openapi.json"
_LAG_EVERY_S = 0.1  # how often the event loop's lateness is measured
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def create_app(
    load: Loader,
    config: ServerConfig,
    model_names: list[str],
    *,
    max_waiting: int = 1024,
    sampling: dict[str, Any] | None = None,
    warm: bool = False,
) -> FastAPI:
    """The application around an engine that `load` makes, in its own thread, at startup.

    If it is to be `warm`, bodies that take long find a process that reads them, which is otherwise
    started when the first one comes.
    """
    metrics = Metrics(model_names[0], config.vllm_metrics)
    engine = AsyncEngine(load, max_waiting=max_waiting, observer=metrics)
    keys = Keys(config.api_key, config.api_key_file)
    created = int(time.time())
    state = ServerState(config, engine, metrics, keys, model_names, created, sampling or {}, warm)
    app = FastAPI(
        title="logitmill",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.server = state
    for module in (completions, chat, explain, models, health):
        app.include_router(module.router)
    for kind in (RequestValidationError, ValidationError, HTTPException, ApiError, EngineError):
        app.add_exception_handler(kind, respond)
    app.add_middleware(RequestContext, state=state)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    if config.docs:
        _serve_docs(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The port opens before the model is loaded; requests are told to wait."""
    state: ServerState = app.state.server
    state.engine.start()
    tasks = [asyncio.create_task(one) for one in (_announce(state), _watch_lag(state.metrics))]
    yield
    for task in tasks:
        task.cancel()
    await state.workers.stop()
    await state.engine.stop()


async def _announce(state: ServerState) -> None:
    with suppress(EngineError):  # which ends the process, or the requests that need it
        await state.engine.loaded()
        state.metrics.set_model(state.model()[1])
        if state.warm:
            await state.workers.warm_up(state.reader())


async def _watch_lag(metrics: Metrics) -> None:
    """Measure how late the event loop comes to a timer: what it does then holds up everybody."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_EVERY_S
        await asyncio.sleep(_LAG_EVERY_S)
        metrics.on_lag(max(loop.time() - due, 0.0))


def _serve_docs(app: FastAPI) -> None:
    """As FastAPI does, but making the document once, and off the event loop: it takes long."""
    written: list[bytes] = []
    lock = asyncio.Lock()

    def write() -> bytes:
        return json.dumps(app.openapi()).encode()

    @app.get(_OPENAPI, include_in_schema=False)
    async def openapi() -> Response:
        async with lock:
            if not written:
                written.append(await asyncio.to_thread(write))
        return Response(written[0], media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(openapi_url=_OPENAPI, title=app.title)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, without the status 422, which this server never answers with."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = _with_bounds(schema)
    return app.openapi_schema


def _with_bounds(schema: Any) -> Any:
    """pydantic leaves the bounds of some numbers under its own names."""
    if isinstance(schema, list):
        return [_with_bounds(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(name, name): _with_bounds(value) for name, value in schema.items()}
