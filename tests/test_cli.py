"""The command line: exec, doctor, tiny-model, and what they say when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_prefix.cli import doctor
from sglang_prefix.cli import exec as exec_module
from sglang_prefix.cli.exec import SglKernel, sglang_environment, stand_in_root
from sglang_prefix.cli.main import app
from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

CLI = [sys.executable, "-m", "sglang_prefix.cli.main"]
# The stand-in on the path makes the search for the real sgl_kernel short.
QUICK = os.environ | {"PYTHONPATH": str(stand_in_root())}


def run_cli(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*CLI, *arguments], **({"capture_output": True, "text": True, "env": QUICK} | options)
    )


class TestExec:
    @pytest.mark.parametrize("kind", ["real", "missing", "broken"])
    def test_a_gpu_leaves_the_environment_alone(self, kind: str) -> None:
        base = {"PYTHONPATH": "/mine", "HOME": "/home"}
        kernel = SglKernel(kind)  # type: ignore[arg-type]
        assert sglang_environment(kernel, base, has_gpu=True) == base

    def test_real_kernel_without_a_gpu_needs_the_cpu_engine_only(self) -> None:
        found = sglang_environment(SglKernel("real"), {"PYTHONPATH": "/mine"}, has_gpu=False)
        assert found == {"PYTHONPATH": "/mine", "SGLANG_USE_CPU_ENGINE": "1"}

    @pytest.mark.parametrize("kind", ["missing", "broken"])
    def test_without_a_kernel_the_stand_in_comes_first(self, kind: str) -> None:
        environment = sglang_environment(SglKernel(kind), {"PYTHONPATH": "/mine:/yours"})  # type: ignore[arg-type]
        assert environment["PYTHONPATH"] == f"{stand_in_root()}:/mine:/yours"
        assert environment["SGLANG_USE_CPU_ENGINE"] == "1"

    def test_without_a_path_of_the_user_nothing_is_appended(self) -> None:
        environment = sglang_environment(SglKernel("missing"), {})
        assert environment["PYTHONPATH"] == str(stand_in_root())

    def test_nested_exec_does_not_add_the_stand_in_again(self) -> None:
        once = sglang_environment(SglKernel("missing"), {})
        assert sglang_environment(SglKernel("stand-in"), once) == once

    def test_the_stand_in_folder_holds_the_module(self) -> None:
        assert (stand_in_root() / "sgl_kernel" / "__init__.py").is_file()

    def test_a_failed_import_is_explained_by_the_missing_library(self) -> None:
        library = "libcuda.so.1: cannot open shared object file: No such file or directory"
        output = f"Traceback\nImportError:\n- ImportError: {library}\n- something else"
        assert exec_module._cause(output) == f"ImportError: {library}"
        assert exec_module._cause("Traceback\nValueError: no") == "ValueError: no"
        assert exec_module._cause("") == ""

    def test_command_sees_the_environment_and_its_own_options(self) -> None:
        code = (
            "import os, sys, sgl_kernel; print(os.environ.get('SGLANG_USE_CPU_ENGINE'), sys.argv)"
        )
        done = run_cli("exec", sys.executable, "-c", code, "--help", "--json")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split(maxsplit=1)[1].strip() == "['-c', '--help', '--json']"

    @pytest.mark.parametrize("status", [0, 7, 255])
    def test_status_is_the_commands(self, status: int) -> None:
        assert run_cli("exec", "--", "sh", "-c", f"exit {status}").returncode == status

    @pytest.mark.parametrize(
        "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
    )
    def test_signals_reach_the_command(self, number: signal.Signals, tmp_path: Path) -> None:
        # The command notes the signal and chooses its own status; a wrapper would spoil either.
        ready = tmp_path / "ready"
        code = (
            "import pathlib, signal, sys, time\n"
            f"signal.signal({int(number)}, lambda n, _: sys.exit(40 + n))\n"
            f"pathlib.Path({str(ready)!r}).touch()\n"
            "time.sleep(30)\n"
        )
        process = subprocess.Popen([*CLI, "exec", "--", sys.executable, "-c", code], env=QUICK)
        try:
            wait_for(ready)
            process.send_signal(number)
            assert process.wait(timeout=20) == 40 + number
        finally:
            process.kill()
            process.wait()

    def test_signal_death_is_seen_as_such(self) -> None:
        done = run_cli("exec", "--", "sh", "-c", "kill -KILL $$")
        assert done.returncode == -signal.SIGKILL

    def test_broken_pipe_ends_the_command_quietly(self) -> None:
        done = run_cli("exec", "--", "sh", "-c", "trap - PIPE; kill -PIPE $$; echo survived")
        assert done.returncode == -signal.SIGPIPE
        assert "survived" not in done.stdout

    def test_unknown_command(self) -> None:
        done = run_cli("exec", "--", "no-such-command")
        assert done.returncode == 127
        assert done.stderr == "sglang-prefix: no-such-command: command not found\n"

    def test_a_file_in_the_working_directory_is_not_a_command(self, tmp_path: Path) -> None:
        script = tmp_path / "local-script"
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
        assert run_cli("exec", "--", "local-script", cwd=tmp_path).returncode == 127
        assert run_cli("exec", "--", "./local-script", cwd=tmp_path).returncode == 0

    def test_not_executable(self, tmp_path: Path) -> None:
        plain = tmp_path / "plain"
        plain.write_text("")
        done = run_cli("exec", "--", str(plain))
        assert done.returncode == 126
        assert done.stderr == f"sglang-prefix: {plain}: cannot be run: Permission denied\n"

    def test_no_command_is_a_usage_error(self) -> None:
        done = run_cli("exec")
        assert done.returncode == 2
        assert "CMD" in done.stderr

    def test_commands_beside_our_interpreter_are_found(self) -> None:
        environment = QUICK | {"PATH": "/nowhere"}
        done = run_cli("exec", "--", Path(sys.executable).name, "-c", "print(1)", env=environment)
        assert done.stdout == "1\n", done.stderr


def wait_for(path: Path, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sglang_prefix.cli.main import app;"
        "print([m for m in ('torch', 'sglang', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestDoctor:
    @pytest.fixture
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

    def test_usable_on_the_cpu_through_exec(self, report: dict[str, object]) -> None:
        done = CliRunner().invoke(app, ["doctor"])
        assert done.exit_code == 0, done.output
        assert "usable: yes" in done.stdout.splitlines()[-1]
        assert "sglang-prefix exec" in done.stdout.splitlines()[-1]
        assert "no libcuda" in done.stdout

    def test_not_usable_says_why_and_what_to_do(self, report: dict[str, object]) -> None:
        report["checks"] = [
            {"name": "patched symbols", "ok": False, "detail": "X is gone", "advice": "do Y"}
        ]
        done = CliRunner().invoke(app, ["doctor"])
        assert done.exit_code == 1
        assert done.stdout.splitlines()[-1] == (
            "usable: no, because patched symbols: X is gone: do Y"
        )

    def test_a_gpu_without_its_kernels_is_not_usable(self, report: dict[str, object]) -> None:
        report["device"] = {"kind": "cuda", "name": "some GPU"}
        done = CliRunner().invoke(app, ["doctor", "--json"])
        assert done.exit_code == 1
        assert "sglang-kernel" in json.loads(done.stdout)["reason"]

    @pytest.mark.parametrize("spelling", [["--json"], ["--json", "-"], ["--json=-"]])
    def test_json_on_standard_output_is_alone_there(
        self, report: dict[str, object], spelling: list[str]
    ) -> None:
        done = CliRunner().invoke(app, ["doctor", *spelling])
        result = json.loads(done.stdout)
        assert result["usable"] is True
        assert result["needs_exec"] is True
        assert result["versions"]["torch"] is None
        assert "usable: yes" in done.stderr

    @pytest.mark.parametrize("joined", [True, False])
    def test_json_to_a_file(self, report: dict[str, object], joined: bool, tmp_path: Path) -> None:
        target = tmp_path / "doctor.json"
        spelling = [f"--json={target}"] if joined else ["--json", str(target)]
        done = CliRunner().invoke(app, ["doctor", *spelling])
        assert "usable: yes" in done.stdout
        assert json.loads(target.read_text())["usable"] is True

    def test_json_to_an_impossible_file(self, report: dict[str, object], tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "no" / "x.json")])
        assert done.exit_code == 1
        assert "cannot write" in done.stderr

    def test_a_crashing_examination_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        report = doctor._examine(SglKernel("stand-in"))
        assert [check["ok"] for check in report["checks"]] == [False]

    def test_this_environment_is_usable(self) -> None:
        done = run_cli("doctor", "--json", env=os.environ)
        result = json.loads(done.stdout)
        assert result["usable"], result["reason"]
        assert done.returncode == 0
        assert {"python", "torch", "triton", "sglang", "sglang-prefix"} <= set(result["versions"])

    def test_a_plugin_shut_out_is_found(self) -> None:
        done = run_cli("doctor", "--json", env=os.environ | {"SGLANG_PLUGINS": "another"})
        assert done.returncode == 1
        result = json.loads(done.stdout)
        assert not result["usable"]
        assert "SGLANG_PLUGINS" in result["reason"]


class TestTinyModel:
    def test_round_trip(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["tiny-model", str(tmp_path), "--layers", "1", "--json"])
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
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            build_tiny_model(tmp_path / name, TinyModelConfig(num_layers=1, seed=seed))
        contents = {
            name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            for name in "abc"
        }
        assert contents["a"] == contents["b"]
        assert contents["a"]["model.safetensors"] != contents["c"]["model.safetensors"]

    def test_a_folder_in_use_is_left_alone(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.txt"
        mine.write_text("mine")
        refused = CliRunner().invoke(app, ["tiny-model", str(tmp_path)])
        assert refused.exit_code == 1
        assert "--force" in refused.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
        forced = CliRunner().invoke(app, ["tiny-model", str(tmp_path), "--force"])
        assert forced.exit_code == 0, forced.output
        assert mine.read_text() == "mine"
        assert (tmp_path / "config.json").exists()

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--heads", "6", "--kv-heads", "4"], "num_heads is 6"),
            (["--hidden-size", "100"], "hidden_size is 100"),
            (["--head-dim", "7"], "head_dim is 7"),
            (["--vocab-size", "100"], "vocab_size is 100"),
            (["--layers", "0"], "num_layers is 0"),
            (["--std", "0"], "std is 0"),
            (["--sliding-window", "8"], "sliding_window is 8"),
            (["--dtype", "int8"], "int8"),
        ],
    )
    def test_impossible_shapes(self, options: list[str], complaint: str, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["tiny-model", str(tmp_path / "model"), *options])
        assert done.exit_code == 2
        assert complaint in done.stderr
        assert not (tmp_path / "model").exists()

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        done = CliRunner().invoke(app, ["tiny-model", str(tmp_path / "file")])
        assert done.exit_code == 1
        assert "cannot write to" in done.stderr

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

    def test_cache_scales_are_in_the_checkpoint(self, tmp_path: Path) -> None:
        build_tiny_model(tmp_path, TinyModelConfig(kv_scales=((0.5, 2.0), (3.0, 0.25))))
        from safetensors import safe_open

        with safe_open(tmp_path / "model.safetensors", "np") as weights:
            scale = weights.get_tensor("model.layers.1.self_attn.k_scale")
        assert float(scale) == 3.0
        scheme = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert scheme["kv_cache_scheme"]["num_bits"] == 8
