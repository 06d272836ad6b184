"""The vLLM plugin: routed experts that live elsewhere, and a load format that never reads them.

vLLM loads `register` in each of its processes (entry point group `vllm.general_plugins`). It changes nothing until an
engine's `additional_config` holds settings under the key `expertmesh` (settings.py).
"""

from expertmesh.routing.vllm_plugin.settings import (
    CONFIG_KEY,
    CPU_EXECUTOR,
    CPU_WORKER,
    LOAD_FORMAT,
    SCHEDULER,
    UNAVAILABLE,
    MeshSettings,
    Role,
)

__all__ = [
    "CONFIG_KEY",
    "CPU_EXECUTOR",
    "CPU_WORKER",
    "LOAD_FORMAT",
    "SCHEDULER",
    "UNAVAILABLE",
    "MeshSettings",
    "Role",
    "register",
]


def register() -> None:
    """Registers the layer and the load format with vLLM. May be called again: it does nothing then."""
    from expertmesh.routing.vllm_plugin.orphan import follow_owner

    follow_owner()
    from expertmesh.routing.vllm_plugin.layer import register_layers
    from expertmesh.routing.vllm_plugin.loader import register_loader

    register_layers()
    register_loader()
