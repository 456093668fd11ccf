"""Where a record comes from: a tree in PAT's notation, prompts, a running server, a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests

from sglang_prefix.api_key import ApiKey, ask_json, why_failed
from sglang_prefix.explain.record import Answer, Neighbours, PlanRecord, ShapePlan, find_plan
from sglang_prefix.explain.segments import tile_shape
from sglang_prefix.files import one_line, parse_json, read_text
from sglang_prefix.forest import PrefixForest, RadixPath
from sglang_prefix.packing import CPU_PROFILE, AttentionShape
from sglang_prefix.packing.gpu import gpu_profile

__all__ = [
    "Setting",
    "forest_of_prompts",
    "load_tokenizer",
    "parse_heads",
    "plan_of_prompts",
    "plan_of_server",
    "plan_of_tree",
]

_MAX_HEADS = 1 << 16
_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}

_SERVER_TIMEOUT_S = 10
# Prompts stand in a table as wide as the longest: 256 of 128k tokens, in 256 MiB.
_MAX_TABLE = 1 << 25


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan is made for, where no server says so.

    Attributes:
        shape: heads and item sizes.
        device: "cpu"; "h200", by its data sheet; "cuda", the GPU of this machine; None for what is
            here.
        policy: name of the packing policy.
        page_size: tokens per KV page.
        stock_backend: what the gate compares with on a GPU.
    """

    shape: AttentionShape
    device: str | None = None
    policy: str = "pat"
    page_size: int = 1
    stock_backend: str = "fa3"


def parse_heads(heads: str, dtype: str) -> AttentionShape:
    """The shape behind ``QO,KV,DIM[,V]``.

    Raises:
        ValueError: it is something else; the message says what is legal.
    """
    words = heads.split(",")
    # Of more digits than Python reads none is legal.
    numbers = [int(n) if n.isascii() and n.isdigit() and len(n) < 9 else 0 for n in words]
    is_legal = len(numbers) in (3, 4) and all(0 < number < _MAX_HEADS for number in numbers)
    if not is_legal or numbers[0] % numbers[1]:
        raise ValueError(
            f"--heads is {heads}; legal: QO,KV,DIM or QO,KV,DIM,V, each from 1 to "
            f"{_MAX_HEADS - 1}, where QO is a multiple of KV"
        )
    (num_qo_heads, num_kv_heads, head_dim, *_), itemsize = numbers, _ITEMSIZES[dtype]
    return AttentionShape(num_qo_heads, num_kv_heads, head_dim, numbers[-1], itemsize, itemsize)


def plan_of_tree(text: str, setting: Setting) -> PlanRecord:
    """Plan a tree ``n1,n2,.._l1,l2,..``: level k has ``n_k`` nodes of ``l_k`` tokens.

    Raises:
        ValueError: the tree is malformed.
    """
    from sglang_prefix.bench.workloads.trees import pat_tree

    tree = pat_tree(text)
    paths = []
    for request in range(len(tree.leaf)):
        nodes = tree.path(request)
        ends = np.cumsum(tree.length[nodes]).tolist()
        paths.append(RadixPath(tuple(nodes), tuple(ends)))
    lens = [path.ends[-1] for path in paths]
    forest = PrefixForest.from_paths(paths, lens, lens, page_size=setting.page_size)
    return _plan(forest, f"tree {text}", setting)


def plan_of_prompts(path: Path, tokenizer: str, setting: Setting) -> PlanRecord:
    """Plan the first decode step of prompts, one per line or a JSON list of texts.

    Every request then holds its prompt and one token more, which nobody shares.

    Raises:
        ValueError: the file holds no prompts, or the tokenizer cannot be loaded.
        OSError: the file cannot be read.
    """
    prompts = read_prompts(path)
    ids = [*map(load_tokenizer(tokenizer).encode, prompts)]
    lens = [len(row) for row in ids]
    if not all(lens):
        raise ValueError(f"{path}: prompt {lens.index(0) + 1} has no tokens")
    if len(lens) * max(lens) > _MAX_TABLE:
        raise ValueError(
            f"{path} has {len(lens):,} prompts of up to {max(lens):,} tokens; legal: up to "
            f"{_MAX_TABLE:,} in number times length"
        )
    forest = forest_of_prompts(ids, 1, page_size=setting.page_size)
    source = one_line(f"first decode step of {len(ids)} prompts in {path}")
    return _plan(forest, source, setting)


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers'.

    Raises:
        ValueError: it cannot be loaded; one line.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"cannot load a tokenizer from {name}: {message}") from None


