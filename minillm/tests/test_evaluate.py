"""evaluate.py against scipy, scikit-learn and transformers, by hand, and on what it refuses."""
import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import LlamaForCausalLM

from minillm import evaluate as e
from minillm.dpo import encode_answer, reference_logprobs
from minillm.hub import save_pretrained
from minillm.model import Llama, LlamaConfig
from minillm.sft import ASSISTANT, USER
from minillm.tokenizer import Tokenizer
from minillm.world import World
from minillm.world.questions import exams, say

TEXTS = [story.text for story in World().stories(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 400, ("<|endoftext|>", USER, ASSISTANT))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(vocab_size=400, dim=16, n_layers=2, n_heads=2, n_kv_heads=1,
                              hidden_dim=24, max_seq_len=256)).eval()
    for p in llama.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.4)
    return llama


# ---- intervals

def test_wilson_is_scipys():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 400)
        k = rng.choice((0, n, rng.randint(0, n)))
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert e.wilson(k, n) == pytest.approx(tuple(theirs), abs=1e-9)


@pytest.mark.parametrize("k, n, named", [
    (0, 0, "n = 0"), (1, -2, "n = -2"), (-1, 5, "-1 right"), (6, 5, "6 right answers of 5")])
def test_wilson_refuses(k, n, named):
    with pytest.raises(ValueError, match=named):
        e.wilson(k, n)


def test_paired_is_the_normal_interval_of_the_differences():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    mean, low, high = e.paired(a, b)
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx(
        stats.norm.interval(0.95, loc=mean, scale=stats.sem(a - b)))


def test_paired_takes_truth_values_and_is_antisymmetric():
    a, b = [True, True, False, True], [False, True, False, True]
    mean, low, high = e.paired(a, b)
    assert mean == 0.25 and e.paired(b, a) == (-mean, -high, -low)


@pytest.mark.parametrize("a, b, named", [
    ([1, 0], [1], "got 2 and 1"), ([1], [0], "at least 2"), ([], [], "got 0")])
def test_paired_refuses(a, b, named):
    with pytest.raises(ValueError, match=named):
        e.paired(a, b)


# ---- multiple choice

@pytest.mark.parametrize("choices, named", [
    ([], "at least 2"), (["a"], "at least 2"), (["a", "b", "a"], "choice 2 repeats choice 0: 'a'"),
    (["a", " "], "choice 1 is empty: ' '"), (["", "b"], "choice 0 is empty")])
def test_choice_lists_that_are_refused(model, tokenizer, choices, named):
    with pytest.raises(ValueError, match=named):
        e.choice_logprobs(model, tokenizer, [("Where is Vera?", choices)])


