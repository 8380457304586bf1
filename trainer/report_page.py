"""The frame of the report page: its style sheet and the pieces of HTML that sections are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16202c; --muted: #647184; --grid: #e3e7ec; --line: #e3e7ec;
  --alarm: #b4541a;
  --c1: #2563c9; --c2: #e08a1e; --c3: #1f9a78; --c4: #cc4b5c; --c5: #8057c8; --c6: #4aa3c7;
  --c7: #8a7a52; --c8: #93a1b1; }
@media (prefers-color-scheme: dark) { :root {
  --page: #11161d; --card: #1a212b; --ink: #e6ebf1; --muted: #93a0b1; --grid: #2d3744; --line: #2a333f;
  --alarm: #f0a070;
  --c1: #6ea3ff; --c2: #f5b04f; --c3: #4fcfa6; --c4: #ff7e8b; --c5: #b595f5; --c6: #78cbea;
  --c7: #c3b37f; --c8: #7b8797; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.75rem; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.02rem; margin: 0 0 .2rem; }
p { margin: .3rem 0; }
.lead { color: var(--muted); margin-bottom: 1.4rem; max-width: 62rem; }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr));
  margin-bottom: 1.2rem; }
.tile, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: .85rem 1rem; }
.tile .name { color: var(--muted); font-size: .82rem; }
.tile .value { font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.tile .note { color: var(--muted); font-size: .8rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr)); }
.card { padding: 1rem 1.1rem; margin: 0; }
.card svg { display: block; width: 100%; height: auto; margin: .5rem 0; }
.card svg text { font-family: inherit !important; }
.said { font-size: .93rem; }
.alarm { color: var(--muted); font-size: .85rem; }
.alarm b { color: var(--alarm); font-weight: 600; }
.empty { color: var(--muted); border: 1px dashed var(--line); border-radius: 8px; padding: 1.6rem 1rem; margin: .6rem 0;
  text-align: center; }
details { margin-top: 1rem; padding: .8rem 1.1rem; }
summary { cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .7rem 0 .3rem; }
th, td { padding: .22rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.settings td { text-align: left; }
"""


@dataclass(frozen=True, slots=True)
class Tile:
    """One key number."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One figure, what one sees in it (computed from the run), and what would be alarming."""

    title: str
    svg: str | None
    said: str
    alarming: str


def tile(t: Tile) -> str:
    note = f'<div class="note">{escape(t.note)}</div>' if t.note else ""
    name, value = escape(t.name), escape(t.value)
    return f'<div class="tile"><div class="name">{name}</div><div class="value">{value}</div>{note}</div>'


def card(c: Card) -> str:
    figure = c.svg or '<div class="empty">Nothing of this was recorded in this run.</div>'
    return (
        f'<figure class="card"><h2>{escape(c.title)}</h2><p class="said">{escape(c.said)}</p>{figure}'
        f'<figcaption class="alarm"><b>Alarming:</b> {escape(c.alarming)}</figcaption></figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css_class: str = "") -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    head_html = f"<thead>{row(head, 'th')}</thead>" if head else ""
    return f'<div class="scroll"><table class="{css_class}">{head_html}<tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def flatten(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value) pairs."""
    flat: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat += flatten(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, str(value)))
    return flat


def page(title: str, lead: str, tiles: Sequence[Tile], cards: Sequence[Card], tables: Sequence[str]) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<section class="tiles">{"".join(map(tile, tiles))}</section>
<section class="cards">{"".join(map(card, cards))}</section>
{"".join(tables)}
</main>
</body>
</html>
"""
