// Multi-scale deformable attention by CANN's built-in operator pair aclnnMultiScaleDeformableAttnFunction and
// aclnnMultiScaleDeformableAttentionGrad (ops-nn, read at CANN 8.5.0), as far as it does not depend on a device: checks,
// padding, the float32/int32 policy, the symbol table, the two-phase call. Needs torch's headers and libdl only.
// register_npu.cpp supplies the device's part, a `Queue`:
//   int64_t stream_key()                                  tells streams apart
//   void run(name, std::function<int(void* stream)>)      runs the function now or in stream order
//
// Axes: B images, S image tokens, M heads, C channels a head, Q queries, L levels, P points.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <dlfcn.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace groundingdino::aclnn {

using at::Tensor;

// What the pair of CANN 8.5.0 can do (op_api and tiling sources).
constexpr int64_t kMaxHeadsLevelsPoints = 16;  // each
constexpr int64_t kMaxChannels = 256;
constexpr int64_t kMaxQueries = 499999;
constexpr int64_t kChannelMultiple = 8;
constexpr int64_t kMinForwardQueries = 32;
constexpr int64_t kMinPoints = 2;  // one point selects a kernel that 8.5.0 does not ship

// Numbers of the C interface (acl_base.h).
constexpr int kFormatNd = 2;
constexpr int kFloat32 = 0;
constexpr int kInt32 = 3;

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

inline std::string describe(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations) {
  std::ostringstream text;
  text << "value " << value.sizes() << " " << value.scalar_type() << ", level sizes " << shapes << ", locations "
       << locations.sizes() << " " << locations.scalar_type();
  return text.str();
}

// ---- The operator library ------------------------------------------------------------------------------------------

// One operator: its first phase plans and returns an executor, its second phase queues the kernels.
struct Operator {
  const char* name;
  void* prepare;
  int (*run)(void* workspace, uint64_t bytes, void* executor, void* stream);
};

class Library {
 public:
  static const Library& get() {
    static const Library* const library = new Library();  // never unloaded: queued calls may outlive static objects
    return *library;
  }

  void* (*create_tensor)(const int64_t* sizes, uint64_t dims, int dtype, const int64_t* strides, int64_t offset,
                         int format, const int64_t* storage_sizes, uint64_t storage_dims, void* data);
  int (*destroy_tensor)(const void*);
  Operator forward, backward;
  std::string path;

  std::string recent_error() const {
    const char* message = recent_error_ ? recent_error_() : nullptr;
    return message && *message ? message : "no message from CANN";
  }

  // Other libraries' copies of torch_npu's call macro leave a thread-local flag set that makes the next executor of the
  // thread reuse an old plan. This clears it, where CANN has the function.
  void forget_cached_plan() const {
    if (forget_cached_plan_) forget_cached_plan_();
  }

 private:
  const char* (*recent_error_)();
  void (*forget_cached_plan_)();

  Library() {
    std::vector<std::string> names = {"libopapi_nn.so", "libopapi.so"};
    if (const char* chosen = std::getenv("GROUNDINGDINO_ACLNN_LIBRARY")) names = {chosen};
    std::ostringstream tried;
    void* handle = nullptr;
    for (const auto& name : names) {
      handle = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL);
      if (!handle) {
        tried << "; " << dlerror();
      } else if (!dlsym(handle, "aclnnMultiScaleDeformableAttnFunctionGetWorkspaceSize") ||
                 !dlsym(handle, "aclnnMultiScaleDeformableAttentionGradGetWorkspaceSize")) {
        tried << "; " << name << " has no multi-scale deformable attention";
        handle = nullptr;
      } else {
        path = name;
        break;
      }
    }
    TORCH_CHECK(handle, "no CANN operator library with multi-scale deformable attention",
                tried.str(), ". Source CANN's set_env.sh, or point GROUNDINGDINO_ACLNN_LIBRARY to the library");
    forward = find_operator(handle, "aclnnMultiScaleDeformableAttnFunction");
    backward = find_operator(handle, "aclnnMultiScaleDeformableAttentionGrad");
    create_tensor = find<decltype(create_tensor)>(handle, "aclCreateTensor", true);
    destroy_tensor = find<decltype(destroy_tensor)>(handle, "aclDestroyTensor", true);
    recent_error_ = find<decltype(recent_error_)>(handle, "aclGetRecentErrMsg", false);
    forget_cached_plan_ = find<decltype(forget_cached_plan_)>(handle, "UnInitPTACacheThreadLocal", false);
  }

  template <class Function>
  Function find(void* handle, const std::string& name, bool required) const {
    void* symbol = dlsym(handle, name.c_str());
    if (!symbol) symbol = dlsym(RTLD_DEFAULT, name.c_str());
    TORCH_CHECK(symbol || !required, path, " has no ", name, ": this CANN is not supported");
    return reinterpret_cast<Function>(symbol);
  }

  Operator find_operator(void* handle, const char* name) const {
    return {name, find<void*>(handle, std::string(name) + "GetWorkspaceSize", true),
            find<decltype(Operator::run)>(handle, name, true)};
  }
};

