"""YAML in which a scalar keeps the text that a person wrote, until a type says what it is.

YAML 1.1 reads ``003000`` as 1536, ``3:50:00`` as 13800, ``no`` as false and ``7e12345`` as infinity. Here, a document
becomes mappings and lists of :class:`Scalar`; a schema turns each into text, a number, or whatever the setting is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from scale_digrap.errors import ScaleDigrapError

_MAX_NODES = 1_000_000
"""Aliases can make a small document huge; no configuration comes near this."""

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*|0[xX][0-9a-fA-F]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_FLOAT_NAMES = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_RESOLVER = yaml.SafeLoader("")
_TAGS = {
    f"tag:yaml.org,2002:{name}": name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
}


class YamlError(ScaleDigrapError, ValueError):
    """A document that is not YAML, or that holds what a configuration cannot: says where and what to write."""


@dataclass(frozen=True)
class Scalar:
    """One value as it was written.

    Attributes:
        text: without quotes and comments.
        quoted: it stood in quotes, in a block, or under ``!!str``: it is text whatever it looks like.
    """

    text: str
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        """Whether it is YAML's null."""
        return not self.quoted and self.text in _NULLS

    @property
    def plain(self) -> Any:
        """The value where no type says what it is: null, a bool, a decimal number, else the text.

        Neither base 60 nor octal numbers nor dates: a leading zero or a colon makes text.
        """
        if self.quoted:
            return self.text
        if self.is_null:
            return None
        if (boolean := _BOOLS.get(self.text.lower())) is not None:
            return boolean
        if _INT.fullmatch(self.text):
            return int(self.text, 16 if "x" in self.text.lower() else 10) if len(self.text) < 4000 else self.text
        number = float(self.text) if _FLOAT.fullmatch(self.text) and not re.match(r"[-+]?0[0-9]", self.text) else None
        if number is not None and abs(number) != float("inf"):
            return number
        if _FLOAT_NAMES.fullmatch(self.text):
            return float(self.text.replace(".", "", 1))
        return self.text

    def __str__(self) -> str:
        return repr(self.text) if self.quoted else self.text


def parse_yaml(text: str) -> Any:
    """A document as nested dictionaries and lists of :class:`Scalar`; None if it is empty.

    Keys are text as it was written. Anchors, aliases and merge keys (``<<``) work.

    Raises:
        YamlError: not YAML, more than one document, a key twice in a mapping, a tag that is not one of YAML's scalars.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise YamlError(
            f"not valid YAML{where} ({error.problem or error.context}): text with braces, brackets, colons, quotes or "
            "'#' in it goes into quotes"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise YamlError(f"not valid YAML ({reason})") from None
    return None if node is None else _Tree().value(node, 0)


class _Tree:
    def __init__(self) -> None:
        self.count = 0

    def value(self, node: yaml.Node, depth: int) -> Any:
        self.count += 1
        if self.count > _MAX_NODES or depth > 100:
            raise YamlError(f"not valid YAML in line {node.start_mark.line + 1} (nested too deeply, or too large)")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        kind = _TAGS.get(node.tag)
        if kind is None and node.tag != "!":
            raise YamlError(f"not valid YAML in line {node.start_mark.line + 1} (the tag {node.tag!r} is not read)")
        return Scalar(node.value, node.style is not None or kind is None or (kind == "str" and _said(node)))

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"not valid YAML in line {line} (a key is not text): text with braces goes into quotes")
            if key.tag == "tag:yaml.org,2002:merge":
                for section in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                    more = self.value(section, depth + 1)
                    if not isinstance(more, dict):
                        raise YamlError(f"not valid YAML in line {line} (<< takes mappings)")
                    merged = {**more, **merged}
                continue
            if key.value in found:
                raise YamlError(f"key {key.value!r} is given twice, the second time in line {line}: remove one of them")
            found[key.value] = self.value(item, depth + 1)
        return {**merged, **found}


def _said(node: yaml.ScalarNode) -> bool:
    """Whether ``!!str`` stands before a plain scalar: YAML itself would have taken it for something else."""
    return bool(_RESOLVER.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """In quotes where any reader could take it for something else."""
    plain = not isinstance(Scalar(value).plain, str) or re.match(r"[-+.]?[0-9]", value) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if plain else None)


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    if value != value or value in (float("inf"), float("-inf")):
        return yaml.SafeDumper.represent_float(dumper, value)
    text = repr(value)
    if "e" in text and "." not in text:  # PyYAML itself wants a dot in what it reads as a number
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_multi_representer(str, _text)
_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _float)


def dump_yaml(values: Any) -> str:
    """YAML of nested plain values, keys in their order; text that looks like something else stands in quotes."""
    text: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=2**20
    )
    return text
