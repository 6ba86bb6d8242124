// SPDX-License-Identifier: BSD-3-Clause
// What takes a thread for each token, and the table of all that the backend has.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/team.cuh"

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/token.inl.h"

constexpr int kTokenThreads = 256;  // of a block

// f(i) for every i, a thread each, in any order.
template <class F>
ML_FN void for_each(int64_t count, const F& f) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    f(i);
  }
}

// The token as a piece by itself.
ML_FN Piece piece_at(const Groups& groups, int64_t token) {
  return {group_of(groups, token), token, token + 1};
}

template <class A>
__global__ void __launch_bounds__(kTokenThreads) mask_grad_kernel(const MaskGradArgs args) {
  for_each(args.groups.tokens,
           [&](int64_t i) { write_mask_grad<A>(args, piece_at(args.groups, i), i); });
}
template <class A>
__global__ void __launch_bounds__(kTokenThreads) load_values_kernel(const ValuesArgs args) {
  for_each(args.groups.tokens, [&](int64_t i) { load_value<A>(args, i); });
}
template <class A>
__global__ void __launch_bounds__(kTokenThreads) values_grad_kernel(const ValuesArgs args) {
  for_each(args.groups.tokens,
           [&](int64_t i) { write_value_grad<A>(args, piece_at(args.groups, i), i); });
}

template <class Args>
void launch_tokens(void (*kernel)(Args), const Args& args, Stream stream) {
  launch(kernel, (args.groups.tokens + kTokenThreads - 1) / kTokenThreads, kTokenThreads, 0, stream,
         args);
}

}  // namespace

void load_values(const ValuesArgs& args, Stream stream) {
  launch_tokens(args.wide ? load_values_kernel<double> : load_values_kernel<float>, args, stream);
}
void values_grad(const ValuesArgs& args, Stream stream) {
  launch_tokens(args.wide ? values_grad_kernel<double> : values_grad_kernel<float>, args, stream);
}
void mask_grad(const MaskGradArgs& args, Stream stream) {
  launch_tokens(args.wide ? mask_grad_kernel<double> : mask_grad_kernel<float>, args, stream);
}

const Backend kBackend = {weigh,         cross_entropy, merge,         rescale,     divergence,
                          load_values,   reduce,        mask_grad,     values_grad, scale,
                          scratch_bytes, scratch_bytes, scratch_bytes, 32 << 20};  // most of an L2

}  // namespace masked_loss::cuda
