"""MSA against full attention on this machine: one layer, up to --ctx tokens, both sides in one run.

    python bench.py --ctx 1000000                            # prefill and decode, shapes of M2 (48/8) and M3 (64/4)
    python bench.py --ctx 131072 --what decode --shape m3 --figure decode.svg
    torchrun --nproc-per-node 2 bench.py --what prefill      # a prefill that two GPUs share, against one of them alone
    python bench.py --what train --ctx 1M                    # forward and backward of attention, and whole steps
    python bench.py --what tree                              # a training step of rl.py, prefixes merged and not
    python bench.py --what queue --figure queue.svg          # rl.py's strict FIFO, window and greedy
    python bench.py --what generate --out DIR                # tokens/s of a whole model, GPT-2's, and with drafts
    python bench.py --what quality --figure quality.png      # what full, windowed, linear and sparse attention learn
    python bench.py --what thoughts                          # agents' thoughts kept in the history, or dropped

The sides take turns (A B A B) on the same tensors. Dense prefill is cuDNN SDPA, dense decode our split-KV kernel; on a
CPU both are SDPA with a group's G heads as rows, which reads K and V once (enable_gqa: G times, 5 to 11 times slower).
MSA's time has all its stages. Prefill is timed by CUDA events, decode in CUDA graphs over sets of buffers that push
each other out of the L2. A CPU prefills the last 32 queries against the whole context. least ms = what the measured
rates allow; util = useful FLOPs over the matmul rate (prefill, train), needed bytes over the copy rate (decode).
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: no traceback
    at_ctrl_c = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import copy
import gc
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import msa
import rl
import train
from model import (LIGHTNING_TILE, SHORT_ROW, Attention, Context, ContextShard, DecodeWeights, KVCache, MiniMax,
                   MiniMaxConfig, ShortConv, attn_pattern, decode_bytes, lightning_attention, rope_tables,
                   window_attention)
from sample import (Parser, Threads, World, captured, check_figure, command, figure_format, free_memory, generate,
                    held_by_depth, implementations, in_index_warmup, load_checkpoint, load_model, number, pick_device,
                    tokens)

SHAPES = {"m2": (48, 8), "m3": (64, 4)}                    # query heads, KV heads = index heads
D = 128                                # channels of a head
S = 16                                 # blocks that a query reads
L = 128                                # keys of a block
BYTES = {"int8": 1 + 2 / D, "bf16": 2, "fp32": 4}          # of an index key's element; int8 has a bf16 scale a key
CPU_RATES = (2 ** 28, 2048)            # bytes that are copied, rows of a matrix: what a CPU's rates are measured on
COPY_FLOOR = 0.97                      # share of the copy rate that a GPU's dense decode must reach to be a baseline
# Relative RMS. bf16 rounds the probabilities, the partial outputs and the output, 2^-9 each; fp32 only sums differently
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
# MiniMax's speed-ups at a million tokens: (what, shape of the dense side, shape of MSA). Same shape: arXiv 2606.13392
PUBLISHED = {
    ("prefill", "m3", "m3"): "14.2x on an H800",
    ("decode", "m3", "m3"): "7.6x on an H800",
    ("prefill", "m2", "m3"): "9.7x, GPU not stated",
    ("decode", "m2", "m3"): "15.6x, GPU not stated"}
STEP_LR = 1e-3                         # of the steps that --what train times, on random tokens
BUDGETS = (2 ** 12, 2 ** 14, 2 ** 16)  # slots of a micro-batch that --what tree tries for the packed side
WINDOWS = {"fifo": 1, "window": 19, "greedy": math.inf}    # oldest groups that the trainer may take from; 19 = 0.3 N
SIGMAS = (0.5, 0.8, 1.3)               # of the log-normal tails: rl.py's default, and two that are heavier
SEED = 1337                            # of all that is random here, as rl.py's own
TRAINING = f"--steps 20 --seed {SEED}".split()             # flags of rl.py for each of its three trainings
# --what thoughts
TRIAL_TASKS = ("calculator", "tally")
TRIAL_SEEDS = (SEED, 1, 2)
TRIAL_STEPS = 60                       # of a training on rewards
TRIAL_FLAGS = "--tool-errors 0.25"     # of rl.py, in all trainings
TRIAL_TESTS = 400                      # fresh tasks that each policy is tested on
TEST_TASKS = 2                         # their split; 0 is rl.py's training, 1 its imitation

# ---- work and rates ------------------------------------------------------------------------------
# A row's times stand beside what they could be at best: FLOPs and bytes that each side needs, over the FLOP/s and
# bytes/s that this machine reaches in one large matrix product and one large copy, measured in the same run.
# Useful work alone counts: pairs of a query and a key that it sees, and each tensor read or written once.
# Calls are timed in turn (A B A B), so that a machine that slows down slows all of them, and the median is reported.
# Outside a time: allocating and filling the inputs, compiling, and the launch of a CUDA graph.


@dataclass
class Machine:
    """What a script runs on, and how fast that is."""
    device: torch.device
    dtype: torch.dtype                 # of all tensors
    name: str = ""
    rates: dict = field(default_factory=dict)  # the largest measured: copy, bytes/s; matmul, FLOP/s

    @property
    def gpu(self):
        return self.device.type == "cuda"

    @property
    def size(self):
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def index(self):
        """What the index keys are held in, see BYTES."""
        return "bf16" if self.gpu else "fp32"

def capacity(T):
    """Slots of a cache that holds T tokens: whole key blocks."""
    return train.round_up(T, L)

def count_pairs(T, t):
    """Pairs of one of the last t of T queries and a key that it sees."""
    return t * T - t * (t - 1) // 2

def count_chosen(T, t, S, L):
    """The same for MSA: S - 1 whole blocks, and the query's own one up to the query."""
    i = torch.arange(T - t, T)
    return int(torch.minimum(i + 1, (S - 1) * L + i % L + 1).sum())

def work(shape, T, t, B=1, size=2, index=2):
    """Stages of an attention layer, for both sides: {side: [(useful FLOPs, bytes read or written once), ...]}.

    shape     m2 or m3
    T, t      the last t of T queries: prefill t = T, decode t = 1
    B         sequences
    size      bytes of an element
    index     bytes of an element of an index key
    """
    H, Hkv = SHAPES[shape]
    pairs = count_pairs(T, t)
    chosen = count_chosen(T, t, S, L)
    query_bytes = 2 * t * H * D * size                   # q and the output
    token_bytes = 2 * Hkv * D * size                     # k and v of one token
    index_bytes = T * D * index + t * Hkv * D * size     # index keys and index queries

    dense = (4 * B * H * D * pairs, B * (query_bytes + T * token_bytes))
    score = (2 * B * Hkv * D * pairs, B * index_bytes)
    attend = (4 * B * H * D * chosen, B * (query_bytes + min(T, chosen) * token_bytes))
    return {"dense": [dense], "msa": [score, attend]}

def least_ms(stages, rates):
    """What the measured rates allow: a stage takes as long as its products or its bytes, whichever is longer."""
    return 1e3 * sum(max(flops / rates["matmul"], moved / rates["copy"]) for flops, moved in stages)

def timed(call, gpu, warm, wait=10 ** 6):
    """-> ms of the call, by CUDA events or the CPU's clock; what the call returned.

    warm    False: the call may compile or plan first, for seconds, for which the GPU waits before its clock starts
    wait    cycles that it waits for a call that is warm
    """
    if not gpu:
        start = time.perf_counter()
        out = call()
        return 1e3 * (time.perf_counter() - start), out
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # the GPU waits while the host launches a graph (ms) or plans a cuDNN kernel (s): neither is the kernels' time
    torch.cuda._sleep(wait if warm else 2 * 10 ** 9)
    begin.record()
    out = call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), out

def alternate(calls, gpu, check=None, cold=(), reps=5, seconds=3.0):
    """Time calls in turn, each up to `reps` times or its seconds -> {name: ms of each run}.

    calls   {name: function without arguments}; one output is alive at a time
    check   check(name, output of the first timed run), which raises where that is wrong
    cold    names of those that are not called once before they are timed
    """
    times = {name: [] for name in calls}
    for name in calls:
        if name not in cold:
            calls[name]()
    for rep in range(reps):
        for name, taken in times.items():
            if sum(taken) >= 1e3 * seconds:
                continue
            ms, out = timed(calls[name], gpu, name not in cold)
            taken.append(ms)
            if rep == 0 and check:
                check(name, out)
            del out
    return times

