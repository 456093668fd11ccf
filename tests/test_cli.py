"""The command line: exec, doctor, tiny-model, and what they say when something is wrong."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner, Result

from sglang_prefix import sglang_environment as environment_module
from sglang_prefix.cli import doctor
from sglang_prefix.cli.main import app
from sglang_prefix.sglang_environment import SglKernel, sglang_environment, stand_in_root
from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

CLI = [sys.executable, "-m", "sglang_prefix.cli.main"]
# The stand-in on the path makes the search for the real sgl_kernel short.
STAND_IN = str(stand_in_root())
QUICK = os.environ | {"PYTHONPATH": ":".join([STAND_IN, *filter(None, sys.path)])}
CPU = {"SGLANG_USE_CPU_ENGINE": "1"}
SIGNALS = [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
# A command that notes each signal and ends with a status of its own.
NOTES_SIGNALS = """
import pathlib, signal, sys, time
def note(number, _):
    with open("noted", "a") as file: print(number, file=file)
    if number == signal.SIGINT: sys.exit(77)
for number in map(int, sys.argv[1:]): signal.signal(number, note)
pathlib.Path("noted").touch()
while True: time.sleep(1)
"""


def run_cli(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*CLI, *arguments], **({"capture_output": True, "text": True, "env": QUICK} | options)
    )


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


class TestExec:
    @pytest.mark.parametrize(
        ("kind", "has_gpu", "base", "expected"),
        [
            ("real", True, {"PYTHONPATH": "/mine"}, {"PYTHONPATH": "/mine"}),
            ("missing", True, {"PYTHONPATH": "/mine"}, {"PYTHONPATH": "/mine"}),
            ("real", False, {"PYTHONPATH": "/mine"}, {"PYTHONPATH": "/mine"} | CPU),
            ("missing", False, {"PYTHONPATH": "/a:/b"}, {"PYTHONPATH": f"{STAND_IN}:/a:/b"} | CPU),
            ("broken", False, {}, {"PYTHONPATH": STAND_IN} | CPU),
            ("stand-in", False, {"PYTHONPATH": STAND_IN} | CPU, {"PYTHONPATH": STAND_IN} | CPU),
        ],
    )
    def test_the_environment_is_changed_where_it_must_be(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kind: Any,
        has_gpu: bool,
        base: dict[str, str],
        expected: dict[str, str],
    ) -> None:
        monkeypatch.setattr(environment_module, "has_gpu", lambda: has_gpu)
        assert sglang_environment(SglKernel(kind), base) == expected

    def test_a_failed_import_is_explained_by_the_missing_library(self) -> None:
        library = "libcuda.so.1: cannot open shared object file: No such file or directory"
        output = f"Traceback\nImportError:\n- ImportError: {library}\n- something else"
        assert environment_module._cause(output) == f"ImportError: {library}"
        assert environment_module._cause("Traceback\nValueError: no") == "ValueError: no"
        assert environment_module._cause("") == ""

    def test_signals_reach_the_command_and_its_status_is_the_result(self, tmp_path: Path) -> None:
        numbers, noted = [str(int(number)) for number in SIGNALS], tmp_path / "noted"
        command = [*CLI, "exec", "--", sys.executable, "-c", NOTES_SIGNALS, *numbers]
        process = subprocess.Popen(command, env=QUICK, cwd=tmp_path)
        try:
            wait_for(noted.exists)
            for count, number in enumerate(SIGNALS):
                process.send_signal(number)
                wait_for(lambda count=count: len(noted.read_text().split()) > count)
            assert process.wait(timeout=20) == 77
        finally:
            process.kill()
            process.wait()
        assert noted.read_text().split() == numbers

    @pytest.mark.parametrize(
        ("script", "status"),
        [
            ("exit 255", 255),
            ("kill -KILL $$", -signal.SIGKILL),
            # Python ignores it for itself; a command dies of it, and quietly.
            ("trap - PIPE; kill -PIPE $$; echo survived", -signal.SIGPIPE),
        ],
    )
    def test_the_end_of_the_command_is_ours(self, script: str, status: int) -> None:
        done = run_cli("exec", "--", "sh", "-c", script)
        assert done.returncode == status
        assert not done.stdout

    def test_commands_are_found_as_a_shell_finds_them(self, tmp_path: Path) -> None:
        (tmp_path / "local-script").write_text("#!/bin/sh\n")
        (tmp_path / "local-script").chmod(0o755)
        (tmp_path / "plain").write_text("")
        for command, status, said in (
            ("./local-script", 0, ""),
            ("local-script", 127, "sglang-prefix: local-script: command not found\n"),
            ("./none", 127, "sglang-prefix: ./none: command not found\n"),
            ("./plain", 126, "sglang-prefix: ./plain: cannot be run: Permission denied\n"),
        ):
            done = run_cli("exec", "--", command, cwd=tmp_path)
            assert (done.returncode, done.stderr) == (status, said)

    def test_commands_beside_our_interpreter_get_their_own_options(self) -> None:
        command = ["exec", Path(sys.executable).name, "-c", "import sys; print(sys.argv)"]
        done = run_cli(*command, "--help", "--json", env=QUICK | {"PATH": "/nowhere"})
        assert done.stdout == "['-c', '--help', '--json']\n", done.stderr
        assert invoke("exec").stderr == "sglang-prefix: Missing argument 'CMD...'.\n"


class TestStandIn:
    """The stand-in `sgl_kernel`: enough for SGLang's imports and for chains of drafts.

    What those need is tested in engine/test_stand_in.py.
    """

    @pytest.fixture
    def sgl_kernel(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """Make `import sgl_kernel` give the stand-in, also on a host with the real one."""
        stand_in = importlib.import_module("prefix_patches.sgl_kernel_cpu.sgl_kernel")
        monkeypatch.setitem(sys.modules, "sgl_kernel", stand_in)
        return stand_in

    def test_what_sglang_imports_is_there_and_trees_are_refused(
        self, sgl_kernel: ModuleType
    ) -> None:
        for name in (
            "assign_draft_cache_locs_contiguous_cpu",
            "assign_extend_cache_locs_cpu",
            "assign_req_to_token_pool_cpu",
            "build_tree_kernel_efficient_cpu",
            "copy_all_layer_kv_cache_cpu",
            "fill_accept_out_cache_loc_cpu",
            "fill_bonus_tokens_cpu",
            "verify_tree_greedy_cpu",
        ):
            assert callable(getattr(sgl_kernel, name))
        with pytest.raises(NotImplementedError, match=r"builds no trees; legal: topk 1"):
            sgl_kernel.build_tree_kernel_efficient_cpu(*[None] * 8, 2, 3, 4, 1)

    def test_any_other_name_is_an_import_error(self, sgl_kernel: ModuleType) -> None:
        assert sgl_kernel.__version__
        for name in ("rmsnorm", "__wrapped__"):  # SGLang asks for the first, inspect for the second
            assert not hasattr(sgl_kernel, name)
        with pytest.raises(ImportError, match=r"'rmsnorm'.*stand-in"):
            exec("from sgl_kernel import rmsnorm")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("sgl_kernel.allreduce")


class TestDoctor:
    @pytest.fixture(autouse=True)
    def report(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
        """Stand in for the examination, which takes seconds; tests change what it found."""
        found: dict[str, object] = {
            "versions": {"sglang": "0.5.23", "torch": None},
            "device": {"kind": "cpu", "name": "x86_64"},
            "checks": [{"name": "SGLang version", "ok": True, "detail": "fine", "advice": ""}],
        }
        monkeypatch.setattr(doctor, "_examine", lambda _: found)
        monkeypatch.setattr(doctor, "find_sgl_kernel", lambda: SglKernel("broken", "no libcuda"))
        return found

    def test_usable_on_the_cpu_through_exec(self) -> None:
        done = invoke("doctor")
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-1].startswith("usable: yes, on the CPU, in processes")
        assert "sglang-prefix exec" in done.stdout
        assert "no libcuda" in done.stdout

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (
                {"checks": [{"name": "sums", "ok": False, "detail": "X", "advice": "do Y"}]},
                "sums: X: do Y",
            ),
            (
                {"device": {"kind": "cuda", "name": "some GPU"}},
                "sgl_kernel: the installed one does not load (no libcuda): install the "
                "sglang-kernel that fits SGLang",
            ),
        ],
    )
    def test_not_usable_says_why_and_what_to_do(
        self, report: dict[str, object], change: dict[str, object], reason: str
    ) -> None:
        report |= change
        done = invoke("doctor")
        assert done.exit_code == 1
        assert done.stdout.splitlines()[-1] == f"usable: no, because {reason}"

    def test_json_is_alone_on_standard_output_or_in_a_file(self, tmp_path: Path) -> None:
        for spelling in (["--json"], ["--json", "-"], ["--json=-"]):
            done = invoke("doctor", *spelling)
            result = json.loads(done.stdout)
            assert (result["usable"], result["needs_exec"]) == (True, True)
            assert result["versions"]["torch"] is None
            assert "usable: yes" in done.stderr
        file, nowhere = tmp_path / "a.json", tmp_path / "no" / "a.json"
        for spelling in (["--json", str(file)], [f"--json={file}"]):
            assert "usable: yes" in invoke("doctor", *spelling).stdout
            assert json.loads(file.read_text()) == result
            file.unlink()
        done = invoke("doctor", "--json", nowhere)
        assert done.exit_code == 2
        assert f"'--json': {nowhere}: No such file or directory; legal: a file" in done.stderr


def test_a_crashing_examination_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = doctor._examine(SglKernel("stand-in"))
    assert [check["ok"] for check in report["checks"]] == [False]


def test_this_environment_is_usable() -> None:
    done = run_cli("doctor", "--json", env=os.environ)
    result = json.loads(done.stdout)
    assert result["usable"], result["reason"]
    assert done.returncode == 0
    assert {"python", "torch", "triton", "sglang", "sglang-prefix"} <= set(result["versions"])


@pytest.mark.extended
def test_a_plugin_shut_out_is_found() -> None:
    done = run_cli("doctor", "--json", env=os.environ | {"SGLANG_PLUGINS": "another"})
    assert done.returncode == 1
    assert "SGLANG_PLUGINS" in json.loads(done.stdout)["reason"]


class TestTinyModel:
    def test_round_trip(self, tmp_path: Path) -> None:
        done = invoke("tiny-model", tmp_path, "--layers", "1", "--json")
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert result["num_layers"] == 1

        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert sum(p.numel() for p in model.parameters()) == result["num_parameters"]
        assert model.config.head_dim == 32
        assert model.generation_config.eos_token_id == 257
        spread = model.model.layers[0].self_attn.q_proj.weight.detach().std()
        assert float(spread) == pytest.approx(0.08, rel=0.05)
        assert set(model.model.norm.weight.tolist()) == {1.0}

    def test_tokenizer_gives_every_text_back(self, tmp_path: Path) -> None:
        build_tiny_model(tmp_path)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        everything = "".join(map(chr, [*range(0x250), 0x2603, 0xFFFD, 0x1F600]))
        for text in ("", " ", "Hello, wörld!  It 's\n\t", "<|bos|> <|300|>", everything):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode("ab ☃")) == 6
        assert tokenizer.decode([400]) == "<|400|>"
        chat = [{"role": "user", "content": "hi"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "user: hi\nassistant: "

    def test_equal_seeds_give_equal_files(self, tmp_path: Path) -> None:
        contents = []
        for number, seed in enumerate((3, 3, 4)):
            folder = tmp_path / str(number)
            build_tiny_model(folder, TinyModelConfig(num_layers=1, seed=seed))
            contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert contents[0] == contents[1]
        assert contents[0]["model.safetensors"] != contents[2]["model.safetensors"]

    def test_what_is_in_the_way_is_left_alone(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.txt"
        mine.write_text("mine")
        for target, message in ((tmp_path, "--force"), (mine, "Not a directory; legal: a fold")):
            refused = invoke("tiny-model", target)
            assert refused.exit_code == 2
            assert message in refused.stderr
            assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
        forced = invoke("tiny-model", tmp_path, "--force")
        assert forced.exit_code == 0, forced.output
        assert mine.read_text() == "mine"
        assert (tmp_path / "config.json").exists()

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ("--heads 6 --kv-heads 4", "--heads is 6"),
            ("--hidden-size 100", "--hidden-size is 100"),
            ("--head-dim 7", "--head-dim is 7"),
            ("--vocab-size 100", "--vocab-size is 100"),
            ("--layers 0", "'--layers': "),
            ("--std 0", "'--std': "),
            ("--std inf", "'--std': "),
            ("--seed 1180591620717411303424", "'--seed': "),
            ("--hidden-size 1099511627776", "legal: 1 to 65536"),
            ("--hidden-size 65536 --head-dim 64 --layers 64", "the number of parameters is 1"),
            ("--sliding-window 8", "--sliding-window is 8"),
            ("--dtype int8", "int8"),
        ],
    )
    def test_impossible_shapes(self, options: str, complaint: str, tmp_path: Path) -> None:
        done = invoke("tiny-model", tmp_path / "model", *options.split())
        assert done.exit_code == 2
        assert complaint in done.stderr
        assert not (tmp_path / "model").exists()

    def test_a_disk_that_is_full_midway_leaves_nothing(self, tmp_path: Path) -> None:
        """Files are limited to what the configuration needs, and the weights do not."""
        limit = f"ulimit -f 64; exec {' '.join(CLI)} tiny-model"
        for target in ("new/model", "."):
            command = ["bash", "-c", f"{limit} {target}"]
            done = subprocess.run(command, capture_output=True, text=True, env=QUICK, cwd=tmp_path)
            assert done.returncode == 1, done.stderr
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"sglang-prefix: cannot write to {target}: ")
            assert list(tmp_path.iterdir()) == []

    def test_what_the_disk_or_the_memory_cannot_hold_is_not_begun(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = TinyModelConfig(num_layers=1)
        parameters = build_tiny_model(tmp_path / "a", config)
        assert 0.98 * 4 * parameters < config.num_bytes <= 4 * parameters
        free = SimpleNamespace(free=config.num_bytes - 1, available=2 * config.num_bytes - 1)
        for owner, name in ((shutil, "disk_usage"), (psutil, "virtual_memory")):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, lambda *_: free)
                done = invoke("tiny-model", tmp_path / "b", "--layers", "1")
            assert done.exit_code == 1
            assert "of weights, " in done.stderr
            assert [path.name for path in tmp_path.iterdir()] == ["a"]

    @pytest.mark.parametrize(
        "config",
        [
            TinyModelConfig(arch="olmo3", sliding_window=16),
            TinyModelConfig(arch="gemma2", sliding_window=16, logit_cap=2.0, dtype="bfloat16"),
        ],
        ids=lambda config: config.arch,
    )
    def test_alternating_layers(self, config: TinyModelConfig, tmp_path: Path) -> None:
        build_tiny_model(tmp_path, config)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.config.layer_types == ["sliding_attention", "full_attention"]
        assert model.config.sliding_window == 16
        assert str(model.dtype) == f"torch.{config.dtype}"
