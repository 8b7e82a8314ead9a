"""What DeepSpeed is told: our fields, the user's JSON, and what happens where they differ."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moetrain import cli, engines
from moetrain.config import Config
from moetrain.engines import deepspeed_config
from moetrain.engines.deepspeed_config import merge, read
from moetrain.errors import UserError
from moetrain.settings import load

WORLD = 4
OURS: dict[str, Any] = {
    "parallel": {"ep": 2},
    "engine": {"kind": "deepspeed", "zero_stage": 2},
    "train": {"global_batch": 32, "micro_batch": 2, "lr": 3e-4, "clip_norm": 0.5},
}
CONFIG = Config.model_validate(OURS)
TOLD = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False,
}


def with_engine(**engine: Any) -> Config:
    return Config.model_validate({**OURS, "engine": {**OURS["engine"], **engine}})


def test_without_a_json_our_fields_are_all() -> None:
    assert merge(CONFIG, WORLD, {}) == TOLD


FITTING: dict[str, Any] = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True,
            "adam_w_mode": True,
        },
    },
    "bf16": {"enabled": False},
    "fp16": {"enabled": False, "loss_scale": 0},
    "amp": {"enabled": False},
    "zero_optimization": {"stage": 2},
    "gradient_allreduce_op": "mean",
    "data_types": {"grad_accum_dtype": "fp32"},
}  # fmt: skip


def test_a_json_that_says_the_same_changes_nothing() -> None:
    assert merge(CONFIG, WORLD, FITTING) == {**TOLD, "gradient_allreduce_op": "mean"}


def test_auto_inherits_at_any_depth() -> None:
    auto = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    told = {**TOLD, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    assert merge(CONFIG, WORLD, auto) == told


def test_other_keys_pass_through() -> None:
    others = {
        "zero_optimization": {"reduce_bucket_size": 500, "offload_optimizer": {"device": "cpu"}},
        "flops_profiler": {"enabled": True, "profile_step": 5},
        "communication_data_type": "fp32",
        "wandb": {"enabled": False},
        "steps_per_print": 100,
    }
    told = merge(CONFIG, WORLD, others)
    assert told["zero_optimization"] == {**others["zero_optimization"], "stage": 2}
    assert {key: told[key] for key in list(others)[1:]} == dict(list(others.items())[1:])


CONTRADICTIONS = [
    ({"train_batch_size": 64}, "train_batch_size (64) contradicts train.global_batch (32)", "32"),
    (
        {"train_micro_batch_size_per_gpu": 4},
        "train_micro_batch_size_per_gpu (4) contradicts train.micro_batch (2)",
        "2",
    ),
    (
        {"gradient_accumulation_steps": 1},
        "gradient_accumulation_steps (1) contradicts "
        "train.global_batch / (train.micro_batch × world size) (4)",
        "4",
    ),
    (
        {"gradient_clipping": 1.0},
        "gradient_clipping (1.0) contradicts train.clip_norm (0.5)",
        "0.5",
    ),
    (
        {"zero_optimization": {"stage": 1}},
        "zero_optimization.stage (1) contradicts engine.zero_stage (2)",
        "2",
    ),
    (
        {"optimizer": {"params": {"lr": 1e-3}}},
        "optimizer.params.lr (0.001) contradicts train.lr (0.0003)",
        "0.0003",
    ),
    (
        {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
        "optimizer.params.betas ([0.9, 0.999]) contradicts "
        "[train.beta1, train.beta2] ([0.9, 0.95])",
        "[0.9, 0.95]",
    ),
    (
        {"optimizer": {"params": {"eps": 1e-6}}},
        "optimizer.params.eps (1e-06) contradicts train.adam_eps (1e-08)",
        "1e-08",
    ),
    (
        {"optimizer": {"params": {"weight_decay": 0}}},
        "optimizer.params.weight_decay (0) contradicts train.weight_decay (0.1)",
        "0.1",
    ),
    (
        {"bf16": {"enabled": True}},
        "bf16.enabled (true) contradicts engine.precision (fp32)",
        "false",
    ),
    (
        {"bfloat16": {"enabled": True}},
        "bfloat16.enabled (true) contradicts engine.precision (fp32)",
        "false",
    ),
    (
        {"fp16": {"enabled": True}},
        "fp16.enabled (true) contradicts engine.precision (fp32)",
        "false",
    ),
    ({"amp": {"enabled": True}}, "amp.enabled (true) contradicts engine.precision (fp32)", "false"),
    ({"train_batch_size": True}, "train_batch_size (true) contradicts train.global_batch", "32"),
]


@pytest.mark.parametrize(("given", "message", "fix"), CONTRADICTIONS)
def test_a_contradiction_names_both_fields_both_values_and_the_fix(
    given: dict[str, Any], message: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        merge(CONFIG, WORLD, given)
    assert message in str(caught.value)
    assert f'set it to {fix} or "auto"' in str(caught.value)


def test_bf16_of_the_json_is_our_precision() -> None:
    bf16 = with_engine(precision="bf16")
    assert merge(bf16, WORLD, {"bf16": {"enabled": True}}) == TOLD
    with pytest.raises(UserError, match=r"bf16.enabled \(false\) .* engine.precision \(bf16\)"):
        merge(bf16, WORLD, {"bf16": {"enabled": False}})


REFUSED = [
    ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler is what train.schedule is for"),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage (3): ZeRO stage 3 cuts weights"),
    (
        {"optimizer": {"type": "Lion"}},
        "optimizer.type (Lion) cannot be: moetrain trains with AdamW",
    ),
    (
        {"optimizer": {"params": {"freeze_step": 10}}},
        "optimizer.params.freeze_step is no parameter of AdamW here",
    ),
    ({"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad (true) cannot be"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.device (nvme) cannot be",
    ),
    (
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param is for ZeRO stage 3",
    ),
    (
        {"zero_optimization": {"stage3_max_live_parameters": 1e9}},
        "zero_optimization.stage3_max_live_parameters (1000000000.0) is for ZeRO stage 3",
    ),
    (
        {"zero_optimization": {"zero_quantized_weights": True}},
        "zero_optimization.zero_quantized_weights (true) is for ZeRO stage 3",
    ),
    (
        {"zero_optimization": {"reduce_scatter": False}},
        "zero_optimization.reduce_scatter (false) cannot be: DeepSpeed reduces experts' gradients",
    ),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op (sum) cannot be"),
    ({"communication_data_type": "bf16"}, "communication_data_type (bf16) cannot be"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype (bf16) cannot be"),
    ({"elasticity": {"enabled": True}}, "elasticity changes batch sizes"),
    ({"curriculum_learning": {"enabled": True}}, "curriculum_learning changes the model"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel splits layers"),
    ({"wandb": {"enabled": True}}, "wandb is what log.wandb is for"),
    ({"optimizer": "AdamW"}, "optimizer (AdamW) must be a section"),
    ({"zero_optimization": True}, "zero_optimization (true) must be a section"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_work_is_refused_with_its_reason(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        merge(CONFIG, WORLD, given)
    assert message in str(caught.value)


def test_keys_of_stage_3_may_be_left_to_us() -> None:
    zero = {"stage3_max_live_parameters": "auto", "sub_group_size": "auto"}
    assert merge(CONFIG, WORLD, {"zero_optimization": zero}) == TOLD


def test_keys_of_stage_3_are_fields_of_deepspeed() -> None:
    zero = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    known = {*zero.model_fields, *(field.alias for field in zero.model_fields.values())}
    assert known >= deepspeed_config._STAGE_3_ONLY


def test_all_that_is_wrong_is_said_at_once() -> None:
    everything: dict[str, Any] = {"scheduler": {"type": "WarmupLR"}}
    for given, _, _ in CONTRADICTIONS[:-1]:
        for key, value in given.items():
            sections = isinstance(value, dict)
            everything[key] = {**everything.get(key, {}), **value} if sections else value
    everything["optimizer"]["params"] = {"lr": 1.0, "betas": [0, 0], "eps": 1, "weight_decay": 1}
    with pytest.raises(UserError) as caught:
        merge(with_engine(deepspeed_config="ds.json"), WORLD, everything)
    title, *lines = str(caught.value).splitlines()
    assert title == "engine.deepspeed_config (ds.json) does not go with this run:"
    assert len(lines) == len(CONTRADICTIONS)


ROOT = Path(__file__).parents[1]


def test_the_page_lists_every_key_that_both_decide_and_its_example_is_taken() -> None:
    page = (ROOT / "docs/engines.md").read_text()
    rows = "".join(line for line in page.splitlines() if line.startswith("| `"))
    for key, (field, *_) in deepspeed_config.ours(CONFIG, WORLD).items():
        assert f"`{key}`" in rows
        for name in field.strip("[]").replace(", ", " / ").split(" / "):
            assert name.strip("()").split(" ")[0] in rows, name
    example = json.loads(page.partition("```json\n")[2].partition("```")[0])
    assert merge(CONFIG, WORLD, example)["zero_optimization"]["overlap_comm"] is True


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "a is given twice; keep one of the two"),
        (b'{"a": {"b": 1, "b": 1}}', "b is given twice"),
        (b"{'a': 1}", "is not JSON in UTF-8"),
        (b"", "is not JSON in UTF-8"),
        (b'{"a": "\xff"}', "is not JSON in UTF-8"),
        (b"[1]", "must hold an object"),
        (None, "cannot be read: No such file or directory; name a JSON file"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^engine\.deepspeed_config \(.*ds\.json\)") as caught:
        read(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("command", [["train"], ["check", "--world-size", "1"]])
def test_the_command_line_refuses_before_anything_starts(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = tmp_path / "ds.json", tmp_path / "run.yaml"
    path.write_text(json.dumps({"train_batch_size": 7, "gradient_clipping": 7}))
    config.write_text(f"engine: {{kind: deepspeed, deepspeed_config: {path}}}")
    assert cli.main([command[0], str(config), *command[1:]]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "train_batch_size (7) contradicts train.global_batch (32)" in error
    assert "gradient_clipping (7) contradicts train.clip_norm (1.0)" in error
    assert "Traceback" not in error


# ---- our own fields ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine.zero_stage", "3"], "engine.zero_stage (3) shards weights, too"),
        (["--engine.precision", "fp64"], "engine.precision (fp64) is nothing that DeepSpeed"),
        (["--parallel.dp_replicate", "2"], "parallel.dp_replicate (2) makes copies"),
    ],
)
def test_what_deepspeed_cannot_do(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, ["--engine.kind", "deepspeed", *flags])
    assert message in str(caught.value)


def test_the_torch_engine_reads_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_engine = with_engine(kind="torch", deepspeed_config="missing.json")
    monkeypatch.setattr(deepspeed_config, "read", None)
    engines.check(torch_engine, WORLD)


def test_without_the_package_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"engine.kind \(deepspeed\) needs the package deepspeed"):
        engines.check(CONFIG, WORLD)
    engines.check(with_engine(kind="torch"), WORLD)


def test_training_imports_no_deepspeed() -> None:
    """Another engine works where it is not installed."""
    code = "import sys; sys.modules['deepspeed'] = None; import moetrain.train, moetrain.check"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
