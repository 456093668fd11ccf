"""`sglang-prefix explain`: the forest and the packs of a batch, as a tree and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sglang_prefix.api_key import ApiKey
from sglang_prefix.cli.options import (
    MAX_PAGE,
    ApiKeyOption,
    JsonOption,
    is_given,
    loadable_model,
    picture_to_write,
    readable_file,
    server_url,
)
from sglang_prefix.cli.output import console, fail, say, write_json

if TYPE_CHECKING:
    from sglang_prefix.explain.segments import Explanation

__all__ = ["explain", "write_picture"]

_SOURCES = ("--tree", "--prompts", "--base-url", "--plan")
_OF_A_WATCH = ("--watch", "--base-url", "--api-key", "--interval")
_OF_A_NEW_PLAN = (
    *("--heads", "--dtype", "--query-lens", "--page-size", "--policy", "--device"),
    "--stock-backend",
)


def explain(
    context: typer.Context,
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
        typer.Option(
            metavar="FILE",
            help="Prompts, one per line or as a JSON list of texts.",
            callback=readable_file,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Tokenizer, or model, for --prompts.", callback=loadable_model
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The last plan of a server that was started with SGLANG_PREFIX_KEEP_PLAN=1.",
            callback=server_url,
        ),
    ] = None,
    api_key: ApiKeyOption = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Show what the server of --base-url packs, refreshed until Ctrl-C.",
        ),
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.2, max=60, help="Seconds between two looks of --watch.")
    ] = 2.0,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A plan that --json wrote, or a saved answer of /server_info.",
            callback=readable_file,
        ),
    ] = None,
    heads: Annotated[
        str, typer.Option(metavar="QO,KV,DIM[,V]", help="Heads and head dims of the layers.")
    ] = "32,8,128",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of q and of the KV cache."),
    ] = "bfloat16",
    query_lens: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N..]",
            help="Query tokens of each request, its newest, as of drafts that are verified or of "
            "an extend: a number for all, or one for each. With --prompts they follow the prompt. "
            "Default: 1.",
        ),
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, max=MAX_PAGE, help="Tokens per KV page.")] = 1,
    policy: Annotated[
        Literal["pat", "node", "chunk", "query"], typer.Option(help="How requests are packed.")
    ] = "pat",
    device: Annotated[
        Literal["cpu", "h200", "cuda"] | None,
        typer.Option(help="cuda is this machine's GPU. Default: what is here."),
    ] = None,
    stock_backend: Annotated[
        Literal["fa3", "fa4", "flashinfer", "triton", "trtllm_mha", "flex_attention"],
        typer.Option(help="What the gate compares with."),
    ] = "fa3",
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the picture as SVG.", callback=picture_to_write),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write picture and tables as one HTML page.",
            callback=picture_to_write,
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show which KV a batch shares, how it is packed, and why."""
    options = {p.name: p.opts[0] for p in context.command.params if p.name}
    given = [options[name] for name in context.params if is_given(context, name)]
    named = [name for name in _SOURCES if name in given]
    extra = [name for name in _OF_A_NEW_PLAN if name in given]
    if len(named) != 1:
        legal = ", ".join(_SOURCES)
        fail(f"given: {' and '.join(named) or 'nothing'}; legal: one of {legal}", 2)
    if prompts is not None and tokenizer is None:
        fail("--prompts needs --tokenizer PATH", 2)
    if tokenizer is not None and prompts is None:
        fail("--tokenizer goes with --prompts alone", 2)
    if api_key is not None and base_url is None:
        fail("--api-key goes with --base-url alone", 2)
    if "--interval" in given and not watch:
        fail("--interval goes with --watch alone", 2)
    if watch:
        unwatched = [name for name in given if name not in _OF_A_WATCH]
        if unwatched or base_url is None:
            names = ", ".join(unwatched)
            fail(f"--watch does not go with {names}; legal: {', '.join(_OF_A_WATCH[1:])}", 2)
        _watch(base_url, api_key, interval)
        return
    if extra and (base_url or plan):
        names = ", ".join(extra)
        fail(f"{names}: a plan that was made has its own; legal with --tree, --prompts", 2)
    from sglang_prefix.explain.record import read_record
    from sglang_prefix.explain.segments import explain as explain_record
    from sglang_prefix.explain.sources import (
        Setting,
        parse_heads,
        plan_of_prompts,
        plan_of_server,
        plan_of_tree,
    )
    from sglang_prefix.explain.text import print_explanation

    try:
        if base_url is not None:
            record = plan_of_server(base_url, ApiKey.find(api_key))
        elif plan is not None:
            record = read_record(plan)
        else:
            shape = parse_heads(heads, dtype)
            setting = Setting(shape, device, policy, page_size, stock_backend)
            if prompts is not None:
                record = plan_of_prompts(prompts, str(tokenizer), setting, query_lens)
            else:
                record = plan_of_tree(str(tree), setting, query_lens)
        explanation = explain_record(record)
    except ValueError as error:
        # A tree that was read may still make no batch; files are named by what reads them.
        is_unnamed = tree is not None and not str(error).startswith("--")
        fail(f"--tree: {error}" if is_unnamed else str(error), 2)
    except OSError as error:
        fail(f"cannot read {plan or prompts}: {error.strerror}")
    out = console(json_file)
    print_explanation(explanation, out)
    for path in filter(None, (svg, html)):
        write_picture(explanation, path, "svg" if path is svg else "html")
        say(out, f"picture: {path}")
    write_json(explanation.as_dict(), json_file)


def _watch(url: str, api_key: str | None, interval_s: float) -> None:
    from sglang_prefix.cli.watch import watch

    try:
        key = ApiKey.find(api_key)
    except ValueError as error:
        fail(str(error), 2)
    watch(url, key, interval_s)


def write_picture(explanation: Explanation, path: Path, kind: str) -> None:
    """Write "svg" or "html" whole or not at all; ends the command where that fails."""
    from sglang_prefix.explain.picture import html_page, svg_picture
    from sglang_prefix.files import write_file

    text = html_page(explanation) if kind == "html" else svg_picture(explanation)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
