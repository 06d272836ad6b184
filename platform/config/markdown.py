"""The text of docs/configuration.md, from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator

from expertmesh.platform.config import schema as schemas
from expertmesh.platform.config.engine_args import OWNED
from expertmesh.platform.config.mesh import config_schema

EXAMPLE = """\
model: demo                 # or the path of a checkpoint folder, or s3://bucket/prefix

attention:
  replicas: 2
  kv_cache_gib: 2

experts:
  shards: 3
  redundancy: 2             # each expert on two shards, so that one may die

routing:
  frame_deadline_ms: 5000

autoscaling:
  attention:
    min_replicas: 1
    max_replicas: 4

ingress:
  port: 8080

telemetry:
  log_level: info
"""
"""The example of the documentation; a test loads it."""

_INTRODUCTION = """\
# Configuration

<!-- Generated: python -m expertmesh.platform.config.docs > docs/configuration.md -->

One YAML file describes a mesh. Every key has a default, so `model: demo` alone, or an empty file, is a complete
configuration. This one sets a little more:

```yaml
{example}```

```console
$ expertmesh config check mesh.yaml        # what is wrong with it, one line a problem
$ expertmesh config show mesh.yaml         # the effective configuration, with all defaults
$ expertmesh config show mesh.yaml --set experts.shards=3 --set model.served_name=mine
$ expertmesh config schema                 # JSON schema, for an editor
```

* Unknown keys, keys given twice, and values of another type (`replicas: "2"`) are refused. An integer is taken where a
  number is wanted.
* Relative paths count from the folder of the YAML file; with `--set`, from the working directory.
* The file never holds a secret: a key that looks like one (`password`, `api_key`, `hf_token`) is refused. The cluster's
  secret, with which the parts of a mesh authenticate each other, comes from the file that `routing.secret_file` names,
  else from the environment variable `EXPERTMESH_SECRET`, else one is made for this machine, which serves a mesh on one
  node only. It has at least 16 bytes, and its file is closed to other users (`chmod 600`).
"""

_ENGINE_ARGS = """\
Refused in `attention.engine_args`, because the mesh sets them:

| engine argument | instead |
| --- | --- |
"""


def configuration_markdown() -> str:
    """The whole reference: introduction, an example, and one table for each section."""
    schema = config_schema()
    parts = [_INTRODUCTION.format(example=EXAMPLE)]
    for section, node in schema["properties"].items():
        rows = "\n".join(_rows(schema, node, section))
        parts.append(
            f"## {section}\n\n{schemas.resolve(schema, node)['description']}\n\n"
            f"| key | type | default | unit | meaning |\n| --- | --- | --- | --- | --- |\n{rows}\n"
        )
        if section == "attention":
            parts.append(_ENGINE_ARGS + "\n".join(f"| `{key}` | {instead} |" for key, instead in OWNED.items()) + "\n")
    return "\n".join(parts)


def _rows(schema: schemas.Node, node: schemas.Node, path: str) -> Iterator[str]:
    for key, field in schemas.properties(schema, node).items():
        here = f"{path}.{key}"
        cells = (
            f"`{here}`",
            schemas.describe(schema, field),
            _default(field),
            schemas.unit_at(schema, field) or "",
            field["description"],
        )
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        yield from _rows(schema, field, here)


def _default(field: schemas.Node) -> str:
    if "default" in field:
        return f"`{json.dumps(field['default'])}`" if not isinstance(field["default"], str) else f"`{field['default']}`"
    # pydantic writes no default that a factory makes; ours are empty mappings and sections.
    if "$ref" in field:
        return "as below"
    return "`{}`" if "additionalProperties" in field else "required"
