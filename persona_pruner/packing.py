"""Packed batches: questions of one persona share its prompt, which is computed once for all of them.

The prompt is most of the tokens of a question and its answer, so a pack holds the common prefix of its
examples once, then each example's own tokens; a mask lets an example see the prefix and itself only, and
positions continue from the prefix. No padding. [prefix | example 1 | example 2 | ...]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from persona_pruner.prefix_attention import PackLayout, prefix_attention, unused_mask


@dataclass(frozen=True)
class Example:
    """Token ids of a rendered prompt (ready for the answer) and of its answer, end of turn included if it came. `group`
    tells personas apart where examples of several are mixed: a pack holds those of one, whose prompt they share."""

    prompt: list[int]
    answer: list[int]
    group: int = 0


@dataclass(frozen=True)
class Pack:
    """One packed batch of T tokens, A of them predicting an answer token.

    input_ids, position_ids, segment: int64 [T] (segment 0 is the prefix); predict: int64 [A], the places whose
    output predicts `target`, int64 [A]; `rows` are the examples' numbers in the caller's list.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment: Tensor
    predict: Tensor
    target: Tensor
    rows: tuple[int, ...]

    def to(self, device) -> "Pack":
        fields = (self.input_ids, self.position_ids, self.segment, self.predict, self.target)
        return Pack(*(field.to(device) for field in fields), self.rows)


def _pack(examples: Sequence[Example], rows: Sequence[int], prefix: int) -> Pack:
    ids, positions, segment = list(examples[0].prompt[:prefix]), list(range(prefix)), [0] * prefix
    predict, target = [], []
    for number, example in enumerate(examples, 1):
        own = example.prompt[prefix:] + example.answer[:-1]
        first = len(ids) + len(example.prompt) - prefix - 1
        predict += range(first, first + len(example.answer))
        target += example.answer
        positions += range(prefix, prefix + len(own))
        segment += [number] * len(own)
        ids += own
    tensors = (torch.tensor(column, dtype=torch.long) for column in (ids, positions, segment, predict, target))
    return Pack(*tensors, rows=tuple(rows))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the common start of all sequences, at most one less than the shortest."""
    first, last = min(sequences), max(sequences)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, *(len(s) - 1 for s in sequences))


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return [i * count // most for i in range(most)] if most < count else list(range(count))


def pack(examples: Sequence[Example], budget: int = 1024, order: Sequence[int] | None = None) -> list[Pack]:
    """Packs of at most `budget` tokens each (one example more than fits is never cut: it gets its own pack).

    `order` is the order in which examples are taken; all in turn by default. The packs of several groups are spread
    evenly over the whole.
    Raises ValueError on an empty prompt.
    """
    if any(not example.prompt for example in examples):
        raise ValueError("an example has an empty prompt")
    groups: dict[int, list[int]] = {}
    for row in range(len(examples)) if order is None else order:
        groups.setdefault(examples[row].group, []).append(row)
    turns = []
    for group, rows in groups.items():
        packs = _pack_group(examples, group, rows, budget)
        turns += [((place + 0.5) / len(packs), batch) for place, batch in enumerate(packs)]
    return [batch for _, batch in sorted(turns, key=itemgetter(0))]


def _pack_group(examples: Sequence[Example], group: int, order: Sequence[int], budget: int) -> list[Pack]:
    prefix = common_prefix([example.prompt for example in examples if example.group == group])
    packs, rows, size = [], [], prefix
    for row in order:
        own = len(examples[row].prompt) - prefix + max(len(examples[row].answer) - 1, 0)
        if rows and size + own > budget:
            packs.append(_pack([examples[r] for r in rows], rows, prefix))
            rows, size = [], prefix
        rows.append(row)
        size += own
    return [*packs, _pack([examples[r] for r in rows], rows, prefix)]


def text_examples(sequences: Sequence[list[int]]) -> list[Example]:
    """Plain texts as examples to be mixed with a persona's: in a group of their own, every token after the first
    predicted."""
    return [Example(ids[:1], ids[1:], group=-1) for ids in sequences if len(ids) > 1]


def text_packs(sequences: Sequence[list[int]]) -> list[Pack]:
    """One pack for each plain text, every token after the first predicted."""
    return [_pack([Example(ids[:1], ids[1:])], [row], 0) for row, ids in enumerate(sequences) if len(ids) > 1]


def hidden_states(model: nn.Module, pack: Pack, **kwargs):
    """The decoder's output on a pack (transformers' output object; last_hidden_state is [1, T, hidden])."""
    decoder = model.get_decoder()
    with prefix_attention(decoder):
        return decoder(
            input_ids=pack.input_ids[None],
            position_ids=pack.position_ids[None],
            attention_mask=unused_mask(decoder),
            layout=PackLayout(pack.segment, pack.position_ids),
            use_cache=False,
            **kwargs,
        )


def answer_states(model: nn.Module, pack: Pack) -> Tensor:
    """[A, hidden]: final hidden states at the places that predict answer tokens."""
    return hidden_states(model, pack).last_hidden_state[0, pack.predict]


def logits(model: nn.Module, states: Tensor) -> Tensor:
    """float32 logits of hidden states, with the cap on logits that some families apply."""
    out = model.get_output_embeddings()(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return out if cap is None else torch.tanh(out / cap) * cap


def chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
