"""Text that is damaged, missing or too short, seen from the command that trains on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines_without_timings, train, without_pictures, write_config

from moetrain import settings
from moetrain.mesh import Mesh
from moetrain.testing import simulate_ranks
from moetrain.train import set_up
from moetrain.train import train as train_run


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Whose text is prepared."""
    off = {"every": 0}
    path = write_config(
        tmp_path_factory.mktemp("data"), train={"steps": 1}, eval=off, checkpoint=off
    )
    assert train(path) == 0
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4321] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4321])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_bit, "the checksum of bytes 0 to {size} is wrong"),
        (cut, "it ends at byte 4321, not at {size}"),
        (Path.unlink, "the file is missing"),
    ],
)
def test_damaged_tokens_end_a_run_with_their_file_and_offset(
    config, capsys, damage: Callable[[Path], None], problem
):
    (path,) = (config.parent / "cache").glob("*/train-tokens-00000.bin")
    whole = path.read_bytes()
    damage(path)
    try:
        assert train(config, "--name", "damaged") == 2
    finally:
        path.write_bytes(whole)
    error = capsys.readouterr().err
    wanted = problem.format(size=len(whole))
    assert f"moetrain: error: prepared data is damaged: {path}: {wanted}; delete " in error
    assert "Traceback" not in error
    assert train(config, "--name", "mended") == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ""),
        ("a.jsonl", '{"text": null}\n\n{"text": ""}\n'),
        ("a.jsonl", "\n\n"),
    ],
)
def test_no_document_at_all_is_one_message(tmp_path, capsys, name, content):
    config = write_config(tmp_path)
    (tmp_path / name).write_text(content)
    assert train(config, "--data.source", tmp_path / name) == 2
    assert f"data.source ('{tmp_path / name}') holds no text; " in capsys.readouterr().err


def run_on(world: int, config: Path) -> list[dict[str, Any]]:
    """Train on simulated ranks; returns what the run logged."""
    made = settings.load(config, ["--name", f"on-{world}"])

    def of_rank() -> int:
        run = set_up(made, made.out / made.name, Mesh(torch.device("cpu")))
        train_run(run)
        return len(run.samples)

    with without_pictures():
        (samples,) = set(simulate_ranks(world, of_rank))
    assert samples == 3, "of the first batch rank 3 is given none of the first epoch"
    return lines_without_timings(made.out / made.name)


def test_ranks_whose_text_ends_earlier_stop_at_the_same_step(tmp_path):
    """Three sequences a pass over the text, in batches of eight on four ranks: each rank meets
    the end elsewhere, and all go on alike until the last step."""
    config = write_config(
        tmp_path,
        engine={"precision": "fp64"},
        data={"seq_len": 32, "max_documents": 2, "eval_fraction": 0.1},
        train={"steps": 4, "micro_batch": 2},
        eval={"every": 2, "sequences": 3},
        checkpoint={"every": 0},
    )
    for path in (tmp_path / "text").iterdir():
        path.write_text(path.read_text()[:110])
    alone, together = run_on(1, config), run_on(4, config)
    assert [line["step"] for line in together] == [1, 2, 2, 3, 4, 4]
    for one, other in zip(alone, together, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-9)
