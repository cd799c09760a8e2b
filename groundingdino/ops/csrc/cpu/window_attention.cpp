// Attention inside the windows of a map, on CPUs: plain C ABI, no torch headers, as ms_deform_attn.cpp.
//
// Tokens are read where they lie and written where they lie: padding, roll and partition are a list of token numbers,
// and the padded positions share one row. Scores of a window never leave the caches; the backward pass computes them
// again instead of keeping them.
// Backward: what several windows add to (the position bias, the padded row) is summed in a fixed number of chunks of
// windows, so results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "parallel.h"

namespace {

constexpr int64_t kPanel = 16;  // columns of a product that are computed at a time; buffers are padded to it

inline int64_t padded(int64_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

// As Python passes it: int64 in this order.
struct Sizes {
  int64_t batch, tokens, heads, channels, windows, places, chunks, threads;  // channels of a head, places in a window

  explicit Sizes(const int64_t* numbers) { std::memcpy(this, numbers, sizeof(Sizes)); }
  int64_t rows() const { return padded(places); }
  int64_t columns() const { return padded(channels); }
  int64_t operand() const { return rows() * columns(); }
  int64_t width() const { return heads * channels; }
  int64_t forward_workspace() const { return 3 * operand() + kPanel * (rows() + columns()); }
  int64_t backward_workspace() const { return 6 * operand() + 2 * rows() * rows(); }
};

// One of the tensors that hold a row for each token, and a row that stands for all padded positions.
template <typename T>
struct Rows {
  T* tokens;   // (batch, tokens, width)
  T* padding;  // (width,)
  int64_t width;
};

}  // namespace

#define KERNELS "window_attention.inc"
#include "each_isa.inc"

EXPORT int64_t window_forward_workspace(const int64_t* numbers) {
  const Sizes sizes(numbers);
  return sizes.threads * sizes.forward_workspace();
}
EXPORT int64_t window_backward_workspace(const int64_t* numbers) {
  const Sizes sizes(numbers);
  return sizes.threads * sizes.backward_workspace();
}

// All tensors contiguous; workspaces filled with zeros; isa at most best_isa().
// qkv (batch, tokens, 3, heads, channels), padding (3, heads, channels), token (windows, places): `tokens` where padded,
// bias (heads, places, places), mask (windows, places, places) or null, out (batch, tokens, heads, channels);
// grad_padding (chunks, 3, heads, channels) and grad_bias (chunks, heads, places, places): zeros, summed by the caller.
// S is the type of qkv, padding and out, T that of everything else.
#define DEFINE_FORWARD(T, S, suffix)                                                                                  \
  EXPORT void window_forward_##suffix(const int64_t* numbers, int64_t isa, const S* qkv, const S* padding,            \
                                      const int64_t* token, const T* bias, const T* mask, T* workspace, S* out) {     \
    const Sizes sizes(numbers);                                                                                       \
    const Rows<const S> rows = {qkv, padding, 3 * sizes.width()};                                                     \
    DISPATCH(isa, forward(sizes, rows, token, bias, mask, workspace, out))                                            \
  }
#define DEFINE_BACKWARD(T, suffix)                                                                                    \
  EXPORT void window_backward_##suffix(const int64_t* numbers, int64_t isa, const T* grad_out, const T* qkv,          \
                                       const T* padding, const int64_t* token, const T* bias, const T* mask,        \
                                       T* workspace, T* grad_qkv, T* grad_padding, T* grad_bias) {                    \
    const Sizes sizes(numbers);                                                                                       \
    DISPATCH(isa, backward<T>(sizes, grad_out, {qkv, padding, 3 * sizes.width()}, token, bias, mask, workspace,     \
                              {grad_qkv, grad_padding, 3 * sizes.width()}, grad_bias))                                \
  }

DEFINE_FORWARD(float, float, float)
DEFINE_FORWARD(double, double, double)
DEFINE_FORWARD(float, BFloat16, bfloat16)
DEFINE_BACKWARD(float, float)
DEFINE_BACKWARD(double, double)
