"""Fork a prompt in SGLang's frontend language: the branches share their prefix in decode.

Start a server first, then run this against it::

    examples/serve.sh
    sglang-prefix exec -- python examples/frontend_fork.py --base-url http://127.0.0.1:30000

``exec`` is for hosts without a GPU, where the frontend language does not import without it.

A server that was started with ``--api-key`` wants its key: in ``--api-key``, or in the environment
as ``SGLANG_API_KEY`` or ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import argparse
import os
import urllib.error

import sglang as sgl

DOCUMENT = "A note on trees. " + "Every branch grows from the same trunk and reads it once. " * 20
QUESTIONS = ("What grows?", "From where?", "Who reads the trunk?", "How often?")


@sgl.function
def ask(s, document: str, questions: tuple[str, ...]) -> None:
    """Read the document once, then answer all questions side by side."""
    s += document
    s.text()  # `fork` sends the common prefix ahead only if its text is already known
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += "\nQuestion: " + question + "\nAnswer:"
        branch += sgl.gen("answer", max_tokens=16, temperature=0, ignore_eos=True)
    branches.join()
    s["answers"] = [branch["answer"] for branch in branches]


def main() -> None:
    """Run the program against a server and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    key = os.environ.get("SGLANG_API_KEY") or os.environ.get("OPENAI_API_KEY")
    parser.add_argument("--api-key", default=key, help="default: SGLANG_API_KEY or OPENAI_API_KEY")
    arguments = parser.parse_args()
    try:
        sgl.set_default_backend(sgl.RuntimeEndpoint(arguments.base_url, arguments.api_key))
    except RuntimeError as error:  # of an answer that is an error
        if "Unauthorized" not in str(error):
            raise
        parser.exit(1, "the server wants its key: --api-key, SGLANG_API_KEY or OPENAI_API_KEY\n")
    except urllib.error.URLError as error:
        why = f"no server answers at {arguments.base_url} ({error.reason})"
        parser.exit(1, f"{why}; start examples/serve.sh\n")
    state = ask.run(document=DOCUMENT, questions=QUESTIONS)
    for question, answer in zip(QUESTIONS, state["answers"], strict=True):
        print(f"{question} -> {answer!r}")


if __name__ == "__main__":
    main()
