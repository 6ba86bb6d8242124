// SPDX-License-Identifier: BSD-3-Clause
// Replays what warps issue (cuda_trace.py) on a few multiprocessors that share memory, clock by
// clock: four schedulers with the stalls and scoreboards that ptxas encoded, the pipes, a queue
// before the load and store unit, latencies of L1, L2 and DRAM, and a DRAM that moves so many bytes
// a clock. What cuda_model.py says of it beforehand: which loads find in the L2 what was read
// before. What it leaves out: DRAM pages, the last wave.
//
// Input: "P name value", the machine; "T" and a line for each step, a trace; "B t t t", the traces
// of a block's warps; "R blocks resident", the run. Output: clocks for each block once it is
// steady, and the share of the issue slots that were used.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <queue>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

// As in cuda_model.py.
enum Unit { kNone, kAlu, kFma, kHeavy, kMufu, kFp64, kLoad, kStore, kBarrier, kShuffle, kSpecial };
enum Level { kNowhere, kShared, kL1, kL2, kDram };

struct Step {
  int stall, waits, sets, reads, unit, level, bytes;
};
using Trace = std::vector<Step>;

struct Machine {
  std::map<std::string, double> value = {
      {"multiprocessors", 4},  // simulated, with their share of the memory
      {"bytes", 11.7},         // that DRAM moves in a clock, for one multiprocessor
      {"dram", 900},           // clocks until a load from DRAM is there, beside its turn
      {"l2", 264},
      {"l2_bytes", 28},
      {"l1", 38},
      {"start", 250},         // clocks from one block to the next in its place
      {"store_buffer", 400},  // clocks by which a store may run ahead of DRAM
      {"queue", 24},          // clocks of work that wait for the load and store unit
  };
  double operator[](const char* name) const { return value.at(name); }
};

constexpr double kMufuClocks = 8, kMufuLatency = 26, kFp64Clocks = 2, kFp64Latency = 16;
constexpr double kSharedLatency = 28, kShuffleLatency = 23, kSpecialLatency = 28;
constexpr double kBarrierLatency = 20, kOperandsRead = 12;
constexpr int kSchedulers = 4, kScoreboards = 6;

struct Warp {
  int trace = 0;
  size_t at = 0;
  double ready = 0;
  int busy[kScoreboards] = {};
  bool done = true, waiting = false;
};

struct Slot {  // of a resident block
  bool used = false;
  int alive = 0, waiting = 0;
};

struct Release {
  double when;
  int warp, scoreboard, generation;
  bool operator<(const Release& other) const { return when > other.when; }
};

// One multiprocessor's units, each busy until then; those of arithmetic for each scheduler.
struct Units {
  double alu[kSchedulers] = {}, fma[kSchedulers] = {}, heavy[kSchedulers] = {};
  double mufu[kSchedulers] = {}, fp64[kSchedulers] = {};
  double lsu = 0, l2 = 0;
};

class Simulation {
 public:
  Simulation(const Machine& machine, const std::vector<Trace>& traces, std::vector<int> block,
             int blocks, int resident)
      : m_(machine),
        traces_(traces),
        block_(std::move(block)),
        blocks_(blocks),
        multiprocessors_(static_cast<int>(machine["multiprocessors"])),
        resident_(resident),
        slots_(static_cast<size_t>(resident) * multiprocessors_),
        warps_(slots_.size() * block_.size()),
        generation_(slots_.size(), 0),
        units_(multiprocessors_),
        last_(kSchedulers * multiprocessors_, 0),
        bytes_(machine["bytes"] * multiprocessors_) {
    for (const int t : block_) steps_of_block_ += static_cast<double>(traces_[t].size());
  }

