"""2:4 sparse linear layers, and models whose linears are replaced by them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.ops import Packed24, bind24, check24, column_sqnorm_, linear24, quantize24, select24, unpack24

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SparseLinear24(nn.Module):
    """A linear layer whose weight holds at most two nonzeros in every four inputs, packed: y = x W^T + bias.

    Buffers `values` [out, in/2], `meta` uint8 [out, ceil(in/8)] (see `ops.select24`) and, for int8 values, `scales`
    float32 [out]; `bias` [out] is a Parameter or None. Differentiable with respect to x and bias.

    The buffer `weight` is one NaN. It keeps a packed state dict from passing for a dense one: loading it into
    nn.Linear fails on the shape, with strict=False too, and a loader that broadcasts gives NaN. Its dtype is the one
    the layer computes in: x of another floating type is cast to it, and y back.

    A new layer is all zeros; `from_linear` makes one from weights. weight_dtype torch.int8 stores int8 values; else
    they have `dtype`. Raises InputError unless in_features is a multiple of 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        weight_dtype = weight_dtype or dtype
        if in_features % 4:
            raise InputError(f"SparseLinear24: in_features must be a multiple of 4, got {in_features}")
        _check_dtypes(dtype, weight_dtype)
        self.in_features, self.out_features = in_features, out_features
        shape, packed = (out_features, in_features // 2), (out_features, -(-in_features // 8))
        self.register_buffer("values", torch.zeros(shape, dtype=weight_dtype, device=device))
        self.register_buffer("meta", torch.full(packed, 0x44, dtype=torch.uint8, device=device))
        scales = torch.zeros(out_features, dtype=torch.float32, device=device) if weight_dtype == torch.int8 else None
        self.register_buffer("scales", scales)
        self.register_buffer("weight", torch.full((1,), torch.nan, dtype=dtype, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )
        self._bound = None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        col_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        exact: bool = False,
    ) -> "SparseLinear24":
        """The two of every four weights of `linear` with the highest abs(weight) * col_scale, packed.

        col_scale [in]: importance of each input, e.g. the norm of its activations; None means 1. dtype: of the values
        (and of bias and x), or torch.int8 for int8 values with a scale a row; None keeps the weight's. The choice is
        made before any rounding. exact=True refuses a weight that is not 2:4 already. Raises InputError for
        in_features that are no multiple of 4, NaN, and other dtypes.
        """
        weight = linear.weight
        values, meta = select24(weight, col_scale)
        if exact and not torch.equal(unpack24(values, meta), weight):
            raise InputError("the weight is not 2:4: a group of four holds three nonzeros or more")
        compute = weight.dtype if dtype in (None, torch.int8) else dtype
        _check_dtypes(compute, dtype or compute)
        layer = cls(linear.in_features, linear.out_features, False, "meta", compute, dtype)
        layer.values, layer.meta = values, meta
        if dtype == torch.int8:
            layer.values, layer.scales = quantize24(values)
        elif values.dtype != compute:
            layer.values = values.to(compute)
        layer.weight = torch.full((1,), torch.nan, dtype=compute, device=weight.device)
        if linear.bias is not None:
            same = linear.bias.dtype == compute
            bias = linear.bias if same else nn.Parameter(linear.bias.to(compute), linear.bias.requires_grad)
            layer.bias = bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y = linear24(x.to(self.weight.dtype), self.values, self.meta, self.bias, scales=self.scales)
            return y.to(x.dtype)
        buffers, bound = self._buffers, self._bound
        values, meta, scales = buffers["values"], buffers["meta"], buffers["scales"]
        bias = self._parameters["bias"]
        # what was prepared for these very tensors is used again; moving, casting or assigning makes new ones
        if (
            bound is None
            or bound[0] is not values
            or bound[1] is not meta
            or bound[2] is not scales
            or bound[3] is not bias
        ):
            call = bind24(Packed24(values, meta, scales), bias)
            self._bound = bound = (values, meta, scales, bias, call, self.weight.dtype)
        if x.dtype is not bound[5] and x.is_floating_point():
            return bound[4](x.to(bound[5])).to(x.dtype)
        return bound[4](x)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out, in] with zeros, in `dtype` or the one the layer computes in."""
        return unpack24(self.values, self.meta, self.scales).to(dtype or self.weight.dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear layer with the dense weight and this layer's bias."""
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = self.bias
            same = bias.dtype == weight.dtype
            linear.bias = bias if same else nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        return linear.train(self.training)

    def check(self) -> None:
        """Raises InputError unless shapes and dtypes fit and the metadata is legal."""
        if self.values.shape != (self.out_features, self.in_features // 2):
            raise InputError(f"values are {list(self.values.shape)} in a layer of {self.extra_repr()}")
        check24(self.values, self.meta, self.scales)

    @property
    def packed_bytes(self) -> int:
        """Bytes of values, metadata and scales."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.meta, self.scales) if t is not None)

    def extra_repr(self) -> str:
        kind = str(self.values.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)  # a cast of the model leaves the scales exact
        self._bound = None
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        self._bound = None  # loading writes into the same tensors
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**super().__getstate__(), "_bound": None}


def _check_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    if dtype not in FLOATS or weight_dtype not in (dtype, torch.int8):
        raise InputError(
            f"SparseLinear24: weights of {weight_dtype} computing in {dtype}; "
            "float32, bfloat16, float16 and float64 are supported, and int8 weights with any of them"
        )


@dataclass(frozen=True)
class SparsifyReport:
    """Names of the layers that were packed, and the bytes of their weights (without biases) before and after."""

    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Bytes after over bytes before."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    def __str__(self) -> str:
        mb = 1e-6
        return (
            f"{len(self.layers)} linear layers packed 2:4: {self.bytes_before * mb:.1f} MB -> "
            f"{self.bytes_after * mb:.1f} MB ({self.ratio:.2f}x)"
        )


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside the decoder layers by its name in the model: not the embeddings, not lm_head."""
    inside = {id(module) for layer in models.decoder_layers(model) for module in layer.modules()}
    return {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) in inside
    }


