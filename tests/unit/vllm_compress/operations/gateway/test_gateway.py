"""A split's arithmetic, what it is written as, and what `vllm-compress gateway` refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.errors import CompressError
from vllm_compress.cli import main
from vllm_compress.operations.gateway.drain import without
from vllm_compress.operations.gateway.nginx import (
    Listening,
    gateway_url,
    read_traffic_split,
    render_config,
    render_traffic_split,
)
from vllm_compress.operations.gateway.route import patch, read_route, render_route
from vllm_compress.operations.gateway.traffic_split import (
    WHOLE,
    TrafficSplit,
    Variant,
    all_to_baseline,
    parse_percent,
    percent,
)

FULL, INT4, INT8 = (
    Variant(name, f"chat-{name}", f"10.0.0.{i}:8000")
    for i, name in enumerate(("full", "int4", "int8"))
)
TWO = all_to_baseline("chat", "full", [FULL, INT4])
THREE = all_to_baseline("chat", "full", [INT4, INT8, FULL])
SHARE = st.integers(0, WHOLE)


def line(split: TrafficSplit) -> list[str]:
    """The variant of each hundredth of a percent of the users."""
    return [name for name, share in split.shares.items() for _ in range(share)]


@given(SHARE, SHARE, SHARE)
def test_a_change_moves_no_more_users_than_it_has_to(one: int, two: int, other: int) -> None:
    other = min(other, WHOLE - max(one, two))
    before = THREE.with_shares({"int4": one, "int8": other})
    after = before.with_shares({"int4": two})
    moved = [(a, b) for a, b in zip(line(before), line(after), strict=True) if a != b]
    assert len(moved) == abs(one - two)
    assert set(moved) <= {("full", "int4") if two > one else ("int4", "full")}


@given(SHARE, SHARE)
def test_a_drained_variant_has_no_user_and_the_others_keep_theirs(one: int, two: int) -> None:
    split = THREE.with_shares({"int4": one, "int8": min(two, WHOLE - one)})
    for name in split.shares:
        after = without(split, name)
        assert after.shares[name] == 0
        assert sum(after.shares.values()) == WHOLE
        assert all(after.shares[n] >= share for n, share in split.shares.items() if n != name)


@given(SHARE)
def test_percentages_are_read_as_they_are_written(share: int) -> None:
    assert parse_percent(percent(share), "--to") == share


@pytest.mark.parametrize("text", ["30", "0.3", "-1%", "101%", "1e1%", "33.333%", "", "%", "many"])
def test_other_words_for_a_share_are_refused(text: str) -> None:
    with pytest.raises(CompressError, match="expected a percentage from 0% to 100%"):
        parse_percent(text, "--to")


@given(SHARE, SHARE)
def test_the_split_file_holds_the_split(one: int, two: int) -> None:
    split = THREE.with_shares({"int4": one, "int8": min(two, WHOLE - one)})
    text = render_traffic_split(split)
    assert TrafficSplit.from_dict(json.loads(text.splitlines()[0][2:]), "here") == split
    block = text.partition("split_clients $user $variant {\n")[2].partition("}")[0]
    parts = [part.split() for part in block.strip().removesuffix(";").split(";")]
    assert parts[-1][0] == "*"
    told = {name: parse_percent(share, "") for share, name in parts[:-1]}
    told[parts[-1][1]] = WHOLE - sum(told.values())
    assert told == {name: share for name, share in split.shares.items() if share}


def test_shares_above_the_whole_and_unclear_choices_are_refused() -> None:
    with pytest.raises(CompressError, match="int4 60%, int8 50% are more than 100%"):
        THREE.with_shares({"int4": 6000, "int8": 5000})
    with pytest.raises(CompressError, match="say which with --variant; valid: int4, int8"):
        THREE.pick(None)
    with pytest.raises(CompressError, match="no variant 'int9' to roll; did you mean 'int"):
        THREE.pick("int9")
    with pytest.raises(CompressError, match="no variant 'full' to roll"):
        TWO.pick("full")
    assert TWO.pick(None) == "int4"


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([FULL], "1 variants, expected 2 or 3"),
        ([FULL, INT4, INT8, Variant("int2", "d", "h:1")], "4 variants, expected 2 or 3"),
        ([FULL, Variant("full", "d", "h:1")], "two variants have the same name"),
        ([FULL, Variant("int4", "chat-full", "h:1")], "two variants have the same deployment"),
        ([FULL, Variant("int4", "d", FULL.address)], "two variants have the same address"),
    ],
)
def test_splits_that_cannot_be_are_refused(variants: list[Variant], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        all_to_baseline("chat", "full", variants)


def test_names_and_addresses_cannot_carry_configuration() -> None:
    for name in ("a b", "a;", "$x", "a'", "", "a/b", "-a"):
        with pytest.raises(CompressError, match="variant is"):
            Variant(name, "d", "host:1")
    for address in ("host", "host:1;", "host:", "http://host:1", "a b:1"):
        with pytest.raises(CompressError, match="expected HOST:PORT"):
            Variant("a", "d", address)


def test_the_gateways_url_is_read_from_its_configuration(tmp_path: Path) -> None:
    for host, seen in (("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")):
        (tmp_path / "nginx.conf").write_text(render_config(TWO, Listening(host, 8123)))
        assert gateway_url(tmp_path) == f"http://{seen}:8123"


def test_a_split_file_of_someone_else_is_not_read(tmp_path: Path) -> None:
    for text in (
        "",
        "split_clients {}",
        "# {}",
        '# {"service": 1, "baseline": 2, "variants": [3]}',
    ):
        (tmp_path / "split.conf").write_text(text)
        with pytest.raises(CompressError, match=r"not .* split"):
            read_traffic_split(tmp_path)


def in_cluster() -> TrafficSplit:
    variants = [Variant(v.name, v.deployment, f"{v.deployment}:8000") for v in (FULL, INT4, INT8)]
    return all_to_baseline("chat", "full", variants).with_shares({"int4": 3000, "int8": 1000})


def test_an_httproute_holds_the_split() -> None:
    route = yaml.safe_load(render_route(in_cluster(), "infra/inference"))
    assert read_route(route) == in_cluster()
    assert route["spec"]["parentRefs"] == [{"name": "inference", "namespace": "infra"}]
    (rule,) = route["spec"]["rules"]
    for backend in rule["backendRefs"]:
        (header,) = backend["filters"][0]["responseHeaderModifier"]["set"]
        assert backend["name"] == f"chat-{header['value']}"
        assert backend["weight"] == in_cluster().shares[header["value"]]


def test_weights_changed_by_hand_are_shares_too() -> None:
    route = yaml.safe_load(render_route(in_cluster(), "inference"))
    for backend, weight in zip(route["spec"]["rules"][0]["backendRefs"], (1, 2, 1), strict=True):
        backend["weight"] = weight
    assert read_route(route).shares == {"int4": 2500, "full": 5000, "int8": 2500}
    route["spec"]["rules"][0]["backendRefs"].pop()
    with pytest.raises(CompressError, match="its backends are not those of"):
        read_route(route)
    del route["metadata"]["annotations"]
    with pytest.raises(CompressError, match="no annotation vllm-compress/split"):
        read_route(route)


def test_a_patch_sets_every_weight_of_that_version_of_the_route() -> None:
    route = yaml.safe_load(render_route(in_cluster(), "inference"))
    route["metadata"]["resourceVersion"] = "7"
    wanted = in_cluster().with_shares({"int4": 100})
    test, *changes = patch(route, wanted)
    assert test == {"op": "test", "path": "/metadata/resourceVersion", "value": "7"}
    for change in changes:
        *_, index, field = change["path"].split("/")
        route["spec"]["rules"][0]["backendRefs"][int(index)][field] = change["value"]
    assert read_route(route) == wanted


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Deployment files by variant."""
    out = {}
    for port, variant in enumerate(("full", "int4", "int8"), 8000):
        out[variant] = tmp_path / f"{variant}.yaml"
        out[variant].write_text(
            f"{{version: 1, name: chat-{variant}, service: chat, variant: {variant}, "
            f"model: ./{variant}, vllm: {{port: {port}, served-model-name: chat}}}}"
        )
    return out


