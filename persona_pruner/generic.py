"""What of a sculpt does not depend on the persona: computed once for a base model, read by all its other characters.

Everything is stored under a hash of the token ids it was computed from, of the model and of the settings that matter,
so that a folder may be shared by sculpts of any kind; a lock lets one of several processes compute and the others wait.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from persona_pruner import files
from persona_pruner.evaluation import metrics
from persona_pruner.nn import masked
from persona_pruner.packing import Example, Pack, pack, text_examples, text_packs
from persona_pruner.search import masks as choice
from persona_pruner.search.baselines import prune
from persona_pruner.search.scores import Context, balanced, channel_scores
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.prompts import encode, prompt_ids
from persona_pruner.synthesis.sensitivity import REFERENCE_SYSTEMS, reference_directions
from persona_pruner.workspace import Workspace


class Generic:
    """Generic statistics of one base. root: hash of the model; folder: where they are shared, None to keep nothing."""

    def __init__(self, model: nn.Module, tokenizer, root: str, folder: str | Path | None = None):
        self.model, self.tokenizer, self.root = model, tokenizer, root
        self.work = Workspace(folder)

    @cached_property
    def _neutral(self) -> list[list[int]]:
        return [encode(self.tokenizer, text) for text in bank.passages("neutral")]

    @cached_property
    def calibration(self) -> list[list[int]]:
        """Token ids of the texts that baselines are calibrated on."""
        return [encode(self.tokenizer, text) for text in bank.passages("calibration")]

    def packs(self) -> list[Pack]:
        """These texts, one pack each."""
        return text_packs(self.calibration)

    def neutral_tokens(self, texts: int | None = None) -> int:
        """Tokens of the first `texts` neutral texts, or of all; the other functions count them alike."""
        return sum(map(len, self._neutral[:texts]))

    def references(self, questions: Sequence[str], step: Callable[[int], None]) -> Tensor:
        """`reference_directions` of these questions; `step` as there."""
        prompts = [[prompt_ids(self.tokenizer, s, q) for q in questions] for s in REFERENCE_SYSTEMS]
        key, told = files.digest([self.root, prompts]), 0

        def count(done: int) -> None:
            nonlocal told
            told += done
            step(done)

        found = self._tensor("references", key, lambda: reference_directions(self.model, prompts, count))
        step(len(questions) * len(REFERENCE_SYSTEMS) - told)
        return found

    def neutral_nll(self, texts: int | None = None) -> float:
        """NLL of the dense model on the neutral texts, nats per token."""
        key = files.digest([self.root, self._neutral[:texts]])
        return self._value("neutral", key, lambda: metrics.text_nll(self.model, self._neutral[:texts]))

    def neutral_nll_of(self, model: nn.Module, texts: int | None = None) -> float:
        """The same of another model, or of the dense one under a mask; never stored."""
        return metrics.text_nll(model, self._neutral[:texts])

    def baseline(self, name: str, ratio: float, seed: int, texts: int | None = None) -> tuple[list[Tensor], float]:
        """The masks of a baseline on generic calibration text, equal widths, and its NLL on the neutral texts."""
        key = files.digest([self.root, name, seed, self.calibration])

        def make() -> dict[str, Tensor]:
            scores = channel_scores(name, Context(self.model, self.packs(), seed))
            return {str(layer): score for layer, score in enumerate(scores)}

        stored = self._tensors(f"baseline-{name}", key, make)
        device = self.model.get_input_embeddings().weight.device
        masks = choice.choose([stored[str(i)].to(device) for i in range(len(stored))], ratio, "layer")

        def nll() -> float:
            with masked(self.model, masks):
                return self.neutral_nll_of(self.model, texts)

        return masks, self._value(f"neutral-{name}", files.digest([key, ratio, self._neutral[:texts]]), nll)

    def examples(self, count: int) -> list[Example]:
        """The first `count` texts that baselines are calibrated on, to be mixed with a persona's examples."""
        return text_examples(self.calibration[:count])

    def balanced(
        self,
        own: Sequence[Tensor],
        packs: Sequence[Pack],
        method: str,
        count: int,
        weight: float,
        budget: int,
        seed: int,
        heads: bool = False,
    ) -> list[Tensor]:
        """`scores.balanced` of a persona's scores by `method` and those of the first `count` texts by `weight`; with 0
        texts the persona's alone. `heads`: there are head groups among them."""
        if not count:
            return list(own)
        neutral = pack(self.examples(count), budget)
        key = files.digest([self.root, method, budget, seed, self.calibration[:count], heads])

        def make() -> dict[str, Tensor]:
            found = channel_scores(method, Context(self.model, neutral, seed, heads=heads))
            return {str(layer): score for layer, score in enumerate(found)}

        stored = self._tensors(f"scores-{method}", key, make)
        scores = [stored[str(layer)].to(score.device) for layer, score in enumerate(own)]
        return balanced(own, packs, scores, neutral, weight)

    def pruned(self, name: str) -> nn.Module:
        """A copy pruned by one of `search.baselines` that has one ratio, on generic calibration text; never stored."""
        return prune(name, Context(self.model, self.packs()), 0.5)

    def _value(self, name: str, key: str, make: Callable):
        name = f"{name}-{key[:16]}"
        with self.work.alone(name):
            return self.work.value(name, key, make)

    def _tensors(self, name: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        name = f"{name}-{key[:16]}"
        with self.work.alone(name):
            found = self.work.read_tensors(name, key)
            if found is None:
                found = make()
                self.work.write_tensors(name, key, found)
            return found

    def _tensor(self, name: str, key: str, make: Callable[[], Tensor]) -> Tensor:
        return self._tensors(name, key, lambda: {name: make()})[name]
