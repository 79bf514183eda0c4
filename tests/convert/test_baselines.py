"""The published methods are what plain loops say they are, and find what they look for.

The loops are written from the papers and the authors' descriptions, in float64, neuron by neuron
and token by token; balanced assignment is scipy's.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from planted import mask_of, methods, observed, plant, random_ffn, recovered, seeded
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moefy.checkpoint.validate import open_checkpoint
from moefy.convert.cluster import balanced_kmeans, marks, token_centroids
from moefy.convert.gradients import ffn_gradients
from moefy.convert.partition.llama_moe_v2 import importance
from moefy.convert.partition.static import fluctuation
from moefy.convert.routed_ffn import RoutedFFN, expert_energies
from moefy.errors import MoefyError
from moefy.models import families
from moefy.types import FFN, Partition, Profile, Shape

SPLITS = methods("partition", "split")
FITS = methods("router", "fit")
SHAPE = Shape(48, 8, 5, 8, 2)
FIT = 160


def setting(seed: int, *, gated: bool = True, scaled: bool = True) -> tuple[FFN, Profile]:
    """A random FFN and what it gives on random tokens, some of which weigh more than others."""
    ffn = random_ffn(seed)
    if not gated:
        bias_F = torch.randn(48, generator=seeded(seed))
        ffn = FFN(None, ffn.up_FD, ffn.down_DF, "gelu", bias_F)
    x_TD, residual_TD = torch.randn(2, 240, 12, generator=seeded(100 + seed))
    residual_TD *= torch.linspace(1, 50, 240)[:, None]
    rest = {"residual_TD": residual_TD} if scaled else {}
    return ffn, observed(ffn, x_TD + 0.5, num_heldout=80, **rest)


def answers(ffn: FFN, x_TD: torch.Tensor) -> np.ndarray:
    """Activations in float64, from their definition."""
    act = {"silu": torch.nn.SiLU(), "gelu": torch.nn.GELU()}[ffn.activation]
    x_TD, up_FD = x_TD.double(), ffn.up_FD.double()
    if ffn.gate_FD is None:
        return act(x_TD @ up_FD.T + ffn.bias_F.double()).numpy()
    return (act(x_TD @ ffn.gate_FD.double().T) * (x_TD @ up_FD.T)).numpy()


def of_length_one(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def highest(values: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())


def sets(partition: Partition) -> set[frozenset[int]]:
    return {frozenset(neurons) for neurons in partition.experts_EN.tolist()}


def dealt(distance_RE: np.ndarray) -> np.ndarray:
    """The column of each row that makes the sum least, all columns taken as often."""
    copies = len(distance_RE) // distance_RE.shape[1]
    rows, columns = linear_sum_assignment(np.repeat(distance_RE, copies, axis=1))
    return columns[rows.argsort()] // copies


# Balanced k-means


@pytest.mark.parametrize("seed", range(4))
def test_balanced_kmeans_equals_plain_loops(seed):
    point_RQ = torch.randn(40, 6, generator=seeded(seed))
    first_E = [3, 17, 8, 30, 21]
    centres = [point_RQ[n].double().numpy() for n in first_E]
    before = None
    for _ in range(50):
        distance_RE = np.array(
            [[((p - c) ** 2).sum() for c in centres] for p in point_RQ.double().numpy()]
        )
        cluster_R = dealt(distance_RE)
        if before is not None and np.array_equal(cluster_R, before):
            break
        before = cluster_R
        centres = [point_RQ.double().numpy()[cluster_R == e].mean(0) for e in range(5)]
    found_R, means_EQ = balanced_kmeans(point_RQ, point_RQ[first_E], 50)
    assert found_R.tolist() == cluster_R.tolist()
    np.testing.assert_allclose(means_EQ, centres, atol=1e-5)
    once_R, _ = balanced_kmeans(point_RQ, point_RQ[first_E], 1)
    assert once_R.tolist() != found_R.tolist()


# CMoE


def marked(ffn: FFN, x_TD: torch.Tensor, most: int, unit: bool) -> np.ndarray:
    """Its binary activation matrix, by plain loops."""
    if unit and ffn.gate_FD is not None:
        rows = [of_length_one(rows) for rows in (ffn.gate_FD.double(), ffn.up_FD.double())]
        ffn = dataclasses.replace(ffn, gate_FD=rows[0], up_FD=rows[1])
        x_TD = of_length_one(x_TD.double())
    mark_TF = np.zeros((len(x_TD), ffn.num_neurons))
    for token, row in enumerate(np.abs(answers(ffn, x_TD))):
        mark_TF[token, highest(row, most)] = 1
    return mark_TF


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_marks_equal_plain_loops(unit, gated):
    ffn, profile = setting(0, gated=gated)
    found_TF = marks(ffn, profile, 5, unit=unit)
    assert np.array_equal(found_TF, marked(ffn, profile.x_TD[:FIT], 5, unit))
    assert found_TF.sum(1).tolist() == [5] * FIT


@pytest.mark.parametrize("seed", range(3))
def test_coactivation_equals_plain_loops(seed):
    ffn, profile = setting(seed)
    found = SPLITS["cmoe"](ffn, profile, SHAPE, generator=seeded(0))
    mark_TF = marked(ffn, profile.x_TD[:FIT], 10, True)
    rate_F = mark_TF.mean(0)
    shared = highest(rate_F, 8)
    assert found.shared_S.tolist() == shared
    rest = [n for n in range(48) if n not in shared]
    first = sorted(rest, key=lambda n: -rate_F[n])[:5]
    # Columns of zeros and ones: many ways to deal them out are equally good, and ours is the best.
    distance_RE = cdist(mark_TF[:, rest].T, mark_TF[:, first].T, "cityblock")
    least = distance_RE[np.arange(40), dealt(distance_RE)].sum()
    expert_of = {n: e for e, members in enumerate(found.experts_EN.tolist()) for n in members}
    assert sum(distance_RE[row, expert_of[n]] for row, n in enumerate(rest)) == least


@pytest.mark.parametrize("unit", [True, False])
def test_the_representative_neuron_equals_plain_loops(unit):
    ffn, profile = setting(3)
    partition = SPLITS["cmoe"](ffn, profile, SHAPE, generator=seeded(0), unit=unit)
    router = FITS["cmoe"](ffn, profile, partition, SHAPE, generator=seeded(0), unit=unit)
    mark_TF = marked(ffn, profile.x_TD[:FIT], 10, unit)
    score_TE = np.empty((80, 5))
    for expert, neurons in enumerate(partition.experts_EN.tolist()):
        centroid_T = mark_TF[:, neurons].mean(1)
        away = [np.linalg.norm(mark_TF[:, n] - centroid_T) for n in neurons]
        (chosen,) = router.norm_EN[expert].nonzero().flatten().tolist()
        assert router.norm_EN[expert, chosen] == 1
        assert away[chosen] == pytest.approx(min(away), rel=1e-9)
        x_TD = profile.x_TD[FIT:].double()
        gate_D, up_D = ffn.gate_FD[neurons[chosen]].double(), ffn.up_FD[neurons[chosen]].double()
        score_TE[:, expert] = (torch.nn.functional.silu(x_TD @ gate_D) * (x_TD @ up_D)).abs()
    h_TF = profile.h_TF[FIT:]
    mask_TE = RoutedFFN(ffn, partition, router, 2).mask(profile.x_TD[FIT:], h_TF)
    assert np.array_equal(mask_TE.numpy() > 0, mask_of(score_TE, 2))


# MoEfication


@pytest.mark.parametrize("gated", [True, False])
def test_weights_equal_a_naive_search(gated):
    """No dealing out is better under its own means, and no naive run is tighter."""
    ffn, profile = setting(4, gated=gated)
    found = SPLITS["moefication"](ffn, profile, SHAPE, generator=seeded(0))
    assert found.shared_S.tolist() == highest(profile.energy_F.numpy(), 8)
    parts = [ffn.up_FD] if not gated else [ffn.gate_FD, ffn.up_FD]
    point_FQ = np.hstack([of_length_one(rows.double()).numpy() for rows in parts])

    def scatter(groups: list[list[int]]) -> float:
        return sum(((point_FQ[g] - point_FQ[g].mean(0)) ** 2).sum() for g in groups)

    groups = found.experts_EN.tolist()
    rest = np.setdiff1d(np.arange(48), found.shared_S)
    means_EQ = np.stack([point_FQ[g].mean(0) for g in groups])
    distance_RE = cdist(point_FQ[rest], means_EQ, "sqeuclidean")
    best = distance_RE[np.arange(40), dealt(distance_RE)].sum()
    assert scatter(groups) == pytest.approx(best, rel=1e-5)
    dice = np.random.default_rng(0)
    naive = []
    for _ in range(10):
        centre_EQ = point_FQ[dice.choice(rest, 5, replace=False)]
        for _ in range(20):
            expert_R = dealt(cdist(point_FQ[rest], centre_EQ, "sqeuclidean"))
            centre_EQ = np.stack([point_FQ[rest[expert_R == e]].mean(0) for e in range(5)])
        naive.append(scatter([rest[expert_R == e].tolist() for e in range(5)]))
    assert scatter(groups) <= np.median(naive)


def test_weights_look_at_directions_alone():
    ffn, profile = setting(5)
    shape = Shape(48, 0, 6, 8, 2)
    longer_F1 = torch.rand(48, 1, generator=seeded(0)) * 4 + 1
    louder = dataclasses.replace(ffn, gate_FD=ffn.gate_FD * longer_F1, up_FD=ffn.up_FD / longer_F1)
    other = observed(louder, -profile.x_TD, num_heldout=80)
    first = SPLITS["moefication"](ffn, profile, shape, generator=seeded(0))
    assert sets(first) == sets(SPLITS["moefication"](louder, other, shape, generator=seeded(0)))


# LLaMA-MoE v2


def of_cluster(x_TD: torch.Tensor, centre_ED: torch.Tensor) -> list[int]:
    return (x_TD.double() @ centre_ED.double().T).argmax(1).tolist()


@pytest.mark.parametrize("gated", [True, False])
def test_importance_equals_autograd_token_by_token(gated):
    ffn, profile = setting(6, gated=gated)
    centre_ED = token_centroids(profile, 5, seeded(0))
    slope_TD = profile.gradient_TD.double()
    total_EF, count_E = np.zeros((5, 48)), np.zeros(5)
    for token, cluster in enumerate(of_cluster(profile.x_TD[:FIT], centre_ED)):
        h_F = torch.from_numpy(answers(ffn, profile.x_TD[token, None])[0]).requires_grad_()
        # A loss whose gradient with respect to the output is the one that was given.
        (slope_F,) = torch.autograd.grad((ffn.down_DF.double() @ h_F) @ slope_TD[token], h_F)
        total_EF[cluster] += (h_F * slope_F).abs().detach().numpy()
        count_E[cluster] += 1
    assert count_E.min() > 0
    found_EF = importance(ffn, profile, centre_ED)
    np.testing.assert_allclose(found_EF, total_EF / count_E[:, None], rtol=1e-4)


def naive_residual_split(score_EF: np.ndarray, shape: Shape) -> tuple[list[int], list[list[int]]]:
    """Shared neurons, then the experts' own, as the authors' loops deal them out."""
    wanted = [np.argsort(-row, kind="stable").tolist() for row in score_EF]
    shared: list[int] = []
    while len(shared) < shape.num_shared:
        heads = [neuron for order in wanted for neuron in order[: shape.expert_width]]
        counts = {neuron: heads.count(neuron) for neuron in heads}
        for times in range(shape.num_experts, 0, -1):
            chosen = sorted(n for n, count in counts.items() if count == times)
            if chosen:
                break
        shared += chosen[: shape.num_shared - len(shared)]
        wanted = [[n for n in order if n not in shared] for order in wanted]
    experts: list[list[int]] = [[] for _ in range(shape.num_experts)]
    used = set(shared)
    while sum(map(len, experts)) < shape.num_experts * shape.expert_width:
        offers = []
        for expert, order in enumerate(wanted):
            left = [n for n in order if n not in used]
            if left and len(experts[expert]) < shape.expert_width:
                offers.append((score_EF[expert, left[0]], expert, left[0]))
        _, expert, neuron = max(offers)
        experts[expert].append(neuron)
        used.add(neuron)
    return sorted(shared), [sorted(neurons) for neurons in experts]


@pytest.mark.parametrize("shape", [SHAPE, Shape(48, 0, 4, 12, 1), Shape(48, 30, 3, 6, 2)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_split_equals_plain_loops(seed, shape):
    ffn, profile = setting(seed)
    found = SPLITS["llama-moe-v2"](ffn, profile, shape, generator=seeded(seed))
    centre_ED = token_centroids(profile, shape.num_experts, seeded(seed))
    score_EF = importance(ffn, profile, centre_ED).numpy()
    shared, experts = naive_residual_split(score_EF, shape)
    assert found.shared_S.tolist() == shared
    assert found.experts_EN.tolist() == experts


def test_centroids_are_those_of_the_partition_and_of_scikit_learn():
    ffn, profile = setting(7)
    generator = seeded(11)
    torch.rand(5, generator=generator)  # whatever a partition has drawn by then
    router = FITS["llama-moe-v2"](ffn, profile, None, SHAPE, generator=generator)
    centre_ED = token_centroids(profile, 5, seeded(11))
    known = KMeans(5, n_init=10, max_iter=100, tol=1e-3, random_state=11)
    known.fit(profile.x_TD[:FIT].numpy())
    np.testing.assert_allclose(centre_ED, known.cluster_centers_, rtol=1e-5)
    wanted = of_cluster(profile.x_TD, centre_ED)
    assert of_cluster(profile.x_TD, router.weight_ED) == wanted
    assert len(set(wanted)) == 5
    assert not torch.equal(centre_ED, token_centroids(profile, 5, seeded(12)))


def test_more_clusters_than_tokens_are_refused():
    _, profile = setting(0)
    with pytest.raises(MoefyError, match="160 tokens to fit on cannot make 161 clusters"):
        token_centroids(profile, 161, seeded(0))


FAMILIES = ["llama", "gpt2", "gemma2", "granite", "gpt_neox", "lfm2", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_differences_of_the_loss(family, pico):
    folder = pico(family)
    ids_BT = torch.randint(1, 128, (3, 24), generator=seeded(0))
    found = ffn_gradients(
        open_checkpoint(folder), families.load(family), [0, 1], ids_BT, torch.device("cpu")
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    direction_BTD = torch.randn(3, 24, 32, generator=seeded(1), dtype=torch.float64)
    for layer, slope_TD in found.items():
        assert slope_TD.shape == (72, 32) and slope_TD.dtype == torch.bfloat16
        known = families.load(family)
        block = model.get_submodule(known.layer.format(layer=layer) + known.block)
        slope_BTD = slope_TD.view(3, 24, 32).double()
        for sequence in range(3):
            losses = []
            for step in (1e-4, -1e-4):
                hook = block.register_forward_hook(
                    lambda module, args, out, step=step, n=sequence: out + step * direction_BTD[n]
                )
                ids_1T = ids_BT[sequence, None]
                with torch.no_grad():
                    logits_TV = model(ids_1T).logits[0, :-1]
                losses.append(float(cross_entropy(logits_TV, ids_1T[0, 1:])))
                hook.remove()
            wanted = (losses[0] - losses[1]) / 2e-4
            told = float((slope_BTD[sequence] * direction_BTD[sequence]).sum())
            assert told == pytest.approx(wanted, abs=0.02 * float(slope_BTD[sequence].norm()))


# ExpertWeaver


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("passage", [16, 50])
def test_expertweaver_equals_plain_loops(passage, gated):
    ffn, profile = setting(8, gated=gated)
    found = SPLITS["expertweaver"](ffn, profile, SHAPE, generator=seeded(2), passage=passage)
    x_TD = profile.x_TD[:FIT].double()
    if gated:
        open_TF = torch.nn.functional.silu(x_TD @ ffn.gate_FD.double().T).numpy()
    else:
        open_TF = answers(ffn, x_TD)
    shared = highest(np.abs(open_TF).mean(0), 8)
    assert found.shared_S.tolist() == shared
    rest = np.array([n for n in range(48) if n not in shared])
    profile_RM = np.stack(
        [open_TF[at : at + passage].mean(0) for at in range(0, FIT, passage)], axis=1
    )[rest]
    centre_EM = profile_RM[torch.randperm(40, generator=seeded(2))[:5].numpy()]
    before = None
    for _ in range(100):
        expert_R = dealt(cdist(profile_RM, centre_EM, "sqeuclidean"))
        if before is not None and np.array_equal(before, expert_R):
            break
        before = expert_R
        centre_EM = np.stack([profile_RM[expert_R == e].mean(0) for e in range(5)])
    assert found.experts_EN.tolist() == [rest[expert_R == e].tolist() for e in range(5)]


@pytest.mark.parametrize("gated", [True, False])
def test_gates_score_by_the_mean_gate_row(gated):
    ffn, profile = setting(9, gated=gated)
    partition = SPLITS["shuffle"](ffn, profile, SHAPE, generator=seeded(0))
    router = FITS["expertweaver"](ffn, profile, partition, SHAPE, generator=seeded(0))
    rows_FD = (ffn.gate_FD if gated else ffn.up_FD).double().numpy()
    mean_ED = np.stack([rows_FD[neurons].mean(0) for neurons in partition.experts_EN.numpy()])
    x_TD = profile.x_TD.double().numpy()
    found_TE = mask_of(x_TD @ router.weight_ED.double().numpy().T, 2)
    assert np.array_equal(found_TE, mask_of(x_TD @ mean_ED.T, 2))


# FLAP


@pytest.mark.parametrize("gated", [True, False])
def test_fluctuation_equals_plain_loops(gated):
    ffn, profile = setting(10, gated=gated)
    h_TF = answers(ffn, profile.x_TD[:FIT])
    wanted = [h_TF[:, n].var() * float((ffn.down_DF[:, n].double() ** 2).sum()) for n in range(48)]
    np.testing.assert_allclose(fluctuation(ffn, profile), wanted, rtol=1e-4)
    kept = SPLITS["static"](ffn, profile, SHAPE, generator=seeded(0), metric="fluctuation").shared_S
    assert kept.tolist() == highest(np.array(wanted), SHAPE.num_active)


def test_a_neuron_that_always_answers_alike_has_energy_and_no_fluctuation():
    ffn = FFN(None, torch.randn(4, 3), torch.eye(4)[:3], "relu", torch.tensor([9.0, 0, 0, 0]))
    ffn.up_FD[0] = 0
    profile = observed(ffn, torch.randn(50, 3, generator=seeded(0)), num_heldout=10)
    kept = {
        metric: SPLITS["static"](
            ffn, profile, Shape(4, 1, 0, 0, 0), generator=seeded(0), metric=metric
        ).shared_S.tolist()
        for metric in ("energy", "fluctuation")
    }
    assert kept["energy"] == [0]
    assert kept["fluctuation"] != [0]


# What they look for, and find

MARKS = {"marked": 14, "unit": False}
OPTIONS = {"expertweaver": {"passage": 1}, "cmoe": {**MARKS, "rounds": 20}}
FIND = ["cmoe", "expertweaver", "llama-moe-v2", "moefication"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FIND)
def test_planted_groups_are_found(name, seed):
    planted = plant(seed, fired=1, noise=0.1)
    options = OPTIONS.get(name, {})
    split = SPLITS[name]
    found = split(planted.ffn, planted.profile, planted.shape, generator=seeded(seed), **options)
    by_lot = SPLITS["shuffle"](planted.ffn, planted.profile, planted.shape, generator=seeded(seed))
    assert recovered(by_lot, planted) < 0.5
    assert recovered(found, planted) > 0.7
    # Nothing is planted in other weights: the same neurons are no group.
    bare = random_ffn(seed, 56, 24)
    profile = observed(bare, planted.profile.x_TD, num_heldout=200)
    found = split(bare, profile, planted.shape, generator=seeded(seed), **options)
    assert recovered(found, planted) < 0.5


ROUTERS = {"llama-moe-v2": "llama-moe-v2", "expertweaver": "expertweaver", "cmoe": "cmoe"}


@pytest.mark.parametrize("name", ROUTERS)
def test_their_routers_send_tokens_where_they_belong(name):
    planted = plant(fired=1, noise=0.1)
    options = OPTIONS.get(name, {})
    given = (planted.ffn, planted.profile)
    found = SPLITS[name](*given, planted.shape, generator=seeded(0), **options)
    kept = {}
    for router in (ROUTERS[name], "oracle", "random"):
        options = MARKS if router == "cmoe" else {}
        fitted = FITS[router](*given, found, planted.shape, generator=seeded(0), **options)
        x_TD, h_TF = planted.profile.x_TD[400:], planted.profile.h_TF[400:]
        mask_TE = RoutedFFN(planted.ffn, found, fitted, 1).mask(x_TD, h_TF)
        energy_TE = expert_energies(*given, found, "heldout")
        kept[router] = float((mask_TE * energy_TE).sum() / energy_TE.sum())
    assert kept[ROUTERS[name]] > 0.8 * kept["oracle"]
    assert kept["random"] < 0.5 * kept["oracle"]


def test_experts_are_made_for_their_own_cluster():
    """An expert's neurons matter more to its cluster's tokens than to others'."""
    planted = plant(1, fired=1, noise=0.1)
    found = SPLITS["llama-moe-v2"](planted.ffn, planted.profile, planted.shape, generator=seeded(1))
    score_EF = importance(
        planted.ffn, planted.profile, token_centroids(planted.profile, 8, seeded(1))
    )
    at_home = [float(score_EF[e, found.experts_EN[e]].mean()) for e in range(8)]
    pairs = itertools.permutations(range(8), 2)
    away = [float(score_EF[e, found.experts_EN[other]].mean()) for e, other in pairs]
    assert np.mean(at_home) > 5 * np.mean(away)
