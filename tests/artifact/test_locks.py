"""One writer at a time, also where folders cannot be locked: on Windows and on some network file systems."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from exporter import artifact
from exporter.artifact import disk, lockfile
from exporter.artifact.sidecar import Preprocessing, Sidecar, Weights
from exporter.errors import Unavailable
from tests.artifact.test_artifact import rewrite
from tests.conftest import ROOT

PREAMBLE = "import sys\nsys.modules['fcntl'] = None\n"


@pytest.fixture
def written(tmp_path):
    """An artifact in a folder of its own; nobody looks into its file."""
    sidecar = Sidecar(
        backend="onnxruntime", precision="fp32", variant="custom", task="classify", inputs=(), outputs=(),
        weights=Weights(source="random:0", digest="0", layout="random", num_classes=10), preprocessing=Preprocessing(),
    )  # fmt: skip
    path = tmp_path / "written" / "custom_fp32.onnx"
    with artifact.staging(path) as folder:
        (folder / path.name).write_bytes(b"first")
        artifact.seal(folder, path.name, sidecar)
    return artifact.load(path)


def refusing(error):
    """`fcntl` on a file system that does not lock folders."""

    class Fcntl:
        LOCK_EX, LOCK_NB = 2, 4

        @staticmethod
        def flock(handle, kind):
            raise OSError(error, os.strerror(error))

    return Fcntl


@pytest.fixture(params=["no fcntl", errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def without_folder_locks(request, monkeypatch):
    monkeypatch.setattr(disk, "fcntl", None if request.param == "no fcntl" else refusing(request.param))


def started(script, *words):
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def of_a_dead_process():
    """The id that a process had which is no more."""
    script = "from exporter.artifact import lockfile; print(lockfile.own_id())"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def test_a_file_that_a_killed_process_did_not_finish_is_removed_by_the_next_writer(tmp_path):
    left = tmp_path / f".{of_a_dead_process()}.partial"
    of_a_live_process = tmp_path / f".{lockfile.own_id()}.partial"
    of_another_tool = tmp_path / ".download.partial"
    for path in (left, of_a_live_process, of_another_tool):
        path.write_text("half")
    disk.write_file(tmp_path / "a.json", b"whole")
    assert {*tmp_path.iterdir()} == {tmp_path / "a.json", of_a_live_process, of_another_tool}


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "latest.json").symlink_to(tmp_path / "of-today.json")
    disk.write_file(tmp_path / "latest.json", b"new")
    assert (tmp_path / "latest.json").is_symlink()
    assert (tmp_path / "of-today.json").read_bytes() == b"new"


HOLD = """
    import time
    from pathlib import Path
    from exporter.artifact import disk
    assert disk.fcntl is None
    release = disk.lock(Path(sys.argv[1]))
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
    release()
"""


def test_a_lock_file_lets_one_in_at_a_time_and_is_removed(without_folder_locks, tmp_path):
    release = disk.lock(tmp_path)
    with pytest.raises(BlockingIOError):
        disk.lock(tmp_path, wait=False)
    release()
    assert list(tmp_path.iterdir()) == []
    disk.lock(tmp_path, wait=False)()


def test_a_lock_file_of_another_process_is_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "fcntl", None)
    process = started(HOLD, tmp_path, 1)
    with pytest.raises(BlockingIOError):
        disk.lock(tmp_path, wait=False)
    begin = time.monotonic()
    disk.lock(tmp_path)()
    assert time.monotonic() - begin > 0.5
    assert process.wait() == 0
    process.stdout.close()


def test_a_lock_file_of_a_killed_process_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "fcntl", None)
    process = started(HOLD, tmp_path, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    disk.lock(tmp_path, wait=False)()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_is_held_for_too_long_ends_in_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "fcntl", None)
    monkeypatch.setattr(disk, "LOCK_WAIT_S", 0.2)
    release = disk.lock(tmp_path)
    with pytest.raises(Unavailable, match=r"is held by process \d+ of this machine and has been for 0.2 s; .* remove"):
        disk.lock(tmp_path)
    release()


def test_another_error_of_a_lock_is_no_silent_success(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "fcntl", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        disk.lock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_may_not_write_reads_without_a_lock(without_folder_locks, written, monkeypatch):
    def read_only(file, wait_s):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(disk.lockfile, "hold", read_only)
    assert artifact.load(written.path) == written


def test_an_artifact_is_written_and_nothing_else_is_left(without_folder_locks, written):
    rewrite(written, b"new")
    names = sorted(path.name for path in written.path.parent.iterdir())
    assert names == [written.path.name, f"{written.path.name}.json"]
    assert artifact.load(written.path).path.read_bytes() == b"new"


def test_staging_folders_of_the_dead_are_swept_and_those_of_the_living_are_not(without_folder_locks, written):
    folder, name = written.path.parent, written.path.name
    dead, alive = folder / f".{name}.dead.new", folder / f".{name}.alive.new"
    dead.mkdir()
    alive.mkdir()
    gone = of_a_dead_process()
    for orphan in (dead.with_suffix(".lock"), folder / f".{name}.moved.lock", folder / f".{name}.x.lock.{gone}.new"):
        orphan.write_text(gone)
    release = disk.lock(alive, file=alive.with_suffix(".lock"))
    rewrite(written, b"new")
    release()
    left = sorted(path.name for path in folder.iterdir() if path.suffix in (".new", ".lock"))
    assert left == [alive.name]


WRITE = """
    from pathlib import Path
    from exporter import artifact
    from exporter.artifact import disk
    assert disk.fcntl is None
    path = Path(sys.argv[1])
    old = artifact.load(path)
    print("ready", flush=True)
    for number in range(int(sys.argv[3])):
        with artifact.staging(path) as folder:
            (folder / path.name).write_bytes((sys.argv[2] + "ab"[number % 2]).encode() * 50_000)
            artifact.seal(folder, path.name, old.sidecar)