// CANN's handle of one tensor. It refers to the tensor's memory, which must stay valid in stream order.
class Handle {
 public:
  explicit Handle(const Tensor& tensor) {
    const int64_t stored = tensor.storage().nbytes() / tensor.element_size();
    handle_ = Library::get().create_tensor(
        tensor.sizes().data(), tensor.dim(), tensor.scalar_type() == at::kInt ? kInt32 : kFloat32,
        tensor.strides().data(), tensor.storage_offset(), kFormatNd, &stored, 1, tensor.storage().mutable_data());
  }
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  ~Handle() {
    if (handle_) Library::get().destroy_tensor(handle_);
  }
  void* get() const { return handle_; }

 private:
  void* handle_;
};

template <size_t... I>
int prepare(const Operator& op, const std::vector<Handle>& handles, uint64_t* bytes, void** executor,
            std::index_sequence<I...>) {
  using Prepare = int (*)(decltype((void)I, (void*)nullptr)..., uint64_t*, void**);
  return reinterpret_cast<Prepare>(op.prepare)(handles[I].get()..., bytes, executor);
}

// Both phases of one operator on tensors of one device.
template <class Queue, class... Tensors>
void call(Queue& queue, const Operator& op, const std::string& arguments, const Tensor& first, const Tensors&... rest) {
  const Library& library = Library::get();
  auto handles = std::make_shared<std::vector<Handle>>();
  handles->emplace_back(first);
  (handles->emplace_back(rest), ...);
  library.forget_cached_plan();
  uint64_t bytes = 0;
  void* executor = nullptr;
  const int status = prepare(op, *handles, &bytes, &executor, std::make_index_sequence<1 + sizeof...(rest)>());
  TORCH_CHECK(status == 0, op.name, " of ", library.path, " refused with error ", status, ": ", library.recent_error(),
              " (", arguments, ")");
  // The allocator is stream-ordered: the workspace may be released as soon as its use is queued.
  const Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, first.options().dtype(at::kByte));
  void* memory = bytes ? workspace.mutable_data_ptr() : nullptr;
  queue.run(op.name, [run = op.run, name = op.name, memory, bytes, executor, handles, arguments](void* stream) -> int {
    const int code = run(memory, bytes, executor, stream);
    TORCH_CHECK(code == 0, name, " failed with error ", code, ": ", Library::get().recent_error(), " (", arguments, ")");
    return code;
  });
}

// ---- Level sizes on the device -------------------------------------------------------------------------------------

struct Levels {
  Tensor sizes;   // (L, 2) int32, (height, width)
  Tensor starts;  // (L) int32, first token of each level
};

