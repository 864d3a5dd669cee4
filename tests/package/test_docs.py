"""The pages of docs/integrations and the scripts of examples/integrations run as written."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/integrations").glob("*.md"))
SCRIPTS = sorted((ROOT / "examples/integrations").glob("*.py"))


def name_of(path):
    return path.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_runs_as_written(page, tmp_path, monkeypatch):
    """Blocks in order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "docs").glob("*.md")], ids=name_of)
def test_links_exist(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_example_runs_and_is_short(script, tmp_path, monkeypatch):
    assert len(script.read_text().splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
