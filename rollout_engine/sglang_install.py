"""Which SGLang is installed, and which flags it knows: read from its files, because importing it takes seconds."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rollout_engine.types import EngineConfigError

_OLDEST, _NEWEST = (0, 5, 15), (0, 5, 23)  # the protocol was read in both and in between
_BEGIN_END_SINCE = (0, 5, 23)
_BEGIN_ROUTE = "/begin_weight_update"
_PROBE_TIMEOUT_S = 60.0
_PROBE = """
import importlib.util as u, json
def has(name):
    return u.find_spec(name) is not None
spec = u.find_spec("sglang")
folder = None if spec is None else list(spec.submodule_search_locations)[0]
print(json.dumps({"folder": folder, "flashinfer": has("flashinfer"), "memory_saver": has("torch_memory_saver")}))
"""


@dataclass(frozen=True, slots=True)
class Installation:
    python: str
    folder: Path  # of the package
    version: str
    has_flashinfer: bool
    has_memory_saver: bool


def find_sglang(python: str) -> Installation:
    """The SGLang of the interpreter `python` ("" = this one). EngineConfigError: there is none, or an unknown one."""
    python = str(Path(python).absolute()) if python else sys.executable  # the server starts in another folder
    mend = "pip install '.[sglang]', or let rollout.sglang_python name the interpreter of an environment that has it"
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineConfigError(f"rollout.sglang_python = {python!r} cannot be run ({error})") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineConfigError(f"rollout.sglang_python = {python!r} fails ({last})")
    found = json.loads(done.stdout)
    if found["folder"] is None:
        raise EngineConfigError(f"SGLang is not installed for {python}: {mend}")
    folder = Path(found["folder"])
    version = read_version(folder)
    update_protocol(version)
    return Installation(python, folder, version, found["flashinfer"], found["memory_saver"])


def read_version(folder: Path) -> str:
    """From the package's own file. EngineConfigError when it does not say."""
    for name in ("_version.py", "version.py"):
        path = folder / name
        if path.is_file() and (found := re.search(r"""version = ["']([^"']+)["']""", path.read_text())):
            return found.group(1)
    raise EngineConfigError(f"{folder}: no version in _version.py; install SGLang again")


def update_protocol(version: str, routes: Collection[str] = ()) -> bool:
    """Whether weight updates of this server stand between begin_weight_update and end_weight_update.

    By its `routes` where they are known (builds between two releases carry the number of the older one), otherwise by
    its version. Raises EngineConfigError for a version whose protocol is not known.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(map(int, found.groups())) if found else ()
    if not _OLDEST <= numbers <= _NEWEST:
        oldest, newest = (".".join(map(str, limit)) for limit in (_OLDEST, _NEWEST))
        raise EngineConfigError(
            f"SGLang {version} is not known to this engine: install one from {oldest} to {newest} "
            "(0.5.15.post1 is what pip install '.[sglang]' brings)"
        )
    return _BEGIN_ROUTE in routes if routes else numbers >= _BEGIN_END_SINCE


def known_flags(folder: Path) -> dict[str, str]:
    """Every spelling of a server flag, with underscores, and the name of its field.

    0.5.15 declares the fields in server_args.py, later versions in arg_groups/fields/.
    """
    arguments = folder / "srt" / "server_args.py"
    flags: dict[str, str] = {}
    for path in [arguments, *sorted((folder / "srt" / "arg_groups" / "fields").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                flags |= _fields(node)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                spellings = list(_spellings(node))
                flags |= {spelling: flags.get(spelling, spellings[0]) for spelling in spellings}
    return flags


def _fields(declaration: ast.ClassDef) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in declaration.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            found |= dict.fromkeys([name, *_spellings(node.annotation)], name)
    return found


def _spellings(node: ast.AST) -> Iterable[str]:
    for constant in ast.walk(node):
        text = constant.value if isinstance(constant, ast.Constant) else None
        if isinstance(text, str) and re.fullmatch(r"--[a-z0-9][a-z0-9-]*", text):
            yield text.removeprefix("--").replace("-", "_")


def canonical(settings: Mapping[str, Any], known: Mapping[str, str], version: str) -> dict[str, Any]:
    """`settings` under the names of the fields. EngineConfigError for a flag that this SGLang does not know."""
    named: dict[str, Any] = {}
    for key, value in settings.items():
        spelling = key.replace("-", "_")
        if spelling not in known:
            matches = get_close_matches(spelling, list(known), n=1, cutoff=0.5)
            hint = f", did you mean {matches[0]}?" if matches else ""
            raise EngineConfigError(f"rollout.sglang.{key}: SGLang {version} has no such flag{hint}")
        if known[spelling] in named:
            raise EngineConfigError(f"rollout.sglang.{key} is given twice, the other time as {known[spelling]}")
        named[known[spelling]] = value
    return named
