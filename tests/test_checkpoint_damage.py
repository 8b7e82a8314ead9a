"""Checkpoints: refused after any damage, passed over when resuming, and never executed."""

import json
import pickle
import re

import pytest
import torch
from checkpoints import (
    DAMAGES,
    EXTRA,
    FILES,
    Hostile,
    flip_one_bit,
    holds,
    is_same,
    make_state,
    reseal,
    save,
)

from moetrain import checkpoint
from moetrain.checkpoint import DamagedCheckpointError
from moetrain.checkpoint.manifest import MANIFEST, MARKER
from moetrain.checkpoint.transfer import NoMemoryError
from moetrain.errors import UserError
from moetrain.testing import simulate_ranks


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_nothing_is_touched(saved, name, damage, num_ranks):
    DAMAGES[damage](saved / name)

    def attempt() -> tuple[str, bool]:
        state = make_state(num_ranks, 1, 9)
        with pytest.raises(DamagedCheckpointError) as caught:
            checkpoint.load(saved, state)
        return str(caught.value), is_same(state, make_state(num_ranks, 1, 9))

    outcomes = simulate_ranks(num_ranks, attempt)
    assert len({message for message, _ in outcomes}) == 1
    assert all(name in message and is_untouched for message, is_untouched in outcomes)


@pytest.mark.parametrize("name", [MARKER, MANIFEST])
def test_no_bit_of_manifest_or_marker_can_change(saved, name):
    intact = (saved / name).read_bytes()
    for position in range(0, len(intact), 1 + len(intact) // 200):
        flip_one_bit(saved / name, position)
        with pytest.raises(DamagedCheckpointError):
            checkpoint.read_manifest(saved)
        (saved / name).write_bytes(intact)
    assert checkpoint.read_manifest(saved).step == 100


def test_all_damaged_files_are_listed(saved):
    for name in FILES[:3]:
        (saved / name).unlink()
    with pytest.raises(DamagedCheckpointError) as caught:
        holds(saved, 1, 1, 2)
    assert sorted(str(caught.value).splitlines()) == sorted(
        f"{saved / name}: missing" for name in FILES[:3]
    )


SKIPPED = {
    "missing": ("__0_0.distcp: missing", lambda path: (path / "__0_0.distcp").unlink()),
    "empty": ("__0_0.distcp: 0 bytes instead of", lambda path: DAMAGES["empty"](path / FILES[0])),
    "cut": (r"__0_0.distcp: \d+ bytes instead", lambda path: DAMAGES["truncated"](path / FILES[0])),
    "flipped": (
        "__0_0.distcp: content differs from its SHA-256",
        lambda path: DAMAGES["flipped"](path / FILES[0]),
    ),
    "poisoned": (
        r"\.metadata: \d+ bytes instead of",
        lambda path: (path / ".metadata").write_bytes(pickle.dumps(Hostile(path / "executed"))),
    ),
    "manifest": ("manifest.json: No such file", lambda path: (path / MANIFEST).unlink()),
    "marker": ("no valid COMMITTED", lambda path: (path / MARKER).unlink()),
}
"""What happened to a checkpoint, how the warning begins to say so, and how it is done."""


def test_resume_says_what_it_passed_over_and_why_and_what_it_took(saved_run, recwarn):
    steps = range(200, 200 + 100 * len(SKIPPED), 100)
    for step, (_, damage) in zip(steps, SKIPPED.values(), strict=True):
        damage(save(saved_run, step, seed=step))
    (saved_run / "checkpoints" / "step-00002000.partial").mkdir()

    def resume() -> tuple[str, bool]:
        state = make_state(2, 1, 9)
        found = checkpoint.load_latest(saved_run, state)
        assert found is not None
        return found[0].name, found[1] == EXTRA and is_same(state, make_state(2, 1, 1))

    assert simulate_ranks(2, resume) == [("step-00000100", True)] * 2
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == len(SKIPPED) + 1
    for step, (reason, _) in zip(steps, SKIPPED.values(), strict=True):
        (said,) = [message for message in messages if f"step-{step:08d}" in message]
        assert re.search(reason, said), said
    assert messages[-1] == "step-00000100 is taken, the newest that is whole"
    assert not list(saved_run.rglob("executed"))


def test_a_lack_of_memory_is_no_damage(saved_run, monkeypatch, recwarn):
    save(saved_run, 200, seed=2)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.25 GiB. GPU 0")

    monkeypatch.setattr("torch.load", fail)

    def resume() -> str:
        with pytest.raises(NoMemoryError) as caught:
            checkpoint.load_latest(saved_run, make_state(2, 1, 9))
        return str(caught.value)

    first, second = simulate_ranks(2, resume)
    assert first == second
    assert "out of memory: no 20.25 GiB left for a checkpoint's tensors" in first
    assert "what takes less: more ranks, " in first
    assert not recwarn, "nothing is passed over"


def test_above_the_limit_sizes_alone_are_verified_and_a_warning_says_so(saved, recwarn):
    flip_one_bit(saved / ".metadata", 7)  # which loading does not read

    def load(limit: float) -> bool:
        state = make_state(1, 1, 9)
        checkpoint.load(saved, state, hash_limit_gib=limit)
        return is_same(state, make_state(1, 1, 1))

    bytes_held = checkpoint.read_manifest(saved).total_bytes
    with pytest.raises(DamagedCheckpointError, match="content differs"):
        simulate_ranks(1, lambda: load(bytes_held / 2**30))
    assert not recwarn
    assert simulate_ranks(1, lambda: load(0)) == [True]
    (message,) = [str(warning.message) for warning in recwarn]
    assert message.startswith(f"{saved} (")
    assert " GiB) is above checkpoint.hash_limit_gib (0): " in message
    assert message.endswith(f"; `moetrain checkpoint verify {saved}` does that")
    for name, damage in (("__1_0.distcp", "truncated"), (MANIFEST, "flipped")):
        DAMAGES[damage](saved / name)
        with pytest.raises(DamagedCheckpointError, match=name):
            simulate_ranks(1, lambda: load(0))


@pytest.mark.parametrize("name", ["__0_0.distcp", MARKER])
def test_a_run_with_nothing_but_damage_does_not_start_afresh(saved_run, saved, name):
    (saved / name).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="step-00000100"),
        pytest.raises(UserError, match=r"all checkpoints of .* are damaged"),
    ):
        simulate_ranks(1, lambda: checkpoint.load_latest(saved_run, make_state(1, 1, 9)))


