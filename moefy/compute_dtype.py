"""The dtype to compute in: the stored one where the machine supports it, else float32.

Stored dtypes never change. A processor without instructions for bfloat16 or float16 converts to
float32 and back, and takes several to several hundred times as long.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from moefy.errors import MoefyError

INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx10_2"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx10_1", "avx10_2"),
}
"""Instructions that multiply in a dtype; an x86 processor needs one of them."""

SLOW = 1.5
"""A dtype whose product takes this many times as long as in float32 is not native. Measured: 0.4
with instructions (AVX512-BF16), 2.4 to 200 without."""

ROWS, WIDTH = 128, 512
"""Sizes of the timed product: a chunk of tokens, a small model's layer."""


@dataclass(frozen=True)
class ComputeDtype:
    """The dtype of a loaded model, and why it is not the stored one."""

    dtype: torch.dtype
    note: str = ""  # one line for the user, or empty

    @property
    def name(self) -> str:
        """The dtype as a value of `--compute-dtype`."""
        return name_of(self.dtype)


def compute_dtype(
    choice: str,
    stored: torch.dtype,
    device: torch.device,
    *,
    float32_bytes: int,
    room: int,
) -> ComputeDtype:
    """The dtype to compute in for weights that are stored as `stored`.

    `choice` is a value of `--compute-dtype`. `auto` is the stored dtype where `device` supports it,
    else float32 if its `float32_bytes` fit in `room` bytes, else the stored dtype.

    Raises:
        MoefyError: code 5 if float32 was chosen and does not fit.
    """
    short = f"float32 takes {float32_bytes / 1e9:.1f} GB, there are {room / 1e9:.1f} GB"
    if choice != "auto":
        chosen: torch.dtype = getattr(torch, choice)
        if chosen == torch.float32 != stored and float32_bytes > room:
            raise MoefyError(f"--compute-dtype float32: {short}; leave it out", code=5)
        same = chosen == stored
        return ComputeDtype(chosen, "" if same else f"computes in {choice}, as asked for")
    if native(stored, device):
        return ComputeDtype(stored)
    name, slower = name_of(stored), slowness(stored, device)
    if float32_bytes > room:
        times = f"{slower:.1f} times slower than in float32 on this machine: {short}"
        return ComputeDtype(stored, f"computes in {name}, as stored, {times}")
    times = f"this machine is {slower:.1f} times slower in that"
    return ComputeDtype(torch.float32, f"computes in float32, not in {name} as stored: {times}")


def native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` computes in `dtype` about as fast as in float32, or faster.

    This checks the instruction set, then times a small product once a process: a library may
    convert even if the instructions exist.
    """
    if dtype not in INSTRUCTIONS:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    listed = torch.cpu.get_capabilities()
    x86 = listed.get("architecture") in ("x86_64", "AMD64")
    if x86 and not any(listed.get(name, False) for name in INSTRUCTIONS[dtype]):
        return False  # no other architecture gives a list
    return slowness(dtype, device) < SLOW


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def slowness(dtype: torch.dtype, device: torch.device) -> float:
    """Time of a small product in `dtype`, as a multiple of that in float32."""
    if device.type != "cpu":
        return 1.0
    return _seconds(dtype) / _seconds(torch.float32)


@functools.cache
def _seconds(dtype: torch.dtype) -> float:
    """Processor seconds of one product, the least of five.

    Wall time on a busy machine gave a factor of 51 instead of 4.5.
    """
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight_FD = torch.randn(WIDTH, WIDTH, generator=generator).to(dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(6):
            start = time.process_time()
            torch.nn.functional.linear(x_TD, weight_FD)
            seconds.append(time.process_time() - start)
    return max(min(seconds[1:]), 1e-9)  # the first one also builds the kernel
