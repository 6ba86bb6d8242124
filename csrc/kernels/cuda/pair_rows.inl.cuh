// SPDX-License-Identifier: BSD-3-Clause
// A pair of rows of logits: where it lies, and how a block moves its chunks from memory, to and
// from shared memory, and its gradient's to memory. Included inside a file's own namespace, after
// side.inl.cuh.

template <class T, class U>
struct PairRows {
  using A = typename Accumulation<T>::Type;
  using Field = DivergenceField;
  // Classes of a chunk, which is always the same thread's. Aligned ones are moved 16 bytes at a
  // time.
  static constexpr int N = std::is_same_v<U, AnyType> ? 8 : kPerWord16<T>;
  // Kernels that take a teacher of any type take softcaps too.
  static constexpr bool kCapped = std::is_same_v<U, AnyType> || std::is_same_v<T, double>;
  using Student = Side<T, A, N, kCapped>;
  using Teacher = Side<U, A, N, kCapped>;
  // Of a chunk's scores, which may be kept where its teacher's words were.
  static constexpr int kScoreWords = N * static_cast<int>(sizeof(A)) / 16;

  struct Chunk {
    typename Student::Chunk student;
    typename Teacher::Chunk teacher;
  };

  struct Pair {
    int64_t token;
    Student student;
    Teacher teacher;
    T* dx;
    bool aligned;
    bool in_place;  // then only a chunk's own thread reads its bytes, which it overwrites
  };

  const DivergenceArgs& args;
  const int kept;  // the first chunks of a pair, in shared memory
  const int whole = static_cast<int>(args.cols / N), rest = static_cast<int>(args.cols % N);
  const int chunks = whole + (rest != 0);

  ML_FN static int rank() { return static_cast<int>(threadIdx.x); }
  ML_FN static int threads() { return static_cast<int>(blockDim.x); }

  ML_FN A& column(int64_t which, int64_t token) const {
    return static_cast<A*>(args.table)[which * args.rows + token];
  }

  ML_FN Pair pair_at(int64_t row) const {
    const int64_t batch = quotient(row, args.steps), step = row - batch * args.steps;
    const int64_t token = token_of(args, row, step);
    Pair r{token, {args.student, batch, step, token}, {args.teacher, batch, step, token}, nullptr,
           false, args.dlogits == args.student.logits};
    if (args.dlogits) {
      r.dx = static_cast<T*>(args.dlogits) + batch * args.grad_batch_stride +
             step * args.grad_step_stride;
    }
    r.aligned = r.student.is_aligned() && r.teacher.is_aligned() &&
                reinterpret_cast<uintptr_t>(r.dx) % 16 == 0;
    return r;
  }

  // Chunks

  ML_FN int count_of(int k) const { return k < whole ? N : rest; }
  struct Whole {  // such a count, of an aligned row
    ML_FN operator int() const { return N; }
  };
  template <class Count>
  static constexpr bool is_whole = std::is_same_v<Count, Whole>;

  ML_FN static Chunk load_whole(const Pair& r, int k) {
    return {r.student.template whole<false>(k), r.teacher.template whole<false>(k)};
  }
  ML_FN Chunk load(const Pair& r, int k) const {
    if (r.aligned && k < whole) return load_whole(r, k);
    // Words that reach beyond the chunk lie within the row.
    if (!r.in_place && 0 < k && k < whole - 1) {
      return {r.student.template whole<true>(k), r.teacher.template whole<true>(k)};
    }
    const int count = count_of(k);
    return {r.student.part(k, count), r.teacher.part(k, count)};
  }

  // Word w of what is kept of chunk k.
  ML_FN uint4& kept_word(int w, int k) const { return shared_memory[w * kept + k]; }

  ML_FN void keep(int k, const Chunk& chunk) const {
    if (k >= kept) return;
#pragma unroll
    for (int w = 0; w < Student::kWords; ++w) kept_word(w, k) = chunk.student.words[w];
#pragma unroll
    for (int w = 0; w < Teacher::kWords; ++w) {
      kept_word(Student::kWords + w, k) = chunk.teacher.words[w];
    }
  }
  ML_FN Chunk load_again(const Pair& r, int k) const {
    return k < kept ? kept_chunk(k) : load(r, k);
  }
  ML_FN Chunk kept_chunk(int k) const {
    Chunk chunk;
#pragma unroll
    for (int w = 0; w < Student::kWords; ++w) chunk.student.words[w] = kept_word(w, k);
#pragma unroll
    for (int w = 0; w < Teacher::kWords; ++w) {
      chunk.teacher.words[w] = kept_word(Student::kWords + w, k);
    }
    return chunk;
  }

