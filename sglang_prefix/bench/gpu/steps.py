"""What `bench gpu` does, in order: limits, commands, and what each step decides.

Correctness stands before all that is timed. What a step writes is whole after each of its cases, so
one that is killed leaves what it has.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STEPS", "Step"]

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the run, in processes of its own.

    Attributes:
        name: unique; the folder of its results.
        limit_s: seconds after which it is killed.
        commands: arguments of Python, one list per process; all run at once. ``{folder}``,
            ``{tests}``, ``{cache}`` and ``{budget_s}`` stand for the step's folder, the GPU tests,
            Triton's cache, and the time after which it should begin nothing more.
        decides: what its numbers are for.
        dry: arguments that a dry run adds, beside ``--dry``.
        must_hold: unless its results are right, nothing after it is run.
        after: a step and what it found; if it was done and found none, this one is not needed.
        margin_s: of the limit, what ``{budget_s}`` leaves for what comes before the budget is
            counted, and for the end.
    """

    name: str
    limit_s: float
    commands: tuple[Words, ...]
    decides: str
    dry: Words = ()
    must_hold: bool = False
    after: tuple[str, str] | None = None
    margin_s: float = 4


def _check(which: str, *more: str, file: str = "check") -> Words:
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "{tests}")
    return (
        *pytest,
        "--out",
        f"{{folder}}/{file}.json",
        "--budget-s",
        "{budget_s}",
        "-k",
        which,
        *more,
    )


def _bench(what: str, *more: str) -> Words:
    command = ("-m", "sglang_prefix.cli.main", "bench", what, "--out", "{folder}")
    return (*command, "--budget-s", "{budget_s}", *more)


_KERNEL = ("--no-plots", "--no-report", "--policy", "pat")
# pytest counts its budget from when it has imported torch and the tests, which takes seconds.
_CHECK_MARGIN_S = 12
_SANITIZER_S = 60

STEPS = (
    Step(
        "cache",
        15,
        (("-m", "sglang_prefix.bench.gpu.layer", "{folder}/facts.json"),),
        "whether kernels were found or compiled",
    ),
    Step(
        "compile",
        30,
        (
            (
                *("-m", "sglang_prefix.cli.main", "kernels", "--cache", "{cache}"),
                *("--arch", "sm_90", "--model-shape", "32:8:128", "--model-shape", "8:1:128"),
                *("--model-shape", "16:1:576:512"),
            ),
        ),
        "nothing: all cores compile what was not carried",
        after=("cache", "compiled"),
    ),
    Step(
        "correct",
        52,
        # Overlapping launches are off, so they must not stop what is on.
        (_check("policies-and-modes or real-profile or (graph and not overlap)"),),
        "stop if wrong",
        dry=("-k", "one-token-tails"),
        must_hold=True,
        margin_s=_CHECK_MARGIN_S,
    ),
    Step(
        "correct-more",
        70,
        (
            _check(
                "padding or growing or empty or far-slots or fp8 or cap or 1024-requests "
                "or group/5 or group/8 or group/16 or overlap or latent"
            ),
        ),
        "what else is right",
        dry=("-k", "group/5"),
        margin_s=_CHECK_MARGIN_S,
    ),
    Step(
        "limits",
        15,
        (_bench("kernel", *_KERNEL, "--ours", "--workload", "^chain"),),
        "the floor of a layer; what launches cost",
    ),
    Step(
        "peers",
        90,
        (_bench("kernel", *_KERNEL, "--policy", "query", "--workload", "gpu-minutes"),),
        "where we stand",
        dry=("--ours",),  # there is nothing else to run, and SGLang takes long to import
    ),
    Step(
        "settings",
        70,
        (
            _bench(
                *("kernel", *_KERNEL, "--ours", "--setting", "all"),
                *("--workload", r"^rollouts/64|^trees/(02|05|09)_.*/32:8$|^unrelated/19.*/32:8$"),
            ),
        ),
        "which changes of the kernels stay",
    ),
    Step("tiles", 84, (_bench("tune"),), "tiles of the forward kernel, head dim 128 in bf16 first"),
    Step(
        "counters",
        50,
        (("-m", "sglang_prefix.bench.gpu.counters", "{folder}/facts.json"),),
        "memory, issue and tensor share, and why warps wait",
    ),
    Step(
        "sanitizers",
        84,
        tuple(
            _check(f"sanitizer/{tool}", "--sanitizer-s", str(_SANITIZER_S), file=tool)
            for tool in ("memcheck", "racecheck")
        ),
        "accesses out of bounds, and races",
        margin_s=_CHECK_MARGIN_S,
    ),
)
