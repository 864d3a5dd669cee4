// The checks that only C++ can make, each with the name and the value. Python checks the rest
// before the call.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tempnet {

// The standard exception that pybind11 turns into IndexError.
[[noreturn]] inline void throw_bad_target(const char* function, int64_t row, int64_t value,
                                          int64_t vocab_size, int64_t ignore_index) {
  // No stream: where the compiler links libstdc++ statically beside torch's, printing a number to
  // one crashes.
  throw std::out_of_range(std::string(function) + ": target[" + std::to_string(row) +
                          "] must be in [0, " + std::to_string(vocab_size) + ") or ignore_index=" +
                          std::to_string(ignore_index) + ", got " + std::to_string(value));
}

[[noreturn]] inline void throw_bad_argument(const char* function, const char* argument,
                                            const char* expected) {
  throw std::invalid_argument(std::string(function) + ": " + argument + " must be " + expected);
}

}  // namespace tempnet
