from __future__ import annotations

import time

import torch

from farspan.parallel.mesh import Mesh
from farspan.parallel.roll_call import RollCall


def calls(mesh, count):
    """The answers to ``count`` questions; other collectives run between asking and answering."""
    import torch.distributed as dist

    roll_call, answers = RollCall(mesh), [None]
    for number in range(count):
        answers.append(roll_call.answer())
        roll_call.ask(mesh.rank, number + mesh.rank / 8)
        total = torch.ones(1000)
        dist.all_reduce(total)
        assert total.eq(mesh.size).all()
    answers.append(roll_call.answer())
    assert roll_call.answer() is None
    return answers


def test_everyone_knows_what_everyone_said_one_call_later(ranks):
    expected = [None, None, *([[float(rank), number + rank / 8] for rank in range(3)] for number in range(4))]
    assert ranks.on_mesh(calls, 4, data=3) == [expected] * 3


def late_asking(mesh):
    """Seconds that asking takes where the other rank comes half a second later."""
    roll_call = RollCall(mesh)
    roll_call.ask(1.0)
    roll_call.answer()
    if mesh.rank:
        time.sleep(0.5)
    began = time.perf_counter()
    roll_call.ask(2.0)
    seconds = time.perf_counter() - began
    roll_call.answer()
    return seconds


def test_nobody_waits_where_it_is_asked(ranks):
    assert ranks.on_mesh(late_asking, data=2)[0] < 0.25


def test_one_rank_has_its_answer_at_once():
    roll_call = RollCall(Mesh.solo())
    assert roll_call.answer() is None
    roll_call.ask(3.0, 4.0)
    assert roll_call.answer() == [[3.0, 4.0]]
