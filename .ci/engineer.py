"""An agent that works on train.py in front of the judge of rl.py, with any model that speaks OpenAI's protocol.

    python rl.py --task evolve --serve 8000 --token secret --minutes 60     # in one terminal; in another, once it says
    python .ci/engineer.py http://127.0.0.1:8000/v1 secret                  # "gateway |": pip install openai httpx
    python .ci/engineer.py http://127.0.0.1:8000/v1 secret --base-url https://api.minimax.io/v1 --api-key KEY \\
        --model MiniMax-M2

The tools are the environment's: the model names one, the judge does it, and what it says is the next message. A
journal tells what came of it: where it is, is printed last.

Without --base-url the policy that is being trained answers. It reads nothing but letters and knows nothing but its own
edits: translate() gives it train.py's log as it knows logs, and its edits of the rate become --lr.
"""
import argparse
import contextlib
import math
import re
import shlex
import sys
from pathlib import Path

import httpx
import openai

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rl

USUAL_RATE = 1.2e-2                    # train.py's --lr for tiny

NUDGE = "Call one of your tools; done ends the session."

def say(role, text):
    print(f"{role:7} | {text[:2000]}", flush=True)

def play(task, gateway, model, client, n_turns):
    """Let the model call tools until the session is over, or for n_turns. -> whether it is over."""
    messages = task["messages"]
    here = f"/s/{task['task']}/v1/tools"
    say("prompt", messages[0]["content"])
    for _ in range(n_turns):
        message = client.chat.completions.create(model=model, messages=messages, tools=task["tools"]).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        say("model", message.content or "")
        if not message.tool_calls:
            messages.append({"role": "user", "content": NUDGE})
        for call in message.tool_calls or []:
            function = call.function
            say("call", f"{function.name} {function.arguments}")
            reply = gateway.post(here, json={"name": function.name, "arguments": function.arguments})
            said = reply.json()
            if reply.is_error:
                said = {"content": said["error"]["message"], "over": reply.status_code != 400}
            say("tool", said["content"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said["content"]})
            if said["over"]:
                return True
    return False

def translate(log):
    """What train.py printed -> a prompt of the policy's, which knows runs of bytes: losses are scaled so that the first
    is that of a byte that nothing is known of."""
    steps = re.findall(r"^step \d.*", log, re.M)

    def column(name):
        return [float(re.search(rf"\b{name} ([\d.]+)", line)[1]) for line in steps]
    loss = column("loss")
    norm = column("norm")
    train_bpb = column("train_bpb")
    final = float(re.search(r"^final .* val_bpb ([\d.]+)", log, re.M)[1])
    scale = math.log(256) / loss[0]
    val = final * loss[-1] / train_bpb[-1] * scale
    at = [round(place * (len(steps) - 1)) for place in (0, 0.04, 0.12, 0.25, 0.5, 0.75, 1)]
    late = [at[place] for place in rl.LATE]
    columns = [
        ("loss", [scale * value for value in loss], at),
        ("norm", norm, at),
        ("vio", column("maxvio"), late),
        ("kl", column("kl"), late)]
    words = []
    for name, values, places in columns:
        words.append("".join(rl.letter(values[place], *rl.COLUMNS[name]) for place in places))
    return f"E{' '.join(words)} {rl.letter(val, *rl.VAL_RANGE)};"

def ask(client, messages):
    """What the policy writes -> its text, and the edit that this asks for; None: nothing is left to do. It is not sent
    the tools, which it has never read: its own texts call them."""
    message = client.chat.completions.create(model="any", messages=messages).choices[0].message
    text = message.content or ""
    say("policy", text)
    edit = re.fullmatch(r"[a-z]\[([^\]]+)\]", text)
    return text, edit[1] if edit else None

def use(task, gateway, name, **arguments):
    """Call a tool -> what it says, and whether the episode is over."""
    reply = gateway.post(f"/s/{task['task']}/v1/tools", json={"name": name, "arguments": arguments})
    said = reply.json()
    if reply.is_error:
        said = {"content": said["error"]["message"], "over": True}
    say("tool", said["content"])
    return said["content"], said["over"]

