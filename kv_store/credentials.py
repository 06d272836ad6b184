"""What a new connection authenticates with."""

from __future__ import annotations

from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from expertmesh.kv_store.settings import StoreSettings


def provider_of(settings: StoreSettings) -> CredentialProvider | None:
    """What redis-py asks for credentials at each connect; None: the server asks for none."""
    if settings.iam is not None:
        from expertmesh.kv_store.iam import IamCredentials  # boto3 is slow to import

        return IamCredentials(settings.iam, settings.username)
    if settings.password:
        return UsernamePasswordCredentialProvider(settings.username or None, settings.password)
    return None
