"""TOML recipe and command-line flags -> one frozen `RunConfig`, or one line that says what is wrong and where."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from trainer.config import ConfigError, RunConfig
from trainer.flags import DERIVED, SGLANG_PREFIX, TABLE
from trainer.suggest import nearest

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_PASSED_ON = ("policy.megatron.", "rollout.sglang.")  # tables whose keys belong to another system
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True, slots=True)
class Override:
    """One setting given on the command line."""

    flag: str  # as the user wrote it, for errors
    key: str  # dotted
    text: str


@cache
def known_keys() -> dict[str, Any]:
    """Every dotted key of `RunConfig` with its type; two are mappings that take any key (see `_PASSED_ON`)."""
    return dict(_leaves(RunConfig, ""))


def _leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


def parse_flags(
    arguments: Sequence[str], command: str = "train", offered: Sequence[str] = ()
) -> tuple[list[str], list[Override]]:
    """(what is no flag, the settings given by flags), each in order.

    `ConfigError` for an unknown flag names the nearest of those that `command` has: `offered`, or every one of train's.

    `--key=value` and `--key value`; `-` and `_` are the same in a flag. A boolean flag needs no value, and neither does
    a server flag of SGLang (`--sglang-NAME`), which means true without one.
    """
    positional: list[str] = []
    overrides: list[Override] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            positional.append(argument)
            continue
        flag, equals, text = argument.partition("=")
        key, fixed = _key_of(flag)
        if not key:
            known = offered or offered_flags()
            name = "--" + flag[2:].replace("_", "-")
            raise ConfigError(f"unknown flag {flag}{nearest(name, known)}; slipstream {command} --help lists them all")
        if fixed:
            if equals:
                raise ConfigError(f"{flag} takes no value, got {text!r}")
            text = fixed
        elif not equals:
            text = _following_value(flag, key, rest)
        overrides.append(Override(flag, key, text))
    return positional, overrides


def _key_of(flag: str) -> tuple[str, str]:
    """(dotted key, fixed value or '') of a flag as the user wrote it; two times '' for an unknown one."""
    name = "--" + flag[2:].replace("_", "-")
    if name in TABLE:
        return TABLE[name].key, TABLE[name].value
    if flag.startswith(tuple(f"--{prefix}" for prefix in _PASSED_ON)):
        table, _, field = flag[2:].rpartition(".")
        return f"{table}.{field.replace('-', '_')}", ""
    if name.startswith(SGLANG_PREFIX) and name != SGLANG_PREFIX:
        return "rollout.sglang." + name.removeprefix(SGLANG_PREFIX).replace("-", "_"), ""
    key = flag[2:].replace("-", "_")
    if key in known_keys() and not _is_mapping(known_keys()[key]):
        return key, ""
    return "", ""


def offered_flags(has: Callable[[str], bool] = lambda key: True) -> list[str]:
    """The flags of all settings whose dotted key the command has, short names first."""
    short = [name for name, flag in TABLE.items() if has(flag.key)]
    return [*short, *(f"--{key.replace('_', '-')}" for key in known_keys() if has(key))]


def _following_value(flag: str, key: str, rest: list[str]) -> str:
    """Take the flag's value from the arguments behind it; a boolean flag, or one of SGLang's, may stand alone."""
    if known_keys().get(key) is bool:
        # What follows may be the recipe. A bare word is none; as a value it is checked with all others.
        is_value = rest and (rest[0].lower() in (*_TRUE, *_FALSE) or rest[0].isalnum())
        return rest.pop(0) if is_value else "true"
    if not rest or rest[0].startswith("--"):
        if key.startswith("rollout.sglang."):
            return "true"
        raise ConfigError(f"{flag} needs a value, {_expected(_type_of(key))}")
    return rest.pop(0)


def load_config(recipe: Path | None, overrides: Sequence[Override] = ()) -> RunConfig:
    """The recipe's settings with the command line's on top. `ConfigError`: unknown key, wrong type, unreadable file."""
    values = {} if recipe is None else read_recipe(recipe)
    derived: dict[str, Override] = {}  # applied last, because they look at the others
    for override in overrides:
        value = parse_text(override.text, _type_of(override.key), override.flag)
        if override.key in DERIVED:
            derived[override.key] = override
        else:
            values[override.key] = value
    for key, override in derived.items():
        if key in _APPLY:
            _APPLY[key](values, override)
    return build(values)


def read_recipe(recipe: Path) -> dict[str, Any]:
    """Dotted key -> checked value of a TOML file."""
    try:
        tables = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {recipe}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {recipe}: not TOML ({error})") from None
    return dict(_flatten(tables, "", str(recipe)))


def _flatten(table: Mapping[str, Any], prefix: str, where: str) -> Iterator[tuple[str, Any]]:
    tables = {key.rpartition(".")[0] for key in known_keys()}
    for name, value in table.items():
        key = prefix + name
        if key in known_keys():
            yield from _checked(key, value, where)
        elif key not in tables:
            raise ConfigError(f"{where}: unknown key {key!r}{_nearest_key(key)}")
        elif not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} = {value!r}, but {key} is a table; write [{key}]")
        else:
            yield from _flatten(value, f"{key}.", where)


def _checked(key: str, value: Any, where: str) -> Iterator[tuple[str, Any]]:
    kind = known_keys()[key]
    if _is_mapping(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} = {value!r}, but {key} is a table; write [{key}]")
        spelt = {name: name.replace("-", "_") if key == "rollout.sglang" else name for name in value}  # as a flag's is
        if twice := [name for name in value if name != spelt[name] and spelt[name] in value]:
            raise ConfigError(f"{where}: {key} has both {twice[0]} and {spelt[twice[0]]}: they are one flag")
        yield from ((f"{key}.{spelt[name]}", item) for name, item in value.items())
    else:
        yield key, check_value(value, kind, f"{where}: {key}")


def _nearest_key(key: str) -> str:
    """A key of the same last name in another table, else the one spelt most alike."""
    leaf = key.rpartition(".")[2]
    same = [known for known in known_keys() if known.rpartition(".")[2] == leaf]
    tables = {known.partition(".")[0] for known in known_keys() if "." in known}
    return f", did you mean {same[0]!r}?" if same else nearest(key, [*known_keys(), *tables])


def check_value(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as the setting's type: whole numbers are numbers too, lists become tuples."""
    if get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(check_value(item, get_args(kind)[0], where) for item in value)
    elif kind is float and type(value) in (int, float):
        return _finite(float(value), where)
    elif type(value) is kind:
        return value
    raise ConfigError(f"{where} = {value!r} is of the wrong type, expected {_expected(kind)}")


