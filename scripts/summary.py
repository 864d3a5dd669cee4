"""What scripts/gpu_check.py found, for machines and for people."""

import json
import os
from collections import Counter

# From good to bad. "unable": this device cannot, and the reason is said. "stopped": the step's time
# was over.
STATUSES = ("ok", "unable", "stopped", "wrong", "exception", "hangs", "crashed")
SHOWN = 12  # cases of a step that went wrong, and rows of its table


def write_summary(summary, out):
    """out/summary.json and out/summary.md, each whole at any moment."""
    _replace(out / "summary.json", json.dumps(_short(summary), indent=1) + "\n")
    _replace(out / "summary.md", markdown(summary))


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


def markdown(summary):
    facts = ", ".join(f"{k} {v}" for k, v in summary["environment"].items())
    lines = [
        f"# {summary['environment'].get('device')}",
        "",
        f"{facts}; {summary['date']}; {summary.get('seconds', 0) / 60:.1f} of {summary['minutes']} "
        "minutes",
        "",
        "| step | seconds | cases |",
        "| --- | ---: | --- |",
    ]
    for step in summary["steps"]:
        counts = Counter(case["status"] for case in step["cases"])
        said = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
        lines.append(f"| {step['name']} | {step['seconds']} | {said or 'no time was left'} |")
    for step in summary["steps"]:
        lines += _bad_cases(step) + _table(step)
    return "\n".join(lines) + "\n"


def _bad_cases(step):
    bad = [c for c in step["cases"] if c["status"] != "ok"]
    bad.sort(key=lambda c: -STATUSES.index(c["status"]))
    if not bad:
        return []
    lines = ["", f"**{step['name']}**: not ok", ""]
    lines += [f"- {c['case']}: {c['status']}, {c.get('error', '')}" for c in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"- and {len(bad) - SHOWN} more in summary.json")
    return lines


def _table(step):
    """What the cases say in a row, and what some of them say in several."""
    tables = [(step["name"], {c["case"]: c["row"] for c in step["cases"] if "row" in c})]
    tables += [(c["case"], c["rows"]) for c in step["cases"] if "rows" in c]
    return [line for title, rows in tables if rows for line in _rows(title, rows)]


def _rows(title, rows):
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = [c for c in columns if any(row.get(c) is not None for row in rows.values())]
    lines = ["", f"| {title} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, row in list(rows.items())[:SHOWN]:
        lines.append(f"| {name} | {' | '.join(_cell(row.get(c)) for c in columns)} |")
    return lines


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
