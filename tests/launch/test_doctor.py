"""``farspan doctor``: versions, the machine, devices and compilers of machines that are made up, and the page."""

from __future__ import annotations

import json
import resource
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from farspan.kernels import forms
from farspan.launch.cli import main
from farspan.launch.doctor import clashes, compilers, devices, host, interfaces, page, requirements, versions
from farspan.launch.doctor.report import Finding, Section, examine, exit_code, merge


def words(section: Section) -> str:
    return "\n".join([*section.lines, *(f"{f.severity}: {f.what}; {f.why}; {f.mend}" for f in section.findings)])


# The page.


def test_the_page_ends_with_what_is_to_be_mended_faults_first() -> None:
    mild, bad = Finding("warning", "slow", "it waits", "buy"), Finding("fault", "broken", "it ends", "mend")
    findings = merge([("n1", mild), ("n1", bad), ("n2", mild)], hosts=2)
    assert [(f.what, f.hosts) for f in findings] == [("broken", ("n1",)), ("slow", ("n1", "n2"))]
    said = page.render("heading", [Section("disk", ["fast"])], findings)
    assert said.startswith("heading\ndisk\n  fast\nto mend\n  fault: n1: broken\n    why: it ends\n    do:  mend\n")
    assert said.endswith("1 faults, 1 warnings\n") and "  warning: n1, n2: slow\n" in said
    assert exit_code(findings) == 1 and exit_code([mild]) == 0
    assert page.render("heading", [], []).endswith("nothing to mend\n")


def test_a_look_that_fails_is_a_finding_and_ends_nothing() -> None:
    def look(section: Section) -> None:
        section.say("so far")
        raise RuntimeError("the driver\nis gone")

    section = examine("devices", look)
    assert section.lines == ["so far"] and section.facts["seconds"] >= 0
    assert "RuntimeError: the driver is gone" in section.findings[0].what
    assert Section.from_json(json.loads(json.dumps(section.to_json()))) == section


# Versions.


