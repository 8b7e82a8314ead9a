"""Several nodes for real: two network namespaces of this machine, with two ranks in each.

Nothing but a virtual cable joins the two: each has a loopback of its own. What they make of the
quickstart's model is, to the last bit, what one node with four ranks makes of it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from jobs import job
from launchers import ROOT, environment
from runs import lines_without_timings, without_pictures, write_config, write_text

from moetrain import checkpoint, settings, torchrun
from moetrain.mesh import Mesh
from moetrain.testing import RankPool
from moetrain.train import set_up
from moetrain.train import train as train_run

INTERFACE = "eth0"
NUMBERS = itertools.count()
SECONDS = 200
CONFIG = ROOT / "configs/quickstart.yaml"
SHORT = (
    *("--train.steps", "2", "--train.micro_batch", "4", "--log.every", "1"),
    *("--eval.every", "2", "--eval.sequences", "4", "--checkpoint.every", "0"),
)
"""Four ranks share a batch of 16 sequences."""
INSIDE_A_NODE = ("--parallel.ep", "2")
ACROSS_NODES = ("--parallel.ep", "4", "--parallel.dispatch", "two_level", "--parallel.nodes", "2")


# ---- two machines --------------------------------------------------------------------------------


class Node(NamedTuple):
    """A network of its own."""

    namespace: str
    address: str

    def ip(self, *arguments: str) -> str:
        return ip("-netns", self.namespace, *arguments)

    def received(self) -> int:
        """Bytes that came in by the cable."""
        (link,) = json.loads(self.ip("-json", "-statistics", "link", "show", INTERFACE))
        return link["stats64"]["rx"]["bytes"]


def ip(*arguments: str) -> str:
    """What iproute2 says; CalledProcessError where it fails."""
    return subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, timeout=20
    ).stdout


@contextmanager
def cabled() -> Iterator[list[Node]]:
    """Two nodes joined by a cable. They are gone afterwards, whatever happens."""
    pair = [Node(f"moetrain-{os.getpid()}-{next(NUMBERS)}", f"10.77.0.{n}") for n in (1, 2)]
    first, second = (node.namespace for node in pair)
    try:
        for node in pair:
            ip("netns", "add", node.namespace)
        ip("link", "add", INTERFACE, "netns", first, "type", "veth",
           "peer", "name", INTERFACE, "netns", second)  # fmt: skip
        for node in pair:
            node.ip("address", "add", f"{node.address}/24", "dev", INTERFACE)
            node.ip("link", "set", INTERFACE, "up")
            node.ip("link", "set", "lo", "up")
        yield pair
    finally:
        for node in pair:
            with suppress(subprocess.CalledProcessError):  # it may never have been made
                ip("netns", "delete", node.namespace)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here to make network namespaces with: install iproute2")
    try:
        with cabled():
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    with cabled() as pair:
        yield pair


def namespaces() -> set[str]:
    return {line.split()[0] for line in ip("netns", "list").splitlines()}


def test_nodes_are_gone_after_a_failure(nodes: list[Node]) -> None:
    before = namespaces()

    def fail() -> None:
        with cabled() as pair:
            assert namespaces() - before == {node.namespace for node in pair}
            raise RuntimeError("of the test")

    with pytest.raises(RuntimeError, match="of the test"):
        fail()
    assert namespaces() == before


def test_nodes_that_could_not_be_cabled_are_gone_too(nodes: list[Node], monkeypatch) -> None:
    before = namespaces()
    monkeypatch.setattr(f"{__name__}.INTERFACE", "longer than Linux allows")
    with pytest.raises(subprocess.CalledProcessError), cabled():
        pass
    assert namespaces() == before


# ---- runs ----------------------------------------------------------------------------------------


def launched(nodes: list[Node], flags: tuple[str, ...]) -> None:
    """`launch/train.sh` on every node, until all have ended."""
    agents = [start(nodes, number, flags) for number in range(len(nodes))]
    try:
        deadline = time.monotonic() + SECONDS
        for agent in agents:
            output = agent.communicate(timeout=max(0.0, deadline - time.monotonic()))[0]
            assert agent.returncode == 0, output
    finally:
        for agent in agents:
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)


def start(nodes: list[Node], number: int, flags: tuple[str, ...]) -> subprocess.Popen[str]:
    """The agent of one node, a process group of its own."""
    variables = environment(
        NNODES=str(len(nodes)),
        NODE_RANK=str(number),
        NPROC="2",
        MASTER_ADDR=nodes[0].address,
        GLOO_SOCKET_IFNAME=INTERFACE,
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    return subprocess.Popen(
        ["ip", "netns", "exec", nodes[number].namespace, "launch/train.sh", str(CONFIG), *flags],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def on_ranks(flags: tuple[str, ...]) -> None:
    """The same run, by the ranks of this process group, without its plots."""
    made = settings.load(CONFIG, flags)
    parallel = made.parallel
    mesh = Mesh(torch.device("cpu"), parallel.ep, parallel.dp_replicate, parallel.nodes_apart)
    with without_pictures():
        train_run(set_up(made, settings.run_directory(made.out, made.name), mesh))


def on_nodes(nodes: list[Node], store: Path, flags: tuple[str, ...]) -> None:
    """The same, by four forks that enter the nodes: nothing is imported again."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    enter(nodes[rank * len(nodes) // world])
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world
    )
    on_ranks(flags)


