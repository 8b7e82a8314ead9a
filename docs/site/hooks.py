"""What the site has beyond docs/: the README as its home, and the results of benchmarks as pages.

Pages link to each other as they lie in the repository, so that a code host shows them, too. Here
such a link leads to where the page is on the site; of a link to what is no page its text stays.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
HOME, DOCS, RESULTS = ROOT / "README.md", ROOT / "docs", ROOT / "benchmarks" / "results"

_CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]*`)"
    r"|(?P<start>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def on_config(config: MkDocsConfig) -> None:
    """Give headings the anchors that a code host gives them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = _anchor


def _anchor(heading: str, separator: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what lies outside docs/."""
    for path in [HOME, *RESULTS.glob("*.md"), *RESULTS.glob("*.png")]:
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to where their targets are on the site."""
    source = Path(page.file.abs_src_path or "")

    def on_site(found: re.Match[str]) -> str:
        target = found["target"]
        if found["code"] or re.match(r"[a-z]+:|#", target):
            return found[0]
        file, mark, anchor = target.partition("#")
        path = Path(os.path.normpath(source.parent / file))
        if not path.is_relative_to(ROOT) or not path.exists():
            return found[0]  # for mkdocs to complain of
        if files.get_file_from_path(_place(path)) is None:
            return _named(found["text"], path.relative_to(ROOT).as_posix())
        place = os.path.relpath(_place(path), Path(page.file.src_uri).parent)
        return f"{found['start']}{place}{mark}{anchor})"

    return _CODE_OR_LINK.sub(on_site, markdown)


def _place(path: Path) -> str:
    """Where a file of the repository is on the site, if it is there."""
    if path == HOME:
        return "index.md"
    if path.parent == RESULTS:
        return f"results/{path.name}"
    return os.path.relpath(path, DOCS)


def _named(text: str, path: str) -> str:
    """The text of a link that leads nowhere, and the path unless that is the text."""
    return f"`{path}`" if text == path else f"{text} (`{path}`)"
