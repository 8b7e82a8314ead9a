"""No secret in what is written down, and nothing else changed."""

from __future__ import annotations

import os
import string
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from fake_wandb import install
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs import train, write_config, write_text

from moetrain import checkpoint, cli, settings
from moetrain.config import Config, DataConfig
from moetrain.data import open_source
from moetrain.errors import UserError
from moetrain.redact import redact

ROOT = Path(__file__).parents[1]
LETTERS = string.ascii_letters + string.digits
SHAPES = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "OpenAI": "sk-proj-" + "a1_-" * 8,
    "GitHub": "ghp_" + "aB3" * 12,
    "GitHub, fine-grained": "github_pat_" + "aB3_" * 12,
    "GitLab": "glpat-" + "aB3-" * 5,
    "Slack": "xoxb-123456789012-" + "aB3" * 8,
    "Google": "AIza" + "aB3_x" * 7,
    "AWS": "AKIA" + "A2B3" * 4,
}

# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize("secret", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("text", ["{}", "token {}.", "'{}'", "a={}&b", "[{}]", "/home/{}/x"])
def test_tokens_are_known_by_their_shape(secret, text):
    assert redact(text.format(secret), {}) == text.format("***")


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("https://token@host:80/x?a=1", "https://***@host:80/x?a=1"),
        ("s3://a:b@c@host, http://d:e@f", "s3://***@host, http://***@f"),
        ("https://h/x?token=abc&n=1#key", "https://h/x?token=***&n=1#key"),
        ("https://h?n=1&api_key=abc'", "https://h?n=1&api_key=***'"),
        ("h?X-Amz-Signature=ab&X-Amz-Credential=c/d&sig=e", "h?X-Amz-Signature=***"
         "&X-Amz-Credential=***&sig=***"),
        ("?Access_Token=a%20b", "?Access_Token=***"),
    ],
)  # fmt: skip
def test_urls_lose_users_and_parameters_that_are_secret(text, redacted):
    assert redact(text, {}) == redacted
    assert redact(redacted, {}) == redacted, "once is enough"


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "apikey", "MY_SECRETS"],
)
def test_values_of_secret_variables_are_found_however_they_are_spelled(name):
    value = 'a b"\\\nx/y?zzz'
    text = f"it is {value}, {value!r}, {quote(value, safe='')} or {value.splitlines()[1]}!"
    assert redact(text, {name: value}) == "it is ***, '***', *** or x/y?zzz!"
    long = "first line\nsecond line"
    assert redact("a second line alone", {name: long}) == "a *** alone"


@pytest.mark.parametrize(
    "environ",
    [
        {"HOME": "/home/someone", "TOKENIZERS_PARALLELISM": "false-false"},
        {"SSL_KEY_FILE": "/home/someone", "TOKEN_PATH": "/home/someone"},
        {"API_KEY": "someone"},  # a word
    ],
)
def test_values_of_other_variables_stay(environ):
    assert redact("/home/someone false-false", environ) == "/home/someone false-false"


def test_secrets_that_overlap_leave_no_part():
    environ = {"A_KEY": "abcdefgh", "B_KEY": "efghijkl", "C_KEY": "xyxyxyxy", "D_KEY": "abcdefghi"}
    assert redact("-abcdefghijkl-", environ) == "-***-"
    assert redact("-xyxyxyxyxy-", environ) == "-***-"


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download and task-runner-1, sk-learn, disk-0-of-some-long-name",
        "moe.top_k (3) must be at most moe.experts (2); pad_token=0 monkey=1",
        "https://host/@scope/name?page=2&sigma=3 and me@host",
        "an aux loss of 1e-2, 64 experts × 2; 0123456789abcdef0123456789abcdef01234567",
        "",
    ],
)
def test_text_without_secrets_stays(text):
    assert redact(text, {}) == text


values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="*"), min_size=8)
secrets = st.one_of(
    st.tuples(st.sampled_from(["WANDB_API_KEY", "X_TOKEN", "PASSWORD"]), values),
    st.tuples(st.just(""), st.sampled_from(sorted(SHAPES.values()))),
)
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@="), max_size=30)


@given(st.lists(secrets, min_size=1, max_size=3), st.lists(plain, min_size=4, max_size=4))
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_secret_survives(found, words):
    environ = {f"{number}_{name}": value for number, (name, value) in enumerate(found) if name}
    text = "".join(f"{word} {value} " for word, (_, value) in zip(words, found, strict=False))
    written = redact(text, environ)
    assert not [value for _, value in found if value in written]


