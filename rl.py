"""Forge, MiniMax's agent-RL system (arXiv 2605.26494), in one file: agents, gateway, queue, prefix trees, CISPO.

    python rl.py                                # a model learns to use a calculator: two CPU cores, three minutes
    python rl.py --task maze                    # key-value maze, five minutes; --turns 40: a longer one
    python rl.py --task cap                     # the same in a context that is too small
    python bench.py --what queue                # strict FIFO, window and greedy on one virtual clock
    python bench.py --what thoughts             # thoughts kept in the agents' history, or dropped
    python rl.py --serve 8000 --teach 12        # agents of other processes, as they are, through OpenAI's protocol
    python rl.py --task my_task.py --init out   # a task of one's own, see TaskFile; begin from a checkpoint of train.py
    python rl.py --play                         # the trained agent at work, and how much better it has become
    python rl.py --task evolve                  # a policy reads the logs of training runs and repairs them
    python rl.py --task evolve --serve 8000     # any agent works on train.py itself, before a judge: .ci/engineer.py
    torchrun --nproc-per-node 2 rl.py           # one process trains while another one rolls out, a GPU each

    agents   know a completion interface and nothing else: messages -> text
    gateway  records what crosses it, by token: id, log-prob, version of the policy; nothing is tokenised twice
    door     an episode is an address that any agent can be given in place of a model's
    judge    an agent at work on train.py itself: a sandbox runs its copy, and only the weights that this writes count
    queue    windowed FIFO over groups: the trainer takes finished ones from [head, head + W - 1]
    rollout  all episodes in lock step, a token a forward; prompts and tool results are forced tokens
    train    a turn is a sample (context, action); the samples of a group merge into a prefix tree
    ranks    of several processes some train and the others roll out, at the same time; weights are pushed in between
    loss     CISPO: -1/Z sum sg(min(pi / pi_old, 1 + eps)) A log pi;  A = reward to go - mean return of the others
             Z: action tokens of a step, sg: stop gradient, pi: the policy, pi_old: that of the rollout, A: advantage

Differs from M2: clip, rewards' weights and baseline, not published, are ours, and marked. A stuck task fails at a
deadline; the report's window would wait for ever.
"""
import os
import signal
import sys
import threading

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: no traceback
    at_ctrl_c = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told in our line, without C++'s stack

    # on a busy machine they take so long that a line says what happens
    SLOW_S = 4.0                       # seconds
    slow = threading.Timer(SLOW_S, print, ["start   | importing torch, on a busy machine"], dict(flush=True))
    slow.daemon = True
    if not {"-h", "--help"} & set(sys.argv):
        slow.start()

import argparse
import asyncio
import bisect
import compileall
import contextlib
import ctypes
import difflib
import functools
import glob
import hashlib
import hmac
import itertools
import json
import math
import multiprocessing
import pickle
import re
import runpy
import shlex
import shutil
import sqlite3
import stat
import statistics
import struct
import subprocess
import sysconfig
import tempfile
import time
import traceback
import typing
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from queue import Empty, SimpleQueue
from random import Random, SystemRandom

import numpy as np
import torch
import torch.distributed as dist

from model import Context, Losses, MiniMax, MiniMaxConfig, rope_tables
from moe import max_violation
from msa import widen
from sample import (LOOK_S, MODEL_ID, MOST_WAITING, UNREAD, Asked, Door, Engine, Parser, Piece, Prompt, Protocol,
                    Refused, Sampling, SaveTimer, Score, Stream, Threads, Tokenizer, World, call_object, check_config,
                    check_fields, check_figure, check_finite, check_memory, check_weights, checkpoint_path, command,
                    event, figure_format, first_line, form_batches, implementations, in_index_warmup, learn_bpe,
                    load_checkpoint, load_model, load_optimizers, lock_folder, lockstep, make_app, make_prefixes,
                    message_text, number, on_signals, pack_routes, pick_device, play, read_flag, read_logprobs,
                    read_number, read_object, read_stops, reply, save_checkpoint)
from train import (Tokens, checkpoint_parts, configure_optimizers, encode, evaluate, get_batch, is_index, list_files,
                   merge_args, read_corpus, round_up, schedule, set_rates, share_done, step_bytes, update)
from train import train_step as text_step

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
STOPS = ("]", ".")                     # a call or an answer ends with one of these
CAP = 64                               # characters of context in --task cap
# imitation
WARM_LR = 1.2e-2                       # its rate
WARM_TASKS = 64                        # of a step
WARM_EVERY = 20                        # steps between its saves, and between its lines,
WARM_SECONDS = 10.0                    # unless so much time is over since the last
WRONG = 1.2                            # characters of a demonstration that the teacher gets wrong, on average
PREFACE = 256                          # characters before a step's demonstrations, at most, with --teach
# the run
ROLLOUTS = dict(evolve=8)              # episodes of a group, where it is not 4: most edits gain nothing
MINUTES = dict(calculator=2.9, maze=4.9, cap=4.9, evolve=4.0)  # where neither --minutes nor --steps is given,
OWN_MINUTES = 4.9                      # of a task of one's own,
SERVED_MINUTES = 9.9                   # and with --serve
WINDOW_SHARE = 0.3                     # of --slots: the queue's window
EMA = 0.9                              # what the running mean of the share solved keeps of itself in a step
BIAS_SHARE = 0.05                      # u of the router's load balancing, of the rate: see learn_from_rewards
# a collapse
COLLAPSE_STEPS = 30                    # steps that it is judged by
COLLAPSE_SOLVED = 0.05                 # share of their episodes that is solved, at most
COLLAPSE_ENTROPY = 0.5                 # of the first step's: by then the policy has settled
MICRO_TOKENS = 16384                   # slots of a micro-batch at most, so that its activations fit a small GPU
LONG_PROMPT = 256                      # tokens that all groups share: more are worth one tree for all of them
ROUNDING = 16                          # units of the last place: eight times what is left of terms that cancel
# agents of other processes
MAX_BODY = 1 << 20                     # bytes of a request to the gateway, or more, where the context is longer
MOMENT = 0.002                         # seconds in which the end of a client that has left arrives behind its request
KEY_FIELD = {"/v1/chat/completions": "model", "/v1/finish": "task"}  # path -> where a request names its episode
SERVED_CONTEXT = 8192                  # tokens: agents' system prompts run to thousands
DEADLINE = 600.0                       # seconds that a group has on the virtual clock
SERVED_DEADLINE = 120.0                # ... and with --serve, from its first claim on
LESSONS = 2                            # split of the tasks that the teacher plays at the door
LESSON_LR = 6e-3                       # rate of what is learned from them
LESSON_TASKS = 32                      # of a step

PLAYED = 200                           # fresh tasks of --play, and
SHOWN = 3                              # of these, so many word for word
PLAYED_AT_ONCE = 96                    # as many as a step plays: a cache for each must fit
COLUMN = 24                            # characters of what the policy writes, before its reward
HEARD = 60                             # characters of what it heard, in an episode that a run shows
OWN_CONTEXT = 256                      # tokens of context where --task names a file
TRIED = 16                             # tasks of a file that its teacher plays at the start, to find mistakes early
BUILT_IN = ("calculator", "maze", "cap", "tally", "evolve")

# what a checkpoint comes from, beside its flags: the digest of --task's file, run and step of --init's checkpoint
NO_ORIGIN = dict(task=None, init=None)
# what the model of a checkpoint depends on
MADE_BY = ("task", "turns", "preset", "attn", "mtp", "init", "thoughts", "tool_errors", "reruns", "logs")
# flags that older checkpoints lack -> what these did
ADDED = dict(thoughts="keep", tool_errors=0.0, reruns=1, logs="true")

# ---- agents: they see messages and text, nothing of the model ------------------------------------
# An agent is a coroutine. It yields a list of messages, {role, content}, and is sent the text that the policy writes in
# reply: that is a turn. A tool answers a call, and the next turn's messages hold call and answer. An episode is all
# turns from a task to its end. A group is several episodes of one task: they differ in what was sampled alone, so that
# the others' returns say how good one episode is. Texts are in a language of a few characters, which a model of a
# million parameters learns in a minute:
#     Q12+3;     a task of the calculator        t1[12+3]   a call, 1: a thought, how many operations remain
#     =15;       what the tool says, =?; if the call is malformed             A15.   the answer, which ends an episode
#     =!;        the tool failed (--tool-errors): the same call may work now
# The policy thinks before each call. Whether later turns see these thoughts is the agent's choice, not the policy's:
# the messages are its own, and clients that strip thoughts from them (--thoughts drop) are common.

ERROR = "!;"                           # what a tool says that fails

def without_thought(text):
    """A call as a client that strips thoughts sends it back: t2[12*3] -> t[12*3]. Other texts stay as they are."""
    return re.sub(r"^t\d\[", "t[", text)

def without_errors(messages):
    """Messages less the ERRORs of tools, and less the calls that met them: as if no tool had failed."""
    kept = []
    for message in messages:
        if message["role"] == "tool" and message["content"] == f"={ERROR}":
            kept.pop()                 # the call
        else:
            kept.append(message)
    return kept

def draw_faults(share, difficulty, rng):
    """-> which calls of an episode, counted from 0, meet a tool that fails: about this share of the first ones."""
    return frozenset(call for call in range(most_faults(difficulty)) if rng.random() < share)

def most_faults(difficulty):
    """How many there can be in an episode: its context has room for so many."""
    return 2 * difficulty + 3

def size(messages):
    """Characters of a context."""
    return sum(len(message["content"]) for message in messages)

class Task:
    """Calls of a tool, then an answer.

    A subclass has
    prompt, answer   texts, or what str makes one
    difficulty       about the number of calls that it takes
    alphabet         characters of a call's arguments
    tool             a call's text -> observation, with its last mark; None for a malformed call. Messages show it
                     behind a "="
    expert           messages -> text: a teacher
    """
    alphabet = ""
    cap = math.inf                     # characters of context; an episode that needs more fails
    drops_thoughts = False             # whether the agent leaves thoughts out of the messages of later turns
    faults = frozenset()               # calls, counted from 0, at which the tool fails
    limit = None                       # turns of an episode, at most; None: three more than its difficulty
    answer = None                      # a task file may have a reward in its place
    stops = STOPS                      # a completion ends with the first of these texts
    max_new = MAX_NEW                  # tokens of a completion, at most
    demonstrations = 1                 # that the teacher gives of it, in a step of the imitation

    def reward(self, text, observation):
        """What a completion is worth as an answer, 1 if it solves the task; None: it is no answer, but a call.

        text         of the completion
        observation  what the tool said last; None: nothing
        An answer that differs from the tool's last observation fails, even if it is right, and costs as a malformed
        call does: otherwise guessing would look safe."""
        if not text.startswith("A"):
            return None
        if observation is None or text != f"A{observation[:-1]}.":
            return PROCESS
        return float(observation[:-1] == str(self.answer))

    def result(self, text):
        """What a tool said to an agent that knows nothing of the task's marks -> as the task's own texts have it."""
        if not text.startswith("="):
            text = "=" + text
        return text if text.endswith((";", "!")) else text + ";"

    def agent(self):
        """One episode: yields messages, is sent a completion's text, None if the context is too long -> a reward for
        each turn, success, virtual seconds.

        Success pays 1, and for speed SPEED * h(x), h(x) = clip(1 - x, -1, 1), x the episode's time over a baseline.
        Under a cap, the call D] drops all messages but the prompt and the last observation: what to forget is an
        action, too. Past its limit of turns an episode has failed; calls at which the tool failed do not count."""
        prompt = dict(role="user", content=self.prompt)
        baseline = 2 * self.difficulty * (CALL_S + 8 * CHAR_S)
        limit = self.difficulty + 3 if self.limit is None else self.limit
        if self.cap < math.inf:
            limit += self.difficulty   # to drop takes a turn
        messages = [prompt]
        rewards = []
        seconds = 0.0
        n_calls = 0
        given = None                   # what the tool said last
        while len(rewards) < limit and size(messages) <= self.cap:
            text = yield messages
            if text is None:
                break
            seconds += CALL_S + CHAR_S * len(text)

            # an answer ends the episode
            worth = self.reward(text, given)
            if worth is not None:
                success = worth >= 1
                if success:
                    worth += SPEED * max(-1.0, min(1.0, 1 - seconds / baseline))
                return [*rewards, worth], success, seconds

            # a turn of forgetting, or a call of the tool
            if text == "D]" and self.cap < math.inf:
                messages = [prompt, *without_errors(messages)[1:][-1:]]
                rewards.append(0.0)
                continue
            observation = self.tool(text)
            if n_calls in self.faults:
                observation = ERROR
                limit += 1
            elif observation is not None:
                given = observation
            n_calls += 1
            rewards.append(PROCESS if observation is None else 0.0)
            shown = without_thought(text) if self.drops_thoughts else text
            reply = dict(role="tool", content="=?;" if observation is None else f"={observation}")
            messages = [*messages, dict(role="assistant", content=shown), reply]
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
        """The next operation, on the last result. When none is left, that is the answer. When a call was malformed, the
        teacher gives up, with 0. When the tool failed, it calls again."""
        worked = without_errors(messages)
        done = len(worked) // 2
        last = worked[-1]["content"][1:-1]
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
        worked = without_errors(messages)
        key = worked[-1]["content"][1:3]
        if size(messages) + 10 > self.cap and len(messages) > 2:
            return "D]"
        if key in self.next:
            return f"t{len(worked) // 2 % 10}[{key}]"
        return f"A{key}."

class Tally(Task):
    """The last digit of a sum: T3; t0[1] =7; t7[2] =5; t2[3] =4; A6. A call reads one digit. The thought: the sum of
    those before, which stands nowhere else: without it each turn has to add all of them again. Built to show what
    thoughts in the history are worth."""
    alphabet = "0123456789"

    def __init__(self, rng):
        self.difficulty = rng.randint(2, 6)
        self.digits = [rng.randrange(10) for _ in range(self.difficulty)]
        self.prompt = f"T{self.difficulty};"
        self.answer = sum(self.digits) % 10

    def reward(self, text, observation):
        """No observation is the answer: any digit may be."""
        if not text.startswith("A"):
            return None
        if observation is None or re.fullmatch(r"A\d\.", text) is None:
            return PROCESS
        return float(text == f"A{self.answer}.")

    def tool(self, text):
        """The digit at the place in the call."""
        call = re.fullmatch(r"t\d\[([1-9])\]", text)
        if call is None or int(call[1]) > len(self.digits):
            return None
        return f"{self.digits[int(call[1]) - 1]};"

    def expert(self, messages):
        """Read the first digit that was not read; when all were, say the sum of them."""
        read = set()                   # places
        worked = without_errors(messages)
        for call, heard in zip(worked[1::2], worked[2::2]):
            if heard["content"] != "=?;":
                read.add(int(call["content"][-2]))
        total = sum(self.digits[place - 1] for place in read) % 10
        for place in range(1, self.difficulty + 1):
            if place not in read:
                return f"t{total}[{place}]"
        return f"A{total}."

def make_task(args, number, split=0):
    """Task `number` of a split: a pure function of the seed, so that every group of a run is a fresh problem.
    Split 1 is the imitation's: its mazes have any length up to --turns."""
    name = f"{args.seed} {split} {number}"
    rng = Random(name)
    if args.own_task:
        task = OwnTask(args.own_task, number, rng)
    elif args.task == "calculator":
        task = Calculator(rng)
    elif args.task == "tally":
        task = Tally(rng)
    elif args.task == "evolve":
        task = draw_repair(args, rng, TEST_WORLDS if split == 2 else TRAIN_WORLDS)
    else:
        turns = rng.randint(2, args.turns) if split == 1 else args.turns
        task = Maze(rng, turns, cap=CAP if args.task == "cap" else math.inf)
    task.drops_thoughts = args.thoughts == "drop"
    task.faults = draw_faults(args.tool_errors, task.difficulty, Random(f"{name} faults"))
    return task

# ---- a task of one's own -------------------------------------------------------------------------
# --task names a Python file with a class Task. It is played as the tasks above are, and what goes wrong in it is told
# in one line, with the task's number. All that is random comes from rng: task 7 is the same task in every run.
#
#     class Task:
#         def __init__(self, rng):                        # a fresh problem
#             self.word = "".join(rng.choices("abc", k=4))
#             self.prompt = f"W{self.word};"
#
#         def tool(self, text):                           # a call -> what the tool says; None: it is malformed
#             call = re.fullmatch(r"r\[([abc]+)\]", text)
#             return f"{call[1][::-1]};" if call else None
#
#         def reward(self, text, observation):            # of an answer, 1: solved; None: it is a call
#             if text.startswith("A"):
#                 return float(text == f"A{self.word[::-1]}.")
#
#         def expert(self, messages):                     # a teacher, who may be missing
#             if len(messages) == 1:
#                 return f"r[{self.word}]"
#             return f"A{messages[-1]['content'][1:-1]}."

# what a task's class, or an object of it, may say; the kinds are those of check_fields
SAID_OF_TASK = dict(difficulty=int, alphabet=str, cap=(int, float), limit=(int, type(None)))

class TaskFile:
    """The file that --task names. Its class Task has __init__(rng), prompt, tool(text), and either an answer or
    reward(text, observation), with the meaning that they have in Task above; and, if it likes,

    expert(messages)   a teacher, to imitate: its text ends with the only stop in it
    alphabet           characters of a call's arguments, name[arguments], some of which the teacher gets wrong
    difficulty         about the calls that it takes: the speed that is paid for, and the limit, follow from it
    limit, cap         of an episode: turns, and characters of context
    stops, max_new     of a completion: texts that end it, and tokens at most
    """

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError as error:
            raise ValueError(f"--task {path}: {error.strerror}") from None
        self.digest = hashlib.sha256(text).hexdigest()
        self.told = set()              # errors of its tool that a line has told

    def load(self):
        """Run the file -> itself. ValueError, in one line, if it fails or lacks something."""
        try:
            names = runpy.run_path(self.path, run_name="task_file")
        except (Exception, SystemExit) as error:
            raise ValueError(f"--task {self.path}: {self.describe(error)}") from None

        # what it must have, before anything is built
        kind = names.get("Task")
        if not isinstance(kind, type):
            raise ValueError(f"--task {self.path}: it has no class Task")
        if not callable(getattr(kind, "tool", None)):
            raise ValueError(f"--task {self.path}: its class Task has no tool(text)")
        self.kind = kind
        self.has_reward = callable(getattr(kind, "reward", None))
        self.has_teacher = callable(getattr(kind, "expert", None))
        self.stops = getattr(kind, "stops", STOPS)
        self.max_new = getattr(kind, "max_new", MAX_NEW)
        stops = self.stops if isinstance(self.stops, (list, tuple)) else []
        if not stops or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"--task {self.path}: its stops are {self.stops!r:.60}: a list of texts is needed")
        if type(self.max_new) is not int or not 1 <= self.max_new <= 2 ** 16:
            raise ValueError(f"--task {self.path}: its max_new is {self.max_new!r:.60}: a number of tokens is needed")
        return self

    def describe(self, error):
        """An error within the file, in one line: its kind, what it says, and the last line of the file on its way."""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.path]
        text = str(error).splitlines()
        words = type(error).__name__
        if text:
            words += f": {text[0][:200]}"
        if lines and not isinstance(error, SyntaxError):  # whose text says the line
            words += f" (line {lines[-1]})"
        return words

class OwnTask(Task):
    """A problem of a task file, held to what Task promises. ValueError, in one line with the task's number, for what
    goes wrong in it: but what goes wrong in its tool, as a policy writes anything, makes a malformed call."""

    def __init__(self, file, number, rng):
        self.file = file
        self.number = number
        self.theirs = self.call("__init__", lambda: file.kind(rng))
        self.prompt = self.read("prompt")
        if not isinstance(self.prompt, str) or not self.prompt:
            self.refuse("prompt", f"{self.prompt!r:.60} is not a text")
        if not file.has_reward or hasattr(self.theirs, "answer"):
            self.answer = self.read("answer")

        # what it may say
        fields = {name: self.read(name) for name in SAID_OF_TASK if hasattr(self.theirs, name)}
        if fields.get("cap") == math.inf:  # as it is without one
            del fields["cap"]
        check_fields(f"{file.path}: task {number}", fields, SAID_OF_TASK, optional=SAID_OF_TASK)
        self.difficulty = 1
        vars(self).update(fields)
        self.difficulty = max(1, self.difficulty)
        self.stops = file.stops
        self.max_new = file.max_new

    def refuse(self, name, reason):
        """name: of the part of it that is wrong."""
        raise ValueError(f"{self.file.path}: task {self.number}: {name}: {reason}")

    def call(self, name, function):
        """function() -> what it returns; refused if it raises."""
        try:
            return function()
        except Exception as error:
            self.refuse(name, self.file.describe(error))

    def read(self, name):
        """An attribute that it must have."""
        if not hasattr(self.theirs, name):
            wanted = "reward(text, observation), or an answer" if name == "answer" else name
            self.refuse(name, f"its class Task has no {wanted}")
        return getattr(self.theirs, name)

    def tool(self, text):
        """What the tool says. What it raises is told once for each place in the file."""
        try:
            observation = self.theirs.tool(text)
        except Exception as error:
            where = self.file.describe(error)
            place = where.rpartition("(")[2]
            if (type(error), place) not in self.file.told:
                self.file.told.add((type(error), place))
                print(f"tool    | {self.file.path}: task {self.number}: tool({text!r:.60}): {where}: it counts as a "
                      "malformed call; this is told once", flush=True)
            return None
        if not isinstance(observation, str | None):
            self.refuse(f"tool({text!r:.60})", f"{observation!r:.60} is neither a text nor None")
        return observation

    def reward(self, text, observation):
        """The author's reward, or that of rl.py's own tasks."""
        if not self.file.has_reward:
            return super().reward(text, observation)
        name = f"reward({text!r:.60}, {observation!r:.60})"
        worth = self.call(name, lambda: self.theirs.reward(text, observation))
        if worth is None:
            return None
        try:
            worth = float(worth)
        except (TypeError, ValueError):
            self.refuse(name, f"{worth!r:.60} is neither a number nor None")
        if not abs(worth) <= 1e3:
            self.refuse(name, f"{worth}: it must be within 1000")
        return worth

    def expert(self, messages):
        """The teacher's text. Without a teacher, as long a text as there may be, to try how much memory turns take."""
        if not self.file.has_teacher:
            return "?" * (self.max_new - 1) + self.stops[0]
        text = self.call("expert", lambda: self.theirs.expert(messages))
        if not isinstance(text, str) or not text:
            self.refuse("expert", f"{text!r:.60} is not a text")
        return text

def try_teacher(gateway, args, context):
    """Play the first tasks of a file with its teacher, and say how that went. ValueError, in one line, for texts that
    a policy could not write, and for episodes that are longer than the context."""
    longest = 0
    firsts = []                        # tokens of each first turn, a completion of any length in it
    solved = 0
    for number in range(TRIED):
        task = make_task(args, number, 1)
        episode = demonstrate(gateway, task, Random(number), 0.0)
        solved += episode.success
        firsts += [sample.start + gateway.max_new for sample in episode.samples[:1]]
        for sample in episode.samples:
            longest = max(longest, sample.start + gateway.max_new)
            if has_teacher(args) and args.own_task:
                check_teacher(gateway, task, sample.ids[sample.start:].tolist())
    # what was written in place of a teacher's texts is longer than what a policy has to write
    needed = longest if has_teacher(args) else min(firsts, default=0)
    if needed > context:
        raise ValueError(f"--context {context}: episodes of --task {args.task} need up to {needed} tokens, "
                         f"{gateway.max_new} of them for a completion (--max-new-tokens)")
    if not has_teacher(args):
        return
    if args.own_task:
        print(f"teacher | solves {solved} of {TRIED} tasks, in at most {longest} of {context} tokens of context",
              flush=True)
        if not solved:                 # what the tool says comes behind a "=", which an author may forget
            print("teacher | none: it will teach what fails. Its last episode, what it said in <>:", flush=True)
            print_episode(episode, gateway.tokenizer.decode)

def check_teacher(gateway, task, ids):
    """ValueError, in one line, for a teacher's completion that no policy could write."""
    text = gateway.tokenizer.decode(ids)
    if len(ids) > gateway.max_new:
        task.refuse("expert", f"{text!r:.60} has {len(ids)} tokens: {gateway.max_new}, its max_new, is the limit")
    if not gateway.has_ended(ids) or gateway.has_ended(ids[:-1]):
        stops = " or ".join(map(repr, gateway.stops))
        task.refuse("expert", f"{text!r:.60}: a completion ends with the first {stops} in it")

def has_teacher(args):
    """Whether there is somebody to imitate."""
    return not args.own_task or args.own_task.has_teacher

# ---- self-evolution: the inner run ---------------------------------------------------------------
# M2.7 is said to read the logs of its own training, to find what is wrong, and to change the settings. Here that is a
# task like the others, whose tool is our own training: a run of MiniMax with our optimizers, two layers, experts and
# MSA, over in less than a second. Something is wrong with it, or nothing. The policy sees the run's log, says what it
# thinks is wrong, changes one setting, and the run is repeated:
#     Exxvtsrr prsrrzo fd db f;      the log: loss, gradient's norm, experts' imbalance, index loss, validation
#     d[wd=0]                        the thought, d: weight decay; the edit
#     A.                             nothing is wrong, or nothing is left to do
# All is real: each log is that of a training run. For thousands of episodes a table of such runs serves, each made
# once. What a policy has learned is then tried live, on texts, seeds and widths that no run of the table had.

RUN_STEPS = 40
RUN_ROW = 64                           # tokens, which are bytes
RUN_RATE = 5e-2
RUN_DECAY = 0.6                        # share of the run
RUN_PIECES, RUN_PIECE = 8, 50_000      # of training text, drawn by the world: how many, of how many bytes
VAL_PIECES, VAL_PIECE = 128, 128       # of validation text
WIDTHS = (24, 32, 40)                  # of the model, drawn by the world
WORST = math.log(256)                  # nats a byte: no run counts as worse than chance
EDIT_FACTOR = 4                        # of the rate, or its square
FRESH = 1000                           # worlds from here on, and from twice this, read other text: see read_world

@dataclass(frozen=True)
class Recipe:
    """The settings of an inner run. The defaults are healthy ones; a fault is another value of one of them."""
    world: int = 0                     # text, width of the model, random weights, batches
    rate: float = 1.0                  # times RUN_RATE
    power: int = 0                     # of EDIT_FACTOR, times that: what edits of the rate add up to
    decay: float = 0.0                 # weight decay of the matrices, times the rate
    data: int = 0                      # batches that are repeated; 0: all are new
    noise: float = 0.0                 # share of the training text's bytes that are random ones
    init: float = 1.0                  # times the head's first weights
    batch: int = 8                     # rows of a step
    embed: float = 1.0                 # times the embedding's rate
    shift: int = 1                     # places from a token to its target
    text: str = "plain"                # what happened to the training text: see spoil
    warmup: float = 0.1                # run lengths
    bias: float = 0.01                 # u of the router's load balancing
    kl: float = 1.0                    # 0: the index branch does not learn
    clip: float = 1.0                  # norm of the gradient, at most. No fault: Muon and AdamW forget its size
    seed: int = 0                      # of weights and batches, within the world

@dataclass(frozen=True)
class Fault:
    """One thing that can be wrong with an inner run."""
    letter: str                        # of the thought that names it
    words: str
    setting: str                       # of the Recipe
    seen: tuple                        # its values in training and evaluation,
    held: tuple                        # and in the evaluation alone
    edits: tuple                       # any of which repairs it

FAULTS = (
    Fault("h", "rate too high", "rate", (8.0, 10.0, 16.0), (12.0,), ("lr/4", "lr/16")),
    Fault("l", "rate too low", "rate", (1 / 6, 1 / 8, 1 / 24), (1 / 14,), ("lr*4", "lr*16")),
    Fault("d", "weight decay", "decay", (12.0, 16.0, 19.0), (14.0,), ("wd=0",)),
    Fault("u", "the same few batches", "data", (1, 3, 4), (2,), ("data=all",)),
    Fault("n", "corrupted text", "noise", (0.2, 0.3, 0.5), (0.4,), ("noise=0",)),
    Fault("i", "head's first weights too large", "init", (30.0, 45.0, 100.0), (60.0,), ("init=1",)),
    Fault("b", "batch too small", "batch", (1, 3), (2,), ("batch=8",)),
    Fault("e", "embedding's rate too low", "embed", (0.03, 0.015, 0.01), (0.02,), ("emb=1",)),
    Fault("s", "targets shifted", "shift", (0, 2, 4), (3,), ("shift=1",)),
    Fault("t", "wrong text", "text", ("rot13", "backwards", "no spaces"), ("capitals",), ("text=ok",)))
# never met in training: its log shows a rate that is too low
HELD_OUT = Fault("w", "endless warm-up", "warmup", (), (4.0, 8.0, 16.0), ("warm=10%",))
# these show in the log, and need nothing
HERRINGS = (
    Fault("x", "no load balancing", "bias", (0.0,), (), ("bias=1%",)),
    Fault("y", "the index branch does not learn", "kl", (0.0,), (), ("kl=1",)))
RATE_EDITS = {"lr*4": 1, "lr*16": 2, "lr/4": -1, "lr/16": -2}  # -> powers of EDIT_FACTOR
EDITS = (*RATE_EDITS, *(fault.edits[0] for fault in (*FAULTS[2:], HELD_OUT, *HERRINGS)))
MOST_POWER = 2                         # of edits of the rate, together
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# what the letters a and z stand for, of each column of a log
COLUMNS = dict(loss=(0.35, 7.0), norm=(0.1, 10.0), vio=(0.05, 3.0), kl=(0.01, 2.0))
VAL_RANGE = (2.2, 5.6)
# the steps that an episode shows: between which two each is drawn, so that one run gives many logs
SHOWN_STEPS = ((1, 1), (2, 4), (5, 7), (8, 12), (16, 24), (26, 34), (37, 40))
LATE = (3, 6)                          # places of those at which the router's imbalance and the index's KL are shown

@dataclass(frozen=True)
class Log:
    """What an inner run prints, a letter a step, and how good its model is."""
    loss: str
    norm: str                          # of the gradient, before it is clipped
    vio: str                           # of the experts' load, mean over layers
    kl: str                            # of the index branch
    val: float                         # nats a byte of the validation text

def check_log(log):
    """ValueError for what no run prints."""
    for name in COLUMNS:
        if not re.fullmatch(f"[a-z]{{{RUN_STEPS}}}", getattr(log, name)):
            raise ValueError(f"{name} {getattr(log, name)!r:.60}: {RUN_STEPS} letters are needed")
    if type(log.val) is not float or not 0 <= log.val <= WORST:
        raise ValueError(f"val {log.val!r:.40}: a number from 0 to {WORST:.3f} is needed")

def letter(value, low, high):
    """A number -> one of 26 letters, on a logarithmic scale. One token a number: digits are memorised, not read."""
    if not math.isfinite(value):
        return LETTERS[-1]
    share = math.log(min(max(value, low), high) / low) / math.log(high / low)
    return LETTERS[round(share * (len(LETTERS) - 1))]

