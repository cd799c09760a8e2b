// The operators of aclnn_msda.h for torch's dispatcher; each registration file includes this once.
// Python's groundingdino/ops/npu.py chooses between them and the composite.
#pragma once

#include <torch/library.h>

#include "aclnn_msda.h"

TORCH_LIBRARY(groundingdino_aclnn, m) {
  m.def("forward(Tensor value, int[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def("backward(Tensor grad_output, Tensor value, int[] shapes, Tensor locations, Tensor weights)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("refusal(Tensor value, Tensor locations) -> str", groundingdino::aclnn::refusal);
  m.def("library() -> str", [] { return groundingdino::aclnn::Library::get().path; });
}
