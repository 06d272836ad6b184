"""The tier of KV blocks that attention replicas share. Not built yet: `kv_store.url` accepts only `off`."""
