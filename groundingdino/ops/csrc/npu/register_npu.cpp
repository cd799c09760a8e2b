// Registers the operators of aclnn_msda.h for NPU tensors. Needs torch_npu's headers; CANN is found at run time.
#include <ATen/Context.h>

#include "schema.h"
#include "torch_npu/csrc/core/npu/NPUFormat.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace {

using at::Tensor;
namespace aclnn = groundingdino::aclnn;

// The current stream, through torch_npu's task queue.
struct NpuQueue {
  c10_npu::NPUStream stream = c10_npu::getCurrentNPUStream();

  int64_t stream_key() const { return stream.id(); }

  void run(const char* name, std::function<int(void*)> work) const {
    // stream(false) is the raw stream without draining the task queue, which is where RunOpApiV2 puts the call.
    const aclrtStream raw = stream.stream(false);
    at_npu::native::OpCommand::RunOpApiV2(name, [raw, work = std::move(work)] { return work(raw); });
  }
};

void check_format(const Tensor& tensor) {
  const int64_t format = at_npu::native::get_npu_format(tensor);
  TORCH_CHECK(format <= ACL_FORMAT_ND || format == ACL_FORMAT_NCDHW, "a tensor ", tensor.sizes(),
              " has the private format ", format, ": set torch.npu.config.allow_internal_format = False");
}

Tensor forward(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations, const Tensor& weights) {
  for (const Tensor& tensor : {value, locations, weights}) check_format(tensor);
  NpuQueue queue;
  return aclnn::forward(queue, value, shapes, locations, weights);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes,
                                            const Tensor& locations, const Tensor& weights) {
  at::globalContext().alertNotDeterministic("aclnnMultiScaleDeformableAttentionGrad");
  for (const Tensor& tensor : {grad_output, value, locations, weights}) check_format(tensor);
  NpuQueue queue;
  return aclnn::backward(queue, grad_output, value, shapes, locations, weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(groundingdino_aclnn, PrivateUse1, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
}
