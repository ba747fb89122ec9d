"""What a plan is made of, read from the builder's own list of its kernels: no GPU is needed to see it.

The list is a log message of the builder (`Layers:`), not an interface: what cannot be read is left out, and a plan
without a list is a plan without this report.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.backends import Layer
from exporter.errors import some
from exporter.model.structure import block, kind, module_of, part
from exporter.report import Finding

if TYPE_CHECKING:
    import onnx_ir as ir

SUFFIX = ".kernels.json"
TYPES = {"Half": "fp16", "Float": "fp32", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8", "UInt8": "uint8"}
PRODUCTS = ("gemm", "correlation", "runtime_fusion")
_MOVES = {"Cast", "Transpose", "Reshape", "Flatten", "Concat", "Identity"}
_ROUNDS = {"QuantizeLinear", "DequantizeLinear"}


class Kernel(Record, frozen=True):
    """One kernel: its kind (`gemm`, `correlation` for convolutions, `kgen` for what was generated and fused), the
    ONNX nodes in it, the element types that it reads and writes, and its multiply-accumulates for one image."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    macs: int = 0

    @property
    def operators(self) -> set[str]:
        """The ONNX operators in it."""
        return {re.split(r"[/_]", node.partition("/")[2])[0] for node in self.nodes}

    @property
    def module(self) -> str:
        """The ConvNeXt module that it computes. A generated kernel that reaches over several, or holds what is behind
        a product, is its block's: only the product itself counts as that layer."""
        products = [node for node in self.nodes if re.search(r"/(MatMul|Gemm|Conv)\b", node)]
        first = next(iter([*products, *self.nodes]), "")
        module = module_of(first) or first.partition("/")[0]
        return module if self.kind in PRODUCTS or kind(module) is None else part(module)

    @property
    def precision(self) -> str:
        """What it computes in: what a product reads, and what anything else writes."""
        types = self.reads if self.kind in PRODUCTS else self.writes
        return types[0] if types else ""

    @property
    def only_moves(self) -> bool:
        """Whether it computes nothing: it changes layout or element type."""
        return self.kind == "kgen" and bool(self.nodes) and self.operators <= _MOVES

    @property
    def only_rounds(self) -> bool:
        """Whether it is there for Q or DQ alone, which nothing took in."""
        return self.kind == "kgen" and bool(self.operators & _ROUNDS) and self.operators <= _MOVES | _ROUNDS


