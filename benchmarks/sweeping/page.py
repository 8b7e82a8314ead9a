"""The report: one HTML file that needs no other, on paper as dark as the reader likes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sweeping import figures
from sweeping.advice import Advice
from sweeping.published import Table
from sweeping.table import Row, Sweep, losses

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:"
)
"""What the page may load: nothing. plotly writes its own style and functions."""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1b1b1b; --faint: #666; --line: #ddd;
  --mark: #eef5fb; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --text: #e8e8e8; --faint: #a0a0a0; --line: #3a3d42; --mark: #1d2b36; }
}
body { background: var(--ground); color: var(--text); margin: 0 auto; max-width: 1320px;
  padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p, li { max-width: 52rem; } .faint, li { color: var(--faint); }
.advice { background: var(--mark); border-left: 4px solid #0072b2; padding: .6rem 1rem; }
.advice p { margin: .4rem 0; } .advice strong { font-size: 1.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: bottom; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } th { max-width: 8rem; }
th:first-child, td:first-child { text-align: left; } th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid #0072b2; } tr.pick td { background: var(--mark); }
section { min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1rem; }
"""

SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text"), line = style.getPropertyValue("--line");
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = {"font.color": text};
    for (const axis of Object.keys(plot.layout).filter(key => /^[xy]axis/.test(key))) {
      for (const part of ["gridcolor", "linecolor", "zerolinecolor"]) {
        change[axis + "." + part] = line;
      }
    }
    Plotly.relayout(plot, change);
  }
}
dark.addEventListener("change", paint);
paint();
function sort(button) {
  const cell = button.closest("th"), body = cell.closest("table").tBodies[0];
  const place = cell.cellIndex, rising = cell.getAttribute("aria-sort") !== "ascending";
  for (const other of cell.parentNode.cells) other.removeAttribute("aria-sort");
  cell.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const value = row => row.cells[place].textContent.replaceAll(",", "");
  const compare = (a, b) => {
    const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
    return isNaN(x) || isNaN(y) ? value(a).localeCompare(value(b)) : x - y;
  };
  body.append(...[...body.rows].sort((a, b) => (rising ? 1 : -1) * compare(a, b)));
}
"""


def page(sweep: Sweep, advice: Advice, ours: Sequence[Table], known: Sequence[Table]) -> str:
    """The whole file: tables of our own results, and published ones."""
    body = [
        f"<h1>Choosing a capacity factor for {escape(sweep.name)}</h1>",
        _advice(advice),
        f"<p>{escape(sweep.what)}</p>",
        *(_table(table, pick=advice.pick) for table in ours),
        *_pictures(sweep.rows, sweep.own),
    ]
    body.append("<h1>Beside what was published</h1>")
    body += [_table(table) for table in known]
    if sweep.refused:
        lines = [f"<li>{escape(one.label)}: {escape(one.reason)}</li>" for one in sweep.refused]
        body.append(f"<h2>Combinations that cannot run</h2><ul>{''.join(lines)}</ul>")
    title = f"Capacity factor: {escape(sweep.name)}"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script>"
    )
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body>\n{content}\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _advice(advice: Advice) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in advice.reasons)
    return (
        f'<div class="advice"><p><strong>{escape(advice.headline)}</strong></p>'
        f"<p>{escape(advice.rule)}</p><ul>{reasons}</ul></div>"
    )


def _table(table: Table, pick: str | None = None) -> str:
    heads = "".join(
        f'<th><button onclick="sort(this)">{escape(name)}</button></th>' for name in table.header
    )
    lines = []
    for row in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="pick">{cells}</tr>' if row[0] == pick else f"<tr>{cells}</tr>")
    remarks = "".join(f"<li>{_emphasised(remark)}</li>" for remark in table.remarks)
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div><ul>{remarks}</ul>"
    )


def _emphasised(text: str) -> str:
    """Escaped, with *words* in italics as Markdown has them."""
    parts = escape(text).split("*")
    return "".join(f"<i>{part}</i>" if n % 2 else part for n, part in enumerate(parts))


def _pictures(rows: Sequence[Row], own: str) -> Iterator[str]:
    is_live = rows[0].loss is not None
    if is_live:
        yield _picture(
            "Drops, speed and loss",
            "Filled: no other variant is at least as good in all three and better in one.",
            figures.trade(rows),
        )
    pairs = [
        ("Drops over time", "", figures.drops_over_time(rows)),
        ("Drops by layer", "", figures.drops_by_layer(rows)),
        ("Drops against empty slots", "", figures.padding(rows)),
    ]
    if is_live:
        found, told = losses(rows, own), "Below zero is better."
        until = f"{told} Until the fastest was done."
        pairs += [
            ("Loss at equal steps", told, figures.loss_by_step(rows, found)),
            ("Loss at equal time", until, figures.loss_by_time(rows, found)),
        ]
    if any(row.replayed_drop_rate is not None for row in rows):
        told = f"What a setting drops in its training, and of what {own} chose in its own."
        pairs.append(("Drops live and replayed", told, figures.replayed(rows)))
    yield f'<div class="pair">{"".join(_picture(*pair) for pair in pairs)}</div>'


def _picture(title: str, told: str, figure: go.Figure) -> str:
    config = {"displayModeBar": False, "responsive": True}
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    faint = f'<p class="faint">{escape(told)}</p>' if told else ""
    return f"<section><h2>{escape(title)}</h2>{faint}{drawn}</section>"
