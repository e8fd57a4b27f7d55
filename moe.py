"""Mixture of experts as in MiniMax-M2 and M3: sigmoid scores, and a bias that moves the choice but never the weight.

    s = sigmoid(W x)                        score of every expert, in fp32                          (T, E)
    chosen = top-A of s + b                 the bias b steers load, it is not learned by gradient   (T, A)
    w = scale * s[chosen] / sum s[chosen]   weights come from s alone                               (T, A)
    y = sum_e w_e Expert_e(x) + Shared(x)   M3 adds one expert that every token visits; M2 has none
    after each optimizer step:  b += u * sign(mean(load) - load)

Worked example, 4 experts, A = 2: s = [.9 .8 .1 .2], b = [0 0 0 1]. s + b = [.9 .8 .1 1.2], so experts 3 and 0 are
chosen, with weights .2/1.1 = .18 and .9/1.1 = .82: expert 3 gets tokens, but hardly any say in them.

Differs from M2/M3: the report does not publish the balancing rule; the sign update is that of loss-free balancing
(arXiv 2408.15664). No token is ever dropped. `experts_loop` is the specification; `experts_grouped` sorts tokens by
expert and runs one grouped matrix product, with no host synchronisation, `gated` in between as one Triton kernel. The
few rows of a decoding step have kernels of their own: `few_route`, `few_mlp`.
"""
from __future__ import annotations  # without Triton, tl.constexpr in a kernel's signature is no name

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from msa import _overlap, _prefetch, cdiv, constexpr, jit, tl, triton

SWIGLU_ALPHA = 1.702  # swiglu_alpha of M3's config: gate * sigmoid(1.702 * gate) is nearly a GELU
SWIGLU_LIMIT = 7.0    # swiglu_limit of M3's config: gate is at most 7, up lies within 7 of 0

# ---- the choice of experts --------------------------------------------------------------------------------------

def best(x, n):
    """The n largest of each row of x (T, E), finite, best first, ties by the lowest -> indices (T, n) int64.
    Compiled, it is argmax n times, which torch.compile makes one kernel of: topk and sort would stay kernels apart."""
    if not torch.compiler.is_compiling():
        order = x.sort(dim=-1, descending=True, stable=True).indices
        return order[:, :n].contiguous()
    expert = torch.arange(x.size(-1), device=x.device)
    found = []
    for _ in range(n):
        largest = x.argmax(-1, keepdim=True)                                        # (T, 1)
        found.append(largest)
        x = torch.where(expert == largest, float("-inf"), x)
    return torch.cat(found, -1)

def route(logits, bias, n_active, scale=1.0, idx=None):
    """Choose experts: M2 report section 2 (sigmoid gate), DeepSeek-V3 eq. 16 (bias in the top-k only).

    logits    (T, E) fp32 or wider
    bias      (E,) moves the choice, never the weights
    n_active  A, experts a token; AssertionError if there are fewer
    scale     the sum of a token's weights
    idx       (T, A) int64, a recorded choice; the weights still come from the logits
    -> weights (T, A), idx (T, A) int64
    """
    assert n_active <= logits.size(-1), f"cannot choose {n_active} of {logits.size(-1)} experts"
    scores = logits.sigmoid()
    # Why not weigh by the biased score? With bias +10 on one expert its weight would be > 0.9 for every token:
    # a knob for load would rewrite the output.
    if idx is None:
        idx = best(scores + bias, n_active)
    weights = scores.gather(-1, idx)
    return scale * weights / weights.sum(-1, keepdim=True), idx

# ---- experts ----------------------------------------------------------------------------------------------------

def use_triton(impl, x):
    """Whether a kernel computes from x: where impl is "triton", or it is "auto" and x is on a GPU in 16 bits."""
    on_gpu = triton and x.is_cuda and x.dtype.itemsize == 2
    return impl == "triton" or (impl == "auto" and on_gpu)

def gated(h, activation, weight=None, impl="auto"):
    """The gate between an expert's two matrices.

    h           (n, 2 I): gate and up side by side
    activation  "swiglu", M2's: silu(gate) * up; "swiglu_oai", M3's: clamped, with up + 1
    weight      (n, 1): a factor for each row, or None
    impl        "triton", which reads and writes each number once, "torch", or "auto": see use_triton
    -> (n, I)
    """
    if use_triton(impl, h):
        return _Gated.apply(h, weight, activation)
    gate, up = h.chunk(2, dim=-1)
    if activation == "swiglu":
        y = F.silu(gate) * up
    else:
        # (up + 1) * gate * sigmoid(alpha * gate), in the fewest passes over memory
        gate = gate.clamp(max=SWIGLU_LIMIT)
        up = up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        swish = F.silu(SWIGLU_ALPHA * gate) * (1 / SWIGLU_ALPHA)
        y = torch.addcmul(swish, swish, up)
    if weight is None:
        return y
    return y * weight.to(h.dtype)

def experts_loop(x, w13, w2, weights, idx, activation):
    """Every expert in turn, on the tokens that chose it: the specification, and the path for fp64.

    x           (T, C)
    w13         (E, 2 I, C): gate and up
    w2          (E, C, I)
    weights     (T, A): a token's experts add up with these factors
    idx         (T, A): a token's experts
    activation  see `gated`
    -> (T, C)
    """
    y = torch.zeros_like(x)
    visited = idx.unique().tolist()  # an expert that no token chose is not looked at: it may have to be read from disk
    if not visited:                  # without a token, on one of several ranks: gradients of 0, not none
        visited = [0]
    for e in visited:
        token, slot = (idx == e).nonzero(as_tuple=True)
        out = gated(x[token] @ w13[e].T, activation) @ w2[e].T
        weight = weights[token, slot, None].to(x.dtype)
        y = y.index_add(0, token, out * weight)
    return y

