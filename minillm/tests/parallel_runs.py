"""One small training run, done by one process, and by ranks in each of three ways, on numbers whose
sums are exact: the weights after it have to be equal in every bit."""
import torch
import torch.nn.functional as F

from minillm.collectives import ring_all_reduce, sum_gradients
from minillm.dyadic import dyadic, to_grid
from minillm.model import Llama, LlamaConfig
from minillm.optim import AdamW
from minillm.pipeline import Stage, one_forward_one_backward, run_pipeline
from minillm.tensor_parallel import TensorParallelLlama

STEPS, LR = 3, 2.0**-6
SHAPE = {"vocab_size": 64, "dim": 32, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4,
         "hidden_dim": 48, "max_seq_len": 32}


def build(exact=True, seed=0, **changes):
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**SHAPE | changes))
    return dyadic(model) if exact else model


def batch(i, b=8, t=12):
    """Rows with as many different numbers of targets as there are rows."""
    numbers = torch.Generator().manual_seed(i)
    ids = torch.randint(SHAPE["vocab_size"], (b, t + 1), generator=numbers)
    targets = ids[:, 1:].clone()
    for row in range(b):
        targets[row, t - row:] = -100
    return ids[:, :-1], targets


def loss_sum(model, inputs, targets, precision="float32"):
    """token_loss in the dtype of the logits."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")


def steps(modules, backward):
    """Train modules, each with an optimizer of its own. backward(i) leaves the gradients."""
    optimizers = [AdamW(module) for module in modules]
    for i in range(STEPS):
        backward(i)
        for module, optimizer in zip(modules, optimizers):
            optimizer.step(LR)
            to_grid(module)


def one(**changes):
    """The model, trained in one process."""
    model = build(**changes)

    def backward(i):
        inputs, targets = batch(i)
        (loss_sum(model, inputs, targets) / (targets != -100).sum()).backward()

    steps([model], backward)
    return model


def data_parallel(group, **changes):
    """{name: tensor} of the replica of each rank here."""
    replicas = [build(**changes) for _ in group.ranks]

    def backward(i):
        inputs, targets = batch(i)
        rows = [(inputs[r::group.world], targets[r::group.world]) for r in group.ranks]
        totals = ring_all_reduce(group, [(targets != -100).sum() for _, targets in rows])
        for model, mine, total in zip(replicas, rows, totals):
            (loss_sum(model, *mine) / total).backward()
        sum_gradients(group, replicas)

    steps(replicas, backward)
    return [dict(model.named_parameters()) for model in replicas]


def tensor_parallel(group, **changes):
    """{name: tensor} of the parts of the ranks here, in a list of one."""
    model = dyadic(TensorParallelLlama(group, build(**changes)))

    def backward(i):
        inputs, targets = batch(i)
        total = (targets != -100).sum()
        torch.autograd.backward([loss / total for loss in model.loss(inputs, targets)])

    steps([model], backward)
    return [dict(model.named_parameters())]


def pipelined(group, schedule=one_forward_one_backward, **changes):
    """{name in the whole model: tensor} of the stage of each rank here."""
    stages = [Stage(build(**changes), r, group.world) for r in group.ranks]

    def backward(i):
        inputs, targets = batch(i)
        micro = [(inputs[k:k + 2], targets[k:k + 2]) for k in range(0, len(inputs), 2)]
        run_pipeline(group, stages, schedule, micro)

    steps(stages, backward)
    return [whole_names(stage, r, group.world) for r, stage in zip(group.ranks, stages)]


def whole_names(stage, rank, world):
    """{name in the whole model: parameter} of a stage."""
    found = {}
    for name, p in stage.named_parameters():
        if name.startswith("layers."):
            _, k, rest = name.split(".", 2)
            name = f"layers.{int(k) + rank * SHAPE['n_layers'] // world}.{rest}"
        found[name if name.startswith("lm_head") else f"model.{name}"] = p
    return found


def wanted(model, group, way):
    """What each of the lists of a way has to be, given the model trained in one process."""
    if way is tensor_parallel:
        return dict(TensorParallelLlama(group, model).named_parameters())
    # A tied matrix has two names here.
    return dict(model.named_parameters(remove_duplicate=False))


def unequal(group, way, model, **changes):
    """How many numbers of the weights are not those of one process."""
    should, count = wanted(model, group, way), 0
    for found in way(group, **changes):
        assert found and found.keys() <= should.keys()
        count += sum((p != should[name]).sum().item() for name, p in found.items())
    return count
