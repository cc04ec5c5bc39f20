"""YAML as a strict difference onto frozen dataclasses: unknown keys, wrong types and impossible values are faults.

Every fault is collected, with its dotted key, the value found, what was expected and the nearest right name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from blob_url import BlobUrl, is_url
from faults import Fault


def setting(
    default: Any, reason: str, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A dataclass field with its reason and its bounds: least <= value, above < value < below."""
    metadata = {"reason": reason, "least": least, "above": above, "below": below}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key stands once: PyYAML alone would silently let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def yaml_key(f: dataclasses.Field[Any]) -> str:
    return f.name.rstrip("_")  # `from_` and `as_`: Python's own words


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {yaml_key(f): hints[f.name] for f in dataclasses.fields(kind)}


def anchor_paths(tree: Any, kind: type, folder: Path) -> None:
    """Make the relative paths in a tree absolute, in place."""
    for key, hint in _hints(kind).items():
        if not isinstance(tree, dict) or key not in tree:
            continue
        if dataclasses.is_dataclass(hint):
            anchor_paths(tree[key], typing.cast(type, hint), folder)
        elif (
            Path in (hint, *typing.get_args(hint))
            and isinstance(tree[key], str)
            and tree[key]
            and "\0" not in tree[key]
            and not (BlobUrl in typing.get_args(hint) and is_url(tree[key]))
        ):
            tree[key] = str((folder / os.path.expanduser(tree[key])).resolve())  # noqa: PTH111 -- Path's raises


def build(kind: type, tree: Any, key: str, faults: list[str]) -> Any:
    """The dataclass `kind` from a tree; faults are appended, and then what is returned is of no use."""
    if not isinstance(tree, dict):
        faults.append(f"{key.rstrip('.')}: expected a mapping, found {tree!r}")
        return None
    hints, values = _hints(kind), {}
    for name in tree:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            advice = f"did you mean {key}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            faults.append(f"{key}{name}: unknown key (value {tree[name]!r}); {advice}")
    for f in dataclasses.fields(kind):
        name = yaml_key(f)
        if name in tree:
            values[f.name] = _value(hints[name], tree[name], key + name, f.metadata, faults)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{key}{name}: missing")
    return kind(**values) if not faults else None


def _value(hint: Any, value: Any, key: str, bounds: Mapping[str, Any], faults: list[str]) -> Any:
    """`value` as the type `hint` within its bounds, or a fault."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key + ".", faults)
    if value is None and type(None) in inner:
        return None
    if BlobUrl in inner and isinstance(value, str) and is_url(value):
        try:
            return BlobUrl(value)
        except Fault as fault:
            faults += [f"{key}: {line}" for line in fault.args]
            return value
    if origin in (typing.Union, types.UnionType):  # a word, or a list; a path, if not the address above
        return _value(inner[1 if isinstance(value, list) else 0], value, key, bounds, faults)
    if origin is Literal:
        if value not in inner:
            faults.append(f"{key}: expected {' or '.join(map(str, inner))}, found {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (inner[-1] is not ... and len(value) != len(inner)):
            length = "" if inner[-1] is ... else f" of {len(inner)}"
            faults.append(f"{key}: expected a list{length}, found {value!r}")
            return value
        return tuple(_value(inner[0], item, f"{key}[{i}]", bounds, faults) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            faults.append(f"{key}: expected a mapping of names, found {value!r}")
            return value
        return {
            _value(str, name, f"{key} (a name)", {}, faults): _value(inner[1], item, f"{key}.{name}", bounds, faults)
            for name, item in value.items()
        }
    if hint is float and isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 takes 1e-5 for a string
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = float(value)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}[hint]
    if not isinstance(value, str if hint is Path else hint) or (hint is int and isinstance(value, bool)) or value == "":
        faults.append(f"{key}: expected {expected}, found {value!r}")
        return value
    if hint is Path and "\0" in value:
        faults.append(f"{key}: expected a path, found one with a zero byte in it: {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{key}: expected a finite number, found {value}")
    least, above, below = (bounds.get(name) for name in ("least", "above", "below"))
    if (
        (least is not None and value < least)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        limits = [
            f"{word} {limit:g}"
            for word, limit in (("at least", least), ("above", above), ("below", below))
            if limit is not None
        ]
        faults.append(f"{key}: expected {' and '.join(limits)}, found {value}")
    return Path(value) if hint is Path else value
