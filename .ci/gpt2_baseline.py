"""A baseline: GPT-2 124M by nanoGPT's recipe, for train.py on the same text, tokenizer, row length and time, and for
the decoding that `bench.py --what generate` times, with random weights.

    python .ci/gpt2_baseline.py --data FOLDER --minutes 5        # on a GPU, beside train.py --preset small
    python .ci/gpt2_baseline.py --steps 3 --tiny --device cpu    # the same code in seconds: does it run?

12 layers of 12 heads, AdamW at 6e-4 with a decay of 0.1, cosine, bf16, compiled; the clock does not count compiling.
Its rows have no pads: documents follow each other, and a row sees all that is in it. The last line is JSON.
"""
import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import PATTERN, Tokenizer, learn_bpe, pick_device
from train import VAL_BYTES, Tokens, get_batch, load_data

LR = 6e-4
WARMUP = 0.05                          # share of the run
LOWEST = 0.1                           # of the rate, at the end of the cosine
SEED = 1337                            # of weights and batches
VOCAB = 50304                          # small's

# ---- the model -----------------------------------------------------------------------------------

class Layer(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.n_head = H
        self.attn_norm = nn.LayerNorm(C, bias=False)
        self.mlp_norm = nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, cache=None, slots=None, mask=None):
        x = x + self.attention(self.attn_norm(x), cache, slots, mask)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))

    def attention(self, x, cache, slots, mask):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                                # (B, H, T, D)
        else:
            held_k, held_v = cache
            held_k[:, :, slots] = k
            held_v[:, :, slots] = v
            y = F.scaled_dot_product_attention(q, held_k, held_v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

class GPT2(nn.Module):
    def __init__(self, vocab_size, T, C=768, H=12, n_layer=12):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, C)
        self.wpe = nn.Embedding(T, C)
        self.norm = nn.LayerNorm(C, bias=False)
        self.layers = nn.ModuleList(Layer(C, H) for _ in range(n_layer))
        for name, p in self.named_parameters():
            into_residual = name.endswith(("out.weight", "down.weight"))
            if p.dim() == 2:
                nn.init.normal_(p, 0, 0.02 / (2 * n_layer) ** 0.5 if into_residual else 0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe.weight
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def make_cache(self, B, n_slots):
        """Static buffers: a pair of keys and values (B, H, n_slots, D) for each layer."""
        H = self.layers[0].n_head
        size = (B, H, n_slots, self.wte.embedding_dim // H)
        weight = self.wte.weight
        return [(weight.new_zeros(size), weight.new_zeros(size)) for _ in self.layers]

    @torch.no_grad()
    def next_logits(self, idx, cache=None, slots=None):
        """Logits (B, V) of the token after the last.

        idx    (B, T) tokens: all of the text, or with a cache those that it lacks
        cache  of make_cache, to which their keys and values are written
        slots  (T,) their positions; with a cache alone
        """
        if cache is None:
            caches = [None] * len(self.layers)
            mask = None
            slots = torch.arange(idx.size(1), device=idx.device)
        else:
            caches = cache
            n_slots = cache[0][0].size(2)
            mask = torch.arange(n_slots, device=idx.device) <= slots[:, None]                          # (T, n_slots)
        x = self.wte(idx) + self.wpe(slots)
        for layer, held in zip(self.layers, caches):
            x = layer(x, held, slots, mask)
        return self.norm(x[:, -1]) @ self.wte.weight.T

# ---- generation ----------------------------------------------------------------------------------
# Both ways yield a token (B,) at a time. Without a cache, as nanoGPT's own `generate`, each token takes a forward of
# the whole text. With one, a step is a forward of one token; on a GPU it is compiled and captured, drawing included, in
# a CUDA graph, so that no step waits for the host.

def draw(logits, temperature, top_k):
    """(B, V) -> token (B,): the largest, or one of the top_k largest by their probabilities."""
    if temperature == 0:
        return logits.argmax(-1)
    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
    p = (logits / temperature).masked_fill(logits < least, -math.inf).softmax(-1, dtype=torch.float32)
    # the least of exponential times is that of each rate's share: a draw without waiting for the GPU
    return (p / torch.empty_like(p).exponential_()).argmax(-1)

@torch.no_grad()
def generate_uncached(model, idx, n_new, temperature, top_k):
    """Continue each row of idx (B, T) by n_new tokens; a text longer than the context loses its beginning."""
    for _ in range(n_new):
        context = idx[:, -model.wpe.num_embeddings:]
        token = draw(model.next_logits(context), temperature, top_k)
        idx = torch.cat([idx, token[:, None]], 1)
        yield token

class Decoder:
    """Generation with a static cache of n_slots for B rows; it may be used again and again."""

    def __init__(self, model, B, n_slots, temperature, top_k):
        device = model.wte.weight.device
        self.model = model
        self.sampling = temperature, top_k
        self.cache = model.make_cache(B, n_slots)
        self.token = torch.zeros(B, dtype=torch.int64, device=device)  # the last one of each row
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)   # and where its keys go
        self.next_logits = model.next_logits
        self.replay = self.step
        if device.type == "cuda":
            self.replay = self.capture()

    @torch.no_grad()
    def step(self):
        """Read the last token, and draw the next one into its place."""
        logits = self.next_logits(self.token[:, None], self.cache, self.slot)
        self.token.copy_(draw(logits, *self.sampling))
        self.slot += 1

    def capture(self):
        """-> a function that replays a step, compiled and in a CUDA graph."""
        self.next_logits = torch.compile(self.model.next_logits, fullgraph=True, dynamic=False)
        # of one query: Inductor's own code of the products is faster than a kernel for many (as in gpt-fast)
        with sdpa_kernel(SDPBackend.MATH):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.slot.zero_()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        return graph.replay

    @torch.no_grad()
    def generate(self, idx, n_new):
        """Continue each row of idx (B, T) by n_new tokens."""
        T = idx.size(1)
        slots = torch.arange(T, device=idx.device)
        logits = self.model.next_logits(idx, self.cache, slots)
        self.token.copy_(draw(logits, *self.sampling))
        self.slot.fill_(T)
        yield self.token.clone()
        for _ in range(n_new - 1):
            self.replay()
            yield self.token.clone()

# ---- training and evaluation ---------------------------------------------------------------------

def configure_adamw(model, on_gpu):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=matrices), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, LR, (0.9, 0.95), weight_decay=0.1, fused=on_gpu)