def experts_grouped(x, w13, w2, weights, idx, activation):
    """The same from tokens sorted by expert: groups of one matrix product. Arguments as in `experts_loop`."""
    (T, C), A, E = x.shape, idx.size(1), w13.size(0)

    # sort the T * A pairs of a token and its expert by expert; a GPU sorts bytes in an eighth of the passes
    small = torch.uint8 if E <= 256 else torch.int32
    sorted_e, order = idx.flatten().to(small).sort(stable=True)                     # (T*A,)
    place = torch.arange(len(order), device=x.device)
    inverse = torch.empty_like(order).scatter_(0, order, place)                     # a pair's place in the order

    # where each expert's group ends
    experts = torch.arange(E, dtype=torch.int32, device=x.device)
    ends = torch.searchsorted(sorted_e.int(), experts, right=True).int()            # (E,)

    # weighted before w2 and not after: a row's I channels are fewer than its C
    take = _Rows.apply if torch.is_grad_enabled() else take_rows
    rows = take(x, order // A, inverse, A)                                          # (T*A, C)
    factors = take(weights.reshape(-1, 1), order, inverse, 1)                       # (T*A, 1)
    h = F.grouped_mm(rows, w13.transpose(1, 2), offs=ends)
    h = gated(h, activation, factors)                                               # (T*A, I)
    out = F.grouped_mm(h, w2.transpose(1, 2), offs=ends)

    # back in the order of tokens, whose A experts add up
    out = take(out, inverse, order, 1)
    return out.view(T, A, C).sum(1)

def take_rows(x, index, back, n):
    """_Rows without a gradient."""
    return x.index_select(0, index)

class _Rows(torch.autograd.Function):
    """x[index], where every row of x appears n times, at the places that `back` lists row by row. The gradient is
    gathered and summed over n: indexing's own adds rows by atomics on a GPU, slower, and two runs differ in the last
    bit."""

    @staticmethod
    def forward(ctx, x, index, back, n):
        ctx.save_for_backward(back)
        ctx.n = n
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        back, = ctx.saved_tensors
        grad = grad.index_select(0, back)
        if ctx.n > 1:
            grad = grad.view(-1, ctx.n, grad.size(1)).sum(1)
        return grad, None, None, None

def pick_experts(dtype):
    """The function that runs experts in this dtype: grouped_mm has no fp64 kernel."""
    return experts_loop if dtype == torch.float64 else experts_grouped

# ---- modules ----------------------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """A product without bias. The weight stays in the dtype in which it is trained; a product casts it to that of x."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        weight = self.weight
        return F.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype))

class MLP(nn.Module):
    """Gated feed-forward layer: M3's dense layers and its shared expert."""

    def __init__(self, n_embd, dim, activation):
        super().__init__()
        self.activation = activation
        self.w13 = Linear(n_embd, 2 * dim)
        self.w2 = Linear(dim, n_embd)

    def forward(self, x, weight=None, replay=None):
        """x (B, T, C) -> y (B, T, C), aux {}. weight and replay are what MoE takes: a dense layer has no choice."""
        return self.w2(gated(self.w13(x), self.activation)), {}

class Router(nn.Module):
    """Gate and bias. Both stay in fp32 when the model moves to bf16: near-ties in s + b would flip the choice."""

    def __init__(self, n_embd, n_expert):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_embd))
        self.register_buffer("bias", torch.zeros(n_expert))

    def _apply(self, fn, recurse=True):
        def at_least_fp32(t):
            moved = fn(t)
            if moved.dtype.itemsize >= 4:
                return moved
            return t.to(moved.device)  # .to(bfloat16).float() would come back rounded: keep the values
        return super()._apply(at_least_fp32, recurse)

    def forward(self, x):
        # in training alone: for the few tokens of a decoding step, splitting the weight would be most of the work
        on_tensor_cores = x.is_cuda and x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32
        if torch.is_grad_enabled() and on_tensor_cores:
            return _WideGate.apply(x, self.weight)
        return F.linear(x.to(self.weight.dtype), self.weight)

class MoE(nn.Module):
    """Router, E routed experts, and a shared one where cfg.shared_dim > 0."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        # with expert parallelism w13 and w2 are in `experts`, this rank's share of them. It is registered first, so
        # that parameters keep their order, by which a checkpoint knows their moments
        self.register_module("experts", None)
        self.router = Router(cfg.n_embd, cfg.n_expert)
        self.w13 = nn.Parameter(torch.empty(cfg.n_expert, 2 * cfg.expert_dim, cfg.n_embd))
        self.w2 = nn.Parameter(torch.empty(cfg.n_expert, cfg.n_embd, cfg.expert_dim))
        self.shared = MLP(cfg.n_embd, cfg.shared_dim, cfg.activation) if cfg.shared_dim else None

    def forward(self, x, weight=None, replay=None):
        """Every token through its experts.

        x       (B, T, C)
        weight  (B, T) counts a token so often, 0 = pad; default 1
        replay  (B, T, A) a recorded choice of experts; their weights still come from the scores
        -> y (B, T, C); aux: expert_load (E,) fp32, experts (B, T, A).
        """
        cfg = self.cfg
        B, T, _ = x.shape
        flat = x.flatten(0, 1)                                                                            # (B*T, C)
        if replay is not None:
            replay = replay.flatten(0, 1).long()
        logits = self.router(flat)
        weights, idx = route(logits, self.router.bias, cfg.n_expert_per_tok, cfg.routed_scale, replay)  # (B*T, A) both

        y = self.run_experts(flat, weights, idx).view_as(x)
        if self.shared is not None:
            shared, _ = self.shared(x)
            y = y + shared

        # whole numbers: the sum is exact in any order, atomics included
        count = flat.new_ones(B * T) if weight is None else weight.flatten()
        count = count.float()[:, None].expand_as(idx)
        load = torch.zeros(cfg.n_expert, device=x.device).index_add(0, idx.flatten(), count.flatten())
        return y, dict(expert_load=load, experts=idx.view(B, T, -1))

    def run_experts(self, x, weights, idx):
        """x (n, C), weights and idx (n, A) -> the weighted sum of each token's experts (n, C)."""
        if self.experts is not None:
            return self.experts(x, weights, idx)
        run = pick_experts(x.dtype)
        return run(x, self.w13.to(x.dtype), self.w2.to(x.dtype), weights, idx, self.cfg.activation)

    def share_experts(self, group):
        """Keep an equal share of the experts, and leave the others to the group's other ranks."""
        self.experts = ParallelExperts(self, group)
        del self.w13, self.w2

