"""What the linter says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyro_vae.objectives.plan import Problem

__all__ = ["Finding", "Report", "SEVERITIES"]

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that was found, and its cure.

    Attributes:
        severity: ``"error"`` gives wrong numbers or fails, ``"warning"`` probably does, ``"note"``
            is good to know.
        site: the sample site, or None if it concerns the pair as a whole.
    """

    severity: Severity
    site: str | None
    found: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity}: {Problem(self.site, self.found, self.cure)}"


@dataclass(frozen=True)
class Report:
    """Findings, errors first."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return not any(finding.severity == "error" for finding in self.findings)

    def raise_if_errors(self) -> None:
        """Raise what is wrong.

        Raises:
            ValueError: the errors, one per line.
        """
        if not self.ok:
            errors = [str(f) for f in self.findings if f.severity == "error"]
            raise ValueError("\n".join(errors))

    def __str__(self) -> str:
        """One line per finding."""
        return "\n".join(map(str, self.findings)) or "no findings"
