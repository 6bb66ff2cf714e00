// What only a GPU can run: launches from several threads at once, and into a graph.
#include <atomic>
#include <thread>

#include "driver.h"
#include "native.h"

namespace driver {
namespace {

using Bytes = std::vector<unsigned char>;
using Results = std::vector<Bytes>;  // of a task's outputs

bool succeeds(cudaError_t error, const std::string& task, const char* what) {
  if (error != cudaSuccess) complain("%s: %s: %s", task.c_str(), what, cudaGetErrorString(error));
  return error == cudaSuccess;
}

class Stream {
 public:
  Stream() { static_cast<void>(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// A task with what its outputs hold before it runs, and after.
struct Prepared {
  Task task;
  Results before, after;

  explicit Prepared(Task task_) : task(std::move(task_)) {
    for (const auto& output : task.outputs) {
      before.emplace_back(output->read(), output->read() + output->length());
    }
  }

  // Outputs as they were.
  cudaError_t reset(cudaStream_t stream) const {
    for (size_t k = 0; k < before.size(); ++k) {
      if (before[k].empty()) continue;
      const cudaError_t error = cudaMemcpyAsync(task.outputs[k]->device(), before[k].data(), before[k].size(),
                                                cudaMemcpyHostToDevice, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // What the outputs hold when the stream has come so far.
  Results results(cudaStream_t stream) const {
    Results all;
    for (const auto& output : task.outputs) {
      all.emplace_back(output->length());
      if (all.back().empty()) continue;
      succeeds(cudaMemcpyAsync(all.back().data(), output->device(), output->length(), cudaMemcpyDeviceToHost,
                               stream),
               task.name, "copying results");
    }
    succeeds(cudaStreamSynchronize(stream), task.name, "the launch");
    return all;
  }

  bool run(cudaStream_t stream) const {
    if (!succeeds(reset(stream), task.name, "writing outputs")) return false;
    return succeeds(static_cast<cudaError_t>(task.launch(stream)), task.name, "launching");
  }

  void run_alone() {
    const Stream stream;
    run(stream);
    after = results(stream);
    if (after == before) complain("%s: nothing was written", task.name.c_str());
  }
};

std::vector<Prepared> prepared(int variant) {
  std::vector<Prepared> all;
  for (Task& task : tasks(variant)) all.emplace_back(std::move(task));
  return all;
}

// All threads reach it before one goes on.
class Meeting {
 public:
  explicit Meeting(int threads) : threads_(threads) {}
  void wait() {
    const int turn = turn_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++turn_;
    }
    while (turn_ == turn) std::this_thread::yield();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0}, turn_{0};
};

// The same operator with another size in every thread, each on a stream of its own: all succeed, and give the
// bits that a thread alone gets. Kernels are launched here first with all threads together, so that what a
// launcher does once is raced for too.
void group_threads() {
  constexpr int kBurst = 4;
  const int rounds = shortened ? 2 : 20;
  machine::settings.multiprocessors = 1;  // full blocks: of another size in every thread
  for (int threads : {4, 2}) {
    std::vector<std::vector<Prepared>> work;
    for (int n = 0; n < threads; ++n) work.push_back(prepared(n));
    const machine::Passive passive;
    const size_t count = work[0].size();
    std::vector<std::vector<std::vector<Results>>> got;  // of a thread, a task, a round
    for (int n = 0; n < threads; ++n) got.emplace_back(count);
    Meeting meeting(threads);
    std::vector<std::thread> running;
    for (int n = 0; n < threads; ++n) {
      running.emplace_back([&, n] {
        const Stream stream;
        for (size_t k = 0; k < count; ++k) {
          const Prepared& own = work[size_t(n)][k];
          meeting.wait();
          for (int round = 0; round < rounds; ++round) {
            bool launched = true;
            for (int burst = 0; burst < kBurst; ++burst) launched = own.run(stream) && launched;
            if (launched) got[size_t(n)][k].push_back(own.results(stream));
          }
        }
      });
    }
    for (std::thread& thread : running) thread.join();
    for (int n = 0; n < threads; ++n) {
      for (size_t k = 0; k < count; ++k) {
        Prepared& own = work[size_t(n)][k];
        ++cases;
        current_case = std::to_string(threads) + " threads, " + own.task.name;
        own.run_alone();
        for (const auto& result : got[size_t(n)][k]) {
          if (result != own.after) {
            complain("another result beside other threads than alone");
            break;
          }
        }
      }
    }
  }
  machine::settings.multiprocessors = 0;
}

// The first launch of every kernel in this process goes into a graph. Replayed, it gives what a plain launch
// does.
void group_capture() {
  for (Prepared& own : prepared(1)) {
    ++cases;
    current_case = own.task.name;
    const Stream stream;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    const machine::Passive passive;
    // Global: whatever a capture may forbid is forbidden.
    if (!succeeds(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), own.task.name, "capturing"))
      return;
    const auto status = static_cast<cudaError_t>(own.task.launch(static_cast<cudaStream_t>(stream)));
    succeeds(status, own.task.name, "launching into a graph");
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    if (!succeeds(ended, own.task.name, "the capture")) continue;
    if (!succeeds(cudaGraphInstantiate(&executable, graph, 0), own.task.name, "instantiating")) continue;
    std::vector<Results> replays;
    for (int n = 0; n < 3; ++n) {
      succeeds(own.reset(stream), own.task.name, "writing outputs");
      succeeds(cudaGraphLaunch(executable, stream), own.task.name, "replaying");
      replays.push_back(own.results(stream));
    }
    own.run_alone();
    for (const auto& replay : replays) {
      if (replay != own.after) complain("a replay gives another result than a launch");
    }
    static_cast<void>(cudaGraphExecDestroy(executable));
    static_cast<void>(cudaGraphDestroy(graph));
  }
}

}  // namespace

Groups own_groups() { return {{"capture", group_capture}, {"threads", group_threads}}; }

}  // namespace driver
