from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moetrain.testing import RankPool, run_ranks, simulate_ranks

# ---- what both kinds of ranks must do ------------------------------------------------------------


def identity() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def summed(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def uneven_exchange() -> tuple[torch.Tensor, torch.Tensor]:
    """Rank r sends (r + d) % 3 rows of value r to rank d, which weighs them with d + 1."""
    rank, num_ranks = identity()
    rows_to = [(rank + other) % 3 for other in range(num_ranks)]
    rows = torch.full((sum(rows_to), 2), float(rank), dtype=torch.float64, requires_grad=True)
    assert dist.group.WORLD is not None
    out = all_to_all_single_autograd(rows, rows_to, rows_to, dist.group.WORLD)
    (out * (rank + 1)).sum().backward()
    assert rows.grad is not None
    return out.detach() + 0, rows.grad


def check_uneven_exchange(results: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    num_ranks = len(results)
    for rank, (out, grad) in enumerate(results):
        counts = torch.tensor([(rank + other) % 3 for other in range(num_ranks)])
        peers = torch.arange(num_ranks, dtype=torch.float64).repeat_interleave(counts)
        assert torch.equal(out, peers[:, None].expand(-1, 2))
        assert torch.equal(grad, peers[:, None].expand(-1, 2) + 1)


def linear() -> torch.nn.Linear:
    module = torch.nn.Linear(8, 6, bias=False, dtype=torch.float64)
    weight = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module.load_state_dict({"weight": weight})
    return module


def inputs() -> torch.Tensor:
    return torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sharded_gradient() -> torch.Tensor:
    """Gradient of a sharded linear layer whose batch is split over the ranks."""
    rank, num_ranks = identity()
    module = linear()
    fully_shard(module, mesh=init_device_mesh("cpu", (num_ranks,)))
    module.set_gradient_divide_factor(1.0)
    (module(inputs().chunk(num_ranks)[rank]) ** 2).sum().backward()
    assert module.weight.grad.placements == (Shard(0),)
    return module.weight.grad.full_tensor()


def single_gradient() -> torch.Tensor:
    module = linear()
    (module(inputs()) ** 2).sum().backward()
    assert module.weight.grad is not None
    return module.weight.grad


def desert() -> None:
    """Every rank but the last waits for all of them."""
    if dist.get_rank() < dist.get_world_size() - 1:
        dist.all_reduce(torch.ones(1))


def fail_on(bad: int) -> None:
    if dist.get_rank() == bad:
        raise KeyError("lost")
    dist.all_reduce(torch.ones(1))


# ---- threads -------------------------------------------------------------------------------------


def test_simulated_results_come_in_rank_order() -> None:
    assert simulate_ranks(5, identity) == [(rank, 5) for rank in range(5)]
    assert simulate_ranks(4, summed, 10) == [46] * 4
    assert not dist.is_initialized()


def test_simulated_uneven_all_to_all_on_64_ranks() -> None:
    check_uneven_exchange(simulate_ranks(64, uneven_exchange))


def test_simulated_fsdp_gradient_equals_one_process() -> None:
    for gradient in simulate_ranks(4, sharded_gradient):
        torch.testing.assert_close(gradient, single_gradient(), rtol=1e-12, atol=1e-12)


def test_simulated_mesh_and_dtensor() -> None:
    full = torch.arange(24, dtype=torch.float64).view(4, 6)

    def shards() -> tuple[torch.Tensor, int, int]:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "edp", "ep"))
        placements = [Replicate(), Shard(1), Shard(0)]
        tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
        assert torch.equal((tensor * 2).full_tensor(), full * 2)
        return tensor.to_local(), mesh["ep"].get_local_rank(), mesh["edp"].get_local_rank()

    for local, ep, edp in simulate_ranks(8, shards):
        assert torch.equal(local, full[2 * ep : 2 * ep + 2, 3 * edp : 3 * edp + 3])


def test_simulated_failure_names_the_rank_and_frees_the_others() -> None:
    threads = threading.active_count()
    start = time.monotonic()
    with pytest.raises(KeyError, match="raised by simulated rank 2 of 4"):
        simulate_ranks(4, fail_on, 2)
    assert time.monotonic() - start < 5
    assert threading.active_count() == threads
    assert simulate_ranks(4, summed, 0) == [6] * 4


def test_simulated_failure_frees_ranks_that_form_a_group() -> None:
    def form() -> None:
        if dist.get_rank() == 1:
            raise KeyError("before the mesh")
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))

    threads = threading.active_count()
    start = time.monotonic()
    with pytest.raises(KeyError, match="simulated rank 1"):
        simulate_ranks(4, form)
    assert time.monotonic() - start < 5
    assert threading.active_count() == threads


def test_simulated_failure_stops_ranks_that_compute() -> None:
    def compute() -> None:
        if dist.get_rank() == 0:
            raise KeyError("enough")
        while True:
            time.sleep(0.01)

    threads = threading.active_count()
    with pytest.raises(KeyError, match="simulated rank 0"):
        simulate_ranks(2, compute)
    assert threading.active_count() == threads


