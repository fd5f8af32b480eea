"""What the other tests of parallelism check in a list, in processes that torchrun started; and
against PyTorch's own data, sharded, tensor and pipeline parallelism."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minillm import data_parallel
from minillm.collectives import GlooGroup, LocalGroup, ring_all_reduce, torchrun
from minillm.data_parallel import Processes, check_same_code, joined, my_rows
from minillm.pipeline import Stage, one_forward_one_backward, run_pipeline
from minillm.storage.shared import full_tensor
from minillm.tensor_parallel import TensorParallelLlama
from minillm.tests import parallel_runs as runs
from minillm.tests.test_collectives import check_all, tensors
from minillm.tests.test_parallel_exact import SHAPES, WAYS

SOME = "tied", "heads"        # of SHAPES
FAR = 1e-5        # of the largest gradient; we measured 3e-7
SHAPE = {"exact": False, "tie_embeddings": True}


def in_each():
    """What each of several processes does. Prints a line per result, true of all together."""
    with joined(patience=60):
        group = GlooGroup()

        def say(name, right):
            wrong = Processes().sum(int(not right))
            print(f"{name}: wrong on {wrong}", flush=True)

        for shape in SOME:
            changes = SHAPES[shape]
            whole = runs.one(**changes)
            for way in WAYS:
                say(f"{shape} {way.__name__}", runs.unequal(group, way, whole, **changes) == 0)
        for dtype in torch.float32, torch.float64, torch.bfloat16, torch.int64:
            check_all(group, dtype)                        # raises if one is wrong
        [rank] = group.ranks
        local = LocalGroup(group.world)
        ring_all_reduce(local, tensors(group.world))
        group.sent, x = {rank: 0}, tensors(group.world)[rank]
        [ours] = ring_all_reduce(group, [x])
        dist.all_reduce(x)
        say("all_reduce", torch.equal(ours, x) and group.sent[rank] == local.sent[rank])
        say("shapes", "rank" in refusal(ring_all_reduce, group, [torch.ones(4 * rank + 4)]))
        data_parallel.code_number = lambda: min(rank, 1)
        say("code", f"{group.world - 1} of {group.world} processes run another minillm or PyTorch"
            in refusal(check_same_code))
        if group.world == 2:
            for name, (found, expected) in peers(group).items():
                say(name, far(found, expected) < FAR)


def refusal(call, *args):
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


def far(found, expected):
    assert found.keys() <= expected.keys() and found
    return max(((full_tensor(found[name]) - expected[name]).abs().max()
                / expected[name].abs().max()).item() for name in found)


def grads(model):
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def peers(group):
    """{who: (gradients of one batch, those of one process)}, on ordinary float32 weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    [rank], n = group.ranks, group.world
    inputs, targets = runs.batch(0)
    total = (targets != -100).sum()
    whole = runs.build(**SHAPE)
    (runs.loss_sum(whole, inputs, targets) / total).backward()
    expected, found = grads(whole), {}

    mesh, rows = init_device_mesh("cpu", (n,)), my_rows((inputs, targets))
    model = runs.build(**SHAPE)
    for unit in [*model.model.layers, model]:
        fully_shard(unit, mesh=mesh)
    (n * runs.loss_sum(model, *rows) / total).backward()       # times n: it averages
    found["fully_shard"] = grads(model), expected

    model = DistributedDataParallel(runs.build(**SHAPE))
    (n * runs.loss_sum(model, *rows) / total).backward()
    found["ddp"] = grads(model), expected

    found["parallelize_module"] = by_pytorch(mesh, inputs, targets, total)
    both = dict(expected)
    both["lm_head.weight"] = expected["model.embed_tokens.weight"]
    stage = Stage(whole, rank, n)
    micro = [(inputs[k:k + 2], targets[k:k + 2]) for k in range(0, len(inputs), 2)]
    run_pipeline(group, [stage], one_forward_one_backward, micro)
    found["our pipeline"] = {name: p.grad for name, p in
                             runs.whole_names(stage, rank, n).items()}, both
    found["pipelining"] = pipelining(rank, n, inputs, targets, total)

    parts = TensorParallelLlama(group, whole)
    torch.autograd.backward([loss / total for loss in parts.loss(inputs, targets)])
    for p in whole.parameters():
        p.data = p.grad
    cut = dict(TensorParallelLlama(group, whole).named_parameters())
    found["our tensor parallel"] = grads(parts), cut
    return found


def by_pytorch(mesh, inputs, targets, total):
    """Untied, as parallelize_module does not keep a tie."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (ColwiseParallel, RowwiseParallel,
                                                   parallelize_module)
    one, model = runs.build(exact=False), runs.build(exact=False)
    plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Replicate())}
    for name in "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", \
            "mlp.up_proj":
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in "self_attn.o_proj", "mlp.down_proj":
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    for m in one, parallelize_module(model, mesh, plan):
        (runs.loss_sum(m, inputs, targets) / total).backward()
    return grads(model), grads(one)


def pipelining(rank, n, inputs, targets, total):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    one = runs.build(exact=False)
    (runs.loss_sum(one, inputs, targets) / total).backward()
    stage = Stage(one, rank, n)

    def loss(y, t):
        return F.cross_entropy(y.flatten(0, 1), t.flatten(), reduction="sum") / total

    schedule = Schedule1F1B(PipelineStage(stage, rank, n, torch.device("cpu")), 4, loss_fn=loss,
                            scale_grads=False)
    schedule.step(*[inputs] * (rank == 0), **{"target": targets} if rank == n - 1 else {})
    return {name: p.grad for name, p in runs.whole_names(stage, rank, n).items()}, grads(one)


EXACT = [f"{shape} {way.__name__}" for shape in SOME for way in WAYS]
OURS = [*EXACT, "all_reduce", "shapes", "code"]
PEERS = ["fully_shard", "ddp", "parallelize_module", "our pipeline", "pipelining",
         "our tensor parallel"]


@pytest.mark.parametrize("n", [2, 4])
def test_processes_are_one_process_and_pytorch(n):
    program = "from minillm.tests.test_parallel_processes import in_each\nin_each()"
    done = torchrun(program, n)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.splitlines() == [f"{name}: wrong on 0" for name in
                                        OURS + PEERS * (n == 2)]
