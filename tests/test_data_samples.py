import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moetrain.config import DataConfig
from moetrain.data import Samples, prepare
from moetrain.data.order import permute
from moetrain.data.shards import open_offsets, open_tokens
from moetrain.errors import UserError
from moetrain.loss import IGNORED

EOS = 256


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    rows = ["".join(chr(c) for c in rng.integers(97, 123, n)) for n in rng.integers(1, 60, 40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return prepare(
        DataConfig(source=str(folder / "rows.jsonl"), eval_fraction=0.2, cache=folder / "cache")
    )


def stream(prepared, split):
    tokens = open_tokens(prepared.directory, prepared.manifest, split)
    return torch.from_numpy(tokens.read(0, len(tokens)))


def samples(prepared, split="train", seq_len=16, seed=3, mask_documents=False):
    return Samples(prepared, split, seq_len, seed, mask_documents)


def test_an_epoch_of_train_is_the_stream_cut_in_sequences(prepared):
    tokens = stream(prepared, "train")
    train = samples(prepared)
    assert len(train) == (len(tokens) - 1) // 16
    batch = train.batch(range(len(train)))
    order = permute(np.arange(len(train)), len(train), seed=3, epoch=0)
    for row, sample in enumerate(order):
        assert torch.equal(batch.tokens_BL[row], tokens[16 * sample : 16 * sample + 16])
        assert torch.equal(batch.targets_BL[row], tokens[16 * sample + 1 : 16 * sample + 17])
    assert sorted(order) == list(range(len(train)))
    assert batch.valid_BL.all()
    assert batch.document_BL is None
    kinds = [x.dtype for x in batch[:4]]
    assert kinds == [torch.int64, torch.int64, torch.bool, torch.int64]


def test_token_ids_count_on_over_epochs_and_are_all_different(prepared):
    train = samples(prepared)
    first, second = train.batch(range(len(train))), train.batch(range(len(train), 2 * len(train)))
    ids = torch.cat([first.token_id_BL, second.token_id_BL]).flatten()
    assert torch.equal(ids, torch.arange(2 * len(train) * 16))
    assert not torch.equal(first.tokens_BL, second.tokens_BL)
    assert sorted(first.tokens_BL.tolist()) == sorted(second.tokens_BL.tolist())


def test_batches_do_not_depend_on_how_they_are_asked_for(prepared):
    whole = samples(prepared, mask_documents=True).batch(range(20, 36))
    fresh = samples(prepared, mask_documents=True)
    parts = [fresh.batch(range(begin, begin + 4)) for begin in (32, 28, 24, 20)][::-1]
    for name, values in whole._asdict().items():
        assert torch.equal(values, torch.cat([getattr(part, name) for part in parts])), name


def test_eval_comes_in_order_and_ends_in_padding(prepared):
    tokens = stream(prepared, "eval")
    seq_len = 16
    assert (len(tokens) - 1) % seq_len, "the last sample should be short"
    held_out = samples(prepared, "eval", seq_len)
    assert len(held_out) == -(-(len(tokens) - 1) // seq_len)
    batch = held_out.batch(range(len(held_out)))
    assert torch.equal(batch.tokens_BL[batch.valid_BL], tokens[:-1])
    assert torch.equal(batch.targets_BL[batch.valid_BL], tokens[1:])
    assert torch.equal(batch.valid_BL, batch.targets_BL != IGNORED)
    assert (batch.tokens_BL[~batch.valid_BL] == EOS).all()
    assert batch.valid_BL[:-1].all()
    assert torch.equal(batch.token_id_BL.flatten(), torch.arange(batch.tokens_BL.numel()))


def test_eval_that_fills_its_last_sequence_has_no_padding(prepared):
    num_targets = len(stream(prepared, "eval")) - 1
    held_out = samples(prepared, "eval", seq_len=num_targets)
    assert len(held_out) == 1
    assert held_out.batch([0]).valid_BL.all()


def test_eval_shorter_than_a_sequence_is_one_padded_sample(prepared):
    tokens = stream(prepared, "eval")
    batch = samples(prepared, "eval", seq_len=len(tokens) + 5).batch([0])
    assert batch.valid_BL.sum() == len(tokens) - 1


@pytest.mark.parametrize("split", ["train", "eval"])
def test_minus_one_is_a_row_of_padding(prepared, split):
    reader = samples(prepared, split, mask_documents=True)
    batch, alone = reader.batch([2, -1, 0]), reader.batch([2, 0])
    assert not batch.valid_BL[1].any()
    assert (batch.targets_BL[1] == IGNORED).all()
    assert (batch.tokens_BL[1] == EOS).all()
    assert (batch.token_id_BL[1] == 0).all()
    for with_padding, without in zip(batch, alone, strict=True):
        assert torch.equal(with_padding[[0, 2]], without)


def test_an_eval_index_past_the_end_is_a_mistake(prepared):
    held_out = samples(prepared, "eval")
    with pytest.raises(AssertionError):
        held_out.batch([len(held_out)])


def test_documents_are_numbered_inside_each_sequence(prepared):
    train = samples(prepared, mask_documents=True)
    batch = train.batch(range(len(train)))
    assert batch.document_BL is not None
    is_end_BL = batch.tokens_BL == EOS  # the end of text belongs to the document it ends
    expected_BL = is_end_BL.cumsum(1) - is_end_BL.long()
    first_B1 = batch.document_BL[:, :1]
    assert torch.equal(batch.document_BL - first_B1, expected_BL)
    assert first_B1.min() == 1  # 0 is for padding
    assert expected_BL.max() > 1


def test_the_first_token_of_a_document_is_a_target(prepared):
    tokens = stream(prepared, "eval")
    offsets = open_offsets(prepared.directory, prepared.manifest, "eval").read(0, 2)
    batch = samples(prepared, "eval", seq_len=64, mask_documents=True).batch([0])
    begin = int(offsets[1])
    assert batch.targets_BL[0, begin - 1] == tokens[begin]
    assert batch.document_BL[0, begin - 1 : begin + 1].tolist() == [1, 2]


def test_too_few_tokens_name_both_numbers(prepared):
    num_tokens = prepared.manifest.train.tokens
    assert len(samples(prepared, seq_len=num_tokens - 1)) == 1
    message = (
        rf"data\.seq_len \({num_tokens}\) needs {num_tokens + 1} tokens, and the training part of "
        rf"data\.source \('.*rows\.jsonl'\) has {num_tokens}; "
        rf"set data\.seq_len to at most {num_tokens - 1}"
    )
    with pytest.raises(UserError, match=message):
        samples(prepared, seq_len=num_tokens)


def test_damage_is_found_by_the_batch_that_reads_it(prepared, tmp_path):
    name = prepared.manifest.train.token_files[0].name
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in prepared.directory.iterdir():
        content = bytearray(path.read_bytes())
        if path.name == name:
            content[40] ^= 0x10
        (copy / path.name).write_bytes(content)
    damaged = Samples(replace(prepared, directory=copy), "train", 16, 0, False)
    with pytest.raises(UserError, match=rf"{name}: the checksum of bytes 0 to \d+ is wrong"):
        damaged.batch([0])
