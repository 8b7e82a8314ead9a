"""Does a Mixture-of-Experts layer keep the promises that training on many ranks rests on?

Wrap a layer in an `Adapter` (see `adapter`), and `check` says of every invariant, for a case and a
layout, whether it holds, fails (with the numbers seen), is not exposed or not supported. Needs
torch alone; ranks are simulated in this process unless another launcher is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moetrain.testing.conformance import layouts, routing
from moetrain.testing.conformance.adapter import (
    ALONE,
    Adapter,
    Case,
    Layer,
    Layout,
    Mode,
    Pass,
    Routes,
    Tensors,
    Tokens,
)
from moetrain.testing.conformance.lab import Lab, Launch, Order
from moetrain.testing.conformance.verdict import (
    InvariantError,
    NotExposedError,
    NotSupportedError,
    Verdict,
)

__all__ = [
    "ALONE",
    "INVARIANTS",
    "Adapter",
    "Case",
    "Lab",
    "Launch",
    "Layer",
    "Layout",
    "Mode",
    "Order",
    "Pass",
    "Routes",
    "Tensors",
    "Tokens",
    "Verdict",
    "check",
    "check_all",
]

INVARIANTS: dict[str, Callable[[Lab, Case, Layout], str]] = {
    "I1": layouts.gradients,
    "I2": layouts.norm,
    "I3": layouts.losses,
    "I4": routing.ledger,
    "I5": routing.padding,
    "I6": routing.evaluation,
    "I7": routing.ties,
    "I8": layouts.keyed_draws,
    "I9": layouts.nothing_to_do,
    "I10": layouts.dispatchers,
    "I11": layouts.portable_state,
    "I12": routing.capacity,
    "I13": layouts.initialisation,
    "I14": routing.precision,
    "I15": routing.extremes,
    "I16": routing.layer_losses,
}
"""Every invariant by number; its docstring says what it means."""


def check(invariant: str, lab: Lab, case: Case, layout: Layout) -> Verdict:
    """Put one invariant to the test. Never raises for what the system does: an error is a failure,
    and so is a run longer than the lab's timeout.

    Raises ValueError where the layout cannot share the sequences of the case equally.
    """
    if case.sequences % (layout.ranks * layout.calls):
        raise ValueError(f"case.sequences ({case.sequences}) must be a multiple of {layout}")
    try:
        if reason := lab.adapter.refusal(case, layout):
            return Verdict("not supported", reason)
        return Verdict("holds", INVARIANTS[invariant](lab, case, layout))
    except InvariantError as seen:
        return Verdict("fails", str(seen))
    except NotExposedError as hidden:
        return Verdict("not exposed", str(hidden))
    except NotSupportedError as refused:
        return Verdict("not supported", str(refused))
    except TimeoutError as hang:
        return Verdict("fails", f"hangs: {str(hang).splitlines()[0]}")
    except Exception as error:
        return Verdict("fails", f"raises {type(error).__name__}: {error}")


def check_all(
    lab: Lab, case: Case, layout: Layout, invariants: Iterable[str] = tuple(INVARIANTS)
) -> dict[str, Verdict]:
    """Several invariants of one case at one layout."""
    return {invariant: check(invariant, lab, case, layout) for invariant in invariants}
