"""Every setting of a run, on one page: typed sections, defaults, and the checks across sections.

This module imports pydantic and nothing of torch, so that reading a configuration is instant.
Reading YAML and flags into a `Config` is `moetrain.settings`.
The type of a field holds its own range; `moetrain.constraints` compares fields with each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moetrain.constraints import BALANCED_BY_DESIGN, problems

# Strict: "8", 8.0 and true are not the number 8, and "on" is not true.
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Bool = Annotated[bool, Field(strict=True)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The transformer around the experts."""

    dim: PositiveInt = 256
    """Width of the residual stream."""
    layers: PositiveInt = 4
    """Number of blocks."""
    heads: PositiveInt = 4
    """Query heads."""
    kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); null: as many as query heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; null: dim/heads."""
    ffn_dim: PositiveInt | None = None
    """Hidden width of the dense feed-forward layers; null: 4·dim."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding, at least the tokenizer's vocabulary (more: padded, as published models
    are; such ids are never generated); null: the tokenizer's vocabulary."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS-normalise queries and keys: each head by itself (Qwen3), or all together (OLMoE)."""
    tie_embeddings: Bool = True
    """Use the input embedding as the output projection."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""

    @property
    def attention_head_dim(self) -> int:
        """Width of one head, with null resolved."""
        return self.head_dim or self.dim // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, with null resolved."""
        return self.kv_heads or self.heads

    @property
    def dense_ffn_dim(self) -> int:
        """Hidden width of the dense feed-forward layers, with null resolved."""
        return self.ffn_dim or 4 * self.dim


