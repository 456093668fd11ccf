"""Rollouts with the offline engine: n samples per prompt, as in RL, best-of-n and voting.

Run it in an environment where SGLang works; on a host without a GPU::

    sglang-prefix tiny-model tiny
    sglang-prefix exec -- python examples/offline_rollouts.py --model-path tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sglang
import torch

PROMPTS = ("Prove that the sum of two even numbers is even. " * 12, "Sort four cards. " * 30)


def main() -> None:
    """Sample every prompt n times and show what decode attention read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--n", type=int, default=8, help="samples per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    if arguments.n < 1:
        parser.error(f"--n {arguments.n}; legal: 1 and above")
    path = Path(arguments.model_path)
    if path.exists() and not (path / "config.json").exists():
        parser.exit(1, f"{path} holds no config.json; is it a model?\n")

    on_cpu = {"device": "cpu", "mem_fraction_static": 0.7}
    engine = sglang.Engine(
        model_path=arguments.model_path,
        decode_attention_backend="prefix",
        max_total_tokens=40_000,
        log_level="warning",
        **({} if torch.cuda.is_available() else on_cpu),
    )
    try:
        sampling = {
            "n": arguments.n,
            "temperature": 1.0,
            "max_new_tokens": arguments.max_new_tokens,
            "ignore_eos": True,
        }
        outputs = engine.generate(list(PROMPTS), sampling_params=sampling)
        for index, output in enumerate(outputs):
            print(
                f"prompt {index // arguments.n}, sample {index % arguments.n}: {output['text']!r}"
            )
        counters = engine.get_server_info()["internal_states"][0]["sglang_prefix"][0]
        print(f"decode steps packed: {counters['packed_steps']}")
        print(f"KV tokens read / KV tokens: {counters['kv_read_ratio']:.3f}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine's processes are spawned and import this file again
    main()
