#!/usr/bin/env bash
# Makes a folder with Python, NumPy and ONNX Runtime for Arm, which qemu-aarch64 runs: tests/quantize/aarch64.sh FOLDER
# Needs apt-get of Debian 12 and a Python with pip (by default python3); nothing is installed outside the folder.
set -euo pipefail
folder=$(realpath -m "$1")
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
rm -rf "$folder"/{debs,root,wheels,site}
mkdir -p "$folder"/{lists/partial,cache/archives/partial,debs,root,wheels,site}
touch "$folder/status"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder" -o Dir::State::lists="$folder/lists"
  -o Dir::State::status="$folder/status" -o Dir::Cache="$folder/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$folder/debs" && "${apt[@]}" download libc6 libgcc-s1 libstdc++6 libexpat1 zlib1g libssl3 liblzma5 libbz2-1.0 \
  libffi8 libsqlite3-0 libuuid1 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal)
for package in "$folder"/debs/*.deb; do dpkg-deb --extract "$package" "$folder/root"; done
# ONNX Runtime reads the kind of the CPU here, and ends with a segmentation fault when it finds that of an x86.
mkdir -p "$folder/root/proc"
for core in 0 1; do
  printf 'processor\t: %s\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n' "$core"
  printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
done >"$folder/root/proc/cpuinfo"
"$python" -m pip download --quiet --no-deps --only-binary :all: --python-version 311 --implementation cp \
  --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
  --constraint "$here/constraints.txt" --dest "$folder/wheels" onnxruntime numpy flatbuffers protobuf packaging
for wheel in "$folder"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$folder/site"; done
