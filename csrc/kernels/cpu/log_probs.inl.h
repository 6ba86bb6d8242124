// SPDX-License-Identifier: BSD-3-Clause
// The ids of a token that have a log-probability, and their upstream gradients. Few of them lie on
// the stack.
template <class A>
struct Ids {
  static constexpr int64_t kFew = 64;
  int64_t few_ids[kFew];
  A few_numbers[2 * kFew];
  int64_t* column = few_ids;  // in these logits
  A *upstream = few_numbers, *derivative;
  int64_t count = 0;

  explicit Ids(const Token<A>& token) {
    const int64_t ids = token.args.ids;
    if (ids > kFew) {
      column = static_cast<int64_t*>(std::malloc(ids * sizeof(int64_t)));
      upstream = static_cast<A*>(std::malloc(2 * ids * sizeof(A)));
    }
    derivative = upstream + ids;
    for (int64_t k = 0; k < ids; ++k) {
      if (token.id(k) == token.args.ignore_index) continue;
      column[count] = token.id(k) - token.args.first;
      upstream[count++] = token.upstream_of_id(k);
    }
  }
  Ids(const Ids&) = delete;
  ~Ids() {
    if (column != few_ids) std::free(column), std::free(upstream);
  }

  // All that goes to the class of id k, which may be there more than once.
  double total_of(int64_t k) const {
    int64_t times = 0;
    for (int64_t i = 0; i < count; ++i) times += column[i] == column[k];
    if (times == 1) return upstream[k];
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += column[i] == column[k] ? upstream[i] : A(0);
    return sum;
  }
};
