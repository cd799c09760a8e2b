// A stand-in for HCCL (libhccl.so) for the ranks of one host, over POSIX shared memory. Every collective checks that all
// ranks called the same one with the same count and type; a rank that is gone gives a time-out, not a hang.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>

extern "C" int fake_cann_error(int code, const char* message);

namespace {
constexpr int kMaxRanks = 16, kParameter = 1, kTimeOut = 9, kNotSupported = 5;
constexpr size_t kChunk = 1 << 20;
enum Kind { kAllReduce = 1, kBroadcast, kAllGather, kReduceScatter, kReduce };
enum Op { kSum, kProd, kMax, kMin };

struct Call {
  uint64_t kind, count, dtype, detail;
  bool operator!=(const Call& o) const {
    return kind != o.kind || count != o.count || dtype != o.dtype || detail != o.detail;
  }
};

struct Shared {
  std::atomic<uint32_t> attached, waiting, round;
  Call calls[kMaxRanks];
  char data[kMaxRanks][kChunk];
};

struct Comm {
  Shared* shared;
  uint32_t rank, size;
};

std::atomic<int64_t> g_collectives;

template <class Done>
bool wait(Done done) {
  static const char* seconds = std::getenv("FAKE_HCCL_TIMEOUT_S");
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds ? std::atoi(seconds) : 60);
  for (int spins = 0; !done(); ++spins) {
    if (spins > 100) std::this_thread::sleep_for(std::chrono::microseconds(50));
    if (std::chrono::steady_clock::now() > end) return false;
  }
  return true;
}

bool barrier(Comm& comm) {
  Shared& shared = *comm.shared;
  const uint32_t round = shared.round;
  if (++shared.waiting == comm.size) {
    shared.waiting = 0;
    ++shared.round;
    return true;
  }
  return wait([&] { return shared.round != round; });
}

size_t itemsize(int dtype) {
  static const size_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
  return dtype >= 0 && dtype < 12 ? sizes[dtype] : 0;
}

float bf16_to_float(uint16_t h) { uint32_t u = uint32_t(h) << 16; float f; std::memcpy(&f, &u, 4); return f; }
uint16_t float_to_bf16(float f) {
  uint32_t u; std::memcpy(&u, &f, 4);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

template <class T>
T combine(T a, T b, int op) {
  return op == kSum ? T(a + b) : op == kProd ? T(a * b) : op == kMax ? std::max(a, b) : std::min(a, b);
}

template <class T>
void reduce_as(char* to, const char* from, size_t n, int op) {
  for (size_t i = 0; i < n; ++i) ((T*)to)[i] = combine(((T*)to)[i], ((const T*)from)[i], op);
}

int reduce(char* to, const char* from, size_t n, int dtype, int op) {
  switch (dtype) {
    case 0: reduce_as<int8_t>(to, from, n, op); break;
    case 1: reduce_as<int16_t>(to, from, n, op); break;
    case 2: reduce_as<int32_t>(to, from, n, op); break;
    case 3: reduce_as<_Float16>(to, from, n, op); break;
    case 4: reduce_as<float>(to, from, n, op); break;
    case 5: reduce_as<int64_t>(to, from, n, op); break;
    case 7: reduce_as<uint8_t>(to, from, n, op); break;
    case 11:
      for (size_t i = 0; i < n; ++i) {
        uint16_t* out = (uint16_t*)to + i;
        *out = float_to_bf16(combine(bf16_to_float(*out), bf16_to_float(((const uint16_t*)from)[i]), op));
      }
      break;
    default: return fake_cann_error(kNotSupported, "fake HCCL: no reduction for this data type");
  }
  return 0;
}

// Every rank publishes `total` bytes of `send`, chunk by chunk; `take(rank, chunk, offset, bytes)` consumes them.
template <class Take>
int exchange(Comm& comm, Call call, const void* send, size_t total, Take take) {
  static const char* limit = std::getenv("FAKE_HCCL_LINK_FAILS_AFTER");
  if (++g_collectives > (limit ? std::atoll(limit) : INT64_MAX)) {
    return fake_cann_error(kTimeOut, "fake HCCL: the link is down");
  }
  Shared& shared = *comm.shared;
  shared.calls[comm.rank] = call;
  for (size_t offset = 0; offset == 0 || offset < total; offset += kChunk) {
    const size_t bytes = std::min(kChunk, total - offset);
    if (send) std::memcpy(shared.data[comm.rank], (const char*)send + offset, bytes);
    if (!barrier(comm)) return fake_cann_error(kTimeOut, "fake HCCL: another rank did not arrive in time");
    for (uint32_t r = 0; r < comm.size; ++r) {
      if (shared.calls[r] != call) return fake_cann_error(kParameter, "fake HCCL: the ranks called different collectives");
      if (int code = take(r, shared.data[r], offset, bytes)) return code;
    }
    if (!barrier(comm)) return fake_cann_error(kTimeOut, "fake HCCL: another rank did not arrive in time");
  }
  return 0;
}

int reduce_into(Comm& comm, Call call, const void* send, void* recv, size_t total, int dtype, int op) {
  const std::string copy((const char*)send, total);  // send and recv may be the same memory
  return exchange(comm, call, copy.data(), total, [&](uint32_t r, char* chunk, size_t offset, size_t bytes) {
    char* to = (char*)recv + offset;
    if (r == 0) return std::memcpy(to, chunk, bytes), 0;
    return reduce(to, chunk, bytes / itemsize(dtype), dtype, op);
  });
}
}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int HcclGetRootInfo(char* info) {
  std::random_device random;
  std::memset(info, 0, 4108);
  std::snprintf(info, 64, "/fake-hccl-%d-%08x%08x", getpid(), random(), random());
  return 0;
}

