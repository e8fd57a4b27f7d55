"""MiniMax-M2 and the text model of MiniMax-M3: one config, one cache, one forward for training, prefill and decode.

    x -> embedding -> n_layer x { x += attention(norm(x));  x += mlp(norm(x)) } -> norm -> head -> logits
                                                                                \\-> MTP modules: tokens after the next
    attention   grouped queries, norms on q and k, RoPE on the first rotary_dim channels; every visible key ("full": M2,
                the first 3 layers of M3) or chosen blocks ("msa"); for comparison the last keys alone ("swa"), or a
                state of fixed size in place of keys ("lightning": MiniMax-01)
    mlp         mixture of experts ("moe"), or one dense gated MLP (the first 3 layers of M3)

                M2                                               M3
    norms       weight * x, q and k over all heads at once       (1 + weight) * x, q and k head by head
    experts     256, 8 active, SwiGLU                            128, 4 active, scaled by 2, + 1 shared, clamped SwiGLU

Legend for every file: B T C batch, tokens, channels; H query heads, Hkv key/value heads, G = H // Hkv, D head dim;
E experts, A active per token; N key blocks, S selected blocks, L tokens per key block; K MTP modules. i, j = place in
the row, or slot in the cache: visibility and key blocks go by it, block = i // L. pos = position on the token's own
path: RoPE goes by it. They differ in packed rows and prefix trees. end: see msa.py. Shapes (B, T, H, D).

Not published: initialisation, MTP's weights. MTP follows DeepSeek-V3 (arXiv 2412.19437): its first module reads the
trunk's hidden states before `norm`.
"""
import copy
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe import (SWIGLU_ALPHA, SWIGLU_LIMIT, MLP, Linear, MoE, count_params, experts_loop, few_linear, few_mlp,
                 few_route, update_bias, use_triton)
from msa import (LEAST, NOTHING, TensorDescriptor, _compiled, _matmul, _overlap, _pick, block_recall, cdiv,
                 check_tensor, constexpr, full_attention, index_kl_loss, jit, msa_attention, msa_decode, msa_train,
                 query_index, round_up, select_blocks, tl, triton, widen)

# ---- the config ----------------------------------------------------------------------------------
# One dataclass describes every model: M2, M3, and smaller ones of the same make, each by a classmethod. It says what a
# model is. What may change from one step to the next, such as the index branch's warm-up, is an argument of `forward`.
# A value with which no model can work is refused when the config is made, and again when the model is.

ATTN_TYPES = ("full", "msa", "swa", "lightning")
LIGHTNING_CHUNK = 64                   # tokens whose products are taken as in softmax attention
CONV_STD = 0.3                         # of a ShortConv's weights at the start, beside the 1 of its input
# what M3 computes otherwise than M2
M3_STYLE = dict(activation="swiglu_oai", gemma_norm=True, qk_norm="head", routed_scale=2.0)

@dataclasses.dataclass
class MiniMaxConfig:
    """The shape of a model. Comments have the names of the released config.json."""
    vocab_size: int
    n_layer: int                       # num_hidden_layers
    n_embd: int                        # hidden_size
    n_head: int                        # num_attention_heads
    n_kv_head: int                     # num_key_value_heads
    head_dim: int
    rotary_dim: int                    # channels of a head that rotate, from the first. 0 differs from M2: no rotation
    max_seq_len: int                   # max_position_embeddings
    attn_types: list                   # layer_types: "full", "msa", "swa" or "lightning" per layer
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
    index_kl_stride: int = 1           # the index branch learns from every stride-th query
    window: int = 0                    # keys that a query of a "swa" layer reads, its own among them
    window_sink: bool = False          # those layers have a learned sink
    conv_taps: int = 0                 # inputs of a causal convolution before attention. differs from M2: 0 there
    n_mtp: int = 0                     # num_mtp_modules
    rope_theta: float = 5e6
    norm_eps: float = 1e-6             # rms_norm_eps

    def __post_init__(self):
        self.check()

    def check(self, dtype=torch.float32):
        """AssertionError for a value with which no model can work, or none that computes in dtype."""
        # kinds of layers
        for name, allowed in (("attn_types", ATTN_TYPES), ("mlp_types", ("dense", "moe"))):
            types = getattr(self, name)
            assert isinstance(types, (list, tuple)), f"{name} {types}: not a list"
            assert len(types) == self.n_layer, f"{name} {types}: {len(types)} of {self.n_layer} layers"
            assert all(kind in allowed for kind in types), f"{name} {types}: {' or '.join(allowed)}"

        # counts: of what the layers need, at least 1
        needed = ["vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "max_seq_len",
                  "index_block_size", "index_topk_blocks", "index_kl_stride"]
        if "dense" in self.mlp_types:
            needed += ["dense_dim"]
        if "moe" in self.mlp_types:
            needed += ["n_expert", "n_expert_per_tok", "expert_dim"]
        if "msa" in self.attn_types:
            needed += ["index_head_dim"]
        if "swa" in self.attn_types:
            needed += ["window"]
        for name in [*needed, "rotary_dim", "shared_dim", "window", "conv_taps", "n_mtp"]:
            value = getattr(self, name)
            least = 1 if name in needed else 0
            assert type(value) is int and value >= least, f"{name} {value!r}: a whole number, {least} or more"

        # numbers, switches, names
        for name in ("routed_scale", "rope_theta", "norm_eps"):
            value = getattr(self, name)
            assert type(value) in (int, float) and 0 < value < math.inf, f"{name} {value!r}: a number above 0"
        for name in ("gemma_norm", "window_sink"):
            value = getattr(self, name)
            assert isinstance(value, bool), f"{name} {value!r}: True or False"
        assert self.activation in ("swiglu", "swiglu_oai"), f"activation {self.activation}: swiglu or swiglu_oai"
        assert self.qk_norm in ("layer", "head"), f"qk_norm {self.qk_norm}: layer or head"

        # what must fit together
        assert self.n_head % self.n_kv_head == 0, f"{self.n_head} query heads do not share {self.n_kv_head} KV heads"
        assert self.rotary_dim in range(0, self.head_dim + 1, 2), f"rotary_dim {self.rotary_dim} of {self.head_dim}"
        if "msa" in self.attn_types:
            assert self.index_head_dim >= self.rotary_dim, (
                f"index_head_dim {self.index_head_dim}: rotary_dim, {self.rotary_dim}, of its channels rotate")
        if "moe" in self.mlp_types:
            assert self.n_expert_per_tok <= self.n_expert, (
                f"n_expert_per_tok {self.n_expert_per_tok}: there are {self.n_expert} experts")
            unit = 16 // dtype.itemsize  # grouped_mm wants rows of whole 16 bytes
            for name in ("n_embd", "expert_dim"):
                value = getattr(self, name)
                assert value % unit == 0, f"{name} {value}: a multiple of {unit} where experts compute in {dtype}"

    @property
    def mtp_attn_type(self):
        """The attention of MTP modules: the last layer's, or full where that one keeps no key of the past. (M2's report
        does not say what the modules of its hybrids had.)"""
        last = self.attn_types[-1]
        return last if last in ("full", "msa") else "full"

    @property
    def is_recurrent(self):
        """Whether a layer's cache is overwritten as tokens come: nothing of it can be forgotten, or shared by prefix.
        It is what M2's report holds against hybrids: no prefix cache, and no drafts, which are taken back."""
        return self.conv_taps > 1 or "swa" in self.attn_types or "lightning" in self.attn_types

    @classmethod
    def micro(cls, **changes):
        """M2's pattern at the size of rl.py's tasks, in bytes."""
        fields = dict(
            vocab_size=257, n_layer=3, n_embd=64, n_head=4, n_kv_head=2, head_dim=16, rotary_dim=8, max_seq_len=1024,
            attn_types=["full"] * 3, mlp_types=["moe"] * 3,
            n_expert=8, n_expert_per_tok=2, expert_dim=64,
            index_head_dim=16, index_block_size=8, index_topk_blocks=4)
        return cls(**(fields | changes))

    @classmethod
    def tiny(cls, **changes):
        """M3's pattern at a size that two CPU cores train in three minutes."""
        fields = dict(
            M3_STYLE,
            vocab_size=4096, max_seq_len=32768,
            n_layer=3, n_embd=128, n_head=4, n_kv_head=2, head_dim=32, rotary_dim=16,
            attn_types=["full", "msa", "msa"], mlp_types=["dense", "moe", "moe"],
            n_expert=8, n_expert_per_tok=2, expert_dim=96, shared_dim=96, dense_dim=384,
            index_head_dim=64, index_block_size=8, index_topk_blocks=4, index_kl_stride=2, n_mtp=1)
        return cls(**(fields | changes))

    @classmethod
    def tiny_m2(cls, **changes):
        """M2's pattern at tiny's cost: as many channels of experts for a token, all of them routed."""
        fields = dict(
            vocab_size=4096, max_seq_len=32768,
            n_layer=3, n_embd=128, n_head=4, n_kv_head=2, head_dim=32, rotary_dim=16,
            attn_types=["full"] * 3, mlp_types=["moe"] * 3,
            n_expert=8, n_expert_per_tok=2, expert_dim=144, n_mtp=1)
        return cls(**(fields | changes))

    @classmethod
    def mini(cls, **changes):
        """M3's pattern with 24M parameters (5.3M active without embedding and head), for an hour on a laptop."""
        fields = dict(
            M3_STYLE,
            vocab_size=8192, n_layer=6, n_embd=256, n_head=4, n_kv_head=2, head_dim=64, rotary_dim=32, max_seq_len=4096,
            attn_types=["full"] * 2 + ["msa"] * 4, mlp_types=["dense"] * 2 + ["moe"] * 4,
            n_expert=32, n_expert_per_tok=4, expert_dim=128, shared_dim=256, dense_dim=1024,
            index_head_dim=64, index_block_size=16, index_topk_blocks=4, index_kl_stride=4, n_mtp=1)
        return cls(**(fields | changes))

    @classmethod
    def small(cls, **changes):
        """M3's pattern at the size of GPT-2 124M (85M active without embedding and head), for one H200."""
        fields = dict(
            M3_STYLE,
            vocab_size=50304, n_layer=12, n_embd=768, n_head=4, n_kv_head=2, head_dim=128, rotary_dim=64,
            max_seq_len=2 ** 20, attn_types=["full"] * 3 + ["msa"] * 9, mlp_types=["dense"] * 3 + ["moe"] * 9,
            n_expert=16, n_expert_per_tok=4, expert_dim=512, shared_dim=512, dense_dim=2304,
            index_head_dim=128, index_block_size=128, index_topk_blocks=16, index_kl_stride=8, n_mtp=1)
        return cls(**(fields | changes))

    @classmethod
    def m2(cls, **changes):
        """MiniMax-M2 as released: 229.9B parameters, 9.8B active."""
        fields = dict(
            vocab_size=200064, n_layer=62, n_embd=3072, n_head=48, n_kv_head=8, head_dim=128, rotary_dim=64,
            max_seq_len=196608, attn_types=["full"] * 62, mlp_types=["moe"] * 62,
            n_expert=256, n_expert_per_tok=8, expert_dim=1536)
        return cls(**(fields | changes))

    @classmethod
    def m3(cls, **changes):
        """MiniMax-M3's text model as released: 428B parameters with its vision tower, 23B active."""
        fields = dict(
            M3_STYLE,
            vocab_size=200064, n_layer=60, n_embd=6144, n_head=64, n_kv_head=4, head_dim=128, rotary_dim=64,
            max_seq_len=1048576, attn_types=["full"] * 3 + ["msa"] * 57, mlp_types=["dense"] * 3 + ["moe"] * 57,
            n_expert=128, n_expert_per_tok=4, expert_dim=3072, shared_dim=3072, dense_dim=12288,
            index_head_dim=128, index_block_size=128, index_topk_blocks=16)
        return cls(**(fields | changes))

def attn_pattern(text, n_layer):
    """A kind of attention, or two kinds with a ratio -> attn_types of n_layer layers: "swa:full=3:1" is swa swa swa
    full, again and again. ValueError for another kind or form, and where a kind gets no layer."""
    kinds, has_ratio, ratio = text.partition("=")
    kinds = kinds.split(":")
    counts = ratio.split(":") if has_ratio else ["1"]
    well_formed = len(kinds) == len(set(kinds)) == len(counts) == 1 + bool(has_ratio)
    well_formed = well_formed and all(count.isdecimal() and int(count) > 0 for count in counts)
    if not well_formed or any(kind not in ATTN_TYPES for kind in kinds):
        known = ", ".join(ATTN_TYPES)
        raise ValueError(f"attention {text!r}: {known}, or two of them with a ratio, such as swa:full=2:1")
    period = []
    for kind, count in zip(kinds, counts):
        period += [kind] * min(int(count), n_layer)
    types = (period * n_layer)[:n_layer]
    if set(types) != set(kinds):
        raise ValueError(f"attention {text!r}: of {n_layer} layers none is {' or '.join(set(kinds) - set(types))}")
    return types

# ---- norm and RoPE -------------------------------------------------------------------------------
# Both compute in fp32 or wider, whatever the model's dtype. RoPE (arXiv 2104.09864) rotates each pair of channels of a
# query or key by an angle that grows with the token's position, so that their product depends on how far apart the two
# tokens are. Only the first rotary_dim channels of a head rotate.

class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 or wider. Gemma's form stores the weight's distance from 1."""

    def __init__(self, dim, cfg):
        super().__init__()
        self.eps = cfg.norm_eps
        self.gemma = cfg.gemma_norm
        self.weight = nn.Parameter(torch.full((dim,), 0.0 if cfg.gemma_norm else 1.0))

    def forward(self, x):
        wide = widen(x)
        weight = self.gain(wide.dtype)
        y = F.rms_norm(wide, weight.shape, weight, self.eps)
        return y if wide is x else y.to(x.dtype)

    def gain(self, dtype):
        """The factor of each channel."""
        weight = self.weight.to(dtype)
        return 1 + weight if self.gemma else weight

def rope_tables(pos, rotary_dim, theta):
    """cos and sin of each position's angles: (B, T) -> two (B, T, 1, rotary_dim / 2), fp32 in any model."""
    channel = torch.arange(0, rotary_dim, 2, device=pos.device, dtype=torch.float32)
    frequency = theta ** (-channel / rotary_dim)
    angle = pos[..., None, None].float() * frequency
    return angle.cos(), angle.sin()

def apply_rope(x, rope):
    """Rotate the pairs (c, c + rotary_dim / 2) of the first rotary_dim channels of x (B, T, H, D), leave the others."""
    cos, sin = rope
    half = cos.size(-1)
    if half == 0:
        return x
    a, b, rest = x.tensor_split((half, 2 * half), -1)
    a = widen(a)
    b = widen(b)
    turned_a = (a * cos - b * sin).to(x.dtype)
    turned_b = (b * cos + a * sin).to(x.dtype)
    return torch.cat([turned_a, turned_b, rest], -1)

# ---- the cache -----------------------------------------------------------------------------------
# Generation computes the keys and values of a token once and keeps them; a layer with MSA keeps its index keys, too.
# In a forward each layer appends to its own lane of the buffers; then `advance` counts the new tokens for all lanes.
# Between two forwards `crop` forgets a row's last tokens, `expand` copies rows, and `select` keeps some of them.
# A layer of another kind keeps less, and overwrites it: a window's last keys lie in a ring, a Lightning layer has one
# state, a convolution its last inputs. What was overwritten is gone: such a cache can be emptied, but not cropped.

