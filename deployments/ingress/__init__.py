"""The ingress: vLLM's own OpenAI layer in a process without an engine, and the mesh's admin routes."""
