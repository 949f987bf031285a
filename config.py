"""The run's configuration: frozen pydantic models, YAML presets and dotted overrides. No torch here.

`load("quickstart", ["train.steps=10"])` returns a `Config` that nothing changes afterwards. A mistake raises
`UserError` with one line: where, what was given, what is allowed, the nearest valid key. The programs turn it into exit
code 2. How keys are read and explained is in `options.py`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from options import NO_SECRETS, NullWord, Reader, Schema, Section, UserError, dump, shown
from text import clean, redact

__all__ = [
    "DTYPE_NAMES",
    "Config",
    "ModelConfig",
    "SourceConfig",
    "UserError",
    "YarnConfig",
    "describe",
    "load",
    "to_yaml",
]

CONFIGS = Path(__file__).resolve().parent / "configs"
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # ours: torch's and config.json's


class YarnConfig(Section):
    """YaRN context extension (arXiv 2309.00071); DeepSeek-V3 pre-trains without it."""

    type: Literal["yarn"] = Field(default="yarn", description="the kind of extension")
    factor: float = Field(gt=1, description="context length / original context length")
    original_max_position_embeddings: int = Field(
        default=4096, ge=1, description="context length before extension, tokens"
    )
    beta_fast: float = Field(default=32, gt=0, description="rotations above which a frequency is kept")
    beta_slow: float = Field(default=1, gt=0, description="rotations below which a frequency is interpolated")
    mscale: float = Field(default=1.0, ge=0, description="scale of cos and sin, over that of mscale_all_dim")
    mscale_all_dim: float = Field(default=1.0, ge=0, description="scale of the attention logits, squared")

    @model_validator(mode="after")
    def _consistent(self) -> YarnConfig:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"model.rope_scaling.beta_fast = {self.beta_fast} must be above "
                f"model.rope_scaling.beta_slow = {self.beta_slow}"
            )
        return self


class ModelConfig(Section):
    """The architecture, under the names of a DeepSeek-V3 `config.json`.

    The upper limits are beyond any model; without them a `config.json` could ask for what no memory holds.
    """

    vocab_size: int = Field(default=50304, ge=2, le=2**24, description="rows of the embedding and the head")
    hidden_size: int = Field(default=768, ge=1, le=2**17, description="width of the residual stream")
    num_hidden_layers: int = Field(default=12, ge=1, le=2**10, description="blocks, without the MTP layers")
    num_attention_heads: int = Field(default=8, ge=1, le=2**12, description="attention heads")
    q_lora_rank: int | None = Field(
        default=512, ge=1, le=2**17, description="width of the query latent; null: no query latent"
    )
    kv_lora_rank: int = Field(
        default=256, ge=1, le=2**17, description="width of the key-value latent, what the cache holds"
    )
    qk_nope_head_dim: int = Field(
        default=64, ge=1, le=2**14, description="query and key width without position, per head"
    )
    qk_rope_head_dim: int = Field(
        default=64, ge=2, le=2**14, multiple_of=2, description="query and key width with rotary position"
    )
    v_head_dim: int = Field(default=128, ge=1, le=2**14, description="value width per head")
    intermediate_size: int = Field(default=1792, ge=1, le=2**20, description="width of a dense SwiGLU")
    moe_intermediate_size: int = Field(default=256, ge=1, le=2**20, description="width of one expert's SwiGLU")
    n_routed_experts: int = Field(default=64, ge=1, le=2**14, description="routed experts per layer")
    n_shared_experts: int = Field(
        default=1, ge=1, le=2**10, description="shared experts per layer, built as one wide SwiGLU"
    )
    num_experts_per_tok: int = Field(default=6, ge=1, le=2**14, description="routed experts chosen per token")
    first_k_dense_replace: int = Field(
        default=1, ge=0, le=2**10, description="first layers with a dense SwiGLU instead of experts"
    )
    n_group: int = Field(default=1, ge=1, le=2**14, description="groups of experts for group-limited routing")
    topk_group: int = Field(default=1, ge=1, le=2**14, description="groups a token may choose from")
    norm_topk_prob: bool = Field(default=True, description="normalise the chosen experts' weights to sum 1")
    routed_scaling_factor: float = Field(default=2.446, gt=0, description="factor on the routed experts' weights")
    num_nextn_predict_layers: int = Field(default=1, ge=0, le=8, description="multi-token-prediction depth; 0: none")
    rms_norm_eps: float = Field(
        default=1e-6, gt=0, description="epsilon of the norms (transformers and vLLM agree at 1e-6 only)"
    )
    max_position_embeddings: int = Field(
        default=4096, ge=1, le=2**24, description="longest context the checkpoint promises, tokens"
    )
    rope_theta: float = Field(default=10000.0, gt=1, description="base of the rotary frequencies")
    rope_scaling: YarnConfig | None = Field(default=None, description="YaRN context extension; null: none")
    initializer_range: float = Field(default=0.006, gt=0, description="standard deviation of the initial weights")
    aux_loss_alpha: float = Field(default=0.0001, ge=0, description="weight of the sequence-wise balance loss")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        per_group, rest = divmod(self.n_routed_experts, self.n_group)
        if rest:
            raise ValueError(
                f"model.n_routed_experts = {self.n_routed_experts} must be a multiple of model.n_group = {self.n_group}"
            )
        if per_group < 2:  # a group's score is the sum of its best two, in transformers even if there is one group
            raise ValueError(
                f"model.n_routed_experts = {self.n_routed_experts} must be at least two for each group, "
                f"and model.n_group = {self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"model.topk_group = {self.topk_group} must be at most model.n_group = {self.n_group}")
        most = self.topk_group * per_group
        if self.num_experts_per_tok > most:
            raise ValueError(
                f"model.num_experts_per_tok = {self.num_experts_per_tok} must be at most {most}, "
                f"the experts of model.topk_group = {self.topk_group} groups"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"model.first_k_dense_replace = {self.first_k_dense_replace} must be at most "
                f"model.num_hidden_layers = {self.num_hidden_layers}"
            )
        return self


class SourceConfig(Section):
    """Where documents come from: a Hub dataset, a local file, folder or glob, or a folder of token shards."""

    path: str = Field(
        min_length=1,
        description="Hub dataset (owner/name), folder of token shards, or file, folder or glob: "
        ".parquet .jsonl .json .arrow .txt, .gz and .zst of them",
    )
    name: str | None = Field(default=None, description="configuration (subset) of a Hub dataset")
    split: str = Field(default="train", description="split of a Hub dataset")
    revision: str | None = Field(default=None, description="commit, tag or branch of a Hub dataset")
    text_field: str = Field(default="text", description="column or key that holds the text")
    weight: float | None = Field(
        default=None, gt=0, description="share of the rows, relative to the other weights; null in all: as one source"
    )
    epochs: int | None = Field(default=None, ge=1, description="passes over the source, then it ends; null: no end")


def _as_items(value: object) -> object:
    """One path or one source stands for a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