def edited(recipe, edit):
    """A recipe after one of EDITS. What it sets may have been so before: then nothing changes."""
    if edit in RATE_EDITS:
        power = recipe.power + RATE_EDITS[edit]
        return replace(recipe, power=max(-MOST_POWER, min(MOST_POWER, power)))
    for fault in (*FAULTS, HELD_OUT, *HERRINGS):
        if edit in fault.edits:
            return replace(recipe, **{fault.setting: getattr(Recipe, fault.setting)})
    raise ValueError(f"edit {edit!r:.60}: {', '.join(EDITS)}")

@functools.cache
def read_library():
    """All text of the standard library, in an order that has nothing to do with names -> ASCII bytes."""
    docs, _ = read_corpus(None)
    docs.sort(key=lambda doc: hashlib.sha256(doc[0].encode()).digest())
    return "".join(text for _, text in docs).encode("ascii", "ignore")

def spoil(text, how):
    """What may have happened to a training text, bytes -> bytes."""
    if how == "rot13":
        plain = LETTERS + LETTERS.upper()
        turned = LETTERS[13:] + LETTERS[:13]
        return text.translate(bytes.maketrans(plain.encode(), (turned + turned.upper()).encode()))
    if how == "backwards":
        return text[::-1]
    if how == "no spaces":
        return b"".join(text.split())
    if how == "capitals":
        return text.upper()
    return text

def lay_bytes(text):
    """Bytes -> Tokens, a token a byte."""
    ids = np.frombuffer(text, np.uint8)
    return Tokens([("", text.decode("ascii"))], Gateway.tokenizer, 8, RUN_ROW, [ids])

