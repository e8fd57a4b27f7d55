"""Train M2/M3 on any text: one process, one device, one loop.

    python train.py                              # tiny on the interpreter's standard library: CPU, minutes, no download
    python train.py --data notes/ --minutes 10     # any text file or folder; --resume goes on from out/ckpt.pt
    python train.py --resume --attn msa --steps 800  # a run with --attn full goes on with sparse attention
    python train.py --preset m2 --dry-run          # parameters and bytes, nothing is allocated

    batch  = f(seed, split, step): evaluation cannot disturb training, and a resumed run sees what it would have seen
    loss   = next token + mtp_weight * MTP + sum over MSA layers of the index branch's KL
    step   : Muon on matrices (orthogonalised momentum), AdamW on the rest; the index branch's gradient clipped apart
    rate   : warm-up, constant, linear decay to 0 (WSD), a function of progress = max(step / steps, seconds / budget)
    rows   : short at first, longer later (M2: 8K, 32K, 192K tokens), the same number of tokens a step
    MSA    : full attention while the index branch learns to predict it, then sparse (paper section 3.4)

Differs from M2/M3: neither report publishes optimizer, rates or the length of the warm-up; all are measured choices.
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: no traceback
    at_ctrl_c = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import dataclasses
import hashlib
import math
import sys
import sysconfig
import time
from collections import Counter

import numpy as np
import torch

from model import MiniMax, MiniMaxConfig, count_params
from moe import max_violation
from msa import chunk
from sample import (ICONV, LOCK, PATTERN, Parser, Progress, SaveTimer, Threads, Tokenizer, check_fields, check_finite,
                    check_memory, checkpoint_path, command, guess_kind, implementations, learn_bpe, load_checkpoint,
                    load_model, load_optimizers, lock_folder, on_signals, pick_device, place_checkpoint, saved_flags,
                    write_checkpoint)

VAL_BYTES = 512 * 1024                 # val_bpb is measured on this much of the validation text
FEW_BYTES = 32 * 1024                  # of validation: some 10,000 tokens, whose mean loss is uncertain by 2 %
EVAL_SHARE = 0.25                      # of --minutes: the last evaluation takes no longer
APART = 1.1                            # validation that rises so far over its usual share of training is remarked upon
USUAL = 1.3                            # that share, in bits a byte, at most: other files differ, the first by 20 %
MTP_WEIGHT = (0.3, 0.1)                # before and in the decay phase (M2 report)
WARMUP, DECAY = 0.02, 0.6              # shares of the run
# mtp_every: steps between MTP losses; msa_from: share of the run under full attention; stages: share -> cuts of a row
RUNS = {
    "tiny": dict(seq_len=256, batch_size=4, lr=1.2e-2, minutes=2.5, mtp_every=8, msa_from=0.5,
                 stages=((0.0, 8), (0.2, 4), (0.45, 2), (0.75, 1))),
    "small": dict(seq_len=8192, batch_size=16, lr=4e-3, minutes=10.0, mtp_every=4, msa_from=0.05, stages=((0, 1),))}
# what a checkpoint says of its run: always, and since runs have names; bpb beside it, which may be infinite
NOW = dict(step=int, seconds=float, ema=(float, type(None)), above=int)
NEW_NOW = dict(tokens=int, flops=float, spread=float, sparse_from=float, sparse=bool, reached=float, text=str,
               run=(str, type(None)), threads=(int, type(None)), usual=float)
RUN_ALONE = ("out", "resume", "device", "stop_after", "dry_run")  # flags that a checkpoint does not hand on
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

def list_files(path):
    """Files of the corpus, sorted: (name relative to it, path). None is the interpreter's own standard library."""
    if path and os.path.isfile(path):
        return [(os.path.basename(path), path)]
    root, files = path or sysconfig.get_paths()["stdlib"], []
    skip = set() if path else {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    for folder, dirs, names in os.walk(root, onerror=lambda error: files.append(error.filename)):
        dirs[:] = sorted(d for d in dirs if d not in skip and not d.startswith((".", "__pycache__")))
        names += [d for d in dirs if os.path.islink(os.path.join(folder, d))]  # not entered; read_text says so
        names = [n for n in names if n != LOCK]  # of a run whose --out lies in its --data
        files += [os.path.join(folder, n) for n in sorted(names) if path or n.endswith(".py")]
    return [(os.path.relpath(f, root), f) for f in files]

def read_text(path):
    """-> text, None; or None and why there is no text."""
    if os.path.isdir(path):
        return None, "linked folder" if os.path.islink(path) else "unreadable folder"
    if not os.path.isfile(path):  # a named pipe would be waited for, a device read, for ever
        return None, "pipe, device or broken link"
    try:
        with open(path, "rb") as file:
            raw = file.read()
        if raw and 0 not in raw:
            return raw.decode("utf-8"), None
    except UnicodeDecodeError:
        pass
    except OSError:
        return None, "unreadable"
    return None, guess_kind(raw)

def read_corpus(path, kinds=None):
    """-> [(name, text)], number of files skipped. kinds: a Counter that gets what each of these is."""
    docs = []
    kinds = Counter() if kinds is None else kinds
    before = kinds.total()
    for name, file in list_files(path):
        text, kind = read_text(file)
        if text is None:
            kinds[kind] += 1
        else:
            docs.append((name, text))
    return docs, kinds.total() - before

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
    held_out = [int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) < 0.05 * 2 ** 32 for name, _ in docs]
    sizes = [len(text.encode()) for _, text in docs]
    share = sum(size for size, held in zip(sizes, held_out) if held) / max(1, sum(sizes))
    if 0.01 <= share <= 0.1:
        return [d for d, h in zip(docs, held_out) if not h], [d for d, h in zip(docs, held_out) if h]
    cuts = []
    for _, text in docs:
        cut = len(text) * 95 // 100
        newline = text.find("\n", cut, len(text) * 99 // 100)  # a line that is longer is cut
        cuts.append(cut if newline < 0 else newline + 1)
    parts = [[(name, text[:c]) for (name, text), c in zip(docs, cuts)], [(n, t[c:]) for (n, t), c in zip(docs, cuts)]]
    return tuple([(name, text) for name, text in part if text] for part in parts)

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
    """Read and split -> training, validation (its first val_bytes), files skipped. ValueError if a side has no text."""
    for p in (path, val_path):
        if p is not None and not os.path.exists(p):
            raise ValueError(f"{p!r}: no such file or folder")
        if p is not None and not (os.path.isfile(p) or os.path.isdir(p)):
            raise ValueError(f"{p!r}: neither a file nor a folder")
    kinds = Counter()
    val_kinds = Counter()
    docs, skipped = read_corpus(path, kinds)
    val, more = read_corpus(val_path, val_kinds) if val_path else ([], 0)
    for p, found, why in ((path, docs, kinds), (val_path, val or not val_path, val_kinds)):
        if not found:
            raise ValueError(f"{p!r}: no text in it; {describe(why)}")
        if p and why:  # nothing can be done about the standard library's
            print(f"skipped | of {p!r}: {describe(why)}", flush=True)
    train, val = (docs, val) if val_path else split_corpus(docs)
    if not train or not val:
        raise ValueError(f"{path}: too little text to hold some out for validation; give --val-data")
    return train, truncate(val, val_bytes), skipped + more

def encode(tokenizer, pieces, at_once=4_000_000):
    """Texts -> their ids, so many characters at a time on all cores; says how far it is where that takes long."""
    progress = Progress("encode", sum(map(len, pieces)), "characters")
    ids, waiting, done = [], [], 0
    for piece in pieces:
        waiting.append(piece)
        if sum(map(len, waiting)) >= at_once:
            ids += tokenizer.encode_batch(waiting)
            done += sum(map(len, waiting))
            progress.at(done)
            waiting = []
    return ids + tokenizer.encode_batch(waiting)

class Tokens:
    """Documents laid out once, each from a multiple of L, pads between: three int32 vectors over all slots.
    ids; begin, the slot where the document starts (-1 = pad); end, the slot after its last token (pad: itself + 1)."""

    def __init__(self, docs, tokenizer, L, seq_len):
        pieces = [[text[i:i + 500_000] for i in range(0, len(text), 500_000)] for _, text in docs]  # for threads
        encoded = iter(encode(tokenizer, [piece for doc in pieces for piece in doc]))
        rows = [np.concatenate([[tokenizer.eot], *(next(encoded) for _ in doc)]).astype(np.int32) for doc in pieces]
        *starts, size = np.cumsum([0] + [-(-len(row) // L) * L for row in rows]).tolist()
        size, self.eot, self.L = max(-(-size // seq_len) * seq_len, seq_len), tokenizer.eot, L
        self.ids = np.full(size + 1, tokenizer.eot, dtype=np.int32)
        self.begin, self.end = np.full(size, -1, dtype=np.int32), np.arange(1, size + 1, dtype=np.int32)
        self.n_tokens, self.n_bytes = sum(map(len, rows)), sum(len(text.encode()) for _, text in docs)
        for s, row in zip(starts, rows):
            e = s + len(row)
            self.ids[s:e], self.begin[s:e], self.end[s:e] = row, s, e

    def rows(self, starts, T):
        """T slots from each start -> dict of idx, targets, pos (B, T) on the CPU, and of weight, end (B, T) unless
        every row lies within one document. The target of a document's last token is the end-of-text token."""
        slot = np.asarray(starts)[:, None] + np.arange(T)                                                 # (B, T)
        begin, end, pad = self.begin[slot], self.end[slot], self.begin[slot] < 0
        targets = np.where(pad, -1, np.where(end == slot + 1, self.eot, self.ids[slot + 1]))
        pos = np.where(pad, 0, slot - np.maximum(begin, slot[:, :1]))
        out = dict(idx=self.ids[slot], targets=targets, pos=pos)
        if pad.any() or (end < slot[:, -1:] + 1).any():
            out.update(weight=(~pad).astype(np.float32), end=np.minimum(end - slot[:, :1], T).astype(np.int32))
        return {k: torch.from_numpy(v if k in ("weight", "end") else v.astype(np.int64)) for k, v in out.items()}

def get_batch(tokens, seed, split, step, batch_size, T):
    """A pure function of (seed, split, step): rows of T slots from random multiples of L."""
    n_starts = (len(tokens.begin) - T) // tokens.L + 1
    return tokens.rows(np.random.default_rng((seed, split, step)).integers(0, n_starts, batch_size) * tokens.L, T)

# ---- optimizer -----------------------------------------------------------------------------------

def orthogonalize(G, steps=5):
    """Newton-Schulz towards U V^T of G = U S V^T, for a stack (n, rows, cols) of matrices (Muon, K. Jordan 2024)."""
    X = G.mT if G.size(-2) > G.size(-1) else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if G.size(-2) > G.size(-1) else X

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step has the size of AdamW's (rms 0.2, arXiv 2502.16982), so that both share a
    rate. A group's `stack` says how many matrices its parameters hold one under the other (2 for [gate | up]).
    torch.optim.Muon takes no stacks of experts, and its bf16 iterations are 10-70 times slower than fp32 on a CPU."""

    def __init__(self, groups, lr, momentum=0.95):
        super().__init__(groups, dict(lr=lr, momentum=momentum, stack=1))

    @staticmethod
    def blend(m, grad, momentum):
        """Nesterov: m moves on; the update, on a GPU in bf16: five steps need no more, and on a CPU bf16 is slow."""
        m.lerp_(grad, 1 - momentum)
        return grad.lerp(m, momentum).to(torch.bfloat16 if m.is_cuda else m.dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                u = self.blend(self.state[p]["momentum"].flatten(), p.grad.flatten(), group["momentum"]).view_as(p)
                shapes.setdefault(p.shape if p.dim() == 2 else p, []).append((p, u))  # experts are a stack already
            for items in shapes.values():
                rows, cols = items[0][1].size(-2) // group["stack"], items[0][1].size(-1)
                stack = torch.stack([u for _, u in items]) if len(items) > 1 else items[0][1]
                updates = orthogonalize(stack.view(-1, rows, cols))
                for (p, _), u in zip(items, updates.reshape(len(items), *items[0][1].shape)):
                    p.add_(u, alpha=-0.2 * max(rows, cols) ** 0.5 * group["lr"])

def configure_optimizers(model, lr):
    """Muon for matrices, AdamW for embedding, head, gates and norms -> both, the index branch's parameters, the others'
    (each side has its groups and is clipped on its own). A group's rate is `scale` times the schedule's."""
    kinds = {kind: [] for kind in ("matrix", "stacked", "embed", "head", "vector", "index matrix", "index vector")}
    for name, p in model.named_parameters():
        kind = "embed" if name.startswith("embed") else "head" if name.startswith("lm_head") else \
               "vector" if p.dim() == 1 or "router" in name else "stacked" if "w13" in name else "matrix"
        kinds["index " * (".indexer." in name) + kind].append(p)
    muon = Muon([dict(params=kinds[x], stack=1 + (x == "stacked")) for x in ("matrix", "stacked", "index matrix")], lr)
    adam = torch.optim.AdamW([dict(params=kinds["embed"], scale=12.0), dict(params=kinds["head"] + kinds["vector"]),
                              dict(params=kinds["index vector"])], lr, (0.9, 0.95), 1e-10, 0.0, fused=True)
    index = [p for name, p in model.named_parameters() if ".indexer." in name]
    return [muon, adam], index, [p for name, p in model.named_parameters() if ".indexer." not in name]

def schedule(progress, warmup, decay):
    """WSD: the rate's factor, in [0, 1]: linear warm-up, constant, linear decay to 0 over the run's last `decay`."""
    return min(1.0, progress / warmup + 0.01, (1 - progress) / decay)

# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, tokens, T, batch_size, device, seconds=math.inf, tokenizer=None):
    """Bits per byte over non-overlapping windows of T, every token of the text included, and what the layers report.
    After so many seconds, which needs the tokenizer, it ends with what it has measured until then. -> dict: val_bpb;
    val_bytes, of how much text; block_recall, score_recall, block_chance (layers with MSA); dead_experts; max_vio
    (with experts)."""
    model.eval()
    model.cfg.mtp_active = False  # its loss is not part of the bits
    nats, load, recalls, names = 0.0, 0.0, [], ("block_recall", "score_recall", "block_chance")
    progress = Progress("eval", len(tokens.begin), "slots of validation text")
    started, measured = time.perf_counter(), []
    for s in range(0, len(tokens.begin), T * batch_size):
        progress.at(s)
        if measured and time.perf_counter() - started > seconds:
            break
        batch = tokens.rows(range(s, min(s + T * batch_size, len(tokens.begin)), T), T)
        measured.append(batch["targets"])
        batch = {k: v.to(device) for k, v in batch.items()}
        # on a GPU what was compiled for a step's shape would be compiled anew for these
        with torch.compiler.set_stance("force_eager") if model.embed.weight.is_cuda else contextlib.nullcontext():
            _, loss, aux = model(**batch)
        nats += loss.item() * (batch["targets"] >= 0).sum().item()
        load = load + aux.get("expert_load", torch.zeros(0, 1))
        recalls.append(torch.stack([aux.get(name, torch.zeros(0)) for name in names]))
    model.train()
    n_bytes = tokens.n_bytes
    if len(measured) * T * batch_size < len(tokens.begin):
        targets = torch.cat([x.flatten() for x in measured])
        n_bytes = len(tokenizer.decode_bytes(targets[(targets >= 0) & (targets != tokens.eot)].tolist()))
    mean = torch.stack(recalls).nanmean(0)                                                   # (3, layers with MSA)
    recalls = [[]] * 3 if mean.isnan().any() else mean.tolist()  # nan: rows too short to choose in
    return dict(zip(names, recalls), val_bpb=nats / math.log(2) / n_bytes, val_bytes=n_bytes,
                dead_experts=int((load == 0).sum()), max_vio=max_violation(load).tolist())

# ---- the run -------------------------------------------------------------------------------------

def parse_args(argv, locks=None):
    """-> args, checkpoint (None for a new run). --resume takes what is not given again from the checkpoint.
    `locks`, a contextlib.ExitStack, holds the lock on --out from here on: nobody else changes what is read."""
    p = Parser(__doc__)
    p.add_argument("--preset", default="tiny", choices=["tiny", "small", "m2", "m3"], help="the model")
    p.add_argument("--data", help="a text file or a folder of them; default: the Python standard library")
    p.add_argument("--val-data", help="validation text; default: 5 %% of the files of --data")
    p.add_argument("--out", default="out", help="folder of the checkpoint")
    p.add_argument("--steps", type=int, help="end after this many steps")
    p.add_argument("--minutes", type=float, help="end after this much training time; default: the preset's")
    p.add_argument("--seq-len", type=int, help="tokens in a row, at last; default: the preset's")
    p.add_argument("--batch-size", type=int, help="rows in a step, at last; default: the preset's")
    p.add_argument("--vocab-size", type=int, help="tokens that the BPE learns; default: the preset's")
    p.add_argument("--accumulate", type=int, default=1, help="gradient accumulation: a step's rows in so many parts")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, slower")
    p.add_argument("--lr", type=float, help="peak rate of the matrices; default: the preset's")
    p.add_argument("--attn", default="msa", help="msa, or full for full attention in every layer")
    p.add_argument("--bias-rate", type=float, default=0.01, help="u of the router's load balancing, 0 = off")
    p.add_argument("--eval-every", type=int, default=200, help="steps from one evaluation and checkpoint to the next")
    p.add_argument("--log-every", type=int, default=20, help="steps from one progress line to the next")
    p.add_argument("--stop-after", type=int, help="save and leave after this step, as Ctrl-C would")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--dry-run", action="store_true", help="print parameters and bytes, allocate nothing")
    argv = sys.argv[1:] if argv is None else argv
    args, state = p.parse_args(argv), None
    if args.dry_run:
        check_args(args)
        return args, None
    if args.resume:
        if locks:
            locks.enter_context(lock_folder(args.out, create=False))
        state = load_checkpoint(args.out)
        args = resume_args(p, argv, args, state)
    check_args(args)
    if locks and not args.resume:
        locks.enter_context(lock_folder(args.out))
    return args, state

def resume_args(parser, argv, given, state):
    """What was given now, over what the checkpoint was trained with -> args. ValueError if they do not go together."""
    path, saved = checkpoint_path(given.out), dict(state["args"])
    if "queue" in state or "task" in saved:
        raise ValueError(f"--out {given.out}: a checkpoint by rl.py; python rl.py --resume --out {given.out} goes on")
    check_fields(f"{path}: the checkpoint's now", state["now"], {**NOW, **NEW_NOW}, optional=NEW_NOW)
    if not (type(state["now"].get("bpb")) is float and state["now"]["bpb"] > 0):  # inf: none was measured
        raise ValueError(f"{path}: the checkpoint's now has bpb = {state['now'].get('bpb')}: a number above 0")
    preset = read_preset(path, saved)
    flags = saved_flags(parser, path, saved, RUN_ALONE)
    if given.steps or given.minutes:  # a new end replaces the old one
        flags = [flag for flag in flags if not flag.startswith(("--steps=", "--minutes="))]
    parser.set_defaults(**preset)
    args = parser.parse_args([*flags, *argv])
    for name in ("lr", "batch_size", "seq_len"):  # a new run has them from its preset
        if getattr(args, name) is None:
            raise ValueError(f"{path}: the checkpoint's args lack {name}")
    for name in ("preset", "attn", "seq_len", "vocab_size"):  # these made the model
        value, was = getattr(args, name), state["args"].get(name)
        if value != was and (was, value) != ("full", "msa"):  # full attention may become sparse
            raise ValueError(f"--{name.replace('_', '-')} {value}: the checkpoint was trained with {was}")
    return args

def read_preset(path, saved):
    """Take what has no flag, the preset's mtp_every, msa_from and stages, out of a checkpoint's args -> a dict."""
    preset = {name: saved.pop(name) for name in ("mtp_every", "msa_from", "stages") if name in saved}
    what = f"{path}: the checkpoint's args"
    check_fields(what, preset, dict(mtp_every=int, msa_from=float, stages=(tuple, list)))
    if preset["mtp_every"] < 1:
        raise ValueError(f"{what} have mtp_every = 0: it must be at least 1")
    stages = preset["stages"]
    pairs = [stage for stage in stages if isinstance(stage, (tuple, list)) and len(stage) == 2]
    fits = len(pairs) == len(stages) > 0 and pairs[0][0] == 0
    if not fits or not all(type(share) in (int, float) and type(cut) is int and cut >= 1 for share, cut in pairs):
        raise ValueError(f"{what} have stages = {str(stages)[:40]}: pairs of a share, the first 0, and cuts of a row")
    return preset

def check_args(args):
    """ValueError for what argparse lets through, naming the value."""
    least = dict(steps=1, minutes=1e-6, seq_len=16, batch_size=1, log_every=1, eval_every=1, stop_after=1, lr=1e-12,
                 vocab_size=257, bias_rate=0, seed=0, accumulate=1)  # 257: all bytes and the end-of-text token
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and not low <= value < 2 ** 63:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be a number of at least {low}")
    if args.attn not in ("full", "msa"):
        raise ValueError(f"--attn {args.attn}: msa or full (swa and lightning come later)")
    if args.preset in ("m2", "m3") and not args.dry_run:
        raise ValueError(f"--preset {args.preset}: its training state takes terabytes; --dry-run prints how many")

def configure(args):
    """Preset and flags -> MiniMaxConfig, with what the flags leave open filled into args."""
    cfg = getattr(MiniMaxConfig, args.preset)()
    defaults = dict(RUNS.get(args.preset, {}), vocab_size=cfg.vocab_size)
    if args.steps is not None:
        defaults["minutes"] = None
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    cfg.attn_types = ["full"] * cfg.n_layer if args.attn == "full" else cfg.attn_types
    if args.dry_run:
        return cfg
    if args.seq_len > cfg.max_seq_len:
        raise ValueError(f"--seq-len {args.seq_len}: the context of {args.preset} is at most {cfg.max_seq_len}")
    if "msa" in cfg.attn_types and args.seq_len % cfg.index_block_size:
        raise ValueError(f"--seq-len {args.seq_len}: rows hold whole key blocks, a multiple of {cfg.index_block_size}")
    return dataclasses.replace(cfg, max_seq_len=args.seq_len)

def dry_run(cfg, preset):
    """Parameters and bytes from the meta device, and how the published figures come out."""
    with torch.device("meta"):
        model = MiniMax(dataclasses.replace(cfg, n_mtp=0))
        total, active = model.num_params()
        two = sum(p.numel() for group in configure_optimizers(model, 1.0)[0][1].param_groups for p in group["params"])
        mtp, active_mtp = count_params(MiniMax(dataclasses.replace(cfg, n_mtp=1)).mtp[0])
    table, msa = cfg.vocab_size * cfg.n_embd, cfg.attn_types.count("msa")
    print(f"{preset}: {total:,} parameters, {active:,} active per token without embedding and head")
    if preset == "m2":
        print(f"  229.9B = {total + 2 * table:,}: with a second embedding and head of {table:,} each; not published")
        print(f"  9.8B   = {active:,}: all but embedding, head and the 248 of 256 experts not chosen")
    if preset == "m3":
        print(f"  428B of the model card = {total / 1e9:.3f}B + the vision tower; 23B = {active / 1e9:.2f}B, or "
              f"{(active + 2 * table) / 1e9:.3f}B with embedding and head")
    print(f"  an MTP module adds {mtp:,} parameters, {active_mtp:,} active")
    print(f"  weights   {2 * total / 1e9:10.3f} GB bf16, {4 * total / 1e9:.3f} GB fp32")
    print(f"  optimizer {4 * (total + two) / 1e9:10.3f} GB fp32: one moment, two where AdamW works (not the matrices)")
    per_token = 2 * (2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim + msa * cfg.index_head_dim)
    for T in (32_768, 196_608, 1_000_000):
        print(f"  KV cache  {per_token * T / 1e9:10.3f} GB bf16 at {T:,} tokens: {per_token:,} bytes a token")
    return dict(step=0, loss=None, val_bpb=None, tokens=0, tokens_per_s=None, mfu=None, params_total=total,
                params_active=active, seconds=0.0)

def convert(old, saved, step, args):
    """A full-attention model and its optimizers' states -> the preset's MSA layers, weights and states kept by name."""
    new = MiniMax(dataclasses.replace(configure(args), vocab_size=old.cfg.vocab_size), old.dtype)
    try:
        missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
        assert not unexpected and all(".indexer." in name for name in missing), (missing, unexpected)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--attn msa: the checkpoint's model is not of --preset {args.preset}") from None
    params = dict(new.to(old.embed.weight.device).named_parameters())
    sources, targets = (configure_optimizers(model, args.lr)[0] for model in (old, new))
    for source, state, target in zip(sources, saved, targets):
        load_optimizers([source], [state], step)
        target.state.update({params[name]: source.state[p] for name, p in old.named_parameters() if p in source.state})
    return new, [target.state_dict() for target in targets]

def card(model, args, device, why, threads, data, setup, now):
    cfg, (total, active) = model.cfg, model.num_params()
    S, L, T = cfg.index_topk_blocks, cfg.index_block_size, args.seq_len
    print(f"model   | {args.preset}: {total:,} parameters, {active:,} active per token without embedding and head")
    print(f"device  | {device}, {str(model.dtype).removeprefix('torch.')}: {why}")
    print(f"threads | {threads}")
    print(f"layers  | attention {' '.join(cfg.attn_types)}; mlp {' '.join(cfg.mlp_types)}; {cfg.n_mtp} MTP module")
    if "msa" in cfg.attn_types:
        since = "as before" if now["sparse"] else f"from {now['sparse_from']:.0%} of the run"
        print(f"msa     | {S} blocks of {L}: {min(S * L, T)} of {T} keys, {since}")
    print(f"experts | {cfg.n_expert_per_tok} of {cfg.n_expert}{' + 1 shared' if cfg.shared_dim else ''}")
    print(f"kernels | {implementations(model, device, trains=True, decodes=False)}")
    rows = dict.fromkeys(str(T // min(n, T // 16)) for _, n in args.stages)
    print(f"step    | up to {args.batch_size * T:,} tokens (pads do not count), in rows of {' then '.join(rows)}; "
          f"Muon + AdamW, rate {args.lr:g}, seed {args.seed}")
    print(f"data    | {args.data or 'the Python standard library'}: {data['train'].n_tokens:,} tokens; validation "
          f"{data['val'].n_bytes:,} bytes; {data['skipped']} files skipped; vocabulary {cfg.vocab_size:,}")
    if data["val"].n_bytes < FEW_BYTES:
        print(f"notice  | {data['val'].n_bytes:,} bytes of validation are too few to compare runs by: val_bpb is "
              "uncertain by several percent; give --val-data")
    if not peak_flops(device):
        print(f"mfu     | none: the dense bf16 peak of {device_name(device)} is not known")
    if cfg.vocab_size < args.vocab_size:
        print(f"vocab   | {cfg.vocab_size:,} tokens, not {args.vocab_size:,}: the text has no more pairs to merge")
    first = ", ".join(map(str, SaveTimer.FIRST))
    print(f"saves   | after {first} s and each minute, in {args.out}; with an evaluation every {args.eval_every} steps")
    print(f"ready   | {setup:.1f} s", flush=True)

def watch(loss, norm, history):
    """Raise FloatingPointError on a NaN, or on five losses in a row 1 nat, and 4 usual distances, over their mean."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: not finite")
    mean = loss if history["ema"] is None else history["ema"]
    history["above"] = history["above"] + 1 if loss > mean + max(1.0, 4 * history["spread"]) else 0
    if history["above"] >= 5:
        raise FloatingPointError(f"loss spike: {loss:.3f} and four before it, where the running mean was {mean:.3f}")
    if not history["above"]:
        share = max(0.05, 1 / (history["step"] + 1))  # a plain mean at first
        history["spread"] += share * (abs(loss - mean) - history["spread"])
        history["ema"] = mean + share * (loss - mean)

def settle(pending, history, running=0):
    """Watch the steps that are done; waiting for the last one would leave a GPU idle while the next is prepared."""
    while len(pending) > running:
        seen, event = pending.pop(0)
        if event:
            event.synchronize()
        watch(*seen.tolist(), history)

def prepare(args, cfg, tokenizer):
    """Text -> tokenizer (learned from the training side where there is none), and a dict of what the run reads."""
    train, val, skipped = load_data(args.data, args.val_data, VAL_BYTES)
    tokenizer = tokenizer or Tokenizer(learn_bpe((text for _, text in train), args.vocab_size, PATTERN))
    docs = dict(train=train, val=val, peek=truncate(val, VAL_BYTES // 8))  # peek: for the evaluations on the way
    L = cfg.index_block_size if "msa" in cfg.attn_types else 1
    data = {x: Tokens(docs[x], tokenizer, L, args.seq_len) for x in docs}
    return tokenizer, {**data, "skipped": skipped, "text": hash_text(train, val)}

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

def fuse(model, muon):
    """torch.compile what lies between the kernels: norms, projections, rotations, experts, momentum."""
    for block in [*model.layers, *(module.block for module in model.mtp)]:
        block.enter, block.leave = (torch.compile(half, dynamic=False) for half in (block.enter, block.leave))
    model.norm.forward = torch.compile(model.norm.forward, dynamic=False)
    muon.blend = torch.compile(muon.blend, dynamic=True)

def loss_counts(part, stride, n_mtp):
    """Tokens that a part's losses are means over: (2, 1 + n_mtp), the next-token loss and each MTP module's in row 0,
    the KLs of the trunk and of each module in row 1."""
    targets = part["targets"]
    weight = part.get("weight", torch.ones_like(targets))
    slot = torch.arange(targets.size(1), device=targets.device)
    tokens, queries = [], []
    for k in range(n_mtp + 1):  # module k works where the document has a k-th next token, and module 0 is the trunk
        n = targets.size(1) - k
        inside = slot[k:] < part["end"][:, :n] if "end" in part else slot[k:] >= 0
        tokens.append(((targets[:, k:] >= 0) & inside).sum())
        queries.append((weight[:, :n] * inside)[:, stride - 1::stride].sum())
    return torch.stack([torch.stack(tokens).double(), torch.stack(queries).double()])

def learn(model, batch, n, optimizers, index, rest, mtp_weight):
    """One step on a batch in n parts: forward, backward, clip, update -> aux with loss and gradient norms."""
    parts, total = [dict(zip(batch, part)) for part in zip(*(x.chunk(n) for x in batch.values()))], {}
    n_mtp = min(len(model.mtp), batch["idx"].size(1) - 1) if model.cfg.mtp_active else 0
    counts = torch.stack([loss_counts(part, model.cfg.index_kl_stride, n_mtp) for part in parts])    # (n, 2, 1 + n_mtp)
    for part, share in zip(parts, counts / counts.sum(0).clamp(min=1)):
        _, loss, aux = model(**part)
        tokens, queries = share.to(loss.dtype)  # a mean over a part, times the part's share: the mean over the batch
        kl = aux.get("index_kl", torch.zeros(0, device=loss.device))
        n_trunk = min(len(kl), model.cfg.attn_types.count("msa"))
        mtp = (tokens[1:] * aux["mtp_losses"]).sum() / len(model.mtp) if n_mtp else 0.0 * loss.detach()
        aux = dict(loss=tokens[0] * loss, mtp_loss=mtp, expert_load=aux.get("expert_load", torch.zeros(0)),
                   index_kl=torch.cat([queries[0] * kl[:n_trunk], queries[1:][:len(kl) - n_trunk] * kl[n_trunk:]]))
        # experts learn through their weights, attention through q, k and v, the index branch through the KL alone
        (aux["loss"] + mtp_weight * aux["mtp_loss"] + aux["index_kl"].sum()).backward()
        total = {key: total.get(key, 0.0) + value.detach() for key, value in aux.items()}
    norm, index_norm = (torch.nn.utils.clip_grad_norm_(part, 1.0) for part in (rest, index))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(total, norm=norm, index_norm=index_norm)

def rehearse(model, batch, n, muon, index, rest):
    """Compile what the steps of a run need before its clock starts; the model is left as it was."""
    for model.cfg.index_warmup, model.cfg.mtp_active in ((True, True), (True, False), (False, True), (False, False)):
        learn(model, batch, n, [], index, rest, 1.0)
    for p in {p.dim(): p for p in rest if p.dim() > 1}.values():  # a matrix, a stack of experts: two graphs
        torch.no_grad()(muon.blend)(*(torch.ones_like(p).flatten() for _ in "mg"), muon.defaults["momentum"])
    model.zero_grad(set_to_none=True)

def step_bytes(cfg, rows, T, device, recompute=False):
    """About the memory of a training step of rows x T tokens, a little less rather than more: weights, gradients and
    moments in fp32, what the backward pass keeps of each layer, and the logits."""
    with torch.device("meta"):
        model = MiniMax(cfg)
        adam = configure_optimizers(model, 1.0)[0][1]
        n_params = sum(p.numel() for p in model.parameters())
        two_moments = sum(p.numel() for group in adam.param_groups for p in group["params"])
    tokens, on_gpu = rows * T, device.type != "cpu"
    attention = 6 * cfg.n_embd + 5 * cfg.n_head * cfg.head_dim + 6 * cfg.n_kv_head * cfg.head_dim
    attention += 3 * (cfg.n_kv_head + 1) * cfg.index_head_dim * ("msa" in cfg.attn_types)
    experts = cfg.n_expert_per_tok * (2 * cfg.n_embd + 5 * cfg.expert_dim) + 5 * cfg.shared_dim + 3 * cfg.n_embd
    layer = 4 * tokens * (attention + experts)
    # sparse attention in torch gathers keys and values, some six copies alive; above a size it does so part by part
    gathered = cfg.n_kv_head * cfg.index_topk_blocks * cfg.index_block_size * cfg.head_dim
    n_sparse = cfg.attn_types.count("msa") + cfg.n_mtp * (cfg.attn_types[-1] == "msa")
    parts = tokens * gathered > chunk(device)
    gathers = 6 * 4 * chunk(device) if parts else 6 * 4 * tokens * gathered * (1 if recompute else n_sparse)
    alive = cfg.n_mtp + (1 if recompute else cfg.n_layer)
    kept = 4 * tokens * cfg.n_embd * cfg.n_layer * recompute
    at_once = min(tokens, 2 ** (30 - cfg.vocab_size.bit_length()))  # see model.cross_entropy
    logits = 4 * at_once * cfg.vocab_size * (3 + (cfg.n_mtp if at_once == tokens else 0))
    if on_gpu:  # kernels that keep less, in bf16; the gradient is written over the logits
        layer, kept = 0.4 * layer / 2, kept / 2
        gathers, logits = 0, 2 * at_once * cfg.vocab_size
    return 4 * (3 * n_params + two_moments) + alive * layer + kept + logits + (gathers if n_sparse else 0)

def trial(model, data, args, index, rest):
    """-> a function that runs a step's forward and backward passes, on few tokens, and leaves the model as it was."""
    T = min(args.seq_len, 256)
    batch = get_batch(data["train"], args.seed, 0, 0, max(1, 1024 // T), T)

    def step():
        before = model.cfg.index_warmup, model.cfg.mtp_active
        model.cfg.index_warmup, model.cfg.mtp_active = True, True
        learn(model, batch, 1, [], index, rest, 1.0)
        model.zero_grad(set_to_none=True)
        model.cfg.index_warmup, model.cfg.mtp_active = before
    return step

def share_done(now, steps, minutes):
    """Progress: the share of the steps that are done, or of the minutes, whichever is larger; 1 is the end."""
    return max(now["step"] / (steps or math.inf), now["seconds"] / (60 * (minutes or math.inf)))

def cut_at(share, args):
    """Into how many parts rows are cut at this share of the run; a part has at least 16 tokens."""
    return min([n for first, n in args.stages if share >= first][-1], args.seq_len // 16)

def stage_at(share):
    return "warm-up" if share < WARMUP else "decay" if share > 1 - DECAY else "constant"

def resume_now(fresh, state, args):
    """Where a checkpoint's run stood, over what a new run starts with. What was measured on another text is dropped.
    Checkpoints of before runs had names tell by their step or their seconds how far the run had come."""
    old, was = state["now"], state["args"]
    now = {**fresh, **old, "run": old.get("run"), "text": fresh["text"]}
    now["reached"] = old.get("reached", share_done(old, was.get("steps"), was.get("minutes")))
    now["sparse"] = old.get("sparse", now["reached"] >= now["sparse_from"])
    same_place = all(was.get(name) == getattr(args, name) for name in ("data", "val_data"))
    if old.get("text", fresh["text"]) != fresh["text"] or "text" not in old and not same_place:
        now["bpb"] = math.inf
    return now

def print_changes(state, args, now):
    """Say what going on changes: the schedule, where the run now has another end or rate, and the text."""
    old, was = state["now"], state["args"]
    before = min(1.0, share_done(old, was.get("steps"), was.get("minutes")))
    after = min(1.0, share_done(now, args.steps, args.minutes))
    if before != after or was.get("lr") != args.lr:
        rates = [lr * schedule(share, WARMUP, DECAY) for lr, share in ((was.get("lr"), before), (args.lr, after))]
        line = (f"{before:.0%} of the run is now {after:.0%} of it; rate {rates[0]:.1e} ({stage_at(before)}) -> "
                f"{rates[1]:.1e} ({stage_at(after)})")
        if stage_at(before) != stage_at(after) and "decay" in (stage_at(before), stage_at(after)):
            weights = [MTP_WEIGHT[share > 1 - DECAY] for share in (before, after)]
            line += f", MTP weight {weights[0]} -> {weights[1]}"
        rows = [args.seq_len // cut_at(share, args) for share in (now["reached"], after)]
        if rows[0] > rows[1]:
            line += f"; rows stay at {rows[0]} tokens"
        if rows[0] < rows[1]:
            line += f"; rows grow from {rows[0]} to {rows[1]} tokens"
        if args.attn == "msa" and now["sparse"] and after < now["sparse_from"]:
            line += "; attention stays sparse"
        if args.attn == "msa" and not now["sparse"] and after >= now["sparse_from"]:
            line += "; attention becomes sparse"
        print(f"resume  | step {now['step']}: {line}", flush=True)
    if old.get("text", now["text"]) != now["text"]:
        here, there = (name or "the Python standard library" for name in (args.data, was.get("data")))
        changed = f"{here}, which has changed since" if here == there else f"{there}, and {here} is another text"
        print(f"text    | the checkpoint was trained on {changed}: val_bpb compares with none before", flush=True)

def check_match(cfg, state, args):
    """ValueError unless a checkpoint's model is the one that its args describe."""
    saved = state["args"]["attn"]
    if (saved == "msa") != ("msa" in cfg.attn_types):
        raise ValueError(f"the checkpoint's args say --attn {saved}, its layers are {' '.join(cfg.attn_types)}")
    if args.seq_len > cfg.max_seq_len:
        raise ValueError(f"the checkpoint's args say --seq-len {args.seq_len}, its model has {cfg.max_seq_len}")
    if saved == "msa" and args.seq_len % cfg.index_block_size:
        raise ValueError(f"the checkpoint's --seq-len {args.seq_len} is not whole key blocks of {cfg.index_block_size}")

def run(args, state):
    started = time.perf_counter()
    if args.dry_run:
        return dry_run(configure(args), args.preset)
    device, dtype, why = pick_device(args.device)
    model, tokenizer = load_model(state, device, dtype) if state else (None, None)
    if state:
        check_match(model.cfg, state, args)
    torch.manual_seed(args.seed)
    converted = bool(state) and args.attn != state["args"]["attn"]
    if converted:
        model, state["optimizers"] = convert(model, state["optimizers"], state["now"]["step"], args)
    cfg = model.cfg if model else configure(args)
    sized = dataclasses.replace(cfg, vocab_size=args.vocab_size)
    rows = -(-args.batch_size // args.accumulate)
    check_memory(step_bytes(sized, rows, args.seq_len, device, args.recompute), device,
                 "--accumulate, --recompute, --batch-size or --seq-len")
    tokenizer, data = prepare(args, cfg, tokenizer)
    cfg.vocab_size = tokenizer.n_vocab
    model = (model or MiniMax(cfg, dtype).to(device)).train()
    model.recompute = args.recompute
    (optimizers, index, rest), on_gpu = configure_optimizers(model, args.lr), device.type == "cuda"
    # reached: the share of the run that rows and attention have come to; it never shrinks, whatever the end becomes
    now = dict(step=0, seconds=0.0, tokens=0, flops=0.0, ema=None, spread=0.0, above=0, bpb=math.inf, usual=USUAL,
               sparse_from=args.msa_from, sparse=False, reached=0.0, run=os.urandom(8).hex(), text=data["text"])
    if state:
        load_optimizers(optimizers, state["optimizers"], state["now"]["step"])
        now = resume_now(now, state, args)
        if "tokens" not in state["now"]:  # an older checkpoint, whose FLOPs count pads: they are the same share of all
            filled = data["train"].n_tokens / len(data["train"].begin)
            now["tokens"] = round(filled * now["step"] * args.batch_size * args.seq_len)
            now["flops"] *= filled
    def progress():
        return share_done(now, args.steps, args.minutes)
    if converted:  # the index branch learns for the same share of what is left
        now["sparse"] = False
        now["sparse_from"] = progress() + (1 - progress()) * args.msa_from
        if progress() >= 1:
            raise ValueError("--attn msa: nothing is left of the run to convert in; give more --steps or --minutes")
    threads = Threads(device, args.threads, now.get("threads"))
    if on_gpu:
        fuse(model, optimizers[0])
        batch = get_batch(data["train"], args.seed, 0, 0, args.batch_size, args.seq_len)
        rehearse(model, {k: v.to(device) for k, v in batch.items()}, args.accumulate, optimizers[0], index, rest)
    if threads.count is None:
        faster = Threads.FASTER_FOR_STEPS if args.steps else Threads.FASTER
        threads.choose(trial(model, data, args, index, rest), faster)
    card(model, args, device, why, threads, data, time.perf_counter() - started, now)
    if state:
        print_changes(state, args, now)
    allowed = 60 * args.minutes * EVAL_SHARE if args.minutes else math.inf  # seconds of an evaluation
    timer = SaveTimer()
    draft = None                         # a checkpoint that waits for the loss of its weights
    saved = now["step"] if state else None  # the step of the last evaluated checkpoint
    def write():
        """Write all there is between two steps into a new file -> its path."""
        began = timer.clock()
        now["threads"] = None if on_gpu else threads.count  # bits depend on it
        weights = model.state_dict()
        check_finite(weights)
        path = write_checkpoint(
            args.out, args={k: v for k, v in vars(args).items() if k not in RUN_ALONE}, now=dict(now),
            config=dataclasses.asdict(dataclasses.replace(cfg, mtp_active=True)), tokenizer=tokenizer.spec,
            model=weights, optimizers=[o.state_dict() for o in optimizers])
        timer.saved(began)
        return path
    def checkpoint():
        """Evaluate on the first bytes and save what passes: the last good checkpoint survives a divergence.
        -> what was found, and the seconds that it took."""
        settle(pending, now)
        began = time.perf_counter()
        found = evaluate(model, data["peek"], args.seq_len, 16, device, allowed, tokenizer)
        took = time.perf_counter() - began
        bits = train_bits(now, data)
        if bits > 0:  # not before the first step
            now["usual"] = min(now["usual"], max(1.0, found["val_bpb"] / bits))
        print(f"eval {now['step']:05d} | {report(found)}{remark(found, bits, now['usual'])} | "
              f"first {found['val_bytes']:,} bytes", flush=True)
        if not found["val_bpb"] <= 1.5 * now["bpb"]:
            raise FloatingPointError(f"val_bpb {found['val_bpb']:.3f} after {now['bpb']:.3f}")
        now["bpb"] = min(now["bpb"], found["val_bpb"])
        place_checkpoint(args.out, write(), now["run"])
        return found, took
    stop, pending, load, mtp, kl, last, final = on_signals(), [], 0.0, torch.tensor(math.nan), math.nan, dict(now), {}
    if progress() >= 1:
        print(f"nothing left to do after step {now['step']}: give more --steps or --minutes", flush=True)
    while progress() < 1 and not stop:
        tick, done = time.perf_counter(), progress()
        now["reached"] = max(now["reached"], done)
        now["sparse"] = now["sparse"] or done >= now["sparse_from"]
        cfg.index_warmup, cfg.mtp_active = not now["sparse"], now["step"] % args.mtp_every == 0
        factor = schedule(done, WARMUP, DECAY)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = args.lr * factor * group.get("scale", 1.0)
        cut = cut_at(now["reached"], args)
        batch = get_batch(data["train"], args.seed, 0, now["step"], args.batch_size * cut, args.seq_len // cut)
        real = batch["targets"] >= 0  # pads are computed, too, but are neither tokens learned from nor useful FLOPs
        n_real = int(real.sum())
        now["tokens"] += n_real
        now["flops"] += n_real * model.flops_per_token(batch["pos"], real) if n_real else 0.0
        batch = {k: (v.pin_memory() if on_gpu else v).to(device, non_blocking=True) for k, v in batch.items()}
        moved = optimizers if n_real else []  # on pads alone momentum would move the weights, at full size
        aux = learn(model, batch, args.accumulate, moved, index, rest, MTP_WEIGHT[done > 1 - DECAY])
        seen = torch.stack([aux["loss"], aux["norm"] + aux["index_norm"]]).to("cpu", non_blocking=True)
        if n_real:  # a short text has batches of pads alone, whose loss of 0 says nothing
            pending.append((seen, torch.cuda.current_stream().record_event() if on_gpu else None))
        shows = now["step"] == 0 or (now["step"] + 1) % args.log_every == 0
        settle(pending, now, running=on_gpu and not shows)
        model.update_router_bias(aux["expert_load"], args.bias_rate)
        load = load + aux["expert_load"][:cfg.mlp_types.count("moe")]
        now["step"] += 1
        seconds = time.perf_counter() - tick
        now["seconds"] += seconds
        if threads.slowed(seconds):
            threads.choose_again(trial(model, data, args, index, rest))
        mtp = aux["mtp_loss"] if cfg.mtp_active and cfg.n_mtp else mtp
        stop += [1] * (now["step"] >= (args.stop_after or math.inf))
        if shows:
            kl = aux["index_kl"].mean().item() if len(aux["index_kl"]) else kl
            violation = max_violation(load).max().item() if "moe" in cfg.mlp_types else math.nan
            rate, mfu = speed(args, now, last, device)
            part, last, load = min(1.0, progress()), dict(now), 0.0
            loss = math.nan if now["ema"] is None else now["ema"]
            losses = (("loss", loss, 3), ("train_bpb", train_bits(now, data), 3), ("mtp", mtp.item(), 3),
                      ("kl", kl, 4))  # nan: none yet, or no MTP loss since the line before
            mtp = torch.tensor(math.nan)
            print(f"step {now['step']:05d} {part:4.0%} | {''.join(f'{k} {x:.{n}f} | ' for k, x, n in losses if x == x)}"
                  f"lr {args.lr * factor:.1e} | norm {aux['norm'].item():.2f} | maxvio {violation:.2f} | "
                  f"{rate:,.0f} tok/s{f', mfu {mfu:.1%}' if mfu else ''} | "
                  f"eta {now['seconds'] * (1 / part - 1) / 60:.1f}m", flush=True)
        if draft:  # this step began with its weights: now their loss is known
            settle(pending, now)
            if now["above"]:
                os.remove(draft)
            else:
                place_checkpoint(args.out, draft, now["run"])
            draft = None
        if now["step"] % args.eval_every == 0 and progress() < 1 and not stop:
            checkpoint()
            saved = now["step"]
        elif timer.due() and progress() < 1 and not stop:
            settle(pending, now)
            draft = None if now["above"] else write()
    if draft:
        os.remove(draft)
    found, took = dict(val_bytes=0), 0.0
    if now["step"] != saved:  # a run with nothing left has nothing to save, nor has one that was stopped while saving
        found, took = checkpoint()
    if stop:
        print(f"stopped after step {now['step']}, saved in {args.out}; go on with --resume", flush=True)
    else:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # all is saved: Ctrl-C may end the evaluation
        final = found
        if allowed - took > took:  # otherwise there is no time to see more of the text than just now
            final = evaluate(model, data["val"], args.seq_len, 16, device, allowed - took, tokenizer)
        final = max(found, final, key=lambda result: result["val_bytes"])
        missing = data["val"].n_bytes - final["val_bytes"]
        print(f"final {now['step']:04d} | {report(final)}{remark(final, train_bits(now, data), now['usual'])} | "
              f"{final['val_bytes']:,} bytes" + (f"; for {missing:,} more --minutes left no time" if missing else ""))
    return summary(model, args, now, final, device, train_bits(now, data))

def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type.upper()}"

def peak_flops(device):
    """Dense bf16 FLOP/s of exactly this device, None where no datasheet's figure is known. A part of the name would
    not do: H100 PCIe and NVL, a slice (MIG) and an RTX A1000 are other devices than H100 and A100."""
    return PEAK.get(device_name(device).removeprefix("NVIDIA ")) if device.type == "cuda" else None

def train_bits(now, data):
    """The running training loss in bits a byte of the training text, as val_bpb is; nan before the first."""
    if now["ema"] is None:
        return math.nan
    return now["ema"] / math.log(2) * data["train"].n_tokens / data["train"].n_bytes

def remark(found, train, usual):
    """What an evaluation's line says of its figure: of few bytes, or parted from training, in bits a byte; or nothing.
    usual: the least that validation has been as a multiple of training."""
    val = found["val_bpb"]
    if found["val_bytes"] < FEW_BYTES:
        return " | of few bytes: uncertain by several percent"
    if not val > APART * usual * train:  # nor where there was no training yet
        return ""
    return f" | {val / train - 1:.0%} above training: learned by heart, or validation text of another kind"

def speed(args, now, since, device):
    """-> tokens a second since then, pads left out, and their FLOPs over the GPU's dense bf16 peak, or None."""
    seconds = max(now["seconds"] - since["seconds"], 1e-9)
    rate = (now.get("tokens", 0) - since.get("tokens", 0)) / seconds
    peak = peak_flops(device)
    mfu = (now["flops"] - since["flops"]) / seconds / peak if peak else None
    return rate, mfu

def summary(model, args, now, final, device, bits):
    (rate, mfu), (total, active) = speed(args, now, dict(seconds=0.0, flops=0.0), device), model.num_params()
    bits = None if math.isnan(bits) else bits
    return dict(step=now["step"], loss=now["ema"], val_bpb=None, val_bytes=0, train_bpb=bits, tokens_per_s=rate,
                mfu=mfu, params_total=total, params_active=active, tokens=now["tokens"], seconds=now["seconds"],
                block_recall=[], score_recall=[], block_chance=[], dead_experts=0, max_vio=[]) | final

def report(result):
    """One line of an evaluation."""
    recall, mass, violation = (" ".join(f"{x:.2f}" for x in result[key])
                               for key in ("block_recall", "score_recall", "max_vio"))
    recalled = f" | block recall {recall} (chance {result['block_chance'][0]:.2f}), of mass {mass}" if recall else ""
    return f"val_bpb {result['val_bpb']:.4f}{recalled}" + (f" | maxvio {violation}" if violation else "")

def main(argv=None):
    return command("train.py", lambda locks: run(*parse_args(argv, locks)), "; the last good checkpoint is kept")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_ctrl_c)
    main()