class KVCache:
    """Keys, values and index keys of every layer, then of every MTP module, in static buffers; slot = position on the
    path. Layers of kind "swa" and "lightning" have buffers of their own, of a size that does not grow with the context.

    cfg       of the model
    batch     rows, 0 or more
    capacity  slots of a row, 1 or more; rounded up to whole key blocks, which gather_blocks reads in place
    history   keep each slot's token and the trunk's hidden state too, from which MTP modules draft
    `length` (B,) int32 lives on the device; `used`, a bound on it that the host knows, spares reading it back. (Rows
    that have ended may exceed it: see sample.Decoder.)
    """

    def __init__(self, cfg, batch, capacity, device="cpu", dtype=torch.float32, history=False):
        if batch < 0 or capacity < 1:
            raise ValueError(f"a cache of {batch} rows with {capacity} slots: expected 0 or more rows, 1 or more slots")
        kinds = cfg.attn_types + [cfg.mtp_attn_type] * cfg.n_mtp
        self.lane_of = number_lanes(kinds)
        lanes = kinds.count("full") + kinds.count("msa")
        self.L = cfg.index_block_size
        self.capacity = round_up(capacity, self.L)
        slots = (lanes, batch, self.capacity)
        self.k = torch.zeros(*slots, cfg.n_kv_head, cfg.head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.ki = self.k.new_zeros(*slots, cfg.index_head_dim)
        self.ids = self.hidden = None
        if history:
            self.ids = torch.zeros(batch, self.capacity, dtype=torch.int64, device=device)
            self.hidden = self.k.new_zeros(batch, self.capacity, cfg.n_embd)
        self.length = torch.zeros(batch, dtype=torch.int32, device=device)
        self.used = 0

        # what is overwritten as tokens come
        self.is_recurrent = cfg.is_recurrent
        ring = (kinds.count("swa"), batch, min(cfg.window, self.capacity))
        self.ring_k = self.k.new_zeros(*ring, cfg.n_kv_head, cfg.head_dim)
        self.ring_v = torch.zeros_like(self.ring_k)
        state = (kinds.count("lightning"), batch, cfg.n_head, cfg.head_dim, cfg.head_dim)
        self.state = torch.zeros(*state, device=device, dtype=torch.promote_types(dtype, torch.float32))
        past = (cfg.n_layer + cfg.n_mtp, batch, max(0, cfg.conv_taps - 1))
        self.past = self.k.new_zeros(*past, cfg.n_embd)

    def append(self, layer, k, v, ki):
        """Write k, v (B, T, Hkv, D) and ki (B, T, D), or None, from slot `length` on -> what the layer now holds, up to
        a whole key block. `advance` moves `length` once all layers have written."""
        layer = self.lane_of[layer]
        B, T = len(self.length), k.size(1)
        written = [("k", self.k, k), ("v", self.v, v)]
        if ki is not None:
            written.append(("ki", self.ki, ki))
        for name, lane, new in written:
            check_tensor(name, new, (B, T, *lane.shape[3:]), lane.device)  # one row would be written to every row
        assert self.used + T <= self.capacity, f"{self.used} + {T} tokens do not fit a cache of {self.capacity}"

        slot = query_index(T, self.length, k.device)                                                      # (B, T)
        row = torch.arange(B, device=k.device)[:, None]
        for _, lane, new in written:
            lane[layer].index_put_((row, slot), new)

        held = round_up(self.used + T, self.L)  # spare slots are invisible: no query has their index
        return self.k[layer, :, :held], self.v[layer, :, :held], self.ki[layer, :, :held]

    def append_to_ring(self, layer, k, v):
        """Write k, v (B, T, Hkv, D) to a window's ring, slot = position modulo its size -> keys and values
        (B, W - 1 + T, Hkv, D) of the last positions in their order, and (B,) how many of the first are none."""
        lane = self.lane_of[layer]
        B, T = len(self.length), k.size(1)
        assert self.used + T <= self.capacity, f"{self.used} + {T} tokens do not fit a cache of {self.capacity}"
        W = self.ring_k.size(2)
        row = torch.arange(B, device=k.device)[:, None]
        before = self.length[:, None].long() - torch.arange(W - 1, 0, -1, device=k.device)                # (B, W - 1)
        missing = (before < 0).sum(1)
        slots = row, before % W  # of a position below 0: any slot, as it is missing
        k = torch.cat([self.ring_k[lane][slots], k], 1)
        v = torch.cat([self.ring_v[lane][slots], v], 1)

        kept = min(T, W)
        slots = row, (query_index(T, self.length, k.device)[:, T - kept:].long() % W)
        self.ring_k[lane].index_put_(slots, k[:, -kept:])
        self.ring_v[lane].index_put_(slots, v[:, -kept:])
        return k, v, missing

    def remember(self, idx, hidden):
        """Keep tokens (B, T) and the trunk's hidden states (B, T, C) from slot `length` on, for drafting."""
        if self.ids is None:
            return
        slot = query_index(idx.size(1), self.length, idx.device)                                          # (B, T)
        self.ids.scatter_(1, slot, idx)
        self.hidden.scatter_(1, slot[..., None].expand_as(hidden), hidden)

    def advance(self, T):
        self.length = self.length + T
        self.used += T

    def at(self, length, used):
        """The same buffers, to be read and written from slot `length` (B,) on; `used` bounds it."""
        view = copy.copy(self)
        view.length = length
        view.used = used
        return view

    def row(self, i, used):
        """Row i alone, in the same buffers; `used` bounds its length, which `set_length` carries back."""
        view = self.at(self.length[i:i + 1], used)
        view.k = self.k[:, i:i + 1]
        view.v = self.v[:, i:i + 1]
        view.ki = self.ki[:, i:i + 1]
        if self.ids is not None:
            view.ids = self.ids[i:i + 1]
            view.hidden = self.hidden[i:i + 1]
        for name in ("ring_k", "ring_v", "state", "past"):
            setattr(view, name, getattr(self, name)[:, i:i + 1])
        return view

    def set_length(self, i, length):
        """Row i holds so many slots."""
        self.length[i] = length
        self.used = max(self.used, length)

    def crop(self, length):
        """Forget every slot from `length` on: an int, or a tensor (B,), which is read back; beyond the end, nothing.
        ValueError where layers have overwritten what would have to come back: such a row can be emptied alone."""
        limit = torch.as_tensor(length)
        one_for_all = limit.dim() == 0
        shaped = one_for_all or limit.shape == self.length.shape
        if limit.is_floating_point() or not shaped or (limit < 0).any():
            rows = len(self.length)
            raise ValueError(f"cannot crop {rows} rows to {limit.tolist()}: expected 0 or more, one or one a row")
        limit = limit.clamp(max=self.capacity)
        if self.is_recurrent:
            self.empty_rows(limit.to(self.length).expand_as(self.length))
        self.length = torch.minimum(self.length, limit.to(self.length))
        self.used = min(self.used, int(limit)) if one_for_all else int(self.length.max())

    def empty_rows(self, limit):
        """For `crop`, of a recurrent cache: clear rows whose limit (B,) is 0. ValueError for one within a row."""
        if ((limit > 0) & (limit < self.length)).any():
            raise ValueError(f"cannot crop rows of {self.length.tolist()} tokens to {limit.tolist()}: windows, "
                             "Lightning layers and convolutions have overwritten what they held then")
        for buffer in (self.state, self.past):
            buffer[:, limit == 0] = 0

    def expand(self, n):
        """n copies of every row, side by side: a group that shares its prompt."""
        rows = torch.arange(len(self.length), device=self.length.device)
        self.select(rows.repeat_interleave(n))

    def select(self, rows):
        """Keep these rows (int64), in this order."""
        B = len(self.length)
        rows = torch.as_tensor(rows, device=self.length.device)
        if rows.dim() != 1 or rows.dtype != torch.int64 or ((rows < 0) | (rows >= B)).any():
            raise ValueError(f"cannot select rows {rows.tolist()} of {B}: expected int64 from 0 to {B - 1}")
        for name in ("k", "v", "ki", "ring_k", "ring_v", "state", "past"):
            setattr(self, name, getattr(self, name)[:, rows])
        if self.ids is not None:
            self.ids = self.ids[rows]
            self.hidden = self.hidden[rows]
        self.length = self.length[rows]
        self.used = max(self.length.tolist(), default=0)  # read back: the longest row may be gone

def cache_bytes(cfg, size=2):
    """What a row's cache holds, all layers: bytes a token, and bytes however many tokens there are.

    size  of an element; states are fp32
    """
    a_key = 2 * cfg.n_kv_head * cfg.head_dim * size  # its value, too
    kinds = cfg.attn_types
    per_token = (kinds.count("full") + kinds.count("msa")) * a_key
    per_token += kinds.count("msa") * cfg.index_head_dim * size
    fixed = kinds.count("swa") * cfg.window * a_key
    fixed += kinds.count("lightning") * cfg.n_head * cfg.head_dim ** 2 * 4
    fixed += cfg.n_layer * max(0, cfg.conv_taps - 1) * cfg.n_embd * size
    return per_token, fixed

def decode_bytes(cfg, T, size=2):
    """Bytes of cache that a decode step moves for a row of T tokens, all layers: keys and values, index keys, states.

    size  of an element; states are fp32, and are read and written
    """
    a_key = 2 * cfg.n_kv_head * cfg.head_dim * size  # its value, too
    chosen = min(T, cfg.index_topk_blocks * cfg.index_block_size)
    of_kind = dict(
        full=T * a_key,
        msa=T * cfg.index_head_dim * size + chosen * a_key,
        swa=min(T, cfg.window) * a_key,
        lightning=2 * cfg.n_head * cfg.head_dim ** 2 * 4)
    return sum(of_kind[kind] for kind in cfg.attn_types)

def number_lanes(kinds):
    """Kinds of attention, one a layer -> a layer's lane in the buffers that its kind has."""
    counts = {}
    lanes = []
    for kind in kinds:
        buffer = kind if kind in ("swa", "lightning") else "keys"
        lanes.append(counts.get(buffer, 0))
        counts[buffer] = lanes[-1] + 1
    return lanes

# ---- window and Lightning attention ----------------------------------------------------------------
# What MiniMax tried before M2 and gave up. i, j: places of query and key in the row; D channels.
#     window      y_i = sum_j softmax_j(q_i k_j / sqrt(D)) v_j       over the W keys j = i - W + 1 .. i
#     with sink   the softmax has one more term, exp(sink), which takes probability and has no value
#     Lightning   y_i = sum_j e^(-s (i - j)) (q_i k_j) v_j           over all j <= i. Without a softmax the sum is
#                 y_i = q_i S_i,  S_i = e^(-s) S_(i-1) + k_i^T v_i   a state (D, D), however long the context
# A token costs the same wherever it stands. A row holds documents one after the other, but no tree: a branch would need
# its parent's window and state, and the row has those of the branch before it.

# On a GPU, shorter rows are left to torch, too: so few products take less time than kernels take to start, and
# torch.compile merges them with what is beside them
SHORT_ROW = 512

def pad_tokens(x, front, back=0):
    """x (B, T, heads, D) with so many zero tokens before the first and behind the last."""
    return F.pad(x, (0, 0, 0, 0, front, back))

def window_attention(q, k, v, window, sink=None, end=None, missing=None, impl="auto"):
    """Softmax attention over the last `window` keys (Longformer, arXiv 2004.05150) -> (B, T, H, D), with gradients.

    q        (B, T, H, D), of the last T keys
    k, v     (B, Tk, Hkv, D), Tk >= T
    window   keys that a query reads, its own among them
    sink     (H,) a logit that takes probability (gpt-oss, arXiv 2508.10925); None: there is none
    end      (B, Tk) int32, the end of each key's document; None: there is one
    missing  (B,) so many of the first keys are none; None: 0
    impl     torch, triton: FlexAttention's kernels, of whole rows; or auto: those in training, on a GPU in 16 bits,
             from SHORT_ROW tokens on
    In torch, queries go in chunks of a window, each with the keys of its own chunk and the one before: time and memory
    grow with Tk * window.
    """
    B, T, H, D = q.shape
    Tk, Hkv = k.shape[1:3]
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'triton' or 'torch'")
    whole_rows = missing is None and T == Tk
    if impl == "auto" and q.is_cuda and q.dtype.itemsize == 2 and torch.is_grad_enabled():
        impl = "triton" if whole_rows and T >= SHORT_ROW else "torch"
    if impl == "triton":
        assert whole_rows, "FlexAttention's kernels do not read a cache's ring"
        return _window_flex(q, k, v, window, sink, end)
    chunk, before = T, Tk - T          # queries of a chunk, keys before its first query
    if T > window:
        chunk, before = window, window
    n = cdiv(T, chunk)
    first = Tk - n * chunk             # the first chunk's first query, as a place among the keys; below 0: padding
    padding = max(0, before - first)

    # chunks: q (B, n, chunk, H, D), k and v (B, n, before + chunk, Hkv, D)
    q = pad_tokens(q, n * chunk - T).unflatten(1, (n, chunk))
    begin = first - before + padding   # of the first chunk's keys, with the padding
    k, v = (pad_tokens(x, padding)[:, begin:] for x in (k, v))
    k, v = (x.unfold(1, before + chunk, chunk).movedim(-1, 2) for x in (k, v))

    # which keys a query sees: (B or 1, n, chunk, before + chunk)
    start = first + chunk * torch.arange(n, device=q.device)[:, None]
    i = (start + torch.arange(chunk, device=q.device))[..., None]
    j = (start - before + torch.arange(before + chunk, device=q.device))[:, None]
    seen = ((j <= i) & (j > i - window) & (j >= 0))[None]
    if missing is not None:
        seen = seen & (j >= missing[:, None, None, None])
    if end is not None:
        seen = seen & (i < end[:, j.clamp(min=0)])
    seen = seen | (i < 0)              # padding would see nothing, and softmax of nothing is NaN

    if sink is None:
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))                         # (B * n, heads, ., D)
        mask = seen.expand(B, -1, -1, -1).flatten(0, 1)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
        return y.reshape(B, n * chunk, H, D)[:, -T:]

    # query head h reads KV head g = h // (H / Hkv): (B, n, g, H / Hkv, chunk, before + chunk)
    q = q.unflatten(3, (Hkv, -1))
    scores = torch.einsum("bncghd,bnmgd->bnghcm", widen(q), widen(k)) * D ** -0.5
    scores = scores.masked_fill(~seen[:, :, None, None], -math.inf)
    of_sink = widen(sink).view(Hkv, -1, 1, 1).expand(*scores.shape[:-1], 1)
    p = torch.cat([scores, of_sink], -1).softmax(-1)[..., :-1]
    y = torch.einsum("bnghcm,bnmgd->bncghd", p.to(v.dtype), v)
    return y.reshape(B, n * chunk, H, D)[:, -T:]

