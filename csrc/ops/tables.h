// SPDX-License-Identifier: BSD-3-Clause
// The tables of tokens and groups (kernels/args.h) as tensors: filled with the weights that every
// loss begins with, and reduced to the result that it ends with.
#pragma once

#include "kernels/args.h"
#include "ops/backend_of.h"
#include "ops/tensors.h"

namespace masked_loss {

// The memory that a CUDA kernel's blocks hand each other their results in; the CPU asks for none.
// To be kept until the kernel is launched: what the stream does later, it does in order.
template <class Args>
OptionalTensor scratch_for(int64_t (*bytes_for)(const Args&), Args* args, const Tensor& like) {
  const int64_t bytes = bytes_for(*args);
  if (bytes == 0) return std::nullopt;
  Tensor scratch = empty(like, {(bytes + 7) / 8}, aoti_torch_dtype_float64());
  args->scratch = scratch.data_ptr();
  return scratch;
}

// Token and group tables, filled by fill_tables(). The table of groups of any length has a row for
// each bound: see Groups.
struct Tables {
  Tensor tokens, groups;

  // As the kernels are told.
  Groups of(int64_t count) const {
    const int64_t rows = groups.size(0), columns = groups.size(1);
    double* const table = doubles(groups);
    if (columns > Groups::kBound) {
      return {count, rows, 0, table, columns, table + Groups::kBound, columns};
    }
    const int64_t group_count = std::max<int64_t>(1, rows);
    return {count, group_count, count / group_count, table, columns, nullptr, 0};
  }
};

// What the tokens of a loss are weighed by.
struct Weights {
  const OptionalTensor &mask, &normalizer, &cu_seqlens;
  bool per_sequence;  // a result for each sequence
};

Shape outer(const Shape& shape);

// Weighs the tokens of args.groups into args.weight. A target out of range is complained about
// here.
void weigh(const char* who, const Device& device, WeighArgs args, const Tensor& like,
           const Weights& weights, const Shape& token_shape, const Shape& targets);

Tables fill_tables(const char* who, const Device& device, WeighArgs args, const Tensor& like,
                   int64_t fields, const Weights& weights, const Shape& token_shape);

void check_tokens(const char* who, const Tensor& tokens, int64_t rows, bool wide, int64_t fields);
void check_tables(const char* who, const Tables& tables, int64_t rows, bool wide, int64_t fields);

struct Reduced {
  Tensor loss, stats;
};
Reduced reduced(const Device& device, const Tables& tables, const Shape& shape, ReduceArgs args,
                bool stats);
Reduced reduced(const Device& device, const Tables& tables, Reduction reduction, double z_loss,
                const Shape& token_shape, bool stats);

// Of each token what these columns tell, into `part`.
void tell(RowArgs& args, const Device& device, const Tensor& part);
// What all shards of the classes tell, into the table and the results of `args`.
void merge(const char* who, MergeArgs& args, const Device& device, const Tensor& parts,
           const Tensor& bounds);

// The upstream gradient: one value, or one for each token or sequence.
Tensor upstream(const char* who, const Tensor& dloss, bool wide, int64_t count);
Upstream dloss_of(const Tensor& values, bool per_sequence);
// Results that there may be a dloss for; 0 where there is no token to have a gradient.
int64_t results_of(const Groups& groups, bool per_sequence);

// What the kernels are told of rows of logits.
inline void set_rows(RowArgs& args, const RowLayout& logits) {
  args.logits = logits.tensor.data_ptr();
  args.dtype = *check::dtype_of(logits.tensor);
  args.rows = logits.rows;
  args.steps = std::max<int64_t>(1, logits.steps);
  args.cols = args.classes = logits.cols;
  args.batch_stride = logits.batch_stride;
  args.step_stride = logits.step_stride;
}
// Of rows that are a shard of the classes, or are all of them.
inline void set_shard(RowArgs& args, const std::optional<Shard>& shard) {
  if (!shard) return;
  args.first = shard->first;
  args.classes = shard->classes;
}

// And of their gradient, whose rows are like theirs. dlogits may be the logits.
template <class Args>
void set_gradient(const char* who, Args& args, const Device& device, const Tensor& dlogits,
                  const Tensor& logits) {
  check::has_shape(who, "dlogits", dlogits, shape_of(logits));
  check::same_dtype(who, "dlogits", dlogits, "logits", logits);
  const std::optional<RowLayout> rows = rows_in_place(dlogits);
  if (!rows) check::fail("ValueError", who, ": dlogits must have contiguous classes and rows");
  args.dlogits = dlogits.data_ptr();
  args.grad_batch_stride = rows->batch_stride;
  args.grad_step_stride = rows->step_stride;
  args.stream =
      dlogits.numel() * static_cast<int64_t>(dlogits.element_size()) > device.kernels.cache_bytes;
}

}  // namespace masked_loss
