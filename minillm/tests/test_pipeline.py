"""Schedules, their simulator, and the run of a pipeline."""
import itertools

import pytest
import torch

from minillm import pipeline
from minillm.collectives import LocalGroup
from minillm.pipeline import (Stage, bubble, fill_drain, most_kept, one_forward_one_backward,
                              run_pipeline, simulate)
from minillm.tests import parallel_runs as runs

SIZES = list(itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 8, 16)))


@pytest.mark.parametrize("schedule", [fill_drain, one_forward_one_backward])
@pytest.mark.parametrize("p, m", SIZES)
def test_each_pass_is_there_once_and_the_bubble_is_that_of_the_formula(schedule, p, m):
    orders = [schedule(stage, p, m) for stage in range(p)]
    for order in orders:
        assert sorted(order) == sorted((kind, i) for kind in "BF" for i in range(m))
        assert [i for kind, i in order if kind == "F"] == list(range(m))
        assert all(order.index(("F", i)) < order.index(("B", i)) for i in range(m))
    for forward, backward in (1, 2), (1, 1), (3, 1):
        times = simulate(orders, forward, backward)
        assert bubble(times) == pytest.approx((p - 1) / (m + p - 1))
        assert max(end for _, end in times.values()) == (m + p - 1) * (forward + backward)


@pytest.mark.parametrize("p, m", SIZES)
def test_1f1b_keeps_as_much_as_there_are_stages_to_come(p, m):
    for stage in range(p):
        assert most_kept(one_forward_one_backward(stage, p, m)) == min(m, p - stage)
        assert most_kept(fill_drain(stage, p, m)) == m


def test_a_pass_begins_when_its_input_is_there():
    times = simulate([one_forward_one_backward(s, 3, 5) for s in range(3)])
    for (stage, kind, i), (begin, _) in times.items():
        if kind == "F" and stage > 0:
            assert times[stage - 1, "F", i][1] <= begin
        if kind == "B" and stage < 2:
            assert times[stage + 1, "B", i][1] <= begin


def test_an_impossible_schedule_is_refused_by_simulator_and_run():
    orders = [[("F", 0), ("B", 0), ("F", 1), ("B", 1)], [("F", 0), ("F", 1), ("B", 0), ("B", 1)]]
    said = "schedule is impossible: stage 0 for the input of B0, stage 1 for the input of F1"
    with pytest.raises(ValueError, match=said):
        simulate(orders)
    stages = [Stage(runs.build(), r, 2) for r in range(2)]
    with pytest.raises(ValueError, match=said):
        run_pipeline(LocalGroup(2), stages, lambda r, n, m: orders[r], [runs.batch(0)] * 2)


def test_the_loss_and_the_bytes():
    model, (inputs, targets) = runs.build(), runs.batch(0)
    stages, group = [Stage(model, r, 4) for r in range(4)], LocalGroup(4)
    micro = [(inputs[k:k + 2], targets[k:k + 2]) for k in range(0, 8, 2)]
    losses = run_pipeline(group, stages, one_forward_one_backward, micro)
    expected = runs.loss_sum(model, inputs, targets) / (targets != -100).sum()
    assert losses[:3] == [0, 0, 0] and losses[3] == pytest.approx(expected.item(), rel=1e-9)
    activations = inputs.numel() * model.config.dim * 8
    assert list(group.sent.values()) == [activations, 2 * activations, 2 * activations, activations]


def test_activations_are_dropped_after_their_backward_pass(monkeypatch):
    """As few are kept as most_kept says."""
    most, forward = [0], pipeline.forward_pass

    def counting(group, r, stage, i, micro, total, kept):
        result = forward(group, r, stage, i, micro, total, kept)
        most[0] = max(most[0], sum(1 for rank, _ in kept if rank == 0))
        return result

    monkeypatch.setattr(pipeline, "forward_pass", counting)
    micro = [runs.batch(i, b=1) for i in range(8)]
    for schedule, limit in (fill_drain, 8), (one_forward_one_backward, 2):
        most[0] = 0
        stages = [Stage(runs.build(), r, 2) for r in range(2)]
        run_pipeline(LocalGroup(2), stages, schedule, micro)
        assert most[0] == limit


def test_stages_are_copies_and_together_the_model():
    model = runs.build(tie_embeddings=True)
    for n in 1, 2, 3, 4:
        stages = [Stage(model, r, n) for r in range(n)]
        held = sum(p.numel() for stage in stages for p in stage.parameters())
        tied = model.lm_head.weight.numel() if n > 1 else 0
        assert held == sum(p.numel() for p in model.parameters()) + tied
        x = ids = runs.batch(0)[0]
        for stage in stages:
            x = stage(x)
        assert torch.equal(x, model(ids))
        assert not {p.data_ptr() for p in model.parameters()} & {
            p.data_ptr() for stage in stages for p in stage.parameters()}


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="4 blocks cannot be cut into 5 stages: use at most 4"):
        Stage(runs.build(), 0, 5)