_SMOLLM = {"path": "HuggingFaceTB/smollm-corpus", "revision": "3ba9d605774198c5868892d7a8deda78031a781f"}
_FINEWEB_EDU = {
    "path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "revision": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
}  # fmt: skip
_TINYSTORIES = {"path": "roneneldan/TinyStories", "revision": "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"}
# Sources by name: `data.sources=tinystories`. Commits as others have published them; the Hub was not at hand.
NAMED_SOURCES: dict[str, tuple[dict[str, object], ...]] = {
    "fineweb-edu": ({**_FINEWEB_EDU},),
    "tinystories": ({**_TINYSTORIES},),
    "smollm-corpus": (  # 220 and 28 billion tokens: in proportion
        {**_SMOLLM, "name": "fineweb-edu-dedup", "weight": 0.887},
        {**_SMOLLM, "name": "cosmopedia-v2", "weight": 0.113},
    ),
    "shakespeare": ({"path": "Trelis/tiny-shakespeare", "text_field": "Text"},),
    "mixture": (
        {**_FINEWEB_EDU, "weight": 0.7},
        {**_SMOLLM, "name": "cosmopedia-v2", "weight": 0.2},
        {**_TINYSTORIES, "weight": 0.1},
    ),
}


def _as_sources(value: object) -> object:
    """`data.sources=corpus.txt` and lists of paths mean sources with every other key at its default; `tinystories` and
    the other names mean the sources listed above."""
    items = value if isinstance(value, list | tuple) else (value,)
    found: list[object] = []
    for item in items:
        found += NAMED_SOURCES.get(item, ({"path": item},)) if isinstance(item, str) else (item,)
    return tuple(found)


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Where text comes from and how it becomes rows of tokens."""

    sources: Annotated[Sources, Field(min_length=1)] = Field(
        default=(SourceConfig.model_validate(_FINEWEB_EDU),),
        description="where documents come from; a path, a list of paths or of sources, or the name of a ready list: "
        + ", ".join(NAMED_SOURCES),
    )
    fallback: Sources = Field(
        default=(), description="sources for a new run whose data.sources cannot be reached; never taken on resume"
    )
    tokenizer: str = Field(
        default="openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
        min_length=1,
        description="folder, Hub name (owner/name[@revision]), or what is made from the sources: bpe (byte-level BPE), "
        "chars, bytes",
    )
    seq_len: int = Field(default=2048, ge=2, description="tokens of a row")
    val_fraction: float = Field(
        default=0.01, ge=0, lt=0.5, description="share of documents held out for validation, by hash"
    )
    shuffle_window: int = Field(default=8, ge=1, description="row groups whose documents are shuffled together")
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concat: documents end to end, cut anywhere, nothing lost; best_fit: every row starts at a "
        "document, the ends of long ones are dropped",
    )
    document_mask: bool = Field(default=False, description="attention and positions do not cross documents")
    cross_targets: bool = Field(
        default=False, description="with best_fit: predict a document's first token from the document before it"
    )
    cache: str | None = Field(
        default=None, min_length=1, description="folder for token shards written while streaming, read afterwards"
    )
    max_skipped: float = Field(
        default=0.05, ge=0, le=1, description="share of unreadable documents above which the run stops"
    )
    workers: int = Field(
        default=1,
        ge=0,
        le=64,
        description="background processes that tokenise, under one more that packs if there are several; 0: none",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for key, sources in (("data.sources", self.sources), ("data.fallback", self.fallback)):
            weights = [source.weight for source in sources]
            if None in weights and any(weights):
                raise ValueError(f"{key}[{weights.index(None)}].weight = null: give every source a weight, or none")
            if weights.count(None) > 1 and len({source.epochs for source in sources}) > 1:
                raise ValueError(f"{key}: sources without weights are one source, and must have the same epochs")
        if self.cross_targets and self.packing != "best_fit":
            raise ValueError("data.cross_targets = true goes with data.packing = best_fit; concat crosses anyway")
        return self


Recompute = Literal["none", "selective", "full"]


class TrainConfig(Section):
    """Length, batch, arithmetic and loss weights."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; null: from tokens_per_active_param")
    tokens_per_active_param: float = Field(
        default=20, gt=0, description="training tokens per active parameter (with head)"
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="minutes until a run has saved and stopped; the same command goes on; null: none",
    )
    hang_minutes: float = Field(
        default=10, gt=0, description="minutes after which ranks that wait for one that hangs name it and end the run"
    )
    deterministic: bool = Field(
        default=False, description="torch's deterministic algorithms, for the same bits every time on a GPU"
    )
    micro_batch: Annotated[
        int | None, BeforeValidator(lambda value: None if value == "auto" else value), NullWord("auto")
    ] = Field(default=4, ge=1, description="rows of one forward and backward pass; auto: the most that fit the memory")
    batch_tokens: int = Field(
        default=131072, ge=1, le=2**32, description="tokens of one optimizer step, over all ranks"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="arithmetic of the matrix products"
    )
    seed: int = Field(default=1337, ge=0, lt=2**63, description="seed of the weights and of the data order")
    init_from: str | None = Field(
        default=None,
        description="checkpoint or model directory to take the weights from; of MTP layers as many as both have",
    )
    recompute: Recompute = Field(
        default="none",
        description="activations to compute again in backward, for less memory: SwiGLUs and experts, or all of a block",
    )
    compile: bool = Field(default=False, description="compile the blocks (torch.compile), long at the start")
    grad_clip: float = Field(default=1.0, gt=0, description="largest global gradient norm")
    mtp_weight: float = Field(default=0.3, ge=0, description="weight of the MTP loss at first")
    mtp_weight_final: float = Field(default=0.1, ge=0, description="weight of the MTP loss after mtp_switch")
    mtp_switch: float = Field(
        default=0.676, ge=0, le=1, description="share of the steps after which mtp_weight_final holds"
    )


