"""Everything that touches text, and what all scripts share: tokenizer, checkpoints, running a script, `generate`, a
server.

    python sample.py --prompt "def "                          # from out/ckpt.pt, which holds tokenizer and config too
    python sample.py --prompt "import os" --n-samples 3 --temperature 0.7 --seed 1
    python sample.py --hf DIR --prompt "def "                 # a released checkpoint of M2 or M3, with its own text
    python sample.py --hf DIR --chat                          # a conversation through its template, thoughts and all
    python sample.py --out out --export DIR                   # what was trained, in a folder that transformers opens
    python sample.py --chat                                   # a conversation, each turn of which goes on from the last
    python sample.py --serve 8000 --token KEY                 # OpenAI's protocol on loopback, for any of its clients
    python sample.py --prompt "def " --xray page.html         # and a page that shows what each token read and visited

    text -> chunks -> bytes, merged into tokens
    generate: prefill what all prompts can be fed at once -> loop { one token a row through the KV cache; MSA chooses
    its blocks anew each time }; a row still inside its prompt is fed the prompt's token, the others draw one:
    temperature, top-k, top-p. With --speculate K a row is fed K drafts of its MTP modules too, and the forward says
    which of them hold
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: no traceback
    at_ctrl_c = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import asyncio
import base64
import codecs
import contextlib
import dataclasses
import datetime
import functools
import gc
import hashlib
import hmac
import io
import itertools
import json
import math
import re
import shutil
import socket
import stat
import statistics
import sys
import threading
import time
import traceback
import typing
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from heapq import heapify, heappop, heappush
from pathlib import Path
from queue import Empty, SimpleQueue

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from model import (SHORT_ROW, DecodeWeights, HFCheckpoint, KVCache, MiniMax, MiniMaxConfig, Progress, StoredBlock,
                   in_words, inner, read_json)
from moe import experts_grouped, pick_experts
from msa import NEW, constexpr, implementation, jit, tl, triton, widen

# ---- tokenizer, BPE ----------------------------------------------------------------------------
# A byte-level BPE: a pattern cuts a text into chunks, roughly words, and pairs of neighbouring tokens merge within a
# chunk, the pairs that were frequent in the training text first. The 256 bytes are tokens too, so every text can be
# written. The tokenizer is learned here, and tiktoken encodes with it.

EOT = "<|endoftext|>"
BYTES = [bytes([byte]) for byte in range(256)]
LEARN_FROM = 2 ** 24                   # characters that tokens are learned from at most: the standard library fits
PIECE = 256                            # bytes of a chunk that are learned from as one word, see words_of
# a word with the space before it; one digit; marks; line breaks with the indentation after them; other spaces
PATTERN = r" ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s*\n[ \t]*|\s+(?!\S)|\s"

# longer runs of spaces overflow the encoder's stack, at a million; no text that is meant for reading has them
LONGEST_RUN = 4096
LONG_RUN = re.compile(r"(?<!\s)\s{%d,}" % (LONGEST_RUN + 1))
LOOK = 512                             # a longer run lies under LONGEST_RUN // LOOK neighbours of each LOOK-th one
MAY_BE_LONG = re.compile(r"\s{%d}" % (LONGEST_RUN // LOOK))

def cut_runs(text):
    """Cut white space of more than LONGEST_RUN characters into runs of that length -> pieces that join to the text."""
    if not MAY_BE_LONG.search(text[::LOOK]):  # a hundredth of the work for nearly every text
        return [text]
    cuts = [0]
    for run in LONG_RUN.finditer(text):
        cuts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    cuts.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(cuts)]

class Tokenizer:
    """A tiktoken encoding made from a spec: {pattern: str, ranks: [bytes], special: {str: int}}."""

    def __init__(self, spec):
        self.spec = spec
        self.eot = spec["special"][EOT]
        self.bos = self.eot            # what a model reads where a text is empty
        self.stops = {self.eot}        # what ends an answer
        ranks = {token: rank for rank, token in enumerate(spec["ranks"])}
        self.enc = tiktoken.Encoding("bpe", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                     special_tokens=spec["special"])
        self.n_vocab = self.enc.n_vocab
        self.tokens = spec["ranks"]    # bytes of each; without the special one
        self.added = spec["special"]   # text of a special token -> its id

    def encode(self, text):
        """-> ids. decode gives back every text that UTF-8 can hold; a lone surrogate becomes U+FFFD."""
        ids = []
        for piece in cut_runs(text):
            ids += self.enc.encode_ordinary(piece)
        return ids

    def encode_array(self, text):
        """-> ids, uint32, without a list in between. The text must be one that UTF-8 can hold."""
        pieces = cut_runs(text)
        return np.concatenate([self.enc.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def encode_batch(self, texts):
        """Encode the texts on all cores -> yields an array of ids for each, in order."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the encoder runs without Python's lock
            yield from pool.map(self.encode_array, texts)

    def decode_bytes(self, ids):
        return self.enc.decode_bytes(ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def hf_files(self):
        """The files by which transformers reads and writes the same tokens -> {name: text}."""
        return hf_files(self.spec)

def sample_evenly(texts, most, piece=2 ** 16):
    """At most about `most` characters of the texts (a list), as evenly spaced pieces; all of them where they fit."""
    total = sum(map(len, texts))
    if total <= most:
        return texts
    chosen = []
    due = 0.0  # characters that should have been chosen by now and are not
    for text in texts:
        for start in range(0, len(text), piece):
            part = text[start:start + piece]
            due += len(part) * most / total
            if due >= len(part) / 2:
                chosen.append(part)
                due -= len(part)
    return chosen

def count_chunks(texts, pattern):
    """Count the distinct chunks that the pattern cuts the texts into -> Counter. ValueError if it skips a character."""
    counts = Counter()
    done = 0  # characters
    progress = Progress("count", sum(map(len, texts)), "characters, to learn tokens from")
    for text in texts:
        for piece in cut_runs(text):  # as the encoder does
            progress.at(done)
            done += len(piece)
            chunks = regex.findall(pattern, piece)
            if sum(map(len, chunks)) != len(piece):  # the encoder would drop, silently, what the pattern skips
                raise ValueError("the pattern does not match all of the text")
            counts.update(chunks)
    return counts

def words_of(chunks):
    """Chunks with their counts -> words, and how often each occurs. At first a word is a chunk's bytes.

    A word is a str with one character, chr(id), for each token. So a merge is str.replace, left to right at C speed,
    a pair is a str of length two, and strings sort as their ids do. Chunks are cut into PIECEs: one run of 40,000
    letters (DNA, say) would take minutes, pair by pair."""
    words = []
    freqs = []
    for chunk, count in chunks.items():
        word = chunk.encode().decode("latin-1")
        for start in range(0, len(word), PIECE):
            words.append(word[start:start + PIECE])
            freqs.append(count)
    return words, freqs

def pairs_of(word):
    return map(str.__add__, word, word[1:])

def merge_pair(pair, token, words, freqs, counts, where):
    """Replace a pair by a new token in all words -> the pairs that the token is part of.

    pair    two characters: the ids that are merged
    token   one character: the new id
    words   str each, see words_of; changed in place
    freqs   how often each word occurs
    counts  pair -> how often it occurs; kept right
    where   pair -> indices of the words that hold it; an index may be stale, never missing
    """
    new_pairs = set()
    for i in where.pop(pair):
        if pair not in words[i]:  # stale: an earlier merge took a part of the pair
            continue
        for old in pairs_of(words[i]):
            counts[old] -= freqs[i]
        words[i] = words[i].replace(pair, token)
        for new in pairs_of(words[i]):
            counts[new] += freqs[i]
            if token in new:
                where[new].append(i)
                new_pairs.add(new)
    return new_pairs

def learn_bpe(texts, vocab_size, pattern):
    """Learn the tokens of a byte-level BPE -> the spec of a Tokenizer.

    Each merge takes the most frequent pair, and of equally frequent ones the pair with the lowest ids.
    texts       of long texts, evenly spaced pieces are learned from, LEARN_FROM characters in all
    vocab_size  256 bytes + merges + 1 special token; there are fewer if the texts run out of pairs
    pattern     regular expression of a chunk; no token crosses the border of a chunk
    """
    # cut the texts into words, and count each pair of neighbouring tokens
    texts = sample_evenly(list(texts), LEARN_FROM)
    words, freqs = words_of(count_chunks(texts, pattern))
    counts = defaultdict(int)  # pair -> how often it occurs
    where = defaultdict(list)  # pair -> the words that hold it
    for i, word in enumerate(words):
        for pair in pairs_of(word):
            counts[pair] += freqs[i]
            where[pair].append(i)

    # a heap finds the most frequent pair: its items are (-count, pair)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapify(heap)
    ranks = BYTES.copy()
    progress = Progress("merge", vocab_size - 257, "merges of the tokenizer")
    while heap and len(ranks) < vocab_size - 1:
        minus_count, pair = heappop(heap)
        # a pair's count only falls once it is in the heap, so a stale item comes up too early, never too late: it is
        # enough to put it back with the right count
        if minus_count != -counts[pair]:
            if counts[pair] > 0:
                heappush(heap, (-counts[pair], pair))
            continue

        # merge the pair into a new token
        progress.at(len(ranks) - 256)
        new_pairs = merge_pair(pair, chr(len(ranks)), words, freqs, counts, where)
        first, second = map(ord, pair)
        ranks.append(ranks[first] + ranks[second])
        for new in new_pairs:
            heappush(heap, (-counts[new], new))
    return {"pattern": pattern, "ranks": ranks, "special": {EOT: len(ranks)}}

# What a file that is not UTF-8 most likely is -> iconv's options that make it UTF-8
ICONV = {
    "UTF-16": "-f UTF-16",
    "UTF-16LE": "-f UTF-16LE",
    "UTF-16BE": "-f UTF-16BE",
    "UTF-32": "-f UTF-32",
    "Latin-1": "-f LATIN1",
    "Windows-1252": "-f WINDOWS-1252",
    "damaged UTF-8": "-c -f UTF-8",
}

def guess_kind(raw):
    """What bytes that are not UTF-8 text, or hold a zero byte, most likely are: a key of ICONV, "text of another
    encoding", binary or empty."""
    if not raw:
        return "empty"

    # a byte order mark says it; without one, every second byte of UTF-16 is zero where the text is ASCII
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    high = raw[0::2].count(0)  # big-endian: the first byte of a pair is the high one
    low = raw[1::2].count(0)
    one_sided = max(high, low) > len(raw) / 4 and min(high, low) < len(raw) / 100
    if len(raw) % 2 == 0 and one_sided:
        return "UTF-16BE" if high > low else "UTF-16LE"

    # control characters: no text
    controls = sum(raw.count(byte) for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")
    if 0 in raw or controls > len(raw) / 100:
        return "binary"

    # most of what is not ASCII is whole
    text = raw.decode("utf-8", errors="replace")
    broken = text.count("\ufffd")
    if sum(char > "\x7f" for char in text) > 2 * broken:
        return "damaged UTF-8"

    # mostly Cyrillic, Greek or Chinese: only the reader knows which encoding it is, and a wrong guess gives garbage
    if sum(byte > 0x7f for byte in raw) > len(raw) / 2:
        return "text of another encoding"
    if any(0x80 <= byte < 0xa0 for byte in raw):  # no letters in Latin-1
        return "Windows-1252"
    return "Latin-1"

# ---- tokenizer, for transformers -----------------------------------------------------------------
# tiktoken merges whichever pair makes the token of the lowest rank; transformers' tokenizers merge the pairs of a list.
# A token that was learned forms from one pair alone: whatever surrounds it, its bytes merge as they do without
# surroundings, or it does not form. So the list is one pair a token, in the tokens' order, and gives the same ids.

# The patterns of this project -> the same in the language of transformers' regular expressions, Oniguruma's, in which
# another letter makes a dot match a line break. All of Unicode is cut alike: .ci/export_check.py tries it.
ONIGURUMA = {PATTERN: PATTERN, "(?s:.)": "(?m:.)"}

# the contents joined by blank lines, as chat_text joins them, and a blank line before the answer, as in --chat
CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {{- part if part is string else part.text or part.refusal or "" -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set told = namespace(any=false) -%}
{%- for message in messages -%}
    {%- set text = text_of(message.content) -%}
    {%- if text -%}
        {{- "\n\n" if told.any else "" -}}
        {{- text -}}
        {%- set told.any = true -%}
    {%- endif -%}
{%- endfor -%}
{{- "\n\n" if told.any and add_generation_prompt else "" -}}
""".strip()

def byte_chars():
    """A printable character for each of the 256 bytes, in which tokenizer.json writes tokens: a byte's own in Latin-1
    where that can be seen, and those from U+0100 on for the others, in order."""
    chars = [chr(byte) for byte in range(256)]
    unseen = [*range(0x21), *range(0x7f, 0xa1), 0xad]
    for place, byte in enumerate(unseen):
        chars[byte] = chr(0x100 + place)
    return chars

def pair_of(token, rank_of):
    """The two tokens that merge into this one, as (bytes, bytes); None for a byte, and for a token that does not form
    by merges.

    token    its bytes
    rank_of  token -> its rank, of all of them
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    own_rank = rank_of[token]
    while len(parts) > 2:
        ranks = [rank_of.get(first + second, own_rank) for first, second in itertools.pairwise(parts)]
        lowest = min(ranks)
        if lowest >= own_rank:
            return None
        i = ranks.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts) if len(parts) == 2 else None

def hf_files(spec):
    """A Tokenizer's spec -> {name: text} of the files that transformers reads beside the weights. ValueError for a
    pattern that might cut text otherwise there."""
    if spec["pattern"] not in ONIGURUMA:
        known = " or ".join(ONIGURUMA)
        raise ValueError(f"its tokenizer's pattern, {spec['pattern'][:100]}, may cut text otherwise in transformers: "
                         f"{known} can be exported")
    chars = byte_chars()
    rank_of = {token: rank for rank, token in enumerate(spec["ranks"])}
    written = {token: "".join(chars[byte] for byte in token) for token in rank_of}
    pairs = [pair_of(token, rank_of) for token in rank_of]
    merges = [[written[first], written[second]] for first, second in filter(None, pairs)]
    eot = spec["special"][EOT]

    # a text is cut as cut_runs does, then by the pattern. \G, where the last match ended: a run is looked at from its
    # beginning alone, or thousands of spaces would take a time that grows with their square
    long_run = r"(?:\G|(?<!\s))\s{%d}(?=\s)" % LONGEST_RUN
    long_runs = dict(type="Split", pattern=dict(Regex=long_run), behavior="MergedWithPrevious", invert=False)
    chunks = dict(type="Split", pattern=dict(Regex=ONIGURUMA[spec["pattern"]]), behavior="Isolated", invert=False)
    to_chars = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    special = dict(
        id=eot, content=EOT, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=[special], normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[long_runs, chunks, to_chars]),
        post_processor=None, decoder=to_chars,
        # ignore_merges: a chunk that is a token is that token, as tiktoken has it
        model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
            fuse_unk=False, byte_fallback=False, ignore_merges=True,
            vocab={written[token]: rank for token, rank in rank_of.items()}, merges=merges))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT, pad_token=EOT,
        split_special_tokens=True,     # a text that holds the name of a special token is a text
        clean_up_tokenization_spaces=False)
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "generation_config.json": json.dumps(dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot), indent=2),
        "chat_template.jinja": CHAT_TEMPLATE,
    }

# ---- tokenizer of a released checkpoint ----------------------------------------------------------
# Beside the weights of a released checkpoint lie tokenizer.json, a byte-level BPE in M2 and in M3, which the library
# tokenizers reads, and a template in Jinja, which writes a conversation as the model was trained to read it. Special
# tokens frame what is said: [e~[ ends it, <think> opens a thought. In a text to continue they are tokens, as in
# transformers; in what a user says within a conversation they are text, or users could speak for the system.

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json")
MOST_IDS = 2 ** 24                     # of a tokenizer: there is a list of all, with holes where an id is none
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# They enclose what in a user's text looks like a special token, while a template writes it down. Unicode keeps them
# for a program's own use; a user's own ones are dropped.
MARK = "\ufdd0"
UNMARK = "\ufdd1"

def read_settings(path):
    """The object in a JSON file; {} if there is no such file. ValueError, in one line, if it holds no object."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content

def listed(value):
    """A value, or a list of values, or nothing -> a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]

def token_text(token):
    """A token of tokenizer_config.json, a text or an object with its `content` -> the text, or None."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None

def byte_letters():
    """-> a table for str.translate, from the characters of `byte_chars` to bytes, as Latin-1."""
    no_letters = dict.fromkeys(range(256), "\uffff")  # they stand for no byte
    return no_letters | {ord(char): byte for byte, char in enumerate(byte_chars())}

def token_bytes(vocab, added):
    """-> the bytes of each id; an id that is missing has none. vocab: text of a token -> id, in letters that stand for
    bytes. added: likewise of special tokens, whose bytes are those of their text."""
    tokens = [b""] * (max(vocab.values()) + 1)
    letters = byte_letters()
    for text, i in vocab.items():
        try:
            tokens[i] = text.translate(letters).encode("latin-1")
        except UnicodeEncodeError:      # it is not written in such letters
            tokens[i] = text.encode()
    for text, i in added.items():
        tokens[i] = text.encode()
    return tokens

def end_ids(folder, eos):
    """-> the ids that end an answer, a set: those of generation_config.json, and the tokenizer's own, eos. config.json
    is asked last, since some converted ones name other ids."""
    stops = listed(read_settings(os.path.join(folder, "generation_config.json")).get("eos_token_id")) + listed(eos)
    if not stops:
        config = read_settings(os.path.join(folder, "config.json"))
        text_config = config.get("text_config", {})
        stops = listed(config.get("eos_token_id", text_config.get("eos_token_id")))
    if not all(type(i) is int and i >= 0 for i in stops):
        raise ValueError(f"{folder}: eos_token_id {stops}: it must be ids")
    return set(stops)

def is_byte_level(part):
    """Whether a part of tokenizer.json, a decoder, is ByteLevel, or a sequence that holds it."""
    if part is None:
        return False
    if part.get("type") == "Sequence":
        return any(map(is_byte_level, part.get("decoders", [])))
    return part.get("type") == "ByteLevel"

def open_tokenizer(path):
    """tokenizer.json -> the library's tokenizer. ValueError, in one line, for a damaged file or another kind of it."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{path} is read by the library tokenizers: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
        model = type(tokenizer.model).__name__
        decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    except BaseException as error:  # a plain Exception mostly; a panic of the library's is not even that
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{path}: {first_line(error)[:200]}") from None
    if model != "BPE" or not is_byte_level(decoder):
        kind = None if decoder is None else decoder["type"]
        raise ValueError(f"{path} is a {model} with the decoder {kind}; a BPE with ByteLevel is read here")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < MOST_IDS:
        raise ValueError(f"{path}: its largest id is {largest}; it must be below {MOST_IDS:,}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

class HFTokenizer:
    """The tokenizer of a folder with tokenizer.json, as transformers' AutoTokenizer reads it."""

    def __init__(self, folder):
        self.folder = folder
        self.bpe = open_tokenizer(os.path.join(folder, "tokenizer.json"))

        # special tokens, by their names; those that tokenizer.json lacks join it
        config = read_settings(os.path.join(folder, "tokenizer_config.json"))
        older = read_settings(os.path.join(folder, "special_tokens_map.json"))
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = {name: config.get(name, older.get(name)) for name in SPECIAL_NAMES}
        if isinstance(more, dict):     # M3's image_token, say
            named |= more
            more = []
        texts = {name: token_text(token) for name, token in named.items()}
        self.special = {name: text for name, text in texts.items() if text is not None}
        self.add_tokens(config, [*self.special.values(), *map(token_text, more)])

        # the vocabulary
        vocab = self.bpe.get_vocab()
        self.added = {token.content: i for i, token in self.bpe.get_added_tokens_decoder().items()}
        self.n_vocab = max(vocab.values()) + 1
        self.tokens = token_bytes(vocab, self.added)

        # eot ends a text, any of stops an answer; bos is what a model reads where a text is empty
        eos = vocab.get(self.special.get("eos_token"))
        self.stops = end_ids(folder, eos)
        self.eot = min(self.stops, default=-1) if eos is None else eos
        self.bos = vocab.get(self.special.get("bos_token"), max(self.eot, 0))

        # what looks special in the texts of others: the longest first, as the library has it
        texts = "|".join(map(re.escape, sorted(self.added, key=len, reverse=True)))
        self.looks_special = re.compile(texts or "(?!)")
        self.starts_of_special = tuple({text[:n] for text in self.added for n in range(1, len(text))})
        self.ends_of_special = tuple({text[n:] for text in self.added for n in range(1, len(text))})
        self.marked = re.compile(f"{MARK}({self.looks_special.pattern}){UNMARK}|[{MARK}{UNMARK}]")
        self.template = read_template(folder, config, self.special)

    def add_tokens(self, config, special):
        """Tokens that tokenizer_config.json names and tokenizer.json lacks join it, as in transformers. special: texts
        of special ones."""
        from tokenizers import AddedToken
        tokens = []
        for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            tokens.append(AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token}))
        known = {token.content for token in [*tokens, *self.bpe.get_added_tokens_decoder().values()]}
        tokens += [AddedToken(text, special=True) for text in special if text not in known]
        if tokens:
            self.bpe.add_tokens(tokens)
        self.bpe.encode_special_tokens = config.get("split_special_tokens", False)

    def encode(self, text):
        """-> ids of a text of its own, with bos before it if tokenizer.json's post-processor says so. As in
        transformers, the text of a special token is that token, whoever wrote it."""
        return self.bpe.encode(whole_text(text)).ids

    def encode_part(self, text):
        """-> ids of a text that goes on from others, or that a template wrote."""
        return self.bpe.encode(whole_text(text), add_special_tokens=False).ids

    def encode_chat(self, messages, tools=None, add_generation_prompt=True, behind="", **options):
        """-> ids of a conversation, through the template. What users and tools say stays text: no special token comes
        of it, nor of what tools say of themselves, nor of a call's arguments, which may repeat either. Of what the
        model says come its thoughts' marks, and none that frames a message. behind: a text of one message; only what
        the template writes behind it is encoded. The other arguments are those of ChatTemplate.render."""
        if self.template is None:
            raise ValueError(f"{self.folder} has no chat template")
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages: each must be an object")
        messages = [self.mark(message) for message in messages]
        text = self.template.render(messages, self.mark_texts(tools), add_generation_prompt, **options)
        if behind not in text:
            raise ValueError(f"{self.template.name}: it does not write what a message says")
        return self.encode_marked(text.rpartition(behind)[2] if behind else text)

    def mark(self, message):
        """Enclose in marks what in a message looks like a special token: all of them in what users and tools say and
        in the model's calls; those that frame messages in what else the model says, for a client sends it back, and a
        user may have had it repeated; none in what the system says."""
        role = message.get("role")
        if role in ("user", "tool"):
            return self.mark_texts(message)
        if role != "assistant":
            return message
        marked = {}
        for name, value in message.items():
            if name == "tool_calls":
                value = self.mark_texts(value)
            elif isinstance(value, str):
                value = self.framing.sub(rf"{MARK}\g<0>{UNMARK}", value)
            marked[name] = value
        return marked

    @functools.cached_property
    def framing(self):
        """An expression for the special tokens that the template writes around a user's message."""
        text = self.template.render([dict(role="user", content="said")], add_generation_prompt=False)
        tokens = sorted(set(self.looks_special.findall(text)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def mark_texts(self, value):
        if isinstance(value, str):
            own = value.replace(MARK, "").replace(UNMARK, "")
            marked = self.looks_special.sub(rf"{MARK}\g<0>{UNMARK}", own)
            # nor may its ends make a token with what the template writes beside them: ]!p~ does with the [ of [e~[
            before = MARK if own.startswith(self.ends_of_special) else ""
            behind = UNMARK if own.endswith(self.starts_of_special) else ""
            return before + marked + behind
        if isinstance(value, list):
            return [self.mark_texts(part) for part in value]
        if isinstance(value, dict):
            return {name: self.mark_texts(part) for name, part in value.items()}
        return value

    def encode_marked(self, text):
        """A template's text -> ids; what is between marks becomes ordinary tokens, and a lone mark parts the text."""
        ids = []
        for i, piece in enumerate(self.marked.split(text)):
            if piece and i % 2:
                ids += self.plain.encode(piece, add_special_tokens=False).ids
            elif piece:
                ids += self.encode_part(piece)
        return ids

    @functools.cached_property
    def plain(self):
        """The same tokenizer without special tokens, for a user's text that looks like one."""
        plain = type(self.bpe)(self.bpe.model)
        plain.pre_tokenizer = self.bpe.pre_tokenizer
        if self.bpe.normalizer is not None:
            plain.normalizer = self.bpe.normalizer
        return plain

    def decode_bytes(self, ids):
        """-> bytes, exactly those of each token; an id that the tokenizer lacks, though the model has it, has none."""
        return b"".join(self.tokens[i] for i in ids if i < self.n_vocab)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def __str__(self):
        """For a start-up card."""
        named = [f"{self.decode([i])!r} ({i})" for i in sorted(self.stops)]
        ends = f"an answer ends at {' or '.join(named)}" if named else "no token ends an answer"
        template = "no chat template" if self.template is None else f"template {self.template.name}"
        return f"a byte-level BPE of {self.n_vocab:,} tokens, {len(self.added)} of them special; {template}; {ends}"

    def hf_files(self):
        """-> {file name: its text}, of all that is needed to read and write its text elsewhere."""
        files = {}
        for name in TEXT_FILES:
            path = os.path.join(self.folder, name)
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    files[name] = file.read()
        return files

def whole_text(text):
    """A lone surrogate becomes U+FFFD, as in our own tokenizer: the library takes none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

def read_tokenizer(folder):
    """-> the HFTokenizer of a folder; None if it holds no tokenizer.json. ValueError, in one line, if it is damaged."""
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        return None
    try:
        return HFTokenizer(folder)
    except (TypeError, KeyError, AttributeError, OSError) as error:
        raise ValueError(f"{folder}: its tokenizer: {type(error).__name__}: {first_line(error)}") from None

# ---- chat template -------------------------------------------------------------------------------

JINJA = "jinja2>=3.1.6"                # older ones have holes in their sandbox, and a template is others' code

class Call(dict):
    """A tool call of a message. Templates read its name as .function.name or as .name, and M2's reads both: each finds
    it, whichever form the client sent. Jinja asks for an attribute first, then for an item."""

    def __getattr__(self, name):
        if name in ("name", "arguments") and isinstance(self.get("function"), dict):
            return self["function"].get(name)
        if name == "function" and "name" in self:
            return self
        raise AttributeError(name)

def parsed(call):
    """A tool call -> Call, whose arguments are an object: a client sends them as a string of JSON, templates read the
    items."""
    if not isinstance(call, dict):
        return call
    call = Call(call)
    inner = call
    if isinstance(call.get("function"), dict):
        inner = call["function"] = dict(call["function"])
    if isinstance(inner.get("arguments"), str):
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON stays as it is
            inner["arguments"] = json.loads(inner["arguments"] or "{}")
    return call

def plain_message(message):
    """A message as clients send it -> as templates read it."""
    message = dict(message)
    # three names of the thoughts; transformers fills in the same
    names = ("reasoning_content", "thinking", "reasoning")
    thoughts = [message[name] for name in names if message.get(name) is not None]
    if thoughts:
        message = {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]}
    if message.get("role") == "assistant" and message.get("content", "") is None:
        message["content"] = ""        # it only calls tools: M2's template would write None
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [parsed(call) for call in message["tool_calls"]]
    return message

def template_environment():
    """-> the Jinja environment of transformers' templates: a sandbox, with the same filters, functions and tags."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(f"a chat template is rendered by Jinja: pip install '{JINJA}'") from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise ValueError(f"jinja2 {jinja2.__version__}: pip install '{JINJA}'")

    class Generation(jinja2.ext.Extension):
        """{% generation %} encloses what a model says, for who trains on it; the text is as without."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Of a template's own variables, none of which may look like one of Python's."""

        def __init__(*args, **fields):
            for name in dict(*args[1:], **fields):
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(*args, **fields)

        def __setitem__(self, name, value):
            Namespace.check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.TemplateRuntimeError(f"a namespace holds no {name}")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        """Jinja's own one would escape <, > and &."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # the newlines that stand in the template are part of what the model was trained on: none but a block's own is cut
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["namespace"] = Namespace
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment

class ChatTemplate:
    """Writes a conversation as the text that a model was trained on."""

    def __init__(self, source, name, special=None):
        self.source = source           # Jinja
        self.name = name               # of the file that holds it
        self.special = special or {}   # bos_token, eos_token and others, as templates call them -> their text

    @functools.cached_property
    def compiled(self):
        return template_environment().from_string(self.source)

    def render(self, messages, tools=None, add_generation_prompt=True, **options):
        """-> the text. ValueError, in one line, if the template refuses the messages or is damaged.

        messages               role, content, tool_calls, reasoning_content, as OpenAI's clients send them
        tools                  what the model may call, as they send it
        add_generation_prompt  whether the text ends where the model's answer begins
        options                what else a template may read: M3's reads thinking_mode
        """
        try:
            messages = [plain_message(message) for message in messages]
            options = {**self.special, **options}
            return self.compiled.render(messages=messages, tools=tools, documents=None,
                                        add_generation_prompt=add_generation_prompt, **options)
        except Exception as error:     # others' code: anything
            raise ValueError(f"{self.name}: {first_line(error)[:300]}") from None

def read_template(folder, config, special):
    """-> ChatTemplate of a folder: chat_template.jinja, or what tokenizer_config.json says, or chat_template.json; None
    without one. special: its special tokens, by their names."""
    name = "chat_template.jinja"
    path = os.path.join(folder, name)
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                source = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
        return ChatTemplate(source, name, special)
    older = read_settings(os.path.join(folder, "chat_template.json"))
    for name, source in (("tokenizer_config.json", config), ("chat_template.json", older)):
        source = source.get("chat_template")
        if isinstance(source, list):   # several, by name
            source = {one["name"]: one["template"] for one in source}.get("default")
        if isinstance(source, str):
            return ChatTemplate(source, f"the chat_template of {name}", special)
    return None

# ---- cache -------------------------------------------------------------------------------------
# What a start computes from a text, its tokenizer and its ids, is the same at the next start: it is kept in the user's
# cache folder. A file's name there is a hash of all that decides its content, the text included, so that no file is
# ever out of date. It begins with a hash of the rest: a damaged file is as good as none, and is written anew. Where
# the folder cannot be written, each start computes.
CACHE_VERSION = 1                      # raise it when a text gets other tokens or ids: older caches are then not read
CACHE_BYTES = 2 ** 30                  # of all files together: those that were used longest ago go
CACHED_FILE = r"[0-9a-f]{64}(\.cache|\.[0-9a-f]{12}\.tmp)"  # no other file in the folder is ours

def cache_folder():
    """-> NANO_MINIMAX_CACHE, where it is empty None, for no cache; by default nano-minimax in the user's caches, None
    for a user without a home."""
    folder = os.environ.get("NANO_MINIMAX_CACHE")
    if folder is not None:
        return folder or None
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):         # else a folder of that name would be made here
        return None
    return os.path.join(caches, "nano-minimax")

def cache_path(*parts):
    """-> the file of what these parts (numbers, strings, bytes and lists of them) decide; None without a cache."""
    folder = cache_folder()
    if folder is None:
        return None
    everything = (CACHE_VERSION, tiktoken.__version__, regex.__version__, *parts)
    return os.path.join(folder, f"{hashlib.sha256(repr(everything).encode()).hexdigest()}.cache")

def read_cache(path):
    """-> what write_cache put there; None if there is nothing, or it is damaged."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            digest = file.read(32)
            content = file.read()
        if hashlib.sha256(content).digest() != digest:
            return None
        with contextlib.suppress(OSError):  # a cache that can be read alone
            os.utime(path)             # used now
        return torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # as in load_checkpoint
        return None

def write_cache(path, value):
    """Keep a value, plain types and tensors, for the next start -> whether that was possible."""
    if path is None:
        return False
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getbuffer()
    temporary = f"{path.removesuffix('.cache')}.{os.urandom(6).hex()}.tmp"
    try:
        if len(content) > CACHE_BYTES:
            return False
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
        os.replace(temporary, path)
        prune_cache(os.path.dirname(path))
        return True
    except OSError:
        return False
    finally:                           # after Ctrl-C, too
        with contextlib.suppress(OSError):  # it has its name: mostly
            os.remove(temporary)

def prune_cache(folder):
    """Remove the files that were used longest ago, until the others have CACHE_BYTES at most. Another process may do
    the same at the same time."""
    files = []
    for entry in os.scandir(folder):
        if re.fullmatch(CACHED_FILE, entry.name):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                files.append((found.st_mtime, found.st_size, entry.path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > CACHE_BYTES:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

# ---- checkpoints: write, read ------------------------------------------------------------------
# A checkpoint is one plain dict, FOLDER/ckpt.pt: version, config, tokenizer, model, optimizers, now, args. It is
# written into a temporary file that is then renamed, so a crash at any moment leaves a whole one, and only the
# process that holds the folder's lock writes there. Whoever reads one trusts nothing in it: each part is checked
# before it is used, and refused in one line.
VERSION = 1                            # of the checkpoint's layout
PARTS = dict(config=dict, tokenizer=dict, model=dict, optimizers=list, now=dict, args=dict)  # of a checkpoint
LOCK = "ckpt.lock"                     # held by the process that writes a folder's checkpoint
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # absent on Windows

def checkpoint_path(folder):
    return os.path.join(folder, "ckpt.pt")

@contextlib.contextmanager
def lock_folder(folder, create=True):
    """Make this process the only one that writes a checkpoint into the folder, which is made if `create`.

    The lock is the kernel's and ends with the process, however that ends; readers do not ask for it. What a killed
    process left half written is removed, and so is, at the end, a folder made here that is still empty.
    ValueError if another process writes there, or if nobody can."""
    if not create and not os.path.isdir(folder):
        yield  # load_checkpoint says what is missing
        return
    made = make_folders(folder)
    file = None
    try:
        file = take_lock(folder)
        if file is not None:
            remove_temporaries(folder)
        check_writable(folder)
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):  # somebody removed the folder
                remove_temporaries(folder)
                os.remove(os.path.join(folder, LOCK))  # while it is held, see take_lock
            os.close(file)
        for path in reversed(made):
            with contextlib.suppress(OSError):  # not empty: a checkpoint is in it
                os.rmdir(path)

def make_folders(folder):
    """Make the folder -> those that were missing, outermost first."""
    made = []
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        made.insert(0, path)
        path = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: no folder can be made there: {error.strerror}") from None
    return made

def take_lock(folder):
    """-> a descriptor that holds the folder's lock; None, after a line that says so, where there are no locks."""
    path = os.path.join(folder, LOCK)
    while True:
        # open the file of the lock; a link or a folder of that name is not ours
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
            raise ValueError(f"--out {folder}: {path} is in the way of the lock: it is not a file, or a link to one")
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        except OSError as error:
            raise ValueError(f"--out {folder}: nothing can be written there: {error.strerror}") from None

        # lock it
        try:
            if fcntl is None:
                raise OSError("this platform has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 20).decode("ascii", "replace")
            os.close(file)
            raise ValueError(f"--out {folder}: another run, process {owner}, is writing there; stop it, or give "
                             "another --out") from None
        except OSError as error:  # some network file systems
            os.close(file)
            os.remove(path)
            print(f"lock    | none in {folder} ({error}): nothing keeps a second run from writing there", flush=True)
            return None

        # its last owner may have removed the file between the two calls: then it locks nobody out
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file)):
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
            return file
        os.close(file)

def check_writable(folder):
    """ValueError if no checkpoint can be written into the folder: seen now, not after minutes of training."""
    for path in (checkpoint_path(folder), f"{checkpoint_path(folder)}.old"):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"--out {folder}: {path} is in the way of the checkpoint: it is not a file")
    try:
        file, path = new_temporary(folder)
        file.close()
        os.remove(path)
    except OSError as error:
        raise ValueError(f"--out {folder}: nothing can be written there: {error.strerror}") from None

def temporary_path(folder):
    """-> a path that nobody else has, for a checkpoint that is being written."""
    return os.path.join(folder, f"ckpt.{os.urandom(6).hex()}.pt.tmp")

def new_temporary(folder):
    """-> file, path: a new file of a name that nobody else has; a link is not followed."""
    path = temporary_path(folder)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
    return os.fdopen(descriptor, "wb"), path

def remove_temporaries(folder):
    """Remove what was left half written. Only the lock's owner may: nobody else writes then."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        is_temporary = re.fullmatch(r"ckpt(\.[0-9a-f]{12})?\.pt\.tmp", name)
        if is_temporary and (os.path.isfile(path) or os.path.islink(path)):
            os.remove(path)

def load_checkpoint(folder, mmap=False):
    """Read FOLDER/ckpt.pt, a plain dict (weights_only). ValueError, naming the file, if it is absent, damaged, of
    another version, or a part of it is missing or of another type. mmap: a tensor is read when it is used first, so
    that whoever wants the weights alone does not wait for the optimizers' moments."""
    # read it
    path = checkpoint_path(folder)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such checkpoint; train.py --out {folder} makes one, or rl.py --out {folder}")
    try:
        state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except PermissionError as error:
        raise ValueError(f"{path}: the checkpoint cannot be read: {error.strerror}") from None
    except Exception as error:  # torch raises half a dozen types, by where the file is broken
        raise ValueError(f"{path}: damaged, or not a checkpoint ({type(error).__name__})") from None

    # its version comes first: another one may have other parts
    version = state.get("version") if isinstance(state, dict) else type(state).__name__
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: checkpoint version {str(version)[:40]}, this code reads version {VERSION}")

    # its parts
    lacks = PARTS.keys() - state.keys()
    if lacks:
        raise ValueError(f"{path}: the checkpoint lacks {', '.join(sorted(lacks))}")
    for name, kind in PARTS.items():
        part = state[name]
        if not isinstance(part, kind):
            raise ValueError(f"{path}: the checkpoint's {name} is of type {type(part).__name__}, not {kind.__name__}")
        if kind is dict and not all(isinstance(key, str) for key in part):
            raise ValueError(f"{path}: the checkpoint's {name} has a key that is not a string")
    check_fields(f"{path}: the checkpoint's now", state["now"], dict(step=int), optional=["step"])
    return state

def write_checkpoint(folder, **state):
    """Write a checkpoint into a new file beside FOLDER/ckpt.pt -> its path. OSError, with nothing left behind, if it
    cannot be written."""
    path = None
    try:
        file, path = new_temporary(folder)
        with file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        return path
    except BaseException as error:
        size = 0
        if path is not None:
            size = os.path.getsize(path)
            os.remove(path)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        # torch reports a full disk as a RuntimeError about positions
        reason = getattr(error, "strerror", None) or "the disk is full, or a limit on the size of files is reached"
        free = shutil.disk_usage(folder).free
        raise OSError(f"cannot write {checkpoint_path(folder)}: {reason} ({size / 1e6:,.1f} MB were written, "
                      f"{free / 1e6:,.1f} MB are free now); the checkpoint that was there is untouched") from None

def place_checkpoint(folder, temporary, run):
    """Give a written checkpoint its name: a crash at any moment leaves a whole one. What another run left there
    becomes ckpt.pt.old. `run` is the name of the run that wrote it; older checkpoints have none, None."""
    path = checkpoint_path(folder)
    try:
        if os.path.isfile(path) and run_of(path) != run:
            keep_old(path)
            print(f"kept    | the checkpoint of another run that was there, as {path}.old", flush=True)
        elif os.path.islink(path):
            print(f"kept    | {path} was a link: what it led to, {os.readlink(path)}, stays as it is", flush=True)
        os.replace(temporary, path)
    except OSError as error:
        os.remove(temporary)
        raise OSError(f"cannot write {path}: {error}") from None

def save_checkpoint(folder, **state):
    """Write FOLDER/ckpt.pt: atomic, and at a run's first time the file of another run is kept as ckpt.pt.old."""
    temporary = write_checkpoint(folder, **state)
    place_checkpoint(folder, temporary, state["now"].get("run"))

def run_of(path):
    """Name of the run that wrote a checkpoint; its weights are not read. "unknown" if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["now"].get("run")
    except Exception:  # as in load_checkpoint
        return "unknown"

def keep_old(path):
    """Rename FILE to FILE.old, in place of an older one. The file gets a second name first: it is never without one."""
    second = temporary_path(os.path.dirname(path))
    try:
        os.link(path, second, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        os.replace(path, f"{path}.old")
        return
    os.replace(second, f"{path}.old")
    if os.path.lexists(second):  # it was the same file already
        os.remove(second)

class SaveTimer:
    """When a process saves by time: 3, 6, 12 and 24 s after its start, then at each minute. `clock` gives seconds."""
    FIRST = (3, 6, 12, 24)
    REST = 20                          # the next save waits 20 times as long as the last one took: 5 % of a run at most

    def __init__(self, clock=lambda: time.monotonic()):  # looked up at each call, so that a test can replace it
        self.clock = clock
        self.start = self.clock()
        self.next = self.FIRST[0]

    def due(self):
        return self.clock() - self.start >= self.next

    def saved(self, since):
        """A save began at `since` on the clock and is done."""
        now = self.clock()
        elapsed = now - self.start
        minute = 60 * (elapsed // 60 + 1)
        planned = min([s for s in self.FIRST if s > elapsed], default=minute)
        self.next = max(planned, elapsed + self.REST * (now - since))

# ---- checkpoints: check, load ------------------------------------------------------------------

# these joined a checkpoint's config later: older ones lack them
LATER_FIELDS = ["index_kl_stride", "window", "window_sink", "conv_taps"]
RUN_FIELDS = ("index_warmup", "mtp_active")  # older checkpoints have these, a run's state, in their config
# the largest values in a checkpoint's config, of what shows in no weight's shape: with larger ones memory would run out
CONFIG_LIMITS = dict(
    max_seq_len=2 ** 24,
    index_head_dim=2 ** 16,
    index_block_size=2 ** 16,
    index_topk_blocks=2 ** 16,
    index_kl_stride=2 ** 24,
    window=2 ** 24,
)
STATE_OF = dict(Muon=["momentum"], AdamW=["step", "exp_avg", "exp_avg_sq"])  # what an optimizer keeps of a parameter
# the kinds of check_fields, in words
KINDS = {int: "a whole number of at least 0", float: "a finite number", type(None): "none"}

def check_fields(what, fields, kinds, optional=()):
    """ValueError, in one line, unless the fields are of their kinds.

    what      begins the line
    fields    name -> value
    kinds     name -> int (0 or more), float (finite; an int will do), str, bool, list, dict, or a tuple that allows
              any of several kinds, type(None) among them
    optional  names that may be missing
    """
    for name, kind in kinds.items():
        if name not in fields and name in optional:
            continue
        if name not in fields:
            raise ValueError(f"{what} lacks {name}")
        value = fields[name]
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not is_of_kind(value, allowed):
            wanted = " or ".join(KINDS.get(kind, kind.__name__) for kind in allowed)
            raise ValueError(f"{what} has {name} = {str(value)[:40]}: it must be {wanted}")

def is_of_kind(value, allowed):
    """Whether a value is of one of the kinds of check_fields. True and False are no whole numbers."""
    if type(value) is int:
        return 0 <= value < 2 ** 63 and (int in allowed or float in allowed)
    if type(value) is float:
        return math.isfinite(value) and float in allowed
    return type(value) in allowed

def check_config(config, model):
    """Fields of a checkpoint -> MiniMaxConfig. ValueError or AssertionError if a field is unknown, missing, or has a
    value that no model can have."""
    config = {name: value for name, value in config.items() if name not in RUN_FIELDS}
    fields = typing.get_type_hints(MiniMaxConfig)
    unknown = config.keys() - fields.keys()
    if unknown:
        raise ValueError(f"its config has {', '.join(sorted(unknown))}, which this code does not know")
    check_fields("its config", config, fields, optional=LATER_FIELDS)
    cfg = MiniMaxConfig(**config)
    for name, most in CONFIG_LIMITS.items():
        value = getattr(cfg, name)
        if value > most:
            raise ValueError(f"its config has {name} = {value}: at most {most}")
    if cfg.n_mtp > len(model):  # or the model would take for ever to build
        raise ValueError(f"its config has n_mtp = {cfg.n_mtp}, more modules than it has weights")
    return cfg

def in_index_warmup(state):
    """Whether a checkpoint's index branch was still learning, while its layers had full attention."""
    if "index_warmup" in state["config"]:  # in older ones
        return state["config"]["index_warmup"] is True
    return not state["now"].get("sparse", True)

def check_tokenizer(spec):
    """A checkpoint's spec -> Tokenizer. ValueError if its parts make none."""
    check_fields("its tokenizer", spec, dict(pattern=str, ranks=list, special=dict))
    ranks = spec["ranks"]
    special = spec["special"]
    if not all(type(token) is bytes and token for token in ranks):
        raise ValueError("its tokenizer has ranks that are not bytes")
    if len(set(ranks)) < len(ranks) or not set(BYTES) <= set(ranks):
        raise ValueError("its tokenizer has a token twice, or lacks one of the 256 bytes")
    if special != {EOT: len(ranks)}:
        raise ValueError(f"its tokenizer's special tokens, {str(special)[:40]}, do not follow the {len(ranks)} others")
    return Tokenizer(spec)

def check_weights(found, wanted):
    """ValueError unless each tensor of one state dict is there in the other, dense, with its shape and dtype."""
    for name in found.keys() - wanted.keys():
        raise ValueError(f"its weight {name} has no place in the model")
    for name, want in wanted.items():
        if name not in found:
            raise ValueError(f"it lacks the weight {name}")
        tensor = found[name]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"its weight {name} is not a tensor of numbers")
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(f"its weight {name} is {tuple(tensor.shape)} {tensor.dtype}, the model needs "
                             f"{tuple(want.shape)} {want.dtype}")

