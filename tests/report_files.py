"""Small result files of the bench commands and of the GPU benchmarks, for tests of what reads them.

The numbers are made up, and round, so that no one takes them for measurements.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "gpu_bench_result",
    "gpu_check_result",
    "gpu_serve_result",
    "gpu_tune_result",
    "kernel_result",
    "serving_result",
]


def _top(kind: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": kind,
        "created": "2026-01-01T00:00:00+00:00",
        "command": ["sglang-prefix", "bench", kind.removeprefix("bench-"), "--out", "results"],
        "quick": True,
        "seed": 7,
        "environment": {
            "device": "cpu",
            "cpu": "made-up CPU",
            "threads": 2,
            "gpu": None,
            "python": "3.11.0",
            "versions": {"sglang": "0.5.23", "torch": "2.14.1", "triton": None},
            "commit": "0000000",
        },
    }


def kernel_result() -> dict[str, Any]:
    """Four cells: ours wins two, loses one to stock and one to a peer; one cell was not run."""
    cells = [
        _kernel_cell("pat-tree-01", "1,4_256,64", 4, stock=8.0, pat=2.0, query=7.0, peer=3.0),
        _kernel_cell("pat-tree-02", "1,8,32_512,128,32", 32, stock=40.0, pat=5.0, query=36.0),
        _kernel_cell("pat-tree-03", "1,2_1024,16", 2, stock=6.0, pat=4.0, query=5.0, peer=3.5),
        _kernel_cell("unrelated-8", None, 8, stock=4.0, pat=5.0, query=4.5),
    ]
    return _top("bench-kernel") | {
        "options": {"policies": ["pat", "query"], "dtype": "float32"},
        "peak_gflop_s": 100.0,
        "absent": {"flashinfer-cascade": "needs a GPU"},
        "not_run": ["chunk-4096"],
        "why_not_run": {"chunk-4096": "interrupted"},
        "cells": cells,
    }


def _kernel_cell(
    name: str, tree: str | None, batch: int, *, peer: float | None = None, **ms: float
) -> dict[str, Any]:
    ideal, logical = 1000, 1000 * batch if tree else 1000
    per_token = 2 * 8 * 128 * 4
    contenders: dict[str, Any] = {}
    for contender, time in (*ms.items(), *([("hydragen", peer)] if peer else [])):
        kind = {"stock": "stock", "hydragen": "peer"}.get(contender, "ours")
        shares = contender != "query" and kind != "stock"
        read = ideal if shares else logical
        ours = kind == "ours"
        contenders["torch_native" if kind == "stock" else contender] = {
            "kind": kind,
            "executor": "torch",
            "policy": contender if ours else None,
            "ms": time,
            "raw_ms": [0.9 * time, time, 1.2 * time],
            "plan_ms": 0.1 * time if ours else None,
            "copy_ms": 0.02 * time if ours else None,
            "forward_ms": 0.8 * time if ours else None,
            "merge_ms": 0.08 * time if ours else None,
            "bytes_read": read * per_token,
            "kv_read_ratio": read / logical,
            "packs": batch + 1 if ours else None,
            "speedup": ms["stock"] / time,
            "max_abs_error": 1e-6,
        }
    return {
        "name": name,
        "group": "trees" if tree else "unrelated",
        "tree": tree,
        "batch": batch,
        "heads": {"qo": 32, "kv": 8, "dim": 128, "v_dim": 128},
        "dtype": "float32",
        "page_size": 1,
        "layers": 1,
        "tokens": {"ideal": ideal, "logical": logical},
        "bytes": {"ideal": ideal * per_token, "logical": logical * per_token},
        "flop": 4 * 32 * 128 * logical,
        "best_stock": "torch_native",
        "bandwidth_gb_s": 20.0,
        "contenders": contenders,
        "absent": {},
        "failed": {},
    }


def serving_result() -> dict[str, Any]:
    """Three loads: ours wins one, loses one in TTFT alone, and one is not a comparison."""
    won = {"ttft": 0.5, "tpot": 0.4, "itl": 0.4, "throughput": 2.0}
    mixed = {"ttft": 1.25, "tpot": 0.8, "itl": 0.8, "throughput": 1.25}
    nothing = dict.fromkeys(won)
    return _top("bench-serving") | {
        "absent": {},
        "not_run": ["trace"],
        "model": "tiny",
        "dtype": "float32",
        "stock": {"server_args": ["--model-path", "tiny", "--device", "cpu"]},
        "prefix": {"server_args": ["--model-path", "tiny", "--attention-backend", "prefix"]},
        "cells": [
            _serving_cell("rollouts-4x8", "rollouts", won),
            _serving_cell("forks", "forks", mixed),
            _serving_cell("random", "random", nothing, why_not="our backend packed no step"),
        ],
    }


def _serving_cell(
    name: str, group: str, ratios: dict[str, Any], why_not: str | None = None
) -> dict[str, Any]:
    over = {metric: ratio or 1.0 for metric, ratio in ratios.items()}
    packs = why_not is None
    return {
        "name": name,
        "group": group,
        "requests": 32,
        "tokens_compared": 1024,
        "tokens_equal": 1024,
        "requests_equal": 32,
        "is_comparison": packs,
        "why_not": why_not,
        "sides": {
            "stock": _side(1.0, 1.0, 1.0, 1.0),
            "prefix": _side(over["ttft"], over["tpot"], over["itl"], over["throughput"])
            | {
                "steps": {"packed": 60 * packs, "stock": 4 + 60 * (not packs), "fallback": 0},
                "packed_share": 60 / 64 * packs,
                "kv_read_ratio": 0.25 if packs else 1.0,
                "reasons": {"gate": 4} if packs else {"nothing shared": 64},
            },
        },
        "ratios": ratios,
    }


def _side(ttft: float, tpot: float, itl: float, throughput: float) -> dict[str, Any]:
    return {
        **{
            f"{metric}_ms": {"median": base * over, "p99": 2 * base * over}
            for metric, base, over in (("ttft", 80, ttft), ("tpot", 20, tpot), ("itl", 18, itl))
        },
        "output_tokens_per_s": 400 * throughput,
        "requests_per_s": 12.5 * throughput,
        "duration_s": 4.0 / throughput,
        "raw": {},
        "steps": None,
        "packed_share": None,
        "kv_read_ratio": None,
        "reasons": {},
    }


def _gpu_top(kind: str, *, dry: bool) -> dict[str, Any]:
    environment = {"time": "2026-01-01T00:00:00+00:00", "python": "3.11.0", "torch": "2.14.1"}
    return {
        "schema": 1,
        "kind": kind,
        "dry": dry,
        "date": "2026-01-01",
        "commit": "0000000",
        "seed": 7,
        "device": "made-up-gpu",
        "runs": [{"environment": environment, "cells": []}],
    }


def gpu_bench_result(*, dry: bool) -> dict[str, Any]:
    """One cell won, one lost with its target, one not run; FastTree is absent."""
    result = _gpu_top("gpu-bench", dry=dry)
    result["runs"][0]["baselines"] = {"sglang-triton": "available", "fasttree": "no module"}
    way = "pat/streams/launch"
    cells = {
        name: {
            "status": "done",
            "shape": {"group": name, "batch": 8, "dtype": "bfloat16", "kv_bytes_unique": 2**20},
            "floor": {"us": 1.0},
            "candidates": {
                way: _candidate("ours", ours) | {"over_floor": ours},
                "sglang-triton": _candidate("stock", 4.0),
                "fasttree": {"status": "n/a", "reason": "no module"},
            },
        }
        for name, ours in (("trees", 2.0), ("alone", 5.0))
    }
    target = {
        "status": "missed",
        "value": 0.8,
        "missed": {"alone": 0.8},
        "meaning": "fastest stock over ours, at least 0.97",
    }
    return result | {
        "cells": cells | {"left": {"status": "not run"}},
        "targets": {"ours": way, "nothing shared": target},
    }


def _candidate(kind: str, us: float) -> dict[str, Any]:
    return {"status": "done", "kind": kind, "kernel_us": us, "total_us": us, "error": 1e-3}


def gpu_serve_result() -> dict[str, Any]:
    """One load won, one on which ours did not pack, and one lost with engines in turn."""

    def measured(ours: float, *, packed: bool) -> dict[str, Any]:
        prefix: dict[str, Any] = {"tpot_us": ours, "packed": packed, "packed_share": 1.0 * packed}
        prefix |= {"not_packed_because": {} if packed else {"gate": 9}, "host_us_per_step": 20.0}
        prefix |= {"counters": {"kv_read_ratio": 0.2}}
        return {"prefix": prefix, "fa3": {"tpot_us": 10.0}}

    return _gpu_top("gpu-serve", dry=False) | {
        "cells": {
            "pair/many": {
                "status": "done",
                "load": {"name": "many"},
                "measured": measured(5.0, packed=True),
            },
            "pair/few": {
                "status": "done",
                "load": {"name": "few"},
                "measured": measured(10.0, packed=False),
            },
            "pair/unrelated": {
                "status": "done",
                "stock": "fa3",
                "ratio": 1.25,
                "ratio_interval": {"low": 1.2, "high": 1.3},
            },
        }
    }


def gpu_check_result() -> dict[str, Any]:
    """One variant that passed and a graph that failed."""
    return _gpu_top("gpu-check", dry=False) | {
        "cells": {
            "dim128": {"status": "passed", "errors": {"pat/streams": 1e-3}},
            "graph/fused": {"status": "failed", "reason": "off by 1"},
        }
    }


def gpu_tune_result() -> dict[str, Any]:
    """One shape with a tile that is faster than the formula's."""
    tiles = {"16x64": 3.0, "32x64": 2.0}
    return _gpu_top("gpu-tune", dry=False) | {
        "cells": {
            "dim128/rows16": {
                "status": "done",
                "formula": "16x64",
                "candidates": {t: {"status": "done", "kernel_us": us} for t, us in tiles.items()},
            }
        }
    }