def _window_flex(q, k, v, window, sink, end, tile=128):
    """window_attention by FlexAttention, of whole rows."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention
    T = q.size(1)
    more = -T % tile
    if more:  # whole tiles: FlexAttention wants masks as long as its tensors
        q, k, v = (pad_tokens(x, 0, more) for x in (q, k, v))
        end = None if end is None else F.pad(end, (0, more))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                                # (B, H, ., D)
    if end is None:
        mask = _row_tiles(q.size(2), window, tile, q.device)
    else:
        mask = window_tiles(q.size(2), window, end, tile, q.device)
    given = dict(block_mask=mask, enable_gqa=True)
    if sink is None:
        y = _compiled(flex_attention)(q, k, v, **given)
    else:
        y, aux = _compiled(flex_attention)(q, k, v, return_aux=AuxRequest(lse=True), **given)
        # the sink's term makes a softmax's sum e^lse larger by e^sink
        y = y * (aux.lse - sink[:, None]).sigmoid()[..., None].to(y.dtype)
    return y.transpose(1, 2)[:, :T]

@functools.lru_cache(16)
def _row_tiles(T, window, tile, device):
    """window_tiles of one document, which all layers and steps share: made anew it takes as long as a small window."""
    return window_tiles(T, window, None, tile, device)

def window_tiles(T, window, end, tile, device):
    """FlexAttention's mask of a window: a band, so that its lists of tiles are as long as a window, not as the row.

    T       tokens, a multiple of `tile`
    window  keys that a query reads
    end     (B, T), or None: see window_attention
    tile    queries, and keys, of a tile
    """
    from torch.nn.attention.flex_attention import BlockMask
    n = T // tile
    own = torch.arange(n, device=device)[:, None]
    back = torch.arange(min(n, 1 + cdiv(window - 1, tile)), device=device)  # of a tile of keys, before that of queries

    # of (queries' tile, tiles back): those of which something is seen, and those seen as a whole
    keys = own - back
    seen = (keys >= 0)[None]
    whole = seen & (back > 0) & ((back + 1) * tile <= window)
    if end is not None:
        ends = end.view(-1, n, tile)
        first = own * tile
        seen = seen & (ends.amax(-1)[:, keys.clamp(min=0)] > first)
        whole = whole & (ends.amin(-1)[:, keys.clamp(min=0)] >= first + tile)

    # the same of (keys' tile, tiles on)
    queries = own + back
    lists = []
    for tiles in (seen & ~whole, whole):
        by_key = tiles[:, queries.clamp(max=n - 1), back] & (queries < n)
        for table, sign in ((tiles, -1), (by_key, 1)):
            nearest = table.int().argsort(stable=True, descending=True)
            lists.append(table.sum(-1, dtype=torch.int32)[:, None])
            lists.append((own + sign * nearest).clamp(0, n - 1).int()[:, None])
    part, whole = lists[:4], lists[4:]  # of each: how many tiles a row has and which, by queries, then by keys
    reach = torch.full((), window, device=device)  # a number would be compiled anew for each window, or become symbolic

    def see(b, h, i, j):
        seen = (j <= i) & (j > i - reach)
        return seen if end is None else seen & (i < end[b, j])
    return BlockMask(
        seq_lengths=(T, T), BLOCK_SIZE=(tile, tile), mask_mod=see,
        kv_num_blocks=part[0], kv_indices=part[1], full_kv_num_blocks=whole[0], full_kv_indices=whole[1],
        q_num_blocks=part[2], q_indices=part[3], full_q_num_blocks=whole[2], full_q_indices=whole[3])

def lightning_attention(q, k, v, decay, end=None, state=None, chunk=LIGHTNING_CHUNK, impl="auto"):
    """Linear attention with a decay for each head (Lightning Attention-2, arXiv 2401.04658), with gradients.

    q, k, v  (B, T, H, D)
    decay    (H,) s: a key counts e^-s times less with every further token. At most 2 in the kernels
    end      (B, T) int32, the end of each key's document; None: there is one
    state    (B, H, D, D) of the tokens before these; None: there are none. Not with `end`
    chunk    tokens whose products are taken as in softmax attention; what came before them is a state. In torch alone
    impl     auto, triton or torch: see full_attention. auto is torch for rows of less than SHORT_ROW tokens
    -> y (B, T, H, D), state (B, H, D, D) fp32 or wider, after the last token
    """
    T = q.size(1)
    if T == 1 and state is not None:   # decode: the recurrence itself
        q_row, k_row, v_row = (widen(x).transpose(1, 2) for x in (q, k, v))                               # (B, H, 1, D)
        state = (-decay[:, None, None]).to(q_row.dtype).exp() * state + k_row.mT @ v_row
        return (q_row @ state).transpose(1, 2).to(q.dtype), state

    if impl == "auto" and T < SHORT_ROW:
        impl = "torch"
    if _pick(impl, q, q.size(3), grad=(decay,), what="Lightning attention"):
        y, last_state = _lightning_triton(q, k, v, decay, end)
    else:
        y, last_state = _lightning_chunks(q, k, v, decay, end, chunk)
    if state is not None:
        age = torch.arange(1, T + 1, device=q.device)[:, None]
        reach = (-decay.to(last_state.dtype) * age).exp()                                                 # (T, H)
        y = y + torch.einsum("bthd,bhde->bthe", widen(q) * reach[..., None], state)
        last_state = last_state + reach[-1, :, None, None] * state
    return y.to(q.dtype), last_state

def _lightning_chunks(q, k, v, decay, end, chunk):
    """lightning_attention from no state, in torch -> y and the last state, both fp32 or wider."""
    B, T, H, D = q.shape
    q, k, v = widen(q), widen(k), widen(v)
    decay = decay.to(q.dtype)[:, None, None, None]                                                        # (H, 1, 1, 1)

    # chunks (B, H, n, chunk, D), padded in front with zeros, which add nothing to a state
    n = cdiv(T, chunk)
    front = n * chunk - T
    chunks = (pad_tokens(x, front).unflatten(1, (n, chunk)) for x in (q, k, v))
    q_chunk, k_chunk, v_chunk = (x.permute(0, 3, 1, 2, 4) for x in chunks)
    place = torch.arange(chunk, device=q.device)
    age = place[:, None] - place       # of a key of the same chunk, in tokens
    faded = (-decay * age.clamp(min=0)).exp() * (age >= 0)                                        # (H, 1, chunk, chunk)
    left = (-decay * (chunk - 1 - place)[:, None]).exp()      # of a key at its chunk's end: (H, 1, chunk, 1)
    reach = (-decay * (place + 1)[:, None]).exp()             # of the state before a chunk: (H, 1, chunk, 1)
    if end is not None:
        end = F.pad(end + front, (front, 0))
        ends = end.unflatten(1, (n, chunk))                                                           # (B, n, chunk)
        i = torch.arange(n, device=q.device)[:, None] * chunk + place                                     # (n, chunk)
        last = ends[:, :, -1]                                 # of the document of a chunk's last token: (B, n)
        faded = faded * (i[..., None] < ends[:, :, None])[:, None]
        left = left * (ends > i[:, -1:])[:, None, ..., None]
        before_last = F.pad(last, (1, 0))[:, :-1]             # the same of the chunk before: (B, n)
        reach = reach * (i < before_last[..., None])[:, None, ..., None]

    # of the same chunk, then of all chunks before: each adds to the states of those that follow
    kept = kept_states(decay[:, 0, 0, 0], n, chunk, end)
    y = (q_chunk @ k_chunk.mT * faded) @ v_chunk
    added = (k_chunk * left).mT @ v_chunk                                                         # (B, H, n, D, D)
    states = (kept @ added.flatten(3)).unflatten(3, (D, D))                                       # (B, H, n + 1, D, D)
    y = y + (q_chunk * reach) @ states[:, :, :-1]
    y = y.permute(0, 2, 3, 1, 4).reshape(B, n * chunk, H, D)[:, front:]
    return y, states[:, :, -1]

def kept_states(decay, n, chunk, end):
    """Of what a chunk adds to a state, the part that is in the states before each of n chunks, and after the last one:
    (B or 1, H, n + 1, n).

    decay  (H,)
    n      chunks
    chunk  tokens of a chunk
    end    (B, n * chunk), see lightning_attention
    """
    number = torch.arange(n, device=decay.device)
    before = torch.arange(n + 1, device=decay.device)[:, None]
    age = before - 1 - number           # in chunks
    kept = (-decay[:, None, None] * chunk * age.clamp(min=0)).exp() * (age >= 0)
    if end is None:
        return kept[None]
    last = end[:, chunk - 1::chunk]     # of the document of a chunk's last token: (B, n)
    return kept * (last[:, None] > chunk * before)[:, None]

# The kernels. A program walks over the chunks of a segment, with the state in registers; segments are as long as leaves
# enough programs to fill a GPU, so that few states are written. A layer takes two walks forward:
#     what each segment adds to a state; weighted sums of it are the states before segments
#     the outputs, which start from these states
# and four backward, as each gradient is the same sum, over other tensors, of keys and values from the end to the start:
#     y_i = sum_{j <= i} f_ij (q_i k_j) v_j       dq_i = sum_{j <= i} f_ij (dy_i v_j) k_j      f_ij = e^(-s (i - j))
#     dv_j = sum_{i >= j} f_ij (k_j q_i) dy_i     dk_j = sum_{i >= j} f_ij (v_j dy_i) q_i
# Names in the kernel are those of y. A walk to the start (REVERSE) goes on in the same way: the tokens that it has
# passed, "before" in its names, are those that stand later in the row.

LIGHTNING_TILE = dict(ROWS=64, COLS=64, num_warps=4, num_stages=2)
LIGHTNING_PROGRAMS = 1056               # eight for each SM of an H200, two at a time

@jit
def _fading(
    limit,    # (T,), see _lightning_kernel
    i,        # [ROWS], the chunk's tokens
    first,    # of them
    age,      # [ROWS], how many of the chunk's tokens the walk has passed before each
    rate,     # of the head, in powers of two a token
    ROWS: constexpr,
    REVERSE: constexpr,
):
    """-> [ROWS] share of the state before that a token reads; [ROWS] share of a token that the state after has; share
    of the state before that it has; [ROWS] the limit of each token."""
    reach = tl.exp2(-rate * (age + 1))
    left = tl.exp2(-rate * (ROWS - 1 - age))
    keep = tl.exp2(-rate * ROWS)
    limits = i
    if limit is not None:
        limits = tl.load(limit + i)
        after = first + ROWS
        if REVERSE:
            next_limit = tl.load(limit + first)  # of the token that the state after is for
            reach = tl.where(limits >= after, reach, 0.0)
            left = tl.where(i <= next_limit, left, 0.0)
            keep = tl.where(next_limit >= after, keep, 0.0)
        else:
            next_limit = tl.load(limit + after - 1)
            reach = tl.where(limits < first, reach, 0.0)
            left = tl.where(i >= next_limit, left, 0.0)
            keep = tl.where(next_limit < first, keep, 0.0)
    return reach, left, keep, limits

# One program = one head in a segment, and COLS channels of v.
@jit
def _lightning_kernel(
    # tiles of (B * T, H * D)
    q,         # [ROWS, D], or None: the state alone is asked for
    k,         # [ROWS, D]
    v,         # [ROWS, COLS]
    y,         # [ROWS, COLS], written, or None
    rates,     # (H,), decay in powers of two
    limit,     # (B, T), the first token of each token's document, in reverse the last one; or None
    # states
    before,    # (B, H, segments or more, D, D), or None: zeros
    head,      # stride of a head in `before`
    down,      # stride of a row
    across,    # stride of a column
    added,     # (B, H, segments, D, D), written, or None: the outputs alone are asked for
    # sizes
    T,
    chunks,    # of a segment
    H: constexpr,
    D: constexpr,
    ROWS: constexpr,
    COLS: constexpr,
    REVERSE: constexpr,  # from a segment's end to its start
):
    row = tl.program_id(0) // (D // COLS)  # of (B, H)
    col = tl.program_id(0) % (D // COLS) * COLS
    b = row // H
    h = row % H
    segment = tl.program_id(1)
    rate = tl.load(rates + h)
    if limit is not None:
        limit += b.to(tl.int64) * T
    d = tl.arange(0, D)[:, None]
    channel = col + tl.arange(0, COLS)[None]

    age = tl.arange(0, ROWS)
    if REVERSE:
        age = ROWS - 1 - age
    # f_ij = fall_i * rise_j, both 2^46 at most where s is 1: a tile of f would take as many registers as the products
    fall = tl.exp2(-rate * (age - ROWS // 2))
    rise = tl.exp2(rate * (age - ROWS // 2))

    state = tl.zeros([D, COLS], tl.float32)
    if before is not None:
        state = tl.load(before + row.to(tl.int64) * head + segment * D * D + d * down + channel * across)
    for step in range(0, chunks):
        chunk = segment * chunks + step
        if REVERSE:
            chunk = segment * chunks + chunks - 1 - step
        first = chunk * ROWS
        line = b * T + first
        i = first + tl.arange(0, ROWS)
        reach, left, keep, limits = _fading(limit, i, first, age, rate, ROWS=ROWS, REVERSE=REVERSE)
        key = k.load([line, h * D])                                             # [ROWS, D]
        value = v.load([line, h * D + col])                                     # [ROWS, COLS]

        # y: from the state, then from the chunk's own keys
        if y is not None:
            query = q.load([line, h * D])                                       # [ROWS, D]
            out = _matmul(query, state.to(query.dtype)) * reach[:, None]        # [ROWS, COLS]
            weight = _matmul(query, key.T) * fall[:, None] * rise[None]         # [ROWS, ROWS]
            if REVERSE:
                seen = i[None] >= i[:, None]
                if limit is not None:
                    seen = seen & (i[None] <= limits[:, None])
            else:
                seen = i[None] <= i[:, None]
                if limit is not None:
                    seen = seen & (i[None] >= limits[:, None])
            weight = tl.where(seen, weight, 0.0)
            out += _matmul(weight.to(value.dtype), value)
            y.store([line, h * D + col], out.to(value.dtype))

        # the state after the chunk. A product in fp32 would cost registers that there are not
        value = value * left[:, None].to(value.dtype)
        state = state * keep + _matmul(key.T, value)

    if added is not None:
        place = row.to(tl.int64) * tl.num_programs(1) + segment
        tl.store(added + place * D * D + d * D + channel, state)

def _lightning_triton(q, k, v, decay, end):
    """lightning_attention from no state, in kernels -> y and the last state."""
    B, T, H, D = q.shape
    n = cdiv(T, LIGHTNING_TILE["ROWS"])
    columns = cdiv(D, LIGHTNING_TILE["COLS"])
    chunks = cdiv(n, max(1, LIGHTNING_PROGRAMS // (B * H * columns)))
    segments = cdiv(n, chunks)

    # whole segments, padded in front with zeros, which add nothing to a state
    front = segments * chunks * LIGHTNING_TILE["ROWS"] - T
    if front > 0:
        q, k, v = (pad_tokens(x, front) for x in (q, k, v))
        if end is not None:
            end = F.pad(end + front, (front, 0))
    walk = Walk(decay.float(), end, segments, chunks)
    y, last_state = _Lightning.apply(q.contiguous(), k.contiguous(), v.contiguous(), walk)
    return y[:, front:], last_state

class _Lightning(torch.autograd.Function):
    """_lightning_triton on whole segments. No atomics: two runs, equal bits."""

    @staticmethod
    def forward(ctx, q, k, v, walk):
        states = walk.kept @ walk.added(k, v).flatten(3)
        states = states.unflatten(3, (q.size(3), -1))                                      # (B, H, segments + 1, D, D)
        y = walk.outputs(q, k, v, states)
        ctx.walk = walk
        ctx.save_for_backward(q, k, v, states)
        return y, states[:, :, -1].clone()

    @staticmethod
    def backward(ctx, dy, dlast):
        q, k, v, states = ctx.saved_tensors
        walk = ctx.walk
        dy = dy.contiguous()
        dq = walk.outputs(dy, v, k, states.mT)

        # from the end: a state is that of the segment's first token, the last one that of a token after all
        added = walk.added(q, dy, reverse=True)
        dlast = dlast * walk.decay[:, None, None].exp()
        added = torch.cat([added, dlast[:, :, None]], 2)
        dstates = (walk.kept.mT @ added.flatten(3)).unflatten(3, (q.size(3), -1))         # (B, H, segments, D, D)
        dk = walk.outputs(v, dy, q, dstates.mT, reverse=True)
        dv = walk.outputs(k, q, dy, dstates, reverse=True)
        return dq, dk, dv, None

@dataclasses.dataclass
class Walk:
    """How kernels walk over rows. In a walk in `reverse`, the state "before" a segment is that of what follows it."""
    decay: torch.Tensor                # (H,) fp32
    end: torch.Tensor                  # (B, T), or None
    segments: int                      # of a row
    chunks: int                        # of a segment

    def limit(self, reverse):
        """The first token of each token's document, in reverse the last one: (B, T) int32. None: there is one."""
        if self.end is None:
            return None
        if reverse:
            return self.end.int() - 1
        # before it lie the tokens whose documents have ended
        i = torch.ones_like(self.end).cumsum(1, dtype=self.end.dtype) - 1
        return torch.searchsorted(self.end.contiguous(), i, right=True, out_int32=True)

    @functools.cached_property
    def kept(self):
        """See kept_states, of segments."""
        return kept_states(self.decay, self.segments, self.chunks * LIGHTNING_TILE["ROWS"], self.end)

    def added(self, k, v, reverse=False):
        """What each segment adds to a state -> (B, H, segments, D, D)."""
        B, _, H, D = k.shape
        added = torch.empty(B, H, self.segments, D, D, device=k.device)
        self.launch(None, k, v, None, None, added, reverse)
        return added

    def outputs(self, q, k, v, before, reverse=False):
        """One of the four sums above, from the states before segments (B, H, segments or more, D, D) -> as q."""
        y = torch.empty_like(q)
        self.launch(q, k, v, y, before, None, reverse)
        return y

    def launch(self, q, k, v, y, before, added, reverse):
        """See _lightning_kernel; q, k, v and y are (B, T, H, D)."""
        B, T, H, D = k.shape
        tile = dict(LIGHTNING_TILE, COLS=min(D, LIGHTNING_TILE["COLS"]))

        def tiles(x, columns):
            return None if x is None else TensorDescriptor.from_tensor(x.view(B * T, H * D), [tile["ROWS"], columns])
        head, _, down, across = (0, 0, 0, 0) if before is None else before.stride()[1:]
        _lightning_kernel[B * H * (D // tile["COLS"]), self.segments](
            q=tiles(q, D),
            k=tiles(k, D),
            v=tiles(v, tile["COLS"]),
            y=tiles(y, tile["COLS"]),
            rates=self.decay / math.log(2),
            limit=self.limit(reverse),
            before=before, head=head, down=down, across=across,
            added=added,
            T=T,
            chunks=self.chunks,
            H=H, D=D, REVERSE=reverse,
            **tile)

class ShortConv(nn.Module):
    """x plus a causal convolution of each channel by itself: two tokens side by side make one feature before attention
    compares them. differs from M2: no released model has it; small models learn to look things up with it, or after
    very many steps."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.n_embd, cfg.conv_taps))  # [:, t]: of the input t tokens ago

    def tap(self, t, x):
        """The factor of each channel's input t tokens ago."""
        return self.weight[:, t].to(x.dtype)

    def forward(self, x, ctx):
        """x (B, T, C) -> (B, T, C)."""
        T, taps = x.size(1), self.weight.size(-1)
        past = x.new_zeros(len(x), taps - 1, x.size(2))
        if ctx.cache is not None:
            past = ctx.cache.past[ctx.layer]
        inputs = torch.cat([past, x], 1)                                                      # (B, taps - 1 + T, C)
        y = x
        for t in range(taps):
            shifted = inputs[:, taps - 1 - t:taps - 1 - t + T]
            if ctx.end is not None and 0 < t < T:  # within the document alone
                inside = torch.arange(t, T, device=x.device) < ctx.end[:, :T - t]
                shifted = shifted * F.pad(inside, (t, 0))[..., None]
            y = y + self.tap(t, x) * shifted
        if ctx.cache is not None:
            past.copy_(inputs[:, T:])
        return y

class Lightning(nn.Module):
    """MiniMax-01's Lightning layer (arXiv 2501.08313): SiLU on q, k and v, a decay for each head, then a norm over all
    heads and a gate. No RoPE, no scale, no softmax; as many KV heads as heads."""

    def __init__(self, cfg, number):
        """number: of the layer, from 0 on. Later layers forget more slowly."""
        super().__init__()
        H, D = cfg.n_head, cfg.head_dim
        self.head_dim = D
        self.indexer = None
        self.q_proj = Linear(cfg.n_embd, H * D)
        self.k_proj = Linear(cfg.n_embd, H * D)
        self.v_proj = Linear(cfg.n_embd, H * D)
        self.gate_proj = Linear(cfg.n_embd, H * D)
        self.norm = RMSNorm(H * D, cfg)
        self.o_proj = Linear(H * D, cfg.n_embd)
        slope = 2.0 ** (-8 * torch.arange(1, H + 1) / H)
        of_layer = 1 - number / (cfg.n_layer - 1 + 1e-5) + 1e-5
        self.register_buffer("decay", slope * of_layer, persistent=False)

    def _apply(self, fn, recurse=True):
        """The decay stays in fp32 when the model moves to bf16: e^-s is taken to the power of a distance."""
        decay = self.decay
        super()._apply(fn, recurse)
        if self.decay.dtype.itemsize < 4:
            self.decay = decay.to(self.decay.device)
        return self

    def forward(self, x, ctx):
        """x (B, T, C) -> y (B, T, C), aux."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (F.silu(proj(x)).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        y, aux = self.attend(q, k, v, ctx)
        y = self.norm(y.flatten(2)).to(x.dtype) * self.gate_proj(x).sigmoid()
        return self.o_proj(y), aux

    def attend(self, q, k, v, ctx):
        """q, k, v (B, T, H, D) -> y as q; aux, which is empty. It reads and writes the cache's state."""
        state = None
        if ctx.cache is not None:
            state = ctx.cache.state[ctx.cache.lane_of[ctx.layer]]
        y, last_state = lightning_attention(q, k, v, self.decay, ctx.end, state)
        if ctx.cache is not None:
            state.copy_(last_state)
        return y, {}

# ---- context parallelism -------------------------------------------------------------------------
# A row of T tokens is shared out over the P ranks of a group: cut into 2 P equal chunks, of which rank r has chunks r
# and 2 P - 1 - r. A query's work grows with its position, for the index branch scores all keys before it: a chunk from
# the front and its mirror from the back cost each rank the same.
#
#     4 ranks    | 0 | 1 | 2 | 3 | 3 | 2 | 1 | 0 |    chunks of a row, by their rank
#
# A rank computes all of a layer for its own tokens alone. Attention is the one place that needs others: each rank sends
# the keys, values and index keys of its tokens to all, then its queries choose blocks among the whole row's, exactly as
# on one rank. So come 2 Hkv D + Di numbers of each token that is not its own, 2.3 KB at M3's sizes in bf16, of which
# the index keys are a tenth; backward their gradients go the other way. Keys that stay would cost more before a block
# is fetched: Hkv Di numbers of a token's queries go to each rank, 1.0 KB, and Hkv (S - 1) candidates come back, a score
# and a block each, 0.5 KB (that choice is msa.block_candidates and msa.merge_candidates). What gathered keys cost is
# memory: those of a whole row, for one layer at a time.

class _Gather(torch.autograd.Function):
    """Tensors (B, T / size, …) of this rank's tokens -> (B, T, …) of the row's, in one collective. Backward each rank
    gets the sum, over ranks, of its tokens' gradients, always in this order."""

    @staticmethod
    def forward(ctx, shard, *tensors):
        ctx.shard = shard
        sent = torch.cat([x.flatten() for x in tensors])                                                   # (n,)
        came = sent.new_empty(shard.size, len(sent))
        dist.all_gather(list(came), sent, group=shard.group)
        came = came.split([x.numel() for x in tensors], 1)
        whole = []
        for x, by_rank in zip(tensors, came):
            row = x.new_empty(len(x), shard.T, *x.shape[2:])
            for peer, theirs in zip(shard.peers(), by_rank):
                for (start, stop), chunk in zip(peer.parts, theirs.view_as(x).chunk(2, 1)):
                    row[:, start:stop] = chunk
            whole.append(row)
        return tuple(whole)

    @staticmethod
    def backward(ctx, *grads):
        shard = ctx.shard
        theirs = [[peer.take(grad) for grad in grads] for peer in shard.peers()]
        leaving = torch.stack([torch.cat([x.flatten() for x in one]) for one in theirs])              # (size, n)
        came = torch.empty_like(leaving)
        dist.all_to_all_single(came, leaving, group=shard.group)
        wide = torch.promote_types(came.dtype, torch.float32)
        total = came.sum(0, dtype=wide).to(came.dtype)
        own = theirs[shard.rank]
        parts = total.split([x.numel() for x in own])
        return None, *(part.view_as(x) for part, x in zip(parts, own))

@dataclasses.dataclass
class ContextShard:
    """Which tokens of each row of T are this rank's: of 2 * size chunks, that number `rank` and its mirror."""
    rank: int
    size: int
    T: int
    group: "dist.ProcessGroup" = None  # the ranks that share rows; None = all

    @staticmethod
    def fits(T, size, L, stride):
        """Whether rows of T tokens can be shared out: each chunk begins with a key block of L tokens, and with the
        first of the `stride` queries of which the index branch learns from the last."""
        return T % (2 * size * math.lcm(L, stride)) == 0

    @property
    def parts(self):
        """(start, stop) of this rank's two chunks, the earlier one first."""
        chunk = self.T // (2 * self.size)
        return [(n * chunk, (n + 1) * chunk) for n in (self.rank, 2 * self.size - 1 - self.rank)]

    def peers(self):
        """The shard of each rank."""
        return [dataclasses.replace(self, rank=rank) for rank in range(self.size)]

    def take(self, x, dim=1):
        """Of a tensor with T slots, this rank's."""
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.parts], dim)

    def gather(self, *tensors):
        """Tensors (B, T / size, …) of this rank's tokens, of one dtype -> (B, T, …) of whole rows, with gradient."""
        return _Gather.apply(self, *tensors)

# ---- layers --------------------------------------------------------------------------------------
# A layer with MSA has an index branch besides: small queries and keys, whose products rank the key blocks. Attention
# reads the S blocks that it chose for each query (see msa.py); `Attention.attend` shows which operation does that in
# training, prefill and decode. The index branch learns in training alone, from one loss alone: the KL between the
# attention's softmax and its own, over all visible keys during its warm-up, over the chosen blocks later. Its input and
# that softmax are detached: this loss moves nothing else, and no other loss moves the index branch.

@dataclasses.dataclass
class Context:
    """What one forward pass tells a layer beside its input."""
    rope: tuple                        # cos, sin: (B, T, 1, rotary_dim / 2) each
    end: torch.Tensor = None           # (B, Tk) int32, visibility; None = causal
    weight: torch.Tensor = None        # (B, T) multiplicity of a token, 0 = pad; None = 1
    cache: KVCache = None
    index_warmup: bool = False         # MSA layers attend to everything while their index branch learns
    layer: int = 0                     # which lane of the cache is the layer's
    block_idx: torch.Tensor = None     # (B, T, Hkv, S) a recorded choice of blocks, to be used again
    experts: torch.Tensor = None       # (B, T, A) a recorded choice of experts, to be used again
    shard: ContextShard = None         # T is this rank's share of a row's tokens; end is the whole row's
    start: int = None                  # slot of the first query, where keys are a whole row's and queries a chunk's

