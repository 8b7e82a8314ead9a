"""The model of lm-evaluation-harness on tasks of local files, against loops over the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from models import follower, initialised, small_config
from runs import save_model

from moetrain import lm_eval as moetrain_lm
from moetrain.cli import guarded
from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.generate import continuations, greedy
from moetrain.hf.exporting import export
from moetrain.lm_eval import RunLM
from moetrain.model import Transformer

LENGTH = 40
"""data.seq_len of the runs: some texts are longer."""
END = 256
CHOICES = [
    {"question": "one", "choices": ["two", "a much longer answer", "x"], "answer": 0},
    {"question": "a question that is longer than most ", "choices": ["é", "ü", "ab"], "answer": 2},
    {"question": "so long that it does not fit in " * 4, "choices": [" a", " b"], "answer": 1},
    {"question": "twice", "choices": ["same", "same"], "answer": 0},
]
PROMPTS = [
    {"prompt": "go on", "said": ""},
    {"prompt": "a longer prompt, of which the beginning is cut off", "said": ""},
]
TEXTS = [{"text": "short"}, {"text": "longer than what the model reads at once, " * 4}]
STOPS = ["e", "zz"]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choose": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "continue": (
        PROMPTS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{said}}",
            "generation_kwargs": {"until": STOPS, "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "read": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lm_eval")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """The tasks, as files that the library loads without a network."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, (rows, task) in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(data)}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, **task}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**task, "test_split": "test"}))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def made(**sections: Any) -> tuple[Config, Transformer]:
    """A small model, far from uniform, that drops much in training."""
    config = small_config(
        model={"dim": 16, "layers": 2, "heads": 2, "vocab_size": 264},
        moe={"experts": 4, "capacity_factor": 0.5, "eval_capacity_factor": 0.5},
        data={"seq_len": LENGTH},
        engine={"precision": "fp64"},
        **sections,
    )
    model = initialised(config, vocab_size=257)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    return config, model


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        save_model(folder / "run", *made())
    return folder / "run"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return made()[1]


def asked(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance("loglikelihood", {}, args, index) for index, args in enumerate(arguments)]


@torch.no_grad()
def literal(model: Transformer, context: list[int], scored: list[int]) -> tuple[float, bool]:
    """A pass for each token, of all that stands before it; nothing padded, nothing beside it."""
    total, is_greedy = 0.0, True
    ids = (context + scored)[-(LENGTH + 1) :]
    for place in range(len(ids) - len(scored), len(ids)):
        output = model(torch.tensor([ids[:place]]), mode="generate")
        assert output.logits_BLV is not None
        logits = output.logits_BLV[0, -1].tolist()
        total += logits[ids[place]] - math.log(sum(math.exp(x) for x in logits))
        is_greedy &= max(range(257), key=logits.__getitem__) == ids[place]
    return total, is_greedy


def literal_rolling(model: Transformer, text: str) -> float:
    """Every token once: windows of LENGTH, the last of them with context from before."""
    ids = [END, *text.encode()]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + LENGTH, len(ids))
        begin = max(0, end - 1 - LENGTH)
        total += literal(model, ids[begin:done], ids[done:end])[0]
        done = end
    return total


def evaluated(tasks: TaskManager, run: Path, names: list[str], **arguments: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model="moetrain",
        model_args={"path": str(run), **arguments},
        tasks=names,
        task_manager=tasks,
        bootstrap_iters=0,
        device="cuda:0",  # the default of its command line
    )
    assert found is not None
    return found


def test_tasks_score_what_loops_over_the_model_say(
    tasks: TaskManager, run: Path, model: Transformer
) -> None:
    found = evaluated(tasks, run, ["choose", "continue", "read"], batch_size=3)
    correct = 0
    for row, sample in zip(CHOICES, found["samples"]["choose"], strict=True):
        scores = []
        for choice, (answer,) in zip(row["choices"], sample["resps"], strict=True):
            context = row["question"].rstrip()  # spaces at its end belong to what is scored
            scored = f"{row['question']} {choice}"[len(context) :]
            expected = literal(model, list(context.encode()), list(scored.encode()))
            assert answer == (pytest.approx(expected[0], rel=1e-9), expected[1])
            scores.append(expected[0])
        correct += scores.index(max(scores)) == row["answer"]
    assert found["results"]["choose"]["acc,none"] == correct / len(CHOICES)
    nats = 0.0
    for row, sample in zip(TEXTS, found["samples"]["read"], strict=True):
        expected = literal_rolling(model, row["text"])
        assert sample["resps"][0][0] == pytest.approx(expected, rel=1e-9)
        nats -= expected
    size = sum(len(row["text"].encode()) for row in TEXTS)
    bits = found["results"]["read"]["bits_per_byte,none"]
    assert bits == pytest.approx(nats / size / math.log(2), rel=1e-9)
    for row, sample in zip(PROMPTS, found["samples"]["continue"], strict=True):
        assert sample["resps"][0][0] == literal_greedy(model, row["prompt"], 12, STOPS)


