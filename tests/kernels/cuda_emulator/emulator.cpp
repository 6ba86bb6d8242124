// SPDX-License-Identifier: BSD-3-Clause
// The scheduler: a block's threads as fibers, one at a time, the next one drawn from a seed.
#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <climits>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace masked_loss::cuda {
// As csrc/kernels/cuda/launch.cuh declares it. Larger than what the settings allow a block to ask
// for.
extern thread_local uint4 shared_memory[];
constexpr size_t kSharedPieces = (256 << 10) / sizeof(uint4);
thread_local uint4 shared_memory[kSharedPieces];
}  // namespace masked_loss::cuda

dim3 threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
extern "C" void masked_loss_switch(void** from, void* to);
#endif

namespace emulator {

Settings settings;
int64_t launches = 0;
std::vector<Launch> recorded;
std::string conflict;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr char kUnwritten = 0x7f;
constexpr size_t kBeyond = 1 << 10;  // bytes behind a block's shared memory that are looked at
constexpr int kWarp = 32;

// Contexts. On x86-64 by hand: swapcontext asks the system for the signal mask at each switch.
#if defined(__x86_64__)
using Context = void*;  // the stack pointer

asm(R"(
.text
.local masked_loss_switch
.type masked_loss_switch, @function
masked_loss_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size masked_loss_switch, .-masked_loss_switch
)");

void switch_context(Context* from, Context* to) { masked_loss_switch(from, *to); }
void make_context(Context* context, char* stack, void (*entry)()) {
  // What the switch pops: six registers, the entry, and an aligned stack with no caller.
  void** top = reinterpret_cast<void**>(stack + kStack) - 3;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  *context = top - 6;
}
#else
using Context = ucontext_t;

void switch_context(Context* from, Context* to) { swapcontext(from, to); }
void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  makecontext(context, entry, 0);
}
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;
  bool done = true;
  void* shadow = nullptr;  // of the address sanitizer
};

