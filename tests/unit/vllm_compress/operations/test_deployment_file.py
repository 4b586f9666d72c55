"""A deployment file means what it says, and a mistake in it is one line that names file and key."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.errors import CompressError
from compress_methods.system.resources import config_path
from vllm_compress.operations.deployment_file import Deployment, load_deployment, parse_deployment

WHOLE: dict[str, Any] = {
    "version": 1,
    "name": "chat-int4",
    "service": "chat",
    "variant": "int4",
    "model": "./out/int4",
    "device": {"type": "l4", "count": 1, "price_per_hour": 0.8},
    "objectives": {"ttft": 0.5, "tpot": 0.05, "target": 0.95},
    "vllm": {"port": 8000, "max-model-len": 4096},
}


def write(folder: Path, block: Any) -> Path:
    path = folder / "chat.yaml"
    path.write_text(yaml.safe_dump(block, sort_keys=False), encoding="utf-8")
    return path


def changed(key: str, value: Any) -> dict[str, Any]:
    """WHOLE with one key, `a` or `a.b`, set."""
    block = copy.deepcopy(WHOLE)
    *outer, last = key.split(".")
    inner = block
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return block


def test_a_whole_file_is_read_as_it_stands(tmp_path: Path) -> None:
    found = load_deployment(write(tmp_path, WHOLE))
    assert (found.name, found.service, found.variant) == ("chat-int4", "chat", "int4")
    assert found.model == str(tmp_path / "out" / "int4")
    assert (found.device.type, found.device.count, found.device.price_per_hour) == ("l4", 1, 0.8)
    assert found.objectives is not None
    assert found.objectives.seconds == {"ttft": 0.5, "tpot": 0.05}
    assert found.objectives.target == 0.95
    assert found.vllm_arguments() == ["--port", "8000", "--max-model-len", "4096"]


def test_three_keys_are_enough(tmp_path: Path) -> None:
    block = {"version": 1, "name": "chat", "model": "someone/some-model"}
    found = load_deployment(write(tmp_path, block))
    assert found == Deployment(name="chat", model="someone/some-model", service="chat")
    assert (found.variant, found.objectives, found.device.price_per_hour) == (None, None, None)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("servise", "chat", "unknown key 'servise'; did you mean 'service'?"),
        ("device.price", 1, "device: unknown key 'price'"),
        ("objectives.ttfd", 1, "objectives: unknown key 'ttfd'; did you mean 'ttft'?"),
        ("version", 2, "version is 2, expected 1"),
        ("version", "1", "version is '1', expected int"),
        ("name", "two words", "name is 'two words', expected up to 128"),
        ("variant", "-", "variant is '-'"),
        ("model", "", "model is empty"),
        ("model", ["a"], "model is ['a'], expected str"),
        ("device", "l4", "device is 'l4', expected dict"),
        ("device.count", 0, "device: count is 0, expected at least 1"),
        ("device.count", True, "device: count is True, expected int"),
        ("device.count", 2, "device: count is 2, but vllm's parallel sizes take 1"),
        ("device.price_per_hour", -1, "device: price_per_hour is -1"),
        ("device.price_per_hour", float("nan"), "device: price_per_hour is nan"),
        ("objectives", {}, "objectives: neither ttft nor tpot is given"),
        ("objectives.ttft", 500_000, "objectives: ttft is 500000, expected seconds"),
        ("objectives.ttft", "500ms", "objectives: ttft is '500ms', expected float | None"),
        ("objectives.tpot", 0, "objectives: tpot is 0, expected seconds"),
        ("objectives.target", 95, "objectives: target is 95, expected a share"),
        ("vllm", ["--port"], "vllm is ['--port'], expected dict"),
        ("vllm.--port", 1, "vllm: option '--port', expected one of vLLM's"),
        ("vllm.model", "x", "vllm: model goes under the key 'model'"),
        ("vllm.max_model_len", 1, "vllm: max_model_len is given twice"),
        ("vllm.port", None, "vllm: port has no value"),
        ("vllm.tensor-parallel-size", "two", "device: tensor-parallel-size is 'two'"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    path = write(tmp_path, changed(key, value))
    with pytest.raises(CompressError) as caught:
        load_deployment(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["version", "name", "model"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    block = {name: value for name, value in WHOLE.items() if name != key}
    with pytest.raises(CompressError, match=f"missing key '{key}'"):
        load_deployment(write(tmp_path, block))


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\xff"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CompressError, match=r"broken\.yaml: (not readable|expected a mapping)"):
        load_deployment(path)
    with pytest.raises(CompressError, match=r"absent\.yaml: no such deployment file"):
        load_deployment(tmp_path / "absent.yaml")


def test_the_variant_is_what_the_checkpoint_holds(
    tmp_path: Path, novels_8m: Path, one_matrix: Path
) -> None:
    block = {name: value for name, value in WHOLE.items() if name != "variant"}

    def variant(model: str) -> str | None:
        return parse_deployment(block | {"model": model}, tmp_path / "x.yaml").variant

    assert variant(str(novels_8m)) == "full"
    assert variant(one_matrix.name) == "int4-g32"
    assert variant("./not-there-yet") is None


def test_parallel_sizes_must_take_the_gpus_that_are_paid_for() -> None:
    block = changed("device.count", 4)
    block["vllm"] |= {"tensor-parallel-size": 2, "data_parallel_size": 2}
    assert parse_deployment(block, Path("x.yaml")).device.count == 4
    cpu = changed("device", {"type": "epyc-genoa-2s", "count": 1})
    cpu["vllm"] |= {"tensor-parallel-size": 2}  # two ranks on one host
    assert parse_deployment(cpu, Path("x.yaml")).device.count == 1


OPTIONS = st.dictionaries(
    st.from_regex(r"[a-z]{2,8}(-[a-z]{2,8})?", fullmatch=True).filter(
        # `--no-x` is how a flag x is switched off.
        lambda name: name not in ("model", "deployment", "config") and not name.startswith("no-")
    ),
    st.booleans()
    | st.integers(0, 9999)
    | st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=3)
    | st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.integers(), max_size=2),
    max_size=5,
)


@given(OPTIONS)
def test_options_reach_a_command_line_parser_unchanged(options: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, value in options.items():
        kind = {bool: {"action": argparse.BooleanOptionalAction}, list: {"nargs": "+"}}
        read = {int: int, dict: yaml.safe_load}.get(type(value), str)
        parser.add_argument(f"--{name}", **kind.get(type(value), {"type": read}))
    found = parse_deployment(changed("vllm", options), Path("x.yaml"))
    parsed = vars(parser.parse_args(found.vllm_arguments()))
    assert parsed == {name.replace("-", "_"): value for name, value in options.items()}


@given(OPTIONS)
def test_json_carries_a_deployment_unchanged(options: dict[str, Any]) -> None:
    found = parse_deployment(changed("vllm", options), Path("x.yaml"))
    assert Deployment.from_json(found.to_json()) == found
    assert "\n" not in found.to_json()


@pytest.mark.parametrize(
    "path", sorted(config_path("deployments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_examples_are_valid_and_named_like_their_files(path: Path) -> None:
    assert load_deployment(path).name == path.stem
