# SPDX-License-Identifier: BSD-3-Clause
"""The operator table: what the losses are asked to compute, once, for every test that needs inputs.

A :class:`Case` names a computation; its ``sample(dtype, device)`` makes the numbers, the same ones
at every call. ``CASES`` and ``REDUCE_CASES`` cover every reduction with every option, every type of
mask and every layout; ``FEW_CASES`` is a selection of them for tests that cost more.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ["none", "sum", "mean", "sequence_mean"]

# class_weight True stands for random weights, normalizer "tensor" for a 0-dim tensor, temperature
# "each" for one of each token.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalizer": {"normalizer": 7},
    "normalizer_tensor": {"normalizer": "tensor"},
    "ignore_index": {"ignore_index": 2},
    "class_weight": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing_weight": {"label_smoothing": 0.2, "class_weight": True},
    "z_loss": {"z_loss": 0.05},
    "z_loss_weight": {"z_loss": 0.05, "class_weight": True},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "each"},
    "shift": {"shift": True},
    "inplace": {"inplace_backward": True},
    "everything": {
        "ignore_index": 2,
        "class_weight": True,
        "label_smoothing": 0.2,
        "z_loss": 0.05,
        "softcap": 4.0,
        "temperature": 1.3,
        "shift": True,
    },
}

# Values that no loss takes, and what it says of them.
INF, NAN = float("inf"), float("nan")
BAD_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("label_smoothing", -0.1, ValueError, "label_smoothing must be between 0 and 1, got -0.1"),
    ("label_smoothing", 1.5, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
    ("label_smoothing", NAN, ValueError, "label_smoothing must be between 0 and 1, got nan"),
    ("label_smoothing", "0.1", TypeError, "label_smoothing must be float, got str"),
    ("z_loss", -1.0, ValueError, "z_loss must be at least 0 and finite, got -1"),
    ("z_loss", INF, ValueError, "z_loss must be at least 0 and finite, got inf"),
    ("z_loss", "0.1", TypeError, "z_loss must be float, got str"),
    ("softcap", 0.0, ValueError, "softcap must be greater than 0 and finite, got 0"),
    ("softcap", -2.0, ValueError, "softcap must be greater than 0 and finite, got -2"),
    ("softcap", INF, ValueError, "softcap must be greater than 0 and finite, got inf"),
    ("softcap", "30", TypeError, "softcap must be Optional[float], got str"),
    ("temperature", 0, ValueError, "temperature must be greater than 0 and finite, got 0"),
    ("temperature", -1.5, ValueError, "temperature must be greater than 0 and finite, got -1.5"),
    ("temperature", INF, ValueError, "temperature must be greater than 0 and finite, got inf"),
    ("temperature", "1", TypeError, "temperature must be a number or a tensor, got str"),
    ("temperature", torch.ones(3), ValueError, "temperature must be a number or broadcast to"),
    (
        "temperature",
        torch.ones((), dtype=torch.complex64),
        TypeError,
        "temperature must be real, got complex64",
    ),
    (
        "temperature",
        torch.ones((), requires_grad=True),
        ValueError,
        "temperature is not differentiable, got one that requires grad",
    ),
    ("ignore_index", 0.5, TypeError, "ignore_index must be int, got float"),
]

MASKS: dict[str, torch.dtype | None] = {
    "none": None,
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "zeros": torch.float32,
    "ones": torch.float32,
    "signed": torch.float32,
    "expanded": torch.float32,
}

LAYOUTS = ["contiguous", "padded", "odd", "time_first", "expanded", "every_other"]

# Around every vector width from 4 to 64 lanes, with every tail of up to 16 lanes, and around the
# segments of 16384 columns.
WIDTHS = [*range(1, 18), 23, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129]
WIDTHS += [255, 256, 257, 511, 513, 1000, 1023, 1025, 4097]
LONG_WIDTHS = [16383, 16384, 16385, 32768, 32769, 40000]


@dataclass
class Sample:
    """The numbers of a case. ``values`` are logits, or losses that are to be reduced."""

    values: Tensor
    target: Tensor | None
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def args(self) -> tuple[Tensor | None, ...]:
        if self.target is None:
            return self.values, self.mask
        return self.values, self.target, self.mask

    def call(self, function: Callable[..., Any], **more: Any) -> Any:
        return function(*self.args, **self.options, **more)

    def leaves(self) -> list[Tensor]:
        return [t for t in self.args if t is not None and t.requires_grad]

    def double(self) -> Sample:
        """The same numbers in float64, with leaves of their own."""

        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().double().requires_grad_(x.requires_grad)

        options = {name: convert(x) for name, x in self.options.items()}
        return Sample(convert(self.values), self.target, convert(self.mask), options)


@dataclass(frozen=True)
class Case:
    """A computation, by name. ``classes`` is None where there are no classes: masked_reduce."""

    name: str
    shape: tuple[int, ...] = (3, 5)
    classes: int | None = 9
    layout: str = "contiguous"
    mask: str = "float32"
    target_dtype: torch.dtype = torch.int64
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 3.0

    def __str__(self) -> str:
        return self.name

    def sample(
        self, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = True, draw: int = 0
    ) -> Sample:
        random = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + draw)

        def normal(*sizes: int) -> Tensor:
            numbers = torch.randn(sizes, generator=random, dtype=torch.float64)
            return (self.scale * numbers).to(device, dtype)

        row = () if self.classes is None else (self.classes,)
        values = strided(self.shape + row, self.layout, normal).requires_grad_(requires_grad)

        target = None
        if self.classes is not None:
            target = torch.randint(self.classes, self.shape, generator=random)
            ignored = torch.rand(self.shape, generator=random) < 0.1
            target[ignored] = self.options.get("ignore_index", -100)
            target = target.to(device, self.target_dtype)

        mask = make_mask(self.mask, self.shape, random, device)
        if mask is not None and mask.is_floating_point():
            mask.requires_grad_(requires_grad)

        options = concrete(self.options, self.shape, self.classes or 0, dtype, device, random)
        return Sample(values, target, mask, options)


def concrete(
    options: dict[str, Any],
    shape: tuple[int, ...],
    classes: int,
    dtype: torch.dtype,
    device: str = "cpu",
    random: torch.Generator | None = None,
) -> dict[str, Any]:
    """The options with numbers where OPTIONS has a word that stands for them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    random = random or torch.Generator().manual_seed(3)

    def numbers(*sizes: int) -> Tensor:
        return (0.5 + torch.rand(sizes, generator=random, dtype=torch.float64)).to(device, wide)

    options = dict(options)
    if options.get("class_weight") is True:
        options["class_weight"] = numbers(classes)
    if options.get("normalizer") == "tensor":
        options["normalizer"] = torch.tensor(6.5, dtype=wide, device=device)
    if options.get("temperature") == "each":
        options["temperature"] = numbers(*shape)
    return options