class OpsConfig(Section):
    """Forms of the expensive operations. auto: the device's usual one, or one that is clearly faster."""

    experts: Literal["auto", "padded", "grouped", "loop", "triton", "liger"] = Field(
        default="auto", description="how the routed experts' products are computed"
    )
    attention: Literal["auto", "plain", "sdpa", "flash", "efficient", "cudnn"] = Field(
        default="auto", description="plain: all scores in memory; sdpa: torch's choice; else one of its kernels"
    )
    loss: Literal["auto", "chunked", "torch", "liger"] = Field(
        default="auto", description="how the vocabulary head and its cross-entropy are computed"
    )


class OptimConfig(Section):
    """Optimizer, its schedule, and the balancing of the experts."""

    name: Literal["muon", "adamw"] = Field(
        default="muon", description="muon: Muon for hidden matrices, AdamW for the rest"
    )
    lr: float = Field(default=2e-3, gt=0, le=1, description="peak learning rate of both optimizers")
    schedule: Literal["wsd", "cosine"] = Field(default="wsd", description="warm-up, then stable and decay, or cosine")
    warmup: float = Field(default=0.02, ge=0, le=1, description="share of the steps with rising learning rate")
    decay: float = Field(default=0.3, ge=0, le=1, description="share of the steps with falling learning rate (wsd)")
    min_lr: float = Field(default=0.1, ge=0, le=1, description="last learning rate / peak")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay of matrices")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first-moment decay")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's second-moment decay")
    eps: float = Field(  # a gradient whose square is 0 in fp32, the first at 1e-23, still moves little by it
        default=1e-8, ge=1e-20, description="AdamW's epsilon"
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's Nesterov momentum")
    momentum_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="what Muon's momentum is stored in: bf16 takes half the memory"
    )
    ns_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="arithmetic of Muon's Newton-Schulz iteration; auto: that of the model's products"
    )
    bias_speed: float = Field(default=1e-3, ge=0, description="change of a router bias per step (gamma)")
    bias_until: float = Field(
        default=0.966, ge=0, le=1, description="share of the steps after which router biases stay"
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"optim.warmup = {self.warmup} and optim.decay = {self.decay} must sum to at most 1")
        if self.lr * self.weight_decay >= 1:  # a step would leave nothing of a matrix, or turn it around
            raise ValueError(f"optim.lr = {self.lr} times optim.weight_decay = {self.weight_decay} must be below 1")
        return self