def count_params(module):
    """Parameters and router biases: all, on all ranks, and those that one token uses."""
    total = sum(t.numel() for t in [*module.parameters(), *module.buffers()])
    unused = 0
    for layer in module.modules():
        if isinstance(layer, MoE):
            here = layer if layer.experts is None else layer.experts
            an_expert = math.prod(here.w13.shape[1:]) + math.prod(here.w2.shape[1:])
            total += an_expert * (layer.cfg.n_expert - len(here.w13))
            unused += an_expert * (layer.cfg.n_expert - layer.cfg.n_expert_per_tok)
    return total, total - unused

# ---- experts on several ranks -----------------------------------------------------------------------------------
# Expert parallelism: of E experts, rank r of a group of P keeps E / P, from r E / P on. All else of the layer is on
# each rank, which routes its own tokens. Each token's row travels to its A experts and back, all-to-all: twice in the
# forward pass, twice in the backward pass, C numbers each time for each of its experts. No token is dropped: a rank
# takes as many rows as come. It pays where experts do not fit one GPU; where they do, it moves more than it saves.

class _Exchange(torch.autograd.Function):
    """Rows (n, C), sorted by the rank that they go to -> the rows that come, sorted by the rank that they are from.
    sends, takes: how many to and from each rank, lists. The gradient goes back the same way."""

    @staticmethod
    def forward(ctx, rows, sends, takes, group):
        ctx.back = takes, sends, group
        came = rows.new_empty(sum(takes), *rows.shape[1:])
        dist.all_to_all_single(came, rows.contiguous(), takes, sends, group=group)
        return came

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.back), None, None, None

