"""The characters of a fleet: which channels each keeps, what it is told about itself."""

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from persona_pruner.errors import InputError
from persona_pruner.fleet.blocks import new_serial
from persona_pruner.formats.persona_file import PersonaFile, pack_bits, unpack_bits

PARTS = 8  # ranges that subset_ffn cuts the channels of a layer into, for threads and far streams (kParts)
DENSE = ""  # the name of the base model itself: all channels, no prompt


def popular_first(kept: np.ndarray) -> np.ndarray:
    """int64 [C]: an order of the channels in which those with the highest number in `kept`, int64 [C], come first in
    each of PARTS ranges that have as much of everything."""
    order = np.argsort(-kept, kind="stable")
    return np.concatenate([order[part::PARTS] for part in range(PARTS)])


@dataclass(eq=False)
class Resident:
    """A character in memory; bits: the packed masks of all layers, or None for all channels."""

    name: str
    system: str = ""
    greeting: str = ""
    ratio: float = 1.0
    bits: bytes | None = None
    widths: tuple[int, ...] = ()
    serial: int = field(default_factory=new_serial)


class Characters:
    """The characters by name, the dense base model among them. widths: channels of the base's layers; fingerprint: of
    the base that files must have been made for, which is called `base`; lists: of how many the channels are kept
    unpacked, those lately used."""

    def __init__(self, widths: list[int], fingerprint: str, base: str, lists: int):
        self._widths, self._fingerprint, self._base, self._most = widths, fingerprint, base, lists
        self._place = [np.arange(width) for width in widths]  # where the decoder has each channel
        self._residents = {DENSE: Resident(DENSE, widths=tuple(widths))}
        self._channels: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._grouped: tuple = ()  # (serials, where lists begin, their lengths, channels) of those last asked for
        self._last: tuple = ()  # (serials and rows, channels, segments): what `segments` gave last

    def __len__(self) -> int:
        return len(self._residents) - 1

    def __getitem__(self, name: str) -> Resident:
        if name not in self._residents:
            raise InputError(f"there is no character {name!r}")
        return self._residents[name]

    def names(self) -> list[str]:
        """In the order in which they came; without the dense base model."""
        return [name for name in self._residents if name != DENSE]

    def add(self, name: str, file: PersonaFile) -> Resident | None:
        """In place of another of that name, which is returned. Raises InputError when the file is for another base."""
        if name == DENSE:
            raise InputError("the empty name is that of the base model")
        if file.fingerprint != self._fingerprint:
            raise InputError(
                f"persona {file.name!r} was made for {file.base} and does not fit {self._base}: "
                "config or weight shapes differ"
            )
        bits = b"".join(pack_bits(mask).numpy().tobytes() for mask in file.masks)
        share = sum(file.widths) / sum(self._widths)
        old = self._drop(name) if name in self._residents else None
        self._residents[name] = Resident(name, file.system, file.greeting, share, bits, tuple(file.widths))
        return old

    def remove(self, name: str) -> Resident:
        """Raises InputError for an unknown name."""
        if name == DENSE or name not in self._residents:
            raise InputError(f"there is no character {name!r} to remove")
        return self._drop(name)

    def _drop(self, name: str) -> Resident:
        old = self._residents.pop(name)
        self._channels.pop(old.serial, None)
        return old

    def arrange(self) -> list[Tensor]:
        """Plans the order of every layer's channels anew and says what the decoder is to do: at place i goes what is
        at moves[layer][i], int64 [C]."""
        bits = [one.bits for one in self._residents.values() if one.bits is not None]
        sizes = [-(-width // 8) for width in self._widths]
        packed = np.frombuffer(b"".join(bits), np.uint8).reshape(len(bits), sum(sizes))
        layers, moves = np.split(packed, np.cumsum(sizes)[:-1], axis=1), []
        for layer, (part, width) in enumerate(zip(layers, self._widths, strict=True)):
            kept = np.unpackbits(part, axis=1, count=width, bitorder="little").sum(0, dtype=np.int64)
            order = popular_first(kept)
            moves.append(torch.from_numpy(self._place[layer][order]))
            self._place[layer] = np.argsort(order)
        self._channels.clear()
        self._grouped = self._last = ()
        return moves

    def segments(self, rows: dict[Resident, int]) -> tuple[Tensor, Tensor]:
        """What subset_ffn needs for so many rows of each, in this order: the channels of all layers, int32, and for
        each layer the segments, int64 [layers, characters, 3]."""
        asked = tuple((one.serial, count) for one, count in rows.items())
        if self._last[:1] != (asked,):
            self._last = asked, *self._segments(rows)
        return self._last[1:]

    def _segments(self, rows: dict[Resident, int]) -> tuple[Tensor, Tensor]:
        serials = tuple(one.serial for one in rows)
        if self._grouped[:1] != (serials,):
            kept = [self._kept(one) for one in rows]
            offsets = np.cumsum([0, *(len(channels) for channels, _ in kept)])
            first = np.stack([begin[:-1] + offset for (_, begin), offset in zip(kept, offsets, strict=False)], 1)
            width = np.stack([np.diff(begin) for _, begin in kept], 1)
            channels = torch.from_numpy(np.concatenate([channels for channels, _ in kept]))
            self._grouped = serials, first, width, channels
        _, first, width, channels = self._grouped
        counts = np.broadcast_to(list(rows.values()), first.shape)
        return channels, torch.from_numpy(np.stack([counts, first, width], 2).astype(np.int64))

    def _kept(self, one: Resident) -> tuple[np.ndarray, np.ndarray]:
        """(channels of all layers int32, where each layer's begin [layers + 1])."""
        if one.serial not in self._channels:
            lists, start = [], 0
            for width in self._widths:
                if one.bits is None:
                    lists.append(np.arange(width, dtype=np.int32))
                    continue
                size = -(-width // 8)
                packed = torch.frombuffer(bytearray(one.bits[start : start + size]), dtype=torch.uint8)
                places = self._place[len(lists)][unpack_bits(packed, width).numpy()]
                lists.append(np.sort(places).astype(np.int32))
                start += size
            self._channels[one.serial] = np.concatenate(lists), np.cumsum([0, *map(len, lists)])
        self._channels.move_to_end(one.serial)
        while len(self._channels) > self._most:
            self._channels.popitem(last=False)
        return self._channels[one.serial]
