"""How many replicas each deployment is to have, in a store that outlives the controller.

Our controller writes, Serve's controller reads in a process of its own: so a number stays in force while ours is away.
"""

from __future__ import annotations

from typing import Literal, Protocol

Deployment = Literal["attention", "experts"]
DEPLOYMENTS: tuple[Deployment, ...] = ("attention", "experts")


class Store(Protocol):
    """Keys with values."""

    def get(self, key: str) -> bytes | None:
        """The value; None if there is none."""

    def put(self, key: str, value: bytes) -> None:
        """Sets or replaces it."""

    def delete(self, key: str) -> None:
        """Does nothing if it isn't there."""


class Targets:
    """The numbers of one Serve application."""

    def __init__(self, store: Store, application: str) -> None:
        self._store = store
        self._application = application

    def manual(self, deployment: Deployment) -> int | None:
        """What a person asked for; None if nobody did."""
        return self._get("manual", deployment)

    def target(self, deployment: Deployment) -> int | None:
        """What is in force; None if the configured number is."""
        manual = self.manual(deployment)
        return self._get("automatic", deployment) if manual is None else manual

    def set_manual(self, deployment: Deployment, replicas: int | None) -> None:
        """Sets what a person asks for; None goes back to what the signals say, or to the configured number."""
        self._set("manual", deployment, replicas)

    def set_automatic(self, deployment: Deployment, replicas: int | None) -> None:
        """Sets what the signals say."""
        self._set("automatic", deployment, replicas)

    def clear(self) -> None:
        """Forgets everything, as when the application is removed."""
        for deployment in DEPLOYMENTS:
            self.set_manual(deployment, None)
            self.set_automatic(deployment, None)

    def _key(self, kind: str, deployment: Deployment) -> str:
        return f"target/{self._application}/{deployment}/{kind}"

    def _get(self, kind: str, deployment: Deployment) -> int | None:
        value = self._store.get(self._key(kind, deployment))
        return None if value is None else int(value)

    def _set(self, kind: str, deployment: Deployment, replicas: int | None) -> None:
        key = self._key(kind, deployment)
        if replicas is None:
            self._store.delete(key)
        else:
            self._store.put(key, str(replicas).encode())
