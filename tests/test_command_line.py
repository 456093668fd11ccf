"""Every option of every command: a bad value is one line that names it, and nothing is left.

The options are found in the tree of commands, so a new one is covered when it is there. Values that
a command accepts end where its work would begin.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prefix.cli.main import app

# A parameter of a command: the command's words, the parameter, and its name to the user.
Place = tuple[tuple[str, ...], Any, str]

# Whose words are another program's own.
PASSED_ON = ("command", "server_args")
# Where the work of a command begins, which is minutes or more.
WORK = (
    "sglang_prefix.bench.gpu.pack.pack",
    "sglang_prefix.bench.gpu.use.use_results",
    "sglang_prefix.cli.bench_gpu._fill",
    "sglang_prefix.cli.bench_gpu.finish",
    "sglang_prefix.cli.bench_kernel.finish",
    "sglang_prefix.cli.bench_profile.finish",
    "sglang_prefix.cli.bench_serving.finish",
    "sglang_prefix.cli.demo._make_model",
    "sglang_prefix.cli.demo._run_engines",
    "sglang_prefix.cli.doctor._examine",
    "sglang_prefix.cli.kernel_cache.kernel_cache.collect_launches",
    "sglang_prefix.cli.kernels.compile_report.compile_variants",
    "sglang_prefix.api_key.requests.request",
    "sglang_prefix.explain.sources.load_tokenizer",
    "sglang_prefix.smollm2.fetch_wheel",
    "sglang_prefix.tiny_model._write",
    "os.execve",
)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "cpu"
# What a command needs before a parameter of it matters, options and arguments.
BASES: dict[tuple[str, ...], tuple[list[str], list[str]]] = {
    ("bench", "kernel"): (["--out=out", "--no-plots", "--quick"], []),
    ("bench", "gpu"): (["--out=out", "--dry"], []),
    ("bench", "tune"): (["--out=out", "--dry"], []),
    ("bench", "profile"): (["--out=out", "--dry"], []),
    ("bench", "host"): (["--out=out"], []),
    ("bench", "serving"): (["--out=out", "--model-path=m"], []),
    ("explain",): (["--tree=1,2_3,4"], []),
    ("kernels",): (["--arch=sm_90"], []),
    ("report",): (["--out=page.html", "--no-plots"], [str(RESULTS)]),
    ("smollm2",): ([], ["model"]),
    ("tiny-model",): ([], ["model"]),
}
# Of `explain`, what stands for a tree, and what goes with something else.
EXPLAINED = {
    "--prompts": ["--tokenizer=t"],
    "--plan": [],
    "--base-url": [],
    "--tokenizer": ["--prompts=prompts"],
    "--api-key": ["--base-url=http://127.0.0.1:1"],
}
# Of `kernels`, what goes with a cache alone.
OF_A_CACHE = ("--model-shape", "--wheel")


class ReachedError(Exception):
    """The arguments were accepted."""


class Outcome(NamedTuple):
    """How a command ended; the status is None if it reached its work."""

    status: int | None
    stdout: str
    stderr: str


def places(command: Any, words: tuple[str, ...] = ()) -> Iterator[Place]:
    """All parameters that take values."""
    for name, below in getattr(command, "commands", {}).items():
        yield from places(below, (*words, name))
    if not hasattr(command, "commands"):
        for one in command.params:
            is_option = one.param_type_name == "option"
            if not getattr(one, "is_flag", False):
                yield words, one, one.opts[0] if is_option else one.metavar


def is_number(place: Place) -> bool:
    return place[1].type_descriptor.annotation in (int, float, list[int], list[float])


# Made once: that takes longer than to run a command that is refused.
COMMAND = typer.main.get_command(app)
PLACES = list(places(COMMAND))
NUMBERS = [place for place in PLACES if is_number(place)]
OTHERS = [place for place in PLACES if not is_number(place)]


def named(place: Place) -> str:
    return " ".join([*place[0], place[2]])


def invoke(place: Place, *values: str) -> Outcome:
    """Run a command with values for one of its parameters, up to where its work begins."""
    words, parameter, name = place
    options, arguments = BASES.get(words, ([], []))
    if parameter.param_type_name == "option":
        options = [one for one in options if not one.startswith(f"{name}=")]
        if words == ("explain",) and name in EXPLAINED:
            options = EXPLAINED[name]
        if words == ("kernels",) and name in OF_A_CACHE:
            options = [*options, "--cache=new"]
        options = [*options, *(f"{name}={value}" for value in values)]
    else:
        arguments = list(values)
    status: Any = None
    # Bytes, since text that cannot be written is one of the faults.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.ExitStack() as stack:
        for work in WORK:
            stack.enter_context(patch(work, side_effect=ReachedError))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            COMMAND.main([*words, *options, "--", *arguments], prog_name="sglang-prefix")
        except SystemExit as end:
            status = end.code
        except ReachedError:
            pass
    for stream in (out, err):
        stream.seek(0)
    return Outcome(status, out.read(), err.read())


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder to work in, in which a refused command leaves nothing."""
    with TemporaryDirectory() as name, contextlib.chdir(name):
        yield Path(name)


