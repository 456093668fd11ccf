"""Several agents that share a system prompt with tool descriptions, through the OpenAI client.

In each turn every agent drafts a few candidate answers to its own conversation. So one decode batch
holds a tree: the system prompt, read by all, under it each agent's history, read by its drafts.

Start a server first, then run this against it::

    examples/serve.sh
    python examples/agents_with_tools.py --base-url http://127.0.0.1:30000

A server that was started with ``--api-key`` wants its key: in ``--api-key``, or in the environment
as ``SGLANG_API_KEY`` or ``OPENAI_API_KEY``.

The tools really run. Which one is called is what the model says, in a line such as
``CALL price oak``; where it says nothing of the kind, as a random model will, the agent's own plan
decides. So the program works with any model, and always takes the same steps with a random one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import urllib.request
from typing import Any, NamedTuple

import openai

STOCK = {"oak": (7, 120), "birch": (12, 80), "cedar": (3, 200), "maple": (9, 95)}


def price(tree: str) -> str:
    return f"one {tree} costs {STOCK[tree][1]} euros"


def count(tree: str) -> str:
    return f"{STOCK[tree][0]} {tree} trees are left"


TOOLS = {"price": price, "count": count}

# Real systems describe dozens of tools here. All agents read it at every token of every turn.
SYSTEM = (
    "You sell trees. Think in one short sentence, then call a tool by a line of its own.\n"
    + "".join(
        f"CALL {name} TREE tells the {name} of a tree; TREE is one of {', '.join(STOCK)}. "
        "Ask for one tree at a time and wait for the answer before you go on.\n"
        for name in TOOLS
    )
    * 4
)
_CALL = re.compile(r"^CALL (\w+) (\w+)\s*$", re.MULTILINE)


class Call(NamedTuple):
    """A tool and the tree that it is asked about."""

    tool: str
    tree: str


def chosen_call(text: str, planned: Call) -> Call:
    """The first legal call in what the model wrote, else the planned one."""
    for tool, tree in _CALL.findall(text):
        if tool in TOOLS and tree in STOCK:
            return Call(tool, tree)
    return planned


async def run_agent(
    client: openai.AsyncOpenAI, model: str, index: int, turns: int, drafts: int
) -> list[str]:
    """One agent's conversation; returns a line per turn."""
    trees = list(STOCK)
    tree = trees[index % len(trees)]
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"I am customer {index}. Tell me all about the {tree}."},
    ]
    lines = []
    for turn in range(turns):
        response = await client.chat.completions.create(
            model=model,
            messages=messages,
            n=drafts,  # the drafts share the whole conversation
            max_tokens=24,
            temperature=0.8,
            seed=turn,
        )
        text = response.choices[0].message.content or ""
        call = chosen_call(text, Call(list(TOOLS)[turn % len(TOOLS)], tree))
        result = TOOLS[call.tool](call.tree)
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": f"RESULT {result}. Go on."})
        lines.append(f"agent {index}, turn {turn}: {call.tool}({call.tree}) -> {result}")
    return lines


def counters(base_url: str, key: str) -> dict[str, int]:
    """What the backend has counted so far."""
    header = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{base_url}/server_info", headers=header)
    with urllib.request.urlopen(request, timeout=60) as answer:
        states = json.loads(answer.read(1 << 25))["internal_states"][0]
    return dict(states.get("sglang_prefix", [{}])[0])


async def run(base_url: str, key: str, agents: int, turns: int, drafts: int) -> None:
    """All agents at once."""
    client = openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key=key)
    model = (await client.models.list()).data[0].id
    before = counters(base_url, key)
    results = await asyncio.gather(
        *(run_agent(client, model, index, turns, drafts) for index in range(agents))
    )
    for line in (line for lines in results for line in lines):
        print(line)
    after = counters(base_url, key)
    if not after:
        print("this server runs without --decode-attention-backend prefix")
        return
    packed, read, logical = (
        after[name] - before[name]
        for name in ("packed_steps", "kv_tokens_read", "kv_tokens_logical")
    )
    print(f"decode steps packed: {packed}")
    print(f"KV tokens read / KV tokens: {read / max(logical, 1):.3f}")


def main() -> None:
    """Run the agents and say what decode attention read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    key = os.environ.get("SGLANG_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    parser.add_argument("--api-key", default=key, help="default: SGLANG_API_KEY or OPENAI_API_KEY")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--drafts", type=int, default=2, help="candidate answers per turn")
    arguments = parser.parse_args()
    for name in ("agents", "turns", "drafts"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}; legal: 1 and above")
    try:
        server = arguments.base_url, arguments.api_key
        asyncio.run(run(*server, arguments.agents, arguments.turns, arguments.drafts))
    except openai.APIConnectionError:
        parser.exit(1, f"no server answers at {arguments.base_url}; start examples/serve.sh\n")
    except openai.AuthenticationError:
        parser.exit(1, "the server wants its key: --api-key, SGLANG_API_KEY or OPENAI_API_KEY\n")


if __name__ == "__main__":
    main()
