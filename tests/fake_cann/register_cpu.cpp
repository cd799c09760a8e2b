// The contract header of the NPU binding registered for CPU tensors, over the fake operator library.
#include "schema.h"

namespace {
struct CpuQueue {
  int64_t stream_key() const { return 0; }
  void run(const char*, const std::function<int(void*)>& work) const { work(nullptr); }
};

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                   const at::Tensor& weights) {
  CpuQueue queue;
  return groundingdino::aclnn::forward(queue, value, shapes, locations, weights);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  CpuQueue queue;
  return groundingdino::aclnn::backward(queue, grad_output, value, shapes, locations, weights);
}
}  // namespace

TORCH_LIBRARY_IMPL(groundingdino_aclnn, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
}
