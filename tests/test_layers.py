"""The house: imports point down only, and every foreign system has one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "draft_models": {"draft_models"},
    "sync": {"sync"},
    "rollout_engine": {"rollout_engine", "draft_models", "sync"},
    "trainer": {"trainer", "rollout_engine", "draft_models", "sync"},
}
OURS = {*FLOORS, "tests", "benchmarks"}
DOORS = {
    "megatron": "trainer/megatron_policy.py",
    "sglang": "rollout_engine/sglang_engine.py",
    "ray": "trainer/cluster.py",
    "flashinfer": "rollout_engine/attention.py",
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def imported_packages(source: str) -> set[str]:
    """Top-level names of every import in `source`, lazy ones included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def violations(path: str, source: str) -> list[str]:
    """What `path` may not import, with `path` relative to the repository's root."""
    floor = Path(path).parts[0]
    found = []
    for package in sorted(imported_packages(source)):
        if package in OURS and package not in FLOORS[floor]:
            found.append(f"{path} imports {package}: imports point down only")
        if package in DOORS and path != DOORS[package]:
            found.append(f"{path} imports {package}: its only door is {DOORS[package]}")
    return found


def project_files() -> list[Path]:
    return [file for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py"))]


def test_imports_point_down_and_go_through_the_doors() -> None:
    found = [v for f in project_files() for v in violations(f.relative_to(ROOT).as_posix(), f.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sync/plan.py", "from draft_models import verify"),
        ("draft_models/eagle3.py", "def f():\n    import rollout_engine.types"),
        ("trainer/loop.py", "import megatron.core"),
        ("rollout_engine/torch_engine.py", "from benchmarks import common"),
    ],
)
def test_a_planted_violation_is_seen(path: str, source: str) -> None:
    assert violations(path, source)


def test_files_and_functions_stay_readable() -> None:
    found = []
    for file in [*project_files(), *sorted((ROOT / "benchmarks").rglob("*.py"))]:
        source = file.read_text()
        if source.count("\n") >= MAX_FILE_LINES:
            found.append(f"{file.relative_to(ROOT)}: {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: too long")
    assert not found, "\n".join(found)


def module_graph() -> dict[str, set[str]]:
    """Import-time edges between our modules (imports inside functions and under TYPE_CHECKING left out)."""
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in project_files()}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        edges = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                edges |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                edges |= {alias.name for alias in node.names}
        graph[name] = edges & set(names)
    return graph


def test_no_import_cycles() -> None:
    graph = module_graph()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done:
            return
        for dependency in graph[module]:
            visit(dependency, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())
