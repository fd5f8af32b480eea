"""What the notebook on preferences cannot show: ragged batches, training, input to be refused.

Parity with trl: test_dpo_parity.
"""
import math

import pytest
import torch
from torch import nn

from minillm import dpo
from minillm.data import ENDOFTEXT
from minillm.dpo import (Pairs, count_pairs, dpo_loss, encode_answer, ipo_loss, kto_loss, orpo_loss,
                         pad_right, preference_loss, sample_pairs, sequence_kl, sequence_logprob)
from minillm.model import Llama, LlamaConfig
from minillm.sft import ASSISTANT, USER
from minillm.tokenizer import Tokenizer
from minillm.train import TrainConfig, train
from minillm.world.questions import Question, dialogues, exams

TINY = LlamaConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48,
                   max_seq_len=512)
SIX_WORDS = LlamaConfig(vocab_size=6, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16)
LOSSES = (dpo_loss, ipo_loss, kto_loss, orpo_loss)


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
    return Tokenizer.train(texts, 300, special_tokens=(ENDOFTEXT, USER, ASSISTANT))


@pytest.fixture(scope="module")
def pairs():
    return [(messages, question.answer("polite"), question.answer("rude"))
            for messages, question in exams(12)]


def draw(n, rng):
    return torch.randint(0, 300, (n,), generator=rng).tolist()


def ragged(seed=0, lengths=((5, 3, 7), (12, 1, 2), (2, 9, 1), (8, 4, 4), (1, 6, 3))):
    """Rows as trl takes them: ids of prompt, chosen and rejected, of unequal lengths."""
    rng, rows = torch.Generator().manual_seed(seed), []
    for prompt, chosen, rejected in lengths:
        rows.append({"prompt_ids": draw(prompt, rng), "chosen_ids": draw(chosen, rng),
                     "rejected_ids": draw(rejected, rng)})
    return rows


def batch(rows):
    """The same rows for sequence_logprob, chosen first."""
    pairs = [(row["prompt_ids"], row[side])
             for side in ("chosen_ids", "rejected_ids") for row in rows]
    return pad_right([(prompt + answer, [False] * len(prompt) + [True] * len(answer))
                      for prompt, answer in pairs])


def logprobs(rows, policy, reference):
    ids, mask = batch(rows)
    with torch.no_grad():
        p, q = (sequence_logprob(model, ids, mask) for model in (policy, reference))
    return p, q, mask.sum(1).float()


# ---- log-probabilities

def test_padding_and_company_do_not_matter():
    rows, model = ragged(3), tiny(3)
    ids, mask = batch(rows)
    with torch.no_grad():
        together = sequence_logprob(model, ids, mask)
        # another filler after the last marked token
        other = torch.where(mask.flip(1).cummax(1)[0].flip(1), ids, 299)
        assert (other != ids).any()
        assert torch.allclose(together, sequence_logprob(model, other, mask), atol=1e-4)
        for i, in_company in enumerate(together):
            n = int(mask[i].nonzero()[-1]) + 1
            alone = sequence_logprob(model, ids[i:i + 1, :n], mask[i:i + 1, :n])[0]
            assert torch.isclose(in_company, alone, atol=1e-4)


def test_a_probability_distribution_over_answers():
    """The probabilities of all answers of one length to one prompt sum to 1: nothing is shifted,
    left out or counted twice."""
    torch.manual_seed(0)
    model = Llama(SIX_WORDS)
    for p in model.parameters():
        nn.init.normal_(p)
    answers = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    ids = torch.cat((torch.tensor([[1, 2, 3]]).expand(36, 3), answers), 1)
    mask = torch.tensor([[False] * 3 + [True] * 2]).expand(36, 5)
    with torch.no_grad():
        p = sequence_logprob(model, ids, mask).exp()
    assert p.std() > 0.01 and math.isclose(p.sum(), 1, abs_tol=1e-4)


def test_bfloat16_is_near_and_float32():
    ids, mask = batch(ragged(6))
    with torch.no_grad():
        exact, rounded = (sequence_logprob(tiny(6), ids, mask, precision)
                          for precision in ("float32", "bf16"))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, rtol=0.1, atol=0.5)


# ---- batches and training

