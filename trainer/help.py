"""The part of `slipstream train --help` that lists settings: the flag table by group, then every key, with defaults."""

from __future__ import annotations

import textwrap
from dataclasses import fields, is_dataclass

from trainer.config import RunConfig
from trainer.flags import GROUPS, Flag

_INDENT, _COLUMN, _WIDTH = 2, 38, 110


def flags_help() -> str:
    """Text for argparse's epilog."""
    blocks = [_group(title, flags) for title, flags in GROUPS]
    return "\n\n".join([*blocks, _keys()])


def _group(title: str, flags: tuple[Flag, ...]) -> str:
    return "\n".join([f"{title}:", *(_line(flag.name, flag.help) for flag in flags)])


def _keys() -> str:
    lines = ["every key of the recipe is a flag too, - or _ (shown with its default):"]
    config = RunConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            lines += [
                _line(f"--{field.name}.{key.name.replace('_', '-')}", _default(getattr(value, key.name)))
                for key in fields(value)
            ]
        else:
            lines.append(_line(f"--{field.name.replace('_', '-')}", _default(value)))
    lines.append(_line("--policy.megatron.FIELD", "any field of Megatron-core's TransformerConfig"))
    lines.append(_line("--sglang-NAME [VALUE]", "any other flag of SGLang's server, as [rollout.sglang] holds them"))
    return "\n".join(lines)


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value or value == 0 else "(none)"


def _line(name: str, text: str) -> str:
    start = f"{' ' * _INDENT}{name}"
    gap = "  " if len(start) + 2 > _COLUMN else " " * (_COLUMN - len(start))
    return textwrap.fill(start + gap + text, _WIDTH, subsequent_indent=" " * _COLUMN, break_on_hyphens=False)
