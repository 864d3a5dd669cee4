// What a library of kernels shows to the pybind11 modules; the rest is hidden.
#pragma once

#define TEMPNET_EXPORT __attribute__((visibility("default")))