def test_pairs_mark_each_answer_by_its_own_mask(tokenizer, pairs):
    batches = Pairs(pairs, tokenizer, tiny(), batch_size=4)
    seen = []
    for i in range(3):
        ids, mask, reference = batches[i]
        assert len(ids) == 8 and count_pairs(ids, mask, reference) == 4
        for k, (row, marked) in enumerate(zip(ids, mask)):
            text = tokenizer.decode(row.tolist())
            messages, *answers = next(pair for pair in pairs if pair[0][0]["content"] in text)
            assert tokenizer.decode(row[marked].tolist()) == answers[k // 4] + ENDOFTEXT
            assert (marked.diff() != 0).sum() <= 2                                  # one stretch
            seen.append(messages[0]["content"])
        assert torch.allclose(reference, sequence_logprob(tiny(), ids, mask).detach(), atol=1e-3)
    # an epoch has every pair
    assert len(set(seen)) == 12
    again = Pairs(pairs, tokenizer, tiny(), batch_size=4)
    assert all(torch.equal(a, b) for a, b in zip(batches[4], again[4]))


def test_only_the_last_answer_of_a_dialogue_is_marked(tokenizer):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Who?"}]
    ids, mask = encode_answer(messages, f"Vera. {USER}", tokenizer)
    marked = [i for i, m in zip(ids, mask) if m]
    assert tokenizer.decode(marked) == f"Vera. {USER}{ENDOFTEXT}"
    # that in the answer is ordinary text
    assert ids.count(tokenizer.special_tokens[USER]) == 2


def test_first_loss_is_ln_2_and_the_reference_stays(tokenizer, pairs):
    model, reference = tiny(1), tiny(1)
    log, before = [], [p.clone() for p in reference.parameters()]
    config = TrainConfig(steps=8, lr=3e-3, warmup=1, bar=False, precision="float32")
    history = train(model, Pairs(pairs, tokenizer, reference, 4), config,
                    loss=preference_loss(dpo_loss, 0.1, log), count=count_pairs)
    # The reference read the same answers in other batches: sums that differ by rounding only.
    assert abs(history[0]["loss"] - math.log(2)) < 1e-5 and history[0]["tokens"] == 4
    assert history[-1]["loss"] < math.log(2) - 0.01 and len(log) == 8
    assert log[-1]["chosen"] > log[-1]["rejected"] and log[-1]["accuracy"] > 0.5
    assert all(torch.equal(p, q) and q.grad is None for p, q in zip(before, reference.parameters()))


def test_accumulation_weighs_every_pair_alike(tokenizer, pairs):
    runs = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        model = tiny(1)
        batches = Pairs(pairs[:4], tokenizer, tiny(2), batch_size)
        config = TrainConfig(steps=1, lr=1e-3, warmup=1, accumulate=accumulate, bar=False,
                             precision="float32")
        train(model, batches, config, loss=preference_loss(dpo_loss, 0.1), count=count_pairs)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*runs, atol=1e-4)


def test_without_reference_the_numbers_of_tokens(tokenizer, pairs):
    batches, model = Pairs(pairs, tokenizer, None, batch_size=4), tiny(1)
    ids, mask, tokens = batches[0]
    assert torch.equal(tokens, mask.sum(1).float())
    sums = sequence_logprob(model, ids, mask)
    expected = orpo_loss(*sums.chunk(2), *mask.sum(1).chunk(2), 0.5) * 4
    assert torch.isclose(preference_loss(orpo_loss, 0.5)(model, ids, mask, tokens), expected)


@pytest.mark.parametrize("function", LOSSES)
def test_every_loss_prefers_the_chosen(function):
    """Its gradient raises the chosen and lowers the rejected log-probability, and its value falls
    with the margin."""
    chosen = torch.tensor([-3.0, -8.0], requires_grad=True)
    rejected = torch.tensor([-4.0, -5.0], requires_grad=True)
    other = torch.tensor([-3.5, -8.0]), torch.tensor([-4.0, -5.5])
    if function is orpo_loss:                                             # numbers of tokens
        other = torch.tensor([5.0, 4.0]), torch.tensor([6.0, 9.0])
    loss = function(chosen, rejected, *other, 0.1)
    loss.backward()
    assert loss.ndim == 0 and (chosen.grad < 0).all() and (rejected.grad > 0).all()


@pytest.mark.parametrize("function", LOSSES)
def test_far_apart_stays_finite(function):
    far = torch.full((2,), -1e4, requires_grad=True)
    near = torch.full((2,), -1e-3, requires_grad=True)
    other = torch.full((2,), 1.0 if function is orpo_loss else -10.0)
    for pair in ((near, far), (far, near)):
        loss = function(*pair, other, other, 0.1)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(far.grad).all() and torch.isfinite(near.grad).all()


# ---- sampled pairs

