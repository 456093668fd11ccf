"""Small result files of all kinds, for tests of what reads them.

The numbers are made up, and round, so that no one takes them for measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_prefix.bench import schema
from sglang_prefix.bench.results import new_result

__all__ = ["MADE_UP", "engine_result", "kernel_result", "serving_result", "tune_result"]

Result = dict[str, Any]


def _result(kind: str, cases: list[Result], **more: Any) -> Result:
    environment = {
        **{"device": "cpu", "cpu": "made-up CPU", "threads": 2, "gpu": None, "python": "3.11.0"},
        **{"versions": {"sglang": "0.5.23", "triton": None}, "commit": "0000000"},
    }
    made = new_result(
        kind,
        command=["sglang-prefix", *kind.split("-"), "--out", "results"],
        options={"quick": True},
        seed=7,
        environment=environment,
    )
    return made | {"created": "2026-01-01T00:00:00+00:00", "cases": cases} | more


def kernel_result() -> Result:
    """Four cases: ours wins two, loses one to stock and one to a peer; one case was not run."""
    cases = [
        _kernel_case("pat-tree-01", "1,4_256,64", 4, stock=8.0, pat=2.0, query=7.0, peer=3.0),
        _kernel_case("pat-tree-02", "1,8,32_512,128,32", 32, stock=40.0, pat=5.0, query=36.0),
        _kernel_case("pat-tree-03", "1,2_1024,16", 2, stock=6.0, pat=4.0, query=5.0, peer=3.5),
        _kernel_case("unrelated-8", None, 8, stock=4.0, pat=5.0, query=4.5),
    ]
    target = {"value": 0.8, "status": "missed", "meaning": "at least 0.97", "missed": {"a": 0.8}}
    return _result(
        "bench-kernel",
        cases,
        options={"quick": True, "policies": ["pat", "query"], "dtype": "float32"},
        limits={"flop_per_s": 1e11},
        targets={"nothing shared": target},
        absent={"flashinfer-cascade": "needs a GPU"},
        not_run={"chunk-4096": "interrupted"},
    )


def _kernel_case(
    name: str, tree: str | None, batch: int, *, peer: float | None = None, **ms: float
) -> Result:
    tokens = {"ideal": 1000, "logical": 1000 * batch if tree else 1000}
    per_token = 2 * 8 * 128 * 4

    def provider(kind: str, time: float, policy: str | None = None) -> Result:
        read = tokens["logical" if policy == "query" or kind == "stock" else "ideal"]
        parts = {"plan": 0.1, "copy": 0.02, "forward": 0.8, "merge": 0.08} if policy else {}
        return dict.fromkeys(schema.KernelProvider.__annotations__) | dict(
            **{"kind": kind, "executor": "torch", "policy": policy, "ms": time},
            **{f"{part}_ms": share * time for part, share in parts.items()},
            raw_ms=[0.9 * time, time, 1.2 * time],
            kernel_us=1000 * time,
            bytes_read=read * per_token,
            kv_read_ratio=read / tokens["logical"],
            speedup=ms["stock"] / time,
        )

    providers = {
        "torch_native": provider("stock", ms["stock"]),
        "pat": provider("ours", ms["pat"], "pat"),
        "query": provider("ours", ms["query"], "query"),
    }
    return dict.fromkeys(schema.KernelCase.__annotations__) | dict(
        **{"name": name, "group": "trees" if tree else "unrelated", "note": "", "batch": batch},
        **{"dtype": "float32", "tokens": tokens, "heads": {"qo": 1, "kv": 1, "dim": 1}},
        **{
            "page_size": 1,
            "query_tokens": 1,
            "layers": 1,
            "slots": "scattered",
            "absent": {},
            "failed": {},
        },
        bytes={key: count * per_token for key, count in tokens.items()},
        flop=4 * 32 * 128 * tokens["logical"],
        bandwidth_gb_s=20.0,
        providers=providers | ({"hydragen": provider("peer", peer)} if peer else {}),
    )


def serving_result() -> Result:
    """Three loads: ours wins one, loses one in TTFT alone, and one is not a comparison."""
    won = {"ttft": 0.5, "tpot": 0.4, "itl": 0.4, "throughput": 2.0}
    mixed = {"ttft": 1.25, "tpot": 0.8, "itl": 0.8, "throughput": 1.25}
    cases = [
        _serving_case("rollouts-4x8", "rollouts", won),
        _serving_case("forks", "forks", mixed),
        _serving_case("random", "random", dict.fromkeys(won), "our backend packed no step"),
    ]
    return _result(
        "bench-serving",
        cases,
        not_run={"trace": "interrupted"},
        **{"model": "tiny", "dtype": "float32"},
        stock={"server_args": ["--model-path", "tiny", "--device", "cpu"]},
        prefix={"server_args": ["--model-path", "tiny"], "variables": {"SGLANG_PREFIX": "1"}},
    )


def _serving_case(name: str, group: str, ratios: Result, why_not: str | None = None) -> Result:
    packs = why_not is None
    counted = {
        "steps": {"packed": 60 * packs, "stock": 4 + 60 * (not packs), "fallback": 0},
        "packed_share": 60 / 64 * packs,
        "kv_read_ratio": 0.25 if packs else 1.0,
        "reasons": {"gate": 4} if packs else {"nothing shared": 64},
    }
    return dict(
        **{"name": name, "group": group, "requests": 32, "requests_equal": 32},
        **{"tokens_compared": 1024, "tokens_equal": 1024},
        **{"is_comparison": packs, "why_not": why_not, "ratios": ratios},
        sides={"stock": _side({}), "prefix": _side(ratios) | counted},
    )


def _side(ratios: Result) -> Result:
    over = {metric: ratio or 1.0 for metric, ratio in ratios.items()}
    medians = {m: base * over.get(m, 1.0) for m, base in (("ttft", 80), ("tpot", 20), ("itl", 18))}
    times: Result = {f"{m}_ms": {"median": ms, "p99": 2 * ms} for m, ms in medians.items()}
    times |= {"output_tokens_per_s": 400 * over.get("throughput", 1.0)}
    times |= {"requests_per_s": 1.0, "duration_s": 1.0}
    run = times | {"counters": None, "texts": [], "load_per_cpu": 0.5}
    return times | {"raw": {"fingerprint": "", "tokens": [], "runs": [run]}}


def engine_result() -> Result:
    """One load won, one on which ours did not pack, one lost with engines in turn; a check."""

    def case(name: str, us: float, *, packed: bool) -> Result:
        ours: Result = {"tpot_us": us, "packed": packed, "packed_share": 1.0 * packed}
        ours |= {"not_packed_because": {} if packed else {"gate": 9}, "host_us_per_step": 20.0}
        ours |= {"counters": {"kv_read_ratio": 0.2}}
        measured = {"prefix": ours, "fa3": {"tpot_us": 10.0}}
        return {"name": f"pair/{name}", "group": "pair", "load": {"name": name},
                "measured": measured}  # fmt: skip

    turns: Result = {"name": "pair/unrelated", "group": "pair", "stock": "fa3", "ratio": 1.25}
    turns |= {"ratio_interval": {"low": 1.2, "high": 1.3}}
    check: Result = {"name": "pair/logprobs", "group": "pair", "difference": {"max": 1e-3}}
    check |= {"status": "failed"}
    cases = [case("many", 5.0, packed=True), case("few", 10.0, packed=False), turns, check]
    return _result("bench-engine", cases)


def check_result() -> Result:
    """One variant that passed and a graph that failed."""
    passed = {"name": "dim128", "group": "variants", "errors": {"pat/streams": 1e-3}}
    return _result("gpu-check", [passed], failed={"graph/fused": "off by 1"})


def gpu_result() -> Result:
    """A step that was done and one that was killed."""
    step = {"group": "made-up", "status": "done", "limit_s": 15.0, "wall_s": 4.0, "compiled": 0}
    done = step | {"name": "correct", "says": {"passed": 7, "fastest": "16x64"}, "failed": {}}
    killed = step | {"name": "peers", "status": "overran", "says": {"us": None}}
    cases = [done, killed | {"failed": {"log1": "killed after 15 s"}}]
    return _result("bench-gpu", cases, not_run={"tiles": "interrupted"}, options={"carried": None})


def tune_result() -> Result:
    """One shape with a tile that is faster than the formula's."""
    tiles = {tile: {"tile": {}, "kernel_us": us} for tile, us in (("16x64", 3.0), ("32x64", 2.0))}
    case = {"name": "dim128/rows16", "group": "", "shape": {}, "formula": "16x64", "tiles": tiles}
    return _result("bench-tune", [case | {"absent": {}, "failed": {}}])


