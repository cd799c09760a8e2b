// A stand-in for CANN's operator library (libopapi.so): tensor handles, the deformable-attention pair with the argument
// checks and the defects of CANN 8.5.0, and the few operators that torch_npu calls by itself. Synchronous, on host memory.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

extern "C" int fake_cann_error(int code, const char* message);  // fake_runtime.cpp: what aclGetRecentErrMsg returns

namespace {

enum { kNull = 161001, kInvalid = 161002, kNoKernel = 561107, kFailed = 507011 };
enum { F32 = 0, F16 = 1, I8 = 2, I32 = 3, U8 = 4, I16 = 6, I64 = 9, F64 = 11, BOOL = 12, BF16 = 27 };

struct Tensor {
  std::vector<int64_t> sizes, strides;
  int64_t offset;
  int dtype, format;
  char* data;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
  }
  size_t itemsize() const {
    switch (dtype) {
      case F32: case I32: return 4;
      case I64: case F64: return 8;
      case F16: case BF16: case I16: return 2;
      default: return 1;
    }
  }
  char* at(int64_t linear) const {  // the element with this row-major number
    int64_t place = offset;
    for (int d = int(sizes.size()) - 1; d >= 0; --d) {
      place += linear % sizes[d] * strides[d];
      linear /= sizes[d];
    }
    return data + place * int64_t(itemsize());
  }
};