def check_finite(weights):
    """FloatingPointError, naming the first, if a weight is NaN or infinite."""
    for name, weight in weights.items():
        if not torch.stack(weight.aminmax()).isfinite().all():  # one pass, a NaN is both; isfinite alone makes five
            raise FloatingPointError(f"the weight {name} is not finite")

def first_line(error):
    """The first line of an error's text; an error without a text is named by its type."""
    return (str(error) or type(error).__name__).splitlines()[0]

class Undrawn(TorchFunctionMode):
    """Within it a model is made without its random first weights, where others are about to replace them: they take
    seconds, and on the meta device torch imports its compiler to draw nothing."""
    DRAWS = (torch.Tensor.normal_, torch.nn.init.normal_, torch.nn.init.kaiming_uniform_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.DRAWS:  # in place: nobody reads what they return
            return None
        return function(*args, **(kwargs or {}))

def load_model(state, device="cpu", dtype=torch.float32):
    """Checkpoint -> model in evaluation mode, tokenizer. ValueError if its parts do not fit together or into this code,
    FloatingPointError if a weight is not finite."""
    try:
        cfg = check_config(state["config"], state["model"])
        tokenizer = check_tokenizer(state["tokenizer"])
        if tokenizer.n_vocab != cfg.vocab_size:
            raise ValueError(f"its model has a vocabulary of {cfg.vocab_size} tokens, its tokenizer one of "
                             f"{tokenizer.n_vocab}: they must be equal")
        with Undrawn():
            with torch.device("meta"):  # nothing is allocated before all shapes are known to fit
                wanted = MiniMax(cfg, dtype).state_dict()
            check_weights(state["model"], wanted)
            with torch.device(device):
                model = MiniMax(cfg, dtype)
        model.load_state_dict(state["model"])
        check_finite(model.state_dict())
        return model.eval(), tokenizer
    except (TypeError, KeyError, AttributeError, RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"the checkpoint does not fit this code: {first_line(error)}") from None
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} in the checkpoint that was read") from None

def load_optimizers(optimizers, saved, step):
    """Put the saved states back. ValueError unless they are those of these optimizers after so many steps: groups,
    shapes, numbers; a parameter may lack its state, as an index branch that has just joined does."""
    what = "the checkpoint does not fit this code: its optimizers"
    if len(saved) != len(optimizers):
        raise ValueError(f"{what} are {len(saved)}, not {len(optimizers)}")
    for optimizer, state in zip(optimizers, saved):
        usual_groups = [dict(group) for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(state)
        except Exception as error:  # torch raises what its accesses raise
            raise ValueError(f"{what} are of another model: {first_line(error)}") from None
        if step and not optimizer.state:
            raise ValueError(f"{what} hold nothing after {step} steps")

        # the settings of each group, then the moments of each parameter
        for group, usual in zip(optimizer.param_groups, usual_groups):
            for name in usual.keys() - {"params", "lr"}:  # the rate is set before each step
                value = group.setdefault(name, usual[name])
                if not is_like(value, usual[name]):
                    raise ValueError(f"{what} have {name} = {str(value)[:40]}, where {usual[name]} is usual")
        for parameter, moments in optimizer.state.items():
            check_moments(what, parameter, moments, STATE_OF[type(optimizer).__name__])

def is_like(value, usual):
    """Whether a setting could stand for the usual one: of its type, finite if a float, the same if a switch or a whole
    number, and so for each item of a tuple."""
    if type(value) is not type(usual):
        return False
    if isinstance(usual, int):  # True and False, too
        return value == usual
    if isinstance(usual, tuple):
        return len(value) == len(usual) and all(map(is_like, value, usual))
    return type(value) is not float or math.isfinite(value)

def check_moments(what, parameter, moments, names):
    """ValueError unless an optimizer's state of a parameter has the tensors of these names."""
    if not isinstance(parameter, torch.Tensor) or not isinstance(moments, dict):
        raise ValueError(f"{what} have the state of a parameter that the model has not")
    for name in names:
        value = moments.get(name)
        shape = () if name == "step" else parameter.shape
        if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
            raise ValueError(f"{what} have no {name} of shape {tuple(shape)}")
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{what} have numbers that are not finite in {name}")

# ---- running a script --------------------------------------------------------------------------
# What all four scripts share: flags, the device, the number of CPU threads, memory, signals, and `command`, which
# makes one line of JSON of a result and one line of text of an error.

class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help, and one line instead of the whole usage for a mistake."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.add_argument("--device", help="cpu, cuda, cuda:N or mps; default: a GPU if there is one")
        self.add_argument("--threads", type=number(1, 1024), help="CPU threads; default: what OMP_NUM_THREADS says, or "
                          "all, or one where the machine is so busy that one is faster")

    def error(self, message):
        raise ValueError(message.removeprefix("argument "))

def number(low, high=2 ** 31 - 1, kind=int, above=False, zero=False):
    """Make a type for argparse: text -> a finite number of the range. What is none is refused, with the range named.

    low    the smallest number allowed
    high   the largest number allowed; math.inf for no limit
    kind   int or float
    above  True: low itself is not allowed
    zero   True: 0 is allowed too, outside the range
    """
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" above {low}" if above else f" of at least {low}"
    if high < math.inf:
        wanted += f" and at most {high}"
    if zero:
        wanted = f"0, or {wanted}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        large_enough = value > low if above else value >= low
        fits = large_enough and value <= high and value < math.inf
        if not fits and not (zero and value == 0):
            raise argparse.ArgumentTypeError(f"{text[:40]}: it must be {wanted}")
        return value
    return read

def tokens(text):
    """A type for argparse: a number of tokens as people write it, 65536, 65_536, 65,536, 1e6, 64k (k = 1,024) or 1M
    (M = 1,048,576)."""
    grouped = "[0-9]{1,3}(?:[,_][0-9]{3})+"
    plain = r"[0-9]{1,12}(?:\.[0-9]{1,6})?(?:e[0-9])?"
    form = re.fullmatch(f"({grouped}|{plain})([km]?)", text.strip().lower())
    value = math.nan
    if form:
        digits = re.sub("[,_]", "", form[1])
        unit = {"": 1, "k": 2 ** 10, "m": 2 ** 20}[form[2]]
        value = float(digits) * unit
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text}: write tokens as 65536, 64k (65,536), 1M (1,048,576) or 1e6")
    return int(value)

def layer_range(text):
    """For argparse: A:B -> range(A, B)."""
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: it must be A:B, two numbers with A < B, as in 0:2")
    return range(int(found[1]), int(found[2]))

def utf8(text):
    """A type for argparse: text whose bytes the locale could not read is read as UTF-8; what is no UTF-8 is refused."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8")

def saved_flags(parser, path, saved, not_taken):
    """A checkpoint's args -> the command line that they are, so that argparse checks them as it checks any other.
    What the parser does not know is refused; `not_taken` is what the run at hand decides."""
    defaults = vars(parser.parse_args([]))
    flags = []
    for name, value in saved.items():
        if name not in defaults:
            raise ValueError(f"{path}: the checkpoint's args have {name}, which this code does not know")
        is_default = type(value) is type(defaults[name]) and value == defaults[name]
        if name in not_taken or is_default:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, list) and isinstance(defaults[name], list):  # a flag that may stand several times
            flags += [f"{flag}={one}" for one in value]
        else:
            flags.append(f"{flag}={value}")
    try:
        parser.parse_args(flags)
    except ValueError as error:
        raise ValueError(f"{path}: the checkpoint's args: {error}") from None
    return flags

def pick_device(name=None, world=None):
    """-> device, dtype of the activations, reason. ValueError if the device is asked for and absent. In a World of
    several processes each has a GPU of its own."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world is not None and world.size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device {name}: each of {world.size} processes takes a GPU of its own; --device cuda")
        name = f"cuda:{world.local_rank}"

    # refuse what is not there
    if not re.fullmatch("cpu|cuda|cuda:[0-9]+|mps", name):
        raise ValueError(f"--device {name!r}: cpu, cuda, cuda:N or mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no CUDA GPU; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device mps: this torch ({torch.__version__}) sees no Apple GPU; use --device cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: cpu, cuda, cuda:N or mps; {first_line(error)}") from None

    # bf16 only where it is fast
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and Triton take the current one
    if device.type == "cuda" and torch.cuda.get_device_capability(name) >= (8, 0):
        return device, torch.bfloat16, f"{torch.cuda.get_device_name(name)} has bf16 tensor cores"
    return device, torch.float32, "bf16 products are 10-70 times slower than fp32 on CPUs without AMX"

class Threads:
    """How many CPU threads to compute with: `count`, and the reason, `why`.

    --threads or OMP_NUM_THREADS decides; without them the checkpoint, as bits depend on the number; without one,
    `choose` times one thread against all. On a machine that others use, all threads wait for the one that does not
    run: they can be ten times slower than one."""
    FASTER = 1.3                       # one thread is taken only where it is clearly faster: a quiet machine uses all
    FASTER_FOR_STEPS = 3.0             # the same for a run of --steps, which another run should equal to the bit
    FAR = 2.0                          # the same where one trial with one thread took longer than one with all
    FIRST = 10                         # steps at a run's start whose median is its usual time of a step
    SLOWER = 5.0                       # steps that took so many times the usual time make a run look again:
    STEPS = 5                          # so many in a row,
    SECONDS = 10.0                     # or fewer that took so long together

    def __init__(self, device, asked=None, saved=None, world=None):
        """device; asked: --threads; saved: the number in a checkpoint; world: with other ranks nothing is tried, as
        they would wait. Where `count` stays None, `choose` is needed."""
        on_cpu = device.type == "cpu"
        named = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)]
        self.most = torch.get_num_threads()
        alone = world is None or world.size == 1
        self.free = on_cpu and self.most > 1 and not asked and not named and alone  # the user leaves the choice to us
        self.times = []                # seconds of the first steps and of the last
        self.count = None
        if self.free:
            if not saved:
                return
            self.keep(saved)
        elif asked:
            self.use(asked, "by --threads")
        elif named:
            self.use(self.most, f"by {named[0]}")
        elif on_cpu:
            self.use(self.most, "all")
        else:
            self.use(1, "as a pool of threads, woken between two steps, keeps a GPU waiting")
        if saved and saved != self.count:
            self.why += f"; the checkpoint was trained with {saved}: bits may part from here"

    def use(self, count, why):
        self.count = count
        self.why = why
        torch.set_num_threads(count)

    def keep(self, saved):
        """Go on with as many threads as a checkpoint was trained with, for equal bits, unless the user chose."""
        if self.free:
            self.use(min(saved, self.most), "as in the checkpoint")

    def choose(self, step, n_steps=None):
        """Call step() with one thread and with all, in turn, each three times, and take one where it is clearly faster.
        n_steps: of the run, None where it ends by the clock."""
        faster = self.FASTER_FOR_STEPS if n_steps else self.FASTER
        seconds = {1: [], self.most: []}
        torch.set_num_threads(1)
        step()  # the first has memory to allocate
        for _ in range(3):
            for count, taken in seconds.items():
                torch.set_num_threads(count)
                started = time.perf_counter()
                step()
                taken.append(time.perf_counter() - started)
            one = statistics.median(seconds[1])
            many = statistics.median(seconds[self.most])
            if many > 10 or many > 5 * one:  # steps of ten seconds are not tried often; five times slower is clear
                break

        # times that overlap need a wider gap
        if max(seconds[1]) >= min(seconds[self.most]):
            faster = max(faster, self.FAR)
        chosen = 1 if many > one * faster else self.most
        self.use(chosen, f"{one:.3f} s a step with one, {many:.3f} s with {self.most}")
        self.times = []

    def slowed(self, seconds):
        """Note a step's seconds -> whether the last steps took SLOWER times as long as the first, in the median."""
        self.times.append(seconds)
        del self.times[self.FIRST:-self.STEPS]
        if not self.free or len(self.times) <= self.FIRST:
            return False
        usual = statistics.median(self.times[:self.FIRST])
        last = reversed(self.times[self.FIRST:])
        slow = list(itertools.takewhile(lambda took: took > self.SLOWER * usual, last))
        return len(slow) == self.STEPS or len(slow) > 1 and sum(slow) > self.SECONDS

    def watch(self, seconds, trial, given):
        """A step took so many seconds: where steps have become slower, choose again by trial(given), and say so."""
        if not self.slowed(seconds):
            return
        before = self.count
        self.choose(trial(given))
        parts = "; bits may part from here" if self.count != before else ""
        print(f"threads | steps became {self.SLOWER:g} times slower: {self} (before: {before}{parts})", flush=True)

    def __str__(self):
        return f"{self.count} of {max(self.count, self.most)}: {self.why}"

# a control group's files, by the name of its hierarchy, "" in version 2: limit, use, and a row of memory.stat that says
# how much of the use is file caches, which can be dropped
GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}

def group_room(folder, limit, used, cache):
    """Bytes that one control group leaves, its file caches included; inf without a limit."""
    try:
        most = int(Path(folder, limit).read_text())
        taken = int(Path(folder, used).read_text())
        rows = dict(row.split() for row in Path(folder, "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return math.inf  # the limit is "max", or no such group is in sight: a container shows its own as the root
    return most - taken + int(rows.get(cache, 0))

def cgroup_room(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Bytes that the tightest of this process's control groups (v2 and v1) leaves it; inf without a limit."""
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:
        return math.inf
    room = math.inf
    for line in lines:
        _, hierarchy, path = line.split(":", 2)
        if hierarchy not in GROUP_FILES:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):  # a limit of any group above holds, too
            folder = os.path.join(root, hierarchy, *parts[:depth])
            room = min(room, group_room(folder, *GROUP_FILES[hierarchy]))
    return room

def free_memory(device):
    """Bytes that a run could take now: of the GPU, or of the machine and of this process's control groups. None where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    available = 1024 * int(rows["MemAvailable"].split()[0])
    return min(available, cgroup_room())

def peak_memory(device):
    """Bytes that this process had at most: of the GPU, or of the machine. None on Windows, which does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def check_memory(need, device, ways, unsure=1.25):
    """ValueError, before anything is allocated, where a run needs clearly more memory than is free.

    need    bytes, an estimate
    device  whose memory counts
    ways    flags that make a run need less, for the line
    unsure  the estimate may be so many times too high: up to there, a run is only warned
    """
    free = free_memory(device)
    if free is None or need <= free:
        return
    line = f"about {need / 1e9:.1f} GB are needed, {max(0, free) / 1e9:.1f} GB are free on {device}; less with {ways}"
    if need > unsure * free:
        raise ValueError(line)
    print(f"memory  | {line}", flush=True)

def implementations(model, device, trains=False, decodes=True):
    """What runs a model's layers on this device, in words for a start-up card, by the rules that pick it."""
    cfg = model.cfg
    dtype = model.dtype
    words = []
    in_kernels = device.type == "cuda" and dtype.itemsize == 2
    if "full" in cfg.attn_types:
        full = ["SDPA"]
        if trains and in_kernels:
            full.append("FlexAttention over documents")
        if decodes and implementation(device, dtype, cfg.head_dim) == "Triton":
            full.append("decoding in Triton")
        words.append(f"full attention: {', '.join(full)}")
    if "msa" in cfg.attn_types:
        chosen = implementation(device, dtype, cfg.head_dim, cfg.index_head_dim, cfg.index_block_size)
        words.append(f"msa: {chosen}")
    if "swa" in cfg.attn_types:
        window = ["torch, with a sink" if cfg.window_sink else "SDPA"]
        if trains and in_kernels:
            window.append(f"FlexAttention for rows of {SHORT_ROW} tokens or more")
        words.append(f"window of {cfg.window}: {', '.join(window)}")
    if "lightning" in cfg.attn_types:
        linear = ["torch"]
        if in_kernels:
            linear.append(f"Triton for rows of {SHORT_ROW} tokens or more")
        words.append(f"lightning: {', '.join(linear)}")
    if "moe" in cfg.mlp_types:
        experts = "a loop, as grouped_mm has no fp64"
        if is_offloaded(model):
            experts = "one by one, as they are read"
        elif pick_experts(dtype) is experts_grouped:
            experts = "grouped_mm"
        words.append(f"experts: {experts}")
    return "; ".join(words)

def figure_format(path):
    """-> a picture's format, the suffix of its name; png where that has none."""
    return os.path.splitext(path)[1][1:] or "png"

def check_figure(path):
    """ValueError if --figure cannot be drawn or written: it shows now, not after minutes. Nothing is created."""
    from matplotlib.figure import Figure
    folder = os.path.dirname(path) or "."
    target = path if os.path.exists(path) else folder
    if not os.path.isdir(folder) or os.path.isdir(path) or not os.access(target, os.W_OK):
        raise ValueError(f"--figure {path}: it must be a file in a folder that can be written")
    try:
        Figure().savefig(os.devnull, format=figure_format(path))
    except ValueError as error:
        raise ValueError(f"--figure {path}: {error}") from None

def tolerant_output():
    """Print what the terminal's encoding lacks (an ASCII terminal, a file name that is no UTF-8) as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

# ---- several processes -------------------------------------------------------------------------
# torchrun starts N processes with the same command line; process number r is rank r. Each computes its share, and they
# meet in collectives, operations that all ranks enter: NCCL between GPUs, gloo between CPUs. What one rank alone can
# know, such as the time or a signal, is agreed on first, or some would leave a loop while others wait in it. Rank 0
# alone prints and writes files.
# A rank that dies leaves the others in a collective. gloo's ends with an error, NCCL's waits; torchrun sends SIGTERM
# to whoever is left, and kills after 30 s. `command` makes one line of such an error, and a thread that reads signals
# from a pipe, for the main thread may be inside a collective, ends a process that cannot leave by itself.
LEAVE_S = 25                           # seconds after SIGTERM or Ctrl-C in which a process saves and ends by itself
TOGETHER_S = 600                       # that ranks wait for each other in a collective, and are given up then
FIRST_S = 24 * 3600                    # the same while rank 0 alone reads a text and learns its tokenizer

@dataclasses.dataclass(frozen=True)
class World:
    """The processes that torchrun has started: this one is number `rank` of `size`, number `local_rank` on its host."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls):
        """What torchrun's variables say; one process without them."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        numbers = (os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(*map(int, numbers))

    @property
    def is_first(self):
        return self.rank == 0

    def join(self, device):
        """Meet the other ranks: after it, collectives work, on CPU tensors, too."""
        if self.size == 1 or dist.is_initialized():
            return
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
        wait = datetime.timedelta(seconds=TOGETHER_S)
        dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=wait)

    def largest(self, *numbers):
        """The largest of all ranks' numbers, one by one -> a list of floats. No GPU is waited for."""
        if self.size == 1:
            return list(map(float, numbers))
        together = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def agree(self, *numbers):
        """Rank 0's numbers, on all ranks -> a list of floats."""
        if not self.is_first:
            numbers = [-math.inf] * len(numbers)
        return self.largest(*numbers)

    def smallest(self, *numbers):
        """The smallest of all ranks' numbers, one by one -> a list of floats."""
        return [-number for number in self.largest(*(-number for number in numbers))]

    def any(self, flag):
        """Whether it is true on some rank."""
        return self.largest(bool(flag))[0] > 0

    def check_same(self, what, text):
        """ValueError unless this text is the same on all ranks: on several machines each has files of its own."""
        number = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # which fp64 holds exactly
        first, = self.agree(number)
        if self.any(number != first):
            raise ValueError(f"{what}: not all ranks read the same")

    def wait(self):
        """Until all ranks are here."""
        self.largest(0)

    @contextlib.contextmanager
    def first(self):
        """Rank 0 goes through the body first, then the others at once: they find what it has left in a cache. It may
        take longer than any step: the ranks wait in a group of their own."""
        if self.size == 1:
            yield
            return
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=FIRST_S))
        if not self.is_first:
            dist.barrier(patient)
        yield
        if self.is_first:
            dist.barrier(patient)

def watch_signals():
    """Start a thread that ends this process LEAVE_S seconds after SIGTERM or Ctrl-C, wherever its main thread is."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait():
        while os.read(reader, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        time.sleep(LEAVE_S)
        print(f"stopped: {LEAVE_S} s after the signal other ranks are still waited for: one may have died; the last "
              "checkpoint is kept", file=sys.stderr, flush=True)
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()

def is_lost_rank(error):
    """Whether an error says that another process of the job has gone."""
    words = str(error)
    return isinstance(error, dist.DistError) or "gloo" in words.lower() or "Connection closed by peer" in words

def on_signals():
    """-> a list that Ctrl-C and SIGTERM fill from now on."""
    stop = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.append(1))
    return stop

def command(script, run, kept="", less=""):
    """Call run(locks), print its result as JSON; an error becomes one line on stderr and an exit status.

    script  name that the line begins with
    run     is given an ExitStack, which holds what it locks until the end
    kept    what is left of a run that diverged, for its line
    less    what needs less memory, for its line
    Status: 2 for bad input or too little memory, 1 for divergence or a wrong result, 130 for Ctrl-C, 141 for `| head`.
    """
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    world = World.from_env()
    tolerant_output()
    if world.size > 1:
        watch_signals()
    if not world.is_first:             # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")
    try:
        with contextlib.ExitStack() as locks:
            result = run(locks)
        print(json.dumps(result), flush=True)
        if world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
        return result
    except BrokenPipeError:
        os._exit(141)  # what is buffered has no reader: Python's own end would complain
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except FloatingPointError as error:
        line, status = f"stopped: {error}{kept}", 1
    except ArithmeticError as error:
        line, status = f"wrong result: {error}", 1
    except ImportError as error:
        line, status = f"{error}; pip install matplotlib", 2  # the one package that is optional
    except (ValueError, OSError) as error:
        line, status = str(error), 2
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            reason = str(error) or "a Python object did not fit"
            line, status = f"out of memory: {reason.splitlines()[0]}{less}", 2
        elif world.size > 1 and is_lost_rank(error):
            what = first_line(error).split(". ")[0]  # gloo adds advice
            reason = f"another rank has ended, and this one with it ({what}){kept}"
            leave(f"{script}: rank {world.rank}: {reason}", 1)
        else:
            raise_at_once(world)
    except Exception:
        raise_at_once(world)
    finally:  # tests call several scripts in one process
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        torch.set_num_threads(threads)
    if not world.is_first:  # where rank 0 fails for the same reason, torchrun ends this process before it repeats it
        time.sleep(1)
    if world.size > 1:
        leave(f"{script}: rank {world.rank}: {line}", status)
    print(f"{script}: {line}", file=sys.stderr)
    sys.exit(status)

def raise_at_once(world):
    """Raise the error that is being handled. One of several processes ends before Python's own end, which would wait
    for what its GPU still waits for: the others."""
    if world.size == 1:
        raise
    leave(f"rank {world.rank}: {traceback.format_exc()}", 1)

def leave(line, status):
    """End one of several processes after an error: at once, for what a GPU still waits for would keep it."""
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    os._exit(status)

def is_out_of_memory(error):
    """Whether an error says that memory is short; torch's CPU allocator says so in a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return type(error) is RuntimeError and "allocate" in str(error)

