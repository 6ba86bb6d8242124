# SPDX-License-Identifier: BSD-3-Clause
"""From what a loss computes to its operator: every key that PyTorch dispatches a call on.

The schemas are C++'s (csrc/ops/register.cpp). They say the names and the defaults, so nothing here
or in the files beside this one reads an argument by its position.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from masked_loss._op.arguments import (
    is_distributed,
    require_constant,
    require_local,
    typed_error,
)
from masked_loss._op.autograd import (
    Inputs,
    below_autograd,
    is_differentiated,
    is_transformed,
)
from masked_loss._op.checks import Names, checked, register_fake, speak_for
from masked_loss._op.tables import ops
from masked_loss.options import Meaning

library = torch.library.Library("masked_loss", "FRAGMENT")

Call = Callable[..., tuple[Tensor, ...]]
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


_CONSTANT = frozenset((
    "normalizer", "class_weight", "temperatures", "teacher_temperatures",
    "teacher_logits", "teacher_hidden", "teacher_weight", "teacher_bias",
))  # fmt: skip
"""Inputs that have no gradient; a mask has one, or selects."""


_NAMES = {"temperatures": "temperature", "teacher_temperatures": "teacher_temperature"}
"""What every function calls these."""


class Signature:
    """An operator's arguments by name."""

    def __init__(self, name: str) -> None:
        self.overload = getattr(ops, name).default
        schema = self.overload._schema
        self.names = [a.name for a in schema.arguments]
        self._defaults = {a.name: a.default_value for a in schema.arguments}
        self._returns = len(schema.returns)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
        given = dict(zip(self.names, args, strict=False))
        return SimpleNamespace(**{**self._defaults, **given, **kwargs})

    def returned(self, results: tuple[Tensor, ...]) -> Any:
        """Of ``results`` those that the operator gives."""
        return results[0] if self._returns == 1 else tuple(results[: self._returns])


def record(of: type[Any], a: SimpleNamespace) -> Any:
    """The record whose fields are among the arguments; what the operator has not is a default."""
    return of(**{name: getattr(a, name) for name in of._fields if hasattr(a, name)})


def fake(*names: str) -> Callable[[Call], Call]:
    """Decorates what shapes and types operators give, as a function of their arguments by name.

    Of what it gives an operator takes as many as its schema says: one fake serves the public
    operator, and the forward operator that also returns what backward needs.
    """

    def register(function: Call) -> Call:
        for name in names:
            signature = Signature(name)

            # The default argument keeps this round's signature.
            def call(*args: Any, _of: Signature = signature, **kwargs: Any) -> Any:
                return _of.returned(function(_of.bind(args, kwargs)))

            register_fake(signature.overload, call)
        return function

    return register


def fake_nothing(*names: str) -> None:
    """Of operators that only write into their arguments."""
    for name in names:
        register_fake(Signature(name).overload, lambda *args, **kwargs: None)


def fake_like(argument: str, *names: str) -> None:
    """Of operators that give a contiguous tensor like one of their arguments."""

    def result(a: SimpleNamespace) -> tuple[Tensor]:
        like = getattr(a, argument)
        return (torch.empty_like(like, memory_format=torch.contiguous_format),)

    fake(*names)(result)


class Operator:
    """A public operator and its two ways: a node of a graph that is compiled, or a call.

    ``call(inputs, meaning, **more)`` computes the loss with autograd. ``inputs`` names its tensors,
    in the order in which ``call`` takes them; ``options`` is the record that ``meaning`` is.
    ``kernel`` takes the same as ``call``, and computes it below autograd; None if C++ has
    registered one. ``check`` looks at all arguments by name, where no kernel may do so: under
    forward mode and transforms of torch.func.
    """

    def __init__(
        self,
        name: str,
        inputs: tuple[str, ...],
        call: Call,
        kernel: Call | None = None,
        options: type[Any] = Meaning,
        check: Callable[[SimpleNamespace], None] = lambda a: None,
    ) -> None:
        self.name, self._check = name, check
        self._signature = signature = Signature(name)
        self._overload = signature.overload
        self._inputs, self._call = inputs, call
        self._record = options
        self._options = tuple(name for name in options._fields if name in signature.names)
        library.impl(name, self._autograd, "Autograd")
        # A transform of torch.func takes the loss apart before anything else does.
        library.impl(name, self._called, "FuncTorchDynamicLayerFrontMode")
        if kernel is not None:
            below = checked(signature.overload, self._by_name(kernel))
            library.impl(name, below, "CompositeExplicitAutograd")

    def __call__(
        self, who: str, inputs: Inputs, meaning: Any, names: Names, **more: Any
    ) -> tuple[Tensor, ...]:
        """The results; or what was wrong, in the words of the function ``who``."""
        for option, value in zip(self._record._fields, meaning, strict=True):
            if isinstance(value, Tensor):  # the operator takes its number, and no gradient
                require_constant(who, option, value)
        if torch.compiler.is_compiling():
            named = dict(zip(self._inputs, inputs, strict=True))
            options = {name: getattr(meaning, name) for name in self._options}
            speak_for(who, _NAMES | names)
            result = self._overload(**named, **options, **more)
            return result if isinstance(result, tuple) else (result,)
        try:
            return self._checked(inputs, meaning, **more)
        except RuntimeError as error:
            tensors = dict(zip(self._inputs, inputs, strict=True))
            raise typed_error(who, error, _NAMES | names, tensors) from None

    def _checked(self, inputs: Inputs, meaning: Meaning, **more: Any) -> tuple[Tensor, ...]:
        if is_transformed():
            tensors = zip(self._inputs, inputs, strict=True)
            self._check(SimpleNamespace(**dict(tensors), **meaning._asdict(), **more))
        return self._call(inputs, meaning, **more)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """As torch.ops, or from a compiled graph: with autograd."""
        given = self._signature.bind(args, kwargs)
        for name in _CONSTANT.intersection(self._inputs):
            require_constant(self.name, name, getattr(given, name))
        return self._by_name(self._checked)(*args, **kwargs)

    def _autograd(self, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_distributed, (*args, *kwargs.values()))):
            given = vars(self._signature.bind(args, kwargs))
            require_local(self.name, **{name: given[name] for name in self._inputs})
        if is_differentiated(*(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))):
            return self._called(*args, **kwargs)
        with below_autograd():
            return self._overload(*args, **kwargs)

    def _by_name(self, function: Call) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            named = vars(self._signature.bind(args, kwargs))
            inputs = tuple(named.pop(name) for name in self._inputs)
            meaning = self._record(**{name: named.pop(name) for name in self._options})
            return self._signature.returned(function(inputs, meaning, **named))

        return kernel


def implement(name: str, function: Callable[[SimpleNamespace], Any]) -> Callable[..., Any]:
    """Gives an operator that C++ only declares its kernel, as a function of arguments by name.

    Returns the kernel, to be called as the operator is.
    """
    signature = Signature(name)

    @kernel
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(signature.bind(args, kwargs))

    library.impl(name, checked(signature.overload, call), "CompositeExplicitAutograd")
    return call


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates what runs inside an operator: neither differentiated nor autocast."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with below_autograd(), torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return function(*args, **kwargs)

    return call
