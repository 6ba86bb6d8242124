// SPDX-License-Identifier: BSD-3-Clause
// The losses of rows without a gradient, a softcap, a temperature, smoothing or statistics: what an
// evaluation and a loss for each token ask for.
//
// A kernel of its own: there is nothing to do but to read, at the speed of the memory, and what a
// row takes of a warp beside its loops is all that can be saved. Teams are those of rows.inl.cuh.
// Included inside a file's own namespace, after look.inl.cuh.

template <class T, int kWarps>
struct Forward {
  using Loss = CrossEntropy<false>;
  static constexpr int kThreads = kWarps * kWarp;

  const RowArgs& args;

  ML_FN static int rank() { return static_cast<int>(threadIdx.x) % kThreads; }

  // states: of the block's warps, which they hand to the first one. Whether they did.
  ML_FN bool run(int64_t row, LogSumExp<float>* states) const {
    const int64_t batch = quotient(row, args.steps), step = row - batch * args.steps;
    const Token<float> token{args, token_of(args, row, step)};
    const int64_t label = index_at(args.target, args.target_type, token.index);
    if (token.column(TokenField::kWeight) == 0) {
      if (rank() == 0) Loss::finish_masked(token);
      return false;
    }
    const T* const x =
        static_cast<const T*>(args.logits) + batch * args.batch_stride + step * args.step_stride;
    T own{};
    float hard = 0;
    if (rank() == 0) {  // nothing waits for these before the row's loads
      own = x[label - args.first];
      hard = Loss::template hard<float>(args, label);
    }
    Look<T, kThreads> look{x, static_cast<int>(args.cols), rank(), nullptr, 0};
    LogSumExp<float> lse = merged_in_warp(look.template run<false>());
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if constexpr (kWarps > 1) {
      if (lane == 0) states[threadIdx.x / kWarp] = lse;
      __syncthreads();  // the row's losses: of all warps
      if (threadIdx.x >= kWarp) return true;
      lse = merged_in_warp(lane < kWarps ? states[lane] : LogSumExp<float>());
    }
    if (lane != 0) return true;
    TargetSums<double> wide;
    wide.top = lse.top, wide.sum = lse.sum;
    Loss::finish(token, wide, static_cast<double>(widen(own)), hard);
    return true;
  }

  // Lanes agree on the largest top first, and then only add: each is rescaled, and rounded, once.
  ML_FN static LogSumExp<float> merged_in_warp(LogSumExp<float> lse) {
    float top = lse.top;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) top = max(top, from_lane_xor(top, mask));
    lse.raise(top);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) lse.add({top, from_lane_xor(lse.sum, mask)});
    return lse;
  }
};

template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps == 16 ? 512 : 128, kWarps == 16 ? 2 : 10)
    forward_kernel(const RowArgs args) {
  const Forward<T, kWarps> forward{args};
  const int teams = static_cast<int>(blockDim.x) / (kWarps * kWarp);
  const int team = team_of_block<kWarps>();
  // Two sets in turn: a warp may bring the next row's while the first still reads this one's.
  __shared__ uint2 slots[2][kWarps];
  int turn = 0;
  for (int64_t row = int64_t{blockIdx.x} * teams + team; row < args.rows;
       row += int64_t{gridDim.x} * teams) {
    turn ^= forward.run(row, reinterpret_cast<LogSumExp<float>*>(slots[turn]));
  }
}

template <class T>
void launch_forward(const RowArgs& args, const Plan& plan, Stream stream) {
  auto kernel = plan.warps == 1 ? forward_kernel<T, 1> : forward_kernel<T, 4>;
  if (plan.warps == 16) kernel = forward_kernel<T, 16>;
  const int64_t blocks = (args.rows + plan.teams - 1) / plan.teams;
  launch(kernel, blocks, plan.warps * plan.teams * kWarp, 0, stream, args);
}
