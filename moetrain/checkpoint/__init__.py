"""Checkpoints that are whole or not there, verified before use, and free of the layout they had.

Tensors are written and resharded by `torch.distributed.checkpoint` (DCP); this package adds what
DCP leaves out: a commit, checksums, a comparison with the model, retention, agreement on errors.

    OUT/NAME/checkpoints/
        step-00000100/            has this name only when whole
            __RANK_N.distcp       tensor bytes, as DCP writes them
            .metadata             DCP's pickled index, for its own tools; never unpickled here
            manifest.json         `Manifest`: tensors and where each piece lies, files, extra
            COMMITTED             number of the save, and SHA-256 over that number and the manifest
        step-00000200.partial/    a save under way, or what a killed one left
        step-00000100.replaced/   the previous save of a step, until the new one has its name

Why both a rename and a marker: the rename is atomic, so a process killed at any point leaves either
the old state or the new one. The marker, written last, seals the manifest, whose checksums seal
every other file: one flipped bit anywhere is found.
"""

from moetrain.checkpoint.folder import committed, latest, prune, resolve
from moetrain.checkpoint.manifest import DamagedCheckpointError, Manifest, read_manifest
from moetrain.checkpoint.transfer import CheckpointError, load, load_latest, save

__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "Manifest",
    "committed",
    "latest",
    "load",
    "load_latest",
    "prune",
    "read_manifest",
    "resolve",
    "save",
]
