"""The machine, as it is told beside a number."""

import subprocess
import sys
import time

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
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.gpu() is None
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    asked = []

    def run(words, **told):
        asked.append(words)
        line = "NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 1980 MHz, 31, 78.1 W\n"
        return subprocess.CompletedProcess(words, 0, line)

    monkeypatch.setattr("subprocess.run", run)
    found = machine.gpu()
    assert len(asked) == 1
    assert found["name"] == "NVIDIA H200"
    assert found["clocks.sm"] == "1980 MHz"
    assert found["temperature.gpu"] == "31"


def test_peak_memory_grows_with_what_is_taken():
    code = "from exporter import machine; before = machine.peak_memory_bytes(); held = b'x' * 200_000_000; "
    code += "print(before, machine.peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 150e6 < after - before < 300e6
