# SPDX-License-Identifier: BSD-3-Clause
"""What `make docs` adds to MkDocs: pages from all over the repository, and formulas.

The pages are those of docs/ and the files in PAGES, so that the site says what the repository says.
Links between them follow; a link to a file that is no page becomes its path, as text. Formulas are
turned into MathML when the site is built: a reader needs neither a script nor the network. A public
name that docs/api/ leaves out fails the build.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

# Files outside of docs/, and where the site has them.
PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh/index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "examples/minimind/README.md": "examples/minimind.md",
}
PICTURES = "benchmarks/results/*.png"
MODULES_OUTSIDE_ALL = ["masked_loss.integrations.transformers.causal_lm_loss"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for path in sorted(ROOT.glob(PICTURES)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


# Links


def source_of(page: str) -> str:
    """The file of the repository that a page of the site was made of."""
    return next((source for source, target in PAGES.items() if target == page), f"docs/{page}")


def page_of(source: str) -> str | None:
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return source if (ROOT / source).match(f"**/{PICTURES}") else None


def relinked(markdown: str, page: str) -> str:
    """``markdown`` with links that lead from ``page`` to where the site has what they name."""
    folder = posixpath.dirname(source_of(page))

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        if not target or re.match(
            r"[a-z]+:", target
        ):  # code, a link inside of the page or to the web
            return match[0]
        source = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / source).exists():
            raise PluginError(f"{source_of(page)}: the link to {target} leads nowhere")
        goal = page_of(source)
        if goal is None:
            return text if text.startswith("`") else f"{text} (`{source}`)"
        path = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return f"{image}[{text}]({path}{anchor})"

    fence, span = r"^ *```.*?^ *```", r"`[^`\n]+`"
    target = r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)"
    return re.sub(rf"{fence}|{target}|{span}", link, markdown, flags=re.S | re.M)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return relinked(markdown, page.file.src_uri)


# Formulas


def mathml(tex: str, display: str) -> str:
    return convert(html.unescape(tex).replace(r"\_", "_").strip(), display=display)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def block(match: re.Match[str]) -> str:
        return f'<div class="formula">{mathml(match[1], "block")}</div>'

    content = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', block, content, flags=re.S)
    return re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        lambda match: mathml(match[1], "inline"),
        content,
        flags=re.S,
    )


# Docstrings, which are reStructuredText where they have formulas, roles and examples


def markdown_of(docstring: str) -> str:
    docstring = re.sub(r":math:`([^`]*)`", lambda m: f"${' '.join(m[1].split())}$", docstring)
    docstring = re.sub(r":(?:func|class|mod|meth):`~?([\w.]+)`", role, docstring)
    docstring = re.sub(
        r"^( *)\.\. math::\n((?:\n|\1 +.*\n?)*)",
        lambda m: f"{m[1]}$$\n{re.sub('(?m)^ +', m[1], m[2]).strip()}\n{m[1]}$$\n\n",
        docstring,
        flags=re.M,
    )
    # An example is whatever begins with >>>, up to the next blank line.
    return re.sub(r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", docstring, flags=re.M)


def role(match: re.Match[str]) -> str:
    name = match[1]
    if name.startswith("masked_loss."):
        return f"[`{name.removeprefix('masked_loss.')}`][{name}]" if "._" not in name else name
    return f"[`{name}`][masked_loss.{name}]" if name in public_names() else f"`{name}`"


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)


# Completeness


def public_names() -> list[str]:
    tree = ast.parse((ROOT / "masked_loss" / "__init__.py").read_text())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )


def on_post_build(config: MkDocsConfig) -> None:
    text = "".join(path.read_text() for path in Path(config.site_dir, "api").rglob("*.html"))
    names = [f"masked_loss.{name}" for name in public_names()] + MODULES_OUTSIDE_ALL
    if missing := [name for name in names if f'id="{name}"' not in text]:
        raise PluginError(f"docs/api/ does not document {', '.join(missing)}")
    if "math-error" in text or "arithmatex" in text:
        raise PluginError("a formula was not rendered")
    pages = "".join(path.read_text() for path in Path(config.site_dir).rglob("*.html"))
    fetching = r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="?(https?:[^"> ]+)'
    if elsewhere := sorted(set(re.findall(fetching, pages))):
        raise PluginError(f"pages fetch {', '.join(elsewhere)}")
