"""share: one layer stored as another one is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compress_methods.transforms import Outline, Pass, register_transform

if TYPE_CHECKING:
    from compress_methods.model.skeleton import Skeleton


@register_transform
@dataclass(frozen=True)
class Share(Pass):
    """Matrices of `layer` become those of `owner`; norms stay its own."""

    layer: int
    owner: int
    name: ClassVar[str] = "share"
    needs_text: ClassVar[bool] = False

    def plan(self, skeleton: "Skeleton") -> Outline:
        blocks = skeleton.blocks_name
        return Outline(aliases={f"{blocks}.{self.layer}": f"{blocks}.{self.owner}"})
