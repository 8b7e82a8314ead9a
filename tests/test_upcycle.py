"""Dense models made sparse: the same function, copies of what was there, fresh routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import model_of, read_metrics, train, write_start

from moetrain.cli import main
from moetrain.data import bytes_as_json
from moetrain.upcycle import upcycle

SHAPE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random dense model, and the folder it was saved to."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(bytes_as_json(), encoding="utf-8")
    return model, folder


@pytest.mark.parametrize(
    ("experts", "top_k", "every", "split"),
    [(8, 2, 1, 1), (4, 1, 1, 1), (3, 3, 2, 1), (4, 2, 1, 3)],
    ids=["8", "4", "every other", "finer"],
)
def test_it_begins_as_the_dense_model(
    dense: Any, tmp_path: Path, experts: int, top_k: int, every: int, split: int
) -> None:
    theirs, folder = dense
    upcycle(str(folder), tmp_path / "sparse", experts, top_k, every, split)
    ours = model_of(tmp_path / "sparse")
    moe = ours.blocks[1].moe
    assert (moe.num_experts, moe.gate.top_k) == (experts * split, top_k * split)
    assert moe.experts.w_down.shape[1] == 24 // split
    assert [block.moe is not None for block in ours.blocks] == [every == 1, True]
    tokens_BL = torch.randint(257, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, expected = ours(tokens_BL).logits_BLV, theirs(tokens_BL).logits
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_every_expert_is_a_copy_or_near_to_one(dense: Any, tmp_path: Path) -> None:
    theirs, folder = dense
    gate = theirs.model.layers[1].mlp.gate_proj.weight.detach()
    for name, noise, seed in (("none", 0.0, 0), ("some", 0.5, 0), ("other", 0.5, 1)):
        upcycle(str(folder), tmp_path / name, 4, 2, noise=noise, seed=seed)
    none, some, other = (
        model_of(tmp_path / name).blocks[1].moe for name in ("none", "some", "other")
    )
    assert all(torch.equal(expert[:, :24], gate.T) for expert in none.experts.w_gate_up)
    added = some.experts.w_gate_up.detach()[..., :24] - gate.T
    assert added.std() == pytest.approx(0.5 * 16**-0.5, rel=0.15)  # fan-in 16
    assert len({round(float(one.sum()), 4) for one in added}) == 4  # experts differ
    assert not torch.equal(some.experts.w_down, other.experts.w_down)
    assert torch.equal(none.router.weight, some.router.weight)
    assert not torch.equal(some.router.weight, other.router.weight)


def test_it_trains_on_and_its_experts_part(dense: Any, tmp_path: Path) -> None:
    _, folder = dense
    assert main(["upcycle", str(folder), str(tmp_path / "sparse"), "--experts", "4"]) == 0
    saves = {"every": 2, "asynchronous": False}
    config = write_start(tmp_path, tmp_path / "sparse", checkpoint=saves)
    assert train(config) == 0
    assert len([line for line in read_metrics(tmp_path / "runs" / "on") if "loss" in line]) == 2
    experts = model_of(tmp_path / "runs" / "on").blocks[0].moe.experts.w_down
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "9"], "moe.top_k (9) must not exceed"),
        (["--experts", "0"], "--experts (0) must be 1 or more"),
        (["--noise", "-1"], "--noise (-1.0) must be 0 or more"),
        (["--every", "0"], "moe.every (0) must be"),
        (["--split", "5"], "moe.expert_ffn_dim (24) cannot be cut into 5 equal parts; try"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_left(
    dense: Any,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["upcycle", str(dense[1]), str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_with_experts_is_refused(tmp_path: Path) -> None:
    sparse = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model("mixtral", **SHAPE, **sparse)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    words = ["upcycle", str(tmp_path / "moe"), str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(words) == 2
