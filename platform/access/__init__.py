"""API keys: what a key is, the file that they are kept in, and how much each may ask for.

Light to import: neither torch, Ray nor vLLM.
"""

from __future__ import annotations

from expertmesh.platform.access.file import KeyFile
from expertmesh.platform.access.limits import Meters
from expertmesh.platform.access.records import ADMIN, INFER, Key, KeyRing
from expertmesh.platform.access.tokens import NewToken, new_token

__all__ = ["ADMIN", "INFER", "Key", "KeyFile", "KeyRing", "Meters", "NewToken", "new_token"]
