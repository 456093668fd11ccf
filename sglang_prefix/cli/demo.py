"""`sglang-prefix demo`: the same forked requests through stock SGLang and through our backend."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sglang_prefix.bench.engine import EngineProcess, engine_environment
from sglang_prefix.bench.hooks import zeros
from sglang_prefix.cli.demo_workload import forked_prompts
from sglang_prefix.cli.options import (
    MAX_REPEATS,
    MAX_REQUESTS,
    JsonOption,
    loadable_model,
    picture_to_write,
)
from sglang_prefix.cli.output import console, fail, say, write_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["demo"]

# The plan may read this much more than the ideal: packing trades short shared segments for fewer
# packs, and the first decode step of a request shares nothing.
_READ_SLACK = 1.5
_MIN_PACKED_SHARE = 0.9
_MIN_CHANGED_SHARE = 0.5
_PICTURES = (".html", ".svg")
# Of the tiny model's KV on the CPU, 2 GiB; the longest question has fewer than 128.
_MAX_PROMPT, _MAX_BATCH_TOKENS, _QUESTION_TOKENS = 1 << 15, 1 << 20, 128
_DECODE = "sglang_prefix.cli.demo_workload:decode"
_COUNTERS = "sglang_prefix.bench.engine:counters"
_HOW_TO_READ = """
The last batch as a tree. A node is KV that several requests share, its readers; a pack reads it
once for all of them. Below are the requests, with what each holds alone.
"""


def demo(
    model_path: Annotated[
        str | None,
        typer.Option(
            help="Model to run. Default: a tiny random one, made here.", callback=loadable_model
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=16, max=MAX_REQUESTS, help="Requests in the batch.")
    ] = 16,
    system_tokens: Annotated[int, typer.Option(min=1500, max=_MAX_PROMPT)] = 1536,
    branch_tokens: Annotated[int, typer.Option(min=16, max=_MAX_PROMPT)] = 256,
    branches: Annotated[
        int, typer.Option(min=2, max=MAX_REQUESTS, help="Forks below the system prompt.")
    ] = 4,
    new_tokens: Annotated[int, typer.Option(min=32, max=_MAX_PROMPT)] = 32,
    rounds: Annotated[
        int, typer.Option(min=1, max=MAX_REPEATS, help="Timed rounds; the median counts.")
    ] = 3,
    dtype: Annotated[
        Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None,
        typer.Option(
            help="Default: float32 on the CPU, where tokens must be equal; auto, the model's, on "
            "a GPU."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the last batch: FILE.html, a page, or FILE.svg, a picture.",
            callback=picture_to_write,
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare stock decode with prefix decode in the real engine: tokens, KV read, time.

    Ends with a tree of the last batch: what it shares, and how it was packed.
    """
    if picture is not None and picture.suffix not in _PICTURES:
        fail(f"--picture is {picture}; legal: a name that ends in {' or '.join(_PICTURES)}", 2)

    longest = system_tokens + branch_tokens + _QUESTION_TOKENS + new_tokens
    if max(requests, branches) * longest > _MAX_BATCH_TOKENS:
        fail(
            f"--requests is {requests} and --branches {branches}, of up to {longest:,} tokens; "
            f"legal: up to {_MAX_BATCH_TOKENS:,} tokens in all",
            2,
        )
    import torch

    from sglang_prefix.explain.sources import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = dtype or ("float32" if device == "cpu" else "auto")
    out = console(json_file)
    with tempfile.TemporaryDirectory(prefix="sglang-prefix-demo-") as folder:
        root = Path(folder)
        model = model_path or _make_model(root / "model", longest)
        try:
            tokenizer = load_tokenizer(model)
        except ValueError as error:
            fail(str(error))
        prompts = forked_prompts(
            tokenizer,
            requests=requests,
            system_tokens=system_tokens,
            branch_tokens=branch_tokens,
            branches=branches,
        )
        arguments = {
            "model_path": model,
            "device": device,
            "dtype": kind,
            "random_seed": 0,
            "log_level": "warning",
        }
        if device == "cpu":
            arguments["mem_fraction_static"] = 0.7
            # Room for the whole batch without sharing: both engines run it in one piece.
            longest = max(map(len, prompts)) + new_tokens
            arguments["max_total_tokens"] = requests * longest + 4096
        else:
            # This release packs on the GPU without graphs only; both engines run alike.
            arguments["disable_cuda_graph"] = True
        stock = _run_engine(root, "stock", arguments, prompts, new_tokens, rounds, out)
        arguments["decode_attention_backend"] = "prefix"
        prefix = _run_engine(root, "prefix", arguments, prompts, new_tokens, rounds, out)
    model = model_path or "tiny random model"
    report = {"device": device, "backend": "prefix", "model": model, "dtype": kind}
    report |= _compare(stock, prefix, prompts, new_tokens, must_be_equal=kind == "float32")
    _print_table(report, out)
    _show_last_plan(report, picture, out)
    write_json(report, json_file)
    if report["problems"]:
        fail("; ".join(report["problems"]))


