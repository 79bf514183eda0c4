"""Decoding by CUDA graphs: a static cache, and transformers' own compiled call.

At small batches a GPU waits for Python to start its kernels; a graph starts all of a step at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

LIMIT = 64
"""Versions of a call that torch may compile: one for each model, way and shape."""


class Graphed:
    """A model that decodes by CUDA graphs, called as the model itself is.

    A call without a cache reads a prompt into a static one with room for `new_tokens` more. Graphs
    hold the addresses of its tensors, so that prompts of one shape share it. The first steps in a
    cache compile and record. `backend` is that of `torch.compile`, whose own needs a GPU.
    """

    def __init__(self, model: Any, new_tokens: int, backend: str = "inductor") -> None:
        self.model, self.new_tokens = model, new_tokens
        self.config = CompileConfig(backend=backend)
        self.caches: dict[tuple[int, int], StaticCache] = {}

    def __call__(self, ids_BT: Tensor, *, cache: Any = None, **more: Any) -> Any:
        """The model's output, which holds the cache."""
        if cache is None:
            cache = self._cache(*ids_BT.shape)
            return self.model(ids_BT, cache=cache, **more)
        with torch._dynamo.config.patch(recompile_limit=LIMIT):
            return self.model.get_compiled_call(self.config)(ids_BT, cache=cache, **more)

    def set_experts_implementation(self, name: str) -> None:
        """Set the way to compute the model's experts."""
        self.model.set_experts_implementation(name)

    def _cache(self, batch: int, context: int) -> StaticCache:
        length = context + self.new_tokens
        if (batch, length) not in self.caches:
            self.caches[batch, length] = StaticCache(self.model.config, max_cache_len=length)
        cache = self.caches[batch, length]
        cache.reset()
        return cache
