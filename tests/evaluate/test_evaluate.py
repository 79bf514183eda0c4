"""Scores equal those of transformers and torch, and their errors those of a bootstrap."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moefy.evaluate.metrics import Score, compare, log_probabilities, standard_error


@pytest.fixture(scope="module")
def pair(pico):
    """Two tiny models of different families, with one vocabulary."""
    return [
        AutoModelForCausalLM.from_pretrained(pico(name), dtype=torch.float32).eval()
        for name in ("llama", "qwen3")
    ]


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(128, (length,), generator=generator) for length in (32, 48, 17, 2)]


def test_a_model_is_no_distance_from_itself(pair, windows):
    dense, _ = pair
    scores = compare(dense, {"same": dense}, windows)
    assert scores["same"].kl == 0
    assert scores["same"].agreement == 1
    assert scores["same"] == scores["dense"]
    assert scores["dense"].tokens_W == (31, 47, 16, 1)
    assert scores["dense"].num_tokens == 95
    assert standard_error(scores["same"], scores["dense"]) == 0


def test_perplexity_is_that_of_transformers_own_loss(pair, windows):
    dense, other = pair
    for ids_T in windows:
        scores = compare(dense, {"other": other}, [ids_T])
        for model, score in ((dense, scores["dense"]), (other, scores["other"])):
            with torch.inference_mode():
                loss = float(model(ids_T[None], labels=ids_T[None]).loss)
            assert score.nll == pytest.approx(loss, rel=1e-5)
            assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_windows_count_by_their_tokens(pair, windows):
    dense, other = pair
    score = compare(dense, {"other": other}, windows)["other"]
    losses = []
    for ids_T in windows:
        with torch.inference_mode():
            logits_TV = other(ids_T[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="none"))
    assert score.nll == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert score.nll_W == pytest.approx([float(loss_T.sum()) for loss_T in losses], rel=1e-5)
    # Means of windows, unweighed, would be another number.
    assert score.nll != pytest.approx(np.mean([float(loss.mean()) for loss in losses]), rel=1e-3)


def test_kl_is_torchs_and_points_from_dense_to_model(pair, windows):
    dense, other = pair
    scores = compare(dense, {"other": other}, windows)
    forward = backward = agree = 0.0
    for ids_T in windows:
        p_TV, q_TV = (log_probabilities(model, ids_T).double() for model in pair)
        forward += float(torch.nn.functional.kl_div(q_TV, p_TV, log_target=True, reduction="sum"))
        backward += float(torch.nn.functional.kl_div(p_TV, q_TV, log_target=True, reduction="sum"))
        agree += float((p_TV.argmax(1) == q_TV.argmax(1)).sum())
    assert scores["other"].kl == pytest.approx(forward / 95, rel=1e-4)
    assert scores["other"].kl > 0.01
    assert abs(forward - backward) / 95 > 1e-3
    assert scores["other"].agreement == pytest.approx(agree / 95)
    assert scores["other"].agreement < 0.5


def test_log_probabilities_are_of_the_next_token(pair, windows):
    dense, _ = pair
    found_TV = log_probabilities(dense, windows[0])
    assert found_TV.shape == (31, 128) and found_TV.dtype == torch.float32
    torch.testing.assert_close(found_TV.exp().sum(1), torch.ones(31))
    # What comes later does not matter, so place t is what follows the first t + 1 tokens.
    torch.testing.assert_close(found_TV[:9], log_probabilities(dense, windows[0][:10]))


def test_progress_is_told(pair, windows):
    dense, other = pair
    steps = []
    compare(dense, {"other": other}, windows, watch=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


# Standard errors


def scores_of(difference_W: np.ndarray, tokens_W: np.ndarray, dense_W: np.ndarray) -> list[Score]:
    """A model's and the dense model's scores, with sums per window that differ as given."""
    tokens, none = tuple(int(n) for n in tokens_W), (0.0,) * len(tokens_W)
    nothing = (0,) * len(tokens_W)
    sums = [tuple(float(x) for x in values) for values in (dense_W + difference_W, dense_W)]
    return [Score(tokens, nll_W, none, nothing) for nll_W in sums]


@pytest.mark.parametrize("equal", [True, False])
def test_the_standard_error_is_that_of_a_bootstrap_over_windows(equal):
    dice = np.random.default_rng(0)
    count = 60
    tokens_W = np.full(count, 100) if equal else dice.integers(20, 200, count)
    dense_W = tokens_W * dice.normal(3.0, 0.5, count)
    difference_W = tokens_W * dice.normal(0.1, 0.05, count)
    error = standard_error(*scores_of(difference_W, tokens_W, dense_W))
    drawn_BW = dice.integers(0, count, (4000, count))
    means_B = difference_W[drawn_BW].sum(1) / tokens_W[drawn_BW].sum(1)
    assert error == pytest.approx(means_B.std(), rel=0.08)
    if equal:  # then it is the textbook's
        textbook = (difference_W / tokens_W).std(ddof=1) / count**0.5
        assert error == pytest.approx(textbook, rel=1e-9)
    # Paired: not the error of either model's own mean, which texts that are hard for both inflate.
    own_B = dense_W[drawn_BW].sum(1) / tokens_W[drawn_BW].sum(1)
    assert own_B.std() > 5 * error


def test_a_difference_far_below_the_sums_is_not_rounded_away():
    tokens_W = np.full(8, 1023)
    dense_W = np.linspace(3000, 4000, 8) + 1 / 3
    difference_W = 1e-6 * np.arange(8)
    error = standard_error(*scores_of(difference_W, tokens_W, dense_W))
    textbook = (difference_W / tokens_W).std(ddof=1) / 8**0.5
    assert error == pytest.approx(textbook, rel=1e-4)


def test_one_window_has_no_standard_error():
    model, dense = scores_of(np.array([1.0]), np.array([100]), np.array([300.0]))
    assert standard_error(model, dense) is None