  void run() {
    std::mt19937 random(1);
    for (size_t s = 0; s < slots_.size(); ++s) start(static_cast<int>(s), random() % 2000);
    while (finished_ < blocks_) {
      while (!releases_.empty() && releases_.top().when <= now_) {
        const Release r = releases_.top();
        releases_.pop();
        if (r.generation == generation_[slot_of(r.warp)]) --warps_[r.warp].busy[r.scoreboard];
      }
      next_ = 1e18;
      bool any = false;
      for (int s = 0; s < kSchedulers * multiprocessors_; ++s) any |= issue(s);
      if (issued_ < steps_of_block_ * blocks_ / 4) since_ = now_;
      if (issued_ < steps_of_block_ * blocks_ * 3 / 4) until_ = now_;
      if (any) {
        now_ += 1;
      } else {
        if (!releases_.empty()) next_ = std::min(next_, releases_.top().when);
        if (next_ > 1e17) {
          std::fprintf(stderr, "cuda_model: the warps wait for each other\n");
          std::exit(1);
        }
        now_ = std::max(now_ + 1, std::ceil(next_));
      }
    }
    // From a quarter of all steps to three quarters: half of the blocks' work.
    const double clocks = (until_ - since_) / (blocks_ / 2.0) * multiprocessors_;
    std::printf("%.1f %.4f\n", clocks, steps_of_block_ / clocks / kSchedulers);
  }

 private:
  int slot_of(int warp) const { return warp / static_cast<int>(block_.size()); }

  void start(int slot, double when) {
    if (started_ == blocks_) {
      slots_[slot].used = false;
      return;
    }
    ++started_;
    ++generation_[slot];
    slots_[slot] = {true, static_cast<int>(block_.size()), 0};
    for (size_t i = 0; i < block_.size(); ++i) {
      Warp warp;
      warp.trace = block_[i];
      warp.ready = when;
      warp.done = false;
      warps_[slot * block_.size() + i] = warp;
    }
  }

  // Whether a unit takes this step now; else when to ask again.
  bool free(const Units& u, int scheduler, const Step& step) {
    double until = 0;
    if (step.unit == kAlu) until = u.alu[scheduler];
    if (step.unit == kFma) until = u.fma[scheduler];
    if (step.unit == kHeavy) until = std::max(u.fma[scheduler], u.heavy[scheduler]);
    if (step.unit == kMufu) until = u.mufu[scheduler];
    if (step.unit == kFp64) until = u.fp64[scheduler];
    if (step.unit == kLoad || step.unit == kStore) until = u.lsu - m_["queue"];
    if (until <= now_) return true;
    next_ = std::min(next_, until);
    return false;
  }

  bool issue(int s) {
    const int multiprocessor = s / kSchedulers, scheduler = s % kSchedulers;
    const int count = resident_ * static_cast<int>(block_.size());
    const int first = multiprocessor * count;
    Units& u = units_[multiprocessor];
    for (int j = 0; j < count; ++j) {  // the last one goes on as long as it can
      const int i = (last_[s] + j) % count;
      if (i % kSchedulers != scheduler) continue;
      Warp& warp = warps_[first + i];
      if (warp.done || warp.waiting) continue;
      const Step& step = traces_[warp.trace][warp.at];
      if (warp.ready > now_) {
        next_ = std::min(next_, warp.ready);
        continue;
      }
      bool blocked = false;
      for (int b = 0; b < kScoreboards; ++b) blocked |= (step.waits >> b & 1) && warp.busy[b] > 0;
      if (blocked || !free(u, scheduler, step)) continue;
      last_[s] = i;
      execute(first + i, u, scheduler, step);
      return true;
    }
    return false;
  }

