// SPDX-License-Identifier: BSD-3-Clause
// Who adds up which tokens on CUDA: a warp takes a piece of a group, batch by batch; a warp adds up
// the pieces of a group; blocks share the groups. No atomics: the same bits in every run.
//
// Up to 8192 tokens, one block does everything in one launch: on an H100 a second one costs 3 us,
// in more than a third of which nothing runs. Beyond, a first launch leaves a sum for each piece,
// and a second adds up.
//
// Included like math.inl.h, and after token.inl.h.

constexpr int kWarps = 16;  // of a block that sums, at most
constexpr int kThreads = kWarps * kWarp;

// Tokens that a warp adds up: a batch of each lane. Where they are many, more, since a warp adds up
// what the pieces of a group found.
constexpr int64_t kPiece = 256;
constexpr int64_t kMostPieces = 512;
constexpr int kPieceWarps = 4;  // of a block

// What one block does alone.
constexpr int64_t kAlone = 8192;
constexpr int64_t kGroupsAlone = 32;
// Otherwise as many groups for a block, and so many blocks at most: a warp adds up what they found.
constexpr int64_t kGroupBlocks = 1024;

// Tokens in flight of a lane: no more than its registers hold.
template <class A>
constexpr int kBatch = sizeof(A) == 8 ? 4 : 8;

// Some tokens of a lane: every kWarp-th. A device waits for memory as long for all of them as for
// one, if it is asked for all before the first is used.
template <int kSize>
struct Batch {
  int64_t first;
  int left;  // tokens of the piece, from the first one on

  ML_FN bool has(int k) const { return k * kWarp < left; }
  ML_FN int64_t operator[](int k) const { return first + k * kWarp; }

  // f(k) for all places, with a token or not
  template <class F>
  ML_FN void for_each_place(const F& f) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) f(k);
  }
  // f(k, token)
  template <class F>
  ML_FN void for_each(const F& f) const {
    for_each_place([&](int k) {
      if (has(k)) f(k, (*this)[k]);
    });
  }
  // The same, one after the other: for long f.
  template <class F>
  ML_FN void for_each_in_turn(const F& f) const {
#pragma unroll 1
    for (int k = 0; has(k); ++k) f(k, (*this)[k]);
  }
};

// Adds up what the lanes of a warp hold; all get it. Two fields are always there, the others only
// with `more`: a shuffle takes the multiprocessor a clock, for each of its warps.
template <int kFrom, int kTo, int N>
ML_FN void merge_fields(Sums<N>* sums) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = kFrom; i < kTo; ++i) sums->v[i] += from_lane_xor(sums->v[i], mask);
  }
}
template <int N>
ML_FN void merge_warp(Sums<N>* sums, bool more) {
  constexpr int kFew = N < 2 ? N : 2;
  merge_fields<0, kFew>(sums);
  if (more) merge_fields<kFew, N>(sums);
}

// Adds up what the first lanes of a block's warps hold; all threads get it. Another barrier must
// come before the next time.
template <class S>
ML_FN void merge_block(S* sums, bool more) {
  if (blockDim.x == kWarp) return;
  __shared__ uint2 slots[kWarps * sizeof(S) / sizeof(uint2)];
  S* const found = reinterpret_cast<S*>(slots);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) found[threadIdx.x / kWarp] = *sums;
  __syncthreads();
  if (lane * kWarp < static_cast<int>(blockDim.x)) {
    *sums = found[lane];
  } else {
    *sums = S();
  }
  merge_warp(sums, more);
}

// Has the L2 fetch what a warp will read of a piece; `size`: bytes of a token.
ML_FN void prefetch(const void* numbers, const Piece& piece, int64_t size) {
  constexpr int64_t kLine = 128;
#pragma unroll 1
  for (int64_t at = piece.begin * size + threadIdx.x % kWarp * kLine; at < piece.end * size;
       at += kWarp * kLine) {
    prefetch_line(static_cast<const char*>(numbers) + at);
  }
}

