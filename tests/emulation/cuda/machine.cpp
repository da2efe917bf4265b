// A block of threads on fibers, and how they wait for each other.
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "device.h"
#include "fiber.h"
#include "host_cuda.h"
#include "matrix.h"
#include "sanitizers.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
// Stacks begin at different places of a page, so that they do not all compete for the same few
// lines of a cache.
constexpr size_t kColours = 8, kColourBytes = 512;
constexpr size_t kSharedAlignment = 128;
constexpr size_t kVectorBytes = 16;
constexpr int kUnwritten = 0xFF;

enum class Order { kForward, kReverse, kShuffled };

struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;
};

// xorshift64*.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u) {
    if (state_ == 0) state_ = 1;
  }

  unsigned below(unsigned limit) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<unsigned>((state_ * 0x2545F4914F6CDD1Du >> 32) * limit >> 32);
  }

 private:
  uint64_t state_;
};

struct Place {
  const char* file = nullptr;
  int line = 0;

  bool operator!=(const Place& other) const {
    return line != other.line || (file != other.file && std::strcmp(file, other.file) != 0);
  }

  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line);
  }
};

enum class Operation {
  kSynchronize,
  kExchange,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyAddFloat16,
  kMultiplyAddBFloat16,
};

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kSynchronize:
      return "__syncwarp";
    case Operation::kExchange:
      return "a shuffle";
    case Operation::kLoadMatrices:
      return "load_matrices";
    case Operation::kLoadMatricesTransposed:
      return "load_matrices_transposed";
    case Operation::kMultiplyAddFloat16:
    case Operation::kMultiplyAddBFloat16:
      return "multiply_add";
  }
  return "";
}

// A function that the lanes of a mask call together.
struct Collective {
  unsigned mask;
  unsigned arrived;
  Operation operation;
  Place place;
  void* key;  // of __syncwarp, for sanitizers
};

// Those of a warp that wait for lanes. Nothing is allocated: threads change it.
class Collectives {
 public:
  const Collective* begin() const { return all_.data(); }
  const Collective* end() const { return all_.data() + count_; }
  void clear() { count_ = 0; }

  // The one with the mask, perhaps new.
  Collective& with(const Collective& fresh) {
    for (unsigned i = 0; i < count_; ++i)
      if (all_[i].mask == fresh.mask) return all_[i];
    return all_[count_++] = fresh;
  }

  void remove(Collective& one) { one = all_[--count_]; }

 private:
  std::array<Collective, kWarp> all_;
  unsigned count_ = 0;
};

struct Copy {
  unsigned char* shared;
  const void* global;  // null: zeros
  unsigned char data[kVectorBytes];
};

struct Thread {
  Fiber fiber;
  std::vector<Copy> copies;        // that have not arrived
  std::vector<size_t> group_ends;  // of the groups that were committed, in copies
};

struct Warp {
  unsigned existing;
  unsigned ready;
  unsigned exited;
  unsigned at_barrier;
  unsigned generation;  // of __syncwarp
  uint64_t* keys;       // two, for sanitizers
  Collectives collectives;

  // What the lanes give to a collective, and get.
  std::array<uint64_t, kWarp> values, results;
  std::array<unsigned, kWarp> sources;
  std::array<uint32_t*, kWarp> fragments;
  std::array<const void*, kWarp> rows;
  MatrixOperands operands;
};

unsigned bit_of(unsigned lane) { return 1u << lane; }

unsigned lowest_bit(unsigned mask) { return static_cast<unsigned>(__builtin_ctz(mask)); }

unsigned highest_bit(unsigned mask) { return 31u - static_cast<unsigned>(__builtin_clz(mask)); }

// "3", "0-31" or "0-3, 8".
std::string lanes_text(unsigned mask, unsigned first) {
  std::string text;
  while (mask != 0) {
    const unsigned begin = lowest_bit(mask);
    const unsigned long long run = ~(static_cast<unsigned long long>(mask) >> begin);
    const unsigned length = static_cast<unsigned>(__builtin_ctzll(run));
    if (!text.empty()) text += ", ";
    text += std::to_string(first + begin);
    if (length > 1) text += "-" + std::to_string(first + begin + length - 1);
    mask &= ~static_cast<unsigned>(((1ull << length) - 1) << begin);
  }
  return text;
}