"""


def test_two_writers_and_a_reader_without_folder_locks(written, monkeypatch):
    monkeypatch.setattr(disk, "fcntl", None)
    rewrite(written, b"x" * 100_000)
    writers = [started(WRITE, written.path, letter, 60) for letter in "cd"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(artifact.load(written.path).path.read_bytes()[:1])  # load raises if it is torn
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {b"x", b"c", b"d"}
    assert len(list(written.path.parent.iterdir())) == 2
    for writer in writers:
        writer.stdout.close()


def test_killed_at_any_moment_without_folder_locks(written, monkeypatch):
    monkeypatch.setattr(disk, "fcntl", None)
    for moment in range(10):
        process = started(WRITE, written.path, "c", 10_000)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02 + moment * 0.0037)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        artifact.load(written.path)  # raises if it is torn
    rewrite(written, b"the last")
    assert len(list(written.path.parent.iterdir())) == 2, "something was left behind"


def test_a_lock_of_the_dead_goes_to_one_of_many(tmp_path, monkeypatch):
    """Each adds one to a number that only its lock protects."""
    script = """
        from pathlib import Path
        from exporter.artifact import lockfile
        file, number = Path(sys.argv[1]) / "lock", Path(sys.argv[1]) / "number"
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(100):
            release = lockfile.hold(file, 60)
            number.write_text(str(int(number.read_text()) + 1))
            file.write_text(sys.argv[2])  # as if it had died while it held the lock
    """
    dead = of_a_dead_process()
    (tmp_path / "lock").write_text(dead)
    (tmp_path / "number").write_text("0")
    script = PREAMBLE + textwrap.dedent(script)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    many = [subprocess.Popen([sys.executable, "-c", script, tmp_path, dead], **pipes) for _ in range(4)]
    assert {one.stdout.readline() for one in many} == {"ready\n"}
    for one in many:
        one.stdin.write("\n")
        one.stdin.flush()
    for one in many:
        one.communicate(timeout=60)
    assert (tmp_path / "number").read_text() == "400"


def test_a_taker_over_that_died_is_taken_over_from(tmp_path):
    dead, heir = of_a_dead_process(), of_a_dead_process()
    (tmp_path / "lock").write_text(dead)
    (tmp_path / f"lock.{dead}").write_text(heir)
    lockfile.hold(tmp_path / "lock", 0)()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_is_left_alone(tmp_path):
    (tmp_path / "lock").write_text("1-1-elsewher-0000")
    with pytest.raises(lockfile.Held, match="is held by a process of another machine"):
        lockfile.hold(tmp_path / "lock", 0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_who_waits_for_another_process_says_so(tmp_path, monkeypatch):
    notes = []

    def heard(text):
        notes.append(text)
        release()  # the other process is done

    monkeypatch.setattr(disk, "note", heard)
    release = disk.lock(tmp_path)
    with disk.locked(tmp_path, "another search runs here"):
        pass
    with disk.locked(tmp_path, "nobody is waited for"):
        pass
    assert notes == ["another search runs here"]
