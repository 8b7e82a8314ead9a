"""Which of several failures explains the others, what is said of it, and what is tried again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from moetrain import torchrun
from moetrain.checkpoint import CheckpointError
from moetrain.errors import DivergedError, UserError
from moetrain.failure import LAUNCHER, Kind, kind_of, record, record_error

LOST = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6575."


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("a wrong value"), "mistake"),
        (DivergedError("loss was not finite"), "final"),
        (CheckpointError("the disk is full"), "final"),
        (RuntimeError("CUDA error: an illegal memory access"), "failure"),
        (ValueError("Connection closed by peer"), "failure"),
        (RuntimeError(LOST), "consequence"),
        (caused(ValueError("while saving"), RuntimeError(LOST)), "consequence"),
    ],
)
def test_kinds(error: Exception, kind: Kind) -> None:
    assert kind_of(error) == kind


class Ranks:
    """What a launcher finds of ranks that ended."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.failures: dict[int, ProcessFailure] = {}

    def add(self, code: int, text: str = "", kind: Kind = "failure") -> None:
        """A rank with this exit code, that left this reason, if any."""
        rank = len(self.failures)
        file = self.folder / f"{rank}.json"
        self.monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        if text:
            record(text, kind)
        self.failures[rank] = ProcessFailure(rank, 100 + rank, code, str(file))

    def verdict(self) -> tuple[int, int, str]:
        """The first to fail, the exit code, the last words without the name of the host."""
        words = torchrun.describe(self.failures)
        return torchrun.first(self.failures), torchrun.exit_code(self.failures), words


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path, monkeypatch)


def test_a_mistake_is_one_message_and_code_2(ranks: Ranks) -> None:
    for _ in range(3):
        ranks.add(2, "name (../x) must be one folder", "mistake")
    assert ranks.verdict() == (0, 2, "moetrain: error: name (../x) must be one folder")


def test_an_error_outranks_what_follows_from_it(ranks: Ranks) -> None:
    """Whoever the launcher hears of first."""
    ranks.add(1, LOST, "consequence")
    ranks.add(1, "Traceback ...\nKeyError: 'x'")
    ranks.add(-signal.SIGTERM)
    first, code, words = ranks.verdict()
    assert (first, code) == (1, 1)
    assert words.startswith("moetrain: error: the first error, of rank 1 on ")
    assert words.endswith(":\nTraceback ...\nKeyError: 'x'")


def test_of_two_errors_the_earlier_counts(ranks: Ranks) -> None:
    ranks.add(1, "Traceback ...\nKeyError: 'x'")
    ranks.add(1, "Traceback ...\nKeyError: 'y'")
    assert ranks.verdict()[0] == 0


def test_a_killed_rank_outranks_those_that_lost_it(ranks: Ranks) -> None:
    ranks.add(1, LOST, "consequence")
    ranks.add(-signal.SIGKILL)
    first, code, words = ranks.verdict()
    assert (first, code) == (1, 1)
    assert words.endswith(": killed by SIGKILL")


def test_a_hang_outranks_the_stopped_rank_that_had_to_be_killed(ranks: Ranks) -> None:
    ranks.add(-signal.SIGKILL)
    ranks.add(1, "rank 0 (last at: step 7): no sign of life", "hang")
    assert ranks.verdict() == (1, 1, "moetrain: error: rank 0 (last at: step 7): no sign of life")


def test_a_stop_is_code_75_whoever_was_ended_meanwhile(ranks: Ranks) -> None:
    ranks.add(-signal.SIGTERM)
    ranks.add(75)
    assert torchrun.exit_code(ranks.failures) == 75


def test_a_rank_lost_in_start_up_explains_those_that_are_then_ended(ranks: Ranks) -> None:
    """They had not begun: the agent asks them to end, as a scheduler would."""
    ranks.add(75, "stopped by SIGTERM before the first step", "unbegun")
    ranks.add(-signal.SIGKILL)
    assert ranks.verdict()[:2] == (1, 1)
    assert not torchrun._is_final(ranks.failures)


def test_a_stop_before_the_first_step_is_final_where_nothing_else_went_wrong(ranks: Ranks) -> None:
    ranks.add(1, LOST, "consequence")
    ranks.add(75, "stopped by SIGTERM before the first step", "unbegun")
    assert ranks.verdict()[:2] == (1, 75)
    assert torchrun._is_final(ranks.failures)


def test_a_stop_without_a_save_has_the_code_of_its_signal(ranks: Ranks) -> None:
    ranks.add(128 + signal.SIGTERM)
    ranks.add(-signal.SIGTERM)
    assert torchrun.exit_code(ranks.failures) == 143


def test_what_is_cut_short_is_not_left(ranks: Ranks) -> None:
    """The launcher would choke on half a file."""
    ranks.monkeypatch.setattr("json.dump", lambda content, file: file.write('{"mess') and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ranks.add(1, "the reason")
    assert not (ranks.folder / "0.json").exists()


def test_a_rank_that_says_nothing_is_named_with_its_code(ranks: Ranks) -> None:
    ranks.add(3)
    assert ranks.verdict()[2].endswith(": exit code 3")


def test_secrets_do_not_get_there(ranks: Ranks) -> None:
    ranks.monkeypatch.setenv("HUB_TOKEN", "a-secret-of-mine")
    ranks.add(1, "RuntimeError: https://a-secret-of-mine@host")
    assert "a-secret-of-mine" not in ranks.verdict()[2]
    assert "***@host" in ranks.verdict()[2]


def test_what_cannot_be_left_is_for_the_rank_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher, with torchrun's own, and on a disk that is full or gone."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.delenv(LAUNCHER, raising=False)
    assert not record_error(ValueError("x"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert not record_error(ValueError("x"))
    monkeypatch.setenv(LAUNCHER, "1")
    assert record_error(ValueError("x"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert not record_error(ValueError("x"))
