"""Memory that runs out: one message that names the buffer and what makes it smaller, and code 1."""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import train, write_config

from moetrain import settings
from moetrain.checkpoint.manifest import TensorEntry
from moetrain.checkpoint.reading import read_tensor
from moetrain.checkpoint.snapshot import Snapshot
from moetrain.config import Config
from moetrain.data import prepare
from moetrain.out_of_memory import PLACES, explain

FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported torch alone
ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 20.25 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.20 GiB is free."
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Whose text is prepared, by libraries that take memory of their own."""
    off = {"every": 0}
    path = write_config(
        tmp_path_factory.mktemp("memory"),
        train={"steps": 1, "warmup_steps": 0},
        eval=off,
        checkpoint=off,
    )
    prepare(settings.load(path).data)
    return path


# ---------------------------------------------------------------- for real, on the CPU


def train_within(mib: int, log: Path, config: Path, flags: tuple[object, ...]) -> None:
    """Train in this process, which may take so much more memory than it has: enough for all but
    one large tensor, because much native code does not outlive a small one that fails."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + mib * 2**20, resource.RLIM_INFINITY))
    sys.stderr = log.open("w")
    sys.exit(train(config, *flags))


@pytest.mark.usefixtures("_server")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of a process from /proc")
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (
            ["--model.dim", 16384, "--name", "wide"],
            r"rank 0: out of memory: no [\d.]+ \w+ left for weights \(moetrain\.\w+, \w+\); "
            r"what takes less: more ranks, parallel\.dp_replicate",
        ),
        (
            ["--moe.expert-ffn-dim", 8192, "--train.micro-batch", 64, "--train.global-batch", 64,
             "--data.seq-len", 256, "--name", "long"],
            r"rank 0: out of memory: no [\d.]+ \w+ left for inner activations of experts "
            r"\(moetrain\.moe\.packed, [\w.]+\); what takes less: train\.micro_batch \(smaller\), ",
        ),
    ],
    ids=["weights", "activations"],
)  # fmt: skip
def test_a_process_without_memory_says_what_for(config, tmp_path, flags, wanted):
    log = tmp_path / "log"
    process = FORKS.Process(target=train_within, args=(800, log, config, flags))
    process.start()
    process.join(60)
    process.kill()
    message = log.read_text()
    assert process.exitcode == 1, message
    assert re.search(wanted, message), message
    assert message.count("moetrain: error") == 1
    assert "Traceback" not in message


# ---------------------------------------------------------------- at every place


def fail(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(ON_A_GPU)


FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
CALLED = {
    "weights": "moetrain.parallel.initial_value",
    "Adam's moments": "torch.zeros_like",
    "gathered weights": f"{FSDP}.FSDPParamGroup.unshard",
    "activations": "torch.nn.functional.embedding",
    "attention": "torch.nn.functional.scaled_dot_product_attention",
    "routing": "moetrain.moe.router._logits",
    "slots of tokens on their way to experts": "torch.index_select",
    "inner activations of experts": "moetrain.moe.packed.swiglu_forward",
    "logits": "torch.nn.functional.log_softmax",
    "gradients and activations": "torch.Tensor.backward",
    "gradients under way": f"{FSDP}.foreach_reduce",
    "the optimizer step": "torch.optim.AdamW.step",
}
"""What a step calls where it needs memory for a buffer."""


@pytest.mark.parametrize(("buffer", "function"), CALLED.items(), ids=CALLED.keys())
def test_the_buffer_is_named(config, monkeypatch, capsys, buffer, function):
    monkeypatch.setattr(function, fail)
    assert train(config, "--name", "step") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"out of memory: no 20.25 GiB left for {buffer} (moetrain." in line


def test_every_buffer_is_tested():
    of_checkpoints = {"the copy that a checkpoint is saved from", "a checkpoint's tensors"}
    assert {place.buffer for place in PLACES} == {*CALLED, *of_checkpoints, "whole tensors"}


def failure(work: Any) -> str | None:
    with pytest.raises((MemoryError, RuntimeError, ValueError)) as caught:
        work()
    return explain(caught.value)


def test_checkpoints(monkeypatch):
    monkeypatch.setattr("torch.empty_like", fail)
    message = failure(lambda: Snapshot().take({"model.w": torch.zeros(3)}))
    assert message is not None
    assert "for the copy that a checkpoint is saved from (moetrain.checkpoint.snapshot, " in message
    assert "what takes less: checkpoint.asynchronous (false), " in message
    monkeypatch.setattr("torch.empty", fail)
    entry = TensorEntry(shape=[3], dtype="float32", pieces=[])
    message = failure(lambda: read_tensor(Path(), entry))
    assert message is not None
    assert "for whole tensors (moetrain.checkpoint.reading, read_tensor); " in message


def test_an_unknown_place_is_named_as_it_is():
    message = failure(lambda: np.empty(2**60, np.uint8))
    assert message is not None
    assert "no 1.00 EiB left for test_out_of_memory, " in message
    assert "nothing left for" in str(failure(lambda: [0] * 2**60))
    assert "no 2048.00 GiB left for" in str(failure(lambda: torch.empty(2**39)))


def test_every_setting_named_is_one():
    for place in PLACES:
        for hint in place.less:
            name = hint.split(" (")[0]
            if "." in name:
                section, field = name.split(".")
                assert field in type(getattr(Config(), section)).model_fields


def test_other_errors_are_not_explained():
    for error in (RuntimeError("shape mismatch"), ValueError("out of range"), OSError("memory")):
        assert explain(error) is None
