"""moefy: turn a dense Hugging Face checkpoint into a Mixture-of-Experts checkpoint.

    checkpoint -> walk -> profile -> partition -> route -> refit -> write -> report
                  one layer at a time, on the already converted prefix

Tensor names carry the letters of their axes: `T` tokens, `D` hidden size, `F` dense FFN neurons,
`S` shared neurons, `E` routed experts, `N` neurons per routed expert, `K` routed experts per
token, `L` layers, `V` vocabulary. `gate_FD` is a matrix with one row per FFN neuron.
"""

__version__ = "0.1.0"
