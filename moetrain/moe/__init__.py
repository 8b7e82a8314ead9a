"""Mixture-of-Experts layers: gates, capacity, dispatch, experts. Needs torch alone.

Everything here takes tensors and process groups; nothing knows of runs, files or configurations.
"""

from moetrain.moe.capacity import Plan, capacity
from moetrain.moe.dispatch import AllGather, AllToAll, Dispatcher, Local
from moetrain.moe.experts import Experts
from moetrain.moe.keyed import Draws
from moetrain.moe.layer import Decisions, LayerOutput, LayerStats, MoE
from moetrain.moe.ledger import OUTCOMES, Ledger
from moetrain.moe.preferences import Preferences
from moetrain.moe.router import Gate, Router
from moetrain.moe.routing import Routing

__all__ = [
    "OUTCOMES",
    "AllGather",
    "AllToAll",
    "Decisions",
    "Dispatcher",
    "Draws",
    "Experts",
    "Gate",
    "LayerOutput",
    "LayerStats",
    "Ledger",
    "Local",
    "MoE",
    "Plan",
    "Preferences",
    "Router",
    "Routing",
    "capacity",
]
