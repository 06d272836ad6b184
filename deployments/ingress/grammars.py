"""What a request may ask of the compilers of its grammar, regular expression or JSON schema.

vLLM compiles them in the ingress to see whether they are any, in a time that grows with their size and while other
requests wait; and once more in the engine.
"""

from __future__ import annotations

import json
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

MOST_CHARACTERS = 256 << 10
_PARTS = ("json", "regex", "choice", "grammar", "structural_tag", "whitespace_pattern")


def refuse_large_grammars(params: Any) -> None:
    """Raises VLLMValidationError if `params` asks for an output of a structure that is too large."""
    wanted = params.structured_outputs if isinstance(params, SamplingParams) else None
    if wanted is None:
        return
    try:
        size = _size(wanted)
    except RecursionError as error:
        raise VLLMValidationError("the schema is nested too deeply", parameter="structured_outputs") from error
    if size > MOST_CHARACTERS:
        raise VLLMValidationError(
            f"the structure of the output has {size} characters; at most {MOST_CHARACTERS} are allowed",
            parameter="structured_outputs",
            value=size,
        )


def _size(wanted: StructuredOutputsParams) -> int:
    parts = (getattr(wanted, name) for name in _PARTS)
    return sum(len(part if isinstance(part, str) else json.dumps(part)) for part in parts if part is not None)
