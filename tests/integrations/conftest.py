"""What the tests of several frameworks use."""

import pytest
from open_clip_by_hand import open_clip_by_hand
from processes import Processes


@pytest.fixture(scope="module")
def open_clip():
    with open_clip_by_hand() as package:
        yield package


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Two gloo processes, for frameworks that take all that there are."""
    pool = Processes(2, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.stop()