def strided(shape: tuple[int, ...], layout: str, make: Callable[..., Tensor]) -> Tensor:
    """A tensor of ``shape`` whose last dimension is contiguous, the others as ``layout`` says."""
    if layout == "contiguous":
        return make(*shape)
    *outer, last = shape
    if layout == "padded":  # a vocabulary that was padded to a rounder number
        return make(*outer, last + 3)[..., :last]
    if layout == "odd":  # rows begin at no multiple of any vector's size
        return make(*outer, last + 6)[..., 1 : last + 1]
    if layout == "time_first":
        return make(*reversed(outer), last).permute(*reversed(range(len(outer))), -1)
    if layout == "expanded":  # every sequence has the same numbers
        return make(*outer[1:], last).expand(*outer, last)
    if layout == "every_other":
        return make(2 * outer[0], *outer[1:], last)[::2]
    raise ValueError(layout)


def make_mask(
    kind: str, shape: tuple[int, ...], random: torch.Generator, device: str = "cpu"
) -> Tensor | None:
    """Token weights of a kind that MASKS names, about a third of them 0."""
    dtype = MASKS[kind]
    if dtype is None:
        return None
    if kind in ("zeros", "ones"):
        return torch.full(shape, float(kind == "ones"), dtype=dtype, device=device)
    if kind == "expanded":
        weight = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0, 2.0], device=device)
        steps = torch.arange(shape[-1], device=device)
        return weight[steps % 6].expand(shape)
    if dtype.is_floating_point:
        weight = 0.25 + torch.rand(shape, generator=random)
        if kind == "signed":  # their sum stays away from 0
            weight = weight * torch.where(torch.rand(shape, generator=random) < 0.2, -0.5, 1.0)
    else:
        weight = torch.randint(1, 4, shape, generator=random)
    active = torch.rand(shape, generator=random) < 0.7
    active.view(-1)[:1] = True
    return (weight * active).to(device, dtype)


