"""`doctor`: is this machine, this home and this daemon in order, and what does it cost when not?"""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.text import Text

from agentmem.cli.checkup import Check, check_all
from agentmem.cli.exits import Exit
from agentmem.cli.output import console, json_option, print_json
from agentmem.home import Home, default_home

_MARKS = {"ok": ("✓", "green"), "note": ("·", "dim"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check the home folder, the disk, the BLAS library and the daemon. Works without a daemon.

    Exit code 7 when there are warnings, 6 when the integrity of the memory is in question.
    """
    checks = check_all(Home(default_home()))
    warnings = sum(check.status == "warning" for check in checks)
    problems = sum(check.status == "problem" for check in checks)
    if as_json:
        print_json(
            {"checks": [asdict(check) for check in checks], "warnings": warnings, "problems": problems}
        )
    else:
        for check in checks:
            _print(check)
    ctx.exit(Exit.INTEGRITY if problems else Exit.WARNINGS if warnings else Exit.OK)


def _print(check: Check) -> None:
    mark, style = _MARKS[check.status]
    out = console()
    out.print(Text(f"{mark} ", style) + Text(f"{check.name}: ", "bold") + Text(check.message), soft_wrap=True)
    if check.hint:
        out.print(Text(f"  {check.hint}"), soft_wrap=True)
