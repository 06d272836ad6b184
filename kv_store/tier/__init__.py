"""The tier of vLLM's KV offloading that is the store: connector, host memory's copies, secondary tier.

`settings` is plain Python; the other modules need vLLM and are loaded by it inside an engine, by the names that
`settings.engine_arguments` gives it.
"""

from expertmesh.kv_store.tier.settings import TierSettings, engine_arguments

__all__ = ["TierSettings", "engine_arguments"]