// All layers of a step use the same sizes, so they are copied once: from pinned memory, because a copy from pageable
// memory waits for the stream.
inline Levels levels_on_device(at::IntArrayRef shapes, const at::TensorOptions& value_options, int64_t stream_key) {
  static std::mutex* const mutex = new std::mutex();
  static auto* const cache = new std::map<std::tuple<int, int64_t, std::vector<int64_t>>, Levels>();
  constexpr size_t kMostEntries = 64;
  const at::Device device = value_options.device();
  const auto key = std::make_tuple(int(device.index()), stream_key, shapes.vec());
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto known = cache->find(key);
  if (known != cache->end()) return known->second;

  const int64_t levels = shapes.size() / 2;
  const bool pinned = !device.is_cpu();
  const auto host = at::TensorOptions().dtype(at::kInt).pinned_memory(pinned);
  const Tensor sizes = at::empty({levels, 2}, host), starts = at::empty({levels}, host);
  int64_t start = 0;
  for (int64_t l = 0; l < levels; ++l) {
    sizes.mutable_data_ptr<int32_t>()[2 * l] = shapes[2 * l];
    sizes.mutable_data_ptr<int32_t>()[2 * l + 1] = shapes[2 * l + 1];
    starts.mutable_data_ptr<int32_t>()[l] = start;
    start += shapes[2 * l] * shapes[2 * l + 1];
  }
  if (cache->size() >= kMostEntries) cache->clear();
  return (*cache)[key] = {sizes.to(device, /*non_blocking=*/true), starts.to(device, /*non_blocking=*/true)};
}

// ---- Checks and padding --------------------------------------------------------------------------------------------

// Why the pair cannot compute this, or "" where it can.
inline std::string refusal(const Tensor& value, const Tensor& locations) {
  const auto too_many = [](const char* what, int64_t size, int64_t most) {
    return std::to_string(size) + " " + what + ", the most is " + std::to_string(most);
  };
  if (value.size(2) > kMaxHeadsLevelsPoints) return too_many("heads", value.size(2), kMaxHeadsLevelsPoints);
  if (locations.size(3) > kMaxHeadsLevelsPoints) return too_many("levels", locations.size(3), kMaxHeadsLevelsPoints);
  if (locations.size(4) > kMaxHeadsLevelsPoints) return too_many("points", locations.size(4), kMaxHeadsLevelsPoints);
  if (value.size(3) > kMaxChannels) return too_many("channels a head", value.size(3), kMaxChannels);
  if (locations.size(1) > kMaxQueries) return too_many("queries", locations.size(1), kMaxQueries);
  return "";
}

// CANN 8.5.0 does not compare the sizes that its arguments share, and reads out of bounds where they differ.
inline void check(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations, const Tensor& weights) {
  const std::string arguments = describe(value, shapes, locations);
  TORCH_CHECK_VALUE(value.dim() == 4 && locations.dim() == 6 && locations.size(5) == 2 && weights.dim() == 5,
                    "expected value (B, S, M, C), locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P), got ", arguments,
                    ", weights ", weights.sizes());
  TORCH_CHECK_VALUE(locations.sizes().slice(0, 5) == weights.sizes(), "weights ", weights.sizes(),
                    " do not fit locations: ", arguments);
  const int64_t levels = locations.size(3);
  TORCH_CHECK_VALUE(locations.size(0) == value.size(0) && locations.size(2) == value.size(2) &&
                        static_cast<int64_t>(shapes.size()) == 2 * levels,
                    "batch, heads or levels differ: ", arguments);
  int64_t tokens = 0;
  for (int64_t l = 0; l < levels; ++l) {
    TORCH_CHECK_VALUE(shapes[2 * l] > 0 && shapes[2 * l + 1] > 0, "an empty level: ", arguments);
    tokens += shapes[2 * l] * shapes[2 * l + 1];
  }
  TORCH_CHECK_VALUE(tokens == value.size(1), "the levels have ", tokens, " tokens: ", arguments);
  TORCH_CHECK_VALUE(value.device() == locations.device() && value.device() == weights.device(),
                    "value is on ", value.device(), ", locations on ", locations.device(), ", weights on ",
                    weights.device());
  TORCH_CHECK_VALUE(value.is_floating_point() && locations.is_floating_point() && weights.is_floating_point() &&
                        value.scalar_type() != at::kDouble,
                    "expected float32, float16 or bfloat16: ", arguments);
  const std::string reason = refusal(value, locations);
  TORCH_CHECK_VALUE(reason.empty(), "beyond CANN's operator: ", reason, " (", arguments, ")");
}