@torch.no_grad()
def literal_greedy(model: Transformer, prompt: str, count: int, stops: list[str]) -> str:
    """The likeliest token each time, from the whole text anew, cut before the first stop."""
    ids = list(prompt.encode())[-(LENGTH - count) :]
    start = len(ids)
    while len(ids) < start + count:
        output = model(torch.tensor([ids]), mode="generate")
        assert output.logits_BLV is not None
        token = int(output.logits_BLV[0, -1, :257].argmax())
        if token == END:
            break
        ids.append(token)
    text = bytes(ids[start:]).decode(errors="replace")
    return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]


# ---------------------------------------------------------------- loglikelihoods

PAIRS = [
    ("", "no context"),
    ("short", " and"),
    ("of quite another length than the others", " it is"),
    ("longer than what is read, " * 3 + "it", " ends"),
]


def test_no_answer_depends_on_the_batch(run: Path, model: Transformer) -> None:
    """Nor on the order; a text without context is one after the end of another."""
    expected = [
        literal(model, list(context.encode()) or [END], list(scored.encode()))
        for context, scored in PAIRS
    ]
    for batch_size in (1, 3, "4"):
        lm = RunLM(str(run), batch_size=batch_size)
        for pairs, wanted in ((PAIRS, expected), (PAIRS[::-1], expected[::-1])):
            answers = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
            assert [nats for nats, _ in answers] == pytest.approx([n for n, _ in wanted], rel=1e-10)
            assert [is_greedy for _, is_greedy in answers] == [g for _, g in wanted]


def test_a_context_of_white_space_is_no_context(run: Path, model: Transformer) -> None:
    """The harness moves it to what is scored, and nothing is left before that."""
    ((scored, _),) = RunLM(str(run)).loglikelihood(asked((" ", "ab")))
    assert scored == pytest.approx(literal(model, [END], list(b" ab"))[0], rel=1e-6)


def test_what_is_greedy_is_what_greedy_decoding_gives(run: Path, model: Transformer) -> None:
    prompt = list(b"go on")
    prompt_BL = torch.tensor([prompt])
    ids = [int(token_B) for token_B in continuations(model, prompt_BL, 5, greedy)]
    other = [*ids[:4], (ids[4] + 1) % 256]
    lm = RunLM(str(run), batch_size=2)
    answers = lm._loglikelihood_tokens([(("", ""), prompt, ids), (("", ""), prompt, other)], True)
    assert [is_greedy for _, is_greedy in answers] == [True, False]


@torch.no_grad()
def test_padding_and_neighbours_change_no_routing_and_nothing_is_dropped(
    run: Path, model: Transformer
) -> None:
    lm = RunLM(str(run), batch_size=len(PAIRS))
    seen: list[Any] = []
    lm._model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.layers))
    lm.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    rows = [
        torch.tensor([[*(list(context.encode()) or [END]), *scored.encode()][-LENGTH - 1 : -1]])
        for context, scored in PAIRS
    ]
    alone = [model(row, mode="generate").layers for row in rows]
    (together,) = seen
    for layer, stats in enumerate(together):
        outcomes = [layers[layer].ledger.outcome_EKO for layers in alone]
        assert torch.equal(stats.ledger.outcome_EKO, torch.stack(outcomes).sum(0))
        assert stats.ledger.outcome_EKO[..., 2].sum() == 0
    dropping = model(rows[-1], mode="eval").layers
    assert any(stats.ledger.outcome_EKO[..., 2].sum() > 0 for stats in dropping)


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_max_length_says_how_much_is_read(run: Path, model: Transformer, length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_lm_eval.LENGTH", length)
        text = "a text that is longer than seven tokens"
        lm = RunLM(str(run), max_length=length)
        (rolled,) = lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
        assert rolled == pytest.approx(literal_rolling(model, text), rel=1e-10)
        ((scored, _),) = lm.loglikelihood(asked((text, "e")), disable_tqdm=True)
        assert scored == pytest.approx(literal(model, list(text.encode()), list(b"e"))[0])


def test_a_model_of_hugging_face_made_of_it_answers_the_same(
    tasks: TaskManager, folder: Path
) -> None:
    config = small_config(
        model={"kv_heads": 2, "head_dim": 8}, moe={"experts": 4}, data={"seq_len": LENGTH}
    )
    save_model(folder / "for_hf", config, initialised(config, torch.float32, vocab_size=257))
    approximations = export(folder / "for_hf", folder / "hf", "mixtral", "fp32", approximate=True)
    assert all("capacity" in line for line in approximations)
    ours = evaluated(tasks, folder / "for_hf", ["choose", "read"], batch_size=2)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "hf"), "dtype": "float32"},
        tasks=["choose", "read"],
        task_manager=tasks,
        bootstrap_iters=0,
        device="cpu",
    )
    assert theirs is not None
    for name in ("choose", "read"):
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for answer, expected in zip(mine["resps"], other["resps"], strict=True):
                assert answer[0] == pytest.approx(expected[0], rel=1e-4)


