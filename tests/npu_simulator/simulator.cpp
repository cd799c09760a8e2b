// Operators on npu tensors, computed by PyTorch's CPU kernels on the same memory (the fake CANN's device memory is host
// memory), with the refusals of a device. simulator.py says which operator gets which of the kernels below.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <unordered_map>

#include "torch_npu/csrc/aten/NPUGeneratorImpl.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace {

using at::Tensor;
using c10::IValue;

std::atomic<int64_t> g_kernels, g_data_dependent;

bool on_npu(const Tensor& t) { return t.defined() && t.device().is_privateuseone(); }

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// One call: npu tensors stand in as CPU tensors on the same memory, and come back as themselves.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), name_(op.schema().name()), stack_(stack), device_(c10::DeviceType::PrivateUse1, 0) {}

  void run() {
    c10_npu::getCurrentNPUStream().stream();  // everything queued before has to run first
    const size_t count = op_.schema().arguments().size();
    for (size_t i = stack_->size() - count; i < stack_->size(); ++i) (*stack_)[i] = to_cpu((*stack_)[i]);
    check_kind();
    ++g_kernels;
    if (needs_values()) ++g_data_dependent;
    at::AutoDispatchBelowADInplaceOrView below;
    if (op_.hasTag(at::Tag::nondeterministic_seeded)) {
      run_seeded();
    } else {
      op_.callBoxed(stack_);
    }
    const size_t results = op_.schema().returns().size();
    for (size_t i = stack_->size() - results; i < stack_->size(); ++i) (*stack_)[i] = to_npu((*stack_)[i]);
  }

 private:
  const c10::OperatorHandle& op_;
  const std::string name_;
  torch::jit::Stack* stack_;
  c10::Device device_;
  std::vector<Tensor> inputs_;                                 // the CPU tensors, kept alive
  std::unordered_map<const c10::TensorImpl*, Tensor> origin_;  // CPU tensor -> npu tensor
  std::unordered_map<const c10::StorageImpl*, Tensor> memory_;
  std::optional<at::Generator> generator_;

  void refuse(const std::string& why) const {
    TORCH_CHECK(false, "simulated NPU: ", name_, ".", op_.schema().overload_name(), ": ", why);
  }

  void check_tensor(const Tensor& t) const {
    if (t.scalar_type() == at::kDouble || t.is_complex()) {
      refuse(std::string("the device has no ") + c10::toString(t.scalar_type()));
    }
    if (t.dim() > 8) refuse("the device has at most 8 dimensions");
  }

  Tensor stand_in(const Tensor& t) {
    if (!t.defined()) return t;
    if (!on_npu(t)) {
      const bool is_index = starts_with(name_, "aten::index") || starts_with(name_, "aten::_index_put");
      if (t.dim() > 0 && !(is_index && !t.is_floating_point())) {
        refuse("a tensor on the " + t.device().str() + " beside tensors on the NPU");
      }
      return t;
    }
    check_tensor(t);
    device_ = t.device();
    for (const auto& [impl, original] : origin_) {
      if (original.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) {
        for (const Tensor& known : inputs_) if (known.unsafeGetTensorImpl() == impl) return known;
      }
    }
    Tensor cpu = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
    origin_[cpu.unsafeGetTensorImpl()] = t;
    memory_[cpu.storage().unsafeGetStorageImpl()] = t;
    inputs_.push_back(cpu);
    return cpu;
  }

  IValue to_cpu(const IValue& value) {
    if (value.isTensor()) return stand_in(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : value.toTensorVector()) out.push_back(stand_in(t));
      return out;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) {
        out.push_back(t ? std::optional<Tensor>(stand_in(*t)) : t);
      }
      return out;
    }
    if (value.isDevice()) {
      if (value.toDevice().is_privateuseone()) device_ = value.toDevice();
      return c10::Device(at::kCPU);
    }
    if (value.isGenerator()) {
      if (!value.toGenerator().device().is_privateuseone()) refuse("a generator of the CPU");
      generator_ = value.toGenerator();
      return IValue();
    }
    return value;
  }

  void check_kind() const {
    static const char* const floating[] = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::convolution"};
    for (const char* name : floating) {
      if (name_ == name && !inputs_.empty() && !inputs_[0].is_floating_point()) refuse("the device multiplies no integers");
    }
  }

  // The size of the result depends on values, so a device has to be waited for.
  bool needs_values() const {
    static const char* const names[] = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
                                        "aten::unique_consecutive", "aten::equal", "aten::bincount",
                                        "aten::repeat_interleave"};
    for (const char* name : names) if (name_ == name) return true;
    if (!starts_with(name_, "aten::index") && !starts_with(name_, "aten::_index_put")) return false;
    for (const Tensor& t : inputs_) if (t.scalar_type() == at::kBool && origin_.size() > 1) return name_ != "aten::index_fill";
    return false;
  }

  // Random numbers follow the NPU's generator: its seed and offset seed the CPU's for this one call.
  void run_seeded() {
    at::Generator npu = generator_ ? *generator_ : at_npu::detail::getDefaultNPUGenerator(device_.index());
    const auto [seed, offset] = at::check_generator<at_npu::NPUGeneratorImpl>(npu)->philox_engine_inputs(4);
    at::Generator cpu = at::detail::getDefaultCPUGenerator();
    const Tensor before = cpu.get_state();
    cpu.set_current_seed(seed * 1000003 + offset);
    try {
      op_.callBoxed(stack_);
    } catch (...) {
      cpu.set_state(before);
      throw;
    }
    cpu.set_state(before);
  }

  Tensor result(const Tensor& t) {
    if (!t.defined()) return t;
    const auto same = origin_.find(t.unsafeGetTensorImpl());
    if (same != origin_.end()) {
      if (same->second.sizes() != t.sizes()) refuse("resizes its result");
      return same->second;
    }
    check_tensor(t);
    const auto view = memory_.find(t.storage().unsafeGetStorageImpl());
    if (view != memory_.end()) {
      return view->second.as_strided(t.sizes(), t.strides(), view->second.storage_offset() + t.storage_offset());
    }
    const Tensor npu = at::empty_strided(t.sizes(), t.strides(), t.options().device(device_));
    if (t.numel()) std::memcpy(npu.data_ptr(), t.data_ptr(), at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize()));
    return npu;
  }

  IValue to_npu(const IValue& value) {
    if (value.isTensor()) return result(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : value.toTensorVector()) out.push_back(result(t));
      return out;
    }
    return value;
  }
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// Operators that torch_npu replaces as a whole, and that PyTorch composes of others: PyTorch's way.
void composed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, *stack);
}

