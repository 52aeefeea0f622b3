"""Files that character cards come in: .json, .png (base64 of UTF-8 JSON in a text chunk: `ccv3` for V3, `chara` for V1
and V2) and .charx (a zip with card.json).

They are files from strangers: every size is bounded while reading, and whatever is wrong with one ends as an InputError
that names the file. What a card says is `Persona`'s business; here it is a JSON object.
"""

import base64
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persona_pruner import files
from persona_pruner.errors import InputError

CARD_SUFFIXES = (".json", ".png", ".charx")
MAX_CARD = 8 << 20  # bytes of card JSON, however it is wrapped
MAX_FILE = 64 << 20  # bytes of a .png or .charx
MAX_DEPTH = 64  # nested objects and arrays in the card
MAX_ZIP_ENTRIES = 10_000

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_V2_NOTE = "This is a Character Card V3 saved with a V2 copy; read it with a V3 application to see all of it."


def read_card(where: str) -> dict[str, Any]:
    """The JSON object that a .json, .png or .charx file holds. Raises InputError."""
    suffix = os.path.splitext(where)[1].lower()
    if suffix == ".json":
        blob = read_bytes(where, MAX_CARD)
    elif suffix == ".png":
        blob = _card_in_png(read_bytes(where, MAX_FILE), where)
    elif suffix == ".charx":
        blob = _card_in_zip(read_bytes(where, MAX_FILE), where)
    else:
        raise InputError(f"{where}: a card is a {', '.join(CARD_SUFFIXES)} file")
    return parse(blob, where)


def write_card(path: str | Path, card: dict[str, Any], image: bytes | None = None) -> None:
    """Writes a V3 card as .json, .png or .charx, whole or not at all; `image` is the PNG that carries it.

    Raises InputError for another suffix or a bad image, RunError if the file cannot be written.
    """
    path = Path(path)
    suffix, where = path.suffix.lower(), str(path)
    if suffix not in CARD_SUFFIXES:
        raise InputError(f"{where}: a card is saved as {', '.join(CARD_SUFFIXES)}")
    if image is not None and suffix != ".png":
        raise InputError(f"{where}: only a .png card carries an image")
    if suffix == ".json":
        blob = _dump(card, where, indent=2)
    elif suffix == ".png":
        data = {**card["data"], "creator_notes": f"{_V2_NOTE}\n{card['data']['creator_notes'] or ''}".strip()}
        v2 = {**card, "spec": "chara_card_v2", "spec_version": "2.0", "data": data}
        cards = {b"chara": _dump(v2, where), b"ccv3": _dump(card, where)}
        blob = _png_with_cards(_PIXEL if image is None else image, cards, where)
    else:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("card.json", _dump(card, where))
        blob = buffer.getvalue()
    files.write_file(path, lambda temporary: temporary.write_bytes(blob))


