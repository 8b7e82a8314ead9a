import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import tokenizer as module
from moetrain.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from moetrain.errors import UserError

TEXTS = ["the cat sat on the mat", "the dog sat on the log — naïve, 日本", "cat and dog"] * 5


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "deep" / "tokenizer.json"
    train_bpe(TEXTS, 280, path)
    return path


def encode(tokenizer, text):
    return tokenizer.encode_batch([text])[0].tolist()


def edited(path, out, **changes):
    content = json.loads(path.read_text())
    out.write_text(json.dumps(content | changes))
    return str(out)


def test_bytes_are_ids_and_the_end_of_text_is_256():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert encode(tokenizer, "aé\n") == [97, 0xC3, 0xA9, 10]
    assert encode(tokenizer, "") == []


def test_bytes_decode_what_a_model_may_emit():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([97, 0xC3, 256, 98]) == "a\ufffdb"  # half a character, end of text
    assert tokenizer.decode(np.array([104, 105])) == "hi"


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_any_text_survives_bytes_and_byte_level_bpe(bpe_path, text):
    for name in ("bytes", str(bpe_path)):
        tokenizer = load_tokenizer(name)
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_bpe_learns_merges_and_ends_texts(bpe_path):
    tokenizer = load_tokenizer(str(bpe_path))
    assert tokenizer.vocab_size == 280
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert len(encode(tokenizer, "the cat sat")) < len("the cat sat")


def test_a_spelled_out_end_of_text_is_plain_text(bpe_path):
    tokenizer = load_tokenizer(str(bpe_path))
    ids = encode(tokenizer, f"a{END_OF_TEXT}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_truncation_padding_and_templates_in_the_file_are_not_applied(bpe_path, tmp_path):
    eos = {"id": END_OF_TEXT, "type_id": 0}
    loud = edited(
        bpe_path,
        tmp_path / "loud.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": eos}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": ["x"]}},
        },
    )  # fmt: skip
    plain = load_tokenizer(str(bpe_path))
    assert encode(load_tokenizer(loud), TEXTS[0]) == encode(plain, TEXTS[0])


def test_training_twice_gives_the_same_file(bpe_path, tmp_path):
    train_bpe(TEXTS, 280, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == bpe_path.read_bytes()


def test_fingerprint_follows_content_not_path(bpe_path, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe_path.read_bytes())
    other = train_bpe(TEXTS, 270, tmp_path / "other.json")
    same = load_tokenizer(str(bpe_path)).fingerprint
    assert load_tokenizer(str(copy)).fingerprint == same
    assert load_tokenizer(str(bpe_path.parent)).fingerprint == same  # its folder
    assert other.fingerprint != same


def test_long_texts_go_in_pieces_and_come_back_whole(bpe_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_LENGTH", 8)
    tokenizer = load_tokenizer(str(bpe_path))
    for text in ("abc\n\ndef ghij k" * 3, "x" * 100, "\n" * 20, "é" * 9):
        pieces = list(module._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 8
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_vocabulary_reaches_past_gaps_in_the_ids(bpe_path, tmp_path):
    content = json.loads(bpe_path.read_text())
    added = [*content["added_tokens"], content["added_tokens"][0] | {"id": 500, "content": "<x>"}]
    content["model"]["vocab"]["<x>"] = 500
    tokenizer = load_tokenizer(
        edited(bpe_path, tmp_path / "gap.json", added_tokens=added, model=content["model"])
    )
    assert tokenizer.vocab_size == 501
    assert list(tokenizer.ids) == [*range(280), 500]


def test_no_end_of_text_is_an_error_that_names_the_tokens_there_are(bpe_path, tmp_path):
    token = json.loads(bpe_path.read_text())["added_tokens"][0]
    path = tmp_path / "none.json"
    content = bpe_path.read_text().replace(json.dumps(END_OF_TEXT), '"<start>"')
    path.write_text(content)
    assert token["content"] == END_OF_TEXT
    with pytest.raises(UserError, match=r"no special token that ends a text, only \['<start>'\]"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.json is no tokenizer\.json"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.json", "a/b/c"])
def test_a_missing_file_is_no_hub_name(name, monkeypatch):
    monkeypatch.setattr(module, "fetch", None)  # the hub must not be asked
    with pytest.raises(UserError, match="there is no file"):
        load_tokenizer(name)


def test_vocab_sizes_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size \(256\) must be at least 257"):
        train_bpe(TEXTS, 256, tmp_path / "t.json")
    with pytest.raises(UserError, match=r"vocab_size \(9000\) is more than .* try \d+"):
        train_bpe(TEXTS, 9000, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []
    assert train_bpe(TEXTS, 257, tmp_path / "t.json").vocab_size == 257
