"""What the chapter on RLHF cannot show of reward models: padding, gradients, refusals."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from sklearn import linear_model as linear

from minillm.data import ENDOFTEXT
from minillm.model import Llama, LlamaConfig
from minillm.reward import (Answers, Comparisons, RewardModel, bradley_terry_loss, comparison_loss,
                            count_comparisons, decode_answers, draw_comparisons, learned_reward,
                            pack_answers, read_on)
from minillm.sft import ASSISTANT, USER, encode_prompt
from minillm.tokenizer import Tokenizer
from minillm.train import TrainConfig, train
from minillm.world.questions import dialogues, exams, say

TINY = LlamaConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48,
                   max_seq_len=512)
SPECIAL = (ENDOFTEXT, USER, ASSISTANT)


def tiny(seed=0):
    """A model far from uniform, so that a wrong shift or mask shows."""
    torch.manual_seed(seed)
    model = Llama(TINY)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    texts = [message["content"] for messages in dialogues(40) for message in messages]
    return Tokenizer.train(texts, 300, special_tokens=SPECIAL)


@pytest.fixture(scope="module")
def end(tokenizer):
    return tokenizer.special_tokens[ENDOFTEXT]


PROMPTS = [[say("user", "Who has it?")], [say("user", "Tell me where the blue kite is now.")],
           [say("user", "Hi")]]
TEXTS = [["Vera.", "I don't know.", "It is with Tom, my friend."], ["By the river.", "No", "Yes."],
         ["Hello!", "The blue kite is with Nora, by the river.", "Good evening!"]]


def judge(end, seed=0):
    """A reward model with a head that says something."""
    torch.manual_seed(seed)
    model = RewardModel(tiny(seed), end)
    nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


# ---- answers as a batch

def test_packed_answers_are_what_was_packed(tokenizer, end):
    a = pack_answers(PROMPTS, TEXTS, tokenizer)
    assert decode_answers(a, tokenizer) == TEXTS
    assert a.ended(end).all() and a.ids.shape == a.mask.shape and a.ids.shape[:2] == (3, 3)
    for prompt, padding, messages in zip(a.prompts, a.padding, PROMPTS):
        assert prompt[padding:].tolist() == encode_prompt(messages, tokenizer)
    lengths = [[len(tokenizer.encode(t)) + 1 for t in group] for group in TEXTS]
    assert a.mask.sum(-1).tolist() == lengths


def test_the_end_token_is_told_from_padding_of_the_same_id(tokenizer, end):
    """Padding has the id of the end token; an answer that was cut off has not ended for that."""
    a = pack_answers(PROMPTS, TEXTS, tokenizer)
    assert (a.ids[~a.mask] == end).all() and (~a.mask).any()
    cut = a.mask.clone()
    cut[0, 2, a.last[0, 2]] = False
    short = replace(a, mask=cut)
    assert not short.ended(end)[0, 2] and short.ended(end).sum() == 8
    assert decode_answers(short, tokenizer)[0] == [*TEXTS[0][:2], None]


def test_answers_move_to_a_device_with_all_that_they_have(tokenizer):
    there = pack_answers(PROMPTS, TEXTS, tokenizer).to("meta")
    assert {z.device.type for z in vars(there).values()} == {"meta"}
    assert RewardModel(tiny().to("meta"), 0).head.weight.device.type == "meta"


@pytest.mark.parametrize("texts, message", [
    ([["a", "b"], ["c"], ["d", "e"]], r"groups of \[2, 1, 2\]"),
    ([["a"], ["b"]], r"3 prompts .* groups of \[1, 1\]"),
    ([[], [], []], r"groups of \[0, 0, 0\]"),
    ([["a", "b"], ["c", ""], ["d", "e"]], "answer 1 to prompt 1 is ''"),
    ([["a", "b"], ["c", " "], ["d", "e"]], "answer 1 to prompt 1 is ' '"),
    ([["a", "b"], ["c", "d"], [None, "e"]], "answer 0 to prompt 2 is None"),
])
def test_groups_that_cannot_be_packed(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        pack_answers(PROMPTS, texts, tokenizer)


# ---- a prompt is read once

def test_reading_a_prompt_once_is_reading_it_with_each_answer(tokenizer):
    model, a = tiny(), pack_answers(PROMPTS, TEXTS, tokenizer)
    with torch.no_grad():
        states = read_on(model, a.prompts, a.padding, a.ids)
        for i, messages in enumerate(PROMPTS):
            prompt = encode_prompt(messages, tokenizer)
            for j in range(3):
                answer = a.ids[i, j][a.mask[i, j]].tolist()
                alone = model(torch.tensor([prompt + answer]), head=False)[0, len(prompt):]
                assert torch.allclose(states[i, j, :len(answer)], alone, atol=1e-4)


def test_gradients_pass_through_the_shared_prompt(tokenizer):
    """The same gradients as from whole rows, those of the prompt's tokens included."""
    a = pack_answers(PROMPTS[:1], TEXTS[:1], tokenizer)
    shared, alone = tiny(), tiny()
    (read_on(shared, a.prompts, a.padding, a.ids) * a.mask[..., None]).square().sum().backward()
    for j in range(3):
        row = torch.cat((a.prompts[0], a.ids[0, j][a.mask[0, j]]))
        states = alone(row[None], head=False)[0, a.prompts.shape[1]:]
        states.square().sum().backward()
    for (name, p), q in zip(shared.named_parameters(), alone.parameters()):
        if name != "lm_head.weight":
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max()), name


