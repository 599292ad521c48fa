"""CSV files as cells: the one reader of text tables, for the data of a fit and for every question about other rows.

Rows, columns and holes are those that pandas reads. A line is blank if it holds nothing but spaces; a line with a delimiter in
it is a row, also if all its cells are empty. What a file leaves open is not guessed: it is asked, in one line.

    header      a first line with text in it. A first line of numbers that looks like names (0, 1, 2; 2019, 2020, 2021) is asked
                for: `data.header`.
    index       leading columns without a name, as pandas and R write them, are no data.
    delimiter   the one of , ; and tab that divides all lines alike; `data.delimiter` where there are several, and for |.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elbowroom.data.columns import MISSING, Layout
from elbowroom.errors import DataError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "|"}
LOOK = 200  # rows that are looked at to find delimiter and header
EVEN = 4  # numbers at equal distances that look like names
YEAR = 1000  # two numbers from here on, such as 2019 and 2020, look like years
FEW_WHOLE = 0.01  # share of whole numbers in columns under names that are whole numbers
_EXCEL = re.compile(r'"?sep=([,;\t|])"?', re.IGNORECASE)
_NAMELESS = re.compile(r"Unnamed: \d+(_level_\d+)?")  # pandas calls a column without a name so


@dataclass(frozen=True)
class Table:
    """The text of a table, of which the first rows are known.

    Attributes:
        text: the file, with line ends of one character.
        label: name of the file in messages.
        delimiter: what stands between cells.
        names: of the columns, those of the index too; None without a header.
        skipped: lines before the first row.
        width: number of columns, with the index.
        index: number of leading columns that are an index.
    """

    text: str
    label: str
    delimiter: str
    names: tuple[str, ...] | None
    skipped: int
    width: int
    index: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are data: their positions 0, 1, ... without a header."""
        return tuple(map(str, range(self.width))) if self.names is None else self.names[self.index :]

    def notes(self) -> tuple[str, ...]:
        """Say what is in the file and not among the columns."""
        if not self.index:
            return ()
        what = (
            "the first column has no name and was"
            if self.index == 1
            else f"the first {self.index} columns have no names and were"
        )
        return (f"{what} taken for the index: not modelled",)

    def rows(self) -> tuple[list[list[str]], list[int]]:
        """Return the cells of all rows, without spaces around them, and the number of each row's last line, from 1.

        Raises:
            DataError: a row has another number of cells, or a quotation mark is not closed.
        """
        rows: list[list[str]] = []
        lines: list[int] = []
        reader = csv.reader(io.StringIO(self.text), delimiter=self.delimiter)
        try:
            for row in reader:
                if reader.line_num <= self.skipped or _blank(row):
                    continue
                if len(row) != self.width:
                    cells = f"{len(row)} cell{'s' * (len(row) != 1)}"
                    raise DataError(
                        f"{self.label}: line {reader.line_num} has {cells}, the lines before it have {self.width}; every line "
                        "needs the same"
                    )
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
        except csv.Error as error:
            raise DataError(f"{self.label}: not a CSV file: line {reader.line_num}: {error}") from None
        return rows, lines


def read(path: Path, label: str, layout: Layout) -> Table:
    """Find delimiter, header and index of a CSV file.

    Args:
        path: the file.
        label: its name in messages.
        layout: roles of the columns: a first line that holds their names is a header; header and delimiter where they are
            known.

    Raises:
        DataError: it is empty or no text in UTF-8, or delimiter, header or index can be understood in two ways.
    """
    text, tabs = _decoded(path, label), path.suffix.lower() == ".tsv"
    excel = _EXCEL.fullmatch(text.partition("\n")[0].strip())
    if excel:
        text = "\n" + text.partition("\n")[2]  # the numbers of lines stay as they are
    if not text.strip():
        raise DataError(f"{label}: empty")
    declared = None if layout.fitted else layout.delimiter
    delimiter = declared or (excel[1] if excel else "\t" if tabs else _delimiter(text, label, layout))
    look = _look(text, delimiter, label)
    first, others = look[0][1], [row for _, row in look[1:]]
    header = _is_header(first, others, layout, label)
    if header and not others:
        raise DataError(f"{label}: a header and no rows")
    if not header:
        if layout.x is None and not layout.fitted and len(first) > 1 and _counts([row[0] for row in (first, *others)]):
            names = ", ".join(f"'{i}'" for i in range(1, min(len(first), 4))) + ", ..." * (len(first) > 4)
            raise DataError(f"{label}: the first column counts the rows; leave it out: data.x: [{names}]")
        return Table(text, label, delimiter, None, 0, len(first), 0)
    return Table(text, label, delimiter, tuple(first), look[0][0], len(first), _index(first, layout, label))


def is_number(cell: str) -> bool:
    """Say whether a cell is a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _decoded(path: Path, label: str) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{label}: not a text file in UTF-8 (byte {error.start}); export it as UTF-8") from None
    if "\x00" in text:
        raise DataError(f"{label}: not a text file (it holds NUL characters)")
    return text


def _blank(row: Sequence[str]) -> bool:
    """Say whether a line holds nothing but spaces; an empty cell in quotation marks is a cell."""
    return not row or (len(row) == 1 and row[0].isspace())


def _look(text: str, delimiter: str, label: str) -> list[tuple[int, list[str]]]:
    """Return the first rows, without spaces around the cells, with the numbers of their last lines."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        found = ((reader.line_num, [cell.strip() for cell in row]) for row in reader if not _blank(row))
        return list(itertools.islice(found, LOOK))
    except csv.Error as error:
        raise DataError(f"{label}: not a CSV file: line {reader.line_num}: {error}") from None


