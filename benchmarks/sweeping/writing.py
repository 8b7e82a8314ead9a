"""A sweep as tables and text, and all the files that it is kept in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import record

from sweeping import pictures, published
from sweeping.advice import Advice, advise, percent
from sweeping.page import page
from sweeping.plan import Refused
from sweeping.published import Table
from sweeping.table import Row, as_csv, as_dict, front

NAME = "capacity"
"""Of all files."""


class Sweep(NamedTuple):
    """All that is told of a sweep."""

    name: str
    """Of the run that was swept."""
    what: str
    """What was done, in sentences."""
    scale: str
    """How large and how long, in a few words."""
    rows: list[Row]
    """The config's own setting, or what stands for it, among them."""
    refused: list[Refused]
    config: dict[str, Any]


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """Write FOLDER/capacity.{html,md,json,csv,png}; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    advice, rows = advise(sweep.rows), sweep.rows
    tables = [results(rows, advice), *published.tables(rows, sweep.scale)]
    html, data, picture = (folder / f"{NAME}.{kind}" for kind in ("html", "csv", "png"))
    html.write_text(page(sweep.name, sweep.what, rows, advice, tables, sweep.refused), "utf-8")
    data.write_text(as_csv(rows), "utf-8")
    pictures.draw(rows, picture)
    kept = {
        "advice": advice._asdict(),
        "front": [row.label for row in front(rows)],
        "variants": [as_dict(row) for row in rows],
        "refused": [one._asdict() for one in sweep.refused],
        "config": sweep.config,
    }
    record.write(NAME, kept, text(sweep, advice, tables), folder)
    return [html, data, picture, *(folder / f"{NAME}.{kind}" for kind in ("md", "json"))]


def text(sweep: Sweep, advice: Advice, tables: Sequence[Table]) -> str:
    """The report in Markdown."""
    parts = [
        f"# Choosing a capacity factor for {sweep.name}",
        f"**{advice.headline}**",
        advice.rule,
        "\n".join(f"- {reason}" for reason in advice.reasons),
        sweep.what,
        f"![Drops, speed and loss against each other; drops over time and by layer]({NAME}.png)",
    ]
    for table in tables:
        remarks = "\n".join(f"- {remark}" for remark in table.remarks)
        parts += [f"## {table.title}", record.table(table.header, table.rows), remarks]
    if sweep.refused:
        reasons = [f"- {one.label}: {one.reason}" for one in sweep.refused]
        parts += ["## Combinations that cannot run", "\n".join(reasons)]
    return "\n\n".join(part for part in parts if part)


def results(rows: Sequence[Row], advice: Advice) -> Table:
    """Our own table: a line per variant, and only the columns that something is known for."""
    unbeaten = {row.label for row in front(rows)}
    lines = [_cells(row, row.label in unbeaten, row.label == advice.pick) for row in rows]
    header = [name for name in lines[0] if any(line[name] for line in lines)]
    remarks = [
        "Drops and empty slots are those of the second half of the steps, over all layers. "
        "*front*: no other variant is as good in drops, speed and loss, and better in one.",
        "*step over own*: step time over that of the config's own setting, turn by turn: median "
        "and range. *step memory*: what a step takes at most beyond what is there before it.",
        "*useful* and *executed* are floating-point operations of the experts' products, forward "
        "and backward, in a step over all ranks: of filled rows, and of all that are multiplied.",
    ]
    return Table("Results", header, [[line[name] for name in header] for line in lines], remarks)


def _cells(row: Row, is_unbeaten: bool, is_pick: bool) -> dict[str, str]:
    found = row.rates
    ratio = row.time_ratio
    return {
        "variant": row.label,
        "": " ".join(["front"] * is_unbeaten + ["recommended"] * is_pick),
        "dropped": percent(found.drop_rate),
        "by choice": " / ".join(map(percent, found.drop_rate_by_choice[:4])),
        "tokens with no expert": percent(found.token_drop_rate),
        "gate weight dropped": percent(found.dropped_gate_mass),
        "spilled": percent(found.spill_rate) if found.spill_rate else "",
        "not sampled": percent(found.not_sampled_rate) if found.not_sampled_rate else "",
        "slots empty": percent(found.padding_waste),
        "effective factor": f"{found.effective_capacity_factor:.3f}",
        "tokens/s": _show(row.tokens_per_s, ",.0f"),
        "step over own": "" if ratio is None else ratio.show(".3f"),
        "useful GFLOP": _show(row.useful_flops / 1e9, ",.2f"),
        "executed GFLOP": _show(row.executed_flops / 1e9, ",.2f"),
        "all-to-all MiB a rank": _show(row.all_to_all_bytes / 2**20 or None, ",.2f"),
        "straggler factor": _show(row.straggler_factor, ".3f"),
        "step memory MiB": _show(row.step_bytes and row.step_bytes / 2**20, ",.0f"),
        "held-out loss": _show(row.loss, ".4f"),
        "by repeat": " / ".join(f"{loss:.4f}" for loss in row.losses[: 4 * (len(row.losses) > 1)]),
        "its own factor in evaluation": _show(row.own_loss, ".4f"),
        "loss at equal time": _show(row.equal_time_loss, ".4f"),
        "dropped in evaluation": _show(row.eval_drop_rate, "%"),
        "dropped on the trace": _show(row.replayed_drop_rate, "%"),
        "bad steps": str(row.bad_steps or ""),
    }


def _show(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return percent(value) if form == "%" else format(value, form)
