"""The report's HTML around its contents: one file, nothing loaded from anywhere."""

from __future__ import annotations

import re
from html import escape

REFRESH = 30  # seconds

# Okabe and Ito's colours, which colour-blind readers tell apart; their lighter ones on dark.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --card: #f5f6f7; --ink: #1b1e22; --muted: #626a73; --grid: #dfe3e7;
  --rounds: #7a828a; --train: #0072b2; --held_out: #d55e00;
  --part0: #0072b2; --part1: #e69f00; --part2: #009e73; --part3: #cc79a7; --part4: #7a828a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1f2327; --ink: #e8eaed; --muted: #a0a8b0; --grid: #343a40;
    --rounds: #a0a8b0; --train: #56b4e9; --held_out: #f08a3c;
    --part0: #56b4e9; --part1: #e69f00; --part2: #2fbf94; --part3: #dd9dc0; --part4: #a0a8b0;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1088px; margin: 0 auto; padding: 20px 16px 48px; overflow-wrap: anywhere; }
h1 { margin: 0 0 12px; font-size: 28px; line-height: 1.2; }
h2 { margin: 44px 0 4px; font-size: 21px; line-height: 1.3; }
h3 { margin: 24px 0 8px; font-size: 16px; }
p { margin: 0 0 12px; max-width: 46em; }
.note, figcaption span { color: var(--muted); font-size: 14px; }
.result { font-size: 18px; }
.badge { padding: 2px 10px; border-radius: 12px; background: var(--held_out); color: #fff; font-size: 13px;
  font-weight: normal; vertical-align: middle; white-space: nowrap; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 8px; margin: 0 0 16px; }
dl.facts div { padding: 8px 10px; border-radius: 8px; background: var(--card); }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; font-size: 15px; font-weight: 600; line-height: 1.3; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 14px; line-height: 1.35; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif !important; font-variant-numeric: tabular-nums; }
.wide { display: none; }
@media (min-width: 760px) { .wide { display: block; } .narrow { display: none; } }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 28px 24px;
  margin-top: 16px; }
.plots.broad { grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); align-items: start; }
.plots figure { max-width: 460px; }
.plots figcaption { min-height: 3.4em; margin-bottom: 4px; }
.plots figcaption b, .plots figcaption span { display: block; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0; padding: 0; list-style: none; font-size: 14px; }
.keys li::before { content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 7px;
  background: var(--color); }
.keys .round::before { border-radius: 50%; }
.keys .ring::before { border: 2px solid var(--color); border-radius: 50%; background: none; }
.keys .line::before { width: 18px; height: 3px; vertical-align: 4px; }
.pictures { display: grid; gap: 20px 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--card);
  image-rendering: pixelated; }
img.smooth { image-rendering: auto; }
.pair figcaption { grid-column: 1 / -1; font-weight: 600; margin-bottom: -2px; }
.pair div span { color: var(--muted); font-size: 14px; }
.pair .scores { grid-column: 1 / -1; }
.pair .scores span { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 8px; line-height: 1.4; }
.pair .scores b { font-weight: normal; color: var(--ink); font-variant-numeric: tabular-nums; white-space: nowrap; }
.films { display: grid; gap: 14px 10px; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); }
.films figcaption { font-size: 13px; margin-top: 3px; }
.ranked { display: grid; gap: 22px 14px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.ranked img { aspect-ratio: 1; object-fit: contain; }
.ranked figcaption { margin-top: 5px; font-size: 13px; }
.ranked figcaption b { font-size: 15px; font-variant-numeric: tabular-nums; }
.ranked figcaption i { float: right; color: var(--muted); font-style: normal; }
.ranked figcaption q, .ranked figcaption span { display: block; font-size: 13px; line-height: 1.3; quotes: none; }
.ranked figcaption .other { display: flex; justify-content: space-between; gap: 8px; }
.ranked .other b { font-size: 13px; font-weight: normal; color: var(--ink); white-space: nowrap; }
.slider { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: center; gap: 0 14px;
  padding: 10px 0; background: var(--page); }
.slider input { flex: 1 1 220px; height: 32px; margin: 0; accent-color: var(--train); }
.scroll { overflow-x: auto; margin-bottom: 8px; }
table { overflow-wrap: break-word; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: normal; }
@media (max-width: 600px) { th, td { padding-right: 10px; } th:first-child, td:first-child { width: 48%; } }
td small { display: block; color: var(--muted); font-size: 12px; }
td.figure, th.figure { text-align: right; white-space: nowrap; }
details { margin: 14px 0; }
summary { cursor: pointer; padding: 4px 0; color: var(--train); }
pre { margin: 4px 0 0; padding: 10px 12px; border-radius: 8px; background: var(--card); font-size: 13px;
  line-height: 1.45; white-space: pre-wrap; }
pre span { display: inline-block; }
"""

SCRIPT = """
const slider = document.querySelector(".slider input");
if (slider) {
  const show = () => document.querySelectorAll("[data-frame]").forEach(
    (element) => { element.hidden = element.dataset.frame !== slider.value; });
  slider.addEventListener("input", show);
  slider.hidden = false;
  show();
}
"""


def page(title: str, body: str, *, running: bool) -> str:
    """The whole file. body: HTML; while the run is running, the page loads itself anew from time to time."""
    refresh = f'<meta http-equiv="refresh" content="{REFRESH}">\n' if running else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def section(name: str, title: str, *contents: str) -> str:
    """A part of the page under a heading."""
    return "\n".join([f'<section id="{name}">', f"<h2>{escape(title)}</h2>", *contents, "</section>"])


def keys(entries: list[tuple[str, str, str]]) -> str:
    """The legend of a plot: (colour, shape, text) of each mark."""
    items = (
        f'<li class="{shape}" style="--color: var(--{color})">{escape(text)}</li>' for color, shape, text in entries
    )
    return f'<ul class="keys">{"".join(items)}</ul>'


def plot(title: str, note: str, svg: str) -> str:
    """A plot under its name and what it tells."""
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{escape(note)}</span></figcaption>"
        f'<div role="img" aria-label="{escape(title)}">{svg}</div></figure>'
    )


def breakable(text: str) -> str:
    """The text as HTML whose names may be broken after an underscore, a comma or a dot."""
    return re.sub(r"([_,]|\.(?=[a-z]))", r"\1<wbr>", escape(text))


def table(head: list[str], rows: list[list[str]], *, figures: bool = False) -> str:
    """A table of text. figures: all columns but the first are numbers."""

    def line(cells: list[str], tag: str) -> str:
        kind = ' class="figure"' if figures else ""
        return "".join(f"<{tag}{kind if i else ''}>{breakable(cell)}</{tag}>" for i, cell in enumerate(cells))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{line(head, "th")}</tr>\n{body}\n</table></div>'


def details(summary: str, content: str) -> str:
    """What is there for those who open it."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"
