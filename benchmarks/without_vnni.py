"""Run a command as on a CPU with AVX2 and no VNNI: `python -m benchmarks.without_vnni COMMAND…`.

AVX-512, VNNI and AMX are hidden from the command and all that it starts, from the CPUID instruction (`without_vnni.c`)
and from /proc/cpuinfo. Kernels that are chosen by either run natively, so accuracy and speed can be measured; caches
and clocks stay those of this CPU. It needs Linux on x86-64 with `cpuid_fault`, root, and a C compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
CPUINFO = Path("/proc/cpuinfo")
HIDDEN = re.compile(r" (avx512\w*|avx_vnni\w*|amx_\w+)")
IN_A_NAMESPACE = 'mount --bind "$1" /proc/cpuinfo; export LD_PRELOAD="$2"; shift 2; exec "$@"'


def missing() -> str:
    """What this machine lacks for it, or ""."""
    if "cpuid_fault" not in CPUINFO.read_text():
        return "this CPU or kernel cannot make CPUID fault (no cpuid_fault in /proc/cpuinfo)"
    if os.geteuid() != 0:
        return "only root can mount another /proc/cpuinfo"
    return "" if shutil.which("cc") else "there is no C compiler (cc)"


def main() -> None:
    """Run the command, and end with its exit code."""
    if why := missing():
        sys.exit(f"error: {why}")
    with tempfile.TemporaryDirectory() as temporary:
        cpuinfo, library = Path(temporary) / "cpuinfo", Path(temporary) / "without_vnni.so"
        cpuinfo.write_text(HIDDEN.sub("", CPUINFO.read_text()))
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        command = ["unshare", "-m", "sh", "-ec", IN_A_NAMESPACE, "sh", str(cpuinfo), str(library), *sys.argv[1:]]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
