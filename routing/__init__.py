"""Where things go: placement, dispatch, the wire between attention and experts, and the vLLM plugin that uses them.

Knows nothing of Ray Serve deployments, AWS or HTTP.
"""
