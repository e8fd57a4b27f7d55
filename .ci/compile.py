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
import sample

# A kernel's parameters by their type, where it is not an array of int32: names mean the same in every kernel.
TYPES = {
    "*bf16": "q k v qi ki scale part out dout dq dqi a b h x residual w13 w2 shared13 shared2",
    "*fp32": "lse stat index_stat delta share kl dk dv dki weight dweight loss bias factor cos sin "
             "slack block_score run_best run_upper run_lower q_gain k_gain qi_gain ki_gain logits peak cut "
             "draft_logits draft_cut logprob",
    "*i64": "ends first key token drafts n_drafts n_accepted drawn",
    "*i1": "allowed",
    "i32": "T capacity n P V edge0 R N chunks top_k key_offset",
    "fp32": "temperature top_p",
    "tensordesc<bf16[128, 128]>": "keys",
}
# Sizes of M3's sparse attention, and what differs in M2's heads. S1 is S - 1, TOP the same rounded up.
M3 = dict(HKV=4, G=16, D=128, DI=128, L=128, S=16, S1=15, TOP=16, PDL=True)
M2 = dict(M3, HKV=8, G=6)

def variant(name, sizes, num_warps=4, num_stages=3, maxnreg=None, types=(), **more):
    """A kernel as one launch has it. types: parameters whose type differs from TYPES; None: an argument left out."""
    kernel = find(name)
    values = {}
    for kind, names in TYPES.items():
        values.update(dict.fromkeys(names.split(), kind))
    values.update(sizes, **more)
    num_warps = values.pop("num_warps", num_warps)
    values.update(types)
    args = {parameter: values.get(parameter, "*i32") for parameter in kernel.arg_names}
    options = dict(num_warps=num_warps, num_stages=num_stages)
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    return name, args, options

def find(name):
    """The kernel of this name, in whichever file it is."""
    for file in (msa, moe, model, sample):
        kernel = getattr(file, f"_{name}_kernel", None)
        if kernel is not None:
            return kernel
    raise ValueError(f"no kernel is called _{name}_kernel")