// Operators whose derivative torch_npu replaces: PyTorch's derivative.
void stock_autograd(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::Autograd, *stack);
}

torch::Library& library(c10::DispatchKey key) {
  static std::unordered_map<int, std::unique_ptr<torch::Library>> libraries;
  auto& library = libraries[int(key)];
  if (!library) library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  return *library;
}

void register_kernel(const std::vector<std::string>& names, const std::string& kernel) {
  using torch::CppFunction;
  for (const std::string& name : names) {
    if (kernel == "on_cpu") {
      library(c10::DispatchKey::PrivateUse1).impl(name.c_str(), CppFunction::makeFromBoxedFunction<&on_cpu>());
    } else if (kernel == "composed") {
      library(c10::DispatchKey::PrivateUse1).impl(name.c_str(), CppFunction::makeFromBoxedFunction<&composed>());
      library(c10::DispatchKey::AutogradPrivateUse1).impl(name.c_str(), CppFunction::makeFromBoxedFunction<&composed>());
    } else {
      library(c10::DispatchKey::AutogradPrivateUse1).impl(name.c_str(), CppFunction::makeFromBoxedFunction<&stock_autograd>());
    }
  }
}

}  // namespace

TORCH_LIBRARY(npu_simulator, m) {
  m.def("register_kernel", register_kernel);
  m.def("counters", [] { return std::vector<int64_t>{g_kernels, g_data_dependent}; });
}
