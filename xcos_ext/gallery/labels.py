"""What is known of a face beside its template: id, person and metadata, and their checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CHECKED_LABELS",
    "FILE_CHECKSUM",
    "LABELS",
    "canonical_json",
    "checked_labels",
    "checked_metadata",
    "checked_text",
    "file_checksum",
    "label_checksum",
]

LABELS = ("id", "person", "metadata")
#: All of them, for they have one checksum.
CHECKED_LABELS = (*LABELS, "label_checksum")

#: Key of a face's metadata: :func:`file_checksum` of the picture that it was enrolled from.
FILE_CHECKSUM = "file_xxh3"

_MOST_LEVELS = 100  # lists and mappings within each other that metadata may have


def canonical_json(value: Mapping[str, Any]) -> str:
    """JSON text that is the same whenever the value is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check_value(value: Any, where: str, level: int = 1) -> None:
    """Refuse what JSON as Lance stores it (64-bit integers) does not give back as it was."""
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        raise GalleryError(f"{where}: expected integers of at most 64 bits, got a larger one")
    if not isinstance(value, (Mapping, list, tuple)):
        return
    if level > _MOST_LEVELS:
        raise GalleryError(f"{where}: expected at most {_MOST_LEVELS} levels of lists and mappings, got more")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise GalleryError(f"{where}: expected text keys, got {type(key).__name__}")
        value = value.values()
    for one in value:
        _check_value(one, where, level + 1)


def checked_metadata(value: Any, where: str) -> str:
    """A face's metadata as canonical JSON text; None is the empty object. GalleryError for what JSON cannot hold."""
    if value is None:
        return "{}"
    if not isinstance(value, Mapping):
        raise GalleryError(f"{where}: expected a mapping with text keys, got {type(value).__name__}")
    _check_value(value, where)
    try:
        text = canonical_json(dict(value))
        text.encode()
    except (TypeError, ValueError) as error:
        raise GalleryError(f"{where}: expected values that JSON can hold ({error})") from error
    return text


def checked_text(value: Any, where: str) -> str:
    """A text that storage can hold: not empty, and without lone surrogates."""
    if not isinstance(value, str):
        raise GalleryError(f"{where}: expected text, got {type(value).__name__}")
    if not value:
        raise GalleryError(f"{where}: expected a text that is not empty, got ''")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise GalleryError(f"{where}: expected text that UTF-8 can encode, got {value!r}") from error
    return str(value)


def label_checksum(identity: str, person: str | None, metadata: str) -> int:
    """Checksum (xxh3, 64 bits) of a row's labels; ``metadata`` is canonical JSON."""
    state = gallery_package("xxhash").xxh3_64()
    for text in (identity, "" if person is None else "p" + person, metadata):
        data = text.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return int(state.intdigest())


def file_checksum(contents: bytes) -> str:
    """Checksum (xxh3, 128 bits, hexadecimal) of a picture's file: what tells that another has taken its place."""
    return str(gallery_package("xxhash").xxh3_128_hexdigest(contents))


def checked_labels(rows: pa.Table | pa.RecordBatch) -> tuple[dict[str, list[Any]], list[int]]:
    """Labels of rows with CHECKED_LABELS, metadata parsed, and the rows whose labels are not what was written."""
    texts = {name: _texts(rows.column(name)) for name in LABELS}
    found = {**texts, "metadata": []}
    wrong = []
    sums = rows.column("label_checksum").to_pylist()
    for row, (*labels, stored) in enumerate(zip(*texts.values(), sums, strict=True)):
        identity, person, metadata = labels
        parsed = None
        try:
            parsed = json.loads(metadata)
            # Lance writes numbers, and may one day order keys, in its own way.
            right = stored == label_checksum(identity, person, metadata) or stored == label_checksum(
                identity, person, canonical_json(parsed)
            )
        except (ValueError, AttributeError, TypeError, RecursionError):
            right = False
        if not right:
            wrong.append(row)
        found["metadata"].append(parsed)
    return found, wrong


def _texts(column: pa.Array | pa.ChunkedArray) -> list[str | None]:
    """Texts of a column; where damage has made them something else, signs that stand for its bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        pa = gallery_package("pyarrow")
        values = column.cast(pa.string()).cast(pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "backslashreplace") for value in values]