// Lanes that wait for each other, and the words they bring. Two sets in turn: a fast lane may bring
// its next word before a slow one has read the last.
struct Warp {
  uint32_t words[2][kWarp];
  int turn = 0;
  int64_t barriers = 0;
  unsigned alive = 0, arrived = 0;  // a bit for each lane
  WarpCall call;                    // that they wait at
  unsigned mask;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<int> ready, at_barrier;
std::vector<std::vector<int>> at_warp;
int current = -1, alive = 0;
int64_t block_barriers = 0;  // of all blocks
Context scheduler;
const std::function<void()>* running = nullptr;
std::exception_ptr error;
std::mt19937_64 random;
std::map<std::pair<const void*, int>, int> allowed_shared;  // by kernel and device
std::vector<uint64_t> priority;  // of the block's warps, where some run ahead of others

// A block of a cluster, while another one runs: all of the above that is its own.
struct Parked {
  unsigned index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> ready, at_barrier;
  std::vector<std::vector<int>> at_warp;
  std::vector<uint64_t> priority;
  int alive = 0;
  std::vector<char> shared;
};
std::vector<int> at_cluster;  // threads of the running block that wait for its cluster
unsigned cluster_size = 1;
int64_t cluster_barriers = 0;  // of all clusters

char* make_stack() {
  void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

// The address sanitizer wants to know of each change of stacks, and from which one it came.
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#if defined(__SANITIZE_ADDRESS__)
void before_switch(void** shadow, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(shadow, stack, size);
}
void after_switch(void* shadow, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(shadow, from, size);
}
void forget_frames(const Fiber& fiber) { __asan_unpoison_memory_region(fiber.stack, kStack); }
#else
void before_switch(void**, const void*, size_t) {}
void after_switch(void*, const void**, size_t*) {}
void forget_frames(const Fiber&) {}
#endif

void yield() {
  Fiber& fiber = fibers[current];
  before_switch(fiber.done ? nullptr : &fiber.shadow, scheduler_stack, scheduler_stack_size);
  switch_context(&fiber.context, &scheduler);
  after_switch(fiber.shadow, &scheduler_stack, &scheduler_stack_size);
}

void resume(Fiber* fiber) {
  void* shadow = nullptr;
  before_switch(&shadow, fiber->stack, kStack);
  switch_context(&scheduler, &fiber->context);
  after_switch(shadow, nullptr, nullptr);
}

void release(std::vector<int>* waiting) {
  ready.insert(ready.end(), waiting->begin(), waiting->end());
  waiting->clear();
}

void release_block() {
  ++block_barriers;
  release(&at_barrier);
}

void release_warp(int warp) {
  warps[warp].barriers += warps[warp].call == WarpCall::kBarrier;
  warps[warp].turn ^= 1;
  warps[warp].arrived = 0;
  release(&at_warp[warp]);
}

void enter() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  try {
    (*running)();
  } catch (...) {
    error = std::current_exception();
  }
  Warp& warp = warps[current / kWarp];
  const unsigned self = 1u << current % kWarp;
  fibers[current].done = true;
  --alive;
  warp.alive &= ~self;
  if (!error && warp.arrived && (warp.mask & self)) {
    error = std::make_exception_ptr(std::runtime_error("a lane left, and others wait for it"));
  }
  if (alive && static_cast<int>(at_barrier.size()) == alive) release_block();
  yield();
}

// Even seeds: any thread. Odd ones: a thread of the warp that is ahead, as far as it can get. The
// first finds what is read too early, the second what is overwritten too early.
size_t next_to_run() {
  size_t pick = random() % ready.size();
  if (settings.seed % 2 == 0) return pick;
  for (size_t i = 0; i < ready.size(); ++i) {
    if (priority[ready[i] / kWarp] > priority[ready[pick] / kWarp]) pick = i;
  }
  return pick;
}

char* dynamic_shared() { return reinterpret_cast<char*>(masked_loss::cuda::shared_memory); }

// What nobody wrote must not look like anything, and what a block did not ask for stays unwritten.
void start_block(int threads, size_t shared_bytes) {
  memset(dynamic_shared(), kUnwritten, shared_bytes + kBeyond);
  fibers.resize(std::max<size_t>(fibers.size(), threads));
  ready.resize(threads);
  at_barrier.clear();
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  at_warp.assign(warps.size(), {});
  alive = threads;
  for (int i = 0; i < threads; ++i) {
    ready[i] = i;
    warps[i / kWarp].alive |= 1u << i % kWarp;
    if (!fibers[i].stack) fibers[i].stack = make_stack();
    fibers[i].done = false;
    forget_frames(fibers[i]);
    make_context(&fibers[i].context, fibers[i].stack, enter);
  }
  priority.assign(warps.size(), 0);
  if (settings.seed % 2) {
    for (uint64_t& p : priority) p = random();
  }
}

// As far as its threads get.
void continue_block() {
  ++block_barriers;  // what was before it, of this block or another, lies behind
  while (!ready.empty() && !error) {
    const size_t pick = next_to_run();
    current = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    threadIdx = dim3(current, 0, 0);
    resume(&fibers[current]);
  }
  current = -1;
  if (!error && !conflict.empty()) fail(std::exchange(conflict, {}).c_str());
}

void end_block(size_t shared_bytes) {
  if (alive) fail("deadlock: some threads wait at a barrier or shuffle that others never reach");
  for (size_t i = 0; i < kBeyond; ++i) {
    if (dynamic_shared()[shared_bytes + i] != kUnwritten) {
      fail("a block wrote beyond its shared memory");
    }
  }
}

// Puts the running block aside for a parked one, or the other way round.
void exchange_with(Parked* block) {
  const Range range = shared_range();
  char* const shared = reinterpret_cast<char*>(range.begin);
  block->shared.resize(range.end - range.begin);
  std::swap_ranges(block->shared.begin(), block->shared.end(), shared);
  std::swap(block->fibers, fibers);
  std::swap(block->warps, warps);
  std::swap(block->ready, ready);
  std::swap(block->at_barrier, at_barrier);
  std::swap(block->at_warp, at_warp);
  std::swap(block->priority, priority);
  std::swap(block->alive, alive);
}

// A parked block runs, until an exception or the end of the scope. What else is thread-local here
// must be back in its place by then.
struct Unparked {
  Parked* block;
  explicit Unparked(Parked* block) : block(block) { exchange_with(block); }
  ~Unparked() { exchange_with(block); }
};

void run_cluster(unsigned first, int threads, size_t shared_bytes) {
  static std::vector<Parked> blocks;  // whose fibers keep their stacks
  blocks.resize(std::max<size_t>(blocks.size(), cluster_size));
  std::vector<unsigned> order(cluster_size);
  for (unsigned i = 0; i < cluster_size; ++i) order[i] = i;
  bool started = false;
  for (bool waiting = true; waiting && !error;) {
    waiting = false;
    bool all = true;
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      blockIdx = dim3(first + i, 0, 0);
      const Unparked unparked(&blocks[i]);
      if (!started) start_block(threads, shared_bytes);
      at_cluster.clear();
      continue_block();
      waiting |= !at_cluster.empty();
      all &= !at_cluster.empty() && static_cast<int>(at_cluster.size()) == alive;
      if (at_cluster.empty() && !error) end_block(shared_bytes);
      ready = at_cluster;
      if (error) return;
    }
    started = true;
    ++cluster_barriers;
    if (waiting && !all) fail("deadlock: some blocks wait for others of their cluster");
  }
}

}  // namespace