def packed_layers(model: nn.Module) -> dict[str, SparseLinear24]:
    """Every SparseLinear24 of a model by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear24)}


def weights(model: nn.Module) -> int:
    """How many weights a model stores; of every four of a packed layer two."""
    return sum(p.numel() for p in model.parameters()) + sum(m.values.numel() for m in packed_layers(model).values())


def _chosen(model: nn.Module, filter_fn: Callable[[str, nn.Linear], bool] | None) -> dict[str, nn.Linear]:
    if filter_fn is None:
        return block_linears(model)
    linears = ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear)
    return {name: linear for name, linear in linears if filter_fn(name, linear)}


def _check_linear(name: str, linear: nn.Linear, scale: Tensor | None, shared: int) -> None:
    if linear.in_features % 4:
        raise InputError(f"{name} has {linear.in_features} inputs; 2:4 packing needs a multiple of 4")
    if linear.weight.dtype not in FLOATS:
        raise InputError(f"{name} is {linear.weight.dtype}; float32, bfloat16, float16 and float64 can be packed")
    if shared > 1:
        raise InputError(f"{name}.weight is tied to another layer's weight; leave it out with filter_fn")
    if not linear.weight.isfinite().all():
        raise InputError(f"{name}.weight holds Inf or NaN")
    if scale is not None and (scale.shape != (linear.in_features,) or not scale.isfinite().all()):
        raise InputError(f"the scores of {name} must be {linear.in_features} finite numbers, one an input")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def sparsify_(
    model: nn.Module,
    scores: Mapping[str, Tensor] | None = None,
    filter_fn: Callable[[str, nn.Linear], bool] | None = None,
    dtype: torch.dtype | None = None,
    *,
    exact: bool = False,
) -> SparsifyReport:
    """Replaces linear layers of a model by SparseLinear24, in place; the dense weights are freed one by one.

    Args:
        model: any module; by default the linears of its decoder layers are packed, never lm_head or embeddings.
        scores: importance [in_features] of the inputs of each layer by the layer's name, for instance
            `input_norms` (Wanda); None keeps the largest weights. A layer without scores is refused.
        filter_fn: `filter_fn(name, linear)` says which nn.Linear of the whole model to pack instead.
        dtype: of the values; torch.int8 for int8 with a scale a row; None keeps each weight's. Layers whose dtype
            is not the model's compute in their own.
        exact: refuse weights that are not 2:4 already, so that nothing changes.

    Raises InputError, before anything is changed (with exact: at the first such weight), for inputs that are no
    multiple of 4, weights that are not finite or tied to another module, and missing or misshapen scores.
    """
    chosen = _chosen(model, filter_fn)
    if not chosen:
        raise InputError("no linear layer to pack: none was chosen, or all are packed already")
    if dtype not in (None, torch.int8, *FLOATS):
        raise InputError(f"sparsify_: dtype {dtype} is not one of float32, bfloat16, float16, float64, int8")
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, linear in chosen.items():
        if scores is not None and name not in scores:
            raise InputError(f"scores has nothing for {name}")
        _check_linear(name, linear, None if scores is None else scores[name], owners[id(linear.weight)])
    names, before, after = tuple(chosen), 0, 0
    for name in names:
        linear = chosen.pop(name)  # the last reference here: the dense weight goes with it
        scale = None if scores is None else scores[name].to(linear.weight.device)
        try:
            layer = SparseLinear24.from_linear(linear, scale, dtype, exact=exact)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        before += linear.weight.numel() * linear.weight.element_size()
        after += layer.packed_bytes
        replace_module(model, name, layer)
    return SparsifyReport(names, before, after)


def desparsify_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces every SparseLinear24 by a dense layer with zeros, in place."""
    for name, layer in packed_layers(model).items():
        replace_module(model, name, layer.to_linear(dtype))
    return model


@contextmanager
def input_norms(
    model: nn.Module, filter_fn: Callable[[str, nn.Linear], bool] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within the context, what flows into the linears that `sparsify_` would pack is measured.

    Yields a dict that afterwards holds float32 [in_features] by layer name: the L2 norm of every input over all
    tokens seen, the score of Wanda (Sun et al., ICLR 2024) when multiplied with abs(weight).
    """
    norms: dict[str, Tensor] = {}

    def watch(name: str, linear: nn.Linear):
        norms[name] = torch.zeros(linear.in_features, dtype=torch.float32, device=linear.weight.device)

        def add(_, args) -> None:
            column_sqnorm_(args[0].detach(), norms[name])

        return linear.register_forward_pre_hook(add)

    hooks = [watch(name, linear) for name, linear in _chosen(model, filter_fn).items()]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms.values():
            norm.sqrt_()
