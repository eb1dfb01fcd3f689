"""Reads a page of results back: its figures, its tables, and everything that it could load."""

from __future__ import annotations

from html.parser import HTMLParser


class Reader(HTMLParser):
    """Collects the figures, the exact numbers of each table, and everything that could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.exact: dict[str, list[float]] = {}
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self._table = self._row = self._cell = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        if named.get("id"):
            self.ids.append(str(named["id"]))
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            if named.get(name) and not str(named[name]).startswith("#"):
                self.loads.append(f"{tag} {name}={named[name]}")
        if tag == "figure" and "data-figure" in named:
            self.figures.append(str(named["id"]))
        if tag == "table":
            self._table = str(named["id"])
            self.rows[self._table], self.exact[self._table] = [], []
        if tag == "tr":
            self.rows[str(self._table)].append([])
        if tag in ("td", "th"):
            self.rows[str(self._table)][-1].append("")
            self._cell = tag
        if tag == "data" and self._table:
            self.exact[self._table].append(float(str(named["value"])))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[str(self._table)][-1][-1] += data

    def row(self, table: str, label: str) -> list[str]:
        """Return the cells of the row that starts with ``label``, without thin spaces."""
        found = [row for row in self.rows[table] if row[0].strip() == label]
        assert len(found) == 1, (label, self.rows[table])
        return [cell.replace("\u202f", "").strip() for cell in found[0][1:]]
