// torch's parallel loop for ThreadSanitizer, preloaded (tests/sanitizers.sh): torch's own threads are
// OpenMP's, whose barriers the sanitizer does not see, so that every loop would be reported. Here the second
// half of every loop runs in a thread that is started and joined, however small the loop: the grain is
// advice.
#include <cstdint>
#include <thread>

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

extern "C" int torch_parallel_for(int64_t begin, int64_t end, int64_t, RangeFunction function,
                                  void* context) {
  if (begin >= end) return 0;
  const int64_t middle = begin + (end - begin + 1) / 2;
  if (middle == end) {
    function(begin, end, context);
    return 0;
  }
  std::thread other(function, middle, end, context);
  function(begin, middle, context);
  other.join();
  return 0;
}