def parse(listing: str, profiles: int = 1, macs: Mapping[str, int] = {}) -> tuple[Kernel, ...]:
    """The kernels of the builder's list, of the first of its optimisation profiles, with the multiply-accumulates of
    the ONNX nodes in them."""
    kernels = []
    for line in listing.splitlines():
        found = re.match(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)", line)
        if found is None or found["kind"] == "shape_call":
            continue
        reads, writes, nodes = _fields(found["rest"])
        work = sum(macs.get(node, 0) for node in nodes) if found["kind"] in PRODUCTS else 0
        kernels.append(
            Kernel(name=found["name"], kind=found["kind"], nodes=nodes, reads=reads, writes=writes, macs=work)
        )
    return tuple(kernels[: len(kernels) // profiles])


def macs_of(model: ir.Model) -> dict[str, int]:
    """The multiply-accumulates of each product of a graph for one image, where its shapes are known: of every output
    element as many as its channel has weights."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "MatMul", "Gemm") else None
        output = node.outputs[0].shape
        if weight is None or weight.shape is None or output is None:
            continue
        sides, taps = ([side for side in shape if isinstance(side, int)] for shape in (output.dims[1:], weight.shape))
        if (len(sides), len(taps)) == (len(output) - 1, len(weight.shape)):
            channels = sides[0] if node.op_type == "Conv" else sides[-1]
            found[node.name or ""] = math.prod(sides) * math.prod(taps) // channels
    return found


def _fields(rest: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    given, _, others = rest.partition("Constants: ")
    _, _, others = others.partition("Outputs: ")
    written, _, told = others.partition("TacticName: ")
    return _types(given), _types(written), tuple(re.findall(r"\[ONNX Layer: (.*?)\]", told))


def _types(text: str) -> tuple[str, ...]:
    return tuple(TYPES.get(name, name.lower()) for name in re.findall(r"Datatype: (\w+)", text))


def encode(kernels: Sequence[Kernel]) -> bytes:
    """As the file beside a plan."""
    return msgspec.json.format(msgspec.json.encode(kernels), indent=1) + b"\n"


def read(artifact: Artifact) -> tuple[Kernel, ...]:
    """The kernels of a built plan; none when its builder listed none."""
    path = artifact.path.with_name(artifact.path.name + SUFFIX)
    if path.name not in {file.name for file in artifact.sidecar.files}:
        return ()
    return msgspec.json.decode(Path(path).read_bytes(), type=tuple[Kernel, ...])


def layers(kernels: Sequence[Kernel]) -> list[Layer]:
    """The kernels as layers, for `inspect` and the checks."""
    return [
        Layer(name=kernel.name, module=kernel.module, operator=kernel.kind, precision=kernel.precision)
        for kernel in kernels
    ]


def findings(kernels: Sequence[Kernel], asked: str, baseline: Sequence[Kernel] = (), above: str = "") -> list[Finding]:
    """What the list says: kernels by kind and type, the pointwise layers' precision, the residual stream's, kernels
    that compute nothing, and the difference from the plan of the next higher precision."""
    if not kernels:
        return [Finding(check="plan", metric="kernels", value=None, detail="this builder lists no kernels")]
    counts = Counter(f"{kernel.kind} {kernel.precision}" for kernel in kernels)
    said = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    found = [Finding(check="plan", metric="kernels", value=len(kernels), detail=said)]
    if baseline:
        detail = f"{len(kernels)} kernels, {len(baseline)} in {above}{_where_more(kernels, baseline)}"
        found.append(Finding(check="plan", metric="extra_kernels", value=len(kernels) - len(baseline), detail=detail))
    found += _shares(kernels, asked)
    products = [kernel for kernel in kernels if kind(kernel.module) in ("pwconv1", "pwconv2")]
    products = [kernel for kernel in products if kernel.kind in PRODUCTS]
    types = Counter(kernel.precision for kernel in products)
    said = ", ".join(f"{count} of {len(products)} in {name}" for name, count in types.most_common())
    found.append(Finding(check="plan", metric="pointwise", value=len(products), unit="products", detail=said))
    stream = Counter(kernel.precision for kernel in _ends_of_blocks(kernels))
    said = ", ".join(f"{name} after {count} blocks" for name, count in stream.most_common()) or "not seen"
    found.append(Finding(check="plan", metric="residual", value=sum(stream.values()), unit="blocks", detail=said))
    for metric, idle in (
        ("reformats", [kernel for kernel in kernels if kernel.only_moves]),
        ("requantises", [kernel for kernel in kernels if kernel.only_rounds]),
    ):
        where = some(dict.fromkeys(kernel.module for kernel in idle)) if idle else "none"
        found.append(Finding(check="plan", metric=metric, value=len(idle), unit="kernels", detail=where))
    return found


def _where_more(kernels: Sequence[Kernel], baseline: Sequence[Kernel]) -> str:
    """The modules that a plan of more kernels has more of them in."""
    if len(kernels) <= len(baseline):
        return ""
    ours, theirs = (Counter(kernel.module for kernel in one) for one in (kernels, baseline))
    return f": {some(f'{name} {count:+}' for name, count in (ours - theirs).most_common())}"


def _shares(kernels: Sequence[Kernel], asked: str) -> list[Finding]:
    """The share of the multiply-accumulates that the plan computes in the precision that was asked for."""
    total = sum(kernel.macs for kernel in kernels)
    if not total:
        return []
    shares: Counter[str] = Counter()
    for kernel in kernels:
        shares[kernel.precision] += kernel.macs
    said = ", ".join(f"{100 * count / total:.1f} % in {name}" for name, count in shares.most_common() if count)
    value = 100 * shares[asked] / total
    return [Finding(check="plan", metric="macs_pct", value=value, unit="%", detail=said)]


def _ends_of_blocks(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The last kernel of every block, which writes the residual stream; not one that goes on into the next module, as
    that of the last block does into the pooling, and that of a stage may into the norm behind it."""
    last: dict[str, Kernel] = {}
    for kernel in kernels:
        for node in kernel.nodes:
            if name := block(node):
                last[name] = kernel
    return [kernel for name, kernel in last.items() if all(block(node) == name for node in kernel.nodes)]
