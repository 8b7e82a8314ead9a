"""What the documentation says can be typed, followed and run."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from moetrain import cli, settings
from moetrain.commands import checkpoints, data, models, runs
from moetrain.commands.runs import Check, Train
from moetrain.config import Config, MoEConfig
from moetrain.constraints import check_world
from moetrain.metrics import EvalLine, LayerLine, TrainLine

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("README.md")]
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
IN_PAGES = pytest.mark.parametrize("page", TEXT)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
LAUNCHERS = ("launch/train.sh", "launch/slurm.sbatch", "launch/deepspeed.sh")
SECTIONS = [name for name in Config.model_fields if hasattr(getattr(Config(), name), "model_dump")]
SETTING = re.compile(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})\.[a-z_][\w-]*")


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def spans(text: str) -> list[str]:
    """What stands between single backticks, outside code blocks."""
    return INLINE.findall(FENCE.sub("", text))


def arguments(line: str) -> list[str] | None:
    """The arguments that a shell line gives to `moetrain`, or None where it starts nothing."""
    line = re.sub(r" (&|>\S+)$", "", line)
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    for launcher in LAUNCHERS:
        if launcher in words:
            rest = words[words.index(launcher) + 1 :]
            return ["train", *(word for word in rest if word != "--dry-run")]
    if words[:1] == ["launch/quickstart.sh"]:
        return ["train", "configs/quickstart.yaml", *words[1:]]
    starts = [["moetrain"], ["-m", "moetrain"]]
    for place in range(len(words)):
        for start in starts:
            if words[place : place + len(start)] == start and (place == 0 or len(start) == 2):
                return words[place + len(start) :]
    return None


COMMANDS = [
    (page, line)
    for page, text in TEXT.items()
    for body in blocks(text, "sh") + blocks(text, "bash")
    for line in body.replace("\\\n", " ").splitlines()
    if arguments(line)
]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("moetrain eval runs/x  # newest", ["eval", "runs/x"]),
        (
            "NPROC=2 launch/train.sh a.yaml --moe.experts 4",
            ["train", "a.yaml", "--moe.experts", "4"],
        ),
        ("NODE_RANK=0 launch/train.sh a.yaml &", ["train", "a.yaml"]),
        ("moetrain eval runs/x >loss.txt", ["eval", "runs/x"]),
        ("sbatch --nodes=2 launch/slurm.sbatch --dry-run a.yaml", ["train", "a.yaml"]),
        ("torchrun --nproc-per-node=2 -m moetrain eval x", ["eval", "x"]),
        ("python -m moetrain.torchrun -m moetrain eval x", ["eval", "x"]),
        ("python -m pytest tests", None),
        ("pip install moetrain", None),
        ("", None),
    ],
)
def test_commands_are_recognised(line: str, found: list[str] | None) -> None:
    assert arguments(line) == found


def test_there_is_something_to_check() -> None:
    assert len(TEXT) >= 5
    assert len(COMMANDS) > 10


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_parse_and_their_settings_hold(page: str, line: str, tmp_path: Path) -> None:
    command = cli.parse(arguments(line) or [])
    if isinstance(command, Train | Check):
        path = ROOT / command.config
        for body in blocks(TEXT[page], "yaml"):  # the page may hold the file itself
            if body.startswith(f"# {command.config}\n"):
                path = tmp_path / command.config
                path.write_text(body, encoding="utf-8")
        config = settings.resolve(path, command.flags)
        if isinstance(command, Check):
            check_world(config, command.world_size)


@IN_PAGES
def test_commands_named_in_the_text_exist(page: str) -> None:
    for span in spans(TEXT[page]):
        match = re.match(r"moetrain((?: [a-z]+)+)", span)
        if match:
            with pytest.raises(SystemExit) as stop:
                cli.parse([*match[1].split(), "--help"])
            assert stop.value.code == 0, span


@IN_PAGES
def test_settings_named_in_the_text_exist(page: str) -> None:
    for setting in {name for span in spans(TEXT[page]) for name in SETTING.findall(span)}:
        section, field = setting.replace("-", "_").split(".")
        assert field in type(getattr(Config(), section)).model_fields, setting


@IN_PAGES
def test_links_resolve(page: str) -> None:
    for target in LINK.findall(FENCE.sub("", TEXT[page])):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The anchors that a code host gives to headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_pages_are_in_step_with_the_code() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    assert pages.keys() == {"commands.md", "configuration.md", "metrics.md"}
    for name, text in pages.items():
        assert TEXT[f"docs/{name}"] == text, "run: python docs/generate.py"


def test_every_command_is_described() -> None:
    sections = re.findall(r"^## moetrain (.+)$", TEXT["docs/commands.md"], re.MULTILINE)
    modules = (runs, models, checkpoints, data)
    declared = [
        value
        for module in modules
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ]
    assert len(sections) == len(declared) > 10
    for section in sections:
        with pytest.raises(SystemExit) as stop:
            cli.parse([*section.split(), "--help"])
        assert stop.value.code == 0, section


def test_every_metric_is_described() -> None:
    for line in (TrainLine, LayerLine, EvalLine):
        fields = [f"| `{name}` | " for name in line.__annotations__]
        assert [field for field in fields if field not in TEXT["docs/metrics.md"]] == []


def test_every_router_policy_and_figure_of_the_ledger_is_explained() -> None:
    concepts = TEXT["docs/concepts.md"]
    moe = MoEConfig.model_fields
    names = [n for field in ("router", "drop_policy") for n in get_args(moe[field].annotation)]
    figures = [name for name in LayerLine.__annotations__ if name not in ("kept_load", "slots")]
    assert [name for name in (*names, *figures) if f"`{name}`" not in concepts] == []


def test_every_picture_is_named() -> None:
    for picture in ("overview", "loss", "drops", "slots", "load", "balance", "throughput"):
        assert f"`{picture}.png`" in TEXT["docs/running.md"]


def test_python_blocks_run(tmp_path: Path) -> None:
    # Those of tutorials need what was done before them: docs/run_tutorials.py runs them.
    pages = [page for page in TEXT if not page.startswith("docs/tutorials/")]
    bodies = [body for page in pages for body in blocks(TEXT[page], "python")]
    assert len(bodies) >= 2
    for number, body in enumerate(bodies):
        (tmp_path / f"test_block_{number}.py").write_text(body, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
        + [str(path) for path in sorted(tmp_path.glob("*.py"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("shown", "refused"),
    [
        ("step 7\n...\nend of fp32", ""),
        ("end of fp32\n...\nstep 7", "not printed: step 7"),
        ("step 7 of 9", "not printed: step 7 of 9"),
    ],
)
def test_a_tutorial_must_print_what_it_shows_but_for_numbers(
    tmp_path: Path, shown: str, refused: str
) -> None:
    run = runpy.run_path(str(ROOT / "docs" / "run_tutorials.py"))["run"]
    page = tmp_path / "page.md"
    page.write_text(
        "```text\n# words.txt\nend of bf16\n```\n"
        "```sh\necho step 12; echo between\ncat words.txt\n```\n"
        f"```text\n{shown}\n```\n"
    )
    if refused:
        with pytest.raises(SystemExit, match=refused):
            run(page, tmp_path / "work", dict(os.environ))
    else:
        run(page, tmp_path / "work", dict(os.environ))


def test_a_tutorial_whose_commands_fail_is_refused(tmp_path: Path) -> None:
    run = runpy.run_path(str(ROOT / "docs" / "run_tutorials.py"))["run"]
    page = tmp_path / "page.md"
    page.write_text("```sh\nfalse\necho 1\n```\n")
    with pytest.raises(SystemExit, match="ended with 1"):
        run(page, tmp_path / "work", dict(os.environ))
