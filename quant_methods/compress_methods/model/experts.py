"""What goes into the matrices of experts, which are parts of parameters and no modules.

transformers calls the module of all experts with the tokens and, in most families, with the experts
that each goes to; Llama-4's gets every token once per expert, times its score, which is 0 for those
not chosen. The input of the second matrix is computed from the first as the class does it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress_methods.model.architecture import Architecture
    from compress_methods.model.slot import Slot

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"
ONE_BY_ONE = "one_by_one"
Treat = Callable[["Tensor"], "Tensor"]
Hook = Callable[[str, "nn.Module", tuple[Any, ...]], None]


def is_last(slot: Slot) -> bool:
    """Whether an expert's matrix reads what its others have made of the tokens."""
    return slot.parameter.rpartition(".")[2] == LAST


def owner_of(slot: Slot) -> str:
    """Name of the module of all experts."""
    return slot.parameter.rpartition(".")[0]


def run_one_by_one(model: Any) -> None:
    """Have all experts of a model run one after another, so that what lies between the matrices of
    one is all that is in memory; transformers multiplies all tokens with all of them at once."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS[ONE_BY_ONE] = _one_by_one
    model.set_experts_implementation(ONE_BY_ONE)


def _one_by_one(module: Any, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """The same numbers as transformers' `grouped_mm`: products and sums are in its order."""
    count, ways = chosen.shape
    ordered, order = chosen.reshape(-1).sort()
    sizes = ordered.bincount(minlength=len(module.get_parameter(LAST))).tolist()
    outs = x.new_empty(count * ways, x.shape[-1], dtype=torch.result_type(x, scores))
    for expert, places in enumerate(order.split(sizes)):
        if len(places):
            between = _between(module, x[places // ways], expert, module.is_transposed)
            out = _product(module, LAST, between, expert, module.is_transposed)
            outs[places] = out * scores.reshape(-1, 1)[places]
    return outs.view(count, ways, -1).sum(1).to(x.dtype)


def watch_experts(
    owner: nn.Module,
    slots: Sequence[Slot],
    architecture: Architecture,
    hook: Hook,
    everywhere: bool = False,
) -> Any:
    """Have `hook(name, owner, (inputs [tokens, cols],))` called for the matrices `slots` of the
    experts in `owner` before it runs, of experts that get a token; returns a handle.

    `everywhere`: as if every token went to every expert.
    """
    experts: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots:
        assert isinstance(slot.index[0], int)
        experts[slot.index[0]].append(slot)
    transposed = architecture.transposes(owner)

    @torch.no_grad()
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        for expert, mine in experts.items():
            x = _tokens(module, given, expert, everywhere)
            if not len(x):
                continue
            inner = [slot for slot in mine if is_last(slot)]
            between = _between(module, x, expert, transposed) if inner else x
            for slot in mine:
                hook(slot.module, module, (between if is_last(slot) else x,))

    return owner.register_forward_pre_hook(before, with_kwargs=True)


def treat_inputs(owner: nn.Module, architecture: Architecture, first: Treat, inner: Treat) -> None:
    """Have all experts in `owner` treat what goes into their first and last matrices."""
    owner.register_forward_pre_hook(lambda _, args: (first(args[0]), *args[1:]))
    if hasattr(owner, "_apply_gate"):
        gate: Any = owner._apply_gate
        owner._apply_gate = lambda out: inner(gate(out))  # type: ignore[assignment]
        return
    transposed = architecture.transposes(owner)

    def forward(x: Tensor) -> Tensor:
        by_expert = x.reshape(len(owner.get_parameter(LAST)), -1, x.shape[-1])
        outs = []
        for expert, mine in enumerate(by_expert):
            between = inner(_between(owner, mine, expert, transposed))
            outs.append(_product(owner, LAST, between, expert, transposed))
        return torch.cat(outs)

    owner.forward = forward


def watch_outputs(
    owner: nn.Module, architecture: Architecture, hook: Callable[[int, Tensor, Tensor], None]
) -> Any:
    """Have `hook(expert, scores [tokens], outputs [tokens, hidden])` called for every expert in
    `owner` that gets a token, before it runs; returns a handle. Scores that came in with the
    tokens are 1 here."""
    transposed = architecture.transposes(owner)

    @torch.no_grad()
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        for expert in range(len(module.get_parameter(LAST))):
            x = _tokens(module, given, expert)
            if not len(x):
                continue
            between = _between(module, x, expert, transposed)
            out = _product(module, LAST, between, expert, transposed)
            hook(expert, _scores(given, expert, len(x)).to(out), out)

    return owner.register_forward_pre_hook(before, with_kwargs=True)


def _tokens(module: nn.Module, given: Sequence[Any], expert: int, everywhere: bool = False) -> Any:
    """The tokens [n, hidden] that go to an expert."""
    x: Tensor = given[0]
    if len(given) > 1:
        x = x.reshape(-1, x.shape[-1])
        chosen = given[1].reshape(len(x), -1)
        return x if everywhere else x[(chosen == expert).any(1)]
    by_expert = x.reshape(len(module.get_parameter(LAST)), -1, x.shape[-1])
    if everywhere:  # all scores are 0 but those of the experts chosen
        return by_expert.sum(0)
    mine = by_expert[expert]
    return mine[mine.any(1)]


def _scores(given: Sequence[Any], expert: int, count: int) -> Tensor:
    """Those of the tokens that go to an expert."""
    if len(given) < 3:
        return torch.ones(count)
    chosen = given[1] == expert
    scores: Tensor = (given[2] * chosen).sum(-1)[chosen.any(-1)]
    return scores


def _between(module: nn.Module, x: Tensor, expert: int, transposed: bool) -> Tensor:
    """What an expert's last matrix gets of tokens [n, hidden]."""
    name = next(name for name in FIRST if name in module._parameters)
    out = _product(module, name, x, expert, transposed)
    activation: Any = module.act_fn if hasattr(module, "act_fn") else None
    if name == "up_proj":
        return activation(out)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(out)  # type: ignore[operator]
    gate, up = out.chunk(2, dim=-1)
    return activation(gate) * up


def _product(module: nn.Module, name: str, x: Tensor, expert: int, transposed: bool) -> Tensor:
    """One matrix of an expert, and its bias where there is one."""
    weight = module.get_parameter(name)[expert]
    out = x @ (weight if transposed else weight.T)
    bias = module._parameters.get(f"{name}_bias")
    return out if bias is None else out + bias[expert]
