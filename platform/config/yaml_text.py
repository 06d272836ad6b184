"""Reading and writing the configuration's YAML: safe types only, no key twice, errors with line and column."""

from __future__ import annotations

import re
from typing import Any

import yaml

from expertmesh.errors import ConfigError

_FLOAT_TAG = "tag:yaml.org,2002:float"
# YAML 1.1 takes 1e3 and 1.5e3 for text; everybody else takes them for numbers.
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z")
_FIRST = list("-+0123456789")
_UNICODE_BREAK = re.compile("[\x85\u2028\u2029]")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not when constructing, where merged keys (`<<`) already stand beside those that override them.
        node = super().compose_mapping_node(anchor)
        self._refuse_repeated_keys(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # PyYAML lets these out where a value doesn't fit its tag, as in `2026-13-45` or `!!bool maybe`.
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this can't be read as {kind}; is it text that needs quotes?", node.start_mark
            ) from None

    def timestamp(self, node: yaml.ScalarNode) -> Any:
        return self.construct_yaml_timestamp(node)

    def _refuse_repeated_keys(self, node: yaml.MappingNode) -> None:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            first = lines.get((key.tag, key.value))
            if first is not None:
                problem = f"the key {key.value} is there twice, first on line {first}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds these line breaks of Unicode away, except in double quotes, where it escapes them.
        style = '"' if _UNICODE_BREAK.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

_Loader.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, _FIRST)
# lm-format-enforcer, which vLLM imports for some grammars, makes text of timestamps in every SafeLoader of the process.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.timestamp)
_Dumper.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, _FIRST)  # so that such text is quoted


def parse(text: str, origin: str) -> object:
    """The value of one YAML document; None if it is empty.

    Raises ConfigError that starts with `origin`, with line and column; it never quotes the text, which may hold a
    secret that shouldn't be there.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # derives from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{origin}: {where}{_without_quotes(what)}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{origin}: character {error.position + 1}: {error.reason}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply") from None


def dump(data: object) -> str:
    """`data` (mappings, lists, text, numbers, booleans, None) as a YAML document that `parse` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _without_quotes(problem: str) -> str:
    """On one line, without quoted text: tags and aliases come in full, so `password: *s3cret` would show."""
    return " ".join(_QUOTED.sub(lambda quote: quote[0] if _harmless(quote[0][1:-1]) else "'...'", problem).split())


def _harmless(quoted: str) -> bool:
    # A character, an escaped character such as \t, or one of PyYAML's tokens such as <block end>.
    return len(quoted) < 2 or quoted.startswith("<") or (len(quoted) == 2 and quoted[0] == "\\")
