// SPDX-License-Identifier: BSD-3-Clause
// What is done token by token, whatever the vocabulary: weights and scales before the rows of
// logits are read, reductions and the gradients of masks and values after.
//
// Every sum is over fixed pieces of a group, a block each, in double precision, and then over the
// pieces: no atomics, the same bits in every run. Up to 2048 tokens are one piece and one launch;
// more in one block would wait for memory time and again, and longer than a second launch takes.
// Number types are told apart at run time: next to the logits these arrays are small.
#include "kernels/cuda/block.cuh"

// The assertion of check_target() must hold in every build.
#undef NDEBUG
#include <cassert>

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"
#include "kernels/math.inl.h"

constexpr int kThreads = 1024;  // of a block that sums, or fewer
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kPiece = 2048;

// Groups of tokens, each cut into pieces, as on the CPU.
struct Pieces {
  int64_t tokens, group_size, groups, per_group;

  __host__ __device__ Pieces(int64_t tokens, int64_t group_size)
      : tokens(tokens),
        group_size(group_size),
        groups(group_size ? tokens / group_size : 1),
        per_group(group_size > kPiece ? (group_size + kPiece - 1) / kPiece : 1) {}
  __host__ __device__ int64_t count() const { return groups * per_group; }
  ML_FN int64_t begin(int64_t p) const {
    const int64_t group = quotient(p, per_group);
    return group * group_size + (p - group * per_group) * kPiece;
  }
  ML_FN int64_t end(int64_t p) const {
    const int64_t group_end = (quotient(p, per_group) + 1) * group_size, end = begin(p) + kPiece;
    return end < group_end ? end : group_end;
  }
};

// Sums of a piece or of a group.
template <int N>
struct Sums {
  double v[N];
  ML_FN Sums() {
    for (int i = 0; i < N; ++i) v[i] = 0;
  }
  ML_FN void add(const Sums& other) {
    for (int i = 0; i < N; ++i) v[i] += other.v[i];
  }
};

// f(i) for every i, a thread each, in any order.
template <class F>
ML_FN void for_each_token(int64_t tokens, const F& f) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < tokens;
       i += int64_t{gridDim.x} * blockDim.x) {
    f(i);
  }
}

template <class A>
ML_FN const A* as(const void* p) {
  return static_cast<const A*>(p);
}

ML_FN double number_at(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64:
      return as<double>(p)[i];
    case DType::kFloat32:
      return as<float>(p)[i];
    case DType::kBFloat16:
      return widen(as<BFloat16>(p)[i]);
    case DType::kFloat16:
      return widen(as<Float16>(p)[i]);
    case DType::kInt64:
      return static_cast<double>(as<int64_t>(p)[i]);
    case DType::kInt32:
      return as<int32_t>(p)[i];
    case DType::kInt16:
      return as<int16_t>(p)[i];
    case DType::kInt8:
      return as<int8_t>(p)[i];
    case DType::kUInt8:
      return as<uint8_t>(p)[i];
    case DType::kBool:
      break;
  }
  return as<uint8_t>(p)[i] != 0;
}
ML_FN void store_number(double x, void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64:
      return narrow(x, static_cast<double*>(p) + i);
    case DType::kFloat32:
      return narrow(static_cast<float>(x), static_cast<float*>(p) + i);
    case DType::kBFloat16:
      return narrow(static_cast<float>(x), static_cast<BFloat16*>(p) + i);
    default:
      return narrow(static_cast<float>(x), static_cast<Float16*>(p) + i);
  }
}

template <class A>
struct Table {
  const A* base;
  int64_t tokens;
  ML_FN double operator()(int64_t which, int64_t token) const {
    return base[which * tokens + token];
  }
};

template <class A>
ML_FN double upstream(const void* dloss, bool per_token, int64_t token) {
  return dloss ? as<A>(dloss)[per_token ? token : 0] : A(1);
}

// Weights

struct WeightField {
  enum : int { kWeights, kClassWeights, kActive, kCount };
};
using WeightSums = Sums<WeightField::kCount>;

// A device has no better way to raise an error than to stop.
ML_FN void check_target(int64_t target, int64_t token, int64_t classes) {
  if (target >= 0 && target < classes) return;
  printf(
      "masked_loss: target of token %lld is %lld, expected 0 <= target < "
      "%lld\n",
      static_cast<long long>(token), static_cast<long long>(target),
      static_cast<long long>(classes));
  assert(target >= 0 && target < classes);
}

