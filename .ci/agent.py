"""An agent that knows nothing of its training, and the ten lines that train it.

    python rl.py --serve 8000 --token secret --teach 12        # in one terminal; once it says "gateway |", in another:
    python .ci/agent.py http://127.0.0.1:8000/v1 secret        # pip install openai httpx

The agent is `solve`: OpenAI's library, a system prompt, a tool, as in its documentation. `train` plays it over and
over: it claims an episode, gives the agent the episode's address and key in place of a model's, and says what the
answer was worth. Start it several times, or with more agents, which are threads: the policy answers all that wait at
once.
"""
import argparse
import contextlib
import json
import re
import sys
import threading

import httpx
import openai

# ---- the agent, as somebody wrote it ---------------------------------------------------------------

SYSTEM = ("You are a careful assistant. Solve the task with the calculator, one operation a call, and never guess. "
          "When nothing is left to compute, say the answer.")
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "One operation on two whole numbers, as 12+3",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

def calculate(expression):
    """12+3 -> 15; ? for what is none."""
    call = re.fullmatch(r"(\d{1,4})([+*-])(\d{1,4})", expression)
    return str(OPERATIONS[call[2]](int(call[1]), int(call[3]))) if call else "?"

def solve(client, messages):
    """A question -> the model's last words, and what the tool said last."""
    messages = [{"role": "system", "content": SYSTEM}, *messages]
    result = None
    for _ in range(8):
        message = client.chat.completions.create(model="any", messages=messages, tools=[CALCULATOR]).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content, result
        for call in message.tool_calls:
            result = calculate(str(json.loads(call.function.arguments).get("expression")))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return None, result

# ---- its training --------------------------------------------------------------------------------

def train(url, key):
    """Play episodes until the run is over."""
    connections = openai.DefaultHttpxClient()  # one pool: to make another for each episode costs more than that
    gateway = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=None)
    while True:
        reply = gateway.post("/tasks", json={"wait": 30})
        if reply.status_code == 409:   # all episodes are in others' hands
            continue
        if reply.is_error:
            break
        task = reply.json()
        client = openai.OpenAI(base_url=task["base_url"], api_key=task["api_key"], http_client=connections)
        try:
            answer, result = solve(client, task["messages"])
        except openai.APIStatusError as error:  # the gateway has taken the episode back, or ends
            print(f"{task['task']}: {error}")
            continue
        reward = float(answer == f"A{task['answer']}." and result == task["answer"])  # computed, not guessed
        gateway.post("/finish", json={"task": task["task"], "reward": reward})
    if reply.status_code != 503:       # 503: the run is over
        print(f"{url}: {reply.status_code} {reply.text:.200}")

def play(url, key):
    """One thread of agents. When the run ends, that is within a request."""
    with contextlib.suppress(httpx.TransportError, openai.APIConnectionError):
        train(url, key)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the gateway, as rl.py prints it")
    parser.add_argument("key")
    parser.add_argument("--agents", type=int, default=16, help="that play at the same time")
    args = parser.parse_args()

    # the port is there before the run's imitation is over: until then it does not answer
    print(f"{args.agents} agents wait for {args.url}", flush=True)
    try:
        reply = httpx.post(f"{args.url}/finish", json={}, headers={"Authorization": f"Bearer {args.key}"}, timeout=None)
    except httpx.TransportError as error:
        sys.exit(f"{args.url}: {error}; rl.py --serve prints the address behind \"gateway |\"")
    if reply.status_code == 401 or "episode" not in reply.text:
        sys.exit(f"{args.url}: {reply.status_code} {reply.text:.200}")
    threads = [threading.Thread(target=play, args=(args.url, args.key), daemon=True) for _ in range(args.agents)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