# ---------------------------------------------------------------- continuations


@pytest.fixture(scope="module")
def successors(folder: Path) -> RunLM:
    """After each byte comes the one that follows it here, and else the end of text."""
    run = folder / "follower"
    save_model(run, *follower({ord(a): ord(b) for a, b in ("ab", "bc", "xy", "yx")}))
    return RunLM(str(run), max_length=20)


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ("a", {"until": []}, "bc"),  # and then the end of text
        ("a", {"until": ["c"]}, "b"),
        ("a", {"until": "bc"}, ""),
        ("c", {"until": [""]}, ""),
        ("x", {"until": [], "max_gen_toks": 4}, "yxyx"),
        ("x", {"until": ["xyx", "yxy"]}, ""),  # the first in the text, not in the list
        ("x", {"until": []}, "yxyxyxyxyx"),  # half of what is read
        ("c" * 30 + "x", {"until": [], "max_gen_toks": 19}, "yx" * 9 + "y"),
        ("a", {"until": [], "do_sample": True, "temperature": 1e-4, "top_k": 0}, "bc"),
        ("a", {"until": [], "do_sample": False, "temperature": 1e9, "num_beams": 1}, "bc"),
    ],
)
def test_text_ends_where_a_task_says(
    successors: RunLM, prompt: str, options: dict[str, Any], text: str
) -> None:
    assert successors.generate_until(asked((prompt, options)), disable_tqdm=True) == [text]


def test_samples_are_those_of_the_seed(successors: RunLM) -> None:
    hot = ("a", {"until": [], "do_sample": True, "temperature": 1e9, "top_p": 0.9})
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(successors.generate_until(asked(hot, hot), disable_tqdm=True))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "x"}, "pretrained is no argument of the model moetrain; it takes path"),
        ({"batch_size": "auto"}, r"batch_size \(auto\) must be a whole number above 0"),
        ({"max_length": 0}, r"max_length \(0\) must be a whole number above 0"),
        ({"max_length": -1}, r"max_length \(-1\) must be a whole number above 0"),
        ({"device": "gpu"}, r"device \(gpu\) is none: "),
    ],
)
def test_a_wrong_argument_is_refused(run: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunLM(str(run), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams is no way in which moetrain generates"),
        ({"penalty_alpha": 0.6}, "penalty_alpha is no way in which moetrain generates"),
        ({"max_gen_toks": 20}, r"max_gen_toks \(20\) leaves no room for a context within"),
    ],
)
def test_what_it_cannot_generate_is_refused(
    successors: RunLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        successors.generate_until(asked(("a", {"until": [], **options})), disable_tqdm=True)


def test_a_continuation_longer_than_what_is_read_is_refused(run: Path) -> None:
    lm = RunLM(str(run), max_length=3)
    with pytest.raises(UserError, match=r"max_length \(3\) is less than the 4 tokens of a cont"):
        lm.loglikelihood(asked(("a", "four")), disable_tqdm=True)


def test_a_model_whose_experts_choose_is_refused(folder: Path) -> None:
    config = small_config(moe={"router": "expert_choice", "allow_noncausal": True})
    save_model(folder / "choosing", config, initialised(config, torch.float32, vocab_size=257))
    with pytest.raises(UserError, match=r"moe\.router \(expert_choice\) of .* cannot generate"):
        RunLM(str(folder / "choosing"))


def test_several_ranks_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process; start it without torchrun"):
        RunLM(str(run))


# ---------------------------------------------------------------- the command line


def command_line(monkeypatch: pytest.MonkeyPatch, tasks: TaskManager, *flags: str) -> int:
    """`python -m moetrain.lm_eval run` in this process; returns its exit code."""
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # would outlive the test
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *_args, **_kwargs: tasks)
    args = ["run", "--model", "moetrain", "--tasks", "choose", *flags]
    monkeypatch.setattr("sys.argv", ["lm_eval", *args])
    return guarded(moetrain_lm.main)


def test_the_command_line_knows_the_model(
    tasks: TaskManager, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = f"path={run},max_length=30"
    assert command_line(monkeypatch, tasks, "--model_args", model, "--batch_size", "2") == 0
    assert "|choose|" in capsys.readouterr().out


def test_a_path_that_is_no_run_is_one_message(
    tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command_line(monkeypatch, tasks, "--model_args", f"path={tmp_path / 'none'}") == 2
    error = capsys.readouterr().err
    assert error.count("moetrain: error: ") == 1
    assert str(tmp_path / "none") in error
    assert "Traceback" not in error
