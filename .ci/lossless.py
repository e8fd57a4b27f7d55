"""Drafts keep every word, at full size: 1,000 prompts greedy, 20,000 rounds sampled, and controls that must be caught.

    python .ci/lossless.py                # all of it; --prompts 50 --samples 2000 for a look

Prints a row for every comparison. Exit code 1 if a greedy text differs, a distribution is off, or a control passes. The
checks are those of test_all.py, which runs a small sample of them.
"""
import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import sample
import test_all as suite

BATCH = 50                             # prompts of 1 to 11 tokens that lie in one batch
N_NEW = 24                             # tokens of a text
DRAFTS = (1, 2, 3, 5)                  # the models have three modules: with 5 drafts the last one goes on
TEXT_SETTINGS = [(1.0, 1.0, None), (0.9, 0.95, 3)]
BIASES = [                             # of sample.verify
    suite.rejected_drafts_redrawn_from_p,
    suite.q_of_another_temperature,
    suite.drafts_hold_wherever_p_allows]

class Table:
    """Prints rows, and remembers what is wrong with them."""

    def __init__(self):
        self.faults = []
        self.start = time.monotonic()

    def row(self, text, fault=None):
        print(text if fault is None else f"{text}   FAULT: {fault}", flush=True)
        if fault is not None:
            self.faults.append(fault)

    def heading(self, text):
        print(f"\n{text}   ({time.monotonic() - self.start:.0f} s)", flush=True)

def biased(target, real, bias):
    """A context in which the bias takes the place of what is called `target`."""
    return mock.patch(target, lambda *args: bias(real, *args))

def count_differing(plain, drafted):
    """Texts, one a column, that are not equal."""
    if plain.shape != drafted.shape:
        return plain.size(1)
    return int((plain != drafted).any(0).sum())

def compare_greedy(table, n_prompts):
    """Greedy text with drafts against plain text, in full and sparse layers, in fp64 and fp32."""
    table.heading("greedy: speculative text = plain text")
    print("layers dtype    K  prompts  tokens  differ  drafts 1 to d all held, d = 1, 2 ..., where verifications began")
    sizes = [min(BATCH, n_prompts - start) for start in range(0, n_prompts, BATCH)]
    batches = [suite.ragged_prompts(size, seed=nth) for nth, size in enumerate(sizes)]
    for attn in ("full", "msa"):
        for dtype in (torch.float64, torch.float32):
            drafter = suite.make_drafter(attn, dtype)
            plain = [suite.greedy(drafter, batch, N_NEW)[0] for batch in batches]
            drawn = sum(int((tokens >= 0).sum()) for tokens in plain)
            for K in DRAFTS:
                accepted = []
                differ = 0
                for batch, want in zip(batches, plain):
                    got, _ = suite.greedy(drafter, batch, N_NEW, speculate=K, accepted=accepted)
                    differ += count_differing(want, got)
                held = [f"{suite.count_held(accepted, depth):.3f}" for depth in range(1, K + 1)]
                fault = None
                if differ:
                    fault = f"{differ} texts of {attn}, {dtype}, K = {K} differ"
                table.row(f"{attn:6s} {str(dtype)[6:]}  {K}  {n_prompts:7,d} {drawn:7,d} {differ:7d}  {' '.join(held)}",
                          fault)

def judge(table, what, settings, chances, must_be_caught):
    """A row of a chi-square: both chances, and whether they say what they should."""
    caught = min(chances) < suite.BY_LUCK
    fault = None
    if must_be_caught is not None and caught != must_be_caught:
        fault = f"{what} at {settings}: {'not caught' if must_be_caught else 'a biased distribution'}"
    table.row(f"{str(settings):18s} {what:32s} {chances[0]:8.1e}  {chances[1]:8.1e}", fault)

