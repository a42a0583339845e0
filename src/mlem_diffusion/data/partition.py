"""CelebA's list of parts, list_eval_partition: which images are for training, for validation and for tests."""

import codecs
import csv
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress

from ..errors import UserError

_PART = re.compile(r"[012](\.0*)?")  # pandas writes 0.0 for a column with gaps


def parts_of(names: list[str], content: bytes, label: str) -> list[int]:
    """The part (0 train, 1 valid, 2 test) of each image; empty if the list, called `label`, has none of them.

    Names are matched without extension, from their end, and without case if need be. UserError for a list without
    entries, or with only some of the images."""
    exact: dict[str, int] = {}  # one bit for each part that a name has in the list
    loose: dict[str, int] = {}
    cure = "fetch it again, or remove it for a seeded split"
    with suppress(csv.Error, UnicodeError):
        for name, part in [*_entries(content)]:  # all of it can be read
            for key in _keys(name):
                exact[key] = exact.get(key, 0) | 1 << part
                loose[key.casefold()] = loose.get(key.casefold(), 0) | 1 << part
    if not exact:
        text = f"{label} has no line with a name and a part (0 train, 1 valid, 2 test), such as `000001.jpg 0`"
        raise UserError(f"{text}: {cure}.")
    found = []
    for name in names:
        bits = next((bits for key in _keys(name) if (bits := exact.get(key) or loose.get(key.casefold()))), 0)
        if bits not in (0, 1, 2, 4):
            raise UserError(f"{label} gives {name!r} more than one part: list it once, with its folder.")
        found.append(bits.bit_length() - 1)
    if -1 not in found or max(found) == -1:
        return [part for part in found if part >= 0]
    text = f"{label} has only {len(names) - found.count(-1)} of {len(names)} images"
    raise UserError(f"{text} (not {names[found.index(-1)]!r}): {cure}.")


def _entries(content: bytes) -> Iterator[tuple[str, int]]:
    """Name and part of each line that has both, in a list separated by spaces or in a table, with or without index."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16") if utf16 else content.decode("utf-8-sig", "surrogateescape")
    lines = text.splitlines()
    delimiter = next((sign for sign in "\t;," if 2 * text.count(sign) >= len(lines)), " ")
    for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True):
        fields = [field for text in row if (field := text.strip(" \t'"))]
        end = next((i for i in range(1, len(fields)) if _PART.fullmatch(fields[i])), 0)
        start = int(end > 1 and re.fullmatch(r"\d+(\.0*)?", fields[0]) is not None)  # after an index
        if end:
            yield " ".join(fields[start:end]), int(fields[end][0])


def _keys(name: str) -> list[str]:
    """The name without extension: with all folders, then with fewer. Composed: macOS splits letters from accents."""
    parts = unicodedata.normalize("NFC", name.replace("\\", "/")).split("/")
    parts[-1] = parts[-1].rpartition(".")[0] or parts[-1]
    return ["/".join(parts[i:]) for i in range(len(parts))]
