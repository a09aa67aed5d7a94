"""What a person sees of a notebook that runs in a terminal: its text, and one line that moves."""

import re
import shutil

TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x08")


def shown_text(data):
    """Text of a displayed object, {kind: content}; empty for a picture or an object without a text of its own."""
    if any(kind.startswith("image/") for kind in data):
        return ""
    text = data.get("text/markdown")
    if text is None:
        text = data.get("text/plain", "")
        return "" if re.fullmatch(r"<.*>", text, re.DOTALL) else text.rstrip()
    text = aligned(re.sub(r"\*\*|`|<[^<>\n]+>", "", text))
    return "\n".join(line.rstrip() for line in text.strip().split("\n"))


def aligned(text):
    """Markdown with the columns of its tables below each other."""
    lines = text.split("\n")
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    count = max(map(len, rows), default=0)
    widths = [max(len(row[n]) for row in rows if len(row) > n) for n in range(count)]
    rows = iter(rows)
    result = []
    for line in lines:
        if line.startswith("|"):
            row = next(rows)
            rule = all(set(cell) <= set("-:") for cell in row)
            cells = [
                "-" * width if rule else cell.ljust(width) for cell, width in zip(row, widths, strict=False)
            ]
            line = "  ".join(cells)
        result.append(line)
    return "\n".join(result)


class Screen:
    """Writes to `stream`.

    On a terminal, a live text is one line that is written over until its last state is shown in full; elsewhere only
    that last state is shown.
    """

    def __init__(self, stream):
        self.stream, self.terminal = stream, stream.isatty()
        self.name = self.text = None  # the live text
        self.settled = {}  # lines of live texts that were shown for good
        self.width = 0  # columns of the line that is to be written over
        self.rest = ""  # printed text that is no whole line yet

    def put(self, text):
        """Write text at once."""
        self.stream.write(text)
        self.stream.flush()

    def wipe(self):
        """Take the moving line away, or end an unfinished line of printed text."""
        if self.width:
            self.put("\r" + " " * self.width + "\r")
        elif self.rest:
            self.put("\n" if self.terminal else last_version(self.rest) + "\n")
        self.width, self.rest = 0, ""

    def say(self, text):
        """Show a text in lines of its own."""
        self.settle()
        self.put(text + "\n")

    def headings(self, markdown):
        """Show the headings in the text of a Markdown cell."""
        outside = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
        for heading in re.findall(r"^#{1,3} +(.+)$", outside, re.MULTILINE):
            self.say(f"\n\x1b[1m{heading}\x1b[0m" if self.terminal else f"\n{heading}")

    def write(self, text):
        """Show text that a cell prints, which may come in pieces and may write over its own line."""
        if not text:
            return
        if self.name is not None:
            self.settle()
        if self.terminal:
            self.put(text)
            self.rest = text.rsplit("\n", 1)[-1] if "\n" in text else self.rest + text
            return
        *lines, self.rest = (self.rest + text).split("\n")
        self.put("".join(last_version(line) + "\n" for line in lines))

    def move(self, name, text):
        """Show what the live text of that name has become; a live text before it is settled."""
        if name != self.name:
            self.settle()
        self.name, self.text = name, text
        if self.terminal:
            self.wipe()
            title, last = text.split("\n")[0].split(":")[0], text.rsplit("\n", 1)[-1]
            line = last if last.startswith(title) else f"{title}: {last}"
            line = line[: shutil.get_terminal_size().columns - 1]
            self.put(line)
            self.width = len(line)

    def settle(self):
        """Show the last state of a live text, without the lines that were shown before, and finish the line."""
        self.wipe()
        if self.name is not None:
            before = self.settled.setdefault(self.name, set())
            lines = [line for line in self.text.split("\n") if line not in before]
            self.put("".join(line + "\n" for line in lines))
            before.update(lines)
        self.name = self.text = None


def last_version(line):
    """What is left of a line that wrote over itself."""
    return TERMINAL_CODES.sub("", line.rstrip("\r").rsplit("\r", 1)[-1])
