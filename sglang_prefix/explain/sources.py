"""Where a record comes from: a tree in PAT's notation, prompts, a running server, a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray

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
    "parse_query_lens",
    "plan_of_prompts",
    "plan_of_server",
    "plan_of_tree",
]

IntArray = NDArray[np.int64]

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


def parse_query_lens(text: str, num_requests: int) -> list[int]:
    """Query tokens of each request behind ``N`` for all of them, or ``N1,N2,..``.

    Raises:
        ValueError: it is something else, or of another batch; the message says what is legal.
    """
    words = text.split(",")
    numbers = [int(n) if n.isascii() and n.isdigit() and len(n) < 9 else 0 for n in words]
    if 0 in numbers:
        raise ValueError(
            f"--query-lens is {text}; legal: N for all requests, or N1,N2,.., one for each; each "
            "at least 1, and at most the tokens of its request"
        )
    if len(numbers) not in (1, num_requests):
        raise ValueError(
            f"--query-lens has {len(numbers)} numbers; legal: 1 for all requests, or "
            f"{num_requests:,}, as many as there are requests"
        )
    return numbers * num_requests if len(numbers) == 1 else numbers


def plan_of_tree(text: str, setting: Setting, query_lens: str | None = None) -> PlanRecord:
    """Plan a tree ``n1,n2,.._l1,l2,..``: level k has ``n_k`` nodes of ``l_k`` tokens.

    Args:
        text: the tree.
        setting: what the plan is made for.
        query_lens: as of :func:`parse_query_lens`, the newest tokens of the last level; None for
            one of each request.

    Raises:
        ValueError: the tree is malformed, or its requests have not so many tokens.
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
    counts = None if query_lens is None else parse_query_lens(query_lens, len(lens))
    return _plan(forest, f"tree {text}", setting, counts)


def plan_of_prompts(
    path: Path, tokenizer: str, setting: Setting, query_lens: str | None = None
) -> PlanRecord:
    """Plan the first decode step of prompts, one per line or a JSON list of texts.

    Every request then holds its prompt and one token more, which nobody shares, or as many as it
    has query tokens: the prompt is what is cached.

    Args:
        path: the file.
        tokenizer: of the model.
        setting: what the plan is made for.
        query_lens: as of :func:`parse_query_lens`; None for one of each request.

    Raises:
        ValueError: the file holds no prompts, the tokenizer cannot be loaded, or ``query_lens`` is
            of another batch.
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
    counts = None if query_lens is None else parse_query_lens(query_lens, len(ids))
    new_tokens = 1 if counts is None else np.array(counts)
    forest = forest_of_prompts(ids, new_tokens, page_size=setting.page_size)
    step = "first decode step of" if counts is None else "first tokens behind"
    source = one_line(f"{step} {len(ids)} prompts in {path}")
    return _plan(forest, source, setting, counts)


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
    prompts: Sequence[Sequence[int]], new_tokens: int | IntArray, *, page_size: int = 1
) -> PrefixForest:
    """What prompts, as token ids, share when each has tokens more that nobody shares.

    Args:
        prompts: [B] the token ids of each.
        new_tokens: how many more all have, or each of them has, [B].
        page_size: tokens per KV page.
    """
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


def _plan(
    forest: PrefixForest, source: str, setting: Setting, query_lens: list[int] | None
) -> PlanRecord:
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
    num_rows = sum(query_lens or []) or forest.batch_size
    if device == "cpu":
        profile, answer = CPU_PROFILE, Answer("auto", None)
    else:
        limits = H200 if device == "h200" else limits_of(torch.device("cuda"))
        shape = setting.shape
        launches = LaunchSetting(tile_shape(shape, gpu), shape.group_size, limits.num_sms)
        # As in a decode graph of that size.
        profile = gpu_profile(launches, limits.read_bytes_per_s, padded_batch_size=num_rows)
        answer = Answer("auto", "gate-nothing-shared")
    plan = ShapePlan(1, setting.policy, None, setting.shape, profile)
    record = PlanRecord(
        source=source,
        page_size=setting.page_size,
        neighbours=Neighbours.of(forest),
        plans=(plan,),
        answer=answer,
        graph_rows=num_rows if device != "cpu" else None,
        gpu=gpu,
        notes=(note,),
        query_lens=query_lens,
    )
    try:
        forest = record.forest()
    except ValueError as error:
        raise ValueError(f"--query-lens: {error}") from None
    if device != "cpu" and forest.num_nodes:
        return replace(record, answer=_ask_gate(record, forest, device, setting.stock_backend))
    return record


def _ask_gate(record: PlanRecord, forest: PrefixForest, device: str, stock_backend: str) -> Answer:
    """The answer for a batch that comes after one that was not packed."""
    import torch

    from sglang_prefix.gate import H200, Gate, limits_of

    limits = H200 if device == "h200" else limits_of(torch.device("cuda"))
    plan = record.plans[0].plan(forest, record.queries)
    decision = Gate(limits, stock_backend).choose([(plan, 1)], forest)
    return Answer("auto", *decision[1:], stock_backend)
