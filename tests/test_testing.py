"""The shared test material itself: a bound that never fails would make every other test worthless."""

import pytest
import torch

from persona_pruner.testing import FAMILIES, assert_close_to_oracle, tiny_examples, tiny_model, tiny_tokenizer


def test_the_bound_tells_good_from_bad():
    oracle = torch.linspace(-3, 3, 50, dtype=torch.float64)
    plain = oracle.bfloat16()
    worst = (plain.double() - oracle).abs().max()
    assert_close_to_oracle(plain, oracle, plain)
    assert_close_to_oracle((oracle + 1.5 * worst).float(), oracle, plain.float())
    for bad in (oracle + 2.5 * worst, oracle.clone().index_fill_(0, torch.tensor(7), torch.nan)):
        with pytest.raises(AssertionError):
            assert_close_to_oracle(bad.float(), oracle, plain.float())
    with pytest.raises(AssertionError):
        assert_close_to_oracle(plain.float(), oracle, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_reproducible_and_peaked(family):
    model, ids = tiny_model(family), torch.tensor([tiny_examples(1)[0].prompt])
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    probabilities = model(ids).logits.softmax(-1)
    assert torch.equal(probabilities, tiny_model(family)(ids).logits.softmax(-1))
    assert not torch.equal(probabilities, tiny_model(family, seed=1)(ids).logits.softmax(-1))
    assert 10 / 512 < probabilities.max() < 0.99  # far from uniform, and from one token only


def test_tokenizer_round_trip():
    tokenizer = tiny_tokenizer()
    text = "Hallo, żółć 日本 🙂!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id] == [2]
