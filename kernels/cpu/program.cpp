// A recorded sequence of kernel calls, run without going back to Python in between.

#include <cstdint>

struct Call {
  int64_t (*kernel)(const int64_t* words);
  int64_t first_word;
};

// 0, or one more than the number of the call that refused its arguments.
extern "C" int64_t run_program(const Call* calls, int64_t num_calls, const int64_t* words) {
  for (int64_t i = 0; i < num_calls; ++i)
    if (calls[i].kernel(words + calls[i].first_word) != 0) return i + 1;
  return 0;
}
