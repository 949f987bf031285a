"""DeepSeek-V3 (arXiv 2412.19437): Multi-head Latent Attention, DeepSeekMoE, multi-token prediction.

Modules and parameters are named as in DeepSeek's checkpoints; only the routed experts are stacked (`convert.py` has the
table). Local tensors carry their shape as a suffix:

    B batch         T tokens of a sequence   N = B*T           S cached tokens     D hidden      W vocabulary
    H heads         Q query latent           C kv latent       P nope dim          R rope dim    V value dim
    E experts       A active experts         G groups          F ffn width         K = P + R     L layers      X others

`k_rope_BTR` has no H: one rotary key for all heads is the idea of MLA. Parameters are fp32 masters when training;
matrix products run in the model's `dtype`; residual stream, norms' statistics, router, softmax and losses are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import losses
import ops
from config import ModelConfig, OpsConfig, Recompute, YarnConfig


class Linear(nn.Linear):
    """A projection without bias, in the input's dtype (`ops.linear`)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with statistics in fp32; the result has the dtype given, or the input's."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, dtype or x.dtype)


class RotaryEmbedding:
    """Interleaved rotary positions: the pair (2i, 2i+1) turns by `position * frequency_i`. Nothing to load."""

    def __init__(self, config: ModelConfig):
        self.width, self.theta, self.yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
        self._on: dict[torch.device, Tensor] = {}  # copied once: each copy waits for a GPU

    def frequencies(self) -> Tensor:
        """Radians per token, (R/2), fp32. YaRN (2309.00071, section 3.2) slows the low ones and keeps the high ones."""
        freq = self.theta ** (-torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)
        if self.yarn is None:
            return freq
        low = max(math.floor(self._turning_dim(self.yarn.beta_fast, self.yarn)), 0)
        high = min(math.ceil(self._turning_dim(self.yarn.beta_slow, self.yarn)), self.width - 1)
        ramp = (torch.arange(self.width // 2, dtype=torch.float32) - low) / ((high - low) or 1e-3)  # as transformers
        keep = 1 - ramp.clamp(0, 1)
        return freq / self.yarn.factor * (1 - keep) + freq * keep

    def _turning_dim(self, turns: float, yarn: YarnConfig) -> float:
        """The (fractional) pair index whose frequency makes that many turns over the original context."""
        return (
            self.width
            * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(self.theta))
        )

    def __call__(self, positions_BT: Tensor) -> Tensor:
        """Unit complex numbers to multiply pairs with, (B, T, R/2), complex64."""
        device = positions_BT.device
        if device not in self._on:
            self._on[device] = self.frequencies().to(device)
        angle = positions_BT.float()[..., None] * self._on[device]
        if self.yarn is None:
            return torch.polar(torch.ones_like(angle), angle)
        both = self.yarn.mscale and self.yarn.mscale_all_dim
        factor = yarn_mscale(self.yarn.factor, self.yarn.mscale if both else 1.0)
        factor /= yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) if both else 1.0
        return torch.polar(torch.full_like(angle, factor), angle)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def rotate(x: Tensor, rope_BTR: Tensor) -> Tensor:
    """Turn the pairs of x, (B, T, R) or (B, T, H, R), by the angles of `RotaryEmbedding`."""
    if x.dim() == 4:
        rope_BTR = rope_BTR.unsqueeze(2)
    # A slice that starts at an odd offset has no view as complex numbers: x is copied, `narrow` copies its gradient.
    x_float = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(x_float.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope_BTR).flatten(-2).narrow(-1, 0, x.shape[-1]).to(x.dtype)


