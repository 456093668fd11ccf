"""`sglang-prefix demo`: the same questions through SGLang's own attention and through ours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_prefix.bench.engine import EngineProcess, engine_environment
from sglang_prefix.bench.hooks import decode_watch
from sglang_prefix.bench.serving.questions import SAMPLED, document_prompts, questions
from sglang_prefix.cli.demo_report import (
    EXACT,
    compare,
    print_table,
    problems_of,
    show_answers,
    show_last_plan,
)
from sglang_prefix.cli.options import JsonOption, loadable_model, picture_to_write
from sglang_prefix.cli.output import console, fail, say, write_json
from sglang_prefix.files import write_file

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["demo"]

# Of the questions and their answers, what the control repeats: enough to see that it changes them.
_CONTROL_PART, _CONTROL_TOKENS = 4, 8
_PICTURES = (".html", ".svg")
# Of the KV of a batch on the CPU, and of a prompt below its document.
_MAX_DOCUMENT, _MAX_BATCH_TOKENS, _QUESTION_TOKENS = 1 << 15, 1 << 20, 256
_RANDOM = "tiny random model"
_QUESTIONS = "sglang_prefix.bench.serving.questions"
_SAID = {"stock": "stock", "prefix": "prefix", "zeros": "control"}


@dataclass(frozen=True)
class Load:
    """What one engine is asked: token ids, the greedy requests first."""

    dtype: str
    prompts: list[list[int]]
    num_greedy: int


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
    ] = 4,
    document_tokens: Annotated[int, typer.Option(min=500, max=_MAX_DOCUMENT)] = 1900,
    new_tokens: Annotated[int, typer.Option(min=16, max=_MAX_DOCUMENT)] = 16,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(
            help="May be repeated: float32, then bfloat16, compares the two as well. Default: "
            "these two on a CPU; auto, the model's, on a GPU. On a CPU the second asks half."
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
    """Compare stock attention with ours in the real engine: answers, KV read, times to the first
    token and per token.

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
    began = time.monotonic()
    import torch

    from sglang_prefix.bench.results import environment
    from sglang_prefix.explain.sources import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = console(json_file)
    with tempfile.TemporaryDirectory(prefix="sglang-prefix-demo-") as folder:
        root = Path(folder)
        model, name = (
            (model_path, model_path) if model_path else _make_model(root / "model", longest, out)
        )
        dtypes = [one.value for one in dtype or ()] or (
            ["float32", "bfloat16"] if device == "cpu" else ["auto"]
        )
        try:
            tokenizer = load_tokenizer(model)
        except ValueError as error:
            fail(str(error))
        loads: list[Load] = []
        for one in dict.fromkeys(dtypes):
            # Stock prefill is most of the time on a CPU, where half of the questions tell enough.
            part = 2 if device == "cpu" and loads else 1
            num_greedy = requests // part
            asked = questions(num_greedy) + [SAMPLED] * max(samples // part, 2)
            prompts = document_prompts(tokenizer, asked, document_tokens)
            loads.append(Load(one, prompts, num_greedy))
        arguments = _arguments(model, device, loads[0].prompts, new_tokens)
        found = _run_engines(root, arguments, loads, new_tokens, out)
    runs: list[dict[str, Any]] = []
    exact = found[0]["stock"]["logprobs"] if loads[0].dtype in EXACT else None
    for load, answers in zip(loads, found, strict=True):
        runs.append(
            {"dtype": load.dtype}
            | compare(answers, load.prompts, load.num_greedy, new_tokens, exact)
        )
    problems = [f"{run['dtype']}: {problem}" for run in runs for problem in problems_of(run)]
    seconds = time.monotonic() - began
    report: dict[str, Any] = {"environment": environment(device), "model": name}
    report |= {"backend": "prefix", "runs": runs, "wall_s": seconds}
    show_answers(runs[0], questions(requests) + [SAMPLED] * samples, tokenizer, out)
    print_table(report, out)
    problems += show_last_plan(runs[-1], picture, out)
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
    except (RuntimeError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        say(out, f"{why}: a tiny random model answers instead")
        config = TinyModelConfig(head_dim=64)
        build_tiny_model(
            directory, replace(config, context_length=max(longest, config.context_length))
        )
        return str(directory), _RANDOM
    return str(directory), NAME


def _arguments(
    model: str, device: str, prompts: list[list[int]], new_tokens: int
) -> dict[str, Any]:
    """Of all engines; ``prompts`` are those of the largest batch."""
    arguments: dict[str, Any] = {
        "model_path": model,
        "device": device,
        "random_seed": 0,
        "log_level": "warning",
    }
    if device != "cpu":
        # Graphs would hide layers from the clock, and the switch between stock's and ours.
        return arguments | {"decode_attention_backend": "prefix", "disable_cuda_graph": True}
    # The document once, and what each request has for itself; two engines have to fit.
    room = max(map(len, prompts)) + len(prompts) * (_QUESTION_TOKENS + new_tokens) + 4096
    fitting = {"mem_fraction_static": 0.7, "max_total_tokens": room}
    return arguments | fitting | {"sleep_on_idle": True}


def _run_engines(
    root: Path,
    arguments: dict[str, Any],
    loads: Sequence[Load],
    new_tokens: int,
    out: Console,
) -> list[dict[str, dict[str, Any]]]:
    """Let one engine per dtype answer, first with stock decode, then with ours.

    On a CPU all start at once, as a start is mostly imports on one core, and then wait asleep; a
    GPU has memory for one.
    """
    together = arguments["device"] == "cpu"
    found = []
    for group in [loads] if together else [[load] for load in loads]:
        names = " and ".join(load.dtype for load in group)
        with ExitStack() as stack:
            began = time.monotonic()
            with out.status(f"{names}: start"):
                engines = [
                    stack.enter_context(_start(root, arguments | {"dtype": load.dtype}))
                    for load in group
                ]
                for engine in engines:
                    _wait(engine.wait_until_ready)
            out.print(f"{names}: started in {time.monotonic() - began:.0f} s")
            for load, engine in zip(group, engines, strict=True):
                found.append(_ask_all(root / load.dtype, engine, load, new_tokens, out))
                engine.stop()
    return found


def _start(root: Path, arguments: dict[str, Any]) -> EngineProcess:
    folder = root / arguments["dtype"]
    folder.mkdir()
    settings = {"SGLANG_PREFIX_KEEP_PLAN": "1", decode_watch.FOLDER_VARIABLE: str(folder)}
    if arguments["device"] == "cpu":
        # There we serve extends as well, and in every release where the backend has no name.
        settings["SGLANG_PREFIX"] = "1"
    environment = engine_environment(settings, hooks=[decode_watch.__name__])
    return EngineProcess(arguments, environment=environment, log=folder / "log")


def _ask_all(
    folder: Path, engine: EngineProcess, load: Load, new_tokens: int, out: Console
) -> dict[str, dict[str, Any]]:
    """What was answered in each mode, and "document", seconds to read it each time."""
    mode, found = decode_watch.mode_file(folder), {}
    num_control, document_s = load.num_greedy // _CONTROL_PART, 0.0
    with out.status(load.dtype) as status:
        for name, prompts, num_greedy, tokens in (
            ("stock", load.prompts, load.num_greedy, new_tokens),
            ("prefix", load.prompts, load.num_greedy, new_tokens),
            ("zeros", load.prompts[:num_control], num_control, _CONTROL_TOKENS),
        ):
            write_file(mode, name)
            if name != "zeros":  # with the same in the cache, so that times can be compared
                status.update(f"{load.dtype}: reads the document")
                document_s += _wait(
                    engine.ask, f"{_QUESTIONS}:read_document", prompt=load.prompts[0]
                )
            status.update(f"{load.dtype}: {_SAID[name]}")
            asked = {"prompts": prompts, "num_greedy": num_greedy, "tokens": tokens}
            one = found[name] = _wait(engine.ask, f"{_QUESTIONS}:ask", **asked)
            if name != "zeros" and not one["step_us"]:
                fail("the engine never decoded all requests at once: make --requests smaller")
            one |= decode_watch.step_times(folder, name)
            out.print(
                f"{load.dtype}: {_SAID[name]}, {one['first_s']:.0f} s to all first tokens, "
                f"{one['rest_s']:.0f} s to decode the rest"
            )
    return found | {"document": {"first_s": document_s, "rest_s": 0.0}}


def _wait(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call, and end with one line where the engine fails."""
    try:
        return function(*arguments, **named)
    except RuntimeError as error:
        fail(f"the {error}")
