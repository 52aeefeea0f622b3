"""select24: keep the best two of each four weights along K and pack them, in one pass.

    score[n, k] = abs(weight[n, k]) * col_scale[k]              float32 (float64 for a float64 weight)
    of each group weight[n, 4g : 4g + 4] the two highest scores stay, ties to the lowest index

values [N, K/2], dtype of weight: the kept weights in column order, bit for bit (-0.0 stays -0.0).
meta   [N, ceil(K/8)] uint8: a nibble `idx0 | idx1 << 2` for each group, idx0 < idx1, low nibble = lower columns;
       with K % 8 == 4 the unused high nibble of a row is 4, the pattern (0, 1).
A weight or scale that is NaN, or a score that is (inf * 0), is refused: no order exists among such scores.
"""

import torch

from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.ops._dispatch import Backend, Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def select24(
    weight: torch.Tensor, col_scale: torch.Tensor | None = None, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune `weight` [N, K] to 2:4 by abs(weight) * col_scale and return (values [N, K/2], meta uint8 [N, ceil(K/8)]).

    weight: float32, bfloat16, float16 or float64, K a multiple of 4. col_scale [K]: importance of each input column,
    for instance the norm of the activations; None means 1. Not differentiable. Raises InputError on other shapes and
    dtypes, and on NaN scores.
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise InputError(f"select24: weight must be [N, K] with K a multiple of 4, got {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise InputError(f"select24: weight is {weight.dtype}; float32, bfloat16, float16 and float64 are supported")
    weight = weight.detach().contiguous()
    if col_scale is not None:
        if col_scale.shape != (weight.shape[1],) or col_scale.device != weight.device:
            raise InputError(
                f"select24: col_scale must be [{weight.shape[1]}] on {weight.device}, "
                f"got {list(col_scale.shape)} on {col_scale.device}"
            )
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        col_scale = col_scale.detach().to(exact).contiguous()
    return OP.pick(weight.device, backend, weight, col_scale).run(weight, col_scale)


def reference(weight: torch.Tensor, col_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain PyTorch: a stable sort of every group."""
    rows, cols = weight.shape
    score = weight.abs() if weight.dtype == torch.float64 else weight.abs().float()
    if col_scale is not None:
        score = score * col_scale
    if score.isnan().any():
        raise nan_error()
    groups = score.view(rows, cols // 4, 4)
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(dim=-1).values
    values = weight.view(rows, cols // 4, 4).gather(-1, kept).view(rows, cols // 2)
    return values, pack_meta(kept)


def pack_meta(kept: torch.Tensor) -> torch.Tensor:
    """meta uint8 [N, ceil(G/2)] of the kept positions [N, G, 2] (integers 0..3, ascending in the last axis)."""
    nibble = (kept[..., 0] | kept[..., 1] << 2).to(torch.uint8)
    if nibble.shape[1] % 2:
        nibble = torch.cat([nibble, nibble.new_full((nibble.shape[0], 1), 4)], dim=1)
    return nibble[:, 0::2] | nibble[:, 1::2] << 4


def nan_error() -> InputError:
    """What every backend raises when a score is NaN."""
    return InputError("select24: a weight, a scale or their product is NaN")


def _cpu_run(weight, col_scale):
    rows, cols = weight.shape
    values = weight.new_empty(rows, cols // 2)
    meta = weight.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    scale = 0 if col_scale is None else col_scale.data_ptr()
    select = getattr(_native.cpu_module(), f"select24_{NATIVE[weight.dtype]}")
    if select(weight.data_ptr(), scale, values.data_ptr(), meta.data_ptr(), rows, cols, torch.get_num_threads()):
        raise nan_error()
    return values, meta


def _cpu_unavailable(device_type):
    if device_type != "cpu":
        return "it takes CPU tensors"
    module = _native.cpu_module()
    return module if isinstance(module, str) else None


def _refuses(weight, col_scale):
    return None if weight.dtype in NATIVE else f"it has no {weight.dtype} kernel"


def _gpu(select):
    """A backend from `select(weight, kind, col_scale, values, meta, nan)`, which sets nan int32 [1] on a NaN score."""

    def run(weight, col_scale):
        rows, cols = weight.shape
        values = weight.new_empty(rows, cols // 2)
        meta = weight.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
        nan = weight.new_zeros(1, dtype=torch.int32)
        if values.numel():
            with _native.on_device(weight):
                select(weight, NATIVE[weight.dtype], col_scale, values, meta, nan)
        if nan.item():
            raise nan_error()
        return values, meta

    return run


def _cuda_select(weight, kind, col_scale, values, meta, nan):
    stream, device = torch.cuda.current_stream().cuda_stream, weight.device.index
    launch(_native.cuda_module(), weight, kind, col_scale, values, meta, nan, device, stream)


def launch(module, weight, kind, col_scale, values, meta, nan, device, stream) -> None:
    """One launch of csrc/cuda/select24.cu: two groups a thread in 16-bit types, one where rows are not aligned so."""
    rows, cols = weight.shape
    if weight.data_ptr() % (4 * weight.element_size()):
        weight = weight.clone()
    if col_scale is not None and col_scale.data_ptr() % 16:
        col_scale = col_scale.clone()
    pairs = cols % 8 == 0 and weight.element_size() == 2 and weight.data_ptr() % 16 == 0
    threads = -(-rows // 8) * meta.shape[1] * (1 if pairs else 2)  # a thread takes eight rows
    blocks = -(-threads // 256)
    kernel = module.select24_kernels()[f"{kind}_{2 if pairs else 1}"]
    scale = 0 if col_scale is None else col_scale.data_ptr()
    pointers = weight.data_ptr(), scale, values.data_ptr(), meta.data_ptr(), nan.data_ptr()
    module.select24(kernel, blocks, *pointers, rows, cols, device, stream)


def _triton_select(weight, kind, col_scale, values, meta, nan):
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    _native.triton_kernels("select24").select24(weight.view(bits), kind, col_scale, values.view(bits), meta, nan)


def _cuda_unavailable(device_type):
    if device_type != "cuda" or torch.version.hip:
        return "it takes tensors on an NVIDIA GPU"
    module = _native.cuda_module()
    return module if isinstance(module, str) else None


def _gpu_refuses(weight, col_scale):
    return "a tensor has 2^31 elements or more" if weight.numel() >= 2**31 else _refuses(weight, col_scale)


OP = Op(
    "select24",
    [
        Backend("cpu", _cpu_run, _cpu_unavailable, _refuses),
        Backend("cuda", _gpu(_cuda_select), _cuda_unavailable, _gpu_refuses),
        Backend("triton", _gpu(_triton_select), _native.triton_unavailable("select24"), _gpu_refuses),
        Backend("reference", reference),
    ],
)
