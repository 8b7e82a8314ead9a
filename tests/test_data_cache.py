import fcntl
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moetrain.config import DataConfig
from moetrain.data import cache, prepare, shards, train_bpe, verify
from moetrain.data.entropy import byte_entropy, count_pairs
from moetrain.data.shards import open_offsets, open_tokens
from moetrain.data.splits import HEAD, assign_splits
from moetrain.errors import UserError


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [f"document {i} says {i * i} — naïve" for i in range(50)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def config(source, tmp_path, **settings):
    return DataConfig(source=str(source), cache=tmp_path / "cache", **settings)


def read_documents(prepared, split):
    tokens = open_tokens(prepared.directory, prepared.manifest, split)
    offsets = open_offsets(prepared.directory, prepared.manifest, split)
    bounds = offsets.read(0, len(offsets))
    documents = [tokens.read(a, b) for a, b in pairwise(bounds)]
    assert all(ids[-1] == prepared.manifest.eos_id for ids in documents)
    return [prepared.tokenizer.decode(ids) for ids in documents]


def sets(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("bpe", [False, True])
def test_every_document_is_in_one_split_and_comes_back(rows, tmp_path, bpe):
    path, texts = rows
    tokenizer = "bytes"
    if bpe:
        tokenizer = str(tmp_path / "tokenizer.json")
        train_bpe(texts, 300, tmp_path / "tokenizer.json")
    prepared = prepare(config(path, tmp_path, tokenizer=tokenizer, eval_fraction=0.2))
    train, held_out = read_documents(prepared, "train"), read_documents(prepared, "eval")
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in the order of the source
    manifest = prepared.manifest
    assert 3 <= manifest.eval.documents <= 20
    assert manifest.train.documents == len(train)
    assert manifest.train.bytes == sum(len(text.encode()) for text in train)
    assert manifest.eval.bytes == sum(len(text.encode()) for text in held_out)
    if not bpe:
        assert manifest.train.tokens == manifest.train.bytes + len(train)
        assert (manifest.vocab_size, manifest.eos_id, manifest.dtype) == (257, 256, "<u2")
    verify(prepared.directory)


def test_stdlib_is_prepared_and_found_again(tmp_path):
    first = prepare(DataConfig(cache=tmp_path))
    built = first.directory.stat().st_ino
    assert prepare(DataConfig(cache=tmp_path)).manifest == first.manifest
    assert first.directory.stat().st_ino == built
    assert first.manifest.train.tokens > 5_000_000
    entropy = first.manifest.byte_entropy
    assert 1.5 < entropy["bigram"] < entropy["unigram"] < 4


def test_the_cache_follows_content_and_settings(rows, tmp_path):
    path, texts = rows
    first = prepare(config(path, tmp_path))
    moved = tmp_path / "moved.jsonl"
    path.rename(moved)
    assert prepare(config(moved, tmp_path)).directory == first.directory
    assert prepare(config(moved, tmp_path, seq_len=7)).directory == first.directory
    with moved.open("a") as file:
        file.write('{"text": "one more"}\n')
    others = [
        prepare(config(moved, tmp_path)),
        prepare(config(moved, tmp_path, max_documents=9)),
        prepare(config(moved, tmp_path, eval_fraction=0.5)),
    ]
    train_bpe(texts, 270, tmp_path / "t.json")
    others.append(prepare(config(moved, tmp_path, tokenizer=str(tmp_path / "t.json"))))
    assert len({prepared.directory for prepared in [first, *others]}) == 5
    assert others[1].manifest.train.documents + others[1].manifest.eval.documents == 9


def test_where_the_cache_is(monkeypatch, rows, tmp_path):
    path, _ = rows
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    data = DataConfig(source=str(path))
    assert prepare(data).directory.parent == tmp_path / ".cache" / "moetrain"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(data).directory.parent == tmp_path / "xdg" / "moetrain"


def test_a_read_only_cache_serves_what_it_has(rows, tmp_path):
    path, _ = rows
    first = prepare(config(path, tmp_path))
    first.directory.with_suffix(".lock").unlink()
    assert prepare(config(path, tmp_path)).directory == first.directory
    assert not first.directory.with_suffix(".lock").exists()  # nothing was written


def test_a_cache_that_cannot_be_written_is_named(rows, tmp_path):
    path, _ = rows
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"data\.cache \(.*cache\) cannot be written"):
        prepare(config(path, tmp_path))


# --- which documents are held out -----------------------------------------------------------------


def test_a_document_stays_in_its_split_when_others_come():
    texts = [f"text {i}" for i in range(3000)]
    few, many = dict(assigned(texts[:1500], 0.1)), dict(assigned(texts, 0.1))
    assert all(many[text] == split for text, split in few.items())
    assert 0.08 < sum(split == "eval" for split in many.values()) / 3000 < 0.12
    assert dict(assigned(texts[::-1], 0.1)) == many


def assigned(texts, fraction):
    return [(text, split) for split, text in assign_splits(iter(texts), fraction, "texts")]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("num_texts", [2, 3, HEAD, HEAD + 50])
def test_both_splits_get_a_document(fraction, num_texts):
    found = assigned([f"text {i}" for i in range(num_texts)], fraction)
    assert [text for text, _ in found] == [f"text {i}" for i in range(num_texts)]
    assert {split for _, split in found} == {"train", "eval"}


def test_copies_stay_together():
    found = assigned(["a", "b", "b", "a", "b"] * 100, 1e-9)
    by_text = {text: {split for other, split in found if other == text} for text in "ab"}
    assert sorted(map(sorted, by_text.values())) == [["eval"], ["train"]]


@pytest.mark.parametrize(
    ("fraction", "train", "held_out"),
    [(0.3, "abcdefg", "hij"), (1e-6, "abcdefghi", "j"), (0.999, "a", "bcdefghij")],
)
def test_of_a_single_document_the_end_is_held_out(fraction, train, held_out):
    assert assigned(["abcdefghij"], fraction) == [(train, "train"), (held_out, "eval")]


# --- the figures to beat --------------------------------------------------------------------------


def test_entropy_of_a_corpus_small_enough_to_count_by_hand():
    train, held_out = count_pairs(["ab", "ab"]), count_pairs(["ab"])
    entropy = byte_entropy(train, held_out)
    # three symbols for two bytes; six seen: a, b and end twice each, of 257 kinds
    assert entropy["unigram"] == pytest.approx(-3 * np.log(3 / (6 + 257)) / 2)
    # end→a, a→b, b→end: each seen twice of two
    assert entropy["bigram"] == pytest.approx(-3 * np.log(3 / (2 + 257)) / 2)


def test_entropy_equals_a_literal_loop():
    train, held_out = ["hello wörld", "a", "low"], ["lower", "öl"]

    def symbols(texts):
        return [256] + [s for text in texts for s in [*text.encode(), 256]]

    pairs, singles = {}, {}
    for before, after in zip(symbols(train)[:-1], symbols(train)[1:], strict=True):
        pairs[before, after] = pairs.get((before, after), 0) + 1
        singles[after] = singles.get(after, 0) + 1
    total, unigram, bigram = 0, 0.0, 0.0
    for before, after in zip(symbols(held_out)[:-1], symbols(held_out)[1:], strict=True):
        seen = sum(count for (first, _), count in pairs.items() if first == before)
        unigram -= np.log((singles.get(after, 0) + 1) / (sum(singles.values()) + 257))
        bigram -= np.log((pairs.get((before, after), 0) + 1) / (seen + 257))
        total += after != 256
    found = byte_entropy(count_pairs(train), count_pairs(held_out))
    assert found["unigram"] == pytest.approx(unigram / total, rel=1e-12)
    assert found["bigram"] == pytest.approx(bigram / total, rel=1e-12)


# --- bad input ------------------------------------------------------------------------------------


def test_an_empty_file_is_no_text(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"data\.source \(.*empty\.txt.\) holds no text; training"):
        prepare(config(tmp_path / "empty.txt", tmp_path))
    assert sets(tmp_path / "cache") == []


def test_a_file_of_one_character_is_too_little(tmp_path):
    (tmp_path / "one.txt").write_text("é")
    with pytest.raises(UserError, match="holds a single character"):
        prepare(config(tmp_path / "one.txt", tmp_path))
    (tmp_path / "one.txt").write_text("éa")
    prepared = prepare(config(tmp_path / "one.txt", tmp_path))
    assert read_documents(prepared, "train") == ["é"]
    assert read_documents(prepared, "eval") == ["a"]


def test_copies_of_one_document_cannot_be_split(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "same"}\n' * 5)
    with pytest.raises(UserError, match="holds 5 copies of one document"):
        prepare(config(tmp_path / "rows.jsonl", tmp_path))


@pytest.mark.timeout(100)  # where time grew with the square, it would be hours
@pytest.mark.parametrize("kind", ["text", "jsonl", "bpe"])
def test_a_line_of_50_mb_is_no_trouble(tmp_path, kind):
    size = 10_000_000 if kind == "bpe" else 50_000_000  # that tokenizer is slower, linearly
    line = "x" * size
    path = tmp_path / ("big.jsonl" if kind == "jsonl" else "big.txt")
    path.write_text(f'{{"text": "{line}"}}\n' if kind == "jsonl" else line)
    tokenizer = "bytes"
    if kind == "bpe":
        train_bpe(["x y z" * 10], 257, tmp_path / "t.json")
        tokenizer = str(tmp_path / "t.json")
    manifest = prepare(config(path, tmp_path, tokenizer=tokenizer)).manifest
    assert manifest.train.bytes + manifest.eval.bytes == len(line)


def test_a_fault_in_the_middle_leaves_nothing_behind(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "cut')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3"):
        prepare(config(path, tmp_path))
    assert sets(tmp_path / "cache") == []


# --- other processes (forked: a fresh interpreter takes seconds to start) -------------------------

FORK = multiprocessing.get_context("fork")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_the_first_file():
    shards.os.fsync = die


def killed_at_the_manifest():
    cache.write_manifest = die


def killed_at_the_rename():
    Path.rename = die


def on_a_full_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


def start(data, fault=None):
    """Prepare in another process; returns it and the end that receives a fingerprint or error."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run():
        if fault:
            fault()
        try:
            sender.send(prepare(data).manifest.fingerprint)
        except UserError as error:
            sender.send(str(error))

    process = FORK.Process(target=run)
    process.start()
    sender.close()
    return process, receiver


@pytest.mark.parametrize(
    "fault", [killed_at_the_first_file, killed_at_the_manifest, killed_at_the_rename]
)
def test_what_a_killed_process_leaves_is_never_used(rows, tmp_path, fault):
    path, _ = rows
    process, _ = start(config(path, tmp_path), fault)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = sets(tmp_path / "cache")
    assert len(left) == 1
    assert left[0].endswith(".partial")
    prepared = prepare(config(path, tmp_path))
    assert sets(tmp_path / "cache") == [prepared.directory.name]
    verify(prepared.directory)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(rows, tmp_path):
    path, _ = rows
    process, receiver = start(config(path, tmp_path), on_a_full_disk)
    message = receiver.recv()
    process.join(60)
    assert re.fullmatch(r"data\.cache \(.*\) cannot be written: .*File too large.*", message)
    assert sets(tmp_path / "cache") == []


def test_processes_at_once_build_one_set(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(5000)))
    started = [start(config(path, tmp_path)) for _ in range(4)]
    fingerprints = {receiver.recv() for _, receiver in started}
    for process, _ in started:
        process.join(60)
    [name] = sets(tmp_path / "cache")
    built = (tmp_path / "cache" / name).stat().st_ino
    assert fingerprints == {prepare(config(path, tmp_path)).manifest.fingerprint}
    assert (tmp_path / "cache" / name).stat().st_ino == built


def test_a_waiting_process_says_so_and_takes_over(rows, tmp_path, capfd):
    path, _ = rows
    first = prepare(config(path, tmp_path))
    shutil.rmtree(first.directory)
    with first.directory.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process, receiver = start(config(path, tmp_path))
        said = ""
        while "waiting for another process to prepare the data" not in said:
            time.sleep(0.05)
            said += capfd.readouterr().err
        assert not receiver.poll(0.2)
        assert sets(tmp_path / "cache") == []
        fcntl.flock(held, fcntl.LOCK_UN)
    assert receiver.recv() == first.manifest.fingerprint
    process.join(60)


def test_lines_of_progress_where_there_is_no_terminal(rows, tmp_path, capfd, monkeypatch):
    path, _ = rows
    monkeypatch.setattr(cache, "LINE_SECONDS", -1.0)
    prepare(config(path, tmp_path))
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("preparing data: 50 documents, ")
    assert "\x1b" not in errors


def test_a_live_line_on_a_terminal(rows, tmp_path, capfd, monkeypatch):
    path, _ = rows
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    prepare(config(path, tmp_path))
    output, errors = capfd.readouterr()
    assert output == ""
    assert "50 documents, " in errors
    assert "\x1b[" in errors


def test_shared_folders_can_be_read_by_others(rows, tmp_path):
    path, _ = rows
    directory = prepare(config(path, tmp_path)).directory
    assert directory.stat().st_mode & 0o777 == 0o755
    assert all(Path(directory, name).stat().st_mode & 0o444 for name in os.listdir(directory))
