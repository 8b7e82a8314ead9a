"""Evaluation: the same number on every layout, deterministic, and padded where samples run out."""

from __future__ import annotations

import math
import shutil
from functools import partial

import pytest
import torch
from models import initialised, small_config
from runs import save_model, write_text

from moetrain import checkpoint, cli, settings
from moetrain.build import build_model
from moetrain.config import Config, DataConfig
from moetrain.data import Prepared, Samples, prepare
from moetrain.evaluate import evaluate, nats_per_byte
from moetrain.mesh import Mesh, process_group
from moetrain.objective import Means
from moetrain.parallel import parallelize
from moetrain.testing import simulate_ranks

VOCAB = 257


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("evaluate")
    write_text(folder / "text")
    return DataConfig(
        source=str(folder / "text"), cache=folder / "cache", seq_len=32, eval_fraction=0.05
    )


@pytest.fixture(scope="module")
def prepared(data) -> Prepared:
    return prepare(data)


def configured(data: DataConfig, ep: int = 1, micro_batch: int = 4, **moe) -> Config:
    return small_config(
        moe={"experts": 4, "router": "gshard", "eval_capacity_factor": 0.75, **moe},
        parallel={"ep": ep},
        engine={"precision": "fp64"},
        data=data.model_dump(),
        train={"micro_batch": micro_batch, "global_batch": 64},
    )


def mean(config: Config, prepared: Prepared, sequences: int, dp_replicate: int = 1) -> Means:
    """Evaluate the initial model, as one of the ranks."""
    mesh = Mesh(torch.device("cpu"), config.parallel.ep, dp_replicate)
    model = parallelize(build_model(config, VOCAB), mesh, "fp64", seed=0)
    samples = Samples(prepared, "eval", 32, seed=0, mask_documents=config.data.mask_documents)
    return evaluate(model, samples, sequences, config, mesh)


def on_ranks(world: int, *args, **options) -> Means:
    results = simulate_ranks(world, partial(mean, *args, **options))
    assert all(result[:3] == results[0][:3] for result in results)
    return results[0]


def assert_same(one: Means, other: Means) -> None:
    """All but the slots, which rows of padding have, too."""
    assert one[:3] == pytest.approx(other[:3], rel=1e-12)
    for ours, theirs in zip(one.ledgers, other.ledgers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


@pytest.mark.parametrize(
    ("sequences", "factor"), [(1, 0.75), (10, 0.75), (10_000, 0.75), (9, None)]
)
def test_every_layout_gives_the_same_means_and_ledgers(data, prepared, sequences, factor):
    one = on_ranks(1, configured(data, eval_capacity_factor=factor), prepared, sequences)
    for world, ep, micro_batch, dp_replicate in [(1, 1, 64, 1), (2, 2, 3, 1), (4, 2, 2, 2)]:
        config = configured(data, ep, micro_batch, eval_capacity_factor=factor)
        assert_same(on_ranks(world, config, prepared, sequences, dp_replicate=dp_replicate), one)
    tokens = int(one.ledgers[0].tokens)
    held_out = prepared.manifest.eval.tokens - 1
    assert tokens == (held_out if sequences == 10_000 else sequences * 32)
    dropped = sum(int(ledger.outcome_EKO[..., 2].sum()) for ledger in one.ledgers)
    assert (dropped == 0) == (factor is None)


def test_the_mean_is_over_targets_and_not_over_batches(data, prepared):
    """The last sample is short: its tokens weigh as much as any other."""
    config = configured(data, eval_capacity_factor=None)
    means = on_ranks(1, config, prepared, 10_000)
    model = initialised(config, vocab_size=VOCAB)
    samples = Samples(prepared, "eval", 32, seed=0, mask_documents=False)
    total, targets = 0.0, 0
    for index in range(len(samples)):
        batch = samples.batch([index])
        length = int(batch.valid_BL.sum())
        with torch.no_grad():
            logits_BLV = model(batch.tokens_BL[:, :length]).logits_BLV
        assert logits_BLV is not None
        chosen = logits_BLV.log_softmax(-1)[0].gather(1, batch.targets_BL[0, :length, None])
        total, targets = total - chosen.sum().item(), targets + length
    assert length < 32
    assert targets == prepared.manifest.eval.tokens - 1
    assert means.loss == pytest.approx(total / targets, rel=1e-10)


# Each gate with all that it draws in training.
GATES = {
    "switch": {"top_k": 1, "jitter": 0.2, "drop_policy": "random"},
    "gshard": {"drop_policy": "probability"},
    "topk": {"drop_policy": "spill"},
    "noisy_topk": {},
    "sigmoid": {"expert_groups": 2, "drop_policy": "random"},
    "expert_choice": {"allow_noncausal": True},
    "hash": {},
    "random": {"drop_policy": "random"},
    "balanced": {"drop_policy": "spill"},
    "dense": {"top_k": 4, "drop_policy": "probability"},
    "hierarchical": {"expert_groups": 2, "top_groups": 2},
}


def identical(one: Means, other: Means) -> bool:
    """Losses in every bit, and ledgers."""
    books = zip(one.ledgers, other.ledgers, strict=True)
    return one[:3] == other[:3] and all(
        torch.equal(ours, theirs)
        for book, its in books
        for ours, theirs in zip(book, its, strict=True)
    )


@pytest.mark.parametrize("router", GATES)
def test_twice_is_the_same_and_nothing_is_drawn_at_random(data, prepared, router):
    """The seed of draws plays no part, nor does torch's own generator; gshard keeps every second
    expert, and policy `random` goes by position."""
    config = configured(data, router=router, **GATES[router])
    torch.manual_seed(0)
    first = on_ranks(1, config, prepared, 10)
    torch.manual_seed(1)
    assert identical(first, on_ranks(1, config.model_copy(update={"seed": 5}), prepared, 10))
    assert first.ledgers[0].outcome_EKO[..., 3].sum() == 0
    if GATES[router].get("drop_policy") == "random":
        moe = config.moe.model_copy(update={"drop_policy": "position"})
        assert identical(first, on_ranks(1, config.model_copy(update={"moe": moe}), prepared, 10))
    assert_same(
        on_ranks(2, configured(data, 2, 3, router=router, **GATES[router]), prepared, 10), first
    )


def test_nothing_is_kept_for_a_backward_pass(data, prepared):
    def work() -> None:
        config = configured(data)
        mesh = Mesh(torch.device("cpu"))
        model = parallelize(build_model(config, VOCAB), mesh, "fp64", seed=0)
        samples = Samples(prepared, "eval", 32, seed=0, mask_documents=False)
        saved: list[torch.Size] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor
        )
        with hooks:
            evaluate(model, samples, 4, config, mesh)
        assert saved == []

    simulate_ranks(1, work)