def test_multiple_choice_is_transformers_on_the_exported_weights(model, tokenizer, tmp_path):
    """Log-probabilities of each token by hand from LlamaForCausalLM, summed and per byte."""
    save_pretrained(model, tokenizer, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    end = tokenizer.special_tokens["<|endoftext|>"]
    items = [("Vera the fox lived", [" by the river.", " at the mill.", " near the old well."]),
             ([say("user", "Where is Tom?")], ["Tom is on the hill.", "I don't know.", "A"])]
    for (context, choices), ours in zip(items, e.choice_logprobs(model, tokenizer, items)):
        sums = []
        for choice in choices:
            if isinstance(context, str):
                before = [end, *tokenizer.encode(context)]
                after = tokenizer.encode(choice)
            else:
                user, assistant = (tokenizer.special_tokens[r] for r in (USER, ASSISTANT))
                before = [end, user, *tokenizer.encode(context[0]["content"]), assistant]
                after = [*tokenizer.encode(choice), end]
            ids = torch.tensor([before + after])
            with torch.no_grad():
                logp = theirs(ids).logits[0].log_softmax(-1)
            sums.append(sum(logp[len(before) + i - 1, t].item() for i, t in enumerate(after)))
        assert ours == pytest.approx(sums, abs=1e-3)
        assert e.pick(ours, choices) == int(np.argmax(sums))
        per_byte = [s / len(c.encode()) for s, c in zip(sums, choices)]
        assert e.pick(ours, choices, per_byte=True) == int(np.argmax(per_byte))


def test_sum_and_bytes_pick_differently_and_bytes_are_not_characters():
    choices, logprobs = ["ja", "a long one"], [-4.0, -5.0]
    assert e.pick(logprobs, choices) == 0 and e.pick(logprobs, choices, per_byte=True) == 1
    # Two characters of three bytes each; by characters, the other would win.
    assert e.pick([-6.0, -5.0], ["\u6cb3\u6d41", "abc"], per_byte=True) == 0


def test_the_space_before_the_answer_belongs_to_the_answer(tokenizer):
    early = e.encode_continuation("Vera was ", "by the river.", tokenizer)
    late = e.encode_continuation("Vera was", " by the river.", tokenizer)
    assert early == late
    ids, mask = late
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == " by the river."
    assert tokenizer.decode([i for i, m in zip(ids, mask) if not m]) == "<|endoftext|>Vera was"


def test_a_token_that_merges_over_the_seam_counts_as_the_answer(tokenizer):
    ids, mask = e.encode_continuation("Vera wa", "s by the river.", tokenizer)
    assert [i for i in ids[1:]] == tokenizer.encode("Vera was by the river.")
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]).endswith("s by the river.")
    assert not mask[0] and any(mask)


# ---- leagues

def played(strengths, n, seed=0):
    """n games per pair of players with these strengths, as (winner, loser)."""
    rng, games = random.Random(seed), []
    for a, b in itertools.combinations(strengths, 2):
        for _ in range(n):
            p = 1 / (1 + math.exp(strengths[b] - strengths[a]))
            games.append((a, b) if rng.random() < p else (b, a))
    return games


def sklearns(x, weights):
    """Logistic regression without intercept on each comparison and its mirror image."""
    both, y = np.concatenate([x, -x]), np.r_[np.ones(len(x)), np.zeros(len(x))]
    fit = LogisticRegression(penalty=None, fit_intercept=False, tol=1e-10, max_iter=10_000)
    return fit.fit(both, y, np.tile(weights, 2) / 2).coef_[0]


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_bradley_terry_is_scikit_learns(spread):
    games = played(dict(zip("abcdef", spread * np.linspace(-1, 1, 6))), 60)
    ours = e.bradley_terry(games)
    x = np.zeros((len(games), 6))
    for row, (winner, loser) in zip(x, games):
        row["abcdef".index(winner)], row["abcdef".index(loser)] = 1, -1
    theirs = sklearns(x, np.ones(len(x)))
    assert [ours[p] for p in "abcdef"] == pytest.approx((theirs - theirs.mean()).tolist(), abs=1e-3)
    assert sum(ours.values()) == pytest.approx(0, abs=1e-9)


def test_nearly_separable_data_reach_the_maximum():
    """a beats b 999 of 1000 times, b beats c as often: log(999) apart, exactly."""
    games = [("a", "b")] * 999 + [("b", "a")] + [("b", "c")] * 999 + [("c", "b")]
    s = e.bradley_terry(games)
    assert s["a"] - s["b"] == pytest.approx(math.log(999), abs=1e-6)
    assert s["b"] - s["c"] == pytest.approx(math.log(999), abs=1e-6)


def test_bradley_terry_does_not_see_the_order_and_elo_does():
    games = played(dict(a=0.5, b=0.0, c=-0.5), 30)
    other = random.Random(1).sample(games, len(games))
    assert e.bradley_terry(games) == pytest.approx(e.bradley_terry(other), abs=1e-9)
    assert e.elo(games) != pytest.approx(e.elo(other), abs=1)


