"""Thoughts and tool calls of M2 and M3 are read as they were meant, in any pieces: 100,000 texts of each kind.

    python .ci/calls_fuzz.py              # some minutes; --texts N for fewer

Tags in any order against a whole-text expression; marks of both models in any order, in pieces against the whole; and
answers that templates wrote, with tags in their values, against what they were given (a tenth as many; needs tokenizers
and jinja2). Exit code 1 at the first difference. The checks are those of test_all.py, which runs a few of them.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_all as suite

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    began = time.perf_counter()
    try:
        n_calls = suite.read_scraps(args.texts, args.seed)
        print(f"scraps  | {args.texts:,} texts, {n_calls:,} calls, as by brute force", flush=True)
        n_calls = suite.read_cut_scraps(args.texts, args.seed)
        print(f"pieces  | {args.texts:,} texts, {n_calls:,} calls, as whole", flush=True)
        for kind in suite.WRITERS:
            suite.read_answers(kind, args.texts // 10, args.seed)
            print(f"{kind}      | {args.texts // 10:,} answers, as its template was given them", flush=True)
    except AssertionError as error:
        print(f"differs | {error}")
        return 1
    print(f"took    | {time.perf_counter() - began:.0f} s")
    return 0

if __name__ == "__main__":
    sys.exit(main())
