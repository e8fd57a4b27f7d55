"""How much of their prompts a PrefixCache finds for three kinds of clients, against the most that could be found.

    python .ci/prefix_hits.py                # no model: tokens are random numbers, lanes are empty but for one number

A request has a prompt and an answer; the next one of the same client begins with both. Of all tokens of all prompts,
the share that is found:
    ideal       tokens that some earlier request had at the same beginning, counted one by one, with endless memory
    whole       blocks of 16 tokens, endless memory
    1/2, 1/4    memory for so much of all different blocks; requests in the order in which they come
    1/4, by hit  of those that wait, the one that finds most is first (SGLang's rule, arXiv 2312.07104)
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from model import KVCache, MiniMaxConfig
from sample import PrefixCache

BLOCK = 16
LONGEST = 4096

def tokens(n):
    return [random.randrange(1 << 30) for _ in range(n)]

def few_shot():
    """Five tasks, each with 600 tokens of examples; 60 questions to each."""
    clients = []
    for _ in range(5):
        shots = tokens(600)
        clients += [[(shots + tokens(60), tokens(20))] for _ in range(60)]
    random.shuffle(clients)
    return clients

def chat():
    """30 conversations of 10 turns under one system prompt of 200 tokens; a turn brings 40 tokens, an answer 100."""
    system = tokens(200)
    clients = []
    for _ in range(30):
        context = system
        turns = []
        for _ in range(10):
            context = context + tokens(40)
            answer = tokens(100)
            turns.append((context, answer))
            context = context + answer
        clients.append(turns)
    return clients

def agents():
    """Eight groups of eight episodes with one task each, 16 turns of 30 tokens and 60 of observation; in every second
    one the context is made anew after turn 8, from its task and 100 tokens of notes."""
    clients = []
    for _ in range(8):
        task = tokens(300)
        for episode in range(8):
            context = task
            turns = []
            for turn in range(16):
                answer = tokens(30)
                turns.append((context, answer))
                context = context + answer + tokens(60)
                if turn == 8 and episode % 2:
                    context = task + tokens(100)
            clients.append(turns)
    return clients

def ideal(clients):
    """Share of tokens with an earlier request's beginning: a trie of single tokens."""
    trie = {}
    n_found = n_all = 0
    for prompt, answer in in_turn(clients):
        node = trie
        is_known = True
        for place, token in enumerate(prompt + answer):
            is_known = is_known and token in node
            node = node.setdefault(token, {})
            if place < len(prompt):
                n_found += is_known
        n_all += len(prompt)
    return n_found / n_all

def in_turn(clients):
    """All requests, the first of each client, then the second, ..."""
    for turn in range(max(map(len, clients))):
        for requests in clients:
            if turn < len(requests):
                yield requests[turn]

def run(clients, max_bytes, by_hit=False):
    """-> share found, bytes in use at the end."""
    cfg = MiniMaxConfig.tiny(
        n_layer=1, n_mtp=0, attn_types=["full"], mlp_types=["dense"], n_head=1, n_kv_head=1, head_dim=2, rotary_dim=2,
        index_head_dim=1, index_block_size=BLOCK)
    cache = KVCache(cfg, 1, LONGEST)
    prefixes = PrefixCache(max_bytes)
    waiting = [list(requests) for requests in clients]
    n_found = n_all = 0
    while waiting:
        place = 0
        if by_hit:
            finds = []
            for requests in waiting[:64]:
                path = prefixes.match(requests[0][0], cache)
                finds.append(len(path))
                prefixes.release(path)
            place = finds.index(max(finds))
        requests = waiting.pop(place)
        prompt, answer = requests.pop(0)
        if requests:
            waiting.append(requests)

        path = prefixes.match(prompt, cache)
        prefixes.insert(prompt + answer, cache, 0)
        prefixes.release(path)
        n_found += BLOCK * len(path)
        n_all += len(prompt)
    return n_found / n_all, prefixes.bytes

def main():
    random.seed(0)
    print("clients  | requests | tokens of prompts | ideal | whole |  1/2  |  1/4  | 1/4, by hit")
    for make in (few_shot, chat, agents):
        clients = make()
        requests = list(in_turn(clients))
        whole, n_bytes = run(clients, 1 << 40)
        shares = [ideal(clients), whole, run(clients, n_bytes // 2)[0], run(clients, n_bytes // 4)[0]]
        shares.append(run(clients, n_bytes // 4, by_hit=True)[0])
        n_tokens = sum(len(prompt) for prompt, _ in requests)
        print(f"{make.__name__:8} | {len(requests):8,} | {n_tokens:17,} | " + " | ".join(f"{x:5.1%}" for x in shares))

if __name__ == "__main__":
    with torch.no_grad():
        main()