# ---- generation --------------------------------------------------------------------------------
# logits -> temperature -> the top_k largest -> the smallest set that holds top_p -> one draw, or, of drafts, as many as
# hold and one draw.

def largest_logit(logits):
    """(B, V) -> (B, 1). ValueError for a row with a NaN or +inf in it, or with nothing but -inf: it has no softmax."""
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("logits with NaN or +inf among them, or all -inf: nothing can be drawn from them")
    return largest

def truncate_logits(logits, temperature, top_p, top_k):
    """Temperature, then the top_k largest, then the smallest set that holds top_p of what is left; the rest is -inf.
    logits (B, V) fp32. top_k None or 0 and top_p 1 cut nothing. Of equal logits the lowest ids stay."""
    if not (temperature > 0 and 0 < top_p <= 1 and (top_k is None or top_k >= 0)):
        raise ValueError(f"temperature {temperature}, top_p {top_p}, top_k {top_k}: above 0; above 0 to 1; 0 or more")
    V = logits.size(-1)
    largest = largest_logit(logits)
    # less the largest: no quotient overflows, and softmax would subtract it anyway
    logits = (logits - largest) / max(temperature, torch.finfo(logits.dtype).tiny)
    n = min(top_k or V, V)
    if n == V and top_p == 1:
        return logits

    # how many stay in a row: n, or as many as hold top_p, the first one even where it alone exceeds it
    ranked = logits.topk(n).values                                                                         # (B, n)
    n_kept = torch.full_like(largest, n, dtype=torch.int64)                                                # (B, 1)
    if top_p < 1:
        p = ranked.softmax(-1)
        before = p.cumsum(-1) - p
        n_kept = (before < top_p).sum(-1, keepdim=True)

    # they are what lies above the last of them, and of what equals it the lowest ids
    last = ranked.gather(-1, n_kept - 1)
    above = logits > last
    level = logits == last
    room = n_kept - above.sum(-1, keepdim=True)
    kept = above | (level & (level.cumsum(-1) <= room))
    return logits.masked_fill(~kept, float("-inf"))

def sample_next(logits, temperature=1.0, top_p=1.0, top_k=None, generator=None):
    """(B, V) -> token (B,). temperature 0 is greedy. ValueError for what largest_logit and truncate_logits refuse."""
    if temperature == 0:
        largest_logit(logits)
        return logits.argmax(-1)
    p = truncate_logits(logits, temperature, top_p, top_k).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]

def verify(logits, drafts, draft_probs, n_drafts, temperature=1.0, top_p=1.0, top_k=None, generator=None):
    """Speculative sampling (arXiv 2211.17192, algorithm 1): what comes out has the distribution of plain sampling.

    logits       (B, K + 1, V), fp32 or wider, of the model: after the last sure token and after each draft
    drafts       (B, K) int64
    draft_probs  (B, K, V), the distributions that they were drawn from; not read at temperature 0
    n_drafts     (B,), how many of a row's drafts count
    temperature, top_p, top_k, generator  as in sample_next, of the model's distribution p
    -> n_accepted (B,), how many of a row's drafts hold, from the first on; token (B,), drawn in place of the next.

    A draft holds with min(1, p / q). In place of the first that fails comes a draw from what p has more than q; after
    them all, one from p. Greedy: a draft holds where it is the model's choice.
    """
    K = drafts.size(1)
    in_use = torch.arange(K, device=drafts.device) < n_drafts[:, None]
    if temperature == 0:
        largest_logit(logits.flatten(0, 1))
        best = logits.argmax(-1)                                                                      # (B, K + 1)
        holds = in_use & (drafts == best[:, :K])
        n_accepted = holds.cumprod(1).sum(1)
        return n_accepted, best.gather(1, n_accepted[:, None])[:, 0]

    p = truncate_logits(logits.flatten(0, 1), temperature, top_p, top_k).softmax(-1).view(logits.shape)
    if K == 0:
        return n_drafts, torch.multinomial(p[:, 0], 1, generator=generator)[:, 0]
    q = draft_probs.to(p.dtype)
    p_draft = p[:, :K].gather(2, drafts[..., None])[..., 0]                                               # (B, K)
    q_draft = q.gather(2, drafts[..., None])[..., 0]
    luck = torch.rand(drafts.shape, generator=generator, device=p.device, dtype=p.dtype)
    holds = in_use & (luck * q_draft < p_draft)
    n_accepted = holds.cumprod(1).sum(1)

    # the distribution of the last token: p, less q where a draft has failed
    each_row = torch.arange(len(p), device=p.device)
    p_last = p[each_row, n_accepted]                                                                      # (B, V)
    q_last = F.pad(q, (0, 0, 0, 1))[each_row, n_accepted]
    has_failed = n_accepted < n_drafts
    more = (p_last - q_last).clamp(min=0)
    has_more = more.sum(-1) > 0  # p equals q but for rounding: then a draft fails hardly ever
    last = torch.where((has_failed & has_more)[:, None], more, p_last)
    return n_accepted, torch.multinomial(last, 1, generator=generator)[:, 0]

# ---- generation: drawing by kernels --------------------------------------------------------------
# The same for a step on a GPU. There torch's operators are some thirty kernels, in most of which one multiprocessor
# reads a row of logits. Here are three:
#     _peaks_kernel   many programs a row: the largest of each 64 logits, and sums for log-sum-exp
#     _draw_kernel    a row: cut it, draw from what is left. The k largest logits are in the k groups of 64 with the
#                     largest peaks, so that with top-k those are all that is read
#     _verify_kernel  a sequence: which drafts hold, what comes in place of the first that does not, and how likely the
#                     model finds each of these tokens
# A cut is all that it takes to know each token's probability: the largest logit, the least that is kept, as temperature
# scales it, the last id of those equal to it, and the sum of exponentials.
#
# Random numbers are Philox's, of a key that lies on the device and moves on with each step: a CUDA graph draws anew.

CUT = constexpr(4)                     # numbers of a cut
KEYS_A_STEP = 64                       # each launch of a step that draws adds a number of its own, or two, to the key,
FIRST_OFFSET = 17                      # from here on: Triton compiles a kernel anew for 1 and for multiples of 16
GROUP = 64                             # logits with one peak
CHUNK = 2048                           # logits of a program of _peaks_kernel
MOST_GROUPS = 128                      # top-k up to here reads groups; above, or without, a program reads the whole row

@jit
def _sum_where(mask, x):
    return tl.sum(tl.where(mask, x, 0.0), 0)

@jit
def _least_kept(x, weight, wanted):
    """The largest t of x such that the weights of all that is t or more sum to `wanted`; if none does, the least of x
    that is not -inf."""
    top = tl.max(x, 0)
    least = tl.min(tl.where(x > float("-inf"), x, float("inf")), 0)
    enough = _sum_where(x >= top, weight) >= wanted
    searching = _sum_where(x >= least, weight) >= wanted
    searching = searching & (enough == 0)

    # halve: what is lo or more is enough, what is hi or more is not, until all in between are equal
    lo = least
    hi = top
    mid = lo * 0.5 + hi * 0.5
    between = 2
    while searching & (between > 1) & (lo < mid) & (mid < hi):
        suffices = _sum_where(x >= mid, weight) >= wanted
        lo = tl.where(suffices, mid, lo)
        hi = tl.where(suffices, hi, mid)
        mid = lo * 0.5 + hi * 0.5
        between = tl.sum(((x >= lo) & (x < hi)).to(tl.int32), 0)
    found = tl.max(tl.where(x < hi, x, float("-inf")), 0)
    return tl.where(enough, top, tl.where(searching, found, least))

@jit
def _last_kept(equal, token, room, V):
    """The id of the room-th token that is `equal`; V if there are no more than room."""
    crowded = tl.sum(equal.to(tl.int32), 0) > room
    lo = -1
    hi = V
    while crowded & (hi - lo > 1):
        mid = (lo + hi) // 2
        fits = tl.sum((equal & (token <= mid)).to(tl.int32), 0) <= room
        lo = tl.where(fits, mid, lo)
        hi = tl.where(fits, hi, mid)
    return tl.where(crowded, lo, V)

@jit
def _top_k(x, i, k, V):
    """The k largest of x, of tokens i, all if there are fewer: the least of them, and the last token equal to it."""
    least = _least_kept(x, tl.where(x > float("-inf"), 1.0, 0.0), k)
    room = k - tl.sum((x > least).to(tl.int32), 0)
    return least, _last_kept(x == least, i, room, V)

@jit
def _top_p(x, i, p, V):
    """The fewest of x that hold p of all: as _top_k."""
    weight = tl.exp(x)
    wanted = p * tl.sum(weight, 0)
    least = _least_kept(x, weight, wanted)
    missing = wanted - _sum_where(x > least, weight)
    room = tl.maximum(tl.ceil(missing / tl.exp(least) - 1e-4), 1.0)             # less what a sum may be off
    return least, _last_kept(x == least, i, room, V)

@jit
def _list_groups(peak, g, k, V, group, LISTED: constexpr):
    """Write a list of the groups g with the k largest peaks, of equal ones the first, then -1."""
    least, last = _top_k(peak, g, k, V)
    listed = ((peak > least) | ((peak == least) & (g <= last))) & (peak > float("-inf"))
    place = tl.cumsum(listed.to(tl.int32), 0) - 1
    slot = tl.arange(0, LISTED)
    tl.store(group + slot, -1, mask=slot >= tl.sum(listed.to(tl.int32), 0))
    tl.store(group + place, g, mask=listed)
    tl.debug_barrier()                 # now every thread sees the list

@jit
def _weight(logit, token, cut, temperature):
    """exp of what a token's logit is below the row's largest, 0 where the row's cut leaves it out."""
    x = (logit - tl.load(cut)) / temperature
    least = tl.load(cut + 1)
    kept = (x > least) | ((x == least) & (token <= tl.load(cut + 2)))
    return tl.where(kept, tl.exp(x), 0.0)

@jit
def _race(weight, token, key, place, best, winner):
    """Clocks that ring at the rates `weight`, after a race that `winner` won with 1 / time = best: which one of all
    rings first is a draw. place: where the random numbers of the row start."""
    u = tl.maximum(tl.rand(key, place + token), 2.0 ** -32)
    small = u * (1 + u * (0.5 + u / 3))                                         # log near 1 would round it
    wait = tl.where(u < 1e-3, small, -tl.log(1 - u))
    speed = tl.where(weight > 0, weight / wait, -1.0)
    fastest = tl.max(speed, 0)
    who = tl.min(tl.where(speed == fastest, token, 2147483647), 0)
    return tl.maximum(best, fastest), tl.where(fastest > best, who, winner)

@jit
def _logit_row(first, row, N, T):
    """Where the logits of a launch's row lie, in rows of V: see draw_rows."""
    b = row // N
    at = row % N
    if first is not None:
        at = tl.minimum(tl.load(first + b).to(tl.int32) + at, T - 1)
    return (b * T + at).to(tl.int64)