float from_half(uint16_t h) { _Float16 v; std::memcpy(&v, &h, 2); return float(v); }
uint16_t to_half(double d) { _Float16 v = _Float16(float(d)); uint16_t h; std::memcpy(&h, &v, 2); return h; }
float from_bf16(uint16_t h) { uint32_t u = uint32_t(h) << 16; float f; std::memcpy(&f, &u, 4); return f; }
uint16_t to_bf16(double d) {
  float f = float(d); uint32_t u; std::memcpy(&u, &f, 4);
  if (std::isnan(f)) return 0x7fc0;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

double load(const Tensor& t, int64_t i) {
  const char* p = t.at(i);
  switch (t.dtype) {
    case F32: return *(const float*)p;
    case F16: return from_half(*(const uint16_t*)p);
    case BF16: return from_bf16(*(const uint16_t*)p);
    case F64: return *(const double*)p;
    case I8: return *(const int8_t*)p;
    case I16: return *(const int16_t*)p;
    case I32: return *(const int32_t*)p;
    case I64: return double(*(const int64_t*)p);
    default: return *(const uint8_t*)p;
  }
}

void store(const Tensor& t, int64_t i, double v) {
  char* p = t.at(i);
  switch (t.dtype) {
    case F32: *(float*)p = float(v); break;
    case F16: *(uint16_t*)p = to_half(v); break;
    case BF16: *(uint16_t*)p = to_bf16(v); break;
    case F64: *(double*)p = v; break;
    case I8: *(int8_t*)p = int8_t(v); break;
    case I16: *(int16_t*)p = int16_t(v); break;
    case I32: *(int32_t*)p = int32_t(v); break;
    case I64: *(int64_t*)p = int64_t(v); break;
    case BOOL: *(uint8_t*)p = v != 0; break;
    default: *(uint8_t*)p = uint8_t(v); break;
  }
}

std::vector<double> read(const Tensor& t) {
  std::vector<double> out(t.numel());
  for (int64_t i = 0; i < t.numel(); ++i) out[i] = load(t, i);
  return out;
}
void write(const Tensor& t, const std::vector<double>& values) {
  for (int64_t i = 0; i < t.numel(); ++i) store(t, i, values[i]);
}

struct Executor {
  std::function<int()> run;
};

int g_forward_calls, g_backward_calls, g_fail_next_run, g_cached_plan_resets;

int run(void* workspace, uint64_t bytes, void* executor) {
  auto* plan = (Executor*)executor;
  if (bytes && !workspace) return fake_cann_error(kNull, "workspace is null");
  if (bytes) std::memset(workspace, 0xff, bytes);  // poison: writes NaN over whatever shares this memory
  const int code = g_fail_next_run ? fake_cann_error(kFailed, "EZ9999: the device reported an error") : plan->run();
  g_fail_next_run = 0;
  delete plan;
  return code;
}

int plan(uint64_t* bytes, void** executor, uint64_t workspace, std::function<int()> work) {
  *bytes = workspace;
  *executor = new Executor{std::move(work)};
  return 0;
}

// ---- Deformable attention ------------------------------------------------------------------------------------------

bool is_float(const Tensor& t) { return t.dtype == F32 || t.dtype == F16 || t.dtype == BF16; }
bool is_index(const Tensor& t) { return t.dtype == I32 || t.dtype == I64; }

int check_common(const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& loc, const Tensor& w) {
  if (value.sizes.size() != 4 || shapes.sizes.size() != 2 || starts.sizes.size() != 1 || loc.sizes.size() != 6 ||
      w.sizes.size() != 5)
    return fake_cann_error(kInvalid, "EZ1001: wrong number of dimensions");
  if (!is_float(value) || !is_float(loc) || !is_float(w) || !is_index(shapes) || !is_index(starts))
    return fake_cann_error(kInvalid, "EZ1001: dtype is not in the support list");
  const int64_t C = value.sizes[3], H = value.sizes[2], L = shapes.sizes[0], P = loc.sizes[4];
  if (C % 8 || C > 256) return fake_cann_error(kInvalid, "EZ1001: channels must be a multiple of 8, at most 256");
  if (loc.sizes[1] >= 500000) return fake_cann_error(kInvalid, "EZ1001: numQueries must be less than 500000");
  if (L > 16 || H > 16 || P > 16) return fake_cann_error(kInvalid, "EZ1001: levels, heads, points must be at most 16");
  for (const Tensor* t : {&value, &shapes, &starts, &loc, &w})
    if (t->format > 2) return fake_cann_error(kInvalid, "EZ1001: private format is not supported");
  return 0;
}

// 8.5.0 does not compare what the arguments share. Real hardware then reads out of bounds; here the result is NaN.
bool fits(const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& loc, const Tensor& w) {
  const int64_t B = value.sizes[0], H = value.sizes[2], L = shapes.sizes[0];
  bool same = shapes.sizes[1] == 2 && starts.sizes[0] == L && loc.sizes[0] == B && loc.sizes[2] == H &&
              loc.sizes[3] == L && loc.sizes[5] == 2;
  for (int d = 0; d < 5; ++d) same = same && w.sizes[d] == loc.sizes[d];
  int64_t tokens = 0;
  for (int64_t l = 0; same && l < L; ++l) {
    same = load(starts, l) == double(tokens);
    tokens += int64_t(load(shapes, 2 * l)) * int64_t(load(shapes, 2 * l + 1));
  }
  return same && tokens == value.sizes[1];
}

// Visits the four corners of every sample: f(sample number, token row in value or -1, corner weight, d/dx, d/dy).
template <class F>
void corners(const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& loc, F f) {
  const std::vector<double> where = read(loc), size = read(shapes), start = read(starts);
  const int64_t B = loc.sizes[0], Q = loc.sizes[1], H = loc.sizes[2], L = loc.sizes[3], P = loc.sizes[4];
  const int64_t S = value.sizes[1];
  for (int64_t s = 0; s < B * Q * H * L * P; ++s) {
    const int64_t l = s / P % L, h = s / (P * L) % H, b = s / (P * L * H * Q);
    const double rows = size[2 * l], columns = size[2 * l + 1];
    const double x = where[2 * s] * columns - 0.5, y = where[2 * s + 1] * rows - 0.5;  // the last axis is (x, y)
    if (!(x > -1 && y > -1 && x < columns && y < rows)) continue;
    const double x0 = std::floor(x), y0 = std::floor(y), fx = x - x0, fy = y - y0;
    for (int c = 0; c < 4; ++c) {
      const int dx = c & 1, dy = c >> 1;
      const double cx = x0 + dx, cy = y0 + dy, wx = dx ? fx : 1 - fx, wy = dy ? fy : 1 - fy;
      if (cx < 0 || cy < 0 || cx >= columns || cy >= rows) continue;
      const int64_t token = int64_t(start[l]) + int64_t(cy * columns + cx);
      f(s, (b * S + token) * H + h, wx * wy, (dx ? wy : -wy) * columns, (dy ? wx : -wx) * rows);
    }
  }
}

int forward(const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& loc, const Tensor& weight,
            const Tensor& out) {
  ++g_forward_calls;
  const int64_t C = value.sizes[3], HLP = loc.sizes[2] * loc.sizes[3] * loc.sizes[4];
  const int64_t LP = loc.sizes[3] * loc.sizes[4];
  std::vector<double> sum(out.numel(), 0.0);
  if (!fits(value, shapes, starts, loc, weight)) {
    std::fill(sum.begin(), sum.end(), std::numeric_limits<double>::quiet_NaN());
  } else {
    const std::vector<double> v = read(value), w = read(weight);
    corners(value, shapes, starts, loc, [&](int64_t s, int64_t row, double corner, double, double) {
      double* to = &sum[(s / HLP * loc.sizes[2] + s / LP % loc.sizes[2]) * C];
      for (int64_t c = 0; c < C; ++c) to[c] += w[s] * corner * v[row * C + c];
    });
  }
  write(out, sum);
  return 0;
}

int backward(const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& loc, const Tensor& weight,
             const Tensor& grad, const Tensor& grad_value, const Tensor& grad_loc, const Tensor& grad_weight) {
  ++g_backward_calls;
  const int64_t C = value.sizes[3], H = loc.sizes[2], LP = loc.sizes[3] * loc.sizes[4], HLP = H * LP;
  std::vector<double> dv(value.numel(), 0.0), dl(loc.numel(), 0.0), dw(weight.numel(), 0.0);
  if (!fits(value, shapes, starts, loc, weight)) {
    for (auto* d : {&dv, &dl, &dw}) std::fill(d->begin(), d->end(), std::numeric_limits<double>::quiet_NaN());
  } else {
    const std::vector<double> v = read(value), w = read(weight), g = read(grad);
    corners(value, shapes, starts, loc, [&](int64_t s, int64_t row, double corner, double by_x, double by_y) {
      const double* from = &g[(s / HLP * H + s / LP % H) * C];
      double dot = 0;
      for (int64_t c = 0; c < C; ++c) {
        dot += from[c] * v[row * C + c];
        dv[row * C + c] += w[s] * corner * from[c];
      }
      dw[s] += corner * dot;
      dl[2 * s] += w[s] * by_x * dot;
      dl[2 * s + 1] += w[s] * by_y * dot;
    });
  }
  write(grad_value, dv);
  write(grad_loc, dl);
  write(grad_weight, dw);
  return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))
