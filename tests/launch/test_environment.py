from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.launch.environment import (
    RankEnvironment,
    apply,
    check_address,
    describe_ranks,
    expand_node_list,
    expand_tasks_per_node,
    idle_slurm_nodes,
    read_environment,
)

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29501",
}

# What sbatch gives the script itself: rank-like variables, though one process runs.
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "200505",
    "SLURM_JOB_NODELIST": "gnode[09-10,25],x7",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}

SRUN = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}


def test_torchrun() -> None:
    assert read_environment(TORCHRUN) == RankEnvironment(5, 1, 8, 4, "node-a", 29501)


def test_torchrun_without_a_local_size_means_one_machine() -> None:
    environ = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}
    assert read_environment(environ) == RankEnvironment(5, 1, 8, 8, "node-a", 29501)


def test_deepspeed_names_the_local_size_its_own_way() -> None:
    environ = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2", "CROSS_RANK": "2"}
    assert read_environment(environ) == RankEnvironment(5, 1, 8, 2, "node-a", 29501)


def test_torchrun_inside_a_slurm_step_counts_first() -> None:
    assert read_environment(SRUN | TORCHRUN) == RankEnvironment(5, 1, 8, 4, "node-a", 29501)


def test_nothing_set_is_no_environment() -> None:
    assert read_environment({}) is None
    assert read_environment({"MASTER_ADDR": "x", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}) is None


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_torchrun_is_one_clear_line(missing: str) -> None:
    with pytest.raises(ValueError, match=f"RANK is set but {missing} is not") as caught:
        read_environment({k: v for k, v in TORCHRUN.items() if k != missing})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "WORLD_SIZE"])
def test_all_but_the_rank_is_an_error_too(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is set but RANK is not"):
        read_environment({name: "1"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "rank 8 is not among 8"),
        ({"RANK": "first"}, "RANK='first' is not an integer"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"MASTER_PORT": "70000"}, "port 70000"),
    ],
)
def test_values_that_do_not_fit(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_environment(TORCHRUN | change)


def test_srun_on_several_nodes() -> None:
    environment = read_environment(SRUN)
    assert environment is not None
    assert (environment.rank, environment.local_rank) == (5, 1)
    assert (environment.world_size, environment.local_world_size) == (8, 2)
    assert environment.master_address == "gnode09"
    assert 10000 <= environment.master_port < 30000


def test_srun_on_one_node() -> None:
    environ = SRUN | {
        "SLURM_JOB_NODELIST": "gpu3",
        "SLURM_TASKS_PER_NODE": "8",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "5",
    }
    environment = read_environment(environ)
    assert environment is not None
    assert (environment.local_rank, environment.local_world_size, environment.master_address) == (5, 8, "gpu3")


def test_srun_with_unequal_nodes() -> None:
    environ = SRUN | {"SLURM_TASKS_PER_NODE": "3(x2),2", "SLURM_PROCID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}
    environment = read_environment(environ)
    assert environment is not None
    assert environment.local_world_size == 2


def test_every_task_and_node_agrees_on_the_port_and_steps_differ() -> None:
    ports = set()
    for rank in range(8):
        environment = read_environment(SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)})
        assert environment is not None
        ports.add(environment.master_port)
    assert len(ports) == 1
    other = read_environment(SRUN | {"SLURM_STEP_ID": "1"})
    assert other is not None
    assert other.master_port not in ports


def test_a_step_on_part_of_the_job_goes_by_the_step() -> None:
    environ = SRUN | {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "gnode[10,25]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_PROCID": "3",
        "SLURM_NODEID": "1",
    }
    environment = read_environment(environ)
    assert environment is not None
    assert (environment.world_size, environment.local_world_size) == (4, 2)
    assert environment.master_address == "gnode10"