def _make_model(directory: Path, longest: int) -> str:
    """A model of few weights and much attention, so that decode attention is what takes time."""
    from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

    default = TinyModelConfig(num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64)
    config = replace(default, context_length=max(longest, default.context_length))
    build_tiny_model(directory, config)
    return str(directory)


def _run_engine(
    root: Path,
    backend: str,
    arguments: Mapping[str, Any],
    prompts: list[list[int]],
    new_tokens: int,
    rounds: int,
    out: Console,
) -> dict[str, Any]:
    """Run one engine in a process of its own and show how far it is."""
    control = root / "control"
    settings = {"SGLANG_PREFIX_KEEP_PLAN": "1", zeros.FILE_VARIABLE: str(control)}
    hooks = [zeros.__name__] if backend == "prefix" else []
    environment = engine_environment(settings, hooks=hooks)
    began = time.monotonic()
    with (
        EngineProcess(arguments, environment=environment, log=root / f"{backend}.log") as engine,
        out.status(f"{backend} engine: start") as status,
    ):

        def run(what: str) -> tuple[list[list[int]], float]:
            status.update(f"{backend} engine: {what}")
            done = engine.ask(_DECODE, prompts=prompts, new_tokens=new_tokens)
            return done[0], done[1]

        try:
            engine.wait_until_ready()
            tokens, _ = run("warming up")
            timed = [run(f"round {number + 1} of {rounds}") for number in range(rounds)]
            counters = engine.ask(_COUNTERS)
            broken = tokens
            if hooks:
                control.touch()
                broken, _ = run("control")
        except RuntimeError as error:
            fail(f"the {backend} {error}")
    if any(again != tokens for again, _ in timed):
        fail(f"the {backend} engine gave other greedy tokens the second time")
    out.print(f"{backend} engine: done in {time.monotonic() - began:.0f} s")
    return {
        "output_ids": tokens,
        "decode_seconds": [seconds for _, seconds in timed],
        "counters": counters,
        "control_output_ids": broken,
    }