@jit
def _may_draw(x, allowed, row, N, V, i):
    """x (logits of tokens i), -inf where a first row must not draw."""
    if allowed is not None:
        start = (row // N).to(tl.int64) * V
        real = (i >= 0) & (i < V)
        may = tl.load(allowed + start + i, mask=real, other=1)
        x = tl.where((may != 0) | (row % N > 0), x, float("-inf"))
    return x

# One program = one chunk of one row.
@jit
def _peaks_kernel(
    logits,   # (B, T, V)
    first,    # (B,), or None: see draw_rows
    allowed,  # (B, V) bool, or None
    peak,     # (B * N, groups) fp32, written: the largest that may be drawn of each
    stat,     # (B * N, chunks, 2) fp32, written: the largest of all, NaN if one is; the sum of exp(logit - it)
    T,
    V,
    N,
    GROUP: constexpr,
    CHUNK: constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    i = group[:, None] * GROUP + tl.arange(0, GROUP)
    start = _logit_row(first, row, N, T) * V
    x = tl.load(logits + start + i, mask=i < V, other=float("-inf")).to(tl.float32)     # [groups, GROUP]

    largest = tl.max(tl.max(x, 1), 0)
    total = tl.sum(tl.sum(tl.exp(x - tl.maximum(largest, -3e38)), 1), 0)
    has_nan = tl.sum(tl.sum((x != x).to(tl.int32), 1), 0) > 0
    stat += (row * tl.num_programs(0) + chunk) * 2
    tl.store(stat, tl.where(has_nan, float("nan"), largest))
    tl.store(stat + 1, total)
    peaks = tl.max(_may_draw(x, allowed, row, N, V, i), 1)
    tl.store(peak + row * tl.cdiv(V, GROUP) + group, peaks, mask=group * GROUP < V)

@jit
def _tokens(group, start, LISTED: constexpr, GROUP: constexpr, TILE: constexpr):
    """The tokens [TILE] of a list of groups, -1 for none, or without a list those from `start` on."""
    if group is None:
        i = start + tl.arange(0, TILE)
    else:
        listed = tl.load(group + tl.arange(0, LISTED))
        i = tl.reshape(listed[:, None] * GROUP + tl.arange(0, GROUP), [TILE])
    return i

@jit
def _logits_of(logits, row, i, V):
    """Of tokens i in a row of V; -inf where there is none."""
    real = (i >= 0) & (i < V)
    x = tl.load(logits + row * V + i, mask=real, other=float("-inf"))
    return x.to(tl.float32)

# One program = one row.
@jit
def _draw_kernel(
    logits,       # (B, T, V)
    first,        # (B,) the token of each sequence whose logits are its first row, or None: 0
    allowed,      # (B, V) bool, what a first row may draw, or None
    key,          # (1,)
    peak,         # (B * N, groups), of _peaks_kernel
    stat,         # (B * N, chunks, 2), of _peaks_kernel
    token,        # (B, N) int64, written
    lse,          # (B, N) fp32, written: log-sum-exp of the row's logits, NaN where nothing can be drawn
    cut,          # (B, N, 4) fp32, written unless greedy
    group,        # (B, N, LISTED) int32, written: the groups that hold the k largest, then -1; not without BY_GROUP
    T,
    V,
    N,            # rows of a sequence
    chunks,
    key_offset,   # added to the key
    temperature,
    top_p,
    top_k,
    GREEDY: constexpr,
    BY_K: constexpr,      # whether top_k cuts
    BY_P: constexpr,
    BY_GROUP: constexpr,  # whether the k groups are all that is read
    GROUP: constexpr,
    GROUPS: constexpr,    # of a row, rounded up
    CHUNKS: constexpr,    # of a row, rounded up
    LISTED: constexpr,    # top_k, rounded up
    SIZE: constexpr,      # of all that is read: LISTED * GROUP, or V rounded up
    TILE: constexpr,      # at a time, where no cut is sought
):
    row = tl.program_id(0)
    at = _logit_row(first, row, N, T)

    # under the model itself
    c = tl.arange(0, CHUNKS)
    parts = stat + (row * chunks + c) * 2
    peaks = tl.load(parts, mask=c < chunks, other=float("-inf"))                # [CHUNKS]
    largest = tl.max(peaks, 0)
    total = tl.sum(tl.load(parts + 1, mask=c < chunks, other=0.0) * tl.exp(peaks - largest), 0)
    has_nan = tl.sum((peaks != peaks).to(tl.int32), 0) > 0

    # what may be drawn
    g = tl.arange(0, GROUPS)
    n_groups = tl.cdiv(V, GROUP)
    best = tl.load(peak + row * n_groups + g, mask=g < n_groups, other=float("-inf"))    # [GROUPS]
    picked = tl.max(best, 0)
    is_valid = (largest < float("inf")) & (picked > float("-inf")) & (has_nan == 0)
    tl.store(lse + row, tl.where(is_valid, largest + tl.log(total), float("nan")))

    if GREEDY:
        i = tl.argmax(best, 0) * GROUP + tl.arange(0, GROUP)
        x = _may_draw(_logits_of(logits, at, i, V), allowed, row, N, V, i)
        winner = tl.min(tl.where(x == picked, i, V - 1), 0)
    else:
        if BY_GROUP:
            group += row * LISTED
            _list_groups(best, g, top_k, V, group, LISTED)

        # the cut
        least = float("-inf")
        last = V
        if BY_K or BY_P:
            listed = _tokens(group if BY_GROUP else None, 0, LISTED, GROUP, SIZE)
            score = _may_draw(_logits_of(logits, at, listed, V), allowed, row, N, V, listed)
            score = (score - picked) / temperature                              # [SIZE]
            if BY_K:
                least, last = _top_k(score, listed, top_k, V)
                kept = (score > least) | ((score == least) & (listed <= last))
                score = tl.where(kept, score, float("-inf"))
            if BY_P:
                lowest, last_of_it = _top_p(score, listed, top_p, V)
                last = tl.where(lowest > least, last_of_it, tl.minimum(last, last_of_it))
                least = lowest
        cut += row * CUT
        tl.store(cut, picked)
        tl.store(cut + 1, least)
        tl.store(cut + 2, last.to(tl.float32))
        tl.debug_barrier()

        # the draw
        total = 0.0
        fastest = -1.0
        winner = 0
        for start in range(0, V if not BY_GROUP else 1, TILE):
            i = _tokens(group if BY_GROUP else None, start, LISTED, GROUP, TILE)
            x = _may_draw(_logits_of(logits, at, i, V), allowed, row, N, V, i)
            weight = _weight(x, i, cut, temperature)                            # [TILE]
            total += tl.sum(weight, 0)
            fastest, winner = _race(weight, i, tl.load(key) + key_offset, row * (GROUPS * GROUP), fastest, winner)
        tl.store(cut + 3, total)
    tl.store(token + row, winner.to(tl.int64))

# One program = one sequence.
@jit
def _verify_kernel(
    logits,        # (B, T, V), of the model
    first,         # (B,) the token of each sequence whose logits its first draft is compared with
    allowed,       # (B, V) bool, what a first row may draw, or None
    lse,           # (B, K + 1), of these rows
    cut,           # (B, K + 1, 4), of these rows; not read if greedy
    group,         # (B, K + 1, LISTED), of these rows; not without BY_GROUP
    token,         # (B, K + 1) int64, drawn from them
    drafts,        # (B, K) int64
    draft_logits,  # (B, K, V); not read if greedy
    draft_cut,     # (B, K, 4); not read if greedy
    n_drafts,      # (B,) int64, how many count
    key,           # (1,)
    n_accepted,    # (B,) int64, written
    drawn,         # (B, K + 1) int64, written: the drafts that hold, then one token, then anything
    logprob,       # (B, K + 1) fp32, written: of these, under the model itself
    T,
    V,
    key_offset,    # added to the key; the next one too
    temperature,
    K: constexpr,
    GREEDY: constexpr,
    BY_GROUP: constexpr,
    GROUP: constexpr,
    GROUPS: constexpr,
    LISTED: constexpr,
    SIZE: constexpr,
    TILE: constexpr,
):
    b = tl.program_id(0)
    count = tl.load(n_drafts + b)
    start = tl.load(first + b).to(tl.int32)
    draws = tl.load(key) + key_offset
    rows = b * (K + 1)

    # a draft holds with min(1, p / q); greedy, where it is the model's choice
    held = 0
    for k in tl.static_range(K):
        d = tl.load(drafts + b * K + k)
        if GREEDY:
            holds = d == tl.load(token + rows + k)
        else:
            at = (b * T + tl.minimum(start + k, T - 1)).to(tl.int64)
            mine = (b * K + k).to(tl.int64)
            its_cut = cut + (rows + k) * CUT
            logit = _may_draw(_logits_of(logits, at, d, V), allowed, rows + k, K + 1, V, d)
            p = _weight(logit, d, its_cut, temperature) / tl.load(its_cut + 3)
            q = _weight(tl.load(draft_logits + mine * V + d).to(tl.float32), d, draft_cut + mine * CUT, temperature)
            luck = tl.rand(draws, b * K + k)
            holds = luck * q < p * tl.load(draft_cut + mine * CUT + 3)
        held += ((k < count) & holds & (held == k)).to(tl.int32)
    tl.store(n_accepted + b, held.to(tl.int64))
    chosen = tl.load(token + rows + held)

    # in place of the first that fails comes a draw from what p has more than q
    if not GREEDY and K > 0:
        if held < count:
            row = (b * T + tl.minimum(start + held, T - 1)).to(tl.int64)
            failed = (b * K + held).to(tl.int64)
            row_p = rows + held
            cut += row_p * CUT
            draft_cut += failed * CUT
            fastest = -1.0
            winner = 0
            for first_token in range(0, V if not BY_GROUP else 1, TILE):
                i = _tokens(group + row_p * LISTED if BY_GROUP else None, first_token, LISTED, GROUP, TILE)
                x = _may_draw(_logits_of(logits, row, i, V), allowed, row_p, K + 1, V, i)               # [TILE]
                share_p = _weight(x, i, cut, temperature) / tl.load(cut + 3)
                share_q = _weight(_logits_of(draft_logits, failed, i, V), i, draft_cut, temperature)
                more = share_p - share_q / tl.load(draft_cut + 3)
                fastest, winner = _race(more, i, draws + 1, b * (GROUPS * GROUP), fastest, winner)
            if fastest > 0:            # p equals q but for rounding: then a draft fails hardly ever
                chosen = winner.to(tl.int64)

    # what was drawn, and how likely it was
    for k in tl.static_range(K + 1):
        this = chosen
        if k < K:
            this = tl.where(k < held, tl.load(drafts + b * K + k), chosen)
        at = (b * T + tl.minimum(start + k, T - 1)).to(tl.int64)
        score = tl.load(logits + at * V + this).to(tl.float32) - tl.load(lse + rows + k)
        tl.store(drawn + rows + k, this)
        tl.store(logprob + rows + k, score)

@dataclasses.dataclass
class Drawn:
    """What draw_rows found in rows of logits (B, T, V)."""
    token: torch.Tensor                # (B, n) int64
    lse: torch.Tensor                  # (B, n) the row's log-sum-exp, NaN where nothing can be drawn
    cut: torch.Tensor                  # (B, n, 4)
    group: torch.Tensor                # (B, n, LISTED) int32, of the k largest logits

def row_sizes(V, sampling):
    """Constants of the kernels for rows of V logits."""
    top_k = min(sampling.top_k or V, V)
    by_group = top_k <= MOST_GROUPS and top_k < V
    listed = triton.next_power_of_2(top_k) if by_group else 1
    size = listed * GROUP if by_group else max(GROUP, triton.next_power_of_2(V))
    return dict(
        BY_GROUP=by_group,
        GROUP=GROUP,
        GROUPS=triton.next_power_of_2(triton.cdiv(V, GROUP)),
        LISTED=listed,
        SIZE=size,
        TILE=size if by_group else min(size, 4096),
        num_warps=16 if size > 8192 else 8)

def draw_rows(logits, sampling, key, key_offset, n=1, first=None, allowed=None):
    """Cut rows of logits as truncate_logits does, and draw a token of each.

    logits      (B, T, V)
    key         (1,) int64 of the random numbers
    key_offset  from FIRST_OFFSET on, of this launch
    n           rows of a sequence
    first       (B,) the token of each sequence whose logits are its first row, or None: 0; past T - 1 the last one's
    allowed     (B, V) bool, what a first row may draw, or None
    -> Drawn
    """
    B, T, V = logits.shape
    device = logits.device
    chunks = triton.cdiv(V, CHUNK)
    sizes = row_sizes(V, sampling)
    if first is not None:
        first = first.contiguous()
    peak = torch.empty(B * n, triton.cdiv(V, GROUP), device=device)
    stat = torch.empty(B * n, chunks, 2, device=device)
    found = Drawn(
        token=torch.empty(B, n, dtype=torch.int64, device=device),
        lse=torch.empty(B, n, device=device),
        cut=torch.empty(B, n, int(CUT), device=device),
        group=torch.empty(B, n, sizes["LISTED"], dtype=torch.int32, device=device))
    _peaks_kernel[chunks, B * n](
        logits=logits, first=first, allowed=allowed, peak=peak, stat=stat,
        T=T, V=V, N=n, GROUP=GROUP, CHUNK=CHUNK, num_warps=4)

    top_k = min(sampling.top_k or V, V)
    _draw_kernel[B * n,](
        logits=logits, first=first, allowed=allowed, key=key, peak=peak, stat=stat,
        token=found.token, lse=found.lse, cut=found.cut, group=found.group,
        T=T, V=V, N=n, chunks=chunks,
        temperature=max(sampling.temperature, torch.finfo(torch.float32).tiny),
        top_p=float(sampling.top_p),
        top_k=top_k,
        GREEDY=sampling.temperature == 0,
        BY_K=top_k < V,
        BY_P=sampling.top_p < 1,
        key_offset=key_offset,
        CHUNKS=triton.next_power_of_2(chunks),
        **sizes)
    return found

def verify_rows(logits, first, rows, drafts, drafted, n_drafts, sampling, key, key_offset, allowed=None):
    """`verify` of rows that draw_rows has cut and drawn from.

    logits, first, allowed  of the model: as given to draw_rows
    rows                    its result, for n = K + 1
    drafts                  (B, K) int64
    drafted                 logits (B, K, V) and cuts (B, K, 4) that they were drawn from; None at temperature 0, and
                            for K = 0
    n_drafts                (B,) int64
    key, key_offset         as in draw_rows; key_offset + 1 is used too
    -> n_accepted (B,), drawn (B, K + 1), logprobs (B, K + 1): see Decoder.step
    """
    B, T, V = logits.shape
    n_accepted = torch.empty_like(rows.token[:, 0])
    drawn = torch.empty_like(rows.token)
    logprob = torch.empty_like(rows.lse)
    draft_logits, draft_cut = drafted or (None, None)
    _verify_kernel[B,](
        logits=logits, first=first.contiguous(), allowed=allowed, lse=rows.lse, cut=rows.cut, group=rows.group,
        token=rows.token, drafts=drafts.contiguous(), draft_logits=draft_logits, draft_cut=draft_cut,
        n_drafts=n_drafts.contiguous(), key=key,
        n_accepted=n_accepted, drawn=drawn, logprob=logprob,
        T=T, V=V,
        temperature=max(sampling.temperature, torch.finfo(torch.float32).tiny),
        K=drafts.size(1),
        GREEDY=sampling.temperature == 0,
        key_offset=key_offset,
        **row_sizes(V, sampling))
    return n_accepted, drawn, logprob

# ---- generation: prefix cache --------------------------------------------------------------------
# Contexts that begin alike have the same keys, values and index keys there, for a causal model never looks ahead. What
# a row has computed is kept by blocks of tokens, in a trie whose edges are the blocks themselves: what is found has
# been compared token by token, no hash decides. All lanes of a block come and go together.
# What MTP module k wrote at a slot depends on the k-th next token, too. A row that goes on from a path of blocks
# therefore lets the modules read the last slots again: see MiniMax.draft.

def row_lanes(cache, row):
    """What a KVCache holds of a row: name -> (layers, slots, ...)."""
    lanes = dict(k=cache.k[:, row], v=cache.v[:, row], ki=cache.ki[:, row])
    if cache.hidden is not None:
        lanes["hidden"] = cache.hidden[row:row + 1]
    return lanes

@dataclasses.dataclass(eq=False)
class Block:
    """A block of tokens behind those of its parents, and what a KVCache's lanes hold of it."""
    tokens: tuple
    parent: "Block"
    lanes: dict = dataclasses.field(default_factory=dict)     # name -> (layers, L, ...)
    n_read: int = 0                    # MTP modules that have read it, too
    following: tuple = ()              # the tokens behind it that they have read with its last ones
    children: dict = dataclasses.field(default_factory=dict)  # by their tokens
    users: int = 0                     # rows that have it in hand: it stays
    used_at: int = 0                   # on the cache's clock
    is_listed: bool = False            # among the cache's leaves

    @property
    def bytes(self):
        return sum(lane.numel() * lane.element_size() for lane in self.lanes.values())

class PrefixCache:
    """A trie over blocks of tokens. Its bytes are bounded: unused leaves go, those first that were not used for longest
    (the rule of vLLM and SGLang: arXiv 2312.07104).

    max_bytes  of all lanes together
    L          tokens of a block: a multiple of the key block's where layers are sparse; larger ones are fewer to walk
    One for each model: after a change of weights make another one.
    """

    def __init__(self, max_bytes, L=None):
        self.max_bytes = max_bytes
        self.L = L
        self.bytes = 0
        self.root = Block((), None)
        self.clock = 0                 # uses so far
        self.leaves = []               # a heap: (used_at, number, block), each an unused leaf when it was listed

    def match(self, tokens, cache):
        """The longest path of blocks that tokens begin with, not beyond the last token but one: something must be
        computed, for the last one's logits. Its blocks stay until `release`.

        cache  KVCache, all of whose lanes must be there
        -> [Block, ...]
        """
        L = self.L or cache.L
        names = row_lanes(cache, 0).keys()
        path = []
        block = self.root
        for start in range(0, len(tokens) - L, L):
            block = block.children.get(tuple(tokens[start:start + L]))
            if block is None or not names <= block.lanes.keys():
                break
            path.append(block)
        self.hold(path)
        return path

    def hold(self, path):
        """A user more of each block."""
        self.clock += 1
        for block in path:
            block.users += 1
            block.used_at = self.clock

    def release(self, path):
        """A user less of each block."""
        for block in path:
            block.users -= 1
            self.list_leaf(block)

    def restore(self, path, cache, row, n_modules=0):
        """Write a path into a row of a KVCache -> how many of its slots the first n_modules MTP modules have read."""
        if not path:
            return 0
        L = self.L or cache.L
        n_slots = len(path) * L
        for name, lane in row_lanes(cache, row).items():
            lane[:, :n_slots] = torch.cat([block.lanes[name] for block in path], 1)
        if cache.ids is not None:
            tokens = [token for block in path for token in block.tokens]
            cache.ids[row, :n_slots] = torch.tensor(tokens, device=cache.ids.device)
        cache.set_length(row, n_slots)

        # the modules read the slots before the path's end again, but not those before a fork within it
        n_read = 0
        for block, behind in itertools.zip_longest(path, path[1:]):
            is_this_path = behind is None or behind.tokens[:n_modules] == block.following[:n_modules]
            if block.n_read < n_modules or not is_this_path:
                break
            n_read += L
        return n_read

    def insert(self, tokens, cache, row, n_read=0, n_modules=0):
        """Keep the whole blocks of what a row of a KVCache holds, as far as there is room.

        tokens     of the row, from slot 0 on
        n_read     slots that MTP modules have read, with the tokens behind them
        n_modules  these modules: the first so many
        """
        L = self.L or cache.L
        lanes = row_lanes(cache, row)
        path = []
        block = self.root
        try:
            for end in range(L, len(tokens) + 1, L):
                slots = slice(end - L, end)
                key = tuple(tokens[slots])
                following = tuple(tokens[end:end + n_modules])
                child = block.children.get(key, Block(key, block))
                path.append(child)
                self.hold([child])     # before others go, to make room
                is_new = not lanes.keys() <= child.lanes.keys()
                knows_more = n_modules > child.n_read or following != child.following[:n_modules]
                if is_new or (end <= n_read and knows_more):
                    if not self.fill(child, {name: lane[:, slots] for name, lane in lanes.items()}):
                        break
                    child.n_read = n_modules if end <= n_read else 0
                    child.following = following
                block.children[key] = child
                block = child
        finally:
            self.release(path)

    def fill(self, block, lanes):
        """Copy lanes into a block -> whether there was room, below the bound and in memory."""
        more = sum(lane.numel() * lane.element_size() for lane in lanes.values()) - block.bytes
        if not self.make_room(more):
            return False
        try:
            block.lanes = {name: lane.clone() for name, lane in lanes.items()}
        except torch.OutOfMemoryError:
            return False
        self.bytes += more
        return True

    def make_room(self, more):
        """Let unused leaves go until so many bytes more fit -> whether they do."""
        while self.bytes + more > self.max_bytes and self.leaves:
            used_at, _, block = heappop(self.leaves)
            block.is_listed = False
            if used_at < block.used_at:
                self.list_leaf(block)  # used since, and perhaps in use, or no leaf any more
            else:
                del block.parent.children[block.tokens]
                self.bytes -= block.bytes
                self.list_leaf(block.parent)
        return self.bytes + more <= self.max_bytes

    def list_leaf(self, block):
        """List a block that may go, if it is one."""
        may_go = block.lanes and not block.users and not block.children  # the root has no lanes
        if may_go and not block.is_listed:
            block.is_listed = True
            self.clock += 1
            heappush(self.leaves, (block.used_at, self.clock, block))

# ---- the generation loop -------------------------------------------------------------------------
# One loop generates for all: each row of the batch is a player, a coroutine that says which tokens to feed, and is sent
# a token sampled after them. sample.py's players feed what was drawn; rl.py's play an agent, whose tools' answers are
# fed while other rows sample. What a player's next context shares with its last one stays in the KV cache.
# With `speculate` a step reads K drafts behind a row's token. Those that hold are sent to the player one by one: where
# it feeds something else, the rest is forgotten.

@dataclasses.dataclass
class Sampling:
    """How tokens are drawn: see truncate_logits. Temperature 0 is greedy."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = None
    generator: torch.Generator = None

def check_drafts(model, speculate, name):
    """ValueError if the model cannot draft so many tokens. name: of the flag or argument that asks for them."""
    if not speculate:
        return
    if not model.mtp:
        raise ValueError(f"{name} {speculate}: the model has no MTP module to draft with")
    if model.cfg.is_recurrent:
        kinds = " ".join(dict.fromkeys(model.cfg.attn_types))
        raise ValueError(f"{name} {speculate}: a draft that fails is taken back, and this model ({kinds}) overwrites "
                         "its cache as tokens come, which cannot be cropped: leave drafts out")

@dataclasses.dataclass
class Trace:
    """What `generate` keeps of its first row, to be looked at afterwards."""
    record: object = None              # as of `play`
    notes: list = dataclasses.field(default_factory=list)    # of each token that was fed, its prompt's too
    lengths: list = dataclasses.field(default_factory=list)  # after each forward: how many tokens were drawn so far

@dataclasses.dataclass
class Player:
    """A row of the loop: a coroutine, and what it has in the cache. `play` says what they tell each other."""
    coroutine: object
    feed: list                         # tokens to feed next; empty: it is over
    tokens: list = dataclasses.field(default_factory=list)  # those in its cache
    notes: list = dataclasses.field(default_factory=list)   # what was recorded of each of them
    path: list = dataclasses.field(default_factory=list)    # blocks of a PrefixCache that it has in hand
    n_cached: int = 0                  # tokens that came from there
    has_drawn: bool = False
    allowed: torch.Tensor = None       # (V,) bool: what its first new token may be; None: any

    @property
    def length(self):
        return len(self.tokens)

    def take(self, n, notes):
        """The next n tokens of `feed` are in the cache now, and so noted."""
        self.tokens += self.feed[:n]
        self.feed = self.feed[n:]
        self.notes += notes

    def hear(self, n_fed, drawn, logprobs, notes, best=None):
        """A step has fed n_fed tokens of `feed`, and drafts behind them. `drawn` are the drafts that held, which are in
        the cache, then one token that is not. After the last token of `feed` the coroutine hears what was drawn, token
        by token, and says what it keeps of the cache, and what comes next. notes: of all tokens fed, or []. best: of
        each token drawn, the likeliest tokens in its place, or None."""
        self.take(n_fed, notes[:n_fed])
        if self.feed:
            return
        self.has_drawn = True
        for n, (token, logprob) in enumerate(zip(drawn, logprobs), n_fed):
            if n > n_fed:              # the token before was a draft: it is in the cache
                self.tokens.append(drawn[n - n_fed - 1])
                self.notes = self.notes + notes[n - 1:n]  # a new list: the coroutine may have kept the old one
            self.feed = []
            news = token, logprob, self.notes
            if best is not None:
                news = *news, best[n - n_fed]
            with contextlib.suppress(StopIteration):  # it is over, with nothing to feed
                kept, self.feed = self.coroutine.send(news)
            if not self.feed:
                return
            if kept != self.length or self.feed != [token]:
                break
        del self.tokens[kept:]
        self.notes = self.notes[:kept]

class Decoder:
    """A model, the cache of some rows, and the step that reads tokens of each row and draws the next.

    On a GPU a step of few tokens is one CUDA graph of the kernels of model.DecodeWeights: nothing in it depends on the
    host, and its shapes are static: rows that have ended stay in the batch. While the host reads what a step
    has drawn, the next one runs already, on the tokens drawn: where a row is fed something else, it is forgotten.
    """

    def __init__(self, model, rows, capacity, sampling, speculate=0, index_warmup=False, record=None, kernels=None,
                 n_best=0):
        """capacity: tokens of a row, drafts not included; record, n_best: as of `play`; kernels: whether steps are as
        on a GPU, default: on a GPU in 16 bits, with few drafts, where weights fit twice, and no layer is recurrent.
        ValueError for drafts by a model that cannot draft."""
        check_drafts(model, speculate, "speculate")
        self.model = model
        self.sampling = sampling
        self.speculate = speculate
        self.index_warmup = index_warmup
        self.record = record
        self.n_modules = min(speculate, len(model.mtp))  # that draft
        self.n_best = n_best
        self.n_stale = 0               # slots at a row's end that the MTP modules have not read
        self.on_gpu = model.embed.weight.is_cuda
        slots = capacity + 2 * (speculate + 1)  # drafts, and those of a step that is forgotten
        if speculate:
            slots += len(model.mtp)
        self.cache = KVCache(model.cfg, rows, slots, model.embed.weight.device, model.dtype, history=speculate > 0)
        self.weights = None
        widest = 1 + speculate + (len(model.mtp) if speculate else 0)
        if kernels is None:
            kernels = self.on_gpu and triton is not None and model.dtype.itemsize == 2 and widest <= NEW
            kernels = kernels and not model.cfg.is_recurrent and not is_offloaded(model) and has_room_for_copy(model)
        if kernels:
            self.weights = DecodeWeights(model, self.cache.capacity, capacity)

        # steps as graphs, by their shapes; what they work on; the one that runs ahead
        self.graphs = {}
        self.length = None             # of the cache; made by the first step, when there are all rows
        self.before = None             # the same, before the last step
        self.last = None               # tokens drawn last
        self.ahead = None

        # random numbers of the kernels
        self.key = None
        self.n_draws = 0               # drafts that a step has drawn
        if self.weights is not None and self.on_gpu:
            generator = sampling.generator
            home = None if generator is None else generator.device
            self.key = torch.randint(2 ** 62, (1,), generator=generator, device=home).to(model.embed.weight.device)

    def read(self, idx, n_logits):
        """idx (B, T) -> logits, aux; the cache holds them."""
        if self.weights is None or n_logits == 0:
            logits, _, aux = self.model(idx, cache=self.cache, n_logits=n_logits, index_warmup=self.index_warmup)
        else:
            routes = self.record is not None
            logits, hidden, aux = self.weights.step(idx, self.cache, self.index_warmup, routes)
            self.cache.remember(idx, hidden)
            self.cache.used += idx.size(1)
        self.n_stale += idx.size(1)
        return logits, aux

    def draw_draft(self, logits):
        """Logits (B, V) -> token (B,), and what it was drawn from: its distribution (B, V), or None where greedy; by
        kernels its logits and cut."""
        sampling = self.sampling
        if self.key is not None:
            self.n_draws += 1
            drawn = draw_rows(logits[:, None], sampling, self.key, FIRST_OFFSET + self.n_draws)
            return drawn.token[:, 0], (logits, drawn.cut[:, 0])
        if sampling.temperature == 0:
            return logits.argmax(-1), None
        q = truncate_logits(logits, sampling.temperature, sampling.top_p, sampling.top_k).softmax(-1)
        return torch.multinomial(q, 1, generator=sampling.generator)[:, 0], q

    def read_prompt(self, cache, token, n_stale):
        """Let the modules read the last n_stale slots, which are new to them; what they guess after token (B,) is of no
        use."""
        def best(logits):
            return logits.argmax(-1), None
        self.model.draft(cache, token, self.n_modules, n_stale, best, self.index_warmup)

    def step(self, fed, n_fed, n_drafts, allowed=None, may_run_ahead=False):
        """Feed, draft, verify, draw.

        fed       (B, T): a row's first n_fed (B,) tokens count
        n_drafts  (B,): 0, or T - 1 in rows that feed one token and have slots in the cache; None: 0 in every row
        allowed   (B, V) bool: what the first token drawn may be; None: any
        may_run_ahead  whether rows are likely to be fed next what is drawn now
        -> drawn (B, K + 1): the drafts that hold, then one token; logprobs (B, K + 1) of them, under the model itself;
        n_accepted (B,): drafts that hold; aux, with `best` of `play`. K is T - 1 with drafts, 0 without.
        """
        T = fed.size(1)
        device = self.cache.length.device
        if self.weights is None:
            inputs = [None if x is None else x.to(device) for x in (fed, n_fed, n_drafts, allowed)]
            return self.compute(*inputs)

        if self.length is None:
            self.length = self.cache.length.clone()
            self.before = self.length.clone()
            self.last = torch.zeros_like(self.length, dtype=torch.int64)
        if n_drafts is not None and self.n_stale > T:  # a prompt: the kernels are for few tokens
            self.forget()
            self.length.clamp_(max=self.cache.used)  # rows that have ended may have gone on a little
            self.read_prompt(self.cache, fed[:, 0].to(device), min(self.n_stale, self.cache.used))
        key = T, n_drafts is None
        if key not in self.graphs:
            self.forget()
            self.graphs[key] = StepGraph(self, T, n_drafts is not None)
        graph = self.graphs[key]

        # this step, which may have run ahead, and the next one
        inputs = graph.pack(fed, n_fed, n_drafts)
        ahead = self.ahead
        if ahead is not None and ahead.graph is graph and self.cache.length is self.length and ahead.fits(fed, n_fed):
            turn = ahead.turn
            self.ahead = None
        else:
            self.forget()
            turn = graph.launch(inputs, allowed)
        may_run_ahead = may_run_ahead and allowed is None and self.record is None and not self.n_best
        if may_run_ahead:
            next_turn = graph.launch(graph.pack_ahead(inputs))

        drawn, logprobs, n_accepted = graph.result(turn)
        n_accepted = torch.where(n_fed > 0, n_accepted, 0)
        if may_run_ahead:
            self.ahead = Ahead(graph, next_turn, drawn.gather(1, n_accepted[:, None])[:, 0], n_fed)
        self.cache.used += T
        self.n_stale = T if n_drafts is not None else self.n_stale + T
        return drawn, logprobs, n_accepted, graph.aux

    def renew(self):
        """The model's weights have changed: the next step reads them. Keys and values in the cache stay as the old ones
        computed them; what runs ahead is of the old ones, too, and is forgotten."""
        if self.weights is None:
            return
        if self.length is not None:
            self.forget()
        self.weights.renew(self.model)

    def forget(self):
        """Undo the step that runs ahead, if there is one. The cache's length is self.length then."""
        if self.wait():
            self.length.copy_(self.before)
        if self.cache.length is not self.length:  # a crop made a new tensor
            self.length.copy_(self.cache.length)
            self.cache.length = self.length

    def wait(self):
        """Wait for the step that runs ahead, whose result nobody wants -> whether there was one."""
        ahead = self.ahead
        self.ahead = None
        if ahead is not None:
            ahead.graph.wait(ahead.turn)
        return ahead is not None

    def close(self):
        """Free the graphs, which know their decoder: no garbage is left for Python to find some time later."""
        self.wait()
        for graph in self.graphs.values():
            graph.replay = None
        self.graphs = {}

    def compute(self, fed, n_fed, n_drafts, allowed):
        """`step`, with no word to the host where it runs on a GPU."""
        cache = self.cache
        T = fed.size(1)
        drafts = fed[:, :0]
        drawn_from = []                # each draft's distribution
        if n_drafts is None:
            n_drafts = torch.zeros_like(n_fed)
        else:
            n_stale = self.n_stale     # of a graph: one number for all of its steps
            if self.weights is None:   # what rows have dropped again may have been more
                n_stale = min(n_stale, cache.used)
            drafts, drawn_from = self.model.draft(
                cache, fed[:, 0], T - 1, n_stale, self.draw_draft, self.index_warmup, self.weights)
            self.n_stale = 0
            behind = torch.where(n_drafts[:, None] > 0, drafts, fed[:, 1:])
            fed = torch.cat([fed[:, :1], behind], 1)

        # logits of the last token that is fed, and of each draft
        start = cache.length
        logits, aux = self.read(fed, T)
        first = (n_fed - 1).clamp(min=0)
        if self.key is None:
            n_accepted, drawn, logprobs = self.draw(logits, first, drafts, drawn_from, n_drafts, allowed)
        else:
            n_accepted, drawn, logprobs = self.draw_by_kernels(logits, first, drafts, drawn_from, n_drafts, allowed)
        if self.n_best:
            aux = dict(aux, best=self.best_tokens(rows_behind(logits, first, drafts.size(1))))
        cache.length = (start + n_fed + n_accepted).int()
        return drawn, logprobs, n_accepted, aux

    def draw(self, logits, first, drafts, drawn_from, n_drafts, allowed):
        """logits (B, T, V), those of row b's draft k at first[b] + k -> n_accepted, drawn, logprobs: see `step`."""
        sampling = self.sampling
        K = drafts.size(1)
        logits = widen(rows_behind(logits, first, K))                                                 # (B, K + 1, V)
        logprobs = logits.log_softmax(-1)
        if allowed is not None:
            first_row = logits[:, :1].masked_fill(~allowed[:, None], -math.inf)
            logits = torch.cat([first_row, logits[:, 1:]], 1)

        draft_probs = None
        if K and sampling.temperature:
            draft_probs = torch.stack(drawn_from, 1)
        n_accepted, token = verify(logits, drafts, draft_probs, n_drafts, sampling.temperature, sampling.top_p,
                                   sampling.top_k, sampling.generator)
        drawn = F.pad(drafts, (0, 1)).scatter(1, n_accepted[:, None], token[:, None])
        return n_accepted, drawn, logprobs.gather(2, drawn[..., None])[..., 0]

    def best_tokens(self, logits):
        """Logits (B, K + 1, V) -> (B, K + 1, n_best, 2) fp64: the likeliest tokens and their logprobs, nothing cut."""
        logprobs, tokens = widen(logits).log_softmax(-1).topk(self.n_best)
        return torch.stack([tokens.double(), logprobs.double()], -1)

    def draw_by_kernels(self, logits, first, drafts, drawn_from, n_drafts, allowed):
        """As `draw`. Nothing is refused: where nothing can be drawn logprobs are NaN."""
        sampling = self.sampling
        K = drafts.size(1)
        rows = draw_rows(logits, sampling, self.key, FIRST_OFFSET, K + 1, first, allowed)
        drafted = None
        if K and sampling.temperature:
            drafted = [torch.stack(parts, 1) for parts in zip(*drawn_from)]
        key_offset = FIRST_OFFSET + self.n_draws + 1
        found = verify_rows(logits, first, rows, drafts, drafted, n_drafts, sampling, self.key, key_offset, allowed)
        self.key += KEYS_A_STEP
        self.n_draws = 0
        return found

def rows_behind(logits, first, K):
    """logits (B, T, V) -> (B, K + 1, V): those at first[b] and at the K places behind it, past T - 1 the last one's."""
    T = logits.size(1)
    if T == 1:
        return logits
    place = first[:, None] + torch.arange(K + 1, device=first.device)
    place = place.clamp(max=T - 1)[..., None]
    return logits.gather(1, place.expand(-1, -1, logits.size(2)))

@dataclasses.dataclass
class Ahead:
    """A step that was launched before the host knew what the one before has drawn."""
    graph: "StepGraph"
    turn: int                          # of the graph's two buffers
    tokens: torch.Tensor               # (B,) what it was fed, by row
    n_fed: torch.Tensor                # (B,) 1, or 0 in rows that had ended

    def fits(self, fed, n_fed):
        """Whether rows are now to be fed that; what it was fed in a row that has ended meanwhile does not matter."""
        same = (n_fed == 1) & (self.n_fed == 1) & (fed[:, 0] == self.tokens)
        return bool((same | (n_fed == 0)).all())

class StepGraph:
    """A Decoder's step as a CUDA graph (on a CPU as a function): its inputs and outputs lie where they lay when it was
    captured. The host's copies of them are two of each, in turn. A step that may not draw every token is no graph: a
    text has one, its first."""

    def __init__(self, decoder, T, has_drafts):
        rows = len(decoder.length)
        device = decoder.length.device
        n_drawn = T if has_drafts else 1
        self.decoder = decoder
        self.T = T
        self.has_drafts = has_drafts
        self.inputs = torch.zeros(rows, T + 3, dtype=torch.int64, device=device)  # see `pack`
        # n_accepted, drawn, logprobs
        self.outputs = torch.zeros(rows, 1 + 2 * n_drawn, dtype=torch.int64, device=device)
        self.aux = {}

        # on the host
        self.turn = 0
        self.inputs_on_host = [on_host(self.inputs) for _ in range(2)]
        self.outputs_on_host = [on_host(self.outputs) for _ in range(2)]
        self.done = [torch.cuda.Event() if self.inputs.is_cuda else None for _ in range(2)]

        # capture, which computes on zeros: afterwards lengths and tokens are as before
        state = decoder.length.clone(), decoder.last.clone()
        self.replay = captured(self.compute, device)
        decoder.length.copy_(state[0])
        decoder.last.copy_(state[1])

    def compute(self, allowed=None):
        """`Decoder.compute` of the inputs -> aux."""
        decoder = self.decoder
        cache = decoder.cache
        fed, n_fed, n_drafts, follows = self.inputs.split([self.T, 1, 1, 1], 1)
        first = torch.where(follows > 0, decoder.last[:, None], fed[:, :1])
        fed = torch.cat([first, fed[:, 1:]], 1)
        n_drafts = n_drafts[:, 0] if self.has_drafts else None  # a column: its numbers do not lie side by side

        state = cache.used, decoder.n_stale
        decoder.before.copy_(decoder.length)
        cache.length = decoder.length
        decoder.n_stale = self.T       # the window of every step with drafts, of one shape
        drawn, logprobs, n_accepted, aux = decoder.compute(fed, n_fed[:, 0], n_drafts, allowed)
        decoder.length.copy_(cache.length)
        cache.length = decoder.length
        cache.used, decoder.n_stale = state

        decoder.last.copy_(drawn.gather(1, n_accepted[:, None])[:, 0])
        bits = logprobs.double().view(torch.int64)
        self.outputs.copy_(torch.cat([n_accepted[:, None], drawn, bits], 1))
        return aux

    def pack(self, fed, n_fed, n_drafts):
        """-> (B, T + 3) of tokens to feed, how many of them count, drafts, and whether the token drawn last comes in
        place of the first."""
        none = torch.zeros_like(n_fed)
        if n_drafts is None:
            n_drafts = none
        return torch.cat([fed, n_fed[:, None], n_drafts[:, None], none[:, None]], 1)

    def pack_ahead(self, inputs):
        """The step after that: a row that is fed one token is fed the one drawn last."""
        ahead = inputs.clone()
        n_fed = inputs[:, -3]
        if self.has_drafts:
            ahead[:, -2] = n_fed * (self.T - 1)
        ahead[:, -1] = n_fed
        return ahead

    def wait(self, turn):
        if self.done[turn] is not None:
            self.done[turn].synchronize()

    def launch(self, inputs, allowed=None):
        """-> turn, for `result`."""
        turn = self.turn
        self.turn = 1 - turn
        self.inputs_on_host[turn].copy_(inputs)
        self.inputs.copy_(self.inputs_on_host[turn], non_blocking=True)
        if allowed is None:
            self.aux = self.replay()
        else:
            self.aux = self.compute(allowed.to(self.inputs.device))
        self.outputs_on_host[turn].copy_(self.outputs, non_blocking=True)
        if self.done[turn] is not None:
            self.done[turn].record()
        return turn

    def result(self, turn):
        """Wait for what was launched -> drawn, logprobs, n_accepted, as of Decoder.step, on the host. ValueError where
        nothing could be drawn."""
        self.wait(turn)
        n_drawn = self.outputs.size(1) // 2
        n_accepted, drawn, bits = self.outputs_on_host[turn].clone().split([1, n_drawn, n_drawn], 1)
        logprobs = bits.contiguous().view(torch.float64)
        was_drawn = torch.arange(n_drawn) <= n_accepted
        if (logprobs.isnan() & was_drawn).any():
            raise ValueError("logits with NaN or +inf among them, or all -inf: nothing can be drawn from them")
        return drawn, logprobs, n_accepted[:, 0]

def is_offloaded(model):
    """Whether a model's layers are read from disk at each forward."""
    return isinstance(model.layers[0], StoredBlock)

def has_room_for_copy(model):
    """Whether DecodeWeights, about a second copy of a model's weights, fits the device: a warning if not."""
    device = model.embed.weight.device
    need = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize
    free = free_memory(device)
    if device.type == "cuda":          # what torch keeps for later tensors
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if need > 0.9 * free:
        warnings.warn(f"{need / 1e9:.1f} GB for a second copy of the weights do not fit: steps wait for the host")
    return need <= 0.9 * free

def on_host(x):
    """A copy of a tensor for the host to read and write while a GPU works."""
    return x.cpu().pin_memory() if x.is_cuda else x.clone()

@contextlib.contextmanager
def without_collection():
    """Python collects no garbage meanwhile. An older CUDA graph among it would be freed, and a capture allows no such
    call: it fails, wherever the collector happens to run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

def captured(compute, device):
    """A function of static inputs -> one that replays it as a CUDA graph, into the same results each time. The function
    computes twice before. On a CPU: the function itself."""
    if device.type != "cuda":
        return compute

    # on a stream of its own, as a capture wants
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        results = compute()

    def replay():
        graph.replay()
        return results
    return replay

def seat(players, allowed):
    """Hear what each player wants first -> a Player for each that wants something. allowed (players, V), or None."""
    rows = []
    for i, coroutine in enumerate(players):
        first = next(coroutine, None)  # None: over before it began
        if first:
            rows.append(Player(coroutine, feed=first[1], allowed=None if allowed is None else allowed[i]))
    return rows

@dataclasses.dataclass
class Turn:
    """What a step reads of each row."""
    fed: torch.Tensor                  # (B, T) tokens, of which
    n_fed: list                        # so many count
    may_draft: list                    # whether drafts come behind them
    n_drafts: torch.Tensor             # (B,) so many, or None: none in any row
    allowed: torch.Tensor              # (B, V) bool: what may be drawn first, or None: any
    is_drawing: bool                   # no row is inside a prompt or a tool's answer

def next_turn(rows, speculate):
    """The rows' next tokens, and drafts behind a single one -> Turn."""
    may_draft = [speculate > 0 and len(row.feed) == 1 and row.length > 0 for row in rows]
    T = min(1 + speculate, max(len(row.feed) for row in rows))
    n_drafts = None
    if any(may_draft):
        T = 1 + speculate
        n_drafts = torch.tensor([speculate if may else 0 for may in may_draft])
    feeds = [row.feed[:T] for row in rows]

    # a choice of tokens is for a row's first draw
    allowed = None
    if rows[0].allowed is not None and not all(row.has_drawn for row in rows):
        has_drawn = torch.tensor([row.has_drawn for row in rows])
        allowed = torch.stack([row.allowed for row in rows]) | has_drawn[:, None]
    return Turn(
        fed=torch.tensor([feed + [0] * (T - len(feed)) for feed in feeds]),
        n_fed=[len(feed) for feed in feeds],
        may_draft=may_draft,
        n_drafts=n_drafts,
        allowed=allowed,
        is_drawing=all(len(row.feed) <= 1 for row in rows))

@torch.no_grad()
def play(model, players, group=1, sampling=Sampling(), record=None, speculate=0, allowed=None, index_warmup=False,
         capacity=None, accepted=None, kernels=None, n_best=0, prefixes=None, cached=None):
    """Drive coroutines in step -> yields after each forward, and once before anything is drawn. From there on it may be
    sent True, which says that the model has other weights now.

    players    each yields how many tokens of its cache it keeps and the tokens to feed next; after the last of them it
               is sent a token sampled after it, its logprob at temperature 1, nothing cut, and the notes on every token
               in its cache. It ends by returning
    group      players lie side by side in groups of one first prompt, whose keys and values are computed once: the size
               of all groups, or a list of their sizes
    record     aux -> (B, T, r) array: r numbers to note for every token; None: notes are empty. A token from the prefix
               cache has the note None
    speculate  drafts behind a row's token
    allowed    (V,) bool, or (players, V): what a row's first new token may be; None: any
    index_warmup  as in MiniMax.forward
    capacity   tokens of a row, at most; None: the model's context
    accepted   a list: of each row and step with drafts, how many held is appended
    kernels    see Decoder
    n_best     a player is sent, beside a token, [[token, logprob]] of so many likeliest ones in its place; 0: no list
    prefixes   PrefixCache: what it has of the first prompts is not computed, and it keeps what rows compute
    cached     a list: of each row, how many tokens of its first prompt came from there is appended
    ValueError for drafts by a model that cannot draft, for a player that drops tokens, and for prefixes, where layers
    are recurrent, and for logits that nothing can be drawn from.
    """
    if prefixes is not None and model.cfg.is_recurrent:
        raise ValueError("prefixes: a recurrent layer's cache is of its last token alone, and has no prefix")
    model.eval()
    device = model.embed.weight.device
    if allowed is not None:
        allowed = allowed.cpu().expand(len(players), -1)
    rows = seat(players, allowed)
    if not rows:
        return

    sizes = [1] * len(rows)
    if len(rows) == len(players):      # none was over at once: groups are whole
        sizes = group if isinstance(group, list) else [group] * (len(rows) // group)
    capacity = capacity or model.cfg.max_seq_len
    decoder = Decoder(model, len(sizes), capacity, sampling, speculate, index_warmup, record, kernels, n_best)
    cache = decoder.cache
    has_begun = False
    try:
        yield from prefill(decoder, rows, sizes, prefixes)
        has_begun = True
        if cached is not None:
            cached += [row.n_cached for row in rows]
        if (yield):                    # before anything is drawn
            decoder.renew()
        while rows:
            turn = next_turn(rows, speculate)
            drawn, logprobs, n_accepted, aux = decoder.step(
                turn.fed, torch.tensor(turn.n_fed), turn.n_drafts, turn.allowed, turn.is_drawing)

            # each row hears of it
            notes = record(aux) if record else [[]] * len(rows)
            held = n_accepted.tolist()
            filled = [row.length + n + more for row, n, more in zip(rows, turn.n_fed, held)]
            best = aux["best"].tolist() if n_best else [None] * len(rows)
            news = zip(turn.n_fed, held, drawn.tolist(), logprobs.tolist(), notes, best)
            for row, (n, more, tokens, scores, note, likeliest) in zip(rows, news):
                row.hear(n, tokens[:more + 1], scores[:more + 1], list(note), likeliest)
            if accepted is not None:
                accepted += [more for more, may in zip(held, turn.may_draft) if may]

            # the cache follows: what was dropped of a context, and rows that are over
            kept = [row.length for row in rows]
            cache.used = max(filled)
            if kept != filled:
                cache.crop(torch.tensor(kept, dtype=torch.int32, device=device))
            if prefixes is not None:
                for i, row in enumerate(rows):
                    if turn.n_fed[i] and not row.feed:
                        keep_prefix(prefixes, decoder, row, i)
            alive = [i for i, row in enumerate(rows) if row.feed]
            if not alive or (len(alive) < len(rows) and not decoder.graphs):
                rows = [rows[i] for i in alive]
                cache.select(torch.tensor(alive, dtype=torch.int64, device=device))
            if (yield):
                decoder.renew()
    except GeneratorExit:              # nobody wants more: what is there may be of use
        decoder.wait()
        if prefixes is not None and has_begun:  # before, `prefill` keeps it
            for i, row in enumerate(rows):
                if row.feed:
                    keep_prefix(prefixes, decoder, row, i)
        raise
    finally:
        decoder.close()
        if prefixes is not None:
            for row in rows:
                prefixes.release(row.path)

def lockstep(*args, **options):
    """`play` to its end."""
    for _ in play(*args, **options):
        pass

PART = dict(cpu=2048, cuda=16384)      # tokens of prompts that one forward reads, to bound its memory: see prompt_part
ALONE = 32                             # tokens: what prompts have more than the shortest is fed to each row alone
TAIL = 128                             # tokens behind a row's cached prefix that are fed beside those of other rows

def prefill(decoder, rows, sizes, prefixes=None):
    """Feed each row its prompt but for the last token, whose logits are needed row by row. sizes: of the groups; the
    decoder's cache has a row for each. All rows of a group begin with its prompt, which is computed once, and whose
    keys and values are copied.

    Rows are fed side by side as far as the shortest prompt goes. What is left, if it is not little, is fed row by row;
    with a PrefixCache all is, so that a row finds what the rows before it have left there. But on a CPU, where a
    forward of few tokens costs nearly as much as one of many, tails behind what was found are fed in one, see
    feed_tails. Yields after each forward.
    """
    cache = decoder.cache
    group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
    leaders = [rows[group_of.index(group)] for group in range(len(sizes))]
    reader = PromptReader(decoder, sum(len(row.feed) - 1 for row in leaders))
    n_read = [0] * len(leaders)        # slots that the MTP modules have read
    if prefixes is None:
        shared = min(len(row.feed) for row in leaders) - 1
        n_slots = yield from reader.read(cache, leaders, shared)
        n_read = [n_slots] * len(leaders)

    with_tails = []                    # rows of which little is left
    is_plain = not decoder.on_gpu and not decoder.speculate and decoder.record is None
    for i, row in enumerate(leaders):
        if prefixes is not None:
            row.path = prefixes.match(row.feed, cache)
            n_read[i] = prefixes.restore(row.path, cache, i, decoder.n_modules)
            row.n_cached = len(row.path) * (prefixes.L or cache.L)
            row.take(row.n_cached, [] if decoder.record is None else [None] * row.n_cached)
            reader.progress.total -= row.n_cached
        left = len(row.feed) - 1
        if row.path and is_plain and left <= TAIL:  # one of which nothing was found may begin as others do
            with_tails.append(i)
            continue
        try:
            if prefixes is not None or left > ALONE:
                n_read[i] = yield from reader.read(cache.row(i, row.length), [row], left, n_read[i])
                cache.set_length(i, row.length)
        finally:                       # also of a prompt that nobody wants read to its end
            if prefixes is not None:
                known = n_read[i] - decoder.n_modules  # at the last slots the modules have read guesses
                prefixes.insert(row.tokens, cache, i, known, decoder.n_modules)
    if with_tails:
        yield from feed_tails(decoder, leaders, with_tails, prefixes, reader)
    decoder.n_stale = max(row.length - n for row, n in zip(leaders, n_read))

    # the others of each group
    if len(rows) > len(leaders):
        cache.select(torch.tensor(group_of))
    for row, group in zip(rows, group_of):
        leader = leaders[group]
        if row is not leader:
            row.n_cached = leader.n_cached
            row.take(leader.length, leader.notes)

def feed_tails(decoder, rows, with_tails, prefixes, reader):
    """What is left of some rows' prompts, behind prefixes that a cache had, in one forward: shorter tails are followed
    by pads, which the row then forgets. Where pads find no room each row is fed alone. Yields after each forward.

    rows        of the decoder's cache, one each
    with_tails  indices of these rows
    """
    cache = decoder.cache
    T = max(len(rows[i].feed) - 1 for i in with_tails)
    try:
        if max(row.length for row in rows) + T > cache.capacity or len(rows) * T > prompt_part(cache.length.device):
            for i in with_tails:
                row = rows[i]
                yield from reader.read(cache.row(i, row.length), [row], len(row.feed) - 1)
                cache.set_length(i, row.length)
        elif T:
            idx = torch.zeros(len(rows), T, dtype=torch.int64)
            for i in with_tails:
                tail = rows[i].feed[:-1]
                idx[i, :len(tail)] = torch.tensor(tail)
                rows[i].take(len(tail), [])
                reader.done += len(tail)
            decoder.model(idx, cache=cache, n_logits=0, index_warmup=decoder.index_warmup)
            cache.crop(torch.tensor([row.length for row in rows]))
            reader.progress.at(reader.done)
            yield
    finally:                           # also of prompts that nobody wants read to their end
        for i in with_tails:
            prefixes.insert(rows[i].tokens, cache, i)

def prompt_part(device):
    """How many tokens of prompts one forward reads on a device; others than these two are like a CPU."""
    return PART.get(device.type, PART["cpu"])

class PromptReader:
    """Feeds prompts in parts of bounded memory, and says how far it is where that takes long."""

    def __init__(self, decoder, total):
        """total: tokens of all prompts."""
        self.decoder = decoder
        self.progress = Progress("prefill", total, "tokens")
        self.done = 0                  # tokens

    def read(self, cache, rows, size, n_read=0):
        """Feed rows, which are those of the cache, the next `size` tokens of their prompts. Yields after each forward
        -> how many slots the MTP modules have read; n_read: had read before."""
        decoder = self.decoder
        device = cache.length.device
        part = max(1, prompt_part(device) // len(rows))
        while size:
            n = min(size, part)
            idx = torch.tensor([row.feed[:n] for row in rows], device=device)
            _, _, aux = decoder.model(idx, cache=cache, n_logits=0, index_warmup=decoder.index_warmup)
            notes = [[]] * len(rows)
            if decoder.record is not None:
                notes = decoder.record(aux)
            for row, noted in zip(rows, notes):
                row.take(n, list(noted))
            size -= n
            self.done += n * len(rows)
            self.progress.at(self.done)

            # the modules follow, part by part
            if decoder.speculate:
                following = torch.tensor([row.feed[0] for row in rows], device=device)
                decoder.read_prompt(cache, following, rows[0].length - n_read)
                n_read = rows[0].length
            yield
        return n_read

def keep_prefix(prefixes, decoder, row, i):
    """A row is over, or left: a PrefixCache keeps what it has computed."""
    n_read = row.length - decoder.n_stale - decoder.n_modules  # at the last slots they may have read guesses
    prefixes.insert(row.tokens, decoder.cache, i, n_read, decoder.n_modules)
    prefixes.release(row.path)
    row.path = []

def pack_routes(aux):
    """aux of a forward -> (B, T, r) int32, to be recorded: experts of every layer as they are, 0 or more, and the
    blocks of layers with MSA as -2 - block, so that both can be told apart in one array; -1, no block, stays -1."""
    parts = []
    if "experts" in aux:
        parts.append(aux["experts"].int())                                                      # (layers, B, T, A)
    if "block_idx" in aux:
        blocks = aux["block_idx"].flatten(3)
        parts.append(torch.where(blocks >= 0, -2 - blocks, -1))
    codes = torch.cat([part.permute(1, 2, 0, 3).flatten(2) for part in parts], -1)
    return codes.int().cpu().numpy()

def check_prompts(prompts, n_samples, cfg):
    """ValueError for no prompt, an empty one, or one that exceeds the context or the vocabulary."""
    if not prompts or n_samples < 1:
        raise ValueError(f"{len(prompts)} prompts, {n_samples} samples of each: at least one of both")
    for prompt in prompts:
        if not 1 <= len(prompt) <= cfg.max_seq_len:
            raise ValueError(f"a prompt of {len(prompt)} tokens: the model's context holds 1 to {cfg.max_seq_len}")
    for token in set().union(*prompts):
        if not 0 <= token < cfg.vocab_size:  # a GPU would stop at an assertion, and with it the process
            raise ValueError(f"token {token} in a prompt: the model's vocabulary is 0 to {cfg.vocab_size - 1}")

def continue_row(prompt, n_tokens, stop, out, trace=None):
    """A player that feeds a prompt, then every token drawn, until n_tokens are there, or one of `stop`. What is drawn
    and its logprob go into `out`, the notes into a Trace."""
    kept = 0
    feed = prompt
    for _ in range(n_tokens):
        token, logprob, notes = yield kept, feed
        out.append((token, logprob))
        if trace is not None:
            trace.notes = notes
        if token in stop:
            return
        kept += len(feed)
        feed = [token]

def generate(model, prompts, max_new_tokens, n_samples=1, temperature=1.0, top_p=0.95, top_k=40, generator=None,
             stop=(), allowed=None, index_warmup=False, speculate=0, accepted=None, prefixes=None, cached=None,
             trace=None):
    """Continue each prompt n_samples times, all rows in step -> yields token (B,), logprob (B,), position by position.

    prompts         lists of token ids
    max_new_tokens  of each row, at most; the context is a limit too
    n_samples       rows of each prompt, side by side: B = len(prompts) * n_samples
    temperature, top_p, top_k, generator  as in sample_next
    stop            ids that end a row
    allowed, index_warmup, speculate, accepted, prefixes, cached  as in `play`
    trace           a Trace, which is filled; None: nothing is recorded

    The first position is that after the shortest prompt. Both lie on the host. token, int64: drawn, or the prompt's own
    in a row that is still inside its prompt, or -1 in a row that has ended (a stop id, max_new_tokens, the context).
    logprob, fp32, is under the model itself: temperature 1, nothing cut; NaN where nothing was drawn. With drafts rows
    are not equally far: a position is handed out when all rows have come to it.
    ValueError for no prompt, an empty one, one that exceeds the context or the vocabulary, and what `play` refuses.
    """
    check_prompts(prompts, n_samples, model.cfg)
    rows = [prompt for prompt in prompts for _ in range(n_samples)]
    longest = max(map(len, rows))
    capacity = min(model.cfg.max_seq_len, longest + max_new_tokens)

    # what each row has to hand out: the rest of its prompt, then what is drawn
    shared = min(map(len, rows))
    outs = [[(token, math.nan) for token in row[shared:]] for row in rows]
    sizes = [min(max_new_tokens, capacity - len(row)) for row in rows]
    traces = [trace] + [None] * (len(rows) - 1)
    players = [continue_row(*parts) for parts in zip(rows, sizes, itertools.repeat(stop), outs, traces)]
    sampling = Sampling(temperature, top_p, top_k, generator)
    record = None if trace is None else trace.record

    def column(t):
        pairs = [out[t] if t < len(out) else (-1, math.nan) for out in outs]
        tokens, logprobs = zip(*pairs)
        return torch.tensor(tokens), torch.tensor(logprobs)

    t = 0
    steps = play(model, players, n_samples, sampling, record, speculate, allowed, index_warmup, capacity, accepted,
                 prefixes=prefixes, cached=cached)
    for _ in steps:
        if trace is not None:
            trace.lengths.append(len(outs[0]) - (len(rows[0]) - shared))
        running = [len(out) for out, player in zip(outs, players) if player.gi_frame is not None]
        while t < min(running, default=0):
            yield column(t)
            t += 1
    for t in range(t, max(map(len, outs))):
        yield column(t)

def heal(tokenizer, ids, n_vocab=None):
    """Take back the last token of a prompt, for the model to choose it anew -> ids without it; allowed (V,) bool, the
    tokens that start with its bytes; the number of these bytes.

    Why? "def " ends in a lone space, which the tokenizer never puts before a name: " f" is one token.
    n_vocab  V; by default the tokenizer's own size"""
    taken = tokenizer.decode_bytes(ids[-1:])
    starts = [i for i, token in enumerate(tokenizer.tokens) if token.startswith(taken)]
    allowed = torch.zeros(max(tokenizer.n_vocab, n_vocab or 0), dtype=torch.bool)
    allowed[starts] = True
    allowed[list(tokenizer.added.values())] = False
    ids = ids[:-1]
    if not ids:
        ids = [tokenizer.bos]  # the model needs a token to start from
    return ids, allowed[:n_vocab], len(taken)

class Stream:
    """Text of one sample as its tokens arrive: characters are released whole, and nothing from a stop text on."""

    def __init__(self, stops):
        if "" in stops:
            raise ValueError("an empty stop text would end every sample before its first character")
        self.stops = stops
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.shown = 0     # characters of the text that feed has released
        self.tokens = 0
        self.done = False  # a stop text has come

    def feed(self, raw, final=False):
        """Bytes of one token -> the text that may be shown now. final: there is no further token, raw is the rest."""
        if self.done:
            return ""
        self.text += self.utf8.decode(raw, final)
        if not final:
            self.tokens += 1

        # the text ends before the first stop text in it
        starts = [self.text.index(stop) for stop in self.stops if stop in self.text]
        if starts:
            self.text = self.text[:min(starts)]
            self.done = True

        # the last characters may be the beginning of a stop text: they wait
        end = len(self.text)
        if self.stops and not final and not self.done:
            end -= max(map(len, self.stops)) - 1
        new = self.text[self.shown:max(self.shown, end)]
        self.shown += len(new)
        return new

# ---- a server: HTTP ------------------------------------------------------------------------------
# OpenAI's protocol on loopback. Starlette and uvicorn, which are optional packages, speak HTTP on an event loop in a
# thread of their own; the model has one user, the main thread: an Engine here, the gateway in rl.py. Between the two
# stands a Client: the model's thread tells it news, the event loop hears them and sends them on. What a client does,
# reading slowly, hanging up, sending nonsense, costs the event loop a little, and the model's thread nothing.

PATIENCE = 2.0                         # seconds that a client has to send a request's head, and then its body
STALLED = 60.0                         # seconds after which a client that reads nothing of its answer is cut off
UNREAD = 4096                          # tokens of a text that may wait for a client: one that is slower loses it
GRACE = 2                              # seconds that answers have to be sent once the server is closed
KEEP_ALIVE = 75                        # seconds that a connection may be idle between two requests: uvicorn's 5 are a
                                       # training step of rl.py, and who asks as it is closed gets an error
BACKLOG = 1024                         # connections that may wait until they are heard
# status -> OpenAI's name for what is wrong, where there is one
ERROR_CODE = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")  # types of a message's parts that are text

class Refused(Exception):
    """(status, reason), and perhaps OpenAI's name for it: what a request gets in place of an answer."""

def error_object(status, reason, code=None):
    """OpenAI's object for a request that is refused."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return dict(error=dict(message=reason, type=kind, param=None, code=code or ERROR_CODE.get(status)))

def reply(body, status=200, headers=None):
    """A JSON object as Starlette's response. In ASCII: a lone surrogate, which JSON may hold, is no UTF-8."""
    from starlette.responses import Response
    return Response(json.dumps(body), status, headers, media_type="application/json")

def refusal(status, reason, code=None, headers=None):
    """The response for a request that is refused. OpenAI's clients would try a 409 again: time is no cure for it."""
    headers = dict(headers or {})
    if status < 500 and status not in (408, 429):
        headers["x-should-retry"] = "false"
    return reply(error_object(status, reason, code), status, headers)

class Client:
    """Who waits for an answer. The model's thread reads `gone` and calls `tell`; all else is the event loop's."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.gone = False              # nobody will read what it is told
        self.was_answered = False      # the whole answer was handed to the system while it was there
        self.left = asyncio.Event()
        self.news = deque()
        self.most = UNREAD             # pieces of news that may wait
        self.stirred = asyncio.Event()  # there may be news, or it has left

    async def watch(self, receive):
        """Wait until the client hangs up. One that has only closed its sending side looks the same."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.leave()

    def leave(self):
        self.gone = True
        self.left.set()
        self.stirred.set()

    async def receive(self):
        """What the app hears once the request is read: that the client has left."""
        await self.left.wait()
        return {"type": "http.disconnect"}

    def tell(self, piece):
        """From any thread: a piece of the answer, or a Refused. A client that lets too many of them wait is given up.
        """
        if self.gone:
            return
        if len(self.news) >= self.most:
            piece = Refused(503, f"the answer was read too slowly: {self.most} pieces of it waited")
            self.gone = True
        self.news.append(piece)
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(self.stirred.set)

    async def hear(self):
        """Wait for news -> all there are, in order; [] once the client has left. Refused where that comes first."""
        while not self.news and not self.left.is_set():
            await self.stirred.wait()
            self.stirred.clear()
        pieces = []
        while self.news and not (pieces and isinstance(self.news[0], Refused)):
            pieces.append(self.news.popleft())
        if pieces and isinstance(pieces[0], Refused):
            raise pieces[0]
        return pieces

async def read_body(receive, most):
    """-> the bytes of a request. Refused if they are more than `most`, or slower than PATIENCE.

    What is too large is read to its end and dropped, while there is time: with unread data the close would be a reset,
    and the client would never see the reply."""
    parts = []
    size = 0
    more = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the client hung up within its request")
                size += len(message["body"])
                if size <= most:
                    parts.append(message["body"])
                more = message["more_body"]
    if size > most:
        raise Refused(413, f"a body of more than {most} bytes")
    if more:
        raise Refused(408, f"the request has not come to its end in {PATIENCE:g} seconds")
    return b"".join(parts)

def guarded(app, keys_of, most):
    """-> an ASGI app in front of another: it reads a request to its end, checks the key, and watches the client. The
    app finds the bytes and the Client in scope["heard"].

    keys_of  path -> the keys that open it
    most     bytes of a request
    """
    def is_open(path, shown):
        return any(hmac.compare_digest(shown, f"Bearer {key}".encode()) for key in keys_of(path))

    async def serve(scope, receive, send):
        try:
            raw = await read_body(receive, most)
            if not is_open(scope["path"], dict(scope["headers"]).get(b"authorization", b"")):
                raise Refused(401, "wrong token: Authorization must be Bearer and the server's key")
        except Refused as error:
            response = refusal(*error.args, headers={"Connection": "close"})
            return await response(scope, receive, send)

        client = Client()

        async def tell(message):
            await send(message)
            # noted here: before the app returns, the end of a stream has been taken for the client's
            if message["type"] == "http.response.body" and not message.get("more_body"):
                client.was_answered = not client.gone

        watch = asyncio.create_task(client.watch(receive))
        scope["heard"] = raw, client
        try:
            await app(scope, client.receive, tell)
        except Exception as error:     # the app has answered 500; the server goes on
            print(f"server  | {scope['path']!r:.100}: {error!r}", flush=True)
        finally:
            watch.cancel()
            client.leave()
    return serve

def make_app(keys_of, posts, gets=(), most=2 ** 24):
    """-> an ASGI app. What is refused gets OpenAI's error object.

    keys_of      path -> the keys that open it, one of which each request must show
    posts, gets  {path: async function of a Starlette request -> response}; it finds (bytes, Client) in
                 request.scope["heard"], and may raise Refused
    most         bytes of a request
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    async def refuse(request, error):
        where = f"{request.method} {request.url.path!r:.100}"
        if isinstance(error, Refused):
            return refusal(*error.args)
        if isinstance(error, HTTPException):  # 404 or 405, by the router
            return refusal(error.status_code, f"{where}: {error.detail}", headers=error.headers)
        return refusal(500, f"{where}: {error!r:.200}")

    routes = [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]
    routes += [Route(path, answer, methods=["GET"]) for path, answer in dict(gets).items()]
    app = Starlette(routes=routes, exception_handlers={kind: refuse for kind in (Refused, HTTPException, Exception)})
    app.router.redirect_slashes = False  # another path is another path
    return guarded(app, keys_of, most)

def patient_protocol():
    """-> the class of a connection: uvicorn's, which would wait for a request's head, and for a reader, for ever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        """Cut off if the head of a request takes over PATIENCE seconds, or if nothing is read for STALLED."""
        head_due = None                # timers
        read_due = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self.head_due = self.loop.call_later(PATIENCE, transport.abort)

        def data_received(self, data):
            super().data_received(data)
            is_heard = self.cycle is not None and not self.cycle.response_complete
            if is_heard:
                self.head_due = stopped(self.head_due)
            elif self.head_due is None:
                self.head_due = self.loop.call_later(PATIENCE, self.transport.abort)

        def pause_writing(self):
            super().pause_writing()
            self.read_due = self.loop.call_later(STALLED, self.transport.abort)

        def resume_writing(self):
            super().resume_writing()
            self.read_due = stopped(self.read_due)

        def connection_lost(self, error):
            super().connection_lost(error)
            self.head_due = stopped(self.head_due)
            self.read_due = stopped(self.read_due)
    return Connection

def stopped(timer):
    """Stop a timer, if there is one -> None."""
    if timer is not None:
        timer.cancel()

class Door:
    """A port of loopback, and uvicorn, which serves an app there in a thread of its own."""

    def __init__(self, port):
        """ValueError without the packages, OSError without the port: before a model is read."""
        try:
            import starlette
            import uvicorn
        except ImportError as error:
            raise ValueError(f"--serve {port}: {error}; pip install starlette uvicorn") from None
        # named TCP: asyncio sends small packets of such sockets at once, others would wait 40 ms for the one before
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name == "posix":         # elsewhere two servers could share a port
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(("127.0.0.1", port))
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            raise OSError(f"--serve {port}: no port to listen on, {error.strerror}") from None
        self.address = self.socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}/v1"
        self.server = None

    def open(self, app):
        import uvicorn
        # one implementation of each part, whatever else is installed; no log: clients' mistakes are no news
        config = uvicorn.Config(
            app, http=patient_protocol(), ws="none", loop="asyncio", lifespan="off", log_config=None,
            log_level="critical", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=KEEP_ALIVE)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()

    def close(self):
        """Accept no more connections; answers under way have GRACE seconds to be sent."""
        if self.server is not None:
            self.server.should_exit = True
            self.thread.join(2 * GRACE)
        self.socket.close()

# ---- a server: what is asked ---------------------------------------------------------------------
# The body of a request, checked field by field: null is as good as absent, and fields that are unknown change nothing.
# A field that would change the text, and is not served, is refused: ignored, it would change it in silence.

MODEL_ID = "nano-minimax"              # the only model's name; one of --hf has that of its folder
TEXT_TOKENS = 16                       # of /v1/completions where max_tokens is absent, as the protocol has it
MOST_STOPS = 64
MOST_BEST = 20                         # of top_logprobs
MOST_ROWS = 256                        # texts that are decoded at once
NOT_SERVED = dict(                     # field -> the value that changes nothing, the only one that is served
    presence_penalty=0, frequency_penalty=0, repetition_penalty=1, min_p=0, logit_bias={}, best_of=1, echo=False,
    suffix="", response_format=dict(type="text"))

@dataclasses.dataclass
class Asked:
    """A request for completions. What it leaves out, the script's flags say."""
    is_chat: bool
    prompts: list                      # of Prompt
    n: int                             # texts of each
    max_new_tokens: int                # of each text
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stops: list
    has_logprobs: bool
    n_best: int                        # likeliest tokens beside each
    is_stream: bool
    has_usage: bool                    # a stream's last piece
    model: str = MODEL_ID              # the name that the answer shows
    form: "AnswerForm" = None          # how a released model's answer is read; None: it is text
    warnings: tuple = ()               # what of it cannot be done, in words
    client: Client = None
    came: float = 0.0                  # when the engine was asked
    cached: int = 0                    # tokens of the prompts that came from the prefix cache

    @property
    def n_rows(self):
        return len(self.prompts) * self.n

    @property
    def n_prompt(self):
        return sum(len(prompt.ids) for prompt in self.prompts)

def message_text(content, where):
    """What a message says: a string, null, or a list of parts, strings or of text, joined as they are -> text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: content is a string, null or a list of parts, not {content!r:.60}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS:
            raise ValueError(f"{where}: a part of type {kind!r:.40}: text alone is served, {', '.join(TEXT_PARTS)}")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise ValueError(f"{where}: a part of type {kind} whose text is {text!r:.40}, not a string")
        texts.append(text)
    return "".join(texts)

def read_object(raw):
    """-> the JSON object that a request is. Refused if it is none."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}"[:200]) from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {type(body).__name__}, not a JSON object")
    return body

def read_number(body, name, default, low, high=2 ** 31 - 1, kind=int):
    """A number of a request, of a range; null or absent: the default."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(400, f"{name} {value!r:.40}: it must be a number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)             # 1.0 is JSON's 1
    try:
        return number(low, high, kind)(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:  # ValueError: too long for an int's text
        raise Refused(400, f"{name} {error}"[:200]) from None

def read_flag(body, name):
    """Whether a field of a request is true; null or absent: it is not."""
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise Refused(400, f"{name} {value!r:.40}: it must be true or false")
    return bool(value)

def read_stops(body):
    """The texts that end a completion."""
    stops = body.get("stop")
    if stops is None:
        return []
    if isinstance(stops, str):
        stops = [stops]
    fit = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not fit or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, f"stop {stops!r:.60}: a text, or at most {MOST_STOPS} of them, none of them empty")
    return stops

def read_logprobs(body, is_chat):
    """-> whether tokens' log-probabilities are asked for, and of how many of the likeliest tokens beside each."""
    if not is_chat:
        n_best = read_number(body, "logprobs", None, 0, MOST_BEST)
        return n_best is not None, n_best or 0
    has_logprobs = read_flag(body, "logprobs")
    n_best = read_number(body, "top_logprobs", 0, 0, MOST_BEST)
    if n_best and not has_logprobs:
        raise Refused(400, f"top_logprobs {n_best}: logprobs must be true, too")
    return has_logprobs, n_best

def chat_text(messages):
    """A base model has no template: the contents, joined by blank lines."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, f"messages {messages!r:.60}: a list of at least one is needed")
    texts = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, f"{where}: a message is {{role, content}}, its role a string")
        try:
            text = message_text(message.get("content"), where)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if text:
            texts.append(text)
    return "\n\n".join(texts)

def is_ids(value):
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

def read_prompts(body, is_chat):
    """-> what is to be continued: texts, or lists of token ids."""
    if is_chat:
        return [chat_text(body.get("messages"))]
    prompt = body.get("prompt")
    if prompt is None:
        return [""]
    prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    fit = isinstance(prompts, list) and bool(prompts)
    if not fit or not all(isinstance(one, str) or is_ids(one) for one in prompts):
        raise Refused(400, f"prompt {prompt!r:.60}: a text, a list of token ids, or a list of these")
    return prompts

def to_prompt(given, tokenizer, cfg):
    """A text or token ids -> Prompt, whose tokens stay as they are: a client counts tokens, and asks for their
    log-probabilities. Refused if the context or the vocabulary has no room for it."""
    try:
        ids = given
        if isinstance(given, str):
            ids = tokenizer.encode(given) if given else [tokenizer.bos]
        check_prompts([ids], 1, cfg)
        check_room(ids, cfg.max_seq_len)
        return Prompt(ids)
    except ValueError as error:
        is_long = "context" in str(error)
        raise Refused(400, str(error), "context_length_exceeded" if is_long else None) from None

def model_name(args):
    """What the model is called: the checkpoint's folder, where it is a released one."""
    if args.hf is None:
        return MODEL_ID
    return os.path.basename(os.path.abspath(args.hf))

def read_request(raw, is_chat, args, tokenizer, cfg, reader=None):
    """The bytes of a request -> Asked. Refused if it cannot be served.

    args    the script's flags
    reader  a TemplateReader for what is said in a chat; None: the contents are joined
    """
    body = read_object(raw)
    model = body.get("model")
    served = model_name(args)
    if model not in (None, served):
        raise Refused(404, f"model {model!r:.60}: {served} is served", "model_not_found")
    for name, neutral in NOT_SERVED.items():
        if body.get(name) not in (None, neutral):
            raise Refused(400, f"{name} {body[name]!r:.60}: it is not served")

    # how the tokens are drawn; below a thousandth the likeliest one is
    temperature = read_number(body, "temperature", args.temperature, 0, 1000, float)
    if temperature < 1e-3:
        temperature = 0.0
    top_p = read_number(body, "top_p", args.top_p, 0, 1, float)
    if top_p == 0:
        raise Refused(400, "top_p 0: it must be above 0")

    # how many; the newer of two names counts
    max_new_tokens = args.max_new_tokens if is_chat else TEXT_TOKENS
    max_new_tokens = read_number(body, "max_tokens", max_new_tokens, 1)
    max_new_tokens = read_number(body, "max_completion_tokens", max_new_tokens, 1)
    has_logprobs, n_best = read_logprobs(body, is_chat)
    options = body.get("stream_options")
    if not isinstance(options, dict | None):
        raise Refused(400, f"stream_options {options!r:.60}: it must be an object")
    n = read_number(body, "n", 1, 1, MOST_ROWS)
    form = None
    if is_chat and reader is not None:
        ids, form = reader.read(body)
        given = [ids or [tokenizer.bos]]
    else:
        given = read_prompts(body, is_chat)
    if len(given) * n > MOST_ROWS:
        raise Refused(400, f"{len(given)} prompts, n {n}: at most {MOST_ROWS} texts in all")
    return Asked(
        is_chat=is_chat,
        prompts=[to_prompt(one, tokenizer, cfg) for one in given],
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=read_number(body, "top_k", args.top_k, 0),
        seed=read_number(body, "seed", None, -2 ** 63, 2 ** 63 - 1),
        stops=read_stops(body),
        has_logprobs=has_logprobs,
        n_best=min(n_best, cfg.vocab_size),
        is_stream=read_flag(body, "stream"),
        has_usage=read_flag(options or {}, "include_usage"),
        model=served,
        form=form)

# ---- a server: thoughts and calls ----------------------------------------------------------------
# What a released model writes has parts. A thought comes first, then content, then calls of tools:
#
#     <think>                               M3: <mm:think>
#     It is in a.py.
#     </think>
#
#     I read the file.
#     <minimax:tool_call>                   M3 writes ]<]minimax[>[ before each of these tags, and a parameter is
#     <invoke name="read">                  a tag of its own, <path>a.py</path>. Objects and lists are tags in tags,
#     <parameter name="path">a.py</parameter>     each part of a list in <item>; M2 writes them as JSON
#     </invoke>
#     </minimax:tool_call>
#
# A value is written as it is, nothing in it is escaped: it may hold any of these tags. So a closing tag counts only
# where what follows it goes on with the call. What is no whole call stays text, and so does what looks like a call
# within a thought: a model that weighs a call has not made it.

THINK_MARKS = (("<think>", "</think>"), ("<mm:think>", "</mm:think>"))  # M2's, M3's
M3_MARK = "]<]minimax[>["

class CallGrammar:
    """The tags of calls, as regular expressions. Behind a call comes another, or the end of all."""

    def __init__(self, begin, end, invoke, invoke_end, parameter, tag, close, is_nested):
        """
        begin, end          texts that enclose all calls
        invoke, invoke_end  expressions that enclose one, the group `name` is the tool's
        parameter           an expression that opens one, the group `key` is its name
        tag                 an expression for any tag that may open or close a value, or lie in one
        close               what closes a parameter's value, {} for its name
        is_nested           whether tags lie in tags, so that they say where a value ends
        """
        self.begin = begin
        self.end = end
        self.close = close
        self.is_nested = is_nested
        self.tag = regex.compile(tag)
        other = invoke.replace("<name>", "<other>")
        self.patterns = {}
        for final, nothing in ((False, ""), (True, r"|\Z")):  # a text that is over may lack the end of all
            ends = rf"(?P<ends>{invoke_end})\s*(?:{regex.escape(end)}|{other}{nothing})"
            first = rf"\s*{invoke}\s*(?:{parameter}|{ends})"
            self.patterns[final] = dict(
                first=regex.compile(regex.escape(begin) + first),
                next=regex.compile(first),
                after_value=regex.compile(rf"\s*(?:{parameter}|{ends})"),
                done=regex.compile(rf"\s*{regex.escape(end)}"))

def m2_grammar():
    return CallGrammar(
        begin="<minimax:tool_call>",
        end="</minimax:tool_call>",
        invoke=r'<invoke name="(?P<name>[^"\n]+)">',
        invoke_end="</invoke>",
        parameter=r'<parameter name="(?P<key>[^"\n]+)">',
        tag=r"</parameter>|<parameter[\s>]",
        close="</parameter>",
        is_nested=False)

def m3_grammar():
    mark = regex.escape(M3_MARK)
    return CallGrammar(
        begin=f"{M3_MARK}<tool_call>",
        end=f"{M3_MARK}</tool_call>",
        invoke=rf'{mark}<invoke name="(?P<name>[^"\n]+)">',
        invoke_end=f"{mark}</invoke>",
        parameter=rf'{mark}<(?P<key>[^<>/\s"][^<>\s"]*)>',
        tag=rf"{mark}</?[^<>\n]+>",
        close=M3_MARK + "</{}>",
        is_nested=True)

@dataclasses.dataclass
class Style:
    """How a template writes an answer down; "" and None: not at all. The line breaks are the template's, no part of a
    thought or a content: what is sent back is then rendered as it was written."""
    think_open: str = ""
    think_close: str = ""
    before_thought: str = ""           # line breaks
    behind_thought: str = ""
    before_content: str = ""
    before_calls: str = ""
    grammar: CallGrammar = None
    knows_developer: bool = False      # the role
    offers_tools: bool = False         # it tells the model of them

def learn_style(template):
    """A ChatTemplate -> its Style: it writes an answer whose words stand nowhere else, and what it puts between them
    is the style."""
    def written(*messages, **options):
        try:
            return template.render(messages, add_generation_prompt=False, **options)
        except ValueError:             # it has no such thing
            return ""

    asked = dict(role="user", content="qAsked")
    function = dict(name="qName", arguments=dict(qKey="qValue"))
    answer = dict(role="assistant", content="qContent", reasoning_content="qThought")
    tool = dict(type="function", function=dict(name="qTool", description="", parameters=dict(type="object")))
    style = Style(
        knows_developer="qRule" in written(dict(role="developer", content="qRule"), asked),
        offers_tools="qTool" in written(asked, tools=[tool]))

    text = written(asked, answer)
    before, _, behind = text.partition("qThought")
    behind = behind.partition("qContent")[0]
    for mark, end_mark in THINK_MARKS:
        if before.rstrip().endswith(mark) and end_mark in behind:
            style.think_open = mark
            style.think_close = end_mark
            style.before_thought = before.rpartition(mark)[2]
            style.behind_thought, _, style.before_content = behind.partition(end_mark)

    text = written(asked, dict(answer, tool_calls=[dict(id="qId", type="function", function=function)]), tools=[tool])
    between = text.partition("qContent")[2].partition("qName")[0]
    for grammar in (m2_grammar(), m3_grammar()):
        if grammar.begin in between:
            style.before_calls = between.partition(grammar.begin)[0]
            style.grammar = grammar
            parser = AnswerParser(style, dict(qName={}))
            parser.feed(text[text.index("qContent"):], final=True)
            if [call[1:] for call in parser.said[2]] != [("qName", '{"qKey": "qValue"}')]:
                style.grammar = None   # it has the marks, and something else between them
    return style

def split_thought(text, style, may_lack_mark):
    """An assistant's content as clients send it back -> its thought, None without one, and the rest. may_lack_mark:
    the prompt held the mark that opens a thought, so a client may have no more than the one that closes it."""
    mark, end_mark = style.think_open, style.think_close
    if not mark or end_mark not in text:
        return None, text
    before, _, content = text.partition(end_mark)
    if before.lstrip().startswith(mark):
        before = before.lstrip().removeprefix(mark).removeprefix(style.before_thought)
    elif mark in before or not may_lack_mark:  # it speaks of thoughts
        return None, text
    return before.removesuffix(style.behind_thought), without_breaks(content, style.before_content)

def without_breaks(text, breaks):
    """A text without as many of these line breaks as it begins with."""
    for one in breaks:
        if not text.startswith(one):
            break
        text = text[1:]
    return text

# ---- a server: arguments -------------------------------------------------------------------------
# The values of a call are text. What they are in JSON, the tool's schema says: a string's text stays as it is, whatever
# it looks like. Where a schema says nothing, a text that is JSON is that, except a JSON string, which no model writes
# with quotes around it.

JSON_BEGINS = '{["-0123456789tTfFn' + M3_MARK[0]  # what a value that is no string may begin with
MOST_REFERENCES = 32                   # of a schema, one to the next: they may go in circles
MOST_NESTED = 64                       # values in values; what lies deeper stays text, as Python's stack ends, too

def resolved(schema, root):
    """A schema, $ref followed -> the schema; {} for what is none."""
    for _ in range(MOST_REFERENCES):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        schema = root
        for name in reference.split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, dict) else None
    return {}

def branches(schema, root):
    """A schema -> the schemas that a value may follow: itself, and what its anyOf, oneOf and allOf name."""
    found = []
    known = set()                      # ids of those objects
    waiting = deque([schema])
    while waiting:
        branch = resolved(waiting.popleft(), root)
        if id(branch) in known:        # in a circle
            continue
        found.append(branch)
        known.add(id(branch))
        for name in ("anyOf", "oneOf", "allOf"):
            choices = branch.get(name)
            waiting.extend(choices if isinstance(choices, list) else [])
    return found

def kinds_of(schema, root):
    """The JSON types that a value may have; an empty set where the schema does not say."""
    kinds = set()
    for branch in branches(schema, root):
        kind = branch.get("type")
        kinds.update(one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str))
        values = branch.get("enum")
        values = list(values) if isinstance(values, list) else []
        if "const" in branch:
            values.append(branch["const"])
        if kind is None:
            kinds.update(kind_of(value) for value in values)
        if kind is None and isinstance(branch.get("properties"), dict):
            kinds.add("object")
        if kind is None and "items" in branch:
            kinds.add("array")
    return kinds

