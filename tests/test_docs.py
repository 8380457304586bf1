"""What the documents name exists: links, files, commands and metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.report_helpers import full_line

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = ("draft_models", "rollout_engine", "sync", "trainer", "tests", "recipes", "benchmarks", "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path):
    text = page.read_text()
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("#")]
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|toml|md|png)\b", re.sub(r"<!--.*?-->", "", text))
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_a_page_have_their_heading(page: Path):
    text = page.read_text()
    headings = {heading_anchor(line) for line in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def heading_anchor(heading: str) -> str:
    return re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-")


def test_the_commands_of_the_readme_are_those_of_the_command_line():
    from trainer.cli import _COMMANDS

    named = set(re.findall(r"`slipstream ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named == {name for name, _ in _COMMANDS}


def test_every_metric_is_explained():
    table = (ROOT / "docs" / "architecture.md").read_text().split("## Metrics")[1]
    explained = set(re.findall(r"`([\w<>]+)`", table))
    shortened = {f"response_len{name}" for name in explained if name.startswith("_")}
    keys = {key for key in full_line(0) if key not in ("step", "entropy") and not key.startswith("time_")}
    assert keys <= explained | shortened
