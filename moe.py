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
expert and runs one grouped matrix product, with no host synchronisation, `gated` in between as one Triton kernel.
"""
from __future__ import annotations  # without Triton, tl.constexpr in a kernel's signature is no name

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from msa import jit, tl, triton

def best(x, n):
    """The n largest of each row of x (T, E), finite, best first, ties by the lowest -> indices (T, n) int64.
    torch.compile makes one kernel of n times argmax, where it leaves the kernels of topk or sort as they are."""
    if not torch.compiler.is_compiling():
        return x.sort(dim=-1, descending=True, stable=True).indices[:, :n].contiguous()
    found, at = [], torch.arange(x.size(-1), device=x.device)
    for _ in range(n):
        found.append(x.argmax(-1, keepdim=True))
        x = torch.where(at == found[-1], float("-inf"), x)
    return torch.cat(found, -1)

def route(logits, bias, n_active, scale=1.0, idx=None):
    """Choose experts. logits (T, E) fp32 or wider, bias (E,) -> weights (T, A) that sum to `scale`, idx (T, A) int64.
    A recorded idx replaces the choice, not the weights. M2 report section 2 (sigmoid gate), DeepSeek-V3 eq. 16 (bias in
    the top-k only). Raises if n_active > E."""
    assert n_active <= logits.size(-1), f"cannot choose {n_active} of {logits.size(-1)} experts"
    scores = logits.sigmoid()
    # Why not weigh by the biased score? With bias +10 on one expert its weight would be > 0.9 for every token:
    # a knob for load would rewrite the output.
    if idx is None:
        idx = best(scores + bias, n_active)                                                               # (T, A)
    weights = scores.gather(-1, idx)
    return scale * weights / weights.sum(-1, keepdim=True), idx

def gated(h, activation, weight=None, impl="auto"):
    """[gate | up] (n, 2I) -> (n, I), times weight (n, 1). "swiglu": silu(gate) * up (M2). "swiglu_oai": clamped, with
    up + 1 (M3). impl: auto (Triton on a GPU in 16 bits: forward and backward read and write each number once), triton
    or torch."""
    if impl == "triton" or (impl == "auto" and triton and h.is_cuda and h.dtype.itemsize == 2):
        return _Gated.apply(h, weight, activation)
    gate, up = h.chunk(2, dim=-1)
    if activation == "swiglu":
        y = F.silu(gate) * up
    else:  # (up + 1) * gate * sigmoid(1.702 * gate) with gate <= 7 and |up| <= 7, in the fewest passes over memory
        swish = F.silu(1.702 * gate.clamp(max=7.0)) * (1 / 1.702)
        y = torch.addcmul(swish, swish, up.clamp(-7.0, 7.0))
    return y if weight is None else y * weight.to(h.dtype)

@jit
def _gate(gate, up, OAI: tl.constexpr):
    """The product, and its slopes in gate and in up, in fp32."""
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if OAI:
        both: tl.constexpr = tl.PropagateNan.ALL  # else a GPU takes the smaller of NaN and 7 to be 7
        g = tl.minimum(gate, 7.0, both)
        u = tl.clamp(up, -7.0, 7.0, both) + 1
        s = 1 / (1 + tl.exp(-1.702 * g))
        slope = tl.where(gate <= 7.0, u * s * (1 + 1.702 * g * (1 - s)), 0.0)
        return u * g * s, slope, tl.where(tl.abs(up) <= 7.0, g * s, 0.0)
    s = 1 / (1 + tl.exp(-gate))
    return up * gate * s, up * s * (1 + gate * (1 - s)), gate * s

# One program = ROWS rows: what passes the gate.
@jit
def _gated_kernel(h, weight, out, n, I: tl.constexpr, OAI: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    held, at = (r < n)[:, None] & (c < I), r[:, None] * (2 * I) + c
    y, _, _ = _gate(tl.load(h + at, mask=held, other=0.0), tl.load(h + at + I, mask=held, other=0.0), OAI)
    if weight is not None:
        y *= tl.load(weight + r, mask=r < n, other=0.0)[:, None]
    tl.store(out + r[:, None] * I + c, y.to(out.dtype.element_ty), mask=held)

# One program = ROWS rows: the gradients of gate and up, and of the rows' weights.
@jit
def _gated_grad_kernel(h, weight, grad, dh, dweight, n, I: tl.constexpr, OAI: tl.constexpr, ROWS: tl.constexpr,
                       COLS: tl.constexpr):
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    held, at = (r < n)[:, None] & (c < I), r[:, None] * (2 * I) + c
    y, dgate, dup = _gate(tl.load(h + at, mask=held, other=0.0), tl.load(h + at + I, mask=held, other=0.0), OAI)
    dy = tl.load(grad + r[:, None] * I + c, mask=held, other=0.0).to(tl.float32)
    if weight is not None:
        tl.store(dweight + r, tl.sum(dy * y, 1), mask=r < n)
        dy *= tl.load(weight + r, mask=r < n, other=0.0)[:, None]
    tl.store(dh + at, (dy * dgate).to(dh.dtype.element_ty), mask=held)
    tl.store(dh + at + I, (dy * dup).to(dh.dtype.element_ty), mask=held)

class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, activation):
        I = h.size(-1) // 2
        cols = triton.next_power_of_2(I)
        ctx.tile = I, activation == "swiglu_oai", max(1, 2048 // cols), cols
        ctx.save_for_backward(h, weight)
        out = h.new_empty(*h.shape[:-1], I)
        n = out.numel() // I
        _gated_kernel[triton.cdiv(n, ctx.tile[2]),](h, weight, out, n, *ctx.tile, num_warps=4 if cols < 4096 else 8)
        return out

    @staticmethod
    def backward(ctx, grad):
        (h, weight), (I, _, rows, cols), dh = ctx.saved_tensors, ctx.tile, torch.empty_like(ctx.saved_tensors[0])
        dweight, n = None if weight is None else torch.empty_like(weight), h.numel() // (2 * I)
        _gated_grad_kernel[triton.cdiv(n, rows),](h, weight, grad.contiguous(), dh, dweight, n, *ctx.tile,
                                                  num_warps=4 if cols < 4096 else 8)
        return dh, dweight, None

def experts_loop(x, w13, w2, weights, idx, activation):
    """Every expert in turn, on the tokens that chose it: the specification, and the path for fp64.
    x (T, C), w13 (E, 2I, C), w2 (E, C, I), weights and idx (T, A) -> (T, C)."""
    y = torch.zeros_like(x)
    for e in range(w13.size(0)):
        token, slot = (idx == e).nonzero(as_tuple=True)
        out = gated(x[token] @ w13[e].T, activation) @ w2[e].T
        y = y.index_add(0, token, out * weights[token, slot, None].to(x.dtype))
    return y

class _Rows(torch.autograd.Function):
    """x[index] of which every row of x appears n times, `back` its places: the gradient is gathered and summed over n.
    Indexing's own gradient adds rows by atomics on a GPU: slower, and two runs differ in the last bit."""

    @staticmethod
    def forward(ctx, x, index, back, n):
        ctx.save_for_backward(back)
        ctx.n = n
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, *ctx.saved_tensors)
        return grad if ctx.n == 1 else grad.view(-1, ctx.n, grad.size(1)).sum(1), None, None, None