def measure_rates(machine):
    """Measure the copy and matrix rates -> those of now. machine.rates keeps the largest: a busy machine's are low."""
    size, n = CPU_RATES
    reps = 5
    if machine.gpu:
        free, _ = torch.cuda.mem_get_info()
        size = min(2 ** 31, free // 4)  # a small GPU has room for no more
        n = 8192
        reps = 20
    source = torch.ones(size, dtype=torch.int8, device=machine.device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=machine.device, dtype=machine.dtype)
    b = torch.randn_like(a)
    times = alternate({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, machine.gpu, reps=reps)

    done = {"copy": 2 * size, "matmul": 2 * n ** 3}  # bytes read and written, FLOPs
    now = {name: 1e3 * amount / statistics.median(times[name]) for name, amount in done.items()}
    machine.rates = {name: max(rate, machine.rates.get(name, 0)) for name, rate in now.items()}
    return now

# ---- the two sides -------------------------------------------------------------------------------
# Full attention is the fastest that we know of on each device, so that MSA's ratio is over no straw man: cuDNN's kernel
# in prefill and training, our split-KV kernel in decode, and torch's flash attention on a CPU. Both sides get the same
# q, k and v; MSA's time includes scoring the keys (qi, ki), choosing S blocks, and attention over them.
# Shapes, in all sections: q (B, t, H, D); k, v (B, slots, Hkv, D); qi (B, t, Hkv, D); ki (B, slots, D).

def pick_impl(gpu, what, T=2 ** 25):
    """Which code each side runs on T tokens, full attention's and MSA's: full(), sparse_*() and the card ask here."""
    if not gpu:
        return "cpu flash", "torch"
    if what == "decode":
        return "triton", "triton"
    if T < L:  # prefill and train: cuDNN does not run on every length below one key block
        return "math", "triton"
    return "cudnn", "triton"

def impl_names(gpu, what, T=2 ** 25):
    """pick_impl(), in words, with versions."""
    kernels = "Triton absent"
    if msa.triton is not None:
        compiled = isinstance(msa._key, msa.triton.JITFunction)
        kernels = f"Triton {msa.triton.__version__}, {'compiled' if compiled else 'its interpreter'}"
    names = {"cpu flash": f"torch {torch.__version__}'s CPU flash attention", "torch": "the torch half of msa.py",
             "cudnn": f"SDPA by cuDNN {torch.backends.cudnn.version()}", "math": "SDPA by torch's matrix products",
             "triton": f"kernels of msa.py, {kernels}"}
    return tuple(names[side] for side in pick_impl(gpu, what, T))

def full(q, k, v, T, length=None):
    """The best full attention there is, over the first T keys; cuDNN raises where it cannot run.

    q       (B, t, H, D), the last t of T queries
    k, v    (B, slots, Hkv, D)
    length  decode alone: (B,) int32, the new token's slot
    -> (B, t, H, D), and None where MSA returns its blocks
    """
    what = "prefill" if length is None else "decode"
    impl, _ = pick_impl(q.is_cuda, what, T)
    k = k[:, :T]
    v = v[:, :T]
    if impl == "cpu flash":
        return dense_rows(q, k, v), None
    if impl == "triton":
        return msa.full_attention(q, k, v, None, length, "triton"), None
    return sdpa(q, k, v, impl), None

def sdpa(q, k, v, impl):
    """torch's full attention of every query, by the kernel that pick_impl() names; it has a backward.
    q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D)"""
    backends = {"cpu flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backends[impl]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)

def dense_rows(q, k, v):
    """CPU: the last t of T queries, a group's heads as rows of one product; only the last t keys need a mask.
    q (B, t, H, D), k and v (B, T, Hkv, D) -> (B, t, H, D)"""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unlike SDPA it returns the log-sum-exp
    t, T = q.size(1), k.size(1)
    G = q.size(2) // k.size(2)
    rows = q.unflatten(2, (-1, G)).transpose(1, 2).flatten(2, 3)                                 # (B, Hkv, t * G, D)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    mask = torch.full((t, t), -math.inf).triu(1).repeat_interleave(G, 0)[None, None]              # (1, 1, t * G, t)
    first = T - t                      # position of the first query: all see the keys before it
    out, lse = flash(rows, k[:, :, first:], v[:, :, first:], attn_mask=mask)
    if first > 0:
        early, early_lse = flash(rows, k[:, :, :first], v[:, :, :first])
        out = torch.lerp(out, early, (early_lse - lse).sigmoid()[..., None])
    return out.unflatten(2, (t, G)).transpose(1, 2).flatten(2, 3)

def sparse_prefill(q, k, v, qi, ki, T):
    """MSA of the last t of T queries, choosing included -> (1, t, H, D), blocks (1, t, Hkv, S)."""
    _, impl = pick_impl(q.is_cuda, "prefill")
    t = q.size(1)
    start = torch.tensor([T - t], dtype=torch.int32) if t < T else None  # on a CPU alone
    block_idx = msa.select_blocks(qi, ki, S, L, None, start, impl)
    return msa.msa_attention(q, k, v, block_idx, L, None, start, impl), block_idx

def sparse_decode(q, k, v, qi, ki, length, int8=None):
    """MSA of one new token of B sequences -> (B, 1, H, D), blocks (B, 1, Hkv, S)."""
    _, impl = pick_impl(q.is_cuda, "decode")
    return msa.msa_decode(q, k, v, qi, ki, S, L, length, None, impl, int8)

# ---- checks --------------------------------------------------------------------------------------
# Every path is checked against brute force on short contexts before anything is timed, and the first timed run of
# each side is checked again: for some queries, the chosen blocks against the scores in torch, and the output against
# softmax by its definition, in fp32 or fp64. An error ends the script: no time is printed of a wrong result.
# Checks take place between the timed runs, never within one.

def near(name, got, want, layers=1):
    """ArithmeticError where the relative RMS error exceeds what got's dtype is allowed, `layers` times."""
    want = want.double()
    error = ((got.double() - want).norm() / want.norm()).item()
    allowed = layers * TOLERANCE[got.dtype]
    if not error <= allowed:           # also where it is nan
        raise ArithmeticError(f"{name}: relative RMS error {error:.1e}, allowed {allowed:.0e}")

def check_finite(name, x):
    """ArithmeticError where x holds nan or inf."""
    if not math.isfinite(x.sum(dtype=torch.float32)):
        raise ArithmeticError(f"{name} holds nan or inf")

def brute_force(q, k, v, i, blocks=None):
    """One query by the definition. q (H, D), k and v (Tk, Hkv, D), blocks (Hkv, S) or None for all -> (H, D)."""
    wide = torch.float64 if q.is_cuda else torch.float32
    groups = q.to(wide).unflatten(0, (k.size(1), -1))                                                   # (Hkv, G, D)
    out = []
    for h, x in enumerate(groups):
        if blocks is None:
            j = torch.arange(i + 1, device=k.device)
        else:
            within = torch.arange(L, device=k.device)
            j = (blocks[h, :, None] * L + within).flatten()
        j = j[(j >= 0) & (j <= i)]
        scores = x @ k[j, h].to(wide).T * D ** -0.5                                                # (G, keys)
        out.append(scores.softmax(-1) @ v[j, h].to(wide))
    return torch.cat(out)

def check_choice(name, qi, keys, blocks, i):
    """blocks (Hkv, S): i's own, then at each rank one whose score belongs there within 2^-15 |q| max |k|, then -1."""
    n_earlier = i // L
    scores = qi.to(keys.dtype) @ keys[:n_earlier * L].T
    scores = scores.view(len(qi), n_earlier, L).amax(2)                                        # (Hkv, earlier blocks)
    n_chosen = min(S - 1, n_earlier)
    want = scores.topk(n_chosen).values                                                        # (Hkv, chosen)
    own = blocks[:, 0]
    chosen = blocks[:, 1:1 + n_chosen]
    none = blocks[:, 1 + n_chosen:]

    found = scores.gather(1, chosen.clamp(min=0).long())
    allowed = 2 ** -15 * keys.norm(dim=-1).max()
    misplaced = ((found - want).abs() / qi.norm(dim=-1, keepdim=True) > allowed).any()
    twice = any(len(set(row)) < len(row) for row in chosen.tolist())
    fine = (own == n_earlier).all() and (chosen >= 0).all() and (none == -1).all()
    if not fine or misplaced or twice:
        raise ArithmeticError(f"{name}: query {i} reads blocks {blocks.tolist()}, not those of highest score")

def check_rows(name, out, block_idx, q, k, v, qi, ki, first, most=256):
    """Nothing nan, and `most` queries, first and last too, against brute force.

    name              what is checked, for the line of an error
    out               (B, t, H, D), what was computed for t queries
    block_idx         (B, t, Hkv, S), the blocks that were chosen; None: the dense side
    q, k, v, qi, ki   what it was computed from
    first             position of the first query
    most              queries to check, of each sequence
    """
    check_finite(f"{name}: the output", out)
    if block_idx is None:  # brute force over all keys takes its time
        most = min(most, 16 if q.is_cuda else 1)
    last = q.size(1) - 1
    rows = {last * n // most for n in range(1, most + 1)}
    if most > 1:
        rows.add(0)
    for b, keys in enumerate(ki):
        if q.is_cuda:
            keys = keys.double()
        for n in rows:
            blocks = None if block_idx is None else block_idx[b, n]
            if blocks is not None and (q.is_cuda or (last - n) % 8 == 0):
                check_choice(name, qi[b, n], keys, blocks, first + n)
            want = brute_force(q[b, n], k[b], v[b], first + n, blocks)
            near(f"{name}, query {first + n}", out[b, n], want)

def gate(machine, shape, what):
    """A path to be timed, on short contexts: prefill of one sequence, or a decode step of two. Every side against brute
    force, and MSA against the dense side where S blocks are all there are."""
    lengths = [1, 100, S * L - 81, 2 * S * L + 17]
    if machine.gpu:
        lengths.append(20_000)
    B = 2 if what == "decode" else 1
    for T in lengths:
        t, slots = timed_sizes(machine, what, T)
        q, qi = random_queries(machine, SHAPES[shape], B, t)
        k, v, ki = random_cache(machine, SHAPES[shape], B, slots)
        poison = [torch.full_like(q, math.nan) for _ in range(3)]
        del poison                     # what is allocated next lies where these were

        # what both sides compute
        if what == "prefill":
            outs = {"MSA": sparse_prefill(q, k, v, qi, ki, T), "dense": full(q, k, v, T)}
        else:
            length = torch.full((B,), T - 1, dtype=torch.int32, device=machine.device)
            outs = {"MSA": sparse_decode(q, k, v, qi, ki, length),
                    "dense": full(q, k, v, T, length),
                    "certified int8": sparse_decode(q, k, v, qi, ki, length, msa.quantize_index(ki, L))}
            if not torch.equal(outs["MSA"][1], outs["certified int8"][1]):
                raise ArithmeticError(f"gate: certified int8 chooses other blocks at T = {T}")

        # what it should be
        for side, out in outs.items():
            check_rows(f"gate: {side}, {what} {shape} at T = {T}", *out, q, k, v, qi, ki, T - t, 15)
        if T <= S * L:
            near(f"gate: MSA against dense, {what} {shape} at T = {T} <= S * L", outs["MSA"][0], outs["dense"][0])

# ---- rows of prefill and decode ------------------------------------------------------------------
# A row is one layer's attention at one length: ms of full attention and of MSA, medians of their runs, and the ratio.
# util is the share of the measured rate: of the matrix rate in prefill and training, of the copy rate in decode.
# Outside on both sides: the projections from x to q, k, v and back, RoPE and norms; on MSA's also x to qi and ki.
# Lengths double up to --ctx, as far as memory reaches. All tensors are random numbers of variance 1.

def timed_sizes(machine, what, T):
    """Of T tokens -> t, how many queries are timed, always the last ones; slots, how many keys the tensors hold."""
    if what == "decode":
        return 1, capacity(T)
    if machine.gpu:
        return T, T
    return min(T, 32), capacity(T)     # a CPU gathers whole key blocks in place

def fill(machine, *size):
    """Random numbers of variance 1: normal, on a CPU uniform, which takes a fifth of the time."""
    x = torch.empty(size, device=machine.device, dtype=machine.dtype)
    return x.normal_() if machine.gpu else x.uniform_(-3 ** 0.5, 3 ** 0.5)

def random_queries(machine, heads, *size):
    """-> q (*size, H, D), qi (*size, Hkv, D); heads is (H, Hkv)."""
    H, Hkv = heads
    return fill(machine, *size, H, D), fill(machine, *size, Hkv, D)

def random_cache(machine, heads, *size):
    """-> k and v (*size, Hkv, D), ki (*size, D)."""
    _, Hkv = heads
    k = fill(machine, *size, Hkv, D)
    v = fill(machine, *size, Hkv, D)
    return k, v, fill(machine, *size, D)

def n_sets(machine, shape, T, B):
    """Sets of buffers of a decode row: what is read between two uses of a set exceeds three times the last cache."""
    cache = 2 ** 25
    index = machine.size
    if machine.gpu:
        cache = torch.cuda.get_device_properties(machine.device).L2_cache_size
        index = 1                      # int8 index keys
    moved = sum(moved for _, moved in work(shape, T, 1, B, machine.size, index)["msa"])
    return min(64, math.ceil(3 * cache / moved))  # more only below 4K

def row_bytes(machine, shape, what, B, T):
    """About the memory of a row, in bytes: a GiB for the runtime, the keys, and in prefill what a query needs."""
    H, Hkv = SHAPES[shape]
    key = (2 * Hkv + 1) * D * machine.size
    if machine.gpu:
        key += 16 * D                  # quantize_index, in fp32
    sets = n_sets(machine, shape, T, B) if what == "decode" else 1
    need = 2 ** 30 + capacity(T) * B * sets * key
    if what == "prefill" and machine.gpu:
        # q, an output, two index branches, the plan; the partial outputs of one chunk
        query = 2 * (H + Hkv + 1) * D * machine.size + 48 * Hkv * S
        chunk = 2 ** 14 * H * S * D * machine.size
        need += T * query + chunk
    return need

def lengths_that_fit(args, machine, shape, what, B):
    """8K, 16K, ... and --ctx; 16K, 64K, ... on a CPU; a batch of 8: the longest, decode alone. No more than fits."""
    if what not in args.whats or (what, B) == ("prefill", 8):
        return []
    exponents = range(13, 26) if machine.gpu else range(14, 26, 2)
    lengths = [2 ** n for n in exponents if 2 ** n < args.ctx] + [args.ctx]
    free = 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # the system needs some, too
    if machine.gpu:
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    fit = [T for T in lengths if row_bytes(machine, shape, what, B, T) <= free]
    if args.ctx not in fit:
        need = row_bytes(machine, shape, what, B, args.ctx)
        print(f"memory  | {what} {shape}, batch {B}: {args.ctx:,} tokens need {need / 1e9:.1f} GB of "
              f"{free / 1e9:.1f}; the longest length that fits is {max(fit, default=0):,}", flush=True)
    return fit if B == 1 else fit[-1:]

def add_utilisation(row, stages, rates):
    """Share of a measured rate that each side reaches: of the matrix rate, by useful FLOPs; in decode of the copy rate,
    by the bytes that it needs."""
    for side, parts in stages.items():
        flops, moved = map(sum, zip(*parts))
        needed_s = moved / rates["copy"] if row["what"] == "decode" else flops / rates["matmul"]
        row[f"{side}_util"] = 1e3 * needed_s / row[f"{side}_ms"]

def side_row(machine, stages, dense, sparse, **row):
    """A row that compares both sides, from ms of each run; row: what was run, that is what, shape, ctx and so on."""
    row.update(dense_ms=statistics.median(dense), msa_ms=statistics.median(sparse))
    row["speedup"] = row["dense_ms"] / row["msa_ms"]
    add_utilisation(row, stages, machine.rates)
    row["dense_impl"], row["msa_impl"] = impl_names(machine.gpu, row["what"], row["ctx"])
    return row

def make_row(machine, what, shape, T, t, B, selection, index, dense, sparse):
    """A row from both sides' times, printed at once with what must be known beside it.

    what, shape         prefill or decode, m2 or m3
    T, t, B             the last t of T queries, of B sequences
    selection           random or structured index branch
    index               what the index keys are held in, see BYTES
    dense, sparse       ms of each run
    """
    stages = work(shape, T, t, B, machine.size, BYTES[index])
    row = side_row(machine, stages, dense, sparse, what=what, shape=shape, ctx=T, queries=t, batch=B,
                   selection=selection, index=index)
    if max(row["dense_util"], row["msa_util"]) > 1 and not machine.gpu:  # other processes slowed the rates: once more
        measure_rates(machine)
        add_utilisation(row, stages, machine.rates)

    # a GPU's dense decode streams its keys, or it is no baseline; a CPU's may be bound by the products, not the bytes
    streams = what == "decode" and machine.gpu
    fair = not streams or row["dense_util"] >= COPY_FLOOR
    row["predicted_ms"] = {side: least_ms(stages[side], machine.rates) for side in stages}

    notes = []
    if index == "int8":
        notes.append("the kernels' time alone")
    if max(row["dense_util"], row["msa_util"]) > 1:
        why = "a copy writes, too" if streams else "the rates were measured on a busier machine"
        notes.append(f"util > 100 %: {why}")
    if not fair:
        row["speedup"] = None
        notes.append(f"no ratio: full attention reads at less than {COPY_FLOOR:.0%} of the copy rate")

    speedup = f"{row['speedup']:7.2f}x" if fair else "    none"
    least = row["predicted_ms"]
    print(f"{what:8}{shape:4}{T:>10,} {B:>2}  {selection:11}{index:5}|"
          f"{row['dense_ms']:11.3f} {row['dense_util']:4.0%} |{row['msa_ms']:12.3f} {row['msa_util']:4.0%} | "
          f"{speedup} |{least['dense']:11.3f} {least['msa']:8.3f} | {len(dense)}, {len(sparse)}",
          *notes, sep="; ", flush=True)
    return row

def print_head(machine, whats):
    """The head of the table, and below it the rules that its rows follow."""
    head = ("\nwhat    shape     ctx  B  selection  index|   dense ms util |     MSA ms util | speed-up | "
            "least ms | runs")
    lines = []
    if "prefill" in whats and not machine.gpu:
        lines += ["prefill: of the last 32 queries alone, against the whole context"]
    if "decode" in whats and machine.gpu:
        lines += [f"decode: a ratio only where full attention reads at {COPY_FLOOR:.0%} of the copy rate or more,",
                  "    at any length and batch; elsewhere both times stand alone",
                  "int8: the kernels' time; the copy's upkeep (quantising the new token's block) is outside"]
    elif "decode" in whats:
        lines += ["decode: full attention here is bound by products as much as by bytes, so that it need not",
                  "    reach the copy rate; util says what it reaches"]
    lines += ["outside, on both sides: projecting x to q, k, v and back; on MSA's also to qi and ki"]
    print(head, *lines, sep="\n        ", flush=True)

def kernel_rows(machine, row, call, calls=1):
    """Print a call's GPU time by kernel, over `calls` steps, beside what was expected and the least its design allows.

    KV-outer writes S - 1 partial outputs a query and head and gathers q as often, and the combine kernel reads them.
    In decode a kernel starts while the one before it ends, and waits: its time here is longer than its share."""
    H, Hkv = SHAPES[row["shape"]]
    B, t = row["batch"], row["queries"]
    score, attend = work(row["shape"], row["ctx"], t, B, machine.size, BYTES[row["index"]])["msa"]
    out_bytes = B * t * H * D * machine.size
    block_bytes = L * D * machine.size
    gathered = (attend[0] * (S - 1) / S, 2 * (S - 1) * out_bytes)
    # its (FLOPs, bytes); what to expect of it, written before it ran: share of the roofline, ms of latency, the rest
    design = {
        "_index_kernel": (score, 0.8, 0, "a running top 16 between products"),
        "_kv_outer_kernel": (gathered, 0.55, 0, "gathers of q, parts written"),
        "_combine_kernel": ((0, (S + 2) * out_bytes), 0.85, 0, "the own block"),
        "_scan_kernel": (score, 1, 3e-3, "ramp-up"),
        # random keys: some 2 S blocks a head
        "_rescore_kernel": ((0, B * Hkv * 2 * S * block_bytes), 1, 6e-3, "latency: find a floor, load blocks"),
        "_attend_kernel": (attend, 1, 10e-3, "latency: choose, load, join")}

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times = {}
    for event in profile.key_averages():
        name = event.key if event.key in design else "all others"
        times[name] = times.get(name, 0) + event.self_device_time_total / 1e3 / calls
    for name, ms in times.items():
        line = f"        {name:16} {ms:10.4f} ms"
        if name in design:
            stage, share, wait, rest = design[name]
            floor = least_ms([stage], machine.rates)
            line += f", expected {floor / share + wait:.4f}, roofline {floor:.4f} ({floor / ms:.0%}); the rest: {rest}"
        print(line)
    row["kernels"] = times

def cache_rows(args, machine, shape, B, prefill, decode):
    """All rows of one shape and batch. One cache, filled once and freed on return, holds the keys of them all.

    B         sequences
    prefill   lengths of its prefills, in tokens
    decode    lengths of its decode steps
    """
    slots = [capacity(T) for T in prefill]
    slots += [n_sets(machine, shape, T, B) * B * capacity(T) for T in decode]
    cache = random_cache(machine, SHAPES[shape], max(slots, default=L))
    rows = []
    for T in prefill:
        rows += prefill_length(args, machine, shape, T, cache)
    for T in decode:
        rows += decode_length(args, machine, shape, B, T, cache)
    return rows

# ---- prefill -------------------------------------------------------------------------------------
# All T queries against T keys, causal; a CPU computes the last 32 queries alone, against the whole context.
# MSA runs twice. With a random index branch, neighbouring queries choose unlike blocks: few queries share a block that
# a kernel loads. With a structured one they choose nearly the same blocks. Dense attention is the same for both.
# Timed by CUDA events around one call. Where a dense run takes seconds it takes place once, not warmed up.

def structured(T, t, Hkv, ki):
    """Index queries that turn slowly (a new direction every 512 tokens, lines between) and share one direction, which
    the keys of block 0 have: neighbours agree, block 0 is a sink. -> qi of the last t (1, t, Hkv, D), ki (1, Tk, D)."""
    common = torch.randn(D, device=ki.device)
    turn = torch.randn(T // 512 + 2, Hkv, D, device=ki.device)
    qi = ki.new_empty(1, t, Hkv, D)
    positions = torch.arange(T - t, T, device=ki.device)
    for rows, i in zip(qi[0].split(2 ** 16), positions.split(2 ** 16)):  # wide tensors for a part at a time
        share = (i % 512 / 512)[:, None, None]
        rows.copy_(torch.lerp(turn[i // 512], turn[i // 512 + 1], share) + common)
    ki = ki.clone()
    ki[:, :L] += common.to(ki.dtype)
    return qi, ki

def overlap(block_idx):
    """Mean number of distinct blocks that 64 neighbouring queries of one head choose, over some 32 such windows."""
    windows = block_idx[0].split(64)[::-1]
    every = math.ceil(len(windows) / 32)
    counts = []
    for window in windows[::every]:
        for head in window.unbind(1):
            counts.append(len(head[head >= 0].unique()))
    return statistics.mean(counts)

def prefill_length(args, machine, shape, T, cache):
    """The last queries of T tokens, whose keys a cache of slots holds: k and v (slots, Hkv, D), ki (slots, D).
    -> two rows: the index branch is random or structured, q, k and v are the same, and so is the dense side."""
    t, slots = timed_sizes(machine, "prefill", T)
    q, qi = random_queries(machine, SHAPES[shape], 1, t)
    k, v, ki = (x[None, :slots] for x in cache)
    turning = structured(T, t, qi.size(2), ki)
    calls = {"dense": partial(full, q, k, v, T),
             "random": partial(sparse_prefill, q, k, v, qi, ki, T),
             "structured": partial(sparse_prefill, q, k, v, *turning, T)}
    distinct = {}

    def check(name, out):
        branch = turning if name == "structured" else (qi, ki)
        check_rows(f"prefill {shape}, {T} tokens, {name}", *out, q, k, v, *branch, T - t)
        if name != "dense":
            distinct[name] = overlap(out[1])

    # a dense run of seconds takes place once: the shorter lengths have warmed up all but its plan
    cold = ()
    if least_ms(work(shape, T, t)["dense"], machine.rates) >= (2000 if machine.gpu else 500):
        cold = ("dense",) if machine.gpu else calls
    times = alternate(calls, machine.gpu, check, cold, seconds=3.0 if machine.gpu else 0.3)

    rows = [make_row(machine, "prefill", shape, T, t, 1, name, machine.index, times["dense"], times[name])
            for name in ("random", "structured")]
    print(f"        distinct blocks of {min(64, t)} neighbours, a head: random {distinct['random']:.0f}, structured "
          f"{distinct['structured']:.0f}", flush=True)
    if machine.gpu and T == args.ctx:
        kernel_rows(machine, rows[0], calls["random"])
    return rows

# ---- prefill on several ranks --------------------------------------------------------------------
# Under torchrun each rank starts with its share of q, k, v, qi and ki of one row, as a model with context parallelism
# has them (see model.ContextShard), and ends with the outputs of its queries. Sending the keys to all is inside the
# time, which is the last rank's. Rank 0 computes the same row alone, with all in its memory, in turn with that; it is
# the same operation as in a row above, and chooses the same blocks.

RANK_REPS = 3

def chunks_prefill(q, k, v, qi, ki, shard):
    """MSA of a rank's queries against the whole row's keys -> outputs and chosen blocks, (1, T / size, …) each.
    q and qi (1, T / size, …); k, v, ki (1, T, …)"""
    _, impl = pick_impl(q.is_cuda, "prefill")
    outs = []
    chosen = []
    for (start, _), queries, index_queries in zip(shard.parts, q.chunk(2, 1), qi.chunk(2, 1)):
        block_idx = msa.select_blocks(index_queries, ki, S, L, None, start, impl)
        outs.append(msa.msa_attention(queries, k, v, block_idx, L, None, start, impl))
        chosen.append(block_idx)
    return torch.cat(outs, 1), torch.cat(chosen, 1)

def shard_prefill(q, k, v, qi, ki, shard):
    """The same, from a rank's share of the keys: (1, T / size, …)."""
    k, v, ki = shard.gather(k, v, ki)
    return chunks_prefill(q, k, v, qi, ki, shard)

def balance(machine, shape, T, size, reps=RANK_REPS):
    """What each of so many ranks would compute of a prefill of T tokens, one after the other on this machine, and the
    whole -> dict: ms of the whole and of each rank; the whole over the slowest rank, what communication leaves."""
    q, qi = random_queries(machine, SHAPES[shape], 1, T)
    cache = random_cache(machine, SHAPES[shape], 1, T)
    k, v, ki = cache
    shards = [ContextShard(rank, size, T) for rank in range(size)]
    calls = {"whole": partial(sparse_prefill, q, k, v, qi, ki, T)}
    for rank, shard in enumerate(shards):
        calls[rank] = partial(chunks_prefill, shard.take(q), k, v, shard.take(qi), ki, shard)
    times = {name: statistics.median(taken) for name, taken in alternate(calls, machine.gpu, reps=reps).items()}
    whole = times.pop("whole")
    ranks = list(times.values())
    return dict(shape=shape, ctx=T, ranks=size, whole_ms=whole, rank_ms=ranks, speedup=whole / max(ranks))

def check_same_blocks(world, shard, whole, own):
    """ArithmeticError unless the blocks that a rank chose are those of rank 0, which computed the whole row alone.
    whole (1, T, Hkv, S), None on other ranks; own (1, T / size, Hkv, S)"""
    if whole is None:
        whole = own.new_empty(1, shard.T, *own.shape[2:])
    dist.broadcast(whole, 0)
    if world.any(not torch.equal(shard.take(whole), own)):
        raise ArithmeticError(f"prefill of {shard.T} tokens on {world.size} ranks: not the blocks of one alone")

def rank_row(machine, world, shape, ctx):
    """A row of the prefill that all ranks share; the context is rounded up to what they can share."""
    T = train.round_up(ctx, 2 * world.size * L)
    shard = ContextShard(world.rank, world.size, T)
    torch.manual_seed(SEED + world.rank)
    q, qi = random_queries(machine, SHAPES[shape], 1, T // world.size)
    k, v, ki = random_cache(machine, SHAPES[shape], 1, T // world.size)
    calls = {"gather": partial(shard.gather, k, v, ki), "all": partial(shard_prefill, q, k, v, qi, ki, shard)}

    # rank 0 alone, on what all ranks have together
    whole = *shard.gather(q, qi), *shard.gather(k, v, ki)
    alone = None
    if world.is_first:
        whole_q, whole_qi, *keys = whole
        whole_k, whole_v, whole_ki = keys
        alone = partial(sparse_prefill, whole_q, whole_k, whole_v, whole_qi, whole_ki, T)
    del whole

    times = dict(one=[], gather=[], all=[])
    for rep in range(1 + RANK_REPS):       # the first compiles, and is checked
        found = {}
        if alone is not None:
            ms, found["one"] = timed(alone, machine.gpu, rep > 0)
            times["one"].append(ms)
        for name, call in calls.items():
            world.wait()
            ms, found[name] = timed(call, machine.gpu, rep > 0)
            times[name] += world.largest(ms)
        if rep == 0:
            out, block_idx = found["all"]
            _, blocks_alone = found.get("one", (None, None))
            check_same_blocks(world, shard, blocks_alone, block_idx)
            k_row, v_row, ki_row = found["gather"]
            for (start, _), *chunk in zip(shard.parts, *(x.chunk(2, 1) for x in (out, block_idx, q, qi))):
                out, block_idx, queries, index_queries = chunk
                check_rows(f"prefill {shape}, rank {world.rank} of {world.size}, from token {start} on",
                           out, block_idx, queries, k_row, v_row, index_queries, ki_row, start, 32)
            del out, block_idx, k_row, v_row, ki_row
        del found

    one_ms, = world.agree(statistics.median(times["one"][1:]) if times["one"] else 0)
    gather_ms, all_ms = (statistics.median(times[name][1:]) for name in ("gather", "all"))
    flops = sum(flops for flops, _ in work(shape, T, T, 1, machine.size, machine.size)["msa"])
    row = dict(what="prefill", shape=shape, ctx=T, ranks=world.size, selection="random", index=machine.index,
               one_ms=one_ms, msa_ms=all_ms, speedup=one_ms / all_ms, gather_ms=gather_ms,
               gather_share=gather_ms / all_ms,
               msa_util=1e3 * flops / (world.size * machine.rates["matmul"]) / all_ms,
               dense_ms=None, dense_util=None)
    print(f"prefill {shape}{T:>11,} {world.size:>5} | {one_ms:11.3f} |{all_ms:11.3f} {row['msa_util']:4.0%} | "
          f"{row['speedup']:5.2f}x |{gather_ms:10.3f} {row['gather_share']:5.1%}", flush=True)
    return row

@torch.no_grad()
def run_ranks(args, machine, world):
    """--what prefill under torchrun: one row of each shape."""
    layer_card(args, machine)
    for shape in args.shapes:
        gate(machine, shape, "prefill")
    print("gate    | passed: choice against torch, output against brute force")
    print("\nwhat    shape     ctx ranks |  one, alone |  all ms    util | speed-up | gather ms, its share")
    rows = [rank_row(machine, world, shape, args.ctx) for shape in args.shapes]
    return dict(device=machine.name, rows=rows, rates=machine.rates)

# ---- decode --------------------------------------------------------------------------------------
# One new token of each of B sequences against its T keys. The time is that of reading keys, so that no run may find
# them in the L2: a CUDA graph goes through sets of buffers that are larger than it together, and a run's time is
# divided by the calls. MSA also runs with certified int8 index keys, which must choose the same blocks as bf16.
# Outside: launching the graph, and keeping the int8 copy up to date.

def repeat(call, sets, rounds):
    """-> a function that calls on every set and returns the outputs; on a GPU a CUDA graph of `rounds` such rounds."""
    if not sets[0][0].is_cuda:
        return lambda: [call(*buffers) for buffers in sets]
    call(*sets[0])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            outs = [call(*buffers) for buffers in sets]
    for out, _ in outs:
        out.fill_(math.nan)  # capturing runs nothing: what the kernels then fail to write stays nan

    def replay():
        graph.replay()
        return outs
    return replay

def decode_sets(machine, shape, B, T, cache):
    """Slices of the cache that push each other out of the last cache, and queries of their own.
    -> [(q (B, 1, H, D), k and v (B, slots, Hkv, D), qi (B, 1, Hkv, D), ki (B, slots, D), length (B,), int8 index or
    None), ...]"""
    n = n_sets(machine, shape, T, B)
    slots = capacity(T)
    q, qi = random_queries(machine, SHAPES[shape], n, B, 1)
    k, v, ki = (x[:n * B * slots].unflatten(0, (n, B, slots)) for x in cache)
    length = torch.full((B,), T - 1, dtype=torch.int32, device=machine.device)
    int8 = [msa.quantize_index(keys, L) if machine.gpu else None for keys in ki]
    return list(zip(q, k, v, qi, ki, [length] * n, int8))

def decode_length(args, machine, shape, B, T, cache):
    """One new token of B sequences of T, whose keys are slices of the cache -> a row for each kind of index keys."""
    sets = decode_sets(machine, shape, B, T, cache)
    chosen = {}

    # the sides
    def dense(q, k, v, qi, ki, length, int8):
        return full(q, k, v, T, length)

    def sparse(*buffers):
        return sparse_decode(*buffers[:-1])  # without the int8 index

    def check(name, outs):
        for n in {0, len(sets) - 1}:
            check_rows(f"decode {shape}, {T} tokens, {name}", *outs[n], *sets[n][:5], T - 1)
        chosen[name] = [block_idx for _, block_idx in outs]

    # time them
    calls = {"dense": dense, machine.index: sparse}
    rounds = 1
    reps = 5
    seconds = 0.6
    if machine.gpu:
        calls["int8"] = sparse_decode
        rounds = math.ceil(16 / len(sets))  # starting a graph takes as long as a small kernel: 16 calls share it
        reps = 20
        seconds = 60.0
    replays = {name: repeat(call, sets, rounds) for name, call in calls.items()}
    times = alternate(replays, machine.gpu, check, reps=reps, seconds=seconds)
    if machine.gpu and not all(map(torch.equal, chosen["bf16"], chosen["int8"])):
        raise ArithmeticError(f"decode {shape}, {T} tokens: certified int8 chooses other blocks than bf16")

    # a row for each kind of index keys
    n_calls = len(sets) * rounds
    per_call = {name: [ms / n_calls for ms in taken] for name, taken in times.items()}
    dense_times = per_call.pop("dense")
    rows = []
    for name, sparse_times in per_call.items():
        rows.append(make_row(machine, "decode", shape, T, 1, B, "random", name, dense_times, sparse_times))
        if machine.gpu and T == args.ctx:
            kernel_rows(machine, rows[-1], replays[name], n_calls)
    return rows

# ---- train ---------------------------------------------------------------------------------------
# First one layer's attention, forward and backward, both sides in turn on the same tensors: full attention's
# gradients of q, k and v; MSA's of qi and ki as well, with choosing blocks and the index branch's KL loss in its time.
# Then whole optimizer steps of a model on random tokens, by train.py's own functions: short rows, and one long row
# with recomputed activations. Compiling is outside, and so is peak memory of the steps that compile.

def train_sizes(gpu, shape):
    """-> query heads, KV heads, S and L that --what train times; those of M2 or M3 on a GPU."""
    H, Hkv = SHAPES[shape]
    if gpu:
        return H, Hkv, S, L
    # torch gathers S * L keys for every query and KV head: at full size a step of 512 tokens takes seconds
    return H // 4, Hkv // 4, 4, 32

def train_flops(T, H, Hkv, S, L):
    """Useful FLOPs of attention's forward and backward -> {side: FLOPs}. What is computed twice counts once."""
    pairs = count_pairs(T, T)
    chosen = count_chosen(T, T, S, L)
    attention = 12 * H * D             # a query and key: two products, and two more for the gradient of each
    index = 2 * Hkv * D                # scores of the index branch, which have no gradient
    kl = 2 * H * D + 3 * index         # the teacher's scores, the index branch's and their gradients
    return {"dense": attention * pairs, "msa": (attention + kl) * chosen + index * pairs}

def train_sides(machine, shape, T):
    """Attention's forward and backward on T random tokens -> {side: function that returns gradients}: full attention's
    of q, k and v, and MSA's, choosing and KL included, of q, k, v, qi and ki."""
    H, Hkv, S, L = train_sizes(machine.gpu, shape)
    dense_impl, msa_impl = pick_impl(machine.gpu, "train", T)

    tensors = *random_queries(machine, (H, Hkv), 1, T), *random_cache(machine, (H, Hkv), 1, T)
    q, qi, k, v, ki = (x.requires_grad_() for x in tensors)
    grad_out = fill(machine, 1, T, H, D)

    def dense():
        out = sdpa(q, k, v, dense_impl)
        return torch.autograd.grad(out, (q, k, v), grad_out)

    def sparse():
        block_idx = msa.select_blocks(qi.detach(), ki.detach(), S, L, impl=msa_impl)
        out, kl = msa.msa_train(q, k, v, qi, ki, block_idx, L, impl=msa_impl)
        grad_kl = torch.full_like(kl, 1 / T)  # the KL is a sum over the tokens
        return torch.autograd.grad((out, kl), (q, k, v, qi, ki), (grad_out, grad_kl))
    return {"dense": dense, "msa": sparse}

def train_gate(machine, shape):
    """On S * L tokens MSA reads every block: its gradients of q, k and v are those of full attention."""
    _, _, S, L = train_sizes(machine.gpu, shape)
    calls = train_sides(machine, shape, S * L)
    for name, got, want in zip(("q", "k", "v"), calls["msa"](), calls["dense"]()):
        near(f"gate: MSA's gradient of {name} against full attention's, train {shape} at T = S * L", got, want)

def attention_row(machine, shape, T):
    """Forward and backward of one layer's attention and KL, both sides in turn, on T tokens."""
    H, Hkv, S, L = train_sizes(machine.gpu, shape)
    calls = train_sides(machine, shape, T)
    bit_equal = all(map(torch.equal, calls["msa"](), calls["msa"]()))

    def check(name, grads):
        for grad in grads:
            check_finite(f"train {shape}, {T} tokens: a gradient", grad)
    times = alternate(calls, machine.gpu, check, cold=() if machine.gpu else calls)

    stages = {side: [(flops, 0)] for side, flops in train_flops(T, H, Hkv, S, L).items()}
    row = side_row(machine, stages, times["dense"], times["msa"], what="train", shape=shape, ctx=T, queries=T, batch=1,
                   selection="random", index=machine.index, heads=[H, Hkv], bit_equal=bit_equal)
    print(f"{'train':8}{shape:4}{T:>10,} |{row['dense_ms']:11.3f} {row['dense_util']:4.0%} |"
          f"{row['msa_ms']:11.3f} {row['msa_util']:4.0%} | {row['speedup']:7.2f}x | {str(bit_equal):14} | "
          f"{len(times['dense'])}, {len(times['msa'])}", flush=True)
    return row

def step_plans(gpu, ctx):
    """Training steps that --what train times -> preset, [(attention, rows, tokens of a row, recompute)]: the preset's
    own rows, then one long sequence with `recompute`, up to --ctx."""
    if gpu:
        preset = "small"
        own = ("msa", 16, min(2 ** 13, ctx), False)
        long = 2 ** 19
    else:
        preset = "tiny"
        own = ("msa", 4, min(256, ctx), False)
        long = 1024
    plans = [own, ("full", 1, long, True), ("msa", 1, long, True), ("msa", 1, 2 * long, True)]
    return preset, [plan for plan in plans if plan[2] <= ctx]

def model_steps(model, learns, batch, mtp_every, recompute):
    """train.py's optimizer steps on a batch, the first with the MTP loss, the others without -> the last one's loss.
    learns: what train.configure_optimizers returned."""
    optimizers, *groups = learns
    for step in range(mtp_every):
        found = train.train_step(model, batch, optimizers, groups, run_mtp=step == 0, recompute=recompute)
    return found["loss"]

def step_row(machine, preset, attn, n_rows, T, recompute):
    """Optimizer steps of a preset on random tokens, of which every mtp_every-th has the MTP loss.

    attn        full, in every layer, or msa: as in the preset
    n_rows, T   rows of T tokens
    recompute   as one long sequence needs it, which has no MTP modules either
    """
    cfg = getattr(MiniMaxConfig, preset)(max_seq_len=T)
    mtp_every = train.RUNS[preset]["mtp_every"]
    if recompute:
        mtp_every = 1
        cfg.n_mtp = 0
    if attn == "full":
        cfg.attn_types = ["full"] * cfg.n_layer

    # a model to take steps with, and random tokens
    torch.manual_seed(SEED)
    model = MiniMax(cfg, machine.dtype).to(machine.device).train()
    learns = train.configure_optimizers(model, STEP_LR)
    if machine.gpu:
        torch.compiler.reset()  # graphs of another size count against the limit of recompilations
        train.compile_model(model, learns[0][0])
    text = torch.randint(cfg.vocab_size, (n_rows, T + 1), device=machine.device)
    pos = torch.arange(T, device=machine.device).expand(n_rows, T)
    batch = dict(idx=text[:, :-1], targets=text[:, 1:], pos=pos)

    # the first steps compile; memory is that of the others
    steps = partial(model_steps, model, learns, batch, mtp_every, recompute)
    steps()
    if machine.gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    while len(times) < 5 and sum(times) < 3000:
        ms, loss = timed(steps, machine.gpu, True)
        times.append(ms)
    if not math.isfinite(loss):
        raise ArithmeticError(f"train {preset}, {attn} attention, {T} tokens: the loss is {loss.item()}")

    # what a step needed, in a row
    step_ms = statistics.median(times) / mtp_every
    tokens_per_s = 1e3 * n_rows * T / step_ms
    peak_flops = train.peak_flops(machine.device)
    mfu = None
    if peak_flops:
        a_token = statistics.mean(model.flops_per_token(pos, run_mtp=step == 0) for step in range(mtp_every))
        mfu = tokens_per_s * a_token / peak_flops
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if machine.gpu else None
    row = dict(what="train", shape=preset, ctx=T, batch=n_rows, attn=attn, recompute=recompute, step_ms=step_ms,
               tokens_per_s=tokens_per_s, mfu=mfu, peak_gb=peak_gb)

    utilised = f"{mfu:.1%}" if mfu else "none"
    memory = f"{peak_gb:.1f}" if machine.gpu else "none"
    recomputed = " recomputed" if recompute else ""
    print(f"{'train':8}{preset:7}{attn:5}{n_rows:>4} x {T:>9,}{recomputed:11} | {step_ms:10.1f} | "
          f"{tokens_per_s:8,.0f} | {utilised:>5} | {memory:>7} | {len(times)}", flush=True)
    return row

def row_that_fits(name, measure, *given):
    """-> [the row that measure(*given) returns]; [] and a line about `name` where it does not fit the GPU's memory."""
    try:
        return [measure(*given)]
    except torch.OutOfMemoryError:
        print_left_out(name)
        return []
    finally:
        gc.collect()                   # a compiled block and its graphs refer to each other
        torch.cuda.empty_cache()       # does nothing where there is no GPU

def print_left_out(name):
    print(f"        {name}: left out, it does not fit the GPU's memory", flush=True)

def run_train(args, machine):
    """--what train: a layer's attention in training, dense and sparse, then whole steps of a model."""
    layer_card(args, machine)
    if not machine.gpu:
        H, Hkv, topk, block = train_sizes(machine.gpu, "m3")
        print(f"laptop  | a quarter of the heads (m3: {H}, {Hkv}), S = {topk} blocks of L = {block}")
    for shape in args.shapes:
        train_gate(machine, shape)
    print(f"gate    | passed by {', '.join(args.shapes)}: gradients of q, k and v against full attention's at S * L "
          f"tokens, relative RMS at most {TOLERANCE[machine.dtype]:.0e}")
    print("\nwhat    shape     ctx |   dense ms util |     MSA ms util | speed-up | two runs equal | runs")
    lengths = (2 ** 13, 2 ** 15, 2 ** 17) if machine.gpu else (512, 1024, 2048)
    lengths = [T for T in lengths if T <= args.ctx] or [args.ctx]
    compared = []
    for shape, T in product(args.shapes, lengths):
        compared += row_that_fits(f"train {shape}, {T:,} tokens", attention_row, machine, shape, T)

    print("\nwhat    model  attn   rows x tokens             |    step ms | tokens/s |   mfu | peak GB | runs")
    preset, plans = step_plans(machine.gpu, args.ctx)
    steps = []
    for attn, n_rows, T, recompute in plans:
        name = f"train {preset}, {attn} attention, {T:,} tokens, {n_rows} rows"
        steps += row_that_fits(name, step_row, machine, preset, attn, n_rows, T, recompute)

    return dict(conclude(args, machine, compared), rows=compared + steps)

# ---- tree: a step of rl.py, prefixes merged and not ----------------------------------------------
# Samples of one maze share long prefixes. rl.py merges them into a tree, of which each prefix is computed once; the
# other side is the same rl.train_step on the same samples, each with its own prefix, packed in several ways of which
# the fastest counts. Both must have the same gradient norm. A time is the least of up to three steps, in turn; laying
# the rows out and the update are in it. Outside: playing the episodes, as the samples are made by a teacher.

def tree_turns(gpu, ctx):
    """Lengths of the mazes that fit --ctx: a GPU needs a long one to have work. ValueError if none fits."""
    lengths = (40, 80) if gpu else (5, 10, 20, 40, 80)

    rooms = {turns: 14 * turns + 48 for turns in lengths}  # a call, its result, a thought a turn; prompt and answer
    fit = [turns for turns in lengths if rooms[turns] <= ctx]
    if not fit:
        shortest = lengths[0]
        raise ValueError(f"--ctx {ctx}: a maze of {shortest} turns, the shortest here, takes {rooms[shortest]}")
    return fit

def packings(samples, cfg):
    """Ways to lay samples out without merging -> {name: (function that gives the rows, most slots of a micro-batch)}.

    "padded" has a sample a row. Rows of 1, 2 and 4 times the longest sample hold several, as documents: the longer, the
    fewer pads and the more masked keys. What cannot differ from a layout before it is left out."""
    longest = max(len(sample.ids) for sample in samples)
    padded = longest * len(samples)

    def lay_out(times):
        trees = [rl.PrefixTree([sample], cfg) for sample in samples]
        return rl.pack_rows(trees, times * longest) if times else trees

    budgets = [slots for slots in BUDGETS if slots == BUDGETS[0] or slots // 4 < padded]
    layouts = list(product(budgets, (0, 1)))
    layouts += [(budgets[-1], times) for times in (2, 4) if times * longest <= min(padded // 2, budgets[-1])]
    out = {}
    for slots, times in layouts:
        kind = f"rows of {times * longest:,}" if times else "padded"
        out[f"{kind}, {slots:,}"] = (partial(lay_out, times), slots)
    return out

def fastest(steps, gpu):
    """Time every step {name: call} three times, in turn -> {name: (least ms, what the call returned)}.

    All but "merged" are each other's rivals: one is timed no more once it took 1.5 times the best of them; on a GPU not
    before the second round, since the first one compiles. What runs out of a GPU's memory is left out, and said."""
    least = {}
    for turn in range(3):
        for name in list(steps):
            try:
                took = timed(steps[name], gpu, True)
            except torch.OutOfMemoryError:
                if name == "merged":
                    raise
                print_left_out(name)
                del steps[name]
                continue
            if name not in least or took[0] < least[name][0]:
                least[name] = took
        if gpu and turn == 0:
            continue
        best = min(ms for name, (ms, _) in least.items() if name != "merged")
        steps = {name: call for name, call in steps.items() if name == "merged" or least[name][0] <= 1.5 * best}
    return least

def tree_groups(asked, n_mazes):
    """All turns of four episodes of each maze by a teacher, with random rewards -> groups of samples of episodes."""
    gateway = rl.Gateway()
    rng = random.Random(asked.turns)
    groups = []
    for maze in range(n_mazes):
        task = rl.make_task(asked, maze)
        groups.append([rl.demonstrate(gateway, task, rng, 0.0, 0.1) for _ in range(4)])
    for group in groups:
        for episode in group:
            episode.finish([rng.gauss(0, 1) for _ in episode.samples], True, 0.0)
    return [rl.advantages(group) for group in groups]

def tree_row(machine, preset, model, groups, turns):
    """A training step of rl.py on prefix trees, against the same samples packed in the way that was fastest.

    groups  samples of each episode of each group
    turns   length of the mazes, for the row
    """
    samples = [sample for group in groups for episode in group for sample in episode]
    optimizers, *_ = train.configure_optimizers(model, STEP_LR)

    def step(lay_out, slots):  # a rate of 0: every step starts from the same weights
        return rl.train_step(model, optimizers, lay_out(), 0.0, 0.0, slots)
    layouts = packings(samples, model.cfg)
    layouts["merged"] = (partial(rl.plan_rows, groups, model, True), rl.MICRO_TOKENS)
    steps = {name: partial(step, *layout) for name, layout in layouts.items()}
    least = fastest(steps, machine.gpu)

    merged_ms, merged = least.pop("merged")
    allowed = 0.05 if machine.gpu else 1e-4  # bf16 adds up many micro-batches
    for name, (_, stats) in least.items():
        if not abs(merged["norm"] / stats["norm"] - 1) < allowed:
            norms = f"{merged['norm']} merged, {stats['norm']} {name}"
            raise ArithmeticError(f"tree: gradient norm {norms} at {turns} turns")
    packing = min(least, key=lambda name: least[name][0])
    packed_ms, packed = least[packing]
    return dict(what="tree", shape=preset, ctx=max(len(sample.ids) for sample in samples), turns=turns,
                packing=packing, packed_tokens=packed["naive"], packed_slots=packed["computed"], packed_ms=packed_ms,
                merged_tokens=merged["slots"], merged_slots=merged["computed"], merged_ms=merged_ms,
                token_ratio=merged["naive"] / merged["slots"], speedup=packed_ms / merged_ms,
                packings={name: ms for name, (ms, _) in least.items()})

def run_tree(args, machine):
    """--what tree: the samples are all turns of four episodes of a maze, of 16 mazes on a GPU."""
    preset = "small" if machine.gpu else "micro"
    n_mazes = 16 if machine.gpu else 1
    rows = []
    for turns in tree_turns(machine.gpu, args.ctx):
        asked, _ = rl.parse_args(f"--task maze --preset {preset} --turns {turns}".split())
        model = rl.make_model(asked, machine.device, machine.dtype)
        if not rows:
            print(f"sides   | rl.train_step on both: {implementations(model, machine.device, True, False)}\n"
                  "tree    | turns longest |    packed  computed         ms  layout, slots a batch  | "
                  " merged computed        ms | tokens | speed-up")
        row = tree_row(machine, preset, model, tree_groups(asked, n_mazes), turns)
        print(f"tree    | {turns:5} {row['ctx']:7} | {row['packed_tokens']:9,} {row['packed_slots']:9,} "
              f"{row['packed_ms']:10.1f}  {row['packing']:22} | {row['merged_tokens']:7,} {row['merged_slots']:8,} "
              f"{row['merged_ms']:9.1f} | {row['token_ratio']:5.1f}x | {row['speedup']:7.1f}x", flush=True)
        rows.append(row)
    print(f"found   | At {turns} turns a training step on prefix trees takes {plain(row['merged_ms'])} ms where the "
          f"same samples, packed ({row['packing']}), take {plain(row['packed_ms'])}: {row['speedup']:.1f} times less, "
          f"for {row['token_ratio']:.1f} times fewer tokens.")
    return dict(device=machine.name, rows=rows)

# ---- queue: rl.py's strict FIFO, window and greedy -----------------------------------------------
# How long does a trainer wait for slow tasks, if it must take groups in order (fifo), may take any of the oldest
# (window), or any at all (greedy)? First the queue alone, on a virtual clock: steps in 1,000 s, idle time, and whether
# hard tasks come late. Then three short trainings of rl.py, one a schedule, from the same imitation: what they solve.
# No real time is measured here: all seconds are virtual.

def simulate(window, steps, sigma, seed):
    """rl.py's queue alone, on a virtual clock: tasks of 20 s, every fourth, hard, of 80 s, with log-normal tails.

    window   how many of the oldest groups the trainer may take from
    steps    training steps, each of 8 groups and 6 s
    sigma    of the tails
    seed     of the tasks: the same ones under every window
    -> rate (steps in 1,000 s), idle (share of the time), lag and max_lag (steps), early and hard (share of hard tasks
    in the first ten batches and in all)."""
    groups = 8
    queue = rl.WindowedFIFO(64, window)  # groups in flight
    now = 0.0
    is_hard = {}                       # of each task
    lags = []
    hard_shares = []                   # of each batch
    for step in range(steps):
        for task in queue.admit(step, now):
            rng = random.Random(f"{seed} {task}")
            is_hard[task] = rng.random() < 0.25
            usual_s = 80 if is_hard[task] else 20
            queue.finish(task, now + usual_s * math.exp(sigma * rng.gauss(0, 1)))
        now = queue.wait(groups, now) + 6.0
        hard_shares.append(sum(is_hard[task] for task in queue.batch) / groups)
        lags += queue.publish(step + 1)
    return dict(rate=1000 * steps / now, idle=queue.idle / now, lag=statistics.fmean(lags), max_lag=max(lags),
                early=statistics.fmean(hard_shares[:10]), hard=statistics.fmean(hard_shares))

def queue_rows():
    """Strict FIFO, window and greedy on the same tasks, a row for each sigma and schedule."""
    rows = []
    print("queue: 64 groups in flight, 8 a step of 6 s, window 19 = 0.3 N; the same tasks and tails in every row")
    for sigma, (name, window) in product(SIGMAS, WINDOWS.items()):
        found = simulate(window, 1000, sigma, SEED)
        if name == "fifo":             # the first of each sigma, and the others' measure
            fifo_rate = found["rate"]
        gain = found["rate"] / fifo_rate - 1
        print(f"sigma {sigma:.1f} {name:6s} | {found['rate']:5.1f} steps/1000 s {gain:+5.0%} | "
              f"idle {found['idle']:3.0%} | lag mean {found['lag']:4.1f} max {found['max_lag']:3d} | "
              f"hard tasks: first 10 batches {found['early']:.2f}, all {found['hard']:.2f}")
        rows.append(dict(what="queue", schedule=name, sigma=sigma, **found))
    return rows

def train_schedules(args, machine):
    """A short run of rl.py under each schedule, one after the other, with the same seed and from one imitation, in a
    folder that is deleted at the end.
    -> {schedule: its result}, {schedule: running mean of the share solved, by step}. KeyboardInterrupt if stopped."""
    trained = {}
    curves = {}
    flags = [*TRAINING, "--device", str(machine.device)]
    if args.threads:
        flags += ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        for name in WINDOWS:
            out = f"{folder}/{name}"
            if trained:  # rl.py reads an imitation of the same task, model and seed
                shutil.copytree(f"{folder}/fifo/warm", f"{out}/warm")
            asked, _ = rl.parse_args([*flags, "--schedule", name, "--out", out])
            trained[name] = rl.run(asked, None)
            if trained[name]["steps"] < asked.steps:
                print("stopped: what was saved lay in a temporary folder, and is gone")
                raise KeyboardInterrupt
            curves[name] = [ema for _, ema in load_checkpoint(out)["now"]["curve"]]
    return trained, curves

def run_queue(args, machine):
    """--what queue: the queue alone, then the trainings; the figure has the curves of what they solve."""
    rows = queue_rows()
    trained, curves = train_schedules(args, machine)
    for name, result in trained.items():
        print(f"trained {name:6s} | {result['steps']} steps in {result['virtual_seconds']:4.0f} virtual s | "
              f"idle {result['idle']:3.0%} | reward {result['reward_per_virtual_s']:.2f} a virtual s | "
              f"solved {result['reward_start']:.2f} -> {result['reward_end']:.2f} | lag {result['max_lag']}")
    if args.figure:
        rl.draw(curves, args.figure, "calculator")
    return dict(device=machine.name, rows=rows, trained=trained)

# ---- thoughts: kept in the history, or dropped ---------------------------------------------------
# M2 thinks between its calls, and its authors ask clients to send the thoughts back: without them, they say, the state
# drifts, and with them the model recovers from errors. Here rl.py trains policies both ways, with tools that fail now
# and then, and each is tested on fresh tasks. In the calculator a thought says how many operations remain, which the
# calls show as well. In the tally it is the sum of the digits so far: without it each turn has to add them all again.
# The tally was built to show that. A policy that was trained with its thoughts is also tested without them: this is
# what a client that strips them makes of it. Tasks that meet an error are longer than others, so the same ones are
# played again with tools that work. What a failed episode did wrong is its first turn that is not the teacher's,
# thoughts aside.

@dataclass(frozen=True)
class Trial:
    """One training of rl.py."""
    task: str
    thoughts: str                      # keep or drop
    seed: int
    steps: int                         # on rewards
    device: str

@dataclass
class Played:
    """An episode of a test."""
    task: rl.Task
    episode: rl.Trajectory
    turns: list = field(default_factory=list)  # (messages, text), text None: the context was too long

    def met_error(self):
        """Whether a tool failed in it."""
        n_calls = sum(text is not None and not text.startswith("A") for _, text in self.turns)
        return any(call < n_calls for call in self.task.faults)

def watch(agent, turns):
    """An agent whose turns are noted."""
    text = None
    while True:
        try:
            messages = agent.send(text)
        except StopIteration as stop:
            return stop.value
        text = yield messages
        turns.append((messages, text))

def play_tests(model, asked, temperature, faults=True):
    """Play fresh tasks, one episode each.

    asked        arguments of rl.py; its --thoughts are those of the test
    temperature  of the sampling; 0 is greedy
    faults       False: the same tasks with tools that work
    """
    played = []
    for number in range(TRIAL_TESTS):
        task = rl.make_task(asked, number, TEST_TASKS)
        if not faults:
            task.faults = frozenset()
        played.append(Played(task, rl.Trajectory(number)))
    generator = torch.Generator(model.embed.weight.device)
    generator.manual_seed(asked.seed)
    episodes = [(test.episode, watch(test.task.agent(), test.turns)) for test in played]
    rl.rollout(rl.Gateway(model, asked), episodes, 0, generator, temperature=temperature)
    return played

def call_steps(task):
    """What the right calls of a task end with, in their order."""
    if isinstance(task, rl.Calculator):
        return task.terms[1:]
    return [str(place) for place in range(1, task.difficulty + 1)]

def first_mistake(test):
    """The first turn of an episode that is not the teacher's, thoughts aside -> its kind, and whether a tool had just
    failed; None, False if there is none."""
    for messages, text in test.turns:
        wanted = rl.without_thought(test.task.expert(messages))
        if text is None or rl.without_thought(text) != wanted:
            after_error = messages[-1]["content"] == f"={rl.ERROR}"
            return kind_of_mistake(test.task, text, wanted), after_error
    return None, False

def kind_of_mistake(task, text, wanted):
    """A turn that is not the teacher's -> what is wrong with it. A call may be malformed; it may name a step of the
    task that comes before the wanted one (repeated) or after it (skipped), or the wanted one with another number
    (operand).

    text    the policy's; None: its context was too long
    wanted  the teacher's
    """
    if text is None:
        return "too long"
    if text.startswith("A"):
        return "wrong answer" if wanted.startswith("A") else "early answer"
    if task.tool(text) is None:
        return "malformed"
    steps = call_steps(task)
    named = [step for step, end in enumerate(steps) if text.endswith(f"{end}]")]
    next_steps = [step for step, end in enumerate(steps) if wanted.endswith(f"{end}]")]
    if not next_steps:                 # all are done
        return "repeated"
    if not named or set(named) & set(next_steps):
        return "operand"
    return "repeated" if named[0] < next_steps[0] else "skipped"

def thoughts_like_teacher(test):
    """-> how many calls of an episode have the teacher's thought, and how many there are."""
    n_right = 0
    n_calls = 0
    for messages, text in test.turns:
        wanted = test.task.expert(messages)
        if text is not None and text.startswith("t") and wanted.startswith("t"):
            n_calls += 1
            n_right += text[1:2] == wanted[1]
    return n_right, n_calls

def share_won(played):
    """Share of episodes that succeeded, and its standard error; None, None where there are none."""
    if not played:
        return None, None
    p = statistics.fmean(test.episode.success for test in played)
    return p, math.sqrt(p * (1 - p) / len(played))

def score_tests(played, cfg, replayed=None):
    """A test -> the numbers of its row, see run_thoughts. replayed: the same tasks with tools that work."""
    success, success_se = share_won(played)
    met = [number for number, test in enumerate(played) if test.met_error()]
    recovery, recovery_se = share_won([played[number] for number in met])
    same, same_se = None, None
    if replayed:
        same, same_se = share_won([replayed[number] for number in met])

    # what an episode's turns cost: each alone, and in one tree
    turn_tokens = sum(len(sample.ids) for test in played for sample in test.episode.samples)
    tree_slots = sum(rl.PrefixTree(test.episode.samples, cfg).size for test in played)

    # what went wrong
    thoughts = [thoughts_like_teacher(test) for test in played]
    mistakes = {}
    n_after_error = 0
    for test in played:
        if not test.episode.success:
            kind, after_error = first_mistake(test)
            mistakes[kind] = mistakes.get(kind, 0) + 1
            n_after_error += after_error
    return dict(
        n=len(played), success=success, success_se=success_se,
        n_met=len(met), recovery=recovery, recovery_se=recovery_se, same=same, same_se=same_se,
        turns=statistics.fmean(len(test.turns) for test in played),
        own_merge=turn_tokens / tree_slots,
        thoughts_right=sum(n for n, _ in thoughts) / max(1, sum(n for _, n in thoughts)),
        mistakes=mistakes, after_error=n_after_error)

def run_trial(trial):
    """Train a policy, in a folder that is deleted, and test it -> rows, one for each way of testing."""
    flags = [*TRIAL_FLAGS.split(), "--task", trial.task, "--thoughts", trial.thoughts, "--seed", str(trial.seed),
             "--steps", str(trial.steps), "--device", trial.device, "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        asked, _ = rl.parse_args([*flags, "--out", folder])
        with contextlib.redirect_stdout(io.StringIO()):
            trained = rl.run(asked, None)
        if trained["steps"] < trial.steps:
            raise KeyboardInterrupt
        model, _ = load_model(load_checkpoint(folder), torch.device(trial.device))

    rows = []
    ways = ["drop"]                    # nobody puts thoughts back
    if trial.thoughts == "keep":
        ways = ["keep", "drop"]
    for tested, sampling in product(ways, ("sampled", "greedy")):
        asked.thoughts = tested
        temperature = 0.0 if sampling == "greedy" else 1.0
        played = play_tests(model, asked, temperature)
        replayed = play_tests(model, asked, temperature, faults=False) if sampling == "sampled" else None
        rows.append(dict(
            what="thoughts", task=trial.task, trained=trial.thoughts, tested=tested, seed=trial.seed,
            sampling=sampling, **score_tests(played, model.cfg, replayed), group_merge=trained["merge_ratio"],
            steps=trial.steps, tool_errors=asked.tool_errors, start=trained["reward_start"], end=trained["reward_end"],
            seconds=trained["seconds"]))
    return rows

def train_trials(trials, args, machine, start):
    """Run trials, on a CPU as many at once as there are cores -> rows, in the order of trials. Ends before one for
    which --minutes leaves no time. start: time.perf_counter() when the script began."""
    done = {}
    pace = Pace("trained", len(trials), args.minutes, start)

    def finish(trial, rows, began):
        done[trial] = rows
        row = rows[0]
        print(f"trained | {row['task']}, {row['trained']}, seed {row['seed']}: solved {row['start']:.2f} -> "
              f"{row['end']:.2f} in training, {percent(row['success'], row['success_se'])} % of fresh tasks")
        pace.tell(began)

    workers = min(len(trials), args.threads or len(os.sched_getaffinity(0)))
    if machine.gpu or workers == 1:
        for trial in trials:
            if pace.has_time():
                began = time.perf_counter()
                finish(trial, run_trial(trial), began)
    else:
        train_in_processes(run_trial, [(trial, trial) for trial in trials], workers, pace.has_time, finish)
    return [row for trial in trials for row in done.get(trial, [])]

def run_thoughts(args, machine):
    """--what thoughts: the trainings, the table, and what it says.

    Rows: what = "thoughts", task, trained and tested (keep, drop), seed, sampling (sampled, greedy), n episodes,
    success (share), n_met (episodes that met an error of a tool), recovery (share of these that succeeded), same (the
    same with tools that work; None: not played), *_se (standard errors), turns, own_merge (tokens of all turns over
    slots of the trees, each episode's alone), group_merge (in training), thoughts_right (share of the teacher's),
    mistakes {kind: failed episodes}, after_error (those whose first mistake came at once after an error), steps,
    tool_errors, start and end (share solved in training), seconds (of the training).
    """
    start = time.perf_counter()
    trials = []
    for seed, task, thoughts in product(TRIAL_SEEDS, TRIAL_TASKS, ("keep", "drop")):
        trials.append(Trial(task, thoughts, seed, args.steps or TRIAL_STEPS, str(machine.device)))
    print(f"trials  | {len(trials)} trainings by rl.py, {TRIAL_FLAGS} --steps {trials[0].steps}, each tested on "
          f"{TRIAL_TESTS} fresh tasks; the first takes a minute or two", flush=True)
    rows = train_trials(trials, args, machine, start)
    print_thoughts(rows)
    print_mistakes(rows)
    for line in thoughts_sentences(rows):
        print(f"found   | {line}")
    n_left = len(trials) - len(by_values(rows, "task", "trained", "seed"))
    if n_left:
        print(f"left    | {n_left} of {len(trials)} trainings: give more --minutes")
    return dict(device=machine.name, rows=rows, left=n_left)

def percent(share, error):
    """A share and its standard error, in percent."""
    return "-" if share is None else f"{100 * share:.1f} ±{100 * error:.1f}"

def by_values(rows, *names):
    """{values of these: the rows that have them}."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups

def over_seeds(rows, name):
    """Mean of a share over seeds, and its standard error as the seeds show it; None, None where a seed has none."""
    shares = [row[name] for row in rows]
    if None in shares:
        return None, None
    spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
    return statistics.fmean(shares), spread / math.sqrt(len(shares))

SHARES = ("success", "recovery", "same")

def print_thoughts(rows):
    """The table: percent and standard errors, a part for each sampling, a line for each seed and one for their mean."""
    for (sampling,), part in by_values(rows, "sampling").items():
        print(f"\n{sampling}, percent of {part[0]['n']} episodes a line, ± a standard error; n of them met an error "
              "of a tool; none: the same tasks with tools that work\n"
              f"{'task':<10} trained tested  seed | {'success':>10} | {'n':>4} {'recovered':>10} {'none':>10} | "
              "turns | thoughts right | merge own, group")
        for (task, trained, tested), lines in by_values(part, "task", "trained", "tested").items():
            head = f"{task:<10} {trained:<7} {tested:<6}"
            for row in lines:
                won, after, same = (percent(row[name], row[f"{name}_se"]) for name in SHARES)
                print(f"{head} {row['seed']:>5} | {won:>10} | {row['n_met']:>4} {after:>10} {same:>10} | "
                      f"{row['turns']:>5.2f} | {100 * row['thoughts_right']:>14.1f} | {row['own_merge']:>8.2f}x "
                      f"{row['group_merge']:>6.2f}x")
            won, after, same = (percent(*over_seeds(lines, name)) for name in SHARES)
            print(f"{head}  mean | {won:>10} | {'':>4} {after:>10} {same:>10} |")

def print_mistakes(rows):
    """How many sampled episodes of all seeds failed, and by what first mistake."""
    print("\nfirst mistakes in failed episodes, sampled, all seeds")
    for (task, trained, tested), lines in by_values(of_sampled(rows), "task", "trained", "tested").items():
        kinds = {}
        for kind, n in (item for row in lines for item in row["mistakes"].items()):
            kinds[kind] = kinds.get(kind, 0) + n
        n_failed = sum(kinds.values())
        n_played = sum(row["n"] for row in lines)
        n_after = sum(row["after_error"] for row in lines)
        told = ", ".join(f"{kind} {kinds[kind]}" for kind in sorted(kinds, key=kinds.get, reverse=True))
        print(f"{task:<10} {trained:<7} {tested:<6} | {n_failed:>4} of {n_played} failed, {n_after} of them right "
              f"after an error | {told}")

def of_sampled(rows):
    return [row for row in rows if row["sampling"] == "sampled"]

def thoughts_sentences(rows):
    """What the sampled rows say: means of the seeds that both sides have, with the standard error of the difference."""
    whats = {("drop", "drop"): "trained and tested without", ("keep", "drop"): "trained with, stripped by the client"}
    sentences = []
    for (task,), of_task in by_values(of_sampled(rows), "task").items():
        ways = by_values(of_task, "trained", "tested")
        for way, what in whats.items():
            others = {row["seed"]: row for row in ways.get(way, [])}
            pairs = [(row, others[row["seed"]]) for row in ways.get(("keep", "keep"), []) if row["seed"] in others]
            if not pairs:
                continue
            told = [told_change(pairs, "success", "success"), told_change(pairs, "recovery", "after an error")]
            merges = [statistics.fmean(pair[side]["own_merge"] for pair in pairs) for side in (0, 1)]
            sentences.append(f"{task}, thoughts kept -> {what}: {', '.join(told)}, an episode's turns merge "
                             f"{merges[0]:.2f}x -> {merges[1]:.2f}x; {len(pairs)} seeds")
    return sentences

def told_change(pairs, name, what):
    """A share on both sides of pairs of rows, and the difference with its standard error over the pairs."""
    if any(row[name] is None for pair in pairs for row in pair):
        return f"{what} -"
    kept, dropped = (statistics.fmean(pair[side][name] for pair in pairs) for side in (0, 1))
    change, error = over_seeds([dict(change=b[name] - a[name]) for a, b in pairs], "change")
    return f"{what} {100 * kept:.1f} -> {100 * dropped:.1f} % ({100 * change:+.1f} ±{100 * error:.1f})"

# ---- generate: tokens a second of a whole model --------------------------------------------------
# Four tables of one model: a checkpoint's (--out), or a preset with random weights. First plain decoding, of one
# sequence and of 32, in turn with a GPT-2 of nanoGPT's shape: its time has prefill apart ("first"), and in the rest
# every step, drawing included. Then one decode step at a long context, MSA against full attention in every layer, same
# weights and same random cache. Then speculative decoding by MTP's drafts against plain decoding, both greedy, on
# held-out text, and how often drafts hold. Outside of all times: loading, compiling, capturing, and the tokenizer.

# tokens of a prompt, and as many new ones; less where the context is short
DECODED = {"cpu": 256, "cuda": 512}    # by plain decoding
DRAFTED = {"cpu": 128, "cuda": 512}    # with drafts; a CPU's model has been trained on rows of 256
COST_CONTEXT = 2 ** 15                 # tokens of the layers whose training --what quality times, without --ctx
LEAST_COST = 256                       # and at least: shorter ones are checked against fp64 on too few numbers
LONG_CONTEXT = {"cpu": 2 ** 16, "cuda": 2 ** 19}           # tokens before the one step that reads them, without --ctx
SEQUENCES = (1, 32)                    # decoded at once
DRAFTED_TEXTS = {"cpu": 4, "cuda": 8}  # prompts that are continued with drafts and without
COMPARED_TEXTS = 32                    # windows of held-out text in which drafts are compared with the trunk's choice
MOST_DRAFTS = 3                        # K = 1, 2, 3
DRAWN = dict(temperature=0.8, top_p=1.0, top_k=40)         # plain decoding and GPT-2; nanoGPT has no top-p
GREEDY = dict(temperature=0, top_p=1.0, top_k=None)
# A greedy token's logit may be so far below the largest one, as a share of that: a forward without a cache sums in
# another order, and where two tokens are nearly equal that decides. In bf16 it may choose another expert, too, which
# with random weights changes every logit: 2 % of tokens differed, and such a share may
TIE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
OTHER_EXPERT = {torch.bfloat16: 0.05, torch.float32: 0}

@dataclass
class Subject:
    """The model that is decoded, and texts for it to continue."""
    name: str                          # the preset, or the folder
    model: MiniMax
    index_warmup: bool = False         # its index branch was still learning: full attention
    docs: list = field(default_factory=list)  # ids of each held-out document; [] where there are none

    def length(self, most):
        """Tokens of a prompt, and as many new ones: `most`, or half the model's context."""
        return min(most, self.model.cfg.max_seq_len // 2)

    def windows(self, n, length):
        """-> n windows of `length` tokens of held-out documents, evenly spaced; fewer where there are no more."""
        found = []
        for ids in self.docs:
            found += [ids[start:start + length] for start in range(0, len(ids) - length + 1, length)]
        n = min(n, len(found))
        return [found[len(found) * i // n] for i in range(n)]

    def prompts(self, n, length):
        """-> n prompts of `length` tokens: held-out text, repeated if it is short, or random where there is none."""
        found = self.windows(n, length)
        if found:
            return [found[i % len(found)] for i in range(n)]
        draw = torch.Generator().manual_seed(SEED)
        return torch.randint(self.model.cfg.vocab_size, (n, length), generator=draw).tolist()

    def generate(self, prompts, n_new, **given):
        """As sample.generate, a prompt a row -> yields token (B,) alone."""
        steps = generate(self.model, prompts, n_new, index_warmup=self.index_warmup, **given)
        return (token for token, _ in steps)

def random_model(machine, cfg):
    """A model with random weights, drawn on the device."""
    torch.manual_seed(SEED)
    with machine.device:
        model = MiniMax(cfg)
    return model.to(machine.dtype).eval()

def make_subject(args, machine):
    """The checkpoint of --out, or a preset with random weights."""
    if args.out is None:
        preset = "small" if machine.gpu else "tiny"
        return Subject(preset, random_model(machine, getattr(MiniMaxConfig, preset)()))
    state = load_checkpoint(args.out, mmap=True)
    model, tokenizer = load_model(state, machine.device, machine.dtype)
    if model.cfg.is_recurrent:
        raise ValueError(f"--out {args.out}: --what generate is for full attention and MSA; this model's layers are "
                         f"{' '.join(model.cfg.attn_types)}")
    docs = held_out(state["args"], tokenizer)
    return Subject(args.out, model, in_index_warmup(state), docs)

def held_out(given, tokenizer):
    """The documents that a run, whose arguments are given, was validated on -> ids of each. [] and a line where that
    text is not there: it has moved, or rl.py made the checkpoint."""
    try:
        _, docs, _ = train.load_data(given["data"], given["val_data"], train.VAL_BYTES)
    except (KeyError, ValueError) as error:
        print(f"text    | none held out, random tokens instead: {type(error).__name__}: {error}")
        return []
    encoded = tokenizer.encode_batch([text for _, text in docs])
    return [[tokenizer.eot, *ids.tolist()] for ids in encoded]

def load_baseline():
    """-> .ci/gpt2_baseline.py, as a module."""
    path = Path(__file__).resolve().parent / ".ci" / "gpt2_baseline.py"
    spec = importlib.util.spec_from_file_location("gpt2_baseline", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module    # torch.compile looks it up
    spec.loader.exec_module(module)
    return module

def make_gpt2(machine, baseline, subject):
    """A GPT-2 with random weights: 124M on a GPU; on a CPU as many layers and about as many parameters as the model."""
    cfg = subject.model.cfg
    context = 2 * subject.length(DECODED[machine.device.type])
    sizes = {}
    if not machine.gpu:
        # 12 n C^2 + (V + T) C parameters, solved for C
        total, _ = subject.model.num_params()
        per_square = 12 * cfg.n_layer
        per_channel = cfg.vocab_size + context
        C = (math.sqrt(per_channel ** 2 + 4 * per_square * total) - per_channel) / (2 * per_square)
        sizes = dict(C=8 * max(1, round(C / 8)), H=4, n_layer=cfg.n_layer)
    with machine.device:
        gpt2 = baseline.GPT2(cfg.vocab_size, context, **sizes)
    return gpt2.to(machine.dtype).eval()

@dataclass
class Generated:
    """What a run of generation gave, and its seconds."""
    tokens: torch.Tensor               # (B, n)
    first_s: float                     # to the first token of each row
    rest_s: float                      # for the n - 1 others

def clock(steps, machine):
    """Take all tokens (B,) that a generator yields -> Generated."""
    def now():
        if machine.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    tokens = [next(steps)]
    first = now()
    tokens += steps
    return Generated(torch.stack(tokens, 1), first - started, now() - first)

def step_bytes(model, B, T, size):
    """Bytes that one decode step of B rows must read: every matrix that computes a token, the experts that B tokens
    touch if they choose independently, the head, and each row's keys at T tokens. size: of an element."""
    cfg = model.cfg
    _, active = model.num_params()
    numbers = active + cfg.vocab_size * cfg.n_embd
    n_moe = cfg.mlp_types.count("moe")
    if n_moe:
        expert = 3 * cfg.n_embd * cfg.expert_dim
        missed = (1 - cfg.n_expert_per_tok / cfg.n_expert) ** B
        touched = cfg.n_expert * (1 - missed)
        numbers += n_moe * expert * (touched - cfg.n_expert_per_tok)

    a_token = 2 * cfg.n_kv_head * cfg.head_dim
    read = count_chosen(T, 1, cfg.index_topk_blocks, cfg.index_block_size)
    keys = cfg.attn_types.count("full") * T * a_token
    keys += cfg.attn_types.count("msa") * (T * cfg.index_head_dim + read * a_token)
    return size * (numbers + B * keys)

def check_greedy(name, subject, prompts, tokens):
    """ArithmeticError unless each of the tokens (B, n) is the model's own choice, by a forward without a cache."""
    model = subject.model
    for prompt, row in zip(prompts, tokens):
        row = row.to(model.embed.weight.device)
        text = torch.cat([torch.tensor(prompt, device=row.device), row])[None]
        logits = model(text[:, :-1], n_logits=len(row), index_warmup=subject.index_warmup)[0][0].float()   # (n, V)
        best = logits.amax(-1)
        behind = best - logits.gather(-1, row[:, None])[:, 0]
        allowed = TIE[model.dtype] * logits.abs().amax(-1)
        wrong = ~(behind <= allowed)   # also where it is nan
        if wrong.float().mean() > OTHER_EXPERT[model.dtype]:
            at = int((behind / allowed).nan_to_num(math.inf).argmax())
            raise ArithmeticError(f"{name}: {wrong.sum().item()} of {len(row)} tokens are not the model's choice. "
                                  f"Token {at} is {row[at].item()}, whose logit is {behind[at]:.3g} below the "
                                  f"largest, allowed {allowed[at]:.1g}")

def check_baseline(gpt2, idx):
    """ArithmeticError unless the baseline's logits with a cache, filled in two parts, are those without one."""
    T = idx.size(1)
    half = T // 2
    cache = gpt2.make_cache(len(idx), T)
    slots = torch.arange(T, device=idx.device)
    gpt2.next_logits(idx[:, :half], cache, slots[:half])
    cached = gpt2.next_logits(idx[:, half:], cache, slots[half:])
    near("gate: GPT-2's logits with a cache against those without", cached, gpt2.next_logits(idx), 5)

# ---- generate: plain decoding, and GPT-2 ---------------------------------------------------------

def decoding_rows(machine, subject, baseline, gpt2, B, reps=3, seconds=3.0):
    """Plain decoding of B sequences, the model and GPT-2 in turn -> a row for each side, of up to `reps` runs or the
    seconds."""
    length = subject.length(DECODED[machine.device.type])
    prompts = subject.prompts(B, length)
    idx = torch.tensor(prompts, device=machine.device)
    drawn = DRAWN["temperature"], DRAWN["top_k"]
    decoder = baseline.Decoder(gpt2, B, 2 * length, *drawn)
    sides = {"model": partial(subject.generate, prompts, length, **DRAWN),
             "gpt2": partial(decoder.generate, idx, length)}
    if B == 1 and not machine.gpu:
        sides["gpt2 without a cache"] = partial(baseline.generate_uncached, gpt2, idx, length, *drawn)

    # in turn, after some tokens of each, which compile and allocate
    for side in sides.values():
        clock(islice(side(), 4), machine)
    runs = {name: [] for name in sides}
    for _ in range(reps):
        for name, side in sides.items():
            if sum(run.rest_s for run in runs[name]) < seconds:
                runs[name].append(clock(side(), machine))

    # bytes: at the middle of the new tokens; GPT-2's static cache is read whole
    n_gpt2 = sum(p.numel() for name, p in gpt2.named_parameters() if not name.startswith("wpe"))
    C = gpt2.wte.embedding_dim
    needed = {"model": step_bytes(subject.model, B, length + length // 2, machine.size),
              "gpt2": machine.size * (n_gpt2 + B * len(gpt2.layers) * 2 * length * 2 * C)}
    rows = []
    for name, found in runs.items():
        step_s = statistics.median(run.rest_s for run in found) / (length - 1)
        row = dict(what="generate", table="decode", shape=subject.name, side=name, batch=B, ctx=2 * length,
                   prompt=length, new=length, first_s=statistics.median(run.first_s for run in found),
                   step_ms=1e3 * step_s, tokens_per_s=B / step_s, step_bytes=needed.get(name))
        row["util"] = row["step_bytes"] / step_s / machine.rates["copy"] if name in needed else None
        rows.append(row)
        row["model_over"] = rows[0]["tokens_per_s"] / row["tokens_per_s"]
        print_decoding(row)
    return rows

def print_decoding(row):
    util = "none" if row["util"] is None else f"{row['util']:.0%}"
    ratio = f"{row['model_over']:7.2f}x" if row["side"] != "model" else ""
    print(f"{row['side']:20} {row['batch']:>4} x {row['prompt']:>4} + {row['new']:<4} | {row['first_s']:8.3f} | "
          f"{row['tokens_per_s']:10,.0f} | {plain(row['step_ms']):>8} | {util:>5} | {ratio}", flush=True)

# ---- generate: a step at a long context ----------------------------------------------------------

@dataclass
class LongSide:
    """A model that reads a long cache, and how it computes a step."""
    model: MiniMax
    weights: DecodeWeights | None      # on a GPU: sample.py's steps

    def step(self, cache, length, idx, record=False):
        """One token after `length` others -> logits (1, 1, V), and the experts of each layer if they are recorded. The
        cache's length is set first: every call is the same step, also in a CUDA graph. idx (1, 1)."""
        if self.weights is None:
            return self.forward(cache, length, idx)
        cache.length.fill_(length)
        logits, _, aux = self.weights.step(idx, cache, routes=record)
        return logits.to(self.model.dtype), aux.get("experts", ())

    def forward(self, cache, length, idx, experts=()):
        """The same by MiniMax.forward; experts: recorded ones, used again."""
        cache.length.fill_(length)
        cache.used = length
        logits, _, aux = self.model(idx, cache=cache, n_logits=1, replay=dict(experts=experts))
        return logits, aux.get("experts", ())

def long_sides(machine, cfg, T):
    """-> the model with its own layers, and one with full attention in every layer, of the same random weights."""
    sparse = random_model(machine, cfg)
    dense = random_model(machine, replace(cfg, attn_types=["full"] * cfg.n_layer))
    dense.load_state_dict(sparse.state_dict(), strict=False)  # it has no index branch
    sides = {}
    for name, model in dict(dense=dense, msa=sparse).items():
        weights = DecodeWeights(model, T) if machine.gpu else None
        sides[name] = LongSide(model, weights)
    return sides

def long_cache(machine, cfg, T):
    """A cache of one row whose T - 1 tokens have random keys, values and index keys of variance 1."""
    cache = KVCache(cfg, 1, T, machine.device, machine.dtype)
    for lane in (cache.k, cache.v, cache.ki):
        if machine.gpu:
            lane.normal_()
        else:
            lane.uniform_(-3 ** 0.5, 3 ** 0.5)
    return cache

def context_that_fits(machine, cfg, T):
    """T, halved until a cache of that many tokens fits 0.7 of the free memory, and a line where it was."""
    a_token = machine.size * cfg.n_layer * (2 * cfg.n_kv_head * cfg.head_dim + cfg.index_head_dim)
    free = free_memory(machine.device)
    asked = T
    while free is not None and T * a_token > 0.7 * free and T > 1:
        T //= 2
    if T < asked:
        print(f"memory  | {asked:,} tokens do not fit: {T:,} instead")
    return T

def context_row(machine, subject, T):
    """A decode step of the whole model after T - 1 tokens: MSA in its sparse layers, and full attention in all."""
    cfg = replace(subject.model.cfg, n_mtp=0)
    T = context_that_fits(machine, cfg, T)
    sides = long_sides(machine, cfg, T)
    idx = torch.zeros(1, 1, dtype=torch.int64, device=machine.device)

    # where S blocks are all there are, both sides are the same function, with the same experts: a rounding may decide
    # which ones a token goes to
    short = min(T, cfg.index_topk_blocks * cfg.index_block_size)
    cache = long_cache(machine, cfg, short)
    for name, side in sides.items():
        got, experts = side.step(cache, short - 1, idx, record=True)
        want, _ = sides["dense"].forward(cache, short - 1, idx, experts)
        near(f"gate: a step of side {name} against full attention, at {short} tokens <= S * L", got, want, 5)

    # one cache for both
    cache = long_cache(machine, cfg, T)
    steps = {}
    for name, side in sides.items():
        steps[name] = repeat(partial(side.step, cache, T - 1), [(idx,)], 1)

    def check(name, outs):
        check_finite(f"a step at {T} tokens, {name}", outs[0][0])
    times = alternate(steps, machine.gpu, check, reps=20, seconds=2.0)

    row = dict(what="generate", table="context", shape=subject.name, ctx=T, batch=1)
    for name, side in sides.items():
        row[f"{name}_ms"] = statistics.median(times[name])
        row[f"{name}_bytes"] = step_bytes(side.model, 1, T, machine.size)
        row[f"{name}_util"] = 1e3 * row[f"{name}_bytes"] / row[f"{name}_ms"] / machine.rates["copy"]
    row["speedup"] = row["dense_ms"] / row["msa_ms"]
    row["bytes_allow"] = row["dense_bytes"] / row["msa_bytes"]
    print(f"{T:>12,} | {plain(row['dense_ms']):>17} {row['dense_bytes'] / 1e6:6,.0f} {row['dense_util']:4.0%} | "
          f"{plain(row['msa_ms']):>12} {row['msa_bytes'] / 1e6:6,.0f} {row['msa_util']:4.0%} | "
          f"{row['speedup']:7.2f}x | {row['bytes_allow']:10.2f}x", flush=True)
    return row

# ---- generate: drafts ----------------------------------------------------------------------------
# A verification's drafts hold up to the first that differs from the trunk's own choice. Two measures of how often:
# "accepted" counts, in the runs that are timed, the verifications in which drafts 1 to d all held. "agreed" needs no
# decoding: in one forward over held-out text, module d's choice against the trunk's choice of the same token. Its
# control, "shifted", compares with the trunk's choice one place on: where that agrees too, the text says nothing.

def draft_agreement(model, rows, shift=0, index_warmup=False):
    """Share of places of held-out text where the modules' choices 1 to d all are the trunk's -> a list by depth d.

    rows   (B, T) tokens
    shift  compare with the trunk's choice for so many places further on: a control
    """
    # the trunk's choices, and what the modules need of it
    cfg = model.cfg
    B, T = rows.shape
    logits, _, aux = model(rows, n_logits=T, index_warmup=index_warmup)
    trunk = logits.argmax(-1)                                                                              # (B, T)
    embedded = model.embed(rows).to(model.dtype)
    pos = torch.arange(T, device=rows.device).expand(B, T)
    ctx = Context(rope_tables(pos, cfg.rotary_dim, cfg.rope_theta), index_warmup=index_warmup)
    weights = [torch.ones(B, T - depth, device=rows.device) for depth in range(cfg.n_mtp + 1)]

    # at place i, module d and the trunk at i + d choose the token i + d + 1
    n = T - cfg.n_mtp - shift                                          # places that every depth has
    held = torch.ones(B, n, dtype=torch.bool, device=rows.device)
    shares = []
    for depth, hidden, _ in model.mtp_walk(aux["hidden"], embedded, ctx, weights):
        drafted = model.lm_head(hidden).argmax(-1)[:, :n]
        first = depth + shift
        held = held & (drafted == trunk[:, first:first + n])
        shares.append(held.float().mean().item())
    return shares

def draft_rows(machine, subject):
    """Speculative decoding of one sequence at a time, K = 1, 2, 3, in turn with plain decoding -> a row for each K."""
    length = subject.length(DRAFTED[machine.device.type])
    prompts = subject.prompts(DRAFTED_TEXTS[machine.device.type], length)
    held = {K: [] for K in range(1, MOST_DRAFTS + 1)}                  # drafts that held, of each verification
    sides = {0: GREEDY}
    for K in held:
        sides[K] = dict(GREEDY, speculate=K, accepted=held[K])

    # some tokens of each, which compile
    for given in sides.values():
        clock(islice(subject.generate(prompts[:1], length, **given), 4), machine)
    for counts in held.values():
        counts.clear()

    # prompt by prompt, all sides in turn
    seconds = dict.fromkeys(sides, 0.0)
    same = dict.fromkeys(sides, 0)
    for prompt in prompts:
        for K, given in sides.items():
            found = clock(subject.generate([prompt], length, **given), machine)
            if K == 0:
                plain_tokens = found.tokens
            check_greedy(f"K = {K}", subject, [prompt], found.tokens)
            seconds[K] += found.rest_s
            same[K] += torch.equal(found.tokens, plain_tokens)

    # a row for each K
    n_tokens = len(prompts) * (length - 1)
    rows = []
    for K, counts in held.items():
        row = dict(what="generate", table="drafts", shape=subject.name, ctx=2 * length, batch=1, K=K,
                   prompt=length, new=length, texts=len(prompts), same=same[K],
                   accepted=held_by_depth(counts, K), tokens_a_verification=1 + statistics.fmean(counts),
                   plain_tokens_per_s=n_tokens / seconds[0], tokens_per_s=n_tokens / seconds[K],
                   speedup=seconds[0] / seconds[K])
        rows.append(row)
        print_drafts(row)
    return rows

def print_drafts(row):
    shares = " / ".join(f"{share:.2f}" for share in row["accepted"])
    same = f"{row['same']} of {row['texts']}"
    print(f"K = {row['K']}  | {shares:18} | {row['tokens_a_verification']:21.2f} | "
          f"{row['plain_tokens_per_s']:14,.0f} | "
          f"{row['tokens_per_s']:8,.0f} | {same:>9} | {row['speedup']:5.2f}x", flush=True)

def agreement_row(machine, subject, windows):
    """How often drafts agree with the trunk on windows of held-out text, and its control."""
    rows = torch.tensor(windows, device=machine.device)
    agree = partial(draft_agreement, subject.model, rows, index_warmup=subject.index_warmup)
    row = dict(what="generate", table="agreement", shape=subject.name, ctx=rows.size(1), batch=len(rows),
               agreed=agree(), shifted=agree(shift=1))
    for name in ("agreed", "shifted"):
        print(f"{name:7} | {' / '.join(f'{share:.3f}' for share in row[name])}, by depth, over {rows.numel():,} "
              "held-out tokens", flush=True)
    return row

def say_drafts(rows, trained):
    """The line that says whether drafts pay on this device."""
    if not trained:
        return "random weights or tokens: how often drafts hold, and so their speed, says nothing of a trained model"
    best = max(rows, key=lambda row: row["speedup"])
    pay = "drafts pay" if best["speedup"] > 1 else "drafts do not pay"
    line = (f"{pay} on this device: {best['tokens_per_s']:,.0f} tokens/s with K = {best['K']}, "
            f"{best['plain_tokens_per_s']:,.0f} without, {best['speedup']:.2f}x")
    if best["same"] < best["texts"]:
        line += f"; the same text in {best['same']} of {best['texts']}, the others part where two tokens nearly tie"
    return line

@torch.no_grad()
def run_generate(args, machine):
    """--what generate: plain decoding and GPT-2's, a step at a long context, and drafts.

    Rows have what = "generate", the name of their table, shape (preset or folder), batch and ctx, and beside them
    decode     side (model, gpt2, gpt2 without a cache), prompt and new (tokens), first_s, tokens_per_s (of all rows,
               after their first), step_ms, step_bytes (that a step must read), util (of the copy rate), model_over
               (the model's tokens/s over the side's)
    context    dense_ms, msa_ms (of a step), dense_bytes, msa_bytes, dense_util, msa_util, speedup, bytes_allow (the
               ratio of the bytes)
    drafts     K, prompt, new, texts, same (of them, whose output is plain decoding's), accepted (by depth d, the share
               of verifications in which drafts 1 to d all held), tokens_a_verification, plain_tokens_per_s,
               tokens_per_s, speedup
    agreement  agreed and shifted, see above; a checkpoint with MTP modules and held-out text alone
    """
    subject = make_subject(args, machine)
    model = subject.model
    baseline = load_baseline()
    gpt2 = make_gpt2(machine, baseline, subject)
    total, active = model.num_params()
    weights = "random weights" if args.out is None else "a checkpoint"
    n_gpt2 = sum(p.numel() for p in gpt2.parameters())
    print(f"model   | {subject.name}, {weights}: {total:,} parameters, {active:,} active; attention "
          f"{' '.join(model.cfg.attn_types)}; {model.cfg.n_mtp} MTP modules\n"
          f"kernels | {implementations(model, machine.device)}\n"
          f"gpt2    | {n_gpt2:,} parameters, random, static cache"
          f"{', a compiled step in a CUDA graph' if machine.gpu else ''}")
    now = measure_rates(machine)
    print(f"rates   | measured: copy {now['copy']:.3e} bytes/s, matmul {now['matmul']:.3e} FLOP/s")

    # nothing is timed that is wrong
    prompts = subject.prompts(2, subject.length(DRAFTED[machine.device.type]))
    tokens = clock(subject.generate(prompts, len(prompts[0]), **GREEDY), machine).tokens
    check_greedy("gate", subject, prompts, tokens)
    check_baseline(gpt2, torch.tensor(prompts, device=machine.device))
    print("gate    | passed: greedy tokens against a forward without a cache; GPT-2's cache against none")

    print("\nside                 rows x prompt + new |  first s |   tokens/s | ms a step |  util | model over it")
    rows = []
    for B in SEQUENCES:
        rows += decoding_rows(machine, subject, baseline, gpt2, B)

    if "msa" in model.cfg.attn_types:
        print("\na step after | full attention ms     MB util |       MSA ms     MB util | speed-up | bytes allow")
        rows += row_that_fits(f"a step after {args.ctx:,} tokens", context_row, machine, subject, args.ctx)

    if model.cfg.n_mtp:
        print("\ndrafts | accepted, by depth | tokens a verification | plain tokens/s | tokens/s | same text | ratio")
        drafts = draft_rows(machine, subject)
        rows += drafts
        windows = subject.windows(COMPARED_TEXTS, subject.length(DRAFTED[machine.device.type]))
        if windows:
            rows.append(agreement_row(machine, subject, windows))
        print(f"found   | {say_drafts(drafts, bool(windows))}")
    return dict(device=machine.name, rows=rows, rates=machine.rates)

# ---- quality: the study ----------------------------------------------------------------------------
# Do window, linear and sparse attention find what full attention finds? Small models that differ in nothing else learn
# synthetic tasks at one length, and are tested at that length and beyond. After RULER (arXiv 2404.06654), multi-query
# associative recall (2312.04927) and the multi-hop argument of M2's report (2605.26494, section 2).
# All have the same steps, batches and, by the width of their MLPs, parameters. Each is trained at three rates from
# three seeds, because a rate that suits one kind of attention ruins another; the best rate is reported, all its seeds
# beside chance, because some skills come in one seed and not in the next.


@dataclass
class Study:
    """What is compared, at which size. Vocabulary: SPECIAL tokens, names, values, words."""
    attns: tuple                       # kinds of attention: see study_config
    rates: tuple                       # peak learning rates that each is trained at
    seeds: tuple
    steps: int                         # of each model
    T: int                             # tokens of a training row
    scales: tuple                      # lengths of the tests, in T
    groups: tuple                      # a task for each group of rows of a batch
    rows: int                          # rows of a group
    tests: int                         # rows of a test, up to 2 T; half as many beyond
    n_names: int
    n_values: int
    n_words: int
    chain: int                         # tokens of a row for each chain of variables
    hops: int                          # statements of a chain
    all_budgets: bool                  # MSA is also tested with a quarter of all keys, and with the heaviest blocks
    model: dict                        # fields of its MiniMaxConfig
    mlp: int                           # width of the MLPs beside full attention

    @property
    def vocab_size(self):
        return SPECIAL + self.n_names + self.n_values + self.n_words

    @property
    def tasks(self):
        return tuple(dict.fromkeys(self.groups))

# no rotation and a short convolution, differs from M2: with RoPE and without the convolution small models learn to look
# up with far more steps, if at all, and fail beyond the length of training, whatever their attention
SMALL_MODEL = dict(
    mlp_types=["dense"], n_expert=1, n_expert_per_tok=1, expert_dim=8, qk_norm="head", gemma_norm=True,
    rotary_dim=0, conv_taps=4, n_head=4, n_kv_head=2, index_kl_stride=4, window=16)
STUDIES = dict(
    cuda=Study(
        attns=("full", "msa", "msa-converted", "full:msa=1:3", "swa:full=1:1", "lightning:full=1:1", "swa:full=3:1",
               "lightning:full=3:1", "swa", "lightning"),
        rates=(1e-3, 2e-3, 4e-3), seeds=(0, 1, 2), steps=10_000,
        T=128, scales=(1, 2, 4, 8),
        groups=("local", "needle", "mkey", "recall", "vt", "vt", "vt", "cwe", "fwe"),
        rows=4, tests=128, n_names=256, n_values=64, n_words=64, chain=32, hops=4,
        all_budgets=True,
        model=dict(SMALL_MODEL, n_layer=4, n_embd=128, head_dim=32, index_head_dim=32, index_block_size=8,
                   index_topk_blocks=4),
        mlp=320),
    cpu=Study(
        attns=("full", "msa", "swa:full=1:2", "swa:full=2:1", "lightning:full=2:1"),
        rates=(4e-3,), seeds=(0, 1), steps=2500,
        T=128, scales=(1, 2, 4), groups=("local", "mkey", "vt", "vt"),
        rows=2, tests=32, n_names=128, n_values=16, n_words=16, chain=16, hops=3,
        all_budgets=False,
        # heads of 18: then there are widths of the MLPs with which all kinds have as many parameters
        model=dict(SMALL_MODEL, n_layer=3, n_embd=64, head_dim=18, index_head_dim=16, index_block_size=4,
                   index_topk_blocks=8),
        mlp=64))

def count_parameters(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in MiniMax(cfg).parameters())

def study_config(study, attn):
    """The model of a kind of attention: as --attn of train.py; "msa-converted" has full attention first. Layers with
    less in their attention have more in their MLPs, so that all models have as many parameters as whole widths allow:
    those of the studies within 0.1 %, others within half a width, 0.3 % at most. ValueError for what is no kind."""
    n = study.model["n_layer"]
    fields = dict(study.model, vocab_size=study.vocab_size, max_seq_len=study.T * max(study.scales))
    fields["mlp_types"] = ["dense"] * n

    def config(attn_types, width):
        return MiniMaxConfig(**fields, attn_types=attn_types, dense_dim=width)

    wanted = count_parameters(config(["full"] * n, study.mlp))
    attn_types = attn_pattern(attn.removesuffix("-converted"), n)
    if attn.endswith("-converted") and "msa" not in attn_types:
        raise ValueError(f"attention {attn!r}: no layer of it has MSA, so that there is nothing to convert")
    a_unit = 3 * n * fields["n_embd"]  # parameters of an MLP's unit: two in, one out
    more = wanted - count_parameters(config(attn_types, study.mlp))
    return config(attn_types, study.mlp + round(more / a_unit))

# ---- quality: tasks --------------------------------------------------------------------------------
# A row is filler words, among which stand statements, and questions at its end:
#     statement    name = value, or name = name; at a random multiple of 3
#     question     ? name, whose answer is asked for after the name, and never shown
#     local        2 statements and 2 questions in the last 11 tokens, within every window
#     needle       1 statement anywhere           mkey    T / 16 statements, 8 questions
#     recall       T / 4 statements, 8 questions  (of T = 128 in training, as all such numbers)
#     vt           variable tracking: T / 32 chains a = value, b = a, c = b, d = c, interleaved. An answer h statements
#                  deep needs h lookups, one after the other: vt1 to vt4. In training the name to the right of every
#                  "=" is a question, too: without that no trial of ours learned a second hop
#     cwe          words alone: 4 are common, 4 % of all tokens each, the others rarer; which four?
#     fwe          words alone: frequencies fall as rank ** -1.5; which three are the most frequent?
# Everything grows with T: 8 times the length has 8 times the statements that are not asked for.

EQUALS, ASK, COMMON, FREQUENT, SPECIAL = 0, 1, 2, 3, 8
N_COMMON = 4
N_FREQUENT = 3
COMMON_SHARE = 0.04                    # of a row, each common word


@dataclass
class Questions:
    """Rows of one task."""
    idx: torch.Tensor                  # (n, T) tokens
    place: torch.Tensor                # (n, Q) where an answer is asked for
    answers: torch.Tensor              # (n, Q, k) the k tokens that are right
    hop: torch.Tensor                  # (n, Q) lookups that it needs; -1: asked in training alone

    def fields(self):
        return [self.idx, self.place, self.answers, self.hop]

    def map(self, change):
        """The same with a function's result in place of each tensor."""
        return Questions(*map(change, self.fields()))

class TaskMaker:
    """Makes rows of T tokens, on the generator's device."""

    def __init__(self, study, T, generator):
        self.study = study
        self.T = T
        self.generator = generator
        self.device = generator.device
        self.names = SPECIAL
        self.values = self.names + study.n_names
        self.words = self.values + study.n_values

    def make(self, task, n):
        """-> Questions of n rows."""
        study = self.study
        of_training = study.T // 16
        if task == "local":
            return self.lookup(n, 2, 2, near=True)
        if task == "needle":
            return self.lookup(n, 1, 1)
        if task == "mkey":
            return self.lookup(n, self.T // 16, min(8, of_training))
        if task == "recall":
            return self.lookup(n, self.T // 4, of_training)
        if task == "vt":
            return self.chains(n)
        if task == "cwe":
            return self.counting(n, self.common_counts(), N_COMMON, COMMON)
        return self.counting(n, self.frequent_counts(), N_FREQUENT, FREQUENT)

    def orders(self, n, m):
        """n random orders of m things: (n, m)."""
        return torch.rand(n, m, generator=self.generator, device=self.device).argsort(-1)

    def some(self, n, m, size):
        """For each of n rows m numbers below `size`, all different as far as there are as many: (n, m)."""
        rounds = [self.orders(n, size) for _ in range(-(-m // size))]
        return torch.cat(rounds, 1)[:, :m]

    def write(self, n, slots, left, right, asked):
        """Rows of words, with statements left (n, m) = right (n, m) at 3 * slots (n, m), then questions asked (n, Q)
        -> idx (n, T), places of the questions (n, Q)."""
        T, Q = self.T, asked.size(1)
        words = torch.randint(self.study.n_words, (n, T), generator=self.generator, device=self.device)
        idx = self.words + words
        place = 3 * slots
        idx.scatter_(1, place, left)
        idx.scatter_(1, place + 1, EQUALS)
        idx.scatter_(1, place + 2, right)
        idx[:, T - 2 * Q::2] = ASK
        idx[:, T - 2 * Q + 1::2] = asked
        asked_at = torch.arange(T - 2 * Q + 1, T, 2, device=self.device)
        return idx, asked_at.expand(n, Q)

    def lookup(self, n, m, Q, near=False):
        """m statements name = value, Q of them asked for."""
        names = self.names + self.some(n, m, self.study.n_names)
        values = self.values + self.some(n, m, self.study.n_values)
        n_slots = (self.T - 2 * Q) // 3
        slots = self.some(n, m, n_slots)
        if near:                       # the last ones
            slots = n_slots - 1 - self.orders(n, m)
        which = self.some(n, Q, m)
        idx, place = self.write(n, slots, names, values, names.gather(1, which))
        return Questions(idx, place, values.gather(1, which)[..., None], torch.zeros_like(place))

    def chains(self, n):
        """Chains of `hops` statements, each of which but the first names the one before it."""
        hops = self.study.hops
        n_chains = self.T // self.study.chain
        Q = self.study.T // self.study.chain * hops  # each name of a training row once; as many in longer rows
        names = self.names + self.some(n, n_chains * hops, self.study.n_names)
        names = names.view(n, n_chains, hops)
        value = self.values + self.some(n, n_chains, self.study.n_values)                             # (n, chains)
        slots = self.some(n, n_chains * hops, (self.T - 2 * Q) // 3)
        slots = slots.view(n, n_chains, hops).sort(-1).values  # a chain's statements stand in their order
        right = torch.cat([value[..., None], names[..., :-1]], -1)

        # questions: for each hop some of the chains, in a random order
        chain = torch.cat([self.some(n, Q // hops, n_chains) for _ in range(hops)], 1)
        hop = torch.arange(1, hops + 1, device=self.device)
        hop = hop.repeat_interleave(Q // hops).expand(n, Q)
        order = self.orders(n, Q)
        chain = chain.gather(1, order)
        hop = hop.gather(1, order)
        asked = names.flatten(1).gather(1, chain * hops + hop - 1)
        idx, place = self.write(n, slots.flatten(1), names.flatten(1), right.flatten(1), asked)

        # in training also the names to the right of "="
        references = (3 * slots + 2)[..., 1:].flatten(1)                              # (n, chains * (hops - 1))
        same = value[..., None].expand(-1, -1, hops - 1).flatten(1)
        return Questions(
            idx=idx,
            place=torch.cat([place, references], 1),
            answers=torch.cat([value.gather(1, chain), same], 1)[..., None],
            hop=torch.cat([hop, torch.full_like(references, -1)], 1))

    def common_counts(self):
        """How often each word stands in a row of cwe, the common ones first."""
        body = self.T - 1
        common = round(COMMON_SHARE * body)
        others = self.study.n_words - N_COMMON
        left = body - N_COMMON * common
        return [common] * N_COMMON + [left // others + (i < left % others) for i in range(others)]

    def frequent_counts(self):
        """The same for fwe, in falling order."""
        body = self.T - 1
        weights = [rank ** -1.5 for rank in range(1, self.study.n_words + 1)]
        counts = [int(body * weight / sum(weights)) for weight in weights]
        counts[0] += body - sum(counts)
        return counts

    def counting(self, n, counts, k, question):
        """Shuffled words, each as often as `counts` says; the first k are asked for at the end."""
        words = self.words + self.orders(n, len(counts))                                              # (n, words)
        kind = torch.arange(len(counts), device=self.device).repeat_interleave(
            torch.tensor(counts, device=self.device), output_size=sum(counts))
        body = words.gather(1, kind[self.orders(n, len(kind))])
        idx = torch.cat([body, torch.full_like(body[:, :1], question)], 1)
        place = torch.full_like(idx[:, :1], self.T - 1)
        return Questions(idx, place, words[:, None, :k], torch.zeros_like(place))

    def chance(self, task):
        """What a guess gets right: among the values that stand in the row, or among all words, or all values for a
        single needle."""
        study = self.study
        if task in ("cwe", "fwe"):
            return (N_COMMON if task == "cwe" else N_FREQUENT) / study.n_words
        in_row = dict(local=2, needle=study.n_values, mkey=self.T // 16, recall=self.T // 4)
        n_values = in_row.get(task, self.T // study.chain)  # vt: one a chain
        return 1 / min(n_values, study.n_values)

def join_questions(parts, shape):
    """Questions of several tasks, (lead..., rows, ...) each -> one, with the rows side by side. Places without a
    question repeat place 0 and have no right answer: -1.

    shape  the dimensions in front of the rows: of each part the first dimension is their product times its rows
    """
    most = max(part.place.size(1) for part in parts)
    right = max(part.answers.size(2) for part in parts)
    padded = []
    for part in parts:
        more = most - part.place.size(1)           # questions
        wrong = right - part.answers.size(2)       # answers of each
        filled = Questions(
            idx=part.idx,
            place=F.pad(part.place, (0, more)),
            answers=F.pad(part.answers, (0, wrong, 0, more), value=-1),
            hop=F.pad(part.hop, (0, more), value=-1))
        padded.append(filled.map(lambda x: x.unflatten(0, (*shape, -1))).fields())
    return Questions(*(torch.cat(fields, len(shape)) for fields in zip(*padded)))

def make_batches(study, generator, n_steps, replicas):
    """Training batches for some steps: Questions (n_steps, replicas, rows of a batch, ...)."""
    maker = TaskMaker(study, study.T, generator)
    parts = []
    for task in study.tasks:
        rows = study.rows * study.groups.count(task)
        parts.append(maker.make(task, n_steps * replicas * rows))
    return join_questions(parts, (n_steps, replicas))

# ---- quality: replicas -----------------------------------------------------------------------------
# Models of one kind, at different rates and seeds, compute as one: each weight is a stack of R, and a batch holds the
# rows of model 0, then those of model 1, and so on. Nothing else in MiniMax.forward knows of it, for nothing else
# mixes rows. One model of 0.7M parameters leaves a GPU idle between its kernels; nine fill it.

class StackedLinear(torch.nn.Module):
    """R Linears."""

    def __init__(self, parts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.stack([part.weight.detach() for part in parts]))  # (R, out, in)
        self.out_features = self.weight.size(1)

    def forward(self, x):
        R, n_out, n_in = self.weight.shape
        y = torch.bmm(x.reshape(R, -1, n_in), self.weight.to(x.dtype).mT)
        return y.view(*x.shape[:-1], n_out)

class StackedNorm(torch.nn.Module):
    """R RMSNorms."""

    def __init__(self, parts):
        super().__init__()
        self.eps = parts[0].eps
        self.gemma = parts[0].gemma
        self.weight = torch.nn.Parameter(torch.stack([part.weight.detach() for part in parts]))  # (R, channels)

    def forward(self, x):
        wide = x.float()
        R, channels = self.weight.shape
        gain = 1 + self.weight if self.gemma else self.weight
        y = F.rms_norm(wide, (channels,), None, self.eps)
        y = y.reshape(R, -1, channels) * gain[:, None]
        return y.view(x.shape).to(x.dtype)

class StackedEmbedding(torch.nn.Module):
    """R embeddings."""

    def __init__(self, parts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.stack([part.weight.detach() for part in parts]))  # (R, V, C)

    def forward(self, idx):
        R, V, _ = self.weight.shape
        first = V * torch.arange(R, device=idx.device).repeat_interleave(len(idx) // R)
        return F.embedding(idx + first[:, None], self.weight.flatten(0, 1))

class StackedConv(ShortConv):
    """R ShortConvs."""

    def __init__(self, parts):
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.stack([part.weight.detach() for part in parts]))  # (R, C, taps)

    def tap(self, t, x):
        R = len(self.weight)
        of_rows = self.weight[:, :, t].repeat_interleave(len(x) // R, 0)
        return of_rows.to(x.dtype)[:, None]

class MaskedMSA(torch.nn.Module):
    """An MSA layer that masks the scores of all keys, where model.Attention gathers chosen ones: the same numbers, and
    at these lengths less work. A test holds it against msa.msa_train. It can also read the truly heaviest blocks."""

    def __init__(self, attn, choice):
        super().__init__()
        self.attn = attn
        self.choice = choice           # "index", or "oracle": by the mass of full attention

    @property
    def indexer(self):
        return self.attn.indexer

    def forward(self, x, ctx):
        """x (B, T, C) -> y (B, T, C), aux: index_kl in training, found (B, T, Hkv) in a test: the share of the heaviest
        earlier blocks that the index branch chose, nan where it had no choice."""
        cfg = self.attn.cfg
        S, L, stride = cfg.index_topk_blocks, cfg.index_block_size, cfg.index_kl_stride
        q, k, v, qi, ki = self.attn.project(x, ctx.rope)
        B, T, H, head_dim = q.shape
        Hkv = k.size(2)
        N = train.cdiv(T, L)
        i = torch.arange(T, device=x.device)
        causal = i[:, None] >= i
        # a group's heads are rows of one product, which copies no keys
        q = q.float().unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4)                              # (B, Hkv, G, T, D)
        q = q.flatten(2, 3)
        k, v = (y.float().transpose(1, 2) for y in (k, v))                                         # (B, Hkv, T, D)
        scores = (q @ k.mT * head_dim ** -0.5).unflatten(2, (-1, T))                               # (B, Hkv, G, T, T)

        # what is read: every visible key, or the tokens of S blocks
        seen = causal[None, None]                                                                  # (., ., T, T)
        aux = {}
        if not ctx.index_warmup:
            if self.training and x.is_cuda:
                chosen = self.rank_blocks(qi, ki, i, S, L)
            else:
                block_idx = msa.select_blocks(qi, ki, S, L, impl="torch")
                if not self.training:
                    heaviest = self.heaviest_blocks(scores, causal, i, S, L, N)
                    aux["found"] = self.share_found(block_idx, heaviest, i // L, N)
                    if self.choice == "oracle":
                        block_idx = heaviest
                chosen = msa.chosen_blocks(block_idx, N)
            seen = chosen.transpose(1, 2).repeat_interleave(L, -1)[..., :T] & causal
        probs = scores.masked_fill(~seen[:, :, None], -math.inf).softmax(-1)
        y = (probs.flatten(2, 3) @ v).unflatten(2, (-1, T))                                       # (B, Hkv, G, T, D)
        y = y.permute(0, 3, 1, 2, 4).reshape(B, T, -1)

        # the KL of every stride-th query, as msa.index_kl_loss has it
        if self.training:
            rows = slice(stride - 1, None, stride)
            teacher = probs[..., rows, :].detach().mean(2)                                         # (B, Hkv, t, T)
            index_q = qi[:, rows].float().transpose(1, 2)                                          # (B, Hkv, t, D)
            index_scores = (index_q.flatten(1, 2) @ ki.float().mT).view_as(teacher)
            index_scores = index_scores * qi.size(-1) ** -0.5
            logp = index_scores.masked_fill(~seen[..., rows, :], -math.inf).log_softmax(-1)
            # where teacher is 0 a term is 0: neither log may be infinite
            terms = teacher * (teacher.clamp(min=1e-30).log() - logp.clamp(min=-1e30))
            aux["index_kl"] = terms.sum() / Hkv
        return self.attn.o_proj(y.to(x.dtype)), aux

    @staticmethod
    @torch.no_grad()
    def rank_blocks(qi, ki, i, S, L):
        """What msa.select_blocks chooses, for rows of whole blocks, without its sort, which is slow on a GPU: a block
        is chosen if fewer than S - 1 have a higher score, or the same and a lower number. -> bool (B, T, Hkv, N)"""
        scores = qi.float().transpose(1, 2) @ ki.float()[:, None].mT                               # (B, Hkv, T, T)
        scores = scores.unflatten(-1, (-1, L)).amax(-1)
        number = torch.arange(scores.size(-1), device=i.device)
        earlier = number < (i // L)[:, None]                                                       # (T, N)
        scores = scores.masked_fill(~earlier, -math.inf)                                           # (B, Hkv, T, N)
        above = scores[..., None, :] > scores[..., None]
        before = (scores[..., None, :] == scores[..., None]) & (number < number[:, None])
        rank = (above | before).sum(-1)
        chosen = (rank < S - 1) & earlier | (number == (i // L)[:, None])
        return chosen.transpose(1, 2)

    @staticmethod
    def heaviest_blocks(scores, causal, i, S, L, N):
        """Scores (B, Hkv, G, T, T) -> block_idx (B, T, Hkv, S): own, then the earlier blocks of most probability."""
        mass = scores.masked_fill(~causal, -math.inf).softmax(-1).mean(2)                          # (B, Hkv, T, T)
        mass = F.pad(mass, (0, N * L - mass.size(-1)))
        mass = mass.unflatten(-1, (N, L)).sum(-1)                                                  # (B, Hkv, T, N)
        own = (i // L)[:, None]
        not_earlier = torch.arange(N, device=i.device) >= own                                      # (T, N)
        mass = mass.masked_fill(not_earlier, -math.inf).transpose(1, 2)
        return msa.top_blocks(mass, own[None, :, 0].expand(len(mass), -1), S)

    @staticmethod
    def share_found(block_idx, heaviest, own, N):
        """Of the earlier blocks in `heaviest`, those in block_idx (B, T, Hkv, S): (B, T, Hkv), nan without a choice."""
        found = msa.chosen_blocks(block_idx, N) & msa.chosen_blocks(heaviest, N)
        S = block_idx.size(-1)
        share = (found.sum(-1) - 1) / max(1, S - 1)
        return share.masked_fill((own < S)[:, None], math.nan)

def stack_models(models, choice="index"):
    """R models of one config -> one MiniMax of their stacked weights, whose rows are theirs in turn."""
    stacked = {"Linear": StackedLinear, "RMSNorm": StackedNorm, "Embedding": StackedEmbedding, "ShortConv": StackedConv}
    model = models[0]

    def replace_parts(modules):
        for name, child in list(modules[0].named_children()):
            parts = [getattr(module, name) for module in modules]
            if type(child).__name__ in stacked:
                setattr(modules[0], name, stacked[type(child).__name__](parts))
                continue
            replace_parts(parts)
            if getattr(child, "indexer", None) is not None and isinstance(child, Attention):
                setattr(modules[0], name, MaskedMSA(child, choice))

    replace_parts(models)
    return model

# ---- quality: training -----------------------------------------------------------------------------

WARMUP, DECAY = 0.04, 0.3              # shares of the steps in which the rate rises, and falls to 0
MOMENTUM = 0.95                        # of Muon
ADAM = dict(betas=(0.9, 0.98), eps=1e-10)
STUDY_EMBED_SCALE = 3.0                # the embedding's rate over that of the others
GAIN = 0.5                             # of the norms of q and k at the start, beyond 1: sharper attention, without
                                       # which no trial of ours on a CPU learned a second hop in minutes
CONVERTED_AT = 0.7                     # share of the steps after which "msa-converted" is sparse
BATCHES_AT_ONCE = 50                   # steps whose rows are made together


class ReplicaOptimizer:
    """train.py's Muon and AdamW for stacked models, each at its own rate; a CUDA graph can hold a step."""

    def __init__(self, model, rates, steps):
        """rates: (R,), peaks."""
        self.steps = steps
        self.rates = rates
        self.step_count = torch.zeros((), device=rates.device)
        self.by_shape = {}             # Muon: (shape, matrices in a parameter) -> parameters
        self.others = []               # Adam
        scales = []
        for name, p in model.named_parameters():
            kind = train.kind_of(name, p[0])
            if kind.endswith(("matrix", "stacked")):
                key = (*p.shape[1:], 2 if kind == "stacked" else 1)
                self.by_shape.setdefault(key, []).append(p)
            else:
                self.others.append(p)
                scale = STUDY_EMBED_SCALE if kind == "embed" else 1.0
                scales.append(torch.full((p[0].numel(),), scale, device=rates.device))
        self.matrices = [p for params in self.by_shape.values() for p in params]
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.scale = torch.cat(scales)
        self.mean = torch.zeros(len(rates), len(self.scale), device=rates.device)
        self.square = torch.zeros_like(self.mean)

    def state(self):
        """All that a step changes beside the parameters."""
        return [self.step_count, *self.momentum, self.mean, self.square]

    @torch.no_grad()
    def step(self):
        progress = self.step_count / self.steps
        rising = progress / WARMUP + 0.01   # the first step is one, too
        share = torch.minimum(rising, (1 - progress) / DECAY).clamp(max=1)
        rate = self.rates * share                                                                             # (R,)
        self.step_count += 1
        self.step_matrices(rate[:, None, None])
        self.step_others(rate[:, None])

    def step_matrices(self, rate):
        grads = [p.grad for p in self.matrices]
        torch._foreach_lerp_(self.momentum, grads, 1 - MOMENTUM)
        updates = iter(torch._foreach_lerp(grads, self.momentum, MOMENTUM))  # Nesterov's, see train.Muon.blend
        for (rows, cols, stack), params in self.by_shape.items():
            together = torch.stack([next(updates) for _ in params])                        # (n, R, rows, cols)
            if together.is_cuda:
                together = together.bfloat16()
            found = train.orthogonalize(together.view(-1, rows // stack, cols)).reshape(together.shape)
            size = train.MUON_RMS * max(rows // stack, cols) ** 0.5
            torch._foreach_sub_(params, [size * rate * update for update in found])

    def step_others(self, rate):
        beta1, beta2 = ADAM["betas"]
        R = len(rate)
        grad = torch.cat([p.grad.reshape(R, -1) for p in self.others], 1)
        self.mean.lerp_(grad, 1 - beta1)
        self.square.lerp_(grad * grad, 1 - beta2)
        mean = self.mean / (1 - beta1 ** self.step_count)
        square = self.square / (1 - beta2 ** self.step_count)
        update = rate * self.scale * mean / (square.sqrt() + ADAM["eps"])
        parts = update.split([p[0].numel() for p in self.others], 1)
        torch._foreach_sub_(self.others, [part.view_as(p) for part, p in zip(parts, self.others)])

def answer_logits(model, batch, index_warmup=False):
    """batch: Questions (rows, ...) -> logits (rows, Q, V) fp32 where answers are asked for, aux."""
    _, losses, aux = model(batch.idx, n_logits=0, index_warmup=index_warmup)
    hidden = aux["hidden"]
    at = batch.place[..., None].expand(-1, -1, hidden.size(2))
    logits = model.lm_head(model.norm(hidden.gather(1, at)))
    return logits.float(), losses, aux

def study_loss(model, batch, R, index_warmup):
    """-> each model's loss (R,), the mean over its rows, each of the mean over its answers; the sum over models of the
    index branches' KL, each the mean over its queries and the sum over its layers."""
    logits, losses, _ = answer_logits(model, batch, index_warmup)
    right = batch.answers >= 0                                                                            # (n, Q, k)
    logp = logits.log_softmax(-1).gather(2, batch.answers.clamp(min=0))
    of_row = -(logp * right).sum((1, 2)) / right.sum((1, 2))
    stride = model.cfg.index_kl_stride
    queries = batch.idx.numel() // stride // R
    return of_row.view(R, -1).mean(1), losses.kl.sum() / queries

class Replicas:
    """Models of one kind of attention in training, at every rate from every seed: R = rates x seeds, rate by rate."""

    def __init__(self, study, attn, device, dtype):
        self.study = study
        self.attn = attn
        self.cfg = study_config(study, attn)
        self.R = len(study.rates) * len(study.seeds)
        models = []
        for _, seed in product(study.rates, study.seeds):
            torch.manual_seed(seed)
            model = MiniMax(self.cfg, dtype)
            for name, p in model.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    p.data += GAIN
            models.append(model)
        self.model = stack_models(models).to(device).train()
        if device.type == "cuda":      # what is between matrix products, in one kernel: MLPs differ in width, these not
            for block in self.model.layers:
                for part in (block.attn_norm, block.conv, block.attn, block.mlp_norm):
                    part.compile(dynamic=False)
        rates = torch.tensor(study.rates, device=device).repeat_interleave(len(study.seeds))
        self.optimizer = ReplicaOptimizer(self.model, rates, study.steps)
        self.generator = torch.Generator(device).manual_seed(SEED + study.seeds[0])
        self.device = device
        self.done = 0                  # steps
        self.batch = None              # what a captured step reads
        self.graphs = {}               # by index_warmup
        self.losses = None
        self.step_seconds = []         # of a step, means over BATCHES_AT_ONCE

    def dense_steps(self):
        """Steps with full attention before a conversion."""
        return round(CONVERTED_AT * self.study.steps) if self.attn.endswith("-converted") else 0

    def compute(self, index_warmup):
        """A step on self.batch -> losses (R,)."""
        loss, kl = study_loss(self.model, self.batch, self.R, index_warmup)
        for p in self.model.parameters():
            p.grad = None
        (loss.sum() + kl).backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, steps, progress=None):
        """So many steps more."""
        last = self.done + steps
        while self.done < last:
            n = min(BATCHES_AT_ONCE, last - self.done)
            batches = make_batches(self.study, self.generator, n, self.R)
            began = time.perf_counter()
            for step in range(n):
                index_warmup = self.done < self.dense_steps()
                batch = batches.map(lambda x: x[step].flatten(0, 1))
                self.losses = self.step(batch, index_warmup)
                self.done += 1
            some_finite = bool(torch.isfinite(self.losses).any())  # waits for the GPU
            self.step_seconds += [(time.perf_counter() - began) / n]
            if not some_finite:        # a model at too high a rate does not stop the others, and is not chosen
                raise FloatingPointError(f"{self.attn}: losses {self.losses.tolist()} after step {self.done}")
            if progress:
                progress(self.done, self.losses)

    def step(self, batch, index_warmup):
        """A step on these rows, on a GPU as a CUDA graph -> losses (R,)."""
        if self.device.type != "cuda":
            self.batch = batch
            return self.compute(index_warmup)
        if self.batch is None:
            self.batch = batch.map(torch.clone)
        torch._foreach_copy_(self.batch.fields(), batch.fields())
        if index_warmup not in self.graphs:
            self.graphs[index_warmup] = self.capture(index_warmup)
        return self.graphs[index_warmup]()

    def capture(self, index_warmup):
        """The step as a CUDA graph. Steps that warm up leave no trace."""
        changed = [*(p.data for p in self.model.parameters()), *self.optimizer.state()]
        before = [x.clone() for x in changed]
        replay = captured(lambda: self.compute(index_warmup), self.device)
        torch._foreach_copy_(changed, before)
        return replay

# ---- quality: tests --------------------------------------------------------------------------------
# After training every model is tested on rows that none has seen, the same for all. MSA is tested with as many keys as
# in training at every length, and with a quarter of all keys; each with the blocks that its index branch chooses, and
# with the truly heaviest ones (the oracle). What the oracle finds and the index branch does not is lost by the index
# branch; what the oracle does not find at that budget, but at a larger one, by the budget; the rest by the model.

TEST_SEED, CHOICE_SEED = 1, 2          # of the rows that are reported, and of those that choose the rate
SCORES_AT_ONCE = 2 ** 29               # elements of attention scores in a test's forward


def take_models(model, numbers):
    """Some of the stacked models, by their numbers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._compiled_call_impl = None  # tests have many shapes
    for p in model.parameters():
        p.data = p.data[numbers].contiguous()
        p.grad = None
    return model.eval()

def unseen_rows(study, task, scale, device, seed):
    """-> Questions of a task at scale * T tokens."""
    n = study.tests if scale <= 2 else study.tests // 2
    number = study.tasks.index(task)
    generator = torch.Generator(device).manual_seed(100 * scale + 10_000 * seed + number)  # another for each test
    return TaskMaker(study, scale * study.T, generator).make(task, n)

def hits(logits, answers):
    """logits (n, Q, V), answers (n, Q, k) -> the share of the k right tokens among the k likeliest: (n, Q)."""
    guesses = logits.topk(answers.size(2)).indices
    is_right = (guesses[..., None] == answers[..., None, :]).any(-1)                                      # (n, Q, k)
    return is_right.float().mean(-1)

@torch.no_grad()
def score_models(study, model, R, task, scale, seed=TEST_SEED):
    """-> {task, a hop of "vt" by itself: (accuracy of each of R models, block recall of each or None)}."""
    device = model.embed.weight.device
    rows = unseen_rows(study, task, scale, device, seed)
    T = scale * study.T
    at_once = max(1, SCORES_AT_ONCE // (R * model.cfg.n_head * T * T))
    right = []
    found = []
    for first in range(0, len(rows.idx), at_once):
        part = rows.map(lambda x: x[first:first + at_once])
        batch = part.map(lambda x: torch.cat([x] * R))
        logits, _, aux = answer_logits(model, batch)
        right.append(hits(logits, batch.answers).unflatten(0, (R, -1)))                          # (R, n, Q)
        if "found" in aux:
            of_layers = aux["found"]                                             # (layers, R * n, T, Hkv)
            at = batch.place[None, ..., None].expand(len(of_layers), -1, -1, of_layers.size(-1))
            share = of_layers.gather(2, at).nanmean((0, 3))                                      # (R * n, Q)
            found.append(share.unflatten(0, (R, -1)))
    right = torch.cat(right, 1)
    found = torch.cat(found, 1) if found else None

    results = {}
    for hop in rows.hop.unique().tolist():
        if hop < 0:                    # asked in training alone
            continue
        name = f"{task}{hop}" if hop else task
        asked = rows.hop == hop
        recall = None if found is None else found[:, asked].nanmean(1).tolist()
        results[name] = right[:, asked].mean(1).tolist(), recall
    return results

def keys_read(cfg, T):
    """Keys that a query reads: in MSA's layers, if there are any, or else the most in a layer; None: layers have states
    alone."""
    if "msa" in cfg.attn_types:
        return min(T, cfg.index_topk_blocks * cfg.index_block_size)
    of_kind = dict(full=T, swa=min(T, cfg.window))
    return max((of_kind[kind] for kind in cfg.attn_types if kind in of_kind), default=None)

def budgets(study, cfg, scale):
    """(blocks that MSA reads, how they are chosen) of the tests at a length; one plain test without MSA."""
    fixed = cfg.index_topk_blocks
    if "msa" not in cfg.attn_types or not study.all_budgets:
        return [(fixed, "index")]
    return [(S, choice) for S in dict.fromkeys((fixed, fixed * scale)) for choice in ("index", "oracle")]

def set_choice(model, S, choice):
    """Blocks that MSA layers read, and how they are chosen."""
    model.cfg.index_topk_blocks = S
    for module in model.modules():
        if isinstance(module, MaskedMSA):
            module.choice = choice

def pick_rate(study, scores):
    """scores (R,) of models, rate by rate -> the number of the rate whose mean over seeds is best."""
    by_rate = torch.tensor(scores).view(len(study.rates), -1)
    return int(by_rate.mean(1).argmax())

def mean_accuracy(study, model, R):
    """Of each model, the mean over all tasks and hops at the length of training -> a list."""
    model = take_models(model, list(range(R)))
    found = {}
    for task in study.tasks:
        found.update(score_models(study, model, R, task, 1, CHOICE_SEED))
    return torch.tensor([accuracy for accuracy, _ in found.values()]).mean(0).tolist()

def cell_rows(study, stack, rate, scales, facts):
    """Tests of the models of one rate -> rows of the table.

    stack   the stacked models of all rates and seeds
    rate    the rate's number
    scales  lengths, in T
    facts   what all rows say beside
    """
    n = len(study.seeds)
    model = take_models(stack, list(range(rate * n, (rate + 1) * n)))
    trained_S = model.cfg.index_topk_blocks
    rows = []
    for scale, task in product(scales, study.tasks):
        T = scale * study.T
        maker = TaskMaker(study, T, torch.Generator())
        for S, choice in budgets(study, model.cfg, scale):
            set_choice(model, S, choice)
            moved = decode_bytes(model.cfg, T)
            of_length = dict(facts, scale=scale, keys=keys_read(model.cfg, T), decode_bytes=moved)
            for name, (accuracy, recall) in score_models(study, model, n, task, scale).items():
                of_task = dict(of_length, task=name, chance=maker.chance(name))
                for i, seed in enumerate(study.seeds):
                    row = dict(of_task, seed=seed, accuracy=accuracy[i], choice=None, block_recall=None)
                    if recall is not None:
                        row.update(choice=choice, block_recall=recall[i])
                    rows.append(row)
            set_choice(model, trained_S, "index")
    return rows

def cell_facts(study, replicas):
    """What rows of one kind of attention say of its training."""
    single = MiniMax(replicas.cfg)
    step_tokens = study.T * study.rows * len(study.groups)
    pos = torch.arange(study.T)
    # the head is counted at every token, as by train.py, though it computes at questions alone
    dense_flops = single.flops_per_token(pos, index_warmup=True, run_mtp=False)
    flops = single.flops_per_token(pos, run_mtp=False)
    dense_steps = replicas.dense_steps()
    return dict(
        what="quality",
        attn=replicas.attn,
        params=count_parameters(replicas.cfg),
        train_flops=step_tokens * (dense_steps * dense_flops + (study.steps - dense_steps) * flops),
        tokens_per_s=replicas.R * step_tokens / statistics.median(replicas.step_seconds))

def run_cell(study, attn, device, dtype, say=print):
    """Train and test one kind of attention -> its rows: at half of the steps and at the end, of the rate that is best
    at the end."""
    start = time.perf_counter()
    replicas = Replicas(study, attn, device, dtype)
    R = replicas.R
    half = study.steps // 2
    told = [start]

    def progress(done, losses):
        now = time.perf_counter()
        if now - told[0] < 10 and done < study.steps:
            return
        told[0] = now
        left = (now - start) / done * (study.steps - done)
        say(f"{attn:<20} | {done:,} of {study.steps:,} steps, loss {min(losses.tolist()):.3f} to "
            f"{max(losses.tolist()):.3f}, {done / (now - start):.1f} steps/s, {left:.0f} s left")

    replicas.train(half, progress)
    early = take_models(replicas.model, list(range(R)))
    replicas.train(study.steps - half, progress)
    seconds = time.perf_counter() - start

    scores = mean_accuracy(study, replicas.model, R)
    rate = pick_rate(study, scores)
    facts = dict(cell_facts(study, replicas), lr=study.rates[rate], seconds=round(seconds, 1))
    rows = cell_rows(study, replicas.model, rate, study.scales, dict(facts, steps=study.steps))
    rows += cell_rows(study, early, rate, (1,), dict(facts, steps=half))
    shown = ", ".join(f"{score:.2f}" for score in scores)
    tested = time.perf_counter() - start - seconds
    say(f"{attn:<20} | {study.steps:,} steps in {seconds:.0f} s, tests in {tested:.0f} s; mean accuracy by rate and "
        f"seed {shown}; rate {study.rates[rate]:g}")
    return rows

# ---- quality: the table ----------------------------------------------------------------------------
# One kind of attention is a cell, all of whose models train as one; on a CPU there are as many processes as cores, and
# a core for each. Finished cells are lines of a file, so that a run that ends early goes on.


CELL = b'{"key": "'                    # how a line begins


def cells_path(args, machine):
    """The file of finished cells. ValueError where none can be written: better now than after the first cell."""
    path = Path(args.cells or f"quality-{machine.device.type}.jsonl")
    if path.is_dir():
        raise ValueError(f"--cells {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"--cells {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--cells {path}: it cannot be written")
    return path

def cell_key(study, attn):
    """What a cell's rows depend on."""
    fields = dict(asdict(study), attns=(), attn=attn)
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]

def read_cells(path):
    """-> {key: rows}. A last line that was cut off is left out. ValueError for another file."""
    cells = {}
    if not path.exists():
        return cells
    for i, line in enumerate(path.read_bytes().splitlines(keepends=True)):
        is_cut = not line.endswith(b"\n")
        if is_cut and (line.startswith(CELL) or CELL.startswith(line)):
            break
        try:
            cell = json.loads(line)
            cells[cell["key"]] = cell["rows"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {i + 1} is no cell of --what quality") from None
    return cells

def append_cell(path, key, rows):
    """The line of a finished cell, behind whole lines alone."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[:text.rfind(b"\n") + 1]
    with open(path, "ab") as file:
        file.truncate(len(whole))
        file.write(json.dumps(dict(key=key, rows=rows)).encode() + b"\n")

def begin_worker():
    """A process for cells, on one core, which ends when its parent does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says what there is to say
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()

def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

def run_cell_alone(study, attn):
    """A cell in a process of its own."""
    return run_cell(study, attn, torch.device("cpu"), torch.float32, partial(print, flush=True))

def train_cells(study, cells, args, machine, path, start):
    """Train and test cells -> {key: rows}, each appended to the file as soon as it is there. Ends before a cell for
    which --minutes leaves no time.

    cells  {key: kind of attention} that are not in the file
    start  time.perf_counter() when the script began
    """
    done = {}
    pace = Pace("cells", len(cells), args.minutes, start)
    if not cells:
        return done

    def finish(key, rows, began):
        append_cell(path, key, rows)
        done[key] = rows
        pace.tell(began)

    if not machine.gpu:
        workers = min(len(cells), args.threads or len(os.sched_getaffinity(0)))
        slowest_first = sorted(cells.items(), key=lambda cell: "msa" not in cell[1])
        train_in_processes(partial(run_cell_alone, study), slowest_first, workers, pace.has_time, finish,
                           "; finished kinds are kept: the same command goes on")
        return done
    for key, attn in cells.items():
        if pace.has_time():
            began = time.perf_counter()
            rows = run_cell(study, attn, machine.device, machine.dtype, partial(print, flush=True))
            finish(key, rows, began)
    return done

class Pace:
    """How long trainings take: whether --minutes leaves time for one more, and how long the rest will last."""

    def __init__(self, name, total, minutes, start):
        """name: of a line. total: of the trainings. minutes: None for any. start: when the script began."""
        self.name = name
        self.total = total
        self.minutes = minutes
        self.start = start
        self.done = 0
        self.longest = 0.0             # seconds of a training

    def has_time(self):
        return self.minutes is None or time.perf_counter() - self.start + self.longest < 60 * self.minutes

    def tell(self, began):
        """One more is done, which began then."""
        now = time.perf_counter()
        self.longest = max(self.longest, now - began)
        self.done += 1
        spent = now - self.start
        left = spent / self.done * (self.total - self.done)
        print(f"{self.name:<7} | {self.done} of {self.total} in {spent:.0f} s, about {left:.0f} s left", flush=True)

def train_in_processes(train_one, waiting, workers, has_time, finish, kept=""):
    """On a CPU: so many trainings at once, each in a process of its own.

    train_one   what is given to it -> rows
    waiting     [(key, what is given)]; the first begins
    has_time    whether one more may begin
    finish      is called with (key, rows, when it began)
    kept        what a line says of those that are over, on Ctrl-C
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(waiting)
    running = {}
    with ProcessPoolExecutor(workers, context, begin_worker) as pool:
        try:
            while running or (waiting and has_time()):
                while waiting and len(running) < workers and has_time():
                    key, given = waiting.pop(0)
                    running[pool.submit(train_one, given)] = key, time.perf_counter()
                for future in wait_for(running, return_when=FIRST_COMPLETED).done:
                    key, began = running.pop(future)
                    finish(key, future.result(), began)
        except BrokenProcessPool:
            raise MemoryError("a process that trained was killed; fewer: --threads 1") from None
        except BaseException:          # Ctrl-C: nobody waits for what is under way
            print(f"left    | what was under way{kept}", flush=True)
            for process in list(pool._processes.values()):
                process.terminate()
            raise

def run_quality(args, machine):
    """--what quality: trains and tests what is not in the file yet, prints the table, what it says, and, when all is
    there, what a layer of each kind costs (`costs` of the result: see cost_row).

    Rows: what = "quality", attn, task, scale, seed, accuracy and chance (0 to 1), steps, keys (that a query reads in
    MSA's layers, or without them the most in a layer), choice (index, oracle; None without MSA), block_recall, lr,
    params, train_flops and tokens_per_s (of a model's training, and of all that train at once), decode_bytes (at this
    length, bf16), seconds.
    """
    start = time.perf_counter()
    study = STUDIES[machine.device.type]
    if args.attn:
        study = replace(study, attns=tuple(args.attn))
    if args.steps:
        study = replace(study, steps=args.steps)
    for attn in study.attns:
        study_config(study, attn)      # what cannot be said of these layers is refused now
    path = cells_path(args, machine)
    known = read_cells(path)

    # what is to be done
    cells = {cell_key(study, attn): attn for attn in study.attns}
    todo = {key: attn for key, attn in cells.items() if key not in known}
    quality_card(study, path, len(cells), len(todo))
    usual = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # MaskedMSA's scores: 10 bits, where bf16 has 7
    try:
        known.update(train_cells(study, todo, args, machine, path, start))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = usual
    left = [attn for key, attn in cells.items() if key not in known]

    rows = [row for key in cells for row in known.get(key, [])]
    print_quality(study, rows)
    for line in quality_sentences(rows):
        print(f"found   | {line}")
    if left:
        print(f"left    | {', '.join(left)}: the same command goes on")
    if args.figure and rows:
        draw_quality(args.figure, study, rows, machine.name)
    costs = []
    is_late = args.minutes is not None and time.perf_counter() - start > 60 * args.minutes
    if is_late and not left:
        print("left    | the costs of a layer: the same command goes on")
    elif not left:
        costs = cost_rows(machine, args.ctx)
    return dict(device=machine.name, rows=rows, left=left, costs=costs)

def quality_card(study, path, n_cells, n_todo):
    """What is compared, printed before anything runs."""
    cfg = study_config(study, study.attns[0])
    n_params = [count_parameters(study_config(study, attn)) for attn in study.attns]
    step_tokens = study.T * study.rows * len(study.groups)
    print(f"study   | {cfg.n_layer} layers of {cfg.n_embd} channels, {min(n_params):,} to {max(n_params):,} "
          f"parameters; window {cfg.window}, MSA {cfg.index_topk_blocks} blocks of {cfg.index_block_size} keys")
    print(f"train   | {study.steps:,} steps of {step_tokens:,} tokens, rows of {study.T}; rates {study.rates}, seeds "
          f"{study.seeds}; tested at {', '.join(f'{scale}x' for scale in study.scales)}")
    print(f"cells   | {n_cells - n_todo} of {n_cells} are in {path}", flush=True)

def shown_tasks(rows):
    return list(dict.fromkeys(row["task"] for row in rows))

def by_seed(rows, **wanted):
    """Accuracy, in percent, of the rows that have these values, in the order of seeds."""
    found = [row for row in rows if wanted.items() <= row.items()]
    return [100 * row["accuracy"] for row in sorted(found, key=lambda row: row["seed"])]

def print_quality(study, rows):
    """The table: a part for each length, a line for each attention and budget, all seeds of a task."""
    if not rows:
        return
    tasks = shown_tasks(rows)
    width = max(6, 4 * len(study.seeds) + 1)
    titles = "".join(f"{task:>{width}}" for task in tasks)
    head = f"{'attention':<20} {'keys':>5} {'blocks by':<9}|{titles} | recall"
    parts = list(dict.fromkeys((row["steps"], row["scale"]) for row in rows))
    for steps, scale in parts:
        of_part = [row for row in rows if (row["steps"], row["scale"]) == (steps, scale)]
        print(f"\n{scale * study.T} tokens, {scale}x those of training, after {steps:,} steps; percent right, seeds "
              f"{'/'.join(str(seed) for seed in study.seeds)}\n{head}")
        chances = {row["task"]: row["chance"] for row in of_part}
        line = "".join(f"{100 * chances[task]:>{width}.0f}" for task in tasks)
        print(f"{'chance':<36}|{line} |")
        lines = dict.fromkeys((row["attn"], row["keys"], row["choice"]) for row in of_part)
        for attn, keys, choice in lines:
            same = dict(attn=attn, keys=keys, choice=choice)
            found = {(row["task"], row["seed"]): f"{100 * row['accuracy']:.0f}"
                     for row in of_part if same.items() <= row.items()}
            cells = ["/".join(found.get((task, seed), "-") for seed in study.seeds) for task in tasks]
            line = "".join(f"{cell:>{width}}" for cell in cells)
            recalls = [row["block_recall"] for row in of_part if same.items() <= row.items() and choice]
            recall = f"{100 * statistics.mean(recalls):.0f} %" if recalls else ""
            print(f"{attn:<20} {keys if keys is not None else 'state':>5} {choice or '':<9}|{line} | {recall}")

    print(f"\n{'attention':<20} {'rate':>6} | parameters | FLOPs of a training | bytes a decoded token, "
          f"{' '.join(f'{scale}x' for scale in study.scales)} | tokens/s in training, all models")
    for attn in dict.fromkeys(row["attn"] for row in rows):
        mine = [row for row in rows if row["attn"] == attn]
        moved = [next(row["decode_bytes"] for row in mine if row["scale"] == scale) for scale in study.scales]
        row = mine[0]
        print(f"{attn:<20} {row['lr']:>6g} | {row['params']:>10,} | {row['train_flops']:>19.3e} | "
              f"{' '.join(f'{size:,}' for size in moved)} | {row['tokens_per_s']:,.0f}")

def mean_right(rows, **wanted):
    """Mean over seeds, in percent, of the rows that have these values; None where there are none."""
    found = by_seed(rows, **wanted)
    return statistics.mean(found) if found else None

def fewest_keys(rows):
    """The rows at the end of training; of MSA those with its budget of training, and its own choice of blocks."""
    last = max(row["steps"] for row in rows)
    rows = [row for row in rows if row["steps"] == last and row["choice"] != "oracle"]
    least = {}
    for row in rows:
        cell = row["attn"], row["task"], row["scale"]
        least[cell] = min(row["keys"] or 0, least.get(cell, math.inf))
    fewest = []
    for row in rows:
        if (row["keys"] or 0) == least[row["attn"], row["task"], row["scale"]]:
            fewest.append(row)
    return fewest

def quality_sentences(rows):
    """What the rows say, of the longest chain of lookups and of counting, at the shortest and the longest length."""
    if not rows:
        return []
    shown = fewest_keys(rows)
    tasks = shown_tasks(shown)
    hops = [task for task in tasks if task.startswith("vt")]
    attns = list(dict.fromkeys(row["attn"] for row in shown))
    scales = sorted({row["scale"] for row in shown})
    told = list(dict.fromkeys([*hops[1:2], *hops[-1:]]))
    if "cwe" in tasks:
        told.append("cwe")
    sentences = []
    for task, scale in product(told, (scales[0], scales[-1])):
        found = {attn: mean_right(shown, attn=attn, task=task, scale=scale) for attn in attns}
        found = {attn: right for attn, right in found.items() if right is not None}
        ranked = sorted(found, key=found.get, reverse=True)
        chance = next(row["chance"] for row in shown if (row["task"], row["scale"]) == (task, scale))
        sentences.append(f"{task} at {scale}x: " + ", ".join(f"{attn} {found[attn]:.0f}" for attn in ranked)
                         + f"; chance {100 * chance:.0f} (means over seeds)")

    # where MSA counts worse than full attention: is it the choice, the budget, or the model?
    for attn in attns:
        of_attn = [row for row in rows if row["attn"] == attn and row["choice"] and row["task"] == "cwe"]
        if not of_attn:
            continue
        last = max(row["steps"] for row in of_attn)
        of_attn = [row for row in of_attn if (row["scale"], row["steps"]) == (scales[-1], last)]
        parts = []
        for keys, choice in dict.fromkeys((row["keys"], row["choice"]) for row in of_attn):
            right = mean_right(of_attn, keys=keys, choice=choice)
            parts.append(f"{keys} keys by {choice} {right:.0f}")
        sentences.append(f"cwe at {scales[-1]}x, {attn}: " + ", ".join(parts))
    return sentences

def draw_quality(path, study, rows, title):
    """Accuracy against length: a chart for a task, a line for an attention, its seeds as points."""
    from matplotlib.figure import Figure
    shown = fewest_keys(rows)
    tasks = shown_tasks(shown)
    hops = [task for task in tasks if task.startswith("vt")]
    charted = [task for task in ("mkey", *hops[1:2], *hops[-1:], "cwe") if task in tasks]
    figure = Figure((4 * len(charted) + 2, 4.2), layout="constrained")
    axes = figure.subplots(1, len(charted), squeeze=False)[0]
    names = dict(mkey="several needles", cwe="common words")
    for axis, task in zip(axes, charted):
        of_task = [row for row in shown if row["task"] == task]
        scales = sorted({row["scale"] for row in of_task})
        for i, attn in enumerate(dict.fromkeys(row["attn"] for row in of_task)):
            points = [[row["accuracy"] for row in of_task if (row["attn"], row["scale"]) == (attn, scale)]
                      for scale in scales]
            means = [100 * statistics.mean(seeds) for seeds in points]
            line, = axis.plot(scales, means, "-o", ms=4, color=f"C{i}", label=attn)
            for scale, seeds in zip(scales, points):
                percent = [100 * x for x in seeds]
                axis.plot([scale] * len(seeds), percent, ".", ms=3, alpha=0.5, color=line.get_color())
        chances = [next(100 * row["chance"] for row in of_task if row["scale"] == scale) for scale in scales]
        axis.plot(scales, chances, ":", color="black", label="chance")
        name = names.get(task, f"{task[2:]} lookups in a row")
        axis.set(title=name, xlabel=f"length, times {study.T} tokens", ylim=(-3, 103))
        axis.set_xscale("log", base=2)
        axis.set_xticks(scales, [f"{scale}x" for scale in scales])
    axes[0].set_ylabel("percent right; mean of seeds, seeds as dots")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Trained on {study.T} tokens, tested on more; {title}", fontsize=10)
    figure.savefig(path, format=figure_format(path), dpi=110)

# ---- quality: what each attention costs ----------------------------------------------------------
# One layer of M3's shape in training, forward and backward by themselves: full attention, MSA, windows of as many keys
# as MSA reads and of few, and Lightning, which has as many KV heads as query heads. Each runs the best code that we
# know of for it: cuDNN, our MSA, FlexAttention over a band of tiles, our kernels of Lightning. Two times stand beside
# what was measured: what the useful FLOPs need at the matrix rate, and what the bytes need at the copy rate, each
# tensor read or written once a pass. The longer one is the limit. Lightning's kernels compute in chunks, which takes
# more FLOPs and bytes than the recurrence.

@dataclass
class Side:
    """An attention to be timed in training."""
    attn: str                          # full, msa, swa or lightning
    window: int                        # keys that a query reads, or None
    impl: str                          # which code runs
    forward: object                    # function -> outputs
    inputs: tuple                      # tensors whose gradients are asked for
    upstream: tuple                    # gradients of the outputs

    @property
    def name(self):
        return self.attn if self.window is None else f"{self.attn} {self.window:,}"

    def backward(self, outs):
        """-> gradients of the inputs; the outputs' graph is gone after it."""
        return torch.autograd.grad(outs, self.inputs, self.upstream)

def count_window(T, window):
    """Pairs of one of T queries and a key among the last `window` ones."""
    short = min(T, window)             # queries that see fewer keys, or just as many
    return count_pairs(short, short) + (T - short) * window

def cost_flops(attn, T, heads, window=None):
    """Useful FLOPs of an attention on T tokens, forward and backward.

    heads   query heads, KV heads, S and L
    Softmax attention: 4 D for a query and a key that it sees, q k and p v, and twice as much for their gradients. MSA:
    see train_flops. Lightning: 4 D^2 for a token and a head, k^T v to the state and q times it, and twice as much back.
    """
    H, Hkv, S, L = heads
    if attn == "lightning":
        return 12 * H * D ** 2 * T
    if attn == "swa":
        return 12 * H * D * count_window(T, window)
    return train_flops(T, H, Hkv, S, L)["dense" if attn == "full" else "msa"]

def cost_bytes(attn, T, heads, size):
    """Least bytes of the same: forward reads q, k and v and writes y; backward reads them and dy, and y where there is
    a softmax, and writes dq, dk and dv. MSA also has the index branch's tensors, and the choice.

    size    bytes of an element
    """
    H, Hkv, S, _ = heads
    query = T * H * D * size           # bytes of q, y or a gradient of them
    key = T * Hkv * D * size
    if attn == "lightning":
        return 4 * query + 7 * query
    softmax = 2 * (query + key) + 4 * (query + key)
    if attn != "msa":
        return softmax
    index = key + T * D * size         # qi and ki: read in both passes, and their gradients written
    choice = T * Hkv * S * 4           # written, and read in both passes
    return softmax + 3 * index + 3 * choice

def chunk_flops(T, H):
    """FLOPs that Lightning's kernels compute. For a token, each of four walks (y, dq, dk, dv) has its products with the
    keys of a chunk, for every tile of channels anew, of these weights with the values, and those of the recurrence; two
    more walks add up states."""
    rows = LIGHTNING_TILE["ROWS"]
    cols = LIGHTNING_TILE["COLS"]
    walk = 2 * rows * D * (D // cols) + 2 * rows * D + 4 * D ** 2
    return (4 * walk + 2 * 2 * D ** 2) * H * T

def chunk_bytes(T, H, size):
    """Bytes that these walks move: three tensors read and one written, for states two read."""
    return (4 * (3 + 1) + 2 * 2) * T * H * D * size

def cost_sides(machine, T):
    """The attentions to be compared, on T random tokens -> [Side, ...]."""
    H, Hkv, S, L = train_sizes(machine.gpu, "m3")
    dense_impl, msa_impl = pick_impl(machine.gpu, "train", T)
    tensors = *random_queries(machine, (H, Hkv), 1, T), *random_cache(machine, (H, Hkv), 1, T)
    q, qi, k, v, ki = (x.requires_grad_() for x in tensors)
    k_full, v_full = (fill(machine, 1, T, H, D).requires_grad_() for _ in range(2))
    dy = fill(machine, 1, T, H, D)
    decay = lightning_decay(machine, H)
    kl_grad = torch.tensor(1 / T, device=machine.device)  # the KL is a sum over the tokens

    def sparse():
        block_idx = msa.select_blocks(qi.detach(), ki.detach(), S, L, impl=msa_impl)
        return msa.msa_train(q, k, v, qi, ki, block_idx, L, impl=msa_impl)

    def windowed(window):
        return lambda: (window_attention(q, k, v, window),)

    def dense():
        return sdpa(q, k, v, dense_impl),

    def linear():
        y, _ = lightning_attention(q, k_full, v_full, decay)
        return y,

    dense_name, msa_name = impl_names(machine.gpu, "train", T)
    flex, kernels = "torch", "torch"
    if machine.gpu and T >= SHORT_ROW:
        flex, kernels = "FlexAttention", "Triton"
    main = q, k, v
    return [
        Side("full", None, dense_name, dense, main, (dy,)),
        Side("msa", None, msa_name, sparse, (*main, qi, ki), (dy, kl_grad)),
        Side("swa", S * L, flex, windowed(S * L), main, (dy,)),
        Side("swa", L, flex, windowed(L), main, (dy,)),
        Side("lightning", None, kernels, linear, (q, k_full, v_full), (dy,))]

def lightning_decay(machine, H):
    """Of the first layer, see model.Lightning: (H,)."""
    return 2.0 ** (-8 * torch.arange(1, H + 1, device=machine.device) / H)

def check_side(machine, side, outs, grads):
    """A window's or Lightning's output and gradients, on a part of the tensors that stands alone, against the same by
    torch in fp64. Of Lightning that are the heads that forget fastest and slowest; of a window the last KV head, and
    the last two windows of tokens, of which the second depends on no others."""
    if side.attn == "lightning":
        part = slice(None), slice(None), [0, -1]
        parts = part, part, part
        checked = slice(None)
        decay = lightning_decay(machine, side.inputs[0].size(2))
        attend = partial(lightning_attention, decay=decay[[0, -1]])
    else:
        q, k, _ = side.inputs
        tokens = slice(-2 * side.window, None)
        group = slice(-q.size(2) // k.size(2), None)
        key_part = slice(None), tokens, slice(-1, None)
        parts = (slice(None), tokens, group), key_part, key_part
        checked = slice(-side.window, None)
        attend = partial(window_attention, window=side.window)

    inputs = [x.detach()[part].double().requires_grad_() for x, part in zip(side.inputs, parts)]
    y = attend(*inputs, impl="torch")
    if side.attn == "lightning":
        y, _ = y
    dy = side.upstream[0][parts[0]].double()
    exact = torch.autograd.grad(y, inputs, dy)
    compared = [("output", outs[0].detach(), parts[0], y.detach())]
    compared += zip(("dq", "dk", "dv"), grads, parts, exact)
    for what, got, part, want in compared:
        near(f"cost, {side.name}: {what} against torch in fp64", got[part][:, checked], want[:, checked])

def check_sides(machine, sides):
    """Before anything is timed, what is: no number but finite ones, windows and Lightning against torch. Compiles."""
    for side in sides:
        outs = side.forward()
        grads = side.backward(outs)
        for x in (*outs, *grads):
            check_finite(f"cost, {side.name}: an output or a gradient", x.detach())
        if side.attn in ("swa", "lightning"):
            check_side(machine, side, outs, grads)

def time_sides(sides, gpu, reps=5):
    """Forward and backward of each side in turn -> {name: (ms of each forward, ms of each backward)}."""
    wait = 2 * 10 ** 7                 # 10 ms, as the host launches many small kernels
    times = {side.name: ([], []) for side in sides}
    for rep in range(reps):
        for side in sides:
            forward_ms, outs = timed(side.forward, gpu, True, wait)
            backward_ms, grads = timed(partial(side.backward, outs), gpu, True, wait)
            times[side.name][0].append(forward_ms)
            times[side.name][1].append(backward_ms)
            del outs, grads
    return times

def roofline(flops, moved, taken_ms, rates):
    """What so many FLOPs and bytes need at the measured rates, which of the two binds, and what was reached of each."""
    found = dict(flops=flops, bytes=moved)
    found["least_ms_flops"] = 1e3 * flops / rates["matmul"]
    found["least_ms_bytes"] = 1e3 * moved / rates["copy"]
    found["limit"] = "compute" if found["least_ms_flops"] > found["least_ms_bytes"] else "memory"
    found["matmul_util"] = found["least_ms_flops"] / taken_ms
    found["copy_util"] = found["least_ms_bytes"] / taken_ms
    return found

def print_cost(name, times, found):
    """A line of the table: a name, the times as text, what roofline() found."""
    amounts = f"{found['flops'] / 1e12:9.3f}{found['bytes'] / 1e9:8.2f}"
    least = f"{found['least_ms_flops']:9.3f}{found['least_ms_bytes']:8.3f}"
    reached = f"{found['matmul_util']:7.1%}{found['copy_util']:7.1%}"
    print(f"{name:11}|{times:24}|{amounts} |{least} | {found['limit']:8}|{reached}", flush=True)

def cost_row(machine, side, T, forward_ms, backward_ms):
    """A row from one side's times, printed at once."""
    heads = train_sizes(machine.gpu, "m3")
    H, Hkv, _, _ = heads
    if side.attn == "lightning":
        Hkv = H
    row = dict(
        what="quality-cost", attn=side.attn, window=side.window, impl=side.impl,
        ctx=T, heads=[H, Hkv],
        forward_ms=forward_ms, backward_ms=backward_ms)
    flops = cost_flops(side.attn, T, heads, side.window)
    moved = cost_bytes(side.attn, T, heads, machine.size)
    row.update(roofline(flops, moved, forward_ms + backward_ms, machine.rates))
    print_cost(side.name, f"{forward_ms:11.3f}{backward_ms:12.3f}", row)

    # what its kernels do, beside what the recurrence needs
    if side.attn == "lightning" and side.impl == "Triton":
        flops = chunk_flops(T, H)
        moved = chunk_bytes(T, H, machine.size)
        row["chunks"] = roofline(flops, moved, forward_ms + backward_ms, machine.rates)
        print_cost("  in chunks", "", row["chunks"])
    return row

def cost_sentence(rows):
    """Whether linear attention is memory-bound in training, from the rows."""
    row = next(row for row in rows if row["attn"] == "lightning")
    full = next(row for row in rows if row["attn"] == "full")
    taken = row["forward_ms"] + row["backward_ms"]
    full_taken = full["forward_ms"] + full["backward_ms"]

    answer = "is" if row["limit"] == "memory" else "is not"
    said = [f"Linear attention {answer} memory-bound in training, at {row['ctx']:,} tokens: its bytes need "
            f"{plain(row['least_ms_bytes'])} ms, its FLOPs {plain(row['least_ms_flops'])} ms."]
    done = row.get("chunks", row)      # what is really moved and multiplied, where that is known
    if "chunks" in row:
        said.append(f"Computed in chunks it moves and multiplies more: {plain(done['least_ms_bytes'])} and "
                    f"{plain(done['least_ms_flops'])} ms.")
    nearer = "copy" if done["copy_util"] > done["matmul_util"] else "matrix"
    shares = f"{done['copy_util']:.0%} of the copy rate and {done['matmul_util']:.0%} of the matrix rate"
    said.append(f"Measured are {plain(taken)} ms, {shares}: nearer to the {nearer} rate.")
    said.append(f"Full attention is bound by {full['limit']} and takes {full_taken / taken:.1f} times as long.")
    return " ".join(said)

def cost_rows(machine, T):
    """What each attention costs in training on T tokens, on a CPU 1,024 at most and M3's heads divided by 4: checked,
    timed and printed -> rows."""
    if not machine.rates:
        measure_rates(machine)
    if not machine.gpu:
        T = min(T, 1024)
    if machine.gpu:
        torch.compiler.reset()         # or FlexAttention, compiled before, is compiled for any length, and is slower
    train_gate(machine, "m3")
    sides = cost_sides(machine, T)
    check_sides(machine, sides)
    print(f"\none layer in training, {T:,} tokens: forward and backward; util of useful FLOPs and least bytes\n"
          "attention  | forward ms backward ms |   TFLOP      GB | least: FLOPs,  bytes | limit   | matmul   copy",
          flush=True)
    times = time_sides(sides, machine.gpu)
    rows = []
    for side in sides:
        forward_ms, backward_ms = map(statistics.median, times[side.name])
        rows.append(cost_row(machine, side, T, forward_ms, backward_ms))
    print(f"found   | {cost_sentence(rows)}", flush=True)
    return rows

# ---- what the rows say ---------------------------------------------------------------------------
# Everything here is computed from the rows alone, nothing is measured: ratios at the longest length, also of M2's dense
# side over M3's MSA as MiniMax published it; the length from which on MSA wins; a sentence for each kind of rows; the
# figure. A row without a ratio (a GPU's dense decode that reads too slowly) is neither won nor lost.

def kinds_of(rows):
    """Rows at batch 1 and random selection, which are in rising order -> {(what, shape, index): [row, ...]}."""
    kinds = {}
    for row in rows:
        if (row["batch"], row["selection"]) == (1, "random"):
            kinds.setdefault((row["what"], row["shape"], row["index"]), []).append(row)
    return kinds

def ratios(rows):
    """Dense over MSA at the longest length measured, with the same batch, selection and index keys."""
    longest = {}
    for row in rows:  # one shape may have memory for longer ones
        key = row["what"], row["batch"]
        longest[key] = max(row["ctx"], longest.get(key, 0))
    out = []
    for dense, sparse in product(rows, rows):
        same = {key: dense[key] for key in ("what", "ctx", "batch", "selection", "index")}
        pair = dense["shape"], sparse["shape"]
        if not same.items() <= sparse.items() or not dense["speedup"] or pair == ("m3", "m2"):
            continue
        if dense["ctx"] < longest[dense["what"], dense["batch"]]:
            continue
        published = PUBLISHED.get((dense["what"], *pair)) if dense["batch"] == 1 else None
        found = dict(same, dense=dense["shape"], msa=sparse["shape"], ratio=dense["dense_ms"] / sparse["msa_ms"],
                     published=published, dense_util=dense["dense_util"])
        out.append(found)

        notes = [f"dense util {dense['dense_util']:.0%}"]
        if dense["index"] == "int8":
            notes.append("the kernels' time alone")
        if published:
            notes.append(f"published, at 1M: {published}")
        print(f"ratio   | {dense['what']} batch {dense['batch']}, {dense['ctx']:,} tokens, {dense['shape']} dense over "
              f"{sparse['shape']} MSA, {dense['selection']}, {dense['index']} index: {found['ratio']:.2f}x "
              f"({'; '.join(notes)})")
    return out

def crossovers(rows):
    """Smallest length from which on MSA won, of those with a ratio, at batch 1 and random selection; None: it lost the
    longest, or no length has a ratio. -> {kind: length}"""
    out = {}
    for key, kind in kinds_of(rows).items():
        name = " ".join(key)
        fair = [row for row in kind if row["speedup"]]
        won = []                       # at the end of `fair`
        for row in fair:
            won = won + [row] if row["speedup"] > 1 else []
        out[name] = won[0]["ctx"] if won else None
        line = f"MSA won from {out[name]:,} tokens on" if won else "MSA won at no measured length"
        if not fair:
            line = "no length has a ratio"
        elif len(fair) < len(kind):
            line += f", of {', '.join(short(row['ctx']) for row in fair)}; the other lengths have no ratio"
        print(f"crossover | {name}: {line}")
    return out

def plain(ms):
    """Milliseconds with three digits that count, and never as a power of ten."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}"

def short(T):
    """A length as an axis says it: 300, 16K (16,384), 1M (a million, or 1,048,576)."""
    units = {2 ** 20: "M", 10 ** 6: "M", 2 ** 10: "K"}
    for size, unit in units.items():
        if T % size == 0:
            return f"{T // size}{unit}"
    return f"{T:,}"

def conclusion(rows):
    """What the rows say, in plain words: a sentence a kind, at batch 1, random selection and index keys as they are."""
    return [sentence(kind) for (_, _, index), kind in kinds_of(rows).items() if index != "int8"]

def conclude(args, machine, rows):
    """Print what the rows say, draw them -> the script's result."""
    crossover = crossovers(rows)
    for line in conclusion(rows):
        print(f"found   | {line}")
    if args.figure:
        draw(args.figure, rows, machine.name)
    return dict(device=machine.name, rows=rows, rates=machine.rates, crossover=crossover)

def what_was_timed(row):
    if row["what"] == "train":  # on a CPU not M3's shape, but a quarter
        H, Hkv = row["heads"]
        return f"forward and backward of attention, {H} query heads and {Hkv} KV heads"
    what = "a decode step"
    if row["what"] == "prefill":
        what = "a prefill" if row["queries"] == row["ctx"] else f"a prefill's last {row['queries']} queries"
    return f"{what} of {row['shape'].upper()}'s shape"

def sentence(kind):
    """Rows of one kind, in rising order -> what the longest says, and the longest at which full attention is faster."""
    last = kind[-1]
    sides = [(last["dense_ms"], "full attention"), (last["msa_ms"], "MSA")]
    (fast_ms, fast), (slow_ms, slow) = sorted(sides)
    line = (f"At {last['ctx']:,} tokens, for {what_was_timed(last)}, {fast} needs {plain(fast_ms)} ms "
            f"where {slow} needs {plain(slow_ms)}: ")
    if not last["speedup"]:
        return line + "no ratio, as full attention reads too slowly to be a baseline."
    line += f"{slow_ms / fast_ms:.1f} times less"
    if fast == "full attention":
        return line + "."
    lost = [row["ctx"] for row in kind if row["dense_ms"] < row["msa_ms"]]
    if lost:
        return line + f"; at {lost[-1]:,} tokens full attention is still faster."
    fair = [row["ctx"] for row in kind if row["speedup"]]
    every = "measured" if len(fair) == len(kind) else "that has a ratio"
    return line + f"; MSA is faster at every length {every}, from {fair[0]:,} tokens on."

def draw(path, rows, title):
    """Time against length, log-log: a chart for prefill, one for decode, or one for train."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    whats = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure((7 * len(whats), 5), layout="constrained")
    for axis, what in zip(figure.subplots(1, len(whats), squeeze=False)[0], whats):
        axis.set(title=f"{what}, one layer, {title}", xlabel="tokens of context", ylabel="ms", yscale="log")
        axis.set_xscale("log", base=2)
        charted = [row for row in rows if row["what"] == what]
        for (_, shape, index), kind in kinds_of(charted).items():
            points = [row["ctx"] for row in kind]
            if index != "int8":        # its dense side is that of bf16
                axis.plot(points, [row["dense_ms"] for row in kind], "o--", ms=3, label=f"{shape} dense")
            axis.plot(points, [row["msa_ms"] for row in kind], "o-", ms=3, label=f"{shape} msa, {index} index")

        # lengths as people say them, and times as plain numbers: no powers of 2 or 10
        lengths = sorted({row["ctx"] for row in charted})
        axis.set_xticks(lengths, [short(T) for T in lengths])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.10g}")
        axis.yaxis.set_minor_formatter("")
        axis.legend()
    figure.savefig(path, format=figure_format(path))

# ---- the script ----------------------------------------------------------------------------------
# The card comes first, after a CPU's number of threads: device, versions, what runs on each side, measured rates, and
# what a roofline predicts. Then the gate, then the rows, each printed as soon as it is measured, then what they say.
# The last line is the result in JSON. What is wrong with the flags is said before anything runs.

def parse_args(argv):
    p = Parser(__doc__)
    p.add_argument("--ctx", type=tokens,
                   help="longest context, in tokens: 65536, 1e6, 64k (k = 1,024) or 1M (M = 1,048,576); default: "
                   "1,000,000; of --what generate 512k, on a CPU 64k; of the costs of --what quality 32k, on a CPU "
                   "1k at most")
    p.add_argument("--what", choices=("prefill", "decode", "train", "tree", "queue", "generate", "quality", "thoughts",
                                       "all"),
                   default="all",
                   help="what to time; tree: rl.py's training step; queue: its schedules; generate: a whole model's "
                   "tokens/s; quality: what each kind of attention learns; thoughts: agents' thoughts kept or dropped; "
                   "all: prefill and decode")
    p.add_argument("--out", metavar="DIR", help="--what generate: folder of a checkpoint; default: a preset with "
                   "random weights, tiny or on a GPU small")
    p.add_argument("--shape", choices=SHAPES, help="default: both")
    p.add_argument("--attn", action="append", metavar="KIND", help="--what quality: a kind of attention or a pattern, "
                   "as train.py's --attn, but msa is in every layer; or msa-converted, which is full at first; may be "
                   "given again; default: five kinds, on a GPU ten")
    p.add_argument("--steps", type=number(10), help="--what quality: of each model; default: 2500, on a GPU 10000; "
                   f"--what thoughts: of each training on rewards; default: {TRIAL_STEPS}")
    p.add_argument("--minutes", type=number(0, math.inf, float), help="--what quality, thoughts: after these "
                   "begins no further training, nor one that would last longer; quality goes on by the same command")
    p.add_argument("--cells", metavar="FILE", help="--what quality: keeps the kinds that are finished; the same "
                   "command goes on from it; default: quality-DEVICE.jsonl")
    p.add_argument("--figure", metavar="FILE", help="draw time against length, queue's curves, or quality against "
                   "length; needs matplotlib")
    args = p.parse_args(argv)
    args.shapes = [args.shape] if args.shape else list(SHAPES)
    args.whats = ("prefill", "decode") if args.what == "all" else (args.what,)
    if World.from_env().size > 1 and (args.what != "prefill" or args.figure):
        raise ValueError("under torchrun bench.py takes --what prefill alone, and draws no figure")
    if args.ctx is None and args.what == "quality":
        args.ctx = COST_CONTEXT
    if args.ctx is None and args.what != "generate":
        args.ctx = 1_000_000
    if args.ctx is not None and not 1 <= args.ctx <= 2 ** 25:
        raise ValueError(f"--ctx {args.ctx}: it must be 1 to {2 ** 25:,}")
    if args.what == "tree" and (args.shape or args.figure):
        raise ValueError("--what tree trains rl.py's own model and has no chart: leave out --shape and --figure")
    if args.what == "generate" and (args.shape or args.figure):
        raise ValueError("--what generate decodes a whole model and has no chart: leave out --shape and --figure")
    if args.out and args.what != "generate":
        raise ValueError(f"--out {args.out}: --what generate alone reads a checkpoint")
    attn = " ".join(args.attn) if args.attn else None
    of_quality = dict(attn=attn, cells=args.cells)
    if args.what != "thoughts":
        of_quality |= dict(steps=args.steps, minutes=args.minutes)
    for name, value in of_quality.items():
        if value is not None and args.what != "quality":
            raise ValueError(f"--{name} {value}: --what quality alone")
    if args.what == "thoughts" and (args.shape or args.figure):
        raise ValueError("--what thoughts trains rl.py's own model and has no chart: leave out --shape and --figure")
    if args.what == "quality" and args.ctx < LEAST_COST:
        raise ValueError(f"--ctx {args.ctx}: layers of {LEAST_COST} tokens or more are timed")
    if args.what == "quality" and args.shape:
        raise ValueError("--what quality trains models of its own: leave out --shape")
    if args.what == "queue" and args.shape:
        raise ValueError("--what queue trains rl.py's own model: leave out --shape")
    if args.figure:
        check_figure(args.figure)
    return args

def trial(machine):
    """-> a function that does what a CPU is timed on, both sides of a short prefill."""
    t, T = 32, 16 * L
    q, qi = random_queries(machine, SHAPES["m3"], 1, t)
    k, v, ki = random_cache(machine, SHAPES["m3"], 1, T)

    def step():
        full(q, k, v, T)
        sparse_prefill(q, k, v, qi, ki, T)
    return step

def set_device(args, world):
    """-> the machine, its CPU threads chosen; why this dtype."""
    device, dtype, why = pick_device(args.device, world)
    world.join(device)
    machine = Machine(device, dtype)
    torch.manual_seed(SEED)
    if device.type != "cpu" and dtype != torch.bfloat16:
        raise ValueError(f"--device {device}: a CPU, or a CUDA GPU with bf16 tensor cores")
    if machine.gpu:
        torch.cuda.set_device(device.index or 0)
        machine.name = torch.cuda.get_device_name()
        return machine, why
    # rl.py and torchrun choose for themselves; these have a process a core
    if args.what not in ("queue", "quality", "thoughts") and world.size == 1:
        threads = Threads(device, args.threads)
        if threads.count is None:
            threads.choose(trial(machine))
        print(f"threads | {threads}")
    machine.name = f"CPU, {torch.get_num_threads()} threads"
    return machine, why

def card(args, machine, why):
    """Where and when, printed before anything runs."""
    power = ""
    if machine.gpu:
        number = machine.device.index or 0
        query = f"nvidia-smi -i {number} --query-gpu=power.limit,driver_version --format=csv,noheader"
        power = f", power limit and driver {subprocess.getoutput(query + ' 2> /dev/null') or 'unknown'}"
    print(f"run     | {time.strftime('%Y-%m-%d %H:%M')}, torch {torch.__version__}")
    print(f"device  | {machine.name}{power}, {str(machine.dtype)[6:]}: {why}")
    if args.what not in ("queue", "quality", "thoughts"):
        print(f"context | up to {args.ctx:,} tokens")

def layer_card(args, machine):
    """What is compared in one layer, and the rates, measured here."""
    for what in args.whats:
        dense_impl, msa_impl = impl_names(machine.gpu, what, args.ctx)
        print(f"sides   | {what}: full attention = {dense_impl}; MSA = {msa_impl}")
    now = measure_rates(machine)
    print(f"rates   | measured: copy {now['copy']:.3e} bytes/s, matmul {now['matmul']:.3e} FLOP/s")
    print(f"shape   | one layer; query heads, KV = index heads: {SHAPES}; D = {D}, S = {S} blocks of L = {L} keys")

@torch.no_grad()
def run_attention(args, machine):
    """--what prefill, decode, all: the gate, the rows of every shape, and what they say."""
    layer_card(args, machine)
    for shape, what in product(args.shapes, args.whats):
        t, _ = timed_sizes(machine, what, args.ctx)
        stages = work(shape, args.ctx, t, 1, machine.size, machine.size)
        dense, sparse = (least_ms(stages[side], machine.rates) for side in ("dense", "msa"))
        print(f"predict | roofline of {what} {shape} at {args.ctx:,}: dense {dense:,.3f} ms, MSA {sparse:,.3f} ms, "
              f"{dense / sparse:.2f}x", flush=True)

    # the lengths that memory has room for, and the gate of what will be timed
    batches = (1, 8) if machine.gpu else (1,)
    plans = {}
    for shape, B, what in product(args.shapes, batches, ("prefill", "decode")):
        plans[shape, B, what] = lengths_that_fit(args, machine, shape, what, B)
    gated = [(shape, what) for (shape, B, what), lengths in plans.items() if B == 1 and lengths]
    if not gated:
        raise MemoryError("no length fits")
    for shape, what in gated:
        gate(machine, shape, what)
    print(f"gate    | passed by {', '.join(args.shapes)}: choice against torch, output against brute force in fp32, "
          f"relative RMS at most {TOLERANCE[machine.dtype]:.0e}")

    # rows, the rates measured again between them, and what they say
    print_head(machine, args.whats)
    rows = []
    for shape, B in product(args.shapes, batches):
        rows += cache_rows(args, machine, shape, B, plans[shape, B, "prefill"], plans[shape, B, "decode"])
        now = measure_rates(machine)  # its buffers are free again
    print(f"rates   | at the end: copy {now['copy']:.3e} bytes/s, matmul {now['matmul']:.3e} FLOP/s; the largest "
          f"measured are copy {machine.rates['copy']:.3e}, matmul {machine.rates['matmul']:.3e}")
    found = ratios(rows)
    return dict(conclude(args, machine, rows), ratios=found)

def run(args):
    world = World.from_env()
    machine, why = set_device(args, world)
    if args.ctx is None:
        args.ctx = LONG_CONTEXT[machine.device.type]
    if args.what == "tree":
        tree_turns(machine.gpu, args.ctx)  # what is wrong with --ctx shows now, not below the card
    card(args, machine, why)
    if args.what == "tree":
        return run_tree(args, machine)
    if args.what == "queue":
        return run_queue(args, machine)
    if args.what == "train":
        return run_train(args, machine)
    if args.what == "generate":
        return run_generate(args, machine)
    if args.what == "quality":
        return run_quality(args, machine)
    if args.what == "thoughts":
        return run_thoughts(args, machine)
    if world.size > 1:
        return run_ranks(args, machine, world)
    return run_attention(args, machine)

def main(argv=None):
    return command("bench.py", lambda locks: run(parse_args(argv)))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_ctrl_c)
    main()
