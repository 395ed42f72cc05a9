"""A page of `report` or `explain --html`, as a browser reads it."""

from html.parser import HTMLParser
from pathlib import Path

SCRIPT = "<script>alert('1')</script>\" onload='x' &amp;"


class Page(HTMLParser):
    """What a browser makes of a page: its tags, the text between them, and the titles of tokens and marks."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self._open, self.titles = "", "", []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag
        if tag == "span" and "title" in dict(attributes):
            self.titles.append(dict(attributes)["title"])

    def handle_data(self, data):
        if self._open == "title":
            self.titles.append(data)
        elif self._open not in ("style", "script"):
            self.text += data

    def require_text(self, text: str) -> None:
        """It is shown as text, and no tag and no attribute of the page comes of it."""
        assert text in self.text
        names = [name for name, _ in self.tags]
        assert names.count("script") == 1 and not {"img", "iframe", "link", "a"} & {*names}
        assert not [key for _, attributes in self.tags for key in attributes if key.startswith("on")]
