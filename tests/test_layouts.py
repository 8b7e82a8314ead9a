"""Documents in sequences: whole ones, packed, and what the model sees of them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import SMALL_RUN

from moetrain import settings
from moetrain.build import build_model
from moetrain.config import DataConfig
from moetrain.data import Prepared, Samples, prepare
from moetrain.data.layouts import Whole, pack
from moetrain.data.shards import open_offsets, open_tokens
from moetrain.loss import IGNORED
from moetrain.model import Transformer

ROOM = 24


@given(st.lists(st.integers(1, ROOM), min_size=1, max_size=60))
def test_every_document_lies_in_one_row_and_no_two_rows_would_fit_into_one(
    lengths: list[int],
) -> None:
    rows = pack(np.array(lengths), ROOM)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[document] for document in row) for row in rows)
    assert filled[-1] <= ROOM
    assert len(rows) == 1 or filled[0] + filled[1] > ROOM


def test_best_fit_is_what_it_says() -> None:
    # 9 opens a row, 7 another, 3 goes where 3 are left, 1 where least are, 4 needs a new one
    assert pack(np.array([4, 1, 7, 9, 3]), 10) == [[3, 1], [2, 4], [0]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    chance = np.random.default_rng(2)
    rows = ["".join(map(chr, chance.integers(97, 123, n))) for n in chance.integers(1, 45, 40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = DataConfig(source=str(folder / "rows.jsonl"), eval_fraction=0.2, cache=folder / "cache")
    return prepare(data)


def documents(prepared: Prepared) -> list[list[int]]:
    """The tokens of every training document, its end of text included."""
    tokens = open_tokens(prepared.directory, prepared.manifest, "train")
    offsets = open_offsets(prepared.directory, prepared.manifest, "train")
    offsets = offsets.read(0, len(offsets)).tolist()
    return [tokens.read(a, b).tolist() for a, b in itertools.pairwise(offsets)]


def test_an_epoch_holds_every_document_once_and_shortens_the_long_ones(prepared: Prepared) -> None:
    samples = Samples(prepared, "train", 32, 0, False, "whole")
    batch = samples.batch(range(len(samples)))
    seen = []
    for row in range(len(samples)):
        assert batch.document_BL is not None
        numbers = batch.document_BL[row]
        assert torch.equal(batch.valid_BL[row], numbers > 0)
        assert torch.equal(batch.valid_BL[row], batch.targets_BL[row] != IGNORED)
        for number in numbers[numbers > 0].unique_consecutive().tolist():
            mine = numbers == number
            inputs, targets = batch.tokens_BL[row][mine], batch.targets_BL[row][mine]
            assert torch.equal(inputs[1:], targets[:-1])
            seen.append([*inputs.tolist(), int(targets[-1])])
    long = [document for document in documents(prepared) if len(document) > 33]
    assert long
    assert sorted(seen) == sorted(document[:33] for document in documents(prepared))
    assert samples.num_shortened == len(long)


def test_a_document_of_one_token_is_a_stretch_of_one() -> None:
    layout = Whole(np.array([0, 2, 5]), 8)
    assert [layout.stretches(0), len(layout)] == [[range(2, 4), range(0, 1)], 1]


def test_no_document_sees_another(prepared: Prepared) -> None:
    sections = {name: dict(SMALL_RUN[name]) for name in ("model", "moe")}
    sections["moe"] |= {"capacity_factor": None, "eval_capacity_factor": None}
    model = build_model(settings.resolve(None, sections), 257).to_empty(device="cpu").double()
    fill(model)
    samples = Samples(prepared, "train", 48, 0, False, "whole")
    batch = samples.batch(range(len(samples)))
    together = loss_of(model, batch.tokens_BL, batch.targets_BL, batch.valid_BL, batch.document_BL)
    alone = 0.0
    for document in documents(prepared):
        tokens_1L = torch.tensor([document[:49]])
        alone += loss_of(model, tokens_1L[:, :-1], tokens_1L[:, 1:], None, None)
    assert together == pytest.approx(alone, rel=1e-10)


def fill(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3, generator=generator)


@torch.no_grad()
def loss_of(
    model: Transformer,
    tokens_BL: torch.Tensor,
    targets_BL: torch.Tensor,
    valid_BL: torch.Tensor | None,
    document_BL: torch.Tensor | None,
) -> float:
    found = model(tokens_BL, targets_BL=targets_BL, valid_BL=valid_BL, document_BL=document_BL)
    assert found.loss_sum is not None
    return float(found.loss_sum)