def _compare(
    stock: dict[str, Any],
    prefix: dict[str, Any],
    prompts: list[list[int]],
    new_tokens: int,
    *,
    must_be_equal: bool,
) -> dict[str, Any]:
    """Put the numbers together, with everything that keeps them from being evidence."""
    from sglang_prefix.explain.sources import forest_of_prompts

    counters, count = prefix["counters"], len(prompts)
    if not counters:
        fail("the prefix engine reported no counters: was the plugin loaded?")
    num_equal, num_same = (
        sum(a == b for a, b in zip(stock["output_ids"], prefix[name], strict=True))
        for name in ("output_ids", "control_output_ids")
    )
    steps = {name: counters[name] for name in ("packed_steps", "stock_steps", "fallback_steps")}
    packed_share = steps["packed_steps"] / max(sum(steps.values()), 1)
    ratio = counters["kv_read_ratio"] if steps["packed_steps"] else 1.0
    halfway = forest_of_prompts(prompts, new_tokens // 2)
    ideal = halfway.unique_tokens / int(halfway.seq_lens.sum())
    problems = []
    if must_be_equal and num_equal < count:
        problems.append(f"tokens differ from stock in {count - num_equal} of {count} requests")
    if packed_share < _MIN_PACKED_SHARE:
        problems.append(f"only {packed_share:.0%} of the decode steps were packed")
    if ratio > _READ_SLACK * ideal:
        problems.append(f"kv_read_ratio {ratio:.3f} is over {_READ_SLACK * ideal:.3f}")
    if count - num_same < _MIN_CHANGED_SHARE * count:
        problems.append(
            f"broken attention changed only {count - num_same} of {count} requests, so equal "
            "tokens prove nothing on this model"
        )
    return {
        "num_requests": count,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "new_tokens": new_tokens,
        "tokens_equal_stock": num_equal == count,
        "num_requests_equal": num_equal,
        "control_num_requests_changed": count - num_same,
        "kv_read_ratio": ratio,
        "kv_unique_ratio_ideal": ideal,
        "num_packs": counters["num_packs"],
        **steps,
        "fallback_reasons": counters["fallback_reasons"],
        "stock_decode_seconds": stock["decode_seconds"],
        "prefix_decode_seconds": prefix["decode_seconds"],
        "decode_speedup": median(stock["decode_seconds"]) / median(prefix["decode_seconds"]),
        "last_plan": counters["last_plan"],
        "problems": problems,
    }


def _print_table(report: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    count, new = report["num_requests"], report["new_tokens"]
    title = f"{report['model']}, {report['device']}, {report['dtype']}: {count} requests"
    table = Table("", "stock", "prefix", title=title)
    equal = f"{report['num_requests_equal']} of {count} requests"
    changed = f"{report['control_num_requests_changed']} of {count} requests change"
    packs = (report["packed_steps"], report["stock_steps"], report["fallback_steps"])
    seconds = [median(report[f"{backend}_decode_seconds"]) for backend in ("stock", "prefix")]
    table.add_row("tokens equal to stock", "", equal)
    table.add_row("control: attention broken on purpose", "", changed)
    table.add_row("decode steps: packed / stock / fallback", "", " / ".join(map(str, packs)))
    table.add_row("packs in the last step", "", str(report["num_packs"]))
    table.add_row("KV tokens read / KV tokens", "1.000", f"{report['kv_read_ratio']:.3f}")
    table.add_row("  every shared token read once", "", f"{report['kv_unique_ratio_ideal']:.3f}")
    table.add_row(f"decode time, {new} tokens each", *(f"{s:.2f} s" for s in seconds))
    table.add_row("speed-up of decode", "", f"{report['decode_speedup']:.2f} x")
    out.print(table)


def _show_last_plan(report: dict[str, Any], picture: Path | None, out: Console) -> None:
    """Print the last batch that was planned as a tree, and draw it where asked to."""
    from sglang_prefix.cli.explain import write_picture
    from sglang_prefix.explain.record import PlanRecord
    from sglang_prefix.explain.segments import explain
    from sglang_prefix.explain.text import print_explanation

    try:
        record = PlanRecord.from_dict(report["last_plan"])
        explanation = explain(replace(record, source="last batch of the prefix engine"))
    except ValueError as error:
        report["problems"].append(f"the last plan cannot be shown: {error}")
        return
    out.print(_HOW_TO_READ, highlight=False, soft_wrap=True)
    print_explanation(explanation, out)
    if picture is not None:
        write_picture(explanation, picture, picture.suffix[1:])
        text = f"picture: {picture} (open it in a browser)"
    else:
        text = "--picture FILE.html draws it"
    say(out, text)
