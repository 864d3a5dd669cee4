"""What scripts/gpu_check.py found, for machines and for people."""

import json
import os
from collections import Counter

# From good to bad. "unable": this device cannot, and the reason is said. "stopped": the step's time
# was over.
STATUSES = ("ok", "unable", "stopped", "wrong", "exception", "hangs", "crashed")
SHOWN = 8  # lines about what went wrong in a step
MAIN = 9  # columns of a table that fit beside each other


def write_summary(summary, out):
    """In ``out`` summary.json, summary.md, which is a screen, and tables.md; each whole at any
    moment."""
    _replace(out / "summary.json", json.dumps(_short(summary), indent=1) + "\n")
    _replace(out / "summary.md", markdown(summary))
    _replace(out / "tables.md", "\n".join([_environment(summary), *_tables(summary)]) + "\n")


def _replace(path, text):
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _short(summary):
    """Of tests and smoke cases that passed, the number only."""
    steps = []
    for step in summary["steps"]:
        kept = [c for c in step["cases"] if c["status"] != "ok" or set(c) - _PLAIN]
        counts = Counter(c["status"] for c in step["cases"])
        steps.append({**step, "counts": dict(counts), "cases": kept})
    return {**summary, "steps": steps}


_PLAIN = {"case", "status", "seconds"}


def _environment(summary):
    facts = ", ".join(f"{k} {v}" for k, v in summary["environment"].items())
    return f"{facts}; {summary['date']}"


def markdown(summary):
    minutes = summary.get("seconds", 0) / 60
    lines = [
        f"{_environment(summary)}; {minutes:.1f} of {summary['minutes']} minutes",
        "",
        "| step | seconds | cases |",
        "| --- | ---: | --- |",
    ]
    for step in summary["steps"]:
        counts = Counter(case["status"] for case in step["cases"])
        said = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
        lines.append(f"| {step['name']} | {step['seconds']} | {said or 'no time was left'} |")
    for step in summary["steps"]:
        lines += _bad_cases(step)
    for step in summary["steps"]:
        lines += _rows(step["name"], _of_cases(step), MAIN) + _best(step)
    lines += ["", "All tables: tables.md; all numbers: summary.json; what was printed: log.txt."]
    return "\n".join(lines) + "\n"


def _bad_cases(step):
    """Those that say the same in one line."""
    alike = {}
    for case in step["cases"]:
        if case["status"] != "ok":
            alike.setdefault((case["status"], case.get("error", "")), []).append(case["case"])
    lines = []
    for (status, error), names in sorted(alike.items(), key=lambda x: -STATUSES.index(x[0][0])):
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        lines.append(f"- {step['name']}, {names[0]}{others}: {status}: {error}")
    shown = lines[:SHOWN]
    if lines[SHOWN:]:
        shown.append(f"- and {len(lines) - SHOWN} more in summary.json")
    return ["", *shown] if shown else []


def _of_cases(step):
    """{case: what it says}; two jobs may say of one case."""
    rows = {}
    for case in step["cases"]:
        rows.setdefault(case["case"], {}).update(case.get("row", {}))
    return {name: row for name, row in rows.items() if row}


def _best(step):
    """Of what was tried in several ways, the best way and how far the default is from it."""
    lines = []
    for case in step["cases"]:
        tried = {name: row for name, row in case.get("rows", {}).items() if "x best" in row}
        if tried:
            best = next(iter(tried))
            default = next((n for n in tried if n.endswith("(default)")), None)
            far = "" if default in (None, best) else f"; default {tried[default]['x best']:.2f} x"
            lines.append(f"- {case['case']}: {best}, {tried[best]['ms']:.4g} ms{far}")
    return ["", *lines] if lines else []


def _tables(summary):
    """What the cases say in a row, and what some of them say in several."""
    lines = []
    for step in summary["steps"]:
        lines += _rows(step["name"], _of_cases(step))
        for case in step["cases"]:
            lines += _rows(case["case"], case.get("rows", {}))
    return lines


def _rows(title, rows, most=None):
    """A table; with ``most`` of the first so many columns."""
    if not rows:
        return []
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = [c for c in columns if any(row.get(c) is not None for row in rows.values())][:most]
    lines = ["", f"| {title} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(row.get(c)) for c in columns)} |")
    return lines


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
