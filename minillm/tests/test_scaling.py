"""scaling.py: planted laws, scipy, by hand, what it refuses, and the cache of its runs."""
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from minillm import scaling
from minillm.model import Llama
from minillm.scaling import (
    ScalingLaw, Trial, bootstrap_laws, check_runs, compute_optimal, descend, fit_scaling_law, huber,
    kept, measure_trial, peak_rate, residuals, result_file, run_trial, shape, starting_points,
    token_losses, tokens_for)

LAW = ScalingLaw(E=0.5, A=50, B=3000, alpha=0.4, beta=0.8)
LAWS = [LAW, ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28), ScalingLaw(1.82, 482, 2085, 0.35, 0.37),
        ScalingLaw(0.1, 900, 2e5, 0.7, 1.1)]


def plant(law=LAW, noise=0.0, n=40, seed=0):
    """Params, tokens and losses of n runs that follow a law up to noise."""
    rng = np.random.default_rng(seed)
    params, tokens = 10 ** rng.uniform(4, 6.5, n), 10 ** rng.uniform(4.3, 7, n)
    return params, tokens, law.loss(params, tokens) * np.exp(noise * rng.normal(size=n))


# ---- the fit

@pytest.mark.parametrize("law", LAWS)
def test_a_planted_law_comes_back(law):
    assert fit_scaling_law(*plant(law)) == pytest.approx(law, rel=1e-4)
    assert fit_scaling_law(*plant(law), E=law.E) == pytest.approx(law, rel=1e-4)


def test_noise_moves_the_coefficients_a_little():
    fitted = fit_scaling_law(*plant(noise=0.01))
    assert fitted.E == pytest.approx(LAW.E, rel=0.2)
    assert fitted.alpha == pytest.approx(LAW.alpha, rel=0.2)
    assert fitted.beta == pytest.approx(LAW.beta, rel=0.2)
    assert tuple(fitted) != pytest.approx(tuple(LAW), rel=1e-4)


def test_the_order_and_the_container_do_not_matter():
    runs = plant(noise=0.01)
    backwards = [list(map(float, z[::-1])) for z in runs]
    assert fit_scaling_law(*backwards) == pytest.approx(fit_scaling_law(*runs), rel=1e-3)


def test_an_outlier_pulls_with_limited_force():
    params, tokens, losses = plant(noise=0.003)
    clean = fit_scaling_law(params, tokens, losses)
    losses[7] *= 3
    assert fit_scaling_law(params, tokens, losses).beta == pytest.approx(clean.beta, rel=0.1)


def test_curve_fit_agrees():
    """On runs with little noise every residual is within HUBER, where the losses are squares."""
    params, tokens, losses = plant(noise=0.002)
    x, y, z = np.log([params, tokens, losses])

    def log_loss(xy, e, a, b, alpha, beta):
        return np.logaddexp.reduce([e + 0 * xy[0], a - alpha * xy[0], b - beta * xy[1]])

    best, _ = curve_fit(log_loss, (x, y), z, (-1, 4, 8, 0.4, 0.8), maxfev=10_000)
    ours = fit_scaling_law(params, tokens, losses)
    assert [*np.log(ours[:3]), *ours[3:]] == pytest.approx(best.tolist(), rel=1e-3)


def test_no_neighbor_is_better():
    """What descend returns is a minimum of the objective, by small steps in every direction."""
    logs = check_runs(*plant(noise=0.02))
    ones = np.ones((1, logs.shape[1]))
    theta, value = descend(starting_points(logs), logs, ones, [0, 1, 2, 3, 4], steps=400)
    best, least = theta[value.argmin()], value.min()
    for k in range(5):
        for step in (-0.01, 0.01):
            moved = best.copy()
            moved[k] += step
            assert huber(residuals(moved[None], logs)[0]).sum() > least


def test_weights_count_runs():
    """Weight 2 is the same as the run twice in the list."""
    logs = check_runs(*plant(noise=0.02, n=20))
    counts = np.array([2] * 5 + [1] * 10 + [0] * 5)
    doubled = np.repeat(logs, counts, axis=1)
    points, free = starting_points(logs), [0, 1, 2, 3, 4]
    _, by_weight = descend(points, logs, counts[None], free)
    _, by_list = descend(points, doubled, np.ones((1, doubled.shape[1])), free)
    assert by_weight.min() == pytest.approx(by_list.min(), rel=1e-6)


def test_what_is_not_free_stays():
    logs = check_runs(*plant(noise=0.02))
    points = starting_points(logs, E=0.4)
    theta, _ = descend(points, logs, np.ones((1, logs.shape[1])), [1, 2, 3, 4])
    assert (theta[:, 0] == math.log(0.4)).all()
    assert fit_scaling_law(*plant(noise=0.02), E=0.4).E == pytest.approx(0.4, rel=1e-12)