API int HcclCommInitRootInfo(uint32_t size, const char* info, uint32_t rank, void** out) {
  if (size > kMaxRanks) return fake_cann_error(kNotSupported, "fake HCCL: at most 16 ranks");
  const int file = shm_open(info, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared))) return fake_cann_error(kParameter, "fake HCCL: no shared memory");
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  auto* comm = new Comm{(Shared*)memory, rank, size};  // kept for the life of the process: work may still refer to it
  ++comm->shared->attached;
  const bool all = wait([&] { return comm->shared->attached >= size; });
  shm_unlink(info);
  *out = comm;
  return all ? 0 : fake_cann_error(kTimeOut, "fake HCCL: another rank did not join in time");
}

API int HcclCommInitRootInfoConfig(uint32_t size, const char* info, uint32_t rank, void*, void** out) {
  return HcclCommInitRootInfo(size, info, rank, out);
}
API uint32_t HcclGetCommConfigCapability() { return 0; }
API int HcclGetCommName(void*, char* name) { return std::strcpy(name, "fake"), 0; }
API int HcclCommInitAll(uint32_t, int32_t*, void**) { return kNotSupported; }
API int HcclCommDestroy(void*) { return 0; }
API int HcclGetCommAsyncError(void*, int* error) { return *error = 0, 0; }
API const char* HcclGetErrorString(int) { return "fake HCCL error"; }
API int HcclSend(void*, uint64_t, int, uint32_t, void*, void*) { return kNotSupported; }
API int HcclRecv(void*, uint64_t, int, uint32_t, void*, void*) { return kNotSupported; }

API int HcclAllReduce(void* send, void* recv, uint64_t count, int dtype, int op, void* comm, void*) {
  const Call call{kAllReduce, count, uint64_t(dtype), uint64_t(op)};
  return reduce_into(*(Comm*)comm, call, send, recv, count * itemsize(dtype), dtype, op);
}
API int HcclReduce(void* send, void* recv, uint64_t count, int dtype, int op, uint32_t root, void* comm, void*) {
  const Call call{kReduce, count, uint64_t(dtype), uint64_t(op) | uint64_t(root) << 8};
  std::string scratch(count * itemsize(dtype), '\0');
  void* to = ((Comm*)comm)->rank == root ? recv : scratch.data();
  return reduce_into(*(Comm*)comm, call, send, to, count * itemsize(dtype), dtype, op);
}
API int HcclBroadcast(void* data, uint64_t count, int dtype, uint32_t root, void* comm, void*) {
  auto& c = *(Comm*)comm;
  const Call call{kBroadcast, count, uint64_t(dtype), root};
  const void* send = c.rank == root ? data : nullptr;
  const auto take = [&](uint32_t r, char* chunk, size_t offset, size_t bytes) {
    if (r == root && c.rank != root) std::memcpy((char*)data + offset, chunk, bytes);
    return 0;
  };
  return exchange(c, call, send, count * itemsize(dtype), take);
}
API int HcclAllGather(void* send, void* recv, uint64_t count, int dtype, void* comm, void*) {
  const size_t total = count * itemsize(dtype);
  const auto take = [&](uint32_t r, char* chunk, size_t offset, size_t bytes) {
    return std::memcpy((char*)recv + r * total + offset, chunk, bytes), 0;
  };
  return exchange(*(Comm*)comm, {kAllGather, count, uint64_t(dtype), 0}, send, total, take);
}
API int HcclReduceScatter(void* send, void* recv, uint64_t count, int dtype, int op, void* comm, void*) {
  auto& c = *(Comm*)comm;
  const size_t mine = count * itemsize(dtype);
  std::string all(mine * c.size, '\0');
  const Call call{kReduceScatter, count, uint64_t(dtype), uint64_t(op)};
  const int code = reduce_into(c, call, send, all.data(), all.size(), dtype, op);
  std::memcpy(recv, all.data() + c.rank * mine, mine);
  return code;
}

API int64_t fake_hccl_collectives() { return g_collectives; }
