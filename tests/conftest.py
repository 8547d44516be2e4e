"Say plainly, at the end, what was not run and why."

from collections import Counter


def pytest_terminal_summary(terminalreporter, config):
    why = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        why[
            str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix(
                "Skipped: "
            )
        ] += 1
    left = len(terminalreporter.stats.get("deselected", []))
    if why or left:
        terminalreporter.section("not run")
    for reason, n in why.most_common():
        terminalreporter.write_line(f"{n} test(s): {reason}")
    if left:
        terminalreporter.write_line(f"{left} test(s) deselected by -m {config.option.markexpr!r} or by name")