# ---- the reward model

def test_padding_and_company_do_not_matter(tokenizer, end):
    model, a = judge(end), pack_answers(PROMPTS, TEXTS, tokenizer)
    with torch.no_grad():
        together = model(a)
        for i in range(3):
            for j in range(3):
                one = model(pack_answers([PROMPTS[i]], [[TEXTS[i][j]]], tokenizer))
                assert torch.allclose(together[i, j], one[0, 0], atol=1e-4)
        noise = torch.where(a.mask, a.ids, torch.randint_like(a.ids, 256))
        assert torch.allclose(model(replace(a, ids=noise)), together, atol=1e-4)


def test_it_reads_at_the_end_token(tokenizer, end):
    """The state there, times the head: what the whole row gives at its last position."""
    model = judge(end)
    ids = [*encode_prompt(PROMPTS[0], tokenizer), *tokenizer.encode(TEXTS[0][0]), end]
    with torch.no_grad():
        expected = model.head(model.trunk(torch.tensor([ids]), head=False)[0, -1])
        got = model(pack_answers(PROMPTS[:1], [TEXTS[0][:1]], tokenizer))
    assert torch.allclose(got[0], expected, atol=1e-4)


def test_an_answer_without_its_end_token_is_refused(tokenizer, end):
    a, model = pack_answers(PROMPTS, TEXTS, tokenizer), judge(end)
    cut = a.mask.clone()
    cut[1, 2, a.last[1, 2]] = False
    with pytest.raises(ValueError, match="answer 2 to prompt 1 has no end token"):
        model(replace(a, mask=cut))
    cut[1, 2] = False
    with pytest.raises(ValueError, match="answer 2 to prompt 1 is missing"):
        model(replace(a, mask=cut))


def test_a_new_reward_model_finds_all_alike_and_leaves_the_policy_alone(tokenizer, end):
    policy = tiny()
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    model, a = RewardModel(policy, end), pack_answers(PROMPTS, TEXTS, tokenizer)
    assert torch.equal(model(a), torch.zeros(3, 3))
    pairs = [(i, 0, 1) for i in range(3)]
    history = train(model, Comparisons(PROMPTS, TEXTS, pairs, tokenizer, 3),
                    TrainConfig(steps=8, lr=1e-2, warmup=1, bar=False, precision="float32"),
                    comparison_loss, count_comparisons)
    assert abs(history[0]["loss"] - math.log(2)) < 1e-5 and history[-1]["loss"] < 0.6
    assert all(torch.equal(p, before[name]) for name, p in policy.state_dict().items())


def test_learned_reward_of_answers_that_did_not_end(tokenizer, end):
    model, a = judge(end), pack_answers(PROMPTS, TEXTS, tokenizer)
    asked = [(messages, None) for messages in PROMPTS]
    cut = a.mask.clone()
    cut[1, 2, a.last[1, 2]] = False
    reward = learned_reward(model, tokenizer, TEXTS[0][1], 0.5, -3.0)
    whole, short = reward(asked, a, None), reward(asked, replace(a, mask=cut), None)
    scores = model(a).detach()
    assert abs(whole[0, 1]) < 1e-4                                # the anchor itself
    assert torch.allclose(whole - whole[:, :1], 0.5 * (scores - scores[:, :1]), atol=1e-4)
    assert short[1, 2] == -3
    others = torch.ones(3, 3, dtype=torch.bool)
    others[1, 2] = False
    assert torch.allclose(short[others], whole[others], atol=1e-4)


# ---- comparisons