def kind_of(value):
    """The JSON type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    names = {float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]

def property_schema(schema, key, root):
    """The schema of an object's property; {} where nothing is said of it."""
    named = []
    others = []
    for branch in branches(schema, root):
        properties = branch.get("properties")
        if isinstance(properties, dict) and key in properties:
            named.append(properties[key])
        if isinstance(branch.get("additionalProperties"), dict):
            others.append(branch["additionalProperties"])
    return any_of(named or others)

def item_schema(schema, root):
    """The schema of a list's parts."""
    return any_of([branch["items"] for branch in branches(schema, root) if isinstance(branch.get("items"), dict)])

def any_of(schemas):
    """Schemas -> one that says the same as all of them."""
    if len(schemas) == 1:
        return schemas[0]
    return dict(anyOf=schemas) if schemas else {}

def json_value(text):
    """The JSON that a text is. ValueError if it is none, or holds a number that JSON cannot."""
    def refuse(name):
        raise ValueError(f"{name} is no JSON")
    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, allow_nan=False)  # 1e999
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value

def scalar(text, kinds):
    """A value without tags -> what it is in JSON: of one of these types, or the text."""
    if kinds == {"string"}:
        return text
    word = text.strip()
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        value = json_value(text)
    except ValueError:
        return text
    kind = kind_of(value)
    if kind == "string":               # its quotes belong to it
        return text
    if kind == "number" and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return int(value)
    if kind == "integer" and "number" in kinds:
        kind = "number"
    fits = not kinds or kind in kinds
    # where a string may stand, a number that would be written in another way is one: 007, 1.50
    if fits and "string" in kinds and kind in ("integer", "number") and json.dumps(value) != text:
        return text
    return value if fits else text

def argument_value(text, schema, root, grammar):
    """A parameter's text -> its value in JSON."""
    kinds = kinds_of(schema, root)
    if not grammar.is_nested or kinds == {"string"}:
        return scalar(text, kinds)
    return tagged_value(text, schema, root)

def tagged_value(text, schema, root, depth=0):
    """M3's value: tags in tags are an object, or a list, if each is an <item>; a text without tags is one. depth: of
    the values that this one lies in."""
    kinds = kinds_of(schema, root)
    is_text = kinds == {"string"} or depth == MOST_NESTED
    parts = None if is_text else tagged_parts(text)
    if not parts:
        if not text.strip() and parts is not None and "string" not in kinds:
            if "array" in kinds:
                return []
            if "object" in kinds:
                return {}
        return scalar(text, kinds)
    is_list = all(name == "item" for name, _ in parts)
    if "array" in kinds or "object" in kinds:
        is_list = is_list and "array" in kinds or "object" not in kinds
    if is_list:
        items = item_schema(schema, root)
        return [tagged_value(part, items, root, depth + 1) for _, part in parts]
    return {name: tagged_value(part, property_schema(schema, name, root), root, depth + 1) for name, part in parts}

def tagged_parts(text):
    """A text that is tags side by side -> [(name, what is in it)]; None if it is anything else."""
    tags = regex.compile(rf'{regex.escape(M3_MARK)}<(?P<slash>/?)(?P<name>[^<>/\s"][^<>\s"]*)>')
    parts = []
    names = []                         # of the tags that are open
    outside = 0                        # where the text outside of all tags goes on
    for tag in tags.finditer(text):
        if not names and text[outside:tag.start()].strip():
            return None
        if not tag["slash"]:
            if not names:
                inside = tag.end()
            names.append(tag["name"])
            continue
        if not names or names.pop() != tag["name"]:
            return None
        if not names:
            parts.append((tag["name"], text[inside:tag.start()]))
            outside = tag.end()
    if names or text[outside:].strip():
        return None
    return parts

# ---- a server: what the model says ---------------------------------------------------------------

@dataclasses.dataclass
class CallPart:
    """What is new of one tool call."""
    index: int                         # of the call, in its answer
    id: str | None = None              # these two come first
    name: str | None = None
    arguments: str = ""                # the next part of a JSON object
    is_void: bool = False              # it was none: what was written follows as content