@given(plain)
def test_plain_text_stays(text):
    assert redact(text, {"A_KEY": "an other secret"}) == text


# ---------------------------------------------------------------- where it is applied

fields = st.sampled_from(["source", "subset", "split", "field", "tokenizer", "cache"])


@given(st.dictionaries(fields, st.text(LETTERS, min_size=8, max_size=20), min_size=1))
@hypothesis_settings(max_examples=25, deadline=None)
def test_a_saved_config_reads_back_equal_but_for_secrets(tmp_path_factory, secret_of):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    data = {name: f"//{value}/x" for name, value in secret_of.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in secret_of.items():
            patch.setenv(f"{name}_KEY", value)
        settings.save(settings.resolve(None, {"data": data}), path)
    assert settings.load(path) == settings.resolve(None, {"data": dict.fromkeys(data, "//***/x")})


def test_words_of_a_list_and_the_name_are_no_secrets(monkeypatch):
    """Redacted, a configuration would no longer read back."""
    monkeypatch.setenv("SORT_KEY", "position")
    monkeypatch.setenv("RUN_KEY", "my-first-run")
    config = Config(name="my-first-run")
    assert settings.redacted(config) == config.model_dump(mode="json")


SECRET = "correct-horse-battery"


@pytest.fixture
def secret(monkeypatch) -> str:
    """In the environment, as that of a run's wandb."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return SECRET


def test_messages_and_warnings_of_the_command_line(secret, capsys, tmp_path):
    assert cli.main(["data", "prepare", "--data.source", f"/none/{secret}.txt"]) == 2
    assert cli.main(["train", "no.yaml", "--moe.experst", secret]) == 2
    assert cli.main([secret]) == 2
    assert cli.main(["train", str(tmp_path / "no.yaml"), "--name", f"hf_{'x1' * 12}"]) == 2
    out, err = capsys.readouterr()
    assert "'/none/***.txt') does not exist" in err
    assert "Unrecognized options: ***" in err
    assert secret not in out + err


def test_tracebacks_of_the_command_line(secret):
    script = "import os; from moetrain.cli import main; main([]); os.listdir(os.environ['AT'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "AT": f"/none/{secret}"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" in done.stderr
    assert "No such file or directory: '/none/***'" in done.stderr


def test_no_file_of_a_run_holds_a_secret(secret, tmp_path, monkeypatch, capsys, caplog):
    """In the path of the text, which a run may save, and in what wandb prints and dies of."""
    record = install(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_LOG", "tell")
    write_text(tmp_path / secret)
    config = write_config(tmp_path, train={"steps": 2}, log={"wandb": "online"})
    source = ["--data.source", str(tmp_path / secret)]
    assert train(config, *source) == 0
    folder = tmp_path / "runs" / "run"
    files = [p for top in ("runs", "cache") for p in (tmp_path / top).rglob("*") if p.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    out, err = capsys.readouterr()
    assert secret not in out + err + caplog.text
    assert "refused ***" in caplog.text
    assert "the key is ***" in (folder / "wandb" / "process.log").read_text()
    assert record()[0][1]["config"]["data"]["source"] == str(tmp_path / "***")
    (last,) = checkpoint.committed(folder)
    assert checkpoint.read_manifest(last).extra["config"]["data"]["source"].endswith("/***")

    # What is needed again must be given again.
    assert cli.main(["eval", str(folder)]) == 2
    assert train(folder / "config.yaml") == 2
    err = capsys.readouterr().err
    assert err.count("/***) was redacted when it was saved, because it holds a secret; give") == 2
    assert train(folder / "config.yaml", *source, "--train.steps", 3) == 0
    assert "from step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["train", "FILE", "--out", "a/***"],
        ["check", "FILE", "--world-size", "1", "--data.tokenizer", "***.json"],
    ],
)
def test_a_path_that_was_redacted_is_not_looked_for(tmp_path, capsys, command):
    config = write_config(tmp_path)
    assert cli.main([str(config) if word == "FILE" else word for word in command]) == 2
    assert "***" in (err := capsys.readouterr().err)
    assert "was redacted when it was saved" in err


def test_a_source_with_stars_of_its_own_is_a_pattern(tmp_path):
    write_text(tmp_path / "text")
    pattern = str(tmp_path / "**" / "*.txt")
    assert list(open_source(DataConfig(source=pattern)).documents())
    with pytest.raises(UserError, match=r"data\.source \(.*\) was redacted"):
        open_source(DataConfig(source=pattern.replace("**", "***")))
