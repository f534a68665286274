// Calling a kernel whose arguments lie in an array of 8-byte words, as a recorded program does.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

template <typename T>
T argument(int64_t word) {
  if constexpr (sizeof(T) == sizeof(word)) {  // a pointer, an integer or a double
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
  } else {
    return T(word);  // an int or a bool
  }
}

template <typename... A, size_t... I>
int64_t call_with(void (*kernel)(A...), const int64_t* words, std::index_sequence<I...>) {
  kernel(argument<A>(words[I])...);
  return 0;
}
template <typename... A, size_t... I>
int64_t call_with(int (*kernel)(A...), const int64_t* words, std::index_sequence<I...>) {
  return kernel(argument<A>(words[I])...);
}
template <typename R, typename... A>
int64_t call_with(R (*kernel)(A...), const int64_t* words) {
  return call_with(kernel, words, std::index_sequence_for<A...>());
}

}  // namespace

// NAME_call(words): the kernel NAME; 0, or what a kernel returns to say what is wrong.
#define CALLABLE(NAME) \
  extern "C" int64_t NAME##_call(const int64_t* words) { return call_with(NAME, words); }