def chances_of(draws, share, n_first):
    """Chances of the draws and of their first part, of n_first kinds; 0 where what is impossible was drawn."""
    by_first = share.view(n_first, -1)
    try:
        return suite.chance(draws, share), suite.chance(draws // by_first.size(1), by_first.sum(1))
    except AssertionError:
        return 0.0, 0.0

def compare_verified(table):
    """Rounds of sample.verify: honest, and with each bias, which the uncut distribution must show; cut to a few tokens,
    two precisions can be alike."""
    table.heading(f"verification: {suite.ROUNDS:,d} rounds, how likely by luck: three tokens, the first alone")
    for settings in suite.SETTINGS:
        uncut = settings == suite.SETTINGS[0]
        judge(table, "honest", settings, chances_of(*suite.verified_triples(settings), 5), False)
        for bias in BIASES:
            with biased("sample.verify", sample.verify, bias):
                chances = chances_of(*suite.verified_triples(settings), 5)
            judge(table, bias.__name__, settings, chances, True)
        with biased("test_all.drawn_from", suite.drawn_from, suite.drafts_drawn_in_bf16):
            chances = chances_of(*suite.verified_triples(settings), 5)
        judge(table, "drafts_drawn_in_bf16", settings, chances, True if uncut else None)

def compare_texts(table, n_samples):
    """Whole generation: texts of four tokens with two drafts a forward. Fewer texts than 20,000 need not show bf16."""
    table.heading(f"sampled text: {n_samples:,d} texts, how likely by luck: four tokens, the first two")
    for settings in TEXT_SETTINGS:
        draws, share, accepted = suite.sampled_texts(settings, n_samples)
        judge(table, "honest", settings, chances_of(draws, share, 16), False)
        with biased("sample.verify", sample.verify, suite.rejected_drafts_redrawn_from_p):
            draws, share, _ = suite.sampled_texts(settings, n_samples)
        judge(table, "rejected_drafts_redrawn_from_p", settings, chances_of(draws, share, 16), True)
        with biased("sample.Decoder.draw_draft", sample.Decoder.draw_draft, suite.loop_draws_in_bf16):
            draws, share, _ = suite.sampled_texts(settings, n_samples)
        enough = n_samples >= suite.ROUNDS
        judge(table, "loop_draws_in_bf16", settings, chances_of(draws, share, 16), True if enough else None)

def compare_acceptance(table, n_prompts=60):
    """What acceptance says of models that are wrong: modules with shifted targets, a trunk without its causal mask."""
    table.heading("acceptance, K = 1: how often the draft holds, and texts that differ from plain ones")
    prompts = suite.ragged_prompts(n_prompts)

    def measure(what, drafter, low, high, differs):
        accepted = []
        plain, _ = suite.greedy(drafter, prompts, N_NEW)
        drafted, _ = suite.greedy(drafter, prompts, N_NEW, speculate=1, accepted=accepted)
        share = suite.count_held(accepted, 1)
        differ = count_differing(plain, drafted)
        fault = None
        if not low <= share <= high or differs != (differ > 0):
            fault = f"acceptance of {what}: {share:.3f}, expected {low} to {high}; {differ} texts differ"
        table.row(f"{what:32s} {share:.3f}  {differ:4d} of {n_prompts}", fault)

    honest = suite.make_drafter("full")
    measure("honest", honest, 0.5, 0.95, differs=False)
    with biased("model.MiniMax.mtp_losses", model.MiniMax.mtp_losses, suite.targets_one_further):
        shifted = suite.trained_drafter.__wrapped__("full").double()
    measure("targets shifted by one", shifted, 0.0, 0.15, differs=False)

    # the mask is missing when drafts are verified: a token sees the draft after it
    real = model.full_attention
    with biased("model.full_attention", real, suite.drafts_seen_by_earlier_tokens):
        measure("no mask in verification", honest, 0.0, 1.0, differs=True)

    # the mask is missing in training, too: the model reads the next token instead of predicting it
    def unmasked(real, q, k, v, end=None, start=None, impl="auto"):
        if start is None:
            start = torch.zeros(len(q), dtype=torch.int32)
        return suite.drafts_seen_by_earlier_tokens(real, q, k, v, end, start, impl)

    with biased("model.full_attention", real, unmasked):
        reader = suite.trained_drafter.__wrapped__("full", steps=160).double()
        measure("no mask at all", reader, 0.5, 1.0, differs=True)

def compare_players(table, n_runs=60):
    """Rows that crop their contexts at random, share prompts and leave, a run a seed (sglang#24175 took 50 runs)."""
    table.heading(f"players: {n_runs} runs, each token = the argmax after its context, each lane = brute force")
    n_tokens = 0
    for seed in range(n_runs):
        attn = ("full", "msa")[seed % 2]
        K = (*DRAFTS, 8)[seed % 5]
        context = (256, 20, 13)[seed % 3]
        try:
            n_tokens += suite.wanderers_hear_argmaxes(attn, K, seed, context)
        except AssertionError as error:
            table.row(f"seed {seed}, {attn}, K = {K}, context {context}", f"seed {seed}: {error}")
    table.row(f"{n_tokens:,d} tokens")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=sample.number(1), default=1000, help="greedy texts to compare")
    parser.add_argument("--samples", type=sample.number(1), default=suite.ROUNDS, help="sampled texts")
    args = parser.parse_args()

    table = Table()
    compare_verified(table)
    compare_texts(table, args.samples)
    compare_acceptance(table)
    compare_players(table)
    compare_greedy(table, args.prompts)
    print(f"\n{len(table.faults)} faults   ({time.monotonic() - table.start:.0f} s)")
    return 1 if table.faults else 0

if __name__ == "__main__":
    sys.exit(main())
