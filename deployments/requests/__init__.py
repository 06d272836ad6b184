"""Which attention replica a request goes to: what replicas say of their KV caches, and the router that uses it."""
