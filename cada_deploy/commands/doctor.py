"""`cada-deploy doctor`: what this machine can run, and what to install for the rest."""

from __future__ import annotations

import click

from cada_deploy.doctor import examine


@click.command(name="doctor")
def command() -> int:
    """Show the processor, the kernels, the engines and packages, and what is missing.

    Exits 3 when the main job (pseudo-label --engine ort on the CPU) cannot run here.

    \b
    Example:
      cada-deploy doctor
    """
    findings = examine()
    width = max(len(f.what) for f in findings)
    for finding in findings:
        mark = "ok  " if finding.ok else "MISS" if finding.needed else "-   "
        click.echo(f"{mark} {finding.what:<{width}}  {finding.found}")
        if finding.remedy:
            click.echo(f"     {'':<{width}}  -> {finding.remedy}")
    return 3 if any(f.needed and not f.ok for f in findings) else 0