// Memory of its own pages.
class Pages {
 public:
  Pages() = default;
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }

  unsigned char* data() const { return data_; }

  // Makes them at least so many bytes.
  void reserve(size_t bytes) {
    if (bytes <= bytes_) return;
    if (data_ != nullptr) munmap(data_, bytes_);
    data_ = map(nullptr, bytes, 0);
    bytes_ = bytes;
  }

  // Has ThreadSanitizer forget who used them.
  void renew() { map(data_, bytes_, MAP_FIXED); }

 private:
  static unsigned char* map(void* address, size_t bytes, int flags) {
    void* pages = mmap(address, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(pages);
  }

  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

void run_thread();

class Machine {
 public:
  Schedule schedule;
  Device device;
  EmulationRecorder recorder = nullptr;

  void launch(const Kernel& kernel, unsigned blocks, unsigned parts, unsigned threads,
              size_t shared_bytes, const void* parameters, size_t parameter_bytes);

  // What threads call.
  unsigned char* shared() const { return shared_; }
  [[noreturn]] void fail(const std::string& what, const Place& place);
  void synchronize_block(const Place& place);
  // Until all lanes of the mask are here; the last one does what is to be done for all.
  void collect(Operation operation, unsigned mask, const Place& place);
  void copy(void* shared, const void* global, bool exists, const Place& place);
  void commit();
  void complete(unsigned pending);
  void check_shared(const void* address, size_t bytes, const char* what, const Place& place);

  bool in_kernel() const { return in_kernel_; }
  Warp& warp() { return *warp_; }
  unsigned lane() const { return lane_; }

  friend void run_thread();

 private:
  void check_launch(unsigned threads, size_t shared_bytes) const;
  std::vector<unsigned> order_of_blocks(unsigned count);
  void run_block();
  void check_behind_shared() const;
  void prepare_shared();
  void release_shared();
  void prepare_threads();
  void run_warps();
  bool run_ready_lanes(unsigned warp);
  void resume(unsigned warp, unsigned lane);
  void exit_thread();
  void open_barrier();
  void perform(Operation operation, unsigned mask);
  std::string describe_deadlock() const;
  std::string launch_text() const;
  std::string block_text() const;
  void throw_failure();
  void destroy_threads();

  std::mutex mutex_;

  // Of the launch.
  Kernel kernel_{};
  const void* parameters_ = nullptr;
  unsigned threads_ = 0;
  size_t shared_bytes_ = 0;
  Random random_{0};
  uint64_t* block_keys_ = nullptr;
  uint64_t* launch_key_ = nullptr;

  // Of the block.
  std::vector<Thread> thread_;
  std::vector<Warp> warps_;
  Pages stacks_, shared_pages_;
  unsigned char* shared_ = nullptr;
  unsigned live_ = 0, at_barrier_ = 0, generation_ = 0;
  bool opened_ = false;
  Place barrier_place_;

  // The thread that runs.
  Warp* warp_ = nullptr;
  unsigned lane_ = 0;
  bool in_kernel_ = false;

  bool failed_ = false;
  std::string failure_;
  std::exception_ptr exception_;
};

Machine machine;

// Bytes behind the shared memory that are watched.
constexpr size_t kWatched = 4096;

std::string symbol_of(const Kernel& kernel) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(kernel.function), &info) == 0 || info.dli_sname == nullptr ||
      info.dli_saddr != reinterpret_cast<void*>(kernel.function))
    return "";
  return info.dli_sname;
}

std::string readable(const std::string& symbol) {
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : symbol;
}

std::string Machine::launch_text() const {
  const std::string symbol = symbol_of(kernel_);
  return "kernel " + (symbol.empty() ? "without an exported name" : readable(symbol));
}

std::string Machine::block_text() const {
  return launch_text() + ", block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ")";
}

void Machine::fail(const std::string& what, const Place& place) {
  if (!in_kernel_) throw Error(what);
  failed_ = true;
  failure_ =
      block_text() + ", thread " + std::to_string(threadIdx.x) + ", " + place.text() + ": " + what;
  release(launch_key_);
  thread_[threadIdx.x].fiber.suspend();
  std::abort();
}

void Machine::check_launch(unsigned threads, size_t shared_bytes) const {
  if (threads == 0 || threads > kMaxThreads)
    throw Error(launch_text() + ": " + std::to_string(threads) +
                " threads in a block, expected 1 to " + std::to_string(kMaxThreads));
  if (shared_bytes > device.shared_bytes)
    throw Error(launch_text() + ": " + std::to_string(shared_bytes) +
                " bytes of shared memory, expected at most " + std::to_string(device.shared_bytes));
}

