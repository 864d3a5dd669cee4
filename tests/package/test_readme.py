"""The README's Python runs as written, and the command line works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_examples_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["tau_image"].grad.isfinite().all()
    tau, stats = namespace["tau"], namespace["token_stats"]
    expected = (5.0 - stats.kl[[0, 1, 3]]) / 3
    assert tau.grad[[0, 1, 3]].sub(expected).abs().max() < 1e-6 and tau.grad[2] == 0


def test_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


def test_links_of_the_readme_exist():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("arguments, words", [(["env"], "dro_cross_entropy"), ([], "Usage")])
def test_command_line(arguments, words):
    result = subprocess.run(
        [sys.executable, "-m", "tempnet_kernels", *arguments], capture_output=True, text=True
    )
    assert words in result.stdout
    if arguments == ["env"]:
        assert result.returncode == 0
        words = ("torch", "triton", "SIMD", "native", "dro_contrastive")
        assert all(word in result.stdout for word in words)
