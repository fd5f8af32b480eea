"""Data-, tensor- and pipeline-parallel training are training in one process, to the last bit: in a
list. (test_parallel_processes does the same in processes.)"""
import pytest
import torch

from minillm import pipeline, tensor_parallel
from minillm.collectives import LocalGroup
from minillm.dyadic import GRADIENT_STEP, STEP, snap
from minillm.pipeline import fill_drain
from minillm.tests import parallel_runs as runs

WAYS = runs.data_parallel, runs.tensor_parallel, runs.pipelined
SHAPES = {"untied": {}, "tied": {"tie_embeddings": True}, "heads": {"n_kv_heads": 8}}
trained = {}


def one(shape):
    if shape not in trained:
        trained[shape] = runs.one(**SHAPES[shape])
    return trained[shape]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_in_a_list_are_one_process(shape, way, n):
    assert runs.unequal(LocalGroup(n), way, one(shape), **SHAPES[shape]) == 0


def test_fill_drain_is_one_process():
    assert runs.unequal(LocalGroup(4), runs.pipelined, one("tied"), schedule=fill_drain,
                        **SHAPES["tied"]) == 0


def test_training_moved_every_matrix_and_the_grid_is_kept():
    begun = dict(runs.build().named_parameters())
    for name, p in one("untied").named_parameters():
        assert not torch.equal(p, begun[name]), name
        assert torch.equal(p, (p / STEP).round() * STEP), name


def test_the_sums_of_an_exact_model_are_exact_and_of_another_are_not():
    """The gradient does not depend on the order of the rows."""
    inputs, targets = runs.batch(0)
    shuffled = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
    for exact in True, False:
        models = [runs.build(exact) for _ in range(2)]
        for model, rows in zip(models, (slice(None), shuffled)):
            runs.loss_sum(model, inputs[rows], targets[rows]).backward()
        pairs = zip(*(model.parameters() for model in models))
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs) == exact


def test_snap_rounds_values_and_gradients():
    x = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    (snap(x) * 0.3).sum().backward()
    assert snap(x).tolist() == [77 / 256, -1.0]
    assert x.grad[0] == round(0.3 / GRADIENT_STEP) * GRADIENT_STEP != 0.3


PLANTED = {
    "no f": (tensor_parallel, "copy_in", lambda group, xs: xs, runs.tensor_parallel),
    "g without sum": (tensor_parallel, "sum_out", lambda group, xs: xs, runs.tensor_parallel),
    "tied forgotten": (pipeline, "add_tied_gradients", lambda *args: None, runs.pipelined),
    "divided late": (pipeline, "forward_pass", None, runs.pipelined),
    "no sum": (runs, "sum_gradients", lambda *args: None, runs.data_parallel),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault, monkeypatch):
    module, name, wrong, way = PLANTED[fault]
    if wrong is None:
        right = pipeline.forward_pass

        def wrong(group, r, stage, i, micro, total, kept):
            return right(group, r, stage, i, micro, 1, kept)
    expected = one("tied")
    monkeypatch.setattr(module, name, wrong)
    assert runs.unequal(LocalGroup(2), way, expected, **SHAPES["tied"]) > 100