// w = mask * [target != ignore_index]; a masked token's target is not looked at either.
template <class A>
ML_FN WeightSums weigh_piece(const WeighArgs& args, int64_t begin, int64_t end) {
  WeightSums sums;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    // As the rows' kernels see it: a weight that underflows there is none here either.
    double w = args.mask ? static_cast<A>(number_at(args.mask, args.mask_type, i)) : A(1), c = 1;
    if (args.skip_first && i == quotient(i, args.steps) * args.steps) w = 0;
    if (args.target && w != 0) {
      const int64_t target = index_at(args.target, args.target_type, i);
      if (target == args.ignore_index) {
        w = 0;
      } else {
        check_target(target, i, args.classes);
        if (args.class_weight) c = as<A>(args.class_weight)[target];
      }
    }
    static_cast<A*>(args.weight)[i] = static_cast<A>(w);
    sums.v[WeightField::kWeights] += w;
    if (w != 0) sums.v[WeightField::kClassWeights] += w * c;
    sums.v[WeightField::kActive] += w != 0;
  }
  return sums;
}

// What the group's sums are multiplied by, and, for reduce(), what makes them means.
ML_FN void write_group(const WeighArgs& args, const WeightSums& sums, double active_groups,
                       double* group) {
  const bool active = sums.v[WeightField::kActive] > 0;
  const bool mean = !args.normalizer && (args.reduction == Reduction::kMean ||
                                         args.reduction == Reduction::kSequenceMean);
  double loss = 1, z = 1;
  if (args.normalizer) {
    loss = z = *args.normalizer;
  } else if (mean) {
    loss = sums.v[WeightField::kClassWeights];
    z = sums.v[WeightField::kWeights];
  }
  const double share = mean ? active_groups : 1;
  group[GroupField::kScaleLoss] = active ? group_scale(loss, share) : 0;
  group[GroupField::kScaleZ] = active ? group_scale(z, share) : 0;
  group[GroupField::kMeanLoss] = active && mean ? 1 / loss : 0;
  group[GroupField::kMeanZ] = active && mean ? 1 / z : 0;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const WeighArgs args, const Pieces pieces) {
  for (int64_t p = blockIdx.x; p < pieces.count(); p += gridDim.x) {
    const WeightSums sums =
        merge_team<kWarps>(weigh_piece<A>(args, pieces.begin(p), pieces.end(p)));
    if (threadIdx.x == 0) {
      if (pieces.count() == 1) {
        write_group(args, sums, sums.v[WeightField::kActive] > 0, args.groups);
      } else {
        static_cast<WeightSums*>(args.scratch)[p] = sums;
      }
    }
    __syncthreads();
  }
}

// One warp's sum over the pieces of a group; all lanes get it.
template <class S>
ML_FN S sum_group(const void* parts, const Pieces& pieces, int64_t group) {
  S sums;
  for (int64_t i = threadIdx.x % kWarp; i < pieces.per_group; i += kWarp) {
    sums.add(as<S>(parts)[group * pieces.per_group + i]);
  }
  merge_lanes<kWarp>(&sums, NoAlign{});
  return from_first_lane(sums);
}

// One block: from the pieces' sums to the groups' scales.
__global__ void __launch_bounds__(kThreads)
    weigh_groups_kernel(const WeighArgs args, const Pieces pieces) {
  const bool leader = threadIdx.x % kWarp == 0;
  Sums<1> active;
  for (int64_t g = threadIdx.x / kWarp; g < pieces.groups; g += blockDim.x / kWarp) {
    const WeightSums sums = sum_group<WeightSums>(args.scratch, pieces, g);
    if (leader) active.v[0] += sums.v[WeightField::kActive] > 0;
  }
  active = merge_team<kWarps>(active);
  for (int64_t g = threadIdx.x / kWarp; g < pieces.groups; g += blockDim.x / kWarp) {
    const WeightSums sums = sum_group<WeightSums>(args.scratch, pieces, g);
    if (leader) write_group(args, sums, active.v[0], args.groups + g * GroupField::kCount);
  }
}

// Reductions

