"""A mistake in the configuration ends a run with one message before any process group exists, and
before anything is written. (The exact words are held in test_config.py and test_settings.py.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from moetrain import cli

REFUSED: dict[str, tuple[str, list[str], str]] = {
    "unknown key": ("moe: {experst: 4}", [], "did you mean moe.experts?"),
    "key twice": ("moe: {experts: 4}\nmoe: {}", [], "moe is given twice"),
    "unknown flag": ("", ["--moe.experst", "4"], "did you mean moe.experts?"),
    "flag twice": ("", ["--seed", "1", "--seed", "2"], "--seed is given twice"),
    "experts over ranks": ("", ["--moe.experts", "6", "--parallel.ep", "4"], "try 4 or 8"),
    "heads": ("", ["--model.heads", "3"], "try 1, 2, 4, 8 or 16"),
    "ep over ranks": (
        "",
        ["--parallel.ep", "4", "--parallel.dp-replicate", "2"],
        "parallel.ep (4) must divide",
    ),
    "world": ("", ["--parallel.dp-replicate", "3"], "must divide the world size (4); try 1, 2 or"),
    "batch": ("", ["--train.global-batch", "33"], "train.global_batch (33) must be divisible by"),
    "capacity": ("moe: {capacity_factor: .nan}", [], "moe.capacity_factor (nan) must be"),
    "top_k": ("moe: {top_k: 9}", [], "try 1 to 8"),
    "json": ("", ["--engine.kind", "deepspeed", "--engine.deepspeed-config", "ds.json"], "train_b"),
    "name above": ("name: ../x", [], "names a folder inside out"),
    "absolute name": ("name: /x", [], "names a folder inside out"),
    "name by a link": ("name: link", [], "leads out of out (runs) by a link"),
    "object": ("name: !!python/object/apply:os.mkdir [bait]", [], "write plain values, without"),
}


@pytest.mark.parametrize(("text", "flags", "fix"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_starts_and_nothing_is_written(tmp_path, monkeypatch, capsys, text, flags, fix):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process group was made")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    Path("ds.json").write_text(json.dumps({"train_batch_size": 7, "zero_optimization": {}}))
    Path("runs").mkdir()
    Path("runs/link").symlink_to("..")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", "run.yaml", *flags]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("moetrain: warning: ")]
    assert errors[0].startswith("moetrain: error: ")
    assert fix in err
    assert "Traceback" not in out + err
    assert sorted(tmp_path.rglob("*")) == before