def assert_refused(place: Place, result: Outcome) -> None:
    """One line on standard error, which names the option."""
    assert result.status == 2, result
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("sglang-prefix: ")
    assert place[2] in line
    assert os.listdir() == []


def test_stock_backends_are_sglangs() -> None:
    """Those of NVIDIA's GPUs, of which alone the gate has the limits."""
    choices = pytest.importorskip("sglang.srt.server_args").ATTENTION_BACKEND_CHOICES
    (place,) = (place for place in PLACES if place[2] == "--stock-backend")
    assert set(get_args(place[1].type_descriptor.annotation)) <= set(choices)


def test_all_commands_are_found() -> None:
    assert {place[0] for place in PLACES} > {("exec",), ("tiny-model",), ("bench", "serving")}
    assert len(NUMBERS) > 30
    assert len(OTHERS) > 40


@pytest.mark.parametrize("place", NUMBERS, ids=named)
def test_a_number_has_bounds_and_is_one(place: Place) -> None:
    """Without, it becomes memory or time."""
    assert place[1].min is not None
    assert place[1].max is not None
    for value in ("-1", "nan", "inf", "-inf", "1e999", str(10**30), "9" * 4000, "x", " ", "1,2"):
        with empty_folder():
            result = invoke(place, value)
            assert_refused(place, result)
            assert "legal: " in result.stderr


@pytest.mark.parametrize("place", PLACES, ids=named)
def test_what_no_option_takes(place: Place) -> None:
    values = ["", os.fsdecode(b"\xff"), "a" * 5000, "a\0b"]
    if place[1].name in PASSED_ON:
        values = [] if place[1].name == "command" else values[1::2]
    for value in values:
        with empty_folder():
            assert_refused(place, invoke(place, value))


# Of files and folders, addresses, names, patterns and lists.
ODD = [
    "-", "--", ".", "..", "/", "~", "missing", "missing/too", "there", "there/x", "a file",
    "a file/x", "/sys/x", "/proc/x", "/dev/null", "/dev/full", "/dev/stdin", "/dev/fd/99",
    "link", "n" * 255, "n" * 256, "n" * 255 + ".svg", "m/" * 2000, "a\nb", "a\tb", "\x1b[31m", "é",
    "🙂", "{}", "%s", "[bold]", "'\"", "a b", "*", "(", "(" * 2000, "a{99999999999}", "[z-a]",
    "(?P<x>", "a,b", ",", ",,", "1,2", "_", "1_", "1_1", "65536_1", "1_9999999999",
    ",".join("1" * 200) + "_" + ",".join("1" * 200), "1,65535_1,1", "8:0", "8:8:0", "0:0",
    "9" * 4000, "9" * 30 + ":1", "8,2,64", "0,0,0", "9" * 30 + ",1,64", "²", "-1", "None", "null",
    "http://", "http://[", "http://h:99999", "http://h:x", "http://u:p@h", "ftp://h", "h:1",
    "http://h/?q", "http://127.0.0.1:1", "https://127.0.0.1:1/", "http://127.0.0.1:1\n",
    "x.html", "x.svg", "pat", "sm_90", "launch", "bf16/bf16", "gpu",
]  # fmt: skip


def test_a_tree_that_makes_no_batch() -> None:
    (place,) = (place for place in PLACES if named(place) == "explain --tree")
    with empty_folder():
        assert_refused(place, invoke(place, "1,65535_1,1"))


# There are many places.
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
@pytest.mark.parametrize("place", OTHERS, ids=named)
def test_a_value_is_refused_or_reaches_the_work(place: Place, data: st.DataObject) -> None:
    texts = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
    can_repeat = place[1].multiple or place[1].nargs == -1
    values = data.draw(st.lists(texts, min_size=1, max_size=3 if can_repeat else 1))
    with empty_folder() as folder:
        (folder / "there").mkdir()
        (folder / "prompts").write_text("a\nb")
        (folder / "a file").write_text("[" * 100_000)
        (folder / "link").symlink_to("link")
        before = sorted(folder.iterdir())
        result = invoke(place, *values)
        if not result.status:
            return
        (line,) = result.stderr.splitlines()
        assert line.startswith("sglang-prefix: ")
        assert sorted(folder.iterdir()) == before
        if place[0] == ("exec",):  # as shells have it
            assert result.status in (126, 127)
        elif not any(value in line and os.path.exists(value) for value in values):
            assert result.status == 2, line
            assert place[2] in line
