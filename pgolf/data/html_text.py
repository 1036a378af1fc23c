"""The text that a page of HTML shows."""

import re
from html.parser import HTMLParser

HIDDEN = {"script", "style", "template", "noscript", "svg", "head"}  # elements whose text no reader sees
BLOCKS = {
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "figcaption", "figure", "footer",
    "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section",
    "table", "td", "th", "tr", "ul",
}  # fmt: skip


class _Text(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden, self.kept = [], [], 0  # kept: open <pre> elements, whose spaces count

    def handle_starttag(self, tag, attrs):
        self.kept += tag == "pre"
        if tag in HIDDEN:
            self.hidden.append(tag)
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.kept -= tag == "pre" and self.kept > 0
        if tag == "body":
            self.hidden.clear()
        if tag in self.hidden:  # with what was left open in it
            del self.hidden[self.hidden.index(tag) :]
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data if self.kept else re.sub(r"\s+", " ", data))


def text_of(page: str) -> str:
    """The text between the tags, blocks on lines of their own, no line blank; scripts, styles and the head left out."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = (line.rstrip() for line in "".join(parser.parts).split("\n"))
    return "\n".join(line if line.startswith("  ") else line.strip() for line in lines if line.strip())
