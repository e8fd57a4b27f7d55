"""Train M2/M3 on any text: one process, one device, one loop.

    python train.py                              # tiny on the interpreter's standard library: CPU, minutes, no download
    python train.py --data notes/ --minutes 10     # any text file or folder; --resume goes on from out/ckpt.pt
    python train.py --resume --attn msa --steps 800  # a run with --attn full goes on with sparse attention
    python train.py --attn lightning:full=2:1        # two Lightning layers, then one with full attention, and so on
    python train.py --resume --mtp 3 --steps 800     # two more MTP modules join: copies, which learn alone at first
    python train.py --resume --figure run.svg        # draws out/log.jsonl, where each printed line is one of JSON
    python train.py --preset tiny-m2                 # M2's pattern, full attention and experts in every layer
    python train.py --preset m2 --dry-run          # parameters and bytes, nothing is allocated
    torchrun --nproc-per-node 2 train.py           # a GPU each, or CPUs: FSDP2; --parallel ep=2 shares experts out
    python train.py --preset m2 --dry-run --gpus 512  # and what a step on 512 GPUs would take, by a model of it

    batch  = f(seed, split, step): evaluation cannot disturb training, and a resumed run sees what it would have seen
    loss   = next token + mtp_weight * MTP, in every mtp_every-th step, + the KL of each index branch
    step   : Muon on matrices (orthogonalised momentum), AdamW on the rest; the index branch's gradient clipped apart
    rate   : warm-up, constant, linear decay to 0 (WSD), a function of progress = max(step / steps, seconds / budget)
    rows   : short at first, longer later (M2: 8K, 32K, 192K tokens), the same number of tokens a step
    MSA    : full attention for the first msa_from of the run, while the index branch learns, then sparse (paper 3.4)
    ranks  : what a step computes does not depend on how many there are; each takes its rows, or its tokens of each row

Differs from M2/M3: neither report publishes optimizer, rates, or how long the rate and the index branch warm up; all
are measured choices.
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: no traceback
    at_ctrl_c = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import sys
import sysconfig
import time
import typing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from model import (LIGHTNING_CHUNK, SHORT_ROW, ContextShard, MiniMax, MiniMaxConfig, attn_pattern, cache_bytes,
                   count_params, decode_bytes)
from moe import MoE, max_violation
from msa import cdiv, chunk, round_up
from sample import (ICONV, LEARN_FROM, LOCK, PATTERN, Parser, Progress, SaveTimer, Threads, Tokenizer, World,
                    cache_path, check_fields, check_figure, check_finite, check_memory, checkpoint_path, command,
                    figure_format, free_memory, guess_kind, implementations, learn_bpe, load_checkpoint, load_model,
                    load_optimizers, lock_folder, new_temporary, number, on_signals, pick_device, place_checkpoint,
                    read_cache, run_of, saved_flags, write_cache, write_checkpoint)

ENCODED = 500_000                      # characters of a text that one thread encodes at a time
READERS = 16                           # threads that read files: a cold disk or a network answers many at once
HEAD = 2 ** 20                         # bytes of a file that tell what it is, if it is no text
VAL_BYTES = 512 * 1024                 # val_bpb is measured on this much of the validation text
FEW_BYTES = 32 * 1024                  # of validation: some 10,000 tokens, whose mean loss is uncertain by 2 %
EVAL_SHARE = 0.25                      # of --minutes: the last evaluation takes no longer
APART = 1.1                            # validation that rises so far over its usual share of training is remarked upon
USUAL = 1.3                            # that share, in bits a byte, at most: other files differ, the first by 20 %
WINDOWS_A_ROW = 8                      # of --window in --seq-len, where it is not given
MLA_LATENT, MLA_ROPE = 512, 64         # elements a token that DeepSeek-V3 caches (arXiv 2412.19437)
MTP_WEIGHT = (0.3, 0.1)                # before and in the decay phase (M2 report)
MTP_ALONE = 0.1                        # share of what is left of a run that modules which join learn without the trunk:
                                       # the M2 report names none; tiny's losses had settled after 20 of 200 steps
WARMUP, DECAY = 0.02, 0.6              # shares of the run
PRESETS = ["tiny", "tiny-m2", "mini", "small", "m2", "m3"]
# mtp_every: steps between MTP losses; msa_from: share of the run under full attention; stages: share -> cuts of a row
RUNS = {
    "tiny": dict(seq_len=256, batch_size=4, lr=1.2e-2, minutes=2.5, mtp_every=8, msa_from=0.5,
                 stages=((0.0, 8), (0.2, 4), (0.45, 2), (0.75, 1))),
    "mini": dict(seq_len=512, batch_size=8, lr=8e-3, minutes=60.0, mtp_every=8, msa_from=0.3,
                 stages=((0.0, 8), (0.2, 4), (0.45, 2), (0.75, 1))),
    "small": dict(seq_len=8192, batch_size=16, lr=4e-3, minutes=10.0, mtp_every=4, msa_from=0.05, stages=((0, 1),))}
RUNS["tiny-m2"] = RUNS["tiny"]
# flags that each start decides anew: a checkpoint of train.py or rl.py does not hand them on
RUN_ALONE = ("out", "resume", "device", "parallel", "stop_after", "dry_run", "figure", "token", "play", "own_task",
             "runs", "keep", "table", "live", "gpus")
SPIKE = 1.0                            # nats over its running mean by which a loss is a spike,
SPIKE_SPREADS = 4                      # and as many times its usual distance from it
SPIKE_STEPS = 5                        # spikes in a row that end a run
WORSE = 1.5                            # val_bpb over the lowest so far at which a run has diverged
EVAL_ROWS = 16                         # windows of an evaluation at a time
EMBED_SCALE = 12.0                     # the embedding's rate over the schedule's: measured
MUON_RMS = 0.2                         # of an update, as AdamW's
GATHER_AT_ONCE = 4e9                   # bytes of a model's weights: FSDP's hooks around each of its layers take the CPU
                                       # longer than NVLink takes for all of them
# Dense bf16 FLOP/s by the GPU's full name, from NVIDIA's datasheets (half of what they print "with sparsity")
PEAK = {
    "H100 80GB HBM3": 989.4e12, "H800": 989.4e12, "H200": 989.4e12,               # SXM
    "GH200 120GB": 989.4e12, "GH200 480GB": 989.4e12, "GH200 144G HBM3e": 989.4e12,
    "H100 NVL": 835e12, "H200 NVL": 835e12,
    "H100 PCIe": 756e12, "H800 PCIe": 756e12,
    "H20": 148e12,
    "A100-SXM4-40GB": 312e12, "A100-SXM4-80GB": 312e12, "A100-PCIE-40GB": 312e12, "A100 80GB PCIe": 312e12,
    "A800-SXM4-40GB": 312e12, "A800-SXM4-80GB": 312e12, "A800 80GB PCIe": 312e12}

# ---- corpus --------------------------------------------------------------------------------------
# From a folder to batches. Every file that holds UTF-8 text is a document: (name, text). Some documents are held out
# for validation. The others become one long vector of tokens, laid out once; a batch is rows of it, cut at random.
# A slot is a place in that vector: it holds a token, or a pad, which nothing is learned from. Each document starts
# at a multiple of L, the size of a key block, so that no key block holds tokens of two documents.

def count_bytes(docs):
    return sum(len(text.encode()) for _, text in docs)

def list_files(path):
    """Files of the corpus, sorted: (name relative to it, path). None is the interpreter's own standard library."""
    if path and os.path.isfile(path):
        return [(os.path.basename(path), path)]
    root = path or sysconfig.get_paths()["stdlib"]
    skip = set() if path else {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    files = []
    for folder, dirs, names in os.walk(root, onerror=lambda error: files.append(error.filename)):
        dirs[:] = sorted(d for d in dirs if d not in skip and not d.startswith((".", "__pycache__")))
        links = [d for d in dirs if os.path.islink(os.path.join(folder, d))]  # not entered; read_text says so
        for name in sorted(names + links):
            if name != LOCK and (path or name.endswith(".py")):  # LOCK: of a run whose --out lies in its --data
                files.append(os.path.join(folder, name))
    return [(os.path.relpath(file, root), file) for file in files]

def read_text(path):
    """-> text, None; or None and why there is no text. Of a file with a zero byte in its HEAD no more is read: beside
    a program's text may lie its libraries, gigabytes of them."""
    if os.path.isdir(path):
        return None, "linked folder" if os.path.islink(path) else "unreadable folder"
    if not os.path.isfile(path):  # a named pipe would be waited for, a device read, for ever
        return None, "pipe, device or broken link"
    try:
        with open(path, "rb") as file:
            raw = file.read(HEAD)
            if 0 not in raw:
                raw += file.read()
        if raw and 0 not in raw:
            return raw.decode("utf-8"), None
    except UnicodeDecodeError:
        pass
    except OSError:
        return None, "unreadable"
    return None, guess_kind(raw)

def read_corpus(path):
    """-> [(name, text)], and a Counter of the files that were skipped, by what they are."""
    docs = []
    kinds = Counter()
    files = list_files(path)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read_text, [file for _, file in files]))
    for (name, _), (text, kind) in zip(files, found):
        if text is None:
            kinds[kind] += 1
        else:
            docs.append((name, text))
    return docs, kinds

def describe(kinds):
    """Counter of read_text's kinds -> "2 empty, 1 UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"."""
    words = []
    for kind, n in sorted(kinds.items()):
        advice = f" (iconv {ICONV[kind]} -t UTF-8 converts {'it' if n == 1 else 'them'})" if kind in ICONV else ""
        words.append(f"{n} {kind}{advice}")
    return ", ".join(words) or "no files"

