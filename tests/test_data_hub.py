import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from moetrain.data import hub
from moetrain.data.hub import fetch, hub_documents
from moetrain.data.tokenizer import load_tokenizer, train_bpe
from moetrain.errors import UserError


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder the library loads as it would a repository, and no cache of other runs."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [{"text": f"document {i}", "n": i} for i in range(4)] + [{"text": None, "n": 9}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def slept(monkeypatch):
    """Seconds the retries would have waited."""
    seconds = []
    monkeypatch.setattr(hub.time, "sleep", seconds.append)
    return seconds


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, num_failures, error):
        self.num_failures, self.error, self.num_calls = num_failures, error, 0

    def __call__(self, *_args, **_kwargs):
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise self.error
        return "answer"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_library_reads_the_column(texts, streaming):
    found = list(hub_documents(str(texts), None, "train", streaming, "text"))
    assert found == [f"document {i}" for i in range(4)] + [None]


@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_settings_are_told_what_there_is(texts, streaming):
    def failing(subset=None, split="train", field="text"):
        with pytest.raises(UserError) as caught:
            list(hub_documents(str(texts), subset, split, streaming, field))
        return str(caught.value)

    assert "data.field ('body')" in failing(field="body")
    assert "has only text, n" in failing(field="body")
    assert "data.split tset" in failing(split="tset")
    assert "['train']" in failing(split="tset")
    assert "data.subset en" in failing(subset="en")
    assert "Available: ['default']" in failing(subset="en")


def test_rows_that_break_off_are_reported(texts):
    with (texts / "train.jsonl").open("a") as file:
        file.write('{"text": "cut o')
    with pytest.raises(UserError, match=r"data\.source \(.*texts.* broke off while being read"):
        list(hub_documents(str(texts), None, "train", True, "text"))


def test_a_lost_connection_is_tried_again(slept):
    flaky = Flaky(2, ConnectionError("no route"))
    assert fetch(flaky, "data.source ('x')", "is nowhere", ()) == "answer"
    assert slept == [1.0, 3.0]


def test_tries_are_bounded(monkeypatch, slept):
    import datasets

    flaky = Flaky(99, ConnectionError("Couldn't reach the hub.\nmore"))
    monkeypatch.setattr(datasets, "load_dataset", flaky)
    with pytest.raises(UserError) as caught:
        list(hub_documents("someone/texts", None, "train", False, "text"))
    assert str(caught.value) == (
        "data.source ('someone/texts', data.subset null, data.split train) could not be loaded "
        "after 3 tries: Couldn't reach the hub; check the connection; there is no file or folder "
        "of that name"
    )
    assert (flaky.num_calls, slept) == (3, [1.0, 3.0])


def test_no_new_try_once_the_time_is_spent(monkeypatch, slept):
    monkeypatch.setattr(hub, "RETRY_BUDGET", -1.0)
    flaky = Flaky(99, TimeoutError("slow"))
    with pytest.raises(UserError, match="after 1 tries: slow"):
        fetch(flaky, "data.source ('x')", "is nowhere", ())
    assert slept == []


def test_what_does_not_exist_is_not_tried_again(monkeypatch, slept):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    flaky = Flaky(99, DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub."))
    monkeypatch.setattr(datasets, "load_dataset", flaky)
    with pytest.raises(UserError, match="is neither a file or folder here nor a dataset on the hu"):
        list(hub_documents("x", None, "train", False, "text"))
    assert (flaky.num_calls, slept) == (1, [])


def test_a_repository_without_tokenizer_is_not_tried_again(monkeypatch, slept):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    flaky = Flaky(99, EntryNotFoundError("404"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", flaky)
    with pytest.raises(UserError, match=r"\('someone/model'\) is neither 'bytes', nor a file here"):
        load_tokenizer("someone/model")
    assert (flaky.num_calls, slept) == (1, [])


def test_a_name_the_hub_would_refuse_is_told_why():
    with pytest.raises(UserError, match=r"data\.tokenizer \('not a name'\): "):
        load_tokenizer("not a name")


OFFLINE = """
import json
from moetrain.config import DataConfig
from moetrain.data import hub, load_tokenizer, open_source
from moetrain.errors import UserError

hub.RETRY_DELAYS = (0.01,)

def outcome(act):
    try:
        return act()
    except UserError as error:
        return str(error)

def read(source):
    return list(open_source(DataConfig(source=source)).documents())

acts = [
    lambda: read("someone/texts"),
    lambda: read("someone/gone"),
    lambda: read("someone/else"),
    lambda: load_tokenizer("someone/words").vocab_size,
    lambda: load_tokenizer("someone/gone").vocab_size,
    lambda: load_tokenizer("someone/else").vocab_size,
]
print(json.dumps([outcome(act) for act in acts]))
"""


@pytest.fixture
def home(texts, tmp_path):
    """A cache of the hub's library that holds someone/texts and someone/words."""
    import datasets

    home = tmp_path / "home"
    datasets.load_dataset(str(texts), cache_dir=str(home / "datasets"))
    (home / "datasets" / "texts").rename(home / "datasets" / "someone___texts")
    words = home / "hub" / "models--someone--words"
    (words / "refs").mkdir(parents=True)
    (words / "refs" / "main").write_text("0" * 40)
    train_bpe(["some text"], 260, words / "snapshots" / ("0" * 40) / "tokenizer.json")
    return home


def outcomes(home, **variables):
    """What a process of its own reads: texts of three names, then tokenizers, or its errors."""
    env = {**os.environ, "HF_HOME": str(home), **variables}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_offline_what_is_cached_works_and_the_rest_says_so(home):
    texts, *no_texts, vocab_size, no_words, _ = outcomes(home, HF_HUB_OFFLINE="1")
    assert texts == [f"document {i}" for i in range(4)]
    assert vocab_size == 260
    for missing in no_texts:
        assert "data.subset null, data.split train) could not be loaded after 2 tries" in missing
    assert no_words.startswith("data.tokenizer ('someone/gone') could not be loaded after 2 tries")


class Hub(BaseHTTPRequestHandler):
    """A hub whose connections break off, but for one name that it says it does not have."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        Hub.asked.append(self.path)
        if "someone/else" in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        self.close_connection = True

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        """Nothing."""


def test_of_a_hub_that_breaks_off_what_is_cached_works_and_tries_are_bounded(home):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = outcomes(home, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    texts, no_texts, not_there, vocab_size, no_words, no_such_words = found
    assert texts == [f"document {i}" for i in range(4)]
    assert vocab_size == 260
    assert "('someone/gone', data.subset null, data.split train) could not be loaded" in no_texts
    assert "('someone/gone') could not be loaded after 2 tries: Server disconn" in no_words
    for missing in (not_there, no_such_words):
        assert "('someone/else'" in missing
        assert " is neither " in missing
    tries = [path for path in Hub.asked if "someone/gone/resolve" in path]
    assert 4 <= len(tries) <= 40, "two of ours for each, and what the library adds"
