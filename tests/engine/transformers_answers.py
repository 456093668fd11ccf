"""What a model answers in Transformers, whose eager attention shares nothing with SGLang or us."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tests.engine.driver import Request, SectionResult

__all__ = ["transformers_answers"]


@torch.inference_mode()
def transformers_answers(
    folder: str, requests: Iterable[Request], *, sinks: bool = True
) -> SectionResult:
    """Greedy answers in float32, one request after another, every token from the whole sequence.

    Args:
        folder: of the model.
        requests: what is asked.
        sinks: False to leave the attention sinks out.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if not sinks:
        for name, parameter in model.named_parameters():
            if name.endswith(".sinks"):
                parameter.fill_(-torch.inf)
    answers: dict[str, dict[str, Any]] = {}
    for request in requests:
        tokens, logprobs = torch.tensor([request.prompt]), []
        for _ in range(request.max_new_tokens):
            last = model(tokens, use_cache=False).logits[0, -1].log_softmax(-1)
            logprobs.append(float(last.max()))
            tokens = torch.cat((tokens, last.argmax().view(1, 1)), dim=1)
        answers[request.rid] = {
            "output_ids": tokens[0, len(request.prompt) :].tolist(),
            "logprobs": logprobs,
            "finish": "length",
        }
    return SectionResult(answers, {})