def split_corpus(docs):
    """Validation = the files whose sha256(name, as on the disk) is in the lowest 5 %, where they hold 1 to 10 % of the
    text. Otherwise, as for a single file or a few of unequal sizes, the last 5 % of each file, from the line that
    begins there if one does before the last 1 %."""
    train = []
    val = []
    for name, text in docs:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()
        side = val if int(digest[:8], 16) < 0.05 * 2 ** 32 else train
        side.append((name, text))
    share = count_bytes(val) / max(1, count_bytes(docs))
    if 0.01 <= share <= 0.1:
        return train, val

    train = []
    val = []
    for name, text in docs:
        cut = len(text) * 95 // 100
        newline = text.find("\n", cut, len(text) * 99 // 100)
        if newline >= 0:               # otherwise the line is long, and is cut
            cut = newline + 1
        for side, part in ((train, text[:cut]), (val, text[cut:])):
            if part:
                side.append((name, part))
    return train, val

def truncate(docs, n_bytes):
    """The first n_bytes of the documents, cut between characters."""
    out = []
    for name, text in docs:
        raw = text.encode()[:n_bytes]
        n_bytes -= len(raw)
        out.append((name, raw.decode("utf-8", errors="ignore")))
        if n_bytes <= 0:
            break
    return out

def load_data(path, val_path, val_bytes):
    """Read and split the text -> documents to train on, documents to validate on (their first val_bytes), number of
    files skipped. path None: the standard library; val_path None: some of path is held out. ValueError if a path does
    not exist, or a side has no text."""
    for p in (path, val_path):
        if p is None:
            continue
        if not os.path.exists(p):
            raise ValueError(f"{p!r}: no such file or folder")
        if not (os.path.isfile(p) or os.path.isdir(p)):
            raise ValueError(f"{p!r}: neither a file nor a folder")

    sides = []
    skipped = 0
    for p in [path, val_path] if val_path else [path]:
        docs, kinds = read_corpus(p)
        if not docs:
            raise ValueError(f"{p!r}: no text in it; {describe(kinds)}")
        if p and kinds:                # nothing can be done about the standard library's
            print(f"skipped | of {p!r}: {describe(kinds)}", flush=True)
        sides.append(docs)
        skipped += kinds.total()

    train, val = sides if val_path else split_corpus(sides[0])
    if not train or not val:
        raise ValueError(f"{path}: too little text to hold some out for validation; give --val-data")
    return train, truncate(val, val_bytes), skipped

def encode(tokenizer, texts):
    """Texts -> the ids of each, an array. Long texts are encoded in pieces, which threads do at the same time."""
    pieces = []
    counts = []                        # of a text's pieces
    for text in texts:
        starts = range(0, len(text), ENCODED)
        pieces += [text[start:start + ENCODED] for start in starts]
        counts.append(len(starts))

    progress = Progress("encode", sum(map(len, pieces)), "characters")
    encoded = []
    done = 0
    for piece, ids in zip(pieces, tokenizer.encode_batch(pieces)):
        encoded.append(ids)
        done += len(piece)
        progress.at(done)

    found = iter(encoded)
    joined = []
    for n in counts:
        parts = [[], *itertools.islice(found, n)]  # an empty text has no piece
        joined.append(np.concatenate(parts, dtype=np.int32, casting="unsafe"))
    return joined

class Tokens:
    """Documents laid out once, one after the other, each from a multiple of L, with pads between them.

    Every document begins with the end-of-text token, eot. Three int32 vectors, over all slots:
    ids     the token (a pad: eot); one slot more, so that the last one has a next
    begin   the slot where the slot's document starts; -1 for a pad
    end     the slot after its document's last token; for a pad the slot after itself, so that nothing else sees it
    """

    def __init__(self, docs, tokenizer, L, seq_len, encoded=None):
        """docs: [(name, text)]; L: slots of a key block; seq_len: of a row; encoded: what `encode` gives, where it is
        known."""
        self.eot = tokenizer.eot
        self.L = L
        self.n_bytes = count_bytes(docs)
        if encoded is None:
            encoded = encode(tokenizer, [text for _, text in docs])
        lengths = [1 + len(ids) for ids in encoded]  # with the eot
        self.n_tokens = sum(lengths)

        # pads everywhere, then the documents over them
        size = sum(round_up(length, L) for length in lengths)
        size = max(round_up(size, seq_len), seq_len)
        self.ids = np.full(size + 1, self.eot, dtype=np.int32)
        self.begin = np.full(size, -1, dtype=np.int32)
        self.end = np.arange(1, size + 1, dtype=np.int32)
        begin = 0
        for ids, length in zip(encoded, lengths):
            end = begin + length
            self.ids[begin + 1:end] = ids  # after the eot
            self.begin[begin:end] = begin
            self.end[begin:end] = end
            begin = round_up(end, L)

    def rows(self, starts, T):
        """Rows of T slots, one from each start -> what the model is called with, tensors (B, T) on the CPU:

        idx, targets   int64; the target of a pad is -1, that of a document's last token the end-of-text token
        pos            int64; place in the document, from 0 where the row or the document begins
        weight         fp32; 0 for a pad, else 1
        end            int32; as above, but counted from the row's first slot
        Without weight and end where every row lies within one document: plain causal attention is faster.
        """
        slot = np.asarray(starts)[:, None] + np.arange(T)                                                 # (B, T)
        first = slot[:, :1]
        begin = self.begin[slot]
        end = self.end[slot]
        is_pad = begin < 0
        targets = np.where(end == slot + 1, self.eot, self.ids[slot + 1])
        out = dict(
            idx=self.ids[slot].astype(np.int64),
            targets=np.where(is_pad, -1, targets).astype(np.int64),
            pos=np.where(is_pad, 0, slot - np.maximum(begin, first)).astype(np.int64))
        if is_pad.any() or (end < first + T).any():
            out["weight"] = (~is_pad).astype(np.float32)
            out["end"] = np.minimum(end - first, T).astype(np.int32)
        return {name: torch.from_numpy(x) for name, x in out.items()}

def get_batch(tokens, seed, split, step, batch_size, T):
    """Rows of T slots from random multiples of L, a pure function of (seed, split, step): nothing that happens between
    two steps, an evaluation or a new start, changes what the next step sees."""
    rng = np.random.default_rng((seed, split, step))
    n_starts = (len(tokens.begin) - T) // tokens.L + 1
    return tokens.rows(rng.integers(0, n_starts, batch_size) * tokens.L, T)

# ---- optimizer -----------------------------------------------------------------------------------
# Two optimizers share one model. Muon moves the matrices: it keeps a running mean of a matrix's gradients (momentum)
# and replaces it by the nearest matrix whose singular values are all about 1 (orthogonalisation), so that rare
# directions are learned as fast as common ones. AdamW moves what is no matrix between activations: the embedding, the
# head, the router's gates and the norms. One schedule of the rate holds for both; a group of parameters may scale it.

def orthogonalize(G, steps=5):
    """Newton-Schulz towards U V^T of G = U S V^T, for a stack (n, rows, cols) of matrices (Muon, K. Jordan 2024).

    Each of the `steps` maps every singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5. After five of them all that
    were not tiny lie near 1, within some 30 %, which is as good as 1 here. A tall matrix is transposed, for a small A.
    """
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step has the size of AdamW's (rms 0.2, arXiv 2502.16982), so that both share a
    rate. A group's `stack` says how many matrices its parameters hold one under the other (2 for [gate | up]).
    A parameter is a matrix (rows, cols) or the experts' stack of them (experts, rows, cols). Of several ranks each
    keeps some rows of a matrix, or some experts: whole matrices are orthogonalised, never a rank's rows alone.
    torch.optim.Muon takes no stacks of experts, and its bf16 iterations are 10-70 times slower than fp32 on a CPU."""

    def __init__(self, groups, lr, momentum=0.95):
        super().__init__(groups, dict(lr=lr, momentum=momentum, stack=1))

    @staticmethod
    def blend(m, grad, momentum):
        """Nesterov momentum: m moves on, in place -> the update, a mean of m and the gradient. On a GPU it is bf16:
        the five steps need no more; on a CPU bf16 is slow."""
        m.lerp_(grad, 1 - momentum)
        return grad.lerp(m, momentum).to(torch.bfloat16 if m.is_cuda else m.dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # matrices of one shape are orthogonalised together; experts are a stack already
            together = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = local(self.state[p]["momentum"])
                grad = local(p.grad)
                update = self.blend(momentum.flatten(), grad.flatten(), group["momentum"]).view_as(grad)
                key = p.shape if p.dim() == 2 else p
                together.setdefault(key, []).append((p, update))

            for items in together.values():
                params = [p for p, _ in items]
                updates = [update for _, update in items]
                stacked = torch.stack(updates) if len(updates) > 1 else updates[0][None]  # experts are not copied
                if params[0].dim() == 2 and is_sharded(params[0]):
                    matrices = orthogonalize_shards(stacked, params[0], group["stack"])
                else:
                    matrices = orthogonalize_stack(stacked, group["stack"])
                rows, cols = params[0].shape[-2:]
                size = MUON_RMS * max(rows // group["stack"], cols) ** 0.5 * group["lr"]
                for p, matrix in zip(params, matrices):
                    if p.dim() == 3:
                        matrix = matrix.masked_fill(self.idle_experts(p), 0)
                    local(p).add_(matrix, alpha=-size)

    @staticmethod
    def idle_experts(p):
        """Experts that no token chose, (experts, 1, 1) bool: each has no gradient, but the stack has one. Momentum,
        orthogonalised, would move such an expert at full size, again and again: it keeps its weights."""
        return ~local(p.grad).flatten(1).any(1)[:, None, None]

def orthogonalize_stack(stacked, stack):
    """(..., rows, cols), each `stack` matrices one under the other -> the same shape, each matrix orthogonalised."""
    rows, cols = stacked.shape[-2:]
    matrices = orthogonalize(stacked.reshape(-1, rows // stack, cols))
    return matrices.reshape(stacked.shape)

def orthogonalize_shards(shards, p, stack):
    """This rank's rows of n matrices -> its rows of the matrices, orthogonalised whole. The ranks share the matrices
    out: all-to-all brings each rank the rows of its own n / P, and takes them back.

    shards  (n, rows here, cols); FSDP gives each rank as many rows as torch.chunk would, the last ranks fewer or none
    p       one of the parameters, all of one shape
    stack   matrices that p holds one under the other
    """
    group = p.device_mesh.get_group()
    P = dist.get_world_size(group)
    n, here, cols = shards.shape
    rows = p.size(0)
    most = cdiv(rows, P)               # rows of a rank
    each = cdiv(n, P)                  # matrices of a rank

    # rows and matrices that are missing are 0; with all chunks but the last ones full, they are a matrix's last rows
    leaving = shards.new_zeros(P * each, most, cols)
    leaving[:n, :here] = shards
    coming = torch.empty_like(leaving)
    dist.all_to_all_single(coming, leaving, group=group)
    whole = coming.view(P, each, most, cols).transpose(0, 1).reshape(each, P * most, cols)
    whole[:, :rows] = orthogonalize_stack(whole[:, :rows], stack)
    leaving = whole.view(each, P, most, cols).transpose(0, 1).reshape(P * each, most, cols)
    back = torch.empty_like(leaving)   # not `coming`, which `leaving` may be a view of, with one matrix a rank
    dist.all_to_all_single(back, leaving, group=group)
    return back[:n, :here]

def kind_of(name, p):
    """The kind of a parameter, which says its optimizer and its rate: see configure_optimizers."""
    if name.startswith("embed"):
        kind = "embed"
    elif name.startswith("lm_head"):
        kind = "head"
    elif p.dim() == 1 or "router" in name or "conv" in name:
        kind = "vector"
    elif "w13" in name:
        kind = "stacked"
    else:
        kind = "matrix"
    return f"index {kind}" if is_index(name) else kind

def is_index(name):
    """Whether a parameter belongs to an index branch."""
    return ".indexer." in name

def configure_optimizers(model, lr):
    """Muon for matrices, AdamW for embedding, head, gates and norms -> [Muon, AdamW], the index branch's parameters,
    all others (two lists: the gradient of each is clipped on its own). A group's rate is `scale` times the schedule's.
    The index branch has groups of its own: it may have to join later, when a run leaves full attention."""
    kinds = {kind: [] for kind in ("matrix", "stacked", "embed", "head", "vector", "index matrix", "index vector")}
    for name, p in model.named_parameters():
        kinds[kind_of(name, p)].append(p)
    muon = Muon([
        dict(params=kinds["matrix"], stack=1),
        dict(params=kinds["stacked"], stack=2),
        dict(params=kinds["index matrix"], stack=1)], lr)
    adamw = torch.optim.AdamW([
        dict(params=kinds["embed"], scale=EMBED_SCALE),
        dict(params=kinds["head"] + kinds["vector"]),
        dict(params=kinds["index vector"])], lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    index = [p for name, p in model.named_parameters() if is_index(name)]
    rest = [p for name, p in model.named_parameters() if not is_index(name)]
    return [muon, adamw], index, rest

def count_two_moments(model):
    """How many of a model's parameters AdamW moves: it keeps two moments of each, Muon one."""
    adamw = configure_optimizers(model, 1.0)[0][1]
    return sum(p.numel() for group in adamw.param_groups for p in group["params"])

def schedule(progress, warmup, decay):
    """WSD (warm-up, stable, decay): the rate's factor, in [0, 1], at this progress of the run. It rises linearly over
    the share `warmup`, from 0.01, so that the first step is one; it falls linearly to 0 over the last share `decay`."""
    return min(1.0, progress / warmup + 0.01, (1 - progress) / decay)

def set_rates(optimizers, rate):
    """Set the rate of the next step, in every group at its scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)

@torch.no_grad()
def update(model, optimizers, expert_load, bias_rate):
    """Step the optimizers on the gradients there are, forget the gradients, balance the router.

    expert_load  (layers, experts): how many tokens chose each expert in this step
    bias_rate    u: how far the router's bias of a layer moves towards the experts that too few tokens chose
    """
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.update_router_bias(expert_load, bias_rate)

# ---- several ranks -------------------------------------------------------------------------------
# torchrun starts N processes, ranks, on a GPU each. Each computes a part of each step, and gradients are summed:
#     dp   rows of the batch                   data parallel
#     ep   experts, N / ep ranks have the same    expert parallel: tokens travel to their experts, see moe.py
#     cp   tokens of a row                     context parallel: keys travel to the queries, see model.ContextShard
# N = dp * ep * cp. Rows are shared out over dp and ep, for ranks that share experts have rows of their own. Weights,
# gradients and moments are FSDP2's: each rank keeps 1 / N of every parameter (of an expert's, 1 / (dp * cp) of its
# rank's share), and a layer's are gathered while it computes. A step's numbers do not depend on N: a batch is the same
# function of its step, each rank knows all of it, and sums are divided by the counts of the whole.
# A checkpoint is one file, whatever N is: rank 0 writes whole tensors, and each rank reads its part of them. (A folder
# with a file of each rank, as torch.distributed.checkpoint writes it, is nothing that sample.py could read alone.)

def local(t):
    """What this rank keeps of a tensor: all of it, unless FSDP has sharded it."""
    return t.to_local() if is_sharded(t) else t

def is_sharded(t):
    """Whether t is a DTensor, FSDP's: a tensor of which this rank has a part."""
    return hasattr(t, "device_mesh")

def parallel_sizes(text):
    """A type for argparse: "dp=2,ep=2" -> {"dp": 2, "ep": 2}."""
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("dp", "ep", "cp") or name in sizes or not value.isdecimal() or int(value) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: sizes of dp, ep or cp, such as dp=2,ep=2")
        sizes[name] = int(value)
    return sizes

@dataclasses.dataclass
class Parallel:
    """How ranks share the work, and the groups of them that meet."""
    world: World
    device: torch.device = None        # of this rank; None with one process, as the rest
    dp: int = 1
    ep: int = 1
    cp: int = 1
    everyone: "DeviceMesh" = None      # all ranks: FSDP's of all but the experts
    replicas: "DeviceMesh" = None      # ranks with the same experts: FSDP's of these
    experts: "ProcessGroup" = None     # ranks that share the experts out
    context: "ProcessGroup" = None     # ranks that share rows out

    @classmethod
    def join(cls, world, device, sizes, cfg):
        """Meet the other ranks. sizes: of --parallel, None if it was not given; ValueError if they do not fit."""
        if world.size == 1:
            if sizes and max(sizes.values()) > 1:
                raise ValueError(f"--parallel {spell(sizes)}: one process; torchrun --nproc-per-node N train.py ... "
                                 "starts N")
            return cls(world)
        sizes = sizes or {}
        ep = sizes.get("ep", 1)
        cp = sizes.get("cp", 1)
        dp = sizes.get("dp", world.size // (ep * cp))
        if dp * ep * cp != world.size:
            raise ValueError(f"--parallel {spell(sizes)}: their product is not the number of processes, {world.size}")
        if ep > 1 and (cfg.n_expert % ep or "moe" not in cfg.mlp_types):
            raise ValueError(f"--parallel ep={ep}: {cfg.n_expert} experts do not divide by it")
        if cp > 1 and cfg.is_recurrent:
            raise ValueError(f"--parallel cp={cp}: the tokens of a row can be shared out where all layers have full "
                             "attention or MSA")

        # rank = (d * cp + c) * ep + e
        from torch.distributed.device_mesh import init_device_mesh
        world.join(device)
        everyone = init_device_mesh(device.type, (world.size,), mesh_dim_names=("everyone",))
        by_expert = init_device_mesh(device.type, (dp * cp, ep), mesh_dim_names=("replicas", "experts"))
        by_token = init_device_mesh(device.type, (dp, cp, ep), mesh_dim_names=("rows", "context", "experts"))
        return cls(
            world, device, dp, ep, cp,
            everyone=everyone,
            replicas=by_expert["replicas"],
            experts=by_expert["experts"].get_group(),
            context=by_token["context"].get_group())

    def __str__(self):
        shared = [("dp", self.dp, "rows"), ("ep", self.ep, "experts"), ("cp", self.cp, "tokens of a row")]
        parts = [f"{name} {size} over {what}" for name, size, what in shared if size > 1]
        return f"{self.world.size}: {', '.join(parts)}; FSDP2 keeps 1/{self.world.size} of the weights on each"

    def shard(self, model, at_once=GATHER_AT_ONCE):
        """Leave to this rank its part of a model's parameters; from then on its forward and backward meet the
        others'. Gradients are sums over ranks. The model may lie on the CPU: its layers go to the device one by one.
        at_once: bytes of a model's weights up to which all its layers are gathered together."""
        if self.world.size == 1:
            return
        from torch.distributed.fsdp import fully_shard
        apart = set()                  # parameters that are not everyone's
        if self.ep > 1:
            for layer in model.moe_layers():
                layer.share_experts(self.experts)
                layer.experts.to(self.device)
                if self.replicas.size() > 1:
                    fully_shard(layer.experts, mesh=self.replicas)
                apart.update(layer.experts.parameters())
        size = sum(p.numel() * p.itemsize for p in model.parameters() if p not in apart)
        if size > at_once:
            for block in [*model.layers, *(module.block for module in model.mtp)]:
                fully_shard(block, mesh=self.everyone, ignored_params=apart)
        fully_shard(model, mesh=self.everyone, ignored_params=apart)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums

    def check_rows(self, args, cfg):
        """ValueError unless the rows of each stage of a run divide by the ranks that share them."""
        if self.world.size == 1:
            return
        for _, cut in args.stages:
            cut = min(cut, args.seq_len // 16)
            T = args.seq_len // cut
            _, ranks, _ = self.share(T, cfg)
            if args.batch_size * cut % ranks:
                raise ValueError(f"--batch-size {args.batch_size}: {args.batch_size * cut} rows of {T} tokens do not "
                                 f"divide by the {ranks} ranks that share them")

    def part(self, batch, cfg):
        """A whole batch, tensors (rows, T) -> this rank's rows of it, and its ContextShard of each row or None. Rows
        too short to be cut are shared out whole, over the ranks of cp, too."""
        if self.world.size == 1:
            return batch, None
        rows, T = batch["idx"].shape
        rank, ranks, shard = self.share(T, cfg)
        own = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
        return {name: x[own] for name, x in batch.items()}, shard

    def share(self, T, cfg):
        """How rows of T tokens are shared out -> this rank's number, of how many; its ContextShard of each or None."""
        world = self.world
        if self.cp == 1 or not ContextShard.fits(T, self.cp, key_block(cfg), cfg.index_kl_stride):
            return world.rank, world.size, None
        context = world.rank // self.ep % self.cp
        rank = world.rank // (self.ep * self.cp) * self.ep + world.rank % self.ep
        return rank, self.dp * self.ep, ContextShard(context, self.cp, T, self.context)

    def sum(self, *tensors):
        """Sums over ranks, in one collective -> tensors of the same shapes and dtypes."""
        if self.world.size == 1:
            return tensors
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors)]

    def clip(self, params):
        """Clip the gradient of all these parameters to norm 1 -> the norm that it had."""
        if self.world.size == 1:
            return torch.nn.utils.clip_grad_norm_(params, 1.0)
        grads = [local(p.grad) for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)  # of what is here: each element is on one rank
        norm, = self.sum(norm.to(self.device) ** 2)
        norm = norm.sqrt()
        factor = (1 / (norm + 1e-6)).clamp(max=1.0)  # as in clip_grad_norm_
        if grads:                      # M2 has no index branch, whose gradients are clipped apart
            torch._foreach_mul_(grads, factor)
        return norm

    def whole(self, name, t):
        """What all ranks have of a parameter, or of a moment of it, put together -> on the CPU; None but on rank 0."""
        if is_sharded(t):
            t = t.full_tensor()
        t = t.detach()
        if ".experts." in name and t.dim() == 3:
            parts = [torch.empty_like(t) for _ in range(dist.get_world_size(self.experts))]
            dist.all_gather(parts, t.contiguous(), group=self.experts)
            return torch.cat([part.cpu() for part in parts]) if self.world.is_first else None
        return t.cpu() if self.world.is_first else None

    def part_of(self, name, p, whole):
        """A whole tensor of the shape that the parameter p of this name has on one process -> in p's own form."""
        from torch.distributed.tensor import distribute_tensor
        whole = whole.to(self.device)
        if ".experts." in name:
            whole = whole.chunk(dist.get_world_size(self.experts))[dist.get_rank(self.experts)]
        if not is_sharded(p):
            return whole.clone()
        return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)

    def weights(self, model):
        """The model's state_dict as one process would have it; its tensors are None but on rank 0."""
        if self.world.size == 1:
            return model.state_dict()
        return {plain(name): self.whole(name, t) for name, t in model.state_dict().items()}

    def moments(self, model, optimizers):
        """The optimizers' state_dicts as one process would have them; their tensors are None but on rank 0."""
        saved = [optimizer.state_dict() for optimizer in optimizers]
        if self.world.size == 1:
            return saved
        for names, state in zip(self.names(model, optimizers), saved):
            for number, moments in state["state"].items():
                state["state"][number] = {key: self.whole(names[number], t) for key, t in moments.items()}
        return saved

    def load_moments(self, model, optimizers, saved, step):
        """load_optimizers, of what `moments` gives."""
        if self.world.size > 1:
            for names, optimizer, state in zip(self.names(model, optimizers), optimizers, saved):
                params = [p for group in optimizer.param_groups for p in group["params"]]
                for number, moments in state["state"].items():
                    parts = {}
                    for key, t in moments.items():
                        is_moment = t.dim() > 0  # AdamW's step is a number
                        parts[key] = self.part_of(names[number], params[number], t) if is_moment else t
                    state["state"][number] = parts
        load_optimizers(optimizers, saved, step)

    def names(self, model, optimizers):
        """The name of each optimizer's parameters, in the order in which a state_dict numbers them."""
        name_of = {p: name for name, p in model.named_parameters()}
        return [[name_of[p] for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]

def key_block(cfg):
    """L of a model's layout: tokens in a key block; 1 where no layer is sparse."""
    return cfg.index_block_size if "msa" in cfg.attn_types else 1

def plain(name):
    """A parameter's name on one process."""
    return name.replace(".experts.", ".")

def spell(sizes):
    return ",".join(f"{name}={size}" for name, size in sizes.items())

# ---- evaluation ----------------------------------------------------------------------------------
# val_bpb, the bits that the model needs for a byte of validation text: -log2 of the probability of all its tokens,
# summed, over the text's bytes. A tokenizer with longer tokens predicts fewer, harder ones; a byte stays a byte, so
# that runs with other vocabularies compare.

@torch.no_grad()
def evaluate(model, tokens, T, batch_size, device, seconds=math.inf, tokenizer=None, index_warmup=False,
             parallel=Parallel(World())):
    """Bits per byte over non-overlapping windows, every token of the text included, and what the layers report.

    tokens        Tokens of the validation text
    T             length of a window
    batch_size    windows at a time
    seconds       after so many it ends with what it has measured until then, which needs the tokenizer
    index_warmup  as in a training step
    parallel      ranks share the windows out; what layers report of recall is of rank 0's
    -> dict: val_bpb; val_bytes, of how much text; block_recall, score_recall, block_chance (layers with MSA);
    dead_experts; max_vio (with experts).
    """
    model.eval()
    n_slots = len(tokens.begin)
    names = ("block_recall", "score_recall", "block_chance")
    nats = 0.0
    load = 0.0
    recalls = []
    measured = 0                       # slots so far
    rank, ranks, shard = parallel.share(T, model.cfg)
    together = T * batch_size * ranks
    progress = Progress("eval", n_slots, "slots of validation text")
    started = time.perf_counter()
    for first in range(0, n_slots, together):
        progress.at(first)
        if measured and parallel.world.any(time.perf_counter() - started > seconds):
            break
        measured = min(first + together, n_slots)
        batch = own_windows(tokens, range(first, measured, T), T, rank, ranks)
        batch = {key: x.to(device) for key, x in batch.items()}
        # on a GPU what was compiled for a step's shape would be compiled anew for these
        eager = torch.compiler.set_stance("force_eager") if model.embed.weight.is_cuda else contextlib.nullcontext()
        with eager:
            _, sums, aux = model(**batch, index_warmup=index_warmup, run_mtp=False, shard=shard)
        nats += sums.next.item()
        load = load + aux.get("expert_load", torch.zeros(0, 1))
        recalls.append(torch.stack([aux.get(name, torch.zeros(0)) for name in names]))
    model.train()
    nats = parallel.sum(torch.tensor(nats, dtype=torch.float64, device=device))[0].item()
    load, = parallel.sum(load)

    n_bytes = tokens.n_bytes
    if measured < n_slots:             # the targets are the tokens one slot on; pads and ends of texts have no bytes
        targets = tokens.ids[1:measured + 1]
        n_bytes = len(tokenizer.decode_bytes(targets[targets != tokens.eot].tolist()))
    result = dict(val_bpb=nats / math.log(2) / n_bytes, val_bytes=n_bytes)
    mean = torch.stack(recalls).nanmean(0)                                                   # (3, layers with MSA)
    for name, recall in zip(names, mean):
        result[name] = [] if mean.isnan().any() else recall.tolist()  # nan: rows too short to choose in
    result["dead_experts"] = int((load == 0).sum())
    result["max_vio"] = max_violation(load).tolist()
    return result

def own_windows(tokens, starts, T, rank, ranks):
    """Rows of T slots from a rank's own of these starts: every rank's batch has as many rows. Where starts do not
    divide, the last ranks have one that is not their own, of pads: it counts for nothing."""
    own = list(starts[rank::ranks])
    lacks = len(own) < cdiv(len(starts), ranks)
    if not lacks and len(starts) % ranks == 0:
        return tokens.rows(own, T)
    batch = tokens.rows(own + [starts[0]] * lacks, T)
    batch.setdefault("weight", torch.ones(batch["idx"].shape))
    if lacks:
        batch["targets"][-1] = -1
        batch["weight"][-1] = 0.0
    return batch

# ---- one step ------------------------------------------------------------------------------------
# The model returns sums of losses, not means: a batch may be computed in parts, of unequal numbers of real tokens, and
# the sums over all parts, divided once by the counts of the whole batch, are those of the batch at once. After the
# step its loss is checked: a run that diverges stops, with the last good checkpoint in place.

def train_step(model, batch, optimizers, groups, parts=1, mtp_weight=MTP_WEIGHT[0], bias_rate=0.0,
               index_warmup=False, run_mtp=True, recompute=False, parallel=Parallel(World())):
    """Forward and backward over the batch in parts, clip, update. Parameters that require no gradient stay as they are.

    batch       idx, targets, pos and perhaps weight, end: (B, T) each, as of Tokens.rows; whole, on every rank
    optimizers  [] leaves the weights as they are, and the gradients where they are
    groups      lists of parameters; the gradient of each is clipped to norm 1 on its own
    mtp_weight  of the MTP losses' mean
    parts       gradient accumulation: the rows are computed in this many parts. Each part's sums are divided by the
                counts of the whole batch, so that the gradients add up to the batch's
    bias_rate   u of the router's load balancing
    index_warmup, run_mtp, recompute    this step's mode, see MiniMax.forward
    parallel    how ranks share the batch out
    -> dict: loss, mtp_loss (modules that ran), index_kl (layers), means over the batch; expert_load (layers, experts);
    norms, one a group, of the gradients before they were clipped.
    """
    total = model.count_losses(batch["targets"], batch.get("weight"), batch.get("end"), run_mtp)
    batch, shard = parallel.part(batch, model.cfg)
    loads = []
    means = []
    for chunks in zip(*(x.chunk(parts) for x in batch.values())):
        part = dict(zip(batch, chunks))
        _, sums, aux = model(**part, index_warmup=index_warmup, run_mtp=run_mtp, recompute=recompute, shard=shard)
        mean = sums.over(total)
        # experts learn through their weights, attention through q, k and v, the index branch through the KL alone
        mean.objective(mtp_weight).backward()
        means.append((mean.next.detach(), mean.mtp.detach(), mean.kl.detach()))
        loads.append(aux.get("expert_load", mean.next.new_zeros(0)))
    loss, mtp, kl = (sum(x) for x in zip(*means))
    loss, mtp, kl, load = parallel.sum(loss, mtp, kl, sum(loads))
    norms = [parallel.clip(group) for group in groups]
    if optimizers:
        update(model, optimizers, load, bias_rate)
    return dict(loss=loss, mtp_loss=mtp, index_kl=kl, expert_load=load, norms=norms)

def freeze_trunk(model, frozen=True):
    """Only MTP modules learn: embedding, layers, last norm and head get no gradient, so no optimizer moves them, and
    their routers' biases stay. Frozen False: all learn."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("mtp.") or not frozen)

def check_divergence(loss, norm, now):
    """Look at one step's loss and gradient norm, and keep the running mean of the loss in `now`, a RunState.
    FloatingPointError on a NaN, or on five losses in a row that lie 1 nat, and 4 usual distances, over the mean."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: not finite")
    mean = loss if now.ema is None else now.ema
    if loss > mean + max(SPIKE, SPIKE_SPREADS * now.spread):
        now.above += 1
    else:
        now.above = 0
    if now.above >= SPIKE_STEPS:
        raise FloatingPointError(f"loss spike: {loss:.3f} and four before it, where the running mean was {mean:.3f}")
    if now.above == 0:
        share = max(0.05, 1 / (now.step + 1))  # a plain mean at first
        now.spread += share * (abs(loss - mean) - now.spread)
        now.ema = mean + share * (loss - mean)