def test_simulated_deadlock_names_the_stuck_ranks() -> None:
    threads = threading.active_count()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 3 still run") as caught:
        simulate_ranks(3, desert, timeout=0.5)
    assert "in desert" in str(caught.value)
    assert threading.active_count() == threads
    assert simulate_ranks(3, summed, 0) == [3] * 3


def test_simulation_restores_what_it_switched() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulate_ranks(2, summed, 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)
    with pytest.raises(RuntimeError, match="does not nest"):
        simulate_ranks(2, lambda: simulate_ranks(2, identity))


@pytest.mark.parametrize("make", [lambda: simulate_ranks(0, identity), lambda: RankPool(0)])
def test_world_size_zero_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"num_ranks \(0\)"):
        make()


# ---- processes -----------------------------------------------------------------------------------


def die(bad: int, how: str) -> None:
    if dist.get_rank() == bad:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def stop_on(bad: int) -> None:
    if dist.get_rank() == bad:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def raise_unpicklable() -> None:
    raise UnpicklableError("two", "arguments")


def return_unpicklable() -> object:
    return lambda: None


def environment() -> tuple[str | None, str | None, int]:
    return os.environ.get("MARK"), os.environ.get("GLOO_SOCKET_IFNAME"), torch.get_num_threads()


def test_pool_computes(ranks4: RankPool) -> None:
    assert ranks4.run(identity) == [(rank, 4) for rank in range(4)]
    assert ranks4.run(summed, 10) == [46] * 4
    check_uneven_exchange(ranks4.run(uneven_exchange))
    for gradient in ranks4.run(sharded_gradient):
        torch.testing.assert_close(gradient, single_gradient(), rtol=1e-12, atol=1e-12)


def test_pool_keeps_its_processes_until_it_is_renewed(ranks2: RankPool) -> None:
    first = ranks2.run(os.getpid)
    assert len({os.getpid(), *first}) == 3
    assert ranks2.run(os.getpid) == first
    ranks2.renew()
    assert not set(first) & set(ranks2.run(os.getpid))


def test_pool_forms_a_new_group_when_a_call_left_the_old_one(ranks2: RankPool) -> None:
    ranks2.run(dist.destroy_process_group)
    assert ranks2.run(summed, 1) == [3, 3]


def test_failure_names_the_rank_and_the_pool_recovers(ranks2: RankPool) -> None:
    before = ranks2.run(os.getpid)
    with pytest.raises(KeyError, match=r"raised by rank 1 of 2:\n[^$]*in fail_on"):
        ranks2.run(fail_on, 1)
    assert not set(before) & set(ranks2.run(os.getpid))
    assert ranks2.run(summed, 0) == [1, 1]


@pytest.mark.parametrize(("how", "cause"), [("exit", "exit code 3"), ("kill", "killed by SIGKILL")])
def test_death_is_reported_by_rank_and_cause(ranks2: RankPool, how: str, cause: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank 1: {cause}"):
        ranks2.run(die, 1, how)
    assert time.monotonic() - start < 10
    assert ranks2.run(summed, 0) == [1, 1]


def test_death_between_calls_is_reported(ranks2: RankPool) -> None:
    os.kill(ranks2.run(os.getpid)[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 0: killed by SIGKILL"):
        ranks2.run(summed, 0)
    assert ranks2.run(summed, 0) == [1, 1]


def test_deadlock_names_the_stuck_ranks(ranks2: RankPool) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 still run") as caught:
        ranks2.run(desert, timeout=2)
    assert "in desert" in str(caught.value)
    assert ranks2.run(summed, 0) == [1, 1]


def test_stopped_rank_is_named(ranks2: RankPool) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\]:\n  no answer: stopped"):
        ranks2.run(stop_on, 1, timeout=2)
    assert ranks2.run(summed, 0) == [1, 1]


def test_what_cannot_be_pickled_is_an_error_with_its_rank(ranks2: RankPool) -> None:
    with pytest.raises(
        RuntimeError, match=r"UnpicklableError: two arguments\nraised by rank \d of 2"
    ):
        ranks2.run(raise_unpicklable)
    with pytest.raises(Exception, match=r"raised by rank \d of 2"):
        ranks2.run(return_unpicklable)
    with pytest.raises(Exception, match=r"lambda"):
        ranks2.run(lambda: None)
    assert ranks2.run(summed, 0) == [1, 1]


def test_ranks_have_the_callers_environment_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "here")
    with RankPool(2) as pool:
        results, pids = pool.run(environment), pool.run(os.getpid)
    for mark, interface, num_threads in results:
        assert (mark, num_threads) == ("here", 1)
        assert interface in ("lo", "lo0")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_run_ranks() -> None:
    assert run_ranks(3, summed, 1) == [6] * 3
    with pytest.raises(KeyError, match="raised by rank 0 of 2"):
        run_ranks(2, fail_on, 0)
