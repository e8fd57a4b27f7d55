"""An agent that works on train.py in front of the judge of rl.py, with any model that speaks OpenAI's protocol.

    python rl.py --task evolve --serve 8000 --token secret --minutes 60     # in one terminal; in another, once it says
    python .ci/engineer.py http://127.0.0.1:8000/v1 secret                  # "gateway |": pip install openai httpx
    python .ci/engineer.py http://127.0.0.1:8000/v1 secret --base-url https://api.minimax.io/v1 --api-key KEY \\
        --model MiniMax-M2

Without --base-url the policy that is being trained answers. The tools are the environment's: the model names one, the
judge does it, and what it says is the next message. A journal tells what came of it: where it is, is printed last.
"""
import argparse
import contextlib
import sys

import httpx
import openai

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

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the gateway, as rl.py prints it")
    parser.add_argument("key")
    parser.add_argument("--environment", help="train.py, the default, or evolve: the small one that the policy learns",
                        default="train.py", choices=["train.py", "evolve"])
    parser.add_argument("--model", default="any")
    parser.add_argument("--base-url", help="of the model; default: the session's own, where the policy answers")
    parser.add_argument("--api-key", help="of the model")
    parser.add_argument("--turns", type=int, default=60, help="of the model, at most")
    args = parser.parse_args()

    root = args.url.removesuffix("/v1")
    gateway = httpx.Client(base_url=root, headers={"Authorization": f"Bearer {args.key}"}, timeout=None)
    body = {"environment": "train.py"} if args.environment == "train.py" else {"wait": 60}
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
        is_over = play(task, gateway, args.model, client, args.turns)
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
