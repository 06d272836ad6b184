"""The mesh's configuration: one frozen model, read from YAML, with errors that name the field.

Light to import: neither torch, Ray nor vLLM.
"""

from __future__ import annotations

from expertmesh.platform.config.markdown import configuration_markdown
from expertmesh.platform.config.mesh import MeshConfig, config_schema
from expertmesh.platform.config.secret import SECRET_ENV, cluster_secret
from expertmesh.platform.config.sections import (
    DEMO,
    AttentionAutoscaling,
    AttentionConfig,
    AutoscalingConfig,
    ExpertsConfig,
    IngressConfig,
    KVStoreConfig,
    ModelConfig,
    RoutingConfig,
    TelemetryConfig,
)
from expertmesh.platform.config.source import load_config, parse_changes

__all__ = [
    "DEMO",
    "SECRET_ENV",
    "AttentionAutoscaling",
    "AttentionConfig",
    "AutoscalingConfig",
    "ExpertsConfig",
    "IngressConfig",
    "KVStoreConfig",
    "MeshConfig",
    "ModelConfig",
    "RoutingConfig",
    "TelemetryConfig",
    "cluster_secret",
    "config_schema",
    "configuration_markdown",
    "load_config",
    "parse_changes",
]
