// SPDX-License-Identifier: BSD-3-Clause
// Which kernel a problem gets: warps for a row, parts of a row, shared memory.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/rows.h"

namespace masked_loss::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Teams by the 16-byte words of a row: the first entry whose rows are long enough serves it.
// blocks: how many of them are meant to be on a multiprocessor at a time.
struct Team {
  int64_t up_to;
  int warps, teams, blocks;
};
// What a row takes of a warp beside its loops, it takes of each warp of its team: teams are small.
constexpr Team kLosses[] = {{512, 1, 4, 8}, {4096, 4, 1, 8}, {INT64_MAX, 16, 1, 2}};
// With its gradient a row is kept in shared memory meanwhile, which bounds the rows, not the warps.
constexpr Team kFused[] = {
    {300, 1, 4, 8}, {900, 2, 1, 16}, {1800, 4, 1, 8}, {4096, 8, 1, 4}, {INT64_MAX, 16, 1, 2}};
constexpr Team kGeneral[] = {{INT64_MAX, 1, 4, 4}};
constexpr Team kValues[] = {{4096, 1, 4, 6}, {INT64_MAX, 4, 1, 6}};
constexpr Team kGeneralFused[] = {{1800, 1, 4, 4}, {6400, 4, 1, 4}, {INT64_MAX, 16, 1, 1}};
// However many rows there are, a log-probability has the same bits.
constexpr Team kWholeRows[] = {{2048, 1, 4, 8}, {INT64_MAX, 4, 1, 8}};
constexpr Team kDouble[] = {{INT64_MAX, 4, 1, 8}};
// Where rows are few, more warps for each: as many threads as a multiprocessor holds are wanted.
constexpr int64_t kWarpsWanted = 32, kWarpsWantedInGeneral = 16;
constexpr Team kFewRows[] = {{INT64_MAX, 4, 1, 8}, {INT64_MAX, 16, 1, 2}};
constexpr Team kFewRowsInGeneral[] = {{INT64_MAX, 4, 1, 4}, {INT64_MAX, 16, 1, 1}};

// A row is split between blocks where it is long enough to be worth another launch. A part
// gives each thread of a block something to load, and an index into it is an int.
constexpr int64_t kSplitWords = 4096;
constexpr int64_t kPartWords = 512;
constexpr int64_t kMaxWidth = 1 << 29;

// A fused row that takes a multiprocessor's shared memory for itself is first read and then written
// there, and nothing is done meanwhile; what of it does not fit overflows the L2. A cluster of up
// to eight blocks shares it, and a multiprocessor has blocks of several rows.
constexpr Team kCluster = {INT64_MAX, kClusterWarps, 1, 4};
constexpr int64_t kMaxCluster = 8;

// Shared memory that the kernels and the system want for themselves.
constexpr int64_t kReservedShared = 2 << 10;

// The gradient's look at a row finds what is kept in shared memory, the rest in L2: all the rows
// that are worked on at a time must fit there, beside the gradient that is written. Where they do
// not, one block on a multiprocessor keeps twice as much of its row as two would.
int64_t shared_bytes(const Team& team, int64_t row_bytes) {
  const int64_t block = chip().shared_of_block - kReservedShared;
  const int64_t share = chip().shared_of_multiprocessor / team.blocks - kReservedShared;
  const int64_t kept = std::max<int64_t>(0, std::min(std::min(share, block), row_bytes));
  const int64_t rest = (row_bytes - kept) * team.blocks * chip().multiprocessors;
  if (rest > chip().l2_bytes / 2) return std::min(block, row_bytes);
  return kept;
}

int64_t cluster_for(int64_t row_bytes) {
  const int64_t most = chip().shared_of_block;
  // A partition of a device may have fewer multiprocessors than a cluster may want of any device.
  const bool large_enough = chip().multiprocessors >= kMaxCluster;
  if (!chip().clusters || !large_enough || row_bytes <= most * 6 / 7) return 1;
  int64_t blocks = 4;
  while (blocks < kMaxCluster && row_bytes > blocks * most * 3 / 8) blocks *= 2;
  return blocks;
}

}  // namespace

