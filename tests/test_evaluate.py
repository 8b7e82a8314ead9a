"""Evaluation: the same number on every layout, deterministic, and padded where samples run out."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from functools import partial

import pytest
import torch
from models import initialised, small_config
from runs import save_model, write_text

from moetrain import checkpoint, cli, restore, settings
from moetrain.build import build_model
from moetrain.config import Config, DataConfig
from moetrain.data import WHOLE, Prepared, Samples, prepare, verify
from moetrain.evaluate import (
    COLUMNS,
    TOGETHER,
    Score,
    evaluate,
    nats_per_byte,
    perplexity,
    run_on,
    score,
)
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
    uniform = f"{math.log(257):.4f} nats per token (perplexity 257.00)"
    assert first == f"step-00000001 on held-out text: {uniform}"
    per_byte = nats_per_byte(math.log(257), prepared.manifest, data)
    assert second.startswith(f"  {per_byte:.4f} nats per byte (unigram model ")
    assert third.endswith("% of assignments dropped (capacity factor 2.0)")


def test_training_text_has_no_references(uniform_run, capsys):
    assert cli.main(["eval", str(uniform_run), "--split", "train", "--sequences", "5"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    uniform = f"{math.log(257):.4f} nats per token (perplexity 257.00)"
    assert first == f"step-00000001 on training text: {uniform}"
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


# ---------------------------------------------------------------- on other texts

TEXTS = {
    "short.txt": ["short"],
    "rows.jsonl": ["a row", "an ébauche\n" * 9, "x"],
    "one.txt": ["x"],
    "long.txt": ["all and nothing " * 20],
}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run in fp64 that drops, and a folder of texts."""
    folder = tmp_path_factory.mktemp("texts")
    for name, documents in TEXTS.items():
        rows = (json.dumps({"body": text}) + "\n" for text in documents)
        content = "".join(rows) if name.endswith("l") else documents[0]
        (folder / name).write_text(content, encoding="utf-8")
    config = configured(data, drop_policy="probability")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        run = folder / "run"
        model = initialised(config, vocab_size=VOCAB)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2)  # far from uniform
        save_model(run, config, model)
        yield run, folder, config, model


@torch.no_grad()
def literal_nats(model, documents: list[str]) -> tuple[float, int, int]:
    """Nats, tokens and bytes of a text, sequence by sequence and token by token."""
    ids = [token for text in documents for token in (*text.encode(), 256)]
    nats, targets = 0.0, 0
    for start in range(0, len(ids) - 1, 32):
        row = ids[start : start + 33]
        batch = torch.full((1, 32), 256)  # a group is as long as a sequence: padding takes no slot
        batch[0, : len(row) - 1] = torch.tensor(row[:-1])
        valid = torch.arange(32)[None] < len(row) - 1
        logits_LV = model(batch, valid_BL=valid, mode="eval").logits_BLV[0]
        for place, token in enumerate(row[1:]):
            nats += math.log(sum(math.exp(x) for x in logits_LV[place].tolist()))
            nats -= logits_LV[place, token].item()
            targets += 1
    return nats, targets, sum(len(text.encode()) for text in documents)


