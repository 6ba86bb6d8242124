# SPDX-License-Identifier: BSD-3-Clause
"""What a name says of its tensor, where nothing else is known: masks, labels, weights, steps."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LOSS = re.compile(r"loss|nll|entropy|criterion", re.IGNORECASE)
_TABLE = """
mask: mask masks
number: w weight weights lambda lamb lam alpha beta gamma coef coeff scale factor rate ratio
number: prob p num n use has is with no do apply
about: token tokens id ids idx index loss losses logit logits head pred preds prediction ratio prob
about: probs probability p weight weights w scale coef coeff coefficient factor lambda lamb lam
about: alpha beta gamma rate lr sum count num n total len length size mean avg value val type path
about: file name fn func use has is with do no apply enable flag penalty reg dice iou bce ce kl l
about: embed embedding emb feature features per frac fraction norm denom denominator
labels: labels targets ids tokens inputs
label: label target tgt trg y gt
padding: pad padding ignore ignored eos bos
time: step epoch iter iteration progress warmup phase stage
scalar: steps epochs iters iterations rank world max min num n len length size count coef coeff lr
scalar: temperature threshold
settings: cfg config conf args opt opts options hparams settings
unlabelled: domain name type kind class path weight smoothing seen processed consumed total limit
unlabelled: budget
auxiliary: aux auxiliary balance balancing router moe reg vq commitment
one: key name task head layer level i j k n
coefficient: lambda lamb lam alpha beta gamma coef coeff coefficient scale rate ratio
sequence: attention attn att length lengths len lens seq sequence pad padding src key
view: view reshape flatten squeeze unsqueeze contiguous float double half bfloat16 long int bool to
view: type type_as cpu cuda clone detach requires_grad view_as expand expand_as ravel byte
view: transpose permute t masked_fill ne eq ge gt le lt logical_not repeat
shape: view reshape flatten squeeze unsqueeze view_as ravel transpose permute t
"""
_KINDS: dict[str, set[str]] = {}
for _kind, _words in re.findall("(.+): (.+)", _TABLE):
    _KINDS.setdefault(_kind, set()).update(_words.split())
VIEWS = _KINDS["view"]  # methods that leave a tensor the same for our purpose
SHAPES = _KINDS["shape"]
_NOT_LABELS = _KINDS["scalar"] | _KINDS["time"] | _KINDS["unlabelled"]


@lru_cache(maxsize=65536)
def words(name: str) -> tuple[str, ...]:
    """The words of a snake_case or CamelCase name, lower case."""
    return tuple(word.lower() for word in _WORDS.findall(name))


def _has(found: tuple[str, ...], *kinds: str) -> bool:
    return any(not _KINDS[kind].isdisjoint(found) for kind in kinds)


def is_loss(name: str) -> bool:
    return _LOSS.search(name) is not None


def last_name(node: ast.expr) -> str:
    """The name that speaks for an expression: c of a.b.c, "m" of batch["m"], x of x.view(-1)."""
    while True:
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name
            case ast.Subscript(slice=ast.Constant(value=str(name))):
                return name
            case ast.Subscript() if slices_time(node.slice):
                node = node.value
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                return name
            case ast.Call(func=ast.Attribute(attr=name)) if name in VIEWS:
                node = node.func.value  # type: ignore[attr-defined]
            case ast.UnaryOp(op=ast.Invert()):
                node = node.operand
            case _:
                return ""


def last_words(node: ast.expr) -> tuple[str, ...]:
    return words(last_name(node))


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
    found = last_words(node)
    if not _has(found, "mask"):
        return False
    return not _has(found, "number" if found[-1] in _KINDS["mask"] else "about")


def is_labels(node: ast.expr) -> bool:
    found = last_words(node)
    return _has(found, "label", "labels") and _NOT_LABELS.isdisjoint(found)


def compares_labels(labels: ast.expr, other: ast.expr) -> bool:
    """True for labels > 0 and target != pad_id; `target == 1` may be the label of one sample."""
    negative = isinstance(other, ast.UnaryOp) and isinstance(other.operand, ast.Constant)
    padding = negative or _has(last_words(other), "padding")
    return is_labels(labels) and (padding or _has(last_words(labels), "labels"))


def is_scalar(node: ast.expr) -> bool:
    """True for epoch, cfg.mask, step / 100, and for mask_coef: a number about a mask."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    if isinstance(node, (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare)):
        return all(is_scalar(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr))
    found = last_words(node)
    if isinstance(node, ast.Call) and not found:  # a schedule, np.exp(-step)
        return bool(node.args) and all(map(_is_time, node.args))
    if isinstance(node, ast.Attribute) and _has(last_words(node.value), "settings"):
        return True
    return _has(found, "scalar", "time") or (_has(found, "mask") and not is_mask(node))


def _is_time(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_time(node.operand)
    if isinstance(node, ast.BinOp):
        return is_scalar(node) and (_is_time(node.left) or _is_time(node.right))
    return _has(last_words(node), "time")


def is_auxiliary(node: ast.expr) -> bool:
    """True for aux_loss, 0.01 * out.router_loss: losses that are one number for the whole model."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        operands = node.left, node.right
        return any(map(is_auxiliary, operands)) and not any(map(is_mask, operands))
    found = last_words(node)
    return not {"loss", "losses"}.isdisjoint(found) and _has(found, "auxiliary")


def is_accumulation(node: ast.expr) -> bool:
    """True for gradient_accumulation_steps, cfg.accum, self.grad_accum_steps."""
    return re.search("accum|micro|iter_size|grad(ient)?_acc", last_name(node).lower()) is not None


def is_coefficient(node: ast.expr) -> bool:
    """True for alpha, self.ce_weight, loss_weight, cfg.scale: one number that scales a loss."""
    if isinstance(node, ast.Subscript) and _has(last_words(node.slice), "one"):
        return True  # weights[key]
    found = last_words(node)
    on_self = isinstance(node, ast.Attribute) and last_name(node.value) == "self"
    scales = "weight" in found and (on_self or "loss" in found)
    return scales or _has(found, "coefficient") or is_scalar(node)


def is_never_empty(name: str) -> bool:
    """True for attention_mask, src_pad_mask, sequence_mask(lengths): a sequence has a token."""
    return _has(words(name), "sequence")


def text(node: ast.AST) -> str:
    """The source of an expression, "" where it is nested too deeply to be written out."""
    if isinstance(node, ast.Name):
        return node.id
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