// parts[p] = the sum of what add(batch, &sums) adds for the tokens of piece p, which ask(piece) has
// fetched.
template <int kBatch, class S, class Ask, class Add>
ML_FN void sum_pieces(const Pieces& pieces, bool more, S* parts, const Ask& ask, const Add& add) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warps = blockDim.x / kWarp;
  for (int64_t p = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp; p < pieces.count;
       p += int64_t{gridDim.x} * warps) {
    const Piece piece = pieces[p];
    ask(piece);
    S sums;
    for (int64_t i = piece.begin; i < piece.end; i += kBatch * kWarp) {
      const int64_t left = piece.end - i < kBatch * kWarp ? piece.end - i : kBatch * kWarp;
      add(Batch<kBatch>{i + lane, static_cast<int>(left) - lane}, &sums);
    }
    merge_warp(&sums, more);
    if (lane == 0) parts[p] = sums;
  }
}

// One warp's sum of `count` states; all lanes get it.
template <class S>
ML_FN S sum_found(const S* found, int64_t count, bool more) {
  if (count == 1) return *found;
  S sums;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sums.add(found[i]);
  merge_warp(&sums, more);
  return sums;
}

// f(group, sums) in all lanes of the warp that adds up the pieces of a group, for the groups of one
// share.
template <class S, class F>
ML_FN void for_each_group(const S* parts, const Pieces& pieces, bool more, int64_t share,
                          int64_t shares, const F& f) {
  const int64_t warps = blockDim.x / kWarp;
  for (int64_t g = share * warps + threadIdx.x / kWarp; g < pieces.groups.count;
       g += shares * warps) {
    f(g, sum_found(parts + pieces.first_of(g), pieces.number_of(g), more));
  }
}

// found(share, sums) of what of(share, &sums) adds up, for every share, a block each.
template <class S, class Of, class Found>
ML_FN void sum_shares(int64_t shares, bool more, const Of& of, const Found& found) {
  for (int64_t share = blockIdx.x; share < shares; share += gridDim.x) {
    S sums;
    of(share, &sums);
    merge_block(&sums, more);
    if (threadIdx.x == 0) found(share, sums);
    __syncthreads();  // before the next share's sums
  }
}

// Where a block alone keeps what its pieces found.
template <class S>
ML_FN S* parts_alone() {
  __shared__ uint2 slots[(kWarps + kGroupsAlone) * sizeof(S) / sizeof(uint2)];
  return reinterpret_cast<S*>(slots);
}

// Launching

// How the tokens of a launch are cut, each of which takes `reads`.
struct Cut {
  bool alone;
  Pieces pieces;
};
Cut cut(const Groups& groups, int64_t reads) {
  const bool alone = groups.tokens * reads <= kAlone && groups.count <= kGroupsAlone;
  const int64_t most = alone ? kWarps : kMostPieces;
  return {alone, pieces_of(groups, std::max(kPiece, (groups.tokens + most - 1) / most))};
}

// How the groups are shared: a warp each, and as many blocks as are needed.
struct Shares {
  int64_t count;
  int threads;
};
Shares share(int64_t groups) {
  return {std::min((groups + kGroupsAlone - 1) / kGroupsAlone, kGroupBlocks),
          static_cast<int>(std::min<int64_t>(groups, kWarps)) * kWarp};
}

template <class Args>
void launch_alone(void (*kernel)(Args, Pieces), const Args& args, const Pieces& pieces,
                  Stream stream) {
  const int64_t warps = std::min<int64_t>(pieces.count, kWarps);
  launch(kernel, 1, static_cast<int>(warps) * kWarp, 0, stream, args, pieces);
}
template <class Args, class Part>
void launch_pieces(void (*kernel)(Args, Pieces, Part*), const Args& args, const Pieces& pieces,
                   Part* parts, Stream stream) {
  const int64_t blocks = (pieces.count + kPieceWarps - 1) / kPieceWarps;
  launch(kernel, blocks, kPieceWarps * kWarp, 0, stream, args, pieces, parts);
}

// What the pieces found, and behind it what the shares did.
template <class Part, class Found>
struct Scratch {
  Part* parts;
  Found* found;
};
template <class Part, class Found>
Scratch<Part, Found> scratch_at(void* memory, const Pieces& pieces) {
  Part* const parts = static_cast<Part*>(memory);
  return {parts, reinterpret_cast<Found*>(parts + pieces.count)};
}
template <class Part, class Found>
int64_t scratch_for(const Groups& groups, int64_t reads) {
  const auto [alone, pieces] = cut(groups, reads);
  if (alone) return 0;
  return pieces.count * sizeof(Part) + share(groups.count).count * sizeof(Found);
}