def test_masked_documents_change_the_loss_and_not_the_counts(data, prepared):
    masked = data.model_copy(update={"mask_documents": True})
    sizes = [on_ranks(1, configured(d), prepared, 10_000) for d in (data, masked)]
    assert sizes[0].loss != sizes[1].loss
    assert sizes[0].ledgers[0].tokens == sizes[1].ledgers[0].tokens


def test_nats_per_byte_by_hand(data, prepared):
    manifest = prepared.manifest
    assert nats_per_byte(2.0, manifest, data) * manifest.eval.bytes == 2.0 * manifest.eval.tokens


# ---------------------------------------------------------------- from a checkpoint


@pytest.fixture(scope="module")
def uniform_run(data, tmp_path_factory):
    """A run whose model finds every token equally likely."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        config = small_config(data=data.model_dump(), model={"tie_embeddings": False})
        model = initialised(config, torch.float32, vocab_size=VOCAB)
        assert model.head is not None
        torch.nn.init.zeros_(model.head.weight)
        run = tmp_path_factory.mktemp("run")
        save_model(run, config, model, prepare(data).manifest.fingerprint)
        yield run


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(
    uniform_run, data, prepared, capsys
):
    assert cli.main(["eval", str(uniform_run), "--sequences", "5"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"step-00000001 on held-out text: {math.log(257):.4f} nats per token"
    per_byte = nats_per_byte(math.log(257), prepared.manifest, data)
    assert second.startswith(f"  {per_byte:.4f} nats per byte (unigram model ")
    assert third.endswith("% of assignments dropped (capacity factor 2.0)")


def test_training_text_has_no_references(uniform_run, capsys):
    assert cli.main(["eval", str(uniform_run), "--split", "train", "--sequences", "5"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"step-00000001 on training text: {math.log(257):.4f} nats per token"
    assert "dropped" in second


@pytest.mark.parametrize(
    ("moe", "ending"), [({"eval_capacity_factor": None}, "(dropless)"), ({"experts": 0}, ")")]
)
def test_dropless_and_dense_models_say_so(data, tmp_path, capsys, monkeypatch, moe, ending):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = small_config(data=data.model_dump(), moe=moe)
    model = initialised(config, torch.float32, vocab_size=VOCAB)
    save_model(tmp_path, config, model, prepare(data).manifest.fingerprint)
    assert cli.main(["eval", str(tmp_path), "--sequences", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(ending)
    assert len(lines) == (2 if moe == {"experts": 0} else 3)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": "other"}, "data.tokenizer (bytes) is no longer the one that"),
        ({"order": {"data": "other"}}, "is no longer the text that"),
    ],
)
def test_another_tokenizer_or_text_than_the_models_is_refused(
    uniform_run, tmp_path, capsys, changed, message
):
    shutil.copytree(uniform_run, tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run")
    assert path is not None
    manifest = checkpoint.read_manifest(path)
    model = initialised(settings.resolve(None, manifest.extra["config"]), torch.float32, VOCAB)
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    with process_group():
        checkpoint.save(tmp_path / "run", 2, tensors, {**manifest.extra, **changed})
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert "step-00000002" in complaint
