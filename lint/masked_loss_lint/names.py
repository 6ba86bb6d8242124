# SPDX-License-Identifier: BSD-3-Clause
"""What a name says of its tensor, where nothing else is known: masks, labels, weights, steps."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LOSS = re.compile(r"loss|nll|entropy|criterion", re.IGNORECASE)


def _set(words: str) -> set[str]:
    return set(words.split())


_MASK = {"mask", "masks"}
_NUMBERS = _set(
    "w weight weights lambda lamb lam alpha beta gamma coef coeff scale factor rate ratio "
    "prob p num n use has is with no do apply"
)
# A name with one of these is not the mask itself but a number, a flag or a tensor about it.
_NOT_A_MASK = _set(
    "token tokens id ids idx index loss losses logit logits head pred preds prediction "
    "ratio prob probs probability p weight weights w scale coef coeff coefficient factor "
    "lambda lamb lam alpha beta gamma rate lr sum count num n total len length size mean "
    "avg value val type path file name fn func use has is with do no apply enable flag "
    "penalty reg dice iou bce ce kl l embed embedding emb feature features per frac "
    "fraction norm denom denominator"
)
_SAMPLES = {"sample", "samples", "token", "tokens", "example", "instance", "pixel", "importance"}
_MANY_LABELS = {"labels", "targets", "ids", "tokens", "inputs"}
_LABELS = {"label", "target", "tgt", "trg", "y", "gt"}  # of a batch, or of one sample
_PADDING = {"pad", "padding", "ignore", "ignored", "eos", "bos"}
# A name with one of these is one number: of a step, of a size, in a configuration.
_TIMES = {"step", "epoch", "iter", "iteration", "progress", "warmup", "phase", "stage"}
_SCALAR_WORDS = (
    "steps epochs iters iterations rank world max min num n len length size count coef coeff lr "
    "temperature threshold"
)
_SCALARS = _TIMES | set(_SCALAR_WORDS.split())
_CONFIGURATION = {"cfg", "config", "conf", "args", "opt", "opts", "options", "hparams", "settings"}
_NOT_LABELS = _SCALARS | {"domain", "name", "type", "kind", "class", "path", "weight", "smoothing"}
_NOT_LABELS |= {"seen", "processed", "consumed", "total", "limit", "budget"}
_AUXILIARY = _set("aux auxiliary balance balancing router moe reg vq commitment")
_COEFFICIENTS = _set("lambda lamb lam alpha beta gamma coef coeff coefficient scale rate ratio")
_SEQUENCE = _set("attention attn att length lengths len lens seq sequence pad padding src key")
_ACCUMULATION = ("accum", "micro", "iter_size", "grad_acc", "gradient_acc")

# Methods and functions that leave a tensor the same for our purpose.
_VIEW_NAMES = (
    "view reshape flatten squeeze unsqueeze contiguous float double half bfloat16 long int "
    "bool to type type_as cpu cuda clone detach requires_grad_ view_as expand expand_as "
    "ravel byte transpose permute t masked_fill masked_fill_ ne eq ge gt le lt logical_not "
    "repeat"
)
VIEWS = frozenset(_VIEW_NAMES.split())
_SHAPE_NAMES = "view reshape flatten squeeze unsqueeze view_as ravel transpose permute t"
SHAPES = frozenset(_SHAPE_NAMES.split())


@lru_cache(maxsize=65536)
def words(name: str) -> tuple[str, ...]:
    """The words of a snake_case or CamelCase name, lower case."""
    return tuple(word.lower() for word in _WORDS.findall(name))


def is_loss(name: str) -> bool:
    return _LOSS.search(name) is not None


def last_name(node: ast.expr) -> str:
    """The name that speaks for an expression: c of a.b.c, "m" of batch["m"], x of x.view(-1)."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        index = node.slice
        if isinstance(index, ast.Constant) and isinstance(index.value, str):
            return index.value
        return last_name(node.value) if slices_time(index) else ""
    if isinstance(node, ast.Call) and _is_getattr(node):
        name = node.args[1]
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return last_name(node.func.value) if node.func.attr in VIEWS else ""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return last_name(node.operand)
    return ""


