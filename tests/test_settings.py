"""From YAML and flags to a config and back; every fault is one message that names the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.settings import load, resolve, run_directory, save

ROUTERS = (
    "'switch', 'gshard', 'topk', 'noisy_topk', 'sigmoid', 'expert_choice', 'hash', 'random', "
    "'balanced', 'dense' or 'hierarchical'"
)
SECTIONS = (
    "name, out, seed, init_from, model, moe, parallel, engine, data, train, eval, checkpoint, log"
)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def complaint(path: Path | None, *flags: str) -> str:
    with pytest.raises(UserError) as refusal:
        load(path, flags)
    return str(refusal.value)


# ---------------------------------------------------------------- what is read


def test_flags_lie_over_yaml_and_yaml_over_defaults(yaml_file):
    path = yaml_file("name: a\nmoe:\n  experts: 16\n  top_k: 1\ntrain:\n  lr: 1e-4\n")
    config = load(path, ["--moe.top-k", "4", "--parallel.ep=2", "--seed", "7"])
    assert (config.name, config.seed) == ("a", 7)
    assert (config.moe.experts, config.moe.top_k, config.moe.router) == (16, 4, "topk")
    assert (config.train.lr, config.parallel.ep) == (1e-4, 2)


def test_no_file_and_an_empty_file_are_the_defaults(yaml_file):
    assert load(None) == load(yaml_file("")) == load(yaml_file("moe:\ndata: {}\n")) == Config()


FLAGS = {
    "hyphen": (["--moe.capacity-factor", "1.0"], "moe", "capacity_factor", 1.0),
    "underscore": (["--moe.capacity_factor", "1.5"], "moe", "capacity_factor", 1.5),
    "equals": (["--moe.capacity_factor=2"], "moe", "capacity_factor", 2.0),
    "word or number": (["--moe.capacity-factor", "auto"], "moe", "capacity_factor", "auto"),
    "null": (["--moe.capacity-factor", "null"], "moe", "capacity_factor", None),
    "None": (["--moe.eval-capacity-factor=None"], "moe", "eval_capacity_factor", None),
    "word of a union": (["--moe.group", "microbatch"], "moe", "group", "microbatch"),
    "number of a union": (["--moe.group", "64"], "moe", "group", 64),
    "false": (["--moe.renormalize", "false"], "moe", "renormalize", False),
    "True": (["--moe.renormalize=True"], "moe", "renormalize", True),
    "exponent": (["--train.lr", "3e-4"], "train", "lr", 3e-4),
    "path": (["--data.cache", "/some/where"], "data", "cache", Path("/some/where")),
    "no path": (["--data.cache", "null"], "data", "cache", None),
    "choice": (["--log.wandb", "offline"], "log", "wandb", "offline"),
}


@pytest.mark.parametrize(("flags", "section", "field", "value"), FLAGS.values(), ids=FLAGS.keys())
def test_a_flag_is_typed(yaml_file, flags, section, field, value):
    path = yaml_file("moe: {capacity_factor: 1.25}\ndata: {cache: elsewhere}\n")
    found = getattr(getattr(load(path, flags), section), field)
    assert (found, type(found)) == (value, type(value))


def test_a_flag_mends_what_the_file_gets_wrong(yaml_file):
    path = yaml_file("moe: {experts: 63}\nparallel: {ep: 8}\n")
    assert "moe.experts (63)" in complaint(path)
    assert load(path, ["--moe.experts", "64"]).moe.experts == 64


def test_a_flag_equal_to_the_default_overrides_the_file(yaml_file):
    path = yaml_file("moe: {capacity_factor: null}\nseed: 3\n")
    config = load(path, ["--moe.capacity-factor", "1.25", "--seed", "0"])
    assert (config.moe.capacity_factor, config.seed) == (1.25, 0)


@pytest.mark.parametrize("word", ["off", "'off'", '"off"'])
def test_off_is_a_word_and_no_boolean(yaml_file, word):
    assert load(yaml_file(f"log: {{wandb: {word}}}")).log.wandb == "off"


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False)])
def test_booleans(yaml_file, word, value):
    assert load(yaml_file(f"moe: {{renormalize: {word}}}")).moe.renormalize is value


@pytest.mark.parametrize(
    "setting",
    ["tie_embeddings: yes", "tie_embeddings: on", "qk_norm: true", "dim: '64'", "dim: 64.0"],
)
def test_values_of_another_type_are_refused(yaml_file, setting):
    with pytest.raises(UserError, match=rf"model\.{setting.split(':')[0]} \("):
        load(yaml_file(f"model: {{{setting}}}"))


def test_anchors_and_merge_keys_work(yaml_file):
    text = "train: {<<: [&a {steps: 5, lr: 1.0}], steps: 6}\n"
    config = load(yaml_file(text))
    assert (config.train.steps, config.train.lr) == (6, 1.0)


# ---------------------------------------------------------------- unknown and repeated keys

WRONG_YAML = {
    "unknown field": (
        "moe: {experst: 4}",
        "moe.experst is not a setting; did you mean moe.experts?",
    ),
    "field of another section": (
        "moe: {warmup_step: 4}",
        "moe.warmup_step is not a setting; did you mean train.warmup_steps?",
    ),
    "field without its section": (
        "lr: 0.1",
        "lr is not a setting; did you mean train.lr?",
    ),
    "unknown section": ("modle: {dim: 4}", "modle is not a setting; did you mean model?"),
    "nothing near": ("zzz: 1", f"zzz is not a setting; the top level has {SECTIONS}"),
    "nothing near in a section": (
        "log: {zzz: 1}",
        "log.zzz is not a setting; log has every, trace, wandb, wandb_project, wandb_artifacts",
    ),
    "dotted key": (
        "moe.experts: 4",
        "moe.experts is not a setting; write moe: and, indented below it, experts:",
    ),
    "number as key": ("1: 2", f"1 is not a setting; the top level has {SECTIONS}"),
    "seed beyond 63 bits": (
        "seed: 9223372036854775808",
        "seed (9223372036854775808) must be less than 9223372036854775808; the default is 0",
    ),
    "section that is a list": ("moe: [1]", "moe ([1]) must be a section with settings of its own"),
    "section that is a number": ("moe: 3", "moe (3) must be a section with settings of its own"),
    "word for a number": (
        "moe: {experts: eight}",
        "moe.experts (eight) must be a valid integer; the default is 8",
    ),
    "negative count": (
        "moe: {experts: -1}",
        "moe.experts (-1) must be greater than or equal to 0; the default is 8",
    ),
    "top_k zero": ("moe: {top_k: 0}", "moe.top_k (0) must be greater than 0; the default is 2"),
    "capacity zero": (
        "moe: {capacity_factor: 0}",
        "moe.capacity_factor (0) must be greater than 0 or 'auto' or null; the default is 1.25",
    ),
    "capacity of another word": (
        "moe: {capacity_factor: automatic}",
        "moe.capacity_factor (automatic) must be a valid number or 'auto' or null; the default is "
        "1.25",
    ),
    "auto in evaluation": (
        "moe: {eval_capacity_factor: auto}",
        "moe.eval_capacity_factor (auto) must be a valid number or null; the default is 2.0",
    ),
    "no drops at all": (
        "moe: {capacity_factor: auto, target_drop_rate: 0}",
        "moe.target_drop_rate (0) must be greater than 0; the default is 0.01",
    ),
    "nothing but drops": (
        "moe: {capacity_factor: auto, target_drop_rate: 1}",
        "moe.target_drop_rate (1) must be less than 1; the default is 0.01",
    ),
    "capacity negative": (
        "moe: {eval_capacity_factor: -1.5}",
        "moe.eval_capacity_factor (-1.5) must be greater than 0 or null; the default is 2.0",
    ),
    "capacity nan": (
        "moe: {capacity_factor: .nan}",
        "moe.capacity_factor (nan) must be a finite number or 'auto' or null; the default is 1.25",
    ),
    "capacity inf": (
        "moe: {capacity_factor: .inf}",
        "moe.capacity_factor (inf) must be a finite number or 'auto' or null; the default is 1.25",
    ),
    "no branch of a union": (
        "moe: {group: token}",
        "moe.group (token) must be 'sequence' or 'microbatch' or a valid integer; "
        "the default is sequence",
    ),
    "unknown router": (
        "moe: {router: soft}",
        f"moe.router (soft) must be {ROUTERS}; the default is topk",
    ),
    "number as name": ("name: 12", "name (12) must be text (put it in quotes); the default is run"),
    "date as name": (
        "name: 2024-01-02",
        "name (2024-01-02) must be text (put it in quotes); the default is run",
    ),
    "list as path": ("out: [a]", "out ([a]) must be a path; the default is runs"),
    "long value": (
        f"moe: {{router: {'x' * 99}}}",
        f"moe.router ({'x' * 57}...) must be {ROUTERS}; the default is topk",
    ),
    "two at once": (
        "moe: {experst: 4}\ntrain: {steps: 0}",
        "moe.experst is not a setting; did you mean moe.experts?\n"
        "train.steps (0) must be greater than 0; the default is 200",
    ),
    "conflict": (
        "moe: {experts: 63}\nparallel: {ep: 8}",
        "moe.experts (63) must be divisible by parallel.ep (8); "
        "try 56 or 64, or parallel.ep 1, 3, 7, 9 or 21",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG_YAML.values(), ids=WRONG_YAML.keys())
def test_a_wrong_value_is_explained(yaml_file, text, message):
    assert complaint(yaml_file(text)) == message


UNREADABLE = {
    "repeated field": (
        "moe:\n  experts: 4\n  experts: 8\n",
        "{path}, line 3: experts is given twice; keep one of the two",
    ),
    "repeated section": (
        "moe: {experts: 4}\nmoe: {}\n",
        "{path}, line 2: moe is given twice; keep one of the two",
    ),
    "list": ("- 1\n", "{path} must hold sections such as 'moe:', not a list"),
    "one word": ("moe\n", "{path} must hold sections such as 'moe:', not a str"),
    "colon in text": (
        "name: a: b\n",
        "{path}, line 1: mapping values are not allowed here; "
        "put text that holds YAML's signs in quotes",
    ),
    "unclosed": (
        "moe: [1\nname: a\n",
        "{path}, line 2: expected ',' or ']', but got ':'",
    ),
    "two documents": (
        "name: a\n---\nname: b\n",
        "{path}, line 2: but found another document",
    ),
    "not UTF-8": (
        b"name: \xff\n",
        "{path} is not YAML in UTF-8: 'utf-8' codec can't decode byte 0xff in position 6: "
        "invalid start byte",
    ),
    "no such day": ("name: 2024-13-45\n", "{path} is not YAML in UTF-8: month must be in 1..12"),
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_file_is_named_with_its_line(yaml_file, text, message):
    path = yaml_file(text)
    assert complaint(path) == message.format(path=path)


def test_a_missing_file_and_a_folder(tmp_path):
    missing = tmp_path / "no.yaml"
    assert complaint(missing) == (
        f"cannot read {missing}: No such file or directory; name a YAML file"
    )
    assert complaint(tmp_path) == f"cannot read {tmp_path}: Is a directory; name a YAML file"


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.mkdir ['{0}']",
        "!!python/object/new:os.mkdir ['{0}']",
        "? !!python/object/apply:os.mkdir ['{0}']\n: 1",
        "moe: {{experts: !!python/object/apply:pathlib.Path.mkdir [!!python/object/apply:"
        "pathlib.Path ['{0}']]}}",
    ],
)
def test_yaml_executes_nothing(yaml_file, tmp_path, text):
    bait = tmp_path / "bait"
    message = complaint(yaml_file(text.format(bait)))
    assert "could not determine a constructor for the tag 'tag:yaml.org,2002:python/" in message
    assert message.endswith("; write plain values, without tags")
    assert not bait.exists()


# ---------------------------------------------------------------- flags that are wrong

WRONG_FLAGS = {
    "unknown field": (
        ["--moe.experst", "3"],
        "moe.experst is not a setting; did you mean moe.experts?",
    ),
    "repeated": (
        ["--moe.experts", "4", "--moe.experts=5"],
        "--moe.experts is given twice; keep one",
    ),
    "repeated in two spellings": (
        ["--moe.top-k", "1", "--moe.top_k", "1"],
        "--moe.top-k is given twice; keep one",
    ),
    "no number": (
        ["--moe.experts", "x"],
        "Error parsing --moe.experts: invalid literal for int() with base 10: 'x'\n"
        "Argument helptext:\n--moe.experts INT\n"
        "Experts per MoE layer; 0 makes the whole model dense. (default: 8)",
    ),
    "no choice": (
        ["--moe.drop_policy", "last"],
        "invalid choice 'last' for argument '--moe.drop-policy'. "
        "Expected one of ('position', 'probability', 'random', 'spill').",
    ),
    "no boolean": (
        ["--moe.renormalize", "maybe"],
        "invalid choice 'maybe' for argument '--moe.renormalize'. "
        "Expected one of ('true', 'false', 'True', 'False').",
    ),
    "no value": (
        ["--moe.experts"],
        "Missing value for argument '--moe.experts'. Expected 1 values.",
    ),
    "no flag": (["stray"], "Unrecognized options: stray"),
    "out of range": (
        ["--moe.capacity-factor", "-1"],
        "moe.capacity_factor (-1.0) must be greater than 0 or 'auto' or null; the default is 1.25",
    ),
    "not a number": (
        ["--moe.capacity-factor", "nan"],
        "moe.capacity_factor (nan) must be a finite number or 'auto' or null; the default is 1.25",
    ),
}


@pytest.mark.parametrize(("flags", "message"), WRONG_FLAGS.values(), ids=WRONG_FLAGS.keys())
def test_a_wrong_flag_is_explained(flags, message):
    assert complaint(None, *flags) == message


def test_a_flag_without_section_is_told_its_full_name():
    message = complaint(None, "--lr", "3")
    assert message.startswith("Unrecognized options: --lr, 3\nPerhaps you meant:\n--train.lr FLOAT")


def test_a_flag_does_not_hide_a_section_that_is_wrong(yaml_file):
    message = complaint(yaml_file("moe: 3"), "--moe.experts", "4")
    assert message == "moe (3) must be a section with settings of its own"


def test_overrides_may_come_as_a_mapping(yaml_file):
    path = yaml_file("moe: {experts: 4}")
    config = resolve(path, {"moe": {"top_k": 1}, "name": "b"})
    assert (config.moe.experts, config.moe.top_k, config.name) == (4, 1, "b")


# ---------------------------------------------------------------- saving

numbers = st.floats(min_value=1e-30, max_value=1e30)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
configs = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,9}", fullmatch=True),
        "seed": st.integers(0, 2**63 - 1),
        "out": texts.filter(lambda text: "\x00" not in text),
        "moe": st.fixed_dictionaries(
            {},
            optional={
                "capacity_factor": st.none() | st.just("auto") | numbers,
                "group": st.sampled_from(["sequence", "microbatch", 1, 64]),
                "renormalize": st.booleans(),
                "jitter": st.floats(0, 1, exclude_max=True),
            },
        ),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "source": texts | st.sampled_from(["off", "null", "1e-3", "~", "0x1", "- a", "<<"]),
                "subset": st.none() | texts,
                "cache": st.none() | st.just("a b: c"),
            },
        ),
        "train": st.fixed_dictionaries({"lr": numbers}),
        "log": st.fixed_dictionaries({"wandb": st.sampled_from(["off", "online"])}),
    },
)


@given(configs)
@hypothesis_settings(max_examples=60, deadline=None)
@example({"data": {"source": "\x85"}})  # a line break of Unicode, which YAML folds
def test_a_saved_config_reads_back_equal(tmp_path_factory, values):
    try:
        config = Config.model_validate(values)
    except ValidationError:
        assume(False)
        raise
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save(config, path)
    assert load(path) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_a_saved_config_holds_every_setting_in_order(tmp_path):
    save(Config(), tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    top = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert top == SECTIONS.split(", ")
    assert "  capacity_factor: 1.25" in lines
    assert "  cache: null" in lines


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "config.yaml"
    save(Config(name="before"), path)
    (tmp_path / "config.yaml.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        save(Config(name="after"), path)
    assert load(path).name == "before"


# ---------------------------------------------------------------- the folder of a run


def test_the_folder_of_a_run_is_inside_out(tmp_path):
    assert run_directory(tmp_path / "runs", "a.b_c-1") == tmp_path.resolve() / "runs" / "a.b_c-1"


def test_out_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert run_directory(tmp_path / "runs", "a") == tmp_path.resolve() / "disk" / "a"


def test_a_link_inside_out_is_followed(tmp_path):
    (tmp_path / "latest").symlink_to("a")
    assert run_directory(tmp_path, "latest") == tmp_path.resolve() / "a"


@pytest.mark.parametrize("target", ["../elsewhere", ".", "/"])
def test_a_link_that_leads_out_is_refused(tmp_path, target):
    out = tmp_path / "runs"
    out.mkdir()
    (out / "a").symlink_to(target)
    with pytest.raises(UserError) as refusal:
        run_directory(out, "a")
    folder = (out / target).resolve()
    assert str(refusal.value) == (
        f"name (a) leads out of out ({out}) by a link, to {folder}; "
        "remove the link or choose another name"
    )
