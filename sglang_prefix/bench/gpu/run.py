"""The run of `bench gpu`: each step in processes of its own, killed at its limit."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import Any, ClassVar

from sglang_prefix.bench.child import cause_in, kill_session, spawn
from sglang_prefix.bench.gpu.pack import CACHE, FASTTREE, carried_files
from sglang_prefix.bench.gpu.steps import STEPS, Step
from sglang_prefix.bench.providers.fasttree import FOLDER_VARIABLE
from sglang_prefix.bench.results import KINDS, ResultError, read_result
from sglang_prefix.bench.run import BenchRun, Case, NotRunError
from sglang_prefix.files import read_json, read_tail
from sglang_prefix.kernel_cache import settle

__all__ = ["GpuRun", "wrong_results"]

_ROOT = Path(__file__).parents[3]
_TESTS = _ROOT / "tests" / "gpu"
_USUAL = "triton/pat"
# What a step leaves in its folder: results, logs, counters.
_LEFT = {".json", ".txt", ".csv"}
_LOG = re.compile(r"log\d+")
# How many times as long a step of a dry run may take, on cores that others may use as well.
_DRY_PATIENCE = 20


class GpuRun(BenchRun):
    """The run of `bench gpu`; its one option is the folder that was carried here, or None.

    Raises:
        ValueError: this is no checkout, whose tests it runs, or what was carried cannot be
            unpacked, or the folder for it belongs to another user.
    """

    kind, file_name = "bench-gpu", "gpu.json"
    steps: ClassVar[tuple[Step, ...]] = STEPS

    def __init__(self, folder: Path, *, resume: bool = False, **more: Any) -> None:
        self._resumes = resume
        super().__init__(folder, resume=resume, **more)
        # A step that must hold and had too little time is worth another try.
        must_hold = {step.name for step in self.steps if step.must_hold}
        self.data["cases"] = [
            case
            for case in self.data["cases"]
            if case["name"] not in must_hold or case["status"] != "overran" or wrong_results(case)
        ]
        # What lies there of a step that has not run is an older run's.
        ran = {case["name"] for case in self.data["cases"]}
        for step in self.steps:
            if step.name not in ran:
                _clear(folder / step.name)

    def use(self, options: Mapping[str, Any]) -> None:
        """Look for the tests, and unpack what was carried, in seconds."""
        if not _TESTS.is_dir():
            raise ValueError(f"{_TESTS} is not there; legal: run it in a checkout")
        carried = options.get("carried")
        place = Path(tempfile.gettempdir(), f"sglang-prefix-{os.getuid()}")
        if carried:
            _own(place)
            if not self._resumes:
                _empty(place)
        paths = [str(_ROOT / part) for part in ("", "kernels", "patches")]
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name, file in carried_files(Path(carried)).items() if carried else ():
            target = place / (name if name in (CACHE, FASTTREE) else "site")
            try:
                with tarfile.open(file) as archive:
                    archive.extractall(target, filter="data")
            except (tarfile.TarError, LZMAError, EOFError) as error:
                raise ValueError(f"{file} cannot be unpacked: {error}") from None
            if name == CACHE:
                settle(target)
                self._environment["TRITON_CACHE_DIR"] = str(target)
            elif name == FASTTREE:
                self._environment[FOLDER_VARIABLE] = str(target)
            elif str(target) not in paths:
                # SGLang's own kernels, compiled before, if they are in it.
                self._environment["TVM_FFI_CACHE_DIR"] = str(target / "sglang_jit")
                paths.append(str(target))
        before = self._environment.get("PYTHONPATH")
        self._environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [before])])
        default = Path.home() / ".triton" / "cache"
        self._cache = Path(self._environment.get("TRITON_CACHE_DIR", default))

    def cases(self) -> list[Case]:
        """A step of a real run begins only if its whole limit is left."""
        return [
            Case(
                step.name,
                step.decides,
                partial(self._run, step),
                None if self.data["dry"] else partial(self._limit_s, step),
            )
            for step in self.steps
        ]

    def _limit_s(self, step: Step) -> float:
        return step.limit_s * (_DRY_PATIENCE if self.data["dry"] else 1)

    def _run(self, step: Step) -> dict[str, Any]:
        self._check_what_must_hold(step)
        if step.after and not self._asks_for(*step.after):
            raise NotRunError(f"not needed: {step.after[0]} found no {step.after[1]}")
        folder = self.path.parent / step.name
        folder.mkdir(exist_ok=True)
        _clear(folder)
        before = self._num_compiled()
        failed, overran = self._run_commands(step, folder)
        says, wrong = _read_all(folder)
        failed |= wrong
        return {
            "status": "overran" if overran else "failed" if failed else "done",
            "limit_s": self._limit_s(step),
            "compiled": self._num_compiled() - before,
            "says": says,
            "failed": failed,
        }

    def _check_what_must_hold(self, step: Step) -> None:
        """Refuse a step unless those before it that must hold do, in this run or the one before."""
        before = self.steps[: self.steps.index(step)]
        for name in (one.name for one in before if one.must_hold):
            case = self._case(name)
            if case is None:
                raise NotRunError(f"{name} was not run, which has to hold first")
            if case["status"] == "failed" or wrong_results(case) or not case["says"].get("passed"):
                raise NotRunError(f"{name} failed, which has to hold first")

    def _case(self, name: str) -> dict[str, Any] | None:
        return next((case for case in self.data["cases"] if case["name"] == name), None)

    def _run_commands(self, step: Step, folder: Path) -> tuple[dict[str, str], bool]:
        """Run them side by side; why some failed, by their logs' names, and if one was killed."""
        limit_s = self._limit_s(step)
        budget_s = limit_s - step.margin_s
        meant = {"{folder}": folder, "{tests}": _TESTS, "{budget_s}": budget_s}
        meant["{cache}"] = self._cache
        dry = ("--dry", *step.dry) if self.data["dry"] else ()
        deadline = time.monotonic() + limit_s
        failed: dict[str, str] = {}
        overran = False
        logs = [folder / f"log{number}.txt" for number, _ in enumerate(step.commands, 1)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, log in zip(step.commands, logs, strict=True):
                given = [_replaced(word, meant) for word in (*command, *dry)]
                processes.append(spawn(["run", sys.executable, *given], self._environment, log))
            for process, log in zip(processes, logs, strict=True):
                try:
                    status = process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    failed[log.stem], overran = f"killed after {limit_s:g} s", True
                else:
                    if status:
                        failed[log.stem] = f"status {status}: {cause_in(read_tail(log))}"
        finally:
            for process in processes:
                kill_session(process)
        return failed, overran

    def _num_compiled(self) -> int:
        return 0 if self.data["dry"] else sum(1 for _ in self._cache.glob("*/*.cubin"))

    def _asks_for(self, step: str, what: str) -> bool:
        """Whether a step found some of it, or could not tell, or has not run."""
        case = self._case(step)
        return case is None or case["status"] != "done" or bool(case["says"].get(what))


def wrong_results(case: Mapping[str, Any]) -> dict[str, str]:
    """What the results of a step say is wrong; not that one of its processes failed."""
    return {name: why for name, why in case["failed"].items() if not _LOG.fullmatch(name)}


def _own(folder: Path) -> None:
    """Make a folder that only this user can write to, since Python is to import from it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(
            f"{folder} is no folder of this user; legal: TMPDIR that names a folder of yours"
        )
    folder.chmod(0o700)


def _empty(folder: Path) -> None:
    for old in folder.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()


def _clear(folder: Path) -> None:
    """Remove the files of an older run of a step; its folder may be missing."""
    for old in folder.glob("*"):
        if old.suffix in _LEFT:
            old.unlink()


def _replaced(word: str, meant: Mapping[str, object]) -> str:
    for placeholder, value in meant.items():
        word = word.replace(placeholder, str(value))
    return word


def _read_all(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the results of a step say, in few words, and what of it is wrong, and why."""
    says: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    files = sorted(folder.glob("*.json"))
    for file in files:
        if file.stem == "facts":
            says |= read_json(file)
            continue
        try:
            data = read_result(file)
        except ResultError as error:
            wrong[file.stem] = str(error)
            continue
        wrong |= {f"{file.stem}: {name}": why for name, why in data["failed"].items()}
        # Two results of a step have the same to say.
        prefix = f"{file.stem}: " if len(files) > 1 else ""
        says |= {prefix + name: what for name, what in _SAYINGS[data["kind"]](data).items()}
    return says, wrong


def _say_check(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"passed": len(data["cases"]), "not run": len(data["not_run"])}


def _say_kernel(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of each case ours and the fastest of all, of chains all, in microseconds of a layer."""
    says: dict[str, Any] = dict(data.get("limits") or {})
    for case in data["cases"]:
        us = {name: found["kernel_us"] for name, found in case["providers"].items()}
        chosen = [name for name in us if name == _USUAL or name.startswith("chain/")]
        shown = dict.fromkeys((*chosen, *sorted(us, key=us.__getitem__)[:1]))
        says[case["name"]] = ", ".join(f"{name} {us[name]:.1f} us" for name in shown)
    return says


def _say_tune(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of each shape the fastest tile."""
    cases = ((case["name"], case["tiles"]) for case in data["cases"] if case["tiles"])
    return {name: min(tiles, key=lambda tile: tiles[tile]["kernel_us"]) for name, tiles in cases}


_SAYINGS: dict[str, Any] = dict.fromkeys(KINDS, lambda data: {})
_SAYINGS |= {"gpu-check": _say_check, "bench-kernel": _say_kernel, "bench-tune": _say_tune}
