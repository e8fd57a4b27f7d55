"""Fake checkpoints of all releases, at random sizes, in these files and in transformers: the same logits and texts.

    pip install transformers
    python .ci/parity.py                  # 200 shapes of M2, M2.1, M2.5, M2.7, M3 and M3-MXFP8; --shapes 12 for a look

Each shape is a folder in the release's form (names, shards, index, fp8 tiles with short ones at the edges), which both
sides read. Compared are the logits of a whole text, of one whose layers stay on disk, and of a text that goes through
both caches in pieces, some of them taken back; then greedy texts of prompts of unequal lengths, and beams. Prints a row
for every release. Exit code 1 if a logit differs by more than 1e-4, or a text by a token. The checks are those of
test_all.py, which runs them at one size.
"""
import argparse
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import test_all as suite
from model import HFCheckpoint

TOLERANCE = 1e-4                       # a few roundings of logits up to 10, in fp32
LONGEST = 60                           # tokens of a text
N_NEW = 20                             # tokens of a continuation

def random_sizes(rng, is_m3):
    """Sizes of a model that both sides can compute. (transformers rotates 29 of 44 channels where config.json says 30:
    a share that is rounded down.)"""
    kv_heads = rng.randint(1, 3)
    head_dim = 4 * rng.randint(2, 12)
    rotary_dim = rng.choice([n for n in range(2, head_dim + 1, 2) if int(head_dim * (n / head_dim)) == n])
    n_experts = rng.randint(1, 9)
    sizes = dict(
        num_hidden_layers=rng.randint(1, 4),
        hidden_size=8 * rng.randint(1, 40),
        num_attention_heads=kv_heads * rng.randint(1, 4),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        intermediate_size=8 * rng.randint(1, 20),
        num_local_experts=n_experts,
        num_experts_per_tok=rng.randint(1, n_experts),
        vocab_size=rng.randint(17, 300),
        rope_theta=rng.choice([1e4, 5e6]))
    if is_m3:
        sizes |= dict(
            partial_rotary_factor=rotary_dim / head_dim,
            dense_intermediate_size=rng.randint(1, 100),
            shared_intermediate_size=rng.randint(1, 100),
            sparse_index_dim=rng.choice([head_dim, rotary_dim, rotary_dim + 6]),
            sparse_num_index_heads=kv_heads,
            sparse_topk_blocks=rng.randint(1, 5),
            sparse_block_size=rng.randint(1, 9))
    return sizes

def random_pieces(rng):
    """As `feed_both` takes them: tokens that are fed, and at times taken back."""
    pieces = [rng.randint(1, LONGEST // 2)]
    for _ in range(rng.randint(1, 6)):
        held = sum(pieces)
        if held > 1 and rng.random() < 0.3:
            pieces.append(-rng.randint(1, held - 1))
        pieces.append(rng.randint(1, 8))
    return pieces

def compare_texts(fake, rng, seed):
    """-> how many texts differ, of three greedy ones and two rows of beams."""
    prompts = [fake.ids(1, rng.randint(1, LONGEST), seed + i)[0].tolist() for i in range(3)]
    greedy = suite.continue_greedily(fake.ours, prompts, N_NEW)
    want = [suite.continue_theirs(fake.theirs, torch.tensor([prompt]), N_NEW)[0] for prompt in prompts]
    idx = fake.ids(2, rng.randint(1, LONGEST), seed)
    n_beams = rng.randint(2, 5)
    greedy += suite.search_beams(fake.ours, idx, N_NEW // 2, n_beams)
    want += suite.continue_theirs(fake.theirs, idx, N_NEW // 2, num_beams=n_beams)
    return sum(a != b for a, b in zip(greedy, want, strict=True))

def compare(release, seed):
    """-> the worst difference of logits: of a whole text, of one whose layers stay on disk, through the caches; and how
    many texts differ."""
    rng = random.Random(seed)
    fake = suite.Fake(release, seed=seed, shard_size=rng.randint(1, 50), **random_sizes(rng, "M3" in release))
    idx = fake.ids(rng.randint(1, 3), rng.randint(1, LONGEST), seed)
    want = suite.their_logits(fake.theirs, idx)
    offloaded = HFCheckpoint(fake.folder).offload("cpu", torch.float32)
    return (
        suite.worst(suite.our_logits(fake.ours, idx), want),
        suite.worst(suite.our_logits(offloaded, idx), want),
        suite.worst(*suite.feed_both(fake, rng.randint(1, 3), random_pieces(rng))),
        compare_texts(fake, rng, seed))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", type=sample.number(1), default=200, help="random shapes, of the releases in turn")
    parser.add_argument("--seed", type=sample.number(0), default=0, help="of the first shape")
    args = parser.parse_args()

    start = time.monotonic()
    releases = list(suite.RELEASES)
    found = {release: [] for release in releases}
    faults = 0
    for i in range(args.shapes):
        release = releases[i % len(releases)]
        *errors, n_texts = compare(release, args.seed + i)
        found[release].append((*errors, n_texts))
        if not max(errors) < TOLERANCE or n_texts:
            faults += 1
            said = f"logits differ by {max(errors):.2g}, {n_texts} texts by a token or more"
            print(f"{release}, seed {args.seed + i}: {said}   FAULT", flush=True)

    print("worst difference of logits; texts that differ, of five a shape")
    print(f"{'release':10s} {'shapes':>6s} {'whole text':>11s} {'offloaded':>10s} {'caches':>9s} {'texts':>6s}")
    for release, rows in found.items():
        if rows:
            *errors, n_texts = zip(*rows)
            whole, offloaded, cached = map(max, errors)
            print(f"{release:10s} {len(rows):6d} {whole:11.2g} {offloaded:10.2g} {cached:9.2g} {sum(n_texts):6d}")
    print(f"\n{faults} faults of {args.shapes}   ({time.monotonic() - start:.0f} s, torch {torch.__version__})")
    return 1 if faults else 0

if __name__ == "__main__":
    try:
        sys.exit(main())
    except suite.pytest.skip.Exception as error:  # transformers is missing
        sys.exit(str(error))