struct LossField {
  enum : int { kLoss, kZ, kActive, kStats, kCount = kStats + StatField::kCount };
};
using LossSums = Sums<LossField::kCount>;

template <class A>
ML_FN double z_of(const Table<A>& table, double z_loss, int64_t token) {
  if (z_loss == 0) return 0;
  return z_term<double>(table(TokenField::kTop, token), table(TokenField::kSum, token), z_loss);
}

template <class A>
ML_FN LossSums reduce_piece(const ReduceArgs& args, int64_t begin, int64_t end) {
  const Table<A> table{as<A>(args.table), args.tokens};
  LossSums sums;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const double w = table(TokenField::kWeight, i);
    double loss = 0, z = 0;
    if (w != 0) {
      loss = w * table(TokenField::kLoss, i);
      z = w * z_of(table, args.z_loss, i);
      sums.v[LossField::kLoss] += loss;
      sums.v[LossField::kZ] += z;
      sums.v[LossField::kActive] += 1;
      if (args.stats) {
        sums.v[LossField::kStats + StatField::kTokens] += w;
        sums.v[LossField::kStats + StatField::kCorrect] += w * table(TokenField::kCorrect, i);
        sums.v[LossField::kStats + StatField::kEntropy] += w * table(TokenField::kEntropy, i);
        sums.v[LossField::kStats + StatField::kZLoss] += z;
      }
    }
    if (args.reduction == Reduction::kNone) {
      static_cast<A*>(args.loss)[i] = static_cast<A>(loss + z);
    }
  }
  return sums;
}

// A group's share in the loss; its means go to the group table.
ML_FN double group_loss(const ReduceArgs& args, const LossSums& sums, double* group, bool write) {
  if (sums.v[LossField::kActive] == 0) return 0;
  double loss = sums.v[LossField::kLoss] * group[GroupField::kScaleLoss];
  if (args.z_loss != 0) loss += sums.v[LossField::kZ] * group[GroupField::kScaleZ];
  if (write) {
    group[GroupField::kMeanLoss] *= sums.v[LossField::kLoss];
    group[GroupField::kMeanZ] *= sums.v[LossField::kZ];
  }
  return loss;
}