class LogConfig(Section):
    """What is written down."""

    every_steps: int = Field(default=10, ge=1, description="steps between lines of metrics.jsonl")


class EvalConfig(Section):
    """Validation loss on held-out documents."""

    every_steps: int = Field(default=250, ge=1, description="steps between evaluations; the last step always evaluates")
    tokens: int = Field(default=262144, ge=1, description="validation tokens, about: whole documents are taken")


class SampleConfig(Section):
    """Text generated while training."""

    every_steps: int = Field(default=500, ge=1, description="steps between samples; the last step always samples")
    prompts: Annotated[tuple[str, ...], BeforeValidator(_as_items)] = Field(
        default=("The capital of France is", "Photosynthesis is the process by which", "Once upon a time"),
        description="the same prompts every time",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="tokens of a sample")
    temperature: float = Field(default=0.8, ge=0, description="0: greedy")
    top_k: int = Field(default=50, ge=0, description="sample from the k most likely tokens; 0: from all")


class CheckpointConfig(Section):
    """When the run is saved."""

    every_steps: int = Field(default=250, ge=1, description="steps between checkpoints; the last step always saves")
    every_minutes: float | None = Field(
        default=5, gt=0, description="minutes between checkpoints, beside every_steps; null: by steps alone"
    )
    keep: int = Field(default=3, ge=1, description="checkpoints to keep; the two newest intact ones always stay")


class HubConfig(Section):
    """A copy of the newest checkpoint on the Hugging Face Hub. The token is HF_TOKEN's, never a key."""

    repo_id: str | None = Field(
        default=None, min_length=1, description="repository (owner/name), made where there is none; null: no copy"
    )
    every_minutes: float = Field(default=30, ge=5, description="least minutes between two pushes")
    public: bool = Field(default=False, description="whether others may see the repository")
    keep: int = Field(
        default=2, ge=1, description="states that gather there before its history is squashed into the newest"
    )


