import gzip
import json
import os
import shutil
import socket
import sysconfig
from pathlib import Path

import pytest

from moetrain.config import DataConfig
from moetrain.data import corpus
from moetrain.data.corpus import open_source
from moetrain.errors import UserError


def documents(source, **settings):
    return list(open_source(DataConfig(source=str(source), **settings)).documents())


def fingerprint(source, **settings):
    return open_source(DataConfig(source=str(source), **settings)).fingerprint


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, **columns):
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


def test_stdlib_is_a_corpus_on_every_machine():
    texts = documents("stdlib")
    assert len(texts) > 500
    assert sum(map(len, texts)) > 5_000_000
    assert any(text.startswith("The standard type hierarchy\n") for text in texts)
    assert documents("stdlib", max_documents=3) == texts[:3]


def test_stdlib_is_known_by_content_wherever_it_is_installed(tmp_path, monkeypatch):
    here = Path(sysconfig.get_path("stdlib"))
    for name in ("abc.py", "json/decoder.py", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(here / name, tmp_path / name)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "x.py").write_text("not part of it")
    (tmp_path / "_sysconfigdata_x.py").write_text(str(tmp_path))
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    texts = documents("stdlib")
    assert texts[:3] == [
        (here / name).read_text() for name in ("LICENSE.txt", "abc.py", "json/decoder.py")
    ]
    first = fingerprint("stdlib")
    moved = tmp_path.with_name("elsewhere")
    tmp_path.rename(moved)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(moved))
    assert fingerprint("stdlib") == first
    (moved / "abc.py").write_text("changed")
    assert fingerprint("stdlib") != first


def test_folder_file_and_glob(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "d.txt").write_text("no")
    assert documents(tmp_path) == ["one", "two", "three"]
    assert documents(tmp_path / "b.txt") == ["two"]
    assert documents(tmp_path / "*.txt") == ["two"]
    assert documents(tmp_path / "**" / "*.txt") == ["two", "three"]
    assert documents(tmp_path, max_documents=2) == ["one", "two"]


def test_a_name_is_no_pattern_and_line_breaks_are_one_character(tmp_path):
    folder = tmp_path / "__a[1]*"
    folder.mkdir()
    (folder / "b [2]?#%20.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (folder / "b 2x#%20.txt").write_text("four")
    assert documents(folder) == ["four", "one\ntwo\nthree\n"]


def test_local_text_needs_no_network(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    write_jsonl(tmp_path / "b.jsonl", {"text": "there"})
    write_parquet(tmp_path / "c.parquet", text=["elsewhere"])
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where) or [])
    assert documents(tmp_path) == ["here", "there", "elsewhere"]
    assert asked == []


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/notes.txt") == ["mine"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_json_lines(tmp_path, suffix):
    content = '{"text": "é1", "n": 1}\n\n{"n": "x", "text": "two\\n"}\n{"text": null}\n{"text": ""}'
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(tmp_path / f"rows{suffix}", "wt", encoding="utf-8") as file:
        file.write(content)
    assert documents(tmp_path / f"rows{suffix}") == ["é1", "two\n"]


def test_parquet_and_its_column(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", body=["one", None, "", "two"], n=[1, 2, 3, 4])
    assert documents(path, field="body") == ["one", "two"]
    with pytest.raises(UserError, match=r"data\.field \('text'\): .*rows.parquet has only body, n"):
        documents(path)
    with pytest.raises(UserError, match=r"data\.field \('n'\) holds int, not text, in document 0"):
        documents(path, field="n")


def test_a_missing_json_column_names_line_and_columns(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", {"text": "a"}, {"body": "b", "id": 1})
    with pytest.raises(UserError, match=r"\('text'\): .*rows.jsonl, line 2, has only body, id"):
        documents(path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut o', r"must be one JSON object \(Unterminated string"),
        ("plain text", r"must be one JSON object \(Expecting value\)"),
        ('["text"]', "must be one JSON object, not list"),
        ("[" * 100_000, "must be one JSON object"),
        ('{"text": "\\ud800"}', "holds half a surrogate pair in 'text'"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl, line 2, {problem}"):
        documents(path)


@pytest.mark.parametrize(
    ("name", "content", "offset"),
    [
        ("a.txt", "é".encode() + b"b\xff", 3),
        ("a.txt", b"cut \xe2\x82", 4),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}\n', 25),
    ],
)
def test_invalid_utf8_names_file_and_byte(tmp_path, name, content, offset):
    (tmp_path / "0.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is not UTF-8 at byte {offset} .*convert it"):
        documents(tmp_path)


def test_invalid_utf8_in_parquet_is_named(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    bad = pyarrow.array([b"ok", b"\xff\xfe"]).view(pyarrow.string())
    write_table(pyarrow.table({"text": bad}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet is damaged: 'utf-8' codec"):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 is not enough PAR1"),
        ("a.txt.gz", b"not gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "long enough to be cut"}', mtime=0)[:-12]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}', mtime=0)[:10] + b"\xff\xff\xff\xff"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        documents(tmp_path)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("here")
    assert documents(tmp_path) == ["here"]
    source = open_source(DataConfig(source=str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: No such file or directory$"):
        list(source.documents())


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for source in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(UserError, match=r"(holds|matches) no file"):
            open_source(DataConfig(source=str(source)))


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "./none", "*.nope", "a/b/none"])
def test_missing_files_are_never_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "hub_documents", None)
    with pytest.raises(UserError, match=r"data\.source \('.*'\) does not exist"):
        open_source(DataConfig(source=name))


def test_other_names_are_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(corpus, "hub_documents", lambda *where: asked.append(where) or ["text"])
    settings = {"subset": "en", "split": "test", "streaming": True, "field": "body"}
    assert documents("someone/texts", **settings) == ["text"]
    assert asked == [("someone/texts", "en", "test", True, "body")]
    (tmp_path / "someone" / "texts").mkdir(parents=True)
    (tmp_path / "someone" / "texts" / "a.txt").write_text("on disk")
    assert documents("someone/texts") == ["on disk"]  # what exists is local


def test_fingerprint_follows_content_order_and_column(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", {"text": "x", "body": "z"})
        (tmp_path / folder / "b.txt").write_text("y")
    one, two = tmp_path / "one", tmp_path / "two"
    first = fingerprint(one)
    assert fingerprint(two) == first
    assert fingerprint(two, field="body") != first
    assert fingerprint(two / "b.txt", field="body") == fingerprint(two / "b.txt")  # no columns
    before = (two / "b.txt").stat()
    (two / "b.txt").write_text("Y")  # same size, same time, other content
    os.utime(two / "b.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(two) != first
    (one / "b.txt").rename(one / "0.txt")
    assert fingerprint(one) != first
