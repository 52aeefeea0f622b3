"""Times masked_swiglu (forward and backward with both scores) and column_sqnorm_ against plain PyTorch.

    persona-pruner bench importance --threads 1 2 --channels 1536 8192 --json out.json

Every shape is checked against float64 before it is timed. The contestants take turns within one run, on inputs that
rotate through --memory MB, so that they come from memory (column_sqnorm_ also on one input, which stays in the last
cache as what a layer has just computed does, and beside a mere read of the input, which no kernel can beat); a figure
is a median. "GB/s" counts the least bytes the op can move (6 B an element forward and 10 B backward in 16-bit types,
twice that in float32); "copy" is what a plain tensor copy reaches on the same threads.
"""

import argparse
import json
import platform
import random
import statistics
import time

import torch
import torch.nn.functional as F

from persona_pruner.benchmarks import common
from persona_pruner.ops import column_sqnorm_, masked_swiglu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def plain(gate, up, mask, taylor, fisher, act):
    """What one would write: autograd, and a hook for the scores."""
    value = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
    h = value * mask.to(value.dtype)

    def scores(dh):
        score = (value.detach() * dh).float()
        taylor.add_(score.sum(0))
        fisher.add_(score.square().sum(0))

    h.register_hook(scores)
    return h


class _Tuned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, mask, taylor, fisher, act):
        ctx.save_for_backward(gate, up, mask)
        ctx.rest = taylor, fisher, act
        value = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
        return value.mul_(up).mul_(mask.to(gate.dtype))

    @staticmethod
    def backward(ctx, dh):
        gate, up, mask = ctx.saved_tensors
        taylor, fisher, act = ctx.rest
        value = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
        score = (value * up).mul_(dh).float()
        d_mask = score.sum(0)
        taylor += d_mask
        fisher += score.square_().sum(0)
        dh = dh * mask.to(dh.dtype)
        d_up = value.mul_(dh)
        dh.mul_(up)
        if act == "silu":
            return torch.ops.aten.silu_backward(dh, gate), d_up, d_mask, None, None, None
        return torch.ops.aten.gelu_backward(dh, gate, approximate="tanh"), d_up, d_mask, None, None, None


def tuned(gate, up, mask, taylor, fisher, act):
    """The best we know without a compiler: hand-written backward, in place, the sum shared by d_mask and taylor."""
    return _Tuned.apply(gate, up, mask, taylor, fisher, act)


def ours(gate, up, mask, taylor, fisher, act):
    return masked_swiglu(gate, up, mask, act, taylor, fisher)


def step(form, inputs, act):
    """One forward and backward; returns (h, d_gate, d_up, d_mask, taylor, fisher)."""
    gate, up, mask, dh = inputs
    leaves = [x.detach().requires_grad_() for x in (gate, up, mask)]
    taylor, fisher = (torch.zeros(mask.shape, dtype=mask.dtype, device=mask.device) for _ in range(2))
    h = form(*leaves, taylor, fisher, act)
    h.backward(dh)
    return h.detach(), *(x.grad for x in leaves), taylor, fisher


def turns(forms: dict, sets: list, repeats: int, device: str) -> dict:
    """Median seconds of each form; the forms take turns in an order of its own each round, the inputs rotate.

    The order matters: what the form before has written goes to memory while the next one reads.
    """
    times, order = {name: [] for name in forms}, random.Random(0)
    for i in range(repeats + 1):
        for name, run in order.sample(list(forms.items()), len(forms)):
            inputs = sets[i % len(sets)]
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def check(got, want, oracle, what):
    names = ("h", "d_gate", "d_up", "d_mask", "taylor", "fisher")
    for name, x, y, exact in zip(names, got, want, oracle, strict=False):
        error, allowed = ((v.double() - exact).abs().max().item() for v in (x, y))
        if not error <= 2 * allowed + 1e-6 * exact.abs().max().item():
            raise SystemExit(f"{what}: {name} is off by {error:.3g}, plain PyTorch by {allowed:.3g}; nothing is timed")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "bench importance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--channels", type=int, nargs="+", default=[1536, 3072, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--acts", nargs="+", default=["silu"], choices=["silu", "gelu_tanh"])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", type=int, default=600, help="MB of inputs to rotate through")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(arguments)

    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.dtypes:
            for channels in args.channels:
                for act in args.acts:
                    row = {"threads": threads, "dtype": name, "tokens": args.tokens, "channels": channels, "act": act}
                    row |= measure(args, DTYPES[name], channels, act)
                    rows.append(row)
                    print(
                        f"{threads} threads {name} [{args.tokens}, {channels}] {act}: fwd+bwd {row['ours_ms']:.2f} ms, "
                        f"{row['plain_over_ours']:.2f}x plain, {row['tuned_over_ours']:.2f}x tuned, "
                        f"{row['gbs']:.1f} GB/s (copy {row['copy_gbs']:.1f}); "
                        f"forward {row['forward_gain']:.2f}x plain; "
                        f"sqnorm {row['sqnorm_gain']:.2f}x, {row['sqnorm_gbs']:.1f} GB/s, "
                        f"{row['sqnorm_hot_gain']:.2f}x on what is in the caches "
                        f"(a mere read {row['read_gain']:.2f}x, {row['read_hot_gain']:.2f}x)",
                        flush=True,
                    )
    if args.json:
        report = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "rows": rows}
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