def test_elo_by_hand():
    ratings = e.elo([("a", "b"), ("b", "a")])
    # After the first game 1016 and 984; then b, expected 1 / (1 + 10**(32 / 400)), wins.
    gain = 32 * (1 - 1 / (1 + 10 ** (32 / 400)))
    assert ratings == pytest.approx({"a": 1016 - gain, "b": 984 + gain})
    assert sum(e.elo(played(dict(a=1, b=0, c=0), 10)).values()) == pytest.approx(3000)
    assert e.elo([("a", "b")], k=4, start=0) == pytest.approx({"a": 2, "b": -2})


BAD_LEAGUES = [
    ([], "got none"),
    ([("a", "a")], "game 0 must be"),
    ([("a", "b"), ("b",)], "game 1 must be"),
    ([("a", "b"), ("a", "c"), ("b", "c"), ("c", "b")], r"\['b', 'c'\] never beat \['a'\]"),
    ([("b", "a"), ("c", "a"), ("b", "c"), ("c", "b")], r"\['a'\] never beat \['b', 'c'\]"),
    ([("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")], r"never met: \['a', 'b'\] and \['c', 'd'\]"),
    ([("a", "b"), ("b", "a"), ("c", "d"), ("d", "c"), ("a", "c")],
     r"\['c', 'd'\] never beat \['a', 'b'\]"),
]


@pytest.mark.parametrize("games, named", BAD_LEAGUES)
def test_leagues_without_finite_strengths_are_refused(games, named):
    with pytest.raises(ValueError, match=named):
        e.bradley_terry(games)
    with pytest.raises(ValueError, match=named):
        e.bradley_terry_intervals(games, list(range(len(games))))


@pytest.mark.parametrize("games, named", BAD_LEAGUES[:3])
def test_elo_refuses_what_are_no_games(games, named):
    with pytest.raises(ValueError, match=named):
        e.elo(games)


def test_logistic_with_many_weights_is_many_fits():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(200, 3)), rng.exponential(size=(4, 200))
    # Both signs of each row occur, so that no coefficient is infinite.
    x[:100] = x[:100] * np.sign(x[:100] @ [1.0, -0.5, 0.2])[:, None]
    fits = e.logistic(x, weights)
    for b, w in zip(fits, weights):
        assert b == pytest.approx(sklearns(x, w), abs=1e-3)
        assert b == pytest.approx(e.logistic(x, w), abs=1e-8)


@pytest.mark.parametrize("x", [
    np.array([[1.0], [2.0]]), np.array([[1.0, 1.0], [-1.0, -1.0]]), np.array([[0.0], [0.0]])])
def test_logistic_refuses_what_has_no_finite_or_no_single_maximum(x):
    with pytest.raises(ValueError, match="no finite coefficients"):
        e.logistic(x, np.ones(len(x)))


def test_intervals_hold_what_was_drawn_independently():
    """Every verdict said twice: by question the interval stays, one by one it gets narrower."""
    games = played(dict(a=0.4, b=0.0, c=-0.4), 60)
    number = list(range(len(games)))
    once = e.bradley_terry_intervals(games, number)
    twice = e.bradley_terry_intervals(games * 2, number * 2)
    apart = e.bradley_terry_intervals(games * 2, range(2 * len(games)))
    for player, (low, high) in once.items():
        assert twice[player] == pytest.approx((low, high))
        width = apart[player][1] - apart[player][0]
        assert width == pytest.approx((high - low) / math.sqrt(2), rel=0.2)


def test_the_bootstrap_has_the_standard_error_of_the_fit():
    """Two players, w wins and l losses: the error of the log-odds is sqrt(1/w + 1/l)."""
    x = np.array([[1.0]] * 140 + [[-1.0]] * 60)
    samples = e.bootstrap(x, range(200), n=4000)
    assert samples.std() == pytest.approx(math.sqrt(1 / 140 + 1 / 60), rel=0.1)
    assert samples.mean() == pytest.approx(math.log(140 / 60), abs=0.03)
    assert np.array_equal(e.bootstrap(x, range(200), 5, seed=1), e.bootstrap(x, range(200), 5, 1))


