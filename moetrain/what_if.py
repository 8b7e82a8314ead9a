"""What `moetrain replay` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.constraints import spell
from moetrain.errors import UserError
from moetrain.replay import Comparison, Replay, Setting, compare, replay_all
from moetrain.sinks import METRICS_FILE, encode, read_metrics
from moetrain.tables import print_table, spell_bytes
from moetrain.trace import Trace

DIFFERS = 1
FEW = 10
"""Differences shown."""
COLUMNS = {
    "drop_rate": "dropped",
    "token_drop_rate": "tokens lost",
    "dropped_gate_mass": "gate mass",
    "padding_waste": "padding",
    "effective_capacity_factor": "effective",
    "max_vio": "max_vio",
    "all_to_all_bytes": "all-to-all",
    "straggler_factor": "straggler",
}
"""Figures of the summary and their headings."""
SHARES = ("drop_rate", "token_drop_rate", "dropped_gate_mass", "padding_waste")


def run(path: Path, wanted: Sequence[Setting], out: Path | None) -> int:
    """Replay a trace as recorded and under other settings; print a table, and write all to `out`.

    Returns the exit code: 0, or 1 where the recorded setting does not give the live counts.
    """
    trace = Trace.open(path)
    recorded, *others = replay_all(trace, [Setting(), *wanted])
    compared = compare(recorded, _live_lines(trace))
    if out is not None:
        _write(out, trace, compared, [recorded, *others])
    print("\n".join([_describe(trace), *_verdict(compared, len(trace.steps))]))
    print()
    _print_answers([recorded, *(answer for answer in others if answer != recorded)])
    return DIFFERS if compared.differences else 0


def _live_lines(trace: Trace) -> list[dict[str, Any]]:
    try:
        return read_metrics(trace.run_dir)
    except FileNotFoundError:
        return []


def _describe(trace: Trace) -> str:
    config, steps = trace.settings, trace.steps
    batch, length = config.train.global_batch, config.data.seq_len
    places = len(steps) * batch * length * trace.num_layers
    return (
        f"{trace.folder}: {len(steps)} steps ({steps[0]} to {steps[-1]}) of {batch} × {length} "
        f"tokens, {trace.num_layers} layers of {config.moe.experts} experts, {config.moe.router} "
        f"top-{config.moe.top_k}, on {trace.world} rank{'s' * (trace.world > 1)}; "
        f"{spell_bytes(trace.num_bytes)}, {trace.num_bytes / places:.1f} bytes per token and layer"
    )


def _verdict(compared: Comparison, steps: int) -> list[str]:
    if not compared.steps:
        return [f"as recorded: not compared, for there is no {METRICS_FILE} with these steps"]
    if not compared.differences:
        of = "" if compared.steps == steps else f"{compared.steps} of "
        return [f"as recorded: every count is that of {METRICS_FILE}, in {of}{steps} steps"]
    shown = compared.differences[:FEW]
    rest = len(compared.differences) - len(shown)
    more = [f"... and {rest} more"] if rest else []
    return [f"as recorded: NOT what {METRICS_FILE} says", *shown, *more]


def _print_answers(answers: Sequence[Replay]) -> None:
    """One row for each; settings that all share stand above."""
    settings = [answer.setting for answer in answers]
    varied = [name for name in settings[0] if any(s[name] != settings[0][name] for s in settings)]
    shared = [
        f"{name} {_spell(value)}" for name, value in settings[0].items() if name not in varied
    ]
    print(", ".join(shared))
    print_table(
        (*varied, *COLUMNS.values()),
        (
            (*(_spell(a.setting[name]) for name in varied), *map(_figure, COLUMNS, _figures(a)))
            for a in answers
        ),
    )


def _figures(answer: Replay) -> list[float]:
    return [answer.summary[name] for name in COLUMNS]


def _figure(name: str, value: float) -> str:
    if name in SHARES:
        return f"{100 * value:.2f} %"
    return spell_bytes(round(value)) if name == "all_to_all_bytes" else f"{value:.3f}"


def _spell(value: Any) -> str:
    return " ".join(map(spell, value)) if isinstance(value, list) else spell(value)


def _write(out: Path, trace: Trace, compared: Comparison, answers: Sequence[Replay]) -> None:
    content = {
        "trace": str(trace.folder),
        "config": trace.settings.model_dump(mode="json"),
        "compared": compared._asdict(),
        "answers": [answer._asdict() for answer in answers],
    }
    try:
        out.write_text(encode(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out ({out}) cannot be written: {error.strerror}") from None
