"""The trace on disk: complete steps, whatever happens to the process and the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moetrain.config import Config, MoEConfig
from moetrain.errors import UserError
from moetrain.moe import Preferences
from moetrain.trace import Trace, TraceLog, drop_later_steps, num_ranked

CONFIG = Config.model_validate(
    {
        "model": {"dim": 8, "layers": 2, "heads": 1},
        "moe": {"experts": 4},
        "data": {"seq_len": 3},
        "train": {"global_batch": 4, "micro_batch": 1},
    }
)


def noted(seed: int, sequences: int = 1, dtype: torch.dtype = torch.bfloat16) -> Preferences:
    """Anything."""
    chance = torch.Generator().manual_seed(seed)
    tokens = 3 * sequences
    expert_TX = torch.randint(0, 5, (tokens, 4), generator=chance).to(torch.uint8)
    weight_TX = torch.rand(tokens, 4, generator=chance).to(dtype)
    flags_TK = torch.rand(tokens, 2, generator=chance) < 0.7
    return Preferences(expert_TX, weight_TX, flags_TK, flags_TK[:, 0])


def write(run: Path, step: int, ranks: tuple[int, ...] = (0, 1), **options: Any) -> None:
    """Two ranks with two micro-batches of a sequence each, and two layers."""
    for rank in ranks:
        log = TraceLog(run, CONFIG, rank, world=2)
        parts = [[noted(10 * step + rank + 2 * j + 100 * layer, **options) for layer in (0, 1)]
                 for j in (0, 1)]  # fmt: skip
        first = 4 * (step - 1)
        log.write(step, [first + rank, first + rank + 2], parts, [1.25, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_written_comes_back_in_the_order_of_samples(tmp_path, dtype):
    write(tmp_path, 5, dtype=dtype)
    trace = Trace.open(tmp_path)
    assert (trace.steps, trace.num_layers, trace.world) == ([5], 2, 2)
    assert trace.settings == CONFIG
    (record,) = trace.records()
    assert record.sample_S.tolist() == [16, 17, 18, 19]
    assert record.token_id_T.tolist() == list(range(48, 60))
    assert record.capacity_factors == [1.25, None]
    for layer, found in enumerate(record.layers):
        # sample 16 is the first micro-batch of rank 0, 17 of rank 1, 18 the second of rank 0 ...
        wanted = [noted(50 + place + 100 * layer, dtype=dtype) for place in range(4)]
        for ours, theirs in zip(found, zip(*wanted, strict=True), strict=True):
            assert torch.equal(ours, torch.cat(theirs))
            assert ours.dtype == theirs[0].dtype


def test_as_many_experts_are_ranked_as_may_be_asked():
    assert num_ranked(MoEConfig(top_k=1)) == 4
    assert num_ranked(MoEConfig(top_k=3)) == 6
    assert num_ranked(MoEConfig(top_k=2, drop_policy="spill", spill_depth=3)) == 8


def test_steps_that_are_not_whole_are_left_out(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    write(tmp_path, 4, ranks=(0,))
    folder = tmp_path / "trace"
    torn = folder / "step-00000002" / "rank-00001.npz"
    torn.write_bytes(torn.read_bytes()[:-30])
    (folder / "step-00000003" / "rank-00000.npz.partial").write_bytes(b"PK")
    (folder / "step-00000005").mkdir()
    with pytest.warns(UserWarning, match="is left out") as warnings:
        trace = Trace.open(tmp_path)
    assert trace.steps == [1, 3]
    told = [str(warning.message) for warning in warnings]
    assert len(told) == 3
    assert "rank-00001.npz is damaged" in told[0]
    assert "it has 1 of 2" in told[1]
    assert "it has 0 of 1" in told[2]
    for step in (1, 3):
        (folder / f"step-{step:08d}" / "rank-00000.npz").unlink()
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(UserError, match="no complete step"),
    ):
        Trace.open(tmp_path)


def test_damage_inside_is_found_when_it_is_read(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "trace" / "step-00000001" / "rank-00000.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"weight.npy") + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rank-00000.npz is damaged"):
        Trace.open(tmp_path)


def replace_array(path: Path, name: str, value: np.ndarray) -> None:
    with np.load(path) as arrays:
        content = {**arrays, name: value}
    np.savez(path, **content)


ARRAYS = {
    "experts": ("expert", np.full((2, 6, 4), 9, np.uint8), "experts that there are not"),
    "pickle": ("expert", np.array([{}], dtype=object), "damaged"),
    "shape": ("weight", np.zeros((3, 6, 4), np.int16), "damaged"),
}


@pytest.mark.parametrize(("name", "value", "message"), ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_that_cannot_be_are_refused(tmp_path, name, value, message):
    write(tmp_path, 1)
    replace_array(tmp_path / "trace" / "step-00000001" / "rank-00001.npz", name, value)
    with pytest.raises(UserError, match=message):
        Trace.open(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"format": 7}', "has format 7, not 1"),
        (b"[]", "damaged"),
        (b'{"format": 1, "step": 5}', "damaged: its header lacks capacity_factors, config, top_k"),
    ],
)
def test_headers_of_another_kind_are_left_out(tmp_path, header, message):
    for step in (1, 2):
        write(tmp_path, step)
    path = tmp_path / "trace" / "step-00000001" / "rank-00001.npz"
    replace_array(path, "header", np.frombuffer(header, np.uint8))
    with pytest.warns(UserWarning, match=message):
        assert Trace.open(tmp_path).steps == [2]


def _write_on(run: Path, told: Any) -> None:
    for step in range(1, 10_000):
        write(run, step, sequences=200)
        told.send(step)


def test_kill_9_loses_no_step_that_was_written(tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    writer = context.Process(target=_write_on, args=(tmp_path, there))
    writer.start()
    last = max(here.recv() for _ in range(5))
    os.kill(writer.pid, signal.SIGKILL)  # type: ignore[arg-type]
    writer.join()
    for path in (tmp_path / "trace").glob("*/*.npz"):
        np.load(path)["weight"]  # none is torn
    drop_later_steps(tmp_path, last)
    assert Trace.open(tmp_path).steps == list(range(1, last + 1))


def test_a_run_without_room_leaves_steps_out_and_goes_on(tmp_path, caplog):
    (tmp_path / "trace").write_text("in the way")
    log = TraceLog(tmp_path, CONFIG, rank=0, world=1)
    part = [[noted(0, sequences=4)] * 2]
    for step in (1, 2):
        log.write(step, range(4), part, [None, None])
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"{tmp_path / 'trace'} leaves out step 1"
    ]
    (tmp_path / "trace").unlink()
    log.write(3, range(4), part, [None, None])
    assert Trace.open(tmp_path).steps == [3]


def test_a_resumed_run_drops_what_it_writes_again(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    drop_later_steps(tmp_path, 2)
    assert Trace.open(tmp_path).steps == [1, 2]
    drop_later_steps(tmp_path, 0)
    assert not (tmp_path / "trace").exists()
    assert sorted(path.name for path in (tmp_path / "trace.old").iterdir()) == [
        "step-00000001", "step-00000002"
    ]  # fmt: skip
    drop_later_steps(tmp_path, 0)