def _options(reduction: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, options in OPTIONS.items():
        if "normalizer" not in options or reduction != "none":
            yield name, {"reduction": reduction, **options}


def _cases() -> Iterator[Case]:
    for reduction in REDUCTIONS:
        for name, options in _options(reduction):
            yield Case(f"{reduction}-{name}", options=options)
        for mask in MASKS:
            yield Case(f"{reduction}-mask_{mask}", mask=mask, options={"reduction": reduction})
        for layout in LAYOUTS[1:]:
            for name in ("plain", "everything", "inplace"):
                if (layout, name) == ("expanded", "inplace"):
                    continue  # several rows in one place cannot be overwritten
                options = {"reduction": reduction, **OPTIONS[name]}
                yield Case(f"{reduction}-{name}-{layout}", layout=layout, options=options)
        yield Case(f"{reduction}-int32", target_dtype=torch.int32, options={"reduction": reduction})
    for shape in [(), (1,), (13,), (2, 3, 4), (1, 1), (4, 1), (1, 6)]:
        if shape:
            options = {"reduction": "sequence_mean", **OPTIONS["everything"]}
            yield Case(f"shape_{'x'.join(map(str, shape))}-everything", shape, options=options)
        yield Case(f"shape_{'x'.join(map(str, shape)) or 'scalar'}", shape)


def _reduce_cases() -> Iterator[Case]:
    for reduction in REDUCTIONS:
        for mask in MASKS:
            options = {"reduction": reduction}
            yield Case(f"{reduction}-mask_{mask}", classes=None, mask=mask, options=options)
        for layout in LAYOUTS[1:]:
            options = {"reduction": reduction}
            yield Case(f"{reduction}-{layout}", classes=None, layout=layout, options=options)
        for name, options in _options(reduction):
            if "normalizer" in options:
                yield Case(f"{reduction}-{name}", classes=None, options=options)
    for length in [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 1000, 4099]:
        yield Case(f"length_{length}", (length,), classes=None)
    yield Case("shape_scalar", (), classes=None, mask="none")
    yield Case("shape_2x3x4", (2, 3, 4), classes=None, options={"reduction": "sequence_mean"})


CASES = list(_cases())
REDUCE_CASES = list(_reduce_cases())
FEW_CASES = [
    case
    for case in CASES
    if case.name
    in {
        "none-plain",
        "sum-normalizer_tensor",
        "mean-plain",
        "mean-mask_none",
        "mean-mask_bool",
        "mean-mask_bfloat16",
        "mean-normalizer",
        "mean-inplace",
        "mean-int32",
        "sequence_mean-plain",
        "none-everything-odd",
        "mean-everything-time_first",
        "sequence_mean-everything-padded",
    }
]


def predictions() -> Iterator[tuple[Tensor, int, int]]:
    """Rows of few and of many logits, a target, and whether it is what they predict: the first of
    the largest, and nothing where one is NaN."""
    values = torch.tensor([1.0, 2.0, -torch.inf, torch.inf, torch.nan])
    for others in (0, 37):
        for last in torch.cartesian_prod(values, values, values):
            row = torch.cat([torch.full((others,), -5.0), last])
            for target in range(others, others + 3):
                yield row, target, int(not row.isnan().any() and row.argmax() == target)


def problem(*shape: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits and targets of a few tokens, as small as a check by hand wants them."""
    logits = torch.randn(*shape, classes, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(classes, shape)
