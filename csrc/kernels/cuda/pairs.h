// SPDX-License-Identifier: BSD-3-Clause
// How pairs of rows of logits are dealt to blocks, and the launchers of their kernels.
#pragma once

#include <cstdint>

#include "kernels/args.h"
#include "kernels/cuda/backend.h"

namespace masked_loss::cuda {

// A block works on a pair.
struct PairPlan {
  int threads;     // of a block
  int64_t blocks;  // meant to be on the chip at a time
  int64_t shared;  // bytes in which a block keeps of its pair what will be read again
};

// Students of float and of double; of half types. Two files, since half rows take a faster exp.
void launch_full_pairs(const DivergenceArgs& args, const PairPlan& plan, Stream stream);
void launch_half_pairs(const DivergenceArgs& args, const PairPlan& plan, Stream stream);

}  // namespace masked_loss::cuda
