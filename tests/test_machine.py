"""The machine, as it is told beside a number."""

import subprocess
import sys
import time

import pytest

from exporter import machine


def spin(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_another_process_is_seen_and_ones_own_is_not(monkeypatch):
    """By counters that the kernel would give: of 4 s, 1 was ours, 2 were others', 0.2 stolen."""
    given = iter(
        [
            {"total": 100.0, "busy": 50.0, "steal": 1.0, "own": 10.0},
            {"total": 104.0, "busy": 53.0, "steal": 1.2, "own": 11.0},
        ]
    )
    monkeypatch.setattr(machine, "_counters", lambda: next(given))
    found = machine.Watch().conditions()
    assert found.others_pct == 50
    assert found.steal_pct == 5


def test_a_busy_neighbour_is_noticed():
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        watch = machine.Watch()
        spin(1.0)
        found = watch.conditions()
    finally:
        neighbour.kill()
        neighbour.wait()
    assert found.others_pct > 15 / machine.cores()
    assert found.others_pct <= 100
    assert 0 <= found.steal_pct <= 100


def test_the_environment_is_plain_data():
    import msgspec

    facts = machine.environment()
    assert msgspec.json.decode(msgspec.json.encode(facts)) == facts
    assert facts["cores"] >= 1


def test_a_gpu_is_asked_once_or_not_there(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.gpu() is None
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    asked = []

    def run(words, **told):
        asked.append(words)
        line = "NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 1980 MHz, 31, 78.1 W\n"
        return subprocess.CompletedProcess(words, int(words[-1].startswith(("MIG-", "GPU-8"))), line)

    monkeypatch.setattr("subprocess.run", run)
    found = machine.gpu()
    assert len(asked) == 1
    assert found["name"] == "NVIDIA H200"
    assert found["clocks.sm"] == "1980 MHz"
    assert found["temperature.gpu"] == "31"
    for visible, number in (("1,0", "1"), ("GPU-7a3b", "GPU-7a3b"), ("GPU-8a3b", "0"), ("MIG-8a3b", "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.gpu() == found
        assert asked[-1][-2:] == ["-i", number]
    for visible in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.gpu() is None


def test_a_gpu_whose_driver_hangs_is_none(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def run(words, timeout, **_):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("subprocess.run", run)
    assert machine.gpu() is None


def test_peak_memory_grows_with_what_is_taken():
    code = "from exporter import machine; before = machine.peak_memory_bytes(); held = b'x' * 200_000_000; "
    code += "print(before, machine.peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 150e6 < after - before < 300e6


V1 = {"quota": "200000", "period": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/box\n", {"box/cpu.max": "200000 100000"}, 2),
        ("0::/box\n", {"box/cpu.max": "150000 100000"}, 2),
        ("0::/box\n", {"box/cpu.max": "10000 100000"}, 1),
        ("0::/box/app\n", {"box/cpu.max": "300000 100000", "box/app/cpu.max": "max 100000"}, 3),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/not/mounted\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/box\n", {"box/cpu.max": "max 100000"}, 8),
        ("0::/box\n", {"box/cpu.max": "nonsense"}, 8),
        ("0::/box\n", {}, 8),
        ("4:cpu,cpuacct:/b\n", {f"cpu,cpuacct/b/cpu.cfs_{what}_us": us for what, us in V1.items()}, 2),
        ("4:cpuset:/\n3:cpu:/b\n", {f"cpu/cpu.cfs_{what}_us": us for what, us in V1.items()}, 2),
        ("3:cpu:/\n", {f"cpu/cpu.cfs_{what}_us": us for what, us in {**V1, "quota": "-1"}.items()}, 8),
    ],
)  # fmt: skip
def test_a_containers_quota_of_the_cpu_is_honoured(groups, files, cores, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.cores() == cores


def test_two_threads_of_one_core_count_once_by_default(tmp_path, monkeypatch):
    for number in range(8):  # numbered as Linux does: 0 and 4 are the threads of the first core
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    monkeypatch.setattr(machine, "PROCESSORS", tmp_path)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    for affinity, expected in ((range(8), 4), ((0, 1), 2), ((0, 4), 1), ((0, 1, 4), 2)):
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid, threads=affinity: set(threads), raising=False)
        assert machine.default_threads() == expected


@pytest.mark.parametrize(("part", "name"), [("0xd40", "ARM 0x41 0xd40"), ("0xd4f", "ARM 0x41 0xd4f")])
def test_processors_of_arm_are_told_apart(part, name, tmp_path, monkeypatch):
    """Linux gives no model name for them: Graviton 3 and 4 have the parts 0xd40 and 0xd4f."""
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: {part}\n")
    monkeypatch.setattr(machine, "Path", lambda _: file)
    machine.cpu.cache_clear()
    try:
        assert machine.cpu() == (name, ["i8mm", "asimddp", "asimd"])
    finally:
        machine.cpu.cache_clear()