def test_shares_are_the_derivatives_of_the_residual():
    logs, theta = check_runs(*plant(n=6)), np.array([[-0.7, 3.9, 8.0, 0.4, 0.8]])
    _, shares = residuals(theta, logs)
    assert shares.sum(0) == pytest.approx(1)
    for k, share in enumerate(shares):
        moved = theta.copy()
        moved[0, k] += 1e-6
        slope = (residuals(moved, logs)[0] - residuals(theta, logs)[0]) / 1e-6
        assert slope == pytest.approx(share, rel=1e-4)


def test_huber_by_hand():
    h = scaling.HUBER
    assert huber(np.array([0, h / 2, -h, 3 * h, -3 * h])) == pytest.approx(
        [0, h * h / 8, h * h / 2, 2.5 * h * h, 2.5 * h * h])


# ---- the bootstrap

def test_the_bootstrap_covers_what_was_planted():
    laws = np.array(bootstrap_laws(*plant(noise=0.01), n=100))
    assert laws.shape == (100, 5)
    low, high = np.percentile(laws, [0.5, 99.5], axis=0)
    assert (low < np.array(LAW)).all() and (np.array(LAW) < high).all()
    assert (low < high).all()


def test_the_bootstrap_is_reproducible_and_depends_on_the_seed():
    runs = plant(noise=0.01)
    assert bootstrap_laws(*runs, n=5) == bootstrap_laws(*runs, n=5)
    assert bootstrap_laws(*runs, n=5) != bootstrap_laws(*runs, n=5, seed=1)


def test_the_bootstrap_with_a_pinned_E():
    assert {law.E for law in bootstrap_laws(*plant(noise=0.01), E=0.25, n=5)} == {0.25}


# ---- what is refused, before any work

def changed(which, i, value):
    """Planted runs with one number changed."""
    runs = plant(noise=0.01)
    runs[which][i] = value
    return runs


P, T, L = plant(noise=0.01)
REFUSED = [
    ((P[:4], T[:4], L[:4]), {}, "4 runs cannot determine 5 coefficients"),
    ((P[:3], T[:3], L[:3]), {"E": 0.1}, "3 runs cannot determine 4 coefficients"),
    (([], [], []), {}, "0 runs cannot"),
    ((P, T, L[1:]), {}, "40 params, 40 tokens and 39 losses"),
    (changed(2, 3, math.nan), {}, "run 3: loss must be a positive number: got nan"),
    (changed(2, 3, math.inf), {}, "run 3: loss must be a positive number: got inf"),
    (changed(2, 0, -1), {}, "run 0: loss"),
    (changed(0, 5, 0), {}, "run 5: params must be a positive number: got 0"),
    (changed(1, 6, -100), {}, "run 6: tokens must be a positive number: got -100"),
    ((np.full(40, 1e5), T, L), {}, "1 different sizes"),
    ((P, np.full(40, 1e5), L), {}, "1 different numbers of tokens"),
    ((P, T, L), {"E": float(L.min())}, "below every loss"),
    ((P, T, L), {"E": 0.0}, "E must be positive"),
    ((P, T, L), {"E": -1.0}, "E must be positive"),
    ((P, T, L), {"E": math.nan}, "E must be positive"),
]


@pytest.mark.parametrize("fit", [fit_scaling_law, bootstrap_laws])
@pytest.mark.parametrize("runs, more, words", REFUSED)
def test_bad_runs_are_refused_before_any_work(fit, runs, more, words, monkeypatch):
    monkeypatch.setattr(scaling, "descend", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=words):
        fit(*runs, **more)


def test_the_run_with_a_loss_below_E_is_named():
    with pytest.raises(ValueError, match=f"run {L.argmin()} has the loss {L.min():.4f}"):
        fit_scaling_law(P, T, L, E=float(L.min()) + 0.1)


# ---- what follows from a law

@pytest.mark.parametrize("law", LAWS)
def test_the_optimum_is_the_best_of_many(law):
    params, tokens = compute_optimal(law, 1e12)
    assert 6 * params * tokens == pytest.approx(1e12)
    tried = params * np.geomspace(0.5, 2, 2001)
    assert tried[law.loss(tried, 1e12 / 6 / tried).argmin()] == pytest.approx(params, rel=1e-3)


def test_tokens_for_is_the_inverse():
    sizes = np.array([1e5, 1e6])
    tokens = tokens_for(LAW, sizes, 1.1)
    assert LAW.loss(sizes, tokens) == pytest.approx([1.1, 1.1])
    assert LAW.loss(1e5, tokens_for(LAW, 1e5, 1.2)) == pytest.approx(1.2)


def test_no_text_helps_a_model_that_is_too_small():
    assert tokens_for(LAW, 100, 0.9) == math.inf
    assert tokens_for(LAW, np.array([100, 1e6]), 0.9)[0] == math.inf


# ---- runs

