"""Speculative decoding: exactly the distribution of the target, in batches, too."""
import copy

import pytest
import torch

from minillm.speculative import speculate, verify
from minillm.tests.test_generate import IDS, MODEL, build, uncached


def test_a_draft_equal_to_the_target_is_always_accepted():
    for seed in range(5):
        ids, rate = speculate(MODEL, copy.deepcopy(MODEL), IDS, 40, k=3, seed=seed)
        # 1, unless p / q of equal distributions is rounded to less than 1
        assert rate > 0.999 and ids.shape == (3, 48)
    # the very same object needs two caches
    assert speculate(MODEL, MODEL, IDS, 40)[0].shape == (3, 48)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_speculation_is_greedy_generation(k, rows):
    draft = build(seed=1, dim=16, n_layers=1)
    ids, rate = speculate(MODEL, draft, IDS[:rows], 40, k=k, temperature=0)
    assert torch.equal(ids, uncached(MODEL, IDS[:rows], 40)) and rate < 0.5


def test_a_draft_of_another_context_must_hold_the_text_too():
    with pytest.raises(ValueError, match="max_seq_len=16"):
        speculate(MODEL, build(max_seq_len=16), IDS, 20)


def chi_square(counts, expected):
    """The p-value of Pearson's test; cells where fewer than 5 are expected count as one."""
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(expected) - 1).double()
    return torch.special.gammaincc(degrees / 2, statistic / 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_speculated_texts_have_exactly_the_distribution_of_the_target(temperature):
    """All texts of 3 tokens over 5 words, with their true probabilities.

    Refused, accepted and free tokens all occur.
    """
    shape = dict(vocab_size=5, dim=16, n_layers=1, n_heads=2, g=1)
    target, draft = build(seed=2, std=0.4, **shape), build(seed=3, std=0.4, **shape)
    prompt = torch.tensor([[1, 2]])
    texts = torch.cartesian_prod(*[torch.arange(5)] * 3)
    with torch.no_grad():
        logits = target(torch.cat((prompt.expand(125, -1), texts), dim=1))[:, 1:4]
    of_tokens = (logits / temperature).softmax(-1).gather(2, texts[..., None])[..., 0]
    p = of_tokens.prod(1)
    batch, settings = prompt.expand(20, -1), {"k": 2, "temperature": temperature}
    out = [speculate(target, draft, batch, 3, seed=i, **settings) for i in range(350)]
    out += [speculate(target, draft, prompt, 3, seed=i, **settings) for i in range(500)]
    cells = torch.cat([ids[:, 2:] for ids, _ in out]) @ torch.tensor([25, 5, 1])
    assert len(cells) * 3 > 20_000
    assert 0.2 < sum(rate for _, rate in out) / len(out) < 0.95
    # One draw in 10,000 of the true distribution would fail; the seeds are fixed.
    assert chi_square(cells.bincount(minlength=125), len(cells) * p) > 1e-4


def test_verify_stops_a_batch_at_its_first_refusal():
    p, q = torch.zeros(2, 3, 4), torch.full((2, 2, 4), 0.25)
    p[:, :, 0] = 1                                               # the target wants token 0 only
    kept, passed = verify(p, q, torch.tensor([[0, 0], [0, 3]]), torch.Generator().manual_seed(0))
    assert kept.tolist() == [[0, 0], [0, 0]] and passed.tolist() == [[True, True], [True, False]]
    kept, _ = verify(p, q, torch.tensor([[0, 0], [0, 0]]), torch.Generator().manual_seed(0))
    assert kept.tolist() == [[0, 0, 0]] * 2                      # all accepted, and one more
    kept, _ = verify(p, q, torch.tensor([[3, 0], [0, 0]]), torch.Generator().manual_seed(0))
    assert kept.tolist() == [[0], [0]]
