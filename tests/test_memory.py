"""Bytes per rank: by hand, against a real step on simulated ranks, and against a real pass."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import SMALL
from on_device import as_on_a_gpu
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from moetrain import engines, settings
from moetrain.activations import activations, kept_bytes
from moetrain.build import build_model
from moetrain.config import Config
from moetrain.engines.deepspeed import DeepSpeedEngine
from moetrain.engines.torch import TorchEngine
from moetrain.memory import memory
from moetrain.mesh import Mesh
from moetrain.moe import Draws
from moetrain.moe.keyed import step_key
from moetrain.spikes import FINITE
from moetrain.testing import RankPool, simulate_ranks

VOCAB = 257  # of the bytes tokenizer


def config(**sections: Any) -> Config:
    merged = {
        name: {**SMALL.get(name, {}), **sections.get(name, {})}
        for name in SMALL.keys() | sections.keys()
    }
    merged["train"] = {"global_batch": 16, "micro_batch": 2, **merged.get("train", {})}
    return settings.resolve(None, merged)


def bytes_of(made: Config, world: int) -> dict[str, int]:
    return dict(memory(made, build_model(made, VOCAB), VOCAB, world))


LARGE = {"dim": 1024, "layers": 3, "heads": 8, "tie_embeddings": False}


@pytest.mark.parametrize(("precision", "master", "compute"), [("fp32", 4, 4), ("bf16", 4, 2)])
@pytest.mark.parametrize(("world", "ep", "dp_replicate"), [(1, 1, 1), (8, 4, 1), (8, 2, 2)])
def test_memory_by_hand(precision, master, compute, world, ep, dp_replicate):
    made = config(
        model=LARGE,
        moe={"experts": 8, "expert_ffn_dim": 2048, "first_dense": 1},
        parallel={"ep": ep, "dp_replicate": dp_replicate},
        engine={"precision": precision},
        train={"global_batch": 64, "micro_batch": 8},
    )
    expert, router, outside = 3 * 1024 * 2048, 8 * 1024, 4 * 1024**2 + 2 * 1024
    dense = outside + 3 * 1024 * 24
    sparse = outside + router + 8 * expert
    ends, ranks = 2 * 257 * 1024 + 1024, world // dp_replicate
    rows = -(-257 // ranks)  # of the embedding and of the head, which do not divide
    shard = (dense + 2 * (sparse - router) + 1024) // ranks + 2 * rows * 1024 + 2 * router
    experts = 8 // ep * expert
    computed = outside + experts
    # One process takes eight micro-batches for a step, and keeps whole gradients from one to the
    # next; eight ranks take one each.
    whole = (ends + dense + 2 * computed) * (world == 1)
    found = bytes_of(made, world)
    assert found["weights"] == shard * master
    assert found["gradients"] == (shard + whole) * master
    assert found["Adam moments"] == 2 * shard * master
    assert found["gathered weights"] == (ends + dense + computed) * compute
    assert found["gradients under way"] == experts * (compute + master)
    assert found["logits"] == 8 * 8 * 257 * (compute + 4)


# ---------------------------------------------------------------- a real step


def whole_gradients(model: torch.nn.Module) -> int:
    """Bytes of gradients that FSDP2 keeps whole, until it reduces them."""
    total = 0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            for parameter in group.fsdp_params if group else ():
                found = parameter.unsharded_accumulated_grad
                if found is None and hasattr(parameter, "_unsharded_param"):
                    found = parameter.unsharded_param.grad
                total += 0 if found is None else storage(found).nbytes()
    return total


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the memory under some tensors, each once: gradients that are reduced together share it."""
    found = {storage(tensor).data_ptr(): storage(tensor).nbytes() for tensor in tensors}
    return sum(found.values())


