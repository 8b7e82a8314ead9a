import json

import numpy as np
import pytest

from moetrain.data import shards
from moetrain.data.shards import (
    BlockArray,
    BlockWriter,
    Manifest,
    SplitWriter,
    open_offsets,
    open_tokens,
    read_manifest,
    token_dtype,
    verify,
    write_manifest,
)
from moetrain.errors import UserError

VOCAB, EOS = 1000, 999


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)  # 32 tokens of two bytes


def write_set(folder, documents, vocab_size=VOCAB):
    """A set whose files hold 96 tokens of two bytes at most; eval holds the first document."""
    splits = {}
    for split, chosen in (("train", documents), ("eval", documents[:1])):
        writer = SplitWriter(folder, split, vocab_size, EOS, shard_bytes=192)
        for ids in chosen:
            writer.add(np.asarray(ids), num_bytes=3 * len(ids))
        splits[split] = writer.close()
    manifest = Manifest(
        source="test",
        tokenizer="test",
        vocab_size=vocab_size,
        eos_id=EOS,
        dtype=token_dtype(vocab_size),
        byte_entropy={"unigram": 1.0, "bigram": 0.5},
        **splits,
    )
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, EOS, size=n) for n in (5, 1, 200, 40, 64)]


@pytest.fixture
def written(tmp_path, documents):
    return tmp_path, write_set(tmp_path, documents)


def packed(documents):
    return np.concatenate([np.append(ids, EOS) for ids in documents])


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_what_is_written_is_read(written, documents):
    folder, manifest = written
    assert read_manifest(folder) == manifest
    tokens = open_tokens(folder, manifest, "train")
    expected = packed(documents)
    assert len(tokens) == manifest.train.tokens == len(expected) == 315
    np.testing.assert_array_equal(tokens.read(0, len(tokens)), expected)
    np.testing.assert_array_equal(open_tokens(folder, manifest, "eval").read(0, 6), expected[:6])
    assert manifest.train.documents == 5
    assert manifest.train.bytes == 3 * 310
    assert [entry.bytes for entry in manifest.train.token_files] == [192, 192, 192, 54]
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "eval-tokens-00000.bin", "eval-offsets-00000.bin",
        "train-offsets-00000.bin", *(f"train-tokens-0000{i}.bin" for i in range(4)),
    }  # fmt: skip
    verify(folder)


def test_offsets_are_where_documents_begin(written, documents):
    folder, manifest = written
    offsets = open_offsets(folder, manifest, "train").read(0, 6)
    assert offsets.tolist() == [0, 6, 8, 209, 250, 315]
    tokens = open_tokens(folder, manifest, "train")
    for begin, end, ids in zip(offsets[:-1], offsets[1:], documents, strict=True):
        np.testing.assert_array_equal(tokens.read(begin, end), np.append(ids, EOS))


