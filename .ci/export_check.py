"""What was trained here opens in transformers: the same logits, the same greedy text, the same tokens.

    python .ci/export_check.py                # three minutes of training for each family; --minutes 0.2 for a look

For tiny (M3's form) and tiny-m2 it runs train.py, then sample.py --export, opens the folder with transformers, and
compares: logits of validation text, greedy continuations of 200 tokens, the ids of 10,000 strange texts, the cut at
every code point of Unicode, a conversation by the template, a folder that is exported again. Prints a row for every
comparison; exit code 1 if one fails. The checks are those of test_all.py, which runs a small sample of them. Needs
pip install transformers tokenizers jinja2.
"""
import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import test_all as suite
import train
from model import MiniMax

PRESETS = ("tiny", "tiny-m2")
MOST_APART = 1e-4                      # of two logits, in fp32: sums are taken in another order
MOST_TIES = 1e-3                       # of tokens that choose other experts or blocks: scores that rounding decides
ROWS = 64                              # windows of validation text whose logits are compared
N_PROMPTS = 10
N_PROMPT = 50                          # tokens of a prompt
N_NEW = 200                            # tokens of a continuation: with the prompt it fits tiny's rows of 256
N_SHAPES = 100                         # models of random shapes

class Table:
    """Prints rows, and remembers what is wrong with them."""

    def __init__(self):
        self.faults = 0
        self.start = time.monotonic()

    def row(self, what, found, holds):
        verdict = "holds" if holds else "FAULT"
        print(f"{what:58} {found:>34}  {verdict}   ({time.monotonic() - self.start:.0f} s)", flush=True)
        self.faults += not holds

def validation_ids(tokenizer, T):
    """The first ROWS windows of T tokens of the text that train.py validates on by default -> (ROWS, T)."""
    _, val, _ = train.load_data(None, None, train.VAL_BYTES)
    ids = [token for _, text in val[:100] for token in tokenizer.encode(text)]
    return torch.tensor(ids[:ROWS * T]).view(ROWS, T)

def ends_apart(model, idx, here, there):
    """Where two texts part: the step, and by how much the two tokens' logits differ in our model; None if they do not.
    A gap of some 1e-6 is a tie, which two orders of summing may decide either way."""
    for step, (ours, theirs) in enumerate(zip(here, there)):
        if ours != theirs:
            with torch.no_grad():
                logits = model(torch.tensor([idx + here[:step]]))[0][0, -1]
            return step, (logits[ours] - logits[theirs]).abs().item()
    return None

def run_there(theirs, idx):
    """transformers' logits, and what its layers chose, as our forward replays it. idx (B, T)."""
    choices = dict(experts=[], block_idx=[])
    hooks = []

    def note_experts(module, args, out):
        choices["experts"].append(out[2].view(*idx.shape, -1))

    def note_blocks(module, args, out):
        choices["block_idx"].append(out.transpose(1, 2).int().contiguous())  # (B, T, Hkv, S)

    for module in theirs.modules():
        kind = type(module).__name__
        if kind.endswith("TopKRouter"):
            hooks.append(module.register_forward_hook(note_experts))
        if kind.endswith("Indexer"):
            hooks.append(module.register_forward_hook(note_blocks))
    logits = theirs(idx).logits
    for hook in hooks:
        hook.remove()
    return logits, choices

def choose_otherwise(first, second):
    """Tokens for which two records of choices differ as sets, in any layer -> bool (B, T)."""
    differs = torch.zeros(first["experts"][0].shape[:2], dtype=torch.bool)
    for name in ("experts", "block_idx"):
        for one, other in zip(first.get(name, []), second.get(name, []), strict=True):
            differs |= (one.sort(-1).values != other.sort(-1).values).flatten(2).any(-1)
    return differs

@torch.no_grad()
def compare_logits(table, preset, model, theirs, idx):
    """Logits as they are, and with transformers' choices replayed here. Where two scores are equal but for rounding,
    the two sides may choose otherwise, and that token's logits part: the second comparison says that all else is equal.
    """
    apart = 0.0
    replayed = 0.0
    n_ties = 0
    for rows in idx.split(8):
        there, choices = run_there(theirs, rows)
        here, _, aux = model(rows, n_logits=rows.size(1))
        n_ties += choose_otherwise(aux, choices).sum().item()
        apart = max(apart, suite.worst(here, there))
        replayed = max(replayed, suite.worst(model(rows, replay=choices, n_logits=rows.size(1))[0], there))
    n_tokens = idx.numel()
    what = f"{preset}: logits of {n_tokens:,} tokens of validation text"
    ties = f", {n_ties} ties" if n_ties else ""
    table.row(what, f"{apart:.1e} apart{ties}", apart < MOST_APART or 0 < n_ties <= MOST_TIES * n_tokens)
    table.row(f"{preset}: the same with the same choices", f"{replayed:.1e} apart", replayed < MOST_APART)

