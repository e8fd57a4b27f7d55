"""Drafts keep every word, at full size: 1,000 prompts greedy, 20,000 rounds sampled, and controls that must fail.

    python .ci/lossless.py                # some minutes on two cores; --prompts 100 for a look

A table of every comparison; exit code 1 if a text differs, a distribution is off, or a control passes. The checks are
those of test_all.py, which runs a small sample of them.
"""
import argparse
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import test_all as suite

BATCH = 50                             # prompts of one batch, of 1 to 11 tokens
N_NEW = 24
KINDS = ("full", "msa")
DTYPES = (torch.float64, torch.float32)
DRAFTS = (1, 2, 3, 5)                  # the models have three modules: 5 applies the last one again

def compare_greedy(model, n_prompts, K, faults):
    """Texts with K drafts a forward against plain ones; prints a row of the table."""
    accepted = []
    n_tokens = 0
    n_wrong = 0                        # prompts whose text differs
    for start in range(0, n_prompts, BATCH):
        prompts = suite.ragged_prompts(min(BATCH, n_prompts - start), seed=start)
        plain, _ = suite.greedy(model, prompts, N_NEW)
        drafted, _ = suite.greedy(model, prompts, N_NEW, speculate=K, accepted=accepted)
        n_tokens += int((plain >= 0).sum())
        if drafted.shape == plain.shape:
            n_wrong += int((drafted != plain).any(0).sum())
        else:
            n_wrong += len(prompts)
    shares = [f"{suite.count_held(accepted, depth):.3f}" for depth in range(1, K + 1)]
    print(f"{n_prompts:7,d} {n_tokens:8,d} {n_wrong:6d}   {' '.join(shares)}", flush=True)
    if n_wrong:
        faults.append(f"K = {K}: {n_wrong} texts differ")

def greedy_table(n_prompts, faults):
    print("greedy: speculative = plain")
    print("attn  dtype    K prompts   tokens differ   held at depth 1, 2 ...")
    for attn in KINDS:
        for dtype in DTYPES:
            model = suite.make_drafter(attn, dtype)
            for K in DRAFTS:
                print(f"{attn:5s} {str(dtype)[6:]} {K:2d} ", end="")
                compare_greedy(model, n_prompts, K, faults)

def sampled_table(faults):
    """Chi-square of sample.verify over 20,000 rounds, honest and under each sabotage."""
    print("\nsampled: chance of draws so far from their shares, of three tokens and of the first alone")
    print(f"{'temperature, top-p, top-k':26s} {'sampler':32s} {'three':>8s} {'one':>8s}")
    for settings in suite.SETTINGS:
        for sabotage in (None, *CONTROLS):
            three, one = chances(settings, sabotage)
            name = "honest" if sabotage is None else sabotage.__name__
            print(f"{str(settings):26s} {name:32s} {three:8.1e} {one:8.1e}", flush=True)
            caught = min(three, one) < suite.BY_LUCK
            # cut to the same few tokens, drafts from two precisions can be alike: the uncut row must tell
            must = settings == suite.SETTINGS[0]
            if sabotage is None and caught:
                faults.append(f"{settings}: the distribution is off")
            if sabotage is not None and must and not caught:
                faults.append(f"{settings}: {name} passes")

CONTROLS = [
    suite.rejected_drafts_redrawn_from_p,
    suite.q_of_another_temperature,
    suite.drafts_hold_wherever_p_allows,
    suite.drafts_drawn_in_bf16]

def chances(settings, sabotage):
    """Chances of the triples and of their first tokens; 0 where what is impossible was drawn."""
    target = "sample.verify"
    real = sample.verify
    if sabotage is suite.drafts_drawn_in_bf16:
        target = "test_all.drawn_from"
        real = suite.drawn_from
    replaced = real
    if sabotage is not None:
        def replaced(*args):
            return sabotage(real, *args)
    with mock.patch(target, replaced):
        triples, share = suite.verified_triples(settings)
    try:
        return suite.chance(triples, share), suite.chance(triples // 25, share.view(5, 25).sum(1))
    except AssertionError:
        return 0.0, 0.0

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=1000)
    args = parser.parse_args()
    faults = []
    greedy_table(args.prompts, faults)
    sampled_table(faults)
    for fault in faults:
        print(f"FAULT | {fault}")
    print("no fault" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0

if __name__ == "__main__":
    sys.exit(main())
