"""MiniMax Sparse Attention (MSA, arXiv 2606.13392): a query reads S blocks of L keys that a light index branch chose.

    keys     |  block 0 |  block 1 |  block 2 |  block 3 |  block 4 |     one row = one query of one key/value head
    query i  |  ######  |          |          |  ######  |  ###     |  S = 3: two blocks chosen, its own always there

    block score  = max over its visible tokens of qi[i] . ki[j]   one index head per KV head, one shared index key
    block_idx[i] = own block, then the top S-1 earlier blocks     ties: lowest block id; -1 where there are fewer
    out[i]       = softmax(q[i] . k / sqrt(D)) v                  exact, over the tokens of those blocks alone
    KL(mean over the group's heads of the main softmax || index softmax)  is all that ever trains qi and ki

Cost per token: the index reads T keys of one head, the attention S * L keys of Hkv heads; full attention T of Hkv.
At T <= S * L every visible block is chosen and MSA is full attention.
One visibility rule everywhere: key j is visible to query i iff j <= i < end[j]. `end` (B, Tk) is the end of the
document, or of the subtree in a prefix tree laid out depth first; None is plain causal. With a cache, keys are slots
0 … Tk-1 and the first query has index start (B,): T queries see Tk >= T keys. Layout (B, T, H, D) throughout.
A query that sees no key gives 0 and no gradient. A NaN or inf in q, k or v reaches only the queries that see it, with
one exception: on a GPU, in full attention, _kv_outer_kernel and _dense_kernel, one in v may reach other queries of its
tile (0 * NaN). An index score of NaN ranks as -inf.

The file, in reading order. Section A, in torch, is the whole specification; the others are the same in Triton.
    A  the spec             full_attention, select_blocks, msa_attention, msa_decode, index_kl_loss, msa_train
    B  tile helpers         the softmax of a tile, and how two are merged
    C  prefill              _index_kernel; _query_outer_kernel, or _kv_outer_kernel and _combine_kernel
    D  training             _index_lse_kernel, _index_kl_kernel, _backward_kernel, and sums without atomics
    E  decode               _scan_kernel, _attend_kernel; _dense_kernel and _dense_sum_kernel for full attention
    F  certified int8       quantize_index, _rescore_kernel: the exact choice from half the bytes

Differs from the paper: scores are ranked without their 1/sqrt(D), which changes no ranking; the KL applies it.
Certified int8 decode is ours.
"""
from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton on macOS: the torch half is complete
    triton = tl = TensorDescriptor = None

jit = triton.jit if triton else lambda kernel: kernel
constexpr = tl.constexpr if triton else lambda value: value  # a kernel reads no other global
_compiled = functools.cache(torch.compile)

# ==== A. The spec =================================================================================
#
# Everything here runs on any device and in any precision, and has gradients where its docstring says so. A layer calls
#     full_attention   softmax over every visible key, for layers that are not sparse
#     select_blocks    block_scores, then top_blocks: the choice, which has no gradient
#                      block_candidates, then merge_candidates: the same where each rank has some of the keys
#     msa_attention    gather_blocks copies the chosen keys and values out; group_probs is the softmax over them
#     msa_decode       both for a step of generation
#     msa_train        both for a step of training: msa_attention, and index_kl_loss for the index branch
#     block_recall     how much of the attention's mass the index branch finds
# Queries are taken in chunks, so that no T x T matrix is ever held. Public functions that have kernels take impl:
# "auto" is Triton on a GPU where it fits (_misfit says why not), "torch" is the code here, "triton" insists. The
# arguments are the same, and so is the result, up to rounding.

# On a CPU gathered keys are slow: each query multiplies copies of its own, which only its G heads share. While Tk G is
# no more than so many times S L, a mask over all keys is faster. On two cores of an EPYC equal times are at about 70
# (G = 2, with gradients 200), 220 (G = 6) and 190 (G = 16)
SHORT = 96
FEW_QUERIES = 16          # a step of generation has fewer: they gather
SEEN_STEP = 256           # queries of a long tree that are computed at once, over the keys that they see

def chunk(device):
    """Elements of the largest temporary tensor that a chunk of queries may need."""
    return 1 << 24 if device.type == "cpu" else 1 << 29

def cdiv(n, size):
    """n / size, rounded up."""
    return -(-n // size)

def round_up(n, multiple):
    return cdiv(n, multiple) * multiple

def widen(x):
    """x in fp32; what is wider already stays as it is."""
    if x.dtype == torch.float32:  # the usual case, of which a decoding step on a CPU has a hundred
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))

def all_finite(*tensors):
    return all(x.isfinite().all() for x in tensors)

def query_index(T, start, device):
    """Index i of each query in its row, or slot in the cache: (1, T), or (B, T) where start is (B,)."""
    if isinstance(start, int):
        return torch.arange(start, start + T, device=device)[None]
    i = torch.arange(T, device=device)[None]
    return i if start is None else i + start[:, None]

def starts(start, x):
    """start as kernels take it, for queries x (B, T, …): None, or (B,) int32."""
    if start is None:
        return None
    if isinstance(start, int):
        return torch.full((len(x),), start, dtype=torch.int32, device=x.device)
    return start.contiguous()

def visible(i, j, end):
    """j <= i < end[j] for queries i (B, T) and keys j (Tk,): bool (B, T, Tk)."""
    seen = j <= i[..., None]
    if end is None:
        return seen
    end = F.pad(end, (0, j.numel() - end.size(1)))  # a cache may hold spare slots
    return seen & (i[..., None] < end[:, None])

def full_attention(q, k, v, end=None, start=None, impl="auto"):
    """Softmax attention over every visible key, with gradients -> (B, T, H, D).

    q      (B, T, H, D)
    k, v   (B, Tk, Hkv, D), Tk >= T
    end    (B, Tk) int32, the end of each key's document; None: there is one
    start  index of the first query. None: 0; (B,) int32: of each row, in a cache; an int: of all rows, a part of each
           of which is computed here (the host knows it: nothing waits for a GPU)
    impl   auto, triton (decode alone: a cache, T <= 8) or torch
    ValueError for tensors that do not fit, and where triton is asked for and cannot.
    """
    _check_attention(q, k, v, end, start)
    B, T, H, D = q.shape
    Tk = k.size(1)
    decode = isinstance(start, torch.Tensor) and T <= NEW  # all that our kernel does: a prefill is SDPA's
    if impl == "auto" and not decode:
        impl = "torch"
    if _pick(impl, q, D, grad=(q, k, v)):
        if not decode:
            raise ValueError(f"impl='triton' is for decode alone, which has a start and T <= {NEW}: T is {T}")
        return _dense_triton(q.contiguous(), k, v, end, start.contiguous())

    if isinstance(start, int):  # no query of this part of a row sees the keys after it
        Tk = start + T
        k, v = k[:, :Tk], v[:, :Tk]
        end = None if end is None else end[:, :Tk]
        start = start or None
    on_flash = q.is_cuda and q.dtype.itemsize == 2
    is_part = isinstance(start, int)
    if end is not None and (start is None or is_part) and on_flash and torch.is_grad_enabled():
        return _flex(q, k, v, end, start or 0)
    if q.device.type == "cpu" and not all_finite(q, k, v):
        # torch's operator adds its mask to the scores, so that a NaN passes it: MSA over every block masks its keys
        every = torch.arange(cdiv(Tk, 64), dtype=torch.int32)
        return msa_attention(q, k, v, every.expand(B, T, k.size(2), -1), 64, end, start, "torch")

    if end is None and start is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                            # (B, H, T, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    if end is None and is_part and on_flash:
        from torch.nn.attention.bias import causal_lower_right  # here: it imports the compiler, which takes a second
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = causal_lower_right(T, Tk)  # the last T of Tk queries; it is never written out
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    return _attend_masked(q, k, v, None, 1, end, start)

