"""Steps of eight configurations on one GPU, beside what train.py's planner says of them: times, memory, kernels.

    python .ci/plan_steps.py                   # one H200, 5 minutes -> plan.json, written after each configuration
    python .ci/plan_steps.py --device cpu      # a tiny configuration, to see that the script runs

Decided before anything was measured: constants are fitted to the five of role "fit"; the three of role "held" were
looked at only afterwards, once. Each calls train.py's own train_step, compile_model and optimizers on random tokens.
"""
import argparse
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import train
from model import MiniMax, MiniMaxConfig

START = time.perf_counter()
LIMIT = 420.0                          # seconds after which no further configuration starts
M2_LIKE = dict(activation="swiglu", gemma_norm=False, qk_norm="layer", routed_scale=1.0, shared_dim=0, index_head_dim=0)

@dataclasses.dataclass
class Case:
    name: str
    role: str                          # fit or held
    rows: int
    T: int
    changes: dict                      # of the preset `small`
    recompute: bool = False
    preset: str = "small"

    @property
    def cfg(self):
        changes = dict(n_mtp=0) | self.changes
        cfg = getattr(MiniMaxConfig, self.preset)(**changes)
        return dataclasses.replace(cfg, max_seq_len=self.T)

def layers(full, other, kind="msa"):
    return dict(n_layer=full + other, attn_types=["full"] * full + [kind] * other,
                mlp_types=["dense"] * full + ["moe"] * other)

CASES = [
    Case("small", "fit", 16, 8192, dict(n_mtp=1)),
    Case("m2-like", "fit", 32, 2048, dict(
        M2_LIKE, n_layer=4, attn_types=["full"] * 4, mlp_types=["moe"] * 4, n_embd=1536, n_head=24, n_kv_head=4,
        n_expert=64, n_expert_per_tok=8, expert_dim=768)),
    Case("wide-2k", "held", 64, 2048, dict(
        layers(2, 6), n_embd=1024, n_head=8, n_kv_head=4, n_expert=32, n_expert_per_tok=4, expert_dim=512,
        shared_dim=512, dense_dim=3072, n_mtp=1)),
    Case("m3-like", "fit", 8, 8192, dict(
        layers(1, 3), n_embd=2048, n_head=32, n_kv_head=2, n_expert=32, n_expert_per_tok=4, expert_dim=1024,
        shared_dim=1024, dense_dim=4096, index_kl_stride=1)),
    Case("m3-32k", "held", 2, 32768, dict(
        layers(1, 5), n_embd=1280, n_head=16, n_kv_head=2, n_expert=16, n_expert_per_tok=2, expert_dim=1024,
        shared_dim=1024, dense_dim=3840)),
    Case("small-full", "fit", 16, 8192, dict(attn_types=["full"] * 12)),
    Case("m2-32k", "held", 4, 32768, dict(
        M2_LIKE, n_layer=6, attn_types=["full"] * 6, mlp_types=["moe"] * 6, n_embd=1024, n_head=16, n_kv_head=4,
        n_expert=32, n_expert_per_tok=4, expert_dim=1024), recompute=True),
    Case("small-32k", "fit", 4, 32768, {}, recompute=True)]

TINY = [
    Case("tiny", "fit", 2, 64, dict(n_mtp=1), preset="tiny"),
    Case("tiny-recompute", "held", 2, 64, {}, recompute=True, preset="tiny")]

class Clock:
    """Milliseconds between marks: CUDA events on a GPU, else the clock."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.marks = []

    def mark(self):
        if not self.gpu:
            self.marks.append(1e3 * time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def times(self):
        if not self.gpu:
            return [after - before for before, after in zip(self.marks, self.marks[1:])]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in zip(self.marks, self.marks[1:])]

def memory(gpu):
    return torch.cuda.memory_allocated() if gpu else 0

def peak(gpu):
    return torch.cuda.max_memory_allocated() if gpu else 0

def anew(gpu):
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

def rates(gpu):
    """Copy bytes/s and bf16 matmul FLOP/s of this GPU now."""
    if not gpu:
        return {}
    x = torch.empty(2 ** 30, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    clock = Clock(gpu)
    for _ in range(8):
        clock.mark()
        y.copy_(x)
    clock.mark()
    copy = 2 * x.nbytes / (1e-3 * statistics.median(clock.times()))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(gpu)
    for _ in range(12):
        clock.mark()
        a @ b
    clock.mark()
    return dict(copy=copy, matmul=2 * 8192 ** 3 / (1e-3 * statistics.median(clock.times()[2:])))

def profile(run):
    """-> {kernel: [microseconds, calls]} of one call, and the same by torch's operator."""
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = {}
    operators = {}
    for event in found.key_averages():
        spent = getattr(event, "self_device_time_total", 0)
        if not spent:
            continue
        on_gpu = "CUDA" in str(event.device_type)
        table = kernels if on_gpu else operators
        table[event.key[:160]] = [spent, event.count]
    return dict(kernels=kernels, operators=operators)

