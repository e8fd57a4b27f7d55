"""Ids and texts of a released checkpoint's tokenizer are transformers', on 10,000 odd texts; needs transformers.

    python .ci/text_fuzz.py               # synthetic tokenizers of M2's and M3's form, and some with other settings
    python .ci/text_fuzz.py DIR ...       # those of folders: downloaded ones, or what sample.py --export wrote

Special tokens and pieces of them, joiners, lone accents, controls, all planes of Unicode, long runs, CRLF, cut UTF-8,
the empty text; then ids at random, most of which form no text. Each control is a mistake that must be noticed. Exit
code 1 if something differs, or a control passes. The checks are those of test_all.py, which runs a few of them.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import test_all as suite

def specials_are_text(tokenizer, text):
    return tokenizer.plain.encode(sample.whole_text(text)).ids

def bytes_of_letters(tokenizer, ids):
    return "".join(tokenizer.bpe.id_to_token(i) or "" for i in ids).encode()

CONTROLS = dict(encode=specials_are_text, decode_bytes=bytes_of_letters)

def folders(where):
    """Synthetic ones -> yields name, folder."""
    for template in ("m2", "m3"):
        folder = Path(where) / template
        folder.mkdir()
        yield template, suite.write_text(folder, template)
    for name, (edit, changes) in suite.SPECS.items():
        folder = Path(where) / name
        folder.mkdir()
        suite.write_text(folder, **changes)
        if edit is not None:
            spec = json.loads((folder / "tokenizer.json").read_text())
            edit(spec)
            (folder / "tokenizer.json").write_text(json.dumps(spec))
        yield name, folder

def compare(folder, n_texts, n_ids, seed):
    """-> the first difference, or None."""
    want = suite.auto_tokenizer(folder)
    got = sample.read_tokenizer(folder)
    texts = suite.odd_texts(n_texts, seed, sorted(got.added))
    try:
        suite.assert_same_text(folder, texts, want)
        for ids in suite.odd_ids(n_ids, got.n_vocab, seed):
            assert got.decode(ids) == want.decode(ids), ids
    except AssertionError as error:
        return sample.first_line(error)[:200]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="DIR")
    parser.add_argument("--texts", type=int, default=10_000, help="and as many lists of ids")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    size = sum(len(text.encode()) for text in suite.odd_texts(args.texts, args.seed))
    print(f"{args.texts:,} texts, {size / 1e6:.1f} MB; {args.texts:,} lists of ids")
    faults = 0
    with tempfile.TemporaryDirectory() as where:
        synthetic = list(folders(where))
        given = [(folder, folder) for folder in args.folders]
        for name, folder in given or synthetic:
            began = time.monotonic()
            fault = compare(folder, args.texts, args.texts, args.seed)
            faults += fault is not None
            print(f"{name:32} {'equal' if fault is None else 'FAULT: ' + fault}, {time.monotonic() - began:.0f} s",
                  flush=True)
        for method, mistake in CONTROLS.items():
            with mock.patch.object(sample.HFTokenizer, method, mistake):
                fault = compare(synthetic[0][1], 1000, 100, args.seed)
            faults += fault is None
            print(f"control {mistake.__name__:24} {'FAULT: not noticed' if fault is None else 'noticed'}", flush=True)
    sys.exit(1 if faults else 0)

if __name__ == "__main__":
    main()