class Indexer(nn.Module):
    """MSA's index branch: one query head for each KV head, one key head for all. Its input is detached."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.index_head_dim
        self.q_proj = Linear(cfg.n_embd, cfg.n_kv_head * D)
        self.k_proj = Linear(cfg.n_embd, D)
        self.q_norm = RMSNorm(D, cfg)
        self.k_norm = RMSNorm(D, cfg)

    def forward(self, x, rope):
        """x (B, T, C) -> index queries (B, T, Hkv, D), index keys (B, T, D)."""
        x = x.detach()
        D = self.k_proj.out_features
        qi = self.q_norm(self.q_proj(x).unflatten(-1, (-1, D)))
        ki = self.k_norm(self.k_proj(x))[:, :, None]
        return apply_rope(qi, rope), apply_rope(ki, rope)[:, :, 0]

class Attention(nn.Module):
    """Grouped-query attention over every visible key ("full"), over blocks that an index branch chooses ("msa"), or
    over the last keys ("swa")."""

    def __init__(self, cfg, attn_type):
        super().__init__()
        H, Hkv, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.cfg = cfg
        self.q_proj = Linear(cfg.n_embd, H * D)
        self.k_proj = Linear(cfg.n_embd, Hkv * D)
        self.v_proj = Linear(cfg.n_embd, Hkv * D)
        self.o_proj = Linear(H * D, cfg.n_embd)
        # M2 norms all heads' channels together: split over devices, its norm needs every shard's sum of squares
        together = cfg.qk_norm == "layer"
        self.q_norm = RMSNorm(H * D if together else D, cfg)
        self.k_norm = RMSNorm(Hkv * D if together else D, cfg)
        self.indexer = Indexer(cfg) if attn_type == "msa" else None
        self.is_window = attn_type == "swa"
        self.sink = None
        if self.is_window and cfg.window_sink:
            self.sink = nn.Parameter(torch.zeros(H))

    def forward(self, x, ctx):
        """x (B, T, C) -> y (B, T, C), aux."""
        q, k, v, qi, ki = self.project(x, ctx.rope)
        y, aux = self.attend(q, k, v, qi, ki, ctx)                                                        # (B, T, H, D)
        return self.o_proj(y.flatten(2)), aux

    def project(self, x, rope):
        """x (B, T, C) -> q (B, T, H, D), k and v (B, T, Hkv, D), and the index branch's qi and ki, or None."""
        D = self.cfg.head_dim
        q = apply_rope(self.normalise(self.q_proj(x), self.q_norm), rope)
        k = apply_rope(self.normalise(self.k_proj(x), self.k_norm), rope)
        v = self.v_proj(x).unflatten(-1, (-1, D))
        if self.indexer is None:
            return q, k, v, None, None
        return q, k, v, *self.indexer(x, rope)

    def normalise(self, x, norm):
        """Over all channels (M2) or head by head (M3): (B, T, heads * D) -> (B, T, heads, D)."""
        D = self.cfg.head_dim
        if self.cfg.qk_norm == "layer":
            return norm(x).unflatten(-1, (-1, D))
        return norm(x.unflatten(-1, (-1, D)))

    def attend(self, q, k, v, qi, ki, ctx):
        """What `project` gives -> y (B, T, H, D), aux: block_idx where blocks were chosen, index_kl in training,
        block_recall, score_recall and block_chance in an evaluation."""
        if self.is_window:
            return self.attend_window(q, k, v, ctx), {}
        if ctx.shard is not None:
            return self.attend_shard(q, k, v, qi, ki, ctx)
        S, L, stride = self.cfg.index_topk_blocks, self.cfg.index_block_size, self.cfg.index_kl_stride
        start = ctx.start
        if ctx.cache is not None:
            start = ctx.cache.length
            k, v, ki = ctx.cache.append(ctx.layer, k, v, ki)

        # a layer without an index branch reads every visible key
        if self.indexer is None:
            return full_attention(q, k, v, ctx.end, start), {}

        # an evaluation measures how much of the attention's mass the index branch finds
        learns = self.training and ctx.cache is None
        aux = {}
        if ctx.cache is None and not self.training and start is None:
            aux = self.measure_recall(q, k, qi, ki, ctx.end)

        # warm-up: the layer reads every visible key, and the index branch learns to predict it (paper, section 3.4)
        if ctx.index_warmup:
            if learns:
                aux["index_kl"] = index_kl_loss(qi, ki, q, k, None, L, ctx.end, ctx.weight, stride, start)
            return full_attention(q, k, v, ctx.end, start), aux

        # prefill and decode: choice and attention in one operation
        if ctx.cache is not None and ctx.block_idx is None:
            y, aux["block_idx"] = msa_decode(q, k, v, qi, ki, S, L, start, ctx.end)
            return y, aux

        # training, evaluation, replay: a choice, made now or recorded, then attention over the chosen blocks
        block_idx = ctx.block_idx
        if block_idx is None:
            block_idx = select_blocks(qi, ki, S, L, ctx.end, start)
        aux["block_idx"] = block_idx
        if learns:
            y, aux["index_kl"] = msa_train(
                q, k, v, qi, ki, block_idx, L, ctx.end, ctx.weight, stride, start=start)
        else:
            y = msa_attention(q, k, v, block_idx, L, ctx.end, start)
        return y, aux

    def attend_shard(self, q, k, v, qi, ki, ctx):
        """`attend` of this rank's share of each row: the keys of the whole row come from all ranks, then its two chunks
        of queries go one after the other."""
        if ki is None:
            k, v = ctx.shard.gather(k, v)
        else:
            k, v, ki = ctx.shard.gather(k, v, ki)
        ys = []
        reports = []
        for number, (start, _) in enumerate(ctx.shard.parts):
            queries, index_queries, weight = (
                None if x is None else x.chunk(2, 1)[number] for x in (q, qi, ctx.weight))
            part = dataclasses.replace(ctx, shard=None, start=start, weight=weight)
            y, report = self.attend(queries, k, v, index_queries, ki, part)
            ys.append(y)
            reports.append(report)
        aux = {}
        if "block_idx" in reports[0]:
            aux["block_idx"] = torch.cat([report["block_idx"] for report in reports], 1)
        if "index_kl" in reports[0]:
            aux["index_kl"] = reports[0]["index_kl"] + reports[1]["index_kl"]
        return torch.cat(ys, 1), aux

    def attend_window(self, q, k, v, ctx):
        """q (B, T, H, D), k and v (B, T, Hkv, D) -> y (B, T, H, D), over the window's keys."""
        missing = None
        if ctx.cache is not None:
            k, v, missing = ctx.cache.append_to_ring(ctx.layer, k, v)
        return window_attention(q, k, v, self.cfg.window, self.sink, ctx.end, missing)

    def measure_recall(self, q, k, qi, ki, end):
        """How well the index branch finds the blocks of most attention, on the batch's first row alone: the reference
        is dense."""
        S, L = self.cfg.index_topk_blocks, self.cfg.index_block_size
        end = None if end is None else end[:1]
        first = (x[:1] for x in (qi, ki, q, k))
        found = block_recall(*first, S, L, end)
        return dict(zip(("block_recall", "score_recall", "block_chance"), found))

class Block(nn.Module):
    """One Transformer layer: attention, then the MLP, each on a normed copy of the residual stream."""

    def __init__(self, cfg, attn_type, mlp_type, number):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.n_embd, cfg)
        self.mlp_norm = RMSNorm(cfg.n_embd, cfg)
        self.conv = ShortConv(cfg) if cfg.conv_taps else None
        if attn_type == "lightning":
            self.attn = Lightning(cfg, number)
        else:
            self.attn = Attention(cfg, attn_type)
        if mlp_type == "moe":
            self.mlp = MoE(cfg)
        else:
            self.mlp = MLP(cfg.n_embd, cfg.dense_dim, cfg.activation)

    def forward(self, x, ctx):
        """x (B, T, C) -> x (B, T, C), aux of both halves."""
        h = self.attn_norm(x)
        if self.conv is not None:
            h = self.conv(h, ctx)
        y, attn_aux = self.attn(h, ctx)
        x = x + y
        y, mlp_aux = self.mlp(self.mlp_norm(x), ctx.weight, ctx.experts)
        x = x + y
        return x, {**attn_aux, **mlp_aux}

class MTP(nn.Module):
    """Module k of multi-token prediction: from the hidden state at i of depth k-1 and the embedding of token i+k, the
    token i+k+1. One Transformer block like the trunk's last; embedding and head are the trunk's."""

    def __init__(self, cfg):
        super().__init__()
        self.h_norm = RMSNorm(cfg.n_embd, cfg)
        self.e_norm = RMSNorm(cfg.n_embd, cfg)
        self.norm = RMSNorm(cfg.n_embd, cfg)
        self.proj = Linear(2 * cfg.n_embd, cfg.n_embd)
        self.block = Block(cfg, cfg.mtp_attn_type, cfg.mlp_types[-1], cfg.n_layer - 1)

    def forward(self, h, embedded, ctx):
        """h, embedded (B, T, C) -> h (B, T, C) of the next depth, aux."""
        # not published: the order of the two halves; DeepSeek-V3's code has the embedding first
        both = torch.cat([self.e_norm(embedded), self.h_norm(h)], -1)
        return self.block(self.proj(both), ctx)

# ---- losses --------------------------------------------------------------------------------------
# A token's loss is -log p(the token after it), in nats: p = softmax(W h), where h is the token's hidden state after the
# last norm and W the head; a target of -1 has no loss. MTP module k has the same loss on the token k further on, from
# its own hidden states. The logits W h, V numbers a token, are the largest tensor of a step: they are computed for a
# chunk of tokens at a time, and each chunk gives its loss and its gradient at once.
# forward gives sums; count_losses gives, for a whole step, what each is divided by; sums.over(counts) gives means; and
# means.objective() the number that is minimised. The parts of a step add up: each is divided by the step's counts.

@dataclasses.dataclass
class Losses:
    """The parts of a step's loss: as sums in nats, as counts to divide them by, or as means."""
    next: torch.Tensor                 # (): of the next token         count: tokens that have a target
    mtp: torch.Tensor                  # (K,): of each MTP module      count: tokens that have one k + 1 places on
    kl: torch.Tensor                   # (layers with MSA,), trunk, then MTP    count: queries of the KL, by weight

    def over(self, total):
        """Sums over their counts -> means."""
        return Losses(self.next / total.next, self.mtp / total.mtp, self.kl / total.kl)

    def objective(self, mtp_weight):
        """Of means -> the number that a step minimises: next token + mtp_weight * MTP, mean over modules, + all KLs."""
        loss = self.next + self.kl.sum()
        if len(self.mtp):
            loss = loss + mtp_weight * self.mtp.mean()
        return loss

class _ChunkedLoss(torch.autograd.Function):
    """cross_entropy in training. Each chunk's gradient is taken at once: its logits are not kept, or computed again."""

    @staticmethod
    def forward(ctx, h, W, y, chunk):
        w = W.to(h.dtype)
        dh = torch.empty_like(h)
        dW = torch.zeros_like(W)
        total = 0.0
        for x, t, dx in zip(h.split(chunk), y.split(chunk), dh.split(chunk)):
            logits = x @ w.T                                                                                  # (n, V)
            total = total + softmax_loss(logits, t).sum()  # from here on they are their own gradient
            dx[:] = logits @ w
            dW += logits.T @ x
        ctx.save_for_backward(dh, dW)
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors
        return grad * dh, grad * dW, None, None  # grad is a number: the dtypes stay

def cross_entropy(h, W, targets, chunk=None):
    """Sum of the tokens' losses, fp32 or wider, without an (n, V) matrix for all tokens at once.

    h        (B, T, C) hidden states
    W        (V, C) head
    targets  (B, T), -1 = no loss
    chunk    rows at a time; default: at most 2^30 logits
    """
    h = h.flatten(0, 1)
    y = targets.flatten()
    if chunk is None:
        chunk = 2 ** (30 - len(W).bit_length())
    if torch.is_grad_enabled() and (h.is_cuda or len(y) > chunk):
        return _ChunkedLoss.apply(h, W, y, chunk)
    w = W.to(h.dtype)
    total = 0.0
    for x, t in zip(h.split(chunk), y.split(chunk)):
        logits = x @ w.T                                                                                      # (n, V)
        total = total + F.cross_entropy(widen(logits), t, ignore_index=-1, reduction="sum")
    return total

# One program = one row of logits. The second pass finds in the L2 what the first has read: few rows are under way.
@jit
def _softmax_loss_kernel(
    logits,  # (n, V), overwritten by the gradient
    y,       # (n,), targets, -1 = none
    loss,    # (n,), written
    V,
    COLS: constexpr,
):
    row = logits + tl.program_id(0).to(tl.int64) * V
    target = tl.load(y + tl.program_id(0))
    column = tl.arange(0, COLS)

    # running maximum and sum of exponentials, a pair for each of COLS lanes
    m = tl.full([COLS], LEAST, tl.float32)
    l = tl.zeros([COLS], tl.float32)
    for first in range(0, V, COLS):
        token = first + column
        x = tl.load(row + token, mask=token < V, other=NOTHING).to(tl.float32)
        new = tl.maximum(m, x)
        l = l * tl.exp(m - new) + tl.exp(x - new)
        m = new
    lse = tl.max(m, 0)
    lse += tl.log(tl.sum(l * tl.exp(m - lse), 0))

    correct = tl.load(row + tl.maximum(target, 0)).to(tl.float32)
    tl.store(loss + tl.program_id(0), tl.where(target < 0, 0.0, lse - correct))
    tl.debug_barrier()  # the target's logit is read before it is written

    # the gradient, softmax - one-hot, over the logits
    for first in range(0, V, COLS):
        token = first + column
        x = tl.load(row + token, mask=token < V, other=0.0).to(tl.float32)
        x = tl.exp(x - lse) - (token == target).to(tl.float32)
        x = tl.where(target < 0, 0.0, x)
        tl.store(row + token, x.to(logits.dtype.element_ty), mask=token < V)