def _attend_masked(q, k, v, block_idx, L, end, start):
    """torch's operator with a mask: what is visible, and with block_idx what is chosen, too. See msa_attention."""
    B, T, H, _ = q.shape
    Tk, Hkv = k.shape[1:3]
    i = query_index(T, start, q.device)
    j = torch.arange(Tk, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                                # (B, H, T, D)
    step = max(1, chunk(q.device) // (B * H * Tk))  # a masked backend may hold all its scores
    known = start is None or isinstance(start, int)
    if block_idx is None and known and end is not None and B == 1 and T > SEEN_STEP:
        return _attend_tree(q, k, v, i, j, end, start or 0, min(step, SEEN_STEP))
    out = []
    for t in range(0, T, step):
        rows = slice(t, t + step)
        mask = visible(i[:, rows], j, end)[:, None]                             # (B, 1, t, Tk)
        if block_idx is not None:
            chosen = chosen_blocks(block_idx[:, rows], cdiv(Tk, L)).transpose(1, 2)     # (B, Hkv, t, N)
            mask = mask & chosen.repeat_interleave(L, -1)[..., :Tk]
            mask = mask.repeat_interleave(H // Hkv, 1)                          # (B, H, t, Tk)
        out.append(F.scaled_dot_product_attention(q[:, :, rows], k, v, mask, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2)

def _attend_tree(q, k, v, i, j, end, start, step):
    """A long row of documents or of a prefix tree, `step` queries at a time, each over the keys that one of them sees:
    in a tree of many branches behind one prompt that is the prompt and their own branches.

    q, k, v  (1, H or Hkv, T or Tk, D)
    i, j     indices of the queries (1, T), from start on, and of the keys (Tk,)
    -> (1, T, H, D)"""
    out = []
    for t in range(0, q.size(2), step):
        rows = slice(t, t + step)
        seen = ((end[0] > start + t) & (j < start + t + step)).nonzero()[:, 0]
        mask = visible(i[:, rows], j[seen], end[:, seen])[:, None]              # (1, 1, t, seen)
        out.append(F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, seen], v[:, :, seen], mask, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2)

def chosen_blocks(block_idx, N):
    """block_idx (B, T, Hkv, S) -> which of N blocks are in it: bool (B, T, Hkv, N)."""
    chosen = torch.zeros(*block_idx.shape[:3], N + 1, dtype=torch.bool, device=block_idx.device)
    block = torch.where(block_idx < 0, N, block_idx).long()
    return chosen.scatter_(3, block, True)[..., :N]

def _flex(q, k, v, end, start=0, tile=128):
    """FlexAttention over documents or trees, for training on a GPU: it skips tiles that are invisible as a whole.
    The T queries are those from start on, of Tk keys."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    T, Tk = q.size(1), k.size(1)
    more, more_keys = -T % tile, -Tk % tile
    if more or more_keys:  # whole tiles: FlexAttention wants masks as long as its tensors
        q = F.pad(q, (0, 0, 0, 0, 0, more))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, more_keys)) for x in (k, v))
        return _flex(q, k, v, F.pad(end, (0, more_keys)), start, tile)[:, :T]

    # tiles of which something is seen, and those seen as a whole: (B, query tiles, key tiles)
    i = torch.arange(start, start + T, tile, device=end.device)[:, None]  # a tile's first query
    j = torch.arange(0, Tk, tile, device=end.device)  # a tile's first key
    ends = end.view(len(end), 1, -1, tile)
    seen = (j < i + tile) & (ends.amax(-1) > i)
    whole = (j + tile <= i) & (ends.amin(-1) >= i + tile)
    parts = []
    for tiles in (seen & ~whole, whole):
        tiles = tiles[:, None]
        parts.append(tiles.sum(-1, dtype=torch.int32))
        parts.append(tiles.int().argsort(stable=True, descending=True).int())
    if start == 0:
        def sees(b, h, i, j):
            return (j <= i) & (i < end[b, j])
    else:
        first = torch.full((), start, dtype=torch.int32, device=end.device)  # a number would be compiled in

        def sees(b, h, i, j):
            return (j <= i + first) & (i + first < end[b, j])
    mask = BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=tile, seq_lengths=(T, Tk), mask_mod=sees)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled(flex_attention)(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

def block_scores(qi, ki, i, end, L, ids=None):
    """The index branch's score of every block (paper eq. 5-6): max over its visible keys of qi . ki, in fp32 or wider;
    -inf from the query's own block on. An earlier block lies wholly before i, so that only `end` can hide a key of it.

    qi   (B, T, Hkv, D)
    ki   (B, Tk, D)
    i    (B, T) or (1, T), index of each query
    ids  (N,), which block of the row each block of ki is; None: 0 … N-1
    -> (B, T, Hkv, N)
    """
    B, T, Hkv, D = qi.shape
    n = ki.size(1) // L  # whole blocks: a last one in part is no one's earlier block
    N = cdiv(ki.size(1), L)
    q = widen(qi).flatten(1, 2).transpose(1, 2)                                 # (B, D, T * Hkv)
    out = q.new_full((B, N, T, Hkv), float("-inf"))
    if end is not None:
        end = F.pad(end, (0, N * L - end.size(1)))
    step = max(1, chunk(qi.device) // (B * T * Hkv * L))
    for b in range(0, n, step):
        part = slice(b * L, min(n, b + step) * L)
        # keys @ queries: for few queries a CPU does it 2 to 4 times as fast as queries @ keys
        scores = (widen(ki[:, part]) @ q).view(B, -1, L, T, Hkv)
        if end is not None:
            last = end[:, part].view(B, -1, L, 1)
            scores = scores.masked_fill((i[:, None, None] >= last)[..., None], float("-inf"))
        scores = scores.nan_to_num_(float("-inf"), float("inf"), float("-inf"))
        out[:, b:b + scores.size(1)] = scores.amax(2)
    if ids is None:
        ids = torch.arange(N, device=i.device)
    hidden = ids[:, None] >= (i // L)[:, None]                                  # (B, N, T)
    return out.masked_fill(hidden[..., None], float("-inf")).permute(0, 2, 3, 1)

def top_blocks(scores, own, S):
    """Block scores (B, T, Hkv, N), own block (B, T) -> int32 (B, T, Hkv, S): own, then by descending score, then -1."""
    own = own[:, :, None, None].expand(*scores.shape[:3], 1)
    scores = scores.scatter(-1, own, float("-inf"))
    # A stable sort, not topk: [1., 1., 0.] must give block 0 before block 1, and topk promises no order among ties.
    value, block = scores.sort(dim=-1, descending=True, stable=True)
    block = torch.cat([own, block.masked_fill(value == float("-inf"), -1)], -1)[..., :S]
    return F.pad(block, (0, S - block.size(-1)), value=-1).int()

@torch.no_grad()
def select_blocks(qi, ki, S, L, end=None, start=None, impl="auto"):
    """The index branch's choice (paper eq. 5-7) -> block_idx int32 (B, T, Hkv, S).

    qi                (B, T, Hkv, D), index queries
    ki                (B, Tk, D), index keys
    S                 blocks a query reads. Slot 0 is its own block; -1 fills rows with fewer than S visible blocks
    L                 tokens in a block
    end, start, impl  see full_attention
    ValueError for tensors that do not fit, and S or L below 1.
    """
    if S < 1 or L < 1:
        raise ValueError(f"S is {S} and L is {L}, expected 1 or more")
    B, T, Hkv, D = qi.shape
    check_tensor("ki", ki, (B, ki.size(1), D), qi.device, qi.dtype)
    _check_layout(qi, ki.size(1), end, start)
    if _pick(impl, qi, D, L):
        return _select_triton(qi.contiguous(), ki, S, L, end, starts(start, qi))
    i = query_index(T, start, qi.device)
    step = max(1, chunk(qi.device) * L // (B * Hkv * ki.size(1)))
    chosen = []
    for t in range(0, T, step):
        rows = slice(t, t + step)
        scores = block_scores(qi[:, rows], ki, i[:, rows], end, L)
        chosen.append(top_blocks(scores, (i[:, rows] // L).expand(B, -1), S))
    return torch.cat(chosen, 1)

@torch.no_grad()
def block_candidates(qi, ki, ids, S, L, end=None, start=None):
    """The choice where each rank has some of a row's key blocks, first part: the best S - 1 of those that are here.

    qi     (B, T, Hkv, D), index queries
    ki     (B, n * L, D), index keys of whole blocks
    ids    (n,) int, which block of the row each is, in ascending order
    S, L   see select_blocks
    end    (B, n * L), of these keys; start: see full_attention
    -> score (B, T, Hkv, S - 1), in descending order, and block, int32; -inf and -1 where there are fewer
    """
    B, T, Hkv, _ = qi.shape
    i = query_index(T, start, qi.device)
    step = max(1, chunk(qi.device) * L // (B * Hkv * ki.size(1)))
    found = []
    for t in range(0, T, step):
        rows = slice(t, t + step)
        scores = block_scores(qi[:, rows], ki, i[:, rows], end, L, ids)
        scores, place = scores.sort(dim=-1, descending=True, stable=True)
        found.append((scores[..., :S - 1], ids[place[..., :S - 1]]))
    score, block = (torch.cat(parts, 1) for parts in zip(*found))
    lacking = S - 1 - score.size(-1)
    score = F.pad(score, (0, lacking), value=float("-inf"))
    block = F.pad(block, (0, lacking)).masked_fill(score == float("-inf"), -1)
    return score, block.int()

def merge_candidates(score, block, own, S):
    """The second part: of all ranks' candidates the best, by descending score, ties by lowest block: the blocks that
    select_blocks gives.

    score, block  (B, T, Hkv, ranks * (S - 1)), block_candidates of each rank, in any order
    own           (B, T), block of each query
    -> block_idx int32 (B, T, Hkv, S)
    """
    block, place = block.sort(dim=-1)  # a stable sort by score, below, keeps this order among ties
    score, place = score.gather(-1, place).sort(dim=-1, descending=True, stable=True)
    best = block.gather(-1, place).masked_fill(score == float("-inf"), -1)[..., :S - 1]
    own = own[:, :, None, None].expand(*best.shape[:3], 1)
    return torch.cat([own, best], -1).int()

def gather_blocks(x, block_idx, L):
    """Copy out the chosen blocks. x (B, Tk, Hkv, D), block_idx (B, T, Hkv, S) -> (B, T, Hkv, S*L, D).
    A block of -1 yields block 0 and a last partial block zeros; `selected` says which keys count."""
    B, Tk, Hkv, D = x.shape
    T, S = block_idx.shape[1::2]
    N = cdiv(Tk, L)
    if Tk % L:
        x = F.pad(x, (0, 0, 0, 0, 0, N * L - Tk))
    x = x.unflatten(1, (N, L))                                                  # (B, N, L, Hkv, D)
    block = block_idx.clamp(min=0)
    batch = torch.arange(B, device=x.device).view(B, 1, 1, 1)
    head = torch.arange(Hkv, device=x.device).view(Hkv, 1)
    if T * S < N:  # decode: the few blocks alone; the copy into block order below would read the whole cache
        return x[batch, block.long(), :, head].flatten(3, 4)
    row = (batch * Hkv + head) * N + block
    x = x.permute(0, 3, 1, 2, 4).reshape(B * Hkv * N, L * D)
    return x.index_select(0, row.flatten()).view(B, T, Hkv, S * L, D)

def selected(block_idx, i, L, end):
    """Which gathered keys a query sees: bool (B, T, Hkv, S*L)."""
    j = block_idx[..., None] * L + torch.arange(L, device=block_idx.device)
    j = j.flatten(-2)
    i = i[..., None, None]
    seen = (j >= 0) & (j <= i)
    if end is None:
        return seen
    j = j.clamp(0, end.size(1)).long()  # a slot without an end finds the 0 that is put behind the last: it is invisible
    last = F.pad(end, (0, 1)).gather(1, j.flatten(1))
    return seen & (i < last.view(j.shape))

def softmax(scores, seen):
    """Softmax over what a query sees, 0 elsewhere; all 0 where it sees nothing, or nothing but scores of -inf."""
    scores = scores.masked_fill_(~seen, float("-inf"))  # in place: the caller has no use for them
    none = scores.detach().amax(-1, keepdim=True) == float("-inf")
    return scores.masked_fill_(none, 0.0).softmax(-1).masked_fill(none | ~seen, 0.0)

def group_probs(q, keys, seen):
    """Main softmax, head by head: q (B, T, H, D), keys (B, T, Hkv, J, D), seen (B, T, Hkv, J) -> (B, T, Hkv, G, J)."""
    q = widen(q).unflatten(2, (keys.size(2), -1)).transpose(-1, -2)             # (B, T, Hkv, D, G)
    # keys @ q, not q @ keys^T: the gradient of the gathered keys, the largest tensor here, needs no transposed copy
    scores = (widen(keys) @ q).transpose(-1, -2) * q.size(-2) ** -0.5
    return softmax(scores, seen[..., None, :])

def msa_attention(q, k, v, block_idx, L, end=None, start=None, impl="auto"):
    """Exact attention over the chosen blocks (paper eq. 8), with gradients -> (B, T, H, D). Time and memory grow with
    T * S * L, not with T * T; a short context has a mask instead on a CPU.

    q                 (B, T, H, D)
    k, v              (B, Tk, Hkv, D)
    block_idx         int32 (B, T, Hkv, S) as select_blocks gives it for the same L: own block in slot 0, ids distinct,
                      which nothing checks
    L                 tokens in a block
    end, start, impl  see full_attention
    ValueError for tensors that do not fit.
    """
    _check_attention(q, k, v, end, start)
    B, T, H, D = q.shape
    S = block_idx.size(3)
    check_tensor("block_idx", block_idx, (B, T, k.size(2), S), q.device)
    if _pick(impl, q, D, L, grad=(q, k, v)):
        return _attend_triton(q.contiguous(), k, v, block_idx.contiguous(), L, end, starts(start, q))

    G = H // k.size(2)
    is_short = T >= FEW_QUERIES and k.size(1) * G <= SHORT * S * L
    if q.device.type == "cpu" and is_short and all_finite(q, k, v):
        return _attend_masked(q, k, v, block_idx, L, end, start)

    def attend(q, i, blocks, k, v):
        seen = selected(blocks, i, L, end)
        # 0 * NaN is NaN: what is invisible is set to 0, in place, since the gathered keys are the largest tensors here
        hidden = ~seen[..., None]
        keys = gather_blocks(k, blocks, L).masked_fill_(hidden, 0.0)
        values = gather_blocks(v, blocks, L).masked_fill_(hidden, 0.0)
        return (group_probs(q, keys, seen).to(v.dtype) @ values).flatten(2, 3)  # (B, t, H, D)

    block_idx = block_idx[..., :cdiv(k.size(1), L)]  # in a short context the slots beyond its blocks hold -1
    i = query_index(T, start, q.device)
    step = max(1, chunk(q.device) // (B * block_idx[0, 0].numel() * L * D))
    if T <= step:
        return attend(q, i, block_idx, k, v)
    # the gathered blocks of all chunks are S * L / G times the size of q: the backward pass gathers them again
    out = []
    for t in range(0, T, step):
        rows = slice(t, t + step)
        queries = q[:, rows], i[:, rows], block_idx[:, rows]
        out.append(checkpoint(attend, *queries, k, v, use_reentrant=False))
    return torch.cat(out, 1)

def msa_decode(q, k, v, qi, ki, S, L, length, end=None, impl="auto", int8=None):
    """A step of generation: choose blocks, attend -> out (B, T, H, D), block_idx (B, T, Hkv, S).

    It does what select_blocks, then msa_attention do; for 1 to 8 new tokens the kernels of section E do both in one.

    q, qi      (B, T, H, D) and (B, T, Hkv, Di), of the new tokens
    k, v       (B, Tk, Hkv, D), a cache that holds the new tokens, too
    ki         (B, Tk, Di), the same for index keys
    S, L       see select_blocks
    length     (B,) int32, the first new token's slot; length + T <= Tk
    end, impl  see full_attention
    int8       quantize_index(ki, L), or None: it halves the bytes that the kernels read, and does not change the choice
    ValueError for tensors that do not fit.
    """
    T, D = q.shape[1::2]
    Di = qi.size(3)
    if int8 is not None:
        _check_int8(int8, ki, L)
    if q.is_cuda and Di < 32:
        int8 = None  # tensor cores multiply rows of 32 bytes
    few = T <= NEW and T * k.size(2) <= 64  # more columns spill registers
    if few and _pick(impl, q, D, Di, L, grad=(q, k, v)):
        _check_branches(q, k, v, qi, ki, end, length)
        q, qi, length = q.contiguous(), qi.contiguous(), length.contiguous()
        return _decode_triton(q, k, v, qi, ki, S, L, length, end, int8)
    block_idx = select_blocks(qi, ki, S, L, end, length, impl)
    return msa_attention(q, k, v, block_idx, L, end, length, impl), block_idx

def index_kl_loss(qi, ki, q, k, block_idx=None, L=1, end=None, weight=None, stride=1, start=None):
    """KL(teacher || index softmax), mean over KV heads, sum over tokens (paper eq. 9-10): a scalar with its real value.
    The caller divides by the tokens of a whole step. Teacher: mean over the group's heads of the main softmax,
    detached. Only qi and ki have a gradient.

    qi         (B, T, Hkv, Di)
    ki         (B, Tk, Di)
    q          (B, T, H, D)
    k          (B, Tk, Hkv, D)
    block_idx  (B, T, Hkv, S), whose tokens are the support; None: the whole visible prefix, for the warm-up
    L, end     see msa_attention
    weight     (B, T), a query's factor in the sum, where less than 0 counts as 0; None: 1 each
    stride     the sum is over every stride-th of the queries
    start      an int, index of the first query where they are a part of a row; None: whole sequences, T = Tk
    ValueError for tensors that do not fit.
    """
    _check_branches(q, k, None, qi, ki, end, start)
    _check_part(q, k, start)
    q, k = q.detach(), k.detach()
    return _IndexKL.apply(qi, ki, q, k, block_idx, L, end, weight, stride, start)

class _IndexKL(torch.autograd.Function):
    """KL and its gradient in one pass: d KL / d score = (index softmax - teacher) * weight / Hkv."""

    @staticmethod
    def forward(ctx, qi, ki, q, k, block_idx, L, end, weight, stride, start):
        B, T, Hkv, Di = qi.shape
        share = _share(weight, q, Hkv)
        i = query_index(T, start, q.device)
        loss = share.new_zeros(())
        dqi = torch.zeros_like(qi)
        dki = torch.zeros_like(ki)
        if block_idx is None:
            terms = _compiled(_kl_prefix) if q.is_cuda else _kl_prefix
            width = ki.size(1)
        else:
            terms = _kl_selected
            width = block_idx.size(-1) * L * Di
        step = stride * max(1, chunk(q.device) // (B * q.size(2) * width))
        for t in range(0, T, step):
            rows = slice(t + stride - 1, t + step, stride)  # those that learn
            blocks = None if block_idx is None else block_idx[:, rows]
            queries = qi[:, rows], ki, q[:, rows], k
            kl, dqi[:, rows], dk = terms(*queries, blocks, L, i[:, rows], end, share[:, rows])
            loss = loss + kl
            dki = dki + dk
        ctx.save_for_backward(dqi, dki)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dqi, dki = ctx.saved_tensors
        return grad * dqi, grad * dki, *[None] * 8  # grad is a number: the dtypes stay

def _share(weight, q, Hkv):
    """A query's share in the KL's sum, for each KV head: its weight (B, T), 0 or less = none -> fp32 or wider."""
    if weight is None:
        weight = torch.ones(q.shape[:2], device=q.device)
    check_tensor("weight", weight, q.shape[:2], q.device)
    return weight.to(torch.promote_types(q.dtype, torch.float32)).clamp(min=0) / Hkv

def _finite(x):
    """x with 0 for NaN, and the largest number for inf. Its factor is 0 where x is invisible, and 0 * NaN would be NaN;
    where x is seen, a NaN in x has already made its factor NaN."""
    return x.nan_to_num(0.0)

def _kl_terms(p, scores, seen, share, qi):
    """Teacher p, index scores (B, t, Hkv, J), share (B, t) -> weighted KL (scalar), d KL / d scores in qi's dtype."""
    scale = qi.size(-1) ** -0.5
    logp = (scores * scale).masked_fill(~seen, float("-inf")).log_softmax(-1)
    kl = torch.where(p == 0, 0.0, p * (p.log() - logp)).sum(-1)  # p = 0 gives 0 * inf where a key is invisible
    ds = (logp.exp() - p) * share[..., None, None] * scale
    return (kl * share[..., None]).sum(), ds.masked_fill(~seen, 0.0).to(qi.dtype)

def _kl_selected(qi, ki, q, k, blocks, L, i, end, share):
    """Support = the tokens of the chosen blocks (paper eq. 9-10) -> weighted KL, dqi, dki."""
    B, _, Hkv, D = qi.shape
    Tk = ki.size(1)
    N = cdiv(Tk, L)
    seen = selected(blocks, i, L, end) & (share != 0)[..., None, None]
    p = group_probs(q, gather_blocks(k, blocks, L), seen).mean(3)
    keys = gather_blocks(ki[:, :, None].expand(-1, -1, Hkv, -1), blocks, L)     # (B, t, Hkv, J, D)
    scores = (keys.to(p.dtype) @ qi.to(p.dtype)[..., None]).squeeze(-1)
    kl, ds = _kl_terms(p, scores, seen, share, qi)
    dqi = (ds[..., None, :] @ _finite(keys)).squeeze(-2)
    dkeys = ds[..., None] * _finite(qi)[..., None, :]                           # (B, t, Hkv, J, D)

    # add what each gathered block got to the block it is a copy of
    batch = torch.arange(B, device=q.device).view(B, 1, 1, 1)
    rows = (blocks.clamp(min=0) + batch * N).flatten()                          # (B * t * Hkv * S,)
    dkeys = dkeys.reshape(rows.numel(), L * D)
    dki = dkeys.new_zeros(B * N, L * D).index_add_(0, rows, dkeys)
    return kl, dqi, dki.view(B, N * L, D)[:, :Tk]

def _kl_prefix(qi, ki, q, k, blocks, L, i, end, share):
    """Support = the whole visible prefix: the warm-up, before anything is selected -> weighted KL, dqi, dki."""
    seen = visible(i, torch.arange(ki.size(1), device=ki.device), end)
    seen = (seen & (share != 0)[..., None])[:, :, None]                         # (B, t, 1, Tk)
    p = prefix_probs(q, k, seen)
    scores = torch.einsum("bthd,bkd->bthk", qi.to(p.dtype), ki.to(p.dtype))
    kl, ds = _kl_terms(p, scores, seen, share, qi)
    dqi = torch.einsum("bthk,bkd->bthd", ds, _finite(ki))
    dki = torch.einsum("bthk,bthd->bkd", ds, _finite(qi))
    return kl, dqi, dki

def prefix_probs(q, k, seen):
    """Mean over the group's heads of the full softmax. q (B, T, H, D), k (B, Tk, Hkv, D), seen (B, T, 1, Tk) ->
    (B, T, Hkv, Tk), fp32 or wider."""
    q = widen(q).unflatten(2, (k.size(2), -1))
    q = q.permute(0, 2, 3, 1, 4)                                                # (B, Hkv, G, T, D)
    k = widen(k).permute(0, 2, 3, 1)[:, :, None]                                # (B, Hkv, 1, D, Tk)
    scores = q @ k * q.size(-1) ** -0.5
    return softmax(scores, seen[:, None, None, :, 0]).mean(2).transpose(1, 2)

def msa_train(q, k, v, qi, ki, block_idx, L, end=None, weight=None, stride=1, impl="auto", start=None):
    """msa_attention and index_kl_loss of one layer in training -> out (B, T, H, D), KL, both with gradients.

    q, k, v, block_idx, L, end     see msa_attention
    qi, ki, weight, stride, start  see index_kl_loss. The kernels compute KL and gradient in one pass over the main
                                   scores
    impl                           see full_attention
    ValueError for tensors that do not fit.
    """
    if not _pick(impl, q, q.size(3), qi.size(3), L):
        kl = index_kl_loss(qi, ki, q, k, block_idx, L, end, weight, stride, start)
        return msa_attention(q, k, v, block_idx, L, end, start, "torch"), kl
    B, T = q.shape[:2]
    Hkv = k.size(2)
    _check_branches(q, k, v, qi, ki, end, start)
    _check_part(q, k, start)
    check_tensor("block_idx", block_idx, (B, T, Hkv, block_idx.size(-1)), q.device)
    share = _share(weight, q, Hkv)[:, stride - 1::stride].contiguous()
    inputs = (x.contiguous() for x in (q, k, v, qi, ki, block_idx))
    end = None if end is None else end.contiguous()
    return _Train.apply(*inputs, L, end, share, stride, start)

@torch.no_grad()
def block_recall(qi, ki, q, k, S, L, end=None, n_query=256):
    """How well the index branch finds the S-1 heaviest earlier blocks (paper 5.2), by the group-mean mass of the dense
    softmax, on about n_query evenly spaced queries with more than S earlier blocks.

    qi, ki, q, k, end  see index_kl_loss
    S, L               see select_blocks
    -> recall, the share of those blocks that it finds; the mass of what it finds over theirs; the share that a random
       choice would find. nan without such a query
    """
    T = q.size(1)
    step = max(1, T // n_query)
    rows = torch.arange(T - 1, -1, -step, device=q.device).flip(0)
    seen = visible(rows[None], torch.arange(T, device=q.device), end)
    mass = prefix_probs(q[:, rows], k, seen[:, :, None])
    mass = F.pad(mass, (0, -T % L))
    mass = mass.unflatten(-1, (-1, L)).sum(-1)                                  # (B, t, Hkv, N)
    scores = block_scores(qi[:, rows], ki, rows[None], end, L)
    hidden = scores == float("-inf")  # the own block and what comes after it, too
    n_earlier = (~hidden).sum(-1)
    most = min(S - 1, scores.size(-1))
    true = mass.masked_fill(hidden, -1e30).topk(most, -1).indices
    found = scores.masked_fill(hidden, -1e30).topk(most, -1).indices
    same = true[..., :, None] == found[..., None, :]
    hits = same.any(-1).float().mean(-1)                                        # (B, t, Hkv)
    best = mass.gather(-1, true).sum(-1)
    held = mass.gather(-1, found).sum(-1)
    counts = n_earlier > S
    chance = (S - 1) / n_earlier[counts]
    return hits[counts].mean(), (held / best)[counts].mean(), chance.mean()

def check_tensor(name, x, shape, device, dtype=None):
    """ValueError unless x has this shape, device, and dtype if one is given."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"shape of {name} is {tuple(x.shape)}, expected {tuple(shape)}")
    if x.device != device:
        raise ValueError(f"device of {name} is {x.device}, expected {device}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"dtype of {name} is {x.dtype}, expected {dtype}")

def _check_layout(q, Tk, end, start):
    """ValueError unless there are Tk >= T keys for queries q (B, T, …), and end and start fit."""
    B, T = q.shape[:2]
    if q.numel() == 0:
        raise ValueError(f"shape of the queries is {tuple(q.shape)}, expected no empty dimension")
    if T > Tk:
        raise ValueError(f"number of queries is {T}, expected at most {Tk}, that of keys")
    is_part = isinstance(start, int)
    if is_part and not 0 <= start <= Tk - T:
        raise ValueError(f"start is {start}, expected 0 to {Tk - T}: there are {Tk} keys for {T} queries")
    for name, x in (("end", end), ("start (a cache's length)", start)):
        if x is not None and not isinstance(x, torch.Tensor) and not (is_part and x is start):
            raise ValueError(f"type of {name} is {type(x)}, expected {torch.Tensor}")
    if isinstance(start, torch.Tensor):
        check_tensor("start (a cache's length)", start, (B,), q.device, torch.int32)
    if end is not None:
        fits = end.dim() == 2 and end.size(0) == B and end.size(1) <= Tk
        if not fits or ((start is None or is_part) and end.size(1) < Tk):
            raise ValueError(f"shape of end is {tuple(end.shape)}, expected {(B, Tk)}, one end for each key")
        check_tensor("end", end, end.shape, q.device, torch.int32)

def _check_attention(q, k, v, end, start):
    """ValueError unless main queries, keys and values (or None) fit together."""
    B, _, H, D = q.shape
    Tk, Hkv = k.shape[1:3]
    check_tensor("k", k, (B, Tk, Hkv, D), q.device, q.dtype)
    if v is not None:
        check_tensor("v", v, k.shape, q.device, q.dtype)
    if H % Hkv != 0:
        raise ValueError(f"number of query heads is {H}, expected a multiple of {Hkv}, that of KV heads")
    _check_layout(q, Tk, end, start)

def _check_branches(q, k, v, qi, ki, end, start):
    """ValueError unless main and index branch fit together."""
    _check_attention(q, k, v, end, start)
    Di = qi.size(3)
    check_tensor("qi", qi, (*q.shape[:2], k.size(2), Di), q.device)
    check_tensor("ki", ki, (*k.shape[:2], Di), q.device, qi.dtype)

def _check_part(q, k, start):
    """ValueError unless training has the queries of whole rows, or of a part of each that begins at start, an int."""
    if start is None:
        check_tensor("k", k, (*q.shape[:2], *k.shape[2:]), q.device)
    elif not isinstance(start, int):
        raise ValueError(f"type of start is {type(start)}, expected int: training has no cache")

def _check_int8(int8, ki, L):
    """ValueError unless int8 is of the shapes and dtypes that quantize_index(ki, L) has."""
    ki8, scale, slack = int8
    B, Tk, _ = ki.shape
    check_tensor("ki8", ki8, ki.shape, ki.device, torch.int8)
    check_tensor("scale", scale, (B, Tk), ki.device, torch.bfloat16)
    check_tensor("slack", slack, (B, cdiv(Tk, L)), ki.device, torch.float32)

def _misfit(x, sizes):
    """Why the Triton kernels cannot take x and these sizes (head dims, L); None if they can.
    On a CPU the interpreter runs the kernels, for tests: TRITON_INTERPRET=1 before this file is imported, fp32."""
    if triton is None:
        return "Triton is not installed"
    if x.is_cuda:
        dtypes = torch.bfloat16, torch.float16
        names = "bfloat16 or float16"
        low, high = 16, 128
    else:
        if isinstance(_key, triton.JITFunction):
            return f"the device is {x.device}, and TRITON_INTERPRET was not set"
        dtypes = torch.float32, torch.float16
        names = "float32 or float16"
        low, high = 1, 2 ** 20
    if x.dtype not in dtypes:
        return f"the dtype is {x.dtype}, expected {names}"
    if not all(low <= n <= high and n & (n - 1) == 0 for n in sizes):
        return f"sizes {sizes} are not powers of two from {low} to {high}"
    return None

def _pick(impl, x, *sizes, grad=(), what="sparse attention"):
    """True for Triton. auto: on a GPU, in 16 bits, sizes powers of two from 16 to 128, no gradient; says why if not."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'triton' or 'torch'")
    if impl == "torch" or (impl == "auto" and not x.is_cuda):
        return False
    why = _misfit(x, sizes)
    if why is None and torch.is_grad_enabled() and any(t.requires_grad for t in grad):
        why = "a gradient is asked for"
    if why is None:
        return True
    if impl == "triton":
        raise ValueError(f"impl='triton' does not fit: {why}")
    warnings.warn(f"{what} runs in torch: {why}")  # Python shows a warning of one place once
    return False

def implementation(device, dtype, *sizes):
    """What impl="auto" runs for activations of this kind and these sizes (head dims, L), for a start-up card."""
    x = torch.empty(0, device=device, dtype=dtype)
    why = _misfit(x, sizes) if x.is_cuda else f"the device is {x.device.type}"
    return "Triton" if why is None else f"torch ({why})"

def _power_of_2(n, least=1):
    """The smallest power of two from n and `least` on: a tile's side."""
    return max(least, triton.next_power_of_2(n))

def _lanes(end=None, **lanes):
    """Check that lanes (one layer's tensors of a cache: k, v or ki, each (B, Tk, …)) are laid out alike: kernels read
    each sequence of a lane as one piece. -> capacity, slots from the start of a sequence to that of the next (more than
    Tk where the lane is a slice of a longer one); end, padded to capacity."""
    capacity = None
    for name, x in lanes.items():
        width = x[0, 0].numel()
        own = x.size(1) if x.size(0) == 1 else x.stride(0) // width
        if capacity is None:
            capacity = own
        whole = x.size(0) == 1 or x.size(1) <= capacity == own
        if not (whole and x[0].is_contiguous()):
            strides = capacity * width, *torch.empty(x.shape, device="meta").stride()[1:]
            raise ValueError(f"strides of {name} are {x.stride()}, expected {strides}")
    if end is not None:
        end = F.pad(end, (0, capacity - end.size(1))).contiguous()
    return capacity, end

# ==== B. Tile helpers =============================================================================
#
# A Triton kernel is one small program, started thousands of times; each instance works on tiles, small matrices that
# fit into registers. What several kernels do to a tile is written here once, as functions that Triton inlines.
#
# The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867): a program holds, for each query, the
# maximum of the scores so far, the sum of p = 2^(score - maximum), and the sum of p * value. Scores are in units of
# log 2, because the hardware has exp2 and not exp: SCALE = LOG2E / sqrt(D). Two such results over different keys can
# be merged, which is how blocks that different programs read become one softmax. A query without any visible key keeps
# the maximum LEAST and the sum 0, and its output is 0.
#
# A ranking needs one number for (score, block): _key packs both into an int64 whose order is the choice's order.
#
# The log2-sum-exp of a row, log2 of the sum of 2^score, is called lse for one part, stat for all keys of a query, and
# index_stat in the index branch. In full attention's decode alone, stat is the pair (maximum, sum).

LOG2E = constexpr(math.log2(math.e))
LN2 = constexpr(math.log(2))
NOTHING = constexpr(float("-inf"))                 # the score of a key that is not seen
LEAST = constexpr(torch.finfo(torch.float32).min)  # every score is above it, or is NOTHING
TINY = constexpr(1e-30)                            # divides in place of an empty sum, and is far below any other
NO_KEY = constexpr(-0x7FFFFFFFFFFFFFFF)            # below every _key

@jit
def _key_tile(b, j, h, capacity, HKV: constexpr, D: constexpr):
    """Where keys j [L] of head h lie in a lane (B, capacity, HKV, D): [L, D]. b is int64, as a lane can be large."""
    return ((b * capacity + j) * HKV + h)[:, None] * D + tl.arange(0, D)

@jit
def _visible(seen, i, end, base, j, held):
    """What is seen, less the keys that end before query i. end[base + j] is read where held; end may be None."""
    if end is not None:
        seen = seen & (i < tl.load(end + base + j, mask=held, other=0))
    return seen

@jit
def _matmul(a, b):
    """a @ b in fp32 or wider, of the numbers as they are: fp32 ones would lose bits as tf32."""
    return tl.dot(a, b, input_precision="ieee")

@jit
def _scores(query, key, SCALE: constexpr):
    """query [rows, D], key [keys, D] -> scores [rows, keys] in units of log 2."""
    return _matmul(query, key.T) * SCALE

@jit
def _softmax_tile(score, seen, peak):
    """score [rows, keys]; seen [rows, keys], [keys] or None; peak [rows], the maximum so far
    -> p = 2^(score - maximum) [rows, keys], the new maximum [rows]."""
    if seen is not None:
        score = tl.where(seen, score, NOTHING)
    peak = tl.maximum(peak, tl.max(score, 1))
    return tl.exp2(score - peak[:, None]), peak

@jit
def _weigh(p, value):
    """p [rows, keys], value [keys, D] -> sum of p * value [rows, D]. Loops load value just before this line: a tile
    that waits through the softmax costs 70 registers a thread, or as much shared memory."""
    return _matmul(p.to(value.dtype), value)

@jit
def _merge(acc, total, peak, part, weight):
    """Add a normalised part [rows, D], of log2-sum-exp weight [rows], to the sums acc [rows, D] and total [rows], which
    are relative to the maximum peak [rows] -> acc, total, peak. Either part of a shape may be several dimensions."""
    new = tl.maximum(peak, weight)
    old = tl.exp2(peak - new)
    weight = tl.exp2(weight - new)
    acc = acc * tl.expand_dims(old, -1)
    acc += part.to(tl.float32) * tl.expand_dims(weight, -1)
    return acc, total * old + weight, new

@jit
def _mean(acc, total):
    """The softmax's output [rows, …]; 0 for a row without a key."""
    return acc / tl.expand_dims(tl.maximum(total, TINY), -1)

@jit
def _log2_sum(peak, total):
    """The log2-sum-exp that gradients need; 0 for a row without a key, whose p are 0 by their mask."""
    return tl.where(total == 0, 0.0, peak + tl.log2(total))

@jit
def _ranked(score):
    """A score that is NaN ranks as -inf does: not at all. Maxima pass over NaN: it is left where nothing else was."""
    return tl.where(score == score, score, NOTHING)

@jit
def _key(score, block):
    """int64 that orders as (score, lowest block first): the float's bits made monotonic, then the inverted id."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)

@jit
def _block_of(key):
    """Block id of a key; -1 where its score is -inf, whose bits make -0x7F800001."""
    block = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    return tl.where((key >> 32) > -0x7F800001, block, -1).to(tl.int32)

# ==== C. Prefill ==================================================================================
#
# A prompt of T tokens, or a step of training. _select_triton chooses: each program of _index_kernel holds a tile of
# index queries and walks over the blocks before them, with a running top S - 1 in registers, so that no score matrix
# is ever written. _attend_triton then attends. Up to QUERY_OUTER tokens one program a query reads its S blocks. Beyond,
# each block would be read by hundreds of queries, and the loop is turned around (the paper's KV-outer order):
#     _plan              sorts the (query, slot) pairs, called edges, by block, and cuts them into tasks of up to 256
#     _kv_outer_kernel   one task: K and V of its block are read once, for all its queries. Each edge's part of the
#                        output is written, normalised, with its log2-sum-exp
#     _combine_kernel    the query's own block, which needs no sorting, merged with the parts of its S - 1 others
# The parts are S - 1 times as large as the output, so that long prompts run in launches of at most 16384 queries.

QUERY_OUTER = 512  # queries a sequence up to which one program a query beats sorting them by block

# One program = ROWS (query, index head) pairs of one sequence against every earlier block; the longest start first.
@jit
def _index_kernel(
    qi,         # (B, T, HKV, DI)
    keys,       # (B * capacity, DI), a descriptor of tiles [L, DI]
    end,        # (B, capacity), or None
    block_end,  # (B, capacity / L), the largest end in a block, or None
    start,      # (B,), or None
    block_idx,  # (B, T, HKV, S), written
    T,
    capacity,   # slots from one sequence of keys to the next
    HKV: constexpr,
    DI: constexpr,
    L: constexpr,
    S: constexpr,
    TOP: constexpr,   # S - 1, rounded up to a power of two
    ROWS: constexpr,
):
    # which rows: the last tile has the longest way
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, TOP)
    base = b.to(tl.int64) * T * HKV
    first = 0 if start is None else tl.load(start + b)
    i = first + row // HKV
    mine = (row < T * HKV)[:, None]
    rows = (base + row)[:, None] * DI + tl.arange(0, DI)
    query = tl.load(qi + rows, mask=mine, other=0.0)                            # [ROWS, DI]
    last_row = tl.minimum((tile + 1) * ROWS, T * HKV) - 1
    n = (first + last_row // HKV) // L  # blocks before the last row's own

    # TOP blocks at a time are scored, then merged into the best so far
    best = tl.full([ROWS, TOP], NO_KEY, tl.int64)
    for first_blk in range(0, n, TOP):
        new = tl.full([ROWS, TOP], NOTHING, tl.float32)
        for blk in range(first_blk, tl.minimum(first_blk + TOP, n)):
            if end is None:
                key = keys.load([b * capacity + blk * L, 0])                    # [L, DI]
                score = tl.max(_matmul(query, key.T), 1)                        # [ROWS]
            else:
                score = tl.full([ROWS], NOTHING, tl.float32)
                if tl.load(block_end + b * tl.cdiv(capacity, L) + blk) > first + tile * ROWS // HKV:
                    key = keys.load([b * capacity + blk * L, 0])
                    s = _matmul(query, key.T)                                   # [ROWS, L]
                    last = tl.load(end + b.to(tl.int64) * capacity + blk * L + tl.arange(0, L))
                    score = tl.max(tl.where(i[:, None] < last, s, NOTHING), 1)
            # a block before i's own lies wholly before i: no other causal mask is needed
            score = tl.where(blk < i // L, score, NOTHING)
            new = tl.where(rank == blk - first_blk, score[:, None], new)
        # best is sorted downwards, key upwards. Place by place the larger of the two are the TOP best of both. They are
        # bitonic, rising at most once and falling at most once, read as a ring: the merge sorts such a row
        key = tl.sort(_key(_ranked(new), (first_blk + rank)[None]), 1, False)
        best = tl.bitonic_merge(tl.maximum(best, key), 1, True)

    # slot 0 is the own block, then come the best
    out = block_idx + (base + row)[:, None] * S
    tl.store(out + tl.zeros([1], tl.int32), (i // L)[:, None], mask=mine)
    tl.store(out + 1 + rank, _block_of(best), mask=mine & (rank < S - 1))

def _select_triton(qi, ki, S, L, end, start):
    B, T, Hkv, Di = qi.shape
    capacity, end = _lanes(end, ki=ki)
    block_end = None
    if end is not None:
        block_end = F.pad(end, (0, -capacity % L)).unflatten(1, (-1, L)).amax(2)
    block_idx = torch.empty(B, T, Hkv, S, dtype=torch.int32, device=qi.device)
    last = (B - 1) * capacity + ki.size(1)
    flat = ki.as_strided((last, Di), (Di, 1))
    rows = 128 if qi.is_cuda else 32
    _index_kernel[cdiv(T * Hkv, rows), B](
        qi=qi, keys=TensorDescriptor.from_tensor(flat, [L, Di]),
        end=end, block_end=block_end, start=start,
        block_idx=block_idx,
        T=T, capacity=capacity,
        HKV=Hkv, DI=Di, L=L, S=S,
        TOP=_power_of_2(S - 1, 2), ROWS=rows,
        # 128 registers a thread let two programs share a multiprocessor: one selects while the other multiplies
        num_warps=8, num_stages=2, maxnreg=128)
    return block_idx

# One program = one query and one KV head: the G query heads that share its keys, block by block.
@jit
def _query_outer_kernel(
    q,          # (B, T, HKV * G, D)
    k,          # (B, capacity, HKV, D)
    v,          # as k
    end,        # (B, capacity), or None
    start,      # (B,), or None
    block_idx,  # (B, T, HKV, S)
    out,        # as q, written
    stat,       # (B, T, HKV * G), log2-sum-exp, written; or None
    T,
    capacity,
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    L: constexpr,
    S: constexpr,
    ROWS: constexpr,  # G, rounded up to what a product takes
):
    SCALE: constexpr = D ** -0.5 * LOG2E
    bt = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    b = bt // T
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    first = 0 if start is None else tl.load(start + b)
    i = (bt % T + first).to(tl.int32)
    heads = (bt * HKV + h) * G
    rows = (heads + g)[:, None] * D + d
    mine = (g < G)[:, None]
    query = tl.load(q + rows, mask=mine, other=0.0)                             # [ROWS, D]

    # online softmax over the chosen blocks
    peak = tl.full([ROWS], LEAST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for slot in range(0, S):
        blk = tl.load(block_idx + (bt * HKV + h) * S + slot)
        j = blk * L + tl.arange(0, L)
        seen = (j >= 0) & (j <= i)
        seen = _visible(seen, i, end, b * capacity, j, seen)
        keys = _key_tile(b, j, h, capacity, HKV, D)
        key = tl.load(k + keys, mask=seen[:, None], other=0.0)                  # [L, D]
        p, new = _softmax_tile(_scores(query, key, SCALE), seen, peak)          # [ROWS, L]
        old = tl.exp2(peak - new)
        value = tl.load(v + keys, mask=seen[:, None], other=0.0)
        acc = acc * old[:, None] + _weigh(p, value)
        total = total * old + tl.sum(p, 1)
        peak = new

    tl.store(out + rows, _mean(acc, total), mask=mine)
    if stat is not None:
        tl.store(stat + heads + g, _log2_sum(peak, total), mask=g < G)

# One program = one task: queries that chose one block, ROWS // G of them at a time. K and V are read once for all.
@jit
def _kv_outer_kernel(
    q,      # (queries, HKV * G, D), of this launch
    k,      # (sequences, capacity, HKV, D)
    v,      # as k
    end,    # (sequences, capacity), or None
    first,  # (sequences,), index of the chunk's first query
    edges,  # (all edges,), ids of (query, head, slot), block after block
    tasks,  # (sequences, tasks, 4), head, block, first edge, end of the edges
    part,   # (queries * HKV * (S - 1) * G, D), written
    lse,    # (queries * HKV * (S - 1) * G,), written
    edge0,  # id of the launch's first edge
    n,      # queries a sequence of the launch
    capacity,
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    L: constexpr,
    S1: constexpr,  # S - 1, slots without the own block
    ROWS: constexpr,
):
    SCALE: constexpr = D ** -0.5 * LOG2E
    TOKENS: constexpr = ROWS // G
    c = tl.program_id(1)  # sequence of the launch
    task = tasks + (c * tl.num_programs(0) + tl.program_id(0)) * 4
    h = tl.load(task)
    blk = tl.load(task + 1)
    lo = tl.load(task + 2)
    hi = tl.load(task + 3)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    j = blk * L + tl.arange(0, L)
    if lo < hi:
        i0 = tl.load(first + c) - c * n
        keys = _key_tile(c.to(tl.int64), j, h, capacity, HKV, D)
        key = tl.load(k + keys)                                                 # [L, D]
        value = tl.load(v + keys)                                               # [L, D]
        for e in range(lo, hi, TOKENS):
            # gather the queries of TOKENS edges, G rows each
            mine = (e + r // G < hi) & (r < TOKENS * G)
            edge = tl.load(edges + e + r // G, mask=mine, other=0) - edge0  # (query, head, slot) within the launch
            rows = ((edge // S1).to(tl.int64) * G + r % G)[:, None] * D + d
            query = tl.load(q + rows, mask=mine[:, None], other=0.0)            # [ROWS, D]

            # the block is an earlier one, so that only `end` can hide a key of it
            score = _scores(query, key, SCALE)                                  # [ROWS, L]
            seen = None
            if end is not None:
                seen = (i0 + edge // S1 // HKV)[:, None] < tl.load(end + c * capacity + j)
            p, peak = _softmax_tile(score, seen, LEAST)
            total = tl.sum(p, 1)
            mean = _mean(_weigh(p, value), total)                               # [ROWS, D]

            # every (query, head, slot) owns its place: no atomics
            slot = edge.to(tl.int64) * G + r % G
            parts = part + slot[:, None] * D + d
            tl.store(parts, mean, mask=mine[:, None])
            tl.store(lse + slot, peak + tl.log2(total), mask=mine)

# One program = ROWS // G queries of one block and one KV head: their own block here, then the parts of the others.
@jit
def _combine_kernel(
    q,          # (queries, HKV * G, D), of this launch
    k,          # (sequences, capacity, HKV, D)
    v,          # as k
    end,        # (sequences, capacity), or None
    first,      # (sequences,), index of the chunk's first query
    block_idx,  # (queries, HKV, S1 + 1)
    part,       # (queries * HKV * S1 * G, D)
    lse,        # (queries * HKV * S1 * G,)
    out,        # as q, written
    stat,       # (queries, HKV * G), log2-sum-exp, written; or None
    n,          # queries a sequence of the launch
    capacity,
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    L: constexpr,
    S1: constexpr,  # S - 1, slots without the own block
    ROWS: constexpr,
):
    SCALE: constexpr = D ** -0.5 * LOG2E
    TOKENS: constexpr = ROWS // G
    TILES: constexpr = (L + TOKENS - 1) // TOKENS  # programs a block
    h = tl.program_id(1)
    c = tl.program_id(2)  # sequence of the launch
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)

    # which queries: tokens of one block, those of this launch
    i0 = tl.load(first + c)
    token = tl.program_id(0) % TILES * TOKENS + r // G  # within the block
    blk = i0 // L + tl.program_id(0) // TILES
    i = blk * L + token
    j = blk * L + tl.arange(0, L)
    t = (i - i0).to(tl.int64)
    mine = (token < L) & (r < TOKENS * G) & (t >= 0) & (t < n)
    t += c * n
    group = t * HKV + h
    own = tl.load(block_idx + group * (S1 + 1), mask=mine, other=-1)
    i = tl.where(own < 0, -1, i)  # no block, no key
    rows = (group * G + r % G)[:, None] * D + d
    query = tl.load(q + rows, mask=mine[:, None], other=0.0)                    # [ROWS, D]

    # the own block
    keys = _key_tile(c.to(tl.int64), j, h, capacity, HKV, D)
    held = j < i0 + n
    key = tl.load(k + keys, mask=held[:, None], other=0.0)                      # [L, D]
    score = _scores(query, key, SCALE)                                          # [ROWS, L]
    seen = _visible(j <= i[:, None], i[:, None], end, c * capacity, j, held)
    p, peak = _softmax_tile(score, seen, LEAST)
    total = tl.sum(p, 1)
    value = tl.load(v + keys, mask=held[:, None], other=0.0)
    acc = _weigh(p, value)                                                      # [ROWS, D]

    # what the other blocks gave
    for slot in tl.range(0, S1, num_stages=3):
        its_blk = tl.load(block_idx + group * (S1 + 1) + slot + 1, mask=mine, other=-1)
        chosen = mine & (its_blk >= 0)
        edge = group * S1 + slot
        weight = tl.load(lse + edge * G + r % G, mask=chosen, other=NOTHING)
        parts = part + (edge * G + r % G)[:, None] * D + d
        other = tl.load(parts, mask=chosen[:, None], other=0.0)                 # [ROWS, D]
        acc, total, peak = _merge(acc, total, peak, other, weight)

    mean = _mean(acc, total)
    tl.store(out + rows, mean, mask=mine[:, None])
    if stat is not None:
        tl.store(stat + group * G + r % G, _log2_sum(peak, total), mask=mine)

def _plan(blk, N, chunk_size, run):
    """Turn the choice around: which queries chose each block.

    blk  (B, T, Hkv, slots), block ids, -1 for none; cut into chunks of chunk_size queries of one sequence
    -> edges int32 (B * T * Hkv * slots,): ids of (query, head, slot) sorted by (chunk, head, block)
       tasks int32 (B * chunks, P, 4): head, block, and a range of at most `run` edges, empty in tasks without work
       ends  int64 (B * chunks, Hkv * N): tasks up to a (head, block)'s last
    P is a bound known to the host, so nothing is read back.
    """
    B, T, Hkv, slots = blk.shape
    device = blk.device
    chunks = B * cdiv(T, chunk_size)
    buckets = Hkv * N  # a bucket: one head's one block
    P = chunk_size * Hkv * slots // run + buckets

    # sort the edges by bucket; those of block -1 come last
    chunk_of = torch.arange(T, device=device) // chunk_size
    chunk_of = chunk_of + torch.arange(B, device=device)[:, None] * (chunks // B)  # (B, T)
    bucket = chunk_of[..., None] * Hkv + torch.arange(Hkv, device=device)       # (B, T, Hkv)
    bucket = torch.where(blk < 0, chunks * buckets, bucket[..., None] * N + blk)  # (B, T, Hkv, slots)
    small = torch.int16 if chunks * buckets < 2 ** 15 else torch.int32  # sorted in half the passes
    bucket, edges = bucket.to(small).flatten().sort(stable=True)

    # a bucket's edges begin at its offset, and make so many tasks
    offset = torch.searchsorted(bucket, torch.arange(chunks * buckets + 1, device=device, dtype=small))
    first = offset[:-1].view(chunks, buckets)
    last = offset[1:].view(chunks, buckets)
    count = cdiv(last - first, run)
    ends = count.cumsum(1)

    # the p-th task of a chunk: its bucket, and which of the bucket's tasks it is
    p = torch.arange(P, device=device)
    bucket = torch.searchsorted(ends, p.expand(chunks, P).contiguous(), right=True)
    real = bucket < buckets
    bucket = bucket.clamp(max=buckets - 1)
    nth = p - (ends - count).gather(1, bucket)
    lo = first.gather(1, bucket) + nth * run
    hi = torch.minimum(lo + run, last.gather(1, bucket))
    hi = torch.where(real, hi, lo)
    tasks = torch.stack([bucket // N, bucket % N, lo, hi], -1)
    return edges.int(), tasks.int(), ends

@dataclass
class Launch:
    """The queries of one launch: whole sequences, or a part of one. A chunk is what it holds of one sequence."""
    chunk: int     # the first chunk
    sequence: int  # the first sequence
    count: int     # chunks
    rows: slice    # queries, of all B * T

    def queries(self, x):
        """(B, T, …) or None -> its queries, (queries, …)."""
        return None if x is None else x.flatten(0, 1)[self.rows]

    def keys(self, x):
        """(B, capacity, …) or None -> from its first sequence on."""
        return None if x is None else x[self.sequence:]

def _launches(B, T, most):
    """Cut the queries into launches of at most `most`; the first is the largest -> queries a chunk, launches."""
    launches = []
    if T > most:  # a sequence takes several launches
        for b in range(B):
            for t in range(0, T, most):
                rows = slice(b * T + t, b * T + min(T, t + most))
                launches.append(Launch(len(launches), b, 1, rows))
        return most, launches
    step = most // T
    for b in range(0, B, step):
        count = min(step, B - b)
        launches.append(Launch(b, b, count, slice(b * T, (b + count) * T)))
    return T, launches

def _attend_triton(q, k, v, block_idx, L, end, start, stat=None, most=16384, run=256):
    """msa_attention, at most `most` queries a launch and `run` edges a task -> (B, T, H, D).
    stat (B, T, H) fp32, or None, receives the log2-sum-exp of each query head."""
    B, T, H, D = q.shape
    Tk, Hkv = k.shape[1:3]
    G, S = H // Hkv, block_idx.size(3)
    out = torch.empty_like(q)
    capacity, end = _lanes(end, k=k, v=v)
    if T <= QUERY_OUTER:
        _query_outer_kernel[B * T, Hkv](
            q=q, k=k, v=v, end=end, start=start,
            block_idx=block_idx, out=out, stat=stat,
            T=T, capacity=capacity,
            HKV=Hkv, G=G, D=D, L=L, S=S,
            ROWS=_power_of_2(G, 16), num_stages=2)
        return out

    # which queries chose each block, and memory for the parts of one launch
    if T <= most:  # several short sequences share a launch
        most = max(T, 2 ** 20 // H)
    size, launches = _launches(B, T, most)
    edges, tasks, _ = _plan(block_idx[..., 1:], cdiv(Tk, L), size, run)
    parts = launches[0].rows.stop * H * (S - 1)
    part = torch.empty(parts, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(parts, device=q.device)
    first = torch.arange(0, T, size, dtype=torch.int32, device=q.device)
    first = first.repeat(B, 1) if start is None else first + start[:, None]
    first = first.flatten()

    rows = _power_of_2(G, 64)
    own_rows = rows
    if G & (G - 1) != 0:  # 64 rows of 10 tokens by 6 heads spill registers
        own_rows = max(128, rows)
    tiles = cdiv(L, own_rows // G)  # programs of _combine_kernel a block
    for launch in launches:
        queries = launch.queries(q)
        n = len(queries) // launch.count
        shared = dict(
            q=queries, k=launch.keys(k), v=launch.keys(v), end=launch.keys(end),
            first=first[launch.chunk:], part=part, lse=lse,
            n=n, capacity=capacity,
            HKV=Hkv, G=G, D=D, L=L, S1=S - 1)
        _kv_outer_kernel[tasks.size(1), launch.count](
            edges=edges, tasks=tasks[launch.chunk], edge0=launch.rows.start * Hkv * (S - 1),
            ROWS=rows, num_stages=3, **shared)
        _combine_kernel[(n // L + 2) * tiles, Hkv, launch.count](
            block_idx=launch.queries(block_idx), out=launch.queries(out), stat=launch.queries(stat),
            ROWS=own_rows, num_warps=own_rows // 16, **shared)
    return out

# ==== D. Training =================================================================================
#
# _Train is one autograd function for attention and the index branch's KL. Forward: prefill's kernels, which also leave
# each query's log2-sum-exp `stat`; then the KL and its gradient, since both need the same scores. Backward: dQ, dK, dV.
#     _index_lse_kernel   for each edge (a query and one of its blocks): log2-sum-exp of the index scores there
#     _index_kl_kernel    index softmax and teacher from those sums, the KL, and its gradient for qi and ki
#     _dot_kernel         delta = out . dout, which the gradient of a softmax subtracts (FlashAttention-2, 2307.08691)
#     _backward_kernel    dK and dV of one block, and parts of dQ, from recomputed probabilities
# All but _dot_kernel walk over tasks, as _kv_outer_kernel does: a block, and up to `run` of the queries that chose it.
# What a task gives to its keys and an edge to its query is written to a place of its own, then summed in a fixed order
# by _task_sum_kernel and _slot_sum_kernel. There are no atomics, so that two runs give equal bits.
# Score tiles are transposed, keys by queries: the products for dK and dV then need no transposed operand.

@jit
def _task(tasks):
    """This program's task, in a grid of (tasks, sequences): its place, head, block, and range of edges."""
    n = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tasks += n * 4
    h = tl.load(tasks)
    blk = tl.load(tasks + 1)
    lo = tl.load(tasks + 2)
    hi = tl.load(tasks + 3)
    return n, h, blk, lo, hi

@jit
def _seen_by(i, j, mine, end, base, capacity):
    """Which keys j [L] the queries i [rows] see, where mine [rows]: [L, rows]."""
    seen = (j[:, None] <= i[None]) & mine[None]
    if end is not None:
        last = tl.load(end + base + j, mask=j < capacity, other=0)
        seen = seen & (i[None] < last[:, None])
    return seen

# One program = one task: queries that chose one block, ROWS // G of them at a time: dK and dV, and parts of dQ.
@jit
def _backward_kernel(
    q,      # (queries, HKV * G, D), of this launch
    k,      # (sequences, capacity, HKV, D)
    v,      # as k
    dout,   # as q
    stat,   # (queries, HKV * G), log2-sum-exp
    delta,  # (queries, HKV * G), out . dout
    end,    # (sequences, capacity), or None
    edges,  # (all edges,), ids of (query, head, slot), block after block
    tasks,  # (sequences, tasks, 4), head, block, first edge, end of the edges
    dq,     # (queries * HKV * S * G, D), written
    dk,     # (sequences * tasks * L, D), written
    dv,     # as dk
    edge0,  # id of the launch's first edge
    T,      # queries a sequence
    capacity,
    first_query,  # index of a sequence's first query
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    L: constexpr,
    S: constexpr,
    ROWS: constexpr,
):
    TOKENS: constexpr = ROWS // G
    c = tl.program_id(1).to(tl.int64)  # sequence of the launch
    n, h, blk, lo, hi = _task(tasks)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    j = blk * L + tl.arange(0, L)
    if lo < hi:
        keys = _key_tile(c, j, h, capacity, HKV, D)
        held = (j < capacity)[:, None]
        key = tl.load(k + keys, mask=held, other=0.0)                           # [L, D]
        value = tl.load(v + keys, mask=held, other=0.0)                         # [L, D]
        dkey = tl.zeros([L, D], tl.float32)
        dvalue = tl.zeros([L, D], tl.float32)
        for e in range(lo, hi, TOKENS):
            # the queries of TOKENS edges, G rows each
            mine = (e + r // G < hi) & (r < TOKENS * G)
            edge = tl.load(edges + e + r // G, mask=mine, other=0) - edge0  # (query, head, slot) within the launch
            head = edge // S * G + r % G
            i = first_query + (edge + edge0) // S // HKV % T
            rows = head[:, None] * D
            query = tl.load(q + rows + d, mask=mine[:, None], other=0.0)        # [ROWS, D]

            # their probabilities, and dV += p dout
            score = _scores(key, query, D ** -0.5 * LOG2E)                      # [L, ROWS]
            seen = _seen_by(i, j, mine, end, c * capacity, capacity)
            log_sum = tl.load(stat + head, mask=mine, other=0.0)
            p = tl.where(seen, tl.exp2(score - log_sum[None]), 0.0)
            dy = tl.load(dout + rows + d, mask=mine[:, None], other=0.0)        # [ROWS, D]
            dvalue += _matmul(p.to(query.dtype), dy)

            # the softmax's gradient, ds = p (dp - delta); dK += ds q, and dQ = ds^T k
            dp = _matmul(value, dy.T)                                           # [L, ROWS]
            mean = tl.load(delta + head, mask=mine, other=0.0)
            ds = tl.where(seen, p * (dp - mean[None]), 0.0).to(query.dtype)
            dkey += _matmul(ds, query)
            dx = _matmul(ds.T, key) * D ** -0.5                                 # [ROWS, D]
            parts = dq + (edge * G + r % G)[:, None] * D + d
            tl.store(parts, dx, mask=mine[:, None])

        place = (n * L + tl.arange(0, L))[:, None] * D + d
        tl.store(dk + place, dkey * D ** -0.5)
        tl.store(dv + place, dvalue)

@jit
def _index_queries(
    qi,
    end,
    first_query,
    edges,
    e,
    hi,
    edge0,
    j,
    b,
    T,
    capacity,
    HKV: constexpr,
    DI: constexpr,
    S: constexpr,
    COLS: constexpr,
    TOKENS: constexpr,
    STRIDE: constexpr,
):
    """Up to TOKENS edges from e on, as columns of a tile -> which are real [COLS], their ids in the launch [COLS],
    which keys j [L] they see [L, COLS], their index queries [COLS, DI]."""
    c = tl.arange(0, COLS)
    mine = (e + c < hi) & (c < TOKENS)
    edge = tl.load(edges + e + c, mask=mine, other=0) - edge0
    i = first_query + (edge + edge0) // S // HKV % T * STRIDE + STRIDE - 1
    seen = _seen_by(i, j, mine, end, b * capacity, capacity)
    rows = (edge // S)[:, None] * DI
    query = tl.load(qi + rows + tl.arange(0, DI), mask=mine[:, None], other=0.0)
    return mine, edge, seen, query

# One program = one task: the log2-sum-exp of the index scores of each of its edges.
@jit
def _index_lse_kernel(
    qi,     # (queries, HKV, DI), of this launch
    ki,     # (sequences, capacity, DI)
    end,    # (sequences, capacity), or None
    edges,  # (all edges,), ids of (query, head, slot), block after block
    tasks,  # (sequences, tasks, 4), head, block, first edge, end of the edges
    lse,    # (queries, HKV, S), written
    edge0,  # id of the launch's first edge
    T,      # queries a sequence, those that learn
    capacity,
    first_query,  # index of a sequence's first query
    HKV: constexpr,
    DI: constexpr,
    L: constexpr,
    S: constexpr,
    COLS: constexpr,    # edges at a time
    STRIDE: constexpr,  # every so many queries one learns, and is here
):
    b = tl.program_id(1).to(tl.int64)  # sequence of the launch
    n, h, blk, lo, hi = _task(tasks)
    j = blk * L + tl.arange(0, L)
    if lo < hi:
        keys = ki + (b * capacity + j)[:, None] * DI + tl.arange(0, DI)
        key = tl.load(keys, mask=(j < capacity)[:, None], other=0.0)            # [L, DI]
        for e in range(lo, hi, COLS):
            mine, edge, seen, query = _index_queries(
                qi, end, first_query, edges, e, hi, edge0, j, b, T, capacity, HKV, DI, S, COLS, COLS, STRIDE)
            score = _scores(key, query, DI ** -0.5 * LOG2E)                     # [L, COLS]
            score = tl.where(seen, score, NOTHING)
            peak = tl.maximum(tl.max(score, 0), LEAST)
            total = tl.sum(tl.exp2(score - peak[None]), 0)
            tl.store(lse + edge, peak + tl.log2(total), mask=mine)

# One program = one task: the KL of each of its edges and its gradient. The teacher, the mean over G heads, is a product
# with a matrix of zeros and ones.
@jit
def _index_kl_kernel(
    q,           # (queries, HKV * G, D), of this launch
    k,           # (sequences, capacity, HKV, D)
    qi,          # (queries, HKV, DI)
    ki,          # (sequences, capacity, DI)
    stat,        # (queries, HKV * G), log2-sum-exp of the main scores
    index_stat,  # (queries, HKV), that of the index scores
    share,       # (queries,), a query's share in the sum
    end,         # (sequences, capacity), or None
    edges,       # (all edges,), ids of (query, head, slot), block after block
    tasks,       # (sequences, tasks, 4), head, block, first edge, end of the edges
    kl,          # (queries, HKV, S), written
    dqi,         # (queries * HKV * S, DI), written
    dki,         # (sequences * tasks * L, DI), written
    edge0,       # id of the launch's first edge
    T,           # queries a sequence, those that learn
    capacity,
    first_query,  # index of a sequence's first query
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    DI: constexpr,
    L: constexpr,
    S: constexpr,
    ROWS: constexpr,    # rows of the main branch at a time, G an edge
    COLS: constexpr,    # ROWS // G, rounded up to what a product takes
    STRIDE: constexpr,  # every so many queries one learns, and is here
):
    TOKENS: constexpr = ROWS // G
    WIDE: constexpr = tl.float16 if q.dtype.element_ty == tl.bfloat16 else q.dtype.element_ty  # tf32: a biased mean
    b = tl.program_id(1).to(tl.int64)  # sequence of the launch
    n, h, blk, lo, hi = _task(tasks)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    j = blk * L + tl.arange(0, L)
    d = tl.arange(0, D)
    di = tl.arange(0, DI)
    if lo < hi:
        held = (j < capacity)[:, None]
        index_keys = ki + (b * capacity + j)[:, None] * DI + di
        index_key = tl.load(index_keys, mask=held, other=0.0)                   # [L, DI]
        keys = _key_tile(b, j, h, capacity, HKV, D)
        key = tl.load(k + keys, mask=held, other=0.0)                           # [L, D]
        dkey = tl.zeros([L, DI], tl.float32)
        for e in range(lo, hi, TOKENS):
            # index scores: a column is an edge
            mine, edge, seen, index_query = _index_queries(
                qi, end, first_query, edges, e, hi, edge0, j, b, T, capacity, HKV, DI, S, COLS, TOKENS, STRIDE)
            score = _scores(index_key, index_query, DI ** -0.5 * LOG2E)         # [L, COLS]

            # teacher: a row is a head of an edge. Its p are at most 1 where visible; elsewhere they could be inf, and
            # 0 * inf in the product below NaN
            own = (e + r // G < hi) & (r < TOKENS * G)
            head_edge = tl.load(edges + e + r // G, mask=own, other=0) - edge0
            head = head_edge // S * G + r % G
            rows = head[:, None] * D
            query = tl.load(q + rows + d, mask=own[:, None], other=0.0)         # [ROWS, D]
            p = _scores(key, query, D ** -0.5 * LOG2E)                          # [L, ROWS]
            log_sum = tl.load(stat + head, mask=own, other=float("inf"))
            p = tl.exp2(tl.minimum(p - log_sum[None], 0.0))
            group = (r[:, None] // G == c[None]) & own[:, None]                 # [ROWS, COLS]
            group = tl.where(group, 1.0, 0.0).to(WIDE)
            p = _matmul(p.to(WIDE), group) / G                                  # [L, COLS]
            p = tl.where(seen, p, 0.0)

            # KL
            weight = tl.load(share + (edge // S // HKV), mask=mine, other=0.0)
            score -= tl.load(index_stat + edge // S, mask=mine, other=0.0)[None]
            log_p = tl.log2(tl.maximum(p, TINY))
            terms = tl.where(p > 0, p * (log_p - score), 0.0)
            tl.store(kl + edge, tl.sum(terms, 0) * weight * LN2, mask=mine)

            # gradients: index softmax - teacher
            ds = tl.where(seen, tl.exp2(score) - p, 0.0)                        # [L, COLS]
            ds = (ds * (weight * DI ** -0.5)[None]).to(index_query.dtype)
            dkey += _matmul(ds, index_query)
            dx = _matmul(ds.T, index_key)                                       # [COLS, DI]
            parts = dqi + edge[:, None] * DI + di
            tl.store(parts, dx, mask=mine[:, None])

        parts = dki + (n * L + tl.arange(0, L))[:, None] * DI + di
        tl.store(parts, dkey)

# One program = one block and KV head: the parts of a gradient of its keys, task after task, always in this order.
@jit
def _task_sum_kernel(
    part,  # (sequences * P * L, D)
    ends,  # (sequences, HKV * blocks), tasks up to a block's last
    out,   # (sequences, T, HKV, D), added to
    P,     # tasks a sequence
    T,
    HKV: constexpr,
    D: constexpr,
    L: constexpr,
):
    blk = tl.program_id(0)
    h = tl.program_id(1)
    c = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    j = blk * L + tl.arange(0, L)
    bucket = h * tl.num_programs(0) + blk
    ends += c * HKV * tl.num_programs(0)
    lo = tl.load(ends + bucket - 1, mask=bucket > 0, other=0)
    hi = tl.load(ends + bucket)
    if lo < hi:
        rows = _key_tile(c, j, h, T, HKV, D)
        held = (j < T)[:, None]
        acc = tl.load(out + rows, mask=held, other=0.0)                         # [L, D]
        parts = part + (c * P + lo) * L * D
        parts = parts + tl.arange(0, L)[:, None] * D + d
        for _ in range(lo, hi):
            acc += tl.load(parts)
            parts += L * D
        tl.store(out + rows, acc, mask=held)

# One program = ROWS rows: a . b of each.
@jit
def _dot_kernel(
    a,    # (n, D)
    b,    # (n, D)
    out,  # (n,), written
    n,
    D: constexpr,
    ROWS: constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = r[:, None] * D + tl.arange(0, D)
    held = r < n
    x = tl.load(a + place, mask=held[:, None], other=0.0)                       # [ROWS, D]
    y = tl.load(b + place, mask=held[:, None], other=0.0)
    x = x.to(out.dtype.element_ty)
    tl.store(out + r, tl.sum(x * y, 1), mask=held)

# One program = one or more (query, KV head) rows: the parts of a gradient of a query, summed over the slots.
@jit
def _slot_sum_kernel(
    part,       # (n * S * G, D)
    block_idx,  # (n, S)
    out,        # (n * G, D), written
    n,          # rows: queries * HKV
    G: constexpr,
    D: constexpr,
    S: constexpr,
    ROWS: constexpr,
):
    d = tl.arange(0, D)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = place // G
    g = place % G
    mine = row < n
    acc = tl.zeros([ROWS, D], tl.float32)
    for slot in tl.range(0, S, num_stages=3):
        blk = tl.load(block_idx + row * S + slot, mask=mine, other=-1)
        chosen = mine & (blk >= 0)
        parts = part + ((row * S + slot) * G + g)[:, None] * D + d
        acc += tl.load(parts, mask=chosen[:, None], other=0.0)
    heads = out + (row * G + g)[:, None] * D + d
    tl.store(heads, acc, mask=mine[:, None])

class _Train(torch.autograd.Function):
    """Attention over chosen blocks and the index branch's KL, with gradients. No atomics: two runs, equal bits."""

    @staticmethod
    def forward(ctx, q, k, v, qi, ki, block_idx, L, end, share, stride, start):
        stat = torch.empty(q.shape[:3], device=q.device)
        out = _attend_triton(q, k, v, block_idx, L, end, starts(start, q), stat)
        every = slice(stride - 1, None, stride)  # the queries from which the index branch learns
        learning = (x[:, every].contiguous() for x in (q, qi, stat, block_idx))
        kl, *ctx.index = _kl_triton(*learning, k, ki, L, end, share, stride, start)
        ctx.L, ctx.end, ctx.stride, ctx.start = L, end, stride, start
        ctx.save_for_backward(q, k, v, block_idx, out, stat)
        return out, kl

    @staticmethod
    def backward(ctx, dout, dkl):
        learning, dki = ((dkl * x).to(x.dtype) for x in ctx.index)
        dqi = learning.new_zeros(*dout.shape[:2], *learning.shape[2:])
        dqi[:, ctx.stride - 1::ctx.stride] = learning
        main = _attend_backward(*ctx.saved_tensors, dout.contiguous(), ctx.L, ctx.end, ctx.start)
        return *main, dqi, dki, *[None] * 6

def _chunks(q, block_idx, N, width, run=1024, most=2 ** 19):
    """Sort the queries of each chunk by all their blocks, own one included, at most `most` query heads a launch, and
    up to `run` queries a task -> launches, and the plan: edges, tasks, ends. Offsets within a launch are int32: a query
    has S parts of `width` elements."""
    B, T, H, D = q.shape
    limit = (2 ** 31 - 1) // (block_idx.size(3) * width)
    size, launches = _launches(B, T, max(1, min(most // H, limit)))
    return launches, *_plan(block_idx, N, size, run)

def _kl_triton(q, qi, stat, block_idx, k, ki, L, end, share, stride, start):
    """The KL and its gradient, for the t queries that learn, every stride-th from start on.

    q (B, t, H, D), qi (B, t, Hkv, Di), block_idx (B, t, Hkv, S)
    stat   (B, t, H), log2-sum-exp of the main scores
    share  (B, t), a query's share in the sum
    start  index of the first query, or None
    -> KL, dqi, dki
    """
    B, t, H, D = q.shape
    Hkv, S = block_idx.shape[2:]
    Tk, Di = ki.shape[1:]
    G = H // Hkv
    kl = torch.zeros((), device=q.device)
    dqi = torch.empty_like(qi)
    dki = torch.zeros(B, Tk, Hkv, Di, device=q.device)
    if t == 0:
        return kl, dqi, dki.sum(2).to(ki.dtype)
    block_idx = torch.where(share[..., None, None] == 0, -1, block_idx)  # a pad learns nothing: no task
    width = max(H * D, Hkv * Di)
    launches, edges, tasks, ends = _chunks(q, block_idx, cdiv(Tk, L), width)
    P = tasks.size(1)
    parts = launches[0].rows.stop * Hkv * S
    part = torch.empty(parts, Di, dtype=q.dtype, device=q.device)
    key_part = torch.empty(launches[0].count * P * L, Di, device=q.device)

    # a row that saw a NaN has it in its sums of exponentials, and from there in all it gives: elsewhere NaN may go
    spoilt = stat.isnan().unflatten(2, (Hkv, G)).any(3)                         # (B, t, Hkv)
    spoilt &= (share != 0)[..., None]
    clean_q, clean_qi, clean_k, clean_ki, clean_stat = (_finite(x) for x in (q, qi, k, ki, stat))
    rows = _power_of_2(G, 64)
    for launch in launches:
        shared = dict(
            end=launch.keys(end), edges=edges, tasks=tasks[launch.chunk],
            edge0=launch.rows.start * Hkv * S, T=t, capacity=Tk, first_query=start or 0,
            HKV=Hkv, DI=Di, L=L, S=S,
            STRIDE=stride, num_stages=2)

        # the sums of exponentials, block by block and then over a query's blocks
        queries = launch.queries(qi)
        lse = torch.full((len(queries), Hkv, S), float("-inf"), device=q.device)
        _index_lse_kernel[P, launch.count](
            qi=queries, ki=launch.keys(ki), lse=lse,
            COLS=64, num_warps=4, **shared)
        index_stat = (lse * math.log(2)).logsumexp(-1) * math.log2(math.e)
        index_stat.masked_fill_(launch.queries(spoilt), float("nan"))

        # KL and gradients; an edge without keys writes none
        value = torch.zeros_like(lse)
        _index_kl_kernel[P, launch.count](
            q=launch.queries(clean_q), k=launch.keys(clean_k),
            qi=launch.queries(clean_qi), ki=launch.keys(clean_ki),
            stat=launch.queries(clean_stat), index_stat=index_stat, share=launch.queries(share),
            kl=value, dqi=part, dki=key_part,
            G=G, D=D,
            ROWS=rows, COLS=_power_of_2(rows // G, 16), num_warps=8, **shared)
        kl += value.masked_fill_(index_stat.isnan()[..., None], float("nan")).sum()
        _sum_tasks(key_part, ends[launch.chunk], launch.keys(dki), P, launch.count, L)
        _sum_slots(part, launch.queries(block_idx), launch.queries(dqi), 1)
    return kl, dqi, dki.sum(2).to(ki.dtype)

def _attend_backward(q, k, v, block_idx, out, stat, dout, L, end, start):
    """-> dq, dk, dv of _attend_triton, whose `out` and `stat` are those of the forward pass."""
    B, T, H, D = q.shape
    Tk = k.size(1)
    Hkv, S = block_idx.shape[2:]
    G = H // Hkv
    delta = torch.empty_like(stat)
    heads = delta.numel()
    _dot_kernel[cdiv(heads, 64),](a=out, b=dout, out=delta, n=heads, D=D, ROWS=64)
    launches, edges, tasks, ends = _chunks(q, block_idx, cdiv(Tk, L), H * D)
    P = tasks.size(1)
    dq = torch.empty_like(q)
    dk = torch.zeros(k.shape, device=q.device)
    dv = torch.zeros(k.shape, device=q.device)
    parts = launches[0].rows.stop * H * S
    part = torch.empty(parts, D, dtype=q.dtype, device=q.device)
    key_part = torch.empty(launches[0].count * P * L, D, device=q.device)
    value_part = torch.empty_like(key_part)
    rows = 64
    if G & (G - 1) != 0:  # 64 rows of 10 tokens by 6 heads spill registers
        rows = 32
    q, k, v = _finite(q), _finite(k), _finite(v)  # a row that saw a NaN has it in stat or delta, and so in all it gives
    for launch in launches:
        _backward_kernel[P, launch.count](
            q=launch.queries(q), k=launch.keys(k), v=launch.keys(v), dout=launch.queries(dout),
            stat=launch.queries(stat), delta=launch.queries(delta), end=launch.keys(end),
            edges=edges, tasks=tasks[launch.chunk],
            dq=part, dk=key_part, dv=value_part,
            edge0=launch.rows.start * Hkv * S, T=T, capacity=Tk, first_query=start or 0,
            HKV=Hkv, G=G, D=D, L=L, S=S,
            ROWS=_power_of_2(G, rows), num_warps=8, num_stages=2)
        _sum_tasks(key_part, ends[launch.chunk], launch.keys(dk), P, launch.count, L)
        _sum_tasks(value_part, ends[launch.chunk], launch.keys(dv), P, launch.count, L)
        _sum_slots(part, launch.queries(block_idx), launch.queries(dq), G)
    return dq, dk.to(k.dtype), dv.to(v.dtype)

def _sum_tasks(part, ends, out, P, count, L):
    """Add to out (sequences, T, Hkv, D) what the P tasks of each of the first `count` sequences gave to their keys."""
    T, Hkv, D = out.shape[1:]
    _task_sum_kernel[cdiv(T, L), Hkv, count](
        part=part, ends=ends, out=out,
        P=P, T=T,
        HKV=Hkv, D=D, L=L, num_warps=8)

def _sum_slots(part, block_idx, out, G):
    """Sum what the slots of block_idx (n, Hkv, S) gave to their queries: out (n, Hkv * G, D)."""
    n, Hkv, S = block_idx.shape
    rows = n * Hkv
    _slot_sum_kernel[cdiv(rows * G, 16),](
        part=part, block_idx=block_idx, out=out,
        n=rows,
        G=G, D=out.size(-1), S=S, ROWS=16)

# ==== E. Decode ===================================================================================
#
# A step of generation: each sequence has T <= NEW new tokens, and a cache of `length` others. T is more than 1 where
# drafts, tokens that were guessed, are verified. Reading memory is all that takes time. Three kernels, or two where
# index keys are not int8:
#     _scan_kernel     reads every index key once, for all heads and drafts. The blocks are cut into runs, neighbours
#                      of about equal number, a program each: it writes the score of every block, and its run's best
#     _rescore_kernel  certified int8, section F: the scan gave bounds, these are the exact scores where it matters
#     _attend_kernel   S programs for each query and KV head. Each finds the block of its rank, from the bests of the
#                      runs first, attends to it, and writes a part; the last one to arrive merges the S parts
# Each kernel may start while the one before still runs (programmatic dependent launch, PDL): it waits where it first
# reads what that one wrote. Full attention, the baseline, splits the keys over programs instead: _dense_kernel writes
# parts and _dense_sum_kernel merges them (Flash-Decoding). A row is one (sequence, draft, KV head).
#
# Grids depend on static sizes, and a row's sums on the row alone: a token has the same bits alone, in a batch, and as
# one of T drafts. So a block's score does not depend on its run, nor a part of full attention on what is past i.

NEW = 8                   # new tokens of a sequence at most: beyond, a prompt's kernels serve
PROGRAMS = 264            # full attention's decode splits a sequence into as many: two a multiprocessor of an H200
AT_ONCE = constexpr(264)  # programs of the scan that run at once there

@jit
def _queries(qi, length, b, T, HKV: constexpr, DI: constexpr, COLS: constexpr):
    """The T * HKV index queries of sequence b as columns [DI, COLS], and each column's own index i, -1 for none."""
    c = tl.arange(0, COLS)
    mine = c < T * HKV
    row = b.to(tl.int64) * T * HKV + c
    columns = row[None] * DI + tl.arange(0, DI)[:, None]
    query = tl.load(qi + columns, mask=mine, other=0.0)
    return query, tl.where(mine, tl.load(length + b) + c // HKV, -1)

@jit
def _block_scores(query, key, end, i, b, blk, capacity, L: constexpr):
    """Scores [COLS] of one block: max over its keys [L, DI] of k . q, -inf where invisible. Scan and rescoring share
    it, tile and order of summation included, so that their scores are equal to the last bit."""
    score = _matmul(key, query)                                                 # [L, COLS]
    if end is not None:
        last = tl.load(end + b.to(tl.int64) * capacity + blk * L + tl.arange(0, L))
        score = tl.where(i[None] < last[:, None], score, NOTHING)
    return tl.where(blk < i // L, tl.max(score, 0), NOTHING)

@jit
def _run_start(run, n, runs):
    """The n blocks before the last query's own, cut into runs of about equal length: the first block of a run."""
    return (run.to(tl.int64) * n // runs).to(tl.int32)

@jit
def _prefetch(start, n, MOST: constexpr):
    """Loads a byte of every 64 of the first n elements, MOST at most, which brings them all to the L2: a prefetch
    instruction would bring a fourth (measured). The values are dropped, so that none can be stale."""
    STEP: constexpr = 512 // start.dtype.element_ty.primitive_bitwidth
    place = tl.minimum(tl.arange(0, MOST // STEP) * STEP, n - 1)
    place = (start + place).to(tl.int64)
    tl.inline_asm_elementwise("ld.volatile.global.u8 $0, [$1];", "=r,l", [place], tl.int32, is_pure=False, pack=1)

# One program = one run of blocks of one sequence, for all its queries and index heads.
@jit
def _scan_kernel(
    qi,           # (B, T, HKV, DI)
    ki,           # (B, capacity, DI), or their int8 copy
    scale,        # (B, capacity), of the int8 copy, or None
    slack,        # (B, N), of the int8 copy, or None
    end,          # (B, capacity), or None
    length,       # (B,)
    block_score,  # (rows, N), written: scores, or upper bounds
    run_best,     # (rows, runs), written: the maximum of each run
    run_upper,    # (rows, runs), int8 alone: the same again, since rescoring writes run_best
    run_lower,    # (rows, runs), int8 alone: the best lower bound of each run
    done,         # (rows,), set to 0: the parts that _attend_kernel has finished
    T,
    capacity,
    HKV: constexpr,
    DI: constexpr,
    L: constexpr,
    RUN: constexpr,   # blocks of a run, rounded up
    COLS: constexpr,  # T * HKV, rounded up
    PDL: constexpr,
):
    run = tl.program_id(0)
    b = tl.program_id(1)
    runs = tl.num_programs(0)
    N = tl.cdiv(capacity, L)
    c = tl.arange(0, COLS)
    g = tl.arange(0, RUN)

    # while the kernel before still runs, bring the first keys to the L2
    if PDL:
        n = (tl.load(length + b, volatile=True) + T - 1) // L  # read again after the wait
        n = tl.minimum(n, capacity // L)
        lo = _run_start(run, n, runs)
        hi = _run_start(run + 1, n, runs)
        if (lo < hi) & (b == 0) & (run < AT_ONCE):  # later programs find the memory busy
            keys = ki + lo.to(tl.int64) * L * DI
            _prefetch(keys, (hi - lo) * L * DI, 2 * L * DI)
        tl.extra.cuda.gdc_wait()

    # the blocks of this run, and the queries
    n = (tl.load(length + b) + T - 1) // L
    lo = _run_start(run, n, runs)
    hi = _run_start(run + 1, n, runs)
    query, i = _queries(qi, length, b, T, HKV, DI, COLS)
    score = tl.full([COLS, RUN], NOTHING, tl.float32)
    if scale is not None:
        high, low, norm, unit = _digits(query)
        least = tl.full([L, COLS], NOTHING, tl.float32)
        held = tl.full([L], lo, tl.int32) < hi  # as a block: triton 3.9's interpreter takes no scalar as its mask
        first = scale + b.to(tl.int64) * capacity + lo * L
        step = tl.load(first + tl.arange(0, L), mask=held, other=0.0)           # [L]
        margin = tl.load(slack + b * N + lo, mask=lo < hi, other=0.0)

    # block after block
    for blk in range(lo, hi):
        j = b.to(tl.int64) * capacity + blk * L + tl.arange(0, L)
        key = tl.load(ki + j[:, None] * DI + tl.arange(0, DI))                  # [L, DI]
        if scale is None:
            best = _block_scores(query, key, end, i, b, blk, capacity, L)       # [COLS]
        else:
            wide = norm * margin                                                # [COLS]
            this = step.to(tl.float32)[:, None] * 2.0 ** -30  # the products below stay finite
            # one ahead: too small to be pipelined
            more = tl.full([L], blk + 1, tl.int32) < hi
            step = tl.load(scale + j + L, mask=more, other=0.0)
            margin = tl.load(slack + b * N + blk + 1, mask=blk + 1 < hi, other=0.0)
            s = _digit_scores(key, high, low)                                   # [L, COLS]
            seen = tl.broadcast_to((blk < i // L)[None], [L, COLS])
            if end is not None:
                seen = seen & (i[None] < tl.load(end + j)[:, None])
            least = tl.maximum(least, tl.where(seen, (s - wide[None]) * this, NOTHING))
            best = tl.max(tl.where(seen, (s + wide[None]) * this, NOTHING), 0)  # [COLS]
        score = tl.where(g == blk - lo, best[:, None], score)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # not earlier: waiting programs would take room from this kernel's

    # write; the keys that other programs still read would evict both from the L2
    mine = c < T * HKV
    row = (b * T * HKV + c).to(tl.int64)
    if scale is not None:
        score = _unscale(score, unit[:, None], 2.0 ** -120)
        lower = _unscale(tl.max(least, 0), unit, -2.0 ** -120)
        score = tl.where(score == score, score, 3e38)  # inf * 0, a query of NaN or inf: rescored
        tl.store(run_upper + row * runs + run, tl.max(score, 1), mask=mine)
        tl.store(run_lower + row * runs + run, _ranked(lower), mask=mine)
    else:
        score = _ranked(score)
    blocks = block_score + row[:, None] * N + lo + g
    tl.store(blocks, score, mask=mine[:, None] & (g < hi - lo), eviction_policy="evict_last")
    tl.store(run_best + row * runs + run, tl.max(score, 1), mask=mine, eviction_policy="evict_last")
    resets = tl.where(run == 0, T * HKV, 0)  # the first run's program alone resets the counters
    tl.store(done + b * T * HKV + c, 0, mask=c < resets)

@jit
def _choose(block_score, run_best, row, slot, n, N, TOP: constexpr, RUNS: constexpr, PAIR: constexpr):
    """The block of rank slot >= 1 (1 is the best) among those before the query's own; -1 where there are fewer.

    Exact in two steps. Two neighbouring runs make a pair, of up to PAIR blocks. First take the TOP pairs whose best
    blocks score highest: a block of any other pair is beaten by TOP blocks, the best one of each of these. Then read
    all blocks of these pairs. Their best ones, the leaders, are in order already. Go through the other blocks, best
    first, as long as one beats the last leader: it takes its rank, and each leader that it beats moves down by one."""
    row = row.to(tl.int64)
    block_score += row * N
    run_best += row * RUNS

    # the best pairs of runs, and all their blocks
    p = tl.arange(0, RUNS // 2)
    top = tl.maximum(tl.load(run_best + 2 * p), tl.load(run_best + 2 * p + 1))
    pair = _block_of(tl.topk(_key(top, p), TOP))                                # [TOP]
    lo = _run_start(2 * tl.maximum(pair, 0), n, RUNS)
    hi = _run_start(2 * pair + 2, n, RUNS)
    blk = lo[:, None] + tl.arange(0, PAIR)
    held = (pair >= 0)[:, None] & (blk < hi[:, None])
    key = _key(tl.load(block_score + blk, mask=held, other=NOTHING), blk)       # [TOP, PAIR]

    # their leaders, in descending order; then what else beats the least of them
    best = tl.max(key, 1)                                                       # [TOP]
    key = tl.where(key == best[:, None], NO_KEY, key)
    rank = tl.arange(0, TOP)
    found = -1
    nth = 0
    other = tl.max(tl.max(key, 1))
    while (other > tl.min(best)) & (nth < TOP):  # random scores: about once in two rows
        if tl.sum((best > other).to(tl.int32)) + nth == slot - 1:
            found = _block_of(other)
        rank += (other > best).to(tl.int32)
        nth += 1
        key = tl.where(key == other, NO_KEY, key)
        other = tl.max(tl.max(key, 1))
    leader = tl.where(rank == slot - 1, _block_of(best), -1)
    return tl.maximum(found, tl.max(leader))

@jit
def _join(part, lse, out, row, S: constexpr, G: constexpr, D: constexpr, ROWS: constexpr):
    """Sum of a row's S parts by weight. A thread loads eight channels and, itself, their head's log-sum-exp: with the
    weights in a vector of heads each part would wait for threads to exchange them (3.5 us, not 2.4)."""
    g = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, D // 8)[None]
    real = (g < G) & (c >= 0)                                                   # [ROWS, D / 8]: c >= 0 gives the shape
    channel = c[:, :, None] * 8 + tl.arange(0, 8)
    peak = tl.full([ROWS, D // 8], LEAST, tl.float32)
    total = tl.zeros([ROWS, D // 8], tl.float32)
    acc = tl.zeros([ROWS, D // 8, 8], tl.float32)
    for slot in tl.static_range(S):
        source = (row * S + slot) * G + g
        weight = tl.load(lse + source + c * 0, mask=real, other=NOTHING, cache_modifier=".cg")
        parts = part + source[:, :, None] * D + channel
        other = tl.load(parts, mask=real[:, :, None], other=0.0, cache_modifier=".cg")
        acc, total, peak = _merge(acc, total, peak, other, weight)
    mean = _mean(acc, total)
    tl.store(out + (row * G + g)[:, :, None] * D + channel, mean, mask=real[:, :, None])

# One program = one slot of one query and KV head: choose the block, attend; the last of the S programs joins the parts.
@jit
def _attend_kernel(
    q,            # (B, T, HKV * G, D)
    k,            # (B, capacity, HKV, D)
    v,            # as k
    end,          # (B, capacity), or None
    length,       # (B,)
    block_score,  # (rows, N)
    run_best,     # (rows, RUNS)
    block_idx,    # (B, T, HKV, S), written
    part,         # (rows * S * G, D), written
    lse,          # (rows * S * G,), written
    done,         # (rows,), parts that are finished
    out,          # as q, written
    T,
    capacity,
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    L: constexpr,
    S: constexpr,
    TOP: constexpr,   # S - 1, rounded up
    RUNS: constexpr,  # of the scan
    PAIR: constexpr,  # blocks of two runs, rounded up
    ROWS: constexpr,  # G, rounded up
    PDL: constexpr,
):
    SCALE: constexpr = D ** -0.5 * LOG2E
    slot = tl.program_id(0)
    row = tl.program_id(1)  # (b * T + t) * HKV + h
    b = row // (T * HKV)
    h = row % HKV
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)

    # these may be read before the wait: the scan let this kernel start after its own wait, so that they were whole
    heads = (row.to(tl.int64) * G + g)[:, None] * D + d
    mine = g < G
    query = tl.load(q + heads, mask=mine[:, None], other=0.0)                   # [ROWS, D]
    n = tl.load(length + b)
    i = n + row % (T * HKV) // HKV

    # choose a block
    blk = i // L
    if PDL:
        tl.extra.cuda.gdc_wait()
    if slot > 0:
        N = tl.cdiv(capacity, L)
        blk = _choose(block_score, run_best, row, slot, (n + T - 1) // L, N, TOP, RUNS, PAIR)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # not before: the next step's index keys would delay the choice
    tl.store(block_idx + row * S + slot, blk)

    # attend to it
    j = blk * L + tl.arange(0, L)
    seen = (j >= 0) & (j <= i)
    seen = _visible(seen, i, end, b.to(tl.int64) * capacity, j, seen)
    keys = _key_tile(b.to(tl.int64), j, h, capacity, HKV, D)
    key = tl.load(k + keys, mask=seen[:, None], other=0.0)                      # [L, D]
    value = tl.load(v + keys, mask=seen[:, None], other=0.0)                    # [L, D]
    p, peak = _softmax_tile(_scores(query, key, SCALE), seen, LEAST)            # [ROWS, L]
    total = tl.sum(p, 1)
    mean = _mean(_weigh(p, value), total)                                       # [ROWS, D]
    place = (row.to(tl.int64) * S + slot) * G + g
    parts = part + place[:, None] * D + d
    tl.store(parts, mean, mask=mine[:, None])
    tl.store(lse + place, peak + tl.log2(total), mask=mine)

    # the last to arrive joins the parts
    tl.debug_barrier()  # all threads' stores come before the one that counts
    if tl.atomic_add(done + row, 1, sem="acq_rel") == S - 1:
        _join(part, lse, out, row.to(tl.int64), S, G, D, ROWS)

# One program = every SPLIT-th tile of keys of one sequence and KV head, for the G heads of up to TOKENS queries.
@jit
def _dense_kernel(
    q,       # (B, T, HKV * G, D)
    k,       # (B, capacity, HKV, D)
    v,       # as k
    end,     # (B, capacity), or None
    length,  # (B,)
    part,    # (B, HKV, SPLIT, T * G, D), written: sums of p * value
    stat,    # (B, HKV, SPLIT, T * G, 2), written: their maximum and sum of p
    T,
    capacity,
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    TOKENS: constexpr,  # queries of a program
    ROWS: constexpr,    # TOKENS * G, rounded up
    TILE: constexpr,  # keys at a time
    PDL: constexpr,
):
    SCALE: constexpr = D ** -0.5 * LOG2E
    split = tl.program_id(0)
    h = tl.program_id(1)
    groups = tl.cdiv(T, TOKENS)
    b = tl.program_id(2) // groups

    # while the kernel before still runs, bring the first keys and values of all heads to the L2
    n = tl.load(length + b) + T  # no kernel of a step writes it
    if PDL:
        size = tl.minimum(n - split * TILE, TILE) * HKV * D
        if (h == 0) & (size > 0):
            start = (b.to(tl.int64) * capacity + split * TILE) * HKV * D
            _prefetch(k + start, size, TILE * HKV * D)
            _prefetch(v + start, size, TILE * HKV * D)
        tl.extra.cuda.gdc_wait()

    # queries
    first = tl.program_id(2) % groups * TOKENS * G
    d = tl.arange(0, D)
    r = first + tl.arange(0, ROWS)
    mine = r < tl.minimum(first + TOKENS * G, T * G)
    heads = ((b.to(tl.int64) * T + r // G) * HKV + h) * G + r % G
    query = tl.load(q + heads[:, None] * D + d, mask=mine[:, None], other=0.0)  # [ROWS, D]
    i = n - T + r // G

    # online softmax over every SPLIT-th tile: which program sums a key, and when, depends on no other token or row
    peak = tl.full([ROWS], LEAST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for j0 in range(split * TILE, n, tl.num_programs(0) * TILE):
        j = j0 + tl.arange(0, TILE)
        keys = _key_tile(b.to(tl.int64), j, h, capacity, HKV, D)
        held = (j < n)[:, None]
        score = _scores(query, tl.load(k + keys, mask=held, other=0.0), SCALE)  # [ROWS, TILE]
        seen = j[None] <= i[:, None]
        if end is not None:
            last = tl.load(end + b.to(tl.int64) * capacity + j, mask=j < n, other=0)
            seen = seen & (i[:, None] < last[None])
        p, new = _softmax_tile(score, seen, peak)
        old = tl.exp2(peak - new)
        value = tl.load(v + keys, mask=held, other=0.0)                         # [TILE, D]
        acc = acc * old[:, None] + _weigh(p, value)
        total = total * old + tl.sum(p, 1)
        peak = new
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    place = ((b * HKV + h).to(tl.int64) * tl.num_programs(0) + split) * T * G + r
    tl.store(part + place[:, None] * D + d, acc, mask=mine[:, None])
    tl.store(stat + 2 * place, peak, mask=mine)
    tl.store(stat + 2 * place + 1, total, mask=mine)

# One program = one query row: the weighted sum of its SPLIT parts.
@jit
def _dense_sum_kernel(
    part,  # (B, HKV, SPLIT, T * G, D)
    stat,  # (B, HKV, SPLIT, T * G, 2)
    out,   # (B, T, HKV * G, D), written
    T,
    HKV: constexpr,
    G: constexpr,
    D: constexpr,
    SPLIT: constexpr,
    PADDED: constexpr,  # SPLIT, rounded up
    PDL: constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    d = tl.arange(0, D)
    first = (b * HKV + h).to(tl.int64) * SPLIT
    every = tl.arange(0, PADDED)
    peak = tl.load(stat + 2 * ((first + every) * T * G + r), mask=every < SPLIT, other=LEAST)
    highest = tl.max(peak, 0)

    # sixteen at a time: the order of sums does not depend on how many there are
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(0, SPLIT, 16):
        split = start + tl.arange(0, 16)
        held = split < SPLIT
        place = (first + split) * T * G + r
        weight = tl.exp2(tl.load(stat + 2 * place, mask=held, other=LEAST) - highest)           # [16]
        total += tl.sum(weight * tl.load(stat + 2 * place + 1, mask=held, other=0.0), 0)
        some = tl.load(part + place[:, None] * D + d, mask=held[:, None], other=0.0)            # [16, D]
        acc += tl.sum(some * weight[:, None], 0)
    mean = acc / tl.maximum(total, TINY)
    row = ((b.to(tl.int64) * T + r // G) * HKV + h) * G + r % G
    tl.store(out + row * D + d, mean)

def _overlap(x, rows=1):
    """Programmatic dependent launch where the GPU has it: a launch, about 1 us, hides behind the kernel before. Not for
    many rows: their programs fill the GPU, and those of the next kernel would take their place."""
    pays = x.is_cuda and rows <= 16 and torch.cuda.get_device_capability(x.device)[0] >= 9
    return dict(PDL=pays, launch_pdl=pays)

@dataclass
class Grid:
    """How a decode step is spread over programs."""
    runs: int       # programs of the scan a sequence, a power of two: each reads one run of blocks
    run: int        # blocks of a run at most, rounded up
    pair: int       # blocks of two runs at most, rounded up
    rescorers: int  # programs of the rescoring a row

def _decode_grid(N, rows, top, int8, on_gpu):
    """N blocks a sequence. Few sizes, because _choose takes seconds to compile for each."""
    if not on_gpu:
        runs = N // 2  # the interpreter: tests want runs of several blocks
    elif N <= 256:
        runs = 128     # one or two blocks a run
    elif N <= 4096:
        runs = 512     # more than run at once: some start while others stream
    elif int8:
        runs = max(512, cdiv(N, 32))   # a block has half the bytes; a run holds at most 32, in registers
    else:
        runs = max(1024, cdiv(N, 32))
    runs = _power_of_2(runs, _power_of_2(2 * top))  # _choose takes the best `top` of runs / 2 pairs
    if on_gpu:
        rescorers = max(16, min(64, 256 // rows))  # a row of random keys has some 30 live runs
    else:
        rescorers = 2
    run = _power_of_2(cdiv(N, runs), 8)
    pair = _power_of_2(cdiv(2 * N, runs), 16)
    return Grid(runs, run, pair, rescorers)

def _decode_scratch(rows, N, runs, device):
    """What the scan leaves for the kernels after it: block_score (rows, N), and run_best, run_upper, run_lower
    (rows, runs). One allocation; runs is a power of two from 4 on, so that each tensor is aligned to 16 bytes."""
    scratch = torch.empty(rows * (3 * runs + N), device=device)
    by_run = scratch[:3 * rows * runs].view(3, rows, runs)
    return scratch[3 * rows * runs:].view(rows, N), *by_run

def _decode_triton(q, k, v, qi, ki, S, L, length, end, int8):
    """msa_decode: out, block_idx."""
    B, T, H, D = q.shape
    Hkv, Di = k.size(2), qi.size(3)
    G, rows = H // Hkv, B * T * Hkv
    capacity, end = _lanes(end, k=k, v=v, ki=ki)
    N = cdiv(capacity, L)
    top = _power_of_2(S - 1, 2)
    grid = _decode_grid(N, rows, top, int8 is not None, q.is_cuda)
    scanned, scale, slack = ki, None, None
    if int8 is not None:
        scanned, scale, slack = int8
        lanes = tuple(_lanes(int8=x)[0] for x in (scanned, scale[..., None], slack[..., None]))
        if B > 1 and lanes != (capacity, capacity, N):
            raise ValueError(f"int8 keys, scales and slacks have {lanes} a sequence, expected "
                             f"{(capacity, capacity, N)}: quantize whole cache lanes, then slice")

    # what the kernels write, for each other and for the caller
    block_score, run_best, run_upper, run_lower = _decode_scratch(rows, N, grid.runs, q.device)
    done = torch.empty(rows, dtype=torch.int32, device=q.device)
    block_idx = torch.empty(B, T, Hkv, S, dtype=torch.int32, device=q.device)
    part = torch.empty(rows * S * G, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows * S * G, device=q.device)
    out = torch.empty_like(q)

    # scan, rescore where the scan gave bounds, attend
    shared = dict(
        end=end, length=length, block_score=block_score, run_best=run_best,
        T=T, capacity=capacity,
        HKV=Hkv, L=L, **_overlap(q))
    index = dict(
        qi=qi, run_upper=run_upper, run_lower=run_lower,
        DI=Di, RUN=grid.run, COLS=_power_of_2(T * Hkv, 16), **shared)
    _scan_kernel[grid.runs, B](
        ki=scanned, scale=scale, slack=slack, done=done,
        num_warps=4 if int8 is None else 2, num_stages=3, **index)
    if int8 is not None:
        _rescore_kernel[grid.rescorers, rows](
            ki=ki, S=S, TOP=top, RUNS=grid.runs, num_warps=4, **index)
    _attend_kernel[S, rows](
        q=q, k=k, v=v, block_idx=block_idx,
        part=part, lse=lse, done=done, out=out,
        G=G, D=D, S=S,
        TOP=top, RUNS=grid.runs, PAIR=grid.pair, ROWS=_power_of_2(G, 16),
        num_warps=8, **shared)
    return out, block_idx

def _dense_triton(q, k, v, end, start):
    """full_attention of a decode step."""
    B, T, H, D = q.shape
    Hkv = k.size(2)
    G = H // Hkv
    capacity, end = _lanes(end, k=k, v=v)
    tile = 64 if k.is_cuda else 32
    # from 64 rows on, Hopper multiplies by other instructions: other bits. One size for all T above 1: fewer kernels to
    # compile
    tokens = 1 if T == 1 else max(1, min(NEW, 32 // G))
    split = max(1, min(PROGRAMS // Hkv, cdiv(capacity, tile)))  # whatever B and T are: the order of sums is the same
    parts = B * T * H * split
    scratch = torch.empty(parts * (D + 2), device=q.device)
    out = torch.empty_like(q)
    shared = dict(
        part=scratch[:parts * D], stat=scratch[parts * D:],
        T=T, HKV=Hkv, G=G, D=D,
        num_warps=4, **_overlap(q, B * T))
    _dense_kernel[split, Hkv, B * cdiv(T, tokens)](
        q=q, k=k, v=v, end=end, length=start,
        capacity=capacity, TOKENS=tokens, ROWS=_power_of_2(tokens * G, 16), TILE=tile,
        num_stages=4 if shared["PDL"] else 2, **shared)  # before Hopper: less shared memory
    _dense_sum_kernel[T * G, Hkv, B](
        out=out, SPLIT=split, PADDED=_power_of_2(split), **shared)
    return out

# ==== F. Certified int8 ===========================================================================
#
# The scan reads nothing but index keys; their int8 copy has half the bytes. It is not precise enough to rank blocks, so
# that it is used to exclude them, and the choice stays that of the exact scores, to the last block:
#     quantize_index   int8 keys with a scale each, and for each block a bound on the error: |q . k - scale * q . k8| is
#                      at most |q| * scale * slack, by Cauchy-Schwarz
#     _scan_kernel     with int8 keys gives each block an upper and a lower bound on its score. The queries are rounded,
#                      too, to 16 bits: two int8 digits, because the tensor cores multiply int8 by int8
#     _rescore_kernel  the floor is the (S - 1)-th best of the pairs of runs, each by its best lower bound: S - 1 blocks
#                      are sure to reach it. Only a block whose upper bound does, too, can be chosen; those few get
#                      their exact score, and all others keep a bound below the floor
# Random keys leave some 2 S blocks a head to rescore. Whatever nothing bounds, NaN and inf, is always rescored.

GAMMA = 2.0 ** -16        # rounding of a score of D = 128 products, relative to |q| |k|
STEPS = constexpr(32512)  # 127 * 256, a query's largest number in steps: two digits, of which the high one fits int8

@torch.no_grad()
def quantize_index(ki, L):
    """An int8 copy of index keys with an error bound, for msa_decode.

    ki  (B, Tk, D)
    -> ki8 (B, Tk, D) int8; scale (B, Tk) bf16, for each key; slack (B, N) fp32, for each block

    For every query and key of the block, q . k and scale * (q rounded to 16 bits) . k8, both as computed, differ by at
    most |q| * scale * slack: Cauchy-Schwarz gives |k / scale - k8|, the rounding of q at most |q| sqrt(D) 2^-15 |k8|;
    GAMMA |k / scale| on either side covers sums, whose error grows with |q| |k|, not with the score. Nothing is proven
    for keys under 2^-96, queries over 2^127.
    """
    lost = ~ki.isfinite().all(2)  # (B, Tk): NaN or inf, which nothing bounds: slack inf, the block is always rescored
    ki = ki.nan_to_num(0.0, 0.0, 0.0)
    largest = ki.abs().amax(2).float().clamp(min=2.0 ** -90)
    scale = (largest * (1.01 / 127)).bfloat16()  # 1.01: bf16 rounds by 0.4 %
    k = ki.float() / scale.float()[..., None]    # norms of scaled keys: the square of 1e-24 is 0
    k8 = k.round()
    up = 1 + 2.0 ** -15                          # norms are rounded up
    residual = (k - k8).norm(dim=-1) * up
    norm = k.norm(dim=-1) * up
    slack = residual + (2 * GAMMA + ki.size(2) ** 0.5 * 2.0 ** -15) * (norm + residual)
    slack = slack.masked_fill(lost, float("inf"))
    slack = F.pad(slack, (0, -ki.size(1) % L))
    slack = slack.unflatten(1, (-1, L)).amax(2)
    return k8.to(torch.int8).contiguous(), scale.contiguous(), slack.contiguous()

@jit
def _digits(query):
    """Queries [DI, COLS] in steps of unit / STEPS -> high and low int8 digits [DI, COLS]; |query| in steps, rounded up
    [COLS]; unit [COLS], powers of 2."""
    largest = tl.max(tl.abs(query.to(tl.float32)), 0)
    unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 2.0 ** -126))))
    x = query.to(tl.float32) / unit[None] * STEPS
    n = tl.floor(x + 0.5).to(tl.int32)
    high = (n + 128) >> 8
    norm = tl.sqrt(tl.sum(x * x, 0) + 2.0 ** -120)  # not 0: times a block's inf, it would be NaN
    norm *= 1 + 2.0 ** -15
    norm = tl.where(norm == norm, norm, float("inf"))
    return high.to(tl.int8), (n - high * 256).to(tl.int8), norm, unit

@jit
def _digit_scores(key, high, low):
    """int8 keys [L, DI] times queries of two digits [DI, COLS] -> [L, COLS], exact but for the rounding to fp32."""
    product = tl.dot(key, high, out_dtype=tl.int32) * 256
    return tl.dot(key, low, product, out_dtype=tl.int32).to(tl.float32)

@jit
def _unscale(x, unit, more):
    """From steps to scores, more added (what rounds to 0), finite where x is: -inf means invisible alone."""
    y = x * (unit / STEPS * 2.0 ** 15) * 2.0 ** 15 + more
    return tl.where(x > NOTHING, tl.minimum(tl.maximum(y, -3e38), 3e38), x)

# One program = a share of one row's live runs. A run is live if its best upper bound reaches the floor. The blocks in
# it that do get their exact score; all others keep bounds below the floor: they are not chosen.
@jit
def _rescore_kernel(
    qi,           # (B, T, HKV, DI)
    ki,           # (B, capacity, DI), not the int8 copy
    end,          # (B, capacity), or None
    length,       # (B,)
    block_score,  # (rows, N): upper bounds, of which some become scores
    run_best,     # (rows, RUNS), written where a run is rescored
    run_upper,    # (rows, RUNS), the best upper bound of each run
    run_lower,    # (rows, RUNS), the best lower bound of each run
    T,
    capacity,
    HKV: constexpr,
    DI: constexpr,
    L: constexpr,
    S: constexpr,
    TOP: constexpr,   # S - 1, rounded up
    RUN: constexpr,   # blocks of a run, rounded up
    COLS: constexpr,  # T * HKV, rounded up
    RUNS: constexpr,
    PDL: constexpr,
):
    row = tl.program_id(1)
    N = tl.cdiv(capacity, L)
    b = row // (T * HKV)
    mine = tl.arange(0, COLS) == row % (T * HKV)
    if PDL:
        tl.extra.cuda.gdc_wait()
    query, i = _queries(qi, length, b, T, HKV, DI, COLS)
    n = (tl.load(length + b) + T - 1) // L
    block_score += row.to(tl.int64) * N
    by_run = row.to(tl.int64) * RUNS

    # the floor: reached by S - 1 pairs of runs, hence by S - 1 blocks
    pair = by_run + 2 * tl.arange(0, RUNS // 2)
    low = tl.maximum(tl.load(run_lower + pair), tl.load(run_lower + pair + 1))  # [RUNS / 2]
    low = tl.topk(low, TOP)
    floor = tl.max(tl.where(tl.arange(0, TOP) == S - 2, low, NOTHING))

    # the runs that reach it, numbered from 1 on
    r = tl.arange(0, RUNS)
    high = tl.load(run_upper + by_run + r)
    live = (high >= floor) & (high > NOTHING)
    place = tl.cumsum(live.to(tl.int32), 0)
    for nth in range(tl.program_id(0), tl.max(place, 0), tl.num_programs(0)):
        run = tl.sum(tl.where(live & (place == nth + 1), r, 0))
        blk = _run_start(run, n, RUNS) + tl.arange(0, RUN)
        held = blk < _run_start(run + 1, n, RUNS)
        score = tl.load(block_score + blk, mask=held, other=NOTHING)            # [RUN]
        last = -1
        wanted = (score > NOTHING) & (score >= floor)
        for _ in range(tl.sum(wanted.to(tl.int32))):
            last = tl.min(tl.where(wanted & (blk > last), blk, 2 ** 31 - 1))
            j = b.to(tl.int64) * capacity + last * L + tl.arange(0, L)
            key = tl.load(ki + j[:, None] * DI + tl.arange(0, DI))              # [L, DI]
            exact = _block_scores(query, key, end, i, b, last, capacity, L)     # [COLS]
            score = tl.where(blk == last, tl.max(tl.where(mine, exact, NOTHING)), score)
        tl.store(block_score + blk, score, mask=held)
        tl.store(run_best + by_run + run, tl.max(score, 0))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