def parse_text(text: str, kind: Any, where: str) -> Any:
    """A command line's text as the setting's type; lists are separated by commas, brackets allowed."""
    try:
        if get_origin(kind) is tuple:
            items = text.strip().strip("[]()").split(",")
            return tuple(
                parse_text(item.strip().strip("'\""), get_args(kind)[0], where) for item in items if item.strip()
            )
        if kind is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        if kind is Any:
            return _parse_any(text)
        value = kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{where} {text!r} is of the wrong type, expected {_expected(kind)}") from None
    return _finite(value, where) if kind is float else value


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{where} = {value}: it must be a finite number")
    return value


def _parse_any(text: str) -> Any:
    """A pass-through value: TOML if it is any, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _type_of(key: str) -> Any:
    if key.startswith(_PASSED_ON):
        return Any
    return DERIVED.get(key) or known_keys()[key]


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) is dict


def _expected(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list, each {_expected(get_args(kind)[0])}"
    return _TYPE_NAMES.get(kind, "a value")


def build(values: Mapping[str, Any]) -> RunConfig:
    """`RunConfig` from dotted keys and values of the right types; what is absent keeps its default."""
    return _build(RunConfig, values, "")


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        if is_dataclass(kind):
            arguments[field.name] = _build(kind, values, f"{key}.")
        elif _is_mapping(kind):
            start = f"{key}."
            arguments[field.name] = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
        elif key in values:
            arguments[field.name] = values[key]
    return cls(**arguments)


def _apply_global_batch_size(values: dict[str, Any], override: Override) -> None:
    """slime's --global-batch-size: samples of a rollout / samples of one optimizer step = optimizer steps."""
    key = "algorithm.num_steps_per_rollout"
    size = parse_text(override.text, int, override.flag)
    data = build(values).data
    samples = data.rollout_batch_size * data.n_samples_per_prompt
    if size < 1 or samples % size:
        raise ConfigError(
            f"{override.flag} {size} does not divide the {samples} samples of a rollout "
            f"({data.rollout_batch_size} prompts x {data.n_samples_per_prompt})"
        )
    if values.get(key, samples // size) != samples // size:
        raise ConfigError(
            f"{override.flag} {size} makes {samples // size} optimizer steps a rollout, "
            f"but {key} = {values[key]}; give one of them"
        )
    values[key] = samples // size


def _apply_eps_clip(values: dict[str, Any], override: Override) -> None:
    """slime's --eps-clip: both clips, unless the upper one is given too."""
    value = parse_text(override.text, float, override.flag)
    values["algorithm.eps_clip"] = value
    values.setdefault("algorithm.eps_clip_high", value)


def _apply_recompute_granularity(values: dict[str, Any], override: Override) -> None:
    if override.text != "full":
        raise ConfigError(f"{override.flag} {override.text!r}: only 'full' is accepted; leave it out for none")
    values["policy.recompute"] = True


def _apply_external_engine(values: dict[str, Any], override: Override) -> None:
    """slime's --rollout-external-engine-addrs HOST:PORT: one engine, with or without http:// in front."""
    address = override.text.rstrip("/")
    values["rollout.sglang_address"] = address if "://" in address else f"http://{address}"


_APPLY: dict[str, Callable[[dict[str, Any], Override], None]] = {
    "global_batch_size": _apply_global_batch_size,
    "eps_clip": _apply_eps_clip,
    "recompute_granularity": _apply_recompute_granularity,
    "external_engine_addrs": _apply_external_engine,
}
