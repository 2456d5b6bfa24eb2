"""Pages of the documentation site whose text lives elsewhere in the repository; mkdocs calls this as a hook.

README, CHANGELOG and the like stay where people look for them. Here they become pages of the site, with their links
turned from paths in the repository to pages; what has no page (a folder, a script) loses its link and keeps its name.
The tour is a notebook and is shown without results, because building the site runs nothing.
"""

import html
import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "docs/tour.ipynb": "tour.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/RESULTS.md": "measurements.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```\s*$)", flags=re.MULTILINE | re.DOTALL)
LOADED = re.compile(r"<(?:script|img|iframe|source|video|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
PUBLIC = re.compile(r"<code>(\w+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of other files."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=notebook_text(text) if source.endswith(".ipynb") else text))
    return files


def notebook_text(text: str) -> str:
    """A notebook as Markdown: its text, and its code in fences."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    parts = [f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells]
    note = "This is [the notebook](tour.ipynb) as it stands, without results: open it to run it."
    return "\n\n".join([parts[0], note, *parts[1:]])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages; leaves what stands in code."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def relinked(link: re.Match[str]) -> str:
        mark, label, target, anchor = link.group(1), link.group(2), link.group(3), link.group(4) or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = None if path == source else PAGES.get(path)
        if to is None and path.startswith("docs/"):
            to = path.removeprefix("docs/")
        if to is None:
            # Whatever is neither a page nor in the repository stays as it is, and mkdocs complains about it.
            return label if (ROOT / path).exists() and path != source else link.group()
        return f"{mark}[{label}]({posixpath.relpath(to, posixpath.dirname(here) or '.')}{anchor})"

    return "".join(part if part.startswith("```") else LINK.sub(relinked, part) for part in FENCED.split(markdown))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links the public names that docstrings mention; mkdocs-autorefs finds where they are described."""
    if not page.file.src_uri.startswith("reference/"):
        return content
    return PUBLIC.sub(r'<autoref optional identifier="flux_ir.\1"><code>\1</code></autoref>', content)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Stops the build at a page that would load something from elsewhere."""
    if foreign := LOADED.findall(output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {html.unescape(', '.join(foreign))}")
    return output
