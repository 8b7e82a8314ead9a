"""Command lines: what each command calls, with what, and what a wrong one says and returns."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from moetrain import cli
from moetrain.config import Config, DataConfig
from moetrain.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """Put recorders where the commands import their work from."""
    made = []

    def recorder(name, result=None):
        def record(*args, **kwargs):
            made.append((name, args, kwargs))
            return result

        return record

    documents = SimpleNamespace(documents=lambda: ["a document"])
    modules = {
        "train": {"run": 0},
        "check": {"report": "the report"},
        "evaluate": {"run": None, "run_on": None},
        "generate": {"run": None},
        "checkpoint.inspect": {"print_list": None, "print_checkpoint": None, "verify": 2},
        "checkpoint.diff": {"print_diff": 1},
        "convert": {"convert": None},
        "data": {
            "prepare": SimpleNamespace(directory="the folder"),
            "open_source": documents,
            "train_bpe": None,
        },
    }
    for module, functions in modules.items():
        fake = ModuleType(f"moetrain.{module}")
        for name, result in functions.items():
            setattr(fake, name, recorder(f"{module}.{name}", result))
        monkeypatch.setitem(sys.modules, f"moetrain.{module}", fake)
    return made


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: from-file\nmoe: {experts: 4}\n")
    return str(path)


# ---------------------------------------------------------------- what is called


def test_train_runs_the_resolved_config(calls, yaml_file, capsys):
    assert cli.main(["train", yaml_file, "--moe.top-k", "1", "--moe.renormalize", "false"]) == 0
    ((name, (config,), kwargs),) = calls
    assert (name, kwargs) == ("train.run", {})
    assert isinstance(config, Config)
    assert (config.name, config.moe.experts, config.moe.top_k) == ("from-file", 4, 1)
    assert capsys.readouterr() == ("", "")


def test_flags_may_stand_before_the_file(calls, yaml_file):
    assert cli.main(["train", "--moe.top-k", "1", yaml_file]) == 0
    assert calls[0][1][0].moe.top_k == 1


def test_train_returns_the_code_of_a_run_that_a_signal_stopped(calls, yaml_file, monkeypatch):
    monkeypatch.setattr(sys.modules["moetrain.train"], "run", lambda config: 75)
    assert cli.main(["train", yaml_file]) == 75


def test_train_checks_the_world_of_torchrun(calls, yaml_file, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["train", yaml_file, "--moe.expert-ffn-dim", "96", "--model.dim", "96"]) == 2
    assert calls == []
    assert capsys.readouterr().err == (
        "moetrain: error: train.global_batch (32) must be divisible by the world size (3); "
        "try 30 or 33\n"
    )


def test_train_warns_of_a_setting_without_effect(calls, yaml_file, capsys):
    assert cli.main(["train", yaml_file, "--moe.jitter", "0.1"]) == 0
    assert capsys.readouterr().err == (
        "moetrain: warning: moe.jitter (0.1) has no effect with moe.router topk; "
        "only switch reads it\n"
    )


def test_only_rank_0_warns(calls, yaml_file, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", yaml_file, "--moe.jitter", "0.1"]) == 0
    assert capsys.readouterr().err == ""


def test_check_prints_the_report_for_a_world_size(calls, yaml_file, capsys):
    assert cli.main(["check", yaml_file, "--world-size", "4", "--parallel.ep", "2"]) == 0
    ((name, (config, world_size), _),) = calls
    assert (name, config.parallel.ep, world_size) == ("check.report", 2, 4)
    assert capsys.readouterr().out == "the report\n"


def test_check_refuses_a_world_that_does_not_fit(calls, yaml_file, capsys):
    assert cli.main(["check", yaml_file, "--world-size", "4", "--parallel.dp-replicate", "3"]) == 2
    assert calls == []
    assert capsys.readouterr().err == (
        "moetrain: error: parallel.dp_replicate (3) must divide the world size (4); try 1, 2 or 4\n"
    )


@pytest.mark.parametrize(
    ("flags", "kwargs"),
    [
        ([], {"split": "eval", "sequences": None}),
        (["--split", "train", "--sequences", "8"], {"split": "train", "sequences": 8}),
    ],
)
def test_eval(calls, flags, kwargs):
    assert cli.main(["eval", "runs/a", *flags]) == 0
    assert calls == [("evaluate.run", (Path("runs/a"),), kwargs)]


def test_eval_of_other_texts(calls, yaml_file, capsys):
    args = ["--sequences", "9", "--data.field", "body", "--data.cache", "c"]
    assert cli.main(["eval", "runs/a", "--source", "x.jsonl", yaml_file, *args]) == 0
    read = DataConfig(field="body", cache=Path("c"))
    texts = [read.model_copy(update={"source": source}) for source in ("x.jsonl", yaml_file)]
    assert calls == [("evaluate.run_on", (Path("runs/a"), texts), {"sequences": 9})]
    assert capsys.readouterr() == ("", "")


def test_eval_warns_of_a_setting_without_effect(calls, yaml_file, capsys):
    assert cli.main(["eval", "a", "--source", yaml_file, "--data.subset", "x"]) == 0
    assert capsys.readouterr().err == (
        f"moetrain: warning: data.subset (x) has no effect for the local data.source {yaml_file}\n"
    )


def test_generate(calls):
    args = ["--prompt", "Once", "--max-tokens", "9", "--temperature", "0.5", "--top-k", "3"]
    assert cli.main(["generate", "runs/a", *args, "--top-p", "0.9", "--seed", "1"]) == 0
    assert calls == [
        (
            "generate.run",
            (Path("runs/a"),),
            {
                "prompt": "Once",
                "max_tokens": 9,
                "temperature": 0.5,
                "top_k": 3,
                "top_p": 0.9,
                "greedy": False,
                "chat": False,
                "seed": 1,
            },
        )
    ]


def test_generate_greedily_from_a_prompt_that_looks_like_a_flag(calls):
    assert cli.main(["generate", "runs/a", "--prompt=--x", "--greedy"]) == 0
    ((_, _, kwargs),) = calls
    assert (kwargs["prompt"], kwargs["greedy"]) == ("--x", True)


@pytest.mark.parametrize(
    ("args", "called", "code"),
    [
        (["list", "a"], ("checkpoint.inspect.print_list", (Path("a"),), {}), 0),
        (["show", "a"], ("checkpoint.inspect.print_checkpoint", (Path("a"), False), {}), 0),
        (
            ["show", "a", "--tensors"],
            ("checkpoint.inspect.print_checkpoint", (Path("a"), True), {}),
            0,
        ),
        (["verify", "a"], ("checkpoint.inspect.verify", (Path("a"),), {}), 2),
        (["diff", "a", "b"], ("checkpoint.diff.print_diff", (Path("a"), Path("b")), {}), 1),
        (
            ["convert", "a", "b", "--format", "torch"],
            ("convert.convert", (Path("a"), Path("b"), "torch", False), {"bf16": False}),
            0,
        ),
        (
            ["convert", "a", "b", "--format", "safetensors", "--weights-only", "--dtype", "bf16"],
            ("convert.convert", (Path("a"), Path("b"), "safetensors", True), {"bf16": True}),
            0,
        ),
    ],
)
def test_checkpoint(calls, args, called, code):
    assert cli.main(["checkpoint", *args]) == code
    assert calls == [called]


def test_data_prepare_takes_a_file_flags_or_both(calls, yaml_file, capsys):
    assert cli.main(["data", "prepare"]) == 0
    assert cli.main(["data", "prepare", "--data.seq-len", "64"]) == 0
    assert cli.main(["data", "prepare", yaml_file, "--data.seq-len", "32"]) == 0
    assert [args for _, args, _ in calls] == [
        (DataConfig(),),
        (DataConfig(seq_len=64),),
        (DataConfig(seq_len=32),),
    ]
    assert capsys.readouterr().out == "the folder\n" * 3


def test_tokenizer_train(calls):
    args = ["--vocab-size", "300", "--data.max-documents", "5"]
    assert cli.main(["tokenizer", "train", "stdlib", "out/tok.json", *args]) == 0
    assert calls == [
        ("data.open_source", (DataConfig(source="stdlib", max_documents=5),), {}),
        ("data.train_bpe", (["a document"],), {"vocab_size": 300, "out": Path("out/tok.json")}),
    ]


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "no command": (
        [],
        "Expected one of {train, check, eval, generate, replay, export, import, upcycle, "
        "split, merge, checkpoint, data, tokenizer}.",
    ),
    "unknown command": (
        ["trian"],
        "Unrecognized options: trian\n"
        "Available subcommands: train, check, eval, generate, replay, export, import, upcycle, "
        "split, merge, checkpoint, data, tokenizer",
    ),
    "no config": (
        ["train"],
        "Missing from moetrain train:\nCONFIG\n"
        "YAML file of settings; flags lie over it. (required)",
    ),
    "no world size": (
        ["check", "FILE"],
        "Missing from moetrain check:\n--world-size INT\n"
        "Ranks (processes, usually one per GPU) that the run would have. (required)",
    ),
    "missing file": (
        ["train", "no.yaml"],
        "cannot read no.yaml: No such file or directory; name a YAML file",
    ),
    "unknown setting": (
        ["train", "FILE", "--moe.experst", "3"],
        "moe.experst is not a setting; did you mean moe.experts?",
    ),
    "unknown setting before the file": (
        ["train", "--moe.experst", "3", "FILE"],
        "moe.experst is not a setting; did you mean moe.experts?",
    ),
    "unknown setting without a file": (
        ["data", "prepare", "--data.sorce", "x"],
        "data.sorce is not a setting; did you mean data.source?",
    ),
    "unknown flag before the file": (
        ["train", "--lr", "3", "FILE"],
        "an unknown flag stands before config; put config first",
    ),
    "flag given twice": (
        ["check", "FILE", "--world-size", "1", "--world-size=2"],
        "--world-size is given twice; keep one",
    ),
    "conflict": (
        ["train", "FILE", "--moe.experts", "63", "--parallel.ep", "8"],
        "moe.experts (63) must be divisible by parallel.ep (8); "
        "try 56 or 64, or parallel.ep 1, 3, 7, 9 or 21",
    ),
    "sequences": (["eval", "a", "--sequences", "0"], "--sequences (0) must be 1 or more"),
    "split": (
        ["eval", "a", "--split", "test"],
        "invalid choice 'test' for argument '--split'. Expected one of ('eval', 'train').",
    ),
    "split of a source": (
        ["eval", "a", "--source", "b", "--split", "train"],
        "--split (train) is of the run's own text, and a --source is read whole; drop one of the "
        "two",
    ),
    "reading without a source": (
        ["eval", "a", "--data.max-documents", "3"],
        "--data.max-documents has no effect without --source: the run's own text is read as in "
        "training; drop it, or name a source",
    ),
    "max tokens": (
        ["generate", "a", "--prompt", "x", "--max-tokens", "0"],
        "--max-tokens (0) must be 1 or more",
    ),
    "temperature": (
        ["generate", "a", "--prompt", "x", "--temperature", "0"],
        "--temperature (0.0) must be above 0 (or use --greedy)",
    ),
    "temperature nan": (
        ["generate", "a", "--prompt", "x", "--temperature", "nan"],
        "--temperature (nan) must be above 0 (or use --greedy)",
    ),
    "top k": (["generate", "a", "--prompt", "x", "--top-k", "0"], "--top-k (0) must be 1 or more"),
    "top p": (
        ["generate", "a", "--prompt", "x", "--top-p", "1.5"],
        "--top-p (1.5) must be above 0 and at most 1",
    ),
    "seed": (["generate", "a", "--prompt", "x", "--seed", "-1"], "--seed (-1) must be 0 or more"),
    "no source": (
        ["eval", "a", "--source"],
        "--source needs one text or more, as data.source names them",
    ),
    "greedy sampling": (
        ["generate", "a", "--prompt", "x", "--greedy", "--top-k", "3"],
        "--greedy does not sample, so --temperature, --top-k, --top-p and --seed have no effect; "
        "drop them or --greedy",
    ),
    "data setting": (
        ["data", "prepare", "--data.seq-len", "0"],
        "data.seq_len (0) must be greater than 0; the default is 256",
    ),
    "format": (
        ["checkpoint", "convert", "a", "b"],
        "Missing from moetrain checkpoint convert:\n--format {moetrain,safetensors,torch}\n"
        "moetrain: to resume, evaluate and generate from; the others for other programs. "
        "(required)",
    ),
    "vocabulary": (
        ["tokenizer", "train", "stdlib", "out", "--vocab-size", "256"],
        "--vocab-size (256) must be above 256, one per byte",
    ),
    "tokenizer's data": (
        ["tokenizer", "train", "stdlib", "out", "--data.max-documents", "0"],
        "data.max_documents (0) must be greater than 0 or null; the default is null",
    ),
}


@pytest.mark.parametrize(("args", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_line_is_one_message_and_code_2(calls, yaml_file, capsys, args, message):
    assert cli.main([yaml_file if arg == "FILE" else arg for arg in args]) == 2
    assert calls == []
    assert capsys.readouterr() == ("", f"moetrain: error: {message}\n")


@pytest.mark.parametrize(
    ("command", "flag"),
    [("eval a --source b", "--data.seq-len"), ("tokenizer train stdlib out", "--data.cache")],
)
def test_settings_that_say_nothing_of_reading_a_source_are_no_flags(calls, capsys, command, flag):
    assert cli.main([*command.split(), flag, "3"]) == 2
    assert calls == []
    assert f"{flag} (applied to moetrain" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("case", ["unknown command", "no config", "split"])
def test_the_message_is_the_same_on_every_terminal(monkeypatch, capsys, case, encoding):
    args, message = REFUSED[case]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert cli.main(args) == 2
    assert capsys.readouterr().err == f"moetrain: error: {message}\n"


def test_what_a_command_finds_wrong_is_code_2(calls, yaml_file, monkeypatch, capsys):
    def refuse(config):
        raise UserError("data.source ('x') does not exist")

    monkeypatch.setattr(sys.modules["moetrain.train"], "run", refuse)
    assert cli.main(["train", yaml_file]) == 2
    assert capsys.readouterr().err == "moetrain: error: data.source ('x') does not exist\n"


def test_any_other_error_keeps_its_traceback(calls, yaml_file, monkeypatch):
    def fail(config):
        raise ValueError("a defect")

    monkeypatch.setattr(sys.modules["moetrain.train"], "run", fail)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["train", yaml_file])


def test_a_later_rank_lingers_and_then_names_itself(monkeypatch, capsys):
    slept = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    assert cli.main(["train", "no.yaml"]) == 2
    assert slept == [cli.LINGER_S]
    assert capsys.readouterr().err.startswith("moetrain: error: rank 3: cannot read no.yaml")


# ---------------------------------------------------------------- as a process


def start(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_is_quick_because_it_loads_no_heavy_library():
    script = (
        "import sys\n"
        "from moetrain.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'datasets', 'numpy', 'tokenizers', 'wandb', 'transformers'}\n"
        "    print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    for args in (["--help"], ["train", "--help"], ["check", "--help"]):
        done = start("-c", script, *args)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: moetrain")
        assert done.stdout.endswith("loaded: []\n")


def test_help_describes_every_setting_with_its_default():
    done = start("-m", "moetrain", "train", "--help", COLUMNS="100")
    assert done.returncode == 0
    shown = re.sub(r"[\s│|]+", " ", done.stdout)
    for text in (
        "--moe.eval-capacity-factor null FLOAT",
        "The same for evaluation. (default: 2.0)",
        "--model.tie-embeddings {true,false}",
        "--log.wandb {off,offline,online}",
        "--data.cache null PATH",
        "AdamW: decay of the mean of the gradients. (default: 0.9)",
    ):
        assert text in shown


def test_a_process_ends_with_code_2_without_traceback(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("moe: {experst: 4}\n")
    done = start("-m", "moetrain", "train", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "moetrain: error: moe.experst is not a setting; did you mean moe.experts?\n"
    )


def test_under_torchrun_the_message_comes_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("moe: {experts: 63}\nparallel: {ep: 2}\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*launcher, "-m", "moetrain", "train", str(path))
    assert done.returncode != 0
    assert done.stderr.count("moetrain: error: moe.experts (63) must be divisible") == 1
    assert "exitcode  : 2" in done.stderr
    assert "rank 1: moe.experts" not in done.stderr


def test_shell_completion_knows_commands_settings_and_choices():
    done = start("-m", "moetrain", "--tyro-print-completion", "bash")
    assert done.returncode == 0
    for word in ("tokenizer", "--moe.capacity-factor", "microbatch"):
        assert word in done.stdout


def test_an_interrupt_is_one_line(calls, yaml_file, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["moetrain.train"], "run", interrupted)
    assert cli.main(["train", yaml_file]) == 130
    assert capsys.readouterr().err == "moetrain: interrupted; what a run last saved is there\n"


def test_a_warning_shows_its_words_alone(calls, yaml_file, monkeypatch, capsys):
    def warned(config):
        warnings.warn("step-00000010 is ignored", stacklevel=1)
        return 0

    monkeypatch.setattr(sys.modules["moetrain.train"], "run", warned)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.delenv("RANK", raising=False)
        assert cli.main(["train", yaml_file]) == 0
    assert capsys.readouterr().err == "moetrain: warning: step-00000010 is ignored\n"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
@pytest.mark.parametrize("field", ["capacity_factor", "eval_capacity_factor"])
def test_a_capacity_factor_that_is_none_ends_before_anything_starts(
    yaml_file, calls, capsys, field, value
):
    assert cli.main(["train", yaml_file, f"--moe.{field}", value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moetrain: error: moe.{field} ({float(value)}) must be ")
    assert error.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize(("top_k", "legal"), [("0", "greater than 0"), ("9", "try 1 to 4")])
def test_a_top_k_out_of_range_ends_before_anything_starts(yaml_file, calls, capsys, top_k, legal):
    assert cli.main(["train", yaml_file, "--moe.top_k", top_k]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moetrain: error: moe.top_k ({top_k}) must ")
    assert legal in error
    assert calls == []
