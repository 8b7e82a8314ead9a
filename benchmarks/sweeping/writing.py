"""A sweep as tables and text, and all the files that it is kept in."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record

from moetrain.constraints import spell
from sweeping import pictures, published
from sweeping.advice import Advice, advise, percent
from sweeping.page import page
from sweeping.published import Table
from sweeping.rates import Rates
from sweeping.table import Row, Sweep, front

NAME = "capacity"
"""Of all files."""


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """Write FOLDER/capacity.{html,md,json,csv,png}; returns the files."""
    advice, rows = advise(sweep.rows), sweep.rows
    ours, known = results(rows, advice), published.tables(rows, sweep.own, sweep.scale)
    html, data, picture = (folder / f"{NAME}.{kind}" for kind in ("html", "csv", "png"))
    html.write_text(page(sweep, advice, ours, known), "utf-8")
    data.write_text(as_csv(rows), "utf-8")
    pictures.draw(rows, sweep.own, picture)
    kept = {
        "advice": advice._asdict(),
        "front": [row.label for row in front(rows)],
        "variants": [as_dict(row) for row in rows],
        "refused": [one._asdict() for one in sweep.refused],
        "config": sweep.config,
    }
    record.write(NAME, kept, text(sweep, advice, [*ours, *known]), folder)
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


def results(rows: Sequence[Row], advice: Advice) -> list[Table]:
    """Our own tables: a line per variant, and only the columns that something is known for."""
    unbeaten = {row.label for row in front(rows)}
    gains = [_gains(row, row.label in unbeaten, row.label == advice.pick) for row in rows]
    remarks = [
        "*dropped*: over all layers and the second half of the steps. *front*: no other variant is "
        "as good in drops, speed and loss (of a trace, drops and empty slots), and better in one, "
        "by however little.",
    ]
    if rows[0].time_ratio is not None:
        remarks.append(
            "*step over own*: step time over that of the config's own setting, turn by turn; "
            "median and range. *loss at equal time*: when the fastest was done."
        )
    costs = [_costs(row) for row in rows]
    on_costs = [
        "*useful* and *executed*: floating-point operations of the experts' products in a step, "
        "forward and backward, over all ranks: of filled rows, and of all that are multiplied, "
        "empty ones too (on recorded routing all slots, as on a GPU); what is computed again for "
        "the backward pass does not count.",
        "*dropped of own choices*: what this setting would have dropped of the choices that the "
        "config's own setting made, in the second half of its first repeat.",
        "*held MiB*: weights and moments, on the rank that holds most. *step memory MiB*: what a "
        "step takes at most beyond them, on the rank that takes most; median of three steps.",
    ]
    return [_table("Results", gains, remarks), _table("Tokens, slots and cost", costs, on_costs)]


def _table(title: str, lines: Sequence[dict[str, str]], remarks: list[str]) -> Table:
    header = [name for name in lines[0] if any(line[name] for line in lines)]
    named = [f"*{name}*" for name in (*header, "front", "useful")]
    told = [remark for remark in remarks if any(name in remark for name in named)]
    return Table(title, header, [[line[name] for name in header] for line in lines], told)


def _gains(row: Row, is_unbeaten: bool, is_pick: bool) -> dict[str, str]:
    ratio = row.time_ratio
    return {
        "variant": row.label,
        "": " ".join(["front"] * is_unbeaten + ["recommended"] * is_pick),
        "dropped": percent(row.rates.drop_rate),
        "slots empty": percent(row.rates.padding_waste),
        "tokens/s": _show(row.tokens_per_s, ",.0f"),
        "step over own": "" if ratio is None else ratio.show(".3f"),
        "held-out loss": _show(row.loss, ".4f"),
        "by repeat": " / ".join(f"{loss:.4f}" for loss in row.losses),
        "its own factor in evaluation": _show(row.own_loss, ".4f"),
        "loss at equal time": _show(row.equal_time_loss, ".4f"),
        "bad steps": str(row.bad_steps or ""),
    }


def _costs(row: Row) -> dict[str, str]:
    found = row.rates
    return {
        "variant": row.label,
        "dropped by choice": " / ".join(map(percent, found.drop_rate_by_choice)),
        "tokens with no expert": percent(found.token_drop_rate),
        "gate weight dropped": percent(found.dropped_gate_mass),
        "spilled": percent(found.spill_rate) if found.spill_rate else "",
        "not sampled": percent(found.not_sampled_rate) if found.not_sampled_rate else "",
        "dropped in evaluation": _show(row.eval_drop_rate, "%"),
        "dropped of own choices": _show(row.replayed_drop_rate, "%"),
        "effective factor": f"{found.effective_capacity_factor:.3f}",
        "useful GFLOP": _show(row.useful_flops / 1e9, ",.2f"),
        "executed GFLOP": _show(row.executed_flops / 1e9, ",.2f"),
        "all-to-all MiB a rank": _show(row.all_to_all_bytes / 2**20 or None, ",.2f"),
        "straggler factor": _show(row.straggler_factor, ".3f"),
        "held MiB": _show(row.held_bytes and row.held_bytes / 2**20, ",.0f"),
        "step memory MiB": _show(row.step_bytes and row.step_bytes / 2**20, ",.0f"),
    }


def _show(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return percent(value) if form == "%" else format(value, form)


def as_dict(row: Row) -> dict[str, Any]:
    """A row as JSON holds it: NaN as null, curves to six digits."""
    return {"loss": _plain(row.loss), **{key: _plain(value) for key, value in asdict(row).items()}}


def as_csv(rows: Sequence[Row]) -> str:
    """One line per variant, without curves; lists are numbers with blanks between."""
    flat = [_flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    values = as_dict(row)
    for curve in ("drop_rate_over_time", "loss_over_time", "training_loss", "turn_ratios"):
        del values[curve]
    values |= zip(Rates._fields, values.pop("rates"), strict=True)
    least = ("time_ratio", "time_ratio_least", "time_ratio_most")
    values |= zip(least, _plain(row.time_ratio) or [None] * 3, strict=True)
    values["capacity_factor"] = spell(row.capacity_factor)
    return {
        key: " ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in values.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
