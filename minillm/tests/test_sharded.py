"""Two processes that each hold half of a model (shard=True) do what one does. Run as a script, this file is what they run."""
import os
import shutil
import signal
import subprocess
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
from minillm.tests.test_parallel import CONFIG, batches
from minillm.train import TrainConfig, backward, clip_gradients, token_loss, train


def model(tied=False, lora=False):
    """Other weights in each process: those of the first count."""
    torch.manual_seed(rank_and_world()[0])
    m = Llama(replace(CONFIG, tie_embeddings=tied))
    return add_lora(m, 4, 8) if lora else m


def trained(m, shard, source=None, loss=token_loss, **settings):
    """The weights after some steps, and the losses and norms."""
    settings = {"steps": 6, "lr": 1e-2, "warmup": 2, "bar": False, "precision": "float32", "checkpoint_every": 3} | settings
    with sharded(m) if shard else nullcontext(m) as held:
        history = train(held, source or batches(), TrainConfig(**settings), loss,
                        group=Processes())
    m.train()
    assert all(type(p) is torch.nn.Parameter for p in m.parameters()) and m.training
    assert generate(m, torch.zeros(1, 1, dtype=torch.int64), 3).shape == (1, 4)
    return weights(m) | {z: torch.tensor([h[z] for h in history]) for z in ("loss", "grad_norm")}


def weights(m):
    return {n: p.detach().clone() for n, p in m.named_parameters()}


# Shapes and settings, and how far two processes, sharded or not, may be from one. Muon rounds to bfloat16, as does bf16.
RUNS = {"adamw": ({}, {}, 2e-4), "bf16": ({}, {"precision": "bf16"}, 4e-2), "tied": ({"tied": True}, {}, 2e-4),
        "accumulate": ({}, {"accumulate": 3}, 2e-4), "clipped": ({}, {"clip": 0.05}, 2e-4), "muon": ({}, {"muon": 2.0}, 4e-3),
        "lora": ({"lora": True}, {}, 2e-4)}
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
    """Elements of weights, gradients and moments in the first step, whole and here; bytes behind the weights, and behind those of the given model."""
    m, step, found = model(), optim.AdamW.step, {}

    def look(self, lr):
        ps = list(self.params.values())
        kinds = {"weights": ps, "gradients": [p.grad for p in ps], "m": self.m.values(), "v": self.v.values()}
        for kind, zs in kinds.items():
            found[kind] = torch.tensor([sum(z.numel() for z in zs), sum(z.to_local().numel() for z in zs if is_share(z))])
        found["bytes"] = torch.tensor(sum(z.to_local().untyped_storage().nbytes() for z in ps))
        found["given"] = torch.tensor(sum(p.untyped_storage().nbytes() for p in m.parameters()))
        step(self, lr)
    optim.AdamW.step = look
    trained(m, True, steps=1, warmup=1)
    optim.AdamW.step = step
    return found


def gradient():
    """The gradient of the first batch, whole, and its norm as clipping finds it; the number of units that are put together one at a time."""
    with sharded(model()) as m:
        backward(m, [my_rows(batches()[0])], add=Processes().sum)
        grads = {n: full_tensor(p.grad).clone() for n, p in m.named_parameters()}
        return grads | {"norm": clip_gradients(list(m.parameters()), 1e9, Processes().norm), "units": torch.tensor(sum(isinstance(z, FSDPModule) for z in m.modules()))}


def ended(how):
    """The weights that the given model has after a run that ends in its third step, for a reason that only the last process has."""
    calls, m = [], model()

    def loss(*batch):
        calls.append(0)
        if len(calls) == 3 and how is ValueError:
            raise ValueError
        if len(calls) == 3 and how is KeyboardInterrupt and rank_and_world()[0] == rank_and_world()[1] - 1:
            os.kill(os.getpid(), signal.SIGINT)
        bad = len(calls) == 3 and how is FloatingPointError and rank_and_world()[0] == rank_and_world()[1] - 1
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
    """The folder in which two processes left what each run gave, a file a run and process."""
    folder = tmp_path_factory.mktemp("two")
    cut_off(folder / "one", False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-9000:]
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
        assert whole_ == (total, total) and sum(here) == total and max(here) < 0.51 * total, kind
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
    assert {n: z.shape for n, z in stored.items() if n != "rng"} == {f"{k}.{n}": s for k in ("model", "m", "v") for n, s in names.items()}
    unbroken = trained(model(), False)
    assert far(went_on(two / writer, tmp_path / "on", True), unbroken) < 2e-4
    for reader in ("two", "shares"):
        for rank in "01":
            assert far(load_file(two / f"{writer}-by-{reader}{rank}"), unbroken) < 2e-4


@pytest.mark.parametrize("how", [FloatingPointError, KeyboardInterrupt])
def test_a_run_that_ends_early_gives_the_weights_back(two, how):
    for rank in "01":
        assert far(load_file(two / f"{how.__name__}{rank}"), ended(how)) < 2e-4


def test_a_run_that_breaks_leaves_the_model_empty(two):
    assert all(p.numel() == 0 for p in load_file(two / "ValueError1").values())


def test_unshared_folders_and_torn_pairs_are_refused_by_name(two):
    for rank in "01":
        stage, run, pairs = (two / f"refused{rank}").read_text().splitlines()
        assert stage.startswith(f"{two / f'cache{rank}'}: 1 of 2 processes do not see") and "MINILLM_CACHE" in stage
        assert run.startswith(f"{two / f'apart{rank}'}: 1 of 2 processes do not see")
        assert pairs == "3 rows are not pairs: with several processes, make batch_size a multiple of their number"
    assert not [p for p in two.glob("cache*/base-*") if p.suffix != ".lock"]                # refused before it trains


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
                keep(f"{writer}-by-{reader}", went_on(folder / writer, folder / f"{writer}-{reader}", WRITERS[reader]))
        for how in (FloatingPointError, KeyboardInterrupt, ValueError):
            keep(how.__name__, ended(how))
        os.environ["MINILLM_CACHE"] = str(folder / f"cache{rank}")
        torn = torch.ones(6, 4, dtype=torch.int64), torch.ones(6, 4, dtype=torch.bool), torch.zeros(6)       # three pairs
        config = TrainConfig(steps=1, warmup=0)
        (folder / f"refused{rank}").write_text("\n".join([
            said(stages.base, False), said(lambda: trained(model(), True, checkpoint=str(folder / f"apart{rank}"))),
            said(train, model(), [torn], config, preference_loss(), count_pairs, Processes())]))
