"""Runs under DeepSpeed at small layouts, in fp32."""

from __future__ import annotations

from typing import Any, NamedTuple

from layouts import Case, Layout, spread

from moetrain.config import Config

ROUNDING = 1e-5
"""Of fp32."""

EP2, EP4 = Layout(2, ep=2, dp_replicate=1, micro=8), Layout(4, ep=4, dp_replicate=1, micro=4)
DATA2_EP2 = Layout(4, ep=2, dp_replicate=1, micro=4)
DENSE = Layout(2, ep=1, dp_replicate=1, micro=4)


class Variant(NamedTuple):
    """One way to train."""

    layout: Layout
    stage: int
    case: Case

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.layout}-{self.case}"

    def config(self, **engine: Any) -> Config:
        """Under DeepSpeed."""
        return under(self.case.config, self.layout, "deepspeed", zero_stage=self.stage, **engine)


def under(config: Config, layout: Layout, kind: str, **engine: Any) -> Config:
    """A configuration at a layout under an engine, in fp32."""
    sections = config.model_dump()
    sections["engine"] = {"kind": kind, "precision": "fp32", **engine}
    return spread(Config.model_validate(sections), layout)
