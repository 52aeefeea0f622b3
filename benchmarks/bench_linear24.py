"""Times linear24 on the CPU (or a GPU) against dense layers of torch and against the limits of the machine.

    persona-pruner bench linear24 --threads 1 2 --csv out.csv --plot out.png        (all shapes: about 10 minutes)
    persona-pruner bench linear24 --short                                           (under a minute)

Shapes are those of the linear layers of three models. "streamed": every call reads weights that are no longer in any
cache (between two uses of a copy the contestants together read twice the last-level cache); "hot": the same weights
again and again, where they fit. A result is compared with float64 before it is timed; contestants take turns in one
run; a figure is a median and contains the call from Python. Peers: torch (F.linear) in float32 and bfloat16, its
dynamic int8 layer, oneDNN with weights packed beforehand, and for one token our own dense matrix-vector product, the
honest limit, which gets its integers already quantized. Bandwidth: bytes like the values of 2:4 bf16 are read from
other memory in the same turns. "kernel": the C++ function of 2:4 with the addresses at hand, without the layer's call,
whose code comes from memory where others have swept the caches. On a GPU (--device cuda) the peers are cuBLAS,
cuSPARSELt and CUTLASS in torch.
"""

import argparse
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from persona_pruner.benchmarks import common
from persona_pruner.ops import _native, bind24, linear24, pack_linear24, quantize24, select24, unpack24

MODELS = {  # q/o, k/v, gate/up, down as (N, K)
    "smollm2-135m": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "llama-3.2-1b": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "llama-3.2-3b": [(3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192)],
}
F32, BF16 = torch.float32, torch.bfloat16
FLOAT_PEERS = ("torch fp32", "torch bf16", "oneDNN fp32", "oneDNN bf16")
# Goals: (name, tokens, ours, peers of which the best counts, times faster)
GOALS = [
    ("decode bf16 over torch bf16", (1,), "2:4 bf16", ("torch bf16",), 3.0),
    ("decode bf16 over dense GEMV", (1,), "2:4 bf16", ("dense bf16 GEMV",), 1.6),
    ("decode int8 over torch int8", (1,), "2:4 int8", ("torch int8",), 2.2),
    ("decode int8 over dense GEMV", (1,), "2:4 int8", ("dense int8 GEMV",), None),
    ("M 4..16 bf16 over best float", (4, 16), "2:4 bf16", FLOAT_PEERS, 1.6),
    ("M 4..16 int8 over best of all", (4, 16), "2:4 int8", (*FLOAT_PEERS, "torch int8"), 1.6),
    ("M >= 64 bf16 over oneDNN fp32", (64, 256), "2:4 bf16", ("oneDNN fp32",), 0.95),
    ("M >= 64 bf16 over oneDNN bf16", (64, 256), "2:4 bf16", ("oneDNN bf16",), None),
    ("M >= 64 int8 over best of oneDNN fp32, torch int8", (64, 256), "2:4 int8", ("oneDNN fp32", "torch int8"), 0.95),
]


@dataclass
class Form:
    """One contestant: run(weight, x) -> y, the weight as it takes it, and how to compare its result."""

    run: object
    weight: tuple  # of tensors or opaque packed objects
    copy: object  # weight -> another one in other memory
    x: torch.Tensor
    size: int  # bytes of the weight
    exact: torch.Tensor  # y in float64
    error: float  # allowed, relative, root mean square
    shown: object = staticmethod(lambda y: y)  # y as comparable numbers
    packed: tuple = ()  # of 2:4: values, metadata and, with int8, scales


def clone(weight):
    return tuple(t.clone() for t in weight)


def size_of(*tensors):
    return sum(t.nbytes for t in tensors)