def install(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> None:
    """What pip leaves of a package beside its files."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def first_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_what_is_installed_here_fits() -> None:
    assert [one for one in requirements.broken() if one.direct] == []


def test_a_range_of_ours_that_does_not_hold_is_a_fault(first_on_path: Path) -> None:
    install(first_on_path, "datasets", "3.0.0")
    (one,) = [one for one in requirements.broken() if one.requirement.startswith("datasets")]
    assert (one.by, one.found, one.direct) == ("farspan", "3.0.0", True) and one.requirement == "datasets<6,>=4"
    section = examine("versions", lambda it: versions.look(it, quick=True))
    assert "fault: farspan asks for datasets<6,>=4 and 3.0.0 is installed" in words(section)
    assert "datasets is installed 2 times: 3.0.0 in" in words(section)


def test_a_range_of_a_packages_own_is_a_warning(first_on_path: Path) -> None:
    requires = ("einops>=999", 'torch<1; extra == "old"', "hjson; python_version < '3'", "hjson>=3", "nothing-such")
    install(first_on_path, "deepspeed", "0.19.99", requires)
    found = {(one.requirement, one.found is None) for one in requirements.broken() if one.by == "deepspeed 0.19.99"}
    assert found == {("einops>=999", False), ("nothing-such", True)}
    section = examine("versions", lambda it: versions.look(it, quick=True))
    assert "warning: deepspeed 0.19.99 asks for nothing-such and it is not installed" in words(section)
    assert not [f for f in section.findings if f.severity == "fault"]


def test_another_python_than_farspan_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.platform, "python_version", lambda: "3.9.1")
    one = requirements.broken()[0]
    assert (one.requirement, one.found, one.direct) == ("Python >=3.11", "3.9.1", True)


def test_requirements_of_an_installed_farspan_are_those_of_the_checkout(
    first_on_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, plain, extras = requirements.own_requirements()
    listed = [*plain, *(f'{text}; extra == "hf"' for text in extras["hf"])]
    install(first_on_path, "farspan", "9.9", tuple(listed))
    file = first_on_path / "farspan-9.9.dist-info/METADATA"
    file.write_text(file.read_text().replace("Version: 9.9\n", f"Version: 9.9\nRequires-Python: {python}\n"))
    monkeypatch.setattr(requirements, "ROOT", tmp_path)  # which has no pyproject.toml
    assert requirements.own_requirements() == (python, plain, {"hf": extras["hf"]})


@pytest.mark.parametrize(
    ("packages", "clash"),
    [
        ([("apex", "0.9.10.dev0", ("apex/__init__.py",))], "apex 0.9.10.dev0 is PyPI's"),
        ([("apex", "0.1", ("apex/__init__.py", "apex/normalization/__init__.py"))], None),
        ([("tensorboard", "2.20.0", ()), ("setuptools", "82.0.1", ())], "tensorboard 2.20.0 imports pkg_resources"),
        ([("tensorboard", "2.20.0", ()), ("setuptools", "81.0.0", ())], None),
        ([("nvidia-nccl-cu12", "2.27.3", ()), ("nvidia-nccl-cu13", "2.28.9", ())], "are both installed"),
        ([("pynvml", "12.0.0", ())], "pynvml 12.0.0 is installed"),
        ([("transformer-engine", "2.1", ())], "transformer-engine is installed and cannot be imported"),
    ],
)
def test_known_clashes(
    first_on_path: Path, packages: list[tuple[str, str, tuple[str, ...]]], clash: str | None
) -> None:
    before = [found for one in clashes.CLASHES if (found := one.found()) is not None]
    for name, version, files in packages:
        install(first_on_path, name, version, files=files)
    found = [found for one in clashes.CLASHES if (found := one.found()) is not None and found not in before]
    assert len(found) == (clash is not None) and (clash is None or clash in found[0])
    section = examine("versions", lambda it: versions.look(it, quick=True))
    assert clash is None or clash in words(section)


def test_every_clash_names_where_it_is_told() -> None:
    for clash in clashes.CLASHES:
        assert clash.source and clash.why and clash.mend


@pytest.mark.filterwarnings("ignore:TF32")
def test_the_error_of_a_convolutions_gradient_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert clashes.convolution_error() < 1e-5
    monkeypatch.setattr(versions, "convolution_error", lambda: 0.13)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    section = Section("versions")
    versions._known_wrong(section)
    assert "(by 13% of it" in section.lines[0]


def test_variables_that_change_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "INFO")
    monkeypatch.setenv("FARSPAN_KERNELS", "fast")
    section = Section("versions")
    versions._environment(section)
    assert "warning: NCCL_P2P_DISABLE is 1" in words(section) and "TORCH_DISTRIBUTED_DEBUG is" not in words(section)
    assert "fault: FARSPAN_KERNELS is 'fast'" in words(section)
    assert "TORCH_DISTRIBUTED_DEBUG=INFO" in section.lines[0]


def test_what_cannot_be_imported_is_a_fault(first_on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first_on_path / "torch.py").write_text("raise ImportError('undefined symbol: ncclCommRegister')\n")
    monkeypatch.setenv("PYTHONPATH", str(first_on_path))
    section = Section("versions")
    versions._imports(section)
    assert "fault: Farspan cannot be imported: ImportError: undefined symbol: ncclCommRegister" in words(section)


# The machine.

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 64 GiB and two NUMA nodes, 8 GiB of swap."""
    files = {
        "proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {60 * GIB // 1024} kB\n"
        f"SwapTotal: {8 * GIB // 1024} kB\nSwapFree: {8 * GIB // 1024} kB\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Made Up 9000\n",
        "sys/devices/system/node/node0/cpulist": "0-31\n",
        "sys/devices/system/node/node1/cpulist": "32-63\n",
        "dev/shm/file": "",
    }
    for name, text in files.items():
        put(tmp_path / name, text)
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def looked_at(root: Path, gpus: int = 0) -> str:
    return words(examine("machine", lambda it: host.look(it, root, gpus)))


def test_a_machine_without_control_groups(root: Path) -> None:
    said = looked_at(root)
    assert "Made Up 9000" in said and "memory 68.7 GB, 64.4 GB available; swap 8.6 GB" in said
    assert "NUMA: node0 has 0-31, node1 has 32-63" in said
    assert host.memory_limit(root) == 64 * GIB and host.cgroup_cores(root) is None


def test_control_groups_of_version_2_limit_through_their_parents(root: Path) -> None:
    put(root / "proc/self/cgroup", "0::/slurm/job_7/step_0\n")
    put(root / "sys/fs/cgroup/slurm/job_7/step_0/memory.max", "max\n")
    put(root / "sys/fs/cgroup/slurm/job_7/memory.max", f"{16 * GIB}\n")
    put(root / "sys/fs/cgroup/slurm/job_7/cpu.max", "50000 100000\n")
    put(root / "sys/fs/cgroup/slurm/job_7/step_0/cpu.max", "max 100000\n")
    assert host.memory_limit(root) == 16 * GIB and host.cgroup_cores(root) == 0.5
    said = looked_at(root)
    assert "a control group allows 17.2 GB" in said
    assert "warning: a control group grants the time of 0.5 processors" in said


def test_control_groups_of_version_1_and_of_a_container(root: Path) -> None:
    # The path is the host's; in the container its own group is at the top.
    put(root / "proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    put(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{4 * GIB}\n")
    put(root / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000\n")
    put(root / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert host.memory_limit(root) == 4 * GIB and host.cgroup_cores(root) == 1.5
    put(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(root / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert host.memory_limit(root) == 64 * GIB and host.cgroup_cores(root) is None


def test_memory_that_is_short(root: Path) -> None:
    put(
        root / "proc/meminfo",
        f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {2 * GIB // 1024} kB\n"
        f"SwapTotal: {8 * GIB // 1024} kB\nSwapFree: {3 * GIB // 1024} kB\n",
    )
    put(root / "proc/sys/vm/overcommit_memory", "2\n")
    said = looked_at(root)
    assert "warning: 2.1 GB of 68.7 GB memory are available" in said
    assert "warning: 5.4 GB have been moved to swap" in said and "vm.overcommit_memory is 2" in said


def test_infiniband_needs_locked_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_MEMLOCK: 65536, resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_FSIZE: 10**9}
    infinity = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits.get(number, infinity), infinity))
    said = looked_at(root)
    assert "fault" not in said  # without InfiniBand nothing locks memory
    assert "warning: a process may open 1024 files" in said and "no file may grow beyond 1.0 GB" in said
    put(root / "sys/class/infiniband/mlx5_0/x", "")
    assert "fault: a process may lock 65.5 kB of memory, and there is mlx5_0" in looked_at(root)
    limits[resource.RLIMIT_MEMLOCK] = infinity
    assert "fault" not in looked_at(root)


def test_shared_memory_matters_with_several_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: types.SimpleNamespace(total=64 << 20, free=60 << 20))
    assert "--shm-size" not in looked_at(root, gpus=1) and "--shm-size=8g" in looked_at(root, gpus=2)


def test_a_name_without_an_address(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.socket, "gethostname", lambda: "no-such-host.invalid")
    assert "warning: the name of this host, no-such-host.invalid, has no address here" in looked_at(root)


def test_more_threads_than_cores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert "warning: OMP_NUM_THREADS is 4096" in looked_at(root)


# Interfaces.


def test_the_interfaces_of_this_machine() -> None:
    assert "127.0.0.1" in {one.address for one in interfaces.interfaces()}


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("GLOO_SOCKET_IFNAME", "ib9", False),
        ("NCCL_SOCKET_IFNAME", "l,ib", True),
        ("NCCL_SOCKET_IFNAME", "=l", False),
        ("NCCL_SOCKET_IFNAME", "=lo", True),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "^lo", False),
        ("NCCL_SOCKET_IFNAME", "ib", False),
    ],
)
def test_an_interface_that_there_is_not(variable: str, value: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    only = [interfaces.Interface("lo", "127.0.0.1", None, True)]
    monkeypatch.setattr(interfaces, "interfaces", lambda: only)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    said = words(examine("interfaces", interfaces.look))
    assert (f"fault: {variable} is {value!r} and this machine has lo" in said) is not fits


# Compilers.


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FARSPAN_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FARSPAN_KERNELS", raising=False)
    forms.configure()
    yield tmp_path / "cache"
    forms.configure()


def test_without_a_compiler_kernels_cannot_be_built(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    look = lambda it: compilers.look(it, quick=True, operations=["dropout"])  # noqa: E731
    said = words(examine("compilers", look))
    assert "warning: no C++ compiler was found as '/nowhere/c++'" in said and "fault" not in said
    monkeypatch.setenv("FARSPAN_KERNELS", "require")
    assert "fault: kernels.mode is require and dropout cannot be had for cpu" in words(examine("compilers", look))
    full = lambda it: compilers.look(it, quick=False, operations=["dropout"])  # noqa: E731
    assert "fault: kernels.mode is require and dropout cannot be had for cpu" in words(examine("compilers", full))


def test_which_form_runs_is_tried(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "nothing.cpp"
    source.write_text(
        '#include "cpu.h"\nFARSPAN_EXPORT int nothing(const void* x, int threads) { (void)x; return 0; }\n'
    )
    monkeypatch.setattr(forms, "OPERATIONS", {"nothing": forms.Operation((), (str(source),))})
    section = examine("compilers", lambda it: compilers.look(it, quick=False))
    assert section.facts["kernels"]["nothing on cpu"].startswith("compiled (cpu ")
    assert not list(cache.glob("none")) and len(list(cache.glob("nothing-cpu-*/library.so"))) == 1


def test_nvcc_of_another_cuda_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for release, offload, said in (
        ("Cuda compilation tools, release 12.4, V12.4.1", True, ""),
        ("Cuda compilation tools, release 13.0, V13.0.88", False, "warning: nvcc is of CUDA 13.0 and torch is built"),
        ("Cuda compilation tools, release 13.0, V13.0.88", True, "fault: nvcc is of CUDA 13.0 and torch is built"),
    ):
        section = Section("compilers")
        compilers._nvcc_fits(section, release, offload=offload)
        assert words(section).startswith(said) and bool(section.findings) is bool(said)


def test_offloading_needs_pythons_headers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    look = lambda offload: words(  # noqa: E731
        examine("compilers", lambda it: compilers.look(it, quick=True, offload=offload))
    )
    assert "fault: Python.h is not in /nowhere" in look(True) and "Python.h" not in look(False)


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSPAN_KERNEL_CACHE", "/proc/kernels")
    said = words(examine("compilers", lambda it: compilers.look(it, quick=True)))
    assert "warning: the cache of kernels /proc/kernels cannot be written" in said


# Devices.

SMI = """#!/bin/sh
case "$1" in
--query-gpu*) {gpus} ;;
--query-compute-apps*) {processes} ;;
topo) printf '\\tGPU0\\tGPU1\\tCPU Affinity\\nGPU0\\t X \\tNV18\\t0-31\\nGPU1\\tNV18\\t X \\t0-31\\n' ;;
esac
"""
GPU = "{i}, GPU-{i}, NVIDIA H100, {driver}, 81559, {used}, {heat}, 100.0, 700.0, {keeps}, Enabled, {errors}, {mode}"


def gpu(i: int, **fields: object) -> str:
    healthy = {"driver": "580.65.06", "used": 4, "heat": 40, "keeps": "Enabled", "errors": 0, "mode": "Default"}
    return GPU.format(i=i, **(healthy | fields))


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(gpus: str, processes: str = "true") -> None:
        program = tmp_path / "bin/nvidia-smi"
        put(program, SMI.format(gpus=gpus, processes=processes))
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def look_at_devices() -> str:
    return words(examine("devices", devices.look))


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


def test_gpus_that_torch_cannot_use(smi, no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(f"echo '{gpu(0)}'")
    assert "warning: this machine has 1 GPUs and torch is built without CUDA" in look_at_devices()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "fault: nvidia-smi shows 1 GPUs and torch sees none" in look_at_devices()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = look_at_devices()
    assert "1 GPUs are hidden by CUDA_VISIBLE_DEVICES=''" in said and "fault" not in said


def test_a_driver_that_is_too_old(smi, no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(f"echo '{gpu(0, driver='550.54.15')}'")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0, which needs driver 580 or newer; here is 550.54.15" in look_at_devices()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "needs driver" not in look_at_devices()


def test_a_driver_that_does_not_answer(smi, no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    smi("exec sleep 30")
    monkeypatch.setattr(devices, "SMI_SECONDS", 0.3)
    assert "fault: nvidia-smi did not answer within 0 s" in look_at_devices()
    smi("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.' >&2; exit 9")
    monkeypatch.setattr(devices, "SMI_SECONDS", 15.0)
    assert "fault: nvidia-smi fails: NVIDIA-SMI has failed because it could not" in look_at_devices()
    smi("echo 'something else'")
    assert "its answer to --query-gpu is not understood: 'something else'" in look_at_devices()


def test_without_nvidia_smi_nothing_is_wrong(no_cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look_at_devices() == "torch is built without CUDA\nno GPU: runs take the CPU"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What torch says of two GPUs of a machine that is not here."""
    it = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H100", multi_processor_count=132, free=[80 * GIB] * 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: it)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (it.free[i], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return it


def test_healthy_gpus(smi, two_gpus: types.SimpleNamespace) -> None:
    smi(f"echo '{gpu(0)}'; echo '{gpu(1)}'")
    section = examine("devices", devices.look)
    said = words(section)
    assert "GPU 1: NVIDIA H100, capability 9.0, 85.9 GB, 85.9 GB free" in said and "driver 580.65.06" in said
    assert "peer access between GPUs: not for 0–1" in said and "GPU0  X     NV18" in said
    assert section.facts["links"] == {"GPU0": ["X", "NV18"], "GPU1": ["NV18", "X"]}
    assert [f.what for f in section.findings] == ["this torch has no NCCL"]


def test_gpus_that_are_not_well(smi, two_gpus: types.SimpleNamespace) -> None:
    two_gpus.free[1] = 20 * GIB
    sick = gpu(0, heat=91, keeps="Disabled", errors=3)
    smi(f"echo '{sick}'; echo '{gpu(1, mode='Prohibited')}'", "echo 'GPU-1, 4711, 60000, python train.py, x'")
    said = look_at_devices()
    for line in (
        "fault: GPU 0 has had 3 memory errors", "warning: GPU 0 is at 91 °C", "warning: GPU 0 has persistence mode off",
        "fault: GPU 1 is in compute mode Prohibited", "warning: GPU 1 has 21.5 GB of 85.9 GB free",
        "warning: GPU 1 is used by process 4711 (python train.py, x, 60000 MiB)",
    ):  # fmt: skip
        assert line in said, line


def test_a_torch_without_code_for_the_gpu(smi, two_gpus: types.SimpleNamespace) -> None:
    smi(f"echo '{gpu(0)}'")
    two_gpus.major, two_gpus.minor = 7, 0
    assert "has no code for GPU 0 (NVIDIA H100, sm_70), only for sm_80, sm_90, compute_90" in look_at_devices()
    two_gpus.major = 12  # translated from compute_90
    assert "has no code" not in look_at_devices()


@pytest.mark.parametrize(
    ("name", "capability", "runs"),
    [
        ("sm_80", (8, 6), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False), ("compute_80", (9, 0), True),
        ("sm_90a", (9, 0), True), ("sm_120", (12, 0), True), ("sm_100", (12, 0), False), ("gfx", (9, 0), True),
    ],
)  # fmt: skip
def test_which_code_a_gpu_runs(name: str, capability: tuple[int, int], runs: bool) -> None:
    assert devices._runs(name, capability) is runs


# The command.


def test_json_says_what_the_page_says(
    cache: Path, smi, no_cuda: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("exit 9")
    for options in ([], ["--json"]):
        assert main(["doctor", "--quick", "--path", str(tmp_path), *options]) == 1
    said, _, found = capsys.readouterr().out.partition("\n{")
    value = json.loads("{" + found)
    assert value["exit_code"] == 1 and value["format"] == 1 and value["to_mend"][0]["severity"] == "fault"
    assert "nvidia-smi fails: exit code 9" in value["to_mend"][0]["what"]
    assert f"fault: {value['to_mend'][0]['what']}\n" in said
    ((name, sections),) = value["nodes"].items()
    assert name == value["host"] and list(sections)[:3] == ["versions", "machine", "devices"]
    assert sections["versions"]["facts"]["packages"]["torch"] == requirements.version_of("torch")
    for body in sections.values():
        for line in body["lines"]:
            changing = ("free", "load", "available")  # what is from one moment to the next
            assert any(word in line for word in changing) or line in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks", "0"], "farspan: --ranks is 0: give a number from 1 up"),
        (["none.yaml"], "farspan: none.yaml is no file: give the path of a configuration, such as one in configs/"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err == f"{line}\n"
