"""Writes a folder in the exact layout of the released MiniMax-M2, with random numbers, layer by layer:

    python .ci/fake_m2.py DIR                    # layers 0 and 1 of 62 at full width: 9.8 GB
    python sample.py --hf DIR --layers 0:2 --offload --prompt 1,2,3

config.json is that of M2.5 but for the sizes that flags change. Matrices are fp8 (e4m3) with a scale for each tile of
128 x 128, embedding, head and norms bf16, the router's gate and bias fp32. A shard holds one layer; the index names it.
On a GPU the numbers are made there.
"""
import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

TILE = 128
LARGEST = 0x70                         # bytes of e4m3 from here on are over 128; 0x7f is NaN

CONFIG = dict(  # of M2.5
    architectures=["MiniMaxM2ForCausalLM"], attn_type_list=[1] * 62,
    auto_map=dict(
        AutoConfig="configuration_minimax_m2.MiniMaxM2Config",
        AutoModelForCausalLM="modeling_minimax_m2.MiniMaxM2ForCausalLM"),
    head_dim=128, hidden_act="silu", hidden_size=3072, intermediate_size=1536, max_position_embeddings=196608,
    model_type="minimax_m2", mtp_transformer_layers=1, num_attention_heads=48, num_experts_per_tok=8,
    num_hidden_layers=62, num_key_value_heads=8, num_local_experts=256, num_mtp_modules=3, qk_norm_type="per_layer",
    quantization_config=dict(
        activation_scheme="dynamic", fmt="float8_e4m3fn", quant_method="fp8", weight_block_size=[TILE, TILE],
        modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"]),
    rms_norm_eps=1e-6, rope_theta=5000000, rotary_dim=64, scoring_func="sigmoid", shared_intermediate_size=0,
    tie_word_embeddings=False, transformers_version="4.46.1", use_cache=True, use_mtp=True, use_qk_norm=True,
    use_routing_bias=True, vocab_size=200064)

def fp8_matrix(rows, cols, device):
    """A random matrix whose entries have a standard deviation of cols ** -0.5 -> e4m3, and its scales."""
    magnitude = torch.randint(0, LARGEST, (rows, cols), dtype=torch.uint8, device=device)
    sign = torch.randint(0, 2, (rows, cols), dtype=torch.uint8, device=device) << 7
    weight = (magnitude | sign).view(torch.float8_e4m3fn)
    every = torch.arange(LARGEST, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    std = every.square().mean().sqrt().item()
    grid = math.ceil(rows / TILE), math.ceil(cols / TILE)
    scale = cols ** -0.5 / std * (0.5 + torch.rand(grid, device=device))
    return weight, scale

def layer_tensors(number, config, device):
    """All tensors of one layer, by their released names."""
    width = config["hidden_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]
    dim = config["intermediate_size"]
    matrices = {
        "self_attn.q_proj": (heads, width), "self_attn.k_proj": (kv_heads, width),
        "self_attn.v_proj": (kv_heads, width), "self_attn.o_proj": (width, heads)}
    for e in range(config["num_local_experts"]):
        expert = f"block_sparse_moe.experts.{e}"
        matrices |= {f"{expert}.w1": (dim, width), f"{expert}.w2": (width, dim), f"{expert}.w3": (dim, width)}

    prefix = f"model.layers.{number}."
    tensors = {}
    for name, shape in matrices.items():
        weight, scale = fp8_matrix(*shape, device)
        tensors[f"{prefix}{name}.weight"] = weight
        tensors[f"{prefix}{name}.weight_scale_inv"] = scale
    norms = dict(input_layernorm=width, post_attention_layernorm=width)
    norms |= {"self_attn.q_norm": heads, "self_attn.k_norm": kv_heads}
    for name, size in norms.items():
        tensors[f"{prefix}{name}.weight"] = 1 + 0.1 * torch.randn(size, device=device).bfloat16()
    n_expert = config["num_local_experts"]
    gate = torch.randn(n_expert, width, device=device) * width ** -0.5
    tensors[f"{prefix}block_sparse_moe.gate.weight"] = gate
    tensors[f"{prefix}block_sparse_moe.e_score_correction_bias"] = 0.1 * torch.randn(n_expert, device=device)
    return tensors

def table_tensors(config, device):
    """Embedding, last norm and head."""
    shape = config["vocab_size"], config["hidden_size"]
    std = config["hidden_size"] ** -0.5
    return {
        "model.embed_tokens.weight": torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(std),
        "lm_head.weight": torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(std),
        "model.norm.weight": torch.ones(config["hidden_size"], device=device, dtype=torch.bfloat16)}

def write(folder, layers, config, device="cpu", seed=0):
    """Write a folder with these layers (a range) of a model -> bytes of its tensors."""
    torch.manual_seed(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    n_files = len(layers) + 1
    where = {}
    n_bytes = 0
    for part in range(n_files):
        file = f"model-{part + 1:05}-of-{n_files:05}.safetensors"
        if part < len(layers):
            tensors = layer_tensors(layers[part], config, device)
        else:
            tensors = table_tensors(config, device)
        save_file({name: t.cpu() for name, t in tensors.items()}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        n_tensors = len(tensors)
        n_bytes += sum(t.numel() * t.itemsize for t in tensors.values())
        del tensors                    # before the next layer's are made
        print(f"{file}: {n_tensors:,} tensors, {n_bytes / 1e9:.1f} GB so far", flush=True)
    index = dict(metadata=dict(total_size=n_bytes), weight_map=where)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return n_bytes

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--layers", default="0:2", metavar="A:B", help="those that are written; default: 0:2")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=N", help="a size in config.json")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    config = dict(CONFIG)
    for change in args.set:
        field, _, size = change.partition("=")
        if type(config.get(field)) is not int or not size.isdecimal() or int(size) == 0:
            p.error(f"--set {change}: a size in config.json and a whole number, 1 or more")
        config[field] = int(size)
    config["attn_type_list"] = [1] * config["num_hidden_layers"]
    bounds = args.layers.split(":")
    if len(bounds) != 2 or not all(bound.isdecimal() for bound in bounds):
        p.error(f"--layers {args.layers}: A:B, two numbers")
    layers = range(*map(int, bounds))
    if not layers or layers.stop > config["num_hidden_layers"]:
        p.error(f"--layers {args.layers}: A < B, of {config['num_hidden_layers']} layers")
    if Path(args.folder).exists() and (not Path(args.folder).is_dir() or any(Path(args.folder).iterdir())):
        p.error(f"{args.folder} is there already, and not empty")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: there is no GPU")
    write(args.folder, layers, config, args.device)

if __name__ == "__main__":
    main()
