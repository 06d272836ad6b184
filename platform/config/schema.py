"""Reading a JSON schema: what may stand at a path, in words. Error messages and documentation both come from here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Node = dict[str, Any]


def resolve(schema: Node, node: Node) -> Node:
    """`node` with its `$ref` followed into `schema`; keys beside the reference win."""
    reference = node.get("$ref")
    if reference is None:
        return node
    target = schema["$defs"][reference.rpartition("/")[2]]
    return {**resolve(schema, target), **{key: value for key, value in node.items() if key != "$ref"}}


def alternatives(schema: Node, node: Node) -> list[Node]:
    """What may stand at `node`, null among it; one item where there is no choice."""
    node = resolve(schema, node)
    return [resolve(schema, choice) for choice in node.get("anyOf", [node])]


def properties(schema: Node, node: Node) -> dict[str, Node]:
    """The keys that a section at `node` has; empty if `node` isn't a section."""
    for choice in alternatives(schema, node):
        if "properties" in choice:
            found: dict[str, Node] = choice["properties"]
            return found
    return {}


def dotted_keys(schema: Node, node: Node | None = None, above: str = "") -> Iterator[str]:
    """The dotted path of every key below `node` (of all, without one) that is no section with keys of its own."""
    for key, inner in properties(schema, node or schema).items():
        here = f"{above}{key}"
        below = list(dotted_keys(schema, inner, f"{here}."))
        yield from below or [here]


def node_at(schema: Node, path: Iterable[object]) -> Node | None:
    """The schema of what stands at `path`; None if nothing is declared there."""
    node: Node | None = schema
    for key in path:
        if node is None:
            return None
        inside = properties(schema, node)
        if inside:
            node = inside.get(str(key))
            continue
        free = [choice.get("additionalProperties", choice.get("items")) for choice in alternatives(schema, node)]
        node = next((inner for inner in free if isinstance(inner, dict)), None)
    return None if node is None else resolve(schema, node)


def choices(schema: Node, node: Node) -> list[str]:
    """The words that are allowed at `node`, if it is such a choice; else empty."""
    words: list[str] = []
    for choice in alternatives(schema, node):
        words += [choice["const"]] if "const" in choice else choice.get("enum", [])
    return words


def unit_at(schema: Node, node: Node) -> str | None:
    """The unit of the number at `node`, if it has one."""
    node = resolve(schema, node)
    units = [node.get("unit")] + [choice.get("unit") for choice in alternatives(schema, node)]
    return next((unit for unit in units if unit is not None), None)


def describe(schema: Node, node: Node) -> str:
    """What may stand at `node`, in words: `integer >= 1 or null`."""
    return " or ".join(_describe_one(schema, choice) for choice in alternatives(schema, node))


def _describe_one(schema: Node, node: Node) -> str:
    words = choices(schema, node)
    if words:
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    kind = node.get("type")
    if kind in ("integer", "number"):
        return f"{kind}{_bounds(node)}"
    if kind == "object":
        inner = node.get("additionalProperties")
        if "properties" in node:
            return "section"
        return f"mapping of names to {describe(schema, inner)}" if isinstance(inner, dict) else "mapping"
    if kind == "array":
        return f"list of {describe(schema, node['items'])}"
    if kind == "string":
        return "path" if node.get("format") == "path" else "text"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "any JSON value")


def _bounds(node: Node) -> str:
    low, high, above = node.get("minimum"), node.get("maximum"), node.get("exclusiveMinimum")
    if low is not None and high is not None:
        return f" {low} to {high}"
    if low is not None:
        return f" >= {low}"
    return f" > {above}" if above is not None else ""
