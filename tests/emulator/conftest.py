"""The emulator, and a way to let an op run in it."""

import emulated
import pytest


@pytest.fixture(scope="module")
def module():
    return emulated.load()


@pytest.fixture
def use(module, request, monkeypatch):
    """Make the functions of the test file's ``OP`` run the emulated kernels, with a launch plan of
    the test's."""

    def install(order="forward", **plan):
        module.set_order(order, 1)
        return emulated.install(request, monkeypatch, request.module.OP, **plan)

    yield install
    module.set_order("forward", 0)
