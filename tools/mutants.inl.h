// SPDX-License-Identifier: BSD-3-Clause
// An operator that can be another one: `a + b`, written `a +Plus<7>()+ b`, is a - b in mutant 7.
// The precedence stays that of the operator. Included by tools/mutate.py into each namespace whose
// formulas it changes, so that the functions are compiled for that instruction set.

#define ML_MUTATION(Name, OP, OTHER)                                                         \
  template <int number>                                                                      \
  struct Name {};                                                                            \
  template <int number, class A>                                                             \
  struct Name##Of {                                                                          \
    A a;                                                                                     \
  };                                                                                         \
  template <int number, class A>                                                             \
  inline __attribute__((always_inline)) Name##Of<number, A> operator OP(A a, Name<number>) { \
    return {a};                                                                              \
  }                                                                                          \
  template <int number, class A, class B>                                                    \
  inline __attribute__((always_inline)) auto operator OP(Name##Of<number, A> left, B b) {    \
    using Result = decltype(left.a OP b);                                                    \
    return ::masked_loss_mutants[number] ? Result(left.a OTHER b) : Result(left.a OP b);     \
  }
ML_MUTATION(Plus, +, -)
ML_MUTATION(Minus, -, +)
ML_MUTATION(Times, *, /)
ML_MUTATION(Over, /, *)
ML_MUTATION(Less, <, <=)
ML_MUTATION(AtMost, <=, <)
ML_MUTATION(Greater, >, >=)
ML_MUTATION(AtLeast, >=, >)
ML_MUTATION(Equal, ==, !=)
ML_MUTATION(Unequal, !=, ==)
#undef ML_MUTATION

template <int number>
inline __attribute__((always_inline)) int added() {
  return ::masked_loss_mutants[number];
}
