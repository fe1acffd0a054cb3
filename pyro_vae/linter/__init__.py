"""What is wrong with a pair, site by site, before it is trained."""

from pyro_vae.linter.checks import check
from pyro_vae.linter.report import Finding, Report

__all__ = ["Finding", "Report", "check"]