def softmax_loss(logits, y, impl="auto"):
    """Cross-entropy of each row; the gradient of their sum is written over the logits.

    logits  (n, V)
    y       (n,) targets, -1 = none
    impl    auto (Triton on a GPU in 16 bits), triton (logits must be contiguous) or torch
    -> (n,), fp32 or wider.
    """
    n, V = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    if use_triton(impl, logits):
        assert logits.is_contiguous(), f"logits have strides {logits.stride()}, expected {(V, 1)}"
        loss = torch.empty(n, device=y.device, dtype=wide)
        cols = min(8192, triton.next_power_of_2(V))
        warps = max(1, cols // 512)  # 16 logits a thread
        _softmax_loss_kernel[n,](logits=logits, y=y.contiguous(), loss=loss, V=V, COLS=cols, num_warps=warps)
        return loss

    has_target = y >= 0
    target = y.clamp(min=0)[:, None]                                                                          # (n, 1)
    logp = logits.log_softmax(-1, dtype=wide)
    loss = torch.where(has_target, -logp.gather(1, target)[:, 0], 0)
    # in place, so that one matrix more than the logits is alive, and not three
    grad = logp.exp_().scatter_add_(1, target, logp.new_full(target.shape, -1)).mul_(has_target[:, None])
    logits.copy_(grad)
    return loss

def check_documents(end, cache):
    """ValueError unless rows hold documents one after the other, as windows, states and convolutions need: a tree's
    branches would read one another. end (B, T). On a GPU, which nothing waits for, an assertion there."""
    if cache is not None:
        raise ValueError("end with a cache: windows, Lightning layers and convolutions read one document there")
    slot = torch.arange(1, end.size(1), device=end.device)
    before = end[:, :-1]
    goes_on = end[:, 1:] == before
    begins = before <= slot            # the document before is over
    is_whole = (goes_on | begins).all()
    if is_whole.is_cuda:
        torch._assert_async(is_whole, "a prefix tree for a model with windows, Lightning layers or convolutions")
    elif not is_whole:
        raise ValueError("end describes a tree: windows, Lightning layers and convolutions read documents that lie "
                         "one after the other")

def check_key_blocks(pos, end, weight, L):
    """ValueError unless each document's key blocks are blocks of the layout, as MSA needs: a text that lies some tokens
    further on, behind pads, say, would be cut elsewhere. pos, end, weight (B, T), the last two None or as in `forward`:
    a pad, which none sees or which has no weight, may lie anywhere. On a GPU, which nothing waits for, an assertion
    there."""
    slot = torch.arange(pos.size(1), device=pos.device)
    fits = (slot - pos) % L == 0
    if end is not None:
        fits = fits | (end == slot + 1)
    if weight is not None:
        fits = fits | (weight == 0)
    fits = fits.all()
    if fits.is_cuda:
        torch._assert_async(fits, f"documents that do not begin at multiples of {L}, the tokens in a key block")
    elif not fits:
        raise ValueError(f"pos: documents must begin at multiples of {L}, the tokens in a key block: pad so many in "
                         "front, or pad behind")

def within_document(k, T, end, device):
    """Which of the first T - k positions have a k-th next token in their document: bool (B, T - k); without end
    (1, T - k), all True."""
    slot = torch.arange(k, max(k, T), device=device)[None]
    if end is None:
        return torch.ones_like(slot, dtype=torch.bool)
    return slot < end[:, :slot.size(1)]

def depth_weight(k, T, weight, end):
    """Multiplicity (B, T) of tokens -> at depth k of MTP: 0 where the document has no k-th next token, (B, T - k)."""
    return weight[:, :max(0, T - k)] * within_document(k, T, end, weight.device)

def stack_reports(reports):
    """What layers report, one dict each -> a dict of tensors whose first dimension are the layers that report it."""
    found = {}
    for report in reports:
        for key, x in report.items():
            found.setdefault(key, []).append(x)
    return {key: torch.stack(layers) for key, layers in found.items()}

# ---- the model -----------------------------------------------------------------------------------
# MiniMax is the trunk (embedding, layers, norm, head) and the MTP modules. `forward` runs it: with losses in training,
# with a cache in generation. The other methods count losses, parameters and FLOPs, balance the experts' load after a
# step (see moe.py), and read and write released checkpoints with the functions of the sections below.

class MiniMax(nn.Module):
    """`dtype` is what activations are computed in; weights keep theirs (fp32 in training) and are cast where used."""

    def __init__(self, cfg, dtype=None):
        super().__init__()
        cfg.check(dtype or torch.get_default_dtype())  # once more: fields may have been set since
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        kinds = zip(cfg.attn_types, cfg.mlp_types)
        self.layers = nn.ModuleList(Block(cfg, *kind, number) for number, kind in enumerate(kinds))
        self.norm = RMSNorm(cfg.n_embd, cfg)
        self.lm_head = Linear(cfg.n_embd, cfg.vocab_size)
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
            if p.dim() == 1:  # a norm starts as the identity, a sink at 0
                continue
            if "conv" in name:
                p.normal_(0, CONV_STD)
                continue
            if name == "lm_head.weight":
                p.normal_(0, std / 4)
            elif name.endswith(("o_proj.weight", "w2", "w2.weight")):
                p.normal_(0, std / (2 * self.cfg.n_layer) ** 0.5)
            else:
                p.normal_(0, std)

    def forward(self, idx, targets=None, weight=None, cache=None, pos=None, end=None, replay=None, n_logits=None,
                index_warmup=False, run_mtp=True, recompute=False, shard=None):
        """One forward for training, prefill, decode and merged trees.

        idx           (B, T) tokens
        targets       (B, T) the token after each, -1 = no loss. Without n_logits they give the losses alone
        weight        (B, T) how often a token counts in the router's load and the index branch's KL, 0 = pad; default
                      1. Next-token and MTP losses do not read it: there a target of -1 leaves a token out
        cache         KVCache to read and append to
        pos           (B, T) position on a token's own path; default: counts on from the cache
        end           (B, Tk) int32, key j is visible to query i iff j <= i < end[j]; default: causal
        replay        an earlier aux, whose block_idx and experts are used again
        n_logits      logits of so many last positions; default: of all, or of none where there are targets
        index_warmup  MSA layers have full attention while their index branch learns
        run_mtp       whether targets run the MTP modules, too
        recompute     layers keep their input alone, and run again in the backward pass (activation checkpointing)
        shard         ContextShard: all of the above are whole rows, the same on each of its ranks, and what comes back
                      is of this rank's tokens alone, T / size a row; losses and gradients are its share of a sum
        -> logits (B, n, V) or None; Losses in training or with targets, or else None; aux, a flat dict of tensors:
        hidden (B, T, C) before the last norm, block_idx (layers with MSA, B, T, Hkv, S), experts (layers with experts,
        B, T, A), expert_load (layers with experts, E), and in an evaluation block_recall, score_recall, block_chance.
        ValueError for an idx without a token, for a tree where layers are recurrent, where layers have MSA for a
        document within a key block, and for a shard where it does not fit.
        """
        B, T = idx.shape
        if idx.numel() == 0:
            raise ValueError(f"idx {(B, T)}: at least one row of at least one token")
        if end is not None and self.cfg.is_recurrent:
            check_documents(end, cache)
        if pos is not None and cache is None and "msa" in self.cfg.attn_types:
            check_key_blocks(pos, end, weight, self.cfg.index_block_size)
        if pos is None:
            start = None if cache is None else cache.length
            pos = query_index(T, start, idx.device).expand(B, T)
        if weight is None:
            weight = torch.ones(B, T, device=idx.device)
        tokens = idx
        if shard is not None:
            self.check_shard(shard, T, cache, replay, n_logits)
            tokens, pos, weight = map(shard.take, (idx, pos, weight))
        ctx = Context(rope_tables(pos, self.cfg.rotary_dim, self.cfg.rope_theta), end, weight, cache, index_warmup,
                      shard=shard)

        # the trunk
        x = self.embed(tokens).to(self.dtype)                                                             # (B, T, C)
        reports = []                       # aux of each layer
        for block, layer_ctx in zip(self.layers, self.layer_contexts(ctx, replay)):
            if recompute:
                x, report = checkpoint(block, x, layer_ctx, use_reentrant=False)
            else:
                x, report = block(x, layer_ctx)
            reports.append(report)
        hidden = x
        x = self.norm(hidden)

        # losses, what the layers report, logits
        losses = None
        if self.training or targets is not None:
            losses = self.sum_losses(hidden, x, idx, targets, ctx, reports, run_mtp)
        aux = dict(hidden=hidden, **stack_reports(reports))
        if cache is not None:
            cache.remember(idx, hidden)
            cache.advance(T)
        if targets is not None and n_logits is None:
            return None, losses, aux
        if n_logits is not None:
            x = x[:, max(0, T - n_logits):]
        return self.lm_head(x), losses, aux

    def check_shard(self, shard, T, cache, replay, n_logits):
        """ValueError unless a rank can compute its share of rows of T tokens."""
        cfg = self.cfg
        if cfg.is_recurrent:
            raise ValueError("shard: context parallelism is for full attention and MSA, not for windows, Lightning "
                             "layers or convolutions")
        if cache is not None or replay is not None or n_logits is not None:
            raise ValueError("shard: context parallelism is for training and evaluation, without cache, replay or "
                             "n_logits")
        L = cfg.index_block_size if "msa" in cfg.attn_types else 1
        if shard.T != T or not shard.fits(T, shard.size, L, cfg.index_kl_stride):
            raise ValueError(f"shard: rows of {T} tokens cannot be cut into {2 * shard.size} chunks of whole key "
                             f"blocks of {L}, and for every {cfg.index_kl_stride} queries one that learns")

    def sum_losses(self, hidden, x, idx, targets, ctx, reports, run_mtp):
        """Losses of a forward -> Losses, 0 or empty where there are none. Takes the KLs out of `reports`, and adds what
        MTP modules report. hidden, x: the trunk's states before and after its last norm; idx, targets: whole rows."""
        none = torch.zeros(0, device=idx.device)
        losses = Losses(next=none.sum(), mtp=none, kl=none)
        if targets is not None:
            own = targets if ctx.shard is None else ctx.shard.take(targets)
            losses.next = cross_entropy(x, self.lm_head.weight, own)
            if run_mtp and self.mtp:
                mtp_losses = self.mtp_losses if ctx.shard is None else self.mtp_losses_of_shard
                losses.mtp = mtp_losses(hidden, idx, targets, ctx, reports)
        kls = [report.pop("index_kl") for report in reports if "index_kl" in report]
        if kls:
            losses.kl = torch.stack(kls)
        return losses

    def layer_contexts(self, ctx, replay):
        """The context of each layer of the trunk, with its part of the recorded choices."""
        replay = replay or {}
        chosen_blocks = iter(replay.get("block_idx", ()))
        chosen_experts = iter(replay.get("experts", ()))
        for number, layer in enumerate(self.layers):
            yield dataclasses.replace(
                ctx,
                layer=number,
                block_idx=next(chosen_blocks, None) if layer.attn.indexer else None,
                experts=next(chosen_experts, None) if isinstance(layer.mlp, MoE) else None)

    def mtp_walk(self, hidden, embedded, ctx, weights):
        """Run the MTP modules one after the other, as in training: module k at all positions with a k-th next slot.

        hidden    (B, T, C) of the trunk, before its last norm
        embedded  (B, T, C) embeddings of the tokens
        ctx       of the trunk
        weights   weights[k] (B, T - k): multiplicity of a position at depth k
        Yields k, the module's hidden states (B, T - k, C), normed for the head, and its aux.
        """
        T = hidden.size(1)
        for k, module in enumerate(self.mtp[:T - 1], 1):
            # the last k slots have no k-th next one: pads, for rows of the trunk's length use its compiled graphs
            depth_ctx = Context(ctx.rope, ctx.end, F.pad(weights[k], (0, k)), index_warmup=ctx.index_warmup,
                                layer=self.cfg.n_layer + k - 1)
            hidden, aux = module(hidden, F.pad(embedded[:, k:], (0, 0, 0, k)), depth_ctx)
            yield k, module.norm(hidden[:, :T - k]), aux

    def mtp_losses(self, hidden, idx, targets, ctx, reports):
        """Each MTP module's loss, a sum (K,). Adds what a module reports of its experts and index branch to `reports`.
        A position without a k-th next token in its document has no target, no KL and no part in the experts' load."""
        T = idx.size(1)
        embedded = self.embed(idx).to(hidden.dtype)
        weights = [depth_weight(k, T, ctx.weight, ctx.end) for k in range(len(self.mtp) + 1)]
        losses = [torch.zeros((), device=idx.device)] * len(self.mtp)
        for k, h, aux in self.mtp_walk(hidden, embedded, ctx, weights):
            shifted = targets[:, k:].where(within_document(k, T, ctx.end, idx.device), -1)
            losses[k - 1] = cross_entropy(h, self.lm_head.weight, shifted)
            reports.append({key: aux[key] for key in ("expert_load", "index_kl") if key in aux})
        return torch.stack(losses)

    def mtp_losses_of_shard(self, hidden, idx, targets, ctx, reports):
        """mtp_losses of this rank's tokens. A token's k-th next one may be another rank's: idx (B, T) and targets are
        whole rows, hidden (B, t, C) and ctx this rank's."""
        T = idx.size(1)
        losses = [torch.zeros((), device=idx.device)] * len(self.mtp)
        for k, module in enumerate(self.mtp[:T - 1], 1):
            ahead = F.pad(idx[:, k:], (0, k), value=-1)
            shifted = F.pad(targets[:, k:], (0, k), value=-1)
            inside = F.pad(within_document(k, T, ctx.end, idx.device), (0, k))
            ahead, shifted, inside = map(ctx.shard.take, (ahead, shifted, inside))                            # (B, t)
            embedded = self.embed(ahead.clamp(min=0)).masked_fill((ahead < 0)[..., None], 0).to(hidden.dtype)
            depth_ctx = dataclasses.replace(ctx, weight=ctx.weight * inside, layer=self.cfg.n_layer + k - 1)
            hidden, aux = module(hidden, embedded, depth_ctx)
            h = module.norm(hidden)
            losses[k - 1] = cross_entropy(h, self.lm_head.weight, shifted.where(inside, -1))
            reports.append({key: aux[key] for key in ("expert_load", "index_kl") if key in aux})
        return torch.stack(losses)

    def draft(self, cache, token, n, n_stale, draw, index_warmup=False, weights=None):
        """Guess the n tokens that follow `token`, by the MTP modules, one depth after the other (multi-token prediction
        as a draft model: DeepSeek-V3, arXiv 2412.19437, section 2.2).

        cache    with history, of 1 slot or more a row; its length, and what the trunk wrote, stay as they are
        token    (B,), drawn last: the first that is not in the cache
        n        drafts; beyond the last module that module goes on, reading its own output in place of the trunk's
        n_stale  at most so many of a row's last slots are new since the modules last ran
        draw     logits (B, V) -> token (B,), and what it was drawn from
        weights  DecodeWeights of the model, to compute with its kernels: then at most 8 slots are new, K included
        -> drafts (B, n), and of each what `draw` gave beside it, a list
        """
        K = len(self.mtp)
        decoder = self if weights is None else weights
        last = cache.length.long() - 1     # slot of the trunk's newest hidden state
        following = last[:, None] + 1 + torch.arange(n + 1, device=token.device)  # slots of `token` and the drafts
        cache.ids.scatter_(1, following[:, :1], token[:, None])

        # The window: every slot that is new, and K before, where module k has read a draft in place of the k-th next
        # token. Its states are the trunk's: none that a module made for an earlier draft is read again.
        T = n_stale + K
        first = (last + 1 - T).clamp(min=0)                                                                   # (B,)
        slots = first[:, None] + torch.arange(T, device=token.device)                                         # (B, T)
        x = cache.hidden.gather(1, slots[..., None].expand(-1, -1, self.cfg.n_embd))                      # (B, T, C)
        newest = (last - first).clamp(min=0)[:, None, None].expand(-1, 1, self.cfg.n_embd)
        window = cache.at(first.int(), max(0, cache.used - T))

        drafts = []
        drawn_from = []
        for depth in range(1, n + 1):
            k = min(depth, K)
            if depth <= K:
                x = decoder.draft_state(k, x, cache.ids.gather(1, slots + depth), window, index_warmup)
                h = x.gather(1, newest)                                                                   # (B, 1, C)
            else:
                # h stands for the state of the next slot
                beyond = depth - K
                slot = following[:, beyond - 1:beyond]
                ahead = cache.at(slot[:, 0].int(), cache.used + beyond - 1)
                h = decoder.draft_state(k, h, cache.ids.gather(1, slot + K), ahead, index_warmup)
            token, distribution = draw(decoder.draft_logits(k, h)[:, 0])
            cache.ids.scatter_(1, following[:, depth:depth + 1], token[:, None])
            drafts.append(token)
            drawn_from.append(distribution)
        return torch.stack(drafts, 1), drawn_from

    def draft_state(self, k, hidden, idx, cache, index_warmup=False):
        """MTP module k, from 1 on, on slots from the cache's length on, in its own lane.

        hidden  (B, T, C) of the trunk, or of the module before
        idx     (B, T) the k-th token after each
        -> hidden (B, T, C) before the module's last norm
        """
        slots = query_index(idx.size(1), cache.length, idx.device)                                            # (B, T)
        rope = rope_tables(slots, self.cfg.rotary_dim, self.cfg.rope_theta)
        weight = torch.ones(slots.shape, device=slots.device)
        ctx = Context(rope, None, weight, cache, index_warmup, self.cfg.n_layer + k - 1)
        return self.mtp[k - 1](hidden, self.embed(idx).to(hidden.dtype), ctx)[0]

    def draft_logits(self, k, hidden):
        """The last norm of MTP module k, from 1 on, and the head -> logits (B, T, V) fp32 or wider."""
        return widen(self.lm_head(self.mtp[k - 1].norm(hidden)))

    def count_losses(self, targets, weight=None, end=None, run_mtp=True):
        """What the sums of `forward` are divided by -> Losses, each at least 1. Arguments as there, of a whole step."""
        B, T = targets.shape
        K = len(self.mtp) if run_mtp else 0
        stride = self.cfg.index_kl_stride
        if weight is None:
            weight = torch.ones(B, T, device=targets.device)
        tokens = []
        queries = []
        for k in range(K + 1):  # depth 0 is the trunk
            inside = within_document(k, T, end, targets.device)                                       # (B, T - k)
            tokens.append(((targets[:, k:] >= 0) & inside).sum())
            of_kl = depth_weight(k, T, weight, end).clamp(min=0)[:, stride - 1::stride]
            queries.append(of_kl.sum())

        tokens = torch.stack(tokens).clamp(min=1)
        queries = torch.stack(queries).clamp(min=1)

        # a KL for each layer with MSA; MTP modules are like the last layer, and those deeper than T do not run
        kl = queries[:1].repeat(self.cfg.attn_types.count("msa"))
        if self.cfg.mtp_attn_type == "msa":
            kl = torch.cat([kl, queries[1:T]])
        return Losses(next=tokens[0], mtp=tokens[1:], kl=kl)

    def num_params(self):
        """All parameters; those that compute one token, without embedding, head and MTP (M2's report: 9.8B)."""
        total, active = count_params(self)
        tables = 2 * self.embed.weight.numel()
        modules = sum(count_params(module)[1] for module in self.mtp)
        return total, active - tables - modules

    def flops_per_token(self, pos, index_warmup=False, run_mtp=True, frozen=False):
        """Useful FLOPs of a training step, the mean over tokens: 6 for each active parameter (the index branch's need
        4, as its input has no gradient; they are counted as 6), and for each key that a query head reads 2 D for its
        score, 2 D for its value, and twice as much in the backward pass (PaLM, arXiv 2204.02311, appendix B).

        pos     positions of the tokens in their documents, of any shape; pads are left out by the caller
        frozen  MTP modules alone learn: the trunk has a forward pass only, a third, and the head no gradient
        """
        cfg = self.cfg
        modules = self.mtp if run_mtp else []

        # matrices: 2 FLOPs forward, 2 each for the gradients of input and weights; each module has the head once more
        head = self.lm_head.weight.numel()
        trunk = self.num_params()[1] + head
        heads = head * len(modules)
        matrices = 6 * (trunk + heads + sum(count_params(module)[1] for module in modules))
        if frozen:
            matrices -= 4 * trunk + 2 * heads

        # how many keys a query reads, and how many the index branch scores for it
        pos = pos.double()
        visible = pos + 1
        own = pos % cfg.index_block_size + 1  # of its own block
        read = visible
        scored = 0.0
        if not index_warmup:
            read = visible.minimum((cfg.index_topk_blocks - 1) * cfg.index_block_size + own)
            scored = visible - own

        # a layer with full attention, and one with MSA: attention, block scores, the KL of every stride-th query
        key = 4 * cfg.n_head * cfg.head_dim  # a key's score and value, all heads
        index_key = 2 * cfg.n_kv_head * cfg.index_head_dim
        full = 3 * key * visible
        # the KL: the teacher's scores forward, the index branch's forward and backward
        kl = (key / 2 + 3 * index_key) * read / cfg.index_kl_stride
        sparse = 3 * key * read + index_key * scored + kl
        # a window's layer; and Lightning's as a recurrence: a state's update and its product with the query
        windowed = 3 * key * visible.clamp(max=cfg.window)
        linear = 3 * key * cfg.head_dim * torch.ones_like(visible)
        of_kind = dict(full=full, msa=sparse, swa=windowed, lightning=linear)
        attention = sum(of_kind[kind] for kind in cfg.attn_types)
        if frozen:
            attention = attention / 3
        attention = attention + of_kind[cfg.mtp_attn_type] * len(modules)
        return matrices + attention.mean().item()

    def moe_layers(self):
        """Every mixture of experts, trunk then MTP: the rows of aux["expert_load"]."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def update_router_bias(self, load, rate):
        """One step of load balancing, after the optimizer's. load (layers with experts, E) = aux["expert_load"]."""
        for layer, row in zip(self.moe_layers(), load):
            if layer.router.weight.requires_grad:  # what is frozen keeps its bias, too
                update_bias(layer.router.bias, row, rate)

    @classmethod
    def from_hf(cls, path, device="cpu", dtype=torch.float32, layers=None, partial=False):
        """Read a checkpoint folder of transformers or of the release: M2, or M3's text model; shards and fp8 too.

        path     the folder: config.json, *.safetensors, an index where there are shards
        device   where the model computes
        dtype    of the weights but the routers', which stay in fp32
        layers   a range: these layers alone, between embedding and head
        partial  whether tensors may be missing or unknown
        ValueError for what HFCheckpoint refuses.
        """
        return HFCheckpoint(path, layers, partial).load(device, dtype)

    def save_hf(self, path, tokenizer=None, index_warmup=False, shard_bytes=5 * 10 ** 9):
        """Write a checkpoint folder that transformers opens and from_hf reads back bit for bit: M2, or M3's text model
        -> {"files": {name: bytes}, "left_out": lines that say what of the model is not there}.

        path          the folder, which is made
        tokenizer     what reads and writes the model's text: its files are written too
        index_warmup  whether the index branches were still learning, and their layers had full attention: they get it
        shard_bytes   of a file with weights at most; a larger tensor has one of its own
        ValueError, before the first byte is written, for a model that is neither of the two, and for a folder that
        holds other weights: whoever reads it could not tell them apart.
        """
        cfg, left_out = exported_config(self, index_warmup)
        tensors = exported_tensors(self.state_dict(), cfg)
        shards = split_shards(tensors, shard_bytes)
        check_folder(path, shards)

        texts = {}
        eot = None
        if tokenizer is not None:
            texts.update(tokenizer.hf_files())
            eot = tokenizer.eot if tokenizer.eot >= 0 else None  # -1: no token ends a text
        if len(shards) > 1:
            texts[INDEX] = index_text(shards)
        dtype = str(self.embed.weight.dtype).removeprefix("torch.")
        texts["config.json"] = json.dumps(config_to_hf(cfg, dtype, eot), indent=2)
        write_folder(path, shards, texts)
        sizes = {name: Path(path, name).stat().st_size for name in [*shards, *texts]}
        return dict(files=sizes, left_out=left_out)

# ---- decoding --------------------------------------------------------------------------------------
# DecodeWeights computes what MiniMax.forward computes with a cache, for the few tokens of a decoding step, in as few
# kernels as there are places where programs must meet (see the end of moe.py). A layer is
#     x -> norm, q k v qi ki -> head norms, RoPE, into the cache -> attention (2 kernels) -> o_proj, + x
#       -> norm, router -> norm, w13, gate -> w2, + x
# Matrices behind a norm are copied, in the dtype of activations, routers in fp32; what has one input is one matrix.
# With kernels nothing waits for the device: shapes are those of idx and of the cache, so that a CUDA graph can hold a
# step. A token gets the same bits whatever rows stand beside it, and whether T = 1 or it is one of T drafts.

def fold(norm, *weights, dtype):
    """Matrices (N, C) behind one norm -> one matrix (sum of N, C) in dtype, for input that is not yet multiplied by the
    norm's weight."""
    joined = torch.cat([widen(weight) for weight in weights], -2)
    return (joined * norm.gain(joined.dtype)).to(dtype).contiguous()

class DecodeLayer:
    """The weights of a Block for DecodeWeights.run_layer. Gains are the norms' factors, in fp32 or wider."""

    def __init__(self, block, cfg, dtype):
        attn, mlp = block.attn, block.mlp
        wide = torch.promote_types(dtype, torch.float32)
        projections = [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]
        self.gains = [attn.q_norm.gain(wide), attn.k_norm.gain(wide), None, None]  # of q, k, qi, ki
        if attn.indexer is not None:
            projections += [attn.indexer.q_proj.weight, attn.indexer.k_proj.weight]
            self.gains[2:] = attn.indexer.q_norm.gain(wide), attn.indexer.k_norm.gain(wide)
        self.qkv = fold(block.attn_norm, *projections, dtype=dtype)
        self.out = attn.o_proj.weight.to(dtype)

        # a dense layer is a shared expert alone
        self.router = None
        self.routed = None
        shared = mlp
        if isinstance(mlp, MoE):
            self.router = fold(block.mlp_norm, mlp.router.weight, dtype=wide), mlp.router.bias.to(wide)
            self.routed = fold(block.mlp_norm, mlp.w13, dtype=dtype), mlp.w2.to(dtype)
            shared = mlp.shared
        self.shared = None
        if shared is not None:
            self.shared = fold(block.mlp_norm, shared.w13.weight, dtype=dtype), shared.w2.weight.to(dtype)

class DecodeWeights:
    """A model's weights as a decoding step reads them: matrices behind a norm are copies, others may be the model's.
    After a change of weights `renew` it, or make another one.

    model   MiniMax
    slots   the largest capacity of a cache: RoPE's angles are a table
    tokens  the most that a row will keep of them: drafts behind the last may lie further on. Default: slots
    """

    @torch.no_grad()
    def __init__(self, model, slots, tokens=None):
        cfg, dtype = model.cfg, model.dtype
        assert not cfg.is_recurrent, "windows, Lightning layers and convolutions decode by MiniMax.forward"
        head = model.lm_head.weight
        self.cfg = cfg
        # of so few tokens sparse attention chooses all
        self.is_short = (tokens or slots) <= cfg.index_topk_blocks * cfg.index_block_size
        self.embed = model.embed.weight.to(dtype)
        cos, sin = rope_tables(torch.arange(slots, device=head.device), cfg.rotary_dim, cfg.rope_theta)
        self.rope = cos.flatten(1), sin.flatten(1)  # (slots, rotary_dim / 2) both
        self.layers = [DecodeLayer(block, cfg, dtype) for block in model.layers]
        self.head = fold(model.norm, head, dtype=dtype)
        self.modules = [
            dict(
                embedded=fold(module.e_norm, module.proj.weight[:, :cfg.n_embd], dtype=dtype),
                hidden=fold(module.h_norm, module.proj.weight[:, cfg.n_embd:], dtype=dtype),
                layer=DecodeLayer(module.block, cfg, dtype),
                head=fold(module.norm, head, dtype=dtype))
            for module in model.mtp]

    def renew(self, model):
        """Read the model's weights again, into the same tensors: a CUDA graph goes on with what lies there."""
        again = DecodeWeights(model, len(self.rope[0]))
        for mine, new in zip(tensors_within(self), tensors_within(again)):
            if mine is not new:        # the model's own
                mine.copy_(new)

    @torch.no_grad()
    def step(self, idx, cache, index_warmup=False, routes=False, impl="auto"):
        """The trunk on the next tokens of every row.

        idx           (B, T) tokens; the kernels take T from 1 to 8
        cache         KVCache: the new keys and values are written, and `length` is left as it is
        index_warmup  MSA layers have full attention
        routes        whether aux is wanted: it costs two kernels
        impl          "triton", "torch" or "auto": see use_triton
        -> logits (B, T, V) fp32 or wider; hidden (B, T, C) before the last norm; aux, block_idx and experts as those of
        MiniMax.forward but for the order of a token's blocks
        """
        x = F.embedding(idx, self.embed)
        reports = []
        for lane, layer in enumerate(self.layers):
            x, report = self.run_layer(layer, x, cache, lane, index_warmup, impl)
            reports.append(report)
        return self.logits(x, self.head, impl), x, stack_reports(reports) if routes else {}

    @torch.no_grad()
    def draft_state(self, k, hidden, idx, cache, index_warmup=False, impl="auto"):
        """MTP module k, from 1 on, in its own lane of the cache.

        hidden  (B, T, C) of the trunk, or of the module before
        idx     (B, T) the k-th token after each
        The others as in `step`.
        -> hidden (B, T, C) before the module's last norm
        """
        module = self.modules[k - 1]
        eps = self.cfg.norm_eps
        x = few_linear(F.embedding(idx, self.embed), module["embedded"], eps, impl=impl)
        x = few_linear(hidden, module["hidden"], eps, residual=x, impl=impl)
        return self.run_layer(module["layer"], x, cache, self.cfg.n_layer + k - 1, index_warmup, impl)[0]

    @torch.no_grad()
    def draft_logits(self, k, hidden, impl="auto"):
        """The last norm of MTP module k, from 1 on, and the head -> logits (B, T, V) fp32 or wider."""
        return self.logits(hidden, self.modules[k - 1]["head"], impl)

    def logits(self, x, head, impl):
        wide = torch.promote_types(x.dtype, torch.float32)
        return few_linear(x, head, self.cfg.norm_eps, dtype=wide, impl=impl)

    def run_layer(self, layer, x, cache, lane, index_warmup, impl):
        """One layer: x (B, T, C) -> x (B, T, C), and the choices that it made: block_idx, experts."""
        cfg = self.cfg
        eps = cfg.norm_eps
        report = {}
        k, v, ki = cache.k[lane], cache.v[lane], cache.ki[lane]  # whole lanes, of static shapes

        # attention
        S, L = cfg.index_topk_blocks, cfg.index_block_size
        projected = few_linear(x, layer.qkv, eps, impl=impl)
        q, qi, block_idx = append_heads(projected, layer.gains, self.rope, cache, lane, cfg, impl)
        if qi is None or index_warmup or self.is_short:
            y = full_attention(q, k, v, None, cache.length, impl)
        else:
            y, block_idx = msa_decode(q, k, v, qi, ki, S, L, cache.length, None, impl)
        if qi is not None and not index_warmup:
            report["block_idx"] = block_idx
        x = few_linear(y.flatten(2), layer.out, residual=x, impl=impl)

        # experts
        factor = idx = None
        if layer.router is not None:
            factor, idx = few_route(x, *layer.router, cfg.n_expert_per_tok, cfg.routed_scale, eps, impl)
            report["experts"] = idx
        x = few_mlp(x, eps, cfg.activation, layer.shared, layer.routed, factor, idx, impl)
        return x, report

def tensors_within(part):
    """The tensors of DecodeWeights, or of a part of them, in a fixed order."""
    if isinstance(part, torch.Tensor):
        return [part]
    if isinstance(part, DecodeWeights | DecodeLayer):
        part = vars(part)
    if isinstance(part, dict):
        part = part.values()
    if not isinstance(part, list | tuple | type({}.values())):
        return []
    return [tensor for inner in part for tensor in tensors_within(inner)]

def append_heads(x, gains, rope, cache, lane, cfg, impl="auto"):
    """Norms and RoPE of new heads; keys and values go into the cache.

    x      (B, T, N): q, k, v and, with an index branch, qi and ki, side by side
    gains  of the norms of q, k, qi, ki; the last two may be None
    rope   cos, sin of every slot: (slots, rotary_dim / 2) both
    cache  KVCache; slots from `length` on of this lane are written
    impl   see use_triton
    -> q (B, T, H, D); with an index branch qi (B, T, Hkv, Di) and block_idx (B, T, Hkv, S), the own block and the S - 1
    before it, or else None
    """
    B, T, _ = x.shape
    H, Hkv, D, Di = cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.index_head_dim
    S, L = cfg.index_topk_blocks, cfg.index_block_size
    has_index = gains[2] is not None
    if use_triton(impl, x):
        q = x.new_empty(B, T, H, D)
        qi = None
        block_idx = None
        heads = H + 2 * Hkv
        if has_index:
            qi = x.new_empty(B, T, Hkv, Di)
            block_idx = torch.empty(B, T, Hkv, S, dtype=torch.int32, device=x.device)
            heads += Hkv + 1
        together = cfg.qk_norm == "layer"
        _append_kernel[heads, B * T](
            x=x, cos=rope[0], sin=rope[1], length=cache.length,
            q_gain=gains[0], k_gain=gains[1], qi_gain=gains[2], ki_gain=gains[3],
            q=q, qi=qi, block_idx=block_idx,
            k=cache.k[lane], v=cache.v[lane], ki=cache.ki[lane],
            T=T, capacity=cache.capacity,
            H=H, HKV=Hkv, D=D, DI=Di, L=L, S=S,
            ROT=cfg.rotary_dim, EPS=cfg.norm_eps, TOGETHER=together,
            num_warps=4 if together else 1, **_overlap(x, B * T))
        return q, qi, block_idx

    slot = query_index(T, cache.length, x.device)                                                         # (B, T)
    row = torch.arange(B, device=x.device)[:, None]
    angles = [table[slot][:, :, None] for table in rope]
    sizes = [H * D, Hkv * D, Hkv * D]
    if has_index:
        sizes += [Hkv * Di, Di]
    q, k, v, *index = x.split(sizes, -1)

    def turned(heads, gain, D):
        by_head = heads.unflatten(-1, (-1, D))
        wide = widen(by_head if len(gain) == D else heads)  # M2's norm is over all heads
        normed = F.rms_norm(wide, gain.shape, gain, cfg.norm_eps).to(x.dtype)
        return apply_rope(normed.view_as(by_head), angles)

    cache.k[lane][row, slot] = turned(k, gains[1], D)
    cache.v[lane][row, slot] = v.unflatten(-1, (-1, D))
    q = turned(q, gains[0], D)
    if not has_index:
        return q, None, None
    qi, ki = index
    cache.ki[lane][row, slot] = turned(ki, gains[3], Di)[:, :, 0]
    blocks = slot[:, :, None] // L - torch.arange(S, device=x.device)                                     # (B, T, S)
    blocks = blocks.clamp(min=-1).int()
    return q, turned(qi, gains[2], Di), blocks[:, :, None].expand(B, T, Hkv, S)

@jit
def _turn(source, first, gain, cos, sin, target, WIDTH, D, ROT, EPS):
    """Norm of the WIDTH channels at source, then RoPE of the D of them from `first` on, a head -> target. cos, sin:
    of its position. WIDTH to EPS are constants."""
    # 1 / rms
    every = tl.arange(0, triton.next_power_of_2(WIDTH))
    wide = tl.load(source + every, mask=every < WIDTH, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + EPS)

    # the head, in the precision of activations, and each channel's mate in the rotation
    c = tl.arange(0, triton.next_power_of_2(D))
    x = tl.load(source + first + c, mask=c < D, other=0.0).to(tl.float32) * scale
    x *= tl.load(gain + first + c, mask=c < D, other=0.0)
    x = x.to(target.dtype.element_ty).to(tl.float32)
    if ROT > 0:
        half: constexpr = ROT // 2
        turns = c < ROT
        mate = first + tl.where(c < half, c + half, c - half)
        y = tl.load(source + mate, mask=turns, other=0.0).to(tl.float32) * scale
        y *= tl.load(gain + mate, mask=turns, other=0.0)
        y = y.to(target.dtype.element_ty).to(tl.float32)
        y = tl.where(c < half, -y, y)
        cos = tl.load(cos + c % half, mask=turns, other=1.0)
        sin = tl.load(sin + c % half, mask=turns, other=0.0)
        x = x * cos + y * sin
    tl.store(target + c, x.to(target.dtype.element_ty), mask=c < D)

# One program = one head of one row.
@jit
def _append_kernel(
    # heads and norms
    x,          # (R, N): q, k, v, and qi, ki where there is an index branch
    q_gain,     # (D,), or (H * D,) where TOGETHER
    k_gain,     # (D,), or (HKV * D,) where TOGETHER
    qi_gain,    # (DI,), or None
    ki_gain,    # (DI,), or None
    cos,        # (slots, ROT / 2)
    sin,        # (slots, ROT / 2)
    length,     # (B,)
    # written
    q,          # (R, H, D)
    qi,         # (R, HKV, DI), or None
    k,          # (B, capacity, HKV, D), a lane
    v,          # as k
    ki,         # (B, capacity, DI), a lane
    block_idx,  # (R, HKV, S), or None
    # sizes
    T,
    capacity,
    H: constexpr,
    HKV: constexpr,
    D: constexpr,
    DI: constexpr,
    ROT: constexpr,
    L: constexpr,
    S: constexpr,
    EPS: constexpr,
    TOGETHER: constexpr,  # a norm is over all heads
    PDL: constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b = row // T
    pos = tl.load(length + b) + row % T  # the slot; no kernel of a step writes it
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: the scan lets a kernel read q before its own wait
    place = b * capacity + pos
    fits = pos < capacity
    angles = tl.minimum(pos, capacity - 1) * (ROT // 2)
    cos += angles
    sin += angles

    main: constexpr = (H + 2 * HKV) * D
    n: constexpr = main + (0 if qi is None else (HKV + 1) * DI)
    x += row * n
    if head < H:
        target = q + (row * H + head) * D
        if TOGETHER:
            _turn(x, head * D, q_gain, cos, sin, target, H * D, D, ROT, EPS)
        else:
            _turn(x + head * D, 0, q_gain, cos, sin, target, D, D, ROT, EPS)
    elif head < H + HKV:
        h = head - H
        target = k + (place * HKV + h) * D
        if fits:
            if TOGETHER:
                _turn(x + H * D, h * D, k_gain, cos, sin, target, HKV * D, D, ROT, EPS)
            else:
                _turn(x + head * D, 0, k_gain, cos, sin, target, D, D, ROT, EPS)
    elif head < H + 2 * HKV:
        h = head - H - HKV
        c = tl.arange(0, triton.next_power_of_2(D))
        value = tl.load(x + head * D + c, mask=c < D, other=0.0)
        if fits:
            tl.store(v + (place * HKV + h) * D + c, value, mask=c < D)
        if block_idx is not None:
            slot = tl.arange(0, triton.next_power_of_2(S))
            blocks = tl.maximum(pos // L - slot, -1).to(tl.int32)
            tl.store(block_idx + (row * HKV + h) * S + slot, blocks, mask=slot < S)
    elif qi is not None:
        h = head - H - 2 * HKV
        source = x + main + h * DI
        if h < HKV:
            _turn(source, 0, qi_gain, cos, sin, qi + (row * HKV + h) * DI, DI, DI, ROT, EPS)
        elif fits:
            _turn(source, 0, ki_gain, cos, sin, ki + place * DI, DI, DI, ROT, EPS)

# ---- released checkpoints: names --------------------------------------------------------------------------------
# A parameter of ours lies in a checkpoint in one of three ways:
#     whole      attn.q_proj.weight (H D, C)   is   model.layers.0.self_attn.q_proj.weight
#     halves     mlp.w13.weight (2 I, C)       is   mlp.gate_proj.weight (I, C) and mlp.up_proj.weight (I, C)
#     experts    mlp.w2 (E, C, I)              is   experts.0.w2.weight (C, I), experts.1.w2.weight ...
# and mlp.w13 (E, 2 I, C) is both halves of every expert. transformers stacks what the release keeps apart.

# Our name of a parameter -> its form in the release, or a list: the release's form, then that of transformers, where
# they differ by more than a synonym. save_hf writes M2 in the first, M3 in the last. {e} stands for an expert's number,
# {w1,w3} for the names of the two halves, gate and up.
MODEL_FORMS = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_FORMS = {  # ours after "layers.0.", theirs after "model.layers.0."
    "attn_norm.weight": "input_layernorm.weight",
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.o_proj.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    # the index branch of M3's sparse layers
    "attn.indexer.q_proj.weight": ["self_attn.index_q_proj.weight", "self_attn.indexer.q_proj.weight"],
    "attn.indexer.k_proj.weight": ["self_attn.index_k_proj.weight", "self_attn.indexer.k_proj.weight"],
    "attn.indexer.q_norm.weight": ["self_attn.index_q_norm.weight", "self_attn.indexer.q_norm.weight"],
    "attn.indexer.k_norm.weight": ["self_attn.index_k_norm.weight", "self_attn.indexer.k_norm.weight"],
    "mlp_norm.weight": "post_attention_layernorm.weight",
    # a mixture of experts
    "mlp.router.weight": "block_sparse_moe.gate.weight",
    "mlp.router.bias": ["block_sparse_moe.e_score_correction_bias", "mlp.gate.e_score_correction_bias"],
    "mlp.w13": ["block_sparse_moe.experts.{e}.{w1,w3}.weight", "mlp.experts.gate_up_proj"],
    "mlp.w2": ["block_sparse_moe.experts.{e}.w2.weight", "mlp.experts.down_proj"],
    # M3's shared expert
    "mlp.shared.w13.weight": ["block_sparse_moe.shared_experts.{gate_proj,up_proj}.weight",
                              "mlp.shared_experts.gate_up_proj.weight"],
    "mlp.shared.w2.weight": "block_sparse_moe.shared_experts.down_proj.weight",
    # M3's dense layers
    "mlp.w13.weight": ["mlp.{gate_proj,up_proj}.weight", "mlp.gate_up_proj.weight"],
    "mlp.w2.weight": "mlp.down_proj.weight",
}
# Words of a name that the release and transformers use for the same thing. Files mix them: each is read for the other.
SYNONYMS = dict(block_sparse_moe="mlp", gate_proj="w1", up_proj="w3", down_proj="w2")

def released_forms(ours):
    """The forms in which checkpoints hold our parameter of that name, the release's first."""
    if ours in MODEL_FORMS:
        return [MODEL_FORMS[ours]]
    layers, number, inside = ours.split(".", 2)
    forms = LAYER_FORMS[inside]
    if isinstance(forms, str):
        forms = [forms]
    return [f"model.{layers}.{number}.{form}" for form in forms]

def exported_form(ours, family):
    """The form in which transformers' own class of a family reads our parameter of that name: for M2 the release's, for
    M3's text model that of transformers, which renames the release's tensors only beside a vision tower."""
    forms = released_forms(ours)
    if family == "M2":
        return forms[0]
    return forms[-1].replace("block_sparse_moe", "mlp")

def released_tensors(param, form):
    """One of our parameters in a released form -> {released name: its tensor, a view}."""
    # one tensor for each expert, or one for all of the parameter
    tensors = {form: param}
    if "{e}" in form:
        tensors = {form.replace("{e}", str(e)): expert for e, expert in enumerate(param)}

    # gate and up apart, or in one tensor
    pair = re.search(r"\{(\w+),(\w+)\}", form)
    if pair is None:
        return tensors
    halves = {}
    for name, both in tensors.items():
        gate, up = both.chunk(2)
        halves[name.replace(pair[0], pair[1])] = gate
        halves[name.replace(pair[0], pair[2])] = up
    return halves

def plain_name(name):
    """A released name without its prefix, which is "model.", "language_model." or both, and without synonyms: files
    mix the words of the release and of transformers."""
    name = re.sub(r"^(language_model\.)?(model\.(language_model\.)?)?", "", name)
    return ".".join(SYNONYMS.get(word, word) for word in name.split("."))

def parts_by_name(params):
    """Every plain name that a checkpoint's tensor may have -> (our parameter's name, the part that the tensor fills).
    Our own names are among them. Parts are views of params: what is copied into a part is in the model."""
    found = {}
    for ours, param in params.items():
        for form in [*released_forms(ours), ours]:
            for name, part in released_tensors(param, form).items():
                found[plain_name(name)] = ours, part
    return found

# ---- released checkpoints: files --------------------------------------------------------------------------------
# Released folders also hold what the text model does not need, and downloads leave stray or damaged files. So the
# index, where there is one, decides which file counts for a tensor. Names, shapes and scales are compared with the
# model before the first weight is read: of 230 GB that takes minutes. Then one tensor at a time is in memory.

# tensors that take no part in the text model's forward, under any prefix: M3's vision tower and MTP modules; scales of
# activations and of a quantized cache, for this code quantizes neither
UNUSED = re.compile(r"(?:^|\.)(vision_tower|vision_model|multi_modal_projector|patch_merge_mlp|mtp\w*)\."
                    r"|\.(input_scale|activation_scale|[qkv]_scale)$")
INDEX = "model.safetensors.index.json"
MOST_NAMED = 6                         # tensors that one line names

class Progress:
    """A line now and then for work that takes long, none for what takes less than WAIT: at(done) after each part."""
    WAIT = 4.0                         # seconds to the first line, and from one to the next

    def __init__(self, what, total, unit):
        self.what = what
        self.total = total
        self.unit = unit
        self.started = time.perf_counter()
        self.said = self.started

    def at(self, done):
        now = time.perf_counter()
        if not 0 < done < self.total or now - self.said < self.WAIT:
            return
        self.said = now
        left = (now - self.started) * (self.total / done - 1)
        print(f"{self.what:7} | {done / self.total:.0%} of {self.total:,} {self.unit}, {left:.0f} s left", flush=True)

def read_json(path, name):
    """The object in a folder's JSON file. ValueError, naming the file, if it cannot be read or holds another type."""
    try:
        found = json.loads(Path(path, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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

def read_index(path):
    """{tensor's name: its file} from a folder's index, {} where it has none."""
    if not Path(path, INDEX).exists():
        return {}
    listed = inner(read_json(path, INDEX), "weight_map")
    if not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{path}: {INDEX} has no weight_map of file names")
    for file in {*listed.values()}:
        if os.path.basename(file) != file or file in ("", ".", ".."):  # whoever wrote it chooses no file elsewhere
            raise ValueError(f"{path}: {INDEX} names {shorten(file)!r}: only files in the folder itself")
    return listed

def open_tensors(path, file):
    """An open safetensors file. ValueError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open
    if not os.path.exists(os.path.join(path, file)):
        raise ValueError(f"{path}: {file} is missing, {INDEX} names it")
    try:
        # read, not mapped: pages of a mapped shard would count as this process's memory until it is closed
        return safe_open(Path(path, file), "pt", backend="pread")
    except TypeError:                  # safetensors before 0.8 maps every file
        return safe_open(Path(path, file), "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {file} cannot be read: {error}") from None

def in_words(names):
    """Names for one line: the first few, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more

def as_bytes(t):
    """A tensor's bits: NaN equals itself."""
    return t.flatten().view(torch.uint8)

def some_layers(cfg, layers):
    """The config of a model that has these layers (a range) of cfg's alone."""
    return dataclasses.replace(
        cfg,
        n_layer=len(layers),
        attn_types=[cfg.attn_types[layer] for layer in layers],
        mlp_types=[cfg.mlp_types[layer] for layer in layers])

class HFCheckpoint:
    """A folder of transformers or of the release, M2 or M3's text model, whose weights lie on disk until they are read.

    cfg         MiniMaxConfig of the layers that are wanted
    whole       MiniMaxConfig of the folder's model
    where       {stored name: file} of the tensors that the model may need
    skipped     Counter of the tensors that it does not: vision_tower 390, layers 1200 ...
    missing     our names of parameters that the folder lacks, where partial allows that
    unknown     stored names of tensors that the model has not, likewise
    bytes_read  of files, so far
    """

    def __init__(self, path, layers=None, partial=False):
        """
        path     the folder: config.json, *.safetensors, an index where there are shards
        layers   a range: the model has these layers alone, and what belongs to others need not be there; default: all
        partial  tensors may be unknown, or missing: those begin as in a new model
        ValueError for a field that this code does not compute, and for a tensor that is missing, unknown, there twice,
        of another shape, or quantized in a way that is not understood.
        """
        self.path = path
        self.partial = partial
        hf = read_json(path, "config.json")
        self.whole = config_from_hf(hf)
        self.hf = {**hf, **inner(hf, "text_config")}
        self.quant = inner(self.hf, "quantization_config")
        self.layers = range(self.whole.n_layer)
        if layers is not None:
            self.layers = self.layers[layers.start:layers.stop]
        all_there = layers is None or self.layers == layers
        if not self.layers or not all_there:
            raise ValueError(f"{path}: layers {layers.start}:{layers.stop} of {self.whole.n_layer}")
        self.cfg = some_layers(self.whole, self.layers)
        self.files = {}                # {file: open file}
        self.places = {}               # see `place`
        self.skipped = Counter()
        self.missing = []
        self.unknown = []
        self.bytes_read = 0
        self.where = self.find()
        self.stored = {self.plain(name): name for name in self.where}

    def open(self, file):
        """The folder's file of that name, opened once."""
        if file not in self.files:
            self.files[file] = open_tensors(self.path, file)
        return self.files[file]

    # which tensors there are

    def unused_part(self, name):
        """The part of the folder's model that a tensor belongs to, where this model does without: a word, or None."""
        unused = UNUSED.search(name)
        if unused:
            return unused[1] or unused[2]
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if not layer or int(layer[1]) in self.layers:
            return None
        n_modules = max(self.hf.get("num_mtp_modules") or 0, self.hf.get("num_nextn_predict_layers") or 0)
        beyond = int(layer[1]) - self.whole.n_layer
        if beyond < 0:
            return "layers"
        return "mtp" if beyond < n_modules else None  # MTP modules may be numbered as layers after the last

    def find(self):
        """Where each tensor of the model lies -> {name: file}. The index decides which files and tensors count; without
        one, every safetensors file does. ValueError for what the index names and the folder lacks, for a file that is
        damaged, and for two files that disagree."""
        listed = read_index(self.path)
        files = {file for name, file in listed.items() if not self.unused_part(name)}
        if not listed:
            files = {file.name for file in Path(self.path).glob("*.safetensors")}
        if not files:
            raise ValueError(f"{self.path}: no *.safetensors file")

        where = {}
        for file in sorted(files):
            for name in self.open(file).keys():
                part = self.unused_part(name)
                if part:
                    self.skipped[part] += not listed
                elif listed:
                    self.compare_copies(name, file, listed)
                    if listed.get(name) == file:
                        where[name] = file
                    self.skipped["no index"] += name not in listed
                elif name in where:
                    raise ValueError(f"{self.path}: {name} is in two files, and no {INDEX} says which counts")
                else:
                    where[name] = file

        # what the index promises must be there
        for name, file in listed.items():
            part = self.unused_part(name)
            if part:
                self.skipped[part] += 1
            elif name not in where:
                raise ValueError(f"{self.path}: {name} is not in {file}, where {INDEX} has it")
        return where

    def compare_copies(self, name, file, listed):
        """ValueError where a tensor lies in another file, too, and is another one there."""
        home = listed.get(name, file)
        if home == file or name not in self.open(home).keys():
            return
        copy = self.open(file).get_tensor(name)
        counted = self.open(home).get_tensor(name)
        same_kind = copy.dtype == counted.dtype and copy.shape == counted.shape
        if not same_kind or not torch.equal(as_bytes(copy), as_bytes(counted)):
            raise ValueError(f"{self.path}: {name} is in {home} and in {file}, and they disagree")

    def plain(self, name):
        """`plain_name`, where the first of our layers has number 0."""
        name = plain_name(name)
        layer = re.match(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) in self.layers:
            name = f"layers.{int(layer[1]) - self.layers[0]}.{name[layer.end():]}"
        return name

    def scales_of(self, name):
        """The stored names of a tensor's scales."""
        return [name + suffix for suffix in SCALES if name + suffix in self.where]

    def header(self, name):
        """Shape and dtype of a stored tensor, in safetensors' words; nothing of it is read."""
        stored = self.open(self.where[name]).get_slice(name)
        return tuple(stored.get_shape()), stored.get_dtype()

    def check(self, params):
        """Compare all tensors with the model's parameters -> {stored name: our parameter's name}, in the order of
        files. params: the model's state dict; it may lie on meta."""
        parts = parts_by_name(params)
        left = {ours: param.numel() for ours, param in params.items()}
        filled = set()
        found = {}
        for name in sorted(self.where, key=lambda name: (self.where[name], name)):
            # a scale is read with its tensor
            if name.endswith(SCALES):
                owner = re.sub("_scale(_inv)?$", "", name)
                if owner not in self.where and not self.partial:
                    raise ValueError(f"{self.path}: {name} scales {owner}, which is missing")
                continue
            ours, part = parts.get(self.plain(name), (None, None))
            if ours is None:
                self.unknown.append(name)
                continue
            self.check_tensor(name, part)
            # one tensor under two names would count twice, and hide one that is missing
            place = ours, part.storage_offset()
            if place in filled:
                raise ValueError(f"{self.path}: {name}: another tensor has filled {ours}")
            filled.add(place)
            found[name] = ours
            left[ours] -= part.numel()

        self.missing = [ours for ours, count in left.items() if count]
        if self.partial:
            return found
        if self.unknown:
            raise ValueError(f"{self.path}: no such tensor in the model: {in_words(self.unknown)}")
        if self.missing:
            raise ValueError(f"{self.path}: missing or incomplete: {in_words(self.lacking(params, found))}")
        return found

    def check_tensor(self, name, part):
        """ValueError unless a stored tensor has a part's shape, and numbers that are understood."""
        shape, dtype = self.header(name)
        if shape != part.shape:
            raise ValueError(f"{self.path}: {name} {shape}: the model needs {tuple(part.shape)}")
        n_scales = len(self.scales_of(name))
        is_float = dtype in FLOAT_NAMES and n_scales == 0
        is_fp8 = dtype in FP8_NAMES and n_scales == 1
        if not is_float and not is_fp8:
            raise ValueError(f"{self.path}: {name} is {dtype} with {n_scales} scales: "
                             "fp8 has one, floats of 16 bits or more have none")

    def lacking(self, params, found):
        """The released names of what is missing."""
        there = {self.plain(name) for name in found}
        names = []
        for ours in self.missing:
            parts = released_tensors(params[ours], released_forms(ours)[0])
            names += [name for name in parts if plain_name(name) not in there]
        first = self.layers[0]         # which the folder counts from 0
        return [re.sub(r"(?<=layers\.)\d+", lambda number: str(first + int(number[0])), name) for name in names]

    # reading

    def load(self, device="cpu", dtype=torch.float32):
        """-> MiniMax with the folder's weights, in dtype but for the routers, on a device. Beside the model, memory
        holds one tensor as it is stored, and a few million numbers of it in fp32."""
        model = self.model_on_meta(dtype)
        found = self.check(model.state_dict())
        model = model.to_empty(device=device)
        params = model.state_dict()
        for ours in self.missing:
            start_parameter(ours, params[ours], self.cfg)

        parts = parts_by_name(params)
        sizes = {name: self.n_bytes(name) for name in found}
        progress = Progress("weights", sum(sizes.values()), "bytes")
        done = 0
        for name in found:
            _, part = parts[self.plain(name)]
            self.read(name, part)
            done += sizes[name]
            progress.at(done)
        return model

    @torch.no_grad()
    def offload(self, device="cpu", dtype=torch.float32):
        """-> MiniMax that reads its layers from disk at each forward: see StoredBlock. It cannot be trained."""
        model = self.model_on_meta(dtype)
        self.check(model.state_dict())
        if self.missing:
            raise ValueError(f"{self.path}: cannot be read layer by layer, for it lacks {in_words(self.missing)}")
        for number, block in enumerate(model.layers):
            model.layers[number] = StoredBlock(block, number, self, device, dtype)
        model.norm = model.norm.to_empty(device=device)
        self.read_param("norm.weight", model.norm.weight)
        with torch.device("meta"):
            model.lm_head = WideHead(self.cfg.n_embd, self.cfg.vocab_size)
        model.embed.weight = self.table("embed.weight", model.embed.weight, device, dtype)
        model.lm_head.weight = self.table("lm_head.weight", model.lm_head.weight, device, dtype)
        model.asked_dtype = dtype
        model.first_dtype = model.embed.weight.dtype  # activations have the dtype that was asked for, see MiniMax.dtype
        return model.requires_grad_(False).eval()

    def table(self, ours, param, device, dtype):
        """Embedding or head in memory: in 16 bits if it is stored so."""
        name = self.stored[plain_name(released_forms(ours)[0])]
        _, kind = self.header(name)
        if kind in ("BF16", "F16"):
            dtype = FLOAT_NAMES[kind]
        out = torch.empty(param.shape, device=device, dtype=dtype)
        self.read(name, out)
        return nn.Parameter(out, requires_grad=False)

    def place(self, shape, device, dtype):
        """Memory for experts of a shape, one after the other: memory that is new each time takes longer to get than an
        expert to compute."""
        if shape not in self.places:
            self.places[shape] = torch.empty(shape, device=device, dtype=dtype)
        return self.places[shape]

    def read_param(self, ours, out):
        """Read one of our parameters whole."""
        for form in [*released_forms(ours), ours]:
            parts = released_tensors(out, form)
            names = [self.stored.get(plain_name(name)) for name in parts]
            if None not in names:
                for name, part in zip(names, parts.values()):
                    self.read(name, part)
                return
        raise ValueError(f"{self.path}: {ours} is missing")  # `check` has found it before

    def read_expert(self, ours, e, out):
        """Read expert e's part of a parameter that all experts share."""
        for form in released_forms(ours):
            parts = released_tensors(out, form.replace("{e}", str(e)))
            names = [self.stored.get(plain_name(name)) for name in parts]
            if None in names:
                continue
            for name, part in zip(names, parts.values()):
                if "{e}" in form:
                    self.read(name, part)
                else:
                    self.read_stacked(name, e, part)
            return

    def read_stacked(self, name, e, out):
        """Read the e-th matrix of a tensor that holds all experts'. Its file is mapped for that: of one that is read,
        safetensors reads the whole tensor, whatever part is wanted."""
        from safetensors import safe_open
        with safe_open(Path(self.path, self.where[name]), "pt") as file:
            stored = file.get_slice(name)[e:e + 1]
        self.bytes_read += stored.numel() * stored.itemsize
        scales = self.scales_of(name)
        if not scales:
            out.copy_(stored[0])
            return
        scale = self.read_raw(scales[0])
        (n_expert, *_), _ = self.header(name)
        if scale.dim() > 0 and len(scale) == n_expert:  # otherwise one number is every expert's
            scale = scale[e:e + 1]
        dequantize(stored.to(out.device), scale.to(out.device), self.quant, out[None])

    def model_on_meta(self, dtype):
        """A model of the right shapes, without numbers."""
        try:
            with torch.device("meta"):
                return MiniMax(self.cfg, dtype).to(dtype)
        except AssertionError as error:
            raise ValueError(f"{self.path}: {error}") from None
        except (RuntimeError, TypeError) as error:  # torch cannot count that far
            raise ValueError(f"{self.path}: config.json: no tensor has such sizes: {str(error)[:100]}") from None

    def n_bytes(self, name):
        """Bytes of a stored tensor, its scales left out."""
        shape, dtype = self.header(name)
        return math.prod(shape) * {**FLOAT_NAMES, **FP8_NAMES}[dtype].itemsize

    def read(self, name, out):
        """Copy a stored tensor, dequantised, into a tensor of its shape."""
        stored = self.read_raw(name).to(out.device)
        scales = self.scales_of(name)
        if not scales:
            out.copy_(stored)
            return
        scale = self.read_raw(scales[0]).to(out.device)
        try:
            dequantize(stored, scale, self.quant, out)
        except ValueError as error:
            raise ValueError(f"{self.path}: {scales[0]}: {error}") from None

    def read_raw(self, name):
        """A tensor as it is stored."""
        from safetensors import SafetensorError
        file = self.where[name]
        try:
            found = self.open(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: {name} in {file} cannot be read: {error}") from None
        self.bytes_read += found.numel() * found.itemsize
        return found

def start_parameter(ours, param, cfg):
    """Begin a parameter that a checkpoint lacks: a norm is the identity, a router's bias 0, a matrix random."""
    if ours.endswith("router.bias"):
        param.zero_()
    elif param.dim() == 1:
        param.fill_(0.0 if cfg.gemma_norm else 1.0)
    else:
        param.normal_(0, cfg.n_embd ** -0.5)

# ---- released checkpoints: fp8 ----------------------------------------------------------------------------------
# A weight in fp8 has numbers of 8 bits and, in a tensor beside it, scales that bring them back to their size: M2 has
# one scale for a tile of 128 x 128, mxfp8 a power of two for 32 numbers of a row, others one for a row or for all.
# Files say little about it: a scale is read by its shape, and refused where quantization_config says otherwise.

SCALES = ("_scale_inv", "_scale")  # what a scale's name adds to its tensor's; both are factors, in spite of "inv"
FLOAT_NAMES = dict(F32=torch.float32, BF16=torch.bfloat16, F16=torch.float16, F64=torch.float64)  # in safetensors
FP8_NAMES = dict(F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2)
FP8_METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
PART_OF_TENSOR = dict(cpu=2 ** 17, cuda=2 ** 24)  # numbers in fp32 at once: a core's cache holds half a megabyte

def dequantize(t, scale, quant, out):
    """An fp8 tensor times its scale, into out.

    t      (..., rows, columns) fp8
    scale  one number for all of t, or for each tile, row or matrix
    quant  config.json's quantization_config: the method, and the tile's size
    out    of t's shape, in any dtype
    ValueError if the scale does not fit.
    """
    method = quant.get("quant_method", "fp8")
    if method not in FP8_METHODS:
        raise ValueError(f"quant_method {method} is not understood")
    scale = scale_to_float(scale)
    if t.dim() < 2 and (scale.dim() > 1 or scale.numel() > 1):
        raise ValueError(f"a scale {tuple(scale.shape)} does not fit a tensor {tuple(t.shape)}")
    if t.dim() < 2:
        out.copy_(fp8_to_float(t) * scale)
        return
    height, width, by_tile = tiles_of(scale, t.shape, quant, method)

    # some rows of tiles at a time: in fp32 a large tensor would take four times its memory
    *_, rows, cols = t.shape
    most = PART_OF_TENSOR.get(t.device.type, PART_OF_TENSOR["cpu"])
    step = height * max(1, most // (height * cols))
    step = min(step, cdiv(rows, height) * height)
    matrices = t.view(-1, rows, cols)
    targets = out.view(-1, rows, cols)
    for matrix, factors, target in zip(matrices, by_tile, targets, strict=True):
        for first in range(0, rows, step):
            part = fp8_to_float(matrix[first:first + step])                               # (n, cols)
            of_part = factors[first // height:cdiv(first + len(part), height)]            # (n / height, cols / width)
            by_col = of_part.repeat_interleave(width, -1)[:, :cols]
            by_row = by_col.repeat_interleave(height, 0)[:len(part)]
            torch.mul(part, by_row, out=target[first:first + step])

def fp8_to_float(t):
    """An fp8 tensor -> fp32. On a CPU from a table of the 256 bytes: a fifth of the time of torch's conversion."""
    if t.device.type != "cpu":
        return t.float()
    table = torch.arange(256, dtype=torch.uint8).view(t.dtype).float()
    return table.index_select(0, t.contiguous().view(torch.uint8).flatten().int()).view(t.shape)

def tiles_of(scale, shape, quant, method):
    """How a scale covers the matrices of a tensor of that shape -> height and width of a tile, and a number for each
    (matrices, rows / height, columns / width). The first size of tiles counts of which there are as many as scales."""
    *lead, rows, cols = shape
    if scale.dim() < 2 and scale.numel() == 1:
        return rows, cols, scale.reshape(1, 1, 1).expand(max(1, math.prod(lead)), 1, 1)
    tiles = possible_tiles(quant, method, rows, cols)
    for height, width in tiles:
        grid = (*lead, cdiv(rows, height), cdiv(cols, width))
        # numbers for whole rows or matrices may lack the last dimensions, which are 1
        if scale.numel() == math.prod(grid) and scale.shape == grid[:scale.dim()]:
            return height, width, scale.reshape(-1, *grid[-2:])
    sizes = ", ".join(f"{height} x {width}" for height, width in tiles)
    raise ValueError(f"a scale {tuple(scale.shape)} does not fit a tensor {tuple(shape)} in tiles of {sizes}")

def scale_to_float(scale):
    """A stored scale as fp32. ValueError for a type that no release uses, and for a number that is no factor."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = scale.view(torch.float8_e8m0fnu)  # the byte of an exponent: 2 ** (byte - 127), and 255 is NaN
    elif scale.dtype not in FLOAT_NAMES.values():
        raise ValueError(f"a scale in {scale.dtype} is not understood")
    scale = scale.float()
    usable = scale.isfinite() & (scale >= 0)
    if not usable.all():
        raise ValueError("the scale holds a number that is negative or not finite")
    return scale

def possible_tiles(quant, method, rows, cols):
    """The sizes (height, width) that a matrix's tiles may have: the named one, or else the usual ones of the method."""
    tiles = [(1, cols), (rows, cols)]
    if "weight_block_size" not in quant and method in ("fp8", "mxfp8"):
        tiles += [(128, 128), (1, 32)]
    named = quant.get("weight_block_size")
    if named is None:
        return tiles
    is_pair = isinstance(named, list) and len(named) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in named):
        raise ValueError(f"weight_block_size {named}: two whole numbers from 1")
    return [named]

# ---- released checkpoints: layers that stay on disk ---------------------------------------------------------------
# M2 has 230 GB, a laptop 16. But a forward needs the layers one after the other, and a token visits 8 of a layer's 256
# experts. They are read when their turn comes, and forgotten; what the system keeps of the files, in memory that is
# free, makes the next read faster. Embedding and head stay in memory, in 16 bits.

HEAD_ROWS = 2 ** 10                    # rows of the head that are in the model's dtype at once

@dataclasses.dataclass
class LayerCost:
    """What forwards through a layer took, all together."""
    forwards: int = 0
    seconds: float = 0.0
    bytes_read: int = 0

class StoredExperts:
    """One matrix of every expert of a layer: [e] reads expert e's from disk."""

    def __init__(self, checkpoint, ours, shape, device, dtype):
        """ours: the parameter's name, its layer's number that of the checkpoint's cfg; shape (E, rows, columns)."""
        self.checkpoint = checkpoint
        self.ours = ours
        self.place = checkpoint.place(shape[1:], device, dtype)

    def __getitem__(self, e):
        """-> (rows, columns), until another expert of that shape is read, in whatever layer."""
        self.checkpoint.read_expert(self.ours, e, self.place)
        return self.place

class StoredMoE(MoE):
    """A mixture of experts whose experts are read as they are visited."""

    def __init__(self, cfg, w13, w2):
        """w13, w2: StoredExperts. The parameters of these names stay without numbers."""
        super().__init__(cfg)
        self.stored = w13, w2

    def run_experts(self, x, weights, idx):
        return experts_loop(x, *self.stored, weights, idx, self.cfg.activation)

class StoredBlock(nn.Module):
    """A Block that is read at each forward: its parameters here have shapes alone."""

    def __init__(self, block, number, checkpoint, device, dtype):
        """block: on meta; number: in the checkpoint's cfg."""
        super().__init__()
        cfg = checkpoint.cfg
        self.prefix = f"layers.{number}."
        self.kind = f"{cfg.attn_types[number]} {cfg.mlp_types[number]}"
        self.checkpoint = checkpoint
        self.device = device
        self.step_cost = LayerCost()  # of forwards of one token a row
        self.prompt_cost = LayerCost()
        if isinstance(block.mlp, MoE):
            stored = [
                StoredExperts(checkpoint, f"{self.prefix}mlp.{name}", getattr(block.mlp, name).shape, device, dtype)
                for name in ("w13", "w2")]
            with torch.device("meta"):
                block.mlp = StoredMoE(cfg, *stored).to(dtype)
        self.block = block

    @property
    def attn(self):
        return self.block.attn

    @property
    def mlp(self):
        return self.block.mlp

    def forward(self, x, ctx):
        """As of Block."""
        began = time.perf_counter()
        before = self.checkpoint.bytes_read
        params = {}
        for name, param in self.block.state_dict().items():
            if name not in ("mlp.w13", "mlp.w2"):  # of experts; a dense layer's are mlp.w13.weight
                params[name] = torch.empty_like(param, device=self.device)
                self.checkpoint.read_param(self.prefix + name, params[name])
        y = torch.func.functional_call(self.block, params, (x, ctx))
        cost = self.step_cost if x.size(1) == 1 else self.prompt_cost
        cost.forwards += 1
        cost.seconds += time.perf_counter() - began
        cost.bytes_read += self.checkpoint.bytes_read - before
        return y

class WideHead(Linear):
    """A head whose weight is stored in fewer bits than x has: cast some rows at a time, not as a whole."""

    def forward(self, x):
        logits = [F.linear(x, rows.to(x.dtype)) for rows in self.weight.split(HEAD_ROWS)]
        return torch.cat(logits, -1)

# ---- released checkpoints: config.json --------------------------------------------------------------------------
# The release and transformers write different fields for one model, flat or in inner objects, some of them twice. A
# field that changes what is computed must be understood: a model that runs with one of them ignored is a wrong model.

COUNT_NAMES = dict(  # ours, the release's
    vocab_size="vocab_size", n_layer="num_hidden_layers", n_embd="hidden_size", n_head="num_attention_heads",
    n_kv_head="num_key_value_heads", head_dim="head_dim", max_seq_len="max_position_embeddings",
    expert_dim="intermediate_size", n_expert="num_local_experts", n_expert_per_tok="num_experts_per_tok")
INDEX_NAMES = dict(  # ours, the name of transformers and that of the release
    index_head_dim=("index_head_dim", "sparse_index_dim"),
    index_block_size=("index_block_size", "sparse_block_size"),
    index_topk_blocks=("index_topk_blocks", "sparse_topk_blocks"))
ATTN_LISTS = dict(  # lists with an entry a layer -> what an entry means
    layer_types=dict(full_attention="full", minimax_m3_sparse="msa"),
    sparse_attention_freq={0: "full", 1: "msa"})
MLP_LISTS = dict(
    mlp_layer_types=dict(dense="dense", sparse="moe"),
    moe_layer_freq={0: "dense", 1: "moe"})
MAX_LAYERS = 10_000
MAX_EXPERTS = 10_000                   # of a layer
MODEL_TYPES = ("minimax_m2", "minimax_m3", "minimax_m3_text", "minimax_m3_vl", "minimax_m3_vl_text")

# Fields that change what a model computes, with the value, or list of values, that this code computes, see `allow`; a
# field may be absent or null.
FIXED = dict(
    # router and experts
    scoring_func="sigmoid", use_routing_bias=True, norm_topk_prob=True, topk_method="noaux_tc",
    n_group=[0, 1], num_expert_group=[0, 1], topk_group=[0, 1], router_jitter_noise=0, decoder_sparse_step=1,
    mlp_only_layers=[[]], mlp_bias=False,
    # attention
    use_qk_norm=True, attention_output_gate=False, attn_output_gate=False, attention_dropout=0,
    attention_bias=False, qkv_bias=False, attention_out_bias=False, use_bias=False,
    sliding_window=[], use_sliding_window=False, attn_logit_softcapping=[],
    rope_type="default", use_rope=True, rope_interleave=False, rope_interleaved=False,
    # residual stream and head
    postnorm=False, layernorm_full_attention_alpha=1, layernorm_full_attention_beta=1,
    layernorm_mlp_alpha=1, layernorm_mlp_beta=1, final_logit_softcapping=[], tie_word_embeddings=False)
FIXED_M2 = dict(
    hidden_act="silu", use_gemma_norm=False, qk_norm_type="per_layer",
    routed_scaling_factor=1, shared_intermediate_size=0, n_shared_experts=0,
    swiglu_alpha=[], swiglu_beta=[], swiglu_limit=[], sparse_attention_config=[{}])
FIXED_M3 = dict(
    hidden_act=["swigluoai", "silu"],  # transformers writes "silu", and computes swigluoai
    use_gemma_norm=True, qk_norm_type="per_head", n_shared_experts=1,
    swiglu_alpha=SWIGLU_ALPHA, swiglu_beta=1, swiglu_limit=SWIGLU_LIMIT)
FIXED_MSA = dict(  # where layers have MSA
    use_sparse_attention=True, sparse_init_block=0, index_init_blocks=0,
    sparse_local_block=1, index_local_blocks=1, sparse_score_type="max", index_score_type="max")
ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
SPARSE_FIELDS = {
    "use_sparse_attention", "sparse_attention_freq", "sparse_num_index_heads", "sparse_index_dim", "sparse_block_size",
    "sparse_topk_blocks", "sparse_init_block", "sparse_local_block", "sparse_score_type", "sparse_disable_index_value"}

def allow(places, allowed):
    """ValueError for a field that has another value than those allowed.

    places   dicts that may have the field
    allowed  {field: its value, or a list of values}; [] allows null alone
    """
    for key, values in allowed.items():
        if not isinstance(values, list):
            values = [values]
        for place in places:
            found = place.get(key)
            if found is not None and found not in values:
                only = " or ".join(shorten(x) for x in values) or "null"
                raise ValueError(f"{key} {shorten(found)}: only {only}")

def shorten(value):
    """A value as text, for a message: of a list of 62 layers the beginning."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

def only_fields(place, name, known):
    """ValueError for a field of the dict `name` that is not known: all of its fields change what a model computes."""
    for key, value in place.items():
        if key not in known and value is not None:
            raise ValueError(f"{name} has {key} {value}: only {', '.join(sorted(known))}")

def pick(hf, *names, kinds=(int,)):
    """The value of a field that has these names. ValueError without a value, with two, or for one of another type: bool
    is no int here."""
    either = " or ".join(names)
    found = [hf[name] for name in names if hf.get(name) is not None]
    if not found:
        raise ValueError(f"config.json lacks {either}")
    value = found[0]
    if any(other != value for other in found):
        raise ValueError(f"{' and '.join(names)} disagree: {found}")
    if type(value) not in kinds:
        raise ValueError(f"{either} {value!r}: {' or '.join(kind.__name__ for kind in kinds)}")
    return value

def layer_list(hf, n, lists, kinds):
    """The types of n layers.

    hf     the fields of a config
    n      layers
    lists  {a list's name: {an entry: its meaning}}, any of which the config may have
    kinds  the types allowed; all layers are of the first where the config has none of the lists
    ValueError for a list of another length or with an entry that means none of `kinds`, and for two that disagree.
    """
    found = {}
    for key, meaning in lists.items():
        entries = hf.get(key)
        if entries is None:
            continue
        known = [entry for entry in meaning if meaning[entry] in kinds]
        is_full = isinstance(entries, list) and len(entries) == n
        if not is_full or any(entry not in known for entry in entries):
            each = " or ".join(str(x) for x in known)
            raise ValueError(f"{key} {shorten(entries)}: a list of {n}, each {each}")
        found[key] = [meaning[entry] for entry in entries]
    if not found:
        return kinds[:1] * n
    return pick(found, *lists, kinds=(list,))

def is_m2(hf, text):
    """True for M2, False for M3, ValueError for another model."""
    model_type = hf.get("model_type") or text.get("model_type")  # the released M3's text_config says minimax_m2
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type}: minimax_m2 or minimax_m3_vl")
    return model_type == "minimax_m2"

def rope_dicts(*places):
    """The RoPE dicts that hold a value, under both of their names, those of the first place first."""
    found = []
    for place in places:
        for key in ("rope_scaling", "rope_parameters"):
            fields = {name: value for name, value in inner(place, key).items() if value is not None}
            if fields:
                found.append(fields)
    return found

def read_sizes(hf, m2):
    """The fields of MiniMaxConfig that the config always has: sizes, constants, and the types of layers."""
    found = {ours: pick(hf, theirs) for ours, theirs in COUNT_NAMES.items()}
    n = found["n_layer"]
    if n > MAX_LAYERS:  # lists of that length are made below
        raise ValueError(f"num_hidden_layers {n}: at most {MAX_LAYERS}")
    if found["n_expert"] > MAX_EXPERTS:  # each has names of its own
        raise ValueError(f"num_local_experts {found['n_expert']}: at most {MAX_EXPERTS}")
    number = (int, float)
    found["norm_eps"] = pick(hf, "rms_norm_eps", kinds=number)
    found["rope_theta"] = float(pick(hf, "rope_theta", kinds=number))
    found["attn_types"] = layer_list(hf, n, ATTN_LISTS, ["full"] if m2 else ["full", "msa"])
    found["mlp_types"] = layer_list(hf, n, MLP_LISTS, ["moe"] if m2 else ["moe", "dense"])
    if not m2:
        found.update(M3_STYLE)
        found["shared_dim"] = pick(hf, "shared_intermediate_size")
        found["routed_scale"] = pick(hf, "routed_scaling_factor", kinds=number)
    if "dense" in found["mlp_types"]:
        found["dense_dim"] = pick(hf, "dense_intermediate_size")
    return found

def allow_same(places, found):
    """ValueError for a field that says again what `found` holds, and says otherwise."""
    dense_first = [*found["mlp_types"], "moe"].index("moe")
    allow(places, dict(
        num_experts=found["n_expert"],
        moe_intermediate_size=found["expert_dim"],
        first_k_dense_replace=dense_first,
        attn_type_list=[[1] * found["n_layer"]]))  # 1: softmax, sparse or not

def read_index_fields(hf, places, found):
    """The index branch's fields of MiniMaxConfig, where a layer has one."""
    n_kv_head = found["n_kv_head"]
    score_only = [int(kind == "msa") for kind in found["attn_types"]]
    fields = {ours: pick(hf, *names) for ours, names in INDEX_NAMES.items()}
    allow(places, dict(
        FIXED_MSA,
        sparse_num_index_heads=n_kv_head,
        index_n_heads=n_kv_head,
        sparse_disable_index_value=[score_only, [1] * len(score_only), True]))
    return fields

def rotary_channels(hf, head_dim, rotary_dim):
    """Channels of a head that rotate: head_dim times partial_rotary_factor, or rotary_dim where there is no factor."""
    factor = hf.get("partial_rotary_factor")
    if factor is None:
        return rotary_dim              # not by way of a share: 44 * (30 / 44) is a little less than 30
    if type(factor) not in (int, float) or not 0 <= factor <= 1:
        raise ValueError(f"partial_rotary_factor {factor}, rotary_dim {rotary_dim}: a part of {head_dim} channels")
    return int(head_dim * factor)

def config_from_hf(hf):
    """config.json of MiniMax-M2, or of M3 (its text part) -> MiniMaxConfig. ValueError for any other model, and for a
    field with a value that this code does not compute."""
    text = inner(hf, "text_config")
    m2 = is_m2(hf, text)
    sparse = inner({**hf, **text}, "sparse_attention_config")
    ropes = rope_dicts(text, hf)
    rope = ropes[0] if ropes else {}

    # a value that this code does not compute is refused wherever it stands
    places = [hf, text, sparse, *ropes]
    allow(ropes, dict(type=FIXED["rope_type"]))
    allow(places, FIXED | (FIXED_M2 if m2 else FIXED_M3))
    for fields in ropes:
        only_fields(fields, "rope_parameters or rope_scaling", ROPE_FIELDS)
    only_fields(sparse, "sparse_attention_config", SPARSE_FIELDS)

    # the model's own fields: those of an inner object count before the outer ones
    hf = {**hf, **text, **sparse, **rope}
    found = read_sizes(hf, m2)
    if sparse and hf.get("layer_types") is None:  # nothing else says which layers are sparse
        pick(hf, "sparse_attention_freq", kinds=(list,))
    allow_same(places, found)
    if "msa" in found["attn_types"]:
        found.update(read_index_fields(hf, places, found))

    # transformers writes rotary_dim 64 into every M3 and ignores it: without a factor it rotates the whole head. Index
    # heads that are narrower than a head lack the channels for that: there, in the release's form, which has no RoPE
    # dict, rotary_dim counts.
    head_dim = found["head_dim"]
    if head_dim < 1:
        raise ValueError(f"head_dim {head_dim}: a whole number, 1 or more")
    narrow = not ropes and found.get("index_head_dim", head_dim) < head_dim
    rotary_dim = head_dim
    if hf.get("rotary_dim") is not None and (m2 or narrow):
        rotary_dim = pick(hf, "rotary_dim")
    found["rotary_dim"] = rotary_channels(hf, head_dim, rotary_dim)
    try:
        return MiniMaxConfig(**found)
    except AssertionError as error:
        raise ValueError(f"config.json: {error}") from None

# The two families that can be written, as classes of transformers hold them -> field: the value that it has there, or a
# list of what its entries may be. What is not named here may have any value that MiniMaxConfig allows.
FAMILIES = dict(
    M2=dict(
        attn_types=["full"], mlp_types=["moe"], shared_dim=0, routed_scale=1,
        activation="swiglu", gemma_norm=False, qk_norm="layer", conv_taps=0),
    M3=dict(
        attn_types=["full", "msa"], mlp_types=["dense", "moe"],
        activation="swiglu_oai", gemma_norm=True, qk_norm="head", conv_taps=0))

def misfits(cfg, family):
    """What keeps a model from being one of a family -> a line for each field."""
    lines = []
    for name, only in FAMILIES[family].items():
        value = getattr(cfg, name)
        if isinstance(only, list):
            fits = set(value) <= set(only)
            only = " or ".join(only)
        else:
            fits = value == only
        if not fits:
            lines.append(f"{name} {value}, where {family} has {only}")
    if family == "M3" and cfg.shared_dim == 0:
        lines.append("shared_dim 0, where M3 has a shared expert")
    return lines

def family_of(cfg):
    """M2 or M3: the family whose class in transformers holds this model. ValueError, naming fields, if neither does."""
    found = {family: misfits(cfg, family) for family in FAMILIES}
    nearest = min(found, key=lambda family: len(found[family]))
    if found[nearest]:
        raise ValueError(f"save_hf writes M2 and M3; this model has {'; '.join(found[nearest])}")
    return nearest

def exported_config(model, index_warmup):
    """-> the config of what is written of a model, and a line for each thing that is not."""
    cfg = model.cfg
    left_out = []
    if model.mtp:
        size, _ = count_params(model.mtp)
        left_out.append(f"n_mtp {cfg.n_mtp}: modules of {size:,} parameters that draft tokens; transformers has no "
                        "place for them")
    kinds = cfg.attn_types
    n_sparse = kinds.count("msa")
    if n_sparse and index_warmup:
        kinds = ["full" if kind == "msa" else kind for kind in kinds]
        left_out.append(f"attn_types msa: {n_sparse} index branches, which were still learning; their layers are full "
                        "attention, as they computed")
    elif n_sparse and cfg.index_kl_stride > 1:
        left_out.append(f"index_kl_stride {cfg.index_kl_stride}: it matters to training alone, and reads back as 1")
    return dataclasses.replace(cfg, attn_types=kinds, n_mtp=0), left_out

def config_to_hf(cfg, dtype, eot=None):
    """MiniMaxConfig -> the fields of config.json for transformers' class of its family. ValueError for any other model.

    cfg    of a model without MTP modules, or they are left out
    dtype  of the weights, by name
    eot    the id that ends a text, or None

    How many channels rotate stands there three times: the release's code reads rotary_dim, transformers up to 5.12
    partial_rotary_factor alone, and newer ones the same in rope_parameters first.
    """
    family = family_of(cfg)
    factor = cfg.rotary_dim / cfg.head_dim
    if int(cfg.head_dim * factor) < cfg.rotary_dim:  # rounded down, and so will be what is read: 30 of 88, say
        factor = math.nextafter(factor, 1)
    theta = float(cfg.rope_theta)
    counts = {theirs: getattr(cfg, ours) for ours, theirs in COUNT_NAMES.items()}
    fields = dict(
        counts, dtype=dtype, rms_norm_eps=float(cfg.norm_eps), tie_word_embeddings=False,
        rotary_dim=cfg.rotary_dim, partial_rotary_factor=factor, rope_theta=theta,
        rope_parameters=dict(rope_type="default", rope_theta=theta, partial_rotary_factor=factor),
        bos_token_id=None, eos_token_id=eot,
        hidden_act="silu", use_qk_norm=True, scoring_func="sigmoid", use_routing_bias=True)
    if family == "M2":
        return dict(
            fields, model_type="minimax_m2", architectures=["MiniMaxM2ForCausalLM"], qk_norm_type="per_layer")
    return dict(fields, model_type="minimax_m3_vl_text", architectures=["MiniMaxM3VLForCausalLM"], **m3_fields(cfg))

def m3_fields(cfg):
    """The fields of M3's config.json that M2's lacks."""
    fields = dict(
        use_gemma_norm=True, qk_norm_type="per_head",
        layer_types=written_kinds(cfg.attn_types, ATTN_LISTS["layer_types"]),
        mlp_layer_types=written_kinds(cfg.mlp_types, MLP_LISTS["mlp_layer_types"]),
        shared_intermediate_size=cfg.shared_dim, n_shared_experts=1, routed_scaling_factor=float(cfg.routed_scale),
        swiglu_alpha=SWIGLU_ALPHA, swiglu_limit=SWIGLU_LIMIT)
    if "dense" in cfg.mlp_types:
        fields["dense_intermediate_size"] = cfg.dense_dim
    if "msa" in cfg.attn_types:
        for ours, (theirs, _) in INDEX_NAMES.items():
            fields[theirs] = getattr(cfg, ours)
        fields.update(index_n_heads=cfg.n_kv_head, index_local_blocks=1)
    return fields

def written_kinds(kinds, meaning):
    """Kinds of layers -> the words that mean them in a list of config.json."""
    words = {kind: word for word, kind in meaning.items()}
    return [words[kind] for kind in kinds]

# ---- released checkpoints: writing ------------------------------------------------------------------------------
# Tensors are written one by one, in the safetensors format: 8 bytes with the header's length, a header of JSON, which
# says where each tensor lies, and the numbers. So the model is in memory once, whatever its size. All files get their
# names at the end, config.json as the last one: what a killed export leaves behind is not taken for a checkpoint.

WRITTEN_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TEMPORARY = ".tmp"  # what a file's name ends with until it is whole

def exported_tensors(params, cfg):
    """Our state dict -> {the name in transformers: a view of the parameter}, without what cfg has no place for."""
    family = family_of(cfg)
    tensors = {}
    for ours, param in params.items():
        place = ours.split(".")
        if place[0] == "mtp":
            continue
        if "indexer" in place and cfg.attn_types[int(place[1])] == "full":
            continue
        tensors.update(released_tensors(param, exported_form(ours, family)))
    return tensors

def split_shards(tensors, most):
    """{name: tensor} -> {file: its {name: tensor}}, in order; a file has at most `most` bytes, or a single tensor."""
    shards = [{}]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}

def index_text(shards):
    """The index of some files: the place of each tensor."""
    weight_map = {}
    total = 0
    for file, tensors in shards.items():
        for name, t in tensors.items():
            weight_map[name] = file
            total += t.nbytes
    return json.dumps(dict(metadata=dict(total_size=total), weight_map=weight_map), indent=2)

def check_folder(path, shards):
    """ValueError if a folder holds weights that writing these files would leave there."""
    files = {*shards, INDEX} if len(shards) > 1 else {*shards}
    others = {file.name for file in Path(path).glob("*.safetensors*") if file.suffix != TEMPORARY} - files
    if others:
        raise ValueError(f"{path} holds other weights, {in_words(others)}: another folder is needed")

def write_tensors(file, tensors):
    """Write {name: tensor} into an open file, in the safetensors format."""
    # the widest types first, so that each number lies at a multiple of its size
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header = {"__metadata__": dict(format="pt")}
    end = 0
    for name, t in tensors.items():
        offsets = [end, end + t.nbytes]
        header[name] = dict(dtype=WRITTEN_TYPES[t.dtype], shape=list(t.shape), data_offsets=offsets)
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for t in tensors.values():
        file.write(t.detach().cpu().contiguous().view(torch.uint8).numpy())

def write_folder(path, shards, texts):
    """Write files into a folder, which is made. config.json is the last one to get its name, and an older one goes
    before the first does: at any moment it stands beside its own weights, or is not there.

    shards  {file: its {name: tensor}}
    texts   {file: its text}, the last one config.json
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    names = [*shards, *texts]
    try:
        # what a killed export left goes first
        for name in [*names, *(file.stem for file in path.glob(f"*.safetensors{TEMPORARY}"))]:
            (path / f"{name}{TEMPORARY}").unlink(missing_ok=True)
        for name in names:
            with open(path / f"{name}{TEMPORARY}", "xb") as file:
                if name in shards:
                    write_tensors(file, shards[name])
                else:
                    file.write(texts[name].encode())
                file.flush()
                os.fsync(file.fileno())

        (path / "config.json").unlink(missing_ok=True)
        for name in names:
            os.replace(path / f"{name}{TEMPORARY}", path / name)
    finally:
        for name in names:
            (path / f"{name}{TEMPORARY}").unlink(missing_ok=True)
