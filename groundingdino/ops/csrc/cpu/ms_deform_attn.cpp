// Multi-scale deformable attention on CPUs: plain C ABI, no torch headers, so that one build serves every torch version.
//
// With many queries, as many as tokens, a head's part of the value is first packed, so that its rows lie next to each
// other in the caches. Few queries, as the decoder's, read where the tokens lie. The value's gradient is always packed.
// Forward: work is split into (image, head, tile of queries).
// Backward: one task is one (image, head, level). No other task touches its part of any gradient, so nothing is atomic
// and results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "parallel.h"

namespace {

// As Python passes it: eight int64 in this order, then (height, width) of each level.
struct Sizes {
  int64_t batch, tokens, heads, channels, queries, levels, points, threads;
};

// Packed rows are padded with zeros to 16 channels, which every vector length divides.
inline int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

struct Level {
  int64_t height, width;
  int64_t first_token;
  int64_t size() const { return height * width; }
};

struct Problem {
  Sizes sizes;
  std::vector<Level> levels;

  Problem(const int64_t* numbers) {
    std::memcpy(&sizes, numbers, sizeof(Sizes));
    const int64_t* shape = numbers + sizeof(Sizes) / sizeof(int64_t);
    int64_t token = 0;
    for (int64_t l = 0; l < sizes.levels; ++l, shape += 2) {
      levels.push_back({shape[0], shape[1], token});
      token += levels.back().size();
    }
  }

  // Whether copying all tokens is little beside the samples of all queries, or rows are no whole vectors.
  bool packs() const { return 4 * sizes.queries > sizes.tokens || sizes.channels != padded_channels(sizes.channels); }

  int64_t packed_size(int64_t rows) const { return (rows + 1) * padded_channels(sizes.channels); }

  // Forward: enough heads to keep every worker busy, each with one small block that stays in its caches.
  bool block_per_worker() const {
    const int64_t blocks = sizes.batch * sizes.heads;
    return blocks % sizes.threads == 0 || blocks >= 4 * sizes.threads;
  }

  int64_t largest_level() const {
    int64_t largest = 0;
    for (const Level& level : levels) largest = std::max(largest, level.size());
    return largest;
  }
};

}  // namespace

#define KERNELS "ms_deform_attn.inc"
#include "each_isa.inc"

// The fastest that this processor has, for all kernels of the library.
EXPORT int64_t best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

// Elements of the workspace.
EXPORT int64_t msda_forward_workspace(const int64_t* numbers) {
  Problem problem(numbers);
  const Sizes& s = problem.sizes;
  const int64_t blocks = problem.block_per_worker() ? s.threads : s.batch * s.heads;
  return problem.packs() ? blocks * problem.packed_size(s.tokens) : 0;
}
EXPORT int64_t msda_backward_workspace(const int64_t* numbers) {
  Problem problem(numbers);
  const Sizes& s = problem.sizes;
  return s.threads * 2 * problem.packed_size(problem.largest_level());
}

// All tensors contiguous; workspaces aligned to 64 bytes; isa at most best_isa().
// S is the type of the value and the output, T that of everything else.
#define DEFINE_FORWARD(T, S, suffix)                                                                                  \
  EXPORT void msda_forward_##suffix(const int64_t* numbers, int64_t isa, const S* value, const T* locations,          \
                                    const T* weights, T* workspace, S* out) {                                         \
    Problem problem(numbers);                                                                                         \
    DISPATCH(isa, forward(problem, value, locations, weights, workspace, out))                                        \
  }
#define DEFINE_BACKWARD(T, suffix)                                                                                    \
  EXPORT void msda_backward_##suffix(const int64_t* numbers, int64_t isa, const T* grad_out, const T* value,          \
                                     const T* locations, const T* weights, T* workspace, T* grad_value,               \
                                     T* grad_locations, T* grad_weights) {                                            \
    Problem problem(numbers);                                                                                         \
    DISPATCH(isa, backward<T>(problem, grad_out, value, locations, weights, workspace, grad_value, grad_locations,    \
                              grad_weights))                                                                          \
  }

DEFINE_FORWARD(float, float, float)
DEFINE_FORWARD(double, double, double)
DEFINE_FORWARD(float, BFloat16, bfloat16)
DEFINE_BACKWARD(float, float)
DEFINE_BACKWARD(double, double)
