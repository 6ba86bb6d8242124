// SPDX-License-Identifier: BSD-3-Clause
// The contract between ops and kernels: one plain struct per kernel, no torch type.
#pragma once

#include <cstdint>

namespace masked_loss {

enum class DType : int8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kBool
};

enum class Reduction : int8_t { kNone, kSum, kMean, kSequenceMean };

// What is kept of every token between the kernels and for backward, as one table [kCount, tokens]
// of the accumulation type (float; double for fp64 logits).
struct TokenField {
  enum : int64_t {
    kWeight,  // mask * [target != ignore_index]; 0 means masked: nothing of the row is ever read
    kLoss,    // cross entropy, without weight and z-loss
    kTop,     // logsumexp of the row's logits = top + log(sum); kept apart, since their sum would
    kSum,     //   round away what tells large logits apart
    kTargetMass,  // the sum of the target distribution, class weights included
    kSaved,       // up to here saved for backward
    kEntropy = kSaved,
    kCorrect,
    kCount
  };
};

// Tokens are reduced in groups: one group for all, or one for each sequence. A table
// [groups, kCount] of doubles says how each group enters the loss.
struct GroupField {
  enum : int64_t {
    kScaleLoss,    // what a token's weighted cross entropy is multiplied by
    kScaleZ,       // the same for its z-loss
    kInverseLoss,  // 1 over the weights of the group's means, where they depend on the weights;
    kInverseZ,     //   else 0
    kMeanLoss,     // these means: filled by reduce, with 0 before it
    kMeanZ,
    kCount
  };
};

// Which tokens a group has: `size` each; or, where there are bounds, those from its bound to the
// next group's, the last group all that are left. Bounds ascend from 0. The table of such groups
// has a column more, kBound, and its last group is what lies behind the last sequence: without
// weight.
struct Groups {
  int64_t tokens, count, size;
  double* table;  // [count, columns]
  int64_t columns;
  const double* bounds;  // bounds[g * bound_step], or null
  int64_t bound_step;

  enum : int64_t { kBound = GroupField::kCount };
};

// The upstream gradient, of the accumulation type: one, or one for each token or group. null: 1.
struct Upstream {
  const void* values;
  bool per_token, per_group;
};

// The same of log-probabilities: [2 or, with the entropy, 3, tokens].
struct LogProbField {
  enum : int64_t {
    kSum,  // of the logsumexp; before its row was read the token's weight, and 0 of a masked token
    kTop,
    kEntropySum,
    kCount
  };
};

struct StatField {
  enum : int64_t { kTokens, kCorrect, kEntropy, kZLoss, kCount };
};

// Weights of the tokens, and what each group's sum is divided by.
struct WeighArgs {
  Groups groups;       // out: its table, but for the means
  Groups sequences;    // that shift does not cross, and behind which nothing has a weight; or none
  int64_t steps;       // length of the last dimension of target
  bool skip_first;     // shift: nothing predicts the first token of a sequence
  const void* target;  // [tokens, ids] class indices, or null
  DType target_type;   // kInt64 or kInt32
  int64_t ids = 1;     // a token without an id that counts is masked, but where keep_ignored
  bool keep_ignored;
  int64_t classes;
  int64_t ignore_index;
  const void* mask;  // [tokens], or null: 1
  DType mask_type;
  const void* class_weight;  // [classes] of the accumulation type, or null: 1
  Reduction reduction;
  const double* normalizer;  // or null
  bool wide;                 // the accumulation type is double
  void* weight;              // out: [tokens] of the accumulation type
  void* scratch;             // what Backend::weigh_scratch wants
};

// What a token's loss is, but for its target: the options that the formulas of math.inl.h take.
struct Formula {
  double label_smoothing = 0, z_loss = 0;
  double softcap = 0;      // 0: none
  double temperature = 1;  // what capped logits are divided by
};

enum class RowLoss : int8_t { kCrossEntropy, kLogProbs };

struct RowArgs : Formula {
  RowLoss loss;
  // logits [rows, cols]: row r begins at (r / steps) * batch_stride + (r % steps) * step_stride.
  // Offsets are 64-bit: a vocabulary times a batch passes 2^31 easily.
  const void* logits;
  DType dtype;
  int64_t rows, steps, cols;
  int64_t batch_stride, step_stride;
  int64_t first, classes;  // column j is class first + j of so many
  bool shift;              // row t of a sequence scores its token t + 1
  const void* target;      // [rows, ids] class indices, or null
  DType target_type;
  int64_t ids = 1, ignore_index;  // of log-probabilities: such an id has none
  const void* probs;              // [rows, cols] class probabilities of the logits' type, or null
  const void* class_weight;       // [classes] of the accumulation type, or null
  const void* temperatures;       // one for each token, [rows] of the accumulation type, or null
  void* table;   // TokenField table [.., rows]; weight in, the rest out (in, for backward)
  bool stats;    // fill kEntropy and kCorrect too
  bool forward;  // compute the rows' losses
  // Gradient, where dlogits is not null; it may be the logits themselves.
  void* dlogits;
  int64_t grad_batch_stride, grad_step_stride;
  bool stream;           // dlogits is larger than the caches: write around them what is not there
  Groups groups;         // of the rows' tokens
  void* results[2];      // out, of log-probabilities: [rows, ids], and the entropy [rows] or null
  Upstream upstream[2];  // of each result of the loss
  void* scratch;         // as in WeighArgs
  // out, instead of losses: what these columns tell of each token, [part_numbers, rows] of the
  // accumulation type. stats: what they tell of the entropy too, of log-probabilities also.
  void* part;
  int64_t numbers;  // part_numbers, which a device cannot ask for
};

