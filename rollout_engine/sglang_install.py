"""Which SGLang is installed, and which flags it knows: read from its files, because importing it takes seconds."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
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
    """The SGLang that an interpreter would import, found without importing it."""

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
    """Every spelling of a server flag, with underscores, and the name of its field."""
    flags: dict[str, str] = {}
    for node in _declarations(folder):
        if isinstance(node, ast.ClassDef):
            for name, annotation in _fields(node):
                flags |= dict.fromkeys([name, *_spellings(annotation)], name)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            spellings = list(_spellings(node))
            flags |= {spelling: flags.get(spelling, spellings[0]) for spelling in spellings}
    return flags


def flag_types(folder: Path) -> dict[str, str]:
    """ "int", "float" or "bool" by field, for those that take one such value and nothing else."""
    found: dict[str, str] = {}
    for node in _declarations(folder):
        if isinstance(node, ast.ClassDef):
            kinds = {name: _simple_type(annotation) for name, annotation in _fields(node)}
            found |= {name: kind for name, kind in kinds.items() if kind}
    return found


def _declarations(folder: Path) -> Iterator[ast.AST]:
    """0.5.15 declares the fields in server_args.py, later versions in arg_groups/fields/."""
    arguments = folder / "srt" / "server_args.py"
    for path in [arguments, *sorted((folder / "srt" / "arg_groups" / "fields").glob("*.py"))]:
        try:
            yield from ast.walk(ast.parse(path.read_text()))
        except (OSError, SyntaxError) as error:
            raise EngineConfigError(f"{path} cannot be read ({error}); install SGLang again") from error


def _fields(declaration: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Name and annotation."""
    for node in declaration.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.annotation


def _simple_type(annotation: ast.expr) -> str:
    """Of Annotated[Optional[int], ...] "int"; "" for anything but int, float and bool, or with a parser of its own."""
    if any(isinstance(node, ast.keyword) and node.arg == "type_parser" for node in ast.walk(annotation)):
        return ""
    while isinstance(annotation, ast.Subscript):
        wrapper, inner = ast.unparse(annotation.value), annotation.slice
        if wrapper not in ("A", "Annotated", "Optional"):
            return ""
        annotation = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
    name = ast.unparse(annotation)
    return name if name in ("int", "float", "bool") else ""


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


def check_types(flags: Mapping[str, Any], kinds: Mapping[str, str], version: str) -> None:
    """Raise EngineConfigError for a value of `flags` (by field) that SGLang's command line would not take."""
    for name, value in flags.items():
        if not _is_of(value, kinds.get(name, "")):
            expected = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kinds[name]]
            raise EngineConfigError(f"rollout.sglang.{name} = {value!r}: SGLang {version} takes {expected}")


def _is_of(value: Any, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return False
        try:
            (int if kind == "int" else float)(str(value))
        except ValueError:
            return False
    return True
