"""The list of all Prometheus series of a mesh: pure values, from which recorders and documentation are made."""

from expertmesh.platform.metrics.catalogue import CATALOGUE
from expertmesh.platform.metrics.series import NAMESPACE, Kind, Label, Series

__all__ = ["CATALOGUE", "NAMESPACE", "Kind", "Label", "Series"]
