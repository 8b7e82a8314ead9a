"""What the tests of checkpoints save, how they damage it, and whether it came back."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moetrain import checkpoint
from moetrain.checkpoint.manifest import MANIFEST, MARKER, save_number, seal
from moetrain.testing import simulate_ranks

EXTRA = {"step": 100, "seed": 7, "config": {"moe": {"capacity_factor": None}}, "cursor": [3, 2**60]}
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", MANIFEST, MARKER)


def make_state(edp: int, ep: int, seed: int) -> dict[str, torch.Tensor]:
    """The same logical values for a seed, however they are laid out; few sizes divide evenly."""
    mesh = init_device_mesh("cpu", (edp, ep), mesh_dim_names=("edp", "ep"))
    data = mesh._flatten("dp")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def place(full: torch.Tensor, on, placements) -> torch.Tensor:
        return distribute_tensor(full, on, placements, src_data_rank=None)

    return {
        "model.experts.up": place(draw(4, 6, 3), mesh, [Shard(1), Shard(0)]).requires_grad_(),
        "model.embedding": place(draw(7, 5), data, [Shard(0)]).requires_grad_(),
        "model.router": place(draw(5, 4).double(), data, [Replicate()]),
        "model.norm": place(draw(3).bfloat16(), data, [Shard(0)]),
        "optimizer.experts.up.exp_avg": place(draw(4, 6, 3), mesh, [Shard(1), Shard(0)]),
        "optimizer.experts.up.step": torch.tensor(float(seed)),
        "counts": torch.arange(5) + seed,
    }


def logical(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in state.items()
    }


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    a, b = logical(a), logical(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )


def save(run: Path, step: int, seed: int, edp: int = 1, ep: int = 1, extra=EXTRA) -> Path:
    """Save make_state(seed) from simulated ranks."""
    return simulate_ranks(
        edp * ep, lambda: checkpoint.save(run, step, make_state(edp, ep, seed), extra)
    )[0]


def holds(path: Path | None, seed: int, edp: int = 1, ep: int = 1) -> bool:
    """Whether the checkpoint, loaded in this layout, has the values of `seed` on every rank."""
    assert path is not None

    def check() -> bool:
        state = make_state(edp, ep, seed=12345)
        extra = checkpoint.load(path, state)
        return extra == EXTRA and is_same(state, make_state(edp, ep, seed))

    return all(simulate_ranks(edp * ep, check))


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_one_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": lambda file: flip_one_bit(file, file.stat().st_size // 2),
}


class Hostile:
    """Unpickled, it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def reseal(path: Path, **changes) -> None:
    """Make manifest and marker fit the files again, as someone with bad intent would."""
    manifest = json.loads((path / MANIFEST).read_bytes()) | changes
    for entry in manifest["files"]:
        content = (path / entry["name"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    content = json.dumps(manifest).encode()
    (path / MANIFEST).write_bytes(content)
    (path / MARKER).write_bytes(seal(save_number(path), content))
