"""Whether a machine or a cluster is ready for a run: what one process can see, and what takes all ranks."""

from dsmoelora.doctor.local import Finding, local_findings
from dsmoelora.doctor.shared import shared_findings

__all__ = ["Finding", "local_findings", "shared_findings"]
