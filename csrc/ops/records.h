// SPDX-License-Identifier: BSD-3-Clause
// Functions that take records, as the dispatcher calls them: with the fields one by one.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

namespace masked_loss {

template <class...>
struct Types {};

// The fields of an argument, in their order. One that is no record is its own only field.
template <class Argument>
struct Fields {
  using types = Types<Argument>;
};

template <class... Lists>
struct Joined;
template <class... A>
struct Joined<Types<A...>> {
  using types = Types<A...>;
};
template <class... A, class... B, class... Rest>
struct Joined<Types<A...>, Types<B...>, Rest...> : Joined<Types<A..., B...>, Rest...> {};

template <class T>
constexpr size_t count_of = 0;
template <class... T>
constexpr size_t count_of<Types<T...>> = sizeof...(T);

template <class Result, class Arguments, class Each>
struct Flat;
template <class Result, class... Arguments, class... Each>
struct Flat<Result, Types<Arguments...>, Types<Each...>> {
  template <auto function>
  static Result call(Each... each) {
    return apply<function>(All(std::move(each)...), std::index_sequence_for<Arguments...>());
  }

 private:
  using All = std::tuple<Each&&...>;

  template <class Argument>
  static constexpr size_t fields = count_of<typename Fields<Argument>::types>;
  // Of argument i, where among all its fields begin.
  static constexpr size_t begin(size_t i) {
    constexpr size_t counts[] = {fields<Arguments>...};
    size_t sum = 0;
    while (i > 0) sum += counts[--i];
    return sum;
  }
  template <auto function, size_t... i>
  static Result apply(All&& all, std::index_sequence<i...>) {
    return function(made<Arguments, begin(i)>(std::move(all),
                                              std::make_index_sequence<fields<Arguments>>())...);
  }
  template <class Argument, size_t first, size_t... i>
  static std::decay_t<Argument> made(All&& all, std::index_sequence<i...>) {
    return {std::get<first + i>(std::move(all))...};
  }
};
template <class Result, class... Arguments>
Flat<Result, Types<Arguments...>,
     typename Joined<Types<>, typename Fields<Arguments>::types...>::types>
    flat_of(Result (*)(Arguments...));

template <auto function>
constexpr auto flat = &decltype(flat_of(function))::template call<function>;

}  // namespace masked_loss