def test_sample_pairs_ranks_by_the_judge(monkeypatch):
    prompts = [([{"role": "user", "content": text}], text) for text in ("a", "b", "c", "d")]
    answers = [["one", "three!", "two"], ["same", "same", "same"], ["x", None, "  "],
               ["ab", "ba", "cc"]]
    monkeypatch.setattr(dpo, "replies", lambda *_, **__: answers)
    found = sample_pairs(None, None, prompts, lambda about, answer: len(answer), n=3)
    assert found == [(prompts[0][0], "three!", "one")]


def test_kl_is_that_of_the_distributions(tokenizer):
    """Exact over all answers of two tokens: the mean of sequence_kl under the policy is the KL
    divergence."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Llama(SIX_WORDS))
        for p in models[-1].parameters():
            nn.init.normal_(p)
    answers = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    ids = torch.cat((torch.tensor([[1, 2, 3]]).expand(36, 3), answers), 1)
    mask = torch.tensor([[False] * 3 + [True] * 2]).expand(36, 5)
    with torch.no_grad():
        p, q = (sequence_logprob(model, ids, mask) for model in models)
    kl = sequence_kl(*models, ids, mask)
    assert (kl >= 0).all() and not kl.requires_grad
    assert math.isclose((p.exp() * kl).sum(), (p.exp() * (p - q)).sum(), abs_tol=1e-4)


# ---- refused

@pytest.mark.parametrize("beta", (0, -0.1, math.nan))
@pytest.mark.parametrize("function", LOSSES)
def test_beta_must_be_positive(function, beta):
    z = torch.ones(3)
    with pytest.raises(ValueError, match=f"beta must be above 0: got {beta}"):
        function(-z, -z, z, z, beta)
    with pytest.raises(ValueError, match="beta must be above 0"):
        preference_loss(function, beta)


@pytest.mark.parametrize("function", LOSSES)
def test_shapes_must_agree(function):
    z = torch.ones(3)
    for wrong in (torch.ones(2), torch.ones(3, 1), torch.ones(())):
        with pytest.raises(ValueError, match=r"one shape \(b,\)"):
            function(-z, -wrong, z, z, 0.1)
    with pytest.raises(ValueError, match=r"one shape \(b,\)"):
        function(*[torch.ones(0)] * 4, 0.1)


@pytest.mark.parametrize("function", LOSSES)
def test_numbers_that_are_no_tensors(function):
    z = torch.ones(1)
    for wrong in -12.5, [-12.5], None:
        with pytest.raises(TypeError, match=r"must be tensors \(b,\): got .?(-12.5|None)"):
            function(z, wrong, z, z)


def test_masks_that_cannot_be():
    ids = torch.ones(2, 4, dtype=torch.int64)
    for mask, message in (
        (torch.ones(2, 3), r"got \(2, 4\) and \(2, 3\)"),
        (torch.ones(2, 4), "row 0 marks its first token"),
        (torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]), "row 1 marks no token"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_logprob(tiny(), ids, mask)


def test_pairs_that_teach_nothing(tokenizer, pairs):
    messages = [{"role": "user", "content": "Who?"}]
    for bad, message in (([], "no pairs"), ([(messages, "Vera.", "Vera.")], "pair 0.*'Vera.'"),
                         ([pairs[0], (messages, "Vera.", " ")], "pair 1: an answer is empty"),
                         ([(messages + messages, "Vera.", "Tom.")], "message 1")):
        with pytest.raises(ValueError, match=message):
            Pairs(bad, tokenizer, tiny(), 1)
    with pytest.raises(ValueError, match="batch_size .* documents, which is 12: got 13"):
        Pairs(pairs, tokenizer, tiny(), 13)


@pytest.mark.parametrize("bad", [
    {"prompt": [], "chosen": "yes", "rejected": "no"}, ([], "yes"), ([], ["yes"], ["no"]), "yes"])
def test_a_pair_of_another_kind_is_named(bad, tokenizer, pairs):
    """A dict, as trl has it, would be unpacked to the names of its fields."""
    with pytest.raises(TypeError, match=r"pair 1 must be \(messages, chosen, rejected\)"):
        Pairs([pairs[0], bad], tokenizer, tiny(), 1)


def test_one_answer_is_no_comparison(tokenizer):
    with pytest.raises(ValueError, match="n must be at least 2 answers per prompt.* got 1"):
        sample_pairs(tiny(), tokenizer, exams(1), Question.reward, n=1)


def test_a_pair_that_is_too_long_is_named(tokenizer):
    ask = [{"role": "user", "content": "hi"}]
    pairs = [(ask, "yes", "no")] * 17 + [(ask, "no", "yes " * 600)] + [(ask, "yes", "no")]
    with pytest.raises(ValueError, match="pair 17 has .* more than max_seq_len=512"):
        Pairs(pairs, tokenizer, tiny(), 2)