def failed(text):
    """The messages of an edit that was undone, as the policy knows them."""
    return [{"role": "assistant", "content": text}, {"role": "tool", "content": "=b;"}]

def repair_run(task, gateway, client):
    """Let the policy repair a small run: the environment evolve."""
    messages = task["messages"]
    say("prompt", messages[0]["content"])
    is_over = False
    while not is_over:
        text, edit = ask(client, messages)
        if edit is None:
            said, is_over = use(task, gateway, "done")
        else:
            said, is_over = use(task, gateway, "edit", setting=edit)
        log = re.search("E[a-z ]+;$", said)
        messages = [{"role": "user", "content": log[0]}] if log else [*messages, *failed(text)]

def repair_train(task, gateway, client, flags, n_turns):
    """Let the policy repair a run of train.py, for n_turns edits, or until it has nothing left to do."""
    tried = []
    for _ in range(n_turns):
        prompt = translate(use(task, gateway, "read_log", lines=200)[0])
        say("prompt", prompt)
        text, edit = ask(client, [{"role": "user", "content": prompt}, *tried])
        if edit is None:
            break
        if edit not in rl.RATE_EDITS:
            print(f"{edit}: nothing of that can be wrong with train.py", flush=True)
            tried += failed(text)
            continue
        rate = float(flags.get("--lr", USUAL_RATE)) * rl.EDIT_FACTOR ** rl.RATE_EDITS[edit]
        changed = {**flags, "--lr": f"{rate:.6g}"}
        use(task, gateway, "set_flags", flags=[word for pair in changed.items() for word in pair])
        said, _ = use(task, gateway, "run")
        if "NOT KEPT" in said:
            tried += failed(text)
        else:
            flags = changed
            tried = []

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the gateway, as rl.py prints it")
    parser.add_argument("key")
    parser.add_argument("--environment", help="train.py, the default, or evolve: the small one that the policy learns",
                        default="train.py", choices=["train.py", "evolve"])
    parser.add_argument("--model", default="any")
    parser.add_argument("--base-url", help="of the model; default: the session's own, where the policy answers")
    parser.add_argument("--api-key", help="of the model")
    parser.add_argument("--flags", default="", help='of the run that train.py begins with, as "--lr 0.0007"')
    parser.add_argument("--turns", type=int, default=60, help="of the model, at most")
    args = parser.parse_args()
    flags = shlex.split(args.flags)

    root = args.url.removesuffix("/v1")
    gateway = httpx.Client(base_url=root, headers={"Authorization": f"Bearer {args.key}"}, timeout=None)
    body = {"environment": "train.py", "flags": flags} if args.environment == "train.py" else {"wait": 60}
    try:
        reply = gateway.post("/v1/tasks", json=body)
    except httpx.TransportError as error:
        sys.exit(f"{args.url}: {error}; rl.py --serve prints the address behind \"gateway |\"")
    if reply.is_error:
        sys.exit(f"{args.url}: {reply.status_code} {reply.text:.300}")
    task = reply.json()

    client = openai.OpenAI(base_url=args.base_url or task["base_url"], api_key=args.api_key or task["api_key"])
    is_over = False
    try:
        if args.base_url:
            is_over = play(task, gateway, args.model, client, args.turns)
        elif args.environment == "train.py":
            repair_train(task, gateway, client, dict(zip(flags[::2], flags[1::2])), args.turns)
        else:
            repair_run(task, gateway, client)
    except openai.APIStatusError as error:  # its context is full, as a rule
        print(f"model   | {error}")
    if not is_over and args.environment == "train.py":
        reply = gateway.post(f"/s/{task['task']}/v1/tools", json={"name": "done"})
        say("tool", reply.json().get("content", reply.text))
    if "journal" in task:
        print(f"journal | {task['journal']}")

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
