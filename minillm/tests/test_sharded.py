"""Two processes that each hold half of a model (see parallel.sharded) do what one does. Run as a
script, this file is what they run."""
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from minillm import optim
from minillm.arc import stages
from minillm.dpo import count_pairs, preference_loss
from minillm.generate import generate
from minillm.lora import add_lora
from minillm.model import Llama
from minillm.parallel import Processes, joined, my_rows, sharded
from minillm.storage.shared import all_reduce_sum, full_tensor, is_share, rank_and_world
from minillm.tests.test_parallel import CONFIG, FAR, FAR_MUON, batches, run_by_two
from minillm.train import TrainConfig, backward, clip_gradients, token_loss, train


def model(tied=False, lora=False):
    """Other weights in each process: those of the first count."""
    torch.manual_seed(rank_and_world()[0])
    m = Llama(replace(CONFIG, tie_embeddings=tied))
    return add_lora(m, 4, 8) if lora else m


def trained(m, shard, source=None, loss=token_loss, **settings):
    """The weights after some steps, and the losses and norms."""
    usual = {"steps": 6, "lr": 1e-2, "warmup": 2, "bar": False, "precision": "float32",
             "checkpoint_every": 3}
    config = TrainConfig(**usual | settings)
    with sharded(m) if shard else nullcontext(m) as held:
        history = train(held, source or batches(), config, loss, group=Processes())
    m.train()
    assert all(type(p) is torch.nn.Parameter for p in m.parameters()) and m.training
    assert generate(m, torch.zeros(1, 1, dtype=torch.int64), 3).shape == (1, 4)
    curves = {z: torch.tensor([h[z] for h in history]) for z in ("loss", "grad_norm")}
    return weights(m) | curves


def weights(m):
    return {n: p.detach().clone() for n, p in m.named_parameters()}


# Shapes and settings, and how far two processes, sharded or not, may be from one.
RUNS = {
    "adamw": ({}, {}, FAR),
    "bf16": ({}, {"precision": "bf16"}, 4e-2),
    "tied": ({"tied": True}, {}, FAR),
    "accumulate": ({}, {"accumulate": 3}, FAR),
    "clipped": ({}, {"clip": 0.05}, FAR),
    "muon": ({}, {"muon": 2.0}, FAR_MUON),
    "lora": ({"lora": True}, {}, FAR),
}
WRITERS = {"one": False, "two": False, "shares": True}


def cut_off(folder, shard):
    """Leave the checkpoint of the third of six steps in a folder, as a killed run does."""
    class Batches:
        def __getitem__(self, i):
            if i == 3:
                raise IndexError
            return batches()[i]
    with pytest.raises(IndexError):
        trained(model(), shard, Batches(), checkpoint=str(folder))


def went_on(folder, to, shard):
    """The run of cut_off, from its checkpoint to its end."""
    if rank_and_world()[0] == 0:
        shutil.copytree(folder, to)
    all_reduce_sum(0)
    return trained(model(), shard, checkpoint=str(to))


def held():
    """Elements of weights, gradients and moments in the first step, whole and here; bytes behind
    the weights, and behind those of the given model."""
    m, step, found = model(), optim.AdamW.step, {}

    def look(self, lr):
        ps = list(self.params.values())
        kinds = {"weights": ps, "gradients": [p.grad for p in ps],
                 "m": self.m.values(), "v": self.v.values()}
        for kind, zs in kinds.items():
            here = sum(z.to_local().numel() for z in zs if is_share(z))
            found[kind] = torch.tensor([sum(z.numel() for z in zs), here])
        found["bytes"] = torch.tensor(sum(z.to_local().untyped_storage().nbytes() for z in ps))
        found["given"] = torch.tensor(sum(p.untyped_storage().nbytes() for p in m.parameters()))
        step(self, lr)

    optim.AdamW.step = look
    trained(m, True, steps=1, warmup=1)
    optim.AdamW.step = step
    return found


def gradient():
    """The gradient of the first batch, whole, and its norm as clipping finds it; the number of
    units that are put together one at a time."""
    with sharded(model()) as m:
        backward(m, [my_rows(batches()[0])], add=Processes().sum)
        found = {n: full_tensor(p.grad).clone() for n, p in m.named_parameters()}
        found["norm"] = clip_gradients(list(m.parameters()), 1e9, Processes().norm)
        found["units"] = torch.tensor(sum(isinstance(z, FSDPModule) for z in m.modules()))
        return found


def ended(how):
    """The weights that the given model has after a run that ends in its third step, for a reason
    that only the last process has (a ValueError comes in all)."""
    rank, world = rank_and_world()
    calls, m = [], model()

    def loss(*batch):
        calls.append(0)
        third, last = len(calls) == 3, rank == world - 1
        if third and how is ValueError:
            raise ValueError
        if third and last and how is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
        bad = third and last and how is FloatingPointError
        return token_loss(*batch) * (float("nan") if bad else 1)

    with pytest.raises(how):
        trained(m, True, loss=loss)
    return weights(m)


