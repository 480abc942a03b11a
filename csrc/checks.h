// The one way an op refuses its input: "op: expectation (got value)", a RuntimeError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace layer_collapse {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// check(ok, "rectify: x must ...", " (got ", value, ")")
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    refuse(parts...);
}

}  // namespace layer_collapse
