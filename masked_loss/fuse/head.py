# SPDX-License-Identifier: BSD-3-Clause
"""The output head that returns lazy logits, where it stands in a model, and what it did."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masked_loss._op.arguments import is_distributed
from masked_loss.fuse.dense_logits import DenseLogits
from masked_loss.fuse.lazy_logits import WHO, LazyLogits, Uses
from masked_loss.fuse.parts import Parts

# Names that models give to their head, tried where there is no get_output_embeddings().
_HEADS = ("lm_head", "output", "head", "embed_out", "unembed")
_WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, torch.compile

_COMPILED = Uses(reason="torch.compile")


class FusedLinear(nn.Linear):
    """An output head that returns :class:`LazyLogits`, with the parameters of ``nn.Linear``."""

    fuse: bool = True
    uses: Uses | None = None  # what was done with the logits of the last forward

    def forward(self, input: Tensor) -> Tensor:
        if not self.fuse:
            return F.linear(input, self.weight, self.bias)
        if torch.compiler.is_dynamo_compiling():
            if not torch.compiler.is_exporting():
                self.uses = _COMPILED
            logits = F.linear(input, self.weight, self.bias)
            return logits if is_distributed(input) else logits.as_subclass(DenseLogits)
        if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
            return self._computed(input, "tracing or torch.func")
        tensors: Sequence[Tensor] = tuple(
            x for x in (input, self.weight, self.bias) if x is not None
        )
        if any(x.is_meta for x in tensors):
            return self._computed(input, "meta tensors")
        hidden: Tensor = input
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        split = None
        if is_distributed(input):
            part = _split(hidden, weight, bias)
            if part is None:
                names = ", ".join(f"{_placements(x)}" for x in tensors)
                say_once(
                    f"{WHO}: the head works on DTensors placed by {names}: its logits are "
                    "computed. Those of one that ColwiseParallel shares out are not"
                )
                return self._computed(input, "DTensor")
            hidden, weight, bias, split = part
            tensors = tuple(x for x in part[:3] if x is not None)
        kinds = {type(x) for x in tensors} - {Tensor, nn.Parameter}
        if kinds:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            if names != "FakeTensor":
                say_once(
                    f"{WHO}: the head works on {names} (tensor parallelism, quantisation?): its "
                    "logits are computed, and their loss is the model's own"
                )
            return self._computed(input, names)
        if _is_sharded_alone(self):
            say_once(
                f"{WHO}: FSDP frees the weight of the head, {type(self).__name__}, after its "
                "forward: its logits are computed. Shard it with the module around it instead"
            )
            return self._computed(input, "FSDP, head alone").as_subclass(DenseLogits)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
        fits = hidden.dim() > 0 and hidden.shape[-1] == weight.shape[1]
        if not fits or hidden.dtype != weight.dtype or hidden.device != weight.device:
            return F.linear(input, self.weight, self.bias)  # says what is wrong
        logits = LazyLogits._make(Parts(hidden, weight, bias, dtype=hidden.dtype, split=split))
        self.uses = logits._uses
        return logits

    def _computed(self, input: Tensor, reason: str) -> Tensor:
        trained = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        self.uses = Uses(reason=reason, trained=trained)
        return F.linear(input, self.weight, self.bias)


def _split(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """Without an import of DTensors where there are none."""
    from masked_loss.fuse.split import split

    return split(hidden, weight, bias)


def _placements(x: Tensor) -> str:
    return str(getattr(x, "placements", "nothing"))


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def _is_sharded_alone(head: nn.Module) -> bool:
    return type(head) is not FusedLinear and any(
        c.__name__ == "FSDPModule" for c in type(head).__mro__
    )


def make_dense(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a head that is more than a product."""
    if type(output) is not Tensor or torch._C._get_tracing_state() is not None:
        return output
    return output.as_subclass(DenseLogits)


_said: set[str] = set()


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


def _head_of(who: str, model: nn.Module) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, nn.Module):
        return head
    for name in _HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module) and hasattr(head, "weight"):
            return head
    for name in _WRAPPERS:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _head_of(who, inner)
    raise ValueError(
        f"{who}: model must have get_output_embeddings() or an output head named "
        f"{', '.join(_HEADS)}, got {type(model).__name__} with "
        f"{', '.join(name for name, _ in model.named_children()) or 'no modules'}"
    )


def heads_of(model: nn.Module, who: str = WHO) -> list[nn.Module]:
    """The head, or those that PEFT keeps in its place (``modules_to_save``)."""
    head = _head_of(who, model)
    saved, original = getattr(head, "modules_to_save", None), getattr(head, "original_module", None)
    if isinstance(saved, nn.ModuleDict) and isinstance(original, nn.Module):
        return [original, *saved.values()]
    return [head]
