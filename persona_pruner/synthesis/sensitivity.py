"""Which questions depend on who answers them (Persona-Pruner, arXiv 2606.14695, stage 1)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

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


def sensitivity(
    model: nn.Module, tokenizer, system: str, questions: Sequence[str], step: Callable[[int], None] = lambda done: None
) -> torch.Tensor:
    """float32 [questions]: 1 - mean cosine similarity, over references and middle layers, between the last-token hidden
    states under the persona's system text and under each reference's. Large: the persona changes the answer.

    `step` is told how many of the 10 x len(questions) prompts have just been done.
    """
    layers = middle_layers(len(model.get_decoder().layers))
    systems = [system, *(f"You are roleplaying as {reference}. Stay in character." for reference in REFERENCES)]
    if not questions:
        return torch.empty(0)
    own, *others = (
        _last_states(model, [prompt_ids(tokenizer, text, q) for q in questions], layers, step) for text in systems
    )
    return 1 - torch.stack([cosine_similarity(own, other, dim=-1).mean(-1) for other in others]).mean(0)