def forest_of_prompts(
    prompts: Sequence[Sequence[int]], new_tokens: int, *, page_size: int = 1
) -> PrefixForest:
    """What prompts, as token ids, share when each has tokens more that nobody shares."""
    lens = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    # Equal tokens from the start on stand in the same slots, so they serve as rows here.
    rows = np.full((len(prompts), int(lens.max())), -1, dtype=np.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return PrefixForest.from_rows(rows, lens + new_tokens, limits=lens, page_size=page_size)


def read_prompts(path: Path) -> list[str]:
    """Texts of a JSON list, or the lines that are not empty.

    Raises:
        ValueError: there are none, or the list holds something else.
        OSError: the file cannot be read.
    """
    try:
        text = read_text(path)
        is_list = text.lstrip().startswith("[")
        lines = [line for line in text.splitlines() if line.strip()]
        prompts: Any = parse_json(text) if is_list else lines
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError(f"{path} has no prompts; legal: one per line, or a JSON list of texts")
    return list(prompts)


def plan_of_server(base_url: str, key: ApiKey) -> PlanRecord:
    """The last plan of a running server, to which ``key`` opens.

    Raises:
        ValueError: nobody answers there, or the server shows no plan; the message says how.
    """
    url = base_url.rstrip("/") + "/server_info"
    try:
        data = ask_json(url, key, timeout_s=_SERVER_TIMEOUT_S)
    except (requests.ConnectionError, requests.Timeout) as error:
        why = why_failed(error, url, key)
        raise ValueError(f"--base-url: no server answers at {url}: {why}") from None
    except requests.HTTPError as error:
        raise ValueError(f"--base-url {url}: {why_failed(error, url, key)}") from None
    except requests.RequestException as error:
        why = f"not an answer of SGLang's ({_one_line(error)})"
        raise ValueError(f"--base-url {url}: {why}") from None
    try:
        return find_plan(data)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plan(forest: PrefixForest, source: str, setting: Setting) -> PlanRecord:
    import torch

    from prefix_kernels.launches import LaunchSetting
    from sglang_prefix.gate import H200, limits_of

    has_gpu = torch.cuda.is_available()
    device = setting.device or ("cuda" if has_gpu else "cpu")
    if device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: there is no GPU here; legal here: cpu, h200")
    gpu = str(torch.cuda.get_device_name()) if device == "cuda" else None
    where = {
        "cpu": "a CPU",
        "h200": "the Triton kernels on an H200, by its data sheet, not by measurement",
        "cuda": f"the Triton kernels on this machine's GPU ({gpu})",
    }
    note = f"planned for {where[device]}"
    if setting.device is None:
        others = ", ".join(f"--device {name}" for name in where if name != device)
        note += f", as this machine has it; others: {others}"
    if device == "cpu":
        profile, answer = CPU_PROFILE, Answer("auto", None)
    else:
        limits = H200 if device == "h200" else limits_of(torch.device("cuda"))
        shape = setting.shape
        launches = LaunchSetting(tile_shape(shape, gpu), shape.group_size, limits.num_sms)
        # As in a decode graph of that size.
        profile = gpu_profile(
            launches, limits.read_bytes_per_s, padded_batch_size=forest.batch_size
        )
        answer = Answer("auto", "gate-nothing-shared")
    plan = ShapePlan(1, setting.policy, None, setting.shape, profile)
    if device != "cpu" and forest.num_nodes:
        answer = _ask_gate(forest, plan, device, setting.stock_backend)
    return PlanRecord(
        source=source,
        page_size=setting.page_size,
        neighbours=Neighbours.of(forest),
        plans=(plan,),
        answer=answer,
        graph_rows=forest.batch_size if device != "cpu" else None,
        gpu=gpu,
        notes=(note,),
    )


def _ask_gate(forest: PrefixForest, plan: ShapePlan, device: str, stock_backend: str) -> Answer:
    """The answer for a batch that comes after one that was not packed."""
    import torch

    from sglang_prefix.gate import H200, Gate, limits_of

    limits = H200 if device == "h200" else limits_of(torch.device("cuda"))
    decision = Gate(limits, stock_backend).choose([(plan.plan(forest), 1)], forest)
    return Answer("auto", *decision[1:], stock_backend)
