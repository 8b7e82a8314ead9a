"""`moetrain checkpoint list`, `show`, `verify` and `diff`: what they print, how they exit."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import DAMAGES, FILES, Hostile, make_state, reseal, save

from moetrain import checkpoint, cli
from moetrain.checkpoint.checks import piece_problems
from moetrain.checkpoint.diff import compare
from moetrain.checkpoint.inspect import parts
from moetrain.checkpoint.manifest import MANIFEST, MARKER, Manifest, Piece, TensorEntry
from moetrain.config import Config
from moetrain.tables import print_table, spell_bytes
from moetrain.testing import simulate_ranks


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `moetrain checkpoint ...`; returns the exit code and what it printed."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*args: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(["checkpoint", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def cells(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())


def size_of(path: Path) -> str:
    return spell_bytes(sum((path / name).stat().st_size for name in FILES[:3]))


# ---- list


def test_list_tells_every_directory_in_order_of_saving(saved_run, saved, command):
    config = Config().model_dump(mode="json")
    newest = save(saved_run, 200, seed=2, extra={"config": config})
    damaged = save(saved_run, 150, seed=2)
    DAMAGES["truncated"](damaged / FILES[0])
    torn = save(saved_run, 160, seed=2)
    (torn / MARKER).unlink()
    shutil.copytree(saved, saved_run / "checkpoints" / "step-00000200.replaced")
    (saved_run / "checkpoints" / "step-00000300.partial").mkdir()
    (saved_run / "checkpoints" / "notes").mkdir()
    code, text = command("list", saved_run)
    assert code == 0
    folder, headings, *lines = text.splitlines()
    assert folder == str(saved_run / "checkpoints")
    assert cells(headings)[:2] == ["checkpoint", "save"]
    rows = {cells(line)[0]: cells(line)[1:] for line in lines}
    assert list(rows) == [
        torn.name,
        "step-00000100",
        "step-00000200.replaced",
        newest.name,
        damaged.name,
        "step-00000300.partial",
    ]
    assert rows["step-00000100"][:3] == ["1", size_of(saved), "7"]
    assert rows["step-00000100"][-1] == "complete"
    assert rows[newest.name][-3:] == [
        "ep 1, dp_replicate 1, engine torch",
        "complete",
        "takes this",
    ]
    assert re.fullmatch(r"damaged: __0_0.distcp: \d+ bytes instead of \d+", rows[damaged.name][-1])
    assert rows[torn.name][-1] == "damaged: COMMITTED: No such file or directory"
    assert rows["step-00000200.replaced"][-1] == "replaced by a later save of the step"
    assert rows["step-00000300.partial"] == ["partial: being saved, or left by a killed one"]


def test_list_needs_checkpoints(tmp_path, command):
    assert command("list", tmp_path)[0] == 2
    (tmp_path / "checkpoints").mkdir()
    code, text = command("list", tmp_path)
    assert (code, text) == (2, f"moetrain: error: {tmp_path / 'checkpoints'} holds no checkpoint\n")


# ---- show


def test_show_tells_position_settings_parts_tensors_and_files(saved_run, command):
    config = Config(name="shown").model_dump(mode="json")
    extra = {"config": config, "position": {"step": 200, "samples": 6400}}
    path = save(saved_run, 200, seed=2, extra=extra)
    code, text = command("show", saved_run)
    lines = text.splitlines()
    assert code == 0
    assert lines[0].startswith(f"{path}: save 2, ")
    assert lines[1] == "step 200, samples 6400"
    rows = [cells(line) for line in lines]
    assert ["name", "shown"] in rows
    assert ["moe.experts", "8"] in rows
    assert ["model.experts.up", "[4, 6, 3]", "float32", "1"] in rows
    assert ["moments", "2", "73", "292"] in rows
    manifest = checkpoint.read_manifest(path)
    for file in manifest.files:
        assert [file.name, f"{file.bytes:,}", file.sha256] in rows


def test_show_tells_few_tensors_unless_asked_for_all(tmp_path, command):
    tensors = {f"model.w{number:02d}": torch.zeros(2) for number in range(12)}
    simulate_ranks(1, lambda: checkpoint.save(tmp_path, 1, tensors, {}))
    few, every = (command("show", tmp_path, *flags)[1] for flags in ([], ["--tensors"]))
    assert few.count("model.w") == 10
    assert "... and 2 more; --tensors shows all" in few
    assert every.count("model.w") == 12
    assert "more;" not in every


def test_show_refuses_what_is_damaged(saved, command):
    (saved / FILES[0]).unlink()
    code, text = command("show", saved)
    assert (code, text) == (2, f"moetrain: error: {saved / FILES[0]}: missing\n")


def entry(shape: list[int], *pieces: tuple[list[int], list[int]]) -> TensorEntry:
    """A tensor whose pieces (offsets, sizes) lie in a file one after the other, 10 bytes each."""
    found = [
        Piece(offsets=offsets, sizes=sizes, file="__0_0.distcp", start=10 * i, bytes=10)
        for i, (offsets, sizes) in enumerate(pieces)
    ]
    return TensorEntry(shape=shape, dtype="float32", pieces=found)


def test_parts_are_weights_moments_and_buffers():
    whole = entry([3], ([0], [3]))
    names = ["model.w", "model.bias", "optimizer.w.exp_avg", "optimizer.w.exp_avg_sq"]
    tensors = dict.fromkeys(names, whole)
    trained = Manifest(step=1, extra={}, files=[], tensors=tensors)
    assert parts(trained) == [("weights", 1, 3, 12), ("moments", 2, 6, 24), ("buffers", 1, 3, 12)]
    alone = trained.model_copy(update={"tensors": dict.fromkeys(names[:2], whole)})
    assert parts(alone) == [("weights", 2, 6, 24)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (2**20, "1 MiB"),
        (5 * 2**40, "5.12e+03 GiB"),
    ],
)
def test_bytes_are_spelled_with_a_unit(count, text):
    assert spell_bytes(count) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_loses_nothing_on_a_narrow_terminal_and_is_not_folded_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    texts = []
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stdout", stream)
        print_table(("tensor", "elements"), [("a" * 50, 1234), ("b", 5)])
        texts.append(stream.getvalue())
    assert texts[0].splitlines()[1:] == ["a" * 50 + "     1,234", "b" + " " * 58 + "5"]
    assert texts[1].count("a") == 50
    assert len(texts[1].splitlines()) > 3


# ---- verify


def test_verify_looks_at_every_byte_of_all_checkpoints(saved_run, saved, command):
    second = save(saved_run, 200, seed=2)
    (saved_run / "checkpoints" / "step-00000300.partial").mkdir()
    ok = f"{saved}: ok (7 tensors, {size_of(saved)})\n"
    code, text = command("verify", saved_run)
    assert (code, text.splitlines()[0] + "\n") == (0, ok)
    assert text.splitlines()[1].startswith(f"{second}: ok (7 tensors, ")
    DAMAGES["flipped"](second / FILES[0])
    (second / ".metadata").unlink()
    damaged = (
        f"{second}: damaged\n"
        f"  {second / FILES[0]}: content differs from its SHA-256\n"
        f"  {second / '.metadata'}: missing\n"
    )
    assert command("verify", saved_run) == (2, ok + damaged)
    assert command("verify", second) == (2, damaged)
    assert command("verify", saved) == (0, ok)


@pytest.mark.parametrize("name", [MANIFEST, MARKER])
@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_a_damaged_seal(saved, command, name, damage):
    DAMAGES[damage](saved / name)
    code, text = command("verify", saved)
    assert code == 2
    assert text.startswith(f"{saved}: damaged\n  ")
    assert name in text


def test_verify_needs_a_checkpoint(saved, command):
    code, text = command("verify", saved.with_name("step-00000007"))
    assert code == 2
    assert "step-00000007 does not exist; complete checkpoints in" in text


@pytest.mark.parametrize(
    ("tensor", "problems"),
    [
        (entry([], ([], [])), []),
        (entry([4, 3], ([0, 0], [4, 3])), []),
        (entry([4, 3], ([2, 0], [2, 3]), ([0, 0], [2, 3])), []),
        (entry([2, 2], *(([i, j], [1, 1]) for i in (0, 1) for j in (0, 1))), []),
        # One rank had nothing; one had part of a row.
        (entry([4, 3], ([0, 0], [4, 3]), ([4, 0], [0, 3])), []),
        (entry([2, 3], ([0, 0], [1, 2]), ([0, 2], [1, 1]), ([1, 0], [1, 3])), []),
        (entry([], ([], []), ([], [])), ["its pieces hold 2 elements, not 1", "overlap"]),
        (entry([4], ([0], [3])), ["its pieces hold 3 elements, not 4"]),
        (entry([4], ([0], [2]), ([1], [2])), ["the pieces at [0] and [1] overlap"]),
        (entry([2, 2], ([0, 0], [1, 2]), ([0, 1], [2, 1])), [" at [0, 0] and [0, 1] overlap"]),
        (entry([4], ([1], [4])), ["the piece at [1] of [4] reaches out of it"]),
        (entry([4], ([-1], [4])), ["reaches out"]),
        (entry([4], ([0], [-4]), ([0], [4])), ["reaches out"]),
        (entry([4], ([0, 0], [2, 2])), ["reaches out"]),
        (
            entry([5], *(([i], [1]) for i in range(5))),
            ["bytes 40 to 50 are not in __0_0.distcp"],
        ),
    ],
)
def test_pieces_tile_their_tensor_and_lie_in_their_file(tensor, problems):
    found = list(piece_problems(tensor, {"__0_0.distcp": 40}))
    assert len(found) == len(problems)
    assert all(problem in text for problem, text in zip(problems, found, strict=True))


def test_verify_says_which_tensor_lacks_a_piece(saved, command):
    tensors = checkpoint.read_manifest(saved).model_dump()["tensors"]
    del tensors["model.experts.up"]["pieces"][0]
    tensors["counts"]["pieces"][0]["start"] += 10**6
    reseal(saved, tensors=tensors)
    code, text = command("verify", saved)
    assert code == 2
    assert f"{saved}: model.experts.up [4, 6, 3] float32: its pieces hold 36 elements" in text
    assert f"{saved}: counts [5] int64: bytes 1" in text


# ---- diff


def test_diff_of_the_same_tensors_is_0_however_they_are_laid_out(tmp_path, saved, command):
    path = save(tmp_path / "other", 100, seed=1, edp=2, ep=2)
    code, text = command("diff", saved, path)
    assert code == 0
    assert text == f"A: {saved}\nB: {path}\n\n{SAME}"


SAME = (
    "7 tensors are equal bit by bit, 0 have other values, 0 are absent or of another kind in one\n"
)


def test_diff_names_settings_position_and_tensors(tmp_path, command):
    def save_as(name: str, extra: dict, change) -> Path:
        state = make_state(1, 1, 1)
        change(state)
        return checkpoint.save(tmp_path / name, 1, state, extra)

    def change(state: dict[str, torch.Tensor]) -> None:
        state["counts"][1:3] += 5
        state["model.norm"] = state["model.norm"].full_tensor().float()
        state["model.more"] = torch.ones(2)
        del state["optimizer.experts.up.step"]

    one = {"config": {"moe": {"experts": 4, "gone": 1}, "seed": 0}, "position": {"step": 1}}
    other = {"config": {"moe": {"experts": 8}, "seed": 0}, "position": {"step": 2}}
    paths = [
        simulate_ranks(1, lambda: save_as("a", one, lambda state: None))[0],
        simulate_ranks(1, lambda: save_as("b", other, change))[0],
    ]
    code, text = command("diff", *paths)
    assert code == 1
    rows = [cells(line) for line in text.splitlines()]
    for row in (
        ["moe.experts", "4", "8"],
        ["moe.gone", "1", "absent"],
        ["step", "1", "2"],
        ["model.more", "absent", "[2] float32"],
        ["model.norm", "[3] bfloat16", "[3] float32"],
        ["optimizer.experts.up.step", "[] float32", "absent"],
        ["counts", "2", "5"],
    ):
        assert row in rows
    assert not any("seed" in row for row in rows)
    assert rows[-1][0].startswith("4 tensors are equal bit by bit, 1 have other values, 3 are")


def test_values_are_compared_bit_by_bit():
    nan = torch.tensor([float("nan"), 0.0, 1.0])
    assert compare(nan, nan.clone()) == (0, 0.0)
    assert compare(torch.tensor(0.0), torch.tensor(-0.0)) == (1, 0.0)
    assert compare(nan[1:], torch.tensor([0.5, 3.0])) == (2, 2.0)
    assert compare(torch.tensor([True, False]), torch.tensor([True, True])) == (1, 1.0)
    assert compare(torch.ones(3).bfloat16(), torch.ones(3).bfloat16()).num_elements == 0


def test_a_poisoned_tensor_is_refused_and_not_executed(tmp_path, saved, command):
    trace = tmp_path / "executed"
    torch.save(Hostile(trace), saved / FILES[0])
    tensors = checkpoint.read_manifest(saved).model_dump()["tensors"]
    size = (saved / FILES[0]).stat().st_size
    for tensor in tensors.values():
        for piece in tensor["pieces"]:
            piece |= {"file": FILES[0], "start": 0, "bytes": size}
    reseal(saved, tensors=tensors)
    code, text = command("diff", saved, saved)
    assert code == 2
    assert "__0_0.distcp, byte 0: no tensor can be read" in text
    assert not trace.exists()


def test_a_piece_of_another_shape_is_not_broadcast(saved, command):
    tensors = checkpoint.read_manifest(saved).model_dump()["tensors"]
    scalar = tensors["optimizer.experts.up.step"]["pieces"][0]
    tensors["model.embedding"]["pieces"][0] |= {k: scalar[k] for k in ("file", "start", "bytes")}
    reseal(saved, tensors=tensors)
    code, text = command("diff", saved, saved)
    assert code == 2
    assert re.search(r"byte \d+: \[\] float32 instead of \[4, 5\] float32", text)
