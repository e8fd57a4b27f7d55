"""Compile every kernel for sm_90, without a GPU. Print one line of JSON: of each kernel its name, registers, and stack
bytes (spills), or null where spills are known.

Every kernel is launched, and Triton is stopped where it would compile: what fails in a launch on a GPU, such as a
parameter with a name that Triton keeps for itself, fails here, too. A decoding step makes its own launches, on tensors
without data. Those of prefill, training and int8 keys are written by hand.
"""
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before msa is imported: a kernel's decorator reads the flag
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

import model
import moe
import msa
import sample
from model import MiniMax, MiniMaxConfig
from sample import Sampling

# ---- launches without a GPU ----------------------------------------------------------------------

class Hopper:
    """What a launch asks Triton's driver for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

def find(name):
    """The kernel of this name, in whichever file it is."""
    for file in (msa, moe, model, sample):
        kernel = getattr(file, name, None)
        if kernel is not None:
            return kernel
    raise ValueError(f"no kernel is called {name}")

def collect(*functions):
    """Call functions that launch kernels -> dict: what Triton needs to compile a launch -> the kernel's name, and
    whether its spills are known. Launches that compile to the same are one entry."""
    launches = {}

    def note(fn, compile, **_):
        names = fn.jit_function.arg_names
        constants = {names[place]: value for (place,), value in compile["constants"].items()}
        launches[compile["specialization_data"]] = fn.name, spills_are_known(fn.name, constants)
        return True                    # Triton neither compiles nor launches

    driver.set_active(Hopper())
    knobs.runtime.jit_cache_hook = note
    for function in functions:
        function()
    knobs.runtime.jit_cache_hook = None
    return launches

def spills_are_known(name, constants):
    """Top-p without top-k searches a whole row of logits, which a program holds: a long row exceeds its registers."""
    if name != "_draw_kernel":
        return False
    holds_row = constants["BY_P"] and not constants["BY_GROUP"]
    return holds_row and constants["SIZE"] > 8192

def compile_launch(launch):
    """-> [kernel's name, registers, stack bytes]."""
    data, (name, known) = launch
    compiled = find(name).preload(data)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        file.write(compiled.asm["cubin"])
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout).groups()
    return [name, int(registers), None if known else int(stack)]

# ---- by hand: prefill, training, int8 keys -------------------------------------------------------

# A kernel's parameters by their type, where it is not an array of int32: names mean the same in every kernel.
ARRAYS = {
    torch.bfloat16: "q k v qi ki scale part out dout dq dqi a b h",
    torch.float32: "lse stat index_stat delta share kl dk dv dki weight dweight loss slack block_score run_best "
                   "run_upper run_lower rates before added",
    torch.int64: "ends",
}
NUMBERS = "T capacity n P V edge0 first_query".split()
ANY = 3  # a number that Triton compiles nothing special for: neither 1 nor a multiple of 16

# Sizes of M3's sparse attention, and what differs in M2's heads. S1 is S - 1, TOP the same rounded up.
M3 = dict(HKV=4, G=16, D=128, DI=128, L=128, S=16, S1=15, TOP=16, PDL=True)
M2 = dict(M3, HKV=8, G=6)

def launch(name, sizes, num_warps=4, num_stages=3, maxnreg=None, types=(), **more):
    """A launch at these sizes. types: parameters whose type differs from ARRAYS; None: an argument left out."""
    kernel = find(f"_{name}_kernel")
    values = dict.fromkeys(NUMBERS, ANY)
    for dtype, names in ARRAYS.items():
        values.update(dict.fromkeys(names.split(), dtype))
    values["keys"] = TensorDescriptor(MockTensor(torch.bfloat16), [128, 128], [128, 1], [128, 128])
    values.update(sizes, **more)
    values.update(types)

    args = {}
    for parameter in kernel.arg_names:
        value = values.get(parameter, torch.int32)
        args[parameter] = MockTensor(value) if isinstance(value, torch.dtype) else value
    options = dict(num_warps=num_warps, num_stages=num_stages)
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    kernel.warmup(grid=(1,), **args, **options)