  void execute(int index, Units& u, int scheduler, const Step& step) {
    ++issued_;
    Warp& warp = warps_[index];
    double written = now_ + 20, read = now_ + kOperandsRead;
    const int pieces = std::max(1, step.bytes / 64);  // clocks of the load and store unit
    switch (step.unit) {
      case kAlu:
        u.alu[scheduler] = now_ + 2;
        break;
      case kFma:
        u.fma[scheduler] = now_ + 1;
        break;
      case kHeavy:
        u.heavy[scheduler] = now_ + 2;
        break;
      case kMufu:
        u.mufu[scheduler] = now_ + kMufuClocks;
        written = now_ + kMufuLatency;
        break;
      case kFp64:
        u.fp64[scheduler] = now_ + kFp64Clocks;
        written = now_ + kFp64Latency;
        break;
      case kShuffle:
        u.lsu = std::max(u.lsu, now_) + 1;
        written = u.lsu + kShuffleLatency;
        break;
      case kSpecial:
        written = now_ + kSpecialLatency;
        break;
      case kLoad:
        written = loaded(u, step, pieces);
        read = std::max(now_ + kOperandsRead, u.lsu);
        break;
      case kStore:
        read = stored(u, step, pieces);
        break;
      default:
        break;
    }
    if (step.sets >= 0) take(index, step.sets, written);
    if (step.reads >= 0) take(index, step.reads, read);
    warp.ready = now_ + std::max(1, step.stall);
    ++warp.at;
    Slot& slot = slots_[slot_of(index)];
    if (step.unit == kBarrier) {
      warp.waiting = true;
      ++slot.waiting;
    }
    if (warp.at == traces_[warp.trace].size()) {
      warp.done = true;
      --slot.alive;
    }
    if (slot.alive == 0) {
      ++finished_;
      start(slot_of(index), now_ + m_["start"]);
    } else if (slot.waiting == slot.alive) {
      slot.waiting = 0;
      const size_t begin = slot_of(index) * block_.size();
      for (size_t i = begin; i < begin + block_.size(); ++i) {
        if (!warps_[i].waiting) continue;
        warps_[i].waiting = false;
        warps_[i].ready = now_ + kBarrierLatency;
      }
    }
  }

  double loaded(Units& u, const Step& step, int pieces) {
    u.lsu = std::max(u.lsu, now_) + (step.level == kShared ? (pieces + 1) / 2 : pieces);
    if (step.level == kShared) return u.lsu + kSharedLatency;
    if (step.level == kL1) return u.lsu + m_["l1"];
    if (step.level == kL2) {
      u.l2 = std::max(u.l2, u.lsu) + step.bytes / m_["l2_bytes"];
      return u.l2 + m_["l2"];
    }
    dram_ = std::max(dram_, u.lsu) + step.bytes / bytes_;
    return dram_ + m_["dram"];
  }

  double stored(Units& u, const Step& step, int pieces) {
    u.lsu = std::max(u.lsu, now_) + (step.level == kShared ? (pieces + 1) / 2 : pieces);
    if (step.level != kDram) return u.lsu + 10;
    const double begin = std::max(dram_, u.lsu);
    dram_ = begin + step.bytes / bytes_;
    return std::max(u.lsu + 10, begin - m_["store_buffer"]);
  }

  void take(int warp, int scoreboard, double until) {
    ++warps_[warp].busy[scoreboard];
    releases_.push({until, warp, scoreboard, generation_[slot_of(warp)]});
  }

  const Machine& m_;
  const std::vector<Trace>& traces_;
  const std::vector<int> block_;
  const int blocks_, multiprocessors_, resident_;
  std::vector<Slot> slots_;
  std::vector<Warp> warps_;
  std::vector<int> generation_;
  std::vector<Units> units_;
  std::vector<int> last_;  // that each scheduler issued for
  double bytes_;
  std::priority_queue<Release> releases_;
  double steps_of_block_ = 0, issued_ = 0, since_ = 0, until_ = 0;
  double now_ = 0, next_ = 0, dram_ = 0;
  int started_ = 0, finished_ = 0;
};

}  // namespace

int main() {
  Machine machine;
  std::vector<Trace> traces;
  std::vector<int> block;
  char buffer[1 << 16];
  while (std::fgets(buffer, sizeof buffer, stdin)) {
    std::istringstream line(buffer);
    std::string name;
    switch (buffer[0]) {
      case 'P':
        double value;
        line.ignore(1);
        if (line >> name >> value) machine.value[name] = value;
        break;
      case 'T':
        traces.emplace_back();
        break;
      case 'B':
        line.ignore(1);
        for (int t; line >> t;) block.push_back(t);
        break;
      case 'R': {
        int blocks, resident;
        line.ignore(1);
        if (line >> blocks >> resident) {
          Simulation(machine, traces, block, blocks, resident).run();
        }
        break;
      }
      default: {
        Step s;
        line >> s.stall >> s.waits >> s.sets >> s.reads >> s.unit >> s.level >> s.bytes;
        if (line) traces.back().push_back(s);
      }
    }
  }
}
