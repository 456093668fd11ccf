"""The command line: exec, doctor, tiny-model, and what they say when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_prefix.cli import doctor
from sglang_prefix.cli import exec as exec_module
from sglang_prefix.cli.exec import SglKernel, sglang_environment, stand_in_root
from sglang_prefix.cli.main import app
from sglang_prefix.tiny_model import TinyModelConfig, build_tiny_model

CLI = [sys.executable, "-m", "sglang_prefix.cli.main"]
# The stand-in on the path makes the search for the real sgl_kernel short.
STAND_IN = str(stand_in_root())
QUICK = os.environ | {"PYTHONPATH": ":".join([STAND_IN, *filter(None, sys.path)])}
CPU = {"SGLANG_USE_CPU_ENGINE": "1"}
SIGNALS = [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]


def run_cli(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*CLI, *arguments], **({"capture_output": True, "text": True, "env": QUICK} | options)
    )


class TestExec:
    @pytest.mark.parametrize(
        ("kind", "has_gpu", "base", "expected"),
        [
            ("real", True, {"PYTHONPATH": "/mine", "HOME": "/"}, None),
            ("missing", True, {"PYTHONPATH": "/mine", "HOME": "/"}, None),
            ("broken", True, {"PYTHONPATH": "/mine", "HOME": "/"}, None),
            ("real", False, {"PYTHONPATH": "/mine"}, {"PYTHONPATH": "/mine"} | CPU),
            ("missing", False, {"PYTHONPATH": "/a:/b"}, {"PYTHONPATH": f"{STAND_IN}:/a:/b"} | CPU),
            ("broken", False, {}, {"PYTHONPATH": STAND_IN} | CPU),
            ("stand-in", False, {"PYTHONPATH": STAND_IN} | CPU, None),  # exec inside exec
        ],
    )
    def test_the_environment_is_changed_where_it_must_be(
        self, kind: Any, has_gpu: bool, base: dict[str, str], expected: dict[str, str] | None
    ) -> None:
        found = sglang_environment(SglKernel(kind), base, has_gpu=has_gpu)
        assert found == (base if expected is None else expected)
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

    def test_signals_reach_the_command_and_its_status_is_the_result(self, tmp_path: Path) -> None:
        # It notes each signal and ends with a status of its own; a wrapper would spoil either.
        ready, noted = tmp_path / "ready", tmp_path / "noted"
        code = (
            "import pathlib, signal, sys, time\n"
            "def note(number, _):\n"
            f"    with open({str(noted)!r}, 'a') as file: print(number, file=file)\n"
            "    if number == signal.SIGINT: sys.exit(77)\n"
            f"for number in {[int(number) for number in SIGNALS]}: signal.signal(number, note)\n"
            f"pathlib.Path({str(ready)!r}).touch()\n"
            "while True: time.sleep(1)\n"
        )
        process = subprocess.Popen([*CLI, "exec", "--", sys.executable, "-c", code], env=QUICK)
        try:
            wait_for(ready.exists)
            for count, number in enumerate(SIGNALS):
                process.send_signal(number)
                wait_for(lambda count=count: len(lines_of(noted)) > count)
            assert process.wait(timeout=20) == 77
        finally:
            process.kill()
            process.wait()
        assert lines_of(noted) == [str(int(number)) for number in SIGNALS]

    @pytest.mark.parametrize(
        ("script", "status"),
        [
            ("exit 0", 0),
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
        script, plain = tmp_path / "local-script", tmp_path / "plain"
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
        plain.write_text("")
        unknown = run_cli("exec", "--", "local-script", cwd=tmp_path)
        assert unknown.returncode == 127
        assert unknown.stderr == "sglang-prefix: local-script: command not found\n"
        assert run_cli("exec", "--", "./local-script", cwd=tmp_path).returncode == 0
        refused = run_cli("exec", "--", str(plain))
        assert refused.returncode == 126
        assert refused.stderr == f"sglang-prefix: {plain}: cannot be run: Permission denied\n"

    def test_commands_beside_our_interpreter_are_found(self) -> None:
        environment = QUICK | {"PATH": "/nowhere"}
        done = run_cli("exec", "--", Path(sys.executable).name, "-c", "print(1)", env=environment)
        assert done.stdout == "1\n", done.stderr

    def test_no_command_is_a_usage_error(self) -> None:
        done = CliRunner().invoke(app, ["exec"])
        assert done.exit_code == 2
        assert done.stderr == "sglang-prefix: Missing argument 'CMD...'.\n"


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


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

    @pytest.mark.usefixtures("report")
    def test_usable_on_the_cpu_through_exec(self) -> None:
        done = CliRunner().invoke(app, ["doctor"])
        assert done.exit_code == 0, done.output
        assert "usable: yes" in done.stdout.splitlines()[-1]
        assert "sglang-prefix exec" in done.stdout.splitlines()[-1]
        assert "no libcuda" in done.stdout

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (
                {
                    "checks": [
                        {"name": "sums", "ok": False, "detail": "X is gone", "advice": "do Y"}
                    ]
                },
                "sums: X is gone: do Y",
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
        done = CliRunner().invoke(app, ["doctor"])
        assert done.exit_code == 1
        assert done.stdout.splitlines()[-1] == f"usable: no, because {reason}"

    @pytest.mark.usefixtures("report")
    def test_json_is_alone_on_standard_output_or_in_a_file(self, tmp_path: Path) -> None:
        for spelling in (["--json"], ["--json", "-"], ["--json=-"]):
            done = CliRunner().invoke(app, ["doctor", *spelling])
            result = json.loads(done.stdout)
            assert (result["usable"], result["needs_exec"]) == (True, True)
            assert result["versions"]["torch"] is None
            assert "usable: yes" in done.stderr
        file, nowhere = tmp_path / "a.json", tmp_path / "no" / "a.json"
        for spelling in (["--json", str(file)], [f"--json={file}"]):
            done = CliRunner().invoke(app, ["doctor", *spelling])
            assert "usable: yes" in done.stdout
            assert json.loads(file.read_text()) == result
            file.unlink()
        done = CliRunner().invoke(app, ["doctor", "--json", str(nowhere)])
        assert done.exit_code == 1
        assert f"cannot write {nowhere}" in done.stderr

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

    @pytest.mark.extended
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

    def test_what_is_in_the_way_is_left_alone(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.txt"
        mine.write_text("mine")
        for target, message in ((tmp_path, "--force"), (mine, "cannot write to")):
            refused = CliRunner().invoke(app, ["tiny-model", str(target)])
            assert refused.exit_code == 1
            assert message in refused.stderr
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