void Machine::launch(const Kernel& kernel, unsigned blocks, unsigned parts, unsigned threads,
                     size_t shared_bytes, const void* parameters, size_t parameter_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  kernel_ = kernel;
  check_launch(threads, shared_bytes);
  if (recorder != nullptr) {
    const std::string symbol = symbol_of(kernel);
    if (symbol.empty())
      throw Error(launch_text() + " cannot be recorded: no anonymous namespace, not static");
    recorder(symbol.c_str(), blocks, parts, threads, shared_bytes, parameters, parameter_bytes);
    return;
  }

  parameters_ = parameters;
  threads_ = threads;
  shared_bytes_ = shared_bytes;
  random_ = Random(schedule.seed);
  blockDim = dim3(threads);
  gridDim = dim3(blocks, parts);
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  if (thread_.size() < threads) thread_.resize(threads);
  warps_.resize(warps);
  stacks_.reserve(threads * kStackBytes);

  const std::vector<unsigned> order = order_of_blocks(blocks * parts);
  // For ThreadSanitizer each block has its own keys, so that nothing orders the accesses of two.
  const size_t keys_of_block = 2 + 2 * warps;
  std::vector<uint64_t> keys(1 + (kThreadSanitizer ? order.size() : 1) * keys_of_block);
  launch_key_ = keys.data();
  for (size_t i = 0; i < order.size(); ++i) {
    blockIdx.x = order[i] % blocks;
    blockIdx.y = order[i] / blocks;
    block_keys_ = keys.data() + 1 + (kThreadSanitizer ? i : 0) * keys_of_block;
    run_block();
  }
  acquire(launch_key_);
}

std::vector<unsigned> Machine::order_of_blocks(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kShuffled)
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
  return order;
}

void Machine::run_block() {
  prepare_shared();
  prepare_threads();
  run_warps();
  destroy_threads();
  if (failed_) {
    acquire(launch_key_);
    // Threads that are not going to end leave their frames behind.
    allow(stacks_.data(), threads_ * kStackBytes);
    release_shared();
    throw_failure();
  }
  if (!kAddressSanitizer) check_behind_shared();
  release_shared();
}

void Machine::check_behind_shared() const {
  for (size_t i = shared_bytes_; i < shared_bytes_ + kWatched; ++i)
    if (shared_[i] != kUnwritten)
      throw Error(block_text() + ": byte " + std::to_string(i) +
                  " of shared memory is written, the launch asked for " +
                  std::to_string(shared_bytes_));
}

void Machine::throw_failure() {
  failed_ = false;
  if (exception_ != nullptr) {
    const std::exception_ptr exception = exception_;
    exception_ = nullptr;
    std::rethrow_exception(exception);
  }
  throw Error(failure_);
}

void Machine::prepare_shared() {
  if (kAddressSanitizer) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kSharedAlignment, std::max<size_t>(shared_bytes_, 1)) != 0)
      throw std::bad_alloc();
    shared_ = static_cast<unsigned char*>(memory);
    std::memset(shared_, kUnwritten, shared_bytes_);
  } else {
    shared_pages_.reserve(shared_bytes_ + kWatched);
    if (kThreadSanitizer) shared_pages_.renew();
    shared_ = shared_pages_.data();
    std::memset(shared_, kUnwritten, shared_bytes_ + kWatched);
  }
}

void Machine::release_shared() {
  if (kAddressSanitizer) {
    allow(shared_, shared_bytes_);
    std::free(shared_);
  }
  shared_ = nullptr;
}

void Machine::prepare_threads() {
  if (kThreadSanitizer) stacks_.renew();
  live_ = threads_;
  at_barrier_ = 0;
  generation_ = 0;
  for (unsigned w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    const unsigned lanes = std::min(kWarp, threads_ - w * kWarp);
    warp.existing = lanes == kWarp ? kWholeWarp : bit_of(lanes) - 1;
    warp.ready = warp.existing;
    warp.exited = warp.at_barrier = warp.generation = 0;
    warp.keys = block_keys_ + 2 + 2 * w;
    warp.collectives.clear();
  }
  for (unsigned t = 0; t < threads_; ++t) {
    thread_[t].copies.clear();
    thread_[t].group_ends.clear();
    const size_t bytes = kStackBytes - t % kColours * kColourBytes;
    thread_[t].fiber.start({stacks_.data() + t * kStackBytes, bytes}, run_thread);
  }
}