@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 64, 96, 128])
def test_every_width_has_a_shape(dim):
    config = shape(dim, 640)
    assert (config.dim, config.vocab_size, config.n_layers) == (dim, 640, 2)
    assert config.hidden_dim == pytest.approx(8 / 3 * dim, abs=4)


def test_the_rate_falls_with_the_steps_and_the_width():
    assert peak_rate(64, 400) == pytest.approx(0.04)
    assert peak_rate(64, 200) == pytest.approx(0.08)
    assert peak_rate(64, 10) == pytest.approx(0.16)
    assert peak_rate(64, 10**6) == pytest.approx(0.01)
    assert peak_rate(4, 400) == pytest.approx(2 * peak_rate(64, 400))


def made_up(n):
    """n documents of 12 tokens between two end tokens, of a vocabulary of 20."""
    rng = np.random.default_rng(0)
    return [[0, *rng.integers(1, 20, 12).tolist(), 0] for _ in range(n)]


def test_a_trial_counts_its_tokens_and_is_reproducible():
    documents = made_up(40)
    model, tokens = run_trial(Trial(16, 40), documents, 20)
    assert tokens == 40 * 13
    again, _ = run_trial(Trial(16, 40), documents, 20)
    other, _ = run_trial(Trial(16, 40, seed=1), documents, 20)
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_trial_reads_only_its_own_documents():
    documents = made_up(40)
    model, tokens = run_trial(Trial(16, 40, different=8), documents, 20)
    assert tokens == 40 * 13
    again, _ = run_trial(Trial(16, 40, different=8), documents[:8], 20)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_the_rate_of_a_trial(monkeypatch):
    rates = []
    monkeypatch.setattr(scaling, "train", lambda model, rows, config: rates.append(config.lr) or [])
    run_trial(Trial(16, 8), made_up(8), 20)
    run_trial(Trial(16, 8, lr=0.5), made_up(8), 20)
    assert rates == [peak_rate(16, 2), 0.5]


def test_token_losses_are_those_of_one_document_at_a_time():
    """Documents of other lengths in the same batch, and batches, change nothing."""
    torch.manual_seed(0)
    model = Llama(shape(16, 20))
    documents = [document[:n] for document, n in zip(made_up(50), [14, 3, 8, 2, 11] * 10)]
    losses, hits = token_losses(model, documents)
    expected, first = [], []
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor(document)
            logp = model(ids[None, :-1])[0].log_softmax(-1)
            expected += (-logp[range(len(ids) - 1), ids[1:]]).tolist()
            first += (logp.argmax(-1) == ids[1:]).int().tolist()
    assert losses == pytest.approx(expected, abs=1e-5) and hits == first
    assert 0 < sum(hits) < len(hits) == sum(len(document) - 1 for document in documents)


def test_a_measured_trial_can_be_sent_to_another_process():
    """What the sweep of the chapter does: the function with its arguments, and the result."""
    make = partial(measure_trial, Trial(16, 8), made_up(8), made_up(3), 20)
    result = pickle.loads(pickle.dumps(make))()
    assert result == make() == json.loads(json.dumps(result))
    assert result["tokens"] == 8 * 13
    assert len(result["losses"]) == len(result["right"]) == 3 * 13


# ---- the cache

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def counting(calls, result=None):
    """A make() that notes that it was called."""
    return lambda: calls.append(1) or (result or {"losses": [1.5, 2.5]})


def test_a_result_is_made_once(cache):
    calls = []
    path = result_file("trial", {"dim": 8}, "code")
    first = kept(path, counting(calls))
    assert kept(path, counting(calls)) == first == {"losses": [1.5, 2.5]}
    assert len(calls) == 1 and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name, settings, code", [
    ("other", {"dim": 8}, "code"), ("trial", {"dim": 16}, "code"),
    ("trial", {"dim": 8}, "changed")])
def test_another_name_setting_or_code_is_another_file(cache, name, settings, code):
    path = result_file("trial", {"dim": 8}, "code")
    assert path == result_file("trial", {"dim": 8}, "code") and path.parent == cache
    assert result_file(name, settings, code) != path


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1] + b"?", lambda data: data[:20], lambda data: b"",
    lambda data: data.replace(b"1.5", b"1.6")])
def test_a_damaged_result_is_named_and_made_again(cache, capsys, damage):
    calls = []
    path = result_file("trial", {}, "")
    kept(path, counting(calls))
    path.write_bytes(damage(path.read_bytes()))
    assert kept(path, counting(calls)) == {"losses": [1.5, 2.5]}
    assert len(calls) == 2 and f"{path.name} is damaged" in capsys.readouterr().out
    kept(path, counting(calls))
    assert len(calls) == 2 and not capsys.readouterr().out


def test_a_run_that_fails_leaves_nothing(cache):
    def fails():
        raise FloatingPointError("loss nan")

    with pytest.raises(FloatingPointError):
        kept(result_file("trial", {}, ""), fails)
    assert not cache.exists() or not list(cache.iterdir())
