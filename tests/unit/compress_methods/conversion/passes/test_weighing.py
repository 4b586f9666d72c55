"""What tokens count by the loss: as autograd has it, resumable, and used for each group of rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods import convert
from compress_methods.algorithms.error_feedback import ErrorFeedback
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.pruning.alps import ALPS
from compress_methods.algorithms.pruning.sparsegpt import SparseGPT
from compress_methods.algorithms.statistics import Hessian, RowGroups, by_rows, relative_error
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.checkpoint.integrity import read_checked
from compress_methods.conversion.driver import Sweep, Target
from compress_methods.conversion.job import open_job
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.passes import packing, weighing
from compress_methods.conversion.passes.packing import Packing, solve_in_slabs
from compress_methods.conversion.passes.weighing import asked_of, groups_of, probe
from compress_methods.conversion.planning.plan import Job
from compress_methods.conversion.resources import estimate, estimate_disk
from compress_methods.conversion.running import Running
from compress_methods.errors import CalibrationError, RecipeError
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.model.slot import Slot
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import ZOO
from tests.robustness.result import TEXT, contents, tiny_model
from tests.unit.compress_methods.algorithms.test_algorithms import correlated

SAMPLES, LENGTH = 6, 32
W4 = {"format": "integer", "bits": 4, "group_size": 32}


def recipe(
    *rules: dict[str, Any], fmt: dict[str, Any] | None = None, **gptq: Any
) -> dict[str, Any]:
    algorithm = {"algorithm": "gptq", "sweeps": 0, "loss_groups": 4, **gptq}
    return {
        "formats": {"w": fmt or W4},
        "modules": [*rules, {"match": "blocks", "format": "w", "algorithm": algorithm}],
        "calibration": {"samples": SAMPLES, "length": LENGTH, "held_out": 2},
    }


HEAD = {
    "match": "lm_head",
    "format": "w",
    "algorithm": {"algorithm": "gptq", "sweeps": 0, "loss_groups": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def converted(model: Path, asked: dict[str, Any], out: Path) -> dict[str, Any]:
    return convert(model, asked, out, calibration=model / TEXT, quiet=True)


def weights_in(work: Path) -> dict[str, Tensor]:
    """All that were written, by module."""
    found: dict[str, Tensor] = {}
    for path in work.glob("weights-*"):
        found |= read_checked(path) or {}
    return found


def weighed(model: Path, asked: dict[str, Any], tokens: Tensor, out: Path) -> dict[str, Tensor]:
    """The weights, as a sweep has them before it converts."""
    planned = open_job(model, asked)
    shards = planned.plan.shards
    journal = Journal(out, "test")
    try:
        runner = Sweep(_target(planned), [Packing()], tokens, running=Running(quiet=True))
        weighing.weigh(planned, runner._make_runner(), tokens, journal.work, shards)
        return weights_in(journal.work)
    finally:
        journal.close()


def _target(planned: Any) -> Any:
    layers = range(len(planned.skeleton.blocks))
    return Target(planned, planned.source.entries, layers)


def some_tokens() -> Tensor:
    return torch.randint(2, 4000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def whole(model: Path, tokens: Tensor, groups: Mapping[str, int]) -> dict[str, Tensor]:
    """The same weights by autograd on the whole model in memory."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}
    for name in groups:
        loaded.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out})
        )
    sums = {name: torch.zeros(tokens.numel(), count) for name, count in groups.items()}
    for draw in range(weighing.DRAWS):
        for i in range(len(tokens)):
            found = loaded(tokens[i : i + 1], use_cache=False).logits
            loss = (found * probe(found.detach(), draw * len(tokens) + i)).sum()
            gradients = torch.autograd.grad(loss, [outputs[name] for name in groups])
            for name, gradient in zip(groups, gradients, strict=True):
                squares = gradient[0].square().unflatten(1, (groups[name], -1)).mean(-1)
                sums[name][i * LENGTH : (i + 1) * LENGTH] += squares
    roots = {name: total.sqrt() for name, total in sums.items()}
    return {name: root / root.mean(0) for name, root in roots.items()}


@pytest.mark.parametrize("draws", [1, 3])
def test_the_weights_are_those_of_autograd_on_the_whole_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws: int
) -> None:
    monkeypatch.setattr(weighing, "DRAWS", draws)
    asked, tokens = recipe(HEAD), some_tokens()
    groups: dict[str, int] = {}
    for shard in open_job(tiny, asked).plan.shards:
        groups |= asked_of(shard)
    assert len(groups) == 3 * 7 + 1
    assert (groups["model.layers.0.mlp.up_proj"], groups["lm_head"]) == (4, 2)
    found, expected = weighed(tiny, asked, tokens, tmp_path / "out"), whole(tiny, tokens, groups)
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=1e-4)
        assert weights.std() > 0.005


