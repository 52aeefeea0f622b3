"""Recovery after the cut: LoRA and distillation bring a pruned model nearer to the dense one, and keep its shape."""

import copy
import sys

import pytest
import torch

from persona_pruner.errors import InputError
from persona_pruner.evaluation.metrics import dense_reference, fidelity
from persona_pruner.nn.sparse import block_linears
from persona_pruner.packing import pack
from persona_pruner.search import recovery
from persona_pruner.search.baselines import prune
from persona_pruner.search.scores import Context
from persona_pruner.testing import tiny_examples, tiny_model


@pytest.fixture
def case():
    dense, examples = tiny_model(), tiny_examples(8)
    return dense, examples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora(case, dtype):
    pytest.importorskip("peft", reason="peft is not installed")
    dense, examples = case
    dense = dense.to(dtype)
    reference = dense_reference(dense, examples)
    slim = prune("magnitude", Context(dense), 0.5)
    before, names = fidelity(slim, reference).kl, [name for name, _ in slim.named_parameters()]
    told = []
    losses = recovery.lora_(slim, dense, examples, 20, lr=1e-2, budget=400, step=told.append)
    assert len(losses) == sum(told) == 20 and losses[0] == pytest.approx(before, rel=0.3)
    assert fidelity(slim, reference).kl < 0.7 * before
    assert [name for name, _ in slim.named_parameters()] == names and slim.dtype == dtype
    assert all(p.grad is None and not p.requires_grad and p.dtype == dtype for p in slim.parameters())
    assert slim.config.intermediate_size == 32
    again = prune("magnitude", Context(dense), 0.5)
    assert recovery.lora_(again, dense, examples, 3, lr=1e-2, budget=400) == pytest.approx(
        recovery.lora_(prune("magnitude", Context(dense), 0.5), dense, examples, 3, lr=1e-2, budget=400)
    )


def test_lora_without_peft(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="needs the extra `peft`"):
        recovery.lora_(tiny_model(), *case, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_keeps_zeros(case, dtype):
    dense, examples = case
    dense = dense.to(dtype)
    reference = dense_reference(dense, examples)
    sparse = prune("sparsegpt-2:4", Context(dense, pack(examples, 400)), 0.5)
    before, zeros = fidelity(sparse, reference).kl, {n: m.weight == 0 for n, m in block_linears(sparse).items()}
    embedding = sparse.get_input_embeddings().weight.clone()
    losses = recovery.distill_(sparse, dense, examples, 20, lr=3e-3, budget=400)
    assert len(losses) == 20 and fidelity(sparse, reference).kl < 0.7 * before
    for name, linear in block_linears(sparse).items():
        assert torch.equal(linear.weight == 0, zeros[name]) and linear.weight.dtype == dtype
        assert linear.weight.grad is None and not linear.weight.requires_grad
    assert torch.equal(sparse.get_input_embeddings().weight, embedding)


def test_small_steps_add_up_in_bfloat16(case):
    """A step of 1e-5 is below the spacing of bfloat16 for weights near 0.3: only float32 copies add them up."""
    dense = copy.deepcopy(case[0]).to(torch.bfloat16)
    sparse = prune("magnitude-2:4", Context(dense), 0.5)
    first = {name: linear.weight.clone() for name, linear in block_linears(sparse).items()}
    recovery.distill_(sparse, dense, case[1], 40, lr=5e-5, budget=400)
    moved = sum(int((linear.weight != first[name]).sum()) for name, linear in block_linears(sparse).items())
    big = sum(int((w.abs() > 0.1).sum()) for w in first.values())
    assert moved > 0.2 * big


def test_the_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def rate(step, steps):
        recovery._anneal(optimizer, 2.0, step, steps)
        return optimizer.param_groups[0]["lr"] / 2

    rates = [rate(step, 20) for step in range(20)]
    assert rates[0] == 0.5 and rates[1] == 1 and rates[2] == 1 and rates[-1] < 0.05
    assert rate(0, 1) == 1
