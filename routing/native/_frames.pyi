"""What the extension offers. Arguments are positional; addresses are `data_ptr()`s of contiguous host tensors that must
stay until the call returns, or, for a step's x, until its exchange is over."""

from collections.abc import Sequence
from typing import Any, Final, final

import numpy as np

Int32s = np.ndarray[Any, np.dtype[np.int32]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]

# States of a ClientStream.
IDLE: Final[int]
WAITING: Final[int]
ANSWERED: Final[int]
REFUSED: Final[int]
BROKEN: Final[int]
OVERDUE: Final[int]

@final
class StepPacker:
    """Sorts the (token, expert) pairs of one step by target and packs a frame for each. Reused step after step."""

    def __new__(cls, max_rows: int, max_bytes: int, max_pairs_per_row: int, /) -> StepPacker: ...
    def route(
        self,
        x: int,
        dtype: int,
        width: int,
        experts: int,
        weights: int,
        tokens: int,
        top_k: int,
        copies: Int32s,
        shares: Int64s | None,
        targets: int,
        positions: Int64s | None,
        /,
    ) -> list[int]:
        """Targets that get pairs, ascending; -1 among them if some pairs have none.

        x: address of [tokens, width]; experts, weights: of [tokens * top_k] int32 and float32; copies: [experts, C];
        shares: tokens for each copy, [experts, C], or None: all to the first; positions: the pairs to send, ascending,
        or None: all. Raises WireError if a target would have to take more than a frame may hold, before anything is
        sent, and ValueError for ids, targets or positions out of range.
        """

    def stage(self, target: int, stream: ClientStream, layer: int, epoch: int, frame: int, budget_ms: int, /) -> None:
        """Puts a target's frame into a stream, to be sent by `exchange`."""

    def positions(self, target: int, /) -> bytes:
        """The target's pairs, as positions in the flattened [tokens, top_k]: int64s, ascending."""

    def combine(self, out: int, frames: Sequence[tuple[int, ClientStream]], fresh: bool, /) -> None:
        """Adds the answers to frames of the step at hand to `out`, the address of [tokens, width] in x's dtype.

        Each row is summed in float32 in the order of `frames` and rounded once. fresh: `out` holds nothing yet. Frames
        that were not answered are left out.
        """

@final
class ClientStream:
    """The sending side of a connection, with at most one frame in flight."""

    state: int
    error: int
    """Of a broken stream: errno; 0 if the peer closed; -1 if it sent what is no right answer."""
    rows: int
    """Of the frame in flight, and so of its answer."""
    computed_us: int
    waited_us: int
    """What the answer says about its frame, see the wire's table."""
    buffer: bytearray
    """Holds the answer, header and body, until the next frame is staged, which may replace it."""
    message: bytes
    """Words of a refusal."""
    bad_header: bytes
    """The header that was no right answer, where error is -1."""

    def __new__(cls, fd: int, max_rows: int, max_bytes: int, max_pairs_per_row: int, /) -> ClientStream: ...
    def close(self) -> None:
        """Forgets the descriptor, which the caller closes."""

def exchange(frames: Sequence[tuple[int, ClientStream]], timeout_s: float, /) -> bool:
    """Sends staged frames, (target, stream) tuples, back to back and takes in the answers, without the GIL.

    Returns whether all came, when no stream waits any more: each is ANSWERED, REFUSED, BROKEN, or OVERDUE after the
    timeout, and may be given more time by another call. Answers to other frames are skipped. Runs signal handlers;
    what they raise leaves streams WAITING.
    """

def count_experts(experts: int, pairs: int, into: Int64s, layer: int, /) -> None:
    """Adds one to into[e] for each e of the `pairs` int32 ids at `experts`.

    Raises WireError, naming the layer, for an id outside `into`, and changes nothing then.
    """

def add_parts(
    counters: Int64s,
    frames: Sequence[tuple[int, ClientStream]],
    began_ns: int,
    staged_ns: int,
    exchanged_ns: int,
    /,
) -> None:
    """Adds to `LoadCounters.parts` what one turn of a step moved and took; it ends now.

    began_ns, staged_ns, exchanged_ns: `time.monotonic_ns` before its frames were routed, when they were staged, and
    when their answers were in. Queue and compute time are those of the answer that took longest at its shard.
    """

@final
class ServerStream:
    """The answering side of a connection that takes frames of one width and dtype, one at a time."""

    layer: int
    rows: int
    pairs: int
    frame: int
    """Of the frame at hand."""
    buffer: bytearray
    """Begins with the frame at hand, header and body, until the next `receive`, which may replace it."""
    received: bytes
    """What the buffer holds."""
    has_input: bool
    """Whether bytes beyond the frame at hand have been read already."""
    unsent: int
    """Bytes of answers that wait until the socket takes them."""

    def __new__(
        cls, fd: int, dtype: int, width: int, max_rows: int, max_bytes: int, max_pairs_per_row: int, /
    ) -> ServerStream: ...
    def receive(self) -> bool | None:
        """Reads what is there: True if a whole frame is at hand, None if what came is no frame that this side takes.

        Raises OSError if the client is gone, or no memory is left for its frame (ENOMEM).
        """

    def answer(self, owner: object, y: int, epoch: int, computed_us: int, waited_us: int, /) -> None:
        """Answers the frame at hand with as many bytes as its x has, at address y, kept by `owner` until they are sent.

        Raises OSError if the client is gone.
        """

    def refuse(self, code: int, message: bytes, epoch: int, /) -> None:
        """Answers the frame at hand with an error, its words cut to the wire's limit. Raises as `answer`."""

    def flush(self) -> None:
        """Writes more of the answers that wait. Raises as `answer`."""

    def close(self) -> None:
        """Drops what waits and forgets the descriptor, which the caller closes."""

def parse_header(
    data: bytes | bytearray | memoryview, max_rows: int, max_bytes: int, max_pairs_per_row: int, /
) -> tuple[int, int, int, int, int, int, int, int, int, int] | None:
    """(kind, dtype, layer, rows, pairs, width, epoch, frame, u32 at 40, u32 at 44), or None where the specification's
    `parse_header` refuses. For tests."""