def held_bytes(made: Config) -> dict[str, int]:
    """What one rank really holds in the two micro-batches of a step and after it."""
    mesh = Mesh(torch.device("cpu"), made.parallel.ep, made.parallel.dp_replicate)
    engine = engines.build(made, build_model(made, VOCAB), mesh)
    assert isinstance(engine, TorchEngine)
    tokens_BL = torch.arange(made.train.micro_batch * made.data.seq_len).view(-1, made.data.seq_len)
    for last in (False, True):
        output = engine.model(tokens_BL, targets_BL=tokens_BL, mode="train")
        engine.backward(output.loss_sum + sum(s.balance_sum for s in output.layers), last)
        if not last:
            whole = whole_gradients(engine.model)
    gradients = [w.grad for w in engine.weights.values() if w.grad is not None]
    assert len(gradients) == len(engine.weights)
    found = {"gradients": local_bytes(gradients) + whole}
    engine.step(1e-3, FINITE)
    state = [engine.optimizer.state[weight] for weight in engine.weights.values()]
    moments = [entry[name] for entry in state for name in ("exp_avg", "exp_avg_sq")]
    weights = [weight.detach() for weight in engine.weights.values()]
    return found | {"weights": local_bytes(weights), "Adam moments": local_bytes(moments)}


@pytest.mark.parametrize(
    ("world", "ep", "dp_replicate", "precision"),
    [
        (1, 1, 1, "fp32"),
        (1, 1, 1, "bf16"),
        (2, 2, 1, "fp64"),
        (4, 1, 1, "fp32"),
        (4, 2, 1, "bf16"),
        (8, 2, 2, "fp32"),
    ],
)
def test_ranks_hold_what_is_estimated(world, ep, dp_replicate, precision):
    made = config(
        model={"kv_heads": 2, "qk_norm": "full", "tie_embeddings": False, "vocab_size": 262},
        moe={"router": "sigmoid", "first_dense": 1, "shared_experts": 1, "shared_gate": "sigmoid"},
        parallel={"ep": ep, "dp_replicate": dp_replicate},
        engine={"precision": precision},
        train={"global_batch": 4 * world},  # two micro-batches
    )
    ranks = simulate_ranks(world, held_bytes, made)
    expected = bytes_of(made, world)
    for name, held in ranks[0].items():
        assert held == expected[name], name
        assert max(found[name] for found in ranks) == held
    logical = sum(w.numel() for w in build_model(made, VOCAB).parameters())
    itemsize = 8 if precision == "fp64" else 4
    assert sum(found["weights"] for found in ranks) >= logical * itemsize * dp_replicate


def gradient_bytes(engine: DeepSpeedEngine) -> int:
    """Those of weights and those that are reduced, but not the copies that are being sent."""
    found = [w.grad for w in engine.weights.values() if w.grad is not None]
    if (zero := engine.zero) is None:
        return local_bytes(found)
    sent = {storage(part).data_ptr() for b in zero.ipg_buckets.values() for part in b.buffer}
    found = [gradient for gradient in found if storage(gradient).data_ptr() not in sent]
    averaged = [ours for ours in zero.averaged_gradients.values() if ours is not None]
    in_partition = [] if zero.grads_in_partition is None else [zero.grads_in_partition]
    return local_bytes([*found, *in_partition, *(tensor for ours in averaged for tensor in ours)])


def held_under_zero(made: Config) -> dict[str, int]:
    """The same under DeepSpeed, with the most gradients that are there at one time."""
    mesh = Mesh(torch.device("cpu"), made.parallel.ep)
    engine = engines.build(made, build_model(made, VOCAB), mesh)
    assert isinstance(engine, DeepSpeedEngine)
    zero, seen = engine.zero, [0]
    for weight in engine.weights.values():
        weight.register_hook(lambda _: seen.append(gradient_bytes(engine)))
    if zero is not None:
        copy = zero.copy_grads_in_partition

        def copied(*arguments: Any) -> None:
            copy(*arguments)
            seen.append(gradient_bytes(engine))

        zero.copy_grads_in_partition = copied
    tokens_BL = torch.arange(made.train.micro_batch * made.data.seq_len).view(-1, made.data.seq_len)
    steps = made.accumulation(mesh.world)
    for number in range(steps):
        output = engine.model(tokens_BL, targets_BL=tokens_BL, mode="train")
        loss = output.loss_sum + sum(s.balance_sum for s in output.layers)
        engine.backward(loss, last=number == steps - 1)
    reduced = gradient_bytes(engine)
    engine.step(1e-3, FINITE)
    weights = [weight.detach() for weight in engine.weights.values()]
    if zero is not None:
        weights += zero.single_partition_of_fp32_groups
    state = engine.optimizer.state.values()
    return {
        "weights": local_bytes(weights),
        "reduced": reduced,
        "gradients": max(reduced, *seen),
        "Adam moments": local_bytes(entry[n] for entry in state for n in ("exp_avg", "exp_avg_sq")),
    }