void Machine::destroy_threads() {
  for (unsigned t = 0; t < threads_; ++t) thread_[t].fiber.destroy();
}

void run_thread() {
  try {
    machine.kernel_.call(machine.kernel_.function, machine.parameters_);
  } catch (...) {
    machine.failed_ = true;
    machine.exception_ = std::current_exception();
  }
  if (!machine.failed_) machine.exit_thread();
  release(machine.launch_key_);
  machine.thread_[threadIdx.x].fiber.finish();
}

void Machine::resume(unsigned warp, unsigned lane) {
  warp_ = &warps_[warp];
  lane_ = lane;
  threadIdx.x = warp * kWarp + lane;
  warp_->ready &= ~bit_of(lane);
  in_kernel_ = true;
  thread_[threadIdx.x].fiber.resume();
  in_kernel_ = false;
}

// Runs each lane that is ready until it waits; false where the launch has to end or a barrier
// opened.
bool Machine::run_ready_lanes(unsigned warp) {
  unsigned lanes = warps_[warp].ready;
  while (lanes != 0) {
    unsigned lane;
    if (schedule.order == Order::kForward) {
      lane = lowest_bit(lanes);
    } else if (schedule.order == Order::kReverse) {
      lane = highest_bit(lanes);
    } else {
      const unsigned start = random_.below(kWarp);
      const unsigned from_start = lanes & ~(bit_of(start) - 1);
      lane = lowest_bit(from_start != 0 ? from_start : lanes);
    }
    lanes &= ~bit_of(lane);
    resume(warp, lane);
    if (failed_) return false;
    if (opened_) {
      opened_ = false;
      return false;
    }
  }
  return true;
}

// A warp runs as far as it can before another one does, so that what lacks a barrier is far from
// what it should wait for; shuffled, warps take turns.
void Machine::run_warps() {
  const unsigned warps = static_cast<unsigned>(warps_.size());
  while (live_ > 0) {
    bool ran = false;
    if (schedule.order == Order::kShuffled) {
      const unsigned start = random_.below(warps);
      for (unsigned i = 0; i < warps && !ran; ++i) {
        const unsigned warp = (start + i) % warps;
        if (warps_[warp].ready == 0) continue;
        ran = true;
        run_ready_lanes(warp);
      }
    } else {
      for (unsigned i = 0; i < warps; ++i) {
        const unsigned warp = schedule.order == Order::kForward ? i : warps - 1 - i;
        bool going = true;
        while (going && warps_[warp].ready != 0) {
          ran = true;
          going = run_ready_lanes(warp);
        }
        if (!going) break;
      }
    }
    if (failed_) return;
    if (!ran) {
      failed_ = true;
      failure_ = describe_deadlock();
      return;
    }
  }
}

std::string Machine::describe_deadlock() const {
  std::string text = block_text() + ": threads wait for each other for ever";
  for (unsigned w = 0; w < warps_.size(); ++w) {
    const Warp& warp = warps_[w];
    const unsigned first = w * kWarp;
    if (warp.at_barrier != 0)
      text += "; threads " + lanes_text(warp.at_barrier, first) + " at __syncthreads, " +
              barrier_place_.text();
    for (const Collective& collective : warp.collectives)
      text += "; threads " + lanes_text(collective.arrived, first) + " at " +
              name_of(collective.operation) + ", " + collective.place.text() + ", for threads " +
              lanes_text(collective.mask & ~collective.arrived, first);
  }
  return text;
}

void Machine::exit_thread() {
  Warp& warp = *warp_;
  const unsigned me = bit_of(lane_);
  for (const Collective& collective : warp.collectives)
    if ((collective.mask & me) != 0)
      fail(std::string("the thread has exited, and threads ") +
               lanes_text(collective.arrived, threadIdx.x - lane_) + " wait for it at " +
               name_of(collective.operation),
           collective.place);
  if (at_barrier_ > 0)
    fail("the thread has exited, and " + std::to_string(at_barrier_) +
             " threads wait for all at __syncthreads",
         barrier_place_);
  warp.exited |= me;
  --live_;
}

