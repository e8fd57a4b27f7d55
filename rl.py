"""Forge, MiniMax's agent-RL system (arXiv 2605.26494), in one file: agents, gateway, queue, prefix trees, CISPO.

    python rl.py                                # a model learns to use a calculator: two CPU cores, three minutes
    python rl.py --task maze                    # key-value maze, five minutes; --turns 40: a longer one
    python rl.py --task cap                     # the same in a context that is too small
    python bench.py --what queue                # strict FIFO, window and greedy on one virtual clock
    python rl.py --serve 8000                   # agents in other processes, through OpenAI's chat-completions protocol

    agents   know a completion interface and nothing else: messages -> text
    gateway  records what crosses it, by token: id, log-prob, version of the policy; nothing is tokenised twice
    queue    windowed FIFO over groups: the trainer takes finished ones from [head, head + W - 1]
    rollout  all episodes in lock step, a token a forward; prompts and tool results are forced tokens
    train    a turn is a sample (context, action); the samples of a group merge into a prefix tree
    loss     CISPO: -1/Z sum sg(min(pi / pi_old, 1 + eps)) A log pi;  A = reward to go - mean return of the others
             Z: action tokens of a step, sg: stop gradient, pi: the policy, pi_old: that of the rollout, A: advantage

Differs from M2: clip, rewards' weights and baseline, not published, are ours, and marked. A stuck task fails at a
deadline; the report's window would wait for ever.
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: no traceback
    at_ctrl_c = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import asyncio
import bisect
import contextlib
import json
import math
import re
import sys
import time
import typing
from dataclasses import asdict, dataclass, field
from queue import Empty, SimpleQueue
from random import Random

import numpy as np
import torch

from model import Context, Losses, MiniMax, MiniMaxConfig, rope_tables
from msa import widen
from sample import (Door, Parser, Refused, Sampling, SaveTimer, Threads, Tokenizer, check_fields, check_figure,
                    check_finite, check_memory, check_weights, checkpoint_path, command, figure_format, implementations,
                    learn_bpe, load_checkpoint, load_model, load_optimizers, lock_folder, lockstep, make_app,
                    message_text, number, on_signals, pack_routes, pick_device, refusal, reply, save_checkpoint)
from train import (checkpoint_parts, configure_optimizers, is_index, merge_args, round_up, set_rates, share_done,
                   step_bytes, update)

EPS_HIGH = 4.0                         # not published: upper clip of the ratio, 1 + 4
# not published: rewards
PROCESS = -0.1                         # of a malformed call
SPEED = 0.1                            # weight of speed
FAILURE = -0.1                         # of a task that got stuck
# seconds on the virtual clock
CALL_S = 1.0                           # of a call
CHAR_S = 0.02                          # of a character
TRAIN_S = 4.0                          # of a training step
MAX_NEW = 16                           # tokens of one completion at most
STOP = {ord("]"), ord(".")}            # a call or an answer ends with one of these
CAP = 64                               # characters of context in --task cap
# imitation
WARM_LR = 1.2e-2                       # its rate
WARM_TASKS = 64                        # of a step
WARM_EVERY = 20                        # steps between its saves, and between its lines
WRONG = 1.2                            # characters of a demonstration that the teacher gets wrong, on average
# the run
MINUTES = dict(calculator=2.9, maze=4.9, cap=4.9)  # where neither --minutes nor --steps is given
WINDOW_SHARE = 0.3                     # of --slots: the queue's window
EMA = 0.9                              # what the running mean of the share solved keeps of itself in a step
BIAS_SHARE = 0.05                      # u of the router's load balancing, as a share of the rate: see run
# a collapse
COLLAPSE_STEPS = 30                    # steps that it is judged by
COLLAPSE_SOLVED = 0.05                 # share of their episodes that is solved, at most
COLLAPSE_ENTROPY = 0.5                 # of the first step's: by then the policy has settled
MICRO_TOKENS = 16384                   # slots of a micro-batch at most, so that its activations fit a small GPU
ROUNDING = 16                          # units of the last place: eight times what is left of terms that cancel
MAX_BODY = 1 << 20                     # bytes of a request to the gateway
MOMENT = 0.002                         # seconds in which the end of a client that has left arrives behind its request
KEY_FIELD = {"/v1/chat/completions": "model", "/v1/finish": "task"}  # path -> where a request names its episode

MADE_BY = ("task", "turns", "preset", "attn", "mtp")  # what the model of a checkpoint depends on

# ---- agents: they see messages and text, nothing of the model ------------------------------------
# An agent is a coroutine. It yields a list of messages, {role, content}, and is sent the text that the policy writes in
# reply: that is a turn. A tool answers a call, and the next turn's messages hold call and answer. An episode is all
# turns from a task to its end. A group is several episodes of one task: they differ in what was sampled alone, so that
# the others' returns say how good one episode is. Texts are in a language of a few characters, which a model of a
# million parameters learns in a minute:
#     Q12+3;     a task of the calculator        t1[12+3]   a call, 1: a thought, how many operations remain
#     =15;       what the tool says, =?; if the call is malformed             A15.   the answer, which ends an episode

def size(messages):
    """Characters of a context."""
    return sum(len(message["content"]) for message in messages)

class Task:
    """Calls of a tool, then an answer.

    A subclass has
    prompt, answer   texts, or what str makes one
    difficulty       about the number of calls that it takes
    alphabet         characters of a call's arguments
    tool             a call's text -> observation, with its last mark; None for a malformed call
    expert           messages -> text: a teacher
    """
    cap = math.inf                     # characters of context; an episode that needs more fails

    def agent(self):
        """One episode: yields messages, is sent a completion's text, None if the context is too long -> a reward for
        each turn, success, virtual seconds.

        Success pays 1, and for speed SPEED * h(x), h(x) = clip(1 - x, -1, 1), x the episode's time over a baseline. An
        answer that differs from the tool's last observation fails, even if it is right, and costs as a malformed call
        does: otherwise guessing would look safe. Under a cap, the call D] drops all messages but the prompt and the
        last observation: what to forget is an action, too. Past its limit of turns an episode has failed."""
        prompt = dict(role="user", content=self.prompt)
        baseline = 2 * self.difficulty * (CALL_S + 8 * CHAR_S)
        limit = self.difficulty + 3
        if self.cap < math.inf:
            limit += self.difficulty   # to drop takes a turn
        messages = [prompt]
        rewards = []
        seconds = 0.0
        given = None                   # what the tool said last
        while len(rewards) < limit and size(messages) <= self.cap:
            text = yield messages
            if text is None:
                break
            seconds += CALL_S + CHAR_S * len(text)

            # an answer ends the episode
            if text.startswith("A"):
                known = given is not None and text == f"A{given}."
                success = known and given == str(self.answer)
                reward = 0.0 if known else PROCESS
                if success:
                    reward += 1.0 + SPEED * max(-1.0, min(1.0, 1 - seconds / baseline))
                return [*rewards, reward], success, seconds

            # a turn of forgetting, or a call of the tool
            if text == "D]" and self.cap < math.inf:
                messages = [prompt, *messages[1:][-1:]]
                rewards.append(0.0)
                continue
            observation = self.tool(text)
            if observation:
                given = observation[:-1]
            reply = dict(role="tool", content=f"={observation or '?;'}")
            messages = [*messages, dict(role="assistant", content=text), reply]
            rewards.append(PROCESS if observation is None else 0.0)
        return rewards or [0.0], False, seconds

class Calculator(Task):
    """One to three operations, one a call: Q12*3+45; t2[12*3] =36; t1[36+45] =81; A81. The thought: how many remain."""
    OPS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    alphabet = "0123456789"

    def __init__(self, rng):
        self.difficulty = rng.randint(1, 3)
        results = [-1]
        while not all(0 <= result <= 999 for result in results):
            results = [rng.randint(2, 99)]
            self.terms = [str(results[0])]
            for op in map(rng.choice, ["+-*"] * self.difficulty):
                n = rng.randint(2, 9 if op == "*" else 99)
                self.terms.append(f"{op}{n}")
                results.append(self.OPS[op](results[-1], n))
        self.prompt = f"Q{''.join(self.terms)};"
        self.answer = results[-1]

    def tool(self, text):
        """Parsed, never evaluated; None for what is too large as well."""
        call = re.fullmatch(r"t\d\[(\d{1,4})([+*-])(\d{1,4})\]", text)
        if call is None:
            return None
        result = self.OPS[call[2]](int(call[1]), int(call[3]))
        return f"{result};" if 0 <= result <= 9999 else None

    def expert(self, messages):
        """The next operation, on the last result. When none is left, that is the answer. When a call has failed, the
        teacher gives up, with 0."""
        done = len(messages) // 2
        last = messages[-1]["content"][1:-1]
        if done >= self.difficulty or last == "?":
            return f"A{last.replace('?', '0')}."
        left = last if done else self.terms[0]
        return f"t{self.difficulty - done}[{left}{self.terms[done + 1]}]"

class Maze(Task):
    """A chain of keys: Mqa; t0[qa] =xk; t1[xk] =bd! Abd. Each call yields the next key, the last is marked with "!"."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"

    def __init__(self, rng, turns, cap=math.inf):
        self.difficulty = turns
        self.cap = cap
        places = rng.sample(range(26 * 26), turns)
        keys = [self.alphabet[place // 26] + self.alphabet[place % 26] for place in places]
        self.prompt = f"M{keys[0]};"
        self.answer = keys[-1]
        self.next = dict(zip(keys, keys[1:]))  # turns - 1 calls and an answer

    def tool(self, text):
        """The key that comes after the one in the call."""
        call = re.fullmatch(r"t\d\[([a-z]{2})\]", text)
        key = self.next.get(call[1]) if call else None
        if key is None:
            return None
        return key + ("!" if key == self.answer else ";")

    def expert(self, messages):
        """Call with the last key; when none comes after it, it is the answer. Near the cap, forget."""
        key = messages[-1]["content"][1:3]
        if size(messages) + 10 > self.cap and len(messages) > 2:
            return "D]"
        if key in self.next:
            return f"t{len(messages) // 2 % 10}[{key}]"
        return f"A{key}."

def make_task(args, number, split=0):
    """Task `number` of a split: a pure function of the seed, so that every group of a run is a fresh problem.
    Split 1 is the imitation's: its mazes have any length up to --turns."""
    rng = Random(f"{args.seed} {split} {number}")
    if args.task == "calculator":
        return Calculator(rng)
    turns = rng.randint(2, args.turns) if split == 1 else args.turns
    return Maze(rng, turns, cap=CAP if args.task == "cap" else math.inf)

# ---- gateway and data pool: text becomes tokens here, and nowhere else ---------------------------
# An agent's reply comes back in its next messages, as text. Were it tokenised anew, other tokens than those that were
# sampled could come out, and the trainer would compute the probability of something that the policy never did. So the
# gateway keeps the tokens of each completion, and looks them up by the text. What it records of a turn is a sample:
# the context, the action (the tokens that were sampled), their log-probs and the version of the policy, the number of
# training steps before it. The samples of groups that wait, or have finished and are not trained on, are the pool.

@dataclass
class Sample:
    """One completion as the trainer sees it: ids[:start] is the whole context, ids[start:] the action."""
    ids: torch.Tensor                  # (n,)
    start: int
    logprobs: torch.Tensor             # (n - start,) at temperature 1 when it was sampled; NaN: a demonstration
    versions: torch.Tensor             # (n - start,) of the policy; several in one episode only with --serve
    routes: torch.Tensor = None        # (n, r), see pack_routes; the last token is never fed: its row is the one before
    advantage: float = 1.0

@dataclass
class Trajectory:
    """An episode: its samples, a reward for each, and, while it runs, the gateway's memory of what was said."""
    task: int                          # number of its group
    samples: list = field(default_factory=list)
    rewards: list = field(default_factory=list)
    success: bool = False
    seconds: float = 0.0
    said: dict = field(default_factory=dict)  # text of a completion -> its tokens, each time

    def finish(self, rewards, success, seconds):
        """The episode is over: what agent() returns, or a client reports. What was said is forgotten."""
        self.rewards = rewards
        self.success = success
        self.seconds = seconds
        self.said = {}

    def fail(self):
        """The episode is over at its deadline: it costs FAILURE, what was earned is lost, what malformed calls cost is
        not. An episode without a turn gets one reward, so that its return counts."""
        rewards = [min(0.0, reward) for reward in self.rewards]
        if not rewards:
            rewards = [0.0] * max(1, len(self.samples))
        rewards[-1] += FAILURE
        self.finish(rewards, False, self.seconds)

def calls_text(message, where):
    """The tool calls beside a message's content, in the protocol of the tasks: name[arguments], one after the other."""
    calls = message.get("tool_calls") or []
    if message.get("function_call"):  # what OpenAI's clients sent before there were several
        calls = [dict(function=message["function_call"])]
    texts = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a tool call is {{function: {{name, arguments}}}}, not {call!r:.60}")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | None):
            raise ValueError(f"{where}: the arguments of {function['name']!r:.40} are a string, not {arguments!r:.60}")
        texts.append(f"{function['name']}[{arguments or ''}]")
    return "".join(texts)

class Gateway:
    """The only place where text and tokens meet. The chat template is concatenation. A completion that comes back in a
    context becomes the tokens that were sampled: with merges "12" may be one token or two, and the text cannot tell."""
    tokenizer = Tokenizer(learn_bpe([], 257, "(?s:.)"))  # bytes

    def __init__(self, model=None, args=None, queue=None):
        self.model = model
        self.args = args
        self.queue = queue
        self.now = 0.0                 # seconds since the start
        self.pool = {}                 # group -> its trajectories, until they have been trained on
        self.n_sampled = 0             # tokens, in Local's rollouts of this process
        self.rollout_s = 0.0           # real seconds of these

    def context(self, episode, messages):
        """Messages -> ids. Two completions may have one text and different tokens, as all bytes that are not UTF-8 are
        shown alike. So messages are read from the last to the first, and each takes the latest completion of its text
        that is left. The only one left is not used up: a client may quote a completion twice. Tool calls are written
        out where the content is not a completion, which holds its calls already: a client that turned all of it into
        calls gets the same text, so the same tokens, back. ValueError, naming the message, for what is not text."""
        said = {text: list(known) for text, known in episode.said.items()}
        parts = []
        for place, message in reversed([*enumerate(messages)]):
            where = f"messages[{place}]"
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"{where}: a message is {{role, content}}, its role a string")
            by_assistant = message["role"] == "assistant"
            has_calls = by_assistant and (message.get("tool_calls") or message.get("function_call"))
            if "content" not in message and not has_calls:
                raise ValueError(f"{where}: there is no content, and no tool call of an assistant")

            text = message_text(message.get("content"), where)
            known = []                 # tokens that were sampled for this text, each time
            if by_assistant:
                if text not in said:
                    text += calls_text(message, where)
                known = said.get(text, [])
            parts.append(known[-1] if known else self.tokenizer.encode(text))
            if len(known) > 1:         # otherwise it is quoted: what was said once may come back twice
                known.pop()
        return [token for part in reversed(parts) for token in part]

    def record(self, episode, context, ids, logprobs, version, routes=None):
        """Keep one completion as a sample of the episode -> its text.

        context, ids   tokens before it, and its own
        logprobs       of its ids, at temperature 1
        version        of the policy
        routes         of all these tokens, see pack_routes; None without --replay
        """
        episode.samples.append(Sample(
            ids=torch.tensor(context + ids),
            start=len(context),
            logprobs=torch.tensor(logprobs, dtype=torch.float64),
            versions=torch.full((len(ids),), version),
            routes=routes))
        text = self.tokenizer.decode(ids)
        episode.said.setdefault(text, []).append(ids)
        return text

def common_prefix(a, b):
    """Length of the longest common prefix of two sequences, of tokens or of rows of numbers."""
    n = min(len(a), len(b))
    apart = (np.asarray(a[:n]) != np.asarray(b[:n])).ravel()
    if not apart.any():
        return n
    numbers_a_place = apart.size // n
    return int(apart.argmax()) // numbers_a_place

# ---- queue: windowed FIFO; the time is an argument ------------------------------------------------
# Groups take unequal times. A trainer that waits for the oldest (strict FIFO) stands still for a slow one; a trainer
# that takes whatever is finished (greedy) sees easy tasks first, and hard ones late, sampled by a policy of long ago.
# Between them: the trainer takes any finished group of the `window` oldest ones.
# A slot of the queue (--slots) is the right to have a group in flight; a slot of a row, below, is a place in it. A
# group's lag is the number of steps from the policy that sampled it to the one that it trains.
# The queue never looks at a clock. `now` is real seconds where agents are other processes, and otherwise the virtual
# clock: seconds that calls and steps would take on real machines (CALL_S, CHAR_S, TRAIN_S), so that a run on a laptop
# shows the waiting of a large system, and shows the same each time.

class WindowedFIFO:
    """Which groups are in flight, which are over, and which of these the trainer may take.

    Groups are numbered as they are admitted; head is the oldest that no step has consumed. The trainer takes groups
    that are over from [head, head + window - 1] alone, the oldest first; when head is consumed, the window moves.
    `slots` groups are in flight. A slot is free for the next group once the step that consumed its group has
    published its weights. A group that is late at its deadline is over, as a failure; it is not dropped.

    window 1 is strict FIFO, window inf is greedy. window = slots is not greedy: the groups that refill slots have
    numbers beyond head + slots - 1. A stuck group is overtaken by at most slots + window - 2 others, the slots - 1
    older ones and the window - 1 next newer ones: floor((slots + window - 2) / P) steps, if a step takes P groups.
    """

    def __init__(self, slots, window, deadline=math.inf):
        self.slots = slots
        self.window = window
        self.deadline = deadline
        self.next = 0                  # the next group to be admitted
        self.born = {}                 # group -> (time, version) of its admission, until its step is published
        self.due = {}                  # group -> when it is over, until it is consumed
        self.batch = []                # consumed for the trainer's next step
        self.idle = 0.0                # seconds that a trainer waited, on a virtual clock

    def admit(self, version, now=0.0):
        """Fill the free slots with groups that the policy `version` will play -> the new groups, by number."""
        n_free = self.slots - len(self.born)
        new = list(range(self.next, self.next + n_free))
        for task in new:
            self.born[task] = now, version
            self.due[task] = now + self.deadline
        self.next += len(new)
        return new

    def finish(self, task, when=0.0):
        """Group `task` is over at the second `when`; 0: already."""
        if task in self.due:  # a group that was consumed at its deadline may still report later
            self.due[task] = min(self.due[task], when)

    def take(self, n, now=0.0):
        """Add groups that are over, and in the window, to the batch, oldest first -> it, if it holds n, or None."""
        while len(self.batch) < n:
            head = min(self.born.keys() - self.batch, default=self.next)
            ready = [task for task, when in self.due.items() if when <= now and task < head + self.window]
            if not ready:
                return None
            oldest = min(ready)
            self.batch.append(oldest)
            del self.due[oldest]
        return self.batch

    def publish(self, version):
        """The step that consumed the batch is out as `version`: free its slots -> its groups' lags, in steps."""
        lags = []
        for task in self.batch:
            _, admitted_at = self.born.pop(task)
            lags.append(version - 1 - admitted_at)
        self.batch = []
        return lags

    def wait(self, n, now):
        """On a virtual clock, from the second `now` -> the second when the batch holds n groups."""
        while not self.take(n, now):
            then = min(when for when in self.due.values() if when > now)
            self.idle += then - now
            now = then
        return now

# ---- rollout: all episodes in step, a token a forward --------------------------------------------
# A player of sample.py's loop plays an episode: it feeds the agent's contexts. A prompt or a tool's answer is fed, a
# token a forward, while other rows sample: no row ever waits for another.
# With --replay the rollout also records its discrete choices, each token's experts and key blocks (its route): the
# trainer then computes with the same ones, though rounding, in another layout, might choose others.

def play_episode(gateway, episode, agent, context_size, version):
    """A player of lockstep: feeds an agent's contexts and hands it what was sampled. Its cache keeps what a new context
    shares with the last one."""
    path = []                          # tokens in the cache
    reply = None
    while True:
        try:
            context = gateway.context(episode, agent.send(reply))
        except StopIteration as stop:
            if stop.value:             # an episode of another process reports by itself, later
                episode.finish(*stop.value)
            return
        if not 1 <= len(context) <= context_size - MAX_NEW:
            reply = None               # too long: the agent hears of it, and ends
            continue

        # one token of the context is always fed, for its logits
        kept = min(common_prefix(path, context), len(context) - 1)
        feed = context[kept:]
        ids = []
        logprobs = []
        while len(ids) < MAX_NEW and not (ids and ids[-1] in STOP):
            token, logprob, notes = yield kept, feed
            kept = len(context) + len(ids)
            feed = [token]
            ids.append(token)
            logprobs.append(logprob)

        path = context + ids[:-1]      # the last token was never fed
        routes = None
        if notes:
            routes = torch.from_numpy(np.stack(notes + notes[-1:]))
        reply = gateway.record(episode, context, ids, logprobs, version, routes)

def rollout(gateway, episodes, version, generator=None, group=1):
    """Play episodes in lock step until each is over, or an agent of another process has had its turn.

    gateway    with the model; its --replay records routes, too
    episodes   [(trajectory, agent)]; `group` of one prompt lie side by side
    version    of the policy, for the record
    generator  of the sampling
    """
    model = gateway.model
    players = [play_episode(gateway, episode, agent, model.cfg.max_seq_len, version) for episode, agent in episodes]
    record = pack_routes if gateway.args.replay else None
    lockstep(model, players, group, Sampling(generator=generator), record)

def lay_routes(paths, B, T, L):
    """Recorded routes of paths -> (B, T, r) of the layout.

    paths  (slots (n,) of B rows of T, routes (n, r)) each
    A block of a path becomes the layout's block of L slots; a pad has its own block, and the first expert."""
    _, first_routes = paths[0]
    own_block = -2 - np.arange(T)[:, None] // L
    pads = np.where(first_routes[:1] < 0, own_block, 0).astype(np.int32)                                   # (T, r)
    out = np.tile(pads, (B, 1))
    for slots, codes in paths:
        is_block = codes < -1
        first = slots[L * np.where(is_block, -2 - codes, 0)]                            # (n, r) slot a block begins at
        out[slots] = np.where(is_block, -2 - first % T // L, codes)
    return out.reshape(B, T, -1)

def unpack_routes(codes, cfg):
    """(B, T, r) -> what MiniMax.forward takes as replay."""
    n_moe = cfg.mlp_types.count("moe")
    n_msa = cfg.attn_types.count("msa")
    A = cfg.n_expert_per_tok
    experts = codes[..., :n_moe * A].unflatten(-1, (n_moe, A))
    replay = dict(experts=experts.permute(2, 0, 1, 3))
    if n_msa:
        blocks = codes[..., n_moe * A:].unflatten(-1, (n_msa, cfg.n_kv_head, -1))
        blocks = torch.where(blocks < -1, -2 - blocks, -1).int()
        replay["block_idx"] = blocks.permute(2, 0, 1, 3, 4).contiguous()
    return replay

# ---- prefix trees --------------------------------------------------------------------------------
# The context of a turn holds all turns before it, and all episodes of a group begin with one prompt: most tokens of a
# group's samples are the same. A prefix tree holds each token once, in one row of the layout: a slot is a place in it,
# and a path goes from the root to a leaf, over slots in rising order. One number a slot, `end`, the slot after its
# subtree, is the whole attention mask: slot j is visible to slot i if j <= i < end[j]. Losses do not change: `weight`,
# the samples that go through a slot, is its count in the router's load and in the index branch's KL. CISPO (`entry`)
# and the drafts' KL (`draft`) count the samples themselves.

@dataclass
class Leaf:
    """One path of a prefix tree, from the root to where its longest sample ends."""
    slots: np.ndarray                  # (n,) layout slots of the path's tokens
    samples: list                      # that end on it, the longest last
    fork: int                          # its first `fork` slots are the next leaf's, too; 0 for the last leaf
    stop: int                          # where the subtrees of all its other slots end, a layout slot

    def moved(self, by):
        """The same leaf, in a layout where its tree starts `by` slots later."""
        return Leaf(self.slots + by, self.samples, self.fork, self.stop + by)

class PrefixTree:
    """Samples of a group as one row: a token that several samples share at one place of their paths is computed once.

        samples   a b c d        layout   a b | c d   c e f      depth first; `end` = where a token's subtree ends
                  a b c e f      pos      0 1   2 3   2 3 4      branches part after c: c is copied into each, so that
                  a b            weight   3 3   1 1   1 1 1      every position has one next token

    (Drawn for L = 1 and K <= 1.) Samples that part at depth p fork at L * ((p - max(K, 1)) // L), 0 at least; what they
    share after the fork is copied into each branch. Why? CISPO has one target a slot, MTP module k reads the token k
    slots on, and a key block must hold tokens of one path."""

    def __init__(self, samples, cfg=None):
        sparse = cfg is not None and "msa" in cfg.attn_types
        self.L = cfg.index_block_size if sparse else 1
        self.K = cfg.n_mtp if cfg else 0

        # tokens sort by id and recorded routes: an equal token of other experts is another. What is shorter comes first
        self.samples = sorted(samples, key=lambda sample: labels(sample).astype(">i4").tobytes())
        rows = [labels(sample) for sample in self.samples]

        # depth first: each sample goes on from what it shares with the one before it
        self.leaves = []
        self.size = 0
        path = np.arange(0)
        ended = []
        for sample, row, after in zip(self.samples, rows, [*rows[1:], None]):
            n_new = len(row) - len(path)
            path = np.concatenate([path, np.arange(self.size, self.size + n_new)])
            self.size += n_new
            ended.append(sample)
            depth = 0 if after is None else common_prefix(row, after)
            if depth == len(row):      # the next sample goes on from the end of this one: the same leaf
                continue
            fork = max(0, self.L * ((depth - max(self.K, 1)) // self.L))
            self.leaves.append(Leaf(path, ended, fork, self.size))
            path = path[:fork]
            ended = []
            self.size += -self.size % self.L

def labels(sample):
    """What tokens are compared by: ids (n,), or ids and recorded routes (n, 1 + r)."""
    if sample.routes is None:
        return sample.ids.numpy()
    return torch.cat([sample.ids[:, None], sample.routes], 1).numpy()

class PackedRow:
    """Trees one after the other in one row, as documents: none sees another. collate() takes it like a tree.

    A tree's size is a multiple of L, the key block's size, so that each of them starts at one."""

    def __init__(self, trees):
        self.L = trees[0].L
        self.K = trees[0].K
        self.samples = [sample for tree in trees for sample in tree.samples]
        self.leaves = []
        self.size = 0
        for tree in trees:
            self.leaves += [leaf.moved(self.size) for leaf in tree.leaves]
            self.size += tree.size

def pack_rows(trees, room):
    """Trees -> rows of at most `room` slots: the longest first, each into the fullest row that has space for it.

    A tree longer than `room` gets a row of its own. Rows of nearly one length leave a micro-batch next to no pads."""
    rows = []
    free = []                          # (slots left, row) in rising order
    for tree in sorted(trees, key=lambda tree: -tree.size):
        best = bisect.bisect_left(free, (tree.size, 0))
        if best < len(free):
            left, row = free.pop(best)
        else:
            left, row = max(room, tree.size), len(rows)
            rows.append([])
        rows[row].append(tree)
        bisect.insort(free, (left - tree.size, row))
    return [PackedRow(row) for row in rows]

def plan_rows(groups, model, merge):
    """Groups (the samples of each episode) -> rows, in the layout that takes fewer FLOPs.

    merge      one tree for a group, which computes the prompt once but masks across all branches; or one an episode
    no merge   a tree for each sample. Either several share a row as long as the longest, which leaves few pads but
               needs the mask; or each has a row of its own, which is plain causal but has pads
    """
    cfg = model.cfg
    token_flops = 2 * model.num_params()[1]
    key_flops = 4 * cfg.n_layer * cfg.n_head * cfg.head_dim  # for each key of a query

    if not merge:
        alone = [PrefixTree([sample], cfg) for episodes in groups for samples in episodes for sample in samples]
        packed = pack_rows(alone, max((tree.size for tree in alone), default=0))

        def flops(rows):
            # a mask computes all keys, a causal product half of them
            masked_flops = key_flops if rows is packed else key_flops / 2
            total = 0
            for batch in micro_batches(rows):
                B, T = len(batch), batch[0].size
                total += B * T * (token_flops + masked_flops * T)
            return total
        return min(packed, alone, key=flops)

    rows = []
    for episodes in groups:
        merged = [PrefixTree([sample for samples in episodes for sample in samples], cfg)] if any(episodes) else []
        apart = [PrefixTree(samples, cfg) for samples in episodes if samples]
        rows += min(merged, apart, key=lambda trees: sum(
            tree.size * (token_flops + key_flops * tree.size) for tree in trees))
    return rows

def micro_batches(rows, tokens=MICRO_TOKENS):
    """Rows of similar length together, padded to at most so many tokens (one row is never cut)."""
    batches = []
    for row in sorted(rows, key=lambda row: -row.size):
        if not batches or batches[-1][0].size * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches

def collate(rows, device):
    """Trees or packed rows as a micro-batch, padded to T slots -> dict of tensors on the device:

    idx, pos, end          (B, T); no end where each row is one path with no pad of its own: plain causal, faster
    weight                 (K + 1, B, T): weight[k] counts the samples that go on for k more tokens (a pad: none)
    draft                  (K + 1, B, T): draft[k] counts those whose action has the token k + 1 places on
    routes                 (B, T, r), if recorded
    slots, target          slots that come before an action token, and that token
    entry, advantage, old, version    of each action token of each sample: its place in slots, advantage, log-prob and
                           policy at rollout
    """
    B, T = len(rows), max(row.size for row in rows)
    leaves = [leaf.moved(b * T) for b, row in enumerate(rows) for leaf in row.leaves]
    samples = [sample for row in rows for sample in row.samples]
    out = lay_out(leaves, B, T)
    out |= count_samples(leaves, B, T, rows[0].K)
    out |= align_targets(leaves, samples)
    if all(row.leaves[0].stop == row.size for row in rows):
        del out["end"]
    if all(sample.routes is not None for sample in samples):
        paths = [(leaf.slots, leaf.samples[-1].routes.numpy()) for leaf in leaves]
        out["routes"] = lay_routes(paths, B, T, rows[0].L)
    return {name: torch.as_tensor(x, device=device) for name, x in out.items()}

def lay_out(leaves, B, T):
    """Tokens, positions on their paths, ends of their subtrees: (B, T) each. A pad is seen by itself alone."""
    idx = np.zeros((B, T), int)
    pos = np.zeros((B, T), int)
    end = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    for leaf in leaves:
        first = leaf.slots[0] // T * T  # of its row: `stop` counts from there
        idx.flat[leaf.slots] = leaf.samples[-1].ids
        pos.flat[leaf.slots] = np.arange(len(leaf.slots))
        end.flat[leaf.slots[leaf.fork:]] = leaf.stop - first
    return dict(idx=idx, pos=pos, end=end)

def count_samples(leaves, B, T, K):
    """How many samples go through a slot and k tokens on, and how many of these are in their action: see collate."""
    weight = np.zeros((K + 1, B * T))
    draft = np.zeros((K + 1, B * T))
    for leaf in leaves:
        depth = np.arange(len(leaf.slots))
        start = np.array([[sample.start] for sample in leaf.samples])                                   # (samples, 1)
        length = np.array([[len(sample.ids)] for sample in leaf.samples])
        for k in range(K + 1):
            last = depth + k
            weight[k, leaf.slots] += (last < length).sum(0)
            draft[k, leaf.slots] += ((start - 1 <= last) & (last < length - 1)).sum(0)
    return dict(weight=weight.reshape(-1, B, T), draft=draft.reshape(-1, B, T))

def align_targets(leaves, samples):
    """Action tokens, sample by sample, and the slots before them; slots that several samples share appear once."""
    before = [leaf.slots[sample.start - 1:len(sample.ids) - 1] for leaf in leaves for sample in leaf.samples]
    slots, once, entry = np.unique(np.concatenate(before), return_index=True, return_inverse=True)
    action = torch.cat([sample.ids[sample.start:] for sample in samples]).numpy()
    return dict(
        slots=slots,
        entry=entry,
        target=action[once],
        advantage=np.repeat([sample.advantage for sample in samples], [len(part) for part in before]),
        old=torch.cat([sample.logprobs for sample in samples]),
        version=torch.cat([sample.versions for sample in samples]))

# ---- CISPO and its step --------------------------------------------------------------------------
# A policy gradient with importance weights: the samples are of an older policy, pi_old, so that each token's
# log-probability is weighted by the ratio pi / pi_old. PPO drops the gradient of a token whose ratio leaves its clip;
# CISPO keeps it, and clips the weight: rare tokens, often the decisive ones, go on learning. The weight is a constant
# (detached), as the gradient of a log-probability times a weight is what a policy gradient is; were the ratio
# differentiated, the clip would cut gradients off again. A step sums over all samples of its groups, and divides once.

def advantages(group):
    """Set the advantage of a group's samples: the reward to go of each turn (its own and all later ones), less the mean
    return of the group's other episodes -> [samples of an episode].
    Not published: the baseline. With the own return in it, it would depend on the action, and bias the gradient."""
    returns = [sum(episode.rewards) for episode in group]
    # rewards may come in fp32: a smaller difference is one of rounding, and would still move the weights at full size
    least = 1e-6 * max(sum(map(abs, episode.rewards)) for episode in group)
    for episode, own in zip(group, returns):
        others = (sum(returns) - own) / max(1, len(group) - 1)
        for i, sample in enumerate(episode.samples):
            advantage = sum(episode.rewards[i:]) - others
            sample.advantage = advantage if abs(advantage) > least else 0.0
    return [episode.samples for episode in group]

def cispo_loss(logprob, entry, old, advantage, Z, eps_high=EPS_HIGH):
    """CISPO (MiniMax-M1, arXiv 2506.13585): -1/Z sum sg(min(pi / pi_old, 1 + eps)) A log pi, sg: detached.

    As weights are constants, all samples through a slot add up to one coefficient of its log-prob. The value lies near
    0, as advantages sum to about 0: read the reward, not the loss.

    logprob    (n,) of the slots' targets under the policy
    entry      (m,) of each action token of each sample, its slot
    old        (m,) its log-prob at rollout
    advantage  (m,)
    Z          action tokens of the step
    -> loss, ratios (m,), weights (m,): clipped ratio times advantage.
    """
    ratio = (logprob.detach()[entry] - old).exp()
    weights = ratio.clamp(max=1 + eps_high) * advantage
    coefficient = torch.zeros_like(logprob).index_add(0, entry, weights)
    return -(coefficient * logprob).sum() / Z, ratio, weights

def policy(model, batch):
    """Forward of a micro-batch, see collate -> log-prob of the action token after each of batch["slots"], and entropy
    of the distribution there, (slots,) each, fp32 or wider; the forward's losses and aux. The head computes logits at
    these slots alone: most slots hold context."""
    replay = None
    if "routes" in batch:
        replay = unpack_routes(batch["routes"], model.cfg)
    _, losses, aux = model(
        batch["idx"], weight=batch["weight"][0], pos=batch["pos"], end=batch.get("end"), replay=replay, n_logits=0)
    hidden = aux["hidden"].flatten(0, 1)[batch["slots"]]
    logits = model.lm_head(model.norm(hidden))
    logp = widen(logits).log_softmax(-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    logprob = logp.gather(-1, batch["target"][:, None])[:, 0]
    return logprob, entropy, losses, aux

def align_drafts(model, batch, hidden, top=8):
    """Keep the drafts of MTP modules aligned while the policy moves: for module k the KL of the policy's distribution
    k tokens on (its `top` tokens, renormalised) to the module's.

    hidden   (B, T, C), the trunk's, before its last norm
    Summed over drafted action tokens, by multiplicity. Trunk, embedding and head are detached: drafts follow the
    policy and do not pull at it. The teacher is a distribution, the same for every branch; a hard target, the next
    token, would be another one in each. Not published: the form of the report's top-K KL.
    -> sums (K,), one a module; expert loads (1, experts) and sums of the index KL (1,), one a module that has them.
    """
    hidden = hidden.detach()
    head = model.lm_head.weight.detach().to(hidden.dtype)
    teacher = widen(model.norm(hidden).detach() @ head.T).softmax(-1)                                # (B, T, V)
    embedded = model.embed(batch["idx"]).detach().to(hidden.dtype)

    rope = rope_tables(batch["pos"], model.cfg.rotary_dim, model.cfg.rope_theta)
    ctx = Context(rope, batch.get("end"))
    T = hidden.size(1)
    weights = [weight[:, :T - k] for k, weight in enumerate(batch["weight"])]
    sums = [torch.zeros((), device=hidden.device)] * len(model.mtp)
    loads = []
    kls = []
    for k, h, aux in model.mtp_walk(hidden, embedded, ctx, weights):
        logp = widen(h @ head.T).log_softmax(-1)                                                 # (B, T - k, V)
        q, token = teacher[:, k:].topk(min(top, teacher.size(-1)))
        q = q / q.sum(-1, keepdim=True)
        kl = (q * (q.log() - logp.gather(-1, token))).nan_to_num(0.0).sum(-1)                           # (B, T - k)
        sums[k - 1] = (kl * batch["draft"][k][:, :-k]).sum()
        if "expert_load" in aux:
            loads.append(aux["expert_load"][None])
        if "index_kl" in aux:
            kls.append(aux["index_kl"][None])
    return torch.stack(sums), loads, kls

def backward(model, rows, mtp_weight=0.1, tokens=MICRO_TOKENS):
    """Gradients of a step's loss -> statistics, expert loads (layers, experts). The loss is train.py's objective, with
    CISPO in place of the next token's loss and the drafts' KL in place of MTP's. CISPO and the drafts are divided by Z,
    the action tokens of all samples as they were before merging; the index branch's KL by `naive`, all their tokens.

    rows     trees or packed rows, computed in micro-batches of at most so many `tokens`
    Statistics: loss, entropy (a mean), ratio and version (of each action token of each sample), naive (tokens of all
    samples), slots (of the rows), computed (slots of the micro-batches, pads included), magnitude (see has_signal).
    """
    Z = sum(len(sample.logprobs) for row in rows for sample in row.samples)
    naive = sum(len(sample.ids) for row in rows for sample in row.samples)
    total = Losses(next=1, mtp=Z, kl=naive)  # cispo_loss has divided by Z already
    load = 0.0
    magnitude = 0.0
    computed = 0
    parts = []
    model.train()
    for part in micro_batches(rows, tokens):
        batch = collate(part, model.embed.weight.device)
        computed += batch["idx"].numel()
        logprob, entropy, losses, aux = policy(model, batch)

        # the policy's loss
        old = batch["old"].to(logprob.dtype)
        old = torch.where(old.isnan(), logprob.detach()[batch["entry"]], old)  # a demonstration has none: ratio 1
        advantage = batch["advantage"].to(logprob.dtype)
        losses.next, ratio, weights = cispo_loss(logprob, batch["entry"], old, advantage, Z)
        magnitude = magnitude + weights.abs().sum() / Z

        # the drafts', beside the index branch's, which the forward has summed
        loads = [aux["expert_load"]]
        if len(model.mtp):
            losses.mtp, mtp_loads, kls = align_drafts(model, batch, aux["hidden"])
            losses.kl = torch.cat([losses.kl, *kls])
            loads += mtp_loads
        loss = losses.over(total).objective(mtp_weight)
        loss.backward()
        load = load + torch.cat(loads)
        parts.append((loss.detach()[None], entropy[batch["entry"]], ratio, batch["version"]))

    loss, entropy, ratio, version = (torch.cat(x).cpu() for x in zip(*parts))
    stats = dict(
        loss=loss.sum().item(), entropy=entropy.mean().item(), ratio=ratio, version=version,
        naive=naive, slots=sum(row.size for row in rows), computed=computed, magnitude=magnitude.item())
    return stats, load

def has_signal(model, magnitude):
    """Whether the policy has a gradient, one larger than what rounding leaves of terms that cancel: where all episodes
    of all groups earn the same, advantages are 0. magnitude: the sum of the terms' absolute coefficients.
    The index branch and MTP have losses of their own, and do not count."""
    norms = []
    for name, p in model.named_parameters():
        if p.grad is not None and not is_index(name) and not name.startswith("mtp."):
            norms.append(p.grad.norm())
    unit = torch.finfo(model.embed.weight.dtype).eps
    # 1e-10: AdamW's eps, the optimizer's own idea of nothing
    return torch.stack(norms).norm().item() > max(1e-10, ROUNDING * unit * magnitude)

def train_step(model, optimizers, rows, rate, bias_rate=1e-3, tokens=MICRO_TOKENS):
    """Backward, clip, update, balance the router -> statistics: those of `backward`, signal, norm (before the clip).

    rows       trees or packed rows
    rate       of the matrices
    bias_rate  u of the router's load balancing
    tokens     of a micro-batch, at most
    FloatingPointError: a norm that is not finite.

    Muon and AdamW scale a step to full size, however small its gradient: momentum alone would move the weights. So a
    step without signal changes nothing, router biases and optimizer states included; and in any step a matrix without a
    gradient keeps its weights and moments. Unlike in train.py all gradients are clipped as one."""
    set_rates(optimizers, rate)
    stats, load = backward(model, rows, tokens=tokens)
    stats["signal"] = has_signal(model, stats["magnitude"])  # before the clip
    stats["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(stats["norm"]):
        raise FloatingPointError(f"gradient norm {stats['norm']}: not finite")
    if stats["signal"]:
        for p in model.parameters():
            if p.grad is not None and not p.grad.any():
                p.grad = None
        update(model, optimizers, load, bias_rate)
    model.zero_grad(set_to_none=True)
    return stats

# ---- where episodes come from --------------------------------------------------------------------
# A source is a gateway with two verbs. `start` opens the groups that the queue admits; `wait` returns when the queue
# holds a batch of groups that are over. Local, here, plays all episodes itself, at once, and then says when they would
# have been over. Served, at the end of this file, lets agents of other processes play them, in real time.

class Local(Gateway):
    """Agents of this process. A group is rolled out when it is admitted, and has finished when the virtual clock says
    so: after its slowest episode, times a log-normal tail (sigma) that stands for slow machines, not slow agents."""

    def start(self, tasks, version):
        """Play groups with the policy `version`, and tell the queue when each is over."""
        args = self.args
        episodes = []
        for task in tasks:
            self.pool[task] = [Trajectory(task) for _ in range(args.rollouts)]
            episodes += [(episode, make_task(args, task).agent()) for episode in self.pool[task]]
        generator = torch.Generator(self.model.embed.weight.device)
        generator.manual_seed(Random(f"{args.seed} {tasks[:1]}").getrandbits(62))
        began = time.perf_counter()
        rollout(self, episodes, version, generator, args.rollouts)
        self.rollout_s += time.perf_counter() - began
        self.n_sampled += sum(len(sample.ids) - sample.start for episode, _ in episodes for sample in episode.samples)

        for task in tasks:
            group = self.pool[task]
            tail = math.exp(args.sigma * Random(f"{args.seed} tail {task}").gauss(0, 1))
            seconds = tail * max(episode.seconds for episode in group)
            if seconds > self.queue.deadline:  # by then it is given up
                for episode in group:
                    episode.fail()
            self.queue.finish(task, self.now + seconds)

    def wait(self, stop, seconds):
        """Let the virtual clock run until a batch is over, and for the training step that follows."""
        self.now = self.queue.wait(self.args.groups, self.now) + TRAIN_S

# ---- imitation: the model learns to speak the protocol ---------------------------------------------
# A policy that never makes a valid call earns nothing, and learns nothing. So a teacher plays first, and the model
# imitates it: the same train step, in which every token has advantage 1. The teacher is wrong on purpose, in WRONG
# characters of a demonstration: the model then knows the language, and how to solve tasks it has to find out from
# rewards.
# It must have learned all parts of a task, or rewards teach nothing: where no episode of a group is solved, none is
# better than the others. The answer is the part in danger, one turn of many, which any wrong call before it prevents: a
# model that has seen few of them gives one answer to all mazes. So the longer a task, the fewer of its characters are
# wrong (15 % of them would spoil nine of ten mazes of eight turns), and a maze of the imitation is often a short one.
# The imitation has a checkpoint of its own, --out/warm; any run of the same task, model and seed begins with it.

def demonstrate(gateway, task, rng, noise, wander=0.0):
    """Play one task with its teacher -> trajectory, whose samples have NaN for log-probs: no policy sampled them.
    noise, wander: shares of a call's characters, and of its thoughts, that are replaced by random ones."""
    episode = Trajectory(-1)
    agent = task.agent()
    text = None
    while True:
        try:
            messages = agent.send(text)
        except StopIteration as stop:
            episode.finish(*stop.value)
            return episode
        text = task.expert(messages)
        if text[0] == "t":
            call = "".join(rng.choice(task.alphabet) if char in task.alphabet and rng.random() < noise else char
                           for char in text[3:])
            thought = rng.randrange(10) if rng.random() < wander else text[1]
            text = f"t{thought}[{call}"
        ids = gateway.tokenizer.encode(text)
        gateway.record(episode, gateway.context(episode, messages), ids, [math.nan] * len(ids), 0)

def count_chars(task):
    """Characters that a task's teacher could get wrong, those in its calls' arguments."""
    agent = task.agent()
    text = None
    n_chars = 0
    with contextlib.suppress(StopIteration):
        while True:
            text = task.expert(agent.send(text))
            if text[0] == "t":
                n_chars += sum(char in task.alphabet for char in text[3:])
    return n_chars

def wrong_share(args):
    """Share of the teacher's characters that is wrong: WRONG of the mean task's, and half of them at most."""
    n_chars = [count_chars(make_task(args, i)) for i in range(WARM_TASKS)]
    return min(0.5, WRONG / max(1, sum(n_chars) / len(n_chars)))

def warm_start(source, args, stop, threads):
    """Imitate the teacher for --warm-steps -> whether all steps are done (`stop` may end it before). --out/warm keeps
    it, or as much as was done of it. A demonstration's advantage is 1, and its ratio 1."""
    model = source.model
    folder = os.path.join(args.out, "warm")
    started = time.perf_counter()
    noise = wrong_share(args)
    optimizers = configure_optimizers(model, WARM_LR)[0]

    # go on where an imitation of the same model and tasks was left
    step = 0
    saved = None                       # step of the last save
    run = os.urandom(8).hex()
    state = None
    if os.path.exists(checkpoint_path(folder)):
        state = load_checkpoint(folder)
    if state and is_same_imitation(state, args, model):
        check_imitation(folder, state, model)
        model.load_state_dict(state["model"])
        restore(state, optimizers)
        before = state["now"]
        step = before.get("step", args.warm_steps)
        threads.keep(before.get("threads") or threads.count)
        run = before.get("run")        # it is the same imitation that goes on
        saved = step
        print(f"warm    | {step} steps read from {folder}", flush=True)

    def keep():
        save(folder, source, optimizers, dict(run=run, step=step, threads=threads.count))

    if saved is None:                  # killed at once, it goes on
        keep()
        saved = 0
    timer = SaveTimer()                # after that save, whose length would put off the one after 3 s
    while step < args.warm_steps and not stop:
        if step != saved and (step % WARM_EVERY == 0 or timer.due()):
            began = timer.clock()
            keep()
            timer.saved(began)
            saved = step

        rng = Random(f"{args.seed} warm {step}")
        tasks = [make_task(args, step * WARM_TASKS + i, 1) for i in range(WARM_TASKS)]
        demos = [demonstrate(source, task, rng, noise) for task in tasks]
        began = time.perf_counter()
        trees = [PrefixTree(demo.samples, model.cfg) for demo in demos]
        # the rate rises for 20 steps, and falls in the last nine tenths to a tenth
        rate = WARM_LR * min(1, (step + 1) / 20, 1.1 - step / args.warm_steps)
        stats = train_step(model, optimizers, trees, rate)
        step += 1
        threads.watch(time.perf_counter() - began, trial, source)
        if step % WARM_EVERY == 0 or step == args.warm_steps:
            print(f"warm {step:04d} | loss {stats['loss']:.3f} | norm {stats['norm']:.2f} | "
                  f"{time.perf_counter() - started:.0f} s", flush=True)
    if step != saved:
        keep()
    return step == args.warm_steps

def is_same_imitation(state, args, model):
    """Whether a checkpoint holds an imitation of the run's tasks by its model."""
    for name in (*MADE_BY, "seed", "warm_steps"):
        if state["args"].get(name) != getattr(args, name):
            return False
    return state["config"].get("vocab_size") == model.cfg.vocab_size

def check_imitation(folder, state, model):
    """ValueError, FloatingPointError: an imitation's weights are not of this model, or not finite, or its record is
    not what a run writes."""
    path = checkpoint_path(folder)
    try:
        check_weights(state["model"], model.state_dict())
    except ValueError as error:
        raise ValueError(f"{path}: the checkpoint does not fit: {error}") from None
    check_finite(state["model"])
    kinds = dict(run=NOW["run"], threads=NOW["threads"])
    check_fields(f"{path}: the checkpoint's now", state["now"], kinds, optional=kinds)

def is_over(imitation):
    """Whether all steps of an imitation are done. Older checkpoints, written at its end, did not count steps."""
    step = imitation["now"].get("step", math.inf)
    end = imitation["args"].get("warm_steps", 0)
    return type(end) is not int or step >= end

def trial(source):
    """-> a function that runs a step's forward and backward passes, on few episodes, and leaves the model as it was."""
    demos = [demonstrate(source, make_task(source.args, i, 1), Random(i), 0.0) for i in range(8)]
    trees = [PrefixTree(demo.samples, source.model.cfg) for demo in demos]

    def step():
        backward(source.model, trees)
        source.model.zero_grad(set_to_none=True)
    return step

# ---- the run -------------------------------------------------------------------------------------
# Flags, the loop, what is printed and what is kept. A step: fill the slots, wait for a batch of groups, turn rewards
# into advantages, lay the samples out, train, publish the new weights. All that is between two steps goes into a
# checkpoint, episodes in flight as well: a resumed run equals, to the bit, one that was never stopped.

def make_model(args, device, dtype):
    """Task and preset -> model, with full attention, as in the M2 that Forge trained, unless --attn msa."""
    torch.manual_seed(args.seed)
    room = dict(calculator=96, maze=round_up(14 * args.turns + 48, 128), cap=128)[args.task]
    # the preset's own vocabulary may be larger: an id that the gateway's tokenizer lacks has no text
    cfg = getattr(MiniMaxConfig, args.preset)(max_seq_len=room, n_mtp=args.mtp, vocab_size=Gateway.tokenizer.n_vocab)
    cfg.index_kl_stride = 1  # a stride counts positions of the layout: it would know of the merging
    cfg.attn_types = ["full"] + [args.attn] * (cfg.n_layer - 1)
    return MiniMax(cfg, dtype).to(device)

def parse_args(argv, locks=None):
    """-> args, checkpoint (None: a run at its start, or in its imitation). --resume takes from it what is not given.
    `locks`, a contextlib.ExitStack, holds the locks on the run's folders from here on: nobody else writes there.
    ValueError for flags that are unknown or do not go together."""
    p = Parser(__doc__)
    count = number(1)
    positive = number(1e-6, 1e9, float)
    # task and episodes
    p.add_argument("--task", default="calculator", choices=["calculator", "maze", "cap"], help="to learn")
    p.add_argument("--turns", type=number(2, 600), default=8, help="a maze's")
    p.add_argument("--rollouts", type=number(2), default=4, help="episodes of a group")
    p.add_argument("--groups", type=count, default=24, help="groups a step")
    # queue
    p.add_argument("--schedule", default="window", choices=["window", "fifo", "greedy"])
    p.add_argument("--slots", type=count, default=48, help="groups in flight")
    p.add_argument("--window", type=count, help=f"width; default: {WINDOW_SHARE} of --slots")
    p.add_argument("--deadline", type=positive, default=600.0, help="seconds a group has")
    p.add_argument("--sigma", type=number(0, 10, float), default=0.5, help="log-normal tail of times")
    # model and training
    p.add_argument("--preset", default="micro", choices=["micro", "small"], help="the model")
    p.add_argument("--attn", default="full", choices=["full", "msa"], help="its attention")
    p.add_argument("--mtp", type=number(0, 8), default=0, help="its MTP modules, kept aligned")
    p.add_argument("--warm-steps", type=number(0), default=400, help="of imitation")
    p.add_argument("--lr", type=number(0, 10, float), default=1e-3, help="rate of the matrices")
    p.add_argument("--no-merge", action="store_true", help="train on every turn alone")
    p.add_argument("--replay", action="store_true", help="use experts and blocks of the rollout")
    # length of the run
    p.add_argument("--steps", type=count, help="end after this many")
    p.add_argument("--minutes", type=positive,
                   help="in all; default: " + ", ".join(f"{task} {minutes}" for task, minutes in MINUTES.items()))
    p.add_argument("--seed", type=number(0), default=1337, help="of all that is random")
    # what is printed and kept
    p.add_argument("--out", default="out_rl", help="folder of the run")
    p.add_argument("--resume", action="store_true", help="go on from --out")
    p.add_argument("--show-every", type=count, default=50, help="steps between examples")
    p.add_argument("--save-every", type=count, default=20, help="steps between saves")
    p.add_argument("--figure", help="curve's file")
    # agents of other processes
    p.add_argument("--serve", type=number(0, 65535),
                   help="port of the gateway, for agents of other processes; 0 = any")
    p.add_argument("--token", help="their API key; default: random")

    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    state = None
    if args.resume:
        if locks:
            lock_folders(args, locks)
        args, state = resume_args(p, argv, args)
    if args.groups > args.slots:
        raise ValueError(f"--groups {args.groups}: at most --slots, {args.slots}")
    if not args.minutes and not args.steps:
        args.minutes = MINUTES[args.task]
    if args.figure:
        check_figure(args.figure)
    if locks and not args.resume:
        lock_folders(args, locks)
    return args, state

def lock_folders(args, locks):
    """Lock all folders that a run writes a checkpoint into, and make them, unless the run is resumed."""
    for folder in (args.out, os.path.join(args.out, "warm")):
        locks.enter_context(lock_folder(folder, create=not args.resume))

def resume_args(parser, argv, given):
    """What was given now, over what the checkpoint was made with -> args, checkpoint (None within the imitation)."""
    path = checkpoint_path(given.out)
    early = None                       # an imitation that is not over is of a newer run than --out's
    with contextlib.suppress(ValueError):  # none, or damaged
        early = load_checkpoint(f"{given.out}/warm")
    if early and os.path.exists(path) and is_over(early):
        early = None
    state = early or load_checkpoint(given.out)
    if "queue" not in state and "task" not in state["args"]:
        raise ValueError(f"--out {given.out}: a checkpoint by train.py; python train.py --resume --out {given.out} "
                         "goes on")
    if not isinstance(state.get("queue"), dict) or "due" not in state["queue"]:
        raise ValueError(f"--out {given.out}: a checkpoint by another version of rl.py, whose queue was another")

    args = merge_args(parser, argv, given, path, state["args"])
    for flag in (*MADE_BY, "slots"):
        value = getattr(args, flag)
        was = state["args"].get(flag)
        if value != was:
            raise ValueError(f"--{flag} {value}: the checkpoint was made with {was}")
    return args, None if early else state  # the imitation's weights are read where they are needed

@dataclass
class Record:
    """What a run has counted until now, between two steps: what a checkpoint calls `now`."""
    step: int = 0                      # of training on rewards
    seconds: float = 0.0               # since the start, the imitation included
    warm: float = 0.0                  # until the imitation's end
    ema: float | None = None           # running mean of the share solved
    curve: list = field(default_factory=list)  # [share solved, ema] of each step
    max_lag: int = 0                   # of a group, in steps
    naive: int = 0                     # tokens of all samples
    slots: int = 0                     # that they took once merged
    reward: float = 0.0                # of all episodes
    entropy: float | None = None       # of the policy, in the first step
    collapsed: int | None = None       # step in which has_collapsed was true for the first time
    run: str | None = None             # name of the run
    threads: int | None = None         # of the CPU: bits depend on it

# field -> the kinds that check_fields allows
NOW = {name: typing.get_args(kind) or kind for name, kind in typing.get_type_hints(Record).items()}

def check_record(now):
    """ValueError unless a checkpoint's now has all that a run goes on counting; older ones lack some of it."""
    check_fields("the checkpoint's now", now, NOW, optional=["run", "threads", "entropy", "collapsed"])
    if bool(now["curve"]) != (now["ema"] is not None):
        raise ValueError("the checkpoint's now has a curve without its running mean, ema, or the reverse")
    for point in now["curve"]:
        if not isinstance(point, list) or [*map(type, point)] != [float, float]:
            raise ValueError(f"the checkpoint's curve has {str(point)[:40]}: a share and its running mean")

def needed_bytes(args, device):
    """About the memory of a step of the imitation, the largest one's; a little less rather than more."""
    with torch.device("meta"):
        cfg = make_model(args, "meta", None).cfg
    demo = demonstrate(Gateway(), make_task(args, 0), Random(0), 0.0)
    slots = PrefixTree(demo.samples, cfg).size
    return step_bytes(cfg, min(WARM_TASKS, max(1, MICRO_TOKENS // slots)), slots, device)

def card(args, model, queue, device, why, threads):
    """Print what a run is made of: the start-up card. why: of the device and dtype."""
    cfg = model.cfg
    total, active = model.num_params()
    how = "turn by turn" if args.no_merge else "prefix trees"
    print(f"model   | {args.preset}: {total:,} parameters, {active:,} active; {args.attn} attention; "
          f"{cfg.n_expert_per_tok} of {cfg.n_expert} experts, {args.mtp} MTP modules")
    print(f"device  | {device}, {str(model.dtype).removeprefix('torch.')}: {why}")
    print(f"threads | {threads}")
    print(f"kernels | {implementations(model, device, trains=True)}")
    print(f"task    | {args.task}: {args.groups} groups of {args.rollouts} episodes a step, {args.slots} in flight")
    print(f"queue   | {args.schedule}: window {queue.window}, deadline {args.deadline:g} s, tail sigma {args.sigma:g}")
    print(f"train   | CISPO, ratio up to {1 + EPS_HIGH:g}; {how}; Muon + AdamW, rate {args.lr:g}, seed {args.seed}",
          flush=True)

def count_step(now, episodes, stats, lags):
    """Add one step to the run's record, `now`. stats: what train_step returned; lags: of its groups, in steps."""
    solved = sum(episode.success for episode in episodes) / len(episodes)
    now.ema = EMA * now.ema + (1 - EMA) * solved if now.curve else solved
    now.step += 1
    now.curve.append([solved, now.ema])
    now.max_lag = max(now.max_lag, *lags)
    now.naive += stats["naive"]
    now.slots += stats["slots"]
    now.reward += sum(sum(episode.rewards) for episode in episodes)
    if now.entropy is None:
        now.entropy = stats["entropy"]

def has_collapsed(now, stats):
    """Whether next to nothing has been solved for a while, and nothing points to more: the policy has settled on what
    fails, and tries little else, or all episodes of each group earn the same, so that there is no gradient."""
    recent = [solved for solved, _ in now.curve[-COLLAPSE_STEPS:]]
    if len(recent) < COLLAPSE_STEPS or sum(recent) / len(recent) > COLLAPSE_SOLVED:
        return False
    return stats["entropy"] < COLLAPSE_ENTROPY * now.entropy or not stats["signal"]

def watch_collapse(now, args, stats):
    """Tell of a collapse, once in a run."""
    if now.collapsed is None and has_collapsed(now, stats):
        now.collapsed = now.step
        print(f"collapse | {COLLAPSE_STEPS} steps with next to nothing solved, entropy {now.entropy:.2f} at first, "
              f"{stats['entropy']:.2f} now: the policy settles on what fails; begin again with --warm-steps above "
              f"{args.warm_steps}, --rollouts above {args.rollouts} or another --seed", flush=True)

def print_step(now, args, episodes, stats, lags, decode):
    """One line a step; now and then an episode. `decode`: ids -> text.

    lag        steps from the policy that a turn was sampled with to the one that it trains; 0: the same
    ratio q99  the 99th percentile of pi / pi_old, at each lag: how far the policy has moved away meanwhile
    merge      tokens of all samples over slots of the prefix trees that they were merged into
    """
    reward = sum(sum(episode.rewards) for episode in episodes) / len(episodes)
    solved, ema = now.curve[-1]
    lag = now.step - 1 - stats["version"]
    ratios = " ".join(f"{steps}:{stats['ratio'][lag == steps].quantile(0.99):.2f}" for steps in lag.unique().tolist())
    saved = stats["naive"] - stats["slots"]
    no_signal = "" if stats["signal"] else " | no signal: weights kept"
    print(f"step {now.step:04d} | reward {reward:+.3f} | solved {solved:.3f} ema {ema:.3f} | "
          f"norm {stats['norm']:.2f} | entropy {stats['entropy']:.2f} | lag {max(lags)}, ratio q99 {ratios} | "
          f"merge {stats['naive'] / stats['slots']:.1f}x, {saved:,} tokens saved | {now.seconds:.0f} s{no_signal}",
          flush=True)
    if (now.step - 1) % args.show_every == 0:  # the first of every `show_every` steps
        print_episode(episodes[0], decode)

def print_episode(episode, decode):
    """What was said in an episode, what the policy wrote in <>."""
    text = ""
    before = []
    for sample in episode.samples:
        ids = sample.ids.tolist()
        heard = ids[common_prefix(before, ids):sample.start]
        text += f"{decode(heard)}<{decode(ids[sample.start:])}>"
        before = ids
    text = text.encode("unicode_escape").decode()  # control characters would garble the terminal
    rewards = " ".join(f"{reward:+.2f}" for reward in episode.rewards)
    print(f"  {'solved' if episode.success else 'failed'}: {text} rewards {rewards}")

def make_queue(args):
    """The scheduler that --schedule names."""
    if args.schedule == "fifo":
        window = 1
    elif args.schedule == "greedy":
        window = math.inf
    else:
        window = args.window or max(1, int(WINDOW_SHARE * args.slots))
    return WindowedFIFO(args.slots, window, args.deadline)

def run(args, state):
    """Imitate, then learn from rewards until the end that the flags name -> what the last line of stdout says.
    state: the checkpoint, None for a run at its start or in its imitation."""
    started = time.perf_counter()
    stop = on_signals()

    # model, queue, gateway, threads
    device, dtype, why = pick_device(args.device)
    check_memory(needed_bytes(args, device), device, "--preset micro, or fewer --turns")
    if state:
        model = load_model(state, device, dtype)[0]
        check_record(state["now"])
    else:
        model = make_model(args, device, dtype)
    queue = make_queue(args)
    if args.serve is None:
        source = Local(model, args, queue)
    else:
        source = Served(model, args, queue)
    threads = Threads(device, args.threads, state["now"].get("threads") if state else None)
    if threads.count is None:
        threads.choose(trial(source), args.steps)
    card(args, model, queue, device, why, threads)

    # imitation, or where a run stood
    ready = True
    if state is None:
        ready = warm_start(source, args, stop, threads)
    threads.times = []  # these steps are others than the imitation's
    optimizers = configure_optimizers(model, args.lr)[0]
    if state:
        restore(state, optimizers, source)
        now = Record(**{name: value for name, value in state["now"].items() if name in NOW})
    else:
        warm = time.perf_counter() - started
        now = Record(seconds=warm, warm=warm, run=os.urandom(8).hex())
        if ready:
            save(args.out, source, optimizers, vars(now))  # killed from here on, the run can go on
    timer = SaveTimer()
    changed = False
    if ready and args.serve is not None:
        print(f"gateway | {source.door.url} key {source.token}", flush=True)
    if state and share_done(vars(now), vars(args)) >= 1:
        print(f"nothing left to do after step {now.step}: give more --steps or --minutes", flush=True)

    while share_done(vars(now), vars(args)) < 1 and not stop:
        began = time.perf_counter()
        changed = True

        # rollout: free slots are filled, finished groups are taken from the window
        rate = args.lr * min(1.0, 2 * (1 - share_done(vars(now), vars(args))))
        version = now.step             # of the policy
        source.start(queue.admit(version, source.now), version)
        seconds_left = 60 * args.minutes - now.seconds if args.minutes else math.inf
        source.wait(stop, seconds_left)
        if len(queue.batch) < args.groups:  # stopped, or out of time, while agents of other processes were at work
            break
        groups = [source.pool.pop(task) for task in queue.batch]

        # train, and publish the weights: now, not before, the groups' slots are free
        rows = plan_rows([advantages(group) for group in groups], model, not args.no_merge)
        stats = None
        if rows:
            step_began = time.perf_counter()
            # balancing moves at one speed, however small the rate: at the imitation's, tokens would change their
            # experts faster than these learn, and what is solved would be forgotten
            stats = train_step(model, optimizers, rows, rate, BIAS_SHARE * rate)
            threads.watch(time.perf_counter() - step_began, trial, source)
            version += 1
        now.threads = threads.count if device.type == "cpu" else None  # bits depend on it
        lags = queue.publish(version)
        now.seconds += time.perf_counter() - began

        # tell and save
        if stats:
            episodes = [episode for group in groups for episode in group]
            count_step(now, episodes, stats, lags)
            print_step(now, args, episodes, stats, lags, source.tokenizer.decode)
            watch_collapse(now, args, stats)
        else:
            print(f"no step   | groups {[group[0].task for group in groups]}: no turn to learn from", flush=True)
        if now.step % args.save_every == 0 or timer.due():
            save_began = timer.clock()
            save(args.out, source, optimizers, vars(now))
            timer.saved(save_began)

    if ready and changed:  # a run with nothing left has nothing to save
        save(args.out, source, optimizers, vars(now))
    if not ready:
        print(f"stopped in the imitation, saved in {args.out}/warm; the same command goes on", flush=True)
    elif stop or not now.step:  # all the time went into the imitation, or into waiting for other processes
        print(f"stopped after step {now.step}, saved; --resume --out {args.out} goes on", flush=True)
    if args.serve is not None:
        source.close()
    return summary(args, now, source, queue)

def summary(args, now, source, queue):
    """Draw the curve, where --figure asks for it -> what the last line of stdout says."""
    curve = now.curve
    if args.figure and curve:
        solved, ema = zip(*curve)
        draw({"a batch of fresh problems": solved, "EMA": ema}, args.figure, args.task)
    virtual = max(source.now, 1e-9)
    sampled_per_s = source.n_sampled / source.rollout_s if source.rollout_s else None
    return dict(
        reward_start=curve[0][0] if curve else None, reward_end=now.ema, steps=now.step,
        merge_ratio=now.naive / max(now.slots, 1), max_lag=now.max_lag, seconds=now.seconds,
        virtual_seconds=virtual, idle=queue.idle / virtual, reward_per_virtual_s=now.reward / virtual,
        rollout_tokens_per_s=sampled_per_s)

def save(folder, source, optimizers, now):
    """Write FOLDER/ckpt.pt, all there is between two steps: weights, momenta, flags, `now`, the queue, the groups in
    flight with what was said in them, the clock. FloatingPointError if a weight is not finite: what was saved before
    is kept."""
    parts = checkpoint_parts(source.args, source.model, source.tokenizer, optimizers)
    pool = {task: list(map(asdict, group)) for task, group in source.pool.items()}
    os.makedirs(folder, exist_ok=True)
    save_checkpoint(folder, now=now, pool=pool, queue=vars(source.queue), clock=source.now, **parts)

def restore(state, optimizers, source=None):
    """Put a checkpoint's optimizers back, and, given a source, its queue, clock and pool. ValueError if they do not
    fit. Groups that agents of other processes had begun start again: none is lost, and none is counted twice."""
    load_optimizers(optimizers, state["optimizers"], state["now"].get("step", 0))
    if source:
        try:
            restore_episodes(state, source)
        except (TypeError, KeyError, AttributeError, ValueError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"the checkpoint's queue, pool or clock: {reason}") from None
    if isinstance(source, Served):
        source.start([t for t, when in source.queue.due.items() if when > source.now], state["now"]["step"])

def restore_episodes(state, source):
    """Queue, clock, and the pool's trajectories. An error, of any kind that Python has, if they are none."""
    queue = source.queue
    saved = state["queue"]
    tokens = source.model.cfg.vocab_size
    check_fields("queue", saved, dict(next=int, born=dict, due=dict, batch=list, idle=float))
    check_fields("the checkpoint", state, dict(clock=float, pool=dict))
    if saved.keys() != vars(queue).keys():
        raise ValueError(f"a queue has {', '.join(vars(queue))}, not {', '.join(map(str, saved))}"[:200])
    for task, (admitted, version) in saved["born"].items():
        fields = dict(task=task, admitted=admitted, version=version)
        check_fields(f"group {task}", fields, dict(task=int, admitted=float, version=int))
    for task, when in saved["due"].items():
        if task not in saved["born"] or type(when) not in (int, float) or math.isnan(when):  # inf: no deadline
            raise ValueError(f"group {task}, due at {str(when)[:40]}")
    if not set(saved["batch"]) <= set(saved["born"]) or set(saved["born"]) != set(state["pool"]):
        raise ValueError("the groups in flight and those in the pool are not the same")
    pool = {task: [restore_episode(task, fields, tokens) for fields in group] for task, group in state["pool"].items()}
    if not all(pool.values()):
        raise ValueError("a group has no episodes")
    vars(queue).update(saved, slots=queue.slots, window=queue.window, deadline=queue.deadline)
    source.now = state["clock"]
    source.pool = pool

def restore_episode(task, fields, tokens):
    """Fields of a trajectory of group `task` -> it. ValueError for turns that do not hold together."""
    check_fields(f"an episode of group {task}", fields, dict(task=int, samples=list, rewards=list, success=bool,
                                                             seconds=float, said=dict))
    episode = Trajectory(**{**fields, "samples": [Sample(**turn) for turn in fields["samples"]]})
    for turn in episode.samples:
        action = (len(turn.ids) - turn.start,)
        fits = turn.logprobs.shape == turn.versions.shape == action and 0 < turn.start < len(turn.ids)
        fits = fits and turn.ids.dtype == turn.versions.dtype == torch.int64 and turn.logprobs.is_floating_point()
        fits = fits and turn.ids.dim() == 1 and 0 <= turn.ids.min() and turn.ids.max() < tokens
        if not fits or turn.routes is not None and len(turn.routes) != len(turn.ids):
            raise ValueError(f"a turn of group {task}: ids, log-probs and versions do not fit each other or the model")
    if not all(type(reward) in (int, float) and math.isfinite(reward) for reward in episode.rewards):
        raise ValueError(f"rewards of group {task}: {str(episode.rewards)[:40]}")
    return episode

def draw(lines, path, task):
    """Draw curves, {name: (steps,)}, into the file `path`."""
    from matplotlib.figure import Figure
    axis = Figure(figsize=(7, 3.5), layout="constrained").subplots()
    for name, values in lines.items():
        axis.plot(values, label=name)
    axis.set(ylim=(0, 1.02), xlabel="step", ylabel=f"{task}: share solved, sampled")
    axis.figure.legend(handles=axis.lines, loc="outside right upper")
    axis.figure.savefig(path, format=figure_format(path))

# ---- the gateway's door: agents of other processes, through OpenAI's protocol ---------------------
# Any agent that speaks OpenAI's chat completions can be trained: it claims an episode, asks for turns under the
# episode's name in place of a model's, and reports rewards. Its code is a black box; the gateway sees all it needs.
# sample.py's server carries it: an event loop hears all connections, so that an idle or slow one holds up no other.
# What they ask is put into a queue, and the run's thread answers it between two steps: the model has one user at a
# time.

class Served(Gateway):
    """Agents of other processes, in real seconds, on loopback.

    POST /v1/tasks {}                                          -> {task, messages}: an episode is claimed
    POST /v1/chat/completions {model: task, messages}          a turn of it, OpenAI's protocol, at temperature 1, of 16
                                                               tokens at most, whatever is asked for
    POST /v1/finish {task, rewards, success: bool}             its end, with a reward for each turn
    """

    def __init__(self, model, args, queue):
        super().__init__(model, args, queue)
        self.open = {}                 # name of an episode, "group.row" -> it, until its end
        self.claimed = set()
        self.token = args.token or os.urandom(16).hex()
        self.asked = SimpleQueue()     # (path, raw body, client)
        self.over = False
        self.door = Door(args.serve)
        paths = ("/v1/tasks", *KEY_FIELD)
        self.door.open(make_app(self.token, dict.fromkeys(paths, self.ask), most=MAX_BODY))

    def close(self):
        """Accept no more requests; clients that still wait for an answer get a refusal."""
        self.over = True
        with contextlib.suppress(Empty):
            while True:
                *_, client = self.asked.get_nowait()
                client.tell(Refused(503, "the run is over"))
        self.door.close()

    async def ask(self, request):
        """On the event loop: a request waits here for the run's thread, which answers it."""
        raw, client = request.scope["heard"]
        with contextlib.suppress(TimeoutError):  # a client may have left as it asked: a moment shows it
            await asyncio.wait_for(client.left.wait(), MOMENT)
        self.asked.put((request.url.path, raw, client))
        if self.over:
            raise Refused(503, "the run is over")
        for status, said in await client.hear():
            return reply(said) if status == 200 else refusal(status, said)
        raise Refused(400, "the client has left")

    def start(self, tasks, version):
        """Open the episodes of these groups: from now on clients can claim them, and play the policy `version`."""
        self.version = version
        for task in tasks:
            self.pool[task] = [Trajectory(task) for _ in range(self.args.rollouts)]
            for row, episode in enumerate(self.pool[task]):
                self.open[f"{task}.{row}"] = episode

    def answer(self, path, raw, client):
        """One request, in the run's thread -> status, and a JSON object or what is wrong. Episodes are named
        "group.row"; the name stands for a model's in a completion."""
        try:
            body = json.loads(raw)
            if not isinstance(body, dict):
                raise TypeError("not a JSON object")
            if path == "/v1/tasks":
                return 200, self.claim()
            key = str(body.get(KEY_FIELD.get(path)))
            if key not in self.open:
                raise Refused(404, f"unknown path or task, or one that is over: {path}, {key}"[:200])
            if key not in self.claimed:  # or its next turn would be another client's, who claims it later
                raise Refused(409, f"task {key} is not claimed: POST /v1/tasks claims one")
            if path == "/v1/finish":
                return 200, self.finish_episode(key, body)
            n_context = self.check_turn(key, body)
        except Refused as error:
            return error.args
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            return 400, f"a JSON object, rewards numbers, messages [{{role, content}}]: {repr(error)[:200]}"
        return 200, self.take_turn(key, body, n_context, client)

    def claim(self):
        """An episode that no client plays yet -> its name and its first messages."""
        key = next((key for key in self.open if key not in self.claimed), None)
        if key is None:
            raise Refused(409, "no task is waiting")
        self.claimed.add(key)
        agent = make_task(self.args, self.open[key].task).agent()
        return dict(task=key, messages=next(agent))

    def finish_episode(self, key, body):
        """The end of an episode, with a reward for each of its turns."""
        episode = self.open[key]
        rewards = [float(reward) for reward in body["rewards"]]
        if len(rewards) != len(episode.samples) or not all(abs(reward) <= 1e3 for reward in rewards):
            raise ValueError(f"{len(episode.samples)} turns, a reward of at most 1000 each: {rewards}"[:200])
        admitted, _ = self.queue.born[episode.task]
        episode.finish(rewards, body["success"] is True, self.now - admitted)
        del self.open[key]
        return dict(turns=len(rewards))

    def check_turn(self, key, body):
        """ValueError for a turn that cannot be served -> tokens of its context."""
        if body.get("stream") or body.get("n") not in (None, 1):  # other options, null or not, change nothing
            raise ValueError(f"stream {body.get('stream')}, n {body.get('n')}: no stream is served, and n is 1")
        if not isinstance(body["messages"], list):
            raise ValueError(f"messages {body['messages']!r:.60}: a list is needed")
        n_context = len(self.context(self.open[key], body["messages"]))
        room = self.model.cfg.max_seq_len - MAX_NEW
        if not 1 <= n_context <= room:
            raise ValueError(f"{n_context} tokens of context: 1 to {room} are served")
        return n_context

    def take_turn(self, key, body, n_context, client):
        """One completion, in OpenAI's form. A turn whose client is gone by its end was not taken."""
        episode = self.open[key]
        agent = (messages for messages in [body["messages"]])  # it has one turn, and hears nothing
        rollout(self, [(episode, agent)], self.version)
        ids = episode.samples[-1].ids[n_context:].tolist()
        message = dict(role="assistant", content=self.tokenizer.decode(ids))
        if client.gone:
            episode.samples.pop()
            episode.said[message["content"]].pop()
        turn = dict(index=0, message=message, finish_reason="stop" if ids[-1] in STOP else "length")
        usage = dict(prompt_tokens=n_context, completion_tokens=len(ids), total_tokens=n_context + len(ids))
        return dict(id=f"{key}-{n_context}", object="chat.completion", created=int(time.time()), model=key,
                    choices=[turn], usage=usage)

    def wait(self, stop, seconds):
        """Answer clients until a batch of groups is over, for at most so many seconds."""
        started = time.monotonic() - self.now
        until = self.now + seconds
        while not self.queue.take(self.args.groups, self.now) and not stop and self.now < until:
            with contextlib.suppress(Empty):
                self.answer_one(*self.asked.get(timeout=0.05), started)
            self.now = time.monotonic() - started

            # episodes past the deadline are over, and groups of which none is open
            late = [key for key, episode in self.open.items() if self.queue.due[episode.task] <= self.now]
            for key in late:
                self.open.pop(key).fail()
            still_open = {episode.task for episode in self.open.values()}
            for task in self.queue.due.keys() - still_open:
                self.queue.finish(task)

    def answer_one(self, path, raw, client, started):
        """Answer one request, whatever happens in it. started: of the run, on the monotonic clock."""
        self.now = time.monotonic() - started
        if client.gone:                # one that gave up during a training step asks again, or does not
            return
        try:
            client.tell(self.answer(path, raw, client))
        except Exception as error:     # its turn is lost, the run goes on
            print(f"gateway | {path}: {error!r}", flush=True)
            client.tell((500, repr(error)[:200]))

def main(argv=None):
    return command("rl.py", lambda locks: run(*parse_args(argv, locks)), "; the last good checkpoint is kept")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_ctrl_c)
    main()
