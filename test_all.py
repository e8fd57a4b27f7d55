"""The suite, and a guided tour in the order of a token's walk: text, config, parts, attention, index branch, MSA,
kernels, router, model, cache, training, sampling, bad input, and last the mutants that show each checker can fail.

    python -m pytest test_all.py           # everything, offline, under 150 s on 2 cores
    python test_all.py                     # the same, with each test's one-line lesson

What is compared against is not ours: outputs that transformers 5.23 computed (.ci/golden), torch's operators,
brute-force loops, closed forms, published counts. fp32 tolerances are a few roundings of such sums; fp64 ones 1e-10.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import timeit
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before msa is imported: a kernel's decorator reads the flag

import bench
import moe
import msa
import sample
import train
from model import (Call, KVCache, MiniMax, MiniMaxConfig, RMSNorm, apply_rope, count_params, cross_entropy, locate,
                   rope_tables)

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / ".ci" / "golden"
TEXT = (HERE / "msa.py").read_text(encoding="utf-8") + "na\u00efve \u4e2d\u6587 \U0001f600\n"

def worst(a, b):
    """Largest absolute difference; inf where either is not finite, so that no NaN passes a comparison."""
    d = (a.double() - b.double()).abs().max().item()
    return d if math.isfinite(d) else math.inf

def small_config(**kw):
    """Three layers with everything in them, at a size where a forward takes milliseconds."""
    return MiniMaxConfig.tiny(**{**dict(
        vocab_size=61, n_layer=3, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, rotary_dim=4, max_seq_len=256,
        attn_types=["full", "msa", "msa"], mlp_types=["dense", "moe", "moe"], n_expert=4, expert_dim=8, shared_dim=8,
        dense_dim=24, index_head_dim=8, index_block_size=4, index_topk_blocks=3, index_kl_stride=1), **kw})

def make_model(seed=0, dtype=torch.float32, **kw):
    """A model whose norms and biases are random too: a port that ignores them must fail."""
    torch.manual_seed(seed)
    model = MiniMax(small_config(**kw))
    with torch.no_grad():
        for name, p in list(model.named_parameters()) + list(model.named_buffers()):
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return model.to(dtype).eval()

def random_qkv(B=2, T=37, H=4, Hkv=2, D=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, D), (B, T, Hkv, D), (B, T, Hkv, D), (B, T, Hkv, D), (B, T, D)]
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]                                     # q k v qi ki

def packed_end(T, cuts, B=2):
    """end for documents that stop at each cut and at T: (B, T) int32."""
    return torch.tensor([[min(c for c in (*cuts, T) if c > j) for j in range(T)]] * B, dtype=torch.int32)

# ---- 1. text -------------------------------------------------------------------------------------
def brute_bpe(text, n_merges, pattern):
    """BPE from its definition: count every pair, merge the most frequent (lowest ids on ties), again."""
    import regex
    words = [list(w.encode()) for w in regex.findall(pattern, text)]
    tokens = [bytes([i]) for i in range(256)]
    for _ in range(n_merges):
        counts = Counter(pair for w in words for pair in zip(w, w[1:]))
        pair = min(counts, key=lambda p: (-counts[p], p))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for w in words:
            for i in range(len(w)):  # w may shrink: past its end the slice is short, and no pair
                if tuple(w[i:i + 2]) == pair:
                    w[i:i + 2] = [len(tokens) - 1]
    return tokens

def test_bpe_equals_brute_force():
    """The BPE learner with its heap and index makes exactly the merges of the textbook loop."""
    spec = sample.learn_bpe([TEXT[:3000]], 256 + 60 + 1, sample.PATTERN)
    assert spec["ranks"] == brute_bpe(TEXT[:3000], 60, sample.PATTERN)
    assert len(set(spec["ranks"])) == len(spec["ranks"]) and all(spec["ranks"])

def test_text_roundtrip():
    """Any text survives encoding, the special token's name included, which in data is plain text."""
    tok = sample.Tokenizer(sample.learn_bpe([TEXT], 400, sample.PATTERN))
    for text in (TEXT[:500], "", " \n\t\r\n  x", "\U0001f600 \u4e2d\u6587 na\u00efve\u0301", sample.EOT, "\x00\x7f"):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and tok.eot not in ids
    assert tok.n_vocab == 400 and tok.eot == 399

def test_big_vocabulary_fits_the_token_file():
    """Token ids are stored as int32: uint16, the usual choice, would turn M2's id 200063 into 3455."""
    class Wide:
        eot = 200_063
        def encode_batch(self, texts): return [[200_062] * len(t) for t in texts]
    tokens = train.Tokens([("a", "xyz")], Wide(), 4, 8)
    assert tokens.ids[0] == 200_063 and tokens.ids[1] == 200_062

# ---- 2. config -----------------------------------------------------------------------------------
def test_published_parameter_counts():
    """On the meta device: M2 has 228,689,764,864 parameters, 9,801,359,872 active; M3's text model 426.175B, 23.5B."""
    with torch.device("meta"):
        assert MiniMax(MiniMaxConfig.m2()).num_params() == (228_689_764_864, 9_801_359_872)
        total, active = MiniMax(MiniMaxConfig.m3()).num_params()
        mtp = count_params(MiniMax(MiniMaxConfig.m2(n_layer=1, attn_types=["full"], mlp_types=["moe"], n_mtp=1)).mtp[0])
        small = MiniMax(MiniMaxConfig.small()).num_params()[1]
    assert round(total / 1e9, 3) == 426.175 and round(active / 1e9, 2) == 23.50
    assert mtp == (3_687_602_432, 176_969_984) and 0.95 * 85e6 < small < 1.05 * 85e6, (mtp, small)

def test_bad_configs_are_refused():
    """A config that cannot work says so when it is made, with the value in the message."""
    for key, value in (("n_head", 5), ("rotary_dim", 10), ("activation", "relu"), ("mlp_types", ["moe"]),
                       ("attn_types", ["full", "swa", "msa"]), ("qk_norm", "batch")):
        with pytest.raises(AssertionError, match=re.escape(str(value))):
            small_config(**{key: value})

# ---- 3. parts ------------------------------------------------------------------------------------
def test_rmsnorm_matches_formula():
    """x / rms(x) * weight, or * (1 + weight) in Gemma's form, computed in fp32 even for bf16 input."""
    def formula(x, weight): return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    for gemma in (False, True):
        norm = RMSNorm(16, small_config(gemma_norm=gemma))
        x, low = torch.randn(3, 7, 16), torch.randn(50, 16).bfloat16()
        torch.nn.init.normal_(norm.weight)
        assert worst(norm(x), formula(x, norm.weight + gemma)) < 1e-5
        want = formula(low.float(), norm.weight + gemma).bfloat16()  # rounded once, at the end
        assert norm(low).dtype == torch.bfloat16 and (norm(low) != want).float().mean() < 0.01

def test_rope_is_relative_and_partial():
    """Rotated q . k depends on the distance alone, and channels from rotary_dim on are untouched."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    def at(x, p): return apply_rope(x, rope_tables(torch.tensor([[p]]), 8, 1e4))
    assert worst((at(q, 9) * at(k, 4)).sum(), (at(q, 105) * at(k, 100)).sum()) < 1e-5  # the tables are fp32
    assert worst((at(q, 9) * at(k, 4)).sum(), (at(q, 9) * at(k, 5)).sum()) > 1e-3
    assert torch.equal(at(q, 9)[..., 8:], q[..., 8:])

def test_cross_entropy_in_chunks():
    """The chunked loss and its gradients equal torch's at any chunk, with ignored targets; with no target it is 0."""
    h, W = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 19, 8), (31, 8)))
    y = torch.randint(-1, 31, (2, 19))
    want = F.cross_entropy((h @ W.T).flatten(0, 1), y.flatten(), ignore_index=-1)
    dh, dW = torch.autograd.grad(want, (h, W))
    for chunk in (1, 5, 38, 1000):
        got = cross_entropy(h, W, y, chunk=chunk)
        gh, gW = torch.autograd.grad(3 * got, (h, W))
        assert max(worst(got, want), worst(gh, 3 * dh), worst(gW, 3 * dW)) < 1e-12
    assert cross_entropy(h, W, torch.full_like(y, -1)).item() == 0