def forms_cpu(dense, x, oracle):
    """Contestants for a dense weight float32 [N, K] and x float32 [M, K]; oracle(weight) is y in float64."""
    xb, tokens, module = x.to(BF16), x.shape[0], _native.cpu_module()
    exact, kept = oracle(dense), {}
    forms = {}
    for dtype in (F32, BF16):
        w, name = dense.to(dtype), "fp32" if dtype == F32 else "bf16"
        xt, error = (x, 1e-5) if dtype == F32 else (xb, 0.01)
        values, meta = select24(w)
        kept[dtype] = oracle(unpack24(values, meta))
        forms[f"2:4 {name}"] = Form(
            run_packed,
            bind(values, meta),
            lambda _, v=values, m=meta: bind(v.clone(), m.clone()),
            xt,
            size_of(values, meta),
            kept[dtype],
            error,
            packed=(values, meta),
        )
        forms[f"torch {name}"] = Form(lambda w, x: F.linear(x, *w), (w,), clone, xt, w.nbytes, exact, error)

        if dtype == BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue  # oneDNN refuses it on a CPU without AVX-512

        def pack(weight, w=w):
            return (torch.ops.mkldnn._reorder_linear_weight(w.clone(), tokens),)

        forms[f"oneDNN {name}"] = Form(run_onednn, pack(None), pack, xt, w.nbytes, exact, error)
    values, meta = select24(dense)
    values, scales = quantize24(values)
    packed = values, meta, scales
    forms["2:4 int8"] = Form(
        run_packed, bind(*packed), lambda _: bind(*clone(packed)), xb, size_of(*packed), oracle(unpack24(*packed)),
        0.02, packed=packed,
    )  # fmt: skip

    def prepack(weight):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scale = dense.abs().amax(1) / 127
            whole = torch.quantize_per_channel(dense, scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8)
            return (torch.ops.quantized.linear_prepack(whole, None),)

    run = torch.ops.quantized.linear_dynamic  # its activations have seven bits on a CPU without AVX-512: error 0.021
    forms["torch int8"] = Form(lambda w, x: run(x, *w), prepack(None), prepack, x, dense.numel(), exact, 0.04)
    if tokens == 1 and dense.shape[1] % 64 == 0:
        forms["dense bf16 GEMV"] = Form(
            lambda w, x: gemv(module.dense_gemv_bf16, BF16, x, *w),
            (dense.to(BF16),), clone, xb, 2 * dense.numel(), exact, 0.01,
        )  # fmt: skip
        scale, sx = dense.abs().amax(1, keepdim=True) / 127, x.abs().max() / 127
        w = (dense / scale).round().to(torch.int8)
        q = ((x / sx).round() + 128).to(torch.uint8)
        forms["dense int8 GEMV"] = Form(
            lambda w, x: gemv(module.dense_gemv_i8, torch.int32, x, *w),
            (w, w.sum(1, dtype=torch.int32)), clone, q, w.nbytes, exact, 0.02, lambda y: y * (scale.T * sx),
        )  # fmt: skip
    return forms


def run_packed(weight, x):
    return weight[0](x)


def bind(*tensors):
    """The packed weight as SparseLinear24 holds it: checked once, its tensors kept alive by the function."""
    return (bind24(pack_linear24(*tensors)),)


def run_onednn(weight, x):
    return torch.ops.mkldnn._linear_pointwise(x, weight[0], None, "none", [], "")


def gemv(function, dtype, x, *weight):
    rows, cols = weight[0].shape
    y = torch.empty(1, rows, dtype=dtype)
    addresses = (t.data_ptr() for t in (x, *weight, y))
    function(*addresses, rows, cols, torch.get_num_threads())
    return y


def forms_cuda(dense, x, oracle):
    """Never run so far: no GPU was at hand."""
    w, xb = dense.to(BF16), x.to(BF16)
    values, meta = select24(w)
    sparse = unpack24(values, meta)
    half, zeros = oracle(w), oracle(sparse)
    whole, scales = quantize24(values)
    forms = {
        "torch bf16": Form(lambda w, x: F.linear(x, *w), (w,), clone, xb, w.nbytes, half, 0.01),
        "2:4 bf16": Form(
            lambda w, x: linear24(x, w[0]),
            (pack_linear24(values, meta),), lambda w: (pack_linear24(values.clone(), meta.clone()),), xb,
            size_of(values, meta), zeros, 0.01,
        ),
        "2:4 int8": Form(
            lambda w, x: linear24(x, w[0]),
            (pack_linear24(whole, meta, scales),), lambda w: (pack_linear24(whole.clone(), meta, scales),), xb,
            size_of(whole, meta), oracle(unpack24(whole, meta, scales)), 0.02,
        ),
    }  # fmt: skip
    for name in ("CUSPARSELT", "CUTLASS"):
        kind = getattr(torch.sparse, f"SparseSemiStructuredTensor{name}")
        try:
            packed = kind.from_dense(sparse)
            F.linear(xb, packed)
        except RuntimeError as error:
            print(f"{name} cannot run here: {str(error).splitlines()[0]}")
            continue
        forms[f"torch {name}"] = Form(
            lambda w, x: F.linear(x, *w), (packed,), lambda w, kind=kind: (kind.from_dense(sparse),), xb,
            size_of(values, meta), zeros, 0.01,
        )  # fmt: skip
    return forms


def check(name, form):
    """Nothing is timed whose result is wrong."""
    got = form.shown(form.run(form.weight, form.x)).double()
    error = ((got - form.exact).square().mean() / form.exact.square().mean()).sqrt().item()
    if not error <= form.error:
        raise SystemExit(f"{name}: relative error {error:.2g}, allowed {form.error:.2g}; nothing is timed")