def test_the_bootstrap_needs_a_group_for_each_comparison():
    with pytest.raises(ValueError, match="2 comparisons, but groups for 3"):
        e.bootstrap(np.array([[1.0], [-1.0]]), [0, 1, 2])


def test_replayed_leagues_are_covered():
    """600 leagues of known strength: 95% intervals hold the truth in 93 to 97% of the cases."""
    true, rng = dict(a=0.8, b=0.2, c=-0.2, d=-0.8), np.random.default_rng(0)
    players, pairs = sorted(true), list(itertools.permutations(sorted(true), 2))
    x = e.player_columns(pairs, players)
    p = np.array([1 / (1 + math.exp(true[b] - true[a])) for a, b in pairs])
    stronger = [i for i, (a, b) in enumerate(pairs) if a < b]
    counts = np.zeros((600, len(pairs)))
    counts[:, stronger] = rng.binomial(60, p[stronger], (600, len(stronger)))
    for i, (a, b) in enumerate(pairs):
        if a > b:
            counts[:, i] = 60 - counts[:, pairs.index((b, a))]
    samples = e.with_last(e.logistic(x, rng.standard_gamma(np.repeat(counts[:, None], 300, 1))))
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    truth = np.array([true[player] for player in players])
    assert 0.93 < ((low <= truth) & (truth <= high)).mean() < 0.97


# ---- judges

def test_a_judge_by_hand():
    (_, question), = exams(1)
    polite, rude = question.answer("polite"), question.answer("rude")
    judge = e.Judge(reward=2.0, position=0.3, length=0.5, own=0.7, manner="polite")
    tens = (len(polite.encode()) - len(rude.encode())) / 10
    assert judge.features(question, polite, rude) == pytest.approx([1.0, 1.0, tens, 1.0])
    score = 2.0 + 0.3 + 0.5 * tens + 0.7
    assert judge(question, polite, rude) == pytest.approx(1 / (1 + math.exp(-score)))
    other = -2.0 + 0.3 - 0.5 * tens - 0.7
    assert judge(question, rude, polite) == pytest.approx(1 / (1 + math.exp(-other)))


def test_verdicts_are_of_all_pairs_in_both_seats_and_follow_the_judge():
    asked = [q for _, q in exams(5)]
    answers = {name: [q.answer(m) for q in asked]
               for name, m in (("x", "polite"), ("y", "plain"), ("z", "rude"))}
    found = e.verdicts(lambda q, a, b: float(q.reward(a) > q.reward(b)), asked, answers)
    seats = [(v.question, v.first, v.second) for v in found]
    assert len(set(seats)) == len(seats) == 5 * 6
    assert all(v.game[0] < v.game[1] for v in found)       # x beats y beats z
    assert [v.first_won for v in found] == [v.first < v.second for v in found]


def test_verdicts_refuse():
    asked = [q for _, q in exams(2)]
    with pytest.raises(ValueError, match="b has 1 answers to 2 questions"):
        e.verdicts(e.Judge(), asked, {"a": ["x", "y"], "b": ["x"]})
    for p in 1.5, -0.1, math.nan:
        with pytest.raises(ValueError, match=f"the judge gave {p} for a against b"):
            e.verdicts(lambda q, x, y, p=p: p, asked, {"a": ["x", "y"], "b": ["x", "y"]})


