"""Several samples of one prompt through the OpenAI client: they share the whole prompt in decode.

Start a server first, then run this against it::

    examples/serve.sh
    python examples/openai_n.py --base-url http://127.0.0.1:30000 --n 8
"""

from __future__ import annotations

import argparse

import openai

PROMPT = "Think of a number between one and ten and say why. " * 20


def main() -> None:
    """Ask for n samples and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--n", type=int, default=8, help="samples of the prompt")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=f"{arguments.base_url}/v1", api_key="none")
    try:
        model = client.models.list().data[0].id
    except openai.APIConnectionError:
        parser.exit(1, f"no server answers at {arguments.base_url}; start examples/serve.sh\n")
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
