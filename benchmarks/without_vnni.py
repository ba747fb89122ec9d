"""Run a command as on a CPU with AVX2 and no VNNI: `python -m benchmarks.without_vnni COMMAND…`.

AVX-512, VNNI and AMX are hidden from the command and all that it starts, from the CPUID instruction (`without_vnni.c`)
and from /proc/cpuinfo. Libraries that read either choose kernels for AVX2, which run at native speed; caches and
clocks stay those of this CPU. It needs Linux on x86-64 with `cpuid_fault`, root, and a C compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
CPUINFO = Path("/proc/cpuinfo")
HIDDEN = re.compile(r" (avx512\w*|avx_vnni\w*|amx_\w+)")
IN_A_NAMESPACE = 'mount --bind "$1" /proc/cpuinfo; export LD_PRELOAD="$2"; shift 2; exec "$@"'


def missing() -> str:
    """Why this machine cannot run a command so; "" if it can."""
    if SOURCE.stem in os.environ.get("LD_PRELOAD", ""):
        return "VNNI is hidden already"
    if not CPUINFO.exists() or "cpuid_fault" not in CPUINFO.read_text():
        return "this CPU or kernel cannot make CPUID fault (no cpuid_fault in /proc/cpuinfo)"
    lacking = [tool for tool in ("cc", "unshare", "mount") if not shutil.which(tool)]
    if lacking:
        return f"{lacking[0]} is not installed"
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    return f"cannot create a mount namespace (root is required): {tried.stderr.strip()}" if tried.returncode else ""


def main() -> None:
    """Run the command, and end with its exit code (128 + N where signal N ended it)."""
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    if why := missing():
        sys.exit(f"error: {why}")
    with tempfile.TemporaryDirectory() as temporary:
        cpuinfo, library = Path(temporary) / "cpuinfo", Path(temporary) / "without_vnni.so"
        cpuinfo.write_text(HIDDEN.sub("", CPUINFO.read_text()))
        # initfirst: its constructor runs before those of all other libraries.
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-Wl,-z,initfirst", "-o", library, SOURCE, "-ldl"], check=True)
        command = ["unshare", "-m", "sh", "-ec", IN_A_NAMESPACE, "sh", str(cpuinfo), str(library), *sys.argv[1:]]
        with subprocess.Popen(command) as child:
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
