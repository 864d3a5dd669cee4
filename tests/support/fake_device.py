"""A device that is not the CPU, whose tensors have no memory, and a watch over what a GPU would be
waited for, or fed from the host, for. It is not called "cuda", whose autograd wants a driver."""

import contextlib
import sys
import types

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tempnet_kernels.chunked import dro_contrastive as tiles
from tempnet_kernels.chunked import linear_dro_cross_entropy as chunked_linear
from tempnet_kernels.core import collectives, matmul, pairs, register

GPU = "gpu"
CHUNKED = {
    "linear_dro_cross_entropy_fwd": "linear_dro_cross_entropy",
    "dro_contrastive_stats_": "dro_contrastive",
    "dro_contrastive_grad": "dro_contrastive",
}
N, V, D, B = 64, 96, 24, 40
# Of two processes whose collectives do nothing.
GROUP = types.SimpleNamespace(rank=lambda: 1, size=lambda: 2)
RANKS = pairs.Ranks(GROUP, 1, (B, B), 2 * B)
aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """Notes what costs on a GPU and is no error there."""

    found, on = (), True

    @contextlib.contextmanager
    def off(self):
        """While a module is made, which happens once."""
        self.on = False
        yield
        self.on = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in given if x.dim()}
        if len(devices | {x.device.type for x in made}) > 1:
            self.note(f"{func}: two devices", given)
        elif func in (aten._to_copy.default, aten.copy_.default):
            if len({x.device.type for x in (*given, *made)}) > 1:
                self.note(f"{func}: a copy from or to the host", given)
        elif "cpu" in {x.device.type for x in made}:
            self.note(f"{func}: made on the CPU", made)
        indexed = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        if indexed and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.note(f"{func}: waits for the number of true values", given)
        if any(x.dtype == torch.float64 and x.numel() >= B * B for x in made):
            self.note(f"{func}: a matrix in float64", made)
        return out

    def note(self, text, tensors):
        if self.on:
            shapes = [(x.device.type, tuple(x.shape)) for x in tensors]
            self.found.append(f"{text} {shapes}")


WATCH = Watch()


def operator(name, backend):
    """The overload; its own code where that is Python, which the fakes leave out."""
    if backend == "reference":
        return register._lazy(name, f"reference.{register._modules[name]}")
    if name in CHUNKED:
        return register._lazy(name, f"chunked.{CHUNKED[name]}", backend)
    return getattr(getattr(torch.ops.tempnet, name), backend)


def add_product(out, a, b, fresh=False):
    """The fake of addmm with out_dtype is missing in torch 2.11."""
    assert a.dtype == b.dtype and (out.shape, out.dim()) == ((a.shape[0], b.shape[1]), 2)
    out.add_(1)


def pretend():
    """The tables and the checks that know "cuda" alone."""
    module = types.SimpleNamespace(
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        is_available=lambda: True, is_initialized=lambda: True, current_device=lambda: 0,
        device_count=lambda: 1,
    )  # fmt: skip
    backend_registration._setup_privateuseone_for_python_backend(GPU, backend_module=module)
    # torch.tensor(..., device=GPU) and module.to(GPU), which else want memory there.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    KEPT.append(library)
    register.missing = lambda *_: None
    register.operator = operator
    matmul.WIDE_PRODUCTS.add(GPU)
    for name, module in list(sys.modules.items()):
        if name.startswith("tempnet_kernels."):
            if hasattr(module, "_op"):
                module._op = operator
            if hasattr(module, "add_product"):
                module.add_product = add_product
            for table in vars(module).values():
                if isinstance(table, dict) and table.keys() == {"cpu", "cuda"}:
                    table[GPU] = table["cuda"]
            if hasattr(module, "several"):
                module.several = lambda _, group: group
    collectives.all_gather_into = collectives.reduce_scatter_into = lambda to, x, group: to.fill_(0)
    torch.distributed.all_reduce = lambda *_, **__: None
    # Several tiles, several blocks of the fold.
    tiles.TILE_ROWS[GPU], tiles.TILE_BYTES[GPU] = 16, 1
    chunked_linear.FOLD_BYTES[GPU] = 4 * 32 * 40


KEPT = []
