"""Several samples of one prompt through the OpenAI client: they share the whole prompt in decode.

Start a server first, then run this against it::

    examples/serve.sh
    python examples/openai_n.py --base-url http://127.0.0.1:30000 --n 8

A server that was started with ``--api-key`` wants its key: in ``--api-key``, or in the environment
as ``SGLANG_API_KEY`` or ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import argparse
import os

import openai

PROMPT = "Think of a number between one and ten and say why. " * 20


def main() -> None:
    """Ask for n samples and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    key = os.environ.get("SGLANG_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    parser.add_argument("--api-key", default=key, help="default: SGLANG_API_KEY or OPENAI_API_KEY")
    parser.add_argument("--n", type=int, default=8, help="samples of the prompt")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=f"{arguments.base_url}/v1", api_key=arguments.api_key)
    try:
        model = client.models.list().data[0].id
    except openai.APIConnectionError:
        parser.exit(1, f"no server answers at {arguments.base_url}; start examples/serve.sh\n")
    except openai.AuthenticationError:
        parser.exit(1, "the server wants its key: --api-key, SGLANG_API_KEY or OPENAI_API_KEY\n")
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        n=arguments.n,
        max_tokens=16,
        temperature=0.8,
        seed=0,
    )
    for choice in response.choices:
        print(f"{choice.index}: {choice.message.content!r}")


if __name__ == "__main__":
    main()
