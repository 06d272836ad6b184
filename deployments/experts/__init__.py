"""Expert shards: weights of some experts and a socket that answers dispatch frames; no state of any request."""