// Numbers that a shard of the classes tells of each token: see shards.inl.h.
inline constexpr int64_t part_numbers(const RowArgs& args) {
  const bool log_probs = args.loss == RowLoss::kLogProbs;
  const bool soft = !log_probs && args.label_smoothing != 0;
  return 2 + 2 * soft + args.stats + (args.stats && !log_probs) + args.ids;
}

// From what all shards tell to the token table, and to the results of log-probabilities.
struct MergeArgs : RowArgs {
  const void* parts;      // [shards, part_numbers, rows]
  const int64_t* bounds;  // [shards + 1]: shard r has the classes from bounds[r] to bounds[r + 1]
  int64_t shards;
};

// What the token table holds of a divergence: weights and values where cross entropy has them, so
// that the same kernels weigh and reduce.
struct DivergenceField {
  enum : int64_t {
    kWeight = TokenField::kWeight,
    kValue = TokenField::kLoss,
    kTop,  // of the student's row, as in TokenField
    kSum,
    kTeacherTop,
    kTeacherSum,
    kMeanScore,  // of the gradient: sum_j q_j score_j
    kSaved,
    kEntropy = kSaved,
    kTeacherEntropy,
    kAgreement,
    kCount
  };
};

enum class Divergence : int8_t { kForwardKl, kReverseKl, kJsd, kSkewForwardKl, kSkewReverseKl };

// Rows of logits as base + batch * batch_stride + step * step_stride, and what they mean.
struct LogitRows {
  const void* logits;
  DType dtype;
  int64_t batch_stride, step_stride;
  double softcap;            // 0: none
  double temperature;        // what capped logits are divided by
  const void* temperatures;  // or one for each token, of the accumulation type; else null
};

struct DivergenceArgs {
  LogitRows student, teacher;
  int64_t rows, steps, cols;
  bool shift;  // row t of a sequence is that of its token t + 1
  Divergence kind;
  double beta;
  bool wide;     // the accumulation type is double
  void* table;   // DivergenceField table [.., rows]; weight in, the rest out (in, for backward)
  bool stats;    // fill what is behind kSaved too
  bool forward;  // compute the rows' values
  // Gradient of the student's logits, where dlogits is not null; it may be these logits.
  void* dlogits;
  int64_t grad_batch_stride, grad_step_stride;
  bool stream;  // as in RowArgs
  Groups groups;
  const void* dloss;  // of the accumulation type, one or [rows]; null: 1
  bool dloss_per_token;
  bool unless_one;  // do nothing where dloss is 1
};

// From the token table to the loss and the statistics.
struct ReduceArgs {
  Groups groups;  // in: scales; out: means
  Reduction reduction;
  const void* table;  // TokenField table
  bool wide;
  double z_loss;
  bool per_group;  // a loss for each group, but for what lies behind the last sequence
  void* loss;      // out: one, [tokens] or [groups]
  double* stats;   // out: [StatField], or null
  void* scratch;   // as in WeighArgs
};

// Gradient of the loss with respect to the mask.
struct MaskGradArgs {
  Groups groups;
  const void* table;  // TokenField table
  bool wide;
  double z_loss;
  const void* target;  // with class_weight
  DType target_type;
  const void* class_weight;
  Upstream dloss;
  void* dmask;  // out: [tokens] of mask_type, a floating type
  DType mask_type;
};

// A gradient that was computed for dloss = 1, of any shape, multiplied and rounded once.
struct ScaleArgs {
  const void* gradient;
  DType dtype;
  int64_t count;
  const void* factor;  // one, of the accumulation type
  void* scaled;        // out: of scaled_type; the gradient's own memory, or apart from it
  DType scaled_type;   // as dtype, or a half type where that is float32
};

// values into the token table (kLoss), and their gradient back out of it.
struct ValuesArgs {
  Groups groups;
  const void* values;  // [tokens]
  DType dtype;
  void* table;  // TokenField table: kWeight and kLoss
  bool wide;
  Upstream dloss;
  void* dvalues;  // [tokens] of dtype, or null
};

}  // namespace masked_loss