def measure(args, dtype, channels, act) -> dict:
    size = args.tokens * channels
    count = max(3, -(-args.memory * 10**6 // (3 * size * dtype.itemsize)))

    def inputs():
        gate, up, dh = (torch.randn(args.tokens, channels, device=args.device).to(dtype) for _ in range(3))
        return gate, up, torch.rand(channels, device=args.device).round(), dh

    sets = [inputs() for _ in range(count)]
    wide = [x.double() for x in sets[0]]
    oracle = step(plain_double, wide, act)
    check(step(ours, sets[0], act), step(plain, sets[0], act), oracle, f"{dtype} [{args.tokens}, {channels}] {act}")
    norms, exact = torch.zeros(channels, device=args.device), wide[0].square().sum(0)
    check([column_sqnorm_(sets[0][0], norms)], [sets[0][0].float().pow(2).sum(0)], [exact], "column_sqnorm_")
    del wide, oracle

    @torch.no_grad()
    def forward(form):
        return lambda x: form(*x[:3], act)

    forms = {"ours": ours, "plain": plain, "tuned": tuned}
    both = turns(
        {name: lambda x, form=form: step(form, x, act) for name, form in forms.items()},
        sets, args.repeats, args.device,
    )  # fmt: skip
    target = torch.empty_like(sets[0][0])
    single = turns(
        {
            "ours": forward(lambda gate, up, mask, act: masked_swiglu(gate, up, mask, act)),
            "plain": forward(lambda gate, up, mask, act: F.silu(gate) * up * mask.to(gate.dtype)),
            "copy": lambda x: target.copy_(x[1]),
        },
        sets, args.repeats, args.device,
    )  # fmt: skip
    forms = {
        "sqnorm": lambda x: column_sqnorm_(x[0], norms),
        "plain sqnorm": lambda x: norms.add_(x[1].float().pow(2).sum(0)),
        "read": lambda x: common.read(x[2], (8, 512)) if args.device == "cpu" else x[2].sum(),
    }
    # Each on an input of its own: what one has read the other would find in the caches.
    streams = [tuple(sets[(i + j * count // 3) % count][0] for j in range(3)) for i in range(count)]
    single |= turns(forms, streams, 2 * args.repeats, args.device)
    hot = turns(forms, [(sets[0][0],) * 3], 4 * args.repeats, args.device)
    element = size * dtype.itemsize / 1e9
    return {
        "ours_ms": both["ours"] * 1e3,
        "plain_over_ours": both["plain"] / both["ours"],
        "tuned_over_ours": both["tuned"] / both["ours"],
        "gbs": 8 * element / both["ours"],
        "copy_gbs": 2 * element / single["copy"],
        "forward_gain": single["plain"] / single["ours"],
        "sqnorm_gain": single["plain sqnorm"] / single["sqnorm"],
        "sqnorm_gbs": element / single["sqnorm"],
        "read_gain": single["plain sqnorm"] / single["read"],
        "sqnorm_hot_gain": hot["plain sqnorm"] / hot["sqnorm"],
        "read_hot_gain": hot["plain sqnorm"] / hot["read"],
    }


def plain_double(gate, up, mask, taylor, fisher, act):
    return masked_swiglu(gate, up, mask, act, taylor, fisher, backend="reference")


if __name__ == "__main__":
    main()
