# SPDX-License-Identifier: BSD-3-Clause
"""Lets the trainers of a MiniMind checkout use masked_loss, and takes it back.

    python examples/minimind/apply.py ../minimind              # shows the changes, writes nothing
    python examples/minimind/apply.py ../minimind --write
    python examples/minimind/apply.py ../minimind --revert

Pretraining, full SFT, LoRA, DPO, PPO, GRPO and the agent trainer get one line after each model is
made: fuse_linear_loss. Distillation compares logits: its cross entropy becomes
masked_cross_entropy, its divergence masked_divergence. The places are found in the syntax tree, by
what the code does; a trainer that has no such place is reported and left as it is, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from pathlib import Path

MARK = "  # masked_loss"
FUSED = (
    "train_pretrain.py",
    "train_full_sft.py",
    "train_lora.py",
    "train_dpo.py",
    "train_ppo.py",
    "train_grpo.py",
    "train_agent.py",
)
MASKED = ("train_distillation.py",)


class NotFoundError(Exception):
    """The code has no place for the change."""


def import_line(tree: ast.Module) -> int:
    """The line after which `import masked_loss` goes: the last top-level import of torch."""
    lines = [
        node.end_lineno or node.lineno
        for node in tree.body
        if isinstance(node, ast.Import) and any(a.name.split(".")[0] == "torch" for a in node.names)
    ]
    if not lines:
        raise NotFoundError("no top-level `import torch`")
    return lines[-1]


def calls(node: ast.AST, name: str) -> bool:
    """Whether a node is a call of `name` or of `something.name`."""
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    return getattr(function, "id", None) == name or getattr(function, "attr", None) == name


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


def fuse(source: str) -> str:
    """One line after each assignment from init_model(): `model, ... = init_model(...)`."""
    tree = ast.parse(source)
    made = [
        (node.end_lineno or node.lineno, node.col_offset, node.targets[0].elts[0].id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and calls(node.value, "init_model")
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.targets[0].elts[0], ast.Name)
    ]
    if not made:
        raise NotFoundError("no `model, ... = init_model(...)`")
    lines = source.splitlines(keepends=True)
    for line, indent, model in sorted(made, reverse=True):
        new = f"{' ' * indent}{model} = masked_loss.fuse_linear_loss({model}){MARK}\n"
        lines.insert(line, new)
    lines.insert(import_line(tree), f"import masked_loss{MARK}\n")
    return "".join(lines)


def viewed(node: ast.expr) -> ast.expr:
    """x of `x.view(...)` or `x.reshape(...)`, else the node."""
    views = ("view", "reshape", "flatten")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.value if node.func.attr in views else node
    return node


def mask(source: str) -> str:
    """Makes one call of `per_token = F.cross_entropy(...)`, `loss = sum(per_token * mask) / ...`.

    The first statement goes, the second becomes masked_cross_entropy.
    """
    tree = ast.parse(source)
    for block in ast.walk(tree):
        body = getattr(block, "body", None)
        for at, first in enumerate(body if isinstance(body, list) else []):
            if not (
                isinstance(first, ast.Assign)
                and isinstance(first.value, ast.Call)
                and calls(first.value, "cross_entropy")
                and keyword(first.value, "reduction") == "none"
                and isinstance(first.targets[0], ast.Name)
            ):
                continue
            per_token = first.targets[0].id
            for second in body[at + 1 :]:
                product = masked_product(second, per_token)
                if product is None:
                    continue
                logits, target = (viewed(a) for a in first.value.args[:2])
                arguments = [ast.unparse(logits), ast.unparse(target)]
                arguments.append(f"{product}.view_as({arguments[1]})")
                ignored = keyword(first.value, "ignore_index")
                if ignored not in (None, -100):
                    arguments.append(f"ignore_index={ignored}")
                name = ast.unparse(second.targets[0])
                call = f"masked_loss.masked_cross_entropy({', '.join(arguments)})"
                lines = source.splitlines(keepends=True)
                indent = " " * second.col_offset
                lines[second.lineno - 1 : second.end_lineno] = [f"{indent}{name} = {call}{MARK}\n"]
                del lines[first.lineno - 1 : first.end_lineno]
                lines.insert(import_line(tree), f"import masked_loss{MARK}\n")
                return "".join(lines)
    raise NotFoundError('no `F.cross_entropy(..., reduction="none")` whose result meets a mask')


def masked_product(node: ast.stmt, per_token: str) -> str | None:
    """The mask m of a statement `loss = sum(per_token * m) / ...`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.BinOp):
        return None
    if not isinstance(node.value.op, ast.Div):
        return None
    for inner in ast.walk(node.value.left):
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Mult):
            sides = [ast.unparse(side) for side in (inner.left, inner.right)]
            if per_token in sides:
                sides.remove(per_token)
                return sides[0]
    return None


