"""Hooks of mkdocs.yml: pages of docs/ link to files of the repository, and the site holds those files.

`../LOG.md` and `../CONTRIBUTING.md` become pages; another linked file is copied below repository/; a link to a folder
becomes its text.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("LOG.md", "CONTRIBUTING.md")  # beside docs/
LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s#:]+)(#[^)]*)?\)")


def on_files(files, config):
    """Add the pages of the root, and every file that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    pages = [(ROOT / "docs", page) for page in (ROOT / "docs").glob("*.md")] + [(ROOT, ROOT / name) for name in PAGES]
    targets = {
        (folder / link).resolve()
        for folder, page in pages
        for _, link, _ in LINK.findall(page.read_text(encoding="utf-8"))
    }
    for target in sorted(targets):
        if target.is_file() and not target.is_relative_to(ROOT / "docs") and target not in map(ROOT.joinpath, PAGES):
            name = target.relative_to(ROOT).as_posix()
            files.append(File.generated(config, f"repository/{name}", abs_src_path=str(target)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links as they lead within the site."""
    folder = ROOT if page.file.src_uri in PAGES else ROOT / "docs"

    def within_site(found: re.Match) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        target = (folder / link).resolve()
        if not target.exists():
            return found[0]  # strict mode names it
        if target.is_dir():
            return text
        name = target.relative_to(ROOT).as_posix()
        place = name.removeprefix("docs/") if name.startswith("docs/") or name in PAGES else f"repository/{name}"
        return f"[{text}]({place}{anchor})"

    return LINK.sub(within_site, markdown)
