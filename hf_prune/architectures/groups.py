"""What `find_groups` returns: a list that shows itself as a table."""

from __future__ import annotations

from html import escape
from typing import Any, SupportsIndex, overload

from ..structure import Group
from ..tables import aligned


class Groups(list[Group]):
    """Groups of a model, in layer order; printed, a table of them, and so is a slice."""

    def table(self) -> str:
        """Return a line for each group, as a Markdown table that is aligned for plain text."""
        lines = [(group.name, group.kind, f"{group.units:,}") for group in self]
        return "\n".join(aligned([("group", "kind", "units"), *lines]))

    @overload
    def __getitem__(self, at: SupportsIndex) -> Group: ...

    @overload
    def __getitem__(self, at: slice) -> Groups: ...

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return Groups(found) if isinstance(at, slice) else found

    def __repr__(self) -> str:
        return self.table()

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Show the table in a notebook's cell."""
        return f"<pre>{escape(self.table())}</pre>"