def read_world(recipe):
    """-> Tokens to train on and to validate on, width of the model. The library's last part is everybody's validation
    text. Of the pieces of the rest one half is for worlds below FRESH, a quarter for the next ones, a quarter for those
    from 2 FRESH on: what a policy is tried on no policy was trained on, and the live evaluation reads what no run of
    the table has read."""
    library = read_library()
    rest = int(0.95 * len(library))
    rng = Random(f"world {recipe.world}")
    quarters = ((0, 1), (2,), (3,))[min(recipe.world // FRESH, 2)]
    starts = [start for start in range(0, rest - RUN_PIECE, RUN_PIECE) if start // RUN_PIECE % 4 in quarters]
    pieces = [library[start:start + RUN_PIECE] for start in rng.sample(starts, RUN_PIECES)]
    train = spoil(b"".join(pieces), recipe.text)
    places = np.linspace(rest, len(library) - VAL_PIECE, VAL_PIECES).astype(int)
    val = b"".join(library[place:place + VAL_PIECE] for place in places)
    return lay_bytes(train), lay_bytes(val), rng.choice(WIDTHS)

def draw_batch(recipe, tokens, step):
    """A step's batch, with what the recipe does to it."""
    number = step % recipe.data if recipe.data else step
    batch = get_batch(tokens, recipe.seed, recipe.world, number, recipe.batch, RUN_ROW)
    idx = batch["idx"]
    if recipe.noise:
        seed = Random(f"noise {recipe.world} {recipe.seed} {number}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        is_bad = torch.rand(idx.shape, generator=generator) < recipe.noise
        idx = torch.where(is_bad, torch.randint(0, 256, idx.shape, generator=generator), idx)
        batch["targets"] = torch.cat([idx[:, 1:], batch["targets"][:, -1:]], 1)
    if recipe.shift != 1:
        after = torch.cat([idx[:, :1], batch["targets"]], 1)                                     # (rows, RUN_ROW + 1)
        missing = torch.full((len(idx), max(0, recipe.shift - 1)), -1)
        batch["targets"] = torch.cat([after[:, recipe.shift:], missing], 1)[:, :RUN_ROW]
    batch["idx"] = idx
    return batch

@contextlib.contextmanager
def one_thread():
    """Within it torch computes on one thread: several round otherwise, and forty steps later it is another run."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)

@one_thread()
@torch.inference_mode(False)
@torch.enable_grad()                   # an episode asks for it in the middle of a rollout, which needs no gradient
def run_recipe(recipe):
    """Train -> Log. A pure function of the recipe and the library's text."""
    train, val, width = read_world(recipe)
    cfg = MiniMaxConfig(
        vocab_size=Gateway.tokenizer.n_vocab, max_seq_len=RUN_ROW,
        n_layer=2, n_embd=width, n_head=2, n_kv_head=1, head_dim=16, rotary_dim=8,
        attn_types=["full", "msa"], mlp_types=["moe", "moe"],
        n_expert=4, n_expert_per_tok=1, expert_dim=2 * width,
        index_head_dim=16, index_block_size=8, index_topk_blocks=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Random(f"weights {recipe.world} {recipe.seed}").getrandbits(62))
        model = MiniMax(cfg)
    with torch.no_grad():
        model.lm_head.weight.mul_(recipe.init)
    optimizers, index, rest = configure_optimizers(model, RUN_RATE)
    matrices = [p for p in model.parameters() if p.dim() > 1]

    lines = {name: "" for name in COLUMNS}
    for step in range(RUN_STEPS):
        batch = draw_batch(recipe, train, step)
        found = text_step(model, batch, [], [rest, index])
        if recipe.clip != 1:
            torch.nn.utils.clip_grad_norm_(rest, recipe.clip)
        if not recipe.kl:
            for p in index:
                p.grad = None

        rate = RUN_RATE * recipe.rate * EDIT_FACTOR ** recipe.power
        rate *= schedule(step / RUN_STEPS, recipe.warmup, RUN_DECAY)
        set_rates(optimizers, rate)
        optimizers[1].param_groups[0]["lr"] *= recipe.embed  # AdamW's first group
        if recipe.decay:
            with torch.no_grad():
                for p in matrices:
                    p.mul_(1 - rate * recipe.decay)
        update(model, optimizers, found["expert_load"], recipe.bias)

        values = dict(
            loss=found["loss"], norm=found["norms"][0], vio=max_violation(found["expert_load"]).mean(),
            kl=found["index_kl"].sum())
        for name, value in values.items():
            lines[name] += letter(value.item(), *COLUMNS[name])
    bits = evaluate(model, val, RUN_ROW, 256, "cpu")["val_bpb"]
    nats = bits * math.log(2)
    return Log(**lines, val=min(nats, WORST) if math.isfinite(nats) else WORST)

# ---- self-evolution: runs that were made, and runs that are made now --------------------------------
# An edit leads to few places: a reset undoes one fault, and edits of the rate add up to one power of EDIT_FACTOR. So a
# table of all places that a problem's edits lead to holds episodes of any length. RunTable reads such a file, a line a
# run; LiveRuns makes a run when it is asked for one. An episode cannot tell them apart.

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".ci", "evolve.jsonl")
TRAIN_WORLDS = range(20)
TEST_WORLDS = range(FRESH, FRESH + 5)  # where policies and baselines are compared, from the table
LIVE_WORLDS = range(2 * FRESH, 3 * FRESH)  # of the last evaluation; the table does not have them
TRAIN_PAIRS, TEST_PAIRS = 2, 6         # problems with two faults, of each world
NULL_EDIT = dict(clip=0.5)             # changes a run, and should change nothing
OTHER_SEED = dict(seed=1)
CHECKED_ROWS = 2                       # of the table, made again at the start of a run: all further from what they were
MOST_SPREADS = 5.0                     # than so many times what another seed changes, they are other runs
ENOUGH = 2.0                           # standard deviations of the noise of seeds that a gain must have to be kept

@dataclass(frozen=True)
class Problem:
    """An inner run with faults, or without."""
    world: int
    faults: tuple = ()                 # (Fault, its setting's value) each

    def recipe(self):
        return Recipe(self.world, **{fault.setting: value for fault, value in self.faults})

def single_problems(world, seen=1, held=0):
    """A world's problems with one fault at most: none, each herring, each fault.

    seen, held   how many of a fault's values there are, of either kind; 0 and more than all: none, all
    """
    rng = Random(f"problems {world}")
    problems = [Problem(world)]
    for fault in HERRINGS:
        problems.append(Problem(world, ((fault, *fault.seen),)))
    for fault in FAULTS:
        values = rng.sample(fault.seen, min(seen, len(fault.seen))) + list(fault.held[:held])
        problems += [Problem(world, ((fault, value),)) for value in values]
    return problems

def pair_problems(world):
    """A world's problems with two faults, of the values that its single problems have."""
    rng = Random(f"pairs {world}")
    count = TEST_PAIRS if world in TEST_WORLDS else TRAIN_PAIRS
    singles = [problem.faults[0] for problem in single_problems(world) if problem.faults]
    singles = [(fault, value) for fault, value in singles if fault not in HERRINGS]
    problems = []
    while len(problems) < count:
        first, second = rng.sample(singles, 2)
        if first[0].setting != second[0].setting:
            problems.append(Problem(world, (first, second)))
    return problems

def test_problems(world):
    """-> dict of lists: seen, held (severities), unseen (the held-out fault), healthy, pairs."""
    rest = single_problems(world, held=1)
    healthy = [problem for problem in rest if not problem.faults or problem.faults[0][0] in HERRINGS]
    rest = [problem for problem in rest if problem not in healthy]
    held = [problem for problem in rest if problem.faults[0][1] in problem.faults[0][0].held]
    return dict(
        seen=[problem for problem in rest if problem not in held],
        held=held,
        unseen=[Problem(world, ((HELD_OUT, value),)) for value in HELD_OUT.held],
        healthy=healthy,
        pairs=pair_problems(world))

def places(problem):
    """All recipes that a problem's edits lead to, its own among them."""
    found = {problem.recipe(): None}
    todo = [problem.recipe()]
    while todo:
        recipe = todo.pop()
        for edit in EDITS:
            place = edited(recipe, edit)
            if place not in found:
                found[place] = None
                todo.append(place)
    return list(found)

def table_recipes():
    """The recipes of a table: what its worlds' problems lead to, and runs that measure noise."""
    recipes = {}
    for world in (*TRAIN_WORLDS, *TEST_WORLDS):
        problems = single_problems(world) + pair_problems(world)
        if world in TEST_WORLDS:
            problems = [problem for kind in test_problems(world).values() for problem in kind]
        for problem in problems:
            recipes.update(dict.fromkeys(places(problem)))
        for change in (NULL_EDIT, OTHER_SEED):
            recipes[Recipe(world, **change)] = None
    return list(recipes)

def recipe_fields(recipe):
    """A recipe's world, and what is not healthy about it."""
    return {name: value for name, value in vars(recipe).items() if name == "world" or value != getattr(Recipe, name)}

class Runs:
    """Inner runs, by their recipe. A subclass has log(recipe) -> Log."""

    def __init__(self):
        self.logs = {}                 # Recipe -> Log
        self.best = {}                 # (Recipe, reruns, keep) -> what best_gain says

    def gain(self, recipe, edit):
        """What an edit gains, in nats a byte of the validation text."""
        return self.log(recipe).val - self.log(edited(recipe, edit)).val

    def best_gain(self, recipe, reruns, keep):
        """What the best edits gain, each kept if it gains more than `keep`, and otherwise undone: the oracle."""
        key = (recipe, reruns, keep)
        if key not in self.best:
            best = 0.0
            for edit in EDITS if reruns else ():
                place = edited(recipe, edit)
                gain = self.gain(recipe, edit) if place != recipe else 0.0
                if gain > keep:
                    best = max(best, gain + self.best_gain(place, reruns - 1, keep))
            self.best[key] = best
        return self.best[key]

class LiveRuns(Runs):
    """Runs that are made when they are asked for, each once."""

    def log(self, recipe):
        if recipe not in self.logs:
            self.logs[recipe] = run_recipe(recipe)
        return self.logs[recipe]

    def make(self, recipes, processes, stop=()):
        """Make these runs, one a process at a time. KeyboardInterrupt once there is something in `stop`."""
        recipes = list(dict.fromkeys(recipes))
        for recipe, log in zip(recipes, make_runs(recipes, processes)):
            if stop:
                raise KeyboardInterrupt
            self.logs[recipe] = log

class RunTable(Runs):
    """Runs that were made, read from a file: a line of JSON each, after one that says with what they were made."""

    def __init__(self, path):
        super().__init__()
        try:
            with open(path, encoding="utf-8") as file:
                self.made_with = json.loads(file.readline())
                if not isinstance(self.made_with, dict):
                    raise ValueError("its first line does not say what made it")
                for line in file:
                    row = json.loads(line)
                    log = Log(**row.pop("log"))
                    check_log(log)
                    self.logs[Recipe(**row)] = log
        except (OSError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"--table {path}: {first_line(error)}") from None

    def log(self, recipe):
        """KeyError for a run that the table does not have."""
        return self.logs[recipe]

    def noise(self, change):
        """Mean and standard deviation, over worlds, of what a change of a healthy recipe gains, in nats."""
        gains = []
        for recipe, log in self.logs.items():
            if recipe == Recipe(recipe.world, **change):
                gains.append(self.logs[Recipe(recipe.world)].val - log.val)
        return spread(gains)

def count_cpus():
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

def library_digest():
    return hashlib.sha256(read_library()).hexdigest()[:16]

def end_with(parent):
    """In a process that another one started: end when that one has ended, even killed."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

def make_runs(recipes, processes):
    """Yield the Log of each recipe, in their order. Each process makes one run at a time, on one thread."""
    began = time.perf_counter()
    told = began
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, end_with, (os.getpid(),)) as workers:
        at_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes begin with what their parent does
        logs = workers.map(run_recipe, recipes, chunksize=4)
        signal.signal(signal.SIGINT, at_ctrl_c)
        for number, log in enumerate(logs, 1):
            yield log
            now = time.perf_counter()
            if now - told > TELL_EVERY:
                told = now
                left = (now - began) / number * (len(recipes) - number)
                print(f"runs    | {number} of {len(recipes)} in {now - began:.0f} s, eta {left / 60:.1f}m", flush=True)

def make_table(path, processes, recipes):
    """Make a table's runs and write them: the file appears when it is complete."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8"):
        os.remove(temporary)           # if it cannot be written, that shows now
    began = time.perf_counter()
    lines = []
    for recipe, log in zip(recipes, make_runs(recipes, processes)):
        lines.append(json.dumps(recipe_fields(recipe) | dict(log=vars(log)), separators=(",", ":")))
    made_with = dict(
        library=library_digest(), python=sys.version.split()[0], torch=torch.__version__,
        runs=len(lines), processes=processes, seconds=round(time.perf_counter() - began))
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join([json.dumps(made_with), *lines]) + "\n")
    os.replace(temporary, path)

def open_table(path):
    """The table of runs, which is made if there is none -> RunTable. Two of its rows, drawn at random, are made again:
    what they say is printed."""
    recipes = table_recipes()
    if not os.path.exists(path):
        processes = count_cpus()
        print(f"table   | {path}: {len(recipes)} training runs are made for it, {processes} at a time", flush=True)
        make_table(path, processes, recipes)
    runs = RunTable(path)
    missing = [recipe for recipe in recipes if recipe not in runs.logs]
    if missing:
        raise ValueError(f"--table {path}: {len(missing)} runs are missing, as {recipe_fields(missing[0])}: "
                         "without the file it is made anew")
    by = ", ".join(f"{name} {value}" for name, value in runs.made_with.items())
    print(f"table   | {by}", flush=True)
    print_faults(runs)
    if runs.made_with.get("library") != library_digest():
        print("table   | this Python's library is another text: what was learned from these runs is tried on others; "
              "--table FILE, a file that is not there, makes runs of this one", flush=True)
        return runs
    n_far = 0
    for recipe in SystemRandom().sample(calm_recipes(runs.logs), CHECKED_ROWS):
        was = runs.log(recipe).val
        again = run_recipe(recipe)
        same = "the same" if again == runs.log(recipe) else f"{again.val:.5f} now: this machine rounds otherwise"
        print(f"table   | {recipe_fields(recipe)} made again: {was:.5f}, {same}", flush=True)
        n_far += abs(again.val - was) > MOST_SPREADS * runs.noise(OTHER_SEED)[1]
    if n_far == CHECKED_ROWS:
        raise ValueError(f"--table {path}: the run {recipe_fields(recipe)} has {was:.5f} there, {again.val:.5f} here, "
                         "and the others differ as much: other code made it; without the file it is made anew")
    return runs

def calm_recipes(recipes):
    """Those whose rate is no higher than the healthy one. At higher ones rounding decides whether a run diverges: of 40
    rows from an AMD CPU, 4 were far away on an Intel one; of 70 calm rows 3."""
    return [recipe for recipe in recipes if recipe.rate <= 1 and recipe.power <= 0]

def spread(values):
    """Mean and standard deviation."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))

def print_faults(runs):
    """Print what each fault and herring costs, over the worlds of the table, and what its repair gains back."""
    unit = runs.noise(NULL_EDIT)[1]
    print(f"noise   | an edit that should change nothing: sd {unit:.3f} nats; another seed: sd "
          f"{runs.noise(OTHER_SEED)[1]:.3f}, of which {ENOUGH:g} must be gained")
    for fault in (*FAULTS, HELD_OUT, *HERRINGS):
        for value in (*fault.seen, *fault.held):
            changed = [recipe for recipe in runs.logs if recipe == Recipe(recipe.world, **{fault.setting: value})]
            harm, harm_sd = spread([runs.log(recipe).val - runs.log(Recipe(recipe.world)).val for recipe in changed])
            gains = {edit: spread([runs.gain(recipe, edit) for recipe in changed])[0] for edit in fault.edits}
            edit = max(gains, key=gains.get)
            which = "held out" if value in fault.held else ""
            shown_value = value if isinstance(value, str) else f"{value:.3g}"
            print(f"  {fault.letter} {fault.words:31} {shown_value:10} {which:8} | harm {harm:+.3f} +- {harm_sd:.3f}, "
                  f"{harm / unit:4.0f} sd | {edit} {gains[edit]:+.3f} | {len(changed)} worlds")

# ---- self-evolution: the task ----------------------------------------------------------------------

RERUN_COST = 0.1                       # of the reward, for the time of a rerun
LEAST_ORACLE = 0.1                     # nats: gains are paid in shares of what the best edits gain, or of this
DONE = "A."                            # says that nothing is wrong, or nothing is left to do
RIGHT = 0.25                           # share of the teacher's edits that are right
PAIR_SHARE = 0.2                       # of the problems in training that have two faults
FAILED_SHARE = 0.15                    # of those that begin behind an edit that failed
REPAIRED = 0.8                         # share of the best edits' gain from which on a run counts as repaired

def draw_repair(args, rng, worlds):
    """A problem of these worlds -> Repair."""
    world = rng.choice(worlds)
    problems = pair_problems(world) if rng.random() < PAIR_SHARE else single_problems(world)
    task = Repair(rng, args.runs, rng.choice(problems), args.reruns, args.keep, logs=args.logs)
    if rng.random() < FAILED_SHARE:
        task.fail_first()
    return task

class Repair(Task):
    """An inner run to repair, or to leave as it is."""
    demonstrations = 4                 # of a problem: as the teacher is wrong three times in four, one says little

    def __init__(self, rng, runs, problem, reruns=1, keep=0.0, oracle=None, logs="true"):
        """
        rng      draws the steps that are shown, and the teacher's mistakes
        runs     RunTable or LiveRuns
        reruns   at most
        keep     nats that an edit must gain, or it is undone
        oracle   what the best edits gain, in nats; None: look all of them up
        logs     "true"; or, to see what reading them is worth, "blank" or "shuffled", another run's
        """
        self.rng = rng
        self.runs = runs
        self.problem = problem
        self.reruns = reruns
        self.keep = keep
        self.logs = logs
        self.difficulty = reruns
        self.oracle = runs.best_gain(problem.recipe(), reruns, keep) if oracle is None else oracle
        self.steps = [rng.randint(*between) for between in SHOWN_STEPS]
        self.failed = None             # an edit that was tried and undone before the episode
        self.begin()
        self.prompt = self.describe()

    def begin(self):
        """As it was before the first edit."""
        self.recipe = self.problem.recipe()
        self.edits = []                # that were tried, and what each gained
        self.said = []                 # the texts that asked for them
        self.gain = 0.0                # of those that were kept
        self.rewards = []              # of each turn
        self.over = False

    def fail_first(self):
        """Begin behind an edit that failed, as the second turn of an episode does."""
        failing = [edit for edit in EDITS if self.runs.gain(self.recipe, edit) <= self.keep]
        self.failed = self.rng.choice(failing)

    def describe(self):
        """The log of the best run so far, as the policy reads it, a letter a number."""
        log = self.runs.log(self.recipe)
        if self.logs == "shuffled":
            world = self.rng.choice(TRAIN_WORLDS)
            log = self.runs.log(self.rng.choice(single_problems(world)).recipe())
        late = [self.steps[place] for place in LATE]
        words = [
            letters_at(log.loss, self.steps), letters_at(log.norm, self.steps),
            letters_at(log.vio, late), letters_at(log.kl, late),
            letter(log.val, *VAL_RANGE)]
        text = " ".join(words)
        if self.logs == "blank":
            text = re.sub("[a-z]", "_", text)
        return f"E{text};"

    def tool(self, text):
        """Edit, run again, keep what is better -> "k;", or "b;" (back); None for a malformed call."""
        call = re.fullmatch(r"[a-z]\[([^\]]+)\]", text)
        if call is None or call[1] not in EDITS:
            return None
        gain = self.runs.gain(self.recipe, call[1])
        self.edits.append((call[1], gain))
        self.said.append(text)
        if gain <= self.keep:
            return "b;"
        self.recipe = edited(self.recipe, call[1])
        self.gain += gain
        return "k;"

    def take(self, text):
        """A turn, and its reward: what an edit gains, as a share of what the best edits gain, less the time of the
        rerun. -> what the tool says; None where that ends the episode."""
        if text == DONE:
            self.rewards.append(0.0)
            self.over = True
            return None
        before = self.gain
        observation = self.tool(text)
        if observation is None:
            self.rewards.append(PROCESS)
            self.over = True
            return None
        self.rewards.append((self.gain - before) / max(self.oracle, LEAST_ORACLE) - RERUN_COST)
        self.over = len(self.edits) >= self.reruns
        return observation

    def agent(self):
        """As Task.agent. After an edit that is kept the messages begin anew, with the new run's log; what failed stays
        in them."""
        self.begin()
        messages = [dict(role="user", content=self.prompt)]
        if self.failed:
            messages += self.undone(f"{thought(self.failed)}[{self.failed}]")
        while not self.over:
            text = yield messages
            if text is None:
                break
            observation = self.take(text)
            if observation == "k;":
                messages = [dict(role="user", content=self.describe())]
            elif observation == "b;":
                messages = [*messages, *self.undone(text)]
        return self.finish()

    # the same for an agent that calls tools, see Environment

    @property
    def tools(self):
        log = ("A log has the loss of a small training run at 7 of its 40 steps, the norm of the gradient at the same "
               "steps, the imbalance of the experts at two, the loss of the index branch at two, and the loss on "
               "validation text, a letter each, from a, small, to z, large, on a logarithmic scale")
        return [
            function_schema(
                "edit", f"Change one setting and run again. What gains more than {self.keep:.3f} nats a byte of the "
                f"validation text is kept, all else undone. {log}",
                setting=("string", f"one of {', '.join(EDITS)}")),
            function_schema("done", "Nothing is wrong with the run, or nothing is left to do")]

    def call(self, name, arguments):
        """Use a tool -> what it says."""
        if name == "done":
            self.take(DONE)
            return "The episode is over."
        edit = arguments.get("setting")
        if name != "edit" or edit not in EDITS:
            return f"{name} {edit!r:.60}: the tools are edit, with one of {', '.join(EDITS)}, and done"
        observation = self.take(f"{thought(edit)}[{edit}]")
        words = f"{self.edits[-1][1]:+.3f} nats a byte"
        return f"undone: {words}" if observation == "b;" else f"kept: {words}; {self.describe()}"

    def result(self, text):
        """What `call` has said, as the policy reads it."""
        log = re.search("E[a-z_ ]+;$", text)
        return log[0] if log else "=b;"

    def finish(self):
        """-> rewards, success, seconds: a rerun's time is the unit."""
        return self.rewards or [0.0], self.is_repaired(), float(len(self.edits))

    @staticmethod
    def undone(text):
        """The messages of an edit that failed."""
        return [dict(role="assistant", content=text), dict(role="tool", content="=b;")]

    def is_repaired(self):
        """Whether the run is about as good as the best edits make it; where they make it no better, left as it is."""
        if not self.oracle:
            return not self.edits
        return self.gain >= REPAIRED * self.oracle

    def right_edits(self):
        """What repairs the faults that are left, and was not tried; DONE where there are none."""
        right = []
        for fault, value in self.problem.faults:
            is_left = getattr(self.recipe, fault.setting) == value
            if fault.setting == "rate":
                is_left = self.recipe.power == 0
            if is_left and fault not in HERRINGS:
                right += fault.edits
        tried = [self.failed, *(edit for edit, _ in self.edits)]
        return [edit for edit in right if edit not in tried] or [DONE]

    def expert(self, messages):
        """A teacher who is right one time in four, and else tries anything."""
        right = self.right_edits()
        wrong = [edit for edit in (*EDITS, DONE) if edit not in right]
        edit = self.rng.choice(right if self.rng.random() < RIGHT else wrong)
        return edit if edit == DONE else f"{thought(edit)}[{edit}]"

def letters_at(line, steps):
    """Of a log's column the letters of some steps, which are counted from 1."""
    return "".join(line[step - 1] for step in steps)

def thought(edit):
    """The letter of the fault that an edit repairs."""
    for fault in (*FAULTS, HELD_OUT, *HERRINGS):
        if edit in fault.edits:
            return fault.letter
    raise ValueError(f"edit {edit!r:.60}: {', '.join(EDITS)}")

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
    turn: int | None = None            # of its episode, several answers to one context are one; None: one each

    def __getstate__(self):
        """What travels to other ranks: NumPy's arrays pickle in a fraction of the time that tensors take."""
        return {name: x.numpy() if torch.is_tensor(x) else x for name, x in vars(self).items()}

    def __setstate__(self, state):
        vars(self).update({name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in state.items()})

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

def read_calls(message, where):
    """The tool calls beside a message's content -> [(id, name, arguments)]."""
    calls = message.get("tool_calls") or []
    if message.get("function_call"):  # what OpenAI's clients sent before there were several
        calls = [dict(function=message["function_call"])]
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a tool call is {{function: {{name, arguments}}}}, not {call!r:.60}")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | None):
            raise ValueError(f"{where}: the arguments of {function['name']!r:.40} are a string, not {arguments!r:.60}")
        found.append((call.get("id"), function["name"], arguments or ""))
    return found

def calls_text(calls):
    """Tool calls in the protocol of the tasks: name[arguments], one after the other."""
    return "".join(f"{name}[{arguments}]" for _, name, arguments in calls)

def said_key(text, calls, call_id=""):
    """What an agent sees of a completion, in one spelling: its text, and its tool calls, if there are any. call_id: of
    the first call, where the key is to name this completion alone."""
    if not calls:
        return text
    plain = []
    for _, name, arguments in calls:
        with contextlib.suppress(ValueError, RecursionError):  # clients write the same JSON with other spaces
            arguments = json.dumps(json.loads(arguments), sort_keys=True)
        plain.append([name, arguments])
    return f"{text}\0{call_id}{json.dumps(plain)}"

class Gateway:
    """The only place where text and tokens meet. The chat template is concatenation. A completion that comes back in a
    context becomes the tokens that were sampled: with merges "12" may be one token or two, and the text cannot tell."""
    tokenizer = Tokenizer(learn_bpe([], 257, "(?s:.)"))  # bytes; with --init, that of its checkpoint

    def __init__(self, model=None, args=None, queue=None):
        self.model = model
        self.args = args
        self.queue = queue
        self.now = 0.0                 # seconds since the start
        self.pool = {}                 # group -> its trajectories, until they have been trained on
        self.version = 0               # of the policy that plays
        self.n_sampled = 0             # tokens, in the rollouts of this process
        self.rollout_s = 0.0           # real seconds of these
        self.laps = []                 # of each step of this process
        own = args.own_task if args else None
        kind = own or Task
        self.stops = kind.stops
        self.max_new = kind.max_new
        if args and args.max_new_tokens:
            self.max_new = args.max_new_tokens
        self.origin = dict(NO_ORIGIN)  # what a checkpoint comes from, beside its flags
        if own:
            self.origin["task"] = own.digest

    def speak(self, tokenizer):
        """Texts and tokens of another tokenizer than bytes."""
        self.tokenizer = tokenizer

    def has_ended(self, ids):
        """Whether a completion has ended by itself: there is a stop in its text. Its tokens do not tell: with merges,
        a stop may be a part of one, or of several."""
        text = self.tokenizer.decode(ids)
        return any(stop in text for stop in self.stops)

    def context(self, episode, messages, tools=None, task=None):
        """Messages -> ids.

        episode   what was said in it comes back by token
        messages  as chat completions have them
        tools     of the request, which stand in front; None: it has none
        task      with tools, it says how a tool's answer looks in its own texts

        Two completions may have one text and different tokens, as all bytes that are not UTF-8 are shown alike. So
        messages are read from the last to the first, and each takes the latest completion of its text that is left. The
        only one left is not used up: a client may quote a completion twice. ValueError, naming the message, for what is
        not text."""
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
            known = []                 # tokens that were sampled for the text's beginning, each time
            if by_assistant:
                known, text = find_said(said, text, read_calls(message, where))
            elif tools and task is not None and message["role"] in ("tool", "function"):
                text = task.result(text)
            parts.append((known[-1] if known else []) + self.tokenizer.encode(text))
            if len(known) > 1:         # otherwise it is quoted: what was said once may come back twice
                known.pop()
        if tools:
            parts.append(self.tokenizer.encode(json.dumps(tools, separators=(",", ":")) + "\n"))
        return [token for part in reversed(parts) for token in part]

    def record(self, episode, context, ids, logprobs, version, routes=None, turn=None, keys=()):
        """Keep one completion as a sample of the episode -> its text.

        context, ids   tokens before it, and its own
        logprobs       of its ids, at temperature 1
        version        of the policy, or a list, of each token
        routes         of all these tokens, see pack_routes; None without --replay
        turn           number of its turn, where it may have had others
        keys           what an agent may send back in place of its text, see said_key
        """
        if not isinstance(version, list):
            version = [version] * len(ids)
        episode.samples.append(Sample(
            ids=torch.tensor(context + ids),
            start=len(context),
            logprobs=torch.tensor(logprobs, dtype=torch.float64),
            versions=torch.tensor(version),
            routes=routes,
            turn=turn))
        text = self.tokenizer.decode(ids)
        for key in dict.fromkeys([text, *keys]):
            episode.said.setdefault(key, []).append(ids)
        return text

    def publish(self, version):
        """Training has made the policy `version`: rollouts that begin from now on are its own."""

    def resume(self, version):
        """Play the groups that other ranks played when the checkpoint was written, with the policy `version`."""
        missing = [task for task in self.queue.born if task not in self.pool]
        for task in missing:
            self.queue.born[task] = (self.now, version)
        if missing:
            self.start(missing, version)

    def trained(self, tasks, step):
        """These groups went into a step of training."""

    def step_note(self):
        """What a step's line says of the agents, if there is something."""
        return ""

    def counts(self):
        """What the end of a run says of the agents, by name."""
        return {}

# a call as smolagents writes it into the text of its next request
CALL_AS_TEXT = re.compile(r"(.*?)\n?Calling tools:\n\[\{'id': '([^']+)'.*\]", re.S)

def find_said(said, text, calls):
    """A message of the assistant -> the tokens that were sampled for it, each time; what of its text, its calls written
    out, is beyond these.

    said   key -> tokens of each completion, see said_key
    A call's id names one completion, unless the client has changed what stands beside it. Otherwise text and calls
    together tell; or the text alone, where a client has turned it into calls, or parts of it, by itself. An agent may
    go on behind a completion, in a line of its own."""
    keys = [text]
    if calls:
        keys = [said_key(text, calls, calls[0][0]), said_key(text, calls)]
        if text:                       # no completion that said nothing
            keys.append(text)
    shown = CALL_AS_TEXT.fullmatch(text)
    if shown:
        keys.append(f"{shown[1].strip()}\0{shown[2]}")
    for key in keys:
        if said.get(key):
            return said[key], ""

    text += calls_text(calls)
    begins = [key for key in said if key and said[key] and (text == key or text.startswith(f"{key}\n"))]
    if not begins:
        return [], text
    longest = max(begins, key=len)
    return said[longest], text[len(longest):]

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

def play_episode(gateway, episode, agent, context_size):
    """A player of the loop: feeds an agent's contexts and hands it what was sampled. Its cache keeps what a new context
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
        if not 1 <= len(context) <= context_size - gateway.max_new:
            reply = None               # too long: the agent hears of it, and ends
            continue

        # one token of the context is always fed, for its logits
        kept = min(common_prefix(path, context), len(context) - 1)
        feed = context[kept:]
        ids = []
        logprobs = []
        versions = []
        while len(ids) < gateway.max_new and not gateway.has_ended(ids):
            token, logprob, notes = yield kept, feed
            kept = len(context) + len(ids)
            feed = [token]
            ids.append(token)
            logprobs.append(logprob)
            versions.append(gateway.version)

        path = context + ids[:-1]      # the last token was never fed
        routes = None
        if notes:
            routes = torch.from_numpy(np.stack(notes + notes[-1:]))
        reply = gateway.record(episode, context, ids, logprobs, versions, routes)

def rollout(gateway, episodes, version, generator=None, group=1, temperature=1.0):
    """Play episodes in lock step until each is over, or an agent of another process has had its turn.

    gateway    with the model; its --replay records routes, too
    episodes   [(trajectory, agent)]; `group` of one prompt lie side by side
    version    of the policy, for the record
    generator, temperature    of the sampling; temperature 0 is greedy
    """
    model = gateway.model
    gateway.version = version
    players = [play_episode(gateway, episode, agent, model.cfg.max_seq_len) for episode, agent in episodes]
    record = pack_routes if gateway.args.replay else None
    lockstep(model, players, group, Sampling(temperature, generator=generator), record)

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

    merge      one tree for a group, which computes the prompt once but masks across all branches; or one an episode.
               One for all groups, where they share a long prompt: full_attention leaves out what no query sees
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

    # what all samples begin with, an agent's system prompt, is computed once for the step
    every = [sample for episodes in groups for samples in episodes for sample in samples]
    if len(groups) > 1 and every:
        paths = [labels(sample) for sample in every]
        shared = min(common_prefix(paths[0], other) for other in paths)
        if shared >= LONG_PROMPT:
            return [PrefixTree(every, cfg)]

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

# ---- several processes ---------------------------------------------------------------------------
# One process rolls out and trains in turn. Under torchrun the first ranks train, and the others roll out at the same
# time: rank 0 has the queue, names groups to the rollout ranks and takes what they report. Each rollout rank plays all
# its groups side by side; a group is reported as soon as it is over, and the next one takes its place.
#
#     rank 0    "play" groups, "weights" of a version, "train" on groups, "end"  ->  the others
#     rollout   a group's episodes  ->  rank 0
#
# These are messages: nobody waits for one to be read. The trainer waits only if the window holds no batch, a rollout
# rank only if no slot is free. Weights travel by a collective, a broadcast from rank 0, which a rollout rank enters
# between two tokens: an episode in flight goes on with the new policy, with the keys and values that the old one
# computed (Forge's report does not say what it does). What pi_old was is known all the same: each token has the
# log-prob that it was sampled with, and the version. The broadcast comes before the message that names new groups, so
# that the policy of a group's first token is the one that the queue has noted, and no token's lag exceeds its group's.
# Train ranks have a whole model each. They share a step's groups out, each of which stays whole, so that its prefix
# tree does; gradients are summed, and all take the same step. FSDP, as in train.py, would want the same number of
# micro-batches on each, which trees do not have, and models that RL trains here fit one GPU.

POLL_S = 0.001                         # seconds from one look for a message to the next, where there is nothing to do
PIECE = 1 << 22                        # bytes of a message that the store takes at once; its limit is 8 MiB

class Mail:
    """Messages between ranks, by torch's TCPStore: they arrive in their order, and are kept until they are read."""

    def __init__(self, world):
        host = os.environ.get("MASTER_ADDR", "localhost")  # torchrun's: the machine of rank 0
        self.rank = world.rank
        self.n_sent = [0] * world.size  # pieces, by receiver
        self.n_read = [0] * world.size  # pieces, by sender
        port = 0                       # any that is free
        if world.is_first:
            self.store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
            port = self.store.port
        port, = world.agree(port)
        if not world.is_first:
            self.store = dist.TCPStore(host, int(port), is_master=False)

    def send(self, receiver, *message):
        raw = pickle.dumps(message)
        for start in range(0, len(raw), PIECE):
            is_last = start + PIECE >= len(raw)
            key = f"{self.rank} {receiver} {self.n_sent[receiver]}"
            self.store.set(key, bytes([is_last]) + raw[start:start + PIECE])
            self.n_sent[receiver] += 1

    def receive(self, sender):
        """-> the next message of a rank, None if there is none."""
        raw = b""
        is_last = False
        while not is_last:
            key = f"{sender} {self.rank} {self.n_read[sender]}"
            if not raw and not self.store.check([key]):
                return None
            piece = self.store.get(key)
            self.store.delete_key(key)
            self.n_read[sender] += 1
            is_last = bool(piece[0])
            raw += piece[1:]
        return pickle.loads(raw)

def rank_sizes(text):
    """A type for argparse: "train=1,rollout=3" -> {"train": 1, "rollout": 3}."""
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("train", "rollout") or name in sizes or not value.isdecimal() or int(value) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: numbers of train and rollout ranks, such as train=1,rollout=1")
        sizes[name] = int(value)
    return sizes

@dataclass
class Ranks:
    """Who does what, and what ranks tell each other. With one process there is nobody to tell."""
    world: World = World()
    n_train: int = 1                   # the first ranks; the others roll out
    mail: Mail | None = None
    trainers: "dist.ProcessGroup" = None  # the train ranks
    readers: "dist.ProcessGroup" = None   # rank 0 and the rollout ranks
    flat: torch.Tensor | None = None   # bytes of all weights, on their way
    push: "dist.Work" = None           # rank 0's last broadcast

    @classmethod
    def join(cls, world, device, sizes):
        """Meet the other ranks. sizes: of --parallel, None if it was not given; ValueError if they do not fit."""
        sizes = sizes or {}
        if world.size == 1:
            if sizes:
                raise ValueError("--parallel: one process; torchrun --nproc-per-node N rl.py ... starts N")
            return cls(world)
        # one train rank exchanges no gradients, and playing takes longer than training
        n_train = sizes.get("train", world.size - sizes.get("rollout", world.size - 1))
        n_rollout = sizes.get("rollout", world.size - n_train)
        if n_train < 1 or n_rollout < 1 or n_train + n_rollout != world.size:
            given = ",".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"--parallel {given}: {world.size} processes, of which at least one trains and one rolls "
                             "out")
        world.join(device)
        if device.type == "cuda":      # where Triton and NCCL look
            torch.cuda.set_device(device)
        every = range(world.size)
        return cls(
            world, n_train, Mail(world),
            trainers=dist.new_group([*every[:n_train]]),
            readers=dist.new_group([0, *every[n_train:]]))

    def __str__(self):
        return f"{self.world.size}: {self.n_train} train, {len(self.rollout_ranks)} roll out"

    @property
    def rollout_ranks(self):
        return range(self.n_train, self.world.size)

    @property
    def rolls_out(self):
        """Whether this rank does nothing else."""
        return self.world.rank in self.rollout_ranks

    def tell(self, ranks, *order):
        """Rank 0's order to some others."""
        for rank in ranks:
            self.mail.send(rank, *order)

    def wait_for_order(self):
        """-> rank 0's next order, whenever it comes."""
        order = self.mail.receive(0)
        while order is None:
            time.sleep(POLL_S)
            order = self.mail.receive(0)
        return order

    # weights

    def push_weights(self, model, group=None):
        """Rank 0: send the weights to the ranks of a group, None: to all. It waits for nobody, unless they have not
        taken the last ones: on a GPU its stream does, not the host."""
        tensors = [t.detach().view(-1).view(torch.uint8) for t in model.state_dict().values()]
        if self.push is not None:
            self.push.wait()
        if self.flat is None:
            self.flat = torch.cat(tensors)
        torch.cat(tensors, out=self.flat)
        self.push = dist.broadcast(self.flat, 0, group, async_op=True)

    def push_first_weights(self, model):
        """Rank 0: let the others begin, with its weights."""
        if self.world.size > 1:
            self.tell(range(1, self.world.size), "begin")
            self.push_weights(model)

    def take_first_weights(self, model):
        """The other ranks: wait for rank 0 -> whether they are to begin; a run may end before."""
        what, = self.wait_for_order()
        if what == "begin":
            self.take_weights(model)
        return what == "begin"

    def take_weights(self, model, group=None):
        """The other ranks: what rank 0 pushes is the model's from now on."""
        tensors = [t.detach().view(-1).view(torch.uint8) for t in model.state_dict().values()]
        sizes = [t.numel() for t in tensors]
        if self.flat is None:
            self.flat = tensors[0].new_empty(sum(sizes))
        dist.broadcast(self.flat, 0, group)
        for mine, new in zip(tensors, self.flat.split(sizes)):
            mine.copy_(new)

    # a step of several train ranks

    def deal(self, groups):
        """Groups (the samples of each episode) -> those of each train rank: the longest first, each to the rank that
        has the fewest tokens. A group is never cut."""
        if self.n_train == 1:
            return [groups]
        sizes = [sum(len(sample.ids) for samples in episodes for sample in samples) for episodes in groups]
        shares = [[] for _ in range(self.n_train)]
        loads = [0] * self.n_train     # tokens
        for number in sorted(range(len(groups)), key=lambda number: -sizes[number]):
            rank = loads.index(min(loads))
            shares[rank].append(groups[number])
            loads[rank] += sizes[number]
        return shares

    def gather(self, x):
        """What each train rank has -> all of it, by rank, on all of them."""
        if self.n_train == 1:
            return [x]
        found = [None] * self.n_train
        dist.all_gather_object(found, x, self.trainers)
        return found

    def sum(self, x):
        """A tensor that each train rank has -> the sum."""
        if self.n_train > 1:
            dist.all_reduce(x, group=self.trainers)
        return x

    def sum_gradients(self, model):
        """Add the gradients of all train ranks up; a parameter without one has zeros then."""
        if self.n_train == 1:
            return
        for p in model.parameters():
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.sum(torch.cat([grad.view(-1) for grad in grads]))
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(total.view_as(grad))

    def end(self):
        """Rank 0 ends the others, and all wait until they are here."""
        if self.world.size == 1:
            return
        if self.world.is_first:
            self.tell(range(1, self.world.size), "end")
            if self.push is not None:
                self.push.wait()
        self.world.wait()

# ---- CISPO and its step --------------------------------------------------------------------------
# A policy gradient with importance weights: the samples are of an older policy, pi_old, so that each token's
# log-probability is weighted by the ratio pi / pi_old. PPO drops the gradient of a token whose ratio leaves its clip;
# CISPO keeps it, and clips the weight: rare tokens, often the decisive ones, go on learning. The weight is a constant
# (detached), as the gradient of a log-probability times a weight is what a policy gradient is; were the ratio
# differentiated, the clip would cut gradients off again. A step sums over all samples of its groups, and divides once.

def advantages(group):
    """Set the advantage of a group's samples: the reward to go of each turn (its own and all later ones), less the mean
    return of the group's other episodes -> [samples of an episode]. A choice that the agent threw away earns nothing.
    Not published: the baseline. With the own return in it, it would depend on the action, and bias the gradient."""
    returns = [sum(episode.rewards) for episode in group]
    # rewards may come in fp32: a smaller difference is one of rounding, and would still move the weights at full size
    least = 1e-6 * max(sum(map(abs, episode.rewards)) for episode in group)
    for episode, own in zip(group, returns):
        others = (sum(returns) - own) / max(1, len(group) - 1)
        for i, sample in enumerate(episode.samples):
            turn = i if sample.turn is None else sample.turn
            advantage = sum(episode.rewards[turn:]) - others
            is_void = abs(advantage) <= least or is_thrown_away(sample, episode.samples)
            sample.advantage = 0.0 if is_void else advantage
    return [episode.samples for episode in group]

def is_thrown_away(sample, samples):
    """Whether an episode went on from another of several completions of one context, and not from this one. Where it
    went on from none, as behind the last turn, or with an edited history, nobody knows."""
    if sample.turn is None:
        return False
    choices = [other for other in samples if other.turn == sample.turn]
    later = [other for other in samples if other.turn is not None and other.turn > sample.turn]

    def went_on(choice):
        n_tokens = len(choice.ids)
        return any(other.start >= n_tokens and torch.equal(other.ids[:n_tokens], choice.ids) for other in later)
    return len(choices) > 1 and any(map(went_on, choices)) and not went_on(sample)

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

def backward(model, rows, mtp_weight=0.1, tokens=MICRO_TOKENS, ranks=Ranks()):
    """Gradients of a step's loss -> statistics, expert loads (layers, experts). The loss is train.py's objective, with
    CISPO in place of the next token's loss and the drafts' KL in place of MTP's. CISPO and the drafts are divided by Z,
    the action tokens of all samples as they were before merging; the index branch's KL by `naive`, all their tokens.

    rows     trees or packed rows, computed in micro-batches of at most so many `tokens`
    ranks    that share the step: rows are this rank's, what comes back is of all of them
    Statistics: loss, entropy (a mean), ratio and version (of each action token of each sample), naive (tokens of all
    samples), slots (of the rows), computed (slots of the micro-batches, pads included), magnitude (see has_signal).
    """
    Z = sum(len(sample.logprobs) for row in rows for sample in row.samples)
    naive = sum(len(sample.ids) for row in rows for sample in row.samples)
    Z, naive = (sum(numbers) for numbers in zip(*ranks.gather((Z, naive))))
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

    if not rows:                       # as it may be on one of several ranks
        load = torch.zeros(len(model.moe_layers()), model.cfg.n_expert, device=model.embed.weight.device)
        magnitude = load.new_zeros(())
        parts.append((load.new_zeros(0), load.new_zeros(0), load.new_zeros(0), torch.zeros(0, dtype=torch.int64)))
    loss, entropy, ratio, version = (torch.cat(x).cpu() for x in zip(*parts))

    # of all ranks that share the step
    ranks.sum_gradients(model)
    load = ranks.sum(load)
    found = ranks.gather(dict(
        loss=loss.sum().item(), magnitude=magnitude.item(), slots=sum(row.size for row in rows), computed=computed,
        entropy=entropy, ratio=ratio, version=version))
    stats = dict(naive=naive)
    for name in ("loss", "magnitude", "slots", "computed"):
        stats[name] = sum(one[name] for one in found)
    for name in ("entropy", "ratio", "version"):
        stats[name] = torch.cat([one[name] for one in found])
    stats["entropy"] = stats["entropy"].mean().item()
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

def train_step(model, optimizers, rows, rate, bias_rate=1e-3, tokens=MICRO_TOKENS, ranks=Ranks()):
    """Backward, clip, update, balance the router -> statistics: those of `backward`, signal, norm (before the clip).

    rows       trees or packed rows
    rate       of the matrices
    bias_rate  u of the router's load balancing
    tokens     of a micro-batch, at most
    ranks      that share the step, and take the same one: rows are this rank's
    FloatingPointError: a norm that is not finite.

    Muon and AdamW scale a step to full size, however small its gradient: momentum alone would move the weights. So a
    step without signal changes nothing, router biases and optimizer states included; and in any step a matrix without a
    gradient keeps its weights and moments. Unlike in train.py all gradients are clipped as one."""
    set_rates(optimizers, rate)
    stats, load = backward(model, rows, tokens=tokens, ranks=ranks)
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

# ---- where episodes come from: other ranks --------------------------------------------------------
# Rank 0's source is Apart: it names groups to the rollout ranks, and takes what they report, in real time. A rollout
# rank's is Rollouts, which plays them: it has a seat for every episode that may be in flight, a row of one batch that
# never ends. Who sits there plays one episode after the other, so that no seat waits for the slowest of a group.

class Apart(Gateway):
    """Rank 0's source: rollout ranks play, while it trains."""

    def __init__(self, model, args, queue, ranks):
        super().__init__(model, args, queue)
        self.ranks = ranks
        self.at_work = {rank: set() for rank in ranks.rollout_ranks}  # groups that each of them plays
        self.played = {}               # rank -> tokens that it has sampled, seconds in which it had something to play
        self.looked = time.monotonic()  # when `now` was set

    def look(self):
        """-> now, in real seconds since the start."""
        before = self.looked
        self.looked = time.monotonic()
        self.now += self.looked - before
        return self.now

    def publish(self, version):
        """Push the weights to the rollout ranks."""
        others = self.ranks.rollout_ranks
        self.ranks.tell(others, "weights", version)
        self.ranks.push_weights(self.model, self.ranks.readers)

    def start(self, tasks, version):
        """Name groups to the rollout ranks, each to the one that has the fewest."""
        shares = {rank: [] for rank in self.at_work}
        for task in tasks:
            self.queue.due[task] = math.inf  # the rollout rank watches its deadline
            rank = min(self.at_work, key=lambda rank: len(self.at_work[rank]))
            self.at_work[rank].add(task)
            shares[rank].append(task)
        for rank, share in shares.items():
            if share:
                self.ranks.tell([rank], "play", share)

    def collect(self):
        """Take what the rollout ranks have reported."""
        for rank in self.at_work:
            report = self.ranks.mail.receive(rank)
            while report is not None:
                task, episodes, *played = report
                self.pool[task] = episodes
                self.queue.finish(task, self.now)
                self.at_work[rank].remove(task)
                self.played[rank] = played
                report = self.ranks.mail.receive(rank)
        self.n_sampled = sum(n_tokens for n_tokens, _ in self.played.values())
        self.rollout_s = sum(seconds for _, seconds in self.played.values()) / len(self.at_work)

    def wait(self, stop, seconds):
        """Until the window holds a batch, for at most so many seconds."""
        began = told = self.look()
        while not stop and self.look() < began + seconds:
            self.collect()
            if self.queue.take(self.args.groups, self.now):
                break
            if self.now - told > TELL_EVERY:
                told = self.now
                n_played = len(self.pool) - len(self.queue.batch)
                print(f"wait    | {len(self.queue.batch)} of {self.args.groups} groups are there, {n_played} more are "
                      f"outside the window, {sum(map(len, self.at_work.values()))} are played", flush=True)
            time.sleep(POLL_S)
        self.queue.idle += self.look() - began

    def resume(self, version):
        """Groups of the checkpoint that are over are over now, whichever clock that was by."""
        for task in self.pool:
            self.queue.finish(task, self.now)
        super().resume(version)

class Rollouts(Gateway):
    """A rollout rank: it plays the groups that rank 0 names, and takes new weights between two tokens."""

    def __init__(self, model, args, ranks):
        super().__init__(model, args)
        self.ranks = ranks
        self.waiting = deque()         # (trajectory, agent) that have no seat yet
        self.groups = {}               # group -> its trajectories
        self.n_open = {}               # group -> how many of these are not over
        self.until = {}                # group -> its deadline

    def seat(self):
        """A player of the loop that plays one episode after the other."""
        while True:
            kept, feed = 0, [0]
            while not self.waiting:    # an empty seat draws as others do: the batch keeps its shape and its pace
                token, *_ = yield kept, feed
                kept, feed = kept + 1, [token]
                if kept == self.model.cfg.max_seq_len:
                    kept, feed = 0, [0]
            episode, agent = self.waiting.popleft()
            yield from play_episode(self, episode, agent, self.model.cfg.max_seq_len)
            if episode.task in self.groups:  # it may have been given up
                self.n_open[episode.task] -= 1

    def sit_down(self):
        """-> `play` with all seats, before anything is drawn."""
        args = self.args
        rank = self.ranks.world.rank
        n_groups = -(-args.slots // len(self.ranks.rollout_ranks))  # rank 0 gives each rank at most so many
        generator = torch.Generator(self.model.embed.weight.device)
        generator.manual_seed(Random(f"{args.seed} rank {rank} {self.version}").getrandbits(62))
        record = pack_routes if args.replay else None
        steps = play(self.model, [self.seat() for _ in range(n_groups * args.rollouts)], 1,
                     Sampling(generator=generator), record)
        next(steps)
        return steps

    def serve(self):
        """Play until rank 0 ends it."""
        steps = self.sit_down()
        next(steps)                    # of empty seats: kernels are compiled while rank 0 imitates
        goes_on = self.ranks.take_first_weights(self.model)
        has_news = True                # whether the weights are others than those of the last forward
        while goes_on:
            order = self.ranks.mail.receive(0)
            if order is not None:
                what, *about = order
                if what == "play":
                    self.open(*about)
                if what == "weights":
                    self.version, = about
                    self.ranks.take_weights(self.model, self.ranks.readers)
                    has_news = True
                goes_on = what != "end"
            elif self.groups:
                began = time.monotonic()
                steps.send(has_news)   # a token of each row
                has_news = False
                self.rollout_s += time.monotonic() - began
                self.report()
            else:
                time.sleep(POLL_S)
        steps.close()

    def open(self, tasks):
        """Begin groups, in the order of their numbers."""
        for task in tasks:
            self.groups[task] = [Trajectory(task) for _ in range(self.args.rollouts)]
            self.n_open[task] = len(self.groups[task])
            self.until[task] = time.monotonic() + self.args.deadline
            self.waiting += [(episode, make_task(self.args, task).agent()) for episode in self.groups[task]]

    def report(self):
        """Tell rank 0 of each group that is over, or late: episodes that still run have failed then."""
        now = time.monotonic()
        for task, episodes in [*self.groups.items()]:
            if self.n_open[task] and now < self.until[task]:
                continue
            for episode in episodes:
                if not episode.rewards:
                    episode.fail()
            self.waiting = deque(one for one in self.waiting if one[0].task != task)
            self.n_sampled += sum(len(sample.logprobs) for episode in episodes for sample in episode.samples)
            self.ranks.mail.send(0, task, episodes, self.n_sampled, self.rollout_s)
            del self.groups[task], self.n_open[task], self.until[task]

def follow(source, optimizers, ranks):
    """A train rank beside rank 0: take the steps that it takes, until it ends."""
    goes_on = ranks.take_first_weights(source.model)
    while goes_on:
        what, *about = ranks.wait_for_order()
        if what == "train":
            share, *rates = about
            train_share(source, optimizers, share, rates, ranks)
        goes_on = what != "end"

def train_share(source, optimizers, share, rates, ranks):
    """A train rank's part of a step -> its statistics, None where no group has a sample.

    share  groups (the samples of each episode) of this rank
    rates  of the matrices, of the router's balancing"""
    rows = plan_rows(share, source.model, not source.args.no_merge)
    if not any(ranks.gather(bool(rows))):
        return None
    return train_step(source.model, optimizers, rows, *rates, MICRO_TOKENS, ranks)

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

def misspell(text, task, rng, noise, wander=0.0):
    """A teacher's text with mistakes: noise and wander are the shares of a call's characters, and of its thoughts, that
    are replaced by random ones."""
    name, bracket, arguments = text.partition("[")
    if not bracket:
        return text
    arguments = "".join(rng.choice(task.alphabet) if char in task.alphabet and rng.random() < noise else char
                        for char in arguments)
    if rng.random() < wander:
        name = f"t{rng.randrange(10)}"
    return f"{name}[{arguments}"

def demonstrate(gateway, task, rng, noise, wander=0.0, preface=""):
    """Play one task with its teacher -> trajectory, whose samples have NaN for log-probs: no policy sampled them.

    noise, wander  see misspell
    preface        text that stands before the task, as an agent's system prompt does
    """
    episode = Trajectory(-1)
    agent = task.agent()
    text = None
    while True:
        try:
            messages = agent.send(text)
        except StopIteration as stop:
            episode.finish(*stop.value)
            return episode
        text = misspell(task.expert(messages), task, rng, noise, wander)
        ids = gateway.tokenizer.encode(text)
        if preface:
            messages = [dict(role="system", content=preface), *messages]
        gateway.record(episode, gateway.context(episode, messages), ids, [math.nan] * len(ids), 0)

def draw_preface(rng, prose):
    """Any piece of `prose`, up to PREFACE characters, short ones as often as long ones. A policy that imitates behind
    such texts reads a task behind an agent's system prompt; one that has seen none there writes nonsense."""
    length = int(PREFACE ** rng.random())
    start = rng.randrange(len(prose) - PREFACE)
    return prose[start:start + length]

def count_chars(task):
    """Characters that a task's teacher could get wrong, those in its calls' arguments."""
    agent = task.agent()
    text = None
    n_chars = 0
    with contextlib.suppress(StopIteration):
        while True:
            text = task.expert(agent.send(text))
            _, _, arguments = text.partition("[")
            n_chars += sum(char in task.alphabet for char in arguments)
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
    if not has_teacher(args):
        begins = f"as {args.init} has it" if args.init else "with random weights; --init DIR would give it others"
        print(f"warm    | no teacher in {args.task}, nothing to imitate: the policy begins {begins}", flush=True)
    started = time.perf_counter()
    told = started                     # when the last line was printed
    noise = wrong_share(args)
    optimizers = configure_optimizers(model, WARM_LR)[0]

    # go on where an imitation of the same model and tasks was left
    step = 0
    saved = None                       # step of the last save
    run = os.urandom(8).hex()
    state = None
    if os.path.exists(checkpoint_path(folder)):
        state = load_checkpoint(folder)
    if state and is_same_imitation(state, source):
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
    with open(__file__, encoding="utf-8") as file:
        prose = file.read()
    begun_at = step
    timer = SaveTimer()                # after that save, whose length would put off the one after 3 s
    while step < args.warm_steps and not stop:
        if step != saved and (step % WARM_EVERY == 0 or timer.due()):
            began = timer.clock()
            keep()
            timer.saved(began)
            saved = step

        rng = Random(f"{args.seed} warm {step}")
        tasks = [make_task(args, step * WARM_TASKS + i, 1) for i in range(WARM_TASKS)]
        preface = draw_preface(rng, prose) if args.teach else ""
        samples = []                   # of each task's demonstrations
        for task in tasks:
            demos = [demonstrate(source, task, rng, noise, preface=preface) for _ in range(task.demonstrations)]
            samples.append([sample for demo in demos for sample in demo.samples])
        began = time.perf_counter()
        if preface:                    # computed once for the step
            samples = [sum(samples, [])]
        trees = [PrefixTree(some, model.cfg) for some in samples]
        # the rate rises for 20 steps, and falls in the last nine tenths to a tenth
        rate = WARM_LR * min(1, (step + 1) / 20, 1.1 - step / args.warm_steps)
        stats = train_step(model, optimizers, trees, rate)
        step += 1
        threads.watch(time.perf_counter() - began, trial, source)
        now = time.perf_counter()
        if step % WARM_EVERY == 0 or step == args.warm_steps or now - told > WARM_SECONDS:
            told = now
            took = now - started
            left = took / (step - begun_at) * (args.warm_steps - step)
            until = f"eta {left / 60:.1f}m"
            if args.minutes:           # of the run, if these end it
                until += f", of the run {max(left, 60 * args.minutes - took) / 60:.1f}m"
            print(f"warm {step:04d} | loss {stats['loss']:.3f} | norm {stats['norm']:.2f} | {took:.0f} s | {until}",
                  flush=True)
    if step != saved:
        keep()
    return step == args.warm_steps

def teach(source, args, stop, threads, seconds=math.inf):
    """Imitate the teacher for --teach steps more, in the contexts of the agents that are here: it answers them in the
    policy's place. Their system prompts and tools, which no demonstration had, are before its texts then.
    -> whether it is over, as all steps are done, or after so many seconds. A run that is killed within them begins them
    again."""
    optimizers = configure_optimizers(source.model, LESSON_LR)[0]
    started = time.perf_counter()
    for step in range(args.teach):
        demos = source.teach(LESSON_TASKS, stop, seconds - (time.perf_counter() - started))
        if stop:
            return False
        if len(demos) < LESSON_TASKS:
            print(f"teach   | the time is over after {step} of {args.teach} steps: too few agents are here", flush=True)
            break
        rows = plan_rows([[demo.samples for demo in demos]], source.model, merge=True)
        rate = LESSON_LR * min(1, (step + 1) / 10, 1.1 - step / args.teach)
        began = time.perf_counter()
        stats = train_step(source.model, optimizers, rows, rate)
        threads.watch(time.perf_counter() - began, trial, source)
        solved = sum(demo.success for demo in demos) / len(demos)
        took = time.perf_counter() - started
        left = took / (step + 1) * (args.teach - step - 1)
        print(f"teach {step + 1:03d} | loss {stats['loss']:.3f} | norm {stats['norm']:.2f} | "
              f"the teacher, wrong on purpose, solves {solved:.2f} | merge {stats['naive'] / stats['slots']:.1f}x | "
              f"{took:.0f} s, eta {left / 60:.1f}m", flush=True)
    source.lessons = None
    source.sampler.renew(0)
    return True

def is_same_imitation(state, source):
    """Whether a checkpoint holds an imitation of the run's tasks by its model."""
    args = source.args
    if origin_of(state) != source.origin:
        return False
    for name in (*MADE_BY, "seed", "warm_steps"):
        if name == "task" and source.origin["task"]:
            continue                   # a file may have moved: its text counts
        if state["args"].get(name, ADDED.get(name)) != getattr(args, name):
            return False
    if bool(state["args"].get("teach")) != bool(args.teach):  # which is imitated behind prefaces
        return False
    return state["config"].get("vocab_size") == source.model.cfg.vocab_size

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

def context_size(args):
    """Tokens of context: --context, or what the task needs."""
    if args.context:
        return args.context
    if args.serve is not None:
        return SERVED_CONTEXT
    if args.own_task:
        return OWN_CONTEXT
    room = dict(calculator=96, maze=round_up(14 * args.turns + 48, 128), cap=128, tally=96, evolve=112)[args.task]
    if args.tool_errors and args.task != "cap":  # of a call of most characters and its error, each time
        room = round_up(room + 12 * most_faults(dict(calculator=3, maze=args.turns, tally=6)[args.task]), 32)
    return room

def make_config(args):
    """Task and preset -> config, with full attention, as in the M2 that Forge trained, unless --attn msa."""
    # the preset's own vocabulary may be larger: an id that the gateway's tokenizer lacks has no text
    cfg = getattr(MiniMaxConfig, args.preset)(
        max_seq_len=context_size(args), n_mtp=args.mtp, vocab_size=Gateway.tokenizer.n_vocab)
    cfg.index_kl_stride = 1  # a stride counts positions of the layout: it would know of the merging
    cfg.attn_types = ["full"] + [args.attn] * (cfg.n_layer - 1)
    return cfg

def make_model(args, device, dtype):
    """Task and preset -> model with random weights."""
    torch.manual_seed(args.seed)
    return MiniMax(make_config(args), dtype).to(device)

def read_init(args):
    """--init's checkpoint, fit for this run: the context is the task's. ValueError, in one line, if it cannot be."""
    state = load_checkpoint(args.init)
    config = state["config"]
    room = config.get("max_seq_len")
    if type(room) is int and room < context_size(args):
        raise ValueError(f"--init {args.init}: its model has {room} tokens of context, --task {args.task} needs "
                         f"{context_size(args)}; --context says how many")
    if in_index_warmup(state):
        raise ValueError(f"--init {args.init}: its sparse attention is not in use yet, its index branch still learns: "
                         f"python train.py --resume --out {args.init} goes on")
    state["config"] = dict(config, max_seq_len=context_size(args), index_kl_stride=1)  # see make_config
    return state

def read_config(state):
    """A checkpoint's config, before its model is made."""
    try:
        return check_config(state["config"], state["model"])
    except (TypeError, KeyError, AttributeError, AssertionError, ValueError) as error:
        raise ValueError(f"the checkpoint does not fit this code: {first_line(error)}") from None

def origin_of(state):
    """What a checkpoint comes from; older ones do not say."""
    return state.get("origin", NO_ORIGIN)

def make_parser():
    """The flags, by what they are about."""
    p = Parser(__doc__)
    count = number(1)
    positive = number(1e-6, 1e9, float)
    # task and episodes
    p.add_argument("--task", type=task_name, default="calculator", metavar="NAME",
                   help=f"to learn: {', '.join(BUILT_IN)}, or a Python file, which this runs: see TaskFile in rl.py")
    p.add_argument("--turns", type=number(2, 600), default=8, help="a maze's")
    p.add_argument("--thoughts", default="keep", choices=["keep", "drop"],
                   help="whether the agents here leave thoughts in what later turns see")
    p.add_argument("--tool-errors", type=number(0, 0.9, float), default=0.0,
                   help="share of calls at which a tool fails, for once")
    p.add_argument("--rollouts", type=number(2), help="episodes of a group; default: 4, of evolve 8")
    p.add_argument("--groups", type=count, default=24, help="groups a step")
    # queue
    p.add_argument("--schedule", default="window", choices=["window", "fifo", "greedy"])
    p.add_argument("--slots", type=count, default=48, help="groups in flight")
    p.add_argument("--window", type=count, help=f"groups of the queue's window; default: {WINDOW_SHARE} of --slots")
    p.add_argument("--deadline", type=positive,
                   help=f"seconds a group has; default: {DEADLINE:g}, with --serve {SERVED_DEADLINE:g} from its first "
                   "claim on")
    p.add_argument("--sigma", type=number(0, 10, float), default=0.5,
                   help="spread of the log-normal times that groups take")
    # self-evolution
    p.add_argument("--table", default=TABLE, help="with --task evolve: the runs of its episodes; made if it is missing")
    p.add_argument("--reruns", type=number(1, 4), default=1, help="with --task evolve: of an episode")
    p.add_argument("--logs", default="true", choices=["true", "blank", "shuffled"],
                   help="with --task evolve: what an episode shows; all but true are controls")
    p.add_argument("--live", type=number(0, 400), default=LIVE_PROBLEMS,
                   help="with --task evolve: problems of each kind in the last evaluation, on runs that are made then")
    # model and training
    p.add_argument("--preset", default="micro", choices=["micro", "small"], help="the model")
    p.add_argument("--attn", default="full", choices=["full", "msa"], help="its attention")
    p.add_argument("--mtp", type=number(0, 8), default=0, help="its MTP modules, kept aligned")
    p.add_argument("--init", metavar="DIR", help="begin from the model and tokenizer of the checkpoint in this folder")
    p.add_argument("--context", type=number(32, 2 ** 24), metavar="TOKENS",
                   help=f"of context, at most; default: by task, with --serve {SERVED_CONTEXT}")
    p.add_argument("--max-new-tokens", type=count, help=f"of a completion; default: {MAX_NEW}, or what the task says")
    p.add_argument("--warm-steps", type=number(0), default=400, help="of imitation")
    p.add_argument("--lr", type=number(0, 10, float), default=1e-3, help="rate of the matrices")
    p.add_argument("--no-merge", action="store_true", help="train on every turn alone")
    p.add_argument("--replay", action="store_true", help="train with the experts and key blocks that the rollout chose")
    p.add_argument("--parallel", type=rank_sizes, metavar="SIZES", help="how torchrun's processes share the work, such "
                   "as train=1,rollout=3; default: one trains")
    # length of the run
    p.add_argument("--steps", type=count, help="end after this many")
    p.add_argument("--minutes", type=positive,
                   help="in all; default: " + ", ".join(f"{task} {minutes}" for task, minutes in MINUTES.items())
                   + f", --serve {SERVED_MINUTES}")
    p.add_argument("--seed", type=number(0), default=1337, help="of all that is random")
    # what is printed and kept
    p.add_argument("--out", default="out_rl", help="folder of the run")
    p.add_argument("--resume", action="store_true", help="go on from --out")
    p.add_argument("--show-every", type=count, default=50, help="steps between examples")
    p.add_argument("--save-every", type=count, default=20, help="steps between saves")
    p.add_argument("--figure", help="curve's file")
    p.add_argument("--play", type=number(1, 10 ** 6), nargs="?", const=PLAYED, metavar="N",
                   help="train nothing: show --out's agent at work, and how many of N fresh tasks "
                   f"({PLAYED} without N) it solves, before the training on rewards and after it")
    # agents of other processes
    p.add_argument("--serve", type=number(0, 65535),
                   help="port of the gateway, for agents of other processes; 0 = any")
    p.add_argument("--token", help="with --serve: the API key of its agents; default: random")
    p.add_argument("--max-turns", type=count, default=100, help="with --serve: turns of an episode")
    p.add_argument("--silence", type=positive, default=30.0,
                   help="with --serve: seconds without a request after which an episode is over, or free again")
    p.add_argument("--tool", type=rule_text, action="append", default=[], metavar="NAME=PATTERN",
                   help="with --serve: what of a completion calls which tool, a named group for an argument")
    p.add_argument("--teach", type=number(0), default=0,
                   help="with --serve: steps of imitation, in which a teacher answers the agents")
    return p

def parse_args(argv, locks=None):
    """-> args, checkpoint (None: a run at its start, or in its imitation). --resume takes from it what is not given.
    `locks`, a contextlib.ExitStack, holds the locks on the run's folders from here on: nobody else writes there.
    ValueError for flags that are unknown or do not go together."""
    p = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    state = None
    world = World.from_env()
    for flag in ("play", "serve"):
        if world.size > 1 and getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: with one process, not {world.size}")
    if args.play:
        return play_args(p, argv, args)
    if args.resume:
        if locks and world.is_first:
            lock_folders(args, locks)
        args, state = resume_args(p, argv, args)
    else:
        args.own_task = read_task(args)
    if not has_teacher(args):
        args.warm_steps = 0
    if args.token is not None and args.serve is None:
        raise ValueError(f"--token {args.token}: it is the key of --serve")
    if args.teach and (args.serve is None or not has_teacher(args)):
        raise ValueError(f"--teach {args.teach}: it needs --serve, and a task with a teacher")
    if args.task == "evolve" and args.tool_errors:
        raise ValueError(f"--tool-errors {args.tool_errors:g}: a rerun of --task evolve does not fail")
    if args.task == "evolve" and args.teach:
        raise ValueError(f"--teach {args.teach}: with --task evolve agents call the tools of its runs, not a teacher's")
    if args.task == "evolve" and args.serve is not None and args.reruns > 1:
        raise ValueError(f"--reruns {args.reruns}: with --serve one, as no edit is known behind a restart")
    if args.task == "evolve" and args.thoughts == "drop":
        raise ValueError("--thoughts drop: with --task evolve a thought is what a call begins with")
    for name in ("reruns", "logs"):
        if args.task != "evolve" and getattr(args, name) != p.get_default(name):
            raise ValueError(f"--{name} {getattr(args, name)}: it is of --task evolve")
    if args.init:
        for name in ("preset", "attn", "mtp"):
            if getattr(args, name) != p.get_default(name):
                raise ValueError(f"--{name} {getattr(args, name)}: --init brings its own model")
    if args.groups > args.slots:
        raise ValueError(f"--groups {args.groups}: at most --slots, {args.slots}")
    if not args.minutes and not args.steps:
        args.minutes = MINUTES.get(args.task, OWN_MINUTES) if args.serve is None else SERVED_MINUTES
    if args.rollouts is None:
        args.rollouts = ROLLOUTS.get(args.task, 4)
    if args.deadline is None:
        args.deadline = DEADLINE if args.serve is None else SERVED_DEADLINE
    if args.figure:
        check_figure(args.figure)
    if locks and not args.resume and world.is_first:
        lock_folders(args, locks)
    return args, state

def task_name(text):
    """A type for argparse: a task's name, or a Python file's."""
    if text not in BUILT_IN and not text.endswith(".py"):
        raise argparse.ArgumentTypeError(f"{text[:60]}: {', '.join(BUILT_IN)}, or a Python file, my_task.py")
    return text

def read_task(args, origin=None):
    """The file that --task names, or None. ValueError if it cannot be used, or is not the one that a checkpoint of this
    origin was made with: only then is it run."""
    if args.task in BUILT_IN:
        return None
    file = TaskFile(args.task)
    if origin and file.digest != origin["task"]:
        raise ValueError(f"--task {args.task}: the checkpoint was made with another text of this file")
    return file.load()

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
    args = args_of(state, parser, argv, given)
    return args, None if early else state  # the imitation's weights are read where they are needed

def play_args(parser, argv, given):
    """What --play needs -> args, --out's checkpoint."""
    state = load_checkpoint(given.out)
    return args_of(state, parser, argv, given), state

def args_of(state, parser, argv, given):
    """What was given now, over what a checkpoint was made with -> args. ValueError if they do not go together."""
    if "queue" not in state and "task" not in state["args"]:
        raise ValueError(f"--out {given.out}: a checkpoint by train.py; python train.py --resume --out {given.out} "
                         "goes on")
    if not isinstance(state.get("queue"), dict) or "due" not in state["queue"]:
        raise ValueError(f"--out {given.out}: a checkpoint by another version of rl.py, whose queue was another")

    path = checkpoint_path(given.out)
    check_fields(f"{path}: the checkpoint", state, dict(origin=dict), optional=["origin"])
    origin = origin_of(state)
    check_fields(f"{path}: its origin", origin, dict.fromkeys(NO_ORIGIN, (str, type(None))))
    args = merge_args(parser, argv, given, path, state["args"])
    for flag in (*MADE_BY, "slots"):
        value = getattr(args, flag)
        was = state["args"].get(flag, ADDED.get(flag))
        if flag == "task" and value not in BUILT_IN and origin["task"]:
            continue                   # a file may have moved: its text counts
        if value != was:
            how = "without" if was is None else f"with {was}"
            raise ValueError(f"--{flag.replace('_', '-')} {value}: the checkpoint was made {how}")
    args.own_task = read_task(args, origin)
    return args

@dataclass
class Lap:
    """What a step took, in real seconds."""
    seconds: float
    waited: float                      # of these, for episodes: with one process it played them itself
    tokens: int                        # of all samples that it trained on

def pace(laps):
    """What a step took on average, in the later half of a process's steps: the first ones compile kernels."""
    if not laps:
        return dict.fromkeys(("step_s", "train_s", "wait_s", "trained_tokens_per_s"))
    late = laps[len(laps) // 2:]
    seconds = sum(lap.seconds for lap in late)
    waited = sum(lap.waited for lap in late)
    return dict(
        step_s=seconds / len(late), train_s=(seconds - waited) / len(late), wait_s=waited / len(late),
        trained_tokens_per_s=sum(lap.tokens for lap in late) / seconds)

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
    before: dict | None = None         # of --task evolve: what the policy was worth before it was trained on rewards

# field -> the kinds that check_fields allows
NOW = {name: typing.get_args(kind) or kind for name, kind in typing.get_type_hints(Record).items()}

def check_record(now):
    """ValueError unless a checkpoint's now has all that a run goes on counting; older ones lack some of it."""
    check_fields("the checkpoint's now", now, NOW, optional=["run", "threads", "entropy", "collapsed", "before"])
    if bool(now["curve"]) != (now["ema"] is not None):
        raise ValueError("the checkpoint's now has a curve without its running mean, ema, or the reverse")
    for point in now["curve"]:
        if not isinstance(point, list) or [*map(type, point)] != [float, float]:
            raise ValueError(f"the checkpoint's curve has {str(point)[:40]}: a share and its running mean")

def needed_bytes(args, cfg, device):
    """About the memory of a step of the imitation, the largest one's; a little less rather than more."""
    demo = demonstrate(Gateway(args=args), make_task(args, 0), Random(0), 0.0)
    slots = PrefixTree(demo.samples, cfg).size
    return step_bytes(cfg, min(WARM_TASKS, max(1, MICRO_TOKENS // slots)), slots, device)

def card(args, model, queue, device, why, threads, ranks=Ranks()):
    """Print what a run is made of: the start-up card. why: of the device and dtype."""
    cfg = model.cfg
    total, active = model.num_params()
    how = "turn by turn" if args.no_merge else "prefix trees"
    agents = ""
    if args.thoughts == "drop":
        agents += ", thoughts dropped"
    if args.tool_errors:
        agents += f", {args.tool_errors:g} of calls fail"
    name = f"from {args.init}" if args.init else args.preset
    attn = ", ".join(dict.fromkeys(cfg.attn_types)) if args.init else args.attn
    print(f"model   | {name}: {total:,} parameters, {active:,} active; {attn} attention; "
          f"{cfg.n_expert_per_tok} of {cfg.n_expert} experts, {cfg.n_mtp} MTP modules; context {cfg.max_seq_len}")
    print(f"device  | {device}, {str(model.dtype).removeprefix('torch.')}: {why}")
    print(f"threads | {threads}")
    if ranks.world.size > 1:
        print(f"ranks   | {ranks}, in real time")
    print(f"kernels | {implementations(model, device, trains=True)}")
    print(f"task    | {args.task}: {args.groups} groups of {args.rollouts} episodes a step, {args.slots} in flight"
          f"{agents}")
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
        why = "the policy settles on what fails"
        if stats["entropy"] >= COLLAPSE_ENTROPY * now.entropy:
            why = "all episodes of a group earn the same, which teaches nothing"
        lessons = "" if args.serve is None else f"--teach above {args.teach}, "
        print(f"collapse | {COLLAPSE_STEPS} steps with next to nothing solved, entropy {now.entropy:.2f} at first, "
              f"{stats['entropy']:.2f} now: {why}; begin again with --warm-steps above {args.warm_steps}, {lessons}"
              f"--rollouts above {args.rollouts} or another --seed", flush=True)

def seconds_to_go(now, args):
    """Of training on rewards, until --steps or --minutes end it, if it goes on as it went."""
    part = min(1.0, share_done(vars(now), vars(args)))
    return (now.seconds - now.warm) * (1 / part - 1)

def print_step(now, args, episodes, stats, lags, decode, note=""):
    """One line a step; now and then an episode. `decode`: ids -> text; note: more to say.

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
          f"merge {stats['naive'] / stats['slots']:.1f}x, {saved:,} tokens saved | {now.seconds:.0f} s, "
          f"eta {seconds_to_go(now, args) / 60:.1f}m{note}{no_signal}", flush=True)
    if (now.step - 1) % args.show_every == 0:  # the first of every `show_every` steps
        print_episode(episodes[0], decode)

def print_episode(episode, decode):
    """What was said in an episode, what the policy wrote in <>. Of long texts, an agent's prompts, the end is shown."""
    texts = []
    for heard, said in turns_of(episode):
        words = decode(heard)
        if len(words) > HEARD:
            words = f"...{words[-HEARD:]}"
        texts.append(f"{words}<{decode(said)}>")
    text = shown("".join(texts))
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

# ---- self-evolution: what a policy is worth --------------------------------------------------------
# From the table a policy is compared with what does not read logs, on worlds that it was not trained in. The last
# evaluation is live: each problem in a world of its own that neither training nor table has seen, each run made then.

PRINTINGS = 4                          # of each problem's log, in an evaluation from the table
LIVE_PROBLEMS = 50                     # with a fault, seen and held severities each, in the live evaluation;
LIVE_HEALTHY = 20                      # and without, or with a herring,
LIVE_UNSEEN = 12                       # and with the held-out fault
TOLD = 4                               # live problems that are told word for word

@dataclass
class RepairScore:
    """What became of some problems: means over them."""
    problems: int
    diagnosis: float                   # share whose first edit repairs one of the faults
    recovered: float | None            # share of what the best edits gain, where they gain something
    regret: float                      # nats a byte that were left
    touched: float                     # share with a rerun
    false: int                         # edits that were kept and repair nothing

def score_repairs(tasks):
    """Repairs that are over -> RepairScore."""
    diagnosed = 0
    touched = 0
    false = 0
    regret = 0.0
    recovered = []
    for task in tasks:
        useful = named_edits(task.problem)
        kept = [edit for edit, gain in task.edits if gain > task.keep]
        diagnosed += bool(task.edits) and task.edits[0][0] in useful
        touched += bool(task.edits)
        false += 0 if useful else len(kept)
        regret += max(0.0, task.oracle - task.gain)
        if task.oracle:
            recovered.append(min(1.0, task.gain / task.oracle))
    n = len(tasks)
    share = sum(recovered) / len(recovered) if recovered else None
    return RepairScore(n, diagnosed / n, share, regret / n, touched / n, false)

def play_repairs(source, tasks, temperature=0.0):
    """The policy plays Repairs, greedily or sampled -> their RepairScore."""
    generator = torch.Generator(source.model.embed.weight.device).manual_seed(source.args.seed)
    for first in range(0, len(tasks), PLAYED_AT_ONCE):
        some = tasks[first:first + PLAYED_AT_ONCE]
        rollout(source, [(Trajectory(0), task.agent()) for task in some], 0, generator, temperature=temperature)
    return score_repairs(tasks)

def table_tasks(args, kind, logs="true"):
    """All problems of one kind, see test_problems, of the table's test worlds -> Repairs, PRINTINGS of each."""
    reruns = 2 if kind == "pairs" else 1
    tasks = []
    for world in TEST_WORLDS:
        for number, problem in enumerate(test_problems(world)[kind]):
            for printing in range(PRINTINGS):
                rng = Random(f"{args.seed} {world} {number} {printing}")
                tasks.append(Repair(rng, args.runs, problem, reruns, args.keep, logs=logs))
    return tasks

def evaluate_from_table(source, when):
    """Print and return, by name, what a policy is worth in the test worlds of the table, as dicts of RepairScore."""
    args = source.args
    scores = {kind: play_repairs(source, table_tasks(args, kind, args.logs)) for kind in TEST_KINDS}
    scores["sampled"] = play_repairs(source, table_tasks(args, "seen", args.logs), temperature=1.0)
    if args.logs == "true":
        for logs in ("blank", "shuffled"):
            scores[logs] = play_repairs(source, table_tasks(args, "seen", logs))
    for name, found in scores.items():
        print_repairs(f"{when:6} | table, {name}", found)
    return {name: vars(found) for name, found in scores.items()}

TEST_KINDS = ("seen", "held", "unseen", "healthy", "pairs")

def print_repairs(title, found):
    """One line of an evaluation."""
    if found.recovered is None:
        words = f"{found.touched:.2f} rerun without need, {found.false} edits kept"
    else:
        words = (f"diagnosis {found.diagnosis:.2f}, recovered {found.recovered:.2f}, regret {found.regret:.3f} nats, "
                 f"{found.touched:.2f} rerun")
    print(f"{title:24} | {found.problems:3} problems: {words}", flush=True)

def live_problems(args):
    """-> dict of lists of problems in fresh worlds: seen, held, unseen, healthy; each in a world of its own."""
    rng = Random(f"{args.seed} live")
    counts = dict(seen=args.live, held=args.live, unseen=LIVE_UNSEEN, healthy=LIVE_HEALTHY)
    worlds = rng.sample(LIVE_WORLDS, sum(counts.values()))
    problems = {kind: [] for kind in counts}
    for kind, count in counts.items():
        for number in range(count):
            world = worlds.pop()
            if kind == "unseen":
                faults = ((HELD_OUT, rng.choice(HELD_OUT.held)),)
            elif kind == "healthy":
                faults = [(), *(((fault, *fault.seen),) for fault in HERRINGS)][number % 3]
            else:
                fault = FAULTS[number % len(FAULTS)]
                faults = ((fault, rng.choice(getattr(fault, kind))),)
            problems[kind].append(Problem(world, faults))
    return problems

def evaluate_live(source, stop=()):
    """Print and return, by kind, what a policy is worth in fresh worlds, on runs that are made now. There the oracle is
    the edit that is named for the fault (the better one, where it has two), or the policy's own, if that gains more."""
    args = source.args
    runs = LiveRuns()
    problems = live_problems(args)
    began = time.perf_counter()

    # in parallel: the runs as they are, and after the edits that are named for them
    needed = []
    for problem in sum(problems.values(), []):
        recipe = problem.recipe()
        needed += [recipe, *(edited(recipe, edit) for edit in named_edits(problem))]
    runs.make(needed, count_cpus(), stop)

    scores = {}
    for kind, some in problems.items():
        tasks = []
        for number, problem in enumerate(some):
            gains = [runs.gain(problem.recipe(), edit) for edit in named_edits(problem)]
            oracle = max([0.0, *(gain for gain in gains if gain > args.keep)])
            rng = Random(f"{args.seed} {kind} {number}")
            tasks.append(Repair(rng, runs, problem, 1, args.keep, oracle, args.logs))
        scores[kind] = play_repairs(source, tasks)
        print_repairs(f"live   | {kind}", scores[kind])
        for task in tasks[:TOLD if kind == "held" else 0]:
            tell_repair(task)
    print(f"live   | {len(runs.logs)} runs were made in {time.perf_counter() - began:.0f} s", flush=True)
    return {kind: vars(found) for kind, found in scores.items()} | dict(runs=len(runs.logs))

REPAIR_KEYS = ("diagnosis_seen", "diagnosis_held", "recovered_seen", "recovered_held", "live", "table", "before",
               "baselines", "keeping")

def evaluate_repairs(now, source, stop):
    """What the last line of stdout says of --task evolve, REPAIR_KEYS. Unless --live is 0, its first four numbers are
    live ones. KeyboardInterrupt once there is something in `stop`: the run has been saved."""
    args = source.args
    rivals = baselines(args.runs, args.keep)
    print_baselines(rivals)
    keeping = check_keeping(args.runs, args.keep)
    print("keeping | {false_keeps} of {real_edits} edits of healthy runs were kept; what is kept gains {own_gain:+.3f} "
          "nats in its world, {other_gain:+.3f} in others, where {other_fails:.0%} gain nothing".format(**keeping))
    after = evaluate_from_table(source, "after")
    shown = after
    live = None
    if args.live:
        live = evaluate_live(source, stop)
        shown = live
    return dict(
        diagnosis_seen=shown["seen"]["diagnosis"], diagnosis_held=shown["held"]["diagnosis"],
        recovered_seen=shown["seen"]["recovered"], recovered_held=shown["held"]["recovered"],
        live=live, table=after, before=now.before, baselines=rivals, keeping=keeping)

def named_edits(problem):
    """The edits that undo a problem's faults; herrings need none."""
    return [edit for fault, _ in problem.faults if fault not in HERRINGS for edit in fault.edits]

def tell_repair(task):
    """An episode in a line: what was wrong, what the policy read, thought and did, and what came of it."""
    wrong = []
    for fault, value in task.problem.faults:
        wrong.append(f"{fault.words} ({value if isinstance(value, str) else f'{value:.3g}'})")
    before = task.runs.log(task.problem.recipe()).val
    done = []
    for text, (_, gain) in zip(task.said, task.edits):
        verdict = "kept" if gain > task.keep else "undone"
        done.append(f"{text} {before:.3f} -> {before - gain:.3f}, {verdict}")
    print(f"  world {task.problem.world}: {', '.join(wrong) or 'healthy'} | {task.prompt} | "
          f"{'; '.join(done) or 'left as it is'}", flush=True)

# ---- self-evolution: baselines ---------------------------------------------------------------------
# What rivals recover that cannot read a log, and one that can, all from the table. A run with one fault is tried N
# times, each time from the unedited run, and the best edit is kept: N reruns. With two faults, a constant of N is N
# edits in a row, each on the best run so far; a try of random or TPE is two edits in a row, so that N tries are 2 N
# reruns. The oracle has an edit for each fault. What was open is chosen so that the rivals are strong.

KINDS = dict(seen=1, held=1, unseen=1, pairs=2)  # of test_problems -> edits of a try, and of the oracle
RANDOM_OF = (1, 2, 4, 8, 16)           # tries
CONSTANTS_OF = (1, 2, 4)               # edits
HALVE = "lr/4"                         # once: of EDITS the nearest to half the rate
# tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)
TPE_OF = (4, 8, 16, 32)                # tries
TPE_GOOD = 0.15                        # gamma: share of the tries that are good, rounded down. 0.25 finds less here
TPE_CANDIDATES = 24                    # drawn from the good ones' distribution
TPE_PRIOR = 1.0                        # tries that each choice has had before the first
TPE_SEEDS = 20
# linear reader
READER_L2 = 1e-3                       # of the squared weights; 1e-4 to 1e-2 all read about as well
READER_PRINTINGS = 8                   # of a training problem's log
READER_STEPS = 200                     # of L-BFGS, at most

def sequence_gains(runs, problem, n_edits, keep):
    """What each sequence of so many edits gains, tried one after another on the best run so far, and undone where it
    gains no more than `keep` -> (15 ** n_edits,), the last edit running fastest."""
    recipes = places(problem)
    number = {recipe: place for place, recipe in enumerate(recipes)}
    vals = np.array([runs.log(recipe).val for recipe in recipes])
    leads = np.array([[number[edited(recipe, edit)] for edit in EDITS] for recipe in recipes])   # (places, edits)
    is_kept = vals[:, None] - vals[leads] > keep
    leads = np.where(is_kept, leads, np.arange(len(recipes))[:, None])
    here = np.zeros(1, int)            # the problem's own recipe is the first of its places
    for _ in range(n_edits):
        here = leads[here].reshape(-1)
    return vals[0] - vals[here]

def worth(gains, oracle):
    """What some problems gained, and could have, in nats -> share recovered, regret, as `score` has them."""
    can_gain = oracle > 0
    shares = np.minimum(1, gains[can_gain] / oracle[can_gain])
    return shares.sum() / max(1, len(shares)), np.maximum(0, oracle - gains).mean()

def best_constant(gains, oracle, n):
    """The n columns whose best is best on average -> what these gain, (problems,). They are chosen on the very problems
    that they are measured on: no rival that is blind to log and gains does better with n tries."""
    can_gain = oracle > 0
    shares = np.minimum(1, gains[can_gain] / oracle[can_gain, None])
    sets = np.array(list(itertools.combinations(range(gains.shape[1]), n)))
    chosen = sets[shares[:, sets].max(2).sum(0).argmax()]
    return gains[:, chosen].max(1)

def random_best(gains, n):
    """Expected best of n different columns drawn at random, exactly -> (problems,)."""
    n_columns = gains.shape[1]
    n = min(n, n_columns)
    # the k-th smallest is the best of a draw if the other n - 1 are among the k - 1 below it
    chance = [math.comb(below, n - 1) / math.comb(n_columns, n) for below in range(n_columns)]
    return np.sort(gains, 1) @ np.array(chance)

def draw_choices(weights, count, rng):
    """Draw from each row's distribution. weights: (..., choices) -> (..., count) choices."""
    bounds = weights.cumsum(-1) / weights.sum(-1, keepdims=True)
    draws = rng.random((*weights.shape[:-1], count))
    return (draws[..., None] > bounds[..., None, :-1]).sum(-1)

def tpe_best(gains, n_edits, n_tries, seed=0):
    """Best of the first 1, 2, ... n_tries of a tree-structured Parzen estimator. It draws from what was good so far,
    and takes what is most typical of the good against the rest, each edit of a sequence on its own.

    gains    (problems, 15 ** n_edits)
    returns  (n_tries, problems), mean over TPE_SEEDS
    """
    rng = np.random.default_rng(seed)
    gains = np.repeat(gains, TPE_SEEDS, 0)
    rows = np.arange(len(gains))
    place_values = len(EDITS) ** np.arange(n_edits)[::-1]
    tries = np.zeros((len(gains), 0, n_edits), int)
    gained = np.zeros((len(gains), 0))
    for n_done in range(n_tries):
        n_good = int(TPE_GOOD * n_done)
        rank = (-gained).argsort(1, kind="stable").argsort(1)
        is_good = (rank < n_good)[:, :, None, None]
        is_choice = tries[..., None] == np.arange(len(EDITS))                # (rows, tries, n_edits, choices)
        good = (is_choice & is_good).sum(1) + TPE_PRIOR                      # (rows, n_edits, choices)
        rest = (is_choice & ~is_good).sum(1) + TPE_PRIOR
        candidates = draw_choices(good, TPE_CANDIDATES, rng)                 # (rows, n_edits, candidates)
        ratios = np.take_along_axis(good / rest, candidates, 2)
        taken = np.take_along_axis(candidates, ratios.argmax(2)[..., None], 2)[..., 0]           # (rows, n_edits)
        tries = np.concatenate([tries, taken[:, None]], 1)
        gained = np.concatenate([gained, gains[rows, taken @ place_values][:, None]], 1)
    best = np.maximum.accumulate(gained, 1)
    return best.reshape(-1, TPE_SEEDS, n_tries).mean(1).T

def read_letters(texts):
    """Logs, as Repair prints them -> (logs, letters), from 0 for a to 1 for z."""
    letters = [[LETTERS.index(char) for char in text if char in LETTERS] for text in texts]
    return torch.tensor(letters, dtype=torch.float32) / (len(LETTERS) - 1)

class LinearReader:
    """Multinomial logistic regression from the letters of a log to an edit, or to DONE."""

    def __init__(self, texts, labels):
        self.choices = sorted(set(labels))
        letters = read_letters(texts)
        self.mean = letters.mean(0)
        self.scale = letters.std(0, correction=0).clamp(min=1e-6)  # a letter that never changes says nothing
        features = (letters - self.mean) / self.scale
        targets = torch.tensor([self.choices.index(label) for label in labels])
        self.weight = torch.zeros(features.shape[1], len(self.choices), requires_grad=True)
        self.bias = torch.zeros(len(self.choices), requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=READER_STEPS, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            found = torch.nn.functional.cross_entropy(features @ self.weight + self.bias, targets)
            found = found + READER_L2 * self.weight.square().sum()
            found.backward()
            return found

        optimizer.step(loss)

    def choose(self, text, failed=()):
        """The likeliest edit, or DONE. failed: edits that are not tried again."""
        with torch.no_grad():
            features = (read_letters([text])[0] - self.mean) / self.scale
            scores = features @ self.weight + self.bias
        order = scores.argsort(descending=True).tolist()
        return next(self.choices[place] for place in order if self.choices[place] not in failed)

    def repair(self, task):
        """Play a Repair to its end: it reads the log of the best run so far before each rerun."""
        while len(task.edits) < task.reruns:
            failed = [edit for edit, gain in task.edits if gain <= task.keep]
            edit = self.choose(task.describe(), failed)
            if edit == DONE:
                break
            task.tool(f"{thought(edit)}[{edit}]")

def right_label(runs, problem):
    """The repair that gains most, DONE for a run that needs none."""
    edits = [edit for fault, _ in problem.faults if fault not in HERRINGS for edit in fault.edits]
    return max(edits, key=lambda edit: runs.gain(problem.recipe(), edit)) if edits else DONE

def print_logs(runs, problems, reruns, keep, printings):
    """Problems -> Repairs, several printings of each."""
    tasks = []
    for number, problem in enumerate(problems):
        for printing in range(printings):
            rng = Random(f"reader {problem.world} {number} {printing}")
            tasks.append(Repair(rng, runs, problem, reruns, keep))
    return tasks

def train_reader(runs, keep):
    """A linear reader of the logs of TRAIN_WORLDS, with right labels."""
    problems = [problem for world in TRAIN_WORLDS for problem in single_problems(world)]
    tasks = print_logs(runs, problems, 1, keep, READER_PRINTINGS)
    return LinearReader([task.prompt for task in tasks], [right_label(runs, task.problem) for task in tasks])

def problems_by_kind():
    """test_problems of all TEST_WORLDS together."""
    found = {}
    for world in TEST_WORLDS:
        for kind, problems in test_problems(world).items():
            found.setdefault(kind, []).extend(problems)
    return found

def kind_baselines(runs, problems, n_edits, keep):
    """Baselines of problems of one kind, but for the reader -> dict: name -> (share recovered, regret)."""
    oracle = np.array([runs.best_gain(problem.recipe(), n_edits, keep) for problem in problems])

    def gains_of(count):
        return np.stack([sequence_gains(runs, problem, count, keep) for problem in problems])

    single = gains_of(1)
    gains = gains_of(n_edits)
    found = {"nothing": np.zeros(len(problems)), "always halve the rate": single[:, EDITS.index(HALVE)]}
    for n in CONSTANTS_OF:
        if n_edits == 1:
            found[f"best constant of {n}"] = best_constant(single, oracle, n)
        else:
            found[f"best constant of {n}"] = best_constant(gains_of(n), oracle, 1)
    for n in RANDOM_OF:
        found[f"random of {n}"] = random_best(gains, n)
    curve = tpe_best(gains, n_edits, max(TPE_OF))
    for n in TPE_OF:
        found[f"TPE of {n}"] = curve[n - 1]
    found["oracle"] = oracle
    return {name: worth(gained, oracle) for name, gained in found.items()}

def baselines(runs, keep):
    """What stands beside the policy -> dict: name -> share recovered of each of KINDS, and what is left of the seen
    ones, in nats (regret). The linear reader has more: how often its first edit is right (diagnosis_seen, _held), and
    the share of healthy runs that it reruns (needless)."""
    problems = problems_by_kind()
    found = {}
    for kind, n_edits in KINDS.items():
        for name, (recovered, regret) in kind_baselines(runs, problems[kind], n_edits, keep).items():
            row = found.setdefault(name, {})
            row[kind] = recovered
            if kind == "seen":
                row["regret"] = regret

    reader = train_reader(runs, keep)
    scores = {}
    for kind in (*KINDS, "healthy"):
        tasks = print_logs(runs, problems[kind], KINDS.get(kind, 1), keep, PRINTINGS)
        for task in tasks:
            reader.repair(task)
        scores[kind] = score_repairs(tasks)
    row = {kind: scores[kind].recovered for kind in KINDS}
    row["regret"] = scores["seen"].regret
    row["diagnosis_seen"] = scores["seen"].diagnosis
    row["diagnosis_held"] = scores["held"].diagnosis
    row["needless"] = scores["healthy"].touched
    found["linear reader"] = row
    for row in found.values():
        for name, value in row.items():
            row[name] = round(float(value), 4)
    return found

def check_keeping(runs, keep):
    """Whether what is kept deserves it -> dict.

    false_keeps    edits that are kept on runs of all worlds that need no repair, and
    real_edits     so many were tried: those that change the recipe
    own_gain       of edits that are kept on TEST_WORLDS' seen problems, mean in nats
    other_gain     of the same edits on all other worlds that have the same fault with the same value
    other_fails    share of those that gain nothing
    """
    problems = [problem for world in (*TRAIN_WORLDS, *TEST_WORLDS) for problem in single_problems(world)]
    healthy = [problem for problem in problems if right_label(runs, problem) == DONE]
    gains = [runs.gain(recipe, edit) for recipe, edit in real_edits(healthy)]
    same_faults = {}
    for problem in problems:
        same_faults.setdefault(problem.faults, []).append(problem)

    own = []
    other = []
    for problem in problems_by_kind()["seen"]:
        recipe = problem.recipe()
        for edit in EDITS:
            gain = runs.gain(recipe, edit)
            if gain > keep:
                own.append(gain)
                rivals = [rival.recipe() for rival in same_faults[problem.faults] if rival.world != problem.world]
                other += [runs.gain(rival, edit) for rival in rivals]
    return dict(
        false_keeps=sum(gain > keep for gain in gains),
        real_edits=len(gains),
        own_gain=round(float(np.mean(own)), 4),
        other_gain=round(float(np.mean(other)), 4),
        other_fails=round(float(np.mean([gain <= 0 for gain in other])), 4))

def real_edits(problems):
    """(recipe, edit) for each edit that changes a problem's recipe."""
    recipes = [problem.recipe() for problem in problems]
    return [(recipe, edit) for recipe in recipes for edit in EDITS if edited(recipe, edit) != recipe]

PRINTED = ("nothing", "always halve the rate", *(f"best constant of {n}" for n in CONSTANTS_OF),
           *(f"random of {n}" for n in (1, 4, 16)), *(f"TPE of {n}" for n in (4, 16, 32)), "linear reader", "oracle")

def print_baselines(found):
    """What `baselines` says, a line each: shares recovered, and nats that are left of the seen problems."""
    print(f"{'from the table: share recovered':32}{''.join(f'{kind:>8}' for kind in KINDS)}  regret (seen)")
    for name in PRINTED:
        row = found[name]
        shares = "".join(f"{row[kind]:8.3f}" for kind in KINDS)
        print(f"{name:32}{shares}{row['regret']:8.3f}")
    reader = found["linear reader"]
    print(f"the linear reader: diagnosis {reader['diagnosis_seen']:.2f} seen, {reader['diagnosis_held']:.2f} held; "
          f"it reruns {reader['needless']:.2f} of the healthy runs", flush=True)

# ---- the trained agent at work -------------------------------------------------------------------

def show_play(args, state):
    """--play: the agent of --out at work in fresh tasks, and the share that it solves, beside that of the policy before
    it was trained on rewards -> what the last line of stdout says. state: --out's checkpoint.

    Two shares each: greedy, with the likeliest token at each place, and sampled, as in training. Why? The imitation of
    a teacher that is wrong now and then is a policy whose likeliest token is right already: what rewards teach it shows
    in what it samples."""
    steps = state["now"].get("step")
    print(f"play    | {args.play} fresh tasks of {args.task}; {args.out} after {steps} steps", flush=True)
    device, dtype, _ = pick_device(args.device)
    after = load_source(args, state, device, dtype)
    greedy = play_fresh(after, 0.0)
    for number, episode in enumerate(greedy[:SHOWN]):
        print_turns(number, episode, after.tokenizer.decode)

    # the policy before: what the imitation left, if it is the one that this run began with
    before = None
    folder = os.path.join(args.out, "warm")
    if os.path.exists(checkpoint_path(folder)):
        first = load_checkpoint(folder)
        if is_same_imitation(first, after) and is_over(first):
            before = load_source(args, first, device, dtype)

    result = dict(task=args.task, tasks=args.play, steps=steps)
    for when, source in dict(before=before, after=after).items():
        words = f"unknown: {folder} holds no imitation of this run"
        shares = dict.fromkeys(("greedy", "greedy_error", "sampled", "sampled_error"))
        if source:
            episodes = greedy if source is after else play_fresh(source, 0.0)
            shares["greedy"], shares["greedy_error"] = share_solved(episodes)
            shares["sampled"], shares["sampled_error"] = share_solved(play_fresh(source, 1.0))
            words = "solved: greedy {greedy:.3f} +- {greedy_error:.3f}, sampled {sampled:.3f} +- {sampled_error:.3f}"
            words = words.format(**shares)
        print(f"{when:7} | {words}", flush=True)
        result[when] = shares
    return result

def load_source(args, state, device, dtype):
    """A checkpoint -> a source of episodes that its model plays."""
    model, tokenizer = load_model(state, device, dtype)
    source = Local(model, args, make_queue(args))
    source.tokenizer = tokenizer
    source.origin = origin_of(state)
    return source

def play_fresh(source, temperature):
    """Play --play tasks that no training has seen -> episodes. temperature: 0 is greedy."""
    args = source.args
    generator = torch.Generator(source.model.embed.weight.device)
    generator.manual_seed(Random(f"{args.seed} play").getrandbits(62))
    episodes = []
    for first in range(0, args.play, PLAYED_AT_ONCE):
        numbers = range(first, min(first + PLAYED_AT_ONCE, args.play))
        some = [(Trajectory(number), make_task(args, number, 2).agent()) for number in numbers]
        rollout(source, some, 0, generator, temperature=temperature)
        episodes += [episode for episode, _ in some]
    return episodes

def share_solved(episodes):
    """-> the share of episodes that were solved, and its standard error."""
    n = len(episodes)
    solved = sum(episode.success for episode in episodes) / n
    return solved, math.sqrt(solved * (1 - solved) / n)

def turns_of(episode):
    """-> for each turn what is new in its context, and what the policy wrote, ids both."""
    before = []
    for sample in episode.samples:
        ids = sample.ids.tolist()
        yield ids[common_prefix(before, ids):sample.start], ids[sample.start:]
        before = ids

def print_turns(number, episode, decode):
    """Print an episode, a line for each text, with the turns' rewards."""
    print(f"task {number} | {'solved' if episode.success else 'failed'}, reward {sum(episode.rewards):+.2f}")
    speaker = "prompt"
    for (heard, said), reward in zip(turns_of(episode), episode.rewards):
        print(f"  {speaker:6} {shown(decode(heard))}")
        print(f"  policy {shown(decode(said)):{COLUMN}} {reward:+.2f}", flush=True)
        speaker = "tool"

def shown(text):
    """A text in one line: control characters would garble the terminal."""
    return text.encode("unicode_escape").decode()

def make_source(args, state, device, dtype, locks, ranks=Ranks()):
    """Model, queue and gateway of a run -> a source. See run for state and locks."""
    began_from = None                  # --init's checkpoint
    if args.init and not state:
        began_from = read_init(args)
    made_with = state or began_from
    cfg = read_config(made_with) if made_with else make_config(args)
    check_memory(needed_bytes(args, cfg, device), device, "--preset micro, or fewer --turns")
    tokenizer = Gateway.tokenizer
    if made_with:
        model, tokenizer = load_model(made_with, device, dtype)
        if args.context or args.serve is not None:
            model.cfg.max_seq_len = context_size(args)  # weights do not depend on it
    else:
        model = make_model(args, device, dtype)

    queue = make_queue(args)
    if not args.resume and ranks.world.is_first:
        set_aside(args.out)
    if ranks.rolls_out:
        source = Rollouts(model, args, ranks)
    elif ranks.world.size > 1:
        source = Apart(model, args, queue, ranks)
    elif args.serve is None:
        source = Local(model, args, queue)
    else:
        source = Served(model, args, queue, args.out)
        locks.callback(source.close)
    source.speak(tokenizer)
    if state:
        source.origin = origin_of(state)
    elif began_from:
        source.origin["init"] = f"{began_from['now'].get('run')} {began_from['now'].get('step')}"
    if args.own_task or args.context or args.max_new_tokens:
        try_teacher(source, args, model.cfg.max_seq_len)
    return source

def run(args, state, locks=None):
    """Imitate, then learn from rewards until the end that the flags name -> what the last line of stdout says.

    state  the checkpoint, None for a run at its start or in its imitation
    locks  ExitStack: what is closed at the end, whatever that is like; --serve needs one
    """
    world = World.from_env()
    device, dtype, why = pick_device(args.device, world)
    ranks = Ranks.join(world, device, args.parallel)
    if args.task == "evolve":
        with world.first():
            args.runs = open_table(args.table)
        args.keep = ENOUGH * args.runs.noise(OTHER_SEED)[1]
    if args.play:
        return show_play(args, state)
    started = time.perf_counter()
    stop = on_signals()                # with several ranks, rank 0's alone end the run
    what = f"{args.warm_steps} steps of imitation, then rewards"
    if state:
        what = f"goes on after step {state['now'].get('step')}"
    print(f"run     | {args.task}: {what}; {args.out} keeps it", flush=True)

    source = make_source(args, state, device, dtype, locks, ranks)
    if state:
        check_record(state["now"])
    threads = Threads(device, args.threads, state["now"].get("threads") if state else None, world)
    if threads.count is None:
        threads.choose(trial(source), args.steps)
    if not world.is_first:
        return assist(args, state, source, ranks)
    card(args, source.model, source.queue, device, why, threads, ranks)

    # imitation, unless a run goes on behind it
    ready = True
    if state is None:
        ready = warm_start(source, args, stop, threads)
    if ready and args.serve is not None:
        print(f"gateway | {source.door.url} key {source.token}", flush=True)
    if ready and state is None and args.teach:
        seconds_left = 60 * args.minutes - (time.perf_counter() - started) if args.minutes else math.inf
        ready = teach(source, args, stop, threads, seconds_left)
    threads.times = []                 # the next steps are others than these
    optimizers = configure_optimizers(source.model, args.lr)[0]

    # where the run stands; the other ranks begin
    if state:
        restore(state, optimizers, source)
        now = Record(**{name: value for name, value in state["now"].items() if name in NOW})
    else:
        warm = time.perf_counter() - started
        if args.minutes and warm >= 60 * args.minutes and args.serve is None:
            print(f"minutes | the imitation took all of --minutes {args.minutes:g}, so that one step is left for "
                  "rewards: give more", flush=True)
        now = Record(seconds=warm, warm=warm, run=os.urandom(8).hex())
        if ready and args.task == "evolve" and args.serve is None:
            now.before = evaluate_from_table(source, "before")
        if ready:
            save(args.out, source, optimizers, vars(now))  # killed from here on, the run can go on
    if ready:
        ranks.push_first_weights(source.model)
    if state:
        source.resume(now.step)
    if state and share_done(vars(now), vars(args)) >= 1:
        print(f"nothing left to do after step {now.step}: give more --steps or --minutes", flush=True)

    learn_from_rewards(now, source, optimizers, stop, threads, ranks)
    if not ready:
        print(f"stopped in the imitation, saved in {args.out}/warm; the same command goes on", flush=True)
    elif stop or not now.step:  # all the time went into the imitation, or into waiting for other processes
        if not stop and args.serve is not None:
            print(f"minutes | --minutes {args.minutes:g} are over, and agents have not ended {args.groups} groups of "
                  f"{args.rollouts} episodes: start more, or give more", flush=True)
        print(f"stopped after step {now.step}, saved; --resume --out {args.out} goes on", flush=True)
    result = summary(args, now, source)
    if args.task == "evolve":
        result |= dict.fromkeys(REPAIR_KEYS)
        if ready and not stop and args.serve is None:  # behind agents' prompts it may have learned other texts
            result |= evaluate_repairs(now, source, stop)
    ranks.end()
    return result

def assist(args, state, source, ranks):
    """What a rank does beside rank 0, until that ends -> nothing to print."""
    step = state["now"]["step"] if state else 0
    if ranks.rolls_out:
        source.version = step
        source.serve()
    else:
        optimizers = configure_optimizers(source.model, args.lr)[0]
        if state:
            restore(state, optimizers)
        follow(source, optimizers, ranks)
    ranks.end()
    return {}

def learn_from_rewards(now, source, optimizers, stop, threads, ranks=Ranks()):
    """Steps until the end that the flags name, or until there is something in `stop`, which are saved. now: the run's
    Record, which goes on; ranks: those that play, or share the steps."""
    args = source.args
    queue = source.queue
    timer = SaveTimer()
    has_begun = False
    while share_done(vars(now), vars(args)) < 1 and not stop:
        began = time.perf_counter()
        has_begun = True

        # rollout: free slots are filled, finished groups are taken from the window
        rate = args.lr * min(1.0, 2 * (1 - share_done(vars(now), vars(args))))
        version = now.step             # of the policy
        source.start(queue.admit(version, source.now), version)
        seconds_left = 60 * args.minutes - now.seconds if args.minutes else math.inf
        source.wait(stop, seconds_left)
        waited = time.perf_counter() - began
        if len(queue.batch) < args.groups:  # stopped, or out of time, while agents of other processes were at work
            break
        groups = [source.pool.pop(task) for task in queue.batch]

        # train, and publish the weights: now, not before, the groups' slots are free
        step_began = time.perf_counter()
        # balancing moves at one speed, however small the rate: at the imitation's, tokens would change their experts
        # faster than these learn, and what is solved would be forgotten
        rates = (rate, BIAS_SHARE * rate)
        own, *others = ranks.deal([advantages(group) for group in groups])
        for rank, share in enumerate(others, 1):
            ranks.tell([rank], "train", share, *rates)
        stats = train_share(source, optimizers, own, rates, ranks)
        if stats:
            threads.watch(time.perf_counter() - step_began, trial, source)
            version += 1
            source.publish(version)
        is_on_cpu = source.model.embed.weight.device.type == "cpu"
        now.threads = threads.count if is_on_cpu else None  # bits depend on it
        source.trained(queue.batch, version)
        lags = queue.publish(version)
        took = time.perf_counter() - began
        now.seconds += took

        # tell and save
        if stats:
            source.laps.append(Lap(took, waited, stats["naive"]))
            episodes = [episode for group in groups for episode in group]
            count_step(now, episodes, stats, lags)
            print_step(now, args, episodes, stats, lags, source.tokenizer.decode, source.step_note())
            watch_collapse(now, args, stats)
        else:
            print(f"no step   | groups {[group[0].task for group in groups]}: no turn to learn from", flush=True)
        if now.step % args.save_every == 0 or timer.due():
            save_began = timer.clock()
            save(args.out, source, optimizers, vars(now))
            timer.saved(save_began)
    if has_begun:                      # a run with nothing left has nothing to save
        save(args.out, source, optimizers, vars(now))

def summary(args, now, source):
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
        virtual_seconds=virtual, idle=source.queue.idle / virtual, reward_per_virtual_s=now.reward / virtual,
        rollout_tokens_per_s=sampled_per_s, **pace(source.laps), **source.counts())

def save(folder, source, optimizers, now):
    """Write FOLDER/ckpt.pt, all there is between two steps: weights, momenta, flags, `now`, the queue, the groups in
    flight with what was said in them, the clock. FloatingPointError if a weight is not finite: what was saved before
    is kept."""
    parts = checkpoint_parts(source.args, source.model, source.tokenizer, optimizers)
    pool = {}                          # agents' of other processes are in an archive
    if not isinstance(source, Served):
        pool = {task: list(map(asdict, group)) for task, group in source.pool.items()}
        other = source.queue.born.keys() - pool.keys()
        pool |= dict.fromkeys(sorted(other))  # None: other ranks play them, and their turns are not here
    os.makedirs(folder, exist_ok=True)
    save_checkpoint(folder, now=now, pool=pool, queue=vars(source.queue), clock=source.now, origin=source.origin,
                    **parts)

def restore(state, optimizers, source=None):
    """Put a checkpoint's optimizers back, and, given a source, its queue, clock and pool. ValueError if they do not
    fit. Groups that agents of other processes had begun go on from what the archive has of them."""
    load_optimizers(optimizers, state["optimizers"], state["now"].get("step", 0))
    if source:
        try:
            restore_episodes(state, source)
        except (TypeError, KeyError, AttributeError, ValueError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"the checkpoint's queue, pool or clock: {reason}") from None
    if isinstance(source, Served):
        source.archive.forget_steps(state["now"]["step"])
        source.start([*source.queue.born], state["now"]["step"])

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
    is_apart = not isinstance(source, Served) and set(saved["born"]) != set(state["pool"])
    if not set(saved["batch"]) <= set(saved["born"]) or is_apart:
        raise ValueError("the groups in flight and those in the pool are not the same")
    pool = {}
    for task, group in state["pool"].items():
        if group is None and task in saved["due"]:
            continue                   # other ranks played it: it is played again
        pool[task] = [restore_episode(task, fields, tokens) for fields in group]
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

# ---- the door: episodes of agents that know nothing of it --------------------------------------------
# An agent is a program that somebody else wrote. It is given an address and a key, as for any server that speaks
# OpenAI's protocol, and sends what it always sends. The address is an episode: whoever launches the agent claims one,
# and says at the end what it was worth.
#
#     POST /v1/tasks {wait: 30}              -> {task, group, row, messages, answer, base_url, api_key}
#     POST /s/<task>/v1/chat/completions     a turn: messages, tools, n, stop, stream; any `model`
#     POST /s/<task>/v1/responses            the same in OpenAI's newer form
#     GET  /s/<task>/v1/models               a name that the agent may show
#     POST /v1/finish {task, reward, success}   its end; or `rewards`, one for each turn
#     POST /s/<task>/v1/tools {name, arguments}  -> {content, over}: a tool of a task that has tools, evolve's. Such a
#                                            task says itself when it is over and what it was worth
#     POST /v1/tasks {environment: "train.py"}  a session at the judge, one at a time: see the section on it
#
# An agent that names the episode in place of a model, at /v1/chat/completions, is served, too.
#
# Here the requests are read; sample.py's server carries them. An event loop hears all connections, so that an idle or
# slow one holds up no other. The model has one user, the run's thread: it answers what waits between two forwards, and
# stands still while a step trains. Turns that are under way then go on with the new weights.

GATHER_RUNNING_S = 0.1                 # seconds that a request waits for a batch to end, at most
PREFIX_BLOCK = 64                      # tokens of a block of the prefix cache, where no layer is sparse
CLAIM_WAIT = 60.0                      # seconds that a claim may wait for an episode, at most
MOST_CHOICES = 8                       # n of a request
NO_AGENT = "; no agent is here: POST /v1/tasks claims an episode, as .ci/agent.py does"
MOST_REWARD = 1e3
MOST_REASONS = 10_000                  # episodes of which it is known why they are over
TELL_EVERY = 10.0                      # seconds between two lines of what the trainer waits for
DRAWN_AT = dict(temperature=1, top_p=1, top_k=0)  # of every token: what the trainer computes is this distribution
NOT_DONE = dict(                       # field -> the value that changes nothing
    presence_penalty=0, frequency_penalty=0, repetition_penalty=1, min_p=0, logit_bias={}, seed=None,
    response_format=dict(type="text"), best_of=1, functions=[], truncation="disabled")

@dataclass
class CallRule:
    """Which part of a completion's text is a tool call.

    tool     its name; None: the first tool of the request that no other rule names
    pattern  a regular expression, whose named groups are arguments. `argument` is the tool's first required one
    """
    tool: str | None
    pattern: re.Pattern

# t1[12+3] calls the agent's tool with 12+3. An agent that answers by a tool, as smolagents does, hears A15. as its call
CALL_RULES = (
    CallRule("final_answer", re.compile(r"A(?P<argument>[^.]*)\.")),
    CallRule("done", re.compile(r"A\.")),
    CallRule(None, re.compile(r"\[(?P<argument>[^\]]*)\]")))

def read_rule(text):
    """NAME=PATTERN, as --tool takes it -> CallRule; NAME may be empty. ArgumentTypeError."""
    name, equals, pattern = text.partition("=")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: the pattern is no regular expression: {error}") from None
    if not equals or not compiled.groupindex:
        raise argparse.ArgumentTypeError(
            rf"{text!r:.80}: NAME=PATTERN, a named group for each argument: add=\[(?P<a>\d+)\+(?P<b>\d+)\]")
    return CallRule(name or None, compiled)

def rule_text(text):
    """A rule's text, checked: a checkpoint's args are plain."""
    read_rule(text)
    return text

def typed(text, kind):
    """An argument's text as the JSON type that the tool's schema names; as text where it is none of that type."""
    if isinstance(kind, list):         # ["integer", "null"]
        kind = next((one for one in kind if one != "null"), None)
    readers = dict(integer=int, number=float, boolean=dict(true=True, false=False).__getitem__)
    try:
        value = readers.get(str(kind), str)(text)
    except (ValueError, KeyError):
        return text
    return text if value in (math.inf, -math.inf) or value != value else value

def find_tool(rule, tools, rules):
    """The function of a request's tools that a rule calls, {name, parameters}; None if there is none."""
    named = {other.tool for other in rules}
    for tool in tools:
        if tool["name"] == rule.tool or rule.tool is None and tool["name"] not in named:
            return tool
    return None

def read_arguments(match, tool):
    """The named groups of a rule's match -> the tool's arguments, as JSON."""
    schema = tool.get("parameters")
    schema = schema if isinstance(schema, dict) else {}
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    first = next(iter(required if isinstance(required, list) and required else properties), "argument")
    arguments = {}
    for name, value in match.groupdict(default="").items():
        if name == "argument" and name not in properties:
            name = str(first)
        kind = properties.get(name)
        arguments[name] = typed(value, kind.get("type") if isinstance(kind, dict) else None)
    return json.dumps(arguments)

def split_calls(text, tools, rules=CALL_RULES):
    """A completion's text -> what is content, [(tool's name, arguments as JSON)].

    tools   the request's functions, {name, parameters: a JSON schema}
    rules   CallRules, the first that matches at a place counts; what is inside of another call is none
    """
    pairs = [(rule, find_tool(rule, tools, rules)) for rule in rules]
    pairs = [(rule.pattern, tool) for rule, tool in pairs if tool is not None]
    content = ""
    calls = []
    place = 0
    while place < len(text):
        end = place + 1
        for pattern, tool in pairs:
            match = pattern.match(text, place)
            if match and match[0]:     # an empty one says nothing
                calls.append((tool["name"], read_arguments(match, tool)))
                end = match.end()
                break
        else:
            content += text[place]
        place = end
    return content, calls

# ---- the door: what is asked -------------------------------------------------------------------------

@dataclass
class Row:
    """One completion of a request, as far as it is drawn. It outlives a change of weights."""
    index: int
    ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    versions: list = field(default_factory=list)  # of the policy that drew each token
    notes: list = None                 # routes of all tokens but the last, with --replay
    text: str = ""                     # before a stop text; calls taken out, once they are read
    finish: str | None = None
    calls: list = field(default_factory=list)     # [(id, name, arguments)]
    scores: list = field(default_factory=list)    # sample.py's Score of each token, where they are asked for
    shown: int = 0                     # characters that are text; a score that begins later is not told
    n_chars: int = 0                   # that the client has heard
    n_scores: int = 0

    def keys(self):
        """What the agent may send back: see said_key."""
        if not self.calls:
            return [self.text]
        call_id = self.calls[0][0]
        as_text = f"{self.text.strip()}\0{call_id}"  # see CALL_AS_TEXT
        return [said_key(self.text, self.calls, call_id), said_key(self.text, self.calls), as_text]

    def said(self):
        """What the archive keeps beside the tokens."""
        return dict(text=self.text, finish=self.finish, calls=self.calls)

    def news(self, finish=None):
        """What the client has not heard yet, as a Piece. finish: how the row has ended, if it has."""
        scores = [score for score in self.scores[self.n_scores:] if score.start < self.shown]
        piece = Piece(self.index, self.text[self.n_chars:], scores, finish, len(self.ids))
        if finish:
            piece.calls = [call_object(*call) for call in self.calls]
        self.n_chars = len(self.text)
        self.n_scores += len(scores)
        return piece

@dataclass
class Turn(Asked):
    """A request for a turn: sample.py's Asked, and what the gateway keeps of it."""
    name: str = ""
    claim: "Claim" = None
    messages: list = None              # in the form of chat completions
    context: list = None               # tokens
    tools: list = None                 # functions, where the agent has any and wants them
    digest: str = ""                   # of the request
    rows: list = None
    is_response: bool = False          # of /v1/responses
    request: dict = None               # its body: a response repeats fields of it
    was_refused: list = field(default_factory=list)  # reasons: something went wrong within it

    @property
    def grows(self):
        """Whether the client hears of each token: a tool call shows only at the end."""
        return self.is_stream and not self.tools and not self.is_response

    @property
    def is_over(self):
        return bool(self.was_refused) or self.client.gone or all(row.finish for row in self.rows)

@dataclass
class Answer:
    """The last turn of an episode, for an agent that did not hear it, and asks again."""
    number: int                        # of the turn
    digest: str                        # of the request
    context: list                      # tokens
    rows: list
    client: object                     # who asked; None: in an earlier process
    before: "Answer" = None            # while this one may be forgotten
    name: str = ""                     # of a response

@dataclass
class Claim:
    """An episode in the hands of an agent."""
    name: str                          # group.row
    episode: Trajectory
    task: object
    began: float                       # seconds on the run's clock
    heard: float                       # when its agent last asked for something, or was told something
    lesson: object = None              # the teacher, if it answers
    messages: dict = field(default_factory=dict)  # a response's id -> all messages until then
    last: Answer = None
    n_turns: int = 0
    calls: list = field(default_factory=list)  # Futures of tool calls that are under way

    @property
    def has_tools(self):
        return bool(getattr(self.task, "tools", ()))

    @property
    def is_of_group(self):
        """Whether it is trained on, and kept: not a lesson, nor a session at the judge."""
        return self.lesson is None and not isinstance(self.task, Workshop)

def tell_rows(turn):
    """All that the client of a turn has not heard of its rows, and how each has ended."""
    for row in turn.rows:
        turn.client.tell(row.news(row.finish))

def read_functions(body):
    """A request's tools, in either form of the protocol -> [{name, parameters}]. Refused for what is none."""
    tools = body.get("tools")
    if tools is None or body.get("tool_choice") == "none":
        return []
    functions = []
    if not isinstance(tools, list):
        raise Refused(400, f"tools {tools!r:.60}: a list is needed")
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise Refused(400, f"tools[{place}] {tool!r:.60}: an object is needed")
        function = tool.get("function", tool)
        if tool.get("type", "function") != "function":
            continue                   # the server's own tools of other makers: nothing that a text could call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(400, f"tools[{place}]: a function has a name")
        functions.append(function)
    return functions

def list_warnings(body, max_new_tokens):
    """What a request asks for that cannot be done, a line each."""
    warnings = []
    for name, value in DRAWN_AT.items():
        asked = body.get(name)
        if asked is not None and asked != value:
            warnings.append(f"{name} {asked!r:.20}: tokens are drawn at {value}, from the distribution that is trained")
    for name, neutral in NOT_DONE.items():
        if body.get(name) not in (None, neutral):
            warnings.append(f"{name} {body[name]!r:.40}: it changes nothing here")
    form = body.get("text")            # of /v1/responses
    if isinstance(form, dict) and form.get("format") not in (None, dict(type="text")):
        warnings.append(f"text.format {form['format']!r:.40}: it changes nothing here")
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        asked = body.get(name)
        if isinstance(asked, int | float) and asked > max_new_tokens:
            warnings.append(f"{name} {asked}: the policy writes {max_new_tokens} at most (--max-new-tokens)")
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        warnings.append(f"tool_choice {choice!r:.60}: the policy is not forced to call")
    return warnings

def chat_messages(body, earlier):
    """The `input` and `instructions` of a request to /v1/responses -> messages as chat completions have them.

    earlier   messages of the response that previous_response_id names, and its own
    Items follow each other where chat has one message: text and calls of an assistant that lie side by side are one.
    """
    given = body.get("input")
    items = [dict(role="user", content=given)] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise ValueError(f"input {given!r:.60}: a text or a list is needed")
    messages = list(earlier)
    open_message = None                # an assistant's, which the next item may belong to
    for place, item in enumerate(items):
        where = f"input[{place}]"
        if not isinstance(item, dict):
            raise ValueError(f"{where} {item!r:.60}: an object is needed")
        kind = item.get("type", "message")
        if kind == "reasoning":
            continue
        if kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str | list | None) else json.dumps(output)
            messages.append(dict(role="tool", tool_call_id=item.get("call_id"), content=content))
            open_message = None
        elif kind == "function_call":
            call = dict(id=item.get("call_id"), function=dict(name=item.get("name"), arguments=item.get("arguments")))
            if open_message is None:
                open_message = dict(role="assistant", content=None, tool_calls=[])
                messages.append(open_message)
            open_message["tool_calls"].append(call)
        elif kind == "message" and isinstance(item.get("role"), str):
            open_message = None
            if item["role"] == "assistant":
                open_message = dict(role="assistant", content=item.get("content"), tool_calls=[])
                messages.append(open_message)
            else:
                messages.append(dict(role=item["role"], content=item.get("content")))
        else:
            raise ValueError(f"{where}: an item of type {kind!r:.40}; messages, calls and their outputs are read")

    # instructions stand first; those of earlier responses are over
    messages = [message for message in messages if not message.get("is_instructions")]
    instructions = body.get("instructions")
    if isinstance(instructions, str) and instructions:
        messages.insert(0, dict(role="system", content=instructions, is_instructions=True))
    return messages

# ---- the door: what is answered, in the form of /v1/responses ----------------------------------------

def output_items(row, name, n_rows):
    """A completion as the output items of a response: a message, where there is text, then calls."""
    items = []
    mark = f"{name}_{row.index}" if n_rows > 1 else name
    if row.text or not row.calls:
        part = dict(type="output_text", text=row.text, annotations=[], logprobs=[])
        items.append(dict(type="message", id=f"msg_{mark}", status="completed", role="assistant", content=[part]))
    for call_id, tool, arguments in row.calls:
        items.append(dict(type="function_call", id=f"fc_{call_id}", call_id=call_id, name=tool, arguments=arguments,
                          status="completed"))
    return items

def response_object(turn, name, rows, n_tokens, status="completed"):
    """A response: what was asked is repeated, as clients expect it."""
    asked = turn.request
    # also where a text was cut at its length: openai-agents ends a run at any other status
    body = dict(
        id=f"resp_{name}", object="response", created_at=int(time.time()), status=status, error=None,
        incomplete_details=None,
        instructions=asked.get("instructions"), max_output_tokens=asked.get("max_output_tokens"),
        metadata=asked.get("metadata") or {}, model=turn.model,
        output=[item for row in rows for item in output_items(row, name, len(rows))],
        parallel_tool_calls=asked.get("parallel_tool_calls") is not False,
        previous_response_id=asked.get("previous_response_id"),
        reasoning=dict(effort=None, summary=None), store=True, temperature=1.0, text=dict(format=dict(type="text")),
        tool_choice=asked.get("tool_choice") or "auto", tools=asked.get("tools") or [], top_p=1.0,
        truncation="disabled", user=None, usage=None)
    if status == "completed":
        body["usage"] = dict(
            input_tokens=turn.n_prompt, input_tokens_details=dict(cached_tokens=turn.cached),
            output_tokens=n_tokens, output_tokens_details=dict(reasoning_tokens=0),
            total_tokens=turn.n_prompt + n_tokens)
    if turn.warnings:
        body["warnings"] = [*turn.warnings]
    return body

def response_events(turn, name, rows, n_tokens):
    """A response as a stream: each item is announced, filled and closed -> events, in order."""
    empty = response_object(turn, name, [], 0, status="in_progress")
    yield dict(type="response.created", response=empty)
    yield dict(type="response.in_progress", response=empty)
    whole = response_object(turn, name, rows, n_tokens)
    for place, item in enumerate(whole["output"]):
        here = dict(output_index=place, item_id=item["id"])
        if item["type"] == "message":
            part, = item["content"]
            nothing = dict(part, text="")
            inside = dict(here, content_index=0)
            yield dict(type="response.output_item.added", output_index=place,
                       item=dict(item, status="in_progress", content=[]))
            yield dict(inside, type="response.content_part.added", part=nothing)
            yield dict(inside, type="response.output_text.delta", delta=part["text"], logprobs=[])
            yield dict(inside, type="response.output_text.done", text=part["text"], logprobs=[])
            yield dict(inside, type="response.content_part.done", part=part)
        else:
            yield dict(type="response.output_item.added", output_index=place,
                       item=dict(item, status="in_progress", arguments=""))
            yield dict(here, type="response.function_call_arguments.delta", delta=item["arguments"])
            yield dict(here, type="response.function_call_arguments.done", arguments=item["arguments"],
                       name=item["name"])
        yield dict(type="response.output_item.done", output_index=place, item=item)
    yield dict(type="response.completed", response=whole)

class EpisodeProtocol(Protocol):
    """OpenAI's protocol over episodes, on the event loop. A request is put before the run's thread, which answers with
    a dict, or with the Turn whose pieces follow."""

    def __init__(self, gateway):
        self.gateway = gateway
        self.created = int(time.time())

    def app(self):
        here = "/s/{task}/v1"
        posts = {
            "/v1/tasks": self.ask,
            "/v1/finish": self.ask,
            "/v1/chat/completions": self.ask,
            f"{here}/chat/completions": self.ask,
            f"{here}/responses": self.ask,
            f"{here}/tools": self.ask,
            f"{here}/finish": self.ask}
        gets = {f"{root}/models{name}": self.list_models for root in ("/v1", here) for name in ("", "/{name:path}")}
        return make_app(self.gateway.keys_of, posts, gets, most=self.gateway.most_body)

    async def list_models(self, request):
        """The only model there is, under whatever name it is asked for."""
        name = request.path_params.get("name", MODEL_ID)
        model = dict(id=name, object="model", created=self.created, owned_by=MODEL_ID,
                     max_model_len=self.gateway.model.cfg.max_seq_len)
        if "name" in request.path_params:
            return reply(model)
        return reply(dict(object="list", data=[model]))

    async def ask(self, request):
        raw, client = request.scope["heard"]
        path = request.url.path
        if path == "/v1/tasks":        # a client may have left as it asked: a moment shows it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.left.wait(), MOMENT)
        self.gateway.put(path, request.path_params.get("task"), raw, client)
        news = await client.hear()
        if not news:
            raise Refused(400, "the client has left")
        said, *rest = news
        client.news.extendleft(reversed(rest))
        if isinstance(said, dict):
            return reply(said)
        if said.is_response:
            return await self.respond_as_response(said)
        return await self.respond(said)

    async def respond_as_response(self, turn):
        from starlette.responses import StreamingResponse
        texts = await self.texts(turn)
        n_tokens = sum(text.n_tokens for text in texts)
        name = turn.name
        if not turn.is_stream:
            return reply(response_object(turn, name, turn.rows, n_tokens))

        async def events():
            for place, body in enumerate(response_events(turn, name, turn.rows, n_tokens)):
                body["sequence_number"] = place
                yield f"event: {body['type']}\n{event(body)}"
        return StreamingResponse(events(), media_type="text/event-stream")

# ---- the door: what is kept on disk --------------------------------------------------------------------
# A turn is written before its agent hears of it. So a trainer that is killed finds, in --out/episodes.db, all that its
# agents have heard; the checkpoint says which groups were trained on until it was made. What was trained on later
# counts as not trained on: the steps are gone with the weights, and the turns are taken once more.

ARCHIVE = "episodes.db"                # in --out

class Archive:
    """Episodes and their turns by token, in an SQLite file.

    path   of the file; None: in memory
    A context is stored as what differs from an earlier path, that of the episode's last turn, or of another episode's
    first turn: a prompt of thousands of tokens is written once.
    """

    TABLES = """
        CREATE TABLE IF NOT EXISTS run(name TEXT PRIMARY KEY, value TEXT);
        CREATE TABLE IF NOT EXISTS episode(
            name TEXT PRIMARY KEY, task INTEGER, rewards TEXT, success INTEGER, seconds REAL, step INTEGER);
        CREATE TABLE IF NOT EXISTS completion(
            id INTEGER PRIMARY KEY, name TEXT, turn INTEGER, base INTEGER, kept INTEGER, context BLOB, ids BLOB,
            logprobs BLOB, versions BLOB, routes BLOB, request TEXT, said TEXT);
        CREATE INDEX IF NOT EXISTS by_name ON completion(name);
        CREATE INDEX IF NOT EXISTS by_task ON episode(task);"""

    def __init__(self, path=None):
        self.path = path
        self.base = sqlite3.connect(path or ":memory:", check_same_thread=False)
        # a process that is killed loses nothing that was committed; a machine without power may lose the newest
        self.base.execute("PRAGMA journal_mode=WAL")
        self.base.execute("PRAGMA synchronous=NORMAL")
        self.base.executescript(self.TABLES)
        self.last = {}                 # name of an episode -> (id, path) of its newest completion
        self.newest_whole = None       # (id, path) of the newest first turn that did not build on another's

    def get(self, name):
        """A value of the run, by name; None if there is none."""
        row = self.base.execute("SELECT value FROM run WHERE name = ?", [name]).fetchone()
        return row and row[0]

    def put(self, name, value):
        self.base.execute("INSERT OR REPLACE INTO run VALUES(?, ?)", [name, value])
        self.base.commit()

    def claim(self, name, task):
        self.base.execute("INSERT OR REPLACE INTO episode(name, task) VALUES(?, ?)", [name, task])
        self.base.commit()

    def release(self, name):
        """Nobody plays the episode any more, and nothing was said in it."""
        self.base.execute("DELETE FROM episode WHERE name = ?", [name])
        self.base.commit()

    def finish(self, name, episode):
        """The end of an episode, as its Trajectory says it."""
        self.base.execute(
            "UPDATE episode SET rewards = ?, success = ?, seconds = ? WHERE name = ?",
            [json.dumps(episode.rewards), episode.success, episode.seconds, name])
        self.last.pop(name, None)
        self.base.commit()

    def trained(self, tasks, step):
        """These groups went into this step."""
        self.base.executemany("UPDATE episode SET step = ? WHERE task = ?", [(step, task) for task in tasks])
        self.base.commit()

    def forget_steps(self, step):
        """Steps after this one are gone with their weights."""
        self.base.execute("UPDATE episode SET step = NULL WHERE step > ?", [step])
        self.base.commit()

    def add(self, name, samples, request, said):
        """A turn: its completions, a Sample each; what was asked for, as a digest; and what was said, a dict each."""
        for sample, words in zip(samples, said):
            path = sample.ids.tolist()
            base, before = self.last.get(name) or self.newest_whole or (None, [])
            kept = min(common_prefix(before, path), sample.start)
            if name not in self.last and 2 * kept < sample.start:
                base = None            # otherwise each episode would build on all before it
                kept = 0
            routes = None if sample.routes is None else sample.routes.numpy().astype(np.int32).tobytes()
            done = self.base.execute(
                "INSERT INTO completion"
                "(name, turn, base, kept, context, ids, logprobs, versions, routes, request, said) "
                "VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [name, sample.turn, base, kept, packed(path[kept:sample.start], np.int32),
                 packed(path[sample.start:], np.int32), packed(sample.logprobs, np.float64),
                 packed(sample.versions, np.int64), routes, request, json.dumps(words)])
            if base is None:
                self.newest_whole = done.lastrowid, path
            self.last[name] = done.lastrowid, path
        self.base.commit()

    def drop(self, name, n_rows):
        """An answer that nobody has heard was not given. Its rows stay, nameless: others' contexts may build on them.
        """
        self.base.execute(
            "UPDATE completion SET name = NULL WHERE id IN ("
            "SELECT id FROM completion WHERE name = ? ORDER BY id DESC LIMIT ?)", [name, n_rows])
        self.base.commit()

    def path_of(self, number, known):
        """Tokens of a completion, its context before them. known: the same of others, by id."""
        parts = []
        end = sys.maxsize              # tokens that are wanted of the one at hand
        while number is not None and number not in known:
            number, kept, context, ids = self.base.execute(
                "SELECT base, kept, context, ids FROM completion WHERE id = ?", [number]).fetchone()
            own = unpacked(context, np.int32) + unpacked(ids, np.int32)
            if end > kept:
                parts.append(own[:end - kept])
                end = kept
        parts.append(known.get(number, [])[:end])
        return [token for part in reversed(parts) for token in part]

    def read(self, task):
        """What is known of a group -> {name: (row of its episode as a dict, [(Sample, request, said), ...])}."""
        self.base.row_factory = sqlite3.Row
        found = {}
        for episode in self.base.execute("SELECT * FROM episode WHERE task = ?", [task]).fetchall():
            name = episode["name"]
            turns = []
            paths = {}
            for row in self.base.execute("SELECT * FROM completion WHERE name = ? ORDER BY id", [name]).fetchall():
                path = self.path_of(row["id"], paths)
                paths[row["id"]] = path
                ids = unpacked(row["ids"], np.int32)
                routes = None
                if row["routes"] is not None:
                    routes = torch.tensor(unpacked(row["routes"], np.int32)).view(len(path), -1)
                sample = Sample(
                    ids=torch.tensor(path), start=len(path) - len(ids),
                    logprobs=torch.tensor(unpacked(row["logprobs"], np.float64), dtype=torch.float64),
                    versions=torch.tensor(unpacked(row["versions"], np.int64)), routes=routes, turn=row["turn"])
                turns.append((sample, row["request"], json.loads(row["said"])))
                self.last[name] = row["id"], path
            found[name] = dict(episode), turns
        self.base.row_factory = None
        return found

    def close(self):
        self.base.commit()
        self.base.close()

def set_aside(folder):
    """The archive that another run has left in a folder is none of a new run's, which may be resumed with --serve."""
    path = os.path.join(folder, ARCHIVE)
    if os.path.exists(path):
        Archive(path).close()          # what a killed run has left beside it goes into it
        os.replace(path, path + ".old")

def packed(numbers, kind):
    return np.asarray(numbers, kind).tobytes()

def unpacked(raw, kind):
    return np.frombuffer(raw, kind).tolist()

# ---- the door: who answers -----------------------------------------------------------------------------

class Sampler(Engine):
    """sample.py's engine. Its rows are completions of episodes, and outlive a change of weights: they go on from the
    tokens that they have, with keys and values that the new weights compute."""

    def __init__(self, gateway):
        super().__init__(gateway.model, gateway.tokenizer, seed=gateway.args.seed)
        self.stops = gateway.stops
        self.version = 0
        if gateway.args.replay:
            self.record = pack_routes
        self.renew_prefixes()

    def renew_prefixes(self):
        """A prefix cache without anything of the weights before."""
        self.prefixes = None
        if self.record is None:        # what is in the cache has no routes
            self.prefixes = make_prefixes(self.model)
        if self.prefixes is not None:
            self.prefixes.L = round_up(PREFIX_BLOCK, self.model.cfg.index_block_size)

    def renew(self, version):
        """The weights have changed: they are the policy `version` now."""
        self.version = version
        self.renew_prefixes()
        alone = []
        for batch in self.batches:
            batch.steps.close()
            for turn in batch.requests:
                for row in turn.rows:
                    if row.finish is None:
                        prompt = Prompt(turn.context + row.ids)
                        alone.append(replace(turn, n=1, rows=[row], prompts=[prompt]))
        self.batches = form_batches(alone, self)

    def gather_s(self):
        """While completions are drawn, which are short as a rule, newcomers wait for their end: all are drawn as one
        batch then."""
        return GATHER_RUNNING_S if self.batches else super().gather_s()

    def write_row(self, turn, index, prompt):
        """A player of the loop: one completion. It ends with a stop of the task, with one of the request, or at its
        length."""
        row = turn.rows[index]
        stream = Stream(turn.stops)
        for token in row.ids:          # it goes on after a change of weights
            stream.feed(self.tokenizer.decode_bytes([token]))
        kept = 0
        feed = prompt.ids
        while row.finish is None:
            token, logprob, notes, *more = yield kept, feed
            if turn.client.gone:
                return
            self.n_tokens += 1
            kept += len(feed)
            feed = [token]
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.versions.append(self.version)
            row.notes = notes

            raw = self.tokenizer.decode_bytes([token])
            if turn.has_logprobs:
                best = more[0] if more else []
                best = [(self.tokenizer.decode_bytes([int(one)]), score) for one, score in best]
                row.scores.append(Score(raw, logprob, best, len(stream.text)))
            row.text += stream.feed(raw)
            if stream.done or any(stop in stream.text for stop in self.stops):
                row.finish = "stop"
            elif len(row.ids) == turn.max_new_tokens:
                row.finish = "length"
            if row.finish:
                row.text += stream.feed(b"", final=True)
            row.shown = stream.shown
            if turn.grows and not row.finish and len(row.text) > row.n_chars:
                turn.client.tell(row.news())

    def refuse(self, turn, status, reason):
        super().refuse(turn, status, reason)
        turn.was_refused.append(reason)

class Lesson:
    """A teacher who answers an agent in the policy's place, in the agent's own contexts. It goes by what the task's
    tool says, whatever the agent makes of it."""

    def __init__(self, task, rng, noise):
        """noise: share of a call's characters that is wrong."""
        self.task = task
        self.rng = rng
        self.noise = noise
        self.messages = [dict(role="user", content=task.prompt)]
        self.earlier = self.messages   # before its last text

    def say(self):
        self.earlier = self.messages
        text = misspell(self.task.expert(self.messages), self.task, self.rng, self.noise)
        if text == "D]" and self.task.cap < math.inf:  # see Task.agent
            prompt, *rest = self.messages
            self.messages = [prompt, *rest[-1:]]
            return text
        observation = self.task.tool(text)
        reply = dict(role="tool", content=f"={observation or '?;'}")
        self.messages = [*self.messages, dict(role="assistant", content=text), reply]
        return text

    def forget(self):
        """Nobody has heard its last text: it says that again."""
        self.messages = self.earlier

class Served(Gateway):
    """Agents of other processes, in real seconds, on loopback. See the sections above for what they send."""

    def __init__(self, model, args, queue, folder=None):
        """folder: of the run, for its archive; None: it is in memory."""
        super().__init__(model, args, queue)
        self.archive = Archive(folder and os.path.join(folder, ARCHIVE))
        self.token = args.token or self.archive.get("key") or os.urandom(16).hex()
        self.open = {}                 # name of an episode, "group.row" -> it, until its end
        self.claims = {}               # name -> Claim, of those that are played
        self.reasons = {}              # name -> why it is over
        self.rules = [read_rule(text) for text in args.tool] or CALL_RULES
        self.claimers = []             # (client, until): who waits for an episode
        self.under_way = []            # Turns that are being answered
        self.lessons = None            # Trajectories that a teacher has played; None: the policy answers
        self.n_lessons = 0             # that were claimed
        self.noise = wrong_share(args) if args.teach else 0.0
        self.n_turns = 0               # that the policy was asked for
        self.n_context = 0             # tokens of their contexts
        self.n_paths = 0               # turns whose context does not begin with the episode's last turn
        self.n_paths_told = 0          # ... when a step's line said so
        self.asked = SimpleQueue()     # (path, episode's name in it, raw body, client)
        self.is_over = False
        self.told_at = 0.0             # when the run last said what it waits for
        self.most_body = max(MAX_BODY, 16 * model.cfg.max_seq_len)
        self.workshop = None           # Claim of the session at the judge
        self.n_workshops = 0           # in this process
        self.worker = ThreadPoolExecutor(1)  # its tools run there
        self.isolation = []            # what of its runs can be shut in
        if args.task == "evolve":
            self.isolation = find_isolation()
            print(f"judge   | {isolation_words(self.isolation)}", flush=True)
        self.sampler = Sampler(self)
        self.door = Door(args.serve)
        self.archive.put("key", self.token)
        self.door.open(EpisodeProtocol(self).app())

    def close(self):
        """Accept no more requests; clients that still wait for an answer get a refusal."""
        self.is_over = True
        waiting = [turn.client for turn in self.under_way] + [client for client, _ in self.claimers]
        with contextlib.suppress(Empty):
            while True:
                *_, client = self.asked.get_nowait()
                waiting.append(client)
        for client in waiting:
            client.tell(Refused(503, "the run is over"))
        for batch in self.sampler.batches:
            batch.steps.close()        # or torch would stop the process as it ends, with a row half drawn
        self.sampler.batches = []
        if self.workshop is not None:
            self.workshop.task.halt()
        self.worker.shutdown()
        if self.workshop is not None:
            self.workshop.task.finish()
        self.door.close()
        self.archive.close()

    # what the event loop calls

    def keys_of(self, path):
        """The run's key opens every path, an episode's own key the URL of that episode."""
        name = re.match("/s/([^/]+)/v1/", path)
        return [self.token, self.key_of(name[1])] if name else [self.token]

    def key_of(self, name):
        return hmac.new(self.token.encode(), name.encode(), "sha256").hexdigest()[:32]

    def put(self, path, name, raw, client):
        """A request waits here for the run's thread, which tells the client a dict, a Turn and its pieces, or a
        Refused."""
        if self.asked.qsize() >= MOST_WAITING:  # no 429: smolagents would sleep for a minute
            raise Refused(503, f"{MOST_WAITING} requests wait already")
        self.asked.put((path, name, raw, client))
        if self.is_over:
            raise Refused(503, "the run is over")

    def speak(self, tokenizer):
        super().speak(tokenizer)
        self.sampler.tokenizer = tokenizer

    # groups and episodes

    def trained(self, tasks, step):
        self.archive.trained(tasks, step)

    def step_note(self):
        """How often an agent's context did not go on from its last turn, since the last step."""
        new = self.n_paths - self.n_paths_told
        self.n_paths_told = self.n_paths
        return f" | {new} new paths" if new else ""

    def counts(self):
        """Since the start of this process: turns that the policy answered, those that began a new path, and tokens of
        their contexts, all of them and those from the prefix cache."""
        return dict(turns=self.n_turns, new_paths=self.n_paths, context_tokens=self.n_context,
                    cached_tokens=self.sampler.n_cached)

    def start(self, tasks, version):
        """Open the episodes of these groups: from now on they can be claimed, and the policy `version` plays. What an
        earlier process has kept of them is taken from the archive."""
        if version != self.sampler.version:
            self.sampler.renew(version)
        for task in tasks:
            if task not in self.queue.batch:
                self.queue.due[task] = math.inf  # its deadline counts from the first claim
            self.pool[task] = [Trajectory(task) for _ in range(self.args.rollouts)]
            known = self.archive.read(task)
            for row, episode in enumerate(self.pool[task]):
                name = f"{task}.{row}"
                self.open[name] = episode
                if name in known:
                    self.recover(name, episode, *known[name])
                if name in self.open and task in self.queue.batch:
                    self.leave_out(name)
        self.close_groups()

    def recover(self, name, episode, fields, turns):
        """An episode of an earlier process: its turns, and its end, or the agent that may still play it.

        fields  of its row in the archive
        turns   [(Sample, the request's digest, what was said)], see Archive.read
        """
        claim = self.begin(name, episode, make_task(self.args, episode.task))
        for sample, digest, said in turns:
            ids = sample.ids[sample.start:].tolist()
            episode.samples.append(sample)
            row = Row(0, ids, sample.logprobs.tolist(), **said)
            for key in {self.tokenizer.decode(ids), *row.keys()}:
                episode.said.setdefault(key, []).append(ids)
            if claim.last is None or (claim.last.number, claim.last.digest) != (sample.turn, digest):
                context = sample.ids[:sample.start].tolist()
                claim.last = Answer(sample.turn, digest, context, [], None, name=os.urandom(12).hex())
            row.index = len(claim.last.rows)
            claim.last.rows.append(row)
            claim.n_turns = sample.turn + 1
        if fields["rewards"] is not None:
            episode.finish(json.loads(fields["rewards"]), bool(fields["success"]), fields["seconds"])
            self.end(name, "its end was reported")

    def begin(self, name, episode, task, lesson=None):
        """An agent has claimed an episode -> its Claim. With the first one of a group the group's deadline begins."""
        claim = Claim(name, episode, task, began=self.now, heard=self.now, lesson=lesson)
        self.claims[name] = claim
        if lesson is None and self.queue.due.get(episode.task) == math.inf:
            self.queue.due[episode.task] = self.now + self.queue.deadline
        return claim

    def end(self, name, reason):
        """An episode is over. Who asks for it is told the reason."""
        self.claims.pop(name, None)
        self.open.pop(name, None)
        self.reasons[name] = reason
        while len(self.reasons) > MOST_REASONS:
            self.reasons.pop(next(iter(self.reasons)))

    def close_groups(self):
        """Groups of which no episode is open are over."""
        still_open = {episode.task for episode in self.open.values()}
        for task in self.queue.due.keys() - still_open:
            self.queue.finish(task)

    def end_late(self):
        """Take back what agents have left alone, and end groups past their deadline: episodes that were played have
        failed, those that nobody has claimed are no part of the group."""
        busy = {turn.claim.name for turn in self.under_way}
        for name, claim in [*self.claims.items()]:
            silent = self.now - claim.heard
            if claim is not self.workshop and name not in busy and silent > self.args.silence:
                self.take_back(claim, f"its agent said nothing for {silent:.0f} s (--silence)")

        for name, episode in [*self.open.items()]:
            if self.queue.due[episode.task] > self.now:
                continue
            if name in self.claims:
                self.fail(self.claims[name], f"its group was late (--deadline {self.queue.deadline:g})")
            else:
                self.leave_out(name)
        self.close_groups()

    def leave_out(self, name):
        """An episode that nobody plays at its group's deadline is no part of the group."""
        task = self.open[name].task
        self.pool[task] = [episode for episode in self.pool[task] if episode is not self.open[name]]
        self.end(name, "its group was late before it was claimed")

    def take_back(self, claim, reason):
        """The agent is gone: its episode has failed, with its turns. One without a turn waits for another agent."""
        if claim.lesson or claim.episode.samples:
            self.fail(claim, reason)
            return
        del self.claims[claim.name]
        self.archive.release(claim.name)
        self.reasons[claim.name] = reason
        task = claim.episode.task
        idle = [name for name, episode in self.open.items() if episode.task == task and name not in self.claims]
        if len(idle) == len(self.pool[task]):  # as before its first claim
            self.queue.due[task] = math.inf
        print(f"gateway | {claim.name} is free again: {reason}", flush=True)

    def fail(self, claim, reason):
        """An episode that has no other end."""
        claim.episode.fail()
        self.end(claim.name, reason)
        if claim.is_of_group:
            self.archive.finish(claim.name, claim.episode)
            n_turns = claim.n_turns
            print(f"gateway | {claim.name} has failed after {n_turns} turns: {reason}", flush=True)

    def forget_unheard(self, claim):
        """The agent goes on, and its last answer never reached it: that turn was not taken."""
        last = claim.last
        if last is None or last.client is None or last.client.was_answered or not last.client.gone:
            return
        episode = claim.episode
        n_rows = len(last.rows)
        del episode.samples[-n_rows:]
        for row in last.rows:
            for key in {self.tokenizer.decode(row.ids), *row.keys()}:
                episode.said[key].pop()
        if claim.is_of_group:
            self.archive.drop(claim.name, n_rows)
        elif claim.lesson:
            claim.lesson.forget()
        claim.last = last.before
        claim.n_turns = episode.samples[-1].turn + 1 if episode.samples else 0

    # requests

    def answer(self, path, name, raw, client):
        """One request, in the run's thread. Whatever is wrong with it is told to the client."""
        if client.gone:                # one that gave up during a training step asks again, or does not
            return
        try:
            body = read_object(raw)
            if path == "/v1/tasks" and body.get("environment") is not None:
                client.tell(self.open_workshop(body["environment"], body.get("flags") or []))
                return
            if path == "/v1/tasks":
                wait = read_number(body, "wait", 0, 0, CLAIM_WAIT, float)
                self.claimers.append((client, self.now + wait))
                self.offer()
                return
            claim = self.find_claim(name or str(body.get(KEY_FIELD.get(path))))
            claim.heard = self.now
            if path.endswith("/finish"):
                client.tell(self.finish_episode(claim, body))
            elif path.endswith("/tools"):
                self.use_tool(claim, body, client)
            else:
                self.take_turn(claim, body, raw, path.endswith("/responses"), client)
        except Refused as error:
            client.tell(error)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else repr(error)
            client.tell(Refused(400, reason[:300]))
        except Exception as error:     # its turn is lost, the run goes on
            print(f"gateway | {path}: {error!r:.200}", flush=True)
            client.tell(Refused(500, f"{error!r:.200}"))

    def find_claim(self, name):
        if name in self.claims:
            return self.claims[name]
        if name in self.open:
            why = f" any more: {self.reasons[name]}" if name in self.reasons else ""
            raise Refused(409, f"task {name:.60} is not claimed{why}; POST /v1/tasks claims one")
        reason = self.reasons.get(name)
        if reason is None:
            reason = "there is no such episode; POST /v1/tasks claims one, whose base_url is served"
        raise Refused(404, f"task {name:.60}: {reason}")

    def offer(self):
        """Give episodes that nobody plays to those who wait for one, the oldest group's first."""
        waiting = []
        for client, until in self.claimers:
            if client.gone:
                continue
            name = self.next_episode()
            if name is not None:
                client.tell(self.introduce(name))
            elif self.now >= until:
                client.tell(Refused(409, "no task is waiting"))
            else:
                waiting.append((client, until))
        self.claimers = waiting

    def next_episode(self):
        """Claim an episode -> its name, None if there is none."""
        if self.lessons is not None:
            name = f"lesson-{self.n_lessons}"
            task = make_task(self.args, self.n_lessons, LESSONS)
            lesson = Lesson(task, Random(f"{self.args.seed} {name}"), self.noise)
            self.begin(name, Trajectory(-1), task, lesson)
            self.n_lessons += 1
            return name
        for name, episode in self.open.items():
            if name not in self.claims:
                self.begin(name, episode, make_task(self.args, episode.task))
                self.archive.claim(name, episode.task)
                return name
        return None

    def introduce(self, name):
        """What a launcher hears of an episode it has claimed."""
        task = self.claims[name].task
        more = {}
        if self.claims[name].is_of_group:
            group, _, row = name.partition(".")
            more = dict(group=int(group), row=int(row))
        if self.claims[name].has_tools:
            more["tools"] = list(task.tools)
        return dict(
            task=name, **more, messages=[dict(role="user", content=task.prompt)],
            answer=None if task.answer is None else str(task.answer),
            base_url=f"http://127.0.0.1:{self.door.address[1]}/s/{name}/v1", api_key=self.key_of(name))

    def finish_episode(self, claim, body):
        """The end of an episode, as its client says it: a reward for each of its turns, or one for all."""
        if claim.has_tools:
            raise Refused(403, f"task {claim.name}: its environment says the reward; its tools end it")
        self.forget_unheard(claim)
        if "rewards" in body:
            rewards = body["rewards"]
            if not isinstance(rewards, list):
                raise ValueError(f"rewards {rewards!r:.60}: a list is needed, a number for each turn")
            rewards = [float(reward) for reward in rewards]
            if len(rewards) != claim.n_turns:
                raise ValueError(f"rewards {rewards}: the episode has {claim.n_turns} turns"[:200])
        else:
            reward = read_number(body, "reward", None, -MOST_REWARD, MOST_REWARD, float)
            if reward is None:
                raise Refused(400, "reward, a number, is needed, or rewards, one for each turn")
            rewards = [0.0] * max(1, claim.n_turns)
            rewards[-1] = reward
        if not all(abs(reward) <= MOST_REWARD for reward in rewards):
            raise ValueError(f"a reward is a number of at most {MOST_REWARD:g}: {rewards}"[:200])
        success = read_flag(body, "success")
        if body.get("success") is None:
            success = sum(rewards) > 0
        self.keep_end(claim, rewards, success, self.now - claim.began)
        return dict(turns=claim.n_turns)

    def keep_end(self, claim, rewards, success, seconds):
        """An episode is over, and was worth this."""
        claim.episode.finish(rewards, success, seconds)
        if claim.is_of_group:
            self.archive.finish(claim.name, claim.episode)
        elif claim.lesson and self.lessons is not None:
            if claim.episode.samples:  # otherwise there is nothing to imitate
                self.lessons.append(claim.episode)
        self.end(claim.name, "its end was reported")
        self.close_groups()

    # tools: what they say is the environment's, not the agent's

    def open_workshop(self, environment, flags):
        """Begin a session of the environment train.py -> what its launcher hears. flags: of the base, which may be a
        run that needs repair."""
        if environment != "train.py" or self.args.task != "evolve":
            raise Refused(404, f"environment {environment!r:.40}: there is train.py, with --task evolve")
        if self.workshop is not None:
            raise Refused(409, "a session of train.py is under way, and there is one at a time")
        try:
            check_flags(flags)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        try:
            judge = Judge(self.isolation, SystemRandom())
        except ValueError as error:    # nothing can be shut in here
            raise Refused(503, str(error)) from None
        journal = Journal(os.path.join(self.args.out, JOURNAL))
        self.n_workshops += 1
        name = f"engineer-{self.n_workshops}"
        self.workshop = self.begin(name, Trajectory(-1), Workshop(journal, judge, SystemRandom(), flags=flags))
        print(f"judge   | {name} is at work on train.py; {journal.path} tells it", flush=True)
        return dict(self.introduce(name), journal=os.path.abspath(journal.path))

    def use_tool(self, claim, body, client):
        """Call a tool of an episode's environment. Those of a session at the judge may take minutes, in a thread."""
        if not claim.has_tools:
            raise Refused(404, f"task {claim.name}: this task has no tools")
        name = body.get("name")
        arguments = body.get("arguments") or {}
        if isinstance(arguments, str):  # as a model writes them
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if claim is self.workshop:
            claim.calls.append(self.worker.submit(self.tell_call, claim.task, name, arguments, client))
            return
        self.forget_unheard(claim)
        self.tell_call(claim.task, name, arguments, client)
        if claim.task.over:
            rewards, success, seconds = claim.task.finish()
            n_turns = max(1, claim.n_turns)
            if len(rewards) != n_turns:  # it knows calls, not turns
                rewards = [0.0] * (n_turns - 1) + [sum(rewards)]
            self.keep_end(claim, rewards, success, seconds)

    def tell_call(self, environment, name, arguments, client):
        """Call a tool, and tell the client what it says; who has left meanwhile hears it with the next call."""
        if not isinstance(arguments, dict):
            client.tell(Refused(400, f"arguments {arguments!r:.60}: a JSON object is needed"))
            return
        try:
            content = environment.call(name, arguments)
        except Exception as error:     # the run goes on
            print(f"gateway | tool {name!r:.40}: {error!r:.200}", flush=True)
            client.tell(Refused(500, f"{error!r:.200}"))
            return
        missed = vars(environment).pop("missed", "")
        if missed:
            content = f"Before this, unheard: {missed}\n{content}"
        if client.gone:
            environment.missed = content
            return
        client.tell(dict(content=content, over=environment.over))

    def look_after_workshop(self):
        """End a session at the judge once it is over, or once its agent has left it alone."""
        claim = self.workshop
        claim.calls = [call for call in claim.calls if not call.done()]
        if claim.calls:
            claim.heard = self.now
            return
        silent = self.now - claim.heard
        if not claim.task.over and silent <= ENGINEER_SILENCE:
            return
        rewards, success, seconds = claim.task.finish()
        self.keep_end(claim, rewards, success, seconds)
        self.reasons[claim.name] = "its session is over"
        self.workshop = None
        print(f"judge   | {claim.name} is over: {sum(rewards):+.4f} bits a byte in {seconds:.0f} s", flush=True)

    def take_turn(self, claim, body, raw, is_response, client):
        """A request for completions: who asks again for what it has not heard gets the same answer; otherwise they are
        sampled, or said by the teacher."""
        digest = hashlib.sha256(raw).hexdigest()
        last = claim.last
        is_again = last is not None and last.digest == digest and not (last.client and last.client.was_answered)
        if not is_again:
            self.forget_unheard(claim)
        turn = self.read_turn(claim, body, is_response)
        turn.digest = digest
        turn.client = client
        client.most = UNREAD * turn.n
        if is_again:
            last.client = client
            turn.name = last.name
            newest = last.rows[-turn.n:]  # read from the archive, they may be those of several requests
            turn.rows = [replace(row, index=index, n_chars=0, n_scores=0) for index, row in enumerate(newest)]
            self.keep_response(turn)
            client.tell(turn)
            tell_rows(turn)
            return
        if claim.n_turns >= self.args.max_turns:
            raise Refused(403, f"task {claim.name} has had its {claim.n_turns} turns (--max-turns); "
                               "POST /v1/finish ends it")
        most = MOST_CHOICES * self.args.max_turns
        if len(claim.episode.samples) >= most:  # turns do not count, where one context comes again and again
            raise Refused(403, f"task {claim.name} has had {most} completions, {MOST_CHOICES} for each of its turns "
                               "(--max-turns); POST /v1/finish ends it")

        self.count_path(claim, turn.context)
        client.tell(turn)
        if claim.lesson:
            text = claim.lesson.say()
            ids = self.tokenizer.encode(text)
            for row in turn.rows:
                row.ids = ids
                row.logprobs = [math.nan] * len(ids)
                row.versions = [0] * len(ids)
                row.text = text
                row.finish = "stop"
            self.end_turn(turn)
            return
        turn.came = time.monotonic()
        self.n_turns += 1
        self.n_context += len(turn.context)
        self.under_way.append(turn)
        self.sampler.waiting.append(turn)

    def read_turn(self, claim, body, is_response):
        """The body of a request -> Turn. Refused, ValueError: it cannot be served; one message for each limit."""
        limit = self.max_new
        n = read_number(body, "n", 1, 1)
        if n > MOST_CHOICES:
            raise Refused(400, f"n {n}: a turn has {MOST_CHOICES} completions at most")
        if is_response:
            before = body.get("previous_response_id")
            if before is not None and before not in claim.messages:
                raise Refused(404, f"previous_response_id {before!r:.60}: this episode has no such response since the "
                                   "run was started", "previous_response_not_found")
            messages = chat_messages(body, claim.messages.get(before, []))
            has_logprobs, n_best = False, 0
        else:
            messages = body.get("messages")
            has_logprobs, n_best = read_logprobs(body, is_chat=True)
        if not isinstance(messages, list):
            raise ValueError(f"messages {messages!r:.60}: a list is needed")

        # its context, in tokens
        tools = read_functions(body)
        context = self.context(claim.episode, messages, body.get("tools") if tools else None, claim.task)
        size = self.model.cfg.max_seq_len
        if not context:
            raise ValueError("0 tokens of context: the messages say nothing")
        if len(context) > size - limit:
            # the first words are OpenAI's: by them litellm knows what is wrong, and does not try again
            reason = (f"This model's maximum context length is {size} tokens (--context), {limit} of them for an "
                      f"answer (--max-new-tokens). However, your messages resulted in {len(context)} tokens")
            raise Refused(400, reason, "context_length_exceeded")

        options = body.get("stream_options")
        lengths = [read_number(body, name, limit, 1)
                   for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
        return Turn(
            is_chat=True, prompts=[Prompt(context)], n=n, max_new_tokens=min(limit, *lengths),
            temperature=1.0, top_p=1.0, top_k=0, seed=None, stops=read_stops(body),
            has_logprobs=has_logprobs, n_best=min(n_best, self.model.cfg.vocab_size),
            is_stream=read_flag(body, "stream"),
            has_usage=read_flag(options if isinstance(options, dict) else {}, "include_usage"),
            model=str(body.get("model") or MODEL_ID)[:200], warnings=list_warnings(body, limit),
            claim=claim, messages=messages, context=context, tools=tools, is_response=is_response, request=body,
            name=os.urandom(12).hex(), rows=[Row(index) for index in range(n)])

    def count_path(self, claim, context):
        """A context that does not go on from the last turn, or repeat it, begins a new path of the prefix tree."""
        last = claim.last
        if last is None:
            return
        known = [sample.ids.tolist() for sample in claim.episode.samples if sample.turn == last.number]
        if context != last.context and not any(context[:len(path)] == path for path in known):
            self.n_paths += 1

    def end_turn(self, turn):
        """All rows of a turn have ended: it is recorded, written to disk, and then told."""
        claim = turn.claim
        if self.claims.get(claim.name) is not claim:
            turn.client.tell(Refused(404, f"task {claim.name}: {self.reasons.get(claim.name)}"))
            return
        claim.heard = self.now
        if turn.client.gone:           # it was not taken
            return
        number = claim.n_turns
        if claim.last is not None and claim.last.context == turn.context:
            number = claim.last.number  # the same context again: another choice of the same turn

        samples = []
        for row in turn.rows:
            if turn.tools:
                row.text, calls = split_calls(row.text, turn.tools, self.rules)
                row.calls = [(f"call_{os.urandom(9).hex()}", *call) for call in calls]
                row.finish = "tool_calls" if calls else row.finish
            routes = None
            if row.notes:
                routes = torch.from_numpy(np.stack(row.notes + row.notes[-1:]))
            self.record(
                claim.episode, turn.context, row.ids, row.logprobs, row.versions, routes, number, row.keys())
            samples.append(claim.episode.samples[-1])
        if claim.is_of_group:
            self.archive.add(claim.name, samples, turn.digest, [row.said() for row in turn.rows])
        claim.n_turns = number + 1
        if claim.last is not None:     # it has been heard
            claim.last.before = None
        claim.last = Answer(number, turn.digest, turn.context, turn.rows, turn.client, claim.last, turn.name)
        self.keep_response(turn)
        tell_rows(turn)

    def keep_response(self, turn):
        """A later request may name a response, in place of the messages until then."""
        if turn.is_response:
            row = turn.rows[0]
            said = dict(role="assistant", content=row.text, tool_calls=[call_object(*call) for call in row.calls])
            turn.claim.messages[f"resp_{turn.name}"] = [*turn.messages, said]

    # time

    def serve(self, until, stop, seconds):
        """Answer clients until until() holds, or there is something in `stop`, or for so many seconds."""
        began = time.monotonic() - self.now
        last = self.now + seconds
        sampler = self.sampler
        self.told_at = self.now
        while not until() and not stop and self.now < last:
            self.now = time.monotonic() - began
            # what waits now, and not what comes meanwhile: a client that asks all the time holds up no other
            with contextlib.suppress(Empty):
                is_busy = sampler.batches or sampler.waiting
                self.answer(*self.asked.get(timeout=0 if is_busy else LOOK_S))
                for _ in range(self.asked.qsize()):
                    self.answer(*self.asked.get_nowait())

            # one forward of each batch
            if sampler.waiting:
                sampler.admit()
            sampler.batches = [batch for batch in sampler.batches if batch.advance()]
            for turn in self.under_way:
                if not turn.was_refused and all(row.finish for row in turn.rows):
                    self.end_turn(turn)
            self.under_way = [turn for turn in self.under_way if not turn.is_over]
            self.offer()
            self.end_late()
            if self.workshop is not None:
                self.look_after_workshop()
            if self.now - self.told_at > TELL_EVERY:
                self.told_at = self.now
                print(self.waits_for(), flush=True)

    def wait(self, stop, seconds):
        """Answer clients until a batch of groups is over, for at most so many seconds."""
        self.serve(lambda: self.queue.take(self.args.groups, self.now), stop, seconds)

    def teach(self, n_episodes, stop, seconds):
        """Let the teacher answer until so many episodes are over -> these."""
        self.lessons = self.lessons or []
        self.serve(lambda: len(self.lessons) >= n_episodes, stop, seconds)
        taught = self.lessons
        self.lessons = []
        return taught

    def waits_for(self):
        """What the trainer stands still for, in one line."""
        if self.lessons is not None:
            line = f"wait    | for lessons: {len(self.lessons)} of {LESSON_TASKS} episodes; {len(self.claims)} at work"
            return line if self.claims else line + NO_AGENT
        ready = len(self.queue.batch)
        head = min(self.queue.born.keys() - self.queue.batch, default=self.queue.next)
        within = [name for name, episode in self.open.items() if episode.task < head + self.queue.window]
        at_work = [name for name in within if name in self.claims]
        line = (f"wait    | {ready} of {self.args.groups} groups are there; of the next {len(within)} episodes "
                f"{len(at_work)} are at work, {len(within) - len(at_work)} not claimed")
        if at_work:
            oldest = min(at_work, key=lambda name: self.claims[name].heard)
            silent = self.now - self.claims[oldest].heard
            line += f"; {oldest} has said nothing for {silent:.0f} of {self.args.silence:g} s (--silence)"
        return line if self.claims else line + NO_AGENT

# ---- the judge: an engineer at work on a copy of this repository ---------------------------------------
# --task evolve has a second environment: the whole of train.py. An agent reads its code and its logs, changes flags or
# patches a copy, and runs it for a fixed time. What lowers val_bpb is kept, and the next change is measured against it.
# An agent that is rewarded for a number finds every way to it, so the judge believes nothing but weights:
#
#     copy      the files that train.py needs, written anew for each run: nothing is carried over but text and flags
#     sandbox   the copy runs in namespaces of its own, with a short list of folders that it can see, and limits
#     text      files of the standard library, drawn in secret, are held out: for the copy they are there, and empty
#     hand-in   out/ckpt.pt. The unmodified repository loads it, weights_only, and evaluates it on the held-out text
#     seeds     are the judge's. A gain counts if each seed has it, if it is larger than the noise of seeds, and if a
#               fresh seed has it, too, with the base run once more beside it: by luck alone it would not
#     time      the clock and the CPU seconds of a whole run, from its start to its last process. What an unedited run
#               makes of more time is measured, and is taken off the gain of a run that takes more
#
# A sandbox is no virtual machine: it shares the kernel. What it cannot shut in here it says, see find_isolation. And a
# large model may know the library by heart: what it writes of it into the copy stands in the journal, for a person.

COPIED = ("train.py", "sample.py", "model.py", "msa.py", "moe.py")  # what train.py imports
HELD_BYTES = 2 ** 20                   # of text that is held out: more than can be carried into the copy,
SCORED_BYTES = 2 ** 18                 # and so many of them, drawn in secret, are what a hand-in is evaluated on
HELD_FILE = 48 * 1024                  # bytes of one of its files, at most: it has a dozen
OWN_BYTES = 2 ** 16                    # of text that the copy validates on, for its own figures
# parts of the library whose text other packages carry a second time: setuptools, pip, backports
ELSEWHERE = ("distutils", "tomllib", "zoneinfo")
JOURNAL = "journal.md"                 # in --out
ENGINEER_SILENCE = 900.0               # seconds without a call after which a session is over
ENGINEER_RUNS = 8                      # of a session
ENGINEER_MINUTES = 0.5                 # of training, in one run
ENGINEER_SEEDS = 2                     # that each change is run with, before it is confirmed
BASE_SEEDS = 4                         # that the unedited copy is run with: they tell the noise
STUDENT = 2.35                         # t of 95 %, one-sided, for a spread that four runs tell
LEAST_GAIN = 0.01                      # bits a byte: four runs may agree by chance
SLACK = (1.1, 2.0)                     # a change may take so many times the base's time, and so many seconds more
FIRST_SECONDS = 300.0                  # on top of --minutes, for a run whose usual time is not known yet
SCORE_SECONDS = 180.0                  # that the judge has for a hand-in
SCORE_TOKENS = 4096                    # that it evaluates at a time
HAND_IN_BYTES = 2 ** 28                # of a checkpoint
SOURCE_BYTES = 2 ** 14                 # that an agent may add to the copy: no room for weights, or much text, from
                                       # elsewhere: 256 KB of it are some 60 compressed
SHOWN_LINES = 200                      # of a file or a log, at once
SHOWN_CHARS = 240                      # of a line
JOURNAL_LINES = 5                      # of a run's output, in the journal
TAIL = 2 ** 16                         # bytes of a run's output that are kept
# flags that an agent may set; the others are the judge's, or lead out of the copy
ENGINEER_FLAGS = ("preset", "attn", "window", "sink", "mtp", "vocab-size", "seq-len", "batch-size", "accumulate",
                  "recompute", "lr", "bias-rate", "eval-every", "log-every")

class Environment:
    """What an agent works in by calling tools.

    tools   the functions it may call, as OpenAI's clients send them
    prompt  what it is told first
    over    whether there is nothing left to do
    answer  what a launcher may compare with: nothing
    """
    tools = ()
    prompt = ""
    over = False
    answer = None

    def result(self, text):
        """What a tool has said, as the policy reads it: see Task."""
        return text

    def call(self, name, arguments):
        """Use a tool -> what it says, a text. Whatever an agent sends, nothing is raised: the text says what is wrong.
        """
        raise NotImplementedError

    def finish(self):
        """-> rewards, a list; success; seconds."""
        raise NotImplementedError

def function_schema(name, what, **parameters):
    """A tool as OpenAI's clients send it. parameters: name -> (JSON type, what it is); all are required."""
    properties = {key: dict(type=kind, description=text) for key, (kind, text) in parameters.items()}
    for value in properties.values():
        if value["type"] == "array":
            value["items"] = dict(type="string")
    schema = dict(type="object", properties=properties, required=[*parameters])
    return dict(type="function", function=dict(name=name, description=what, parameters=schema))

# ---- the judge: a run shut in ------------------------------------------------------------------------
# Linux alone can do this, with util-linux: a process gets its own view of files, processes and network. Its root is a
# new one, in memory, into which the listed folders are mounted, read-only; it holds nothing else: no home, no
# repository, no other run. Where rl.py runs as root, the process is nobody; either way it has no capabilities, cannot
# get any, and so cannot change what is mounted.

PARTS = dict(                          # what is shut in -> unshare's options
    network=["--net"],
    processes=["--pid", "--ipc", "--fork", "--kill-child"],
    files=["--mount"])
NOBODY = 65534
UTIL_LINUX = ("unshare", "mount", "chroot", "setpriv", "prlimit", "env")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")  # folders that a run sees, beside Python's
WORK = "/judged/copy"                  # as its run sees it. No Python lies below /judged: it would be hidden
LOOK_EVERY = 0.1                       # seconds from one look at a run's processes to the next
BARRED = ("Read-only file system", "Network is unreachable", "Operation not permitted", "Permission denied")

@dataclass
class Limits:
    """What a run may take. One that takes more is killed, with all its processes."""
    seconds: float                     # of the clock
    cpu_seconds: float                 # of all its processes, those that have ended included
    memory: int = 4 * 2 ** 30          # bytes that its processes hold
    processes: int = 32
    disk: int = 2 ** 29                # bytes in its copy
    files: int = 2000                  # in its copy
    output: int = 2 ** 24              # bytes that it prints

@dataclass
class Ended:
    """A run that is over."""
    output: str                        # the last TAIL bytes that it printed
    code: int                          # exit status
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    killed: str | None = None          # why

def mount_lines(root, writable, readable, hidden, has_processes):
    """Lines of a shell that build the new root.

    root           an empty folder: the new root is mounted there
    writable       place in the new root -> folder that the run may write
    readable       place in the new root -> folder
    hidden         place in the new root -> file or folder that lies there instead
    has_processes  whether the run has process ids of its own
    """
    quote = shlex.quote
    here = os.readlink("/proc/self/ns/mnt")
    lines = [
        "set -e",
        # as root, in this process's own namespace, the lines below would hide and change the machine's files
        f'[ "$(readlink /proc/self/ns/mnt)" != {quote(here)} ] || exit 1',
        "mount --make-rprivate /",     # nothing that is mounted here is mounted elsewhere
        f"mount -t tmpfs -o mode=755,size=1m none {quote(root)}",
        f"cd {quote(root)}",
        "mkdir proc tmp dev",
        "mount -t tmpfs -o mode=1777,size=64m,nosuid,nodev none tmp"]  # first: what is read may lie in /tmp
    for place, path in {**readable, **writable}.items():
        lines.append(f"mkdir -p .{quote(place)}")
        lines.append(f"mount --rbind {quote(path)} .{quote(place)}")
    for place, path in hidden.items():
        lines.append(f"mount --bind {quote(path)} .{quote(place)}")
    shut = [place for place in readable if place not in writable]
    for place in [*shut, *mounts_below(readable), *hidden]:
        lines.append(f"mount -o remount,bind,ro,nosuid,nodev .{quote(place)}")
    for place in writable:
        lines.append(f"mount -o remount,bind,nosuid,nodev .{quote(place)}")
    for name in ("bin", "sbin", "lib", "lib64"):  # parts of /usr, where they are no folders of their own
        if os.path.islink(f"/{name}"):
            lines.append(f"ln -s {quote(os.readlink(f'/{name}'))} {name}")
    for name in ("null", "zero", "urandom"):
        lines.append(f": > dev/{name}; mount --bind /dev/{name} dev/{name}")
    if has_processes:                  # some containers forbid it: a run can do without
        lines.append("mount -t proc -o ro,nosuid,nodev,noexec none proc || true")
    lines.append("mount -o remount,bind,ro .")
    return lines

def mounts_below(readable):
    """readable: place -> folder -> the places of what is mounted below these folders: a mount each, which is made
    read-only each."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    for place, path in readable.items():
        found += [place + point.removeprefix(path) for point in points if point.startswith(path + "/")]
    return found

def shell_script(command, has_processes, **mounts):
    """What a shell in new namespaces does: build the new root, give up all rights, become the command. mounts: see
    mount_lines."""
    drop = []
    if os.geteuid() == 0:
        drop = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    inside = [
        "chroot", mounts["root"],
        "setpriv", *drop, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--pdeathsig=KILL",
        "prlimit", "--nproc=1024",
        "env", "-i", "-C", WORK, *variables(), *command]
    lines = mount_lines(**mounts, has_processes=has_processes)
    return "\n".join([*lines, f"exec {shlex.join(inside)}\n"])

def shut_in(command, parts):
    """A command -> the command that runs it in new namespaces, of these PARTS."""
    alone = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    options = [option for part in parts for option in PARTS[part]]
    return ["unshare", *alone, *options, *command]

def variables():
    """The environment variables of a run, NAME=value, all of them: no key, no token, no folder of the user's."""
    found = [f"HOME={WORK}", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "LANG=C.UTF-8", "OMP_NUM_THREADS=1",
             "NANO_MINIMAX_CACHE=/judged/cache", "PYTHONUNBUFFERED=1"]
    paths = [path for path in package_folders() if not path.startswith((sys.prefix, sys.base_prefix))]
    if paths:
        found.append(f"PYTHONPATH={':'.join(paths)}")
    return found

def visible_folders():
    """What a run can see, beside its copy: the system's programs and libraries, and this Python with its packages.
    -> place -> path."""
    wanted = [*SYSTEM, sys.prefix, sys.base_prefix]
    wanted += package_folders()
    found = {}
    for path in wanted:
        for place in (os.path.abspath(path), os.path.realpath(path)):
            if os.path.isdir(place) and not os.path.islink(place):
                found[place] = place
    # what lies in another of them is there already
    return {place: path for place, path in found.items()
            if not any(place.startswith(other + "/") for other in found)}

def package_folders():
    """Where Python looks for packages."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]

def find_isolation():
    """-> which of PARTS can be shut in here, found out by trying."""
    if not all(map(shutil.which, UTIL_LINUX)):
        return []
    found = []
    for part in PARTS:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(shut_in(["true"], [*found, part]), capture_output=True, timeout=20)
            if done.returncode == 0:
                found.append(part)
    if "files" in found and not can_mount(found):
        found.remove("files")
    return found

def can_mount(parts):
    """Whether a program runs in a root of its own."""
    folder = tempfile.mkdtemp(prefix="judge-")
    try:
        ended = Sandbox(folder, parts).run([sys.executable, "-c", "print('in')"], Limits(20.0, 20.0))
        return ended.output == "in\n"
    finally:
        remove_folder(folder)

def isolation_words(parts):
    """What find_isolation found, in words."""
    missing = [part for part in PARTS if part not in parts]
    words = f"of a run of train.py are shut in: {', '.join(parts) or 'none'}"
    if missing:
        words += f"; NOT shut in, as this system does not allow it: {', '.join(missing)}"
    return words

class Sandbox:
    """Runs programs that nothing good is known of."""

    def __init__(self, folder, parts, readable=None, hidden=None):
        """folder: of the sandbox's own; parts: of PARTS, files among them; readable, hidden: see mount_lines."""
        if "files" not in parts:
            raise ValueError("a sandbox without a view of files of its own would mount over this machine's")
        self.folder = folder
        self.parts = parts
        self.readable = visible_folders() if readable is None else readable
        self.hidden = hidden or {}
        self.stop = threading.Event()  # whatever runs is killed
        self.root = os.path.join(folder, "root")
        os.makedirs(self.root, exist_ok=True)

    def new_work(self):
        """-> a new folder that a run may write."""
        work = tempfile.mkdtemp(prefix="work-", dir=self.folder)
        give_away(work)
        return work

    def run(self, command, limits, work=None, readable=(), writable=()):
        """Run a command until its end, or until it has taken more than its limits -> Ended.

        work                the folder where it begins, and which it may write; None: a new one
        readable, writable  more places, for this run
        """
        work = work or self.new_work()
        script = shell_script(
            command, "processes" in self.parts, root=self.root, hidden=self.hidden,
            writable={**dict(writable), WORK: work}, readable={**self.readable, **dict(readable)})
        path = os.path.join(self.folder, "script.sh")  # an argument could be too long
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(script)
        whole = [
            "prlimit", "--core=0", f"--fsize={limits.disk}", f"--data={limits.memory}",
            "setpriv", "--pdeathsig=KILL",
            *shut_in(["sh", path], self.parts)]
        began = time.monotonic()
        # a new session: Ctrl-C in the terminal is rl.py's alone
        process = subprocess.Popen(whole, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        output = Output(process.stdout)
        used = 0.0
        killed = None
        try:
            while process.poll() is None and not killed:
                found = processes_of(process.pid)
                used = max(used, sum(one.cpu_seconds for one in found))
                killed = self.why_kill(found, work, output, limits, time.monotonic() - began, used)
                if not killed:
                    time.sleep(LOOK_EVERY)
        finally:
            kill_all(process)
        output.join()
        return Ended(output.text(), process.returncode, time.monotonic() - began, used, killed)

    def why_kill(self, found, work, output, limits, seconds, cpu_seconds):
        """Why a run is over its limits, in words; None: it is not. found: its processes."""
        n_bytes, n_files = count_folder(work)
        memory = sum(one.memory for one in found)
        if self.stop.is_set():
            return "the session is over"
        if seconds > limits.seconds:
            return f"it took more than {limits.seconds:.0f} s"
        if cpu_seconds > limits.cpu_seconds:
            return f"its processes took more than {limits.cpu_seconds:.0f} s of CPU time"
        if len(found) > limits.processes:
            return f"it had more than {limits.processes} processes"
        if memory > limits.memory:
            return f"its processes held more than {limits.memory:,} bytes of memory"
        if n_bytes > limits.disk or n_files > limits.files:
            return f"it wrote more than {limits.disk:,} bytes or {limits.files:,} files"
        if output.n_bytes > limits.output:
            return f"it printed more than {limits.output:,} bytes"
        return None

class Output:
    """What a process prints: its end alone is kept, however much it is."""

    def __init__(self, pipe):
        self.n_bytes = 0
        self.last = b""
        self.pipe = pipe
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        with self.pipe:
            while piece := self.pipe.read1(2 ** 16):
                self.n_bytes += len(piece)
                self.last = (self.last + piece)[-TAIL:]

    def join(self):
        self.thread.join(5.0)          # a process that was not killed could hold the pipe open

    def text(self):
        return self.last.decode("utf-8", "replace")

@dataclass
class Process:
    """A process, as /proc tells."""
    pid: int
    memory: int                        # bytes that it holds
    cpu_seconds: float                 # its own, and those of its children that have ended

def processes_of(pid):
    """A process and all that descend from it -> [Process]. What ends meanwhile is left out."""
    page = os.sysconf("SC_PAGE_SIZE")
    tick = os.sysconf("SC_CLK_TCK")
    known = {}                         # pid -> Process
    children = {}                      # pid -> pids
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # behind the program's name, which may hold anything
            parent = int(fields[1])
            cpu_seconds = sum(map(int, fields[11:15])) / tick
            known[int(name)] = Process(int(name), int(fields[21]) * page, cpu_seconds)
            children.setdefault(parent, []).append(int(name))
    found = []
    waiting = [pid] if pid in known else []
    while waiting:
        one = waiting.pop()
        found.append(known[one])
        waiting += children.get(one, [])
    return found

def kill_all(process):
    """Kill a Popen and all that descends from it. The first process of a namespace takes all others with it."""
    if process.poll() is not None:     # its number may be another's by now
        return
    for one in reversed(processes_of(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    process.wait()

def count_folder(folder):
    """-> bytes and files below a folder; a link counts as itself."""
    n_bytes = 0
    n_files = 0
    waiting = [folder]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                n_files += 1
                with contextlib.suppress(OSError):
                    n_bytes += 512 * entry.stat(follow_symlinks=False).st_blocks
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return n_bytes, n_files

def give_away(path):
    """Let a run, which is nobody where rl.py is root, write a file or a folder."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

class OpenWatch:
    """Tells which of some files have been opened, by whomever: the kernel's inotify."""
    IN_OPEN = 0x20
    NON_BLOCKING = 0o4000

    def __init__(self, names):
        """names: path -> what the file is called in what opened() returns."""
        library = ctypes.CDLL(None, use_errno=True)
        self.file = library.inotify_init1(self.NON_BLOCKING)
        self.names = {}
        for path, name in names.items():
            self.names[library.inotify_add_watch(self.file, os.fsencode(path), self.IN_OPEN)] = name

    def opened(self):
        """-> the names of files that were opened since this was asked last, sorted."""
        found = set()
        if self.file < 0:              # too many of them on this machine
            return []
        with contextlib.suppress(BlockingIOError):
            while True:
                events = os.read(self.file, 4096)
                while events:          # an event: which watch, what, a cookie, the length of a name behind it
                    watch, _, _, length = struct.unpack_from("iIII", events)
                    events = events[16 + length:]
                    found.add(self.names.get(watch, "?"))
        return sorted(found)

    def close(self):
        if self.file >= 0:
            os.close(self.file)
        self.file = -1

# ---- the judge: text that is held out, and what a hand-in is worth -----------------------------------------

def draw_held_text(rng):
    """Draw files of the standard library -> (to train on, to validate on, held out), lists of (name, path).

    The first has all the others. What this process has imported is never held out, nor a package of which it has
    imported a part: a copy that misses it could not run."""
    files = list_files(None)
    loaded = {name.partition(".")[0] for name in sys.modules}
    fit = []
    for name, path in files:
        package = name.partition(os.sep)[0].removesuffix(".py")
        if package not in loaded and package not in ELSEWHERE and os.path.getsize(path) <= HELD_FILE:
            fit.append((name, path))
    rng.shuffle(fit)
    held = take_bytes(fit, HELD_BYTES)
    own = take_bytes(fit[len(held):], OWN_BYTES)
    apart = {*held, *own}
    return [file for file in files if file not in apart], own, held

def take_bytes(files, n_bytes):
    """The first of some (name, path), until they have so many bytes."""
    taken = []
    for name, path in files:
        if n_bytes <= 0:
            break
        taken.append((name, path))
        n_bytes -= os.path.getsize(path)
    return taken

def second_views(path):
    """The files that tell what is in a module of the library: itself, and what Python has compiled of it."""
    folder, name = os.path.split(path)
    compiled = glob.glob(os.path.join(glob.escape(folder), "__pycache__", f"{glob.escape(name[:-3])}.*.pyc"))
    return [path, *compiled]

def find_libraries(folders):
    """Other copies of the standard library below these folders -> their folders, and Python's zip files."""
    own = os.path.realpath(sysconfig.get_paths()["stdlib"])
    found = []
    for folder in folders:
        for here, inner, names in os.walk(folder):
            if "os.py" in names and "abc.py" in names and os.path.realpath(here) != own:
                found.append(here)
                inner.clear()
            found += [os.path.join(here, name) for name in names if re.fullmatch(r"python3\d+\.zip", name)]
    return found

def take_hand_in(work, target):
    """Move the checkpoint out of a run's folder into another one, `target`. ValueError if it is none, or no file of the
    run's own. No process of the run is alive any more; no link that it left is followed."""
    try:
        folder = os.open(os.path.join(work, "out"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ValueError(f"hand-in: out: {error.strerror}: a folder is needed, and no link") from None
    try:
        # a pipe is not waited for
        file = os.open("ckpt.pt", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise ValueError(f"hand-in: out/ckpt.pt: {error.strerror}: a file is needed, and no link") from None
    finally:
        os.close(folder)
    with os.fdopen(file, "rb") as source:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
            raise ValueError("hand-in: out/ckpt.pt is not a file of the run's own")
        if facts.st_size > HAND_IN_BYTES:
            raise ValueError(f"hand-in: out/ckpt.pt has {facts.st_size:,} bytes, {HAND_IN_BYTES:,} at most")
        with open(checkpoint_path(target), "wb") as copy:
            shutil.copyfileobj(source, copy)
    os.chmod(checkpoint_path(target), 0o644)

def score_checkpoint(folder, text):
    """Evaluate the checkpoint in a folder on the files of another one -> val_bpb. ValueError if it earns none. The rows
    are as long as the checkpoint's model has them, as in its own evaluation."""
    state = load_checkpoint(folder)
    model, tokenizer = load_model(state)
    T = model.cfg.max_seq_len
    if not 16 <= T <= 4096:
        raise ValueError(f"its rows have {T} tokens: 16 to 4096 are evaluated")
    docs, _ = read_corpus(text)
    encoded = encode(tokenizer, [words for _, words in docs])
    check_round_trip(tokenizer, docs, encoded)
    L = model.cfg.index_block_size if "msa" in model.cfg.attn_types else 1
    if T % L:
        raise ValueError(f"its rows of {T} tokens are not whole key blocks of {L}")
    tokens = Tokens(docs, tokenizer, L, T, encoded)
    rows = max(1, SCORE_TOKENS // T)
    found = evaluate(model, tokens, T, rows, torch.device("cpu"), index_warmup=in_index_warmup(state))
    if not math.isfinite(found["val_bpb"]):
        raise ValueError(f"its val_bpb is {found['val_bpb']}")
    return found["val_bpb"]

def check_round_trip(tokenizer, docs, encoded):
    """ValueError unless each byte of the documents is in their tokens: who drops some has less to predict."""
    for (name, words), ids in zip(docs, encoded):
        if tokenizer.decode_bytes(ids.tolist()) != words.encode():
            raise ValueError("its tokenizer does not give back the text that it has encoded")

def print_checkpoint_score(folder, text):
    """What the judge's own process runs: the last line that it prints is JSON, val_bpb or refused."""
    try:
        result = dict(val_bpb=score_checkpoint(folder, text))
    except (ValueError, ArithmeticError, RuntimeError, MemoryError, AssertionError, IndexError) as error:
        result = dict(refused=first_line(error))
    print(json.dumps(result), flush=True)

@dataclass
class Measured:
    """What a run of a copy has come to."""
    val_bpb: float | None              # None: nothing was handed in that earns one
    ended: Ended                       # the run itself
    reason: str = ""                   # why there is none
    attempts: list = field(default_factory=list)  # what it tried that it may not, as far as that shows

class Judge:
    """Runs copies of the repository and scores what they hand in.

    It keeps, in a folder of its own: the unmodified repository, the text in its three parts, a file for each one that
    is held out, which lies in its place, and the cache of the copies, which the unedited one fills, and none else.
    """

    def __init__(self, parts, rng):
        """parts: see find_isolation; rng: of what is held out. ValueError where files cannot be shut in: the held-out
        text could be read."""
        if not {"files", "processes"} <= set(parts):
            raise ValueError("the environment train.py needs Linux, util-linux and namespaces of files and processes, "
                             "which this system does not give: a run could read the held-out text, or outlive its time")
        self.parts = parts
        self.folder = tempfile.mkdtemp(prefix="judge-")
        here = os.path.dirname(os.path.abspath(__file__))
        learned, own, held = draw_held_text(rng)
        scored = take_bytes(rng.sample(held, len(held)), SCORED_BYTES)
        for name, files in dict(train=learned, val=own, held=scored).items():
            self.fill(name, files)
        self.fill("repo", [(name, os.path.join(here, name)) for name in (*COPIED, "rl.py")])
        compileall.compile_dir(self.path("repo"), quiet=2)
        os.mkdir(self.path("cache"))
        give_away(self.path("cache"))

        # what a run sees in place of the held-out text, and of other copies of it
        self.masks = {}                # name of a held-out file -> the empty one
        hidden = {}
        for name, path in held:
            mask = self.new_mask()
            self.masks[name] = mask
            for view in second_views(path):
                hidden[view] = hidden[os.path.realpath(view)] = mask
        readable = visible_folders()
        os.mkdir(self.path("empty"))
        for path in find_libraries(readable):
            hidden[path] = self.path("empty") if os.path.isdir(path) else self.new_mask()
        self.watch = OpenWatch({mask: name for name, mask in self.masks.items()})
        self.sandbox = Sandbox(self.folder, parts, readable, hidden)
        self.scorer = Sandbox(self.folder, parts, readable)  # it sees the held-out text

    def path(self, name):
        return os.path.join(self.folder, name)

    def new_mask(self):
        """-> a new, empty file."""
        file, path = tempfile.mkstemp(prefix="mask-", dir=self.folder)
        os.fchmod(file, 0o644)
        os.close(file)
        return path

    def fill(self, name, files):
        """Make a folder with copies of some (name, path), which any user can read."""
        for inner, path in files:
            target = os.path.join(self.path(name), inner)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(path, target)
        for here, _, _ in os.walk(self.path(name)):
            os.chmod(here, 0o755)

    def release(self, names):
        """These files are no longer held out."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it was not one of those that are evaluated
                os.remove(os.path.join(self.path("held"), name))
            mask = self.masks.pop(name)
            hidden = self.sandbox.hidden
            self.sandbox.hidden = {place: path for place, path in hidden.items() if path != mask}

    def write_copy(self, files):
        """files: name -> text -> a new folder that holds them, and nothing of any other run."""
        work = self.sandbox.new_work()
        for name, text in files.items():
            path = os.path.join(work, name)
            with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
            give_away(path)
        return work

    def fill_cache(self, files, limits):
        """Run the unedited copy for one step, which fills the cache -> Measured. Files that it imports, later than this
        process does, are no longer held out: without them it may have failed, and is run again."""
        while True:
            n_held = len(self.masks)
            found = self.measure(files, ["--steps", "1"], 0, 1.0, limits, fills_cache=True)
            if found.val_bpb is not None or len(self.masks) == n_held:
                return found

    def measure(self, files, flags, seed, minutes, limits, fills_cache=False):
        """Run a copy, and score what it hands in -> Measured.

        files        name -> text
        flags        the agent's; the judge's own stand behind them, so that they count
        seed         of the run
        minutes      of training
        limits       Limits of the run
        fills_cache  whether it may write the cache, and what it opens is released
        """
        own = ["--data", "/judged/text", "--val-data", "/judged/val", "--out", "out", "--seed", seed, "--device", "cpu",
               "--threads", 1, "--minutes", minutes]
        work = self.write_copy(files)
        try:
            readable = {"/judged/text": self.path("train"), "/judged/val": self.path("val")}
            cache = {"/judged/cache": self.path("cache")}
            writable = cache if fills_cache else {}
            command = [sys.executable, "train.py", *flags, *map(str, own)]
            self.watch.opened()        # what was opened before is forgotten
            ended = self.sandbox.run(command, limits, work, {**cache, **readable}, writable)
            opened = self.watch.opened()
            if fills_cache:
                self.release(opened)
                opened = []
            attempts = [f"opened what is held out: {', '.join(opened)}"] if opened else []
            attempts += [f"met: {words}" for words in BARRED if words in ended.output]
            if ended.killed:
                return Measured(None, ended, f"killed: {ended.killed}", attempts)
            if ended.code:
                return Measured(None, ended, f"it ended with status {ended.code}", attempts)
            return self.score_run(work, ended, attempts)
        finally:
            remove_folder(work)

    def score_run(self, work, ended, attempts):
        """Score what a run has left in its folder -> Measured."""
        place = self.scorer.new_work()
        try:
            take_hand_in(work, place)
            readable = {"/judged/repo": self.path("repo"), "/judged/held": self.path("held")}
            program = ("import sys; sys.path[0] = '/judged/repo'; import rl; "
                       f"rl.print_checkpoint_score('{WORK}', '/judged/held')")
            limits = Limits(SCORE_SECONDS, SCORE_SECONDS)
            said = self.scorer.run([sys.executable, "-c", program], limits, place, readable)
            if said.killed:
                raise ValueError(f"the judge's process was killed: {said.killed}")
            result = None              # what its last line says
            with contextlib.suppress(IndexError, ValueError):
                result = json.loads(said.output.splitlines()[-1])
            if not isinstance(result, dict) or not result.keys() & {"val_bpb", "refused"}:
                raise ValueError(f"the judge's process ended with status {said.code}")
            if "refused" in result:
                raise ValueError(result["refused"].replace(WORK + "/", ""))
            return Measured(result["val_bpb"], ended, "", attempts)
        except ValueError as error:
            return Measured(None, ended, f"refused: {error}", [*attempts, f"handed in what earns no score: {error}"])
        finally:
            remove_folder(place)

    def halt(self):
        """Kill the run that another thread waits for, and each that it begins."""
        for sandbox in (self.sandbox, self.scorer):
            sandbox.stop.set()

    def close(self):
        self.watch.close()
        remove_folder(self.folder)

def remove_folder(folder):
    """Remove what a run has left, however deep it is nested: Python's rmtree calls itself."""
    subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL)

# ---- the judge: what an agent does, and what becomes of it ---------------------------------------------

class Journal:
    """A file that a person reads: what was asked, what was changed, what came of it. Each entry is on the disk at once.
    """

    def __init__(self, path):
        self.path = path

    def add(self, title, *parts, mark=""):
        """title: a line; parts: texts of any length, a ``` block each; mark: of a heading."""
        with open(self.path, "a", encoding="utf-8", errors="replace") as file:
            file.write(f"\n{mark}{time.strftime('%H:%M:%S')} {title}\n")
            for part in parts:
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part)), default=0))
                file.write(f"\n{fence}\n{part.rstrip()}\n{fence}\n")

    def attempt(self, what):
        """The agent, or a run of its copy, tried what it may not."""
        self.add(f"**attempt**: {what}")

@dataclass
class Verdict:
    """Whether a change is better than the base."""
    is_kept: bool
    mean: float                        # gain, bits a byte
    words: str

def judge_gains(gains, noise, fresh=None):
    """-> Verdict: each seed must gain, their mean more than the threshold, and so must a fresh seed alone.

    gains   bits a byte that each seed gained
    noise   see Noise
    fresh   gain of the fresh seed; None: it has not been run yet
    With a spread of 0.01, as measured, 6 of 1,000 changes that change nothing but the noise would be kept.
    """
    mean = sum(gains) / len(gains)
    least = noise.threshold(len(gains))
    is_kept = mean > least and min(gains) > 0
    words = f"mean gain {mean:+.4f}, threshold {least:.4f} ({noise})"
    if min(gains) <= 0 < mean:
        words += "; not every seed gains"
    if fresh is not None:
        is_kept = is_kept and fresh > least
        words += f"; with a fresh seed {fresh:+.4f}"
    return Verdict(is_kept, mean, words)

@dataclass
class Noise:
    """What gains are worth nothing."""
    spread: float                      # standard deviation of the unedited copy's val_bpb over seeds
    seconds: float                     # that the unedited copy takes, at most,
    cpu_seconds: float                 # and of CPU time
    by_second: float                   # bits a byte that the unedited copy gains by a second more

    def threshold(self, n_seeds):
        """The standard error of the mean of so many differences, each of two runs, times Student's t; or more."""
        return max(STUDENT * self.spread * math.sqrt(2 / n_seeds), LEAST_GAIN)

    def overtime(self, ended):
        """Bits a byte that the unedited copy would have gained by the time that a run took over its own."""
        seconds = max(ended.seconds - self.seconds, ended.cpu_seconds - self.cpu_seconds, 0.0)
        return self.by_second * seconds

    def __str__(self):
        return f"seeds spread by {self.spread:.4f}, at least {LEAST_GAIN:g}; a second more gives {self.by_second:.4f}"

WORKSHOP_PROMPT = """\
You are an engineer. Make train.py of this repository reach a lower val_bpb, bits a byte of validation text, in
{minutes:g} minutes of training on one CPU thread. Read its code and its log, change flags (set_flags) or code (replace,
write_file), and call run: a copy of your files is trained with {seeds} seeds that you do not choose. The judge is the
unmodified repository. It loads out/ckpt.pt, which your train.py must write in its own format, and evaluates it on text
that no run sees. If each seed gains, and the mean gain is larger than the noise, with a fresh seed too, the change is
kept, and the next one is measured against it; otherwise it is undone. Of a run that takes more time than the unedited
one the gain is less; one that takes much more is killed. You have {runs} runs. Call done when you are finished. The
flags that you may set: {flags}. Those of the run as it is: {base}"""

class Workshop(Environment):
    """The environment train.py: see the section's head.

    A copy is a dict, name -> text, here in memory: no path leads out of it. A file is on the disk for a run alone.
    """
    tools = [
        function_schema("list_files", "The files of your copy, with their lines."),
        function_schema("read_file", f"Lines of a file, {SHOWN_LINES} at most.", path=("string", "its name"),
                        first=("integer", "first line, from 1"), last=("integer", "last line")),
        function_schema("replace", "Replace a text that occurs exactly once in a file.", path=("string", "its name"),
                        old=("string", "the text"), new=("string", "what takes its place")),
        function_schema("write_file", "Write a whole file, a new one or in place of an old one.",
                        path=("string", "its name"), text=("string", "all of it")),
        function_schema("set_flags", "Set train.py's flags, all of them.",
                        flags=("array", 'as on a command line: ["--lr", "0.01"]')),
        function_schema("run", "Run your copy, and let it be judged. It takes minutes."),
        function_schema("read_log", f"The last lines that the last run printed, {SHOWN_LINES} at most.",
                        lines=("integer", "how many")),
        function_schema("done", "You are finished.")]

    def __init__(self, journal, judge, rng, minutes=ENGINEER_MINUTES, n_runs=ENGINEER_RUNS, flags=()):
        """
        journal  Journal
        judge    Judge
        rng      of the runs' seeds, which the agent cannot know
        minutes  of training in a run
        n_runs   of the session
        flags    of the base, which may be a run that needs repair
        """
        here = os.path.dirname(os.path.abspath(__file__))
        self.journal = journal
        self.judge = judge
        self.rng = rng
        self.minutes = minutes
        self.runs_left = n_runs
        self.base = {name: read_source(os.path.join(here, name)) for name in COPIED}
        self.base_flags = list(flags)
        self.original_bytes = count_text(self.base)
        self.undo()
        self.seeds = [self.new_seed() for _ in range(ENGINEER_SEEDS)]
        self.scores = {}               # seed -> val_bpb of the base
        self.noise = None              # Noise; None: the base has not been run yet
        self.limits = None             # of a change's run
        self.output = ""               # that the last run printed
        self.gains = []                # of each call of run; 0: not kept
        self.began = time.monotonic()
        self.prompt = WORKSHOP_PROMPT.format(
            minutes=minutes, seeds=ENGINEER_SEEDS, runs=n_runs, flags=" ".join(f"--{name}" for name in ENGINEER_FLAGS),
            base=shlex.join(flags) or "none")
        self.uses = dict(
            list_files=self.list_files, read_file=self.read_file, replace=self.replace, write_file=self.write_file,
            set_flags=self.set_flags, run=self.run, read_log=self.read_log, done=self.done)
        self.journal.add(f"A session begins: {n_runs} runs, {minutes:g} minutes of training each; flags "
                         f"{shlex.join(flags) or 'none'}", mark="# ")
        self.journal.add(isolation_words(judge.parts))

    def new_seed(self):
        return self.rng.randrange(2 ** 31)

    def undo(self):
        """The copy is the base again."""
        self.files = dict(self.base)
        self.flags = list(self.base_flags)

    def call(self, name, arguments):
        if self.over:
            return "The session is over."
        use = self.uses.get(name) if isinstance(name, str) else None
        self.journal.add(f"{name if use else repr(name)[:40]} {json.dumps(arguments):.200}")
        if use is None:
            return f"There is no tool {name!r:.40}; there are {', '.join(self.uses)}."
        try:
            kinds = TOOL_ARGUMENTS.get(name, {})
            check_fields(f"{name}: its arguments", arguments, kinds)
            return use(**{key: arguments[key] for key in kinds})
        except (ValueError, TypeError, AttributeError) as error:
            return f"Not done: {first_line(error)}"
        except OSError as error:       # of this machine: the disk is full
            self.journal.add(f"{name} failed on this machine: {error}")
            return f"Not done: {error.strerror}"

    # the copy

    def find_file(self, path):
        """ValueError, and an entry in the journal if it leads out of the copy, unless this is a file of the copy."""
        if path not in self.files:
            if "/" in path or "\\" in path or ".." in path:
                self.journal.attempt(f"asked for {path!r:.200}, which is outside the copy")
            raise ValueError(f"{path!r:.80}: the files are {', '.join(sorted(self.files))}")
        return self.files[path]

    def list_files(self):
        return "\n".join(f"{name} {text.count(chr(10))} lines" for name, text in sorted(self.files.items()))

    def read_file(self, path, first, last):
        lines = self.find_file(path).splitlines()
        last = min(last, first + SHOWN_LINES - 1, len(lines))
        shown = [f"{number} {lines[number - 1][:SHOWN_CHARS]}" for number in range(max(1, first), last + 1)]
        return "\n".join(shown) or f"{path} has {len(lines)} lines"

    def replace(self, path, old, new):
        text = self.find_file(path)
        n_found = text.count(old) if old else 0
        if n_found != 1:
            raise ValueError(f"the text occurs {n_found} times in {path}; it must once")
        return self.write_file(path, text.replace(old, new))

    def write_file(self, path, text):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,60}\.(py|txt|json)", path):
            self.journal.attempt(f"to write {path!r:.200}, which is outside the copy")
            raise ValueError(f"{path!r:.80}: a file lies beside train.py, and its name is letters, digits, and .py, "
                             ".txt or .json")
        files = {**self.files, path: text}
        if count_text(files) > self.original_bytes + SOURCE_BYTES:
            raise ValueError(f"the copy would have over {SOURCE_BYTES:,} bytes more than the original")
        self.files = files
        return f"{path} has {text.count(chr(10))} lines now."

    def set_flags(self, flags):
        try:
            check_flags(flags)
        except ValueError as error:
            self.journal.attempt(f"to set flags: {error}")
            raise
        self.flags = list(flags)
        return f"The flags are {shlex.join(self.flags) or 'none'}."

    def diff(self):
        """What is changed, as a patch of the base; and the flags."""
        lines = []
        if self.flags != self.base_flags:
            lines += [f"- flags: {shlex.join(self.base_flags)}", f"+ flags: {shlex.join(self.flags)}"]
        for name, text in sorted(self.files.items()):
            old = self.base.get(name, "").splitlines()
            lines += difflib.unified_diff(old, text.splitlines(), f"base/{name}", f"copy/{name}", lineterm="")
        return "\n".join(lines)

    # runs

    def measure(self, name, files, flags, seed, minutes, limits):
        """Run and score a copy, and write both into the journal -> Measured."""
        found = self.judge.measure(files, flags, seed, minutes, limits)
        ended = found.ended
        said = f"val_bpb {found.val_bpb:.4f}" if found.val_bpb is not None else found.reason
        last = "\n".join(line[:SHOWN_CHARS] for line in ended.output.splitlines()[-JOURNAL_LINES:])
        took = f"{ended.seconds:.1f} s, {ended.cpu_seconds:.1f} of CPU time"
        self.journal.add(f"{name}, seed {seed}: {said}; {took}", last)
        for attempt in found.attempts:
            self.journal.attempt(f"a run {attempt}")
        self.output = ended.output
        return found

    def measure_base(self):
        """Run the unedited copy: its scores, its noise, its time. ValueError if it has none."""
        if self.noise:
            return
        loose = Limits(60 * self.minutes + FIRST_SECONDS, 60 * self.minutes + FIRST_SECONDS)
        first = self.judge.fill_cache(self.base, loose)
        if first.val_bpb is None:
            raise ValueError(f"the unedited copy has no score here: {first.reason}; {first.ended.output[-200:]}")
        seconds = 0.0
        cpu_seconds = 0.0
        for seed in [*self.seeds, *(self.new_seed() for _ in range(BASE_SEEDS - len(self.seeds)))]:
            found = self.measure("base", self.base, self.base_flags, seed, self.minutes, loose)
            if found.val_bpb is None:
                raise ValueError(f"the unedited copy has no score here: {found.reason}")
            self.scores[seed] = found.val_bpb
            seconds = max(seconds, found.ended.seconds)
            cpu_seconds = max(cpu_seconds, found.ended.cpu_seconds)

        # what may be taken on top, and what the unedited copy makes of it
        times, more = SLACK
        self.limits = Limits(times * seconds + more, times * cpu_seconds + more)
        more_seconds = self.limits.seconds - seconds
        longer = self.minutes + more_seconds / 60
        found = self.measure("base with more time", self.base, self.base_flags, self.seeds[0], longer, loose)
        if found.val_bpb is None:
            raise ValueError(f"the unedited copy has no score here: {found.reason}")
        gain = max(LEAST_GAIN, self.scores[self.seeds[0]] - found.val_bpb)  # one pair of runs may hide it
        self.noise = Noise(statistics.stdev(self.scores.values()), seconds, cpu_seconds, gain / more_seconds)
        self.journal.add(f"the unedited copy has {self.base_words()}; {self.noise}; a run may take "
                         f"{self.limits.seconds:.0f} s, {self.limits.cpu_seconds:.0f} of CPU time")

    def base_words(self):
        return ", ".join(f"{score:.4f}" for score in self.scores.values())

    def run(self):
        if self.runs_left == 0:
            return "There is no run left."
        if (self.files, self.flags) == (self.base, self.base_flags):
            return "Nothing is changed: a changed seed is no improvement."
        self.measure_base()
        self.runs_left -= 1
        number = len(self.gains) + 1
        self.journal.add(f"Run {number}: what is changed", self.diff(), mark="## ")
        lines, verdict, scores = self.try_change()
        is_kept = verdict is not None and verdict.is_kept
        if is_kept:
            lines.append(f"KEPT: {verdict.words}. It is the new base.")
            self.base = self.files
            self.base_flags = self.flags
            self.scores = scores
        else:
            why = verdict.words if verdict else lines[-1]
            lines.append(f"NOT KEPT: {why}. The copy is the base again.")
        self.gains.append(verdict.mean if is_kept else 0.0)
        self.undo()
        self.journal.add(f"run {number} is judged", "\n".join(lines))
        self.over = self.runs_left == 0
        lines += [f"{self.runs_left} runs are left. The last lines of the output:", self.read_log(12)]
        return "\n".join(lines)

    def try_change(self):
        """Run the change with each seed; if it seems better, with a fresh one and the base beside it, too -> lines that
        tell it, Verdict or None, its scores by seed."""
        lines = []
        gains = []
        scores = {}
        for seed in self.seeds:
            found = self.measure("change", self.files, self.flags, seed, self.minutes, self.limits)
            if found.val_bpb is None:
                return [*lines, f"seed {len(gains) + 1}: no score, {found.reason}"], None, scores
            gains.append(self.gain(self.scores[seed], found))
            scores[seed] = found.val_bpb
            lines.append(self.tell_gain(f"seed {len(gains)}", self.scores[seed], found))
        verdict = judge_gains(gains, self.noise)
        if not verdict.is_kept:
            return lines, verdict, scores

        # the base once more beside it: a machine that is less busy now, or a lucky seed, would be seen
        seed = self.new_seed()
        base = self.measure("fresh seed, base", self.base, self.base_flags, seed, self.minutes, self.limits)
        found = self.measure("fresh seed, change", self.files, self.flags, seed, self.minutes, self.limits)
        for name, one in dict(base=base, change=found).items():
            if one.val_bpb is None:
                return [*lines, f"fresh seed: the {name} has no score, {one.reason}"], None, scores
        fresh = self.gain(base.val_bpb, found)
        lines.append(self.tell_gain("fresh seed", base.val_bpb, found))
        return lines, judge_gains(gains, self.noise, fresh), scores

    def gain(self, base, found):
        """Bits a byte that a run gains over the base's val_bpb, less what its overtime is worth."""
        return base - found.val_bpb - self.noise.overtime(found.ended)

    def tell_gain(self, name, base, found):
        line = f"{name}: {base:.4f} -> {found.val_bpb:.4f}, gain {self.gain(base, found):+.4f}"
        overtime = self.noise.overtime(found.ended)
        return f"{line}, {overtime:.4f} taken off for overtime" if overtime else line

    def read_log(self, lines):
        if not self.output:
            self.measure_base()
        shown = self.output.splitlines()[-max(1, min(lines, SHOWN_LINES)):]
        return "\n".join(line[:SHOWN_CHARS] for line in shown)

    def done(self):
        self.over = True
        return f"The session is over: {sum(self.gains):+.4f} bits a byte in {len(self.gains)} runs."

    def finish(self):
        """-> the gain of each run, success, seconds."""
        gain = sum(self.gains)
        kept = shlex.join(self.base_flags) or "none"
        self.journal.add(f"the session is over: {gain:+.4f} bits a byte in {len(self.gains)} runs; flags {kept}")
        self.close()
        return self.gains or [0.0], gain > 0, time.monotonic() - self.began

    def halt(self):
        """End what is under way in another thread."""
        self.over = True
        self.judge.halt()

    def close(self):
        self.halt()
        self.judge.close()

def check_flags(flags):
    """ValueError for flags of train.py that an agent may not set."""
    if not isinstance(flags, list) or len(flags) > 2 * len(ENGINEER_FLAGS):
        raise ValueError(f"flags {flags!r:.60}: a list of at most {2 * len(ENGINEER_FLAGS)} texts is needed")
    for flag in flags:
        if not isinstance(flag, str) or not flag.isprintable() or len(flag) > 200:
            raise ValueError(f"flag {flag!r:.40}: a text is needed")
        name = flag.partition("=")[0]
        if flag.startswith("-") and name.removeprefix("--") not in ENGINEER_FLAGS:
            raise ValueError(f"{flag!r:.40} is the judge's to set; yours are {' '.join(ENGINEER_FLAGS)}")

TOOL_ARGUMENTS = dict(
    read_file=dict(path=str, first=int, last=int),
    replace=dict(path=str, old=str, new=str),
    write_file=dict(path=str, text=str),
    set_flags=dict(flags=list),
    read_log=dict(lines=int))

def read_source(path):
    with open(path, encoding="utf-8") as file:
        return file.read()

def count_text(files):
    """Bytes of a copy's files."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in files.values())

def main(argv=None):
    def start(locks):
        args, state = parse_args(argv, locks)
        try:
            return run(args, state, locks)
        except sqlite3.Error as error:
            raise OSError(f"--out {args.out}: episodes.db: {error}") from None
    return command("rl.py", start, "; the last good checkpoint is kept")

if __name__ == "__main__":
    slow.cancel()
    signal.signal(signal.SIGINT, at_ctrl_c)
    main()
