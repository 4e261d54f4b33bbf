// A tensor as (outer, blocks, inner): which elements share a scale. There is no arithmetic on values here.
#pragma once

#include <ATen/core/Tensor.h>

namespace qatfast {

// The pair (kind, argument) of the schemas' int[2] granularity.
struct Granularity {
  enum Kind : int64_t { per_tensor, per_channel, per_group, per_token };
  Kind kind = per_tensor;
  int64_t argument = 0; // axis of per_channel, group_size of per_group

  // Whether blocks are runs of the last dimension.
  bool by_rows() const {
    return kind == per_group || kind == per_token;
  }
};

// Element (p, o, b, i) belongs to block p * blocks + b and lies at ((p * outer + o) * blocks + b) * inner + i in
// memory. There is more than one part only if rows of a tensor lie across its memory, and then inner is 1.
struct Layout {
  int64_t outer;
  int64_t blocks;
  int64_t inner;
  int64_t parts = 1;

  int64_t numel() const {
    return parts * outer * blocks * inner;
  }
};

inline int64_t blocks_of(const at::Tensor& x, Granularity granularity) {
  if (granularity.kind == Granularity::per_tensor) {
    return 1;
  }
  if (granularity.kind == Granularity::per_channel) {
    return x.size(granularity.argument);
  }
  const auto rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return granularity.kind == Granularity::per_token ? rows : rows * (x.size(-1) / granularity.argument);
}

// Whether x has to be contiguous: only the loops of the CPU take blocks that lie across memory.
inline bool needs_contiguous(const at::Tensor& x, Granularity granularity) {
  return granularity.by_rows() && !x.is_cpu();
}

// The layout of `x`, which is non-overlapping and dense, and contiguous if needs_contiguous. Blocks are numbered in the
// order of memory.
inline Layout layout_of(const at::Tensor& x, Granularity granularity) {
  const auto blocks = blocks_of(x, granularity);
  if (x.numel() == 0) {
    return {1, blocks, 0};
  }
  if (granularity.kind == Granularity::per_channel && blocks > 1) {
    const auto inner = x.stride(granularity.argument); // of a dense tensor: the elements within one index
    return {x.numel() / (blocks * inner), blocks, inner};
  }
  if (granularity.by_rows()) {
    const auto size = granularity.kind == Granularity::per_token ? x.size(-1) : granularity.argument;
    const auto inner = x.size(-1) > 1 ? x.stride(-1) : 1;
    if (size > 1 && inner > 1) {
      return {size, inner, 1, x.numel() / (size * inner)};
    }
  }
  return {1, blocks, x.numel() / blocks};
}

} // namespace qatfast
