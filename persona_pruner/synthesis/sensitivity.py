"""Which questions depend on who answers them (Persona-Pruner, arXiv 2606.14695, stage 1)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import normalize

from persona_pruner.packing import Example, hidden_states, pack
from persona_pruner.synthesis.prompts import prompt_ids

# Nine voices far apart in age, trade, mood and manner of speech, against which a persona's own voice stands out.
REFERENCES = (
    "a cheerful kindergarten teacher who explains everything with songs and simple words",
    "a retired naval officer, terse and formal, who values discipline above comfort",
    "a teenage gamer who is sarcastic, impatient and full of slang",
    "a tenured physicist who answers precisely, with numbers and careful caveats",
    "a street-food vendor in a busy port city, talkative and always bargaining",
    "a melancholic poet who sees loss and beauty in every ordinary thing",
    "a corporate lawyer, cautious and polite, who never commits to anything",
    "an energetic fitness coach who turns every topic into a challenge",
    "a village priest, gentle and patient, who answers with parables",
)
REFERENCE_SYSTEMS = [f"You are roleplaying as {reference}. Stay in character." for reference in REFERENCES]
# The paper uses layers 5 to 25 of 28.
FIRST, LAST = 5 / 28, 25 / 28


def middle_layers(count: int) -> range:
    """Numbers of the hidden states (1 = after the first block) to look at in a model of `count` blocks."""
    return range(max(1, round(FIRST * count)), max(1, round(LAST * count)) + 1)


@torch.inference_mode()
def _last_states(
    model: nn.Module, prompts: Sequence[list[int]], layers: range, step: Callable[[int], None]
) -> torch.Tensor:
    """[prompts, layers, hidden] float32: hidden states at the last token of each prompt."""
    device = model.get_input_embeddings().weight.device
    out: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for batch in pack([Example(list(prompt), [0]) for prompt in prompts]):
        batch = batch.to(device)
        states = hidden_states(model, batch, output_hidden_states=True).hidden_states
        stacked = torch.stack([states[layer][0, batch.predict].float() for layer in layers], 1)
        for row, state in zip(batch.rows, stacked, strict=True):
            out[row] = state
        step(len(batch.rows))
    return torch.stack(out)


def reference_directions(
    model: nn.Module, prompts: Sequence[Sequence[list[int]]], step: Callable[[int], None] = lambda done: None
) -> torch.Tensor:
    """float32 [questions, middle layers, hidden]: mean over the references of the last-token hidden states, each
    divided by its length. `prompts` holds, for each reference, one prompt a question; `step` is told how many prompts
    have just been done."""
    layers = middle_layers(len(model.get_decoder().layers))
    return sum(normalize(_last_states(model, own, layers, step), dim=-1) for own in prompts) / len(prompts)


def sensitivity(
    model: nn.Module,
    tokenizer,
    system: str,
    questions: Sequence[str],
    step: Callable[[int], None] = lambda done: None,
    references: Callable[[Sequence[str], Callable[[int], None]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """float32 [questions]: 1 - mean cosine similarity, over references and middle layers, between the last-token hidden
    states under the persona's system text and under each reference's. Large: the persona changes the answer.

    A cosine is linear in the normalized other vector, so the mean over the references is one product with
    `reference_directions`, which does not depend on the persona; `references(questions, step)` gives it where it may
    be known already. `step` is told how many of the 10 x len(questions) prompts have just been done.
    """
    if not questions:
        return torch.empty(0)
    layers = middle_layers(len(model.get_decoder().layers))
    own = _last_states(model, [prompt_ids(tokenizer, system, q) for q in questions], layers, step)
    if references is None:
        prompts = [[prompt_ids(tokenizer, text, q) for q in questions] for text in REFERENCE_SYSTEMS]
        others = reference_directions(model, prompts, step)
    else:
        others = references(questions, step).to(own.device)
    return 1 - (normalize(own, dim=-1) * others).sum(-1).mean(-1)
