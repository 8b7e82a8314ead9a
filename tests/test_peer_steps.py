"""A whole Hugging Face Mixtral beside moetrain's model: parameters, losses, a step's weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