class MoEConfig(Section):
    """Which blocks hold experts, how tokens choose them, and how many each expert takes."""

    experts: NonNegativeInt = 8
    """Experts per MoE layer; 0 makes the whole model dense."""
    top_k: PositiveInt = 2
    """Experts per token (switch needs 1, gshard 2, dense all); with expert_choice the mean."""
    router: Literal[
        "switch",
        "gshard",
        "topk",
        "noisy_topk",
        "sigmoid",
        "expert_choice",
        "hash",
        "random",
        "balanced",
        "dense",
        "hierarchical",
    ] = "topk"
    """Gate: switch (2101.03961), gshard (2006.16668 Algorithm 1), topk (softmax, then top-k),
    noisy_topk (1701.06538), sigmoid (2412.19437), expert_choice (2202.09368), hierarchical
    (1701.06538 App. B), dense (every expert), and without a router: hash (2106.04426), random,
    balanced (round robin)."""
    renormalize: Bool = True
    """topk, hierarchical: divide the chosen gates by their sum (Mixtral: true, OLMoE: false)."""
    jitter: BelowOne = 0.0
    """switch only: multiply router inputs by U[1-jitter, 1+jitter] in training (paper: 0.01)."""
    random_second: Bool = True
    """gshard only: keep the second expert with probability min(1, 2·gate) in training."""
    gate_scale: PositiveFloat = 1.0
    """sigmoid only: what a token's gates add up to (DeepSeek-V3: 2.5)."""
    bias_update_rate: NonNegativeFloat = 0.001
    """sigmoid only: step of the balancing bias, after every optimizer step; 0 keeps it at 0."""
    expert_groups: PositiveInt = 1
    """sigmoid, hierarchical: equal groups of consecutive experts (nodes, say)."""
    top_groups: PositiveInt = 1
    """sigmoid, hierarchical: groups a token may choose from; must divide top_k."""
    allow_noncausal: Bool = False
    """expert_choice only: accept that a token's experts depend on later tokens."""
    expert_ffn_dim: PositiveInt | None = None
    """Hidden width of one expert; null: as the dense feed-forward layers."""
    expert_dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    """Training: share of an expert's hidden units that a token goes without. Against overfitting
    in fine-tuning (2101.03961 §2.4: 0.4)."""
    capacity_factor: PositiveFloat | Literal["auto"] | None = 1.25
    """Training: slots per expert over the mean demand K·S/E; null: dropless; auto: of every layer
    the smallest of a few that keeps its drops within target_drop_rate."""
    target_drop_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """capacity_factor auto only: share of its assignments that a layer may drop."""
    eval_capacity_factor: PositiveFloat | None = 2.0
    """The same for evaluation."""
    min_capacity: PositiveInt = 1
    """Fewest slots an expert has in a group."""
    group: Literal["sequence", "microbatch"] | PositiveInt = "sequence"
    """Tokens among which capacity is enforced; an integer must divide data.seq_len. With
    `microbatch` (a rank's tokens in one pass) what is dropped depends on train.micro_batch."""
    drop_policy: Literal["position", "probability", "random", "spill"] = "position"
    """Who keeps a slot of a full expert: lower choices, then earlier tokens (position); higher
    gates (probability); a keyed draw (random, in training; elsewhere position). spill is position,
    but losers go on to their next experts."""
    spill_depth: PositiveInt = 1
    """spill only: how many further experts a losing choice may ask."""
    balance_coef: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss (1 at perfect balance)."""
    balance_scope: Literal["group", "batch"] = "group"
    """Balance every routing group by itself, or the global batch as a whole, over all ranks and
    micro-batches. (batch with more than one micro-batch runs the forward pass twice.)"""
    z_loss_coef: NonNegativeFloat = 0.001
    """Weight of the router z-loss (2202.08906)."""
    shared_experts: NonNegativeInt = 0
    """Experts that every token passes, beside the routed ones."""
    shared_gate: Literal["none", "sigmoid", "softmax"] = "none"
    """Weight of the shared experts: none adds them, sigmoid learns a share (Qwen2-MoE), softmax
    learns a mix of both (residual MoE, 2201.05596)."""
    every: PositiveInt = 1
    """Every n-th block holds experts, the others are dense."""
    first_dense: NonNegativeInt = 0
    """The first n blocks are dense."""

    def block_indices(self, layers: int) -> tuple[int, ...]:
        """Which of `layers` blocks hold experts, counted from 0: every n-th one, n = `every`
        (with 2: the second, fourth ...), that is not among the first `first_dense`."""
        if self.experts == 0:
            return ()
        return tuple(i for i in range(self.first_dense, layers) if (i + 1) % self.every == 0)


class ParallelConfig(Section):
    """How the ranks are used. World size = dp_replicate × dp_shard; ep folds into dp_shard."""

    ep: PositiveInt = 1
    """Ranks that share one set of experts, experts/ep each."""
    dp_replicate: PositiveInt = 1
    """Copies of the sharded model (hybrid sharding); dp_shard is what remains of the world."""
    dispatch: Literal["all_to_all", "two_level", "all_gather"] = "all_to_all"
    """How tokens reach their experts. two_level: inside a node first, then across `nodes`.
    all_gather: every rank gets all tokens of the ep ranks, which pays where top_k is large and ep
    small."""
    overlap_chunks: PositiveInt = 1
    """Parts into which each rank's experts are cut, so that one part's tokens travel while another
    part computes; must divide moe.experts/ep."""
    nodes: PositiveInt = 1
    """Nodes that the ep ranks lie on, for two_level."""
    timeout_s: PositiveFloat = 600.0
    """Seconds without progress, or without an answer of a rank, after which the run is ended."""

    @property
    def nodes_apart(self) -> int:
        """The nodes that make a difference to an expert group: 1 unless dispatch is two_level."""
        return self.nodes if self.dispatch == "two_level" and self.ep > 1 else 1


class EngineConfig(Section):
    """What runs the training step."""

    kind: Literal["torch", "deepspeed"] = "torch"
    """torch: FSDP2; deepspeed: ZeRO."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "fp32"
    """bf16 keeps fp32 master weights and an fp32 router; auto is bf16 where the machine has
    instructions for it, otherwise fp32; fp64 is for parity tests on CPU."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again rather than find in memory. full: each block from its
    input. selective: norms, activations and permutations, but no matrix product and nothing that
    was communicated. Routing is never decided again."""
    compile: Bool = False
    """torch.compile the blocks; passes without a capacity compute their experts uncompiled."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """deepspeed only: what the ranks share: nothing (0), the optimizer's state (1), reduced
    gradients too (2). Stage 3 is refused: DeepSpeed takes no experts there but its own."""
    deepspeed_config: Path | None = None
    """deepspeed only: a DeepSpeed JSON. Its "auto" inherits, contradictions are errors."""


class DataConfig(Section):
    """Where the text comes from and how it becomes tokens."""

    source: str = "stdlib"
    """`stdlib`; a file, folder or glob of text, .jsonl or .parquet; or a dataset of the hub."""
    subset: str | None = None
    """Hub: the dataset's configuration name."""
    split: str = "train"
    """Hub: the split."""
    streaming: Bool = False
    """Hub: read over the network instead of downloading first."""
    format: Literal["text", "chat"] = "text"
    """chat: a document is a conversation, a list of messages with a role and a content each, and
    the loss is of the assistant's answers alone."""
    chat_template: Path | None = None
    """chat only: a file with the Jinja template that conversations are written by; null: the
    tokenizer's own."""
    field: str = "text"
    """JSONL, parquet and hub: the column that holds the text, or the messages."""
    max_documents: PositiveInt | None = None
    """Stop after so many documents."""
    tokenizer: str = "bytes"
    """`bytes`; the path of a tokenizer.json; or a model name on the hub."""
    seq_len: PositiveInt = 256
    """Tokens per training sequence."""
    packing: Literal["cut", "whole"] = "cut"
    """cut: documents end to end, cut every seq_len tokens. whole: whole documents and padding, and
    none sees another; those longer than seq_len lose their end."""
    mask_documents: Bool = False
    """cut only: keep attention from crossing document boundaries inside a sequence."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the documents held out for evaluation, chosen by a hash of their content."""
    cache: Path | None = None
    """Where prepared tokens are kept; null: $XDG_CACHE_HOME/moetrain or ~/.cache/moetrain."""


