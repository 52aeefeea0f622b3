"""Times subset_ffn on the CPU against the same FFN physically sliced, and against torch on the slice.

    persona-pruner bench subset_ffn --threads 1 2

SmolLM2-135M's FFN (1536 channels of 576) with a random half of the channels kept; "arranged" is the half of a character
in a fleet that has arranged its channels (Fleet.arrange) for sixteen that share 82% of theirs, as bench fleet's do.
Weights are streamed: calls rotate through copies in huge pages, of twice the last-level cache where `--cache-bytes`
does not say less. "sliced" is our own kernel on weights that hold the kept channels only, three matrices as in a slim
checkpoint; in "sliced, together", as in "subset", "arranged" and "dense" (all channels), the three rows of a channel
lie next to each other, as the fleet keeps them. Results are compared with float64 before anything is timed; forms take
turns and a figure is a median that contains the call from Python.
"""

import argparse
import math

import torch

from persona_pruner import ops
from persona_pruner.benchmarks import common
from persona_pruner.fleet.characters import popular_first
from persona_pruner.fleet.memory import Arena

WIDTH, HIDDEN, KEPT = 1536, 576, 768
KINDS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp32": torch.float32}


def weights(kind, width, seed):
    """Three weights [width, HIDDEN] with their scales."""
    generator = torch.Generator().manual_seed(seed)
    full = [torch.randn(width, HIDDEN, generator=generator) * HIDDEN**-0.5 for _ in range(3)]
    if kind != torch.int8:
        return [w.to(kind) for w in full], (None,) * 3
    pairs = [ops.quantize24(w) for w in full]
    return [values for values, _ in pairs], tuple(scales for _, scales in pairs)


def call(x, w, scales, channels, segments):
    backend = ops.subset_ffn_op.ready(x.device)[0]
    return backend.run(x, w, channels, segments, "silu", scales, (None,) * 3, None, 0.0, None)


def torch_call(x, w):
    return (torch.nn.functional.silu(x @ w[0].T) * (x @ w[1].T)) @ w[2]


def exact(x, w, scales, channels):
    wide = [t.double() if s is None else t.double() * s.double()[:, None] for t, s in zip(w, scales, strict=True)]
    return ops.subset_ffn(x.double(), *wide, channels, backend="reference")


def arranged():
    """int32 [KEPT]: places of a character's channels after Fleet.arrange."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(WIDTH, generator=generator) + 0.43 * torch.randn(16, WIDTH, generator=generator)
    kept = torch.zeros(16, WIDTH, dtype=torch.bool).scatter_(1, scores.topk(KEPT).indices, True)
    place = popular_first(kept.sum(0).numpy()).argsort()
    return torch.from_numpy(place[kept[0].numpy()]).sort().values.int()


def measure(kind, rows, size, budget):
    arena = Arena(torch.device("cpu"))
    dense, scales = weights(kind, WIDTH, rows)
    kept = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:KEPT].sort().values
    sliced = [w[kept] for w in dense]
    every = torch.arange(WIDTH).int()
    lists = {
        "subset": kept.int(),
        "arranged": arranged(),
        "sliced": every[:KEPT],
        "sliced, together": every[:KEPT],
        "dense": every,
    }
    x, calls = torch.randn(rows, HIDDEN), {}
    for name, channels in lists.items():
        cut = name.startswith("sliced")
        source = sliced if cut else dense
        own = tuple(None if s is None else s[kept] for s in scales) if cut else scales
        segments = torch.tensor([[rows, 0, len(channels)]])
        got, want = call(x, source, own, channels, segments).double(), exact(x, source, own, channels)
        if not (got - want).norm() <= 1e-5 * want.norm():
            raise SystemExit(f"subset_ffn, {name}: wrong result; nothing is timed")
        copies = max(2, math.ceil(size / sum(w.nbytes for w in dense)))
        memory = [
            [arena.copy(w) for w in source] if name == "sliced" else arena.copy(torch.stack(source, 1)).unbind(1)
            for _ in range(copies)
        ]
        calls[name] = [
            lambda w=w, own=own, channels=channels, segments=segments: call(x, w, own, channels, segments)
            for w in memory
        ]
        if name == "sliced" and kind != torch.int8:
            calls["torch, sliced"] = [lambda w=w: torch_call(x.to(kind), w) for w in memory]
    return common.turns(calls, budget)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["bf16", "int8"])
    parser.add_argument("--cache-bytes", type=int, default=2 * common.last_cache())
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a shape")
    parser.add_argument("--csv")
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    about, rows = common.machine(), []
    print(about)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for kind in args.kinds:
            for tokens in args.rows:
                seconds = measure(KINDS[kind], tokens, args.cache_bytes, args.budget)
                shown = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in seconds.items())
                print(f"{threads} threads, {kind}, {tokens} rows: {shown}")
                for name in ("subset", "arranged"):
                    ratio, strict = (seconds[name] / seconds[peer] for peer in ("sliced", "sliced, together"))
                    met = "met" if ratio <= 1.1 else "missed"
                    print(f"    {name}/sliced {ratio:.2f} (goal 1.10: {met}), {strict:.2f} together", flush=True)
                rows.append({"threads": threads, "kind": kind, "rows": tokens, **seconds})
    common.write(rows, {"machine": about}, args.csv, args.json)


if __name__ == "__main__":
    main()
