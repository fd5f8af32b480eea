"""The collectives against plain sums, their bytes against the formula, and what they refuse.
(test_parallel_processes runs them in processes.)"""
import os
import time

import pytest
import torch

from minillm.collectives import (LocalGroup, ring_all_gather, ring_all_reduce, ring_broadcast,
                                 ring_reduce_scatter, torchrun)


def tensors(n, shape=(12, 3), dtype=torch.float32):
    numbers = torch.Generator().manual_seed(n)
    return [torch.randint(-50, 50, shape, generator=numbers).to(dtype) for _ in range(n)]


def check_all(group, dtype):
    """Raises AssertionError if a collective is wrong on a rank that lives here. Small whole
    numbers: their sums are exact."""
    n = group.world
    xs = tensors(n, (4 * n, 3), dtype)
    mine, whole = [xs[r] for r in group.ranks], torch.stack(xs).sum(0).to(dtype)
    parts = whole.chunk(n)
    for r, out in zip(group.ranks, ring_reduce_scatter(group, mine)):
        assert torch.equal(out, parts[r])
    for out in ring_all_gather(group, mine):
        assert torch.equal(out, torch.cat(xs))
    for out in ring_broadcast(group, mine):
        assert torch.equal(out, xs[0])
    for out in ring_all_reduce(group, mine, torch.maximum):
        assert torch.equal(out, torch.stack(xs).amax(0))
    for shape in (), (1,), (5,), (2, 3, 2), (0,):
        ys = tensors(n, shape, dtype)
        for out in ring_all_reduce(group, [ys[r] for r in group.ranks]):
            assert torch.equal(out, torch.stack(ys).sum(0).to(dtype)) and out.shape == shape
    assert all(torch.equal(x, y) for x, y in zip(xs, tensors(n, (4 * n, 3), dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_collectives_in_a_list(n, dtype):
    check_all(LocalGroup(n), dtype)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_bytes_are_those_of_the_formula(n):
    tensors_sent = {ring_all_reduce: 2 * (n - 1) / n, ring_reduce_scatter: (n - 1) / n,
                    ring_all_gather: n - 1}
    for collective, times in tensors_sent.items():
        group = LocalGroup(n)
        xs = tensors(n, (6 * n, 5))
        collective(group, xs)
        assert set(group.sent.values()) == {times * xs[0].nbytes}


def test_a_message_is_a_copy():
    group = LocalGroup(2)
    x = torch.ones(3)
    group.send(x, 0, 1)
    x.zero_()
    assert group.receive(0, 1).tolist() == [1, 1, 1] and group.receive(0, 1) is None


def test_what_cannot_be_reduced_is_refused():
    with pytest.raises(ValueError, match="6 rows cannot be cut into 4 equal chunks"):
        ring_reduce_scatter(LocalGroup(4), tensors(4, (6,)))
    with pytest.raises(ValueError, match=r"rank 0 has \(2, 2\) .* rank 1 has \(3, 2\)"):
        ring_all_gather(LocalGroup(2), [torch.ones(2, 2), torch.ones(3, 2)])
    with pytest.raises(ValueError, match="float32.*float64.*same shape and dtype"):
        ring_all_gather(LocalGroup(2), [torch.ones(2), torch.ones(2).double()])


def test_a_program_that_hangs_is_ended_with_all_its_processes(tmp_path):
    program = f"""
import os, time
open({str(tmp_path)!r} + "/" + str(os.getpid()), "w")
time.sleep(1000)
"""
    with pytest.raises(TimeoutError, match="2 processes took more than 20 seconds"):
        torchrun(program, 2, seconds=20)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        for _ in range(100):
            if not alive(pid):
                break
            time.sleep(0.1)
        assert not alive(pid)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
