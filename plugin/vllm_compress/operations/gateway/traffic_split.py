"""Which share of a service's users meets which variant.

A user is a point on a line from 0 to 1: the hash of what the request says about its sender. The
first variant takes the line from its left end, a third one from its right end, and the baseline
what is between them. So a change moves the one border it has to move: raising a compressed variant
takes users from the baseline only, lowering it gives the same users back, and equal shares meet
equal users on every gateway, now and after a restart. A fourth variant would have no end of its own
and is refused.

Shares are whole hundredths of a percent, the finest nginx knows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_methods.errors import CompressError, nearest

WHOLE = 10_000
MOST = 3
_PERCENT = re.compile(r"(\d{1,3})(?:\.(\d{1,2}))?%")
# A part of names of nginx and a value of a header.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")
_ADDRESS = re.compile(r"[A-Za-z0-9._-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
MOST_SERVERS = 64


class GatewayError(CompressError):
    """A gateway that cannot be written, reached or changed."""


@dataclass(frozen=True)
class Variant:
    """One variant of a service: `deployment` is its label in Prometheus, `address` host:port, or
    those of several servers with commas between, `share` hundredths of a percent of the users."""

    name: str
    deployment: str
    address: str
    share: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise GatewayError(
                f"variant is {self.name!r}, expected up to 63 letters, digits and ._+-; "
                "set `variant` in its deployment file"
            )
        servers = self.servers
        if len(set(servers)) < len(servers) or len(servers) > MOST_SERVERS:
            raise GatewayError(
                f"{self.name}: address has {len(servers)} servers, expected {MOST_SERVERS} at "
                "most, each once"
            )
        for server in servers:
            if not _ADDRESS.fullmatch(server):
                raise GatewayError(f"{self.name}: address is {server!r}, expected HOST:PORT")

    @property
    def servers(self) -> list[str]:
        """Host:port of each."""
        return self.address.split(",")


@dataclass(frozen=True)
class TrafficSplit:
    """All variants of a service, in the order of the line; their shares make a whole."""

    service: str
    baseline: str
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not 2 <= len(names) <= MOST:
            raise GatewayError(f"{self.service}: {len(names)} variants, expected 2 or {MOST}")
        for what in ("name", "deployment", "address"):
            values = [getattr(variant, what) for variant in self.variants]
            if what == "address":
                values = [server for variant in self.variants for server in variant.servers]
            if len(set(values)) < len(values):
                raise GatewayError(f"{self.service}: two variants have the same {what}: {values}")
        if names.index(self.baseline) != 1:
            raise GatewayError(f"{self.service}: {self.baseline} is not the second of {names}")
        if sum(self.shares.values()) != WHOLE or min(self.shares.values()) < 0:
            raise GatewayError(f"{self.service}: {self} do not make 100%")

    @property
    def shares(self) -> dict[str, int]:
        """Share of each variant, in the order of the line."""
        return {variant.name: variant.share for variant in self.variants}

    @property
    def compressed(self) -> tuple[str, ...]:
        """Every variant but the baseline."""
        return tuple(name for name in self.shares if name != self.baseline)

    def pick(self, name: str | None) -> str:
        """The variant that a rollout is about; None is allowed where there is one choice."""
        if name is None and len(self.compressed) == 1:
            return self.compressed[0]
        if name is None or name not in self.compressed:
            what = "say which with --variant" if name is None else f"no variant {name!r} to roll"
            choice = nearest(name or "", self.compressed)
            raise GatewayError(f"{self.service}: {what}; {choice}")
        return name

    def with_shares(self, wanted: Mapping[str, int]) -> TrafficSplit:
        """Other shares for some variants, and the rest for the baseline."""
        shares = self.shares | {self.pick(name): share for name, share in wanted.items()}
        left = WHOLE - sum(shares[name] for name in self.compressed)
        if left < 0:
            asked = ", ".join(f"{name} {percent(shares[name])}" for name in self.compressed)
            raise GatewayError(f"{self.service}: {asked} are more than 100%")
        shares[self.baseline] = left
        variants = (dataclasses.replace(v, share=shares[v.name]) for v in self.variants)
        return dataclasses.replace(self, variants=tuple(variants))

    def __str__(self) -> str:
        """`int4 30%, full 70%`."""
        return ", ".join(f"{name} {percent(share)}" for name, share in self.shares.items())

    def to_dict(self) -> dict[str, Any]:
        """Write what `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, block: Any, where: str) -> TrafficSplit:
        """Read what `to_dict` wrote; `where` names its place in errors."""
        try:
            variants = tuple(Variant(**variant) for variant in block["variants"])
            return cls(block["service"], block["baseline"], variants)
        except (KeyError, TypeError, ValueError) as problem:
            raise GatewayError(f"{where}: not the split of a vllm-compress gateway") from problem


def all_to_baseline(service: str, baseline: str, variants: Sequence[Variant]) -> TrafficSplit:
    """A split that gives the baseline everything, its variants brought into the line's order."""
    base = next(variant for variant in variants if variant.name == baseline)
    others = [dataclasses.replace(v, share=0) for v in variants if v is not base]
    line = [*others[:1], dataclasses.replace(base, share=WHOLE), *others[1:]]
    return TrafficSplit(service, baseline, tuple(line))


def parse_percent(text: str, option: str) -> int:
    """Hundredths of a percent in `30%` or `12.5%`."""
    match = _PERCENT.fullmatch(text.strip())
    share = int(match[1]) * 100 + int((match[2] or "0").ljust(2, "0")) if match else -1
    if not 0 <= share <= WHOLE:
        raise GatewayError(f"{option} is {text!r}, expected a percentage from 0% to 100%")
    return share


def percent(share: int) -> str:
    """`30%`, `12.5%`."""
    return f"{share / 100:.2f}".rstrip("0").rstrip(".") + "%"