class RunConfig(Section):
    """Name and folder."""

    name: str = Field(default="", description="name of the run; empty: the config's name")
    dir: str = Field(default="", description="folder of the run; empty: runs/<run.name>")

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        device = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)  # no such file on Windows
        if name and (device or not re.fullmatch(r"\w([\w.-]{0,98}[\w-])?", name)):
            raise ValueError(
                f"run.name = {shown(name)} is no name for a folder: at most 100 letters, digits, '_', '-' and '.', "
                "no '-' or '.' first, no '.' last, no device of Windows"
            )
        return name

    @field_validator("dir")
    @classmethod
    def _plain_dir(cls, folder: str) -> str:
        if clean(folder) != folder or not folder.isprintable():
            raise ValueError(f"run.dir = {shown(folder)} holds a character that no name of a folder should have")
        return folder


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    ops: OpsConfig = OpsConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hub: HubConfig = HubConfig()

    @property
    def rows_per_step(self) -> int:
        """Rows of `data.seq_len` tokens in one optimizer step, over all ranks."""
        return self.train.batch_tokens // self.data.seq_len

    @property
    def micro_rows(self) -> int:
        """`train.micro_batch`, once it is known."""
        assert self.train.micro_batch is not None
        return self.train.micro_batch

    def rank_rows(self, world_size: int) -> int:
        """Rows of a step that the rank with the most has."""
        return -(-self.rows_per_step // world_size)

    def with_micro_batch(self, rows: int) -> Config:
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch": rows})})

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        model, data, train = self.model, self.data, self.train
        if data.seq_len > model.max_position_embeddings:
            raise ValueError(
                f"data.seq_len = {data.seq_len} must be at most "
                f"model.max_position_embeddings = {model.max_position_embeddings}"
            )
        if train.batch_tokens % data.seq_len:
            near = max(round(train.batch_tokens / data.seq_len), 1) * data.seq_len
            raise ValueError(
                f"train.batch_tokens = {train.batch_tokens} must be a multiple of data.seq_len = {data.seq_len}, "
                f"such as {near}"
            )
        if (train.micro_batch or 1) > self.rows_per_step:
            raise ValueError(
                f"train.micro_batch = {train.micro_batch} must be at most {self.rows_per_step}, the rows of a step: "
                f"train.batch_tokens = {train.batch_tokens} / data.seq_len = {data.seq_len}"
            )
        if model.rms_norm_eps != 1e-6:
            raise ValueError(
                f"model.rms_norm_eps = {model.rms_norm_eps} must be 1e-6: transformers fixes it for the norms of the "
                "latents while vLLM uses this key, so that any other value gives each its own model"
            )
        if model.num_hidden_layers > 61:
            raise ValueError(
                f"model.num_hidden_layers = {model.num_hidden_layers} must be at most 61: transformers takes layer 61 "
                "for the MTP layer of DeepSeek-V3 and would leave it out"
            )
        if data.tokenizer in ("bpe", "bytes") and model.vocab_size < 257:
            raise ValueError(
                f"model.vocab_size = {model.vocab_size} must be at least 257 with data.tokenizer = {data.tokenizer}: "
                "the 256 bytes and the end of a text"
            )
        return self


_SCHEMA = Schema(Config)


def _find(config: str) -> tuple[Path, str]:
    """The file of a preset's name or of a path, and what messages call it."""
    presets = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if config in presets:
        return presets[config], f"configs/{config}.yaml"
    path = Path(config)
    try:
        if path.is_file():
            return path, config
        what = "is a folder" if config and path.is_dir() else "does not exist"
    except (OSError, ValueError):
        what = "is no file name"
    near = difflib.get_close_matches(path.stem, presets, n=1)
    hint = f"did you mean {near[0]}? Presets are" if near else "give a YAML file or one of the presets"
    raise UserError(f"--config {shown(config)} {what}; {hint} {', '.join(presets)}")


def load(config: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a preset or YAML file with `section.key=value` overrides, later ones winning.

    `run.name` and `run.dir` are filled in. Raises UserError, one line, for the first mistake.
    """
    path, name = _find(config)
    reader = Reader(_SCHEMA, path, name)
    stored = reader.tree.get("run")
    if isinstance(stored, dict) and stored.get("dir") == f"runs/{stored.get('name')}":
        del stored["dir"]  # a run's own config.yaml: that is the default, which follows another name
    for argument in overrides:
        reader.override(argument)
    _refuse_secrets(reader, reader.tree)
    run = reader.validate().run
    run_name = run.name or path.stem
    reader.tree["run"] = {"name": run_name, "dir": os.path.expanduser(run.dir) or f"runs/{run_name}"}
    return reader.validate()


def _refuse_secrets(reader: Reader[Config], value: object, key: str = "") -> None:
    """No token, no password in a URL: a configuration is printed, kept and uploaded."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_secrets(reader, item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_secrets(reader, item, f"{key}[{number}]")
    elif isinstance(value, str) and redact(value) != value:
        raise UserError(f"{reader.origin(key)}: {key} = {shown(redact(value))} holds a secret; {NO_SECRETS}")


def to_yaml(config: Config) -> str:
    """Every key of the configuration, in the order of the schema; `load` reads it back to an equal one."""
    return redact(dump(config))


def describe() -> str:
    """Every key with its default, meaning and what is allowed, for `--help`."""
    return _SCHEMA.describe()
