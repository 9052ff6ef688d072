"""A screen that understands the few control sequences the status line uses, with a scroll region, as terminals do.

Anything it does not know fails the test: the status line has no business sending it.
"""

import re

_SEQUENCE = re.compile(r"\x1b\[(?P<numbers>[\d;]*)(?P<letter>[A-Za-z])|\x1b(?P<short>[78])")


class Screen:
    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.lines = [[" "] * columns for _ in range(rows)]
        self.row = self.column = 0
        self.saved = (0, 0)
        self.top, self.bottom = 0, rows - 1
        self.scrolled_off: list[str] = []

    def text(self, row: int) -> str:
        return "".join(self.lines[row]).rstrip()

    @property
    def shown(self) -> list[str]:
        return [self.text(row) for row in range(self.rows)]

    @property
    def scrolls_whole(self) -> bool:
        return (self.top, self.bottom) == (0, self.rows - 1)

    def resize(self, rows: int, columns: int) -> None:
        """Cut or extend at the bottom and the right; the region is reset, as in common terminals."""
        lines = [(line + [" "] * columns)[:columns] for line in self.lines]
        self.lines = (lines + [[" "] * columns for _ in range(rows)])[:rows]
        self.rows, self.columns = rows, columns
        self.top, self.bottom = 0, rows - 1
        self.row, self.column = min(self.row, rows - 1), min(self.column, columns - 1)

    def feed(self, text: str) -> None:
        position = 0
        while position < len(text):
            match = _SEQUENCE.match(text, position)
            if match:
                position = match.end()
                self._control(match)
            else:
                self._letter(text[position])
                position += 1

    def _letter(self, letter: str) -> None:
        if letter == "\n":
            self._line_feed()
        elif letter == "\r":
            self.column = 0
        else:
            assert letter.isprintable(), f"unexpected {letter!r}"
            if self.column == self.columns:
                self.column = 0
                self._line_feed()
            self.lines[self.row][self.column] = letter
            self.column += 1

    def _line_feed(self) -> None:
        if self.row == self.bottom:
            self.scrolled_off.append("".join(self.lines.pop(self.top)).rstrip())
            self.lines.insert(self.bottom, [" "] * self.columns)
        elif self.row < self.rows - 1:
            self.row += 1

    def _control(self, match: re.Match[str]) -> None:
        numbers = [int(number or 0) for number in (match["numbers"] or "").split(";")]
        match match["short"] or match["letter"]:
            case "7":
                self.saved = (self.row, self.column)
            case "8":
                self.row, self.column = self.saved
            case "r":
                self.top = (numbers[0] or 1) - 1
                self.bottom = (numbers[1] if len(numbers) > 1 else self.rows) - 1
                self.row = self.column = 0
            case "H":
                self.row = min(numbers[0], self.rows) - 1
                self.column = min(numbers[1], self.columns) - 1
            case "A":
                self.row = max(self.row - numbers[0], self.top if self.row >= self.top else 0)
            case "K":
                first = 0 if numbers[0] == 2 else self.column
                self.lines[self.row][first:] = [" "] * (self.columns - first)
            case "m":
                pass
            case other:
                raise AssertionError(f"unexpected sequence {other!r}")
