"""What a run shows while it goes: a live view on a terminal, elsewhere a plain line per update."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moetrain.saying import forgiving, say

_MAX_LAYER_ROWS = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
# From starved to overloaded; blue and orange are told apart with any colour vision.
_STARVED, _EVEN, _OVERLOADED = "#0072b2", "#999999", "#e69f00"


class Progress(Protocol):
    """Shows metrics lines; a context manager."""

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl, of training or of evaluation."""
        ...

    def note(self, text: str) -> None:
        """Show a message that stays."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def progress(num_steps: int, has_experts: bool, console: Console | None = None) -> Progress:
    """The view for a run of `num_steps` steps: live on a terminal, plain lines elsewhere.

    A run that has no experts has no drops to speak of.
    """
    console = console or Console(file=forgiving(sys.stdout))
    # Not console.is_terminal: FORCE_COLOR makes that true of a log file, too.
    can_redraw = console.file.isatty() and not console.is_dumb_terminal
    if can_redraw and not console.options.ascii_only:
        return LiveProgress(num_steps, has_experts, console)
    return PlainProgress(num_steps, has_experts, console)


@final
class PlainProgress:
    """One line per update, in ASCII, for log files and pipes."""

    def __init__(self, num_steps: int, has_experts: bool, console: Console) -> None:
        self._num_steps, self._has_experts = num_steps, has_experts
        self._console = console

    def update(self, line: Mapping[str, Any]) -> None:
        """Print the line's main numbers."""
        self.note("  ".join(describe(line, self._num_steps, self._has_experts)))

    def note(self, text: str) -> None:
        """Print the text."""
        say(text, self._console.file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@final
class LiveProgress:
    """A bar, the last training line, the last evaluation, and every layer's load by expert."""

    def __init__(self, num_steps: int, has_experts: bool, console: Console) -> None:
        self._num_steps, self._has_experts = num_steps, has_experts
        self._console = console
        self._train: Mapping[str, Any] = {"step": 0}
        self._eval: Mapping[str, Any] | None = None
        self._live = Live(console=console, get_renderable=self._render, auto_refresh=False)

    def update(self, line: Mapping[str, Any]) -> None:
        """Redraw with the line's numbers."""
        if "eval_loss" in line:
            self._eval = line
        else:
            self._train = line
        self._live.refresh()

    def note(self, text: str) -> None:
        """Print the text above the live view."""
        self._console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _render(self) -> Table:
        view = Table.grid(expand=True)
        view.add_row(self._text(self._train))
        view.add_row(ProgressBar(total=self._num_steps, completed=self._train["step"]))
        if self._eval is not None:
            view.add_row(self._text(self._eval))
        if layers := self._train.get("layers"):
            max_rows = max(1, min(_MAX_LAYER_ROWS, self._console.height - 6))
            view.add_row(load_table(layers, self._console.width, max_rows))
        return view

    def _text(self, line: Mapping[str, Any]) -> Text:
        text = "  ".join(describe(line, self._num_steps, self._has_experts))
        return Text(text, overflow="ellipsis", no_wrap=True)


def describe(line: Mapping[str, Any], num_steps: int, has_experts: bool) -> list[str]:
    """The main numbers of a line in words, ASCII alone."""
    step = f"step {line['step']}/{num_steps}"
    if "eval_loss" in line:
        drop = [f"eval drop {_percent(line['eval_drop_rate'])}"] if has_experts else []
        per_byte = line["eval_nats_per_byte"]
        return [
            step,
            f"eval loss {_number(line['eval_loss'], '.4f')}",
            *([] if per_byte is None else [f"{per_byte:.4f} nats/byte"]),
            *drop,
        ]
    if "loss" not in line:
        return [step]
    parts = [step, f"loss {_number(line['loss'], '.4f')}"]
    if has_experts:
        parts.append(f"drop {_percent(line['drop_rate'])}")
    if line["bad_steps"]:
        parts.append(f"{line['bad_steps']} skipped")
    if line["spikes"]:
        parts.append(f"{line['spikes']} spike{'s' * (line['spikes'] > 1)}")
    parts.append(f"{_si(line['tokens_per_s'])} tokens/s")
    if line["mfu"] is not None:
        parts.append(f"mfu {_percent(line['mfu'])}")
    return [*parts, f"eta {_duration((num_steps - line['step']) * line['step_time_s'])}"]


def load_table(layers: Sequence[Mapping[str, Any]], width: int, max_rows: int) -> Table:
    """One row a layer: drop rate, largest load over the mean, and a bar for every expert.

    With more layers than rows, evenly spaced ones from first to last.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("MoE layer", "drop", "max load"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("load by expert (▄ mean)", no_wrap=True)
    for index in evenly_spaced(len(layers), max_rows):
        layer = layers[index]
        max_load = f"{1 + layer['max_vio']:.2f}x"
        bars = load_bars(layer["load"], max_bars=max(8, width - 32))
        table.add_row(str(index), _percent(layer["drop_rate"]), max_load, bars)
    return table


def evenly_spaced(num_items: int, num_chosen: int) -> list[int]:
    """At most `num_chosen` indices of `num_items`, the first and the last among them."""
    if num_items <= num_chosen:
        return list(range(num_items))
    if num_chosen == 1:
        return [0]
    return [round(i * (num_items - 1) / (num_chosen - 1)) for i in range(num_chosen)]


def load_bars(load: Sequence[int], max_bars: int) -> Text:
    """One block per expert, its height and colour the load over the mean: ▄ is 1, █ is 2 or more.

    Where the experts outnumber the blocks, each block stands for the one of its neighbours that is
    farthest from the mean.
    """
    mean = sum(load) / len(load)
    ratios = [count / mean if mean else 0.0 for count in load]
    per_bar = math.ceil(len(ratios) / max_bars)
    bars = Text()
    for start in range(0, len(ratios), per_bar):
        ratio = max(ratios[start : start + per_bar], key=lambda ratio: abs(ratio - 1))
        height = min(len(_BLOCKS), max(1, round(ratio * len(_BLOCKS) / 2)))
        bars.append(_BLOCKS[height - 1], style=_colour(ratio))
    return bars


def _colour(ratio: float) -> str:
    if ratio < 0.5:
        return _STARVED
    return _OVERLOADED if ratio > 1.5 else _EVEN


def _number(value: float | None, spec: str) -> str:
    return "nan" if value is None else format(value, spec)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _si(value: float) -> str:
    """Three significant digits with k, M or G."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
