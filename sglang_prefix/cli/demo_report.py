"""What the demo concludes and prints: answers, a table, the last batch as a tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sglang_prefix.cli.output import fail, say

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["EXACT", "compare", "print_table", "problems_of", "show_answers", "show_last_plan"]

# Dtypes in which tokens must be equal.
EXACT = ("float", "float32")
# The plan may read this much more than the ideal, since packing trades short shared segments for
# fewer packs, and in its first step all: nothing is shared yet.
_READ_SLACK = 1.5
_MIN_PACKED_SHARE = 0.9
_MIN_CHANGED_SHARE = 0.5
# Log probabilities of 16-bit arithmetic may be so much further from those of float32 than stock's.
_NOISE_FACTOR = 1.5
# Where no float32 was run: in the mean from stock's, which rounding explains.
_MAX_APART = 0.3
_SHOWN_ANSWERS, _SHOWN_SAMPLES = 4, 2
_BACKENDS = ("stock", "prefix")
_OF_BACKEND = ("tokens", "ttft_s", "first_s", "rest_s", "step_us", "step_ms", "attention_ms")
_PREFILL = """
Prefill took {prefill_s:.0f} of {wall_s:.0f} s, {stock_s:.0f} s of them the questions on stock. On a
CPU that computes the attention of the cached document again for each request. With ours only the
questions' own tokens are queries, and the document is read once for all of them. A second dtype
therefore asks half of the questions.
"""
_HOW_TO_READ = """
The last batch as a tree. A node is KV that several requests share, its readers; a pack reads it
once for all of them. Below are the requests, with what each holds alone.
"""


def compare(
    found: Mapping[str, dict[str, Any]],
    prompts: list[list[int]],
    num_greedy: int,
    new_tokens: int,
    exact: Any,
) -> dict[str, Any]:
    """Put the numbers together; ``exact`` are log probabilities of stock in float32, if known."""
    from sglang_prefix.bench.serving.compare import compare_logprobs
    from sglang_prefix.explain.sources import forest_of_prompts

    stock, prefix, control = (found[mode] for mode in (*_BACKENDS, "zeros"))
    counters = prefix["counters"]
    if not counters:
        fail("the engine reported no counters: was the plugin loaded?")
    ours, theirs = (one["tokens"][:num_greedy] for one in (prefix, stock))
    num_equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    num_changed = sum(
        answer[: len(broken)] != broken
        for answer, broken in zip(ours, control["tokens"], strict=False)
    )
    extends = counters["extend"]
    steps = {name: counters[name] for name in ("packed_steps", "stock_steps", "fallback_steps")}
    halfway = forest_of_prompts(prompts, new_tokens // 2)
    run = {
        "num_requests": len(prompts),
        "num_greedy": num_greedy,
        "num_sampled": len(prompts) - num_greedy,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "new_tokens": new_tokens,
        "num_requests_equal": num_equal,
        "logprobs": compare_logprobs(prefix["logprobs"], stock["logprobs"]),
        "logprobs_from_float32": {
            backend: compare_logprobs(found[backend]["logprobs"], exact[:num_greedy])["mean"]
            if exact
            else None
            for backend in _BACKENDS
        },
        "control_num_requests": len(control["tokens"]),
        "control_num_requests_changed": num_changed,
        "kv_read_ratio": counters["kv_read_ratio"] if steps["packed_steps"] else 1.0,
        "kv_unique_ratio_ideal": halfway.unique_tokens / int(halfway.seq_lens.sum()),
        "num_packs": counters["num_packs"],
        **steps,
        "num_steps": sum(steps.values()),
        "fallback_reasons": counters["fallback_reasons"],
        "packed_extends": extends["packed_steps"],
        # The native executor has one at least: the questions behind the document.
        "num_extends": max(sum(extends[n] for n in steps), "native" in counters["executor"]),
        "extend_kv_read_ratio": extends["kv_read_ratio"] if extends["packed_steps"] else None,
        "last_plan": counters["last_plan"],
        "packed_steps_of_stock": stock["counters"]["packed_steps"]
        + stock["counters"]["extend"]["packed_steps"],
        "prefill_s": sum(one["first_s"] for one in found.values()),
        "decode_s": sum(one["rest_s"] for one in found.values()),
    }
    for backend in _BACKENDS:
        one = found[backend]
        run |= {f"{backend}_{key}": one[key] for key in _OF_BACKEND}
        run[f"{backend}_ttft_ms"] = 1000 * median(one["ttft_s"])
        run[f"{backend}_tpot_ms"] = median(one["step_us"]) / 1000
        run[f"{backend}_attention_share"] = one["attention_ms"] / run[f"{backend}_tpot_ms"]
    run["ttft_speedup"] = run["stock_ttft_ms"] / run["prefix_ttft_ms"]
    run["decode_speedup"] = run["stock_tpot_ms"] / run["prefix_tpot_ms"]
    return run


def problems_of(run: Mapping[str, Any]) -> list[str]:
    """Everything that keeps a run from being evidence."""
    count, equal = run["num_greedy"], run["num_requests_equal"]
    changed, tried = run["control_num_requests_changed"], run["control_num_requests"]
    packed_share = run["packed_steps"] / max(run["num_steps"], 1)
    largest_ratio = _READ_SLACK * run["kv_unique_ratio_ideal"] + 1 / run["new_tokens"]
    ours, theirs = (run["logprobs_from_float32"][backend] for backend in ("prefix", "stock"))
    problems = []
    if run["dtype"] in EXACT:
        if equal < count:
            problems.append(f"tokens differ from stock in {count - equal} of {count} requests")
    elif ours is None:
        if run["logprobs"]["mean"] > _MAX_APART:
            problems.append(
                f"log probabilities are {run['logprobs']['mean']:.3f} from stock's in the mean; "
                f"{run['dtype']} explains {_MAX_APART}"
            )
    elif ours > _NOISE_FACTOR * theirs:
        problems.append(
            f"log probabilities are {ours:.3f} from float32's in the mean, and stock's {theirs:.3f}"
        )
    if run["packed_steps_of_stock"]:
        problems.append(f"{run['packed_steps_of_stock']} passes of stock were packed")
    if packed_share < _MIN_PACKED_SHARE:
        problems.append(f"only {packed_share:.0%} of the decode steps were packed")
    if run["packed_extends"] < _MIN_PACKED_SHARE * run["num_extends"]:
        problems.append(f"only {run['packed_extends']} of {run['num_extends']} extends were packed")
    if run["kv_read_ratio"] > largest_ratio:
        problems.append(f"kv_read_ratio {run['kv_read_ratio']:.3f} is over {largest_ratio:.3f}")
    if changed < _MIN_CHANGED_SHARE * tried:
        problems.append(
            f"broken attention changed only {changed} of {tried} requests, so equal tokens prove "
            "nothing on this model"
        )
    return problems


def show_answers(run: Mapping[str, Any], asked: list[str], tokenizer: Any, out: Console) -> None:
    """Some of what was said, up to where the model ended its answer."""
    num_greedy = run["num_greedy"]
    shown = [*range(_SHOWN_ANSWERS), *range(num_greedy, num_greedy + _SHOWN_SAMPLES)]
    for index in shown:
        tokens = run["prefix_tokens"][index]
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else None
        answer = " ".join(tokenizer.decode(tokens[:end], skip_special_tokens=True).split())
        sampled = " (sampled)" if index >= num_greedy else ""
        say(out, f"  {asked[index]}{sampled} -> {answer}{'' if end is not None else ' …'}")


def print_table(report: Mapping[str, Any], out: Console) -> None:
    from rich.table import Table

    runs = report["runs"]
    columns = [f"{run['dtype']} {backend}" for run in runs for backend in _BACKENDS]
    title = f"{report['model']}, {report['environment']['device']}: questions about one document"
    table = Table("", *columns, title=title)

    def row(name: str, stock: str, prefix: str) -> None:
        cells = [text.format(**run) for run in runs for text in (stock, prefix)]
        table.add_row(name, *cells)

    row("questions + samples", *["{num_greedy} + {num_sampled}"] * 2)
    row("answers equal to stock's", "", "{num_requests_equal} of {num_greedy}")
    row("log probabilities apart", "", "{logprobs[mean]:.5f}")
    row("  at most", "", "{logprobs[max]:.5f}")
    if runs[1:] and runs[0]["dtype"] in EXACT:
        distances = [f"{{logprobs_from_float32[{backend}]:.5f}}" for backend in _BACKENDS]
        row("  from float32's stock", *distances)
    changed = "{control_num_requests_changed} of {control_num_requests}"
    row("changed by broken attention", "", changed)
    row("decode steps packed", "", "{packed_steps} of {num_steps}")
    if report["environment"]["device"] == "cpu":  # elsewhere they are not packed
        row("extends packed", "", "{packed_extends} of {num_extends}")
    row("packs in the last step", "", "{num_packs}")
    row("KV tokens read / KV tokens", "1.000", "{kv_read_ratio:.3f}")
    row("  every shared token once", "", "{kv_unique_ratio_ideal:.3f}")
    row("time to first token", "{stock_ttft_ms:,.0f} ms", "{prefix_ttft_ms:,.0f} ms")
    row("  speed-up", "", "{ttft_speedup:.2f} x")
    row("time per output token", "{stock_tpot_ms:.0f} ms", "{prefix_tpot_ms:.0f} ms")
    row("  speed-up", "", "{decode_speedup:.2f} x")
    if report["environment"]["device"] == "cpu":  # elsewhere the host's clock does not see it
        shares = [f"{{{backend}_attention_share:.0%}}" for backend in _BACKENDS]
        row("  attention's part of it", *shares)
    out.print(table)
    if report["environment"]["device"] == "cpu":
        prefill_s, stock_s = (
            sum(run[name] for run in runs) for name in ("prefill_s", "stock_first_s")
        )
        text = _PREFILL.format(prefill_s=prefill_s, stock_s=stock_s, wall_s=report["wall_s"])
        out.print(text, highlight=False, soft_wrap=True)


def show_last_plan(run: Mapping[str, Any], picture: Path | None, out: Console) -> list[str]:
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
