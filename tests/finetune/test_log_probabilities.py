"""Log-probabilities and their gradient against autograd through the whole matrix."""

import pytest
import torch

from moefy.finetune import log_probabilities as module
from moefy.finetune.log_probabilities import log_probabilities

N, T, V, P = 9, 6, 50, 4


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits_NV = 5 * torch.randn(N, V, generator=g).to(dtype)
    row_T = torch.randperm(N, generator=g)[:T]
    ids_TP = torch.rand(T, V, generator=g).topk(P).indices
    return logits_NV, row_T, torch.randint(V, (T,), generator=g), ids_TP


def naive(logits_NV, row_T, next_T, ids_TP, temperature):
    logits_TV = logits_NV[row_T].float()
    one_T = logits_TV.log_softmax(-1).gather(1, next_T[:, None])[:, 0]
    return one_T, (logits_TV / temperature).log_softmax(-1).gather(1, ids_TP)


def gradient(function, logits_NV, *more):
    """Values, and the gradient of a sum with a weight of its own for each of them."""
    leaf_NV = logits_NV.clone().requires_grad_(True)
    one_T, some_TP = function(leaf_NV * 1.0, *more)
    weight_TP = torch.arange(some_TP.numel()).view_as(some_TP).sin()
    (torch.arange(len(one_T)).cos() @ one_T + (weight_TP * some_TP).sum()).backward()
    return one_T.detach(), some_TP.detach(), leaf_NV.grad


@pytest.mark.parametrize("chunk", [1, 2 * V, module.CHUNK["cpu"]])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_ids", [P, 0])
def test_values_and_gradient_are_those_of_autograd(monkeypatch, chunk, temperature, num_ids):
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    logits_NV, row_T, next_T, ids_TP = inputs()
    given = (logits_NV, row_T, next_T, ids_TP[:, :num_ids], temperature)
    pairs = zip(gradient(log_probabilities, *given), gradient(naive, *given), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if num_ids:  # a negative control: another temperature has another gradient
        other = gradient(naive, *given[:4], 3.0)
        assert (gradient(log_probabilities, *given)[2] - other[2]).abs().max() > 0.1


def test_bfloat16_is_rounded_once():
    given = (*inputs(torch.bfloat16), 1.0)
    ours, expected = gradient(log_probabilities, *given), gradient(naive, *given)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.008, atol=1e-4)
    assert ours[2].dtype == torch.bfloat16 and ours[0].dtype == torch.float32


def test_nothing_to_learn():
    logits_NV, row_T, next_T, ids_TP = inputs()
    _, _, g_NV = gradient(log_probabilities, logits_NV, row_T[:0], next_T[:0], ids_TP[:0], 1.0)
    assert not g_NV.any()


def test_the_gradient_takes_the_place_of_the_logits():
    logits_NV, row_T, next_T, ids_TP = inputs()
    leaf_NV = logits_NV.clone().requires_grad_(True)
    head_NV = leaf_NV * 1.0
    place = head_NV.data_ptr()
    places = []
    head_NV.register_hook(lambda g_NV: places.append(g_NV.data_ptr()))
    log_probabilities(head_NV, row_T, next_T, ids_TP)[0].sum().backward()
    assert places == [place]


def test_logits_that_another_operation_keeps_are_not_overwritten_silently():
    logits_NV, row_T, next_T, ids_TP = inputs()
    head_NV = logits_NV.clone().requires_grad_(True).tanh()  # its backward pass needs its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probabilities(head_NV, row_T, next_T, ids_TP)[0].sum().backward()