def gateway(files: dict[str, Path], out: Path, *more: str, variants: str = "full int4") -> int:
    configs = [word for name in variants.split() for word in ("--config", str(files[name]))]
    return main(["gateway", *configs, "-o", str(out), *more])


def test_the_command_keeps_a_split_until_it_is_given_another(
    files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "gateway"
    assert gateway(files, out) == 0
    assert read_traffic_split(out).shares == {"int4": 0, "full": WHOLE}
    assert gateway(files, out, "--weight", "int4=30%") == 0
    assert gateway(files, out, "--port", "9000", "--address", "int4=elsewhere:80") == 0
    assert read_traffic_split(out).shares == {"int4": 3000, "full": 7000}
    assert gateway_url(out).endswith(":9000")
    addresses = {v.name: v.address for v in read_traffic_split(out).variants}
    assert addresses == {"int4": "elsewhere:80", "full": "127.0.0.1:8000"}
    assert gateway(files, out, variants="int8 full int4") == 0
    assert read_traffic_split(out).shares == {"int8": 0, "full": 7000, "int4": 3000}


def test_the_command_writes_an_httproute(files: dict[str, Path], tmp_path: Path) -> None:
    assert gateway(files, tmp_path, "--weight", "int4=5%", "--kubernetes", "a/b") == 0
    route = yaml.safe_load((tmp_path / "httproute.yaml").read_text())
    assert {v.address: v.share for v in read_route(route).variants} == {
        "chat-int4:8001": 500,
        "chat-full:8000": 9500,
    }
    assert not (tmp_path / "nginx.conf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight", "int5=3%"], "--weight: no variant 'int5'; did you mean 'int4'?"),
        (["--weight", "full=3%"], "--weight: no variant 'full'"),
        (["--weight", "int4"], "--weight is 'int4', expected VARIANT=VALUE"),
        (["--weight", "int4=3"], "--weight int4 is '3', expected a percentage"),
        (["--address", "int4=host"], "int4: address is 'host', expected HOST:PORT"),
        (["--port", "0"], "--port is 0, expected 1 to 65535"),
        (["--session", "cookie"], "--session is for --kubernetes"),
        (["--run", "--kubernetes", "x"], "choose one"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert gateway(files, tmp_path / "out", *arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("service: chat", "service: chats", "chat-int4 belongs to the service chats"),
        ("variant: int4, ", "", "chat-int4: variant is not known; set it in its file"),
        ("served-model-name: chat", "served-model-name: x", "served under different names"),
        (", served-model-name: chat", "", "give them the same served-model-name"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    message: str,
) -> None:
    files["int4"].write_text(files["int4"].read_text().replace(old, new))
    assert gateway(files, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
