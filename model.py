"""MiniMax-M2 and the text model of MiniMax-M3: one config, one cache, one forward for training, prefill and decode.

    x -> embedding -> n_layer x { x += attention(norm(x));  x += mlp(norm(x)) } -> norm -> head -> logits
                                                                                \\-> MTP modules: tokens after the next
    attention   grouped queries, norms on q and k, RoPE on the first rotary_dim channels; every visible key ("full": M2,
                the first 3 layers of M3) or chosen blocks ("msa")
    mlp         mixture of experts ("moe"), or one dense gated MLP (the first 3 layers of M3)

                M2                                               M3
    norms       weight * x, q and k over all heads at once       (1 + weight) * x, q and k head by head
    experts     256, 8 active, SwiGLU                            128, 4 active, scaled by 2, + 1 shared, clamped SwiGLU

Legend for every file: B T C batch, tokens, channels; H query heads, Hkv key/value heads, G = H // Hkv, D head dim;
E experts, A active per token; N key blocks, S selected blocks, L tokens per key block. pos = position of a token on its
own path, end = see msa.py. Layout (B, T, H, D).

Not published: initialisation, MTP's weights. MTP follows DeepSeek-V3 (arXiv 2412.19437) and reads before `norm`.
"""
from __future__ import annotations  # without Triton, tl.constexpr in a kernel's signature is no name

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe import MLP, Linear, MoE, count_params, update_bias
from msa import (LEAST, block_recall, full_attention, index_kl_loss, jit, msa_attention, msa_decode, msa_train,
                 quantize_index, query_index, select_blocks, tl, triton)

M3_STYLE = dict(activation="swiglu_oai", gemma_norm=True, qk_norm="head")

@dataclasses.dataclass
class MiniMaxConfig:
    vocab_size: int
    n_layer: int                       # num_hidden_layers
    n_embd: int                        # hidden_size
    n_head: int                        # num_attention_heads
    n_kv_head: int                     # num_key_value_heads
    head_dim: int
    rotary_dim: int                    # channels of a head that rotate, from the first
    max_seq_len: int                   # max_position_embeddings
    attn_types: list                   # layer_types: "full" or "msa" per layer
    mlp_types: list                    # mlp_layer_types: "dense" or "moe" per layer
    n_expert: int                      # num_local_experts
    n_expert_per_tok: int              # num_experts_per_tok
    expert_dim: int                    # intermediate_size
    shared_dim: int = 0                # shared_intermediate_size, 0 = no shared expert
    dense_dim: int = 0                 # dense_intermediate_size
    routed_scale: float = 1.0          # routed_scaling_factor
    activation: str = "swiglu"         # or "swiglu_oai"
    gemma_norm: bool = False           # use_gemma_norm
    qk_norm: str = "layer"             # qk_norm_type: "layer" (M2) or "head" (M3)
    index_head_dim: int = 0
    index_block_size: int = 1          # L
    index_topk_blocks: int = 1         # S
    index_warmup: bool = False         # "msa" layers attend to everything while their index branch learns
    index_kl_stride: int = 1           # the index branch learns from every stride-th query
    n_mtp: int = 0                     # num_mtp_modules
    mtp_active: bool = True            # off, the MTP modules are skipped: train.py learns them on some steps alone
    rope_theta: float = 5e6
    norm_eps: float = 1e-6             # rms_norm_eps

    def __post_init__(self):
        self.check()

    def check(self, dtype=torch.float32):
        """AssertionError for a value with which no model can work, or none that computes in dtype."""
        for name, allowed in (("attn_types", ("full", "msa")), ("mlp_types", ("dense", "moe"))):
            types = getattr(self, name)
            assert isinstance(types, (list, tuple)), f"{name} {types}: not a list"
            assert len(types) == self.n_layer, f"{name} {types}: {len(types)} of {self.n_layer} layers"
            assert all(kind in allowed for kind in types), f"{name} {types}: {' or '.join(allowed)}"
        counts = ["vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "max_seq_len"]
        if "dense" in self.mlp_types:
            counts += ["dense_dim"]
        if "moe" in self.mlp_types:
            counts += ["n_expert", "n_expert_per_tok", "expert_dim"]
        if "msa" in self.attn_types:
            counts += ["index_head_dim", "index_block_size", "index_topk_blocks", "index_kl_stride"]
        for name in [*counts, "rotary_dim", "shared_dim", "n_mtp"]:
            value, least = getattr(self, name), int(name in counts)
            assert type(value) is int and value >= least, f"{name} {value!r}: a whole number, {least} or more"
        for name in ("routed_scale", "rope_theta", "norm_eps"):
            value = getattr(self, name)
            assert type(value) in (int, float) and 0 < value < math.inf, f"{name} {value!r}: a number above 0"
        for name in ("gemma_norm", "index_warmup", "mtp_active"):
            value = getattr(self, name)
            assert isinstance(value, bool), f"{name} {value!r}: True or False"
        assert self.n_head % self.n_kv_head == 0, f"{self.n_head} query heads do not share {self.n_kv_head} KV heads"
        assert self.rotary_dim in range(0, self.head_dim + 1, 2), f"rotary_dim {self.rotary_dim} of {self.head_dim}"
        assert self.activation in ("swiglu", "swiglu_oai"), f"activation {self.activation}: swiglu or swiglu_oai"
        assert self.qk_norm in ("layer", "head"), f"qk_norm {self.qk_norm}: layer or head"
        if "msa" in self.attn_types:
            least, found = self.rotary_dim, self.index_head_dim
            assert found >= least, f"index_head_dim {found}: rotary_dim, {least}, of its channels rotate"
        if "moe" in self.mlp_types:
            chosen, experts = self.n_expert_per_tok, self.n_expert
            assert chosen <= experts, f"n_expert_per_tok {chosen}: there are {experts} experts"
            unit = 16 // dtype.itemsize  # grouped_mm wants rows of whole 16 bytes
            for name in ("n_embd", "expert_dim"):
                value = getattr(self, name)
                assert value % unit == 0, f"{name} {value}: a multiple of {unit} where experts compute in {dtype}"

    @classmethod
    def micro(cls, **kw):
        """M2's pattern at the size of rl.py's tasks, in bytes."""
        return cls(**{**dict(
            vocab_size=257, n_layer=3, n_embd=64, n_head=4, n_kv_head=2, head_dim=16, rotary_dim=8, max_seq_len=1024,
            attn_types=["full"] * 3, mlp_types=["moe"] * 3, n_expert=8, n_expert_per_tok=2, expert_dim=64,
            index_head_dim=16, index_block_size=8, index_topk_blocks=4), **kw})

    @classmethod
    def tiny(cls, **kw):
        """M3's pattern at a size that two CPU cores train in three minutes."""
        return cls(**{**M3_STYLE, **dict(
            vocab_size=4096, n_layer=3, n_embd=128, n_head=4, n_kv_head=2, head_dim=32, rotary_dim=16, max_seq_len=1024,
            attn_types=["full", "msa", "msa"], mlp_types=["dense", "moe", "moe"], n_expert=8, n_expert_per_tok=2,
            expert_dim=96, shared_dim=96, dense_dim=384, routed_scale=2.0, index_head_dim=64, index_block_size=8,
            index_topk_blocks=4, index_kl_stride=2, n_mtp=1), **kw})

    @classmethod
    def small(cls, **kw):
        """M3's pattern at the size of GPT-2 124M (85M active without embedding and head), for one H100."""
        return cls(**{**M3_STYLE, **dict(
            vocab_size=50304, n_layer=12, n_embd=768, n_head=4, n_kv_head=2, head_dim=128, rotary_dim=64,
            max_seq_len=2 ** 20, attn_types=["full"] * 3 + ["msa"] * 9, mlp_types=["dense"] * 3 + ["moe"] * 9,
            n_expert=16, n_expert_per_tok=4, expert_dim=512, shared_dim=512, dense_dim=2304, routed_scale=2.0,
            index_head_dim=128, index_block_size=128, index_topk_blocks=16, index_kl_stride=8, n_mtp=1), **kw})

    @classmethod
    def m2(cls, **kw):
        return cls(**{**dict(
            vocab_size=200064, n_layer=62, n_embd=3072, n_head=48, n_kv_head=8, head_dim=128, rotary_dim=64,
            max_seq_len=196608, attn_types=["full"] * 62, mlp_types=["moe"] * 62, n_expert=256, n_expert_per_tok=8,
            expert_dim=1536), **kw})

    @classmethod
    def m3(cls, **kw):
        return cls(**{**M3_STYLE, **dict(
            vocab_size=200064, n_layer=60, n_embd=6144, n_head=64, n_kv_head=4, head_dim=128, rotary_dim=64,
            max_seq_len=1048576, attn_types=["full"] * 3 + ["msa"] * 57, mlp_types=["dense"] * 3 + ["moe"] * 57,
            n_expert=128, n_expert_per_tok=4, expert_dim=3072, shared_dim=3072, dense_dim=12288, routed_scale=2.0,
            index_head_dim=128, index_block_size=128, index_topk_blocks=16), **kw})

class RMSNorm(nn.Module):
    """Computed in fp32 or wider. Gemma's form stores the weight's distance from 1."""

    def __init__(self, dim, cfg):
        super().__init__()
        self.eps, self.gemma = cfg.norm_eps, cfg.gemma_norm
        self.weight = nn.Parameter(torch.full((dim,), 0.0 if cfg.gemma_norm else 1.0))

    def forward(self, x):
        weight = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(x.to(weight.dtype), weight.shape, 1 + weight if self.gemma else weight, self.eps).to(x.dtype)

def rope_tables(pos, rotary_dim, theta):
    """cos and sin of each position's angles: (B, T) -> two (B, T, 1, rotary_dim / 2), fp32 in any model."""
    freq = theta ** (-torch.arange(0, rotary_dim, 2, device=pos.device, dtype=torch.float32) / rotary_dim)
    angle = pos[..., None, None].float() * freq
    return angle.cos(), angle.sin()

def apply_rope(x, rope):
    """Rotate the pairs (c, c + rotary_dim / 2) of the first rotary_dim channels of x (B, T, H, D), leave the others."""
    (cos, sin), wide = rope, torch.promote_types(x.dtype, torch.float32)
    half = cos.size(-1)
    a, b = x[..., :half].to(wide), x[..., half:2 * half].to(wide)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., 2 * half:]], -1)