def experts_grouped(x, w13, w2, weights, idx, activation):
    """The same, with tokens sorted by expert: contiguous groups of one matrix product. Shapes as in `experts_loop`."""
    (T, C), A = x.shape, idx.size(1)
    small = torch.uint8 if w13.size(0) <= 256 else torch.int32  # a GPU sorts bytes in an eighth of the passes
    sorted_e, order = idx.flatten().to(small).sort(stable=True)                                           # (T*A,)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    experts = torch.arange(w13.size(0), dtype=torch.int32, device=x.device)
    ends = torch.searchsorted(sorted_e.int(), experts, right=True).int()                                  # (E,)
    rows = _Rows.apply(x, order // A, inverse, A)
    # weighted before w2 and not after: a row's I channels are fewer than its C
    by_row = _Rows.apply(weights.reshape(-1, 1), order, inverse, 1)
    h = gated(F.grouped_mm(rows, w13.transpose(1, 2), offs=ends), activation, by_row)
    out = F.grouped_mm(h, w2.transpose(1, 2), offs=ends)
    return _Rows.apply(out, inverse, order, 1).view(T, A, C).sum(1)

def pick_experts(dtype):
    """The function that runs experts in this dtype: grouped_mm has no fp64 kernel."""
    return experts_loop if dtype == torch.float64 else experts_grouped

class Linear(nn.Linear):
    """Weights stay in the dtype they are trained in and are cast to the activations' where they are used."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

class MLP(nn.Module):
    """Gated feed-forward layer: M3's dense layers and its shared expert."""

    def __init__(self, n_embd, dim, activation):
        super().__init__()
        self.activation = activation
        self.w13 = Linear(n_embd, 2 * dim, bias=False)
        self.w2 = Linear(dim, n_embd, bias=False)

    def forward(self, x, weight=None, replay=None):
        """x (B, T, C) -> y (B, T, C), aux {}. weight and replay are what MoE takes: a dense layer has no choice."""
        return self.w2(gated(self.w13(x), self.activation)), {}

def _terms(x):
    """x in fp32, 0 or over 2^-110 -> three terms in bf16 with the same sum: 8 bits each of its 24."""
    def head(y):  # cut, not rounded by .bfloat16(): torch.compile leaves out that rounding, and y - head(y) would be 0
        return (y.view(torch.int32) & -2 ** 16).view(torch.float32)
    a = head(x)
    b = head(x - a)
    return a.bfloat16(), b.bfloat16(), (x - a - b).bfloat16()

class _WideGate(torch.autograd.Function):
    """x (n, C) bf16, W (E, C) fp32 -> x W^T in fp32, on tensor cores and without a copy of x in fp32: products of two
    bf16 numbers are exact in fp32, and sums are fp32. bmm and not mm, whose out_dtype torch.compile may not know."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return torch.bmm(x[None], torch.cat(_terms(W)).T[None], out_dtype=W.dtype)[0].unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx, grad):
        (x, W), (a, b, c) = ctx.saved_tensors, _terms(grad)
        u, v, _ = _terms(W)
        dx = torch.cat([a, a, b], 1) @ torch.cat([u, v, u])  # 16 of 24 bits: what is left is rounded to bf16
        parts = math.gcd(len(x), 64)  # the sum over tokens, in so many parts: one would keep six multiprocessors busy
        left, right = (y.unflatten(0, (parts, -1)) for y in (torch.cat([a, b, c], 1), x))
        dW = torch.bmm(left.transpose(1, 2), right, out_dtype=W.dtype).sum(0)                               # (3 E, C)
        return dx, dW.unflatten(0, (3, -1)).sum(0)

class Router(nn.Module):
    """Gate and bias. Both stay in fp32 when the model moves to bf16: near-ties in s + b would flip the choice."""

    def __init__(self, n_embd, n_expert):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_embd))
        self.register_buffer("bias", torch.zeros(n_expert))

    def _apply(self, fn, recurse=True):
        def at_least_fp32(t):  # .to(bfloat16).float() would come back rounded: keep the values, take the device
            out = fn(t)
            return out if out.dtype.itemsize >= 4 else t.to(out.device)
        return super()._apply(at_least_fp32, recurse)

    def forward(self, x):
        # in training alone: for the few tokens of a decoding step, splitting the weight would be most of the work
        if torch.is_grad_enabled() and x.is_cuda and x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32:
            return _WideGate.apply(x, self.weight)
        return F.linear(x.to(self.weight.dtype), self.weight)

class MoE(nn.Module):
    """Router, E routed experts, and a shared one where cfg.shared_dim > 0."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
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

        experts = pick_experts(x.dtype)
        y = experts(flat, self.w13.to(x.dtype), self.w2.to(x.dtype), weights, idx, cfg.activation)
        y = y.view_as(x)
        if self.shared is not None:
            shared, _ = self.shared(x)
            y = y + shared

        # whole numbers: the sum is exact in any order, atomics included
        count = flat.new_ones(B * T) if weight is None else weight.flatten()
        count = count.float()[:, None].expand_as(idx)
        load = torch.zeros(cfg.n_expert, device=x.device).index_add(0, idx.flatten(), count.flatten())
        return y, dict(expert_load=load, experts=idx.view(B, T, -1))

def count_params(module):
    """Parameters and router biases: all, and those that one token uses."""
    moes = [m for m in module.modules() if isinstance(m, MoE)]
    total = sum(t.numel() for t in [*module.parameters(), *(m.router.bias for m in moes)])
    idle = [(m.w13[0].numel() + m.w2[0].numel()) * (m.cfg.n_expert - m.cfg.n_expert_per_tok) for m in moes]
    return total, total - sum(idle)

@torch.no_grad()
def update_bias(bias, load, rate):
    """b += rate * sign(mean load - load), in place, after the optimizer step (arXiv 2408.15664, algorithm 1)."""
    bias += rate * (load.mean() - load).sign()

def max_violation(load):
    """MaxVio of load (…, E): how far the busiest expert is above the mean; 0 = balanced, E - 1 = one takes all."""
    return load.amax(-1) / load.mean(-1) - 1