def compile_model(model, muon):
    """torch.compile, for a GPU, what lies between the kernels: norms, projections, rotations, experts, momentum.
    Attention stays as it is: its kernels are our own, or torch's. Layers of one kind share their graphs, which torch
    keeps on disk for the next start."""
    import torch._functorch.config as cache  # here, as importing the compiler takes seconds
    cache.autograd_cache_allow_custom_autograd_functions = True  # or the experts' graphs, with _Rows, are not kept
    for block in [*model.layers, *(module.block for module in model.mtp)]:
        block.attn.attend = torch.compiler.disable(one_layout(block.attn.attend))
        if isinstance(block.mlp, MoE) and block.mlp.experts is not None:  # how many rows come shows when it runs
            block.mlp.experts.forward = torch.compiler.disable(block.mlp.experts.forward)
        block.forward = torch.compile(block.forward, dynamic=False)  # FSDP's hooks, around it, stay outside
    model.norm.compile(dynamic=False)
    muon.blend = torch.compile(muon.blend, dynamic=True)
    # beyond its limit, 8 graphs of a function, torch would run it uncompiled, and only warn: a run has graphs for each
    # kind of layer and of attention, and, where MTP modules join, for a frozen trunk
    torch._dynamo.config.recompile_limit = 64

def one_layout(attend):
    """An Attention's `attend` whose y is contiguous, whatever operation it is from: one graph reads it. The product
    that follows needs it so."""
    def contiguous(*args):
        y, aux = attend(*args)
        return y.contiguous(), aux
    return contiguous

def warm_compile(run):
    """Compile what the steps of a run need before its clock starts; the model is left as it was. There are graphs for
    the index branch's warm-up, where the run has one before it, and others for sparse attention. Each step here has
    MTP: one without needs no graph beside these."""
    print("compile | norms, projections and experts by torch.compile, attention by Triton; both keep it on disk for "
          "the next start", flush=True)
    args = run.args
    model = run.model
    muon = run.optimizers[0]
    batch = get_batch(run.data["train"], args.seed, 0, 0, args.batch_size, args.seq_len)
    batch = {key: x.to(run.device) for key, x in batch.items()}
    modes = [False]
    if "msa" in model.cfg.attn_types and not run.now.sparse:
        modes = [True, False]
    for index_warmup in modes:
        train_step(model, batch, [], run.groups, args.accumulate, index_warmup=index_warmup, recompute=args.recompute,
                   parallel=run.parallel)
    shapes = {p.dim(): local(p) for p in model.parameters() if p.dim() > 1}  # a matrix, a stack of experts: two graphs
    for p in shapes.values():
        flat = torch.ones(p.numel(), device=p.device, dtype=p.dtype)
        with torch.no_grad():
            muon.blend(flat, flat.clone(), muon.defaults["momentum"])
    model.zero_grad(set_to_none=True)

def step_bytes(cfg, rows, T, device, recompute=False, mesh=None):
    """About the bytes of a training step of rows x T tokens: weights, gradients and moments in fp32, what the backward
    pass keeps of each layer, and the logits. On a GPU the planner's estimate; on a CPU a little less rather than more.
    recompute: activation checkpointing, with which only each layer's input is kept, and one layer at a time in full.
    mesh: how ranks share the step out, of which this one computes `rows` rows, or its part of each."""
    mesh = mesh or Mesh()
    if device.type != "cpu":
        return sum(Planner(cfg, recompute).memory(rows, T, mesh).values())
    tokens = rows * T // mesh.cp

    # weights and gradients, and one moment of each parameter or two
    with torch.device("meta"):
        model = MiniMax(cfg)
    n_params = sum(p.numel() for p in model.parameters())
    need = 4 * (3 * n_params + count_two_moments(model)) / mesh.size

    # what layers keep, in numbers a token
    kinds = cfg.attn_types + [cfg.mtp_attn_type] * cfg.n_mtp
    experts = cfg.n_expert_per_tok * (2 * cfg.n_embd + 5 * cfg.expert_dim) + 5 * cfg.shared_dim + 3 * cfg.n_embd
    layers = [4 * tokens * (numbers_kept(cfg, kind, T) + experts) for kind in kinds]
    if recompute:
        need += 4 * tokens * cfg.n_embd * cfg.n_layer + (cfg.n_mtp + 1) * max(layers)
    else:
        need += sum(layers)

    # sparse attention in torch gathers keys and values, some six copies alive; above a size it does so part by part
    n_sparse = kinds.count("msa")
    gathered = tokens * cfg.n_kv_head * cfg.index_topk_blocks * cfg.index_block_size * cfg.head_dim
    if n_sparse:
        if gathered > chunk(device):
            need += 6 * 4 * chunk(device)
        else:
            need += 6 * 4 * gathered * (1 if recompute else n_sparse)

    # logits: of a chunk of rows, see model.cross_entropy
    at_once = min(tokens, head_chunk(cfg))
    copies = 3 + (cfg.n_mtp if at_once == tokens else 0)
    return need + 4 * at_once * cfg.vocab_size * copies

def numbers_kept(cfg, kind, T):
    """About the numbers a token that the backward pass keeps of a layer's attention, in rows of T."""
    heads = cfg.n_head * cfg.head_dim
    kv_heads = cfg.n_kv_head * cfg.head_dim
    kept = 6 * cfg.n_embd + 5 * heads + 6 * kv_heads
    if kind == "msa":
        kept += 3 * (cfg.n_kv_head + 1) * cfg.index_head_dim
    if kind == "swa":
        seen = min(2 * cfg.window, T)  # keys of a chunk and of the one before
        kept += 4 * kv_heads
        if cfg.window_sink:            # scores and probabilities, which SDPA does not keep
            kept += 3 * cfg.n_head * seen
    if kind == "lightning":            # a key and a value for each head, the gate; of each chunk scores and states
        kept += 14 * heads
        kept += 3 * cfg.n_head * min(LIGHTNING_CHUNK, T)
        kept += 2 * heads * cfg.head_dim // LIGHTNING_CHUNK
    return kept + 2 * cfg.conv_taps * cfg.n_embd

# ---- a run's flags -------------------------------------------------------------------------------
# What was given on the command line wins; then what a checkpoint was trained with; then the preset's. A checkpoint's
# args are read as a command line, so that a file from elsewhere is checked as a user's flags are. Whatever does not go
# together is refused here, in one line, before text is read or memory is taken.

def parse_args(argv, locks=None):
    """-> args, checkpoint (None for a new run). --resume takes what is not given again from the checkpoint.
    `locks`, a contextlib.ExitStack, holds the lock on --out from here on: nobody else changes what is read.
    ValueError for flags that are unknown or do not go together."""
    p = Parser(__doc__)
    count = number(1)
    # model
    p.add_argument("--preset", default="tiny", choices=PRESETS,
                   help="the model: tiny-m2 and m2 have M2's pattern, the others M3's")
    p.add_argument("--attn", type=attention, default="msa", metavar="KIND",
                   help="msa: as the preset has it; full, swa (a window) or lightning: in every layer; or two kinds by "
                   "turns, such as swa:full=2:1: two layers of the first, one of the second, and again")
    p.add_argument("--window", type=count, metavar="N", help="keys that a query of a swa layer reads; default: an "
                   "eighth of --seq-len")
    p.add_argument("--sink", action="store_true", help="swa layers have a learned sink")
    p.add_argument("--mtp", type=number(0, 8), help="MTP modules; more of them may join with --resume; default: the "
                   "preset's, or the checkpoint's")
    p.add_argument("--vocab-size", type=number(257), help="tokens that the BPE learns; default: the preset's")
    # text
    p.add_argument("--data", help="a text file or a folder of them; default: the Python standard library")
    p.add_argument("--val-data", help="validation text; default: 5 %% of the files of --data")
    # length of the run
    p.add_argument("--steps", type=count, help="end after this many steps")
    p.add_argument("--minutes", type=number(1e-6, math.inf, float), help="end after this much training time; "
                   "default: the preset's")
    # a step
    p.add_argument("--seq-len", type=number(16), help="tokens in a row, at last; default: the preset's")
    p.add_argument("--batch-size", type=count, help="rows in a step, at last; default: the preset's")
    p.add_argument("--accumulate", type=count, default=1,
                   help="gradient accumulation: a step's rows in so many parts")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, slower")
    p.add_argument("--lr", type=number(1e-12, math.inf, float), help="peak rate of the matrices; default: the preset's")
    p.add_argument("--bias-rate", type=number(0, math.inf, float), default=0.01,
                   help="u of the router's load balancing, 0 = off")
    p.add_argument("--parallel", type=parallel_sizes, metavar="SIZES", help="how torchrun's processes share a step: "
                   "dp=N over rows, ep=N over experts, cp=N over the tokens of a row, such as dp=2,ep=2; default: rows")
    # what is printed and kept
    p.add_argument("--out", default="out", help="folder of the checkpoint and of log.jsonl")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--eval-every", type=count, default=200,
                   help="steps from one evaluation and checkpoint to the next")
    p.add_argument("--log-every", type=count, default=20, help="steps from one progress line to the next")
    p.add_argument("--figure", metavar="FILE", help="draw the run's curves; needs matplotlib")
    p.add_argument("--stop-after", type=count, help="save and leave after this step, as Ctrl-C would")
    p.add_argument("--seed", type=number(0, 2 ** 63 - 1), default=1337)
    p.add_argument("--dry-run", action="store_true", help="print parameters and bytes, allocate nothing")
    p.add_argument("--gpus", type=number(1, 10 ** 5), metavar="N", help="with --dry-run: plan a step on N H200s, 8 a "
                   "node: memory, mesh, tokens a second, where the time goes")

    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    state = None
    if args.gpus and not args.dry_run:
        raise ValueError(f"--gpus {args.gpus}: a plan needs --dry-run; to train on N GPUs: torchrun --nproc-per-node N "
                         "train.py ...")
    if args.dry_run and args.figure:
        raise ValueError(f"--figure {args.figure}: --dry-run trains nothing that could be drawn")
    if args.dry_run and args.parallel and not args.gpus:
        raise ValueError(f"--parallel {spell(args.parallel)}: --dry-run plans it with --gpus N")
    if args.dry_run:
        return args, None
    if args.figure:
        check_figure(args.figure)
    world = World.from_env()
    if args.resume:
        if locks and world.is_first:
            locks.enter_context(lock_folder(args.out, create=False))
        state = load_checkpoint(args.out, mmap=world.size > 1)  # of which each rank reads its part
        args = resume_args(p, argv, args, state)
    if args.preset in ("m2", "m3"):
        raise ValueError(f"--preset {args.preset}: its training state takes terabytes; --dry-run prints how many")
    if locks and not args.resume and world.is_first:
        locks.enter_context(lock_folder(args.out))
    check_log(args.out)
    return args, state