# ---- 4. full attention and the one visibility rule -----------------------------------------------
def loop_attention(q, k, v, keys_of):
    """Softmax attention, query by query, over the keys that keys_of(b, i, kv_head) lists."""
    (B, T, H, D), G = q.shape, q.size(2) // k.size(2)
    out = torch.zeros_like(q)
    for b, i, h in np.ndindex(B, T, H):
        js = keys_of(b, i, h // G)
        p = (k[b, js, h // G] @ q[b, i, h] / D ** 0.5).softmax(0)
        out[b, i, h] = p @ v[b, js, h // G]
    return out

def test_full_attention_obeys_visibility():
    """Key j is seen by query i iff j <= i < end[j]: plain causal, packed documents and a tree, against a loop."""
    q, k, v, _, _ = random_qkv(T=13)
    tree = torch.tensor([[13, 13, 13, 7, 7, 6, 7, 13, 13, 10, 13, 13, 13]] * 2, dtype=torch.int32)
    for end in (None, packed_end(13, [4, 5]), tree):
        want = loop_attention(q, k, v, lambda b, i, r: [j for j in range(i + 1) if end is None or i < end[b, j]])
        assert worst(msa.full_attention(q, k, v, end), want) < 1e-10

# ---- 5. index branch -----------------------------------------------------------------------------
def brute_blocks(qi, ki, S, L, end):
    """block_idx from its definition, in Python floats: own block, then by (-max visible score, block id)."""
    out = torch.full((*qi.shape[:3], S), -1, dtype=torch.int32)
    scores = torch.einsum("btrd,bkd->btrk", qi, ki)
    for b, i, r in np.ndindex(*qi.shape[:3]):
        best = {}
        for j in range(i + 1):
            if end is None or i < end[b, j]:
                best[j // L] = max(best.get(j // L, -math.inf), scores[b, i, r, j].item())
        best.pop(i // L, None)
        row = [i // L] + sorted(best, key=lambda n: (-best[n], n))[:S - 1]
        out[b, i, r, :len(row)] = torch.tensor(row)
    return out

@pytest.mark.parametrize("T,L,S", [(1, 4, 3), (3, 4, 3), (4, 4, 1), (5, 4, 2), (37, 4, 3), (40, 8, 8)])
def test_selection_equals_brute_force(T, L, S):
    """Own block first, then the best earlier blocks, -1 if there are fewer; odd lengths, documents, a cached start."""
    _, _, _, qi, ki = random_qkv(T=T)
    for end in (None, packed_end(T, [c for c in (8, 24) if c < T])):
        assert torch.equal(msa.select_blocks(qi, ki, S, L, end), brute_blocks(qi, ki, S, L, end))
    if T > 2:
        got = msa.select_blocks(qi[:, 2:], ki, S, L, None, torch.tensor([2, 2], dtype=torch.int32))
        assert torch.equal(got, brute_blocks(qi, ki, S, L, None)[:, 2:])

def test_ties_go_to_the_lowest_block():
    """Equal scores are common (repeated tokens, zero keys): the lowest id wins, on every machine."""
    qi, ki = torch.ones(1, 40, 1, 4), torch.ones(1, 40, 4)
    assert msa.select_blocks(qi, ki, 3, 4)[0, 39, 0].tolist() == [9, 0, 1]
    assert msa.select_blocks(torch.zeros_like(qi), ki, 3, 4)[0, 21, 0].tolist() == [5, 0, 1]

def test_selection_in_chunks(monkeypatch):
    """Queries are taken in chunks so that no T x T matrix exists; the chunk's size changes nothing."""
    q, k, v, qi, ki = (t.requires_grad_() for t in random_qkv(T=37))
    whole = msa.select_blocks(qi, ki, 3, 4)
    out = msa.msa_attention(q, k, v, whole, 4)
    grads = torch.autograd.grad(out.pow(2).sum(), (q, k, v), retain_graph=True)
    kl = msa.index_kl_loss(qi, ki, q, k, whole, 4)
    monkeypatch.setattr(msa, "chunk", lambda device: 2 * 2 * 37 * 5)
    assert torch.equal(msa.select_blocks(qi, ki, 3, 4), whole)
    parts = msa.msa_attention(q, k, v, whole, 4)
    assert max(worst(parts, out), worst(msa.index_kl_loss(qi, ki, q, k, whole, 4), kl)) < 1e-12
    assert max(map(worst, torch.autograd.grad(parts.pow(2).sum(), (q, k, v)), grads)) < 1e-10

def kl_by_autograd(qi, ki, q, k, block_idx, L, end, weight):
    """The paper's loss, eq. 9-10, written as a masked dense softmax and left to autograd."""
    (B, T, Hkv, D), G = qi.shape, q.size(2) // k.size(2)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j <= i).expand(B, 1, T, T) if end is None else ((j <= i) & (i < end[:, None])).unsqueeze(1)
    if block_idx is not None:
        chosen = torch.zeros(B, Hkv, T, -(-T // L) + 1, dtype=torch.bool)
        chosen.scatter_(-1, block_idx.transpose(1, 2).long() % chosen.size(-1), True)  # -1: the spare column
        seen = seen & chosen[..., :-1].repeat_interleave(L, -1)[..., :T]
    main = torch.einsum("birgd,bjrd->brgij", q.unflatten(2, (Hkv, G)), k) / D ** 0.5
    teacher = main.masked_fill(~seen.unsqueeze(2), -math.inf).softmax(-1).mean(2)
    logp = (torch.einsum("birh,bjh->brij", qi, ki) / D ** 0.5).masked_fill(~seen, -math.inf).log_softmax(-1)
    kl = torch.where(seen.expand_as(teacher), teacher * (teacher.clamp(min=1e-300).log() - logp), 0.0).sum(-1)
    return (kl.mean(1) * weight).sum() / weight.sum()

@pytest.mark.parametrize("support", ["prefix", "blocks"])
def test_index_kl_value_and_gradient(support):
    """The KL's value and its closed-form gradient equal autograd through the definition; q and k get none."""
    q, k, _, qi, ki = (t.requires_grad_() for t in random_qkv(T=29))
    for end, weight in ((None, None), (packed_end(29, [8, 16]), torch.rand(2, 29, dtype=torch.float64))):
        blocks = msa.select_blocks(qi, ki, 3, 4, end) if support == "blocks" else None
        for step, kw in ((1, {}), (3, {"stride": 3})):
            every = (torch.arange(1, 30) % step == 0).double().expand(2, 29) * (1 if weight is None else weight)
            want = kl_by_autograd(qi, ki, q.detach(), k.detach(), blocks, 4, end, every)
            got = msa.index_kl_loss(qi, ki, q, k, blocks, 4, end, weight, **kw)
            *grads, dq, dk = torch.autograd.grad(2 * got, (qi, ki, q, k), allow_unused=True)
            assert max(map(worst, grads, torch.autograd.grad(2 * want, (qi, ki)))) < 1e-10
            assert worst(got, want) < 1e-10 and want > 0.01 and dq is None and dk is None

# ---- 6. MSA --------------------------------------------------------------------------------------
@pytest.mark.parametrize("T,L,S", [(1, 4, 2), (7, 4, 2), (37, 4, 3), (33, 16, 2)])
def test_msa_equals_loop(T, L, S):
    """Attention over the gathered blocks equals a loop over their tokens, forward; documents included."""
    q, k, v, qi, ki = random_qkv(T=T)
    for end in (None, packed_end(T, [c for c in (16,) if c < T])):
        blocks = msa.select_blocks(qi, ki, S, L, end)
        want = loop_attention(q, k, v, lambda b, i, r: [j for j in range(i + 1) if j // L in blocks[b, i, r].tolist()
                                                        and (end is None or i < end[b, j])])
        assert worst(msa.msa_attention(q, k, v, blocks, L, end), want) < 1e-10

def test_msa_gradients_equal_masked_dense():
    """dq, dk and dv of the gathered form equal those of dense attention under the same mask (fp64)."""
    q, k, v, qi, ki = (t.requires_grad_() for t in random_qkv(T=26))
    blocks = msa.select_blocks(qi, ki, 3, 4)
    chosen = (blocks[..., None] == torch.arange(26) // 4).any(3).transpose(1, 2)                        # (B, Hkv, T, T)
    mask = (chosen & torch.ones(26, 26).tril().bool()).repeat_interleave(2, 1)
    dense = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, enable_gqa=True)
    probe = torch.randn(2, 26, 4, 8, dtype=torch.float64)
    want = torch.autograd.grad((dense.transpose(1, 2) * probe).sum(), (q, k, v))
    got = torch.autograd.grad((msa.msa_attention(q, k, v, blocks, 4) * probe).sum(), (q, k, v))
    assert max(map(worst, got, want)) < 1e-10

def test_few_tokens_make_msa_dense():
    """T <= S * L: every visible block is chosen and MSA is full attention; one block more and it is not."""
    for T, same in ((12, True), (16, False), (40, False)):
        q, k, v, qi, ki = random_qkv(T=T)
        gap = worst(msa.msa_attention(q, k, v, msa.select_blocks(qi, ki, 3, 4), 4), msa.full_attention(q, k, v))
        assert (gap < 1e-12) if same else (gap > 0.05), (T, gap)

def test_decode_is_a_row_of_prefill():
    """msa_decode with rows of unequal length gives the rows that prefill computes, and the same blocks."""
    q, k, v, qi, ki = random_qkv(T=37)
    blocks = msa.select_blocks(qi, ki, 3, 4)
    full, at, rows = msa.msa_attention(q, k, v, blocks, 4), torch.tensor([36, 17]), torch.arange(2)
    out, chosen = msa.msa_decode(q[rows, at][:, None], k, v, qi[rows, at][:, None], ki, 3, 4, at.int())
    assert torch.equal(chosen[:, 0], blocks[rows, at]) and worst(out[:, 0], full[rows, at]) < 1e-12

def test_cost_follows_the_selection():
    """Nothing in a long decode step is as wide as T x Hkv x D: time at 16 times the context stays under 8 times."""
    def seconds(T):
        q, k, v, qi, ki = random_qkv(B=1, T=T, D=64, dtype=torch.float32)
        start = torch.tensor([T - 1], dtype=torch.int32)
        blocks = msa.select_blocks(qi[:, -1:], ki, 4, 16, None, start)
        def step(): msa.msa_attention(q[:, -1:], k, v, blocks, 16, None, start)
        return min(timeit.repeat(step, number=1, repeat=6)[1:])  # the first one warms up
    assert seconds(65536) < 8 * seconds(4096)

def test_recall_of_a_perfect_and_a_blind_index():
    """Block recall is near 1 when the index scores are the main branch's own, and near chance when they are noise."""
    g = torch.Generator().manual_seed(0)
    q, k = (a * torch.randn(1, 256, 1, 16, generator=g) for a in (1, 4))  # peaked: most weight at the largest score
    perfect, chance = msa.block_recall(q, k[:, :, 0], q, k, 4, 16)
    noise = torch.randn(1, 256, 1, 16, generator=g), torch.randn(1, 256, 16, generator=g)
    blind, _ = msa.block_recall(*noise, q, k, 4, 16)
    assert perfect > 0.85 and abs(blind - chance) < 0.1 and 0.2 < chance < 0.5

# ---- 7. kernels: interpreted on a CPU, compiled for sm_90, run where there is a GPU --------------
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a marker can be declared only in a file that pytest reads before this one
    gpu = pytest.mark.gpu

@contextlib.contextmanager
def poisoned():
    """What a kernel fails to write is NaN, or a block that no one has."""
    with pytest.MonkeyPatch.context() as patch:
        for name, make in (("empty", torch.empty), ("empty_like", torch.empty_like)):
            patch.setattr(torch, name, lambda *args, make=make, **kw: (x := make(*args, **kw)).fill_(
                math.nan if x.is_floating_point() else -2 ** 30))
        yield

def kernel_qkv(B, T, Tk, Hkv, G, D=16):
    """q k v qi ki, slices of longer buffers between bands of NaN: an interpreter's load out of bounds shows."""
    if msa.triton is None or torch.cuda.is_available():  # here and not in a marker: mutants call the tests, too
        pytest.skip("needs Triton, and no GPU: the interpreter stands in for one")
    g, out, more = torch.Generator().manual_seed(T + Tk), [], Tk + 8
    for shape in ((B, more, Hkv * G, D), (B, more, Hkv, D), (B, more, Hkv, D), (B, more, Hkv, D), (B, more, D)):
        band = torch.full((math.prod(shape) + 4096,), math.nan)
        out.append(band[2048:-2048].view(shape).normal_(generator=g))
    return [x[:, :n] for x, n in zip(out, (T, Tk, Tk, T, Tk))]

TREE = torch.full((2, 37), 37, dtype=torch.int32)
TREE[0, :13], TREE[0, 16:24], TREE[1, :16] = 13, 24, 16
KERNEL_CASES = [  # B, T, Tk, Hkv, G, S, end, start; the last four are decode steps: ragged, drafts, short, documents
    (2, 37, 37, 2, 3, 4, None, None), (1, 1, 1, 1, 2, 3, None, None), (1, 20, 20, 1, 16, 3, None, None),
    (1, 17, 17, 1, 2, 1, None, None), (2, 37, 37, 2, 3, 4, TREE, None), (2, 10, 64, 2, 3, 4, None, [20, 50]),
    (2, 1, 96, 2, 3, 4, None, [90, 33]), (1, 3, 64, 2, 3, 4, None, [46]), (2, 1, 64, 2, 3, 4, None, [0, 9]),
    (2, 2, 40, 2, 3, 4, TREE, [35, 30])]

@pytest.mark.filterwarnings("ignore:divide by zero")  # log2(0) = -inf is what a query without visible keys gives
@pytest.mark.parametrize("case", range(len(KERNEL_CASES)))
def test_kernels_equal_torch(case):
    """Every kernel against the torch half: the choice exactly, with fp8 keys too, outputs to rounding, all written."""
    *shape, S, end, start = KERNEL_CASES[case]
    start = start and torch.tensor(start, dtype=torch.int32)
    (q, k, v, qi, ki), L = kernel_qkv(*shape), 8
    blocks = msa.select_blocks(qi, ki, S, L, end, start, "torch")
    want = msa.msa_attention(q, k, v, blocks, L, end, start, "torch")
    with poisoned(), pytest.MonkeyPatch.context() as patch:
        if start is None or q.size(1) > 4:
            assert torch.equal(msa.select_blocks(qi, ki, S, L, end, start, "triton"), blocks)
            for most in (512, 0):  # query-outer, KV-outer
                patch.setattr(msa, "QUERY_OUTER", most)
                assert worst(msa.msa_attention(q, k, v, blocks, L, end, start, "triton"), want) < 2e-6
            return
        whole = ki.as_strided((ki.size(0), ki.size(1) + 8, ki.size(2)), ki.stride())
        sizes = ki.size(1), *[-(-ki.size(1) // L)] * 2
        for fp8 in (None, [x[:, :n] for x, n in zip(msa.quantize_index(whole, L), sizes)]):
            out, got = msa.msa_decode(q, k, v, qi, ki, S, L, start, end, "triton", fp8)
            assert torch.equal(got, blocks) and worst(out, want) < 2e-6
        dense = msa.full_attention(q, k, v, end, start, "triton")
    assert worst(dense, msa.full_attention(q, k, v, end, start, "torch")) < 2e-6

@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")
@pytest.mark.parametrize("shape,S,end,run,most", [((2, 29, 29, 2, 3), 3, TREE[:, :29].clamp(max=29), 5, 16),
                                                  ((1, 21, 21, 1, 16), 2, None, 1024, 8192)])
def test_training_kernels_equal_autograd(shape, S, end, run, most):
    """Attention, KL and all gradients equal the torch half's, hot blocks and chunks split; two runs are bit-equal."""
    q, k, v, qi, ki = inputs = [x.requires_grad_() for x in kernel_qkv(*shape)]
    q.data[:, 4] *= 100  # its scores with keys to come, which no one may see, are beyond the range of exp
    weight, upstream = torch.rand(shape[:2]), torch.randn(q.shape)
    blocks = msa.select_blocks(qi, ki, S, 8, end)
    def run_once(impl):
        out, kl = msa.msa_train(q, k, v, qi, ki, blocks, 8, end, weight, 2, impl)
        return out, kl, *torch.autograd.grad([out, kl], inputs, [upstream, torch.tensor(3.0)])
    with poisoned(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(msa, "QUERY_OUTER", 512 * (most == 16))
        patch.setattr(msa, "_chunks", lambda *args, real=msa._chunks: real(*args, run, most))
        got, again = run_once("triton"), run_once("triton")
    assert all(map(torch.equal, got, again))
    for mine, want in zip(got, run_once("torch")):
        assert worst(mine, want) < 1e-4 * want.abs().max()  # scores of 500 round to 3e-5, which exp passes on

@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_certified_fp8_is_exact_where_fp8_errs():
    """Keys so alike that fp8 misranks them, equal ones, scales whose squares or products leave fp32: torch's choice."""
    q, k, v, qi, ki = kernel_qkv(1, 96, 96, 2, 3)
    last, alike = torch.tensor([95], dtype=torch.int32), ki[:, :1] + 0.01 * ki
    equal, errs = (torch.arange(96) // 8 % 2)[None, :, None].expand(1, 96, 16).float(), []
    for keys, scale in ((alike, 1), (equal, 1), (alike * 1e-24, 1), (alike, 1e-23), (alike * 1e-2, -1e36)):
        keys, x = keys.contiguous(), qi[:, -1:].abs() * scale
        fp8 = msa.quantize_index(keys, 8)
        near = (fp8[0].float().unflatten(1, (-1, 8)) * fp8[1][..., None, None]).flatten(1, 2)
        want, alone = (msa.select_blocks(x, y, 4, 8, None, last, "torch") for y in (keys, near))
        errs.append(not torch.equal(want, alone))
        assert torch.equal(msa.msa_decode(q[:, -1:], k, v, x, keys, 4, 8, last, None, "triton", fp8)[1], want), scale
    ties = [msa.select_blocks(qi[:, 40:].abs(), keys * 0, 4, 8, None, last - 55, x) for x in ("triton", "torch")]
    assert errs == [True, False, True, True, True] and torch.equal(*ties)

def test_fp8_bound_holds_and_is_tight():
    """|max q.k - max scale q.k8| <= |q| slack for any q, in fp64; e4m3 has 3 bits, so slack is at most |k| / 16."""
    for make in (torch.randn, lambda *s: torch.randn(*s) ** 5, lambda *s: 1e-6 * torch.randn(*s) + 1, torch.zeros):
        ki, q = make(2, 40, 16), torch.randn(500, 16).double()
        k8, scale, slack = msa.quantize_index(ki, 8)
        exact, near = ki.double().unflatten(1, (-1, 8)), k8.double().unflatten(1, (-1, 8)) * scale[..., None, None]
        gap = ((exact @ q.T).amax(2) - (near @ q.T).amax(2)).abs() / q.norm(dim=-1)                        # (B, N, 500)
        assert (gap <= slack[..., None]).all() and (scale.log2() % 1 == 0).all()
        assert (slack <= exact.norm(dim=-1).amax(-1) / 16 * 1.01 + 1e-29).all()

def test_cache_keeps_fp8_keys():
    """The cache's fp8 lane is quantize_index of what it holds, after appends of any size, a crop and a copy of rows."""
    cache, g = KVCache(small_config(), 2, 32, fp8=True), torch.Generator().manual_seed(0)
    for n, T in enumerate((5, 1, 9, 4)):
        for layer in range(3):
            kv, ki = torch.randn(2, T, 2, 8, generator=g), torch.randn(2, T, 8, generator=g) * 10 ** n
            cache.append(layer, kv, kv, ki)
        cache.advance(T)
        cache.crop(13) if n == 2 else cache.select(torch.tensor([1, 0]))
        for layer in range(3):
            for mine, want in zip(cache.fp8(layer, 32), msa.quantize_index(cache.ki[layer], 4)):
                assert torch.equal(mine.float(), want.float())

def test_wrong_tensors_are_refused():
    """Dtype, shape, heads, the length of end, device, impl, layout: a ValueError that states both values."""
    q, k, v, qi, ki = random_qkv()
    blocks, end = msa.select_blocks(qi, ki, 3, 4), torch.full((2, 37), 37, dtype=torch.int32)
    attend, select = msa.msa_attention, msa.select_blocks
    for call, words in ((lambda: attend(q, k.float(), v, blocks, 4), "float32.*float64"),
                        (lambda: attend(q, k, v[:, :9], blocks, 4), "9.*37"),
                        (lambda: attend(q[:, :, :3], k, v, blocks, 4), "is 1.*0"),
                        (lambda: select(qi, ki, 3, 4, end[:, :30]), "30.*37"),
                        (lambda: select(qi, ki, 3, 4, end.long()), "int64.*int32"),
                        (lambda: select(qi, ki.to("meta"), 3, 4), "meta.*cpu"),
                        (lambda: msa.full_attention(q, k, v, impl="cuda"), "cuda.*triton"),
                        (lambda: select(qi, ki, 3, 4, impl="triton"), "float64.*float32|TRITON"),
                        (lambda: select(qi.float(), ki.float().mT.contiguous().mT, 3, 4, impl="triton"),
                         "strides.*expected|TRITON"), (lambda: select(qi, ki, 0, 4), "S is 0.*1 or more")):
        with pytest.raises(ValueError, match=words):
            call()

def compile_kernels():
    """Every kernel for sm_90 as launched at M3's sizes, and what else M2's change -> [name, registers, stack bytes]."""
    from triton.compiler.compiler import ASTSource, GPUTarget
    base = dict(HKV=4, G=16, D=128, L=128, S=16, S1=15, W=16, RUN=16, COLS=16, RUNS=512, PAIR=32, TILE=64, SPLIT=66,
                PADDED=128, ROWS=16, R=16, DIMS=(4, 16, 128, 128, 16, 16, 16, 512, 32),
                keys="tensordesc<bf16[128, 128]>", **dict.fromkeys("q k v qi ki out part".split(), "*bf16"),
                **dict.fromkeys("lse scores exact scale slack stat delta index_stat share value dki".split(), "*fp32"),
                **dict.fromkeys("T Tk N cap n edge0".split(), "i32"), **dict.fromkeys("grad dq dqi".split(), "*bf16"),
                **dict.fromkeys(("dk", "dv"), "*fp32"), ends="*i64")
    index, train = dict(num_warps=8, num_stages=2, maxnreg=128, ROWS=128), dict(num_warps=8, num_stages=2)
    for name, change in (("index", index), ("index", dict(index, end=None, block_end=None, start=None)),
                         ("query_outer", dict(num_stages=2)), ("attend", dict(num_warps=8)), ("probe", {}),
                         ("kv_outer", dict(ROWS=64)), ("kv_outer", dict(ROWS=64, HKV=8, G=6)), ("rescore", {}),
                         ("combine", dict(ROWS=64)), ("combine", dict(ROWS=128, HKV=8, G=6, num_warps=8)),
                         ("scan", dict(scale=None)), ("scan", dict(ki="*fp8e4nv", num_warps=2)),
                         ("dense", dict(part="*fp32", num_stages=4)), ("dense_sum", dict(part="*fp32")),
                         ("backward", dict(train, DIMS=(4, 16, 128, 128, 16, 64))), ("slot_sum", {}),
                         ("backward", dict(train, DIMS=(8, 6, 128, 128, 16, 32))),
                         ("task_sum", dict(train, part="*fp32", out="*fp32")),
                         ("kl", dict(DIMS=(4, 16, 128, 128, 128, 16, 64, 64), num_stages=2, index_stat=None)),
                         ("kl", dict(train, DIMS=(8, 6, 128, 128, 128, 16, 64, 16)))):
        fn = getattr(msa, f"_{name}_kernel")
        args = {p: {**base, **change}.get(p, None if p in change else "*i32") for p in fn.arg_names}
        const = {p: x for p, x in args.items() if not isinstance(x, str)}
        aligned = {(n,): [["tt.divisibility", 16]] for n, x in enumerate(args.values()) if str(x)[0] == "*"}
        source = ASTSource(fn, {p: "constexpr" if p in const else x for p, x in args.items()}, const, aligned)
        options = {"num_warps": 4, "num_stages": 3, **{p: x for p, x in change.items() if p not in args}}
        with tempfile.NamedTemporaryFile() as file:
            file.write(msa.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])
            file.flush()
            tool = Path(msa.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        yield [fn.__name__, *map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())]

@pytest.mark.skipif(msa.triton is None, reason="needs Triton")
def test_no_spills_for_sm_90():
    """Every kernel compiles for Hopper without spilling a register: in a process without the interpreter."""
    code = "import json, test_all; print(json.dumps([*test_all.compile_kernels()]))"
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(run.stdout.splitlines()[-1])
    assert {name for name, *_ in kernels} == set(re.findall(r"^def (_\w+_kernel)", TEXT, re.M))
    assert all(stack == 0 and 16 <= registers <= 255 for _, registers, stack in kernels), kernels

@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("T,Hkv,G", [(T, *h) for T in (1, 127, 128, 129, 2047, 2048, 2049) for h in ((4, 16), (8, 6))])
def test_kernels_on_a_gpu(T, Hkv, G):
    """bf16 against torch in fp32: 2^-9 each for p, parts and output; blocks may swap where scores nearly tie."""
    g, S, L = torch.Generator("cuda").manual_seed(T), 16, 128
    q, k, v, qi, ki = (torch.randn(2, T, *s, 128, generator=g, device="cuda").bfloat16()
                       for s in ((Hkv * G,), (Hkv,), (Hkv,), (Hkv,), ()))
    blocks, last = msa.select_blocks(qi, ki, S, L, impl="triton"), torch.full((2,), T - 1, device="cuda").int()
    other = blocks.sort().values != msa.select_blocks(qi.float(), ki.float(), S, L, impl="torch").sort().values
    want = msa.msa_attention(q.float(), k.float(), v.float(), blocks, L, impl="torch")
    runs = [msa.msa_attention(q, k, v, blocks, L, impl="triton") for _ in range(2)]
    step, fp8 = (msa.msa_decode(q[:, -1:], k, v, qi[:, -1:], ki, S, L, last, None, "triton", fp8)
                 for fp8 in (None, msa.quantize_index(ki, L)))
    print(f"T {T}: the choice differs in {other.any(-1).sum()} of {other[..., 0].numel()} rows")
    assert torch.equal(*runs) and torch.equal(step[1], fp8[1]) and other.any(-1).float().mean() <= 1e-3
    for out, ref in ((runs[0], want), (step[0], want[:, -1:]), (fp8[0], want[:, -1:])):
        assert ((out - ref).norm() / ref.norm()).item() < 5e-3

# ---- 8. router and experts -----------------------------------------------------------------------
def test_bias_moves_choice_never_weight():
    """With bias +10 every token takes expert 3, but its weight stays that of its score; weights sum to the scale."""
    s, bias = torch.tensor([[0.9, 0.8, 0.1, 0.2]]), torch.tensor([0.0, 0.0, 0.0, 1.0])  # route's worked example
    weights, idx = moe.route(torch.logit(s), bias, 2)
    assert idx.tolist() == [[3, 0]] and worst(weights, torch.tensor([[0.2 / 1.1, 0.9 / 1.1]])) < 1e-6
    logits, bias = torch.randn(50, 8), torch.zeros(8)
    bias[3] = 10
    weights, idx = moe.route(logits, bias, 2, scale=2.0)
    assert (idx == 3).any(1).all() and worst(weights.sum(1), torch.full((50,), 2.0)) < 1e-5
    scores = logits.sigmoid().gather(1, idx)
    assert worst(weights, 2 * scores / scores.sum(1, keepdim=True)) < 1e-6

@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
def test_loop_equals_grouped(activation):
    """Sorted experts equal the loop, forward and backward, with experts that no token chose or that all chose."""
    for chosen in (torch.randint(0, 6, (33, 2)), torch.full((33, 2), 4), torch.tensor([[0, 7]] * 33)):
        args = [torch.randn(s, requires_grad=True) for s in ((33, 16), (8, 24, 16), (8, 16, 12))]
        weights, probe = torch.rand(33, 2, requires_grad=True), torch.randn(33, 16)
        outs = [f(*args, weights, chosen, activation) for f in (moe.experts_loop, moe.experts_grouped)]
        assert worst(*outs) < 1e-4  # fp32 sums of 24 products of size ~4
        grads = [torch.autograd.grad((o * probe).sum(), [*args, weights]) for o in outs]
        for a, b in zip(*grads):
            assert worst(a, b) < 1e-3 * max(1, a.abs().max().item())

def test_swiglu_oai_clamps():
    """M3's activation in scalar arithmetic: gate at most 7, up within +-7 and one added, sigmoid of 1.702 gate."""
    h = torch.tensor([[9.0, -3.0, 0.5, 20.0, -20.0, 1.5]], dtype=torch.float64)
    def one(g, u):
        g, u = min(g, 7.0), max(min(u, 7.0), -7.0)
        return (u + 1) * g / (1 + math.exp(-1.702 * g))
    want = torch.tensor([[one(9, 20), one(-3, -20), one(0.5, 1.5)]], dtype=torch.float64)
    assert worst(moe.gated(h, "swiglu_oai"), want) < 1e-12

def test_bias_update_balances():
    """Loss-free balancing brings a router with a strong favourite from MaxVio > 1.5 to < 0.2; u = 0 changes nothing."""
    torch.manual_seed(0)
    logits = torch.randn(2000, 8) + torch.tensor([2.0, 1, 0, 0, 0, 0, -1, -2])
    def run(rate):
        bias = torch.zeros(8)
        for _ in range(400):
            load = torch.bincount(moe.route(logits, bias, 2)[1].flatten(), minlength=8).float()
            moe.update_bias(bias, load, rate)
        return moe.max_violation(load).item()
    assert run(0.0) > 1.5 and run(0.003) < 0.2

def test_router_keeps_fp32_and_multiplicity_counts():
    """.to(bfloat16) leaves gate and bias exact in fp32; a token of weight 3 counts three times, a pad not at all."""
    model = make_model()
    before = model.moe_layers()[0].router.weight.clone()
    router = model.to(torch.bfloat16).moe_layers()[0].router
    assert router.weight.dtype == router.bias.dtype == torch.float32 and torch.equal(router.weight, before)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert make_model(dtype=torch.float64).moe_layers()[0].router.bias.dtype == torch.float64
    model, x = make_model(), torch.randn(1, 3, 32)
    _, load, experts = model.moe_layers()[0](x, torch.tensor([[3.0, 1.0, 0.0]]))
    want = sum(w * torch.bincount(e, minlength=4) for w, e in zip((3, 1, 0), experts[0]))
    assert torch.equal(load, want.float())

# ---- 9. model: transformers' numbers -------------------------------------------------------------
def golden(name):
    z = dict(np.load(GOLDEN / name / "expected.npz"))
    idx = torch.from_numpy(z["ids"])
    targets = torch.cat([idx[:, 1:], torch.full((idx.size(0), 1), -1)], 1)
    return MiniMax.from_hf(GOLDEN / name), z, idx, targets

@pytest.mark.parametrize("name", ["m2", "m3"])
def test_parity_with_transformers(name):
    """Logits within 1e-4, loss within 1e-5, the same experts and blocks for every token, gradient norms within 1e-3."""
    model, z, idx, targets = golden(name)
    logits, loss, aux = model(idx, targets, n_logits=idx.size(1))
    assert worst(logits, torch.from_numpy(z["logits"])) < 1e-4 and abs(loss.item() - float(z["loss"])) < 1e-5
    for i, experts in enumerate(aux["experts"]):
        assert np.array_equal(experts.flatten(0, 1).sort(-1).values.numpy(), z[f"experts_{i}"])
    for i, blocks in enumerate(aux.get("block_idx", [])):
        assert np.array_equal(blocks.transpose(1, 2).sort(-1).values.numpy(), np.sort(z[f"blocks_{i}"], -1))
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = json.loads((GOLDEN / name / "grad_norms.json").read_text())
    assert len(expected) > 20
    for key, norm in expected.items():
        part = locate(grads, key)[1]
        assert part is not None and abs(part.norm().item() - norm) <= 1e-3 * norm, (key, part, norm)
    unreached = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(".indexer." in n for n in unreached), unreached  # the language-model loss never reaches the index branch

def test_save_hf_is_bit_equal(tmp_path):
    """M2 written in the released names reads back bit for bit, config included; M3 is refused."""
    model = golden("m2")[0]
    model.save_hf(tmp_path / "m2")
    again = MiniMax.from_hf(tmp_path / "m2")
    assert again.cfg == model.cfg and all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="writes M2"):
        golden("m3")[0].save_hf(tmp_path / "m3")

def test_released_m3_names_and_fp8(tmp_path):
    """M3's released names (experts apart, a prefix, a vision tower beside) and fp8 tiles read as the same weights."""
    from safetensors.torch import load_file, save_file
    tensors, out = load_file(GOLDEN / "m3" / "model.safetensors"), {}
    for name, t in tensors.items():
        new = "language_model." + re.sub(r"self_attn\.indexer\.([qk])_", r"self_attn.index_\1_", name)
        if ".mlp.gate." in new or ".mlp.experts." in new or "shared_experts" in new:
            new = new.replace("mlp.gate.e_score", "mlp.e_score").replace(".mlp.", ".block_sparse_moe.")
        if new.endswith("experts.gate_up_proj"):
            out.update({new.replace("gate_up_proj", f"{e}.{key}.weight"): half.contiguous()
                        for e, w in enumerate(t) for key, half in zip(("w1", "w3"), w.chunk(2))})
        elif new.endswith("experts.down_proj"):
            out.update({new.replace("down_proj", f"{e}.w2.weight"): w.contiguous() for e, w in enumerate(t)})
        else:
            out[new] = t
    fp8 = (tensors["lm_head.weight"] / 0.5).to(torch.float8_e4m3fn)
    out.update({"vision_tower.patch.weight": torch.zeros(2), "language_model.lm_head.weight": fp8,
                "language_model.lm_head.weight_scale_inv": torch.tensor([[0.5]])})
    save_file(out, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / "m3" / "config.json").read_bytes())
    got, want = MiniMax.from_hf(tmp_path).state_dict(), golden("m3")[0].state_dict()
    head = want.pop("lm_head.weight")
    assert 0 < worst(got["lm_head.weight"], head) < 0.07 * head.abs().max()  # e4m3 has 3 bits of mantissa
    for name in want:
        assert torch.equal(got[name], want[name]), name
    del out["language_model.model.norm.weight"]
    save_file(out, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight"):
        MiniMax.from_hf(tmp_path)

# ---- 10. one forward, one cache ------------------------------------------------------------------
M2_STYLE = dict(qk_norm="layer", gemma_norm=False, activation="swiglu", attn_types=["full"] * 3, mlp_types=["moe"] * 3,
                shared_dim=0)

@pytest.mark.parametrize("kw", [dict(), M2_STYLE])
@pytest.mark.parametrize("chunks", [[1] * 43, [5, 1, 7, 3, 16, 11]])
def test_cached_equals_full(chunks, kw):
    """Token by token and in odd chunks, the cache gives the logits of one full forward (fp64, so 1e-10 and no luck)."""
    model, idx = make_model(dtype=torch.float64, **kw), torch.randint(0, 61, (2, 43))
    full, cache = model(idx)[0], KVCache(model.cfg, 2, 60, dtype=torch.float64)
    outs = [model(part, cache=cache)[0] for part in idx.split(chunks, 1)]
    assert sum(chunks) == 43 and worst(torch.cat(outs, 1), full) < 1e-10

def test_cache_crop_select_expand_and_ragged():
    """Cropping and replaying, picking rows, sharing a prefix, rows of unequal length: always the uncached logits."""
    model, idx = make_model(dtype=torch.float64), torch.randint(0, 61, (2, 40))
    full, cache = model(idx)[0], KVCache(model.cfg, 2, 40, dtype=torch.float64)
    model(idx[:, :30], cache=cache)
    cache.crop(21)
    assert worst(model(idx[:, 21:25], cache=cache)[0], full[:, 21:25]) < 1e-10
    cache.crop(torch.tensor([25, 9]))
    step = torch.stack([idx[0, 25:27], idx[1, 9:11]])
    assert worst(model(step, cache=cache)[0], torch.stack([full[0, 25:27], full[1, 9:11]])) < 1e-10
    cache.select(torch.tensor([1, 1, 0]))
    assert cache.length.tolist() == [11, 11, 27]
    cache.expand(2)
    assert cache.length.tolist() == [11] * 4 + [27] * 2
    step = torch.cat([idx[1:, 11:12].expand(4, 1), idx[:1, 27:28].expand(2, 1)])
    want = torch.stack([full[1, 11]] * 4 + [full[0, 27]] * 2)
    assert worst(model(step, cache=cache)[0][:, 0], want) < 1e-10
    with pytest.raises(AssertionError, match="do not fit"):
        model(idx[:1].expand(6, -1), cache=cache)

def test_causality_by_gradient():
    """No logit depends on a later token, in any layer type: the gradient is exactly zero."""
    model = make_model()
    x = model.embed(torch.randint(0, 61, (1, 30))).detach().requires_grad_()
    model.embed.forward = lambda idx: x
    logits = model(torch.zeros(1, 30, dtype=torch.long))[0]
    grad, = torch.autograd.grad(logits[0, 17].sum(), x)
    assert grad[0, 18:].abs().max() == 0 and grad[0, :18].abs().sum(-1).min() > 0

def mtp_losses(model, doc, targets):
    """The losses of the two MTP modules apart: the first alone, then twice the mean of both, less the first."""
    both, keep = model(doc, targets)[2]["mtp_loss"], model.mtp
    model.mtp = keep[:1]
    first = model(doc, targets)[2]["mtp_loss"]
    model.mtp = keep
    return first, 2 * both - first

def test_documents_do_not_see_each_other():
    """Packed rows equal their documents run apart: logits, MTP loss and KL, with pads that nothing sees."""
    model, L, sizes = make_model(dtype=torch.float64, n_mtp=2).train(), 4, (13, 24, 6)
    docs = [torch.randint(0, 61, (1, n)) for n in sizes]
    idx, pos, weight = (torch.zeros(1, 48, dtype=torch.long) for _ in range(3))
    end, targets, at, apart, mtp = torch.arange(1, 49)[None], torch.full((1, 48), -1), 0, [], []
    for doc, n in zip(docs, sizes):
        s = slice(at, at + n)
        idx[:, s], pos[:, s], end[:, s], weight[:, s] = doc, torch.arange(n), at + n, 1
        targets[:, s] = torch.cat([doc[:, 1:], torch.full((1, 1), 7)], 1)
        apart.append(model(doc, targets[:, s], n_logits=n))
        mtp.append(mtp_losses(model, doc, targets[:, s]))
        at += -(-n // L) * L
    logits, _, aux = model(idx, targets, weight.double(), pos=pos, end=end.int(), n_logits=48)
    assert worst(logits[:, weight[0] > 0], torch.cat([a[0] for a in apart], 1)) < 1e-6  # the rotary tables are fp32
    kl = sum(n * a[2]["index_kl"][:2] for n, a in zip(sizes, apart)) / sum(sizes)
    assert worst(aux["index_kl"][:2], kl) < 1e-6
    counts = [[n - k for n in sizes] for k in (1, 2)]  # module k has n - k targets in a document of n
    want = sum(sum(n * m for n, m in zip(c, losses)) / sum(c) for c, losses in zip(counts, zip(*mtp))) / 2
    assert worst(aux["mtp_loss"], want) < 1e-6
    assert torch.equal(aux["expert_load"][:2], sum(a[2]["expert_load"][:2] for a in apart))

def test_replay_reproduces_a_recorded_choice():
    """aux of one pass, replayed in another with perturbed index and router, gives the recorded blocks and experts."""
    model, idx = make_model(), torch.randint(0, 61, (2, 40))
    logits, _, aux = model(idx)
    dense = make_model(**M2_STYLE)
    assert worst(dense(idx, replay=dense(idx)[2])[0], dense(idx)[0]) < 1e-5
    with torch.no_grad():
        for m in model.moe_layers():
            m.router.bias.add_(torch.randn_like(m.router.bias) * 3)
        for name, p in model.named_parameters():
            if ".indexer." in name:
                p.add_(torch.randn_like(p))
    assert worst(model(idx)[0], logits) > 1e-2
    again, _, aux2 = model(idx, replay=aux)
    assert worst(again, logits) < 1e-5
    assert torch.equal(aux2["block_idx"], aux["block_idx"]) and torch.equal(aux2["experts"], aux["experts"])

def test_mtp_predicts_the_token_after_next():
    """Module k's loss is the cross-entropy of token i+k+1 given the trunk at i and token i+k: rebuilt here by hand."""
    model, idx = make_model(n_mtp=1), torch.randint(0, 61, (2, 21))
    targets, hidden = torch.cat([idx[:, 1:], torch.full((2, 1), 5)], 1), {}
    model.norm.register_forward_pre_hook(lambda _, args: hidden.setdefault("h", args[0]))
    aux = model(idx, targets)[2]
    m, n = model.mtp[0], 20
    x = m.proj(torch.cat([m.e_norm(model.embed(idx[:, 1:])), m.h_norm(hidden["h"][:, :n])], -1))
    x = m.block(x, 3, Call(rope_tables(torch.arange(n).expand(2, n), 4, 5e6)))[0]
    want = F.cross_entropy(model.lm_head(m.norm(x)).flatten(0, 1), targets[:, 1:].flatten())
    assert worst(aux["mtp_loss"], want) < 1e-5

def test_gradients_take_three_roads():
    """Every parameter learns; the KL reaches the index branch alone, and the index branch learns from nothing else."""
    model, idx = make_model(n_mtp=1).train(), torch.randint(0, 61, (2, 40))
    _, loss, aux = model(idx[:, :-1], idx[:, 1:])
    params = dict(model.named_parameters())
    by_kl = torch.autograd.grad(aux["index_kl"].sum(), params.values(), retain_graph=True, allow_unused=True)
    by_lm = torch.autograd.grad(loss + aux["mtp_loss"], params.values(), allow_unused=True)
    for name, kl, lm in zip(params, by_kl, by_lm):
        assert (kl is not None and kl.abs().sum() > 0) == (".indexer." in name), name
        assert (lm is None) == (".indexer." in name), name

def test_loss_at_init_is_log_vocab_and_one_batch_overfits():
    """Fresh weights know nothing (ln V within 10 %); 60 steps on one batch leave a loss under 0.1."""
    torch.manual_seed(0)
    model, idx = MiniMax(small_config(n_mtp=1)).train(), torch.randint(0, 61, (2, 41))
    assert abs(model(idx[:, :-1], idx[:, 1:])[1].item() / math.log(61) - 1) < 0.1
    optimizers, _, _ = train.configure_optimizers(model, 8e-3)
    for _ in range(60):
        _, loss, aux = model(idx[:, :-1], idx[:, 1:])
        (loss + aux["mtp_loss"] + aux["index_kl"].sum()).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert loss < 0.1, loss

# ---- 11. training --------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(4):
        (folder / f"part{i}.py").write_text(TEXT[3000 * i:3000 * (i + 1)], encoding="utf-8")
    return folder

def train_args(corpus, out, *more):
    return ["--data", str(corpus), "--out", str(out), "--device", "cpu", "--seq-len", "64", "--batch-size", "2",
            "--vocab-size", "300", *map(str, more)]

def quiet(main, argv):
    """Run a script's main -> its result and what it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        result = main([str(a) for a in argv])
    return result, text.getvalue()

def refused(main, argv, capsys, code=2):
    """The exit code and one line on stderr, no traceback -> the line."""
    with pytest.raises(SystemExit) as stop:
        quiet(main, argv)
    err = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in err, err
    return err.strip().splitlines()[-1]

@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A short run: its folder, result and output."""
    out = tmp_path_factory.mktemp("run")
    return out, *quiet(train.main, train_args(corpus, out, "--steps", 12, "--eval-every", 5, "--log-every", 4))

def test_run_reports_its_contract(trained):
    """The last line of stdout is JSON with the promised keys, and the loss falls below ln V."""
    _, result, text = trained
    assert json.loads(text.strip().splitlines()[-1]) == result
    assert set("step loss val_bpb tokens tokens_per_s mfu params_total params_active seconds".split()) <= set(result)
    assert result["step"] == 12 and result["tokens"] == 12 * 2 * 64 and 0 < result["val_bpb"] < 8
    assert result["loss"] < math.log(300) and result["mfu"] is None
    state = sample.load_checkpoint(str(trained[0]))
    learned, fresh = state["model"], MiniMax(MiniMaxConfig(**state["config"])).state_dict()
    for name in ("mtp.0.proj.weight", "layers.1.attn.indexer.q_proj.weight", "layers.1.mlp.router.weight"):
        assert abs(learned[name].std() / fresh[name].std() - 1) > 1e-3, f"{name} did not learn"
    assert learned["layers.1.mlp.router.bias"].abs().max() > 0.02  # u = 0.01 a step

def test_resume_is_exact_and_evaluation_harmless(trained, corpus, tmp_path):
    """12 steps = 5 + resume + 7, bit for bit, through the switch to sparse attention; --eval-every changes nothing."""
    def weights(out): return torch.load(out / "ckpt.pt", weights_only=True)["model"]
    quiet(train.main, train_args(corpus, tmp_path / "a", "--steps", 12, "--eval-every", 1000, "--stop-after", 5))
    assert sample.load_checkpoint(str(tmp_path / "a"))["now"]["step"] == 5
    quiet(train.main, ["--resume", "--out", tmp_path / "a", "--device", "cpu"])
    for (name, a), b in zip(weights(tmp_path / "a").items(), weights(trained[0]).values()):
        assert torch.equal(a, b), name
    quiet(train.main, train_args(corpus, tmp_path / "b", "--steps", 12, "--seed", 7))
    assert not torch.equal(weights(tmp_path / "b")["lm_head.weight"], weights(trained[0])["lm_head.weight"])

def test_a_full_attention_run_becomes_sparse(corpus, tmp_path, capsys):
    """--resume --attn msa: every weight is kept, an index branch joins, learns, then chooses; there is no way back."""
    again = ["--resume", "--out", tmp_path, "--device", "cpu", "--lr", 1e-12]
    quiet(train.main, train_args(corpus, tmp_path, "--attn", "full", "--steps", 6))
    old = sample.load_checkpoint(str(tmp_path))["model"]
    assert "nothing is left" in refused(train.main, [*again, "--attn", "msa"], capsys)
    assert "from 75% of the run on" in quiet(train.main, [*again, "--attn", "msa", "--steps", 12])[1]
    new = sample.load_checkpoint(str(tmp_path))["model"]
    assert all(worst(new[k], old[k]) < 1e-6 if k in old else ".indexer." in k for k in new if "bias" not in k)
    assert "trained with msa" in refused(train.main, [*again, "--attn", "full"], capsys)

def test_batches_are_a_pure_function():
    """(seed, split, step) fixes a batch; rows obey documents: targets, positions, pads and end by their definitions."""
    tok = sample.Tokenizer(sample.learn_bpe([TEXT], 300, sample.PATTERN))
    docs = [("a", TEXT[:50]), ("b", TEXT[100:103]), ("c", TEXT[200:700])]
    tokens = train.Tokens(docs, tok, 8, 64)
    one, same, other = (train.get_batch(tokens, 1, 0, s, 4, 64) for s in (5, 5, 6))
    assert all(torch.equal(one[k], same[k]) for k in one) and not torch.equal(one["idx"], other["idx"])
    ids = [[tok.eot] + tok.encode(text) for _, text in docs]
    starts = [0, -(-len(ids[0]) // 8) * 8]
    row, pad = tokens.rows([0], 64), slice(len(ids[0]), starts[1])
    for doc, s in zip(ids, starts):
        n = min(len(doc), 64 - s)
        assert row["idx"][0, s:s + n].tolist() == doc[:n] and row["pos"][0, s:s + n].tolist() == list(range(n))
        assert row["targets"][0, s:s + n].tolist() == (doc + [tok.eot])[1:n + 1]
        assert (row["end"][0, s:s + n] == min(s + len(doc), 64)).all()
    assert (row["targets"][0, pad] == -1).all() and (row["weight"][0, pad] == 0).all()
    assert row["end"][0, pad].tolist() == list(range(pad.start + 1, pad.stop + 1))
    counted = sum((tokens.rows([s], 64)["targets"] >= 0).sum().item() for s in range(0, len(tokens.begin), 64))
    assert counted == sum(map(len, ids)), "every token, and each document's end, is predicted once"

def test_bits_per_byte_of_a_uniform_model(corpus):
    """A model with all logits equal codes every token in log2 V bits: val_bpb is that times tokens over bytes."""
    tok = sample.Tokenizer(sample.learn_bpe([TEXT], 300, sample.PATTERN))
    docs = [("a", TEXT[:3000]), ("b", TEXT[3000:3500])]
    model = MiniMax(small_config(vocab_size=300))
    torch.nn.init.zeros_(model.lm_head.weight)
    n = sum(len(tok.encode(t)) + 1 for _, t in docs)
    got = train.evaluate(model, train.Tokens(docs, tok, 4, 48), 48, 3, "cpu")["bpb"]
    assert abs(got - n * math.log2(300) / sum(len(text.encode()) for _, text in docs)) < 1e-4

def test_corpus_reader(tmp_path):
    """Folders are read in order; binary, empty and undecodable files are skipped and counted; splits never overlap."""
    (tmp_path / ".hidden").mkdir()
    for name, data in (("a.txt", b"alpha\n" * 50), ("b.bin", b"x\0y"), ("c.txt", b"\xff\xfe\xfa"), ("d.txt", b""),
                       (".hidden/e.txt", b"no")):
        (tmp_path / name).write_bytes(data)
    docs, skipped = train.read_corpus(str(tmp_path))
    assert [n for n, _ in docs] == ["a.txt"] and skipped == 3
    for one in (docs, [("line", "hello " * 50 + "\n")]):  # the only newline at the end: cut in the line
        left, right = train.split_corpus(one)
        assert left[0][1] + right[0][1] == one[0][1] and right[0][1]
    names = [(f"file{i}", "text") for i in range(400)]
    left, right = train.split_corpus(names)
    assert 8 <= len(right) <= 35 and sorted(left + right) == sorted(names)
    assert all(int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) < 0.05 * 2 ** 32 for n, _ in right)

def test_muon_orthogonalises():
    """Newton-Schulz brings every singular value near 1, for wide, tall, square and stacked matrices."""
    for shape in ((3, 16, 48), (3, 48, 16), (1, 32, 32)):
        values = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape)))
        assert 0.3 < values.min() and values.max() < 1.4, values

def test_schedule_shape():
    """Warm-up, constant, decay to 0."""
    for progress, want in ((0.0, 0.01), (0.05, 0.51), (0.3, 1), (0.6, 1), (0.8, 0.5), (1, 0)):
        assert abs(train.schedule(progress, 0.1, 0.4) - want) < 1e-9

@pytest.mark.parametrize("eval_every", [1, 200])
def test_divergence_stops_the_run(trained, tmp_path, capsys, eval_every):
    """A rate of 1000, or a NaN in the index branch, ends in a message and exit 1; the checkpoint stays as it was."""
    before = (trained[0] / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(before)
    again = ["--resume", "--out", tmp_path, "--device", "cpu", "--steps", "60", "--eval-every", eval_every]
    line = refused(train.main, [*again, "--lr", "1000"], capsys, code=1)
    assert re.search(r"stopped: (loss spike|loss .* not finite|val_bpb)", line)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    state = sample.load_checkpoint(str(tmp_path))
    state["model"]["layers.1.attn.indexer.q_proj.weight"].fill_(math.nan)
    sample.save_checkpoint(str(tmp_path), **state)
    assert "not finite" in refused(train.main, again, capsys, code=1)
    history = dict(ema=2.0, above=0, step=100)
    with pytest.raises(FloatingPointError):
        train.watch(math.nan, 1.0, history)
    for _ in range(4):
        train.watch(3.5, 1.0, history)
    assert history["ema"] == 2.0
    train.watch(2.1, 1.0, history)  # one calm step clears the count
    assert history["above"] == 0

def test_interrupt_saves_and_kill_is_harmless(corpus, tmp_path):
    """Ctrl-C ends the run with a checkpoint and exit 0; SIGKILL in the middle of a save leaves the checkpoint whole."""
    args = train_args(corpus, tmp_path, "--steps", 100000, "--log-every", 1, "--eval-every", 3)
    run = subprocess.Popen([sys.executable, HERE / "train.py", *args], text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    assert any(line.startswith("step 00004") for line in run.stdout)
    run.send_signal(signal.SIGINT)
    rest = run.stdout.read()
    assert run.wait() == 0 and "go on with --resume" in rest and json.loads(rest.strip().splitlines()[-1])["step"] >= 4
    step = sample.load_checkpoint(str(tmp_path))["now"]["step"]
    assert step >= 4
    slow = ("import os, signal, train\n"
            "def kill(fd):\n    os.ftruncate(fd, 1000)\n    os.kill(os.getpid(), signal.SIGKILL)\nos.fsync = kill\n"
            f"train.main(['--resume', '--out', {str(tmp_path)!r}, '--device', 'cpu', '--stop-after', '{step + 1}'])")
    run = subprocess.run([sys.executable, "-c", slow], cwd=HERE, capture_output=True)
    assert run.returncode == -signal.SIGKILL and (tmp_path / "ckpt.pt.tmp").stat().st_size == 1000
    assert sample.load_checkpoint(str(tmp_path))["now"]["step"] == step

# ---- 12. sampling --------------------------------------------------------------------------------
def test_generate_is_greedy_argmax_of_full_forwards():
    """Temperature 0: generation through cache and MSA decode equals argmax over a full forward at every step."""
    model, prompt = make_model(), [3, 1, 4, 1, 5]
    out = [t.item() for t, _ in sample.generate(model, [prompt], 30, temperature=0)]
    for n, token in enumerate(out):
        logits = model(torch.tensor([prompt + out[:n]]))[0][0, -1]
        assert logits[token] > logits.max() - 1e-4
    assert len(out) == 30

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_generate_from_hf_in_any_dtype(dtype):
    """A checkpoint read in another dtype generates in it: cache and activations follow the model."""
    model = MiniMax.from_hf(GOLDEN / "m3", dtype=dtype).eval()
    out = [t.item() for t, _ in sample.generate(model, [[1, 2]], 20)]
    assert len(out) == 20 and all(0 <= t < 101 for t in out)

def test_minutes_end_a_run(corpus, tmp_path):
    """--minutes bounds the training time; --steps on resume replaces it; a run without anything left says so."""
    result, _ = quiet(train.main, train_args(corpus, tmp_path, "--minutes", 0.01))
    assert 0.6 <= result["seconds"] < 3 and result["step"] > 1
    more, _ = quiet(train.main, ["--resume", "--out", tmp_path, "--device", "cpu", "--steps", result["step"] + 3])
    assert more["step"] == result["step"] + 3
    _, text = quiet(train.main, ["--resume", "--out", tmp_path, "--device", "cpu"])
    assert "nothing left to do" in text

def test_generate_batches_ragged_prompts():
    """Prompts of unequal length, in step: tokens and log-probabilities as of each alone; forced tokens come back."""
    model, prompts = make_model(), [[3, 1, 4, 1, 5, 9, 2], [2, 7], [8, 8, 8, 8]]
    alone = [[(t.item(), p.item()) for t, p in sample.generate(model, [p], 12, temperature=0)] for p in prompts]
    steps = list(sample.generate(model, prompts, 12, temperature=0))
    for row, (prompt, want) in enumerate(zip(prompts, alone)):
        got, forced = [(t[row].item(), p[row].item()) for t, p in steps], len(prompt) - 2
        assert [t for t, _ in got[:forced]] == prompt[2:]
        got = [g for g in got[forced:] if g[0] >= 0]
        assert [t for t, _ in got] == [t for t, _ in want]
        assert worst(*(torch.tensor([p for _, p in x]) for x in (got, want))) < 1e-4

def test_generate_stops_and_fits():
    """Stop tokens end a row (-1 after), the context ends all, and a prompt too long is refused with both numbers."""
    model = make_model()
    first = next(sample.generate(model, [[1, 2]], 5, temperature=0))[0].item()
    assert len(list(sample.generate(model, [[1, 2]], 5, temperature=0, stop={first}))) == 1
    model.cfg.max_seq_len = 20
    assert len(list(sample.generate(model, [[1] * 12], 100))) == 8
    with pytest.raises(ValueError, match="21.*20"):
        next(sample.generate(model, [[1] * 21], 1))

def test_samples_are_seeded_and_follow_the_distribution():
    """One seed, one text; 20,000 draws match softmax(logits) by chi-square; top-k and top-p keep what they promise."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    g = torch.Generator().manual_seed(0)
    counts = torch.bincount(sample.sample_next(logits.expand(20000, 5), generator=g), minlength=5)
    p = logits.softmax(-1)[0]  # 0.56 0.21 0.13 0.08 0.03
    expected = 20000 * p
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001
    assert torch.isfinite(sample.truncate_logits(logits, 1.0, 1.0, 2)).tolist() == [[True, True, False, False, False]]
    for top_p, n in ((0.5, 1), (0.6, 2), (0.85, 3), (1e-9, 1)):
        assert torch.isfinite(sample.truncate_logits(logits, 1.0, top_p, None)).sum() == n, (top_p, p)
    model = make_model()
    runs = [[t.tolist() for t, _ in sample.generate(model, [[1]], 20, 2, generator=torch.Generator().manual_seed(s))]
            for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert any(a != b for a, b in runs[0]), "samples of one prompt must differ"

def test_sample_speaks_from_the_checkpoint(trained):
    """sample.py needs the checkpoint alone; its JSON has the text, and a prompt that ends in a space is healed."""
    result, text = quiet(sample.main, ["--out", trained[0], "--prompt", "def ", "--max-new-tokens", 20,
                                       "--n-samples", 2, "--device", "cpu"])
    assert json.loads(text.strip().splitlines()[-1]) == result and result["text"].startswith("def ")
    assert set("text tokens tokens_per_s prefill_s accepted".split()) <= set(result) and len(result["texts"]) == 2
    assert result["text"] in text
    tok = sample.load_model(sample.load_checkpoint(str(trained[0])))[1]
    ids, allowed = sample.heal(tok, tok.encode("def "))
    assert tok.decode(ids) == "def" and all(tok.spec["ranks"][i].startswith(b" ") for i in allowed.nonzero()[:, 0])

def test_stream_releases_whole_characters_and_hides_stops():
    """A character split over tokens appears once it is whole; a stop text never appears, not even its first half."""
    s = sample.Stream(["END"])
    assert [s.feed(b) for b in (b"\xe4", b"\xb8\xad", b"abE")] == ["", "", "\u4e2da"] and not s.done
    assert s.feed(b"ND tail") == "b" and s.done and s.text == "\u4e2dabE"[:-1]

# ---- 13. bad input, documents, mutants -----------------------------------------------------------
def test_bad_input_is_refused_in_one_line(trained, corpus, tmp_path, capsys):
    """Missing and empty data, unknown names, wrong sizes, absent GPU, later features: exit 2, the value named."""
    (tmp_path / "empty.txt").write_text("")
    for argv, word in ((["--data", "no/such"], "no/such"), (["--data", tmp_path / "empty.txt"], "empty.txt"),
                       (["--preset", "huge"], "huge"), (["--preset", "m2"], "dry-run"), (["--vocab-size", 100], "100"),
                       (["--seq-len", 10 ** 6], "1000000"), (["--seq-len", 100], "100"), (["--attn", "swa"], "swa"),
                       (["--steps", 0], "0"), (["--steps", "x"], "x"), (["--seed", -1], "-1"), (["--lr", "inf"], "inf"),
                       (["--resume", "--out", tmp_path / "none"], "none"), (["--device", "cpux"], "cpux"),
                       (["--minutes", "nan"], "nan"), (["--bias-rate", "nan"], "nan")):
        assert word in refused(train.main, argv, capsys), argv
    for argv, word in ((["--out", tmp_path], "ckpt.pt"), (["--temperature", -1], "-1"), (["--speculate", 2], "later"),
                       (["--prompt", "x " * 3000], "context"), (["--hf", tmp_path], "config.json"),
                       (["--top-p", 0], "0"), (["--temperature", "inf"], "inf")):
        assert word in refused(sample.main, ["--out", trained[0], "--device", "cpu", *argv], capsys), argv
    if not torch.cuda.is_available():
        assert "cuda" in refused(train.main, ["--device", "cuda"], capsys)
        assert "cuda" in refused(sample.main, ["--out", trained[0], "--device", "cuda"], capsys)

def test_damaged_checkpoints_are_refused(trained, tmp_path, capsys):
    """Half a file, another version, a foreign object: exit 2, and the file stays as it was."""
    whole, state = (trained[0] / "ckpt.pt").read_bytes(), sample.load_checkpoint(str(trained[0]))
    for name, write in (("half", lambda f: f.write(whole[:len(whole) // 2])), ("zero", lambda f: None),
                        ("lacks", lambda f: torch.save({k: v for k, v in state.items() if k != "now"}, f)),
                        ("config", lambda f: torch.save({**state, "config": {**state["config"], "new": 1}}, f)),
                        ("version", lambda f: torch.save({**state, "version": 99}, f)),
                        ("list", lambda f: torch.save([1, 2], f))):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "ckpt.pt", "wb") as f:
            write(f)
        before = (tmp_path / name / "ckpt.pt").read_bytes()
        assert "checkpoint" in refused(sample.main, ["--out", tmp_path / name], capsys)
        assert "checkpoint" in refused(train.main, ["--resume", "--out", tmp_path / name], capsys)
        assert (tmp_path / name / "ckpt.pt").read_bytes() == before

def test_full_disk_keeps_the_old_checkpoint(trained, tmp_path, capsys, monkeypatch):
    """No space left: exit 2 with the reason, the old checkpoint whole, no half file beside it."""
    (tmp_path / "ckpt.pt").write_bytes((trained[0] / "ckpt.pt").read_bytes())
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    line = refused(train.main, ["--resume", "--out", tmp_path, "--device", "cpu", "--steps", 14], capsys)
    assert "No space left" in line and os.listdir(tmp_path) == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == (trained[0] / "ckpt.pt").read_bytes()

def test_dry_run_prints_the_published_sizes(capsys):
    """train.py --preset m2 --dry-run: totals to the digit, how 229.9B and 9.8B come out, the cache at three lengths."""
    result, text = quiet(train.main, ["--preset", "m2", "--dry-run"])
    assert result["params_total"] == 228_689_764_864 and result["params_active"] == 9_801_359_872
    for part in ("228,689,764,864", "9,801,359,872", "229,918,958,080", "3,687,602,432", "253,952 bytes a token"):
        assert part in text, part
    assert f"{2 * 62 * 8 * 128 * 2 * 196_608 / 1e9:.3f} GB" in text

def test_bench_reports_its_contract(capsys):
    """bench.py at a short context: gate, rows, ratios and one JSON object at the end; wrong flags are one line."""
    result, text = quiet(bench.main, ["--ctx", 300, "--shape", "m3", "--device", "cpu"])
    assert json.loads(text.strip().splitlines()[-1]) == result and "gate    | passed by m3" in text
    for row in result["rows"]:
        assert set("what shape ctx dense_ms msa_ms speedup dense_util msa_util selection".split()) <= set(row)
        assert row["speedup"] == row["dense_ms"] / row["msa_ms"] and row["ctx"] == 300
    assert [row["what"] for row in result["rows"]] == ["prefill", "prefill", "decode"]
    for argv, word in ((["--ctx", 0], "0"), (["--ctx", "1M"], "1M"), (["--what", "train"], "later"),
                       (["--shape", "m4"], "m4"), (["--device", "cpux"], "cpux"), (["--figure", "no/x.png"], "no")):
        assert word in refused(bench.main, argv, capsys), argv

def test_bench_refuses_to_time_wrong_results(monkeypatch, capsys):
    """An MSA that is off by one percent: no row is printed, the exit code is 1 and the line says what differs."""
    monkeypatch.setattr(msa, "msa_attention", lambda *args, real=msa.msa_attention: real(*args) * 1.01)
    with pytest.raises(SystemExit) as stop:
        quiet(bench.main, ["--ctx", 300, "--shape", "m3", "--device", "cpu"])
    assert "MSA, prefill m3 at T = 1" in stop.value.code

def test_readme_commands_exist():
    """Every flag of every python command in README is one that the script's --help knows."""
    commands = re.findall(r"python (\w+)\.py([^\n`#|]*)", (HERE / "README.md").read_text(encoding="utf-8"))
    for script in (train, sample, bench):
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
            script.main(["--help"])
        mine = [rest for name, rest in commands if name == script.__name__]
        assert mine, script
        for flag in re.findall(r"--[\w-]+", " ".join(mine)):
            assert flag in out.getvalue(), (script, flag)

def test_walk(trained, capsys):
    """One prompt through the five files: text, tokens, batch, forward, loss, gradient, checkpoint, text."""
    model, tok = sample.load_model(sample.load_checkpoint(str(trained[0])))
    ids = tok.encode("def f(x):\n    return x + 1\n" * 12)
    lines = [f"1. sample.Tokenizer    {len(ids)} tokens, {ids[:4]} ..."]
    batch = train.Tokens([("a", tok.decode(ids))], tok, 16, 64).rows([0], 64)
    lines += [f"2. train.Tokens.rows   idx {tuple(batch['idx'].shape)}, first target {batch['targets'][0, 0].item()}"]
    _, loss, aux = model.train()(**batch)
    lines += [f"3. model.MiniMax       loss {loss.item():.3f} = {loss.item() / math.log(2):.2f} bits a token",
              f"4. msa.msa_attention   the last token read blocks {aux['block_idx'][0, 0, -1, 0].tolist()} of 8",
              f"5. moe.MoE             it went to experts {aux['experts'][0, 0, -1].tolist()}"]
    loss.backward()
    gate = model.moe_layers()[0].router.weight.grad.norm().item()
    lines += [f"6. backward            the gate's gradient has norm {gate:.4f}"]
    text = tok.decode([t.item() for t, _ in sample.generate(model.eval(), [ids[:20]], 8, temperature=0)])
    lines += [f"7. sample.generate     {text!r}"]
    assert batch["targets"][0, 0].item() == ids[0] and gate > 0
    with capsys.disabled():
        print("\n" + "\n".join(lines))

def sabotaged_teacher(q, keys, seen):
    """The softmax of the group's mean logit, not the mean of the heads' softmaxes."""
    q = q.unflatten(2, (keys.size(2), -1)).mean(3, keepdim=True)
    scores = (q @ keys.mT * q.size(-1) ** -0.5).masked_fill(~seen[..., None, :], -math.inf)
    return scores.softmax(-1)

def sabotaged_route(logits, bias, n_active, scale=1.0, idx=None):
    """Weights from the biased score."""
    weights, idx = (logits.sigmoid() + bias).topk(n_active, -1)
    return scale * weights / weights.sum(-1, keepdim=True), idx

def sabotaged_rows(self, starts, T, rows=train.Tokens.rows):
    """Targets two tokens ahead."""
    return {k: v.roll(-1, 1) if k == "targets" else v for k, v in rows(self, starts, T).items()}

def sabotaged_cut(logits, temperature, top_p, top_k):
    """top-p that drops the token with which the mass is reached."""
    if top_p < 1:
        return logits.masked_fill(logits.softmax(-1).cumsum(-1) > top_p, -math.inf)
    return logits.masked_fill(logits < logits.topk(top_k or logits.size(-1)).values[:, -1:], -math.inf)

def sabotaged_advance(self, T):
    """A slot is left free after every call."""
    self.length, self.used = self.length + T + 1, self.used + T + 1

def sabotaged_plan(*args, real=msa._plan):
    """The first task does nothing."""
    edges, tasks, ends = real(*args)
    tasks[:, 0, 3] = tasks[:, 0, 2]
    return edges, tasks, ends

HERE_MODULE = sys.modules[__name__]
MUTANTS = [  # what is sabotaged, its owner, its name, what it becomes, the test that must fail
    ("MSA without its causal mask", msa, "selected",
     lambda b, i, L, end: (b[..., None] >= 0).expand(*b.shape, L).flatten(-2), lambda: test_msa_equals_loop(37, 4, 3)),
    ("end ignored", msa, "visible", lambda i, j, end: j <= i[..., None], test_full_attention_obeys_visibility),
    ("own block not forced", msa, "top_blocks", lambda s, own, S: s.topk(min(S, s.size(-1)), -1).indices.int(),
     lambda: test_selection_equals_brute_force(37, 4, 3)),
    ("ties to the highest block", msa, "top_blocks",
     lambda s, own, S, real=msa.top_blocks: s.size(-1) - 1 - real(s.flip(-1), s.size(-1) - 1 - own, S),
     test_ties_go_to_the_lowest_block),
    ("mean for max", torch.Tensor, "amax", torch.Tensor.mean, lambda: test_selection_equals_brute_force(37, 4, 3)),
    ("teacher of mean logits", msa, "group_probs", sabotaged_teacher,
     lambda: test_index_kl_value_and_gradient("blocks")),
    ("weights from biased scores", moe, "route", sabotaged_route, test_bias_moves_choice_never_weight),
    ("bias falls where load is low", moe, "update_bias",
     lambda bias, load, rate: bias.sub_(rate * (load.mean() - load).sign()), test_bias_update_balances),
    ("silu for M3's activation", moe, "gated", lambda h, a: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
     test_swiglu_oai_clamps),
    ("experts unweighted", moe, "experts_grouped",
     lambda x, a, b, w, idx, act: moe.experts_loop(x, a, b, torch.ones_like(w), idx, act),
     lambda: test_loop_equals_grouped("swiglu")),
    ("RoPE on every channel", HERE_MODULE, "apply_rope",
     lambda x, r, real=apply_rope: real(x, [t.repeat(1, 1, 1, 2) for t in r]), test_rope_is_relative_and_partial),
    ("cache one slot late", KVCache, "advance", sabotaged_advance,
     lambda: test_cached_equals_full([5, 1, 7, 3, 16, 11], dict())),
    ("loss scaled by its chunk", HERE_MODULE, "cross_entropy",
     lambda h, W, y, c=2048, real=cross_entropy: real(h, W, y, c) * min(1, c / 38), test_cross_entropy_in_chunks),
    ("momentum not orthogonal", train, "orthogonalize", lambda G, steps=5: G, test_muon_orthogonalises),
    ("top-p one token short", sample, "truncate_logits", sabotaged_cut,
     test_samples_are_seeded_and_follow_the_distribution),
    ("targets shifted twice", train.Tokens, "rows", sabotaged_rows, test_batches_are_a_pure_function),
    ("queries of a block forgotten", msa, "_plan", sabotaged_plan, lambda: test_kernels_equal_torch(0)),
    ("fp8 without its error bound", msa, "quantize_index",
     lambda ki, L, real=msa.quantize_index: (*real(ki, L)[:2], 0 * real(ki, L)[2]),
     test_certified_fp8_is_exact_where_fp8_errs),
    ("embedding scaled", torch.nn.Embedding, "forward", lambda self, idx: self.weight[idx] * 0.9,
     lambda: test_parity_with_transformers("m2")),
]

@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("owner,name,replacement,test", [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutants_are_caught(owner, name, replacement, test, monkeypatch):
    """Each sabotage makes the test that guards it fail."""
    test()
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(AssertionError):
        test()

if __name__ == "__main__":
    class Lessons:
        seen = set()
        def pytest_runtest_logreport(self, report):
            name = report.nodeid.split("::")[1].split("[")[0]
            if report.failed or report.when == "call" and name not in self.seen:
                self.seen.add(name)
                print(f"{report.outcome:6s} {name[5:]:46s} {globals()[name].__doc__.splitlines()[0]}", flush=True)
    sys.exit(pytest.main([__file__, "-p", "no:terminal", *sys.argv[1:]], plugins=[Lessons()]))