template <class A>
ML_FN void write_loss(const ReduceArgs& args, double loss, const double* stats) {
  if (args.reduction != Reduction::kNone) *static_cast<A*>(args.loss) = static_cast<A>(loss);
  for (int i = 0; args.stats && i < StatField::kCount; ++i) {
    static_cast<A*>(args.stats)[i] = static_cast<A>(stats[i]);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const ReduceArgs args, const Pieces pieces) {
  for (int64_t p = blockIdx.x; p < pieces.count(); p += gridDim.x) {
    const LossSums sums = merge_team<kWarps>(reduce_piece<A>(args, pieces.begin(p), pieces.end(p)));
    if (threadIdx.x == 0) {
      if (pieces.count() == 1) {
        const double loss = group_loss(args, sums, args.groups, true);
        write_loss<A>(args, loss, sums.v + LossField::kStats);
      } else {
        static_cast<LossSums*>(args.scratch)[p] = sums;
      }
    }
    __syncthreads();
  }
}

// One block: from the pieces' sums to the loss.
template <class A>
__global__ void __launch_bounds__(kThreads)
    reduce_groups_kernel(const ReduceArgs args, const Pieces pieces) {
  const bool leader = threadIdx.x % kWarp == 0;
  Sums<1 + StatField::kCount> all;
  for (int64_t g = threadIdx.x / kWarp; g < pieces.groups; g += blockDim.x / kWarp) {
    const LossSums sums = sum_group<LossSums>(args.scratch, pieces, g);
    if (!leader) continue;
    all.v[0] += group_loss(args, sums, args.groups + g * GroupField::kCount, true);
    for (int i = 0; i < StatField::kCount; ++i) all.v[1 + i] += sums.v[LossField::kStats + i];
  }
  all = merge_team<kWarps>(all);
  if (threadIdx.x == 0) write_loss<A>(args, all.v[0], all.v + 1);
}

// Token by token

template <class A>
__global__ void __launch_bounds__(256) mask_grad_kernel(const MaskGradArgs args) {
  const Table<A> table{as<A>(args.table), args.tokens};
  for_each_token(args.tokens, [&](int64_t i) {
    double d = 0;  // of a masked token too: it takes no part
    if (table(TokenField::kWeight, i) != 0) {
      const double c = args.class_weight
                           ? as<A>(args.class_weight)[index_at(args.target, args.target_type, i)]
                           : A(1);
      d = upstream<A>(args.dloss, args.dloss_per_token, i) *
          weight_grad(table(TokenField::kLoss, i), z_of(table, args.z_loss, i), c, args.z_loss,
                      args.groups + quotient(i, args.group_size) * GroupField::kCount);
    }
    store_number(d, args.dmask, args.mask_type, i);
  });
}

// Masked values are not read.
template <class A>
__global__ void __launch_bounds__(256) load_values_kernel(const ValuesArgs args) {
  A* const table = static_cast<A*>(args.table);
  const A* const weight = table + TokenField::kWeight * args.tokens;
  for_each_token(args.tokens, [&](int64_t i) {
    table[TokenField::kLoss * args.tokens + i] =
        weight[i] != 0 ? static_cast<A>(number_at(args.values, args.dtype, i)) : A(0);
  });
}

template <class A>
__global__ void __launch_bounds__(256) values_grad_kernel(const ValuesArgs args) {
  const A* const weight = as<A>(args.table) + TokenField::kWeight * args.tokens;
  for_each_token(args.tokens, [&](int64_t i) {
    double d = 0;
    if (weight[i] != 0) {
      d = upstream<A>(args.dloss, args.dloss_per_token, i) * weight[i] *
          args.groups[quotient(i, args.group_size) * GroupField::kCount + GroupField::kScaleLoss];
    }
    store_number(d, args.dvalues, args.dtype, i);
  });
}

int64_t pieces_bytes(int64_t tokens, int64_t group_size, int64_t sums_bytes) {
  const int64_t count = Pieces(tokens, group_size).count();
  return count > 1 ? count * sums_bytes : 0;
}

// No more threads than have something to add.
int threads_for(int64_t count) {
  return static_cast<int>(
      std::min<int64_t>(kThreads, (std::max<int64_t>(1, count) + 31) / 32 * 32));
}

template <class Args>
void launch_tokens(void (*kernel)(Args), const Args& args, Stream stream) {
  constexpr int kTokenThreads = 256;
  launch(kernel, (args.tokens + kTokenThreads - 1) / kTokenThreads, kTokenThreads, 0, stream, args);
}

}  // namespace

int64_t scratch_bytes(const WeighArgs& args) {
  return pieces_bytes(args.tokens, args.group_size, sizeof(WeightSums));
}
int64_t scratch_bytes(const ReduceArgs& args) {
  return pieces_bytes(args.tokens, args.group_size, sizeof(LossSums));
}

int64_t weigh(const WeighArgs& args, Stream stream) {
  const Pieces pieces(args.tokens, args.group_size);
  launch(args.wide ? weigh_kernel<double> : weigh_kernel<float>, pieces.count(),
         threads_for(args.group_size), 0, stream, args, pieces);
  if (pieces.count() > 1)
    launch(weigh_groups_kernel, 1, threads_for(32 * pieces.groups), 0, stream, args, pieces);
  return -1;
}

void reduce(const ReduceArgs& args, Stream stream) {
  const Pieces pieces(args.tokens, args.group_size);
  launch(args.wide ? reduce_kernel<double> : reduce_kernel<float>, pieces.count(),
         threads_for(args.group_size), 0, stream, args, pieces);
  if (pieces.count() != 1) {
    launch(args.wide ? reduce_groups_kernel<double> : reduce_groups_kernel<float>, 1,
           threads_for(32 * pieces.groups), 0, stream, args, pieces);
  }
}

void load_values(const ValuesArgs& args, Stream stream) {
  launch_tokens(args.wide ? load_values_kernel<double> : load_values_kernel<float>, args, stream);
}

void values_grad(const ValuesArgs& args, Stream stream) {
  launch_tokens(args.wide ? values_grad_kernel<double> : values_grad_kernel<float>, args, stream);
}

void mask_grad(const MaskGradArgs& args, Stream stream) {
  launch_tokens(args.wide ? mask_grad_kernel<double> : mask_grad_kernel<float>, args, stream);
}

}  // namespace masked_loss::cuda