void Machine::synchronize_block(const Place& place) {
  Warp& warp = *warp_;
  if (live_ < threads_)
    fail("__syncthreads, but " + std::to_string(threads_ - live_) + " threads have exited", place);
  if (at_barrier_ == 0)
    barrier_place_ = place;
  else if (place != barrier_place_)
    fail("__syncthreads, while " + std::to_string(at_barrier_) + " threads wait at another one, " +
             barrier_place_.text(),
         place);
  void* key = block_keys_ + generation_ % 2;
  release(key);
  warp.at_barrier |= bit_of(lane_);
  ++at_barrier_;
  if (at_barrier_ == threads_) open_barrier();
  thread_[threadIdx.x].fiber.suspend();
  acquire(key);
}

void Machine::open_barrier() {
  for (Warp& warp : warps_) {
    warp.ready = warp.at_barrier;
    warp.at_barrier = 0;
  }
  at_barrier_ = 0;
  ++generation_;
  opened_ = true;
}

void Machine::collect(Operation operation, unsigned mask, const Place& place) {
  Warp& warp = *warp_;
  const unsigned me = bit_of(lane_);
  const unsigned first = threadIdx.x - lane_;
  if ((mask & me) == 0)
    fail(std::string(name_of(operation)) + ", whose mask lacks the thread's own lane", place);
  if ((mask & ~warp.existing) != 0)
    fail(std::string(name_of(operation)) + " for threads " +
             lanes_text(mask & ~warp.existing, first) + ", which the block does not have",
         place);
  if ((mask & warp.exited) != 0)
    fail(std::string(name_of(operation)) + " for threads " + lanes_text(mask & warp.exited, first) +
             ", which have exited",
         place);

  Collective& collective =
      warp.collectives.with({mask, 0, operation, place, warp.keys + warp.generation % 2});
  if (collective.operation != operation || place != collective.place)
    fail(std::string(name_of(operation)) + ", while threads " +
             lanes_text(collective.arrived, first) + " are at " + name_of(collective.operation) +
             ", " + collective.place.text(),
         place);
  void* key = collective.key;
  const bool orders_memory = operation == Operation::kSynchronize;
  if (orders_memory) release(key);
  collective.arrived |= me;
  if (collective.arrived == mask) {
    warp.collectives.remove(collective);
    if (orders_memory) ++warp.generation;
    perform(operation, mask);
    warp.ready |= mask & ~me;
  } else {
    thread_[threadIdx.x].fiber.suspend();
  }
  if (orders_memory) acquire(key);
}

void Machine::perform(Operation operation, unsigned mask) {
  Warp& warp = *warp_;
  switch (operation) {
    case Operation::kSynchronize:
      break;
    case Operation::kExchange:
      for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
        const unsigned lane = lowest_bit(lanes);
        warp.results[lane] = warp.values[warp.sources[lane]];
      }
      break;
    case Operation::kLoadMatrices:
      load_rows(warp.rows.data(), warp.fragments.data());
      break;
    case Operation::kLoadMatricesTransposed:
      load_columns(warp.rows.data(), warp.fragments.data());
      break;
    case Operation::kMultiplyAddFloat16:
      multiply_float16(warp.operands);
      break;
    case Operation::kMultiplyAddBFloat16:
      multiply_bfloat16(warp.operands);
      break;
  }
}

void Machine::check_shared(const void* address, size_t bytes, const char* what,
                           const Place& place) {
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared_);
  if (offset % kVectorBytes != 0)
    fail(std::string(what) + " is misaligned: byte " +
             std::to_string(static_cast<intptr_t>(offset)) + " of shared memory",
         place);
  if (offset > shared_bytes_ || shared_bytes_ - offset < bytes)
    fail(std::string(what) + " is outside of shared memory: byte " +
             std::to_string(static_cast<intptr_t>(offset)) + " of " + std::to_string(shared_bytes_),
         place);
}

void Machine::copy(void* shared, const void* global, bool exists, const Place& place) {
  check_shared(shared, kVectorBytes, "the target of copy_async_16", place);
  if (reinterpret_cast<uintptr_t>(global) % kVectorBytes != 0)
    fail("the source of copy_async_16 is misaligned", place);
  // From here on the place may change at any time.
  note_write(shared, kVectorBytes);
  if (exists) note_read(global, kVectorBytes);

  const Unobserved unobserved;
  Copy copy{static_cast<unsigned char*>(shared), exists ? global : nullptr, {}};
  if (exists) std::memcpy(copy.data, global, kVectorBytes);
  thread_[threadIdx.x].copies.push_back(copy);
  allow(shared, kVectorBytes);
  std::memset(shared, kUnwritten, kVectorBytes);
  forbid(shared, kVectorBytes);
}