def diverge(source: str) -> str:
    """Makes masked_divergence of `d = distillation_loss(student[m == 1], teacher[m == 1], ...)`.

    distillation_loss is T^2 times the Kullback-Leibler divergence of the tokens that m selects.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not calls(node.value, "distillation_loss"):
            continue
        call = node.value
        assert isinstance(call, ast.Call)
        students = [selected(a) for a in call.args]
        temperature = next((k.value for k in call.keywords if k.arg == "temperature"), None)
        if len(students) != 2 or None in students or temperature is None:
            continue
        (student, chosen), (teacher, _) = students
        t, indent = ast.unparse(temperature), " " * node.col_offset
        mask = f"{chosen}.view({student}.shape[:-1])"
        new = (
            f"{indent}{ast.unparse(node.targets[0])} = {t} ** 2 * masked_loss.masked_divergence(\n"
            f"{indent}    {student}, {teacher}, {mask}, temperature={t}\n"
            f"{indent}){MARK}\n"
        )
        lines = source.splitlines(keepends=True)
        lines[node.lineno - 1 : node.end_lineno] = [new]
        return "".join(lines)
    raise NotFoundError("no `distillation_loss(x[mask == 1], y[mask == 1], temperature=...)`")


def selected(node: ast.expr) -> tuple[str, str] | None:
    """x and m of `x.view(...)[m == 1]`."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare):
        return ast.unparse(viewed(node.value)), ast.unparse(node.slice.left)
    return None


def change(name: str, source: str) -> str:
    return fuse(source) if name in FUSED else mask(diverge(source))


def revert(path: Path, kept: Path) -> bool:
    """Puts the original back, unless that would undo what somebody else has changed since."""
    written = change(path.name, kept.read_text(encoding="utf-8"))
    if path.exists() and path.read_text(encoding="utf-8") != written:
        return False
    kept.replace(path)
    print(f"{path.name}: as it was")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of MiniMind")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="change the files; keep *.orig")
    how.add_argument("--revert", action="store_true", help="put the *.orig files back")
    args = parser.parse_args()
    folder = args.checkout / "trainer"
    if not folder.is_dir():
        parser.error(f"{args.checkout} has no folder trainer/: not a checkout of MiniMind")

    status = 0
    for name in (*FUSED, *MASKED):
        path = folder / name
        kept = path.with_name(name + ".orig")
        if args.revert:
            if kept.exists() and not revert(path, kept):
                print(f"{name}: edited since, left; the original is {kept.name}", file=sys.stderr)
                status = 1
            continue
        if not path.exists():
            print(f"{name}: not there", file=sys.stderr)
            status = 1
            continue
        source = path.read_text(encoding="utf-8")
        if MARK in source:
            print(f"{name}: changed already")
            continue
        try:
            changed = change(name, source)
        except NotFoundError as error:
            print(f"{name}: not changed, {error}", file=sys.stderr)
            status = 1
            continue
        if args.write:
            kept.write_text(source, encoding="utf-8")
            path.write_text(changed, encoding="utf-8")
            print(f"{name}: changed, the original is {kept.name}")
        else:
            old, new = source.splitlines(keepends=True), changed.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(old, new, name, name, n=1))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