def test_the_master_can_be_named_under_srun() -> None:
    environment = read_environment(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"})
    assert environment is not None
    assert (environment.master_address, environment.master_port) == ("10.0.0.1", 4242)


def test_a_batch_script_is_not_a_rank() -> None:
    assert read_environment(BATCH_SCRIPT) is None
    assert idle_slurm_nodes(BATCH_SCRIPT) == 3
    assert idle_slurm_nodes({}) == 0


def test_the_shell_of_salloc_is_not_a_rank() -> None:
    assert read_environment(BATCH_SCRIPT | {"SLURM_STEP_ID": str(0xFFFFFFFA)}) is None


def test_a_step_of_one_task_lays_out_no_ranks() -> None:
    environ = SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1"}
    assert read_environment(environ) is None


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID"])
def test_half_of_srun_is_one_clear_line(missing: str) -> None:
    with pytest.raises(ValueError, match=f"{missing} is not set"):
        read_environment({k: v for k, v in SRUN.items() if k != missing})


def test_srun_and_a_world_size_that_disagrees() -> None:
    with pytest.raises(ValueError, match="WORLD_SIZE is 4 but srun started 8 tasks"):
        read_environment(SRUN | {"WORLD_SIZE": "4"})


MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_mpirun() -> None:
    with pytest.raises(ValueError, match="-x MASTER_ADDR"):
        read_environment(MPIRUN)
    assert read_environment(MPIRUN | {"MASTER_ADDR": "h"}) == RankEnvironment(3, 1, 4, 2, "h", 29500)
    # mpirun reaches other nodes through srun, whose variables are the daemon's, not the rank's.
    assert read_environment(SRUN | MPIRUN | {"MASTER_ADDR": "h"}) == RankEnvironment(3, 1, 4, 2, "h", 29500)
    one_machine = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    assert read_environment(one_machine) == RankEnvironment(3, 3, 4, 4, "127.0.0.1", 29500)


def test_what_is_applied_is_read_again() -> None:
    environ: dict[str, str] = {}
    for source in (TORCHRUN, SRUN):
        environment = read_environment(source)
        assert environment is not None
        apply(environment, environ)
        assert read_environment(environ) == environment


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],m2", ["n1", "n2", "n3", "n7", "m2"]),
        ("n[008-011]", ["n008", "n009", "n010", "n011"]),
        ("gpu-a[1-2]-ib,login", ["gpu-a1-ib", "gpu-a2-ib", "login"]),
        ("r[1-2]c[01-02]", ["r1c01", "r1c02", "r2c01", "r2c02"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("node.example.org", ["node.example.org"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand_node_list(text) == names


@pytest.mark.parametrize("text", ["", "n[1-3", "n1-3]", "n[3-1]", "n[a]", "n[]", "n[1,[2]]", "a,,b", "a b"])
def test_node_lists_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="node"):
        expand_node_list(text)


@given(st.lists(st.tuples(st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True), st.integers(0, 30)), min_size=1))
def test_node_lists_against_a_writer(hosts: list[tuple[str, int]]) -> None:
    def short(prefix: str, count: int) -> str:
        return f"{prefix}[{count:03d}-{count + 2:03d},{count + 9}]"

    def written_out(prefix: str, count: int) -> Iterator[str]:
        yield from (prefix + str(n).rjust(3, "0") for n in (count, count + 1, count + 2))
        yield prefix + str(count + 9)

    text = ",".join(short(*host) for host in hosts)
    assert expand_node_list(text) == [name for host in hosts for name in written_out(*host)]


def test_tasks_per_node() -> None:
    assert expand_tasks_per_node("2(x2),1") == [2, 2, 1]
    assert expand_tasks_per_node("16") == [16]
    with pytest.raises(ValueError, match="2x2"):
        expand_tasks_per_node("2x2")


def test_ranks_are_said_in_short() -> None:
    assert describe_ranks([3]) == "rank 3" and describe_ranks([10, 2, 0, 1, 3, 8]) == "ranks 0-3, 8, 10"
    assert describe_ranks([5, 4]) == "ranks 4-5"
    assert describe_ranks(range(0, 80, 2)).endswith(" 28, 30 and 24 more")


def test_an_unknown_address_is_said_at_once() -> None:
    check_address(RankEnvironment(0, 0, 2, 1, "127.0.0.1", 29501))
    with pytest.raises(ValueError, match=r"^the name no-such-node\.invalid .* set MASTER_ADDR"):
        check_address(RankEnvironment(0, 0, 2, 1, "no-such-node.invalid", 29501))
