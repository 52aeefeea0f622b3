"""masked_swiglu and column_sqnorm_ on every backend of this machine, against float64.

Triton runs on a GPU, or in its interpreter in a process of its own (TRITON_INTERPRET must be set before triton loads).
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.errors import InputError
from persona_pruner.ops import _native, column_sqnorm_, importance, masked_swiglu

ACTS = ["silu", "gelu_tanh"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("h", "d_gate", "d_up", "d_mask", "taylor", "fisher")
GPU = torch.cuda.is_available()
BACKENDS = ["reference", *_native.ISAS, "triton", "cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Name of a backend; each build of the CPU kernels counts as one."""
    name = request.param
    if name in _native.ISAS:
        if not _native.ISAS[name] <= _native.cpu_flags():
            pytest.skip(f"this processor has no {name}")
        module = importlib.import_module(f"persona_pruner._cpu_{name}")
        monkeypatch.setattr(_native, "cpu_module", lambda: module)
        return "cpu"
    device = "cuda" if GPU and name in ("triton", "cuda") else "cpu"
    why = next(b for b in importance._swiglu.backends if b.name == name).unavailable(device)
    if why:
        pytest.skip(why)
    return name


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN, so that anything left unwritten shows."""
    torch.manual_seed(0)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def device(backend):
    return "cuda" if GPU and backend in ("triton", "cuda") else "cpu"


def inputs(shape, dtype, fused=False, scale=3.0):
    *lead, channels = shape
    gate, up = (torch.randn(*lead, 2 * channels).mul(scale).to(dtype)).chunk(2, -1)
    if not fused:
        gate, up = gate.contiguous(), up.contiguous()
    return gate, up, torch.rand(channels).round(), torch.randn(shape).to(dtype)


def run(form, gate, up, mask, dh, act):
    """(h, d_gate, d_up, d_mask, taylor, fisher) of form(gate, up, mask, act, taylor, fisher)."""
    leaves = [x.detach().requires_grad_() for x in (gate, up, mask)]
    taylor, fisher = (torch.zeros_like(mask) for _ in range(2))
    h = form(*leaves, act, taylor, fisher)
    h.backward(dh)
    return [x.detach().cpu() for x in (h, *(x.grad for x in leaves), taylor, fisher)]


def ours(backend):
    def form(gate, up, mask, act, taylor, fisher):
        return masked_swiglu(gate, up, mask, act, taylor, fisher, backend=backend)

    return form


def plain(gate, up, mask, act, taylor, fisher):
    """Eager PyTorch in the dtype at hand."""
    value = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
    h = value * mask.to(value.dtype)

    def scores(dh):
        score = value.detach() * dh
        score = score if score.dtype == torch.float64 else score.float()
        taylor.add_(score.sum(0) if score.dim() == 2 else score.flatten(0, -2).sum(0))
        fisher.add_(score.square().flatten(0, -2).sum(0))

    h.register_hook(scores)
    return h


def assert_close(got, peer, exact):
    """Error at most twice that of plain PyTorch in the same dtype, and a small floor."""
    # Triton's interpreter cuts float32 to bfloat16 instead of rounding it.
    share = 2**-7 if _native.interpreting() and got[0].dtype == torch.bfloat16 else 1e-6
    for name, x, y, z in zip(NAMES, got, peer, exact, strict=False):
        error, allowed = ((v.double() - z).abs().max().item() if v.numel() else 0.0 for v in (x, y))
        floor = share * z.abs().max().item() if z.numel() else 0.0
        assert error <= 2 * allowed + floor, f"{name}: {error:.3g}, plain PyTorch {allowed:.3g}"


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (65, 128), (2, 33, 40)])
def test_against_float64(backend, dtype, act, shape):
    data = inputs(shape, dtype, fused=shape[-1] % 2 == 0)
    exact = run(plain, *(x.double() for x in data), act)
    got = run(ours(backend), *(x.to(device(backend)) for x in data), act)
    assert [x.dtype for x in got] == [dtype] * 3 + [torch.float32] * 3
    assert_close(got, run(plain, *data, act), exact)


def test_wide_rows(backend):
    """More channels than one task of the CPU kernel takes."""
    if _native.interpreting():
        pytest.skip("slow in the interpreter, and its tiles are smaller than the other shapes")
    data = inputs((70, 2077), torch.bfloat16)
    exact = run(plain, *(x.double() for x in data), "silu")
    got = run(ours(backend), *(x.to(device(backend)) for x in data), "silu")
    assert_close(got, run(plain, *data, "silu"), exact)


@pytest.mark.parametrize("act", ACTS)
def test_whole_range_of_gates(backend, act):
    """Relative error over all magnitudes, and what happens far out, at infinity and at NaN."""
    where = device(backend)
    small = torch.logspace(-30, 1, 997)
    gate = torch.cat([torch.linspace(-80, 80, 20001), small, -small, torch.ones(21)])
    gate = gate.view(64, -1)  # whole tiles: a single row has 57 times as many, and the interpreter takes its time
    one = torch.ones_like(gate)
    got = masked_swiglu(gate.to(where), one.to(where), one[0].to(where), act, backend=backend).cpu()
    peer = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
    wide = gate.double()
    z = wide if act == "silu" else 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    exact = wide * torch.sigmoid(z)  # F.gelu loses the far tail even in float64
    error, allowed = ((x - exact).abs() / exact.abs().clamp(min=1e-30) for x in (got.double(), peer.double()))
    usable = exact.abs() > 1e-30
    assert error[usable].max() <= min(2 * allowed[usable].max().item(), 1e-5)

    far = torch.tensor([-3e38, -1e4, -100.0, 100.0, 1e4, 3e38, float("inf"), float("nan"), 0.0, -0.0], device=where)
    far.requires_grad_()
    one = torch.ones(1, 10, device=where)
    h = masked_swiglu(far[None], one, one[0], act, backend=backend)
    h.backward(one)
    assert h[0, :3].abs().max() < 1e-30 and torch.equal(h[0, 3:7], far[3:7]) and h[0, 7].isnan()
    assert torch.equal(h[0, 8:], torch.zeros(2, device=where))
    assert far.grad[7].isnan()
    slopes = far.grad[[0, 1, 2, 3, 4, 5, 8, 9]].cpu()
    assert torch.allclose(slopes, torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5]), rtol=0, atol=1e-24)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_sixteen_bit_value_converts(backend, dtype):
    """silu(100) is 100 in float32, so h = 100 * up rounded once: every bit pattern in, the nearest value out."""
    if _native.interpreting():
        pytest.skip("Triton's interpreter converts in its own way")
    up = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)
    gate = torch.full_like(up, 100.0)
    for factor in (0.01, 1.0, 3e-5, 700.0):  # subnormal and overflowing results too
        mask = torch.full((1024,), factor)
        expect = (100.0 * up.float() * mask).to(dtype)
        where = device(backend)
        h = masked_swiglu(gate.to(where), up.to(where), mask.to(where), backend=backend).cpu()
        assert torch.equal(h.isnan(), expect.isnan())
        assert torch.equal(h.nan_to_num(), expect.nan_to_num())


def test_masked_channels_have_gradient_and_scores(backend):
    gate, up, _, dh = (x.to(device(backend)) for x in inputs((40, 24), torch.float32))
    masks = torch.zeros(24), torch.ones(24), torch.rand(24)
    results = [run(ours(backend), gate, up, m.to(gate.device), dh, "silu") for m in masks]
    assert results[0][0].eq(0).all() and results[0][1].eq(0).all()
    for other in results[1:]:
        for i in (3, 4, 5):
            assert torch.equal(results[0][i], other[i])
    assert results[0][3].abs().min() > 0 and torch.equal(results[0][3], results[0][4])


def test_scores_accumulate_in_place(backend):
    gate, up, mask, dh = (x.to(device(backend)) for x in inputs((70, 9), torch.bfloat16))
    _, _, _, _, taylor, fisher = run(ours(backend), gate, up, mask, dh, "silu")
    sums = torch.full((2, 9), 5.0, device=gate.device)
    for _ in range(2):
        h = masked_swiglu(gate.requires_grad_(), up, mask, "silu", sums[0], sums[1], backend=backend)
        h.backward(dh)
    assert torch.allclose(sums.cpu(), 5 + 2 * torch.stack([taylor, fisher]), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (2, 0, 8)])
def test_empty(backend, shape):
    data = [x.to(device(backend)) for x in inputs(shape, torch.float32)]
    h, d_gate, d_up, *sums = run(ours(backend), *data, "silu")
    assert h.shape == d_gate.shape == d_up.shape == shape
    assert all(torch.equal(x, torch.zeros(shape[-1])) for x in sums)
    acc = torch.ones(shape[-1], device=data[0].device)
    assert column_sqnorm_(data[0], acc, backend=backend).eq(1).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 150), channels=st.integers(1, 90), gap=st.integers(0, 7), offset=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES), kind=st.sampled_from(["rows", "columns", "expanded"]),
)  # fmt: skip
def test_views(tokens, channels, gap, offset, dtype, kind):
    """Offset starts, padded rows, transposed and expanded tensors give the same bits as contiguous ones."""
    dh = torch.randn(tokens, channels).to(dtype)
    if kind == "rows":
        width = channels + gap
        base = torch.randn(2, tokens * width + offset + 1).to(dtype)
        gate, up = (b[offset : offset + tokens * width].view(tokens, width)[:, :channels] for b in base)
        assert importance._rows(gate).data_ptr() == gate.data_ptr()
    elif kind == "columns":
        gate, up = (torch.randn(channels, tokens).to(dtype).t() for _ in range(2))
    else:
        gate, up = (torch.randn(channels).to(dtype).expand(tokens, channels) for _ in range(2))
        dh = torch.randn(1, 1).to(dtype).expand(tokens, channels)
    mask = torch.rand(2 * channels)[::2]
    got = run(ours("cpu"), gate, up, mask, dh, "silu")
    want = run(ours("cpu"), gate.contiguous(), up.contiguous(), mask.contiguous(), dh.contiguous(), "silu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    acc = [column_sqnorm_(x, torch.ones(channels), backend="cpu") for x in (gate, gate.contiguous())]
    assert torch.equal(*acc)


def test_halves_of_a_fused_product_are_not_copied():
    gate, up = torch.randn(4, 7, 2 * 48).chunk(2, -1)
    for x in (gate, up):
        assert importance._rows(x).data_ptr() == x.data_ptr() and importance._rows(x).stride() == (96, 1)
    h = masked_swiglu(gate.requires_grad_(), up, torch.ones(48))
    kept = h.grad_fn.saved_tensors
    assert [x.data_ptr() for x in kept[:2]] == [gate.data_ptr(), up.data_ptr()] and len(kept) == 3


def test_expanded_gradient(backend):
    gate, up, mask, _ = (x.to(device(backend)) for x in inputs((9, 17), torch.float32))
    got = run(ours(backend), gate, up, mask, torch.ones(1, 1, device=gate.device).expand(9, 17), "silu")
    want = run(ours(backend), gate, up, mask, torch.ones(9, 17, device=gate.device), "silu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_number_of_threads(dtype):
    data = inputs((403, 2500), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            norms = column_sqnorm_(data[0], torch.zeros(2500), backend="cpu")
            results.append([*run(ours("cpu"), *data, "silu"), norms])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act):
    gate, up, mask = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda *x: masked_swiglu(*x, act), (gate, up, mask))


def test_only_what_is_needed_is_computed(monkeypatch):
    """The backend is told which gradients autograd wants; scores alone make autograd run the backward pass."""
    seen = []
    passes = importance._swiglu.ready(torch.device("cpu"))[0].run

    def backward(dh, gate, up, mask, act, needs, taylor, fisher):
        grads = passes.backward(dh, gate, up, mask, act, needs, taylor, fisher)
        seen.append((needs, [g is not None for g in grads]))
        return grads

    chosen = importance.Backend("cpu", passes._replace(backward=backward))
    monkeypatch.setattr(importance._swiglu, "pick", lambda *args, **kwargs: chosen)
    gate, up, mask, dh = inputs((6, 8), torch.float32)
    fisher = torch.zeros(8)
    for wants in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        leaves = [x.detach().requires_grad_(bool(w)) for x, w in zip((gate, up, mask), wants, strict=True)]
        masked_swiglu(*leaves, fisher=None if any(wants) else fisher).backward(dh)
        assert seen[-1] == (tuple(map(bool, wants)), list(map(bool, wants)))
    assert fisher.min() > 0
    with torch.no_grad():
        assert not masked_swiglu(gate, up, mask, fisher=fisher).requires_grad
    assert not masked_swiglu(gate, up, mask).requires_grad
    assert len(seen) == 4


def test_bool_mask(backend):
    gate, up, mask, _ = (x.to(device(backend)) for x in inputs((5, 30), torch.bfloat16))
    h = masked_swiglu(gate, up, mask.bool(), backend=backend)
    assert torch.equal(h, masked_swiglu(gate, up, mask, backend=backend))


def test_nan_stays_in_its_place(backend):
    gate, up, mask, dh = (x.to(device(backend)) for x in inputs((70, 20), torch.float32))
    gate[66, 3] = float("nan")
    h, d_gate, d_up, *sums = run(ours(backend), gate, up, mask, dh, "gelu_tanh")
    for x in (h, d_gate, d_up):
        assert x.isnan().nonzero().tolist() == [[66, 3]]
    for x in sums:
        assert x.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (200, 70), (3, 50, 129), (7,)])
def test_column_sqnorm(backend, dtype, shape):
    x = torch.randn(shape).to(dtype)
    exact = x.double().reshape(-1, shape[-1]).square().sum(0)
    acc = torch.full((shape[-1],), 2.0, device=device(backend))
    assert column_sqnorm_(x.to(acc.device).requires_grad_(), acc, backend=backend) is acc and not acc.requires_grad
    peer = 2 + x.float().reshape(-1, shape[-1]).pow(2).sum(0)
    assert_close([acc.cpu()], [peer], [2 + exact])


C = torch.zeros(4)
X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masked_swiglu(X, X, C, act="relu"), "silu, gelu_tanh"),
        (lambda: masked_swiglu(X, X[:1], C), "agree"),
        (lambda: masked_swiglu(X, X.half(), C), "agree"),
        (lambda: masked_swiglu(X, X, C[:3]), r"mask must be \[4\]"),
        (lambda: masked_swiglu(X, X, C.half()), "mask must be"),
        (lambda: masked_swiglu(X, X, C, taylor=C.double()), "taylor must be float32"),
        (lambda: masked_swiglu(X, X, C, fisher=torch.zeros(8)[::2]), "fisher must be contiguous"),
        (lambda: masked_swiglu(X, X, C, backend="gpu"), "no backend 'gpu'"),
        (lambda: masked_swiglu(X, X, C, backend="cuda"), "'cuda' cannot run here"),
        (lambda: masked_swiglu(X.double(), X.double(), C.double(), backend="cpu"), "float32, bfloat16 and float16"),
        (lambda: column_sqnorm_(X.int(), C), "floating point"),
        (lambda: column_sqnorm_(X, torch.zeros(3)), r"acc must be contiguous \[4\]"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("wants", [(1, 1, 1), (0, 0, 1), (0, 0, 0)])
def test_compile(wants):
    def layer(x, up, mask, taylor, fisher):
        column_sqnorm_(x, fisher)
        return masked_swiglu(x * 2, up, mask, "gelu_tanh", taylor, fisher) + 1

    gate, up, mask, dh = inputs((37, 3, 33), torch.float32, fused=True)
    results = []
    for form in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_(bool(w)) for x, w in zip((gate, up, mask), wants, strict=True)]
        sums = torch.zeros(2, 33)
        h = form(*leaves, *sums)
        h.backward(dh)
        results.append([h.detach(), sums, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert results[0][1].abs().min() > 0


def test_opcheck():
    gate, up, mask, dh = inputs((6, 5), torch.float32, fused=True)
    leaves = [x.detach().requires_grad_() for x in (gate, up, mask)]
    torch.library.opcheck(importance._compiled_swiglu, (*leaves, "silu", None, None, None, None))
    sums = torch.zeros(5), torch.zeros(5)
    flags = True, False, True
    torch.library.opcheck(importance._compiled_swiglu_backward, (dh, gate, up, mask, "silu", *flags, *sums, None))
    torch.library.opcheck(importance._compiled_sqnorm, (gate, sums[0], None))


@pytest.mark.skipif(_native.interpreting() or GPU, reason="the Triton cases run in this process")
def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
