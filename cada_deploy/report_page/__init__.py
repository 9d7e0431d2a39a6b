"""The parts of report.html: what it tells, what stands out in it, and its HTML."""