def _delimiter(text: str, label: str, layout: Layout) -> str:
    """Return the delimiter that divides the first rows alike; where several do, that of the file of the fit."""
    widths: dict[str, set[int]] = {}
    for mark in DELIMITERS:
        with contextlib.suppress(DataError):
            widths[mark] = {len(row) for _, row in _look(text, mark, label)}
    even = [mark for mark, found in widths.items() if len(found) == 1 and max(found) > 1]
    if layout.fitted and layout.delimiter in even:
        return str(layout.delimiter)
    if len(even) > 1:
        one, other = (DELIMITERS[mark] for mark in even[:2])
        raise DataError(f"{label}: both {one} and {other} divide its lines; say which stands between cells: data.delimiter")
    if even == ["|"] and not layout.fitted:
        raise DataError(f"{label}: its cells seem to be separated by |; say so with data.delimiter: '|'")
    if even:
        return even[0]
    start = text.lstrip("\n").partition("\n")[0]
    mark = max(DELIMITERS, key=lambda mark: (start.count(mark), max(widths.get(mark, {0}))))
    if widths.get(mark) == {1}:
        _refuse_spaces([row[0].split() for _, row in _look(text, mark, label)], label)
    return mark


def _refuse_spaces(pieces: list[list[str]], label: str) -> None:
    """Refuse a table whose cells are separated by spaces."""
    width = len(pieces[0])
    if width > 1 and all(len(row) == width for row in pieces):
        below = pieces[1:] or pieces
        if any(all(is_number(row[i]) or row[i] in MISSING for row in below) for i in range(width)):
            raise DataError(
                f"{label}: one column, such as {' '.join(below[0])!r}: cells are separated by spaces; write commas, "
                "semicolons, tabs or | between them"
            )


def _is_header(first: list[str], others: list[list[str]], layout: Layout, label: str) -> bool:
    """Say whether the first row holds names."""
    if layout.header is not None and not layout.fitted:
        return layout.header
    wanted = {name for _, name in layout.wanted()}
    positions = {str(i) for i in range(len(first))}  # the names of columns without a header
    if wanted <= set(first) and (not wanted <= positions or (wanted and layout.header)):
        return True
    textual = [cell not in MISSING and not is_number(cell) for cell in first]
    if any(textual) and not _like_a_row(first, others):
        return True
    inner = list(itertools.dropwhile(lambda cell: not cell, first))
    if layout.fitted and layout.x is not None:
        return any(textual)
    if not any(textual) and not _like_names(inner, [row[-len(inner) :] for row in others]):
        return False
    default = inner == [str(i) for i in range(len(inner))]  # the names that pandas gives
    if len(inner) == len(first) - 1 and default and _counts([row[0] for row in others], least=1):
        return True  # pandas' own file, with its index
    if layout.fitted and layout.header is False and not (default and len(inner) >= 3):
        return False  # as in the file of the fit
    words = ", ".join(first[:3]) + ", ..." * (len(first) > 3)
    cure = (
        "write names with text in them, or save the rows as .npy" if layout.fitted else "say so with data.header: true or false"
    )
    raise DataError(f"{label}: line 1 ({words}) may hold the names of the columns or the first row; {cure}")


def _like_a_row(first: list[str], others: list[list[str]]) -> bool:
    """Say whether a row with text in it looks like data: a number that is no whole number, or a text that comes again below."""
    numbers = [cell for cell in first if cell not in MISSING and is_number(cell)]
    if any(not cell.isdigit() for cell in numbers) or (numbers and not _like_names(numbers, [])):
        return True
    return any(cell and any(row[i : i + 1] == [cell] for row in others) for i, cell in enumerate(first))


def _like_names(first: list[str], others: list[list[str]]) -> bool:
    """Say whether a row of numbers looks like names: 0, 1, 2; years; wavelengths; whole numbers above others that are not."""
    if not first or len(set(first)) < len(first) or any(len(row) != len(first) for row in others):
        return False
    if any(cell in MISSING for cell in first):
        return False
    whole = all(cell.isascii() and cell.isdigit() for cell in first)
    if len(first) == 1:
        return first == ["0"] or (not others and whole)
    steps = {round(float(b) - float(a), 9) for a, b in itertools.pairwise(first)}
    if len(steps) == 1 and max(steps) > 0:
        start = float(first[0])
        if len(first) >= EVEN or (whole and steps == {1.0} and (start == 0 or start >= YEAR or len(first) > 2)):
            return True
    columns = [[cell for cell in column if cell not in MISSING] for column in zip(*others, strict=False)]
    return (
        whole and bool(columns) and all(sum(cell.isdigit() for cell in column) < FEW_WHOLE * len(column) for column in columns)
    )


def _counts(cells: Sequence[str], least: int = 10) -> bool:
    """Say whether cells count the rows, from 0 or 1."""
    return len(cells) >= least and any(list(cells) == [str(i) for i in range(k, len(cells) + k)] for k in (0, 1))


def _index(names: list[str], layout: Layout, label: str) -> int:
    """Return the number of leading columns without a name."""
    index = next((i for i, name in enumerate(names) if name), len(names))
    named = names[index:]
    if not named:
        raise DataError(f"{label}: line 1 is a header without names; name the columns")
    if "" in named:
        at = index + named.index("") + 1
        where = "remove what separates cells at the ends of lines" if at == len(names) else "name it"
        raise DataError(f"{label}: column {at} has no name; {where}")
    if repeated := [name for name in named if named.count(name) > 1]:
        raise DataError(f"{label}: the column name {repeated[0]!r} appears twice in the header")
    old = [name for name in named if _NAMELESS.fullmatch(name)]
    if old and layout.x is None:
        raise DataError(
            f"{label}: column {old[0]!r} is an index that pandas has written; remove it (index=False of to_csv), or say with "
            "data.x which columns to model"
        )
    return index
