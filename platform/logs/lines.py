"""How a log line looks, and which request it belongs to.

A request's ids are in a context variable, which tasks inherit: whatever logs while a request is worked on says whose
line it is. Only the standard library is needed here, so that every process can use it.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

OURS, VLLM = "expertmesh", "vllm"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a process' lines come from; empty outside Ray Serve."""

    deployment: str = ""
    replica: str = ""


@dataclass(frozen=True, slots=True)
class RequestIds:
    """What log lines say about the request at hand."""

    request_id: str
    trace_id: str = ""
    """32 hexadecimal digits; empty for a request that is not traced."""


current_request: ContextVar[RequestIds | None] = ContextVar("request", default=None)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and, where there are such, request_id, trace_id,
    deployment, replica, exception."""

    def __init__(self, deployment: str = "", replica: str = "") -> None:
        super().__init__()
        self._origin = {"deployment": deployment, "replica": replica}

    def format(self, record: logging.LogRecord) -> str:
        """As logging says. Never spans lines, whatever the message holds."""
        ids = current_request.get()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(asdict(ids) if ids is not None else {}),
            **self._origin,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value != ""})


class TextLines(logging.Formatter):
    """Level, time, logger, the request's id where there is one, message."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(asctime)s %(name)s%(request)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """As logging says."""
        ids = current_request.get()
        record.request = "" if ids is None else f" [{ids.request_id}]"
        return super().format(record)


def wordless(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """For a log call's `exc_info`: where an error comes from, without its message, which may quote a client."""
    return RuntimeError, RuntimeError(type(error).__name__), error.__traceback__


def set_up(level: int, form: Literal["text", "json"], origin: Origin) -> None:
    """Gives this process' loggers their lines, on standard error: ours, and vLLM's where they are to be JSON.

    May be called again. vLLM's level is its environment's business.
    """
    lines = JsonLines(origin.deployment, origin.replica) if form == "json" else TextLines()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(lines)
    ours = logging.getLogger(OURS)
    ours.handlers[:] = [handler]
    ours.propagate = False
    ours.setLevel(level)
    if form == "json":
        for vllms in logging.getLogger(VLLM).handlers:
            vllms.setFormatter(lines)


def vllm_logging(level: str, origin: Origin) -> dict[str, Any]:
    """vLLM's logging as JSON lines, as `logging.config.dictConfig` takes it: for processes that vLLM starts."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": f"{__name__}.{JsonLines.__name__}", **asdict(origin)}},
        "handlers": {"lines": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "loggers": {name: {"handlers": ["lines"], "level": level.upper(), "propagate": False} for name in (OURS, VLLM)},
    }