def compare_model(table, preset, model, tokenizer, folder):
    """Logits and greedy text of a trained model, here and in transformers."""
    theirs = suite.open_exported(folder)
    table.row(f"{preset}: transformers misses no tensor, knows all of them", type(theirs).__name__, True)
    idx = validation_ids(tokenizer, model.cfg.max_seq_len)
    compare_logits(table, preset, model, theirs, idx)

    prompts = idx[:N_PROMPTS, :N_PROMPT].tolist()
    equal = 0
    for prompt in prompts:
        here, there = suite.greedy_texts(model, theirs, prompt, N_NEW)
        parting = ends_apart(model, prompt, here, there)
        equal += parting is None
        if parting:
            print(f"    parts after {parting[0]} tokens, where the two logits are {parting[1]:.1e} apart")
    found = f"{equal} of {len(prompts)} prompts alike"
    table.row(f"{preset}: greedy text of {N_NEW} tokens", found, equal == len(prompts))

def every_code_point():
    """A text for each code point that UTF-8 can hold, between letters, spaces, marks and line breaks."""
    for code in range(0x110000):
        if not 0xd800 <= code < 0xe000:
            x = chr(code)
            yield f"a{x}b {x}!{x}\n{x}\t{x}  {x} \n{x}"

def cut_tokenizer():
    """A tokenizer whose ids show where a text is cut: letter, space, mark and line break each merge with whatever byte
    is next to them in a chunk."""
    ranks = sample.BYTES.copy()
    for first in (b"a", b" ", b"!", b"\n", b"\t"):
        ranks += [first + bytes([second]) for second in range(256)]
    return sample.Tokenizer(dict(pattern=sample.PATTERN, ranks=ranks, special={sample.EOT: len(ranks)}))

