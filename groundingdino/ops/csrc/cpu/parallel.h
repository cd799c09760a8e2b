// Threads for the kernels of this folder.
//
// torch's own: a pool beside it would share the processors with torch's threads, which spin for some milliseconds after
// each of its operators. torch makes the symbols of its OpenMP run time (GCC's interface) visible to the whole process;
// looked up there, this library links to none, and serves every build of torch. Without it new threads do the work.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Runs body(task, worker) for every task; worker is in [0, threads).
template <typename Body>
void parallel(int64_t tasks, int64_t threads, const Body& body) {
  using Region = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  static const auto open_mp = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  std::atomic<int64_t> next_task{0}, next_worker{0};
  auto work = [&] {
    const int64_t worker = next_worker.fetch_add(1);
    for (int64_t task; (task = next_task.fetch_add(1)) < tasks;) body(task, worker);
  };
  threads = std::min(threads, tasks);
  if (threads > 1 && open_mp) {
    open_mp([](void* function) { (*static_cast<decltype(work)*>(function))(); }, &work, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  try {
    while (int64_t(helpers.size()) + 1 < threads) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // no more threads to be had: those that started, and this one, do the work
  }
  work();
  for (auto& helper : helpers) helper.join();
}