@pytest.mark.parametrize("name", ["gpt2", "falcon-new", "olmo2"])
def test_the_weights_of_other_families_are_autograds_too(tmp_path: Path, name: str) -> None:
    """Transposed matrices, parallel branches and norms of outputs."""
    kind, config = ZOO[name]
    model, asked = make_model(kind, tmp_path / "model", **config), recipe()
    tokens = some_tokens() % 500
    groups: dict[str, int] = {}
    for shard in open_job(model, asked).plan.shards:
        groups |= asked_of(shard)
    found, expected = weighed(model, asked, tokens, tmp_path / "out"), whole(model, tokens, groups)
    assert found.keys() == expected.keys()
    for module, weights in expected.items():
        torch.testing.assert_close(found[module], weights, rtol=1e-2, atol=1e-3)


def test_the_probes_have_the_second_derivative_of_the_kl_as_their_covariance() -> None:
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)) * 2
    many = logits.expand(1, 200_000, 5)
    found = probe(many, 0)[0]
    p = logits[0].softmax(-1)
    expected = torch.diag(p) - p[:, None] * p
    torch.testing.assert_close(found.T @ found / len(found), expected, rtol=0, atol=5e-3)
    assert torch.equal(probe(many, 0)[0], found)
    assert not torch.equal(probe(many, 1)[0], found)


class Killed(Exception):
    """Ends a conversion as a kill would, at a place of one's choice."""


def test_killed_at_every_file_it_ends_with_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, tokens = recipe(HEAD), some_tokens()
    undisturbed = weighed(tiny, asked, tokens, tmp_path / "undisturbed")
    write, left = weighing.write_checked, [0]

    def counted(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        write(path, tensors)

    monkeypatch.setattr(weighing, "write_checked", counted)
    kills = 0
    for files in (1, 3):  # so many at a time: every run goes on where the last one was
        out = tmp_path / f"out-{files}"
        while True:
            left[0] = files
            try:
                found = weighed(tiny, asked, tokens, out)
                break
            except Killed:
                kills += 1
        assert found.keys() == undisturbed.keys()
        assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)
        assert not (out / ".work" / "weighing").exists()
    assert kills > 10


@pytest.mark.parametrize("which", ["states-00001", "gradients-00002", "weights-block-00002"])
def test_what_is_damaged_meanwhile_is_made_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    asked, tokens = recipe(), some_tokens()
    undisturbed = weighed(tiny, asked, tokens, tmp_path / "undisturbed")
    backward = weighing._Weighing._backward

    def killed(self: Any, index: int) -> Tensor:
        if index == 1:
            raise Killed
        return backward(self, index)

    monkeypatch.setattr(weighing._Weighing, "_backward", killed)
    with pytest.raises(Killed):
        weighed(tiny, asked, tokens, tmp_path / "out")
    monkeypatch.setattr(weighing._Weighing, "_backward", backward)
    (path,) = (tmp_path / "out").rglob(f"{which}.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = weighed(tiny, asked, tokens, tmp_path / "out")
    assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)


SPARSE = {"format": "sparse", "n": 16, "m": 32, "values": {"format": "dense"}}
CASES = [
    ({"algorithm": "gptq"}, W4),
    ({"algorithm": "gptq", "target": "weights"}, W4),
    ({"algorithm": "sparsegpt"}, SPARSE),
    ({"algorithm": "alps"}, SPARSE),
]


@pytest.mark.parametrize(("settings", "fmt"), CASES, ids=str)
def test_where_every_token_counts_the_same_nothing_changes(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    fmt: dict[str, Any],
) -> None:
    plain = recipe(fmt=fmt, **settings, loss_groups=0)
    converted(tiny, plain, tmp_path / "plain")
    weights = weighing._Record.weights
    guided = recipe(fmt=fmt, **settings, loss_groups=1)
    report = converted(tiny, guided, tmp_path / "guided")
    assert report["modules"]["model.layers.0.mlp.up_proj"]["loss_groups"] == 1
    monkeypatch.setattr(
        weighing._Record,
        "weights",
        lambda self: {name: torch.ones_like(w) for name, w in weights(self).items()},
    )
    converted(tiny, guided, tmp_path / "ones")
    for block in range(3):
        name = f"block-{block:05d}.safetensors"
        ones, same, other = (
            (tmp_path / out / name).read_bytes() for out in ("ones", "plain", "guided")
        )
        assert ones == same
        assert ones != other


FORMATS: list[tuple[ErrorFeedback, Format]] = [
    (GPTQ(), Integer(3, 32)),
    (GPTQ(), Rotated(Integer(3, 32), block=32)),
    (SparseGPT(), Sparse(16, 32, Integer(4, -1))),
    (ALPS(), Sparse(16, 32, Dense("float32"))),
]