def attention(text):
    """A type for argparse: a kind of attention, or a pattern of two. How many layers there are it does not know."""
    try:
        attn_pattern(text, n_layer=1000)  # more than a preset has
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text

def resume_args(parser, argv, given, state):
    """What was given now, over what the checkpoint was trained with -> args. ValueError if they do not go together.

    parser, argv   the script's flags, and those that were given now
    given          argv, parsed alone
    state          the checkpoint
    """
    path = checkpoint_path(given.out)
    saved = dict(state["args"])
    if "queue" in state or "task" in saved:
        raise ValueError(f"--out {given.out}: a checkpoint by rl.py; python rl.py --resume --out {given.out} goes on")
    check_state(path, state["now"])
    preset = read_preset(path, saved)
    args = merge_args(parser, argv, given, path, saved)
    vars(args).update(preset)
    for name in ("lr", "batch_size", "seq_len"):  # a new run has them from its preset
        if getattr(args, name) is None:
            raise ValueError(f"{path}: the checkpoint's args lack {name}")
    check_no_window(args.attn, given)
    for name in ("preset", "attn", "seq_len", "vocab_size", "window", "sink"):  # these made the model
        value = getattr(args, name)
        was = state["args"].get(name, parser.get_default(name))  # older args lack the last two
        becomes_sparse = (was, value) == ("full", "msa")
        if becomes_sparse and "msa" not in preset_config(args.preset).attn_types:
            raise ValueError(f"--attn msa: no layer of the preset {args.preset} has MSA")
        if value != was and not becomes_sparse:
            only = "; attention changes from full to msa alone" if name == "attn" else ""
            raise ValueError(f"--{name.replace('_', '-')} {value}: the checkpoint was trained with {was}{only}")
    return args

def merge_args(parser, argv, given, path, saved):
    """What was given now, over a checkpoint's args, `saved`, read from `path` -> args. A new end of the run, in steps
    or minutes, replaces the old one, whichever of the two that was."""
    flags = saved_flags(parser, path, saved, RUN_ALONE)
    if given.steps or given.minutes:
        flags = [flag for flag in flags if not flag.startswith(("--steps=", "--minutes="))]
    return parser.parse_args([*flags, *argv])

def check_state(path, saved):
    """ValueError unless a checkpoint's `now` has all that a run goes on counting."""
    what = f"{path}: the checkpoint's now"
    kinds = {}
    for name, kind in typing.get_type_hints(RunState).items():
        kinds[name] = typing.get_args(kind) or kind
    del kinds["bpb"]                   # which may be infinite
    check_fields(what, saved, kinds, optional=kinds.keys() - {"step", "seconds", "ema", "above"})
    bpb = saved.get("bpb")
    if not (type(bpb) is float and bpb > 0):  # inf: none was measured
        raise ValueError(f"{what} has bpb = {bpb}: a number above 0")

def read_preset(path, saved):
    """Take what has no flag, the preset's mtp_every, msa_from and stages, out of a checkpoint's args -> a dict."""
    what = f"{path}: the checkpoint's args"
    preset = {name: saved.pop(name) for name in ("mtp_every", "msa_from", "stages") if name in saved}
    check_fields(what, preset, dict(mtp_every=int, msa_from=float, stages=(tuple, list)))
    if preset["mtp_every"] < 1:
        raise ValueError(f"{what} have mtp_every = 0: it must be at least 1")
    if not are_stages(preset["stages"]):
        shown = str(preset["stages"])[:40]
        raise ValueError(f"{what} have stages = {shown}: pairs of a share, the first 0, and cuts of a row")
    return preset

def are_stages(stages):
    """Whether these are pairs of a share of the run, the first 0, and a number of cuts of a row."""
    for stage in stages:
        if not isinstance(stage, (tuple, list)) or len(stage) != 2:
            return False
        share, cuts = stage
        if type(share) not in (int, float) or type(cuts) is not int or cuts < 1:
            return False
    return len(stages) > 0 and stages[0][0] == 0

def preset_config(name):
    """A preset of PRESETS -> its MiniMaxConfig."""
    return getattr(MiniMaxConfig, name.replace("-", "_"))()

def configure(args):
    """Preset and flags -> MiniMaxConfig. What the flags leave open is filled into args, from RUNS. ValueError if the
    rows do not fit the model's context or its key blocks."""
    cfg = preset_config(args.preset)
    defaults = dict(RUNS.get(args.preset, {}), vocab_size=cfg.vocab_size, mtp=cfg.n_mtp)
    if args.steps is not None:
        defaults["minutes"] = None
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    cfg.n_mtp = args.mtp
    cfg.attn_types = layer_kinds(args.attn, cfg)
    check_no_window(args.attn, args)
    if "swa" in cfg.attn_types and args.window is None:
        args.window = usual_window(args)
    cfg.window = args.window or 0
    cfg.window_sink = args.sink
    if args.dry_run:
        return cfg
    check_row(args.seq_len, cfg, args.preset)
    return dataclasses.replace(cfg, max_seq_len=args.seq_len)

def check_row(T, cfg, preset):
    """ValueError unless rows of T tokens fit the model's context and its key blocks."""
    if T > cfg.max_seq_len:
        raise ValueError(f"--seq-len {T}: the context of {preset} is at most {cfg.max_seq_len}")
    if "msa" in cfg.attn_types and T % cfg.index_block_size:
        raise ValueError(f"--seq-len {T}: rows hold whole key blocks, a multiple of {cfg.index_block_size}")

def layer_kinds(attn, cfg):
    """--attn -> attn_types: msa is the preset's own, cfg's. ValueError for a pattern with a kind that gets no layer."""
    if attn == "msa":
        return cfg.attn_types
    try:
        return attn_pattern(attn, cfg.n_layer)
    except ValueError as error:
        raise ValueError(f"--attn {error}") from None

