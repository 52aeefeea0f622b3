"""Which block of the key/value cache holds what: free, in use, or kept for the next one who needs the same tokens.

A block of tokens is known by what it holds and by what goes before it: (serial of the block before, its tokens). The
first block of a prompt follows the serial of its character, since keys and values depend on the character's channels.
Prompts that begin alike therefore share blocks: those of a character its prompt, the turns of a conversation all that
was said before. Blocks that nobody uses stay known until their room is needed, the least recently used go first.
"""

from collections import OrderedDict
from collections.abc import Hashable
from itertools import count

_serials = count(1)  # never given twice, so that a block which follows a forgotten one is never found again


def new_serial() -> int:
    """A name for a sequence's start that no other sequence has."""
    return next(_serials)


class Blocks:
    """`total` blocks, numbered 0 .. total - 1.

    `writer` of a known block: who will fill it, None when it is filled or given up.
    """

    def __init__(self, total: int):
        self.total = total
        self.filled = [False] * total
        self.writer: list[object | None] = [None] * total
        self.serial = [0] * total
        self._users = [0] * total
        self._key: list[Hashable | None] = [None] * total
        self._known: dict[Hashable, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and used by nobody, least recently used first
        self._free = list(range(total))[::-1]

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def known_idle(self) -> int:
        """Blocks that nobody uses and that are kept in case someone will."""
        return len(self._idle)

    def find(self, parent: int, tokens: tuple[int, ...]) -> int | None:
        """The block that holds these tokens after that parent."""
        return self._known.get((parent, tokens))

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def hold(self, block: int) -> None:
        """One user more of a known block."""
        self._users[block] += 1
        self._idle.pop(block, None)

    def take(self) -> int:
        """An empty block. The caller has seen that one is available."""
        if not self._free:
            self._forget(next(iter(self._idle)))
        block = self._free.pop()
        self._users[block] = 1
        return block

    def name(self, block: int, parent: int, tokens: tuple[int, ...], writer: object | None) -> None:
        """Makes a block known by its content, which `writer` will fill (None: it is there)."""
        self._key[block], self.serial[block] = (parent, tokens), new_serial()
        self._known[parent, tokens] = block
        self.writer[block], self.filled[block] = writer, writer is None

    def release(self, table: list[int], user: object) -> None:
        """`user` needs these blocks, in the order of its tokens, no more."""
        for block in reversed(table):  # so that the end of a text is forgotten before its beginning
            self._users[block] -= 1
            if self.writer[block] is user:
                self.writer[block] = None
            if self._users[block] == 0:
                if self.filled[block] and self._key[block]:
                    self._idle[block] = None
                else:
                    self._forget(block)

    def forget(self, root: int) -> None:
        """Nothing that begins with this serial is found again."""
        for (parent, _), block in list(self._known.items()):
            if parent == root:
                del self._known[self._key[block]]
                self._key[block] = None
                if block in self._idle:
                    self._forget(block)

    def _forget(self, block: int) -> None:
        self._known.pop(self._key[block], None)
        self._key[block], self.filled[block], self.writer[block] = None, False, None
        self._idle.pop(block, None)
        self._free.append(block)