#define RUNS(name) \
  API int name(void* workspace, uint64_t bytes, void* executor, void*) { return run(workspace, bytes, executor); }

API void* aclCreateTensor(const int64_t* sizes, uint64_t dims, int dtype, const int64_t* strides, int64_t offset,
                          int format, const int64_t*, uint64_t, void* data) {
  return new Tensor{{sizes, sizes + dims}, {strides, strides + dims}, offset, dtype, format, (char*)data};
}
API int aclDestroyTensor(const void* tensor) {
  auto* t = (Tensor*)tensor;
  if (!t) return kNull;
  t->data = nullptr;  // a handle that is destroyed before its call has run must be noticed
  t->sizes.assign(1, -1);
  delete t;
  return 0;
}
API void UnInitPTACacheThreadLocal() { ++g_cached_plan_resets; }

API int aclnnMultiScaleDeformableAttnFunctionGetWorkspaceSize(const Tensor* value, const Tensor* shapes,
                                                              const Tensor* starts, const Tensor* loc,
                                                              const Tensor* weight, const Tensor* out, uint64_t* bytes,
                                                              void** executor) {
  if (!value || !shapes || !starts || !loc || !weight || !out) return fake_cann_error(kNull, "EZ1001: null tensor");
  if (int code = check_common(*value, *shapes, *starts, *loc, *weight)) return code;
  if (value->dtype != out->dtype) return fake_cann_error(kInvalid, "EZ1001: output dtype differs from value");
  if (loc->sizes[1] < 32) return fake_cann_error(kInvalid, "EZ1001: numQueries must be at least 32");
  if (value->numel() == 0 || loc->numel() == 0) return plan(bytes, executor, 0, [] { return 0; });
  const int64_t C = value->sizes[3];
  if (loc->sizes[4] == 1 && loc->sizes[3] <= 8 && value->sizes[2] <= 8 && (C == 16 || C == 32))
    return fake_cann_error(kNoKernel, "EZ9999: kernel not found, tiling key 1001");  // fixed in CANN 9.0
  return plan(bytes, executor, 4096, [=] { return forward(*value, *shapes, *starts, *loc, *weight, *out); });
}
RUNS(aclnnMultiScaleDeformableAttnFunction)

