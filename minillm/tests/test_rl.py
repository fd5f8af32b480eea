"""What the chapter on RLHF cannot show of reinforcement learning: oracles, padding, refusals."""
import copy
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from scipy import signal

from minillm import rl
from minillm.fast_decode import FastDecoder
from minillm.model import Llama, LlamaConfig
from minillm.reward import decode_answers
from minillm.rl import (Answers, RLConfig, average, check_reference, check_rewards,
                        clipped_objective, clipped_share, describe, gae, grpo, grpo_advantages,
                        grpo_loss, kl_estimates, ppo, ppo_loss, questions_of, rewards_per_token,
                        roll_out, sample, states_before, tilt, token_logprobs, whiten)
from minillm.sft import encode_prompt
from minillm.tests.test_reward import (PROMPTS, TEXTS, TINY, end, pack_answers, tiny,
                                       tokenizer)

__all__ = ["end", "tokenizer"]                       # fixtures

ASKED = [(messages, i) for i, messages in enumerate(PROMPTS)]
MASK = torch.tensor([[[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]]).bool()


def random_logps(seed=0, shape=(1, 2, 7), spread=0.3):
    """Log-probabilities of a policy, of the older one that drew, and of the reference."""
    rng = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(shape, generator=rng)
    return logp, *(logp + spread * torch.randn(shape, generator=rng) for _ in range(2))


# ---- the best that is possible

def test_tilting_is_the_optimum_and_its_divergence():
    p, r = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.tensor([[0.0, 1.0, -1.0, 9.0]])
    w, kl = tilt(p, r, 0.7)
    by_hand = p * (r / 0.7).exp()
    assert torch.allclose(w, by_hand / by_hand.sum(), atol=1e-6) and w[0, 3] == 0
    assert abs(kl.item() - sum(a * math.log(a / b) for a, b in zip(w[0, :3].tolist(),
                                                                   p[0, :3].tolist()))) < 1e-5
    j = (w * r).sum() - 0.7 * kl
    z = 0.7 * (p * (r / 0.7).exp()).sum().log()
    assert abs(j - z) < 1e-5                                    # beta ln Z, which none exceeds
    others = torch.distributions.Dirichlet(torch.ones(3)).sample((3000,))
    scores = (others * r[0, :3]).sum(-1) - 0.7 * (others * (others / p[0, :3]).log()).sum(-1)
    assert (scores <= z + 1e-5).all()


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_prices_that_are_none(beta):
    with pytest.raises(ValueError, match=f"beta must be above 0: got {beta}"):
        tilt(torch.tensor([0.5, 0.5]), torch.zeros(2), beta)


# ---- drawing answers

def test_what_was_drawn_has_the_probability_that_the_model_gives_it(tokenizer):
    model = tiny()
    for drawer in model, FastDecoder(model):
        answers, logp, entropy = sample(drawer, tokenizer, PROMPTS, 4, 9, seed=2)
        with torch.no_grad():
            logits = model.lm_head(states_before(model, answers))
        assert torch.allclose(token_logprobs(logits, answers), logp, atol=1e-3)
        p = logits.softmax(-1)
        assert torch.allclose(entropy, -(p * p.log()).sum(-1) * answers.mask, atol=1e-3)
        assert (logp[~answers.mask] == 0).all() and (entropy[~answers.mask] == 0).all()


def test_log_probabilities_against_whole_rows(tokenizer):
    model, a = tiny(), pack_answers(PROMPTS, TEXTS, tokenizer)
    with torch.no_grad():
        logp = token_logprobs(model.lm_head(states_before(model, a)), a)
        for i, messages in enumerate(PROMPTS):
            prompt = encode_prompt(messages, tokenizer)
            for j in range(3):
                answer = a.ids[i, j][a.mask[i, j]]
                row = torch.cat((torch.tensor(prompt), answer))
                whole = model(row[None, :-1])[0, len(prompt) - 1:].log_softmax(-1)
                expected = whole.gather(1, answer[:, None])[:, 0]
                assert torch.allclose(logp[i, j, :len(answer)], expected, atol=1e-3)


class Constant(nn.Module):
    """An output layer that does not look: 0, and `logit` for one token."""

    def __init__(self, token, logit):
        super().__init__()
        self.token, self.logit = token, logit

    def forward(self, x):
        logits = torch.zeros(*x.shape[:-1], TINY.vocab_size)
        logits[..., self.token] = self.logit
        return logits


def never_or_always(end, logit):
    """A model that ends an answer with certainty, or never."""
    model = tiny()
    model.lm_head = Constant(end, logit)
    return model


def test_the_end_token_of_the_prompt_ends_no_answer(tokenizer, end):
    """Prompts begin with that token; an answer is over only when it has one of its own."""
    a, _, _ = sample(never_or_always(end, -1e9), tokenizer, PROMPTS, 2, 5)
    assert (a.prompts == end).any(1).all()
    assert a.mask.all() and a.ids.shape == (3, 2, 5) and not a.ended(end).any()
    assert decode_answers(a, tokenizer) == [[None, None]] * 3
    a, _, _ = sample(never_or_always(end, 1e9), tokenizer, PROMPTS, 2, 5)
    assert a.ids.shape == (3, 2, 1) and a.ended(end).all() and a.mask.all()


def test_answers_follow_the_seed(tokenizer):
    draws = [sample(tiny(), tokenizer, PROMPTS, 3, 6, seed=s)[0].ids for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("n, new", [(0, 5), (2, 0), (-1, 5)])
def test_numbers_of_answers_that_are_none(tokenizer, n, new):
    with pytest.raises(ValueError, match=f"got {n} and {new}"):
        sample(tiny(), tokenizer, PROMPTS, n, new)


# ---- KL

def test_estimates_against_the_exact_divergence():
    """Means over all outcomes: k1 and k3 have that of the divergence, k2 nearly, for near models;
    k2 and k3 are never negative, k1 is now and then."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=rng, dtype=torch.float64)
    p = logits.log_softmax(-1)
    q = (logits + 0.1 * torch.randn(12, generator=rng, dtype=torch.float64)).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    k1, k2, k3 = kl_estimates(p, q)
    means = [(p.exp() * k).sum() for k in (k1, k2, k3)]
    assert abs(means[0] - exact) < 1e-9 and abs(means[2] - exact) < 1e-9
    assert abs(means[1] / exact - 1) < 0.15
    assert k2.min() >= 0 and k3.min() >= 0 and k1.min() < 0
    assert torch.allclose(k3, (q - p).exp() - 1 - (q - p), atol=1e-12)


def test_k3_keeps_its_digits_near_zero():
    """In float32, exp(x) - 1 - x of 1e-4 is lost in the rounding of exp(x)."""
    logp, reference = torch.tensor([-1.0]), torch.tensor([-1.0001])
    x = (reference - logp).double()
    assert abs(kl_estimates(logp, reference)[2].item() / (x**2 / 2).item() - 1) < 1e-2
    naive = (reference - logp).exp() - 1 - (reference - logp)
    assert abs(naive.item() / (x**2 / 2).item() - 1) > 1e-2


# ---- policy gradient

def test_the_sampled_gradient_of_an_enumerable_policy_is_the_exact_one():
    """Four answers: the mean of A grad log pi over draws, against the gradient of the expected
    reward; with PPO's and GRPO's loss at their first step."""
    logits = torch.tensor([0.3, -0.2, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    (logits.softmax(-1) * rewards).sum().backward()
    exact = logits.grad.clone()
    n = 200_000
    drawn = torch.multinomial(logits.detach().softmax(-1), n, replacement=True,
                              generator=torch.Generator().manual_seed(0))
    shape = (n // 4, 4, 1)                          # groups of four answers of one token
    mask, r = torch.ones(shape, dtype=torch.bool), rewards[drawn].view(n // 4, 4)
    advantages = r - rewards.mean()                 # a baseline that does not depend on the answer
    for name in "ppo", "grpo":
        logits.grad = None
        logp = logits.log_softmax(-1)[drawn].view(shape)
        old = logp.detach()
        if name == "ppo":
            loss = ppo_loss(logp, old, advantages[..., None], mask)
        else:
            loss = grpo_loss(logp, old, old, advantages, mask)
        loss.backward()
        assert torch.allclose(-logits.grad, exact, atol=0.01), name
    # a baseline made of the group itself shrinks it by (n - 1) / n, and changes no direction
    logits.grad = None
    logp = logits.log_softmax(-1)[drawn].view(shape)
    grpo_loss(logp, logp.detach(), logp.detach(), r - r.mean(1, keepdim=True), mask).backward()
    assert torch.allclose(-logits.grad, exact * 3 / 4, atol=0.01)


# ---- advantages

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_against_a_filter_and_against_the_sum(gamma, lam):
    rng = torch.Generator().manual_seed(0)
    r, v = (torch.randn(3, 2, 9, generator=rng, dtype=torch.float64) for _ in range(2))
    delta = r + gamma * torch.cat((v[..., 1:], torch.zeros(3, 2, 1)), -1) - v
    powers = torch.tensor([[(gamma * lam)**(k - i) if k >= i else 0.0 for i in range(9)]
                           for k in range(9)], dtype=torch.float64)
    got = gae(r, v, gamma, lam)
    assert torch.allclose(got, delta @ powers, atol=1e-10)
    backwards = signal.lfilter([1], [1, -gamma * lam], delta.flip(-1).numpy(), axis=-1)
    assert torch.allclose(got, torch.from_numpy(backwards.copy()).flip(-1), atol=1e-10)


def test_gae_with_lambda_one_is_return_minus_value():
    r, v = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    assert torch.allclose(gae(r, v, 1.0, 1.0), torch.tensor([[1.5, 1.0, 0.5]]))
    assert torch.allclose(gae(r, v, 1.0, 0.0), torch.tensor([[0.5, 0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"got \(1, 3\) and \(1, 2\)"):
        gae(r, v[:, :2], 1.0, 1.0)


def test_the_reward_is_on_the_last_token_and_padding_has_none():
    logp, _, reference = random_logps()
    a = Answers(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 2, 7), MASK)
    got = rewards_per_token(torch.tensor([[5.0, 7.0]]), logp, reference, a, 0.1)
    price = -0.1 * (logp - reference)
    assert torch.allclose(got[0, 0, :3], price[0, 0, :3])
    assert torch.allclose(got[0, 0, 3], price[0, 0, 3] + 5)
    assert (got[0, 0, 4:] == 0).all() and torch.allclose(got[0, 1, 6], price[0, 1, 6] + 7)
    assert torch.allclose(got.sum(-1), torch.tensor([[5.0, 7.0]]) + (price * MASK).sum(-1))


def test_what_stands_in_padding_does_not_count():
    logp, old, reference = random_logps()
    advantages, values = torch.randn(1, 2, 7), torch.randn(1, 2, 7)
    noise = torch.where(MASK, 0.0, 3.0)
    a = Answers(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 2, 7), MASK)

    def all_of_it(extra):
        per_token = rewards_per_token(torch.ones(1, 2), logp + extra, reference, a, 0.1)
        estimates = gae(per_token, values * MASK, 1.0, 0.9)
        groups = torch.tensor([[1.0, -1.0]])
        return (ppo_loss(logp + extra, old, advantages, MASK), estimates * MASK,
                whiten(estimates + extra, MASK), clipped_share(logp + extra, old, MASK),
                *(grpo_loss(logp + extra, old, reference, groups, MASK, beta=0.3, mean=mean,
                            length=7) for mean in ("token", "sequence", "constant")))

    for x, y in zip(all_of_it(0.0), all_of_it(noise)):
        assert torch.allclose(torch.as_tensor(x), torch.as_tensor(y), atol=1e-5)


def test_whitened_advantages():
    x = torch.randn(1, 2, 7) * 4 + 3
    y = whiten(x, MASK)
    assert abs(y[MASK].mean()) < 1e-5 and abs(y[MASK].std() - 1) < 1e-5 and (y[~MASK] == 0).all()


def test_group_advantages_by_hand():
    got = grpo_advantages([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 4.0]])
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    b = 1 / (2 + 1e-4)
    expected = torch.tensor([[a, -a, -a, a], [0, 0, 0, 0], [-b, -b, -b, 3 * b]])
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("rewards, message", [
    ([[1.0, 2.0], [3.0]], r"got groups of \[2, 1\] answers"),
    ([[1.0], [2.0]], "a group of one answer"),
    ([[1.0, math.nan], [0.0, 1.0]], "answer 1 to prompt 0 is nan"),
    ([[1.0, 0.0], [-math.inf, 1.0]], "answer 0 to prompt 1 is -inf"),
    (torch.zeros(3), r"got shape \(3,\)"),
    (torch.zeros(0, 4), r"got shape \(0, 4\)"),
])
def test_groups_that_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        grpo_advantages(rewards)


# ---- losses

def test_the_clipped_objective_case_by_case():
    """Raised too far with a good answer, lowered too far with a bad one: the gradient is gone."""
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    value = clipped_objective(logp, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert torch.allclose(value, torch.tensor([1.2, -math.exp(0.5), math.exp(-0.5), -0.8]))
    value.sum().backward()
    assert torch.allclose(logp.grad, torch.tensor([0.0, -math.exp(0.5), math.exp(-0.5), 0.0]))


def test_clipped_share_counts_tokens_of_answers_only():
    old = torch.zeros(1, 2, 7)
    logp = old.clone()
    logp[0, 0, 0], logp[0, 1, 5], logp[0, 0, 6] = 0.3, -0.3, 0.9          # the last is padding
    assert abs(clipped_share(logp, old, MASK, 0.2) - 2 / 11) < 1e-6


def test_three_means_by_hand():
    """Answers of 4 and 7 tokens with advantage 2: each mean weighs them differently."""
    x = 2.0 * torch.ones(1, 2, 7)
    shares = {}
    for mean in "token", "sequence", "constant":
        weights = torch.ones(1, 2, 7, requires_grad=True)
        average(x * weights, MASK, mean, 7).backward()
        shares[mean] = 2 * weights.grad.sum(-1)[0]         # as if each answer stood alone
    assert torch.allclose(shares["sequence"], torch.tensor([2.0, 2.0]))
    assert torch.allclose(shares["constant"], torch.tensor([8 / 7, 2.0]), atol=1e-4)
    assert torch.allclose(shares["token"], torch.tensor([16 / 11, 28 / 11]))
    for wrong in ("mean", None), ("constant", None), ("constant", 0):
        with pytest.raises(ValueError, match="mean must be"):
            average(x, MASK, *wrong)


KINDS = {"token": "bnpo", "sequence": "grpo", "constant": "dr_grpo"}


@pytest.mark.parametrize("mean", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_grpo_loss_against_trl(mean, beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer
    logp, old, reference = (z[0] for z in random_logps(4))
    advantages = torch.tensor([1.3, -0.7])

    def same(z, **_):
        return z

    # what _compute_loss reads; a whole trainer wants a model, a data set and a folder
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, epsilon_low=0.2, epsilon_high=0.2,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), loss_type=KINDS[mean],
        use_vllm=False, model=SimpleNamespace(training=False), max_completion_length=9,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(gather=same, reduce=same, gather_for_metrics=same),
        _metrics={"eval": defaultdict(list)})
    inputs = {"prompt_ids": torch.zeros(2, 1), "prompt_mask": torch.ones(2, 1),
              "completion_ids": torch.zeros(2, 7), "completion_mask": MASK[0].long(),
              "advantages": advantages, "old_per_token_logps": old,
              "ref_per_token_logps": reference}
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    ours = grpo_loss(logp[None], old[None], reference[None], advantages[None], MASK, 0.2, beta,
                     mean, 9)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert clipped_share(logp, old, MASK[0]) > 0                # clipping took part


# ---- whole runs

def length_reward(asked, answers, texts):
    """Longer is better."""
    return answers.mask.sum(-1).float()


SHORT = RLConfig(steps=2, prompts=2, answers=3, lr=1e-3, warmup=1, max_new_tokens=6)


@pytest.mark.parametrize("method", [ppo, grpo])
def test_every_ratio_is_one_at_the_first_step(method, tokenizer, monkeypatch):
    """With the drawing done by another code path; and not at the second update on the same answers,
    which are still compared with the policy that drew them."""
    ratios, policy = [], tiny()

    def watch(logp, old, mask, clip):
        ratios.append(((logp - old).exp()[mask] - 1).abs().max().item())
        return clipped_share(logp, old, mask, clip)

    monkeypatch.setattr(rl, "clipped_share", watch)
    c = RLConfig(**{**vars(SHORT), "steps": 1, "updates": 2})
    log = method(policy, tiny(), tokenizer, ASKED, length_reward, c, FastDecoder)
    assert len(ratios) == 2 and ratios[0] < 1e-3 and ratios[1] > 1e-3
    assert len(log) == 1 and abs(log[0]["KL"]) < 1e-3


@pytest.mark.parametrize("method", [ppo, grpo])
def test_a_run_learns_logs_and_leaves_the_reference_alone(method, tokenizer):
    policy, reference = tiny(), tiny()
    c = RLConfig(steps=25, prompts=3, answers=8, lr=3e-3, warmup=2, beta=0.0, max_new_tokens=6)
    log = method(policy, reference, tokenizer, ASKED, length_reward, c, FastDecoder,
                 {"half": lambda *z: length_reward(*z) / 2})
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), tiny().parameters()))
    assert [set(entry) for entry in log] == [{"reward", "KL", "entropy", "length", "flat", "ended",
                                              "clipped", "half"}] * 25
    assert all(abs(e["half"] - e["reward"] / 2) < 1e-5 and abs(e["length"] - e["reward"]) < 1e-5
               for e in log)
    first, last = (sum(e["reward"] for e in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 0.05 or last > 5.95
    assert log[-1]["KL"] > 1e-3


@pytest.mark.parametrize("method", [ppo, grpo])
def test_a_run_depends_on_its_seed_alone(method, tokenizer):
    weights = []
    for noise in 1, 2:
        policy, reference = tiny(), tiny()
        torch.manual_seed(noise)
        method(policy, reference, tokenizer, ASKED, length_reward, SHORT)
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_flat_groups_teach_grpo_nothing_but_the_price(tokenizer):
    def constant(asked, answers, texts):
        return torch.ones(answers.ids.shape[:2])

    policy = tiny()
    log = grpo(policy, tiny(), tokenizer, ASKED, constant, RLConfig(**{**vars(SHORT), "beta": 0.0}))
    assert all(e["flat"] == 1 for e in log)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), tiny().parameters()))
    away = tiny(1)
    before = copy.deepcopy(away.state_dict())
    grpo(away, tiny(), tokenizer, ASKED, constant, RLConfig(**{**vars(SHORT), "beta": 0.5}))
    assert any(not torch.equal(p, before[name]) for name, p in away.state_dict().items())


@pytest.mark.parametrize("method", [ppo, grpo])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_moves_no_weight(method, value, tokenizer):
    def broken(asked, answers, texts):
        rewards = length_reward(asked, answers, texts)
        rewards[1, 2] = value
        return rewards

    policy = tiny()
    with pytest.raises(ValueError, match=f"the reward of answer 2 to prompt 1 is {value}"):
        method(policy, tiny(), tokenizer, ASKED, broken, SHORT)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), tiny().parameters()))


@pytest.mark.parametrize("method", [ppo, grpo])
def test_another_vocabulary_is_refused(method, tokenizer):
    other = Llama(LlamaConfig(**{**vars(tiny().config), "vocab_size": 301}))
    policy = tiny()
    with pytest.raises(ValueError, match="got 300 and 301 tokens"):
        method(policy, other, tokenizer, ASKED, length_reward, SHORT)
    with pytest.raises(ValueError, match="got 301 and 300 tokens"):
        check_reference(other, policy)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), tiny().parameters()))


def test_a_group_of_one_is_refused_by_grpo_and_fine_for_ppo(tokenizer):
    c = RLConfig(**{**vars(SHORT), "answers": 1})
    policy = tiny()
    with pytest.raises(ValueError, match="a group of one answer"):
        grpo(policy, tiny(), tokenizer, ASKED, length_reward, c)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), tiny().parameters()))
    assert len(ppo(policy, tiny(), tokenizer, ASKED, length_reward, c)) == 2


def test_a_step_with_a_broken_gradient_moves_no_weight(tokenizer, monkeypatch):
    monkeypatch.setattr(rl, "grpo_loss", lambda logp, *_, **__: logp.sum() * math.inf)
    policy = tiny()
    with pytest.raises(FloatingPointError, match="the gradient at step 0 has norm (nan|inf)"):
        grpo(policy, tiny(), tokenizer, ASKED, length_reward, SHORT)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), tiny().parameters()))


def test_each_question_is_asked_once_before_any_is_asked_again():
    c = RLConfig(prompts=4, seed=3)
    seen = [q for step in range(5) for q in questions_of(step, range(10), c)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_what_a_rollout_says_about_itself(tokenizer):
    policy, reference = tiny(), tiny(1)
    c = RLConfig(**{**vars(SHORT), "prompts": 3})
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    r = roll_out(policy, reference, tokenizer, ASKED, lambda *_: rewards, c, 0)
    entry = describe(r)
    assert abs(entry["flat"] - 2 / 3) < 1e-6 and abs(entry["reward"] - 2 / 3) < 1e-6
    assert abs(entry["KL"] - (r.old - r.reference).sum(-1).mean()) < 1e-5
    assert abs(entry["length"] - r.answers.mask.sum() / 9) < 1e-5
    assert entry["ended"] == sum(t is not None for row in r.texts for t in row) / 9
    expected = r.entropy.sum() / r.answers.mask.sum()
    assert abs(entry["entropy"] - expected) < 1e-5
    assert torch.equal(check_rewards(rewards), rewards)
