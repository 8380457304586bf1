"""Dataclasses to TOML that `tomllib` reads back equal (the standard library has no writer)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(config: Any) -> str:
    """TOML text of a dataclass or mapping: plain values first, then one table per nested dataclass or mapping.

    Values: str, bool, int, float (inf and nan too), lists and tuples of them, mappings inside lists (inline
    tables). Tuples read back as lists. Raises TypeError naming the key for anything else; TOML has no null.
    """
    return "\n".join(_table(config, ())).strip() + "\n"


def _table(config: Any, path: tuple[str, ...]) -> list[str]:
    items = _items(config)
    tables = {key: value for key, value in items.items() if _is_table(value)}
    lines = [f"\n[{'.'.join(map(_key, path))}]"] if path else []
    lines += [f"{_key(key)} = {_value(value, (*path, key))}" for key, value in items.items() if key not in tables]
    for key, value in tables.items():
        lines += _table(value, (*path, key))
    return lines


def _items(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or is_dataclass(value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML wants DEL escaped and knows no surrogate pairs.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item, path) for item in value)}]"
    if _is_table(value):
        pairs = (f"{_key(key)} = {_value(item, (*path, key))}" for key, item in _items(value).items())
        return f"{{ {', '.join(pairs)} }}"
    raise TypeError(f"{'.'.join(path)}: TOML cannot hold a {type(value).__name__} ({value!r})")