API int aclnnMultiScaleDeformableAttentionGradGetWorkspaceSize(
    const Tensor* value, const Tensor* shapes, const Tensor* starts, const Tensor* loc, const Tensor* weight,
    const Tensor* grad, const Tensor* grad_value, const Tensor* grad_loc, const Tensor* grad_weight, uint64_t* bytes,
    void** executor) {
  if (!value || !shapes || !starts || !loc || !weight || !grad || !grad_value || !grad_loc || !grad_weight)
    return fake_cann_error(kNull, "EZ1001: null tensor");
  if (int code = check_common(*value, *shapes, *starts, *loc, *weight)) return code;
  if (grad->sizes.size() != 3) return fake_cann_error(kInvalid, "EZ1001: gradOutput must have 3 dimensions");
  if (!is_float(*grad) || grad->format > 2) return fake_cann_error(kInvalid, "EZ1001: gradOutput dtype or format");
  if (value->numel() == 0 || loc->numel() == 0) return plan(bytes, executor, 0, [] { return 0; });
  return plan(bytes, executor, 8192, [=] {
    return backward(*value, *shapes, *starts, *loc, *weight, *grad, *grad_value, *grad_loc, *grad_weight);
  });
}
RUNS(aclnnMultiScaleDeformableAttentionGrad)

// ---- What torch_npu itself calls for .to(dtype), copy_, zeros ------------------------------------------------------

