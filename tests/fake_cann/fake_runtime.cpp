// A stand-in for CANN's runtime (libascendcl.so): the functions that torch_npu 2.9.0 links against or looks up. Device
// memory is host memory filled with NaN, streams run at once, and a device-to-host copy arrives at the next
// synchronisation: until then its destination holds garbage, so that reading too early is seen.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define OK(name) \
  API int name(...) { return 0; }

namespace {
enum { kNotImplemented = 500001, kOutOfMemory = 207001 };
enum { H2H, H2D, D2H, D2D };

struct Late {
  void* to;
  std::vector<char> bytes;
};

std::mutex g_mutex;
std::map<void*, size_t> g_blocks;
size_t g_used;
std::vector<Late> g_late;
thread_local std::string t_error;
thread_local int t_device;
std::atomic<int64_t> g_synchronisations, g_copies[4], g_bytes[4];

size_t limit() {
  static const char* mib = std::getenv("FAKE_CANN_MEMORY_MIB");
  static const size_t bytes = size_t(mib ? std::atoll(mib) : 8192) << 20;
  return bytes;
}

uint32_t devices() {
  static const char* count = std::getenv("FAKE_CANN_DEVICES");
  return count ? uint32_t(std::atoi(count)) : 1;
}

void arrive() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  for (const Late& copy : g_late) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  g_late.clear();
}

int synchronise() {
  ++g_synchronisations;
  arrive();
  return 0;
}
}  // namespace

API int fake_cann_error(int code, const char* message) {
  t_error = message;
  return code;
}
API const char* aclGetRecentErrMsg() { return t_error.c_str(); }

// ---- device --------------------------------------------------------------------------------------------------------
OK(aclInit) OK(aclFinalize) OK(aclrtResetDevice) OK(aclrtDeviceEnablePeerAccess) OK(aclrtProcessReport)
OK(aclrtSetDeviceSatMode) OK(aclrtSetOpWaitTimeout) OK(aclrtSetOpExecuteTimeOut) OK(aclrtSetSysParamOpt)
OK(aclrtCtxSetSysParamOpt)
API void aclAppLog(...) {}
API const char* aclrtGetSocName() { return "Ascend910B3"; }
API int aclrtSetDevice(int32_t device) {
  if (uint32_t(device) >= devices()) return fake_cann_error(107001, "EE1001: invalid device ID");
  t_device = device;
  return 0;
}
API int aclrtGetDevice(int32_t* device) { return *device = t_device, 0; }
API int aclrtGetDeviceCount(uint32_t* count) { return *count = devices(), 0; }
API int aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) { return *can = 0, 0; }
API int aclrtGetCurrentContext(void** context) { return *context = (void*)(intptr_t)(t_device + 1), 0; }
API int aclrtSetCurrentContext(void* context) { return t_device = int((intptr_t)context) - 1, 0; }
API int aclGetDeviceCapability(uint32_t, int, int64_t* value) { return *value = 20, 0; }
API int aclrtSynchronizeDevice() { return synchronise(); }
API int aclrtSynchronizeDeviceWithTimeout(int32_t) { return synchronise(); }

// ---- memory --------------------------------------------------------------------------------------------------------
API int aclrtMalloc(void** memory, size_t size, int) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (g_used + size > limit()) return fake_cann_error(kOutOfMemory, "EL0004: failed to allocate memory");
  *memory = std::aligned_alloc(512, (size + 511) / 512 * 512 + 512);
  std::memset(*memory, 0xff, size);
  g_blocks[*memory] = size;
  g_used += size;
  return 0;
}
API int aclrtMallocAlign32(void** memory, size_t size, int policy) { return aclrtMalloc(memory, size, policy); }
API int aclrtFree(void* memory) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_used -= g_blocks[memory];
  g_blocks.erase(memory);
  std::free(memory);
  return 0;
}
API int aclrtMallocHost(void** memory, size_t size) {
  return *memory = std::aligned_alloc(64, (size + 63) / 64 * 64 + 64), 0;
}
API int aclrtFreeHost(void* memory) { return std::free(memory), 0; }
API int aclrtGetMemInfo(int, size_t* free, size_t* total) { return *free = limit() - g_used, *total = limit(), 0; }
API int aclrtMemset(void* memory, size_t, int32_t value, size_t count) {
  return std::memset(memory, value, count), 0;
}
API int aclrtMemcpy(void* to, size_t, const void* from, size_t count, int kind) {
  arrive();
  ++g_copies[kind & 3];
  g_bytes[kind & 3] += count;
  std::memcpy(to, from, count);
  return 0;
}
API int aclrtMemcpyAsync(void* to, size_t, const void* from, size_t count, int kind, void*) {
  ++g_copies[kind & 3];
  g_bytes[kind & 3] += count;
  if (kind != D2H) return std::memmove(to, from, count), 0;
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_late.push_back({to, {(const char*)from, (const char*)from + count}});
  std::memset(to, 0xcd, count);
  return 0;
}