class TrainConfig(Section):
    """The optimizer and its schedule."""

    steps: PositiveInt = 200
    """Optimizer steps in the whole run."""
    global_batch: PositiveInt = 32
    """Sequences per optimizer step, over all ranks."""
    micro_batch: PositiveInt = 8
    """Sequences per rank in one forward and backward pass."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: NonNegativeInt = 20
    """Steps of linear warm-up."""
    freeze: tuple[Literal["router", "experts"], ...] = ()
    """Weights that keep their values. In fine-tuning, leaving out the experts costs little quality
    and saves most of the memory (ST-MoE, 2202.08906 §4.2)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Decay after warm-up: cosine, or warmup-stable-decay (linear)."""
    decay_fraction: Fraction = 0.2
    """wsd: share of the steps in which the rate falls."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices, not to norms."""
    beta1: BelowOne = 0.9
    """AdamW: decay of the mean of the gradients."""
    beta2: BelowOne = 0.95
    """AdamW: decay of the mean of their squares."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW: epsilon beside the root of that mean."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    max_bad_steps: PositiveInt = 3
    """Give up after so many steps in a row that were skipped, with the weights left as they were:
    steps whose loss or gradient is not finite, and spikes where spike_response is skip."""
    spike_sigmas: NonNegativeFloat = 6.0
    """A step is a spike where its loss or gradient norm lies more than so many standard deviations
    above the mean of up to 128 steps before it (no fewer than 32). 0: no step is."""
    spike_response: Literal["warn", "skip", "stop"] = "warn"
    """To a spike. warn: train on it and say so; skip: leave the weights as they were; stop: end the
    run before it changes them."""


class EvalConfig(Section):
    """Evaluation on held-out documents."""

    every: NonNegativeInt = 0
    """Steps between evaluations; the last step is evaluated too. 0: never."""
    sequences: PositiveInt = 64
    """Held-out sequences per evaluation (fewer where there are fewer)."""


class CheckpointConfig(Section):
    """What survives the process."""

    every: NonNegativeInt = 0
    """Steps between checkpoints; the last step is saved too. 0: never."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    asynchronous: Bool = True
    """Write from a copy in host memory while training goes on."""
    grace_s: NonNegativeFloat = 120.0
    """Seconds that the scheduler gives a run to stop; where a step and its saves take longer, the
    run says so. 0: not known."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint of this run, if any; never; or a path."""
    hash_limit_gib: NonNegativeFloat = 64.0
    """Largest checkpoint whose every byte is verified before it is loaded; of larger ones the sizes
    of files are. The rest is for `moetrain checkpoint verify`."""


class LogConfig(Section):
    """What the run tells while it goes."""

    every: NonNegativeInt = 10
    """Steps between training lines of metrics.jsonl; the last step has one too. 0: never."""
    trace: Bool = False
    """Record in these steps which experts every token chose and ranked next, for moetrain
    replay."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases, from rank 0."""
    wandb_project: str = "moetrain"
    """Weights & Biases: the project that receives the run."""
    wandb_artifacts: Bool = False
    """Weights & Biases: keep the last checkpoint of the run there, too, once it has come to its
    end."""


class Config(Section):
    """A whole run."""

    name: str = "run"
    """Folder of the run inside `out`: letters, digits, '.', '_' and '-'."""
    out: Path = Path("runs")
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initialisation, of the order of samples and of the router's random draws."""
    init_from: Path | None = None
    """Run or checkpoint whose weights a new run starts from; `model`, `moe` and `data.tokenizer`
    are as there where they are not given."""
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _compare_fields(self) -> Self:
        if found := problems(self):
            raise ValueError("\n".join(found))
        return self

    @property
    def expert_ffn_dim(self) -> int:
        """Hidden width of one expert, with null resolved."""
        return self.moe.expert_ffn_dim or self.model.dense_ffn_dim

    @property
    def keeps_artifacts(self) -> bool:
        """Whether Weights & Biases is to keep the last checkpoint, and there is to be one."""
        return self.log.wandb_artifacts and self.checkpoint.every > 0

    @property
    def balances_batch(self) -> bool:
        """Whether there is a balance loss to train by that looks at the global batch as a whole."""
        moe = self.moe
        has_loss = moe.experts > 0 and moe.balance_coef > 0 and moe.router not in BALANCED_BY_DESIGN
        return has_loss and moe.balance_scope == "batch"

    def dp_shard(self, world_size: int) -> int:
        """Ranks over which one copy of the model is sharded."""
        return world_size // self.parallel.dp_replicate

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.train.global_batch // (self.train.micro_batch * world_size)