def open_tokenizer(tokenizer):
    """transformers' tokenizer of what we write for one of ours."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer.hf_files().items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return suite.of_transformers("AutoTokenizer").from_pretrained(folder)

def compare_text(table, preset, tokenizer, folder, n_texts):
    """Ids, decoded text, and a conversation by the template."""
    theirs = suite.of_transformers("AutoTokenizer").from_pretrained(folder)
    texts = suite.strange_texts(n_texts, seed=1)
    found = suite.differing_texts(tokenizer, theirs, texts)
    table.row(f"{preset}: ids of {len(texts):,} strange texts, and back", f"{len(found)} differ", not found)

    said = theirs.apply_chat_template(suite.MESSAGES, tokenize=False)
    asked = theirs.apply_chat_template(suite.MESSAGES, tokenize=False, add_generation_prompt=True)
    want = sample.chat_text(suite.MESSAGES)
    same = said == want and asked == want + sample.BLANK_LINE
    table.row(f"{preset}: a conversation by the chat template", "equal" if same else "differs", same)

def compare_cuts(table):
    """Every code point of Unicode is cut alike by the two regular expressions."""
    tokenizer = cut_tokenizer()
    theirs = open_tokenizer(tokenizer)
    n_differ = 0
    batch = []
    for text in every_code_point():
        batch.append(text)
        if len(batch) == 1000:
            n_differ += count_differing(tokenizer, theirs, batch)
            batch = []
    n_differ += count_differing(tokenizer, theirs, batch)
    table.row("the cut at each of 1,112,064 code points", f"{n_differ} differ", n_differ == 0)

def count_differing(tokenizer, theirs, texts):
    """Texts whose ids differ."""
    found = theirs(texts, add_special_tokens=False).input_ids
    return sum(tokenizer.encode(text) != ids for text, ids in zip(texts, found))

def compare_again(table, preset, folder, again):
    """The exported folder, read and exported once more, holds the same files."""
    suite.quiet(sample, ["--hf", folder, "--export", again])
    differ = {path.name for path in [*folder.iterdir(), *again.iterdir()] if not same_file(path.name, folder, again)}
    table.row(f"{preset}: --hf A --export B writes the same files", f"{len(differ)} differ", not differ)

def same_file(name, first, second):
    """Whether a file is in both folders, byte for byte."""
    paths = [first / name, second / name]
    return all(path.exists() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()

def check_preset(table, preset, root, minutes, n_texts):
    out = root / preset
    folder = root / f"{preset}-exported"
    result = train.main(["--preset", preset, "--minutes", str(minutes), "--device", "cpu", "--out", str(out)])
    sample.main(["--out", str(out), "--export", str(folder)])
    model, tokenizer = sample.load_model(sample.load_checkpoint(str(out)))
    print()
    table.row(f"{preset}: trained", f"{result['step']:,} steps, val_bpb {result['val_bpb']:.3f}", True)
    compare_model(table, preset, model, tokenizer, folder)
    compare_text(table, preset, tokenizer, folder, n_texts)
    compare_again(table, preset, folder, root / f"{preset}-again")

def random_shape(rng):
    """A family, and changes of its small model: sizes, theta, scale, the order of its layers."""
    family = rng.choice(["m2", "m3"])
    head_dim = rng.choice([6, 8, 12, 22])
    fields = dict(
        n_layer=rng.randrange(1, 4), n_embd=4 * rng.randrange(2, 9),
        head_dim=head_dim, rotary_dim=2 * rng.randrange(head_dim // 2 + 1),
        n_expert=rng.randrange(1, 6), expert_dim=4 * rng.randrange(1, 5),
        rope_theta=rng.choice([1e4, 5e6, 10_000]), norm_eps=rng.choice([1e-6, 1e-5]), n_mtp=rng.randrange(2))
    fields["n_expert_per_tok"] = rng.randrange(1, fields["n_expert"] + 1)
    fields["n_kv_head"] = rng.randrange(1, 4)
    fields["n_head"] = fields["n_kv_head"] * rng.randrange(1, 4)
    if family == "m2":
        return family, dict(fields, attn_types=["full"] * fields["n_layer"], mlp_types=["moe"] * fields["n_layer"])
    return family, dict(
        fields,
        attn_types=[rng.choice(["full", "msa"]) for _ in range(fields["n_layer"])],
        mlp_types=[rng.choice(["dense", "moe"]) for _ in range(fields["n_layer"])],
        routed_scale=rng.choice([1, 2.0, 2.5]), shared_dim=rng.randrange(1, 20), dense_dim=rng.randrange(1, 40),
        index_head_dim=max(2, fields["rotary_dim"] + 2 * rng.randrange(4)),
        index_block_size=rng.choice([1, 3, 8]), index_topk_blocks=rng.randrange(1, 5))

def compare_shapes(table, n_shapes):
    """Models of random shapes in both families: logits, and bit for bit back."""
    rng = suite.random.Random(0)
    worst = 0.0
    for _ in range(n_shapes):
        family, fields = random_shape(rng)
        model = suite.exportable(family, **fields)
        # no token twice: where nothing rotates, equal tokens make equal index keys, and ties are broken by chance there
        idx = torch.randperm(model.cfg.vocab_size)[:100].view(2, 50)
        with tempfile.TemporaryDirectory() as folder:
            model.save_hf(folder, suite.SMALL_TOKENIZER, shard_bytes=rng.choice([1, 10_000, 10 ** 9]))
            again = MiniMax.from_hf(folder)
            theirs = suite.open_exported(folder)
        apart = suite.logits_apart(model, theirs, idx)
        with torch.no_grad():
            same = torch.equal(again(idx, n_logits=50)[0], model(idx, n_logits=50)[0])
        worst = max(worst, apart)
        if apart >= MOST_APART or not same:
            table.row(f"{family} {json.dumps(fields)}", f"{apart:.1e} apart, back: {same}", False)
    table.row(f"logits of {n_shapes} models of random shapes", f"{worst:.1e} apart", worst < MOST_APART)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=sample.number(0, kind=float, above=True), default=3.0,
                        help="of training, for each family")
    parser.add_argument("--texts", type=sample.number(1), default=10_000, help="strange texts to encode")
    args = parser.parse_args()

    table = Table()
    root = Path(tempfile.mkdtemp())
    try:
        compare_shapes(table, N_SHAPES)
        compare_cuts(table)
        for preset in PRESETS:
            check_preset(table, preset, root, args.minutes, args.texts)
    finally:
        shutil.rmtree(root)
    print(f"\n{table.faults} faults   ({time.monotonic() - table.start:.0f} s)")
    return 1 if table.faults else 0

if __name__ == "__main__":
    try:
        sys.exit(main())
    except suite.pytest.skip.Exception as error:  # transformers is missing
        sys.exit(str(error))