Plan plan_rows(const RowArgs& args) {
  const int64_t row_bytes = args.cols * size_of(args.dtype);
  const int64_t words = ceil_div(row_bytes, 16);
  const bool log_probs = args.loss == RowLoss::kLogProbs;
  const bool general = log_probs || args.softcap != 0 || args.temperatures ||
                       args.temperature != 1 || args.label_smoothing != 0 || args.probs ||
                       args.stats;
  const bool whole = log_probs || args.part;
  const bool wide = args.dtype == DType::kFloat64;
  const bool fused = args.forward && args.dlogits && !whole;
  const bool losses = !whole && !general && !wide && !fused && args.forward;
  const bool values = general && args.forward && !args.dlogits && !args.part;
  const int64_t sms = chip().multiprocessors;
  const Team* entry = wide      ? kDouble
                      : whole   ? kWholeRows
                      : values  ? kValues
                      : general ? (fused ? kGeneralFused : kGeneral)
                      : losses  ? kLosses
                                : kFused;
  while (words > entry->up_to) ++entry;
  Team team = *entry;
  const int64_t wanted = sms * (general && !values ? kWarpsWantedInGeneral : kWarpsWanted);
  for (const Team& larger : general ? kFewRowsInGeneral : kFewRows) {
    const bool few = args.rows * team.warps < wanted && (losses || (general && !whole && !wide));
    // Each of its threads has something to read still.
    if (few && larger.warps > team.warps && words >= larger.warps * 128) team = larger;
  }
  const int64_t cluster = fused && !general && !wide ? cluster_for(row_bytes) : 1;
  if (cluster > 1) team = kCluster;
  const int64_t blocks = team.blocks * sms;
  Plan plan{};
  plan.capped = args.softcap != 0;
  plan.general = general;
  plan.warps = team.warps;
  plan.teams = team.teams;
  plan.blocks = blocks;
  plan.parts = 1;
  plan.width = args.cols;
  plan.phase = losses ? Phase::kLosses : values ? Phase::kValues : Phase::kRows;
  if (whole) return plan;
  int64_t parts = ceil_div(args.cols, kMaxWidth);
  if (words >= kSplitWords) {
    parts = std::max(parts, std::min(blocks / args.rows, words / kPartWords));
  }
  plan.together = cluster > 1 && parts <= cluster;
  if (plan.together) parts = cluster;
  if (parts > 1) {
    plan.phase = Phase::kRows;
    plan.width = ceil_div(ceil_div(args.cols, parts), 64) * 64;  // all parts alike aligned
    plan.parts = ceil_div(args.cols, plan.width);
  }
  if (fused && (parts == 1 || plan.together)) {
    const int64_t part_bytes = plan.width * size_of(args.dtype);
    const int64_t cached = shared_bytes(team, part_bytes * team.teams) / team.teams / 16;
    const bool whole_part = cached * 16 >= part_bytes;
    plan.cached = static_cast<int>(whole_part ? cached : cached / 32 * 32);  // else whole warps
  }
  return plan;
}

int64_t scratch_bytes(const RowArgs& args) {
  if (args.rows == 0 || args.cols == 0) return 0;
  if (args.loss == RowLoss::kLogProbs) {
    return args.dlogits ? args.rows * args.ids * static_cast<int64_t>(sizeof(double)) : 0;
  }
  if (!args.forward) return 0;
  const Plan plan = plan_rows(args);
  return plan.parts > 1 ? args.rows * plan.parts * kPartialBytes : 0;
}

namespace {

// Rows that lie at one distance are one batch of them: no division tells which one.
RowArgs in_one_batch(RowArgs args) {
  const bool together = args.batch_stride == args.steps * args.step_stride &&
                        args.grad_batch_stride == args.steps * args.grad_step_stride;
  if (!args.shift && (together || args.rows == args.steps)) args.steps = args.rows;
  return args;
}

void run(RowArgs args, Plan plan, Stream stream) {
  args = in_one_batch(args);
  const auto launch_rows = args.dtype == DType::kFloat64 || args.dtype == DType::kFloat32
                               ? launch_full_rows
                               : launch_half_rows;
  if (args.forward && plan.parts > 1 && !plan.together) {
    plan.phase = Phase::kPartial;
    launch_rows(args, plan, stream);
    plan.phase = Phase::kFinish;
  }
  launch_rows(args, plan, stream);
}

}  // namespace

void cross_entropy(const RowArgs& args, Stream stream) {
  if (args.rows == 0 || args.cols == 0) return;
  run(args, plan_rows(args), stream);
}

void rescale(const RowArgs& args, Stream stream) {
  if (args.rows == 0 || args.cols == 0) return;
  Plan plan = plan_rows(args);
  plan.unless_one = true;
  run(args, plan, stream);
}

}  // namespace masked_loss::cuda
