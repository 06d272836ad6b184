"""Attention replicas: vLLM engines with everything of the model but its routed experts."""