class KVCache:
    """Keys, values and index keys of every layer and every MTP module, in static buffers; slot = position on the path.
    `length` (B,) int32 lives on the device; `used`, a bound on it that the host knows, spares reading it back.
    int8 keeps quantize_index of the index keys too, for msa_decode; default: where kernels can use it, from 2^22 slots
    in all, where the bytes saved outweigh what `append` then launches, some 28 small kernels more."""

    def __init__(self, cfg, batch, capacity, device="cpu", dtype=torch.float32, int8=None):
        if batch < 0 or capacity < 1:
            raise ValueError(f"a cache of {batch} rows with {capacity} slots: expected 0 or more rows, 1 or more slots")
        lanes, self.L = cfg.n_layer + cfg.n_mtp, cfg.index_block_size
        self.capacity = -(-capacity // self.L) * self.L  # whole key blocks, which gather_blocks can read in place
        size = (lanes, batch, self.capacity, cfg.n_kv_head, cfg.head_dim)
        self.k, self.v = (torch.zeros(size, device=device, dtype=dtype) for _ in range(2))
        self.ki = torch.zeros(*size[:3], cfg.index_head_dim, device=device, dtype=dtype)
        self.length, self.used, self.coded = torch.zeros(batch, dtype=torch.int32, device=device), 0, None
        able = self.ki.is_cuda and self.ki.element_size() == 2 and cfg.index_head_dim >= 32 and self.L >= 16
        if (able and batch * self.capacity >= INT8_SLOTS) if int8 is None else int8:
            self.coded = [x.unflatten(0, size[:2]) for x in quantize_index(self.ki.flatten(0, 1), self.L)]

    def append(self, layer, k, v, ki):
        """Write k, v (B, T, Hkv, D) and ki (B, T, D), or None, from slot `length` on -> what the layer now holds, up to
        a whole key block. `advance` moves `length` once all layers have written."""
        T, B = k.size(1), self.length.size(0)
        for name, lane, new in (("k", self.k, k), ("v", self.v, v), ("ki", self.ki, ki)):
            want = (B, T, *lane.shape[3:])
            if new is not None and tuple(new.shape) != want:  # a row too few would be written to every row
                raise ValueError(f"shape of {name} is {tuple(new.shape)}, expected {want}")
        assert self.used + T <= self.capacity, f"{self.used} + {T} tokens do not fit a cache of {self.capacity}"
        slot = (self.length[:, None] + torch.arange(T, device=k.device)).long()                           # (B, T)
        rows = torch.arange(B, device=k.device)[:, None]
        for lane, new in ((self.k, k), (self.v, v), (self.ki, ki)):
            if new is not None:
                lane[layer].index_put_((rows, slot), new)
        if self.coded and ki is not None:  # the blocks that these tokens touch, anew: the bound is a block's
            N = self.capacity // self.L
            block = self.length[:, None] // self.L + torch.arange((T + self.L - 2) // self.L + 1, device=k.device)
            block = block.clamp(max=N - 1).long()                                                         # (B, n)
            fresh = quantize_index(self.ki[layer].unflatten(1, (N, -1))[rows, block].flatten(1, 2), self.L)
            for lane, new in zip(self.coded, fresh):
                lane[layer].unflatten(1, (N, -1))[rows, block] = new.unflatten(1, (block.size(1), -1))
        held = -(-(self.used + T) // self.L) * self.L  # spare slots are invisible: no query has their index
        return tuple(lane[layer, :, :held] for lane in (self.k, self.v, self.ki))

    def int8(self, layer, held):
        """quantize_index of the first `held` slots of a layer, or None."""
        return self.coded and tuple(x[layer, :, :n] for x, n in zip(self.coded, (held, held, held // self.L)))

    def advance(self, T):
        self.length, self.used = self.length + T, self.used + T

    def crop(self, length):
        """Forget every slot from `length` on: an int, or a tensor (B,), which is read back; beyond the end, nothing."""
        limit = torch.as_tensor(length)
        shaped = limit.dim() == 0 or limit.shape == self.length.shape
        if limit.is_floating_point() or not shaped or (limit < 0).any():
            rows = self.length.size(0)
            raise ValueError(f"cannot crop {rows} rows to {limit.tolist()}: expected 0 or more, one or one a row")
        self.length = torch.minimum(self.length, limit.clamp(max=self.capacity).to(self.length))
        self.used = min(self.used, int(limit)) if limit.dim() == 0 else int(self.length.max())

    def expand(self, n):
        """n copies of every row, side by side: a group that shares its prompt."""
        self.select(torch.arange(self.length.size(0), device=self.length.device).repeat_interleave(n))

    def select(self, rows):
        """Keep these rows (int64), in this order."""
        B, rows = self.length.size(0), torch.as_tensor(rows, device=self.length.device)
        if rows.dim() != 1 or rows.dtype != torch.int64 or ((rows < 0) | (rows >= B)).any():
            raise ValueError(f"cannot select rows {rows.tolist()} of {B}: expected int64 from 0 to {B - 1}")
        self.k, self.v, self.ki = self.k[:, rows], self.v[:, rows], self.ki[:, rows]
        self.coded = self.coded and [x[:, rows] for x in self.coded]
        self.length = self.length[rows]
        self.used = int(self.length.max()) if len(rows) else 0  # read back: the longest row may be gone

INT8_SLOTS = 2 ** 22  # from so many slots on, an int8 copy of a cache's index keys saves more than its upkeep takes

@dataclasses.dataclass
class Call:
    """What one forward pass tells every layer."""
    rope: tuple                        # cos, sin
    end: torch.Tensor = None           # (B, Tk) int32, visibility
    weight: torch.Tensor = None        # (B, T) multiplicity
    cache: KVCache = None

class Indexer(nn.Module):
    """MSA's index branch: a query head per KV head, one shared key head. Input detached: only the KL trains it."""

    def __init__(self, cfg):
        super().__init__()
        self.q_proj = Linear(cfg.n_embd, cfg.n_kv_head * cfg.index_head_dim, bias=False)
        self.k_proj = Linear(cfg.n_embd, cfg.index_head_dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(cfg.index_head_dim, cfg), RMSNorm(cfg.index_head_dim, cfg)

    def forward(self, x, rope):
        x, D = x.detach(), self.k_proj.out_features
        qi = self.q_norm(self.q_proj(x).unflatten(-1, (-1, D)))                                         # (B, T, Hkv, D)
        ki = self.k_norm(self.k_proj(x))[:, :, None]                                                      # (B, T, 1, D)
        return apply_rope(qi, rope), apply_rope(ki, rope)[:, :, 0]

class Attention(nn.Module):
    def __init__(self, cfg, attn_type):
        super().__init__()
        self.cfg, H, Hkv, D = cfg, cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.q_proj = Linear(cfg.n_embd, H * D, bias=False)
        self.k_proj = Linear(cfg.n_embd, Hkv * D, bias=False)
        self.v_proj = Linear(cfg.n_embd, Hkv * D, bias=False)
        self.o_proj = Linear(H * D, cfg.n_embd, bias=False)
        # M2 normalises all heads' channels together: split over devices, the norm needs every shard's sum of squares
        self.q_norm, self.k_norm = (RMSNorm(D * (n if cfg.qk_norm == "layer" else 1), cfg) for n in (H, Hkv))
        self.indexer = Indexer(cfg) if attn_type == "msa" else None

    def heads(self, x, proj, norm):
        """Project and normalise, over all channels (M2) or head by head (M3): (B, T, C) -> (B, T, heads, D)."""
        x, D = proj(x), self.cfg.head_dim
        return norm(x).unflatten(-1, (-1, D)) if self.cfg.qk_norm == "layer" else norm(x.unflatten(-1, (-1, D)))

    def project(self, x, rope):
        q = apply_rope(self.heads(x, self.q_proj, self.q_norm), rope)                                     # (B, T, H, D)
        k = apply_rope(self.heads(x, self.k_proj, self.k_norm), rope)                                   # (B, T, Hkv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.cfg.head_dim))
        return q, k, v, *(self.indexer(x, rope) if self.indexer else (None, None))

    def forward(self, q, k, v, qi, ki, layer, call, replay=None):
        """What `project` gives -> y (B, T, H, D), aux. `replay` (B, T, Hkv, S) is a recorded block_idx.
        MSA has full attention while the indexer warms up, adds the KL in training, and its recall in evaluation."""
        start, aux = None, {}
        if call.cache is not None:
            start = call.cache.length
            k, v, ki = call.cache.append(layer, k, v, ki)
        if self.indexer is None:
            return full_attention(q, k, v, call.end, start), aux
        S, L, learns = self.cfg.index_topk_blocks, self.cfg.index_block_size, self.training and call.cache is None
        share = call.end, call.weight, self.cfg.index_kl_stride
        if self.cfg.index_warmup:
            y, block_idx = full_attention(q, k, v, call.end, start), None
            if learns:
                aux["index_kl"] = index_kl_loss(qi, ki, q, k, None, L, *share)
        elif start is not None and replay is None:
            y, block_idx = msa_decode(q, k, v, qi, ki, S, L, start, call.end, int8=call.cache.int8(layer, ki.size(1)))
        else:
            block_idx = select_blocks(qi, ki, S, L, call.end, start) if replay is None else replay
            if learns:
                y, aux["index_kl"] = msa_train(q, k, v, qi, ki, block_idx, L, *share)
            else:
                y = msa_attention(q, k, v, block_idx, L, call.end, start)
        if call.cache is None and not self.training:  # the dense reference, on the batch's first row alone
            names, x = ("block_recall", "score_recall", "block_chance"), (qi[:1], ki[:1], q[:1], k[:1])
            aux.update(zip(names, block_recall(*x, S, L, None if call.end is None else call.end[:1])))
        return y, aux if block_idx is None else {**aux, "block_idx": block_idx}

class Block(nn.Module):
    def __init__(self, cfg, attn_type, mlp_type):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(cfg.n_embd, cfg), RMSNorm(cfg.n_embd, cfg)
        self.attn = Attention(cfg, attn_type)
        self.mlp = MoE(cfg) if mlp_type == "moe" else MLP(cfg.n_embd, cfg.dense_dim, cfg.activation)

    def enter(self, x, rope):
        return self.attn.project(self.attn_norm(x), rope)

    def leave(self, x, y, weight, experts):
        x = x + self.attn.o_proj(y.flatten(2))
        if isinstance(self.mlp, MLP):
            return x + self.mlp(self.mlp_norm(x)), {}
        y, load, experts = self.mlp(self.mlp_norm(x), weight, experts)
        return x + y, dict(expert_load=load, experts=experts)

    def forward(self, x, layer, call, block_idx=None, experts=None):
        """Attention lies between two halves that torch.compile can fuse (train.py, on a GPU)."""
        y, aux = self.attn(*self.enter(x, call.rope), layer, call, block_idx)
        x, more = self.leave(x, y, call.weight, experts)
        return x, {**aux, **more}

class MTP(nn.Module):
    """Module k of multi-token prediction: from the hidden state at i of depth k-1 and the embedding of token i+k, the
    token i+k+1. One Transformer block like the trunk's last; embedding and head are the trunk's."""

    def __init__(self, cfg):
        super().__init__()
        self.h_norm, self.e_norm, self.norm = (RMSNorm(cfg.n_embd, cfg) for _ in range(3))
        self.proj = Linear(2 * cfg.n_embd, cfg.n_embd, bias=False)
        self.block = Block(cfg, cfg.attn_types[-1], cfg.mlp_types[-1])

    def forward(self, h, emb, layer, call):
        # not published: the order of the two halves; DeepSeek-V3's code has the embedding first
        return self.block(self.proj(torch.cat([self.e_norm(emb), self.h_norm(h)], -1)), layer, call)

# One program = one row of logits. The second pass finds in the L2 what the first has read: few rows are under way.
@jit
def _softmax_loss_kernel(logits, y, loss, V, COLS: tl.constexpr):
    c, row, t = tl.arange(0, COLS), logits + tl.program_id(0).to(tl.int64) * V, tl.load(y + tl.program_id(0))
    m, l = tl.full([COLS], LEAST, tl.float32), tl.zeros([COLS], tl.float32)
    for v in range(0, V, COLS):
        x = tl.load(row + v + c, mask=v + c < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(m, x)
        l, m = l * tl.exp(m - new) + tl.exp(x - new), new
    lse = tl.max(m, 0)
    lse += tl.log(tl.sum(l * tl.exp(m - lse), 0))
    tl.store(loss + tl.program_id(0), tl.where(t < 0, 0.0, lse - tl.load(row + tl.maximum(t, 0)).to(tl.float32)))
    tl.debug_barrier()  # the target's logit is read before it is written
    for v in range(0, V, COLS):
        x = tl.exp(tl.load(row + v + c, mask=v + c < V, other=0.0).to(tl.float32) - lse) - (v + c == t).to(tl.float32)
        tl.store(row + v + c, tl.where(t < 0, 0.0, x).to(logits.dtype.element_ty), mask=v + c < V)

def softmax_loss(logits, y, impl="auto"):
    """Cross-entropy of logits (n, V) and targets y (n,), -1 = none -> (n,), fp32 or wider. The gradient of their sum is
    written over the logits. impl: auto (Triton on a GPU in 16 bits), triton (logits must be contiguous) or torch."""
    wide, V = torch.promote_types(logits.dtype, torch.float32), logits.size(1)
    if impl == "triton" or (impl == "auto" and triton and logits.is_cuda and logits.dtype.itemsize == 2):
        assert logits.is_contiguous(), f"logits have strides {logits.stride()}, expected {(V, 1)}"
        loss, cols = torch.empty(len(y), device=y.device, dtype=wide), min(8192, triton.next_power_of_2(V))
        _softmax_loss_kernel[len(y),](logits, y.contiguous(), loss, V, cols, num_warps=max(1, cols // 512))
        return loss
    logp, t = logits.log_softmax(-1, dtype=wide), y.clamp(min=0)[:, None]
    loss = torch.where(y >= 0, -logp.gather(1, t)[:, 0], 0)
    logits.copy_(logp.exp_().scatter_add_(1, t, logp.new_full(t.shape, -1)).mul_((y >= 0)[:, None]))  # one matrix more
    return loss

def token_loss(h, W, y):
    """Sum of the losses of hidden (n, C) under head (V, C), fp32 or wider; targets y (n,), -1 = none."""
    logits = (h @ W.to(h.dtype).T).to(torch.promote_types(h.dtype, torch.float32))                            # (n, V)
    return F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")

class _InChunks(torch.autograd.Function):
    """token_loss over chunks of rows. A chunk's gradient is taken at once: its logits are not kept, or made again."""

    @staticmethod
    def forward(ctx, h, W, y, chunk):
        dh, dW, w, total = torch.empty_like(h), torch.zeros_like(W), W.to(h.dtype), 0.0
        for x, t, dx in zip(h.split(chunk), y.split(chunk), dh.split(chunk)):
            logits = x @ w.T                                                                                  # (n, V)
            total = total + softmax_loss(logits, t).sum()  # from here on they are their own gradient
            dx[:] = logits @ w
            dW += logits.T @ x
        ctx.save_for_backward(dh, dW)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *((grad * x).to(x.dtype) for x in ctx.saved_tensors), None, None

def cross_entropy(h, W, targets, chunk=None):
    """Mean loss of hidden (B, T, C), 0 if there is no target. A chunk has at most 2^30 logits (in torch, twice)."""
    h, y, chunk = h.flatten(0, 1), targets.flatten(), chunk or 2 ** (30 - len(W).bit_length())
    if torch.is_grad_enabled() and (h.is_cuda or len(y) > chunk):
        total = _InChunks.apply(h, W, y, chunk)
    else:
        total = sum(token_loss(x, W, t) for x, t in zip(h.split(chunk), y.split(chunk)))
    return total / (y >= 0).sum().clamp(min=1)

class MiniMax(nn.Module):
    """`dtype` is what activations are computed in; weights keep theirs (fp32 in training) and are cast where used."""

    def __init__(self, cfg, dtype=None):
        super().__init__()
        cfg.check(dtype or torch.get_default_dtype())  # once more: fields may have been set since
        self.cfg = cfg
        self.recompute = False
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg, a, m) for a, m in zip(cfg.attn_types, cfg.mlp_types))
        self.norm = RMSNorm(cfg.n_embd, cfg)
        self.lm_head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTP(cfg) for _ in range(cfg.n_mtp))
        self.asked_dtype = dtype
        self.first_dtype = self.embed.weight.dtype
        self.init_weights()

    @property
    def dtype(self):
        """dtype of activations and cache: what the constructor was told, or the weights' own, as after .double()."""
        weights = self.embed.weight.dtype
        if self.asked_dtype is None or weights != self.first_dtype:
            return weights
        return self.asked_dtype

    @torch.no_grad()
    def init_weights(self):
        """Normal, std n_embd ** -0.5 (0.018 at M2's width). What writes to the residual stream starts smaller by
        sqrt(2 n_layer), GPT-2's rule; the head by 4, so that the first loss is ln V."""
        std = self.cfg.n_embd ** -0.5
        for name, p in self.named_parameters():
            if p.dim() > 1:  # a norm starts as the identity
                residual = name.endswith(("o_proj.weight", "w2", "w2.weight"))
                less = 4 if name == "lm_head.weight" else (2 * self.cfg.n_layer) ** 0.5 if residual else 1
                p.normal_(0, std / less)

    def forward(self, idx, targets=None, weight=None, cache=None, pos=None, end=None, replay=None, n_logits=None):
        """idx (B, T) -> logits, loss, aux (flat dict of tensors).
        targets (B, T): the token after each, -1 = no loss. Without n_logits they give the loss in chunks, and logits
        None; otherwise logits (B, n, V) of the last n_logits positions, None = all. loss: next-token loss alone.
        weight (B, T): multiplicity, 0 = pad. pos (B, T): default counts on from the cache. end (B, Tk): default causal.
        replay: an earlier aux, whose block_idx and experts are used again. aux: expert_load (layers with experts, E),
        experts (n, B, T, A), block_idx (layers with MSA, B, T, Hkv, S), hidden (B, T, C) before the last norm;
        mtp_losses (MTP modules,) and mtp_loss, their mean, with targets; index_kl in training; block_recall,
        score_recall, block_chance in evaluation."""
        B, T = idx.shape
        if B == 0 or T == 0:
            raise ValueError(f"idx {(B, T)}: at least one row of at least one token")
        if pos is None:
            pos = query_index(T, None if cache is None else cache.length, idx.device).expand(B, T)
        call = Call(rope_tables(pos, self.cfg.rotary_dim, self.cfg.rope_theta), end, weight, cache)
        x, aux = self.embed(idx).to(self.dtype), {}
        blocks, experts = (iter((replay or {}).get(key, ())) for key in ("block_idx", "experts"))
        for i, layer in enumerate(self.layers):
            args = (x, i, call, next(blocks, None) if layer.attn.indexer else None,
                    next(experts, None) if isinstance(layer.mlp, MoE) else None)
            x, more = checkpoint(layer, *args, use_reentrant=False) if self.recompute else layer(*args)
            for key, value in more.items():
                aux.setdefault(key, []).append(value)
        mtp = {}
        if targets is not None and self.cfg.mtp_active and self.mtp:
            mtp["mtp_losses"] = self.mtp_forward(x, idx, targets, call, aux)
            mtp["mtp_loss"] = mtp["mtp_losses"].sum() / len(self.mtp)
        if cache is not None:
            cache.advance(T)
        aux = {key: torch.stack(value) for key, value in aux.items()} | mtp
        x, aux["hidden"] = self.norm(x), x
        loss = None if targets is None else cross_entropy(x, self.lm_head.weight, targets)
        if targets is not None and n_logits is None:
            return None, loss, aux
        return self.lm_head(x if n_logits is None else x[:, max(0, T - n_logits):]), loss, aux

    def mtp_forward(self, h, idx, targets, call, aux):
        """Each MTP module's mean loss (modules,). Module k works on positions with a k-th next token in the layout;
        what lies past the end of a document is seen by none and has no target."""
        losses, T = [], idx.size(1)
        for k, module in enumerate(self.mtp[:T - 1], 1):
            n, shifted = T - k, targets[:, k:]
            cos, sin, end, weight = (None if t is None else t[:, :n] for t in (*call.rope, call.end, call.weight))
            if end is not None:
                has = torch.arange(k, T, device=idx.device) < end  # where not: no target, KL or count of the router's
                shifted, weight = shifted.where(has, -1), has.float() if weight is None else weight * has
            h, more = module(h[:, :n], self.embed(idx[:, k:]).to(h.dtype), self.cfg.n_layer + k - 1,
                             Call((cos, sin), end, weight))
            losses.append(cross_entropy(module.norm(h), self.lm_head.weight, shifted))
            for key in more.keys() & {"expert_load", "index_kl"}:
                aux.setdefault(key, []).append(more[key])
        return torch.stack(losses) if losses else h.new_zeros(0)

    def num_params(self):
        """Total, and active for one token: no embedding, head or MTP, of the experts the chosen (the report's 9.8B)."""
        total, active = count_params(self)
        return total, active - 2 * self.embed.weight.numel() - sum(count_params(module)[1] for module in self.mtp)

    def flops_per_token(self, pos, real=None):
        """Executed FLOPs a token of a training step, MTP and warm-up as they stand, for tokens at pos (B, T) of their
        documents: 6 per active parameter and head (4 in the index branch, whose input gets no gradient), 12 H D per key
        read; scores of all earlier blocks but in the warm-up; KL, teacher included, of every stride-th query.
        real (B, T) bool: the mean is over these tokens alone, and pads are left out; default: all."""
        pos = pos if real is None else pos[real]
        cfg, mtp, head = self.cfg, self.mtp if self.cfg.mtp_active else [], self.embed.weight.numel()
        more, own = (cfg.index_topk_blocks - 1) * cfg.index_block_size, pos % cfg.index_block_size + 1  # keys
        seen, few, own = (x.double().mean().item() for x in (pos + 1, (pos + 1).minimum(more + own), own))
        read, scored = (seen, 0) if cfg.index_warmup else (few, seen - own)
        kinds, width = cfg.attn_types + cfg.attn_types[-1:] * len(mtp), (cfg.n_kv_head + 1) * cfg.index_head_dim
        main, index = 12 * cfg.n_head * cfg.head_dim, 2 * cfg.n_kv_head * cfg.index_head_dim
        learn = (main / 6 + 3 * index) * read / cfg.index_kl_stride + index * scored - 2 * cfg.n_embd * width
        attention = main * seen * kinds.count("full") + (main * read + learn) * kinds.count("msa")
        return 6 * (self.num_params()[1] + head + sum(count_params(m)[1] + head for m in mtp)) + attention

    def moe_layers(self):
        """Every mixture of experts, trunk then MTP: the rows of aux["expert_load"]."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    def update_router_bias(self, load, rate):
        """One step of load balancing, after the optimizer's. load (layers with experts, E) = aux["expert_load"]."""
        for layer, row in zip(self.moe_layers(), load):
            update_bias(layer.router.bias, row, rate)

    @classmethod
    def from_hf(cls, path, device="cpu", dtype=torch.float32):
        """Read a checkpoint folder of transformers or of the release: M2, or M3's text model; shards and fp8 too.
        ValueError for a field that this code does not compute, and for a tensor that is missing, unknown, there twice,
        of another shape, or quantized in a way that is not understood."""
        hf = read_json(path, "config.json")
        try:
            with torch.device("meta"):
                model = cls(config_from_hf(hf), dtype).to(dtype).to_empty(device=device)
        except AssertionError as error:
            raise ValueError(f"{path}: {error}") from None
        params, filled = model.state_dict(), set()
        missing = {name: p.numel() for name, p in params.items()}
        for name, t in read_tensors(path, hf):
            ours, part = locate(params, name)
            if ours is None or part.shape != t.shape:
                want = "no such tensor in the model" if ours is None else f"the model needs {tuple(part.shape)}"
                raise ValueError(f"{path}: {name} {tuple(t.shape)}: {want}")
            place = ours, part.storage_offset()
            if place in filled:
                raise ValueError(f"{path}: {name}: another tensor has filled {ours}")
            filled.add(place)
            part.copy_(t)
            missing[ours] -= t.numel()
        if any(missing.values()):
            raise ValueError(f"{path}: missing or incomplete: {', '.join(n for n, m in missing.items() if m)}")
        return model

    def save_hf(self, path):
        """Write an M2 checkpoint in the released names; bit-equal when read back. ValueError for any other model, and
        for a folder that holds other weights: whoever reads it could not tell them apart."""
        from safetensors.torch import save_file
        n = self.cfg.n_layer
        m2 = dict(attn_types=["full"] * n, mlp_types=["moe"] * n, n_mtp=0, shared_dim=0, routed_scale=1.0,
                  activation="swiglu", gemma_norm=False, qk_norm="layer")
        for name, only in m2.items():
            value = getattr(self.cfg, name)
            if value != only:
                raise ValueError(f"save_hf writes M2, whose {name} is {only}; this model has {value}")
        others = {f.name for f in Path(path).glob("*.safetensors*")} - {"model.safetensors"}
        if others:
            raise ValueError(f"save_hf: {path} holds other weights: {', '.join(sorted(others))}")
        attn = [f"self_attn.{x}.weight" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
        experts = [f"experts.{e}.w{i}.weight" for e in range(self.cfg.n_expert) for i in (1, 2, 3)]
        moe = [f"block_sparse_moe.{x}" for x in ("gate.weight", "e_score_correction_bias", *experts)]
        layer = ["input_layernorm.weight", "post_attention_layernorm.weight", *attn, *moe]
        names = [f"model.layers.{n}.{x}" for n in range(self.cfg.n_layer) for x in layer]
        names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        params = self.state_dict()
        tensors = {name: locate(params, name)[1].contiguous() for name in names}
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(path, "model.safetensors"), {"format": "pt"})
        config = config_to_hf(self.cfg, str(self.embed.weight.dtype).removeprefix("torch."))
        Path(path, "config.json").write_text(json.dumps(config, indent=2))

# ---- checkpoints of others -------------------------------------------------------------------------------------

# tensors that take no part in the text model's forward, under any prefix: M3's vision tower and MTP modules; scales of
# activations and of a quantized cache, for this code quantizes neither
UNUSED = re.compile(r"(^|\.)(vision_tower|vision_model|multi_modal_projector|patch_merge_mlp|mtp\w*)\."
                    r"|\.(input_scale|activation_scale|[qkv]_scale)$")
HF_NAMES = (  # released names and transformers' in-memory names -> ours, in this order
    (r"^language_model\.", ""), (r"^model\.(language_model\.)?", ""), (r"^embed_tokens", "embed"),
    (r"\.input_layernorm", ".attn_norm"), (r"\.post_attention_layernorm", ".mlp_norm"),
    (r"\.self_attn\.index_([qk])_", r".attn.indexer.\1_"), (r"\.self_attn", ".attn"), (r"\.block_sparse_moe", ".mlp"),
    (r"\.mlp\.(gate\.)?e_score_correction_bias", ".mlp.router.bias"), (r"\.mlp\.gate\.", ".mlp.router."),
    (r"\.shared_experts", ".shared"), (r"\.experts\.gate_up_proj$", ".w13"), (r"\.experts\.down_proj$", ".w2"),
    (r"gate_up_proj", "w13"), (r"gate_proj", "w1"), (r"up_proj", "w3"), (r"down_proj", "w2"))

INDEX = "model.safetensors.index.json"
SCALES = ("_scale_inv", "_scale")  # what a scale's name adds to its tensor's; both are factors, in spite of "inv"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

def read_json(path, name):
    """The object in a folder's JSON file. ValueError, naming the file, if it cannot be read or holds another type."""
    try:
        found = json.loads(Path(path, name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name} holds a {type(found).__name__}, not an object")
    return found

def inner(fields, key):
    """The dict in a field, {} where the field is absent or null. ValueError for any other type."""
    found = fields.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} {str(found)[:40]}: only an object or null")
    return found

def find_tensors(path):
    """Where each tensor of a folder lies: {name: open file}. The index decides which files and tensors count; without
    one, every safetensors file does. ValueError for what the index names and the folder lacks, and for a file that is
    damaged."""
    from safetensors import SafetensorError, safe_open
    listed = None
    if Path(path, INDEX).exists():
        listed = inner(read_json(path, INDEX), "weight_map")
        if not listed or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError(f"{path}: {INDEX} has no weight_map of file names")
    names = sorted(set(listed.values()) if listed else (f.name for f in Path(path).glob("*.safetensors")))
    if not names:
        raise ValueError(f"{path}: no *.safetensors file")
    where = {}
    for file in names:
        if not Path(path, file).exists():
            raise ValueError(f"{path}: {file} is missing, {INDEX} names it")
        try:
            opened = safe_open(Path(path, file), "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {file} cannot be read: {error}") from None
        for name in opened.keys():
            if listed is None and name in where:
                raise ValueError(f"{path}: {name} is in two files, and no {INDEX} says which counts")
            if listed is None or listed.get(name) == file:
                where[name] = opened
    for name, file in (listed or {}).items():
        if name not in where:
            raise ValueError(f"{path}: {name} is not in {file}, where {INDEX} has it")
    return where

def read_tensors(path, hf):
    """Yield (name, tensor) of every text tensor in a folder; fp8 comes back as fp32. hf is its config.json."""
    hf = {**hf, **inner(hf, "text_config")}
    n, quant = hf["num_hidden_layers"], inner(hf, "quantization_config")
    mtp = range(n, n + max(hf.get("num_mtp_modules") or 0, hf.get("num_nextn_predict_layers") or 0))
    where = {}  # where the text model's tensors lie; MTP modules may be numbered as layers after the last
    for name, file in find_tensors(path).items():
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if not UNUSED.search(name) and not (layer and int(layer[1]) in mtp):
            where[name] = file
    for name in sorted(where):
        t, scales = where[name].get_tensor(name), [name + suffix for suffix in SCALES if name + suffix in where]
        if name.endswith(SCALES):
            owner = re.sub("_scale(_inv)?$", "", name)
            if owner not in where:
                raise ValueError(f"{path}: {name} scales {owner}, which is missing")
        elif t.dtype in FLOATS and not scales:
            yield name, t
        elif t.dtype in FP8 and len(scales) == 1:
            try:
                yield name, dequantize(t, where[scales[0]].get_tensor(scales[0]), quant)
            except ValueError as error:
                raise ValueError(f"{path}: {scales[0]}: {error}") from None
        else:
            had = f"{t.dtype} with {len(scales)} scales"
            raise ValueError(f"{path}: {name} is {had}: fp8 has one, floats of 16 bits or more have none")

def dequantize(t, scale, quant):
    """fp8 t (..., rows, columns) times its scale -> fp32. The scale is one number for all of t, or for each tile, row
    or matrix. quant, config.json's quantization_config, has the tile's size. ValueError if the scale does not fit."""
    method, named = quant.get("quant_method", "fp8"), quant.get("weight_block_size")
    if method not in ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt"):
        raise ValueError(f"quant_method {method} is not understood")
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = scale.view(torch.float8_e8m0fnu)  # the byte of an exponent: 2 ** (byte - 127), and 255 is NaN
    elif scale.dtype not in FLOATS:
        raise ValueError(f"a scale in {scale.dtype} is not understood")
    scale = scale.float()
    if not (scale.isfinite() & (scale >= 0)).all():
        raise ValueError("the scale holds a number that is negative or not finite")
    if scale.dim() < 2 and scale.numel() == 1:
        return t.float() * scale
    if t.dim() < 2:
        raise ValueError(f"a scale {tuple(scale.shape)} does not fit a tensor {tuple(t.shape)}")
    *lead, rows, cols = t.shape
    if named is not None:
        if not isinstance(named, list) or len(named) != 2 or any(type(size) is not int or size < 1 for size in named):
            raise ValueError(f"weight_block_size {named}: two whole numbers from 1")
        tiles = [named]
    elif "weight_block_size" not in quant and method in ("fp8", "mxfp8"):  # the usual ones of both
        tiles = [(1, cols), (rows, cols), (128, 128), (1, 32)]
    else:
        tiles = [(1, cols), (rows, cols)]
    for high, wide in tiles:
        grid = (*lead, -(-rows // high), -(-cols // wide))
        # numbers for whole rows or matrices may lack the last dimensions, which are 1
        if scale.numel() == math.prod(grid) and scale.shape == grid[:scale.dim()]:
            full = scale.view(grid).repeat_interleave(high, -2)[..., :rows, :]
            return t.float() * full.repeat_interleave(wide, -1)[..., :cols]
    sizes = ", ".join(f"{high} x {wide}" for high, wide in tiles)
    raise ValueError(f"a scale {tuple(scale.shape)} does not fit a tensor {tuple(t.shape)} in tiles of {sizes}")

def locate(params, name):
    """The part of our parameters that a tensor of that name fills -> (our name, a view of it), or (None, None)."""
    for pattern, ours in HF_NAMES:
        name = re.sub(pattern, ours, name)
    name, expert, which = re.fullmatch(r"(.*?)(?:\.experts\.(\d+))?(?:\.(w[123])\.weight)?", name).groups()
    if which:
        name = f"{name}.{'w2' if which == 'w2' else 'w13'}" + ("" if expert else ".weight")
    if name not in params or (expert and int(expert) >= params[name].size(0)):
        return None, None
    part = params[name][int(expert)] if expert else params[name]
    return name, part.chunk(2)[which == "w3"] if which in ("w1", "w3") else part  # gate and up: halves

COUNT_NAMES = dict(  # ours, the release's
    vocab_size="vocab_size", n_layer="num_hidden_layers", n_embd="hidden_size", n_head="num_attention_heads",
    n_kv_head="num_key_value_heads", head_dim="head_dim", max_seq_len="max_position_embeddings",
    expert_dim="intermediate_size", n_expert="num_local_experts", n_expert_per_tok="num_experts_per_tok")
INDEX_NAMES = dict(  # ours, the name of transformers and that of the release
    index_head_dim=("index_head_dim", "sparse_index_dim"), index_block_size=("index_block_size", "sparse_block_size"),
    index_topk_blocks=("index_topk_blocks", "sparse_topk_blocks"))

# Fields that change what a model computes, and the values that this code computes; a field may be absent or null.
FIXED = dict(
    # router and experts
    scoring_func=["sigmoid"], use_routing_bias=[True], norm_topk_prob=[True], topk_method=["noaux_tc"],
    n_group=[0, 1], num_expert_group=[0, 1], topk_group=[0, 1], router_jitter_noise=[0], decoder_sparse_step=[1],
    mlp_only_layers=[[]], mlp_bias=[False],
    # attention
    use_qk_norm=[True], attention_output_gate=[False], attn_output_gate=[False], attention_dropout=[0],
    attention_bias=[False], qkv_bias=[False], attention_out_bias=[False], use_bias=[False],
    sliding_window=[], use_sliding_window=[False], attn_logit_softcapping=[],
    rope_type=["default"], use_rope=[True], rope_interleave=[False], rope_interleaved=[False],
    # residual stream and head
    postnorm=[False], layernorm_full_attention_alpha=[1], layernorm_full_attention_beta=[1], layernorm_mlp_alpha=[1],
    layernorm_mlp_beta=[1], final_logit_softcapping=[], tie_word_embeddings=[False])
FIXED_M2 = dict(
    hidden_act=["silu"], use_gemma_norm=[False], qk_norm_type=["per_layer"], routed_scaling_factor=[1],
    shared_intermediate_size=[0], n_shared_experts=[0], swiglu_alpha=[], swiglu_beta=[], swiglu_limit=[],
    sparse_attention_config=[{}])
FIXED_M3 = dict(  # transformers writes "silu", and computes swigluoai
    hidden_act=["swigluoai", "silu"], use_gemma_norm=[True], qk_norm_type=["per_head"], n_shared_experts=[1],
    swiglu_alpha=[1.702], swiglu_beta=[1], swiglu_limit=[7])
FIXED_MSA = dict(  # where layers have MSA
    use_sparse_attention=[True], sparse_init_block=[0], index_init_blocks=[0], sparse_local_block=[1],
    index_local_blocks=[1], sparse_score_type=["max"], index_score_type=["max"])
ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
SPARSE_FIELDS = {
    "use_sparse_attention", "sparse_attention_freq", "sparse_num_index_heads", "sparse_index_dim", "sparse_block_size",
    "sparse_topk_blocks", "sparse_init_block", "sparse_local_block", "sparse_score_type", "sparse_disable_index_value"}
ATTN_LISTS = dict(  # lists with an entry a layer -> what an entry means
    layer_types=dict(full_attention="full", minimax_m3_sparse="msa"), sparse_attention_freq={0: "full", 1: "msa"})
MLP_LISTS = dict(mlp_layer_types=dict(dense="dense", sparse="moe"), moe_layer_freq={0: "dense", 1: "moe"})

def allow(places, allowed):
    """ValueError for a field that has another value than those allowed, in any of the places, which are dicts."""
    for key, values in allowed.items():
        for place in places:
            found = place.get(key)
            if found is not None and found not in values:
                raise ValueError(f"{key} {found}: only {' or '.join(str(x) for x in values) or 'null'}")

def only_fields(place, name, known):
    """ValueError for a field of the dict `name` that is not known: all of its fields change what a model computes."""
    for key, value in place.items():
        if key not in known and value is not None:
            raise ValueError(f"{name} has {key} {value}: only {', '.join(sorted(known))}")

def pick(hf, *names, kinds=(int,)):
    """The value of a field that has these names. ValueError without a value, with two, or for one of another type."""
    found = [hf[name] for name in names if hf.get(name) is not None]
    if not found:
        raise ValueError(f"config.json lacks {' or '.join(names)}")
    if any(value != found[0] for value in found):
        raise ValueError(f"{' and '.join(names)} disagree: {found}")
    if type(found[0]) not in kinds:
        raise ValueError(f"{' or '.join(names)} {found[0]!r}: {' or '.join(kind.__name__ for kind in kinds)}")
    return found[0]

def layer_list(hf, n, lists, kinds, default):
    """The types of n layers from the lists that a config has; all of them default without any. ValueError for a list of
    another length or with an entry that means none of `kinds`, and for two lists that disagree."""
    found = {}
    for key, meaning in lists.items():
        entries, known = hf.get(key), [entry for entry in meaning if meaning[entry] in kinds]
        if entries is None:
            continue
        if not isinstance(entries, list) or len(entries) != n or any(entry not in known for entry in entries):
            raise ValueError(f"{key} {entries}: a list of {n}, each {' or '.join(str(x) for x in known)}")
        found[key] = [meaning[entry] for entry in entries]
    return pick(found, *lists, kinds=(list,)) if found else [default] * n

def rotary_channels(hf, rope, head_dim, rotary_dim):
    """Channels of a head that rotate: head_dim times partial_rotary_factor, which the RoPE dict or else the config has,
    and rotary_dim, None = the whole head, where neither has it."""
    factor = 1.0 if rotary_dim is None else rotary_dim / head_dim
    if hf.get("partial_rotary_factor") is not None:
        factor = hf["partial_rotary_factor"]
    factor = rope.get("partial_rotary_factor", factor)
    if type(factor) not in (int, float) or not 0 <= factor <= 1:
        raise ValueError(f"partial_rotary_factor {factor}, rotary_dim {rotary_dim}: a part of {head_dim} channels")
    return int(head_dim * factor)

def config_from_hf(hf):
    """config.json of MiniMax-M2, or of M3 (its text part) -> MiniMaxConfig. ValueError for any other model, and for a
    field with a value that this code does not compute."""
    text = inner(hf, "text_config")
    model_type = hf.get("model_type") or text.get("model_type")  # the released M3's text_config says minimax_m2
    if model_type not in ("minimax_m2", "minimax_m3", "minimax_m3_text", "minimax_m3_vl", "minimax_m3_vl_text"):
        raise ValueError(f"model_type {model_type}: minimax_m2 or minimax_m3_vl")
    m2, sparse = model_type == "minimax_m2", inner({**hf, **text}, "sparse_attention_config")
    ropes = []
    for place in (text, hf):
        for key in ("rope_scaling", "rope_parameters"):
            ropes.append({name: value for name, value in inner(place, key).items() if value is not None})
    ropes = [fields for fields in ropes if fields]
    rope, places = ropes[0] if ropes else {}, [hf, text, sparse, *ropes]
    allow(ropes, dict(type=FIXED["rope_type"]))
    allow(places, {**FIXED, **(FIXED_M2 if m2 else FIXED_M3)})
    for fields in ropes:
        only_fields(fields, "rope_parameters or rope_scaling", ROPE_FIELDS)
    only_fields(sparse, "sparse_attention_config", SPARSE_FIELDS)

    hf = {**hf, **text, **sparse}
    found = {ours: pick(hf, theirs) for ours, theirs in COUNT_NAMES.items()}
    n, head_dim = found["n_layer"], found["head_dim"]
    found["norm_eps"] = pick(hf, "rms_norm_eps", kinds=(int, float))
    found["rope_theta"] = float(pick({**hf, **rope}, "rope_theta", kinds=(int, float)))
    found["attn_types"] = layer_list(hf, n, ATTN_LISTS, ["full"] if m2 else ["full", "msa"], "full")
    found["mlp_types"] = layer_list(hf, n, MLP_LISTS, ["moe"] if m2 else ["dense", "moe"], "moe")
    if not m2:
        found.update(M3_STYLE, shared_dim=pick(hf, "shared_intermediate_size"),
                     routed_scale=pick(hf, "routed_scaling_factor", kinds=(int, float)))
    if "dense" in found["mlp_types"]:
        found["dense_dim"] = pick(hf, "dense_intermediate_size")
    if sparse and hf.get("layer_types") is None:  # nothing else says which layers are sparse
        pick(hf, "sparse_attention_freq", kinds=(list,))
    dense_first = [*found["mlp_types"], "moe"].index("moe")
    allow(places, dict(num_experts=[found["n_expert"]], moe_intermediate_size=[found["expert_dim"]],
                       first_k_dense_replace=[dense_first], attn_type_list=[[1] * n]))  # 1: softmax, sparse or not
    if "msa" in found["attn_types"]:
        found.update({ours: pick(hf, *names) for ours, names in INDEX_NAMES.items()})
        heads, score_only = [found["n_kv_head"]], [int(kind == "msa") for kind in found["attn_types"]]
        allow(places, dict(FIXED_MSA, sparse_num_index_heads=heads, index_n_heads=heads,
                           sparse_disable_index_value=[score_only, [1] * n, True]))
    # transformers writes rotary_dim 64 into any M3, and rotates the whole head without a factor. Index heads narrower
    # than a head have no channels for that: in the release's form, without a RoPE dict, rotary_dim must be meant.
    narrow = not ropes and found.get("index_head_dim", head_dim) < head_dim
    given = hf.get("rotary_dim") is not None and (m2 or narrow)
    found["rotary_dim"] = rotary_channels(hf, rope, head_dim, pick(hf, "rotary_dim") if given else None)
    try:
        return MiniMaxConfig(**found)
    except AssertionError as error:
        raise ValueError(f"config.json: {error}") from None

def config_to_hf(cfg, dtype):
    """An M2 config in the released fields, and partial_rotary_factor: transformers up to 5.12 reads it alone."""
    factor = cfg.rotary_dim / cfg.head_dim
    if int(cfg.head_dim * factor) < cfg.rotary_dim:  # rounded down, and so will be what is read: 30 of 88, say
        factor = math.nextafter(factor, 1)
    return {**{theirs: getattr(cfg, ours) for ours, theirs in COUNT_NAMES.items()}, "model_type": "minimax_m2",
            "architectures": ["MiniMaxM2ForCausalLM"], "dtype": dtype, "hidden_act": "silu",
            "rms_norm_eps": cfg.norm_eps, "rotary_dim": cfg.rotary_dim, "partial_rotary_factor": factor,
            "rope_theta": cfg.rope_theta, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": None, "use_qk_norm": True, "qk_norm_type": "per_layer",
            "scoring_func": "sigmoid", "use_routing_bias": True}