def test_a_run_that_never_saved_starts_afresh(tmp_path):
    (tmp_path / "checkpoints" / "step-00000100.partial").mkdir(parents=True)
    assert simulate_ranks(2, lambda: checkpoint.load_latest(tmp_path, {})) == [None, None]
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_another_model_is_an_error_and_no_reason_to_fall_back(saved_run):
    save(saved_run, 200, seed=2)
    with pytest.raises(UserError, match="step-00000200 is of another model"):
        simulate_ranks(1, lambda: checkpoint.load_latest(saved_run, {"model.x": torch.zeros(1)}))


# ---- hostile files


def test_a_poisoned_index_is_refused_and_never_unpickled(saved, tmp_path):
    trace = tmp_path / "executed"
    (saved / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata"):
        holds(saved, 1)
    reseal(saved)
    assert holds(saved, 1)
    assert not trace.exists()


def test_poisoned_tensors_are_not_executed(saved, tmp_path):
    trace = tmp_path / "executed"
    for name in FILES[:2]:
        torch.save(Hostile(trace), saved / name)
    manifest = json.loads((saved / MANIFEST).read_bytes())
    for entry in manifest["tensors"].values():
        for piece in entry["pieces"]:
            piece |= {"start": 0, "bytes": (saved / piece["file"]).stat().st_size}
    reseal(saved, tensors=manifest["tensors"])
    with pytest.raises(DamagedCheckpointError, match=r"not be read: rank 0: UnpicklingError"):
        simulate_ranks(2, lambda: checkpoint.load(saved, make_state(2, 1, 9)))
    assert not trace.exists()


def test_a_tensor_with_a_hole_is_refused_and_not_half_loaded(saved):
    tensors = json.loads((saved / MANIFEST).read_bytes())["tensors"]
    del tensors["model.experts.up"]["pieces"][1]
    reseal(saved, tensors=tensors)
    with pytest.raises(
        DamagedCheckpointError, match=r"experts\.up .*: its pieces hold 36 elements"
    ):
        holds(saved, 1, edp=2)


def test_a_manifest_cannot_point_elsewhere_nor_be_of_another_version(saved):
    tensors = json.loads((saved / MANIFEST).read_bytes())["tensors"]
    tensors["counts"]["pieces"][0]["file"] = "../__0_0.distcp"
    reseal(saved, tensors=tensors)
    with pytest.raises(UserError, match=r"tensors\.counts\.pieces\.0\.file"):
        checkpoint.read_manifest(saved)
    reseal(saved, version=2)
    with pytest.raises(UserError, match="is not of version 1: version"):
        checkpoint.read_manifest(saved)
