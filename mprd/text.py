"""Names are bytes: text of files in any encoding, and file names that no encoding fits.

Inside, a name is a `str` in which undecodable bytes are surrogates (PEP 383), as Python makes of arguments and folders.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mprd.errors import UserError
from mprd.storage.places import place_of, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# of UTF-32 before UTF-16, whose mark it begins with
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPE = re.compile(r"\\udc([0-9a-f]{2})")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def read_text(path: Path) -> str:
    """Read a text file as UTF-8, or by its byte order mark; bytes that are not UTF-8 become surrogates.

    Raises OSError, and UserError for a file that is not text.
    """
    raw = path.read_bytes()
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding, errors="surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: not text (or saved in another encoding than UTF-8)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def to_unicode(name: str) -> str:
    r"""Return a name that every program can read, with undecodable bytes as `\udcXX`; `from_unicode` undoes it."""
    # a name may hold such an escape itself
    name = ESCAPE.sub(r"\\udc5cudc\1", name)
    return SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", name)


def from_unicode(text: str) -> str:
    """Undo `to_unicode`."""
    return ESCAPE.sub(lambda match: "\\" if match[1] == "5c" else chr(0xDC00 + int(match[1], 16)), text)


def quoted(path: Path) -> str:
    """Return a path as a shell takes it, for a command in a message."""
    return shlex.quote(place_of(path))


def one_line(text: str) -> str:
    """Return text for a terminal: in one line, without control characters and undecodable bytes, URLs by name."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], shown(text))


def explain(error: UserError | OSError | UnicodeEncodeError) -> str:
    """Return an error in words, with the file where the system names one."""
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object}: not UTF-8, which is needed here; rename it"
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(str(error).split("\n"))
    return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"


def new_console(**options: Any) -> Console:
    """Return a console that prints names as they are, `[red]` and `:smile:` are no markup, and URLs by name."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(shown(text), **options)

    return Plain(markup=False, emoji=False, **options)
