# SPDX-License-Identifier: BSD-3-Clause
"""torch.func.vmap of the operators that have kernels: one call over the rows of all elements.

An element of a batch is a group of tokens, such as a sequence is: the tables of a call over all
elements are those of a call for each. What has no rows of its own in an element (a class weight or
bounds of packed sequences) leaves the operator to a call for each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from masked_loss._op import tables
from masked_loss._op.factory import Signature
from masked_loss._op.tables import GROUP_FIELDS, ops

Batched = tuple[Any, Any]
"""Results, and where their elements are."""
_SCALES = slice(GROUP_FIELDS.index("scale_loss"), GROUP_FIELDS.index("scale_z") + 1)
_LOSS, _Z = GROUP_FIELDS.index("mean_loss"), GROUP_FIELDS.index("mean_z")


def batch_by_loop(*names: str) -> None:
    """A rule that calls the operator for each element: right for any operator."""
    for name in names:
        overload = getattr(ops, name).default
        torch.library.register_vmap(overload, _looped(overload))


def _looped(overload: Any) -> Callable[..., Batched]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Batched:
        def element(i: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return overload(*(one(x, dim, i) if isinstance(dim, int) else x for x, dim in pairs))

        def one(x: Tensor, dim: int, i: int) -> Tensor:
            if info.batch_size:
                return x.select(dim, i)
            return x.new_zeros(x.movedim(dim, 0).shape[1:])  # of none, for the shapes

        def stacked(each: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(each))[: info.batch_size]

        results = [element(i) for i in range(max(1, info.batch_size))]
        if isinstance(results[0], Tensor):
            return stacked(results), 0
        return tuple(map(stacked, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


class _Arguments:
    """Of a call for ``size`` elements; ``rows`` names the tensors that have rows of tokens, and
    ``self.rows`` is the first of them."""

    def __init__(
        self,
        of: Signature,
        rows: tuple[str, ...],
        size: int,
        in_dims: Any,
        args: Any,
        statistics: Any = None,
    ) -> None:
        self.a, self._of, self.statistics = of.bind(args, {}), of, statistics
        self.dims = dict(zip(of.names, in_dims, strict=False))
        for name in rows:
            setattr(self.a, name, self.stacked(name, size))
        self.rows = getattr(self.a, rows[0])
        self.others = {name for name, d in self.dims.items() if d is not None and name not in rows}

    def stacked(self, name: str, size: int) -> Any:
        """With the elements in front, also of a tensor that they share."""
        x, dim = getattr(self.a, name), self.dims.get(name)
        if x is None:
            return None
        return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

    def needs_loop(self, besides: set[str]) -> bool:
        """Whether anything else is batched, or an element has bounds of its own, or no tokens."""
        packed = getattr(self.a, "cu_seqlens", None) is not None
        return bool(self.others - besides) or packed or self.rows.numel() == 0

    def call(self, **changed: Any) -> Any:
        return self._of.overload(*({**vars(self.a), **changed}[name] for name in self._of.names))


def batch_rows(name: str, rows: tuple[str, ...], tables_of: tuple[str, ...] = ()) -> None:
    """Of operators whose results are rows, and tables of tokens last.

    ``tables_of``: the tables among the arguments, where the operator is a gradient.
    """
    signature = Signature(name)
    loop = _looped(signature.overload)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Batched:
        size = info.batch_size
        given = _Arguments(signature, rows, size, in_dims, args)
        a, groups = given.a, getattr(given.a, "groups", None)
        if given.needs_loop({*tables_of, "dloss"}):
            return loop(info, in_dims, *args)
        if groups is not None:
            if groups.shape[-1] != len(GROUP_FIELDS):  # bounds of packed sequences
                return loop(info, in_dims, *args)
            a.groups = _of_all(given.stacked("groups", size)) if _several(given) else groups
        if "tokens" in tables_of:
            tokens = given.stacked("tokens", size).movedim(0, 1)
            a.tokens = tokens.reshape(tokens.shape[0], -1).contiguous()
        if "dloss" in given.dims:
            a.dloss = _upstream(given, size, a.tokens.shape[1] // size)
        results = given.call()
        if isinstance(results, Tensor):
            return results, 0
        *results, tokens = results
        of_elements = tokens.view(tokens.shape[0], size, -1)
        dims = [0 if x.numel() or x.dim() > 1 else None for x in results]
        return (*results, of_elements), (*dims, 1)

    torch.library.register_vmap(signature.overload, rule)


def _several(given: _Arguments) -> bool:
    """Whether the elements' groups differ, or an element has several."""
    return given.dims["groups"] is not None or given.a.groups.shape[0] > 1 or _each(given)


def _each(given: _Arguments) -> bool:
    return bool(getattr(given.a, "per_sequence", False))


def _of_all(groups: Tensor) -> Tensor:
    """[elements, groups, fields] as one table."""
    return groups.reshape(-1, groups.shape[-1]).contiguous()