  ML_FN void keep_scores(int k, const A (&scores)[N]) const {
    if (k >= kept) return;
    uint4 words[kScoreWords];
    memcpy(words, scores, sizeof words);
#pragma unroll
    for (int w = 0; w < kScoreWords; ++w) kept_word(Student::kWords + w, k) = words[w];
  }
  ML_FN void kept_scores(int k, A (&scores)[N]) const {
    uint4 words[kScoreWords];
#pragma unroll
    for (int w = 0; w < kScoreWords; ++w) words[w] = kept_word(Student::kWords + w, k);
    memcpy(scores, words, sizeof words);
  }

  // f(k, count, chunk) for this thread's chunks. Nothing is asked about most of them: a loop of
  // their own has the whole ones of aligned rows.
  template <class F>
  ML_FN void for_each_again(const Pair& r, const F& f) const {
    int k = rank();
    const bool ahead = !kCapped && r.aligned;
    for (; ahead && k < kept && k < whole; k += threads()) f(k, Whole{}, kept_chunk(k));
    for (; ahead && k < whole; k += threads()) f(k, Whole{}, load_whole(r, k));
    for (; k < chunks; k += threads()) f(k, count_of(k), load_again(r, k));
  }
  // kStores: f stores, so that it matters how the gradient is aligned.
  template <bool kStores, class F>
  ML_FN void for_each_backwards(const Pair& r, const F& f) const {
    int k = rank() < chunks ? rank() + (chunks - 1 - rank()) / threads() * threads() : -1;
    int odd = 0;  // the first chunk of which something must be asked
    if (!kCapped && r.aligned) odd = whole;
    if (!kCapped && !r.aligned && !kStores) odd = kept < whole ? kept : whole;
    for (; k >= odd; k -= threads()) f(k, count_of(k), load_again(r, k));
    for (; !kCapped && k >= kept; k -= threads()) f(k, Whole{}, load_whole(r, k));
    for (; !kCapped && k >= 0; k -= threads()) f(k, Whole{}, kept_chunk(k));
  }

  // The gradient

  template <class Count>
  ML_FN void store(const Pair& r, int k, Count count, const A (&d)[N]) const {
    T* const to = r.dx + int64_t{k} * N;
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(to) % 16);
    const int lane = rank() % kWarp;
    const bool all_lanes = k - lane + kWarp <= whole;  // have a chunk
    int begin = 0, end = count;                        // what is stored class by class
    if (is_whole<Count> || (misaligned == 0 && k < whole)) {
      begin = end;
#pragma unroll
      for (int w = 0; w < Student::kWords; ++w) {
        store_word(reinterpret_cast<uint4*>(to) + w, pack(d + w * kPerWord16<T>, T{}));
      }
    } else if (!r.in_place && all_lanes) {
      // A lane's last word ends in the next lane's chunk.
      uint4 words[Student::kWords + 1];
#pragma unroll
      for (int w = 0; w < Student::kWords; ++w) words[w] = pack(d + w * kPerWord16<T>, T{});
      words[Student::kWords] = from_lane(words[0], (lane + 1) % kWarp);
      const int head = (16 - misaligned) / static_cast<int>(sizeof(T));
#pragma unroll
      for (int w = 0; w < Student::kWords; ++w) {
        if (w == Student::kWords - 1 && lane == kWarp - 1) continue;
        store_word(reinterpret_cast<uint4*>(to + head) + w,
                   between(words[w], words[w + 1], 16 - misaligned));
      }
      if (lane == kWarp - 1) begin = N - kPerWord16<T> + head;
      if (lane == 0) end = head;
      if (0 < lane && lane < kWarp - 1) end = 0;
    }
    if (begin == end) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (begin <= i && i < end) narrow(d[i], to + i);
    }
  }
  ML_FN void store_word(uint4* at, const uint4& word) const {
    if (args.stream) {
      __stcs(at, word);
    } else {
      *at = word;
    }
  }
};
