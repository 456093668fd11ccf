"""Everything that is read back, each kind with one whole document of it and its reader.

As a program it reads each document with each of its values replaced by the worst ones, with little
memory: see :func:`main`.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import resource
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from prefix_kernels.tiles import TileShape, candidate_tiles, load_tuned_tiles
from sglang_prefix.bench.report import Source
from sglang_prefix.bench.report.page import build_page
from sglang_prefix.bench.results import read_result
from sglang_prefix.bench.serving.servers import RunningServer, ServerError, describe, read_counters
from sglang_prefix.bench.serving.stream import Answer, add_chunk
from sglang_prefix.bench.serving.workloads import REGISTRY, load_workloads, scale_trace
from sglang_prefix.bench.workloads.traces import read_trace, trace_batches
from sglang_prefix.cli.kernel_figures import compare_figures, read_figures
from sglang_prefix.cli.kernels import print_changes
from sglang_prefix.cli.watch import plain_line, read_server, since, view
from sglang_prefix.explain.picture import html_page, svg_picture
from sglang_prefix.explain.record import read_record
from sglang_prefix.explain.segments import explain
from sglang_prefix.explain.sources import Setting, plan_of_tree, read_prompts
from sglang_prefix.explain.text import print_explanation
from sglang_prefix.gate import load_limits
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.cost import PROFILES_FILE, load_cpu_profiles
from tests.replaced_values import paths_of, replace_value
from tests.report_files import MADE_UP

__all__ = ["DOCUMENTS", "REFUSALS", "kernel_figures", "read", "serve_pages"]

# What a reader may raise. It is one line; commands print it and end with status 2.
REFUSALS = (ValueError, ServerError)
MAX_MEMORY = 200 << 20
# What may become memory, of the legal ones and beyond; the property tests take all other values.
_SIZES: list[Any] = [10**8, 2**31 - 1, 2**62, "x" * 100_000, [10**8] * 4]


@cache
def plan_document(device: str) -> dict[str, Any]:
    """Three nodes and four requests."""
    shape = AttentionShape(4, 2, 8, 8, 4, 4)
    return plan_of_tree("1,2,4_5000,2000,3", Setting(shape, device)).as_dict()


def _tile_table() -> dict[str, Any]:
    shape = TileShape(128, 128, 2, 2, device="gpu")
    (tile,) = islice(candidate_tiles(16, shape), 1)
    dims = {name: getattr(shape, name) for name in ("head_dim", "v_head_dim")}
    row = {**dims, "q_itemsize": 2, "kv_itemsize": 2, **asdict(tile)}
    return {"gpu": {"arch": "sm_90", "result_file": "file.json", "tiles": [row]}}


def _server_pages() -> dict[str, Any]:
    counters = {f"{name}_steps": 3 for name in ("packed", "stock", "fallback")}
    counters |= {"kv_tokens_read": 5, "kv_tokens_logical": 9, "num_packs": 2, "plans": 1}
    report: dict[str, Any] = counters | {"stock_reasons": {"gate-no-gain": 3}, "last_plan": None}
    report["executor"] = "native"
    info: dict[str, Any] = {"dtype": "float32", "load_format": "auto", "version": "0.5.23"}
    info |= {"max_total_num_tokens": 99, "attention_backend": "prefix"}
    state = {"sglang_prefix": [report], "startup_time": {"scheduler_e2e": 1.5}}
    states = [state, {"sglang_prefix": [report]}]
    return {"server_info": info | {"internal_states": states}, "model_info": {"model_path": "m"}}


def kernel_figures() -> dict[str, Any]:
    """What `sglang-prefix kernels --json` writes of two variants, with made-up figures."""
    tile = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3, "max_registers": 168}
    target = {"head_dim": 128, "dtype": "bf16", "kv_dtype": "bf16", "merge": "launch"}
    loop = {"loop_instructions": 400, "first_copy_instructions": 362}
    forward: dict[str, Any] = {
        "kernel": "pack_forward", **target, "group_size": 4, "tile": tile, "narrow_tile": None,
        "registers": 154, "spill_bytes": 0, "shared_bytes": 71680, "programs_per_sm": 3,
        "kv_bytes_in_flight": 196608, "num_instructions": 1426,
        "tiles": [{"block_m": 16, "block_n": 64, **loop}],
    }  # fmt: skip
    merge: dict[str, Any] = {
        "kernel": "merge",
        "kv_dtype": "fp32",
        "kv_bytes_in_flight": None,
        "tiles": [],
    }
    head = {"kind": "kernels", "schema": 1, "triton": "3.0.0", "arch": "sm_90"}
    return {**head, "variants": [forward, forward | merge]}


def _requests() -> list[dict[str, Any]]:
    one = {"timestamp": 0, "input_length": 1100, "output_length": 9, "hash_ids": [0, 1, 2]}
    return [one, one | {"timestamp": 900, "hash_ids": [0, 1, 3]}]


DOCUMENTS: dict[str, Any] = {
    "plan cpu": plan_document("cpu"),
    "plan h200": plan_document("h200"),
    "saved server info": {
        "internal_states": [{"sglang_prefix": [{"last_plan": plan_document("cpu")}]}]
    },
    "prompts": ["one", "two"],
    "trace": _requests(),
    "workloads": json.loads(REGISTRY.read_text()),
    "tiles": _tile_table(),
    "kernels": kernel_figures(),
    "limits": {"gpu": {"read_bytes_per_s": 3e12, "flop_per_s": 5e14, "launch_us": 1.5}},
    "profiles": json.loads(PROFILES_FILE.read_text()),
    "server": _server_pages(),
    "stream": {"index": 0, "text": "ab", "output_ids": [1], "meta_info": {"completion_tokens": 1}},
    **{f"result {kind}": make() for kind, make in MADE_UP.items()},
}


def read(kind: str, document: Any, folder: Path) -> None:
    """Write a document to a file of the folder, or serve it, and do with it what commands do.

    Raises:
        ValueError: it is refused.
        ServerError: likewise.
    """
    path = folder / "file.json"
    texts = document if kind == "trace" and isinstance(document, list) else [document]
    path.write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    name, _, _ = kind.partition(" ")
    _READERS[name](path)


def _read_plan(path: Path) -> None:
    explanation = explain(read_record(path))
    print_explanation(explanation, Console(file=io.StringIO()))
    for page in (html_page(explanation), svg_picture(explanation)):
        page.encode()
    json.dumps(explanation.as_dict()).encode()


def _read_trace(path: Path) -> None:
    found = read_trace(path)
    trace_batches(found, 3, 1 << 16)
    shape: Any = {"block_tokens": 64, "max_prompt_tokens": 6000, "max_output_tokens": 512}
    scale_trace(found, range(1000), shape, 0)


def _read_workloads(path: Path) -> None:
    for quick in (False, True):
        load_workloads(path, quick=quick)


def _read_result(path: Path) -> None:
    build_page([Source(path.name, path, read_result(path))], title="results", plots=False)


def _read_kernels(path: Path) -> None:
    found = read_figures(path, "3.0.0", "sm_90")["variants"]
    for one, other in ((found, kernel_figures()["variants"]), (found, found)):
        comparison = compare_figures(one, other)
        print_changes(comparison, "changes", Console(file=io.StringIO()))


def _read_stream(path: Path) -> None:
    try:
        add_chunk([Answer(0.0)], path.read_bytes(), {"max_new_tokens": 9})
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _read_server(path: Path) -> None:
    pages = json.loads(path.read_text())
    pages = pages if isinstance(pages, dict) else {}
    with serve_pages({name: json.dumps(page).encode() for name, page in pages.items()}) as url:
        describe(RunningServer("prefix", url))
        read_counters(RunningServer("prefix", url))
        before, after = (read_server(RunningServer("prefix", url)) for _ in range(2))
    assert plain_line(after, since(before, after)).isprintable()
    Console(file=io.StringIO()).print(*view(after, since(before, after)))


_READERS: dict[str, Callable[[Path], object]] = {
    "plan": _read_plan,
    "saved": _read_plan,
    "prompts": read_prompts,
    "trace": _read_trace,
    "workloads": _read_workloads,
    "tiles": load_tuned_tiles,
    "kernels": _read_kernels,
    "limits": load_limits,
    "profiles": load_cpu_profiles,
    "server": _read_server,
    "stream": _read_stream,
    "result": _read_result,
}


class _Pages(http.server.BaseHTTPRequestHandler):
    pages: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        """A page by its path."""
        found = self.pages.get(self.path[1:])
        self.send_response(404 if found is None else 200)
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@cache
def _page_server() -> str:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@contextlib.contextmanager
def serve_pages(pages: dict[str, bytes]) -> Iterator[str]:
    """The URL of a server with these pages; one for all, so one at a time."""
    _Pages.pages = pages
    yield _page_server()


def main() -> None:
    """Read every document with each of its values replaced, and end with a line for each kind.

    What is taken beyond the memory that the whole documents take is bounded: then a reader raises
    MemoryError, and the program fails.
    """
    with tempfile.TemporaryDirectory() as name:
        reads = {kind: partial(read, kind, folder=Path(name)) for kind in DOCUMENTS}
        for kind, document in DOCUMENTS.items():
            reads[kind](document)
        taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (taken + MAX_MEMORY, resource.RLIM_INFINITY))
        for kind, document in DOCUMENTS.items():
            if kind in ("plan cpu", "saved server info"):
                continue  # read as the other plan is
            values = _SIZES[:1] if kind.startswith("result") else _SIZES
            refused = 0
            for path in paths_of(document):
                for value in values:
                    try:
                        reads[kind](replace_value(document, path, value))
                    except REFUSALS as error:
                        refused += 1
                        if len(str(error).splitlines()) != 1:
                            sys.exit(f"{kind}, {path}: {error}")
                    except BaseException:
                        print(f"{kind}, {path}: {str(value)[:40]!r}", file=sys.stderr)
                        raise
            print(f"{kind}: {refused} refused", flush=True)


if __name__ == "__main__":
    main()