def slices_time(index: ast.expr) -> bool:
    """True for x[:, 1:], x[:, t], x[..., 0], x[:, None]: still more than one element."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return any(
        isinstance(part, ast.Slice)
        or (isinstance(part, ast.Constant) and part.value in (..., None))
        for part in parts
    )


def is_mask(node: ast.expr) -> bool:
    """True for mask, loss_mask, mask_flat; not for mask_weight, w_mask, mask_ratio, mask_loss."""
    found = words(last_name(node))
    if not found or not _MASK & set(found):
        return False
    return not set(found) & (_NUMBERS if found[-1] in _MASK else _NOT_A_MASK)


def is_weights(node: ast.expr) -> bool:
    """True for weights, sample_weight, token_weights: one weight per token or sample."""
    found = words(last_name(node))
    if not found or found[-1] not in {"weight", "weights"}:
        return False
    return found == ("weights",) or bool(_SAMPLES & set(found))


def is_labels(node: ast.expr) -> bool:
    found = set(words(last_name(node)))
    return bool(found & (_MANY_LABELS | _LABELS)) and not found & _NOT_LABELS


def compares_labels(labels: ast.expr, other: ast.expr) -> bool:
    """True for labels > 0 and target != pad; `target == 1` may be the label of one sample."""
    many = _MANY_LABELS & set(words(last_name(labels)))
    return is_labels(labels) and (bool(many) or _is_padding(other))


def _is_padding(node: ast.expr) -> bool:
    """True for pad_id, self.ignore_index, -100."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return isinstance(node.operand, ast.Constant)
    return bool(set(words(last_name(node))) & _PADDING)


def is_scalar(node: ast.expr) -> bool:
    """True for epoch, cfg.mask, step / 100, and for mask_coef: a number about a mask."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    if isinstance(node, (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare)):
        operands = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
        return all(map(is_scalar, operands))
    found = set(words(last_name(node)))
    if isinstance(node, ast.Call) and not _is_getattr(node):  # a schedule, np.exp(-step)
        return bool(node.args) and all(map(_is_time, node.args))
    if isinstance(node, ast.Attribute) and set(words(last_name(node.value))) & _CONFIGURATION:
        return True
    return bool(found & _SCALARS) or bool(found & _MASK and not is_mask(node))


def _is_time(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_time(node.operand)
    if isinstance(node, ast.BinOp):
        return is_scalar(node) and (_is_time(node.left) or _is_time(node.right))
    return bool(set(words(last_name(node))) & _TIMES)


def _is_getattr(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1


def is_auxiliary(node: ast.expr) -> bool:
    """True for aux_loss, 0.01 * out.router_loss: losses that are one number for the whole model."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        operands = node.left, node.right
        return any(map(is_auxiliary, operands)) and not any(map(is_mask, operands))
    found = set(words(last_name(node)))
    return bool(found & {"loss", "losses"} and found & _AUXILIARY)


def is_accumulation(node: ast.expr) -> bool:
    """True for gradient_accumulation_steps, cfg.accum, self.grad_accum_steps."""
    name = last_name(node).lower()
    return any(part in name for part in _ACCUMULATION)


def is_coefficient(node: ast.expr) -> bool:
    """True for alpha, self.ce_weight, loss_weight, cfg.scale: one number that scales a loss."""
    found = set(words(last_name(node)))
    if found & _COEFFICIENTS or is_scalar(node):
        return True
    on_self = isinstance(node, ast.Attribute) and last_name(node.value) == "self"
    return "weight" in found and (on_self or bool(found & {"loss", "lambda"}))


def is_never_empty(name: str) -> bool:
    """True for attention_mask, src_pad_mask, sequence_mask(lengths): a sequence has a token."""
    return bool(_SEQUENCE & set(words(name)))


def text(node: ast.AST) -> str:
    """The source of an expression, "" where it is nested too deeply to be written out."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    try:
        return ast.unparse(node)
    except RecursionError:
        return ""


def key(node: ast.expr) -> str:
    """The text of an expression without its casts and views: the same tensor, the same key."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr not in VIEWS:
            break
        node = node.func.value
    return text(node)


def path(node: ast.expr) -> str:
    """The text of a.b, a.b.c or a["b"], the places a value is put; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = path(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        owner = path(node.value)
        return f"{owner}[{node.slice.value!r}]" if owner else ""
    return ""
