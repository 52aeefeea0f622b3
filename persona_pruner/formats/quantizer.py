"""The part of packed checkpoints that transformers calls: its quantizer interface. Imported only beside transformers.

Registered by `plugin`; the format itself is in `packed`.
"""

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from persona_pruner.errors import InputError
from persona_pruner.formats.packed import KINDS, METHOD, PLEA, VERSION
from persona_pruner.nn.sparse import SparseLinear24, desparsify_, packed_layers, replace_module


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: `modules` is {layer name: dtype of its values, or None}.

    None is the model's own dtype. Raises InputError for another version of the format or malformed modules.
    """

    def __init__(self, modules=None, version=None, quant_method=METHOD, **unknown):
        if version != VERSION or unknown:
            raise InputError(
                f"the checkpoint is packed in version {version} of the format, this persona_pruner reads {VERSION}"
            )
        if not isinstance(modules, dict) or not modules or not all(kind in (None, *KINDS) for kind in modules.values()):
            raise InputError("quantization_config of the packed checkpoint is damaged: modules are no names and dtypes")
        self.quant_method, self.version, self.modules = METHOD, version, dict(modules)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts SparseLinear24 in the place of the packed linears before loading, and checks them afterwards."""

    requires_calibration = True

    def update_attn_implementation(self, config):
        """A hook that has the config before transformers looks for the weights: the plea has been heard."""
        if getattr(config, "transformers_weights", None) == PLEA:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # transformers 5.15 to 5.17 has only this one

    def _process_model_before_weight_loading(self, model, **kwargs):
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        prefix = model.base_model_prefix + "."
        for written, kind in self.quantization_config.modules.items():
            # the bare decoder (AutoModel) calls its layers without the prefix that the causal LM's have
            name = written if written in linears else written.removeprefix(prefix)
            if name not in linears:
                raise InputError(f"the checkpoint packs {written}, which is no linear layer of {type(model).__name__}")
            linear = linears[name]
            shape, model_dtype = (linear.in_features, linear.out_features), linear.weight.dtype
            stored = KINDS[kind] if kind else model_dtype
            dtype = model_dtype if stored == torch.int8 else stored
            layer = SparseLinear24(*shape, linear.bias is not None, "meta", dtype, stored)
            replace_module(model, name, layer)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, layer in packed_layers(model).items():
            for key, tensor in [*layer.named_buffers(), *layer.named_parameters()]:
                if tensor.is_meta:
                    raise InputError(f"{name}.{key} has no memory: packed layers cannot be offloaded to disk")
                # transformers marks what came from the checkpoint; for the rest it only warns, and makes it up
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise InputError(f"{name}.{key} is missing in the checkpoint or has another shape")
            try:
                layer.check()
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        return model

    def _dequantize(self, model, dtype=None):
        return desparsify_(model, dtype)

    def is_serializable(self, *args, **kwargs):
        return True

    @property
    def is_trainable(self):
        return False

    @property
    def is_compileable(self):
        return True
