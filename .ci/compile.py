"""Compile every kernel for sm_90, without a GPU: registers and stack bytes (spills) as one line of JSON."""
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before msa is imported: a kernel's decorator reads the flag
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import moe
import msa

def variants():
    """Every kernel as launched at M3's sizes, and what else M2's change -> (name, its arguments, options)."""
    base = dict(HKV=4, G=16, D=128, L=128, S=16, S1=15, W=16, RUN=16, COLS=16, RUNS=512, TILE=64, SPLIT=66,
                PADDED=128, ROWS=16, PDL=True, DIMS=(4, 16, 128, 128, 16, 16, 16, 512, 32),
                keys="tensordesc<bf16[128, 128]>", **dict.fromkeys("q k v qi ki scale out part".split(), "*bf16"),
                **dict.fromkeys("lse scores slack stat delta index_stat share value dki".split(), "*fp32"),
                **dict.fromkeys("T Tk N P cap n edge0".split(), "i32"),
                **dict.fromkeys("grad dq dqi a b".split(), "*bf16"),
                **dict.fromkeys(("dk", "dv"), "*fp32"), ends="*i64")
    index, train = dict(num_warps=8, num_stages=2, maxnreg=128, ROWS=128), dict(num_warps=8, num_stages=2)
    for name, change in (("index", index), ("index", dict(index, end=None, block_end=None, start=None)),
                         ("query_outer", dict(num_stages=2)), ("attend", dict(num_warps=8)), ("rescore", {}),
                         ("kv_outer", dict(ROWS=64, DIMS=(16, 128, 128))),
                         ("kv_outer", dict(ROWS=64, HKV=8, DIMS=(6, 128, 128))), ("dot", dict(out="*fp32", ROWS=64)),
                         ("combine", dict(ROWS=64, DIMS=(16, 128, 128))),
                         ("combine", dict(ROWS=128, HKV=8, DIMS=(6, 128, 128), num_warps=8)),
                         ("scan", dict(scale=None, slack=None)), ("scan", dict(ki="*i8", num_warps=2)),
                         ("dense", dict(part="*fp32", num_stages=4)), ("dense_sum", dict(part="*fp32")),
                         ("backward", dict(train, DIMS=(4, 16, 128, 128, 16, 64))), ("slot_sum", {}),
                         ("backward", dict(train, DIMS=(8, 6, 128, 128, 16, 32))),
                         ("task_sum", dict(train, part="*fp32", out="*fp32")),
                         ("kl", dict(DIMS=(4, 16, 128, 128, 128, 16, 64, 64, 1), num_stages=2, index_stat=None)),
                         ("kl", dict(train, DIMS=(8, 6, 128, 128, 128, 16, 64, 16, 8))),
                         ("gated", gate := dict(h="*bf16", weight="*fp32", I=512, OAI=True, ROWS=4, COLS=512)),
                         ("gated_grad", dict(gate, grad="*bf16", dh="*bf16", dweight="*fp32")),
                         ("softmax_loss", dict(logits="*bf16", loss="*fp32", V="i32", COLS=8192, num_warps=16))):
        names = kernel(name).arg_names
        yield (name, {p: {**base, **change}.get(p, None if p in change else "*i32") for p in names},
               {"num_warps": 4, "num_stages": 3, **{p: x for p, x in change.items() if p not in names}})

def kernel(name):
    return next(getattr(m, f"_{name}_kernel") for m in (msa, moe, model) if hasattr(m, f"_{name}_kernel"))

def compile_kernel(variant):
    """For sm_90 -> [name, registers, stack bytes]."""
    from triton.compiler.compiler import ASTSource, GPUTarget
    (name, args, options), tool = variant, Path(msa.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    fn, const = kernel(name), {p: x for p, x in args.items() if not isinstance(x, str)}
    aligned = {(n,): [["tt.divisibility", 16]] for n, x in enumerate(args.values()) if str(x)[0] == "*"}
    source = ASTSource(fn, {p: "constexpr" if p in const else x for p, x in args.items()}, const, aligned)
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        file.write(msa.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return [fn.__name__, *map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())]

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(compile_kernel, variants(), 1)))