class ParallelExperts(nn.Module):
    """The experts of a layer that this rank of a group keeps: rank r those from r E / P on, P ranks in all."""

    def __init__(self, layer, group):
        """layer: MoE; ValueError where its experts cannot be shared out equally. group: of torch.distributed."""
        super().__init__()
        self.group = group
        self.activation = layer.cfg.activation
        self.n_ranks = dist.get_world_size(group)
        if layer.cfg.n_expert % self.n_ranks:
            raise ValueError(f"{layer.cfg.n_expert} experts do not divide by {self.n_ranks} ranks")
        self.n_own = layer.cfg.n_expert // self.n_ranks
        first = dist.get_rank(group) * self.n_own
        self.w13 = nn.Parameter(layer.w13.detach()[first:first + self.n_own].clone())
        self.w2 = nn.Parameter(layer.w2.detach()[first:first + self.n_own].clone())

    def forward(self, x, weights, idx):
        """x (n, C), weights and idx (n, A) -> the weighted sum of each token's experts (n, C), wherever they are."""
        n, A = idx.shape
        take = _Rows.apply if torch.is_grad_enabled() else take_rows

        # pairs of a token and an expert, sorted by expert, and so by rank
        chosen, order = idx.flatten().sort(stable=True)                                 # (n*A,)
        place = torch.arange(n * A, device=x.device)
        inverse = torch.empty_like(order).scatter_(0, order, place)                     # a pair's place in the order
        leaving = torch.bincount(chosen, minlength=self.n_ranks * self.n_own)

        # each rank hears how many come from each other one, for each of its experts
        coming = torch.empty_like(leaving)
        dist.all_to_all_single(coming, leaving, group=self.group)
        by_rank = torch.stack([leaving, coming]).view(2, self.n_ranks, self.n_own).sum(2)
        sends, takes = by_rank.tolist()

        # rows go there, through the experts, and back
        rows = take(x, order // A, inverse, A)                                          # (n*A, C)
        rows = _Exchange.apply(rows, sends, takes, self.group)                          # (m, C)
        own = torch.arange(self.n_own, device=x.device).repeat(self.n_ranks)
        expert = own.repeat_interleave(coming, output_size=len(rows))[:, None]          # (m, 1)
        once = weights.new_ones(len(rows), 1)
        run = pick_experts(x.dtype)
        out = run(rows, self.w13.to(x.dtype), self.w2.to(x.dtype), once, expert, self.activation)
        out = _Exchange.apply(out, takes, sends, self.group)                            # (n*A, C)

        # in the order of tokens again, whose A experts add up
        out = take(out, inverse, order, 1).view(n, A, -1)
        return (out * weights[..., None].to(x.dtype)).sum(1)

# ---- balancing --------------------------------------------------------------------------------------------------

@torch.no_grad()
def update_bias(bias, load, rate):
    """b += rate * sign(mean load - load), in place, after the optimizer step (arXiv 2408.15664, algorithm 1)."""
    bias += rate * (load.mean() - load).sign()

def max_violation(load):
    """MaxVio of load (…, E): how far the busiest expert is above the mean; 0 = balanced, E - 1 = one takes all."""
    return load.amax(-1) / load.mean(-1) - 1

# ---- the router's product on tensor cores -----------------------------------------------------------------------
# Tensor cores multiply bf16, of 8 bits, and the gate's weights are fp32, of 24. A number of 24 bits is the sum of three
# of 8 bits, so three products give the exact one: W x = W1 x + W2 x + W3 x, each summed in fp32.

def _terms(x):
    """x in fp32, 0 or over 2^-110 -> three terms in bf16 with the same sum: 8 bits each of its 24."""
    first = _head(x)
    second = _head(x - first)
    third = x - first - second
    return first.bfloat16(), second.bfloat16(), third.bfloat16()

def _head(x):
    """The first 8 bits of x (fp32), in fp32. They are cut off, not rounded by .bfloat16(): torch.compile leaves out
    that rounding, and x - head(x) would be 0."""
    return (x.view(torch.int32) & -2 ** 16).view(torch.float32)

class _WideGate(torch.autograd.Function):
    """x (n, C) bf16, W (E, C) fp32 -> x W^T in fp32, on tensor cores and without a copy of x in fp32: products of two
    bf16 numbers are exact in fp32, and sums are fp32. bmm and not mm, whose out_dtype torch.compile may not know."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        stacked = torch.cat(_terms(W))                                              # (3 E, C)
        products = torch.bmm(x[None], stacked.T[None], out_dtype=W.dtype)[0]        # (n, 3 E)
        return products.unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx, grad):
        x, W = ctx.saved_tensors
        g1, g2, g3 = _terms(grad)                                                   # (n, E)
        w1, w2, _ = _terms(W)                                                       # (E, C)

        # dx = g1 w1 + g1 w2 + g2 w1: 16 of 24 bits, for what is left is rounded to bf16
        dx = torch.cat([g1, g1, g2], 1) @ torch.cat([w1, w2, w1])

        # dW sums over tokens, in so many parts: one would keep six multiprocessors busy
        parts = math.gcd(len(x), 64)
        left = torch.cat([g1, g2, g3], 1).unflatten(0, (parts, -1))                 # (parts, n / parts, 3 E)
        right = x.unflatten(0, (parts, -1))                                         # (parts, n / parts, C)
        dW = torch.bmm(left.transpose(1, 2), right, out_dtype=W.dtype).sum(0)       # (3 E, C)
        return dx, dW.unflatten(0, (3, -1)).sum(0)

# ---- the gate's kernels -----------------------------------------------------------------------------------------
# One program computes a tile: ROWS rows of I channels, in COLS columns, of which the last may be empty. It reads gate
# and up and writes y, where torch would read and write each step of the formula. Backward computes y and its slopes
# anew: that is cheaper than to keep them. torch.compile copies their text to where no name but tl is known, so that it
# is tl.constexpr here, where msa.py says constexpr.

ALPHA = constexpr(SWIGLU_ALPHA)
LIMIT = constexpr(SWIGLU_LIMIT)

@jit
def _gate(h, at, valid, I, OAI):
    """y = up * gate * sigmoid(alpha * gate), dy / dgate and dy / dup of a tile of h, each [ROWS, COLS] fp32. I and OAI
    are constants, as they are the callers'."""
    gate = tl.load(h + at, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(h + at + I, mask=valid, other=0.0).to(tl.float32)
    return _gate_tile(gate, up, OAI)

@jit
def _gate_tile(gate, up, OAI):
    """_gate of two tiles in fp32 that are loaded already."""
    scaled = gate
    if OAI:
        raw_gate, raw_up = gate, up
        keep_nan: tl.constexpr = tl.PropagateNan.ALL  # else a GPU takes the smaller of NaN and 7 to be 7
        gate = tl.minimum(gate, LIMIT, keep_nan)
        up = tl.clamp(up, -LIMIT, LIMIT, keep_nan) + 1
        scaled = gate * ALPHA  # in this order: the interpreter multiplies no constexpr by a tile

    sigmoid = 1 / (1 + tl.exp(-scaled))
    dgate = up * sigmoid * (1 + scaled * (1 - sigmoid))
    dup = gate * sigmoid
    y = up * gate * sigmoid
    if OAI:  # what is clamped moves nothing
        dgate = tl.where(raw_gate <= LIMIT, dgate, 0.0)
        dup = tl.where(tl.abs(raw_up) <= LIMIT, dup, 0.0)
    return y, dgate, dup

@jit
def _gated_kernel(
    # rows
    h,                   # (n, 2 I): gate and up side by side
    weight,              # (n, 1), or None
    out,                 # (n, I)
    n,
    # sizes
    I: tl.constexpr,
    OAI: tl.constexpr,      # M3's activation, not M2's
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    valid = (row < n)[:, None] & (col < I)                                          # [ROWS, COLS]
    at = row[:, None] * (2 * I) + col
    y, _, _ = _gate(h, at, valid, I, OAI)
    if weight is not None:
        factor = tl.load(weight + row, mask=row < n, other=0.0)                     # [ROWS]
        y *= factor[:, None]
    tl.store(out + row[:, None] * I + col, y.to(out.dtype.element_ty), mask=valid)

@jit
def _gated_grad_kernel(
    # rows
    h,                   # (n, 2 I): gate and up side by side
    weight,              # (n, 1), or None
    # gradients
    grad,                # (n, I) of the output
    dh,                  # (n, 2 I), written
    dweight,             # (n, 1), written where weight is not None
    n,
    # sizes
    I: tl.constexpr,
    OAI: tl.constexpr,      # M3's activation, not M2's
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    valid = (row < n)[:, None] & (col < I)                                          # [ROWS, COLS]
    at = row[:, None] * (2 * I) + col
    y, dgate, dup = _gate(h, at, valid, I, OAI)
    dy = tl.load(grad + row[:, None] * I + col, mask=valid, other=0.0).to(tl.float32)

    # out = weight * y
    if weight is not None:
        factor = tl.load(weight + row, mask=row < n, other=0.0)                     # [ROWS]
        tl.store(dweight + row, tl.sum(dy * y, 1), mask=row < n)
        dy *= factor[:, None]

    tl.store(dh + at, (dy * dgate).to(dh.dtype.element_ty), mask=valid)
    tl.store(dh + at + I, (dy * dup).to(dh.dtype.element_ty), mask=valid)

def _gate_launch(h, activation):
    """-> grid, and what both kernels are given: h, and tiles of 2,048 numbers, or of one row where it has more."""
    I = h.size(-1) // 2
    n = h.numel() // (2 * I)
    cols = triton.next_power_of_2(I)
    rows = max(1, 2048 // cols)
    given = dict(
        h=h,
        n=n,
        I=I,
        OAI=activation == "swiglu_oai",
        ROWS=rows,
        COLS=cols,
        num_warps=4 if cols < 4096 else 8)
    return (triton.cdiv(n, rows),), given

class _Gated(torch.autograd.Function):
    """`gated` in Triton."""

    @staticmethod
    def forward(ctx, h, weight, activation):
        ctx.save_for_backward(h, weight)
        ctx.activation = activation
        grid, given = _gate_launch(h, activation)
        out = h.new_empty(*h.shape[:-1], given["I"])
        _gated_kernel[grid](weight=weight, out=out, **given)
        return out

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        dh = torch.empty_like(h)
        dweight = None if weight is None else torch.empty_like(weight)
        grid, given = _gate_launch(h, ctx.activation)
        _gated_grad_kernel[grid](weight=weight, grad=grad.contiguous(), dh=dh, dweight=dweight, **given)
        return dh, dweight, None

# ---- few rows: the kernels of a decoding step ---------------------------------------------------------------------
# A step of generation has R rows, a few dozen at most: tokens, and drafts of tokens, of all sequences. It reads every
# weight once, and that and the start of kernels is all that takes time. Hence few kernels, each of many programs:
#     _few_linear_kernel  [norm], product [+ residual]: projections and the head
#     _few_route_kernel   norm, router, choice of experts: a program a row
#     _few_up_kernel      norm, w13 of the experts that some row chose and of the shared one, gate
#     _few_down_kernel    w2 of the same, sum, + residual
# A program has ROWS rows and COLS columns of a product, weight times x: COLS is the tensor core's M, 16 or more, and
# ROWS its N, 8 or more. It sums the channels in SPLIT parts, one a warp: one warp alone would wait for K / 16 products,
# one after the other. (The head has so many columns that a warp has some of its own.) With few rows it starts while the
# kernel before still runs (PDL, see msa.py's section E); a projection, and the router, then bring their weights to the
# L2, which costs more than it gains for experts. A norm's weight is folded into the matrix behind it, and its 1 / rms,
# a number a row, is multiplied after the product.
#
# BLOCK and SPLIT, and so the order of every sum, depend on a matrix's sizes alone. So a row's result has the same bits
# in any company: what is generated does not depend on the batch, and a token that is verified as a draft gets the
# logits of plain decoding. An expert that other rows chose adds an exact 0.

@jit
def _few_part(SPLIT, BLOCK):
    """Channels of a block in SPLIT parts, [SPLIT, BLOCK / SPLIT]. SPLIT and BLOCK are constants."""
    size: tl.constexpr = BLOCK // SPLIT
    return tl.arange(0, SPLIT)[:, None] * size + tl.arange(0, size)

@jit
def _few_rows(x, at, channel, held, K):
    """Rows of x that start at `at` [ROWS], as columns -> [SPLIT, BLOCK / SPLIT, ROWS], 0 where not held and past K."""
    real = held[None, None, :] & (channel < K)[:, :, None]
    return tl.load(x + at[None, None, :] + channel[:, :, None], mask=real, other=0.0)

@jit
def _few_columns(weight, at, channel, K):
    """Rows of a matrix that start at `at` [COLS] -> [SPLIT, COLS, BLOCK / SPLIT], 0 past K."""
    real = (channel < K)[:, None, :] & (at >= 0)[None, :, None]
    return tl.load(weight + at[None, :, None] + channel[:, None, :], mask=real, other=0.0)

@jit
def _few_dot(weight, x, acc):
    """acc [SPLIT, COLS, ROWS] + the parts' products."""
    return tl.dot(weight, x, acc, input_precision="ieee")

@jit
def _few_scale(square, K, EPS):
    """Squares [SPLIT, BLOCK / SPLIT, ROWS] of rows of K channels -> 1 / rms [ROWS]."""
    total = tl.sum(tl.sum(square, 1), 0)
    return tl.rsqrt(total / K + EPS)

# One program = ROWS rows and COLS columns.
@jit
def _few_linear_kernel(
    x,         # (R, K)
    weight,    # (N, K)
    residual,  # (R, N), or None
    out,       # (R, N), written
    R,
    N,
    K: tl.constexpr,
    EPS: tl.constexpr,    # of the norm of x, or None
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels at a time
    MOST: tl.constexpr,   # COLS * K, rounded up
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,  # weights are brought to the L2 while the kernel before runs
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * COLS
    col = tl.minimum(first + tl.arange(0, COLS), N - 1).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = _few_part(SPLIT, BLOCK)
    if PDL:
        if AHEAD:
            tl.extra.cuda.gdc_launch_dependents()
            _prefetch(weight + first.to(tl.int64) * K, tl.minimum(COLS, N - first) * K, MOST)
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros([SPLIT, COLS, ROWS], tl.float32)
    square = tl.zeros([SPLIT, BLOCK // SPLIT, ROWS], tl.float32)
    for k in range(0, K, BLOCK):
        columns = _few_columns(weight, col * K, k + part, K)
        rows = _few_rows(x, row * K, k + part, row < R, K)
        acc = _few_dot(columns, rows, acc)
        if EPS is not None:
            wide = rows.to(tl.float32)
            square += wide * wide
    if PDL:
        if not AHEAD:
            tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, 0)                                                              # [COLS, ROWS]
    if EPS is not None:
        y *= _few_scale(square, K, EPS)[None]

    at = row[None].to(tl.int64) * N + col[:, None]
    real = (row < R)[None] & (first + tl.arange(0, COLS) < N)[:, None]
    if residual is not None:
        y += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=real)

@jit
def _few_logits(x, weight, row, expert, C, E, EPS, EXPERTS, BLOCK):
    """The gate's logits of one row for some experts -> [EXPERTS]. All but x, weight, row and expert are constants."""
    acc = tl.zeros([EXPERTS, BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for c in range(0, C, BLOCK):
        channel = c + tl.arange(0, BLOCK)
        held = channel < C
        wide = tl.load(x + row * C + channel, mask=held, other=0.0).to(tl.float32)
        real = held[None] & (expert < E)[:, None]
        at = expert[:, None] * C + channel[None]
        acc += wide[None] * tl.load(weight + at, mask=real, other=0.0)              # [EXPERTS, BLOCK]
        square += wide * wide
    return tl.sum(acc, 1) * tl.rsqrt(tl.sum(square, 0) / C + EPS)

# One program = one row and EXPERTS experts.
@jit
def _few_logits_kernel(
    x,        # (R, C)
    weight,   # (E, C) fp32
    logits,   # (R, E) fp32, written
    C: tl.constexpr,
    E: tl.constexpr,
    EPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,    # channels at a time
    MOST: tl.constexpr,     # EXPERTS * C, rounded up
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * EXPERTS
    row = tl.program_id(1)
    expert = first + tl.arange(0, EXPERTS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        _prefetch(weight + first * C, tl.minimum(EXPERTS, E - first) * C, MOST)
        tl.extra.cuda.gdc_wait()
    logit = _few_logits(x, weight, row, expert, C, E, EPS, EXPERTS, BLOCK)
    tl.store(logits + row * E + expert, logit, mask=expert < E)

# One program = one row.
@jit
def _few_route_kernel(
    x,        # (R, C), or None where the logits are known
    weight,   # (E, C) fp32, the same
    logits,   # (R, E) fp32, or None
    bias,     # (E,) fp32
    factor,   # (R, A) fp32, written: the weights of a row's experts
    idx,      # (R, A) int32, written: the row's experts, best first
    C: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    EXPERTS: tl.constexpr,  # E, rounded up
    CHOSEN: tl.constexpr,   # A, rounded up
    BLOCK: tl.constexpr,    # channels at a time
    MOST: tl.constexpr,     # E * C, rounded up
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if logits is None:
            if row == 0:
                _prefetch(weight, E * C, MOST)
        tl.extra.cuda.gdc_wait()

    # scores
    if logits is None:
        logit = _few_logits(x, weight, row, expert, C, E, EPS, EXPERTS, BLOCK)      # [EXPERTS]
    else:
        logit = tl.load(logits + row * E + expert, mask=expert < E, other=0.0)
    score = 1 / (1 + tl.exp(-logit))
    biased = score + tl.load(bias + expert, mask=expert < E, other=0.0)
    biased = tl.where(expert < E, biased, float("-inf"))

    # the best A, ties by the lowest
    place = tl.arange(0, CHOSEN)
    chosen = tl.zeros([CHOSEN], tl.int32)
    picked = tl.zeros([CHOSEN], tl.float32)
    for a in tl.static_range(A):
        best = tl.min(tl.where(biased == tl.max(biased, 0), expert, E - 1), 0)
        chosen = tl.where(place == a, best, chosen)
        picked = tl.where(place == a, tl.sum(tl.where(expert == best, score, 0.0), 0), picked)
        biased = tl.where(expert == best, float("-inf"), biased)
    picked = picked * SCALE / tl.sum(picked, 0)
    tl.store(factor + row * A + place, picked, mask=place < A)
    tl.store(idx + row * A + place, chosen, mask=place < A)

@jit
def _few_choice(idx, row, expert, R, A, CHOSEN):
    """Which rows [ROWS] chose the expert, and the place of it in their lists. A and CHOSEN are constants."""
    place = tl.arange(0, CHOSEN)
    held = (row < R)[:, None] & (place < A)[None]
    mine = tl.load(idx + row[:, None] * A + place[None], mask=held, other=-1) == expert
    chose = tl.max(mine.to(tl.int32), 1) > 0
    return chose, tl.sum(tl.where(mine, place[None], 0), 1)

# One program = ROWS rows and COLS columns of one expert: the first is the shared one. The others have either an expert
# each, or a pair of a row and its expert, of which the first in the batch computes for all rows that chose it.
@jit
def _few_up_kernel(
    x,         # (R, C)
    w13,       # (E, 2 I, C), or None
    shared13,  # (2 IS, C), or None
    factor,    # (R, A), or None
    idx,       # (R, A), or None
    h,         # (R, A * I + IS), written: gated and weighted, by a row's own list of experts, the shared one last
    R,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    EPS: tl.constexpr,
    OAI: tl.constexpr,        # M3's activation, not M2's
    BY_EXPERT: tl.constexpr,  # a program has an expert, not a pair
    PAIRS: tl.constexpr,      # R * A, rounded up
    CHOSEN: tl.constexpr,     # A, rounded up
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,      # channels at a time
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * COLS
    slot = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    part = _few_part(SPLIT, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()

    # the shared expert, for all rows
    chosen = row < R
    weight = tl.where(chosen, 1.0, 0.0)
    place = tl.full([ROWS], A, tl.int32)
    width = IS
    matrix = shared13
    if IS > 0:
        slot -= 1

    # or one that some row chose
    if w13 is not None:
        if IS == 0:
            matrix = w13
        if slot >= 0:
            expert = slot
            if not BY_EXPERT:
                pair = tl.arange(0, PAIRS)
                expert = tl.load(idx + slot)
                same = tl.load(idx + pair, mask=pair < R * A, other=-1) == expert
                if tl.min(tl.where(same, pair, PAIRS), 0) < slot:
                    expert = -2  # an earlier pair's program computes it
            chosen, place = _few_choice(idx, row, expert, R, A, CHOSEN)
            weight = tl.load(factor + row * A + place, mask=chosen, other=0.0)
            width = I
            matrix = w13 + tl.maximum(expert, 0).to(tl.int64) * (2 * I * C)

    if (tl.max(chosen.to(tl.int32), 0) > 0) & (first < width):
        col = tl.minimum(first + tl.arange(0, COLS), width - 1)
        gate = tl.zeros([SPLIT, COLS, ROWS], tl.float32)
        up = tl.zeros([SPLIT, COLS, ROWS], tl.float32)
        square = tl.zeros([SPLIT, BLOCK // SPLIT, ROWS], tl.float32)
        for c in range(0, C, BLOCK):
            channel = c + part
            rows = _few_rows(x, row * C, channel, chosen, C)
            gate = _few_dot(_few_columns(matrix, col * C, channel, C), rows, gate)
            up = _few_dot(_few_columns(matrix, (width + col) * C, channel, C), rows, up)
            wide = rows.to(tl.float32)
            square += wide * wide
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()  # after the wait: _few_down_kernel reads the choice before its own
        scale = _few_scale(square, C, EPS)[None]
        y, _, _ = _gate_tile(tl.sum(gate, 0) * scale, tl.sum(up, 0) * scale, OAI)   # [COLS, ROWS]
        y *= weight[None]
        real = chosen[None] & (first + tl.arange(0, COLS) < width)[:, None]
        at = row.to(tl.int64) * (A * I + IS) + place * I
        tl.store(h + at[None] + col[:, None], y.to(h.dtype.element_ty), mask=real)

# One program = ROWS rows and COLS columns, through the experts that some row chose, in their order, and the shared one.
@jit
def _few_down_kernel(
    h,         # (R, A * I + IS)
    w2,        # (E, C, I), or None
    shared2,   # (C, IS), or None
    idx,       # (R, A), or None
    residual,  # (R, C)
    out,       # (R, C), written
    R,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    EXPERTS: tl.constexpr,  # E, rounded up
    PAIRS: tl.constexpr,    # R * A, rounded up
    CHOSEN: tl.constexpr,   # A, rounded up
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,    # channels at a time
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * COLS
    col = tl.minimum(first + tl.arange(0, COLS), C - 1)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = _few_part(SPLIT, BLOCK)

    # the experts that its rows chose, in their order. The choice is whole: the kernel before let this one start after
    # its own wait
    if w2 is not None:
        pair = tl.arange(0, PAIRS)
        expert = tl.arange(0, EXPERTS)
        of_a_row = (pair < R * A) & (pair // A // ROWS == tl.program_id(1))
        chosen = tl.load(idx + pair, mask=of_a_row, other=0)
        count = tl.histogram(chosen, EXPERTS, mask=of_a_row)
        used = (count > 0).to(tl.int32)
        order = tl.cumsum(used, 0) * used                                           # [EXPERTS], from 1 on; 0: idle
    if PDL:
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros([SPLIT, COLS, ROWS], tl.float32)
    at = row.to(tl.int64) * (A * I + IS)
    if w2 is not None:
        pieces: tl.constexpr = (I + BLOCK - 1) // BLOCK
        for piece in range(0, tl.max(order, 0) * pieces):
            this = tl.sum(tl.where(order == piece // pieces + 1, expert, 0), 0)
            mine, place = _few_choice(idx, row, this, R, A, CHOSEN)
            channel = piece % pieces * BLOCK + part
            columns = _few_columns(w2, (this.to(tl.int64) * C + col) * I, channel, I)
            rows = _few_rows(h, at + place * I, channel, mine, I)
            acc = _few_dot(columns, rows, acc)
    if shared2 is not None:            # a loop of no turns is compiled, too
        for i in range(0, IS, BLOCK):
            columns = _few_columns(shared2, col * IS, i + part, IS)
            rows = _few_rows(h, at + A * I, i + part, row < R, IS)
            acc = _few_dot(columns, rows, acc)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    y = tl.sum(acc, 0)                                                              # [COLS, ROWS]
    at = row[None] * C + col[:, None]
    real = (row < R)[None] & (first + tl.arange(0, COLS) < C)[:, None]
    y += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=real)

MOST_GATE = 2 ** 17       # numbers of a gate that one program reads
GATE_EXPERTS = 4          # of a larger one, that a program scores
MOST_PROJECTED = 8192     # columns of a projection; the head has more, whose many programs find the memory busy
MOST_AHEAD = 2 ** 22      # numbers of a matrix that is brought to the L2 ahead of its kernel: 8 MB of its 50

def _few_tiles(name, R, K, N, x):
    """What a launch of few rows needs to know.

    name  "linear", "up" or "down"
    R     rows
    K     channels of a sum
    N     columns of all programs
    x     any of its tensors: says the device

    BLOCK and SPLIT decide the order of sums: they depend on the sizes of the matrix alone. The others were chosen from
    412 timings on an H200, of `small`'s kernels for 1, 4, 32 and 128 rows (RESULTS.md).
    """
    rows = 8 if R <= 8 else 16
    cols = 16
    block = 256
    split = 4
    stages = 4
    if not x.is_cuda:
        cols = 32                      # the interpreter is slow: few programs
    elif name == "linear" and N > MOST_PROJECTED and K < 2048:
        cols = 128
        block = 64
        split = 1
    elif name == "linear" and N * K > MOST_AHEAD and N > 4096:  # M2's heads and tables: 26 timings
        cols = 32
    elif name == "linear":
        cols = 32 if R > 8 and N > 1024 else 16
    elif name == "up":
        cols = 32
        stages = 3
    else:
        block = 512
    block = min(block, triton.next_power_of_2(max(K, 16 * split)))
    return dict(
        R=R,
        ROWS=rows,
        COLS=cols,
        BLOCK=block,
        SPLIT=split,
        num_warps=4,
        num_stages=stages,
        **_overlap(x, R))

def _inverse_rms(x, eps):
    """1 / rms of each row of x (..., C) -> (..., 1), fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.square().mean(-1, keepdim=True) + eps).rsqrt()

def few_linear(x, weight, eps=None, residual=None, dtype=None, impl="auto"):
    """[RMS norm], product, [+ residual] of few rows.

    x         (..., K)
    weight    (N, K), a norm's weight folded in: see `fold`
    eps       of the norm; None: there is no norm
    residual  (..., N)
    dtype     of the result; default: that of x
    impl      see use_triton
    -> (..., N)
    """
    dtype = dtype or x.dtype
    if not use_triton(impl, x):
        y = F.linear(x, weight)
        if eps is not None:
            y = y * _inverse_rms(x, eps)
        if residual is not None:
            y = y + residual
        return y.to(dtype)

    (N, K), R = weight.shape, x.numel() // x.size(-1)
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=dtype)
    tiles = _few_tiles("linear", R, K, N, x)
    grid = cdiv(N, tiles["COLS"]), cdiv(R, tiles["ROWS"])
    _few_linear_kernel[grid](
        x=x, weight=weight, residual=residual, out=out,
        N=N, K=K, EPS=eps,
        MOST=triton.next_power_of_2(tiles["COLS"] * K),
        AHEAD=N * K <= MOST_AHEAD,
        **tiles)
    return out

def few_route(x, weight, bias, n_active, scale, eps, impl="auto"):
    """RMS norm, router and choice of few rows: `route` of normed rows.

    x             (..., C)
    weight, bias  (E, C) with the norm's weight folded in, (E,): fp32 or wider
    n_active      A, experts a row
    scale         the sum of a row's weights
    eps           of the norm
    impl          see use_triton
    -> weights (..., A) in the dtype of weight, idx (..., A) int32, best first
    """
    lead = x.shape[:-1]
    E, C = weight.shape
    if not use_triton(impl, x):
        logits = few_linear(x.to(weight.dtype), weight, eps, impl="torch").view(-1, E)
        factor, idx = route(logits, bias, n_active, scale)
        return factor.view(*lead, n_active), idx.view(*lead, n_active).int()

    factor = torch.empty(*lead, n_active, device=x.device, dtype=weight.dtype)
    idx = torch.empty(*lead, n_active, device=x.device, dtype=torch.int32)
    R = x.numel() // C
    experts = triton.next_power_of_2(E)
    channels = triton.next_power_of_2(C)

    # one multiprocessor would read M2's gate, of 3 MB, for 90 microseconds: there many compute the logits
    logits = None
    if E * C > MOST_GATE:
        logits = torch.empty(R, E, device=x.device, dtype=weight.dtype)
        _few_logits_kernel[cdiv(E, GATE_EXPERTS), R](
            x=x, weight=weight, logits=logits,
            C=C, E=E, EPS=eps,
            EXPERTS=GATE_EXPERTS,
            BLOCK=min(channels, 1024),
            MOST=GATE_EXPERTS * channels,
            num_warps=4, **_overlap(x, R))
    _few_route_kernel[R,](
        x=x, weight=weight, logits=logits, bias=bias, factor=factor, idx=idx,
        C=C, E=E, A=n_active, SCALE=scale, EPS=eps,
        EXPERTS=experts,
        CHOSEN=triton.next_power_of_2(n_active),
        BLOCK=min(channels, max(16, 16384 // experts)),
        MOST=experts * channels,
        num_warps=8, **_overlap(x, R))
    return factor, idx

def few_mlp(x, eps, activation, shared=None, routed=None, factor=None, idx=None, impl="auto"):
    """RMS norm, experts, + x, of few rows: a dense layer is a shared expert alone.

    x           (..., C)
    eps         of the norm
    activation  see `gated`
    shared      w13 (2 IS, C) with the norm's weight folded in, w2 (C, IS); or None
    routed      w13 (E, 2 I, C), the same, w2 (E, C, I); or None
    factor      (..., A) a row's experts add up with these factors
    idx         (..., A) int32, a row's experts
    impl        see use_triton
    -> (..., C)
    """
    if not use_triton(impl, x):
        return _few_mlp_torch(x, eps, activation, shared, routed, factor, idx)
    C, R = x.size(-1), x.numel() // x.size(-1)
    shared13, shared2 = shared or (None, None)
    w13, w2 = routed or (None, None)
    IS = 0 if shared is None else shared2.size(1)
    E, I = (0, 0) if routed is None else (w2.size(0), w2.size(2))
    A = 0 if routed is None else idx.size(-1)
    h = torch.empty(R, A * I + IS, device=x.device, dtype=x.dtype)
    out = torch.empty_like(x)
    shared_sizes = dict(
        idx=idx, C=C, I=I, IS=IS, A=A,
        PAIRS=triton.next_power_of_2(max(32, R * A)),  # few values: each compiles
        CHOSEN=triton.next_power_of_2(max(1, A)))

    tiles = _few_tiles("up", R, C, 2 * max(I, IS), x)
    slots = (IS > 0) + min(E, R * A)
    _few_up_kernel[cdiv(max(I, IS), tiles["COLS"]), slots, cdiv(R, tiles["ROWS"])](
        x=x, w13=w13, shared13=shared13, factor=factor, h=h,
        EPS=eps, OAI=activation == "swiglu_oai", BY_EXPERT=E <= R * A, **shared_sizes, **tiles)

    tiles = _few_tiles("down", R, max(I, IS), C, x)
    _few_down_kernel[cdiv(C, tiles["COLS"]), cdiv(R, tiles["ROWS"])](
        h=h, w2=w2, shared2=shared2, residual=x, out=out,
        EXPERTS=triton.next_power_of_2(max(2, E)), **shared_sizes, **tiles)
    return out

def _few_mlp_torch(x, eps, activation, shared, routed, factor, idx):
    """few_mlp, row by row and expert by expert: the specification."""
    rows = x.flatten(0, -2)
    normed = (rows * _inverse_rms(rows, eps)).to(x.dtype)
    y = torch.zeros_like(rows)
    if routed is not None:
        A = idx.size(-1)
        y = experts_loop(normed, *routed, factor.view(-1, A), idx.view(-1, A), activation)
    if shared is not None:
        w13, w2 = shared
        y = y + gated(normed @ w13.T, activation) @ w2.T
    return (rows + y).view_as(x)
