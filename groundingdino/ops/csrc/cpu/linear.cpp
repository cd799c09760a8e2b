// Linear layers and feed-forward blocks on CPUs, float32: plain C ABI, no torch headers, as ms_deform_attn.cpp.
//
// A weight is first copied into panels: the columns that are computed at a time lie next to each other, step by step.
// Then work is split by rows. A task's rows and what it makes of them stay in the caches of one core, and panels pass
// by: in a feed-forward block the hidden layer of a few rows exists some hundred columns at a time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bfloat16.h"
#include "parallel.h"

namespace {

constexpr int64_t kWidestPanel = 32;  // of all instruction sets
constexpr int64_t kDepth = 512;  // of a product: so much of a panel at a time, 32 KiB with 16 columns
constexpr int64_t kRows = 96;  // of a task, at the most: with 512 hidden columns they fit a core's cache
constexpr int64_t kPartStride = kDepth + 16;  // of rows in a worker's buffers; not a multiple of 4 KiB
constexpr int64_t kPart = kRows * kPartStride;  // elements of a buffer

enum Activation : int64_t { kNone = 0, kRelu = 1, kGelu = 2 };

// (out, in) at any strides, as torch keeps weights.
struct Weight {
  int64_t out, in, out_stride, in_stride;

  int64_t packed_size() const { return (out + kWidestPanel - 1) / kWidestPanel * kWidestPanel * in; }
};

// As Python passes it: int64 in this order.
struct Linear {
  int64_t rows, row_stride, stride, activation, threads;  // the strides are those of x
  Weight weight;

  explicit Linear(const int64_t* numbers) { std::memcpy(this, numbers, sizeof(Linear)); }
};
struct FeedForward {
  int64_t rows, activation, threads;
  Weight weight1, weight2;

  explicit FeedForward(const int64_t* numbers) { std::memcpy(this, numbers, sizeof(FeedForward)); }
};

}  // namespace

#define KERNELS "linear.inc"
#include "each_isa.inc"

// Elements of the workspace.
EXPORT int64_t linear_workspace(const int64_t* numbers) {
  const Linear sizes(numbers);
  return sizes.weight.packed_size() + sizes.threads * kPart;
}
EXPORT int64_t feed_forward_workspace(const int64_t* numbers) {
  const FeedForward sizes(numbers);
  return sizes.weight1.packed_size() + sizes.weight2.packed_size() + sizes.threads * 2 * kPart;
}

// x (rows, in) at any strides, out (rows, out) contiguous; bias (out,); isa at most best_isa().
EXPORT void linear_float(const int64_t* numbers, int64_t isa, const float* x, const float* weight, const float* bias,
                         float* workspace, float* out) {
  const Linear sizes(numbers);
  DISPATCH(isa, linear(sizes, x, weight, bias, workspace, out))
}

// x and out (rows, width) contiguous; weight1 (hidden, width), weight2 (width, hidden); biases as `linear_float`.
EXPORT void feed_forward_float(const int64_t* numbers, int64_t isa, const float* x, const float* weight1,
                               const float* bias1, const float* weight2, const float* bias2, float* workspace,
                               float* out) {
  const FeedForward sizes(numbers);
  DISPATCH(isa, feed_forward(sizes, x, weight1, bias1, weight2, bias2, workspace, out))
}
