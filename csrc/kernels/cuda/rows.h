// SPDX-License-Identifier: BSD-3-Clause
// How rows of logits are dealt to blocks, and the launchers of the row kernels.
#pragma once

#include <cstdint>

#include "kernels/args.h"
#include "kernels/cuda/backend.h"

namespace masked_loss::cuda {

enum class Phase : int8_t {
  kRows,     // rows from beginning to end, or by a cluster
  kPartial,  // of every part of a row: what one look at it tells, into scratch
  kLosses,   // nothing but the losses of whole rows, and plain ones (forward.inl.cuh)
  kValues,   // nothing but what whole rows tell, with options or of log-probabilities
  kFinish,   // from all the parts of a row to its loss, and the gradient of each part
};

constexpr int kClusterWarps = 8;  // of a block in a cluster

struct Plan {
  bool capped;      // by a softcap
  bool general;     // a softcap, a temperature, a soft target distribution, or statistics
  int warps;        // the warps of a team; a team works on a row
  int teams;        // teams in a block
  int64_t blocks;   // meant to be on the chip at a time
  int64_t parts;    // a row is shared by so many teams
  bool together;    // which are a cluster of blocks, and work on it at the same time
  int64_t width;    // columns of a part
  int cached;       // 16-byte words of a row, or of its part, that a team keeps in shared memory
  bool unless_one;  // do nothing where dloss is 1
  Phase phase;
};

// What kPartial leaves for kFinish, at most.
constexpr int64_t kPartialBytes = 64;

Plan plan_rows(const RowArgs& args);

// float and double rows; half rows. Two files, since half rows take a faster exp.
void launch_full_rows(const RowArgs& args, const Plan& plan, Stream stream);
void launch_half_rows(const RowArgs& args, const Plan& plan, Stream stream);

}  // namespace masked_loss::cuda