def variants():
    """Every kernel as launched at M3's sizes, and what else M2's change."""
    # prefill
    index = dict(num_warps=8, num_stages=2, maxnreg=128, ROWS=128)
    yield variant("index", M3, **index)
    yield variant("index", M3, **index, types=dict(end=None, block_end=None, start=None))
    yield variant("query_outer", M3, num_stages=2, ROWS=16)
    yield variant("kv_outer", M3, ROWS=64)
    yield variant("kv_outer", M2, ROWS=64)
    yield variant("combine", M3, ROWS=64)
    yield variant("combine", M2, ROWS=128, num_warps=8)

    # training
    train = dict(num_warps=8, num_stages=2)
    yield variant("index_lse", M3, num_stages=2, COLS=64, STRIDE=1)
    yield variant("index_kl", M2, **train, ROWS=64, COLS=16, STRIDE=8)
    yield variant("dot", M3, ROWS=64, types=dict(out="*fp32"))
    yield variant("backward", M3, **train, ROWS=64)
    yield variant("backward", M2, **train, ROWS=32)
    yield variant("task_sum", M3, **train, types=dict(part="*fp32", out="*fp32"))
    yield variant("slot_sum", M3, ROWS=16)

    # decode
    scan = dict(RUN=16, COLS=16)
    yield variant("scan", M3, **scan, types=dict(scale=None, slack=None))
    yield variant("scan", M3, **scan, num_warps=2, types=dict(ki="*i8"))
    yield variant("rescore", M3, **scan, RUNS=512)
    yield variant("attend", M3, num_warps=8, RUNS=512, PAIR=32, ROWS=16)
    yield variant("dense", M3, num_stages=4, TOKENS=1, ROWS=16, TILE=64, types=dict(part="*fp32"))
    yield variant("dense", M3, num_stages=4, TOKENS=2, ROWS=32, TILE=64, types=dict(part="*fp32"))
    yield variant("dense_sum", M3, SPLIT=66, PADDED=128, types=dict(part="*fp32"))

    # a decoding step of `small`: R rows; the projections and the head, then experts, or a dense layer's one
    small = dict(C=768, I=512, IS=512, A=4, E=16, EPS=1e-6, EXPERTS=16, CHOSEN=4, SPLIT=4, BLOCK=256, PDL=True)
    dense = dict(small, I=0, IS=2304, A=0, PAIRS=32, CHOSEN=1, EXPERTS=2, ROWS=16)
    bf16 = dict(weight="*bf16")
    few = dict(num_stages=4)
    for rows in (8, 16):
        tile = dict(small, ROWS=rows, PAIRS=max(32, 4 * rows))
        wide = dict(COLS=16 if rows == 8 else 32, MOST=16384 if rows == 8 else 32768, AHEAD=True)
        yield variant("few_linear", tile, **few, **wide, K=768, types=dict(bf16, residual=None))
        yield variant("few_linear", tile, **few, K=512, COLS=16, MOST=8192, AHEAD=True, types=dict(bf16, EPS=None))
        head = dict(COLS=128, MOST=131072, SPLIT=1, BLOCK=64, AHEAD=False)
        yield variant("few_linear", dict(tile, **head), **few, K=768, types=dict(bf16, residual=None, out="*fp32"))
        yield variant("few_up", tile, num_stages=3, OAI=True, BY_EXPERT=rows > 8, COLS=32)
        yield variant("few_down", dict(tile, BLOCK=512), **few, COLS=16)
    yield variant("few_up", dense, num_stages=3, OAI=True, BY_EXPERT=True, COLS=32,
                  types=dict(w13=None, factor=None, idx=None))
    yield variant("few_down", dict(dense, BLOCK=512), **few, COLS=16, types=dict(w2=None, idx=None))

    # drawing from `small`'s logits: greedy, top-k and top-p, whole; drafts. (Top-p without top-k holds a whole row,
    # more than there are registers.)
    row = dict(GROUP=64, CHUNK=2048, CHUNKS=32, GROUPS=1024, TILE=4096, num_warps=8)
    listed = dict(row, BY_GROUP=True, LISTED=64, SIZE=4096)
    whole = dict(row, BY_GROUP=False, LISTED=1, SIZE=65536, num_warps=16)
    every = dict(allowed=None)
    yield variant("peaks", dict(row, num_warps=4))
    yield variant("draw", listed, GREEDY=True, BY_K=True, BY_P=False, types=every)
    yield variant("draw", listed, GREEDY=False, BY_K=True, BY_P=True)
    yield variant("draw", whole, GREEDY=False, BY_K=False, BY_P=False, types=every)
    for sizes in (listed, whole):
        yield variant("verify", sizes, K=3, GREEDY=False)
    yield variant("verify", listed, K=0, GREEDY=True, types=dict(cut=None, draft_logits=None, draft_cut=None))
    yield variant("few_route", dict(small, BLOCK=1024), num_warps=8, SCALE=2.0, MOST=16384)
    heads = dict(M3, H=4, HKV=2, ROT=64, EPS=1e-6)
    yield variant("append", heads, num_warps=1, TOGETHER=False)
    yield variant("append", dict(heads, H=48, HKV=8), TOGETHER=True, types=dict(qi=None, block_idx=None))

    # the gate and the loss, token by token
    gate = dict(I=512, OAI=True, ROWS=4, COLS=512)
    yield variant("gated", gate, types=dict(weight="*fp32", out="*bf16"))
    yield variant("gated_grad", gate, types=dict(grad="*bf16", dh="*bf16"))
    yield variant("softmax_loss", dict(COLS=8192), num_warps=16, types=dict(logits="*bf16"))

def compile_kernel(variant):
    """For sm_90 -> [name, registers, stack bytes]."""
    from triton.compiler.compiler import ASTSource, GPUTarget
    name, args, options = variant
    kernel = find(name)
    constants = {parameter: x for parameter, x in args.items() if not isinstance(x, str)}
    signature = {parameter: "constexpr" if parameter in constants else x for parameter, x in args.items()}
    pointers = [n for n, kind in enumerate(signature.values()) if kind[0] == "*"]
    aligned = {(n,): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = msa.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    tool = Path(msa.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        file.write(compiled.asm["cubin"])
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout).groups()
    return [kernel.__name__, int(registers), int(stack)]

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(compile_kernel, variants(), 1)))