def enter(node: Node) -> None:
    """Give this thread, and those that it starts, the network of a node."""
    with Path("/run/netns", node.namespace).open() as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {node.namespace}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs, their text and its tokens go."""
    folder = tmp_path_factory.mktemp("nodes")
    write_text(folder / "text")
    return folder


def flags_of(folder: Path, parallel: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a run, but for its name."""
    data = ("--data.source", str(folder / "text"), "--data.cache", str(folder / "cache"))
    return (*SHORT, *parallel, *data, "--out", str(folder / parallel[1]), "--name")


@contextmanager
def talking(nodes: list[Node]) -> Iterator[None]:
    """Some of what the ranks tell each other must come by the cable."""
    before = [node.received() for node in nodes]
    yield
    for node, earlier in zip(nodes, before, strict=True):
        assert node.received() - earlier > 1_000_000, "the ranks did not use the cable"


def agree(out: Path) -> None:
    """Two nodes wrote the lines that one wrote."""
    lines = lines_without_timings(out / "two")
    assert lines == lines_without_timings(out / "one")
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert all(len(layer["outcomes_by_rank"]) == 4 for layer in lines[0]["layers"])


def test_experts_across_nodes_in_two_hops(
    nodes: list[Node], folder: Path, ranks4: RankPool
) -> None:
    """As train.sh starts them: an agent on each node."""
    flags = flags_of(folder, ACROSS_NODES)
    with talking(nodes):
        launched(nodes, (*flags, "two"))
    ranks4.run(on_ranks, (*flags, "one"))
    agree(folder / "4")


def test_experts_inside_a_node(nodes: list[Node], folder: Path, ranks4: RankPool) -> None:
    flags = flags_of(folder, INSIDE_A_NODE)
    ranks4.run(on_ranks, (*flags, "one"))
    with talking(nodes):
        ranks4.run(on_nodes, nodes, folder / "store", (*flags, "two"))
    ranks4.renew()  # these stay in the nodes
    agree(folder / "2")


# ---- a cut cable ---------------------------------------------------------------------------------


def test_when_the_cable_is_cut_both_nodes_end(nodes: list[Node], tmp_path: Path) -> None:
    """No packet says so: one hears nothing of the other's rank, the other nothing of the store."""
    config = write_config(tmp_path, parallel={"ep": 2}, train={"steps": 4000}, eval={"every": 0})
    flags = ("--parallel.timeout-s", 4, "--checkpoint.every", 2)
    variables = {"MASTER_ADDR": nodes[0].address, "GLOO_SOCKET_IFNAME": INTERFACE}
    namespaces = [node.namespace for node in nodes]
    with job(tmp_path, 2, "train", config, *flags, namespaces=namespaces, **variables) as running:
        running.wait_for_word("checkpoint of step 2 saved")
        nodes[1].ip("link", "set", INTERFACE, "down")
        try:
            ended = running.wait()
        finally:
            nodes[1].ip("link", "set", INTERFACE, "up")
    assert ended.codes == [1, 1], ended.output
    texts = [torchrun.describe({0: failure}) for failure in ended.failures.values()]
    assert texts[0].startswith("moetrain: error: rank 1 (last at: ")
    assert texts[1].startswith(
        "moetrain: error: rank 1 has had no answer from the store of the run for 4 s"
    )
    assert checkpoint.latest(tmp_path / "runs" / "run") is not None