class AnswerParser:
    """A model's text, piece by piece -> thought, content and calls. Wherever the text was cut into pieces, what is
    given out is, joined, the same."""

    def __init__(self, style, tools=None, tail="", one_call=False):
        """
        style     how the template writes answers
        tools     {name: JSON schema of its arguments}; None: no calls are looked for
        tail      the prompt's last words: they may have opened the thought
        one_call  the answer is over with its first call
        """
        self.style = style
        self.grammar = style.grammar
        self.tools = tools if style.grammar else None
        self.one_call = one_call
        self.is_over = False           # by one_call
        self.is_final = False          # there is no further text
        self.rest = ""                 # text that may yet be one thing or another
        self.breaks = ""               # the template's line breaks that may come next
        self.thought = []              # texts
        self.content = []
        self.calls = []                # the CallParts of each
        self.new = None                # what `feed` gives out

        self.opening = None
        if style.think_open:
            marks = rf"(?P<open>{regex.escape(style.think_open)})|{regex.escape(style.think_close)}"
            self.opening = regex.compile(rf"\s*(?:{marks})")
            self.thought_end = regex.compile(
                f"(?:{regex.escape(style.behind_thought)})?{regex.escape(style.think_close)}")
        if self.tools is not None:
            self.calls_begin = regex.compile(
                f"(?:{regex.escape(style.before_calls)})?{regex.escape(self.grammar.begin)}")

        # of the call under way
        self.raw = []                  # all of it, as it was written
        self.schema = {}
        self.key = None                # of the last parameter
        self.given = set()             # names of its parameters
        self.value = []                # pieces of the last one's value
        self.value_schema = {}
        self.is_text = None            # whether the value is a string, which is given out as it comes; None: who knows
        self.depth = 0                 # tags that are open in it

        # of what follows calls
        self.is_behind = False         # nothing but line breaks has followed them
        self.blank = ""                # those

        self.step = self.open_answer
        mark, breaks = style.think_open, style.before_thought
        if mark and tail.rstrip().endswith(mark):
            self.step = self.think
            self.breaks = breaks[len(tail.rpartition(mark)[2]):]

    def feed(self, text, final=False):
        """The next text -> what is new, {text, thought, parts}. final: there is no further text."""
        self.new = dict(text="", thought="", parts=[])
        self.rest += text
        self.is_final = final
        while not self.is_over and self.step():
            pass
        return self.new

    # -- parts of it: each step decides as much as can be decided, and says whether the next one may try --

    def open_answer(self):
        """Before the first word: a mark may open a thought, or say that there is none."""
        found = self.opening and self.match(self.opening)
        if not found:
            self.step = self.speak
            return True
        if found.partial:
            return False
        self.rest = self.rest[found.end():]
        if found["open"]:
            self.breaks = self.style.before_thought
            self.step = self.think
        else:
            self.breaks = self.style.before_content
            self.step = self.speak
        return True

    def think(self):
        self.skip_breaks()
        found = self.search(self.thought_end)
        end = found.start() if found else len(self.rest)
        self.thought.append(self.rest[:end])
        self.new["thought"] += self.rest[:end]
        self.rest = self.rest[end:]
        if not found or found.partial:
            return False
        self.rest = self.rest[len(found[0]):]
        self.breaks = self.style.before_content
        self.step = self.speak
        return True

    def speak(self):
        """Content, until calls begin."""
        self.skip_breaks()
        found = self.search(self.calls_begin) if self.tools is not None else None
        self.say(found.start() if found else len(self.rest))
        if not found or found.partial:
            return False
        start = len(found[0]) - len(self.grammar.begin)
        first = self.match(self.pattern("first"), start)
        if first is None:              # the mark is text
            self.say(start + 1)
            return True
        if first.partial:
            return False
        self.open_call(first)
        return True

    def between_calls(self):
        done = self.match(self.pattern("done"))
        following = self.match(self.pattern("next"))
        if done and not done.partial:
            self.rest = self.rest[done.end():]
            self.step = self.speak
            self.is_behind = True
        elif following and not following.partial:
            self.open_call(following)
        elif done or following:
            return False
        else:                          # there is no end of all
            self.step = self.speak
            self.is_behind = True
        return True

    def read_value(self):
        """The value of a parameter, tag by tag. A tag that does not close it is a part of it."""
        found = self.search(self.grammar.tag)
        self.grow(found.start() if found else len(self.rest))
        if not found or found.partial:
            if self.is_final:
                self.void_call()
            return False
        tag = found[0]
        if tag != self.grammar.close.format(self.key):
            is_closing = tag.startswith(("</", f"{M3_MARK}</"))
            self.depth = max(0, self.depth - 1) if is_closing else self.depth + 1
            self.grow(len(tag))
            return True

        after = self.match(self.pattern("after_value"), len(tag))
        is_end = self.goes_on(after)
        if is_end is None:
            return False
        if not is_end:
            self.depth = max(0, self.depth - 1)
            self.grow(len(tag))
            return True
        self.end_value()
        self.go_on(after)
        return True

    def goes_on(self, after):
        """Whether the match behind a closing tag goes on with the call; None: more text must say.

        Of whole parameters in a value the count of open tags says which closing tag is their own. A value that holds
        an opening tag alone has no count that ends it: a name that the tool knows, or the end of the text, does."""
        if after is None:
            return False
        if after.partial:
            return None
        if after["key"] is not None:
            is_known = not self.grammar.is_nested and self.knows(after["key"])
            return after["key"] not in self.given and (self.depth == 0 or is_known)
        if self.depth == 0 or after["other"] in self.tools:
            return True
        if after["other"] is not None or self.rest[after.end():].strip():
            return False
        return True if self.is_final else None

    # -- calls --

    def open_call(self, found):
        """found: a match of `first` or `next`, which is where a call is one for sure."""
        self.raw = []
        self.blank = ""
        self.given = set()
        self.schema = self.tools.get(found["name"]) or {}
        call = CallPart(len(self.calls), f"call_{os.urandom(12).hex()}", found["name"])
        self.calls.append([call])
        self.new["parts"].append(call)
        self.go_on(found)

    def go_on(self, found):
        """found: a match that ends with the opening tag of a parameter, or with the end of the call."""
        if found["key"] is not None:
            self.take(found.end())
            self.open_value(found["key"])
        else:
            self.take(found.end("ends"))
            self.end_call()

    def open_value(self, key):
        before = ", " if self.given else "{"
        self.argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        self.key = key
        self.given.add(key)
        self.value = []
        self.value_schema = property_schema(self.schema, key, self.schema)
        self.is_text = None
        self.depth = 0
        if kinds_of(self.value_schema, self.schema) == {"string"}:
            self.begin_text()
        self.step = self.read_value

    def grow(self, n):
        """The next n characters belong to the value."""
        if n == 0:
            return
        piece = self.take(n)
        self.value.append(piece)
        if self.is_text:
            self.argue(json.dumps(piece, ensure_ascii=False)[1:-1])
        elif self.is_text is None and piece.strip():
            self.is_text = piece.lstrip()[0] not in JSON_BEGINS  # then it is a string, whatever the schema says
            if self.is_text:
                self.begin_text()

    def begin_text(self):
        """The value is a string: what there is of it is given out."""
        self.is_text = True
        self.argue(json.dumps("".join(self.value), ensure_ascii=False)[:-1])

    def end_value(self):
        if self.is_text:
            self.argue('"')
            return
        value = argument_value("".join(self.value), self.value_schema, self.schema, self.grammar)
        self.argue(json.dumps(value, ensure_ascii=False))

    def end_call(self):
        self.argue("}" if self.given else "{}")
        self.is_over = self.one_call
        self.step = self.between_calls

    def void_call(self):
        """The text has ended within a call: what was written of it is content. A stream has told its first arguments,
        which are no whole JSON, so that nobody obeys them."""
        self.calls.pop()
        self.new["parts"].append(CallPart(len(self.calls), is_void=True))
        self.add_content("".join(self.raw))

    def knows(self, key):
        """Whether the tool's schema names a parameter."""
        return any(key in branch["properties"] for branch in branches(self.schema, self.schema)
                   if isinstance(branch.get("properties"), dict))

    # -- the text, and what is given out --

    def pattern(self, name):
        return self.grammar.patterns[self.is_final][name]

    def match(self, pattern, start=0):
        """The pattern at a place; partial: the text so far fits, and more of it must say."""
        return pattern.match(self.rest, start, partial=not self.is_final)

    def search(self, pattern):
        return pattern.search(self.rest, partial=not self.is_final)

    def take(self, n):
        """-> the next n characters of a call."""
        piece = self.rest[:n]
        self.rest = self.rest[n:]
        self.raw.append(piece)
        return piece

    def skip_breaks(self):
        """Drop the line breaks that the template puts here, as many as there are."""
        while self.breaks and self.rest:
            if self.rest[0] == self.breaks[0]:
                self.rest = self.rest[1:]
                self.breaks = self.breaks[1:]
            else:
                self.breaks = ""

    def say(self, n):
        """The next n characters are content."""
        text = self.rest[:n]
        self.rest = self.rest[n:]
        self.add_content(text)

    def add_content(self, text):
        if self.is_behind:             # line breaks behind calls are the template's, unless words follow
            self.blank += text
            if not self.blank.strip():
                return
            text = self.blank
            self.blank = ""
            self.is_behind = False
        self.content.append(text)
        self.new["text"] += text

    def argue(self, text):
        """More of a call's arguments, a part of their JSON."""
        part = CallPart(len(self.calls) - 1, arguments=text)
        self.calls[-1].append(part)
        self.new["parts"].append(part)

    @property
    def said(self):
        """All that was given out: thought, content, [(id, name, arguments)]."""
        calls = [(parts[0].id, parts[0].name, "".join(part.arguments for part in parts)) for parts in self.calls]
        return "".join(self.thought), "".join(self.content), calls

# ---- a server: messages through a template -------------------------------------------------------
# A released model is talked to through its template. It must read its own thoughts again, between calls at least: M2
# without them is much worse. vLLM and MiniMax's own service leave them in the content, where each client shows them
# to people; SGLang and others send them apart, as reasoning_content, and clients that know no such field lose them.
# Here they are sent apart, and remembered: where an answer comes back without a thought, it gets its own again.

ROLES = ("system", "developer", "user", "assistant", "tool")
TAIL = 16                              # tokens of a prompt that may have opened the thought
MOST_THOUGHTS = 2 ** 24                # characters that are remembered
NOT_RENDERED = dict(                   # as NOT_SERVED, of requests that go through a template
    functions=[], function_call="none", add_generation_prompt=True, continue_final_message=False, documents=[])
TEMPLATE_NAMES = ("messages", "tools", "add_generation_prompt", "documents", "behind", "self")  # no client's options
THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking", "reasoning_details")  # of different servers

class Thoughts:
    """Thoughts of the last answers, by what the client will send back."""

    def __init__(self):
        self.kept = OrderedDict()      # key -> thought
        self.size = 0                  # characters, of keys and thoughts
        self.lock = threading.Lock()   # the engine keeps them, threads of requests find them

    def keep(self, keys, thought):
        with self.lock:
            for key in keys:
                if key in self.kept:
                    self.size -= len(key) + len(self.kept.pop(key))
                self.size += len(key) + len(thought)
                self.kept[key] = thought
            while self.size > MOST_THOUGHTS:
                key, oldest = self.kept.popitem(last=False)
                self.size -= len(key) + len(oldest)

    def find(self, keys):
        """-> the thought under the first of the keys that is known, or None."""
        with self.lock:
            for key in keys:
                if key in self.kept:
                    self.kept.move_to_end(key)
                    return self.kept[key]
        return None

class History:
    """What was said until now, in one spelling: a key for each answer. Thoughts are no part of it, nor are ids."""

    def __init__(self):
        self.digest = hashlib.sha256()

    def add(self, role, text, calls=()):
        """calls: [(id, name, arguments as an object)]. -> what this message is known by: its first call's id, if it has
        any, and all that was said until now."""
        plain = [role, text.strip(), [[name, arguments] for _, name, arguments in calls]]
        self.digest.update(json.dumps(plain, sort_keys=True).encode())
        keys = [self.digest.hexdigest()]
        if calls:
            keys.insert(0, f"id {calls[0][0]}")
        return keys

    def copy(self):
        other = History()
        other.digest = self.digest.copy()
        return other

@dataclasses.dataclass
class AnswerForm:
    """How the answer to a request is read."""
    style: Style
    tools: dict                        # as of AnswerParser
    tail: str
    one_call: bool
    history: History
    thoughts: Thoughts

    def parser(self):
        return AnswerParser(self.style, self.tools, self.tail, self.one_call)

    def remember(self, parser):
        """What was thought, for an answer that has come to its end."""
        thought, content, calls = parser.said
        calls = [(call_id, name, json.loads(arguments)) for call_id, name, arguments in calls]
        self.thoughts.keep(self.history.copy().add("assistant", content, calls), thought)

def read_tools(body):
    """The tools of a request -> as they are, {name: schema of its arguments}; None, None without any. Refused if they
    cannot be served: a template can offer tools, and no more."""
    tools = body.get("tools")
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise Refused(400, f"tool_choice {choice!r:.60}: auto and none are served; the model is asked, not forced")
    if not isinstance(tools, list | None):
        raise Refused(400, f"tools {tools!r:.60}: a list is needed")
    schemas = {}
    for place, tool in enumerate(tools or []):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(400, f"tools[{place}]: a tool is {{type: function, function: {{name, parameters}}}}")
        if function["name"] in schemas:
            raise Refused(400, f"tools[{place}]: {function['name']!r:.60} is there already")
        schemas[function["name"]] = function.get("parameters") or {}
    if not schemas or choice == "none":  # the model is not told of tools that it must not call
        return None, None
    return tools, schemas

def read_calls(message, where):
    """The tool calls of a message -> [(id, name, arguments as an object)]."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls {calls!r:.60}: a list is needed")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a tool call is {{id, function: {{name, arguments}}}}, not {call!r:.60}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}: the arguments of {function['name']!r:.40} are {arguments!r:.60}; they must be "
                             "a JSON object")
        found.append((call.get("id"), function["name"], arguments))
    return found

def thought_beside(message, where):
    """The thought beside an answer's content, by whichever name; None without one."""
    for name in THOUGHT_NAMES:
        thought = message.get(name)
        if isinstance(thought, list):  # MiniMax's own service has parts, of type reasoning.text
            texts = [part.get("text") for part in thought if isinstance(part, dict)]
            thought = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(thought, str | None):
            raise ValueError(f"{where}: {name} {thought!r:.60}: it must be a string")
        if thought is not None:
            return thought
    return None

def call_object(call_id, name, arguments):
    """A tool call as the protocol has it."""
    return dict(id=call_id, type="function", function=dict(name=name, arguments=arguments))

def in_order_of_calls(messages):
    """Results of tools, in the order of the calls: templates leave out the ids that would say which is whose."""
    ordered = []
    places = {}                        # of the calls before
    for _, run in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
        run = list(run)
        if run[0]["role"] == "tool":
            run.sort(key=lambda message: places.get(str(message.get("tool_call_id")), len(places)))
        calls = run[-1].get("tool_calls", ())
        places = {str(call["id"]): place for place, call in enumerate(calls)}
        ordered += run
    return ordered

class TemplateReader:
    """Requests for chat -> prompts, through the template of a released checkpoint."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.template = tokenizer.template
        self.style = learn_style(self.template)
        self.thoughts = Thoughts()

    @property
    def card(self):
        """How answers are read, in words for a start-up card."""
        parts = []
        if self.style.think_open:
            parts.append(f"{self.style.think_open} as reasoning_content")
        if self.style.grammar:
            parts.append(f"{self.style.grammar.begin} as tool_calls")
        return ", ".join(parts) or "as they are: the template writes neither thoughts nor calls in a form known here"

    def read(self, body):
        """A request -> its prompt's ids, and the AnswerForm. Refused if it cannot be served."""
        for name, neutral in NOT_RENDERED.items():
            if body.get(name) not in (None, neutral):
                raise Refused(400, f"{name} {body[name]!r:.60}: it is not served")
        options = body.get("chat_template_kwargs") or {}
        if not isinstance(options, dict) or not options.keys().isdisjoint(TEMPLATE_NAMES):
            raise Refused(400, f"chat_template_kwargs {options!r:.60}: an object, without {', '.join(TEMPLATE_NAMES)}")
        one_call = body.get("parallel_tool_calls") is not None and not read_flag(body, "parallel_tool_calls")
        tools, schemas = read_tools(body)
        if tools and not self.style.offers_tools:
            raise Refused(400, f"tools: {self.template.name} does not tell the model of any")
        history = History()
        try:
            messages = self.read_messages(body.get("messages"), history)
            self.check_written(messages, tools, options)
            ids = self.tokenizer.encode_chat(messages, tools, **options)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        tail = self.tokenizer.decode(ids[-TAIL:])
        return ids, AnswerForm(self.style, schemas, tail, one_call, history, self.thoughts)

    def read_messages(self, messages, history):
        """Messages as clients send them -> such as templates read them. What is said is added to the history."""
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages {messages!r:.60}: a list of at least one is needed")
        read = []
        for place, message in enumerate(messages):
            where = f"messages[{place}]"
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise ValueError(f"{where}: a message is {{role, content}}, its role one of {', '.join(ROLES)}")
            role = message["role"]
            text = message_text(message.get("content"), where)
            if role == "assistant":
                read.append(self.read_answer(message, text, where, history))
                continue
            history.add(role, text)
            if role == "developer" and not self.style.knows_developer:
                role = "system"
            one = dict(role=role, content=text)
            if role == "tool":
                one["tool_call_id"] = message.get("tool_call_id")
            is_rule = role in ("system", "developer")
            if is_rule and place and len(read) == 1 and read[0]["role"] in ("system", "developer"):
                read[0]["content"] += BLANK_LINE + text  # templates have one place for them, at the beginning
            else:
                read.append(one)
        return in_order_of_calls(read)

    def read_answer(self, message, text, where, history):
        """A message of the assistant. Its thought is in its content, or beside it, or remembered; the template gets it
        in one place."""
        calls = read_calls(message, where)
        thought = thought_beside(message, where)
        if thought is None:
            thought = self.thoughts.find(history.copy().add("assistant", text, calls))
        in_text, text = split_thought(text, self.style, thought is None)
        if thought is None:
            thought = in_text
        history.add("assistant", text, calls)
        answer = dict(role="assistant", content=text, reasoning_content=thought or "")
        if calls:
            answer["tool_calls"] = [call_object(*call) for call in calls]
        return answer

    def check_written(self, messages, tools, options):
        """ValueError for a rule that the template would leave out, as M2's does behind the first message."""
        rules = [place for place, message in enumerate(messages) if place and message["role"] in ROLES[:2]]
        if not rules:
            return
        marked = [dict(message, content=f"q{place}Rule") if place in rules else message
                  for place, message in enumerate(messages)]
        text = self.template.render(marked, tools, **options)
        for place in rules:
            if f"q{place}Rule" not in text:
                raise ValueError(f"a {messages[place]['role']} message behind others: the template leaves it out; it "
                                 "must come first, or be a user's")

# ---- a server: what is answered ------------------------------------------------------------------

@dataclasses.dataclass
class Score:
    """A token of an answer, and how likely it was: under the model itself, at temperature 1, nothing cut."""
    raw: bytes
    logprob: float
    best: list                         # [(bytes, logprob)] of the likeliest tokens in its place
    start: int                         # character of the text that it begins in

@dataclasses.dataclass
class Piece:
    """What is new in one text of an answer."""
    index: int                         # of the text
    text: str = ""
    scores: list = dataclasses.field(default_factory=list)  # of the tokens that begin in the text
    finish: str | None = None          # stop, length or tool_calls: the text is over
    n_tokens: int = 0                  # of the text, once it is over
    calls: list = dataclasses.field(default_factory=list)   # the protocol's tool calls beside the text
    thought: str = ""                  # of a released model, beside the text
    parts: list = dataclasses.field(default_factory=list)   # CallParts: its tool calls, as they grow

    @property
    def has_news(self):
        """Whether there is anything that a stream tells."""
        return bool(self.text or self.thought or self.scores or self.calls or delta_calls(self.parts))

def join_pieces(pieces):
    """Pieces, in their order -> one for each text."""
    by_text = defaultdict(list)
    for piece in pieces:
        by_text[piece.index].append(piece)
    return [
        Piece(
            index=index,
            text="".join(part.text for part in parts),
            scores=[score for part in parts for score in part.scores],
            finish=parts[-1].finish,
            n_tokens=parts[-1].n_tokens,
            calls=[call for part in parts for call in part.calls],
            thought="".join(part.thought for part in parts),
            parts=[grown for part in parts for grown in part.parts])
        for index, parts in sorted(by_text.items())]

def shown(raw):
    return raw.decode("utf-8", errors="replace")

def finite(logprob):
    """JSON has no infinity: OpenAI writes -9999 for a token that cannot be."""
    return max(logprob, -9999.0)

def token_object(raw, logprob):
    return dict(token=shown(raw), logprob=finite(logprob), bytes=list(raw))

def chat_logprobs(scores):
    rows = []
    for score in scores:
        row = token_object(score.raw, score.logprob)
        row["top_logprobs"] = [token_object(raw, logprob) for raw, logprob in score.best]
        rows.append(row)
    return dict(content=rows, refusal=None)

def text_logprobs(scores):
    return dict(
        tokens=[shown(score.raw) for score in scores],
        token_logprobs=[finite(score.logprob) for score in scores],
        # of tokens that look alike, parts of characters, the likeliest stays
        top_logprobs=[{shown(raw): finite(logprob) for raw, logprob in reversed(score.best)} for score in scores],
        text_offset=[score.start for score in scores])

def choice_object(asked, piece, is_first=False):
    """A piece of a text, or all of it, as the protocol's choice. is_first: a stream's first of this text."""
    choice = dict(index=piece.index, logprobs=None, finish_reason=piece.finish)
    if asked.has_logprobs and (piece.scores or not asked.is_stream):
        choice["logprobs"] = chat_logprobs(piece.scores) if asked.is_chat else text_logprobs(piece.scores)
    if not asked.is_chat:
        choice["text"] = piece.text
    elif not asked.is_stream:
        choice["message"] = message_object(piece)
    elif is_first:
        choice["delta"] = dict(role="assistant", content="")
    else:
        choice["delta"] = delta_object(piece)
    return choice

def grouped_parts(parts):
    """CallParts -> {index of a call: its parts}."""
    by_index = defaultdict(list)
    for part in parts:
        by_index[part.index].append(part)
    return by_index

def whole_calls(parts):
    """All CallParts of a text -> the protocol's tool calls."""
    calls = []
    for grown in grouped_parts(parts).values():
        if not any(part.is_void for part in grown):
            calls.append(call_object(grown[0].id, grown[0].name, "".join(part.arguments for part in grown)))
    return calls

def delta_calls(parts):
    """CallParts that are new -> what a stream tells of them: the first of a call has its id and its name."""
    calls = []
    for index, grown in grouped_parts([part for part in parts if not part.is_void]).items():
        call = dict(index=index, function=dict(arguments="".join(part.arguments for part in grown)))
        if grown[0].id is not None:
            call = dict(call_object(grown[0].id, grown[0].name, call["function"]["arguments"]), index=index)
        calls.append(call)
    return calls

def message_object(piece):
    """A whole text, and the tool calls beside it, as the protocol's message. Calls alone have null for a content."""
    message = dict(role="assistant", content=piece.text, refusal=None)
    if piece.thought:
        message["reasoning_content"] = piece.thought
    calls = piece.calls or whole_calls(piece.parts)
    if calls:
        message["content"] = piece.text or None
        message["tool_calls"] = calls
    return message

def delta_object(piece):
    """What is new in a stream: a part of the text, or of its calls, which a client joins by their index."""
    delta = {}
    if piece.thought:
        delta["reasoning_content"] = piece.thought
    if piece.text:
        delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = [dict(call, index=index) for index, call in enumerate(piece.calls)]
    grown = delta_calls(piece.parts)
    if grown:
        delta["tool_calls"] = grown
    return delta

def usage_object(asked, n_tokens):
    return dict(
        prompt_tokens=asked.n_prompt, completion_tokens=n_tokens, total_tokens=asked.n_prompt + n_tokens,
        prompt_tokens_details=dict(cached_tokens=asked.cached))

def event(body):
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"

class Protocol:
    """OpenAI's completions over an Engine, on the event loop."""

    def __init__(self, engine, args):
        self.engine = engine
        self.args = args
        self.created = int(time.time())
        self.name = model_name(args)
        self.reader = None
        if getattr(engine.tokenizer, "template", None) is not None:  # of a released checkpoint
            self.reader = TemplateReader(engine.tokenizer)

    def app(self, token):
        posts = {"/v1/chat/completions": self.chat, "/v1/completions": self.text}
        gets = {"/v1/models": self.models, "/v1/models/{name}": self.model}
        return make_app(lambda path: [token], posts, gets)

    def model_object(self):
        return dict(id=self.name, object="model", created=self.created, owned_by=MODEL_ID,
                    max_model_len=self.engine.model.cfg.max_seq_len)

    async def models(self, request):
        return reply(dict(object="list", data=[self.model_object()]))

    async def model(self, request):
        name = request.path_params["name"]
        if name != self.name:
            raise Refused(404, f"model {name!r:.60}: {self.name} is served", "model_not_found")
        return reply(self.model_object())

    async def chat(self, request):
        return await self.complete(request, is_chat=True)

    async def text(self, request):
        return await self.complete(request, is_chat=False)

    async def complete(self, request, is_chat):
        """Ask the engine -> a response, or a stream of events."""
        raw, client = request.scope["heard"]
        engine = self.engine
        # long texts take their time to become tokens: not on the event loop
        asked = await asyncio.to_thread(read_request, raw, is_chat, self.args, engine.tokenizer, engine.model.cfg,
                                        self.reader)
        asked.client = client
        client.most = UNREAD * asked.n_rows
        engine.put(asked)
        return await self.respond(asked)

    async def respond(self, asked):
        """What has been asked for, whole or as a stream of events -> the response."""
        from starlette.responses import StreamingResponse
        kind = "chat.completion" if asked.is_chat else "text_completion"
        if asked.is_stream and asked.is_chat:
            kind += ".chunk"
        name = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{os.urandom(12).hex()}"
        head = dict(id=name, object=kind, created=int(time.time()), model=asked.model)
        if asked.warnings:
            head["warnings"] = [*asked.warnings]
        if asked.is_stream:
            return StreamingResponse(self.events(asked, head), media_type="text/event-stream")
        return await self.whole(asked, head)

    async def whole(self, asked, head):
        """The answer once it is complete."""
        texts = await self.texts(asked)
        n_tokens = sum(text.n_tokens for text in texts)
        choices = [choice_object(asked, text) for text in texts]
        return reply(dict(head, choices=choices, usage=usage_object(asked, n_tokens)))

    async def texts(self, asked):
        """Wait for all texts of an answer -> a Piece for each."""
        pieces = []
        n_running = asked.n_rows
        while n_running:
            news = await asked.client.hear()
            if not news:
                raise Refused(400, "the client has left")
            pieces += news
            n_running -= sum(piece.finish is not None for piece in news)
        return join_pieces(pieces)

    async def events(self, asked, head):
        """The answer as it grows: server-sent events."""
        try:
            async for body in self.chunks(asked, head):
                yield event(body)
        except Refused as error:       # the status has long been sent
            yield event(error_object(*error.args))
            return
        yield "data: [DONE]\n\n"

    async def chunks(self, asked, head):
        """-> yields what is new: the role, texts, how each ended, what all took."""
        if asked.has_usage:
            head = dict(head, usage=None)
        if asked.is_chat:
            for index in range(asked.n_rows):
                yield dict(head, choices=[choice_object(asked, Piece(index), is_first=True)])
        n_running = asked.n_rows
        n_tokens = 0
        while n_running:
            news = await asked.client.hear()
            if not news:
                raise Refused(400, "the client has left")
            for piece in join_pieces(news):
                if piece.has_news:
                    grown = dataclasses.replace(piece, finish=None)
                    yield dict(head, choices=[choice_object(asked, grown)])
                if piece.finish:
                    end = Piece(piece.index, finish=piece.finish)
                    yield dict(head, choices=[choice_object(asked, end)])
                    n_running -= 1
                    n_tokens += piece.n_tokens
        if asked.has_usage:
            yield dict(head, choices=[], usage=usage_object(asked, n_tokens))

# ---- a server: the engine ------------------------------------------------------------------------
# One thread owns the model. Requests that wait when it looks, and are drawn from alike, become rows of one batch, whose
# prompts are computed once each. `play` yields after each forward: so several batches are alive at once, and take
# turns. A newcomer waits for one forward of each, never for a long text to end.

GATHER_S = 0.005                       # of waiting: see Engine.gather_s
LOOK_S = 0.05                          # seconds from one look for requests, or for Ctrl-C, to the next
MOST_WAITING = 512                     # requests; the next one is refused
RAGGED = 32                            # tokens that a batch's prompts may differ by: a short one waits for no long one

class Batch:
    """Rows that are decoded together: texts of requests that are drawn from alike, prompts of about one length."""

    def __init__(self, parts, engine):
        """parts: [(Asked, index of the first text, Prompt)], by length; those of one prompt lie side by side."""
        self.requests = [asked for asked, _, _ in parts]  # one for each of its prompts
        self.engine = engine
        self.cached = []               # of each row, tokens of its prompt from the prefix cache
        self.n_rows = sum(asked.n for asked in self.requests)
        first = self.requests[0]
        cfg = engine.model.cfg
        generator = engine.generator
        if first.seed is not None:
            generator = torch.Generator(generator.device).manual_seed(first.seed)

        players = []
        sizes = []
        before = None
        for asked, start, prompt in parts:
            players += [engine.write_row(asked, start + i, prompt) for i in range(asked.n)]
            if before is not None and before.ids == prompt.ids:
                sizes[-1] += asked.n
            else:
                sizes.append(asked.n)
            before = prompt

        self.steps = play(
            engine.model, players, sizes,
            Sampling(first.temperature, first.top_p, first.top_k, generator),
            record=engine.record,
            speculate=engine.speculate,
            index_warmup=engine.index_warmup,
            capacity=max(min(cfg.max_seq_len, len(prompt.ids) + asked.max_new_tokens) for asked, _, prompt in parts),
            n_best=first.n_best,
            prefixes=engine.prefixes if first.seed is None else None,  # what is kept was rounded in another batch
            cached=self.cached)

    def advance(self):
        """One forward -> whether there are more to come. What goes wrong is told to the clients."""
        if all(asked.client.gone for asked in self.requests):
            self.steps.close()         # within a prompt, too
            return False
        try:
            next(self.steps)
            self.count_cached()
            return True
        except StopIteration:
            return False
        except Exception as error:     # these requests are lost, the others go on
            status = 503 if is_out_of_memory(error) else 500
            print(f"server  | {error!r:.200}", flush=True)
            self.refuse(status, f"the model could not go on: {error!r:.200}")
            return False

    def count_cached(self):
        """Once prompts have been read, each request knows how much of its own came from the prefix cache."""
        row = 0
        for asked in self.requests if self.cached else ():
            asked.cached += self.cached[row]
            self.engine.n_cached += self.cached[row]
            row += asked.n
        self.cached.clear()

    def refuse(self, status, reason):
        for asked in self.requests:
            self.engine.refuse(asked, status, reason)

def form_batches(requests, engine):
    """Requests -> batches. One with a seed is drawn alone, from random numbers of its own: its text is the same
    whatever runs beside it."""
    alike = defaultdict(list)
    for place, asked in enumerate(requests):
        for i, prompt in enumerate(asked.prompts):
            alone = None if asked.seed is None else (place, i)
            key = asked.temperature, asked.top_p, asked.top_k, asked.n_best, alone
            alike[key].append((asked, i * asked.n, prompt))

    batches = []
    for parts in alike.values():
        parts.sort(key=lambda part: (len(part[2].ids), part[2].ids))
        start = 0
        for end in range(1, len(parts) + 1):
            shortest = len(parts[start][2].ids)
            if end == len(parts) or len(parts[end][2].ids) > shortest + RAGGED:
                batches.append(Batch(parts[start:end], engine))
                start = end
    return batches

class Engine:
    """The model's one user: it decodes what clients ask for, until it is stopped."""

    def __init__(self, model, tokenizer, index_warmup=False, speculate=0, seed=1337):
        self.model = model
        self.tokenizer = tokenizer
        self.index_warmup = index_warmup
        self.speculate = speculate
        self.record = None             # as of `play`
        self.generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
        self.came = SimpleQueue()      # requests that the event loop has put
        self.waiting = []              # ... that this thread has seen
        self.batches = []
        self.prefixes = make_prefixes(model)
        self.over = False
        self.n_requests = 0            # that were decoded, or are
        self.n_tokens = 0              # drawn for them
        self.n_cached = 0              # of their prompts, from the prefix cache

    def put(self, asked):
        """From the event loop: a request. Refused if too many wait."""
        if self.came.qsize() + len(self.waiting) >= MOST_WAITING:
            raise Refused(429, f"{MOST_WAITING} requests wait already")
        asked.came = time.monotonic()
        self.came.put(asked)
        if self.over:
            raise Refused(503, "the server is shutting down")

    def refuse(self, asked, status, reason):
        """Something went wrong within the batch of a request."""
        asked.client.tell(Refused(status, reason))

    def run(self, stop):
        """Decode until there is something in `stop`."""
        while not stop:
            self.admit()
            self.batches = [batch for batch in self.batches if batch.advance()]

    def gather_s(self):
        """Seconds that a request waits for others to come with it."""
        return GATHER_S

    def admit(self):
        """Requests that have waited a moment become batches, as many as there is room for, in their order."""
        # what has come
        with contextlib.suppress(Empty):
            if not self.batches and not self.waiting:  # nothing else to do
                self.waiting.append(self.came.get(timeout=LOOK_S))
            while True:
                self.waiting.append(self.came.get_nowait())
        self.waiting = [asked for asked in self.waiting if not asked.client.gone]
        if not self.waiting:
            return

        # others may be about to come
        too_early = self.waiting[0].came + self.gather_s() - time.monotonic()
        if too_early > 0:
            if not self.batches:
                time.sleep(too_early)
            return

        # what there is room for
        room = MOST_ROWS - sum(batch.n_rows for batch in self.batches)
        n_admitted = 0
        for asked in self.waiting:
            room -= asked.n_rows
            if room < 0:
                break
            n_admitted += 1
        admitted = self.waiting[:n_admitted]
        self.waiting = self.waiting[n_admitted:]
        self.n_requests += n_admitted
        self.batches += form_batches(admitted, self)

    def write_row(self, asked, index, prompt):
        """A player of the loop: one text of an answer. It ends with the text, or as the client hangs up."""
        client = asked.client
        tokenizer = self.tokenizer
        stream = Stream(asked.stops)
        parser = None if asked.form is None else asked.form.parser()
        waiting = []                       # Scores whose text has not been released
        finish = None
        kept = 0
        feed = prompt.ids
        left = min(asked.max_new_tokens, self.model.cfg.max_seq_len - len(prompt.ids))

        while finish is None:
            token, logprob, _, *more = yield kept, feed
            if client.gone:
                return
            self.n_tokens += 1
            left -= 1
            kept += len(feed)
            feed = [token]
            if token in tokenizer.stops:
                finish = "stop"
                new = stream.feed(b"", final=True)
            else:
                raw = tokenizer.decode_bytes([token])
                if asked.has_logprobs:
                    best = more[0] if more else []
                    best = [(tokenizer.decode_bytes([int(one)]), score) for one, score in best]
                    waiting.append(Score(raw, logprob, best, len(stream.text)))
                new = stream.feed(raw)
                if stream.done:
                    finish = "stop"
                elif left == 0:
                    finish = "length"
                    new += stream.feed(b"", final=True)
                    if stream.done:        # the rest held a stop text
                        finish = "stop"

            # a token is told of with the text that it begins in, and not at all where that is cut off
            scores = [score for score in waiting if score.start < stream.shown]
            del waiting[:len(scores)]
            if not new and not finish:
                continue
            said = dict(text=new)
            if parser is not None:
                said = parser.feed(new, final=finish is not None)
                if parser.is_over:
                    finish = "stop"
                if parser.calls and finish == "stop":
                    finish = "tool_calls"
                if finish:
                    asked.form.remember(parser)
            client.tell(Piece(index, scores=scores, finish=finish, n_tokens=stream.tokens, **said))

    def close(self):
        """Clients that wait, or are being answered, are told that there is an end."""
        self.over = True
        with contextlib.suppress(Empty):
            while True:
                self.waiting.append(self.came.get_nowait())
        unanswered = [asked for batch in self.batches for asked in batch.requests]
        for asked in [*self.waiting, *unanswered]:
            asked.client.tell(Refused(503, "the server is shutting down"))
        self.waiting = []
        for batch in self.batches:
            batch.steps.close()