def launch_by_hand():
    """Every kernel that a decoding step does not launch, at M3's sizes, and what else M2's change."""
    # prefill
    index = dict(num_warps=8, num_stages=2, maxnreg=128, ROWS=128)
    launch("index", M3, **index)
    launch("index", M3, **index, types=dict(end=None, block_end=None, start=None))
    launch("query_outer", M3, num_stages=2, ROWS=16)
    launch("kv_outer", M3, ROWS=64)
    launch("kv_outer", M2, ROWS=64)
    launch("combine", M3, ROWS=64)
    launch("combine", M2, ROWS=128, num_warps=8)

    # training
    train = dict(num_warps=8, num_stages=2)
    launch("index_lse", M3, num_stages=2, COLS=64, STRIDE=1)
    launch("index_kl", M2, **train, ROWS=64, COLS=16, STRIDE=8)
    launch("dot", M3, ROWS=64, types=dict(out=torch.float32))
    launch("backward", M3, **train, ROWS=64)
    launch("backward", M2, **train, ROWS=32)
    launch("task_sum", M3, **train, types=dict(part=torch.float32, out=torch.float32))
    launch("slot_sum", M3, ROWS=16)

    # Lightning: what segments add to states; outputs; their gradients. Of one document, and of several
    tile = model.LIGHTNING_TILE
    wide, narrow = (TensorDescriptor(MockTensor(torch.bfloat16), [2 ** 15, 8192], [8192, 1], [tile["ROWS"], columns])
                    for columns in (128, tile["COLS"]))
    walk = dict(tile, sizes=dict(H=64, D=128), k=wide, v=narrow, chunks=ANY, head=2 ** 17)
    states = dict(walk, q=None, y=None, head=0, down=0, across=0)
    outputs = dict(walk, q=wide, y=narrow, down=128, across=1)
    turned = dict(walk, q=wide, y=narrow, down=1, across=128)
    for limit, reverse in product((None, torch.int32), (False, True)):
        launch("lightning", **states, REVERSE=reverse, types=dict(before=None, limit=limit))
        launch("lightning", **outputs, REVERSE=reverse, types=dict(added=None, limit=limit))
        launch("lightning", **turned, REVERSE=reverse, types=dict(added=None, limit=limit))

    # the gate and the loss, token by token
    gate = dict(I=512, OAI=True, ROWS=4, COLS=512)
    launch("gated", gate, types=dict(out=torch.bfloat16))
    launch("gated_grad", gate, types=dict(grad=torch.bfloat16, dh=torch.bfloat16))
    launch("softmax_loss", dict(COLS=8192), num_warps=16, types=dict(logits=torch.bfloat16))

    # decoding with int8 keys, whose runs are the longest
    scan = dict(RUN=16, COLS=16)
    launch("scan", M3, **scan, num_warps=2, types=dict(ki=torch.int8))
    launch("rescore", M3, **scan, RUNS=512)
    launch("attend", M3, num_warps=8, RUNS=512, PAIR=32, ROWS=16)

# ---- decoding steps ------------------------------------------------------------------------------
# Models without data launch what real ones do. These few steps reach every kind of launch: an argument that may be None
# is None in one of them, and not in another; a switch is on and off; tiles have each of their sizes; and rows of logits
# are cut in every way. One row, or one token a row, is a kind of its own: Triton compiles the number 1 as a constant.

GREEDY = Sampling(temperature=0.0)
TOP_K = Sampling(top_k=40)
TOP_P = Sampling(top_p=0.9)
TOP_K_AND_P = Sampling(top_k=40, top_p=0.9)
UNCUT = Sampling()

def launch_steps():
    """Decoding steps of M2's and M3's patterns: a layer of each kind, and an MTP module."""
    # tensors of FakeTensorMode have no data; on a CPU, they say that they are on a GPU, at aligned addresses
    FakeTensor.is_cuda = property(lambda tensor: True)
    FakeTensor.data_ptr = lambda tensor: tensor.storage_offset() * tensor.itemsize
    torch.cuda.get_device_capability = lambda device: (9, 0)
    with FakeTensorMode(), torch.no_grad():
        launch_steps_of_m2()
        launch_steps_of_m3()

def launch_steps_of_m2():
    """Experts alone, norms over all heads."""
    layers = dict(n_layer=1, attn_types=["full"], mlp_types=["moe"], n_mtp=1)
    micro = MiniMax(MiniMaxConfig.micro(**layers), torch.bfloat16)
    launch_step(micro, 1, 0, UNCUT)
    launch_step(micro, 1, 1, TOP_P, guided=True)
    launch_step(micro, 8, 1, TOP_K_AND_P, guided=True)

    # as many heads and experts as M2
    heads = dict(n_head=48, n_kv_head=8, head_dim=128, rotary_dim=64)
    experts = dict(n_embd=3072, n_expert=256, n_expert_per_tok=8, expert_dim=1536)
    wide = MiniMax(MiniMaxConfig.micro(**layers, **heads, **experts), torch.bfloat16)
    launch_step(wide, 1, 0, GREEDY)

def launch_steps_of_m3():
    """A dense layer with full attention; MSA, which a long cache has, with a shared expert among others."""
    layers = dict(n_layer=2, attn_types=["full", "msa"], mlp_types=["dense", "moe"], n_mtp=1)
    small = MiniMax(MiniMaxConfig.small(**layers), torch.bfloat16)
    launch_step(small, 1, 0, TOP_K, capacity=8192, guided=True)
    launch_step(small, 1, 0, TOP_P)
    launch_step(small, 1, 0, UNCUT)
    launch_step(small, 1, 3, UNCUT)
    launch_step(small, 32, 0, GREEDY, guided=True)

    # as many heads as M3
    wide = MiniMax(MiniMaxConfig.small(**layers, n_head=64, n_kv_head=4), torch.bfloat16)
    launch_step(wide, 1, 1, GREEDY)

def launch_step(model, rows, drafts, sampling, capacity=1024, guided=False):
    """What a sample.StepGraph computes. guided: the first token is one of those allowed, and routes are recorded."""
    record = print if guided else None
    decoder = sample.Decoder(model, rows, capacity, sampling, drafts, record=record, kernels=True)
    allowed = None
    if guided:
        allowed = torch.ones(rows, model.cfg.vocab_size, dtype=torch.bool)

    # its inputs are columns of one tensor
    T = 1 + drafts
    inputs = torch.zeros(rows, T + 3, dtype=torch.int64)
    fed, n_fed, n_drafts, _ = inputs.split([T, 1, 1, 1], 1)
    decoder.n_stale = T
    decoder.compute(fed.contiguous(), n_fed[:, 0], n_drafts[:, 0] if drafts else None, allowed)

if __name__ == "__main__":
    launches = collect(launch_by_hand, launch_steps)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(compile_launch, launches.items(), 1)))
