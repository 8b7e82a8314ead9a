"""Run distributed code on CPU, in tests of this project and of yours.

- `simulate_ranks` runs every rank as a thread of this process: hundreds of ranks in a second, with
  real collectives and gradients through them. Use it for anything that is about *what* is computed.
- `run_ranks` and `RankPool` run every rank as a process joined by Gloo over loopback. Use them for
  what threads share: crashes, signals, files, environment, per-process state.

Both give `fn` an initialised default process group, return the results in rank order, re-raise the
first failing rank's exception with its rank named, and turn a deadlock into an error that shows
where each stuck rank stands.
"""

from moetrain.testing.processes import RankPool, run_ranks
from moetrain.testing.threads import simulate_ranks

__all__ = ["RankPool", "run_ranks", "simulate_ranks"]
