// Threads for the kernels of this folder.
//
// Plain std::thread instead of OpenMP: no second OpenMP run time beside torch's own, nothing that breaks after fork().

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Runs body(task, worker) for every task; the calling thread is worker 0.
template <typename Body>
void parallel(int64_t tasks, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, worker);
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t worker = 1; worker < std::min(threads, tasks); ++worker) helpers.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // no more threads to be had: those that started, and this one, do the work
  }
  work(0);
  for (auto& helper : helpers) helper.join();
}