namespace {
bool dense(const Tensor& t) {
  int64_t expected = 1;
  for (int d = int(t.sizes.size()) - 1; d >= 0; --d) {
    if (t.sizes[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

int convert(const Tensor& to, const Tensor& from) {
  const int64_t n = to.numel();
  const bool broadcast = from.numel() == 1, same = to.dtype == from.dtype;
  if (same && n && !broadcast && dense(to) && dense(from)) {
    return std::memmove(to.at(0), from.at(0), n * to.itemsize()), 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = broadcast ? 0 : i;
    if (same) {
      std::memcpy(to.at(i), from.at(j), to.itemsize());
    } else {
      store(to, i, load(from, j));
    }
  }
  return 0;
}
}  // namespace

API int aclnnCastGetWorkspaceSize(const Tensor* from, int, const Tensor* to, uint64_t* bytes, void** executor) {
  return plan(bytes, executor, 0, [=] { return convert(*to, *from); });
}
RUNS(aclnnCast)
API int aclnnInplaceCopyGetWorkspaceSize(const Tensor* to, const Tensor* from, uint64_t* bytes, void** executor) {
  if (from->numel() != 1 && from->sizes != to->sizes) return fake_cann_error(kInvalid, "copy between unequal shapes");
  return plan(bytes, executor, 0, [=] { return convert(*to, *from); });
}
RUNS(aclnnInplaceCopy)
API int aclnnInplaceZeroGetWorkspaceSize(const Tensor* to, uint64_t* bytes, void** executor) {
  return plan(bytes, executor, 0, [=] { return write(*to, std::vector<double>(to->numel(), 0.0)), 0; });
}
RUNS(aclnnInplaceZero)
API int aclnnInplaceOneGetWorkspaceSize(const Tensor* to, uint64_t* bytes, void** executor) {
  return plan(bytes, executor, 0, [=] { return write(*to, std::vector<double>(to->numel(), 1.0)), 0; });
}
RUNS(aclnnInplaceOne)

struct Scalar {
  double value;
};
API void* aclCreateScalar(void* value, int dtype) {
  return new Scalar{load(Tensor{{1}, {1}, 0, dtype, 2, (char*)value}, 0)};
}
API int aclDestroyScalar(const void* scalar) { return delete (const Scalar*)scalar, 0; }
API int aclnnInplaceFillScalarGetWorkspaceSize(const Tensor* to, const Scalar* scalar, uint64_t* bytes,
                                               void** executor) {
  const double value = scalar->value;
  return plan(bytes, executor, 0, [=] { return write(*to, std::vector<double>(to->numel(), value)), 0; });
}
RUNS(aclnnInplaceFillScalar)
API void* aclCreateIntArray(const int64_t* values, uint64_t size) { return new std::vector<int64_t>(values, values + size); }
API int aclDestroyIntArray(const void* array) { return delete (const std::vector<int64_t>*)array, 0; }
API int aclnnConstantPadNdGetWorkspaceSize(const Tensor* from, const std::vector<int64_t>* pad, const Scalar* scalar,
                                           const Tensor* to, uint64_t* bytes, void** executor) {
  const std::vector<int64_t> padding = *pad;  // (before, after) of each dimension, the last one first
  const double value = scalar->value;
  return plan(bytes, executor, 0, [=] {
    write(*to, std::vector<double>(to->numel(), value));
    Tensor inside = *to;
    inside.sizes = from->sizes;
    for (size_t k = 0; 2 * k < padding.size(); ++k) {
      inside.offset += padding[2 * k] * to->strides[to->strides.size() - 1 - k];
    }
    return convert(inside, *from);
  });
}
RUNS(aclnnConstantPadNd)

// ---- AdamW of one parameter. It knows nothing of `found_inf`: what torch_npu's fused AdamW does with it is its own ----

API int aclnnApplyAdamWV2GetWorkspaceSize(Tensor* weight, Tensor* first, Tensor* second, Tensor* most, const Tensor* grad,
                                          const Tensor* step, float lr, float beta1, float beta2, float decay, float eps,
                                          bool amsgrad, bool maximize, uint64_t* bytes, void** executor) {
  if (most || amsgrad || maximize) return fake_cann_error(kInvalid, "fake CANN: plain AdamW only");
  return plan(bytes, executor, 0, [=] {
    const double t = load(*step, 0) + 1;
    const double bias1 = 1 - std::pow(double(beta1), t), bias2 = 1 - std::pow(double(beta2), t);
    for (int64_t i = 0; i < weight->numel(); ++i) {
      const double g = load(*grad, i), w = load(*weight, i);
      const double m = beta1 * load(*first, i) + (1 - double(beta1)) * g;
      const double v = beta2 * load(*second, i) + (1 - double(beta2)) * g * g;
      store(*first, i, m);
      store(*second, i, v);
      store(*weight, i, w - lr * decay * w - lr * (m / bias1) / (std::sqrt(v / bias2) + eps));
    }
    return 0;
  });
}
RUNS(aclnnApplyAdamWV2)

// ---- For the tests -------------------------------------------------------------------------------------------------

API int fake_forward_calls() { return g_forward_calls; }
API int fake_backward_calls() { return g_backward_calls; }
API int fake_cached_plan_resets() { return g_cached_plan_resets; }
API void fake_fail_next_run() { g_fail_next_run = 1; }