void Machine::commit() {
  const Unobserved unobserved;
  Thread& thread = thread_[threadIdx.x];
  thread.group_ends.push_back(thread.copies.size());
}

void Machine::complete(unsigned pending) {
  Thread& thread = thread_[threadIdx.x];
  if (thread.group_ends.size() <= pending) return;
  const size_t groups = thread.group_ends.size() - pending;
  const size_t end = thread.group_ends[groups - 1];
  for (size_t i = 0; i < end; ++i) {
    const Copy& copy = thread.copies[i];
    if (copy.global != nullptr) note_read(copy.global, kVectorBytes);
    note_write(copy.shared, kVectorBytes);
  }

  const Unobserved unobserved;
  for (size_t i = 0; i < end; ++i) {
    const Copy& copy = thread.copies[i];
    allow(copy.shared, kVectorBytes);
    std::memcpy(copy.shared, copy.data, kVectorBytes);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(end));
  thread.group_ends.erase(thread.group_ends.begin(),
                          thread.group_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& group_end : thread.group_ends) group_end -= end;
}

void load(Operation operation, uint32_t* fragment, const void* row, const Place& place) {
  machine.check_shared(row, kVectorBytes, "a row of load_matrices", place);
  note_read(row, kVectorBytes);
  Warp& warp = machine.warp();
  warp.rows[machine.lane()] = row;
  warp.fragments[machine.lane()] = fragment;
  machine.collect(operation, kWholeWarp, place);
}

void multiply(Operation operation, float* sums, const uint32_t* a, uint32_t b0, uint32_t b1,
              const Place& place) {
  MatrixOperands& operands = machine.warp().operands;
  const unsigned lane = machine.lane();
  operands.sums[lane] = sums;
  operands.a[lane] = a;
  operands.b[lane][0] = b0;
  operands.b[lane][1] = b1;
  machine.collect(operation, kWholeWarp, place);
}

}  // namespace

const Device& device() { return machine.device; }

bool in_kernel() { return machine.in_kernel(); }

unsigned char* shared_memory() { return machine.shared(); }

void fail(const char* what, const char* file, int line) { machine.fail(what, {file, line}); }

void synchronize_block(const char* file, int line) { machine.synchronize_block({file, line}); }

void synchronize_warp(unsigned mask, const char* file, int line) {
  machine.collect(Operation::kSynchronize, mask, {file, line});
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* file, int line) {
  Warp& warp = machine.warp();
  const unsigned lane = machine.lane();
  if (source >= kWarp || (mask & bit_of(source)) == 0)
    machine.fail("a shuffle reads lane " + std::to_string(source) + ", which is not in its mask",
                 {file, line});
  warp.values[lane] = value;
  warp.sources[lane] = source;
  machine.collect(Operation::kExchange, mask, {file, line});
  return warp.results[lane];
}

void copy_async_16(void* shared, const void* global, bool exists, const char* file, int line) {
  machine.copy(shared, global, exists, {file, line});
}

void copy_async_commit() { machine.commit(); }

void complete_copies(unsigned pending) { machine.complete(pending); }

void load_matrices(uint32_t (&fragment)[4], const void* row, const char* file, int line) {
  load(Operation::kLoadMatrices, fragment, row, {file, line});
}

void load_matrices_transposed(uint32_t (&fragment)[4], const void* row, const char* file,
                              int line) {
  load(Operation::kLoadMatricesTransposed, fragment, row, {file, line});
}

void multiply_add_float16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          const char* file, int line) {
  multiply(Operation::kMultiplyAddFloat16, sums, a, b0, b1, {file, line});
}

void multiply_add_bfloat16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           const char* file, int line) {
  multiply(Operation::kMultiplyAddBFloat16, sums, a, b0, b1, {file, line});
}

void launch(const Kernel& kernel, unsigned blocks, unsigned parts, unsigned threads,
            size_t shared_bytes, const void* parameters, size_t parameter_bytes) {
  machine.launch(kernel, blocks, parts, threads, shared_bytes, parameters, parameter_bytes);
}

}  // namespace emulation

void emulation_set_schedule(int order, uint64_t seed) {
  emulation::machine.schedule = {static_cast<emulation::Order>(order), seed};
}

void emulation_set_recorder(EmulationRecorder recorder) { emulation::machine.recorder = recorder; }

void emulation_set_device(int architecture, int multiprocessors, int shared_bytes) {
  emulation::machine.device = {architecture, multiprocessors, static_cast<size_t>(shared_bytes)};
}
