"""Log lines with the request that they belong to: text for people, or JSON for machines."""

from expertmesh.platform.logs.lines import (
    JsonLines,
    Origin,
    RequestIds,
    TextLines,
    current_request,
    set_up,
    vllm_logging,
    wordless,
)

__all__ = [
    "JsonLines",
    "Origin",
    "RequestIds",
    "TextLines",
    "current_request",
    "set_up",
    "vllm_logging",
    "wordless",
]
