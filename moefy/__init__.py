"""moefy: turn a dense Hugging Face checkpoint into a Mixture-of-Experts checkpoint.

    checkpoint -> walk -> profile -> partition -> route -> refit -> write -> report
                  one layer at a time, on the already converted prefix

Tensor names carry the letters of their axes: `T` tokens, `D` hidden size, `F` dense FFN neurons,
`S` shared neurons, `E` routed experts, `N` neurons per routed expert, `K` routed experts per
token, `L` layers, `V` vocabulary. `gate_FD` is a matrix with one row per FFN neuron.
"""

__version__ = "0.1.0"

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _WithTransformers:
    """Imports `moefy.modeling` behind transformers, whose Auto classes it registers with.

    A finder, because transformers takes seconds to import and most commands can do without.
    """

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module("moefy.modeling")

            spec.loader.exec_module = exec_module
        return spec


if "transformers" in sys.modules:
    importlib.import_module("moefy.modeling")
else:
    sys.meta_path.insert(0, _WithTransformers())  # pyright: ignore[reportArgumentType]
