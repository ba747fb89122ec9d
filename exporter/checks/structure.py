"""Structure: how large the artifact is."""

from __future__ import annotations

from exporter.checks import Check, Options, Seen, Subject
from exporter.report import Finding


class Structure:
    """Looks at the artifact, not at what it gives."""

    def __init__(self, options: Options, subject: Subject) -> None:
        del options
        self.subject = subject

    def see(self, seen: Seen) -> None:
        """Take no notice of images."""

    def findings(self) -> list[Finding]:
        """Nodes and bytes."""
        sidecar = self.subject.artifact.sidecar
        files = ", ".join(file.name for file in sidecar.files)
        return [
            Finding(check="structure", metric="nodes", value=len(self.subject.layers)),
            Finding(check="structure", metric="bytes", value=sidecar.bytes, unit="bytes", detail=files),
        ]


CHECK = Check(Structure)