def said(call, *args):
    with pytest.raises(ValueError) as error:
        call(*args)
    return str(error.value)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes left what each run gave, one file per run and process."""
    folder = tmp_path_factory.mktemp("two")
    cut_off(folder / "one", False)
    run_by_two(__file__, folder)
    return folder


def far(a, b):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_with_shares_are_two_without_and_one(two, run):
    shape, settings, limit = RUNS[run]
    one = trained(model(**shape), False, **settings)
    for rank in "01":
        split, unsplit = (load_file(two / f"{run}-{kind}{rank}") for kind in ("shares", "two"))
        # The two add up the same numbers. Only Muon, whose products round to bfloat16, may turn a
        # difference in the last bits into a larger one.
        assert far(split, unsplit) < (1e-3 if run == "muon" else 1e-5)
        assert far(split, one) < limit
        assert far(split, load_file(two / f"{run}-shares0")) == 0


def test_without_torchrun_shard_changes_nothing():
    assert far(trained(model(), True), trained(model(), False)) == 0


def test_each_process_holds_half_of_weights_gradients_and_moments(two):
    total = sum(p.numel() for p in model().parameters())
    found = [load_file(two / f"held{rank}") for rank in "01"]
    for kind in ("weights", "gradients", "m", "v"):
        whole_, here = zip(*(f[kind].tolist() for f in found))
        assert whole_ == (total, total), kind
        assert sum(here) == total and max(here) < 0.51 * total, kind
    assert all(f["bytes"] < 4 * 0.51 * total and f["given"] == 0 for f in found)


def test_gradient_and_norm_are_those_of_the_whole_batch(two):
    one = gradient()
    assert one.pop("units") == 0
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for n, g in one.items() if n != "norm"]))
    torch.testing.assert_close(one["norm"], norm)
    for rank in "01":
        other = load_file(two / f"gradient{rank}")
        assert other.pop("units") == CONFIG.n_layers + 1
        assert far(other, one) < 1e-5


@pytest.mark.parametrize("writer", WRITERS)
def test_a_checkpoint_of_any_run_is_gone_on_from_by_any(two, writer, tmp_path):
    names = {n: p.shape for n, p in model().named_parameters()}
    stored = load_file(two / writer / "step-00000003.safetensors")
    whole = {f"{k}.{n}": shape for k in ("model", "m", "v") for n, shape in names.items()}
    assert {n: z.shape for n, z in stored.items() if n != "rng"} == whole
    unbroken = trained(model(), False)
    assert far(went_on(two / writer, tmp_path / "on", True), unbroken) < FAR
    for reader in ("two", "shares"):
        for rank in "01":
            assert far(load_file(two / f"{writer}-by-{reader}{rank}"), unbroken) < FAR


@pytest.mark.parametrize("how", [FloatingPointError, KeyboardInterrupt])
def test_a_run_that_ends_early_gives_the_weights_back(two, how):
    for rank in "01":
        assert far(load_file(two / f"{how.__name__}{rank}"), ended(how)) < FAR


def test_a_run_that_breaks_leaves_the_model_empty(two):
    assert all(p.numel() == 0 for p in load_file(two / "ValueError1").values())


def test_unshared_folders_and_torn_pairs_are_refused_by_name(two):
    for rank in "01":
        stage, run, pairs = (two / f"refused{rank}").read_text().splitlines()
        assert stage.startswith(f"{two / f'cache{rank}'}: 1 of 2 processes do not see")
        assert "MINILLM_CACHE" in stage
        assert run.startswith(f"{two / f'apart{rank}'}: 1 of 2 processes do not see")
        assert pairs == ("3 rows are not pairs: with several processes, make batch_size a multiple "
                         "of their number")
    # Refused before it trains.
    assert not [p for p in two.glob("cache*/base-*") if p.suffix != ".lock"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joined():
        rank = rank_and_world()[0]

        def keep(name, result):
            save_file(result, folder / f"{name}{rank}")

        for name, (shape, settings, _) in RUNS.items():
            keep(f"{name}-shares", trained(model(**shape), True, **settings))
            keep(f"{name}-two", trained(model(**shape), False, **settings))
        keep("held", held())
        keep("gradient", gradient())
        for writer in ("two", "shares"):
            cut_off(folder / writer, WRITERS[writer])
        for writer in WRITERS:
            for reader in ("two", "shares"):
                copy = folder / f"{writer}-{reader}"
                keep(f"{writer}-by-{reader}", went_on(folder / writer, copy, WRITERS[reader]))
        for how in (FloatingPointError, KeyboardInterrupt, ValueError):
            keep(how.__name__, ended(how))
        os.environ["MINILLM_CACHE"] = str(folder / f"cache{rank}")
        three_pairs = (torch.ones(6, 4, dtype=torch.int64), torch.ones(6, 4, dtype=torch.bool),
                       torch.zeros(6))
        config, apart = TrainConfig(steps=1, warmup=0), str(folder / f"apart{rank}")
        (folder / f"refused{rank}").write_text("\n".join([
            said(stages.base, False),
            said(lambda: trained(model(), True, checkpoint=apart)),
            said(train, model(), [three_pairs], config, preference_loss(), count_pairs,
                 Processes())]))
    # PyTorch's threads now and then abort a process that the interpreter takes down, which says
    # nothing about the results. They are written.
    sys.stdout.flush()
    os._exit(0)
