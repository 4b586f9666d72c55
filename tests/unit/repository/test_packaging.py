"""The wheel is complete, the layers stay apart, and files stay short enough to read."""

import ast
import os
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.support.tiny import make_model

REPOSITORY = Path(__file__).resolve().parents[3]
METHODS = REPOSITORY / "quant_methods" / "compress_methods"
PLUGIN = REPOSITORY / "plugin" / "vllm_compress"
CONFIGS = REPOSITORY / "configs"
LEFTOVERS = {".pyc", ".so", ".o"}


def files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in LEFTOVERS
    )


def run_elsewhere(code: str, cwd: Path, *python_path: Path) -> str:
    """What `code` prints in a fresh interpreter that knows the repository only by `python_path`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, python_path))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that sees the packages of this one, and has the wheel by pip."""
    built, folder = (tmp_path_factory.mktemp(name) for name in ("wheel", "environment"))
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # The .pth files in there, such as that of an editable install, are not read from here.
    (site / "theirs.pth").write_text(sysconfig.get_path("purelib"))
    python = str(folder / "bin" / "python")
    for command in (
        ["hatchling", "build", "-t", "wheel", "-d", str(built)],
        ["pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"],
    ):
        wheels = [str(path) for path in built.glob("*.whl")]
        subprocess.run(
            [sys.executable, "-m", *command, *wheels], cwd=REPOSITORY, check=True, timeout=120
        )
    return folder


@pytest.fixture(scope="module")
def installed(environment: Path) -> Path:
    """Where the wheel's packages are."""
    (site,) = environment.glob("lib/python*/site-packages")
    return site


def test_wheel_carries_every_file_of_both_packages_and_the_configs(installed: Path) -> None:
    sources = {
        METHODS: installed / "compress_methods",
        PLUGIN: installed / "vllm_compress",
        CONFIGS: installed / "compress_methods" / "configs",
    }
    missing = [
        str(path.relative_to(REPOSITORY))
        for source, target in sources.items()
        for path in files(source)
        if not (target / path.relative_to(source)).is_file()
    ]
    assert not missing


def test_installed_package_reads_its_own_configs(installed: Path, tmp_path: Path) -> None:
    code = (
        "from compress_methods.system.resources import config_path\n"
        "print(config_path('hardware.yaml'), *config_path('recipes').glob('*'), sep='\\n')"
    )
    paths = [Path(line) for line in run_elsewhere(code, tmp_path, installed).splitlines()]
    assert all(path.is_file() and path.is_relative_to(installed) for path in paths)
    recipes = {path.name for path in (CONFIGS / "recipes").iterdir()}
    assert {path.name for path in paths} == {"hardware.yaml"} | recipes


def test_checkout_reads_the_configs_of_the_repository() -> None:
    module = "compress_methods.system.resources"
    code = f"from {module} import config_path; print(config_path('hardware.yaml'))"
    found = run_elsewhere(code, Path("/"), METHODS.parent).strip()
    assert Path(found) == CONFIGS / "hardware.yaml"


def test_wheel_announces_the_plugin_to_vllm(installed: Path) -> None:
    (entry_points,) = installed.glob("vllm_compress-*.dist-info/entry_points.txt")
    text = entry_points.read_text()
    assert "[vllm.general_plugins]\nvllm_compress = vllm_compress:register\n" in text
    assert "[vllm.stat_logger_plugins]\nvllm_compress = vllm_compress.metrics.stat_logger:" in text
    assert "[console_scripts]\nvllm-compress = vllm_compress.cli:main\n" in text


FOUND = """
from importlib.metadata import entry_points
from importlib.util import find_spec
for group in ("vllm.general_plugins", "vllm.stat_logger_plugins"):
    for entry in entry_points(group=group, name="vllm_compress"):
        print(find_spec(entry.module).origin)
"""


def test_wheel_works_in_an_environment_that_has_vllm(
    environment: Path, installed: Path, tmp_path: Path
) -> None:
    """Outside the repository: the command, a conversion, and the entry points that vLLM loads."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / command[0]), *command[1:]],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "convert" in run("vllm-compress", "--help")
    small = make_model("Llama", tmp_path / "small", num_hidden_layers=1)
    run("vllm-compress", "convert", str(small), "-o", "out", "--recipe", "int4-rtn", "--quiet")
    assert (tmp_path / "out" / "report.json").is_file()
    loaded = [Path(line) for line in run("python", "-c", FOUND).splitlines()]
    assert len(loaded) == 2
    assert all(path.is_relative_to(installed) for path in loaded)


def test_hardware_table_is_complete() -> None:
    table = yaml.safe_load((CONFIGS / "hardware.yaml").read_text())
    assert table["version"] == 1
    for key, machine in table["hardware"].items():
        assert machine["kind"] in {"gpu", "cpu"}, key
        assert isinstance(machine["memory_bytes"], int), key
        assert isinstance(machine["bandwidth_bytes_per_s"], int), key
        assert all(figure > 0 for figure in machine["teraops"].values()), key
        assert set(machine["teraops"]) <= {"fp32", "bf16", "fp16", "int8", "fp8", "fp4"}, key
        assert machine["price_per_hour"] is None, key
        assert machine["per_host"] >= 1, key
        assert machine["checked"], key
        assert machine["name"], key
        assert machine["source"], key


def imports(path: Path) -> Iterator[str]:
    """The top-level packages a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_compress_methods_needs_neither_vllm_nor_the_plugin() -> None:
    offenders = [
        str(path.relative_to(REPOSITORY))
        for path in METHODS.rglob("*.py")
        if {"vllm", "vllm_compress"} & set(imports(path))
    ]
    assert not offenders


def test_importing_the_plugin_loads_neither_torch_nor_vllm(tmp_path: Path) -> None:
    code = "import sys, vllm_compress; print(*({'torch', 'vllm'} & set(sys.modules)))"
    loaded = run_elsewhere(code, tmp_path, PLUGIN.parent, METHODS.parent)
    assert loaded.split() == []


WRITTEN = REPOSITORY / "tests" / "benchmarks" / "results"
"""By programs."""
CODE = (".cpp", ".h", ".md", ".py", ".sh", ".toml", ".yaml")


def ours() -> list[Path]:
    """Files of the repository that somebody writes and reads."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    paths = (REPOSITORY / line for line in listed.stdout.splitlines())
    mine = (path for path in paths if path.suffix in CODE and path.is_file())
    return [path for path in mine if not path.is_relative_to(WRITTEN)]


def test_files_have_at_most_400_lines() -> None:
    lengths = {
        str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in ours()
    }
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_folders_of_code_have_at_most_12_modules() -> None:
    counts = Counter(
        str(path.parent.relative_to(REPOSITORY))
        for path in ours()
        if path.suffix in (".cpp", ".h", ".py") and path.name != "__init__.py"
    )
    assert not {folder: count for folder, count in counts.items() if count > 12}


def test_functions_have_at_most_60_lines_or_say_why_not() -> None:
    """The reason stands as `# long: …` anywhere in the function."""
    offenders = []
    for path in [*METHODS.rglob("*.py"), *PLUGIN.rglob("*.py")]:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = node.end_lineno - node.lineno + 1
            if length > 60 and "# long: " not in ast.get_source_segment(source, node):
                offenders.append(
                    f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}: {length}"
                )
    assert not offenders
