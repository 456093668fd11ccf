"""`sglang-prefix bench profile`: what work costs this CPU, as the packing policy counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglang_prefix.cli.bench_run import (
    Budget,
    ListCases,
    Out,
    Resume,
    Seed,
    Table,
    WriteTable,
    finish,
    make_run,
    print_names,
    start_run,
)
from sglang_prefix.cli.options import JsonOption
from sglang_prefix.cli.output import console

__all__ = ["profile"]


def profile(
    ctx: typer.Context,
    out: Out = None,
    budget_s: Budget = None,
    seed: Seed = 0,
    resume: Resume = False,
    dry: Annotated[
        bool, typer.Option("--dry", help="Tiny shapes: shows the logic, measures nothing.")
    ] = False,
    list_cases: ListCases = False,
    write_table: WriteTable = None,
    table: Table = None,
    json_file: JsonOption = None,
) -> None:
    """Time packs of all kinds on this CPU, and fit the costs that the policy pat weighs.

    Takes under two minutes. Every output is checked before it is timed. The file in --out,
    profile.json, is whole after every case, and --resume goes on. --write-table then makes it the
    table of profiles that plans for a CPU are made with.
    """
    from sglang_prefix.bench import cpu_profile as module

    if write_table is not None:
        file, target = write_table, table or module.PROFILES_FILE
        typer.echo(make_run(lambda: module.write_profiles(file, target), target))
        return
    folder = Path() if list_cases else out
    run = start_run(
        ctx, module.ProfileRun, folder, {}, seed=seed, device="cpu", dry=dry, resume=resume
    )
    if list_cases:
        print_names(run.order)
    finish(run, budget_s, console(json_file), json_file)