@pytest.mark.parametrize(
    ("stage", "ep", "accumulation"),
    [(0, 1, 1), (0, 2, 2), (1, 2, 1), (1, 2, 2), (1, 4, 1), (2, 1, 1), (2, 2, 2), (2, 4, 1)],
)
def test_ranks_hold_what_is_estimated_under_zero(
    ranks4: RankPool, tmp_path: Path, stage: int, ep: int, accumulation: int
) -> None:
    of_zero = tmp_path / "zero.json"  # many buckets, as a large model has
    of_zero.write_text('{"zero_optimization": {"reduce_bucket_size": 500}}')

    def made(stage: int) -> Config:
        return config(
            model={"qk_norm": "full", "tie_embeddings": False, "vocab_size": 263},
            moe={"first_dense": 1, "shared_experts": 1, "shared_gate": "sigmoid"},
            parallel={"ep": ep},
            engine={"kind": "deepspeed", "zero_stage": stage, "deepspeed_config": str(of_zero)},
            train={"global_batch": 8 * accumulation},
        )

    ranks, expected = ranks4.run(held_under_zero, made(stage)), bytes_of(made(stage), 4)
    most = {name: max(held[name] for held in ranks) for name in ranks[0]}
    assert most["weights"] == expected["weights"]
    assert most["Adam moments"] == expected["Adam moments"]
    # After the last micro-batch, a rank has what stage 2 leaves to it; before, also the weight
    # whose gradient is new, or all but a bucket that is being sent.
    assert most["reduced"] == bytes_of(made(2 if stage else 0), 4)["gradients"]
    assert most["gradients"] == pytest.approx(expected["gradients"], abs=263 * 16 * 4)


# ---------------------------------------------------------------- activations


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The memory under a tensor, a sharded one or one that still arrives."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    return tensor.untyped_storage()


