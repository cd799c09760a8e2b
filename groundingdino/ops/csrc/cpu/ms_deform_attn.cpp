// Multi-scale deformable attention on CPUs: plain C ABI, no torch headers, so that one build serves every torch version.
//
// Forward: the value is first copied to one block per (image, head) in which every level has a border of zeros; a
// sample then needs no bounds checks, and a head's rows lie next to each other in the caches. Work is split into
// (image, head, tile of queries).
// Backward: one task is one (image, head, level). No other task touches its part of any gradient, so nothing is atomic
// and results do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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
  int64_t first_token;  // in value
  int64_t first_row;    // in a padded block
  int64_t row_stride() const { return width + 2; }
  int64_t rows() const { return (height + 2) * (width + 2); }
  int64_t zeros() const { return width + 1; }  // top left of a 2 x 2 patch that is all border
};

struct Problem {
  Sizes sizes;
  std::vector<Level> levels;
  int64_t rows = 0;  // of a padded block, all levels

  Problem(const int64_t* numbers) {
    std::memcpy(&sizes, numbers, sizeof(Sizes));
    const int64_t* shape = numbers + sizeof(Sizes) / sizeof(int64_t);
    int64_t token = 0;
    for (int64_t l = 0; l < sizes.levels; ++l, shape += 2) {
      levels.push_back({shape[0], shape[1], token, rows});
      token += shape[0] * shape[1];
      rows += levels.back().rows();
    }
  }

  // Forward: enough heads to keep every worker busy, each with one small block that stays in its caches.
  bool block_per_worker() const {
    const int64_t blocks = sizes.batch * sizes.heads;
    return blocks % sizes.threads == 0 || blocks >= 4 * sizes.threads;
  }

  int64_t largest_level() const {
    int64_t largest = 0;
    for (const Level& level : levels) largest = std::max(largest, level.rows());
    return largest;
  }
};

}  // namespace

#define KERNELS "ms_deform_attn.inc"
#include "each_isa.inc"

// The fastest that this processor has, for all kernels of the library.
EXPORT int64_t best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

// Elements of the workspace.
EXPORT int64_t msda_forward_workspace(const int64_t* numbers) {
  Problem problem(numbers);
  const Sizes& s = problem.sizes;
  const int64_t blocks = problem.block_per_worker() ? s.threads : s.batch * s.heads;
  return blocks * problem.rows * padded_channels(s.channels);
}
EXPORT int64_t msda_backward_workspace(const int64_t* numbers) {
  Problem problem(numbers);
  return problem.sizes.threads * 2 * problem.largest_level() * padded_channels(problem.sizes.channels);
}

// All tensors contiguous; workspaces aligned to 64 bytes; isa at most best_isa().
#define DEFINE_ENTRY_POINTS(T, suffix)                                                                                \
  EXPORT void msda_forward_##suffix(const int64_t* numbers, int64_t isa, const T* value, const T* locations,          \
                                    const T* weights, T* workspace, T* out) {                                         \
    Problem problem(numbers);                                                                                         \
    DISPATCH(isa, forward<T>(problem, value, locations, weights, workspace, out))                                     \
  }                                                                                                                   \
  EXPORT void msda_backward_##suffix(const int64_t* numbers, int64_t isa, const T* grad_out, const T* value,          \
                                     const T* locations, const T* weights, T* workspace, T* grad_value,               \
                                     T* grad_locations, T* grad_weights) {                                            \
    Problem problem(numbers);                                                                                         \
    DISPATCH(isa, backward<T>(problem, grad_out, value, locations, weights, workspace, grad_value, grad_locations,    \
                              grad_weights))                                                                          \
  }

DEFINE_ENTRY_POINTS(float, float)
DEFINE_ENTRY_POINTS(double, double)