def scores_of(run, texts: list[DataConfig], sequences: int | None = None) -> list[list[str]]:
    """The rows of the table that an evaluation of some texts prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_on(run, texts, sequences)
    return [re.split(r"  +", line) for line in out.getvalue().splitlines()]


def test_perplexity_of_each_text_is_that_of_a_loop_over_its_tokens(trained, capsys):
    run, folder, _, model = trained
    files = [str(folder / name) for name in TEXTS]
    assert cli.main(["eval", str(run), "--data.field", "body", "--source", *files]) == 0
    title, heading, *lines = capsys.readouterr().out.splitlines()
    assert title == "step-00000001, capacity factor 0.75"
    assert re.split(r"  +", heading) == list(COLUMNS)
    found = {row[0]: row[1:] for row in (re.split(r"  +", line) for line in lines)}
    assert list(found) == [*files, TOGETHER]
    all_nats, all_tokens, all_bytes = 0.0, 0, 0.0
    for name, documents in TEXTS.items():
        nats, tokens, size = literal_nats(model, documents)
        count, per_token, ppl, per_byte, dropped = found[str(folder / name)]
        assert int(count) == tokens == sum(len(t.encode()) + 1 for t in documents) - 1
        assert per_token == f"{nats / tokens:.4f}"
        assert float(ppl) == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert per_byte == f"{nats / tokens * (tokens + 1) / size:.4f}"
        assert dropped.endswith(" %")
        all_nats, all_tokens = all_nats + nats, all_tokens + tokens
        all_bytes += size * tokens / (tokens + 1)
    assert found[TOGETHER][:4] == [
        str(all_tokens),
        f"{all_nats / all_tokens:.4f}",
        f"{math.exp(all_nats / all_tokens):#.5g}",
        f"{all_nats / all_bytes:.4f}",
    ]
    assert float(found[str(folder / "long.txt")][4].split()[0]) > 0


def test_every_layout_gives_the_same_scores(trained):
    run, folder, _, _ = trained
    texts = [DataConfig(source=str(folder / name), field="body") for name in TEXTS]

    def work(ep: int) -> list[Score]:
        return score(restore.find(run), texts, None, Mesh(torch.device("cpu"), ep))

    (alone,), several = simulate_ranks(1, work, 1), simulate_ranks(4, work, 2)
    for scores in several:
        for one, other in zip(scores, alone, strict=True):
            assert one[:3] == pytest.approx(other[:3], rel=1e-12)
            for ours, theirs in zip(one.ledgers, other.ledgers, strict=True):
                assert torch.equal(ours.outcome_EKO, theirs.outcome_EKO)


def test_sequences_bound_what_is_read_of_each_text(trained):
    run, folder, _, _ = trained
    texts = [DataConfig(source=str(folder / name)) for name in ("long.txt", "short.txt")]
    _, _, long, short, together = scores_of(run, texts, sequences=2)
    assert [long[1], short[1], together[1]] == ["64", "5", "69"]


def test_a_single_text_has_no_row_for_all(trained):
    run, folder, _, _ = trained
    assert len(scores_of(run, [DataConfig(source=str(folder / "short.txt"))])) == 3


def test_a_dense_model_has_no_drops_in_its_table(data, tmp_path):
    config = small_config(data=data.model_dump(), moe={"experts": 0})
    save_model(tmp_path / "run", config, initialised(config, torch.float32, vocab_size=VOCAB))
    title, heading, _ = scores_of(tmp_path / "run", [data])
    assert (title, heading) == (["step-00000001"], list(COLUMNS[:-1]))


def test_a_text_to_evaluate_on_is_held_out_whole(trained, data):
    _, folder, _, _ = trained
    text = DataConfig(source=str(folder / "rows.jsonl"), field="body", cache=data.cache)
    prepared = prepare(text.model_copy(update={"eval_fraction": WHOLE}))
    assert (prepared.manifest.eval.documents, prepared.manifest.train.documents) == (3, 0)
    verify(prepared.directory)
    assert prepared.directory != prepare(text).directory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt') does not exist, or matches no file; name a file"),
        ("empty.txt", "empty.txt') holds no text to evaluate on; name another"),
        ("rows.jsonl", "has only body"),
    ],
)
def test_a_source_without_text_is_one_message(trained, capsys, name, message):
    run, folder, _, _ = trained
    (folder / "empty.txt").touch()
    assert cli.main(["eval", str(run), "--source", str(folder / name)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1


def test_secrets_of_a_source_are_not_printed(trained, tmp_path, monkeypatch):
    run, _, _, _ = trained
    monkeypatch.setenv("SOME_TOKEN", "swordfish")
    (tmp_path / "swordfish.txt").write_text("text")
    assert scores_of(run, [DataConfig(source=str(tmp_path / "swordfish.txt"))])[2][0].endswith(
        "/***.txt"
    )


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (2.5, math.e**2.5), (800, math.inf)])
def test_perplexity(loss, expected):
    assert perplexity(loss) == pytest.approx(expected)


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
