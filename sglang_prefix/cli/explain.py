"""`sglang-prefix explain`: the forest and the packs of a batch, as a tree and as a picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
        str | None, typer.Option(help=f"One of {', '.join(_ITEMSIZES)}. Default: bfloat16.")
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per KV page. Default: 1.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="pat, node, chunk or query. Default: pat.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, h200 or cuda, this machine's GPU. Default: what is here."),
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
    named = [name for name, value in sources.items() if value is not None]
    if len(named) != 1:
        given = " and ".join(f"--{name}" for name in named) or "nothing"
        fail(f"given: {given}; legal: one of {_SOURCES}", 2)
    if prompts is not None and tokenizer is None:
        fail("--prompts needs --tokenizer PATH", 2)
    if tokenizer is not None and prompts is None:
        fail("--tokenizer goes with --prompts alone", 2)
    options = {
        "heads": heads,
        "dtype": dtype,
        "page-size": page_size,
        "policy": policy,
        "device": device,
        "stock-backend": stock_backend,
    }
    extra = [f"--{name}" for name, value in options.items() if value is not None]
    if (base_url or plan) and extra:
        fail(
            f"{', '.join(extra)}: a plan that was made has its own; legal with --tree, --prompts", 2
        )
    record = _record(
        lambda: _setting(heads, dtype, page_size, policy, device, stock_backend),
        tree,
        (prompts, tokenizer),
        base_url,
        plan,
    )
    _show(record, svg, html, json_file)


def _record(
    setting: Callable[[], Setting],
    tree: str | None,
    prompts: tuple[Path | None, str | None],
    base_url: str | None,
    plan: Path | None,
) -> PlanRecord:
    from sglang_prefix.explain.record import read_record
    from sglang_prefix.explain.sources import plan_of_prompts, plan_of_server, plan_of_tree

    try:
        if tree is not None:
            return plan_of_tree(tree, setting())
        if prompts[0] is not None and prompts[1] is not None:
            return plan_of_prompts(prompts[0], prompts[1], setting())
        if base_url is not None:
            return plan_of_server(base_url)
        assert plan is not None
        return read_record(plan)
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")


def _setting(
    heads: str | None,
    dtype: str | None,
    page_size: int | None,
    policy: str | None,
    device: str | None,
    stock_backend: str | None,
) -> Setting:
    """Check the options and fill in what was left open."""
    from sglang_prefix.explain.sources import DEVICES, Setting
    from sglang_prefix.packing import POLICIES, AttentionShape

    dtype = dtype or "bfloat16"
    for name, value, legal in (
        ("dtype", dtype, tuple(_ITEMSIZES)),
        ("policy", policy or "pat", tuple(POLICIES)),
        ("device", device or "cpu", DEVICES),
    ):
        if value not in legal:
            raise ValueError(f"--{name} is {value}; legal: {', '.join(legal)}")
    words = (heads or "32,8,128").split(",")
    numbers = [int(word) if word.isascii() and word.isdigit() else 0 for word in words]
    if len(numbers) not in (3, 4) or 0 in numbers or numbers[0] % numbers[1]:
        raise ValueError(
            f"--heads is {heads}; legal: QO,KV,DIM or QO,KV,DIM,V, where QO is a multiple of KV"
        )
    itemsize = _ITEMSIZES[dtype]
    num_qo_heads, num_kv_heads, head_dim, *_ = numbers
    shape = AttentionShape(num_qo_heads, num_kv_heads, head_dim, numbers[-1], itemsize, itemsize)
    if device is None:
        import torch

        found = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        found = device
    return Setting(
        shape, found, device is None, policy or "pat", page_size or 1, stock_backend or "fa3"
    )


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
