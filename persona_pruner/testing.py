"""What tests and benchmarks share: tiny random models and tokenizers made offline, and the bound on rounding errors."""

from functools import cache

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.packing import Example

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def _byte_level():
    """A byte-level BPE of 512 tokens trained on the bundled questions; any text survives a round trip."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    from persona_pruner.synthesis.bank import bundled

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(bundled("search")), trainer)
    return tokenizer.to_str()


def tiny_tokenizer(template: str | None = CHATML):
    """A fast tokenizer of 512 tokens: 0 pads, 1 starts a turn, 2 ends one; `template` is its chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "additional_special_tokens": [SPECIAL[1]]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_byte_level()), **special)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A random causal LM of 3 layers, hidden 32, 64 FFN channels, vocabulary 512, in eval mode and frozen.

    Weights are large enough for peaked outputs, norms and biases are not their usual ones and zeros. `changes` go to
    the config. Llama has FFN biases; the windows of Mistral and Gemma 3 are 12 tokens, so that they matter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    own = {
        "llama": {"mlp_bias": True},
        "mistral": {"sliding_window": 12},
        "gemma3": {
            "tie_word_embeddings": False,
            "sliding_window": 12,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    }
    kind = {"gemma3": "gemma3_text"}.get(family, family)
    config = AutoConfig.for_model(kind, **{**sizes, **own.get(family, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return models.prepare(model.to(dtype))


def tiny_examples(count: int, seed: int = 0, prefix: int = 7, vocabulary: int = 512) -> list[Example]:
    """Random examples that share a start of `prefix` tokens; the rest of the prompt is 1-9 tokens, the answer 1-8."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    def length(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    shared = ids(prefix)
    return [Example(shared + ids(length(9)), ids(length(8))) for _ in range(count)]


def assert_close_to_oracle(actual: Tensor, oracle: Tensor, plain: Tensor, floor: float = 1e-6) -> None:
    """Largest error of `actual` against the float64 `oracle` is at most twice that of `plain` (the formula in plain
    PyTorch and the tested dtype) plus `floor` times the oracle's largest value. NaN and inf must stand where they do
    in the oracle."""
    assert oracle.dtype == torch.float64 and actual.shape == oracle.shape == plain.shape
    assert actual.dtype == plain.dtype, f"{actual.dtype} instead of {plain.dtype}"
    fine = oracle.isfinite() & plain.isfinite()
    odd = actual.double()[~fine], plain.double()[~fine]
    assert torch.equal(odd[0].nan_to_num(nan=12345.0), odd[1].nan_to_num(nan=12345.0)), "NaN or inf in other places"
    if fine.any():
        error, allowed = ((x.double() - oracle)[fine].abs().max().item() for x in (actual, plain))
        limit = 2 * allowed + floor * oracle[fine].abs().max().item()
        assert error <= limit, f"error {error:.3g} is over the limit {limit:.3g} (plain PyTorch: {allowed:.3g})"
