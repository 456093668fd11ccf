"""`explain --watch`: what a running server packs, read again and again until Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Protocol

from pydantic import Field
from typing_extensions import TypedDict

from sglang_prefix.api_key import ApiKey
from sglang_prefix.backend.counters import KINDS
from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.bench.engine import counter_difference, sum_of_ranks
from sglang_prefix.bench.serving.servers import Count, KindReport, Name, RunningServer, ServerError
from sglang_prefix.cli.output import console, fail, say
from sglang_prefix.explain.format import plural
from sglang_prefix.explain.record import PlanRecord, find_plan
from sglang_prefix.explain.segments import explain
from sglang_prefix.explain.text import gate_line, tree_of
from sglang_prefix.files import one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

__all__ = ["Interval", "Reading", "plain_line", "read_server", "since", "view", "watch"]

_CALL_S = 10.0
# What only grows while a server runs, for each kind of pass.
_COUNTS = (
    *("packed_steps", "stock_steps", "fallback_steps"),
    *("kv_tokens_read", "kv_tokens_logical", "plans"),
)
_MAX_REASONS = 8


class _KindReport(KindReport):
    plans: NotRequired[Count]
    num_packs: NotRequired[Count]
    num_partials: NotRequired[Count]


class _Report(_KindReport):
    verify: NotRequired[_KindReport]
    extend: NotRequired[_KindReport]
    executor: NotRequired[Name]
    last_plan: NotRequired[Any]


class _State(TypedDict):
    sglang_prefix: NotRequired[list[_Report]]
    startup_time: NotRequired[Any]


class _Info(TypedDict):
    internal_states: Annotated[list[_State], Field(max_length=1 << 16)]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server says of itself at one time.

    Attributes:
        at: when, in seconds of a clock that nobody sets.
        counters: the backend's, added up over ranks with batches of their own.
        num_ranks: those ranks. An answer does not say which is which.
        packs: packs and partial results of the newest plans of all ranks together, by kind of pass.
        starts: what tells a start of the server from another; empty where SGLang does not say.
        record: the newest plan of one rank; None if there is none.
        note: why there is none.
    """

    at: float
    counters: dict[str, Any]
    num_ranks: int = 1
    packs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    starts: tuple[str, ...] = ()
    record: PlanRecord | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """What was added between two readings.

    Attributes:
        seconds: between them.
        counters: the differences; after a restart all that the server has counted since.
        restarted: whether the server has begun anew.
    """

    seconds: float
    counters: dict[str, Any]
    restarted: bool


def read_server(server: RunningServer) -> Reading:
    """Ask a server once.

    Raises:
        ServerError: it does not answer, not as SGLang does, or does not run our backend.
    """
    info = server.get("server_info", _Info, _CALL_S)
    at, states = time.monotonic(), info["internal_states"]
    counters = sum_of_ranks(info)
    if not counters:
        raise ServerError(f"{server.url}: the server does not run the attention backend prefix")
    record, note = None, ""
    try:
        record = find_plan(info)
    except ValueError as error:
        note = str(error)
    reports = [report for state in states for report in state.get("sglang_prefix", ())[:1]]
    times = (state.get("startup_time") for state in states)
    return Reading(
        at,
        counters,
        num_ranks=len(reports),
        packs={
            kind: (_total(reports, kind, "num_packs"), _total(reports, kind, "num_partials"))
            for kind in KINDS
        },
        # How long each rank took to start, to the nanosecond.
        starts=tuple(sorted(str(t.get("scheduler_e2e")) for t in times if isinstance(t, dict))),
        record=record,
        note=note,
    )


def _total(reports: Sequence[Mapping[str, Any]], kind: str, name: str) -> int:
    return sum(_of_kind(report, kind).get(name, 0) for report in reports)