@pytest.mark.parametrize(("algorithm", "fmt"), FORMATS, ids=str)
def test_every_group_of_rows_is_solved_for_the_tokens_that_matter_to_it(
    algorithm: ErrorFeedback, fmt: Format
) -> None:
    """Half of the tokens do not matter to the first rows, the others not to the last."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    x = torch.cat([correlated(400, 64), 3 * correlated(400, 64, seed=1)])
    weights = torch.zeros(800, 2)
    weights[:400, 0] = weights[400:, 1] = 2.0
    weighed, plain = RowGroups(Hessian, weights, 64, x.device), Hessian(64, x.device)
    for statistic in (weighed, plain):
        statistic.add_batch(x)
        statistic.tokens += len(x)
    groups = by_rows({Hessian: weighed})
    halves = list(weight.chunk(2))
    prepared = [algorithm.ready(seen, fmt) for seen in groups]
    pairs = list(zip(halves, prepared, strict=True))
    found = fmt.unpack(solve_in_slabs(algorithm, fmt, weight.shape, pairs))
    for rows, pair in zip(found.chunk(2), pairs, strict=True):
        alone = fmt.unpack(fmt.pack(algorithm.fill(*pair, fmt)))
        torch.testing.assert_close(rows, alone)
    whole = [(weight, algorithm.ready({Hessian: plain}, fmt))]
    other = fmt.unpack(solve_in_slabs(algorithm, fmt, weight.shape, whole))
    for half, seen in enumerate(groups):
        rows = slice(32 * half, 32 * half + 32)
        mine, theirs = (relative_error(weight[rows], v[rows], seen) for v in (found, other))
        assert mine < 0.95 * theirs


def test_a_conversion_killed_anywhere_has_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(tiny, recipe(), tmp_path / "undisturbed")
    pack, calls = packing.loss_weights, [0]

    def killed(part: Any) -> dict[str, Tensor]:
        calls[0] += 1
        if calls[0] == 2:
            raise Killed
        return pack(part)

    monkeypatch.setattr(packing, "loss_weights", killed)
    with pytest.raises(Killed):
        converted(tiny, recipe(), tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/.work").glob("weights-*")}
    assert len(before) == 3
    monkeypatch.setattr(weighing._Weighing, "execute", None)  # nothing is weighed again
    converted(tiny, recipe(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert open_compressed(tmp_path / "out")


def test_the_disk_that_is_asked_for_is_what_it_takes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, taken = weighing.write_checked, [0]

    def counted(path: Path, tensors: Mapping[str, Tensor]) -> None:
        write(path, tensors)
        taken.append(sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.safetensors")))

    monkeypatch.setattr(weighing, "write_checked", counted)
    weighed(tiny, recipe(), some_tokens(), tmp_path / "out")
    plans = [open_job(tiny, recipe(loss_groups=groups)) for groups in (4, 0)]
    guided, plain = (estimate_disk(each.plan, each.skeleton, True) for each in plans)
    assert 0.6 < max(taken) / (guided - plain) < 1.05
    needed = [estimate(each.plan, each.skeleton, True).memory for each in plans]
    assert needed[0] > needed[1]


def test_groups_are_as_many_as_the_rows_can_be_cut_into() -> None:
    def job(rows: int, groups: int, fmt: Any) -> Job:
        slot = Slot("up", "up.weight", "blocks", rows, 128)
        return Job(slot, "w", fmt, GPTQ(loss_groups=groups))

    w4 = Integer(4, 128)
    assert groups_of(job(96, 0, w4)) == 0
    assert groups_of(job(96, 4, w4)) == 4
    assert groups_of(job(96, 5, w4)) == 4
    assert groups_of(job(97, 4, w4)) == 1
    assert groups_of(job(384, 4, Rotated(w4))) == 3


def test_fewer_groups_than_none_are_refused(tiny: Path) -> None:
    with pytest.raises(RecipeError, match="loss_groups is -1, expected 0 or more"):
        open_job(tiny, recipe(loss_groups=-1))


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    kind, config = ZOO["llama4"]
    experts = {**config, "interleave_moe_layer_step": 2, "num_hidden_layers": 2}
    model = make_model(kind, tmp_path / "llama4", **experts)
    asked = recipe()
    asked["modules"][0]["match"] = "experts"
    with pytest.raises(RecipeError, match=r"loss_groups needs the outputs .* of several in"):
        open_job(model, asked)


def test_a_layer_that_not_every_token_goes_through_is_refused() -> None:
    record = weighing._Record(None, 8)
    record.groups, record.added = {"expert": 1}, {"expert": 0}
    record.sums = {"expert": torch.zeros(8, 1)}
    record.add({"expert": torch.ones(3, 4)})
    with pytest.raises(CalibrationError, match="expert: loss_groups needs a layer that every"):
        record.advance(4)