def test_bradley_terry_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert abs(bradley_terry_loss(chosen, rejected).item() - expected) < 1e-6
    far = bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert abs(far.item() - 1000) < 1e-2


def test_the_reward_that_bradley_terry_finds_is_that_of_logistic_regression():
    """Three answers, all pairs: the maximum of the likelihood by another library's route."""
    rng = torch.Generator().manual_seed(0)
    true = torch.tensor([0.0, 0.8, -0.5])
    i, j = (torch.randint(0, 3, (4000,), generator=rng) for _ in range(2))
    i, j = i[i != j], j[i != j]
    first = torch.rand(len(i), generator=rng) < torch.sigmoid(true[i] - true[j])
    winner, loser = torch.where(first, i, j), torch.where(first, j, i)
    rewards = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = bradley_terry_loss(rewards[winner], rewards[loser])
        loss.backward()
        return loss

    optimizer.step(closure)
    design = torch.nn.functional.one_hot(i, 3) - torch.nn.functional.one_hot(j, 3)
    fit = linear.LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10, max_iter=1000)
    found = fit.fit(design.numpy(), first.numpy()).coef_[0]
    ours = (rewards - rewards.mean()).detach().numpy()
    assert abs(ours - (found - found.mean())).max() < 1e-3


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_pairs_of_rewards_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"one shape \(n,\)"):
        bradley_terry_loss(*(torch.zeros(s) for s in shapes))


def test_choices_follow_bradley_terry():
    """One prompt over and over: the better answer wins as often as the model says."""
    n = 4000
    utilities = torch.tensor([[1.0, 0.0]]).expand(n, 2)
    for temperature in 0.5, 2.0:
        chosen = draw_comparisons([["a", "b"]] * n, utilities, temperature, seed=1)
        share = sum(winner == 0 for _, winner, _ in chosen) / n
        expected = 1 / (1 + math.exp(-1 / temperature))
        assert len(chosen) == n and abs(share - expected) < 4 * math.sqrt(0.25 / n)
    certain = draw_comparisons([["a", "b"]] * 50, utilities[:50], 1e-3, seed=1)
    assert certain == [(i, 0, 1) for i in range(50)]


def test_the_same_text_is_not_compared_with_itself():
    texts = [["a", "a", "b"], ["c", None, "c"]]
    chosen = draw_comparisons(texts, torch.zeros(2, 3), 1.0)
    assert sorted((i, *sorted(pair)) for i, *pair in chosen) == [(0, 0, 2), (0, 1, 2)]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_that_are_none(temperature):
    with pytest.raises(ValueError, match=f"temperature must be above 0: got {temperature}"):
        draw_comparisons([["a", "b"]], torch.zeros(1, 2), temperature)


def test_batches_keep_prompts_answers_and_pairs_together(tokenizer):
    """Whatever the order, a pair names the two texts that it compared."""
    asked = exams(12)
    prompts = [messages for messages, _ in asked]
    texts = [[q.answer("polite"), q.answer("rude"), q.answer("plain")] for _, q in asked]
    pairs = [(i, 0, 1 + i % 2) for i in range(12) if i != 5]
    batches, seen = Comparisons(prompts, texts, pairs, tokenizer, 4, seed=3), []
    for i in range(3):
        *fields, rows = batches[i]
        answers = Answers(*fields)
        decoded = decode_answers(answers, tokenizer)
        for k, winner, loser in rows.tolist():
            prompt = answers.prompts[k][answers.padding[k]:].tolist()
            (at,) = [j for j, m in enumerate(prompts) if encode_prompt(m, tokenizer) == prompt]
            assert decoded[k] == texts[at] and (at, winner, loser) in pairs
            seen.append(at)
    assert len(seen) >= 11 and 5 not in seen
    with pytest.raises(ValueError, match="no pairs"):
        Comparisons(prompts, texts, [], tokenizer, 4)


def test_a_batch_counts_its_pairs(tokenizer, end):
    model = judge(end)
    batch = Comparisons(PROMPTS, TEXTS, [(0, 0, 1), (0, 2, 1), (2, 1, 0)], tokenizer, 2)[0]
    with torch.no_grad():
        rewards = model(Answers(*batch[:4]))
        by_hand = sum(-torch.log(torch.sigmoid(rewards[i, w] - rewards[i, k]))
                      for i, w, k in batch[4].tolist())
        assert torch.allclose(comparison_loss(model, *batch), by_hand, atol=1e-4)
    assert count_comparisons(*batch) == len(batch[4]) == 3
