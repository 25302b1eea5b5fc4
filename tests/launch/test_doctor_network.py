"""``farspan doctor`` between ranks: who came, collectives, what differs between nodes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from farspan.launch.cli import main
from farspan.launch.doctor import cluster, collectives, roll, versions
from farspan.launch.doctor.examination import Wanted
from farspan.launch.doctor.report import Section
from farspan.launch.environment import RankEnvironment, read_environment
from farspan.launch.local import free_port

Page = tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]


def examine(path: str | None, quick: bool, seconds: float, fields: dict[str, int], odd: str | None) -> Page:
    """On a rank: (sections by node, sections of all by title, findings).

    ``quick``: without it the network is measured, and the node is not looked at.  ``odd``: the function that the last
    rank calls first.
    """
    environment = read_environment()
    assert environment is not None
    if odd is not None and environment.rank == environment.world_size - 1:
        globals()[odd]()
    if not quick:
        cluster.examine_node = lambda wanted: []  # type: ignore[assignment]
    environment = dataclasses.replace(environment, **fields)
    found = cluster.examine_cluster(environment, Wanted(None, None, Path(path) if path else None, quick), seconds)
    findings = [f for sections in (*found.nodes.values(), found.together) for one in sections for f in one.findings]
    nodes = {host: {one.title: one.facts for one in sections} for host, sections in found.nodes.items()}
    together = {one.title: one.facts | {"lines": one.lines} for one in found.together}
    return nodes, together, [(f.severity, f.what) for f in findings]


def run(
    ranks: Ranks,
    path: Path | None = None,
    *,
    quick: bool = True,
    seconds: float = 20.0,
    count: int = 2,
    odd: str | None = None,
    **fields: int,
) -> Page:
    pages = ranks.run(examine, str(path) if path else None, quick, seconds, fields, odd, count=count)
    assert all(page[:2] == ({}, {}) for page in pages[1:])
    return pages[0]  # type: ignore[no-any-return]


NODES = {"local_rank": 0, "local_world_size": 1}  # each rank as if on a node of its own


def test_two_ranks_of_one_machine(ranks: Ranks, tmp_path: Path) -> None:
    try:
        nodes, together, findings = run(ranks, tmp_path, quick=False, seconds=50.0)
    finally:
        ranks.stop()  # which do not look at their node any more
    assert list(nodes) == [socket.gethostname()] and [f for f in findings if f[0] == "fault"] == []
    network = together["network"]
    assert network["wrong"] == [] and network["backend"] == "gloo" and "nodes" not in together
    assert [one["bytes"] for one in network["sizes"]] == list(collectives.CPU_SIZES)
    for one in network["sizes"]:
        # nccl-tests, PERFORMANCE.md: for two ranks bus bandwidth is S/t, and half of it for all-gather
        assert one["all_reduce_bytes_per_second"] == pytest.approx(one["bytes"] / one["all_reduce_seconds"])
        assert one["all_gather_bytes_per_second"] == pytest.approx(one["bytes"] / 2 / one["all_gather_seconds"])
    assert "2 ranks on 1 node by gloo" in "\n".join(network["lines"])
    assert list(tmp_path.iterdir()) == []


def test_two_nodes(ranks: Ranks, tmp_path: Path) -> None:
    nodes, together, findings = run(ranks, tmp_path, **NODES)
    host = socket.gethostname()
    assert list(nodes) == [f"{host} (rank 0)", f"{host} (rank 1)"] and [f for f in findings if f[0] == "fault"] == []
    assert together["nodes"]["differences"] == 0 and together["nodes"]["run_folder_is_shared"] is True
    ((pair),) = together["network"]["pairs"]
    assert (pair["from"], pair["to"]) == (0, 1) and 0 < pair["seconds"] < 1
    assert all(abs(clock) < 0.5 for clock in together["network"]["clocks"])
    assert list(tmp_path.iterdir()) == []


def another_environment() -> None:
    """Other sources, another torch, a variable, and a clock that is ahead."""
    versions.sources_digest = lambda: "00000000"  # type: ignore[assignment]
    here = versions.version_of
    versions.version_of = lambda name: "2.11.0" if name == "torch" else here(name)
    os.environ["NCCL_DEBUG"] = "WARN"
    clock = types.SimpleNamespace(time=lambda: time.time() + 7.0, perf_counter=time.perf_counter)
    collectives.time = clock  # type: ignore[attr-defined]
    cluster.is_seen = lambda file, seconds: False


def test_what_differs_between_nodes_is_named(ranks: Ranks, tmp_path: Path) -> None:
    try:
        _, together, findings = run(ranks, tmp_path, odd=another_environment.__name__, **NODES)
    finally:
        ranks.stop()  # the rank was changed
    host = socket.gethostname()
    said = {what: severity for severity, what in findings}
    torch_here = versions.version_of("torch")
    assert said[f"torch differs between nodes: {torch_here} on {host} (rank 0); 2.11.0 on {host} (rank 1)"] == "fault"
    sources = next(what for what in said if what.startswith("Farspan's sources differs between nodes"))
    assert said[sources] == "fault" and sources.endswith(f"; 00000000 on {host} (rank 1)")
    variable = f"NCCL_DEBUG differs between nodes: none on {host} (rank 0); WARN on {host} (rank 1)"
    assert said[variable] == "warning"
    assert any(what.startswith(f"the clock of {host} (rank 1) is 7.") for what in said), said
    assert any(what.endswith(f"is not seen on {host} (rank 1)") for what in said), said
    assert together["nodes"]["run_folder_is_shared"] is False and list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_come_is_named(ranks: Ranks) -> None:
    began = time.monotonic()
    _, together, findings = run(ranks, seconds=2.0, world_size=4, local_world_size=2)
    faults = [what for severity, what in findings if severity == "fault"]
    assert faults == ["ranks 2-3 on node 2 of 2, of which nobody came: not here after 2 s"]
    assert together["network"]["missing"] == [2, 3] and "sizes" not in together["network"]
    assert time.monotonic() - began < 30


def sleeping() -> None:
    collectives.measure = lambda *_, **__: time.sleep(3600)  # type: ignore[assignment]


def test_a_rank_that_stays_out_of_the_collectives_is_named(ranks: Ranks) -> None:
    try:
        _, _, findings = run_first(ranks, sleeping.__name__, seconds=3.0)
    finally:
        ranks.stop()
    (fault,) = [what for severity, what in findings if severity == "fault"]
    assert fault.startswith("a collective failed: ") and "rank 1 at the start" in fault
    assert "rank 0 at making the process group" in fault


def run_first(ranks: Ranks, odd: str, seconds: float) -> Page:
    """The page of the first rank; the other one hangs."""
    ranks.begin(examine, None, True, seconds, {}, odd, count=2)
    connection, deadline = ranks._ranks[0].connection, time.monotonic() + 50.0
    assert connection.poll(max(0.0, deadline - time.monotonic())), "the first rank hangs too"
    page, failure = ranks._receive(0)
    assert failure is None, failure
    return page  # type: ignore[no-any-return]


def wrong_sums() -> None:
    right = dist.all_reduce

    def all_reduce(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        done = right(x, *args, **kwargs)
        x += 1
        return done

    collectives.dist.all_reduce = all_reduce  # type: ignore[assignment]


def test_a_wrong_result_is_a_fault(ranks: Ranks) -> None:
    try:
        _, together, findings = run(ranks, odd=wrong_sums.__name__)
    finally:
        ranks.stop()
    wrong = "rank 1: all-reduce of rank + 1 gives 4, not 3"
    assert together["network"]["wrong"] == [wrong]
    assert ("fault", f"a collective gives a wrong result: {wrong}") in findings


# Without ranks.

CAME = {0: {"host": "n1", "local_rank": 0}, 1: {"host": "n1", "local_rank": 1}, 4: {"host": "n3", "local_rank": 0}}


def test_missing_ranks_are_named_by_node() -> None:
    environment = RankEnvironment(0, 0, 8, 2, "n1", 29500)
    missing = [rank for rank in range(8) if rank not in CAME]
    said = roll.name_missing(missing, CAME, environment, {"SLURM_STEP_NODELIST": "n[1-4]"})
    assert said == "ranks 2-3 on n2; rank 5 on n3, from where others came; ranks 6-7 on n4"
    said = roll.name_missing([2, 6], CAME, environment, {"SLURM_JOB_NODELIST": "n[1-9]"})
    assert said == "rank 2 on node 2 of 4, of which nobody came; rank 6 on node 4 of 4, of which nobody came"


def test_names_of_nodes() -> None:
    assert cluster.node_names(CAME) == {0: "n1", 1: "n1", 4: "n3"}
    alike = {rank: {"host": "localhost", "local_rank": rank % 2} for rank in range(4)}
    assert cluster.node_names(alike) == dict(
        enumerate(["localhost (rank 0)", "localhost (rank 0)", "localhost (rank 2)", "localhost (rank 2)"])
    )


def test_a_first_rank_that_cannot_be_reached() -> None:
    environment = RankEnvironment(1, 0, 2, 1, "127.0.0.1", free_port())
    began = time.monotonic()
    with pytest.raises(roll.Unreachable, match=r"cannot reach 127\.0\.0\.1:\d+: Connection refused, for 1 s"):
        roll.connect(environment, 1.0)
    assert time.monotonic() - began < 10
    with pytest.raises(roll.Unreachable, match=r"cannot reach no-such-host\.invalid:\d+: .*[Nn]ame"):
        roll.connect(dataclasses.replace(environment, master_address="no-such-host.invalid"), 0.5)


def test_a_port_that_another_program_has() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        environment = RankEnvironment(0, 0, 2, 1, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(roll.Unreachable, match="cannot serve 127"):
            roll.connect(environment, 1.0)


@pytest.mark.parametrize(("gloo", "fault"), [("127.0.1.1", True), ("10.0.0.2", False), (None, True)])
def test_gloo_on_an_address_that_no_other_node_reaches(gloo: str | None, fault: bool) -> None:
    section, said = Section("network"), {"to_first": "10.0.0.2", "interface": "eth0", "gloo": gloo}
    store = dist.HashStore()
    for rank in range(2):
        roll.put(store, f"address/{rank}", said)
    cluster._addresses(section, store, ["n1", "n2"], nodes=2)
    assert len(section.findings) == (2 if fault else 0)
    if fault:
        assert section.findings[1].mend.startswith("export GLOO_SOCKET_IFNAME=eth0 there")


def found(**fields: Any) -> dict[str, Any]:
    sizes = [{"bytes": 4096} | dict.fromkeys(["all_reduce_seconds", "all_gather_seconds"], 1e-4)]
    sizes[0] |= {"all_reduce_bytes_per_second": 6e9, "all_gather_bytes_per_second": 6e9}
    plain = {"backend": "nccl", "start_seconds": 1.0, "wrong": [], "clocks": [0.0] * 4, "sizes": sizes}
    return plain | {"nccl_network": "IB", "pairs": []} | fields


def test_what_is_slow_between_nodes_is_named() -> None:
    hosts = ["n1", "n2", "n3", "n4"]

    def report(**fields: Any) -> list[str]:
        section = Section("network")
        collectives.report(section, found(**fields), hosts, ["mlx5_0"])
        return [one.what for one in section.findings]

    assert report() == []
    assert report(nccl_network="Socket") == ["NCCL talks over TCP though there is mlx5_0"]
    slow = found()["sizes"][0] | {"all_reduce_bytes_per_second": 1e9}
    assert report(sizes=[slow]) == ["all-reduce between nodes reaches 1.0 GB/s"]
    pairs = [{"from": a, "to": b, "seconds": 5e-3 if (a, b) == (1, 3) else 5e-5} for a, b in ((0, 1), (0, 2), (1, 3))]
    assert report(pairs=pairs) == ["a message between n2 and n4 takes 5.0 ms, 100 times the others'"]
    assert report(clocks=[0.0, 0.3, -90.0, 0.0]) == ["the clock of n3 is 90.0 s behind that of n1"]


def test_the_network_that_nccl_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("n1:77:80 [0] NCCL INFO NET/IB : No device found.\nn1:77:80 [0] NCCL INFO Using network Socket\n")
    assert collectives._nccl_network(log) == "Socket" and not log.exists()
    assert collectives._nccl_network(log) is None


# The command.


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def test_a_rank_alone_says_who_is_missing(launched: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--wait", "1", "--path", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "  fault: rank 1 on node 2 of 2, of which nobody came: not here after 1 s\n" in out
    assert "versions\n" in out and "disk\n" in out


def test_another_rank_alone_says_that_the_first_is_not_there(
    launched: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor", "--quick", "--wait", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"farspan: rank 1 on {socket.gethostname()} cannot reach 127.0.0.1:")


def test_the_command_starts_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--quick", "--ranks", "2", "--json", "--path", str(tmp_path)])
    out, err = capfd.readouterr()
    value = json.loads(out)
    assert code == value["exit_code"] and value["cluster"]["network"]["facts"]["backend"] == "gloo", err
    assert code == (1 if any(one["severity"] == "fault" for one in value["to_mend"]) else 0)
