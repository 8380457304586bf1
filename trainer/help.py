"""The part of `slipstream train --help` that lists settings: the flag table by group, then every key, with defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass

from trainer.config import RunConfig
from trainer.flags import GROUPS, Flag

_INDENT, _COLUMN, _WIDTH = 2, 38, 110


def flags_help() -> str:
    """Text for argparse's epilog."""
    blocks = [_group(title, flags) for title, flags in GROUPS]
    return "\n\n".join([*blocks, _keys()])


def finetune_help() -> str:
    """The flags of train that `slipstream finetune-draft` shares, for argparse's epilog."""
    from trainer.finetune_config import is_shared, shared_config

    groups = [(title, tuple(flag for flag in flags if is_shared(flag.key))) for title, flags in GROUPS]
    keys = _key_lines(shared_config(), lambda key: is_shared(key) and key != "rollout.sglang")
    shared = "\n".join(["settings of train that mean the same here (shown with their defaults):", *keys, _SGLANG_LINE])
    return "\n\n".join([*(_group(title, flags) for title, flags in groups if flags), shared])


def _group(title: str, flags: tuple[Flag, ...]) -> str:
    return "\n".join([f"{title}:", *(_line(flag.name, flag.help) for flag in flags)])


def _keys() -> str:
    lines = ["every key of the recipe is a flag too, - or _ (shown with its default):", *_key_lines(RunConfig())]
    lines.append(_line("--policy.megatron.FIELD", "any field of Megatron-core's TransformerConfig"))
    lines.append(_SGLANG_LINE)
    return "\n".join(lines)


def _key_lines(config: RunConfig, is_wanted: Callable[[str], bool] = lambda key: True) -> list[str]:
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            named = {f"{field.name}.{key.name}": getattr(value, key.name) for key in fields(value)}
        else:
            named = {field.name: value}
        lines += [
            _line(f"--{key.replace('_', '-')}", _default(value)) for key, value in named.items() if is_wanted(key)
        ]
    return lines


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value or value == 0 else "(none)"


def _line(name: str, text: str) -> str:
    start = f"{' ' * _INDENT}{name}"
    gap = "  " if len(start) + 2 > _COLUMN else " " * (_COLUMN - len(start))
    return textwrap.fill(start + gap + text, _WIDTH, subsequent_indent=" " * _COLUMN, break_on_hyphens=False)


_SGLANG_LINE = _line("--sglang-NAME [VALUE]", "any other flag of SGLang's server, as [rollout.sglang] holds them")
