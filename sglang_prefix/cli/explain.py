"""`sglang-prefix explain`: the forest and the packs of a batch, as a tree and as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sglang_prefix.cli.output import JsonOption, console, fail, write_json

if TYPE_CHECKING:
    from sglang_prefix.explain.record import PlanRecord
    from sglang_prefix.explain.segments import Explanation
    from sglang_prefix.explain.sources import Setting

__all__ = ["explain", "write_picture"]

_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SOURCES = "--tree, --prompts, --base-url, --plan"


def explain(
    tree: Annotated[
        str | None,
        typer.Option(
            metavar="N1,N2,.._L1,L2,..",
            help="A tree in PAT's notation: level k has Nk nodes of Lk tokens; the last level is "
            "the batch.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts, one per line or as a JSON list of texts."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Tokenizer, or model, for --prompts.")
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The last plan of a server that was started with SGLANG_PREFIX_KEEP_PLAN=1.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A plan that --json wrote, or a saved answer of /server_info."
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="QO,KV,DIM[,V]", help="Heads and head dims of the layers. Default: 32,8,128."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of q and of the KV cache. Default: bfloat16."),
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per KV page. Default: 1.")
    ] = None,
    policy: Annotated[
        Literal["pat", "node", "chunk", "query"] | None,
        typer.Option(help="How requests are packed. Default: pat."),
    ] = None,
    device: Annotated[
        Literal["cpu", "h200", "cuda"] | None,
        typer.Option(help="cuda is this machine's GPU. Default: what is here."),
    ] = None,
    stock_backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the gate compares with. Default: fa3."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the picture as SVG.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write picture and tables as one HTML page."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show which KV a batch shares, how it is packed, and why."""
    sources = {"tree": tree, "prompts": prompts, "base-url": base_url, "plan": plan}
    named = [f"--{name}" for name, value in sources.items() if value is not None]
    if len(named) != 1:
        fail(f"given: {' and '.join(named) or 'nothing'}; legal: one of {_SOURCES}", 2)
    if prompts is not None and tokenizer is None:
        fail("--prompts needs --tokenizer PATH", 2)
    if tokenizer is not None and prompts is None:
        fail("--tokenizer goes with --prompts alone", 2)
    options = {
        "heads": heads,
        "dtype": dtype,
        "page_size": page_size,
        "policy": policy,
        "device": device,
        "stock_backend": stock_backend,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if given and (base_url or plan):
        extra = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        fail(f"{extra}: a plan that was made has its own; legal with --tree, --prompts", 2)
    try:
        record = _record(tree, prompts, tokenizer, base_url, plan, given)
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")
    _show(record, svg, html, json_file)


def _record(
    tree: str | None,
    prompts: Path | None,
    tokenizer: str | None,
    base_url: str | None,
    plan: Path | None,
    options: dict[str, Any],
) -> PlanRecord:
    from sglang_prefix.explain.record import read_record
    from sglang_prefix.explain.sources import plan_of_prompts, plan_of_server, plan_of_tree

    if tree is not None:
        return plan_of_tree(tree, _setting(**options))
    if prompts is not None and tokenizer is not None:
        return plan_of_prompts(prompts, tokenizer, _setting(**options))
    if base_url is not None:
        return plan_of_server(base_url)
    assert plan is not None
    return read_record(plan)


def _setting(
    *,
    heads: str = "32,8,128",
    dtype: str = "bfloat16",
    device: str | None = None,
    **options: Any,
) -> Setting:
    """Check the heads, and look for a device where none is named."""
    from sglang_prefix.explain.sources import Setting
    from sglang_prefix.packing import AttentionShape

    numbers = [int(n) if n.isascii() and n.isdigit() else 0 for n in heads.split(",")]
    if len(numbers) not in (3, 4) or 0 in numbers or numbers[0] % numbers[1]:
        raise ValueError(
            f"--heads is {heads}; legal: QO,KV,DIM or QO,KV,DIM,V, where QO is a multiple of KV"
        )
    itemsize, (num_qo_heads, num_kv_heads, head_dim, *_) = _ITEMSIZES[dtype], numbers
    shape = AttentionShape(num_qo_heads, num_kv_heads, head_dim, numbers[-1], itemsize, itemsize)
    if device is not None:
        return Setting(shape, device, **options)
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    return Setting(shape, found, is_assumed=True, **options)


def _show(record: PlanRecord, svg: Path | None, html: Path | None, json_file: str | None) -> None:
    from sglang_prefix.explain.segments import explain as explain_record
    from sglang_prefix.explain.text import print_explanation

    try:
        explanation = explain_record(record)
    except ValueError as error:
        fail(f"{record.source}: {error}", 2)
    out = console(json_file)
    print_explanation(explanation, out)
    for path, kind in ((svg, "svg"), (html, "html")):
        if path is not None:
            write_picture(explanation, path, kind)
            out.print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)
    write_json(explanation.as_dict(), json_file)


def write_picture(explanation: Explanation, path: Path, kind: str) -> None:
    """Write "svg" or "html" whole or not at all; ends the command where that fails."""
    from sglang_prefix.explain.picture import html_page, svg_picture

    text = html_page(explanation) if kind == "html" else svg_picture(explanation)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    finally:
        beside.unlink(missing_ok=True)
