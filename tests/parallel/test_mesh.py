from __future__ import annotations

import time

import pytest
import torch

from farspan.parallel.mesh import Mesh, local_device, start_name


def where(mesh):
    import torch.distributed as dist

    axes = (mesh.tensor, mesh.pipeline, mesh.data, mesh.model)
    for axis in axes:  # the groups are those that the sizes say
        assert (dist.get_rank(axis.group), dist.get_world_size(axis.group)) == (axis.rank, axis.size)
    return [axis.rank for axis in axes], [axis.size for axis in axes], mesh.is_writer, mesh.describe()


def test_tensor_ranks_are_neighbours(ranks):
    found = ranks.on_mesh(where, tensor=2, pipeline=2)
    assert [place for place, *_ in found] == [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 2], [1, 1, 0, 3]]
    assert {tuple(sizes) for _, sizes, *_ in found} == {(2, 2, 1, 4)}
    assert [writer for *_, writer, _ in found] == [True, False, False, False]
    assert found[0][3] == "tensor 2 × pipeline 2 × data 1"
    found = ranks.on_mesh(where, pipeline=2, data=2)
    assert [place for place, *_ in found] == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 1, 1, 1]]


def told(mesh):
    """What the writer finds, though others would find something else; and what it raises."""
    found = [mesh.tell(lambda: f"rank {mesh.rank}")]
    for error in (ValueError("no such thing"), OSError(28, "full", "a file")):
        try:
            mesh.tell(lambda error=error: fail(error) if mesh.is_writer else "fine")
        except (ValueError, OSError) as raised:
            found.append((type(raised), str(raised)))
    return found


def fail(error):
    raise error


def test_what_the_writer_finds_is_told_to_all(ranks):
    expected = ["rank 0", (ValueError, "no such thing"), (OSError, "[Errno 28] full: 'a file'")]
    assert ranks.on_mesh(told, tensor=2) == [expected] * 2
    assert told(Mesh.solo()) == expected


def done_alike(mesh):
    """What all do well; and what one rank, or two, cannot."""
    found = [mesh.alike(lambda: mesh.rank), mesh.first_problem(None), mesh.first_problem("late" if mesh.rank else None)]
    for error, ranks in ((ValueError("no such thing"), {1}), (OSError(28, "full", "a file"), {0, 1})):
        try:
            mesh.alike(lambda error=error, ranks=ranks: fail(error) if mesh.rank in ranks else "fine")
        except (ValueError, OSError) as raised:
            found.append((type(raised), str(raised)))
    return found


def test_an_error_of_one_rank_is_one_of_all(ranks):
    expected = [None, "rank 1: late", (ValueError, "no such thing"), (OSError, "[Errno 28] full: 'a file'")]
    assert ranks.on_mesh(done_alike, tensor=2) == [[rank, *expected] for rank in (0, 1)]
    assert done_alike(Mesh.solo()) == [0, None, None, expected[-1]]


def test_the_name_of_a_start():
    """Agents of two nodes may count otherwise; only in one store that they share a start has to differ from others."""
    environ = {"WORLD_SIZE": "16", "TORCHELASTIC_RESTART_COUNT": "1"}
    shared = environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert start_name(shared) != start_name(shared | {"TORCHELASTIC_RESTART_COUNT": "2"})
    apart = environ | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert start_name(apart) == start_name(apart | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert start_name(environ) != start_name(environ | {"WORLD_SIZE": "8"})


def create_wrongly():
    import torch.distributed as dist

    try:
        Mesh.create(3, 1, device=torch.device("cpu"))
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()


def wait_for_the_other(seconds: float) -> str | None:
    """A rank that does not come to a sum of the replicas: what becomes of the other, and how soon."""
    mesh = Mesh.create(1, 1, device=torch.device("cpu"), timeout_seconds=seconds)
    began, failure = time.monotonic(), None
    try:
        if mesh.data.first:
            mesh.data.all_reduce(torch.ones(1))
        else:
            time.sleep(seconds + 3)
    except RuntimeError as error:
        failure = f"{time.monotonic() - began:.0f} s: {error}"
    mesh.destroy()
    return failure


def test_groups_wait_as_long_as_they_are_told(ranks):
    failure, nothing = ranks.run(wait_for_the_other, 2.0, count=2, seconds=30)
    assert nothing is None and failure is not None and failure.startswith(("2 s", "3 s")), failure
    ranks.stop()  # one of them has broken connections


def test_ranks_that_do_not_divide_are_refused(ranks):
    message = (
        "2 ranks do not divide by tensor 3 × pipeline 1: set parallel.tensor and parallel.pipeline, or start another"
    )
    assert all(found.startswith(message) and "\n" not in found for found in ranks.run(create_wrongly, count=2))


def test_solo_and_device(monkeypatch):
    mesh = Mesh.solo()
    assert (mesh.size, mesh.rank, mesh.is_writer, mesh.device.type) == (1, 0, True, "cpu")
    assert mesh.tensor.first and mesh.tensor.last
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device(3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device(1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="local rank 2 has no GPU of its own: this node has 2"):
        local_device(2)