def profile_result() -> Result:
    """Lone requests and two packs on one executor, and the costs that they could lead to."""
    heads = {"qo": 8, "kv": 2, "dim": 64}
    alone = {"requests": 1, "tokens": 64, "packs": 0, "lone_requests": 16, "lone_tokens": 64}
    shared = {"requests": 4, "tokens": 64, "packs": 2, "lone_requests": 8, "lone_tokens": 8}
    packs = [alone | {"us": 300.0, "raw_us": [300.0]}, shared | {"us": 200.0, "raw_us": [200.0]}]
    case = {"name": "native/8:2:64", "group": "native", "executor": "native", "heads": heads}
    fitted = {"pack_bytes": 9e4, "query_cost": 3.0, "element_cost": 2.0, "lone_row_cost": 1.0}
    profiles = {"native": fitted | {"pack_row_cost": 0.5, "error": 0.07}}
    return _result("bench-profile", [case | {"itemsize": 2, "packs": packs}], profiles=profiles)


def host_result() -> Result:
    """Two stages of planning at two sizes, and one of an engine."""
    cases = [
        {"name": f"{group}/{n}", "group": group, "num_requests": n, "us": {stage: 0.5 * n}}
        for group, stage in (("planning", "forest"), ("engine", "hook"))
        for n in (64, 256)
    ]
    return _result("bench-host", cases)


MADE_UP: dict[str, Callable[[], Result]] = {
    "bench-kernel": kernel_result,
    "bench-serving": serving_result,
    "bench-engine": engine_result,
    "bench-tune": tune_result,
    "bench-profile": profile_result,
    "bench-host": host_result,
    "gpu-check": check_result,
    "bench-gpu": gpu_result,
}