def test_any_range_crosses_file_borders(written, documents):
    folder, manifest = written
    expected = packed(documents)
    for start, stop in [(0, 0), (95, 97), (90, 300), (96, 192), (191, 315), (314, 315), (315, 315)]:
        values = open_tokens(folder, manifest, "train").read(start, stop)
        np.testing.assert_array_equal(values, expected[start:stop])
        assert values.dtype == np.int64


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 192, 193, 1000])
def test_writing_in_bits_gives_the_same_files(tmp_path, size):
    content = bytes(i % 251 for i in range(size))
    for name, step in (("whole", 1000), ("bits", 7)):
        (tmp_path / name).mkdir()
        writer = BlockWriter(tmp_path / name, "x", file_bytes=192)
        for begin in range(0, size, step):
            writer.write(content[begin : begin + step])
        entries = writer.close()
        files = [(tmp_path / name / entry.name).read_bytes() for entry in entries]
        assert b"".join(files) == content
        assert all(len(file) == entry.bytes for file, entry in zip(files, entries, strict=True))
    assert len(files) == -(-size // 192)
    assert [p.name for p in tmp_path.glob("whole/*")] == [p.name for p in tmp_path.glob("bits/*")]


def test_wide_vocabularies_take_four_bytes(tmp_path):
    assert (token_dtype(1 << 16), token_dtype((1 << 16) + 1)) == ("<u2", "<u4")
    manifest = write_set(tmp_path, [[70_000, 3], [1 << 17]], vocab_size=200_000)
    tokens = open_tokens(tmp_path, manifest, "train")
    assert tokens.read(0, 5).tolist() == [70_000, 3, EOS, 1 << 17, EOS]


@pytest.mark.parametrize(("offset", "block"), [(0, 0), (63, 0), (64, 1), (191, 2)])
def test_one_flipped_bit_names_file_and_block_when_it_is_read(written, offset, block):
    folder, _ = written
    flip(folder / "train-tokens-00001.bin", offset)
    message = rf"train-tokens-00001\.bin: the checksum of bytes {64 * block} to {64 * block + 64} "
    tokens = open_tokens(folder, read_manifest(folder), "train")
    tokens.read(0, 96)  # the other files are whole
    tokens.read(192, 315)
    begin = 96 + 32 * block
    with pytest.raises(UserError, match=message + r"is wrong; delete .* to prepare it again"):
        tokens.read(begin, begin + 1)
    with pytest.raises(UserError, match=message):  # and again: it is not remembered as good
        tokens.read(begin, begin + 1)
    with pytest.raises(UserError, match=message):
        verify(folder)


def test_a_flipped_bit_in_the_boundaries_is_found(written):
    folder, manifest = written
    flip(folder / "train-offsets-00000.bin", 17)
    with pytest.raises(UserError, match=r"train-offsets-00000\.bin: the checksum of bytes 0 to 48"):
        open_offsets(folder, manifest, "train").read(0, 6)


@pytest.mark.parametrize("size", [0, 1, 53, 55])
def test_a_file_of_another_size_is_refused_on_opening(written, size):
    folder, manifest = written
    path = folder / "train-tokens-00003.bin"
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    message = rf"train-tokens-00003\.bin: it ends at byte {size}, not at 54"
    with pytest.raises(UserError, match=message):
        read_manifest(folder)
    with pytest.raises(UserError, match=message):
        open_tokens(folder, manifest, "train")


def test_a_missing_file_is_refused_on_opening(written):
    folder, _ = written
    (folder / "eval-tokens-00000.bin").unlink()
    with pytest.raises(UserError, match=r"eval-tokens-00000\.bin: the file is missing"):
        read_manifest(folder)


@pytest.mark.parametrize("damage", [lambda text: text[:-30], lambda text: "", lambda text: "{}"])
def test_a_damaged_manifest_is_refused(written, damage):
    folder, _ = written
    path = folder / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"damaged: .*manifest\.json: .*; delete .* to prepare it"):
        read_manifest(folder)


def test_an_id_past_the_vocabulary_is_named_with_its_offset(written):
    folder, _ = written
    path = folder / "manifest.json"  # whole files, but of a larger vocabulary
    values = BlockArray(folder, read_manifest(folder).train.token_files, "<u2").read(0, 315)
    vocab_size = int(values.max())  # the end-of-text id is now one too large; first at token 5
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": vocab_size}))
    message = (
        rf"train-tokens-00000\.bin: token id {EOS} at byte 10 is not in the vocabulary of {EOS}"
    )
    with pytest.raises(UserError, match=message):
        open_tokens(folder, read_manifest(folder), "train").read(0, 1)


def test_an_id_past_the_vocabulary_is_not_written(tmp_path):
    writer = SplitWriter(tmp_path, "train", VOCAB, EOS)
    writer.add(np.array([1]), num_bytes=1)
    with pytest.raises(UserError, match="yields id 1000 in train document 1; its vocabulary has 1"):
        writer.add(np.array([5, 1000, 3]), num_bytes=3)


def test_documents_without_tokens_are_left_out(tmp_path):
    writer = SplitWriter(tmp_path, "eval", VOCAB, EOS)
    writer.add(np.array([], dtype=np.int64), num_bytes=2)
    with pytest.raises(UserError, match="yields no token for any eval document"):
        writer.close()
    writer.add(np.array([4]), num_bytes=1)
    done = writer.close()
    assert (done.documents, done.tokens, done.bytes) == (1, 2, 1)


def test_the_fingerprint_is_that_of_the_tokens(tmp_path, documents):
    def fingerprint(name, chosen):
        (tmp_path / name).mkdir()
        return write_set(tmp_path / name, chosen).fingerprint

    first = fingerprint("a", documents)
    assert fingerprint("b", documents) == first
    assert fingerprint("c", documents[:-1]) != first
    joined = [documents[0], np.concatenate([documents[1], [EOS], documents[2]]), *documents[3:]]
    np.testing.assert_array_equal(packed(joined), packed(documents))
    assert fingerprint("d", joined) != first  # same tokens, other boundaries