class LatentCache:
    """What MLA remembers of each token, for every layer: the normed kv latent and the rotated key.

    Rows may have different lengths: entry s of a row belongs to its position s. `length` is how many positions were
    written in the longest row; entries past a row's own length are hidden by the causal mask until they are rewritten.
    With `mtp` there is room for the MTP layers, too, after the others.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        mtp: bool = False,
    ):
        self.num_layers = config.num_hidden_layers + mtp * config.num_nextn_predict_layers
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.latent_LBSC = torch.zeros(self.num_layers, batch, capacity, width, device=device, dtype=dtype)
        self.length = 0

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.latent_LBSC.shape[-1] * self.latent_LBSC.element_size()

    def write(self, layer: int, positions_BT: Tensor, latent_BTC: Tensor) -> None:
        index = positions_BT[..., None].expand_as(latent_BTC)
        self.latent_LBSC[layer].scatter_(1, index, latent_BTC.to(self.latent_LBSC.dtype))


class MLA(nn.Module):
    """Multi-head Latent Attention (2412.19437, section 2.1.1)."""

    def __init__(self, config: ModelConfig, layer: int, path: str = "auto"):
        super().__init__()
        self.config, self.layer, self.path = config, layer, path
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)  # eps 1e-6 whatever the config says, as transformers
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        self.scale = config.qk_head_dim**-0.5
        if config.rope_scaling is not None:
            self.scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    def forward(
        self, x_BTD: Tensor, rope_BTR: Tensor, positions_BT: Tensor, cache: LatentCache | None = None,
        mask_B1TT: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        cfg = self.config
        if cfg.q_lora_rank is None:
            q_BTX = self.q_proj(x_BTD)
        else:
            q_BTX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTHK = q_BTX.unflatten(-1, (cfg.num_attention_heads, -1))
        q_nope_BTHP, q_rope_BTHR = q_BTHK.split((cfg.qk_nope_head_dim, cfg.qk_rope_head_dim), -1)
        q_rope_BTHR = rotate(q_rope_BTHR, rope_BTR)
        latent_BTC, k_rope_BTR = self.kv_a_proj_with_mqa(x_BTD).split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), -1)
        latent_BTC, k_rope_BTR = self.kv_a_layernorm(latent_BTC), rotate(k_rope_BTR, rope_BTR)
        if cache is not None:
            cache.write(self.layer, positions_BT, torch.cat((latent_BTC, k_rope_BTR), -1))
            if cache.length > 0:
                return self.o_proj(self._absorbed(q_nope_BTHP, q_rope_BTHR, positions_BT, cache).flatten(2))
        kv_BTHX = self.kv_b_proj(latent_BTC).unflatten(-1, (cfg.num_attention_heads, -1))
        k_nope_BTHP, v_BTHV = kv_BTHX.split((cfg.qk_nope_head_dim, cfg.v_head_dim), -1)
        # Heads behind tokens in memory: fused kernels answer in that layout, and `flatten` copies nothing.
        q_BHTK = torch.cat((q_nope_BTHP, q_rope_BTHR), -1).transpose(1, 2)
        k_BHTK = torch.cat((k_nope_BTHP, k_rope_BTR.unsqueeze(2).expand_as(q_rope_BTHR)), -1).transpose(1, 2)
        v_BHTV = v_BTHV.transpose(1, 2)
        out_BHTV = ops.attention(q_BHTK, k_BHTK, v_BHTV, scale=self.scale, path=self.path, mask_B1TS=mask_B1TT)
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(2))

    def _absorbed(self, q_nope_BTHP: Tensor, q_rope_BTHR: Tensor, positions_BT: Tensor, cache: LatentCache) -> Tensor:
        """Attention over the cached latents without expanding them: kv_b is absorbed into query and output."""
        cfg = self.config
        weight_HXC = self.kv_b_proj.weight.to(q_nope_BTHP.dtype).unflatten(0, (cfg.num_attention_heads, -1))
        w_key_HPC, w_value_HVC = weight_HXC.split((cfg.qk_nope_head_dim, cfg.v_head_dim), 1)
        cached_BSX = cache.latent_LBSC[self.layer, :, : cache.length + positions_BT.shape[1]].to(q_nope_BTHP.dtype)
        latent_BSC, k_rope_BSR = cached_BSX.split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), -1)
        q_latent_BTHC = torch.einsum("bthp,hpc->bthc", q_nope_BTHP, w_key_HPC)
        scores_BHTS = torch.einsum("bthc,bsc->bhts", q_latent_BTHC, latent_BSC).float()
        scores_BHTS += torch.einsum("bthr,bsr->bhts", q_rope_BTHR, k_rope_BSR).float()
        visible_BTS = torch.arange(cached_BSX.shape[1], device=cached_BSX.device) <= positions_BT[..., None]
        scores_BHTS = (scores_BHTS * self.scale).masked_fill(~visible_BTS[:, None], float("-inf"))
        probs_BHTS = scores_BHTS.softmax(-1).to(latent_BSC.dtype)
        out_BTHC = torch.einsum("bhts,bsc->bthc", probs_BHTS, latent_BSC)
        return torch.einsum("bthc,hvc->bthv", out_BTHC, w_value_HVC)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden_size, width), Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(x, self.gate_proj.weight, self.up_proj.weight))


Chosen = list[Tensor] | None


class Router(nn.Module):
    """Sigmoid affinities and auxiliary-loss-free selection (Eq. 12-16), in fp32.

    `e_score_correction_bias` steers which experts are chosen, never their weights; no gradient reaches it.
    `optim.update_router_bias` moves it once per step.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.e_score_correction_bias: Tensor

    def forward(self, x_ND: Tensor, chosen: Chosen = None) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts (N, A), their weights (N, A) and all affinities (N, E).

        `chosen`, a list, is empty in the first pass of a block that will be recomputed: the choice is put there, and
        taken from there when the block runs again.
        """
        cfg = self.config
        scores_NE = F.linear(x_ND.float(), self.weight.float()).sigmoid()
        expert_NA = chosen[0] if chosen else self._choose(scores_NE)
        if chosen is not None and not chosen:
            chosen.append(expert_NA)
        weight_NA = scores_NE.gather(1, expert_NA)
        if cfg.norm_topk_prob:
            weight_NA = weight_NA / (weight_NA.sum(-1, keepdim=True) + 1e-20)
        return expert_NA, weight_NA * cfg.routed_scaling_factor, scores_NE

    def _choose(self, scores_NE: Tensor) -> Tensor:
        cfg = self.config
        choice_NE = scores_NE.detach() + self.e_score_correction_bias
        if cfg.n_group > 1:  # keep the groups whose best two experts score highest
            choice_NGX = choice_NE.unflatten(-1, (cfg.n_group, -1))
            group_NA = choice_NGX.topk(2, -1).values.sum(-1).topk(cfg.topk_group, -1).indices
            kept_NG = torch.zeros_like(choice_NGX[..., 0], dtype=torch.bool).scatter_(1, group_NA, True)
            choice_NE = choice_NGX.masked_fill(~kept_NG[..., None], float("-inf")).flatten(1)
        return choice_NE.topk(cfg.num_experts_per_tok, -1, sorted=False).indices


class Experts(nn.Module):
    """The routed experts' SwiGLUs, stacked: gate rows first, then up."""

    def __init__(self, config: ModelConfig, path: str = "auto"):
        super().__init__()
        self.path = path
        num, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> tuple[Tensor, Tensor]:
        return ops.grouped_experts(x_ND, expert_NA, weight_NA, self.gate_up_proj, self.down_proj, self.path)


