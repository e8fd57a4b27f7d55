"""MiniMax Sparse Attention (MSA, arXiv 2606.13392): a query reads S blocks of L keys that a light index branch chose.

    keys     |  block 0 |  block 1 |  block 2 |  block 3 |  block 4 |     one row = one query of one key/value head
    query i  |  ######  |          |          |  ######  |  ###     |  S = 3: two blocks chosen, its own always there

    score[i, j]  = qi[i] . ki[j]                                one index head per KV head, one shared index key
    block score  = max over the visible tokens of the block
    block_idx[i] = own block, then the top S-1 earlier blocks   ties: lowest block id; -1 where there are fewer
    out[i]       = softmax(q[i] . k / sqrt(D)) v                exact, over the tokens of those blocks alone
    KL(mean over the group's heads of the main softmax || index softmax)  is all that ever trains qi and ki

Cost per token: the index reads T keys of one head, the attention S * L keys of Hkv heads; full attention T of Hkv.
At T <= S * L every visible block is chosen and MSA is full attention.

One visibility rule everywhere: key j is visible to query i iff j <= i < end[j]. `end` (B, Tk) is the end of the
document, or of the subtree in a prefix tree laid out depth first; None is plain causal. With a cache, keys are slots
0 … Tk-1 and the first query has index start (B,): T queries see Tk >= T keys. Layout (B, T, H, D) throughout.

Differs from the paper: scores are ranked without their 1/sqrt(D), which changes no ranking; the KL applies it.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def chunk(device):
    """Elements of the largest temporary: index branch and MSA take queries in chunks and never hold a T x T matrix."""
    return 1 << 24 if device.type == "cpu" else 1 << 29


def query_index(T, start, device):
    """Layout index i of each query: (1, T), or (B, T) where start (B,) is given."""
    i = torch.arange(T, device=device)[None]
    return i if start is None else i + start[:, None]


def visible(i, j, end):
    """j <= i < end[j] for queries i (B, T) and keys j (Tk,): bool (B, T, Tk)."""
    seen = j <= i[..., None]
    if end is None:
        return seen
    return seen & (i[..., None] < F.pad(end, (0, j.numel() - end.size(1)))[:, None])  # a cache may hold spare slots


def full_attention(q, k, v, end=None, start=None):
    """Softmax attention over every visible key. q (B, T, H, D), k and v (B, Tk, Hkv, D) -> (B, T, H, D)."""
    T, Tk = q.size(1), k.size(1)
    mask = None
    if end is not None or start is not None:
        i, j = query_index(T, start, q.device), torch.arange(Tk, device=q.device)
        mask = visible(i, j, end)[:, None]                                                              # (B, 1, T, Tk)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                         is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def index_scores(qi, ki, i, end):
    """qi (B, T, Hkv, D) . ki (B, Tk, D), -inf where invisible, fp32 or wider: (B, T, Hkv, Tk)."""
    dtype = torch.promote_types(qi.dtype, torch.float32)
    scores = (qi.flatten(1, 2).to(dtype) @ ki.to(dtype).transpose(1, 2)).unflatten(1, qi.shape[1:3])
    seen = visible(i, torch.arange(ki.size(1), device=ki.device), end)
    return scores.masked_fill(~seen[:, :, None], float("-inf"))


def block_max(scores, L):
    """Block scores: max over each L of the last axis, (…, Tk) -> (…, N)."""
    return F.pad(scores, (0, -scores.size(-1) % L), value=float("-inf")).unflatten(-1, (-1, L)).amax(-1)


def top_blocks(scores, own, S):
    """Block scores (B, T, Hkv, N), own block (B, T) -> int32 (B, T, Hkv, S): own, then by descending score, then -1."""
    scores = scores.scatter(-1, own[:, :, None, None].expand(*scores.shape[:3], 1), float("inf"))
    # A stable sort, not topk: [1., 1., 0.] must give block 0 before block 1, and topk promises no order among ties.
    value, block = scores.sort(dim=-1, descending=True, stable=True)
    block = block.masked_fill(value == float("-inf"), -1)[..., :S]
    return F.pad(block, (0, S - block.size(-1)), value=-1).int()


@torch.no_grad()
def select_blocks(qi, ki, S, L, end=None, start=None):
    """The index branch's choice (paper eq. 5-7). qi (B, T, Hkv, D), ki (B, Tk, D) -> block_idx int32 (B, T, Hkv, S).
    Slot 0 is the query's own block; -1 fills rows with fewer than S visible blocks."""
    (B, T, Hkv, _), Tk = qi.shape, ki.size(1)
    i = query_index(T, start, qi.device)
    step = max(1, chunk(qi.device) // (B * Hkv * Tk))
    return torch.cat([top_blocks(block_max(index_scores(qi[:, t:t + step], ki, i[:, t:t + step], end), L),
                                 (i[:, t:t + step] // L).expand(B, -1), S) for t in range(0, T, step)], 1)


def gather_blocks(x, block_idx, L):
    """Copy out the chosen blocks. x (B, Tk, Hkv, D), block_idx (B, T, Hkv, S) -> (B, T, Hkv, S*L, D).
    A block of -1 yields block 0 and a last partial block zeros; `selected` says which keys count."""
    (B, Tk, Hkv, D), (T, S), N = x.shape, block_idx.shape[1::2], -(-x.size(1) // L)
    x = (F.pad(x, (0, 0, 0, 0, 0, N * L - Tk)) if Tk % L else x).unflatten(1, (N, L))                # (B, N, L, Hkv, D)
    block, batch, head = block_idx.clamp(min=0), torch.arange(B, device=x.device), torch.arange(Hkv, device=x.device)
    if T * S < N:  # decode: the few blocks alone; the copy into block order below would read the whole cache
        return x[batch.view(B, 1, 1, 1), block.long(), :, head.view(Hkv, 1)].flatten(3, 4)
    rows = (block + (batch[:, None] * Hkv + head)[:, None, :, None] * N).flatten()
    return x.permute(0, 3, 1, 2, 4).reshape(B * Hkv * N, L * D).index_select(0, rows).view(B, T, Hkv, S * L, D)


def selected(block_idx, i, L, end):
    """Which gathered keys a query sees: bool (B, T, Hkv, S*L)."""
    j = (block_idx[..., None] * L + torch.arange(L, device=block_idx.device)).flatten(-2)
    seen = (j >= 0) & (j <= i[..., None, None])
    if end is None:
        return seen
    j = j.clamp(0, end.size(1) - 1).long()
    return seen & (i[..., None, None] < end.gather(1, j.flatten(1)).view(j.shape))


def group_probs(q, keys, seen):
    """Main softmax, head by head: q (B, T, H, D), keys (B, T, Hkv, J, D), seen (B, T, Hkv, J) -> (B, T, Hkv, G, J)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide).unflatten(2, (keys.size(2), -1)).transpose(-1, -2)                                # (B, T, Hkv, D, G)
    # keys @ q, not q @ keys^T: the gradient of the gathered keys, the largest tensor here, needs no transposed copy
    scores = (keys.to(wide) @ q).transpose(-1, -2) * q.size(-2) ** -0.5
    return scores.masked_fill(~seen[..., None, :], float("-inf")).softmax(-1)


def msa_attention(q, k, v, block_idx, L, end=None, start=None):
    """Exact attention over the chosen blocks (paper eq. 8): time and memory grow with T * S * L, never with T * T.
    q (B, T, H, D), k and v (B, Tk, Hkv, D), block_idx (B, T, Hkv, S) -> (B, T, H, D)."""
    (B, T, H, D), (Hkv, S) = q.shape, block_idx.shape[2:]
    assert k.size(2) == Hkv and H % Hkv == 0, f"{H} heads, {k.size(2)} KV heads, a selection for {Hkv}"
    def attend(q, i, blocks, k, v):
        p = group_probs(q, gather_blocks(k, blocks, L), selected(blocks, i, L, end))
        return (p.to(v.dtype) @ gather_blocks(v, blocks, L)).flatten(2, 3)                                # (B, t, H, D)
    i, step = query_index(T, start, q.device), max(1, chunk(q.device) // (B * Hkv * S * L * D))
    if T <= step:
        return attend(q, i, block_idx, k, v)
    # the gathered blocks of all chunks are S * L / G times the size of q: the backward pass gathers them again
    return torch.cat([checkpoint(attend, q[:, t:t + step], i[:, t:t + step], block_idx[:, t:t + step], k, v,
                                 use_reentrant=False) for t in range(0, T, step)], 1)


def msa_decode(q, k, v, qi, ki, S, L, length, end=None):
    """One decode step: choose blocks, attend. q (B, 1, H, D) and qi (B, 1, Hkv, D) are the new token's, at slot length
    (B,); k, v (B, Tk, Hkv, D) and ki (B, Tk, D) hold it too -> out (B, 1, H, D), block_idx (B, 1, Hkv, S)."""
    block_idx = select_blocks(qi, ki, S, L, end, length)
    return msa_attention(q, k, v, block_idx, L, end, length), block_idx


class _IndexKL(torch.autograd.Function):
    """KL and its gradient in one pass: d KL / d score = (index softmax - teacher) * weight / (Hkv * sum of weights)."""

    @staticmethod
    def forward(ctx, qi, ki, q, k, block_idx, L, end, weight, stride):
        (B, T, Hkv, D), Tk = qi.shape, ki.size(1)
        weight = torch.ones(B, T, device=q.device) if weight is None else weight
        share = weight.to(torch.promote_types(q.dtype, torch.float32))                                    # (B, T)
        share = share / (share[:, stride - 1::stride].sum().clamp(min=1e-30) * Hkv)
        i, dqi, dki = query_index(T, None, q.device), torch.zeros_like(qi), torch.zeros_like(ki)
        loss = share.new_zeros(())
        width = Tk if block_idx is None else block_idx.size(-1) * L * D
        step = stride * max(1, chunk(q.device) // (B * q.size(2) * width))
        for t in range(0, T, step):
            c = slice(t + stride - 1, t + step, stride)
            blocks = None if block_idx is None else block_idx[:, c]
            part = _kl_prefix if blocks is None else _kl_selected
            kl, dqi[:, c], dk = part(qi[:, c], ki, q[:, c], k, blocks, L, i[:, c], end, share[:, c])
            loss, dki = loss + kl, dki + dk
        ctx.save_for_backward(dqi, dki)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dqi, dki = ctx.saved_tensors
        return (grad * dqi).to(dqi.dtype), (grad * dki).to(dki.dtype), *[None] * 7


def _kl_terms(p, scores, seen, share):
    """Teacher p, scaled index scores (B, t, Hkv, J), share (B, t) -> weighted KL (scalar), d KL / d scores."""
    logp = scores.masked_fill(~seen, float("-inf")).log_softmax(-1)
    kl = torch.where(p > 0, p * (p.log() - logp), 0.0).sum(-1)  # p = 0 gives 0 * inf where a key is invisible
    return (kl * share[..., None]).sum(), (logp.exp() - p) * share[..., None, None]


def _kl_selected(qi, ki, q, k, blocks, L, i, end, share):
    """Support = the tokens of the chosen blocks (paper eq. 9-10)."""
    B, t, Hkv, D = qi.shape
    seen = selected(blocks, i, L, end)
    p = group_probs(q, gather_blocks(k, blocks, L), seen).mean(3)
    keys = gather_blocks(ki[:, :, None].expand(-1, -1, Hkv, -1), blocks, L)                          # (B, t, Hkv, J, D)
    scores = (keys.to(p.dtype) @ qi.to(p.dtype)[..., None]).squeeze(-1) * D ** -0.5
    kl, ds = _kl_terms(p, scores, seen, share)
    ds = (ds * D ** -0.5).to(qi.dtype)
    dqi = (ds[..., None, :] @ keys).squeeze(-2)
    N = -(-ki.size(1) // L)
    rows = (blocks.clamp(min=0) + torch.arange(B, device=q.device).view(B, 1, 1, 1) * N).flatten()        # (B*t*Hkv*S,)
    dkeys = (ds[..., None] * qi[..., None, :]).reshape(rows.numel(), L * D)
    dki = dkeys.new_zeros(B * N, L * D).index_add_(0, rows, dkeys).view(B, N * L, D)[:, :ki.size(1)]
    return kl, dqi, dki


def _kl_prefix(qi, ki, q, k, blocks, L, i, end, share):
    """Support = the whole visible prefix: the warm-up, before anything is selected."""
    D, Hkv = qi.size(-1), qi.size(2)
    seen = visible(i, torch.arange(ki.size(1), device=ki.device), end)[:, :, None]                       # (B, t, 1, Tk)
    p = prefix_probs(q, k, seen)
    scores = torch.einsum("bthd,bkd->bthk", qi.to(p.dtype), ki.to(p.dtype)) * D ** -0.5
    kl, ds = _kl_terms(p, scores, seen, share)
    ds = (ds * D ** -0.5).to(qi.dtype)
    return kl, torch.einsum("bthk,bkd->bthd", ds, ki), torch.einsum("bthk,bthd->bkd", ds, qi)


def prefix_probs(q, k, seen):
    """Mean over the group's heads of the full softmax. q (B, T, H, D), k (B, Tk, Hkv, D), seen (B, T, 1, Tk) ->
    (B, T, Hkv, Tk), fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide).unflatten(2, (k.size(2), -1)).permute(0, 2, 3, 1, 4)                              # (B, Hkv, G, T, D)
    scores = q @ k.to(wide).permute(0, 2, 3, 1)[:, :, None] * q.size(-1) ** -0.5                    # (B, Hkv, G, T, Tk)
    return scores.masked_fill(~seen[:, None, None, :, 0], float("-inf")).softmax(-1).mean(2).transpose(1, 2)


def index_kl_loss(qi, ki, q, k, block_idx=None, L=1, end=None, weight=None, stride=1):
    """KL(teacher || index softmax), mean over tokens (by weight (B, T)) and KV heads: a scalar with its real value.
    Teacher: mean over the group's heads of the main softmax, detached. Support: the chosen blocks, or the whole visible
    prefix where block_idx is None. qi (B, T, Hkv, D), ki (B, T, D), q (B, T, H, D), k (B, T, Hkv, D). Gradient: qi, ki
    alone. stride > 1 takes the mean over every stride-th query."""
    return _IndexKL.apply(qi, ki, q.detach(), k.detach(), block_idx, L, end, weight, stride)


@torch.no_grad()
def block_recall(qi, ki, q, k, S, L, end=None, n_query=256):
    """Share of the S-1 heaviest earlier blocks (group-mean mass of the dense softmax) that the index branch finds, and
    what a random choice would, on about n_query evenly spaced queries that have more than S earlier blocks (paper 5.2).
    -> recall, chance: scalars, nan where there is no such query."""
    T = q.size(1)
    rows = torch.arange(T - 1, -1, -max(1, T // n_query), device=q.device).flip(0)
    i = rows[None]
    seen = visible(i, torch.arange(T, device=q.device), end)[:, :, None]
    mass = prefix_probs(q[:, rows], k, seen)
    mass = F.pad(mass, (0, -T % L)).unflatten(-1, (-1, L)).sum(-1)                                      # (B, t, Hkv, N)
    scores = block_max(index_scores(qi[:, rows], ki, i, end), L)
    own = (i // L)[..., None, None]
    hidden = (scores == float("-inf")) | (torch.arange(mass.size(-1), device=q.device) == own)
    n_earlier = (~hidden).sum(-1)
    true, found = (x.masked_fill(hidden, -1e30).topk(min(S - 1, x.size(-1)), -1).indices for x in (mass, scores))
    hits = (true[..., :, None] == found[..., None, :]).any(-1).float().mean(-1)                           # (B, t, Hkv)
    counts = n_earlier > S
    return hits[counts].mean(), ((S - 1) / n_earlier[counts]).mean()


class KVCache:
    """Keys, values and index keys of every layer and every MTP module, in static buffers; slot = position on the path.
    `length` (B,) int32 lives on the device; `used`, a bound on it that the host knows, spares reading it back."""

    def __init__(self, cfg, batch, capacity, device="cpu", dtype=torch.float32):
        lanes, self.L = cfg.n_layer + cfg.n_mtp, cfg.index_block_size
        self.capacity = -(-capacity // self.L) * self.L  # whole key blocks, which gather_blocks can read in place
        size = (lanes, batch, self.capacity, cfg.n_kv_head, cfg.head_dim)
        self.k, self.v = (torch.zeros(size, device=device, dtype=dtype) for _ in range(2))
        self.ki = torch.zeros(*size[:3], cfg.index_head_dim, device=device, dtype=dtype)
        self.length, self.used = torch.zeros(batch, dtype=torch.int32, device=device), 0

    def append(self, layer, k, v, ki):
        """Write k, v (B, T, Hkv, D) and ki (B, T, D), or None, from slot `length` on -> what the layer now holds, up to
        a whole key block. `advance` moves `length` once all layers have written."""
        T = k.size(1)
        assert self.used + T <= self.capacity, f"{self.used} + {T} tokens do not fit a cache of {self.capacity}"
        slot = (self.length[:, None] + torch.arange(T, device=k.device)).long()                           # (B, T)
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        for lane, new in ((self.k, k), (self.v, v), (self.ki, ki)):
            if new is not None:
                lane[layer].index_put_((rows, slot), new)
        held = -(-(self.used + T) // self.L) * self.L  # spare slots are invisible: no query has their index
        return tuple(lane[layer, :, :held] for lane in (self.k, self.v, self.ki))

    def advance(self, T):
        self.length, self.used = self.length + T, self.used + T

    def crop(self, length):
        """Forget every slot from `length` on: an int, or a tensor (B,), which is read back."""
        self.length = torch.minimum(self.length, torch.as_tensor(length, dtype=torch.int32, device=self.length.device))
        self.used = min(self.used, length) if isinstance(length, int) else int(self.length.max())

    def expand(self, n):
        """n copies of every row, side by side: a group that shares its prompt."""
        self.select(torch.arange(self.length.size(0), device=self.length.device).repeat_interleave(n))

    def select(self, rows):
        """Keep these rows (int64), in this order."""
        self.k, self.v, self.ki = self.k[:, rows], self.v[:, rows], self.ki[:, rows]
        self.length = self.length[rows]