def parse(blob: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `blob`, no larger and no deeper than the limits."""
    if len(blob) > MAX_CARD:
        raise InputError(f"{where}: the card is larger than {MAX_CARD >> 20} MiB")
    try:
        card = json.loads(blob.decode("utf-8-sig"))
        json.dumps(card, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN and half surrogate pairs
    except ValueError as error:
        raise InputError(f"{where}: the card is not valid UTF-8 JSON ({error})") from None
    except RecursionError:
        raise InputError(f"{where}: the card is nested too deeply") from None
    if not isinstance(card, dict):
        raise InputError(f"{where}: the card must be a JSON object, not {type(card).__name__}")
    level: list[Any] = [card]
    for _ in range(MAX_DEPTH + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise InputError(f"{where}: the card is nested more than {MAX_DEPTH} deep")
    return card


def _dump(card: dict[str, Any], where: str, indent: int | None = None) -> bytes:
    separators = None if indent else (",", ":")
    blob = json.dumps(card, ensure_ascii=False, indent=indent, separators=separators).encode()
    if len(blob) > MAX_CARD:
        raise InputError(f"{where}: the card is larger than {MAX_CARD >> 20} MiB")
    return blob


def read_bytes(path: str, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            blob = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)  # read(n) allocates n bytes at once
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(blob) > limit:
        raise InputError(f"{path}: larger than {limit >> 20} MiB")
    return blob


def _chunks(png: bytes, where: str) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(type, body, whole chunk) up to and with IEND."""
    if not png.startswith(_PNG_SIGNATURE):
        raise InputError(f"{where}: not a PNG file")
    start = len(_PNG_SIGNATURE)
    while start + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        end = start + 12 + length
        if end > len(png):
            break
        yield kind, png[start + 8 : end - 4], png[start:end]
        if kind == b"IEND":
            return
        start = end
    raise InputError(f"{where}: the PNG is cut short")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _keyword(kind: bytes, body: bytes) -> bytes:
    """Lower-case keyword of a text chunk, b"" for any other chunk."""
    return body[:80].partition(b"\0")[0].lower() if kind in _TEXT_CHUNKS else b""


def _card_in_png(png: bytes, where: str) -> bytes:
    found: dict[bytes, tuple[bytes, bytes, bytes]] = {}
    for kind, body, whole in _chunks(png, where):
        found.setdefault(_keyword(kind, body), (kind, body, whole))
    keyword = b"ccv3" if b"ccv3" in found else b"chara"
    if keyword not in found:
        raise InputError(f"{where}: the PNG holds no character card (no ccv3 or chara text)")
    kind, body, whole = found[keyword]
    name = keyword.decode()
    if whole != _chunk(kind, body):
        raise InputError(f"{where}: the {name} chunk is damaged (its checksum is wrong)")
    text = body.partition(b"\0")[2]
    compressed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"zTXt":
        text = text[1:]  # compression method
    elif kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]  # flag and method, then language, translated keyword
    if compressed:
        text = _inflate(text, f"{where}: the {name} chunk")
    text = b"".join(text.split()).rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise InputError(f"{where}: the {name} chunk is not base64") from None


def _inflate(blob: bytes, what: str) -> bytes:
    stream, limit = zlib.decompressobj(), MAX_CARD * 3 // 2
    try:
        text = stream.decompress(blob, limit)
    except zlib.error:
        raise InputError(f"{what} does not decompress") from None
    if not stream.eof:
        raise InputError(f"{what} is cut short or decompresses to more than {limit >> 20} MiB")
    return text


def _card_in_zip(blob: bytes, where: str) -> bytes:
    # Each entry of the directory starts with these four bytes; zipfile would build an object for every one.
    if blob.count(b"PK\1\2") > MAX_ZIP_ENTRIES:
        raise InputError(f"{where}: the archive has more than {MAX_ZIP_ENTRIES} entries")
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            info = archive.getinfo("card.json")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile("card.json is compressed in an unusual way")
            with archive.open(info) as file:
                return file.read(MAX_CARD + 1)  # _parse refuses the one byte too many
    except Exception as error:  # zipfile has no closed list of what it raises on a broken archive
        raise InputError(f"{where}: no card.json can be read from the archive ({error})") from None


def _png_with_cards(image: bytes, cards: dict[bytes, bytes], where: str) -> bytes:
    texts = [_chunk(b"tEXt", keyword + b"\0" + base64.b64encode(card)) for keyword, card in cards.items()]
    kept = [whole for kind, body, whole in _chunks(image, f"{where}: image") if _keyword(kind, body) not in cards]
    if not kept or kept[0][4:8] != b"IHDR":
        raise InputError(f"{where}: the image is not a PNG (it does not start with IHDR)")
    blob = b"".join([_PNG_SIGNATURE, kept[0], *texts, *kept[1:]])  # before the pixels, where every reader looks
    if len(blob) > MAX_FILE:
        raise InputError(f"{where}: larger than {MAX_FILE >> 20} MiB")
    return blob


_PIXEL = (
    _PNG_SIGNATURE
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress(b"\0\x80"))
    + _chunk(b"IEND", b"")
)
