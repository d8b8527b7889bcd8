"""What `find_groups` returns: a list that shows itself as a table."""

from __future__ import annotations

from html import escape

from ..structure import Group
from ..tables import aligned


class Groups(list[Group]):
    """Groups of a model, in layer order; printed, a table of them."""

    def table(self) -> str:
        """Return a line for each group, as a Markdown table that is aligned for plain text."""
        lines = [(group.name, group.kind, f"{group.units:,}") for group in self]
        return "\n".join(aligned([("group", "kind", "units"), *lines]))

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Show the table in a notebook's cell."""
        return f"<pre>{escape(self.table())}</pre>"