def rate_at(share):
    """Linear warm-up, then a cosine down to a tenth."""
    middle = (1 + LOWEST) / 2
    height = (1 - LOWEST) / 2
    return LR * min(share / WARMUP, middle + height * math.cos(math.pi * share))

def train(model, optimizer, loss_of, batch_at, args):
    """Steps until --minutes or --steps are over -> how many, seconds."""
    step, share = 0, 0.0
    started = time.perf_counter()
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(share)
        loss_of(batch_at(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            wait(args.device)
        seconds = time.perf_counter() - started
        share = step / args.steps if args.steps else seconds / (60 * args.minutes)
    wait(args.device)
    return step, time.perf_counter() - started

def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()

@torch.no_grad()
def evaluate(loss_of, tokens, B, T):
    """Bits per byte over windows of T; each is repeated B times, the shape that is compiled."""
    nats = 0.0
    for start in range(0, len(tokens.begin), T):
        window = tokens.rows([start], T)
        n_targets = (window["targets"] >= 0).sum().item()
        nats += loss_of({name: x.repeat(B, 1) for name, x in window.items()}).item() * n_targets
    return nats / math.log(2) / tokens.n_bytes

def parse_args():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", help="text file or folder; default: the Python standard library")
    p.add_argument("--minutes", type=float, default=5.0)
    p.add_argument("--steps", type=int, help="end after this many, in place of --minutes")
    p.add_argument("--tiny", action="store_true", help="two layers of 64 channels, rows of 128 tokens: a trial")
    p.add_argument("--device")
    return p.parse_args()

def main():
    args = parse_args()
    args.device, dtype, _ = pick_device(args.device)
    on_gpu = args.device.type == "cuda"

    # sizes: GPT-2 124M on small's rows, or a trial's
    if args.tiny:
        B, T = 2, 128
        vocab_size = 300
        val_bytes = 2048
        sizes = dict(C=64, H=2, n_layer=2)
    else:
        B, T = 8, 8192
        vocab_size = VOCAB
        val_bytes = VAL_BYTES
        sizes = {}

    # the text, cut and tokenized as train.py does
    texts, val_texts, _ = load_data(args.data, None, val_bytes)
    tokenizer = Tokenizer(learn_bpe((text for _, text in texts), vocab_size, PATTERN))
    data = Tokens(texts, tokenizer, 1, T)
    val = Tokens(val_texts, tokenizer, 1, T)

    # the model, compiled on a GPU
    torch.manual_seed(SEED)
    model = GPT2(tokenizer.n_vocab, T, **sizes).to(args.device)
    forward = torch.compile(model) if on_gpu else model
    optimizer = configure_adamw(model, on_gpu)
    print(f"GPT-2: {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}, {B} rows of {T} tokens a step, "
          f"{data.n_tokens:,} tokens of text", flush=True)

    # what a step needs: its rows, and their loss
    def batch_at(step):
        return get_batch(data, SEED, 0, step, B, T)

    def loss_of(rows):
        half = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
        idx = rows["idx"].to(args.device, non_blocking=True)
        targets = rows["targets"].to(args.device, non_blocking=True)
        with half:
            return forward(idx, targets)

    # compile before the clock starts, as train.py does
    loss_of(batch_at(0)).backward()
    model.zero_grad(set_to_none=True)
    wait(args.device)

    # train, and measure what train.py measures
    steps, seconds = train(model, optimizer, loss_of, batch_at, args)
    val_bpb = evaluate(loss_of, val, B, T)
    tokens_per_s = steps * B * T / seconds
    print(f"GPT-2: {steps} steps, {tokens_per_s:,.0f} tokens/s, val_bpb {val_bpb:.4f}")
    print(json.dumps(dict(steps=steps, tokens_per_s=tokens_per_s, val_bpb=val_bpb, seconds=seconds)))

if __name__ == "__main__":
    main()
