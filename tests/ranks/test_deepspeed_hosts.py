"""DeepSpeed's launcher for real, on two hosts that are this machine twice, with a stub for pdsh.

The stub does what pdsh does with its arguments, and gives the hosts nothing else: a shell without
this process's variables.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from launchers import ROOT, Stubs, run
from runs import lines_without_timings, train, write_config

PDSH = """
hosts="$5"; shift 5
number=0; pids=()
for host in ${hosts//,/ }; do
    command="$*"
    env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${command//%n/$number}" & pids+=($!)
    number=$((number + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || exit; done
"""
SECTIONS = {
    "train": {"steps": 3, "global_batch": 8, "micro_batch": 2},
    "eval": {"every": 0},
    "checkpoint": {"every": 0},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="both hosts would take the same GPU")
def test_ranks_on_two_hosts_train_as_one_process_does(tmp_path: Path, monkeypatch) -> None:
    config = write_config(tmp_path, **SECTIONS)
    stubs = Stubs(tmp_path / "bin")
    stubs.folder.mkdir()
    stubs.add("ssh")
    stubs.add("pdsh", PDSH)
    (tmp_path / "hostfile").write_text("one slots=1\nother slots=1\n")
    (tmp_path / "variables").write_text("GLOO_SOCKET_IFNAME=lo\nOMP_NUM_THREADS=1\n")
    done = run(
        ROOT / "launch/deepspeed.sh",
        *(config, "--name", "hosts", "--parallel.ep", "2"),
        PATH=stubs.path,
        HOSTFILE=str(tmp_path / "hostfile"),
        DS_ENV_FILE=str(tmp_path / "variables"),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(20000 + os.getpid() % 10000),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 ranks" in done.stdout
    (pdsh,) = stubs.calls("pdsh")
    assert pdsh.arguments[4] == "one,other"

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert train(config, "--name", "alone") == 0
    ours, theirs = (lines_without_timings(tmp_path / "runs" / name) for name in ("alone", "hosts"))
    assert len(ours) == len(theirs) == 3
    for line, other in zip(ours, theirs, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
        assert [layer["dropped"] for layer in other["layers"]] == [
            layer["dropped"] for layer in line["layers"]
        ]