def _of_kind(counters: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What a report counts of a kind of pass; it has those of decode steps without a name."""
    return counters if kind == "decode" else counters.get(kind, {})


def _kinds(counters: Mapping[str, Any]) -> list[str]:
    """Of what passes there were any; decode steps where there were none at all."""
    return [kind for kind in KINDS if any(_counts(counters, kind)[:3])] or ["decode"]


def _counts(counters: Mapping[str, Any], kind: str) -> list[int]:
    return [_of_kind(counters, kind).get(name, 0) for name in _COUNTS]


def since(before: Reading, after: Reading) -> Interval:
    """What happened between two readings of a server that may have been restarted."""
    old, new = before.counters, after.counters
    restarted = before.starts != after.starts
    for kind in KINDS:
        restarted |= any(map(int.__lt__, _counts(new, kind), _counts(old, kind)))
    difference = counter_difference({} if restarted else old, new)
    return Interval(after.at - before.at, difference, restarted)


def watch(url: str, key: ApiKey, interval_s: float) -> None:
    """Show a server until Ctrl-C, on a terminal as a view, elsewhere as a line per reading.

    Ends the command with one line and status 2 if the first reading fails. Later ones may: a
    server that is away, or comes back as another, is said and asked again.

    Args:
        url: of the server.
        key: to which it opens.
        interval_s: seconds between an answer and the next question.
    """
    server = RunningServer("prefix", url.rstrip("/"), key=key)
    before: Reading | None = None
    with contextlib.suppress(KeyboardInterrupt), _display() as display:
        while True:
            try:
                reading = read_server(server)
            except ServerError as error:
                if before is None:
                    fail(f"--base-url: {error}", 2)
                display.fault(one_line(str(error)))
            else:
                display.show(reading, since(before, reading) if before else None)
                before = reading
            time.sleep(interval_s)


class _Display(Protocol):
    def show(self, reading: Reading, interval: Interval | None) -> None: ...

    def fault(self, text: str) -> None: ...


@contextlib.contextmanager
def _display() -> Iterator[_Display]:
    from rich.live import Live

    out = console()
    if not sys.stdout.isatty() or out.is_dumb_terminal:
        yield _Lines(out)
        return
    with Live(console=out, auto_refresh=False) as live:
        yield _View(live)


class _Lines:
    """A line for each reading, and one when there is something else to say."""

    def __init__(self, out: Console) -> None:
        self._out, self._note = out, ""

    def show(self, reading: Reading, interval: Interval | None) -> None:
        if interval and interval.restarted:
            self.fault(_RESTARTED)
        if reading.note and reading.note != self._note:
            self.fault(reading.note)
        self._note = reading.note
        self.fault(plain_line(reading, interval))

    def fault(self, text: str) -> None:
        say(self._out, f"{_clock()} {text}")


class _View:
    """The newest reading in one place of the terminal."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._record: PlanRecord | None = None
        self._plan: list[RenderableType] = []
        self._shown: list[RenderableType] = []

    def show(self, reading: Reading, interval: Interval | None) -> None:
        if reading.record != self._record or reading.record is None:
            self._record, self._plan = reading.record, _plan(reading)
        self._shown = [*view(reading, interval), *self._plan]
        self._update()

    def fault(self, text: str) -> None:
        self._update(text)

    def _update(self, fault: str = "") -> None:
        from rich.console import Group
        from rich.text import Text

        # Above what is shown: what is below the terminal's last line is cut.
        told = [Text(f"{_clock()} {fault}", "bold red")] if fault else []
        self._live.update(Group(*told, *self._shown), refresh=True)


_RESTARTED = "the server was restarted: its counters began at zero"


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def plain_line(reading: Reading, interval: Interval | None) -> str:
    """A reading in one line: the interval, totals, packs and reasons."""

    kinds = _kinds(reading.counters)

    def text(name: str, counters: Mapping[str, Any], seconds: float | None) -> str:
        cells = [cell for kind in kinds for cell in _cells(counters, kind, seconds).items()]
        return f"{name}: {', '.join(map(' '.join, cells))}"

    parts = [text("total", reading.counters, None), _packs(reading), *_reasons(reading, interval)]
    if interval:
        parts.insert(0, text(f"last {interval.seconds:.1f} s", interval.counters, interval.seconds))
    return "; ".join(parts)


def view(reading: Reading, interval: Interval | None) -> list[RenderableType]:
    """A reading as a table of rates and totals, and lines below it."""
    from rich.table import Table
    from rich.text import Text

    executor = one_line(str(reading.counters.get("executor", "unknown")))
    ranks = f", {reading.num_ranks} ranks added up" if reading.num_ranks > 1 else ""
    table = Table(f"{_clock()}, executor {executor}{ranks}")
    # So wide that it does not jump while numbers grow.
    last = f"last {interval.seconds:.1f} s" if interval else "last"
    table.add_column(last, justify="right", min_width=12)
    table.add_column("total", justify="right", min_width=16)
    for kind in _kinds(reading.counters):
        rates = _cells(interval.counters, kind, interval.seconds) if interval else {}
        for name, cell in _cells(reading.counters, kind, None).items():
            table.add_row(name, rates.get(name, "-"), cell)
        table.add_section()
    lines = [_RESTARTED] if interval and interval.restarted else []
    lines += [_packs(reading), *_reasons(reading, interval, explained=True)]
    return [table, *map(Text, lines)]


def _plan(reading: Reading) -> list[RenderableType]:
    """The newest plan as a tree, or why there is none."""
    from rich.text import Text

    if reading.record is None:
        return [Text(one_line(reading.note), "dim")]
    try:
        explanation = explain(reading.record)
    except ValueError as error:
        return [Text(one_line(str(error)), "dim")]
    return [Text(gate_line(explanation)), tree_of(explanation)]


def _cells(counters: Mapping[str, Any], kind: str, seconds: float | None) -> dict[str, str]:
    """Counts by what they are called, as rates if the seconds are known, and their ratios."""
    packed, stock, fallback, read, logical, plans = _counts(counters, kind)
    steps = packed + stock + fallback

    def amount(number: int, digits: int = 0) -> str:
        return f"{number:,}" if seconds is None else f"{number / seconds:,.{digits}f}/s"

    def ratio(part: int, whole: int, form: str = ".1%") -> str:
        return format(part / whole, form) if whole else "-"

    return {
        KINDS[kind]: amount(steps, 1),
        "packed": ratio(packed, steps),
        "stock": ratio(stock, steps),
        "fallback": ratio(fallback, steps),
        "KV tokens read": amount(read),
        "KV tokens logical": amount(logical),
        "KV read ratio": ratio(read, logical, ".3f"),
        "plans": amount(plans, 1),
    }


def _packs(reading: Reading) -> str:
    newest = "newest plan" if reading.num_ranks == 1 else f"newest plans of {reading.num_ranks}"
    kinds, texts = _kinds(reading.counters), []
    for kind in kinds:
        packs, partials = reading.packs.get(kind, (0, 0))
        of = "" if kinds == ["decode"] else f" for {KINDS[kind]}"
        texts.append(f"{newest}{of}: {plural(packs, 'pack')}, {plural(partials, 'partial result')}")
    return "; ".join(texts)


def _reasons(reading: Reading, interval: Interval | None, *, explained: bool = False) -> list[str]:
    """Why passes were not packed: total, added in the interval, perhaps with the text."""
    found = []
    for kind, path in product(KINDS, ("stock", "fallback")):
        name = f"{path}_reasons"
        added = _of_kind(interval.counters, kind).get(name, {}) if interval else {}
        who = path if kind == "decode" else f"{kind} {path}"
        for reason, count in _of_kind(reading.counters, kind).get(name, {}).items():
            text = f": {REASONS[reason]}" if explained and reason in REASONS else ""
            more = f" (+{added[reason]:,})" if reason in added else ""
            found.append((count, f"{who} {one_line(reason)[:64]} {count:,}{more}{text}"))
    found.sort(reverse=True)
    rest = [f"{plural(len(found) - _MAX_REASONS, 'more reason')}"] * (len(found) > _MAX_REASONS)
    return [line for _, line in found[:_MAX_REASONS]] + rest
