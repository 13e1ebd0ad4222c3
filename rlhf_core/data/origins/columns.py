"""Source and licence of the rows of a source: their own columns, or else the file and a setting.

A column `source` and a column `licence` (or `license`) are read if all of their values are names: a
line of at most 200 characters. Otherwise they mean something else, and a note says so. A column
that is mapped is always read, whatever its text; what is no text and no whole number is a bad row.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_core.data.origins.counts import Origin
from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.data.vote_details import UnlikeError
from rlhf_core.data.vote_details import name as read_name
from rlhf_core.data.vote_details import source as read_text
from rlhf_core.settings.fields import OF_ANY_ROW, TableKind

SPELT = {"licence": ("licence", "license"), "source": ("source",)}


class OddNameError(Exception):
    """A value that is no name; `place` is where it stands."""

    def __init__(self, place: str, error: UnlikeError) -> None:
        super().__init__(str(error))
        self.place, self.category = place, error.category


class OriginColumns:
    """Where the sources and licences of a source stand; `notes` is for its user.

    Args:
        find: the value of a row at a column or a dotted path.
        licence: of rows that name none.
    """

    def __init__(
        self,
        source: SourceRows,
        kind: TableKind,
        names: Mapping[str, str],
        find: Callable[[Row, str], Any],
        licence: str = "",
    ) -> None:
        self._find, self._licence = find, licence
        # Of votes the source is a detail like others, which is read, and noted, as one.
        fields = [field for field in OF_ANY_ROW if kind != "preferences" or field != "source"]
        self._mapped = {field: names[field] for field in fields if field in names}
        self.notes: list[str] = []
        self.places = dict(self._mapped)
        columns, taken = set(source.columns()), set(names.values())
        for field in fields:
            known = [place for place in SPELT[field] if place in columns and place not in taken]
            if field in names or not known:
                continue
            if odd := _first_odd(source, known[0]):
                number, reason = odd
                self.notes.append(
                    f"{source.source}, {source.unit} {number}, field '{known[0]}': {reason}, so "
                    f"the field is assumed to mean something else and is not read as the {field}; "
                    f"if it is that, map '{field}' in data.{kind}.fields"
                )
            else:
                self.places[field] = known[0]
        self._made: dict[tuple[str, str], Origin] = {}  # a source has millions of rows

    def of(self, row: Row, source: str) -> Origin:
        """Where a row comes from.

        Args:
            source: of a row that names none.

        Raises: OddNameError for a mapped field that has no name.
        """
        named = source, self._licence
        if self.places:
            own = {field: self._read(row, field) for field in self.places}
            named = own.get("source", "") or source, own.get("licence", "") or self._licence
        if named not in self._made:
            name, licence = named
            self._made[named] = Origin.of((name,), (licence,) if licence else ())
        return self._made[named]

    def _read(self, row: Row, field: str) -> str:
        place = self.places[field]
        try:
            # As of votes, a source that is mapped may be any text.
            return (read_text if field in self._mapped else read_name)(self._find(row, place))
        except UnlikeError as error:
            raise OddNameError(place, error) from error


def _first_odd(source: SourceRows, place: str) -> tuple[int, str] | None:
    for number, row in source.rows:
        try:
            read_name(row.get(place))
        except UnlikeError as error:
            return number, str(error)
    return None
