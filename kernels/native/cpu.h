// What the compiled forms for a CPU are written with: ordinary C++, vectorised by the compiler.
//
// Launchers look as on a device (see device.h), but their last parameter is `int threads`.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>

#define FARSPAN_EXPORT extern "C" __attribute__((visibility("default")))
#define FARSPAN_HOST_DEVICE inline

namespace farspan {

// The codes that launchers take for a dtype.
enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int INVALID = 1;

// Threads that sleep between calls.  OpenMP's would spin at its barriers, and beside torch's own there would be two
// sets of them on the same cores.
class Pool {
  public:
    // This process's: a forked child has none of its parent's threads.
    static Pool& of_process() {
        static std::mutex mutex;
        static Pool* pool = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> lock(mutex);
        if (pool == nullptr || owner != getpid()) {
            pool = new Pool;  // never deleted: its threads may outlive static objects
            owner = getpid();
        }
        return *pool;
    }

    // `task(data)` in this thread and in `helpers` others; returns when all have.
    void run(int helpers, void (*task)(void*), void* data) {
        std::unique_lock<std::mutex> callers(callers_, std::try_to_lock);
        if (!callers.owns_lock()) return task(data);  // another thread's call has the helpers
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();
            task_ = task;
            data_ = data;
            places_ = helpers;
            working_ = 0;
        }
        work_.notify_all();
        task(data);
        std::unique_lock<std::mutex> lock(mutex_);
        places_ = 0;  // who has not come by now finds nothing left to do
        done_.wait(lock, [this] { return working_ == 0; });
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [this] { return places_ > 0; });
            --places_;
            ++working_;
            void (*task)(void*) = task_;
            void* data = data_;
            lock.unlock();
            task(data);
            lock.lock();
            if (--working_ == 0) done_.notify_all();
        }
    }

    std::mutex callers_, mutex_;
    std::condition_variable work_, done_;
    int started_ = 0, places_ = 0, working_ = 0;
    void (*task_)(void*) = nullptr;
    void* data_ = nullptr;
};

// f(first, last) for pieces of `grain` items, each taken by the next free thread.  Which thread has which piece is
// chance: a result must not depend on it.
template <class F>
void parallel(int threads, int64_t items, const F& f, int64_t grain = 1) {
    const int64_t pieces = (items + grain - 1) / grain;
    if (threads < 2 || pieces < 2) {
        for (int64_t first = 0; first < items; first += grain) f(first, std::min(first + grain, items));
        return;
    }
    struct Work {
        const F& f;
        int64_t items, grain;
        std::atomic<int64_t> next;
    } work{f, items, grain, {0}};
    auto task = [](void* data) {
        Work& w = *static_cast<Work*>(data);
        for (;;) {
            const int64_t first = w.next.fetch_add(w.grain);
            if (first >= w.items) return;
            w.f(first, std::min(first + w.grain, w.items));
        }
    };
    Pool::of_process().run(static_cast<int>(std::min<int64_t>(threads, pieces)) - 1, task, &work);
}

}  // namespace farspan

extern "C" inline __attribute__((used, visibility("default"))) const char* farspan_error(int code) {
    return code == farspan::INVALID ? "invalid value" : "unknown error";
}
