"""Agents as people have them, unchanged, as clients of `python rl.py --serve PORT`: each plays the calculator.

    pip install openai litellm smolagents mini-swe-agent openai-agents      # those to be used
    python rl.py --serve 8000 --token secret --minutes 10
    python .ci/black_box.py http://127.0.0.1:8000 secret --client openai --agents 8 --episodes 200

Whoever launches an agent claims a task, gives the agent the task's base URL and the key, and says at the end what the
episode was worth. The agent knows nothing of it: it sends what it always sends.
    POST /v1/tasks {wait: seconds}           -> {task, base_url, answer, messages: [{role, content}]}
    POST /v1/finish {task, reward, success}

A right answer pays 1, a call that the calculator cannot read costs a tenth.

clients     openai, openai-async, openai-stream    OpenAI's library in a loop of our own
            litellm                                the same loop
            smolagents, smolagents-code            ToolCallingAgent; CodeAgent
            mini-swe-agent, mini-swe-agent-text    calls of a tool; text that a pattern finds
            openai-agents, openai-agents-stream    POST /responses
"""
import argparse
import asyncio
import functools
import json
import math
import os
import re
import sys
import threading
import time
import typing
import urllib.error
import urllib.request

# what a library would look for in the network, or print: read when it is imported
os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("MSWEA_COST_TRACKING", "ignore_errors")
os.environ.setdefault("MSWEA_SILENT_STARTUP", "1")
os.environ.setdefault("MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT", "2")

MAX_TURNS = 8                          # of an episode
WAIT_S = 30.0                          # that a claim waits for a task
TIMEOUT_S = 120.0                      # of one request
LINE_S = 5.0                           # between two lines of progress
GIVE_UP_S = 120.0                      # without the end of an episode
RETRY_S = 0.5                          # before the next try where the gateway refuses
MALFORMED = -0.1                       # reward of a malformed call
INSTRUCTIONS = "Solve the task with the calculator, one operation a call, then answer."
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

# ---- the tool ------------------------------------------------------------------------------------

class Calculator:
    """The agent's tool: one operation on two numbers, "12+3" -> "=15;"; it counts what it cannot read."""

    def __init__(self):
        self.n_malformed = 0

    def __call__(self, expression):
        operation = re.fullmatch(r"(\d{1,4})([+*-])(\d{1,4})", str(expression))
        if operation:
            result = OPERATIONS[operation[2]](int(operation[1]), int(operation[3]))
            if 0 <= result <= 9999:
                return f"={result};"
        self.n_malformed += 1
        return "=?;"

    def run(self, name, arguments):
        """A tool call as the protocol has it: arguments are JSON that a model wrote."""
        try:
            expression = json.loads(arguments)["expression"]
        except (ValueError, TypeError, KeyError):
            expression = None
        return self(expression if name == "calculator" else None)

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "One operation on two whole numbers, as 12+3",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}

# ---- the clients: play(client, base_url, key, question, calculate) -> answer -----------------------
# Each imports its library when it is played, as nobody has all of them.