def _upstream(given: _Arguments, size: int, tokens: int) -> Tensor:
    """One value, or one for each token (of a result for each sequence: for each of these)."""
    dloss, dim = given.a.dloss, given.dims["dloss"]
    if dim is None and dloss.dim() == 0:
        return dloss
    dloss = given.stacked("dloss", size)
    if dloss.dim() == 1 and not _each(given):
        dloss = dloss[:, None].expand(size, tokens)
    return dloss.reshape(-1)


Statistics = Callable[[Tensor, SimpleNamespace], Tensor]


def batch_reduced(
    name: str, rows: tuple[str, ...], statistics: Statistics | None = None, trailing: int = 1
) -> None:
    """Of a loss that is reduced: its results are loss, perhaps statistics, tokens and groups.

    ``rows`` begins with what has the tokens' dimensions, and ``trailing`` others behind them.
    ``statistics(tokens, a)`` are those of each element, of the table [fields, elements, tokens].
    """
    signature = Signature(name)
    loop = _looped(signature.overload)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Batched:
        size = info.batch_size
        given = _Arguments(signature, rows, size, in_dims, args, statistics)
        a, shape = given.a, given.rows.shape[1 : given.rows.dim() - trailing]
        if given.needs_loop({"normalizer"}):
            return loop(info, in_dims, *args)
        if getattr(a, "per_sequence", False):
            if "normalizer" in given.others:
                return loop(info, in_dims, *args)
            loss, tokens, groups = given.call()
            return _results(given, size, loss, [], tokens, groups)
        normalizer = None if a.normalizer is None else given.stacked("normalizer", size).double()
        if a.reduction == "mean" and normalizer is None:
            if getattr(a, "shift", False) and len(shape) > 1:  # an element is several sequences
                return loop(info, in_dims, *args)
            for row in rows:  # as one sequence for each element
                x = getattr(a, row)
                flat = (size, math.prod(shape), *(() if x is None else x.shape[1 + len(shape) :]))
                setattr(a, row, x if x is None else x.reshape(flat))
            return _means(given, size, None)
        if a.reduction == "sequence_mean":
            return _means(given, size, normalizer)
        return _sums(given, size, normalizer)

    torch.library.register_vmap(signature.overload, rule)


def _means(given: _Arguments, size: int, normalizer: Tensor | None) -> Batched:
    """Of the means of each element's sequences, which are what the kernels leave in the table."""
    one = torch.ones((), dtype=torch.float64, device=given.rows.device)
    _, *stats, tokens, groups = given.call(reduction="sequence_mean", normalizer=one)
    groups = groups.view(size, -1, len(GROUP_FIELDS))
    means = groups[..., _LOSS]
    if getattr(given.a, "z_loss", 0) != 0:
        means = means + groups[..., _Z]
    active = groups[..., _SCALES.start] != 0
    count = active.sum(dim=1).double() if normalizer is None else normalizer
    count = count.where(active.any(dim=1), 1)
    groups[..., _SCALES] /= count[:, None, None]
    return _results(given, size, (means.sum(dim=1) / count).to(tokens.dtype), stats, tokens, groups)


def _sums(given: _Arguments, size: int, normalizer: Tensor | None) -> Batched:
    """Of each element's tokens, over its normalizer; for "none" the tokens themselves."""
    loss, *stats, tokens, groups = given.call(reduction="none", normalizer=None)
    if given.a.reduction == "none":
        return _results(given, size, loss, stats, tokens, groups)
    active = (tables.weights(tokens).view(size, -1) != 0).any(dim=1)
    divisor = active.new_ones(size, dtype=torch.float64) if normalizer is None else normalizer
    loss = loss.view(size, -1).sum(dim=1, dtype=torch.float64) / divisor.where(active, 1)
    groups = torch.zeros(size, 1, len(GROUP_FIELDS), dtype=torch.float64, device=loss.device)
    groups[..., _SCALES] = (1 / divisor).where(active, 0)[:, None, None]
    return _results(given, size, loss.to(tokens.dtype), stats, tokens, groups)


def _results(
    given: _Arguments, size: int, loss: Tensor, stats: list[Tensor], tokens: Tensor, groups: Tensor
) -> Batched:
    """As of one call for each element; a table with one group for all of them is shared."""
    tokens = tokens.view(tokens.shape[0], size, -1)
    if groups.shape[0] != 1 and groups.dim() == 2:
        groups = groups.view(size, -1, groups.shape[1])
    if stats and stats[0].numel():
        stats = [given.statistics(tokens.double(), given.a)]
    results = (loss, *stats, tokens, groups)
    of_stats = [0 if x.numel() else None for x in stats]
    return results, (0, *of_stats, 1, 0 if groups.dim() == 3 else None)


def weighted(weight: Tensor, *columns: Tensor) -> Tensor:
    """[elements, columns]: the sums over the tokens of each element."""
    return torch.stack([(weight * x).where(weight != 0, 0).sum(dim=-1) for x in columns], dim=-1)