def usual_window(args):
    """--window where it is not given."""
    row = args.seq_len or RUNS["small"]["seq_len"]  # m2 and m3 have no rows: nobody trains them here
    return max(1, row // WINDOWS_A_ROW)

def check_no_window(attn, given):
    """ValueError for flags of windows, of those given, where no layer of --attn has a window."""
    if "swa" in attn:
        return
    for flag, value in (("--sink", given.sink), (f"--window {given.window}", given.window)):
        if value:
            raise ValueError(f"{flag}: of --attn {attn} no layer has a window; --attn swa has")

# ---- the planner ---------------------------------------------------------------------------------
# --dry-run --gpus N: how much memory does a step need on each of N GPUs, how long does it take, and where does the time
# go? Nothing runs. A term of time is FLOPs over a rate, bytes over a rate, or calls times a latency:
#     compute    of a layer: products, attention, index branch, experts, passes over activations and weights
#     gathers    of its weights by FSDP, forward and backward, and the sums of its gradients: they run beside compute,
#                and only what takes longer than it counts. Those of the root, all of a small model, hide behind nothing
#     exchanges  tokens to their experts and back, keys to queries: compute waits for them
#     optimizer  after all layers; Muon's matrices are shared out over the ranks
# Memory is that of the worst moment: the loss, a layer's backward pass, or the update. The rule for a mesh: dp where
# the model fits, ep where its experts do not, cp where a row's activations do not.

@dataclasses.dataclass(frozen=True)
class Rate:
    """A number that the planner computes with, and where it is from."""
    value: float
    unit: str
    origin: str

MEASURED = "measured, one H200"
FITTED = "fitted, one H200"
SHEET = "of the data sheet's, assumed"
RATES = dict(
    room=Rate(0.92 * 143_771 * 2 ** 20, "bytes", "an H200's, less 8 % for CUDA and gaps"),
    copy=Rate(4.30e12, "bytes/s", MEASURED),
    matmul=Rate(780e12, "FLOP/s", MEASURED),
    passes=Rate(3.9e12, "bytes/s", FITTED),
    grouped=Rate(710e12, "FLOP/s", FITTED),
    attention=Rate(660e12, "FLOP/s", FITTED),
    attention_back=Rate(450e12, "FLOP/s", FITTED),
    index=Rate(600e12, "FLOP/s", FITTED),
    edges=Rate(2.35e12, "bytes/s", FITTED),
    edges_back=Rate(1.32e12, "bytes/s", FITTED),
    edges_kl=Rate(0.70e12, "bytes/s", FITTED),
    sums=Rate(0.90e12, "bytes/s", FITTED),
    full_bytes=Rate(6, "bytes", "of a channel of heads, full attention: " + FITTED),
    full_back_bytes=Rate(53, "bytes", "the same, backward: " + FITTED),
    plan_bytes=Rate(300, "bytes", "to sort an edge by its block: " + FITTED),
    msa_bytes=Rate(27, "bytes", "of a channel of heads, copies around MSA: " + FITTED),
    muon_bytes=Rate(118, "bytes", "of a parameter, beside products: " + FITTED),
    start=Rate(4e-6, "s", "between two kernels: " + FITTED),
    nvlink=Rate(0.75 * 450e9, "bytes/s", "NVLink: 75 % " + SHEET),
    network=Rate(0.75 * 50e9, "bytes/s", "InfiniBand, 400 Gb/s a GPU: 75 % " + SHEET),
    hop=Rate(5e-6, "s", "a collective's start, and each node further on: assumed"))
NODE = 8                               # GPUs that NVLink joins
KERNELS = dict(full=130, msa=300, update=100)  # that a layer starts, forward and backward, and Muon for it
PLAN_CONTEXTS = (2 ** 13, 2 ** 15, 2 ** 17, 196_608, 2 ** 19, 2 ** 20)  # of m2 and m3
PLAN_TOKENS = 2 ** 26                  # a step of m2 and m3 at most; DeepSeek-V3: 15,360 rows of 4K (arXiv 2412.19437)
TERMS = ("products", "attention", "index", "experts", "passes", "optimizer", "gathers", "exchanges", "keys", "rest")

def rate(name):
    return RATES[name].value

class Mesh(typing.NamedTuple):
    """How many ranks share rows, experts, and tokens of a row; rank = (d * cp + c) * ep + e, see Parallel."""
    dp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def size(self):
        return self.dp * self.ep * self.cp

    @property
    def replicas(self):
        """Ranks with the same experts, over which FSDP shards these."""
        return self.dp * self.cp

def on_a_node(size, stride):
    """How many ranks of a group, every stride-th rank, are on one node."""
    return min(size, max(1, NODE // stride))

def gather_seconds(n_bytes, size, stride=1):
    """All-gather of n_bytes over a group of ranks, or reduce-scatter. A ring crosses from node to node by as many
    network cards as the group has ranks on a node."""
    if size == 1:
        return 0.0
    here = on_a_node(size, stride)
    speed = rate("nvlink") if here == size else min(rate("nvlink"), here * rate("network"))
    return n_bytes * (size - 1) / size / speed + rate("hop") * cdiv(size, here)

def exchange_seconds(n_bytes, size, stride=1):
    """All-to-all of a group, where each rank has n_bytes, a size-th of them for itself."""
    if size == 1:
        return 0.0
    here = on_a_node(size, stride)
    inside = n_bytes * (here - 1) / size / rate("nvlink")
    outside = n_bytes * (size - here) / size / rate("network")
    return max(inside, outside) + rate("hop") * cdiv(size, here)

def shard_elements(shape, size):
    """Elements of a parameter that a rank keeps, of `size` that share its rows: whole rows. The last ranks may have
    fewer, or none, but FSDP gathers as many from each."""
    return cdiv(shape[0], size) * math.prod(shape[1:])

def muon_work(shape, stack):
    """Newton-Schulz on a parameter (rows, cols) or (experts, rows, cols) -> FLOPs, bytes of results in bf16."""
    small, large = sorted((shape[-2] // stack, shape[-1]))
    count = 5 * stack * math.prod(shape[:-2])  # of iterations, each with three products
    return count * (4 * small ** 2 * large + 2 * small ** 3), count * 2 * (2 * small ** 2 + small * large)

def keys_a_query(cfg, T):
    """Keys that a query of a row of T sees, that it reads of them in a layer with MSA, and that the index branch scores
    for it: means."""
    L = cfg.index_block_size
    earlier = np.arange(cdiv(T, L))                # blocks before each
    queries = np.minimum(L, T - L * earlier)       # of each block
    own = (queries * (queries + 1) / 2).sum() / T
    scored = L * (queries * earlier).sum() / T
    chosen = L * (queries * earlier.clip(max=cfg.index_topk_blocks - 1)).sum() / T
    return float(own + scored), float(own + chosen), float(scored)

def head_chunk(cfg):
    """Rows of logits that cross_entropy computes at a time."""
    return 2 ** (30 - cfg.vocab_size.bit_length())

class PlannedLayer:
    """What a layer, or an MTP module, asks of a step: its parameters, and what a token costs.

    attn, mlp   its kinds
    module      on the meta device
    is_module   whether it is MTP's
    """

    def __init__(self, cfg, attn, mlp, module, is_module=False):
        self.cfg = cfg
        self.attn = attn
        self.mlp = mlp
        self.is_module = is_module
        self.products = []             # (shape, stack) of each matrix between activations
        self.experts = []              # (shape, stack) of w13 and w2
        self.vectors = []              # shapes of the router and norms, which AdamW moves
        for name, p in module.named_parameters():
            kind = kind_of(name, p)
            stack = 2 if kind == "stacked" else 1
            if "vector" in kind:
                self.vectors.append(tuple(p.shape))
            elif p.dim() == 3:
                self.experts.append((tuple(p.shape), stack))
            else:
                self.products.append((tuple(p.shape), stack))

    def own_experts(self, mesh):
        """(shape, stack) of w13 and w2, of the experts that mesh.ep leaves to a rank."""
        return [((cdiv(shape[0], mesh.ep), *shape[1:]), stack) for shape, stack in self.experts]

    def kept(self, mesh):
        """Elements of parameters that a rank keeps: those that Muon moves, and those that AdamW does."""
        muon = sum(shard_elements(shape, mesh.size) for shape, _ in self.products)
        muon += sum(shard_elements(shape, mesh.replicas) for shape, _ in self.own_experts(mesh))
        adamw = sum(shard_elements(shape, mesh.size) for shape in self.vectors)
        return muon, adamw

    def in_use(self, mesh):
        """Elements of parameters that a rank has while the layer computes, pads of FSDP's gathers included: those that
        all ranks share, and its experts."""
        shapes = [shape for shape, _ in self.products] + self.vectors
        shared = sum(mesh.size * shard_elements(shape, mesh.size) for shape in shapes)
        experts = sum(mesh.replicas * shard_elements(shape, mesh.replicas) for shape, _ in self.own_experts(mesh))
        return shared, experts

    def bytes_kept(self, T):
        """Bytes a token that the backward pass keeps of the layer, in bf16 kernels, beside its weights in bf16. T:
        tokens of a row."""
        cfg = self.cfg
        heads, kv_heads = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        numbers = 4 * cfg.n_embd       # the input and what lies between attention and MLP, before and after their norms
        numbers += 3 * heads + 3 * kv_heads  # q and k before and after norm and RoPE, v, and the result
        fixed = 4 * cfg.n_head         # bytes: log-sum-exp
        if self.attn in ("swa", "lightning"):  # short rows of Lightning are computed in torch, in fp32
            size = 4 if self.attn == "lightning" and T < SHORT_ROW else 0.8
            fixed += max(0, size * numbers_kept(cfg, self.attn, T) - 2 * numbers)
        if self.attn == "msa":
            index = cfg.n_kv_head * cfg.index_head_dim
            numbers += index + index / cfg.index_kl_stride + 3 * cfg.index_head_dim  # qi, ki, and their gradients
            fixed += 4 * cfg.n_kv_head * cfg.index_topk_blocks
        if self.mlp == "moe":
            numbers += cfg.n_expert_per_tok * (cfg.n_embd + 3 * cfg.expert_dim) + 3 * cfg.shared_dim
            fixed += 4 * cfg.n_expert + 40 * cfg.n_expert_per_tok  # scores; choice, order and its inverse, weights
        else:
            numbers += 3 * cfg.dense_dim
        if self.is_module:             # MTP's: both inputs, with and without norm, their product, what the head reads
            numbers += 8 * cfg.n_embd
        return 2 * numbers + fixed

    def bytes_working(self):
        """Bytes a token that the layer's backward pass takes for itself: gradients of its widest numbers, and of its
        input."""
        cfg = self.cfg
        widest = 3 * cfg.dense_dim
        if self.mlp == "moe":
            widest = cfg.n_expert_per_tok * (cfg.n_embd + 2 * cfg.expert_dim)
        return 2 * (widest + 2 * cfg.n_embd)

    def flops(self, T):
        """Useful FLOPs a token of a training step, by term: as MiniMax.flops_per_token counts them."""
        cfg = self.cfg
        visible, read, scored = keys_a_query(cfg, T)
        products = sum(math.prod(shape) for shape, _ in self.products) + sum(map(math.prod, self.vectors))
        if self.mlp == "moe":
            products += cfg.n_expert   # the router's bias
        experts = cfg.n_expert_per_tok / cfg.n_expert * sum(math.prod(shape) for shape, _ in self.experts)
        key = 4 * cfg.n_head * cfg.head_dim
        index_key = 2 * cfg.n_kv_head * cfg.index_head_dim
        attention = 3 * key * visible
        index = 0.0
        if self.attn == "msa":
            attention = 3 * key * read
            index = index_key * scored + (key / 2 + 3 * index_key) * read / cfg.index_kl_stride
        return dict(products=6 * products, experts=6 * experts, attention=attention, index=index)

    def seconds(self, n, T, mesh, recompute):
        """Compute of a training step by term, on a rank that has n tokens, of rows of T."""
        forwards = 2 if recompute else 1
        attention, index = self.attention_seconds(T, forwards)
        kernels = KERNELS[self.attn] * (forwards + 2) / 3 + KERNELS["update"]
        return dict(
            products=n * sum(product_seconds(rows, cols, forwards, "matmul") for (rows, cols), _ in self.products),
            experts=n * self.cfg.n_expert_per_tok * sum(
                product_seconds(rows, cols, forwards, "grouped") for (_, rows, cols), _ in self.experts),
            attention=n * attention,
            index=n * index,
            passes=n * self.pass_seconds(forwards) + 6 * (forwards + 2) * sum(self.in_use(mesh)) / rate("passes"),
            rest=kernels * rate("start"))

    def attention_seconds(self, T, forwards):
        """Attention and index branch of a token, in rows of T."""
        cfg = self.cfg
        visible, read, scored = keys_a_query(cfg, T)
        heads = cfg.n_head * cfg.head_dim
        if self.attn == "full":        # its tensors are read and written; in the backward pass in fp32, too
            flops = 4 * heads * visible
            moved = heads * (rate("full_bytes") * forwards + rate("full_back_bytes"))
            return flops * (forwards / rate("attention") + 2 / rate("attention_back")) + moved / rate("copy"), 0.0

        # an edge is a query and one of its blocks: the query is read, its part written and read; in the backward pass
        # two are read, and a part written and read
        edges = read / cfg.index_block_size
        attention = edges * 2 * heads * (3 * forwards / rate("edges") + 4 / rate("edges_back"))
        index_heads = cfg.n_kv_head * cfg.index_head_dim
        taught = 2 * (heads + 4 * index_heads) / cfg.index_kl_stride
        index = 2 * index_heads * scored / rate("index") + edges * taught / rate("edges_kl")
        return attention, forwards * index

    def pass_seconds(self, forwards):
        """Kernels between products, a token: norms and residuals; norms and RoPE of heads, which take three times as
        long as their bytes; rows of experts, taken and taken back; gates. And which queries chose each block."""
        cfg = self.cfg
        C, A = cfg.n_embd, cfg.n_expert_per_tok
        heads = (cfg.n_head + cfg.n_kv_head) * cfg.head_dim
        if self.attn == "msa":
            heads += (cfg.n_kv_head + 1) * cfg.index_head_dim
        forward = 9 * C + 6 * heads
        backward = 18 * C + 7 * heads
        if self.mlp == "moe":
            gates = A * cfg.expert_dim + cfg.shared_dim
            forward += 4 * A * C + 3 * gates
            backward += 4 * A * C + 5 * gates
        else:
            forward += 3 * cfg.dense_dim
            backward += 5 * cfg.dense_dim
        moved = 2 * (forwards * forward + backward)
        if self.attn == "msa":         # the plans of attention, of the KL and of the backward pass; copies
            plans = forwards * (1 + 1 / cfg.index_kl_stride) + 1
            moved += rate("plan_bytes") * plans * cfg.n_kv_head * cfg.index_topk_blocks
            moved += rate("msa_bytes") * cfg.n_head * cfg.head_dim
        spent = moved / rate("passes")
        if self.mlp == "moe" and A >= 8:  # torch.compile makes a slow kernel of sums over so many
            spent += 2 * (forwards + 1) * (A + 1) * C * (1 / rate("sums") - 1 / rate("passes"))
        return spent

    def gathered(self, mesh, at_root):
        """Elements that FSDP gathers for this layer alone: from all ranks, and from those with the same experts.
        at_root: what all ranks share is gathered with the rest of the model."""
        shared, experts = self.in_use(mesh)
        if mesh.ep == 1:
            shared, experts = shared + experts, 0
        if at_root or mesh.size == 1:
            shared = 0
        if mesh.replicas == 1:
            experts = 0
        return shared, experts

    def gather_seconds(self, mesh, at_root):
        """Weights in fp32, gathered for the forward and the backward pass; gradients, summed."""
        shared, experts = self.gathered(mesh, at_root)
        return 3 * (gather_seconds(4 * shared, mesh.size) + gather_seconds(4 * experts, mesh.replicas, mesh.ep))

    def wait_seconds(self, n, T, mesh, recompute):
        """What compute waits for, by term: tokens go to their experts and back, in bf16, and so do gradients; keys are
        gathered, and their gradients summed. A row's ranks are every ep-th."""
        cfg = self.cfg
        forwards = 2 if recompute else 1
        exchanges = 0.0
        if self.mlp == "moe":
            there = exchange_seconds(2 * n * cfg.n_expert_per_tok * cfg.n_embd, mesh.ep)
            exchanges = 2 * (forwards + 1) * there
        numbers = 2 * cfg.n_kv_head * cfg.head_dim
        if self.attn == "msa":
            numbers += cfg.index_head_dim
        keys = (forwards + 1) * gather_seconds(2 * n * mesh.cp * numbers, mesh.cp, mesh.ep)
        return dict(exchanges=exchanges, keys=keys)

def product_seconds(rows, cols, forwards, kind):
    """A token's product with a matrix (rows, cols): forward, and once each for the gradients of its input and of the
    weight. FLOPs at a rate, then the result is written."""
    flops = 2 * rows * cols * (forwards + 2)
    results = 2 * (forwards * rows + cols)
    return flops / rate(kind) + results / rate("copy")

class Planner:
    """Plans steps of one model on H200s.

    recompute  layers of the trunk keep their input alone
    mtp_every  steps from one with the MTP loss to the next
    room       bytes of a GPU; None: an H200's
    """

    def __init__(self, cfg, recompute=False, mtp_every=1, room=None):
        with torch.device("meta"):
            model = MiniMax(cfg)
        self.cfg = cfg
        self.recompute = recompute
        self.mtp_every = mtp_every
        self.room = rate("room") if room is None else room
        self.table = (cfg.vocab_size, cfg.n_embd)  # shape of the embedding, and of the head
        kinds = list(zip(cfg.attn_types, cfg.mlp_types))
        by_kind = {kind: PlannedLayer(cfg, *kind, block) for kind, block in zip(kinds, model.layers)}
        self.layers = [by_kind[kind] for kind in kinds]
        self.modules = []              # of MTP, all alike
        if cfg.n_mtp:
            module = PlannedLayer(cfg, cfg.mtp_attn_type, cfg.mlp_types[-1], model.mtp[0], is_module=True)
            self.modules = [module] * cfg.n_mtp
        self.all_layers = self.layers + self.modules
        self.counts = Counter(self.all_layers)

    def flops(self, T):
        """Useful FLOPs a token of a training step, the mean over steps with the MTP loss and without."""
        heads = 1 + len(self.modules) / self.mtp_every
        total = 6 * (heads * math.prod(self.table) + self.cfg.n_embd)
        for layer, count in self.counts.items():
            often = 1 / self.mtp_every if layer.is_module else 1
            total += count * often * sum(layer.flops(T).values())
        return total

    def kept(self, mesh):
        """Elements of parameters that a rank keeps: those that Muon moves, and those that AdamW does."""
        muon = 0
        adamw = 2 * shard_elements(self.table, mesh.size) + shard_elements((self.cfg.n_embd,), mesh.size)
        for layer, count in self.counts.items():
            of_layer = layer.kept(mesh)
            muon += count * of_layer[0]
            adamw += count * of_layer[1]
        return muon, adamw

    def root(self, mesh):
        """What FSDP gathers for the whole step, in elements: the tables, and of a small model all layers; and whether
        it is small."""
        if mesh.size == 1:
            return 0, False
        tables = 2 * mesh.size * shard_elements(self.table, mesh.size)
        shared = 0
        for layer, count in self.counts.items():
            of_all, experts = layer.in_use(mesh)
            shared += count * (of_all + experts if mesh.ep == 1 else of_all)
        at_root = 4 * (tables + shared) <= GATHER_AT_ONCE
        return tables + shared if at_root else tables, at_root

    def memory(self, rows, T, mesh=Mesh()):
        """Bytes on a rank at a step's worst moment, by what they hold. rows: those that it computes at once."""
        cfg = self.cfg
        n = rows * T / mesh.cp
        table = math.prod(self.table)
        muon, adamw = self.kept(mesh)
        constant = dict(weights=4 * (muon + adamw), moments=4 * (muon + 2 * adamw))
        root, at_root = self.root(mesh)
        input_bytes = 2 * n * cfg.n_embd
        kept = {}                      # by layers, with their weights in bf16
        own = {}                       # gradients of what a rank keeps of a layer
        gathered = {}                  # weights of a layer
        for layer in self.counts:
            kept[layer] = n * layer.bytes_kept(T) + 2 * sum(layer.in_use(mesh))
            own[layer] = 4 * sum(layer.kept(mesh))
            gathered[layer] = 4 * sum(layer.gathered(mesh, at_root))

        # the loss: all that layers store; two chunks of logits; the head's gradient, and one more for each MTP module;
        # the head in bf16, and a chunk's gradient
        stored = [kept[layer] if layer.is_module or not self.recompute else input_bytes for layer in self.all_layers]
        before = sum(stored)
        gradients = 4 * table * (1 + len(self.modules))
        logits = 2 * 2 * min(n, head_chunk(cfg)) * cfg.vocab_size + 4 * table
        found = [dict(
            constant, gradients=gradients, activations=before + 3 * input_bytes, logits=logits, gathered=4 * root)]

        # a layer's backward pass: what it and those before it have stored; gradients of those after it; with FSDP its
        # weights and those of the next one, its gradients before they are shared out and while they are, and the root's
        for number in reversed(range(len(self.all_layers))):
            layer = self.all_layers[number]
            following = self.all_layers[max(0, number - 1)]
            working = n * layer.bytes_working()
            if self.recompute and not layer.is_module:
                working += kept[layer]
            whole = 8 * root + 3 * gathered[layer] + gathered[following]
            found.append(dict(
                constant, gradients=gradients, activations=before + working, logits=0, gathered=whole))
            before -= stored[number]
            if not at_root:
                gradients += own[layer]

        # the end, where the root's gradients are shared out, and the update: Muon's matrices in bf16
        found.append(dict(constant, gradients=gradients, activations=0, logits=0, gathered=12 * root))
        found.append(dict(
            constant, gradients=4 * (muon + adamw), activations=self.bytes_updating(mesh), logits=0, gathered=0))
        return max(found, key=lambda parts: sum(parts.values()))

    def products_by_shape(self):
        """Matrices that Muon moves together -> {(shape, stack): how many}; a layer's experts are apart."""
        found = Counter()
        for layer, count in self.counts.items():
            for matrix in layer.products:
                found[matrix] += count
        return found

    def bytes_updating(self, mesh):
        """Bytes of bf16 matrices that Muon holds at most: a group's updates, and five times those of one shape."""
        groups = Counter()             # elements
        together = [0]
        for (shape, stack), count in self.products_by_shape().items():
            together.append(cdiv(count, mesh.size) * math.prod(shape))
            groups[stack] += together[-1]
        for layer, count in self.counts.items():
            for shape, stack in layer.own_experts(mesh):
                together.append(shard_elements(shape, mesh.replicas))
                groups[stack] += count * together[-1]
        return 2 * max(groups.values()) + 2 * 5 * max(together)

    def seconds(self, rows, T, mesh=Mesh(), parts=1):
        """Time of a step by term, on a rank that computes `rows` rows in so many parts. Gathers that compute hides are
        left out."""
        cfg = self.cfg
        n = rows * T / mesh.cp / parts
        root, at_root = self.root(mesh)
        total = dict.fromkeys(TERMS, 0.0)
        for layer, count in self.counts.items():
            often = 1 / self.mtp_every if layer.is_module else 1
            recompute = self.recompute and not layer.is_module
            found = layer.seconds(n, T, mesh, recompute)
            found["passes"] += 24 * sum(layer.gathered(mesh, at_root)) / rate("copy")  # FSDP copies what it gathers
            found["gathers"] = max(0.0, layer.gather_seconds(mesh, at_root) - sum(found.values()))
            found |= layer.wait_seconds(n, T, mesh, recompute)
            for term, value in found.items():
                total[term] += count * often * parts * value

        # the tables: the head's product, for the trunk and each module; logits are read twice and written twice; the
        # head's gradient, chunk by chunk. The root is gathered once, and its gradients are summed
        heads = 1 + len(self.modules) / self.mtp_every
        total["products"] += parts * n * heads * product_seconds(*self.table, 1, "matmul")
        chunks = cdiv(math.ceil(n), head_chunk(cfg))
        passes = n * (8 * cfg.vocab_size + 12 * cfg.n_embd) + math.prod(self.table) * (6 + 12 * chunks)
        total["passes"] += parts * heads * passes / rate("passes")
        total["passes"] += parts * 16 * root / rate("copy")
        total["gathers"] += parts * 2 * gather_seconds(4 * root, mesh.size)

        total["optimizer"], waits = self.update_seconds(mesh)
        total["exchanges"] += waits
        return total

    def update_seconds(self, mesh=Mesh()):
        """Clipping, Muon and AdamW -> seconds of compute, and of all-to-alls that bring matrices together and back."""
        muon, adamw = self.kept(mesh)

        # ranks share out the matrices of a shape; of experts each has whole matrices
        work = [(cdiv(count, mesh.size), *matrix) for matrix, count in self.products_by_shape().items()]
        leaving = 0                    # elements of shards
        for layer, count in self.counts.items():
            leaving += count * sum(shard_elements(shape, mesh.size) for shape, _ in layer.products)
            for (E, rows, cols), stack in layer.own_experts(mesh):
                work.append((count, (cdiv(E, mesh.replicas), rows, cols), stack))
        flops = sum(count * muon_work(shape, stack)[0] for count, shape, stack in work)
        results = sum(count * muon_work(shape, stack)[1] for count, shape, stack in work)

        # clipping reads a gradient, then reads and writes it; Muon's passes have copies of iterates among them; AdamW
        # reads the gradient, and reads and writes weight and moments
        moved = (12 + rate("muon_bytes")) * muon + (12 + 28) * adamw
        waits = 2 * exchange_seconds(2 * leaving, mesh.size)
        return flops / rate("matmul") + (results + moved) / rate("copy"), waits

    def fits(self, rows, T, mesh):
        return sum(self.memory(rows, T, mesh).values()) <= self.room

    def meshes(self, N, T, batch=None, sizes=()):
        """Meshes of N ranks that can share `batch` rows of T tokens equally (None: any number), in the order of the
        rule: few ranks share experts, then few a row. sizes: of --parallel, where it was given."""
        cfg = self.cfg
        sizes = dict(sizes or {})
        most_ep = cfg.n_expert if "moe" in cfg.mlp_types else 1
        found = []
        for ep in range(1, min(N, most_ep) + 1):
            for cp in range(1, N // ep + 1):
                if N % (ep * cp) or most_ep % ep:
                    continue
                mesh = Mesh(N // (ep * cp), ep, cp)
                cuts = cp == 1 or ContextShard.fits(T, cp, key_block(cfg), cfg.index_kl_stride)
                shares = batch is None or batch % (mesh.dp * ep) == 0
                if cuts and shares and sizes.items() <= mesh._asdict().items():
                    found.append(mesh)
        return found

    def plan(self, T, mesh, batch=None, parts=1):
        """A step on this mesh -> a row: memory by what it holds, seconds by term.

        batch  rows of the step; None: as many as fit, up to PLAN_TOKENS tokens
        parts  gradient accumulation
        """
        groups = mesh.dp * mesh.ep     # of ranks, which have rows of their own
        rows = 1
        if batch:
            rows = batch // groups
        else:
            while 2 * rows * groups * T <= PLAN_TOKENS and self.fits(cdiv(2 * rows, parts), T, mesh):
                rows *= 2
        memory = self.memory(cdiv(rows, parts), T, mesh)
        need = sum(memory.values())
        seconds = self.seconds(rows, T, mesh, min(parts, rows))
        step_s = sum(seconds.values())
        tokens = rows * groups * T
        a_gpu = tokens / step_s / mesh.size
        return dict(
            context=T, **mesh._asdict(), rows=rows * groups, tokens=tokens, fits=need <= self.room, bytes=need,
            memory=memory, step_s=step_s, seconds=seconds, tokens_per_s=tokens / step_s, tokens_per_s_gpu=a_gpu,
            mfu=a_gpu * self.flops(T) / PEAK["H200"])

    def choose(self, N, T, batch=None, parts=1, sizes=()):
        """Plans of a step on N ranks -> that of the rule, and the fastest that fits. Where none fits, the one that
        needs least, twice; without a mesh None, None. Arguments as of `meshes`.

        The rule: the fewest ranks that share experts with which a short row fits a rank; then the fewest that share a
        row with which the step fits.
        """
        plans = [self.plan(T, mesh, batch, parts) for mesh in self.meshes(N, T, batch, sizes)]
        fitting = [plan for plan in plans if plan["fits"]]
        if not fitting:
            least = min(plans, key=lambda plan: plan["bytes"], default=None)
            return least, least
        short = min(T, PLAN_CONTEXTS[0])
        by_rule = [plan for plan in fitting if self.fits(1, short, Mesh(N // plan["ep"], plan["ep"]))]
        return (by_rule or fitting)[0], max(fitting, key=lambda plan: plan["tokens_per_s"])

def make_plans(cfg, args):
    """What a step takes on args.gpus GPUs, at each context -> rows, as Planner.plan gives them, with the fastest mesh.
    ValueError for flags that no plan can be made for."""
    N = args.gpus
    if not {"full", "msa"}.issuperset(cfg.attn_types):
        raise ValueError(f"--attn {args.attn}: --gpus plans full attention and MSA alone")
    contexts = [args.seq_len]
    if args.seq_len is None:           # m2 and m3
        contexts = [T for T in PLAN_CONTEXTS if T <= cfg.max_seq_len]
    planner = Planner(cfg, is_recomputed(args), getattr(args, "mtp_every", 1))
    plans = []
    for T in contexts:
        check_row(T, cfg, args.preset)
        plan, fastest = planner.choose(N, T, args.batch_size, args.accumulate, args.parallel)
        if plan is None:
            of = f" of --parallel {spell(args.parallel)}" if args.parallel else ""
            rows = f"{args.batch_size} rows" if args.batch_size else "rows"
            raise ValueError(f"--gpus {N}: no mesh{of} shares {rows} of {T} tokens and the experts equally")
        plan["fastest"] = {name: fastest[name] for name in ("dp", "ep", "cp", "tokens_per_s")}
        plans.append(plan)
    return plans

def is_recomputed(args):
    """Whether a plan has layers that keep their input alone: m2's and m3's always."""
    return args.recompute or args.preset in ("m2", "m3")

def print_plans(plans, args):
    """What plans are computed from, then each."""
    recomputed = ", layers recomputed" if is_recomputed(args) else ""
    paper = "as one H200 was measured to run models of this size"
    if args.gpus > 1 or args.preset in ("m2", "m3"):
        paper = "on paper"
    print(f"  a step on {args.gpus:,} H200s, {NODE} to a node{recomputed}: {paper}, by a model with these numbers")
    for name, number in RATES.items():
        print(f"    {name:15} {number.value:9.3g} {number.unit:8} {number.origin}")
    for plan in plans:
        print_plan(plan)

def print_plan(plan):
    """A plan in a few lines: mesh and speed, memory, where the time goes; a faster mesh, if there is one."""
    def mesh_of(found):
        return spell({name: found[name] for name in ("dp", "ep", "cp")})

    memory = ", ".join(f"{name} {n_bytes / 1e9:.1f}" for name, n_bytes in plan["memory"].items())
    shares = {name: spent / plan["step_s"] for name, spent in plan["seconds"].items()}
    times = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share >= 0.0005)
    print(f"  at {plan['context']:,} tokens: {mesh_of(plan)}, {plan['rows']:,} rows, {plan['step_s']:.3g} s a step: "
          f"{plan['tokens_per_s']:,.0f} tokens/s, {plan['tokens_per_s_gpu']:,.0f} a GPU, MFU {plan['mfu']:.1%}")
    print(f"    memory  {plan['bytes'] / 1e9:.1f} GB a GPU{'' if plan['fits'] else ', WHICH DOES NOT FIT'}: {memory}")
    print(f"    time    {times}")
    fastest = plan["fastest"]
    if fastest["tokens_per_s"] > 1.05 * plan["tokens_per_s"]:
        ratio = fastest["tokens_per_s"] / plan["tokens_per_s"]
        print(f"    faster  {mesh_of(fastest)}: {ratio:.2f} times the tokens/s")

def dry_run(cfg, args):
    """Print parameters and bytes of a preset's model, and how the published figures come out -> the last line of
    stdout. The model, cfg, is made on torch's meta device, which has shapes and no memory."""
    preset = args.preset
    plans = make_plans(cfg, args) if args.gpus else []
    with torch.device("meta"):
        model = MiniMax(cfg)
        total, active = model.num_params()
        mtp, active_mtp = count_params(MiniMax(dataclasses.replace(cfg, n_mtp=1)).mtp[0])
    table = cfg.vocab_size * cfg.n_embd
    print(f"{preset}: {total:,} parameters, {active:,} active per token without embedding and head")
    own = preset_config(preset).attn_types
    if cfg.attn_types != own:
        counts = {kind: cfg.attn_types.count(kind) for kind in dict.fromkeys(cfg.attn_types)}
        print(f"  layers    {', '.join(f'{n} {kind}' for kind, n in counts.items())}: not as released")
    elif preset == "m2":
        print(f"  229.9B = {total + 2 * table:,}: with a second embedding and head of {table:,} each; not published")
        print(f"  9.8B   = {active:,}: all but embedding, head and the 248 of 256 experts not chosen")
    elif preset == "m3":
        print(f"  428B of the model card = {total / 1e9:.3f}B + the vision tower; 23B = {active / 1e9:.2f}B, or "
              f"{(active + 2 * table) / 1e9:.3f}B with embedding and head")
    if cfg.n_mtp:
        print(f"  of them {mtp:,} in each of {cfg.n_mtp} MTP modules, {active_mtp:,} active")
    else:
        print(f"  an MTP module adds {mtp:,} parameters, {active_mtp:,} active")
    print(f"  weights   {2 * total / 1e9:10.3f} GB bf16, {4 * total / 1e9:.3f} GB fp32")
    moments = 4 * (total + count_two_moments(model))  # bytes
    print(f"  optimizer {moments / 1e9:10.3f} GB fp32: one moment, two where AdamW works (not the matrices)")
    per_token, fixed = cache_bytes(cfg)
    constant = f" and {fixed:,} for all" if fixed else ""
    for T in (32_768, 196_608, 1_000_000):
        size = (per_token * T + fixed) / 1e9
        print(f"  KV cache  {size:10.3f} GB bf16 at {T:,} tokens: {per_token:,} bytes a token{constant}")
    window = args.window or usual_window(args)
    print_cache(dataclasses.replace(cfg, window=window))
    print_decoding(dataclasses.replace(cfg, window=window), args)
    found = dict(step=0, loss=None, val_bpb=None, tokens=0, tokens_per_s=None, mfu=None, params_total=total,
                 params_active=active, seconds=0.0)
    if plans:
        print_plans(plans, args)
        found |= dict(gpus=args.gpus, plan=plans)
    return found

def print_cache(cfg):
    """What one layer of each kind keeps, at a model's sizes; what MLA would keep, and why MSA does not."""
    D = cfg.head_dim
    kept = dict(
        full=f"keys and values of {cfg.n_kv_head} heads",
        msa=f"the same, and an index key of {cfg.index_head_dim} channels",
        swa=f"keys and values of the last {cfg.window:,} tokens",
        lightning=f"a state of {cfg.n_head} x {D} x {D} in fp32")
    if not cfg.index_head_dim:         # M2 has no index branch
        del kept["msa"]

    print("  a layer's cache, bf16")
    for kind, what in kept.items():
        one = dataclasses.replace(cfg, n_layer=1, attn_types=[kind], mlp_types=cfg.mlp_types[-1:])
        per_token, fixed = cache_bytes(one)
        size = f"{per_token:,} bytes a token" if per_token else f"{fixed:,} bytes in all"
        print(f"    {kind:9} {size:>24}: {what}")
    latent = MLA_LATENT + MLA_ROPE     # elements
    size = f"{2 * latent:,} bytes a token"
    print(f"    {'MLA':9} {size:>24}: DeepSeek-V3's latent of {MLA_LATENT} + {MLA_ROPE} (arXiv 2412.19437)")

    # absorbed: a score is a product over latent and RoPE part, the sum of values one of latents
    ratio = (latent + MLA_LATENT) / (2 * D)
    print(f"  why not MLA: absorbed, a query head pays {latent} + {MLA_LATENT} multiply-adds a key, not 2 x {D}: "
          f"{ratio:.2f} times; or it up-projects every key. MSA saves by reading few keys, not small ones")

def print_decoding(cfg, args):
    """Bytes of cache that a decoding step moves for one row, with some patterns of a preset's layers, and --attn's."""
    own = preset_config(args.preset)
    patterns = ["full", "swa:full=3:1", "lightning:full=7:1"]
    if "msa" in own.attn_types:
        patterns.insert(1, "msa")
    if args.attn not in [*patterns, "msa"]:
        patterns.append(args.attn)

    print("  a decoding step moves, of a row's cache")
    for pattern in patterns:
        try:
            kinds = layer_kinds(pattern, own)
        except ValueError:             # too few layers
            continue
        mixed = dataclasses.replace(cfg, attn_types=kinds)
        sizes = [f"{decode_bytes(mixed, T) / 1e9:.3f} GB at {T:,}" for T in (32_768, 1_000_000)]
        print(f"    {pattern:18} {', '.join(sizes)} tokens")

# ---- where a run stands --------------------------------------------------------------------------
# RunState holds all that a run counts; a checkpoint is this, the weights, the optimizers' states and the flags.
# A checkpoint is written in one of two ways. With an evaluation every --eval-every steps: only what passes is kept.
# Or by the clock, in between: then it is unproven, a file beside the checkpoint, whose weights nothing has judged yet.
# The next step computes their loss; if that is no spike, the file takes the checkpoint's place, else it is deleted.

@dataclasses.dataclass
class RunState:
    """Where a run stands between two steps: what a checkpoint calls `now`."""
    step: int = 0
    seconds: float = 0.0               # of training
    tokens: int = 0                    # that were learned from, pads left out
    flops: float = 0.0                 # useful ones, of these tokens
    ema: float | None = None           # running mean of the loss
    spread: float = 0.0                # running mean of a loss's distance from it
    above: int = 0                     # losses in a row that lay far above it
    bpb: float = math.inf              # lowest val_bpb of an evaluation
    usual: float = USUAL               # least that validation has been as a multiple of training, bits a byte
    sparse_from: float = 0.0           # share of the run from which attention is sparse
    sparse: bool = False               # whether it is
    joint_from: float = 0.0            # share of the run from which the trunk learns beside modules that have joined
    joint: bool = True                 # whether it does
    reached: float = 0.0               # share that rows and attention have come to: it never shrinks, whatever the end
    text: str = ""                     # hash of what is learned from and validated on
    run: str | None = None             # name of the run
    threads: int | None = None         # of the CPU: bits depend on it

@dataclasses.dataclass
class Run:
    """What a training run works with, from its start to its end."""
    args: argparse.Namespace
    device: torch.device
    model: MiniMax
    tokenizer: Tokenizer
    data: dict                         # train, val, preview: Tokens; skipped: number of files; text: hash of the text
    optimizers: list
    groups: tuple                      # parameters of the main model, of the index branch: each is clipped on its own
    now: RunState
    threads: Threads
    parallel: Parallel
    pending: list                      # (loss and norm, event) of steps that a GPU may still be at work on
    timer: SaveTimer | None = None
    unproven: str | None = None        # a checkpoint that waits for the loss of its weights
    saved: int | None = None           # step of the last evaluated checkpoint
    placed: bool = False               # whether a checkpoint of this process lies in the folder

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def progress(self):
        return share_done(vars(self.now), vars(self.args))

    def drain(self, running=0):
        """Wait for all steps but the last `running` ones, and check their losses. To wait for the last step, too, would
        leave a GPU idle while the next one is prepared. FloatingPointError if the run diverges."""
        while len(self.pending) > running:
            seen, event = self.pending.pop(0)
            if event:
                event.synchronize()
            loss, norm = seen.tolist()
            check_divergence(loss, norm, self.now)

    def log(self, kind, **values):
        """Append a line to the run's log: of what kind it is, where the run stands, and these values."""
        if not self.parallel.world.is_first:
            return
        now = self.now
        share = min(1.0, self.progress())
        where = dict(kind=kind, run=now.run, step=now.step, share=share, seconds=now.seconds)
        append_line(log_path(self.args.out), {**where, **values})

    def write(self):
        """Write all there is between two steps into a new file beside the checkpoint -> its path. Rank 0 writes; the
        others, who give it their parts, have the path of nothing."""
        began = self.timer.clock()
        self.now.threads = None if self.on_gpu else self.threads.count
        kept = checkpoint_parts(self.args, self.model, self.tokenizer, self.optimizers, self.parallel)
        path = os.devnull
        if self.parallel.world.is_first:
            path = write_checkpoint(self.args.out, now=dict(vars(self.now)), **kept)
        self.timer.saved(began)
        return path

    def settle_unproven(self):
        """Keep the unproven checkpoint if the loss of its weights, which the step after it measured, was no spike."""
        self.drain()
        if self.now.above:
            self.drop_unproven()
        else:
            self.place(self.unproven)
        self.unproven = None

    def drop_unproven(self):
        """Remove the unproven checkpoint."""
        if self.parallel.world.is_first:
            os.remove(self.unproven)

    def place(self, temporary):
        """Give a written checkpoint its name. With the run's first one, other runs' lines leave the log."""
        if not self.parallel.world.is_first:
            return
        place_checkpoint(self.args.out, temporary, self.now.run)
        if not self.placed:
            begin_log(self.args.out, self.now.run, self.now.step)
            self.placed = True

    def evaluate(self, tokens, seconds):
        """Bits per byte of these tokens, in so many seconds, with the attention of the last step."""
        index_warmup = not self.now.sparse
        return evaluate(
            self.model, tokens, self.args.seq_len, EVAL_ROWS, self.device, seconds, self.tokenizer, index_warmup,
            self.parallel)

    def checkpoint(self):
        """Evaluate on the first bytes of validation, and save -> what was found, and the seconds that it took.
        FloatingPointError, and nothing is saved, if val_bpb is 1.5 times the lowest: the last good checkpoint stays."""
        now = self.now
        self.drain()
        began = time.perf_counter()
        found = self.evaluate(self.data["preview"], allowed_seconds(self.args))
        took, = self.parallel.world.agree(time.perf_counter() - began)

        bits = train_bits(now, self.data)
        if bits > 0:  # not before the first step
            now.usual = min(now.usual, max(1.0, found["val_bpb"] / bits))
        print(f"eval {now.step:05d} | {report(found)}{remark(found, bits, now.usual)} | "
              f"first {found['val_bytes']:,} bytes", flush=True)
        self.log("eval", train_bpb=bits, **found)
        if not found["val_bpb"] <= WORSE * now.bpb:
            raise FloatingPointError(f"val_bpb {found['val_bpb']:.3f} after {now.bpb:.3f}")
        now.bpb = min(now.bpb, found["val_bpb"])
        self.place(self.write())
        self.saved = now.step
        return found, took

def checkpoint_parts(args, model, tokenizer, optimizers, parallel=Parallel(World())):
    """What checkpoints of train.py and rl.py have in common -> dict, whose tensors rank 0 alone has. FloatingPointError
    if a weight is not finite: the checkpoint that was written before stays."""
    weights = parallel.weights(model)
    if parallel.world.is_first:
        check_finite(weights)
    return dict(
        args={name: value for name, value in vars(args).items() if name not in RUN_ALONE},
        config=dataclasses.asdict(model.cfg),
        tokenizer=tokenizer.spec,
        model=weights,
        optimizers=parallel.moments(model, optimizers))

def allowed_seconds(args):
    """Seconds that an evaluation may take."""
    if args.minutes is None:
        return math.inf
    return 60 * args.minutes * EVAL_SHARE

def share_done(now, args):
    """Progress: the share of the steps that are done, or of the minutes, whichever is larger; 1 is the end.

    now, args   dicts, as a checkpoint of train.py or rl.py has them; rl.py's minutes count from the end of its
                imitation, after now["warm"] seconds
    """
    of_steps = 0.0
    of_minutes = 0.0
    if args.get("steps"):
        of_steps = now["step"] / args["steps"]
    if args.get("minutes"):
        warm = now.get("warm", 0.0)
        of_minutes = (now["seconds"] - warm) / max(60 * args["minutes"] - warm, 1e-9)
    return max(of_steps, of_minutes)

def later(share, part):
    """The share of a run at which `part` of what is left after `share` is done."""
    return share + (1 - share) * part

def cut_at(share, args):
    """Into how many parts rows are cut at this share of the run; a part has at least 16 tokens."""
    cuts = [n for first, n in args.stages if share >= first]
    return min(cuts[-1], args.seq_len // 16)

def stage_at(share):
    """Name of the schedule's stage at this share of the run."""
    if share < WARMUP:
        return "warm-up"
    return "decay" if share > 1 - DECAY else "constant"

# ---- a run's log ---------------------------------------------------------------------------------
# Each line on the screen about a step or an evaluation is a line of JSON in FOLDER/log.jsonl, too: kind is "step",
# "eval" or "final". It is written at once, so that a killed process leaves whole lines. A resumed run goes on in the
# file, without the lines of steps after its checkpoint: these steps are done again. A new run begins anew, once its
# first checkpoint has taken the place of another run's: until then that one may go on, and its lines stay.

def log_path(folder):
    return os.path.join(folder, "log.jsonl")

def check_log(folder):
    """ValueError if no log can be written into the folder: seen now, not after minutes of training."""
    path = log_path(folder)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"--out {folder}: {path} is in the way of the log: it is not a file")

def read_log(folder):
    """-> the log's lines, dicts; none where there is no log. What is no such line is left out."""
    lines = []
    if not os.path.isfile(log_path(folder)):
        return lines
    with open(log_path(folder), "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:  # not JSON, or no UTF-8
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines

def begin_log(folder, run, step):
    """Keep of the folder's log what this run wrote up to this step: nothing of it, if the run is new. Beside it stays
    what the run of the checkpoint that lies there wrote: this one may be killed before it has one of its own."""
    last_steps = {run_of(checkpoint_path(folder)): math.inf, run: step}  # run -> the last step whose lines are kept
    file, temporary = new_temporary(folder)
    with file:
        for line in read_log(folder):
            if line["step"] <= last_steps.get(line.get("run"), -1):
                file.write(to_json(line))
    os.replace(temporary, log_path(folder))  # a link is not followed

def append_line(path, values):
    """Append a line of JSON to the file. OSError, and the file is as it was, if it cannot be written whole."""
    line = to_json(values)
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError("the disk is full, or a limit on the size of files is reached")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; the last checkpoint is kept") from None

def to_json(values):
    """A dict of numbers, words and lists -> a line of JSON, bytes. A number that is not finite becomes null."""
    def plain(value):
        if isinstance(value, list):
            return [plain(x) for x in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    line = {name: plain(value) for name, value in values.items()}
    return json.dumps(line, allow_nan=False).encode() + b"\n"

def draw(path, lines, title):
    """--figure: a run's curves over its steps: bits a byte of training and of validation, below them the rate.

    path   file to write
    lines  of the log
    title  above the chart
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator
    figure = Figure((7, 5), layout="constrained")
    bits, rate = figure.subplots(2, sharex=True, height_ratios=(3, 1))

    def plot(axis, kinds, name, style, label):
        """What lines of these kinds have under that name, where they have it."""
        found = [line for line in lines if line["kind"] in kinds and line.get(name) is not None]
        if found:
            steps = [line["step"] for line in found]
            values = [line[name] for line in found]
            axis.plot(steps, values, style, ms=4, label=label)

    plot(bits, ["step"], "train_bpb", "-", "training, running mean")
    plot(bits, ["eval"], "val_bpb", "o-", "validation, its beginning")
    plot(bits, ["final"], "val_bpb", "D", "validation, all of it")
    plot(rate, ["step"], "lr", "-", "rate")

    # the first losses are several times the last ones, and would flatten them: an axis of ratios, in plain numbers
    bits.set(title=title, ylabel="bits a byte", yscale="log")
    bits.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
    bits.yaxis.set_major_formatter("{x:.3g}")
    bits.yaxis.set_minor_formatter("")
    bits.grid(alpha=0.3)
    if bits.lines:
        bits.legend()
    rate.set(xlabel="step", ylabel="rate")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format=figure_format(path))

# ---- starting and resuming -----------------------------------------------------------------------
# set_up makes a run, in an order that keeps refusals early: the checkpoint's model first, then memory, then the text,
# which takes seconds to read. A resumed run may change its end, its rate, its text, once its attention, from full to
# sparse, and its number of MTP modules, to more: what such a change does to the schedule is printed. What was reached,
# longer rows and sparse attention, stays.

class Laps:
    """Where the time of a start goes; as a str, seconds in all and of each part that takes some."""

    def __init__(self):
        self.began = time.perf_counter()
        self.last = self.began
        self.seconds = {}              # name of a part -> its seconds

    def end(self, part):
        """What began when the part before it ended is done."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def __str__(self):
        parts = [f"{part} {seconds:.1f}" for part, seconds in self.seconds.items() if seconds >= 0.05]
        whole = f"{self.last - self.began:.1f} s"
        return f"{whole}: {', '.join(parts)}" if parts else whole

def prepare(args, cfg, tokenizer, laps):
    """Text -> tokenizer (learned from the training side where there is none), and a dict of what the run reads.
    Tokenizer and ids come from the cache where an earlier start has kept them. laps, Laps, is told of each part."""
    train, val, skipped = load_data(args.data, args.val_data, VAL_BYTES)
    text = hash_text(train, val)
    laps.end("text")
    if tokenizer is None:
        tokenizer = Tokenizer(learn_tokens(train, text, args.vocab_size))
    laps.end("tokenizer")

    L = key_block(cfg)
    docs = dict(train=train, val=val, preview=truncate(val, VAL_BYTES // 8))  # for the evaluations on the way
    encoded = dict(train=encode_once(train, tokenizer, text))
    data = {side: Tokens(docs[side], tokenizer, L, args.seq_len, encoded.get(side)) for side in docs}
    data["skipped"] = skipped
    data["text"] = text
    laps.end("encoding")
    return tokenizer, data

def learn_tokens(docs, text, vocab_size):
    """learn_bpe of the documents, once for a text -> the spec of a Tokenizer. text: its hash_text."""
    path = cache_path("tokenizer", text, vocab_size, PATTERN, LEARN_FROM)
    spec = read_cache(path)
    if spec is None:
        spec = learn_bpe((words for _, words in docs), vocab_size, PATTERN)
        write_cache(path, spec)
    return spec

def encode_once(docs, tokenizer, text):
    """`encode` of the documents to train on, once for a text and a tokenizer. text: its hash_text."""
    path = cache_path("ids", text, ENCODED, sorted(tokenizer.spec.items()))
    kept = read_cache(path)
    if kept is None:
        encoded = encode(tokenizer, [words for _, words in docs])
        ids = torch.from_numpy(np.concatenate(encoded))
        kept = dict(lengths=[len(text_ids) for text_ids in encoded], ids=ids)
        if write_cache(path, kept):
            print(f"cache   | this text's tokens are kept in {os.path.dirname(path)} for the next start", flush=True)
        elif path:
            print(f"cache   | {os.path.dirname(path)} cannot keep this text's tokens: the next start learns them anew",
                  flush=True)
    ends = np.cumsum(kept["lengths"])
    return np.split(kept["ids"].numpy(), ends[:-1])

def hash_text(*sides):
    """Lists of (name, text) -> a name for their text, by which a resumed run knows it again."""
    digest = hashlib.sha256()
    for side in sides:
        for _, text in side:
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
        digest.update(b"|")
    return digest.hexdigest()

def convert(old, saved, step, args):
    """A model with full attention -> one with the preset's MSA layers, and the states of its optimizers. Weights and
    states are kept by name; index branches are new.

    old, saved   the model, and its optimizers' states as a checkpoint has them, after `step` steps
    ValueError if the model is not of --preset.
    """
    cfg = dataclasses.replace(configure(args), vocab_size=old.cfg.vocab_size, n_mtp=old.cfg.n_mtp)
    new = MiniMax(cfg, old.dtype)
    try:
        missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
        fits = not unexpected and all(map(is_index, missing))
    except RuntimeError:  # shapes differ
        fits = False
    if not fits:
        raise ValueError(f"--attn msa: the checkpoint's model is not of --preset {args.preset}")
    new = new.to(old.embed.weight.device)
    return new, carry_states(old, new, saved, step)

def add_modules(old, saved, step, n_mtp):
    """A model -> one with more MTP modules, and the states of its optimizers: weights and states are kept by name. Each
    new module is a copy of the last one, as a random one would disturb the trunk (M2 report); without one it is random.
    Its optimizer state is new.

    old, saved   the model, and its optimizers' states as a checkpoint has them, after `step` steps
    n_mtp        modules of the new model
    """
    new = MiniMax(dataclasses.replace(old.cfg, n_mtp=n_mtp), old.dtype).to(old.embed.weight.device)
    new.load_state_dict(old.state_dict(), strict=False)
    if old.mtp:
        for module in new.mtp[len(old.mtp):]:
            module.load_state_dict(old.mtp[-1].state_dict())
    return new, carry_states(old, new, saved, step)

def carry_states(old, new, saved, step):
    """`saved`, the states of the optimizers of `old` after `step` steps -> those of `new`, a model that has the same
    parameters and more. What is new has no state."""
    params = dict(new.named_parameters())
    sources = configure_optimizers(old, 1.0)[0]  # rates are set before each step
    targets = configure_optimizers(new, 1.0)[0]
    load_optimizers(sources, saved, step)
    for source, target in zip(sources, targets):
        for name, p in old.named_parameters():
            if p in source.state:
                target.state[params[name]] = source.state[p]
    return [target.state_dict() for target in targets]

def check_match(cfg, state, args):
    """ValueError unless a checkpoint's model is the one that its args describe, and --mtp goes on with it."""
    modules = state["args"].get("mtp", cfg.n_mtp)  # older args lack it
    if modules != cfg.n_mtp:
        raise ValueError(f"the checkpoint's args say --mtp {modules}, its model has {cfg.n_mtp}")
    if args.mtp < cfg.n_mtp:
        raise ValueError(f"--mtp {args.mtp}: the checkpoint has {cfg.n_mtp} MTP modules, and none is dropped")
    saved = state["args"]["attn"]
    own = preset_config(args.preset).attn_types
    if saved == "msa" and "msa" in own:
        fits = "msa" in cfg.attn_types
    elif saved == "msa":               # as the preset has it: M2's pattern has none
        fits = cfg.attn_types == own
    else:
        fits = layer_kinds(saved, cfg) == cfg.attn_types
    if not fits:
        raise ValueError(f"the checkpoint's args say --attn {saved}, its layers are {' '.join(cfg.attn_types)}")
    window = state["args"].get("window") or 0
    sink = state["args"].get("sink", False)
    if (window, sink) != (cfg.window, cfg.window_sink):
        raise ValueError(f"the checkpoint's args say --window {window}{' --sink' if sink else ''}, its model has a "
                         f"window of {cfg.window}, {'with' if cfg.window_sink else 'without'} a sink")
    if args.seq_len > cfg.max_seq_len:
        raise ValueError(f"the checkpoint's args say --seq-len {args.seq_len}, its model has {cfg.max_seq_len}")
    if "msa" in cfg.attn_types and args.seq_len % cfg.index_block_size:
        raise ValueError(f"the checkpoint's --seq-len {args.seq_len} is not whole key blocks of {cfg.index_block_size}")

def resume_state(fresh, state, args, data):
    """Where a checkpoint's run stood, over what a new run starts with, `fresh` -> RunState. What was measured on
    another text is dropped. Older checkpoints lack what was added later: it is derived from what they have."""
    old, was = state["now"], state["args"]
    known = {name: old[name] for name in vars(fresh) if name in old}
    now = dataclasses.replace(fresh, **{**known, "run": old.get("run"), "text": fresh.text})
    if "reached" not in old:
        now.reached = share_done(old, was)
    if "sparse" not in old:
        now.sparse = now.reached >= now.sparse_from
    same_place = all(was.get(name) == getattr(args, name) for name in ("data", "val_data"))
    same_text = old["text"] == fresh.text if "text" in old else same_place
    if not same_text:
        now.bpb = math.inf
    if "tokens" not in old:  # their FLOPs count pads: they are the same share of all
        filled = data["train"].n_tokens / len(data["train"].begin)
        now.tokens = round(filled * now.step * args.batch_size * args.seq_len)
        now.flops *= filled
    return now

def print_changes(state, args, now):
    """Print what a resumed run changes: the schedule, if the run has another end or rate now, and the text."""
    old, was = state["now"], state["args"]
    before = min(1.0, share_done(old, was))
    after = min(1.0, share_done(vars(now), vars(args)))
    if before != after or was.get("lr") != args.lr:
        old_rate = was.get("lr") * schedule(before, WARMUP, DECAY)
        new_rate = args.lr * schedule(after, WARMUP, DECAY)
        line = (f"{before:.0%} of the run is now {after:.0%} of it; rate {old_rate:.1e} ({stage_at(before)}) -> "
                f"{new_rate:.1e} ({stage_at(after)})")
        if mtp_weight_at(before) != mtp_weight_at(after):
            line += f", MTP weight {mtp_weight_at(before)} -> {mtp_weight_at(after)}"
        rows_before = args.seq_len // cut_at(now.reached, args)
        rows_after = args.seq_len // cut_at(after, args)
        if rows_before > rows_after:
            line += f"; rows stay at {rows_before} tokens"
        if rows_before < rows_after:
            line += f"; rows grow from {rows_before} to {rows_after} tokens"
        if "msa" in args.attn and now.sparse and after < now.sparse_from:
            line += "; attention stays sparse"
        if "msa" in args.attn and not now.sparse and after >= now.sparse_from:
            line += "; attention becomes sparse"
        if not now.joint and after >= now.joint_from:
            line += "; the trunk learns again"
        print(f"resume  | step {now.step}: {line}", flush=True)

    had = state["config"]["n_mtp"]
    if args.mtp > had:
        which = f"module {args.mtp} joins" if args.mtp == had + 1 else f"modules {had + 1} to {args.mtp} join"
        origin = f"a copy of module {had}" if had else "random"
        print(f"resume  | step {now.step}: MTP {which}, {origin}", flush=True)

    if old.get("text", now.text) != now.text:
        here = args.data or "the Python standard library"
        there = was.get("data") or "the Python standard library"
        changed = f"{here}, which has changed since" if here == there else f"{there}, and {here} is another text"
        print(f"text    | the checkpoint was trained on {changed}: val_bpb compares with none before", flush=True)

def mtp_weight_at(share):
    """Weight of the MTP loss at this share of the run."""
    return MTP_WEIGHT[1] if share > 1 - DECAY else MTP_WEIGHT[0]

def card(run, why, laps):
    """Print what a run is made of: the start-up card. why: of the device and dtype; laps: Laps of the start."""
    args = run.args
    model = run.model
    data = run.data
    now = run.now
    cfg = model.cfg
    total, active = model.num_params()
    S, L, T = cfg.index_topk_blocks, cfg.index_block_size, args.seq_len
    print(f"model   | {args.preset}: {total:,} parameters, {active:,} active per token without embedding and head")
    print(f"device  | {run.device}, {str(model.dtype).removeprefix('torch.')}: {why}")
    print(f"threads | {run.threads}")
    if run.parallel.world.size > 1:
        print(f"ranks   | {run.parallel}")
    modules = "MTP modules" if cfg.n_mtp > 1 else "MTP module"
    print(f"layers  | attention {' '.join(cfg.attn_types)}; mlp {' '.join(cfg.mlp_types)}; {cfg.n_mtp} {modules}")
    if "msa" in cfg.attn_types:
        since = "as before" if now.sparse else f"from {now.sparse_from:.0%} of the run"
        unseen = "; with cp an evaluation does not measure its recall" if run.parallel.cp > 1 else ""
        print(f"msa     | {S} blocks of {L}: {min(S * L, T)} of {T} keys, {since}{unseen}")
    if "swa" in cfg.attn_types:
        sink = ", with a sink" if cfg.window_sink else ""
        print(f"window  | {min(cfg.window, T)} of {T} keys{sink}")
    if not now.joint:
        print(f"mtp     | its modules learn alone until {now.joint_from:.0%} of the run: the trunk is frozen")
    shared = " + 1 shared" if cfg.shared_dim else ""
    print(f"experts | {cfg.n_expert_per_tok} of {cfg.n_expert}{shared}")
    print(f"kernels | {implementations(model, run.device, trains=True, decodes=False)}")
    rows = dict.fromkeys(str(T // min(n, T // 16)) for _, n in args.stages)
    print(f"step    | up to {args.batch_size * T:,} tokens (pads do not count), in rows of {' then '.join(rows)}; "
          f"Muon + AdamW, rate {args.lr:g}, seed {args.seed}")
    print(f"data    | {args.data or 'the Python standard library'}: {data['train'].n_tokens:,} tokens; validation "
          f"{data['val'].n_bytes:,} bytes; {data['skipped']} files skipped; vocabulary {cfg.vocab_size:,}")
    if data["val"].n_bytes < FEW_BYTES:
        print(f"notice  | {data['val'].n_bytes:,} bytes of validation are too few to compare runs by: val_bpb is "
              "uncertain by several percent; give --val-data")
    if not peak_flops(run.device):
        print(f"mfu     | none: the dense bf16 peak of {device_name(run.device)} is not known")
    if cfg.vocab_size < args.vocab_size:
        print(f"vocab   | {cfg.vocab_size:,} tokens, not {args.vocab_size:,}: the text has no more pairs to merge")
    first = ", ".join(map(str, SaveTimer.FIRST))
    print(f"saves   | after {first} s and each minute, in {args.out}; with an evaluation every {args.eval_every} steps")
    print(f"ready   | {laps}", flush=True)

def set_up(args, state):
    """Everything that a run works with, its start-up card printed -> Run. state: the checkpoint, None for a new run.
    ValueError if checkpoint, data, memory and flags do not go together."""
    laps = Laps()
    world = World.from_env()
    device, dtype, why = pick_device(args.device, world)
    world.join(device)
    laps.end("device")

    # the model: of the checkpoint, perhaps with sparse attention from now on
    torch.manual_seed(args.seed)
    model = tokenizer = None
    converted = grown = False
    if state:
        world.check_same(checkpoint_path(args.out), f"{state['now'].get('run')} {state['now']['step']}")
        model, tokenizer, converted, grown = read_model(args, state, device, dtype, world)
    cfg = model.cfg if model else configure(args)

    # memory and text, then a new model of the text's vocabulary
    parallel = share_out(args, cfg, device, world)
    laps.end("model")
    with world.first():                # the others find tokenizer and tokens in the cache
        tokenizer, data = prepare(args, cfg, tokenizer, laps)
    world.check_same("the text", data["text"])
    cfg.vocab_size = tokenizer.n_vocab
    if model is None:
        place = device
        if world.size > 1:
            with torch.device("meta"):
                place = place_whole(MiniMax(cfg).state_dict(), device, world)
        with torch.device(place):      # a GPU draws the weights of `small` at once, a CPU in seconds
            model = MiniMax(cfg, dtype)
    parallel.shard(model)
    model.train()
    optimizers, index, rest = configure_optimizers(model, args.lr)

    # where it stands
    now = RunState(sparse_from=args.msa_from, text=data["text"], run=os.urandom(8).hex())
    if state:
        parallel.load_moments(model, optimizers, state["optimizers"], state["now"]["step"])
        now = resume_state(now, state, args, data)
    run = Run(
        args=args, device=device, model=model, tokenizer=tokenizer, data=data, optimizers=optimizers,
        groups=(rest, index), now=now, threads=Threads(device, args.threads, now.threads, world), parallel=parallel,
        pending=[], saved=now.step if state else None)
    if grown:
        start_modules(run)
    if converted:
        start_index_branch(run)
    laps.end("model")

    # what computes
    if run.on_gpu:
        compile_model(model, optimizers[0])
        warm_compile(run)
        laps.end("compiling")
    if run.threads.count is None:
        run.threads.choose(trial(run), args.steps)
        laps.end("threads")
    if not now.joint:  # only now: what is compiled needs gradients, in steps without MTP, too
        freeze_trunk(model)
    card(run, why, laps)
    if state:
        print_changes(state, args, now)
    run.timer = SaveTimer()
    return run

def read_model(args, state, device, dtype, world):
    """A checkpoint's model, changed as the flags ask for -> model, tokenizer, whether it was converted to MSA, whether
    MTP modules have joined. ValueError if checkpoint and flags do not go together."""
    place = device
    if world.size > 1:
        place = place_whole(state["model"], device, world)
    model, tokenizer = load_model(state, place, dtype)
    if args.mtp is None:               # older args lack it
        args.mtp = model.cfg.n_mtp
    check_match(model.cfg, state, args)
    step = state["now"]["step"]
    converted = args.attn != state["args"]["attn"]
    if converted:
        model, state["optimizers"] = convert(model, state["optimizers"], step, args)
    grown = args.mtp > model.cfg.n_mtp
    if grown:
        model, state["optimizers"] = add_modules(model, state["optimizers"], step, args.mtp)
    return model, tokenizer, converted, grown

def share_out(args, cfg, device, world):
    """Meet the other ranks -> Parallel. ValueError if rows, sizes of --parallel or memory do not fit."""
    sized = dataclasses.replace(cfg, vocab_size=args.vocab_size)
    sizes = args.parallel
    if world.size > 1 and device.type == "cuda" and not sizes:
        room, = world.smallest(free_memory(device))
        sizes = usual_sizes(sized, args, world.size, room)
    parallel = Parallel.join(world, device, sizes, cfg)
    parallel.check_rows(args, cfg)
    mesh = Mesh(parallel.dp, parallel.ep, parallel.cp)
    rows = cdiv(args.batch_size, args.accumulate * mesh.dp * mesh.ep)
    need = step_bytes(sized, rows, args.seq_len, device, args.recompute, mesh)
    check_memory(need, device, "--accumulate, --recompute, --batch-size or --seq-len")
    return parallel

def usual_sizes(cfg, args, N, room):
    """--parallel where it is not given, for N GPUs with so many bytes of room: rows alone are shared out where that
    fits; else experts, too, or the tokens of a row, by the planner's rule. None where it has no plan that fits."""
    if not {"full", "msa"}.issuperset(cfg.attn_types):
        return None
    planner = Planner(cfg, args.recompute, args.mtp_every, room)
    plan, _ = planner.choose(N, args.seq_len, args.batch_size, args.accumulate)
    if plan is None or not plan["fits"]:
        return None
    return {name: plan[name] for name in ("dp", "ep", "cp")}

def place_whole(weights, device, world):
    """Where a whole model of these weights, by name, is made before ranks take their parts: on the GPU if it fits
    twice on each, else in the machine's memory, from where its layers go to the GPU one by one. A GPU draws other
    numbers than a CPU: all ranks must draw on the same."""
    if device.type == "cpu":
        return device
    size = sum(4 * t.numel() for t in weights.values() if isinstance(t, torch.Tensor))  # load_model looks at the rest
    room, = world.smallest(free_memory(device))
    return device if size < room / 2 else torch.device("cpu")

def start_modules(run):
    """Let the MTP modules, of which some have just joined, learn alone for a share of what is left."""
    now = run.now
    now.joint = False
    now.joint_from = later(run.progress(), MTP_ALONE)
    if run.progress() >= 1:
        K = run.args.mtp
        raise ValueError(f"--mtp {K}: nothing is left of the run to train in; give more --steps or --minutes")

def start_index_branch(run):
    """Let the index branch, which has just joined, learn for the same share of what is left as of a new run, once the
    trunk learns."""
    now = run.now
    begins = run.progress()
    if not now.joint:
        begins = max(begins, now.joint_from)
    now.sparse = False
    now.sparse_from = later(begins, run.args.msa_from)
    if run.progress() >= 1:
        raise ValueError("--attn msa: nothing is left of the run to convert in; give more --steps or --minutes")

def trial(run):
    """-> a function that runs a step's forward and backward passes, on few tokens, and leaves the model as it was: with
    it, Threads finds out whether one CPU thread is faster than all."""
    args = run.args
    T = min(args.seq_len, 256)
    batch = get_batch(run.data["train"], args.seed, 0, 0, max(1, 1024 // T), T)

    def step():
        train_step(run.model, batch, [], run.groups, mtp_weight=1.0, index_warmup=True)
        run.model.zero_grad(set_to_none=True)
    return step

# ---- the loop ------------------------------------------------------------------------------------
# A step: set its mode, compute, check the loss, count, print now and then, save now and then. On a GPU the check comes
# a step late: while the GPU is at work on one step, the CPU prepares the next. Whatever ends the run, --steps, the
# minutes, Ctrl-C or SIGTERM, it saves, evaluates once more, and says in JSON what has become of it.

class StepReport:
    """What steps have reported since the last line was printed."""

    def __init__(self, run):
        self.run = run
        self.kl = math.nan             # of the index branch; nan: none yet
        self.start_anew()

    def start_anew(self):
        """Forget what was reported: a line has been printed."""
        self.since = dataclasses.replace(self.run.now)
        self.load = 0.0                # (layers, experts) tokens that chose an expert
        self.mtp = []                  # each MTP module's loss; none yet

    def add(self, found):
        """Note what train_step found. Nothing is read from the GPU, which would have to finish first."""
        n_layers = self.run.model.cfg.mlp_types.count("moe")  # after them come the MTP modules' loads
        self.load = self.load + found["expert_load"][:n_layers]
        if len(found["mtp_loss"]):
            self.mtp = found["mtp_loss"]

    def measure(self, found, rate):
        """What a step's line tells, by name: losses, rate, norm, balance of the experts, speed. nan: none yet."""
        run = self.run
        now = run.now
        if len(found["index_kl"]):
            self.kl = found["index_kl"].mean().item()
        violations = []
        if "moe" in run.model.cfg.mlp_types:
            violations = max_violation(self.load).tolist()
        tokens_per_s, mfu = speed(now, self.since, run.device)
        return dict(
            loss=math.nan if now.ema is None else now.ema,
            train_bpb=train_bits(now, run.data),
            mtp=list(map(float, self.mtp)),  # by depth
            kl=self.kl,
            lr=rate,
            norm=found["norms"][0].item(),
            max_vio=violations,        # by layer, as in an evaluation
            tokens_per_s=tokens_per_s,
            mfu=mfu)

    def print_step(self, found, rate):
        """One line on the screen and one in the log: how far, what was measured, and on the screen the time left."""
        run = self.run
        now = run.now
        seen = self.measure(found, rate)
        run.log("step", **seen)

        losses = [
            ("loss", [seen["loss"]], 3),
            ("train_bpb", [seen["train_bpb"]], 3),
            ("mtp", seen["mtp"], 3),
            ("kl", [seen["kl"]], 4)]
        shown = ""
        for name, values, digits in losses:
            words = [f"{value:.{digits}f}" for value in values if not math.isnan(value)]
            if words:
                shown += f"{name} {' '.join(words)} | "
        part = min(1.0, run.progress())
        minutes_left = now.seconds * (1 / part - 1) / 60
        violation = max(seen["max_vio"], default=math.nan)
        speed = f"{seen['tokens_per_s']:,.0f} tok/s"
        if seen["mfu"]:
            speed += f", mfu {seen['mfu']:.1%}"
        print(f"step {now.step:05d} {part:4.0%} | {shown}lr {rate:.1e} | norm {seen['norm']:.2f} | "
              f"maxvio {violation:.2f} | {speed} | eta {minutes_left:.1f}m", flush=True)
        self.start_anew()

def next_batch(run, cut, run_mtp):
    """The step's batch on the device, its tokens and FLOPs counted -> batch, how many of its tokens are learned from.
    Pads are computed, too, but are neither tokens learned from nor useful FLOPs."""
    args = run.args
    now = run.now
    batch = get_batch(run.data["train"], args.seed, 0, now.step, args.batch_size * cut, args.seq_len // cut)
    real = batch["targets"] >= 0
    n_real = int(real.sum())
    now.tokens += n_real
    if n_real:
        flops = run.model.flops_per_token(batch["pos"][real], not now.sparse, run_mtp, frozen=not now.joint)
        now.flops += n_real * flops
    if run.on_gpu:
        batch = {key: x.pin_memory() for key, x in batch.items()}
    return {key: x.to(run.device, non_blocking=True) for key, x in batch.items()}, n_real

def run_training(args, state):
    """Train until the end that the flags name, or a signal -> what the last line of stdout says."""
    if args.dry_run:
        return dry_run(configure(args), args)
    run = set_up(args, state)
    now = run.now
    stop = on_signals()
    world = run.parallel.world
    if world.is_first:
        begin_log(args.out, now.run, now.step)
    report = StepReport(run)
    if run.progress() >= 1:
        print(f"nothing left to do after step {now.step}: give more --steps or --minutes", flush=True)

    stopped = world.any(stop)
    while run.progress() < 1 and not stopped:
        began = time.perf_counter()
        done = run.progress()

        # this step's mode: sparse attention or the index branch's warm-up, a frozen trunk, MTP or not, the rate, the
        # length of rows
        now.reached = max(now.reached, done)
        now.sparse = now.sparse or done >= now.sparse_from
        if not now.joint and done >= now.joint_from:
            now.joint = True
            freeze_trunk(run.model, frozen=False)
        run_mtp = now.step % args.mtp_every == 0 or not now.joint
        rate = args.lr * schedule(done, WARMUP, DECAY)
        set_rates(run.optimizers, rate)
        cut = cut_at(now.reached, args)

        # forward, backward, update; on pads alone momentum would move the weights, at full size
        batch, n_real = next_batch(run, cut, run_mtp)
        found = train_step(
            run.model, batch, run.optimizers if n_real else [], run.groups, args.accumulate,
            mtp_weight=mtp_weight_at(done), bias_rate=args.bias_rate,
            index_warmup=not now.sparse, run_mtp=run_mtp, recompute=args.recompute, parallel=run.parallel)

        # has it diverged? A short text has batches of pads alone, whose loss of 0 says nothing
        if n_real:
            seen = torch.stack([found["loss"], sum(found["norms"])]).to("cpu", non_blocking=True)
            event = torch.cuda.current_stream().record_event() if run.on_gpu else None
            run.pending.append((seen, event))
        shows = now.step == 0 or (now.step + 1) % args.log_every == 0
        run.drain(running=1 if run.on_gpu and not shows else 0)

        # count and tell; ranks agree on what a clock or a signal decides
        now.step += 1
        seconds = time.perf_counter() - began
        is_due = world.is_first and run.timer.due()
        seconds, stopped, is_due = world.largest(seconds, bool(stop), is_due)
        now.seconds += seconds
        run.threads.watch(seconds, trial, run)
        report.add(found)
        if shows:
            report.print_step(found, rate)
        if args.stop_after and now.step >= args.stop_after:
            stop.append(1)
            stopped = True

        # save: what the clock asks for waits for its loss, which the next step computes
        if run.unproven:
            run.settle_unproven()
        goes_on = run.progress() < 1 and not stopped
        if goes_on and now.step % args.eval_every == 0:
            run.checkpoint()
        elif goes_on and is_due:
            run.drain()
            if not now.above:
                run.unproven = run.write()

    if run.unproven:
        run.drop_unproven()
    result = finish(run, stop)
    if args.figure and world.is_first:
        draw(args.figure, read_log(args.out), args.preset)
    return result

def finish(run, stop):
    """Save, evaluate on all of the validation text that time allows -> the run's summary. stop: a list that a signal
    fills, also while this saves."""
    now = run.now
    found = dict(val_bytes=0)
    took = 0.0                         # seconds
    if now.step != run.saved:  # a run with nothing left has nothing to save, nor has one that was stopped while saving
        found, took = run.checkpoint()
    if run.parallel.world.any(stop):
        print(f"stopped after step {now.step}, saved in {run.args.out}; go on with --resume", flush=True)
        return summary(run, {})

    signal.signal(signal.SIGINT, signal.default_int_handler)  # all is saved: Ctrl-C may end the evaluation
    left = allowed_seconds(run.args) - took
    final = found
    if left > took:  # otherwise there is no time to see more of the text than just now
        final = run.evaluate(run.data["val"], left)
    if found["val_bytes"] > final["val_bytes"]:
        final = found
    bits = train_bits(now, run.data)
    missing = run.data["val"].n_bytes - final["val_bytes"]
    unseen = f"; for {missing:,} more --minutes left no time" if missing else ""
    print(f"final {now.step:04d} | {report(final)}{remark(final, bits, now.usual)} | "
          f"{final['val_bytes']:,} bytes{unseen}")
    run.log("final", train_bpb=bits, **final)
    return summary(run, final)

def summary(run, final):
    """What the last line of stdout says, in JSON. final: what the last evaluation found, {} if there was none."""
    now = run.now
    total, active = run.model.num_params()
    tokens_per_s, mfu = speed(now, RunState(), run.device)
    bits = train_bits(now, run.data)
    none = dict(
        val_bpb=None, val_bytes=0, block_recall=[], score_recall=[], block_chance=[], dead_experts=0, max_vio=[])
    return dict(
        step=now.step, loss=now.ema, train_bpb=None if math.isnan(bits) else bits,
        tokens=now.tokens, tokens_per_s=tokens_per_s, mfu=mfu, seconds=now.seconds,
        params_total=total, params_active=active, **{**none, **final})

def report(result):
    """One line of an evaluation: what `evaluate` found, in words."""
    by_layer = {}
    for name in ("block_recall", "score_recall", "max_vio"):
        by_layer[name] = " ".join(f"{x:.2f}" for x in result[name])
    line = f"val_bpb {result['val_bpb']:.4f}"
    if result["block_recall"]:
        chance = result["block_chance"][0]
        line += f" | block recall {by_layer['block_recall']} (chance {chance:.2f}), of mass {by_layer['score_recall']}"
    if result["max_vio"]:
        line += f" | maxvio {by_layer['max_vio']}"
    return line

def remark(found, train, usual):
    """What an evaluation's line adds to its val_bpb: that it is of few bytes, or far above training; "" otherwise.

    found   what `evaluate` returned
    train   bits a byte of the training text, nan before the first step
    usual   the lowest multiple of training's bits that validation's have been
    """
    val = found["val_bpb"]
    if found["val_bytes"] < FEW_BYTES:
        return " | of few bytes: uncertain by several percent"
    if not val > APART * usual * train:  # nor where there was no training yet
        return ""
    return f" | {val / train - 1:.0%} above training: learned by heart, or validation text of another kind"

def train_bits(now, data):
    """The running training loss in bits a byte of the training text, as val_bpb is; nan before the first."""
    if now.ema is None:
        return math.nan
    return now.ema / math.log(2) * data["train"].n_tokens / data["train"].n_bytes

def speed(now, since, device):
    """From one RunState to a later one -> tokens a second, pads left out, and MFU (model FLOPs utilisation): the
    FLOPs of these tokens over the GPU's dense bf16 peak; None where that is not known."""
    seconds = max(now.seconds - since.seconds, 1e-9)
    tokens_per_s = (now.tokens - since.tokens) / seconds
    peak = peak_flops(device)
    mfu = (now.flops - since.flops) / seconds / peak if peak else None
    return tokens_per_s, mfu

def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type.upper()}"

def peak_flops(device):
    """Dense bf16 FLOP/s of exactly this device, None where no datasheet's figure is known. A part of the name would
    not do: H100 PCIe and NVL, a slice (MIG) and an RTX A1000 are other devices than H100 and A100."""
    return PEAK.get(device_name(device).removeprefix("NVIDIA ")) if device.type == "cuda" else None

def main(argv=None):
    kept = "; the last good checkpoint is kept"
    return command("train.py", lambda locks: run_training(*parse_args(argv, locks)), kept)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_ctrl_c)
    main()