@contextmanager
def collecting_new_alone() -> Iterator[None]:
    """The garbage collector knows only what is made inside: to walk over the rest takes long."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live() -> dict[int, torch.UntypedStorage]:
    """The memory under every tensor that the garbage collector knows."""
    gc.collect()
    objects = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    real = [t for t in objects if t.device.type == "cpu" and not isinstance(t, FakeTensor)]
    return {storage(tensor).data_ptr(): storage(tensor) for tensor in real}


@pytest.fixture(autouse=True)
def _layers_as_on_a_gpu() -> Iterator[None]:
    """Of which the estimate is: experts that a CPU computes keep less."""
    with as_on_a_gpu():
        yield


@collecting_new_alone()
def saved_bytes(made: Config) -> int:
    """What a real forward pass of one rank keeps besides the weights, for the backward pass."""
    mesh = Mesh(torch.device("cpu"), made.parallel.ep, nodes=made.parallel.nodes_apart)
    model = engines.build(made, build_model(made, VOCAB), mesh).model
    recompute = made.engine.activation_checkpointing
    tokens_BL = torch.randint(
        0,
        VOCAB,
        (made.train.micro_batch, made.data.seq_len),
        generator=torch.Generator().manual_seed(mesh.rank),
    )
    draws = Draws(step_key(0, 1), torch.arange(tokens_BL.numel()))
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = storage(tensor)
        kept[memory.data_ptr()] = memory  # holds it, so that no other gets its address
        return tensor

    before = {} if recompute == "none" else live()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens_BL, targets_BL=tokens_BL, mode="train", draws=draws)
    if recompute != "none":  # which keeps things where hooks do not see them
        dist.barrier()  # of what was sent, nothing is held any longer
        returned = {storage(leaf).data_ptr() for leaf in tree_leaves(output) if leaf is not None}
        found = live()
        kept |= {at: found[at] for at in found.keys() - before.keys() - returned}
    weights = {storage(weight).data_ptr() for weight in model.parameters()}
    return sum(memory.nbytes() for at, memory in kept.items() if at not in weights)


def saved_bytes_of_process(made: Config) -> int:
    """The same in a process that no fixture has prepared."""
    with as_on_a_gpu():
        return saved_bytes(made)


ROOM = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 96}


@pytest.mark.parametrize(
    "sections",
    [
        {"moe": {"experts": 0}},
        {"moe": {"capacity_factor": 1.25}},
        {"moe": {"capacity_factor": None}},
        {
            "moe": {"router": "gshard", "shared_experts": 1, "every": 2},
            "model": {"qk_norm": "head"},
        },
        {"moe": {"router": "switch", "top_k": 1, "jitter": 0.01}},
        {"moe": {"router": "noisy_topk", "drop_policy": "spill"}},
        {"moe": {"router": "sigmoid", "drop_policy": "probability", "expert_groups": 2}},
        {"moe": {"router": "expert_choice", "allow_noncausal": True}},
        {"moe": {"router": "hierarchical", "expert_groups": 4, "top_groups": 2}},
        {"moe": {"router": "hash", "shared_experts": 1, "shared_gate": "softmax"}},
        {"moe": {"router": "random", "drop_policy": "random"}},
        {"moe": {"router": "balanced"}},
        {"moe": {"router": "dense", "top_k": 8, "capacity_factor": None}},
        {"engine": {"precision": "bf16"}},
        {"parallel": {"ep": 4}},
        {"engine": {"activation_checkpointing": "full"}},
        {"engine": {"activation_checkpointing": "selective"}},
        {"engine": {"activation_checkpointing": "selective"}, "moe": {"shared_experts": 1}},
    ],
)
def test_the_estimate_of_activations_is_what_a_real_pass_keeps(sections):
    moe = {"experts": 8, "expert_ffn_dim": 48, **sections.get("moe", {})}
    made = config(
        model={**ROOM, **sections.get("model", {})},
        moe=moe,
        engine=sections.get("engine", {}),
        parallel=sections.get("parallel", {}),
        data={"seq_len": 64},
    )
    found = activations(made, VOCAB)
    estimate = found.outside + sum(found.blocks)
    for real in simulate_ranks(made.parallel.ep, saved_bytes, made):
        assert estimate == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "sections",
    [
        {"moe": {"every": 2}, "parallel": {"ep": 2}},
        {"moe": {"first_dense": 2, "shared_experts": 1}, "data": {"mask_documents": True}},
        {"moe": {"experts": 0}, "data": {"mask_documents": True}},
    ],
)
def test_one_block_of_each_kind_stands_for_all(sections, recompute):
    made = config(
        model={**ROOM, "layers": 6},
        moe=sections["moe"],
        data={"seq_len": 32, **sections.get("data", {})},
        parallel=sections.get("parallel", {}),
        engine={"precision": "bf16", "activation_checkpointing": recompute},
    )
    found = activations(made, VOCAB)
    model = build_model(made, VOCAB)
    assert [found.outside, *found.blocks] == kept_bytes(model, made, recompute)
    assert found.outside > 0 < min(found.blocks)
    assert (found.recomputed > 0) == (recompute != "none")


@pytest.mark.parametrize(
    ("recompute", "transport"),
    [
        ("none", {}),
        ("none", {"overlap_chunks": 2}),
        ("none", {"dispatch": "two_level", "nodes": 2}),
        ("none", {"dispatch": "all_gather"}),
        ("selective", {"overlap_chunks": 2}),
        ("selective", {"dispatch": "all_gather"}),
        ("full", {"dispatch": "two_level", "nodes": 2}),
        ("full", {"overlap_chunks": 2}),
    ],
)
def test_what_ranks_keep_however_rows_are_sent(
    ranks4: RankPool, recompute: str, transport: dict[str, Any]
) -> None:
    """In processes, because what lives in simulated ranks cannot be told apart."""
    made = config(
        model=ROOM,
        moe={"experts": 8, "expert_ffn_dim": 48},
        engine={"activation_checkpointing": recompute},
        parallel={"ep": 4, **transport},
        data={"seq_len": 64},
    )
    found = activations(made, VOCAB)
    for real in ranks4.run(saved_bytes_of_process, made):
        assert found.outside + sum(found.blocks) == pytest.approx(real, rel=0.01)
