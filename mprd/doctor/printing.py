"""The doctor's report on a console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mprd.doctor.checks import DatasetReport, Finding, describe_machine, gigabytes
from mprd.doctor.estimate import Cost
from mprd.doctor.plans import Plan
from mprd.storage.cache import cache_folder


def print_report(report: DatasetReport, console: Console) -> None:
    """Print layout, counts, findings in increasing severity, and the commands."""
    layout = report.layout
    if layout is not None:
        console.print(str(layout))
    if report.splits:
        console.print(split_table(report.splits))
    if report.sizes:
        low, mid, high = (report.sizes[part] for part in ("min", "median", "max"))
        console.print(f"pixels: {mid['width']} x {mid['height']} (width x height, median), width {low['width']} to "
                      f"{high['width']}, height {low['height']} to {high['height']}")  # fmt: skip
    for level in ("note", "warning", "problem"):
        for finding in report.findings:
            if finding.level == level:
                print_finding(finding, console)
    if report.plan is None:
        console.print("training would fail: see the problem above", style="bold")
        return
    print_plan(report.plan, console)
    console.print(f"packs of decoded images go to {cache_folder()}")
    for plan in report.others:
        print_alternative(plan, console)


def split_table(splits: dict[str, dict[str, int | None]]) -> Table:
    """Return a table of the counts, one row per split."""
    table = Table(box=None)
    table.add_column("")
    for name in ("images", "identities", "cameras"):
        table.add_column(name, justify="right")
    for name, counts in splits.items():
        table.add_row(name, *("?" if number is None else f"{number:,}" for number in counts.values()))
    return table


def print_finding(finding: Finding, console: Console) -> None:
    """Print a finding and the first of its files."""
    style = {"problem": "red", "warning": "yellow", "note": ""}[finding.level]
    console.print(f"{finding.level}: {finding.text}", style=style)
    for file in finding.files:
        console.print(f"    {file}")


def print_plan(plan: Plan, console: Console) -> None:
    """Print the proposed command and its estimate."""
    machine = describe_machine()
    console.print(f"\ntrain with ({plan.title}):\n")
    console.print(f"    {plan.command}\n")
    if plan.cost is not None:
        device = machine["gpu"] or f"{machine['cpus']} CPUs"
        console.print(f"{format_cost(plan.cost)}, on {device}")


def print_alternative(plan: Plan, console: Console) -> None:
    """Print an alternative command with its remark or estimate."""
    remark = plan.remark or ("" if plan.cost is None else format_cost(plan.cost))
    console.print(f"\nor with {plan.title}{remark and f' ({remark})'}:\n")
    console.print(f"    {plan.command}\n")


def format_cost(cost: Cost) -> str:
    """Return the estimate of a run in words."""
    return (
        f"estimate: {duration(cost.least_seconds)} to {duration(cost.likely_seconds)} (measured here: "
        f"{1 / cost.train_seconds:.3g} images a second trained, {1 / cost.extract_seconds:.3g} extracted), "
        f"{gigabytes(cost.memory_bytes)} of memory"
    )


def duration(seconds: float) -> str:
    """Format seconds as minutes, hours or days."""
    for size, name in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{max(1, round(seconds / 60))} min"
