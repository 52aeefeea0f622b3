"""Which requests are answered in a step, and where their keys and values lie.

A request is admitted, in the order of arrival, when the cache has room for its whole answer, so that none is ever
thrown out half-way. A step takes one token of every request whose prompt is done, and tokens of prompts up to a budget.
A prompt's blocks that are known (blocks.py) are not computed again, and a block that another request is just computing
is waited for.
"""

from collections import deque

import numpy as np

from persona_pruner.fleet.blocks import Blocks
from persona_pruner.fleet.requests import Request
from persona_pruner.ops.paged_attention import BLOCK

PROMPT_TOKENS = 128  # of prompts in a step, so that those being answered do not wait long for those that come


class Scheduler:
    """blocks: of the cache; max_rows: most requests answered at once; context: most tokens of one.

    tables: int32 [max_rows, W], the blocks of the request in each slot. computed, reused: tokens of prompts so far.
    """

    def __init__(self, blocks: int, max_rows: int, context: int):
        self.blocks = Blocks(blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.tables = np.zeros((max_rows, -(-context // BLOCK)), np.int32)
        self.computed, self.reused = 0, 0
        self._slots = list(range(max_rows))[::-1]

    @property
    def prefilling(self) -> int:
        """Running requests whose prompt is not in the cache yet."""
        return sum(request.done < request.prompt for request in self.running)

    def find(self, number: int) -> Request | None:
        return next((r for r in (*self.waiting, *self.running) if r.number == number), None)

    def leave(self, request: Request) -> None:
        """The request is done with, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self._slots.append(request.slot)
        self.blocks.release(request.table, request)

    def _admit(self, request: Request) -> bool:
        """Gives the request its blocks, those of its prompt that are known first; False when there are too few."""
        blocks, tokens = self.blocks, request.tokens
        parent, found = request.resident.serial, []
        request.parents = [parent]
        whole = (len(tokens) - 1) // BLOCK  # the last token is always computed, for its logits
        for index in range(whole):
            block = blocks.find(parent, request.block(index))
            if block is None:
                break
            parent = blocks.serial[block]
            found.append(block)
            request.parents.append(parent)
        need = -(-(request.most - 1) // BLOCK)
        if need - len(found) > blocks.available - sum(map(blocks.is_idle, found)):
            return False
        for block in found:
            blocks.hold(block)
        request.table = found + [blocks.take() for _ in range(need - len(found))]
        for index in range(len(found), whole):
            block = request.table[index]
            blocks.name(block, parent, request.block(index), request)
            parent = blocks.serial[block]
            request.parents.append(parent)
        request.slot = self._slots.pop()
        self.tables[request.slot, : len(request.table)] = request.table
        return True

    def plan(self) -> list[tuple[Request, int]]:
        """Admits whom it can; (request, new tokens) of this step, by character."""
        while self.waiting and self._slots and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        left, parts, here = PROMPT_TOKENS, [], set()
        for request in self.running:
            count = 1
            if request.done < request.prompt - 1 or not request.done:
                self._skip(request, here)
                count = self._ready(request, min(request.prompt - request.done, left), here)
                left -= count
            if count:
                parts.append((request, count))
                here.update(request.table[request.done // BLOCK : (request.done + count) // BLOCK])
        return sorted(parts, key=lambda part: part[0].resident.serial)

    def _skip(self, request: Request, here: set[int]) -> None:
        """Goes past blocks of the prompt that are filled, or will be by a request before it in this step."""
        blocks, whole = self.blocks, (request.prompt - 1) // BLOCK
        while request.done % BLOCK == 0 and (index := request.done // BLOCK) < whole:
            block = request.table[index]
            if not blocks.filled[block] and block not in here:
                break
            request.done += BLOCK
            self.reused += BLOCK

    def _ready(self, request: Request, most: int, here: set[int]) -> int:
        """How many tokens of the prompt can be computed now: up to a block that someone else is computing."""
        blocks, whole = self.blocks, (request.prompt - 1) // BLOCK
        for index in range(request.done // BLOCK, min(-(-(request.done + most) // BLOCK), whole)):
            block = request.table[index]
            if blocks.filled[block] or block in here or blocks.writer[block] not in (None, request):
                return max(0, min(most, index * BLOCK - request.done))
            blocks.writer[block] = request
        return most

    def written(self, request: Request, count: int) -> None:
        """The request's next tokens are in the cache; whole blocks of them are known from now on."""
        blocks = self.blocks
        before, request.done = request.done, request.done + count
        self.computed += max(0, min(request.done, request.prompt) - before)
        for index in range(before // BLOCK, request.done // BLOCK):
            block, parent = request.table[index], request.parents[index]
            if blocks.writer[block] is request:
                blocks.filled[block], blocks.writer[block] = True, None
            elif index + 1 == len(request.parents):  # tokens of the answer, or of the prompt's last block
                known = blocks.find(parent, request.block(index))
                if known is None:
                    blocks.name(block, parent, request.block(index), None)
                    known = block
                request.parents.append(blocks.serial[known])