def measure(case, device, dtype):
    gpu = device.type == "cuda"
    cfg = case.cfg
    torch.manual_seed(1)
    began = time.perf_counter()
    before = memory(gpu)
    with torch.device(device):
        model = MiniMax(cfg, dtype)
    model.train()
    optimizers, index, rest = train.configure_optimizers(model, 1e-3)
    groups = (rest, index)
    if gpu:
        torch.compiler.reset()
        train.compile_model(model, optimizers[0])
    text = torch.randint(cfg.vocab_size, (case.rows, case.T + 1), device=device)
    pos = torch.arange(case.T, device=device).expand(case.rows, case.T)
    batch = dict(idx=text[:, :-1], targets=text[:, 1:], pos=pos)

    def step(run_mtp, learn=optimizers):
        return train.train_step(model, batch, learn, groups, run_mtp=run_mtp, bias_rate=0.01, recompute=case.recompute)

    # compile
    modes = [True, False] if cfg.n_mtp else [False]
    for run_mtp in modes:
        step(run_mtp)
        step(run_mtp)
    anew(gpu)
    ready = time.perf_counter() - began

    # times, of steps that are queued one behind the other, and the time that queueing takes
    row = dict(
        dataclasses.asdict(case), cfg=dataclasses.asdict(cfg), ready_s=ready, params=model.num_params(),
        times={}, queued_ms={}, peak={}, flops_per_token={})
    for run_mtp in modes:
        name = "mtp" if run_mtp else "plain"
        anew(gpu)
        clock = Clock(gpu)
        queued = []
        clock.mark()
        for _ in range(7):
            at = time.perf_counter()
            found = step(run_mtp)
            queued.append(1e3 * (time.perf_counter() - at))
            clock.mark()
        row["times"][name] = clock.times()
        row["queued_ms"][name] = queued
        row["peak"][name] = peak(gpu) - before
        row["flops_per_token"][name] = model.flops_per_token(pos, run_mtp=run_mtp)
    row["loss"] = found["loss"].item()

    # memory and time by part, of one more step of each kind; the profiler's kernels of a plain step
    row["parts"] = {}
    for run_mtp in modes:
        at_rest = memory(gpu) - before
        anew(gpu)
        clock = Clock(gpu)
        clock.mark()
        total = model.count_losses(batch["targets"], None, None, run_mtp)
        _, sums, aux = model(**batch, run_mtp=run_mtp, recompute=case.recompute)
        clock.mark()
        kept = memory(gpu) - before
        forward_peak = peak(gpu) - before
        anew(gpu)
        sums.over(total).objective(0.3).backward()
        clock.mark()
        backward_peak = peak(gpu) - before
        load = aux.get("expert_load", torch.zeros(0, device=device))
        del sums, aux
        with_grads = memory(gpu) - before
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        clock.mark()
        anew(gpu)
        train.update(model, optimizers, load, 0.01)
        clock.mark()
        forward_ms, backward_ms, clip_ms, update_ms = clock.times()
        row["parts"]["mtp" if run_mtp else "plain"] = dict(
            at_rest=at_rest, kept=kept, forward_peak=forward_peak, backward_peak=backward_peak, with_grads=with_grads,
            update_peak=peak(gpu) - before, forward_ms=forward_ms, backward_ms=backward_ms, clip_ms=clip_ms,
            update_ms=update_ms)
    if gpu:
        try:
            found = {}

            def whole():
                found.update(step(False, learn=[]))
            row["profile"] = profile(whole)
            load = found["expert_load"]
            row["profile_update"] = profile(lambda: train.update(model, optimizers, load, 0.01))
        except Exception:              # the rest stays useful
            row["profile_error"] = traceback.format_exc()
    return row

def print_row(row, case):
    """A line for each kind of step: what was measured, and how far off the planner is."""
    for kind, times in row["times"].items():
        planner = train.Planner(case.cfg, case.recompute, 1 if kind == "mtp" else math.inf)
        ms = statistics.median(times[2:])
        planned_ms = 1e3 * sum(planner.seconds(case.rows, case.T).values())
        shown = f"{ms:7.1f} ms, planned {planned_ms / ms - 1:+.1%}"
        if kind == "mtp" or not case.cfg.n_mtp:  # the planner's memory is that of the largest step
            peak = row["peak"][kind]
            planned = sum(planner.memory(case.rows, case.T).values())
            shown += f"; {peak / 1e9:5.1f} GB, planned {planned / max(peak, 1) - 1:+.1%}"
        print(f"{case.name:12} {case.role:5} {kind:5} {shown}", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--only", nargs="*", help="names of configurations")
    parser.add_argument("--out", default="plan.json", metavar="FILE")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    name = torch.cuda.get_device_name() if gpu else "cpu"
    result = dict(device=name, torch=torch.__version__, rates=rates(gpu), rows=[])
    print(f"{name}, torch {torch.__version__}, {result['rates']}", flush=True)
    if gpu:
        torch.cuda.empty_cache()
    for case in CASES if gpu else TINY:
        if args.only and case.name not in args.only:
            continue
        if time.perf_counter() - START > LIMIT:
            print(f"{case.name}: left out, {LIMIT:.0f} s are over", flush=True)
            continue
        began = time.perf_counter()
        try:
            row = measure(case, device, dtype)
        except Exception:
            row = dict(name=case.name, role=case.role, error=traceback.format_exc())
            print(row["error"], flush=True)
        row["seconds"] = time.perf_counter() - began
        result["rows"].append(row)
        with open(args.out, "w") as file:
            json.dump(result, file)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        if "times" in row and gpu:     # a plan is an H200's
            print_row(row, case)
    print(json.dumps(dict(rows=len(result["rows"]), seconds=time.perf_counter() - START)))

if __name__ == "__main__":
    main()