// `tensor` as contiguous float32 with `dim` grown to `size` by zeros. Only zeros and copy_, which every CANN has.
inline Tensor padded(const Tensor& tensor, std::initializer_list<std::pair<int64_t, int64_t>> dims_and_sizes) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  for (const auto& [dim, size] : dims_and_sizes) sizes[dim] = size;
  if (tensor.sizes() == at::IntArrayRef(sizes)) return tensor.to(at::kFloat).contiguous();
  const Tensor larger = at::zeros(sizes, tensor.options().dtype(at::kFloat));
  Tensor inside = larger;
  for (const auto& [dim, size] : dims_and_sizes) inside = inside.narrow(dim, 0, tensor.size(dim));
  inside.copy_(tensor);
  return larger;
}

// ---- The two operators ---------------------------------------------------------------------------------------------

// (B, Q, M*C) of value's dtype, computed in float32.
template <class Queue>
Tensor forward(Queue& queue, const Tensor& value, at::IntArrayRef shapes, const Tensor& locations,
               const Tensor& weights) {
  check(value, shapes, locations, weights);
  const int64_t B = value.size(0), M = value.size(2), C = value.size(3), Q = locations.size(1);
  if (locations.numel() == 0 || value.numel() == 0) return at::zeros({B, Q, M * C}, value.options());

  const int64_t padded_C = round_up(C, kChannelMultiple);
  const int64_t padded_P = std::max(locations.size(4), kMinPoints), padded_Q = std::max(Q, kMinForwardQueries);
  const Tensor value_in = padded(value, {{3, padded_C}});
  const Tensor locations_in = padded(locations, {{1, padded_Q}, {4, padded_P}});
  const Tensor weights_in = padded(weights, {{1, padded_Q}, {4, padded_P}});
  const Levels levels = levels_on_device(shapes, value.options(), queue.stream_key());
  const Tensor output = at::empty({B, padded_Q, M * padded_C}, value_in.options());
  call(queue, Library::get().forward, describe(value_in, shapes, locations_in), value_in, levels.sizes, levels.starts,
       locations_in, weights_in, output);
  const Tensor real = output.view({B, padded_Q, M, padded_C}).narrow(1, 0, Q).narrow(3, 0, C);
  return real.reshape({B, Q, M * C}).to(value.scalar_type());
}

// Gradients of value, locations and weights, each of its input's shape and dtype, computed in float32.
template <class Queue>
std::tuple<Tensor, Tensor, Tensor> backward(Queue& queue, const Tensor& grad_output, const Tensor& value,
                                            at::IntArrayRef shapes, const Tensor& locations, const Tensor& weights) {
  check(value, shapes, locations, weights);
  const int64_t B = value.size(0), M = value.size(2), C = value.size(3), Q = locations.size(1), P = locations.size(4);
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef({B, Q, M * C}) && grad_output.device() == value.device(),
                    "grad_output ", grad_output.sizes(), " on ", grad_output.device(), " does not fit ",
                    describe(value, shapes, locations));
  if (locations.numel() == 0 || value.numel() == 0) {
    const auto zeros = [](const Tensor& t) { return at::zeros(t.sizes(), t.options()); };
    return {zeros(value), zeros(locations), zeros(weights)};
  }
  const int64_t padded_C = round_up(C, kChannelMultiple), padded_P = std::max(P, kMinPoints);
  const Tensor value_in = padded(value, {{3, padded_C}});
  const Tensor locations_in = padded(locations, {{4, padded_P}}), weights_in = padded(weights, {{4, padded_P}});
  const Tensor grad_in = padded(grad_output.reshape({B, Q, M, C}), {{3, padded_C}}).view({B, Q, M * padded_C});
  const Levels levels = levels_on_device(shapes, value.options(), queue.stream_key());
  // The operator clears what it adds to.
  const Tensor grad_value = at::empty(value_in.sizes(), value_in.options());
  const Tensor grad_locations = at::empty(locations_in.sizes(), locations_in.options());
  const Tensor grad_weights = at::empty(weights_in.sizes(), weights_in.options());
  call(queue, Library::get().backward, describe(value_in, shapes, locations_in), value_in, levels.sizes, levels.starts,
       locations_in, weights_in, grad_in, grad_value, grad_locations, grad_weights);
  return {grad_value.narrow(3, 0, C).contiguous().to(value.scalar_type()),
          grad_locations.narrow(4, 0, P).contiguous().to(locations.scalar_type()),
          grad_weights.narrow(4, 0, P).contiguous().to(weights.scalar_type())};
}

}  // namespace groundingdino::aclnn
