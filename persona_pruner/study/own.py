"""The persona's own slices: what `sculpt` makes, its parts as controls, and the ways past it."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from persona_pruner import files, models
from persona_pruner.config import SculptConfig
from persona_pruner.generic import Generic
from persona_pruner.memory import trim
from persona_pruner.nn import attentions, cut_heads_, group_cost, head_groups, slim_copy
from persona_pruner.packing import Example, evenly, pack
from persona_pruner.search import masks as choice
from persona_pruner.search import recovery, ste
from persona_pruner.search.baselines import two_four
from persona_pruner.search.baselines.channels import moments
from persona_pruner.search.repair import HEADS, TOKENS, repair_, tilted
from persona_pruner.search.scores import Context, channel_scores, everything, predicted, repeats
from persona_pruner.workspace import Workspace

RECOVERY_STEPS = 24  # where the setting recovery_steps is 0, sculpt's default


@dataclass
class Channels:
    """Channels that compete to stay: of which model, their scores, the ratio that is to go, whether they compete within
    a layer or over all (`masks.SCOPES`), and what number the widths are multiples of."""

    model: nn.Module
    scores: list[Tensor]
    ratio: float
    scope: str
    multiple: int = choice.MULTIPLE

    def best(self) -> list[Tensor]:
        """Masks by the scores alone."""
        return choice.choose(self.scores, self.ratio, self.scope, self.multiple)


class Search:
    """What the slices of one persona and one seed share: scores, dense targets, searched masks. Each is made once and
    kept in `work` under `key` (of model and data) and its own settings; `seconds` sums what it took to make those that
    were read and not made anew. `examples` are the persona's and, after them, as many neutral texts of `generic` as
    `config.neutral_examples` says."""

    def __init__(
        self,
        model: nn.Module,
        persona: Sequence[Example],
        config: SculptConfig,
        work: Workspace,
        key: str,
        generic: Generic,
    ):
        self.model, self.config, self.work, self.key, self.generic = model, config, work, key, generic
        self.score_packs = pack(persona, config.budget, evenly(len(persona), config.score_examples))
        self.neutral = generic.examples(config.neutral_examples)
        self.examples = [*persona, *self.neutral]
        self.targets = ste.Targets(self.examples)
        self.seconds = 0.0
        self.counted: set[str] = set()

    def _kept(self, name: str, make: Callable[[], list[Tensor]], *depends: object) -> list[Tensor]:
        """A list of tensors by name, made or read; `depends` are the settings it comes from, beside the data."""
        key = files.digest([self.key, name, self.config.seed, self.config.budget, *depends])
        begun = time.perf_counter()
        with self.work.alone(name):
            entered = time.perf_counter()
            stored = self.work.read_tensors(name, key)
            if stored is None:
                found = make()
                took = torch.tensor(time.perf_counter() - entered, dtype=torch.float64)
                stored = {str(i): t for i, t in enumerate(found)} | {"seconds": took}
                self.work.write_tensors(name, key, stored)
            elif name not in self.counted:
                self.seconds += stored["seconds"].item() - (entered - begun)  # another process made it meanwhile
        self.counted.add(name)
        device = self.model.get_input_embeddings().weight.device
        return [stored[str(i)].to(device) for i in range(len(stored) - 1)]

    def scores(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of every layer's channels; and of its head groups, where there are any and the start is Fisher."""
        config = self.config
        heads = config.start == "fisher" and bool(head_groups(self.model))

        def make() -> list[Tensor]:
            context = Context(self.model, self.score_packs, config.seed, seen=self.targets.add, heads=heads)
            return channel_scores(config.start, context)

        found = self._kept(f"scores-{config.start}", make, config.score_examples, heads)
        settings = (config.start, len(self.neutral), config.neutral_weight, config.budget, config.seed, heads)
        found = self.generic.balanced(found, self.score_packs, *settings)
        layers = len(models.decoder_layers(self.model))
        return found[:layers], found[layers:]

    def _neutral(self) -> tuple[int, float]:
        """What stored tensors depend on of the neutral texts."""
        return len(self.neutral), self.config.neutral_weight

    def means(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean over the tokens that scores are taken from, neutral texts as often as their weight asks, of what enters
        every layer's down_proj, and its o_proj where there are head groups."""
        neutral = pack(self.neutral, self.config.budget)
        times = repeats(predicted(self.score_packs), predicted(neutral), self.config.neutral_weight)
        context = Context(self.model, [*self.score_packs, *neutral * times])
        linears = [mlp.down_proj for mlp in models.gated_mlps(self.model)]
        layers = len(linears)
        linears += [attention.o_proj for attention in attentions(self.model)]
        depends = (self.config.score_examples, *self._neutral())
        found = self._kept("means", lambda: moments(context, linears)[0], *depends)
        return found[:layers], found[layers:]

    def even(self, ratio: float) -> Channels:
        """The same number of channels in every layer, attention left whole."""
        return Channels(self.model, self.scores()[0], ratio, "layer")

    def free(self, ratio: float, repair: bool = False, tilt: bool = False, biased: bool = False) -> Channels:
        """Channels over all layers, once the head groups are gone that are worth less than they, by HEADS where a
        `repair` follows; the scores of both are `tilted` or not. `biased`: a bias stands in for the groups."""
        channels, heads = (tilted(part) if tilt else part for part in self.scores())
        heads = [HEADS * part for part in heads] if repair else heads
        if not heads:
            return Channels(self.model, channels, ratio, "global")
        kept, left = choice.drop_heads(channels, heads, ratio, group_cost(self.model))
        base = cut_heads_(copy.deepcopy(self.model), kept, self.means()[1] if biased else None)
        return Channels(base, channels, left, "global", 1)

    def teacher(self) -> list[Tensor]:
        """Dense final states of every example; not stored, since a pass of the dense model gives them."""
        return ste.teacher_states(self.model, self.examples, self.config.budget, targets=self.targets)

    def weighed(self) -> tuple[list[Example], list[Tensor]]:
        """What a search sees: all examples, neutral texts as often as their weight asks, and their dense states."""
        return ste.weighed(self.examples, self.teacher(), len(self.neutral), self.config.neutral_weight)

    def masks(self, channels: Channels, means: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Masks after the straight-through steps; `means` as in `ste.search`."""
        names = ("loss", "steps", "lr", "budget", "seed")
        wanted = {name: getattr(self.config, name) for name in names}
        wanted |= {name: getattr(channels, name) for name in ("ratio", "scope", "multiple")}
        settings = ste.Settings(**wanted)
        if not settings.steps:
            return channels.best()

        def make() -> list[Tensor]:
            state = ste.start(channels.scores, channels.scope)
            examples, teacher = self.weighed()
            return ste.search(channels.model, examples, state, settings, teacher, means=means)

        data = (self.config.start, self.config.score_examples, *self._neutral())
        name = f"masks-{channels.scope}-{channels.ratio:.4f}" + ("-means" if means else "")
        kept = self._kept(name, make, *data, asdict(settings), head_groups(channels.model))
        return [mask.bool() for mask in kept]

    def repaired(self, masks: Sequence[Tensor], base: nn.Module | None = None, **options) -> nn.Module:
        """A cut and repaired copy of the model, or of `base`; `options` are those of `repair_`."""
        packs = pack(self.examples, TOKENS)
        slim = repair_(slim_copy(base or self.model, masks), self.model, packs, self.config.ridge, **options)
        trim()  # the states of all examples: gigabytes, in pieces that a recovery after it would hardly use again
        return slim


Method = Callable[[Search, float], nn.Module]


def _sculpted(search: Search, ratio: float) -> nn.Module:
    return search.repaired(search.masks(search.even(ratio)))


def _unsearched(search: Search, ratio: float) -> nn.Module:
    return search.repaired(search.even(ratio).best())


def _masked(search: Search, ratio: float) -> nn.Module:
    return slim_copy(search.model, search.masks(search.even(ratio)))


def _wide(search: Search, ratio: float) -> nn.Module:
    channels = search.free(ratio, repair=True)
    return search.repaired(search.masks(channels), channels.model)


def _wide_masked(search: Search, ratio: float) -> nn.Module:
    channels = search.free(ratio)
    return slim_copy(channels.model, search.masks(channels))


def _biased(search: Search, ratio: float) -> nn.Module:
    channels, (means, _) = search.free(ratio, biased=True), search.means()
    return slim_copy(channels.model, search.masks(channels, means), means)


def _tilted(search: Search, ratio: float) -> nn.Module:
    channels = search.free(ratio, repair=True, tilt=True)
    return search.repaired(channels.best(), channels.model)


def _recover_(model: nn.Module, search: Search, way: str) -> nn.Module:
    config = search.config
    steps = config.recovery_steps or RECOVERY_STEPS
    options = {"budget": config.budget, "seed": config.seed + 1}
    recovery.recover_(way, model, search.model, search.examples, steps, **options)
    return model


def _recovered(search: Search, ratio: float) -> nn.Module:
    return _recover_(_tilted(search, ratio), search, search.config.recovery)


def _two_four(search: Search, masks: Sequence[Tensor], ffn_only: bool = False, trained: bool = True) -> nn.Module:
    """Two of every four weights of what the masks leave, repaired, then trained with their zeros kept."""
    model = search.repaired(masks, replace=two_four.sparsegpt_weight, ffn_only=ffn_only)
    return _recover_(model, search, "weights") if trained else model


# Name, how it is made, what is said of it in tables.
OWN: dict[str, tuple[Method, str]] = {
    "persona": (_sculpted, "scores, straight-through search, repair; equal widths (sculpt's default)"),
    "persona-mask": (_masked, "the same without repair: weights untouched"),
    "persona-scores": (_unsearched, "scores and repair without search: a control"),
    "persona-global": (_wide, "search and repair; widths and head groups free over layers"),
    "persona-global-mask": (_wide_masked, "the same without repair: weights untouched"),
    "persona-global-bias": (
        _biased,
        "weights untouched, and FLAP's bias for what was dropped, which the search knows of",
    ),
    "persona-global-scores": (
        _tilted,
        "scores, later blocks favoured, and repair; no search, widths and head groups free",
    ),
    "persona-slim-2:4": (
        lambda search, ratio: _two_four(search, search.masks(search.even(ratio))),
        "the channels of persona, and two of every four of their weights as in persona-2:4",
    ),
    "persona-recovered": (
        _recovered,
        f"persona-global-scores, then recovery_steps ({RECOVERY_STEPS}) of KL on the weights or by LoRA",
    ),
}
OWN_24: dict[str, tuple[Method, str]] = {
    "persona-2:4": (
        lambda search, ratio: _two_four(search, everything(search.model)),
        "SparseGPT in the repair, then KL on the kept weights as in persona-recovered; all block linears",
    ),
    "persona-2:4-repair": (
        lambda search, ratio: _two_four(search, everything(search.model), trained=False),
        "the same without the steps",
    ),
    "persona-2:4-ffn": (
        lambda search, ratio: _two_four(search, everything(search.model), ffn_only=True),
        "persona-2:4 on the FFN's linears only, which is half of its bytes like half of its channels",
    ),
}
TRAINED = ("persona-recovered", "persona-slim-2:4", "persona-2:4", "persona-2:4-ffn")
SHARED = "shared"
SHARED_HOW = "one mask and repair for all personas, from as much data: the counterpart of persona-scores"
METHODS = OWN | OWN_24 | {SHARED: (_unsearched, SHARED_HOW)}


def made(method: str, search: Search, ratio: float) -> nn.Module:
    """A pruned copy by one of `METHODS`."""
    return METHODS[method][0](search, ratio)