def test_planted_tastes_come_back():
    asked, judge = [q for _, q in exams(300)], e.Judge(1.0, 0.5, 0.4, 0.6)
    rng = random.Random(0)
    answers = {name: [q.answer(rng.choice(("polite", "plain", "rude")),
                               q.value if rng.random() < right else "nobody") for q in asked]
               for name, right in (("a", 0.9), ("b", 0.5), ("c", 0.7))}
    found = e.verdicts(judge, asked, answers)
    x = np.array([judge.features(asked[v.question], answers[v.first][v.question],
                                 answers[v.second][v.question]) for v in found])
    x *= np.array([1 if v.first_won else -1 for v in found])[:, None]
    error = e.bootstrap(x, [v.question for v in found], 200).std(0)
    assert np.all(np.abs(e.logistic(x, np.ones(len(x))) - [1.0, 0.5, 0.4, 0.6]) < 4 * error)
    assert error.max() < 0.25


# ---- leaks

def test_token_logprobs_sum_to_those_of_the_answer(model, tokenizer):
    rows = [encode_answer([say("user", "Where is Tom?" * k)], "On the hill.", tokenizer)
            for k in (1, 2, 3)]
    tokens = e.token_logprobs(model, rows, batch_size=2)
    assert [len(z) for z in tokens] == [sum(mask) for _, mask in rows]
    sums = torch.stack([z.sum() for z in tokens])
    assert torch.allclose(sums, reference_logprobs(model, rows), atol=1e-4)


def test_min_k_by_hand():
    z = torch.tensor([-1.0, -5.0, -2.0, -3.0, -4.0])
    assert e.min_k(z, 0.4) == -4.5 and e.min_k(z, 1) == -3.0
    assert e.min_k(z, 0.01) == -5.0                        # one token at least
    for share in 0, -0.1, 1.1:
        with pytest.raises(ValueError, match=f"share must be .* got {share}"):
            e.min_k(z, share)
    with pytest.raises(ValueError, match="without tokens"):
        e.min_k(torch.tensor([]))


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40), rng.integers(0, 5, 30)
    theirs = roc_auc_score([1] * 40 + [0] * 30, np.r_[a, b])
    assert e.auc(a, b) == pytest.approx(theirs)
    assert e.auc([1, 2], [0]) == 1 and e.auc([1], [1]) == 0.5
    with pytest.raises(ValueError, match="got 0 and 1"):
        e.auc([], [1])


# ---- the report card

def test_a_report_card_sorts_tasks_and_shows_the_first_failures():
    def items(kind, right, n, chance=0.25):
        return [e.Graded(kind, f"question {i} of {kind}?", f"answer {i}", "the truth",
                         i >= n - right, chance) for i in range(n)]
    page = e.report_card("mine", [*items("easy", 95, 100), *items("half", 40, 100),
                                  *items("luck", 24, 100)], ["12 parameters"], examples=1)
    easy, half, luck = (page.index(f"| {kind} |") for kind in ("easy", "half", "luck"))
    marks = [page.index(f"## {level}") for level in e.LEVELS]
    assert marks[0] < easy < marks[1] < half < marks[2] < luck
    assert "# Report card: mine" in page and "- 12 parameters" in page
    low, high = e.wilson(95, 100)
    assert f"| easy | 95 of 100 | {low:.0%} to {high:.0%} | 25% |" in page
    assert page.count("it says: answer 0") == 3 and "answer 1\n" not in page
    assert page.count("right: the truth") == 3


def test_a_report_card_without_failures_and_with_long_prompts():
    perfect = [e.Graded("sums", "2 + 2", "4", "4", True)] * 30
    page = e.report_card("mine", perfect)
    assert "No wrong answer was seen." in page and e.LEVELS[2] not in page
    page = e.report_card("mine", [e.Graded("sums", "x" * 500, " ", "4", False)])
    assert "x" * 160 in page and "x" * 161 not in page and "(nothing)" in page


def test_report_cards_refuse():
    with pytest.raises(ValueError, match="no graded answers of mine"):
        e.report_card("mine", [])
    for chance in 1.2, -0.1:
        with pytest.raises(ValueError, match=f"chance of 'sums' .* got {chance}"):
            e.Graded("sums", "2 + 2", "4", "4", True, chance)