def chat(complete, question, calculate):
    """The loop that the documentation of OpenAI's library shows. complete: messages -> the assistant's message."""
    messages = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        message = complete(messages)
        messages.append(message)
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            result = calculate.run(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return None

def once(make):
    """Made once, also where threads ask for it at the same time, as functools.cache does not promise."""
    lock = threading.Lock()
    cached = functools.cache(make)

    def get():
        with lock:
            return cached()
    return get

@once
def connections():
    """One pool for all threads: to make one takes 23 ms of a core, five times the requests of an episode."""
    from openai import DefaultHttpxClient
    return DefaultHttpxClient(timeout=TIMEOUT_S)

@once
def async_connections():
    from openai import DefaultAsyncHttpxClient
    return DefaultAsyncHttpxClient(timeout=TIMEOUT_S)

@once
def event_loop():
    """One for all agents that are coroutines: a pool of connections belongs to one loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop

def await_it(coroutine):
    """Run a coroutine on that loop; this thread waits."""
    return asyncio.run_coroutine_threadsafe(coroutine, event_loop()).result()

def play_openai(base_url, key, question, calculate):
    from openai import OpenAI
    client = OpenAI(base_url=base_url, api_key=key, http_client=connections())

    def complete(messages):
        reply = client.chat.completions.create(model="policy", messages=messages, tools=[CALCULATOR])
        return reply.choices[0].message
    return chat(complete, question, calculate)

def play_openai_async(base_url, key, question, calculate):
    from openai import AsyncOpenAI
    client = AsyncOpenAI(base_url=base_url, api_key=key, http_client=async_connections())

    def complete(messages):
        reply = await_it(client.chat.completions.create(model="policy", messages=messages, tools=[CALCULATOR]))
        return reply.choices[0].message
    return chat(complete, question, calculate)

def play_openai_stream(base_url, key, question, calculate):
    """Streamed; the library's own helper puts the pieces together, and checks them."""
    from openai import OpenAI
    client = OpenAI(base_url=base_url, api_key=key, http_client=connections())

    def complete(messages):
        with client.chat.completions.stream(model="policy", messages=messages, tools=[CALCULATOR]) as stream:
            return stream.get_final_completion().choices[0].message
    return chat(complete, question, calculate)

def play_litellm(base_url, key, question, calculate):
    import litellm
    litellm.suppress_debug_info = True

    def complete(messages):
        reply = litellm.completion(model="openai/policy", base_url=base_url, api_key=key, timeout=TIMEOUT_S,
                                   messages=messages, tools=[CALCULATOR])
        return reply.choices[0].message
    return chat(complete, question, calculate)

def smolagents_model(base_url, key):
    from smolagents import OpenAIModel
    return OpenAIModel(model_id="policy", api_base=base_url, api_key=key,
                       client_kwargs=dict(http_client=connections()))

def play_smolagents(base_url, key, question, calculate):
    """It gives its own tool, final_answer, for the answer, and demands that each reply calls a tool."""
    from smolagents import LogLevel, ToolCallingAgent, tool

    @tool
    def calculator(expression: str) -> str:
        """One operation on two whole numbers.

        Args:
            expression: the operation, as 12+3
        """
        return calculate(expression)
    agent = ToolCallingAgent([calculator], smolagents_model(base_url, key), max_steps=MAX_TURNS,
                             verbosity_level=LogLevel.OFF)
    return agent.run(question)

def play_smolagents_code(base_url, key, question, calculate):
    """It runs what the model writes. The policy writes no Python, but t1[12+3] and A15.: so the marks of a piece of
    code and what runs it are ours, as the agent's arguments allow."""
    from smolagents import CodeAgent, LogLevel
    from smolagents.local_python_executor import CodeOutput, PythonExecutor

    class Executor(PythonExecutor):
        def send_tools(self, tools):
            pass

        def send_variables(self, variables):
            pass

        def __call__(self, code_action):
            if code_action.startswith("A"):
                return CodeOutput(output=code_action, logs="", is_final_answer=True)
            return CodeOutput(output=None, logs=calculate(code_action), is_final_answer=False)
    agent = CodeAgent([], smolagents_model(base_url, key), max_steps=MAX_TURNS, verbosity_level=LogLevel.OFF,
                      executor=Executor(), code_block_tags=(r"(?:t\d\[|(?=A))", "]"))
    return agent.run(question)

class Shell:
    """mini-swe-agent's environment, in place of its shell: a command is an expression, or with text the whole reply of
    the policy."""

    def __init__(self, calculate):
        self.calculate = calculate
        self.config = None

    def execute(self, action, cwd=""):
        from minisweagent.exceptions import Submitted
        command = action["command"]
        if command.startswith("A"):
            raise Submitted({"role": "exit", "content": command,
                             "extra": {"exit_status": "Submitted", "submission": command}})
        call = re.fullmatch(r"t\d\[(.*)\]", command)
        return {"output": self.calculate(call[1] if call else command), "returncode": 0, "exception_info": ""}

    def get_template_vars(self, **kwargs):
        return {"system": "Linux", "release": "1", "version": "1", "machine": "none", **kwargs}

    def serialize(self):
        return {}

def mini_swe_agent(make_model, config_file, base_url, key, question, calculate, **changes):
    """One episode with the templates that it ships.

    make_model    one of its model classes
    config_file   of its folder config
    changes       fields of the model's config
    """
    import litellm
    import yaml
    from minisweagent import package_dir
    from minisweagent.agents.default import DefaultAgent
    litellm.suppress_debug_info = True
    config = yaml.safe_load((package_dir / "config" / config_file).read_text())
    model_config = config["model"] | changes
    model_config["model_kwargs"] = dict(base_url=base_url, api_key=key, timeout=TIMEOUT_S, drop_params=True)
    config["agent"].pop("mode", None)  # of its interactive agent alone
    config["agent"] |= dict(step_limit=MAX_TURNS, max_consecutive_format_errors=1)
    agent = DefaultAgent(make_model(model_name="openai/policy", **model_config), Shell(calculate), **config["agent"])
    outcome = agent.run(question)
    if outcome["exit_status"] == "Submitted":
        return outcome["submission"]

    # a reply without a call ends the episode: it is the answer
    response = agent.messages[-2].get("extra", {}).get("response") if len(agent.messages) > 1 else None
    return response["choices"][0]["message"]["content"] if response else None

def play_mini_swe_agent(base_url, key, question, calculate):
    from minisweagent.models.litellm_model import LitellmModel
    return mini_swe_agent(LitellmModel, "mini.yaml", base_url, key, question, calculate)

def play_mini_swe_agent_text(base_url, key, question, calculate):
    from minisweagent.models.litellm_textbased_model import LitellmTextbasedModel
    return mini_swe_agent(LitellmTextbasedModel, "default.yaml", base_url, key, question, calculate,
                          action_regex=r"(t\d\[.*?\]|A.*?\.)")

def openai_agent(base_url, key, calculate):
    """-> an agent, and with what it is run: the base URL is of one episode. The library's own client, one for all of
    a process, belongs to one event loop, so it gets ours."""
    from agents import Agent, OpenAIProvider, RunConfig, function_tool
    from openai import AsyncOpenAI

    @function_tool
    def calculator(expression: str) -> str:
        """One operation on two whole numbers, as 12+3"""
        return calculate(expression)
    agent = Agent(name="Calculator", instructions=INSTRUCTIONS, model="policy", tools=[calculator])
    client = AsyncOpenAI(base_url=base_url, api_key=key, http_client=async_connections())
    config = RunConfig(model_provider=OpenAIProvider(openai_client=client), tracing_disabled=True)
    return agent, config

def play_openai_agents(base_url, key, question, calculate):
    from agents import Runner
    agent, config = openai_agent(base_url, key, calculate)
    result = await_it(Runner.run(agent, question, max_turns=MAX_TURNS, run_config=config))
    return result.final_output

def play_openai_agents_stream(base_url, key, question, calculate):
    from agents import Runner
    agent, config = openai_agent(base_url, key, calculate)

    async def episode():
        result = Runner.run_streamed(agent, question, max_turns=MAX_TURNS, run_config=config)
        async for _ in result.stream_events():
            pass
        return result.final_output
    return await_it(episode())

CLIENTS = {
    "openai": play_openai,
    "openai-async": play_openai_async,
    "openai-stream": play_openai_stream,
    "litellm": play_litellm,
    "smolagents": play_smolagents,
    "smolagents-code": play_smolagents_code,
    "mini-swe-agent": play_mini_swe_agent,
    "mini-swe-agent-text": play_mini_swe_agent_text,
    "openai-agents": play_openai_agents,
    "openai-agents-stream": play_openai_agents_stream,
}

def play(client, base_url, key, question, calculate):
    """One episode of a client -> its answer, a text, or None where it gave none."""
    return CLIENTS[client](base_url, key, question, calculate)

# ---- the launcher ----------------------------------------------------------------------------------

def post(url, key, body):
    """A request of the launcher's -> the JSON object that answers it."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {
        "Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_S + TIMEOUT_S) as reply:
        return json.load(reply)

def is_right(answer, expected):
    """The policy's A15. is an answer, and so is what a gateway makes of it, 15."""
    found = re.fullmatch(r"A?(-?\d+)\.?", str(answer).strip())
    return bool(found) and found[1] == str(expected)

class Outcome(typing.NamedTuple):
    """Of one episode."""
    reward: float
    success: bool
    seconds: float                     # of the agent
    error: Exception | None            # that ended it

def is_gateways(error):
    """Whether an agent failed because its policy could not be reached, or broke: all clients speak through openai."""
    import openai
    while error:
        if isinstance(error, openai.APIConnectionError | openai.InternalServerError):
            return True
        error = error.__cause__ or error.__context__
    return False

def run_episode(client, url, key, task):
    """Play a task, and say what it was worth: nothing, where the agent failed, but if that was the gateway's fault, the
    episode is left to its deadline."""
    calculator = Calculator()
    question = task["messages"][-1]["content"]
    answer = None
    failure = None
    started = time.monotonic()
    try:
        answer = play(client, task["base_url"], key, question, calculator)
    except Exception as error:
        if is_gateways(error):
            raise
        failure = error
    seconds = time.monotonic() - started

    success = is_right(answer, task["answer"])
    reward = float(success) + MALFORMED * calculator.n_malformed
    post(f"{url}/v1/finish", key, {"task": task["task"], "reward": reward, "success": success})
    return Outcome(reward, success, seconds, failure)

class Tally:
    """What N agents have done so far; they are threads."""

    def __init__(self, episodes):
        self.left = episodes           # that nobody has begun
        self.lock = threading.Lock()
        self.rewards = []
        self.successes = 0
        self.seconds = []
        self.failed = {}               # what went wrong -> how often
        self.last = time.monotonic()   # when an episode ended last

    def take(self):
        """One more episode to play? -> bool"""
        with self.lock:
            if self.left <= 0 or time.monotonic() - self.last > GIVE_UP_S:
                return False
            self.left -= 1
            return True

    def put_back(self):
        """The episode that was taken could not begin."""
        with self.lock:
            self.left += 1

    def stop(self):
        with self.lock:
            self.left = -math.inf

    def add(self, outcome):
        with self.lock:
            self.rewards.append(outcome.reward)
            self.successes += outcome.success
            self.seconds.append(outcome.seconds)
            self.last = time.monotonic()

    def fail(self, error):
        """Count an error; the first of a kind is shown."""
        kind = type(error).__name__
        with self.lock:
            self.failed[kind] = self.failed.get(kind, 0) + 1
            is_new = self.failed[kind] == 1
        if is_new:
            print(f"{kind}: {str(error)[:300]}", file=sys.stderr, flush=True)

    def line(self):
        with self.lock:
            n = len(self.rewards)
            recent = self.rewards[-50:]
            mean = sum(recent) / len(recent) if recent else 0.0
            return f"{n} episodes | reward of the last {len(recent)}: {mean:.2f} | failed {sum(self.failed.values())}"

def work(client, url, key, tally):
    """One episode after the other, until there are enough, or the run is over. A gateway that is down for a while, as
    when its run is started again, is asked again."""
    while tally.take():
        try:
            task = post(f"{url}/v1/tasks", key, {"wait": WAIT_S})
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 503:
                tally.stop()
                return
            tally.fail(error)
            tally.put_back()
            time.sleep(RETRY_S)
            continue

        try:
            outcome = run_episode(client, url, key, task)
        except Exception as error:
            tally.fail(error)
            time.sleep(RETRY_S)
            continue
        if outcome.error:
            tally.fail(outcome.error)
        tally.add(outcome)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of rl.py --serve, as http://127.0.0.1:8000")
    parser.add_argument("key", help="what rl.py got with --token")
    parser.add_argument("--client", choices=CLIENTS, default="openai")
    parser.add_argument("--agents", type=int, default=8, help="at the same time, as threads (default 8)")
    parser.add_argument("--episodes", type=int, default=200, help="in all (default 200)")
    args = parser.parse_args(argv)

    tally = Tally(args.episodes)
    started = time.monotonic()
    agents = [threading.Thread(target=work, args=(args.client, args.url, args.key, tally), daemon=True)
              for _ in range(args.agents)]
    for agent in agents:
        agent.start()
    next_line = started + LINE_S
    while any(agent.is_alive() for agent in agents):
        time.sleep(0.05)
        if time.monotonic() < next_line:
            continue
        next_line += LINE_S
        print(f"{args.client} | {tally.line()} | {time.monotonic() - started:.0f} s", flush=True)

    n = len(tally.rewards)
    seconds = sorted(tally.seconds)
    result = {
        "client": args.client,
        "episodes": n,
        "failed": tally.failed,
        "reward": sum(tally.rewards) / n if n else None,
        "solved": tally.successes / n if n else None,
        "episode_s": seconds[n // 2] if n else None,
        "episodes_per_s": n / (time.monotonic() - started),
        "cpu_s": time.process_time(),
    }
    print(json.dumps(result))
    return result

if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)                        # some libraries leave threads behind
