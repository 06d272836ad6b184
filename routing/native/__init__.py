"""The data plane's frames in C: packing, exchanging and checking them without Python in the way.

`routing/wire/frame.py` specifies the format. Decisions stay in Python; here bytes move: `StepPacker` makes a step's
frames, `exchange` sends them on `ClientStream`s and takes in the answers, `ServerStream` is a shard's side.
"""

from __future__ import annotations

try:
    from expertmesh.routing.native._frames import (
        ANSWERED,
        BROKEN,
        OVERDUE,
        REFUSED,
        WAITING,
        ClientStream,
        ServerStream,
        StepPacker,
        add_parts,
        count_experts,
        exchange,
        parse_header,
    )
except ModuleNotFoundError as error:
    raise ImportError(
        "expertmesh was installed without its C extension, which serving needs (the client SDK does not): "
        "install a C compiler and reinstall expertmesh with `pip install --force-reinstall --no-deps`"
    ) from error

__all__ = [
    "ANSWERED",
    "BROKEN",
    "OVERDUE",
    "REFUSED",
    "WAITING",
    "ClientStream",
    "ServerStream",
    "StepPacker",
    "add_parts",
    "count_experts",
    "exchange",
    "parse_header",
]
