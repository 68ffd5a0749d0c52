"""Every error as OpenAI's error body, in one table."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from starlette.exceptions import HTTPException

from engine.errors import EngineDead, GenerationFailed, InvalidRequest, Overloaded

_SHOWN_VALUE = 200
_SHOWN_PROBLEMS = 10
_PRIVATE = ("prompt", "messages")  # whose values are not repeated in an error

_INVALID = "invalid_request_error"
_CODES = {
    "missing": "missing_required_parameter",
    "invalid_token_id": "invalid_token_id",
    "invalid_type": "invalid_type",
    "invalid_value": "invalid_value",
    "missing_required_parameter": "missing_required_parameter",
    "incompatible_parameters": "incompatible_parameters",
    "unsupported_parameter": "unsupported_parameter",
    "unknown_parameter": "unknown_parameter",
}


class ApiError(Exception):
    """An error that is already in the terms of the API."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = _INVALID,  # noqa: A002 - the API's word
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers

    def __reduce__(self) -> Any:
        return _api_error, (
            self.status,
            self.message,
            self.type,
            self.param,
            self.code,
            self.headers,
        )

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=dict(self.headers or {}))


def _api_error(  # what pickle calls
    status: int, message: str, kind: str, param: str | None, code: str | None, headers: Any
) -> ApiError:
    return ApiError(status, message, kind, param=param, code=code, headers=headers)


def to_api_error(error: BaseException) -> ApiError:
    """The status, type and code of anything that can go wrong."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _validation_error(error.errors())
        case ValidationError():
            return _validation_error(error.errors(include_url=False))
        case InvalidRequest():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case Overloaded():
            return ApiError(
                503,
                str(error),
                "service_unavailable",
                code=error.code,
                headers={"Retry-After": str(error.retry_after_s)}
                | ({"Connection": "close"} if error.code == "draining" else {}),
            )
        case EngineDead():
            return ApiError(
                503,
                str(error),
                "service_unavailable",
                code="engine_dead",
                headers={"Retry-After": "30"},
            )
        case HTTPException():
            return _http_error(error)
        case GenerationFailed():
            message = str(error)
        case _:
            message = "The server had an error while processing your request."
    return ApiError(
        500, message, "server_error", code="internal_error", headers={"x-should-retry": "false"}
    )


async def respond(_request: Request, error: Exception) -> JSONResponse:
    """Answer with an error that is expected; `RequestContext` answers for all others."""
    return to_api_error(error).response()


def _http_error(error: HTTPException) -> ApiError:
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)


# -- validation


def _validation_error(problems: Sequence[Any]) -> ApiError:
    """All problems in one message; types before ranges, as a wrong type hides the rest."""
    described = sorted((_describe(problem) for problem in problems), key=lambda d: d[2] != "type")
    messages = [message for _, message, _, _ in described[:_SHOWN_PROBLEMS]]
    if len(described) > _SHOWN_PROBLEMS:
        messages.append(f"and {len(described) - _SHOWN_PROBLEMS} more")
    param, _, _, code = described[0]
    return ApiError(400, "; ".join(messages), param=param, code=code)


def _describe(problem: Any) -> tuple[str | None, str, str, str]:
    """The field, a sentence, the kind ("type" or "value") and the code of one problem."""
    context = problem.get("ctx") or {}
    kind = problem["type"]
    param = context.get("param") or path(problem["loc"])
    code = _CODES.get(kind) or ("invalid_type" if _is_type(problem) else "invalid_value")
    order = "type" if code in ("invalid_type", "missing_required_parameter") else "value"
    if "param" in context:
        return param, problem["msg"], order, code
    shown = "" if _root(problem["loc"]) in _PRIVATE else f", got {_shown(problem.get('input'))}"
    if kind == "missing":
        return param, f"{param} is required", order, code
    if bounds := _bounds(problem["loc"], context):
        return param, f"{param} must be {bounds}{shown}", order, code
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    verb = "" if message == problem["msg"] else "must be "
    return param, f"{param}: {verb}{message[:1].lower()}{message[1:]}{shown}", order, code


def _is_type(problem: Any) -> bool:
    if problem["type"] == "literal_error":  # all our literals are strings
        return not isinstance(problem["input"], str)
    return bool(problem["type"].endswith(("_type", "_from_float")))


def path(loc: Sequence[str | int]) -> str | None:
    """("body", "stop", 2) as stop[2]."""
    text = ""
    for part in loc[1:] if loc[:1] == ("body",) else loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or None


def _root(loc: Sequence[str | int]) -> str | int | None:
    rest = loc[1:] if loc[:1] == ("body",) else loc
    return rest[0] if rest else None


def _bounds(loc: Sequence[str | int], context: Mapping[str, Any]) -> str | None:
    """The range of a number in words, from the field's own declaration."""
    if not context.keys() & {"ge", "gt", "le", "lt"}:
        return None
    limits = dict(context)
    field = _known_fields().get(str(_root(loc)))
    for item in field.metadata if field else ():
        match item:
            case Ge():
                limits.setdefault("ge", item.ge)
            case Gt():
                limits.setdefault("gt", item.gt)
            case Le():
                limits.setdefault("le", item.le)
            case Lt():
                limits.setdefault("lt", item.lt)
    low, high = limits.get("ge"), limits.get("le")
    if low is not None and high is not None:
        return f"between {_plain(low)} and {_plain(high)}"
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{words[k]} {_plain(limits[k])}" for k in words if k in limits)


def _plain(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _known_fields() -> dict[str, FieldInfo]:
    from server.schemas import REQUESTS

    return {name: field for model in REQUESTS for name, field in model.model_fields.items()}


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    return text if len(text) <= _SHOWN_VALUE else text[:_SHOWN_VALUE] + "…"