@torch.no_grad()
def measure(n, k, tokens, caches, budget, device, way):
    """One shape: {cache: {contestant: seconds}} and {contestant: share of the bandwidth in the same turns}."""
    generator = torch.Generator().manual_seed(n + k)
    dense = torch.randn(n, k, generator=generator).to(device)
    x = torch.randn(tokens, k, generator=generator).to(device)
    forms = (forms_cuda if device == "cuda" else forms_cpu)(dense, x, lambda w: x.double() @ w.double().T)
    cache, calls, found, shares = common.last_cache(), {}, {}, {}
    total = sum(form.size for form in forms.values())  # read in a round, between two uses of one copy
    for name, form in forms.items():
        check(f"{name}, M {tokens} N {n} K {k}", form)
        form.exact = None
        copies = 1 + math.ceil(2 * cache / total) if "streamed" in caches else 1
        weights = [form.weight] + [form.copy(form.weight) for _ in range(copies - 1)]
        calls[name] = [lambda w=w, form=form: form.run(w, form.x) for w in weights]
        if name == "2:4 bf16" and way:  # as many bytes as its values, of memory that no contestant touches
            spare = [torch.ones(n, k // 2, dtype=BF16) for _ in weights]
            calls["read"] = [lambda data=data: common.read(data, way) for data in spare]
        if name in ("2:4 bf16", "2:4 int8") and way and tokens == 1:
            calls[f"{name} kernel"] = [kernel_alone(form) for _ in weights]
    for kind in caches:
        if kind == "streamed" or 2 * dense.numel() <= cache // 2:
            found[kind] = common.turns(calls, budget, kind == "hot", device)
    if "streamed" in found and way:
        seconds = found["streamed"]
        rate = dense.numel() / seconds["read"]  # the values in bfloat16: N * K / 2 times 2 bytes
        sizes = {name: forms[name.removesuffix(" kernel")].size for name in seconds if name != "read"}
        shares = {name: size / seconds[name] / rate for name, size in sizes.items()}
    return found, shares


def kernel_alone(form):
    """A call of the C++ function for a copy of a packed weight and one token; the copy lives as long as the call."""
    (rows, half), threads = form.packed[0].shape, torch.get_num_threads()
    tensors, y = clone(form.packed), torch.empty(1, rows, dtype=form.x.dtype)
    function = _native.cpu_module().linear24_bf16 if len(tensors) == 2 else _native.cpu_module().linear24_i8_bf16
    addresses = [form.x.data_ptr(), *(t.data_ptr() for t in tensors), 0, y.data_ptr()]

    def run(kept=(tensors, y)):
        function(*addresses, 1, rows, 2 * half, threads)

    run()
    if not torch.equal(y, form.run(form.weight, form.x)):
        raise SystemExit(f"N {rows} K {2 * half}: the kernel alone gives another result; nothing is timed")
    return run


@torch.no_grad()
def overhead(device) -> dict:
    """Microseconds of a call with next to no work: the cost of Python, checks and allocation. "swept": others have read
    twice the last-level cache since the call before.
    """
    w, x = torch.randn(8, 64, device=device).to(BF16), torch.randn(1, 64, device=device).to(BF16)
    values, meta = select24(w)
    packed = pack_linear24(values, meta)
    call = bind24(packed) if device == "cpu" else lambda x: linear24(x, packed)
    forms = {"2:4": [lambda: call(x)], "F.linear": [lambda: F.linear(x, w)]}
    found = common.turns(forms, 0.5, True, device)
    if device == "cpu":
        data = torch.ones(2 * common.last_cache(), dtype=torch.uint8)
        cold = common.turns(forms, 1.0, before=lambda: common.read(data, common.READS[0]))
        found |= {f"{name} swept": seconds for name, seconds in cold.items()}
    return {name: 1e6 * seconds for name, seconds in found.items()}


def verdicts(rows, threads):
    """Lines: each goal's geometric mean and worst shape, streamed.

    For one token also what the ratio would be if ours read its bytes at the whole bandwidth.
    """
    mine = [r for r in rows if r["threads"] == threads and r["cache"] == "streamed"]
    for name, tokens, ours, peers, goal in GOALS:
        ratios, limits = [], []
        for row in mine:
            best = [row[peer] for peer in peers if peer in row]
            if row["M"] in tokens and best and ours in row:
                ratios.append((min(best) / row[ours], f"M {row['M']} {row['N']}x{row['K']}"))
                limits.append(ratios[-1][0] / row.get(f"{ours} of bandwidth", math.nan))
        if ratios:
            mean = math.exp(sum(math.log(r) for r, _ in ratios) / len(ratios))
            bound = math.exp(sum(math.log(r) for r in limits) / len(limits)) if tokens == (1,) else math.nan
            met = "" if goal is None else f"; goal {goal}: met by {sum(r >= goal for r, _ in ratios)} of {len(ratios)}"
            possible = "" if math.isnan(bound) else f"; at the whole bandwidth {bound:.2f}x"
            yield f"{name}: {mean:.2f}x, worst {min(ratios)[0]:.2f}x ({min(ratios)[1]}){met}{possible}"
    for ours in ("2:4 bf16", "2:4 bf16 kernel", "2:4 int8", "2:4 int8 kernel", "dense bf16 GEMV", "dense int8 GEMV"):
        shares = [(r[f"{ours} of bandwidth"], f"{r['N']}x{r['K']}") for r in mine if r["M"] == 1 and ours in r]
        if shares:
            mean = sum(s for s, _ in shares) / len(shares)
            text = f"decode {ours}, share of bandwidth: {mean:.2f}, worst {min(shares)[0]:.2f} ({min(shares)[1]})"
            met = f"; goal 0.85: met by {sum(s >= 0.85 for s, _ in shares)} of {len(shares)}"
            yield text + (met if ours in ("2:4 bf16", "2:4 int8") else "")


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_threads = sorted({r["threads"] for r in rows})
    figure, axes = plt.subplots(1, len(all_threads), figsize=(6 * len(all_threads), 4), sharey=True, squeeze=False)
    for ax, threads in zip(axes[0], all_threads, strict=True):
        for ours, peers, color in (
            ("2:4 bf16", FLOAT_PEERS, "tab:blue"),
            ("2:4 int8", (*FLOAT_PEERS, "torch int8"), "tab:orange"),
        ):
            points = [
                (r["M"], min(r[p] for p in peers if p in r) / r[ours])
                for r in rows
                if r["threads"] == threads and r["cache"] == "streamed" and ours in r
            ]
            ax.plot(*zip(*points, strict=True), "o", alpha=0.6, color=color, label=f"{ours} over best dense")
        ax.axhline(1, color="gray", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=f"{threads} thread{'s' * (threads > 1)}, streamed")
        ax.legend()
    axes[0][0].set_ylabel("times faster; a point is a shape")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "bench linear24", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--caches", nargs="+", choices=["streamed", "hot"], default=["streamed", "hot"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--budget", type=float, default=0.7, help="seconds for a shape and number of tokens")
    parser.add_argument("--short", action="store_true", help="one layer of two models, three numbers of tokens")
    parser.add_argument("--csv", help="write the times (microseconds) to this file")
    parser.add_argument("--json", help="write the same with machine and limits to this file")
    parser.add_argument("--plot", help="write a picture to this file")
    args = parser.parse_args(arguments)
    shapes = [(model, n, k) for model in args.models for n, k in MODELS[model]]
    if args.short:
        shapes = [("smollm2-135m", 1536, 576), ("llama-3.2-1b", 8192, 2048)]
        args.tokens, args.caches, args.budget = [1, 16, 256], ["streamed"], 0.3
    about = {"machine": common.machine(), "limits": {}}
    print(", ".join(f"{key} {value}" for key, value in about["machine"].items()))
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        limit = about["limits"][threads] = common.limits(threads, args.device) | {"overhead us": overhead(args.device)}
        us = ", ".join(f"{name} {value:.1f} us" for name, value in limit["overhead us"].items())
        print(
            f"\n{threads} threads: {limit['GB/s']:.1f} GB/s read, {limit['GFLOP/s']:.0f} GFLOP/s; an empty call: {us}"
        )
        for model, n, k in shapes:
            for tokens in args.tokens:
                found, shares = measure(n, k, tokens, args.caches, args.budget, args.device, limit.get("read"))
                for cache, seconds in found.items():
                    row = {"threads": threads, "model": model, "N": n, "K": k, "M": tokens, "cache": cache}
                    row |= {name: round(1e6 * s, 2) for name, s in seconds.items()}
                    if cache == "streamed":
                        row |= {f"{name} of bandwidth": round(share, 3) for name, share in shares.items()}
                    rows.append(row)
                    fastest = sorted(seconds.items(), key=lambda f: f[1])
                    times = ", ".join(f"{name} {1e6 * s:.0f}" for name, s in fastest)
                    print(f"{n}x{k} M {tokens} {cache}: {times} us", flush=True)
        print(*verdicts(rows, threads), sep="\n")
    common.write(rows, about, args.csv, args.json)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
