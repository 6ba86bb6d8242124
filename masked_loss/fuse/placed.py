# SPDX-License-Identifier: BSD-3-Clause
"""What the plan of a head whose classes are shared out asks of its logits (ColwiseParallel)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from masked_loss.fuse.parts import Parts


class Placed:
    """The methods of a DTensor that lazy logits answer without the logits.

    They stay lazy where every rank gets all classes, or the classes that it has. Of logits that
    stand for a tensor none of these is there.
    """

    _parts: Parts
    _compute: Callable[[str], Any]
    _handed_on: Callable[[Any, Callable[[Any], Any]], Any]

    @property
    def placements(self) -> Any:
        placement = self._split("placements").placement
        return (placement if placement.is_replicate() else type(placement)(self._class_dim()),)

    @property
    def device_mesh(self) -> Any:
        return self._split("device_mesh").mesh

    def redistribute(
        self, device_mesh: Any = None, placements: Any = None, *, async_op: bool = False
    ) -> Any:
        split = self._split("redistribute")

        def replay(logits: Any) -> Any:
            return logits.redistribute(device_mesh, placements, async_op=async_op)

        (wanted,) = placements
        if device_mesh not in (None, split.mesh):
            return replay(self._compute("redistribute"))
        if wanted.is_replicate():
            return self._handed_on(split._replace(placement=wanted), replay)
        by_class = wanted.is_shard() and wanted.dim % len(self._parts.shape) == self._class_dim()
        if by_class and split.placement.is_shard():
            return self
        return replay(self._compute("redistribute"))

    def to_local(self, *, grad_placements: Any = None) -> Any:
        split = self._split("to_local")

        def replay(logits: Any) -> Any:
            return logits.to_local(grad_placements=grad_placements)

        if split.placement.is_shard() or grad_placements is not None:
            return replay(self._compute("to_local"))
        return self._handed_on(split._replace(placement=None), replay)

    def _class_dim(self) -> int:
        return self._parts.class_dim % len(self._parts.shape)

    def _split(self, name: str) -> Any:
        """Of logits that stand for a DTensor."""
        split = self._parts.split
        if split is None or split.placement is None:
            raise AttributeError(f"'LazyLogits' object has no attribute {name!r}")
        return split
