"""Frames of the data plane: fixed header, raw little-endian tensors, every length checked before memory is taken."""

from expertmesh.routing.wire.frame import (
    DTYPES,
    HEADER_BYTES,
    Header,
    Kind,
    Limits,
    combine_parts,
    dispatch_parts,
    dtype_code,
    error_parts,
    parse_combine,
    parse_dispatch,
    parse_error,
    parse_header,
)

__all__ = [
    "DTYPES",
    "HEADER_BYTES",
    "Header",
    "Kind",
    "Limits",
    "combine_parts",
    "dispatch_parts",
    "dtype_code",
    "error_parts",
    "parse_combine",
    "parse_dispatch",
    "parse_error",
    "parse_header",
]
