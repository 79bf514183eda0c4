"""The dtype to compute in: the stored one if the machine has it, else float32 if that fits."""

import pytest
import torch

from moefy import compute_dtype as compute
from moefy.compute_dtype import compute_dtype, native
from moefy.errors import MoefyError

CPU = torch.device("cpu")
X86 = {"architecture": "x86_64"}


@pytest.fixture
def machine(monkeypatch):
    """Sets what the processor lists, and how long a product takes in each dtype."""

    def sets(listed, seconds):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed)
        monkeypatch.setattr(compute, "_seconds", lambda dtype: seconds.get(dtype, 1.0))

    return sets


def chosen(stored, asked="auto", float32_bytes=4, room=10):
    return compute_dtype(asked, stored, CPU, float32_bytes=float32_bytes, room=room)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_dtype_without_instructions_is_computed_in_float32(machine, stored):
    machine({**X86, "avx2": True}, {stored: 200.0})
    result = chosen(stored)
    assert result.dtype == torch.float32
    assert "200.0 times slower" in result.note and "\n" not in result.note


def test_a_dtype_with_instructions_is_kept_without_a_word(machine):
    machine({**X86, "avx512_bf16": True}, {torch.bfloat16: 0.4})
    assert chosen(torch.bfloat16) == compute.ComputeDtype(torch.bfloat16)
    # The instructions of one dtype say nothing of the other.
    machine({**X86, "avx512_bf16": True}, {torch.float16: 0.4})
    assert chosen(torch.float16).dtype == torch.float32


def test_a_library_that_converts_is_noticed_although_the_instructions_are_there(machine):
    machine({**X86, "amx_bf16": True}, {torch.bfloat16: 2.4})
    assert chosen(torch.bfloat16).dtype == torch.float32


def test_another_architecture_is_judged_by_the_product_alone(machine):
    machine({"architecture": "aarch64"}, {torch.bfloat16: 0.5})
    assert native(torch.bfloat16, CPU)
    machine({"architecture": "aarch64"}, {torch.bfloat16: 5.0})
    assert not native(torch.bfloat16, CPU)


def test_float32_that_does_not_fit_is_not_taken_and_the_price_is_named(machine):
    machine({**X86, "avx2": True}, {torch.bfloat16: 30.0})
    result = chosen(torch.bfloat16, float32_bytes=28_000_000_000, room=24_000_000_000)
    assert result.dtype == torch.bfloat16
    assert "30.0 times slower" in result.note
    assert "28.0 GB, there are 24.0 GB" in result.note


def test_what_is_stored_in_float32_stays_so(machine):
    machine({**X86, "avx512_bf16": True}, {torch.bfloat16: 0.1})
    assert chosen(torch.float32, float32_bytes=40) == compute.ComputeDtype(torch.float32)


def test_what_is_asked_for_is_taken_and_named(machine):
    machine({**X86, "avx2": True}, {torch.bfloat16: 30.0})
    assert chosen(torch.bfloat16, "bfloat16") == compute.ComputeDtype(torch.bfloat16)
    assert chosen(torch.bfloat16, "float32").dtype == torch.float32
    assert "as asked for" in chosen(torch.bfloat16, "float32").note


def test_what_does_not_fit_is_refused():
    with pytest.raises(MoefyError, match="takes 40.0 GB, there are 10.0 GB") as error:
        chosen(torch.bfloat16, "float32", 40_000_000_000, 10_000_000_000)
    assert error.value.code == 5


def test_the_product_is_timed_on_this_machine():
    assert compute.slowness(torch.float32, CPU) == 1.0
    assert compute.slowness(torch.bfloat16, CPU) > 0
