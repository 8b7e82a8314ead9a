"""`moetrain checkpoint convert`: the same bits in every format, whole or not there."""

from __future__ import annotations

import json
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from checkpoints import DAMAGES, FILES, holds, logical, make_state
from runs import train, write_config
from safetensors import safe_open
from safetensors.torch import load_file

from moetrain import checkpoint, cli
from moetrain.checkpoint.diff import print_diff
from moetrain.checkpoint.reading import open_checkpoint
from moetrain.convert import INDEX, Source, convert, shards, write_safetensors
from moetrain.errors import UserError
from moetrain.restore import TOKENIZER_FILE
from moetrain.testing import simulate_ranks

WEIGHTS = {"model.experts.up", "model.embedding", "model.router", "model.norm"}


@pytest.fixture(scope="module")
def values() -> dict[str, torch.Tensor]:
    """What `saved` holds."""
    return simulate_ranks(1, lambda: logical(make_state(1, 1, 1)))[0]


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """The system refuses files of this process beyond that size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_there_and_back_is_the_same_bit_by_bit(tmp_path, saved):
    (saved.parent.parent / TOKENIZER_FILE).write_text("{}")
    there, back = tmp_path / "there", tmp_path / "new" / "folders" / "back"
    convert(saved, there, "moetrain")
    convert(there, back, "moetrain")
    assert print_diff(saved, back) == 0
    assert (back / TOKENIZER_FILE).read_text() == "{}"
    copy = checkpoint.resolve(back)
    assert copy == back / "checkpoints" / saved.name
    # One rank wrote it, and any may read it.
    assert [file.name for file in checkpoint.read_manifest(copy).files] == [
        "__0_0.distcp",
        ".metadata",
    ]
    assert holds(copy, 1, edp=2, ep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "there", "new"}


def test_a_torch_file_is_read_without_pickle(tmp_path, saved, values):
    out = tmp_path / "model.pt"
    convert(saved, out, "torch")
    found = torch.load(out, weights_only=True)
    assert found["step"] == 100
    assert found["extra"] == checkpoint.read_manifest(saved).extra
    assert found["tensors"].keys() == values.keys()
    for name, value in values.items():
        assert found["tensors"][name].dtype == value.dtype
        assert torch.equal(found["tensors"][name], value)


def test_safetensors_hold_the_same_bits_and_the_settings(tmp_path, saved, values):
    out = tmp_path / "out"
    convert(saved, out, "safetensors", weights_only=True)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    found = load_file(out / "model.safetensors")
    assert found.keys() == WEIGHTS
    assert all(torch.equal(tensor, values[name]) for name, tensor in found.items())
    with safe_open(out / "model.safetensors", "pt") as file:
        header = file.metadata()
    assert header == {
        "format": "pt",
        "step": "100",
        "config": json.dumps(checkpoint.read_manifest(saved).extra["config"]),
    }


def test_large_safetensors_come_in_several_files_with_an_index(tmp_path, saved, values):
    source = Source(saved, open_checkpoint(saved, hashed=False), weights_only=False, bf16=False)
    sizes = {name: source.num_bytes(name) for name in source.names}
    write_safetensors(tmp_path / "out", sizes, source.read, {"format": "pt"}, shard_bytes=300)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"] == {"total_size": sum(v.numel() * v.itemsize for v in values.values())}
    found = {}
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == {*held}
        assert len(held) == 1 or sum(t.numel() * t.itemsize for t in held.values()) <= 300
        found |= held
    assert all(torch.equal(found[name], value) for name, value in values.items())


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], [[]]),
        ([3], [["0"]]),
        ([12], [["0"]]),
        ([5, 5, 1], [["0", "1"], ["2"]]),
        ([12, 1, 9, 12], [["0"], ["1", "2"], ["3"]]),
    ],
)
def test_shards_keep_order_and_limit(sizes, groups):
    assert shards({str(i): size for i, size in enumerate(sizes)}, limit=10) == groups


def test_bf16_rounds_the_model_alone(tmp_path, saved, values):
    out = tmp_path / "model.pt"
    convert(saved, out, "torch", bf16=True)
    for name, tensor in torch.load(out, weights_only=True)["tensors"].items():
        wanted = values[name].bfloat16() if name in WEIGHTS else values[name]
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)
    with pytest.raises(UserError, match="--dtype bf16 is for --format safetensors and torch"):
        convert(saved, tmp_path / "run2", "moetrain", bf16=True)


FORMATS = pytest.mark.parametrize("target", ["moetrain", "safetensors", "torch"])


@FORMATS
def test_nothing_is_written_over_and_nothing_by_halves(tmp_path, saved, target):
    out = tmp_path / "outs" / "out"
    with no_file_above(500), pytest.raises(UserError, match=r"OUT \(.*\) was not written: "):
        convert(saved, out, target)
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    with pytest.raises(UserError, match=r"OUT \(.*/out\) exists; name a place that does not"):
        convert(saved, out, target)
    out.rmdir()
    out.symlink_to("nowhere")
    with pytest.raises(UserError, match="exists"):
        convert(saved, out, target)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_not_sealed_into_a_copy(tmp_path, saved, damage):
    DAMAGES[damage](saved / FILES[0])
    with pytest.raises(UserError, match=FILES[0]):
        convert(saved, tmp_path / "out", "moetrain")
    assert not (tmp_path / "out").exists()


def test_a_run_continues_from_a_copy_and_weights_alone_are_for_generation(tmp_path, capsys):
    sections = {"checkpoint": {"every": 2, "hash_limit_gib": 0}, "eval": {"every": 0}}
    config = write_config(tmp_path, **sections)
    run, copy, weights = tmp_path / "runs" / "run", tmp_path / "copy", tmp_path / "weights"
    assert train(config, "--train.steps", 2) == 0
    assert cli.main(["checkpoint", "convert", str(run), str(copy), "--format", "moetrain"]) == 0
    convert(run, weights, "moetrain", weights_only=True)
    four = ("--train.steps", 4, "--checkpoint.resume")
    assert train(config, *four, run, "--name", "one") == 0
    assert train(config, *four, copy, "--name", "two") == 0
    assert print_diff(run.with_name("one"), run.with_name("two")) == 0
    texts = []
    warnings.simplefilter("always")
    for path in (run, weights):
        capsys.readouterr()
        assert cli.main(["generate", str(path), "--prompt", "ab", "--greedy"]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert "is above checkpoint.hash_limit_gib (0)" in err  # as stored with the run
    assert texts[0] == texts[1] != ""
    assert train(config, *four, weights, "--name", "three") == 2
    assert "holds weights alone, and to train needs 57 tensors more:" in capsys.readouterr().err