class Routing(NamedTuple):
    """What one MoE layer did: tokens per expert, (E), and its balance loss summed over sequences."""

    counts_E: Tensor
    balance: Tensor


class DeepSeekMoE(nn.Module):
    """Shared experts, as one wide SwiGLU, plus the chosen routed experts."""

    def __init__(self, config: ModelConfig, path: str = "auto", *, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.gate = Router(config)
        self.experts = Experts(config, path)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BTD: Tensor, chosen: Chosen = None) -> tuple[Tensor, Routing]:
        batch, num_tokens, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        expert_NA, weight_NA, scores_NE = self.gate(x_ND, chosen)
        y_ND, counts_E = recomputed(self.recompute, self._mix, x_ND, expert_NA, weight_NA)
        balance = losses.balance_loss(scores_NE.view(batch, num_tokens, -1), expert_NA.view(batch, num_tokens, -1))
        return y_ND.view_as(x_BTD), Routing(counts_E, balance)

    def _mix(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> tuple[Tensor, Tensor]:
        y_ND, counts_E = self.experts(x_ND, expert_NA, weight_NA)
        return y_ND + self.shared_experts(x_ND), counts_E


def recomputed(wanted: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args)`; if `wanted`, what autograd needs of its inside is computed again in backward, not kept."""
    if wanted and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return function(*args, **kwargs)


class Block(nn.Module):
    """Attention, then a dense SwiGLU or experts, each behind a norm and added to the fp32 residual stream."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, recompute: Recompute, paths: OpsConfig):
        super().__init__()
        self.dtype, self.recompute = dtype, recompute
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer, paths.attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < min(config.first_k_dense_replace, config.num_hidden_layers)  # MTP layers always route
        self.mlp = (
            MLP(config.hidden_size, config.intermediate_size)
            if dense
            else DeepSeekMoE(config, paths.experts, recompute=recompute == "selective")
        )

    def forward(
        self, x_BTD: Tensor, rope_BTR: Tensor, positions_BT: Tensor, cache: LatentCache | None = None,
        mask_B1TT: Tensor | None = None, chosen: Chosen = None,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        h_BTD = self.input_layernorm(x_BTD, self.dtype)
        x_BTD = x_BTD + self.self_attn(h_BTD, rope_BTR, positions_BT, cache, mask_B1TT)
        h_BTD = self.post_attention_layernorm(x_BTD, self.dtype)
        if isinstance(self.mlp, DeepSeekMoE):
            y_BTD, routing = self.mlp(h_BTD, chosen)
            return x_BTD + y_BTD, routing
        return x_BTD + recomputed(self.recompute == "selective", self.mlp, h_BTD), None


class SharedHead(nn.Module):
    """The norm before the shared vocabulary head of an MTP layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTP(Block):
    """Multi-token prediction, depth d (2412.19437, section 2.2): one more block that sees one token further.

    Position i combines the final normed state of the model before it with the embedding of token i+1+d, and predicts
    token i+2+d. Consumers put the embedding first in `eh_proj` and feed the state after the norm, unlike Eq. 21.
    Embedding and head are the main model's; a tuple keeps the embedding from being registered twice.
    """

    def __init__(
        self,
        config: ModelConfig,
        depth: int,
        dtype: torch.dtype,
        recompute: Recompute,
        paths: OpsConfig,
        embed_tokens: nn.Embedding,
    ):
        super().__init__(config, config.num_hidden_layers + depth, dtype, recompute, paths)
        self.shared = (embed_tokens,)
        self.rotary = RotaryEmbedding(config)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def forward(  # type: ignore[override]
        self, hidden_BTD: Tensor, tokens_BT: Tensor, positions_BT: Tensor | None = None,
        cache: LatentCache | None = None, mask_B1TT: Tensor | None = None, chosen: Chosen = None,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        """`tokens_BT[:, i]` is the token one past what `hidden_BTD[:, i]` has seen. Returns the normed state."""
        embedded_BTD = self.enorm(F.embedding(tokens_BT, self.shared[0].weight), self.dtype)
        x_BTD = self.eh_proj(torch.cat((embedded_BTD, self.hnorm(hidden_BTD, self.dtype)), -1)).float()
        positions_BT = arange_positions(tokens_BT) if positions_BT is None else positions_BT
        x_BTD, routing = super().forward(x_BTD, self.rotary(positions_BT), positions_BT, cache, mask_B1TT, chosen)
        return self.shared_head.norm(x_BTD, self.dtype), routing


class LossWeights(NamedTuple):
    """What a row's loss counts in the sum that is differentiated: weight / global count * fp16 loss scale."""

    main: float = 1.0
    mtp: tuple[float, ...] = ()
    balance: float = 0.0


class Output(NamedTuple):
    """The loss to differentiate and what it is made of, as sums. Depth 0 is the main head, depth d the MTP head d-1."""

    loss: Tensor  # () weighted sum
    nats: Tensor  # (1 + depth) unweighted sums of cross-entropy
    num_targets: Tensor  # (1 + depth)
    num_correct: Tensor  # (1 + depth) targets no token is more likely than; 16-bit logits tie now and then
    balance: Tensor  # () sum over sequences and MoE layers, without alpha
    expert_counts: Tensor  # (MoE layers, then MTP layers; E) tokens per expert


class Trunk(nn.Module):
    """The checkpoint's `model.` prefix: embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, recompute: Recompute, paths: OpsConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, dtype, recompute, paths) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepSeekV3(nn.Module):
    """The whole model. Build it on `meta`, `to_empty(device=...)`, then `init_weights` or load.

    Args:
        dtype: arithmetic of the matrix products. recompute: what is computed again in backward instead of stored: whole
            blocks ("full"), or their SwiGLUs and experts ("selective"); never which experts a token goes to.
        paths: the forms that the expensive operations take (`ops.py`, `losses.py`).
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        *,
        recompute: Recompute = "none",
        paths: OpsConfig = OpsConfig(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.config, self.dtype, self.recompute, self.paths = config, dtype, recompute, paths
        self.compiled = False
        self.rotary = RotaryEmbedding(config)
        self.model = Trunk(config, dtype, recompute, paths)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(
            MTP(config, depth, dtype, recompute, paths, self.model.embed_tokens)
            for depth in range(config.num_nextn_predict_layers)
        )

    def forward(
        self,
        tokens_BT: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        loss_weights: LossWeights | None = None,
    ) -> Tensor | Output:
        """Logits (B, T, W), fp32, or with `targets` the losses.

        Args:
            tokens_BT: int64 ids. targets: (B, T + depth) or shorter: `targets[:, i]` follows `tokens[:, i]`, already
                shifted, `losses.IGNORE` where nothing is predicted. MTP head d reads the token that follows
                `tokens[:, i+d]`, whether it is a target or not, and predicts `targets[:, i+d+1]`, unless a target
                between is left out; what lies past the end is ignored.
            positions: (B, T), default 0..T-1. cache: read and extended. loss_weights: default the mean of the main loss
                plus the means of the MTP losses.
            doc_ids: (B, T + depth), never falling: the document of each token and of those past the end, which are
                another's if not given. Attention does not leave it, nor does what an MTP head reads. `positions` are
                then to be counted in it (`ops.documents`). Not with a cache.
        """
        mask_B1TT = self._mask(tokens_BT, doc_ids)
        hidden_BTD, routings = self._hidden(tokens_BT, positions, cache, mask_B1TT)
        if targets is None:
            return self.logits(hidden_BTD)
        return self._losses(hidden_BTD, tokens_BT, targets, routings, loss_weights, positions, doc_ids, mask_B1TT)

    def hidden(
        self, tokens_BT: Tensor, *, positions: Tensor | None = None, doc_ids: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> tuple[Tensor, list[Routing]]:  # fmt: skip
        """The normed final state, (B, T, D), that head and MTP read, and the routing of each MoE layer."""
        return self._hidden(tokens_BT, positions, cache, self._mask(tokens_BT, doc_ids))

    def _mask(self, tokens_BT: Tensor, doc_ids: Tensor | None) -> Tensor | None:
        return None if doc_ids is None else ops.document_mask(doc_ids[:, : tokens_BT.shape[1]], self.dtype)

    def _hidden(
        self, tokens_BT: Tensor, positions: Tensor | None, cache: LatentCache | None, mask_B1TT: Tensor | None
    ) -> tuple[Tensor, list[Routing]]:
        assert mask_B1TT is None or cache is None
        if positions is None:
            positions = arange_positions(tokens_BT, cache.length if cache is not None else 0)
        rope_BTR = self.rotary(positions)
        x_BTD = self.model.embed_tokens(tokens_BT).float()
        routings: list[Routing] = []
        for layer in self.model.layers:
            x_BTD, routing = self._run(layer, x_BTD, rope_BTR, positions, cache, mask_B1TT)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.model.norm(x_BTD, self.dtype), routings

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` block by block, shapes fixed; `options` are torch's. The first step takes long.

        There is no graph break where `paths.experts` is "grouped"; "padded" and "loop" need the counts on the host.
        """
        torch.compiler.allow_in_graph(ops.WeightedSwiGLU)  # its backward pass writes into views
        for block in [*self.model.layers, *self.mtp]:
            block.compile(dynamic=False, **options)
        self.compiled = True

    def _run(self, block: nn.Module, *args: Tensor | LatentCache | None) -> tuple[Tensor, Routing | None]:
        full = self.recompute == "full"
        # A compiled block is the same graph both times, and would be another one with a choice at hand.
        if torch.is_grad_enabled():
            return recomputed(full, block, *args, chosen=[] if full and not self.compiled else None)
        return block.forward(*args)  # never compiled: lengths differ in sampling, and each would be compiled anew

    def _losses(
        self, hidden_BTD: Tensor, tokens_BT: Tensor, targets: Tensor, routings: list[Routing],
        weights: LossWeights | None, positions_BT: Tensor | None, doc_ids: Tensor | None, mask_B1TT: Tensor | None,
    ) -> Output:  # fmt: skip
        num_tokens, num_seen = tokens_BT.shape[1], tokens_BT.shape[1] + len(self.mtp)
        targets = F.pad(targets, (0, max(0, num_seen - targets.shape[1])), value=losses.IGNORE)
        if doc_ids is not None:
            doc_ids = F.pad(doc_ids, (0, max(0, num_seen - doc_ids.shape[1])), value=-1)
        following = torch.cat((tokens_BT[:, 1:], targets[:, num_tokens - 1 :]), dim=1)
        states, wanted = [hidden_BTD], [targets[:, :num_tokens]]
        lacking_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        for depth, mtp in enumerate(self.mtp):
            # As Megatron's, which shifts inputs and loss mask apart: attention reaches positions without a target, too.
            seen_BT = following[:, depth : depth + num_tokens].clamp(min=0)
            state_BTD, routing = self._run(mtp, states[-1], seen_BT, positions_BT, None, mask_B1TT)
            states.append(state_BTD)
            # A position predicts nothing from the first token on that is no target or of another document.
            lacking_BT = lacking_BT | (targets[:, depth : depth + num_tokens] < 0)
            if doc_ids is not None:
                lacking_BT = lacking_BT | (doc_ids[:, depth + 1 : depth + 1 + num_tokens] != doc_ids[:, :num_tokens])
            wanted.append(targets[:, depth + 1 : depth + 1 + num_tokens].masked_fill(lacking_BT, losses.IGNORE))
            if routing is not None:
                routings = [*routings, routing]
        target_XN = torch.stack(wanted).flatten(1)
        num_targets = (target_XN != losses.IGNORE).sum(1)
        balance = torch.stack([routing.balance for routing in routings]).sum() if routings else hidden_BTD.new_zeros(())
        if weights is None:
            weight_X = 1 / num_targets.clamp(min=1)
            weights = LossWeights()
        else:  # filled, not copied: a copy would wait for a GPU
            both = (weights.main, *weights.mtp)
            weight_X = torch.stack([torch.full((), weight, device=hidden_BTD.device) for weight in both])
        loss, nats, num_correct = losses.linear_cross_entropy(
            torch.cat([state.flatten(0, 1) for state in states]) if self.mtp else hidden_BTD.flatten(0, 1),
            self.lm_head.weight,
            target_XN,
            weight_X,
            path=self.paths.loss,
        )
        return Output(
            loss=loss + weights.balance * balance,
            nats=nats,
            num_targets=num_targets,
            num_correct=num_correct,
            balance=balance.detach(),
            expert_counts=torch.stack([routing.counts_E for routing in routings])
            if routings
            else num_targets.new_zeros(0, 0),
        )


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.float32, **options: Any) -> DeepSeekV3:
    """A model without storage, on device `meta`."""
    with torch.device("meta"):
        return DeepSeekV3(config, dtype, **options)


def arange_positions(tokens_BT: Tensor, start: int = 0) -> Tensor:
    return torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)


@torch.no_grad()
def init_weights(model: DeepSeekV3, seed: int) -> None:
    """Set every parameter and buffer: matrices N(0, initializer_range), norms 1, router biases 0.

    Values come from a CPU generator in the order of the parameters: the same on every device and rank.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            noise = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
            parameter.copy_(noise * model.config.initializer_range)
    for buffer in model.buffers():
        buffer.zero_()


def moe_layers(model: DeepSeekV3) -> list[DeepSeekMoE]:
    """The MoE layers in the order of `Output.expert_counts`."""
    blocks: Sequence[nn.Module] = [*model.model.layers, *model.mtp]
    return [block.mlp for block in blocks if isinstance(block.mlp, DeepSeekMoE)]  # type: ignore[misc]
