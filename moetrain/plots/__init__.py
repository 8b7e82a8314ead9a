"""Pictures of a run from its metrics.jsonl."""

from moetrain.plots.figures import PLOTS_FOLDER, write_plots

__all__ = ["PLOTS_FOLDER", "write_plots"]
