"""What a call launches: on a GPU its kernels and copies; on a CPU the operators that do something
and call no other that does, each of which is a launch on a GPU."""

import functools
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile


def launches(function):
    """{name: how often} of one call, after two others that compile and allocate."""
    function()
    function()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        on_device = torch.autograd.DeviceType.CUDA
        return Counter(e.name for e in profiler.events() if e.device_type == on_device)
    counts: Counter[str] = Counter()
    for event in profiler.events():
        if event.cpu_parent is None:
            _count(event, counts)
    return counts


def _count(event, counts):
    """Whether ``event`` or one within it does something; those that do are counted."""
    if "empty" in event.name:  # which tests let fill what it allocates
        return False
    below = [_count(child, counts) for child in event.cpu_children]
    if any(below):
        return True
    if _does_something(event.name):
        counts[event.name] += 1
        return True
    return False


@functools.cache
def _does_something(name):
    """Whether it is an operator that makes a new tensor, or writes one, other than to allocate."""
    library, _, operator = name.partition("::")
    if library == "tempnet":
        return True
    if library != "aten" or operator in ("_unsafe_view", "resize_", "set_"):
        return False
    for schema in torch._C._jit_get_schemas_for_operator(name):
        for value in schema.returns:
            of_tensors = "Tensor" in str(value.type)
            if of_tensors and (value.alias_info is None or value.alias_info.is_write):
                return True
    return False
