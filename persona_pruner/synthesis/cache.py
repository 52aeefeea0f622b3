"""A key/value cache that grows in place."""

from functools import cache

ROOM = 64  # tokens of spare room: one copy of the cache every so many steps instead of at every step


@cache
def _layer_class():
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """DynamicLayer that writes new tokens into spare room; `keys` and `values` are views of what is filled.

        Concatenating reads and writes the whole cache once a step, which is most of the time of a step
        for a batch that shares a long prompt.
        """

        store = None

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            old, new = self.get_seq_length(), key_states.shape[-2]
            mine = old and self.store is not None and self.keys.data_ptr() == self.store[0].data_ptr()
            if not mine or self.store[0].shape[-2] < old + new:
                shape = (*key_states.shape[:-2], old + new + ROOM, key_states.shape[-1])
                self.store = key_states.new_empty(shape), value_states.new_empty(shape)
                if old:
                    self.store[0][..., :old, :], self.store[1][..., :old, :] = self.keys, self.values
            self.store[0][..., old : old + new, :], self.store[1][..., old : old + new, :] = key_states, value_states
            self.keys, self.values = (tensor[..., : old + new, :] for tensor in self.store)
            return self.keys, self.values

    return GrowingLayer


def growing_cache(model):
    """An empty cache for the model. Layers with a sliding window keep every token: the caller's mask is the window."""
    from transformers import DynamicCache

    new = DynamicCache(config=model.config)
    new.layers = [_layer_class()() for _ in new.layers]
    return new
