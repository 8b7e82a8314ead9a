"""A run as a model of lm-evaluation-harness, under the name `moetrain`.

The harness finds only the models of its own list and those that were imported before it looks. So
`python -m moetrain.lm_eval` is its command line with this module imported, and Python code imports
the module itself.

No assignment is ever dropped here, whatever the capacity factors of the run: a task's answers must
not depend on the texts that happen to stand beside them in a batch, nor on its size.

Shape suffixes: B sequences, L tokens, N tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, final

import torch

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: the harness is in an extra: pip install -e '.[eval]'") from None
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from moetrain import restore
from moetrain.cli import guarded
from moetrain.errors import UserError
from moetrain.generate import Sampler, among, continuations, greedy, require_causal, sampler
from moetrain.mesh import process_group, rank_and_world

MAX_GEN_TOKS = 256
"""Tokens to generate where a task does not say; no more than half of what the model reads."""


class Row(NamedTuple):
    """A text to score the end of."""

    tokens: list[int]
    num_scored: int


@register_model("moetrain")
@final
class RunLM(TemplateLM):
    """The model of a run or checkpoint, whole, in fp32 (in fp64 where it was trained so)."""

    def __init__(
        self,
        path: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_length: int | str | None = None,
        **unknown: object,
    ) -> None:
        """Load a model.

        Args:
            path: folder of a run (its newest checkpoint) or of one checkpoint.
            batch_size: texts scored at once; answers do not depend on it.
            device: as torch names them; the GPU where there is one, else the CPU. Of a GPU where
                there is none, which is what the harness asks for by default, it is the CPU.
            max_length: tokens the model reads at once; None: data.seq_len of the run.

        Raises:
            UserError: an argument is wrong, there is no checkpoint, or its model cannot generate.
        """
        super().__init__()
        if unknown:
            raise UserError(
                f"{next(iter(unknown))} is no argument of the model moetrain; it takes path, "
                "batch_size, device and max_length"
            )
        if rank_and_world()[1] > 1:
            raise UserError("moetrain.lm_eval runs in one process; start it without torchrun")
        self.batch_size = _number("batch_size", batch_size)
        found = restore.find(str(path))
        require_causal(found)
        longest = found.config.data.seq_len if max_length is None else max_length
        self.max_length = _number("max_length", longest)
        self.max_gen_toks = min(MAX_GEN_TOKS, -(-self.max_length // 2))
        self._tokenizer = restore.tokenizer(found)
        with process_group() as own_device:
            self._device = _usable(device, own_device)
            self._model = restore.model_on_device(found, self._device)

    @property
    def eot_token_id(self) -> int:
        """The end of text, after which a document began in training: where no context is given,
        a text is scored as a document of its own."""
        return self._tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Ids of a text, never with special tokens, as in training."""
        return self._tokenizer.encode_batch([string])[0].tolist()

    def apply_chat_template(self, *_: object, **__: object) -> str:
        """Raises UserError: tasks are put to the model as plain text."""
        raise UserError(
            "--apply_chat_template is nothing that the model moetrain does; leave it out"
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """Log-probability, in nats, of each continuation after its context, and whether it is what
        greedy decoding gives. Of a text that is too long the beginning is left out."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        answers: dict[int, tuple[float, bool]] = {}
        starts = range(0, len(rows), self.batch_size)
        for first in tqdm(starts, desc="loglikelihoods", disable=disable_tqdm):
            chosen = longest_first[first : first + self.batch_size]
            answers.update(zip(chosen, self._score([rows[i] for i in chosen]), strict=True))
        return [answers[i] for i in range(len(rows))]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if len(continuation) > self.max_length:
            raise UserError(
                f"max_length ({self.max_length}) is less than the {len(continuation)} tokens of a "
                f"continuation; set it to at least that"
            )
        context = context or [self.prefix_token_id]  # of white space alone nothing is left
        return Row((context + continuation)[-(self.max_length + 1) :], len(continuation))

    @torch.no_grad()
    def _score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        read = [torch.tensor(row.tokens[:-1], dtype=torch.int64) for row in rows]
        tokens_BL = pad_sequence(read, batch_first=True, padding_value=self.eot_token_id)
        length_B1 = torch.tensor([[len(tokens)] for tokens in read])
        valid_BL = torch.arange(tokens_BL.shape[1]) < length_B1
        logits_BLV = self._model(
            tokens_BL.to(self._device), valid_BL=valid_BL.to(self._device), mode="generate"
        ).logits_BLV
        return [
            self._answer(row, logits_LV[: len(row.tokens) - 1])
            for row, logits_LV in zip(rows, logits_BLV, strict=True)
        ]

    def _answer(self, row: Row, logits_LV: Tensor) -> tuple[float, bool]:
        first = len(row.tokens) - row.num_scored
        target_N = torch.tensor(row.tokens[first:], dtype=torch.int64, device=self._device)
        logits_NV = logits_LV[first - 1 :]
        log_prob_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]
        is_greedy = torch.equal(among(self._tokenizer.ids, greedy)(logits_NV), target_N)
        return log_prob_N.double().sum().item(), is_greedy

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, in nats, in windows of max_length that do not overlap, but
        for the last, which is filled up with context."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows += [(("", ""), *make_disjoint_window(pair)) for pair in pairs]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (log_prob, _) in zip(owners, answers, strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until a stop string, which is left out, the end of text or
        max_gen_toks. Greedy unless the task samples; then by torch's generator, which the harness
        seeds."""
        progress = tqdm(requests, desc="texts", disable=disable_tqdm)
        return [self._continue(*request.args) for request in progress]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        given = cast(dict[str, Any], normalize_gen_kwargs(options, self.max_gen_toks))
        stops, count = [stop for stop in given.pop("until") if stop], given.pop("max_gen_toks")
        sample = among(self._tokenizer.ids, _sampler(given))
        if count >= self.max_length:
            raise UserError(
                f"max_gen_toks ({count}) leaves no room for a context within max_length "
                f"({self.max_length}); lower it with --gen_kwargs, or raise max_length"
            )
        prompt = self.tok_encode(context)[count - self.max_length :] or [self.prefix_token_id]
        prompt_BL = torch.tensor([prompt], device=self._device)
        ids, text = [], ""
        for token_B in continuations(self._model, prompt_BL, count, sample):
            if token_B.item() == self.eot_token_id:
                break
            ids.append(int(token_B))
            text = self._tokenizer.decode(ids)
            if any(stop in text for stop in stops):
                break
        return postprocess_generated_text(text, stops, think_end_token=None)


def _sampler(given: dict[str, Any]) -> Sampler:
    """What a task asks for beside its stops."""
    do_sample, temperature = given.pop("do_sample"), given.pop("temperature", 0.0)
    top_k, top_p = given.pop("top_k", None), given.pop("top_p", 1.0)
    if given.pop("num_beams", 1) != 1 or given:
        name = next(iter(given), "num_beams")
        raise UserError(
            f"{name} is no way in which moetrain generates; it takes until, max_gen_toks, "
            "do_sample, temperature, top_k and top_p"
        )
    if not do_sample or temperature == 0:
        return greedy
    return sampler(temperature, top_k or None, top_p, torch.default_generator)


def _number(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) == 0:
        raise UserError(f"{name} ({value}) must be a whole number above 0")
    return int(value)


def _usable(wanted: str | None, own: torch.device) -> torch.device:
    try:
        device = torch.device(wanted or own)
        if device.type == "cuda" and own.type != "cuda":
            return own
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except RuntimeError as error:
        raise UserError(f"device ({wanted}) is none: {str(error).splitlines()[0]}") from None
    return device


def main() -> int:
    """The harness's own command line; what the user can mend is one message and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
