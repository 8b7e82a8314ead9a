"""Fine-tuning on conversations, by the shipped configuration: from a small run to an answer."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits, model_of, read_metrics, train, train_on, write_config

from moetrain import checkpoint, cli, generate, restore, settings
from moetrain.cli import main
from moetrain.data import load_chat, load_tokenizer
from moetrain.data.chat import as_document
from moetrain.data.splits import assign_splits
from moetrain.inherited import resolve_run

ROOT = Path(__file__).parents[1]
CONFIG, TEMPLATE = ROOT / "configs" / "finetune.yaml", ROOT / "configs" / "chat.jinja"


def talks() -> list[list[dict[str, str]]]:
    """Questions that repeat a word, and answers that say it once."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcde", k=3)) for _ in range(40)]
    return [
        [{"role": "user", "content": f"{word} {word}"}, {"role": "assistant", "content": word}]
        for word in words
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of bytes."""
    folder = tmp_path_factory.mktemp("start")
    assert (
        train(write_config(folder, moe={"router": "gshard", "first_dense": 0}), "--train.steps", 2)
        == 0
    )
    return folder / "runs" / "run"


def flags(start: Path, folder: Path, **other: object) -> list[str]:
    """For a short run; names of settings with `__` for the dot."""
    source = folder / "talks.jsonl"
    if not source.exists():
        rows = [json.dumps({"messages": talk}) + "\n" for talk in talks()]
        source.write_text("".join(rows))
    values: dict[str, Any] = {
        "init_from": start,
        "out": folder / "runs",
        "data__source": source,
        "data__cache": folder / "cache",
        "data__chat_template": TEMPLATE,
        "data__seq_len": 96,
        "train__steps": 6,
        "train__lr": 0.01,
        "train__warmup_steps": 1,
        "eval__every": 3,
        "eval__sequences": 4,
        "checkpoint__every": 3,
        "checkpoint__asynchronous": "false",
        "log__every": 1,
        **other,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return [
        str(word)
        for name, value in given.items()
        for word in (f"--{name.replace('__', '.').replace('_', '-')}", value)
    ]


@pytest.fixture(scope="module")
def tuned(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    assert train(CONFIG, *flags(start, folder)) == 0
    return folder / "runs" / "finetune"


def test_the_loss_falls_and_all_kinds_of_lines_are_there(tuned: Path) -> None:
    lines = read_metrics(tuned)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert all(line["eval_nats_per_byte"] is None for line in evaluations)


def test_padding_is_no_token(tuned: Path) -> None:
    last = [line["tokens"] for line in read_metrics(tuned) if "loss" in line][-1]
    assert 0 < last < 6 * 8 * 96
    for layer in read_metrics(tuned)[-2]["layers"]:
        assert layer["assigned"] < 2 * 8 * 96
        assert layer["dropped"] == 0


def test_the_first_loss_is_that_of_answers_by_themselves(start: Path, tmp_path: Path) -> None:
    """One step on an epoch, against the model on each conversation alone."""
    chat = load_chat(
        restore.find(start).config.data.model_copy(update={"chat_template": TEMPLATE}),
        load_tokenizer("bytes"),
    )
    documents = assign_splits(map(as_document, talks()), 0.05, "talks")
    total, count, model = 0.0, 0, model_of(start)
    trained = [chat.encode(text) for split, text in documents if split == "train"]
    for conversation in trained:
        ids = torch.tensor([*conversation.ids.tolist(), 256])
        with torch.no_grad():
            logits_LV = model(ids[None, :-1], mode="generate").logits_BLV[0].double()
        for place, token in enumerate(ids[1:].tolist()):
            assert conversation.in_loss is not None
            if conversation.in_loss[place + 1]:
                total -= float(logits_LV[place].log_softmax(0)[token])
                count += 1
    rows = _rows(trained, 96)
    sizes = {"train__steps": 1, "train__global_batch": rows, "train__micro_batch": rows}
    exact = {"moe__expert_dropout": 0, "moe__random_second": "false"}
    assert train(CONFIG, *flags(start, tmp_path, **exact, **sizes)) == 0
    (line,) = [x for x in read_metrics(tmp_path / "runs" / "finetune") if "loss" in x]
    assert line["loss"] == pytest.approx(total / count, rel=1e-5)


def _rows(trained: list[Any], room: int) -> int:
    """Sequences of an epoch, which no step of the test counts: all must be the same length."""
    length = max(len(one.ids) for one in trained)
    assert {len(one.ids) for one in trained} == {length}
    return -(-len(trained) // (room // length))


def resolved(words: list[str], folder: Path, **other: Any) -> Path:
    """The settings with what `init_from` brings along, as YAML."""
    command: Any = cli.parse(["train", str(CONFIG), *words])
    config = resolve_run(command.config, command.flags).model_copy(update=other)
    settings.save(config, folder / "resolved.yaml")
    return folder / "resolved.yaml"


def test_it_goes_on_as_if_it_had_not_stopped(
    start: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(start, tmp_path, name="again")
    half = ["--checkpoint.resume", tuned / "checkpoints" / "step-00000003"]
    assert train(CONFIG, *words, *half) == 2
    assert "both name a start" in capsys.readouterr().err
    assert train(resolved(words, tmp_path, init_from=None), *half) == 0
    again = checkpoint.resolve(tmp_path / "runs" / "again")
    assert_same_bits(again, checkpoint.resolve(tuned))


def test_ranks_see_what_one_process_sees(start: Path, tuned: Path, tmp_path: Path) -> None:
    words = flags(start, tmp_path, parallel__ep=2, train__micro_batch=2)
    run, _ = train_on(2, resolved(words, tmp_path))
    mine, theirs = (
        [line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (run, tuned)
    )
    assert mine == pytest.approx(theirs, rel=1e-5)


def test_it_answers(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is asked, and that its answer ends with its turn."""
    asked = []

    def continuations(_model: Any, prompt_BL: torch.Tensor, *_: Any) -> Iterator[torch.Tensor]:
        asked.append(bytes(prompt_BL[0].tolist()).decode())
        yield from torch.tensor([*b"yes", 256, *b"no"])[:, None]

    monkeypatch.setattr(generate, "continuations", continuations)
    assert main(["generate", str(tuned), "--prompt", "abc abc", "--chat"]) == 0
    assert asked == ["<|user|>\nabc abc\n<|assistant|>\n"]
    assert capsys.readouterr().out == "yes\n"


def test_another_conversation_is_evaluated_by_the_runs_template(
    start: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss and perplexity of answers, but nothing per byte; and one message where none is read."""
    flags(start, tmp_path)  # for its conversations
    chat = ["--data.format", "chat", "--data.field", "messages", "--data.cache", tmp_path / "cache"]
    words = ["eval", tuned, "--source", tmp_path / "talks.jsonl", *chat]
    assert main([str(word) for word in words]) == 0
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading == "step-00000006, dropless"
    tokens, nats, perplexity = row.split()[1:4]
    assert int(tokens) == sum(len(answer["content"]) + 3 for _, answer in talks())
    assert float(perplexity) == pytest.approx(math.exp(float(nats)), rel=1e-3)
    assert len(row.split()) == 6  # no bytes, but the drops
    long = [{"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "never read"}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": long}))
    words[3] = tmp_path / "long.jsonl"
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert "leaves out the end of 1 documents" in told
    assert "has no answer within data.seq_len (96)" in told


def test_a_run_that_goes_on_keeps_its_own_files(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies around where it is started again, by the same words."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(start, home / "base")
    (home / "base" / "generation_config.json").write_text("of the base")
    (home / "generation_config.json").write_text("of somebody else")
    monkeypatch.chdir(home)
    words = flags(Path("base"), tmp_path, train__steps=3)
    assert train(CONFIG, *words) == 0
    kept = tmp_path / "runs" / "finetune" / "generation_config.json"
    assert kept.read_text() == "of the base"
    words[words.index("--train.steps") + 1] = "4"
    assert train(CONFIG, *words) == 0
    assert kept.read_text() == "of the base"


def test_the_template_stays_with_the_model(tuned: Path, tmp_path: Path) -> None:
    assert (tuned / "chat_template.jinja").read_text() == TEMPLATE.read_text()
    kept = restore.find(tuned).config.data
    assert kept.chat_template == tuned / "chat_template.jinja"
    words = ["export", str(tuned), str(tmp_path / "out"), "--format", "mixtral", "--approximate"]
    assert main(words) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE.read_text()


def test_conversations_that_are_too_long_are_counted(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(CONFIG, *flags(start, tmp_path, train__steps=1, data__seq_len=16)) == 0
    told = capsys.readouterr().err
    assert "warning: data.seq_len (16) leaves out the end of 40 of 40 documents" in told


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--data.source", "stdlib"], "data.format (chat) needs conversations"),
        (
            ["--moe.expert-dropout", "1"],
            "moe.expert_dropout (1.0) must be less than or equal to 0.99",
        ),
        (["--train.freeze", "attention"], "invalid choice"),
    ],
)
def test_wrong_settings_are_told(
    more: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(CONFIG), *more]) == 2
    assert problem in capsys.readouterr().err
