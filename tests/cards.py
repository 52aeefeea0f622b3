"""Character cards for tests: two samples, and the files that cards come in."""

import base64
import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from persona_pruner.errors import InputError
from persona_pruner.persona import Persona

CARDS = Path(__file__).parents[1] / "examples" / "cards"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
V1 = {
    "name": "Mira",
    "description": "{{char}} is a blacksmith who owes {{user}} a sword.",
    "personality": "gruff",
    "scenario": "A forge at dusk.",
    "first_mes": "Mind the sparks, {{user}}.",
    "mes_example": "<START>\n{{user}}: hi\n{{char}}: Hm.\n<start>\n{{user}}: bye\n{{char}}: Shut the door.",
}
V3 = {
    "spec": "chara_card_v3",
    "spec_version": "3.0",
    "unknown_top": {"kept": [1, None]},
    "data": {
        **V1,
        "nickname": "Smith",
        "system_prompt": "",
        "post_history_instructions": "Stay {{char}}.",
        "alternate_greetings": ["You again, <USER>."],
        "tags": ["fantasy"],
        "creator_notes": "notes",
        "extensions": {"other/app": {"x": 1}},
        "assets": [{"type": "icon", "uri": "ccdefault:", "name": "main", "ext": "png"}],
        "character_book": {"entries": [{"keys": ["sword"], "content": "It broke.", "extensions": {}}]},
        "from_the_future": "ünïcode 剣 🔥",
    },
}


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(b"\0\0")) + png_chunk(b"IEND", b"")


def text_chunk(keyword, card, kind=b"tEXt"):
    text = base64.b64encode(json.dumps(card).encode())
    if kind == b"zTXt":
        return png_chunk(kind, keyword + b"\0\0" + zlib.compress(text))
    if kind == b"iTXt":
        return png_chunk(kind, keyword + b"\0\0\0en\0Karte\0" + text)
    if kind == b"iTXt compressed":
        return png_chunk(b"iTXt", keyword + b"\0\1\0\0\0" + zlib.compress(text))
    return png_chunk(kind, keyword + b"\0" + text)


def text_keywords(blob):
    """Keywords of the text chunks in order, by an independent walk that checks every checksum."""
    found, start = [], 8
    while start < len(blob):
        end = start + 8 + int.from_bytes(blob[start : start + 4], "big")
        kind, body = blob[start + 4 : start + 8], blob[start + 8 : end]
        assert zlib.crc32(kind + body) == int.from_bytes(blob[end : end + 4], "big")
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            found.append(body.split(b"\0")[0])
        start = end + 4
    return found


def charx(card, name="card.json", compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, card if isinstance(card, bytes) else json.dumps(card))
    return buffer.getvalue()


def put(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def refused(path, problem):
    """Loading fails with one line that names the file and the problem."""
    with pytest.raises(InputError) as caught:
        Persona.load(path)
    message = str(caught.value)
    assert str(path) in message and problem in message and "\n" not in message
    assert message.count(str(path)) == 1