// ---- streams and events --------------------------------------------------------------------------------------------
namespace {
using Clock = std::chrono::steady_clock;
struct Event {
  Clock::time_point when;
};
int new_handle(void** handle) { return *handle = new Event{Clock::now()}, 0; }
int delete_handle(void* handle) { return delete (Event*)handle, 0; }
}  // namespace

OK(aclrtStreamWaitEvent) OK(aclrtResetEvent)
API int aclrtCreateStream(void** stream) { return new_handle(stream); }
API int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) { return new_handle(stream); }
API int aclrtDestroyStream(void* stream) { return delete_handle(stream); }
API int aclrtDestroyStreamForce(void* stream) { return delete_handle(stream); }
API int aclrtSynchronizeStream(void*) { return synchronise(); }
API int aclrtSynchronizeStreamWithTimeout(void*, int32_t) { return synchronise(); }
API int aclrtCreateEventExWithFlag(void** event, uint32_t) { return new_handle(event); }
API int aclrtCreateEventWithFlag(void** event, uint32_t) { return new_handle(event); }
API int aclrtDestroyEvent(void* event) { return delete_handle(event); }
API int aclrtRecordEvent(void* event, void*) { return ((Event*)event)->when = Clock::now(), 0; }
API int aclrtSynchronizeEvent(void*) { return synchronise(); }
API int aclrtQueryEventStatus(void*, int* status) { return arrive(), *status = 1, 0; }
API int aclrtQueryEventWaitStatus(void*, int* status) { return *status = 1, 0; }
API int aclrtStreamQuery(void*, int* status) { return arrive(), *status = 0, 0; }
API int aclrtEventElapsedTime(float* ms, void* start, void* end) {
  *ms = std::chrono::duration<float, std::milli>(((Event*)end)->when - ((Event*)start)->when).count();
  return 0;
}

// ---- the older operator interface: torch_npu falls back to it where an aclnn operator is absent --------------------
OK(aclopSetAttrBool) OK(aclopSetAttrDataType) OK(aclopSetAttrFloat) OK(aclopSetAttrInt) OK(aclopSetAttrListBool)
OK(aclopSetAttrListFloat) OK(aclopSetAttrListInt) OK(aclopSetAttrListListInt) OK(aclopSetAttrString)
OK(aclSetTensorDescName) OK(aclSetTensorFormat) OK(aclSetTensorPlaceMent) OK(aclSetTensorShape)
OK(aclmdlInitDump) OK(aclmdlSetDump) OK(aclmdlFinalizeDump) OK(aclGetTensorDescDimV2) OK(aclGetTensorDescFormat)
OK(aclGetTensorDescNumDims) OK(aclGetTensorDescType) OK(aclSetCompileopt) OK(aclGetCompileopt)
API size_t aclGetCompileoptSize(int) { return 1; }
API void* aclopCreateAttr() { return new char; }
API void aclopDestroyAttr(const void* attr) { delete (const char*)attr; }
API void* aclCreateTensorDesc(...) { return new char; }
API void aclDestroyTensorDesc(const void* desc) { delete (const char*)desc; }
API void* aclCreateDataBuffer(void*, size_t) { return new char; }
API int aclDestroyDataBuffer(const void* buffer) { return delete (const char*)buffer, 0; }
API int aclopCompileAndExecute(const char* name, ...) {
  return fake_cann_error(kNotImplemented, (std::string("fake CANN: operator not implemented: ") + name).c_str());
}

// ---- the profiler: it starts and stops, and records nothing --------------------------------------------------------
OK(aclprofInit) OK(aclprofFinalize) OK(aclprofStart) OK(aclprofStop) OK(aclprofWarmup) OK(aclprofSetConfig)
OK(aclprofDestroyConfig) OK(aclprofRegisterDeviceCallback)
API void* aclprofCreateConfig(...) {
  static char config;
  return &config;
}

// ---- for the tests -------------------------------------------------------------------------------------------------
// synchronisations, host-to-device copies and bytes, device-to-host copies and bytes
API void fake_counters(int64_t* out) {
  out[0] = g_synchronisations;
  out[1] = g_copies[H2D], out[2] = g_bytes[H2D], out[3] = g_copies[D2H], out[4] = g_bytes[D2H];
}