# ---- a look inside one generation --------------------------------------------------------------
# --xray writes one page that needs no network and no other file: the text, and for the token under the cursor the key
# blocks that each layer with MSA read for each KV head, the experts it went through, and what else could have stood in
# its place. The choices are those that generation made, as `play` recorded them; nothing is chosen anew for the page.
# Arrays travel as base64 of little-endian numbers, in a JSON that no text can break out of.

XRAY_BEST = 5                          # tokens that the page lists as likeliest
XRAY_CHUNK = 128                       # tokens read at once for their logits: 100 MB of a vocabulary of 200,000

def beside(path):
    """-> a path that nobody else has, in the same folder."""
    return f"{path}.{os.urandom(6).hex()}.tmp"

def check_page(path):
    """ValueError if --xray cannot be written: it shows now, not after minutes. What is there stays."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise ValueError(f"--xray {path}: there is no folder {folder}")
    if os.path.lexists(target) and not os.path.isfile(target):
        raise ValueError(f"--xray {path}: it is not a file")
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise ValueError(f"--xray {path}: the file that is there cannot be written")
    temporary = beside(target)
    try:
        open(temporary, "xb").close()
        os.remove(temporary)
    except OSError as error:
        raise ValueError(f"--xray {path}: nothing can be written in its folder: {error.strerror}") from None

def write_page(path, text):
    """Write a file in one piece: what is there stays whole until the new one is. A link is followed."""
    target = os.path.realpath(path)
    temporary = beside(target)
    try:
        with open(temporary, "xb") as file:
            file.write(text.encode())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise

def pack_array(x):
    """An array -> a dict that JSON can hold: fp32, or whole numbers of 0 or more in as few bytes as they need."""
    x = np.asarray(x)
    kind = "<f4"
    if x.dtype.kind != "f":
        largest = int(x.max(initial=0))
        kind = next(kind for kind in ("|u1", "<u2", "<u4") if largest <= np.iinfo(kind).max)
    raw = x.astype(kind).tobytes()
    return dict(kind=kind[1:], shape=x.shape, data=base64.b64encode(raw).decode())

def make_trace(cfg, index_warmup=False):
    """-> a Trace that records what a page shows of such a model."""
    chooses = "moe" in cfg.mlp_types or ("msa" in cfg.attn_types and not index_warmup)
    return Trace(pack_routes if chooses else None)

def split_routes(notes, cfg):
    """Notes (n, r) of pack_routes -> experts (n, layers, A), blocks (n, layers, Hkv, S), -1 for none; the dimension of
    layers is empty where there was no choice."""
    n_moe = cfg.mlp_types.count("moe")
    A = cfg.n_expert_per_tok
    r = len(notes[0]) if notes else 0
    codes = np.array(notes, dtype=np.int32).reshape(len(notes), r)
    experts = codes[:, :n_moe * A].reshape(len(notes), n_moe, A)
    codes = codes[:, n_moe * A:]
    if not codes.size:                 # no layer with MSA, or its index branch is not in use yet
        return experts, np.zeros((len(notes), 0, cfg.n_kv_head, 0), dtype=np.int32)
    blocks = np.where(codes < -1, -2 - codes, -1)
    return experts, blocks.reshape(len(notes), cfg.attn_types.count("msa"), cfg.n_kv_head, -1)

def held_drafts(lengths, n_drawn):
    """Which tokens were drafts that held. lengths: tokens drawn after each forward -> their indices, of n_drawn.

    A forward's last token is drawn from its logits, those before it are drafts. Of the very last one nobody knows: a
    text may end amid the drafts that held."""
    drafts = []
    for start, end in itertools.pairwise([0, *lengths]):
        drafts += range(start, min(end - 1, n_drawn))
    return drafts

@torch.no_grad()
def read_again(model, ids, index_warmup, record):
    """Read a text once more, many tokens at once -> the likeliest tokens after each of its own (n, XRAY_BEST), their
    log-probabilities, and (n,) that of the token that came, NaN after the last one; and record's note on each token."""
    device = model.embed.weight.device
    cache = KVCache(model.cfg, 1, len(ids), device, model.dtype)
    following = torch.tensor([*ids[1:], 0])
    parts = []
    notes = []
    for start in range(0, len(ids), XRAY_CHUNK):
        idx = torch.tensor([ids[start:start + XRAY_CHUNK]], device=device)
        logits, _, aux = model(idx, cache=cache, n_logits=idx.size(1), index_warmup=index_warmup)
        notes += [[]] * idx.size(1) if record is None else list(record(aux)[0])
        logprobs = widen(logits[0]).log_softmax(-1).float().cpu()
        best = logprobs.topk(min(XRAY_BEST, logprobs.size(1)))
        came = logprobs.gather(1, following[start:start + XRAY_CHUNK, None])
        parts.append((best.indices, best.values, came[:, 0]))
    tokens, scores, came = map(torch.cat, zip(*parts))
    came[-1] = math.nan
    return tokens.numpy(), scores.numpy(), came.numpy(), notes

def shown_texts(tokenizer, ids):
    """What a page shows of each token. A character that is split over tokens stands at its last one; "" before."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [utf8.decode(tokenizer.decode_bytes([token])) for token in ids]
    texts[-1] += utf8.decode(b"", final=True)
    return texts

def xray_data(model, tokenizer, prompt_ids, drawn, trace, index_warmup=False, cached=0):
    """What the page holds, as JSON can.

    prompt_ids    tokens of the prompt
    drawn         (token, logprob) of each token behind it
    trace         Trace of `generate`
    index_warmup  as in MiniMax.forward
    cached        so many of the prompt's tokens came from the prefix cache
    """
    cfg = model.cfg
    n_prompt = len(prompt_ids)
    ids = [*prompt_ids, *(token for token, _ in drawn)]
    best, best_logprobs, came, again = read_again(model, ids, index_warmup, trace.record)
    notes = trace.notes[:len(ids)]
    if trace.record is None:           # nothing to note; the last token was not read all the same
        notes = [[]] * (len(ids) - 1)
    noted = [new if note is None else note for note, new in zip(notes, again)]
    experts, blocks = split_routes(noted, cfg)

    # log-probabilities: none of the first token; the prompt's from the second reading; the others as they were drawn
    logprobs = np.concatenate([[math.nan], came[:n_prompt - 1], [logprob for _, logprob in drawn]])
    named = sorted({*ids, *best.ravel().tolist()})
    names = {token: tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace") for token in named}
    return dict(
        attn_types=list(cfg.attn_types), mlp_types=list(cfg.mlp_types), index_warmup=index_warmup,
        n_kv_head=cfg.n_kv_head, n_expert=cfg.n_expert, n_expert_per_tok=cfg.n_expert_per_tok,
        block_size=cfg.index_block_size, top_blocks=cfg.index_topk_blocks,
        n_prompt=n_prompt, cached=cached, n_read=len(experts),
        drafts=[n_prompt + i for i in held_drafts(trace.lengths, len(drawn))],
        texts=shown_texts(tokenizer, ids), names=names, ids=pack_array(ids),
        experts=pack_array(experts), blocks=pack_array(blocks + 1),            # 0: none
        logprobs=pack_array(logprobs), best=pack_array(best), best_logprobs=pack_array(best_logprobs))

def xray_page(data):
    """Data -> the page. In the JSON no "<" is left: no text of a token ends the script element or opens a comment."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    before, after = XRAY_PAGE.split("DATA")
    return before + text + after

def write_xray(path, *args):
    """Write the page. args: of xray_data."""
    data = xray_data(*args)
    page = xray_page(data)
    write_page(path, page)
    print(f"xray    | {path}: {len(data['texts']):,} tokens, {len(page) / 1e6:.2f} MB, for a browser", flush=True)

def keep_first(steps, drawn):
    """Pass on the steps of `generate`; the first row's (token, logprob) go into a list."""
    for tokens, logprobs in steps:
        if tokens[0] >= 0:
            drawn.append((tokens[0].item(), logprobs[0].item()))
        yield tokens, logprobs

# The page. It builds a span for each token once; a move of the cursor changes the classes of two tokens and of the
# blocks whose shade is another one, and draws two small canvases.
XRAY_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>X-ray of one generation</title>
<style>
  /* --read1 to --read5: blocks that were read, by few and by all; text on them has a contrast of 4.5 or more */
  :root {
    --page: #fcfcfb; --panel: #f3f4f5; --ink: #1b1d20; --quiet: #5d6269; --rule: #c5c9ce;
    --read1: #e0ecfa; --read2: #c6dcf6; --read3: #a6c9f0; --read4: #84b3ea; --read5: #639fe2;
    --chosen: #2a74c8; --cursor: #b3480a; --draft: #007a5a; --cached: #7b4fa0;
  }
  @media (prefers-color-scheme: dark) {
    :root {
      --page: #141619; --panel: #1d2024; --ink: #eceef0; --quiet: #9aa1aa; --rule: #444a52;
      --read1: #172a40; --read2: #1a385b; --read3: #1e4775; --read4: #235590; --read5: #2964a9;
      --chosen: #64a8f5; --cursor: #ffb454; --draft: #3fc49a; --cached: #c39be8;
    }
  }

  * { box-sizing: border-box; }
  body {
    margin: 0 auto; max-width: 1480px; padding: 22px 28px 60px;
    background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif;
  }
  h1 { margin: 0; font-size: 21px; font-weight: 650; }
  h2 { margin: 0 0 6px; font-size: 14px; font-weight: 650; }
  p { margin: 0; }
  .quiet { color: var(--quiet); font-size: 13px; }
  [hidden] { display: none !important; }
  header { margin-bottom: 18px; }
  header p { margin-top: 4px; }
  main { display: grid; grid-template-columns: minmax(0, 1fr) 400px; gap: 28px; align-items: start; }

  /* the text: a span a block, in it a span a token; the cursor's followers are not read yet */
  #text {
    padding: 6px 10px; border-radius: 8px; outline-offset: 3px; cursor: default;
    font: 14px/26px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  }
  #text:focus-visible, select:focus-visible { outline: 2px solid var(--cursor); }
  .b, .t { padding-block: 3px; }
  .cut > .b + .b { box-shadow: inset 1px 0 var(--rule); }
  .r1 { background: var(--read1); }
  .r2 { background: var(--read2); }
  .r3 { background: var(--read3); }
  .r4 { background: var(--read4); }
  .r5 { background: var(--read5); }
  .own ~ .b, .cur ~ .t { color: var(--quiet); }
  .cur ~ .t { background: var(--page); }
  .cur { border-radius: 2px; outline: 2px solid var(--cursor); outline-offset: -1px; }
  .draft { text-decoration: underline 1px var(--draft); text-underline-offset: 5px; }
  .cached { text-decoration: overline dotted 2px var(--cached); }
  .eol::before { content: "\21b5"; color: var(--quiet); }
  .part::before { content: "\b7"; color: var(--quiet); }
  .first::before {
    content: "drawn \25b8"; display: inline-block; margin: 0 5px 0 3px; padding: 1px 6px;
    border: 1px solid var(--rule); border-radius: 9px; background: var(--page); color: var(--quiet);
    font: 11px/14px system-ui, "DejaVu Sans", sans-serif;
  }

  /* the panel */
  aside { position: sticky; top: 14px; display: grid; gap: 12px; max-height: calc(100vh - 28px); overflow-y: auto; }
  section { padding: 12px 14px; border-radius: 8px; background: var(--panel); }
  #name {
    display: inline-block; max-width: 100%; padding: 0 6px; border: 2px solid var(--cursor); border-radius: 4px;
    font: 600 17px/28px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  }
  #facts { min-height: 3em; }
  canvas { display: block; width: 100%; margin-bottom: 4px; }
  #map { cursor: pointer; }
  #best + p { margin-top: 6px; }
  .choose { display: flex; gap: 14px; margin-bottom: 8px; font-size: 13px; }
  select { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--quiet); border-radius: 5px; }
  #best { display: grid; grid-template-columns: minmax(0, 1fr) 130px 48px; gap: 2px 10px; font-size: 13px; }
  #best .word { font-family: ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre; overflow: hidden; }
  #best .share { text-align: right; font-variant-numeric: tabular-nums; }
  #best .bar { align-self: center; height: 9px; background: var(--quiet); border-radius: 2px; }
  #best .here { font-weight: 700; }
  #best .bar.here { background: var(--cursor); }
  .legend { display: flex; flex-wrap: wrap; gap: 6px 26px; margin-top: 12px; font-size: 13px; }
  .legend .mark, .legend .begin { margin-right: 4px; font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
  .mark { padding: 2px 3px; border-radius: 2px; }
  .begin { padding-left: 4px; border-left: 1px solid var(--quiet); }
  .scale { margin-right: 4px; }
  .scale i { display: inline-block; width: 13px; height: 14px; vertical-align: -2px; }
  kbd { padding: 0 4px; border: 1px solid var(--rule); border-radius: 4px; font: 12px ui-monospace, monospace; }
  @media (max-width: 900px) {
    body { padding: 14px 14px 30px; }
    main { grid-template-columns: minmax(0, 1fr); gap: 14px; }
    aside { order: -1; top: 0; max-height: 46vh; z-index: 1; background: var(--page); }
    .t { scroll-margin: 48vh 0 20px; }
  }
</style>
</head>
<body>
<header>
  <h1>X-ray of one generation</h1>
  <p id="lead"></p>
  <p id="size" class="quiet"></p>
  <div class="legend" aria-label="Legend">
    <div><span class="mark" style="outline: 2px solid var(--cursor)">token</span> under the cursor</div>
    <div class="msa">
      <span class="scale"><i class="r1"></i><i class="r2"></i><i class="r3"></i><i class="r4"></i><i
        class="r5"></i></span>
      a block, read by few heads or by all
    </div>
    <div class="msa"><span class="begin">text</span> <span id="edge"></span></div>
    <div class="drafts"><span class="mark draft">token</span> drafted by an MTP module, and accepted</div>
    <div class="cache"><span class="mark cached">token</span> its keys came from the prefix cache</div>
    <div class="quiet">
      <kbd>&larr;</kbd> <kbd>&rarr;</kbd> <kbd>&uarr;</kbd> <kbd>&darr;</kbd> <kbd>Home</kbd> <kbd>End</kbd> move,
      <kbd>Esc</kbd> clears, a click holds
    </div>
  </div>
</header>
<main>
  <div id="text" tabindex="0" role="application" aria-roledescription="text, token by token"
       aria-label="The text. Arrow keys move to another token." aria-describedby="facts"></div>
  <aside aria-label="The token under the cursor">
    <section aria-live="polite" aria-atomic="true">
      <div id="name">no token</div>
      <p id="facts" class="quiet"></p>
    </section>
    <section id="reads">
      <h2>Blocks it read</h2>
      <div class="choose">
        <label>layer <select id="layer"></select></label>
        <label>KV head <select id="head"></select></label>
      </div>
      <canvas id="map" role="img"></canvas>
      <p id="read" class="quiet"></p>
    </section>
    <section id="visits">
      <h2>Experts it visited</h2>
      <canvas id="grid" role="img"></canvas>
      <p id="visited" class="quiet"></p>
    </section>
    <section>
      <h2>What could have stood here</h2>
      <div id="best"></div>
      <p class="quiet">by the model itself: temperature 1, nothing cut</p>
    </section>
  </aside>
</main>
<noscript><p>This page draws itself with JavaScript, which is switched off.</p></noscript>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const LEVELS = 5;                      // shades of a block
const at = id => document.getElementById(id);
const data = JSON.parse(at("data").textContent);

// ---- data: arrays of numbers, laid out as their shapes say ----

function unpack({kind, shape, data}) {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const Kind = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array}[kind];
  const array = new Kind(bytes.buffer);
  array.shape = shape;
  return array;
}

const ids = unpack(data.ids);
const experts = unpack(data.experts);  // (tokens read, MoE layers, A)
const blocks = unpack(data.blocks);    // (tokens read, MSA layers, KV heads, S): a block + 1, or 0
const logprobs = unpack(data.logprobs);
const best = unpack(data.best);        // (tokens, XRAY_BEST): of the token after each
const bestLogprobs = unpack(data.best_logprobs);

const L = data.block_size;
const nTokens = ids.length;
const nBlocks = Math.ceil(nTokens / L);
const layersOf = (types, kind) => [...types.keys()].filter(i => types[i] === kind);
const msaLayers = layersOf(data.attn_types, "msa").slice(0, blocks.shape[1]);
const moeLayers = layersOf(data.mlp_types, "moe");
const nHeads = data.n_kv_head;
const hasMsa = msaLayers.length > 0;
const drafts = new Set(data.drafts);
const counts = new Uint16Array(nBlocks);   // layers and heads that read a block
const shades = new Uint8Array(nBlocks);    // what the page shows of it
const say = x => x.toLocaleString("en");
const plural = (n, word) => `${say(n)} ${word}${n === 1 ? "" : "s"}`;
const visible = text => text.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");

// ---- the text, built once: a span a block, in it a span a token ----

const tokenSpans = [];
const blockSpans = [];

function addText(span, text) {
  text.split("\n").forEach((line, i) => {
    if (i > 0) {                       // a mark that a cursor can point at; it is no part of the text
      span.appendChild(document.createElement("i")).className = "eol";
      span.append("\n");
    }
    span.append(line);
  });
}

for (let i = 0; i < nTokens; i++) {
  if (i % L === 0 || i === 0) {
    const block = document.createElement("span");
    block.className = "b";
    blockSpans.push(block);
  }
  const span = document.createElement("span");
  const kinds = ["t"];
  if (drafts.has(i)) kinds.push("draft");
  if (i < data.cached) kinds.push("cached");
  if (i === data.n_prompt) kinds.push("first");
  if (data.texts[i] === "") kinds.push("part");
  span.className = kinds.join(" ");
  span.number = i;
  addText(span, data.texts[i]);
  blockSpans.at(-1).append(span);
  tokenSpans.push(span);
}
at("text").append(...blockSpans);
at("text").classList.toggle("cut", hasMsa);

// ---- what is the same for every token ----

const readsOf = {
  full: "full attention, reads all",
  msa: "MSA, which still learns, reads all",
  swa: "a window, reads the last tokens",
  lightning: "Lightning, reads a state"};
const readsAll = data.attn_types.every(type => type === "full" || type === "msa");
let why = "This model has full attention in every layer: each token read all text before it";
if (data.index_warmup && data.attn_types.includes("msa"))
  why = "The model's index branch was still learning: its layers read all text before a token";
else if (!readsAll) why = "No layer of this model chooses blocks: see the list of layers for what each reads";
at("lead").textContent = hasMsa
  ? "Point at a token. Blue are the blocks of text that it read through sparse attention (MSA), "
    + "stronger where more layers and KV heads chose them; grey text did not exist yet."
  : `Point at a token. ${why}, so no blocks are shaded.`;

const facts = [`${plural(nTokens, "token")}: ${say(data.n_prompt)} of the prompt, `
               + `${say(nTokens - data.n_prompt)} drawn`];
if (drafts.size) facts.push(`${plural(drafts.size, "draft")} accepted`);
if (data.cached) facts.push(`${say(data.cached)} from the prefix cache`);
facts.push(`${plural(data.attn_types.length, "layer")}, ${msaLayers.length} with MSA, `
           + `${moeLayers.length} with experts`);
if (hasMsa) facts.push(`each KV head reads ${data.top_blocks} blocks of ${plural(L, "token")}`);
at("size").textContent = facts.join(" \u00b7 ");
at("edge").textContent = `a block of ${plural(L, "token")} begins`;

at("reads").hidden = !hasMsa;
at("visits").hidden = moeLayers.length === 0;
const showAll = (name, shown) => document.querySelectorAll(name).forEach(x => { x.hidden = !shown; });
showAll(".msa", hasMsa);
showAll(".drafts", drafts.size > 0);
showAll(".cache", data.cached > 0);

at("layer").append(new Option(`all ${msaLayers.length} with MSA`, -1));
data.attn_types.forEach((type, i) => {
  const row = msaLayers.indexOf(i);
  const option = new Option(row < 0 ? `${i}: ${readsOf[type]}` : i, row);
  option.disabled = row < 0;
  at("layer").append(option);
});
at("head").append(new Option(`all ${nHeads}`, -1));
for (let i = 0; i < nHeads; i++) at("head").append(new Option(i, i));

// ---- two pictures of the panel ----

let colour = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["page", "ink", "quiet", "rule", "chosen", "cursor"])
    colour[name] = style.getPropertyValue("--" + name);
}

const rowHeight = rows => Math.max(1, Math.min(16, Math.floor(230 / rows)));
const withoutGap = height => height > 3 ? height - 1 : height;

/* A canvas of so many rows, cleared, with a label left of each where there is room -> context, left edge, width */
function clear(canvas, rows, labels) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.parentElement.clientWidth - 28;
  const height = rows * rowHeight(rows);
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = height + "px";
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  if (rowHeight(rows) < 11) return {context, left: 0, width};
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.fillStyle = colour.quiet;
  context.textBaseline = "middle";
  labels.forEach((label, i) => context.fillText(label, 0, (i + 0.5) * rowHeight(rows)));
  const left = 8 + Math.max(...labels.map(label => context.measureText(label).width));
  return {context, left, width: width - left};
}

const mapLabels = msaLayers.flatMap(layer => [...Array(nHeads).keys()].map(head => `layer ${layer}, head ${head}`));
const gridLabels = moeLayers.map(layer => `layer ${layer}`);

let mapLeft = 0;                       // where its rows begin, behind their labels

function drawMap(i) {
  const rows = msaLayers.length * nHeads;
  const S = blocks.shape[3];
  const height = rowHeight(rows);
  const {context, left, width} = clear(at("map"), rows, mapLabels);
  mapLeft = left;
  const own = i < 0 ? -1 : Math.floor(i / L);
  const step = width / nBlocks;
  const drawn = Math.max(step - (step > 4 ? 1 : 0), 3);
  for (let row = 0; row < rows; row++) {
    const y = row * height;
    context.globalAlpha = isChosen(row) ? 1 : 0.3;
    context.fillStyle = colour.page;
    context.fillRect(left, y, width, withoutGap(height));
    if (i < 0 || i >= data.n_read) continue;
    context.fillStyle = colour.rule;
    if (height > 3) context.fillRect(left, y + (height >> 1) - 1, (own + 1) * step, 1);
    context.fillStyle = colour.chosen;
    for (let slot = 0; slot < S; slot++) {
      const block = blocks[(i * rows + row) * S + slot] - 1;
      if (block >= 0) context.fillRect(left + block * step, y, drawn, withoutGap(height));
    }
  }
  context.globalAlpha = 1;
  if (i < 0) return;
  context.fillStyle = colour.cursor;
  context.fillRect(left + (own + 1) * step, 0, 1, rows * height);
}

/* A click on the map shows the text there */
at("map").addEventListener("click", event => {
  const share = (event.offsetX - mapLeft) / (at("map").clientWidth - mapLeft);
  const block = Math.max(0, Math.min(nBlocks - 1, Math.floor(share * nBlocks)));
  blockSpans[block].scrollIntoView({block: "center"});
});

function drawGrid(i) {
  const rows = moeLayers.length;
  const A = data.n_expert_per_tok;
  const height = rowHeight(rows);
  const {context, left, width} = clear(at("grid"), rows, gridLabels);
  const step = width / data.n_expert;
  const drawn = Math.max(step - (step > 4 ? 1 : 0), 1);
  for (let row = 0; row < rows; row++) {
    context.fillStyle = colour.page;
    for (let expert = 0; expert < data.n_expert; expert++)
      context.fillRect(left + expert * step, row * height, drawn, withoutGap(height));
    if (i < 0 || i >= data.n_read) continue;
    context.fillStyle = colour.ink;
    for (let k = 0; k < A; k++)
      context.fillRect(left + experts[(i * rows + row) * A + k] * step, row * height, drawn, withoutGap(height));
  }
}

// ---- the token under the cursor ----

let current = -1;
let isHeld = false;

function isChosen(row) {
  const layer = Number(at("layer").value);
  const head = Number(at("head").value);
  return (layer < 0 || layer === Math.floor(row / nHeads)) && (head < 0 || head === row % nHeads);
}

/* Count who read which block, and give the blocks whose shade has changed their new class -> blocks that were read */
function shade(i) {
  counts.fill(0);
  const rows = msaLayers.length * nHeads;
  const S = blocks.shape[3];
  let chosenRows = 0;
  if (i >= 0 && i < data.n_read)
    for (let row = 0; row < rows; row++) {
      if (!isChosen(row)) continue;
      chosenRows++;
      for (let slot = 0; slot < S; slot++) {
        const block = blocks[(i * rows + row) * S + slot];
        if (block > 0) counts[block - 1]++;
      }
    }
  const own = hasMsa && i >= 0 ? Math.floor(i / L) : -1;
  let found = 0;
  for (let block = 0; block < nBlocks; block++) {
    const level = counts[block] ? Math.ceil(LEVELS * counts[block] / chosenRows) : 0;
    const now = level + (block === own ? 8 : 0);
    found += counts[block] > 0;
    if (now === shades[block]) continue;
    shades[block] = now;
    blockSpans[block].className = "b" + (level ? " r" + level : "") + (block === own ? " own" : "");
  }
  return found;
}

function describe(i) {
  if (i < 0) return "Point at a token, or press an arrow key.";
  const words = [`token ${say(i + 1)} of ${say(nTokens)}`];
  if (i >= data.n_prompt) words.push(drafts.has(i) ? "a draft that was accepted" : "drawn");
  else words.push(i < data.cached ? "of the prompt, from the prefix cache" : "of the prompt");
  words.push(`id ${ids[i]}`);
  if (!Number.isNaN(logprobs[i]))
    words.push(`log-probability ${logprobs[i].toFixed(2).replace("-", "\u2212")} (${percent(logprobs[i])})`);
  let text = words.join(" \u00b7 ");
  if (i >= data.n_read) text += ". Drawn last, the model never read it: it chose no blocks and no experts.";
  return text;
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.1 ? "<0.1 %" : share.toFixed(share < 9.95 ? 1 : 0) + " %";
}

/* The likeliest tokens in this place, and the one that came */
function listBest(i) {
  const n = best.shape[1];
  const rows = [];
  for (let k = 0; i > 0 && k < n; k++) rows.push([best[(i - 1) * n + k], bestLogprobs[(i - 1) * n + k]]);
  if (i > 0 && !rows.some(([id]) => id === ids[i])) rows.push([ids[i], logprobs[i]]);
  const cells = rows.flatMap(([id, logprob]) => {
    const here = id === ids[i] ? " here" : "";
    const [word, bar, share] = ["word", "bar", "share"].map(name => {
      const cell = document.createElement("div");
      cell.className = name + here;
      return cell;
    });
    word.textContent = visible(data.names[id]);
    bar.style.width = 130 * Math.exp(logprob) + 1 + "px";
    share.textContent = percent(logprob);
    return [word, bar, share];
  });
  at("best").replaceChildren(...cells);
  if (!rows.length) at("best").textContent = i === 0 ? "Nothing comes before the first token." : "\u2013";
}

/* Move to token i; -1: none */
function show(i) {
  if (current >= 0) tokenSpans[current].classList.remove("cur");
  current = i;
  if (i >= 0) tokenSpans[i].classList.add("cur");
  const isRead = i >= 0 && i < data.n_read;

  // its blocks
  const found = shade(i);
  if (hasMsa) {
    drawMap(i);
    const before = Math.floor(Math.max(i, 0) / L) + 1;
    let share = `${found} of the ${plural(before, "block")} so far`;
    if (before === 1) share = "The only block so far";
    else if (before <= data.top_blocks) share = `All ${before} blocks so far: every head reads as many`;
    at("read").textContent = isRead ? `${share}. Left to right is the whole text: a click goes there.` : "\u2013";
    at("map").setAttribute("aria-label", isRead ? `Blocks ${listBlocks()} were read.` : "No blocks.");
  }

  // its experts
  if (moeLayers.length) {
    drawGrid(i);
    const A = data.n_expert_per_tok;
    const visits = moeLayers.map((layer, row) => {
      const first = (i * moeLayers.length + row) * A;
      return `layer ${layer}: ${[...experts.slice(first, first + A).sort()].join(", ")}`;
    });
    at("visited").textContent = !isRead ? "\u2013" : moeLayers.length <= 6 ? visits.join(" \u00b7 ")
      : `${A} of ${data.n_expert} in each of ${moeLayers.length} layers`;
    at("grid").setAttribute("aria-label", isRead ? "Experts. " + visits.join("; ") : "No experts.");
  }

  // the token itself
  at("name").textContent = i < 0 ? "no token" : visible(data.names[ids[i]]);
  at("facts").textContent = describe(i);
  listBest(i);
}

function listBlocks() {
  const found = [];
  counts.forEach((count, block) => { if (count) found.push(block); });
  return found.join(", ");
}

// ---- pointer and keys ----

let pointed = -1;
let isWaiting = false;

at("text").addEventListener("mouseover", event => {
  const span = event.target.closest(".t");
  if (!span || isHeld) return;
  pointed = span.number;
  if (isWaiting) return;
  isWaiting = true;                    // at most one change a frame
  requestAnimationFrame(() => {
    isWaiting = false;
    if (pointed !== current && !isHeld) show(pointed);
  });
});

at("text").addEventListener("click", event => {
  const span = event.target.closest(".t");
  if (!span) return;
  isHeld = !(isHeld && span.number === current);
  show(span.number);
});

/* The token above or below, nearest to this one's left edge */
function vertical(i, way) {
  const edge = j => tokenSpans[j].getClientRects()[0] || tokenSpans[j].getBoundingClientRect();
  const from = edge(i);
  let found = i;
  let line = null;
  for (let j = i + way; j >= 0 && j < nTokens; j += way) {
    const here = edge(j);
    if (Math.abs(here.top - from.top) < 4) continue;
    if (line === null) line = here.top;
    if (Math.abs(here.top - line) >= 4) break;
    if (found === i || Math.abs(here.left - from.left) < Math.abs(edge(found).left - from.left)) found = j;
  }
  return found;
}

at("text").addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const moves = {
    ArrowRight: i => Math.min(i + 1, nTokens - 1),
    ArrowLeft: i => Math.max(i - 1, 0),
    ArrowDown: i => i < 0 ? 0 : vertical(i, 1),
    ArrowUp: i => i < 0 ? 0 : vertical(i, -1),
    Home: () => 0,
    End: () => nTokens - 1,
  };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  isHeld = true;
  show(move(current));
  tokenSpans[current].scrollIntoView({block: "nearest"});
});

document.addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  isHeld = false;
  show(-1);
});

at("layer").addEventListener("change", () => show(current));
at("head").addEventListener("change", () => show(current));
window.addEventListener("resize", () => show(current));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); show(current); });

/* The last token that the model read in the upper three quarters of the window: what it read is in sight, too */
function firstShown() {
  let low = 0;
  let high = data.n_read - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (tokenSpans[middle].getBoundingClientRect().bottom < 0.75 * window.innerHeight) low = middle;
    else high = middle - 1;
  }
  return low || data.n_read - 1;       // on a narrow screen the text begins below
}

// begin with token N of an address that ends in #token=N, or with one that has something to show
readColours();
const asked = Number(new URLSearchParams(location.hash.slice(1)).get("token"));
if (asked >= 1 && asked <= nTokens) {
  tokenSpans[asked - 1].scrollIntoView({block: "center"});
  show(asked - 1);
} else show(firstShown());
</script>
</body>
</html>
"""

# ---- the script --------------------------------------------------------------------------------

MAX_SAMPLES = 1024                     # of --n-samples: each has its keys and values
MAX_DRAFTS = 64                        # of --speculate: hardly any text holds so many
PLAIN_TOKENS = 32                      # drawn without drafts, too, to say which of the two is faster
NOISE = 0.03                           # share by which two runs of the same differ

class TokenIds:
    """Stands in for the tokenizer of a released checkpoint that has none beside it: its text is ids, as in 1,2,3."""
    eot = -1  # no id ends a sample
    bos = -1
    stops = frozenset()
    template = None

    def __init__(self, n_vocab):
        self.n_vocab = n_vocab

    def encode(self, text):
        words = text.split(",")
        for word in words:
            if not re.fullmatch(r"\s*[0-9]{1,9}\s*", word) or int(word) >= self.n_vocab:
                raise ValueError(f"prompt {text[:100]!r}: the folder of --hf has no tokenizer.json, so that a prompt "
                                 f"is ids below {self.n_vocab}, as in 1,2,3")
        return list(map(int, words))

    def decode_bytes(self, ids):
        return "".join(f",{i}" for i in ids).encode()

@dataclasses.dataclass
class Prompt:
    ids: list                          # what the model reads
    allowed: torch.Tensor = None       # (V,) bool: what the first new token may be; None: any
    taken: int = 0                     # bytes of the text that heal took back: the first new token begins with them

def read_standard_input():
    """-> all of standard input. ValueError if it is closed or not UTF-8."""
    if sys.stdin is None:
        raise ValueError("--prompt -: standard input is closed")
    return decode_text(sys.stdin.buffer.read(), "--prompt -: standard input")

def decode_text(raw, source):
    """Bytes -> text. ValueError, naming the source, if they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        kind = guess_kind(raw)
        raise ValueError(f"{source} must be UTF-8; from byte {error.start} it is {kind}") from None

