"""The client process of `bench serving`: ``python -m sglang_prefix.bench.serving.client``.

SGLang's load generator needs SGLang to import, which on a host without a GPU takes the stand-in
kernels, and it prints a lot: so it runs in a process of its own, for all workloads and servers.
Orders come as JSON lines on standard input, answers go as JSON lines to standard output;
everything that is printed goes to standard error. The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

__all__ = ["Client", "main"]


class Client:
    """What can be ordered; every public method is an order.

    Args:
        model: folder or name of the model.
        tokenizer: folder or name of its tokenizer.
        trace: file of a trace, or None.
        seed: of all requests.
    """

    def __init__(self, model: str, tokenizer: str, trace: str | None, seed: int) -> None:
        from prefix_patches import load_generator

        if missing := load_generator.missing():
            raise RuntimeError(f"this SGLang lacks {', '.join(missing)}")
        self._names = (model, tokenizer)
        try:
            self._tokenizer = load_generator.load_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise ValueError(f"cannot load a tokenizer from {tokenizer}: {cause}") from None
        self._trace, self._seed = trace, seed
        self._drivers: dict[str, Any] = {}

    def prepare(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Make the requests of a workload."""
        from sglang_prefix.bench.serving import drivers, forks
        from sglang_prefix.bench.serving.workloads import DRIVERS, Workload

        given = Workload(**workload)
        shape = DRIVERS[given.driver]
        driver: drivers.Driver
        if given.driver == "rollouts":
            parameters: Any = shape(**given.parameters) if shape else None
            driver = drivers.RolloutDriver(parameters, self._tokenizer, self._seed)
        elif given.driver == "forks":
            parameters = shape(**given.parameters) if shape else None
            driver = forks.ForkDriver(parameters, self._tokenizer)
        else:
            model, name = self._names
            driver = drivers.BenchServing(
                given, model, name, self._tokenizer, self._trace, self._seed
            )
        self._drivers[given.name] = driver
        return {
            "fingerprint": driver.fingerprint(),
            "flags": getattr(driver, "flags", None),
            "replay_s": getattr(driver, "replay_s", 0.0),
        }

    def check(self, name: str, url: str) -> list[list[int]]:
        """Send a workload for its token ids."""
        from sglang_prefix.bench.serving.drivers import flush

        flush(url)
        answers: list[list[int]] = self._drivers[name].check(url)
        return answers

    def measure(self, name: str, url: str) -> dict[str, Any]:
        """Send a workload for its times, on an empty cache."""
        from sglang_prefix.bench.serving.drivers import flush

        flush(url)
        found: dict[str, Any] = self._drivers[name].measure(url)
        return found


def _told(error: Exception) -> str:
    """An error in one line; the type of ours says nothing that the line does not."""
    lines = str(error).strip().splitlines()
    if not lines:
        return repr(error)
    is_ours = type(error) in (RuntimeError, ValueError)
    return lines[-1] if is_ours else f"{type(error).__name__}: {lines[-1]}"


def main() -> None:
    """Make the client that the first line describes, then do what the others say."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    client: Client | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if client is None:
                client = Client(**order)
                result: Any = None
            else:
                result = getattr(client, order.pop("order"))(**order)
            answers.write(json.dumps({"result": result}) + "\n")
        except Exception as error:  # whatever it is, the other process has to tell the user
            traceback.print_exc()
            answers.write(json.dumps({"error": _told(error)}) + "\n")


if __name__ == "__main__":
    main()
