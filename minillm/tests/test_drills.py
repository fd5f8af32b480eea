"""Drills say who is where, and never anything else; the base model reads them first."""
import re

import pytest
import torch

from minillm.arc import pool
from minillm.arc.pool import spread
from minillm.arc.stages import Curriculum
from minillm.world.drills import STATEMENTS, drill
from minillm.world.templates import HARBOUR, VALLEY


@pytest.mark.parametrize("region", (VALLEY, HARBOUR), ids=("valley", "harbour"))
def test_a_drill_says_who_is_where(region):
    texts = [drill(seed, region) for seed in range(300)]
    assert texts == [drill(seed, region) for seed in range(300)] and len(set(texts)) == 300
    plain = total = 0
    for text in texts:
        statements = re.findall(r"(\w+) (was )?([^.]+)\.", text)
        assert " ".join(f"{name} {was}{place}." for name, was, place in statements) == text
        homes = {name: place for name, _, place in statements[:2]}
        assert len(homes) == len(set(homes.values())) == 2 and len(statements) == 2 + STATEMENTS
        assert not any(was for _, was, _ in statements[:2])
        assert all(homes[name] == place for name, _, place in statements)
        assert set(homes) <= {*region.she, *region.he}
        assert set(homes.values()) <= set(region.places)
        plain += sum(not was for _, was, _ in statements[2:])
        total += STATEMENTS
    assert 0.45 < plain / total < 0.55


def test_a_curriculum_is_one_source_after_the_other():
    first, then = [torch.zeros(1) + i for i in range(3)], [torch.ones(1) * 10 + i for i in range(3)]
    batches = Curriculum(first, then, 2)
    assert [batches[i].item() for i in range(5)] == [0, 1, 10, 11, 12]


def cube(i):
    return i**3


def test_many_processes_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(pool, "LEAST", 10)
    alone = spread(cube, range(101))
    monkeypatch.setattr(pool, "CORES", 1)
    assert spread(cube, range(101)) == alone == [i**3 for i in range(101)]
    assert spread(cube, []) == []