def standard_input_is_piped():
    """Whether standard input is a pipe or a file, not a terminal or /dev/null; nothing is read, so nothing waits."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)

def parse_args(argv):
    p = Parser(__doc__)
    p.add_argument("--out", default="out", help="folder of the checkpoint that train.py wrote")
    p.add_argument("--hf", help="folder of a released checkpoint (M2, or M3's text model) instead; its text needs pip "
                   "install tokenizers jinja2; how it is sampled, its generation_config.json says")
    p.add_argument("--layers", type=layer_range, metavar="A:B",
                   help="with --hf: layers A to B - 1 alone, between embedding and head; only their files are needed")
    p.add_argument("--offload", action="store_true",
                   help="with --hf: read each layer from disk when its turn comes, and of its experts those that are "
                   "chosen, for a model that is larger than memory; the script says how slow that is")
    p.add_argument("--partial", action="store_true",
                   help="with --hf: tensors may be unknown, or missing: those begin as in a new model")
    p.add_argument("--prompt", type=utf8, default="",
                   help="text to continue, - for all of standard input; with --chat and a template, what the system "
                   "says; token ids, as in 1,2,3, where the folder of --hf has no tokenizer.json")
    p.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue, - for standard input")
    p.add_argument("--chat", action="store_true", help=f"a conversation, line by line: {HELP}")
    p.add_argument("--max-new-tokens", type=number(1, math.inf), default=200)
    p.add_argument("--n-samples", type=number(1, MAX_SAMPLES), default=1, help="continuations, drawn together")
    p.add_argument("--temperature", type=number(0.001, 1000, float, zero=True), default=0.8, help="0 = greedy")
    p.add_argument("--top-p", type=number(0, 1, float, above=True), default=0.95)
    p.add_argument("--top-k", type=number(0, math.inf), default=40, help="0 = off")
    p.add_argument("--stop", type=utf8, action="append", default=[], help="a text that ends a sample (may be repeated)")
    p.add_argument("--speculate", type=number(0, MAX_DRAFTS), default=0, metavar="K",
                   help=f"tokens that MTP modules draft for each forward, at most {MAX_DRAFTS}, 0 = none: the text is "
                   "distributed as without")
    p.add_argument("--seed", type=number(0, 2 ** 63 - 1), default=1337)
    p.add_argument("--serve", type=number(0, 65535), metavar="PORT",
                   help="answer requests in OpenAI's protocol there, on loopback, until Ctrl-C; 0 = any port. Where a "
                   "request says nothing, the flags above do. With --hf and a chat template, thoughts and tool calls "
                   "are told apart; pip install starlette uvicorn")
    p.add_argument("--token", type=utf8, help="key that clients of --serve must show; default: one is made and printed")
    p.add_argument("--xray", type=utf8, metavar="FILE",
                   help="write a page for a browser that shows, token by token, what the first sample read and visited")
    p.add_argument("--export", metavar="DIR",
                   help="write the model and its tokenizer into a folder that transformers opens; nothing is generated")
    args = p.parse_args(argv)
    if World.from_env().size > 1:
        raise ValueError("sample.py is one process: train.py, rl.py and bench.py --what prefill run under torchrun")
    for flag in ("layers", "offload", "partial"):
        if getattr(args, flag) and args.hf is None:
            raise ValueError(f"--{flag}: only with --hf")
    if args.export is not None:
        check_export(p, args)
        return args
    if args.hf is not None:            # where a flag was not given, the folder says how its model is sampled
        p.set_defaults(**released_sampling(args.hf))
        try:
            args = p.parse_args(argv)
        except ValueError as error:
            raise ValueError(f"{os.path.join(args.hf, 'generation_config.json')}: {error}") from None
    if args.xray is not None:
        check_page(args.xray)
    if "" in args.stop:
        raise ValueError("--stop '': it must be a text of one character or more")
    if args.serve is not None:
        for flag in ("prompt", "prompt_file", "chat", "stop", "n_samples", "xray"):
            if getattr(args, flag) != p.get_default(flag):
                raise ValueError(f"--{flag.replace('_', '-')}: not with --serve, which answers requests alone")
        return args
    if args.prompt and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file: one text is continued")
    if args.chat and args.n_samples > 1:
        raise ValueError(f"--n-samples {args.n_samples}: --chat has one answer to each line")
    reads_input = "-" in (args.prompt, args.prompt_file)
    if args.chat and reads_input:
        raise ValueError("--chat reads standard input, line by line: the prompt must come from elsewhere")
    if reads_input:
        args.prompt = read_standard_input()
    elif args.prompt_file is not None:
        with open(args.prompt_file, "rb") as file:
            args.prompt = decode_text(file.read(), f"--prompt-file {args.prompt_file}")
    elif not args.prompt and not args.chat and standard_input_is_piped():
        print("input   | standard input is not read; --prompt - reads it", flush=True)
    return args

def check_export(parser, args):
    """ValueError for flags that mean nothing beside --export, and for a folder that cannot be written."""
    for flag in ("prompt", "prompt_file", "chat", "serve", "token", "xray", "speculate", "stop", "n_samples",
                 "max_new_tokens", "temperature", "top_p", "top_k"):
        if getattr(args, flag) != parser.get_default(flag):
            raise ValueError(f"--{flag.replace('_', '-')}: not with --export, which generates nothing")
    if args.device not in (None, "cpu"):
        raise ValueError(f"--device {args.device}: not with --export, which computes nothing")
    if args.offload:
        raise ValueError("--offload: not with --export, which reads the whole model; --layers A:B is smaller")
    if not args.export:
        raise ValueError("--export '': it must be the name of a folder")
    if os.path.exists(args.export) and not os.path.isdir(args.export):
        raise ValueError(f"--export {args.export}: it is there, and no folder")
    if args.hf is not None and os.path.isdir(args.export) and os.path.samefile(args.hf, args.export):
        raise ValueError(f"--export {args.export}: --hf reads from that folder; it must be another one")

def released_sampling(folder):
    """-> the flags, as text, of what generation_config.json says about sampling."""
    config = read_settings(os.path.join(folder, "generation_config.json"))
    names = ("temperature", "top_p", "top_k")
    flags = {name: str(config[name]) for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        flags["temperature"] = "0"
    return flags

def read_model(args, device, dtype):
    """-> model, tokenizer, whether the model's index branch was still learning."""
    model, tokenizer, index_warmup = read_checkpoint(args, device, dtype)
    check_drafts(model, args.speculate, "--speculate")
    return model, tokenizer, index_warmup

def read_checkpoint(args, device, dtype):
    """`read_model`, whether it can do what the flags ask or not."""
    if args.hf is None:
        try:
            state = load_checkpoint(args.out, mmap=True)
            return *load_model(state, device, dtype), in_index_warmup(state)
        except FloatingPointError as error:  # here it is bad input, not a run that diverged
            raise ValueError(str(error)) from None
    if not os.path.isdir(args.hf):
        raise ValueError(f"--hf {args.hf}: no such folder; it must hold a checkpoint's files, downloaded")
    if os.path.exists(checkpoint_path(args.hf)) and not os.path.exists(os.path.join(args.hf, "config.json")):
        raise ValueError(f"--hf {args.hf}: train.py's checkpoint lies there; it is read by --out {args.hf}")

    # first what takes a moment: the model may take minutes
    tokenizer = read_tokenizer(args.hf)
    with naming_folder(args.hf):
        checkpoint = HFCheckpoint(args.hf, args.layers, args.partial)
    tokenizer = tokenizer or TokenIds(checkpoint.cfg.vocab_size)
    check_asked(args, tokenizer, checkpoint.cfg)
    with naming_folder(args.hf):
        model = read_hf(args, checkpoint, device, dtype)
    return model, tokenizer, False

@contextlib.contextmanager
def naming_folder(folder):
    """Whatever goes wrong within is a ValueError that names the folder of --hf: errors of the file system, json,
    safetensors, or a field that is missing."""
    try:
        yield
    except Exception as error:
        said = str(error).removeprefix(f"{folder}: ")
        if not isinstance(error, ValueError):
            said = f"{type(error).__name__}: {said}"
        if said.startswith(("no such tensor", "missing or incomplete")):
            said += "; --partial reads the others"
        raise ValueError(f"--hf {folder}: {said}") from None

def check_asked(args, tokenizer, cfg):
    """ValueError for what cannot be answered, whatever the weights are: a prompt that is too long, say."""
    if args.speculate and cfg.n_mtp == 0:
        raise ValueError(f"--speculate {args.speculate}: the model has no MTP module to draft with")
    if args.export is not None or args.serve is not None:
        return
    if not args.chat:
        encode_prompt(args.prompt, tokenizer, cfg)
    elif isinstance(tokenizer, TokenIds):
        raise ValueError("--chat: the folder of --hf has no tokenizer.json, so that it cannot be talked to")
    elif tokenizer.template is None:
        raise ValueError(f"--chat: {tokenizer.folder} has no chat template")

def read_hf(args, checkpoint, device, dtype):
    """The model in the folder of --hf, an HFCheckpoint. Says what of the folder it is."""
    began = time.perf_counter()
    if args.offload:
        model = checkpoint.offload(device, dtype)
    else:
        n_params = sum(p.numel() for p in checkpoint.model_on_meta(dtype).parameters())
        check_memory(n_params * dtype.itemsize, device, "--layers A:B, or --offload")
        model = checkpoint.load(device, dtype).eval()
    seconds = time.perf_counter() - began

    cfg, whole, layers = checkpoint.cfg, checkpoint.whole, checkpoint.layers
    where = "read layer by layer, at each forward" if args.offload else f"read in {seconds:.1f} s"
    print(f"folder  | layers {layers.start}:{layers.stop} of {whole.n_layer}, {where}; "
          f"{checkpoint.bytes_read / 1e9:.2f} GB in {len(checkpoint.files)} files so far")
    if checkpoint.skipped:
        counts = ", ".join(f"{n:,} of {part}" for part, n in checkpoint.skipped.items())
        print(f"skipped | tensors that this model does not use: {counts}")
    if checkpoint.missing:
        print(f"partial | missing, so that they begin as in a new model: {in_words(checkpoint.missing)}")
    if checkpoint.unknown:
        print(f"partial | unknown, and not read: {in_words(checkpoint.unknown)}")
    released = MiniMaxConfig.m3() if whole.gemma_norm else MiniMaxConfig.m2()
    if cfg.max_seq_len < released.max_seq_len:
        print(f"context | {cfg.max_seq_len:,} tokens, as config.json says; the release has {released.max_seq_len:,}")
    return model

def print_offload(model, rate=None, n_rows=1, n_prompt=None):
    """What answers of an offloaded model took, layer by layer, and what they would take with all of the folder's
    layers.

    rate      tokens a second behind the first, of all rows together: what of a step's time is none of the layers' is
              the head's
    n_rows    answers that were drawn side by side: a step draws a token of each
    n_prompt  tokens of the only prompt
    """
    whole = model.layers[0].checkpoint.whole
    costs = [cost for layer in model.layers for cost in (layer.step_cost, layer.prompt_cost)]
    gb = sum(cost.bytes_read for cost in costs) / 1e9
    seconds = sum(cost.seconds for cost in costs)
    print(f"offload | {gb:.2f} GB read for {len(model.layers)} layers in {seconds:.1f} s")

    # a layer of each kind that the folder has: a mean over steps, and all forwards of prompts
    step_s = 0.0
    step_gb = 0.0
    prompt_s = 0.0
    for kind in map(" ".join, zip(whole.attn_types, whole.mlp_types)):
        of_kind = [layer for layer in model.layers if layer.kind == kind]
        n_steps = sum(layer.step_cost.forwards for layer in of_kind)
        if not n_steps:
            print(f"offload | no step went through a layer of the kind {kind}: what all {whole.n_layer} layers cost is "
                  "unknown")
            return
        step_s += sum(layer.step_cost.seconds for layer in of_kind) / n_steps
        step_gb += sum(layer.step_cost.bytes_read for layer in of_kind) / n_steps / 1e9
        prompt_s += sum(layer.prompt_cost.seconds for layer in of_kind) / len(of_kind)

    ending = ""
    if rate is not None:
        n_steps = model.layers[0].step_cost.forwards
        head_s = max(0.0, n_rows / rate - sum(layer.step_cost.seconds for layer in model.layers) / n_steps)
        step_s += head_s
        ending = f", {head_s:.1f} s of it for the head"
    if n_prompt is not None:
        ending += f"; {prompt_s:.0f} s to read these {n_prompt} tokens"
    drawn = "a token" if n_rows == 1 else f"a token of each of {n_rows} answers"
    print(f"offload | all {whole.n_layer} layers: about {step_s:.1f} s and {step_gb:.1f} GB {drawn}{ending}")

def choose_threads(args, model, device, ids, index_warmup):
    """-> Threads, which are tried, where nothing decides, on the first of these tokens."""
    threads = Threads(device, args.threads)
    if threads.count is None and is_offloaded(model):
        threads.use(threads.most, "all; a trial would read the layers, several times")
    elif threads.count is None:
        idx = torch.tensor([ids[:256]])
        with torch.no_grad():
            threads.choose(lambda: model(idx, n_logits=1, index_warmup=index_warmup))
    return threads

def encode_prompt(text, tokenizer, cfg):
    """-> Prompt. ValueError if the context has no room after it."""
    if isinstance(tokenizer, TokenIds):
        prompt = Prompt(tokenizer.encode(text))
    elif text:
        prompt = text_prompt(tokenizer.encode(text), tokenizer, cfg.vocab_size)
    else:
        prompt = Prompt([tokenizer.bos])
    check_room(prompt.ids, cfg.max_seq_len)
    return prompt

def text_prompt(ids, tokenizer, n_vocab):
    """Ids of a text -> Prompt, healed; not where it ends with a special token, which is whole."""
    is_ordinary = 0 <= ids[-1] < n_vocab and ids[-1] not in tokenizer.added.values()
    return Prompt(*heal(tokenizer, ids, n_vocab)) if is_ordinary else Prompt(ids)

def check_room(ids, max_seq_len):
    """ValueError if the context has no room after a prompt."""
    if len(ids) >= max_seq_len:
        raise ValueError(f"the prompt has {len(ids)} tokens; the model's context is {max_seq_len}, all included")

def card(args, model, device, why, threads, index_warmup):
    cfg = model.cfg
    total, active = model.num_params()
    print(f"model   | {total:,} parameters, {active:,} active; attention {' '.join(cfg.attn_types)}")
    if index_warmup and "msa" in cfg.attn_types:
        print("msa     | not yet: saved while the index branch was still learning, so full attention in every layer")
    if cfg.is_recurrent:
        print("cache   | windows, states or inputs of convolutions, which are overwritten: no prefix cache, no drafts")
    print(f"kernels | {implementations(model, device)}")
    print(f"device  | {device}, {str(model.dtype).removeprefix('torch.')}: {why}")
    print(f"threads | {threads}")
    if device.type == "cuda" and model.dtype.itemsize == 2:
        print("compile | the kernels of a step, by Triton, which keeps them on disk for the next start")

def text_card(args, tokenizer, cfg):
    """The lines of a start-up card that say how a released checkpoint reads and writes text."""
    if not isinstance(tokenizer, HFTokenizer):
        return
    print(f"text    | {tokenizer}")
    more = cfg.vocab_size - tokenizer.n_vocab
    if more > 0:
        print(f"vocab   | {cfg.vocab_size:,} in the model: the last {more:,} are no tokens, and have no text if drawn")
    if more < 0:
        print(f"vocab   | {cfg.vocab_size:,} in the model: a prompt with one of the last {-more:,} tokens is refused")
    flags = [f"{name.replace('_', '-')} {value}" for name, value in released_sampling(args.hf).items()]
    if flags:
        print(f"sampled | {', '.join(flags)}: generation_config.json, where no flag says otherwise")

def drawing(args):
    """How tokens are drawn, in words for a start-up card."""
    return f"temperature {args.temperature:g}, top-p {args.top_p:g}, top-k {args.top_k}"

def steps_of(args, model, tokenizer, prompt, max_new_tokens, index_warmup, speculate, accepted=None, **options):
    """`generate` with the script's flags."""
    generator = torch.Generator(model.embed.weight.device).manual_seed(args.seed)
    return generate(model, [prompt.ids], max_new_tokens, args.n_samples, args.temperature, args.top_p, args.top_k,
                    generator, tokenizer.stops, prompt.allowed, index_warmup, speculate, accepted, **options)

def continue_prompt(args, steps, tokenizer, prompt):
    """Draw the samples, print the first as it grows -> their Streams, seconds to the first token, seconds in all.
    steps: of `generate`."""
    streams = [Stream(args.stop) for _ in range(args.n_samples)]
    first_s = None
    taken = prompt.taken  # the prompt's text has shown these bytes of the first new token

    started = time.perf_counter()
    for drawn, _ in steps:
        if first_s is None:
            first_s = time.perf_counter() - started
            print(args.prompt, end="", flush=True)  # behind the progress of a long one
        for row, token in enumerate(drawn.tolist()):
            if token == -1 or token in tokenizer.stops:
                continue
            new = streams[row].feed(tokenizer.decode_bytes([token])[taken:])
            if row == 0:
                print(new, end="", flush=True)
        taken = 0
        if all(stream.done for stream in streams):
            break
    return streams, first_s, time.perf_counter() - started

def held_by_depth(accepted, speculate):
    """Drafts that held, of each verification -> by depth d, the share of verifications in which drafts 1 to d all held;
    None without a verification."""
    if not accepted:
        return None
    return [sum(n >= depth for n in accepted) / len(accepted) for depth in range(1, speculate + 1)]

def time_plain(steps):
    """Draw samples without drafts, unseen -> tokens, seconds to the first, seconds in all. steps: of `generate`."""
    n_tokens = 0
    first_s = None
    started = time.perf_counter()
    for drawn, _ in steps:
        if first_s is None:
            first_s = time.perf_counter() - started
        n_tokens += (drawn >= 0).sum().item()
    return n_tokens, first_s, time.perf_counter() - started

def rate_after_first(n_samples, n_tokens, first_s, seconds):
    """Tokens a second after each sample's first, which waits for the prompt; None if there are no more."""
    if n_tokens <= n_samples:
        return None
    return (n_tokens - n_samples) / (seconds - first_s)

def print_drafts(held, drafted, plain):
    """How many drafts held, by depth, and whether they pay: tokens a second with drafts and without."""
    line = f"drafts  | held to depth 1, 2, ...: {' '.join(f'{share:.2f}' for share in held)}"
    if drafted and plain:              # otherwise there is nothing to compare
        verdict = "drafts make no difference here"  # nor would another run find the same one
        if drafted > (1 + NOISE) * plain:
            verdict = "drafts pay"
        elif plain > (1 + NOISE) * drafted:
            verdict = "drafts do not pay here"
        line += f"; {verdict}: {drafted:.1f} tokens/s with them, {plain:.1f} without, in a second run"
    print(line)

# ---- the script: a server ------------------------------------------------------------------------

def serve(args):
    """Answer requests until Ctrl-C or SIGTERM -> what the last line of stdout says."""
    door = Door(args.serve)
    stop = on_signals()
    device, dtype, why = pick_device(args.device)
    model, tokenizer, index_warmup = read_model(args, device, dtype)
    threads = choose_threads(args, model, device, [0] * min(256, model.cfg.max_seq_len), index_warmup)
    card(args, model, device, why, threads, index_warmup)
    text_card(args, tokenizer, model.cfg)
    print(f"context | {model.cfg.max_seq_len} tokens; where a request does not say: {drawing(args)}, "
          f"{args.max_new_tokens} new tokens", flush=True)

    engine = Engine(model, tokenizer, index_warmup, args.speculate, args.seed)
    token = args.token or os.urandom(16).hex()
    protocol = Protocol(engine, args)
    if protocol.reader is not None:
        print(f"answers | {protocol.reader.card}", flush=True)
    door.open(protocol.app(token))
    print(f"server  | {door.url} key {token}", flush=True)
    began = time.perf_counter()
    try:
        engine.run(stop)
    finally:
        engine.close()
        door.close()
    if is_offloaded(model):
        print_offload(model)
    return dict(text=None, tokens=engine.n_tokens, tokens_per_s=None, prefill_s=None, accepted=None,
                cached=engine.n_cached, requests=engine.n_requests, seconds=time.perf_counter() - began)

# ---- the script: a folder for transformers -------------------------------------------------------

def stored_dtype(folder):
    """The dtype of a checkpoint of transformers, by its config.json; that of fp8 weights is what they are computed in,
    bf16 where nothing is said."""
    fields = read_json(folder, "config.json")
    fields = {**fields, **inner(fields, "text_config")}
    name = fields.get("dtype") or fields.get("torch_dtype")
    dtypes = dict(float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16)
    return dtypes.get(name, torch.bfloat16)

def export(args):
    """--export -> the script's result. Weights keep their dtype; those in fp8 are written as the numbers they mean."""
    dtype = torch.float32 if args.hf is None else stored_dtype(args.hf)
    model, tokenizer, index_warmup = read_checkpoint(args, torch.device("cpu"), dtype)
    total, active = model.num_params()
    print(f"model   | {total:,} parameters, {active:,} active; attention {' '.join(model.cfg.attn_types)}", flush=True)
    if isinstance(tokenizer, TokenIds):
        print("text    | no tokenizer to write: the folder read has none", flush=True)
        tokenizer = None

    written = model.save_hf(args.export, tokenizer, index_warmup)
    shards = {name: size for name, size in written["files"].items() if name.endswith(".safetensors")}
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    print(f"weights | {sum(shards.values()) / 1e6:,.1f} MB in {dtype}: {len(shards)} of the files")
    print(f"files   | in {args.export}: {', '.join(written['files'])}")
    for line in written["left_out"]:
        print(f"without | {line}")
    return dict(text=None, tokens=0, tokens_per_s=None, prefill_s=None, accepted=None, cached=0, export=args.export)

# ---- the script: a conversation ------------------------------------------------------------------
# A model that was not trained to converse has no template: what is said are paragraphs, parted by blank lines. A
# released one has a template, which writes what stands around each thing that is said. The context is the tokens
# themselves. What the model has said is never tokenized again, and none of it is left out, nor are its thoughts: so
# each turn begins with all of the last one's context, and only what is new is computed.

BLANK_LINE = "\n\n"
HELP = "/reset forgets all, /save FILE and /load FILE keep it, /quit or end of input ends"

class Conversation:
    """Its tokens, the model that speaks, and what it has computed."""

    def __init__(self, args, model, tokenizer, index_warmup):
        self.args = args
        self.model = model
        self.tokenizer = tokenizer
        self.index_warmup = index_warmup
        self.generator = torch.Generator(model.embed.weight.device).manual_seed(args.seed)
        self.prefixes = make_prefixes(model)
        self.begin()

        # of all answers, and of the last one
        self.n_drawn = 0
        self.accepted = []
        self.last = dict(tokens_per_s=None, prefill_s=None, cached=0)

    def begin(self):
        """The first tokens, how an answer may begin, and the texts that end one."""
        self.ids = self.tokenizer.encode(self.args.prompt)
        self.stops = [BLANK_LINE, *self.args.stop]

        # an answer begins with a word: no blank line, and no end
        allowed = [not token.startswith(b"\n") for token in self.tokenizer.spec["ranks"]]
        allowed += [False] * len(self.tokenizer.spec["special"])
        self.allowed = torch.tensor(allowed)

    def turn(self, text):
        """What someone says -> the tokens that follow those of the conversation, up to where the answer begins."""
        parting = BLANK_LINE if self.ids and not self.text.endswith(BLANK_LINE) else ""
        return self.tokenizer.encode(parting + text + BLANK_LINE)

    @property
    def text(self):
        return self.tokenizer.decode(self.ids)

    def ask(self, text):
        """One turn: read a text, print the answer as it grows. ValueError, and nothing changes, if the context has no
        room for it. Ctrl-C ends the answer, not the conversation: what was said stays."""
        ids = self.ids + self.turn(text)
        context = self.model.cfg.max_seq_len
        room = min(self.args.max_new_tokens, context - len(ids))
        if room < 1:
            raise ValueError(f"the context is full: it would have {len(ids):,} tokens, and the model's holds "
                             f"{context:,}, the answer included; nothing was read. /reset begins anew")

        n_before = len(self.ids)
        n_read = len(ids)
        self.ids = ids
        pressed = []                   # once for each Ctrl-C
        stream = Stream(self.stops)
        drawn = []                     # for --xray: tokens and logprobs
        trace = make_trace(self.model.cfg, self.index_warmup) if self.args.xray else None
        steps = keep_first(self.steps(room, trace), drawn)
        try:
            with ctrl_c_counted(pressed):
                self.answer(steps, stream, pressed)
        except KeyboardInterrupt:
            pressed.append(1)
        except Exception:              # nothing was drawn: the line is not part of the conversation
            del self.ids[n_before:]
            raise
        finally:
            steps.close()
        print(stream.feed(b"", final=True))
        if pressed:
            print("stopped | by Ctrl-C; another one ends the conversation")
        elif len(self.ids) == context:
            print(f"full    | the model's context of {context:,} tokens ends here. /reset begins anew")
        elif stream.tokens == room and not stream.done:
            print(f"stopped | after {room:,} tokens: see --max-new-tokens")
        if drawn and trace is not None:
            write_xray(self.args.xray, self.model, self.tokenizer, ids[:n_read], drawn, trace, self.index_warmup,
                       self.cached[0])

    def steps(self, room, trace):
        """`generate` behind the context, at most `room` tokens."""
        args = self.args
        self.cached = []
        return generate(self.model, [list(self.ids)], room, 1, args.temperature, args.top_p, args.top_k, self.generator,
                        self.tokenizer.stops, self.allowed, self.index_warmup, args.speculate, self.accepted,
                        self.prefixes, self.cached, trace)

    def answer(self, steps, stream, pressed):
        """Print what is drawn, and make it part of the context, until something is in `pressed`."""
        n_read = len(self.ids)
        first_s = None
        started = time.perf_counter()
        for token, _ in steps:
            seconds = time.perf_counter() - started
            if first_s is None:
                first_s = seconds
                print(f"prefill {n_read - self.cached[0]:,} of {n_read:,} tokens, {first_s:.3f} s", flush=True)
            token = token.item()
            if token in self.tokenizer.stops:
                break
            self.ids.append(token)
            self.n_drawn += 1
            print(stream.feed(self.tokenizer.decode_bytes([token])), end="", flush=True)
            if stream.done or pressed:
                break
        n_drawn = len(self.ids) - n_read
        self.last = dict(tokens_per_s=rate_after_first(1, n_drawn, first_s, seconds), prefill_s=first_s,
                         cached=self.cached[0])

    def save(self, path):
        """Write the tokens, and their text, which says with which tokenizer they go, into a file."""
        said = dict(ids=self.ids, text=self.text)
        temporary = f"{path}.{os.urandom(6).hex()}.tmp"
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                json.dump(said, file)
            os.replace(temporary, path)
        except OSError as error:
            raise ValueError(f"/save {path}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)
        print(f"saved   | {len(self.ids):,} tokens in {path}")

    def load(self, path):
        """Go on from a file of `save`. ValueError, and nothing changes, if it is none, or of another tokenizer."""
        try:
            with open(path, encoding="utf-8") as file:
                said = json.load(file)
            ids = [*said["ids"]]
            is_known = all(type(i) is int and 0 <= i < self.model.cfg.vocab_size for i in ids)
            fits = is_known and self.tokenizer.decode(ids) == said["text"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is no conversation: {type(error).__name__}: {error}"[:200]) from None
        if not fits:
            raise ValueError(f"{path} is a conversation in another vocabulary")
        self.ids = ids
        print(f"loaded  | {len(ids):,} tokens of {path}\n{self.text}")

    def obey(self, line):
        """A command -> whether the conversation goes on."""
        verb, _, path = line.partition(" ")
        path = os.path.expanduser(path.strip())
        if verb in ("/save", "/load") and not path:
            raise ValueError(f"{verb} needs a FILE")
        if line == "/quit":
            return False
        if line == "/reset":
            self.ids = []
            print("reset   | the conversation is empty")
        elif verb == "/save":
            self.save(path)
        elif verb == "/load":
            self.load(path)
        else:
            print(f"unknown | {HELP}")
        return True

class TemplateConversation(Conversation):
    """A conversation through the template of a released checkpoint. Where a template writes a whole conversation anew
    it may drop the thoughts of earlier turns, or move a newline: here it writes only what is new."""

    def begin(self):
        self.ids = []
        self.stops = self.args.stop
        self.allowed = None
        # --prompt is what the system says
        self.system = [dict(role="system", content=self.args.prompt)] if self.args.prompt else []
        self.turn("")                  # a template that fails does so before anyone has said something

    def turn(self, text):
        said = dict(role="user", content=text)
        if not self.ids:
            return self.tokenizer.encode_chat([*self.system, said])

        # of a conversation in which the same was said, all that the template writes behind the last answer: its end,
        # what is said now, and the beginning of the next answer
        answer = f"{UNMARK}answer{UNMARK}"  # no text that is encoded holds it
        before = [dict(role="user", content="question"), dict(role="assistant", content=answer)]
        return self.tokenizer.encode_chat([*self.system, *before, said], behind=answer)

@contextlib.contextmanager
def ctrl_c_counted(pressed):
    """Within it Ctrl-C adds to a list, so that a forward comes to its end; the second one is a KeyboardInterrupt."""
    def note(*_):
        pressed.append(1)
        if len(pressed) > 1:
            raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

def prefix_bytes(device):
    """How much memory a PrefixCache may take: a quarter of what is free, 1 GiB where nobody knows."""
    free = free_memory(device)
    return 2 ** 30 if free is None else free // 4

def make_prefixes(model):
    """-> a PrefixCache for a model, or None for one whose layers overwrite what they hold: what they held after a
    prefix is gone."""
    if model.cfg.is_recurrent:
        return None
    return PrefixCache(prefix_bytes(model.embed.weight.device))

def lines_of_input():
    """Lines that a person types, or a pipe brings, without their ends. ValueError for one that is not UTF-8."""
    if sys.stdin is None:
        raise ValueError("--chat: standard input is closed")
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, input() then knows arrow keys
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # for decode_text to refuse
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return

def chat(args, model, tokenizer, index_warmup):
    """--chat -> the script's result."""
    kind = Conversation if isinstance(tokenizer, Tokenizer) else TemplateConversation
    conversation = kind(args, model, tokenizer, index_warmup)
    print(f"chat    | {HELP}", flush=True)
    for line in lines_of_input():
        try:
            if line.startswith("/"):
                if not conversation.obey(line.strip()):
                    break
            elif line.strip():
                raw = line.encode("utf-8", "surrogateescape")
                conversation.ask(decode_text(raw, "a line"))
        except (ValueError, OSError) as error:
            print(f"refused | {error}", flush=True)
    if is_offloaded(model):
        print_offload(model, conversation.last["tokens_per_s"])
    held = held_by_depth(conversation.accepted, args.speculate)
    return dict(text=conversation.text, tokens=conversation.n_drawn, accepted=held, **conversation.last)

# ---- the script: a prompt -------------------------------------------------------------------------

def run(args):
    if args.export is not None:
        return export(args)
    if args.serve is not None:
        return serve(args)

    # the model, the prompt in its tokens, the start-up card
    device, dtype, why = pick_device(args.device)
    model, tokenizer, index_warmup = read_model(args, device, dtype)
    context = model.cfg.max_seq_len
    prompt = encode_prompt(args.prompt, tokenizer, model.cfg)
    threads = choose_threads(args, model, device, prompt.ids, index_warmup)
    card(args, model, device, why, threads, index_warmup)
    text_card(args, tokenizer, model.cfg)
    print(f"prompt  | {len(prompt.ids)} tokens of a context of {context}; {drawing(args)}, seed {args.seed}\n",
          flush=True)
    if args.chat:
        return chat(args, model, tokenizer, index_warmup)

    # the first sample is on the screen by the end of this; the others follow it
    room = min(args.max_new_tokens, context - len(prompt.ids))
    accepted = []
    drawn = []                         # of the first sample, for --xray: tokens and logprobs
    trace = None
    options = {}
    if args.xray is not None:
        trace = make_trace(model.cfg, index_warmup)
        options = dict(trace=trace)
    steps = steps_of(args, model, tokenizer, prompt, room, index_warmup, args.speculate, accepted, **options)
    if trace is not None:
        steps = keep_first(steps, drawn)
    streams, prefill_s, seconds = continue_prompt(args, steps, tokenizer, prompt)
    for row, stream in enumerate(streams):
        rest = stream.feed(b"", final=True)
        if row == 0:
            print(rest)
        else:
            print(f"\n---\n{args.prompt}{stream.text}")

    # what it took
    counts = [stream.tokens for stream in streams]
    if max(counts) == room < args.max_new_tokens:
        print(f"\nstopped at the model's context of {context} tokens")
    total = sum(counts)
    rate = rate_after_first(args.n_samples, total, prefill_s, seconds)
    more = "" if rate is None else f", then {rate:,.0f} tokens/s"
    print(f"\n{total} tokens: {prefill_s:.3f} s to the first{more}")
    part = prompt_part(device)
    most = peak_memory(device)
    if most is not None and len(prompt.ids) > part:
        print(f"memory  | {most / 1e6:,.0f} MB at most; the prompt was read {part:,} tokens at a time")
    if is_offloaded(model):
        print_offload(model, rate, args.n_samples, len(prompt.ids))
    if trace is not None:
        write_xray(args.xray, model, tokenizer, prompt.ids, drawn, trace, index_warmup)
    held = held_by_depth(accepted, args.speculate)
    if held:
        steps = steps_of(args, model, tokenizer, prompt, min(room, PLAIN_TOKENS), index_warmup, speculate=0)
        print_drafts(held, rate, rate_after_first(args.n_samples, *time_plain(steps)))
    texts = [args.prompt + stream.text for stream in streams]
    return dict(text=texts[0], tokens=total, tokens_per_s=rate, prefill_s=prefill_s, accepted=held, cached=0,
                texts=texts)

def main(argv=None):
    less = "; fewer --n-samples or --max-new-tokens need less"
    return command("sample.py", lambda locks: run(parse_args(argv)), less=less)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_ctrl_c)
    main()
