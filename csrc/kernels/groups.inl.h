// SPDX-License-Identifier: BSD-3-Clause
// Which token a row scores, and which group a token is in. Included like math.inl.h; the backend
// has quotient.

// The token that row `row` scores, step `step` of its sequence: with shift the next one. The last
// row then scores nothing, and gets the first token, which is masked.
template <class Args>
ML_FN int64_t token_of(const Args& args, int64_t row, int64_t step) {
  if (!args.shift) return row;
  return step == args.steps - 1 ? row - step : row + 1;
}

// The last of [0, count) for which is(i) holds, where it holds up to some i, and for 0.
template <class F>
ML_FN int64_t last_where(int64_t count, const F& is) {
  int64_t last = 0;
  for (int64_t end = count - 1; last < end;) {
    const int64_t middle = (last + end + 1) / 2;
    if (is(middle)) {
      last = middle;
    } else {
      end = middle - 1;
    }
  }
  return last;
}

ML_FN int64_t group_begin(const Groups& groups, int64_t group) {
  if (!groups.bounds) return group * groups.size;
  return static_cast<int64_t>(groups.bounds[group * groups.bound_step]);
}
ML_FN int64_t group_end(const Groups& groups, int64_t group) {
  return group + 1 == groups.count ? groups.tokens : group_begin(groups, group + 1);
}
ML_FN int64_t group_of(const Groups& groups, int64_t token) {
  if (!groups.bounds) return quotient(token, groups.size);
  return last_where(groups.count, [&](int64_t g) { return group_begin(groups, g) <= token; });
}

// The group's row of the table.
ML_FN double* group_at(const Groups& groups, int64_t group) {
  return groups.table + group * groups.columns;
}
