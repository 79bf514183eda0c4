"""Losses and routing in a fine-tune against naive references, one token at a time."""

import math

import pytest
import torch
from torch import nn

from moefy.config.finetune import Settings
from moefy.finetune import losses
from moefy.finetune.losses import Batch, Routed
from moefy.finetune.router_noise import is_noisy, noisy_choices, with_capacity
from moefy.finetune.teacher import likeliest

T, V, E, K = 7, 11, 5, 2


@pytest.fixture
def logits():
    return torch.randn(T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def teacher():
    return torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def routed():
    return torch.randn(T, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def distilled(logits, ids, log_p, temperature=1.0):
    """A batch with the teacher's tokens."""
    some_T = torch.zeros(T, dtype=torch.long)
    return Batch(logits, torch.arange(T), some_T, temperature, (ids, log_p.double()))


def layer(logits_TE, load_E=None, **more):
    """What a router with these logits did."""
    index_TK = logits_TE.topk(K).indices
    load_E = losses.load(index_TK, E) if load_E is None else load_E
    return Routed(logits_TE, index_TK, load_E, **more)


def test_next_token_is_transformers_cross_entropy(logits):
    ids_T = torch.arange(T) % V
    ours = losses.next_token(Batch(logits, torch.arange(T), ids_T))
    assert torch.allclose(ours, nn.functional.cross_entropy(logits.float(), ids_T))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_from_all_tokens_is_the_whole_kl(logits, teacher, temperature):
    ids, log_p = likeliest(teacher, Settings(top_p=1.1, top_tokens=V, temperature=temperature))
    ours = losses.distillation(distilled(logits, ids, log_p, temperature))
    whole = sum(
        float(p * (math.log(p) - math.log(q)))
        for t in range(T)
        for p, q in zip(
            (teacher[t] / temperature).softmax(0).tolist(),
            (logits[t] / temperature).softmax(0).tolist(),
            strict=True,
        )
    )
    assert float(ours) == pytest.approx(temperature**2 * whole / T, rel=1e-4)


def test_distillation_from_a_few_counts_the_rest_as_one_token(logits, teacher):
    ids, log_p = likeliest(teacher, Settings(top_p=0.7, top_tokens=4))
    ours = float(losses.distillation(distilled(logits, ids, log_p)))
    total = 0.0
    for t in range(T):
        p_V, q_V = teacher[t].softmax(0), logits[t].softmax(0)
        chosen, mass = [], 0.0
        for token in p_V.argsort(descending=True).tolist()[:4]:
            if mass < 0.7:
                chosen.append(token)
                mass += float(p_V[token])
        parts = [(float(p_V[n]), float(q_V[n])) for n in chosen]
        parts.append((1 - sum(p for p, _ in parts), 1 - sum(q for _, q in parts)))
        total += sum(p * math.log(p / q) for p, q in parts)
    assert ours == pytest.approx(total / T, rel=1e-4)
    ids, log_p = likeliest(teacher, Settings(top_p=1.1, top_tokens=V))
    assert ours < float(losses.distillation(distilled(logits, ids, log_p)))


def test_a_student_that_equals_its_teacher_has_no_gradient(teacher):
    student = teacher.clone().requires_grad_()
    ids, log_p = likeliest(teacher, Settings(top_p=0.5))
    losses.distillation(distilled(student, ids, log_p)).backward()
    assert float(student.grad.abs().max()) < 1e-6


def test_switch_is_one_at_balance_and_as_transformers_has_it(routed):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routed = routed.float()
    load_E = losses.load(routed.topk(K).indices, E)
    ours = losses.switch(Routed(routed, routed.topk(K).indices, load_E))
    assert torch.allclose(K * ours, load_balancing_loss_func((routed,), E, K))
    even = torch.zeros(E, E, dtype=torch.float64)
    assert float(losses.switch(layer(even, torch.ones(E)))) == pytest.approx(1)
    one = 100 * nn.functional.one_hot(torch.zeros(T, dtype=torch.long), E).double()
    assert float(losses.switch(layer(one, torch.eye(E)[0]))) == pytest.approx(E)


def test_variation_and_z(routed):
    share_E = routed.softmax(-1).mean(0)
    naive = float(share_E.var(correction=0) / share_E.mean() ** 2)
    assert float(losses.variation(layer(routed))) == pytest.approx(naive)
    naive = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in routed.tolist()) / T
    assert float(losses.router_z(layer(routed))) == pytest.approx(naive)


def test_two_halves_with_statistics_of_both_have_the_gradient_of_the_whole(routed):
    whole = routed[:6].clone().requires_grad_()
    losses.variation(layer(whole)).backward()
    mean_E = routed[:6].softmax(-1).mean(0)
    halves = []
    for part in routed[:6].chunk(2):
        half = part.clone().requires_grad_()
        losses.variation(layer(half, mean_E=mean_E)).backward()
        halves.append(half.grad / 2)  # as gradients are averaged over processes
    assert torch.allclose(torch.cat(halves), whole.grad)


def test_router_cross_entropy_is_least_where_the_best_experts_are_chosen(routed):
    energy_TE = routed.exp()
    right = 50 * (routed >= routed.topk(K).values[:, -1:]).double()
    assert float(losses.router_cross_entropy(layer(right, energy_TE=energy_TE))) == pytest.approx(
        math.log(K)
    )
    assert float(losses.router_cross_entropy(layer(-right, energy_TE=energy_TE))) > 10


def test_hidden_match(logits, teacher):
    naive = sum(float((logits[t] - teacher[t]).square().sum()) for t in range(T))
    naive /= sum(float(teacher[t].square().sum()) for t in range(T))
    states = Batch(logits, logits, logits, states_LTD=[logits], teacher_LTD=[teacher])
    assert float(losses.hidden_match(states)) == pytest.approx(naive, rel=1e-5)


def test_nothing_is_disturbed_by_default(routed):
    assert not is_noisy(Settings(), 0.0)
    assert torch.equal(noisy_choices(Settings(), 0.0, routed, K), routed.topk(K).indices)


def test_noise_ends(routed):
    noise = Settings(noise=5.0, explore_until=0.5)
    torch.manual_seed(0)
    assert is_noisy(noise, 0.1) and not is_noisy(noise, 0.5)
    assert not torch.equal(noisy_choices(noise, 0.0, routed, K), routed.topk(K).indices)
    assert torch.equal(noisy_choices(noise, 0.5, routed, K), routed.topk(K).indices)


def test_expert_dropout_leaves_enough(routed):
    torch.manual_seed(0)
    for _ in range(20):
        index_TK = noisy_choices(Settings(expert_dropout=0.9), 0.0, routed, K)
        assert len(index_TK.unique()) >= K and all(len(set(row)) == K for row in index_TK.tolist())


def test_warm_start_sends_tokens_to_the_coldest_expert(routed):
    routed = routed.repeat(20, 1)
    routed[:, 3] -= 100
    torch.manual_seed(0)
    assert 3 not in routed.topk(K).indices
    index_TK = noisy_choices(Settings(cold_expert_share=0.5), 0.0, routed, K)
    assert 0.3 < int((index_TK == 3).sum()) / len(routed) < 0.7
    assert torch.equal(index_TK[:, 0], routed.topk(K).indices[:, 0])


@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_no_expert_has_more_than_its_capacity(routed, room):
    routed[:, 0] += 3  # all tokens want this one
    index_TK = with_capacity(routed, routed.topk(K).indices, room)
    assert losses.load(index_TK, E).max() <= room
    for row in index_TK.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
    keeping = (index_TK == 0).any(-1)
    if room < T:  # the most confident tokens stay
        assert float(routed[keeping, 0].min()) > float(routed[~keeping, 0].max())
    else:
        assert torch.equal(index_TK.sort(-1).values, routed.topk(K).indices.sort(-1).values)