namespace {

int device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

// What every kernel may take without being allowed to.
int unasked() { return std::min(settings.shared_per_block, 48 << 10) - kStaticShared; }

}  // namespace

void allow_shared(const void* kernel, int bytes) { allowed_shared[{kernel, device()}] = bytes; }

int least_shared_allowed() {
  int least = INT_MAX;
  for (const auto& [key, bytes] : allowed_shared) {
    if (key.second == device()) least = std::min(least, bytes);
  }
  return least;
}

void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
         const std::function<void()>& body) {
  ++launches;
  if (block.x == 0 || block.x > 1024 || grid.x == 0) fail("a launch of no or too many threads");
  if (grid.x % cluster || (cluster > 1 && !settings.clusters)) fail("a launch of broken clusters");
  const auto allowed = allowed_shared.find({kernel, device()});
  const int most = allowed == allowed_shared.end() ? unasked() : allowed->second;
  if (static_cast<int64_t>(shared_bytes) > std::max(0, most)) {
    fail("a launch with more shared memory than the kernel was allowed to take");
  }
  grid.x = static_cast<unsigned>(std::min<int64_t>(grid.x, settings.max_blocks));
  grid.x = std::max(grid.x / cluster, 1u) * cluster;
  gridDim = grid;
  blockDim = block;
  cluster_size = cluster;
  running = &body;
  error = nullptr;
  random.seed(settings.seed);
  std::vector<unsigned> order(grid.x / cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i * cluster;
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned i : order) {
    blockIdx = dim3(i, 0, 0);
    if (cluster > 1) {
      run_cluster(i, static_cast<int>(block.x), shared_bytes);
    } else {
      start_block(static_cast<int>(block.x), shared_bytes);
      continue_block();
      if (!error) end_block(shared_bytes);
    }
    if (error) std::rethrow_exception(error);
  }
}

void block_barrier() {
  at_barrier.push_back(current);
  if (static_cast<int>(at_barrier.size()) == alive) release_block();
  yield();
}

void cluster_barrier() {
  if (cluster_size == 1) fail("a block waits for a cluster, and is in none");
  at_cluster.push_back(current);
  yield();
}

int64_t barriers_of_block() { return block_barriers; }
int64_t barriers_of_cluster() { return cluster_barriers; }
int cluster_of_block() { return static_cast<int>(blockIdx.x / cluster_size); }

Range shared_range() {
  Range found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const auto self = reinterpret_cast<uintptr_t>(&shared_range);
        bool ours = false;
        size_t size = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD) ours |= begin <= self && self < begin + header.p_memsz;
          if (header.p_type == PT_TLS) size = header.p_memsz;
        }
        if (!ours || !info->dlpi_tls_data) return 0;
        const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
        *static_cast<Range*>(result) = {begin, begin + size};
        return 1;
      },
      &found);
  return found;
}

int64_t barriers_of_warp() { return warps[current / kWarp].barriers; }

bool is_missing(const char* file, int line) {
  if (settings.missing_barrier.empty()) return false;
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ':' + std::to_string(line) == settings.missing_barrier;
}

int lane() { return current % kWarp; }

bool in_kernel() { return current >= 0; }
bool on_stack(const void* p) {
  const char* const stack = fibers[current].stack;
  return stack <= p && p < stack + kStack;
}

void meet(WarpCall call, unsigned mask) {
  const int index = current / kWarp;
  Warp& warp = warps[index];
  if (!(mask >> lane() & 1)) fail("a lane makes a call whose mask leaves it out");
  if (mask & ~warp.alive) fail("a mask names a lane that has left, or never was");
  if (warp.arrived && (warp.call != call || warp.mask != mask)) {
    fail("lanes of a warp wait at different calls");
  }
  warp.call = call;
  warp.mask = mask;
  warp.arrived |= 1u << lane();
  at_warp[index].push_back(current);
  if (warp.arrived == mask) release_warp(index);
  yield();
}

uint32_t shuffle(WarpCall call, unsigned mask, uint32_t word, int source) {
  Warp& warp = warps[current / kWarp];
  const int turn = warp.turn;
  warp.words[turn][lane()] = word;
  meet(call, mask);
  if (!(mask >> source & 1)) fail("a lane wants the word of one that the mask leaves out");
  return warp.words[turn][source];
}

void fail(const char* what) {
  fflush(stdout);
  throw std::runtime_error(what);
}

void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned address");
}

}  // namespace emulator
