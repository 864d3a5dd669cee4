// The checks that only C++ can make, each with the name and the value. Python checks the rest
// before the call.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace tempnet {

// The standard exception that pybind11 turns into IndexError.
[[noreturn]] inline void throw_bad_target(const char* function, int64_t row, int64_t value,
                                          int64_t vocab_size, int64_t ignore_index) {
  std::ostringstream message;
  message << function << ": target[" << row << "] must be in [0, " << vocab_size
          << ") or ignore_index=" << ignore_index << ", got " << value;
  throw std::out_of_range(message.str());
}

[[noreturn]] inline void throw_bad_argument(const char* function, const char* argument,
                                            const char* expected) {
  std::ostringstream message;
  message << function << ": " << argument << " must be " << expected;
  throw std::invalid_argument(message.str());
}

}  // namespace tempnet
