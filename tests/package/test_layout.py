"""Where code of which kind is, and which way imports run."""

import ast
from pathlib import Path

import tempnet_kernels

PACKAGE = Path(tempnet_kernels.__file__).parent
# A folder imports from those on floors below its own, and from itself.
FLOORS = [{"core"}, {"reference", "triton"}, {"chunked"}, {"ops"}, {"nn"}, {"integrations", "cli"}]
FLOOR = {folder: i for i, floor in enumerate(FLOORS) for folder in floor}
TOP = len(FLOORS)  # of the package's __init__ and __main__


def folder_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported(path):
    """The folders of this package that a file imports from, at any depth of its code; "" for the
    package itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "tempnet_kernels":
                folder = rest.partition(".")[0]
                yield folder if folder in FLOOR else ""


def test_no_import_runs_back_up():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        own = folder_of(path)
        seen.add(own)
        for folder in imported(path):
            # The command line and the frameworks use the package as anyone does.
            below = FLOOR.get(folder, TOP - 1) < FLOOR.get(own, TOP)
            public = folder == "" and FLOOR.get(own, TOP) >= TOP - 1
            assert folder == own or below or public, f"{path}: imports from {folder or 'the root'}"
    assert seen == {"", *FLOOR}


def test_the_root_holds_folders():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".so"}
    assert files == {"__init__.py", "__main__.py", "py.typed"}


def test_no_file_holds_two_things():
    """One over 500 lines is to be split along what it does."""
    for path in PACKAGE.rglob("*.py"):
        assert path.read_text().count("\n") <= 430, path
